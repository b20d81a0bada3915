"""quantize_model: from a model's name to a checkpoint folder, one decoder block in memory at a time."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import calibration, kernels, learn
from llmq.allocate import allocate, check_budget, read_plan
from llmq.blockwise import BlockCall, BlockRunner, Observed, Tail, block_inputs, verified_tails
from llmq.checkpoint import CheckpointWriter, check_output, matrix_tensors, quantization_config
from llmq.config import HEAD_BITS, AWQConfig, BudgetConfig, CalibConfig, GPTQConfig, QuantScheme, RecipeConfig, one_of
from llmq.job import Job, Probe
from llmq.models.load import materialize, open_model
from llmq.models.resolve import resolve
from llmq.plan import check_memory, kept_dtype
from llmq.qtensor import QTensor
from llmq.report import (
    Log,
    block_line,
    build_report,
    duration,
    model_card,
    peak_rss,
    plan_table,
    release_memory,
    silent,
    summary,
    versions,
)
from llmq.solvers import METHODS, SOLVERS, Problem, SolverOptions, rtn
from llmq.solvers.awq import transform_block
from llmq.solvers.hessian import InputStats, relative_error
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
        head_bits: bits of token embedding and head: 16, 8 or 4.
        overwrite: replace ``output`` if it is a model folder.
        device: where to compute; ``cpu``.
        log: gets each line of progress; default: none.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: anything that is wrong with the request, before the long work.
        OSError: the disk filled up; nothing is left behind.
    """
    scheme, calib, log = scheme or QuantScheme(), calib or CalibConfig(), log or silent
    budget = budget or BudgetConfig()
    options = SolverOptions(gptq or GPTQConfig(), awq or AWQConfig(), recipe or RecipeConfig())
    _check_method(method, budget)
    one_of("head_bits", head_bits, HEAD_BITS)
    one_of("device", device, DEVICES)
    kernels.current_isa()  # the check at the end runs on the kernels: a wrong LLMQ_ISA must not wait for it
    row = METHODS[method]
    start = time.perf_counter()
    if row.needs_text:
        calibration.check(calib, max_positions=None)
    resolved = resolve(str(model), log=log)
    source = open_model(resolved.folder)
    if row.needs_text:
        calibration.check(calib, max_positions=source.max_positions)
    job = Job(source, scheme, head_bits, row, options, calib, log)
    learn.check(job)
    if budget.plan:
        job.use(read_plan(budget.plan, job.plan.linears))
    if budget.target_bpw:
        check_budget(source, job.plan, scheme, budget.target_bpw)
    if job.sampled:
        check_memory(job.plan)
    folder = Path(output) if output is not None else Path(default_output(str(model), scheme, budget.target_bpw))
    size = job.plan.bytes_after
    check_output(folder.absolute(), overwrite=overwrite, expected_bytes=size, source=source.folder)
    text = f"{calib.calib}: {calib.nsamples} windows of {calib.seqlen} tokens" if row.needs_text else "none needed"
    named = {"model": str(model), "family": source.family.name, "method": method}
    log(plan_table(job.plan, **named, calibration=text, output=folder))
    with CheckpointWriter(folder, len(source.block_names) + 1, overwrite=overwrite, expected_bytes=size) as writer:
        texts = _calibration(job)
        seconds = {"calibration": round(time.perf_counter() - start, 2)}
        if budget.target_bpw:
            assert texts is not None
            chosen = allocate(source, job.plan.linears, scheme, budget.target_bpw, texts.tokens, log)
            job.use(chosen.schemes)
            job.divergence = chosen.divergence
            seconds["allocation"] = round(time.perf_counter() - start - seconds["calibration"], 2)
            log(plan_table(job.plan, **named, calibration=text, output=folder))
        return _run(job, writer, texts, named | {"origin": resolved.origin}, seconds)


def _check_method(method: str, budget: BudgetConfig) -> None:
    one_of("method", method, METHODS)
    if (budget.plan or budget.target_bpw) and METHODS[method].awq:
        raise ValueError(f"--method {method} folds scales for one scheme; schemes by module need gptq or rtn")
    if budget.target_bpw and not METHODS[method].needs_text:
        raise ValueError(f"--target-bpw needs text to choose by, and --method {method} reads none; use gptq")


