"""End-to-end tuning of the scales: the quantized model is drawn towards the original one's predictions.

With the integers fixed, W_hat = s (q - z) is linear in the scales: ``dL/ds`` of a group is the sum of
``dL/dW_hat (q - z)`` over it. L is KL(original || quantized) over the original's most likely tokens and "any other
token" (the last phase of EfficientQAT, arXiv 2407.11062; mlx-lm's DWQ is akin). Forward and backward go block by block,
weights dequantized on the way; the best iterate on held-out windows, scales rounded to fp16, is what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.allocate import divergence
from llmq.blockwise import BlockCall, block_inputs, run_block
from llmq.checkpoint import CheckpointWriter, matrix_from_tensors, matrix_layout
from llmq.distill import LOGITS_BYTES, Head, Teacher
from llmq.models.load import SourceModel
from llmq.plan import Matrix
from llmq.products import fast_linears
from llmq.qtensor import QTensor, centred, dequantize, from_codes, group_sums, storable_scale
from llmq.report import Log, current_rss, duration, size

# Tokens of a step. Longer windows are cut: more steps on the same text bring more than longer context does.
PIECE = 512
# Share of a piece's positions whose predictions are compared; with a large vocabulary the head is most of the work.
POSITIONS = 0.5
# Adam's step as a share of each scale, at the start; it falls linearly to 0.
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.95)
# Passes over the pieces, unless the clock ends them before, and the least number of steps between two judgements.
EPOCHS = 4
JUDGE_EVERY = 16


@dataclass
class Linear:
    """A quantized linear whose scales are multiplied by ``factor`` f32[N, G]."""

    name: str
    start: QTensor
    factor: Tensor = field(init=False)
    zero: Tensor = field(init=False)

    def __post_init__(self) -> None:
        scale, zero = self.start.scale, self.start.zero
        self.factor = torch.ones(scale.shape)
        self.zero = torch.full(scale.shape, float(self.start.scheme.mid)) if zero is None else zero.float()

    def scale(self, *, stored: bool) -> Tensor:
        """f32[N, G]; ``stored``: as fp16 holds it."""
        scale = self.start.scale.float() * self.factor
        return storable_scale(scale) if stored else scale

    def weight(self, *, stored: bool) -> Tensor:
        """W_hat, f32[N, K]."""
        return dequantize(self.start.q, self.scale(stored=stored), self.start.zero, self.start.scheme)

    def gradient(self, dW: Tensor) -> Tensor:
        """dL/dfactor f32[N, G] from dL/dW_hat f32[N, K]."""
        t = self.start
        return group_sums(centred(t.q, self.zero, t.scheme).mul_(dW), t.scheme) * t.scale.float()

    def result(self) -> QTensor:
        """The matrix with its scales as they will be stored."""
        return from_codes(self.start.q.float(), self.scale(stored=True), self.zero, self.start.scheme)


@dataclass
class Block:
    """A decoder block as its shard holds it: linears and other parameters by local name."""

    name: str
    module: nn.Module
    call: BlockCall
    linears: dict[str, Linear]
    kept: dict[str, Tensor]

    @torch.no_grad()
    def run(self, x: Tensor, *, stored: bool) -> Tensor:
        """Output for x f32[1, t, hidden]."""
        weights = {f"{name}.weight": m.weight(stored=stored) for name, m in self.linears.items()}
        y = run_block(self.module, self.kept | weights, x, self.call)
        if not torch.isfinite(y).all():
            raise ValueError(f"{self.name}: its output is not finite while scales are tuned")
        return y

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """dL/dx from dL/dy, f32[1, t, hidden]; leaves dL/dfactor in the factors' ``grad``."""
        weights = {f"{name}.weight": m.weight(stored=False).requires_grad_() for name, m in self.linears.items()}
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = run_block(self.module, self.kept | weights, x, self.call)
            dx, *grads = torch.autograd.grad(y, [x, *weights.values()], dy)
        for m, dW in zip(self.linears.values(), grads, strict=True):
            m.factor.grad = m.gradient(dW)
            if not torch.isfinite(m.factor.grad).all():
                raise ValueError(f"{m.name}: the gradient of its scales is not finite")
        return dx


