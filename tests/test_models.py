from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.models.families import FAMILIES
from llmq.models.load import GenericFamily, SourceModel, discover_family, materialize, open_model

TinyModel = Callable[..., Path]
FAMILY_NAMES = [family.name for family in FAMILIES]
TEXT = "def parse_args(self, args=None, namespace=None):"


def nothing(_: str) -> None:
    """A log nobody reads."""


def logits(source: SourceModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the text model, its decoder and head loaded for the while."""
    with contextlib.ExitStack() as stack:
        for path in (source.family.decoder, source.head_name):
            stack.enter_context(materialize(source.model.get_submodule(path), path, source.reader))
        return source.model(ids).logits


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A tiny llama that the test may damage."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "llama")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- open_model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILY_NAMES, "gpt_neox"])
def test_open_model_computes_what_transformers_computes(tiny_model: TinyModel, family: str, tied: bool) -> None:
    path = tiny_model(family, tied=tied)
    source = open_model(path)
    assert source.tied is tied
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in source.model.parameters())
    ids = source.tokenizer(TEXT, return_tensors="pt").input_ids
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = reference(ids).logits
    # The same modules in the same order on the same numbers: nothing may differ.
    assert torch.equal(logits(source, ids), want)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert source.parameter_count == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_blocks_and_linears_of_every_family(tiny_model: TinyModel, family: str) -> None:
    source = open_model(tiny_model(family))
    assert source.family.name == family
    assert source.block_names == [f"{source.family.blocks}.{i}" for i in range(2)]
    assert source.max_positions == 512
    for i, name in enumerate(source.block_names):
        linears = source.block_linears(i)
        assert list(linears) == [linear for group in source.family.linear_groups for linear in group]
        for linear, shape in linears.items():
            assert source.reader.shape(f"{name}.{linear}.weight") == shape


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tiny_models_have_logits_that_are_neither_flat_nor_certain(tiny_model: TinyModel, family: str) -> None:
    source = open_model(tiny_model(family))
    p = logits(source, source.tokenizer(TEXT, return_tensors="pt").input_ids).softmax(-1)
    entropy = float(-(p * p.log()).sum(-1).mean())
    assert 0.5 < entropy < 5  # nats; a uniform choice among the 384 tokens has 5.95


def test_tiny_models_are_reproducible(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", "gemma3", str(out), "--seed", "0"])
    load_script("make_tiny_model").main()
    assert capsys.readouterr().out == f"{out}\n"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tiny_model("gemma3") / name).read_bytes()


def test_sdpa_is_used_where_the_architecture_has_it(tiny_model: TinyModel) -> None:
    # Gemma 2 caps its attention logits, which sdpa cannot do: transformers then takes eager.
    used = {family: open_model(tiny_model(family)).model.config._attn_implementation for family in ("gemma3", "gemma2")}
    assert used == {"gemma3": "sdpa", "gemma2": "eager"}


def test_config_keeps_the_dtype_of_the_folder(folder: Path) -> None:
    edit_config(folder, dtype="bfloat16")
    assert open_model(folder).config.dtype == torch.bfloat16


def test_tied_name_reads_the_stored_matrix(tiny_model: TinyModel) -> None:
    source = open_model(tiny_model("gemma3"))
    assert "lm_head.weight" not in source.reader.names()
    assert "lm_head.weight" in source.reader
    assert torch.equal(source.reader.tensor("lm_head.weight"), source.reader.tensor("model.embed_tokens.weight"))


def test_tied_copy_in_the_files_is_accepted_and_another_matrix_refused(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ties .*lm_head.weight.* two different matrices; set tie_word_embeddings"):
        open_model(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_model(folder).tied


def test_unused_tensors_are_listed(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.mtp.weight": torch.zeros(3)}))
    assert open_model(folder).unused == ["model.mtp.weight"]


CHATML = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}{{ end }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "eos", "chat"),
    [
        (None, 1, False),
        (CHATML.replace("{{ end }}", "<eos>"), 1, True),
        (CHATML.replace("{{ end }}", "{{ eos_token }}"), 1, True),
        (CHATML.replace("{{ end }}", "<unk>"), [1, 3], True),  # stops at the end of a turn too
        (CHATML.replace("{{ end }}", "<unk>"), 1, False),  # a base model with its sibling's template
        ("{{ raise_exception('no') }}", 1, False),
    ],
)
def test_chat_models_stop_where_their_template_ends_a_turn(folder: Path, template: Any, eos: Any, chat: bool) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    assert open_model(folder).is_chat is chat


# --- open_model: errors ---------------------------------------------------------------------------------------------


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json: is it the folder of a Hugging Face model\?"):
        open_model(tmp_path)


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON .* fetch it again"):
        open_model(folder)


def test_quantized_model_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"already quantized by gptq .* dequantize it first"):
        open_model(folder)


@pytest.mark.parametrize("extra", [{}, {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}])
def test_unknown_model_type(folder: Path, extra: dict[str, Any]) -> None:
    (folder / "configuration_x.py").write_text("raise SystemExit('remote code ran')")
    edit_config(folder, model_type="nonesuch", **extra)
    wanted = "auto_map.*never runs.*" if extra else "model_type 'nonesuch'.*"
    with pytest.raises(ValueError, match=rf"(?s){wanted}Families with a row: llama, mistral"):
        open_model(folder)


def test_config_with_impossible_numbers(folder: Path) -> None:
    edit_config(folder, hidden_size=-48)
    with pytest.raises(ValueError, match=r"llama"):
        open_model(folder)


def test_model_without_a_head_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="t5", architectures=["T5Model"])
    with pytest.raises(ValueError, match=r"no causal LM can be made of this t5 config"):
        open_model(folder)


def test_shape_that_disagrees_with_the_config(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    wanted = r"model.layers.0.mlp.gate_proj.weight has shape \[112, 48\], the config asks for \[96, 48\]"
    with pytest.raises(ValueError, match=wanted):
        open_model(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: [t.pop(f"model.layers.1.{name}_layernorm.weight") for name in ("input", "post_attention")]
    )
    with pytest.raises(
        ValueError, match=r"lacks 2 of the model's tensors: model.layers.1.input_layernorm.weight, model"
    ):
        open_model(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(
        ValueError, match=r"up_proj.weight is torch.int8; an unquantized model has .*Dequantize it first"
    ):
        open_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).* llmq reads safetensors"):
        open_model(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        open_model(folder)


def test_no_blocks(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=0)
    with pytest.raises(ValueError, match=r"model.layers holds no decoder blocks: check num_hidden_layers"):
        open_model(folder)


def test_missing_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    source = open_model(folder)
    with pytest.raises(ValueError, match=r"llama has no tokenizer that transformers can load"):
        _ = source.tokenizer


# --- generic discovery ----------------------------------------------------------------------------------------------


def test_architecture_without_a_row(tiny_model: TinyModel) -> None:
    source = open_model(tiny_model("gpt_neox"))
    assert isinstance(source.family, GenericFamily)
    assert source.family.name == "generic:gpt_neox"
    assert source.block_names == ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    assert list(source.block_linears(0).items()) == [
        ("attention.query_key_value", (144, 48)),
        ("attention.dense", (48, 48)),
        ("mlp.dense_h_to_4h", (112, 48)),
        ("mlp.dense_4h_to_h", (48, 112)),
    ]
    assert source.family.linear_groups[0] == ("attention.query_key_value",)
    assert (source.family.tails, source.family.smooth_pairs) == ({}, ())


def test_blocks_without_linears_are_named() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=16, n_head=2, vocab_size=32)
    model = AutoModelForCausalLM.from_config(config)  # its projections are Conv1D
    with pytest.raises(
        ValueError, match=r"'gpt2' .*no list of modules.*transformer.h of 2 GPT2Block.* Families with a row"
    ):
        discover_family(model, "gpt2")


def test_blocks_that_differ_are_named() -> None:
    linear = torch.nn.Linear
    blocks = [torch.nn.ModuleDict({"up": linear(2, 2)}), torch.nn.ModuleDict({"gate": linear(2, 2)})]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
    with pytest.raises(ValueError, match=r"blocks differ: layers.0 holds up, layers.1 holds gate"):
        discover_family(model, "odd")


# --- materialize ----------------------------------------------------------------------------------------------------


def test_materialize_loads_one_block_and_returns_it_to_meta(tiny_model: TinyModel) -> None:
    source = open_model(tiny_model("qwen3"))
    before = dict(source.model.named_parameters())
    with materialize(source.block(0), source.block_names[0], source.reader, dtype=torch.bfloat16) as block:
        assert block is source.block(0)
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        want = source.reader.tensor("model.layers.0.self_attn.k_norm.weight").bfloat16()
        assert torch.equal(block.self_attn.k_norm.weight, want)
        assert all(p.is_meta for p in source.block(1).parameters())
    after = dict(source.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_materialize_returns_to_meta_after_an_error(tiny_model: TinyModel) -> None:
    source = open_model(tiny_model("llama"))
    with pytest.raises(RuntimeError, match="inside"), materialize(source.model, "", source.reader):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match=r"holds no tensor nowhere\.\w+"):
        materialize(source.block(0), "nowhere", source.reader).__enter__()
    assert all(p.is_meta for p in source.model.parameters())


def test_materialize_keeps_tied_parameters_one(tiny_model: TinyModel) -> None:
    source = open_model(tiny_model("gemma3"))
    with materialize(source.model, "", source.reader) as model:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
