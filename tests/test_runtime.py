import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq import CalibConfig, QuantScheme, quantize_model, set_activation_bits
from llmq.config import BITS
from llmq.qtensor import minmax_grid, quantize
from llmq.runtime.hf import LlmqConfig, register
from llmq.runtime.qlinear import QEmbedding, QLinear, TiedHead

SCHEME = QuantScheme(4, 32)


def filled(cls, n, k, scheme, **options):
    t = quantize(W := torch.randn(n, k, generator=torch.Generator().manual_seed(1)), *minmax_grid(W, scheme), scheme)
    module = cls(k, n, scheme, **options) if cls is QLinear else cls(n, k, scheme, **options)
    module.set_qtensor(t)
    return module, t


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runtime") / "gemma3"
    calib = CalibConfig(calib="stdlib", nsamples=4, seqlen=48)
    return quantize_model(tiny_model("gemma3"), SCHEME, output=out, calib=calib).folder


def test_a_published_folder_has_the_modes_of_any_other(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".llmq-packed":
            assert path.stat().st_mode == (tmp_path / "file").stat().st_mode, path.name
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("bits", BITS)
def test_qlinear_with_float_activations_is_the_dequantized_linear(bits):
    module, t = filled(QLinear, 20, 70, QuantScheme(bits, 32), bias=True, activation_bits=16)
    with torch.no_grad():
        module.bias.copy_(torch.arange(20.0))
    x = torch.randn(2, 3, 70)
    # fp32 sums of 70 products in another order.
    assert torch.allclose(module(x), x @ t.dequantize().T + module.bias, rtol=1e-5, atol=70 * 2**-22)


def test_qlinear_keeps_the_dtype_of_its_input():
    module, _ = filled(QLinear, 20, 64, SCHEME, bias=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert module(torch.randn(4, 64, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_dequantized_linear(dtype):
    module, t = filled(QLinear, 1100, 80, SCHEME, bias=False)  # more rows than are dequantized at once
    module.column_order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    up = torch.randn(2, 3, 1100, generator=torch.Generator().manual_seed(4)).to(dtype)
    out = module(x)
    assert out.dtype == dtype
    out.backward(up)
    expected = torch.empty(2, 3, 80)
    expected[..., module.column_order] = up.float() @ t.dequantize()
    # fp32 sums of 1100 products in another order, rounded to the dtype at the end.
    eps = torch.finfo(dtype).eps
    assert (x.grad.float() - expected).abs().max() <= (1100**0.5 * 2**-24 + eps) * expected.abs().max()
    with torch.no_grad():
        assert torch.equal(module(x), out), "the same numbers with and without gradients"


def test_an_adapter_on_a_quantized_base_learns(folder):
    """LoRA by hand: the loss on a text falls, and only the adapters change."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    before = {name: m.qtensor().digest() for name, m in model.named_modules() if isinstance(m, QLinear)}
    model.requires_grad_(False)
    adapters = []
    for block in model.get_decoder().layers:
        base = block.mlp.up_proj
        lora = torch.nn.Sequential(
            torch.nn.Linear(base.in_features, 4, bias=False), torch.nn.Linear(4, base.out_features, bias=False)
        )
        torch.nn.init.zeros_(lora[1].weight)
        adapters += lora.parameters()
        base.register_forward_hook(lambda _m, args, out, lora=lora: out + lora(args[0]))
    ids = torch.arange(3, 40)[None]
    optimizer = torch.optim.Adam(adapters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert {name: m.qtensor().digest() for name, m in model.named_modules() if isinstance(m, QLinear)} == before


def test_state_dict_gives_the_checkpoints_tensors_back():
    module, t = filled(QLinear, 20, 70, SCHEME, bias=False)
    state = module.state_dict()
    assert set(state) == {"qweight", "scales", "zeros"}
    other = QLinear(70, 20, SCHEME, bias=False)
    other.load_state_dict(state)
    assert other.qtensor().digest() == t.digest()
    other(torch.randn(1, 70))  # packs
    other.load_state_dict(state)  # and again into a packed module
    assert other.qtensor().digest() == t.digest()
    assert copy.deepcopy(module).qtensor().digest() == t.digest()


def test_a_matrix_is_in_memory_once():
    module, _ = filled(QLinear, 20, 70, SCHEME, bias=False)
    assert list(module.buffers()) == []
    embedding, _ = filled(QEmbedding, 50, 64, SCHEME)
    head = TiedHead(embedding)
    assert head.state_dict() == {}
    assert head(torch.randn(1, 64)).shape == (1, 50)


def test_embedding_rows_and_scale():
    module, t = filled(QEmbedding, 50, 64, SCHEME, scale=8.0)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(module(ids), t.dequantize()[ids] * 8)
    module.reset_output_scale(torch.bfloat16)
    assert module(ids).dtype == torch.bfloat16


def test_wrong_matrix_is_refused():
    module, _ = filled(QLinear, 20, 64, SCHEME, bias=False)
    W = torch.randn(21, 64)
    with pytest.raises(ValueError, match=r"matrix is \(21, 64\) in w4g32, the module holds \(20, 64\) in w4g32"):
        module.set_qtensor(quantize(W, *minmax_grid(W, SCHEME), SCHEME))


def test_save_pretrained_writes_the_same_bytes(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    first = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    again = {k: v for f in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(f).items()}
    assert set(first) == set(again)
    assert all(torch.equal(first[k], again[k]) and first[k].dtype == again[k].dtype for k in first)
    assert not any(k.startswith("lm_head") for k in again), "the tied head is stored once"
    ids = torch.arange(3, 30)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)


def test_dtype_and_device_map(folder):
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        for model in (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
            AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").to(torch.bfloat16),
        ):
            logits = model(ids).logits
            assert logits.dtype == torch.bfloat16
            # bf16 keeps 8 bits: a few times 2**-8 after some layers.
            assert (logits.float() - base).norm() < 0.1 * base.norm()
        scale = next(m for m in model.modules() if isinstance(m, QLinear)).qtensor().scale
        assert scale.dtype == torch.float16
    with pytest.raises(ValueError, match="device_map asks for cuda"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cuda"})


def test_half_precision_leaves_scales_alone(folder):
    first = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items() if k.endswith("scales")}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        state = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
        assert all(torch.equal(state[k], v) for k, v in first.items())


def test_tied_weights_stay_tied(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.lm_head, TiedHead)
    assert isinstance(model.model.embed_tokens, QEmbedding)
    model.tie_weights()
    assert isinstance(model.lm_head, TiedHead)


def test_generate_is_the_same_with_and_without_cache(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_activation_bits(model, 16)
    ids = torch.arange(3, 12)[None]
    with_cache = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    without = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_pipeline_of_transformers(folder):
    from transformers import pipeline

    out = pipeline("text-generation", model=str(folder), tokenizer=str(folder))("import", max_new_tokens=4)
    assert out[0]["generated_text"].startswith("import")


def test_fresh_process_needs_only_import_llmq(folder):
    code = (
        "import llmq, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(folder)!r}); print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "QLinear"


def test_registering_twice_is_harmless():
    register()
    assert LlmqConfig(bits=4, future_option=1).to_dict()["future_option"] == 1


def damaged(folder, tmp_path, change):
    import shutil

    out = tmp_path / "damaged"
    shutil.copytree(folder, out)
    change(out)
    return out


def truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def drop(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors.pop("model.layers.0.mlp.up_proj.scales")
    save_file(tensors, file, {"format": "pt"})


def reshape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"] = "w8g32"
    (folder / "config.json").write_text(json.dumps(config))


def rename_module(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.99.mlp.up_proj"] = "w4g32"
    (folder / "config.json").write_text(json.dumps(config))


def new_version(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "truncated or damaged|incomplete|Error while deserializing"),
        (drop, "tensors are missing, among them model.layers.0.mlp.up_proj.scales"),
        (reshape, r"up_proj.qweight in .* config.json asks for"),
        (rename_module, "names model.layers.99.mlp.up_proj, which Gemma3ForCausalLM does not have"),
        (new_version, "format_version is 2, this llmq reads 1; update llmq"),
    ],
)
def test_damaged_folders_give_an_error(folder, tmp_path, change, message):
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(damaged(folder, tmp_path, change))


def test_activation_bits_need_quantized_linears(folder):
    with pytest.raises(ValueError, match="activation_bits is 4; known: 8, 16"):
        set_activation_bits(AutoModelForCausalLM.from_pretrained(folder), 4)
    with pytest.raises(ValueError, match="a Linear without quantized linears has no activation bits"):
        set_activation_bits(torch.nn.Linear(2, 2), 8)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("head_bits", [16, 8])
def test_a_loaded_model_keeps_no_shard_mapped(tiny_model, tmp_path, head_bits):
    """A norm of a few hundred bytes, left where the file is mapped, would keep all of the file's pages in memory."""
    folder = quantize_model(
        tiny_model("gemma3"), QuantScheme(4, 32), method="rtn", head_bits=head_bits, output=tmp_path / "out"
    ).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert [line for line in mapped if line.endswith(".safetensors")] == []
    assert model.get_output_embeddings() is not None
