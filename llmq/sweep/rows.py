"""The rows of a sweep: what is quantized how, from the text of ``--grid``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmq.config import PRESETS, BudgetConfig, QuantScheme, RecipeConfig, one_of
from llmq.solvers import METHODS
from llmq.sweep.peers import MAKERS

BPW = re.compile(r"(\d+(?:\.\d+)?)bpw")


@dataclass(frozen=True)
class Row:
    """One quantized model of the sweep.

    Attributes:
        name: in the table.
        method: row of METHODS, or of a peer's MAKERS.
        scheme: the grid asked for.
        recipe: what is done around GPTQ; of llmq's own rows only.
        budget: schemes by module, where the row asks for bits a weight instead of a scheme.
    """

    name: str
    method: str
    scheme: QuantScheme
    recipe: RecipeConfig = RecipeConfig()
    budget: BudgetConfig = BudgetConfig()

    @property
    def is_peer(self) -> bool:
        """Whether another package makes it."""
        return self.method in MAKERS

    @property
    def folder(self) -> str:
        """Its folder's name: the row's, fit for a path."""
        return self.name.replace(" ", "-").replace("+", "plus-")


def ablation() -> dict[str, RecipeConfig]:
    """Plain GPTQ, then each step of ``best`` added to the ones before it: ``gptq``, ``+target``, ``+refit``, ..."""
    best = PRESETS["best"]
    steps = {f"+{step}": RecipeConfig(only=",".join(best[: i + 1])) for i, step in enumerate(best)}
    return {"alone": RecipeConfig(preset="fast"), **steps}


def presets(text: str) -> dict[str, RecipeConfig]:
    """The recipes of ``fast,balanced,best``. Raises ValueError for an unknown or a missing name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--presets names none; known: {', '.join(PRESETS)}")
    for name in names:
        one_of("a preset", name, PRESETS)
    return {name: RecipeConfig(preset=name) for name in names}


def parse_grid(text: str, recipes: Mapping[str, RecipeConfig]) -> list[Row]:
    """The rows of ``gptq:w4g128,w3g128,3.25bpw rtn:w4g128``: methods with their schemes.

    Args:
        text: methods of METHODS and makers of peers, each with schemes, or bits a weight to choose schemes for.
        recipes: by name; each row of GPTQ is made once with each.

    Raises:
        ValueError: a part of the text that is none of this, a row named twice; names it.
    """
    rows: list[Row] = []
    for part in text.split():
        method, colon, schemes = part.partition(":")
        one_of("a method of --grid", method, [*METHODS, *MAKERS])
        wanted = [s for s in schemes.split(",") if s]
        if not colon or not wanted:
            raise ValueError(f"--grid: {part!r} has no schemes; write {method}:w4g128,w3g128")
        has_recipe = method in METHODS and METHODS[method].solver == "gptq"
        labelled = list(recipes.items()) if has_recipe else [("", RecipeConfig())]
        for scheme in wanted:
            for label, recipe in labelled:
                rows.append(_row(" ".join(filter(None, (method, label, scheme))), method, scheme, recipe))
    for row in rows:
        if sum(other.name == row.name for other in rows) > 1:
            raise ValueError(f"--grid asks twice for {row.name}")
    return rows


def _row(name: str, method: str, scheme: str, recipe: RecipeConfig) -> Row:
    bpw = BPW.fullmatch(scheme)
    if bpw is None:
        return Row(name, method, QuantScheme.parse(scheme), recipe)
    if method not in METHODS or METHODS[method].awq or not METHODS[method].needs_text:
        raise ValueError(f"--grid: {method} takes one scheme such as w4g128; {scheme} needs gptq")
    return Row(name, method, QuantScheme(), recipe, BudgetConfig(target_bpw=float(bpw[1])))
