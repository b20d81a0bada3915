"""Write a quantized model as a GGUF file: its matrices in Q4_0, Q4_1 and Q8_0 blocks, the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llmq.config import one_of
from llmq.dialects.source import Other, Source
from llmq.formats import gguf as blocks
from llmq.models.families import family_of
from llmq.models.gguf_export import (
    GGUF_FAMILIES,
    add_config,
    add_vocabulary,
    check_layers,
    head_dim,
    heads_to_permute,
    llama3_divisors,
    rope_of,
    rope_order,
)
from llmq.qtensor import QTensor

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}

# (name in the file, block or float type, shape in numbers, the bytes u8[rows, ...])
Planned = tuple[str, str, tuple[int, ...], Callable[[], np.ndarray[Any, Any]]]


def write_gguf(source: Source, matrices: Mapping[str, Any], path: Path, *, overwrite: bool, rounded: bool) -> Path:
    """Write the file and return ``path``; it appears under its name when it is whole.

    Args:
        source: the model.
        matrices: module -> something with ``scheme`` (None: written in floats) and ``qtensor()``.
        path: the file, ``*.gguf``.
        overwrite: replace an existing file.
        rounded: offsets of Q4_1 may be rounded to fp16.

    Raises:
        FileExistsError: the file exists.
        ValueError: another suffix, a family or a config that GGUF cannot express.
    """
    if path.suffix != ".gguf":
        raise ValueError(f"a GGUF model is one file: {path} must end in .gguf")
    if path.exists() and (not overwrite or path.is_dir()):
        raise FileExistsError(f"output file {path} exists; use --overwrite to replace it or choose another name")
    config = source.hf_config.get_text_config()
    one_of("model_type of a GGUF export", config.model_type, GGUF_FAMILIES)
    family = GGUF_FAMILIES[config.model_type]
    check_layers(config, family)
    planned = list(_plan(source, matrices, rounded))
    kinds = [kind for _, kind, _, _ in planned if kind in FILE_TYPES]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[family.arch])
    try:
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[max(kinds, key=kinds.count)]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_config(writer, config, family)
        add_vocabulary(writer, source.vocabulary)
        for name, kind, shape, _ in planned:
            _announce(writer, name, kind, shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, _, read in planned:
            writer.write_tensor_data(read())
        writer.close()
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError, ValueError):
            writer.close()
        partial.unlink(missing_ok=True)
    return path


def _announce(writer: gguf.GGUFWriter, name: str, kind: str, shape: tuple[int, ...]) -> None:
    raw = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[raw]
    in_bytes = (*shape[:-1], shape[-1] // size * nbytes)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=raw)


def _plan(source: Source, matrices: Mapping[str, Any], rounded: bool) -> Iterator[Planned]:
    config = source.hf_config.get_text_config()
    family = GGUF_FAMILIES[config.model_type]
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    row = family_of(config.model_type)
    offset = row.norm_offset if row else 0.0

    def named(full: str) -> str:
        name = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{source.spec}: tensor {full} has no name in a GGUF of {family.arch.name}")
        return str(name)

    for module, move in matrices.items():
        full, heads = f"{module}.weight", heads_to_permute(f"{module}.weight", config, family)
        shape = (move.stored.n, move.stored.k)
        if move.scheme is None:
            yield named(full), "F32", shape, _bound(_dense, move, heads)
            continue
        kind = blocks.type_of(move.scheme)
        assert kind is not None, "planned"
        yield named(full), kind, shape, _bound(_codes, move, heads, rounded)
    for full, other in source.others.items():
        if full.endswith("lm_head.weight") and config.tie_word_embeddings:
            continue
        vector = len(other.shape) == 1
        add = offset if vector and full.endswith("norm.weight") else 0.0
        kind = "F32" if vector else FLOATS[other.dtype]
        heads = heads_to_permute(full, config, family)
        dtype = torch.float32 if vector else other.dtype
        yield named(full), kind, other.shape, _bound(_other, other, heads, add, dtype)
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        divisors = llama3_divisors(rope, head_dim(config))
        yield "rope_freqs.weight", "F32", tuple(divisors.shape), lambda: _floats(divisors, None)


def _bound(read: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: read(*args)


def _dense(move: Any, heads: int | None) -> np.ndarray[Any, Any]:
    return _floats(move.stored.dequantize(), heads)


def _other(other: Other, heads: int | None, add: float, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    value = other.read()
    return _floats((value.float() + add).to(dtype) if add else value.to(dtype), heads)


def _codes(move: Any, heads: int | None, rounded: bool) -> np.ndarray[Any, Any]:
    t: QTensor = move.qtensor()
    if heads is not None:
        zero = None if t.zero is None else rope_order(t.zero, heads)
        t = QTensor(rope_order(t.q, heads), rope_order(t.scale, heads), zero, t.scheme)
    return blocks.pack(t, rounded=rounded)["data"].numpy()


def _floats(value: Tensor, heads: int | None) -> np.ndarray[Any, Any]:
    value = value if heads is None else rope_order(value, heads)
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()
