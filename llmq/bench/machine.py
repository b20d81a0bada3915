"""What the machine is, what it can do at most (stream read, int8 peak), and who else was using it meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmq import cpuinfo, kernels

_core: Any
try:
    from llmq import _core
except ImportError:  # llmq.kernels has warned
    _core = None

# Larger than any last-level cache share a process is likely to have.
STREAM_BYTES = 256 << 20
# CPU flags that decide which kernels an engine can use, and the row of int8_peak.c for the best of them.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm", "sve"),
)
PEAK_ROWS = {"avx512_vnni": 0, "avx_vnni": 1, "avx2": 2, "asimddp": 0}
PACKAGES = (
    *("torch", "transformers", "numpy", "gguf", "llama-cpp-python"),
    *("openvino-genai", "optimum-intel", "onnxruntime", "onnxruntime-genai"),
)


def describe() -> dict[str, Any]:
    """CPU, flags, cores, memory, and versions of what is installed."""
    info = cpuinfo.first_cpu()
    versions = {name: _version(name) for name in ("llmq", *PACKAGES)}
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "family": info.get("cpu family"),
        "flags": [flag for flag in FLAGS if flag in cpuinfo.flags()],
        "cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
    }


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def stream_read(threads: int, *, rounds: int = 7) -> float:
    """Bytes a second that ``threads`` threads together read from memory; median of ``rounds``. NaN without kernels."""
    if _core is None:
        return float("nan")
    data = torch.ones(STREAM_BYTES // 8, dtype=torch.int64)
    before = kernels.num_threads()
    kernels.set_num_threads(threads)
    times = []
    try:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            _core.stream_read(data.data_ptr(), STREAM_BYTES)
            times.append(time.perf_counter() - start)
    finally:
        kernels.set_num_threads(before)
    return STREAM_BYTES / statistics.median(times[1:])


@dataclass(frozen=True)
class Peak:
    """Operations a second (a multiply-add is two) of the instruction named, or NaN and the reason why not."""

    operations: float
    instruction: str


def int8_peak(threads: int) -> Peak:
    """The int8 peak of ``threads`` threads on registers alone: a C program of one loop, compiled now."""
    found = [row for flag, row in PEAK_ROWS.items() if flag in cpuinfo.flags()]
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if not found:
        return Peak(float("nan"), "not measured: no instruction for this CPU in int8_peak.c")
    if compiler is None:
        return Peak(float("nan"), "not measured: no C compiler (cc, or CC in the environment)")
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "int8_peak"
        source = Path(__file__).with_name("int8_peak.c")
        build = [compiler, "-O2", "-pthread", str(source), "-o", str(program)]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        if done.returncode:
            return Peak(float("nan"), f"not measured: int8_peak.c does not compile ({done.stderr.strip()[:200]})")
        run = subprocess.run([program, str(threads), str(found[0])], capture_output=True, text=True, check=True)
    name, rate = run.stdout.split()
    return Peak(float(rate), name)


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds of the whole machine since its start, and the clock."""

    busy: float
    steal: float
    clock: float

    @classmethod
    def now(cls) -> CpuTimes | None:
        """Read /proc/stat; None where there is none."""
        try:
            first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(field) / os.sysconf("SC_CLK_TCK") for field in first.split()[1:9]
        )
        return cls(user + nice + system + irq + softirq, steal, time.monotonic())


def disturbance(before: CpuTimes | None, after: CpuTimes | None, own: float) -> dict[str, float] | None:
    """Shares of the machine's CPU time between two moments: ``steal`` (other guests) and ``others`` (other processes).

    ``own`` is the CPU time in seconds of the process that was measured.
    """
    if before is None or after is None or after.clock <= before.clock:
        return None
    whole = (after.clock - before.clock) * (os.cpu_count() or 1)
    others = max(0.0, after.busy - before.busy - own)
    return {"steal": (after.steal - before.steal) / whole, "others": others / whole}
