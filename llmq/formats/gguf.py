"""GGUF's block types Q4_0, Q4_1 and Q8_0, written and read; all other types read. Pure functions on local names.

Law: a row of K numbers (K % 32 = 0) is K/32 blocks, one after the other in ``data`` u8[N, bytes of a row]:

    Q4_0   18 bytes   f16 d; 16 bytes: low nibble of byte j is code j, high nibble code j + 16;   w = d * (code - 8)
    Q4_1   20 bytes   f16 d, f16 m; codes as in Q4_0;                                             w = d * code + m
    Q8_0   34 bytes   f16 d; 32 signed bytes;                                                     w = d * code

A symmetric QTensor of 4 or 8 bits with groups of a multiple of 32 columns is Q4_0 or Q8_0, d repeated in every block of
a group. An asymmetric one of 4 bits is Q4_1 where all of zero * scale are fp16 numbers (:func:`pack` refuses others).
Read back without knowledge of the groups it has groups of 32. The numbers of a Q5_0 and of an IQ4_NL are whole
multiples of d: they are read as 8-bit codes (:func:`read_int8`), which are written as Q8_0.
Source: ggml, ``ggml-common.h``, ``ggml-quants.c``.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.formats.affine import Affine, from_qtensor, to_qtensor
from llmq.formats.mlx import with_symmetry
from llmq.formats.row import Inexact, Layout, half_scales, refuse, require
from llmq.qtensor import QTensor, expand_groups

BLOCK = 32
# Bytes of a block, by type.
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
# Types whose numbers are whole multiples, of at most 127, of their block's scale: bytes of a block.
INT8 = {"Q5_0": 22, "IQ4_NL": 18}
INT8_SCHEME = QuantScheme(8, BLOCK, sym=True)
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


def type_of(scheme: QuantScheme) -> str | None:
    """The block type that holds ``scheme``, or None."""
    return {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}.get((scheme.bits, scheme.sym))


def refusal(_n: int, k: int, scheme: QuantScheme) -> str | None:
    """Why GGUF does not hold such a matrix (Q4_1: cannot hold any such), or None."""
    if type_of(scheme) is None:
        return f"gguf has no block type for {scheme}; it has w4...sym (Q4_0), w8...sym (Q8_0) and w4 (Q4_1)"
    if k % BLOCK or scheme.group_width(k) % BLOCK:
        return f"{k} columns in {scheme}: gguf has whole blocks of {BLOCK}"
    return None


def layout(n: int, k: int, scheme: QuantScheme) -> Layout:
    """Shape and dtype of the one tensor."""
    kind = type_of(scheme)
    assert kind is not None, "refusal() comes first"
    return {"data": ((n, k // BLOCK * BYTES[kind]), torch.uint8)}


def pack(t: QTensor, *, rounded: bool = False) -> dict[str, Tensor]:
    """QTensor -> {"data"}.

    Args:
        t: the matrix.
        rounded: Q4_1 may round zero * scale to fp16.

    Raises:
        Inexact: as :func:`refusal` says; a Q4_1 with offsets that are no fp16 numbers unless ``rounded``.
    """
    n, k = t.shape
    refuse(refusal(n, k, t.scheme))
    kind = type_of(t.scheme)
    repeat = t.scheme.group_width(k) // BLOCK
    count = k // BLOCK
    parts = [_bytes(_repeated(t.scale, repeat, count))]
    if kind == "Q4_1":
        offset = from_qtensor(t).offset
        bad = int((offset.half().float() != offset).sum())
        if bad and not rounded:
            raise Inexact(
                f"{bad} of {offset.numel()} products of zero point and scale are no fp16 numbers, as Q4_1 needs"
            )
        parts.append(_bytes(_repeated(offset.half(), repeat, count)))
    codes = t.q.reshape(n, count, BLOCK)
    if kind == "Q8_0":
        parts.append(codes ^ 0x80)
    else:
        parts.append(codes[..., :16] | (codes[..., 16:] << 4))
    return {"data": torch.cat(parts, dim=-1).reshape(n, -1)}


def unpack(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, name: str = "matrix") -> QTensor:
    """Inverse of :func:`pack`: a QTensor of ``scheme``; Inexact when the blocks of one of its groups differ."""
    refuse(refusal(n, k, scheme), name)
    require(tensors, layout(n, k, scheme), name, f"gguf {type_of(scheme)}")
    kind = type_of(scheme)
    assert kind is not None
    blocks = read_blocks(tensors["data"], kind)
    repeat = scheme.group_width(k) // BLOCK
    at = torch.arange(0, k // BLOCK, repeat)
    merged = Affine(blocks.q, blocks.scale[:, at], blocks.offset[:, at], scheme)
    for got, kept in ((blocks.scale, merged.scale), (blocks.offset, merged.offset)):
        if not torch.equal(_repeated(kept, repeat, k // BLOCK), got):
            raise Inexact(f"{name}: the blocks of a group of {scheme} differ; read it in groups of {BLOCK}")
    return with_symmetry(to_qtensor(merged, name), scheme, name)


def read_blocks(data: Tensor, kind: str) -> Affine:
    """The numbers of ``data`` u8[N, bytes], groups of 32; ``kind`` a key of ``BYTES``."""
    n = data.shape[0]
    blocks = data.reshape(n, -1, BYTES[kind])
    scale = _halves(blocks[..., :2])
    body = blocks[..., BYTES[kind] - (32 if kind == "Q8_0" else 16) :]
    codes = body ^ 0x80 if kind == "Q8_0" else torch.cat([body & 15, body >> 4], dim=-1)
    offset = _halves(blocks[..., 2:4]) if kind == "Q4_1" else scale * -float(1 << (BITS[kind] - 1))
    return Affine(codes.reshape(n, -1), scale, offset, scheme_of(kind))


def scheme_of(kind: str) -> QuantScheme:
    """The scheme of a block type."""
    return QuantScheme(BITS[kind], BLOCK, sym=kind != "Q4_1")


def to_scheme(blocks: Affine, scheme: QuantScheme, name: str) -> QTensor:
    """The QTensor of ``blocks``; Inexact where it is none of ``scheme``."""
    return with_symmetry(to_qtensor(blocks, name), scheme, name)


def read_qtensor(data: Tensor, kind: str, name: str) -> QTensor:
    """The QTensor of ``data``, groups of 32; Inexact for a Q4_1 whose offsets are no whole zero points."""
    return to_scheme(read_blocks(data, kind), scheme_of(kind), name)


def read_int8(data: Tensor, kind: str, name: str) -> QTensor:
    """Q5_0 (5-bit codes) and IQ4_NL (a table of 16 whole numbers) as 8-bit symmetric codes, exactly, groups of 32.

    Raises:
        ValueError: a scale that is not finite.
        Inexact: numbers that are no whole multiples of their block's scale; both types have none.
    """
    n, nbytes = data.shape[0], INT8[kind]
    scale = half_scales(_halves(data.reshape(n, -1, nbytes)[..., :2]), name).float()
    value = dequantize(data, kind)
    step = expand_groups(torch.where(scale == 0, torch.ones_like(scale), scale), value.shape[1], INT8_SCHEME)
    codes = (value / step).round_()
    if not torch.equal(codes * step, value) or bool((codes.abs() > 127).any()):
        raise Inexact(f"{name}: {kind} with numbers that are no whole multiples of their scale")
    return QTensor((codes + 128).to(torch.uint8), scale.half(), None, INT8_SCHEME)


def dequantize(data: Tensor, kind: str) -> Tensor:
    """f32[N, K] of any block type that the ``gguf`` package reads (Q5, K-quants, IQ4_NL, ...)."""
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(data.contiguous().numpy(), GGMLQuantizationType[kind]))


@cache
def readable(kind: str) -> bool:
    """Whether :func:`dequantize` knows a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind in ("F32", "F16"):
        return True
    try:
        dequantize(torch.zeros(1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1], dtype=torch.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _repeated(per_group: Tensor, repeat: int, count: int) -> Tensor:
    return per_group.repeat_interleave(repeat, dim=1)[:, :count]


def _bytes(half: Tensor) -> Tensor:
    """f16[N, G] -> u8[N, G, 2]."""
    return half.reshape(-1).view(torch.uint8).reshape(*half.shape, 2)


def _halves(pairs: Tensor) -> Tensor:
    """u8[N, G, 2] -> f32[N, G]."""
    return pairs.reshape(-1).view(torch.float16).float().reshape(pairs.shape[:-1])
