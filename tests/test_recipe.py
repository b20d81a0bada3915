"""The recipe's steps against naive ones in fp64: the loss that they lower, and what they may not touch."""

import pytest
import torch

from llmq.config import PRESETS, GPTQConfig, QuantScheme, RecipeConfig
from llmq.qtensor import dequantize, minmax_grid, round_to_grid
from llmq.solvers import recipe
from llmq.solvers.hessian import InputStats
from llmq.solvers.objective import ALPHAS, Objective, choose_alpha, measured
from llmq.solvers.polish import descend, refit_scales

N, K, T = 12, 100, 900
SCHEMES = [QuantScheme(4, 32, False), QuantScheme(3, 64, True), QuantScheme(2, 32, False), QuantScheme(4, -1, False)]


def inputs(seed: int = 0, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """(X of the original model, X~ of the quantized one) f32[T, K], correlated, a few channels loud."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=torch.Generator().manual_seed(1)) / K**0.5
    X = torch.randn(tokens, K, generator=g) @ mixing * torch.linspace(0.2, 3, K)
    damage = 0.2 * torch.randn(K, K, generator=torch.Generator().manual_seed(2)) / K**0.5
    return X, X + X @ damage + 0.05 * torch.randn(tokens, K, generator=g)


def weights() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(3))


def statistics(seed: int = 0) -> InputStats:
    X, Xq = inputs(seed)
    stats = InputStats(K, paired=True)
    stats.add(Xq, X)
    return stats


def rounded(W, scheme):
    """Round to nearest: (codes, scale, zero), f32."""
    scale, zero = minmax_grid(W, scheme)
    width = scheme.group_width(K)
    columns = torch.arange(K) // width
    return round_to_grid(W, scale[:, columns], zero[:, columns], scheme.levels), scale, zero


def an_objective(damp: float = 0.01) -> Objective:
    o = measured(weights(), statistics(), "x")
    return Objective(o.W, o.S + damp * o.S.diagonal().mean() * torch.eye(K), 0.5 * o.R)


def test_the_loss_is_the_error_of_the_output():
    W, (X, Xq) = weights(), inputs()
    W_hat = W + 0.1 * torch.randn(N, K, generator=torch.Generator().manual_seed(4))
    objective = measured(W, statistics(), "x")
    X, Xq = X.double(), Xq.double()

    def error(V):
        return float(((X @ W.double().T - Xq @ V.double().T) ** 2).sum() / T)

    want = error(W_hat) - error(W)
    assert abs(objective.loss(W_hat) - want) < 1e-4 * error(W)
    assert abs(measured(W * 1.01, statistics(), "x").loss(W_hat) - want) > 1e-2 * abs(want)


def test_descent_points_down_the_loss():
    objective = an_objective()
    W_hat = objective.W + 0.1
    step = objective.descent(W_hat)
    slope = (objective.loss(W_hat + 1e-3 * step) - objective.loss(W_hat - 1e-3 * step)) / 2e-3
    assert slope == pytest.approx(-2 * float((step * step).sum()), rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refit_finds_the_scales_of_least_squares(scheme):
    objective = an_objective()
    codes, scale, zero = rounded(objective.W, scheme)
    new = refit_scales(codes, scale, zero, objective, scheme)
    assert torch.equal(new.half().float(), new)
    L = torch.linalg.cholesky(objective.S.double())
    columns = torch.arange(K) // scheme.group_width(K)
    best = torch.empty(scale.shape, dtype=torch.float64)
    for n in range(N):  # min | L^T (C s - target) |, target being the real-valued optimum
        centred = (codes[n] - zero[n, columns]).double()
        design = L.T @ (centred[:, None] * torch.nn.functional.one_hot(columns).double())
        target = objective.W[n].double() + torch.linalg.solve(objective.S.double(), objective.R[n].double())
        best[n] = torch.linalg.lstsq(design, (L.T @ target)[:, None]).solution[:, 0]
    assert torch.allclose(new.double(), best, rtol=4e-3, atol=1e-5)  # fp16 (2**-11), errors spread, the ridge

    def loss(s):
        return objective.loss(dequantize(codes, s.float(), zero, scheme))

    start = loss(scale)
    assert loss(new) < start
    assert loss(new) - loss(best) < 0.01 * (start - loss(best))
    assert loss(new * 1.01) > loss(new)


def test_refit_leaves_a_row_that_it_cannot_better():
    objective = an_objective()
    scheme = QuantScheme(4, 32, False)
    codes, scale, zero = rounded(objective.W, scheme)
    once = refit_scales(codes, scale, zero, objective, scheme)
    twice = refit_scales(codes, once, zero, objective, scheme)
    rows = [objective.rows(dequantize(codes, s, zero, scheme)) for s in (once, twice)]
    assert (rows[1] <= rows[0]).all()


def test_refit_of_a_group_of_zeros_keeps_its_scale():
    objective = an_objective()
    scheme = QuantScheme(4, 32, False)
    codes, scale, zero = rounded(objective.W, scheme)
    codes[:, :32] = zero[:, :1]
    new = refit_scales(codes, scale, zero, objective, scheme)
    assert torch.isfinite(new).all()
    assert torch.allclose(new[:, 0], scale[:, 0], rtol=2e-3)


def naive_descent(codes, scale, zero, objective, scheme):
    columns = torch.arange(K) // scheme.group_width(K)
    s, z = scale[:, columns].double(), zero[:, columns].double()
    S, R, W = objective.S.double(), objective.R.double(), objective.W.double()
    q = codes.double().clone()
    for j in range(K):
        What = (q - z) * s
        r = R[:, j] - (What - W) @ S[:, j]
        w = What[:, j] + r / S[j, j]
        q[:, j] = ((w / s[:, j]).round() + z[:, j]).clamp(0, scheme.levels - 1)
    return q


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_descent_makes_the_codes_of_the_naive_one(scheme, monkeypatch):
    monkeypatch.setattr("llmq.solvers.polish.BLOCK", 16)  # 100 columns cross panel borders, with a remainder
    objective = an_objective()
    codes, scale, zero = rounded(objective.W, scheme)
    got = descend(codes, scale, zero, objective, scheme)
    want = naive_descent(codes, scale, zero, objective, scheme)
    assert (got.double() != want).float().mean() < 0.01  # ties that fp32 breaks the other way
    before, after = (objective.rows(dequantize(c, scale, zero, scheme)) for c in (codes, got))
    assert (after <= before + 1e-5 * before.abs()).all()
    assert after.sum() < 0.9 * before.sum()
    again = descend(codes, scale, zero, objective, scheme, sweeps=4)
    assert objective.loss(dequantize(again, scale, zero, scheme)) < float(after.sum())


def test_alpha_is_the_best_of_those_offered():
    held = measured(weights(), statistics(seed=5), "x")
    train = measured(weights(), statistics(), "x")
    repair = torch.linalg.solve(train.S.double(), train.R.double().T).T.float()
    losses = {a: held.loss(held.W + a * repair) for a in ALPHAS}
    assert choose_alpha(repair, held) == min(losses, key=losses.get)
    assert choose_alpha(repair, held) > 0
    assert choose_alpha(-repair, held) == 0.0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_kept_step_lowers_the_held_out_loss(scheme):
    W, train, held = weights(), statistics(), statistics(seed=6)
    kept = {}
    for preset in PRESETS:
        qtensor, report = recipe.solve("x", W, train, held, scheme, GPTQConfig(), RecipeConfig(preset))
        losses = [loss for _, loss in report["losses"]]
        assert losses == sorted(losses, reverse=True)
        judge = measured(W, held, "x")
        power = float(((W @ judge.S) * W).sum())
        assert judge.loss(qtensor.dequantize()) / power == pytest.approx(losses[-1], rel=1e-3)
        kept[preset] = losses[-1]
    # Damping is chosen before the restarts, so "best" need not be below "balanced" in every single linear.
    assert max(kept["best"], kept["balanced"]) < kept["fast"]


def test_nothing_is_repaired_without_held_out_windows():
    train = statistics()
    _, report = recipe.solve("x", weights(), train, None, QuantScheme(), GPTQConfig(), RecipeConfig())
    assert (report["alpha"], report["held_out"]) == (0.0, False)
    _, report = recipe.solve("x", weights(), train, statistics(7), QuantScheme(), GPTQConfig(), RecipeConfig())
    assert report["alpha"] > 0


def test_unknown_steps_are_named():
    with pytest.raises(ValueError, match="'polish'; known: importance, target, refit, descent, restarts, damping"):
        RecipeConfig(only="refit,polish")
    assert RecipeConfig(only="refit").steps == ("refit",)


def test_damping_is_chosen_by_held_out_loss():
    W, train, held, scheme = weights(), statistics(), statistics(seed=8), QuantScheme(3, 32)

    def solved(recipe_cfg, percdamp=0.01):
        report = recipe.solve("x", W, train, held, scheme, GPTQConfig(percdamp=percdamp), recipe_cfg)[1]
        return report["percdamp"], report["losses"][-1][1]

    each = {d: solved(RecipeConfig("balanced"), d)[1] for d in recipe.DAMPINGS}
    damping = min(each, key=each.get)
    percdamp, loss = solved(RecipeConfig(only="target,refit,descent,damping"))
    assert (percdamp, loss) == (pytest.approx(damping), each[damping])
    # With restarts the damping is chosen before them.
    assert solved(RecipeConfig(only="target,refit,descent,restarts,damping")) == solved(
        RecipeConfig(only="target,refit,descent,restarts"), damping
    )
