"""When a generated row has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
)


class StopStrings(StoppingCriteria):
    """Ends a row whose last token completes one of ``strings`` in the text.

    transformers' own criterion looks at the whole vocabulary before the first token, in every call: two seconds with
    262,144 tokens. This one decodes the last tokens, enough of them for the longest string.
    """

    def __init__(self, strings: str | list[str], tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        self.tokenizer = tokenizer
        # A token is a byte at least; four more, because a decoder may treat the first token of a text differently.
        self.window = max(len(s.encode()) for s in self.strings) + 4

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        """bool[B] for ids i64[B, columns]."""
        return torch.tensor([self._completes(row) for row in input_ids[:, -self.window :].tolist()])

    def _completes(self, tokens: list[int]) -> bool:
        text = self._decode(tokens)
        if not any(s in text for s in self.strings):
            return False
        # Half a character at the end decodes to a placeholder that the last token replaces.
        before = len(self._decode(tokens[:-1]).rstrip("\ufffd"))
        return any(s in text and text.rfind(s) + len(s) > before for s in self.strings)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class Stops:
    """A list of stopping criteria: the usual ones as plain comparisons, any other by calling it.

    Attributes:
        ends: tokens that end a row.
        pads_ended_rows: whether ended rows are padded; without an end token transformers lets them go on.
        others: criteria to be called.
        columns: at which all rows end, or None.
    """

    def __init__(self, criteria: Iterable[Any]) -> None:
        self.ends: frozenset[int] = frozenset()
        self.columns: int | None = None
        self.others: list[Callable[..., Any]] = []
        self.pads_ended_rows = False
        self._deadline: float | None = None
        for criterion in criteria:
            self.pads_ended_rows |= hasattr(criterion, "eos_token_id")
            if type(criterion) is EosTokenCriteria:
                self.ends |= frozenset(criterion.eos_token_id.reshape(-1).tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.columns = criterion.max_length
            elif type(criterion) is MaxTimeCriteria:
                self._deadline = criterion.initial_timestamp + criterion.max_time
            else:
                self.others.append(criterion)

    def everywhere(self, columns: int, limit: int) -> bool:
        """Whether all rows end at this number of columns, or now."""
        return columns >= limit or (self._deadline is not None and time.time() > self._deadline)

    def elsewhere(self, ids: Tensor) -> list[bool]:
        """What the other criteria say of the rows of ``ids`` i64[B, columns]."""
        ended = torch.zeros(ids.shape[0], dtype=torch.bool)
        for criterion in self.others:
            ended |= torch.as_tensor(criterion(ids, None))
        return ended.tolist()
