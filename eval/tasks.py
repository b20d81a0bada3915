"""Tasks of lm-eval (hellaswag, arc_easy, gsm8k, ...) on a model that llmq opens, quantized by anyone or not.

    python eval/tasks.py --model gemma-3-270m-w4g128 --tasks arc_easy,hellaswag --limit 200
    python eval/tasks.py --model model-Q4_0.gguf --tasks mine --include my_tasks/ --json out.json

lm-eval runs the tasks and computes their metrics. It fetches their data from the hub; tasks of your own are YAML files
in --include. Its own command works on the same models where llmq is imported in the process:

    python -c "import llmq, lm_eval.__main__ as m; m.cli_evaluate()" --model hf --model_args pretrained=FOLDER ...
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.evaluation import check_output, exit_code, load_for_eval, to_stderr


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, .gguf file, alias or hub id")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names of lm-eval's tasks, comma-separated")
    parser.add_argument("--include", metavar="DIR", help="folder of more tasks, as YAML files")
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each task at most (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure to this file")
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """The names of the tasks; ImportError, ValueError or FileNotFoundError before the model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("eval/tasks.py needs lm-eval, which is not installed; pip install 'llmq[eval]'")
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be 1 or more")
    if args.include is not None and not Path(args.include).is_dir():
        raise FileNotFoundError(f"--include {args.include}: there is no such folder")
    check_output(args.json)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task; for example --tasks arc_easy,hellaswag")
    return names


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, load, let lm-eval run; print its table and return its results."""
    names = check(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # lm-eval forks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    tasks = TaskManager(include_path=args.include)
    unknown = [name for name in names if name not in tasks.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"lm-eval has no task {unknown[0]!r}; 'lm-eval ls tasks' lists its own, --include adds a folder of others"
        )
    model, tokenizer = load_for_eval(args.model, log=to_stderr)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, backend="causal"),
        tasks=names,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=tasks,
        log_samples=False,
    )
    print(make_table(results))
    if args.json is not None:
        kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples") if key in results}
        text = json.dumps({"model": args.model, **kept}, indent=2, default=str)
        args.json.write_text(text + "\n", encoding="utf-8")
    return dict(results)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when done, 2 for bad input or without lm-eval."""
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
