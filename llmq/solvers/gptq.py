"""GPTQ: rounding with error feedback (Frantar et al. 2022, arXiv 2210.17323, Algorithm 1).

Columns are rounded one after the other; the error of each is spread over the columns that are still free so that the
layer's output moves least. With act-order the columns that matter most come first; the groups' grids are fixed before
the loop from the original columns ("static groups"), so the order leaves no trace in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llmq.config import GPTQConfig, QuantScheme
from llmq.parallel import one_thread
from llmq.products import matmul
from llmq.qtensor import QTensor, expand_groups, from_codes, round_to_grid
from llmq.solvers.grid import search_grid
from llmq.solvers.hessian import Factor, dead_columns, inverse_factor, shrink_to_diagonal, upper_factor

# Columns whose updates are kept inside a small panel before the rest of W sees them (section 3.3, step 2).
BLOCK = 128


@dataclass
class GPTQReport:
    """What the solver had to do: damping used, tries, eigenvalues clipped, dead columns, shrinkage of H."""

    percdamp: float
    damp_tries: int
    eigenvalues_clipped: bool
    dead_columns: int
    dead_zeroed: bool
    shrinkage: float


@dataclass(frozen=True)
class Path:
    """Columns in solving order, i64[K], and the factor of the damped Hessian with its columns so ordered."""

    order: Tensor
    factor: Factor


@dataclass
class Prepared:
    """What one Hessian gives to every linear that shares it.

    Attributes:
        importance: f32[K, K], the weights of the grid search; dead columns count nothing.
        dead: bool[K].
        zero_dead: whether the dead columns' weights are dropped.
        path: the order of solving and its factor.
        S: f32[K, K], the shrunk, damped H, columns where they were: what is minimised.
        shrinkage: share of the off-diagonal part that was dropped for want of tokens.
    """

    importance: Tensor
    dead: Tensor
    zero_dead: bool
    path: Path
    S: Tensor
    shrinkage: float

    def solve_right(self, B: Tensor) -> Tensor:
        """B S^-1 for B f32[N, K]."""
        order, U = self.path.order, self.path.factor.U
        out = torch.empty_like(B)
        out[:, order] = (B[:, order] @ U.T) @ U
        return out

    @cached_property
    def conditional(self) -> Path:
        """Another good order: the columns that the others can make up for least come first.

        That is, by decreasing variance given all other columns, ``1 / (S^-1)_jj``. ``path`` itself if S, rounded to
        fp32, cannot be factored again.
        """
        inverse_diagonal = torch.empty(len(self.S))
        inverse_diagonal[self.path.order] = self.path.factor.U.square().sum(0)
        order = torch.argsort(inverse_diagonal)
        U = upper_factor(self.S[order][:, order].double(), 0.0)
        return self.path if U is None else Path(order, replace(self.path.factor, U=U))


def prepare(H: Tensor, n_tokens: int, cfg: GPTQConfig) -> Prepared:
    """Make H f64[K, K] (mean of x x^T over ``n_tokens`` tokens; unchanged) fit for :func:`solve`."""
    H = H.clone()
    dead = dead_columns(H)
    H.diagonal()[dead] = H.diagonal().mean().clamp(min=1e-30)
    H, rho = shrink_to_diagonal(H, n_tokens)
    importance = H.float()
    importance.diagonal()[dead] = 0
    order = torch.argsort(H.diagonal(), descending=True) if cfg.act_order else torch.arange(H.shape[0])
    factor = inverse_factor(H[order][:, order], cfg.percdamp)
    # A channel that ample text never drove is dead for good; after little text it may just be rare: keep its weights.
    zero_dead = bool(dead.any()) and n_tokens >= 4 * H.shape[0]
    S = H.float()
    S.diagonal().add_(float(factor.percdamp * H.diagonal().mean()))
    return Prepared(importance, dead, zero_dead, Path(order, factor), S, rho)


def solve(
    W: Tensor, prepared: Prepared, scheme: QuantScheme, cfg: GPTQConfig, *, ends_apart: bool = False
) -> tuple[QTensor, GPTQReport]:
    """Quantize W so that ``tr((W_hat - W) H (W_hat - W)^T)`` is small.

    Args:
        W: f32[N, K], unchanged.
        prepared: from :func:`prepare`.
        scheme: the grid.
        cfg: grid search.
        ends_apart: see :func:`llmq.solvers.grid.search_grid`.

    Returns:
        The quantized matrix, and what had to be done to get it.
    """
    W = W.float().clone()
    if prepared.zero_dead:
        W[:, prepared.dead] = 0
    scale, zero = search_grid(W, prepared.importance, scheme, cfg.grid_steps, ends_apart=ends_apart)
    codes = round_with_feedback(W, prepared.path, scale, zero, scheme)
    factor = prepared.path.factor
    report = GPTQReport(
        factor.percdamp, factor.tries, factor.clipped, int(prepared.dead.sum()), prepared.zero_dead, prepared.shrinkage
    )
    return from_codes(codes, scale, zero, scheme), report


def round_with_feedback(W: Tensor, path: Path, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes f32[N, K] in the original column order. W f32[N, K]; scale, zero f32[N, G]."""
    K, order, U = W.shape[1], path.order, path.factor.U
    # Column-major working copies: the loop reads and writes whole columns.
    Wt = W.T[order].contiguous()  # [K, N], in solving order
    St = expand_groups(scale, K, scheme).T[order].contiguous()
    Zt = expand_groups(zero, K, scheme).T[order].contiguous()
    Q = torch.empty_like(Wt)
    for i1 in range(0, K, BLOCK):
        i2 = min(i1 + BLOCK, K)
        Err = torch.empty(i2 - i1, Wt.shape[1])  # [block, N], errors over their diagonal
        with one_thread():  # thousands of tiny operations, one after the other
            for i in range(i1, i2):
                w, s, z = Wt[i], St[i], Zt[i]
                q = round_to_grid(w, s, z, scheme.levels)
                Q[i] = q
                e = (w - (q - z) * s) / U[i, i]
                Wt[i + 1 : i2].addr_(U[i, i + 1 : i2], e, alpha=-1)
                Err[i - i1] = e
        Wt[i2:].sub_(matmul(U[i1:i2, i2:].T, Err))
    codes = torch.empty_like(Q)
    codes[order] = Q
    return codes.T.contiguous()
