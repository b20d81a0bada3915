"""Attention in pieces of queries is torch's, whatever the mask hides, and serves models with sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llmq import masked_attention
from llmq.masked_attention import PIECE, attend, seen_keys, takes
from llmq.products import fast_products

T = 2 * PIECE + 70


def masks() -> dict[str, Tensor]:
    i = torch.arange(T)
    causal = i[:, None] >= i[None]
    window = causal & (i[:, None] - i[None] < 60)
    sinks = window | (causal & (i[None] < 4))
    per_row = torch.stack([window, causal & (i[:, None] - i[None] < 90)])[:, None]
    return {"window": window[None, None], "causal": causal, "sinks": sinks[None], "two rows": per_row}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_it_is_torchs_attention(name: str, kv_heads: int) -> None:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, T, 48, generator=g)
    k, v = (torch.randn(2, kv_heads, T, 48, generator=g) for _ in range(2))
    options = {"scale": 0.3, "enable_gqa": kv_heads < 4, "dropout_p": 0.0}
    mask = masks()[name]
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, **options)
    actual = attend(q, k, v, mask, **options)
    # A convex combination of values; weights are off by the rounding of scores of up to |q||k| scale.
    scores = 0.3 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    limit = torch.finfo(torch.float32).eps * (scores + 8) * float(v.abs().max()) * 4
    assert (actual - exact).abs().max() <= limit
    assert (actual - 1.01 * exact).abs().max() > limit


def test_what_is_seen_of_each_piece() -> None:
    assert seen_keys(masks()["window"]) == [(0, PIECE), (PIECE - 59, 2 * PIECE), (2 * PIECE - 59, T)]
    assert seen_keys(torch.ones(1, 1, T, T, dtype=torch.bool)) is None
    nothing = masks()["window"].clone()
    nothing[..., :PIECE, :] = False
    assert seen_keys(nothing) is None


def test_what_is_left_to_torch() -> None:
    q, mask = torch.zeros(1, 1, T, 8), masks()["window"]
    assert takes(q, q, mask)
    assert not takes(q, q, None)
    assert not takes(q, q, mask.float())
    assert not takes(q[:, :, :PIECE], q, mask[..., :PIECE, :])
    learning = q.clone().requires_grad_()
    assert not takes(learning, q, mask)
    with torch.no_grad():
        assert takes(learning, q, mask)


@torch.no_grad()
def test_a_model_with_sliding_windows_takes_it(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3's sliding layers, not its full ones, where half of the products are hidden at most."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gemma3"), attn_implementation="sdpa").eval()
    model.config.max_position_embeddings = T
    ids, found = torch.randint(3, 300, (1, T), generator=torch.Generator().manual_seed(0)), []

    def seen(mask: Tensor) -> list[tuple[int, int]] | None:
        found.append(seen_keys(mask))
        return found[-1]

    monkeypatch.setattr(masked_attention, "seen_keys", seen)
    plain = model(input_ids=ids).logits
    assert found == []
    with fast_products():
        fast = model(input_ids=ids).logits
    assert any(ranges is not None for ranges in found)
    # The roundings of two blocks in fp32; a key more or less would change the second digit.
    assert (fast - plain).abs().max() <= 1e-4 * plain.abs().max()
