"""QuantizedKVCache: transformers' Cache with keys and values in 8, 4 or 2 bits, for any model with attention layers.

Values have scales by token, below 8 bits after a rotation. So have keys of 8 bits; keys of fewer bits have scales by
channel (KIVI, arXiv 2402.02750): a block of ``GROUP`` tokens shares one for each column, so that the few columns that
are far larger than the others do not cost those their precision (not in windows of 2 * ``GROUP`` tokens or less).
``update`` returns all tokens as numbers, rotated
back, so any attention implementation works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from llmq.compat import API
from llmq.config import KVCacheConfig
from llmq.kv_quant import GROUP
from llmq.runtime.cache import queries
from llmq.runtime.token_store import Storage, TokenStore


class QuantizedLayer(CacheLayerMixin):
    """One layer of a QuantizedKVCache.

    Args:
        keys, values: how they are held.
        sliding_window: tokens that a query sees, itself included; None: all. Such a layer holds one token fewer, and
            after ``activate_past_recording`` all of them until the next ``crop``.
    """

    is_croppable = True

    def __init__(self, keys: Storage, values: Storage, sliding_window: int | None = None) -> None:
        self.key_storage, self.value_storage, self.sliding_window = keys, values, sliding_window
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.stores: tuple[TokenStore, ...] = ()
        self.is_initialized = False
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the empty stores, for states of this batch, these heads, this type and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stores = (TokenStore(self.key_storage, key_states), TokenStore(self.value_storage, value_states))
        self.is_initialized = True

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """Whether the layer forgets what its window has passed."""
        return self.sliding_window is not None

    # The numbers behind the codes; transformers' code looks at their shapes.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """[B, H, T, D] of the tokens held, or None."""
        return self.stores[0].read() if self.stores else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """[B, H, T, D] of the tokens held, or None."""
        return self.stores[1].read() if self.stores else None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hold the new states [B, H, n, D]; returns those that the new tokens' queries may see, the new ones exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = [store.read() for store in self.stores]
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store.append(new, self.cumulative_length)
        self.cumulative_length += key_states.shape[-2]
        if self.sliding_window is not None and not self.record_past:
            self._trim()
        if self.sliding_window is not None:
            visible = self.sliding_window - 1
            before = [x[:, :, max(x.shape[-2] - visible, 0) :] for x in before]
        keys, values = (torch.cat([a, b], dim=-2) for a, b in zip(before, (key_states, value_states), strict=True))
        return keys, values

    def _trim(self) -> None:
        """Forget what no later query sees."""
        for store in self.stores:
            held = len(store)
            if self.sliding_window is not None and held >= self.sliding_window:
                store.keep(held - self.sliding_window + 1, held)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; a positive number is how many to keep (transformers 5.0).

        Raises ValueError for more than are held, RuntimeError where a window has forgotten what a
        shorter text would need (see ``activate_past_recording``); the layer is then as before.
        """
        count = self.check_crop(tokens_to_remove)
        for store in self.stores:
            store.keep(0, len(store) - count)
        self.cumulative_length -= count
        self._trim()

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens ``crop`` would remove. Raises as it does."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.cumulative_length - tokens_to_remove, 0)
        if count > self.cumulative_length:
            raise ValueError(f"cannot remove {count} tokens from a cache of {self.cumulative_length}")
        held = len(self.stores[0]) if self.stores else 0
        needed = min(self.cumulative_length - count, (self.sliding_window or self.cumulative_length + 1) - 1)
        if count and held - count < needed:
            raise RuntimeError(
                f"cannot remove {count} tokens: the window of {self.sliding_window} needs {needed} tokens before them "
                f"and {held - count} are held; call activate_past_recording() before the tokens are processed"
            )
        return count

    def activate_past_recording(self) -> None:
        """Keep what the window passes until the next ``crop``."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys that ``update`` will return for so many queries, position of the first)."""
        n = queries(query_length)
        past = self.cumulative_length
        seen = past if self.sliding_window is None else min(past, self.sliding_window - 1)
        return seen + n, past - seen

    def get_seq_length(self) -> int:
        """Tokens processed so far."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window, or -1: grows as needed."""
        return self.sliding_window or -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.map(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (i64, or a bool mask)."""
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move the layer to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the layer back to its device."""
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))


