"""Learned rounding: one step against a naive one, the held-out loss, what it starts from and what it leaves."""

import pytest
import torch
from torch import nn

from llmq import CalibConfig, QuantScheme, RecipeConfig, quantize_model, rounding
from llmq.blockwise import BlockCall
from llmq.qtensor import dequantize, minmax_grid, quantize
from llmq.rounding import Rounded, Windows, learn_rounding

SCHEMES = [QuantScheme(2, 32), QuantScheme(3, 32, True), QuantScheme(3, -1)]
N, K = 24, 72


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def case(scheme=SCHEMES[0], n_windows=18):
    """A block rounded to nearest, its windows, its integers with the original weights.

    Inputs are correlated: where they are not, rounding to nearest leaves nothing to learn.
    """
    torch.manual_seed(0)
    block = TwoLinears().requires_grad_(False)
    for linear in block.children():
        linear.weight.mul_(3)  # what the block adds must not vanish beside its input
    mix = torch.randn(12, K) / 3
    inputs = [torch.randn(1, 40, 12) @ mix + 0.2 * torch.randn(1, 40, K) for _ in range(n_windows)]
    targets = [block(x) for x in inputs]
    solved = {}
    for name, linear in block.named_children():
        W = linear.weight.detach().clone()
        q = quantize(W, *minmax_grid(W, scheme), scheme)
        linear.weight.copy_(q.dequantize())
        solved[name] = (q, W)
    return block, Windows(inputs, targets, 2), solved


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(rounding, "ITERATIONS", 60)
    monkeypatch.setattr(rounding, "BATCH_TOKENS", 160)


def learned(scheme=SCHEMES[0], seed=0, seconds=600.0, **options):
    block, windows, solved = case(scheme, **options)
    return learn_rounding("blk", block, BlockCall(), windows, solved, seed=seed, seconds=seconds)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_from_the_solvers_integers(scheme):
    _, _, solved = case(scheme)
    for q, W in solved.values():
        moved = quantize(W + 0.3, *minmax_grid(W, scheme), scheme)  # integers far from the nearest ones
        for start in (q, moved):
            linear = Rounded.of("x", start, W)
            assert torch.equal(linear.result().q, start.q)
            assert torch.equal(linear.weight(), start.dequantize())
            assert (linear.p - start.q.float()).abs().max() <= rounding.MARGIN + 1e-6


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_step_is_that_of_the_naive_one(scheme, monkeypatch):
    """V and m by autograd through the straight-through estimator, in float64; gradients in fp32 on every CPU."""
    monkeypatch.setattr("llmq.products.half_helps", lambda: False)
    block, windows, solved = case(scheme)
    linears = {name: Rounded.of(name, q, W) for name, (q, W) in solved.items()}
    x, y = windows.inputs[0].double(), windows.targets[0].double()
    parts, weights = {}, {}
    for name, linear in linears.items():
        linear.V.uniform_(-0.4, 0.4)
        s, z = linear.start.scale.double(), linear.zero.double()
        V, m = linear.V.double().requires_grad_(), linear.m.double().requires_grad_()
        position = linear.p.double() + V
        code = position + (position.round() - position).detach()  # the identity for the gradient
        code = code.clamp(0, scheme.levels - 1)
        groups = torch.arange(linear.p.shape[1]) // scheme.group_width(linear.p.shape[1])
        weights[f"{name}.weight"] = (code - z[:, groups]) * (s * m)[:, groups]
        parts[name] = (V, m)
    wrong = torch.func.functional_call(block.double(), weights, (x,)) - y
    (wrong.square().sum(-1) / y.square().sum(-1)).mean().backward()
    block.float()
    learner = rounding._Learner("blk", block, BlockCall(), windows, linears)
    learner.step([0], 1.0)
    for name, (V, m) in parts.items():
        for moved, start, step in ((linears[name].V, V, 0.5 / 60), (linears[name].m, m, 0.1 / 60)):
            want = start.detach() - step * start.grad.sign()
            wrong = (moved.double() - want.clamp(-0.5, 0.5) if start is V else moved.double() - want).abs() > 1e-6
            # Only where the gradient is too small for fp32 to know its sign.
            assert (start.grad[wrong].abs() < 1e-3 * start.grad.abs().mean()).all()
            assert wrong.float().mean() < 0.02
            assert (start.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_held_out_loss_falls(scheme):
    block, windows, solved = case(scheme)
    before = {name: w.clone() for name, w in block.state_dict().items()}
    better, report = learn_rounding("blk", block, BlockCall(), windows, solved, seed=0, seconds=600)
    assert all(torch.equal(w, before[name]) for name, w in block.state_dict().items())
    assert report["iterations"] == rounding.ITERATIONS

    def loss(weights):
        held = list(zip(windows.inputs, windows.targets, strict=True))[-2:]
        wrong = [torch.func.functional_call(block, weights, (x,)) - y for x, y in held]
        shares = [w.square().sum(-1) / y.square().sum(-1) for w, (_, y) in zip(wrong, held, strict=True)]
        return float(torch.stack(shares).mean())

    assert loss({}) == pytest.approx(report["loss_before"], rel=1e-5)
    assert loss({f"{n}.weight": q.dequantize() for n, q in better.items()}) == pytest.approx(
        report["loss_after"], rel=1e-5
    )
    assert report["loss_after"] < 0.9 * report["loss_before"]
    for name, q in better.items():
        assert (q.q.int() - solved[name][0].q.int()).abs().max() == 1
        assert torch.equal(q.dequantize(), dequantize(q.q, q.scale, q.zero, scheme))


def test_one_seed_gives_the_same_bits_and_another_does_not():
    first, again, other = (learned(seed=s)[0] for s in (0, 0, 1))
    assert all(q.digest() == again[name].digest() for name, q in first.items())
    assert any(q.digest() != other[name].digest() for name, q in first.items())


def test_what_does_not_help_is_dropped(monkeypatch):
    monkeypatch.setattr(rounding, "M_REACH", 2000.0)
    better, report = learned()
    assert better == {}
    assert report["loss_after"] == report["loss_before"]


def test_the_clock_ends_it():
    _, report = learned(seconds=0.0)
    assert report["iterations"] == 1
    assert report["loss_after"] <= report["loss_before"]


def test_what_is_not_finite_stops_with_a_name():
    block, windows, solved = case()
    windows.targets[0][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"blk.(up|down): the gradient of its rounding is not finite"):
        learn_rounding("blk", block, BlockCall(), windows, solved, seed=0, seconds=600)


def test_a_run_learns_where_bits_are_few(tiny_model, tmp_path, monkeypatch):
    # So few steps on so little text change something only from the borders of the codes.
    for name, value in (("ITERATIONS", 20), ("V_REACH", 1.0), ("MARGIN", 0.49)):
        monkeypatch.setattr(rounding, name, value)
    calib = CalibConfig(calib="stdlib", nsamples=4, seqlen=48)
    options = {"calib": calib, "recipe": RecipeConfig(only="target,refit,rounding")}
    reports = {}
    for bits in (2, 4):
        result = quantize_model(tiny_model("gemma3"), QuantScheme(bits, 32), output=tmp_path / str(bits), **options)
        reports[bits] = result.report.get("learned", {}).get("rounding", [])
    assert reports[4] == []
    assert len(reports[2]) == len({row["block"] for row in reports[2]}) > 1
    assert all(row["loss_after"] <= row["loss_before"] for row in reports[2])
    assert any(row["loss_after"] < row["loss_before"] for row in reports[2])
