"""Bits where they matter: a scheme for each linear, so that the loss is least at a given size.

How much a linear matters is its own part of the divergence of a model that was rounded for it
(:mod:`llmq.sensitivity`); under another scheme it is scaled by the squared rounding error. Choosing schemes is then a
knapsack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmq.calibration import CalibrationSet
from llmq.checkpoint import is_weight_file
from llmq.config import BITS, BudgetConfig, QuantScheme, parse_size
from llmq.models.load import SourceModel
from llmq.plan import Matrix, Plan, memory_bytes, table_scheme
from llmq.report import Log
from llmq.sensitivity import PROBE_BITS, measured, memory_needed, table_probe
from llmq.solvers import SolverOptions, rtn

GROUP_SIZES = (32, 64, 128)
# Largest number of sizes the knapsack tells apart; a matrix's size is rounded up to one of them.
BUCKETS = 40_000
# Bits of an embedding or head that is chosen for a size.
TABLE_BITS = (8, 4)
# Rows of a matrix whose rounding error is measured, and grids that are tried for each group of them.
SAMPLE_ROWS, GRID_STEPS = 128, 20
# Generous room for what a folder holds of every tensor: its lines in report, index and configuration; and for the rest.
LINEAR_BYTES, REPORT_BYTES = 4096, 1 << 16


@dataclass(frozen=True)
class Allocation:
    """The schemes chosen, by module, with what led to them.

    Attributes:
        schemes: of every linear.
        divergence: each linear's own part of the KL (nats a token) at the probe's rounding.
        predicted: KL divergence expected of the chosen schemes; only its order is to be trusted.
    """

    schemes: dict[str, QuantScheme]
    divergence: dict[str, float]
    predicted: float


def read_plan(path: str | Path, matrices: Sequence[Matrix]) -> dict[str, QuantScheme]:
    """Schemes by module from a JSON file: ``{"model.layers.0.mlp.down_proj": "w4g64", ...}``, or a report's.

    Embedding and head are among a report's where it chose them (``--target-size``).

    Raises:
        ValueError: not such a file, a scheme that cannot be read, a module that the model lacks; names it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--plan {path}: cannot be read as JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("linears"), list):
        budget = found.get("options", {}).get("budget", {})
        rows = found["linears"] + (found["tables"] if budget.get("target_size") else [])
        found = {row["name"]: row["scheme"] for row in rows}
    if not isinstance(found, dict) or not found:
        raise ValueError(f'--plan {path}: expected an object of module names and schemes, as {{"...q_proj": "w4g64"}}')
    known = {m.name for m in matrices}
    for name in found:
        if name not in known:
            raise ValueError(f"--plan {path}: the model has no linear {name!r}; one that it has is {min(known)}")
    return {name: QuantScheme.parse(str(text)) for name, text in found.items()}


def check_budget(source: SourceModel, plan: Plan, scheme: QuantScheme, budget: BudgetConfig) -> None:
    """Raise ValueError when the smallest candidates need more than the budget, or the model does not fit."""
    tables = plan.tables if budget.target_size else []
    _check_memory(source, [*plan.linears, *tables], plan.weights, budget.flag)
    weights = sum(m.weights for m in plan.linears)
    smallest = sum(min(s for _, s in _sizes(m, scheme)) for m in plan.linears)
    if budget.target_bpw and budget.target_bpw < 8 * smallest / weights:
        raise ValueError(
            f"--target-bpw {budget.target_bpw:g} is below {8 * smallest / weights:.3f}, what {min(BITS)} bits in "
            f"groups of {max(GROUP_SIZES)} take with their scales; ask for more"
        )
    if budget.target_size:
        least = smallest + sum(min(s for _, s in _table_sizes(m)) for m in tables) + beside(source, plan)
        want, rest = parse_size(budget.target_size), beside(source, plan) / 1e6
        if want < least:
            head = f"the head {TABLE_BITS[-1]}" if tables else "the head 16 (--head-bits 8 lets it have fewer)"
            raise ValueError(
                f"--target-size {budget.target_size} is {want / 1e6:.1f} MB, and the smallest folder has "
                f"{least / 1e6:.1f}: linears in {min(BITS)} bits, {head}, and {rest:.1f} MB of norms, tokenizer and "
                "the like; ask for more"
            )


def beside(source: SourceModel, plan: Plan) -> int:
    """Bytes of a folder that no choice changes: tensors that are kept, other files, and room for names and report."""
    files = (p for p in source.folder.rglob("*") if p.is_file() and not is_weight_file(p))
    visible = (p for p in files if not any(part.startswith(".") for part in p.relative_to(source.folder).parts))
    named = REPORT_BYTES + LINEAR_BYTES * (len(plan.linears) + len(plan.kept))
    return sum(k.nbytes for k in plan.kept) + sum(p.stat().st_size for p in visible) + named


def check_size(folder: Path, budget: BudgetConfig) -> None:
    """Raise ValueError if the files of ``folder`` take more than ``--target-size``."""
    found = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if budget.target_size and found > parse_size(budget.target_size):
        raise ValueError(
            f"the folder takes {found} bytes, --target-size {budget.target_size} is {parse_size(budget.target_size)}; "
            "it is not published: ask for a little more"
        )


def budget_bytes(source: SourceModel, plan: Plan, budget: BudgetConfig) -> int:
    """Bytes that the matrices which are chosen may take together."""
    if budget.target_size:
        return parse_size(budget.target_size) - beside(source, plan)
    return int(budget.target_bpw * sum(m.weights for m in plan.linears) / 8)


