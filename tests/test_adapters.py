"""LoRA adapters on the native decoder and in the graph, against merged weights in fp64.

Tolerance of the logits: as in test_native.py, 8 times what fp32 costs the graph itself; the adapters are large enough
that a scale one percent off is far beyond it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import linears, pair, write_adapter
from kernel_cases import COMPILED, core, isa, seeded, threads  # noqa: F401 - fixtures
from test_native import NATIVE, TIMES_ROUNDING, dequantized, folders, graph_logits, ids_of, load  # noqa: F401
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import llmq
from llmq import kernels, set_activation_bits
from llmq.kernels import reference
from llmq.models.adapter import REFUSED, read_adapter
from llmq.runtime.causal_lm import adopt, native_decoder
from llmq.runtime.native import NativeDecoder
from llmq.runtime.parts import DENSE_TYPES, Parts, Unsupported
from llmq.runtime.qlinear import QLinear

# The others differ from these in norms and caps, which an adapter has nothing to do with.
FAST = ("llama", "gemma3")
# Every rule at once: ranks and alphas of their own by name and by regular expression.
MIXED: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 12,
    "rank_pattern": {"q_proj": 1, r"layers\.1\.mlp\.(gate|up)_proj": 20, "down_proj": 3},
    "alpha_pattern": {r"layers\.2\.mlp\..*": 5, "self_attn.v_proj": 2},
}


def scale_of(name: str, config: dict[str, Any]) -> float:
    """The scale that peft's documentation gives a module under MIXED."""
    rank = 1 if "q_proj" in name else 3 if "down_proj" in name else 8
    if "layers.1.mlp.gate" in name or "layers.1.mlp.up" in name:
        rank = 20
    alpha = 5 if "layers.2.mlp" in name else 2 if "v_proj" in name else config["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def doubled(plain: Any) -> Any:
    """The graph in fp64, but for the angles, which are fp32 in every evaluation."""
    double = copy.deepcopy(plain).double()
    for module in double.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.float()
    return double


def merged(plain: Any, folder: Path, scale: Callable[[str], float]) -> Any:
    """A copy in fp64 with scale * B A added to its weights."""
    double = doubled(plain)
    with torch.no_grad():
        for name in linears(double):
            a, b = pair(folder, name)
            double.get_submodule(name).weight.add_(scale(name) * b @ a)
    return double


def all_logits(model: Any, rows: list[Tensor], cuts: tuple[int, ...]) -> list[Tensor]:
    """Of each row, from a batch in two steps, the second one of several tokens for some and one for others."""
    decoder = NativeDecoder.of(model)
    sequences = [decoder.new_sequence() for _ in rows]
    first = decoder.forward([r[:c] for r, c in zip(rows, cuts, strict=True)], sequences, output="all")
    second = decoder.forward([r[c:] for r, c in zip(rows, cuts, strict=True)], sequences, output="all")
    rest = [len(r) - c for r, c in zip(rows, cuts, strict=True)]
    return [torch.cat(parts) for parts in zip(first.split(list(cuts)), second.split(rest), strict=True)]


def check_against_merged(model: Any, plain: Any, folder: Path, config: dict[str, Any], tmp_path: Path) -> None:
    rows, cuts = ids_of(60, 30), (59, 7)
    exact = merged(plain, folder, lambda name: scale_of(name, config))
    expected = [graph_logits(exact, r) for r in rows]
    single = copy.deepcopy(exact).float()
    rounding = max(float((graph_logits(single, r) - e).abs().max()) for r, e in zip(rows, expected, strict=True))
    limit = TIMES_ROUNDING * rounding

    def error() -> float:
        found = all_logits(model, rows, cuts)
        return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))

    without = error()
    model.load_adapter(folder)
    assert error() <= limit
    graph = max(float((graph_logits(model, r) - e).abs().max()) for r, e in zip(rows, expected, strict=True))
    assert graph <= limit, "the graph with its hooks"
    told = json.loads((folder / "adapter_config.json").read_text())
    told["lora_alpha"] *= 1.01
    told["alpha_pattern"] = {k: 1.01 * v for k, v in told["alpha_pattern"].items()}
    other = tmp_path / "off"
    other.mkdir()
    (other / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (other / "adapter_config.json").write_text(json.dumps(told))
    model.load_adapter(other, "off")
    assert error() > 5 * limit, "one percent off would be seen"
    model.delete_adapter(["off", "default"])
    assert error() == without > 100 * limit


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in NATIVE])
def test_logits_are_those_of_merged_weights(folders, family: str, tmp_path: Path) -> None:  # noqa: F811
    model = load(folders(family))
    set_activation_bits(model, 16)
    folder = write_adapter(tmp_path / "a", linears(model), **MIXED)
    check_against_merged(model, dequantized(model, folders(family)), folder, MIXED, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("isa")
def test_every_kernel_set_and_type(folders, dtype: torch.dtype, tmp_path: Path) -> None:  # noqa: F811
    model = load(folders("gemma3"))
    set_activation_bits(model, 16)
    config = {**MIXED, "use_rslora": True}
    folder = write_adapter(tmp_path / "a", linears(model), dtype=dtype, **config)
    check_against_merged(model, dequantized(model, folders("gemma3")), folder, config, tmp_path)


def test_models_that_are_not_quantized_take_adapters_too(tiny_model, tmp_path: Path) -> None:
    model = llmq.runtime.causal_lm.adopt(load(tiny_model("qwen2", blocks=3)))
    folder = write_adapter(tmp_path / "a", linears(model), **MIXED)
    check_against_merged(model, copy.deepcopy(model), folder, MIXED, tmp_path)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
def test_matrices_and_texts_that_are_cut_into_tasks(count: int, tmp_path: Path) -> None:
    """Three tasks of rows of gate and up, the last of them ragged, and three of tokens."""
    config = LlamaConfig(
        **{"hidden_size": 40, "intermediate_size": 300, "num_hidden_layers": 2, "vocab_size": 400},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    model = llmq.runtime.causal_lm.adopt(copy.deepcopy(plain))
    folder = write_adapter(tmp_path / "a", linears(model), r=5, lora_alpha=10, size=0.1)
    model.load_adapter(folder)
    exact = merged(plain, folder, lambda _: 2.0)
    [row] = ids_of(450)
    expected = graph_logits(exact, row)
    limit = TIMES_ROUNDING * float((graph_logits(copy.deepcopy(exact).float(), row) - expected).abs().max())
    kernels.set_num_threads(count)
    decoder = NativeDecoder.of(model)
    actual = decoder.forward([row], [decoder.new_sequence()], output="all")
    assert (actual - expected).abs().max() <= limit
    assert (graph_logits(merged(plain, folder, lambda _: 2.02), row) - expected).abs().max() > 5 * limit


@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj", "down_proj"), ("up_proj",), ("gate_proj", "o_proj")])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_int8_activations_leave_the_adapter_in_floats(folders, family, targets, tmp_path: Path) -> None:  # noqa: F811
    """Beside the graph with its hooks; see test_native.py for why a few rows may differ."""
    model = load(folders(family))
    model.load_adapter(write_adapter(tmp_path / "a", linears(model, targets), r=5, lora_alpha=10))
    rows = ids_of(*[6] * 24)
    decoder = native_decoder(model)
    sequences = [decoder.new_sequence(kv_dtype=torch.float32) for _ in rows]
    actual = decoder.forward(rows, sequences, output="all").view(24, 6, -1)
    expected = torch.stack([graph_logits(model, row) for row in rows])
    difference = (actual - expected).abs().amax(dim=(1, 2))
    assert (difference <= 1e-4).float().mean() >= 0.6
    assert difference.max() <= 0.5


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [8, 16])
def test_one_token_or_many_and_any_number_of_threads_give_the_same_bits(folders, bits, tmp_path: Path) -> None:  # noqa: F811
    model = load(folders("llama"))
    set_activation_bits(model, bits)
    model.load_adapter(write_adapter(tmp_path / "a", linears(model), **MIXED, dtype=torch.bfloat16))
    decoder = native_decoder(model)
    [row] = ids_of(160)
    together = decoder.forward([row], [decoder.new_sequence()], output="all")
    for count in (1, 2, 3):
        kernels.set_num_threads(count)
        s = decoder.new_sequence()
        pieces = [decoder.forward([part], [s], output="all") for part in (row[:140], row[140:147], *row[147:, None])]
        assert torch.equal(torch.cat(pieces), together), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (16, 4), (33, 8), (70, 17), (128, 64)])
