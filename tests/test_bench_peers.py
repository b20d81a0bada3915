"""OpenVINO, ONNX Runtime GenAI and prompt lookup in the bench: without their packages, and with them where they are."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.bench import command, drivers, engines, lookup, peer_files, peers, roofline, worker
from llmq.bench.drivers import Plan
from llmq.bench.engines import ENGINES, Engine, Source

Tiny = Callable[..., Path]
PEERS = {"onnx-genai-int4": "genai_config.json", "openvino-int4": "config.json"}
# Seconds that a stand-in takes for a token: clocks are coarse enough on some machines to see none.
WORK = 2e-4


class FakeGenerator:
    """One token a step, after a prompt was given."""

    def __init__(self, _model: Any, parameters: Any) -> None:
        self.options, self.tokens = parameters.options, []

    def append_tokens(self, ids: np.ndarray) -> None:
        assert ids.dtype == np.int32
        assert ids.shape[0] == self.options["batch_size"]
        assert ids.max() < 50
        self.tokens = list(ids[0])

    def generate_next_token(self) -> None:
        assert self.tokens
        time.sleep(WORK)
        if len(self.tokens) < self.options["max_length"]:
            self.tokens.append(7)

    def get_sequence(self, _row: int) -> list[int]:
        return self.tokens


def fake_onnx(overlays: list[str]) -> SimpleNamespace:
    def parameters(_model: Any) -> SimpleNamespace:
        made = SimpleNamespace(options={})
        made.set_search_options = made.options.update
        return made

    config = SimpleNamespace(overlay=overlays.append)
    return SimpleNamespace(
        __version__="9", Config=lambda _path: config, Model=lambda c: c, GeneratorParams=parameters,
        Generator=FakeGenerator,
    )  # fmt: skip


def fake_openvino(seen: dict[str, Any]) -> SimpleNamespace:
    class Pipeline:
        def __init__(self, _path: str, device: str, **properties: Any) -> None:
            seen.update(properties, device=device)

        def generate(self, inputs: Any, config: Any, streamer: Any) -> SimpleNamespace:
            time.sleep(WORK)
            for _ in range(config.max_new_tokens if streamer is not None else 0):
                time.sleep(WORK)
                streamer.write(3)
            return SimpleNamespace(tokens=[[3] * (config.max_new_tokens - seen.get("short", 0))] * len(inputs.ids))

    return SimpleNamespace(
        __version__="9", LLMPipeline=Pipeline, TokenizedInputs=lambda ids, mask: SimpleNamespace(ids=ids, mask=mask),
        GenerationConfig=lambda **options: SimpleNamespace(**options), StreamerBase=type("StreamerBase", (), {}),
        StreamingStatus=SimpleNamespace(RUNNING=0),
    )  # fmt: skip


def order(backend: str, path: Path) -> dict[str, Any]:
    plan = {"prefill": [8], "depths": [0, 4], "batches": [2], "new_tokens": 3, "repeats": 2}
    return {"backend": backend, "path": str(path), "threads": 3, "plan": plan}


KEYS = {"prefill 8": 2, "decode 0": 2, "decode 4": 2, "batch 2": 2}


def test_onnx_genai_is_asked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlays: list[str] = []
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake_onnx(overlays))
    (tmp_path / "genai_config.json").write_text(
        json.dumps({"model": {"vocab_size": 50, "decoder": {"sliding_window": {"window_size": 20}}}})
    )
    said = worker.run(order("onnx-genai", tmp_path))
    assert {key: len(values) for key, values in said["speeds"].items()} == KEYS
    assert json.loads(overlays[0])["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3
    assert said["version"] == "onnxruntime-genai 9"
    lengths = [peers.OnnxGenai(str(tmp_path), 1)._start(n, 2, 1)[0].options["max_length"] for n in (3, 30)]
    assert lengths == [20, 32]  # a cache is never shorter than the window
    monkeypatch.setattr(FakeGenerator, "generate_next_token", lambda _self: None)
    with pytest.raises(RuntimeError, match="gave 0 tokens, 4 were asked for"):
        peers.OnnxGenai(str(tmp_path), 1).decode(2, 3, 1)


def test_openvino_is_asked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "openvino_genai", fake_openvino(seen))
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda values: values))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    said = worker.run(order("openvino", tmp_path))
    assert {key: len(values) for key, values in said["speeds"].items()} == KEYS
    assert seen == {"device": "CPU", "INFERENCE_NUM_THREADS": 3}
    seen["short"] = 1
    with pytest.raises(RuntimeError, match="1 were asked for"):
        peers.OpenVino(str(tmp_path), 1).prefill(4)


def test_a_peer_that_is_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _name: None)
    for name in PEERS:
        row = ENGINES[name]
        assert f"the package {row.module} is not installed; pip install" in str(row.missing())

    def inner(name: str) -> object:
        if "." in name:
            raise ModuleNotFoundError(name)
        return object()

    monkeypatch.setattr(engines.importlib.util, "find_spec", inner)
    row = ENGINES["openvino-int4"]
    assert row.missing() is None  # its files may have been made elsewhere
    assert row.make is not None
    with pytest.raises(peer_files.ToolFailed, match=r"optimum\.intel, which is not installed; pip install"):
        row.make(Source(tmp_path, tmp_path), tmp_path / "x", print)


def test_a_tool_that_fails_gives_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(peer_files.ToolFailed, match="no_such_tool ended with code 1: .*No module named no_such_tool"):
        peer_files._tool("no_such_tool", str(tmp_path))


def test_an_engine_whose_tool_fails_is_left_out_alone(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(*_args: Any) -> None:
        raise peer_files.ToolFailed("the builder ended with code 3")

    result = drivers.Result({"prefill 8": [1.0]}, 1, 2 << 20, 1 << 20, 1)
    monkeypatch.setitem(drivers.DRIVERS, "transformers", lambda *_: result)
    monkeypatch.setitem(ENGINES, "broken", Engine("onnx-genai", "broken", make))
    argv = ["--model", str(tiny_model("llama")), "--engines", "torch-fp32,broken", "--prefill", "8", "--context", ""]
    assert command.main([*argv, "--rounds", "1", "--threads", "1", "--cache", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "failed: broken: the builder ended with code 3" in out
    assert "| torch-fp32" in out


def test_rope_of_each_kind_is_flattened_and_a_scaled_one_refused() -> None:
    kinds = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    config = peer_files.flat_rope(SimpleNamespace(rope_parameters=kinds))
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.rope_parameters == {"rope_type": "default"}
    plain = SimpleNamespace(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    assert peer_files.flat_rope(plain).rope_parameters == {"rope_theta": 5.0, "rope_type": "default"}
    kinds["full_attention"]["rope_type"] = "linear"
    with pytest.raises(ValueError, match="cannot be told of a rope"):
        peer_files.flat_rope(SimpleNamespace(rope_parameters=kinds))


def test_widths_come_of_the_peers_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / peer_files.ONNX_MODEL).touch()
    sizes = {"lm_head.MatMul.weight_Q4": (100, 100.0), "model.layers.0.mlp.up_proj.MatMul.weight_Q4": (500, 500.0)}
    monkeypatch.setitem(peer_files.SIZES, peer_files.ONNX_MODEL, lambda _folder: sizes)
    found = roofline.footprint(tmp_path, roofline.Work(1000, 200, (0,), n_heads=1, n_kv_heads=1, head_dim=1))
    assert (found.nbytes, found.block_bits, found.head_bits) == (600.0, 4.0, 4.0)


def test_rope_tables_are_no_weights_and_bytes_outside_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(name: str, length: str | None) -> SimpleNamespace:
        outside = [SimpleNamespace(key="length", value=length)] if length else []
        return SimpleNamespace(name=name, dims=[6, 4], external_data=outside, ByteSize=lambda: 96)

    names = {"a.weight_Q4": "24", "b.norm": None, "cos_cache": "9", "cos_cache_local": "9", "sin_cache_global": "9"}
    graph = SimpleNamespace(initializer=[tensor(name, length) for name, length in names.items()])
    fake = SimpleNamespace(load=lambda *_args, **_options: SimpleNamespace(graph=graph))
    monkeypatch.setitem(sys.modules, "onnx", fake)
    assert peer_files.onnx_sizes(tmp_path) == {"a.weight_Q4": (24, 24.0), "b.norm": (24, 96.0)}


@pytest.fixture(scope="module")
def even_model(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose rows are multiples of 32, which OpenVINO's groups need."""
    folder = tmp_path_factory.mktemp("even") / "llama"
    shutil.copytree(tiny_model("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16})
    config.update({"num_key_value_heads": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.slow
def test_a_peer_runs_where_it_is_installed(name: str, even_model: Path, tmp_path: Path) -> None:
    row: Engine = ENGINES[name]
    why = row.missing()
    if why:
        pytest.skip(why)
    assert row.make is not None
    try:
        path = engines.made(Source(even_model, tmp_path), name, row.make, print)
    except peer_files.ToolFailed as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert (path / PEERS[name]).is_file()
    result = drivers.measure(row, path, Plan(prefill=(16,), depths=(8,), batches=(2,), new_tokens=3), threads=1)
    assert all(speed > 0 for column in result.speeds.values() for speed in column)
    assert 4 < roofline.footprint(path, roofline.Work.of(even_model)).block_bits < 12


# Prompt lookup


class Words:
    """A tokenizer: one token a word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_prompts_of_lookup_are_the_text_and_a_piece_of_it_repeated() -> None:
    ids = list(range(200))
    made = lookup.prompts(" ".join(map(str, ids)), Words(), tokens=150)
    assert made["text"] == ids[:150]
    assert made["repeating"] == (ids[: lookup.REPEATED] * 3)[:150]
    with pytest.raises(ValueError, match="the text has 3 tokens; prompt lookup is measured after 150"):
        lookup.prompts("1 2 3", Words(), tokens=150)


def test_lookup_is_timed_both_ways_and_a_changed_text_is_seen(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ENGINES["llmq-w4-h8"]
    assert row.make is not None
    path = engines.made(Source(tiny_model("llama"), tmp_path), "llmq-w4-h8", row.make, print)
    session = worker.Transformers(str(path), threads=1)
    gain = lookup.measure(session, list(range(20)) * 3, 4, 12, 2)
    assert (len(gain.plain), len(gain.lookup), gain.same) == (2, 2, True)
    assert gain.row("x").endswith("| yes |")
    real = lookup._generate
    monkeypatch.setattr(lookup, "_generate", lambda s, ids, n, new: (real(s, ids, n, new)[0], [n]))
    assert not lookup.measure(session, list(range(20)), 4, 4, 1).same


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt-lookup"], "--model is missing"),
        (["--model", "x", "--prompt-lookup", "0"], "--prompt-lookup is 0"),
        (["--model", "x", "--prompt-lookup", "--engines", "torch-bf16"], "names no row of it"),
        (["--model", "x", "--prompt-lookup", "--text", "no.txt"], "there is no file no.txt"),
        (["--model", "x", "--prompt-lookup", "--rounds", "0"], "--rounds is 0"),
    ],
)
def test_bad_input_of_lookup_is_code_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_changed_text_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "run", lambda _args: False)
    assert command.main(["--model", "x", "--prompt-lookup"]) == 1
