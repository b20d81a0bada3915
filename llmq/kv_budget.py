"""Bits of keys and values for each layer, chosen so that the cache of a context fits a budget of memory.

Measured on a text: how much the attention output of a layer changes when only its keys, or only its values, have few
bits. All layers start at the bits that take least, 2 but in tiny windows; then the step to other bits that saves most
error for a byte is taken, again and again, as long as one fits. Errors are relative, squared:
|changed - exact|^2 / |exact|^2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmq.config import KVCacheConfig
from llmq.runtime.quantized_cache import QuantizedKVCache
from llmq.runtime.token_store import Storage, TokenStore

LADDER = (2, 4, 8)
_PROBE = "llmq_kv_probe"
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}


def parse_bytes(text: str) -> int:
    """Bytes of ``200M``, ``1.5G``, ``64K`` or a plain number (decimal units). Raises ValueError naming the text."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if not m or float(m[1]) == 0:
        raise ValueError(f"{text!r} is no size of a cache, as 200M or 1.5G are")
    return round(float(m[1]) * _UNITS[m[2]])


@dataclass
class LayerCosts:
    """One layer: what it costs at the bits of the ladder, for keys (part 0) and values (part 1).

    Attributes:
        index: of the layer in the model.
        window: tokens of a sliding window, or None.
        error: (part, bits) -> relative squared error of the attention output.
        nbytes: (part, bits) -> bytes of the part at the context asked for.
    """

    index: int
    window: int | None
    error: dict[tuple[int, int], float] = field(default_factory=dict)
    nbytes: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The configuration that fits, and how it came about."""

    config: KVCacheConfig
    nbytes: int
    budget: int
    context: int
    layers: tuple[LayerCosts, ...]
    bits: tuple[tuple[int, int], ...]

    def table(self) -> str:
        """One line a layer: bits, error of the attention output, bytes."""
        lines = [
            f"KV cache of {self.context} tokens: {self.nbytes / 1e6:.2f} MB of a budget of {self.budget / 1e6:.2f} MB"
        ]
        lines.append("layer   window  keys  values  error of the output, %         MB")
        for costs, bits in zip(self.layers, self.bits, strict=True):
            error = sum(costs.error[part, b] for part, b in enumerate(bits))
            size = sum(costs.nbytes[part, b] for part, b in enumerate(bits)) / 1e6
            window = costs.window or "all"
            lines.append(
                f"{costs.index:>5}  {window:>7}  {bits[0]:>4}  {bits[1]:>6}  {100 * error:>22.4f}  {size:>9.3f}"
            )
        return "\n".join(lines)


def choose(model: Any, tokens: Tensor, budget: int, context: int, config: KVCacheConfig | None = None) -> Choice:
    """Bits for each layer of ``model``, so that ``context`` tokens of one sequence take at most ``budget``.

    Args:
        model: any model whose attention goes through transformers' attention interface, in evaluation mode.
        tokens: i64[T], the text on which errors are measured.
        budget: bytes.
        context: tokens.
        config: everything but the bits.

    Raises:
        ValueError: not even 2 bits fit, or the model's attention does not go through the interface.
    """
    base = replace(config or KVCacheConfig(), layers=())
    layers = measure(model, tokens, context, base)
    bits = {(i, p): min(LADDER, key=lambda b: c.nbytes[p, b]) for i, c in enumerate(layers) for p in (0, 1)}
    used = sum(layers[i].nbytes[part, b] for (i, part), b in bits.items())
    if used > budget:
        raise ValueError(
            f"a cache of {context} tokens takes {used / 1e6:.2f} MB at {LADDER[0]} bits, the least there is, and the "
            f"budget is {budget / 1e6:.2f} MB: raise it to that, or ask for a shorter context (--kv-context)"
        )
    while step := _best_step(layers, bits, budget - used):
        (i, part), to = step
        used += layers[i].nbytes[part, to] - layers[i].nbytes[part, bits[i, part]]
        bits[i, part] = to
    chosen = tuple((bits[i, 0], bits[i, 1]) for i in range(len(layers)))
    by_layer = {costs.index: f"k{k}v{v}" for costs, (k, v) in zip(layers, chosen, strict=True)}
    total = len(QuantizedKVCache(base, model.config).layers)
    texts = tuple(by_layer.get(i, "16") for i in range(total))  # a layer without keys has no bits
    return Choice(replace(base, layers=texts), used, budget, context, tuple(layers), chosen)


def _best_step(
    layers: list[LayerCosts], bits: dict[tuple[int, int], int], room: int
) -> tuple[tuple[int, int], int] | None:
    """The affordable step that saves most error a byte: ((layer, part), bits), or None."""
    best, most = None, 0.0
    for (i, part), b in bits.items():
        for to in LADDER:
            cost = layers[i].nbytes[part, to] - layers[i].nbytes[part, b]
            saved = (layers[i].error[part, b] - layers[i].error[part, to]) / max(cost, 1)
            if cost <= room and saved > most:
                best, most = ((i, part), to), saved
    return best


@torch.no_grad()
def measure(model: Any, tokens: Tensor, context: int, config: KVCacheConfig) -> list[LayerCosts]:
    """Errors on ``tokens`` i64[T] and bytes at ``context`` for each layer that holds keys and values, in order."""
    found: dict[int, LayerCosts] = {}
    caches = {b: QuantizedKVCache(replace(config, k_bits=b, v_bits=b), model.config) for b in LADDER}

    def probe(own: Callable[..., Any], module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        out = own(module, q, k, v, *rest, **options)
        layers: dict[int, Any] = {b: cache.layers[module.layer_idx] for b, cache in caches.items()}
        costs = found[module.layer_idx] = LayerCosts(module.layer_idx, layers[LADDER[0]].sliding_window)
        for b, layer in layers.items():
            for part, (x, storage) in enumerate(((k, layer.key_storage), (v, layer.value_storage))):
                states = [k, v]
                states[part] = _through(storage, x)
                changed = own(module, q, *states, *rest, **options)[0]
                costs.error[part, b] = float((changed - out[0]).square().sum() / out[0].square().sum())
                costs.nbytes[part, b] = _bytes(storage, x, context, costs.window)
        return out

    with _probed(model, probe):
        model.get_decoder()(input_ids=tokens[None], use_cache=False)
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so that nothing can be measured; "
            "give the bits instead (--kv-bits)"
        )
    return [found[i] for i in sorted(found)]


def _through(storage: Storage, x: Tensor) -> Tensor:
    store = TokenStore(storage, x)
    store.append(x, 0)
    return store.read()


def _bytes(storage: Storage, like: Tensor, tokens: int, window: int | None) -> int:
    """Bytes of ``tokens`` tokens in one sequence, measured on zeros."""
    store = TokenStore(storage, like[:1])
    store.append(like.new_zeros(1, like.shape[1], tokens, like.shape[3]), 0)
    if window is not None and tokens >= window:
        store.keep(tokens - window + 1, tokens)
    return store.nbytes


@contextmanager
def _probed(model: Any, probe: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ``probe(own attention function, ...)`` is the attention function of ``model``."""
    name = model.config._attn_implementation
    own = ALL_ATTENTION_FUNCTIONS.get(name)
    if own is None:  # "eager" is a function of each model's own file
        model.set_attn_implementation("sdpa")
        own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register(_PROBE, lambda *a, **options: probe(own, *a, **options))
    AttentionMaskInterface.register(_PROBE, ALL_MASK_ATTENTION_FUNCTIONS[model.config._attn_implementation])
    try:
        model.set_attn_implementation(_PROBE)
        yield
    finally:
        model.set_attn_implementation(name)
