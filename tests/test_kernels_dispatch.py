"""Which kernels run, on how many threads: the environment, the CPU, forks and callers at once."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_cases import assert_same, random_qtensor, seeded, threads  # noqa: F401 - fixtures
from torch import Tensor

import llmq
from llmq import kernels
from llmq.config import QuantScheme
from llmq.kernels import reference

core = pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")

ISAS = kernels.available_isas()
COMPILED = ISAS[:-1]


def test_the_list_of_kernel_sets_ends_with_the_ones_that_always_run() -> None:
    assert ISAS[-2:] == ["scalar", "reference"]
    assert core.isas() == COMPILED


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_what_runs_is_what_the_environment_forces() -> None:
    code = "from llmq import kernels, _core; print(kernels.current_isa(), _core.isa(), kernels.num_threads())"
    result = run_python(code, LLMQ_ISA="scalar", LLMQ_NUM_THREADS="3")
    assert result.stdout.split() == ["scalar", "scalar", "3"], result.stderr


@pytest.mark.parametrize("name", ["neon5", "AVX2"])
def test_a_forced_name_that_cannot_run_is_an_error_that_lists_the_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_chosen", None)
    monkeypatch.setenv("LLMQ_ISA", name)
    with pytest.raises(ValueError, match=f"LLMQ_ISA is '{name}', which .* cannot run; available: .*scalar, reference"):
        kernels.current_isa()
    with pytest.raises(ValueError, match=f"isa '{name}' is not available on this machine; available: .*scalar"):
        core.use_isa(name)


def test_use_isa_changes_what_runs_and_puts_it_back() -> None:
    before = kernels.current_isa()
    with kernels.use_isa("scalar"):
        assert kernels.current_isa() == core.isa() == "scalar"
        with pytest.raises(ValueError, match="isa is 'sse9'"), kernels.use_isa("sse9"):
            pass
        assert kernels.current_isa() == "scalar"
    assert kernels.current_isa() == core.isa() == before


@pytest.mark.parametrize("text", ["0", "two", "-1", "99999"])
def test_a_thread_number_in_the_environment_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"LLMQ_NUM_THREADS is '{text}'; use a whole number from 1 to 1024"):
        kernels._default_threads()


@pytest.mark.parametrize(("torch_threads", "expected"), [(8, 3), (2, 2)])
def test_the_default_is_torchs_threads_but_at_most_one_a_core_within_the_affinity(
    torch_threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    monkeypatch.delenv("LLMQ_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6}, raising=False)
    monkeypatch.setattr(kernels, "_siblings", lambda cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")
    assert kernels._default_threads() == expected


# CPUID words with every bit that a feature asks for.
FULL = {
    "leaf7_1_eax": 1 << 4,
    "leaf1_ecx": 1 << 12 | 1 << 29,
    "leaf7_ebx": 1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31,
    "leaf7_ecx": 1 << 11,
}


def test_instructions_need_the_operating_systems_consent() -> None:
    assert core.features(**FULL, xcr0=0) == []
    ymm = {"fma", "f16c", "avx2", "avxvnni"}
    assert set(core.features(**FULL, xcr0=0x07)) == ymm  # xmm and ymm saved, zmm not
    assert set(core.features(**FULL, xcr0=0x67)) == ymm  # upper zmm16-31 missing
    assert "avx512vnni" in core.features(**FULL, xcr0=0xE7)
    assert core.features(xcr0=0xE7) == []


def test_features_of_arm_are_bits_of_the_auxiliary_vector() -> None:
    assert core.features(hwcap=1 << 20) == ["asimddp"]
    assert core.features(hwcap2=1 << 13) == ["i8mm"]
    assert core.features(hwcap=~(1 << 20) & 2**64 - 1, hwcap2=~(1 << 13) & 2**64 - 1) == []


def test_without_the_compiled_module_a_warning_says_so_and_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llmq, "_core", raising=False)
    monkeypatch.setitem(sys.modules, "llmq._core", None)
    spec = importlib.util.spec_from_file_location("kernels_without_core", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernels_without_core", bare)  # dataclasses look their module up
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be loaded .* plain torch, which is slow"):
        spec.loader.exec_module(bare)
    monkeypatch.delenv("LLMQ_ISA", raising=False)
    assert bare.available_isas() == ["reference"]
    assert bare.current_isa() == "reference"
    t = random_qtensor(5, 40, QuantScheme(4, 32, True))
    x = torch.ones(1, 40)
    assert_same(bare.qgemm(x, bare.pack(t)), reference.qgemm(x, t))


@pytest.mark.usefixtures("threads")
def test_two_python_threads_may_call_at_once() -> None:
    kernels.set_num_threads(2)
    jobs = []
    for seed in (1, 2, 3):
        t = random_qtensor(160, 1024 + seed, QuantScheme(4, 128, False))
        x = torch.randn(4, 1024 + seed, generator=seeded(seed))
        jobs.append((kernels.pack(t), x, reference.qgemm(x, t)))
    failures: list[str] = []

    def work(w: kernels.PackedWeight, x: Tensor, expected: Tensor) -> None:
        for _ in range(100):
            if not torch.equal(kernels.qgemm(x, w), expected):
                failures.append("a result changed under another thread's call")

    callers = [threading.Thread(target=work, args=job) for job in jobs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failures == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    kernels.set_num_threads(2)
    t = random_qtensor(160, 2048, QuantScheme(4, 128, True))
    w, x = kernels.pack(t), torch.randn(2, 2048, generator=seeded(11))
    expected = kernels.qgemm(x, w)  # the parent's pool runs
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(kernels.qgemm(x, w), expected) and kernels.num_threads() == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same(kernels.qgemm(x, w), expected)


@pytest.mark.usefixtures("threads")
def test_stream_read_reads_every_word() -> None:
    words = torch.randint(-(2**62), 2**62, (200_003,), generator=seeded(12))
    expected = 0
    for word in words.tolist():
        expected ^= word & (2**64 - 1)
    for name, n in itertools.product(COMPILED, (1, 2)):
        kernels.set_num_threads(n)
        with kernels.use_isa(name):
            assert core.stream_read(words.data_ptr(), words.numel() * 8) == expected
