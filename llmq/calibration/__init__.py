"""Calibration text: data set, file, folder or the model's own words -> i64[n_samples, seqlen] token windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.calibration import files
from llmq.calibration.hub import rows
from llmq.calibration.self_generated import Sampler, sample_from_model
from llmq.calibration.sources import SOURCES, Source, from_files
from llmq.calibration.windows import CalibrationSet, bos_id, cut, digest, draw, has_text, token_stream
from llmq.config import CalibConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "AUTO",
    "SOURCES",
    "CalibrationSet",
    "Sampler",
    "Source",
    "bos_id",
    "check",
    "is_sampled",
    "load",
    "sample_from_model",
    "text_of",
]

# The row that "auto" stands for: the best text that needs no network, by the table in docs/QUALITY.md.
AUTO = "self"

# Tokens read for each token needed where a source is huge, so that the seed has something to choose from.
READ_AHEAD = 2
# Tokens after which the reading of any other source stops (WikiText-2's train split has about 2.5 million).
MAX_TOKENS = 1 << 22

Log = Callable[[str], object]


def load(
    cfg: CalibConfig, tokenizer: PreTrainedTokenizerBase, *, sampler: Sampler | None = None, log: Log | None = None
) -> CalibrationSet:
    """The calibration windows that ``cfg`` asks for.

    Args:
        cfg: ``calib`` is a row of SOURCES, "auto" (the row AUTO), a file (.txt, .jsonl, .json, .parquet), a folder or
            a glob.
        tokenizer: the model's own.
        sampler: writes windows with the model; needed by ``self`` only.
        log: gets one line at the start and one at the end.

    Returns:
        At most ``cfg.nsamples`` windows of ``cfg.seqlen`` tokens; fewer when the text holds fewer, said in ``note``.
        At most ``cfg.tune_samples`` others of the same text beside them; text that the model writes has none.

    Raises:
        ValueError: unknown name, no sampler for ``self``, text without a single full window, unreadable content.
        FileNotFoundError: a file that is not there, a data set neither reachable nor cached.
    """
    source = _source(cfg.calib)
    say = log or (lambda _: None)
    say(f"calibration: reading {source.describe()}")
    result = _sampled(cfg, source, tokenizer, sampler) if source.texts is None else _cut(cfg, source, tokenizer)
    n, seqlen = result.tokens.shape
    note = f"; {result.note}" if result.note else ""
    say(f"calibration: {n} windows of {seqlen} tokens, {result.rows_read} texts, sha256 {result.sha256[:12]}{note}")
    return result


def check(cfg: CalibConfig, *, max_positions: int | None) -> None:
    """Raise every error that can be known before the model is loaded. Reads no further than the first text.

    Args:
        cfg: what will be loaded.
        max_positions: tokens of the model's context, None if it has no limit.

    Raises:
        ValueError, FileNotFoundError: as :func:`load`, and ``seqlen`` beyond ``max_positions``.
    """
    if max_positions is not None and cfg.seqlen > max_positions:
        raise ValueError(
            f"seqlen is {cfg.seqlen}, and the model's context is {max_positions} tokens; "
            f"use --seqlen {max_positions} or less"
        )
    source = _source(cfg.calib)
    if source.texts is not None and not any(has_text(text) for text in source.texts([])):
        raise ValueError(f"calibration text {source.describe()} is empty; give a file with text")


def is_sampled(cfg: CalibConfig) -> bool:
    """Whether the model itself will write the text, for which all its weights are in memory. Raises as check()."""
    return _source(cfg.calib).texts is None


def text_of(name_or_path: str, split: str = "test") -> str:
    """Evaluation text: a data set's split joined as the field scores it, or a file as it stands.

    WikiText-2 is joined by blank lines, PTB by spaces, C4 is the first 1,100 validation rows joined by spaces (Frantar
    et al. 2022, the protocol of GPTQ). The records of a .jsonl, .json or .parquet file are joined by blank lines; any
    other file must be UTF-8 text and is returned as it stands, line ends included.

    Raises:
        ValueError: unknown name or split, a row that is no evaluation text, records that are conversations.
        FileNotFoundError: a file that is not there, a data set neither reachable nor cached.
    """
    source = SOURCES.get(name_or_path)
    if source is None:
        return _file_text(name_or_path)
    if source.hub is None:
        raise ValueError(f"{name_or_path!r} is calibration text only; to evaluate give one of {_scored()}, or a file")
    part = source.hub.split(split)
    return part.separator.join(itertools.islice(rows(source.hub, split), part.eval_rows))


def _file_text(name: str) -> str:
    path = Path(name).expanduser()
    if not path.exists():
        if files.looks_like_path(name):
            raise FileNotFoundError(f"evaluation file {name} does not exist; give a file, or one of {_scored()}")
        raise ValueError(f"dataset is {name!r}; known: {_scored()}; or a file (there is none of that name)")
    if path.is_dir():
        raise ValueError(f"{name} is a folder; evaluation needs one file, read as it stands")
    if path.suffix.lower() not in files.READERS or path.suffix.lower() == ".txt":
        return files.decode(path)
    records = list(files.read([path]))
    texts = [text for text in records if isinstance(text, str)]
    if len(texts) < len(records):
        raise ValueError(f"{name} holds conversations; evaluation needs plain text ('text')")
    return "\n\n".join(texts)


def _scored() -> str:
    return ", ".join(name for name, row in SOURCES.items() if row.hub is not None)


def _source(calib: str) -> Source:
    """The row that ``calib`` names, or one made for its files."""
    name = AUTO if calib == "auto" else calib
    if name in SOURCES:
        return SOURCES[name]
    if files.looks_like_path(calib):
        return from_files(calib)
    known = ", ".join(["auto", *SOURCES])
    raise ValueError(f"calib is {calib!r}; known: {known}; or a file, folder or glob (there is none of that name)")


def _cut(cfg: CalibConfig, source: Source, tokenizer: PreTrainedTokenizerBase) -> CalibrationSet:
    """Windows cut from the source's text."""
    assert source.texts is not None
    needed = cfg.nsamples * cfg.seqlen
    budget = READ_AHEAD * needed if source.huge else max(READ_AHEAD * needed, MAX_TOKENS)
    notes: list[str] = []
    stream = token_stream(source.texts(notes), tokenizer, separator=source.separator, budget=budget)
    bos = bos_id(tokenizer)
    windows = cut(stream.tokens, cfg.seqlen, bos)
    available = stream.tokens.numel()
    width = cfg.seqlen - (bos is not None)
    if not len(windows):
        raise ValueError(
            f"calibration text {source.describe()} holds {available} tokens, and one window of seqlen {cfg.seqlen} "
            f"needs {width}; give more text, or a smaller --seqlen"
        )
    if len(windows) < cfg.nsamples:
        notes.append(
            f"only {len(windows)} of {cfg.nsamples} windows: the text holds {available} tokens, "
            f"{cfg.nsamples * width} are needed"
        )
    if not stream.exhausted:
        notes.append(f"reading stopped after {available} tokens, text was left")
    drawn, others = draw(windows, cfg.nsamples, cfg.seed)
    more, _ = draw(others, cfg.tune_samples, cfg.seed)
    return _finish(drawn, source, stream.rows_read, available, bos is not None, notes, more)


