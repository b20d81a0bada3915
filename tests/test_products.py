"""Products through oneDNN give torch's numbers, and torch's own way is taken wherever they do not apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq import cpuinfo, products

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
    with torch.no_grad(), products.fast_products():
        inside = linear(x)
    assert onednn == [(2, 50, 130, 257)]
    assert inside.shape == (2, 50, 257)
    with torch.no_grad():
        exact = linear.double()(x.double())
        terms = nn.functional.linear(x.double().abs(), linear.weight.abs(), linear.bias.abs())
        close(inside, exact, terms, 131)
        linear.float()(x)  # not counted
    assert len(onednn) == 1, "outside of the context torch's own way is taken"


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradients_of_a_linear(onednn: list[tuple[int, ...]], needed: tuple[bool, bool, bool]) -> None:
    g = torch.Generator().manual_seed(3)
    x, w, bias = (torch.randn(*shape, generator=g) for shape in ((2, 50, 130), (257, 130), (257,)))
    dy = torch.randn(2, 50, 257, generator=g)
    for t, need in zip((x, w, bias), needed, strict=True):
        t.requires_grad_(need)
    with products.fast_products():
        nn.functional.linear(x, w, bias).backward(dy)
    assert len(onednn) == 1 + sum(needed[:2])
    rows, X, W = (t.detach().double() for t in (dy.reshape(-1, 257), x.reshape(-1, 130), w))
    expected = (rows @ W, rows.T @ X, rows.sum(0))
    terms = (rows.abs() @ W.abs(), rows.T.abs() @ X.abs(), rows.abs().sum(0))
    for t, need, e, size, k in zip((x, w, bias), needed, expected, terms, (257, 100, 100), strict=True):
        assert (t.grad is not None) == need
        if t.grad is not None:
            close(t.grad.reshape(e.shape), e, size, k)


def test_what_it_leaves_to_torch(onednn: list[tuple[int, ...]]) -> None:
    with products.fast_products():
        a = torch.randn(256, 256, requires_grad=True)
        products.matmul(a, a).sum().backward()  # type: ignore[no-untyped-call]
        assert a.grad is not None
        with torch.no_grad():
            nn.functional.linear(torch.randn(64, 256, dtype=torch.float64), torch.randn(256, 256, dtype=torch.float64))
            nn.functional.linear(torch.randn(64, 256).bfloat16(), torch.randn(256, 256).bfloat16())
            nn.functional.linear(torch.randn(2, 16), torch.randn(16, 16))
    assert onednn == []


def test_the_maker_of_the_cpu(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n")
    assert cpuinfo.vendor(listing) == "AuthenticAMD"
    assert cpuinfo.vendor(tmp_path / "absent") == ""


def test_flags_are_read_as_linux_writes_them(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: fpu avx512_bf16 amx_tile\n\nflags\t\t: fpu\n")
    (tmp_path / "arm").write_text("processor : 0\nFeatures\t: fp asimd bf16\n")
    assert cpuinfo.flags(tmp_path / "x86") == {"fpu", "avx512_bf16", "amx_tile"}
    assert products.HALF_FLAGS & cpuinfo.flags(tmp_path / "arm") == {"bf16"}
    assert cpuinfo.flags(tmp_path / "none") == set()


@pytest.mark.parametrize("half", [False, True])
def test_learning_goes_through_bf16_where_that_helps(
    onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Gradients stay within bf16's rounding, 2**-8 for a factor and its product's other, of the exact ones."""
    monkeypatch.setattr(products, "half_helps", lambda: half)
    x, w = torch.randn(300, 129), torch.randn(77, 129, requires_grad=True)
    with products.learning_linears():
        y = nn.functional.linear(x, w)
    assert y.dtype == (torch.bfloat16 if half else torch.float32)
    assert bool(onednn) == (not half)
    y.backward(torch.ones_like(y))
    exact = x.double().sum(0).expand(77, 129)
    assert w.grad is not None
    terms = x.abs().double().sum(0)
    assert bool(((w.grad - exact).abs() <= (2.0**-7 if half else 2.0**-14) * terms).all())
    assert torch.equal(w.grad[0], w.grad[1])
    assert half == (not torch.allclose(w.grad.double(), exact, rtol=1e-5, atol=1e-4))
