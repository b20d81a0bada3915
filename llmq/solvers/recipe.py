"""The recipe: GPTQ towards a target that repairs earlier layers' errors, then exact polishing, each step on trial.

A round stays only if the linear's output error on held-out windows falls; without held-out windows the calibration loss
judges, and nothing is repaired. Which steps are tried is the user's choice (:data:`llmq.config.PRESETS`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.config import GPTQConfig, QuantScheme, RecipeConfig, replace
from llmq.products import matmul
from llmq.qtensor import QTensor, dequantize, from_codes
from llmq.solvers import gptq
from llmq.solvers.hessian import InputStats
from llmq.solvers.objective import Objective, choose_alpha, measured
from llmq.solvers.polish import descend, refit_scales
from llmq.solvers.restarts import State, restarted

# Rounds of refit and descent tried at most, and the relative gain below which a round is the last.
ROUNDS = 8
LEAST_GAIN = 2e-3
# Shares of the mean diagonal that are tried as damping, each with everything that follows from it.
DAMPINGS = (0.003, 0.01, 0.05)


@dataclass
class RecipeReport:
    """What was tried and what it brought: losses are relative to the output's energy on the windows that judged.

    Attributes:
        alpha: share of the earlier layers' error that was to be repaired.
        held_out: whether held-out windows judged (else the calibration windows did).
        losses: loss after each step that was kept, in order, by name.
        refused: steps that were tried and dropped.
    """

    alpha: float
    held_out: bool
    losses: list[tuple[str, float]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def solve(
    name: str,
    W: Tensor,
    train: InputStats,
    held: InputStats | None,
    scheme: QuantScheme,
    cfg: GPTQConfig,
    recipe: RecipeConfig,
) -> tuple[QTensor, dict[str, Any]]:
    """Quantize W f32[N, K] (unchanged); returns it with the report of GPTQ and of the recipe's steps."""
    judge = measured(W, held if held is not None else train, name)
    steps = recipe.steps

    def damped(percdamp: float, steps: tuple[str, ...]) -> tuple[QTensor, dict[str, Any]]:
        damped_cfg = replace(cfg, percdamp=percdamp)
        return _solve_damped(name, W, train, judge, held is not None, scheme, damped_cfg, steps)

    if "damping" not in steps or held is None:
        return damped(cfg.percdamp, steps)
    # Restarts are most of the work and help every damping alike: the damping is chosen without them.
    single = tuple(step for step in steps if step != "restarts")
    tried = {d: damped(d, single) for d in DAMPINGS}
    chosen = min(tried, key=lambda d: tried[d][1]["losses"][-1][1])
    return tried[chosen] if single == steps else damped(chosen, steps)


def _solve_damped(
    name: str,
    W: Tensor,
    train: InputStats,
    judge: Objective,
    held_out: bool,
    scheme: QuantScheme,
    cfg: GPTQConfig,
    steps: tuple[str, ...],
) -> tuple[QTensor, dict[str, Any]]:
    prepared = _prepared(name, train, cfg)
    power = float(torch.sum(matmul(W, judge.S) * W, dtype=torch.float64)) or 1.0
    objective, report = Objective(W, prepared.S, torch.zeros_like(W)), RecipeReport(0.0, held_out)
    target = W
    if "target" in steps and held_out and train.cross is not None:
        R = matmul(W, train.mean_cross().float())
        repair = prepared.solve_right(R)
        report.alpha = choose_alpha(repair, judge)
        objective, target = Objective(W, prepared.S, report.alpha * R), W + report.alpha * repair
    solved, gptq_report = gptq.solve(target, prepared, scheme, cfg)
    state = State.of(solved)
    report.losses.append(("gptq", judge.loss(state.W_hat) / power))
    if "restarts" in steps:

        def polish(state: State) -> State:
            return _round(state, objective, scheme, steps)

        new = restarted(state, target, prepared, objective, scheme, cfg, polish)
        state = _kept("restarts", state, new, judge, power, report)
    state = _polish(state, objective, judge, power, scheme, steps, report)
    return from_codes(state.codes, state.scale, state.zero, scheme), asdict(gptq_report) | asdict(report)


def _kept(name: str, state: State, new: State, judge: Objective, power: float, report: RecipeReport) -> State:
    """``new`` if the judge's loss falls, else ``state``; the report says which."""
    loss = judge.loss(new.W_hat) / power
    if loss < report.losses[-1][1]:
        report.losses.append((name, loss))
        return new
    report.refused.append(name)
    return state


def _round(state: State, objective: Objective, scheme: QuantScheme, chosen: tuple[str, ...]) -> State:
    """One round of the chosen polishing steps."""
    for name, step in _STEPS.items():
        if name in chosen:
            state = step(state, objective, scheme)
    return state


def _polish(
    state: State,
    objective: Objective,
    judge: Objective,
    power: float,
    scheme: QuantScheme,
    chosen: tuple[str, ...],
    report: RecipeReport,
) -> State:
    """Rounds of the chosen polishing steps; a round is kept only if the judge's loss falls."""
    best = judge.loss(state.W_hat)
    steps = [s for s in _STEPS if s in chosen]
    for _ in range(ROUNDS if steps else 0):
        new = _round(state, objective, scheme, chosen)
        loss = judge.loss(new.W_hat)
        name, gain = " + ".join(steps), best - loss
        if not gain > 0:
            report.refused.append(name)
            break
        state, best = new, loss
        report.losses.append((name, loss / power))
        if gain <= LEAST_GAIN * abs(best):
            break
    return state


def _prepared(name: str, train: InputStats, cfg: GPTQConfig) -> gptq.Prepared:
    if cfg not in train.memo:
        train.memo[cfg] = gptq.prepare(train.hessian(name), train.n_tokens, cfg)
    found: gptq.Prepared = train.memo[cfg]
    return found


def _refit(state: State, objective: Objective, scheme: QuantScheme) -> State:
    scale = refit_scales(state.codes, state.scale, state.zero, objective, scheme)
    return State(state.codes, scale, state.zero, dequantize(state.codes, scale, state.zero, scheme))


def _descent(state: State, objective: Objective, scheme: QuantScheme) -> State:
    codes = descend(state.codes, state.scale, state.zero, objective, scheme)
    return state.with_codes(codes, scheme)


_STEPS = {"refit": _refit, "descent": _descent}
