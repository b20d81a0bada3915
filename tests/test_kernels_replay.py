"""The kernels on CPUs that are not at hand: cases written here, replayed by cpp/tests/replay.cpp under qemu.

Needs cmake, qemu-user (Debian, Ubuntu: qemu-user) and, for ARM, the cross compiler (g++-aarch64-linux-gnu).
"""

from __future__ import annotations

import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import BEYOND_BASELINE, random_qtensor, seeded
from test_kernels_attend import case as attended
from test_kernels_attend import limit
from torch import Tensor

from llmq.config import BITS, QuantScheme
from llmq.kernels import reference
from llmq.qtensor import QTensor

ROOT = Path(__file__).resolve().parent.parent
ARM_COMPILER = "aarch64-linux-gnu-g++"
X86 = platform.machine() in ("x86_64", "AMD64")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(platform.system() != "Linux", reason="qemu's user mode needs Linux")]


def parts(t: QTensor) -> bytes:
    """q, scale, zero as the replay program reads them."""
    arrays = (t.q, t.scale, t.zero)
    return b"".join(a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays if a is not None)


def case(kind: str, t: QTensor, *arrays: Tensor | None, **values: int) -> bytes:
    """One case; see cpp/tests/replay.cpp."""
    (n, k), s = t.shape, t.scheme
    about = {"n": n, "k": k, "group": s.group_width(k), "bits": s.bits, "zeros": int(not s.sym), "mid": s.mid, **values}
    line = " ".join([kind, *(f"{name}={value}" for name, value in about.items())])
    return f"{line}\n".encode() + parts(t) + b"".join(a.numpy().tobytes() for a in arrays if a is not None)


def qgemm_case(t: QTensor, m: int, *, with_bias: bool) -> bytes:
    n, k = t.shape
    x = torch.randn(m, k, generator=seeded(n, k, m))
    bias = torch.randn(n, generator=seeded(n)) if with_bias else None
    return case("qgemm", t, x, bias, reference.qgemm(x, t, bias=bias), m=m, bias=int(with_bias))


def extreme_case(bits: int, code: int, sign: int) -> bytes:
    """All codes and activations at the end of their range: where narrow sums would overflow."""
    scheme, k = QuantScheme(bits, -1, False), 128
    t = QTensor(
        torch.full((18, k), code, dtype=torch.uint8),
        torch.ones(18, 1, dtype=torch.float16),
        torch.zeros(18, 1, dtype=torch.uint8),
        scheme,
    )
    x = torch.full((9, k), 127.0 * sign)
    return case("qgemm", t, x, None, (x.long() @ t.q.long().T).float(), m=9, bias=0)


# By the names of cpp/kernel_table.h: KvType.
KV_TYPES = {"f16": 0, "f32": 1, "8": 2, "4": 3, "2": 4, "4 by column": 5, "2 by column": 6}


def attend_case(keys: str, values: str, shape: tuple[int, int, int, int, int], *, wrong: float = 1.0) -> bytes:
    """Attention with some sinks and recent tokens in 16 bits; ``wrong``: what the keys are multiplied with."""
    q, k, v = attended(*shape)
    near = {"sinks": 4, "recent": 20} if min(KV_TYPES[keys], KV_TYPES[values]) > 2 else {"sinks": 0, "recent": 0}
    bits = tuple({"f16": 16, "f32": 32}.get(name) or int(name[0]) for name in (keys, values))
    channel = "column" in keys
    expected = reference.attend(
        q, k, v, k_bits=bits[0], v_bits=bits[1], key_scales="channel" if channel else "token", **near
    )
    # As in test_kernels_attend_columns.py: up to three sums; twice that on CPUs without fused multiply-adds.
    tolerance = (4 * limit(q, k, v, bits)).expand_as(expected).contiguous()
    about = {
        **dict(zip(("count", "length", "heads", "kv_heads", "head_dim"), shape, strict=True)),
        "keys": KV_TYPES[keys], "values": KV_TYPES[values], "near": 0 if sum(near.values()) or channel else -1,
        **near, "window": 0,
    }  # fmt: skip
    line = " ".join(["attend", *(f"{name}={value}" for name, value in about.items())])
    return f"{line}\n".encode() + b"".join(a.numpy().tobytes() for a in (q, k * wrong, v, expected, tolerance))


def attend_cases() -> list[bytes]:
    """Every type of keys and of values; one row and a tile, several parts, ragged heads."""
    pairs = [(name, name) for name in ("f32", "f16", "8", "4", "2")] + [("4 by column", "4"), ("2 by column", "8")]
    shapes = [(1, 200, 3, 1, 64), (7, 150, 4, 2, 40)]
    return [attend_case(*pair, shape) for pair, shape in itertools.product(pairs, shapes)]


