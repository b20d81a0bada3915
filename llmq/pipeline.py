"""quantize_model: from a model's name to a checkpoint folder, one decoder block in memory at a time."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import calibration, kernels, learn
from llmq.allocate import budget_bytes, check_size, choices_of
from llmq.blockwise import BlockCall, BlockRunner, Observed, Tail, Weights, block_inputs, verified_tails
from llmq.checkpoint import CheckpointWriter, check_output, matrix_tensors, quantization_config
from llmq.config import (
    HEAD_BITS,
    AWQConfig,
    BudgetConfig,
    CalibConfig,
    GPTQConfig,
    QuantScheme,
    RecipeConfig,
    RuntimeConfig,
    StatsConfig,
    one_of,
)
from llmq.importance import token_weights
from llmq.job import Job, Probe, calibration_texts
from llmq.memory import peak_rss, release_memory
from llmq.models.digest import model_digest
from llmq.models.load import materialize
from llmq.plan import kept_dtype
from llmq.qtensor import QTensor
from llmq.report import (
    Log,
    block_line,
    build_report,
    model_card,
    plan_table,
    silent,
    summary,
    versions,
)
from llmq.request import check_method, default_output, open_job
from llmq.smallest import smallest_model
from llmq.solvers import SOLVERS, Problem, SolverOptions, rtn
from llmq.solvers.awq import transform_block
from llmq.solvers.hessian import InputStats, relative_error
from llmq.stats_bank import collect
from llmq.tables import outside_blocks
from llmq.verify import check_folder

DEVICES = ("cpu",)


@dataclass(frozen=True)
class QuantizationResult:
    """The published folder, its report (as in llmq_report.json) and the summary that was printed."""

    folder: Path
    report: dict[str, Any]
    summary: str


def quantize_model(
    model: str | Path,
    scheme: QuantScheme | None = None,
    *,
    output: str | Path | None = None,
    method: str = "gptq",
    calib: CalibConfig | None = None,
    gptq: GPTQConfig | None = None,
    awq: AWQConfig | None = None,
    recipe: RecipeConfig | None = None,
    budget: BudgetConfig | None = None,
    runtime: RuntimeConfig | None = None,
    stats: StatsConfig | None = None,
    head_bits: int = 8,
    overwrite: bool = False,
    device: str = "cpu",
    log: Log | None = None,
) -> QuantizationResult:
    """Quantize a causal language model and write it as a folder that transformers opens after ``import llmq``.

    Args:
        model: a local folder, a ``.gguf`` file, an alias or a hub id, tried in this order.
        scheme: bits, group size and symmetry of the decoder's linears; 4 bits in groups of 128 by default.
        output: folder to write; default: the model's name and the scheme, in the current folder.
        method: a row of ``llmq.solvers.METHODS``.
        calib: calibration text; default: what works without a network.
        gptq, awq: options of the solvers.
        recipe: what is done around GPTQ to lose less.
        budget: schemes by module, for a size or from a file.
        runtime: what the folder asks of whoever runs it, such as the bits of the key/value cache.
        stats: statistics of the original model to start from, or where to keep them.
        head_bits: bits of token embedding and head: 16, 8 or 4.
        overwrite: replace ``output`` if it is a model folder.
        device: where to compute; ``cpu``.
        log: gets each line of progress; default: none.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: anything that is wrong with the request, before the long work.
        OSError: the disk filled up; nothing is left behind.
    """
    scheme, calib, log = scheme or QuantScheme(), calib or CalibConfig(), log or silent
    budget, stats = budget or BudgetConfig(), stats or StatsConfig()
    options = SolverOptions(gptq or GPTQConfig(), awq or AWQConfig(), recipe or RecipeConfig())
    check_method(method, budget, stats)
    one_of("head_bits", head_bits, HEAD_BITS)
    one_of("device", device, DEVICES)
    kernels.current_isa()  # the check at the end runs on the kernels: a wrong LLMQ_ISA must not wait for it
    start = time.perf_counter()
    job, named = open_job(
        str(model), method, scheme, head_bits, options, calib, budget, stats, runtime or RuntimeConfig(), log
    )
    source, folder = job.source, Path(output or default_output(str(model), scheme, budget))
    size = job.plan.bytes_after
    check_output(folder.absolute(), overwrite=overwrite, expected_bytes=size, source=source.folder)
    table = {k: v for k, v in named.items() if k != "origin"} | {"calibration": job.describe_text()}
    log(plan_table(job.plan, **table, output=folder))
    job.choose_kv()
    if budget.max_kl:
        report, plan = smallest_model(job, folder, named, overwrite=overwrite, run=_run)
        log(summary(folder.absolute(), plan, report))
        return QuantizationResult(folder.absolute(), report, summary(folder.absolute(), plan, report))
    with CheckpointWriter(folder, len(source.block_names) + 1, overwrite=overwrite, expected_bytes=size) as writer:
        texts = calibration_texts(job)
        seconds = {"calibration": round(time.perf_counter() - start, 2)}
        if stats.save_stats and texts is not None:
            collect(source, texts, Path(stats.save_stats), options.gptq.sink_share, log)
            seconds["statistics"] = round(time.perf_counter() - start - seconds["calibration"], 2)
        if budget.chooses and texts is not None:
            tables = job.plan.tables if budget.target_size else ()
            found = choices_of(source, job.plan.linears, tables, scheme, texts, options, log)
            chosen = found.within(budget_bytes(source, job.plan, budget))
            job.use(chosen.schemes)
            job.divergence = chosen.divergence
            seconds["allocation"] = round(time.perf_counter() - start - sum(seconds.values()), 2)
            log(plan_table(job.plan, **table, output=folder))
        return _run(job, writer, texts, named, seconds)


def _run(
    job: Job,
    writer: CheckpointWriter,
    texts: calibration.CalibrationSet | None,
    named: dict[str, str],
    seconds: dict[str, float],
) -> QuantizationResult:
    now = time.perf_counter()
    start = now - sum(seconds.values())

    def lap(name: str, since: float) -> float:
        seconds[name] = round(time.perf_counter() - since, 2)
        return time.perf_counter()

    tokens = texts.tokens if texts is not None else None
    probe = _quantize_blocks(job, writer, tokens)
    now = lap("blocks", now)
    if texts is not None and probe is not None and learn.learns(job, "tune"):
        probe = learn.tuning(job, writer, texts, probe)
        now = lap("tuning", now)
    tensors, digests = outside_blocks(job.source, job.plan)
    job.digests |= digests
    writer.write_shard(tensors)
    del tensors
    now = lap("tables", now)
    config = _config_json(job)
    report = build_report(
        job.plan,
        job.rows,
        **named,
        options=job.asked(),
        calibration=texts.provenance() if texts is not None else None,
        folds=job.folds,
        seconds=seconds,
    )
    if job.bank is not None:
        report["statistics"] = job.bank.to_json() | {"steps_left_out": job.steps_left_out}
    report["model"]["digest"] = model_digest(job.source.folder)
    if job.divergence is not None:
        report["divergence"] = job.divergence
    report |= {"learned": job.learned} if job.learned else {}
    report |= {"kv_cache": job.kv.to_json()} if job.kv is not None else {}
    writer.finish(job.source.folder, config, report, model_card(job.plan, report, writer.folder.name))
    check_size(writer.partial, job.budget)
    job.log("reading the folder back")
    release_memory()
    report["check"] = check_folder(writer.partial, job.plan, job.digests, probe, job.source.block_names)
    lap("check", now)
    seconds["total"] = round(time.perf_counter() - start, 2)
    report["peak_rss_bytes"] = peak_rss()
    writer.update_report(report)
    writer.publish()
    text = summary(writer.folder, job.plan, report)
    job.log(text)
    return QuantizationResult(writer.folder, report, text)


def _quantize_blocks(job: Job, writer: CheckpointWriter, tokens: Tensor | None) -> Probe | None:
    """Solve and write every block; returns the probe for the final check (None without calibration text)."""
    source = job.source
    hidden: list[Tensor] = []
    calls: list[BlockCall] = []
    tails: dict[str, Tail] | None = None
    names = source.block_names
    probe = None
    if tokens is not None:
        job.n_windows = tokens.shape[0]
        hidden, calls = block_inputs(source, tokens)
        cut = min(64, tokens.shape[1])
        probe = Probe(tokens[:1, :cut], hidden[0][:, :cut].clone(), torch.empty(0))
    counts = _importance(job, tokens)
    start = time.perf_counter()
    # What the original model feeds its blocks, in step with ``hidden``, where a step asks for it.
    originals = list(hidden) if _repairs(job) or (hidden and learn.learns(job, "rounding")) else []
    for i, name in enumerate(names):
        began = time.perf_counter()
        with materialize(source.block(i), name, source.reader) as block:
            runner = None
            if calls:
                share = job.options.gptq.sink_share
                runner = BlockRunner(block, calls[i], hidden, {}, sink_share=share, counts=counts[i])
                tails = verified_tails(runner, source.family) if tails is None else tails
                runner.tails = tails
            tensors, errors = _quantize_block(job, name, block, runner, originals)
        writer.write_shard(tensors)
        del tensors
        release_memory()  # the allocator keeps what threads have freed, each its own
        now = time.perf_counter()
        n_tokens = tokens.numel() if tokens is not None else 0
        job.log(block_line(i, len(names), errors, n_tokens, now - began, now - start))
    if probe is not None:
        probe.leaving = hidden[0][:, : probe.ids.shape[1]].clone()
    return probe


def _importance(job: Job, tokens: Tensor | None) -> list[Weights]:
    """How much each token counts, for each block; nothing where the step is not taken."""
    if tokens is None or "importance" not in job.steps:
        return [{} for _ in job.source.block_names]
    return token_weights(job.source, tokens, seed=job.calib.seed, log=job.log)


def _repairs(job: Job) -> bool:
    gptq = job.options.gptq
    return job.method.solver == "gptq" and gptq.true_sequential and "target" in job.options.recipe.steps


def _n_held(job: Job) -> int:
    """Windows held out to judge the steps; the last ones."""
    judges = set(job.options.recipe.steps) - {"importance"}
    judged = job.method.solver == "gptq" and job.options.gptq.true_sequential and judges
    return job.n_held if judged else 0


def _quantize_block(
    job: Job, name: str, block: nn.Module, runner: BlockRunner | None, originals: list[Tensor]
) -> tuple[dict[str, Tensor], list[float]]:
    """(tensors of the block's shard by full name, relative errors of its linears). Advances ``runner``."""
    groups = job.source.groups
    shared: dict[str, InputStats] = {}
    teacher = None
    if runner is not None and job.method.awq:
        folds = transform_block(
            block,
            job.source.family,
            runner.observe_all(groups),
            job.scheme,
            job.options.awq,
            lambda: runner.run(0),
        )
        job.folds += [{"block": name, **fold.to_dict()} for fold in folds]
    if runner is not None and originals:
        teacher = BlockRunner(copy.deepcopy(block), runner.call, originals, runner.tails)
    if runner is not None and not job.options.gptq.true_sequential:
        shared = runner.observe_all(groups)
    tensors: dict[str, Tensor] = {}
    solved: dict[str, QTensor] = {}
    errors = []
    for group in groups:
        observed = job.banked(f"{name}.{group[0]}")
        if runner is not None:
            paired = teacher if _repairs(job) else None
            last = group is groups[-1]
            observed = Observed(shared[group[0]]) if shared else runner.observe(group, paired, _n_held(job), last=last)
        for linear_name in group:
            linear = block.get_submodule(linear_name)
            assert isinstance(linear, nn.Linear)
            full = f"{name}.{linear_name}"
            solved[linear_name], row = _solve(job, full, linear_name, linear.weight, observed)
            errors += [row["error"]] if row["error"] is not None else []
        if runner is not None:
            runner.settle(group)
    if teacher is not None and not _repairs(job):
        teacher.advance()
    if runner is not None:
        if teacher is not None and learn.learns(job, "rounding"):
            solved |= learn.rounding(job, name, runner, teacher, solved)
        runner.advance()
    for local, qtensor in solved.items():
        tensors.update({f"{name}.{local}.{key}": value for key, value in matrix_tensors(qtensor).items()})
        job.digests[f"{name}.{local}"] = qtensor.digest()
    quantized = {f"{linear}.weight" for group in groups for linear in group}
    for key, parameter in block.named_parameters():
        if key not in quantized:
            dtype = kept_dtype(job.source.reader.dtype(f"{name}.{key}"), parameter.dim())
            tensors[f"{name}.{key}"] = parameter.detach().to(dtype)
    return tensors, errors


def _solve(job: Job, full: str, name: str, weight: Tensor, observed: Observed | None) -> tuple[QTensor, dict[str, Any]]:
    """Solve one linear, put the dequantized weights in its place, and add its line to the report."""
    began = time.perf_counter()
    W = weight.detach().clone()
    if not torch.isfinite(W).all():
        raise ValueError(f"{full}.weight holds NaN or infinity in {job.source.folder}; the model is damaged")
    may_clip, scheme = name not in job.source.family.no_clip, job.schemes[full]
    stats, held = (None, None) if observed is None else (observed.train, observed.held)
    solved = SOLVERS[job.method.solver](Problem(full, W, stats, scheme, may_clip, held), job.options)
    W_hat = solved.qtensor.dequantize()
    row: dict[str, Any] = {"name": full, "shape": list(W.shape), "scheme": str(scheme), "bits": scheme.bits}
    row |= {"group_size": scheme.group_size, "solver": job.method.solver, "error": None, "error_rtn": None}
    if stats is not None:
        H = stats.hessian(full)
        row["error_rtn"] = relative_error(W, rtn.solve(W, scheme).dequantize(), H)
        row["error"] = relative_error(W, W_hat, H)
        row |= {"tokens": stats.n_tokens, "tokens_not_finite": stats.n_dropped}
    row |= {**solved.notes, "seconds": round(time.perf_counter() - began, 3)}
    weight.data.copy_(W_hat)
    job.rows.append(row)
    return solved.qtensor, row


def _config_json(job: Job) -> dict[str, Any]:
    """config.json of the source with the quantization block, computing in fp32: a CPU gains nothing from less."""
    import json

    config: dict[str, Any] = json.loads((job.source.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    producer = f"llmq {versions()['llmq']}"
    config["quantization_config"] = quantization_config(
        job.plan.schemes(), job.scheme, job.plan.tied, producer, job.runs_with
    )
    return config


__all__ = ["BlockCall", "Probe", "QuantizationResult", "Tail", "default_output", "quantize_model"]
