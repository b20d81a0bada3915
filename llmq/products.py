"""Float products as fast as this CPU goes: matrices through oneDNN where torch's own library leaves half of it idle.

torch multiplies fp32 matrices with MKL, which runs its AVX2 kernels on CPUs with AVX-512 of other makes than Intel's.
oneDNN, which torch holds as well, uses AVX-512 there: twice as fast. Results differ by rounding; the choice depends on
the CPU alone, so that runs on one machine agree.

Gradients that a step follows need not be exact: where the CPU multiplies bf16 matrices faster, they are computed so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llmq import cpuinfo, masked_attention

# Multiply-adds below which a product is not worth the choice.
LEAST_WORK = 1 << 20
# What Linux calls a CPU's instructions for products of bf16 matrices.
HALF_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}


@functools.cache
def half_helps() -> bool:
    """Whether the CPU has instructions for products of bf16 matrices; with AMX several times as fast as of fp32."""
    return torch.backends.mkldnn.is_available() and bool(HALF_FLAGS & cpuinfo.flags())


@functools.cache
def helps() -> bool:
    """Whether oneDNN is the faster one here: AVX-512 on a CPU that is not Intel's, and a torch that has it."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpuinfo.vendor() not in ("GenuineIntel", "")
    )


def _takes(x: Tensor, w: Tensor) -> bool:
    plain = all(t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided for t in (x, w))
    return plain and w.dim() == 2 and x.dim() >= 1 and x.numel() * w.shape[0] >= LEAST_WORK


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _through_onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    # Matrices whose rows lie apart, as slices do, it multiplies without vectors, a hundred times slower.
    if not (w.is_contiguous() or w.T.is_contiguous()):
        w = w.contiguous() if w.stride(1) == 1 else w.T.contiguous().T
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, w, bias, "none", [], "")
    return out.reshape(*x.shape[:-1], w.shape[0])


class _Linear(torch.autograd.Function):
    """``F.linear`` whose gradients are products through oneDNN as well; the op itself has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _through_onednn(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (dy,), (x, w) = grads, ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = _through_onednn(dy, w.T, None) if ctx.needs_input_grad[0] else None
        dw = _through_onednn(rows.T, x.reshape(-1, x.shape[-1]).T, None) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], f32; no gradient is asked for."""
    return _through_onednn(a, b.T, None) if helps() and _takes(a, b) and not _learns(a, b) else a @ b


class _Products(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.onednn = helps()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.onednn and func is F.linear and not kwargs and _takes(args[0], args[1]):
            if not torch.is_autocast_enabled("cpu"):
                x, w, bias = args if len(args) > 2 else (*args, None)
                way: Any = _Linear.apply if _learns(x, w, bias) else _through_onednn
                return way(x, w, bias)
        elif func is F.scaled_dot_product_attention and len(args) == 3 and kwargs:
            (q, k, v), mask = args, kwargs.get("attn_mask")
            if masked_attention.takes(q, k, mask):
                options = {name: value for name, value in kwargs.items() if name != "attn_mask"}
                return masked_attention.attend(q, k, v, mask, **options)
        return func(*args, **(kwargs or {}))


@contextmanager
def fast_products() -> Iterator[None]:
    """Within the context, in this thread, fp32 linears go the faster way, and so do their gradients; attention leaves
    out what its mask hides."""
    with _Products():
        yield


@contextmanager
def learning_linears() -> Iterator[None]:
    """Within the context, in this thread, linears and attention go the fastest way that a gradient allows: in bf16
    where :func:`half_helps`, what is between them in fp32; else as in :func:`fast_products`."""
    with torch.autocast("cpu", torch.bfloat16) if half_helps() else fast_products():
        yield
