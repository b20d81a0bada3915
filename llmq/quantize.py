"""``python -m llmq.quantize --model gemma-3-1b --wbits 4``: the main job as a command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.config import (
    AWQConfig,
    BudgetConfig,
    CalibConfig,
    GPTQConfig,
    QuantScheme,
    RecipeConfig,
    RuntimeConfig,
    StatsConfig,
    one_of,
)

FORMAT_NAMES = ("llmq", "gptq", "awq", "compressed-tensors", "mlx", "gguf")
# Flags of a field where they are not simply --field-name; the first is the one that help shows.
FLAGS: dict[str, tuple[str, ...]] = {
    "bits": ("--wbits", "--bits", "--w-bits", "--w_bits"),
    "group_size": ("--group-size", "--groupsize", "--group_size"),
    "act_order": ("--act-order", "--act_order", "--desc-act", "--desc_act"),
    "percdamp": ("--percdamp", "--damp-percent", "--damp_percent"),
    "calib": ("--calib", "--dataset"),
    "true_sequential": ("--true-sequential", "--true_sequential"),
    "clip": ("--awq-clip",),
    "n_grid": ("--awq-grid",),
    "only": ("--steps",),
    "target_bpw": ("--target-bpw", "--target_bpw"),
    "kv_bits": ("--kv-bits", "--kv_bits"),
    "kv_budget": ("--kv-budget", "--kv_budget"),
    "kv_context": ("--kv-context", "--kv_context"),
    "target_size": ("--target-size", "--target_size"),
    "max_kl": ("--max-kl", "--max_kl"),
    "save_stats": ("--save-stats", "--save_stats"),
}
GROUPS: tuple[tuple[str, type], ...] = (
    ("grid of the weights", QuantScheme),
    ("calibration text", CalibConfig),
    ("GPTQ", GPTQConfig),
    ("recipe around GPTQ", RecipeConfig),
    ("bits by module", BudgetConfig),
    ("statistics bank", StatsConfig),
    ("AWQ", AWQConfig),
    ("when it runs", RuntimeConfig),
)


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; options that belong to a dataclass are read from its fields."""
    parser = argparse.ArgumentParser(
        prog="python -m llmq.quantize",
        description="Quantize a causal language model; the folder written opens in transformers after 'import llmq'.",
        epilog="Example: python -m llmq.quantize --model gemma-3-1b --wbits 4",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what and where to")
    what.add_argument("--model", required=True, help="local folder, .gguf file, alias (gemma-3-1b, ...) or hub id")
    what.add_argument("--output", help="folder to write (default: <model>-<scheme> in the current folder)")
    what.add_argument(
        "--format",
        default="llmq",
        help=f"formats to write, comma-separated: {', '.join(FORMAT_NAMES)} (default: llmq). Of several"
        " each but llmq gets its name added to the output's; gguf is one file. gguf needs --sym",
    )
    what.add_argument("--overwrite", action="store_true", help="replace the output folder if it is a model folder")
    what.add_argument("--device", default="cpu", help="where to compute; known: cpu (default: cpu)")
    how = parser.add_argument_group("method")
    how.add_argument("--method", default="gptq", help="gptq, awq, awq+gptq or rtn (default: gptq)")
    how.add_argument(
        "--head-bits",
        "--head_bits",
        type=int,
        help="embedding and head: 16, 8 or 4 (default: 8; 16 for formats that have no quantized embedding)",
    )
    for title, options in GROUPS:
        add_fields(parser.add_argument_group(title), options)
    after = parser.add_argument_group("afterwards")
    after.add_argument("--eval", metavar="FILE", help="text on which perplexity is measured before and after")
    after.add_argument("--eval-seqlen", type=int, default=2048, help="tokens a window of that text (default: 2048)")
    after.add_argument("--eval-windows", type=int, help="windows of that text at most (default: all)")
    return parser


def add_fields(group: Any, options: type) -> None:
    """Add a flag to ``group`` for every field of the dataclass ``options``."""
    for f in dataclasses.fields(options):
        flags = FLAGS.get(f.name, ("--" + f.name.replace("_", "-"),))
        default, text = f.default, f"{f.metadata['help']} (default: {f.default})"
        if f.name == "sym":
            either = group.add_mutually_exclusive_group()
            either.add_argument("--sym", action="store_true", default=default, help=f.metadata["help"])
            either.add_argument(
                "--asym", dest="sym", action="store_false", default=default, help="grid with a zero point (default)"
            )
        elif isinstance(default, bool):
            text = f"{f.metadata['help']} (default: {'yes' if default else 'no'})"
            group.add_argument(*flags, dest=f.name, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            choices = f.metadata.get("choices")
            known = f"; known: {', '.join(map(str, choices))}" if choices else ""
            text = text.replace("%", "%%")[:-1] + known + ")"
            group.add_argument(
                *flags, dest=f.name, type=type(default), default=default, metavar=f.name.upper(), help=text
            )


def options_of(args: argparse.Namespace, options: type) -> Any:
    """The dataclass ``options`` with the values of its flags."""
    return options(**{f.name: getattr(args, f.name) for f in dataclasses.fields(options)})


def run(args: argparse.Namespace) -> int:
    """Quantize as ``args`` says, then evaluate if asked; the exit code.

    Raises what ``llmq.quantize_model`` raises, and ValueError for an evaluation that could not be made afterwards.
    """
    scheme, calib = options_of(args, QuantScheme), options_of(args, CalibConfig)
    gptq, awq = options_of(args, GPTQConfig), options_of(args, AWQConfig)
    if args.eval is not None and not Path(args.eval).is_file():
        raise FileNotFoundError(f"--eval {args.eval}: there is no such file")
    formats = [name.strip() for name in args.format.split(",")]
    for name in formats:
        one_of("--format", name, FORMAT_NAMES)
    # Only now: the imports take seconds, a typing error should not.
    from llmq import evaluation
    from llmq.exports import check_exports, quantize_to

    if args.eval is not None:
        parser = evaluation.build_parser(None, require_reference=False)
        evaluation.prepare(parser.parse_args(["--model", args.model, *_eval_flags(args)]))
    budget = options_of(args, BudgetConfig)
    if formats != ["llmq"]:
        check_exports(args.model, scheme, formats, by_module=bool(budget.flag))
    folder = quantize_to(
        formats,
        args.model,
        scheme,
        output=args.output,
        method=args.method,
        calib=calib,
        gptq=gptq,
        awq=awq,
        recipe=options_of(args, RecipeConfig),
        budget=budget,
        stats=options_of(args, StatsConfig),
        runtime=options_of(args, RuntimeConfig),
        head_bits=args.head_bits,
        overwrite=args.overwrite,
        device=args.device,
        log=lambda line: print(line, flush=True),  # noqa: T201
    )
    if args.eval is None:
        return 0
    flags = ["--model", str(folder), "--reference", args.model, *_eval_flags(args)]
    return evaluation.main(flags, require_reference=True)


def _eval_flags(args: argparse.Namespace) -> list[str]:
    """What eval/perplexity.py would be asked for, but for the models."""
    flags = ["--dataset", args.eval, "--seqlen", str(args.eval_seqlen)]
    return [*flags, "--max-windows", str(args.eval_windows)] if args.eval_windows is not None else flags


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when done, 2 on bad input (nothing written), 130 on Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)  # noqa: T201
        return 130


if __name__ == "__main__":
    sys.exit(main())
