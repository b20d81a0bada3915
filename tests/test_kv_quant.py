"""Rows of keys and values against a loop over single numbers; the rotation's laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmq.kv_quant import GROUP, dequantize_rows, hadamard, pack, quantize_rows, rotate, rotation_width, unpack
from llmq.packing import pack_bits

WIDTHS = [8, 32, 48, 64, 80, 256]


def rows_of(width: int, *, seed: int = 0) -> Tensor:
    """f32[2, 3, 5, width] with a few columns that are far larger, a row of zeros and one without negative numbers."""
    x = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20
    x[0, 0, 0] = 0
    x[0, 0, 1].abs_()
    return x


def half(x: float) -> float:
    """The fp16 above ``x``, or the nearest one, whichever the sum gives."""
    return float(torch.tensor(x * (1 + 2**-11) + 2**-25).clamp(min=2**-24).half())


def naive(row: list[float], bits: int) -> list[float]:
    """One row quantized and back, number by number in float64."""
    top, out = 2**bits - 1, []
    if bits == 8:
        scale = half(max(map(abs, row)) / 127)
        return [scale * max(-128, min(127, round(x / scale))) for x in row]
    for a in range(0, len(row), GROUP):
        group = row[a : a + GROUP]
        low, high = min(0.0, *group), max(0.0, *group)
        scale = half((high - low) / top)
        zero = max(0, min(255, round(-low / scale * 255 / top))) * top / 255
        out += [scale * (max(0, min(top, round(x / scale + zero))) - zero) for x in group]
    return out


def disagree(got: Tensor, x: Tensor, bits: int) -> int:
    """How many numbers differ from the naive ones by more than fp32 arithmetic explains."""
    expected = torch.tensor([naive(row, bits) for row in x.flatten(0, -2).tolist()]).view_as(x)
    return int(((got - expected).abs() > 1e-5 * (1 + expected.abs())).sum())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_are_those_of_a_naive_loop(bits: int, width: int) -> None:
    x = rows_of(width)
    rows = quantize_rows(x, bits)
    # A number within fp32 rounding of the middle between two codes may go either way.
    assert disagree(dequantize_rows(rows), x, bits) <= 1
    wrong = rows.__class__(rows.codes, (rows.scale.float() * 1.01).half(), rows.zero, bits, width)
    assert disagree(dequantize_rows(wrong), x, bits) > x.numel() // 2


@pytest.mark.parametrize(("bits", "size"), [(8, 64 + 2), (4, 32 + 3), (2, 16 + 3)])
def test_a_row_of_64_takes_what_its_bits_say(bits: int, size: int) -> None:
    rows = quantize_rows(torch.randn(1, 1, 10, 64), bits)
    assert sum(t.untyped_storage().nbytes() for t in rows.tensors) == 10 * size


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("width", [1, 7, 32, 33])
def test_packing_is_that_of_the_packing_module(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, width), dtype=torch.uint8)
    assert torch.equal(pack(codes, bits), pack_bits(codes, bits))
    assert torch.equal(unpack(pack(codes, bits), bits, width), codes)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_join_and_map(bits: int) -> None:
    x = rows_of(64)
    whole = quantize_rows(x, bits)
    joined = quantize_rows(x[:, :, :2], bits).join(quantize_rows(x[:, :, 2:], bits))
    assert all(map(torch.equal, whole.tensors, joined.tensors))
    swapped = whole.map(lambda t: t.flip(0))
    assert torch.equal(dequantize_rows(swapped), dequantize_rows(whole).flip(0))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_numbers_that_overflow_are_refused(bits: int, bad: float) -> None:
    x = torch.ones(1, 1, 2, 32)
    x[0, 0, 1, 3] = bad
    with pytest.raises(ValueError, match="fp16"):
        quantize_rows(x, bits)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_is_at_most_about_a_step_whatever_the_size(bits: int, scale: float) -> None:
    x = rows_of(64) * scale
    error = (dequantize_rows(quantize_rows(x, bits)) - x).abs().amax(-1)
    step = 2 * x.abs().amax(-1) / (2**bits - 1) * (1 + 2**-9) + 2.0**-23
    assert bool((error <= step).all())


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_hadamard_is_orthonormal_and_its_own_inverse(n: int) -> None:
    torch.testing.assert_close(hadamard(n) @ hadamard(n), torch.eye(n), atol=1e-6, rtol=0)
    assert float((hadamard(n).abs() - n**-0.5).abs().max()) < 1e-7


@pytest.mark.parametrize(("dim", "width"), [(64, 64), (256, 256), (96, 32), (80, 16), (72, 8), (100, 1), (7, 1)])
def test_rotation_keeps_products_and_is_its_own_inverse(dim: int, width: int) -> None:
    assert rotation_width(dim) == width
    q, k = torch.randn(2, 6, dim)
    torch.testing.assert_close(rotate(rotate(k)), k, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4, rtol=0)
    if width > 1:
        spike = torch.zeros(dim)
        spike[1] = 1
        expected = [width**-0.5 if i < width else 0.0 for i in range(dim)]
        torch.testing.assert_close(rotate(spike).abs(), torch.tensor(expected))


def test_rotation_halves_the_error_of_keys_with_large_columns() -> None:
    x = rows_of(64)
    plain = (dequantize_rows(quantize_rows(x, 4)) - x).square().mean()
    turned = (rotate(dequantize_rows(quantize_rows(rotate(x), 4))) - x).square().mean()
    assert float(turned) < float(plain) / 2
