"""A quantized model as an ordinary one: its weights' values in floats, run by transformers' own graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.runtime.causal_lm import NativeCausalLM, graph_class
from llmq.runtime.qlinear import QLinear, TiedHead


def to_floats(model: nn.Module) -> None:
    """Give every quantized linear and head of ``model`` its values in fp32, in place; the native decoder is left.

    The same function as ``set_activation_bits(model, 16)`` and several times as fast on many tokens, for 4 bytes a
    weight of memory; a quantized embedding keeps looking its rows up. The model is one for scoring: it is not saved.
    """
    for parent in [*model.modules()]:
        for name, module in [*parent.named_children()]:
            if isinstance(module, QLinear | TiedHead):
                setattr(parent, name, _plain(module))
    if isinstance(model, NativeCausalLM):
        model.__class__ = graph_class(model)


def _plain(module: QLinear | TiedHead) -> nn.Linear:
    # On the meta device: what is made there and replaced costs nothing.
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(_values(module), requires_grad=False)
    if isinstance(module, QLinear) and module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
    return plain


def _values(module: QLinear | TiedHead) -> Tensor:
    """f32[out_features, in_features], columns in the order of the inputs."""
    if isinstance(module, TiedHead):
        values: Tensor = module.__dict__["embedding"].qtensor().dequantize()
        return values
    W = module.qtensor().dequantize()
    return W if module.column_order is None else W[:, torch.argsort(module.column_order)]
