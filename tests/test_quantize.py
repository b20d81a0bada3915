"""The command as a user types it."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llmq.config import AWQConfig, CalibConfig, GPTQConfig, QuantScheme, RuntimeConfig
from llmq.quantize import build_parser, main

QUICK = ["--calib", "stdlib", "--nsamples", "4", "--seqlen", "48", "--group-size", "32"]


def test_the_command_works_and_says_what_it_does(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--model", str(tiny_model("llama")), "--wbits", "4", "--output", str(out), *QUICK]) == 0
    text = capsys.readouterr().out
    for part in (
        *("family llama", "in 16 bit ->", "x smaller", "left as it is: norm or bias", "predicted:", "peak memory"),
        *("block 1/2", "output error", "tokens/s", "left ", "memory ", "done in", "import llmq", "from_pretrained"),
    ):
        assert part in text, part
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_the_bits_of_the_cache_are_stored_and_told(tiny_model, tmp_path, capsys):
    flags = ["--model", str(tiny_model("llama")), "--method", "rtn", *QUICK]
    assert main([*flags, "--kv-bits", "k8v4", "--output", str(tmp_path / "a")]) == 0
    assert "cached in k8v4 (bits of keys and values) by default" in capsys.readouterr().out
    assert main([*flags, "--kv-bits", "16", "--output", str(tmp_path / "b")]) == 0
    assert "cached in" not in capsys.readouterr().out
    blocks, reports, cards = [], [], []
    for name in "ab":
        blocks.append(json.loads((tmp_path / name / "config.json").read_text())["quantization_config"])
        reports.append(json.loads((tmp_path / name / "llmq_report.json").read_text())["options"])
        cards.append((tmp_path / name / "README.md").read_text())
    assert blocks[0] == blocks[1] | {"kv_bits": "k8v4"}
    assert [report["kv_bits"] for report in reports] == ["k8v4", "16"]
    assert ["caches keys and values in k8v4" in card for card in cards] == [True, False]


def test_synonyms_of_the_field():
    parse = build_parser().parse_args
    a = parse(
        ["--model", "m", "--bits", "3", "--groupsize", "64", "--desc_act", "--damp_percent", "0.05", "--dataset", "x"]
    )
    assert (a.bits, a.group_size, a.act_order, a.percdamp, a.calib) == (3, 64, True, 0.05, "x")
    b = parse(["--model", "m", "--wbits", "3", "--group_size", "64", "--no-act-order", "--sym"])
    assert (b.bits, b.group_size, b.act_order, b.sym) == (3, 64, False, True)
    assert parse(["--model", "m", "--asym"]).sym is False


def test_defaults_are_those_of_the_dataclasses():
    a = vars(build_parser().parse_args(["--model", "m"]))
    for options in (QuantScheme(), CalibConfig(), GPTQConfig(), AWQConfig(), RuntimeConfig()):
        for name, value in vars(options).items():
            assert a[name] == value, name


def test_help_is_grouped_and_complete():
    text = build_parser().format_help()
    for part in (
        *("what and where to", "method:", "grid of the weights", "calibration text", "GPTQ:", "AWQ:", "afterwards"),
        *("--model", "--wbits", "--method", "--group-size", "--sym", "--asym", "--act-order", "--no-act-order"),
        *("--percdamp", "--calib", "--nsamples", "--seqlen", "--seed", "--head-bits", "--output", "--overwrite"),
        *("--device", "--eval", "--kv-bits"),
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wbits", "5"], "bits is 5; known: 2, 3, 4, 8"),
        (["--group-size", "0"], "group_size is 0; known: -1, 32, 64, 128, 256"),
        (["--method", "gtpq"], "method is 'gtpq'; known: gptq, awq, awq+gptq, rtn"),
        (["--calib", "wikitext3"], "wikitext3"),
        (["--head-bits", "5"], "head_bits is 5; known: 16, 8, 4"),
        (["--device", "tpu"], "device is 'tpu'; known: cpu"),
        (["--percdamp", "0"], "percdamp is 0.0"),
        (["--kv-bits", "5"], "kv bits is 5; known: 16, 8, 4, 2"),
        (["--kv-bits", "k8"], "kv bits 'k8' are not of the form"),
        (["--seqlen", "999999", "--calib", "stdlib"], "999999"),
        (["--eval", "no-such-file.txt"], "no-such-file.txt: there is no such file"),
        (["--stats", "nowhere"], "--stats nowhere is no bank: it has no bank.json"),
        (
            ["--target-size", "1k", "--calib", "stdlib", "--seqlen", "64"],
            "--target-size 1k is 0.0 MB, and the smallest",
        ),
        (["--max-kl", "0.1", "--target-bpw", "3"], "--target-bpw and --max-kl each say"),
    ],
)
def test_bad_input_exits_with_2_before_the_work(tiny_model, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    model = str(tiny_model("llama"))
    capsys.readouterr()  # what making it has printed
    assert main(["--model", model, "--output", str(out), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "block 1/" not in captured.out
    assert not out.exists()


def test_unknown_model_and_existing_output(tiny_model, tmp_path, capsys):
    assert main(["--model", "gemma-9-1b", "--output", str(tmp_path / "out")]) == 2
    assert "gemma-9-1b" in capsys.readouterr().err
    out = tmp_path / "exists"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert main(["--model", str(tiny_model("llama")), "--output", str(out), *QUICK]) == 2
    assert "use --overwrite" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "{}"


def test_the_model_itself_is_never_replaced(tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    (tmp_path / "config.json").write_text("{}")
    for out in (model, tmp_path):
        assert main(["--model", str(model), "--output", str(out), "--overwrite", *QUICK]) == 2
        assert "is or holds the model to quantize; choose another --output" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_too_large_to_write_its_own_text_is_refused(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmq.plan.memory_bytes", lambda: 1 << 29)
    flags = ["--model", str(tiny_model("llama")), "--output", str(tmp_path / "out")]
    assert main([*flags, "--calib", "self", "--seqlen", "64"]) == 2
    assert "and this machine has 0.5; give a text file, or --calib stdlib" in capsys.readouterr().err
    assert main([*flags, *QUICK]) == 0


def _as_a_module(*flags, **environment):
    command = [sys.executable, "-m", "llmq.quantize", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_as_a_module():
    run = _as_a_module("--wbits", "4")
    assert run.returncode == 2
    assert "--model" in run.stderr


def test_wrong_isa_is_refused_before_the_work(tiny_model, tmp_path):
    out = tmp_path / "out"
    run = _as_a_module("--model", str(tiny_model("llama")), "--output", str(out), *QUICK, LLMQ_ISA="neon9")
    assert run.returncode == 2
    assert "error: LLMQ_ISA is 'neon9'" in run.stderr
    assert "scalar, reference" in run.stderr
    assert run.stdout == ""
    assert not out.exists()


def test_eval_prints_perplexity_before_and_after(tiny_model, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    flags = ["--eval", str(text), "--eval-seqlen", "32", "--eval-windows", "2", "--output", str(tmp_path / "out")]
    assert main(["--model", str(tiny_model("llama")), *QUICK, *flags]) == 0
    out = capfd.readouterr().out
    assert out.count("perplexity") >= 2
    assert "windows" in out


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"The quick brown fox. " * 90, ["--eval-seqlen", "100000"], "a window needs 99999"),
        (b"The quick brown fox. " * 2000, ["--eval-seqlen", "600"], "seqlen is 600; the model's context is 512"),
        (b"The quick brown fox. " * 90, ["--eval-seqlen", "32", "--eval-windows", "0"], "max-windows is 0"),
        (b"", ["--eval-seqlen", "32"], "the text has 0 tokens, a window needs 31"),
        (b"\xff\xfe\x00\x80", ["--eval-seqlen", "32"], "UTF-8"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_the_work(
    tiny_model, tmp_path, capsys, content, flags, message
):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(content)
    flags = ["--eval", str(text), *flags, "--output", str(out)]
    assert main(["--model", str(tiny_model("llama")), *QUICK, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not out.exists()


def wide(tmp_path):
    """A tiny llama whose sizes other tools' formats can hold."""
    from test_dialects import make_original

    return make_original(tmp_path / "wide")


