"""From texts to token windows: tokenize, concatenate, cut, draw.

Law of a window of ``seqlen`` tokens: where the tokenizer puts a BOS before a text, token 0 is BOS and tokens 1.. are
the next ``seqlen - 1`` tokens of the stream; else all ``seqlen`` tokens come from the stream. Windows never overlap.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, Any]]
Text = str | Conversation

# One call of the tokenizer gets at most this many characters: its result takes about 100 bytes a character.
PIECE_CHARS = 1 << 21
# Generous estimate of characters a token; only sets how far a stream is read ahead.
CHARS_PER_TOKEN = 4


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration windows and where they come from.

    Attributes:
        tokens: i64[n_samples, seqlen].
        source: file or data set, exact.
        rows_read: rows, documents or files read (windows, for text sampled from the model).
        tokens_available: tokens of the text read, before the draw.
        tokens_kept: ``n_samples * seqlen``, BOS included.
        bos: whether every window begins with BOS.
        sha256: of ``tokens`` as little-endian int64, row after row.
        note: what the reader of a report must know ("" if nothing).
        more: i64[m, seqlen], further windows of the same text, for what is tuned end to end.
    """

    tokens: Tensor
    source: str
    rows_read: int
    tokens_available: int
    tokens_kept: int
    bos: bool
    sha256: str
    note: str
    more: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def provenance(self) -> dict[str, Any]:
        """Everything but the tokens, ready for JSON."""
        n_samples, seqlen = self.tokens.shape
        more = {"tune_samples": len(self.more), "tune_sha256": digest(self.more)} if len(self.more) else {}
        return more | {
            "source": self.source,
            "n_samples": n_samples,
            "seqlen": seqlen,
            "rows_read": self.rows_read,
            "tokens_available": self.tokens_available,
            "tokens_kept": self.tokens_kept,
            "bos": self.bos,
            "sha256": self.sha256,
            "note": self.note,
        }


@dataclass(frozen=True)
class TokenStream:
    """Tokens i64[n] of the first ``rows_read`` texts of a source; ``exhausted`` when there is no more."""

    tokens: Tensor
    rows_read: int
    exhausted: bool


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id this tokenizer puts before a text, or None: asked of the tokenizer itself, not of its flags.

    A window without it is outside what a model such as Gemma was trained on (perplexity 23.6 instead of 16.3 for the
    270M one); a model whose tokenizer adds none (Qwen) never saw one.
    """
    bos = tokenizer.bos_token_id
    ids = tokenizer("x")["input_ids"]
    return bos if isinstance(bos, int) and len(ids) > 0 and ids[0] == bos else None


def has_text(text: Text) -> bool:
    """False for a blank string or an empty conversation."""
    return bool(text.strip()) if isinstance(text, str) else bool(text)


def plain(text: Text, tokenizer: PreTrainedTokenizerBase) -> str:
    """``text`` as a string; a conversation is written by the tokenizer's chat template.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template or its template refuses the messages.
    """
    if isinstance(text, str):
        return text
    if tokenizer.chat_template is None:
        raise ValueError(
            "the calibration text holds 'messages', and the tokenizer has no chat template; "
            "use an instruction model, or a file with 'text'"
        )
    try:
        written = str(tokenizer.apply_chat_template(text, tokenize=False))
    except Exception as e:  # a template is a program of the model's author: it may raise anything
        raise ValueError(f"the tokenizer's chat template refuses a conversation of {len(text)} messages: {e}") from e
    # The window brings its own BOS; a second one inside would be text no model has seen.
    return written.removeprefix(str(tokenizer.bos_token)) if bos_id(tokenizer) is not None else written


def split_text(text: str, limit: int) -> Iterator[str]:
    """``text`` in parts of at most ``limit`` characters, cut before a blank line, a line or a word if there is one."""
    start = 0
    while len(text) - start > limit:
        cuts = (text.rfind(mark, start + limit // 2, start + limit) for mark in ("\n\n", "\n", " "))
        end = next((c for c in cuts if c > start), start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def token_stream(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, *, separator: str, budget: int
) -> TokenStream:
    """Tokenize ``texts`` joined by ``separator``, without special tokens, until ``budget`` tokens are there.

    Texts are joined before they are tokenized (as the GPTQ protocol joins WikiText-2), in pieces of bounded size.
    """
    parts: list[Tensor] = []
    n_tokens = rows = 0
    waiting = ""
    source = iter(texts)
    exhausted = False
    while n_tokens < budget and not exhausted:
        limit = min(PIECE_CHARS, max(1 << 14, (budget - n_tokens) * CHARS_PER_TOKEN))
        held, size = [waiting], len(waiting)
        while size < limit:
            text = next(source, None)
            if text is None:
                exhausted = True
                break
            held.append((separator if rows else "") + plain(text, tokenizer))
            size += len(held[-1])
            rows += 1
        *pieces, waiting = split_text("".join(held), limit)
        for piece in (*pieces, waiting) if exhausted else pieces or [waiting]:
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(torch.tensor(ids, dtype=torch.int64))
            n_tokens += len(ids)
        if exhausted or not pieces:
            waiting = ""
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return TokenStream(tokens, rows, exhausted)


def cut(tokens: Tensor, seqlen: int, bos: int | None) -> Tensor:
    """Non-overlapping windows of a token stream; the tail that fills none is dropped.

    Args:
        tokens: i64[n].
        seqlen: tokens a window, BOS included.
        bos: id that begins each window, or None.

    Returns:
        i64[n // (seqlen - 1), seqlen] with BOS, i64[n // seqlen, seqlen] without.
    """
    width = seqlen - (bos is not None)
    n = tokens.numel() // width
    windows = tokens[: n * width].reshape(n, width)
    return windows.clone() if bos is None else torch.cat([torch.full((n, 1), bos), windows], dim=1)


def pieces_of(tokens: Tensor, width: int, *, bos: bool) -> Tensor:
    """i64[m, width] from windows i64[n, seqlen], each with the windows' BOS; shorter windows stay as they are."""
    n, seqlen = tokens.shape
    if seqlen <= width:
        return tokens
    first = 1 if bos else 0
    own = width - first
    count = (seqlen - first) // own
    pieces = tokens[:, first : first + count * own].reshape(n * count, own)
    return torch.cat([tokens[:1, :first].expand(len(pieces), first), pieces], 1)


def draw(windows: Tensor, n_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n_samples`` rows of i64[n, seqlen], drawn without replacement, and the others, in the order of the text."""
    n = windows.shape[0]
    if n <= n_samples:
        return windows, windows[n:]
    # Python's generator, not torch's: its sample() is the same in every version we run on.
    drawn = sorted(random.Random(seed).sample(range(n), n_samples))
    return windows[drawn], windows[sorted(set(range(n)).difference(drawn))]


def digest(tokens: Tensor) -> str:
    """SHA-256 of an i64 tensor's values as little-endian int64."""
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
