"""The logits of a window in chunks of tokens, through whatever runs the model: the native decoder or its own graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.kv_feed import KVFeed
from llmq.runtime.cache import NativeCache
from llmq.runtime.causal_lm import decoder_of
from llmq.runtime.qlinear import QLinear, TiedHead
from llmq.score import CacheMemory

ACTIVATIONS = {8: "int8 activations", 16: "float activations"}


def engine_of(model: Any, *, graph: bool = False) -> str:
    """What runs ``model``, in words: native decoder or Hugging Face graph, and the activations of quantized linears.

    ``graph``: the graph runs even where there is a native decoder.
    """
    decoder = None if graph else decoder_of(model)
    if decoder is not None:
        return f"native decoder, {ACTIVATIONS[decoder.activation_bits]}"
    bits = {m.activation_bits for m in model.modules() if isinstance(m, QLinear | TiedHead)}
    return ", ".join(["Hugging Face graph", *(ACTIVATIONS[b] for b in sorted(bits))])


class WindowLogits:
    """The logits of one window in chunks of tokens, so that [seqlen, vocabulary] is never held.

    ``states(ids)`` runs the decoder once; ``logits(states[a:b])`` applies head and soft cap. If that does not reproduce
    the model's own logits on the first tokens (some models scale theirs further), the full forward is used instead.

    Args:
        model: any causal language model, in evaluation mode.
        probe: i64[t], the tokens on which both ways are compared.
        kv: feed each window through a quantized cache; None: in one piece, without a cache or through one of 16 bits.
    """

    def __init__(self, model: Any, probe: Tensor, kv: KVFeed | None = None) -> None:
        self.model, self.kv = model, None
        self.memory: CacheMemory | None = None  # of the quantized cache after the last window
        self.native = decoder_of(model) if kv is None else kv.native(model)
        self.head: nn.Module | None = model.get_output_embeddings()
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.decoder: Any = model.get_decoder()
        self.note = self._verify(probe)
        self.kv = kv

    def _verify(self, probe: Tensor) -> str:
        """Compare both ways on ``probe`` i64[t]; switch to the full forward where they differ. Returns a note or ''."""
        # A native forward would use the cache of the checkpoint's default.
        cache = {"past_key_values": NativeCache()} if self.native is not None else {"use_cache": False}
        own = self.model(input_ids=probe[None], **cache).logits[0]
        self.vocab = own.shape[-1]
        why = "it has no output head of its own"
        if self.native is not None or (self.head is not None and self.decoder is not self.model):
            difference = float((self.logits(self.states(probe)) - own.float()).abs().max())
            # Same operations on the same shapes: only the rounding of the model's own type may differ.
            limit = max(1e-5, 4 * torch.finfo(own.dtype).eps) * float(own.abs().max())
            if difference <= limit:
                return ""
            why = f"decoder and head give logits that differ by {difference:.2g} (limit {limit:.2g})"
        self.head = self.native = None
        return f"{type(self.model).__name__}: full logits of a window are held, because {why}"

    def states(self, ids: Tensor) -> Tensor:
        """f[T, D] for ids i64[T]: the head's inputs (or the logits themselves where the full forward is used)."""
        if self.kv is not None and self.native is not None:
            states, self.memory = self.kv.run_natively(self.native, ids)
            return states
        if self.kv is not None:
            states, self.memory = self.kv.run(self.model, ids, self._step)
            return states
        if self.native is not None:
            return self.native.forward([ids], [self.native.new_sequence()], output="states")
        return self._step(input_ids=ids[None], use_cache=False)

    def _step(self, **inputs: Any) -> Tensor:
        if self.head is None:
            logits: Tensor = self.model(**inputs).logits[0]
            return logits
        hidden: Tensor = self.decoder(**inputs).last_hidden_state[0]
        return hidden

    def logits(self, states: Tensor) -> Tensor:
        """f32[t, V] logits of ``states`` [t, D]."""
        if self.native is not None:
            return self.native.logits(states)
        if self.head is None:
            return states.float()
        out: Tensor = self.head(states)
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out.float()
