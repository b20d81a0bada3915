"""compressed-tensors checkpoints (llm-compressor, vLLM). Pure functions on local names.

Law (N x K matrix, B bits, g columns a group or one group a row, G groups; K % g = 0). Stored codes and zero points are
signed, q in -2^(B-1) .. 2^(B-1)-1, and packed as q + 2^(B-1), which is the code of a QTensor:

    pack-quantized   weight_packed      i32[N, ceil(K*B/32)]  a row's codes as a dense little-endian bit stream
                                        i32[N, ceil(K/P)]     in the older packing: P = 32 div B codes a word, the rest
                                                              of the word 0. The same at 2, 4 and 8 bits
                     weight_scale       float[N, G]
                     weight_zero_point  i32[ceil(N*B/32), G]  packed along the rows (older: ceil(N/P)); asymmetric only
                     weight_shape       i64[2]                N, K
    int-quantized    weight             i8[N, K]              signed codes of 8 bits
                     weight_scale       float[N, G]
                     weight_zero_point  i8[N, G]              asymmetric only

    w = (q - zero_point) * scale

Source: compressed-tensors, ``compressors/pack_quantized`` and ``naive_quantized``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.formats.row import Inexact, Layout, half_scales, refuse, require
from llmq.packing import pack_bits, pack_words, unpack_bits, unpack_words, word_width
from llmq.qtensor import QTensor


def refusal(_n: int, k: int, scheme: QuantScheme) -> str | None:
    """Why compressed-tensors does not hold such a matrix, or None."""
    width = scheme.group_width(k)
    if k % width or (scheme.group_size > k):
        return f"{k} columns in {scheme}: compressed-tensors has whole groups only"
    return None


def refusal_int8(n: int, k: int, scheme: QuantScheme) -> str | None:
    """As :func:`refusal`, for int-quantized."""
    if scheme.bits != 8:
        return f"{scheme} has {scheme.bits} bits; int-quantized has 8"
    return refusal(n, k, scheme)


def layout(n: int, k: int, scheme: QuantScheme, *, padded: bool = False) -> Layout:
    """Shape and dtype of each tensor of pack-quantized; ``padded``: in the older packing."""
    groups = scheme.n_groups(k)
    out: Layout = {
        "weight_packed": ((n, _width(k, scheme.bits, padded=padded)), torch.int32),
        "weight_scale": ((n, groups), torch.float16),
        "weight_shape": ((2,), torch.int64),
    }
    if not scheme.sym:
        out["weight_zero_point"] = ((_width(n, scheme.bits, padded=padded), groups), torch.int32)
    return out


def pack(t: QTensor, *, padded: bool = False) -> dict[str, Tensor]:
    """QTensor -> tensors of pack-quantized; Inexact as :func:`refusal` says."""
    n, k = t.shape
    refuse(refusal(n, k, t.scheme))
    out = {
        "weight_packed": _pack(t.q, t.scheme.bits, padded=padded),
        "weight_scale": t.scale.clone(),
        "weight_shape": torch.tensor([n, k]),
    }
    if t.zero is not None:
        out["weight_zero_point"] = _pack(t.zero.T.contiguous(), t.scheme.bits, padded=padded).T.contiguous()
    return out


def unpack(
    tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, padded: bool = False, name: str = "matrix"
) -> QTensor:
    """Inverse of :func:`pack`; errors as in :class:`llmq.formats.row.Format`."""
    refuse(refusal(n, k, scheme), name)
    require(tensors, layout(n, k, scheme, padded=padded), name, f"compressed-tensors {scheme}")
    if tensors["weight_shape"].tolist() != [n, k]:
        raise ValueError(f"{name}: weight_shape is {tensors['weight_shape'].tolist()}, the matrix is {n} x {k}")
    q = _unpack(tensors["weight_packed"], scheme.bits, k, padded=padded)
    zero = None
    if not scheme.sym:
        zero = _unpack(tensors["weight_zero_point"].T, scheme.bits, n, padded=padded).T.contiguous()
    return QTensor(q, half_scales(tensors["weight_scale"], name), zero, scheme)


def is_padded(words: int, k: int, bits: int) -> bool:
    """Whether rows of ``words`` words are in the older packing; False where the two do not differ.

    Raises ValueError when they are in neither.
    """
    both = {padded: _width(k, bits, padded=padded) for padded in (False, True)}
    if words not in both.values():
        raise ValueError(f"rows of {words} words; {k} codes of {bits} bits take {both[False]} (older: {both[True]})")
    return words != both[False]


def _width(n_codes: int, bits: int, *, padded: bool) -> int:
    return -(-n_codes // (32 // bits)) if padded else word_width(n_codes, bits)


def _pack(codes: Tensor, bits: int, *, padded: bool) -> Tensor:
    if not padded:
        return pack_words(codes, bits)
    per_word = 32 // bits
    rows = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    packed = pack_bits(rows.reshape(rows.shape[0], -1, per_word), bits)  # ceil(per_word * bits / 8) = 4 bytes each
    return packed.reshape(-1).view(torch.int32).reshape(codes.shape[0], -1)


def _unpack(words: Tensor, bits: int, n_codes: int, *, padded: bool) -> Tensor:
    if not padded:
        return unpack_words(words, bits, n_codes)
    rows = words.reshape(-1).view(torch.uint8).reshape(*words.shape, 4)
    return unpack_bits(rows, bits, 32 // bits).reshape(words.shape[0], -1)[:, :n_codes].contiguous()


def layout_int8(n: int, k: int, scheme: QuantScheme) -> Layout:
    """Shape and dtype of each tensor of int-quantized."""
    groups = scheme.n_groups(k)
    out: Layout = {"weight": ((n, k), torch.int8), "weight_scale": ((n, groups), torch.float16)}
    if not scheme.sym:
        out["weight_zero_point"] = ((n, groups), torch.int8)
    return out


def pack_int8(t: QTensor) -> dict[str, Tensor]:
    """QTensor -> tensors of int-quantized; Inexact as :func:`refusal_int8` says."""
    refuse(refusal_int8(*t.shape, t.scheme))
    out = {"weight": _signed(t.q), "weight_scale": t.scale.clone()}
    if t.zero is not None:
        out["weight_zero_point"] = _signed(t.zero)
    return out


def unpack_int8(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> QTensor:
    """Inverse of :func:`pack_int8`; errors as in :class:`llmq.formats.row.Format`."""
    refuse(refusal_int8(n, k, scheme), name)
    require(tensors, layout_int8(n, k, scheme), name, f"int-quantized {scheme}")
    zero = None if scheme.sym else _unsigned(tensors["weight_zero_point"])
    return QTensor(_unsigned(tensors["weight"]), half_scales(tensors["weight_scale"], name), zero, scheme)


def _signed(codes: Tensor) -> Tensor:
    return (codes ^ 0x80).view(torch.int8)


def _unsigned(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.uint8) ^ 0x80


__all__ = ["Inexact", "is_padded", "layout", "layout_int8", "pack", "pack_int8", "refusal", "unpack", "unpack_int8"]
