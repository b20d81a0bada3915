"""What a run is asked for: checked as far as that goes without the model's weights, and opened as a Job."""

from __future__ import annotations

from pathlib import Path

from llmq import calibration, learn
from llmq.allocate import check_budget, read_plan
from llmq.config import BudgetConfig, CalibConfig, KVCacheConfig, QuantScheme, RuntimeConfig, StatsConfig, one_of
from llmq.job import Job
from llmq.models.load import open_model
from llmq.models.resolve import resolve
from llmq.plan import check_memory
from llmq.report import Log
from llmq.solvers import METHODS, SolverOptions
from llmq.stats_bank import check_bank_output, open_bank


def open_job(
    model: str,
    method: str,
    scheme: QuantScheme,
    head_bits: int,
    options: SolverOptions,
    calib: CalibConfig,
    budget: BudgetConfig,
    stats: StatsConfig,
    runtime: RuntimeConfig,
    log: Log,
) -> tuple[Job, dict[str, str]]:
    """The job, and how its report names it; every check that needs the model's folder but not its weights."""
    row = METHODS[method]
    reads_text = row.needs_text and not stats.stats
    if reads_text:
        calibration.check(calib, max_positions=None)
    resolved = resolve(model, log=log)
    source = open_model(resolved.folder)
    if reads_text:
        calibration.check(calib, max_positions=source.max_positions)
    bank = open_bank(stats.stats, source, options.gptq.sink_share) if stats.stats else None
    check_layers(runtime, len(source.block_names))
    job = Job(source, scheme, head_bits, row, options, calib, runtime, log, budget, bank)
    if budget.plan:
        job.use(read_plan(budget.plan, [*job.plan.linears, *job.plan.tables]))
    if budget.chooses:
        check_budget(source, job.plan, scheme, budget)
    learn.check(job)
    if job.sampled:
        check_memory(job.plan)
    return job, {"model": model, "family": source.family.name, "method": method, "origin": resolved.origin}


def check_layers(runtime: RuntimeConfig, n_layers: int) -> None:
    """Raise ValueError where bits of the KV cache are given for another number of layers."""
    layers = () if runtime.chooses else KVCacheConfig.parse(runtime.kv_bits).layers
    if layers and len(layers) != n_layers:
        raise ValueError(
            f"--kv-bits {runtime.kv_bits} names {len(layers)} layers; the model has {n_layers}: name each once"
        )


def check_method(method: str, budget: BudgetConfig, stats: StatsConfig) -> None:
    """Raise ValueError for a method that is unknown or that cannot do what else is asked for."""
    one_of("method", method, METHODS)
    if stats.stats and (METHODS[method].awq or not METHODS[method].needs_text):
        raise ValueError(f"--stats serves --method gptq; {method} {'runs' if METHODS[method].awq else 'needs no'} text")
    if stats.stats and budget.chooses:
        raise ValueError(f"{budget.flag} runs text to choose by, and --stats runs none; give the schemes with --plan")
    if stats.save_stats and budget.max_kl:
        raise ValueError("--max-kl makes many runs; keep the statistics of another one with --save-stats")
    if stats.save_stats:
        if not METHODS[method].needs_text:
            raise ValueError(f"--save-stats keeps statistics of text, and --method {method} reads none; use gptq")
        check_bank_output(Path(stats.save_stats))
    if budget.flag and METHODS[method].awq:
        raise ValueError(f"--method {method} folds scales for one scheme; schemes by module need gptq or rtn")
    if budget.chooses and not METHODS[method].needs_text:
        raise ValueError(f"{budget.flag} needs text to choose by, and --method {method} reads none; use gptq")


def default_output(model: str, scheme: QuantScheme, budget: BudgetConfig | None = None) -> str:
    """``gemma-3-1b-w4g128`` (or ``gemma-3-1b-3.25bpw``) for ``google/gemma-3-1b`` or ``~/models/gemma-3-1b.gguf``."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    if budget is None or not budget.chooses:
        return f"{name}-{scheme}"
    what = f"{budget.target_bpw:g}bpw" if budget.target_bpw else f"kl{budget.max_kl:g}"
    return f"{name}-{budget.target_size or what}"
