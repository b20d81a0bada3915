"""Products through oneDNN give torch's numbers, and torch's own way is taken wherever they do not apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq import products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is taken whatever the CPU is; the shapes it was given."""
    taken: list[tuple[int, ...]] = []
    own = products._through_onednn

    def counted(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        taken.append((*x.shape, w.shape[0]))
        return own(x, w, bias)

    monkeypatch.setattr(products, "helps", lambda: True)
    monkeypatch.setattr(products, "_through_onednn", counted)
    return taken


def close(actual: Tensor, expected: Tensor, terms: Tensor, k: int) -> None:
    """An fp32 sum of k products is off by k roundings of the sum of their magnitudes, ``terms``, at most."""
    assert bool(((actual - expected).abs() <= k * torch.finfo(torch.float32).eps * terms).all())


@pytest.mark.parametrize(("m", "k", "n"), [(300, 129, 77), (64, 640, 2048), (2048, 33, 640)])
def test_products_are_those_of_fp64(onednn: list[tuple[int, ...]], m: int, k: int, n: int) -> None:
    g = torch.Generator().manual_seed(k)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    expected, terms = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T)):
        close(products.matmul(left, right), expected, terms, k)
    assert onednn == [(m, k, n)] * 3
    wide = torch.randn(k, m + n + 7, generator=g)  # columns of a wider matrix, as tiles of a Hessian are
    left, right = wide[:, 5 : 5 + m].T, wide[:, m : m + n]
    close(products.matmul(left, right), left.double() @ right.double(), left.abs().double() @ right.abs().double(), k)


def test_linears_of_a_module(onednn: list[tuple[int, ...]]) -> None:
    linear = nn.Linear(130, 257)
    x = torch.randn(2, 50, 130)
    with torch.no_grad(), products.fast_linears():
        inside = linear(x)
    assert onednn == [(2, 50, 130, 257)]
    assert inside.shape == (2, 50, 257)
    with torch.no_grad():
        exact = linear.double()(x.double())
        terms = nn.functional.linear(x.double().abs(), linear.weight.abs(), linear.bias.abs())
        close(inside, exact, terms, 131)
        linear.float()(x)  # not counted
    assert len(onednn) == 1, "outside of the context torch's own way is taken"


def test_what_it_leaves_to_torch(onednn: list[tuple[int, ...]]) -> None:
    with products.fast_linears():
        learning = nn.Linear(256, 256)
        learning(torch.randn(64, 256)).sum().backward()
        assert learning.weight.grad is not None
        with torch.no_grad():
            nn.functional.linear(torch.randn(64, 256, dtype=torch.float64), torch.randn(256, 256, dtype=torch.float64))
            nn.functional.linear(torch.randn(64, 256).bfloat16(), torch.randn(256, 256).bfloat16())
            nn.functional.linear(torch.randn(2, 16), torch.randn(16, 16))
    assert onednn == []


def test_the_maker_of_the_cpu(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n")
    assert products.cpu_vendor(listing) == "AuthenticAMD"
    assert products.cpu_vendor(tmp_path / "absent") == ""
