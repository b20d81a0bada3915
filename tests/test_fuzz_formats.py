"""Damaged files of every format give clear errors in bounded memory; the mutations are those of fuzz_formats.py."""

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

SCRIPT = Path(__file__).parent / "fuzz_formats.py"
FORMATS = ("llmq", "gptq", "awq", "compressed-tensors", "mlx", "gguf")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded as Linux does it")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_clear_errors(kind: str, original: Path, tmp_path: Path) -> None:  # noqa: F811
    native(original, tmp_path / "native", QuantScheme(4, 32, sym=kind == "gguf"))
    base = tmp_path / ("base.gguf" if kind == "gguf" else "base")
    vocabulary = write_gguf(tmp_path / "v.gguf")[0] if kind == "gguf" else None
    convert(tmp_path / "native", base, kind, vocabulary=vocabulary)
    if kind != "gguf":
        shard = next(base.glob("*.safetensors"))
        shard.rename(base / "model.safetensors")
        (base / "model.safetensors.index.json").unlink()
    root = str(Path(__file__).resolve().parent.parent)
    # Every third of a thousand mutations a format: all take minutes (FUZZ_EVERY=1).
    env = {"FUZZ_EVERY": "3", **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, str(SCRIPT), kind, str(base)], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"crashed after {lines[-1:]}: {done.stderr[-2000:]}"
    assert lines[-1].startswith("tried ")
    assert int(lines[-1].split()[1]) > 200 // int(env["FUZZ_EVERY"])
    assert lines[:-1] == []
