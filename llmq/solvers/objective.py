"""What a linear's rounding is judged by: the error of its output against the original model's.

The quantized model feeds the linear X~ [T, K] where the original one fed X. With D = W^ - W the squared difference of
the outputs is, up to a constant, ``tr(D H D^T) - 2 <D, R>`` with ``H = X~^T X~ / T`` and ``R = W (X - X~)^T X~ / T``:
H says what rounding costs, R what it may repair of the error that earlier layers have made (QEP, arXiv 2504.09629).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmq.products import matmul
from llmq.solvers.hessian import InputStats

# Shares of the earlier layers' error that a linear may be asked to repair. Never more than half: held-out windows of
# the same text would take nearly all of it, linear by linear; models made so were worse as a whole (docs/QUALITY.md).
ALPHAS = (0.0, 0.25, 0.5)


@dataclass(frozen=True)
class Objective:
    """``loss(W^) = tr(D S D^T) - 2 <D, R>`` with D = W^ - W, a quadratic in each row of W^.

    Attributes:
        W: f32[N, K], the original weights.
        S: f32[K, K], symmetric: H, damped where the loss is minimised, plain where it is measured.
        R: f32[N, K], what is to be repaired; zeros when only the rounding counts.
    """

    W: Tensor
    S: Tensor
    R: Tensor

    def of_rows(self, n: slice) -> Objective:
        """The same for some rows only."""
        part = Objective(self.W[n], self.S, self.R[n])
        part.__dict__["pull"] = self.pull[n]  # one product for all parts and all rounds
        return part

    @cached_property
    def pull(self) -> Tensor:
        """W S + R, f32[N, K]: ``loss = tr(W^ S W^T) - 2 <W^, pull>`` up to a constant."""
        return matmul(self.W, self.S) + self.R

    def rows(self, W_hat: Tensor) -> Tensor:
        """Loss of every row, f64[N]."""
        D = W_hat - self.W
        return torch.sum((matmul(D, self.S) - 2 * self.R) * D, dim=1, dtype=torch.float64)

    def loss(self, W_hat: Tensor) -> float:
        """Loss summed over the rows."""
        return float(self.rows(W_hat).sum())

    def descent(self, W_hat: Tensor) -> Tensor:
        """Half the negative gradient, f32[N, K]: R - D S."""
        return self.R - matmul(W_hat - self.W, self.S)


def measured(W: Tensor, stats: InputStats, name: str) -> Objective:
    """The loss on the tokens of ``stats``, undamped."""
    R = matmul(W, stats.mean_cross().float()) if stats.cross is not None else torch.zeros_like(W)
    return Objective(W, stats.hessian(name).float(), R)


def choose_alpha(repair: Tensor, held: Objective) -> float:
    """The alpha in ALPHAS at which W + alpha * repair f32[N, K] loses least on held-out tokens.

    The loss is a quadratic in alpha: two products tell it for every alpha.
    """
    square = float(torch.sum(matmul(repair, held.S) * repair, dtype=torch.float64))
    linear = float(torch.sum(repair * held.R, dtype=torch.float64))
    return min(ALPHAS, key=lambda a: (a * a * square - 2 * a * linear, a))
