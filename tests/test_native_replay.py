"""The native decoder on CPUs that are not at hand, and under sanitizers: one tiny model, replayed without Python."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_cases import model_case
from test_kernels_replay import build, run

from llmq import AutoModelForCausalLM, CalibConfig, QuantScheme, quantize_model, set_activation_bits
from llmq.runtime.causal_lm import graph_class

X86 = platform.machine() in ("x86_64", "AMD64")
TOKENS = 80  # more than a page of 64, and ten windows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(platform.system() != "Linux", reason="qemu's user mode needs Linux")]


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """gemma3: windows, two ropes, norms of q and k, a tied head. Expected: the graph's logits, float activations."""
    out = tmp_path_factory.mktemp("replay") / "gemma3"
    calib = CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    quantize_model(tiny_model("gemma3"), QuantScheme(4, 32), method="rtn", output=out, calib=calib)
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    set_activation_bits(model, 16)
    ids = torch.randint(3, 384, (TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = graph_class(model).forward(model, input_ids=ids[None], use_cache=False).logits[0]
    # As in test_native.py, with room for CPUs without fused multiply-adds: 2**-24 of the logits times 80 terms.
    return model_case(model, ids, expected, 80 * 2.0**-24 * float(expected.abs().max()) * 8, floats=True)


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``replay(machine, *options)``: folder of the replay program."""
    built: dict[tuple[str, ...], Path] = {}

    def get(machine: str, *options: str) -> Path:
        key = (machine, *options)
        if key not in built:
            built[key] = build(machine, tmp_path_factory.mktemp(machine), *options)
        return built[key]

    return get


@pytest.mark.parametrize(
    ("machine", "cpu"),
    [("aarch64", "max"), ("aarch64", "cortex-a53"), ("x86_64", "Nehalem"), ("x86_64", None)],
)
def test_a_tiny_model_gives_the_graphs_logits_on_every_cpu(
    replay: Callable[..., Path], case: bytes, tmp_path: Path, machine: str, cpu: str | None
) -> None:
    if machine == "x86_64" and not X86:
        pytest.skip("builds for x86 on x86 only")
    file = tmp_path / "model.bin"
    file.write_bytes(case)
    result = run(replay(machine), machine, cpu, file)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr}"


@pytest.mark.skipif(not X86, reason="runs on this CPU itself")
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_a_tiny_model_under_sanitizers(
    replay: Callable[..., Path], case: bytes, tmp_path: Path, sanitizers: str
) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(case)
    folder = replay("x86_64", f"-DLLMQ_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")
    result = run(folder, "x86_64", None, file)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-4000:]}"
    assert "Sanitizer" not in result.stderr


@pytest.mark.skipif(not X86, reason="runs on this CPU itself")
def test_the_replay_sees_a_scale_off_by_one_percent(replay: Callable[..., Path], case: bytes, tmp_path: Path) -> None:
    line, rest = case.split(b"\n", 1)
    constants = torch.frombuffer(bytearray(rest[:28]), dtype=torch.float32).clone()
    constants[1] *= 1.01  # the attention's
    file = tmp_path / "model.bin"
    file.write_bytes(line + b"\n" + constants.numpy().tobytes() + rest[28:])
    result = run(replay("x86_64"), "x86_64", None, file)
    assert result.returncode == 1
    assert "logit" in result.stderr
