"""The kernels' operations in plain torch: the oracle of the compiled ones, and a backend (``LLMQ_ISA=reference``).

The compiled kernels give the same bits as these functions: integer sums are exact in both, and every float operation is
rounded on its own, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme, one_of
from llmq.qtensor import QTensor

# int8 activations share a scale over at most this many columns, by bits of a code; wider weight groups are cut into
# such pieces. 8-bit weights are chosen for fidelity: with 128 the activations would cost more than they.
MAX_GROUP = {2: 128, 3: 128, 4: 128, 8: 32}
# A group whose largest magnitude is below this counts as zero: 127 / amax must stay finite.
TINY_GROUP = 2.0**-100
ACTIVATION_BITS = (8, 16)


def kernel_group(scheme: QuantScheme, in_features: int) -> int:
    """Columns over which the kernels sum integers before they scale, and over which activations share a scale."""
    return min(scheme.group_width(in_features), MAX_GROUP[scheme.bits])


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric int8 activations per row and group: x ~ scale * q.

    Args:
        x: f32[M, K].
        group: columns of a group; the last one may be shorter.

    Returns:
        q i8[M, K] in -127..127; scale f32[M, G], NaN for a group that holds a NaN or an infinity; sum of q i32[M, G].
    """
    q, scales, totals = torch.empty(x.shape, dtype=torch.int8), [], []
    for a in range(0, x.shape[1], group):
        part = x[:, a : a + group]
        amax = part.abs().amax(dim=1)
        top = torch.full_like(amax, 127.0)  # a tensor: 127 / amax would be 127 * (1 / amax), rounded twice
        usable = amax.isfinite() & (amax >= TINY_GROUP)
        inverse = torch.where(usable, top / amax, 0.0)
        codes = (torch.where(usable[:, None], part, 0.0) * inverse[:, None]).round_().clamp_(-127, 127)
        q[:, a : a + group] = codes.to(torch.int8)
        scales.append(torch.where(usable, amax / top, torch.where(amax.isfinite(), 0.0, torch.nan)))
        totals.append(codes.sum(dim=1).to(torch.int32))
    return q, torch.stack(scales, 1), torch.stack(totals, 1)


def qgemm(x: Tensor, t: QTensor, *, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """x @ W^T (+ bias), W the dequantized matrix.

    Args:
        x: f32[M, K].
        t: quantized matrix [N, K].
        bias: f32[N] or None.
        activation_bits: 8 quantizes x per row and kernel group; 16 keeps it in floating point.

    Returns:
        f32[M, N].
    """
    one_of("activation_bits", activation_bits, ACTIVATION_BITS)
    out = x @ t.dequantize().T if activation_bits == 16 else _qgemm_int8(x, t)
    return out if bias is None else out + bias


def _qgemm_int8(x: Tensor, t: QTensor) -> Tensor:
    (n, k), width = t.shape, t.scheme.group_width(t.shape[1])
    group = kernel_group(t.scheme, k)
    q, scale, _ = quantize_rows(x, group)
    out = torch.zeros(x.shape[0], n)
    for i, a in enumerate(range(0, k, group)):
        zero = t.scheme.mid if t.zero is None else t.zero[:, a // width, None].float()
        codes = t.q[:, a : a + group].float() - zero
        # Exact in fp32: every partial sum is a whole number of at most 128 * 255 * 127 < 2**24.
        dots = q[:, a : a + group].float() @ codes.T
        out += dots * (t.scale[:, a // width].float() * scale[:, i, None])
    return out


def take_rows(t: QTensor, ids: Tensor) -> Tensor:
    """Dequantized rows ``ids`` i64[T] of ``t`` [N, K]: f32[T, K]."""
    zero = None if t.zero is None else t.zero[ids]
    return QTensor(t.q[ids], t.scale[ids], zero, t.scheme).dequantize()


LOGIT_BLOCK = 256  # logits that the sampler looks at together


def block_max(x: Tensor) -> Tensor:
    """The largest of each ``LOGIT_BLOCK`` of x f32[V], NaN where a block holds a NaN: f32[ceil(V / LOGIT_BLOCK)]."""
    return torch.stack([block.max() for block in x.split(LOGIT_BLOCK)])


def exp_sum(x: Tensor, shift: float, scale: float) -> tuple[Tensor, float]:
    """exp((x - shift) * scale) of x f32[n], x <= shift, and their sum; the compiled ones are 0 below exp(-88)."""
    e = torch.exp((x - shift) * scale)
    return e, float(e.sum())
