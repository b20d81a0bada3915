"""How much each token of the calibration text counts for each linear: the squared gradient of the model's own loss.

To second order a change dy of a linear's outputs moves the model's predictions by KL = 1/2 E[(g dy)^2] summed over the
tokens, g being the gradient of log p at the outputs for a next token drawn from the model itself (the Fisher matrix).
With the outputs of a token taken as alike, each token's squared error counts as |g|^2 (a coarse form of GuidedQuant,
arXiv 2505.07004). A layer's own error treats all tokens alike; what follows does not: all later tokens attend to the
first one, and a norm behind the layer makes as much of a small output as of a large one.

The weights taken are |g|^(2 POWER). With |g|^2 itself a few tokens out of a thousand outweigh all others, and what is
fitted to these few is not what other texts need.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.blockwise import BlockCall, Weights, block_inputs, run_block
from llmq.distill import Head
from llmq.memory import current_rss
from llmq.models.load import SourceModel, materialize
from llmq.products import fast_products
from llmq.report import Log, duration, size

# Windows whose block inputs are held in memory together, bytes at most: all blocks are read once for them, forth and
# back.
HELD_BYTES = 512 << 20
# Share of the positions whose predictions are drawn; the head is most of the work where the vocabulary is large.
POSITIONS = 0.25
# Of |g|^2; see above and docs/QUALITY.md.
POWER = 0.5


@contextmanager
def _gradients(block: nn.Module, groups: Sequence[Sequence[str]], found: dict[str, Tensor]) -> Iterator[None]:
    """Within the context, a backward pass adds |dL/dy|^2 of each group's outputs to ``found``, f32[t] by first name."""

    def listen(name: str, module: nn.Module) -> Any:
        def hear(dy: Tensor) -> None:
            square = dy.detach().reshape(-1, dy.shape[-1]).square().sum(1)
            found[name] = found[name] + square if name in found else square

        return module.register_forward_hook(lambda _m, _args, y: y.register_hook(hear) and None)

    with ExitStack() as stack:
        for group in groups:
            for local in group:
                stack.callback(listen(group[0], block.get_submodule(local)).remove)
        yield


@fast_products()
def token_weights(source: SourceModel, tokens: Tensor, *, seed: int, log: Log) -> list[Weights]:
    """For each block, for each group of linears with one input (by its first name): f32[n, seqlen], mean 1.

    Args:
        source: the original model.
        tokens: i64[n, seqlen] windows of text.
        seed: of the tokens that are drawn.
        log: gets lines of progress.

    Raises:
        ValueError: a gradient is not finite; names the block.
    """
    began = time.perf_counter()
    hidden, calls = block_inputs(source, tokens)
    n, seqlen = tokens.shape
    at_once = max(1, HELD_BYTES // (len(source.block_names) * hidden[0].numel() * 4))
    generator = torch.Generator().manual_seed(seed)
    found: list[Weights] = [{} for _ in source.block_names]
    head = Head(source)
    for start in range(0, n, at_once):
        some = hidden[start : start + at_once]
        inputs = _forward(source, some, calls)
        last = inputs.pop()
        with head.loaded():
            dys = [_head_gradient(head, h, generator) for h in last]
        for i in reversed(range(len(source.block_names))):
            for w, here in enumerate(_squares(source, i, inputs.pop(), dys, calls[i])):
                for name, square in here.items():
                    found[i].setdefault(name, torch.zeros(n, seqlen))[start + w] = square.pow(POWER)
        done, spent = min(start + at_once, n), time.perf_counter() - began
        log(
            f"  what tokens count: window {done}/{n}  left {duration(spent / done * (n - done))}  "
            f"memory {size(current_rss())}"
        )
    return [{name: t / t.mean().clamp(min=1e-30) for name, t in weights.items()} for weights in found]


def _squares(
    source: SourceModel, i: int, inputs: list[Tensor], dys: list[Tensor], call: BlockCall
) -> Iterator[dict[str, Tensor]]:
    """|dL/dy|^2 of each group of block i, f32[t], window by window; ``dys`` goes from its outputs to its inputs."""
    name = source.block_names[i]
    with materialize(source.block(i), name, source.reader) as block:
        for w, x in enumerate(inputs):
            here: dict[str, Tensor] = {}
            with _gradients(block, source.groups, here):
                dys[w] = _backward(block, x, dys[w], call)
            for local, square in here.items():
                if not torch.isfinite(square).all():
                    raise ValueError(f"{name}.{local}: the gradient at its output is not finite")
            yield here


@torch.no_grad()
def _forward(source: SourceModel, hidden: list[Tensor], calls: list[BlockCall]) -> list[list[Tensor]]:
    inputs = [hidden]
    for i, name in enumerate(source.block_names):
        with materialize(source.block(i), name, source.reader) as block:
            inputs.append([run_block(block, {}, h, calls[i]) for h in inputs[-1]])
    return inputs


def _backward(block: nn.Module, x: Tensor, dy: Tensor, call: BlockCall) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = run_block(block, {}, x, call)
        return torch.autograd.grad(y, x, dy)[0]


def _head_gradient(head: Head, h: Tensor, generator: torch.Generator) -> Tensor:
    """d/dh of the log-likelihood of tokens drawn at some positions, f32[1, t, hidden]."""
    t = h.shape[1]
    positions = torch.randperm(t, generator=generator)[: max(1, round(POSITIONS * t))].sort()[0]
    dy = torch.zeros_like(h)
    for rows in head.chunks(len(positions)):
        x = h[0, positions[rows]].detach().requires_grad_()
        with torch.enable_grad():
            logp = head.logits(x).log_softmax(-1)
        drawn = _draw(logp.detach(), generator)
        dy[0, positions[rows]] = torch.autograd.grad(logp.gather(1, drawn[:, None]).sum(), x)[0]
    return dy


def _draw(logp: Tensor, generator: torch.Generator) -> Tensor:
    """i64[t]: a token for each row of log-probabilities f32[t, vocabulary]. One random number a row, not one a word."""
    up_to = logp.exp().cumsum(-1)
    at = torch.rand(len(logp), 1, generator=generator) * up_to[:, -1:]
    return torch.searchsorted(up_to, at)[:, 0].clamp(max=logp.shape[1] - 1)
