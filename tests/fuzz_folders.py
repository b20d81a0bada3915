"""Damaged folders and GGUF files of every format, opened as users open them; run by test_fuzz_formats.py.

    python fuzz_folders.py FORMAT FOLDER [LABEL]

As fuzz_formats.py, from which some of its mutations come: what is opened is a whole folder, with its index, its shards,
the copies of its config and what llmq keeps beside it; one to three files are damaged at once. It is opened by
``llmq.AutoModelForCausalLM``, or transformers' class after ``llmq.patch_transformers()``, and one token is computed, or
by ``llmq.convert``. Each must end in a clear error or a model.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz_formats import NAME, VALUES, Case, config_cases, flips, gguf_cases, leaves, main, read_header, write_header

INDEX = "model.safetensors.index.json"
PACKED = ".llmq-packed"
SLOW = ("(a+)+b", "(([a-z_.0-9]+)+)+#", "(.*)*" * 20 + "#", "(" * 3000, "a{99999999999}", ".*" * 9999, r"(a)\1")
SHARDS = [None, 3, [], "", "..", "../x.safetensors", "/etc/passwd", "gone.safetensors", "config.json", "x" * 200]


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A JSON file of the folder after ``change``, which may return another value to write."""

    def apply(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text()) if path.is_file() else {}
        result = change(value)
        path.write_text(json.dumps(value if result is None else result))

    return apply


