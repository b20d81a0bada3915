"""Damaged files of every format give clear errors in bounded memory; the mutations are those of fuzz_formats.py
and, for folders as users open them, fuzz_folders.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_conversion import native
from test_dialects import original  # noqa: F401
from test_gguf import write_gguf

from llmq.config import QuantScheme
from llmq.conversion import convert

FORMATS = ("llmq", "gptq", "awq", "compressed-tensors", "mlx", "gguf")


def fuzzed(script: str, kind: str, base: Path, every: int) -> tuple[int, list[str]]:
    """How many cases were tried, and the lines of those that went wrong, of every ``every``-th mutation."""
    root = str(Path(__file__).resolve().parent.parent)
    env = {"FUZZ_EVERY": str(every), **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).parent / script), kind, str(base)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"crashed after {lines[-1:]}: {done.stderr[-2000:]}"
    assert lines[-1].startswith("tried ")
    return int(lines[-1].split()[1]) * int(env["FUZZ_EVERY"]), lines[:-1]


def written(kind: str, original: Path, folder: Path) -> Path:  # noqa: F811
    native(original, folder / "native", QuantScheme(4, 32, sym=kind == "gguf"))
    base = folder / ("base.gguf" if kind == "gguf" else "base")
    vocabulary = write_gguf(folder / "v.gguf")[0] if kind == "gguf" else None
    return convert(folder / "native", base, kind, vocabulary=vocabulary)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded as Linux does it")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_clear_errors(kind: str, original: Path, tmp_path: Path) -> None:  # noqa: F811
    base = written(kind, original, tmp_path)
    if kind != "gguf":
        shard = next(base.glob("*.safetensors"))
        shard.rename(base / "model.safetensors")
        (base / "model.safetensors.index.json").unlink()
    # Every third of a thousand mutations a format: all take minutes (FUZZ_EVERY=1).
    tried, wrong = fuzzed("fuzz_formats.py", kind, base, 3)
    assert tried > 200
    assert wrong == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded as Linux does it")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_folders_open_or_are_clear_errors(kind: str, original: Path, tmp_path: Path) -> None:  # noqa: F811
    tried, wrong = fuzzed("fuzz_folders.py", kind, written(kind, original, tmp_path), 5)
    assert tried > 500
    assert wrong == []
