import pytest
import torch

from llmq.packing import pack_bits, packed_width, unpack_bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 100, 129])
def test_round_trip_and_width(bits, n):
    torch.manual_seed(bits * 1000 + n)
    codes = torch.randint(0, 1 << bits, (3, n), dtype=torch.uint8)
    before = codes.clone()
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, packed_width(n, bits))
    assert torch.equal(unpack_bits(packed, bits, n), codes)
    assert torch.equal(codes, before), "the input must not change"


@pytest.mark.parametrize("bits", range(1, 9))
def test_law_of_the_layout(bits):
    """Bit j of the stream is bit j % 8 of byte j // 8; spare bits are zero: checked bit by bit."""
    torch.manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (13,), dtype=torch.uint8)
    stream = [(int(c) >> b) & 1 for c in codes for b in range(bits)]
    stream += [0] * (-len(stream) % 8)
    expected = [sum(bit << i for i, bit in enumerate(stream[a : a + 8])) for a in range(0, len(stream), 8)]
    assert pack_bits(codes, bits).tolist() == expected


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        (range(8), 4, [0x76543210]),
        ([0, 1, 2, 3] * 4, 2, [0xE4E4E4E4]),
        ([0, 1, 2, 255], 8, [0xFF020100]),
        (list(range(8)) * 4, 3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_same_words_as_gptq(codes, bits, words):
    """Frozen words of the GPTQ layout (codes of one output along in_features, int32 little-endian)."""
    packed = pack_bits(torch.tensor(list(codes), dtype=torch.uint8), bits)
    assert list(packed.numpy().view("<u4")) == words


def test_errors():
    codes = torch.tensor([1, 4], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"code 4 does not fit 2 bits \(largest: 3\)"):
        pack_bits(codes, 2)
    with pytest.raises(ValueError, match="bits is 9"):
        pack_bits(codes, 9)
    with pytest.raises(TypeError, match=r"torch.int64, expected torch.uint8"):
        pack_bits(codes.long(), 4)
    with pytest.raises(ValueError, match="5 codes of 3 bits take 2 bytes a row, the tensor has 3"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)
