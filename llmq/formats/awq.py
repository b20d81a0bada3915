"""AWQ checkpoints (AutoAWQ), layouts ``gemm`` and ``gemv``: 4 bits. Pure functions on local names.

Law (N x K matrix, g columns a group, G = K / g; N % 8 = 0, K % g = 0):

    gemm   qweight  i32[K, N/8]     word c of input k: nibble i holds the code of output 8c + ORDER[i]
           qzeros   i32[G, N/8]     zero points, packed likewise
           scales   f16[G, N]
    gemv   qweight  i32[N, K/8]     nibble i of word c holds the code of input 8c + i
           qzeros   i32[N, Z]       zero points along the groups, natural order, zeros beyond group G
           scales   f16[N, 8*Z]     zeros beyond group G
                                    Z = zeros_width(K, g): ceil(G/8), up to a multiple of 2 (g = 64) or 4 (g = 32)

    w = (code - zero) * scale

Nothing is subtracted from stored zeros. A symmetric grid is stored with the zero 8. Source: AutoAWQ,
``modules/linear/gemm.py``, ``gemv.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.formats.row import Layout, full_zeros, half_scales, refuse, require, zeros_or_none
from llmq.packing import pack_words, unpack_words
from llmq.qtensor import QTensor

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(PER_WORD))
_MULTIPLIERS = {64: 2, 32: 4}


def refusal(n: int, k: int, scheme: QuantScheme) -> str | None:
    """Why no AWQ reader takes such a matrix, or None."""
    if scheme.bits != BITS:
        return f"{scheme} has {scheme.bits} bits; awq has {BITS}"
    if n % PER_WORD or k % scheme.group_width(k) or k % PER_WORD or scheme.group_size > k:
        return (
            f"a {n} x {k} matrix in {scheme}: awq needs out_features in multiples of {PER_WORD} and whole groups of"
            f" columns, {PER_WORD} or more"
        )
    return None


def layout(n: int, k: int, scheme: QuantScheme) -> Layout:
    """Shape and dtype of each tensor of the layout ``gemm``."""
    groups = scheme.n_groups(k)
    return {
        "qweight": ((k, n // PER_WORD), torch.int32),
        "qzeros": ((groups, n // PER_WORD), torch.int32),
        "scales": ((groups, n), torch.float16),
    }


def pack(t: QTensor) -> dict[str, Tensor]:
    """QTensor -> {"qweight", "qzeros", "scales"} of the layout ``gemm``; Inexact as :func:`refusal` says."""
    refuse(refusal(*t.shape, t.scheme))
    return {
        "qweight": pack_words(_reorder(t.q.T, ORDER), BITS),
        "qzeros": pack_words(_reorder(full_zeros(t).T, ORDER), BITS),
        "scales": t.scale.T.contiguous(),
    }


def unpack(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> QTensor:
    """Inverse of :func:`pack`; errors as in :class:`llmq.formats.row.Format`."""
    refuse(refusal(n, k, scheme), name)
    require(tensors, layout(n, k, scheme), name, f"awq gemm {scheme}")
    q = _reorder(unpack_words(tensors["qweight"], BITS, n), _INVERSE).T.contiguous()
    zero = _reorder(unpack_words(tensors["qzeros"], BITS, n), _INVERSE).T
    return QTensor(q, half_scales(tensors["scales"].T, name), zeros_or_none(zero, scheme, name), scheme)


def _reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """u8[R, N] with every eight neighbours in another order."""
    return codes.reshape(codes.shape[0], -1, PER_WORD)[..., list(order)].reshape(codes.shape)


def zeros_width(k: int, group: int) -> int:
    """Words of a row of zero points in the layout ``gemv`` (AutoAWQ's ``calculate_zeros_width``)."""
    multiplier = _MULTIPLIERS.get(group, 1)
    words = -(-(k // group) // PER_WORD)
    return -(-words // multiplier) * multiplier


def layout_gemv(n: int, k: int, scheme: QuantScheme) -> Layout:
    """Shape and dtype of each tensor of the layout ``gemv``."""
    width = zeros_width(k, scheme.group_width(k))
    return {
        "qweight": ((n, k // PER_WORD), torch.int32),
        "qzeros": ((n, width), torch.int32),
        "scales": ((n, width * PER_WORD), torch.float16),
    }


def pack_gemv(t: QTensor) -> dict[str, Tensor]:
    """QTensor -> {"qweight", "qzeros", "scales"} of the layout ``gemv``; Inexact as :func:`refusal` says."""
    n, k = t.shape
    refuse(refusal(n, k, t.scheme))
    spare = zeros_width(k, t.scheme.group_width(k)) * PER_WORD - t.scale.shape[1]
    pad = torch.nn.functional.pad
    return {
        "qweight": pack_words(t.q, BITS),
        "qzeros": pack_words(pad(full_zeros(t), (0, spare)), BITS),
        "scales": pad(t.scale, (0, spare)),
    }


def unpack_gemv(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> QTensor:
    """Inverse of :func:`pack_gemv`; errors as in :class:`llmq.formats.row.Format`."""
    refuse(refusal(n, k, scheme), name)
    want = layout_gemv(n, k, scheme)
    require(tensors, want, name, f"awq gemv {scheme}")
    groups, fields = scheme.n_groups(k), want["scales"][0][1]
    zero = unpack_words(tensors["qzeros"], BITS, fields)[:, :groups]
    scale = half_scales(tensors["scales"][:, :groups], name)
    return QTensor(unpack_words(tensors["qweight"], BITS, k), scale, zeros_or_none(zero, scheme, name), scheme)
