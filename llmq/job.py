"""What a quantization run knows, filled as it goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmq import calibration
from llmq.config import BudgetConfig, CalibConfig, QuantScheme
from llmq.models.load import SourceModel
from llmq.plan import Plan, make_plan
from llmq.report import Log
from llmq.solvers import Method, SolverOptions


@dataclass
class Job:
    """One run.

    Attributes:
        source: the model.
        scheme, head_bits, method, options, calib, budget: what was asked for.
        log: gets each line of progress.
        plan: what will be done.
        schemes: of every matrix, by name.
        divergence: of every linear, where schemes were chosen by it.
        n_windows: of calibration text.
        rows, folds: lines of the report.
        digests: of every matrix that was solved.
    """

    source: SourceModel
    scheme: QuantScheme
    head_bits: int
    method: Method
    options: SolverOptions
    calib: CalibConfig
    log: Log
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    plan: Plan = field(init=False)
    schemes: dict[str, QuantScheme] = field(init=False)
    divergence: dict[str, float] | None = None
    n_windows: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.use({})

    def asked(self) -> dict[str, Any]:
        """What was asked for, as plain JSON types: the report's options."""
        return asked(self.scheme, self.options, self.calib, self.budget, self.head_bits)

    @property
    def sampled(self) -> bool:
        """Whether the model itself writes the calibration text."""
        return self.method.needs_text and calibration.is_sampled(self.calib)

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


def asked(
    scheme: QuantScheme, options: SolverOptions, calib: CalibConfig, budget: BudgetConfig, head_bits: int
) -> dict[str, Any]:
    """The options of a run as its report holds them, plain JSON types."""
    parts = {"calib": asdict(calib), "budget": asdict(budget), "head_bits": head_bits}
    return {"scheme": str(scheme), **asdict(options), **parts}
