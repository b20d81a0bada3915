"""End-to-end tuning: the quantized model is drawn towards the original one's predictions.

The integers are fixed; scales move (the last phase of EfficientQAT, arXiv 2407.11062; mlx-lm's DWQ is akin), and with
them what a checkpoint holds in fp32 anyway, norms and biases (norm tweaking, arXiv 2309.02784). The loss is
KL(original || quantized), a token at a time, on text that the solver has not fitted as far as there is any: what it has
fitted looks half as bad as it is. Forward and backward go block by block; the best iterate on held-out windows, scales
rounded to fp16, is what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.blockwise import BlockCall, block_inputs
from llmq.checkpoint import CheckpointWriter, matrix_from_tensors, matrix_layout
from llmq.distill import LOGITS_BYTES, TEACHER_BATCH, VOCABULARY, Head, Teacher
from llmq.memory import current_rss
from llmq.models.load import SourceModel
from llmq.plan import Matrix
from llmq.qtensor import QTensor
from llmq.report import Log, duration, size
from llmq.student import GRAPH_BYTES, Block, Linear, Student, Vector

# Tokens of a piece of text. Longer windows are cut: more steps on the same text bring more than longer context does.
PIECE = 512
# Tokens of a step.
BATCH_TOKENS = 2048
# One position in so many is compared, in turns: neighbours say much the same, and the head is a large part of the work.
STRIDE = 2
# Adam's first step as a share of a scale of 3 bits, and of a norm or bias beside such; it falls linearly to 0.
# A bit more halves a grid's steps, hence the rate: what moves a weight by as much of a step is the same change.
SCALE_RATE, VECTOR_RATE, RATED_BITS = 2e-3, 2e-3, 3
BETAS = (0.9, 0.95)
# Passes over the pieces, unless the clock ends them before, and the number of steps between two judgements.
EPOCHS = 4
JUDGE_EVERY = 16


@dataclass(frozen=True)
class Tuned:
    """What changed, by full name; the report; output of the last block for the first piece of ``train``."""

    matrices: dict[str, QTensor]
    vectors: dict[str, Tensor]
    report: dict[str, Any]
    leaving: Tensor


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
        vectors, kept = {}, {}
        for key, t in tensors.items():
            local = key.removeprefix(f"{name}.")
            if t.dim() == 1:
                offset = source.family.norm_offset if local.endswith("norm.weight") else 0.0
                vectors[local] = Vector(key, t.float(), offset)
            else:
                kept[local] = t.float()
        blocks.append(Block(name, source.block(i), calls[i], linears, vectors, kept))
    return blocks


def memory_needed(source: SourceModel, matrices: Sequence[Matrix], n_tokens: int) -> int:
    """Bytes that tuning takes, roughly: codes, what is learned with Adam's two, the head, logits, a block, the text."""
    text = source.config.get_text_config()
    weights = sum(m.weights for m in matrices)
    groups = sum(m.n * m.scheme.n_groups(m.k) for m in matrices)
    hidden, vocabulary = int(text.hidden_size), int(text.vocab_size)
    return (
        4 * weights
        + 6 * 4 * groups
        + 4 * max(vocabulary, 2 * VOCABULARY) * hidden
        + 6 * LOGITS_BYTES
        + GRAPH_BYTES
        + 20 * weights // len(source.block_names)
        + 2 * n_tokens * hidden
        + 8 * TEACHER_BATCH * PIECE * hidden
    )


