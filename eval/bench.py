"""Speed of llmq beside llama.cpp and torch on one machine in one run: prefill, decode, load time, memory, rooflines.

    python eval/bench.py --model gemma-3-270m --llama-bench /path/to/llama-bench --json out.json --plot out.png
    python eval/bench.py --model gemma-3-270m --sweep context --llama-bench /path/to/llama-bench --plot context.png

Each engine's files are made of the same checkpoint, once. Engines run in turns, each in a process of its own, with the
same number of threads, every other round in reverse order. Several forks of llama.cpp can take part:
--llama-bench "/a/llama-bench,ik=/b/llama-bench -rtr 1". Exit code 1 if an engine failed, 2 for bad input.
"""

from __future__ import annotations

import sys

from llmq.bench.command import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
