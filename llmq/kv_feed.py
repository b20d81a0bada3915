"""A window of tokens fed through a quantized cache in chunks, as a long prompt is; and the options that ask for it.

The cache is the native decoder's own where the model has one (llmq's checkpoints), else a QuantizedKVCache in the
Hugging Face graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmq.config import KEY_SCALES, KV_AUTO, KVCacheConfig, parse_size
from llmq.kv_budget import MAX_CONTEXT, context_of, of_model, probe_tokens
from llmq.runtime.cache import NativeCache
from llmq.runtime.causal_lm import decoder_of, kv_config
from llmq.runtime.native import NativeDecoder
from llmq.runtime.quantized_cache import QuantizedKVCache
from llmq.score import CacheMemory


@dataclass(frozen=True)
class KVFeed:
    """How windows go through a quantized cache. Raises ValueError for chunk < 1.

    In a QuantizedKVCache a chunk's own tokens see one another exactly, whatever ``config.recent`` is; with a chunk of 1
    it is used as in decoding. In the native cache a token sees the same whatever the chunk.
    """

    config: KVCacheConfig
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"kv-chunk is {self.chunk}; feed at least 1 token at a time (usual: 64)")

    def native(self, model: Any) -> NativeDecoder | None:
        """The decoder whose own cache is used; None: a QuantizedKVCache in the graph."""
        return decoder_of(model)

    def new_cache(self, model: Any) -> NativeCache | QuantizedKVCache:
        """An empty cache for ``model``. Raises ValueError as QuantizedKVCache does."""
        if self.native(model) is not None:
            return NativeCache(self.config)
        return QuantizedKVCache(self.config, model.config)

    def run(self, model: Any, ids: Tensor, step: Callable[..., Tensor]) -> tuple[Tensor, CacheMemory]:
        """(f[T, D], the cache's memory) for ids i64[T] through a new QuantizedKVCache.

        ``step(input_ids=i64[1, t], past_key_values=..., use_cache=True)`` gives f[t, D].
        """
        cache = QuantizedKVCache(self.config, model.config)
        parts = [step(input_ids=part[None], past_key_values=cache, use_cache=True) for part in ids.split(self.chunk)]
        return torch.cat(parts), CacheMemory(cache.get_seq_length(), cache.nbytes, cache.nbytes_16bit)

    def run_natively(self, decoder: NativeDecoder, ids: Tensor) -> tuple[Tensor, CacheMemory]:
        """(f32[T, hidden] final states, the cache's memory) for ids i64[T] through a new native cache."""
        sequence, plain = decoder.new_sequence(kv=self.config), decoder.new_sequence(kv_dtype=torch.float16)
        parts = []
        for part in ids.split(self.chunk):
            parts.append(decoder.forward([part], [sequence], output="states"))
            plain.skip(len(part))
        return torch.cat(parts), CacheMemory(sequence.length, sequence.nbytes, plain.nbytes)

    def describe(self, model: Any) -> str:
        """The cache's protocol in words, as it is with ``model``."""
        c = self.config
        bits = f"layers {c}" if c.layers else f"keys {c.k_bits} bits, values {c.v_bits} bits"
        turned = "heads rotated" if c.rotate else "no rotation"
        keys = f"keys below 8 bits have scales by {c.key_scales}; {turned}"
        kept = f"{c.sinks} sinks and, below 8 bits, {c.recent} recent tokens in 16 bits"
        which = "native KV cache" if self.native(model) is not None else "QuantizedKVCache"
        return f"{which}: {bits}; {keys}; {kept}; fed {self.chunk} tokens at a time"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`from_args`."""
    defaults = KVCacheConfig()
    about = (
        "score through a quantized KV cache: the native decoder's own for checkpoints of llmq, a QuantizedKVCache in "
        "the Hugging Face graph for other models"
    )
    group = parser.add_argument_group("KV cache", about)
    text = "bits of keys and values, by layer as 8*2,4*16, or auto: 4, and more in layers whose attention needs it "
    text += "(default: those of the checkpoint, else no quantized cache)"
    group.add_argument("--kv-bits", metavar="8|4|k8v4|...|auto", help=text)
    group.add_argument("--kv-chunk", type=int, default=64, metavar="N", help="tokens fed at a time (default 64)")
    text = f"scales of keys below 8 bits: by channel, over 64 tokens, or by token (default {defaults.key_scales})"
    group.add_argument("--kv-key-scales", choices=KEY_SCALES, default=defaults.key_scales, help=text)
    text = "rotate keys with scales by token, and values below 8 bits (default)"
    group.add_argument("--kv-rotate", action=argparse.BooleanOptionalAction, default=defaults.rotate, help=text)
    text = f"first tokens in 16 bits (default {defaults.sinks})"
    group.add_argument("--kv-sinks", type=int, default=defaults.sinks, metavar="N", help=text)
    text = f"last tokens in 16 bits, where the rest has fewer than 8 (default {defaults.recent})"
    group.add_argument("--kv-recent", type=int, default=defaults.recent, metavar="N", help=text)
    text = "instead of --kv-bits: bits for each layer, so that the cache of --kv-context tokens takes at most this"
    group.add_argument("--kv-budget", metavar="200M", help=text)
    text = f"tokens (default: the model's context, at most {MAX_CONTEXT})"
    group.add_argument("--kv-context", type=int, metavar="N", help=text)


def parse(text: str, args: argparse.Namespace) -> KVFeed:
    """The feed for bits ``text`` with the other options of ``args``. Raises ValueError for values out of range."""
    config = KVCacheConfig.parse(text)
    tokens = {"sinks": args.kv_sinks, "recent": args.kv_recent}
    config = replace(config, key_scales=args.kv_key_scales, rotate=args.kv_rotate, **tokens)
    return KVFeed(config, args.kv_chunk)


def from_args(args: argparse.Namespace) -> KVFeed | None:
    """The feed that ``args`` ask for, its bits still to be chosen where :func:`chooses`; None without either option."""
    if args.kv_budget is not None:
        if args.kv_bits is not None:
            raise ValueError(f"--kv-bits {args.kv_bits} and --kv-budget {args.kv_budget} exclude each other; give one")
        parse_size(args.kv_budget)
    if args.kv_context is not None and args.kv_context < 1:
        raise ValueError(f"kv-context is {args.kv_context}; it counts tokens: at least 1")
    if chooses(args):
        return parse("2", args)
    return None if args.kv_bits is None else parse(args.kv_bits, args)


def chooses(args: argparse.Namespace) -> bool:
    """Whether ``args`` ask for bits that are chosen by what they do to the model."""
    return args.kv_budget is not None or args.kv_bits == KV_AUTO


def of_checkpoint(model: Any, chunk: int = KVFeed.chunk) -> KVFeed | None:
    """The feed for the bits that ``model`` itself caches natively; None where these are 16."""
    config = kv_config(model) if decoder_of(model) is not None else None
    return None if config is None or config == KVCacheConfig() else KVFeed(config, chunk)


def choose(kv: KVFeed, args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[KVFeed, str]:
    """(``kv`` with the bits of each layer that ``args`` ask for, the table of them); errors on Python's documentation.

    Raises ValueError naming the sizes if not even 2 bits fit.
    """
    context = context_of(model.config, args.kv_context)
    subject = of_model(model, probe_tokens(tokenizer, context), context, kv.config)
    subject = subject if kv.native(model) is None else subject.natively(model.config)
    choice = subject.within(parse_size(args.kv_budget)) if args.kv_budget is not None else subject.auto()
    return replace(kv, config=choice.config), choice.table()
