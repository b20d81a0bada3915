"""Tuning end to end: the gradient against autograd through the whole model, the held-out divergence, what stays."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

import llmq
from llmq import CalibConfig, QuantScheme, RecipeConfig, quantize_model, tune
from llmq.blockwise import block_inputs
from llmq.checkpoint import CheckpointWriter, read_qtensor
from llmq.distill import Head, Teacher
from llmq.models.families import FAMILIES
from llmq.models.load import open_model
from llmq.plan import make_plan
from llmq.qtensor import expand_groups, group_sums
from llmq.solvers import METHODS
from llmq.student import Block, Linear, Student, Vector

CALIB = CalibConfig(calib="stdlib", nsamples=32, seqlen=48, tune_samples=40)
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
    """All predictions of the few there are, a piece a step, gradients in fp32 as well."""
    monkeypatch.setattr(tune, "STRIDE", 1)
    monkeypatch.setattr(tune, "BATCH_TOKENS", 40)
    monkeypatch.setattr("llmq.products.half_helps", lambda: False)


def tuned(solved, seconds=600.0, seed=0, **texts):
    source = open_model(solved[0])
    train, held = texts.get("train", text(3, 2)), texts.get("held", text(3, 2)[:1])
    lines = []
    options = {"seed": seed, "seconds": seconds, "log": lines.append}
    return tune.tune(source, Written(solved[1]), linears(source), train, held, **options), lines


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


def divergence(original, student):
    """Mean KL(original || student), f64, a position."""
    log_p, log_q = (logits.flatten(0, 1).log_softmax(1) for logits in (original, student))
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


@pytest.fixture
def learner(solved, tmp_path):
    """(student, inputs and targets of two pieces, their tokens)."""
    source, ids = open_model(solved[0]), text(2, 3)
    entering, calls = block_inputs(source, ids)
    head, teacher = Head(source), Teacher(source, entering, calls, [1, 0], tmp_path)
    with head.loaded():
        blocks = tune.read_blocks(Written(solved[1]), source, linears(source), calls)
        yield Student(blocks, head), torch.cat(entering), torch.cat([teacher.of(0), teacher.of(1)]), ids
    teacher.close()
    assert list(tmp_path.iterdir()) == []


def naive(solved, ids, positions):
    """KL at the positions, gradients by name: of the scales' factors f64[N, G], and of vectors."""
    original, quantized, found = models(solved)
    factors = {name: torch.ones(q.scale.shape, dtype=torch.float64, requires_grad=True) for name, q in found.items()}
    vectors = {n: p for n, p in quantized.named_parameters() if p.dim() == 1 and ".layers." in n}
    weights = {}
    for n, q in found.items():
        weights[f"{n}.weight"] = q.dequantize().double() * expand_groups(factors[n], q.shape[1], SCHEME)
    log_q = torch.func.functional_call(quantized, weights, (ids,)).logits[:, positions]
    want = divergence(original(input_ids=ids).logits[:, positions].detach(), log_q)
    want.backward()
    of_vectors = {n: p.grad for n, p in vectors.items()}
    return float(want.detach()), {n: factors[n].grad for n in found}, of_vectors


def test_loss_and_gradient_are_those_of_the_whole_model(solved, learner):
    student, x, target, ids = learner
    loss = student.backward(x, target, slice(1, None, 2))
    want, gradients, of_vectors = naive(solved, ids, slice(1, None, 2))
    assert loss == pytest.approx(want, rel=1e-4)  # fp32 sums against fp64
    for m in student.linears:
        of_factor = gradients[m.name]
        assert (m.factor.grad - of_factor).norm() < 1e-3 * of_factor.norm(), m.name
    assert {v.name for v in student.vectors} == of_vectors.keys()
    for v in student.vectors:
        of_factor = of_vectors[v.name] * (v.start + v.offset)
        assert (v.factor.grad - of_factor).norm() < 1e-3 * of_factor.norm(), v.name
    assert student.loss(x, target) == pytest.approx(naive(solved, ids, slice(None))[0], rel=1e-4)


def test_a_norm_is_scaled_as_its_module_multiplies():
    """Gemma's norms multiply by one plus the weight: a factor of 2 on that makes 3 of a weight of 1."""
    v = Vector("a", torch.tensor([1.0, 0.0]), 1.0)
    torch.testing.assert_close(v.value(), v.start, rtol=0, atol=0)
    v.factor = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(v.value(), torch.tensor([3.0, -0.5]))


def test_blocks_that_are_run_again_give_the_same_gradient(learner, monkeypatch):
    student, x, target, _ = learner
    student.backward(x, target, slice(None))
    kept = {item.name: item.factor.grad for item in student.learned}
    monkeypatch.setattr("llmq.student.GRAPH_BYTES", 1)  # the first block's graph stays, that of no other
    runs = []
    monkeypatch.setattr(
        Block, "run", lambda self, x, stored, run=Block.run: runs.append(0) or run(self, x, stored=stored)
    )
    student.backward(x, target, slice(None))
    assert len(runs) == len(student.blocks) - 1
    assert all(torch.equal(item.factor.grad, kept[item.name]) for item in student.learned)


