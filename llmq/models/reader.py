"""WeightReader: tensors of a safetensors folder, read on demand into private memory, every header distrusted.

Format: safetensors README, "Format" (8-byte little-endian header length N, N bytes of JSON, then the tensors' bytes
without holes). Reads go through ``readinto``: resident memory holds what the caller keeps and nothing else, and a file
that shrinks while it is read gives an error, where a memory map would kill the process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The limit of the safetensors library: a longer header is an attack or a torn file.
MAX_HEADER = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` (counted from the file's first byte)."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class WeightReader:
    """Tensors of a folder that holds ``model.safetensors`` or shards with ``model.safetensors.index.json``.

    Args:
        folder: the model's folder.
        renames: (regex, replacement) applied in order to each stored name; all methods speak of the new names.
        files: safetensors files to read instead of those that the folder's names and index say.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: a header, an index or an offset that does not hold; only pickled weights; names that collide.
    """

    def __init__(
        self, folder: Path, *, renames: tuple[tuple[str, str], ...] = (), files: Iterable[str | Path] = ()
    ) -> None:
        self.folder = Path(folder)
        self._renames, self._files = renames, tuple(map(Path, files))
        self._ties: dict[str, str] = {}
        self._entries = self._scan()

    def validate(self) -> None:
        """Check all headers anew. Raises ValueError when one is bad or has changed since the reader was made."""
        now = self._scan()
        for name, entry in self._entries.items():
            if now.get(name) != entry:
                raise ValueError(f"{entry.path}: tensor {name} has changed since the folder was opened; start again")

    def names(self) -> set[str]:
        """Names of the stored tensors. Tied names (see :meth:`tie`) can be read too but are not listed."""
        return set(self._entries)

    def __contains__(self, name: object) -> bool:
        return self._ties.get(name, name) in self._entries if isinstance(name, str) else False

    def tie(self, name: str, stored: str) -> None:
        """Let ``name`` be read as the stored tensor ``stored``, whether or not the files hold a copy of it."""
        self._entry(stored)
        self._ties[name] = stored

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as stored."""
        return self._entry(name).nbytes

    def tensor(self, name: str) -> Tensor:
        """A private copy of a whole tensor, in the file's dtype."""
        entry = self._entry(name)
        out = torch.empty(entry.shape, dtype=entry.dtype)
        with entry.path.open("rb", buffering=0) as file:
            _fill(file, entry, name, 0, out)
        return out

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, ...]: rows ``start .. stop - 1`` of a tensor, a private copy. ValueError if out of range."""
        entry = self._entry(name)
        n = _n_rows(entry, name)
        if not 0 <= start <= stop <= n:
            raise ValueError(f"rows {start}:{stop} of {name} were asked for; it has {n} rows")
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        with entry.path.open("rb", buffering=0) as file:
            _fill(file, entry, name, start, out)
        return out

    def rows_at(self, name: str, ids: Tensor) -> Tensor:
        """Gather rows: [..., *row shape], in the file's dtype. Each distinct row is read once, the others never are.

        Args:
            name: a tensor with at least one dimension, [R, ...].
            ids: i64[...], values 0 .. R-1; ValueError otherwise.
        """
        entry = self._entry(name)
        n = _n_rows(entry, name)
        wanted, place = torch.unique(ids, return_inverse=True)  # sorted
        if wanted.numel() and (int(wanted[0]) < 0 or int(wanted[-1]) >= n):
            raise ValueError(f"row ids {int(wanted[0])} to {int(wanted[-1])} of {name} were asked for; it has {n} rows")
        table = torch.empty((wanted.numel(), *entry.shape[1:]), dtype=entry.dtype)
        with entry.path.open("rb", buffering=0) as file:
            for first, row, length in _runs(wanted.tolist()):
                _fill(file, entry, name, row, table[first : first + length])
        return table[place]

    def row_chunks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, [<= rows, ...]) over a whole tensor, in order."""
        n = _n_rows(self._entry(name), name)
        for start in range(0, n, rows):
            yield start, self.rows(name, start, min(start + rows, n))

    def _entry(self, name: str) -> TensorEntry:
        stored = self._ties.get(name, name)
        if stored not in self._entries:
            raise ValueError(f"{self.folder} holds no tensor {stored} ({len(self._entries)} tensors are there)")
        return self._entries[stored]

    def _scan(self) -> dict[str, TensorEntry]:
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if self._files:
            stored = {name: entry for file in self._files for name, entry in read_header(file).items()}
        elif single.is_file():  # transformers' order: the single file wins
            stored = read_header(single)
        elif index.is_file():
            stored = _read_shards(index)
        else:
            raise _no_weights(self.folder)
        out: dict[str, TensorEntry] = {}
        for name, entry in stored.items():
            new = rename(name, self._renames)
            if new in out:
                raise ValueError(f"{self.folder}: two stored tensors become {new} in the model; one of them is {name}")
            out[new] = entry
        return out


def rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """``name`` after all (regex, replacement) rules, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises FileNotFoundError, or ValueError when it does not hold one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: is it the folder of a Hugging Face model?")
    return _parse_object(path.read_bytes(), str(path))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry of one safetensors file, after checking every length, dtype, shape and offset.

    Raises:
        ValueError: naming the file, the tensor and the numbers that disagree.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path} is {size} bytes long; a safetensors file has at least 8: truncated, fetch it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path}: the header claims {length} bytes, the file has {size - 8} after the length (and {MAX_HEADER}"
                " are the most allowed): truncated or not a safetensors file"
            )
        header = _parse_object(file.read(length), f"{path}: the header")
    header.pop("__metadata__", None)
    entries = {name: _read_entry(path, name, spec, 8 + length, size) for name, spec in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries


def _parse_object(raw: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON ({error}): the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a JSON {type(value).__name__}; expected an object")
    return value


def _read_entry(path: Path, name: str, spec: Any, start: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(spec, dict) or not {"dtype", "shape", "data_offsets"} <= spec.keys():
        raise ValueError(f"{where} is described by {str(spec)[:80]!r}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _whole_numbers(shape):
        raise ValueError(f"{where} has shape {shape!r}; expected a list of whole numbers from 0")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {offsets!r}; expected [begin, end] with begin <= end")
    begin, end = offsets
    if start + end > size:
        raise ValueError(f"{where} ends at byte {start + end}, the file has {size} bytes: truncated, fetch it again")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if need != end - begin:
        raise ValueError(f"{where} is {dtype} {shape} and needs {need} bytes; its offsets give it {end - begin}")
    return TensorEntry(path, DTYPES[dtype], tuple(shape), start + begin, need)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_layout(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """Tensors lie one after the other, without overlap, hole or rest."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            fault = "overlaps the one before it" if entry.offset < at else "leaves a hole before it"
            raise ValueError(f"{path}: tensor {name} begins at byte {entry.offset}, expected {at}: it {fault}")
        at += entry.nbytes
    if at != size:
        raise ValueError(f"{path}: its tensors end at byte {at}, the file has {size} bytes: damaged, fetch it again")


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name, shard in weight_map.items():
        # A name such as ../x would read outside the folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: tensor {name} is said to be in {shard!r}; expected a file name without a path")
        if shard not in headers:
            path = index.parent / shard
            if not path.is_file():
                raise ValueError(f"{index} names {shard} (tensor {name}), which is not in the folder: fetch it again")
            headers[shard] = read_header(path)
        if name not in headers[shard]:
            raise ValueError(f"{index} says that {shard} holds tensor {name}, which it does not")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _no_weights(folder: Path) -> Exception:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)) if folder.is_dir() else []
    if pickles:
        return ValueError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when read;"
            " llmq reads safetensors. Load the model where you trust it and save it with save_pretrained, or take a"
            " revision with safetensors"
        )
    return FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: there are no weights to read")


def _n_rows(entry: TensorEntry, name: str) -> int:
    if not entry.shape:
        raise ValueError(f"{name} is a single number; it has no rows")
    return entry.shape[0]


def _runs(ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first id, length) of each run of consecutive ids in a sorted list."""
    first = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield first, ids[first], i - first
            first = i


def _fill(file: FileIO, entry: TensorEntry, name: str, row: int, out: Tensor) -> None:
    """Read ``out`` (contiguous) from row ``row`` of an entry."""
    if not out.numel():
        return
    row_bytes = entry.nbytes // entry.shape[0] if entry.shape else 0
    buffer: Any = out.reshape(-1).view(torch.uint8).numpy()
    view = memoryview(buffer)
    file.seek(entry.offset + row * row_bytes)
    done = 0
    while done < len(view):  # one read returns at most 2 GiB
        got = file.readinto(view[done:])
        if not got:
            raise ValueError(f"{entry.path}: tensor {name} gave {done} of {len(view)} bytes: the file was cut in use")
        done += got
