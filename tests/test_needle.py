"""The retrieval check: prompts as asked for, likelihoods against plain forwards, the table and the command."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from llmq import KVCacheConfig, needle
from llmq.evaluation import load_for_eval
from llmq.kv_feed import KVFeed
from llmq.needle import KEYS, Cell, Haystack, log_likelihoods, table

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def loaded(tiny_model: Tiny) -> tuple[Any, Any]:
    return load_for_eval(str(tiny_model("gemma3")), log=lambda _: None)


@pytest.fixture(scope="module")
def haystack(loaded: tuple[Any, Any]) -> Haystack:
    return Haystack(loaded[1], 400)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_holds_the_key_at_its_depth(depth: float, haystack: Haystack, loaded: tuple[Any, Any]) -> None:
    trial = haystack.trial(300, depth, seed=1)
    text = loaded[1].decode(trial.prompt[1:])
    right, *wrong = (loaded[1].decode(answer) for answer in trial.answers)
    assert trial.prompt.shape == (300,)
    assert int(trial.prompt[0]) == loaded[1].bos_token_id
    assert text.endswith("What is the pass key? The pass key is")
    assert text.count(right) == 2
    assert len({right, *wrong}) == KEYS
    assert not any(key.strip() in text for key in wrong)
    room = len(text) - len("\n\nWhat is the pass key? The pass key is")
    assert text.index("The pass key is" + right) / room == pytest.approx(depth * 0.7, abs=0.2)
    assert torch.equal(haystack.trial(300, depth, seed=1).prompt, trial.prompt)
    assert not torch.equal(haystack.trial(300, depth, seed=2).prompt, trial.prompt)


@pytest.mark.parametrize("chunk", [50, 400])
def test_likelihoods_are_those_of_plain_forwards(chunk: int, haystack: Haystack, loaded: tuple[Any, Any]) -> None:
    model, trial = loaded[0], haystack.trial(150, 0.3, seed=0)
    got = log_likelihoods(model, trial, KVFeed(KVCacheConfig(), chunk))
    for answer, found in zip(trial.answers, got, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([trial.prompt, answer])[None]).logits[0]
        logp = logits.double().log_softmax(-1)[len(trial.prompt) - 1 : -1]
        assert float(found) == pytest.approx(float(logp.gather(1, answer[:, None]).sum()), abs=1e-4)


def test_table() -> None:
    cells = [Cell(kv, n, d, 4, n // 500, 1.25) for kv in ("8", "4") for n in (500, 1000) for d in (0.0, 1.0)]
    lines = table(cells).splitlines()
    assert lines[0] == "KV cache 8"
    assert lines[1].split() == ["depth", "500", "1000"]
    assert lines[2].split() == ["0", "%", "1", "of", "4", "(+1.2)", "2", "of", "4", "(+1.2)"]
    assert lines[4].split() == ["all", "6", "of", "16"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    return importlib.import_module("needle")


def test_the_command(command: Any, tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["--model", str(tiny_model("llama")), "--contexts", "150,200", "--depths", "0,50", "--trials", "2"]
    assert command.main([*argv, "--kv-bits", "16,4", "--json", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["cells"]) == 2 * 2 * 2
    assert {c["kv"] for c in found["cells"]} == {"16", "4"}
    assert all(0 <= c["right"] <= c["trials"] == 2 for c in found["cells"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "KV cache 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--contexts", "1,x"], "no list of whole numbers"),
        (["--contexts", "100"], "at least 128 tokens"),
        (["--contexts", "600"], "exceed the model's context of 512"),
        (["--depths", "120"], "depth of 0 to 1"),
        (["--trials", "0"], "ask at least once"),
        (["--kv-bits", "16,3"], "known: 16, 8, 4, 2"),
    ],
)
def test_bad_input(
    options: list[str], said: str, command: Any, tiny_model: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--model", str(tiny_model("llama")), "--contexts", "150", *options]) == 2
    assert said in capsys.readouterr().err


def test_too_little_filler(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle.stdlib_text, "texts", lambda: iter(["a few words"]))
    with pytest.raises(ValueError, match=r"filler text has \d+ tokens, a context needs 400"):
        Haystack(loaded[1], 400)