def default_output(model: str, scheme: QuantScheme, target_bpw: float = 0.0) -> str:
    """``gemma-3-1b-w4g128`` (or ``gemma-3-1b-3.25bpw``) for ``google/gemma-3-1b`` or ``~/models/gemma-3-1b.gguf``."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return f"{name}-{target_bpw:g}bpw" if target_bpw else f"{name}-{scheme}"


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
        options={"scheme": str(job.scheme), **asdict(job.options), "calib": asdict(job.calib)},
        calibration=texts.provenance() if texts is not None else None,
        folds=job.folds,
        seconds=seconds,
    )
    if job.divergence is not None:
        report["divergence"] = job.divergence
    report |= {"learned": job.learned} if job.learned else {}
    writer.finish(job.source.folder, config, report, model_card(job.plan, report, writer.folder.name))
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


def _calibration(job: Job) -> calibration.CalibrationSet | None:
    if not job.method.needs_text:
        return None

    def sampler(n_samples: int, seqlen: int, seed: int) -> Tensor:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job.source.folder, dtype=torch.float32)
        began, said = time.perf_counter(), 0.0

        def progress(done: int, total: int) -> None:
            nonlocal said
            elapsed = time.perf_counter() - began
            if elapsed - said > 15 or done == total:
                said = elapsed
                left = elapsed / done * (total - done)
                job.log(f"  sampled {done} of {total} tokens  {done / elapsed:.0f} tokens/s  left {duration(left)}")

        return calibration.sample_from_model(model, job.source.tokenizer, n_samples, seqlen, seed, progress)

    texts = calibration.load(job.calib, job.source.tokenizer, sampler=sampler, log=job.log)
    job.log(
        f"calibration: {texts.source}, {texts.tokens.shape[0]} windows of {texts.tokens.shape[1]} tokens, "
        f"BOS {'in each' if texts.bos else 'none'}{', ' + texts.note if texts.note else ''}"
    )
    return texts


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
    start = time.perf_counter()
    # What the original model feeds its blocks, in step with ``hidden``, where a step asks for it.
    originals = list(hidden) if _repairs(job) or (hidden and learn.learns(job, "rounding")) else []
    for i, name in enumerate(names):
        began = time.perf_counter()
        with materialize(source.block(i), name, source.reader) as block:
            runner = None
            if calls:
                runner = BlockRunner(block, calls[i], hidden, {})
                tails = verified_tails(runner, source.family) if tails is None else tails
                runner.tails = tails
            tensors, errors = _quantize_block(job, name, block, runner, originals)
        writer.write_shard(tensors)
        now = time.perf_counter()
        n_tokens = tokens.numel() if tokens is not None else 0
        job.log(block_line(i, len(names), errors, n_tokens, now - began, now - start))
    if probe is not None:
        probe.leaving = hidden[0][:, : probe.ids.shape[1]].clone()
    return probe


def _repairs(job: Job) -> bool:
    gptq = job.options.gptq
    return job.method.solver == "gptq" and gptq.true_sequential and "target" in job.options.recipe.steps


def _n_held(job: Job) -> int:
    """Windows held out to judge the steps; the last ones."""
    judged = job.method.solver == "gptq" and job.options.gptq.true_sequential and job.options.recipe.steps
    return job.n_held if judged else 0


def _quantize_block(
    job: Job, name: str, block: nn.Module, runner: BlockRunner | None, originals: list[Tensor]
) -> tuple[dict[str, Tensor], list[float]]:
    """(tensors of the block's shard by full name, relative errors of its linears). Advances ``runner``."""
    groups = [g for g in job.source.family.linear_groups if set(g) <= set(job.source.block_linears(0))]
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
        observed = None
        if runner is not None:
            paired = teacher if _repairs(job) else None
            observed = Observed(shared[group[0]]) if shared else runner.observe(group, paired, _n_held(job))
        for linear_name in group:
            linear = block.get_submodule(linear_name)
            assert isinstance(linear, nn.Linear)
            full = f"{name}.{linear_name}"
            solved[linear_name], row = _solve(job, full, linear_name, linear.weight, observed)
            errors += [row["error"]] if row["error"] is not None else []
        if runner is not None:
            runner.settle(group)
    if teacher is not None:
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
    config["quantization_config"] = quantization_config(job.plan.schemes(), job.scheme, job.plan.tied, producer)
    return config


__all__ = ["BlockCall", "Probe", "QuantizationResult", "Tail", "default_output", "quantize_model"]
