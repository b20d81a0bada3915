"""The decoding loops over the native decoder: one compiled step and one sampler call a token.

transformers prepares everything (options, masks, processors, stopping criteria) as for any model and then calls a
decoding loop; these are such loops. They raise Unsupported, before any work, for what they do not honour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from llmq.runtime.cache import NativeCache, check_positions, shown_columns
from llmq.runtime.native import NativeDecoder
from llmq.runtime.options import check_arguments, check_options, read_processors, say_once
from llmq.runtime.parts import Unsupported
from llmq.runtime.stopping import Stops


class Run:
    """One call of generate: the tokens so far, the sequences, and how a token is chosen.

    ``ids`` i64[B, limit] holds prompt and generated tokens; its first ``columns`` are filled.
    """

    def __init__(
        self,
        decoder: NativeDecoder,
        input_ids: Tensor,
        *,
        logits_processor: Iterable[Any],
        stopping_criteria: Iterable[Any],
        generation_config: Any,
        streamer: Any,
        arguments: dict[str, Any],
    ) -> None:
        check_options(generation_config)
        check_arguments(arguments)
        self.decoder, self.config, self.streamer = decoder, generation_config, streamer
        self.sampling = read_processors(logits_processor, greedy=not self.config.do_sample)
        self.stops = Stops(stopping_criteria)
        cache = arguments.get("past_key_values")
        if not isinstance(cache, NativeCache):
            raise Unsupported(f"past_key_values of class {type(cache).__name__}")
        self.cache: NativeCache = cache
        self.rows, self.columns = input_ids.shape
        self.prompt_columns = self.columns
        new = self._new_columns(input_ids, arguments)
        limit = self._limit(new)
        pad = self.config._pad_token_tensor
        self.ids = torch.full((self.rows, limit), 0 if pad is None else int(pad), dtype=torch.int64)
        self.ids[:, : self.columns] = input_ids
        self._numbers = self.ids.numpy()
        self.starts = [0] * self.rows if self.sampling.ignored is None else self.sampling.ignored.tolist()
        self.sampler: Any = self.sampling.sampler(decoder.vocab_size)
        self.banned = torch.tensor(self.sampling.banned, dtype=torch.int64)
        self.limit = limit

    def _new_columns(self, input_ids: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
        """Each row's tokens that the cache does not hold yet; ``input_ids`` may repeat those that it does."""
        cache, mask = self.cache, arguments.get("attention_mask")
        past = cache.get_seq_length()
        length = getattr(self.config, "_mask_length", -1) if mask is None else mask.shape[1]
        new = input_ids[:, past:] if past and length == self.columns else input_ids
        if new.shape[1] == 0:
            raise ValueError(f"past_key_values already holds all {past} tokens of input_ids; give at least one new one")
        cache.begin(self.decoder, self.rows)
        shown = shown_columns(mask, cache.seen, self.rows, new.shape[1])
        if arguments.get("position_ids") is not None:
            check_positions(arguments["position_ids"][:, -new.shape[1] :], shown, cache)
        tokens = [row[keep] for row, keep in zip(new, shown, strict=True)]
        for row, kept in enumerate(tokens):
            if not len(kept):
                raise ValueError(f"row {row} of the prompt is empty: attention_mask shows none of its tokens")
        self.shown = shown
        return tokens

    def _limit(self, new: list[Tensor]) -> int:
        """Columns at which every row ends: max_length, or where the longest row fills the model's context."""
        longest = max(s.length + len(t) for s, t in zip(self.cache.sequences, new, strict=True))
        check_context(longest, self.decoder)
        self.new = new
        wanted = self.config.max_length if self.stops.columns is None else self.stops.columns
        possible = self.columns + self.decoder.max_positions - longest + 1  # the last token is never fed
        if wanted > possible:
            say_once(
                f"generate: max_length {wanted} goes beyond the model's context of {self.decoder.max_positions} "
                f"positions; it stops there, after {possible - self.columns} new tokens at most"
            )
        return int(min(wanted, possible))

    def prefill(self) -> Tensor:
        """Feed the prompt: f32[B, V]. Rows that are the same (num_return_sequences) are computed once and copied."""
        sequences = self.cache.sequences
        fresh = self.cache.get_seq_length() == 0
        first: dict[bytes, int] = {}
        source = [first.setdefault(t.numpy().tobytes(), i) if fresh else i for i, t in enumerate(self.new)]
        originals = sorted(set(source))
        logits = self.decoder.forward([self.new[i] for i in originals], [sequences[i] for i in originals])
        if len(originals) == self.rows:
            return logits
        self.cache.sequences = [sequences[j] if i == j else sequences[j].copy() for i, j in enumerate(source)]
        return logits[[originals.index(j) for j in source]]

    def choose(self, row: int, columns: int, logits: int) -> int:
        """The token for ``columns`` of ``row`` from the logits at the address ``logits``; it is noted in ``ids``."""
        start = self.starts[row]
        token: int = self.sampler.sample(
            logits,
            self.ids.data_ptr() + 8 * (row * self.limit + start),
            columns - start,
            self.banned.data_ptr(),
            len(self.banned) if columns < self.sampling.banned_until else 0,
            row,
            columns - self.prompt_columns,
        )
        self._numbers[row, columns] = token
        return token

    def generate(self, loop: Callable[[Run], None]) -> Any:
        """Run ``loop`` (:func:`sample` or :func:`look_up`) and return what transformers' generate returns."""
        try:
            loop(self)
        finally:
            self.close()
        if self.streamer is not None:
            self.streamer.end()
        sequences = self.ids[:, : self.columns].clone()
        if self.config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=self.cache)  # type: ignore[arg-type]
        return sequences

    def close(self) -> None:
        """Let the cache's columns agree with what its sequences hold, also after an interruption."""
        before = self.cache.seen.sum(1) + self.shown.sum(1)
        generated = torch.tensor([sequence.length for sequence in self.cache.sequences]) - before
        if bool((generated >= 0).all()):  # else the prompt was refused
            columns = torch.arange(int(generated.max()))
            self.cache.extend(torch.cat([self.shown, columns < generated[:, None]], dim=1))