RTN = ["--method", "rtn", "--wbits", "4", "--group-size", "32"]


def test_formats_of_other_tools(tmp_path, capsys):
    from llmq.dialects.source import open_source
    from llmq.report import silent

    model, out = str(wide(tmp_path)), tmp_path / "out"
    flags = ["--model", model, "--output", str(out), *RTN, "--sym", "--format", "gptq,gguf,llmq"]
    assert main(flags) == 0, capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-gptq", "out.gguf", "wide"]
    found = [
        open_source(p, inexact="refuse", log=silent).matrices
        for p in (out, tmp_path / "out-gptq", tmp_path / "out.gguf")
    ]
    for name, m in found[0].items():
        for others in found[1:]:
            assert (others[name].dequantize() == m.dequantize()).all(), name
    assert main(["--model", model, "--output", str(tmp_path / "alone"), *RTN, "--format", "awq"]) == 0
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "exl2"], "--format is 'exl2'; known: llmq, gptq"),
        (["--format", "gguf"], "add --sym"),
        (["--format", "awq", "--wbits", "3"], "cannot hold model.layers.0.self_attn.q_proj: w3g32 has 3 bits"),
    ],
)
def test_a_format_that_will_not_hold_it_is_an_error_before_the_work(tmp_path, capsys, flags, message):
    assert main(["--model", str(wide(tmp_path)), "--output", str(tmp_path / "out"), *RTN, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
