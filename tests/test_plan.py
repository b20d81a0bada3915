"""The plan against what is then written, and what is printed about both."""

import json

import pytest
import torch

from llmq import CalibConfig, QuantScheme, quantize_model
from llmq.models.load import open_model
from llmq.plan import BASE_BYTES, kept_dtype, make_plan, table_scheme
from llmq.report import block_line, duration, plan_table, size
from llmq.solvers import METHODS

SCHEME = QuantScheme(4, 32)


@pytest.mark.parametrize("head_bits", [16, 8, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3-multimodal"])
def test_planned_bytes_are_the_bytes_written(tiny_model, tmp_path, family, head_bits):
    folder = tiny_model(family)
    plan = make_plan(open_model(folder), SCHEME, head_bits, METHODS["rtn"], 0, 1)
    out = quantize_model(folder, SCHEME, output=tmp_path / "out", method="rtn", head_bits=head_bits).folder
    index = json.loads((out / "model.safetensors.index.json").read_text())
    buffers = index["metadata"]["total_size"] - plan.bytes_after
    assert 0 <= buffers < 1000, "only persistent buffers (positions of a vision tower, say) come on top"
    assert plan.weights == open_model(folder).parameter_count


def test_bits_a_weight():
    """4 bits, an fp16 scale and a 4-bit zero per 128 weights: 4 + 20/128."""
    from llmq.plan import Matrix, Plan

    plan = Plan([Matrix("a", 256, 1024, QuantScheme(4, 128))], [], [], {})
    assert plan.bits_per_weight == 4 + 20 / 128
    plan = Plan([Matrix("a", 256, 1024, QuantScheme(4, 128, sym=True))], [], [], {})
    assert plan.bits_per_weight == 4 + 16 / 128


def test_what_stays_and_why(tiny_model):
    plan = make_plan(open_model(tiny_model("gemma3-multimodal")), SCHEME, 16, METHODS["rtn"], 0, 1)
    reasons = {k.reason for k in plan.kept}
    assert {"norm or bias", "--head-bits 16", "outside the decoder blocks"} <= reasons
    table = plan_table(plan, model="m", family="f", method="rtn", calibration="none", output="out")
    for reason in reasons:
        assert f"left as it is: {reason}" in table


def test_the_table_shows_the_bits_of_each_block_where_they_differ(tiny_model):
    source = open_model(tiny_model("llama"))
    first = f"{source.block_names[0]}.mlp.down_proj"
    arguments = (source, SCHEME, 16, METHODS["rtn"], 0, 1)
    named = {"model": "m", "family": "f", "method": "rtn", "calibration": "none", "output": "out"}
    alike = plan_table(make_plan(*arguments), **named)
    assert f"rtn, {SCHEME}" in alike
    assert "bits by block" not in alike
    table = plan_table(make_plan(*arguments, schemes={first: QuantScheme(8, 32)}), **named)
    assert f"rtn, {SCHEME.bits}, 8 bits" in table
    rest = " ".join([str(SCHEME.bits)] * (len(source.block_names) - 1))
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in table.split("bits by block")[1].splitlines()[1:8]}
    assert rows["mlp.down_proj"] == f"8 {rest}"
    assert rows["mlp.up_proj"] == f"{SCHEME.bits} {rest}"


def test_dtypes_of_what_stays():
    assert kept_dtype(torch.bfloat16, 1) == torch.float32
    assert kept_dtype(torch.float32, 2) == torch.bfloat16
    assert kept_dtype(torch.float16, 2) == torch.float16


def test_table_schemes():
    assert str(table_scheme(QuantScheme(4, 64), 8)) == "w8g64sym"
    assert str(table_scheme(QuantScheme(4, -1), 4)) == "w4g128"


def test_few_tokens_are_a_warning(tiny_model):
    source = open_model(tiny_model("llama"))
    assert make_plan(source, SCHEME, 8, METHODS["gptq"], 8, 8).warnings[0].startswith("8 calibration tokens are few")
    assert make_plan(source, SCHEME, 8, METHODS["gptq"], 1 << 20, 2048).warnings == []
    calib = CalibConfig(calib="stdlib", nsamples=1, seqlen=8)
    assert calib.nsamples * calib.seqlen == 8


@pytest.mark.parametrize("family", ["llama", "gemma3-multimodal", "gpt_neox"])
def test_sampling_the_text_is_in_the_prediction(tiny_model, monkeypatch, family):
    """16 windows at once, 2 blocks, keys and values in fp16; all weights as stored; products at the rate measured."""
    monkeypatch.setattr("llmq.plan.gemm_rate", lambda: 1e9)
    source = open_model(tiny_model(family))
    without, sampled = (
        make_plan(source, SCHEME, 8, METHODS["gptq"], 1024, 64, sampled=sampled) for sampled in (False, True)
    )
    assert sampled.seconds - without.seconds == pytest.approx(2 * 1.3 * 1024 * source.parameter_count / 1e9)
    width = {"llama": 2 * 12, "gemma3-multimodal": 2 * 24, "gpt_neox": 48}[family]
    stored = source.reader.dtype(f"{source.block_names[0]}.{source.groups[0][0]}.weight").itemsize
    assert sampled.peak_bytes >= BASE_BYTES + stored * source.parameter_count + 16 * 64 * 2 * 2 * width * 2


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("n", "text"), [(1 << 20, "1.0 MiB"), (3 << 30, "3.00 GiB")])
def test_size(n, text):
    assert size(n) == text


def test_block_line():
    line = block_line(1, 10, [0.01, 0.03], 4096, 2.0, 10.0)
    assert "block  2/10" in line
    assert "output error 2.000 %" in line
    assert "2048 tokens/s" in line
    assert "left 40 s" in line
