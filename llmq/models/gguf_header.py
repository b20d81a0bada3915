"""Check the header of a GGUF file before a parser believes it: every count, length, type and offset against the file.

The ``gguf`` package reads past the end of a file without an error, and counts as far as a header tells it to: an array
said to have 2^60 numbers fills the memory. Law (ggml, ``docs/gguf.md``; little-endian, versions 2 and 3):

    "GGUF", u32 version, u64 tensors, u64 pairs
    pair     string key, u32 type, value       string: u64 length, bytes; array: u32 type, u64 count, values
    tensor   string name, u32 dimensions, u64[dimensions] shape, u32 type, u64 offset
    data     from the next multiple of general.alignment (32); offsets are counted from there
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# Bytes of a number, by type: u8, i8, u16, i16, u32, i32, f32, bool; u64, i64, f64.
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MAX_DIMENSIONS = 4
LEAST_PAIR, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8


class BadHeader(ValueError):
    """What is wrong with a header; says where."""


@dataclass
class _Cursor:
    """A place in the file's bytes; reads move it and never pass the end."""

    data: mmap.mmap
    at: int = 0

    def skip(self, count: int, what: str) -> int:
        """The place of ``count`` bytes, which are passed."""
        start, left = self.at, len(self.data) - self.at
        if count > left:
            raise BadHeader(f"{what} at byte {start} needs {count} bytes, the file has {left} more")
        self.at += count
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.skip(8, what))[0])

    def text(self, what: str) -> str:
        length = self.u64(what)
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise BadHeader(f"{what} at byte {start} is no UTF-8") from None

    def value(self, kind: int, what: str) -> None:
        """Pass a value."""
        if kind in NUMBERS:
            self.skip(NUMBERS[kind], what)
        elif kind == STRING:
            self.skip(self.u64(what), what)
        elif kind == ARRAY:
            self.array(what)
        else:
            raise BadHeader(f"{what} has type {kind}; types are 0 to {max(NUMBERS)}")

    def array(self, what: str) -> None:
        kind, count = self.u32(what), self.u64(what)
        if kind in NUMBERS:
            self.skip(NUMBERS[kind] * count, f"{what} ({count} numbers)")
        elif kind == STRING:
            self.room(count, 8, what)
            for _ in range(count):
                self.skip(self.u64(what), what)
        else:  # arrays of arrays: in the format, in no model, and deep ones exhaust the stack
            raise BadHeader(f"{what} is an array of type {kind}; numbers and strings were expected")

    def room(self, count: int, least: int, what: str) -> None:
        """Raise unless ``count`` things of at least ``least`` bytes can follow."""
        left = len(self.data) - self.at
        if count * least > left:
            raise BadHeader(f"{count} {what} need at least {count * least} bytes, the file has {left} more")


def check_header(path: Path) -> None:
    """Raise BadHeader for a header that contradicts itself or the file; the numbers in the blocks are not looked at."""
    with _mapped(path) as data:
        c = _Cursor(data, 4)
        version = c.u32("the version")
        if version not in VERSIONS:
            raise BadHeader(f"version {version}; {' and '.join(map(str, VERSIONS))} are known")
        tensors, pairs = c.u64("the number of tensors"), c.u64("the number of metadata pairs")
        c.room(pairs, LEAST_PAIR, "metadata pairs")
        alignment = _pairs(c, pairs)
        c.room(tensors, LEAST_TENSOR, "tensors")
        spans = [_tensor(c, alignment) for _ in range(tensors)]
        names = {name for name, _, _ in spans}
        if len(names) != len(spans):
            raise BadHeader(f"{len(spans)} tensors have {len(names)} names")
        _check_spans(spans, -(-c.at // alignment) * alignment, len(data))


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _pairs(c: _Cursor, count: int) -> int:
    """Pass all pairs; returns the alignment."""
    alignment, seen = 32, set()
    for _ in range(count):
        key = c.text("a metadata key")
        if key in seen:
            raise BadHeader(f"metadata key {key[:80]!r} occurs twice")
        seen.add(key)
        kind = c.u32(f"the type of {key[:80]}")
        start = c.at
        c.value(kind, key[:80])
        if key == "general.alignment":
            alignment = struct.unpack_from("<I", c.data, start)[0] if kind == 4 else 0
            if alignment == 0 or alignment & (alignment - 1):
                raise BadHeader(f"general.alignment is {alignment} (type {kind}); a power of two, u32, was expected")
    return alignment


def _tensor(c: _Cursor, alignment: int) -> tuple[str, int, int]:
    """(name, offset, bytes) of the next tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = c.text("a tensor's name")
    what = f"tensor {name[:80]}"
    dimensions = c.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise BadHeader(f"{what} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} were expected")
    shape = [c.u64(what) for _ in range(dimensions)]
    kind, offset = c.u32(what), c.u64(what)
    try:
        size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise BadHeader(f"{what} has type {kind}, which the gguf package does not know") from None
    if shape[0] % size:
        raise BadHeader(f"{what} has rows of {shape[0]} numbers; blocks of its type have {size}")
    if offset % alignment:
        raise BadHeader(f"{what} begins at {offset}, which is no multiple of the alignment {alignment}")
    return name, offset, math.prod(shape) // size * nbytes


def _check_spans(spans: list[tuple[str, int, int]], start: int, total: int) -> None:
    """Tensors lie inside the file and do not overlap."""
    at, before = 0, ""
    for name, offset, nbytes in sorted(spans, key=lambda span: span[1:]):
        if offset < at:
            raise BadHeader(f"tensor {name[:80]} begins at {offset}, inside {before[:80]}, which ends at {at}")
        if start + offset + nbytes > total:
            raise BadHeader(f"tensor {name[:80]} ends at byte {start + offset + nbytes}, the file has {total}")
        at, before = offset + nbytes, name
