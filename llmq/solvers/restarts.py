"""Restarts: GPTQ from several starts, each row keeping the best.

What GPTQ finds depends on the grid it is given and on the order of its columns, and the polished results of two starts
differ by several percent a row, now in favour of one, now of the other. Rows do not know of each other, so each keeps
its own best. A polished result is itself a start: its scales are a better grid than any search makes before there are
integers (the alternation of arXiv 2602.02126's two stages, repeated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.config import GPTQConfig, QuantScheme
from llmq.qtensor import QTensor, dequantize
from llmq.solvers import gptq
from llmq.solvers.objective import Objective

# How often GPTQ is begun again on the grid that polishing left, orders taking turns.
RESTARTS = 4


@dataclass
class State:
    """codes f32[N, K], scale and zero f32[N, G], and the weights they stand for, f32[N, K]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    W_hat: Tensor

    @classmethod
    def of(cls, t: QTensor) -> State:
        """From a quantized matrix."""
        zero = torch.full(t.scale.shape, float(t.scheme.mid)) if t.zero is None else t.zero.float()
        return cls(t.q.float(), t.scale.float(), zero, t.dequantize())

    def with_codes(self, codes: Tensor, scheme: QuantScheme) -> State:
        """The same grid, other codes f32[N, K]."""
        return State(codes, self.scale, self.zero, dequantize(codes, self.scale, self.zero, scheme))


def best_rows(states: Sequence[State], objective: Objective) -> State:
    """Each row from the state in which it loses least; the first of equals."""
    best = torch.stack([objective.rows(s.W_hat) for s in states]).argmin(0)
    kept = State(*(t.clone() for t in (states[0].codes, states[0].scale, states[0].zero, states[0].W_hat)))
    for i, state in enumerate(states):
        rows = best == i
        for name in ("codes", "scale", "zero", "W_hat"):
            getattr(kept, name)[rows] = getattr(state, name)[rows]
    return kept


def restarted(
    start: State,
    target: Tensor,
    prepared: gptq.Prepared,
    objective: Objective,
    scheme: QuantScheme,
    cfg: GPTQConfig,
    polish: Callable[[State], State],
) -> State:
    """``start`` or better, row by row.

    Args:
        start: what GPTQ made.
        target: f32[N, K], what GPTQ rounds.
        prepared: of its Hessian.
        objective: what the rows are compared by.
        scheme: the grid's scheme.
        cfg: of GPTQ.
        polish: one round of polishing; must not raise any row's loss.
    """
    best = polish(start)
    if cfg.grid_steps and not scheme.sym:
        other, _ = gptq.solve(target, prepared, scheme, cfg, ends_apart=True)
        best = best_rows([best, polish(State.of(other))], objective)
    for i in range(RESTARTS):
        path = prepared.conditional if i % 2 == 0 else prepared.path
        codes = gptq.round_with_feedback(target, path, best.scale, best.zero, scheme)
        best = best_rows([best, polish(best.with_codes(codes, scheme))], objective)
    return best
