"""--max-kl: the search against invented curves, and whole runs on a tiny model."""

import json
import math

import pytest
import torch

import llmq
from llmq import BudgetConfig, CalibConfig, GPTQConfig, QuantScheme, quantize_model, smallest
from llmq.allocate import beside
from llmq.calibration import load
from llmq.models.load import open_model
from llmq.plan import make_plan
from llmq.smallest import CLOSE, RUNS, Search, held_out, measured_kl
from llmq.solvers import METHODS

CALIB = CalibConfig(calib="stdlib", nsamples=4, seqlen=48)


def searched(kl, target, low=2.2, high=8.6):
    search = Search(target, low, high)
    while (bits := search.next()) is not None:
        assert low <= bits <= high
        search.tried.append((bits, kl(bits)))
        assert len(search.tried) <= RUNS
    return search


@pytest.mark.parametrize("target", [0.3, 0.05, 0.01, 0.002])
@pytest.mark.parametrize("slope", [0.8, 1.386, 1.9])
def test_the_search_ends_close_above_the_answer(target, slope):
    answer = 2.2 + (1.0 - math.log(target)) / slope
    if answer > 8.6:
        with pytest.raises(ValueError, match="cannot be met"):
            searched(lambda bits: math.exp(1.0 - slope * (bits - 2.2)), target)
        return
    search = searched(lambda bits: math.exp(1.0 - slope * (bits - 2.2)), target)
    assert search.best[1] <= target
    if answer > 2.2:
        assert answer <= search.best[0] <= answer + 3 * CLOSE


def test_a_curve_with_a_bend_and_noise():
    """KL that stops falling: int8 activations and the head cost something at any bits."""
    search = searched(lambda bits: 0.004 + 2 * math.exp(-1.6 * (bits - 2.2)) * (1 + 0.05 * math.sin(40 * bits)), 0.02)
    assert search.best[1] <= 0.02
    below = search.failed
    assert below is not None
    assert search.best[0] - below[0] < 0.3


def test_targets_that_everything_or_nothing_keeps():
    easy = searched(lambda bits: 1e-4 / bits, 0.5)
    assert easy.best[0] == 2.2
    with pytest.raises(ValueError, match=r"--max-kl 0.001 cannot be met: with 8.60 bits .* held-out text is 0.0050"):
        searched(lambda _bits: 0.005, 0.001)


def test_windows_that_are_measured_on_are_not_calibrated_on(tiny_model):
    texts = load(CALIB, open_model(tiny_model("llama")).tokenizer)
    kept, windows = held_out(texts, 2)
    assert torch.equal(torch.cat([kept.tokens, windows]), texts.tokens)
    assert kept.sha256 != texts.sha256
    assert kept.tokens_kept == 2 * 48
    with pytest.raises(ValueError, match=r"holds out 3 windows of 48 tokens to measure on, and the text gives 4"):
        held_out(texts, 3)


def run(folder, out, target, **options):
    options.setdefault("budget", BudgetConfig(max_kl=target))
    return quantize_model(folder, QuantScheme(4, 32), output=out, calib=CALIB, gptq=GPTQConfig(grid_steps=2), **options)


