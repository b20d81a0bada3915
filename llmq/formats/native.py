"""The native format: named tensors of one quantized matrix. Pure functions on local names; the input is not changed.

Law (N x K matrix, B bits, G groups a row; see docs/FORMATS.md):

    qweight  u8[N, ceil(K*B/8)]   codes of a row, dense little-endian bit stream (llmq.packing)
    scales   f16[N, G]
    zeros    u8[N, ceil(G*B/8)]   zero points of a row, packed like the codes; absent when symmetric

Everything about the layout that a reader cannot see in the tensors (K, bits, group size, symmetry) stands in the
checkpoint's config.json.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.packing import pack_bits, packed_width, unpack_bits
from llmq.qtensor import QTensor

# The tensor that every quantized matrix has, and nothing else.
CODES = "qweight"


def pack(t: QTensor) -> dict[str, Tensor]:
    """QTensor -> {"qweight", "scales"[, "zeros"]}."""
    out = {CODES: pack_bits(t.q, t.scheme.bits), "scales": t.scale.clone()}
    if t.zero is not None:
        out["zeros"] = pack_bits(t.zero, t.scheme.bits)
    return out


def layout(n: int, k: int, scheme: QuantScheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of an N x K matrix."""
    groups = scheme.n_groups(k)
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        CODES: ((n, packed_width(k, scheme.bits)), torch.uint8),
        "scales": ((n, groups), torch.float16),
    }
    if not scheme.sym:
        out["zeros"] = ((n, packed_width(groups, scheme.bits)), torch.uint8)
    return out


def unpack(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> QTensor:
    """Inverse of :func:`pack`.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype than :func:`layout` says, or a scale is not finite.
    """
    want = layout(n, k, scheme)
    for key, (shape, dtype) in want.items():
        if key not in tensors:
            raise ValueError(f"{name}: tensor {key!r} is missing (a {scheme} matrix has {', '.join(want)})")
        got = tensors[key]
        if tuple(got.shape) != shape or got.dtype != dtype:
            raise ValueError(
                f"{name}: {key} is {got.dtype} {tuple(got.shape)}; a {n} x {k} matrix in {scheme} has {dtype} {shape}"
            )
    if not torch.isfinite(tensors["scales"]).all():
        raise ValueError(f"{name}: a scale is not finite; the file is damaged")
    zero = None if scheme.sym else unpack_bits(tensors["zeros"], scheme.bits, scheme.n_groups(k))
    return QTensor(unpack_bits(tensors[CODES], scheme.bits, k), tensors["scales"].clone(), zero, scheme)
