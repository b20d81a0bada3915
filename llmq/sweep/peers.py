"""MAKERS: one row a quantizer of others, made in a process of its own, in an environment of its own where asked.

A maker leaves two folders: ``packed``, the package's own files, in which bits are counted, and ``plain``, the same
weights as ordinary floats, which any interpreter can score.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmq.config import QuantScheme, one_of
from llmq.models.load import SourceModel, open_model
from llmq.solvers import rtn
from llmq.sweep import peer_script
from llmq.sweep.stored_bits import linears_of

MADE = "made.json"
# How much further than the nearest values a solver may go to make good for errors elsewhere.
MOST_OFF = 2.0
Log = Callable[[str], None]


class MakerFailed(RuntimeError):
    """A peer's package could not make its checkpoint; that row alone is left out."""


@dataclass(frozen=True)
class Maker:
    """A quantizer of others.

    Attributes:
        about: what it is, for the table.
        module: Python module it needs.
        install: the way to get it.
        function: row of ``llmq.sweep.peer_script.FUNCTIONS`` that calls it.
        options: of that function.
    """

    about: str
    module: str
    install: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)

    def missing(self, pythons: Mapping[str, Path]) -> str | None:
        """Why it cannot run in its interpreter, with the way out; None if it can."""
        python = pythons.get(self.module)
        if python is None:
            found = importlib.util.find_spec(self.module) is not None
        else:
            code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.module!r}) is None)"
            found = subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0
        where = "" if python is None else f" in {python}"
        return None if found else f"the package {self.module} is not installed{where}; {self.install}"


def parse_pythons(text: str) -> dict[str, Path]:
    """Interpreters by module from ``auto_round=/path/bin/python,...``. Raises ValueError or FileNotFoundError."""
    found = {}
    for part in filter(None, text.split(",")):
        module, equals, path = part.partition("=")
        if not equals:
            raise ValueError(f"--peer-python: {part!r} is not of the form MODULE=PATH")
        one_of("a module of --peer-python", module, dict.fromkeys(m.module for m in MAKERS.values()))
        if not Path(path).is_file():
            raise FileNotFoundError(f"--peer-python: there is no interpreter {path}")
        found[module] = Path(path).absolute()
    return found


def make(
    maker: Maker, scheme: QuantScheme, model: Path, tokens: Tensor, out: Path, python: Path | None, log: Log
) -> dict[str, Any]:
    """Let ``maker`` quantize the folder ``model`` into the new folder ``out``; returns seconds and peak bytes.

    Args:
        tokens: i64[n, seqlen] calibration windows.
        python: the interpreter that has the package; None: this one.

    Raises:
        MakerFailed: with the package's last words, or the linear that it did not round to the scheme.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        save_file({"tokens": tokens.contiguous()}, partial / "tokens.safetensors")
        job = {
            "function": maker.function,
            "options": maker.options,
            "model": str(model.absolute()),
            "folder": str(partial),
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.sym,
        }
        (partial / "job.json").write_text(json.dumps(job), encoding="utf-8")
        log(f"{maker.about}: {scheme}, {tokens.shape[0]} windows of {tokens.shape[1]} tokens")
        command = [str(python or sys.executable), str(Path(peer_script.__file__).absolute()), str(partial / "job.json")]
        # There, so that what a package leaves in the current folder goes with the rest.
        run = subprocess.run(command, cwd=partial, capture_output=True, text=True, errors="replace", check=False)
        if run.returncode or not (partial / MADE).is_file():
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise MakerFailed(f"{maker.about} ended with code {run.returncode}: {last[:300]}")
        check_rounded(partial / "plain", open_model(model), scheme)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    made: dict[str, Any] = json.loads((out / MADE).read_text(encoding="utf-8"))
    return made


def check_rounded(folder: Path, source: SourceModel, scheme: QuantScheme, rows: int = 64) -> None:
    """Raise MakerFailed unless the first ``rows`` rows of every linear are those of ``source``, rounded to ``scheme``.

    That is: at most 2**bits values in each group, and no further from the original than a solver's choice explains.

    Args:
        folder: the plain weights.
        source: the original model, for the names of its linears.
    """
    reader = open_model(folder).reader
    for name, (_, k) in linears_of(source).items():
        W, original = (r.tensor(f"{name}.weight")[:rows].float() for r in (reader, source.reader))
        off, nearest = ((x - original).norm() for x in (W, rtn.solve(original, scheme).dequantize()))
        if not off <= MOST_OFF * nearest:
            raise MakerFailed(
                f"{name}: what came back is {off / nearest:.1f} times as far from the original as weights rounded to "
                f"nearest in {scheme}, more than {MOST_OFF:g}: it was read wrongly, or is of another model"
            )
        for group in scheme.slices(k):
            ordered = W[:, group].sort(dim=1).values
            most = 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max())
            if most > scheme.levels:
                raise MakerFailed(
                    f"{name}: a group holds {most} values, {scheme} has {scheme.levels}; it is not quantized"
                )


INSTALL_AUTOROUND = "pip install auto-round, best in a new environment given with --peer-python auto_round=PYTHON"
INSTALL_GPTQMODEL = "pip install gptqmodel, best in a new environment given with --peer-python gptqmodel=PYTHON"
INSTALL_LLMC = "pip install llmcompressor, best in a new environment given with --peer-python llmcompressor=PYTHON"
MAKERS: dict[str, Maker] = {
    "autoround-50": Maker("AutoRound, 50 iterations", "auto_round", INSTALL_AUTOROUND, "autoround", {"iters": 50}),
    "autoround-200": Maker("AutoRound, 200 iterations", "auto_round", INSTALL_AUTOROUND, "autoround", {"iters": 200}),
    "gptqmodel": Maker("GPTQModel, GPTQ in fp32", "gptqmodel", INSTALL_GPTQMODEL, "gptqmodel"),
    "llm-compressor": Maker(
        "llm-compressor, GPTQ; scales as wide as the original weights", "llmcompressor", INSTALL_LLMC, "llmcompressor"
    ),
}
