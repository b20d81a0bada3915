"""What a quantization run knows, filled as it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmq import calibration
from llmq.config import CalibConfig, QuantScheme
from llmq.models.load import SourceModel
from llmq.plan import BASE_BYTES, Plan, make_plan
from llmq.report import Log
from llmq.solvers import Method, SolverOptions
from llmq.tune import memory_needed

# One window in so many is held out to judge the recipe's steps and what is learned.
HELD_SHARE = 8


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
        scheme, head_bits, method, options, calib: what was asked for.
        log: gets each line of progress.
        plan: what will be done.
        schemes: of every matrix, by name.
        divergence: of every linear, where schemes were chosen by it.
        n_windows: of calibration text.
        rows, folds: lines of the report.
        digests: of every matrix that was solved.
        learned: lines of the report of what was learned, by step; a step that is not there was not asked for.
        learning_seconds: spent on that so far.
    """

    source: SourceModel
    scheme: QuantScheme
    head_bits: int
    method: Method
    options: SolverOptions
    calib: CalibConfig
    log: Log
    plan: Plan = field(init=False)
    schemes: dict[str, QuantScheme] = field(init=False)
    divergence: dict[str, float] | None = None
    n_windows: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    learned: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    learning_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.use({})

    @property
    def sampled(self) -> bool:
        """Whether the model itself writes the calibration text."""
        return self.method.needs_text and calibration.is_sampled(self.calib)

    @property
    def n_held(self) -> int:
        """Windows that can be held out; the last ones."""
        return max(1, self.n_windows // HELD_SHARE) if self.n_windows > 1 else 0

    def use(self, schemes: dict[str, QuantScheme]) -> None:
        """Plan the run anew with these schemes of single linears; the others get ``scheme``."""
        self.plan = make_plan(
            self.source,
            self.scheme,
            self.head_bits,
            self.method,
            self.calib.nsamples * self.calib.seqlen,
            self.calib.seqlen,
            steps=self.options.recipe.steps if self.method.solver == "gptq" else (),
            schemes=schemes,
            sampled=self.sampled,
        )
        self.schemes = self.plan.schemes()
        steps = self.options.recipe.steps if self.method.solver == "gptq" else ()
        if "tune" in steps:
            n_tokens = self.calib.nsamples * self.calib.seqlen
            needed = BASE_BYTES + memory_needed(self.source, self.plan.linears, n_tokens)
            self.plan.peak_bytes = max(self.plan.peak_bytes, needed)
        if {"tune", "rounding"} & set(steps):
            self.plan.learning_seconds = 60 * self.options.recipe.max_time
