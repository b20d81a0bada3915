"""The kernels' operations in plain torch: the oracle of the compiled ones, and a backend (``LLMQ_ISA=reference``).

The compiled kernels give the same bits as these functions (but for add_low_rank): integer sums are exact in both, and
every float operation is rounded on its own, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.config import QuantScheme, one_of
from llmq.qtensor import QTensor

# int8 activations share a scale over at most this many columns; wider weight groups are cut into such pieces. With 128
# columns the activations cost W4 0.6 % of perplexity, with 64 0.1 %.
MAX_GROUP = 64
# A group whose largest magnitude is below this counts as zero: 127 / amax must stay finite.
TINY_GROUP = 2.0**-100
ACTIVATION_BITS = (8, 16)


def kernel_group(scheme: QuantScheme, in_features: int) -> int:
    """Columns over which the kernels sum integers before they scale, and over which activations share a scale."""
    return min(scheme.group_width(in_features), MAX_GROUP)


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
        # Exact in fp32: every partial sum is a whole number of at most 64 * 255 * 127 < 2**24.
        dots = q[:, a : a + group].float() @ codes.T
        out += dots * (t.scale[:, a // width].float() * scale[:, i, None])
    return out


def add_low_rank(out: Tensor, low: Tensor, bt: Tensor, scale: float) -> Tensor:
    """What an adapter adds to a product (LoRA, arXiv 2106.09685, section 4.1): ``out + scale * low @ bt``.

    Sums in fp32, whose order differs between kernel sets.

    Args:
        out: f32[M, N].
        low: f32[M, rank], A x.
        bt: [rank, N] of bf16, f16 or f32: B transposed.
    """
    return out + scale * (low @ bt.to(low.dtype))


def take_rows(t: QTensor, ids: Tensor) -> Tensor:
    """Dequantized rows ``ids`` i64[T] of ``t`` [N, K]: f32[T, K]."""
    zero = None if t.zero is None else t.zero[ids]
    return QTensor(t.q[ids], t.scale[ids], zero, t.scheme).dequantize()


# Columns of a head that share a scale in the key/value cache, by bits: of a key, of a value; and of a query.
KEY_GROUP = {8: 32, 4: 32, 2: 32}
VALUE_GROUP = {8: 128, 4: 64, 2: 32}
QUERY_GROUP = 32
KV_BLOCK = 16  # tokens that change together from 16 bits to codes
# Keys with scales by column: tokens that share one, and columns of a query, times these scales, that share another.
KV_PAGE = 64
COLUMN_GROUP = 64


def round_kv(x: Tensor, bits: int, groups: dict[int, int]) -> Tensor:
    """Keys or values f32[..., D] as the cache holds them: 32 bits as they are, 16 a float16, fewer codes.

    x ~ scale * (code - zero) for each token, head and group of columns: symmetric with scale amax / 127 at 8 bits, else
    from the least to the largest of the group and 0. The scale is a float16 and rounded before the codes are made.
    """
    if bits >= 16:
        return x if bits == 32 else x.half().float()
    parts = []
    for part in x.split(groups[bits], dim=-1):
        low, high = part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)
        top = 2**bits - 1
        reach, steps = (torch.maximum(high, -low), 127) if bits == 8 else (high - low, top)
        scale = (reach / torch.full_like(reach, steps)).half().float()  # a tensor: see quantize_rows
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        zero = torch.full_like(low, 128.0) if bits == 8 else (-low * inverse).round().clamp(0, top)
        codes = ((part * inverse).round() + zero).clamp(1 if bits == 8 else 0, top)
        parts.append((codes - zero) * scale)
    return torch.cat(parts, -1)


def hadamard(x: Tensor) -> Tensor:
    """x f32[..., D] times the normalized Hadamard matrix of the largest power of two that divides D, block by block."""
    size = x.shape[-1] & -x.shape[-1]
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    rotated: Tensor = blocks @ (matrix / size**0.5)
    return rotated.reshape(x.shape)


def near(count: int, length: int, sinks: int, recent: int, *, by_column: bool = False) -> Tensor:
    """bool[T, L]: which tokens the last T of L see in 16 bits: the first ``sinks`` and the last ``recent`` before each.

    Both are rounded up to whole blocks of ``KV_BLOCK`` tokens. With scales by column also those of the page that the
    token itself does not fill yet.
    """
    position = torch.arange(length - count, length)[:, None]
    first = (position + 1 - recent).clamp(min=0) // KV_BLOCK * KV_BLOCK
    if by_column:
        first = torch.minimum(first, (position + 1) // KV_PAGE * KV_PAGE)
    token = torch.arange(length)
    return (token >= first) | (token < _fixed(sinks))


def _fixed(sinks: int) -> int:
    return -(-sinks // KV_BLOCK) * KV_BLOCK


def key_columns(k: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys f32[n, H, D] of (the rest of) a page, with a scale and a zero a column: k ~ scale * (code - zero / steps).

    ``steps`` is 255 / (2**bits - 1), so that a byte says more of the zero than a whole number of codes would (KIVI,
    arXiv 2402.02750, section 3, has it as a float). The range of a column always holds 0.

    Returns:
        codes f32[n, H, D], whole numbers; scale f32[H, D], float16 values; zero f32[H, D], whole numbers up to 255.
    """
    top = 2**bits - 1
    low, high = k.amin(0).clamp(max=0), k.amax(0).clamp(min=0)
    scale = ((high - low) / torch.full_like(low, top)).half().float()  # a tensor: see quantize_rows
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    zero = (-low * inverse * (255 // top)).round().clamp(0, 255)
    codes = (k * inverse + zero / torch.full_like(zero, 255 // top)).round().clamp(0, top)
    return codes, scale, zero


def page_scores(q: Tensor, k: Tensor, bits: int) -> Tensor:
    """Scores f32[H, T, n] of queries f32[T, H, D] and keys f32[n, H_kv, D] of one page, keys as :func:`key_columns`.

    The scales go into the query, which then becomes int8 in groups of ``COLUMN_GROUP`` columns; with s = q * scale a
    score is the sum of s * code, less that of s * zero / steps, the same for all tokens of the page.
    """
    heads = q.shape[1] // k.shape[1]
    codes, scale, zero = (x.repeat_interleave(heads, -2) for x in key_columns(k, bits))
    scaled = (q * scale).flatten(0, 1)
    rounded, step, _ = quantize_rows(scaled, COLUMN_GROUP)
    s = (rounded.float() * step.repeat_interleave(COLUMN_GROUP, 1)[:, : q.shape[2]]).view(q.shape)
    return torch.einsum("thd,nhd->htn", s, codes - zero / (255 // (2**bits - 1)))


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    k_bits: int,
    by_column: bool = False,
    sinks: int = 0,
    seen_near: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """f32[H, T, L]: how much of each token goes into each row; arguments as in :func:`attend`, and :func:`near`."""
    (count, heads, dim), (length, kv_heads, _) = q.shape, k.shape

    def scores(q: Tensor, bits: int) -> Tensor:
        keys = round_kv(k, bits, KEY_GROUP).repeat_interleave(heads // kv_heads, 1)
        return torch.einsum("thd,lhd->htl", q, keys)

    if k_bits >= 16:
        s = scores(q, k_bits)
    elif by_column:
        # From the numbers that were held in 16 bits; what no query sees as codes is 0.
        s = torch.zeros(heads, count, length, dtype=q.dtype)
        for page in range(0, length - KV_PAGE + 1, KV_PAGE):
            at = slice(max(page, _fixed(sinks)), page + KV_PAGE)
            if at.start < at.stop:
                s[..., at] = page_scores(q, k[at].half().float(), k_bits)
    else:
        codes, scale, _ = quantize_rows(q.reshape(-1, dim), QUERY_GROUP)
        rounded = (codes.float() * scale.repeat_interleave(QUERY_GROUP, 1)[:, :dim]).view(q.shape)
        s = scores(rounded, k_bits)
    if seen_near is not None:
        s = torch.where(seen_near, scores(q, 16), s)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & ((distance < window) if window else True)
    return s.masked_fill(~seen, -torch.inf).softmax(-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_bits: int,
    v_bits: int,
    key_scales: str = "token",
    sinks: int = 0,
    recent: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the last T of L tokens over all up to themselves.

    Args:
        q: f32[T, H, D], already scaled.
        k, v: f32[L, H_kv, D]; H is a multiple of H_kv, neighbouring query heads share one.
        k_bits, v_bits: how keys and values are cached (:func:`round_kv`); queries meet keys that are codes as int8.
        key_scales: ``channel``: keys of fewer than 8 bits have a scale a column (:func:`key_columns`).
        sinks, recent: tokens that are seen in 16 bits where either has fewer than 8 (:func:`near`).
        window: tokens that a token sees, itself included; 0: all.
        softcap: of the scores; 0: none.

    Returns:
        f32[T, H, D].
    """
    by_column, seen_near = key_scales == "channel" and k_bits < 8, None
    if by_column or (min(k_bits, v_bits) < 8 and sinks + recent):
        seen_near = near(len(q), len(k), sinks, recent, by_column=by_column)
    weights = attention_weights(
        q, k, k_bits=k_bits, by_column=by_column, sinks=sinks, seen_near=seen_near, window=window, softcap=softcap
    )

    def summed(weights: Tensor, bits: int) -> Tensor:
        held = v.half().float() if by_column else v
        values = round_kv(held, bits, VALUE_GROUP).repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("htl,lhd->thd", weights, values)

    if seen_near is None:
        return summed(weights, v_bits)
    return summed(weights * seen_near, 16) + summed(weights * ~seen_near, v_bits)


LOGIT_BLOCK = 256  # logits that the sampler looks at together


def block_max(x: Tensor) -> Tensor:
    """The largest of each ``LOGIT_BLOCK`` of x f32[V], NaN where a block holds a NaN: f32[ceil(V / LOGIT_BLOCK)]."""
    return torch.stack([block.max() for block in x.split(LOGIT_BLOCK)])


def exp_sum(x: Tensor, shift: float, scale: float) -> tuple[Tensor, float]:
    """exp((x - shift) * scale) of x f32[n], x <= shift, and their sum; the compiled ones are 0 below exp(-88)."""
    e = torch.exp((x - shift) * scale)
    return e, float(e.sum())
