"""The native decoder against the Hugging Face graph, family by family, kernel set by kernel set.

Tolerance: two orders of evaluation in fp32 are each off from exact arithmetic by a random walk of roundings of the same
size. The size is measured: the graph itself in fp32 against the same graph in fp64. The decoder may be off by 8 times
that (it also takes other roundings of exp and tanh, of at most 2 units in the last place each).
"""

from __future__ import annotations

import copy
import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import COMPILED, core, isa, threads  # noqa: F401 - fixtures
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from llmq import (
    AutoModelForCausalLM,
    BudgetConfig,
    CalibConfig,
    QuantScheme,
    kernels,
    quantize_model,
    set_activation_bits,
)
from llmq.config import KVCacheConfig, replace
from llmq.models.families import FAMILIES
from llmq.runtime.causal_lm import graph_class
from llmq.runtime.floats import to_floats
from llmq.runtime.native import NativeDecoder
from llmq.runtime.parts import Unsupported
from llmq.runtime.qlinear import QLinear, TiedHead
from llmq.solvers import rtn

NATIVE = [f.name for f in FAMILIES if f.native]
TIMES_ROUNDING = 8


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """``folders(family)``: a quantized tiny model of three blocks."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            out = tmp_path_factory.mktemp("native") / family
            calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
            source = tiny_model(family, blocks=3)
            made[family] = quantize_model(source, QuantScheme(4, 32), method="rtn", output=out, calib=calib).folder
        return made[family]

    return get


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def ids_of(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 384, (n,), generator=draw) for n in lengths]


@torch.no_grad()
def graph_logits(model: Any, ids: Tensor) -> Tensor:
    """f32[T, V] of the Hugging Face graph itself (a subclass's forward may be native)."""
    return graph_class(model).forward(model, input_ids=ids[None], use_cache=False).logits[0]


def dequantized(model: Any, folder: Path) -> Any:
    """The same model as a plain graph of dense fp32 weights."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    state = {}
    for name, module in model.named_modules():
        if hasattr(module, "qtensor"):
            state[f"{name}.weight"] = module.qtensor().dequantize()
            if getattr(module, "bias", None) is not None:
                state[f"{name}.bias"] = module.bias
    norms = {k: v for k, v in model.state_dict().items() if "norm" in k}
    missing, unexpected = plain.load_state_dict({**state, **norms}, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    plain.tie_weights()
    return plain


def rounding_of(plain: Any, rows: list[Tensor]) -> float:
    """Largest error of the fp32 graph, against itself in fp64."""
    double = copy.deepcopy(plain).double()
    for module, twin in zip(plain.modules(), double.modules(), strict=True):
        if hasattr(module, "rotary_fn") or type(module).__name__.endswith("RotaryEmbedding"):
            twin.float()  # the angles are fp32 in both: they are part of the model, not of its evaluation
    return max(float((graph_logits(plain, r) - graph_logits(double, r)).abs().max()) for r in rows)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.usefixtures("isa")
def test_logits_are_those_of_the_graph_with_dequantized_weights(folders, family: str) -> None:
    model = load(folders(family))
    set_activation_bits(model, 16)
    plain = dequantized(model, folders(family))
    rows = ids_of(150, 40)  # windows of 8 tokens are crossed many times, and a page of 64 twice
    limit = TIMES_ROUNDING * rounding_of(plain, rows)
    decoder = NativeDecoder.of(model)
    sequences = [decoder.new_sequence() for _ in rows]
    # A batch of different lengths, in two calls that cut pages and blocks of 16.
    cuts = (101, 7)
    first = decoder.forward([r[:c] for r, c in zip(rows, cuts, strict=True)], sequences, output="all")
    second = decoder.forward([r[c:] for r, c in zip(rows, cuts, strict=True)], sequences, output="all")
    split = [torch.cat([first[:101], second[:49]]), torch.cat([first[101:], second[49:]])]
    for actual, row in zip(split, rows, strict=True):
        expected = graph_logits(plain, row)
        assert (actual - expected).abs().max() <= limit
        assert (actual - 1.01 * expected).abs().max() > limit  # one percent off would be seen


@pytest.mark.parametrize("family", NATIVE)
def test_a_model_turned_into_floats_is_the_graph_with_dequantized_weights(folders, family: str) -> None:
    model, (row,) = load(folders(family)), ids_of(50)
    plain = dequantized(model, folders(family))
    to_floats(model)
    assert type(model) is type(plain)
    assert not any(isinstance(m, QLinear | TiedHead) for m in model.modules())
    # The same operations in the same order: nothing but an embedding's scale may round differently.
    assert torch.equal(graph_logits(model, row), graph_logits(plain, row))


def test_columns_in_another_order_are_put_back_in_floats() -> None:
    linear, x = QLinear(64, 48, QuantScheme(4, 32), bias=True, activation_bits=16), torch.randn(3, 64)
    linear.set_qtensor(rtn.solve(torch.randn(48, 64), linear.scheme))
    linear.bias.data.normal_()
    linear.column_order = torch.randperm(64)
    expected, model = linear(x), torch.nn.Sequential(linear)
    to_floats(model)
    # 64 products in fp32, in two orders.
    assert (model(x) - expected).abs().max() <= 64 * 2**-24 * expected.abs().max() * 8
    assert (1.01 * model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", NATIVE)
def test_dense_models_run_too(tiny_model, family: str) -> None:
    plain = load(tiny_model(family))
    [row] = ids_of(70)
    decoder = NativeDecoder.of(plain)
    assert decoder.activation_bits == 16
    actual = decoder.forward([row], [decoder.new_sequence()], output="all")
    assert (actual - graph_logits(plain, row)).abs().max() <= TIMES_ROUNDING * rounding_of(plain, [row])


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.usefixtures("isa")
def test_int8_activations_are_those_of_qlinear(folders, family: str) -> None:
    model = load(folders(family))
    rows = ids_of(*[6] * 24)
    decoder = NativeDecoder.of(model)
    sequences = [decoder.new_sequence(kv_dtype=torch.float32) for _ in rows]
    actual = decoder.forward(rows, sequences, output="all").view(24, 6, -1)
    expected = torch.stack([graph_logits(model, row) for row in rows])
    difference = (actual - expected).abs().amax(dim=(1, 2))
    # Inputs that differ in their last bits round to the same int8, but for a rare value near a tie, which moves its
    # token and those behind it by a step: hence short rows, most of which meet no tie.
    assert (difference <= 1e-4).float().mean() >= 0.6
    assert difference.max() <= 0.5
    assert (1.01 * actual - expected).abs().max() > 1e-2  # one percent off would be seen in every row


MIXED = {"q": "w4g32", "k": "w2g64", "v": "w3g128", "o": "w8g32", "gate": "w3g32", "up": "w4g128", "down": "w4g64"}


def test_each_matrix_may_have_a_grid_of_its_own(tmp_path) -> None:
    """Three widths of int8 groups for one input, in int8 and in floats, against the graph of the same modules."""
    config = LlamaConfig(
        **{"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 100},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 40},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    names = [n for n, _ in LlamaForCausalLM(config).named_modules() if n.endswith("_proj")]
    plan = {n: MIXED[n.split(".")[-1].removesuffix("_proj")] for n in names}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    budget = BudgetConfig(plan=str(tmp_path / "plan.json"))
    folder = quantize_model(
        tmp_path / "source", QuantScheme(4, 64), method="rtn", head_bits=16, budget=budget, output=tmp_path / "out"
    ).folder
    model = load(folder)
    [row] = ids_of(60)
    row = row % 100
    for bits, limit in ((16, 1e-4), (8, 0.02)):
        set_activation_bits(model, bits)
        decoder = NativeDecoder.of(model)
        expected = graph_logits(model, row)
        sequence = decoder.new_sequence(kv_dtype=torch.float32)
        actual = torch.cat(
            [decoder.forward([row[:50]], [sequence], output="all")]
            + [decoder.forward([row[t : t + 1]], [sequence], output="all") for t in range(50, 60)]
        )
        assert (actual - expected).norm() <= limit * expected.norm()
        assert (1.05 * actual - expected).norm() > limit * expected.norm()


@pytest.mark.parametrize(("kv", "levels"), [("8", 254), ("k16v8", 254), ("4", 15), ("k8v4", 15)])
@pytest.mark.parametrize("family", NATIVE)
def test_logits_with_a_quantized_cache_are_near_those_without(folders, family: str, kv: str, levels: int) -> None:
    model = load(folders(family))
    set_activation_bits(model, 16)
    decoder = NativeDecoder.of(model)
    rows, cuts = ids_of(150, 40), (101, 7)
    first, second = ([r[:c] for r, c in zip(rows, cuts, strict=True)], [r[c:] for r, c in zip(rows, cuts, strict=True)])

    def logits(config: KVCacheConfig | None) -> Tensor:
        s = [decoder.new_sequence(kv=config) for _ in rows]
        return torch.cat([decoder.forward(part, s, output="all") for part in (first, second)])

    exact, bits = logits(None), KVCacheConfig.parse(kv)
    for config in (replace(bits, sinks=4, recent=4), replace(bits, rotate=False, sinks=0, recent=0)):
        # A code is off by at most 1 / levels of the largest element beside it, or of the distance between the ends;
        # through three layers that adds up to a few times as much at most, and to a hundredth of it at least.
        difference = (logits(config) - exact).norm() / exact.norm()
        assert 0.01 / levels < difference < 6 / levels


@pytest.mark.parametrize(("kv", "turned"), [("8", True), ("k8v16", True), ("k16v8", False), ("k4v16", False)])
def test_keys_with_scales_by_token_are_rotated(folders, kv: str, turned: bool) -> None:
    model = load(folders("llama"))
    set_activation_bits(model, 16)
    decoder, [row], bits = NativeDecoder.of(model), ids_of(100), replace(KVCacheConfig.parse(kv), sinks=0, recent=0)
    plain, rotated = (
        decoder.forward([row], [decoder.new_sequence(kv=replace(bits, rotate=rotate))], output="all")
        for rotate in (False, True)
    )
    assert torch.equal(plain, rotated) != turned


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kv", ["16", "8", "4", "4 by token"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_one_token_or_many_and_any_number_of_threads_give_the_same_bits(
    folders, family: str, bits: int, kv: str
) -> None:
    # Three parts of 128 keys. Without equal bits a guess that is checked beside others could be judged differently.
    model = load(folders(family))
    set_activation_bits(model, bits)
    decoder = NativeDecoder.of(model)
    config = KVCacheConfig.parse(kv.split()[0])
    config = replace(config, key_scales="token") if "token" in kv else config
    [row] = ids_of(330)
    together = decoder.forward([row], [decoder.new_sequence(kv=config)], output="all")
    for count in (1, 2, 3):
        kernels.set_num_threads(count)
        s = decoder.new_sequence(kv=config)
        pieces = [
            decoder.forward([row[:290]], [s], output="all"),
            decoder.forward([row[290:297]], [s], output="all"),
        ]
        pieces += [decoder.forward([t[None]], [s]) for t in row[297:]]
        assert torch.equal(torch.cat(pieces), together), count
    assert s.length == 330


def test_outputs_agree_with_each_other(folders) -> None:
    model = load(folders("gemma2"))
    decoder = NativeDecoder.of(model)
    rows = ids_of(30, 5)
    new = lambda: [decoder.new_sequence() for _ in rows]  # noqa: E731
    everything = decoder.forward(rows, new(), output="all")
    assert torch.equal(decoder.forward(rows, new(), output="last"), everything[[29, 34]])
    states = decoder.forward(rows, new(), output="states")
    assert states.shape == (35, decoder.hidden_size)
    assert torch.equal(decoder.logits(states), everything)


@pytest.mark.usefixtures("threads")
def test_many_rows_of_logits_are_shared_out_to_threads(folders) -> None:
    # So many rows, so often, that the other threads take some: the calling one alone could do a few before they wake.
    decoder = NativeDecoder.of(load(folders("gemma3")))
    [row] = ids_of(500)
    states = decoder.forward([row], [decoder.new_sequence()], output="states").repeat(20, 1)
    kernels.set_num_threads(1)
    alone = decoder.logits(states)
    kernels.set_num_threads(3)
    for _ in range(10):
        assert torch.equal(decoder.logits(states), alone)


def test_a_long_context_up_to_the_last_position(folders) -> None:
    model = load(folders("gemma3"))
    set_activation_bits(model, 16)
    plain = dequantized(model, folders("gemma3"))
    decoder = NativeDecoder.of(model)
    [row] = ids_of(decoder.max_positions)
    s = decoder.new_sequence()
    decoder.forward([row[:-1]], [s])
    actual = decoder.forward([row[-1:]], [s])
    assert (actual[0] - graph_logits(plain, row)[-1]).abs().max() <= TIMES_ROUNDING * rounding_of(plain, [row])
    with pytest.raises(ValueError, match=r"would hold 513 tokens; the model's context is 512"):
        decoder.forward([row[:1]], [s])
    assert s.length == 512


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}], ids=lambda r: r["rope_type"])  # fmt: skip
def test_rope_scaling(tiny_model, rope: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), config=config, attn_implementation="eager").eval()
    [row] = ids_of(120)
    decoder = NativeDecoder.of(plain)
    actual = decoder.forward([row], [decoder.new_sequence()], output="all")
    assert (actual - graph_logits(plain, row)).abs().max() <= TIMES_ROUNDING * rounding_of(plain, [row])


@pytest.mark.parametrize(("kv", "nbytes"), [
    # Pages of 64 tokens, keys and values of 2 heads of 16 columns, 3 layers: f16, or codes and f16 scales. Keys that
    # are codes come in blocks of 32 columns.
    ("16", 3 * 3 * 2 * 64 * (2 * 16 + 2 * 16)),
    ("8", 3 * 3 * 2 * 64 * (32 + 2 + 16 + 2)),
    ("k8v16", 3 * 3 * 2 * 64 * (32 + 2 + 2 * 16)),
])  # fmt: skip
def test_sequences_are_cropped_copied_and_grown_again(folders, kv: str, nbytes: int) -> None:
    model = load(folders("qwen3"))
    decoder = NativeDecoder.of(model)
    [row] = ids_of(140)
    s = decoder.new_sequence(kv=KVCacheConfig.parse(kv))
    assert (s.length, s.nbytes) == (0, 0)
    once = decoder.forward([row], [s])
    twin = s.copy()
    s.crop(50)
    assert (s.length, twin.length) == (50, 140)
    assert torch.equal(decoder.forward([row[50:]], [s]), once)
    other = decoder.forward([row[:3]], [twin])
    assert not torch.equal(other, once)
    assert s.length == 140
    with pytest.raises(ValueError, match=r"cannot crop a sequence of 140 tokens to 141"):
        s.crop(141)
    assert s.nbytes == nbytes


@pytest.mark.parametrize("key_scales", ["channel", "token"])
def test_a_cache_with_near_tokens_is_cropped(folders, key_scales: str) -> None:
    # 32 tokens of a long step can be taken back without a trace; beyond, what was recent once is seen as codes.
    decoder = NativeDecoder.of(load(folders("qwen3")))
    config = KVCacheConfig(4, 4, key_scales=key_scales, sinks=20, recent=40)
    [row] = ids_of(390)

    def after(*cuts: int) -> Tensor:
        s = decoder.new_sequence(kv=config)
        decoder.forward([row[:290]], [s])
        twin = s.copy()
        for cut in cuts:
            s.crop(cut)
            decoder.forward([row[cut:290]], [s])
        assert (s.length, twin.length) == (290, 290)
        return decoder.forward([row[290:]], [s], output="all")

    plain = after(289)
    assert torch.equal(after(258), plain)
    assert torch.equal(after(270, 265, 289), plain)
    deep = after(100)
    assert not torch.equal(deep, plain)
    assert (deep - plain).norm() < 0.2 * plain.norm()
    assert torch.equal(after(0), plain)


def test_memory_of_four_bits_with_near_tokens(folders) -> None:
    decoder = NativeDecoder.of(load(folders("llama")))
    [row] = ids_of(500)
    config = KVCacheConfig(4, 4, key_scales="token", sinks=4, recent=64)
    s, bare = decoder.new_sequence(kv=config), decoder.new_sequence(kv=replace(config, sinks=0, recent=0))

    def near_blocks() -> float:
        return (s.nbytes - bare.nbytes) / (3 * 2 * 16 * 2 * (12 + 16))  # of 16 tokens, 3 layers, 2 heads, f16

    for sequence in (s, bare):
        decoder.forward([row[:450]], [sequence])
    # One block of sinks; 64 recent tokens, 32 for crops, 16 for the rounding of each end.
    assert 1 + 7 <= near_blocks() <= 1 + 8
    for token in row[450:]:
        decoder.forward([token[None]], [s])
    decoder.forward([row[450:]], [bare])
    assert 1 + 7 <= near_blocks() <= 1 + 8


@pytest.mark.parametrize("kv", ["16", "8", "4"])
def test_layers_of_a_sliding_window_hold_no_more_than_it_needs(folders, kv: str) -> None:
    # Windows of 8 tokens in some layers; a page holds 64.
    model = load(folders("gemma3"))
    sliding = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert any(sliding)
    decoder = NativeDecoder.of(model)
    config = replace(KVCacheConfig.parse(kv), key_scales="token", sinks=0, recent=0)
    [row] = ids_of(450)
    s = decoder.new_sequence(kv=config)
    together = decoder.forward([row], [decoder.new_sequence(kv=config)], output="all")
    sizes, pieces = [], []
    for begin in range(0, 450, 75):
        pieces.append(decoder.forward([row[begin : begin + 75]], [s], output="all"))
        sizes.append(s.nbytes)
    assert torch.equal(torch.cat(pieces), together)  # what was forgotten is not missed
    page = sizes[0] / (2 * len(sliding))
    full = len(sliding) - sum(sliding)
    # A full layer holds the 8 pages of 450 tokens, a sliding one those of the last step and 8 + 16 + 32 tokens before.
    assert full * 8 * page + sum(sliding) * 2 * page <= sizes[-1] <= full * 8 * page + sum(sliding) * 4 * page
    s.crop(375)  # the last step
    assert torch.equal(decoder.forward([row[375:]], [s], output="all"), pieces[-1])
    assert 0 < s.least_crop <= 375
    with pytest.raises(ValueError, match=rf"to 100; use {s.least_crop} to 450, or 0: layers of a sliding window"):
        s.crop(100)
    assert s.length == 450
    s.crop(0)
    assert torch.equal(decoder.forward([row], [s], output="all"), together)


def test_layers_differ_in_the_bits_of_their_cache(folders) -> None:
    decoder = NativeDecoder.of(load(folders("llama")))
    [row] = ids_of(64)
    sizes = []
    for layers in (("k16v8",) * 3, ("16", "k16v8", "16"), ("16",) * 3):
        s = decoder.new_sequence(kv=KVCacheConfig(layers=layers))
        assert decoder.forward([row], [s]).isfinite().all()
        sizes.append(s.nbytes)
    assert sizes[0] < sizes[1] < sizes[2]
    with pytest.raises(ValueError, match=r"name 2 layers; the model has 3"):
        decoder.new_sequence(kv=KVCacheConfig(layers=("8", "8")))


def test_sequences_of_different_bits_share_a_step(folders) -> None:
    decoder = NativeDecoder.of(load(folders("qwen3")))
    rows = ids_of(70, 50)
    configs = [KVCacheConfig.parse("8"), None]
    together = decoder.forward(rows, [decoder.new_sequence(kv=c) for c in configs])
    alone = [decoder.forward([r], [decoder.new_sequence(kv=c)]) for r, c in zip(rows, configs, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_bad_input_is_an_error_and_leaves_the_sequence_alone(folders) -> None:
    decoder = NativeDecoder.of(load(folders("llama")))
    s = decoder.new_sequence()
    decoder.forward([torch.tensor([5, 6])], [s])
    good = torch.tensor([7])
    for tokens, sequences, message in (
        ([torch.tensor([5, 384])], [s], r"token id 384 at position 1 of sequence 0 is outside the vocabulary of 384"),
        ([torch.tensor([-1])], [s], r"token id -1 at position 0"),
        ([torch.zeros(0, dtype=torch.int64)], [s], r"sequence 0 gets no token"),
        ([torch.full((511,), 5)], [s], r"would hold 513 tokens"),
        ([good, good], [s, s], r"in use by another call \(or given twice\)"),
        ([good, good], [s], r"2 token rows for 1 sequences"),
        ([], [], r"no sequence was given"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.forward(tokens, sequences)
    other = NativeDecoder.of(load(folders("gemma3")))
    with pytest.raises(ValueError, match="belongs to another model"):
        other.forward([good], [s])
    with pytest.raises(ValueError, match="output is 'both'"):
        decoder.forward([good], [s], output="both")
    assert s.length == 2


def test_models_without_a_native_decoder_say_why(tiny_model) -> None:
    with pytest.raises(Unsupported, match="model type 'gpt_neox' has no native decoder"):
        NativeDecoder.of(load(tiny_model("gpt_neox")))
    llama = load(tiny_model("llama"))
    llama.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(Unsupported, match="an? Identity stands where a linear was expected"):
        NativeDecoder.of(llama)
    with kernels.use_isa("reference"), pytest.raises(Unsupported, match="plain torch"):
        NativeDecoder.of(load(tiny_model("llama")))


def test_nan_in_weights_is_an_error(tiny_model) -> None:
    model = load(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        NativeDecoder.of(model)


def test_the_decoder_follows_changes_of_the_model(folders) -> None:
    model = load(folders("llama"))
    decoder = NativeDecoder.of(model)
    assert NativeDecoder.of(model) is decoder
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, QLinear)
    linear.set_qtensor(linear.qtensor())
    assert NativeDecoder.of(model) is not decoder
    set_activation_bits(model, 16)
    assert NativeDecoder.of(model).activation_bits == 16


def test_steps_outlive_the_model_and_run_from_several_threads(folders) -> None:
    model = load(folders("mistral"))
    decoder = NativeDecoder.of(model)
    rows = ids_of(64, 64, 64, 64)
    expected = [decoder.forward([r], [decoder.new_sequence()]) for r in rows]
    del model
    gc.collect()
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = decoder.forward([rows[i]], [decoder.new_sequence()])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for i, e in enumerate(expected):
        assert torch.equal(found[i], e)
