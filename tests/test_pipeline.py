"""The whole line on tiny random models: quantize, publish, load as a user would, compare."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq import AWQConfig, CalibConfig, GPTQConfig, QuantScheme, RecipeConfig, quantize_model, set_activation_bits
from llmq.checkpoint import read_qtensor
from llmq.models.families import FAMILIES
from llmq.pipeline import default_output
from llmq.solvers import METHODS

FAMILY_NAMES = [f.name for f in FAMILIES]
CALIB = CalibConfig(calib="stdlib", nsamples=4, seqlen=48)
SCHEME = QuantScheme(4, 32)


def quantized(tiny_model, tmp_path, family="llama", scheme=SCHEME, **options):
    options.setdefault("calib", CALIB)
    return quantize_model(tiny_model(family), scheme, output=tmp_path / "out", **options)


def load(folder):
    return llmq.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_family_with_every_method(tiny_model, tmp_path, family, method):
    lines = []
    result = quantized(tiny_model, tmp_path, family, method=method, log=lines.append)
    report = json.loads((result.folder / "llmq_report.json").read_text())
    assert report["check"]["matrices"] == len(report["linears"]) + len(report["tables"])
    if METHODS[method].needs_text:
        assert report["check"]["hidden_difference"] < 1e-4
        assert all(row["error"] <= 1.05 * row["error_rtn"] for row in report["linears"])
        assert any("block 1/" in line and "left" in line and "memory" in line for line in lines)
        assert report["calibration"]["tokens_kept"] == 4 * 48
    model = load(result.folder)
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        int8 = model(input_ids=ids).logits
        set_activation_bits(model, 16)
        exact = model(input_ids=ids).logits
        original = llmq.AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)(
            input_ids=ids
        ).logits
    assert (exact - original).norm() < 0.5 * original.norm(), (
        "4 bits keep the logits of even a random model recognisable"
    )
    assert (int8 - exact).norm() < 0.1 * exact.norm()
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 25)


@pytest.mark.parametrize("bits", [8, 3, 2])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_other_bits_and_groups(tiny_model, tmp_path, bits, group_size):
    result = quantized(tiny_model, tmp_path, "gemma3", QuantScheme(bits, group_size, sym=group_size == -1))
    assert torch.isfinite(load(result.folder)(input_ids=torch.arange(3, 20)[None]).logits).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [16, 8, 4])
def test_head_bits(tiny_model, tmp_path, tied, head_bits):
    folder = quantize_model(
        tiny_model("llama", tied=tied), SCHEME, output=tmp_path / "out", calib=CALIB, head_bits=head_bits
    ).folder
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    report = json.loads((folder / "llmq_report.json").read_text())
    assert [t["scheme"] for t in report["tables"]] == [f"w{head_bits}g32{'sym' if head_bits == 8 else ''}"] * (
        0 if head_bits == 16 else 1 if tied else 2
    )
    assert any(name.startswith("lm_head") for name in stored) == (not tied)
    model = load(folder)
    assert torch.isfinite(model(input_ids=torch.arange(3, 20)[None]).logits).all()


def test_activations_of_later_blocks_come_from_quantized_ones(tiny_model, tmp_path):
    """Blocks are calibrated on what the quantized ones before them give."""
    rows = {}
    for bits in (2, 8):
        result = quantize_model(tiny_model("llama"), QuantScheme(bits, 32), output=tmp_path / str(bits), calib=CALIB)
        rows[bits] = {r["name"]: r["error_rtn"] for r in result.report["linears"]}
    model2, model8 = load(tmp_path / "2"), load(tmp_path / "8")
    assert set(rows[2]) == set(rows[8])
    assert model2.config.quantization_config.bits == 2
    assert model8.config.quantization_config.bits == 8


def test_same_seed_same_bytes(tiny_model, tmp_path):
    folders = [
        quantize_model(tiny_model("qwen3"), SCHEME, output=tmp_path / name, calib=CALIB).folder for name in ("a", "b")
    ]
    for file in folders[0].glob("*.safetensors"):
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()


def test_not_true_sequential_and_no_act_order(tiny_model, tmp_path):
    gptq = GPTQConfig(true_sequential=False, act_order=False, grid_steps=0)
    report = quantized(tiny_model, tmp_path, gptq=gptq).report
    assert report["options"]["gptq"]["act_order"] is False
    assert sum(r["error"] for r in report["linears"]) < sum(r["error_rtn"] for r in report["linears"])


def test_the_recipe_sees_both_models_and_judges_on_held_out_windows(tiny_model, tmp_path, monkeypatch):
    """The first linears get the same inputs in both models; those after a quantized one differ, and are repaired."""
    from llmq.solvers import recipe

    seen, solve = {}, recipe.solve

    def spy(name, W, train, held, *rest):
        seen[name] = (train.mean_cross().norm() / train.hessian(name).norm(), train.n_tokens, held.n_tokens)
        return solve(name, W, train, held, *rest)

    monkeypatch.setattr(recipe, "solve", spy)
    rows = quantized(tiny_model, tmp_path).report["linears"]
    differ = {name: float(share) for name, (share, _, _) in seen.items()}
    first = {name for name in differ if ".layers.0.self_attn" in name and "o_proj" not in name}
    assert all((differ[name] == 0) == (name in first) for name in differ)
    assert {(train, held) for _, train, held in seen.values()} == {(3 * 48, 48)}
    assert all(row["held_out"] for row in rows)
    assert any(row["alpha"] > 0 for row in rows)
    assert any(step != "gptq" for row in rows for step, _ in row["losses"])


def test_the_fast_preset_is_plain_gptq(tiny_model, tmp_path):
    rows = quantized(tiny_model, tmp_path, recipe=RecipeConfig("fast")).report["linears"]
    assert all([step for step, _ in row["losses"]] == ["gptq"] and row["alpha"] == 0 for row in rows)


def test_awq_folds_are_reported(tiny_model, tmp_path):
    report = quantized(tiny_model, tmp_path, "gemma2", method="awq", awq=AWQConfig(n_grid=5)).report
    sources = {fold["source"] for fold in report["folds"]}
    assert sources == {"input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"}
    applied = [fold for fold in report["folds"] if fold["applied"]]
    assert applied
    assert all(fold["loss_after"] < fold["loss_before"] for fold in applied)
    assert all(fold["reason"] for fold in report["folds"] if not fold["applied"])


def test_other_files_are_copied_and_the_card_warns(tiny_model, tmp_path):
    folder = quantized(tiny_model, tmp_path).folder
    source = tiny_model("llama")
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    card = (folder / "README.md").read_text()
    assert "import llmq" in card
    assert "random weights" in card


def test_a_model_that_does_not_reproduce_is_not_published(tiny_model, tmp_path, monkeypatch):
    import llmq.pipeline

    real = llmq.pipeline.matrix_tensors

    def damaged(t):
        tensors = real(t)
        tensors["qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(llmq.pipeline, "matrix_tensors", damaged)
    with pytest.raises(ValueError, match="what was read back differs from what was solved"):
        quantized(tiny_model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_that_differ_are_not_published(tiny_model, tmp_path, monkeypatch):
    import llmq.pipeline

    real = llmq.pipeline.kept_dtype
    # Norms stored too coarsely: the integers are right, the model is not.
    monkeypatch.setattr(
        llmq.pipeline, "kept_dtype", lambda stored, dims: torch.bfloat16 if dims < 2 else real(stored, dims)
    )
    with pytest.raises(ValueError, match=r"hidden states differ from the solved one's by .* is not published"):
        quantized(tiny_model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "gtpq"}, ValueError, r"method is 'gtpq'; known: gptq, awq, awq\+gptq, rtn"),
        ({"head_bits": 3}, ValueError, "head_bits is 3; known: 16, 8, 4"),
        ({"device": "cuda"}, ValueError, "device is 'cuda'; known: cpu"),
        ({"calib": CalibConfig(calib="wikitext3")}, ValueError, "wikitext3.*wikitext2"),
        ({"calib": CalibConfig(calib="stdlib", seqlen=100_000)}, ValueError, "100000"),
    ],
)
def test_errors_come_before_the_work(tiny_model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        quantized(tiny_model, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_quantizing_twice_is_refused(tiny_model, tmp_path):
    folder = quantized(tiny_model, tmp_path).folder
    with pytest.raises(ValueError, match="already quantized by llmq"):
        quantize_model(folder, SCHEME, output=tmp_path / "twice", calib=CALIB)


def test_nan_weights_are_named(tiny_model, tmp_path):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.(up|down)_proj"):
        quantize_model(source, SCHEME, output=tmp_path / "out", calib=CALIB)
    assert not (tmp_path / "out").exists()


def test_read_back_equals_report(tiny_model, tmp_path):
    result = quantized(tiny_model, tmp_path)
    row = result.report["linears"][0]
    t = read_qtensor(result.folder, row["name"], *row["shape"], SCHEME)
    assert str(t.scheme) == row["scheme"]


@pytest.mark.parametrize(
    ("model", "name"),
    [("google/gemma-3-1b", "gemma-3-1b-w4g32"), ("/a/b/x.gguf", "x-w4g32"), ("folder/", "folder-w4g32")],
)
def test_default_output(model, name):
    assert default_output(model, SCHEME) == name
