"""eval/tasks.py: lm-eval's figures on our models are those of a few lines of torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmq.evaluation import load_for_eval
from llmq.quantize import main as quantize

SCRIPT = Path(__file__).resolve().parent.parent / "eval" / "tasks.py"
ROWS = [
    {"question": "The sky is", "choices": [" blue", " a long and winding road"], "answer": 0},
    {"question": "Two and two are", "choices": [" seven", " four"], "answer": 1},
    {"question": "Fire is", "choices": [" cold", " hot", " wet"], "answer": 1},
    {"question": "A dog has", "choices": [" four legs", " six legs"], "answer": 0},
]
TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_tasks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_lm_eval(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else 1 / 0)
    assert tasks.main(["--model", "x", "--tasks", "arc_easy"]) == 2
    assert "needs lm-eval, which is not installed; pip install 'llmq[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit is 0; it must be 1 or more"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--include", "nowhere"], "--include nowhere: there is no such folder"),
        (["--tasks", ","], "--tasks names no task"),
        (["--json", "nowhere/x.json"], "nowhere does not exist"),
    ],
)
def test_bad_input(
    flags: list[str],
    message: str,
    tasks: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    assert tasks.main(["--model", "x", "--tasks", "arc_easy", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_task_of_ours_scores_as_by_hand(
    tasks: ModuleType,
    tiny_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    out, report = str(tmp_path / "w8"), tmp_path / "r.json"
    flags = ["--method", "rtn", "--wbits", "8", "--group-size", "32", "--output", out]
    assert quantize(["--model", str(tiny_model("llama")), *flags]) == 0
    common = ["--model", out, "--include", str(tmp_path / "tasks")]
    assert tasks.main([*common, "--tasks", "nonesuch_task"]) == 2
    assert "lm-eval has no task 'nonesuch_task'" in capsys.readouterr().err
    assert tasks.main([*common, "--tasks", "local_choice", "--json", str(report)]) == 0
    model, tokenizer = load_for_eval(out, log=lambda _line: None)
    hits = [best_choice(model, tokenizer, row) == row["answer"] for row in ROWS]
    found = json.loads(report.read_text())["results"]["local_choice"]
    assert found["acc,none"] == sum(hits) / len(hits)
    assert "local_choice" in capsys.readouterr().out


def best_choice(model: Any, tokenizer: Any, row: dict[str, Any]) -> int:
    """The choice whose tokens are likeliest after the question."""
    scores = []
    for choice in row["choices"]:
        whole = tokenizer(row["question"] + choice)["input_ids"]
        start = len(tokenizer(row["question"])["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole))))
    return scores.index(max(scores))
