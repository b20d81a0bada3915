"""Operations on packed quantized matrices: compiled kernels chosen for this CPU, or plain torch.

The kernel set ("ISA") is the best one this CPU can run, unless ``LLMQ_ISA`` names another; ``LLMQ_ISA=reference`` is
plain torch. All sets give the same bits. ``LLMQ_NUM_THREADS`` sets the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.config import KEY_SCALES, QuantScheme, one_of
from llmq.kernels import reference
from llmq.qtensor import QTensor

try:
    from llmq import _core
except ImportError as error:
    _core = None  # type: ignore[assignment]
    warnings.warn(
        f"llmq's compiled kernels cannot be loaded ({error}): running on plain torch, which is slow. "
        "Reinstalling llmq with a C++ compiler on the machine builds them.",
        RuntimeWarning,
        stacklevel=2,
    )

__all__ = [
    "PackedWeight",
    "attend",
    "available_isas",
    "compiled",
    "current_isa",
    "follow_torch",
    "layout",
    "layout_version",
    "num_threads",
    "pack",
    "qgemm",
    "set_num_threads",
    "take_rows",
    "use_isa",
]

REFERENCE = "reference"
# Rows dequantized at a time when activations stay in floating point: bounds the memory of large heads.
_ROWS_AT_A_TIME = 4096

_chosen: str | None = None  # the ISA in use once it is known
_torch_threads = torch.get_num_threads()  # torch's number of threads when the kernels' was last settled


def available_isas() -> list[str]:
    """Kernel sets this machine can run, best first; ``reference`` (plain torch) is always the last."""
    return [*(_core.isas() if _core else ()), REFERENCE]


def current_isa() -> str:
    """The kernel set in use: what :func:`use_isa` or ``LLMQ_ISA`` says, else the best one."""
    if _chosen is None:
        _choose(os.environ.get("LLMQ_ISA") or available_isas()[0], "LLMQ_ISA")
    assert _chosen is not None
    return _chosen


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the body with the kernel set ``name``; process-wide. Raises ValueError listing the available ones."""
    before = current_isa()
    _choose(name, "isa")
    try:
        yield
    finally:
        _choose(before, "isa")


def _choose(name: str, source: str) -> None:
    global _chosen
    if name not in available_isas():
        known = ", ".join(available_isas())
        raise ValueError(f"{source} is {name!r}, which this machine or build cannot run; available: {known}")
    if _core and name != REFERENCE:
        _core.use_isa(name)
    _chosen = name


def num_threads() -> int:
    """Threads the compiled kernels use (see :func:`set_num_threads`)."""
    follow_torch()
    return _core.num_threads() if _core else torch.get_num_threads()


def set_num_threads(n: int) -> None:
    """Threads that share a kernel call, the caller included. Raises ValueError when ``n`` is not 1 to 1024.

    The default is ``LLMQ_NUM_THREADS``; without it, as many as torch uses (``torch.get_num_threads()``), but no more
    than the physical cores among the CPUs this process may run on. A later ``torch.set_num_threads`` changes the
    kernels' threads, too, unless ``LLMQ_NUM_THREADS`` is set: the last word counts. Without the compiled module this
    sets torch's threads.
    """
    global _torch_threads
    (_core.set_num_threads if _core else torch.set_num_threads)(n)
    _torch_threads = torch.get_num_threads()


def follow_torch() -> None:
    """Take over what ``torch.set_num_threads`` was told since the last look, unless ``LLMQ_NUM_THREADS`` is set."""
    global _torch_threads
    now = torch.get_num_threads()
    if now != _torch_threads:
        _torch_threads = now
        if _core and not os.environ.get("LLMQ_NUM_THREADS"):
            _core.set_num_threads(now)


def _default_threads() -> int:
    text = os.environ.get("LLMQ_NUM_THREADS")
    if text:
        if not text.isdecimal() or not 1 <= int(text) <= 1024:
            raise ValueError(f"LLMQ_NUM_THREADS is {text!r}; use a whole number from 1 to 1024")
        return int(text)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    # CPUs that list the same siblings are threads of one core: a second one there slows the first down.
    return max(1, min(torch.get_num_threads(), len({_siblings(cpu) for cpu in cpus})))


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return f"unknown {cpu}"


if _core:
    _core.set_num_threads(_default_threads())


