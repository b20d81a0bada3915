"""The keys and values of a prompt in a file: the same tokens as without, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import llmq
from llmq import AutoModelForCausalLM, CalibConfig, KVCacheConfig, QuantScheme, quantize_model
from llmq.runtime.causal_lm import native_decoder
from llmq.runtime.prompt_cache import WHY

pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")

KINDS = ["16", "8", "k8v4", "4"]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``folder(family, seed)``: a quantized tiny model."""
    made: dict[tuple[str, int], Path] = {}

    def get(family: str = "gemma3", seed: int = 0) -> Path:
        if (family, seed) not in made:
            out = tmp_path_factory.mktemp("prompt") / family
            calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
            source = tiny_model(family, seed=seed)
            made[family, seed] = quantize_model(
                source, QuantScheme(4, 32), method="rtn", output=out, calib=calib
            ).folder
        return made[family, seed]

    return get


@pytest.fixture
def model(folder: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder()).eval()


def ids_of(rows: int, columns: int) -> Tensor:
    return torch.randint(3, 384, (rows, columns), generator=torch.Generator().manual_seed(2))


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    fixed = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    out: Tensor = model.generate(ids, **{**fixed, "attention_mask": torch.ones_like(ids), **options})
    return out


@pytest.mark.parametrize("columns", [5, 64, 300])
@pytest.mark.parametrize("kv", KINDS)
def test_a_loaded_prompt_gives_the_tokens_of_a_computed_one(model: Any, tmp_path: Path, kv: str, columns: int) -> None:
    # Windows of 8 tokens in some layers: at 300 columns their pages of the beginning are forgotten.
    ids, path = ids_of(1, columns + 20), tmp_path / "prompt.safetensors"
    llmq.set_kv_cache(model, kv)
    computed = llmq.save_prompt_cache(path, model, ids[:, :columns])
    loaded = llmq.load_prompt_cache(path, model)
    assert loaded.get_seq_length() == columns
    assert computed.nbytes / 2 < loaded.nbytes <= computed.nbytes  # pages to spare are left out
    assert str(loaded.kv) == str(computed.kv)
    plain = generate(model, ids)
    for cache in (copy.deepcopy(loaded), computed, loaded):
        assert torch.equal(generate(model, ids, past_key_values=cache), plain)
    assert loaded.get_seq_length() == columns + 20 + 11
    # And the numbers of every page, not only the likeliest tokens.
    again = llmq.load_prompt_cache(path, model)
    whole = model(input_ids=ids).logits[:, columns:]
    assert torch.equal(model(input_ids=ids[:, columns:], past_key_values=again).logits, whole)


def test_a_loaded_prompt_is_cropped_and_begins_a_batch(model: Any, tmp_path: Path) -> None:
    ids, path = ids_of(3, 90), tmp_path / "prompt.safetensors"
    ids[:, :70] = ids[:1, :70]
    llmq.save_prompt_cache(path, model, ids[:1, :70])
    cache = llmq.load_prompt_cache(path, model)
    one = cache.nbytes
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == one
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
    cache = llmq.load_prompt_cache(path, model)
    cache.crop(-10)
    ids[0, 60:] = 7  # where the crop has cut, another text may follow
    assert torch.equal(generate(model, ids[:1], past_key_values=cache), generate(model, ids[:1]))


