"""Learned rounding of a block: which neighbour each weight goes to, chosen by the output of the whole block.

SignRound (arXiv 2309.05516) started from integers that a solver has made: ``W_hat = s m (clip(round(p + V)) - z)`` with
p the weight on its grid, V in [-0.5, 0.5] an offset for every weight and m a factor for every scale. V and m go down
the squared error of the block's output by the sign of its gradient, rounding taken as the identity, in steps that
shrink to 0. The error is that against the original block on the original model's hidden states, a token's as a share of
its own energy: that is how the norm behind the block sees it, and a first token a thousand times larger than the others
does not drown them. The best iterate on held-out windows is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blockwise import BlockCall, run_block
from llmq.products import fast_products, learning_linears
from llmq.qtensor import QTensor, centred, dequantize, expand_groups, from_codes, group_sums, storable_scale

# Linears with more bits keep their integers.
MOST_BITS = 3
# Iterations a block, and between two judgements on held-out windows.
ITERATIONS = 200
JUDGE_EVERY = 20
# Tokens of an iteration: so many windows are drawn.
BATCH_TOKENS = 1024
# The first step is a share of ITERATIONS of this; as steps shrink to 0, V and m can move half as far in all.
V_REACH, M_REACH = 0.5, 0.1
# How far from its code a weight may start. Error feedback has moved many weights past the border to the next code;
# started there they would all change in the first steps, and nothing would be left of the solver's work.
MARGIN = 0.3


@dataclass
class Rounded:
    """A linear whose rounding is learned.

    Attributes:
        name: its full name.
        start: as the solver left it.
        p: f32[N, K], each weight on its grid, moved to where it rounds to the solver's code.
        V: f32[N, K], offsets.
        m: f32[N, G], factors of the scales.
        zero: f32[N, G].
    """

    name: str
    start: QTensor
    p: Tensor
    V: Tensor
    m: Tensor
    zero: Tensor

    @classmethod
    def of(cls, name: str, start: QTensor, W: Tensor) -> Rounded:
        """From the solver's integers and the original weights W f32[N, K]."""
        K, scheme = W.shape[1], start.scheme
        s = start.scale.float()
        zero = torch.full(s.shape, float(scheme.mid)) if start.zero is None else start.zero.float()
        q = start.q.float()
        p = W / expand_groups(s, K, scheme) + expand_groups(zero, K, scheme)
        p = torch.minimum(torch.maximum(p, q - MARGIN), q + MARGIN)
        return cls(name, start, p, torch.zeros_like(W), torch.ones_like(s), zero)

    def codes(self) -> Tensor:
        """f32[N, K], whole numbers."""
        return (self.p + self.V).round_().clamp_(0, self.start.scheme.levels - 1)

    def scale(self) -> Tensor:
        """f32[N, G], as fp16 holds it."""
        return storable_scale(self.start.scale.float() * self.m)

    def weight(self) -> Tensor:
        """W_hat, f32[N, K]."""
        scheme = self.start.scheme
        return dequantize(self.codes(), self.scale(), None if scheme.sym else self.zero, scheme)

    def descend(self, dW: Tensor, share: float) -> None:
        """One step by the signs of dL/dV and dL/dm, from dL/dW_hat f32[N, K]; ``share`` of the first step's length."""
        if not torch.isfinite(dW).all():
            raise ValueError(f"{self.name}: the gradient of its rounding is not finite")
        K, scheme = dW.shape[1], self.start.scheme
        s = self.start.scale.float() * self.m
        dm = group_sums(centred(self.codes(), self.zero, scheme).mul_(dW), scheme) * self.start.scale.float()
        inside = self.p + self.V
        inside = (inside >= -0.5) & (inside <= scheme.levels - 0.5)
        dV = dW * expand_groups(s.sign(), K, scheme) * inside
        self.V.sub_(dV.sign_(), alpha=V_REACH / ITERATIONS * share).clamp_(-0.5, 0.5)
        self.m.sub_(dm.sign_(), alpha=M_REACH / ITERATIONS * share)

    def result(self) -> QTensor:
        """The matrix as it stands."""
        return from_codes(self.codes(), self.scale(), self.zero, self.start.scheme)


