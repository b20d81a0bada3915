"""Bits chosen for a budget: errors against attention by hand, the greedy choice against a search, the limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq import KVCacheConfig, QuantizedKVCache
from llmq.kv_budget import LADDER, choose, measure, parse_bytes

Tiny = Callable[..., Path]
BASE = KVCacheConfig(sinks=2, recent=0)


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tiny_model: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(request.param)).eval()


def text(n: int = 150) -> torch.Tensor:
    return torch.randint(10, 384, (n,), generator=torch.Generator().manual_seed(0))


def test_the_model_is_as_before(model: Any) -> None:
    before = model(text()[None]).logits
    name = model.config._attn_implementation
    measure(model, text(), 100, BASE)
    assert model.config._attn_implementation == name
    assert torch.equal(model(text()[None]).logits, before)


def test_fewer_bits_cost_more(model: Any) -> None:
    costs = measure(model, text(), 300, BASE)
    assert [c.index for c in costs] == [0, 1]
    for c in costs:
        for part in (0, 1):
            errors, sizes = ([d[part, b] for b in LADDER] for d in (c.error, c.nbytes))
            assert errors[0] > errors[1] > errors[2] > 0
            assert sizes == sorted(sizes)


def test_the_first_layers_value_error_is_that_of_attention_by_hand(tiny_model: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager").eval()
    ids, seen = text(), []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        model(ids[None])
        config = KVCacheConfig(16, 4, sinks=2, recent=0)
        store = QuantizedKVCache(config, model.config).layers[0].value_storage
        weights = model(ids[None], output_attentions=True).attentions[0]
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[None]))
        v = attention.v_proj(hidden).view(1, len(ids), 2, 12).transpose(1, 2)
    coded = torch.cat([v[:, :, :2].half().float(), store.dequantize(store.quantize(v[:, :, 2:]))], dim=2)
    outs = [(weights @ x.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2) for x in (v, coded)]
    torch.testing.assert_close(outs[0], seen[0], atol=1e-5, rtol=0)
    expected = float((outs[1] - outs[0]).square().sum() / outs[0].square().sum())
    assert measure(model, ids, 100, BASE)[0].error[1, 4] == pytest.approx(expected, rel=1e-2)


def test_what_is_chosen_fits_and_is_measured_true(model: Any) -> None:
    context = 400
    smallest = choose(model, text(), 10**9, context, BASE).layers
    low = sum(min(c.nbytes[part, b] for b in LADDER) for c in smallest for part in (0, 1))
    high = sum(max(c.nbytes[part, b] for b in LADDER) for c in smallest for part in (0, 1))
    for budget in (low, (low + high) // 2, high):
        choice = choose(model, text(), budget, context, BASE)
        assert choice.nbytes <= budget
        cache = QuantizedKVCache(choice.config, model.config)
        with torch.no_grad():
            model(text(context)[None], past_key_values=cache)
        assert cache.nbytes == choice.nbytes
        assert f"{context} tokens: {choice.nbytes / 1e6:.2f} MB" in choice.table()
    assert set(choose(model, text(), low, context, BASE).config.layers) == {"k2v2"}
    assert set(choose(model, text(), high, context, BASE).config.layers) == {"k8v8"}


def test_the_choice_is_near_the_best_of_all(model: Any) -> None:
    context = 400
    layers = measure(model, text(), context, BASE)
    parts = [(c, part) for c in layers for part in (0, 1)]
    ways = list(itertools.product(LADDER, repeat=len(parts)))
    sizes = [sum(c.nbytes[p, b] for (c, p), b in zip(parts, way, strict=True)) for way in ways]
    errors = [sum(c.error[p, b] for (c, p), b in zip(parts, way, strict=True)) for way in ways]
    budget = (min(sizes) + max(sizes)) // 2
    choice = choose(model, text(), budget, context, BASE)
    got = sum(c.error[p, b] for c, bits in zip(choice.layers, choice.bits, strict=True) for p, b in enumerate(bits))
    best = min(e for e, s in zip(errors, sizes, strict=True) if s <= budget)
    median = sorted(e for e, s in zip(errors, sizes, strict=True) if s <= budget)[len(ways) // 4]
    assert best <= got < median


def test_a_budget_that_2_bits_do_not_fit(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"400 tokens takes \d\.\d\d MB at 2 bits, the least there is, and the budget is 0\.00 MB"
    ):
        choose(model, text(), 1000, 400, BASE)


@pytest.mark.parametrize(
    ("given", "size"), [("200M", 200_000_000), ("1.5g", 1_500_000_000), ("64KB", 64_000), ("7", 7)]
)
def test_sizes(given: str, size: int) -> None:
    assert parse_bytes(given) == size


@pytest.mark.parametrize("given", ["", "0", "M", "2T", "-1M"])
def test_sizes_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match="no size of a cache"):
        parse_bytes(given)
