"""The gain of prompt lookup: greedy text from one prompt with and without it, in turns, and whether it is the same.

How much it gains depends on the text alone: on how often the model writes again what it read.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.bench import machine
from llmq.bench.engines import ENGINES, Source, made
from llmq.bench.worker import Clock, Transformers
from llmq.calibration import stdlib_text
from llmq.config import cache_folder
from llmq.evaluation import to_stderr
from llmq.models.load import open_model
from llmq.models.resolve import resolve

PROMPT = 512  # tokens
REPEATED = 64  # tokens that the repeating prompt says over and over


@dataclass
class Gain:
    """Tokens/s of each round, without and with prompt lookup, and whether every text was the same."""

    plain: list[float] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)
    same: bool = True

    def row(self, name: str) -> str:
        """A line of the table."""
        pairs = zip(self.lookup, self.plain, strict=True)
        ratio = statistics.median(fast / slow for fast, slow in pairs)
        speeds = " | ".join(f"{statistics.median(column):.4g}" for column in (self.plain, self.lookup))
        return f"| {name} | {speeds} | {ratio:.2f} | {'yes' if self.same else 'NO'} |"


def engine_of(names: str) -> str:
    """The first engine of ``--engines`` that runs llmq. Raises ValueError if none does: others have no such option."""
    found = [name for name in names.split(",") if name in ENGINES and name.startswith("llmq-")]
    if not found:
        raise ValueError(f"--prompt-lookup measures llmq; --engines {names} names no row of it, such as llmq-w4-h8")
    return found[0]


def prompts(text: str, tokenizer: Any, tokens: int = PROMPT) -> dict[str, list[int]]:
    """Token ids of the prompts: the text's beginning, and a piece of it again and again. ValueError if too short."""
    ids: list[int] = tokenizer(text[: tokens * 16])["input_ids"][:tokens]
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids)} tokens; prompt lookup is measured after {tokens}: give a longer one")
    piece = ids[:REPEATED]
    return {"text": ids, "repeating": (piece * (tokens // len(piece) + 1))[:tokens]}


def text_of(path: Path | None) -> str:
    """The user's text, or the documentation that comes with Python."""
    if path is None:
        return "\n\n".join(stdlib_text.texts())
    if not path.is_file():
        raise FileNotFoundError(f"--text: there is no file {path}")
    return path.read_text(encoding="utf-8")


def measure(session: Transformers, ids: list[int], guesses: int, new_tokens: int, rounds: int) -> Gain:
    """Time ``new_tokens`` steps after the first new token, both ways in each round, every other round backwards."""
    gain = Gain()
    texts = set()
    for turn in range(-1, rounds):  # the first one is the warm-up
        for count in (0, guesses) if turn % 2 == 0 else (guesses, 0):
            seconds, out = _generate(session, ids, count, new_tokens)
            texts.add(tuple(out))
            if turn >= 0:
                (gain.lookup if count else gain.plain).append(new_tokens / seconds)
    gain.same = len(texts) == 1
    return gain


def _generate(session: Transformers, ids: list[int], guesses: int, new_tokens: int) -> tuple[float, list[int]]:
    import torch

    prompt = torch.tensor([ids])
    streamer = Clock()
    options: dict[str, Any] = {"max_new_tokens": new_tokens + 1, "do_sample": False}
    if guesses:
        options["prompt_lookup_num_tokens"] = guesses
    out = session.model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **options)
    if len(streamer.times) != new_tokens + 1:
        raise ValueError(f"generate gave {len(streamer.times)} tokens, {new_tokens + 1} were asked for")
    return streamer.times[-1] - streamer.times[0], out[0, len(ids) :].tolist()


def run(args: argparse.Namespace) -> bool:
    """Print the table; whether both ways gave the same text everywhere. Raises as the options' checks say."""
    from transformers import AutoTokenizer

    if not args.model:
        raise ValueError("--model is missing: the unquantized model that is measured")
    if args.prompt_lookup < 1:
        raise ValueError(f"--prompt-lookup is {args.prompt_lookup}; it must be at least 1 guessed token")
    name = engine_of(args.engines)
    text = text_of(args.text)
    folder = resolve(args.model, log=to_stderr).folder
    longest = open_model(folder).max_positions
    if PROMPT + args.new_tokens + 1 > longest:
        raise ValueError(f"{PROMPT + args.new_tokens + 1} tokens would be needed; the model's context is {longest}")
    ids = prompts(text, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    make = ENGINES[name].make
    assert make is not None
    source = Source(folder, args.cache or cache_folder() / "bench", (), args.threads)
    session = Transformers(str(made(source, name, make, to_stderr)), args.threads)
    gains = {kind: measure(session, row, args.prompt_lookup, args.new_tokens, args.rounds) for kind, row in ids.items()}
    info = machine.describe()
    print(f"model    {args.model}, {name}, {session.version}; {args.threads} threads; {info['cpu']}")
    print(f"prompts  {PROMPT} tokens of {args.text or 'the documentation of Python'}; its first {REPEATED} repeated")
    print(f"timed    {args.new_tokens} greedy tokens after the first, {args.rounds} rounds, warm-up before")
    print(f"lookup   at most {args.prompt_lookup} tokens guessed a step\n")
    print("| prompt | plain, tokens/s | prompt lookup, tokens/s | times | same tokens |\n|---|---|---|---|---|")
    for kind, gain in gains.items():
        print(gain.row(kind))
    for note in dict.fromkeys(session.notes):
        print(note)
    return all(gain.same for gain in gains.values())