@dataclass(frozen=True)
class Windows:
    """What the block is fed in the quantized model and what it gave in the original one, f32[1, t, hidden] each."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    n_held: int


@fast_products()
def learn_rounding(
    name: str,
    block: nn.Module,
    call: BlockCall,
    windows: Windows,
    solved: dict[str, tuple[QTensor, Tensor]],
    *,
    seed: int,
    seconds: float,
) -> tuple[dict[str, QTensor], dict[str, Any]]:
    """Learn the rounding of a block's linears together.

    Args:
        name: of the block.
        block: with the weights that stand for the solved integers; unchanged.
        call: what the decoder passes to it.
        windows: the last ``n_held`` judge, at least one.
        solved: local name of a linear -> (its integers, the original weights f32[N, K]).
        seed: of the windows drawn.
        seconds: when to stop; a run that the clock does not stop is reproducible.

    Returns:
        The linears that changed (none when the held-out loss did not fall), and the report with that loss before and
        after.

    Raises:
        ValueError: something is not finite; names the linear.
    """
    began = time.perf_counter()
    linears = {local: Rounded.of(f"{name}.{local}", q, W) for local, (q, W) in solved.items()}
    n_train = len(windows.inputs) - windows.n_held
    judges = range(n_train, len(windows.inputs))
    learner = _Learner(name, block, call, windows, linears)
    start = least = learner.loss(judges)
    best: dict[str, QTensor] = {}
    generator = torch.Generator().manual_seed(seed)
    batch = max(1, BATCH_TOKENS // windows.inputs[0].shape[1])
    taken, clocked = 0, False
    for taken in range(1, ITERATIONS + 1):
        drawn = torch.randperm(n_train, generator=generator)[:batch].tolist()
        by_clock = (time.perf_counter() - began) / max(seconds, 1e-9)
        clocked |= by_clock > taken / ITERATIONS
        learner.step(drawn, max(0.0, 1 - (by_clock if by_clock > taken / ITERATIONS else (taken - 1) / ITERATIONS)))
        late = time.perf_counter() - began > seconds
        if late or taken % JUDGE_EVERY == 0 or taken == ITERATIONS:
            loss = learner.loss(judges)
            if loss < least:
                least, best = loss, {local: linear.result() for local, linear in linears.items()}
        if late:
            break
    report = {"block": name, "loss_before": start, "loss_after": least, "iterations": taken}
    report["stopped_by_clock"] = clocked
    return best, report | {"seconds": round(time.perf_counter() - began, 2)}


class _Learner:
    """Loss of the block's output and steps down it."""

    def __init__(
        self, name: str, block: nn.Module, call: BlockCall, windows: Windows, linears: dict[str, Rounded]
    ) -> None:
        self.name, self.block, self.call, self.windows, self.linears = name, block, call, windows, linears

    def _error(self, i: int, weights: dict[str, Tensor]) -> Tensor:
        """Mean over the tokens of window i."""
        y, target = run_block(self.block, weights, self.windows.inputs[i], self.call).float(), self.windows.targets[i]
        energy = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((y - target).square().sum(-1) / energy).mean()

    def _weights(self) -> dict[str, Tensor]:
        return {f"{local}.weight": linear.weight() for local, linear in self.linears.items()}

    @torch.no_grad()
    def loss(self, which: Sequence[int]) -> float:
        """Mean over windows."""
        weights = self._weights()
        loss = sum(float(self._error(i, weights)) for i in which) / len(which)
        if loss != loss:
            raise ValueError(f"{self.name}: its output is not a number while rounding is learned")
        return loss

    def step(self, which: Sequence[int], share: float) -> None:
        """One step on these windows."""
        weights = {key: W.requires_grad_() for key, W in self._weights().items()}
        with torch.enable_grad(), learning_linears():
            for i in which:
                (self._error(i, weights) / len(which)).backward()  # type: ignore[no-untyped-call]
        for linear, W in zip(self.linears.values(), weights.values(), strict=True):
            assert W.grad is not None
            linear.descend(W.grad, share)
