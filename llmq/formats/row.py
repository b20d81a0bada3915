"""What a row of FORMATS holds, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.qtensor import QTensor

# Shape and dtype of each tensor of a matrix, by local name.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Inexact(ValueError):
    """Stored numbers that no QTensor holds exactly, or a QTensor that a format does not hold exactly."""


@dataclass(frozen=True)
class Format:
    """One way to store a QTensor as named tensors.

    Attributes:
        title: what people call it.
        pack: QTensor -> tensors by local name; pure. Raises Inexact with the text of ``refusal``.
        unpack: (tensors, n, k, scheme, *, name) -> QTensor, the exact inverse. Raises ValueError naming ``name``, the
            tensor and both values; Inexact when the tensors say something that a QTensor of ``scheme`` cannot.
        layout: (n, k, scheme) -> shape and dtype of each tensor.
        refusal: (n, k, scheme) -> why the format cannot hold such a matrix exactly, or None.
    """

    title: str
    pack: Callable[[QTensor], dict[str, Tensor]]
    unpack: Callable[..., QTensor]
    layout: Callable[[int, int, QuantScheme], Layout]
    refusal: Callable[[int, int, QuantScheme], str | None]


def never(_n: int, _k: int, _scheme: QuantScheme) -> str | None:
    """The refusal of a format that holds every matrix."""
    return None


def refuse(reason: str | None, name: str = "") -> None:
    """Raise Inexact for a reason, naming the matrix if there is a name."""
    if reason is not None:
        raise Inexact(f"{name}: {reason}" if name else reason)


def require(tensors: dict[str, Tensor], want: Layout, name: str, what: str) -> None:
    """Raise ValueError unless ``tensors`` has every tensor of ``want``, in its shape and dtype.

    A float dtype stands for any float: scales come in the model's.
    """
    for key, (shape, dtype) in want.items():
        if key not in tensors:
            raise ValueError(f"{name}: tensor {key!r} is missing (a {what} matrix has {', '.join(want)})")
        got = tensors[key]
        same = got.is_floating_point() if dtype.is_floating_point else _plain(got.dtype) == _plain(dtype)
        if tuple(got.shape) != shape or not same:
            raise ValueError(f"{name}: {key} is {got.dtype} {tuple(got.shape)}; {what} has {dtype} {shape}")


def _plain(dtype: torch.dtype) -> torch.dtype:
    """Packed words are int32 here and uint32 there: the same bits."""
    return torch.int32 if dtype == torch.uint32 else dtype


def half_scales(scales: Tensor, name: str) -> Tensor:
    """``scales`` as f16, unchanged in value.

    Raises:
        ValueError: a scale is NaN or infinite.
        Inexact: one that is not an fp16 number (float32 or bfloat16 files); names it.
    """
    if not torch.isfinite(scales.float()).all():  # as float: 8-bit floats have no such function
        raise ValueError(f"{name}: a scale is not finite; the file is damaged")
    half = scales.half()
    bad = (half.float() != scales.float()).nonzero()
    if len(bad):
        value = float(scales[tuple(bad[0])])
        raise Inexact(f"{name}: {len(bad)} of {scales.numel()} scales are no fp16 numbers, among them {value:.9g}")
    return half.contiguous().clone()


def zeros_or_none(zero: Tensor, scheme: QuantScheme, name: str) -> Tensor | None:
    """``zero`` u8[N, G] as the QTensor field: None on a symmetric scheme, which must have ``scheme.mid`` everywhere."""
    if not scheme.sym:
        return zero.contiguous()
    bad = (zero != scheme.mid).nonzero()
    if len(bad):
        value = int(zero[tuple(bad[0])])
        raise Inexact(f"{name}: said to be symmetric, but a zero point is {value} instead of {scheme.mid}")
    return None


def full_zeros(t: QTensor) -> Tensor:
    """u8[N, G]: the zero points, spelt out on symmetric schemes too."""
    return torch.full(t.scale.shape, t.scheme.mid, dtype=torch.uint8) if t.zero is None else t.zero
