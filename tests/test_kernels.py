"""Kernels against the reference: every available kernel set x bits x grids x ragged shapes.

All kernel sets promise the same bits (integer sums are exact, each float operation is rounded on its own, in one
order), so most checks here are equalities. The reference itself is held against exact arithmetic.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (  # noqa: F401 - fixtures
    COMPILED,
    ISAS,
    SCHEMES,
    assert_same,
    core,
    integer_qtensor,
    isa,
    random_qtensor,
    seeded,
    threads,
)

from llmq import kernels
from llmq.config import BITS, QuantScheme
from llmq.kernels import reference
from llmq.qtensor import QTensor, expand_groups


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.usefixtures("isa")
def test_every_scheme_gives_the_bits_of_the_reference(scheme: QuantScheme) -> None:
    for (n, k), m in zip([(1, 1), (17, 100), (16, 257), (33, 130), (9, 520)], (1, 3, 2, 5, 17), strict=True):
        t = random_qtensor(n, k, scheme)
        x, bias = torch.randn(m, k, generator=seeded(m, k)), torch.randn(n, generator=seeded(n))
        w = kernels.pack(t)
        assert_same(kernels.qgemm(x, w), reference.qgemm(x, t))
        assert_same(kernels.qgemm(x[:1], w, bias=bias), reference.qgemm(x[:1], t, bias=bias))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 4, 7, 8, 31, 33, 64, 100])
@pytest.mark.usefixtures("isa")
def test_every_remainder_of_rows_and_columns(bits: int, k: int) -> None:
    scheme = QuantScheme(bits, 32, False)
    x = torch.randn(3, k, generator=seeded(k))
    for n in range(1, 36):
        t = random_qtensor(n, k, scheme)
        assert_same(kernels.qgemm(x, kernels.pack(t)), reference.qgemm(x, t))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("isa")
def test_every_remainder_of_tokens(bits: int) -> None:
    t = random_qtensor(40, 96, QuantScheme(bits, 64, False))
    w = kernels.pack(t)
    x = torch.randn(100, 96, generator=seeded(bits))
    expected = reference.qgemm(x, t)
    for m in (*range(1, 28), 47, 48, 49, 95, 96, 97, 100):
        # One token or many: the same bits, so that generation does not depend on how a text was cut into calls.
        assert_same(kernels.qgemm(x[:m], w), expected[:m])


@pytest.mark.parametrize("m", [1, 50, 130])
@pytest.mark.usefixtures("isa", "threads")
def test_large_jobs_are_shared_out_to_threads_without_a_trace(m: int) -> None:
    # More work than one thread does alone, several token blocks, a last panel of 3 rows.
    t = random_qtensor(147, 2048, QuantScheme(4, 128, False))
    x = torch.randn(m, 2048, generator=seeded(m))
    w, expected = kernels.pack(t), reference.qgemm(x, t)
    for n in (1, 2, 3):
        kernels.set_num_threads(n)
        assert kernels.num_threads() == n
        assert_same(kernels.qgemm(x, w), expected)


@pytest.mark.parametrize("scheme", [QuantScheme(b, 32, b == 4) for b in BITS], ids=str)
@pytest.mark.usefixtures("isa")
def test_a_scale_off_by_one_percent_is_seen(scheme: QuantScheme) -> None:
    t = random_qtensor(20, 100, scheme)
    x = torch.randn(2, 100, generator=seeded(1))
    wrong = QTensor(t.q, (t.scale.float() * 1.01).half(), t.zero, t.scheme)
    with pytest.raises(AssertionError, match="values differ, first at"):
        assert_same(kernels.qgemm(x, kernels.pack(wrong)), reference.qgemm(x, t))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_outputs_stay_within_the_error_of_int8_activations(isa_name: str, scheme: QuantScheme) -> None:
    n, k, m = 33, 300, 4
    t = random_qtensor(n, k, scheme)
    x = torch.randn(m, k, generator=seeded(2))
    w = t.dequantize().double()
    with kernels.use_isa(isa_name):
        actual = kernels.qgemm(x, kernels.pack(t)).double()
    # An activation is off by at most half a step, max|group| / 127 / 2; 1 % more covers fp32's roundings (about 1e-6).
    group = reference.kernel_group(scheme, k)
    step = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in x.split(group, 1)], 1).double() / 127
    bound = 1.01 * (step / 2) @ w.abs().T
    error = (actual - x.double() @ w.T).abs()
    assert (error <= bound).all(), f"largest error {error.max()}, {(error / bound).max():.2f} of what is allowed"
    assert error.max() > 0  # activations really are int8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", ["none", "mid", "top"])
@pytest.mark.parametrize("signs", ["all +127", "all -127", "alternating"])
@pytest.mark.usefixtures("isa")
def test_extreme_integers_do_not_saturate(bits: int, zero: str, signs: str) -> None:
    scheme = QuantScheme(bits, -1, False)
    top = scheme.levels - 1
    k = 128
    z = {"none": 0, "mid": scheme.mid, "top": top}[zero]
    sign = {"all +127": 1, "all -127": -1, "alternating": 1 - 2 * (torch.arange(k) % 2)}[signs]
    x = (127 * torch.ones(9, k) * sign).float()  # largest magnitude 127: scale 1, codes are the values themselves
    for code in (0, top):
        t = integer_qtensor(torch.full((18, k), code, dtype=torch.uint8), z, scheme)
        # |sum| <= 128 * 255 * 127 < 2**24: exact in fp32.
        expected = x.long() @ (t.q.long() - z).T
        assert_same(kernels.qgemm(x, kernels.pack(t)), expected.float())
        assert_same(kernels.qgemm(x[:1], kernels.pack(t)), expected[:1].float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("isa")
def test_integer_sums_are_exact(bits: int) -> None:
    g, k = seeded(bits), 128
    scheme = QuantScheme(bits, 128, False)
    q = torch.randint(0, scheme.levels, (50, k), generator=g, dtype=torch.uint8)
    x = torch.randint(-127, 128, (11, k), generator=g).float()
    x[:, 5::32] = 127  # scale 1, in pieces of a group too
    expected = (x.long() @ (q.long() - 3).T).float()
    assert_same(kernels.qgemm(x, kernels.pack(integer_qtensor(q, 3, scheme))), expected)


@pytest.mark.parametrize("isa_name", ISAS)
def test_float_activations_use_no_int8(isa_name: str) -> None:
    t = random_qtensor(40, 130, QuantScheme(4, 64, False))
    x, bias = torch.randn(3, 130, generator=seeded(3)), torch.randn(40, generator=seeded(4))
    with kernels.use_isa(isa_name):
        y = kernels.qgemm(x, kernels.pack(t), bias=bias, activation_bits=16)
    w = t.dequantize()
    # 130 terms plus a bias, in whatever order: at most 131 roundings of 2**-24 of the sum of magnitudes.
    bound = 131 * 2.0**-24 * (x.abs() @ w.abs().T + bias.abs())
    assert ((y.double() - (x.double() @ w.double().T + bias)).abs() <= bound).all()


def test_a_wide_group_is_cut_for_the_activations_only() -> None:
    """A 256-column group is two kernel groups with one scale: the activations' scales differ, the weights' do not."""
    t = random_qtensor(3, 256, QuantScheme(4, 256, True))
    x = torch.cat([torch.ones(1, 128), 1000 * torch.ones(1, 128)], 1)
    per_half = [x[:, s] @ t.dequantize()[:, s].T for s in (slice(0, 128), slice(128, 256))]
    # Constant halves quantize without error (all codes 127): what is left are fp32 roundings of sums of 128 terms.
    w = expand_groups(t.scale.float(), 256, t.scheme).abs() * 8
    bound = 130 * 2.0**-24 * (x @ w.T)
    assert ((kernels.qgemm(x, kernels.pack(t)) - sum(per_half)).abs() <= bound).all()


@pytest.mark.parametrize("k", [1, 100, 128, 300])
@pytest.mark.usefixtures("isa")
def test_quantize_rows_gives_the_bits_of_the_reference(k: int) -> None:
    x = torch.randn(5, k, generator=seeded(k)) * torch.logspace(-30, 30, 5)[:, None]
    x[0, 0] = 0.0
    stride = k + 8
    groups = -(-k // 128)
    q = torch.full((5, stride), 99, dtype=torch.int8)
    scale, total = torch.empty(5, groups), torch.empty(5, groups, dtype=torch.int32)
    core.quantize_rows(
        x=x.data_ptr(),
        m=5,
        k=k,
        group=128,
        stride=stride,
        q=q.data_ptr(),
        scale=scale.data_ptr(),
        total=total.data_ptr(),
    )
    for actual, expected in zip((q[:, :k], scale, total), reference.quantize_rows(x, 128), strict=True):
        assert torch.equal(actual, expected)
    assert (q[:, k:] == 0).all()  # padding must not add to any sum


def test_activations_round_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    q, scale, total = reference.quantize_rows(x, 128)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    assert scale.item() == 1.0
    assert total.item() == 3


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_a_non_finite_activation_is_nan(isa_name: str, bad: float) -> None:
    t = random_qtensor(18, 200, QuantScheme(4, 64, False))
    x = torch.randn(4, 200, generator=seeded(5))
    clean = reference.qgemm(x, t)
    for column in (0, 70, 199):
        dirty = x.clone()
        dirty[2, column] = bad
        with kernels.use_isa(isa_name):
            y = kernels.qgemm(dirty, kernels.pack(t))
        assert y[2].isnan().all()
        assert_same(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("isa_name", ISAS)
def test_zero_and_tiny_activations_give_zero_plus_bias(isa_name: str) -> None:
    t = random_qtensor(5, 64, QuantScheme(8, 32, False))
    bias = torch.arange(5.0)
    x = torch.zeros(2, 64)
    x[1] = 2.0**-120  # 127 / amax would be near the end of fp32's range
    with kernels.use_isa(isa_name):
        assert_same(kernels.qgemm(x, kernels.pack(t), bias=bias), bias.expand(2, 5))
