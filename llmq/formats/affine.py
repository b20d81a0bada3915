"""Affine: codes with a float scale and a float offset a group, as MLX and GGUF's Q4_1 store them.

    w[n, k] = scale[n, k div g] * code[n, k] + offset[n, k div g]

It is a QTensor exactly when each scale is an fp16 number and each offset is -scale times a whole zero point that the
bits hold; :func:`to_qtensor` takes it only then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.formats.row import Inexact, full_zeros, half_scales
from llmq.qtensor import QTensor, expand_groups


@dataclass(frozen=True)
class Affine:
    """Codes u8[N, K], scale and offset f32[N, G]; of the scheme only bits and group size are used."""

    q: Tensor
    scale: Tensor
    offset: Tensor
    scheme: QuantScheme

    def dequantize(self) -> Tensor:
        """f32[N, K] = scale * code + offset."""
        k = self.q.shape[1]
        product = self.q.float() * expand_groups(self.scale, k, self.scheme)
        return product + expand_groups(self.offset, k, self.scheme)


def from_qtensor(t: QTensor) -> Affine:
    """Exact: an fp16 scale times a zero point below 256 has at most 19 bits, fp32 holds 24."""
    scale = t.scale.float()
    return Affine(t.q, scale, -scale * full_zeros(t).float(), t.scheme)


def to_qtensor(a: Affine, name: str) -> QTensor:
    """The QTensor of the same weights; symmetric when every zero point is the middle one.

    Raises:
        ValueError: a scale or an offset that is not finite.
        Inexact: a scale that is no fp16 number, or an offset that is no whole zero point; says how far off it is.
    """
    scale = half_scales(a.scale, name).float()
    if not torch.isfinite(a.offset).all():
        raise ValueError(f"{name}: an offset is not finite; the file is damaged")
    nonzero = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-a.offset / nonzero).round_().clamp_(0, a.scheme.levels - 1)
    bad = (-scale * zero != a.offset).nonzero()
    if len(bad):
        at = tuple(bad[0])
        ratio = float(-a.offset[at] / nonzero[at])
        raise Inexact(
            f"{name}: {len(bad)} of {zero.numel()} offsets are no whole multiple of their scale from 0 to"
            f" {a.scheme.levels - 1}, among them {ratio:.6g}"
        )
    middle = bool((zero == a.scheme.mid).all())
    scheme = QuantScheme(a.scheme.bits, a.scheme.group_size, middle)
    return QTensor(a.q, scale.half(), None if middle else zero.to(torch.uint8), scheme)
