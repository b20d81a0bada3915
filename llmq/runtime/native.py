"""The native decoder: a whole model behind one compiled call a step, driven by its family's row.

The weights are those of the model's own modules, not copies (dense 16-bit matrices excepted); the Hugging Face graph
stays intact beside it.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor, nn

from llmq import kernels
from llmq.compat import API
from llmq.config import KVCacheConfig, one_of
from llmq.models.families import FAMILIES, family_of
from llmq.qtensor import QTensor
from llmq.runtime.adapters import LowRank, adapter_of
from llmq.runtime.qlinear import QEmbedding, QLinear, QuantizedMatrix, TiedHead
from llmq.runtime.sequence import Sequence

OUTPUTS = {"last": 0, "all": 1, "states": 2}
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
DENSE_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Rows of a dense matrix looked at at once: a head of 262144 rows is never in memory a third time.
DENSE_ROWS = 4096
# Of each weight, as many of its first numbers tell models apart.
FINGERPRINT_NUMBERS = 1024
KV_DTYPES = (torch.float16, torch.float32)
# Rope types whose frequencies do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3")
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm", "q_norm", "k_norm")
LAYER_TYPES = ("full_attention", "sliding_attention")


class Unsupported(Exception):
    """Why a model has no native decoder. It then runs in the Hugging Face graph."""


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
        parts = _Parts(model, earlier._dense_at if earlier is not None else {})
        self._core = core().Decoder(parts.spec())
        self._kept = parts.kept
        self._dense_at: dict[int, tuple[Tensor, int, Tensor]] = parts.dense_at
        self._modules = parts.modules
        self._packed = [_packed(m) for m in parts.modules]
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
        made.activation_bits = _activation_bits(made._modules)
        return made

    def _is_current(self, model: nn.Module) -> bool:
        return self._modules == _matrix_modules(model) and all(
            _packed(m) is p and adapter_of(m) is a
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


def core() -> Any:
    """The compiled module. Raises Unsupported where the kernels in use are not compiled ones."""
    module = kernels.compiled()
    if module is None:
        raise Unsupported("the kernels in use are plain torch (LLMQ_ISA=reference, or no compiled module)")
    return module


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


def _matrix_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, QuantizedMatrix | TiedHead | nn.Linear | nn.Embedding)]


def _packed(module: nn.Module) -> object:
    """What changes when a module gets other weights."""
    return module.packed if isinstance(module, QuantizedMatrix) else getattr(module, "weight", None)


def _activation_bits(modules: ListLike[nn.Module]) -> int:
    bits = {m.activation_bits for m in modules if isinstance(m, QLinear | TiedHead)}
    if len(bits) > 1:
        raise Unsupported("its linears differ in activation_bits; use llmq.set_activation_bits on the whole model")
    return bits.pop() if bits else 16


class _Parts:
    """Everything a decoder needs of a Hugging Face model, found through its family's row.

    ``kept`` holds the tensors whose addresses the compiled decoder uses.
    """

    def __init__(self, model: nn.Module, earlier: Mapping[int, tuple[Tensor, int, Tensor]]) -> None:
        config: Any = model.config
        family = family_of(config.model_type)
        if family is None or family.native is None:
            known = ", ".join(t for f in FAMILIES if f.native for t in f.model_types)
            raise Unsupported(f"model type {config.model_type!r} has no native decoder (there is one for: {known})")
        self.model, self.family, self.names, self.config = model, family, family.native, config
        self.kept: list[Tensor] = []
        # By address: a dense matrix, its version, and what the decoder reads. Those of the decoder before this one are
        # taken over: a change of adapter alone does not look at an embedding again.
        self.dense_at: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._earlier = earlier
        self.modules = _matrix_modules(model)
        # Of each module; they stay alive with the decoder, which holds the addresses of their numbers.
        self.adapters = [adapter_of(m) for m in self.modules]
        self.adapter = next((a.digest for a in self.adapters if a), "none")
        self._adapted: set[LowRank] = set()
        self.activation_bits = _activation_bits(self.modules)
        self.decoder: Any = model.get_submodule(family.decoder)
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        self.max_positions = min(int(getattr(config, "max_position_embeddings", None) or 2**31 - 1), 2**31 - 1)
        # Frequencies afresh: `model.to(dtype)` has rounded the module's own.
        self.ropes = API.ropes(self.decoder, config)

    def spec(self) -> Any:
        blocks: list[Any] = list(self.decoder.layers)
        attention = blocks[0].self_attn
        spec = core().DecoderSpec()
        spec.hidden, spec.head_dim = self.hidden_size, int(attention.head_dim)
        spec.heads, spec.kv_heads = int(self.config.num_attention_heads), int(self.config.num_key_value_heads)
        spec.max_positions = self.max_positions
        spec.eps = float(self.config.rms_norm_eps)
        spec.attention_scale = float(attention.scaling)
        spec.attention_softcap = float(getattr(self.config, "attn_logit_softcapping", None) or 0.0)
        spec.final_softcap = float(getattr(self.config, "final_logit_softcapping", None) or 0.0)
        spec.activation = self._activation()
        spec.embedding, spec.embedding_scale = self._embedding(self.model.get_input_embeddings())  # type: ignore[operator]
        spec.head = self._matrix(self.model.get_output_embeddings())  # type: ignore[operator]
        spec.final_norm = self._norm(self.decoder.norm)
        ropes: dict[str, int] = {}
        spec.layers = [self._layer(block, i, ropes) for i, block in enumerate(blocks)]
        spec.ropes = [self._rope(kind) for kind in ropes]
        for module, adapter in zip(self.modules, self.adapters, strict=True):
            if adapter and adapter not in self._adapted:
                raise Unsupported(f"a {type(module).__name__} outside the blocks has an adapter")
        return spec

    def _activation(self) -> int:
        name = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        if name not in ACTIVATIONS:
            raise Unsupported(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def _layer(self, block: nn.Module, index: int, ropes: dict[str, int]) -> Any:
        layer = core().DecoderLayer()
        for field, path in LINEARS.items():
            setattr(layer, field, self._linear(block.get_submodule(path)))
        for field in NORMS:
            path = getattr(self.names, field)
            setattr(layer, field, 0 if path is None else self._norm(block.get_submodule(path)))
        types = getattr(self.config, "layer_types", None)
        kind = types[index] if types else LAYER_TYPES[self.names.all_slide]
        if kind not in LAYER_TYPES:
            raise Unsupported(f"layers of type {kind!r} are none of {', '.join(LAYER_TYPES)}")
        layer.window = int(self.config.sliding_window or 0) if kind == "sliding_attention" else 0
        layer.rope = ropes.setdefault(kind if kind in self.ropes else "", len(ropes))
        return layer

    def _rope(self, kind: str) -> Any:
        rope = self.ropes[kind]
        if rope.type not in ROPE_TYPES:
            raise Unsupported(f"rope type {rope.type!r} is none of {', '.join(ROPE_TYPES)}")
        return core().Rope(inverse_frequency=rope.frequencies.tolist(), scaling=rope.scaling)

    def _keep(self, t: Tensor) -> int:
        t = t.detach().contiguous()
        self.kept.append(t)
        return t.data_ptr()

    def _norm(self, module: Any) -> int:
        weight = module.weight.detach().float() + self.family.norm_offset
        if not weight.isfinite().all():
            raise ValueError(f"a {type(module).__name__} holds NaN or infinity: the checkpoint is damaged")
        return self._keep(weight)

    def _embedding(self, module: nn.Module) -> tuple[Any, float]:
        if isinstance(module, QEmbedding):
            scale = float(module.get_buffer("output_scale"))
        else:
            scale = float(getattr(module, "embed_scale", 1.0))
        if self.config.model_type in API.scaled_embeddings:
            scale *= float(torch.tensor(self.hidden_size**0.5, dtype=self.model.dtype))  # type: ignore[arg-type]
        return self._matrix(module), scale

    def _linear(self, module: nn.Module) -> Any:
        """A matrix of a block, with its adapter."""
        made, adapter = self._matrix(module), adapter_of(module)
        if adapter is not None:
            m = adapter.matrices
            made.adapt(a=m.a.data_ptr(), b=m.bt.data_ptr(), rank=m.rank, type=DENSE_TYPES[m.a.dtype], scale=m.scale)
            self._adapted.add(adapter)
        return made

    def _matrix(self, module: nn.Module) -> Any:
        if isinstance(module, TiedHead):
            module = module.__dict__["embedding"]
        bias = getattr(module, "bias", None)
        bias_at = 0 if bias is None else self._keep(bias.float())
        if getattr(module, "column_order", None) is not None:
            raise Unsupported("a linear has its columns in another order (GPTQ's desc_act)")
        if isinstance(module, QuantizedMatrix):
            weight = module.ready()
            if isinstance(weight.data, QTensor):
                raise Unsupported("its weights were packed for the reference kernels (LLMQ_ISA=reference)")
            self.kept.append(weight.data)
            layout = kernels.layout(weight)
            return core().Matrix.packed(
                layout=layout, data=weight.data.data_ptr(), nbytes=weight.data.numel(), bias=bias_at
            )
        if type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
            raise Unsupported(f"a {type(module).__name__} stands where a linear was expected")
        return self._dense(module.weight.detach(), bias_at)

    def _dense(self, weight: Tensor, bias_at: int) -> Any:
        """A matrix as it is, or in 16 bits where that loses nothing; an embedding that is also the head, once."""
        at = weight.data_ptr()
        if at not in self.dense_at:
            before = self._earlier.get(at)
            now = (weight.shape, weight.dtype, weight._version)
            if before is None or (before[0].shape, before[0].dtype, before[1]) != now:
                before = (weight, weight._version, self._in_its_least_type(weight))
            self.dense_at[at] = before
        weight = self.dense_at[at][2]
        n, k = weight.shape
        return core().Matrix.dense(data=self._keep(weight), n=n, k=k, type=DENSE_TYPES[weight.dtype], bias=bias_at)

    @staticmethod
    def _in_its_least_type(weight: Tensor) -> Tensor:
        if not all(part.isfinite().all() for part in weight.split(DENSE_ROWS)):
            raise ValueError(f"a matrix {tuple(weight.shape)} holds NaN or infinity: the checkpoint is damaged")
        if weight.dtype == torch.float32:
            return next((low for t in DENSE_TYPES if (low := _exact_copy(weight, t)) is not None), weight)
        return weight


def _exact_copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``weight`` f32[N, K] in a 16-bit type; None when that would change a number."""
    if dtype.itemsize != 2:
        return None
    copy = torch.empty(weight.shape, dtype=dtype)
    for part, whole in zip(copy.split(DENSE_ROWS), weight.split(DENSE_ROWS), strict=True):
        if not torch.equal(part.copy_(whole).float(), whole):
            return None
    return copy