class Student:
    """The quantized model: its divergence from the teacher on single pieces of text, and the gradient."""

    def __init__(self, blocks: Sequence[Block], head: Head, teacher: Teacher) -> None:
        self.blocks, self.head, self.teacher = blocks, head, teacher
        self.linears = [m for block in blocks for m in block.linears.values()]

    def hidden(self, piece: int, *, stored: bool) -> list[Tensor]:
        """Input of every block and, last, the output of the last one, f32[1, t, hidden]."""
        hidden = [self.teacher.entering[piece]]
        for block in self.blocks:
            hidden.append(block.run(hidden[-1], stored=stored))
        return hidden

    def loss(self, pieces: Sequence[int]) -> float:
        """Mean KL, nats a position, with the scales as they will be stored."""
        losses = []
        for piece in pieces:
            h = self.hidden(piece, stored=True)[-1]
            losses.append(self._head(h, piece, None))
        return sum(losses) / len(losses)

    def backward(self, piece: int) -> float:
        """KL of a piece; its gradient is left in the factors."""
        hidden = self.hidden(piece, stored=False)
        h = hidden.pop()
        dy = torch.zeros_like(h)
        loss = self._head(h, piece, dy)
        for block in reversed(self.blocks):
            dy = block.backward(hidden.pop(), dy)
        return loss

    def _head(self, h: Tensor, piece: int, dy: Tensor | None) -> float:
        """KL from outputs h f32[1, t, hidden] of the last block; its gradient goes to ``dy``, if given, like h."""
        positions, (log_p, ids) = self.teacher.positions[piece], self.teacher.of(piece)
        total = 0.0
        for rows in self.head.chunks(len(positions)):
            x = h[0, positions[rows]].requires_grad_(dy is not None)
            with torch.set_grad_enabled(dy is not None):
                logits = self.head.logits(x)
                log_q = logits.gather(1, ids[rows]) - logits.logsumexp(1, keepdim=True)
                kl = divergence(log_p[rows], log_q) * (len(x) / len(positions))
            if not torch.isfinite(kl):
                raise ValueError(f"{self.head.source.head_name}: the divergence behind it is not finite")
            if dy is not None:
                dy[0, positions[rows]] = torch.autograd.grad(kl, x)[0]
            total += float(kl.detach())
        return total


@dataclass(frozen=True)
class Tuned:
    """Matrices that changed, by full name; the report; output of the last block for the first piece that trained."""

    matrices: dict[str, QTensor]
    report: dict[str, Any]
    leaving: Tensor


def pieces_of(tokens: Tensor, *, bos: bool) -> Tensor:
    """i64[m, PIECE] from windows i64[n, seqlen], each with the windows' BOS; shorter windows stay as they are."""
    n, seqlen = tokens.shape
    if seqlen <= PIECE:
        return tokens
    first = 1 if bos else 0
    width = PIECE - first
    count = (seqlen - first) // width
    cut = tokens[:, first : first + count * width].reshape(n * count, width)
    return torch.cat([tokens[:1, :first].expand(len(cut), first), cut], 1)


def read_blocks(
    writer: CheckpointWriter, source: SourceModel, matrices: Sequence[Matrix], calls: Sequence[BlockCall]
) -> list[Block]:
    """The blocks as the writer's shards hold them."""
    blocks = []
    for i, name in enumerate(source.block_names):
        tensors, linears = writer.read(f"{name}."), {}
        for m in (m for m in matrices if m.name.startswith(f"{name}.")):
            own = {key: tensors.pop(f"{m.name}.{key}") for key in matrix_layout(m.n, m.k, m.scheme)}
            local = m.name.removeprefix(f"{name}.")
            linears[local] = Linear(m.name, matrix_from_tensors(own, m.n, m.k, m.scheme, m.name))
        kept = {key.removeprefix(f"{name}."): t.float() for key, t in tensors.items()}
        blocks.append(Block(name, source.block(i), calls[i], linears, kept))
    return blocks


