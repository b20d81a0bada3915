"""Float matrix products through oneDNN where torch's own library leaves half of the CPU idle.

torch multiplies fp32 matrices with MKL, which runs its AVX2 kernels on CPUs with AVX-512 of other makes than Intel's.
oneDNN, which torch holds as well, uses AVX-512 there: twice as fast. Results differ by rounding; the choice depends on
the CPU alone, so that runs on one machine agree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Multiply-adds below which a product is not worth the choice.
LEAST_WORK = 1 << 20


def cpu_vendor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU calls its maker, e.g. ``AuthenticAMD``; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@functools.cache
def helps() -> bool:
    """Whether oneDNN is the faster one here: AVX-512 on a CPU that is not Intel's, and a torch that has it."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu_vendor() not in ("GenuineIntel", "")
    )


def _takes(x: Tensor, w: Tensor) -> bool:
    plain = all(t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided for t in (x, w))
    learns = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return plain and not learns and w.dim() == 2 and x.dim() >= 1 and x.numel() * w.shape[0] >= LEAST_WORK


def _through_onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    # Matrices whose rows lie apart, as slices do, it multiplies without vectors, a hundred times slower.
    if not (w.is_contiguous() or w.T.is_contiguous()):
        w = w.contiguous() if w.stride(1) == 1 else w.T.contiguous().T
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, w, bias, "none", [], "")
    return out.reshape(*x.shape[:-1], w.shape[0])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], f32."""
    return _through_onednn(a, b.T, None) if helps() and _takes(a, b) else a @ b


class _Linears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _takes(args[0], args[1]):
            return _through_onednn(args[0], args[1], args[2] if len(args) > 2 else None)
        return func(*args, **(kwargs or {}))


@contextmanager
def fast_linears() -> Iterator[None]:
    """Within the context, in this thread, fp32 linears that need no gradient go the faster way."""
    if not helps():
        yield
        return
    with _Linears():
        yield