def check_context(length: int, decoder: NativeDecoder) -> None:
    """Raise ValueError when ``length`` tokens do not fit the model's context."""
    if length > decoder.max_positions:
        raise ValueError(
            f"the prompt has {length} tokens; the model's context is {decoder.max_positions}: shorten it "
            f"(tokenizer(..., truncation=True, max_length={decoder.max_positions}))"
        )


def sample(run: Run) -> None:
    """One token a step for every row that has not ended. Rows that have leave the batch."""
    feed = torch.empty(run.rows, dtype=torch.int64)
    fed, numbers = list(feed.split(1)), feed.numpy()
    active = list(range(run.rows))
    ended = [False] * run.rows
    logits = run.prefill()
    sequences = list(run.cache.sequences)
    while True:
        address, stride = logits.data_ptr(), 4 * logits.shape[1]
        for i, row in enumerate(active):
            token = run.choose(row, run.columns, address + i * stride)
            numbers[i] = token
            ended[row] |= token in run.stops.ends
        run.columns += 1
        if run.streamer is not None:
            run.streamer.put(run.ids[:, run.columns - 1].clone())
        if run.stops.others:
            ended = [a or b for a, b in zip(ended, run.stops.elsewhere(run.ids[:, : run.columns]), strict=True)]
        if run.stops.everywhere(run.columns, run.limit) or all(ended):
            return
        # Without an end token to pad with, transformers lets a row go on until all have ended.
        if run.stops.pads_ended_rows and any(ended[row] for row in active):
            active = [row for row in active if not ended[row]]
            for i, row in enumerate(active):
                numbers[i] = run.ids[row, run.columns - 1]
            sequences = [run.cache.sequences[row] for row in active]
        logits = run.decoder.forward(fed[: len(active)], sequences)


def look_up(run: Run) -> None:
    """Prompt lookup: feed the last token and what followed its n-gram before, keep what the model itself chooses.

    A guess is accepted only when it equals the token that is chosen from the logits before it, so the result is that
    of :func:`sample`: the random number of a position does not depend on the guesses (Saxena 2023, "Prompt lookup
    decoding").
    """
    index = NgramIndex(run.config.max_matching_ngram_size or 2)
    logits = run.prefill()
    (sequence,) = run.cache.sequences
    index.extend(run.ids[0, : run.columns].tolist())
    guess: list[int] = []
    while True:
        address, stride = logits.data_ptr(), 4 * logits.shape[1]
        accepted = 0
        for i in range(len(guess) + 1):
            token = run.choose(0, run.columns, address + i * stride)
            run.columns += 1
            index.extend([token])
            if run.streamer is not None:
                run.streamer.put(torch.tensor([token]))
            ended = run.stops.everywhere(run.columns, run.limit) or token in run.stops.ends
            ended = ended or (bool(run.stops.others) and any(run.stops.elsewhere(run.ids[:, : run.columns])))
            if ended or i == len(guess) or token != guess[i]:
                break
            accepted += 1
        sequence.crop(sequence.length - len(guess) + accepted)
        if ended:
            return
        guess = index.lookup(min(run.config.prompt_lookup_num_tokens, run.limit - run.columns - 1))
        tokens = torch.tensor([token, *guess])
        logits = run.decoder.forward([tokens], [sequence], output="all" if guess else "last")


class NgramIndex:
    """Where each n-gram of a growing text was last followed by something, for n up to ``longest``."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Append tokens."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.longest, end) + 1):
                self.follows[tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def lookup(self, count: int) -> list[int]:
        """Up to ``count`` tokens that followed the longest n-gram that ends the text when it last came before."""
        for n in range(min(self.longest, len(self.tokens)), 0, -1):
            begin = self.follows.get(tuple(self.tokens[-n:]))
            if begin is not None:
                return self.tokens[begin : begin + max(0, count)]
        return []
