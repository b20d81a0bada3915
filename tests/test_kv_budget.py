"""Bits chosen for a budget: errors against attention by hand, the greedy choice against a search, the limits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq import (
    CalibConfig,
    KVCacheConfig,
    QuantizedKVCache,
    QuantScheme,
    RuntimeConfig,
    kv_budget,
    quantize_model,
    set_kv_cache,
)
from llmq.checkpoint import REPORT_NAME
from llmq.kv_budget import LADDER, Choice, measure, of_model, of_source
from llmq.models.load import open_model
from llmq.quantize import main

Tiny = Callable[..., Path]
BASE = KVCacheConfig(sinks=2, recent=0)
PAIRS = list(itertools.product(LADDER, LADDER))


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tiny_model: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model(request.param)).eval()


def text(n: int = 150) -> torch.Tensor:
    return torch.randint(10, 384, (n,), generator=torch.Generator().manual_seed(0))


def choose(model: Any, tokens: torch.Tensor, budget: int, context: int, base: KVCacheConfig) -> Choice:
    return of_model(model, tokens, context, base).within(budget)


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
            errors = [c.error[part, b] for b in LADDER]
            sizes = [c.nbytes[(b, 4) if part == 0 else (4, b)] for b in LADDER]
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
    low, high = (sum(least(c.nbytes[pair] for pair in PAIRS) for c in smallest) for least in (min, max))
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
    ways = list(itertools.product(PAIRS, repeat=len(layers)))
    sizes = [sum(c.nbytes[pair] for c, pair in zip(layers, way, strict=True)) for way in ways]
    errors = [sum(c.error[0, k] + c.error[1, v] for c, (k, v) in zip(layers, way, strict=True)) for way in ways]
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


# Without a budget


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_block_by_block_the_errors_are_those_of_the_whole_model(
    tiny_model: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    monkeypatch.setattr(kv_budget, "probe_tokens", lambda _tokenizer, _most: text())
    costs = of_source(open_model(tiny_model(family)), 300, BASE).layers
    for ours, theirs in zip(costs, measure(whole, text(), 300, BASE), strict=True):
        assert (ours.index, ours.window) == (theirs.index, theirs.window)
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)


def test_layers_that_need_it_are_protected(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = of_model(model, text(), 400, BASE)
    errors = {(i, part): c.error[part, 4] for i, c in enumerate(subject.layers) for part in (0, 1)}
    worst = max(errors, key=lambda key: errors[key])
    between = sorted(errors.values())[-2:]
    monkeypatch.setattr(kv_budget, "MOST_ERROR", sum(between) / 2)
    choice = subject.auto()
    expected = [[4, 4], [4, 4]]
    expected[worst[0]][worst[1]] = 8
    assert [list(pair) for pair in choice.bits] == expected
    assert choice.protected == [f"{('keys', 'values')[worst[1]]} of layer {worst[0]} (8 bits)"]
    assert choice.table().endswith(f": {choice.protected[0]}")
    monkeypatch.setattr(kv_budget, "MOST_ERROR", 1.0)
    assert str(subject.auto().config) == "k4v4*2"
    assert subject.auto().table().endswith(": none")
    monkeypatch.setattr(kv_budget, "MOST_ERROR", 0.0)
    assert {b for pair in subject.auto().bits for b in pair} == {16}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_native_bytes_are_those_of_the_decoders_cache(tiny_model: Tiny, family: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(tiny_model(family), QuantScheme(group_size=32), method="rtn", calib=CalibConfig(), output=out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    subject = of_model(model, text(), 300, KVCacheConfig()).natively(model.config)
    choice = subject.within(sum(c.nbytes[4, 4] for c in subject.layers) + 1)
    with torch.no_grad(), use_kv(model, choice.config):
        cache = model(input_ids=text(300)[None], use_cache=True).past_key_values
    assert (
        cache.nbytes
        == choice.nbytes
        == sum(c.nbytes[pair] for c, pair in zip(subject.layers, choice.bits, strict=True))
    )


@contextmanager
def use_kv(model: Any, kv: KVCacheConfig) -> Iterator[None]:
    set_kv_cache(model, kv)
    yield
    set_kv_cache(model, None)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_checkpoint_holds_the_choice_and_runs_with_it(
    tiny_model: Tiny, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(tiny_model(family)), "--method", "rtn", "--group-size", "32"]
    assert main([*argv, "--output", str(tmp_path / "auto"), "--kv-bits", "auto"]) == 0
    assert "protected, 4 bits would cost more than 1 %: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "auto" / "config.json").read_text())["quantization_config"]
    chosen = json.loads((tmp_path / "auto" / REPORT_NAME).read_text())["kv_cache"]
    assert stored["kv_bits"] == chosen["bits"]
    assert "kv_budget" not in stored
    assert [row["layer"] for row in chosen["layers"]] == [0, 1]
    budget = chosen["bytes"] + 1000
    limits = ["--kv-budget", str(budget), "--kv-context", str(chosen["context"])]
    assert main([*argv, "--output", str(tmp_path / "budget"), *limits]) == 0
    chosen = json.loads((tmp_path / "budget" / REPORT_NAME).read_text())["kv_cache"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "budget")
    ids = torch.randint(10, 384, (1, chosen["context"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert str(cache.kv) == chosen["bits"]
    assert cache.nbytes == chosen["bytes"] <= budget


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_bits": "8,8,8"}, "--kv-bits 8,8,8 names 3 layers; the model has 2: name each once"),
        ({"kv_budget": "1K", "kv_context": 400}, "the least there is, and the budget is 0.00 MB"),
        ({"kv_budget": "1K", "kv_bits": "8"}, "--kv-bits 8 and --kv-budget 1K exclude each other"),
        ({"kv_budget": "much"}, "size 'much' is not of the form"),
        ({"kv_context": -1}, "kv-context is -1"),
        ({"kv_bits": "auto", "kv_context": 10**9}, r"kv-context is 1000000000; the model's context is \d+ tokens"),
        ({"kv_bits": "8*0,4"}, r"'8\*0' are not of the form"),
    ],
)
def test_wrong_wishes_end_before_the_work(tiny_model: Tiny, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=said):
        quantize_model(
            tiny_model("llama"), method="rtn", calib=CalibConfig(), runtime=RuntimeConfig(**options), output=out
        )
    assert list(tmp_path.iterdir()) == []
