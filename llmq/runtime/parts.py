"""What the compiled decoder needs of a Hugging Face model: matrices, norms and ropes, found by its family's row."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor, nn

from llmq import kernels
from llmq.compat import API
from llmq.models.families import FAMILIES, family_of
from llmq.qtensor import QTensor
from llmq.runtime.adapters import LowRank, adapter_of
from llmq.runtime.qlinear import QEmbedding, QLinear, QuantizedMatrix, TiedHead

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
DENSE_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Rows of a dense matrix looked at at once: a head of 262144 rows is never in memory a third time.
DENSE_ROWS = 4096
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
# Linears that share their input, and so the order of their columns.
ORDERS = {"qkv_order": ("q", "k", "v"), "o_order": ("o",), "ffn_order": ("gate", "up"), "down_order": ("down",)}
NORMS = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm", "q_norm", "k_norm")
LAYER_TYPES = ("full_attention", "sliding_attention")


class Unsupported(Exception):
    """Why a model has no native decoder. It then runs in the Hugging Face graph."""


def core() -> Any:
    """The compiled module. Raises Unsupported where the kernels in use are not compiled ones."""
    module = kernels.compiled()
    if module is None:
        raise Unsupported("the kernels in use are plain torch (LLMQ_ISA=reference, or no compiled module)")
    return module


def matrix_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that hold a matrix, quantized or dense."""
    return [m for m in model.modules() if isinstance(m, QuantizedMatrix | TiedHead | nn.Linear | nn.Embedding)]


def weights_of(module: nn.Module) -> object:
    """What changes when a module gets other weights."""
    return module.packed if isinstance(module, QuantizedMatrix) else getattr(module, "weight", None)


def activation_bits_of(modules: ListLike[nn.Module]) -> int:
    """8, or 16 for float activations. Raises Unsupported where modules differ."""
    bits = {m.activation_bits for m in modules if isinstance(m, QLinear | TiedHead)}
    if len(bits) > 1:
        raise Unsupported("its linears differ in activation_bits; use llmq.set_activation_bits on the whole model")
    return bits.pop() if bits else 16


class Parts:
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
        self.modules = matrix_modules(model)
        # Of each module; they stay alive with the decoder, which holds the addresses of their numbers.
        self.adapters = [adapter_of(m) for m in self.modules]
        self.adapter = next((a.digest for a in self.adapters if a), "none")
        self._adapted: set[LowRank] = set()
        self.activation_bits = activation_bits_of(self.modules)
        self.decoder: Any = model.get_submodule(family.decoder)
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        self.max_positions = min(int(getattr(config, "max_position_embeddings", None) or 2**31 - 1), 2**31 - 1)
        # Frequencies afresh: `model.to(dtype)` has rounded the module's own.
        self.ropes = API.ropes(self.decoder, config)

    def spec(self) -> Any:
        """The compiled module's DecoderSpec. Raises Unsupported for what the decoder does not have."""
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
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        if getattr(head, "column_order", None) is not None:
            raise Unsupported("the head has its columns in another order (GPTQ's desc_act)")
        spec.head = self._matrix(head)
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
        for field, sharing in ORDERS.items():
            setattr(layer, field, self._order([block.get_submodule(LINEARS[name]) for name in sharing]))
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

    def _order(self, modules: ListLike[nn.Module]) -> int:
        """Address of the order of the columns of linears with one input (GPTQ's desc_act); 0 for none."""
        orders: list[Tensor | None] = [getattr(m, "column_order", None) for m in modules]
        first = orders[0]
        if not all(o is first or (o is not None and first is not None and torch.equal(o, first)) for o in orders):
            raise Unsupported("linears with one input have their columns in different orders (GPTQ's desc_act)")
        if first is None:
            return 0
        if any(adapter_of(m) for m in modules):
            raise Unsupported("a linear with its columns in another order (GPTQ's desc_act) has an adapter")
        return self._keep(first)

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