@pytest.mark.usefixtures("isa")
def test_the_kernel_is_its_twin(n: int, rank: int, dtype: torch.dtype) -> None:
    draw = seeded(n, rank, dtype)
    bt = torch.randn(rank, n, generator=draw).to(dtype)
    low, before = torch.randn(7, rank, generator=draw), torch.randn(7, n, generator=draw)
    guard = torch.full((8, n), 3.0)  # the row behind the output stays as it is
    guard[:7] = before
    call = {
        "b": bt.data_ptr(),
        "n": n,
        "rank": rank,
        "type": DENSE_TYPES[dtype],
    }
    core.add_low_rank(**call, low=low.data_ptr(), m=7, scale=0.75, out=guard.data_ptr())
    expected = reference.add_low_rank(before.double(), low.double(), bt.double(), 0.75)
    # fp32: each product and each addition is off by half a unit in the last place of the terms' sum at most.
    terms = before.abs() + 0.75 * low.abs() @ bt.float().abs()
    assert ((guard[:7] - expected).abs() <= (rank + 3) * 2**-24 * terms).all()
    assert (guard[7] == 3).all()
    assert ((reference.add_low_rank(before, low, bt, 0.75) - expected).abs() <= (rank + 3) * 2**-24 * terms).all()
    for t in range(7):
        one = before[t : t + 1].clone()
        core.add_low_rank(**call, low=low[t].data_ptr(), m=1, scale=0.75, out=one.data_ptr())
        assert torch.equal(one[0], guard[t])


