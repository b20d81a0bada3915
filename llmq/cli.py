"""The command ``llmq``: ``llmq quantize ...`` is ``python -m llmq.quantize ...``, and so on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    "quantize": "quantize a language model",
    "convert": "write a quantized model in another format, its integers untouched",
    "diff": "compare two models, of any format",
}


def usage() -> str:
    """What there is, a line each."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: llmq COMMAND ...", "", *lines, "", "llmq COMMAND --help tells more; llmq --version"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: what the command gives; 2 for one that there is not."""
    given = list(sys.argv[1:] if argv is None else argv)
    name, rest = (given[0], given[1:]) if given else ("", [])
    if name in ("-h", "--help"):
        print(usage())  # noqa: T201
        return 0
    if name == "--version":
        print(f"llmq {version('llmq')}")  # noqa: T201
        return 0
    if name not in COMMANDS:
        problem = f"no command {name!r}" if name else "no command was given"
        print(f"error: {problem}; known: {', '.join(COMMANDS)}\n\n{usage()}", file=sys.stderr)  # noqa: T201
        return 2
    # Only now: the imports take seconds.
    return int(importlib.import_module(f"llmq.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
