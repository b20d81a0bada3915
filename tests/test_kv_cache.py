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


def with_default(folder: Path, out: Path, kv_bits: Any) -> Path:
    """A copy of ``folder`` whose default are ``kv_bits``."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_bits"] = kv_bits
    (out / "config.json").write_text(json.dumps(config))
    return out


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
    model = AutoModelForCausalLM.from_pretrained(with_default(folder, tmp_path / "a", "k8v16"))
    assert str(kv_config(model)) == "k8v16"
    assert str(model(input_ids=ids_of(1, 4)).past_key_values.kv) == "k8v16"
    llmq.set_kv_cache(model, "16")
    assert str(model(input_ids=ids_of(1, 4)).past_key_values.kv) == "16"
    model = AutoModelForCausalLM.from_pretrained(with_default(folder, tmp_path / "b", 8))
    assert str(kv_config(model)) == "8"
    with pytest.raises(ValueError, match=r"kv bits '9 or so' are not of the form"):
        AutoModelForCausalLM.from_pretrained(with_default(folder, tmp_path / "c", "9 or so"))


def test_a_crop_beyond_what_sliding_layers_hold_leaves_the_cache_alone(model) -> None:
    ids = ids_of(2, 450)
    past = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match=r"row 0 of 450 tokens cannot be cropped to 50"):
        past.crop(-400)
    assert past.get_seq_length() == 450
    past.crop(-20)
    again = model(input_ids=ids[:, 430:], past_key_values=past).logits
    assert torch.equal(again, model(input_ids=ids).logits[:, 430:])


def test_a_cache_of_another_model_is_an_error(model, tiny_model, tmp_path) -> None:
    ids = ids_of(1, 20)
    past = model(input_ids=ids).past_key_values
    source, calib = tiny_model("gemma3", seed=1), CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    other = quantize_model(source, QuantScheme(4, 32), method="rtn", output=tmp_path / "other", calib=calib).folder
    second = AutoModelForCausalLM.from_pretrained(other).eval()
    for call in (
        lambda: second(input_ids=ids, past_key_values=past),
        lambda: generate(second, ids_of(1, 30), past_key_values=past),
    ):
        with pytest.raises(ValueError, match="holds 20 columns that a model with other weights or another"):
            call()
    with pytest.raises(ValueError, match="cannot remove 21 columns from a cache of 20"):
        past.crop(-21)
    assert past.get_seq_length() == 20
    begun = torch.cat([ids, ids], 1)
    assert torch.equal(model(input_ids=ids, past_key_values=past).logits, model(input_ids=begun).logits[:, 20:])


def test_bad_bits_and_a_cache_beside_them_are_errors(model) -> None:
    ids = ids_of(1, 4)
    with pytest.raises(ValueError, match=r"kv bits is 5; known: 16, 8"):
        generate(model, ids, kv_cache="5")
    with pytest.raises(ValueError, match=r"'eight' are not of the form"):
        llmq.set_kv_cache(model, "eight")
    past = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match=r"kv_cache='8' stands beside past_key_values"):
        generate(model, ids_of(1, 6), kv_cache="8", past_key_values=past)


def test_transformers_own_way_to_ask_for_a_quantized_cache(model, said) -> None:
    ids = ids_of(2, 80)

    def asked(**cache_config: Any) -> Any:
        options: dict[str, Any] = {"cache_config": cache_config} if cache_config else {}
        return generate(model, ids, return_dict_in_generate=True, cache_implementation="quantized", **options)

    for cache_config, kv in (
        ({}, KVCacheConfig(4, 4)),
        ({"nbits": 8}, KVCacheConfig(8, 8)),
        ({"backend": "llmq", "k_bits": 8, "v_bits": 4, "residual_length": 64}, KVCacheConfig(8, 4, recent=64)),
        (
            {"layers": ["8"] * model.config.num_hidden_layers},
            KVCacheConfig(4, 4, layers=("8",) * len(model.model.layers)),
        ),
    ):
        out = asked(**cache_config)
        assert out.past_key_values.kv == kv
        assert torch.equal(out.sequences, generate(model, ids, kv_cache=kv))
    assert said() == []
    with pytest.raises(ValueError, match=r"a key of cache_config is 'q_group_size'; known: k_bits, .*nbits"):
        asked(q_group_size=64)
    with pytest.raises(ValueError, match=r"k_bits is 3; known"):
        asked(nbits=3)


def test_a_quantized_cache_where_there_is_no_native_decoder(tiny_model) -> None:
    model = llmq.runtime.causal_lm.adopt(AutoModelForCausalLM.from_pretrained(tiny_model("gpt_neox")).eval())
    ids = ids_of(1, 8)
    out = generate(
        model, ids, return_dict_in_generate=True, cache_implementation="quantized", cache_config={"nbits": 8}
    )
    assert isinstance(out.past_key_values, llmq.QuantizedKVCache)
    assert out.past_key_values.config == KVCacheConfig(8, 8)
    own = llmq.QuantizedKVCache("8", model.config)
    assert torch.equal(out.sequences, generate(model, ids, past_key_values=own))


def test_the_graph_says_that_it_caches_in_16_bits(tiny_model, said) -> None:
    model = llmq.runtime.causal_lm.adopt(AutoModelForCausalLM.from_pretrained(tiny_model("gpt_neox")).eval())
    generate(model, ids_of(1, 8), kv_cache="8")
    assert any("caches keys and values in 16 bits instead of 8" in message for message in said())
