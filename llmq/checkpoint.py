"""A checkpoint folder: written shard by shard under a temporary name, renamed when it is whole; read with distrust.

A folder holds ``config.json`` (with ``quantization_config``), numbered ``model-*.safetensors`` with an index,
``llmq_report.json``, a model card, and every file of the source folder that is not weights, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.config import KVCacheConfig, QuantScheme, RuntimeConfig
from llmq.formats import native
from llmq.qtensor import QTensor

QUANT_METHOD = "llmq"
FORMAT_VERSION = 1
REPORT_NAME = "llmq_report.json"
CARD_NAME = "README.md"
# Files that hold weights (or point at them), in any format a source folder may carry.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl"),
    *(".safetensors.index.json", ".bin.index.json", ".onnx_data"),
)
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def quantization_config(
    schemes: dict[str, QuantScheme],
    default: QuantScheme,
    tied: dict[str, str],
    producer: str,
    runtime: RuntimeConfig | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` block of config.json.

    Args:
        schemes: scheme of every quantized module, by its full name.
        default: the scheme that was asked for (the ``bits``/``group_size``/``sym`` that other tools show).
        tied: module -> module whose matrix it shares (``lm_head`` -> ``model.embed_tokens``).
        producer: name and version of the writer.
        runtime: what the checkpoint asks of whoever runs it; only what differs from the defaults is written.
    """
    asked, usual = asdict(runtime or RuntimeConfig()), asdict(RuntimeConfig())
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "modules": {name: str(scheme) for name, scheme in schemes.items()},
        "tied": tied,
        "producer": producer,
        **{name: value for name, value in asked.items() if value != usual[name]},
    }