@functools.cache
def _layout(n: int, k: int, scheme: QuantScheme) -> _core.Layout:
    return _core.Layout(
        n=n,
        k=k,
        source_group=scheme.group_width(k),
        bits=scheme.bits,
        has_zero=not scheme.sym,
        mid=scheme.mid,
    )


@dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix [n, k] in the form that the kernels read. Made by :func:`pack`; fit to be copied and pickled.

    Attributes:
        n: rows, out_features.
        k: columns, in_features.
        scheme: the grid.
        data: u8[bytes], aligned to 64 bytes: a header and panels of 16 rows (described in cpp/layout.h), the same for
            every compiled kernel set; or the QTensor itself when packed under ``reference``.
    """

    n: int
    k: int
    scheme: QuantScheme
    data: Tensor | QTensor = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        if isinstance(self.data, Tensor):
            return self.data.numel()
        parts = (self.data.q, self.data.scale, self.data.zero)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def unpack(self) -> QTensor:
        """The QTensor that was packed, exactly. Raises ValueError when the data's header disagrees with this object."""
        if isinstance(self.data, QTensor):
            return self.data
        groups = self.scheme.n_groups(self.k)
        q = torch.empty(self.n, self.k, dtype=torch.uint8)
        scale = torch.empty(self.n, groups, dtype=torch.float16)
        zero = None if self.scheme.sym else torch.empty(self.n, groups, dtype=torch.uint8)
        _layout(self.n, self.k, self.scheme).unpack(
            data=self.data.data_ptr(),
            nbytes=self.data.numel(),
            q=q.data_ptr(),
            scale=scale.data_ptr(),
            zero=0 if zero is None else zero.data_ptr(),
        )
        return QTensor(q, scale, zero, self.scheme)


def compiled() -> Any:
    """The compiled module, for what is built on it; None without one, or where plain torch was chosen."""
    return None if current_isa() == REFERENCE else _core


def layout_version() -> int:
    """Version of the packed layout; packed bytes of another one cannot be read. 0 without the compiled module."""
    return int(_core.LAYOUT_VERSION) if _core else 0


def packed_bytes(n: int, k: int, scheme: QuantScheme) -> int:
    """Bytes of a matrix [n, k] in the compiled kernels' layout."""
    return int(_layout(n, k, scheme).nbytes)


def layout(w: PackedWeight) -> _core.Layout:
    """The compiled description of a packed matrix, as the compiled decoder takes it."""
    return _layout(w.n, w.k, w.scheme)


def pack(t: QTensor) -> PackedWeight:
    """The packed form of ``t`` for the kernel set in use; ``t`` is left alone.

    Raises ValueError when a code does not fit the scheme's bits.
    """
    n, k = t.shape
    if current_isa() == REFERENCE:
        return PackedWeight(n, k, t.scheme, t)
    if t.q.numel() and int(t.q.max()) >= t.scheme.levels:
        raise ValueError(f"code {int(t.q.max())} does not fit {t.scheme.bits} bits (largest: {t.scheme.levels - 1})")
    layout = _layout(n, k, t.scheme)
    # Held here by name, so that the copies live as long as the call that gets their addresses.
    q, scale, zero = t.q.contiguous(), t.scale.contiguous(), None if t.zero is None else t.zero.contiguous()
    data = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.pack(
        q=q.data_ptr(), scale=scale.data_ptr(), zero=0 if zero is None else zero.data_ptr(), out=data.data_ptr()
    )
    return PackedWeight(n, k, t.scheme, data)


