"""QuantizedKVCache against transformers' DynamicCache and against a naive one, through forward and generate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MambaConfig

from llmq import CalibConfig, KVCacheConfig, QuantizedKVCache, QuantScheme, quantize_model
from llmq.compat import API, VERSIONS
from llmq.kv_quant import GROUP, dequantize_rows, quantize_rows, rotate
from llmq.runtime import options

Tiny = Callable[..., Path]
Load = Callable[..., Any]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt_neox"]
WINDOW = 8  # of the tiny gemma3 and mistral


@pytest.fixture
def load(tiny_model: Tiny) -> Load:
    """A tiny model whose attention is not flat: random weights three times as large."""

    def get(family: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
                    parameter.mul_(3)
        model.generation_config.eos_token_id = None  # so that both runs are as long
        return model

    return get


def prompt(rows: int = 1, length: int = 23, seed: int = 0) -> Tensor:
    return torch.randint(10, 384, (rows, length), generator=torch.Generator().manual_seed(seed))


def cache_of(model: Any, bits: str, **options: Any) -> QuantizedKVCache:
    k, v = KVCacheConfig.parse(bits).of_layer(0)
    options = {"sinks": 2, "recent": 5, "key_scales": "token", **options}  # by channel a short text has no codes
    return QuantizedKVCache(KVCacheConfig(k, v, **options), model.config)


@torch.no_grad()
def fed(model: Any, ids: Tensor, cache: Any, chunks: list[int]) -> Tensor:
    """f32[B, T, V] logits of ``ids``, fed in ``chunks``."""
    parts = [model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in ids.split(chunks, dim=1)]
    return torch.cat(parts, dim=1)


CHUNKS = [7, 1, 1, 9, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_are_a_dynamic_cache_exactly(family: str, load: Load) -> None:
    model, ids = load(family), prompt(2)
    expected = fed(model, ids, DynamicCache(config=model.config), CHUNKS)
    cache = cache_of(model, "16")
    assert torch.equal(fed(model, ids, cache, CHUNKS), expected)
    assert cache.get_seq_length() == 23


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["8", "4", "k8v4", "k4v2"])
def test_few_bits_are_near_and_fewer_are_farther(family: str, bits: str, load: Load) -> None:
    model, ids = load(family), prompt(2)
    exact = fed(model, ids, DynamicCache(config=model.config), CHUNKS)

    def error(bits: str) -> float:
        return float((fed(model, ids, cache_of(model, bits), CHUNKS) - exact).norm() / exact.norm())

    assert 0 < error("8") < 0.1
    assert error("8") < error("4") < error("2")
    assert error("8") <= error(bits) < error("2")


class NaiveLayer:
    """All states are kept; what a query sees is quantized anew each time."""

    def __init__(self, config: KVCacheConfig, window: int | None) -> None:
        self.c, self.window, self.k, self.v = config, window, torch.zeros(0), torch.zeros(0)

    def seen(self, x: Tensor, new: Tensor, bits: int, *, keys: bool) -> Tensor:
        n, by_channel = x.shape[2], keys and bits < 8 and self.c.key_scales == "channel"
        by_channel &= self.window is None or self.window > 2 * GROUP
        recent = self.c.recent if bits < 8 else 0
        block = GROUP if by_channel else 1
        end = self.c.sinks + max(n - self.c.sinks - recent, 0) // block * block
        out = x.half().float() if bits < 8 or n <= self.c.sinks else x.clone()
        out[:, :, : self.c.sinks] = x[:, :, : self.c.sinks].half().float()
        step = block if by_channel else max(end - self.c.sinks, 1)  # tokens do not know each other
        for a in range(self.c.sinks, end, step):
            part = x[:, :, a : a + step]
            if by_channel:
                part = dequantize_rows(quantize_rows(part.mT, bits)).mT
            elif self.c.rotate and (keys or bits < 8):
                part = rotate(dequantize_rows(quantize_rows(rotate(part), bits)))
            else:
                part = dequantize_rows(quantize_rows(part, bits))
            out[:, :, a : a + step] = part
        if self.window is not None:
            out = out[:, :, max(n - self.window + 1, 0) :]
        return torch.cat([out, new], dim=2)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k.numel() == 0:
            self.k, self.v = k[:, :, :0], v[:, :, :0]
        keys = self.seen(self.k, k, self.c.k_bits, keys=True)
        values = self.seen(self.v, v, self.c.v_bits, keys=False)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        return keys, values


@pytest.mark.parametrize("window", [None, 70, 180])
@pytest.mark.parametrize("bits", ["k4v8", "k8v4", "2"])
@pytest.mark.parametrize(("key_scales", "rotate"), [("channel", True), ("token", True), ("token", False)])
@pytest.mark.parametrize(("sinks", "recent"), [(2, 5), (0, 0), (4, 100), (30, 3)])
def test_states_are_those_of_a_naive_cache(
    sinks: int, recent: int, key_scales: str, rotate: bool, bits: str, window: int | None, load: Load
) -> None:
    model_config = copy.deepcopy(load("gemma3").config)
    model_config.sliding_window = window or 70
    index = model_config.layer_types.index("full_attention" if window is None else "sliding_attention")
    k_bits, v_bits = KVCacheConfig.parse(bits).of_layer(0)
    config = KVCacheConfig(k_bits, v_bits, key_scales=key_scales, rotate=rotate, sinks=sinks, recent=recent)
    cache, naive = QuantizedKVCache(config, model_config), NaiveLayer(config, window)
    for n in [9, 1, 3, 70, 1, 130, 1, 1, 62, 3]:
        k, v = torch.randn(2, 2, 2, n, 24).half().float()  # what the sinks are held in
        length, offset = cache.get_mask_sizes(n, index)
        got, expected = cache.update(k, v, index), naive.update(k, v)
        for a, b in zip(got, expected, strict=True):
            # Products of different sizes round differently, and one code in thousands may go the other way.
            assert float(((a - b).abs() > 1e-4).float().mean()) < 0.002
            assert a.shape[2] == length
        assert offset + length == naive.k.shape[2]
        assert torch.equal(got[0][:, :, -n:], k)


def test_a_scale_that_is_off_by_one_percent_is_seen(load: Load) -> None:
    cache = cache_of(load("qwen3"), "8", sinks=0, recent=0, rotate=False)
    states = torch.randn(2, 2, 2, 50, 16)
    step = states.abs().amax(-1, keepdim=True) / 127
    cache.update(*states, 0)
    layer = cache.quantized_layers[0]

    def largest_error() -> float:
        assert layer.keys is not None
        assert layer.values is not None
        return float(((torch.stack([layer.keys, layer.values]) - states).abs() / step).max())

    assert largest_error() < 0.55  # half a step, and the scale's own rounding to fp16
    for store in layer.stores:
        store.map(lambda t: (t.float() * 1.01).to(t.dtype) if t.is_floating_point() else t)
    assert largest_error() > 1


# generate


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize(
    "mode", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generate_with_16_bits_gives_the_same_tokens(family: str, mode: dict[str, Any], load: Load) -> None:
    model, ids = load(family), prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **mode}
    torch.manual_seed(3)
    expected = model.generate(ids, **common)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, past_key_values=cache_of(model, "16"), **common), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_generate_with_few_bits_runs_in_every_mode(family: str, mode: dict[str, Any], load: Load) -> None:
    model, ids, cache = load(family), prompt(2), None
    cache = cache_of(model, "k8v4")
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **mode)
    assert out.shape == (2, 35)
    assert cache.get_seq_length() == 34


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_prompt_lookup_crops_the_cache(family: str, bits: str, load: Load) -> None:
    model, ids = load(family), prompt(length=6).repeat(1, 4)
    cache = cache_of(model, bits)
    # transformers 4 wants an end token, and leaves it to the caller that layers of a window can be cropped.
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 1 << 20}
    cache.activate_past_recording()
    out = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **greedy)
    columns = out.shape[1]
    # transformers 4 also keeps guesses beyond max_new_tokens, with caches of its own, too.
    assert 44 <= columns <= (48 if API is VERSIONS[4] else 44)
    assert cache.get_seq_length() == columns - 1
    if bits == "16":
        assert torch.equal(out[:, :44], model.generate(ids, **greedy))


def test_a_chat_continues_from_the_cache(load: Load) -> None:
    model, ids = load("llama"), prompt()
    cache = cache_of(model, "16")
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    longer = torch.cat([first, prompt(length=4, seed=1)], dim=1)
    expected = model.generate(longer, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(longer, past_key_values=cache, max_new_tokens=5, do_sample=False), expected)


def test_an_llmq_model_with_a_native_decoder_uses_the_cache(
    tiny_model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")
    calib = CalibConfig("stdlib", nsamples=1, seqlen=16)
    result = quantize_model(tiny_model("llama"), QuantScheme(4, 32), method="rtn", output=tmp_path / "q", calib=calib)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    ids, cache = prompt(), cache_of(model, "8")
    with caplog.at_level(logging.WARNING):
        options._said.clear()
        out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == out.shape[1] - 1
    assert 0 < cache.nbytes < cache.nbytes_16bit
    refusals = [m for m in caplog.messages if "past_key_values of class QuantizedKVCache" in m]
    assert len(refusals) == 2  # generate and forward say so, once for six tokens


# rows, crop, reset


def states_of(cache: QuantizedKVCache) -> list[Tensor]:
    return [t for layer in cache.quantized_layers for t in (layer.keys, layer.values) if t is not None]


@pytest.mark.parametrize("bits", ["16", "8", "k4v2"])
def test_rows_are_chosen_repeated_and_reordered(bits: str, load: Load) -> None:
    model = load("gemma3")
    cache = cache_of(model, bits)
    fed(model, prompt(3), cache, [20, 3])
    before = states_of(cache)
    changes: list[tuple[Callable[[QuantizedKVCache], None], list[int]]] = [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ]
    for change, rows in changes:
        changed = copy.deepcopy(cache)
        change(changed)
        assert all(torch.equal(a, b[rows]) for a, b in zip(states_of(changed), before, strict=True))
        assert changed.nbytes == cache.nbytes * len(rows) // 3
    assert all(map(torch.equal, states_of(cache), before))


@pytest.mark.parametrize("bits", ["8", "k4v2"])
@pytest.mark.parametrize("count", [1, 4, 9, 21, 22, 23])
def test_crop_takes_the_newest_tokens(bits: str, count: int, load: Load) -> None:
    model, ids = load("llama"), prompt(2)
    cache = cache_of(model, bits)
    fed(model, ids, cache, CHUNKS)
    before = states_of(cache)
    cache.crop(-count)
    assert cache.get_seq_length() == 23 - count
    assert all(torch.equal(a, b[:, :, : 23 - count]) for a, b in zip(states_of(cache), before, strict=True))
    logits = fed(model, ids[:, 23 - count :], cache, [count])
    assert cache.get_seq_length() == 23
    exact = fed(model, ids, DynamicCache(config=model.config), [23])[:, 23 - count :]
    assert float((logits - exact).norm() / exact.norm()) < (0.1 if bits == "8" else 1.0)


@pytest.mark.parametrize("count", [1, 5, 6, 40, 69, 70, 133, 134, 150, 197, 200])
@pytest.mark.parametrize("window", [None, 180])
def test_crop_cuts_blocks(count: int, window: int | None, load: Load) -> None:
    model_config = copy.deepcopy(load("gemma3").config)
    model_config.sliding_window = 180
    index = model_config.layer_types.index("full_attention" if window is None else "sliding_attention")
    cache = QuantizedKVCache(KVCacheConfig(4, 2, sinks=3, recent=5), model_config)
    cache.activate_past_recording()
    states = torch.randn(2, 2, 2, 200, 24)
    cache.update(*states, index)
    layer = cache.layers[index]
    before = [layer.keys, layer.values]
    layer.crop(-count)
    kept = 200 - count
    start = 0 if window is None else max(kept - window + 1, 0)
    for now, then in zip((layer.keys, layer.values), before, strict=True):
        # Keys of a block cut short are held as fp16 from here on.
        torch.testing.assert_close(now, then[:, :, start:kept], atol=2e-3, rtol=0)
    cache.update(*torch.randn(2, 2, 2, 100, 24), index)
    assert layer.get_seq_length() == kept + 100
    assert len(layer.stores[0]) == len(layer.stores[1])


@pytest.mark.skipif(API is VERSIONS[4], reason="the caches of transformers 4 cannot crop a window")
def test_a_window_that_records_its_past_can_be_cropped(load: Load) -> None:
    model, ids = load("gemma3"), prompt(1, 40)
    ours, theirs = cache_of(model, "16"), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        cache.activate_past_recording()
    for remove in (0, -3, -5, 0):
        a, b = (fed(model, ids[:, c.get_seq_length() :][:, :9], c, [9]) for c in (ours, theirs))
        assert torch.equal(a, b)
        for cache in (ours, theirs):
            cache.crop(remove)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert [ours.get_mask_sizes(2, i) for i in range(2)] == [theirs.get_mask_sizes(2, i) for i in range(2)]
    assert [len(layer.stores[0]) for layer in ours.quantized_layers if layer.is_sliding] == [WINDOW - 1]


def test_reset_forgets_everything(load: Load) -> None:
    model = load("gemma3")
    cache = cache_of(model, "4")
    first = fed(model, prompt(2), cache, CHUNKS)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(fed(model, prompt(2), cache, CHUNKS), first)
    cache.reset()
    fed(model, prompt(3), cache, CHUNKS)  # another batch


# memory


@pytest.mark.parametrize(("bits", "share"), [("8", 0.60), ("4", 0.40), ("2", 0.28)])
def test_memory_is_saved_and_measured(bits: str, share: float, load: Load) -> None:
    model = load("qwen3")  # heads of 16: the scales weigh as much as they ever do
    cache = cache_of(model, bits, recent=0, sinks=0)
    fed(model, prompt(1, 400), cache, [100] * 4)
    heads, dim = 2, 16
    assert cache.nbytes_16bit == 2 * 400 * 2 * 2 * heads * dim
    size = {"8": dim + 2, "4": dim // 2 + 3, "2": dim // 4 + 3}[bits]
    assert cache.nbytes == 400 * 2 * 2 * heads * size
    assert cache.nbytes / cache.nbytes_16bit <= share


def test_a_sliding_layer_holds_its_window_only(load: Load) -> None:
    model = load("gemma3")
    cache = cache_of(model, "8")
    fed(model, prompt(1, 60), cache, [50, 10])
    held = {layer.is_sliding: len(layer.stores[0]) for layer in cache.quantized_layers}
    assert held == {True: WINDOW - 1, False: 60}
    window = cache.quantized_layers[0]
    assert window.is_sliding
    assert window.stores[0].nbytes == 2 * (WINDOW - 1) * (24 + 2)  # nothing else hides behind a view


# errors


def test_crop_beyond_the_length_changes_nothing(load: Load) -> None:
    model = load("gemma3")
    cache = cache_of(model, "8")
    fed(model, prompt(1, 6), cache, [6])
    before = states_of(cache)
    with pytest.raises(ValueError, match="cannot remove 7 tokens from a cache of 6"):
        cache.crop(-7)
    assert all(map(torch.equal, states_of(cache), before))
    cache.crop(9)  # to keep, and no more are there
    assert cache.get_seq_length() == 6
    fed(model, prompt(1, 10), cache, [10])
    before = states_of(cache)
    with pytest.raises(RuntimeError, match=r"window of 8 needs 7 tokens .* activate_past_recording"):
        cache.crop(-2)
    assert all(map(torch.equal, states_of(cache), before))
    assert cache.get_seq_length() == 16


def test_a_context_beyond_the_maximum_is_refused_and_the_cache_is_as_before(load: Load) -> None:
    model = load("llama")
    cache = cache_of(model, "8")
    fed(model, prompt(1, 510), cache, [510])
    before = states_of(cache)
    with pytest.raises(ValueError, match="510 tokens in the cache and 3 new ones are 513; the model's context is 512"):
        fed(model, prompt(1, 3), cache, [3])
    assert all(map(torch.equal, states_of(cache), before))
    fed(model, prompt(1, 2), cache, [2])


def test_a_cache_of_another_model_is_refused(load: Load) -> None:
    llama, gemma = load("llama"), load("gemma3")
    with pytest.raises(ValueError, match="head_dim 24, the model that the cache was made for has 12"):
        fed(gemma, prompt(), cache_of(llama, "8"), [23])
    short = copy.deepcopy(llama.config)
    short.num_hidden_layers = 1
    with pytest.raises(ValueError, match="a model of 1 layers and is given layer 1"):
        fed(llama, prompt(), QuantizedKVCache("8", short), [23])
    cache = cache_of(llama, "8")
    fed(llama, prompt(2), cache, [23])
    with pytest.raises(ValueError, match="holds 2 rows of 2 heads of 12 and is given 1 rows"):
        fed(llama, prompt(1), cache, [23])


def test_layers_have_bits_of_their_own(load: Load) -> None:
    model = load("llama")
    cache = QuantizedKVCache(KVCacheConfig(layers=("8", "k4v2"), recent=0, sinks=0), model.config)
    fed(model, prompt(), cache, [23])
    assert [[s.storage.bits for s in layer.stores] for layer in cache.quantized_layers] == [[8, 8], [4, 2]]
    with pytest.raises(ValueError, match="names the bits of 3 layers, the model has 2"):
        QuantizedKVCache(KVCacheConfig(layers=("8", "8", "8")), model.config)


def test_numbers_that_no_half_holds_are_refused(load: Load) -> None:
    model = load("llama")
    cache = cache_of(model, "8", sinks=4)
    with pytest.raises(ValueError, match="does not fit the float16"):
        cache.update(torch.full((1, 2, 1, 12), 1e5), torch.ones(1, 2, 1, 12), 0)


@pytest.mark.skipif(API is not VERSIONS[4], reason="the cache of transformers 5 knows such layers")
def test_layers_that_transformers_4_does_not_tell_apart() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(ValueError, match="layers hybrid; a cache of keys and values does not hold what they keep"):
        QuantizedKVCache("8", config)
    with pytest.raises(ValueError, match=r"\(mamba\) has layers without attention"):
        QuantizedKVCache("8", MambaConfig())


@pytest.mark.skipif(API is VERSIONS[4], reason="no cache of transformers 4 has them")
def test_layers_of_other_kinds() -> None:
    state_space = QuantizedKVCache("8", MambaConfig(num_hidden_layers=2))
    assert state_space.quantized_layers == []
    assert state_space.is_linear == [True, True]
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(ValueError, match="layers of class LinearAttentionAndFullAttentionLayer"):
        QuantizedKVCache("8", config)


def test_its_text_says_what_it_holds(load: Load) -> None:
    model = load("llama")
    cache = cache_of(model, "k8v4")
    fed(model, prompt(), cache, [23])
    assert f"QuantizedKVCache(k8v4, 2 layers, 23 tokens, {cache.nbytes} bytes of" in repr(cache)
