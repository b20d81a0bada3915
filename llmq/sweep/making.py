"""Making the checkpoint of a row, or finding that it is there already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llmq import calibration
from llmq.checkpoint import REPORT_NAME
from llmq.config import CalibConfig, GPTQConfig, RuntimeConfig
from llmq.evaluation import to_stderr
from llmq.job import asked
from llmq.models.digest import model_digest
from llmq.models.load import open_model
from llmq.pipeline import quantize_model
from llmq.solvers import SolverOptions
from llmq.sweep.peers import MADE, MAKERS, make
from llmq.sweep.rows import Row

Log = Callable[[str], None]
REQUEST = "request.json"


@dataclass(frozen=True)
class Shared:
    """What all rows have in common: the model's folder, where checkpoints go, calibration, options, interpreters."""

    model: Path
    work: Path
    calib: CalibConfig
    gptq: GPTQConfig
    head_bits: int
    activation_bits: int
    pythons: Mapping[str, Path]


@dataclass(frozen=True)
class Made:
    """The checkpoint whose bits are counted, the folder that is scored, and what the making cost."""

    stored: Path
    scored: Path
    cost: dict[str, Any]


def make_row(row: Row, shared: Shared, log: Log) -> Made:
    """The checkpoint of ``row`` in ``shared.work``: the one that is there if it was made with the same options.

    Raises what ``quantize_model`` or ``llmq.sweep.peers.make`` raise.
    """
    folder = shared.work / row.folder
    if row.is_peer:
        return _make_peer(row, shared, folder, log)
    if not _same(folder, row, shared):
        shared.work.mkdir(parents=True, exist_ok=True)
        log(f"{row.name}: quantizing")
        apart(quantize_row, row, shared, folder)
    report = _report(folder)
    return Made(folder, folder, {"seconds": report["seconds"]["total"], "peak_bytes": report["peak_rss_bytes"]})


def apart(function: Callable[..., None], *args: Any) -> None:
    """Call ``function`` in a process of its own: its memory is gone afterwards, and its peak is that of one row."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(function, *args).result()


def quantize_row(row: Row, shared: Shared, folder: Path) -> None:
    """Quantize as ``row`` says; raises what ``quantize_model`` raises."""
    quantize_model(
        shared.model,
        row.scheme,
        output=folder,
        method=row.method,
        calib=shared.calib,
        gptq=shared.gptq,
        recipe=row.recipe,
        budget=row.budget,
        head_bits=shared.head_bits,
        overwrite=True,
        log=to_stderr,
    )


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_NAME
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _same(folder: Path, row: Row, shared: Shared) -> bool:
    """Whether the folder was made of this model as ``row`` asks."""
    report = _report(folder)
    options = SolverOptions(gptq=shared.gptq, recipe=row.recipe)
    wanted = asked(row.scheme, options, shared.calib, row.budget, shared.head_bits) | asdict(RuntimeConfig())
    model = report.get("model", {}).get("digest")
    same_options = report.get("options") == json.loads(json.dumps(wanted)) and "statistics" not in report
    return same_options and report["method"] == row.method and model == model_digest(shared.model)


def _make_peer(row: Row, shared: Shared, folder: Path, log: Log) -> Made:
    maker = MAKERS[row.method]
    request: dict[str, Any] = {
        "model": model_digest(shared.model),
        "calib": str(shared.calib),
        "scheme": str(row.scheme),
    }
    request |= {"options": maker.options}
    there = folder / REQUEST
    if not there.is_file() or json.loads(there.read_text(encoding="utf-8")) != request:
        shutil.rmtree(folder, ignore_errors=True)
        tokens = calibration.load(shared.calib, open_model(shared.model).tokenizer, log=log).tokens
        make(maker, row.scheme, shared.model, tokens, folder, shared.pythons.get(maker.module), log)
        there.write_text(json.dumps(request), encoding="utf-8")
    return Made(folder / "packed", folder / "plain", json.loads((folder / MADE).read_text(encoding="utf-8")))
