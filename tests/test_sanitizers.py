"""The compiled extension under sanitizers, with the tests that use it. Slow: two builds at -O1.

In, under address and undefined-behaviour: every kernel, on the best ISA and the scalar one, the packed weights, the
sampler, the decoder and its cache, and generation. In, under thread: the tests that run several threads. Not in: tests
that only start other Python processes, and leaks (the interpreter and torch keep memory until the end). Needs cmake,
pybind11, GCC and its sanitizer runtimes.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_kernels_build import RUN_WITH_CORE, configure, run

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
EXIT = 66  # neither Python's nor pytest's

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="the runtime is preloaded, as Linux does it"),
]

# torch and libgomp are not instrumented: what their threads hand to one another looks like a race. Never llmq's own.
SUPPRESSIONS = "".join(f"race:{name}\ncalled_from_lib:{name}\n" for name in ("libtorch_cpu.so", "libgomp"))

# A read beyond an array, and two threads that write one integer.
WRONG = {
    "address,undefined": 'extern "C" int f(int n) { int* a = new int[4](); int v = a[n]; delete[] a; return v; }',
    "thread": "#include <thread>\nint v;\n"
    'extern "C" int f(int n) { std::thread t([=] { v = n; }); v = 1; t.join(); return v; }',
}


def runtime(sanitizers: str) -> str:
    """What to preload: the compiler's runtime, then libstdc++, in which it looks for what it wraps (exceptions).

    Skips where the compiler or the runtime is missing.
    """
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    path = run("g++", f"-print-file-name={RUNTIMES[sanitizers]}").strip()
    if not Path(path).is_file():
        pytest.skip(f"needs {RUNTIMES[sanitizers]} of g++")
    return f"{path} {run('g++', '-print-file-name=libstdc++.so.6').strip()}"


def child(sanitizers: str, folder: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with the runtime loaded first."""
    (folder / "suppressions").write_text(SUPPRESSIONS)
    common = f"halt_on_error=1:exitcode={EXIT}"
    env = {
        "LD_PRELOAD": runtime(sanitizers),
        "ASAN_OPTIONS": f"{common}:detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"{common}:suppressions={folder / 'suppressions'}:ignore_noninstrumented_modules=1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    command = [sys.executable, *(str(a) for a in arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``core(sanitizers)``: the extension built with them, once a run."""
    built: dict[str, Path] = {}

    def get(sanitizers: str) -> Path:
        if sanitizers not in built:
            runtime(sanitizers)
            folder = tmp_path_factory.mktemp("core")
            configure(
                folder,
                f"-DLLMQ_SANITIZE={sanitizers}",
                "-DCMAKE_CXX_COMPILER=g++",
                "-DCMAKE_BUILD_TYPE=None",
                "-DCMAKE_CXX_FLAGS=-O1",
            )
            run("cmake", "--build", folder, "--target", "_core", "--parallel", "2")
            built[sanitizers] = next(folder.glob("_core.*.so"))
        return built[sanitizers]

    return get


@pytest.mark.parametrize("sanitizers", RUNTIMES)
def test_the_sanitizer_of_a_child_is_alive(tmp_path: Path, sanitizers: str) -> None:
    source, library = tmp_path / "wrong.cpp", tmp_path / "wrong.so"
    source.write_text(WRONG[sanitizers])
    preload = runtime(sanitizers)
    run("g++", "-std=c++20", f"-fsanitize={sanitizers}", "-O1", "-g1", "-shared", "-fPIC", source, "-o", library)
    result = child(sanitizers, tmp_path, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).f(5)")
    assert (result.returncode, "Sanitizer" in result.stderr) == (EXIT, True), f"{preload}\n{result.stderr[-2000:]}"


THREADED = "several_threads or any_number_of_threads or shared_out_to_threads or streamed_from_a_thread"


@pytest.mark.parametrize(
    ("sanitizers", "isa", "files", "select"),
    [
        ("address,undefined", "", ("kernels", "kernels_packing", "sampler", "packed_cache"), ""),
        ("address,undefined", "", ("kernels_attend", "kernels_attend_columns", "native", "kv_cache", "generation"), ""),
        ("address,undefined", "", ("native_columns", "native_sharing", "prompt_cache"), "not no_memory"),
        ("address,undefined", "scalar", ("kernels",), ""),
        ("thread", "", ("native", "native_sharing", "generation"), THREADED),
        ("thread", "", ("kernels_attend", "kernels_attend_columns"), THREADED),
    ],
)
def test_the_suite_is_clean_under(
    core: Callable[[str], Path], tmp_path: Path, sanitizers: str, isa: str, files: tuple[str, ...], select: str
) -> None:
    module = core(sanitizers)
    tests = [ROOT / "tests" / f"test_{name}.py" for name in files]
    # The module in use is the one that was built: asserted in the child, after the tests (pytest comes first).
    code = RUN_WITH_CORE.replace("raise SystemExit(", "code = (") + (
        "\nfrom llmq import kernels\nassert kernels.compiled() is core\nsys.exit(code)"
    )
    options = ("-q", "-s", "-p", "no:cacheprovider", "-m", "not slow", "-k", select)
    env = {"LLMQ_ISA": isa} if isa else {}
    result = child(sanitizers, tmp_path, "-c", code, module, *options, *tests, **env)
    report = result.stdout[-3000:] + result.stderr[-6000:]
    assert result.returncode == 0, f"exit code {result.returncode}\n{report}"
    assert "passed" in result.stdout, report
    assert "Sanitizer" not in result.stdout + result.stderr, report
