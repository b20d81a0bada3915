"""A GGUF file as a quantized model: Q4_0, Q4_1 and Q8_0 as they are, other block types dense or rounded.

Names and orders are those of ``llmq.models.gguf_export``, backwards: rows of q and k of a llama from neighbours to
halves, Gemma's norms less 1. Config and tokenizer are made by transformers and kept in llmq's cache.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq.compat import API
from llmq.config import cache_folder
from llmq.dialects.source import Log, Other, Source
from llmq.dialects.stored import FALLBACK, WAY_OUT, Stored, affine_stored, requantized
from llmq.formats import Inexact
from llmq.formats import gguf as blocks
from llmq.formats.affine import Affine
from llmq.models.families import family_of
from llmq.models.gguf import check_file, check_version, damaged, one_reader
from llmq.models.gguf_export import GGUF_FAMILIES, halves_order, head_dim, heads_to_permute, llama3_divisors
from llmq.models.load import check_depth, embedding_names, empty_model, load_config
from llmq.models.reader import read_json
from llmq.qtensor import QTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Rows on which the error of a rounded matrix is measured when it is opened.
PROBE_ROWS = 256
# Scaling of the ropes of Llama 3.1, 3.2: the file holds only the divisors that come of it.
LLAMA3_ROPES = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


def open_gguf(path: Path, *, inexact: str, log: Log) -> Source:
    """Open a GGUF file; its codes are read when they are asked for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no GGUF file, a damaged or split one, an architecture whose names are not known here, tensors that
            are missing or of another shape than the metadata say.
        Inexact: linears in a block type that no QTensor holds, unless ``inexact`` is ``requantize``.
    """
    check_file(path)
    with one_reader() as make:
        try:
            reader = make(path)
            fields = {n: reader.get_field(n) for n in ("split.count", "general.architecture", "tokenizer.ggml.model")}
            arch = fields["general.architecture"].contents()
            count = fields["split.count"].contents() if fields["split.count"] else 1
            words = fields["tokenizer.ggml.model"]
            has_tokenizer = words is not None and words.contents() != "no_vocab"
            tensors = {str(t.name): t for t in reader.tensors}
        except Exception as error:  # the parser indexes whatever the bytes say
            raise damaged(path, error) from error
        if count > 1:
            raise ValueError(f"{path} is one part of a model split into {count} files; join them first")
        layers = reader.get_field(f"{arch}.block_count")
        check_depth({"num_hidden_layers": layers and layers.contents()}, len(tensors), str(path))
        folder = _files(path, has_tokenizer, log)
    raw = read_json(folder / "config.json")
    return _Reading(path, folder, raw, str(arch), tensors, inexact).source()


class _Reading:
    """What is known while a file is taken apart."""

    def __init__(
        self, path: Path, folder: Path, raw: dict[str, Any], arch: str, tensors: dict[str, Any], inexact: str
    ) -> None:
        import gguf

        self.path, self.folder, self.raw, self.tensors, self.inexact = path, folder, raw, tensors, inexact
        self.config = load_config(folder, raw)
        self.text = self.config.get_text_config()
        row = GGUF_FAMILIES.get(self.text.model_type)
        if row is None or gguf.MODEL_ARCH_NAMES[row.arch] != arch:
            known = ", ".join(sorted({gguf.MODEL_ARCH_NAMES[f.arch] for f in GGUF_FAMILIES.values()}))
            raise ValueError(f"{path}: llmq knows the tensors of {known}; this is {arch} ({self.text.model_type})")
        self.row = row
        self.names = gguf.get_tensor_name_map(row.arch, self.text.num_hidden_layers)
        family = family_of(self.text.model_type)
        self.norm_offset = family.norm_offset if family else 0.0
        self.matrices: dict[str, Stored] = {}
        self.others: dict[str, Other] = {}
        self.notes: list[str] = []

    def source(self) -> Source:
        self._rope_divisors()
        try:
            model = empty_model(self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        embed, head = embedding_names(model, self.folder)
        for full, parameter in model.named_parameters():
            self._take(full, tuple(parameter.shape), {embed, head})
        left = sorted(set(self.tensors) - {"rope_freqs.weight"})
        if left:
            raise ValueError(f"{self.path}: {len(left)} tensors have no place in the model, among them {left[0]}")
        tied = {head: embed} if self.text.tie_word_embeddings and embed in self.matrices else {}
        return Source(
            spec=str(self.path),
            origin="GGUF file",
            config=self.raw,
            hf_config=self.config,
            model=model,
            matrices=self.matrices,
            tied=tied,
            others=self.others,
            files=self.folder,
            notes=self.notes + [f"{n}: {m.note}" for n, m in self.matrices.items() if m.note],
            vocabulary=self.path,
        )

    def _rope_divisors(self) -> None:
        """Llama 3's scaling stands in a tensor, from which transformers makes no config."""
        tensor = self.tensors.get("rope_freqs.weight")
        if tensor is None:
            return
        found = torch.from_numpy(np.array(tensor.data)).float()
        rope = API.rope_parameters(self.text)
        for candidate in LLAMA3_ROPES:
            whole = {**candidate, "rope_theta": rope["rope_theta"]}
            divisors = llama3_divisors(whole, head_dim(self.text))
            if divisors.shape == found.shape and torch.allclose(divisors, found, rtol=1e-4):
                API.set_rope_parameters(self.text, whole)
                self.raw["rope_parameters"] = whole
                return
        raise ValueError(f"{self.path}: rope_freqs.weight is no scaling that is known; take the model in safetensors")

    def _take(self, full: str, shape: tuple[int, ...], tables: set[str]) -> None:
        name = self.names.get_name(full, try_suffixes=(".weight", ".bias"))
        tensor = self.tensors.pop(name, None) if name else None
        if tensor is None:
            raise ValueError(f"{self.path} has no tensor for {full} ({name})")
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise ValueError(f"{self.path}: {name} has shape {found}, {full} has {shape}: metadata and tensors differ")
        kind = tensor.tensor_type.name
        if not blocks.readable(kind):
            raise ValueError(f"{self.path}: {name} has type {kind}, whose numbers the gguf package does not read")
        module = full.removesuffix(".weight")
        heads = heads_to_permute(full, self.text, self.row)
        data = partial(_bytes, tensor)
        if kind in blocks.INT8 and len(shape) == 2:
            self.matrices[module] = self._int8(module, (shape[0], shape[1]), kind, heads, data)
        elif kind in blocks.BYTES and len(shape) == 2:
            self.matrices[module] = self._blocks(module, (shape[0], shape[1]), kind, heads, data)
        elif kind in FLOATS or len(shape) < 2 or (module in tables and self.inexact == "refuse"):
            dtype = FLOATS.get(kind, torch.float32)
            if kind not in FLOATS:
                self.notes.append(f"{module}: {kind}, which no grid of ours holds, kept dense in float32")
            offset = self.norm_offset if len(shape) == 1 and full.endswith("norm.weight") else 0.0
            self.others[full] = Other(partial(_dense, data, kind, shape, heads, offset, dtype), shape, dtype)
        else:
            self.matrices[module] = self._rounded(module, (shape[0], shape[1]), kind, heads, data)

    def _blocks(
        self, module: str, shape: tuple[int, int], kind: str, heads: int | None, data: Callable[[], Tensor]
    ) -> Stored:
        def read() -> Affine:
            a = blocks.read_blocks(data(), kind)
            if heads is None:
                return a
            q, scale, offset = (halves_order(x, heads) for x in (a.q, a.scale, a.offset))
            return Affine(q, scale, offset, a.scheme)

        at = f"{self.path}: {module}"
        if kind == "Q4_1":
            return affine_stored(module, shape, read, (), self.inexact, str(self.path))
        scheme = blocks.scheme_of(kind)
        return Stored(module, *shape, scheme, lambda: blocks.to_scheme(read(), scheme, at))

    def _int8(
        self, module: str, shape: tuple[int, int], kind: str, heads: int | None, data: Callable[[], Tensor]
    ) -> Stored:
        def read() -> QTensor:
            t = blocks.read_int8(data(), kind, f"{self.path}: {module}")
            return t if heads is None else replace(t, q=halves_order(t.q, heads), scale=halves_order(t.scale, heads))

        return Stored(module, *shape, blocks.INT8_SCHEME, read)

    def _rounded(
        self, module: str, shape: tuple[int, int], kind: str, heads: int | None, data: Callable[[], Tensor]
    ) -> Stored:
        if self.inexact != "requantize":
            raise Inexact(f"{self.path}: {module} is {kind}, which no grid of ours holds. {WAY_OUT}")

        def read() -> QTensor:
            weight = _dense(data, kind, shape, heads, 0.0, torch.float32)
            return requantized(weight)[0]

        probe = requantized(blocks.dequantize(data()[:PROBE_ROWS], kind))[1]
        return Stored(module, *shape, FALLBACK, read, note=f"{kind} {probe}")


def _bytes(tensor: Any) -> Tensor:
    """The stored numbers of a tensor, a private copy: u8[rows, bytes], or the floats as they are."""
    return torch.from_numpy(np.array(tensor.data))


def _dense(
    data: Callable[[], Tensor], kind: str, shape: tuple[int, ...], heads: int | None, offset: float, dtype: torch.dtype
) -> Tensor:
    value = blocks.dequantize(data(), kind).reshape(shape)
    if heads is not None:
        value = halves_order(value, heads)
    return (value - offset).to(dtype) if offset else value.to(dtype).contiguous()


def _files(path: Path, has_tokenizer: bool, log: Log) -> Path:
    """Folder of config, generation config and tokenizer of a file; made once."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}-files"
    if folder.is_dir():
        return folder
    check_version(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log(f"reading config and tokenizer of {path.name}")
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=folder.parent))
    try:
        try:
            config = AutoConfig.from_pretrained(path.parent, **where)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where) if has_tokenizer else None
            architecture = type(empty_model(config)).__name__
        except Exception as error:
            raise damaged(path, error) from error
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [architecture]
        config.dtype = torch.float32
        config.save_pretrained(scratch)
        GenerationConfig.from_model_config(config).save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.init_kwargs.pop("local_files_only", None)
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