def test_gradients_in_bf16_point_the_same_way(learner, monkeypatch):
    """A product's rounding to bf16 is one of 2**-9 of it, the sum over a path of them is well below a tenth."""
    student, x, target, _ = learner
    student.backward(x, target, slice(None))
    exact = {item.name: item.factor.grad for item in student.learned}
    monkeypatch.setattr("llmq.products.half_helps", lambda: True)
    student.backward(x, target, slice(None))
    for item in student.learned:
        rough, fine = item.factor.grad, exact[item.name]
        assert not torch.equal(rough, fine)
        assert torch.cosine_similarity(rough.flatten(), fine.flatten(), 0) > 0.99, item.name


def test_a_head_cut_to_its_likeliest_tokens_is_nearly_the_whole(solved, monkeypatch):
    source, h = open_model(solved[0]), torch.randn(50, 64)
    h = torch.randn(50, int(source.config.hidden_size), generator=torch.Generator().manual_seed(0))
    head = Head(source)
    with head.loaded():
        whole = head.logits(h)
        monkeypatch.setattr("llmq.distill.VOCABULARY", 40)
        tokens = head.likely(h, torch.tensor([[3, 7]]))
        monkeypatch.setattr("llmq.distill.VOCABULARY", whole.shape[1])
        assert torch.equal(head.likely(h, torch.tensor([3])), torch.arange(whole.shape[1]))
    with head.loaded(tokens):
        assert head.vocabulary == len(tokens)
        torch.testing.assert_close(head.logits(h), whole[:, tokens])
    assert head.vocabulary == whole.shape[1]
    assert {3, 7} < set(tokens.tolist())
    mass = whole.softmax(1).sum(0)
    assert set(mass.topk(40)[1].tolist()) <= set(tokens.tolist())
    assert 40 <= len(tokens) <= 42


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
        return float(divergence(original(input_ids=ids).logits, student(input_ids=ids).logits).detach())

    assert kl() == pytest.approx(report["kl_before"], rel=1e-4)
    for name, q in result.matrices.items():
        assert torch.equal(q.q, found[name].q)
        assert torch.equal(q.zero, found[name].zero)
        assert q.scale.dtype == torch.float16
        student.get_submodule(name).weight.data.copy_(q.dequantize())
    assert any("norm" in name for name in result.vectors)
    for name, v in result.vectors.items():
        student.get_parameter(name).data.copy_(v)
    assert kl() == pytest.approx(report["kl_after"], rel=1e-4)


def test_one_seed_gives_the_same_bits_and_another_does_not(solved):
    first, again, other = (tuned(solved, seed=seed)[0].matrices for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(q.scale, again[name].scale) for name, q in first.items())
    assert any(not torch.equal(q.scale, other[name].scale) for name, q in first.items())


def test_a_bit_more_halves_the_rate():
    """A scale's step moves a weight by the same share of a grid step at all bits; vectors go with the mean bits."""
    linears = [
        SimpleNamespace(start=SimpleNamespace(scheme=QuantScheme(bits, 32)), factor=torch.ones(2), codes=torch.ones(n))
        for bits, n in ((2, 3), (4, 1), (2, 2))
    ]
    groups = tune._optimizer(SimpleNamespace(linears=linears, vectors=[SimpleNamespace(factor=torch.ones(4))]))
    rates = {id(p): group["lr"] for group in groups.param_groups for p in group["params"]}
    assert [rates[id(m.factor)] for m in linears] == [2 * tune.SCALE_RATE, tune.SCALE_RATE / 2, 2 * tune.SCALE_RATE]
    mean = (2 * 5 + 4 * 1) / 6
    assert groups.param_groups[-1]["lr"] == pytest.approx(tune.VECTOR_RATE * 2 ** (3 - mean))


def test_steps_that_do_not_help_are_dropped(solved, monkeypatch):
    monkeypatch.setattr(tune, "SCALE_RATE", 10.0)
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
    give = Linear.give_gradient
    monkeypatch.setattr(Linear, "give_gradient", lambda self, dW: give(self, dW * float("nan")))
    with pytest.raises(ValueError, match=r"layers\.\d+\..*_proj: the gradient of its scales is not finite"):
        tuned(solved)
    weight = Linear.weight
    monkeypatch.setattr(Linear, "weight", lambda self, *, stored: weight(self, stored=stored) * float("nan"))
    with pytest.raises(ValueError, match=r"layers\.0: its output is not finite while it is tuned"):
        tuned(solved)


def test_a_run_publishes_what_was_tuned(tiny_model, tmp_path):
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
    assert results[0].report["calibration"]["tune_samples"] == 40
    assert results[0].report["calibration"]["tune_sha256"] != results[0].report["calibration"]["sha256"]
    assert "learned" not in results[2].report
    assert "tune_samples" not in results[2].report["calibration"]
    a, b, c = ([f.read_bytes() for f in sorted(r.folder.glob("*.safetensors"))] for r in results)
    assert a == b
    assert a != c


@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_every_family_takes_pieces_together(tiny_model, tmp_path, family):
    """What the decoder passes to its blocks was recorded for one piece and is used for several."""
    quantize_model(tiny_model(family), SCHEME, output=tmp_path / "out", method="rtn", head_bits=16)
    source, ids = open_model(tiny_model(family)), text(3, 5)
    entering, calls = block_inputs(source, ids)
    blocks = tune.read_blocks(Written(tmp_path / "out"), source, linears(source), calls)
    student = Student(blocks, Head(source))
    together = student.hidden(torch.cat(entering), stored=True)[-1]
    single = torch.cat([student.hidden(x, stored=True)[-1] for x in entering])
    torch.testing.assert_close(together, single)


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