def _sampled(
    cfg: CalibConfig, source: Source, tokenizer: PreTrainedTokenizerBase, sampler: Sampler | None
) -> CalibrationSet:
    """Windows that the model writes."""
    if sampler is None:
        raise ValueError(f"calib {cfg.calib!r} is text sampled from the model, and no sampler was given; pass sampler=")
    tokens = sampler(cfg.nsamples, cfg.seqlen, cfg.seed)
    if tuple(tokens.shape) != (cfg.nsamples, cfg.seqlen) or tokens.dtype != torch.int64:
        raise ValueError(
            f"the sampler gave {tokens.dtype}{list(tokens.shape)}, expected torch.int64[{cfg.nsamples}, {cfg.seqlen}]"
        )
    bos = bos_id(tokenizer)
    starts = bos is not None and bool((tokens[:, 0] == bos).all())
    return _finish(tokens, source, cfg.nsamples, tokens.numel(), starts, [])


def _finish(
    tokens: Tensor,
    source: Source,
    rows_read: int,
    available: int,
    bos: bool,
    notes: list[str],
    more: Tensor | None = None,
) -> CalibrationSet:
    return CalibrationSet(
        tokens=tokens,
        source=source.describe(),
        rows_read=rows_read,
        tokens_available=available,
        tokens_kept=tokens.numel(),
        bos=bos,
        sha256=digest(tokens),
        note="; ".join(notes),
        more=tokens[:0] if more is None else more,
    )
