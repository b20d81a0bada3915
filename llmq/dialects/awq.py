"""Folders with ``quant_method: "awq"`` (AutoAWQ), versions gemm and gemv; their tensors in llmq/formats/awq.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.config import QuantScheme, one_of
from llmq.dialects.stored import Found, Stored, group_size, number, tensors_of
from llmq.formats import FORMATS, awq
from llmq.models.reader import WeightReader
from llmq.packing import unpack_words
from llmq.qtensor import QTensor

VERSIONS = {"gemm": "awq", "gemv": "awq_gemv"}
SUFFIXES = ("qweight", "qzeros", "scales")


def find(reader: WeightReader, block: Mapping[str, Any], *, where: str, inexact: str) -> Found:  # noqa: ARG001
    """The quantized matrices of a folder. ValueError or Inexact name the module and the way out."""
    number(block, ("bits", "w_bit"), where, (awq.BITS,))
    said = number(block, ("group_size", "q_group_size"), where)
    version = str(block.get("version") or block.get("format") or "gemm").lower()
    one_of(f"{where}: the version of an awq folder", version, VERSIONS)
    names = [n.removesuffix(".qweight") for n in sorted(reader.names()) if n.endswith(".qweight")]
    return Found({name: _stored(reader, name, said, version, where) for name in names})


def _stored(reader: WeightReader, name: str, said: int, version: str, where: str) -> Stored:
    full = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
    at = f"{where}: {name}"
    for key in full.values():
        if len(reader.shape(key)) != 2 or 0 in reader.shape(key):
            raise ValueError(f"{where}: {key} has shape {reader.shape(key)}; a matrix with elements was expected")
    if reader.dtype(full["qzeros"]) not in (torch.int32, torch.uint32):
        raise ValueError(f"{where}: {full['qzeros']} is {reader.dtype(full['qzeros'])}; 32-bit words were expected")
    rows, columns = reader.shape(full["qweight"])
    if version == "gemm":
        n, k = columns * awq.PER_WORD, rows
        size = group_size(reader.shape(full["scales"])[0], k, said, at)
    else:
        n, k = rows, columns * awq.PER_WORD
        size = group_size(-(-k // (k if said == -1 else said)), k, said, at)
    if not n:
        raise ValueError(f"{at} has no outputs: the file is damaged")
    zeros = _zeros(reader.tensor(full["qzeros"]), version, QuantScheme(awq.BITS, size).n_groups(k))
    scheme = QuantScheme(awq.BITS, size, sym=bool((zeros == 8).all()))
    unpack: Callable[..., QTensor] = FORMATS[VERSIONS[version]].unpack

    def read() -> QTensor:
        return unpack(tensors_of(reader, full), n, k, scheme, name=at)

    return Stored(name, n, k, scheme, read, tensors=tuple(full.values()))


def _zeros(qzeros: Tensor, version: str, groups: int) -> Tensor:
    """The zero points, in any order: only whether all are the middle one matters here."""
    fields = unpack_words(qzeros, awq.BITS, qzeros.shape[1] * awq.PER_WORD)
    return fields[:, :groups] if version == "gemv" else fields
