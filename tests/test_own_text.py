"""The model's own text as calibration text: what writes it, and that one seed gives one text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmq
from llmq import CalibConfig, QuantScheme, quantize_model
from llmq.calibration.windows import digest
from llmq.models.families import FAMILIES
from llmq.models.load import open_model
from llmq.own_text import WRITER, own_text, writer_of
from llmq.runtime.causal_lm import decoder_of
from llmq.runtime.qlinear import QuantizedMatrix

Tiny = Callable[..., Path]
FAMILY_NAMES = [*(f.name for f in FAMILIES if f.native), "gpt_neox"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_the_writer_is_the_checkpoint_of_eight_bits(tiny_model: Tiny, tmp_path: Path, family: str) -> None:
    folder = tiny_model(family)
    quantize_model(folder, WRITER, method="rtn", head_bits=8, output=tmp_path / "out")
    written, writer = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), writer_of(open_model(folder))
    matrices = {name: m for name, m in writer.named_modules() if isinstance(m, QuantizedMatrix)}
    assert len(matrices) > 7
    for name, m in matrices.items():
        assert m.qtensor().digest() == written.get_submodule(name).qtensor().digest()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(writer(input_ids=ids).logits, written(input_ids=ids).logits)
    assert (decoder_of(writer) is None) == (decoder_of(written) is None) == (family == "gpt_neox")


def test_one_seed_writes_one_text_and_nothing_is_said_of_loops(
    tiny_model: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    source, lines = open_model(tiny_model("gemma3")), list[str]()
    with caplog.at_level(logging.WARNING, logger="llmq"):
        first, again, other = (own_text(source, 5, 24, seed, lines.append) for seed in (3, 3, 4))
    assert first.shape == (5, 24)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[:, 0] == source.tokenizer.bos_token_id).all()
    assert "sampled 120 of 120 tokens" in lines[-1]
    assert caplog.messages == []


def test_a_run_calibrates_on_it(tiny_model: Tiny, tmp_path: Path) -> None:
    """The hash of the text in the report is that of the text written with the run's seed."""
    folder, calib = tiny_model("qwen3"), CalibConfig("self", nsamples=4, seqlen=32, seed=2)
    report = quantize_model(folder, QuantScheme(4, 32), calib=calib, output=tmp_path / "out").report
    tokens = own_text(open_model(folder), 4, 32, 2, lambda _line: None)
    assert report["calibration"]["sha256"] == digest(tokens)
