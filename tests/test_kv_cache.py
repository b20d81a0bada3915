"""The quantized key/value cache as ``generate`` and ``forward`` of adopted models use it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmq
from llmq import AutoModelForCausalLM, CalibConfig, KVCacheConfig, QuantScheme, quantize_model
from llmq.runtime import options
from llmq.runtime.causal_lm import kv_config

pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "gemma3"
    calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    return quantize_model(tiny_model("gemma3"), QuantScheme(4, 32), method="rtn", output=out, calib=calib).folder


@pytest.fixture
def model(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(options, "_said", set())
    caplog.set_level(logging.WARNING, "llmq")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("llmq")]


def ids_of(rows: int, columns: int) -> Tensor:
    return torch.randint(3, 384, (rows, columns), generator=torch.Generator().manual_seed(2))


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    fixed = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **{**fixed, "attention_mask": torch.ones_like(ids), **options})


def test_generate_takes_the_bits_of_one_call(model, said) -> None:
    ids = ids_of(2, 80)
    plain = generate(model, ids, return_dict_in_generate=True)
    rounded = generate(model, ids, return_dict_in_generate=True, kv_cache="8")
    named = generate(model, ids, return_dict_in_generate=True, kv_cache=KVCacheConfig(8, 8))
    assert torch.equal(rounded.sequences, named.sequences)
    assert str(rounded.past_key_values.kv) == "8"
    assert rounded.past_key_values.nbytes < plain.past_key_values.nbytes
    assert generate(model, ids, return_dict_in_generate=True).past_key_values.kv is None
    assert said() == []


def test_the_model_remembers_what_it_was_told(model) -> None:
    ids = ids_of(1, 30)
    once = generate(model, ids, kv_cache="8")
    plain = model(input_ids=ids).logits
    llmq.set_kv_cache(model, "8")
    assert torch.equal(generate(model, ids), once)
    out = model(input_ids=ids)
    assert str(out.past_key_values.kv) == "8"
    assert not torch.equal(out.logits, plain)
    begun = model(input_ids=ids[:, :20]).past_key_values
    assert torch.equal(model(input_ids=ids[:, 20:], past_key_values=begun).logits, out.logits[:, 20:])
    assert str(copy.deepcopy(out.past_key_values).kv) == "8"
    llmq.set_kv_cache(model, None)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_padded_batch_and_several_sequences_are_their_rows_one_by_one(model) -> None:
    long, short = ids_of(1, 40), ids_of(1, 25)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 15, dtype=torch.int64), short], 1)])
    mask = (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    both = generate(model, ids, attention_mask=mask, kv_cache="8")
    assert torch.equal(both[0], generate(model, long, kv_cache="8")[0])
    assert torch.equal(both[1, 15:], generate(model, short, kv_cache="8")[0])
    several = generate(model, long, num_return_sequences=2, do_sample=True, kv_cache="8")
    assert torch.equal(several[:, :40], long.expand(2, -1))


def test_prompt_lookup_gives_the_plain_tokens(model) -> None:
    ids = ids_of(1, 10).repeat(1, 8)
    plain = generate(model, ids, max_new_tokens=60, kv_cache="8")
    assert torch.equal(generate(model, ids, max_new_tokens=60, kv_cache="8", prompt_lookup_num_tokens=5), plain)


def test_a_checkpoint_carries_its_default(folder, tmp_path) -> None:
    other = tmp_path / "with-default"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["kv_bits"] = "k8v16"
    (other / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(other)
    assert str(kv_config(model)) == "k8v16"
    assert str(model(input_ids=ids_of(1, 4)).past_key_values.kv) == "k8v16"
    llmq.set_kv_cache(model, "16")
    assert str(model(input_ids=ids_of(1, 4)).past_key_values.kv) == "16"


def test_a_crop_beyond_what_sliding_layers_hold_leaves_the_cache_alone(model) -> None:
    ids = ids_of(2, 450)
    past = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match=r"row 0 of 450 tokens cannot be cropped to 50"):
        past.crop(-400)
    assert past.get_seq_length() == 450
    past.crop(-20)
    again = model(input_ids=ids[:, 430:], past_key_values=past).logits
    assert torch.equal(again, model(input_ids=ids).logits[:, 430:])


def test_bad_bits_and_a_cache_beside_them_are_errors(model) -> None:
    ids = ids_of(1, 4)
    with pytest.raises(ValueError, match=r"kv bits is 5; known: 16, 8"):
        generate(model, ids, kv_cache="5")
    with pytest.raises(ValueError, match=r"'eight' are not of the form"):
        llmq.set_kv_cache(model, "eight")
    past = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match=r"kv_cache='8' stands beside past_key_values"):
        generate(model, ids_of(1, 6), kv_cache="8", past_key_values=past)


def test_the_graph_says_that_it_caches_in_16_bits(tiny_model, said) -> None:
    model = llmq.runtime.causal_lm.adopt(AutoModelForCausalLM.from_pretrained(tiny_model("gpt_neox")).eval())
    generate(model, ids_of(1, 8), kv_cache="8")
    assert any("caches keys and values in 16 bits instead of 8" in message for message in said())
