"""Folders with ``quant_method: "compressed-tensors"``; their tensors in llmq/formats/compressed_tensors.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmq.config import BITS, QuantScheme, one_of
from llmq.dialects.stored import Found, Stored, group_size, number, tensors_of
from llmq.formats import Inexact
from llmq.formats import compressed_tensors as ct
from llmq.formats.gptq import column_order
from llmq.models.patterns import Patterns
from llmq.models.reader import WeightReader
from llmq.qtensor import QTensor

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
PLAIN = ("weight", "weight_scale", "weight_zero_point")


def find(reader: WeightReader, block: Mapping[str, Any], *, where: str, inexact: str) -> Found:  # noqa: ARG001
    """The quantized matrices of a folder. ValueError or Inexact name the module and the way out."""
    one_of(f"{where}: the format of a compressed-tensors folder", block.get("format"), FORMATS)
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"{where}: config_groups must be an object of groups; the file is damaged")
    by_target = _Groups(groups, where)
    found: dict[str, Stored] = {}
    for name in sorted(reader.names()):
        module, _, suffix = name.rpartition(".")
        packed = suffix == "weight_packed"
        if packed or (suffix == "weight" and f"{module}.weight_scale" in reader):
            weights = by_target.weights(module)
            found[module] = (_packed if packed else _plain)(reader, module, weights, where)
    return Found(found)


class _Groups:
    """The config groups by their targets: a module's name or the end of it, ``re:`` and a regex, or a class."""

    def __init__(self, groups: Mapping[str, Any], where: str) -> None:
        self.where = where
        rows = [(str(target), group) for group in groups.values() for target in _targets(group, where)]
        regexes = [(target[3:], group) for target, group in rows if target.startswith("re:")]
        self._patterns = Patterns([pattern for pattern, _ in regexes], where)
        self._matched = [group for _, group in regexes]
        self._named = dict(reversed(rows))  # the first of several with one target

    def weights(self, module: str) -> Mapping[str, Any]:
        """The arguments for a module's weights: by its name, the longest end first, else by regex, else by class."""
        matched = [self._matched[i] for i in self._patterns.matching(module)]  # long names are refused there
        parts = module.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        named, classes = ([self._named[t] for t in ts if t in self._named] for ts in (ends, ("Linear", "Embedding")))
        ranked = [*named, *matched, *classes]
        if not ranked:
            raise ValueError(f"{self.where}: {module} is quantized, but no target of config_groups names it")
        weights = ranked[0].get("weights")
        kind = weights.get("type") if isinstance(weights, dict) else weights
        if not isinstance(weights, dict) or kind != "int":
            raise Inexact(f"{self.where}: {module} has weights of type {kind!r}; llmq holds int")
        return weights


def _targets(group: Mapping[str, Any], where: str) -> Sequence[Any]:
    targets = group.get("targets", ())
    if not isinstance(targets, list | tuple):
        raise ValueError(f"{where}: the targets of a config group are {targets!r}; a list was expected")
    return targets


def _size(reader: WeightReader, module: str, weights: Mapping[str, Any], k: int, where: str) -> int:
    shape = reader.shape(f"{module}.weight_scale")
    said = weights.get("group_size")
    said = said if type(said) is int and said > 0 else -1
    return group_size(shape[1] if len(shape) == 2 else 1, k, said, f"{where}: {module}")


def _packed(reader: WeightReader, module: str, weights: Mapping[str, Any], where: str) -> Stored:
    at = f"{where}: {module}"
    full = {suffix: f"{module}.{suffix}" for suffix in PACKED}
    bits = number(weights, ("num_bits",), at, BITS)
    named = full["weight_shape"] in reader and reader.dtype(full["weight_shape"]) in (torch.int64, torch.int32)
    shape = reader.tensor(full["weight_shape"]).tolist() if named else None
    words = reader.shape(full["weight_packed"])
    if not isinstance(shape, list) or len(shape) != 2 or len(words) != 2 or words[0] != shape[0] or shape[1] <= 0:
        raise ValueError(f"{at}: weight_packed is {words}, weight_shape says {shape}")
    n, k = shape
    scheme = QuantScheme(bits, _size(reader, module, weights, k, where), sym=full["weight_zero_point"] not in reader)
    try:
        padded = ct.is_padded(words[1], k, bits)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    order = None
    if full["weight_g_idx"] in reader:
        g_idx = reader.tensor(full["weight_g_idx"])
        if g_idx.shape != (k,):
            raise ValueError(f"{at}: weight_g_idx has shape {tuple(g_idx.shape)}; the matrix has {k} inputs")
        order = None if bool((g_idx == -1).all()) else column_order(g_idx, scheme, at)

    def read() -> QTensor:
        t = ct.unpack(_in_groups(tensors_of(reader, full), n), n, k, scheme, padded=padded, name=at)
        return t if order is None else QTensor(t.q[:, order].contiguous(), t.scale, t.zero, scheme)

    return Stored(module, n, k, scheme, read, order=order, tensors=tuple(f for f in full.values() if f in reader))


def _plain(reader: WeightReader, module: str, weights: Mapping[str, Any], where: str) -> Stored:
    at = f"{where}: {module}"
    full = {suffix: f"{module}.{suffix}" for suffix in PLAIN}
    number(weights, ("num_bits",), at, (8,))
    shape, dtype = reader.shape(full["weight"]), reader.dtype(full["weight"])
    if len(shape) != 2 or dtype != torch.int8:
        raise ValueError(f"{at}: weight is {dtype} {shape}; an int8 matrix was expected")
    n, k = shape
    scheme = QuantScheme(8, _size(reader, module, weights, k, where), sym=full["weight_zero_point"] not in reader)

    def read() -> QTensor:
        return ct.unpack_int8(_in_groups(tensors_of(reader, full), n), n, k, scheme, name=at)

    return Stored(module, n, k, scheme, read, tensors=tuple(f for f in full.values() if f in reader))


def _in_groups(tensors: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """Strategies ``tensor`` and ``channel`` may store a scale as [1] or [N]: spread over the rows."""
    for key in ("weight_scale", "weight_zero_point"):
        value = tensors.get(key)
        if value is not None and value.dim() < 2 and value.numel() in (1, n) and value.dtype != torch.int32:
            tensors[key] = value.reshape(-1, 1).expand(n, 1).contiguous()
    return tensors