def text(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


@pytest.fixture
def model(folders, tmp_path: Path) -> Any:  # noqa: F811
    """A quantized model that has loaded two adapters, ``one`` and ``two``; ``two`` is in use."""
    made = load(folders("gemma3"))
    for seed, name in enumerate(("one", "two")):
        made.load_adapter(write_adapter(tmp_path / name, linears(made), seed=seed), adapter_name=name)
    return made


def test_adapters_are_switched_disabled_and_deleted(folders, model: Any) -> None:  # noqa: F811
    ids = torch.stack(ids_of(20, 20))
    assert model.active_adapters() == ["two"]
    two = text(model, ids)
    model.set_adapter("one")
    one = text(model, ids)
    model.disable_adapters()
    base = text(model, ids)
    assert model.active_adapters() == []
    assert torch.equal(base, text(load(folders("gemma3")), ids))
    for a, b in ((one, two), (one, base), (two, base)):
        assert not torch.equal(a, b)
    model.enable_adapters()
    assert model.active_adapters() == ["one"]
    assert torch.equal(text(model, ids), one)
    model.set_adapter(["two"])
    assert torch.equal(text(model, ids), two)
    assert torch.equal(torch.cat([text(model, row[None]) for row in ids]), two), "a batch is its rows"
    assert torch.equal(text(copy.deepcopy(model), ids), two)
    model.delete_adapter("two")
    assert torch.equal(text(model, ids), base)
    with pytest.raises(ValueError, match=r"there is no adapter 'two'; loaded are: one"):
        model.set_adapter("two")
    with pytest.raises(ValueError, match=r"set_adapter got 2 adapters; one at a time"):
        model.set_adapter(["one", "two"])
    model.set_adapter("one")
    assert torch.equal(text(model, ids), one)


def test_a_switch_does_not_look_at_dense_matrices_again(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of an embedding of half a gigabyte that takes a second; a change of its numbers is seen all the same."""
    made = adopt(load(tiny_model("llama", blocks=3)))
    looked: list[Tensor] = []
    real = Parts._in_its_least_type
    monkeypatch.setattr(Parts, "_in_its_least_type", staticmethod(lambda w: looked.append(w) or real(w)))
    made.load_adapter(write_adapter(tmp_path / "one", linears(made)))
    first = native_decoder(made)
    dense = len(looked)
    assert dense >= 3 * 7 + 2
    made.disable_adapters()
    second = native_decoder(made)
    assert second is not first
    assert len(looked) == dense
    with torch.no_grad():
        made.get_input_embeddings().weight[0, 0] = math.nan
    made.enable_adapters()
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        native_decoder(made)
    assert len(looked) == dense + 1


def test_what_the_decoder_does_not_do_runs_in_the_graph_with_the_adapter(model: Any) -> None:
    set_activation_bits(model, 16)
    [row] = ids_of(20)
    native = model(input_ids=row[None]).logits
    graph = model(input_ids=row[None], output_hidden_states=True)
    assert graph.hidden_states is not None
    assert (graph.logits - native).abs().max() <= 1e-3
    model.disable_adapters()
    assert (model(input_ids=row[None]).logits - native).abs().max() > 0.1


def test_what_is_saved_is_the_model_without_its_adapters(model: Any, folders, tmp_path: Path) -> None:  # noqa: F811
    model.save_pretrained(tmp_path / "saved")
    ids = ids_of(20)[0][None]
    assert torch.equal(text(load(tmp_path / "saved"), ids), text(load(folders("gemma3")), ids))


def test_keys_and_values_belong_to_an_adapter(model: Any, tmp_path: Path) -> None:
    ids, path = ids_of(40)[0][None], tmp_path / "prompt.safetensors"
    with torch.no_grad():
        past = model(input_ids=ids[:, :30]).past_key_values
    llmq.save_prompt_cache(path, model, ids[:, :30], copy.deepcopy(past))
    expected = text(model, ids)
    for other in ("one", None):
        model.disable_adapters() if other is None else model.set_adapter(other)
        with pytest.raises(ValueError, match=r"its adapter is \w+ instead of \w+: it was made with another adapter"):
            llmq.load_prompt_cache(path, model)
        with pytest.raises(ValueError, match=r"30 columns that a model with other weights or another adapter"):
            text(model, ids, past_key_values=copy.deepcopy(past))
    model.set_adapter("two")
    assert torch.equal(text(model, ids, past_key_values=llmq.load_prompt_cache(path, model)), expected)
    assert torch.equal(text(model, ids, past_key_values=past), expected)


def test_a_decoder_goes_on_with_the_adapter_it_was_made_with(model: Any) -> None:
    [row] = ids_of(20)
    decoder = native_decoder(model)
    before = decoder.forward([row], [decoder.new_sequence()])
    model.delete_adapter(["one", "two"])
    assert native_decoder(model) is not decoder
    assert torch.equal(decoder.forward([row], [decoder.new_sequence()]), before)


def test_hooks_of_others_still_send_a_model_to_the_graph(model: Any) -> None:
    linear = next(m for m in model.modules() if isinstance(m, QLinear))
    linear.register_forward_hook(lambda *_: None)
    with pytest.raises(Unsupported, match="has a forward hook"):
        native_decoder(model)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MODULE = NAME.removesuffix(".lora_A.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({key: [1]}, rf"{key} is \[1\]: .*, which is not supported; merge it") for key in REFUSED],
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only 'LORA' adapters are read"),
        ({"bias": "all"}, r"bias is 'all': it changes biases"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights is 'pissa_niter_4'.*path_initial_model"),
        ({"use_novelty": True}, r"use_novelty is True, a setting that this version of llmq does not know"),
        ({"told": {"r": 4}}, r"down_proj has A \(8, 112\) and B \(80, 8\); adapter_config.json gives it rank 4"),
        ({"told": {"r": 0}}, r"gives it rank 0"),
        ({"lora_alpha": "8"}, r"lora_alpha of .* is '8'; expected a number"),
        ({"told": {"rank_pattern": {"(": 8}}}, r"rank_pattern: .*\(\(\)' is no regular expression"),
        ({"alpha_pattern": {"q_proj": 3, ".*attn.*": 4}}, r"alpha_pattern gives .*layers.0.self_attn.q_proj 3 and 4"),
        ({"alpha_pattern": [8]}, r"alpha_pattern is \[8\]"),
        ({"tensors": {NAME: None}}, r"q_proj has lora_B only; A and B belong together"),
        ({"tensors": {NAME: torch.full((8, 80), math.nan)}}, r"lora_A.weight holds NaN or infinity"),
        ({"tensors": {NAME: torch.zeros(8, 80, dtype=torch.int8)}}, r"is torch.int8 \(8, 80\); expected a matrix"),
        ({"tensors": {NAME: torch.zeros(8, 79)}}, r"q_proj as a 96 x 79 matrix; the model's is 96 x 80"),
        ({"tensors": {f"{MODULE}.lora_magnitude_vector": torch.zeros(96)}}, r"lora_magnitude_vector is no lora_A"),
        ({"tensors": {"base_model.model.lm_head.weight": torch.zeros(2, 2)}}, r"lm_head.weight is no lora_A.weight"),
        ({"tensors": {f"{MODULE}.lora_B.bias": torch.zeros(96)}}, r"lora_B.bias is no lora_A.weight"),
        *[({"tensors": {f"base_model.model.{at}.lora_{part}.weight": torch.zeros(shape)
                        for part, shape in (("A", (8, 80)), ("B", (80, 8)))}}, message) for at, message in (
            ("lm_head", r"changes lm_head, a TiedHead; only linears inside the blocks"),
            ("model.embed_tokens", r"changes model.embed_tokens, a QEmbedding; only linears"),
            ("model.layers.7.mlp.up_proj", r"of 'some/base'\) changes model.layers.7.mlp.up_proj, which .* not have"),
        )],
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused_and_the_model_stays(
    folders,  # noqa: F811
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    model = shared(folders)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(write_adapter(tmp_path / "bad", linears(model), **change), "bad")
    assert model.active_adapters() == ["good"]
    assert torch.equal(text(model, ids_of(9)[0][None]), _SHARED["text"])
    assert not any("bad" in str(value) for value in model.__dict__["llmq_adapters"])


_SHARED: dict[str, Any] = {}


def shared(folders: Any) -> Any:  # noqa: F811
    """One model for all bad adapters, with a good one in use."""
    if not _SHARED:
        model = _SHARED["model"] = load(folders("gemma3"))
        model.load_adapter(write_adapter(folders("gemma3").parent / "good", linears(model)), "good")
        _SHARED["text"] = text(model, ids_of(9)[0][None])
    return _SHARED["model"]


def test_missing_and_damaged_files(folders, tmp_path: Path) -> None:  # noqa: F811
    model = load(folders("llama"))
    folder = write_adapter(tmp_path / "a", linears(model))
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"adapter_model.safetensors"):
            model.load_adapter(folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors.*pickled and can run code"):
        model.load_adapter(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        model.load_adapter(tmp_path / "empty")
    write_adapter(tmp_path / "b", {})
    with pytest.raises(ValueError, match=r"holds no tensors: the adapter is empty"):
        model.load_adapter(tmp_path / "b")
    model.load_adapter(write_adapter(tmp_path / "c", linears(model)))
    with pytest.raises(ValueError, match=r"there is an adapter 'default' already; give another adapter_name"):
        model.load_adapter(tmp_path / "c")


def test_adapters_are_told_apart_by_all_of_their_numbers(folders, tmp_path: Path) -> None:  # noqa: F811
    shapes = linears(load(folders("llama")))
    first = write_adapter(tmp_path / "a", shapes)
    digest = read_adapter(first).digest
    assert read_adapter(write_adapter(tmp_path / "b", shapes)).digest == digest
    assert read_adapter(write_adapter(tmp_path / "c", shapes, lora_alpha=9)).digest != digest
    last = f"base_model.model.{list(shapes)[-1]}.lora_B.weight"
    changed = pair(first, list(shapes)[-1])[1].float()
    changed[-1, -1] += 1e-3
    assert read_adapter(write_adapter(tmp_path / "d", shapes, tensors={last: changed})).digest != digest
