"""Folders of other tools open on llmq's kernels with their integers untouched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_formats import random_qtensor
from transformers import LlamaConfig

import llmq
from llmq import kernels
from llmq.config import QuantScheme
from llmq.dialects import open_quantized
from llmq.formats import FORMATS, Inexact, gptq
from llmq.packing import pack_words
from llmq.qtensor import QTensor
from llmq.runtime.causal_lm import native_decoder
from llmq.runtime.parts import Unsupported
from llmq.runtime.qlinear import QEmbedding, QLinear

SYM, ASYM = QuantScheme(4, 32, sym=True), QuantScheme(4, 32)
IDS = torch.arange(3, 20)[None]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
CT_ARGS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def ct(fmt: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**CT_ARGS, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


# (row of FORMATS, scheme, quantization_config)
CASES: dict[str, tuple[str, QuantScheme, dict[str, Any]]] = {
    "gptq v1": ("gptq", SYM, GPTQ),
    "gptq v1, asymmetric": ("gptq", ASYM, {**GPTQ, "sym": False, "checkpoint_format": "gptq"}),
    "gptq v2": ("gptq_v2", ASYM, {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}),
    # Published so: the config says version 1 (or nothing), the zeros are those of version 2.
    "gptq v2 that says gptq": ("gptq_v2", SYM, {**GPTQ, "checkpoint_format": "gptq"}),
    "gptq 3 bits": ("gptq", QuantScheme(3, -1, sym=True), {**GPTQ, "bits": 3, "group_size": -1}),
    "gptq 8 bits": ("gptq", QuantScheme(8, 64, sym=True), {**GPTQ, "bits": 8, "group_size": 64}),
    "awq": ("awq", ASYM, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "awq gemv": ("awq_gemv", ASYM, {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMV"}),
    "ct": ("pack-quantized", SYM, ct("pack-quantized")),
    "ct asymmetric": ("pack-quantized", ASYM, ct("pack-quantized", symmetric=False)),
    "ct 3 bits": ("pack-quantized", QuantScheme(3, 32, True), ct("pack-quantized", num_bits=3)),
    "ct 3 bits, older": ("pack-quantized-padded", QuantScheme(3, 32, True), ct("pack-quantized", num_bits=3)),
    "ct int8": (
        "int-quantized",
        QuantScheme(8, -1, True),
        ct("int-quantized", num_bits=8, strategy="channel", group_size=None),
    ),
    "mlx": ("mlx", SYM, {"group_size": 32, "bits": 4}),
    "mlx asymmetric": ("mlx", QuantScheme(2, 64), {"group_size": 64, "bits": 2}),
}


def make_original(folder: Path) -> Path:
    """A tiny llama whose linears are multiples of 64 wide, as these formats want them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("original"))


def linears(folder: Path) -> list[str]:
    return sorted(n.removesuffix(".weight") for n in load_file(folder / "model.safetensors") if "_proj.weight" in n)


def write(
    original: Path, folder: Path, row: str, scheme: QuantScheme, block: dict[str, Any], *, extra: tuple[str, ...] = ()
) -> dict[str, QTensor]:
    """The folder that a tool would leave; what it holds, by module. Random codes: nothing rounds them again."""
    folder.mkdir()
    tensors = load_file(original / "model.safetensors")
    held: dict[str, QTensor] = {}
    for name in [*linears(original), *extra]:
        t = random_qtensor(*tensors.pop(f"{name}.weight").shape, scheme)
        held[name] = QTensor(t.q, t.scale * 0.05, t.zero, scheme)
        tensors.update({f"{name}.{key}": value for key, value in FORMATS[row].pack(held[name]).items()})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    config["quantization" if row == "mlx" else "quantization_config"] = block
    (folder / "config.json").write_text(json.dumps(config))
    return held


