"""Search of scale and zero point of each group under the Hessian of the layer.

For every row and group the grid is chosen that makes ``d H_gg d^T`` smallest, d being the rounding error of the group's
weights and H_gg the group's own block of the Hessian: errors count as much as they move the layer's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme
from llmq.parallel import side_by_side
from llmq.qtensor import minmax_grid, range_grid, round_to_grid, storable_scale

# The smallest share of the full range that the search tries, by bits: the fewer the codes, the more clipping pays.
MIN_RANGE = {8: 0.9, 4: 0.6, 3: 0.5, 2: 0.35}
# Shrink factors tried for each end of the range where the two ends shrink apart.
END_STEPS = 8
# Rows searched at once: their temporaries then fit a core's second-level cache.
ROWS = 256


def search_grid(
    W: Tensor, H: Tensor, scheme: QuantScheme, steps: int, *, ends_apart: bool = False
) -> tuple[Tensor, Tensor]:
    """Grid of every group of W, found under H.

    Tries ``steps`` shrink factors of the group's range (for symmetric grids with either sign of the scale), refits the
    best one by least squares given its codes, and keeps whatever gave the least error; the min-max grid is always among
    the candidates, so the result is never worse than it.

    Args:
        W: f32[N, K].
        H: f64 or f32 [K, K].
        scheme: bits, group size, symmetry.
        steps: shrink factors tried; 0 returns the min-max grid.
        ends_apart: try END_STEPS factors for each end of an asymmetric range instead, the two independent: another
            candidate for those who keep the better of several, as what is best for a group alone need not be for a row.

    Returns:
        scale f32[N, G] (fp16-representable), zero f32[N, G] (whole numbers).
    """
    if steps == 0:
        return minmax_grid(W, scheme)
    slices = scheme.slices(W.shape[1])
    blocks = [H[s, s].float().contiguous() for s in slices]
    shares = _shares(scheme, steps, ends_apart)

    def search_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            _search_group(rows[:, s].contiguous(), Hg, scheme, shares) for s, Hg in zip(slices, blocks, strict=True)
        ]
        return torch.stack([scale for scale, _ in found], 1), torch.stack([zero for _, zero in found], 1)

    parts = side_by_side(search_rows, W.split(ROWS))
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _error(w: Tensor, scale: Tensor, zero: Tensor, levels: int, Hg: Tensor) -> Tensor:
    """Error f32[n] under Hg of rounding ``w`` f32[n, g] to grids given per row."""
    s, z = scale[:, None], zero[:, None]
    d = round_to_grid(w, s, z, levels).sub_(z).mul_(s).sub_(w)
    return (d @ Hg).mul_(d).sum(1)


def _shares(scheme: QuantScheme, steps: int, ends_apart: bool) -> list[tuple[float, float]]:
    """Shares of the range's lower and upper end that are tried."""
    least = MIN_RANGE[scheme.bits]
    if ends_apart:
        ends = [1.0 - (1.0 - least) * i / END_STEPS for i in range(END_STEPS)]
        return [(a, b) for a in ends for b in ends]
    return [(share, share) for share in (1.0 - (1.0 - least) * i / steps for i in range(steps))]


def _search_group(
    w: Tensor, Hg: Tensor, scheme: QuantScheme, shares: list[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    """Best (scale f32[n], zero f32[n]) for the rows of one group, w f32[n, g]."""
    levels = scheme.levels
    lo, hi = torch.aminmax(w, dim=1)
    best_scale, best_zero = range_grid(lo, hi, scheme)
    best = _error(w, best_scale, best_zero, levels, Hg)

    def keep_better(scale: Tensor, zero: Tensor) -> None:
        error = _error(w, scale, zero, levels, Hg)
        won = error < best
        for kept, new in ((best, error), (best_scale, scale), (best_zero, zero)):
            torch.where(won, new, kept, out=kept)

    for below, above in shares:
        scale, zero = range_grid(lo * below, hi * above, scheme)
        keep_better(scale, zero)
        if scheme.sym:
            keep_better(-scale, zero)
    for _ in range(2):
        keep_better(_refit(w, best_scale, best_zero, levels, Hg), best_zero.clone())
    return best_scale, best_zero


def _refit(w: Tensor, scale: Tensor, zero: Tensor, levels: int, Hg: Tensor) -> Tensor:
    """The scale that is best for the codes that ``scale`` gives: c H w / c H c per row, c the centred codes."""
    c = round_to_grid(w, scale[:, None], zero[:, None], levels) - zero[:, None]
    cH = c @ Hg
    below = (cH * c).sum(1)
    fitted = torch.where(below > 0, (cH * w).sum(1) / below.clamp(min=1e-30), scale)
    return storable_scale(fitted)
