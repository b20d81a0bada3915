"""MLX checkpoints (mlx-lm), mode ``affine``: 2, 3, 4 or 8 bits. Pure functions on local names.

Law (N x K matrix, B bits, groups of g = 32, 64 or 128 columns, K % g = 0):

    weight   u32[N, K*B/32]   a row's codes as a dense little-endian bit stream
    scales   float[N, K/g]    float16 here where offsets are fp16 numbers too (all symmetric grids), else float32
    biases   float[N, K/g]    offset of a group, -zero * scale

    w = code * scale + bias

Files by mlx itself round scale and bias one by one, so that few of them are whole zero points: see
:func:`unpack_affine`. Source: mlx, ``mx.quantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.formats.affine import Affine, from_qtensor, to_qtensor
from llmq.formats.row import Inexact, Layout, refuse, require
from llmq.packing import pack_words, unpack_words, word_width
from llmq.qtensor import QTensor

GROUP_SIZES = (32, 64, 128)


def refusal(_n: int, k: int, scheme: QuantScheme) -> str | None:
    """Why MLX does not hold such a matrix, or None."""
    if scheme.group_size not in GROUP_SIZES or k % scheme.group_size:
        return f"{k} columns in {scheme}: mlx has whole groups of {', '.join(map(str, GROUP_SIZES))}"
    return None


def layout(n: int, k: int, scheme: QuantScheme) -> Layout:
    """Shape and dtype of each tensor."""
    groups = (n, scheme.n_groups(k))
    return {
        "weight": ((n, word_width(k, scheme.bits)), torch.uint32),
        "scales": (groups, torch.float16),
        "biases": (groups, torch.float16),
    }


def pack(t: QTensor) -> dict[str, Tensor]:
    """QTensor -> {"weight", "scales", "biases"}; Inexact as :func:`refusal` says."""
    refuse(refusal(*t.shape, t.scheme))
    affine = from_qtensor(t)
    half = affine.offset.half()
    exact = torch.equal(half.float(), affine.offset)
    return {
        "weight": pack_words(t.q, t.scheme.bits).view(torch.uint32),
        "scales": t.scale.clone() if exact else affine.scale,
        "biases": half if exact else affine.offset,
    }


def unpack_affine(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> Affine:
    """The stored numbers, whatever they are; ValueError for tensors of another shape or dtype."""
    require(tensors, layout(n, k, scheme), name, f"mlx {scheme.bits}-bit g{scheme.group_size}")
    q = unpack_words(tensors["weight"].view(torch.int32), scheme.bits, k)
    return Affine(q, tensors["scales"].float(), tensors["biases"].float(), scheme)


def unpack(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> QTensor:
    """Inverse of :func:`pack`; errors as in :class:`llmq.formats.row.Format`."""
    refuse(refusal(n, k, scheme), name)
    t = to_qtensor(unpack_affine(tensors, n, k, scheme, name=name), name)
    return with_symmetry(t, scheme, name)


def with_symmetry(t: QTensor, scheme: QuantScheme, name: str) -> QTensor:
    """``t`` as a QTensor of ``scheme``, which differs in ``sym`` at most; Inexact if it is not symmetric."""
    if t.scheme.sym == scheme.sym:
        return t
    if scheme.sym:
        raise Inexact(f"{name}: said to be symmetric, but has other zero points than {scheme.mid}")
    zero = torch.full(t.scale.shape, scheme.mid, dtype=torch.uint8)
    return QTensor(t.q, t.scale, zero, scheme)
