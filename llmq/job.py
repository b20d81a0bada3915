"""What a quantization run knows, filled as it goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from llmq import calibration, sensitivity
from llmq.blockwise import Observed
from llmq.config import LEARNED_STEPS, BudgetConfig, CalibConfig, QuantScheme, RuntimeConfig, parse_size
from llmq.kv_budget import Choice, context_of, of_source
from llmq.models.load import SourceModel
from llmq.own_text import own_text
from llmq.plan import BASE_BYTES, Plan, make_plan
from llmq.report import Log
from llmq.solvers import Method, SolverOptions
from llmq.stats_bank import BANKED_STEPS, Bank
from llmq.tune import memory_needed

# One window in so many is held out to judge the recipe's steps and what is learned.
HELD_SHARE = 16


@dataclass
class Probe:
    """First tokens of a calibration window: ids i64[1, t], block-0 input and last block's output f32[1, t, hidden]."""

    ids: Tensor
    entering: Tensor
    leaving: Tensor


@dataclass
class Job:
    """One run.

    Attributes:
        source: the model.
        scheme, head_bits, method, options, calib, runtime, budget: what was asked for.
        log: gets each line of progress.
        bank: statistics that take the place of calibration text.
        plan: what will be done.
        schemes: of every matrix, by name.
        divergence: of every linear, where schemes were chosen by it.
        n_windows: of calibration text.
        rows, folds: lines of the report.
        digests: of every matrix that was solved.
        learned: lines of the report of what was learned, by step; a step that is not there was not asked for.
        learning_seconds: spent on that so far.
        kv: bits of the KV cache by layer, where these were to be chosen.
    """

    source: SourceModel
    scheme: QuantScheme
    head_bits: int
    method: Method
    options: SolverOptions
    calib: CalibConfig
    runtime: RuntimeConfig
    log: Log
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    bank: Bank | None = None
    plan: Plan = field(init=False)
    schemes: dict[str, QuantScheme] = field(init=False)
    divergence: dict[str, float] | None = None
    n_windows: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    learned: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    learning_seconds: float = 0.0
    kv: Choice | None = None

    def __post_init__(self) -> None:
        self.use({})

    @property
    def runs_with(self) -> RuntimeConfig:
        """What the folder asks of whoever runs it."""
        return self.runtime if self.kv is None else RuntimeConfig(kv_bits=str(self.kv.config))

    def choose_kv(self) -> None:
        """Settle the bits of the KV cache. Raises ValueError when a budget is too small for any."""
        if not self.runtime.chooses:
            return
        context = context_of(self.source.config, self.runtime.kv_context)
        self.log(f"measuring what few bits of keys and values do to each layer, for {context} tokens")
        subject, budget = of_source(self.source, context), self.runtime.kv_budget
        self.kv = subject.within(parse_size(budget)) if budget else subject.auto()
        self.log(self.kv.table())

    def asked(self) -> dict[str, Any]:
        """What was asked for, as plain JSON types: the report's options."""
        return asked(self.scheme, self.options, self.calib, self.budget, self.head_bits) | asdict(self.runtime)

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps of the recipe that are tried."""
        chosen = self.options.recipe.steps if self.method.solver == "gptq" else ()
        return chosen if self.bank is None else tuple(step for step in chosen if step in BANKED_STEPS)

    @property
    def steps_left_out(self) -> list[str]:
        """Steps that were asked for and need the streams that a bank cannot hold."""
        asked_for = self.options.recipe.steps if self.method.solver == "gptq" else ()
        return [step for step in asked_for if step not in self.steps]

    def banked(self, linear: str) -> Observed | None:
        """The bank's statistics of the group that begins with ``linear``, None without a bank."""
        return None if self.bank is None else self.bank.observed(linear, judged=bool(self.steps))

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is run through the model."""
        return self.method.needs_text and self.bank is None

    @property
    def sampled(self) -> bool:
        """Whether the model itself writes the calibration text."""
        return self.reads_text and calibration.is_sampled(self.calib)

    def describe_text(self) -> str:
        """The calibration text, in words."""
        if self.bank is not None:
            return self.bank.describe()
        calib = self.calib
        return f"{calib.calib}: {calib.nsamples} windows of {calib.seqlen} tokens" if self.reads_text else "none needed"

    @property
    def n_held(self) -> int:
        """Windows that can be held out; the last ones."""
        return max(1, self.n_windows // HELD_SHARE) if self.n_windows > 1 else 0

    def use(self, schemes: dict[str, QuantScheme]) -> None:
        """Plan the run anew with these schemes of single matrices; the other linears get ``scheme``."""
        self.plan = make_plan(
            self.source,
            self.scheme,
            self.head_bits,
            self.method,
            self.calib.nsamples * self.calib.seqlen if self.bank is None else self.bank.tokens,
            self.calib.seqlen,
            steps=self.steps,
            schemes=schemes,
            sampled=self.sampled,
            banked=self.bank is not None,
        )
        self.schemes = self.plan.schemes()
        if "tune" in self.steps:
            n_tokens = (self.calib.nsamples + self.calib.tune_samples) * self.calib.seqlen
            needed = BASE_BYTES + memory_needed(self.source, self.plan.linears, n_tokens)
            self.plan.peak_bytes = max(self.plan.peak_bytes, needed)
        if self.budget.chooses:
            matrices = [*self.plan.linears, *(self.plan.tables if self.budget.target_size else ())]
            needed = BASE_BYTES + sensitivity.memory_needed(self.source, matrices, self.plan.weights)
            self.plan.peak_bytes = max(self.plan.peak_bytes, needed)
        if set(LEARNED_STEPS) & set(self.steps):
            self.plan.learning_seconds = 60 * self.options.recipe.max_time
        if self.steps_left_out:
            left_out = ", ".join(self.steps_left_out)
            self.plan.warnings.append(f"a bank holds no streams of the quantized model; left out: {left_out}")


def asked(
    scheme: QuantScheme, options: SolverOptions, calib: CalibConfig, budget: BudgetConfig, head_bits: int
) -> dict[str, Any]:
    """The options of a run as its report holds them, plain JSON types."""
    parts = {"calib": asdict(calib), "budget": asdict(budget), "head_bits": head_bits}
    return {"scheme": str(scheme), **asdict(options), **parts}


def calibration_texts(job: Job) -> calibration.CalibrationSet | None:
    """The calibration windows that the job asks for, None where none are run; raises as ``calibration.load``."""
    if not job.reads_text:
        return None

    def sampler(n_samples: int, seqlen: int, seed: int) -> Tensor:
        return own_text(job.source, n_samples, seqlen, seed, job.log)

    calib = job.calib if "tune" in job.steps else replace(job.calib, tune_samples=0)
    texts = calibration.load(calib, job.source.tokenizer, sampler=sampler, log=job.log)
    job.log(
        f"calibration: {texts.source}, {texts.tokens.shape[0]} windows of {texts.tokens.shape[1]} tokens, "
        f"BOS {'in each' if texts.bos else 'none'}{', ' + texts.note if texts.note else ''}"
    )
    return texts
