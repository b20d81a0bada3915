"""Tuning of scales: the gradient against autograd through the whole model, the held-out divergence, what stays."""

import json
import time

import pytest
import torch

import llmq
from llmq import CalibConfig, QuantScheme, RecipeConfig, quantize_model, tune
from llmq.allocate import divergence
from llmq.blockwise import block_inputs
from llmq.checkpoint import CheckpointWriter, read_qtensor
from llmq.distill import Head, Teacher
from llmq.models.load import open_model
from llmq.plan import make_plan
from llmq.qtensor import expand_groups, group_sums
from llmq.solvers import METHODS

CALIB = CalibConfig(calib="stdlib", nsamples=32, seqlen=48)
SCHEME = QuantScheme(3, 32)


class Written(CheckpointWriter):
    """A published folder as its writer saw it."""

    def __init__(self, folder):
        self.partial = folder
        self.weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.fixture(scope="module", params=["gemma3", "qwen3"])
def solved(request, tiny_model, tmp_path_factory):
    """(folder of the original, folder of the quantized model)."""
    out = tmp_path_factory.mktemp("solved") / "out"
    quantize_model(tiny_model(request.param), SCHEME, output=out, method="rtn", head_bits=16)
    return tiny_model(request.param), out


def text(n, seed, t=40):
    return torch.randint(3, 200, (n, t), generator=torch.Generator().manual_seed(seed))


def linears(source):
    return make_plan(source, SCHEME, 16, METHODS["gptq"], 192, 48).linears


@pytest.fixture(autouse=True)
def all_positions(monkeypatch):
    """All predictions of the few there are."""
    monkeypatch.setattr(tune, "POSITIONS", 1.0)


def tuned(solved, seconds=600.0, seed=0, **texts):
    source = open_model(solved[0])
    train, held = texts.get("train", text(3, 2)), texts.get("held", text(3, 2)[:1])
    lines = []
    writer = Written(solved[1])
    return tune.tune(source, writer, linears(source), train, held, seed=seed, seconds=seconds, log=lines.append), lines


def models(solved):
    """(the original, the quantized model, both in float64, the latter's QTensors by name)."""
    teacher, student = (llmq.AutoModelForCausalLM.from_pretrained(solved[0], dtype=torch.float64) for _ in range(2))
    found = {m.name: read_qtensor(solved[1], m.name, m.n, m.k, m.scheme) for m in linears(open_model(solved[0]))}
    for name, q in found.items():
        student.get_submodule(name).weight.data.copy_(q.dequantize())
    return teacher, student, found


@pytest.mark.parametrize("width", [32, 100, -1])
def test_group_sums_are_the_transpose_of_expansion(width):
    scheme = QuantScheme(2, 32) if width != -1 else QuantScheme(2, -1)
    k = 96 if width == 32 else 100
    x, s = torch.randn(5, k, dtype=torch.float64), torch.randn(5, scheme.n_groups(k), dtype=torch.float64)
    assert float((expand_groups(s, k, scheme) * x).sum()) == pytest.approx(float((s * group_sums(x, scheme)).sum()))


def test_loss_and_gradient_are_those_of_the_whole_model(solved, tmp_path):
    source, ids = open_model(solved[0]), text(1, 3)
    entering, calls = block_inputs(source, ids)
    positions = torch.tensor([0, 3, 4, 17, 39])
    head = Head(source)
    teacher = Teacher(head, entering, calls, [positions], [0], tmp_path)
    with head.loaded():
        student = tune.Student(tune.read_blocks(Written(solved[1]), source, linears(source), calls), head, teacher)
        loss = student.backward(0)
        judged = student.loss([0])
    teacher.close()
    assert list(tmp_path.iterdir()) == []

    original, quantized, found = models(solved)
    factors = {name: torch.ones(q.scale.shape, dtype=torch.float64, requires_grad=True) for name, q in found.items()}
    weights = {
        f"{n}.weight": q.dequantize().double() * expand_groups(factors[n], q.shape[1], SCHEME) for n, q in found.items()
    }
    log_p = original(input_ids=ids).logits[0, positions].log_softmax(1)
    log_q = torch.func.functional_call(quantized, weights, (ids,)).logits[0, positions].log_softmax(1)
    top, at = log_p.topk(min(256, log_p.shape[1] - 1), dim=1)
    want = divergence(top, log_q.gather(1, at))
    want.backward()
    want = float(want.detach())
    assert loss == pytest.approx(want, rel=1e-4)  # fp32 sums against fp64
    assert judged == pytest.approx(loss, rel=1e-4)
    for m in student.linears:
        g = factors[m.name].grad
        assert (m.factor.grad - g).norm() < 1e-3 * g.norm(), m.name