def memory_needed(source: SourceModel, matrices: Sequence[Matrix], n_tokens: int) -> int:
    """Bytes that tuning takes, roughly: codes, scales and Adam, the head, logits, a block, the text's inputs."""
    text = source.config.get_text_config()
    groups = sum(m.n * m.scheme.n_groups(m.k) for m in matrices)
    block = sum(m.weights for m in matrices) // len(source.block_names)
    head = 4 * int(text.vocab_size) * int(text.hidden_size)
    return (
        sum(m.weights for m in matrices)
        + 6 * 4 * groups
        + head
        + 4 * LOGITS_BYTES
        + 16 * block
        + 4 * n_tokens * int(text.hidden_size)
    )


@fast_linears()
def tune(
    source: SourceModel,
    writer: CheckpointWriter,
    matrices: Sequence[Matrix],
    train: Tensor,
    held: Tensor,
    *,
    seed: int,
    seconds: float,
    log: Log,
) -> Tuned:
    """Tune the scales of ``matrices``, which stand in the writer's shards; the shards stay as they are.

    Args:
        source: the original model.
        writer: every block has been written.
        matrices: the quantized linears of the blocks.
        train: i64[n, t] pieces of text.
        held: i64[m, t] pieces that judge; the least divergence on them decides what is kept.
        seed: of the order of the pieces and of the positions compared.
        seconds: when to stop; a run that the clock does not stop is reproducible.
        log: gets lines of progress.

    Raises:
        ValueError: something is not finite; names the module.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    pieces = torch.cat([held, train])
    judges = list(range(len(held)))
    orders = [len(held) + torch.randperm(len(train), generator=generator) for _ in range(EPOCHS)]
    order: list[int] = torch.cat(orders).tolist()
    kept = max(1, round(POSITIONS * pieces.shape[1]))
    positions = [torch.randperm(pieces.shape[1], generator=generator)[:kept].sort()[0] for _ in pieces]
    entering, calls = block_inputs(source, pieces)
    head = Head(source)
    teacher = Teacher(head, entering, calls, positions, judges + order[: len(train)], writer.partial)
    try:
        with head.loaded():
            student = Student(read_blocks(writer, source, matrices, calls), head, teacher)
            report = _descend(student, judges, order, began + seconds, log)
            report["seconds"] = round(time.perf_counter() - began, 2)
            leaving = student.hidden(len(held), stored=True)[-1]
    finally:
        teacher.close()
    results = {m.name: m.result() for m in student.linears if not bool((m.factor == 1).all())}
    return Tuned(results, report, leaving)


def _descend(student: Student, judges: list[int], order: list[int], deadline: float, log: Log) -> dict[str, Any]:
    """Adam down the KL of the pieces in ``order``; leaves the factors at the best iterate and returns the report."""
    factors, began = [m.factor for m in student.linears], time.perf_counter()
    adam = torch.optim.Adam(factors, lr=LEARNING_RATE, betas=BETAS)
    every = max(JUDGE_EVERY, 4 * len(judges))
    start = least = student.loss(judges)
    judging = time.perf_counter() - began
    best, taken, clocked = [f.clone() for f in factors], 0, False
    recent: list[float] = []
    log(f"tuning scales: {len(order)} steps, held-out KL {start:.4f}")
    for step, piece in enumerate(order):
        now = time.perf_counter()
        share, by_clock = step / len(order), (now - began) / max(deadline - began, 1e-9)
        if by_clock > (step + 1) / len(order):
            share, clocked = min(by_clock, 1.0), True
        adam.param_groups[0]["lr"] = LEARNING_RATE * (1 - share)
        recent.append(student.backward(piece))
        adam.step()
        taken = step + 1
        late = time.perf_counter() + judging > deadline
        if late or taken % every == 0 or taken == len(order):
            now = time.perf_counter()
            held = student.loss(judges)
            judging = time.perf_counter() - now
            if held < least:
                least, best = held, [f.clone() for f in factors]
            left = min(deadline - now, (now - began) / taken * (len(order) - taken))
            log(
                f"  step {taken}/{len(order)}  KL {sum(recent) / len(recent):.4f}  held-out {held:.4f}  "
                f"left {duration(max(left, 0))}  memory {size(current_rss())}"
            )
            recent = []
        if late:
            break
    for factor, kept in zip(factors, best, strict=True):
        factor.copy_(kept)
    return {"kl_before": start, "kl_after": least, "steps": taken, "stopped_by_clock": clocked}