def dense_logits(original: Path, held: dict[str, torch.Tensor]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, weight in held.items():
        model.get_submodule(name).weight.data.copy_(weight)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def check_logits(model: Any, expected: torch.Tensor) -> None:
    llmq.set_activation_bits(model, 16)
    with torch.no_grad():
        found = model(IDS).logits
    # The same fp32 products in another order: a few 2**-24 each, over two layers. A wrong scale shows at 1e-2.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_integers_are_untouched_and_the_model_is_the_same(case: str, original: Path, tmp_path: Path) -> None:
    row, scheme, block = CASES[case]
    held = write(original, tmp_path / "x", row, scheme, block)
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    for name, t in held.items():
        module = model.get_submodule(name)
        assert isinstance(module, QLinear)
        assert module.qtensor().digest() == t.digest(), name
    if kernels.compiled() is not None:
        native_decoder(model)  # raises Unsupported if it could not
    check_logits(model, dense_logits(original, {name: t.dequantize() for name, t in held.items()}))
    again = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")  # from the packed cache
    assert all(again.get_submodule(name).qtensor().digest() == t.digest() for name, t in held.items())


def test_saved_again_it_is_an_llmq_folder(original: Path, tmp_path: Path) -> None:
    held = write(original, tmp_path / "x", *CASES["gptq v1"])
    llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x").save_pretrained(tmp_path / "y")
    found = open_quantized(tmp_path / "y")
    assert found.dialect == "llmq"
    assert {name: m.read().digest() for name, m in found.matrices.items()} == {n: t.digest() for n, t in held.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "y", dtype=torch.float32)
    check_logits(model, dense_logits(original, {name: t.dequantize() for name, t in held.items()}))


def shuffled(original: Path, folder: Path, shared: bool) -> dict[str, torch.Tensor]:
    """A desc_act folder, linears with one input in one order or each in its own; the dense weights of its linears."""
    held = write(original, folder, *CASES["gptq v1"])
    path = folder / "model.safetensors"
    tensors, weights = load_file(path), {}
    inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name, t in held.items():
        first = inputs.get(name.rpartition(".")[2], "") if shared else ""
        seed = sum(f"{name.rpartition('.')[0]}.{first}".encode()) if first else sum(name.encode())
        shuffle = torch.randperm(t.shape[1], generator=torch.Generator().manual_seed(seed))
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][shuffle]
        tensors[f"{name}.qweight"] = pack_words(t.q[:, shuffle].contiguous(), 4).T.contiguous()
        weights[name] = t.dequantize()[:, shuffle]
    save_file(tensors, path, {"format": "pt"})
    return weights


@pytest.mark.parametrize("shared", [True, False])
def test_desc_act_is_carried_as_a_column_order(shared: bool, original: Path, tmp_path: Path) -> None:
    """Solvers order by a Hessian, which linears with one input share: such models run on the native decoder."""
    weights = shuffled(original, tmp_path / "x", shared)
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        rounded = model(IDS).logits  # int8 activations, of groups in the file's order
    expected = dense_logits(original, weights)
    # A scale of the wrong group would be off by as much as the logits are large.
    assert (rounded - expected).norm() <= 0.05 * expected.norm()
    check_logits(model, expected)
    if kernels.compiled() is not None:
        if shared:
            native_decoder(model)  # raises Unsupported if it could not
        else:
            with pytest.raises(Unsupported, match="with one input have their columns in different orders"):
                native_decoder(model)
    with pytest.raises(ValueError, match="columns in another order|not serializable"):
        model.save_pretrained(tmp_path / "y")
    found = open_quantized(tmp_path / "x").matrices
    assert all(torch.equal(found[name].dequantize(), weight) for name, weight in weights.items())


