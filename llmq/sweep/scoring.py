"""Scoring a batch of checkpoints on the same windows, the reference's logits computed once for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from llmq.evaluation import Subject, check_fits, progress_line
from llmq.likelihood import score_together
from llmq.logits import engine_of
from llmq.models.resolve import resolve
from llmq.runtime.floats import to_floats
from llmq.runtime.qlinear import set_activation_bits

Log = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to score.

    Attributes:
        name, series: in the table, in the plot.
        path: folder or GGUF file.
        bits_per_weight: over the linears.
        activation_bits: to score it with; None: a model of others, as it is.
        cost: seconds and peak bytes of its making, where known.
        about: what made it, where that was another package.
    """

    name: str
    series: str
    path: Path
    bits_per_weight: float
    activation_bits: int | None
    cost: dict[str, Any]
    about: str = ""


def score_candidates(
    batch: list[Candidate], reference: Subject, tokens: Tensor, record: dict[str, Any], log: Log
) -> None:
    """Load and score ``batch``, all together; rows go into ``record``, as do the reasons of those that failed.

    Args:
        reference: the unquantized model, whose tokenizer made the tokens.
        tokens: i64[W, seqlen].
    """
    loaded: list[tuple[Candidate, Any]] = []
    for candidate in batch:
        try:
            loaded.append((candidate, load(candidate, reference, tokens, log)))
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            record["failed"][candidate.name] = str(error)
            log(f"{candidate.name} failed: {error}")
    if not loaded:
        return
    log(f"scoring {', '.join(candidate.name for candidate, _ in loaded)}")
    base = reference.load()
    try:
        _score(loaded, base, tokens, record)
    except ValueError as error:  # of one of them: the others are scored without it
        for pair in loaded if len(loaded) > 1 else ():
            score_loaded = [pair]
            try:
                _score(score_loaded, base, tokens, record)
            except ValueError as alone:
                record["failed"][pair[0].name] = str(alone)
        if len(loaded) == 1:
            record["failed"][loaded[0][0].name] = str(error)


def _score(loaded: list[tuple[Candidate, Any]], base: Any, tokens: Tensor, record: dict[str, Any]) -> None:
    models = [model for _, model in loaded]
    scores = score_together(models, tokens, reference=base, progress=progress_line(time.monotonic()))
    for (candidate, model), score in zip(loaded, scores, strict=True):
        figures, engine = score.to_json(), engine_of(model)
        record["reference"] = {
            "perplexity": score.reference_perplexity,
            "nll_per_window": figures["reference_nll_per_window"],
        }
        record["rows"][candidate.name] = {
            "series": candidate.series,
            "about": candidate.about,
            "path": str(candidate.path),
            "bits_per_weight": candidate.bits_per_weight,
            "activations": "int8" if "int8" in engine else "float",
            "engine": engine,
            "made": candidate.cost,
            "score": figures,
        }


def load(candidate: Candidate, reference: Subject, tokens: Tensor, log: Log) -> Any:
    """The candidate's model, ready to be scored on the reference's tokens.

    Raises:
        ValueError: another vocabulary or a shorter context than the reference's, damaged files; names it.
        ImportError: transformers needs a package to read it; says which.
    """
    folder = resolve(str(candidate.path), log=log).folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    sizes = [c.get_text_config().vocab_size for c in (config, reference.config)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{candidate.name} has a vocabulary of {sizes[0]}, the reference one of {sizes[1]}")
    check_fits(config, tokens)
    model = Subject(candidate.name, folder, config, reference.tokenizer).load()
    if candidate.activation_bits is not None:
        set_activation_bits(model, candidate.activation_bits)
    if candidate.activation_bits == 16:
        to_floats(model)
    return model
