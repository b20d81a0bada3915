"""Restarts: what each row keeps, the orders that are tried, and that no row loses by them."""

import pytest
import torch
from test_recipe import SCHEMES, K, N, inputs, statistics, weights

from llmq.config import GPTQConfig, QuantScheme, RecipeConfig
from llmq.qtensor import minmax_grid
from llmq.solvers import gptq, recipe
from llmq.solvers.grid import search_grid
from llmq.solvers.objective import Objective
from llmq.solvers.polish import descend, refit_scales
from llmq.solvers.restarts import State, best_rows, restarted

CFG = GPTQConfig()


@pytest.fixture
def prepared():
    stats = statistics()
    return gptq.prepare(stats.hessian("x"), stats.n_tokens, CFG)


def states(scheme, prepared, objective, n=3):
    """GPTQ's solutions for weights that are a little different each time: no row's best is always the same one's."""
    noise = torch.randn(n, N, K, generator=torch.Generator().manual_seed(7)) * 0.02
    return [State.of(gptq.solve(objective.W + e, prepared, scheme, CFG)[0]) for e in noise]


def test_each_row_keeps_the_best(prepared):
    objective = Objective(weights(), prepared.S, torch.zeros(N, K))
    found = states(SCHEMES[0], prepared, objective)
    losses = torch.stack([objective.rows(s.W_hat) for s in found])
    assert len(losses.argmin(0).unique()) > 1
    best = best_rows(found, objective)
    assert torch.equal(objective.rows(best.W_hat), losses.min(0)[0])
    again = best.with_codes(best.codes, SCHEMES[0])
    assert torch.equal(again.W_hat, best.W_hat)


def test_the_other_order_is_by_conditional_variance(prepared):
    variance = 1 / torch.linalg.inv(prepared.S.double()).diagonal()
    order = prepared.conditional.order
    assert torch.equal(order.sort()[0], torch.arange(K))
    # Sorted up to what the fp32 factor can tell apart.
    assert (variance[order].diff() < 1e-4 * variance.max()).all()
    U = prepared.conditional.factor.U.double()
    A = prepared.S[order][:, order].double()
    assert torch.allclose(U.T @ U @ A, torch.eye(K, dtype=torch.float64), atol=1e-3)
    assert not torch.equal(order, prepared.path.order)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_loses_by_restarts(scheme, prepared):
    objective = Objective(weights(), prepared.S, torch.zeros(N, K))

    def polish(s):
        scale = refit_scales(s.codes, s.scale, s.zero, objective, scheme)
        s = State(s.codes, scale, s.zero, s.W_hat)
        return s.with_codes(descend(s.codes, s.scale, s.zero, objective, scheme), scheme)

    start = State.of(gptq.solve(objective.W, prepared, scheme, CFG)[0])
    once = polish(start)
    end = restarted(start, objective.W, prepared, objective, scheme, CFG, polish)
    before, after = objective.rows(once.W_hat), objective.rows(end.W_hat)
    assert (after <= before).all()
    assert float(after.sum()) < 0.99 * float(before.sum())
    assert torch.equal(end.with_codes(end.codes, scheme).W_hat, end.W_hat)
    assert torch.equal(end.scale.half().float(), end.scale)


def test_two_ends_are_tried_apart():
    scheme, W = QuantScheme(2, 32), weights()
    W += 0.5  # a skewed range: the ends want different shares
    H = torch.eye(K)

    def error(grid):
        (s, z), width = grid, 32
        columns = torch.arange(K) // width
        s, z = s[:, columns], z[:, columns]
        return ((((W / s).round() + z).clamp(0, 3) - z) * s - W).square().sum()

    apart, together, plain = (
        error(search_grid(W, H, scheme, 20, ends_apart=True)),
        error(search_grid(W, H, scheme, 20)),
        error(minmax_grid(W, scheme)),
    )
    assert apart < together < plain


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
def test_the_recipe_keeps_them_if_held_out_windows_agree(scheme):
    held = statistics(5)

    def loss(only):
        q, report = recipe.solve("x", weights(), statistics(), held, scheme, CFG, RecipeConfig(only=only))
        X = inputs(5)
        error = ((X[0] @ weights().T - X[1] @ q.dequantize().T) ** 2).sum()
        return float(error), report

    plain, _ = loss("target,refit,descent")
    more, report = loss("target,refit,descent,restarts")
    names = [name for name, _ in report["losses"]]
    values = [value for _, value in report["losses"]]
    assert values == sorted(values, reverse=True)
    assert ("restarts" in names) != ("restarts" in report["refused"])
    if "restarts" not in names:
        assert more == plain
