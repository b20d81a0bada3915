"""Calibration text sampled from the model itself, as LLM-QAT does (Liu et al. 2023, arXiv 2305.17888, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.calibration.windows import bos_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

# The KV cache grows with it: 16 windows of 2048 tokens take at most 0.6 GB for Gemma 3 270M in fp16.
BATCH = 16
# Tokens whose probabilities are summed before sums are: a vocabulary of 262,144 in 512 parts.
PART = 512


class Sampler(Protocol):
    """What the pipeline hands to ``load`` so that ``self`` can sample from the model it holds."""

    def __call__(self, n_samples: int, seqlen: int, seed: int) -> Tensor:
        """i64[n_samples, seqlen], the same for the same seed."""


def sample_from_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seqlen: int,
    seed: int,
    progress: Progress | None = None,
    *,
    batch_size: int = BATCH,
) -> Tensor:
    """Windows of text that the model writes: BOS (if the tokenizer has one), a random ordinary token, then samples.

    Sampling is plain: temperature 1, no top-k, no top-p. Special tokens, the end of text first among them, are never
    drawn: a window must not end, and an EOS or BOS inside it would be a state that the model hardly meets in use.
    The global random generator is not touched.

    Args:
        model: a Hugging Face causal LM with ``generate``; put into eval mode.
        tokenizer: the model's own.
        n_samples: windows.
        seqlen: tokens a window, BOS included.
        seed: the same seed, model and batch size give the same tokens (on one machine; float sums differ elsewhere).
        progress: called after each token step with (tokens drawn so far, tokens in all).
        batch_size: windows written at once; memory of the KV cache grows with it.

    Returns:
        i64[n_samples, seqlen] on the CPU.

    Raises:
        ValueError: a window too short to sample, logits that are not finite, or a model that stops early.
    """
    bos = bos_id(tokenizer)
    prompt = 1 + (bos is not None)
    if seqlen <= prompt:
        raise ValueError(f"seqlen is {seqlen}; sampling from the model needs more than {prompt} tokens a window")
    banned = torch.tensor(_special_ids(model, tokenizer), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.ones(_vocab(model, tokenizer), dtype=torch.bool)
    ordinary[banned[banned < len(ordinary)]] = False
    choices = ordinary.nonzero().flatten()
    first = choices[torch.randint(len(choices), (n_samples, 1), generator=generator)]
    prompts = first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)
    model.eval()
    windows = []
    with torch.inference_mode():
        for start in range(0, n_samples, batch_size):
            batch = prompts[start : start + batch_size]
            report = _reporter(progress, start * seqlen, len(batch), n_samples * seqlen)
            windows.append(_continue(model, batch, seqlen, _plain_sampling(banned, generator), report))
    return torch.cat(windows)


def _plain_sampling(banned: Tensor, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that draws from softmax(logits) without ``banned``; the drawn token's score becomes infinite.

    With greedy choice after it this is sampling, by inversion of the distribution function. The sampler of
    ``generate`` makes one random number a token of the vocabulary: for 262,144 of them it costs more than the model.
    """

    def draw(ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG001 (transformers' signature)
        # transformers hands over a copy in fp32 of its own: it is written into.
        scores.index_fill_(1, banned.to(scores.device), float("-inf"))
        weights = (scores - scores.amax(dim=1, keepdim=True)).exp_()
        # Sums of 262,144 terms need fp64, or the last tokens of a vocabulary are drawn wrongly; a part's own do not.
        rest = -weights.shape[1] % PART
        parts = (F.pad(weights, (0, rest)) if rest else weights).unflatten(1, (-1, PART))
        sums = parts.sum(dim=2).double()
        if not bool(sums.isfinite().all()):
            raise ValueError("the model's logits are not finite, so no text can be sampled from it; use a text file")
        edges = sums.cumsum(dim=1)
        point = torch.rand(len(edges), 1, generator=generator, dtype=torch.float64).to(edges.device) * edges[:, -1:]
        part = _first_beyond(edges, point)
        point -= edges.gather(1, part) - sums.gather(1, part)
        inside = parts.gather(1, part[:, :, None].expand(-1, -1, PART))[:, 0].cumsum(dim=1, dtype=torch.float64)
        return scores.scatter_(1, part * PART + _first_beyond(inside, point), float("inf"))

    return draw


def _first_beyond(edges: Tensor, point: Tensor) -> Tensor:
    """i64[b, 1], the first index whose edge f64[b, n] lies beyond ``point`` [b, 1]: never one without mass.

    A point that rounding has put at the end or beyond belongs to the last that has mass.
    """
    last = (edges < edges[:, -1:]).sum(dim=1, keepdim=True)
    return torch.minimum(torch.searchsorted(edges, point, right=True), last)


def _continue(
    model: Any, prompts: Tensor, seqlen: int, draw: Callable[[Tensor, Tensor], Tensor], report: Callable[..., Tensor]
) -> Tensor:
    """``prompts`` i64[b, p] extended by sampling to i64[b, seqlen]."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    options = GenerationConfig(
        do_sample=False, max_new_tokens=seqlen - prompts.shape[1], pad_token_id=0, use_cache=True
    )
    prompts = prompts.to(model.device)
    # generate() fills what `options` leaves open from the model's own configuration (penalties, stop tokens, min-p):
    # plain sampling needs that one out of the way.
    own, model.generation_config = model.generation_config, options
    try:
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([report]),
        )
    finally:
        model.generation_config = own
    if tuple(out.shape) != (prompts.shape[0], seqlen):
        raise ValueError(f"the model wrote windows of {out.shape[1]} tokens, {seqlen} were asked for; use a text file")
    return torch.as_tensor(out).cpu().to(torch.int64)


def _reporter(progress: Progress | None, before: int, rows: int, total: int) -> Callable[..., Tensor]:
    """A stopping criterion that never stops and reports each step."""

    def report(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG001 (transformers' signature)
        if progress is not None:
            progress(before + rows * ids.shape[1], total)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    return report


def _vocab(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that both the tokenizer and the model's embedding know: either may be padded."""
    return min(len(tokenizer), _rows(model.get_input_embeddings(), "num_embeddings"))


def _special_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that are no text: special and added tokens, the model's stop tokens, padding rows of its vocabulary."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    rows = _rows(model.get_output_embeddings(), "out_features")
    padding = range(len(tokenizer), rows)
    return sorted({i for i in (*tokenizer.all_special_ids, *added, *stops, *padding) if 0 <= i < rows})


def _rows(table: Any, attribute: str) -> int:
    """Rows of an embedding or a head; quantized ones have no ``weight``."""
    return int(getattr(table, attribute, None) or table.weight.shape[0])
