"""Packed weights: exact round trips, guarded memory, rows taken back, damaged data and wrong arguments."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import mmap
import pickle
import sys
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import COMPILED, ISAS, SCHEMES, assert_same, core, isa, random_qtensor, seeded  # noqa: F401 - a fixture
from torch import Tensor

from llmq import kernels
from llmq.config import BITS, QuantScheme
from llmq.kernels import reference
from llmq.qtensor import QTensor


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.usefixtures("isa")
def test_nothing_is_written_beside_the_output(bits: int, m: int) -> None:
    n, k, canary = 19, 100, 64
    t = random_qtensor(n, k, QuantScheme(bits, 32, False))
    w, x = kernels.pack(t), torch.randn(m, k, generator=seeded(6))
    layout = core.Layout(n=n, k=k, source_group=32, bits=bits, has_zero=True, mid=1 << (bits - 1))
    assert isinstance(w.data, Tensor)
    where = {"data": w.data.data_ptr(), "nbytes": w.nbytes}
    out = torch.full((canary + m * n + canary,), 7.0)
    layout.qgemm(**where, x=x.data_ptr(), m=m, bias=0, out=out[canary:].data_ptr())
    assert_same(out[canary:-canary].view(m, n), reference.qgemm(x, t))
    rows = torch.full((canary + 2 * k + canary,), 7.0)
    ids = torch.tensor([n - 1, 0])
    layout.take_rows(**where, ids=ids.data_ptr(), count=2, out=rows[canary:].data_ptr())
    packed = torch.full((canary + w.nbytes + canary,), 7, dtype=torch.uint8)
    assert t.zero is not None
    layout.pack(q=t.q.data_ptr(), scale=t.scale.data_ptr(), zero=t.zero.data_ptr(), out=packed[canary:].data_ptr())
    for guarded in (out, rows, packed):
        assert (guarded[:canary] == 7).all()
        assert (guarded[-canary:] == 7).all()


@contextlib.contextmanager
def before_forbidden_page(source: Tensor) -> Iterator[int]:
    """Address of a copy of ``source`` whose last byte lies right before a page that may not be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    nbytes, page = source.numel() * source.element_size(), mmap.PAGESIZE
    pages = -(-nbytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    start = ctypes.addressof(view)
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, no_access) == 0
    address = start + pages * page - nbytes
    ctypes.memmove(address, source.data_ptr(), nbytes)
    try:
        yield address
    finally:
        libc.mprotect(ctypes.c_void_p(start + pages * page), page, mmap.PROT_READ | mmap.PROT_WRITE)
        del view
        memory.close()


@pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (9, 33, 2), (35, 100, 5)])
@pytest.mark.usefixtures("isa")
def test_nothing_is_read_behind_the_inputs(bits: int, n: int, k: int, m: int) -> None:
    # A read too far ends the process here.
    t = random_qtensor(n, k, QuantScheme(bits, 32, False))
    x, bias = torch.randn(m, k, generator=seeded(7)), torch.randn(n, generator=seeded(8))
    layout = core.Layout(n=n, k=k, source_group=min(32, k), bits=bits, has_zero=True, mid=1 << (bits - 1))
    assert t.zero is not None
    data = torch.empty(layout.nbytes, dtype=torch.uint8)
    out = torch.empty(m, n)
    with contextlib.ExitStack() as stack:
        q, scale, zero, x_at, bias_at = (
            stack.enter_context(before_forbidden_page(p)) for p in (t.q, t.scale, t.zero, x, bias)
        )
        layout.pack(q=q, scale=scale, zero=zero, out=data.data_ptr())
        data_at = stack.enter_context(before_forbidden_page(data))
        layout.qgemm(data=data_at, nbytes=data.numel(), x=x_at, m=m, bias=bias_at, out=out.data_ptr())
    assert_same(out, reference.qgemm(x, t, bias=bias))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unpack_is_the_exact_inverse_of_pack(scheme: QuantScheme) -> None:
    for n, k in ((1, 1), (16, 256), (17, 300), (5, 513)):
        t = random_qtensor(n, k, scheme)
        before = t.digest()
        w = kernels.pack(t)
        assert w.unpack().digest() == before == t.digest()
        for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
            assert twin.unpack().digest() == before


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_packed_size_is_codes_plus_scales(bits: int, sym: bool) -> None:
    w = kernels.pack(random_qtensor(64, 1024, QuantScheme(bits, 128, sym)))
    # The codes' bits, 2 bytes a scale, 1 a zero point, 64 bytes of header: nothing else when no padding is needed.
    assert w.nbytes == 64 * 1024 * bits // 8 + 64 * 8 * (2 if sym else 3) + 64


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_layout_says(bits: int) -> None:
    """Codes read back by the words of cpp/layout.h: a block of 32 columns is ``bits`` vectors of 16 rows x 4 bytes."""
    n, k = 35, 70
    scheme = QuantScheme(bits, 32, False)
    t = random_qtensor(n, k, scheme)
    w = kernels.pack(t)
    assert isinstance(w.data, Tensor)
    panels, blocks, header = 3, 3, -(-3 * 16 * 3 // 64) * 64
    payload = w.data[64:].view(panels, -1)[:, header:].reshape(panels, blocks, bits, 16, 4).int()
    low = 2 if bits == 3 else bits
    quads = torch.stack(
        [payload[:, :, i * low // 8] >> (i * low % 8) & ((1 << low) - 1) for i in range(8)], dim=2
    )  # [panel, block, quad, row, column]
    if bits == 3:
        quads |= torch.stack([(payload[:, :, 2] >> i & 1) << 2 for i in range(8)], dim=2)
    codes = quads.permute(0, 3, 1, 2, 4).reshape(panels * 16, blocks * 32)
    assert torch.equal(codes[:n, :k], t.q.int())
    assert codes[n:].count_nonzero() == codes[:, k:].count_nonzero() == 0


@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(2, 32, True), QuantScheme(3, 256, False), QuantScheme(4, -1, True), QuantScheme(8, 32, False)],
    ids=str,
)
@pytest.mark.parametrize("isa_name", ISAS)
def test_take_rows_dequantizes_exactly(isa_name: str, scheme: QuantScheme) -> None:
    t = random_qtensor(21, 300, scheme)
    ids = torch.tensor([20, 0, 7, 7, 16])
    with kernels.use_isa(isa_name):
        w = kernels.pack(t)
        assert_same(kernels.take_rows(w, ids), t.dequantize()[ids])
        assert kernels.take_rows(w, ids[:0]).shape == (0, 300)


@pytest.mark.usefixtures("isa")
def test_take_rows_reads_every_fp16_scale_exactly() -> None:
    halves = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    n = halves.numel()
    t = QTensor(torch.full((n, 1), 9, dtype=torch.uint8), halves[:, None], None, QuantScheme(4, 32, True))
    w = kernels.pack(t)
    assert_same(kernels.take_rows(w, torch.arange(n))[:, 0], halves.float())
    with_one = kernels.qgemm(torch.ones(1, 1), w)  # 127 * scale / 127 through the vector conversion
    assert_same(with_one[0], 127 * (halves.float() * torch.tensor(1 / 127.0)))


def test_a_weight_packed_for_the_reference_is_the_qtensor_and_either_form_runs_anywhere() -> None:
    t = random_qtensor(20, 70, QuantScheme(4, 32, False))
    x = torch.randn(2, 70, generator=seeded(9))
    compiled = kernels.pack(t)
    with kernels.use_isa("reference"):
        plain = kernels.pack(t)
        assert plain.data is t
        assert plain.unpack() is t
        assert plain.nbytes == 20 * 70 + 20 * 3 * 3
        assert_same(kernels.qgemm(x, compiled), reference.qgemm(x, t))
    assert_same(kernels.qgemm(x, plain), reference.qgemm(x, t))


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "does not start with 'LQ16'"),
        (4, "layout version 255, expected 3"),
        (8, "rows 255, expected 20"),
        (16, "columns 255, expected 70"),
        (24, r"bytes \d+, expected \d+"),
        (32, "bits 255, expected 4"),
        (36, "group 255, expected 32"),
        (40, "has_zero 255, expected 1"),
        (44, "mid 255, expected 8"),
    ],
)
def test_a_damaged_header_is_refused(offset: int, message: str) -> None:
    w = kernels.pack(random_qtensor(20, 70, QuantScheme(4, 32, False)))
    assert isinstance(w.data, Tensor)
    w.data[offset] = 255
    for use in (
        lambda: kernels.qgemm(torch.zeros(1, 70), w),
        w.unpack,
        lambda: kernels.take_rows(w, torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_data_that_cannot_be_a_packed_weight_is_refused() -> None:
    t = random_qtensor(20, 70, QuantScheme(4, 32, False))
    w = kernels.pack(t)
    x = torch.zeros(1, 70)
    assert isinstance(w.data, Tensor)
    with pytest.raises(ValueError, match="it has 128 bytes, its shape needs"):
        kernels.qgemm(x, kernels.PackedWeight(20, 70, t.scheme, w.data[:128]))
    with pytest.raises(ValueError, match="10 bytes cannot hold the header of 64"):
        kernels.qgemm(x, kernels.PackedWeight(20, 70, t.scheme, w.data[:10]))
    with pytest.raises(ValueError, match="not aligned to 64 bytes"):
        kernels.qgemm(x, kernels.PackedWeight(20, 70, t.scheme, w.data[1:]))
    with pytest.raises(ValueError, match="bits 4, expected 3"):
        kernels.PackedWeight(20, 70, QuantScheme(3, 32, False), w.data).unpack()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "at least one row and column, got 0 x 64"),
        ({"bits": 5}, "bits of a code are 5; the kernels read 2, 3, 4 and 8"),
        ({"source_group": 48}, "group size 48 is neither the whole row nor a multiple of 32"),
        ({"source_group": 160, "k": 500}, "group size 160 is above 64 and no multiple of it"),
    ],
)
def test_layouts_that_the_kernels_cannot_read_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core.Layout(**{"n": 4, "k": 64, "source_group": 32, "bits": 4, "has_zero": False, "mid": 8, **change})


