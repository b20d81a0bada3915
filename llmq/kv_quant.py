"""Quantization of cached keys and values, in plain torch: rows of numbers -> packed codes, scales, zeros, and back.

A row is one token of one head, f[..., D] (or one column of one head over a block of tokens). It is cut into groups,
each with a scale of its own:

- 8 bits: ``x = scale * (code - 128)``, one group a row.
- 4 and 2 bits: ``x = scale * (code - zero * (2**bits - 1) / 255)``, groups of ``GROUP`` columns. The range of a group
  always holds 0, so that ``zero`` fits a byte and columns of padding change nothing.

Scales are fp16, rounded up before the codes are made. ``rotate`` (a Hadamard matrix a head, QuaRot, arXiv 2404.00456)
lets the few columns of a key that are far larger than the others share their size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
MIN_ROTATION = 8
_MIN_SCALE = 2.0**-24  # the smallest fp16 above 0


@dataclass(frozen=True)
class QuantizedRows:
    """Packed rows of ``width`` columns.

    Attributes:
        codes: u8[..., ceil(width * bits / 8)], the first column in the lowest bits, as ``llmq.packing`` has it.
        scale: f16[..., groups].
        zero: u8[..., groups], in 255ths of the largest code; None at 8 bits.
        bits: 8, 4 or 2.
        width: columns of a row.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    width: int

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedRows:
        """``change`` applied to each tensor; it may touch any dimension but the last."""
        zero = None if self.zero is None else change(self.zero)
        return QuantizedRows(change(self.codes), change(self.scale), zero, self.bits, self.width)

    def join(self, other: QuantizedRows, dim: int = -2) -> QuantizedRows:
        """These rows and then the ``other`` ones along ``dim``."""
        zero = None if self.zero is None or other.zero is None else torch.cat([self.zero, other.zero], dim)
        codes, scale = torch.cat([self.codes, other.codes], dim), torch.cat([self.scale, other.scale], dim)
        return QuantizedRows(codes, scale, zero, self.bits, self.width)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [t for t in (self.codes, self.scale, self.zero) if t is not None]


def quantize_rows(x: Tensor, bits: int) -> QuantizedRows:
    """Quantize each row of ``x`` f[..., D] by itself to 8, 4 or 2 bits; any device.

    Raises ValueError naming the magnitude if a scale would overflow fp16 or ``x`` holds NaN.
    """
    width, x = x.shape[-1], x.float()
    groups = x[..., None, :] if bits == 8 else pad(x, (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    scale, zero = _symmetric(groups) if bits == 8 else _asymmetric(groups, (1 << bits) - 1)
    top = (1 << bits) - 1
    offset = 128.0 if zero is None else zero.float() * (top / 255)
    shift = offset if isinstance(offset, float) else offset[..., None]
    codes = (groups / scale.float()[..., None] + shift).round_().clamp_(0, top).to(torch.uint8)
    return QuantizedRows(pack(codes.flatten(-2)[..., :width], bits), scale, zero, bits, width)


def _symmetric(groups: Tensor) -> tuple[Tensor, None]:
    return _half(groups.abs().amax(-1) / 127), None


def _asymmetric(groups: Tensor, top: int) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scale = _half((high - low) / top)
    zero = (-low / scale.float() * (255 / top)).round_().clamp_(0, 255).to(torch.uint8)
    return scale, zero


def _half(scale: Tensor) -> Tensor:
    # Rounded up, so that the largest number of a group is not cut off; it matters where fp16 is coarse, near 0.
    half = (scale * (1 + 2.0**-11) + 2.0**-25).clamp_(min=_MIN_SCALE).half()
    if not bool(half.isfinite().all()):
        raise ValueError(
            f"a key or value needs a scale of {float(scale.max()):.3g}, and a cache's scales are fp16 (largest 65504): "
            "the model's activations overflow; use 16 bits for this cache"
        )
    return half


def dequantize_rows(rows: QuantizedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that ``rows`` stand for: ``dtype`` [..., D]."""
    codes = unpack(rows.codes, rows.bits, rows.width).to(torch.float32)
    scale = rows.scale.float()[..., None]
    if rows.zero is None:
        return ((codes - 128.0)[..., None, :] * scale).flatten(-2).to(dtype)
    padded = pad(codes, (0, -rows.width % GROUP)).unflatten(-1, (-1, GROUP))
    zero = rows.zero.float()[..., None] * (((1 << rows.bits) - 1) / 255)
    numbers: Tensor = ((padded - zero) * scale).flatten(-2)
    return numbers[..., : rows.width].to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """u8[..., D] codes of 8, 4 or 2 bits -> u8[..., ceil(D * bits / 8)]; ``llmq.packing`` does any width, slower."""
    if bits == 8:
        return codes.contiguous()
    share = 8 // bits
    parts = pad(codes, (0, -codes.shape[-1] % share)).unflatten(-1, (-1, share))
    out: Tensor = parts[..., 0].clone()
    for i in range(1, share):
        out |= parts[..., i] << (i * bits)
    return out


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`pack`: u8[..., width]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :width]


def rotation_width(head_dim: int) -> int:
    """Columns that are rotated together: the largest power of two that divides ``head_dim``; 1, so none, below 8."""
    width = head_dim & -head_dim
    return width if width >= MIN_ROTATION else 1


@functools.cache
def hadamard(n: int) -> Tensor:
    """The orthonormal Hadamard matrix f32[n, n] (Sylvester's); symmetric, so its own inverse. ``n`` is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def rotate(x: Tensor) -> Tensor:
    """Each head's row of ``x`` f[..., D] rotated, f32, block by block of ``rotation_width(D)`` columns; own inverse."""
    width = rotation_width(x.shape[-1])
    if width == 1:
        return x.float()
    # H of a*b columns is the Kronecker product of H of a and H of b, and two small products take a fraction of one.
    a = 1 << (width.bit_length() - 1) // 2
    left, right = hadamard(a).to(x.device), hadamard(width // a).to(x.device)
    turned: Tensor = left @ x.float().unflatten(-1, (-1, a, width // a)) @ right
    return turned.flatten(-3)
