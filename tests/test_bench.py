"""The measuring instrument: its arithmetic, its bad input, its parsing of other programs, its tables. Never a speed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import load_script
from transformers import AutoConfig

import llmq
from llmq.bench import command, drivers, engines, machine, report, roofline, worker
from llmq.bench.drivers import EngineFailed, Plan
from llmq.bench.engines import ENGINES, Engine, Program, Source

Tiny = Callable[..., Path]

FAKE = """#!{python}
import json, sys, time
argv = sys.argv[1:]
if "--help" in argv:
    print({usage!r})
    sys.exit()
open({log!r}, "a").write(json.dumps(argv) + "\\n")
def values(flag):
    return [int(x) for i, a in enumerate(argv) if a == flag for x in argv[i + 1].split(",")]
rows = [dict(n_prompt=p, n_gen=0, n_depth=0, samples_ts=[100.0 + p]) for p in values("-p") if p]
for n in values("-n"):
    rows += [dict(n_prompt=0, n_gen=n, n_depth=d, samples_ts=[1.0 + d]) for d in values("-d") or [0] if n]
gp = values("-gp")
rows += [dict(n_prompt=d, n_gen=n, samples_ts=[2.0 + d]) for d, n in zip(gp[::2], gp[1::2])]
print("a line before the JSON")
print(json.dumps([dict(row, build_number=7, build_commit="abc") for row in rows]), flush=True)
time.sleep(0.2)  # long enough for its memory to be looked at, as a real one is
"""


def fake_program(folder: Path, usage: str) -> tuple[Program, Path]:
    """A stand-in for llama-bench that writes its arguments to a log, and the log."""
    path, log = folder / "llama-bench", folder / "log"
    path.write_text(FAKE.format(python=sys.executable, usage=usage, log=str(log)))
    path.chmod(0o755)
    return Program.parse(f"fork={path} -rtr 1"), log


@pytest.mark.parametrize(
    ("usage", "depth"),
    [("-d, --n-depth <n> -lm, --load-mode", 1.0 + 512), ("-gp <pp,tg> -mmp <0|1>", 2.0 + 512)],
    ids=["new", "older fork"],
)
def test_llama_bench_is_asked_and_read(tmp_path: Path, usage: str, depth: float) -> None:
    program, log = fake_program(tmp_path, usage)
    engine = Engine("llama-bench", "fork", program=program)
    plan = Plan(prefill=(128, 512), depths=(0, 512), new_tokens=8, repeats=2)
    result = drivers.measure(engine, tmp_path / "x.gguf", plan, threads=3)
    assert result.speeds == {"prefill 128": [228.0], "prefill 512": [612.0], "decode 0": [1.0], "decode 512": [depth]}
    assert result.version == "build 7 (abc)"
    assert result.peak_bytes > 1 << 20
    for line in log.read_text().splitlines():
        asked = json.loads(line)
        assert asked[asked.index("-t") + 1] == "3"
        assert asked[asked.index("-rtr") + 1] == "1"
        assert ("-mmp" in asked, "--load-mode" in asked) == ("-mmp" in usage, "--load-mode" in usage)


def test_a_row_of_llama_cpp_with_few_bits_of_cache_asks_for_them(tmp_path: Path) -> None:
    program, log = fake_program(tmp_path, "-d, --n-depth <n>")
    rows = engines.select(["llama.cpp-q4_0", "llama.cpp-q4_0-kv8"], (program,))
    for row in rows.values():
        drivers.measure(row, tmp_path / "x.gguf", Plan(prefill=(8,), depths=()), threads=1)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    given = [[line[line.index(flag) + 1] if flag in line else None for flag in ("-ctk", "-ctv")] for line in asked]
    assert given == 2 * [[None, None]] + 2 * [["q8_0", "q8_0"]]


def test_a_program_that_fails_says_so(tmp_path: Path) -> None:
    path = tmp_path / "llama-bench"
    path.write_text("#!/bin/sh\necho unknown model architecture >&2\nexit 3\n")
    path.chmod(0o755)
    engine = Engine("llama-bench", "fork", program=Program.parse(str(path)))
    with pytest.raises(EngineFailed, match="ended with code 3: unknown model architecture"):
        drivers.measure(engine, tmp_path / "x.gguf", Plan(), threads=1)


def test_a_figure_that_is_missing_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = drivers.Result({"prefill 128": [1.0]}, 1, 1, 1, 1)
    monkeypatch.setitem(drivers.DRIVERS, "llama-bench", lambda *_: result)
    with pytest.raises(EngineFailed, match="no figure for decode 0"):
        drivers.measure(Engine("llama-bench", ""), tmp_path, Plan(prefill=(128,), depths=(0,)), 1)


def test_programs_take_names_and_options(tmp_path: Path) -> None:
    first, _ = fake_program(tmp_path, "")
    text = f"{first.path},ik={first.path} -rtr 1"
    programs = command.programs_of(text)
    assert [(p.name, p.options) for p in programs] == [("llama.cpp", ()), ("ik", ("-rtr", "1"))]
    chosen = engines.select(["llmq-w8", "llama.cpp-q4_0"], programs)
    assert list(chosen) == ["llmq-w8", "llama.cpp-q4_0", "ik-q4_0"]
    assert {engines.file_name(name, "", programs) for name in ("llama.cpp-q4_0", "ik-q4_0")} == {"llama.cpp-q4_0"}
    assert engines.file_name("ik-q4_0-kv8", "8", programs) == "llama.cpp-q4_0"
    with pytest.raises(ValueError, match="two --llama-bench programs are called llama.cpp"):
        engines.select(["llama.cpp-q4_0"], command.programs_of(f"{first.path},{first.path}"))
    with pytest.raises(FileNotFoundError, match="no/such is no program"):
        command.programs_of("no/such")


def test_every_engine_has_a_driver_and_a_way_to_install() -> None:
    assert set(command.DEFAULT) <= set(ENGINES)
    for name, row in ENGINES.items():
        assert row.driver in drivers.DRIVERS, name
        assert (row.module is None) == (row.install == ""), name
    absent = Engine("transformers", "", module="no_such_module", install="pip install it")
    assert absent.missing() == "the package no_such_module is not installed; pip install it"


def test_files_are_made_once_for_a_checkpoint(tiny_model: Tiny, tmp_path: Path) -> None:
    source = Source(tiny_model("llama"), tmp_path / "cache")
    calls = []

    def make(_source: Source, path: Path, _log: object) -> None:
        calls.append(path)
        path.write_text("x")

    paths = {engines.made(source, "a.gguf", make, print) for _ in range(2)}
    assert len(calls) == len(paths) == 1
    assert [p.name for p in (tmp_path / "cache").rglob("*.gguf")] == ["a.gguf"]
    other = Source(tiny_model("llama", seed=1), tmp_path / "cache")
    assert engines.made(other, "a.gguf", make, print) not in paths


def test_a_file_that_fails_leaves_nothing(tiny_model: Tiny, tmp_path: Path) -> None:
    def make(_source: Source, path: Path, _log: object) -> None:
        path.write_text("half")
        raise ValueError("no space")

    with pytest.raises(ValueError, match="no space"):
        engines.made(Source(tiny_model("llama"), tmp_path), "a.gguf", make, print)
    assert list(tmp_path.rglob("*a.gguf*")) == []


# Rooflines


def small_work() -> roofline.Work:
    return roofline.Work(1000, 200, (0, 8), n_heads=4, n_kv_heads=2, head_dim=3)


def test_work_counts_weights_cache_and_windows() -> None:
    work = small_work()
    # Two layers at position 100 see 100 + 8 positions; K and V, 2 heads of 3, 16 bits.
    assert work.decode_bytes(500, 100) == 500 + 2 * 108 * 2 * 3 * 2
    assert work.decode_bytes(500, 100, batch=3) == 500 + 3 * 2 * 108 * 2 * 3 * 2
    assert work.decode_operations(100) == 2 * 1200 + 4 * 108 * 4 * 3
    seen = sum(p + min(p, 8) for p in range(1, 11))
    assert work.prefill_operations(10) == 2 * (10 * 1000 + 200) + 4 * seen * 4 * 3
    assert roofline.Work.from_json(json.loads(json.dumps(work.to_json()))) == work


def test_footprint_of_a_folder_and_of_a_quantized_one(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    work = roofline.Work.of(folder)
    assert work.block_weights == 2 * (48 * 48 * 2 + 24 * 48 * 2 + 3 * 112 * 48)
    assert work.head_weights == 384 * 48
    plain = roofline.footprint(folder, work)
    norms = 5 * 48 * 4  # the embedding is not read: the head is another matrix
    assert plain.nbytes == 4 * (work.block_weights + work.head_weights) + norms
    assert plain.head_bits == 32
    assert roofline.footprint(folder, work, stored_bits=16).nbytes == plain.nbytes / 2
    scheme = llmq.QuantScheme(4, 32, True)
    made = llmq.quantize_model(folder, scheme, method="rtn", head_bits=4, output=tmp_path / "q").folder
    packed = roofline.footprint(made, work)
    # 4 bits and an fp16 scale for 32 weights; rows of 48 have a group of 16 at the end, rows of 112 one too.
    assert 4.5 < packed.head_bits < 5
    assert 4.5 < packed.block_bits < 7
    # Tied: the embedding is the head.
    gemma = tiny_model("gemma3")
    assert roofline.footprint(gemma, roofline.Work.of(gemma)).head_bits == 32


def test_roof_is_the_lower_of_bus_and_peak() -> None:
    record = a_record()
    work = small_work()
    stream, int8 = 1e6, 1e7
    assert report.roof(record, "a", "decode 0", 2) == pytest.approx(stream / work.decode_bytes(500, 4))
    assert report.roof(record, "a", "prefill 64", 2) == pytest.approx(64 * int8 / work.prefill_operations(64))
    record["roofs"]["2"]["int8"] = None  # then only the bus limits
    assert report.roof(record, "a", "prefill 64", 2) == pytest.approx(64 * stream / 500)
    record["roofs"]["2"]["stream"] = None
    assert report.roof(record, "a", "prefill 64", 2) is None


# The record


def a_record() -> dict[str, Any]:
    """Two engines, two rounds; ``a`` is twice as fast in each round, but not on the medians' ratio."""
    keys = ["prefill 64", "decode 0"]
    runs = [
        {"engine": name, "round": i, "threads": 2, "load_seconds": 1.0, "peak_bytes": 3e6, "start_bytes": 1e6,
         "cpu_seconds": 1.0, "disturbance": {"steal": 0.0, "others": 0.3 * i},
         "speeds": {"prefill 64": [speed * 10.0], "decode 0": [speed]}}
        for i, pair in enumerate(((20.0, 10.0), (40.0, 20.0)))
        for name, speed in zip("ab", pair, strict=True)
    ]  # fmt: skip
    foot = {"nbytes": 500.0, "block_bits": 4.5, "head_bits": 8.5}
    engine = {"about": "an engine", "footprint": foot, "version": "1", "notes": []}
    return {
        "machine": {"cpu": "a CPU", "cpus": 2, "flags": ["avx2"], "system": "Linux", "versions": {"torch": "2"}},
        "model": {"spec": "tiny", "type": "llama", "work": small_work().to_json()},
        "plan": {"new_tokens": 8}, "keys": keys, "sweep": None, "threads": [2], "rounds": 2, "baseline": "b",
        "roofs": {"2": {"stream": 1e6, "int8": 1e7, "instruction": "vpdpbusd"}},
        "engines": {"a": engine, "b": engine}, "runs": runs, "missing": {"c": "not installed"}, "failed": {"d": "died"},
    }  # fmt: skip


