"""Attention over cached keys and values against the reference: kernel set by kernel set, storage by storage."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import COMPILED, assert_same, core, isa, seeded, threads  # noqa: F401 - fixtures
from torch import Tensor

from llmq import kernels
from llmq.kernels import reference

# Bits of keys and of values.
PAIRS = [*itertools.product([32, 16, 8], repeat=2), (4, 4), (2, 2), (8, 4), (4, 8), (16, 4), (4, 2)]
PART = 128  # tokens summed together, and over which integer weights share a scale
WEIGHT_STEPS = 32767


def case(count: int, length: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; keys with a few channels far above the others, as models have them."""
    g = seeded(count, length, heads, dim)
    q, k, v = (torch.randn(n, h, dim, generator=g) for n, h in ((count, heads), (length, kv_heads), (length, kv_heads)))
    k[..., ::7] *= 4
    return q / dim**0.5, k, v


def limit(q: Tensor, k: Tensor, v: Tensor, bits: tuple[int, int], **options: float) -> Tensor:
    """f32[T, H, 1]: how far a kernel may be from the reference.

    Roundings of fp32: 8 times what the reference itself is off from fp64 (see test_native.py), two units in the last
    place at least. Integer weights: each is off by half a step of the largest in its part, times its value's largest
    magnitude.
    """
    exact = reference.attend(q.double(), k.double(), v.double(), k_bits=32, v_bits=32, **options)
    single = reference.attend(q, k, v, k_bits=32, v_bits=32, **options)
    rounding = 8 * (exact - single).abs().max().float() + 2.0**-22 * v.abs().max()
    if bits[1] >= 16:
        return rounding
    # Codes reach up to their zero further than the values themselves.
    reach = (1 + (bits[1] < 8)) * v.abs().amax(-1).T.repeat_interleave(q.shape[1] // k.shape[1], 0)[:, None]
    parts = (reference.attention_weights(q, k, k_bits=bits[0], **options) * reach).split(PART, -1)
    steps = sum(part.shape[-1] * part.amax(-1) / (2 * WEIGHT_STEPS) for part in parts)
    return rounding + steps.T[..., None]


SHAPES = [
    # T, L, H, H_kv, D: decoding, a prompt, many heads a group, ragged widths, several groups of columns
    (1, 1, 1, 1, 2),
    (1, 300, 9, 3, 64),
    (40, 40, 4, 2, 16),
    (30, 150, 2, 2, 24),
    (5, 260, 30, 1, 80),
    (3, 70, 4, 1, 256),
    (2, 33, 2, 1, 160),
]


@pytest.mark.parametrize("bits", PAIRS, ids=str)
@pytest.mark.usefixtures("isa")
def test_every_storage_gives_what_the_reference_says(bits: tuple[int, int]) -> None:
    for shape, options in itertools.product(SHAPES, ({}, {"window": 20}, {"softcap": 2.0})):
        q, k, v = case(*shape)
        actual = kernels.attend(q, k, v, k_bits=bits[0], v_bits=bits[1], **options)
        expected = reference.attend(q, k, v, k_bits=bits[0], v_bits=bits[1], **options)
        allowed = limit(q, k, v, bits, **options)
        assert ((actual - expected).abs() <= allowed).all(), (shape, options)
        assert ((actual - 1.01 * expected).abs() > allowed).any(), (shape, options)  # one percent off would be seen


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 16), (2, 2)], ids=str)
@pytest.mark.usefixtures("isa")
def test_sinks_and_recent_tokens_are_seen_in_16_bits(bits: tuple[int, int]) -> None:
    for (sinks, recent), window in itertools.product(((4, 64), (0, 20), (17, 0), (4, 200)), (0, 100)):
        q, k, v = case(45, 330, 6, 2, 64)
        kwargs = {"k_bits": bits[0], "v_bits": bits[1], "sinks": sinks, "recent": recent, "window": window}
        actual, expected = kernels.attend(q, k, v, **kwargs), reference.attend(q, k, v, **kwargs)
        allowed = 2 * limit(q, k, v, bits, window=window)  # up to three sums instead of one
        assert ((actual - expected).abs() <= allowed).all(), kwargs
        if window == 0:  # one block more would be seen
            for other in ({"sinks": sinks + 16}, {"recent": recent + 16}):
                differing = reference.attend(q, k, v, **{**kwargs, **other})
                assert (differing - expected).norm() > 5 * (actual - expected).norm(), (kwargs, other)
        for i in (0, 19, 44):
            assert_same(kernels.attend(q[i, None], k[: 286 + i], v[: 286 + i], **kwargs)[0], actual[i])


