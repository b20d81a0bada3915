"""TokenStore: the keys, or the values, of one layer: the first and last tokens in 16 bits, those between as codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.kv_quant import QuantizedRows, dequantize_rows, quantize_rows, rotate


@dataclass(frozen=True)
class Storage:
    """How keys or values are held. ``bits`` 16: as the model gives them. ``block``: tokens that are quantized together,
    a scale for each column of them; 1: each token by itself."""

    bits: int
    sinks: int = 0
    recent: int = 0
    rotated: bool = False
    block: int = 1

    def quantize(self, x: Tensor) -> QuantizedRows:
        """Codes of ``x`` [B, H, n * block, D]; their dimension 2 counts blocks."""
        x = rotate(x) if self.rotated else x
        return quantize_rows(x if self.block == 1 else x.unflatten(2, (-1, self.block)).mT, self.bits)

    def dequantize(self, rows: QuantizedRows) -> Tensor:
        """The numbers f32[B, H, n * block, D] behind ``rows``."""
        x = dequantize_rows(rows)
        x = x if self.block == 1 else x.mT.flatten(2, 3)
        return rotate(x) if self.rotated else x


class TokenStore:
    """The keys, or the values, of one layer: f[B, H, T, D] in three parts, oldest token first.

    Attributes:
        first: tokens at positions below ``sinks``, as long as they are held.
        middle: codes of the tokens between, whole blocks; None as long as there are none.
        skipped: tokens at the start of ``middle`` that are forgotten.
        last: the newest tokens, ``recent`` of them and less than a block, unless fewer are held or ``keep`` cut.
    """

    def __init__(self, storage: Storage, like: Tensor) -> None:
        self.storage, self.dtype, self.device = storage, like.dtype, like.device
        # 16 bits of a float32 model are its float32 numbers, unless the rest is quantized and memory is the point.
        wide = storage.bits < 16 and like.dtype.itemsize > 2
        self.held_dtype = torch.float16 if wide else like.dtype
        batch, heads, _, dim = like.shape
        self.first = self.last = like.new_empty(batch, heads, 0, dim, dtype=self.held_dtype)  # not a view of `like`
        self.middle: QuantizedRows | None = None
        self.skipped = 0

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens in each part."""
        middle = 0 if self.middle is None else self.middle.codes.shape[2] * self.storage.block - self.skipped
        return self.first.shape[2], middle, self.last.shape[2]

    def __len__(self) -> int:
        return sum(self.lengths)

    def _read_middle(self) -> Tensor:
        if self.middle is None:
            return self.last[:, :, :0].to(self.dtype)
        return self.storage.dequantize(self.middle)[:, :, self.skipped :].to(self.dtype)

    def read(self) -> Tensor:
        """All tokens, [B, H, T, D] in the model's type."""
        return torch.cat([self.first.to(self.dtype), self._read_middle(), self.last.to(self.dtype)], dim=2)

    def append(self, x: Tensor, position: int) -> None:
        """Hold ``x`` [B, H, n, D], whose first token stands at ``position`` of the text.

        Raises ValueError, with nothing changed, if ``x`` overflows what it is held in.
        """
        s, x = self.storage, x.detach()
        if s.bits == 16:
            self.last = torch.cat([self.last, x], dim=2)
            return
        n_first = min(max(s.sinks - position, 0), x.shape[2])
        first, rest = torch.cat([self.first, self._narrow(x[:, :, :n_first])], dim=2), x[:, :, n_first:]
        # Tokens that leave `last` at once are quantized from what the model gave.
        over = max(self.last.shape[2] + rest.shape[2] - s.recent, 0) // s.block * s.block
        old = min(over, self.last.shape[2])
        leaving = torch.cat([self.last[:, :, :old].to(x.dtype), rest[:, :, : over - old]], dim=2)
        last = torch.cat([self.last[:, :, old:], self._narrow(rest[:, :, over - old :])], dim=2)
        if over:
            rows = s.quantize(leaving)
            self.middle = rows if self.middle is None else self.middle.join(rows, dim=2)
        self.first, self.last = first, last

    def _narrow(self, x: Tensor) -> Tensor:
        narrow = x.to(self.held_dtype)
        if narrow.dtype != x.dtype and not bool(narrow.isfinite().all()):
            raise ValueError(
                f"a key or value of {float(x.abs().max()):.3g} does not fit the float16 in which this cache holds its "
                "sinks and recent tokens; load the model in bfloat16, or use 16 bits for this cache"
            )
        return narrow

    def keep(self, start: int, stop: int) -> None:
        """Forget all but the tokens ``start`` to ``stop`` (exclusive) of those held."""
        n_first, n_middle, _ = self.lengths

        # Copied: a view would keep what was cut off in memory.
        def cut(x: Tensor, begin: int) -> Tensor:
            return x[:, :, max(start - begin, 0) : max(stop - begin, 0)].clone()

        self.first, self.last = cut(self.first, 0), cut(self.last, n_first + n_middle)
        if self.middle is not None:
            begin, end = max(start - n_first, 0), min(stop - n_first, n_middle)
            self._keep_middle(self.skipped + begin, self.skipped + max(end, begin))

    def _keep_middle(self, start: int, stop: int) -> None:
        """Forget all but the tokens ``start`` to ``stop`` of the blocks; those of a block cut short become numbers."""
        assert self.middle is not None
        block = self.storage.block
        whole = slice(start // block, max(stop // block, start // block))
        left_over = max(start, whole.stop * block)
        if left_over < stop:
            numbers = self._read_middle()[:, :, left_over - self.skipped : stop - self.skipped]
            self.last = torch.cat([numbers.to(self.held_dtype), self.last], dim=2)
        middle = self.middle.map(lambda t: t[:, :, whole].clone())
        self.middle, self.skipped = (middle, start % block) if whole.stop > whole.start else (None, 0)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``change`` of it: rows of the batch chosen, or another device."""
        self.first, self.last = change(self.first), change(self.last)
        self.middle = None if self.middle is None else self.middle.map(change)

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind the tensors."""
        held = [self.first, self.last, *([] if self.middle is None else self.middle.tensors)]
        return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held)}.values())

    @property
    def nbytes_16bit(self) -> int:
        """Bytes that the same tokens take at 16 bits a number."""
        batch, heads, _, dim = self.last.shape
        return 2 * batch * heads * dim * len(self)
