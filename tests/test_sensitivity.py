"""Shares of the divergence: against the models themselves, and of the weights that GPTQ leaves."""

import dataclasses

import pytest
import torch

import llmq
from llmq import CalibConfig, QuantScheme, calibration, quantize_model, sensitivity
from llmq.checkpoint import read_qtensor
from llmq.config import GPTQConfig, RecipeConfig
from llmq.models.load import open_model
from llmq.plan import Matrix, make_plan
from llmq.report import silent
from llmq.sensitivity import divergence, divergences, measured, table_probe
from llmq.solvers import METHODS, rtn

CALIB = CalibConfig(calib="stdlib", nsamples=4, seqlen=48)


def linears_of(folder):
    return make_plan(open_model(folder), QuantScheme(4, 32), 16, METHODS["gptq"], 192, 48).linears


def test_divergence_is_the_kl_of_the_outcomes():
    p, q = (torch.randn(6, 40, generator=torch.Generator().manual_seed(s)).log_softmax(1) for s in (0, 1))
    whole = (p.exp() * (p - q)).sum(1).mean()
    assert divergence(p[:, :39], q[:, :39]) == pytest.approx(float(whole), rel=1e-5)  # the last one is the rest
    part = divergence(p[:, :10], q[:, :10])
    assert 0 < part < whole
    assert divergence(p[:, :10], p[:, :10]) == pytest.approx(0, abs=1e-6)


def test_divergences_are_slopes_towards_the_original(tiny_model):
    """<dKL/dW, D> of a linear is what KL gains by moving its weights along D: compared with a finite difference."""
    folder = tiny_model("gemma3")
    source, linears, probe = open_model(folder), linears_of(folder), QuantScheme(2, 32)
    windows = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    rounded = {m.name: rtn.solve(source.reader.tensor(f"{m.name}.weight").float(), probe) for m in linears}
    got = divergences(source, rounded, windows)
    model = llmq.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        teacher = model(input_ids=windows).logits.log_softmax(-1)
        changes = {}
        for m in linears:
            weight = model.get_submodule(m.name).weight
            changes[m.name] = rounded[m.name].dequantize().double() - weight
            weight.copy_(weight + changes[m.name])

        def kl():
            log_q = model(input_ids=windows).logits.log_softmax(-1)
            return float((teacher.exp() * (teacher - log_q)).sum(-1).mean())

        for m in linears[::5]:
            weight, step = model.get_submodule(m.name).weight, 1e-3 * changes[m.name]
            weight += step
            above = kl()
            weight -= 2 * step
            below = kl()
            weight += step
            want = (above - below) / 2e-3
            assert got[m.name] == pytest.approx(want, rel=0.02, abs=1e-4 * sum(map(abs, got.values()))), m.name


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_what_is_measured_is_the_model_that_gptq_rounds(tiny_model, tmp_path, family):
    """The shares are those of the weights that a run of plain GPTQ on the same windows leaves."""
    folder = tiny_model(family)
    source, linears, probe = open_model(folder), linears_of(folder), QuantScheme(3, 32)
    tokens = calibration.load(CALIB, source.tokenizer, log=silent).tokens
    got = measured(source, linears, (), probe, tokens, GPTQConfig(), silent)
    out = quantize_model(folder, probe, output=tmp_path / "o", recipe=RecipeConfig(preset="fast"), calib=CALIB).folder
    rounded = {m.name: read_qtensor(out, m.name, m.n, m.k, probe) for m in linears}
    want = divergences(source, rounded, tokens)
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
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    measured(source, (), (table,), QuantScheme(3, 32), tokens, GPTQConfig(), silent)
    assert seen[table.name].digest() == rtn.solve(weight.float(), table_probe(table)).digest()


def test_text_that_was_not_fitted_is_what_measures(tiny_model, monkeypatch):
    source = open_model(tiny_model("llama"))
    monkeypatch.setattr(sensitivity, "SOLVED_TOKENS", 48)
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", 48)
    monkeypatch.setattr(sensitivity, "PROBE_WINDOW", 12)
    seen = []
    monkeypatch.setattr(sensitivity, "_rounded", lambda _s, _n, _p, tokens, _g: seen.append(tokens) or {})
    monkeypatch.setattr(sensitivity, "divergences", lambda _s, _r, windows: seen.append(windows) or {})
    tokens = torch.arange(8 * 24).reshape(8, 24)
    measured(source, (), (), QuantScheme(3, 32), tokens, GPTQConfig(), silent)
    solved, windows = seen
    assert torch.equal(solved, tokens[:2])
    assert windows.shape == (4, 12)
    assert int(windows.min()) >= 48
    assert set(windows[:, 0].tolist()) <= set(range(0, 192, 12))
