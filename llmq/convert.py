"""``python -m llmq.convert IN OUT --format gptq``: a quantized model in another format, the same integers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from llmq.quantize import FORMAT_NAMES


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m llmq.convert",
        description="Write a quantized model in another format. Integers stay as they are; what cannot is refused.",
        epilog="Example: python -m llmq.convert gemma-3-1b-w4g128sym gemma-3-1b-gptq --format gptq",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="folder (llmq, gptq, awq, compressed-tensors, mlx) or .gguf file")
    parser.add_argument("output", metavar="OUT", help="folder to write; for gguf a file that ends in .gguf")
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMAT_NAMES)}")
    parser.add_argument("--lossy", action="store_true", help="round what the format cannot hold, and say what")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is a model")
    parser.add_argument("--vocabulary", metavar="FILE", help="gguf only: a .gguf file whose tokenizer is copied")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert as ``args`` says; raises what ``llmq.conversion.convert`` raises."""
    from llmq.conversion import convert

    convert(
        args.source,
        args.output,
        args.format,
        lossy=args.lossy,
        overwrite=args.overwrite,
        vocabulary=args.vocabulary,
        log=lambda line: print(line, flush=True),  # noqa: T201
    )
    return 0


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns; 2 on bad input, 130 on Ctrl-C, with a line on stderr."""
    try:
        return work()
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)  # noqa: T201
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when done, 2 on bad input (nothing written), 130 on Ctrl-C."""
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
