"""The native decoder: a whole model behind one compiled call a step, driven by its family's row.

The weights are those of the model's own modules, not copies (dense 16-bit matrices excepted); the Hugging Face graph
stays intact beside it.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor, nn

from llmq.config import KVCacheConfig, one_of
from llmq.runtime.adapters import adapter_of
from llmq.runtime.parts import Parts, activation_bits_of, core, matrix_modules, weights_of
from llmq.runtime.sequence import Sequence

OUTPUTS = {"last": 0, "all": 1, "states": 2}
# Of each weight, as many of its first numbers tell models apart.
FINGERPRINT_NUMBERS = 1024
KV_DTYPES = (torch.float16, torch.float32)


class NativeDecoder:
    """One compiled step: token ids in, logits or final states out; see :meth:`forward`.

    Attributes:
        vocab_size, hidden_size: of the model.
        max_positions: tokens of context, prompt included.
        n_layers: decoder blocks, each with keys and values of its own.
        adapter: digest of the LoRA adapter in use, or ``none``.
        activation_bits: 8, or 16 for float activations and a float cache (slow, for checking).
    """

    def __init__(self, model: nn.Module, earlier: NativeDecoder | None = None) -> None:
        parts = Parts(model, earlier._dense_at if earlier is not None else {})
        self._core = core().Decoder(parts.spec())
        self._kept = parts.kept
        self._dense_at: dict[int, tuple[Tensor, int, Tensor]] = parts.dense_at
        self._modules = parts.modules
        self._packed = [weights_of(m) for m in parts.modules]
        self._adapters, self.adapter = parts.adapters, parts.adapter
        self.vocab_size, self.hidden_size = parts.vocab_size, parts.hidden_size
        self.max_positions, self.activation_bits = parts.max_positions, parts.activation_bits
        self.n_layers = len(parts.decoder.layers)

    @classmethod
    def of(cls, model: nn.Module) -> NativeDecoder:
        """The decoder of ``model``: made at the first call, and again when its linears or adapter have changed.

        Raises Unsupported saying what stands in the way.
        """
        core()
        made = _DECODERS.get(model)
        if made is None or not made._is_current(model):
            made = _DECODERS[model] = cls(model, made)
        made.activation_bits = activation_bits_of(made._modules)
        return made

    def _is_current(self, model: nn.Module) -> bool:
        return self._modules == matrix_modules(model) and all(
            weights_of(m) is p and adapter_of(m) is a
            for m, p, a in zip(self._modules, self._packed, self._adapters, strict=True)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of an adapter and the beginnings of all weights: tells models apart that differ in nothing else."""
        found = hashlib.sha256(b"" if self.adapter == "none" else self.adapter.encode())
        for t in self._kept:
            found.update(f"{t.dtype} {tuple(t.shape)} ".encode())
            found.update(t.reshape(-1)[:FINGERPRINT_NUMBERS].view(torch.uint8).numpy().data)
        return found.hexdigest()

    def new_sequence(self, *, kv: KVCacheConfig | None = None, kv_dtype: torch.dtype | None = None) -> Sequence:
        """An empty sequence.

        Args:
            kv: bits of its keys and values; None: 16.
            kv_dtype: what 16 bits are, float16 or float32; None: float16, with float activations float32.

        Raises ValueError when ``kv`` names other layers than there are, or bits that cannot be stored.
        """
        if kv_dtype is None:
            kv_dtype = torch.float32 if self.activation_bits == 16 else torch.float16
        one_of("kv_dtype", kv_dtype, KV_DTYPES)
        options = _sequence_options(kv or KVCacheConfig(), 8 * kv_dtype.itemsize, self.n_layers)
        return Sequence(self._core.new_sequence(**options))

    def forward(self, tokens: ListLike[Tensor], sequences: ListLike[Sequence], *, output: str = "last") -> Tensor:
        """Append ``tokens[i]`` to ``sequences[i]`` and compute what follows.

        Args:
            tokens: i64[n_i] each, n_i >= 1.
            sequences: as many; each once.
            output: ``last``: f32[B, vocabulary], logits of every sequence's last token; ``all``: f32[sum n_i,
                vocabulary]; ``states``: f32[sum n_i, hidden], what the head would get.

        Raises:
            ValueError: a token id or a length out of range, no tokens, a sequence of another model or given twice.
            MemoryError: no room for the cache.
            In each case the sequences are as before.
        """
        one_of("output", output, OUTPUTS)
        if len(tokens) != len(sequences):
            raise ValueError(f"{len(tokens)} token rows for {len(sequences)} sequences; give one a sequence")
        if not tokens:
            raise ValueError("no sequence was given; a step needs at least one")
        counts = [t.numel() for t in tokens]
        ids = (torch.cat(list(tokens)) if len(tokens) != 1 else tokens[0]).to(torch.int64).contiguous()
        rows = len(tokens) if output == "last" else sum(counts)
        out = torch.empty(rows, self.hidden_size if output == "states" else self.vocab_size)
        self._core.forward(
            ids=ids.data_ptr(),
            counts=counts,
            sequences=[s._core for s in sequences],
            output=OUTPUTS[output],
            float_activations=self.activation_bits == 16,
            out=out.data_ptr(),
        )
        return out

    def logits(self, states: Tensor) -> Tensor:
        """f32[T, hidden] final states -> f32[T, vocabulary] logits."""
        states = states.float().contiguous()
        out = torch.empty(states.shape[0], self.vocab_size)
        self._core.logits(
            states=states.data_ptr(),
            rows=states.shape[0],
            float_activations=self.activation_bits == 16,
            out=out.data_ptr(),
        )
        return out


# Beside the models, not in them: a decoder can be neither copied nor pickled, a model can.
_DECODERS: weakref.WeakKeyDictionary[nn.Module, NativeDecoder] = weakref.WeakKeyDictionary()


def cache_bytes(kv: KVCacheConfig, kv_heads: int, head_dim: int, windows: ListLike[int], tokens: int) -> int:
    """Bytes of a native cache of one sequence of ``tokens``: those that one of these shapes has taken from the system.

    Args:
        kv: bits of keys and values.
        kv_heads, head_dim: of every layer.
        windows: tokens of each layer's sliding window, 0 for none.
        tokens: in the sequence.

    Raises ValueError as :meth:`NativeDecoder.new_sequence` does.
    """
    made = core().shaped_sequence(
        kv_heads=kv_heads, head_dim=head_dim, windows=list(windows), **_sequence_options(kv, 16, len(windows))
    )
    made.skip(tokens)
    return int(made.nbytes)


def _sequence_options(kv: KVCacheConfig, near_bits: int, n_layers: int) -> dict[str, Any]:
    return {
        "layers": _layer_bits(kv, near_bits, n_layers),
        "near_bits": near_bits,
        "by_column": kv.key_scales == "channel",
        "rotate": kv.rotate,
        "sinks": kv.sinks,
        "recent": kv.recent,
    }


def _layer_bits(kv: KVCacheConfig, unquantized: int, n_layers: int) -> list[tuple[int, int]]:
    """(bits of keys, bits of values) of every layer, 16 being ``unquantized`` ones."""
    if kv.layers and len(kv.layers) != n_layers:
        raise ValueError(f"the KV cache's bits name {len(kv.layers)} layers; the model has {n_layers}: name each once")
    pairs = (kv.of_layer(layer) for layer in range(n_layers))
    return [(unquantized if k == 16 else k, unquantized if v == 16 else v) for k, v in pairs]
