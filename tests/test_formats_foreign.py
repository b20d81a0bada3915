"""The formats of other tools: frozen vectors, and decoders written bit by bit, sharing nothing with the packers."""

from __future__ import annotations

import gguf as gguf_package
import numpy as np
import pytest
import torch
from test_formats import random_qtensor

from llmq.config import QuantScheme
from llmq.formats import FORMATS, Inexact, awq, compressed_tensors, gguf, gptq, mlx
from llmq.formats.affine import Affine, from_qtensor, to_qtensor
from llmq.packing import pack_words
from llmq.qtensor import QTensor


def words(tensor: torch.Tensor) -> list[int]:
    return [int(v) & 0xFFFFFFFF for v in tensor.flatten().tolist()]


def codes(values: list[int]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.uint8)


def matrix(q: torch.Tensor, scheme: QuantScheme) -> QTensor:
    groups = (q.shape[0], scheme.n_groups(q.shape[1]))
    zero = None if scheme.sym else torch.zeros(groups, dtype=torch.uint8)
    return QTensor(q, torch.ones(groups, dtype=torch.float16), zero, scheme)


# Frozen vectors, computed from the layouts independently of this code.


def test_words_of_4_2_and_8_bits():
    assert words(pack_words(codes(list(range(8))), 4)) == [0x76543210]
    assert words(pack_words(codes([0, 1, 2, 3] * 4), 2)) == [0xE4E4E4E4]
    assert words(pack_words(codes([0, 1, 2, 255]), 8)) == [0xFF020100]


THREE_BIT = codes(list(range(8)) * 4)


def test_3_bits_cross_words_in_gptq_and_in_dense_compressed_tensors():
    dense = [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert words(pack_words(THREE_BIT, 3)) == dense
    t = matrix(THREE_BIT.repeat(32, 1), QuantScheme(3, -1, sym=True))
    assert words(FORMATS["gptq"].pack(t)["qweight"][:, 0]) == dense
    assert words(compressed_tensors.pack(t)["weight_packed"][0]) == dense


def test_3_bits_in_older_compressed_tensors_are_ten_a_word():
    t = matrix(THREE_BIT, QuantScheme(3, -1, sym=True))
    padded = [0x08FAC688, 0x1A23EB1A, 0x2C688FAC, 0x0000003E]
    assert words(compressed_tensors.pack(t, padded=True)["weight_packed"]) == padded


def test_awq_interleaves_outputs():
    q = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 32)
    assert words(awq.pack(matrix(q, QuantScheme(4, 32)))["qweight"][0]) == [0x75316420]


def test_gptq_symmetric_zeros():
    for bits, v1, v2 in ((2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)):
        t = matrix(torch.zeros(32, 32, dtype=torch.uint8), QuantScheme(bits, 32, sym=True))
        assert set(words(FORMATS["gptq"].pack(t)["qzeros"])) == {v1}
        assert set(words(FORMATS["gptq_v2"].pack(t)["qzeros"])) == {v2}
        for version, name in ((1, "gptq"), (2, "gptq_v2")):
            assert gptq.version_by_content(FORMATS[name].pack(t)["qzeros"], 32, bits) == version


def test_gptq_v1_of_a_zero_of_0_is_by_field():
    zero = torch.full((32, 1), 8, dtype=torch.uint8)
    zero[1] = 0
    t = QTensor(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 1).half(), zero, QuantScheme(4, 32))
    assert words(FORMATS["gptq_v2"].pack(t)["qzeros"])[0] == 0x88888808
    packed = FORMATS["gptq"].pack(t)
    assert words(packed["qzeros"])[0] == 0x777777F7
    assert FORMATS["gptq"].unpack(packed, 32, 32, t.scheme).digest() == t.digest()
    assert gptq.version_by_content(packed["qzeros"], 32, 4) is None


def test_q4_0_block():
    q = torch.arange(32, dtype=torch.uint8)[None] % 16
    t = QTensor(q, torch.tensor([[-0.5]]).half(), None, QuantScheme(4, 32, sym=True))
    data = gguf.pack(t)["data"][0].tolist()
    assert len(data) == 18
    assert data[:2] == [0x00, 0xB8]
    assert data[2:] == [j % 16 | (j + 16) % 16 << 4 for j in range(16)]


# Decoders, a bit at a time.


