"""Damaged files of every format, each opened; run by test_fuzz_formats.py in a process with bounded memory.

    python fuzz_formats.py FORMAT FOLDER [LABEL]

Everything must be a clear error that names the file, or a model. The mutations are the same in every run. Prints a line
for each that ended otherwise and, last, how many were tried; a LABEL runs that one alone, with its traceback.
FUZZ_EVERY=3 in the environment takes every third mutation.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOM = 3 << 29  # address space beyond what the imports took; the models have a few hundred kilobytes
SECONDS = 30  # processor time of one case
WAIT = 600  # time by the clock: a case may wait for others' programs, but not for ever
NAME = "subject-model"
UP = "model.layers.0.mlp.up_proj"
VALUES: list[Any] = [None, -1, 0, 7, 10**9, 10**30, 1.5, math.nan, "x", "", "*", [], [1], {}, {"a": {}}, True]
SHAPES: list[Any] = [[], [0], [-1], [1 << 62, 1 << 62], [[4]], ["4"], None, "44", [1.5, 2], [64], {}]
OFFSETS: list[Any] = [[0, 1 << 62], [9, 1], [-8, 0], [0], None, [0, 64], ["a", "b"]]
DTYPES: list[Any] = ["F32", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "X9", 3, None, []]
COUNTS = (0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
Case = tuple[str, Callable[[Path], None]]
Cases = Callable[[str, Path, random.Random], Iterator[Case]]
Open = Callable[[Path, int], None]  # a file or folder, and the number of the case


class TookTooLong(BaseException):
    """A case used its processor time up."""


# Folders


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: str, body: bytes) -> None:
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def in_header(tensor: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header, body = read_header(folder / "model.safetensors")
        header[tensor][key] = value
        write_header(folder / "model.safetensors", json.dumps(header), body)

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A whole file whose tensors are not those of the format."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    return apply


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors.update({name: value(tensors[name])}))


def in_config(path: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        at = config
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def bytes_at(name: str, edit: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name if folder.is_dir() else folder
        data = bytearray(path.read_bytes())
        edit(data)
        path.write_bytes(data)

    return change


def flips(rng: random.Random, stop: int) -> Callable[[bytearray], None]:
    changes = [(rng.randrange(stop), rng.randrange(256)) for _ in range(rng.choice((1, 1, 2, 8)))]

    def edit(data: bytearray) -> None:
        for at, value in changes:
            data[at] = value

    return edit


def leaves(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of everything in a JSON object, containers too."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*at, key)
        yield from leaves(inner, (*at, key))


def folder_cases(folder: Path, rng: random.Random) -> Iterator[Case]:
    file = "model.safetensors"
    size, header = (folder / file).stat().st_size, read_header(folder / file)[0]
    for i in range(24):
        stop = rng.randrange(size)
        yield f"cut {i}", bytes_at(file, lambda data, stop=stop: data.__delitem__(slice(stop, None)))
    for i in range(100):
        yield f"flip {i}", bytes_at(file, flips(rng, size))
        yield f"flip in the header {i}", bytes_at(file, flips(rng, 2000))
    for length in COUNTS:
        raw = struct.pack("<Q", length)
        yield f"header of {length}", bytes_at(file, lambda data, raw=raw: data.__setitem__(slice(8), raw))
    names = [n for n in header if n.startswith(UP)] + ["model.norm.weight", "model.embed_tokens.weight"]
    for name in (n for n in names if n in header):
        for key, values in (("shape", SHAPES), ("data_offsets", OFFSETS), ("dtype", DTYPES)):
            for value in values:
                yield f"{name} {key} {value}", in_header(name, key, value)
        yield f"{name} overlaps", in_header(name, "data_offsets", header[UP + ".scales" if "scales" in name else name])
        yield f"{name} gone", with_tensors(lambda tensors, name=name: tensors.pop(name))
        for label, value in TENSORS.items():
            yield f"{name} {label}", replaced(name, value)
    yield "key twice", twice
    yield from config_cases(folder)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda t: t.flatten(),
    "turned": lambda t: t.T if t.dim() == 2 else t[:, None],
    "cut": lambda t: t[:-1],
    "narrow": lambda t: t[..., :-1],
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "a number": lambda t: t.flatten()[0],
    "deep": lambda t: t[None],
    "as f64": lambda t: t.double() if t.dtype != torch.uint32 else t.view(torch.int32).double(),
    "as i64": lambda t: t.long() if t.dtype != torch.uint32 else t.view(torch.int32).long(),
    "as u8": lambda t: t.contiguous().reshape(-1).view(torch.uint8).clone(),
    "nan": lambda t: torch.full(t.shape, math.nan, dtype=t.dtype if t.is_floating_point() else torch.float16),
    "inf": lambda t: torch.full(t.shape, math.inf, dtype=t.dtype if t.is_floating_point() else torch.float32),
    "ones": lambda t: torch.full_like(t, -1) if t.dtype not in (torch.uint32, torch.uint8) else torch.ones_like(t),
}


def twice(folder: Path) -> None:
    header, body = read_header(folder / "model.safetensors")
    text = json.dumps(header)
    name = json.dumps(f"{next(iter(header))}")
    write_header(folder / "model.safetensors", text[:-1] + f", {name}: {{}}}}", body)


def config_cases(folder: Path) -> Iterator[Case]:
    config = json.loads((folder / "config.json").read_text())
    names = [n for n in ("quantization_config", "quantization") if n in config]
    paths = [(n, *path) for n in names for path in leaves(config[n])] + [(n,) for n in names]
    # One module stands for all.
    paths = [p for p in paths if "model.layers" not in p[-1] or UP in p[-1]]
    paths += [(key,) for key in config if key not in names and not key.startswith("_")]
    for path in paths:
        for value in VALUES:
            yield f"config {'/'.join(path)} {value}", in_config(path, value)
    for depth in (100, 100000):
        text = "[" * depth + "]" * depth
        yield f"config {depth} deep", lambda f, text=text: (f / "config.json").write_text(text) and None
    yield "config gone", lambda f: (f / "config.json").unlink()


# GGUF files


def gguf_cases(path: Path, rng: random.Random) -> Iterator[Case]:
    data = path.read_bytes()
    names = [n for n in (b"token_embd.weight", b"blk.0.ffn_up.weight", b"output_norm.weight") if n in data]
    header = max(data.index(n) for n in names) + 64
    for i in range(16):
        stop = rng.randrange(len(data))
        yield f"cut {i}", bytes_at("", lambda data, stop=stop: data.__delitem__(slice(stop, None)))
    for i in range(120):
        yield f"flip in the header {i}", bytes_at("", flips(rng, header))
    for at, what in ((4, "version"), (8, "tensors"), (16, "pairs")):
        for count in COUNTS:
            yield f"{what} {count}", put(at, "<I" if at == 4 else "<Q", count)
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges"):
        at = data.index(key) + len(key)
        for count in COUNTS:
            yield f"{key.decode()} {count}", put(at + 8, "<Q", count)
            yield f"{key.decode()} key of {count}", put(at - len(key) - 8, "<Q", count)
        for kind in range(14):
            yield f"{key.decode()} of {kind}", put(at + 4, "<I", kind)
            yield f"{key.decode()} type {kind}", put(at, "<I", kind)
    for key in (b"llama.block_count", b"llama.embedding_length", b"llama.attention.head_count", b"llama.vocab_size"):
        for count in COUNTS if key in data else ():
            yield f"{key.decode()} {count}", put(data.index(key) + len(key) + 4, "<I", count)
    for name in names:
        at = data.index(name) + len(name)
        dims = struct.unpack_from("<I", data, at)[0]
        for count in COUNTS:
            yield f"{name.decode()} dimensions {count}", put(at, "<I", count)
            for i in range(dims):
                yield f"{name.decode()} shape {i} {count}", put(at + 4 + 8 * i, "<Q", count)
            yield f"{name.decode()} offset {count}", put(at + 8 + 8 * dims, "<Q", count)
        for kind in range(42):
            yield f"{name.decode()} type {kind}", put(at + 4 + 8 * dims, "<I", kind)
        yield f"{name.decode()} overlaps", put(at + 8 + 8 * dims, "<Q", 32)
    for depth in (10, 100000):
        yield f"arrays {depth} deep", deep_arrays(depth)


def put(at: int, form: str, value: int) -> Callable[[Path], None]:
    raw = struct.pack(form, value % (1 << 8 * struct.calcsize(form)))
    return bytes_at("", lambda data: data.__setitem__(slice(at, at + len(raw)), raw))


def deep_arrays(depth: int) -> Callable[[Path], None]:
    pair = (
        struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)
    )

    def edit(data: bytearray) -> None:
        data[16:24] = struct.pack("<Q", struct.unpack_from("<Q", data, 16)[0] + 1)
        data[24:24] = pair

    return bytes_at("", edit)


# Running them


def open_all(path: Path, _number: int = 0) -> None:
    """Everything of a model, as a conversion reads it."""
    from llmq.dialects.source import open_source

    source = open_source(path, inexact="refuse", log=lambda _line: None)
    for matrix in source.matrices.values():
        matrix.read()
    for other in source.others.values():
        other.read()


def fault(path: Path, number: int, opened: Open) -> str:
    """What is wrong with how ``path`` was taken; empty: nothing."""
    try:
        opened(path, number)
    except (ValueError, OSError) as error:
        # Parameters of an empty model are asked for, never touched, and then moved to meta: no memory is used.
        if "allocate memory" in str(error) and "no causal LM can be made" not in str(error):
            return str(error)[:300]
        if NAME not in str(error):
            return f"does not name the file: {type(error).__name__}: {error}"
        if len(str(error)) > 1500:
            return f"an error of {len(str(error))} characters"
    except (Exception, TookTooLong) as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def cases_of(kind: str, base: Path, rng: random.Random) -> Iterator[Case]:
    return gguf_cases(base, rng) if kind == "gguf" else folder_cases(base, rng)


def run(kind: str, base: Path, only: str | None, cases: Cases, opened: Open) -> int:
    scratch = base.parent / "scratch"
    tried = 0
    every = int(os.environ.get("FUZZ_EVERY", "1"))
    for number, (label, mutate) in enumerate(cases(kind, base, random.Random(kind))):
        if label != only if only is not None else number % every:
            continue
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        subject = scratch / (f"{NAME}.gguf" if kind == "gguf" else NAME)
        shutil.copy(base, subject) if kind == "gguf" else shutil.copytree(base, subject)
        mutate(subject)
        tried += 1
        if only is not None:
            with contextlib.suppress(SystemExit):
                try:
                    opened(subject, number)
                except BaseException:
                    traceback.print_exc()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(WAIT)
        wrong = fault(subject, number, opened)
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if wrong:
            print(f"{label} -> {wrong}", flush=True)
    print(f"tried {tried}", flush=True)
    return 0


def stop(*_: Any) -> None:
    raise TookTooLong(f"more than {SECONDS} s of processor time, or {WAIT} s")


def main(cases: Cases, opened: Open) -> int:
    kind, base = sys.argv[1], Path(sys.argv[2])
    os.environ["LLMQ_CACHE"] = str(base.parent / "cache")
    import transformers

    transformers.logging.set_verbosity_error()
    with contextlib.suppress(ValueError):  # all imports are done before memory is bounded
        for number in range(3):
            opened(base, number)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    return run(kind, base, sys.argv[3] if len(sys.argv) > 3 else None, cases, opened)


if __name__ == "__main__":
    sys.exit(main(cases_of, open_all))
