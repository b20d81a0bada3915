"""Which options of transformers' ``generate`` the native loop honours, and how they become those of the sampler.

Tables of what is known: anything else, so also every option that a later transformers adds, goes to its own loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as lp

from llmq.config import KVCacheConfig, one_of
from llmq.runtime.parts import Unsupported, core

logger = logging.getLogger(__name__)

# Fields of GenerationConfig that the native loop honours, or that mean nothing to a loop with one beam.
NATIVE_OPTIONS = frozenset(
    [
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "num_return_sequences",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "early_stopping",
        "length_penalty",
        "disable_compile",
        "compile_config",
        "cache_config",
        "transformers_version",
    ]
)
# Values of other fields that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (True,),
    "cache_implementation": ("dynamic", "quantized"),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
}
# Keyword arguments that reach a decoding loop and that it understands.
NATIVE_ARGUMENTS = frozenset(
    ["attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "tokenizer", "inputs_tensor"]
)

# Keys of transformers' cache_config for cache_implementation="quantized", as fields of KVCacheConfig. Its own fields
# are known as well.
CACHE_KEYS = {"nbits": ("k_bits", "v_bits"), "residual_length": ("recent",)}
CACHE_BACKEND = "llmq"
CACHE_NBITS = 4  # as in transformers

_said: set[str] = set()
_saying = threading.Lock()
_silence = threading.local()


@contextmanager
def unsaid() -> Iterator[None]:
    """Within the context, in this thread, :func:`say_once` is silent: for callers who know what it would say."""
    before, _silence.on = getattr(_silence, "on", False), True
    try:
        yield
    finally:
        _silence.on = before


def say_once(message: str) -> None:
    """Log a warning, the first time in this process."""
    if getattr(_silence, "on", False):
        return
    with _saying:
        if message in _said:
            return
        _said.add(message)
    logger.warning(message)


def _defaults() -> dict[str, Any]:
    config = GenerationConfig()
    later: dict[str, Any] = getattr(
        config, "_get_default_generation_params", dict
    )()  # None stands for these in newer transformers
    return {**vars(config), **later}


def check_options(config: GenerationConfig) -> None:
    """Raise Unsupported naming the first field of a prepared ``config`` that the native loop does not honour."""
    defaults = _defaults()
    for name, value in vars(config).items():
        if name.startswith("_") or name in NATIVE_OPTIONS or value is None or value is False:
            continue
        if value != defaults.get(name) and value not in NEUTRAL.get(name, ()):
            raise Unsupported(f"{name}={value!r}")
    if config.use_cache is False:
        raise Unsupported("use_cache=False")


def quantized_cache(config: GenerationConfig) -> KVCacheConfig | None:
    """The cache that ``cache_implementation="quantized"`` asks llmq for; None: nothing, or one of another backend.

    Raises ValueError for a key of ``cache_config`` that is not known here, and for values out of range.
    """
    given = dict(config.cache_config or {})
    if config.cache_implementation != "quantized" or given.pop("backend", CACHE_BACKEND) != CACHE_BACKEND:
        return None
    names = {f.name: (f.name,) for f in fields(KVCacheConfig)} | CACHE_KEYS
    made: dict[str, Any] = dict.fromkeys(CACHE_KEYS["nbits"], CACHE_NBITS)
    for key, value in given.items():
        one_of("a key of cache_config", key, names)
        made |= dict.fromkeys(names[key], tuple(value) if key == "layers" else value)
    return KVCacheConfig(**made)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise Unsupported naming the first argument of a decoding loop that the native one does not understand."""
    for name, value in arguments.items():
        if name not in NATIVE_ARGUMENTS and value is not None and value is not False:
            raise Unsupported(name)


@dataclass(frozen=True)
class Sampling:
    """How a step chooses its token.

    Attributes:
        greedy, repetition_penalty, temperature, top_k, top_p, min_p: as in transformers; neutral by default.
        ignored: i64[B] leading columns of a row that the penalty leaves out, or None.
        banned: tokens that may not come before ``banned_until`` columns are there (end of text before min_length).
        banned_until: columns.
    """

    greedy: bool
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    ignored: Tensor | None = None
    banned: tuple[int, ...] = ()
    banned_until: int = 0

    def sampler(self, vocab_size: int) -> Any:
        """The compiled sampler; when it draws, its seed comes from torch's generator."""
        seed = 0 if self.greedy else int(torch.randint(2**63 - 1, ()).item())
        return core().Sampler(
            vocabulary=vocab_size,
            greedy=self.greedy,
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
        )


def _penalty(s: Sampling, p: Any) -> Sampling:
    ignored = p.prompt_ignore_length
    if isinstance(ignored, int):
        raise Unsupported(f"{type(p).__name__}(prompt_ignore_length={ignored})")
    return replace(s, repetition_penalty=p.penalty, ignored=ignored)


def _no_end_before(s: Sampling, columns: int, p: Any) -> Sampling:
    banned = tuple(p.eos_token_id.reshape(-1).tolist())
    if s.banned_until and banned != s.banned:
        raise Unsupported(f"{type(p).__name__} with other end tokens")
    return replace(s, banned=banned, banned_until=max(s.banned_until, columns))


# Processors that the sampler applies, in the order in which it does: class -> how one changes the options.
PROCESSORS: dict[type, Callable[[Sampling, Any], Sampling]] = {
    lp.RepetitionPenaltyLogitsProcessor: _penalty,
    lp.MinLengthLogitsProcessor: lambda s, p: _no_end_before(s, p.min_length, p),
    lp.MinNewTokensLengthLogitsProcessor: lambda s, p: _no_end_before(s, p.prompt_length_to_skip + p.min_new_tokens, p),
    lp.TemperatureLogitsWarper: lambda s, p: replace(s, temperature=float(p.temperature)),
    lp.TopKLogitsWarper: lambda s, p: replace(s, top_k=int(p.top_k)),
    lp.TopPLogitsWarper: lambda s, p: replace(s, top_p=float(p.top_p)),
    lp.MinPLogitsWarper: lambda s, p: replace(s, min_p=float(p.min_p)),
}


def read_processors(processors: Iterable[Any], *, greedy: bool) -> Sampling:
    """The options behind the list of logits processors that ``generate`` prepared, those of the caller included.

    Raises Unsupported naming a processor of another class, one out of order, or one with unusual settings.
    """
    order = list(PROCESSORS)
    sampling, last = Sampling(greedy=greedy), -1
    for p in processors:
        name = type(p).__name__
        if type(p) not in PROCESSORS:
            raise Unsupported(f"logits processor {name}")
        rank = order.index(type(p))
        if rank <= last or getattr(p, "min_tokens_to_keep", 1) != 1:
            raise Unsupported(f"logits processor {name} of the caller")
        if getattr(p, "filter_value", -float("inf")) != -float("inf"):
            raise Unsupported(f"{name}(filter_value={p.filter_value})")
        sampling, last = PROCESSORS[type(p)](sampling, p), rank
    return sampling
