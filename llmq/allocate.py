"""Bits where they matter: a scheme for each linear, so that the loss is least at a given size.

How much a linear matters is read off one backward pass: with all linears rounded, ``<dKL/dW, W_rounded - W>`` is the
linear's share of the divergence from the original model (to first order; mlx-lm's dynamic quantization asks the same).
Its divergence under another scheme is scaled by the squared rounding error. Choosing schemes is then a knapsack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.config import BITS, QuantScheme
from llmq.models.load import SourceModel
from llmq.plan import Matrix, Plan, memory_bytes
from llmq.report import Log
from llmq.solvers import rtn

# The rounding at which the divergence is measured: large enough to see, small enough for first order.
PROBE_BITS = 4
GROUP_SIZES = (32, 64, 128)
# Tokens of the backward pass, and tokens at once: the logits of a window are held in full, a few times over.
PROBE_TOKENS, PROBE_WINDOW = 2048, 256
# Most likely tokens whose probabilities are compared one by one; the rest of the vocabulary is one more outcome.
TOP = 256
# Largest number of sizes the knapsack tells apart; a matrix's size is rounded up to one of them.
BUCKETS = 40_000


@dataclass(frozen=True)
class Allocation:
    """The schemes chosen, by module, with what led to them.

    Attributes:
        schemes: of every linear.
        divergence: share of the KL divergence (nats a token) that each linear had at the probe's rounding.
        predicted: KL divergence expected of the chosen schemes under round-to-nearest; only its order is to be trusted.
    """

    schemes: dict[str, QuantScheme]
    divergence: dict[str, float]
    predicted: float


def read_plan(path: str | Path, linears: Sequence[Matrix]) -> dict[str, QuantScheme]:
    """Schemes by module from a JSON file: ``{"model.layers.0.mlp.down_proj": "w4g64", ...}``, or a report's.

    Raises:
        ValueError: not such a file, a scheme that cannot be read, a module that the model lacks; names it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--plan {path}: cannot be read as JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("linears"), list):
        found = {row["name"]: row["scheme"] for row in found["linears"]}
    if not isinstance(found, dict) or not found:
        raise ValueError(f'--plan {path}: expected an object of module names and schemes, as {{"...q_proj": "w4g64"}}')
    known = {m.name for m in linears}
    for name in found:
        if name not in known:
            raise ValueError(f"--plan {path}: the model has no linear {name!r}; one that it has is {min(known)}")
    return {name: QuantScheme.parse(str(text)) for name, text in found.items()}


def check_budget(source: SourceModel, plan: Plan, scheme: QuantScheme, target_bpw: float) -> None:
    """Raise ValueError when the smallest candidates need more than ``target_bpw``, or the model does not fit."""
    linears = plan.linears
    _check_memory(source, linears, plan.weights)
    weights = sum(m.weights for m in linears)
    least = 8 * sum(min(s for _, s in _sizes(m, scheme)) for m in linears) / weights
    if target_bpw < least:
        raise ValueError(
            f"--target-bpw {target_bpw:g} is below {least:.3f}, what {min(BITS)} bits in groups of {max(GROUP_SIZES)} "
            "take with their scales; ask for more"
        )


