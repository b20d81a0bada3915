"""Folders with ``quant_method: "llmq"``; their tensors in llmq/formats/native.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmq.checkpoint import parse_quantization_config
from llmq.config import QuantScheme
from llmq.dialects.stored import Found, Stored, tensors_of
from llmq.formats import native
from llmq.models.reader import WeightReader
from llmq.packing import packed_width
from llmq.qtensor import QTensor

SUFFIXES = ("qweight", "scales", "zeros")


def find(reader: WeightReader, block: Mapping[str, Any], *, where: str, inexact: str) -> Found:  # noqa: ARG001
    """The quantized matrices of a folder. ValueError names the module."""
    schemes, tied = parse_quantization_config(dict(block), where)
    return Found({name: _stored(reader, name, scheme, where) for name, scheme in schemes.items()}, tied)


def _stored(reader: WeightReader, name: str, scheme: QuantScheme, where: str) -> Stored:
    """K is not in the tensors: a row of bytes and a number of groups leave a few; the module settles it."""
    full = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
    codes, scales = reader.shape(full["qweight"]), reader.shape(full["scales"])
    if len(codes) != 2 or len(scales) != 2 or codes[0] != scales[0]:
        raise ValueError(f"{where}: {name} has qweight {codes} and scales {scales}, which are not of one matrix")
    n, width = codes
    top = width * 8 // scheme.bits
    fits = [k for k in range(max(1, top - 8), top + 1) if packed_width(k, scheme.bits) == width]
    k = max((k for k in fits if scheme.n_groups(k) == scales[1]), default=None)
    if k is None:
        raise ValueError(
            f"{where}: {name} has {scales[1]} groups of scales for rows of {width} bytes in {scheme}: damaged"
        )

    def read() -> QTensor:
        return native.unpack(tensors_of(reader, full), n, k, scheme, name=f"{where}: {name}")

    return Stored(name, n, k, scheme, read, tensors=tuple(f for f in full.values() if f in reader))
