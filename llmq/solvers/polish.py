"""Polishing integers and scales that a solver has made: exact steps down the layer's loss.

Each function lowers (or keeps) the loss of every row, whatever it is given; both know that codes are bounded, which
error feedback does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.parallel import one_thread, rows_side_by_side
from llmq.products import matmul
from llmq.qtensor import MAX_SCALE, centred, expand_groups, group_sums, round_to_grid, storable_scale
from llmq.solvers.objective import Objective

# Columns whose changes are kept inside a panel before the rest of the residual sees them.
BLOCK = 128
# Ridge of the scales' normal equations, as a share of their mean diagonal: a group of few distinct codes is singular.
RIDGE = 1e-6


def refit_scales(codes: Tensor, scale: Tensor, zero: Tensor, objective: Objective, scheme: QuantScheme) -> Tensor:
    """All scales of every row at their optimum given the integers, rounded to fp16 one after the other.

    With C the centred codes, ``A s = b`` where ``A_gh = c_g^T S_gh c_h`` and ``b_g = c_g^T (S w + r)_g`` (the second
    stage of arXiv 2602.02126, in closed form). Each rounding's error is spread over the scales that are still free, as
    GPTQ does with columns. Rows that would lose keep their scales.

    Args:
        codes: f32[N, K] whole numbers.
        scale, zero: f32[N, G].
        objective: of this matrix.
        scheme: its grid.

    Returns:
        scale f32[N, G], fp16-representable.
    """
    # Thousands of small matrices: split over its threads by torch, one after the other takes several times as long.
    return rows_side_by_side(
        lambda n: _refit_rows(codes[n], scale[n], zero[n], objective.of_rows(n), scheme), len(codes)
    )


def _refit_rows(codes: Tensor, scale: Tensor, zero: Tensor, objective: Objective, scheme: QuantScheme) -> Tensor:
    N, K = codes.shape
    C = centred(codes, zero, scheme)
    slices = scheme.slices(K)
    A = torch.empty(N, len(slices), len(slices), dtype=torch.float64)
    for g, s in enumerate(slices):
        A[:, g] = group_sums((C[:, s] @ objective.S[s]) * C, scheme, torch.float64)
    b = group_sums(C * objective.pull, scheme, torch.float64)

    def loss(s: Tensor) -> Tensor:
        """Of every row, f64[N], up to a constant."""
        return ((A @ s[:, :, None])[:, :, 0] * s - 2 * b * s).sum(1)

    # Never 0 on the diagonal: a group of zeros only takes part through the ridge, and keeps its scale.
    ridge = A.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30) * RIDGE
    new = _rounded_in_turn(A + torch.diag_embed(ridge.expand_as(b)), b + ridge * scale)
    return torch.where((loss(new.double()) < loss(scale.double()))[:, None], new, scale)


def _rounded_in_turn(A: Tensor, b: Tensor) -> Tensor:
    """fp16-representable s f32[N, G] near the solution of A s = b, A f64[N, G, G] positive definite."""
    s = torch.linalg.solve(A, b)
    # A^-1 = U^T U with U upper: row g of U is how an error of s_g is best made good by those that follow.
    U = torch.linalg.cholesky(torch.linalg.inv(A), upper=True)
    out = torch.empty(s.shape, dtype=torch.float32)
    for g in range(s.shape[1]):
        out[:, g] = storable_scale(s[:, g].float().clamp(-MAX_SCALE, MAX_SCALE))
        e = (s[:, g] - out[:, g].double()) / U[:, g, g]
        s[:, g + 1 :] -= e[:, None] * U[:, g, g + 1 :]
    return out


def descend(
    codes: Tensor, scale: Tensor, zero: Tensor, objective: Objective, scheme: QuantScheme, sweeps: int = 1
) -> Tensor:
    """Coordinate descent over the integers: each in turn goes to its best value while the others stand still.

    The minimum over one weight is at ``w^_j + r_j / S_jj`` with r the descent direction; a quadratic's best integer is
    the nearest one, so the loss never rises.

    Args:
        codes: f32[N, K] whole numbers; unchanged.
        scale, zero: f32[N, G].
        objective: of this matrix; its S has a positive diagonal.
        scheme: the grid.
        sweeps: passes over all columns.

    Returns:
        codes f32[N, K].
    """
    K = codes.shape[1]
    S = objective.S
    Q = codes.T.contiguous()
    St, Zt = (expand_groups(x, K, scheme).T.contiguous() for x in (scale, zero))
    What = (Q - Zt) * St
    for _ in range(sweeps):
        Rt = objective.descent(What.T).T.contiguous()
        for i1 in range(0, K, BLOCK):
            i2 = min(i1 + BLOCK, K)
            delta = _descend_panel(Q, What, Rt[i1:i2].clone(), St, Zt, S[i1:i2, i1:i2], i1, scheme.levels)
            Rt.sub_(matmul(S[:, i1:i2], delta))
    return Q.T.contiguous()


def _descend_panel(
    Q: Tensor, What: Tensor, R: Tensor, St: Tensor, Zt: Tensor, S: Tensor, start: int, levels: int
) -> Tensor:
    """Move the columns ``start ..`` of a panel in turn, in place; returns their changes f32[panel, N]."""
    delta = torch.empty_like(R)
    with one_thread():
        for j in range(R.shape[0]):
            at = start + j
            q = round_to_grid(What[at] + R[j] / S[j, j], St[at], Zt[at], levels)
            w = (q - Zt[at]) * St[at]
            torch.sub(w, What[at], out=delta[j])
            Q[at], What[at] = q, w
            R[j + 1 :].addr_(S[j + 1 :, j], delta[j], alpha=-1)
    return delta
