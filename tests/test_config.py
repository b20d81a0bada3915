import pytest

from llmq.config import BITS, GROUP_SIZES, AWQConfig, CalibConfig, GPTQConfig, KVCacheConfig, QuantScheme, one_of


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sym", [True, False])
def test_scheme_prints_and_parses_back(bits, group_size, sym):
    scheme = QuantScheme(bits, group_size, sym)
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("group_size", "in_features", "widths"),
    [(128, 256, [128, 128]), (128, 300, [128, 128, 44]), (-1, 300, [300]), (64, 48, [48]), (32, 1, [1])],
)
def test_groups_cover_every_column_once(group_size, in_features, widths):
    scheme = QuantScheme(4, group_size)
    slices = scheme.slices(in_features)
    assert [s.stop - s.start for s in slices] == widths
    assert scheme.n_groups(in_features) == len(widths)
    assert slices[-1].stop == in_features


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantScheme(bits=5), r"bits is 5; known: 2, 3, 4, 8"),
        (lambda: QuantScheme(group_size=0), r"group_size is 0; known: -1, 32, 64, 128, 256"),
        (lambda: QuantScheme.parse("int4"), r"'int4' is not of the form w<bits>g<group size\|row>"),
        (lambda: GPTQConfig(percdamp=0), r"percdamp is 0; .* 0 < percdamp < 1"),
        (lambda: GPTQConfig(grid_steps=-1), r"grid_steps is -1"),
        (lambda: AWQConfig(n_grid=1), r"n_grid is 1; use 2 to 100"),
        (lambda: CalibConfig(nsamples=0), r"nsamples is 0; it must be at least 1"),
        (lambda: CalibConfig(seqlen=4), r"seqlen is 4; a window needs at least 8"),
        (lambda: one_of("method", "gtpq", {"gptq": 1, "rtn": 2}), r"method is 'gtpq'; known: gptq, rtn"),
    ],
)
def test_errors_name_value_and_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("text", "bits"), [("8", (8, 8)), ("k8v4", (8, 4)), ("16", (16, 16)), ("k4v2", (4, 2))])
def test_kv_bits_read_as_they_print(text: str, bits: tuple[int, int]) -> None:
    cfg = KVCacheConfig.parse(text)
    assert ((cfg.k_bits, cfg.v_bits), str(cfg)) == (bits, text)


def test_kv_bits_of_a_layer() -> None:
    cfg = KVCacheConfig(8, 8, layers=("k8v4", "4"))
    assert [cfg.of_layer(i) for i in range(2)] == [(8, 4), (4, 4)]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("8*2,k8v4", ("8", "8", "k8v4")), ("4*3", ("4",) * 3), ("4,16,4", ("4", "16", "4")), ("8*1", ("8",))],
)
def test_kv_bits_by_layer_read_as_they_print(text: str, layers: tuple[str, ...]) -> None:
    cfg = KVCacheConfig.parse(text)
    assert (cfg.layers, str(cfg)) == (layers, text)


@pytest.mark.parametrize(
    ("text", "message"), [("8,", "form <bits> or <bits>\\*<layers>"), ("8*0", "form <bits>"), ("4,5", "known: 16, 8")]
)
def test_kv_bits_by_layer_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCacheConfig.parse(text)


@pytest.mark.parametrize(("text", "message"), [("5", "known: 16, 8, 4, 2"), ("v4", "form <bits> or k<bits>v<bits>")])
def test_kv_bits_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCacheConfig.parse(text)
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(layers=(text,))
