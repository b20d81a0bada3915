"""``python -m llmq.diff A B``: what lies between two models: weights, integers, a text, sizes, speed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llmq.convert import exit_code


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m llmq.diff",
        description="Compare model B with model A, the reference: error of each matrix, equal codes, KL and top-1 on a"
        " text, sizes, speed. Either may be quantized in any format that llmq reads, or not at all.",
        epilog="Example: python -m llmq.diff gemma-3-1b gemma-3-1b-w4g128 --text book.txt",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", help="folder, .gguf file, alias or hub id")
    parser.add_argument("b", metavar="B", help="the same; of the same architecture")
    parser.add_argument("--text", metavar="FILE", help="text on which both are run (default: none)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window of the text (default: 512)")
    parser.add_argument("--windows", type=int, help="windows of the text at most (default: all)")
    parser.add_argument("--speed", action="store_true", help="decode a few tokens with both, in turns: tokens a second")
    parser.add_argument("--each", action="store_true", help="a line for each matrix instead of each kind")
    parser.add_argument("--json", metavar="FILE", help="write every figure to FILE")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare as ``args`` says; raises what :func:`llmq.difference.difference` raises."""
    if args.text is not None and not Path(args.text).is_file():
        raise FileNotFoundError(f"--text {args.text}: there is no such file")
    from llmq.difference import difference
    from llmq.evaluation import EvalProtocol

    text = None if args.text is None else Path(args.text).read_text(encoding="utf-8")
    found = difference(
        args.a,
        args.b,
        text=text,
        protocol=EvalProtocol(seqlen=args.seqlen, max_windows=args.windows),
        speed=args.speed,
        log=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    print(found.table(each=args.each))  # noqa: T201
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when done, 2 on bad input, 130 on Ctrl-C."""
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