def allocate(
    source: SourceModel, linears: Sequence[Matrix], scheme: QuantScheme, target_bpw: float, tokens: Tensor, log: Log
) -> Allocation:
    """Choose a scheme for each of ``linears`` so that together they take at most ``target_bpw`` bits a weight.

    Args:
        source: the model; it is loaded whole, in fp32, with gradients of its linears.
        linears: with their shapes.
        scheme: says whether grids are symmetric.
        target_bpw: codes, scales and zeros counted, over the weights of ``linears``.
        tokens: i64[n, seqlen] calibration windows; the first ``PROBE_TOKENS`` tokens are used.
        log: gets a line of progress.

    Raises ValueError when even the smallest candidates take more (see :func:`check_budget`).
    """
    probe = QuantScheme(PROBE_BITS, 128, scheme.sym)
    windows = tokens[:, :PROBE_WINDOW][: max(1, PROBE_TOKENS // min(PROBE_WINDOW, tokens.shape[1]))]
    log(f"bits by module: {windows.numel()} tokens through the model and back, rounded to {probe}")
    divergence = divergences(source, linears, probe, windows)
    costs, sizes = [], []
    for m in linears:
        W = source.reader.tensor(f"{m.name}.weight").float()
        share = max(divergence[m.name], 0.0) / max(_squared_error(W, probe), 1e-30)
        candidates = _sizes(m, scheme)
        costs.append([share * _squared_error(W, s) for s, _ in candidates])
        sizes.append([size for _, size in candidates])
    budget = int(target_bpw * sum(m.weights for m in linears) / 8)
    chosen = knapsack(costs, sizes, budget)
    schemes = {m.name: _sizes(m, scheme)[c][0] for m, c in zip(linears, chosen, strict=True)}
    return Allocation(schemes, divergence, sum(c[i] for c, i in zip(costs, chosen, strict=True)))


def with_schemes(linears: Sequence[Matrix], schemes: Mapping[str, QuantScheme]) -> list[Matrix]:
    """``linears``, those named in ``schemes`` with their own scheme."""
    return [replace(m, scheme=schemes.get(m.name, m.scheme)) for m in linears]


def _sizes(m: Matrix, scheme: QuantScheme) -> list[tuple[QuantScheme, int]]:
    """(candidate scheme, bytes) of a matrix."""
    schemes = [QuantScheme(b, g, scheme.sym) for b in BITS for g in GROUP_SIZES]
    return [(s, replace(m, scheme=s).nbytes) for s in schemes]


def _squared_error(W: Tensor, scheme: QuantScheme) -> float:
    """|W_rounded - W|^2 under round-to-nearest, W f32[N, K]."""
    return float(torch.sum((rtn.solve(W, scheme).dequantize() - W) ** 2, dtype=torch.float64))


def divergences(
    source: SourceModel, linears: Sequence[Matrix], probe: QuantScheme, windows: Tensor
) -> dict[str, float]:
    """``<dKL/dW, W_rounded - W>`` of each linear, nats a token, at the model with all of them rounded to ``probe``.

    Args:
        windows: i64[n, t].
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        teacher = [_most_likely(_log_probabilities(model, w)) for w in windows]
    weights: dict[str, nn.Parameter] = {m.name: model.get_submodule(m.name).weight for m in linears}
    changes = {}
    for name, weight in weights.items():
        rounded = rtn.solve(weight.data, probe).dequantize()
        changes[name] = (rounded - weight.data).half()
        weight.data.copy_(rounded)
        weight.requires_grad_(True)
    for window, (log_p, ids) in zip(windows, teacher, strict=True):
        kl = divergence(log_p, _log_probabilities(model, window).gather(1, ids))
        kl.div(len(windows)).backward()  # type: ignore[no-untyped-call]
    shares = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        shares[name] = float(torch.sum(weight.grad * changes[name].float(), dtype=torch.float64))
        if not math.isfinite(shares[name]):
            raise ValueError(f"{name}: the divergence's gradient is not finite; the model overflows on this text")
    return shares


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    """f32[t, vocabulary] for a window i64[t]."""
    return torch.log_softmax(model(input_ids=window[None], use_cache=False).logits[0].float(), -1)


def _most_likely(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """(log probabilities f32[t, TOP], ids i64[t, TOP])."""
    values, ids = log_p.topk(min(TOP, log_p.shape[1] - 1), dim=1)
    return values, ids


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean KL(p || q), nats a token, over the outcomes given and "any other token"; never above the whole KL.

    Args:
        log_p, log_q: f32[t, k], log probabilities of the same k tokens.
    """
    rest_p, rest_q = ((1 - x.exp().sum(1)).clamp(min=1e-7) for x in (log_p, log_q))
    return ((log_p.exp() * (log_p - log_q)).sum(1) + rest_p * (rest_p.log() - rest_q.log())).mean()


def _check_memory(source: SourceModel, linears: Sequence[Matrix], weights: int) -> None:
    """Raise ValueError when the whole model and its gradients do not fit into this machine's memory."""
    vocabulary = int(source.config.get_text_config().vocab_size)
    need = 4 * weights + 6 * sum(m.weights for m in linears) + 4 * 4 * PROBE_WINDOW * vocabulary
    if need > memory_bytes():
        raise ValueError(
            f"--target-bpw needs the whole model and gradients in memory: {need / 2**30:.1f} GiB, and this machine has "
            f"{memory_bytes() / 2**30:.1f}; give the schemes with --plan"
        )


def knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One candidate an item so that the sizes stay within ``budget`` and the costs are least.

    Exact dynamic programming over sizes rounded up to ``budget / BUCKETS``.

    Args:
        costs, sizes: a row an item, a value a candidate.

    Raises:
        ValueError: even the smallest candidates do not fit; both numbers are in it.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise ValueError(f"the smallest candidates take {least} bytes, the budget is {budget}; ask for more")
    # What is above the smallest candidate is what competes: rounding up costs at most a bucket an item.
    extra = budget - least
    unit = max(1, extra // BUCKETS)
    room = extra // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    picks = []
    for cost, size in zip(costs, sizes, strict=True):
        steps = [-(-(s - min(size)) // unit) for s in size]
        options = torch.full((len(cost), room + 1), torch.inf, dtype=torch.float64)
        for i, (c, step) in enumerate(zip(cost, steps, strict=True)):
            if step <= room:
                options[i, step:] = best[: room + 1 - step] + c
        best, pick = options.min(0)
        picks.append((pick, steps))
    at, chosen = room, []
    for pick, steps in reversed(picks):
        i = int(pick[at])
        chosen.append(i)
        at -= steps[i]
    return chosen[::-1]
