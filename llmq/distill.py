"""The original model as teacher: the outputs of its last block, kept in a file, and its head on single positions.

A token's output is a few kilobytes and gives its whole distribution again, which for a large vocabulary would be a
megabyte. The head is the dearest part of a small model: it may be cut to the tokens that hold nearly all probability.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq.blockwise import BlockCall, answering, block_output, compact_embedding, run_block
from llmq.models.load import SourceModel, materialize
from llmq.products import fast_products, learning_linears

# Pieces whose outputs are computed together: the original blocks are read once for all of them.
TEACHER_BATCH = 32
# Logits that are in memory at once, bytes; their softmax and gradient take as much again.
LOGITS_BYTES = 128 << 20
# Tokens that the head is cut to, at least, and positions whose predictions choose them.
VOCABULARY, CHOOSERS = 32768, 1024


class Head:
    """Final norm and output head of the original model; they see each position by itself."""

    def __init__(self, source: SourceModel) -> None:
        self.source = source
        self.vocabulary = int(source.config.get_text_config().vocab_size)

    @contextmanager
    def loaded(self, tokens: Tensor | None = None) -> Iterator[None]:
        """Within the context the weights are in memory, fp32; of the head the rows of ``tokens`` i64[v], or all."""
        source, path = self.source, self.source.family.decoder
        decoder = source.model.get_submodule(path)
        names = [f"{path}.{child}" if path else child for child, _ in decoder.named_children()]
        names = [n for n in names if n != source.embed_name and not source.block_names[0].startswith(f"{n}.")]
        whole = self.vocabulary
        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                stack.enter_context(materialize(source.model.get_submodule(name), name, source.reader))
            stack.enter_context(_rows(source, tokens))
            # The model insists on a token; what its embedding gives is thrown away.
            stack.enter_context(compact_embedding(source, torch.zeros(1, 1, dtype=torch.long)))
            self.vocabulary = whole if tokens is None else len(tokens)
            try:
                yield
            finally:
                self.vocabulary = whole

    def logits(self, h: Tensor) -> Tensor:
        """f32[t, vocabulary] for outputs h f32[t, hidden] of the last block."""
        with ExitStack() as stack:
            for name in self.source.block_names:
                block = self.source.model.get_submodule(name)
                stack.enter_context(answering(block, lambda *_args, **_kwargs: block_output(h[None])))
            ids = torch.zeros(1, len(h), dtype=torch.long)
            found: Tensor = self.source.model(input_ids=ids, use_cache=False).logits[0]
        return found.float()

    def chunks(self, n: int) -> list[slice]:
        """``n`` positions in chunks whose logits fit into LOGITS_BYTES."""
        rows = max(1, LOGITS_BYTES // (4 * self.vocabulary))
        return [slice(a, min(a + rows, n)) for a in range(0, n, rows)]

    @torch.no_grad()
    def likely(self, h: Tensor, tokens: Tensor) -> Tensor:
        """i64[v], sorted: the VOCABULARY tokens that are likeliest over outputs h f32[t, hidden], and ``tokens``."""
        if self.vocabulary <= VOCABULARY:
            return torch.arange(self.vocabulary)
        mass = torch.zeros(self.vocabulary)
        h = h[:: max(1, len(h) // CHOOSERS)]
        for rows in self.chunks(len(h)):
            mass += self.logits(h[rows]).softmax(1).sum(0)
        found: Tensor = torch.unique(torch.cat([mass.topk(VOCABULARY)[1], tokens.flatten()]))
        return found


@contextmanager
def _rows(source: SourceModel, tokens: Tensor | None) -> Iterator[None]:
    """Within the context the head's rows for ``tokens`` (None: all) are in memory, and the head gives these logits."""
    head, name = source.model.get_submodule(source.head_name), source.head_name
    if tokens is None:
        with materialize(head, name, source.reader):
            yield
        return
    before = dict(head._parameters)
    try:
        for key in (key for key, old in before.items() if old is not None):
            rows = source.reader.rows_at(f"{name}.{key}", tokens).float()
            head._parameters[key] = nn.Parameter(rows, requires_grad=False)
        yield
    finally:
        head._parameters.update(before)


class Teacher:
    """Outputs of the original model's last block, computed when first asked for and kept in a temporary file.

    Args:
        source: the model.
        entering: [1, t, hidden] a piece of text, inputs of the first block; outputs are kept in their dtype.
        calls: how the decoder calls each block.
        order: pieces in the order in which they will be asked for first.
        folder: of the temporary file.
    """

    def __init__(
        self,
        source: SourceModel,
        entering: Sequence[Tensor],
        calls: Sequence[BlockCall],
        order: Sequence[int],
        folder: Path,
    ) -> None:
        self.source, self.entering, self.calls = source, entering, calls
        self._order = list(dict.fromkeys(order))
        self._record: dict[int, int] = {}  # where each piece begins in the file
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".llmq-teacher-")  # noqa: SIM115 - see close()

    def close(self) -> None:
        """Give the temporary file up."""
        self._file.close()

    def of(self, piece: int) -> Tensor:
        """f32[1, t, hidden] of a piece."""
        if piece not in self._record:
            i = self._order.index(piece)
            self._compute([p for p in self._order[i : i + TEACHER_BATCH] if p not in self._record])
        like = self.entering[piece]
        nbytes = like.numel() * like.element_size()
        self._file.seek(self._record[piece])
        return torch.frombuffer(bytearray(self._file.read(nbytes)), dtype=like.dtype).view(like.shape).float()

    @torch.no_grad()
    def _compute(self, pieces: list[int]) -> None:
        source = self.source
        hidden = [self.entering[p].float() for p in pieces]
        for i, name in enumerate(source.block_names):
            with materialize(source.block(i), name, source.reader) as block:
                for j, piece in enumerate(pieces):
                    # What is kept in 16 bits need not be computed in 32.
                    with fast_products() if self.entering[piece].dtype == torch.float32 else learning_linears():
                        hidden[j] = run_block(block, {}, hidden[j], self.calls[i]).float()
        for piece, h in zip(pieces, hidden, strict=True):
            if not torch.isfinite(h).all():
                raise ValueError(f"{source.folder}: its own outputs on the calibration text are not finite")
            self._record[piece] = self._file.seek(0, 2)
            self._file.write(h.to(self.entering[piece].dtype).view(torch.uint8).numpy().tobytes())
