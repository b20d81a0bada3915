"""Folders of mlx-lm: ``quantization`` in config.json, affine mode; their tensors in llmq/formats/mlx.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmq.config import BITS, QuantScheme
from llmq.dialects.stored import Found, Stored, affine_stored, number, tensors_of
from llmq.formats import mlx
from llmq.formats.affine import Affine
from llmq.models.reader import WeightReader

SUFFIXES = ("weight", "scales", "biases")


def find(reader: WeightReader, block: Mapping[str, Any], *, where: str, inexact: str) -> Found:
    """The quantized matrices of a folder. ValueError or Inexact name the module and the way out."""
    names = [n.removesuffix(".scales") for n in sorted(reader.names()) if n.endswith(".scales")]
    return Found({name: _stored(reader, block, name, where, inexact) for name in names})


def _stored(reader: WeightReader, block: Mapping[str, Any], name: str, where: str, inexact: str) -> Stored:
    own = block.get(name)
    said = {**block, **own} if isinstance(own, dict) else block
    if said.get("mode", "affine") != "affine":
        raise ValueError(f"{where}: {name} is quantized in mode {said['mode']!r}; llmq reads 'affine'")
    full = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
    bits = number(said, ("bits",), where, BITS)
    size = number(said, ("group_size",), where, mlx.GROUP_SIZES)
    missing = [f for f in full.values() if f not in reader]
    if missing:
        raise ValueError(f"{where}: {name} lacks {', '.join(missing)}")
    shape = reader.shape(full["weight"])
    if len(shape) != 2 or not shape[1] or shape[1] * 32 % bits:
        raise ValueError(f"{where}: {full['weight']} has shape {shape}; rows of {bits}-bit codes were expected")
    n, k = shape[0], shape[1] * 32 // bits
    scheme = QuantScheme(bits, size)

    def read() -> Affine:
        return mlx.unpack_affine(tensors_of(reader, full), n, k, scheme, name=f"{where}: {name}")

    return affine_stored(name, (n, k), read, tuple(full.values()), inexact, where)
