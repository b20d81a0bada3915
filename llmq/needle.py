"""Retrieval from a long context: a pass key hidden in other text, scored by likelihood against wrong keys.

No answer is generated: the model is right where it finds the hidden key likelier than every distractor, so that small
base models can be measured, too. The other text is the documentation that ships with Python: no download.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.calibration import stdlib_text
from llmq.kv_feed import KVFeed

KEYS = 8  # the right one and seven others: guessing is right once in eight
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
MIN_CONTEXT = 128


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        prompt: i64[context] text with the needle, and the question.
        answers: i64[KEYS, t] the keys as tokens, the right one first.
    """

    prompt: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Cell:
    """The trials of one context length and depth: how often the right key won, and by how much.

    ``margin`` is the mean of log p(right key) - log p(likeliest wrong key), nats.
    """

    kv: str
    context: int
    depth: float
    trials: int
    right: int
    margin: float


class Haystack:
    """Makes trials for one tokenizer. The filler starts elsewhere in each trial.

    Raises ValueError if the documentation does not fill ``longest`` tokens.
    """

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self.tokenizer = tokenizer
        begins = tokenizer("x")["input_ids"][:1]
        self.start = [tokenizer.bos_token_id] if begins == [tokenizer.bos_token_id] else []
        self.filler: list[int] = []
        for text in itertools.islice(stdlib_text.texts(), 10_000):
            self.filler += self._ids(text + "\n\n")
            if len(self.filler) >= 2 * longest:
                break
        if len(self.filler) < longest:
            raise ValueError(f"the filler text has {len(self.filler)} tokens, a context needs {longest}: ask for less")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def trial(self, context: int, depth: float, seed: int) -> Trial:
        """A trial of ``context`` tokens with the needle after the share ``depth`` (0 to 1) of the filler.

        Raises ValueError for fewer than ``MIN_CONTEXT`` tokens or a depth out of range.
        """
        if context < MIN_CONTEXT or not 0 <= depth <= 1:
            raise ValueError(
                f"context is {context}, depth {depth}: use at least {MIN_CONTEXT} tokens and a depth of 0 to 1"
            )
        draw = random.Random(f"{context} {depth} {seed}")
        keys = self._keys(draw)
        needle, question = self._ids(NEEDLE.format(key=keys[0])), self._ids(QUESTION)
        room = context - len(self.start) - len(needle) - len(question)
        first = draw.randrange(len(self.filler) - room + 1)
        filler, at = self.filler[first : first + room], round(depth * room)
        prompt = [*self.start, *filler[:at], *needle, *filler[at:], *question]
        return Trial(torch.tensor(prompt), torch.tensor([self._ids(f" {key}") for key in keys]))

    def _keys(self, draw: random.Random) -> list[str]:
        """Keys of as many tokens, none twice."""
        keys: list[str] = []
        while len(keys) < KEYS:
            key = str(draw.randrange(10_000, 100_000))
            if key not in keys and (not keys or len(self._ids(f" {key}")) == len(self._ids(f" {keys[0]}"))):
                keys.append(key)
        return keys


@torch.inference_mode()
def log_likelihoods(model: Any, trial: Trial, kv: KVFeed) -> Tensor:
    """f64[KEYS] log p(answer | prompt), nats, the prompt fed through a cache of ``kv`` once."""
    cache = kv.new_cache(model)
    for part in trial.prompt.split(kv.chunk):
        first = model(input_ids=part[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
    cache.batch_repeat_interleave(len(trial.answers))
    logits = first.expand(len(trial.answers), -1, -1)
    if trial.answers.shape[1] > 1:
        rest = model(input_ids=trial.answers[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest], dim=1)
    logp = logits.double().log_softmax(-1)
    total: Tensor = logp.gather(-1, trial.answers[..., None])[..., 0].sum(1)
    return total


def measure(
    model: Any,
    haystack: Haystack,
    feeds: Sequence[KVFeed],
    contexts: Sequence[int],
    depths: Sequence[float],
    trials: int,
    *,
    log: Callable[[str], None],
) -> list[Cell]:
    """Every cell for every cache; all caches are asked the same questions."""

    def cells() -> Iterator[Cell]:
        for kv, context, depth in itertools.product(feeds, contexts, depths):
            asked = [haystack.trial(context, depth, seed) for seed in range(trials)]
            scores = torch.stack([log_likelihoods(model, trial, kv) for trial in asked])
            margins = scores[:, 0] - scores[:, 1:].amax(1)
            right = int((margins > 0).sum())
            log(f"kv {kv.config}, context {context}, depth {100 * depth:.0f} %: {right} of {trials} right")
            yield Cell(str(kv.config), context, depth, trials, right, float(margins.mean()))

    return list(cells())


def table(cells: Sequence[Cell]) -> str:
    """Depth by context for each cache: right answers of the trials, and the mean margin in nats."""
    lines = []
    contexts = list(dict.fromkeys(c.context for c in cells))
    for kv in dict.fromkeys(c.kv for c in cells):
        lines += [f"KV cache {kv}", f"{'depth':>8}" + "".join(f"{c:>18}" for c in contexts)]
        for depth in dict.fromkeys(c.depth for c in cells):
            row = [c for c in cells if c.kv == kv and c.depth == depth]
            shown = (f"{c.right} of {c.trials} ({c.margin:+.1f})" for c in row)
            lines.append(f"{100 * depth:>6.0f} %" + "".join(f"{text:>18}" for text in shown))
        mine = [c for c in cells if c.kv == kv]
        lines.append(f"{'all':>8}  {sum(c.right for c in mine)} of {sum(c.trials for c in mine)}")
    return "\n".join(lines)
