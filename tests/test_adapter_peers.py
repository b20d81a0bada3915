"""LoRA with the packages it comes from: trained by peft and transformers' Trainer on our integers, run natively.

pip install peft
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import TARGETS
from test_native import dequantized, folders, graph_logits, ids_of, load  # noqa: F401

import llmq
from llmq.runtime.causal_lm import adopt, native_decoder
from llmq.runtime.qlinear import QLinear

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing`"),
    # Warnings of the packages about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@pytest.fixture(autouse=True)
def _patched() -> None:
    llmq.patch_peft()
    llmq.patch_peft()


@torch.no_grad()
def natively(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    decoder = native_decoder(model)
    return [decoder.forward([r], [decoder.new_sequence(kv_dtype=torch.float32)], output="all") for r in rows]


def check_same(actual: list[torch.Tensor], expected: list[torch.Tensor], base: list[torch.Tensor]) -> None:
    """fp32 in another order, and 30 times less than what the adapter does."""
    for a, e, b in zip(actual, expected, base, strict=True):
        limit = 1e-4 * float(e.abs().max())
        assert (a - e).abs().max() <= limit
        assert (b - e).abs().max() > 30 * limit


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 3, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2}},
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"mlp.up_proj": 3, "v_proj": 20}, "layers_to_transform": [0, 2]},
        {"r": 6, "target_modules": r".*\.mlp\.(gate|down)_proj"},
    ],
    ids=["plain", "rslora and ranks", "alphas and some layers", "by expression"],
)
def test_folders_of_peft_mean_what_peft_computes(folders, options: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    rows, source = ids_of(40, 9), folders("gemma3")
    trained = load(source)
    llmq.set_activation_bits(trained, 16)
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": list(TARGETS), "init_lora_weights": False, **options})
    wrapped = peft.get_peft_model(trained, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    inner = wrapped.get_base_model()
    expected = [graph_logits(inner, r) for r in rows]
    model = load(source)
    llmq.set_activation_bits(model, 16)
    base = natively(model, rows)
    model.load_adapter(tmp_path / "adapter")
    check_same(natively(model, rows), expected, base)
    # The other way round: peft merges it into plain weights.
    plain = peft.PeftModel.from_pretrained(dequantized(load(source), source), tmp_path / "adapter").merge_and_unload()
    check_same(natively(model, rows), [graph_logits(plain, r) for r in rows], base)
    check_same(natively(adopt(plain), rows), expected, base)
    opened = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # transformers finds the base
    assert opened.active_adapters() == ["default"]
    assert native_decoder(opened).adapter == native_decoder(model).adapter
    with pytest.raises(ValueError, match=r"cannot be merged into a quantized linear.*load_adapter"):
        wrapped.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trainer_trains_an_adapter_that_runs_natively(folders, dtype: torch.dtype, tmp_path: Path) -> None:  # noqa: F811
    source = folders("llama")
    model = load(source)
    before = {name: m.qtensor().digest() for name, m in model.named_modules() if isinstance(m, QLinear)}
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    rows = torch.stack(ids_of(32, 32))
    data = [{"input_ids": row, "labels": row} for row in rows] * 12
    arguments = transformers.TrainingArguments(
        **{"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "num_train_epochs": 1},
        **{"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"},
    )
    trainer = transformers.Trainer(model=wrapped, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    assert {n.removesuffix(".base_layer"): m.qtensor().digest() for n, m in model.named_modules()
            if isinstance(m, QLinear)} == before  # fmt: skip
    trainer.save_model(str(tmp_path / "adapter"))

    runs = load(source)
    for m in (runs, model):
        llmq.set_activation_bits(m, 16)
    base = natively(runs, list(rows))
    runs.load_adapter(tmp_path / "adapter")
    stored = next(iter(runs.__dict__["llmq_adapters"].values()))
    assert {m.a.dtype for m in stored.matrices.values()} == {dtype}
    exact = copy.deepcopy(wrapped).float().eval().get_base_model()  # bf16 layers of peft would round A x
    check_same(natively(runs, list(rows)), [graph_logits(exact, r) for r in rows], base)
    plain = dequantized(load(source), source)
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    check_same(natively(runs, list(rows)), [graph_logits(merged, r) for r in rows], base)
    llmq.set_activation_bits(runs, 8)
    with torch.no_grad():
        assert float(runs(input_ids=rows, labels=rows).loss) < losses[0] - 0.3, "int8 activations learn nothing anew"


def test_the_readme_trains_an_adapter(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    source, [row] = folders("llama"), ids_of(32)
    told = {"learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_strategy": "no", "num_train_epochs": 4}
    names = {
        **{"llmq": llmq, "peft": peft, "transformers": transformers, "model": load(source)},
        "arguments": transformers.TrainingArguments(output_dir="run", **told),
        "data": [{"input_ids": row, "labels": row}] * 32,
    }
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "Trainer" in b]
    exec(block, names)  # noqa: S102
    model, batch = load(source), {"input_ids": row[None], "labels": row[None]}
    with torch.no_grad():
        before = float(model(**batch).loss)
        model.load_adapter("adapter-folder")
        assert float(model(**batch).loss) < before - 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        ({"use_dora": True}, "use_dora is True"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens.* is no lora_A.weight"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_kinds_of_peft_are_refused(tiny_model, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Made on a model that is not quantized, as most are."""
    plain = load(tiny_model("llama", blocks=3))
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    model = adopt(load(tiny_model("llama", blocks=3)))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "adapter")


def test_peft_layers_in_the_model_stay_with_transformers(folders, tmp_path: Path) -> None:  # noqa: F811
    model = load(folders("llama"))
    llmq.set_activation_bits(model, 16)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "mine")
    assert model.active_adapters() == ["mine"]
    ids = ids_of(9)[0][None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        model.disable_adapters()
        plain = model(input_ids=ids).logits
        model.enable_adapters()
    assert (adapted - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path / "mine")
    other = load(folders("llama"))
    llmq.set_activation_bits(other, 16)
    other.load_adapter(tmp_path / "mine")
    with torch.no_grad():
        check_same([other(input_ids=ids).logits], [adapted], [plain])
