"""SOLVERS: one row a way to make the integers of a linear; METHODS: what the user names, a transform and a solver.

A solver is ``solve(problem, options) -> Solved``. A new one is a file and a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmq.config import AWQConfig, GPTQConfig, QuantScheme, RecipeConfig, one_of
from llmq.qtensor import QTensor
from llmq.solvers import recipe, rtn
from llmq.solvers.hessian import InputStats

# Clipping ranges that AWQ's rounding tries: 20 steps down from the full range, as in its code.
AWQ_CLIP_STEPS = 20


@dataclass(frozen=True)
class SolverOptions:
    """Options of every solver; each reads its own."""

    gptq: GPTQConfig = field(default_factory=GPTQConfig)
    awq: AWQConfig = field(default_factory=AWQConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


@dataclass
class Solved:
    """A solved linear: its integers and the solver's own lines for the report."""

    qtensor: QTensor
    notes: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What a solver is given.

    Attributes:
        name: the linear's full name, for errors.
        W: f32[N, K]; solvers leave it as it is.
        stats: of its inputs; None for methods that need no text.
        scheme: the grid asked for.
        may_clip: False where the family says that clipping hurts.
        held: statistics of held-out windows; None: there are none.
    """

    name: str
    W: Tensor
    stats: InputStats | None
    scheme: QuantScheme
    may_clip: bool = True
    held: InputStats | None = None


Solver = Callable[[Problem, SolverOptions], Solved]


def _rtn(p: Problem, _options: SolverOptions) -> Solved:
    return Solved(rtn.solve(p.W, p.scheme), {})


def _clipped_rtn(p: Problem, options: SolverOptions) -> Solved:
    assert p.stats is not None, "the pipeline gathers statistics for every method that needs them"
    steps = AWQ_CLIP_STEPS if options.awq.clip and p.may_clip else 0
    return Solved(rtn.solve(p.W, p.scheme, p.stats.hessian(p.name), grid_steps=steps), {"clip_steps": steps})


def _gptq(p: Problem, options: SolverOptions) -> Solved:
    assert p.stats is not None, "the pipeline gathers statistics for every method that needs them"
    return Solved(*recipe.solve(p.name, p.W, p.stats, p.held, p.scheme, options.gptq, options.recipe))


SOLVERS: dict[str, Solver] = {"rtn": _rtn, "clipped-rtn": _clipped_rtn, "gptq": _gptq}


@dataclass(frozen=True)
class Method:
    """What ``--method`` names: which solver rounds, whether AWQ's transform goes before it, whether text is needed."""

    solver: str
    awq: bool = False
    needs_text: bool = True


METHODS: dict[str, Method] = {
    "gptq": Method("gptq"),
    "awq": Method("clipped-rtn", awq=True),
    "awq+gptq": Method("gptq", awq=True),
    "rtn": Method("rtn", needs_text=False),
}


def method(name: str) -> Method:
    """The row of METHODS called ``name``; ValueError lists the known ones."""
    one_of("method", name, METHODS)
    return METHODS[name]
