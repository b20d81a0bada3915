"""DRIVERS: how each kind of engine is run, in a process of its own, and how its figures are read.

Every driver measures the same things on random tokens. ``prefill n``: tokens/s of a prompt of n tokens. ``decode d``:
tokens/s of new tokens after d tokens. ``batch b``: tokens/s of b sequences together. Each of them after a warm-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from llmq.bench.engines import Engine, Program
from llmq.memory import peak_of

MARK = "llmq-bench-result "  # begins the one line of a worker's output that is its result
LOOK_SECONDS = 0.02  # between two looks at a process and its memory
BATCH_PROMPT = 32  # tokens of each sequence before a batch is timed


class EngineFailed(RuntimeError):
    """An engine's process ended with an error, or gave no figure for something that was asked."""


@dataclass(frozen=True)
class Plan:
    """What is measured in one run of an engine.

    Attributes:
        prefill: prompt lengths, tokens.
        depths: tokens of context before decoding is timed.
        batches: numbers of sequences decoded together.
        new_tokens: tokens that are timed in decoding.
        repeats: times each measurement is repeated in one process.
    """

    prefill: tuple[int, ...] = (128, 512, 2048)
    depths: tuple[int, ...] = (0, 512, 4096)
    batches: tuple[int, ...] = ()
    new_tokens: int = 64
    repeats: int = 1

    def measurements(self) -> list[str]:
        """Names of the measurements."""
        columns = {"prefill": self.prefill, "decode": self.depths, "batch": self.batches}
        return [f"{kind} {n}" for kind, column in columns.items() for n in column]

    def positions(self) -> int:
        """Tokens of context that the longest measurement needs."""
        longest = [*self.prefill, *(d + self.new_tokens for d in self.depths)]
        return max([*longest, *(BATCH_PROMPT + self.new_tokens for _ in self.batches)])


@dataclass(frozen=True)
class Result:
    """One run of one engine.

    Attributes:
        speeds: measurement -> tokens/s, one for each repeat.
        load_seconds: from the file to the ready model (llama-bench: a whole run of one token).
        peak_bytes: largest resident memory of the process, looked at every 20 ms.
        start_bytes: resident memory before the model was loaded (Python, torch); 0 for a program.
        cpu_seconds: of the process.
        version: of the engine.
        cache_bytes: decode -> bytes of keys and values after it, where the engine tells them.
    """

    speeds: dict[str, list[float]]
    load_seconds: float
    peak_bytes: int
    start_bytes: int
    cpu_seconds: float
    version: str = ""
    cache_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_process(command: list[str], threads: int) -> Finished:
    """Run a command with ``threads`` threads for whatever pool it has. Raises EngineFailed with its last words."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LLMQ_NUM_THREADS")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **dict.fromkeys(pools, str(threads)), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = subprocess.Popen(command, env=env, stdout=out, stderr=errors)
        peak = 0
        try:
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                peak = max(peak, peak_of(process.pid))
                time.sleep(LOOK_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - start
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        output, words = (_text(file) for file in (out, errors))
        if process.returncode:
            last = (words.strip().splitlines() or ["no message"])[-1]
            raise EngineFailed(f"{Path(command[0]).name} ended with code {process.returncode}: {last[:300]}")
    return Finished(output, seconds, usage.ru_utime + usage.ru_stime, peak)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _worker(backend: str) -> Callable[[Engine, Path, Plan, int], Result]:
    """A driver that runs a row of BACKENDS in llmq/bench/worker.py."""

    def run(engine: Engine, path: Path, plan: Plan, threads: int) -> Result:
        order = {"backend": backend, "path": str(path), "threads": threads, "plan": asdict(plan), **engine.options}
        done = run_process([sys.executable, "-m", "llmq.bench.worker", json.dumps(order)], threads)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not lines:
            raise EngineFailed("the worker printed no result")
        said = json.loads(lines[-1].removeprefix(MARK))
        return Result(**said, peak_bytes=done.peak_bytes, cpu_seconds=done.cpu_seconds)

    return run


def run_llama_bench(engine: Engine, path: Path, plan: Plan, threads: int) -> Result:
    """One short run of a llama-bench program for the load time, then one for each kind of measurement."""
    program = engine.program
    assert program is not None
    usage = _usage(program.path)
    base = [str(program.path), "-m", str(path), "-t", str(threads), "-fa", "1", "-o", "json"]
    base += [*_no_mmap(usage), *program.options]
    if "cache_type" in engine.options:
        kind = str(engine.options["cache_type"])
        base += ["-ctk", kind, "-ctv", kind]
    runs = [run_process([*base, "-p", "1", "-n", "0", "-r", "1"], threads)]
    load, rows = runs[0].seconds, _rows(runs[0])
    repeat = ["-r", str(plan.repeats)]
    if plan.prefill:
        runs.append(run_process([*base, *repeat, "-n", "0", "-p", ",".join(map(str, plan.prefill))], threads))
        rows += _rows(runs[-1])
    if plan.depths:
        runs.append(run_process([*base, *repeat, "-p", "0", *_depth_options(usage, plan)], threads))
        rows += _rows(runs[-1])
    speeds = {key: samples for row in rows for key, samples in [_speed(row)] if key in plan.measurements()}
    if plan.batches:
        runs.append(_batched(program, path, plan, threads))
        for line in filter(lambda text: text.startswith("{"), runs[-1].stdout.splitlines()):
            row = json.loads(line)
            speeds[f"batch {row['pl']}"] = [row["speed_tg"]]
    first = rows[0]
    return Result(
        speeds=speeds,
        load_seconds=load,
        peak_bytes=max(run.peak_bytes for run in runs),
        start_bytes=0,
        cpu_seconds=sum(run.cpu_seconds for run in runs),
        version=f"build {first.get('build_number')} ({first.get('build_commit')})",
        notes=["batches from one run of llama-batched-bench"] if plan.batches else [],
    )


def _rows(done: Finished) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[") :])
    except ValueError as error:
        raise EngineFailed(f"llama-bench gave no JSON: {done.stdout.strip()[:200]!r}") from error
    return rows


def _speed(row: dict[str, Any]) -> tuple[str, list[float]]:
    """Name of the measurement and tokens/s of one row of llama-bench's JSON."""
    if row["n_gen"] == 0:
        return f"prefill {row['n_prompt']}", row["samples_ts"]
    return f"decode {row.get('n_depth') or row['n_prompt']}", row["samples_ts"]


