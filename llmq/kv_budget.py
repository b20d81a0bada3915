"""Bits of keys and values for each layer, chosen by what they do to the layer's attention output.

Measured on a text: how much the attention output of a layer changes when only its keys, or only its values, have few
bits. Errors are relative, squared: |changed - exact|^2 / |exact|^2. To fit a budget of memory, all layers start at the
bits that take least, 2 but in tiny windows; then the step to other bits that saves most error for a byte is taken,
again and again, as long as one fits. Without a budget ("auto") keys and values have 4 bits, and more where these would
change a layer's output by more than MOST_ERROR: such layers are protected.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmq.blockwise import block_inputs, run_block
from llmq.calibration import stdlib_text
from llmq.config import KVCacheConfig
from llmq.models.load import SourceModel, materialize
from llmq.runtime.native import cache_bytes
from llmq.runtime.quantized_cache import QuantizedKVCache
from llmq.runtime.token_store import Storage, TokenStore

LADDER = (2, 4, 8)
# "auto": bits where nothing speaks against them, and the error of a layer's output (keys or values alone) that does.
USUAL, MOST_ERROR = 4, 0.01
MAX_CONTEXT = 8192  # for which a budget counts where nothing else is asked for
PROBE_TOKENS = 1024  # on which errors are measured
_BITS = (*LADDER, 16)
_PROBE = "llmq_kv_probe"


@dataclass
class LayerCosts:
    """One layer: what it costs at the bits of the ladder, for keys (part 0) and values (part 1).

    Attributes:
        index: of the layer in the model.
        window: tokens of a sliding window, or None.
        error: (part, bits) -> relative squared error of the attention output.
        nbytes: bits of (keys, values) -> bytes at the context asked for, as whoever runs the model holds them.
    """

    index: int
    window: int | None
    error: dict[tuple[int, int], float] = field(default_factory=dict)
    nbytes: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A configuration and how it came about; ``budget`` None: "auto"."""

    config: KVCacheConfig
    nbytes: int
    budget: int | None
    context: int
    layers: tuple[LayerCosts, ...]
    bits: tuple[tuple[int, int], ...]

    @property
    def protected(self) -> list[str]:
        """Keys and values that "auto" gives more than the usual bits: ``keys of layer 3 (8 bits)``."""
        if self.budget is not None:
            return []
        parts = ("keys", "values")
        return [
            f"{parts[part]} of layer {costs.index} ({b} bits)"
            for costs, pair in zip(self.layers, self.bits, strict=True)
            for part, b in enumerate(pair)
            if b > USUAL
        ]

    def table(self) -> str:
        """One line a layer: bits, error of the attention output, bytes."""
        budget = "" if self.budget is None else f" of a budget of {self.budget / 1e6:.2f} MB"
        lines = [f"KV cache of {self.context} tokens: {self.nbytes / 1e6:.2f} MB{budget}"]
        lines.append("layer   window  keys  values  error of the output, %         MB")
        for costs, (k, v) in zip(self.layers, self.bits, strict=True):
            error, window = costs.error[0, k] + costs.error[1, v], costs.window or "all"
            size = costs.nbytes[k, v] / 1e6
            lines.append(f"{costs.index:>5}  {window:>7}  {k:>4}  {v:>6}  {100 * error:>22.4f}  {size:>9.3f}")
        if self.budget is None:
            found = ", ".join(self.protected) or "none"
            lines.append(f"protected, {USUAL} bits would cost more than {100 * MOST_ERROR:g} %: {found}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        rows = [
            {"layer": c.index, "keys": k, "values": v, "error": c.error[0, k] + c.error[1, v]}
            for c, (k, v) in zip(self.layers, self.bits, strict=True)
        ]
        about = {"bits": str(self.config), "context": self.context, "bytes": self.nbytes, "budget": self.budget}
        return {**about, "protected": self.protected, "layers": rows}


Bits = list[tuple[int, int]]


