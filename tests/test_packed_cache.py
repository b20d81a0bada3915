"""The packed weights beside a checkpoint: used when they fit, made again when they do not, never trusted blindly."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import core  # noqa: F401 - skips without the compiled module

from llmq import AutoModelForCausalLM, CalibConfig, QuantScheme, kernels, quantize_model
from llmq.runtime import packed_cache
from llmq.runtime.packed_cache import NAME
from llmq.runtime.qlinear import QuantizedMatrix


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    return quantize_model(tiny_model("gemma3"), QuantScheme(3, 32), method="rtn", output=out, calib=calib).folder


@pytest.fixture
def folder(quantized: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(quantized, copy, ignore=shutil.ignore_patterns(NAME))
    return copy


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def digests(model: Any) -> dict[str, str]:
    return {n: m.qtensor().digest() for n, m in model.named_modules() if isinstance(m, QuantizedMatrix)}


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every matrix that gets packed from now on."""
    packed: list[object] = []
    real = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda t: packed.append(t) or real(t))
    return packed


def test_a_second_load_packs_nothing_and_gives_the_same_model(folder: Path, packs: list[object]) -> None:
    first = load(folder)
    made = len(packs)
    assert made == len(digests(first)) > 0
    second = load(folder)
    assert len(packs) == made
    assert digests(second) == digests(first)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    assert set(second.state_dict()) == set(first.state_dict())
    head = json.loads((folder / NAME).read_bytes().split(b"\n", 1)[0])
    assert head["start"] % 4096 == 0
    assert all(start % 64 == 0 for start, _ in head["places"].values())


def test_a_saved_copy_of_a_mapped_model_is_whole(folder: Path, tmp_path: Path) -> None:
    load(folder)
    mapped = load(folder)
    mapped.save_pretrained(tmp_path / "again")
    assert digests(load(tmp_path / "again")) == digests(mapped)


# What a folder from elsewhere may say of the place of a matrix.
LIES: dict[str, Any] = {
    "no place": None,
    "place of one number": [0],
    "place of words": ["a", "b"],
    "place before the file": [-4096, 64],
    "place behind the file": [1 << 40, 64],
    "place of few bytes": [0, 64],
    "place of all bytes": [0, 1 << 62],
}


@pytest.mark.parametrize("damage", ["touched shard", "cut", "no json", "empty", "other layout", "other scheme", *LIES])
def test_a_cache_that_does_not_fit_is_replaced(folder: Path, packs: list[object], damage: str) -> None:
    expected = digests(load(folder))
    file = folder / NAME
    content = file.read_bytes()
    if damage == "touched shard":
        shard = next(folder.glob("*.safetensors"))
        os.utime(shard, (1, 1))
    else:
        line, rest = content.split(b"\n", 1)
        told = json.loads(line)
        told["places"].update({next(iter(told["places"])): LIES.get(damage)})
        changed = {
            **dict.fromkeys(LIES, json.dumps(told).ljust(len(line)).encode() + b"\n" + rest),
            "cut": content[:-64],
            "no json": b"x" + content,
            "empty": b"",
            "other layout": content.replace(b'"layout": ', b'"layout":9', 1),
            "other scheme": content.replace(b"w3g32", b"w4g32", 1),
        }[damage]
        file.write_bytes(changed)
    before = len(packs)
    assert digests(load(folder)) == expected
    assert len(packs) == before + len(expected)
    assert file.stat().st_size == len(content)


def test_damage_inside_a_matrix_header_is_an_error_not_a_crash(folder: Path) -> None:
    load(folder)
    file = folder / NAME
    content = bytearray(file.read_bytes())
    start = json.loads(content.split(b"\n", 1)[0])["start"]
    content[start : start + 4] = b"none"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not start with 'LQ16'"):
        digests(load(folder))


def test_a_folder_that_cannot_be_written_uses_the_cache_folder(
    folder: Path, packs: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    real = packed_cache._write
    refused: list[Path] = []

    def write(path: Path, *rest: Any) -> None:
        if path.parent == folder:
            refused.append(path)
            raise PermissionError(path)
        real(path, *rest)

    monkeypatch.setattr(packed_cache, "_write", write)
    expected = digests(load(folder))
    assert refused
    made = len(packs)
    assert digests(load(folder)) == expected
    assert len(packs) == made
    assert not (folder / NAME).exists()


def test_nothing_is_left_of_a_write_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    load(folder)  # works without the cache
    assert not list(folder.glob(NAME + "*"))


def test_the_reference_neither_reads_nor_writes_it(folder: Path) -> None:
    with kernels.use_isa("reference"):
        load(folder)
    assert not (folder / NAME).exists()


def test_others_may_read_it(folder: Path) -> None:
    load(folder)
    assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o644