@dataclass(frozen=True)
class Texts:
    """Pieces that teach and judge: inputs of the first block, f32 or bf16[1, t, hidden], and their teacher."""

    entering: list[Tensor]
    teacher: Teacher
    judges: list[int]
    batch: int

    def batch_of(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(inputs of the first block, the original model's outputs of the last one), f32[b, t, hidden]."""
        inputs, targets = [self.entering[i].float() for i in which], [self.teacher.of(i) for i in which]
        return torch.cat(inputs), torch.cat(targets)

    def judge(self, student: Student) -> float:
        """Mean KL on the pieces that judge, nats a position."""
        parts = [self.judges[i : i + self.batch] for i in range(0, len(self.judges), self.batch)]
        return sum(student.loss(*self.batch_of(part)) * len(part) for part in parts) / len(self.judges)


def _entering(source: SourceModel, pieces: Tensor, n_exact: int) -> tuple[list[Tensor], list[BlockCall]]:
    """Inputs of the first block, those of the first ``n_exact`` pieces in fp32, the others in bf16."""
    found: list[Tensor] = []
    for part in (pieces[:n_exact], *(p for p in pieces[n_exact:].split(64) if len(p))):
        hidden, calls = block_inputs(source, part)
        found += [h.bfloat16() for h in hidden] if found else hidden
    return found, calls


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
    """Tune ``matrices``, which stand in the writer's shards; the shards stay as they are.

    Args:
        source: the original model.
        writer: every block has been written.
        matrices: the quantized linears of the blocks.
        train: i64[n, t] pieces of text.
        held: i64[m, t] pieces that judge; the least divergence on them decides what is kept.
        seed: of the order of the pieces.
        seconds: when to stop; a run that the clock does not stop is reproducible.
        log: gets lines of progress.

    Returns:
        What changed, and the last block's output f32[1, t, hidden] for the first of the training pieces.

    Raises:
        ValueError: something is not finite; names the module.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    pieces, first = torch.cat([held, train]), len(held)
    judges, batch = list(range(first)), max(1, BATCH_TOKENS // train.shape[1])
    orders = [first + torch.randperm(len(train), generator=generator) for _ in range(EPOCHS)]
    batches = [part.tolist() for order in orders for part in order.split(batch)]
    # The piece that is asked for at the end is exact as well.
    entering, calls = _entering(source, pieces, first + 1)
    order = [i for part in batches for i in part]
    teacher = Teacher(source, entering, calls, judges + order, writer.partial)
    try:
        texts = Texts(entering, teacher, judges, batch)
        head = Head(source)
        with head.loaded():
            shown = torch.cat([teacher.of(i)[0] for i in [*judges, *order][:TEACHER_BATCH]])
            tokens = head.likely(shown, pieces)
        with head.loaded(tokens):
            student = Student(read_blocks(writer, source, matrices, calls), head)
            start, best, report = _descend(student, texts, batches, began + seconds, log)
            leaving = student.hidden(entering[first], stored=True)[-1]
    finally:
        teacher.close()
    report["seconds"] = round(time.perf_counter() - began, 2)
    return _tuned(student, start, best, report, leaving)


@dataclass(frozen=True)
class _Iterate:
    """The student's factors, and its divergence on the pieces that judge."""

    kl: float
    factors: list[Tensor]

    @classmethod
    def of(cls, student: Student, kl: float) -> _Iterate:
        return cls(kl, [item.factor.clone() for item in student.learned])

    def restore(self, student: Student) -> None:
        for item, factor in zip(student.learned, self.factors, strict=True):
            item.factor = factor


def _optimizer(student: Student) -> torch.optim.Adam:
    """Adam with the rates of each linear's bits; vectors see linears of all bits, a weight each."""
    by_bits: dict[int, list[Tensor]] = {}
    for m in student.linears:
        by_bits.setdefault(m.start.scheme.bits, []).append(m.factor)
    weights = sum(m.codes.numel() for m in student.linears)
    mean = sum(m.start.scheme.bits * m.codes.numel() for m in student.linears) / max(weights, 1)
    rows = [(SCALE_RATE * 2.0 ** (RATED_BITS - bits), factors) for bits, factors in sorted(by_bits.items())]
    rows.append((VECTOR_RATE * 2.0 ** (RATED_BITS - mean), [v.factor for v in student.vectors]))
    return torch.optim.Adam([{"params": p, "lr": r, "rate": r} for r, p in rows if p], betas=BETAS, fused=True)


def _descend(
    student: Student, texts: Texts, batches: list[list[int]], deadline: float, log: Log
) -> tuple[_Iterate, _Iterate, dict[str, Any]]:
    """Adam down the KL of ``batches``; leaves the student at the best iterate. Returns (start, best, report)."""
    began = time.perf_counter()
    adam, n = _optimizer(student), len(batches)
    start = best = _Iterate.of(student, texts.judge(student))
    judging, taken, clocked = time.perf_counter() - began, 0, False
    recent: list[float] = []
    log(f"tuning: {n} steps of {BATCH_TOKENS} tokens, held-out KL {start.kl:.4f}")
    for step, batch in enumerate(batches):
        now = time.perf_counter()
        share, by_clock = step / n, (now - began) / max(deadline - began, 1e-9)
        if by_clock > (step + 1) / n:
            share, clocked = min(by_clock, 1.0), True
        for group in adam.param_groups:
            group["lr"] = group["rate"] * (1 - share)
        recent.append(student.backward(*texts.batch_of(batch), slice(step % STRIDE, None, STRIDE)))
        adam.step()
        taken = step + 1
        late = time.perf_counter() + judging > deadline
        if late or taken % JUDGE_EVERY == 0 or taken == n:
            now = time.perf_counter()
            held = texts.judge(student)
            judging = time.perf_counter() - now
            best = _Iterate.of(student, held) if held < best.kl else best
            left = min(deadline - now, (now - began) / taken * (n - taken))
            log(
                f"  step {taken}/{n}  KL {sum(recent) / len(recent):.4f}  held-out {held:.4f}  "
                f"left {duration(max(left, 0))}  memory {size(current_rss())}"
            )
            recent = []
        if late:
            break
    best.restore(student)
    return start, best, {"steps": taken, "stopped_by_clock": clocked}


def _tuned(student: Student, start: _Iterate, best: _Iterate, report: dict[str, Any], leaving: Tensor) -> Tuned:
    """The result of a run that ended with ``student`` at ``best``; nothing has changed where that is the start."""
    report |= {"kl_before": start.kl, "kl_after": best.kl}
    if best is start:
        return Tuned({}, {}, report, leaving)
    matrices = {m.name: m.result() for m in student.linears}
    return Tuned(matrices, {v.name: v.value() for v in student.vectors}, report, leaving)