def test_wrong_arguments_are_named() -> None:
    t = random_qtensor(4, 32, QuantScheme(4, 32, True))
    w = kernels.pack(t)
    x = torch.zeros(1, 32)
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 on cpu; the kernels take torch.float32"):
        kernels.qgemm(x.bfloat16(), w)
    with pytest.raises(TypeError, match=r"bias is torch.float64"):
        kernels.qgemm(x, w, bias=torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has shape \(1, 31\); a packed 4 x 32 matrix needs \[M, 32\]"):
        kernels.qgemm(x[:, :31], w)
    with pytest.raises(ValueError, match=r"x has shape \(32,\)"):
        kernels.qgemm(x[0], w)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); a packed 4 x 32 matrix needs \(4,\)"):
        kernels.qgemm(x, w, bias=torch.zeros(5))
    with pytest.raises(ValueError, match="activation_bits is 4; known: 8, 16"):
        kernels.qgemm(x, w, activation_bits=4)
    with pytest.raises(TypeError, match="ids are torch.int32"):
        kernels.take_rows(w, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ids have shape \(1, 2\)"):
        kernels.take_rows(w, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="code 16 does not fit 4 bits"):
        kernels.pack(QTensor(torch.full_like(t.q, 16), t.scale, t.zero, t.scheme))
    for n in (0, 1025):
        with pytest.raises(ValueError, match=f"number of threads is {n}; use 1 to 1024"):
            kernels.set_num_threads(n)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_beyond_the_matrix_are_named(isa_name: str, bad: int) -> None:
    with kernels.use_isa(isa_name):
        w = kernels.pack(random_qtensor(4, 32, QuantScheme(8, 32, True)))
        with pytest.raises(IndexError, match=f"row id {bad} at position 1 is not a row of a matrix with 4 rows"):
            kernels.take_rows(w, torch.tensor([3, bad]))


@pytest.mark.usefixtures("isa")
def test_inputs_that_are_not_contiguous_are_copied_and_left_alone() -> None:
    t = random_qtensor(18, 64, QuantScheme(4, 32, False))
    transposed = QTensor(t.q.T.contiguous().T, t.scale.T.contiguous().T, t.zero, t.scheme)
    x = torch.randn(64, 6, generator=seeded(10)).T
    before = x.clone()
    assert not x.is_contiguous()
    assert not transposed.q.is_contiguous()
    y = kernels.qgemm(x, kernels.pack(transposed), bias=torch.zeros(36)[::2])
    assert_same(y, reference.qgemm(x.contiguous(), t))
    assert torch.equal(x, before)
    assert kernels.qgemm(x[:0], kernels.pack(t)).shape == (0, 18)
