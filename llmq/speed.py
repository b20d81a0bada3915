"""How fast models decode beside one another: one process, in turns, so that both meet the same machine.

A comparison of a few seconds, greedy, after a short prompt; eval/bench.py measures with care.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from llmq.logits import engine_of

PROMPT = 16
TOKENS = 32
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one sequence, median of the rounds, and what ran the model."""

    rate: float
    engine: str

    def __str__(self) -> str:
        return f"{self.rate:.1f} tokens/s ({self.engine})"


class _Clock:
    """A streamer that notes when the prompt and each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def decode_speeds(a: Any, b: Any, *, tokens: int = TOKENS, rounds: int = ROUNDS) -> tuple[Speed, Speed]:
    """The speeds of two loaded models, each as a user's ``generate`` runs it; end-of-text tokens are ignored.

    A round decodes ``tokens`` with each, every other one in reverse order; the first is not counted. Raises ValueError
    for fewer than 2 tokens or 1 round.
    """
    if tokens < 2 or rounds < 1:
        raise ValueError(f"{tokens} tokens in {rounds} rounds; at least 2 tokens in 1 round can be timed")
    models = (a, b)
    sizes = [m.config.get_text_config().vocab_size for m in models]
    ids = torch.randint(0, min(sizes), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    rates: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            rate = _rate(models[side], ids, tokens)
            if i:
                rates[side].append(rate)
    found = [Speed(statistics.median(r), engine_of(m)) for r, m in zip(rates, models, strict=True)]
    return found[0], found[1]


def _rate(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Tokens a second of one greedy ``generate``, from the first new token on: without the prompt."""
    clock = _Clock()
    given = model.generation_config
    kept = (given.eos_token_id, given.pad_token_id)
    given.eos_token_id, given.pad_token_id = None, 0  # nothing ends before its length
    try:
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=clock)
    finally:
        given.eos_token_id, given.pad_token_id = kept
    times = clock.times[1:]  # the prompt comes first
    assert len(times) == tokens, f"{len(times)} tokens came, {tokens} were asked for"
    return (len(times) - 1) / (times[-1] - times[0])
