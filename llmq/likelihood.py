"""The cost of every token of a text under one or several models, and how far each is from a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.kv_feed import KVFeed
from llmq.logits import WindowLogits
from llmq.products import fast_products
from llmq.score import Score

_CHUNK_LOGITS = 1 << 25  # logits held at once: 128 MB in fp32 for each model and each temporary
_PROBE_TOKENS = 32  # tokens on which the short way to the logits is compared with the model's own

Progress = Callable[[int, int, float], None]  # windows done, windows in all, perplexity so far


def _token_costs(
    sides: Sequence[WindowLogits], base: WindowLogits | None, ids: Tensor
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Chunks; of each side (nll,) or, with a reference ``base``, (nll, reference nll, kl, agree): f64[t] each.

    Log-softmax is taken in fp32 (its error, about 1e-6 nats, is far below any figure shown), sums in fp64.
    """
    states = [side.states(ids)[:-1] for side in (*sides, *([] if base is None else [base]))]
    step = max(1, _CHUNK_LOGITS // sides[0].vocab)
    for a in range(0, len(ids) - 1, step):
        target = ids[1:][a : a + step, None]
        rows: list[tuple[Tensor, ...]] = []
        if base is not None:
            p = base.logits(states[-1][a : a + step]).log_softmax(dim=-1)
            weight, most_likely, base_nll = p.exp(), p.argmax(dim=-1), -p.gather(-1, target)[:, 0].double()
        for side, s in zip(sides, states, strict=False):
            q = side.logits(s[a : a + step]).log_softmax(dim=-1)
            rows.append((-q.gather(-1, target)[:, 0].double(),))
            if base is not None:
                agree = (q.argmax(dim=-1) == most_likely).double()
                kl = q.neg_().add_(p).mul_(weight).sum(dim=-1, dtype=torch.float64)
                rows[-1] += (base_nll, kl, agree)
        yield rows


def score(
    model: Any, windows: Tensor, *, reference: Any = None, progress: Progress | None = None, kv: KVFeed | None = None
) -> Score:
    """Score ``windows`` i64[W, seqlen]; with a ``reference`` also KL(reference || model) and top-1 agreement.

    ``kv`` sends the model's windows through a quantized cache, the reference's never; None: 16 bits.

    Raises ValueError if the vocabularies differ or a model's likelihoods are not finite.
    """
    return score_together([model], windows, reference=reference, progress=progress, kv=kv)[0]


@torch.inference_mode()
@fast_products()
def score_together(
    models: Sequence[Any],
    windows: Tensor,
    *,
    reference: Any = None,
    progress: Progress | None = None,
    kv: KVFeed | None = None,
) -> list[Score]:
    """:func:`score` of several models, the reference's logits made once for all; ``progress`` is the first one's."""
    probe = windows[0, :_PROBE_TOKENS]
    sides = [WindowLogits(m.eval(), probe, kv) for m in models]
    base = None if reference is None else WindowLogits(reference.eval(), probe, None)
    for side in sides:
        if base is not None and side.vocab != base.vocab:
            raise ValueError(
                f"the model has {side.vocab} logits and the reference {base.vocab}; "
                "KL needs one vocabulary: use the model it was made from as the reference"
            )
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in sides]
    for i, ids in enumerate(windows):
        chunks = list(_token_costs(sides, base, ids))
        for k, of_side in enumerate(rows):
            of_side.append(tuple(map(torch.cat, zip(*(chunk[k] for chunk in chunks), strict=True))))
            if not all(bool(column.isfinite().all()) for column in of_side[-1]):
                which = f" of model {k}" if len(sides) > 1 else ""
                raise ValueError(
                    f"window {i}{which}: a likelihood is not finite; the model overflows or its weights are damaged"
                )
        if progress:
            progress(i + 1, len(windows), math.exp(sum(float(r[0].mean()) for r in rows[0]) / len(rows[0])))
    notes = () if base is None or not base.note else (base.note,)
    return [_score_of(r, side, notes) for r, side in zip(rows, sides, strict=True)]


def _score_of(rows: list[tuple[Tensor, ...]], side: WindowLogits, notes: tuple[str, ...]) -> Score:
    names = ("nll", "reference_nll", "token_kl", "token_agree")
    columns: dict[str, Any] = {k: torch.stack(c) for k, c in zip(names, zip(*rows, strict=True), strict=False)}
    return Score(**columns, notes=(side.note, *notes) if side.note else notes, kv_cache=side.memory)