def parse_quantization_config(block: dict[str, Any], where: str) -> tuple[dict[str, QuantScheme], dict[str, str]]:
    """(schemes by module, tied modules) of a ``quantization_config``; ValueError says what is wrong and ``where``."""
    if block.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{where}: quant_method is {block.get('quant_method')!r}, expected {QUANT_METHOD!r}")
    version = block.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{where}: format_version is {version!r}, this llmq reads {FORMAT_VERSION}; update llmq")
    modules, tied = block.get("modules"), block.get("tied", {})
    if not isinstance(modules, dict) or not modules or not isinstance(tied, dict):
        raise ValueError(f"{where}: 'modules' must name the scheme of each quantized module; the file is damaged")
    schemes = {name: _parse_scheme(str(text), f"{where}: module {name}") for name, text in modules.items()}
    for name, source in tied.items():
        if not isinstance(source, str) or source not in schemes:
            raise ValueError(f"{where}: {name} is tied to {source}, which is not among the quantized modules")
    try:
        KVCacheConfig.parse(str(block.get("kv_bits", "16")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return schemes, dict(tied)


def _parse_scheme(text: str, where: str) -> QuantScheme:
    try:
        return QuantScheme.parse(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into an error that names the folder and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        full = getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e)
        if not full:
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            errno.ENOSPC,
            f"the disk of {folder} is full ({free / 2**20:.0f} MiB free); nothing was kept: free space or "
            "choose another --output",
        ) from e


class CheckpointWriter:
    """Writes a folder under a temporary name beside ``folder`` and renames it in :meth:`finish`.

    Use as a context manager: leaving it without ``finish`` (an error, Ctrl-C) removes what was written. A killed
    process leaves only a folder whose name begins with a dot and that has no config.json.
    """

    def __init__(self, folder: Path, n_shards: int, *, overwrite: bool, expected_bytes: int = 0) -> None:
        self.folder = folder.absolute()
        self.overwrite = overwrite
        self.n_shards = n_shards
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0
        self._written = 0
        check_output(self.folder, overwrite=overwrite, expected_bytes=expected_bytes)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.partial-", dir=self.folder.parent))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    def write_shard(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard; names are full tensor names."""
        self._written += 1
        assert self._written <= self.n_shards, "more shards than announced"
        name = f"model-{self._written:05d}-of-{self.n_shards:05d}.safetensors"
        path = self.partial / name
        with disk_errors(self.partial):
            save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".tmp"), {"format": "pt"})
            path.with_suffix(".tmp").rename(path)
        for key, value in tensors.items():
            assert key not in self.weight_map, f"{key} written twice"
            self.weight_map[key] = name
            self.total_bytes += value.numel() * value.element_size()

    def read(self, prefix: str) -> dict[str, Tensor]:
        """Tensors written so far whose names begin with ``prefix``, by full name."""
        found: dict[str, Tensor] = {}
        for shard in sorted({s for name, s in self.weight_map.items() if name.startswith(prefix)}):
            with safe_open(self.partial / shard, framework="pt") as f:
                found |= {name: f.get_tensor(name) for name in f.keys() if name.startswith(prefix)}  # noqa: SIM118
        return found

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Write new values of tensors that were written before, by full name; shapes and dtypes stay."""
        for shard in sorted({self.weight_map[name] for name in tensors}):
            path = self.partial / shard
            held = load_file(path)
            for name in held.keys() & tensors.keys():
                old, new = held[name], tensors[name].contiguous()
                assert (old.shape, old.dtype) == (new.shape, new.dtype), f"{name} changes its layout"
                held[name] = new
            with disk_errors(self.partial):
                save_file(held, path.with_suffix(".tmp"), {"format": "pt"})
                path.with_suffix(".tmp").rename(path)

    def finish(self, source: Path, config: dict[str, Any], report: dict[str, Any], card: str) -> None:
        """Write index, other files, report, card and, last, config.json. The folder is complete but not published."""
        assert self._written == self.n_shards, f"{self._written} of {self.n_shards} shards written"
        with disk_errors(self.partial):
            copy_other_files(source, self.partial)
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
            write_json(self.partial / "model.safetensors.index.json", index)
            write_json(self.partial / REPORT_NAME, report)
            # The source's own card stays as it is; ours then goes beside it.
            name = CARD_NAME if not (self.partial / CARD_NAME).exists() else "README-llmq.md"
            (self.partial / name).write_text(card, encoding="utf-8")
            write_json(self.partial / "config.json", config)

    def update_report(self, report: dict[str, Any]) -> None:
        """Replace the report of the finished, not yet published folder."""
        write_json(self.partial / REPORT_NAME, report)

    def publish(self) -> None:
        """Rename the finished folder to its name, replacing an old one if that was allowed."""
        assert self.overwrite or not self.folder.exists(), "checked in the constructor"
        replace_folder(self.partial, self.folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename the folder ``new`` to ``folder``, in place of an old one if there is one."""
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        folder.replace(old / "folder")
    for path in (new, *new.rglob("*")):
        usual_mode(path)
    new.replace(folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def usual_mode(path: Path) -> None:
    """Who may read a published file is the user's umask's choice; temporary names are made for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def check_output(folder: Path, *, overwrite: bool, expected_bytes: int = 0, source: Path | None = None) -> None:
    """Raise before the long work if ``folder`` cannot be written: it exists, is a file, or its disk is too small.

    A folder that is or holds ``source``, the model to quantize, is never replaced.
    """
    if source is not None and folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise FileExistsError(f"output folder {folder} is or holds the model to quantize; choose another --output")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} exists and is not a folder; choose another --output")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output folder {folder} exists; use --overwrite to replace it or choose another --output"
        )
    if folder.exists() and overwrite and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise FileExistsError(
            f"output folder {folder} holds files but no config.json: it is no model, so it is not replaced"
        )
    parent = folder.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"output {folder}: {parent} is a file, not a folder; choose another --output")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"output {folder}: {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if expected_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"output {folder} needs about {expected_bytes / 2**20:.0f} MiB, its disk has {free / 2**20:.0f} MiB free",
        )


def is_weight_file(path: Path) -> bool:
    """True for files that hold weights or point at them."""
    return path.name.endswith(WEIGHT_SUFFIXES)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy every file of ``source`` that is not weights nor config.json, byte for byte, sub-folders included."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or hidden or is_weight_file(path) or str(relative) == "config.json":
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as every JSON file of a folder is written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def matrix_layout(n: int, k: int, scheme: QuantScheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of an n x k matrix, by local name."""
    return native.layout(n, k, scheme)


def matrix_tensors(t: QTensor) -> dict[str, Tensor]:
    """The stored tensors of a matrix, by local name."""
    return native.pack(t)


def matrix_from_tensors(tensors: dict[str, Tensor], n: int, k: int, scheme: QuantScheme, name: str) -> QTensor:
    """Inverse of :func:`matrix_tensors`; ValueError names ``name`` when the tensors are not that matrix's."""
    return native.unpack(tensors, n, k, scheme, name=name)


def read_qtensor(folder: Path, name: str, n: int, k: int, scheme: QuantScheme) -> QTensor:
    """Read one quantized matrix of a written folder.

    Raises:
        ValueError: the folder lacks a tensor or has it in another shape or dtype; names both.
    """
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for key in matrix_layout(n, k, scheme):
        full = f"{name}.{key}"
        if full not in weight_map:
            raise ValueError(f"{folder}: tensor {full} is not in the index")
        with safe_open(folder / weight_map[full], framework="pt") as f:
            tensors[key] = f.get_tensor(full)
    return matrix_from_tensors(tensors, n, k, scheme, name)


def check_files(
    files: Iterable[str | Path], expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]], where: str
) -> None:
    """Check the headers of safetensors ``files`` against the tensors that a model expects.

    Args:
        files: the checkpoint's safetensors files.
        expected: shape and dtype (None: any float) by full tensor name.
        where: how errors name the checkpoint.

    Raises:
        ValueError: an unreadable file, a missing tensor, one of another shape or dtype (names file and both values), or
            integers that no module expects: its weights would be random.
    """
    found: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    found.add(name)
                    part = f.get_slice(name)
                    _check_tensor(f"{where}: {name} in {Path(file).name}", part, expected.get(name))
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{where}: {Path(file).name} cannot be read ({e}); the file is truncated or damaged"
            ) from e
    missing = sorted(set(expected) - found)
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors are missing, among them {', '.join(missing[:3])}")
    stray = sorted(name for name in found - set(expected) if name.endswith(f".{native.CODES}"))
    if stray:
        raise ValueError(
            f"{where}: the files hold integers of {len(stray)} modules that quantization_config does not name, among "
            f"them {', '.join(stray[:3])}: config.json is not that of these files, or damaged"
        )


def _check_tensor(what: str, part: Any, want: tuple[tuple[int, ...], torch.dtype | None] | None) -> None:
    if want is None:
        return  # transformers itself reports tensors that nobody asked for
    shape, dtype = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
    if shape != want[0] or dtype is None or (want[1] is not None and dtype != want[1]):
        raise ValueError(
            f"{what} is {part.get_dtype()} {shape}; config.json asks for {want[1] or 'a float dtype'} {want[0]}: "
            "the files do not belong together or are damaged"
        )