def test_quantized_and_tied_embedding_of_mlx(original: Path, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    shutil.copytree(original, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(tied / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    held = write(tied, tmp_path / "x", *CASES["mlx"], extra=("model.embed_tokens",))
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert isinstance(model.get_input_embeddings(), QEmbedding)
    check_logits(model, dense_logits(tied, {name: t.dequantize() for name, t in held.items()}))


def test_quantized_head_of_gptq(original: Path, tmp_path: Path) -> None:
    held = write(original, tmp_path / "x", "gptq", SYM, {**GPTQ, "lm_head": True}, extra=("lm_head",))
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    check_logits(model, dense_logits(original, {name: t.dequantize() for name, t in held.items()}))


def test_files_of_mlx_itself_are_refused_or_rounded_with_a_report(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """mlx rounds scale and bias one by one: bias is no whole multiple of scale any more."""
    write(original, tmp_path / "x", *CASES["mlx"])
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".biases"):
            tensors[name] = (tensors[name].float() * (1 + 2**-9)).half()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(Inexact, match=r"_proj: \d+ of \d+ offsets are no whole multiple .*inexact='requantize'"):
        llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x", inexact="requantize")
    assert "codes kept, offsets moved by up to 0.0" in caplog.text
    assert model.get_submodule("model.layers.0.mlp.up_proj").scheme == ASYM


def test_transformers_own_class_after_patching(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        for method in ("gptq", "awq", "compressed-tensors"):
            monkeypatch.setitem(table, method, table[method])  # put back afterwards
    llmq.patch_transformers()
    for i, case in enumerate(("gptq v1", "awq", "ct")):
        row, scheme, block = CASES[case]
        held = write(original, tmp_path / str(i), row, scheme, block)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i), dtype=torch.float32)
        check_logits(model, dense_logits(original, {name: t.dequantize() for name, t in held.items()}))


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def damage(**changes: Any) -> Change:
    def change(tensors: dict[str, torch.Tensor], block: dict[str, Any]) -> None:
        for name, value in changes.items():
            if name == "drop":
                tensors.pop(value)
            elif name == "cut":
                tensors[value] = tensors[value][:-1].contiguous()
            else:
                block[name] = value

    return change


def read_all(folder: Path) -> None:
    for m in open_quantized(folder).matrices.values():
        m.read()


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gptq v1", damage(bits=5), "bits is 5; known: 2, 3, 4, 8"),
        ("gptq v1", damage(bits="4"), "bits is '4'; a whole number was expected"),
        ("gptq v1", damage(group_size=64), "4 groups of scales for 128 columns; group_size 64 in the config makes 2"),
        ("gptq v1", damage(group_size=0), "makes none"),
        ("gptq v1", damage(checkpoint_format="marlin"), "known: gptq, gptq_v2"),
        ("gptq v1", damage(drop=f"{UP}.scales"), "up_proj has qweight but no scales"),
        ("gptq v1", damage(cut=f"{UP}.qweight"), "up_proj"),
        ("gptq v1", damage(cut=f"{UP}.g_idx"), "g_idx has shape"),
        ("awq", damage(version="marlin"), "known: gemm, gemv"),
        ("awq", damage(drop=f"{UP}.qzeros"), "no tensor .*qzeros"),
        ("ct", damage(format="marlin-24"), "known: pack-quantized"),
        ("ct", damage(config_groups={}), "no target of config_groups names it"),
        ("ct", damage(cut=f"{UP}.weight_packed"), "up_proj: weight_packed is .* weight_shape says"),
        ("mlx", damage(bits=6), "bits is 6; known"),
        ("mlx", damage(drop=f"{UP}.biases"), "lacks .*biases"),
        ("mlx", damage(mode="mxfp4"), "mode 'mxfp4'; llmq reads 'affine'"),
    ],
)
def test_damaged_folders_are_refused(case: str, change: Change, message: str, original: Path, tmp_path: Path) -> None:
    row, scheme, block = CASES[case]
    block = json.loads(json.dumps(block))
    write(original, tmp_path / "x", row, scheme, block)
    path, config = tmp_path / "x" / "model.safetensors", json.loads((tmp_path / "x" / "config.json").read_text())
    tensors = load_file(path)
    change(tensors, config["quantization" if row == "mlx" else "quantization_config"])
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / "x")


def test_zero_points_of_both_versions_in_one_folder(original: Path, tmp_path: Path) -> None:
    held = write(original, tmp_path / "x", *CASES["gptq v1"])
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.qzeros"] = gptq.pack(held[UP], version=2)["qzeros"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="follow version 1, those of model.layers.0.mlp.up_proj version 2"):
        open_quantized(tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "hidden_size",
            "x",
            r"config.json \(model_type 'llama'\): Validation error|config.json: no causal LM can be made of",
        ),
        ("hidden_act", "x", r"no causal LM can be made of this llama config: KeyError: 'x'"),
        ("num_attention_heads", -1, r"x: model.layers.0.self_attn.q_proj|config.json"),
        ("model_type", "y", r"x.*model type `y`"),
        ("num_hidden_layers", 1000, r"config.json says 1000 layers"),
    ],
)
def test_what_transformers_stumbles_over_is_an_error_that_names_the_folder(
    key: str,
    value: Any,
    message: str,
    original: Path,
    tmp_path: Path,
) -> None:
    write(original, tmp_path / "x", "gptq", SYM, GPTQ)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=message) as caught:
        llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


def test_a_config_of_endless_layers_is_refused_before_any_is_made(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "deep"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**30}))
    with pytest.raises(ValueError, match=r"deep: config.json says 10{30} layers, the files hold \d+ tensors: damaged"):
        llmq.AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_index_of_a_dense_folder_names_it_too(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "a.safetensors")
    (tmp_path / "x" / "model.safetensors.index.json").write_text('{"weight_map": 0}')
    with pytest.raises(ValueError, match=r"x cannot be opened: AttributeError: 'int' object") as caught:
        llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_pipe_is_not_waited_for(original: Path, tmp_path: Path) -> None:
    write(original, tmp_path / "x", "gptq", SYM, GPTQ)
    (tmp_path / "x" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "x" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is no file but a folder, pipe or device"):
        llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "x")


def test_wrong_arguments_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inexact is .never.; known: refuse"):
        llmq.AutoModelForCausalLM.from_pretrained(tmp_path, inexact="never")
    with pytest.raises(ValueError, match=f"Unrecognized model in .*{tmp_path.name}"):
        llmq.AutoModelForCausalLM.from_pretrained(tmp_path)
