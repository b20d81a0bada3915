import pytest
import torch

from llmq.config import BITS, GROUP_SIZES, QuantScheme
from llmq.formats import FORMATS, native
from llmq.qtensor import QTensor, minmax_grid, quantize

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (True, False)]


def random_qtensor(n: int, k: int, scheme: QuantScheme) -> QTensor:
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k))
    return quantize(W, *minmax_grid(W, scheme), scheme)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (17, 100), (5, 257), (16, 256)])
def test_round_trip_is_exact(name, scheme, n, k):
    t = random_qtensor(n, k, scheme)
    tensors = FORMATS[name].pack(t)
    kept = {key: value.clone() for key, value in tensors.items()}
    assert FORMATS[name].unpack(tensors, n, k, scheme).digest() == t.digest()
    assert all(torch.equal(tensors[key], kept[key]) for key in kept), "unpack must not change its input"
    assert {key: (tuple(v.shape), v.dtype) for key, v in tensors.items()} == FORMATS[name].layout(n, k, scheme)


def test_frozen_bytes():
    """The layout of docs/FORMATS.md, byte for byte."""
    q = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    t = QTensor(
        q, torch.tensor([[0.5]], dtype=torch.float16), torch.tensor([[7]], dtype=torch.uint8), QuantScheme(4, 32)
    )
    tensors = native.pack(t)
    assert tensors["qweight"].tolist() == [[0x21, 0x0F]]
    assert tensors["zeros"].tolist() == [[0x07]]
    assert t.dequantize().tolist() == [[-3.0, -2.5, 4.0]]


def test_errors_name_tensor_and_both_layouts():
    scheme = QuantScheme(4, 32)
    tensors = native.pack(random_qtensor(4, 40, scheme))
    with pytest.raises(
        ValueError, match=r"q_proj: tensor 'zeros' is missing \(a w4g32 matrix has qweight, scales, zeros\)"
    ):
        native.unpack({k: v for k, v in tensors.items() if k != "zeros"}, 4, 40, scheme, name="q_proj")
    with pytest.raises(
        ValueError, match=r"qweight is torch.uint8 \(4, 20\); a 4 x 48 matrix in w4g32 has torch.uint8 \(4, 24\)"
    ):
        native.unpack(tensors, 4, 48, scheme)
    tensors["scales"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="a scale is not finite"):
        native.unpack(tensors, 4, 40, scheme)
