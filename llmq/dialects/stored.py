"""A quantized matrix as it lies in a folder or file, and what is done with numbers that no QTensor holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.config import GROUP_SIZES, QuantScheme, one_of
from llmq.formats import Inexact
from llmq.formats.affine import Affine, to_qtensor
from llmq.models.reader import WeightReader
from llmq.qtensor import QTensor, minmax_grid, quantize, storable_scale

INEXACT = ("refuse", "requantize")
# What a matrix that no QTensor holds becomes when that is asked for.
FALLBACK = QuantScheme(8, 32, sym=True)
# Offsets this near to whole zero points, in steps of the grid, are rounded to them; the codes stay.
NEAR = 1 / 16


@dataclass(frozen=True)
class Stored:
    """A quantized matrix [n, k] of a checkpoint.

    Attributes:
        name: its module.
        n, k: out_features, in_features.
        scheme: the grid of what ``read`` gives.
        read: the matrix; with ``order`` its columns are in that order.
        order: i64[k], which column of the module's input stands where; None: as they are (all but GPTQ's desc_act).
        note: what was changed to make it a QTensor; empty: nothing, the integers are those of the file.
        tensors: full names of the tensors it is stored in.
    """

    name: str
    n: int
    k: int
    scheme: QuantScheme
    read: Callable[[], QTensor]
    order: Tensor | None = None
    note: str = ""
    tensors: tuple[str, ...] = ()

    def dequantize(self) -> Tensor:
        """f32[n, k], columns in the module's order."""
        weight = self.read().dequantize()
        if self.order is None:
            return weight
        out = torch.empty_like(weight)
        out[:, self.order] = weight
        return out


@dataclass
class Found:
    """The quantized matrices of a checkpoint, what is tied to them, and how to ask for others."""

    matrices: dict[str, Stored]
    tied: dict[str, str] = field(default_factory=dict)


def group_size(groups: int, k: int, said: int, where: str) -> int:
    """``said``, the config's group size (-1: the whole row), when it cuts ``k`` columns into ``groups``.

    Raises:
        Inexact: a size that the kernels do not have.
        ValueError: another number of groups.
    """
    width = k if said == -1 or said >= k else said
    if width <= 0 or -(-k // width) != groups:
        raise ValueError(
            f"{where}: {groups} groups of scales for {k} columns; group_size {said} in the config makes"
            f" {-(-k // width) if width > 0 else 'none'}: they do not belong together"
        )
    if said in GROUP_SIZES:
        return said
    if width == k:
        return -1
    raise Inexact(f"{where}: groups of {said} columns; llmq's kernels have {', '.join(map(str, GROUP_SIZES))}")


def number(block: Mapping[str, Any], names: tuple[str, ...], where: str, known: tuple[int, ...] | None = None) -> int:
    """The whole number under the first of ``names`` that ``block`` has. ValueError when there is none or a bad one."""
    for name in names:
        value = block.get(name)
        if value is None:
            continue
        if type(value) is not int:
            raise ValueError(f"{where}: {name} is {value!r}; a whole number was expected")
        if known is not None:
            one_of(f"{where}: {name}", value, known)
        return value
    raise ValueError(f"{where}: quantization_config has none of {', '.join(names)}")


def check_words(reader: WeightReader, full: str, shape: tuple[int, ...], where: str) -> None:
    """Raise ValueError unless a tensor of packed words has this shape."""
    got, dtype = reader.shape(full), reader.dtype(full)
    if got != shape or dtype not in (torch.int32, torch.uint32):
        raise ValueError(f"{where}: {full} is {dtype} {got}; 32-bit words {shape} were expected")


def tensors_of(reader: WeightReader, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by local name, those of ``names`` (local -> full) that the files hold."""
    return {local: reader.tensor(full) for local, full in names.items() if full in reader}


def affine_stored(
    name: str, shape: tuple[int, int], read: Callable[[], Affine], tensors: tuple[str, ...], inexact: str, where: str
) -> Stored:
    """The Stored of affine numbers, exact or, when ``inexact`` allows it, rounded; else Inexact, naming ``where``."""
    affine = read()
    at = f"{where}: {name}"
    try:
        exact = to_qtensor(affine, at)
    except Inexact as reason:
        if inexact != "requantize":
            raise Inexact(f"{reason}. {WAY_OUT}") from None
        scheme, note = _nearest(affine)[0].scheme, _nearest(affine)[1]
        return Stored(name, *shape, scheme, lambda: _nearest(read())[0], note=note, tensors=tensors)
    scheme = exact.scheme
    del exact, affine
    return Stored(name, *shape, scheme, lambda: to_qtensor(read(), at), tensors=tensors)


WAY_OUT = "Ask for it with inexact='requantize' (--requantize) to round it, with a report, or take the original model"


def _nearest(a: Affine) -> tuple[QTensor, str]:
    """(QTensor near ``a``, how it was made)."""
    scale = storable_scale(a.scale)
    zero = -a.offset / scale
    whole = zero.round().clamp(0, a.scheme.levels - 1)
    gap = float((zero - whole).abs().max())
    if gap <= NEAR:
        scheme = QuantScheme(a.scheme.bits, a.scheme.group_size, sym=False)
        return QTensor(
            a.q, scale.half(), whole.to(torch.uint8), scheme
        ), f"codes kept, offsets moved by up to {gap:.2g} steps"
    return requantized(a.dequantize())


def requantized(weight: Tensor) -> tuple[QTensor, str]:
    """(``weight`` f32[N, K] rounded to :data:`FALLBACK`, a note with the relative error)."""
    t = quantize(weight, *minmax_grid(weight, FALLBACK), FALLBACK)
    error = float((t.dequantize() - weight).norm() / weight.norm().clamp(min=1e-30))
    return t, f"rounded to {FALLBACK}, relative error {error:.2g}"
