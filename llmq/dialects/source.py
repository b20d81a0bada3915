"""Source: a quantized model to convert or compare, whatever it lies in: a folder of any dialect, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import REPORT_NAME
from llmq.dialects import open_quantized
from llmq.dialects.stored import Stored
from llmq.models.load import embedding_names, empty_model, load_config
from llmq.models.reader import read_json

Log = Callable[[str], None]


@dataclass(frozen=True)
class Other:
    """A tensor that is not quantized: how to read it, and how large it is."""

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass
class Source:
    """An open quantized model.

    Attributes:
        spec: what the user called it.
        origin: its format, for people.
        config: config.json without what says how it is quantized.
        hf_config: the same as transformers' object.
        model: its modules, parameters on meta.
        matrices: the quantized matrices, by module.
        tied: module -> module whose matrix it uses.
        others: all other tensors, by full name.
        files: folder of tokenizer, templates and the rest.
        notes: what was changed to make QTensors.
        report: llmq_report.json, where there is one.
        own_card: README.md of ``files`` is llmq's.
        vocabulary: the GGUF file that holds its tokenizer, if it came from one.
    """

    spec: str
    origin: str
    config: dict[str, Any]
    hf_config: Any
    model: nn.Module
    matrices: dict[str, Stored]
    tied: dict[str, str]
    others: dict[str, Other]
    files: Path
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    own_card: bool = False
    vocabulary: Path | None = None


def open_source(spec: str | Path, *, inexact: str, log: Log) -> Source:
    """Open a quantized folder or a ``.gguf`` file; codes are read when they are asked for.

    Raises as :func:`llmq.dialects.open_quantized`.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        from llmq.dialects.gguf_source import open_gguf

        return open_gguf(path, inexact=inexact, log=log)
    found = open_quantized(path, inexact=inexact)
    config = {k: v for k, v in found.config.items() if k not in ("quantization", "quantization_config")}
    hf_config = load_config(path, found.config)
    try:
        model = empty_model(hf_config)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    tied = found.tied or _tied_by_config(model, path, found.matrices)
    reader = found.reader
    modules = dict(model.named_modules())
    # AutoGPTQ stores biases of zeros for linears without one.
    stale = {f"{name}.bias" for name in found.matrices if getattr(modules.get(name), "bias", None) is None}
    others = {
        name: Other(partial(reader.tensor, name), reader.shape(name), reader.dtype(name))
        for name in found.others()
        if name not in stale
    }
    shapes = {f"{name}.weight": (m.n, m.k) for name, m in found.matrices.items()}
    _check_whole(model, {name: other.shape for name, other in others.items()} | shapes, tied, path)
    report = path / REPORT_NAME
    return Source(
        spec=str(spec),
        origin=f"{found.dialect} folder",
        config=config,
        hf_config=hf_config,
        model=model,
        matrices=found.matrices,
        tied=tied,
        others=others,
        files=path,
        notes=found.notes,
        report=read_json(report) if report.is_file() else {},
        own_card=report.is_file(),
    )


def _check_whole(model: nn.Module, shapes: dict[str, tuple[int, ...]], tied: dict[str, str], folder: Path) -> None:
    """Raise ValueError for a parameter of the model that the files lack or have in another shape."""
    for full, parameter in model.named_parameters():
        shape = shapes.get(full)
        if shape is None and full.removesuffix(".weight") in tied:
            continue
        if shape is None:
            raise ValueError(f"{folder}: the files hold no {full}, which the model of config.json has")
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{folder}: {full} is {shape} in the files, {tuple(parameter.shape)} in the model of config.json: they"
                " do not belong together"
            )


def _tied_by_config(model: Any, folder: Path, matrices: dict[str, Stored]) -> dict[str, str]:
    """A head that shares a quantized embedding, where only the config says so."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    embed, head = embedding_names(model, folder)
    return {head: embed} if embed in matrices and head not in matrices else {}
