"""eval/tasks.py: lm-eval's figures on our models are those of a few lines of torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
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


@pytest.fixture(scope="module")
def prepared(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized model, ``w8``, and a task over rows of our own, in ``tasks``."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    flags = ["--method", "rtn", "--wbits", "8", "--group-size", "32", "--output", str(folder / "w8")]
    assert quantize(["--model", str(tiny_model("llama")), *flags]) == 0
    return folder


def by_hand(model: Path) -> float:
    """Share of the questions that the model answers rightly."""
    opened, tokenizer = load_for_eval(str(model), log=lambda _line: None)
    hits = [best_choice(opened, tokenizer, row) == row["answer"] for row in ROWS]
    return sum(hits) / len(hits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_task_of_ours_scores_as_by_hand(
    tasks: ModuleType,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    report = tmp_path / "r.json"
    common = ["--model", str(prepared / "w8"), "--include", str(prepared / "tasks")]
    assert tasks.main([*common, "--tasks", "nonesuch_task"]) == 2
    assert "lm-eval has no task 'nonesuch_task'" in capsys.readouterr().err
    assert tasks.main([*common, "--tasks", "local_choice", "--json", str(report)]) == 0
    found = json.loads(report.read_text())["results"]["local_choice"]
    assert found["acc,none"] == by_hand(prepared / "w8")
    assert "local_choice" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_of_lm_eval_as_the_readme_has_it(prepared: Path, tmp_path: Path) -> None:
    """It does not know llmq's folders by itself, and says so rather than scoring random weights."""
    readme = (SCRIPT.parent.parent / "README.md").read_text()
    line = next(line for line in readme.splitlines() if "cli_evaluate" in line)
    _python, _c, code, *flags = shlex.split(line)
    flags = [{"pretrained=FOLDER": f"pretrained={prepared / 'w8'}", "A,B": "local_choice"}.get(f, f) for f in flags]
    flags += ["--include_path", str(prepared / "tasks"), "--output_path", str(tmp_path / "out")]
    root = str(SCRIPT.parent.parent)
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    done, alone = (
        subprocess.run([sys.executable, *start, *flags], env=env, cwd=tmp_path, capture_output=True, text=True)
        for start in (("-c", code), ("-m", "lm_eval"))
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert report["results"]["local_choice"]["acc,none"] == by_hand(prepared / "w8")
    assert alone.returncode != 0
    assert "Unknown quantization type, got llmq" in alone.stderr


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
