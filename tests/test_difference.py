"""The figures of a comparison are those of a few lines of torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_conversion import SYM, native
from test_dialects import original  # noqa: F401

import llmq
from llmq import diff
from llmq.conversion import convert
from llmq.difference import difference
from llmq.quantize import main as quantize

UP = "model.layers.0.mlp.up_proj"


def test_errors_codes_and_sizes(original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", SYM)
    convert(tmp_path / "a", tmp_path / "b", "gptq")
    found = difference(str(tmp_path / "a"), str(tmp_path / "b"))
    rows = {row.name: row for row in found.rows}
    assert rows[UP].equal == 1.0
    assert rows[UP].error == 0.0
    assert rows["lm_head"].kinds == ("dense", "dense")
    assert found.alone == []
    dense = difference(str(original), str(tmp_path / "b"))
    A, B = load_file(original / "model.safetensors")[f"{UP}.weight"], held[UP].dequantize()
    row = next(row for row in dense.rows if row.name == UP)
    assert row.error == pytest.approx(float((B - A).norm() / A.norm()), rel=1e-5)
    assert row.equal is None
    assert row.kinds == ("dense", "w4g64sym")
    files = sum(p.stat().st_size for p in (tmp_path / "b").glob("*.safetensors"))
    assert dense.views[1].nbytes == files


def test_share_of_equal_codes(original: Path, tmp_path: Path) -> None:  # noqa: F811
    native(original, tmp_path / "a", SYM)
    convert(tmp_path / "a", tmp_path / "b", "gptq")
    path = next((tmp_path / "b").glob("*.safetensors"))
    from safetensors.torch import save_file

    tensors = load_file(path)
    tensors[f"{UP}.qweight"][0] ^= 1  # the first of each output's codes
    save_file(tensors, path, {"format": "pt"})
    found = difference(str(tmp_path / "a"), str(tmp_path / "b"))
    row = next(row for row in found.rows if row.name == UP)
    assert row.equal == pytest.approx(1 - 1 / row.shape[1])
    assert row.error > 0


def test_the_command_with_a_text(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, text = str(tiny_model("llama")), tmp_path / "w8", tmp_path / "t.txt"
    flags = ["--method", "rtn", "--wbits", "8", "--group-size", "32", "--output", str(out)]
    assert quantize(["--model", model, *flags]) == 0
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    capsys.readouterr()
    report = tmp_path / "d.json"
    assert diff.main([model, str(out), "--text", str(text), "--seqlen", "32", "--speed", "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "KL(reference||model)" in shown
    assert "dense -> w8g32" in shown
    assert re.search(r"tokens/s \(.*\), [\d.]+ of A\n", shown)
    found = json.loads(report.read_text())
    assert all(side["rate"] > 0 for side in found["speed"])
    assert found["text"]["kl"] >= 0
    assert found["text"]["top1"] > 0.9
    assert all(0 < row["error"] < 0.01 for row in found["matrices"] if "_proj" in row["name"]), "8 bits: half of 1/127"


def test_speed_of_both(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One model decodes as if it took a clock's tick a token, the other two: the rates are 1 and 1/2."""
    from llmq import speed

    native(original, tmp_path / "a", SYM)
    models = [llmq.AutoModelForCausalLM.from_pretrained(path) for path in (original, tmp_path / "a")]
    models[1].generation_config.eos_token_id = list(range(160))  # ignored, and put back
    now = 0.0
    order = []

    def slow(model: Any, ticks: float) -> Any:
        def generate(*args: Any, streamer: Any, **options: Any) -> Any:
            put = streamer.put

            def later(value: Any) -> None:
                nonlocal now
                now += ticks
                put(value)

            order.append(ticks)
            streamer.put = later
            return type(model).generate(model, *args, streamer=streamer, **options)

        return generate

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    for model, ticks in zip(models, (1.0, 2.0), strict=True):
        monkeypatch.setattr(model, "generate", slow(model, ticks))
    found = speed.decode_speeds(*models, tokens=4, rounds=2)
    assert [f.rate for f in found] == [1.0, 0.5]
    assert order == [2.0, 1.0, 1.0, 2.0, 2.0, 1.0], "in turns, every other round in reverse order"
    assert models[1].generation_config.eos_token_id == list(range(160))
    assert found[0].engine.startswith("Hugging Face graph")
    with pytest.raises(ValueError, match="1 tokens in 5 rounds"):
        speed.decode_speeds(*models, tokens=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--text", "nowhere.txt"], "there is no such file"), ([], "no model is called 'b'|config.json|no such")],
)
def test_bad_input(flags: list[str], message: str, original: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert diff.main([str(original), "b", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_models_of_two_architectures(original: Path, tiny_model) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="not of one architecture"):
        difference(str(original), str(tiny_model("llama")))
