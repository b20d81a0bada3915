"""Shares of the divergence: against the models themselves, and of the weights that GPTQ leaves."""

import dataclasses

import pytest
import torch

import llmq
from llmq import CalibConfig, QuantScheme, calibration, quantize_model, sensitivity
from llmq.checkpoint import read_qtensor
from llmq.config import RecipeConfig
from llmq.models.load import open_model
from llmq.plan import Matrix, make_plan
from llmq.report import silent
from llmq.sensitivity import divergences, measured, table_probe
from llmq.solvers import METHODS, SolverOptions, rtn

FAST = SolverOptions(recipe=RecipeConfig(preset="fast"))
CALIB = CalibConfig(calib="stdlib", nsamples=4, seqlen=48)


def linears_of(folder):
    return make_plan(open_model(folder), QuantScheme(4, 32), 16, METHODS["gptq"], 192, 48).linears


def test_divergences_are_those_of_each_change_alone(tiny_model, monkeypatch):
    """Against the variance of the logits' change along D under the predictions, and against the KL itself."""
    monkeypatch.setattr("llmq.products.half_helps", lambda: False)
    folder = tiny_model("gemma3")
    source, linears, probe = open_model(folder), linears_of(folder)[::5], QuantScheme(4, 32)
    rounded = {m.name: rtn.solve(source.reader.tensor(f"{m.name}.weight").float(), probe) for m in linears}
    ids, draws = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0)), 300
    got = divergences(source, rounded, ids.repeat(draws, 1))
    model = llmq.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        changes = {}
        for m in linears:
            weight = model.get_submodule(m.name).weight
            changes[m.name] = rounded[m.name].dequantize().double() - weight
            weight += changes[m.name]
        before = model(input_ids=ids).logits
        p = before.softmax(-1)
        for m in linears:
            weight, change = model.get_submodule(m.name).weight, changes[m.name]
            weight -= 1e-4 * change
            slope = (model(input_ids=ids).logits - before) / 1e-4
            weight -= (1 - 1e-4) * change
            kl = (p * (before.log_softmax(-1) - model(input_ids=ids).logits.log_softmax(-1))).sum(-1).mean()
            weight += change
            want = ((p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2).mean() / 2
            assert got[m.name] == pytest.approx(float(want), rel=4 * (2 / (2 * draws)) ** 0.5), m.name
            assert float(want) == pytest.approx(float(kl), rel=0.3), m.name


def test_one_seed_draws_the_same_and_what_is_not_finite_has_a_name(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    source, linears = open_model(folder), linears_of(folder)[:3]
    rounded = {m.name: rtn.solve(source.reader.tensor(f"{m.name}.weight").float(), m.scheme) for m in linears}
    ids = torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))
    assert divergences(source, rounded, ids) == divergences(source, rounded, ids)
    assert divergences(source, rounded, ids) != divergences(source, rounded, ids, seed=1)
    change = sensitivity._change
    monkeypatch.setattr(sensitivity, "_change", lambda *args: change(*args) * float("nan"))
    with pytest.raises(ValueError, match=rf"{linears[0].name}: the gradient of its predictions is not finite"):
        divergences(source, rounded, ids)


@pytest.mark.parametrize(("family", "steps"), [("gemma3", ""), ("qwen3", "target")])
def test_what_is_measured_is_the_model_that_gptq_rounds(tiny_model, tmp_path, family, steps):
    """The shares are those of the weights that a run with the same steps on the same windows leaves."""
    folder, recipe = tiny_model(family), RecipeConfig(preset="fast", only=steps)
    source, linears, probe = open_model(folder), linears_of(folder), QuantScheme(3, 32)
    texts = calibration.load(CALIB, source.tokenizer, log=silent)
    got = measured(source, linears, (), probe, texts, SolverOptions(recipe=recipe), silent)
    out = quantize_model(folder, probe, output=tmp_path / "o", recipe=recipe, calib=CALIB).folder
    rounded = {m.name: read_qtensor(out, m.name, m.n, m.k, probe) for m in linears}
    want = divergences(source, rounded, texts.tokens.repeat(sensitivity.PROBES // len(texts.tokens), 1))
    assert got.keys() == want.keys()
    for name, share in got.items():
        assert share == pytest.approx(want[name], rel=1e-4, abs=1e-6 * sum(map(abs, want.values()))), name


def test_tables_are_measured_where_they_are_asked_about(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    source, table = open_model(folder), Matrix("model.embed_tokens", 200, 64, QuantScheme(8, 32))
    weight = source.reader.tensor(f"{table.name}.weight")
    table = dataclasses.replace(table, n=weight.shape[0], k=weight.shape[1])
    seen = {}
    monkeypatch.setattr(sensitivity, "CHUNK_ROWS", 30)  # more than one piece, the last one shorter
    monkeypatch.setattr(sensitivity, "divergences", lambda _source, rounded, _windows: seen.update(rounded) or {})
    measured(source, (), (table,), QuantScheme(3, 32), calibration.load(CALIB, source.tokenizer), FAST, silent)
    assert seen[table.name].digest() == rtn.solve(weight.float(), table_probe(table)).digest()


def test_text_that_was_not_fitted_is_what_measures(tiny_model, monkeypatch):
    source = open_model(tiny_model("llama"))
    monkeypatch.setattr(sensitivity, "SOLVED_TOKENS", 48)
    monkeypatch.setattr(sensitivity, "PROBES", 4)
    monkeypatch.setattr(sensitivity, "PROBE_WINDOW", 12)
    seen = []
    monkeypatch.setattr(sensitivity, "_rounded", lambda _s, _n, _p, tokens, _g: seen.append(tokens) or {})
    monkeypatch.setattr(sensitivity, "divergences", lambda _s, _r, windows: seen.append(windows) or {})
    texts = calibration.load(dataclasses.replace(CALIB, nsamples=8, seqlen=24), source.tokenizer, log=silent)
    assert texts.bos
    measured(source, (), (), QuantScheme(3, 32), texts, FAST, silent)
    solved, windows = seen
    assert torch.equal(solved, texts.tokens[:2])
    assert windows.shape == (4, 12)
    assert set(windows[:, 0].tolist()) == {int(texts.tokens[0, 0])}  # BOS in each: without it Gemma is another model
    unseen = texts.tokens[2:, 1:].reshape(6, -1)[:, :22].reshape(12, 11).tolist()
    assert all(row in unseen for row in windows[:, 1:].tolist())