class QuantizedKVCache(Cache):
    """Keys and values of a model in few bits: ``generate(..., past_key_values=QuantizedKVCache("8", model.config))``.

    Sinks and recent tokens are counted in columns: in a batch that is padded on the left, a padded row's first columns
    are padding and its first tokens are quantized like any other.

    Args:
        config: bits of keys and values, rotation, tokens left in 16 bits; or its text, as in ``"k8v4"``.
        model_config: the model's configuration; decides layers, windows, and what is checked.

    Raises:
        ValueError: ``config.layers`` names another number of layers than the model has, or the model has layers of a
            type whose state is not known here.
    """

    def __init__(self, config: KVCacheConfig | str, model_config: Any) -> None:
        self.config = KVCacheConfig.parse(config) if isinstance(config, str) else config
        text = model_config.get_text_config(decoder=True)
        layers = API.cache_layers(text)
        _check_layers(self.config, layers)
        for i, own in enumerate(layers):
            if isinstance(own, DynamicLayer):  # others hold no keys and stay transformers' own
                window = getattr(own, "sliding_window", None)
                layers[i] = QuantizedLayer(*self._storage(i, window), window)
        super().__init__(layers=layers)
        self.max_length: int | None = getattr(text, "max_position_embeddings", None)
        self._known_shapes = _shapes(text)

    def _storage(self, layer: int, window: int | None) -> tuple[Storage, Storage]:
        c, (k_bits, v_bits) = self.config, self.config.of_layer(layer)

        def storage(bits: int, **layout: Any) -> Storage:
            return Storage(bits, c.sinks, c.recent if bits < 8 else 0, **layout)

        # A window of hardly more than a block would never fill one.
        by_channel = c.key_scales == "channel" and k_bits < 8 and (window is None or window > 2 * GROUP)
        layout = {"block": GROUP} if by_channel else {"rotated": c.rotate and k_bits < 16}
        return storage(k_bits, **layout), storage(v_bits, rotated=c.rotate and v_bits < 8)

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take, scales and what is in 16 bits included."""
        return sum(store.nbytes for layer in self.quantized_layers for store in layer.stores)

    @property
    def nbytes_16bit(self) -> int:
        """Bytes that the same tokens would take at 16 bits a number."""
        return sum(store.nbytes_16bit for layer in self.quantized_layers for store in layer.stores)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold the new states of a layer, [B, H, n, D]; returns all that its queries may see.

        Raises ValueError, with the layer as it was, for states of another model or batch, or beyond the context.
        """
        self._check(key_states, value_states, layer_idx)
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return states

    def activate_past_recording(self) -> None:
        """Keep in every layer what its window passes until the next ``crop``. transformers 5 calls it."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def _check(self, keys: Tensor, values: Tensor, index: int) -> None:
        if index >= len(self.layers):
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers and is given layer {index} (from 0); "
                "make it with the config of the model that it is used with"
            )
        layer = self.layers[index]
        if not isinstance(layer, QuantizedLayer):
            return
        for name, known in self._known_shapes.items():
            found = keys.shape[("batch", "heads", "tokens", "head_dim").index(name)]
            if found not in known:
                raise ValueError(
                    f"keys of layer {index} have {name} {found}, the model that the cache was made for has "
                    f"{' or '.join(map(str, sorted(known)))}; make it with the config of the model that it is used with"
                )
        total = layer.get_seq_length() + keys.shape[-2]
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"{layer.get_seq_length()} tokens in the cache and {keys.shape[-2]} new ones are {total}; the model's "
                f"context is {self.max_length}: crop or reset the cache"
            )
        for store, new in zip(layer.stores, (keys, values), strict=False):
            held, given = store.last.shape, new.shape
            if (held[0], held[1], held[3]) != (given[0], given[1], given[3]):
                raise ValueError(
                    f"layer {index} of the cache holds {held[0]} rows of {held[1]} heads of {held[3]} and is given "
                    f"{given[0]} rows of {given[1]} heads of {given[3]}; use a new cache for another batch"
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every layer, or raise as a layer's ``crop`` and change none."""
        for layer in self.quantized_layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def __repr__(self) -> str:
        held = f"{self.get_seq_length()} tokens, {self.nbytes} bytes of {self.nbytes_16bit} at 16 bits"
        return f"QuantizedKVCache({self.config}, {len(self.layers)} layers, {held})"


def _check_layers(config: KVCacheConfig, layers: list[Any]) -> None:
    if config.layers and len(config.layers) != len(layers):
        raise ValueError(
            f"the cache's configuration names the bits of {len(config.layers)} layers, the model has {len(layers)}; "
            "leave layers empty to give all of them the same"
        )
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted({type(x).__name__ for x in layers if isinstance(x, CacheLayerMixin) and type(x) not in known})
    if others:
        raise ValueError(
            f"the model's cache has layers of class {', '.join(others)}; a quantized cache knows "
            f"{' and '.join(k.__name__ for k in known)}: use transformers' DynamicCache for this model"
        )


def _shapes(text: Any) -> dict[str, set[int]]:
    """Heads and head sizes that keys of a model can have; nothing of what its configuration does not spell out."""
    named = {k: v for k, v in text.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    if "kv_lora_rank" in named:  # latent attention: its keys are put together from parts
        return {}
    names = {"heads": "key_value_heads", "head_dim": "head_dim"}
    known = {name: {v for k, v in named.items() if part in k} for name, part in names.items()}
    return {name: sizes for name, sizes in known.items() if sizes}