@dataclass(frozen=True)
class Subject:
    """A model whose bits are to be chosen.

    Attributes:
        layers: what each of its caching layers costs.
        n_layers: of the model; those that cache nothing count.
        context: tokens for which bytes count.
        base: everything but the bits.
    """

    layers: list[LayerCosts]
    n_layers: int
    context: int
    base: KVCacheConfig

    def natively(self, config: Any) -> Subject:
        """The same model in the native decoder's cache, by its ``config``; pages make that larger."""
        text = config.get_text_config()
        heads, head_dim = int(text.num_key_value_heads), getattr(text, "head_dim", None)
        head_dim = int(head_dim or text.hidden_size // text.num_attention_heads)
        layers = []
        for costs in self.layers:
            nbytes = {
                (k, v): cache_bytes(
                    replace(self.base, layers=(f"k{k}v{v}",)), heads, head_dim, [costs.window or 0], self.context
                )
                for k, v in costs.nbytes
            }
            layers.append(replace(costs, nbytes=nbytes))
        return replace(self, layers=layers)

    def _nbytes(self, bits: Bits) -> int:
        return sum(costs.nbytes[pair] for costs, pair in zip(self.layers, bits, strict=True))

    def _choice(self, bits: Bits, budget: int | None) -> Choice:
        by_layer = {costs.index: f"k{k}v{v}" for costs, (k, v) in zip(self.layers, bits, strict=True)}
        texts = tuple(by_layer.get(i, "16") for i in range(self.n_layers))  # a layer without keys has no bits
        config = replace(self.base, layers=texts)
        return Choice(config, self._nbytes(bits), budget, self.context, tuple(self.layers), tuple(bits))

    def auto(self) -> Choice:
        """The usual bits, and more for what they would cost too much."""
        choices = [b for b in _BITS if b >= USUAL]

        def enough(costs: LayerCosts, part: int) -> int:
            return next((b for b in choices if costs.error[part, b] <= MOST_ERROR), choices[-1])

        return self._choice([(enough(costs, 0), enough(costs, 1)) for costs in self.layers], None)

    def within(self, budget: int) -> Choice:
        """Least error in ``budget`` bytes. Raises ValueError if not even 2 bits fit."""
        pairs = list(itertools.product(LADDER, LADDER))
        bits = [min(pairs, key=costs.nbytes.__getitem__) for costs in self.layers]
        if self._nbytes(bits) > budget:
            raise ValueError(
                f"a cache of {self.context} tokens takes {self._nbytes(bits) / 1e6:.2f} MB at {LADDER[0]} bits, the "
                f"least there is, and the budget is {budget / 1e6:.2f} MB: raise it to that, or ask for a shorter "
                "context (--kv-context)"
            )
        while step := _best_step(self.layers, bits, budget - self._nbytes(bits)):
            layer, pair = step
            bits[layer] = pair
        return self._choice(bits, budget)


def of_model(model: Any, tokens: Tensor, context: int, config: KVCacheConfig | None = None) -> Subject:
    """A loaded model in a QuantizedKVCache.

    Args:
        model: any model whose attention goes through transformers' attention interface, in evaluation mode.
        tokens: i64[T], the text on which errors are measured.
        context: tokens.
        config: everything but the bits.

    Raises:
        ValueError: the model's attention does not go through the interface.
    """
    base = replace(config or KVCacheConfig(), layers=())
    total = len(QuantizedKVCache(base, model.config).layers)
    return Subject(measure(model, tokens, context, base), total, context, base)


def of_source(source: SourceModel, context: int, config: KVCacheConfig | None = None) -> Subject:
    """A model that is read block by block, in the native decoder's cache; errors are those of the original weights.

    Args:
        source: the opened model.
        context: tokens.
        config: everything but the bits.

    Raises:
        ValueError: as for :func:`of_model`.
    """
    base = replace(config or KVCacheConfig(), layers=())
    tokens = probe_tokens(source.tokenizer, context)

    def run() -> None:
        hidden, calls = block_inputs(source, tokens[None])
        for i, name in enumerate(source.block_names):
            with materialize(source.block(i), name, source.reader) as block:
                hidden = [run_block(block, {}, hidden[0], calls[i])]

    layers = _listen(source.model, run, context, base)
    return Subject(layers, len(source.block_names), context, base).natively(source.config)


def probe_tokens(tokenizer: Any, most: int) -> Tensor:
    """i64[T] of the documentation that ships with Python, on which errors are measured."""
    text = "\n\n".join(itertools.islice(stdlib_text.texts(), 40))
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][: min(PROBE_TOKENS, most)])