def stream(row: list[int], bits: int, n_codes: int) -> list[int]:
    whole = sum(word << (32 * i) for i, word in enumerate(row))
    return [whole >> (i * bits) & ((1 << bits) - 1) for i in range(n_codes)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_against_a_bit_loop(bits: int, version: int, sym: bool):
    n, k = 32, 96
    t = random_qtensor(n, k, QuantScheme(bits, 64, sym))
    packed = gptq.pack(t, version=version)
    W = torch.empty(n, k)
    for j in range(n):
        column = stream(words(packed["qweight"][:, j]), bits, k)
        for i in range(k):
            g = int(packed["g_idx"][i])
            zero = stream(words(packed["qzeros"][g]), bits, n)[j]
            zero = (zero + 1) % (1 << bits) if version == 1 else zero
            W[j, i] = float(packed["scales"][g, j]) * (column[i] - zero)
    assert torch.equal(W, t.dequantize())


def test_awq_gemm_and_gemv_against_a_nibble_loop():
    n, k, g = 16, 96, 32
    t = random_qtensor(n, k, QuantScheme(4, g))
    gemm, gemv = awq.pack(t), awq.pack_gemv(t)
    undo = [0, 4, 1, 5, 2, 6, 3, 7]  # where output i of eight stands in a word
    W, V = torch.empty(n, k), torch.empty(n, k)
    for j in range(n):
        for i in range(k):
            code = words(gemm["qweight"][i])[j // 8] >> (4 * undo[j % 8]) & 15
            zero = words(gemm["qzeros"][i // g])[j // 8] >> (4 * undo[j % 8]) & 15
            W[j, i] = float(gemm["scales"][i // g, j]) * (code - zero)
            code = words(gemv["qweight"][j])[i // 8] >> (4 * (i % 8)) & 15
            zero = words(gemv["qzeros"][j])[i // g // 8] >> (4 * (i // g % 8)) & 15
            V[j, i] = float(gemv["scales"][j, i // g]) * (code - zero)
    assert torch.equal(W, t.dequantize())
    assert torch.equal(V, t.dequantize())
    assert gemv["qzeros"].shape == (n, 4)  # one word of zeros, up to a multiple of 4 at g = 32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("padded", [True, False])
def test_compressed_tensors_against_a_bit_loop(bits: int, padded: bool):
    n, k, g = 7, 96, 32
    t = random_qtensor(n, k, QuantScheme(bits, g))
    packed = compressed_tensors.pack(t, padded=padded)

    def decode(row: list[int], count: int) -> list[int]:
        if not padded:
            return stream(row, bits, count)
        return [v for word in row for v in stream([word], bits, 32 // bits)][:count]

    half = 1 << (bits - 1)
    W = torch.empty(n, k)
    for j in range(n):
        row = decode(words(packed["weight_packed"][j]), k)
        for i in range(k):
            zero = decode(words(packed["weight_zero_point"][:, i // g]), n)[j] - half
            W[j, i] = float(packed["weight_scale"][j, i // g]) * (row[i] - half - zero)
    assert torch.equal(W, t.dequantize())
    assert compressed_tensors.is_padded(packed["weight_packed"].shape[1], k, bits) == (padded and bits == 3)
    with pytest.raises(ValueError, match="rows of 5 words; 96 codes"):
        compressed_tensors.is_padded(5, k, bits)


@pytest.mark.parametrize("sym", [True, False])
def test_int8_of_compressed_tensors(sym: bool):
    t = random_qtensor(6, 64, QuantScheme(8, 32, sym))
    packed = compressed_tensors.pack_int8(t)
    zero = packed["weight_zero_point"].float() if not sym else torch.zeros(6, 2)
    W = (packed["weight"].float() - zero.repeat_interleave(32, 1)) * packed["weight_scale"].float().repeat_interleave(
        32, 1
    )
    assert torch.equal(W, t.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_mlx_against_a_bit_loop(bits: int, sym: bool):
    n, k, g = 5, 128, 64
    t = random_qtensor(n, k, QuantScheme(bits, g, sym))
    packed = mlx.pack(t)
    W = torch.empty(n, k)
    for j in range(n):
        row = stream(words(packed["weight"][j].view(torch.int32)), bits, k)
        for i in range(k):
            W[j, i] = row[i] * float(packed["scales"][j, i // g]) + float(packed["biases"][j, i // g])
    assert torch.equal(W, t.dequantize())
    # 2-bit zero points times 11-bit scales may still be fp16 numbers.
    assert packed["scales"].dtype == (torch.float16 if sym or bits == 2 else torch.float32)


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 32, True), QuantScheme(8, 64, True), QuantScheme(4, 32, False)], ids=str
)
def test_gguf_against_the_gguf_package(scheme: QuantScheme):
    t = random_qtensor(6, 128, scheme)
    kind = gguf.type_of(scheme)
    assert kind is not None
    data = gguf.pack(t, rounded=True)["data"]
    theirs = torch.from_numpy(gguf_package.quants.dequantize(data.numpy(), gguf_package.GGMLQuantizationType[kind]))
    assert torch.equal(theirs, gguf.read_blocks(data, kind).dequantize())
    # Q4_1 rounds zero * scale to fp16: half a unit in the last place of at most 15 * scale.
    error = (theirs - t.dequantize()).abs().max()
    assert error <= (0 if scheme.sym else 2.0**-11 * 15 * float(t.scale.float().abs().max()))


@pytest.mark.parametrize("kind", list(gguf.BYTES))
def test_blocks_that_the_gguf_package_made(kind: str):
    W = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    data = gguf_package.quants.quantize(W, gguf_package.GGMLQuantizationType[kind])
    theirs = torch.from_numpy(gguf_package.quants.dequantize(data, gguf_package.GGMLQuantizationType[kind]))
    assert torch.equal(gguf.read_blocks(torch.from_numpy(data), kind).dequantize(), theirs)
    if kind == "Q4_1":
        with pytest.raises(Inexact, match="q: .* offsets are no whole multiple of their scale from 0 to 15"):
            gguf.read_qtensor(torch.from_numpy(data), kind, "q")
        return
    t = gguf.read_qtensor(torch.from_numpy(data), kind, "q")
    assert torch.equal(t.dequantize(), theirs)
    assert gguf.pack(t)["data"].numpy().tobytes() == data.tobytes(), "written back byte for byte"


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "IQ4_NL", "Q6_K", "Q4_K"])
def test_other_types_are_read_through_the_package(kind: str):
    size, nbytes = gguf_package.GGML_QUANT_SIZES[gguf_package.GGMLQuantizationType[kind]]
    data = np.random.default_rng(1).integers(0, 60, (3, nbytes), dtype=np.uint8)
    found = gguf.dequantize(torch.from_numpy(data), kind)
    assert found.shape == (3, size)
    assert torch.isfinite(found).all()


def test_offsets_that_are_no_zero_points_are_refused():
    t = random_qtensor(4, 64, QuantScheme(4, 32))
    a = from_qtensor(t)
    assert to_qtensor(a, "q").digest() == t.digest()
    off = Affine(a.q, a.scale, a.offset + 1e-3, a.scheme)
    with pytest.raises(Inexact, match=r"q: 8 of 8 offsets are no whole multiple"):
        to_qtensor(off, "q")
    with pytest.raises(Inexact, match=r"q: \d of 8 scales are no fp16 numbers"):
        to_qtensor(Affine(a.q, a.scale * (1 + 2**-12), a.offset, a.scheme), "q")


def test_desc_act_columns():
    scheme = QuantScheme(4, 32, sym=True)
    t = random_qtensor(32, 96, scheme)
    packed = gptq.pack(t, version=1)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    # A desc_act file of the same numbers: column i of the file is column shuffle[i] of t.
    file = {**packed, "g_idx": packed["g_idx"][shuffle], "qweight": pack_words(t.q[:, shuffle].contiguous(), 4).T}
    order = gptq.column_order(file["g_idx"], scheme, "q")
    assert order is not None
    found = gptq.unpack(file, 32, 96, scheme, version=1)
    assert torch.equal(found.dequantize(), t.dequantize()[:, shuffle][:, order])
    assert gptq.column_order(packed["g_idx"], scheme, "q") is None
    uneven = packed["g_idx"].clone()
    uneven[0] = 1
    with pytest.raises(Inexact, match=r"q: g_idx makes groups of 31 to 33 columns; w4g32sym has 32 each"):
        gptq.column_order(uneven, scheme, "q")
    uneven[0] = 3
    with pytest.raises(ValueError, match=r"q: g_idx runs from 0 to 3; w4g32sym has 3 groups"):
        gptq.column_order(uneven, scheme, "q")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "llmq"])
def test_errors_name_matrix_and_tensor(name: str):
    scheme = QuantScheme(8 if name == "int-quantized" else 4, 32, sym=True)
    tensors = FORMATS[name].pack(random_qtensor(32, 64, scheme))
    for key in tensors:
        with pytest.raises(ValueError, match=rf"^k_proj: .*{key}|^k_proj: weight_shape"):
            FORMATS[name].unpack({**tensors, key: tensors[key][..., :1]}, 32, 64, scheme, name="k_proj")
    scales = [key for key in tensors if "scale" in key]
    for key in scales:
        bad = tensors[key].clone()
        bad[0, 0] = float("inf")
        with pytest.raises(ValueError, match="k_proj: a scale is not finite"):
            FORMATS[name].unpack({**tensors, key: bad}, 32, 64, scheme, name="k_proj")


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "awq_gemv", "mlx"])
def test_a_matrix_said_to_be_symmetric_must_be(name: str):
    t = random_qtensor(32, 64, QuantScheme(4, 32))
    with pytest.raises(Inexact, match="said to be symmetric, but"):
        FORMATS[name].unpack(FORMATS[name].pack(t), 32, 64, QuantScheme(4, 32, sym=True))