@pytest.mark.parametrize("n", [2, 16, 24, 64, 80, 128, 256])
@pytest.mark.usefixtures("isa")
def test_the_hadamard_matrix_is_the_references_and_its_own_inverse(n: int) -> None:
    x = torch.randn(n, generator=seeded(n))
    y = x.clone()
    core.hadamard(x=y.data_ptr(), n=n)
    limit = 2.0**-24 * (n.bit_length() + 1) * float(x.norm())  # a rounding for every doubling, and for the scale
    assert (y - reference.hadamard(x)).abs().max() <= 2 * limit
    assert (1.01 * y - reference.hadamard(x)).abs().max() > 2 * limit
    core.hadamard(x=y.data_ptr(), n=n)
    assert (y - x).abs().max() <= 3 * limit


@pytest.mark.parametrize("bits", [(32, 32), (16, 16), (8, 8), (4, 4)], ids=str)
@pytest.mark.usefixtures("isa")
def test_keys_off_by_one_percent_would_be_seen(bits: tuple[int, int]) -> None:
    q, k, v = case(4, 200, 4, 2, 64)
    actual = kernels.attend(q * 3, k * 1.01, v, k_bits=bits[0], v_bits=bits[1])
    expected = reference.attend(q * 3, k, v, k_bits=bits[0], v_bits=bits[1])
    assert ((actual - expected).abs() > limit(q * 3, k, v, bits)).any()


@pytest.mark.parametrize("bits", PAIRS, ids=str)
@pytest.mark.usefixtures("isa", "threads")
def test_one_row_or_many_and_any_number_of_threads_give_the_same_bits(bits: tuple[int, int]) -> None:
    q, k, v = case(70, 330, 6, 2, 64)
    kwargs = {"k_bits": bits[0], "v_bits": bits[1], "window": 200}
    kernels.set_num_threads(1)
    together = kernels.attend(q, k, v, **kwargs)
    for count in (1, 2, 3):
        kernels.set_num_threads(count)
        assert_same(kernels.attend(q, k, v, **kwargs), together)
        for end in (1, 2, 17, 63, 70):
            n = 330 - 70 + end
            assert_same(kernels.attend(q[end - 1 : end], k[:n], v[:n], **kwargs), together[end - 1 : end])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("isa")
def test_codes_hide_no_bad_number_from_a_row_that_sees_it(bits: int, which: int, bad: float) -> None:
    q, k, v = case(20, 20, 2, 1, 32)
    (k, v)[which][11, 0, 5] = bad
    assert kernels.attend(q, k, v, k_bits=bits, v_bits=bits)[11:].isnan().all()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.usefixtures("isa")
def test_a_whole_part_of_bad_keys_counts_as_seen(bits: int) -> None:
    q, k, v = case(1, 3 * PART, 2, 1, 32)
    k[PART : 2 * PART] = float("nan")  # no score of the part is the largest
    assert kernels.attend(q, k, v, k_bits=bits, v_bits=bits).isnan().all()


@pytest.mark.usefixtures("isa")
def test_tokens_of_zeros_and_of_tiny_numbers() -> None:
    q, k, v = case(3, 30, 2, 1, 64)
    for factor in (0.0, 2.0**-30):  # below a float16's least scale everything is 0
        actual = kernels.attend(q, k * factor, v, k_bits=8, v_bits=8)
        assert (actual - reference.attend(q, k * factor, v, k_bits=8, v_bits=8)).abs().max() <= 1e-4
        assert (kernels.attend(q, k, v * factor, k_bits=8, v_bits=8) == 0).all()


def test_what_does_not_fit_is_an_error() -> None:
    q, k, v = case(3, 30, 4, 2, 16)
    for bad, message in (
        ((q, k, v[:-1]), r"q, k, v have shapes \(3, 4, 16\), \(30, 2, 16\), \(29, 2, 16\)"),
        ((q[:, :3], k, v), r"\(3, 3, 16\)"),
        ((q, k[:2], v[:2]), r"L >= T"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.attend(*bad)
    with pytest.raises(ValueError, match="5 bits of a key or value cannot be stored"):
        kernels.attend(q, k, v, k_bits=5)
    with pytest.raises(TypeError, match=r"k is torch\.float64"):
        kernels.attend(q, k.double(), v)
