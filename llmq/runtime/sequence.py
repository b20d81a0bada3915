"""Sequence: keys and values of one sequence, inside the compiled decoder."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from llmq import kernels


class Sequence:
    """Keys and values of one sequence, grown in pages by :meth:`NativeDecoder.forward`."""

    def __init__(self, core: Any) -> None:
        self._core = core

    @property
    def length(self) -> int:
        """Tokens stored."""
        return int(self._core.length)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._core.nbytes)

    @property
    def least_crop(self) -> int:
        """The least length, besides 0, to crop to: layers of a sliding window forget what lies before it.

        The last 32 tokens, and those of a last step of up to 256, can always be cropped.
        """
        return int(self._core.least_crop)

    def crop(self, length: int) -> None:
        """Forget the tokens behind ``length``: 0, or from ``least_crop`` on. Raises ValueError for others."""
        self._core.crop(length)

    def skip(self, count: int) -> None:
        """Make room for ``count`` more tokens without their keys and values: to measure memory, not to be attended to.

        Raises MemoryError, with the sequence as before.
        """
        self._core.skip(count)

    def copy(self) -> Sequence:
        """An independent copy. Both share the pages of what they have in common, until one of them writes there.

        Raises ValueError while a step runs on this one.
        """
        return Sequence(self._core.copy())

    def state(self) -> tuple[list[Any], list[Tensor]]:
        """What it holds, for :meth:`set_state` of an empty sequence of the same model and bits.

        Returns for each part (a layer's tokens, behind them its near ones) ([numbers of its pages], first page that is
        not forgotten, first token, bytes of a page), and u8[pages, bytes]. Raises ValueError while a step runs on it.
        """
        parts = self._core.held_pages()
        pages = [torch.empty(len(numbers), nbytes, dtype=torch.uint8) for numbers, _, _, nbytes in parts]
        self._core.read_pages([p.data_ptr() for p in pages])
        return parts, pages

    def set_state(self, length: int, parts: ListLike[Any], pages: ListLike[Tensor]) -> None:
        """Become a sequence of ``length`` tokens as :meth:`state` gave it.

        Raises ValueError, with the sequence as before, where the pages are not those of such a sequence.
        """
        for i, ((numbers, _, _, nbytes), data) in enumerate(zip(parts, pages, strict=True)):
            if data.dtype != torch.uint8 or tuple(data.shape) != (len(numbers), nbytes):
                given = f"{data.dtype} {tuple(data.shape)}"
                raise ValueError(f"part {i} is {given}; announced are {len(numbers)} pages of {nbytes} bytes")
        kept = [data.contiguous() for data in pages]
        self._core.restore(length=length, pages=[tuple(p) for p in parts], data=[data.data_ptr() for data in kept])


def shared_nbytes(sequences: ListLike[Sequence]) -> int:
    """Bytes that the sequences hold together; pages that several share count once."""
    module: Any = kernels.compiled()
    return int(module.shared_bytes([s._core for s in sequences])) if sequences else 0