def test_table_shows_medians_paired_ratios_and_what_is_absent() -> None:
    text = report.table(a_record())
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert report.ratio(a_record(), "a", "decode 0", 2) == 2.0
    assert "30 ± 33 %" in text  # median of 20 and 40, half their range
    assert "4.5 / 8.5" in lines["a"]
    assert "absent: c: not installed" in text
    assert "failed: d: died" in text
    assert "used by other processes: 15 % in the median run, 30 % in the worst" in text
    assert "stolen" not in text


def test_a_small_cache_lifts_the_roof_and_its_bytes_are_shown() -> None:
    record = a_record()
    record["engines"]["a"] = record["engines"]["a"] | {"kv": "k8v4"}
    bytes_read = small_work().decode_bytes(500, 4, kv_bits=6)
    assert report.roof(record, "a", "decode 0", 2) == pytest.approx(1e6 / bytes_read)
    assert "keys and values, MB" not in report.table(record)
    record["runs"][0]["cache_bytes"] = {"decode 0": 1_234_567}
    assert "1.23" in report.table(record).split("keys and values, MB")[1].splitlines()[2]


def test_table_of_a_run_that_was_stopped() -> None:
    record = a_record()
    record["runs"] = record["runs"][:1]
    row = next(line for line in report.table(record).splitlines() if line.startswith("| b"))
    assert row.count("–") == 2


