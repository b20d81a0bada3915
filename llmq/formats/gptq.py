"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum), versions 1 and 2. Pure functions on local names.

Law (W is N x K = out_features x in_features, B = 2, 3, 4 or 8 bits, G groups of the columns):

    qweight  i32[K*B/32, N]   codes of an output as a dense little-endian bit stream along the inputs: bits of code k at
                              k*B .. k*B+B-1, word r holding bits 32r .. 32r+31 (3 bits cross words: 32 codes, 3 words)
    qzeros   i32[G, N*B/32]   zero points of a group, packed likewise along the outputs; version 1 stores
                              (zero - 1) mod 2^B in each field, version 2 the zero itself
    scales   f16[G, N]
    g_idx    i32[K]           group of each input

    w[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

Symmetric grids store the zero 2^(B-1). Readers need K and N to be multiples of 32. A file written with ``desc_act`` has
its groups anywhere among the columns: :func:`column_order` gives the order in which they stand in a row, and
``unpack`` the matrix whose columns are in this order. Source: GPTQModel, ``nn_modules/qlinear``; AutoGPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.formats.row import Inexact, Layout, full_zeros, half_scales, refuse, require, zeros_or_none
from llmq.packing import pack_words, unpack_words, word_width
from llmq.qtensor import QTensor

MULTIPLE = 32
VERSIONS = (1, 2)


def refusal(n: int, k: int, scheme: QuantScheme) -> str | None:
    """Why no GPTQ reader takes such a matrix, or None."""
    if n % MULTIPLE or k % MULTIPLE:
        return f"a {n} x {k} matrix: readers of gptq need multiples of {MULTIPLE} ({scheme})"
    return None


def layout(n: int, k: int, scheme: QuantScheme) -> Layout:
    """Shape and dtype of each tensor."""
    groups = scheme.n_groups(k)
    return {
        "qweight": ((word_width(k, scheme.bits), n), torch.int32),
        "qzeros": ((groups, word_width(n, scheme.bits)), torch.int32),
        "scales": ((groups, n), torch.float16),
        "g_idx": ((k,), torch.int32),
    }


def pack(t: QTensor, *, version: int) -> dict[str, Tensor]:
    """QTensor -> {"qweight", "qzeros", "scales", "g_idx"}; Inexact for a matrix that :func:`refusal` names."""
    n, k = t.shape
    refuse(refusal(n, k, t.scheme))
    zero = full_zeros(t)
    fields = (zero - 1) & (t.scheme.levels - 1) if version == 1 else zero
    return {
        "qweight": pack_words(t.q, t.scheme.bits).T.contiguous(),
        "qzeros": pack_words(fields.T.contiguous(), t.scheme.bits),
        "scales": t.scale.T.contiguous(),
        "g_idx": (torch.arange(k) // t.scheme.group_width(k)).int(),
    }


def unpack(
    tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, *, version: int, name: str = "matrix"
) -> QTensor:
    """Inverse of :func:`pack`; with ``g_idx`` of a desc_act file the columns come in :func:`column_order`.

    Files without ``g_idx`` are read as if the groups lay in order.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype than :func:`layout` says, or a scale is not finite.
        Inexact: scales that are no fp16 numbers, zero points that are not the scheme's, groups of unequal sizes.
    """
    want = layout(n, k, scheme)
    if "g_idx" not in tensors:
        want.pop("g_idx")
    require(tensors, want, name, f"gptq {scheme}")
    q = unpack_words(tensors["qweight"].T, scheme.bits, k)
    order = column_order(tensors["g_idx"], scheme, name) if "g_idx" in tensors else None
    zero = zeros_or_none(zero_points(tensors["qzeros"], n, scheme.bits, version), scheme, name)
    scale = half_scales(tensors["scales"].T, name)
    return QTensor(q if order is None else q[:, order].contiguous(), scale, zero, scheme)


def zero_points(qzeros: Tensor, n: int, bits: int, version: int) -> Tensor:
    """u8[N, G] zero points of ``qzeros``, by the convention of ``version``."""
    fields = unpack_words(qzeros, bits, n)
    return ((fields + 1) & ((1 << bits) - 1) if version == 1 else fields).T.contiguous()


def version_by_content(qzeros: Tensor, n: int, bits: int) -> int | None:
    """The version that symmetric zeros tell (all fields 2^(B-1): 2, all one less: 1), None when they tell nothing."""
    fields = unpack_words(qzeros, bits, n)
    for version in VERSIONS:
        if bool((fields == (1 << (bits - 1)) - (2 - version)).all()):
            return version
    return None


def column_order(g_idx: Tensor, scheme: QuantScheme, name: str) -> Tensor | None:
    """i64[K]: columns sorted by group, each group's in their order; None when they are sorted already.

    Raises:
        ValueError: a group number out of range.
        Inexact: groups that do not have ``group_size`` columns each (but for a shorter last one).
    """
    k = len(g_idx)
    if g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: g_idx is {g_idx.dtype}; whole numbers were expected")
    groups, width = scheme.n_groups(k), scheme.group_width(k)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"{name}: g_idx runs from {int(g_idx.min())} to {int(g_idx.max())}; {scheme} has {groups} groups"
        )
    regular = torch.arange(k) // width
    if torch.equal(g_idx.long(), regular):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], regular):
        sizes = torch.bincount(g_idx.long(), minlength=groups).tolist()
        raise Inexact(f"{name}: g_idx makes groups of {min(sizes)} to {max(sizes)} columns; {scheme} has {width} each")
    return order
