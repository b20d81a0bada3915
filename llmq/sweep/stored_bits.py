"""Bits a weight of anyone's checkpoint, counted where they are stored, over the linears of the model's blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmq.checkpoint import REPORT_NAME
from llmq.models.load import SourceModel

# Full name -> (out_features, in_features).
Linears = dict[str, tuple[int, int]]


def linears_of(source: SourceModel) -> Linears:
    """Every linear of the model's blocks."""
    return {
        f"{block}.{name}": shape
        for i, block in enumerate(source.block_names)
        for name, shape in source.block_linears(i).items()
    }


def of_checkpoint(path: Path, source: SourceModel) -> float:
    """Bits a weight of a folder or GGUF file made of ``source``. Raises ValueError where they cannot be counted."""
    return of_gguf(path, source) if path.is_file() else of_folder(path, linears_of(source))


def of_folder(folder: Path, linears: Mapping[str, tuple[int, int]]) -> float:
    """Bits a weight of a folder of safetensors: all that is stored under a linear's name, but for its bias.

    A ``g_idx`` that only counts up says nothing that the group size does not, and is left out too.

    Raises:
        ValueError: a linear of which the folder stores nothing, or an unreadable file; names it.
    """
    report = folder / REPORT_NAME
    if report.is_file():
        return float(json.loads(report.read_text(encoding="utf-8"))["sizes"]["bits_per_weight_linears"])
    found = dict.fromkeys(linears, 0)
    for name, key, tensor in _stored(folder):
        if name in found and key != "bias" and not (key == "g_idx" and _counts_up(tensor)):
            found[name] += _bits(tensor)
    for name, bits in found.items():
        if not bits:
            raise ValueError(f"{folder} stores nothing under the name {name}; its bits a weight cannot be counted")
    return sum(found.values()) / sum(n * k for n, k in linears.values())


def _stored(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(module, name in it, slice of the tensor) of every stored tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as f:
                for full in f.keys():  # noqa: SIM118 - not a dict
                    name, _, key = full.rpartition(".")
                    yield name, key, f.get_slice(full)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); it is truncated or damaged") from error


def _bits(tensor: Any) -> int:
    count = 1
    for size in tensor.get_shape():
        count *= size
    width = re.search(r"\d+", tensor.get_dtype())  # BF16, I32, F8_E4M3; BOOL has none
    return count * (int(width[0]) if width else 8)


def _counts_up(tensor: Any) -> bool:
    values: torch.Tensor = tensor[:]
    return bool((values[1:] >= values[:-1]).all())


def of_gguf(path: Path, source: SourceModel) -> float:
    """Bits a weight of a GGUF file, from the types of the tensors that hold the linears of ``source``.

    Raises:
        ValueError: not such a file, an architecture without names in the ``gguf`` package, a linear that it lacks.
    """
    import gguf

    from llmq.models.gguf import open_reader

    reader = open_reader(path)
    field = reader.get_field("general.architecture")
    arch = str(field.contents()) if field else ""
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise ValueError(f"{path} is of the architecture {arch!r}, which the gguf package does not know; update it")
    names = gguf.get_tensor_name_map(known[arch], len(source.block_names))
    tensors = {t.name: t for t in reader.tensors}
    bits, weights = 0, 0
    for linear, shape in linears_of(source).items():
        tensor = tensors.get(f"{names.get_name(linear)}.weight")
        if tensor is None or int(tensor.n_elements) != shape[0] * shape[1]:
            raise ValueError(f"{path} holds no tensor of {shape[0]} x {shape[1]} for {linear}; it is another model's")
        bits += 8 * int(tensor.n_bytes)
        weights += int(tensor.n_elements)
    return bits / weights