@pytest.mark.parametrize("sweep", [None, "threads", "context"])
def test_record_is_read_and_drawn(tmp_path: Path, sweep: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs llmq[plot]")
    path, picture = tmp_path / "r.json", tmp_path / "r.png"
    path.write_text(json.dumps(a_record() | {"sweep": sweep}))
    assert command.main(["--read", str(path), "--plot", str(picture)]) == 1  # an engine had failed
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "times b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model is missing"),
        (["--model", "x", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--model", "x", "--rounds", "0"], "--rounds is 0"),
        (["--model", "x", "--prefill", "0"], "only --context may be 0"),
        (["--model", "x", "--prefill", "", "--context", ""], "nothing is to be measured"),
        (["--model", "x", "--engines", "vllm"], "engine is 'vllm'; known: llmq-w4-h4"),
        (["--model", "x", "--engines", "llmq-w8", "--baseline", "torch-bf16"], "--baseline is 'torch-bf16'"),
        (["--model", "x", "--engines", "llmq-w8"], "no model is called 'x'"),
        (["--model", "x", "--json", "no/such/folder.json"], "does not exist"),
        (["--model", "x", "--plot", "x.pdf"], "--plot writes PNG"),
        (["--model", "x", "--llama-bench", "/no/such"], "/no/such is no program"),
        (["--read", "no.json"], "there is no file no.json"),
    ],
)
def test_bad_input_is_code_2_and_the_way_out(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    assert message in capsys.readouterr().err


def test_context_beyond_the_model_and_quantized_models_are_refused(
    tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("llama")
    options = ["--model", str(folder), "--engines", "llmq-w8"]
    assert command.main([*options, "--context", "500", "--prefill", "8"]) == 2
    assert "564 tokens of context would be measured; the model's context is 512" in capsys.readouterr().err
    made = llmq.quantize_model(folder, method="rtn", output=tmp_path / "q").folder
    assert command.main(["--model", str(made), "--engines", "llmq-w8"]) == 2
    path = tmp_path / "x.json"
    path.write_text("[]")
    assert command.main(["--read", str(path)]) == 2
    assert "has no engines, keys" in capsys.readouterr().err


def test_an_engine_that_was_named_must_be_there(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(ENGINES, "other", Engine("transformers", "", module="no_such", install="pip install it"))
    assert command.main(["--model", "x", "--engines", "other"]) == 2
    assert "--engines names other, which cannot run here: the package no_such" in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert "absent: the package no_such is not installed; pip install it" in capsys.readouterr().out


# The whole command, on a tiny model


def test_engines_run_in_turns_and_every_other_round_backwards(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def driver(engine: Engine, _path: Path, plan: Plan, threads: int) -> drivers.Result:
        order.append(f"{engine.about} {threads}")
        if len(order) == 4:
            raise EngineFailed("out of memory")
        return drivers.Result({key: [1.0] for key in plan.measurements()}, 1, 2 << 20, 1 << 20, 1)

    monkeypatch.setitem(drivers.DRIVERS, "transformers", driver)
    monkeypatch.setattr(machine, "stream_read", lambda _threads: float("nan"))
    out = tmp_path / "out.json"
    argv = ["--model", str(tiny_model("llama")), "--engines", "torch-fp32,torch-bf16", "--sweep", "threads"]
    argv += ["--threads", "2", "--prefill", "8", "--context", "0", "--rounds", "2", "--cache", str(tmp_path)]
    assert command.main([*argv, "--json", str(out)]) == 1  # one failed
    fp32, bf16 = "torch float32", "torch bfloat16"
    assert order == [f"{fp32} 1", f"{bf16} 1", f"{fp32} 2", f"{bf16} 2", f"{fp32} 1", f"{fp32} 2"]
    record = json.loads(out.read_text())
    assert record["failed"] == {"torch-bf16": "out of memory"}
    assert record["roofs"]["2"]["stream"] is None
    assert [(r["engine"], r["round"], r["threads"]) for r in record["runs"]] == [
        ("torch-fp32", 0, 1), ("torch-bf16", 0, 1), ("torch-fp32", 0, 2), ("torch-fp32", 1, 1), ("torch-fp32", 1, 2),
    ]  # fmt: skip


def test_the_command_measures_a_quantized_model_beside_its_source(
    tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    argv = ["--model", str(tiny_model("gemma3")), "--engines", "llmq-w4-h4,torch-fp32", "--prefill", "16"]
    argv += ["--context", "0,8", "--batch", "2", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]
    assert command.main([*argv, "--cache", str(tmp_path), "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [r["engine"] for r in record["runs"]] == ["llmq-w4-h4", "torch-fp32"]
    for r in record["runs"]:
        assert set(r["speeds"]) == {"prefill 16", "decode 0", "decode 8", "batch 2"}
        assert all(math.isfinite(s) for column in r["speeds"].values() for s in column)
        assert r["peak_bytes"] >= r["start_bytes"] > 1 << 20
    assert record["engines"]["torch-fp32"]["footprint"]["head_bits"] == 32
    assert record["engines"]["llmq-w4-h4"]["version"].startswith("native decoder")
    assert record["engines"]["llmq-w4-h4"]["notes"] == []  # nothing fell back to another loop
    assert record["engines"]["torch-fp32"]["version"].startswith("Hugging Face graph")
    assert "times llmq-w4-h4" in capsys.readouterr().out


def test_rows_that_differ_in_the_cache_share_a_file_and_tell_its_bytes(tiny_model: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = ["--model", str(tiny_model("llama")), "--engines", "llmq-w4-h8,llmq-w4-h8-kv8", "--prefill", ""]
    argv += ["--context", "100", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]
    assert command.main([*argv, "--cache", str(tmp_path), "--json", str(out)]) == 0
    assert len(list(tmp_path.glob("*/llmq-*"))) == 1
    full, eight = (r["cache_bytes"]["decode 100"] for r in json.loads(out.read_text())["runs"])
    # 2 layers, 2 heads, 2 pages of 64 tokens; rows of 12 columns of 16 bits, the values' filled up to 16 columns.
    assert full == 2 * 2 * 128 * (12 + 16) * 2
    assert eight < full


def test_streamer_counts_the_tokens_generate_gives(tiny_model: Tiny) -> None:
    session = worker.Transformers(str(tiny_model("llama")), threads=1)
    times = session._times(5, 7)
    assert len(times) == 8
    assert times == sorted(times)


# The machine


def test_int8_peak_runs_where_there_is_a_compiler() -> None:
    peak = machine.int8_peak(1)
    if math.isnan(peak.operations):
        pytest.skip(peak.instruction)
    assert peak.operations > 1e9  # a loop that does less is no vector code at all
    assert ":" in peak.instruction


def test_int8_peak_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    monkeypatch.setattr(machine.cpuinfo, "flags", lambda: {"avx2"})
    assert "no C compiler" in machine.int8_peak(1).instruction


def test_disturbance_is_what_the_process_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    before, after = machine.CpuTimes(10, 1, 100), machine.CpuTimes(16, 2, 105)
    assert machine.disturbance(before, after, own=4) == {"steal": 0.1, "others": 0.2}
    assert machine.disturbance(None, after, own=4) is None


# Shapes


def test_shapes_have_the_published_sizes() -> None:
    script = load_script("make_tiny_model")
    # Parameters as the model cards count them, tied matrices once.
    published = {"gemma-3-1b": 999.9e6, "gemma-3-270m": 268.1e6, "smollm2-135m": 134.5e6, "llama-3.2-1b": 1235.8e6}
    assert set(script.SHAPES) == set(published)
    for shape, count in published.items():
        c = script.SHAPES[shape]()
        heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        block = c.hidden_size * (heads + 3 * c.intermediate_size)
        assert c.num_hidden_layers * block + c.vocab_size * c.hidden_size == pytest.approx(count, rel=2e-3)


def test_a_shape_is_an_ordinary_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    script = load_script("make_tiny_model")
    small = Gemma3TextConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=7,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # fmt: skip
    monkeypatch.setitem(script.SHAPES, "small", lambda: small)
    folder = script.make_shape("small", tmp_path / "a", blocks=6)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 6
    assert str(model.dtype) == "torch.bfloat16"
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings
    with pytest.raises(ValueError, match="known: gemma-3-1b"):
        script.make_shape("gpt-5", tmp_path / "b")