@dataclass(frozen=True)
class Choices:
    """What there is to choose from, and what each choice costs; enough for any budget.

    Attributes:
        names: of the matrices.
        schemes: candidates of each matrix.
        sizes: bytes of each candidate.
        costs: KL divergence expected of each candidate.
        divergence: of each matrix at the probe's rounding.
    """

    names: list[str]
    schemes: list[list[QuantScheme]]
    sizes: list[list[int]]
    costs: list[list[float]]
    divergence: dict[str, float]

    def within(self, nbytes: int) -> Allocation:
        """The best choice that takes at most ``nbytes``. Raises ValueError if the smallest takes more."""
        chosen = knapsack(self.costs, self.sizes, nbytes)
        schemes = {name: s[c] for name, s, c in zip(self.names, self.schemes, chosen, strict=True)}
        predicted = sum(c[i] for c, i in zip(self.costs, chosen, strict=True))
        return Allocation(schemes, self.divergence, predicted)


def choices_of(
    source: SourceModel,
    linears: Sequence[Matrix],
    tables: Sequence[Matrix],
    scheme: QuantScheme,
    texts: CalibrationSet,
    options: SolverOptions,
    log: Log,
) -> Choices:
    """Candidates of each matrix, their sizes and costs.

    Args:
        source: the model; it is loaded whole, in fp32, with gradients of these matrices.
        linears: with their shapes.
        tables: embedding and head, where they are to be chosen too.
        scheme: says whether grids are symmetric.
        texts: calibration windows.
        options: how linears are rounded to be measured.
        log: gets lines of progress.
    """
    probe = QuantScheme(PROBE_BITS, 128, scheme.sym)
    divergence = measured(source, linears, tables, probe, texts, options, log)
    found = Choices([], [], [], [], divergence)
    for m in (*linears, *tables):
        candidates = _table_sizes(m) if m in tables else _sizes(m, scheme)
        had = table_probe(m) if m in tables else probe
        error, *errors = _squared_errors(source, m, [had, *(s for s, _ in candidates)])
        found.names.append(m.name)
        found.schemes.append([s for s, _ in candidates])
        found.sizes.append([size for _, size in candidates])
        found.costs.append([divergence[m.name] * e / max(error, 1e-30) for e in errors])
    return found


def with_schemes(linears: Sequence[Matrix], schemes: Mapping[str, QuantScheme]) -> list[Matrix]:
    """``linears``, those named in ``schemes`` with their own scheme."""
    return [replace(m, scheme=schemes.get(m.name, m.scheme)) for m in linears]


def _sizes(m: Matrix, scheme: QuantScheme) -> list[tuple[QuantScheme, int]]:
    """(candidate scheme, bytes) of a matrix."""
    schemes = [QuantScheme(b, g, scheme.sym) for b in BITS for g in GROUP_SIZES]
    return [(s, replace(m, scheme=s).nbytes) for s in schemes]


def _table_sizes(m: Matrix) -> list[tuple[QuantScheme, int]]:
    """(candidate scheme, bytes) of an embedding or head."""
    schemes = [table_scheme(m.scheme, bits) for bits in TABLE_BITS]
    return [(s, replace(m, scheme=s).nbytes) for s in schemes]


def _squared_errors(source: SourceModel, m: Matrix, schemes: Sequence[QuantScheme]) -> list[float]:
    """|W_rounded - W|^2 of a sample of rows, each group in the best of several grids, for each of ``schemes``.

    As a ratio between schemes this is close to what GPTQ's output error does; the min-max grid's is not, at 2 bits.
    """
    W = source.reader.rows_at(f"{m.name}.weight", torch.arange(0, m.n, -(-m.n // SAMPLE_ROWS))).float()
    plain = torch.eye(m.k)
    rounded = [rtn.solve(W, s, plain, grid_steps=GRID_STEPS).dequantize() for s in schemes]
    return [float(torch.sum((r - W) ** 2, dtype=torch.float64)) for r in rounded]


def _check_memory(source: SourceModel, linears: Sequence[Matrix], weights: int, flag: str) -> None:
    """Raise ValueError when the whole model and its gradients do not fit into this machine's memory."""
    need = memory_needed(source, linears, weights)
    if need > memory_bytes():
        raise ValueError(
            f"{flag} needs the whole model and gradients in memory: {need / 2**30:.1f} GiB, and this machine has "
            f"{memory_bytes() / 2**30:.1f}; give the schemes with --plan"
        )


def knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One candidate an item so that the sizes stay within ``budget`` and the costs are least.

    Exact dynamic programming over sizes rounded up to ``budget / BUCKETS``.

    Args:
        costs, sizes: a row an item, a value a candidate.

    Raises:
        ValueError: even the smallest candidates do not fit; both numbers are in it.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise ValueError(f"the smallest candidates take {least} bytes, the budget is {budget}; ask for more")
    # What is above the smallest candidate is what competes: rounding up costs at most a bucket an item.
    extra = budget - least
    unit = max(1, extra // BUCKETS)
    room = extra // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    picks = []
    for cost, size in zip(costs, sizes, strict=True):
        steps = [-(-(s - min(size)) // unit) for s in size]
        options = torch.full((len(cost), room + 1), torch.inf, dtype=torch.float64)
        for i, (c, step) in enumerate(zip(cost, steps, strict=True)):
            if step <= room:
                options[i, step:] = best[: room + 1 - step] + c
        best, pick = options.min(0)
        picks.append((pick, steps))
    at, chosen = room, []
    for pick, steps in reversed(picks):
        i = int(pick[at])
        chosen.append(i)
        at -= steps[i]
    return chosen[::-1]