def test_a_padded_batch_is_saved_with_its_mask(model: Any, tmp_path: Path) -> None:
    ids, path = ids_of(2, 40), tmp_path / "prompt.safetensors"
    mask = (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    past = model(input_ids=ids[:, :30], attention_mask=mask[:, :30]).past_key_values
    llmq.save_prompt_cache(path, model, ids[:, :30], past)
    cache = llmq.load_prompt_cache(path, model)
    plain = generate(model, ids, attention_mask=mask)
    ids[1, :15] = 5  # the mask hides it
    found = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(found[:, 40:], plain[:, 40:])


def test_another_prompt_is_refused(model: Any, tmp_path: Path) -> None:
    ids, path = ids_of(1, 60), tmp_path / "prompt.safetensors"
    llmq.save_prompt_cache(path, model, ids[:, :50])
    cache = llmq.load_prompt_cache(path, model)
    other = ids.clone()
    other[0, 31] = 3 if ids[0, 31] != 3 else 4
    for prompt in (other, other[:, :40]):
        with pytest.raises(ValueError, match=r"row 0 of the prompt has token \d+ at column 31 where past_key_values"):
            generate(model, prompt, past_key_values=cache)
    with pytest.raises(ValueError, match=r"already holds all 50 tokens"):
        generate(model, ids[:, :50], past_key_values=cache)
    assert cache.get_seq_length() == 50
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


def test_files_of_other_models_and_settings_are_refused(
    model: Any, folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "prompt.safetensors"
    llmq.save_prompt_cache(path, model, ids_of(1, 20))
    for other, name in ((folder("llama"), "config"), (folder(seed=1), "weights")):
        with pytest.raises(ValueError, match=rf"its {name} is .*{WHY[name][:30]}"):
            llmq.load_prompt_cache(path, AutoModelForCausalLM.from_pretrained(other))
    llmq.set_activation_bits(model, 16)
    with pytest.raises(ValueError, match=r"its activation_bits is 8 instead of 16: activations"):
        llmq.load_prompt_cache(path, model)
    llmq.set_activation_bits(model, 8)
    assert llmq.load_prompt_cache(path, model).get_seq_length() == 20
    graph = llmq.runtime.causal_lm.adopt(AutoModelForCausalLM.from_pretrained(folder()).eval())
    graph.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"prompt cache is one of the native decoder, and the model has none: .* hook"):
        llmq.load_prompt_cache(path, graph)


def changed(path: Path, out: Path, metadata: dict[str, str], tensors: dict[str, Any]) -> Path:
    """A copy of a file with other metadata and tensors (None: left out)."""
    with safe_open(path, framework="pt") as f:
        head = f.metadata()
        found = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    found = {k: v for k, v in (found | tensors).items() if v is not None}
    save_file(found, out, head | metadata)
    return out


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"format": "x"}, {}, "it is no prompt cache of llmq"),
        ({"version": "1"}, {}, "its version is 1 instead of 2: another version of llmq wrote it"),
        ({"kv_layout": "0"}, {}, "its kv_layout is 0 instead of .* with other pages; make it anew"),
        ({"byteorder": "middle"}, {}, "another byte order"),
        ({}, {"pages.0.0": None}, "truncated or damaged"),
        ({}, {"ids": torch.zeros(1, 20, dtype=torch.int64)}, "its bytes have changed.* truncated or damaged"),
        ({"kv": "null,"}, {}, "truncated or damaged"),
        ({"rows": "[]"}, {}, "its sequences are not those of its tokens"),
    ],
)
def test_damaged_files_and_those_of_other_versions_are_refused(
    model: Any, tmp_path: Path, metadata: dict[str, str], tensors: dict[str, Any], message: str
) -> None:
    path = tmp_path / "prompt.safetensors"
    llmq.save_prompt_cache(path, model, ids_of(1, 20))
    with pytest.raises(ValueError, match=message):
        llmq.load_prompt_cache(changed(path, tmp_path / "other", metadata, tensors), model)


