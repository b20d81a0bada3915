import re

import pytest
import torch

from llmq.config import BITS, GROUP_SIZES, QuantScheme
from llmq.formats import FORMATS, Inexact, native
from llmq.qtensor import QTensor, minmax_grid, quantize

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (True, False)]


def random_qtensor(n: int, k: int, scheme: QuantScheme) -> QTensor:
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k))
    return quantize(W, *minmax_grid(W, scheme), scheme)


SHAPES = [(1, 1), (3, 31), (17, 100), (5, 257), (16, 256), (32, 96), (64, 1024), (40, 384)]


def representable(name: str, t: QTensor) -> QTensor:
    """Q4_1 holds fp16 offsets: scales of few bits make them so."""
    if name != "gguf" or t.zero is None:
        return t
    scale = (t.scale.view(torch.int16) & ~0xF).view(torch.float16)
    return QTensor(t.q, scale, t.zero, t.scheme)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_trip_is_exact(name, scheme):
    for n, k in SHAPES:
        check_round_trip(name, scheme, n, k)


def check_round_trip(name: str, scheme: QuantScheme, n: int, k: int) -> None:
    row = FORMATS[name]
    t = representable(name, random_qtensor(n, k, scheme))
    reason = row.refusal(n, k, scheme)
    if reason is not None:
        with pytest.raises(Inexact, match=re.escape(reason)):
            row.pack(t)
        return
    tensors = row.pack(t)
    kept = {key: value.clone() for key, value in tensors.items()}
    before = t.digest()
    found = row.unpack(tensors, n, k, scheme)
    assert found.digest() == t.digest()
    assert all(torch.equal(tensors[key], kept[key]) for key in kept), "unpack must not change its input"
    for part in (found.q, found.scale, found.zero):
        if part is not None:
            part.zero_()
    assert t.digest() == before, "what is unpacked must not share memory with what was packed"
    assert all(torch.equal(tensors[key], kept[key]) for key in kept), "nor with the tensors"
    want = row.layout(n, k, scheme)
    assert {key: tuple(v.shape) for key, v in tensors.items()} == {key: shape for key, (shape, _) in want.items()}
    floats = {key for key, (_, dtype) in want.items() if dtype.is_floating_point}
    assert all(tensors[key].dtype == want[key][1] for key in want.keys() - floats)


@pytest.mark.parametrize(
    ("name", "least"),
    # Of 56 schemes x 8 shapes; a format that refused too much would pass the round trip by saying no.
    [
        ("llmq", 448),
        ("gptq", 112),
        ("awq", 36),
        ("pack-quantized", 176),
        ("int-quantized", 44),
        ("gguf", 84),
        ("mlx", 80),
    ],
)
def test_formats_hold_what_they_should(name, least):
    held = [FORMATS[name].refusal(n, k, s) is None for s in SCHEMES for n, k in SHAPES]
    assert sum(held) >= least


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