def at(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(inner: Any) -> None:
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[path[-1]] = value

    return change


def index_cases(folder: Path) -> Iterator[Case]:
    names = list(json.loads((folder / INDEX).read_text())["weight_map"])
    for value in VALUES:
        yield f"index {value}", changed(INDEX, lambda _, v=value: v if v is not None else [])
        yield f"weight_map {value}", changed(INDEX, at(("weight_map",), value))
        yield f"metadata {value}", changed(INDEX, at(("metadata",), value))
    for value in SHARDS:
        yield f"shard {str(value)[:20]}", changed(INDEX, at(("weight_map", names[0]), value))
        yield f"tensor {str(value)[:20]}", changed(INDEX, at(("weight_map", f"x{value}"), value))
    for name in names[:: max(1, len(names) // 8)]:
        yield f"{name} not in the index", changed(INDEX, lambda v, n=name: v["weight_map"].pop(n) and None)
    yield "no index", lambda f: (f / INDEX).unlink()
    yield "no shards", lambda f: [p.unlink() for p in f.glob("*.safetensors")] and None
    yield "shard is a folder", folder_for_shard
    for pattern in ("*.safetensors", PACKED, INDEX, "config.json", "generation_config.json"):
        yield f"{pattern} is a pipe", pipe_for(pattern)
    yield "shard is a loop", loop_for_shard


def folder_for_shard(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    shard.mkdir()


def pipe_for(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            path.unlink()
            os.mkfifo(path)

    return change


def loop_for_shard(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(shard.name)


def pattern_cases(kind: str) -> Iterator[Case]:
    """Expressions that take long, or are none, wherever a config has some."""
    for slow in SLOW:
        block: dict[str, Any] = {
            "gptq": {"dynamic": {f"+:{slow}": {"bits": 8}, f"-:{slow}": {}}},
            "awq": {"modules_to_not_convert": [slow]},
            "compressed-tensors": {"ignore": [f"re:{slow}"], "config_groups": {"a": {"targets": [f"re:{slow}"]}}},
        }.get(kind, {"modules_to_not_convert": [slow], "ignore": [f"re:{slow}"]})
        for key, value in block.items():
            yield f"pattern {slow[:20]} in {key}", changed("config.json", at(("quantization_config", key), value))


def header_case(rng: random.Random) -> Callable[[Path], None]:
    """One field of one tensor, or one byte, of the header of a shard."""
    value, key = rng.choice(VALUES), rng.choice(("shape", "data_offsets", "dtype"))
    which, edit = rng.random(), flips(rng, 2000)

    def change(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0]
        header, body = read_header(shard)
        name = list(header)[int(which * len(header))]
        header[name] = {**header[name], key: value} if isinstance(header[name], dict) else value
        write_header(shard, json.dumps(header), body)

    def flip(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        edit(data)
        shard.write_bytes(data)

    return rng.choice((change, flip))


def packed_cases(folder: Path, rng: random.Random) -> Iterator[Case]:
    """What llmq keeps of an earlier load: its first line as it was, or changed under the same origin."""
    if not (folder / PACKED).is_file():
        return
    head = json.loads((folder / PACKED).read_bytes().split(b"\n")[0])
    name = next(iter(head["places"]))
    for path in (("places",), ("places", name), ("start",), ("nbytes",), ("origin",)):
        for value in (*VALUES, [0, 1 << 40], [-64, 64], [0, 1], [1 << 62, 8]):
            yield f"packed {'/'.join(path)} {value}", packed_head(path, value)
    for i in range(20):
        edit = flips(rng, 4096 + 4096 * (i % 2))

        def change(folder: Path, edit: Any = edit) -> None:
            data = bytearray((folder / PACKED).read_bytes())
            edit(data)
            (folder / PACKED).write_bytes(data)

        yield f"packed flip {i}", change


def packed_head(path: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        line, rest = (folder / PACKED).read_bytes().split(b"\n", 1)
        head = json.loads(line)
        at(path, value)(head)
        (folder / PACKED).write_bytes(json.dumps(head).ljust(len(line)).encode() + b"\n" + rest)

    return change


def some_at_once(folder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Two or three random damages together."""
    config = list(config_cases(folder))
    files = ["config.json", "generation_config.json", "quantize_config.json", "quant_config.json"]
    paths = {f: list(leaves(json.loads((folder / f).read_text()))) for f in files if (folder / f).is_file()}
    for i in range(count):
        chosen = []
        for _ in range(rng.choice((1, 2, 2, 3))):
            file = rng.choice(list(paths))
            field = changed(file, at(rng.choice(paths[file]), rng.choice(VALUES)))
            chosen.append(rng.choice((rng.choice(config)[1], header_case(rng), field)))

        def change(folder: Path, chosen: list[Any] = chosen) -> None:
            for one in chosen:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged already
                    one(folder)

        yield f"together {i}", change


def cases(kind: str, base: Path, rng: random.Random) -> Iterator[Case]:
    if kind == "gguf":
        yield from gguf_cases(base, rng)
        return
    yield from index_cases(base)
    yield from pattern_cases(kind)
    yield from packed_cases(base, rng)
    yield from config_cases(base)
    yield from some_at_once(base, rng, 300)


def claims_many_layers(path: Path) -> bool:
    try:
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        return int(layers) > 1000
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False


def open_publicly(path: Path, number: int) -> None:
    """As a user does: by the command, by transformers' class, and by ours, in turn."""
    import transformers

    import llmq
    from llmq import convert

    llmq.patch_transformers()
    if number % 3 == 0:
        out, errors = path.parent / "out", io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = convert.main([str(path), str(out), "--format", "llmq", "--overwrite"])
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        if code == 2 and lines:
            raise ValueError(lines[-1])
        assert code == 0, errors.getvalue()
        return
    # Neither of these does transformers' class take; it reads from pipes, and makes as many layers as a config says.
    endless = any(p.is_fifo() for p in path.glob("*")) or claims_many_layers(path)
    patched = number % 3 == 1 and sys.argv[1] not in ("mlx", "gguf") and not endless
    auto = transformers.AutoModelForCausalLM if patched else llmq.AutoModelForCausalLM
    try:
        model = auto.from_pretrained(path)
        try:
            with torch.no_grad():
                model(torch.tensor([[1]]))
        except ValueError as error:  # a model that is open no longer knows its file
            raise ValueError(f"{NAME}: {error}") from error
    except Exception as error:
        if patched and "memory" not in str(error):  # what transformers says of a config is its own affair
            raise ValueError(NAME) from error
        raise


if __name__ == "__main__":
    sys.exit(main(cases, open_publicly))
