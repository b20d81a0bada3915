"""Modules that hold a quantized matrix and run on the kernels: QLinear, QEmbedding, and a head tied to an embedding.

A module is made with empty buffers in the checkpoint's layout, which the loader fills; :meth:`QuantizedMatrix.pack_`
then turns them into the kernels' layout and drops them, so a matrix is in memory once. ``state_dict`` gives the
checkpoint's tensors back, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq import kernels
from llmq.checkpoint import matrix_from_tensors, matrix_layout, matrix_tensors
from llmq.config import QuantScheme, one_of
from llmq.kernels import PackedWeight
from llmq.kernels.reference import ACTIVATION_BITS
from llmq.qtensor import QTensor

# Rows of a weight dequantized at once for a gradient.
_ROWS_OF_A_GRADIENT = 1024


class QuantizedMatrix(nn.Module):
    """A quantized matrix [n, k] as a module: buffers while loading, one packed weight afterwards."""

    def __init__(self, n: int, k: int, scheme: QuantScheme) -> None:
        super().__init__()
        self.n, self.k, self.scheme = n, k, scheme
        self.packed: PackedWeight | None = None
        for key, (shape, dtype) in matrix_layout(n, k, scheme).items():
            self.register_buffer(key, torch.empty(shape, dtype=dtype))

    def qtensor(self) -> QTensor:
        """The matrix's integers, scales and zeros (a new copy)."""
        if self.packed is not None:
            return self.packed.unpack()
        tensors = {key: self.get_buffer(key) for key in matrix_layout(self.n, self.k, self.scheme)}
        return matrix_from_tensors(tensors, self.n, self.k, self.scheme, type(self).__name__)

    def set_qtensor(self, t: QTensor) -> None:
        """Take another matrix of the same shape and scheme, packed for the current kernels."""
        if t.shape != (self.n, self.k) or t.scheme != self.scheme:
            raise ValueError(f"matrix is {t.shape} in {t.scheme}, the module holds {(self.n, self.k)} in {self.scheme}")
        self.set_packed(kernels.pack(t))

    def set_packed(self, w: PackedWeight) -> None:
        """Take a matrix that is packed already, of the same shape and scheme, and drop the loaded buffers."""
        if (w.n, w.k, w.scheme) != (self.n, self.k, self.scheme):
            raise ValueError(f"matrix is {w.n} x {w.k} in {w.scheme}, the module {self.n} x {self.k} in {self.scheme}")
        self.packed = w
        self.drop_buffers()

    def drop_buffers(self) -> None:
        """Let go of the tensors that a loader would fill."""
        for key in matrix_layout(self.n, self.k, self.scheme):
            self._buffers.pop(key, None)

    def pack_(self) -> None:
        """Turn the loaded buffers into the kernels' layout and drop them. Does nothing the second time."""
        if self.packed is None:
            self.set_qtensor(self.qtensor())

    def ready(self) -> PackedWeight:
        """The packed matrix; packs it first if the module was filled by ``load_state_dict``."""
        self.pack_()
        assert self.packed is not None
        return self.packed

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination.update({prefix + key: value for key, value in matrix_tensors(self.packed.unpack()).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.packed is not None and prefix + "qweight" in state_dict:
            for key, (shape, dtype) in matrix_layout(self.n, self.k, self.scheme).items():
                self.register_buffer(key, torch.empty(shape, dtype=dtype))
            self.packed = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shape and scheme, as ``print(model)`` shows them."""
        return f"{self.k} -> {self.n}, {self.scheme}"


class QLinear(QuantizedMatrix):
    """``y = x W^T + bias`` with a quantized W: int8 activations per token and group, int32 sums inside a group.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        scheme: the grid of W.
        bias: whether there is a bias (kept in the model's float dtype).
        activation_bits: 8, or 16 to multiply float activations with dequantized weights (slow, for checking).
    """

    def __init__(
        self, in_features: int, out_features: int, scheme: QuantScheme, *, bias: bool, activation_bits: int = 8
    ) -> None:
        super().__init__(out_features, in_features, scheme)
        self.in_features, self.out_features, self.activation_bits = in_features, out_features, activation_bits
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        # i64[in_features] or None: column j of the matrix takes input column_order[j] (GPTQ's desc_act).
        self.column_order: Tensor | None = None

    @property
    def W_q(self) -> Tensor:
        """The packed bytes, for code that asks where a quantized weight lies (peft, of HQQ's linears)."""
        data = self.ready().data
        return data if isinstance(data, Tensor) else data.q

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in_features] -> float[..., out_features], in the dtype of ``x``; computed in fp32."""
        if self.column_order is not None:
            x = x[..., self.column_order]
        return apply_linear(x, self.ready(), self.bias, self.activation_bits)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.column_order is not None and self.packed is not None:  # an empty module is asked while it is loaded
            raise ValueError(
                f"{prefix.rstrip('.')} has its columns in another order (desc_act), which llmq's format does not hold;"
                " keep the folder that it was loaded from"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


class QEmbedding(QuantizedMatrix):
    """Rows of a quantized table, dequantized when they are looked up and multiplied by ``output_scale``.

    ``output_scale`` is a buffer in the model's dtype, so that ``model.to(dtype)`` decides what the rows come out as and
    Gemma's embedding scale is rounded as transformers rounds it.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: QuantScheme, *, scale: float = 1.0) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.num_embeddings, self.embedding_dim, self.scale = num_embeddings, embedding_dim, scale
        # Not on the meta device, which no module can be moved away from: transformers 4 moves all of them.
        self.register_buffer("output_scale", torch.tensor(scale, device="cpu"), persistent=False)

    def reset_output_scale(self, dtype: torch.dtype) -> None:
        """(Re)make the buffer; a loader that starts on the meta device loses its value."""
        self.register_buffer("output_scale", torch.tensor(self.scale, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """i64[...] -> [..., embedding_dim] in the dtype of ``output_scale``."""
        rows = kernels.take_rows(self.ready(), ids.reshape(-1))
        scale = self.get_buffer("output_scale")
        return (rows.to(scale.dtype) * scale).reshape(*ids.shape, self.embedding_dim)


class TiedHead(nn.Module):
    """An output head that uses the embedding's matrix: one copy in memory, one on disk."""

    def __init__(self, embedding: QEmbedding, *, activation_bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.activation_bits = activation_bits
        # Not a submodule: its tensors must be saved once, under the embedding's name.
        self.__dict__["embedding"] = embedding

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in_features] -> float[..., vocabulary], in the dtype of ``x``."""
        return apply_linear(x, self.__dict__["embedding"].ready(), None, self.activation_bits)


def set_activation_bits(model: nn.Module, bits: int) -> None:
    """Let every quantized linear of ``model`` take int8 (8) or float (16: slow, for checking) activations.

    Raises:
        ValueError: other bits, or a model without a quantized linear.
    """
    one_of("activation_bits", bits, ACTIVATION_BITS)
    linears = [module for module in model.modules() if isinstance(module, QLinear | TiedHead)]
    if not linears:
        raise ValueError(f"a {type(model).__name__} without quantized linears has no activation bits to set")
    for module in linears:
        module.activation_bits = bits


def apply_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation_bits: int) -> Tensor:
    """One kernel call on all tokens of ``x`` float[..., k]; a gradient flows to ``x`` where it asks for one.

    Raises ValueError for tensors that are not on the CPU.
    """
    if x.device.type != "cpu":
        raise ValueError(f"llmq's kernels run on the CPU, the input is on {x.device}; move the model's inputs to 'cpu'")
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Differentiable.apply(x, weight, bias, activation_bits)  # type: ignore[no-untyped-call]
        return out
    return _run(x, weight, bias, activation_bits)


def _run(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation_bits: int) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
    out = kernels.qgemm(
        rows, weight, bias=None if bias is None else bias.detach().float(), activation_bits=activation_bits
    )
    return out.reshape(*x.shape[:-1], weight.n).to(x.dtype)


class _Differentiable(torch.autograd.Function):
    """A quantized linear with a gradient for its input: that of the dequantized weight, as in QLoRA (arXiv 2305.14314).

    The rounding of activations to int8 passes the gradient through. Integers, scales and bias get none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, activation_bits: int) -> Tensor:
        """float[..., k] -> float[..., n]."""
        ctx.weight = weight
        return _run(x, weight, bias, activation_bits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """float[..., n] -> float[..., k], and nothing for the others; rows of W are in memory a few at a time."""
        weight, grad = ctx.weight, grads[0]
        rows = grad.reshape(-1, weight.n).float()
        out = torch.zeros(rows.shape[0], weight.k)
        for ids in torch.arange(weight.n).split(_ROWS_OF_A_GRADIENT):
            out.addmm_(rows[:, ids[0] : ids[-1] + 1], kernels.take_rows(weight, ids))
        return out.reshape(*grad.shape[:-1], weight.k).to(grad.dtype), None, None, None