def test_the_held_out_divergence_falls_and_the_integers_stay(solved):
    """A random model's answers to two texts have little in common: the text that judges is trained on as well."""
    result, lines = tuned(solved)
    report = result.report
    assert report["kl_after"] < report["kl_before"]
    assert not report["stopped_by_clock"]
    assert report["steps"] == tune.EPOCHS * 3
    assert any("held-out" in line and "left" in line and "memory" in line for line in lines)
    original, student, found = models(solved)
    ids = text(3, 2)[:1]

    def kl():
        log_p, log_q = (m(input_ids=ids).logits[0].log_softmax(1) for m in (original, student))
        top, at = log_p.topk(min(256, log_p.shape[1] - 1), dim=1)
        return float(divergence(top, log_q.gather(1, at)).detach())

    assert kl() == pytest.approx(report["kl_before"], rel=1e-4)
    for name, q in result.matrices.items():
        assert torch.equal(q.q, found[name].q)
        assert torch.equal(q.zero, found[name].zero)
        assert q.scale.dtype == torch.float16
        student.get_submodule(name).weight.data.copy_(q.dequantize())
    assert kl() == pytest.approx(report["kl_after"], rel=1e-4)


def test_one_seed_gives_the_same_bits_and_another_does_not(solved):
    first, again, other = (tuned(solved, seed=seed)[0].matrices for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(q.scale, again[name].scale) for name, q in first.items())
    assert any(not torch.equal(q.scale, other[name].scale) for name, q in first.items())


def test_steps_that_do_not_help_are_dropped(solved, monkeypatch):
    monkeypatch.setattr(tune, "LEARNING_RATE", 10.0)
    result, _ = tuned(solved)
    assert result.matrices == {}
    assert result.report["kl_after"] == result.report["kl_before"]


def test_the_clock_ends_it(solved):
    began = time.perf_counter()
    report = tuned(solved, seconds=1e-3, train=text(200, 1))[0].report
    assert report["stopped_by_clock"]
    assert report["steps"] < 20
    assert time.perf_counter() - began < 60
    assert report["kl_after"] <= report["kl_before"]


def test_what_is_not_finite_stops_with_a_name(solved, monkeypatch):
    monkeypatch.setattr(tune.Linear, "gradient", lambda self, _dW: self.factor * float("nan"))
    with pytest.raises(ValueError, match=r"layers\.\d+\..*_proj: the gradient of its scales is not finite"):
        tuned(solved)
    monkeypatch.setattr(tune, "dequantize", lambda q, *_: torch.full(q.shape, float("nan")))
    with pytest.raises(ValueError, match=r"layers\.0: its output is not finite while scales are tuned"):
        tuned(solved)


def test_pieces_of_long_windows_begin_as_the_windows_do(monkeypatch):
    monkeypatch.setattr(tune, "PIECE", 4)
    windows = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 16], [1, 20, 21, 22, 23, 24, 25, 26]])
    want = [[1, 10, 11, 12], [1, 13, 14, 15], [1, 20, 21, 22], [1, 23, 24, 25]]
    assert tune.pieces_of(windows, bos=True).tolist() == want
    assert tune.pieces_of(windows, bos=False).tolist() == [[*w[:4]] for w in windows.view(4, 4).tolist()]
    assert torch.equal(tune.pieces_of(windows[:, :3], bos=True), windows[:, :3])


def test_a_run_publishes_the_tuned_scales(tiny_model, tmp_path):
    """The folder holds what was tuned (the check compares hidden states and digests), the same bytes every time."""
    results = [
        quantize_model(
            tiny_model("gemma3"), SCHEME, output=tmp_path / name, calib=CALIB, recipe=RecipeConfig(only=only)
        )
        for name, only in (("a", "target,tune"), ("b", "target,tune"), ("c", "target"))
    ]
    (report,) = results[0].report["learned"]["tune"]
    assert report["kl_after"] < report["kl_before"]
    assert f"-> {report['kl_after']:.4f} nats" in results[0].summary
    assert "learned" not in results[2].report
    a, b, c = ([f.read_bytes() for f in sorted(r.folder.glob("*.safetensors"))] for r in results)
    assert a == b
    assert a != c


@pytest.mark.parametrize(("only", "named"), [("tune", "tune"), ("rounding,tune", "rounding and tune")])
def test_one_window_cannot_be_held_out(tiny_model, tmp_path, only, named):
    calib = CalibConfig(calib="stdlib", nsamples=1, seqlen=48)
    options = {"output": tmp_path / "out", "calib": calib, "recipe": RecipeConfig(only=only)}
    with pytest.raises(ValueError, match=f"{named} must prove itself on held-out windows, and nsamples is 1"):
        quantize_model(tiny_model("llama"), SCHEME, **options)
    assert list(tmp_path.iterdir()) == []


def test_max_time_is_checked():
    with pytest.raises(ValueError, match="max_time is 0; it is a number of minutes above 0"):
        RecipeConfig(max_time=0.0)