def test_truncated_files_are_refused_wherever_they_end(model: Any, tmp_path: Path) -> None:
    path, cut = tmp_path / "prompt.safetensors", tmp_path / "cut"
    cache = llmq.save_prompt_cache(path, model, ids_of(1, 20))
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cannot be read as a prompt cache .* truncated or damaged"):
            llmq.load_prompt_cache(cut, model)
    with pytest.raises(FileNotFoundError, match=r"there is no such file; llmq.save_prompt_cache writes one"):
        llmq.load_prompt_cache(tmp_path / "none", model)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts[0][0].pop(0), r"part 0 is torch.uint8 \(3, \d+\); announced are 2 pages"),
        (lambda parts: parts[0].__setitem__(0, [0, 1, 3]), "3 pages from token 0 on are not those of 150 tokens"),
        (lambda parts: parts[0].__setitem__(0, [0, 1, 1 << 40]), "3 pages from token 0 on are not those"),
        (lambda parts: parts[0].__setitem__(0, [0, 2, 1]), "3 pages from token 0 on are not those"),
        (lambda parts: parts[0].__setitem__(2, -16), "pages from token -16 on are not those"),
        (lambda parts: parts[0].__setitem__(2, 128), "begins? at token 128|begin too late for 150 tokens"),
        (lambda parts: parts[0].__setitem__(1, 5), "3 pages from token 0 on are not those"),
        (lambda parts: parts[0].__setitem__(3, 64), r"announced are 3 pages of 64 bytes"),
        (lambda parts: parts.pop(), "shorter|longer"),
    ],
)
def test_pages_that_no_sequence_has_are_refused(
    folder: Callable[..., Path], change: Callable[[Any], Any], message: str
) -> None:
    decoder = native_decoder(AutoModelForCausalLM.from_pretrained(folder("llama")).eval())
    ids = ids_of(1, 150)[0]
    sequence = decoder.new_sequence()
    decoder.forward([ids], [sequence])
    parts, pages = sequence.state()
    parts = json.loads(json.dumps(parts))
    change(parts)
    other = decoder.new_sequence()
    decoder.forward([ids[:9]], [other])
    with pytest.raises(ValueError, match=message):
        other.set_state(150, parts, pages)
    assert other.length == 9
    expected = decoder.new_sequence()
    decoder.forward([ids[:9]], [expected])
    assert torch.equal(decoder.forward([ids[9:20]], [other]), decoder.forward([ids[9:20]], [expected]))


def test_windows_that_begin_too_late_are_refused(folder: Callable[..., Path]) -> None:
    decoder = native_decoder(AutoModelForCausalLM.from_pretrained(folder()).eval())
    sequence = decoder.new_sequence()
    decoder.forward([ids_of(1, 300)[0]], [sequence])
    parts, pages = sequence.state()
    late = [(numbers[-1:], numbers[-1], 64 * numbers[-1], nbytes) if first else part
            for part in parts for numbers, first, _, nbytes in [part]]  # fmt: skip
    assert late != parts
    cut = [p[-1:] if part[1] else p for p, part in zip(pages, parts, strict=True)]
    # The window of 8 tokens ends at 300, a page begins at 256: one page is enough, unless there are fewer tokens.
    other = decoder.new_sequence()
    other.set_state(300, late, cut)
    with pytest.raises(ValueError, match="begin too late for 257 tokens"):
        decoder.new_sequence().set_state(257, late, cut)


def test_bits_by_layer_and_other_settings_are_kept(model: Any, tmp_path: Path) -> None:
    ids, path = ids_of(1, 80), tmp_path / "prompt.safetensors"
    layers = tuple(["k8v4", "4", "16", "8"] * 4)[: model.config.num_hidden_layers]
    llmq.set_kv_cache(model, KVCacheConfig(layers=layers, sinks=2, recent=20, rotate=False))
    llmq.save_prompt_cache(path, model, ids[:, :70])
    cache = llmq.load_prompt_cache(path, model)
    assert cache.kv == KVCacheConfig(layers=layers, sinks=2, recent=20, rotate=False)
    whole = model(input_ids=ids).logits[:, 70:]
    assert torch.equal(model(input_ids=ids[:, 70:], past_key_values=cache).logits, whole)


def test_a_failed_write_leaves_the_file_before_it(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompt.safetensors"
    llmq.save_prompt_cache(path, model, ids_of(1, 20))
    before = path.read_bytes()

    def full(_tensors: Any, out: Path, _metadata: Any) -> None:
        out.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmq.runtime.prompt_cache.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        llmq.save_prompt_cache(path, model, ids_of(1, 30))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"none does not exist; create it first"):
        llmq.save_prompt_cache(tmp_path / "none" / "x", model, ids_of(1, 20))
    past = model(input_ids=ids_of(1, 9)).past_key_values
    with pytest.raises(ValueError, match=r"the cache holds \(1, 9\) rows and columns, input_ids has \(1, 20\)"):
        llmq.save_prompt_cache(path, model, ids_of(1, 20), past)