def write_cases(path: Path) -> None:
    """Bits x grids x ragged shapes x numbers of tokens, extremes, rows taken back, and attention."""
    cases = [extreme_case(bits, (1 << bits) - 1, sign) for bits, sign in itertools.product(BITS, (1, -1))]
    for bits, group, sym in itertools.product(BITS, (-1, 32, 128, 256), (True, False)):
        scheme = QuantScheme(bits, group, sym)
        for (n, k), m in zip([(1, 1), (17, 100), (40, 257), (33, 600)], (1, 4, 30, 1), strict=True):
            cases.append(qgemm_case(random_qtensor(n, k, scheme), m, with_bias=n == 17))
        t = random_qtensor(21, 300, scheme)
        ids = torch.tensor([20, 0, 7, 16])
        cases.append(case("take_rows", t, ids, t.dequantize()[ids], count=len(ids)))
    cases.extend(attend_cases())
    path.write_bytes(b"".join(cases))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases.bin"
    write_cases(path)
    return path


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``replay(machine)``: folder of the replay program built for ``x86_64`` or ``aarch64``."""
    built: dict[str, Path] = {}

    def get(machine: str) -> Path:
        if machine not in built:
            built[machine] = build(machine, tmp_path_factory.mktemp(machine))
        return built[machine]

    return get


def build(machine: str, folder: Path, *more: str) -> Path:
    """The replay program in ``folder``, with ``more`` CMake options."""
    if not shutil.which("cmake"):
        pytest.skip("the build needs cmake (extra: test)")
    options = ["-DLLMQ_REPLAY=ON", "-DCMAKE_BUILD_TYPE=Release"]
    if not any("SANITIZE" in option for option in more):  # sanitizers need the dynamic linker
        options.append("-DCMAKE_EXE_LINKER_FLAGS=-static")
    if machine != platform.machine():
        if not shutil.which(ARM_COMPILER):
            pytest.skip(f"needs the cross compiler {ARM_COMPILER} (g++-aarch64-linux-gnu)")
        options += [f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}", "-DCMAKE_SYSTEM_NAME=Linux"]
        options += [f"-DCMAKE_SYSTEM_PROCESSOR={machine}"]
    for command in (("-S", ROOT / "cpp", "-B", folder, *options, *more), ("--build", folder, "--parallel", "2")):
        result = subprocess.run(
            ["cmake", *(str(part) for part in command)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder


def run(folder: Path, machine: str, cpu: str | None, *files: Path) -> subprocess.CompletedProcess[str]:
    emulator: list[str] = []
    if cpu is not None:
        program = next((p for p in (f"qemu-{machine}", f"qemu-{machine}-static") if shutil.which(p)), None)
        if program is None:
            pytest.skip(f"needs qemu-{machine} (qemu-user)")
        emulator = [program, "-cpu", cpu]
    return subprocess.run([*emulator, folder / "replay", *files], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("machine", "cpu", "isas"),
    [
        ("aarch64", "max", ["neon_i8mm", "neon", "scalar"]),
        ("aarch64", "neoverse-n1", ["neon", "scalar"]),  # dot products, no i8mm
        ("aarch64", "cortex-a53", ["scalar"]),  # ARMv8.0
        ("x86_64", "Nehalem", ["scalar"]),  # no AVX
    ],
)
def test_an_emulated_cpu_runs_what_it_can_and_gives_the_bits_of_the_reference(
    replay: Callable[[str], Path], cases: Path, machine: str, cpu: str, isas: list[str]
) -> None:
    if machine == "x86_64" and not X86:
        pytest.skip("builds for x86 on x86 only")
    result = run(replay(machine), machine, cpu, cases)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr}"
    assert result.stdout.splitlines()[:-1] == isas
    assert "give the expected bits" in result.stdout


@pytest.mark.skipif(not X86, reason="runs on this CPU itself")
def test_a_replay_sees_a_scale_off_by_one_percent_and_says_what_it_cannot_read(
    replay: Callable[[str], Path], cases: Path, tmp_path: Path
) -> None:
    folder = replay("x86_64")
    assert run(folder, "x86_64", None, cases).returncode == 0
    t = random_qtensor(20, 100, QuantScheme(4, 32, False))
    right = qgemm_case(t, 2, with_bias=False)
    wrong = QTensor(t.q, (t.scale.float() * 1.01).half(), t.zero, t.scheme)
    file = tmp_path / "case.bin"
    for data, code, message in (
        (right.replace(parts(t), parts(wrong)), 1, "value 0 is"),
        (attend_case("8", "8", (1, 200, 3, 1, 64), wrong=1.01), 1, "within"),
        (attend_case("4 by column", "4", (1, 200, 3, 1, 64), wrong=1.01), 1, "within"),
        (right[:-1], 2, "the file ends within"),
        (b"nothing n=1\n", 2, "the kind is unknown"),
        (b"", 2, "holds no case"),
    ):
        file.write_bytes(data)
        result = run(folder, "x86_64", None, file)
        assert (result.returncode, message in result.stderr) == (code, True), result.stderr


@pytest.mark.parametrize(("machine", "objdump"), [("aarch64", "aarch64-linux-gnu-objdump"), ("x86_64", "objdump")])
def test_no_object_but_an_isas_own_holds_instructions_beyond_the_baseline(
    replay: Callable[[str], Path], machine: str, objdump: str
) -> None:
    if machine == "x86_64" and not X86:
        pytest.skip("builds for x86 on x86 only")
    if not shutil.which(objdump):
        pytest.skip(f"needs {objdump} (binutils)")
    objects = {path.name: path for path in replay(machine).rglob("*.o")}
    own = {name for name in objects if name.startswith("target_") and name != "target_scalar.cpp.o"}
    assert len(own) >= 2
    for name, path in objects.items():
        code = subprocess.run([objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
        beyond = re.search(BEYOND_BASELINE[machine], code.stdout)
        assert (beyond is not None) == (name in own), f"{name}: {beyond and beyond.group()}"
