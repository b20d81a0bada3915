"""Attention that leaves out what its mask hides: a sliding window of a long text is computed as the window it is.

torch computes all products of a query with all keys and then hides some. Taken a piece of queries at a time, keys that
no query of the piece sees are not read at all; the numbers are the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries of a piece: narrower pieces hide more, and multiply worse.
PIECE = 256
# Share of the products that must be left out, for the pieces to pay.
LEAST_HIDDEN = 0.2


def takes(q: Tensor, k: Tensor, mask: Any) -> bool:
    """Whether this is a call worth looking at: boolean mask [..., Tq, Tk], several pieces of queries, no gradient."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    plain = isinstance(mask, Tensor) and mask.dtype == torch.bool and q.dim() == 4 and q.is_cpu and not learns
    return plain and mask.shape[-2:] == (q.shape[-2], k.shape[-2]) and q.shape[-2] >= 2 * PIECE


def seen_keys(mask: Tensor) -> list[tuple[int, int]] | None:
    """(first, end) of the keys that each piece of queries sees; None where pieces do not pay or one sees nothing.

    Args:
        mask: bool[..., Tq, Tk], True where a query sees a key.
    """
    any_of = mask.flatten(0, -3).any(0) if mask.dim() > 2 else mask
    Tq, Tk = any_of.shape
    found, done = [], 0
    for piece in any_of.split(PIECE):
        columns = piece.any(0).nonzero()
        if not len(columns):
            return None
        first, end = int(columns[0]), int(columns[-1]) + 1
        found.append((first, end))
        done += len(piece) * (end - first)
    return found if done <= (1 - LEAST_HIDDEN) * Tq * Tk else None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """``F.scaled_dot_product_attention(q, k, v, mask, **options)`` for q [b, h, Tq, d]; k, v [b, h_kv, Tk, d]."""
    ranges = seen_keys(mask)
    if ranges is None:
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    # Laid out as torch's own result, a token's heads side by side: what follows needs no copy.
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    for i, (first, end) in enumerate(ranges):
        at, seen = slice(i * PIECE, (i + 1) * PIECE), slice(first, end)
        part = mask[..., at, seen]
        out[:, :, at] = F.scaled_dot_product_attention(q[:, :, at], k[:, :, seen], v[:, :, seen], part, **options)
    return out