def test_the_smallest_model_under_a_target(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(smallest, "CLOSE", 0.4)  # fewer runs
    folder, lines = tiny_model("llama"), []
    at_four = quantize_model(folder, QuantScheme(4, 64), output=tmp_path / "w4", calib=CALIB).folder
    source = open_model(folder)
    more = llmq.config.replace(CALIB, nsamples=6)
    windows = held_out(load(more, source.tokenizer), 2)[1]
    target = measured_kl(at_four, folder, windows).mean
    result = run(folder, tmp_path / "out", target, log=lines.append)
    report = json.loads((tmp_path / "out" / "llmq_report.json").read_text())
    assert report == result.report
    assert result.folder == tmp_path / "out"
    found = report["max_kl"]
    # Measured anew on the published folder: the same windows, the same kernels.
    assert measured_kl(tmp_path / "out", folder, windows).mean == pytest.approx(found["measured"], rel=1e-6)
    assert found["measured"] <= target
    assert len(found["tries"]) <= RUNS
    assert any(t["kl"] > target for t in found["tries"])
    assert 2.2 < report["sizes"]["bits_per_weight_linears"] < 5.5
    assert report["calibration"]["n_samples"] == 4
    assert any("try 1 of at most" in line for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "w4"]
    assert "# out" in next((tmp_path / "out").glob("README*.md")).read_text()
    llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_target_that_cannot_be_met_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--max-kl 1e-07 cannot be met: with .* the KL measured .* is 0\.\d+"):
        run(tiny_model("llama"), tmp_path / "out", 1e-7)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(smallest, "RUNS", 1)
    with pytest.raises(ValueError, match=r"--max-kl 0.0001 was not met in 1 runs: KL 0\.\d+ at 4.00 bits"):
        run(tiny_model("llama"), tmp_path / "out", 1e-4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("tied", "share"), [(True, 0.2), (False, 0.9)])
def test_a_target_size_is_that_of_the_whole_folder(tiny_model, tmp_path, tied, share):
    folder = tiny_model("llama", tied=tied)
    plans = {
        bits: make_plan(open_model(folder), QuantScheme(bits, 128), head, METHODS["gptq"], 192, 48)
        for bits, head in ((8, 8), (2, 4))
    }
    # The room that is kept for report and names dwarfs a tiny model: from its weights at 2 bits up to those at 8.
    rest = beside(open_model(folder), plans[8]) - sum(k.nbytes for k in plans[8].kept)
    small, large = plans[2].bytes_after, plans[8].bytes_after
    target = int(rest + small * 1.15 + share * (large - small))
    result = run(folder, tmp_path / "out", 0, budget=BudgetConfig(target_size=str(target)))
    files = [p for p in result.folder.rglob("*") if p.is_file() and ".llmq-packed" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= target
    assert 0.85 * (target - rest) < result.report["sizes"]["bytes"] <= target - rest
    heads = [t["scheme"] for t in result.report["tables"]]
    assert set(heads) <= {"w8g32sym", "w4g32"}
    assert len(heads) == (1 if tied else 2)
    assert result.report["divergence"].keys() == {r["name"] for r in result.report["linears"] + result.report["tables"]}
    ids = torch.arange(3, 20)[None]
    assert torch.isfinite(llmq.AutoModelForCausalLM.from_pretrained(result.folder)(input_ids=ids).logits).all()
    if tied:  # the choice can be given back, the head's bits with it
        plan = BudgetConfig(plan=str(result.folder / "llmq_report.json"))
        again = run(folder, tmp_path / "again", 0, budget=plan)
        for file in result.folder.glob("*.safetensors"):
            assert file.read_bytes() == (again.folder / file.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_size": "60k"},
            r"--target-size 60k is 0.1 MB, and the smallest folder has 0\.\d: linears",
        ),
        ({"target_size": "many"}, "size 'many' is not of the form 600M"),
        ({"target_bpw": 3.0, "max_kl": 0.1}, "--target-bpw and --max-kl each say"),
        ({"max_kl": -1.0}, "max_kl is -1; it counts nats a token"),
    ],
)
def test_budgets_that_cannot_be(tiny_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_model("llama"), tmp_path / "out", 0, budget=BudgetConfig(**options))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="--max-kl needs text to choose by, and --method rtn reads none"):
        run(tiny_model("llama"), tmp_path / "out", 0, budget=BudgetConfig(max_kl=0.1), method="rtn")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("600M", 600_000_000), ("1.5GiB", 3 << 29), ("2k", 2000), ("77", 77), ("1 MB", 1_000_000)]
)
def test_sizes(text, nbytes):
    assert llmq.config.parse_size(text) == nbytes
