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
        nbytes: (part, bits) -> bytes of the part at the context asked for.
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
        for costs, bits in zip(self.layers, self.bits, strict=True):
            error = sum(costs.error[part, b] for part, b in enumerate(bits))
            size = sum(costs.nbytes[part, b] for part, b in enumerate(bits)) / 1e6
            window = costs.window or "all"
            lines.append(
                f"{costs.index:>5}  {window:>7}  {bits[0]:>4}  {bits[1]:>6}  {100 * error:>22.4f}  {size:>9.3f}"
            )
        if self.budget is None:
            found = ", ".join(self.protected) or "none"
            lines.append(f"protected, {USUAL} bits would cost more than {100 * MOST_ERROR:g} %: {found}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        rows = [
            {
                "layer": c.index,
                "keys": bits[0],
                "values": bits[1],
                "error": sum(c.error[p, b] for p, b in enumerate(bits)),
            }
            for c, bits in zip(self.layers, self.bits, strict=True)
        ]
        about = {"bits": str(self.config), "context": self.context, "bytes": self.nbytes, "budget": self.budget}
        return {**about, "protected": self.protected, "layers": rows}


@dataclass(frozen=True)
class Subject:
    """A model whose bits are to be chosen.

    Attributes:
        layers: what each of its caching layers costs.
        n_layers: of the model; those that cache nothing count.
        context: tokens for which bytes count.
        base: everything but the bits.
        measured: bytes of a cache of ``context`` tokens with a configuration, as whoever runs the model holds it.
    """

    layers: list[LayerCosts]
    n_layers: int
    context: int
    base: KVCacheConfig
    measured: Callable[[KVCacheConfig], int] | None = None

    def _choice(self, bits: dict[tuple[int, int], int], budget: int | None) -> Choice:
        pairs = tuple((bits[i, 0], bits[i, 1]) for i in range(len(self.layers)))
        by_layer = {costs.index: f"k{k}v{v}" for costs, (k, v) in zip(self.layers, pairs, strict=True)}
        texts = tuple(by_layer.get(i, "16") for i in range(self.n_layers))  # a layer without keys has no bits
        config = replace(self.base, layers=texts)
        nbytes = sum(self.layers[i].nbytes[part, b] for (i, part), b in bits.items())
        nbytes = nbytes if self.measured is None else self.measured(config)
        return Choice(config, nbytes, budget, self.context, tuple(self.layers), pairs)

    def auto(self) -> Choice:
        """The usual bits, and more for what they would cost too much."""
        choices = [b for b in _BITS if b >= USUAL]
        bits = {
            (i, part): next((b for b in choices if costs.error[part, b] <= MOST_ERROR), choices[-1])
            for i, costs in enumerate(self.layers)
            for part in (0, 1)
        }
        return self._choice(bits, None)

    def within(self, budget: int) -> Choice:
        """Least error in ``budget`` bytes. Raises ValueError if not even 2 bits fit."""
        room = budget
        while True:
            bits = self._greedy(room)
            choice = self._choice(bits, budget)
            if choice.nbytes <= budget:
                return choice
            # Pages make a cache larger than the sum of its parts.
            if bits == self._least():
                raise self._too_small(choice.nbytes, budget)
            room -= max(choice.nbytes - budget, 1)

    def _least(self) -> dict[tuple[int, int], int]:
        parts = [(i, part) for i in range(len(self.layers)) for part in (0, 1)]
        return {(i, p): min(LADDER, key=lambda b: self.layers[i].nbytes[p, b]) for i, p in parts}

    def _greedy(self, room: int) -> dict[tuple[int, int], int]:
        bits = self._least()
        used = sum(self.layers[i].nbytes[part, b] for (i, part), b in bits.items())
        while step := _best_step(self.layers, bits, room - used):
            (i, part), to = step
            used += self.layers[i].nbytes[part, to] - self.layers[i].nbytes[part, bits[i, part]]
            bits[i, part] = to
        return bits

    def _too_small(self, nbytes: int, budget: int) -> ValueError:
        return ValueError(
            f"a cache of {self.context} tokens takes {nbytes / 1e6:.2f} MB at {LADDER[0]} bits, the least there is, "
            f"and the budget is {budget / 1e6:.2f} MB: raise it to that, or ask for a shorter context (--kv-context)"
        )


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
    base, text = replace(config or KVCacheConfig(), layers=()), source.config.get_text_config()
    tokens = probe_tokens(source.tokenizer, context)

    def run() -> None:
        hidden, calls = block_inputs(source, tokens[None])
        for i, name in enumerate(source.block_names):
            with materialize(source.block(i), name, source.reader) as block:
                hidden = [run_block(block, {}, hidden[0], calls[i])]

    layers = _listen(source.model, run, context, base)
    windows = [costs.window or 0 for costs in layers]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def measured(kv: KVCacheConfig) -> int:
        return cache_bytes(kv, int(text.num_key_value_heads), int(head_dim), windows, context)

    return Subject(layers, len(source.block_names), context, base, measured)


def probe_tokens(tokenizer: Any, most: int) -> Tensor:
    """i64[T] of the documentation that ships with Python, on which errors are measured."""
    text = "\n\n".join(itertools.islice(stdlib_text.texts(), 40))
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][: min(PROBE_TOKENS, most)])


def usual_context(config: Any) -> int:
    """Tokens for which a budget counts where nothing else is asked for."""
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_CONTEXT, MAX_CONTEXT)


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
        for b, layer in layers.items():
            for part, (x, storage) in enumerate(((k, layer.key_storage), (v, layer.value_storage))):
                states = [k, v]
                states[part] = _through(storage, x)
                changed = own(module, q, *states, *rest, **options)[0]
                costs.error[part, b] = float((changed - out[0]).square().sum() / out[0].square().sum())
                costs.nbytes[part, b] = _bytes(storage, x, context, costs.window)
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
