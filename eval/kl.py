"""How far a model's next-token distributions are from a reference's: KL divergence, top-1 agreement, the worst windows.

    python eval/kl.py --model quantized/ --reference gemma-3-270m --dataset wikitext2 --plot kl.png

KL on the same tokens tells two quantizations apart where their perplexities do not: it has no noise of the text in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmq.evaluation import build_parser, check_plot, exit_code, run
from llmq.score import Score

WORST = 5


def worst_windows(result: Score, count: int = WORST) -> str:
    """The windows of largest KL, one a line, largest first."""
    assert result.token_kl is not None
    assert result.token_agree is not None
    kl, agree = result.token_kl.mean(dim=1), result.token_agree.mean(dim=1)
    order = kl.argsort(descending=True).tolist()[:count]
    lines = [f"  window {i:<5} KL {float(kl[i]):.5f}   top-1 {100 * float(agree[i]):.2f} %" for i in order]
    return "\n".join(["worst windows", *lines])


def plot(result: Score, path: Path) -> None:
    """KL by position in the window (mean and 90 % of the windows below) and by window, as one PNG."""
    from matplotlib.figure import Figure

    assert result.token_kl is not None
    kl = result.token_kl
    # One point for about 1 % of the positions: single tokens are too noisy to read.
    width = max(1, kl.shape[1] // 100)
    bins = kl[:, : kl.shape[1] // width * width].unflatten(1, (-1, width)).mean(dim=2)
    at = [width * i + width / 2 for i in range(bins.shape[1])]
    figure = Figure(figsize=(9, 6), layout="constrained")
    by_position, by_window = figure.subplots(2, 1)
    by_position.plot(at, bins.mean(dim=0).tolist(), label="mean")
    by_position.plot(at, bins.quantile(0.9, dim=0).tolist(), linewidth=0.8, label="90 % of the windows are below")
    by_position.set(xlabel="position in the window, tokens", ylabel="KL, nats a token", ylim=(0, None))
    by_position.legend()
    by_window.bar(range(len(kl)), kl.mean(dim=1).tolist())
    by_window.set(xlabel="window", ylabel="KL, nats a token", ylim=(0, None))
    figure.savefig(path, dpi=120)


def _report(args: argparse.Namespace) -> None:
    check_plot(args.plot)
    result = run(args)
    print(worst_windows(result))
    if args.plot:
        plot(result, args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    parser = build_parser(__doc__, require_reference=True)
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw KL by position and window")
    args = parser.parse_args(argv)
    return exit_code(lambda: _report(args))


if __name__ == "__main__":
    sys.exit(main())