def context_of(config: Any, asked: int | None) -> int:
    """Tokens for which bytes count: ``asked``, else the model's context, at most MAX_CONTEXT.

    Raises ValueError for more than the model's context.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked and limit and asked > limit:
        raise ValueError(f"kv-context is {asked}; the model's context is {limit} tokens: ask for at most that many")
    return asked or min(limit or MAX_CONTEXT, MAX_CONTEXT)


def _best_step(layers: list[LayerCosts], bits: Bits, room: int) -> tuple[int, tuple[int, int]] | None:
    """The affordable step that saves most error a byte: (position of the layer, its bits then), or None."""
    best, most = None, 0.0
    for i, (costs, (k, v)) in enumerate(zip(layers, bits, strict=True)):
        for new in {(b, v) for b in LADDER} | {(k, b) for b in LADDER}:
            cost = costs.nbytes[new] - costs.nbytes[k, v]
            error = [costs.error[0, a] + costs.error[1, b] for a, b in ((k, v), new)]
            saved = (error[0] - error[1]) / max(cost, 1)
            if cost <= room and saved > most:
                best, most = (i, new), saved
    return best


def measure(model: Any, tokens: Tensor, context: int, config: KVCacheConfig) -> list[LayerCosts]:
    """Errors on ``tokens`` i64[T] and bytes at ``context`` for each layer that holds keys and values, in order."""
    return _listen(model, lambda: model.get_decoder()(input_ids=tokens[None], use_cache=False), context, config)


@torch.no_grad()
def _listen(model: Any, run: Callable[[], Any], context: int, config: KVCacheConfig) -> list[LayerCosts]:
    """What every attention that ``run`` computes would cost; bytes at ``context``."""
    found: dict[int, LayerCosts] = {}
    caches = {b: QuantizedKVCache(replace(config, k_bits=b, v_bits=b), model.config) for b in _BITS}

    def probe(own: Callable[..., Any], module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        out = own(module, q, k, v, *rest, **options)
        layers: dict[int, Any] = {b: cache.layers[module.layer_idx] for b, cache in caches.items()}
        costs = found[module.layer_idx] = LayerCosts(module.layer_idx, layers[LADDER[0]].sliding_window)
        nbytes: dict[tuple[int, int], int] = {}
        for b, layer in layers.items():
            for part, (x, storage) in enumerate(((k, layer.key_storage), (v, layer.value_storage))):
                states = [k, v]
                states[part] = _through(storage, x)
                changed = own(module, q, *states, *rest, **options)[0]
                costs.error[part, b] = float((changed - out[0]).square().sum() / out[0].square().sum())
                nbytes[part, b] = _bytes(storage, x, context, costs.window)
        costs.nbytes = {(a, b): nbytes[0, a] + nbytes[1, b] for a in layers for b in layers}
        return out

    with _probed(model, probe):
        run()
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
    # "eager" is a function of each model's own file; Gemma 2 knows nothing else.
    own = ALL_ATTENTION_FUNCTIONS.get(name) or getattr(
        sys.modules[type(model).__module__], "eager_attention_forward", None
    )
    if own is None:
        model.set_attn_implementation("sdpa")
        own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register(_PROBE, lambda *a, **options: probe(own, *a, **options))
    AttentionMaskInterface.register(_PROBE, ALL_MASK_ATTENTION_FUNCTIONS[model.config._attn_implementation])
    try:
        model.set_attn_implementation(_PROBE)
        yield
    finally:
        model.set_attn_implementation(name)
