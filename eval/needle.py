"""Retrieval from a long context with a quantized KV cache: is a hidden pass key found, by depth and context length?

    python eval/needle.py --model gemma-3-270m --kv-bits 16,8,4 --contexts 512,2048 --json out.json --plot out.png

Scored by likelihood against wrong keys: a model that guesses is right once in eight. Needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llmq import kv_feed
from llmq.evaluation import check_output, check_plot, exit_code, find, to_stderr
from llmq.needle import KEYS, Cell, Haystack, measure, table


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas. Raises ValueError naming the text."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no list of whole numbers such as 512,2048") from None


def plot(cells: list[Cell], path: Path) -> None:
    """Share of right answers by depth and context, one map a cache, as one PNG."""
    from matplotlib.figure import Figure

    caches = list(dict.fromkeys(c.kv for c in cells))
    contexts, depths = list(dict.fromkeys(c.context for c in cells)), list(dict.fromkeys(c.depth for c in cells))
    figure = Figure(figsize=(3 + 3 * len(caches), 4), layout="constrained")
    for axes, kv in zip(figure.subplots(1, len(caches), squeeze=False)[0], caches, strict=True):
        share = {(c.depth, c.context): c.right / c.trials for c in cells if c.kv == kv}
        image = axes.imshow([[share[d, n] for n in contexts] for d in depths], vmin=0, vmax=1, aspect="auto")
        axes.set(title=f"KV cache {kv}", xlabel="context, tokens", ylabel="depth of the key, %")
        axes.set_xticks(range(len(contexts)), [str(n) for n in contexts])
        axes.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths])
    figure.colorbar(image, label=f"share of right answers (guessing: {1 / KEYS:.3f})")
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> None:
    """Check, load, measure; print the table and write the files."""
    check_output(args.json)
    check_plot(args.plot)
    if kv_feed.chooses(args):
        raise ValueError("--kv-budget and auto are not known here; give the bits (--kv-bits 16,8,4)")
    feeds = [kv_feed.parse(text, args) for text in (args.kv_bits or "16,8,4").split(",")]
    contexts, depths = numbers(args.contexts), [d / 100 for d in numbers(args.depths)]
    if args.trials < 1:
        raise ValueError(f"trials is {args.trials}; ask at least once")
    subject = find(args.model, log=to_stderr)
    limit = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(contexts) + KEYS > limit:
        raise ValueError(f"context {max(contexts)} and an answer exceed the model's context of {limit}: ask for less")
    haystack = Haystack(subject.tokenizer, max(contexts))
    for context, depth in ((c, d) for c in contexts for d in depths):
        haystack.trial(context, depth, 0)
    model = subject.load()
    cells = measure(model, haystack, feeds, contexts, depths, args.trials, log=to_stderr)
    print(f"{KEYS} keys, {args.trials} trials a cell, mean margin of the right key in nats; {feeds[0].describe(model)}")
    print(table(cells))
    if args.json:
        about = {"model": args.model, "keys": KEYS, "caches": [f.describe(model) for f in feeds]}
        content = {**about, "cells": [dataclasses.asdict(c) for c in cells]}
        args.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if args.plot:
        plot(cells, args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, .gguf file, alias or hub id")
    parser.add_argument("--contexts", default="512,1024,2048", help="tokens, separated by commas (512,1024,2048)")
    parser.add_argument("--depths", default="0,25,50,75,100", help="per cent, separated by commas (0,25,50,75,100)")
    parser.add_argument("--trials", type=int, default=4, help="questions a cell (default 4)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the share of right answers")
    kv_feed.add_options(parser)
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
