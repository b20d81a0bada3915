import pytest
import torch

from llmq.config import BITS, GROUP_SIZES, QuantScheme
from llmq.qtensor import (
    MIN_SCALE,
    QTensor,
    expand_groups,
    from_codes,
    minmax_grid,
    quantize,
    range_grid,
    storable_scale,
)

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (True, False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("k", [1, 31, 100, 257])
def test_minmax_error_is_at_most_half_a_step(scheme, k):
    torch.manual_seed(k)
    W = torch.randn(5, k)
    t = quantize(W, *minmax_grid(W, scheme), scheme)
    step = expand_groups(t.scale.float().abs(), k, scheme)
    # Half a step of rounding. A symmetric grid ends one step short of the opposite extreme, where it clips; fp16
    # rounding of the scale moves the ends by levels * 2**-11 of a step.
    limit = (1.0 if scheme.sym else 0.5) + scheme.levels * 2**-11 + 1e-3
    assert ((t.dequantize() - W).abs() <= limit * step).all()
    assert int(t.q.max()) < scheme.levels


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grid_uses_the_full_range(bits):
    scheme = QuantScheme(bits, 32, sym=True)
    for sign in (1.0, -1.0):
        W = torch.zeros(1, 32)
        W[0, 3] = 0.7 * sign
        t = quantize(W, *minmax_grid(W, scheme), scheme)
        assert int(t.q[0, 3]) == 0, "the value of largest magnitude takes the outermost code"
        assert t.dequantize()[0, 3] == pytest.approx(0.7 * sign, rel=2**-11)
        assert (t.dequantize()[0, :3] == 0).all()


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(4, 32, sym=True)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-12, 3.0, -3.0, 6e4])
def test_constant_groups(scheme, value):
    W = torch.full((2, 40), value)
    t = quantize(W, *minmax_grid(W, scheme), scheme)
    assert torch.isfinite(t.scale).all()
    assert torch.allclose(t.dequantize(), W, rtol=2**-10, atol=MIN_SCALE)
    if value == 0:
        assert (t.dequantize() == 0).all()


def test_zero_is_exact_in_asymmetric_grids():
    torch.manual_seed(0)
    W = torch.randn(4, 64) + 5
    W[:, 7] = 0
    scheme = QuantScheme(4, 32)
    assert (quantize(W, *minmax_grid(W, scheme), scheme).dequantize()[:, 7] == 0).all()


def test_storable_scale_is_what_fp16_holds():
    s = storable_scale(torch.tensor([0.0, 1e-9, -1e-9, 0.1, -0.1, 1e6]))
    assert torch.equal(s, s.half().float())
    assert s.abs().min() == MIN_SCALE
    assert s.tolist()[2] == -MIN_SCALE
    assert s.max() == 65504


def test_digest_sees_every_part():
    torch.manual_seed(0)
    W = torch.randn(4, 64)
    scheme = QuantScheme(4, 32)
    t = quantize(W, *minmax_grid(W, scheme), scheme)
    q = t.q.clone()
    q[0, 0] ^= 1
    others = [
        QTensor(q, t.scale, t.zero, scheme),
        QTensor(t.q, t.scale * 2, t.zero, scheme),
        QTensor(t.q, t.scale, t.zero ^ 1, scheme),
    ]
    assert len({t.digest(), *(o.digest() for o in others)}) == 4
    assert t.digest() == QTensor(t.q.clone(), t.scale.clone(), t.zero.clone(), scheme).digest()


def test_errors():
    scheme = QuantScheme(4, 32)
    q = torch.zeros(2, 40, dtype=torch.uint8)
    good = torch.ones(2, 2, dtype=torch.float16)
    zero = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\); a 2 x 40 matrix in w4g32 needs \(2, 2\)"):
        QTensor(q, good[:, :1], zero, scheme)
    with pytest.raises(ValueError, match="needs a zero point"):
        QTensor(q, good, None, scheme)
    with pytest.raises(ValueError, match="has no zero point"):
        QTensor(q, good, zero, QuantScheme(4, 32, sym=True))
    with pytest.raises(TypeError, match="expected torch.uint8 and torch.float16"):
        QTensor(q, good.float(), zero, scheme)
    with pytest.raises(ValueError, match="not representable in fp16"):
        from_codes(q.float(), torch.full((2, 2), 0.1), zero.float(), scheme)


def test_range_grid_holds_zero():
    scale, zero = range_grid(torch.tensor([[1.0]]), torch.tensor([[2.0]]), QuantScheme(4, 32))
    assert zero.item() == 0
    assert scale.item() == pytest.approx(2 / 15, rel=2**-11)
