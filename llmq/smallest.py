"""The smallest model whose measured KL from the original stays under a target: ``--max-kl``.

Each try is a whole run at some bits a weight, measured as users will run it, on windows that no step has seen. Which
bits to try next is read off the tries so far: log KL falls nearly linearly with the bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.allocate import Choices, choices_of
from llmq.calibration import CalibrationSet
from llmq.calibration.windows import digest
from llmq.checkpoint import REPORT_NAME, CheckpointWriter, check_output, replace_folder, write_json
from llmq.job import Job, calibration_texts
from llmq.likelihood import score
from llmq.memory import release_memory
from llmq.plan import Plan
from llmq.report import duration
from llmq.score import Estimate

# Whole runs at most, and the bits a weight between a try that kept the target and one that did not at which it ends.
RUNS = 7
CLOSE = 0.05
# KL falls by about this much a bit, in its logarithm: half the step is a quarter of the squared error.
SLOPE = math.log(4)
FIRST_BITS = 4.0
# Tokens that are held out to measure on, but no more windows than half of those that are calibrated on.
MEASURED_TOKENS = 8192


@dataclass
class Search:
    """Bits a weight to try next, from what was tried.

    Attributes:
        target: KL to stay under, nats a token.
        low, high: bits a weight of the smallest and the largest candidates.
        tried: (bits a weight, KL), in order.
    """

    target: float
    low: float
    high: float
    tried: list[tuple[float, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, float] | None:
        """The smallest try that kept the target."""
        return min((t for t in self.tried if t[1] <= self.target), default=None)

    @property
    def failed(self) -> tuple[float, float] | None:
        """The largest try that did not, of those below the best."""
        limit = self.best[0] if self.best else math.inf
        return max((t for t in self.tried if t[1] > self.target and t[0] < limit), default=None)

    def next(self) -> float | None:
        """Bits a weight of the next try; None when the answer is close enough or ``RUNS`` are done.

        Raises ValueError if even the largest candidates do not keep the target; names both numbers.
        """
        best, failed = self.best, self.failed
        if failed is not None and failed[0] >= self.high:
            raise ValueError(
                f"--max-kl {self.target:g} cannot be met: with {failed[0]:.2f} bits a weight, the most there is, the "
                f"KL measured on held-out text is {failed[1]:.4f}; ask for more, or use --head-bits 16"
            )
        if len(self.tried) >= RUNS or (best is not None and best[0] <= self.low):
            return None
        if best is not None and failed is not None:
            return None if best[0] - failed[0] <= CLOSE else self._between(failed, best)
        if best is not None or failed is not None:
            at, kl = best or failed or (0.0, 0.0)
            step = math.log(max(kl, 1e-9) / self.target) / self._slope()
            # Beyond the point where the target should lie, so that it is between two tries.
            step += math.copysign(CLOSE / 2 + 0.1 * abs(step), step or -1.0)
            return min(max(at + step, self.low), self.high)
        return min(max(FIRST_BITS, self.low), self.high)

    def _slope(self) -> float:
        """Fall of log KL a bit between the last two tries, within what is plausible; SLOPE after one."""
        if len(self.tried) < 2:
            return SLOPE
        (a, kl_a), (b, kl_b) = self.tried[-2:]
        fall = (math.log(max(kl_a, 1e-9)) - math.log(max(kl_b, 1e-9))) / (b - a) if a != b else SLOPE
        return min(max(fall, SLOPE / 4), 2 * SLOPE)

    def _between(self, failed: tuple[float, float], best: tuple[float, float]) -> float:
        """Where a line through the logarithms meets the target, a little on the side that keeps it."""
        (a, kl_a), (b, kl_b) = failed, best
        slope = (math.log(kl_a) - math.log(max(kl_b, 1e-9))) / (b - a)
        at = a + (math.log(kl_a) - math.log(self.target)) / slope + CLOSE / 4
        return min(max(at, a + 0.15 * (b - a)), b - 0.15 * (b - a))


def held_out(texts: CalibrationSet, count: int) -> tuple[CalibrationSet, Tensor]:
    """The texts without their last ``count`` windows, and these. Raises ValueError if too few are left."""
    n, seqlen = texts.tokens.shape
    if n < 2 * count:
        raise ValueError(
            f"--max-kl holds out {count} windows of {seqlen} tokens to measure on, and the text gives {n} in all; "
            f"give a text of at least {2 * count * seqlen} tokens"
        )
    tokens = texts.tokens[:-count]
    kept = dataclasses.replace(texts, tokens=tokens, tokens_kept=tokens.numel(), sha256=digest(tokens))
    return kept, texts.tokens[-count:]


Run = Callable[[Job, CheckpointWriter, CalibrationSet, dict[str, str], dict[str, float]], Any]


def smallest_model(
    job: Job, folder: Path, named: dict[str, str], *, overwrite: bool, run: Run
) -> tuple[dict[str, Any], Plan]:
    """Find the smallest model that keeps ``job.budget.max_kl``, publish it as ``folder``; returns its report and plan.

    Args:
        job: what is asked for; its schemes are chosen anew for each try.
        named: model, family, method and origin, for reports.
        run: quantizes as a job says into a writer, which it publishes.

    Raises:
        ValueError: the target cannot be met, or there is too little text; nothing is written then.
    """
    start = time.perf_counter()
    texts, windows = _texts(job)
    choices = choices_of(job.source, job.plan.linears, (), job.scheme, texts, job.options, job.log)
    weights = sum(m.weights for m in job.plan.linears)
    low, high = (8 * sum(f(s) for s in choices.sizes) / weights for f in (min, max))
    search = Search(job.budget.max_kl, low, high)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tries-", dir=folder.parent))
    kept: tuple[Path, Plan] | None = None
    try:
        while (bits := search.next()) is not None:
            number = len(search.tried) + 1
            trial = _trial(job, choices, round(bits * weights / 8))
            out = scratch / str(number) / folder.name  # the folder's own name, which its card says
            job.log(f"try {number} of at most {RUNS}: {trial.plan.bits_per_weight:.3f} bits a weight")
            with CheckpointWriter(out, len(job.source.block_names) + 1, overwrite=False) as writer:
                run(trial, writer, texts, named, {"calibration": 0.0})
            release_memory()
            kl = measured_kl(out, job.source.folder, windows)
            search.tried.append((bits, kl.mean))
            job.log(
                f"try {number}: KL {kl.mean:.4f} ± {kl.se:.4f} on {windows.numel()} held-out tokens, "
                f"{'keeps' if kl.mean <= search.target else 'above'} {search.target:g}; "
                f"{duration(time.perf_counter() - start)} so far"
            )
            losing = out
            if search.best == search.tried[-1]:
                losing, kept = (kept[0] if kept else scratch / "none"), (out, trial.plan)
            shutil.rmtree(losing, ignore_errors=True)
        if kept is None:
            raise _not_found(search)
        report = _finish(kept[0], search, windows)
        check_output(folder, overwrite=overwrite, source=job.source.folder)
        replace_folder(kept[0], folder)
        return report, kept[1]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _texts(job: Job) -> tuple[CalibrationSet, Tensor]:
    """Calibration windows as many as were asked for, and windows held out to measure on."""
    calib = job.calib
    count = min(-(-MEASURED_TOKENS // calib.seqlen), max(2, calib.nsamples // 2))
    more = dataclasses.replace(job, calib=dataclasses.replace(calib, nsamples=calib.nsamples + count))
    loaded = calibration_texts(more)
    assert loaded is not None, "checked: a target needs text"
    return held_out(loaded, count)


def _trial(job: Job, choices: Choices, nbytes: int) -> Job:
    """A job of its own with the best schemes in ``nbytes``; it says only how its blocks go."""

    def log(line: str) -> None:
        if line.startswith("  block"):
            job.log(line)

    trial = Job(job.source, job.scheme, job.head_bits, job.method, job.options, job.calib, job.runtime, log, job.budget)
    chosen = choices.within(nbytes)
    trial.use(chosen.schemes)
    trial.divergence, trial.kv = chosen.divergence, job.kv
    return trial


def _not_found(search: Search) -> ValueError:
    tries = ", ".join(f"{kl:.4f} at {bits:.2f}" for bits, kl in search.tried)
    return ValueError(
        f"--max-kl {search.target:g} was not met in {len(search.tried)} runs: KL {tries} bits a weight; ask for more"
    )


def _finish(folder: Path, search: Search, windows: Tensor) -> dict[str, Any]:
    """Add the tries to the report in ``folder``; returns it."""
    report: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    assert search.best is not None
    report["max_kl"] = {
        "target": search.target,
        "measured": search.best[1],
        "held_out_tokens": windows.numel(),
        "tries": [{"bits_per_weight_asked": bits, "kl": kl} for bits, kl in search.tried],
    }
    write_json(folder / REPORT_NAME, report)
    return report


def measured_kl(folder: Path, original: Path, windows: Tensor) -> Estimate:
    """KL(original || model), nats a token, of the published ``folder`` as users run it, on windows i64[W, seqlen]."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "local_files_only": True}
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path, **options) for path in (folder, original)]
    found = score(models[0], windows, reference=models[1]).kl
    del models
    release_memory()
    assert found is not None
    return found
