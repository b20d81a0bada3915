"""The original model as teacher: its head on single positions; its predictions, computed once and kept in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llmq.allocate import TOP
from llmq.blockwise import BlockCall, answering, compact_embedding, run_block
from llmq.models.load import SourceModel, materialize
from llmq.products import fast_linears

# Pieces whose predictions are computed together: the original blocks are read once for all of them.
TEACHER_BATCH = 8
# Logits that are in memory at once, bytes; their softmax and gradient take as much again.
LOGITS_BYTES = 128 << 20


class Head:
    """Final norm and output head of the original model; they see each position by itself."""

    def __init__(self, source: SourceModel) -> None:
        self.source = source

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Within the context the weights are in memory, fp32."""
        source, path = self.source, self.source.family.decoder
        decoder = source.model.get_submodule(path)
        names = [f"{path}.{child}" if path else child for child, _ in decoder.named_children()]
        names = [n for n in names if n != source.embed_name and not source.block_names[0].startswith(f"{n}.")]
        with ExitStack() as stack:
            for name in dict.fromkeys([*names, source.head_name]):
                stack.enter_context(materialize(source.model.get_submodule(name), name, source.reader))
            # The model insists on a token; what its embedding gives is thrown away.
            stack.enter_context(compact_embedding(source, torch.zeros(1, 1, dtype=torch.long)))
            yield

    def logits(self, h: Tensor) -> Tensor:
        """f32[t, vocabulary] for outputs h f32[t, hidden] of the last block."""
        with ExitStack() as stack:
            for name in self.source.block_names:
                block = self.source.model.get_submodule(name)
                stack.enter_context(answering(block, lambda *_args, **_kwargs: h[None]))
            ids = torch.zeros(1, len(h), dtype=torch.long)
            found: Tensor = self.source.model(input_ids=ids, use_cache=False).logits[0]
        return found.float()

    def chunks(self, n: int) -> list[slice]:
        """``n`` positions in chunks whose logits fit into LOGITS_BYTES."""
        vocabulary = int(self.source.config.get_text_config().vocab_size)
        rows = max(1, LOGITS_BYTES // (4 * vocabulary))
        return [slice(a, min(a + rows, n)) for a in range(0, n, rows)]


class Teacher:
    """The original model's most likely tokens, computed when first asked for and kept in a temporary file.

    Args:
        head: of the model, loaded.
        entering: f32[1, t, hidden] a piece of text, inputs of the first block.
        calls: how the decoder calls each block.
        positions: i64[p] a piece, p the same for all: where predictions are compared.
        order: pieces in the order in which they will be asked for first.
        folder: of the temporary file.
    """

    def __init__(
        self,
        head: Head,
        entering: Sequence[Tensor],
        calls: Sequence[BlockCall],
        positions: Sequence[Tensor],
        order: Sequence[int],
        folder: Path,
    ) -> None:
        self.head, self.entering, self.calls, self.positions = head, entering, calls, positions
        self._order = list(order)
        self._record: dict[int, int] = {}
        self._shape = (len(positions[0]), 0)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".llmq-teacher-")  # noqa: SIM115 - see close()

    def close(self) -> None:
        """Give the temporary file up."""
        self._file.close()

    def of(self, piece: int) -> tuple[Tensor, Tensor]:
        """(log probabilities f32[p, k], ids i64[p, k]) of the most likely tokens at the piece's positions."""
        if piece not in self._record:
            i = self._order.index(piece)
            self._compute([p for p in self._order[i : i + TEACHER_BATCH] if p not in self._record])
        p, k = self._shape
        self._file.seek(self._record[piece] * p * k * 8)
        data = bytearray(self._file.read(p * k * 8))
        log_p = torch.frombuffer(data, dtype=torch.float32, count=p * k)
        ids = torch.frombuffer(data, dtype=torch.int32, count=p * k, offset=p * k * 4)
        return log_p.view(p, k), ids.view(p, k).long()

    @torch.no_grad()
    def _compute(self, pieces: list[int]) -> None:
        source = self.head.source
        hidden = [self.entering[p] for p in pieces]
        for i, name in enumerate(source.block_names):
            with materialize(source.block(i), name, source.reader) as block, fast_linears():
                hidden = [run_block(block, {}, h, self.calls[i]) for h in hidden]
        for piece, h in zip(pieces, hidden, strict=True):
            log_p, ids = self._most_likely(h[0, self.positions[piece]])
            if not torch.isfinite(log_p).all():
                raise ValueError(f"{source.folder}: its own predictions on the calibration text are not finite")
            self._shape = (log_p.shape[0], log_p.shape[1])
            self._file.seek(0, 2)
            self._record[piece] = len(self._record)
            self._file.write(log_p.numpy().tobytes() + ids.numpy().tobytes())

    def _most_likely(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(f32[p, k], i32[p, k]) from outputs of the last block f32[p, hidden]."""
        parts = []
        for rows in self.head.chunks(len(h)):
            logits = self.head.logits(h[rows])
            values, ids = logits.topk(min(TOP, logits.shape[1] - 1), dim=1)
            parts.append((values - logits.logsumexp(1, keepdim=True), ids.int()))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