def qgemm(x: Tensor, w: PackedWeight, *, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """x @ W^T (+ bias).

    Args:
        x: f32[M, K] on the CPU; copied first if not contiguous. No gradient flows through.
        w: packed matrix [N, K].
        bias: f32[N] or None.
        activation_bits: 8: x is quantized to int8 per row and group (of at most 64 columns),
            integers are summed exactly; a row with a NaN or an infinity gives NaN. 16: x stays f32 against dequantized
            weights (slow, for checking).

    Returns:
        f32[M, N], a new tensor.

    Raises:
        TypeError: x or bias is not f32.
        ValueError: shapes that do not fit, or a packed weight whose header disagrees.
    """
    _check_f32("x", x)
    if x.dim() != 2 or x.shape[1] != w.k:
        raise ValueError(f"x has shape {tuple(x.shape)}; a packed {w.n} x {w.k} matrix needs [M, {w.k}]")
    if bias is not None:
        _check_f32("bias", bias)
        if tuple(bias.shape) != (w.n,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; a packed {w.n} x {w.k} matrix needs ({w.n},)")
    if activation_bits != 8:
        return _qgemm_float(x, w, bias, activation_bits)
    if isinstance(w.data, QTensor) or current_isa() == REFERENCE:
        return reference.qgemm(x.detach(), w.unpack(), bias=bias)
    follow_torch()
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty(x.shape[0], w.n)
    _layout(w.n, w.k, w.scheme).qgemm(
        data=w.data.data_ptr(),
        nbytes=w.data.numel(),
        x=x.data_ptr(),
        m=x.shape[0],
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
    )
    return out


def _qgemm_float(x: Tensor, w: PackedWeight, bias: Tensor | None, activation_bits: int) -> Tensor:
    one_of("activation_bits", activation_bits, reference.ACTIVATION_BITS)
    blocks = torch.arange(w.n).split(_ROWS_AT_A_TIME)
    out = torch.cat([x.detach() @ take_rows(w, rows).T for rows in blocks], dim=1)
    return out if bias is None else out + bias


def take_rows(w: PackedWeight, ids: Tensor) -> Tensor:
    """Dequantized rows, as an embedding looks them up: ids i64[T] -> f32[T, K].

    Raises:
        TypeError: ids are not i64.
        ValueError: ids are not one-dimensional.
        IndexError: an id is not a row of the matrix.
    """
    if ids.dtype != torch.int64 or not ids.is_cpu:
        raise TypeError(f"ids are {ids.dtype} on {ids.device}; expected torch.int64 on the CPU")
    if ids.dim() != 1:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; expected one dimension (call ids.flatten())")
    if isinstance(w.data, QTensor) or current_isa() == REFERENCE:
        _check_ids(ids, w.n)
        return reference.take_rows(w.unpack(), ids)
    ids = ids.contiguous()
    out = torch.empty(ids.numel(), w.k)
    _layout(w.n, w.k, w.scheme).take_rows(
        data=w.data.data_ptr(), nbytes=w.data.numel(), ids=ids.data_ptr(), count=ids.numel(), out=out.data_ptr()
    )
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_bits: int = 16,
    v_bits: int = 16,
    key_scales: str = "token",
    sinks: int = 0,
    recent: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the last T of L tokens, over keys and values stored as the decoder stores them.

    Args:
        q: f32[T, H, D], already scaled.
        k, v: f32[L, H_kv, D], L >= T; H is a multiple of H_kv.
        k_bits, v_bits: 32, 16, 8, 4 or 2.
        key_scales: of keys of fewer than 8 bits: of a part of a ``token``, or of a column over 64 tokens (``channel``);
            then the tokens that do not fill such a page yet are seen in 16 bits.
        sinks, recent: tokens that are seen in 16 bits where keys or values have fewer than 8 (reference.near).
        window: tokens that a token sees, itself included; 0: all.
        softcap: of the scores; 0: none.

    Returns:
        f32[T, H, D].

    Raises:
        TypeError: q, k or v is not f32.
        ValueError: shapes that do not fit, or unknown bits or key_scales.
    """
    one_of("key_scales", key_scales, KEY_SCALES)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_f32(name, x)
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or q.shape[1] % k.shape[1] or not 0 < q.shape[0] <= k.shape[0]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have shapes {shapes}; attention needs [T, H, D] and twice [L, H_kv, D], L >= T")
    if current_isa() == REFERENCE:
        bits = {"k_bits": k_bits, "v_bits": v_bits, "sinks": sinks, "recent": recent}
        return reference.attend(q, k, v, **bits, key_scales=key_scales, window=window, softcap=softcap)
    follow_torch()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    _core.attend(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        count=q.shape[0],
        length=k.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        bits=(k_bits, v_bits),
        by_column=key_scales == "channel",
        sinks=sinks,
        recent=recent,
        window=window,
        softcap=softcap,
        out=out.data_ptr(),
    )
    return out


def _check_f32(name: str, x: Tensor) -> None:
    if x.dtype != torch.float32 or not x.is_cpu:
        raise TypeError(
            f"{name} is {x.dtype} on {x.device}; the kernels take torch.float32 on the CPU (call {name}.float())"
        )


def _check_ids(ids: Tensor, rows: int) -> None:
    bad = ((ids < 0) | (ids >= rows)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise IndexError(f"row id {int(ids[at])} at position {at} is not a row of a matrix with {rows} rows")
