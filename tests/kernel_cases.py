"""What the kernel tests share: kernel sets and schemes, random quantized matrices and an exact comparison."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmq import kernels
from llmq.config import BITS, GROUP_SIZES, QuantScheme
from llmq.qtensor import QTensor

core = pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")

ISAS = kernels.available_isas()
COMPILED = ISAS[:-1]
SCHEMES = [QuantScheme(b, g, sym) for b, g, sym in itertools.product(BITS, GROUP_SIZES, (True, False))]

# What disassembled code holds only when it goes beyond x86-64 (AVX) or ARMv8.0 (dot and matrix products).
BEYOND_BASELINE = {"x86_64": r"%[yz]mm\d|\tv[a-z0-9]+ ", "aarch64": r"\t([su]dot|usdot|[us]?s?mmla)\t"}


@pytest.fixture(params=COMPILED)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled kernel set in turn."""
    with kernels.use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = kernels.num_threads()
    yield
    kernels.set_num_threads(before)


def seeded(*key: object) -> torch.Generator:
    """The same numbers for the same case in every run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def random_qtensor(n: int, k: int, scheme: QuantScheme) -> QTensor:
    g = seeded(n, k, scheme)
    groups = scheme.n_groups(k)
    q = torch.randint(0, scheme.levels, (n, k), generator=g, dtype=torch.uint8)
    sign = torch.where(torch.rand(n, groups, generator=g) < 0.5, -1.0, 1.0)
    scale = (sign * (0.5 + torch.rand(n, groups, generator=g)) / 64).half()
    zero = torch.randint(0, scheme.levels, (n, groups), generator=g, dtype=torch.uint8)
    return QTensor(q, scale, None if scheme.sym else zero, scheme)


def integer_qtensor(q: Tensor, zero: int, scheme: QuantScheme) -> QTensor:
    """Scale 1, one zero point everywhere: W holds whole numbers."""
    shape = (q.shape[0], scheme.n_groups(q.shape[1]))
    return QTensor(q, torch.ones(shape, dtype=torch.float16), torch.full(shape, zero, dtype=torch.uint8), scheme)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, NaN included; the message says where they differ first."""
    different = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if actual.shape != expected.shape or different.any():
        at = tuple(different.nonzero()[0].tolist()) if actual.shape == expected.shape else ()
        detail = f"at {at}: {actual[at]} instead of {expected[at]}" if at else f"{actual.shape} != {expected.shape}"
        raise AssertionError(f"{int(different.sum()) if at else 'all'} values differ, first {detail}")
