"""Round to nearest: the shape of a solver, and the yardstick that every other solver must beat."""

from __future__ import annotations

from torch import Tensor

from llmq.config import QuantScheme
from llmq.qtensor import QTensor, minmax_grid, quantize
from llmq.solvers.grid import search_grid


def solve(W: Tensor, scheme: QuantScheme, H: Tensor | None = None, *, grid_steps: int = 0) -> QTensor:
    """Round W f32[N, K] to the nearest code of its grid.

    Args:
        W: f32[N, K].
        scheme: the grid's scheme.
        H: f64[K, K]; with ``grid_steps`` > 0 the range of each group is clipped where that lowers the error under H.
        grid_steps: clipping ranges tried; 0: the plain min-max grid, which needs no data.
    """
    scale, zero = minmax_grid(W, scheme) if H is None else search_grid(W, H, scheme, grid_steps)
    return quantize(W, scale, zero, scheme)
