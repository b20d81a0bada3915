"""QTensor: the integers, scales and zeros of one quantized matrix, and the only rounding to them in Python.

A QTensor is what solvers make, formats store and the runtime packs for its kernels. Its integers are made once; nobody
recomputes them from floats.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.config import QuantScheme

# Scales are stored in fp16. Below its normal range a scale would lose digits: groups that small use this one.
MIN_SCALE = 2.0**-14
MAX_SCALE = 65504.0


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix W ~ scale * (q - zero), [N, K] = [out_features, in_features], G groups a row.

    Attributes:
        q: u8[N, K] codes, 0 .. 2**bits - 1.
        scale: f16[N, G]; may be negative (full-range symmetric grids).
        zero: u8[N, G], or None when ``scheme.sym`` (then it is ``scheme.mid``).
        scheme: bits, group size, symmetry.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: QuantScheme

    def __post_init__(self) -> None:
        n, k = self.q.shape
        want = (n, self.scheme.n_groups(k))
        if self.q.dtype != torch.uint8 or self.scale.dtype != torch.float16:
            raise TypeError(
                f"codes are {self.q.dtype} and scales {self.scale.dtype}; expected torch.uint8 and torch.float16"
            )
        if tuple(self.scale.shape) != want:
            raise ValueError(
                f"scale has shape {tuple(self.scale.shape)}; a {n} x {k} matrix in {self.scheme} needs {want}"
            )
        if (self.zero is None) != self.scheme.sym:
            raise ValueError(f"scheme {self.scheme} {'has no' if self.scheme.sym else 'needs a'} zero point per group")
        if self.zero is not None and (tuple(self.zero.shape) != want or self.zero.dtype != torch.uint8):
            raise ValueError(f"zero is {self.zero.dtype}{tuple(self.zero.shape)}; expected torch.uint8{want}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def nbytes(self) -> float:
        """Bytes stored: codes, fp16 scales and packed zeros, without padding."""
        n, k = self.shape
        bits = n * k * self.scheme.bits + self.scale.numel() * 16
        return (bits + (0 if self.zero is None else self.zero.numel() * self.scheme.bits)) / 8

    def dequantize(self) -> Tensor:
        """f32[N, K] = scale * (q - zero), each factor exact in fp32."""
        return dequantize(self.q, self.scale, self.zero, self.scheme)

    def digest(self) -> str:
        """SHA-256 over scheme, shape, codes, scales and zeros: equal digests mean equal matrices."""
        h = hashlib.sha256(f"{self.scheme} {self.shape}".encode())
        for t in (self.q, self.scale, self.zero):
            if t is not None:
                h.update(t.contiguous().numpy().tobytes())
        return h.hexdigest()


def expand_groups(per_group: Tensor, in_features: int, scheme: QuantScheme) -> Tensor:
    """[N, G] -> [N, K]: each group's value repeated over its columns (the last group may be shorter)."""
    return per_group.repeat_interleave(scheme.group_width(in_features), dim=1)[:, :in_features]


def group_sums(x: Tensor, scheme: QuantScheme) -> Tensor:
    """[N, K] -> [N, G]: the sum over each group's columns, the transpose of :func:`expand_groups`."""
    n, k = x.shape
    width = scheme.group_width(k)
    return torch.nn.functional.pad(x, (0, -k % width)).view(n, -1, width).sum(2)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> Tensor:
    """f32[N, K] = scale * (q - zero). Arguments as the fields of :class:`QTensor`."""
    k, width = q.shape[1], scheme.group_width(q.shape[1])
    out = q.float()
    whole = k // width
    # Views, group by group: numbers repeated over the columns would take the memory of the matrix once more.
    parts = ((out[:, : whole * width], slice(whole)), (out[:, whole * width :], slice(whole, None)))
    for columns, groups in parts:
        if not columns.shape[1]:
            continue
        view = columns.unflatten(1, (-1, min(width, columns.shape[1])))
        view -= scheme.mid if zero is None else zero[:, groups, None].float()
        view *= scale[:, groups, None].float()
    return out


def storable_scale(scale: Tensor) -> Tensor:
    """The fp16 value that will be stored for each scale, as f32.

    Magnitudes are kept within fp16's normal range (a zero or tiny scale becomes ``MIN_SCALE``), the sign is kept.
    """
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (sign * scale.abs().clamp(MIN_SCALE, MAX_SCALE)).half().float()


def round_to_grid(w: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Codes f32 (whole numbers in 0 .. levels-1) nearest to ``w`` on the grid ``scale * (code - zero)``; broadcasts."""
    return (w / scale).round_().add_(zero).clamp_(0, levels - 1)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> QTensor:
    """Round ``w`` f32[N, K] to the nearest codes of a grid given per group.

    Args:
        w: f32[N, K].
        scale: f32[N, G], fp16-representable (see :func:`storable_scale`).
        zero: f32[N, G], whole numbers; ignored in the result when the scheme is symmetric.
        scheme: the grid's scheme.
    """
    k = w.shape[1]
    codes = round_to_grid(w.float(), expand_groups(scale, k, scheme), expand_groups(zero, k, scheme), scheme.levels)
    return from_codes(codes, scale, zero, scheme)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> QTensor:
    """QTensor from whole-number f32 codes and grid; raises ValueError if a scale is not exactly an fp16 number."""
    half = scale.half()
    if not torch.equal(half.float(), scale.float()):
        raise ValueError("a scale is not representable in fp16: round with storable_scale before making the codes")
    return QTensor(codes.to(torch.uint8), half, None if scheme.sym else zero.to(torch.uint8), scheme)


def minmax_grid(w: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Grid that covers each group's range without clipping.

    Asymmetric: the range always holds 0 (so zero stays exact). Symmetric, full range: the value of largest magnitude
    gets code 0, which may make the scale negative; codes reach ``-mid .. mid-1`` around the zero point.

    Args:
        w: f32[N, K].

    Returns:
        scale f32[N, G] (fp16-representable), zero f32[N, G] (whole numbers).
    """
    los, his = [], []
    for s in scheme.slices(w.shape[1]):
        lo, hi = torch.aminmax(w[:, s], dim=1)
        los.append(lo)
        his.append(hi)
    return range_grid(torch.stack(los, 1).float(), torch.stack(his, 1).float(), scheme)


def range_grid(lo: Tensor, hi: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Grid for groups whose values span ``lo .. hi`` (any equal shapes); see :func:`minmax_grid` for the result."""
    if scheme.sym:
        extreme = torch.where(hi.abs() > lo.abs(), hi, lo)
        scale = storable_scale(extreme / -scheme.mid)
        return scale, torch.full_like(scale, scheme.mid)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = storable_scale((hi - lo) / (scheme.levels - 1))
    return scale, (-lo / scale).round_().clamp_(0, scheme.levels - 1)