def _usage(program: Path) -> str:
    """What a program says of its options, which differ between forks and versions."""
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _no_mmap(usage: str) -> list[str]:
    """Weights in memory of the process, as the other engines have them; page faults are not timed."""
    ways = {"--load-mode": ["--load-mode", "none"], "-mmp": ["-mmp", "0"], "--no-mmap": ["--no-mmap"]}
    return next((options for word, options in ways.items() if word in usage), [])


def _depth_options(usage: str, plan: Plan) -> list[str]:
    """Options for decoding after some context: ``-d``, or ``-gp`` in forks that are older than it."""
    new = str(plan.new_tokens)
    if "--n-depth" in usage:
        return ["-n", new, "-d", ",".join(map(str, plan.depths))]
    options = ["-n", new if 0 in plan.depths else "0"]
    for depth in filter(None, plan.depths):
        options += ["-gp", f"{depth},{new}"]
    return options


def _batched(program: Program, path: Path, plan: Plan, threads: int) -> Finished:
    """llama-batched-bench of the same build."""
    batched = program.sibling("llama-batched-bench")
    if batched is None:
        raise EngineFailed(f"batches need llama-batched-bench beside {program.path}; build that target too")
    context = max(plan.batches) * (BATCH_PROMPT + plan.new_tokens)
    command = [str(batched), "-m", str(path), "-t", str(threads), "-fa", "on", "-c", str(context)]
    command += _no_mmap(_usage(batched))
    command += ["-npp", str(BATCH_PROMPT), "-ntg", str(plan.new_tokens), "-npl", ",".join(map(str, plan.batches))]
    return run_process([*command, "--output-format", "jsonl"], threads)


# Name -> (engine, its file, plan, threads) -> result. Raises EngineFailed.
DRIVERS: dict[str, Callable[[Engine, Path, Plan, int], Result]] = {
    "transformers": _worker("transformers"),
    "llama-cpp-python": _worker("llama-cpp-python"),
    "onnx-genai": _worker("onnx-genai"),
    "openvino": _worker("openvino"),
    "llama-bench": run_llama_bench,
}


def measure(engine: Engine, path: Path, plan: Plan, threads: int) -> Result:
    """Run ``engine`` once. Raises EngineFailed, also when a measurement is missing from what it gave."""
    result = DRIVERS[engine.driver](engine, path, plan, threads)
    lacking = [key for key in plan.measurements() if not result.speeds.get(key)]
    if lacking:
        raise EngineFailed(f"no figure for {', '.join(lacking)}")
    return result
