"""How two models of one architecture differ: weight by weight, integer by integer, and on a text.

Either may be quantized, in any format that llmq reads, or not at all. The first one is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llmq.checkpoint import is_weight_file
from llmq.dialects import quantization_block
from llmq.dialects.source import open_source
from llmq.dialects.stored import Stored
from llmq.evaluation import EvalProtocol, Subject, check_same_vocabulary, evaluate, find, resolve_bos
from llmq.formats import Inexact
from llmq.models.load import open_model
from llmq.models.reader import read_json
from llmq.models.resolve import resolve
from llmq.report import Log, silent, size
from llmq.runtime.auto import expanded
from llmq.score import Score
from llmq.speed import Speed, decode_speeds


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model: its numbers, and its QTensor where it has one."""

    shape: tuple[int, int]
    read: Callable[[], Tensor]
    stored: Stored | None = None


@dataclass(frozen=True)
class View:
    """The matrices of a model, by module; ``origin`` says in what it lies, ``nbytes`` what its weights take on disk."""

    spec: str
    origin: str
    nbytes: int
    matrices: dict[str, Matrix]


@dataclass(frozen=True)
class Row:
    """One matrix of both models.

    Attributes:
        name: the module.
        shape: out_features, in_features.
        kinds: scheme or ``dense``, of the first model and of the second.
        error: ||B - A|| / ||A||, Frobenius.
        equal: share of equal codes, where both are quantized with the same bits; else None.
    """

    name: str
    shape: tuple[int, int]
    kinds: tuple[str, str]
    error: float
    equal: float | None


@dataclass(frozen=True)
class Difference:
    """All rows, modules that only one of the models has, and, if asked for, the score of B on a text and the speeds."""

    views: tuple[View, View]
    rows: list[Row]
    alone: list[str]
    score: Score | None = None
    notes: list[str] = field(default_factory=list)
    speeds: tuple[Speed, Speed] | None = None

    def table(self, *, each: bool = False) -> str:
        """For a person: sizes, a line a kind of matrix (or each matrix), the figures on the text."""
        a, b = self.views
        speeds = ["", ""]
        if self.speeds is not None:
            ratio = self.speeds[1].rate / self.speeds[0].rate
            speeds = [f"; {speed}" for speed in self.speeds]
            speeds[1] += f", {ratio:.2f} of A"
        lines = [
            f"A  {a.spec} ({a.origin}), {size(a.nbytes)}{speeds[0]}",
            f"B  {b.spec} ({b.origin}), {size(b.nbytes)}, {b.nbytes / a.nbytes:.3f} of A{speeds[1]}",
            "",
            f"  {'matrix':34} {'count':>5} {'A -> B':>26} {'error':>10} {'worst':>10} {'same codes':>11}",
        ]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            name = row.name if each else row.name.rsplit(".", 1)[-1]
            groups.setdefault((name, " -> ".join(row.kinds)), []).append(row)
        for (name, kinds), rows in groups.items():
            mean, worst = sum(r.error for r in rows) / len(rows), max(r.error for r in rows)
            equal = [r.equal for r in rows if r.equal is not None]
            same = f"{100 * sum(equal) / len(equal):.2f} %" if equal else "-"
            lines.append(f"  {name:34} {len(rows):5d} {kinds:>26} {mean:10.3g} {worst:10.3g} {same:>11}")
        if self.alone:
            lines.append(f"  in one of the models only: {', '.join(self.alone[:5])}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.score is not None:
            lines += ["", "B against A:", self.score.table()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain JSON types."""
        return {
            "models": [{"spec": v.spec, "origin": v.origin, "bytes": v.nbytes} for v in self.views],
            "matrices": [vars(row) for row in self.rows],
            "alone": self.alone,
            "notes": self.notes,
            "text": None if self.score is None else self.score.to_json(),
            "speed": None if self.speeds is None else [vars(speed) for speed in self.speeds],
        }


def difference(
    a: str,
    b: str,
    *,
    text: str | None = None,
    protocol: EvalProtocol | None = None,
    speed: bool = False,
    log: Log | None = None,
) -> Difference:
    """Compare model ``b`` with model ``a``.

    Args:
        a, b: folders of any dialect or not quantized, ``.gguf`` files, aliases or hub ids.
        text: a text on which both are run; None: weights and sizes only.
        protocol: how the text becomes windows.
        speed: decode a few tokens with both, in turns (:func:`llmq.speed.decode_speeds`).
        log: gets each line of progress.

    Raises:
        ValueError: models that cannot be opened, that share no matrix, or have matrices of other shapes; for a text,
            as :func:`llmq.evaluation.evaluate`.
    """
    log = log or silent
    views = (view(a, log), view(b, log))
    names = [name for name in views[0].matrices if name in views[1].matrices]
    if not names:
        raise ValueError(f"{a} and {b} have no matrix in common: they are not of one architecture")
    rows = []
    for i, name in enumerate(names):
        rows.append(compare(name, views[0].matrices[name], views[1].matrices[name]))
        if (i + 1) % 50 == 0:
            log(f"  {i + 1} of {len(names)} matrices")
    alone = sorted(views[0].matrices.keys() ^ views[1].matrices.keys())
    if text is None and not speed:
        return Difference(views, rows, alone)
    found = _run(a, b, text, protocol or EvalProtocol(), speed, log)
    return Difference(views, rows, alone, score=found[0], speeds=found[1])


def compare(name: str, a: Matrix, b: Matrix) -> Row:
    """The row of one matrix. Raises ValueError when the shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"{name} is {a.shape} in one model and {b.shape} in the other: not of one architecture")
    A, B = a.read(), b.read()
    error = float((B - A).norm() / A.norm().clamp(min=1e-30))
    kinds = tuple("dense" if m.stored is None else str(m.stored.scheme) for m in (a, b))
    return Row(name, a.shape, (kinds[0], kinds[1]), error, _same_codes(a.stored, b.stored))


def _same_codes(a: Stored | None, b: Stored | None) -> float | None:
    if a is None or b is None or a.scheme.bits != b.scheme.bits or a.order is not None or b.order is not None:
        return None
    return float((a.read().q == b.read().q).double().mean())


def view(spec: str, log: Log) -> View:
    """The matrices of a model; see :func:`difference` for what ``spec`` may be."""
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        try:
            return _quantized(spec, path, log)
        except Inexact:  # block types without a grid of ours: their numbers are compared, not their codes
            return _dense(spec, resolve(spec, log=log).folder, path.stat().st_size)
    folder = resolve(spec, log=log).folder
    if quantization_block(read_json(folder / "config.json")) is not None:
        return _quantized(spec, folder, log)
    return _dense(spec, folder, _bytes_of(folder))


def _bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if is_weight_file(p) and p.suffix != ".json")


