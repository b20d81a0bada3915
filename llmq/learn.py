"""What a run learns by gradients, for ``--max-time`` at most: rounding, block by block, and the scales of the whole."""

from __future__ import annotations

import time
from typing import cast

import torch
from torch import nn

from llmq.blockwise import BlockRunner
from llmq.calibration import CalibrationSet
from llmq.calibration.windows import pieces_of
from llmq.checkpoint import CheckpointWriter, matrix_tensors
from llmq.config import LEARNED_STEPS
from llmq.job import Job, Probe
from llmq.memory import current_rss
from llmq.qtensor import QTensor
from llmq.report import duration, size
from llmq.rounding import MOST_BITS, Windows, learn_rounding
from llmq.tune import PIECE, tune

# Share of the time that rounding may take where the whole model is tuned afterwards.
ROUNDING_SHARE = 0.5


def learns(job: Job, step: str) -> bool:
    """Whether this run takes one of LEARNED_STEPS: it was asked for, and there is something for it to learn."""
    asked = step in job.steps
    return asked and (step != "rounding" or any(m.scheme.bits <= MOST_BITS for m in job.plan.linears))


def check(job: Job) -> None:
    """Raise ValueError when something is to be learned and no window could judge it."""
    asked = [step for step in LEARNED_STEPS if learns(job, step)]
    if asked and job.calib.nsamples < 2:
        raise ValueError(
            f"{' and '.join(asked)} must prove itself on held-out windows, and nsamples is {job.calib.nsamples}; "
            "use 2 or more, or --preset balanced"
        )


def _why_not(job: Job) -> str:
    return "--max-time is used up" if job.n_held else "the text is one window, and none can be held out"


def rounding(
    job: Job,
    name: str,
    runner: BlockRunner,
    teacher: BlockRunner,
    solved: dict[str, QTensor],
) -> dict[str, QTensor]:
    """Learn the rounding of a block and put the weights in place; the linears that changed, by local name.

    Args:
        job: the run; the report gets a line.
        name: of the block.
        runner: of the solved block, not yet advanced.
        teacher: of the original block, advanced.
        solved: the linears by local name.
    """
    low = {
        local: (qtensor, cast(nn.Linear, teacher.block.get_submodule(local)).weight.detach())
        for local, qtensor in solved.items()
        if qtensor.scheme.bits <= MOST_BITS
    }
    recipe, names = job.options.recipe, job.source.block_names
    share = ROUNDING_SHARE if "tune" in recipe.steps else 1.0
    left = (60 * recipe.max_time * share - job.learning_seconds) / (len(names) - names.index(name))
    if not low:
        return {}
    if left <= 0 or not job.n_held:
        job.learned.setdefault("rounding", []).append({"block": name, "left_out": _why_not(job)})
        return {}
    began = time.perf_counter()
    windows = Windows(runner.hidden, teacher.hidden, job.n_held)
    better, report = learn_rounding(name, runner.block, runner.call, windows, low, seed=job.calib.seed, seconds=left)
    for local, qtensor in better.items():
        cast(nn.Linear, runner.block.get_submodule(local)).weight.data.copy_(qtensor.dequantize())
    if better:
        runner.forget()
    job.learned.setdefault("rounding", []).append(report)
    job.learning_seconds += time.perf_counter() - began
    job.log(
        f"  rounding: held-out error of the block {100 * report['loss_before']:.3f} % -> "
        f"{100 * report['loss_after']:.3f} %  {report['iterations']} steps  "
        f"{duration(report['seconds'])}  memory {size(current_rss())}"
    )
    return better


def tuning(job: Job, writer: CheckpointWriter, texts: CalibrationSet, probe: Probe) -> Probe:
    """Tune all blocks in the writer's shards; report and digests follow.

    Returns:
        ``probe`` as the tuned blocks give it.
    """
    seconds = 60 * job.options.recipe.max_time - job.learning_seconds
    if seconds <= 0 or not job.n_held:
        job.log(f"tuning: left out, {_why_not(job)}")
        job.learned["tune"] = [{"left_out": _why_not(job)}]
        return probe
    taught, judging = texts.tokens[: -job.n_held], texts.tokens[-job.n_held :]
    taught = torch.cat([taught, texts.more]) if len(texts.more) else taught
    train, held = (pieces_of(t, PIECE, bos=texts.bos) for t in (taught, judging))
    tuned = tune(job.source, writer, job.plan.linears, train, held, seed=job.calib.seed, seconds=seconds, log=job.log)
    job.learned["tune"] = [tuned.report]
    job.learning_seconds += tuned.report["seconds"]
    stored = {name: matrix_tensors(q) for name, q in tuned.matrices.items()}
    changed = {f"{name}.{key}": t for name, tensors in stored.items() for key, t in tensors.items()}
    writer.replace(changed | tuned.vectors)
    job.digests |= {name: q.digest() for name, q in tuned.matrices.items()}
    return Probe(probe.ids, probe.entering, tuned.leaving[:, : probe.ids.shape[1]]) if stored else probe
