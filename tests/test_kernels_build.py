"""The build of the kernels: what each object file may contain, and the VNNI kernels run through an emulation.

Needs cmake, pybind11, a C++ compiler and binutils; the emulation also SIMDe's headers (Debian, Ubuntu: libsimde-dev).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmq

ROOT = Path(__file__).resolve().parent.parent
SIMDE = [d for d in ("/usr/include", "/usr/local/include") if (Path(d) / "simde/x86/avx512.h").exists()]

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="only x86 has kernels of several ISAs"
)


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def configure(folder: Path, *options: str) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11 (extra: test)")
    if not shutil.which("cmake"):
        pytest.skip("the build needs cmake (extra: test)")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    places = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", *generator, "-S", ROOT / "cpp", "-B", folder, *places, *options)


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object file of each ISA, built without optimisation: nothing is inlined away, so every symbol shows."""
    missing = [tool for tool in ("nm", "objdump") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs binutils: {', '.join(missing)} not found")
    folder = tmp_path_factory.mktemp("objects")
    configure(folder, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-g0")
    isas = [name.stem.removeprefix("target_") for name in folder.glob("target_*.cpp")]
    run("cmake", "--build", folder, "--target", *(f"isa_{name}" for name in isas))
    return {name: next(folder.rglob(f"target_{name}.cpp.o")) for name in isas}


def test_every_isa_is_built_whatever_this_machine_runs(objects: dict[str, Path]) -> None:
    assert set(objects) == {"scalar", "avx2", "avxvnni", "avx512vnni"}


def test_an_isa_object_defines_its_table_and_nothing_that_a_linker_may_merge(objects: dict[str, Path]) -> None:
    # Weak symbols of equal name are merged at link time, and the copy kept may use instructions the caller's CPU lacks.
    for name, path in objects.items():
        defined = [line.split(maxsplit=2)[1:] for line in run("nm", "-C", "--defined-only", path).splitlines()]
        visible = [symbol for kind, symbol in defined if kind.isupper() or kind in "vwu"]
        assert visible == [f"llmq::kernels_{name}"]


def test_an_isa_object_holds_only_its_own_registers(objects: dict[str, Path]) -> None:
    code = {name: run("objdump", "-d", "--no-show-raw-insn", path) for name, path in objects.items()}
    used = {name: set(re.findall(r"%([xyz]mm)", text)) for name, text in code.items()}
    assert used["scalar"] <= {"xmm"}
    assert used["avx2"] == used["avxvnni"] == {"xmm", "ymm"}
    assert "zmm" in used["avx512vnni"]
    assert re.search(r"vpdpbusd .*%zmm", code["avx512vnni"])
    assert re.search(r"\{vex\} vpdpbusd .*%ymm", code["avxvnni"])
    assert re.search(r"vpmaddubsw .*%ymm", code["avx2"])
    for name in ("scalar", "avx2"):
        assert "vpdpbusd" not in code[name]


# Put this _core in place of the installed one, then run pytest.
RUN_WITH_CORE = """
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("llmq._core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
sys.modules["llmq._core"] = core
spec.loader.exec_module(core)
raise SystemExit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not SIMDE, reason="needs SIMDe's headers (libsimde-dev)")
def test_the_vnni_kernels_pass_every_kernel_test_in_emulation(tmp_path: Path) -> None:
    # -O1: SIMDe compiles slowly, and the integers and roundings do not depend on the optimiser.
    configure(
        tmp_path / "build", "-DLLMQ_EMULATE_VNNI=ON", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -Wno-psabi"
    )
    run("cmake", "--build", tmp_path / "build", "--target", "_core")
    command = (sys.executable, "-c", RUN_WITH_CORE, next((tmp_path / "build").glob("_core.*.so")))
    options = ("-q", "-p", "no:cacheprovider", "-k", "vnni", "-m", "not slow")
    tests = sorted((ROOT / "tests").glob("test_kernels*.py"))
    # An editable or plain installation is found anyway; running from the source tree needs the path.
    env = {"PYTHONPATH": str(Path(llmq.__file__).parent.parent), "OMP_NUM_THREADS": "1", "LLMQ_ISA": "avx512vnni"}
    assert "passed" in run(*command, *options, *tests, cwd=ROOT, **env)
