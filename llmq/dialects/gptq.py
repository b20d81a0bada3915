"""Folders with ``quant_method: "gptq"``: GPTQModel, AutoGPTQ, optimum; their tensors in llmq/formats/gptq.py.

Which of the two conventions for zero points a file follows is decided as GPTQModel and vLLM do: an explicit
``gptq_v2`` is version 2; symmetric zeros that are all 2^(B-1) are version 2, all one less version 1, whatever the
config says (published files err); everything else is version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmq.config import BITS, QuantScheme, one_of
from llmq.dialects.stored import Found, Stored, check_words, group_size, number, tensors_of
from llmq.formats import gptq
from llmq.models.patterns import Patterns
from llmq.models.reader import WeightReader
from llmq.packing import word_width
from llmq.qtensor import QTensor

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")
GROUP_NAMES = ("group_size", "q_group_size")
BIT_NAMES = ("bits", "w_bit", "wbits")


def find(reader: WeightReader, block: Mapping[str, Any], *, where: str, inexact: str) -> Found:  # noqa: ARG001
    """The quantized matrices of a folder. ValueError or Inexact name the module and the way out."""
    said = block.get("checkpoint_format") or block.get("format") or "gptq"
    one_of(f"{where}: the format of a gptq folder", said, FORMATS)
    if block.get("is_marlin_format"):
        raise ValueError(f"{where}: is_marlin_format: the tensors are in Marlin's order, which llmq does not read")
    names = [n.removesuffix(".qweight") for n in sorted(reader.names()) if n.endswith(".qweight")]
    blocks = _blocks(block, names, where)
    shapes = {name: _shape(reader, blocks[name], name, where) for name in names}
    versions = {name: _version(reader, name, *shapes[name], str(said)) for name in names}
    settled = {v for v in versions.values() if v is not None}
    if len(settled) > 1:
        odd = [next(n for n, v in versions.items() if v == version) for version in sorted(settled)]
        raise ValueError(f"{where}: zero points of {odd[0]} follow version 1, those of {odd[1]} version 2: damaged")
    version = settled.pop() if settled else 2 if said == "gptq_v2" else 1
    return Found({name: _stored(reader, blocks[name], name, *shapes[name], version, where) for name in names})


def _shape(reader: WeightReader, block: Mapping[str, Any], name: str, where: str) -> tuple[int, int, int]:
    """(N, K, bits), which must agree with every tensor."""
    for suffix in ("qzeros", "scales"):
        if f"{name}.{suffix}" not in reader:
            raise ValueError(f"{where}: {name} has qweight but no {suffix}")
    weight, scales = reader.shape(f"{name}.qweight"), reader.shape(f"{name}.scales")
    bits = number(block, BIT_NAMES, where, BITS)
    if len(weight) != 2 or len(scales) != 2 or weight[1] != scales[1] or weight[0] * 32 % bits or not weight[1]:
        raise ValueError(f"{where}: {name} has qweight {weight} and scales {scales}, which are not of one matrix")
    n = weight[1]
    check_words(reader, f"{name}.qzeros", (scales[0], word_width(n, bits)), where)
    return n, weight[0] * 32 // bits, bits


def _version(reader: WeightReader, name: str, n: int, _k: int, bits: int, said: str) -> int | None:
    if said == "gptq_v2":
        return 2
    return gptq.version_by_content(reader.tensor(f"{name}.qzeros"), n, bits)


def _blocks(block: Mapping[str, Any], names: list[str], where: str) -> dict[str, Mapping[str, Any]]:
    """The block as it holds for each module: the first row of ``dynamic`` that matches lies over it."""
    found = block.get("dynamic")
    rows = {key: row for key, row in found.items() if isinstance(row, dict)} if isinstance(found, dict) else {}
    rows = {key.removeprefix("+:"): row for key, row in rows.items() if not key.startswith("-:")}
    patterns, values = Patterns(rows, where), list(rows.values())
    firsts = {name: next(iter(patterns.matching(name)), None) for name in names}
    return {name: block if i is None else {**block, **values[i]} for name, i in firsts.items()}


def _stored(
    reader: WeightReader, block: Mapping[str, Any], name: str, n: int, k: int, bits: int, version: int, where: str
) -> Stored:
    full = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
    at = f"{where}: {name}"
    said = number(block, GROUP_NAMES, where)
    size = group_size(reader.shape(full["scales"])[0], k, said, at)
    zero = gptq.zero_points(reader.tensor(full["qzeros"]), n, bits, version)
    scheme = QuantScheme(bits, size, sym=bool((zero == 1 << (bits - 1)).all()))
    order = None
    if full["g_idx"] in reader:
        g_idx = reader.tensor(full["g_idx"])
        if g_idx.shape != (k,):
            raise ValueError(f"{at}: g_idx has shape {tuple(g_idx.shape)}; the matrix has {k} inputs")
        order = gptq.column_order(g_idx, scheme, at)

    def read() -> QTensor:
        return gptq.unpack(tensors_of(reader, full), n, k, scheme, version=version, name=at)

    present = tuple(f for f in full.values() if f in reader)
    return Stored(name, n, k, scheme, read, order=order, tensors=present)
