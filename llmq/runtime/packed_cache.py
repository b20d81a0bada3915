"""The packed form of a checkpoint's matrices, kept beside the checkpoint so that the next load only maps it.

One file, ``.llmq-packed``: a line of JSON (what it was made from, and where each matrix lies), then the packed
matrices, 64 bytes aligned. It is written under a temporary name and renamed, and never changed afterwards. It belongs
to one state of the checkpoint: names, sizes and modification times of the shards, the scheme of every matrix, and the
layout's version; another state makes another file. All compiled kernel sets read the same layout, so they share it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq import kernels
from llmq.config import cache_folder
from llmq.kernels import PackedWeight
from llmq.runtime.qlinear import QuantizedMatrix

NAME = ".llmq-packed"
_ALIGNMENT = 64
_HEAD = 4096  # the JSON line is padded with blanks to a multiple of this
_MAX_HEAD = 1 << 26
log = logging.getLogger(__name__)


def _origin(files: Iterable[str | Path], modules: dict[str, QuantizedMatrix]) -> dict[str, Any]:
    """What the packed file must have been made from to be used."""
    stats = {Path(f).name: Path(f).stat() for f in files}
    return {
        "layout": kernels.layout_version(),
        "byteorder": sys.byteorder,
        "shards": {name: [s.st_size, s.st_mtime_ns] for name, s in sorted(stats.items())},
        "matrices": {name: [m.n, m.k, str(m.scheme)] for name, m in modules.items()},
    }


def _places(folder: Path) -> list[Path]:
    """Where the file may lie: beside the checkpoint, or in llmq's cache where that folder is not writable."""
    key = str(folder.resolve()).replace(os.sep, "_").strip("_")[-200:]
    return [folder / NAME, cache_folder() / "packed" / f"{key}{NAME}"]


def load(files: Sequence[str], modules: dict[str, QuantizedMatrix]) -> dict[str, PackedWeight]:
    """The packed matrix of every module, mapped from the cache of the checkpoint ``files``.

    Empty when there is no cache or it belongs to another state of the checkpoint.
    """
    if kernels.current_isa() == kernels.REFERENCE or not modules:
        return {}
    origin = _origin(files, modules)
    for path in _places(Path(files[0]).parent):
        head = _read_head(path)
        if head is None or head.get("origin") != origin:
            continue
        # A folder comes with whatever someone put into it: what does not fit is made anew.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            return {name: _mapped(path, head, name, module) for name, module in modules.items()}
    return {}


def _mapped(path: Path, head: dict[str, Any], name: str, module: QuantizedMatrix) -> PackedWeight:
    start, nbytes = head["places"][name]
    if start < 0 or nbytes != kernels.packed_bytes(module.n, module.k, module.scheme):
        raise ValueError(f"{path}: {name} lies at {start} with {nbytes} bytes")
    mapped = np.memmap(path, dtype=np.uint8, mode="c", offset=head["start"] + start, shape=(nbytes,))
    return PackedWeight(module.n, module.k, module.scheme, torch.from_numpy(mapped))


def _read_head(path: Path) -> dict[str, Any] | None:
    """The first line, or None when the file is missing, cut short or no file of ours."""
    if not path.is_file():  # opening a pipe waits for its other end
        return None
    try:
        with path.open("rb") as f:
            line = f.readline(_MAX_HEAD)
        head: dict[str, Any] = json.loads(line)
        whole = head["start"] == len(line) and path.stat().st_size == head["start"] + head["nbytes"]
        return head if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(files: Sequence[str], modules: dict[str, QuantizedMatrix]) -> Path | None:
    """Write the packed matrices of ``modules``; None (and a line in the log) where neither place can be written."""
    packed = {name: m.ready().data for name, m in modules.items()}
    if not packed or not all(isinstance(data, Tensor) for data in packed.values()):
        return None
    places, at = {}, 0
    for name, data in packed.items():
        assert isinstance(data, Tensor)
        places[name] = [at, data.numel()]
        at += -(-data.numel() // _ALIGNMENT) * _ALIGNMENT
    head = {"origin": _origin(files, modules), "places": places, "nbytes": at}
    start = -(-(len(json.dumps(head)) + 32) // _HEAD) * _HEAD
    line = json.dumps({**head, "start": start}).ljust(start - 1).encode("ascii") + b"\n"
    for path in _places(Path(files[0]).parent):
        with contextlib.suppress(OSError):
            _write(path, line, packed.values())
            return path
    log.info("the packed weights were not kept: neither %s nor its cache folder can be written", files[0])
    return None


def _write(path: Path, line: bytes, parts: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=NAME + "-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(line)
            for data in parts:
                f.write(memoryview(data.numpy()))
                f.write(bytes(-data.numel() % _ALIGNMENT))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
