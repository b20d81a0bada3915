"""``forward`` of adopted models and their cache, against the same modules in the Hugging Face graph.

Float activations on both sides; logits of standard deviation 2.5 are then equal up to fp32 rounding through two blocks:
a few units of 2^-24 times the largest intermediate values, 1e-4 with room.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from llmq import AutoModelForCausalLM, CalibConfig, QuantScheme, quantize_model, set_activation_bits
from llmq.runtime import options
from llmq.runtime.cache import NativeCache
from llmq.runtime.causal_lm import graph_class

pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")

CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Any:
    """Shared: do not change it."""
    out = tmp_path_factory.mktemp("forward") / "gemma3"
    calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    quantize_model(tiny_model("gemma3"), QuantScheme(4, 32), method="rtn", output=out, calib=calib)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    set_activation_bits(model, 16)
    return model


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(options, "_said", set())
    caplog.set_level(logging.WARNING, "llmq")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("llmq")]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def graph(model: Any) -> Any:
    made = copy.copy(model)
    made.__class__ = graph_class(model)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(11))


def test_logits_and_loss_are_the_graphs(model, said):
    ids = tokens(3, 15)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    found, expected = model(ids, labels=labels), graph(model)(ids, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert isinstance(found.past_key_values, NativeCache)
    assert model(ids, use_cache=False).past_key_values is None
    loss, logits = model(ids, labels=labels, return_dict=False, use_cache=False)
    assert torch.equal(loss, found.loss)
    assert torch.equal(logits, found.logits)
    assert said() == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(model, side, said):
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.int64)
    for row, n in enumerate((0, 5, 11)):
        mask[row, :n] = 0
    if side == "right":
        mask = mask.flip(1)
    found, expected = model(ids, attention_mask=mask).logits, graph(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], **CLOSE)
    assert (found[mask == 0] == 0).all()
    for kind in (torch.bool, torch.float32):
        assert torch.equal(model(ids, attention_mask=mask.to(kind)).logits, found)
    assert said() == []


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 9])])
def test_logits_to_keep(model, keep):
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :2] = 0
    found = model(ids, attention_mask=mask, logits_to_keep=keep).logits
    whole = model(ids, attention_mask=mask).logits
    expected = whole[:, keep] if isinstance(keep, Tensor) else whole[:, -keep:]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_cache_goes_on_where_it_stopped(model, said):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask).logits
    for given in (False, True):
        cache, parts = NativeCache(), []
        for a, b in ((0, 9), (9, 10), (10, 26), (26, 30)):
            extra = {"position_ids": positions[:, a:b]} if given else {}
            parts.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, **extra).logits)
            assert cache.get_seq_length() == b
        assert [s.length for s in cache.sequences] == [30, 26]
        torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], **CLOSE)
    assert said() == []


def test_cache_operations_move_whole_rows(model):
    ids, next_ids = tokens(3, 20), tokens(3, 1)
    ids[:, 0] = torch.tensor([5, 6, 7])

    def then(cache: NativeCache, rows: Tensor) -> Tensor:
        return model(rows, past_key_values=cache).logits[:, -1]

    def fresh() -> NativeCache:
        return model(ids).past_key_values

    expected = then(fresh(), next_ids)
    cache = fresh()
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(then(cache, next_ids[[2, 0, 2]]), expected[[2, 0, 2]], **CLOSE)
    cache = fresh()
    cache.batch_select_indices(torch.tensor([False, True, True]))
    torch.testing.assert_close(then(cache, next_ids[1:]), expected[1:], **CLOSE)
    cache = fresh()
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    torch.testing.assert_close(then(cache, next_ids.repeat_interleave(2, 0)), expected.repeat_interleave(2, 0), **CLOSE)
    cache = fresh()
    copied = copy.deepcopy(cache)
    cache.crop(-8)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (12, 20)
    model(ids[:, 12:], past_key_values=cache)
    torch.testing.assert_close(then(cache, next_ids), expected, **CLOSE)
    torch.testing.assert_close(then(copied, next_ids), expected, **CLOSE)
    with pytest.raises(ValueError, match="cannot remove 22 columns from a cache of 21"):
        cache.crop(-22)
    cache.reset()
    torch.testing.assert_close(then(cache, ids), model(ids).logits[:, -1], **CLOSE)


def test_cropping_counts_columns_of_padded_rows(model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    assert [s.length for s in cache.sequences] == [8, 12]
    cache.crop(-6)
    assert [s.length for s in cache.sequences] == [6, 6]


def test_position_ids_may_start_anywhere_but_not_jump(model, said):
    ids = tokens(1, 10)
    expected = model(ids).logits
    shifted = torch.arange(10)[None] + 40
    torch.testing.assert_close(
        model(ids, position_ids=shifted).logits, graph(model)(ids, position_ids=shifted).logits, **CLOSE
    )
    torch.testing.assert_close(model(ids, position_ids=shifted).logits, expected, **CLOSE)
    assert said() == []
    jumping = torch.arange(10)[None] * 2
    found = model(ids, position_ids=jumping)
    assert torch.equal(found.logits, graph(model)(ids, position_ids=jumping).logits)
    assert isinstance(found.past_key_values, DynamicCache)
    assert "position_ids do not count the tokens one by one" in said()[0]
    cache = model(ids, position_ids=shifted).past_key_values
    with pytest.raises(ValueError, match="position_ids do not continue those of the tokens in past_key_values"):
        model(ids, position_ids=torch.arange(10)[None], past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.ones(2, 6, 80)}, "inputs_embeds"),
        ({"attention_mask": torch.zeros(2, 1, 6, 6)}, "not a [batch, length] mask"),
    ],
)
def test_the_graph_does_what_the_decoder_cannot(model, said, arguments, named):
    ids = {} if "inputs_embeds" in arguments else {"input_ids": tokens(2, 6)}
    for _ in range(2):
        found, expected = model(**ids, **arguments), graph(model)(**ids, **arguments)
        assert torch.equal(found.logits, expected.logits)
    assert len(said()) == 1
    assert named in said()[0]


def test_a_cache_of_transformers_own_is_filled(model, said):
    ids, cache = tokens(1, 9), DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    found = model(ids[:, 5:], past_key_values=cache).logits
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(found, model(ids).logits[:, 5:], **CLOSE)
    assert "past_key_values of class DynamicCache" in said()[0]


def test_a_native_cache_cannot_go_on_in_the_graph(model):
    cache = model(tokens(1, 5)).past_key_values
    with pytest.raises(ValueError, match="cannot continue from what the native decoder has cached"):
        model(tokens(1, 1), past_key_values=cache, output_hidden_states=True)
    with pytest.raises(TypeError, match="the Hugging Face graph needs a DynamicCache"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_hooks_and_training_run_the_graph(model, said):
    seen: list[int] = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    model(tokens(1, 5))
    model.generate(tokens(1, 5), max_new_tokens=2)
    handle.remove()
    assert len(seen) == 3
    assert "model.layers.1 has a forward hook" in said()[0]
    with torch.enable_grad():
        model.train()
        try:
            # None in transformers 4
            assert not isinstance(model(tokens(1, 5)).past_key_values, NativeCache)
        finally:
            model.eval()
        assert isinstance(model(tokens(1, 5)).past_key_values, NativeCache)


def test_shapes_that_do_not_fit_are_errors(model):
    cache = model(tokens(2, 5)).past_key_values
    with pytest.raises(ValueError, match="the batch has 3 rows, past_key_values holds 2"):
        model(tokens(3, 1), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \(2, 1\); 2 rows of 1 tokens after 5 .* need \(2, 6\)"
    ):
        model(tokens(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 1))
    hiding = torch.ones(2, 6, dtype=torch.int64)
    hiding[0, 0] = 0
    with pytest.raises(
        ValueError, match="attention_mask hides other tokens among the first 5 than when they were cached"
    ):
        model(tokens(2, 1), past_key_values=cache, attention_mask=hiding)
    for bad in (384, -1):
        with pytest.raises(ValueError, match=f"token id {bad}"):
            model(torch.tensor([[5, bad]]))
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="513"):
        model(tokens(1, 513))
