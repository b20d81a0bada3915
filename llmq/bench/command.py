"""The command ``eval/bench.py``: options, checks, the rounds, the record."""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmq.bench import lookup, machine, report
from llmq.bench.drivers import EngineFailed, Plan, measure
from llmq.bench.engines import DEFAULT, ENGINES, Engine, Program, Source, file_name, made, select
from llmq.bench.peer_files import ToolFailed
from llmq.bench.roofline import Footprint, Work, footprint
from llmq.config import cache_folder
from llmq.evaluation import check_output, check_plot, exit_code, to_stderr
from llmq.models.load import open_model
from llmq.models.resolve import resolve
from llmq.records import Record, read_record, write_record

# What a record holds.
FIELDS = ("machine", "model", "engines", "runs", "keys")


@dataclass(frozen=True)
class Sweep:
    """A growth curve: what is measured, and with how many threads."""

    plan: Plan
    every_thread_count: bool = False


# A curve's points; --prefill, --context and --batch replace them.
SWEEPS: dict[str, Sweep] = {
    "threads": Sweep(Plan(prefill=(512,), depths=(0,)), every_thread_count=True),
    "context": Sweep(Plan(prefill=(), depths=(0, 512, 1024, 2048, 4096, 8192))),
    "batch": Sweep(Plan(prefill=(), depths=(), batches=(1, 2, 4, 8, 16))),
}


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--model", help="unquantized: folder, .gguf file, alias or hub id; every engine's files come of it"
    )
    what.add_argument("--engines", default=",".join(DEFAULT), metavar="A,B", help=f"of {', '.join(ENGINES)}; or all")
    what.add_argument(
        "--llama-bench", default="", metavar="PATH,...", help="llama-bench programs: [NAME=]PATH [OPTION]"
    )
    what.add_argument("--baseline", metavar="ENGINE", help="for the ratios (default: the first one of llama.cpp)")
    what.add_argument("--prefill", type=_numbers, metavar="N,...", help="prompt lengths (default 128,512,2048)")
    what.add_argument("--context", type=_numbers, metavar="N,...", help="context before decoding (default 0,512,4096)")
    what.add_argument("--batch", type=_numbers, metavar="N,...", help="sequences decoded at once (default: none)")
    what.add_argument("--new-tokens", type=int, default=Plan.new_tokens, help="tokens timed in decoding (default 64)")
    what.add_argument("--sweep", choices=SWEEPS, help="a growth curve instead of the comparison")
    what.add_argument(
        "--prompt-lookup", type=int, nargs="?", const=6, metavar="N", help="only its gain; N guesses a step (default 6)"
    )
    what.add_argument("--text", type=Path, metavar="FILE", help="for --prompt-lookup (default: Python's documentation)")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, default=machine.usable_cpus(), help="of every engine (default: all CPUs)")
    how.add_argument("--rounds", type=int, default=3, help="turns through all engines (default 3)")
    how.add_argument("--repeats", type=int, default=1, help="of a measurement in one process (default 1)")
    how.add_argument("--cache", type=Path, metavar="DIR", help="for the engines' files (default: in llmq's cache)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="OUT", help="write the record; kept up to date after each run")
    out.add_argument("--plot", type=Path, metavar="OUT.png", help="draw it (needs matplotlib: llmq[plot])")
    out.add_argument("--read", type=Path, metavar="JSON", help="measure nothing: table and plot of a record")
    out.add_argument("--list", action="store_true", help="the engines, and what is missing for each; then end")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 128,512") from None
    if any(value < 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative number")
    return values


def check_counts(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that measure nothing."""
    for name in ("threads", "rounds", "repeats", "new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.threads > 1024:
        raise ValueError(f"--threads is {args.threads}; at most 1024")


def plan_of(args: argparse.Namespace) -> Plan:
    """What is measured. Raises ValueError for numbers that measure nothing."""
    check_counts(args)
    plan = SWEEPS[args.sweep].plan if args.sweep else Plan()
    given = {"prefill": args.prefill, "depths": args.context, "batches": args.batch}
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    if not plan.measurements():
        raise ValueError("nothing is to be measured: --prefill, --context and --batch are all empty")
    if 0 in (*plan.prefill, *plan.batches):
        raise ValueError("--prefill and --batch take numbers from 1; only --context may be 0")
    return replace(plan, new_tokens=args.new_tokens, repeats=args.repeats)


def programs_of(text: str) -> tuple[Program, ...]:
    """The programs of ``--llama-bench``, separated by commas."""
    return tuple(Program.parse(part) for part in text.split(",")) if text else ()


def present(args: argparse.Namespace, programs: tuple[Program, ...]) -> tuple[dict[str, Engine], dict[str, str]]:
    """(engines that can run, name -> reason of those that cannot). ValueError if one that was named cannot."""
    names = list(ENGINES) if args.engines == "all" else [name.strip() for name in args.engines.split(",")]
    chosen = select(names, programs)
    missing = {name: why for name, row in chosen.items() if (why := row.missing())}
    if missing and args.engines not in ("all", ",".join(DEFAULT)):
        name, why = next(iter(missing.items()))
        raise ValueError(f"--engines names {name}, which cannot run here: {why}")
    return {name: row for name, row in chosen.items() if name not in missing}, missing


def baseline_of(asked: str | None, engines: dict[str, Engine]) -> str:
    """The engine that ratios refer to."""
    if asked is not None:
        if asked not in engines:
            raise ValueError(f"--baseline is {asked!r}; the engines that run are {', '.join(engines)}")
        return asked
    peers = [name for name, row in engines.items() if row.driver.startswith("llama")]
    return (peers or list(engines))[0]


def prepare(args: argparse.Namespace) -> tuple[Record, dict[str, Engine], Source, Plan]:
    """Every check that needs no long work, and the empty record."""
    plan, programs = plan_of(args), programs_of(args.llama_bench)
    check_output(args.json)
    check_plot(args.plot)
    if not args.model:
        raise ValueError("--model is missing: the unquantized model that is measured (or --read a record)")
    engines, missing = present(args, programs)
    baseline = baseline_of(args.baseline, engines)
    folder = resolve(args.model, log=to_stderr).folder
    opened = open_model(folder)  # refuses a quantized one
    if plan.positions() > opened.max_positions:
        raise ValueError(
            f"{plan.positions()} tokens of context would be measured; the model's context is {opened.max_positions}:"
            " use a smaller --context, --prefill or --new-tokens"
        )
    sweep = SWEEPS.get(args.sweep)
    threads = list(range(1, args.threads + 1)) if sweep and sweep.every_thread_count else [args.threads]
    record: Record = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "model": {"spec": args.model, "type": opened.model_type, "work": Work.of(folder).to_json()},
        "plan": asdict(plan),
        "keys": plan.measurements(),
        "sweep": args.sweep,
        "threads": threads,
        "rounds": args.rounds,
        "baseline": baseline,
        "roofs": {},
        "engines": {},
        "runs": [],
        "missing": missing,
        "failed": {},
    }
    cache = args.cache or cache_folder() / "bench"
    return record, engines, Source(folder, cache, programs, args.threads), plan


def files_of(record: Record, engines: dict[str, Engine], source: Source) -> dict[str, Path]:
    """Make each engine's file, and note what it reads for a token; if its tool fails, note that."""
    work = Work.from_json(record["model"]["work"])
    paths: dict[str, Path] = {}
    for name, row in engines.items():
        path = source.folder
        if row.make is not None:
            file = file_name(name, row.kv, source.programs).removeprefix("llama.cpp-") + (row.suffix or "")
            try:
                path = made(source, file, row.make, to_stderr)
            except ToolFailed as error:
                record["failed"][name] = str(error)
                to_stderr(f"{name} failed: {error}")
                continue
        paths[name] = path
        foot: Footprint = footprint(path, work, stored_bits=row.stored_bits)
        record["engines"][name] = {
            "about": row.about, "footprint": asdict(foot), "kv": row.kv, "version": "", "notes": []
        }  # fmt: skip
    return paths


def run_rounds(
    record: Record, engines: dict[str, Engine], paths: dict[str, Path], plan: Plan, save: Callable[[], None]
) -> None:
    """All engines in turns, ``rounds`` times, every other round backwards; ``save`` is called after each run.

    An engine that fails is taken out and named in the record.
    """
    streams: dict[int, list[float]] = {threads: [] for threads in record["threads"]}
    for turn in range(record["rounds"]):
        for threads in record["threads"]:
            streams[threads].append(machine.stream_read(threads))
            peak = machine.int8_peak(threads)
            roofs = record["roofs"].setdefault(str(threads), {"int8": None, "instruction": peak.instruction})
            roofs["stream"] = _number(statistics.median(streams[threads]))
            roofs["int8"] = max(filter(None, (roofs["int8"], _number(peak.operations))), default=None)
            for name in list(engines) if turn % 2 == 0 else list(reversed(engines)):
                if name not in record["failed"]:
                    _run_one(record, name, engines[name], paths[name], plan, turn, threads)
                    save()


def _number(value: float) -> float | None:
    """``value``, or None for NaN, which JSON does not have."""
    return value if value == value else None


def _run_one(record: Record, name: str, engine: Engine, path: Path, plan: Plan, turn: int, threads: int) -> None:
    before = machine.CpuTimes.now()
    try:
        result = measure(engine, path, plan, threads)
    except EngineFailed as error:
        record["failed"][name] = str(error)
        to_stderr(f"{name} failed: {error}")
        return
    run = result.to_json()
    disturbance = machine.disturbance(before, machine.CpuTimes.now(), result.cpu_seconds)
    record["engines"][name] |= {"version": run.pop("version"), "notes": run.pop("notes")}
    record["runs"].append({"engine": name, "round": turn, "threads": threads, "disturbance": disturbance, **run})
    shown = "  ".join(f"{key}: {statistics.median(values):.4g}" for key, values in result.speeds.items())
    to_stderr(f"round {turn + 1}, {threads} threads, {name}: {shown}")


def list_engines(programs: tuple[Program, ...]) -> str:
    """Each row and what is missing for it."""
    lines = [f"{name:<20} {row.about}" + (f" — absent: {why}" if (why := row.missing()) else "")
             for name, row in select(list(ENGINES), programs).items()]  # fmt: skip
    return "\n".join(lines)


def run(args: argparse.Namespace) -> Record | None:
    """Do what the command line says; returns the record, or None for ``--list``."""
    if args.list:
        print(list_engines(programs_of(args.llama_bench)))
        return None
    if args.read:
        check_plot(args.plot)
        record = read_record(args.read, FIELDS)
    else:
        record, engines, source, plan = prepare(args)
        paths = files_of(record, engines, source)

        def save() -> None:
            if args.json:
                write_record(args.json, record)

        run_rounds(record, engines, paths, plan, save)
        save()
    for name in record["failed"]:  # nothing of it is shown as if it were a result
        if not any(r["engine"] == name for r in record["runs"]):
            record["engines"].pop(name, None)
    print(report.table(record))
    if args.plot:
        report.plot(record, args.plot)
    return record


def main(argv: Sequence[str] | None = None, *, description: str | None = None) -> int:
    """The command. Exit code 0; 1 if an engine failed or prompt lookup changed the text; 2 for bad input."""
    args = build_parser(description).parse_args(argv)
    records: list[Record | None] = []
    if args.prompt_lookup is not None:
        same: list[bool] = []

        def measure_lookup() -> None:
            check_counts(args)
            same.append(lookup.run(args))

        return exit_code(measure_lookup) or int(not all(same))
    code = exit_code(lambda: records.append(run(args)))
    return code or int(any(record is not None and bool(record["failed"]) for record in records))