def _quantized(spec: str, path: Path, log: Log) -> View:
    try:
        source = open_source(path, inexact="refuse", log=log)
    except Inexact:
        if path.is_file():
            raise
        source = open_source(path, inexact="requantize", log=log)
        log(f"{spec}: {len(source.notes)} matrices are no grid of ours; what is compared are numbers near them")
    found = {name: Matrix((m.n, m.k), m.dequantize, m) for name, m in source.matrices.items()}
    for full, other in source.others.items():
        if len(other.shape) == 2 and full.endswith(".weight"):
            shape = (other.shape[0], other.shape[1])
            found[full.removesuffix(".weight")] = Matrix(shape, partial(_float, other.read))
    nbytes = path.stat().st_size if path.is_file() else _bytes_of(path)
    return View(spec, source.origin, nbytes, found)


def _float(read: Callable[[], Tensor]) -> Tensor:
    return read().float()


def _dense(spec: str, folder: Path, nbytes: int) -> View:
    source = open_model(folder)
    found = {}
    for full, parameter in source.model.named_parameters():
        if parameter.dim() == 2 and full.endswith(".weight"):
            shape = (parameter.shape[0], parameter.shape[1])
            found[full.removesuffix(".weight")] = Matrix(shape, partial(_float, partial(source.reader.tensor, full)))
    return View(spec, "not quantized", nbytes, found)


def _run(
    a: str, b: str, text: str | None, protocol: EvalProtocol, speed: bool, log: Log
) -> tuple[Score | None, tuple[Speed, Speed] | None]:
    """What only loaded models tell."""
    reference, model = _subject(a, log), _subject(b, log)
    if text is not None:
        protocol = replace(protocol, bos=resolve_bos(model.tokenizer, protocol.bos))
        check_same_vocabulary(model, reference, text=text, protocol=protocol)
    loaded, other = model.load(), reference.load()
    speeds = None
    if speed:
        log("decoding with both, in turns")
        speeds = decode_speeds(other, loaded)
    if text is None:
        return None, speeds
    log("scoring the text with both")
    return evaluate(loaded, model.tokenizer, text, protocol, reference=other), speeds


def _subject(spec: str, log: Log) -> Subject:
    """As :func:`llmq.evaluation.find`; a GGUF file of blocks that are grids of ours runs on the kernels."""
    path = Path(spec).expanduser()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return find(spec, log=log)
    try:
        folder = expanded(path, "refuse")
    except Inexact:
        return find(spec, log=log)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return Subject(spec, folder, config, AutoTokenizer.from_pretrained(folder, local_files_only=True))
