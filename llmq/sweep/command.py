"""The command ``eval/sweep.py``: options, checks, rows made and scored one batch after the other, the record."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from llmq import calibration
from llmq.config import CalibConfig, GPTQConfig, one_of
from llmq.evaluation import (
    BOS_MODES,
    EvalProtocol,
    Subject,
    check_fits,
    check_output,
    check_plot,
    exit_code,
    find,
    resolve_bos,
    to_stderr,
    windows,
)
from llmq.kernels.reference import ACTIVATION_BITS
from llmq.models.digest import model_digest
from llmq.models.load import SourceModel, open_model
from llmq.quantize import add_fields, options_of
from llmq.records import Record, read_record, write_record
from llmq.report import versions
from llmq.solvers import METHODS
from llmq.sweep import report
from llmq.sweep.making import Shared, make_row
from llmq.sweep.peers import MAKERS, parse_pythons
from llmq.sweep.rows import Row, ablation, parse_grid, presets
from llmq.sweep.scoring import Candidate, score_candidates
from llmq.sweep.stored_bits import of_checkpoint

# What must be the same for rows to stand in one table.
IDENTITY = ("model_digest", "text_sha256", "protocol", "activation_bits", "calibration", "gptq", "head_bits")
FIELDS = ("model", "rows", "reference", *IDENTITY)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("rows")
    what.add_argument("--model", help="unquantized: folder, .gguf file, alias or hub id; also the reference")
    known = ", ".join(MAKERS)
    what.add_argument("--grid", default="", help=f"as 'gptq:w4g128,w3g128,3.25bpw rtn:w4g128'; peers: {known}")
    what.add_argument("--presets", default="balanced", metavar="A,B", help="rows of gptq once with each (balanced)")
    what.add_argument("--ablation", action="store_true", help="instead of presets: gptq alone, then step after step")
    what.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a checkpoint of others: folder "
                      "or .gguf file; may be repeated")  # fmt: skip
    what.add_argument("--peer-python", default="", metavar="MODULE=PATH,...", help="interpreters that have a package")
    what.add_argument("--head-bits", type=int, default=16, help="embedding and head of rows made here (default: 16)")
    for title, options in (("calibration text", CalibConfig), ("GPTQ", GPTQConfig)):
        add_fields(parser.add_argument_group(title), options)
    how = parser.add_argument_group("scoring")
    how.add_argument("--eval", metavar="NAME|FILE", help="wikitext2, ptb, c4, or a text file")
    how.add_argument("--eval-seqlen", type=int, default=2048, help="tokens a window (default: 2048)")
    how.add_argument("--eval-windows", type=int, metavar="N", help="score the first N windows only (default: all)")
    how.add_argument("--bos", default="auto", choices=BOS_MODES, help="BOS in each window, before the first, or none")
    how.add_argument("--activation-bits", type=int, default=16, help="of llmq's rows; 16: float, as peers have (16)")
    how.add_argument("--at-once", type=int, default=3, help="models in memory beside the reference (default: 3)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="OUT", help="the record; rows that it holds are not done again")
    out.add_argument("--work", type=Path, metavar="DIR", help="folder of the checkpoints (default: OUT-models)")
    out.add_argument("--plot", type=Path, metavar="OUT.png", help="draw it (needs matplotlib: llmq[plot])")
    out.add_argument("--read", type=Path, metavar="JSON", help="measure nothing: table and plot of a record")
    return parser


@dataclass(frozen=True)
class Sweep:
    """What is to be done, checked."""

    reference: Subject
    source: SourceModel
    tokens: torch.Tensor
    rows: list[Row]
    peers: dict[str, Path]
    shared: Shared
    at_once: int
    record: Record
    save: Callable[[], None]


def prepare(args: argparse.Namespace) -> Sweep:
    """Every check that needs no long work; the record as far as it is."""
    for name in ("model", "eval", "json"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing: the unquantized model, the text and the record make a sweep")
    if args.at_once < 1:
        raise ValueError(f"--at-once is {args.at_once}; it must be at least 1")
    one_of("activation_bits", args.activation_bits, ACTIVATION_BITS)
    check_output(args.json)
    check_plot(args.plot)
    pythons, peers = parse_pythons(args.peer_python), _peers(args.peer)
    rows = parse_grid(args.grid, ablation() if args.ablation else presets(args.presets))
    if not rows and not peers:
        raise ValueError("nothing is to be done: give --grid, --peer or both")
    for name in peers:
        if any(row.name == name for row in rows):
            raise ValueError(f"--peer {name} has the name of a row of --grid; give it another")
    protocol = EvalProtocol(seqlen=args.eval_seqlen, max_windows=args.eval_windows, bos=args.bos)
    text = calibration.text_of(args.eval)
    reference = find(args.model, log=to_stderr)
    source = open_model(reference.folder)  # refuses a quantized one
    protocol = replace(protocol, bos=resolve_bos(reference.tokenizer, protocol.bos))
    tokens = windows(text, reference.tokenizer, protocol)
    check_fits(reference.config, tokens)
    calib, gptq = options_of(args, CalibConfig), options_of(args, GPTQConfig)
    if any(row.is_peer or METHODS[row.method].needs_text for row in rows):
        calibration.check(calib, max_positions=source.max_positions)
    if any(row.is_peer for row in rows) and calibration.is_sampled(calib):
        raise ValueError(
            f"--calib {calib.calib} is written by the model itself; peers need a text that can be given to them"
        )
    work = (args.work or args.json.with_name(args.json.stem + "-models")).absolute()
    shared = Shared(reference.folder, work, calib, gptq, args.head_bits, args.activation_bits, pythons)
    head = {
        "model": args.model,
        "model_digest": model_digest(reference.folder),
        "dataset": args.eval,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "protocol": protocol.describe(len(tokens)),
        "activation_bits": args.activation_bits,
        "calibration": asdict(calib),
        "gptq": asdict(gptq),
        "head_bits": args.head_bits,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
    }
    record = _record(args.json, head)
    missing = {row.name: why for row in rows if row.is_peer and (why := MAKERS[row.method].missing(pythons))}
    rows = [row for row in rows if row.name not in missing]
    record |= {"missing": missing, "failed": {}}
    return Sweep(
        reference, source, tokens, rows, peers, shared, args.at_once, record, lambda: write_record(args.json, record)
    )


def _peers(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--peer {text!r} is not of the form NAME=FOLDER or NAME=FILE.gguf")
        if name in found:
            raise ValueError(f"--peer: two are called {name}")
        if not Path(path).exists():
            raise FileNotFoundError(f"--peer {name}: there is no {path}")
        found[name] = Path(path).absolute()
    return found


def _record(path: Path, head: Record) -> Record:
    """The record in ``path`` if there is one, else an empty one. Raises ValueError if it is of another sweep."""
    empty: Record = {"reference": None, "rows": {}, "missing": {}, "failed": {}}
    if not path.is_file():
        return head | empty
    record = read_record(path, FIELDS)
    for key in IDENTITY:
        if record.get(key) != json.loads(json.dumps(head[key])):
            raise ValueError(
                f"{path} holds rows of another sweep: {key} was {record.get(key)}, now it is {head[key]}; "
                "rows of one table must agree in it: write to another --json"
            )
    return record | {"versions": head["versions"]}


def sweep(job: Sweep) -> None:
    """Make and score every row that the record lacks, ``at_once`` at a time; the record is saved after each batch.

    A row that fails is named in the record, and the others go on.
    """
    waiting: list[Row | str] = [r for r in job.rows if r.name not in report.finished(job.record)]
    waiting += [name for name in job.peers if name not in report.finished(job.record)]
    for at in range(0, len(waiting), job.at_once):
        batch: list[Candidate] = []
        for row in waiting[at : at + job.at_once]:
            name = row if isinstance(row, str) else row.name
            began = time.monotonic()
            try:
                batch.append(_candidate(job, row))
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                job.record["failed"][name] = str(error)
                to_stderr(f"{name} failed: {error}")
            else:
                to_stderr(f"{name}: ready after {time.monotonic() - began:.0f} s")
        score_candidates(batch, job.reference, job.tokens, job.record, to_stderr)
        job.save()


def _candidate(job: Sweep, row: Row | str) -> Candidate:
    bits = job.shared.activation_bits
    if isinstance(row, Row):
        made = make_row(row, job.shared, to_stderr)
        counted = of_checkpoint(made.stored, job.source)
        series = row.name.rpartition(" ")[0]
        if not row.is_peer:
            return Candidate(row.name, series, made.scored, counted, bits, made.cost)
        made_with = ", ".join(f"{package} {version}" for package, version in made.cost["versions"].items())
        about = f"{MAKERS[row.method].about}; {made_with}"
        return Candidate(row.name, series, made.scored, counted, None, made.cost, about)
    path = job.peers[row]
    return Candidate(row, row, path, of_checkpoint(path, job.source), None, {})


def run(args: argparse.Namespace) -> Record:
    """Do what the command line says; returns the record."""
    if args.read:
        check_plot(args.plot)
        record = read_record(args.read, FIELDS)
    else:
        job = prepare(args)
        record = job.record
        sweep(job)
        job.save()
    print(report.table(record))  # noqa: T201
    if args.plot:
        report.plot(record, args.plot)
    return record


def main(argv: Sequence[str] | None = None, *, description: str | None = None) -> int:
    """The command. Exit code 0; 1 if a row failed; 2 for bad input."""
    args = build_parser(description).parse_args(argv)
    records: list[Record] = []
    code = exit_code(lambda: records.append(run(args)))
    return code or int(any(record["failed"] for record in records))
