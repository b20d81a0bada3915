"""Regular expressions out of a config that nobody vouches for, matched against module names in bounded time.

Python's ``re`` tries one way after the other: a pattern such as ``(a+)+b`` keeps it busy for years. Here a pattern is
followed through a name with the set of all places where it can stand (Thompson, Regular Expression Search Algorithm,
1968), so nothing is tried twice, and the steps of a whole config are counted. The syntax is that of ``re``, whose
parser is used, without what a set of places cannot follow: references to groups, atomic groups, possessive repeats,
flags.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Characters of a pattern, and of a name: those of published models have some 60.
MAX_LENGTH = 4096
MAX_NAME = 512
# Of one config: about ten seconds. Three patterns of 50 characters take 10 000 a hundred modules.
MAX_STEPS = 10_000_000
# Names written as patterns, one a module, as mixed schemes are: looked up, not tried one by one.
_PLAIN = re.compile(r"\^?((?:\w|\\\.)+)\$")
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
# Parts of a pattern that stand for one character.
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


class Patterns:
    """The patterns of one config.

    Args:
        patterns: as ``re`` takes them.
        where: the file or folder they are from, for messages.
        whole: they must match a whole name, not only its beginning.

    Raises ValueError for a pattern that is too long, is none, or uses what is not followed here; shows its beginning.
    """

    def __init__(self, patterns: Iterable[str], where: str, *, whole: bool = False) -> None:
        self.where, self.whole, self.steps = where, whole, 0
        self._names: dict[str, list[int]] = {}
        self._trees: list[tuple[int, str, Any]] = []
        for i, pattern in enumerate(patterns):
            plain = _PLAIN.fullmatch(pattern) if len(pattern) <= MAX_LENGTH else None
            if plain is not None:
                self._names.setdefault(plain[1].replace(r"\.", "."), []).append(i)
            else:
                self._trees.append((i, pattern, self._parsed(pattern)))

    def matching(self, name: str) -> list[int]:
        """Positions of the patterns that match, in their order.

        Raises ValueError for a name of more than ``MAX_NAME`` characters, or when all names so far have taken more than
        ``MAX_STEPS`` steps.
        """
        if len(name) > MAX_NAME:
            raise ValueError(f"{self.where}: a name of {len(name)} characters, {name[:80]}...; {MAX_NAME} are allowed")
        found, walk = list(self._names.get(name, ())), _Walk(name, self)
        for i, pattern, tree in self._trees:
            try:
                ends = walk.sequence(tree, 1)
            except RecursionError:
                raise self._bad(pattern, "it is nested too deeply") from None
            except _Unknown as what:
                raise self._bad(pattern, f"it uses {what}, which llmq does not follow") from None
            if ends >> len(name) & 1 if self.whole else ends:
                found.append(i)
        return sorted(found)

    def take(self, steps: int) -> None:
        """Count steps of a walk."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError(
                f"{self.where}: its {len(self._trees)} regular expressions take more than {MAX_STEPS} steps on the "
                "model's modules: the config is damaged, or must name the modules plainly"
            )

    def _parsed(self, pattern: str) -> Any:
        if len(pattern) > MAX_LENGTH:
            raise self._bad(pattern, f"it has {len(pattern)} characters; {MAX_LENGTH} are allowed")
        try:
            tree = _parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._bad(pattern, str(error)) from None
        if tree.state.flags & ~re.UNICODE:
            raise self._bad(pattern, "it sets flags, which llmq does not follow")
        return tree

    def _bad(self, pattern: str, why: str) -> ValueError:
        return ValueError(
            f"{self.where}: {pattern[:80]!r} is no regular expression that can be used here ({why[:200]}); the config "
            "is damaged, or must name its modules plainly"
        )


class _Unknown(Exception):
    """A part of a pattern that a set of places cannot follow."""


class _Walk:
    """All ways through one name at once. A set of places is a number: bit i says that i characters were passed."""

    def __init__(self, name: str, budget: Patterns) -> None:
        self.name, self.budget = name, budget
        self.masks: dict[tuple[str, Any], int] = {}

    def sequence(self, parts: Any, at: int) -> int:
        """Where the parts, one after the other, end from the places ``at``."""
        for op, value in parts:
            if not at:
                break
            self.budget.take(1)
            step = getattr(self, f"_{op.name.lower()}", None)
            at = (at & self._characters(op.name, value)) << 1 if step is None else step(value, at)
        return at

    def _characters(self, op: str, value: Any) -> int:
        """Places of the characters that a part of a pattern stands for."""
        key = (op, id(value) if op == "IN" else value)
        mask = self.masks.get(key)
        if mask is None:
            letters = set(self.name)
            self.budget.take(len(letters) * (len(value) if op == "IN" else 1))
            fits = {c for c in letters if _fits(op, value, c)}
            mask = self.masks[key] = sum(1 << i for i, c in enumerate(self.name) if c in fits)
        return mask

    def _branch(self, value: Any, at: int) -> int:
        out = 0
        for parts in value[1]:
            out |= self.sequence(parts, at)
        return out

    def _subpattern(self, value: Any, at: int) -> int:
        _, on, off, parts = value
        if on or off:
            raise _Unknown("flags")
        return self.sequence(parts, at)

    def _max_repeat(self, value: Any, at: int) -> int:
        """After as many turns as there are places, each further one ends where some earlier one did."""
        low, high, parts = value
        turns = len(self.name) + 1
        for _ in range(min(low, turns)):
            at = self.sequence(parts, at)
        if high - low >= turns and len(parts) == 1 and parts[0][0].name in _CHARACTERS:
            run = self._characters(parts[0][0].name, parts[0][1])
            return at | ((at & run) + run) ^ run  # the carry runs from each place to the end of its run (Myers 1999)
        out = new = at
        for _ in range(min(high - low, turns)):
            new = self.sequence(parts, new) & ~out
            out |= new
            if not new:
                break
        return out

    _min_repeat = _max_repeat  # which way is tried first does not change whether there is one

    def _assert(self, value: Any, at: int) -> int:
        return at & self._seen(value, at)

    def _assert_not(self, value: Any, at: int) -> int:
        return at & ~self._seen(value, at)

    def _failure(self, _value: Any, _at: int) -> int:
        return 0

    def _seen(self, value: Any, at: int) -> int:
        """Those of the places before (or behind) which the parts of a look around stand."""
        direction, parts = value
        low, high = parts.getwidth() if direction < 0 else (0, 0)
        if low != high:
            raise _Unknown("a look behind of no fixed width")
        out = 0
        self.budget.take(len(self.name))
        for i in range(len(self.name) + 1):
            if at >> i & 1 and i >= low:
                ends = self.sequence(parts, 1 << (i - low))
                out |= (bool(ends) if direction > 0 else ends >> i & 1) << i
        return out

    def _at(self, value: Any, at: int) -> int:
        n, name = len(self.name), self.name
        if value.name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at & 1
        if value.name in ("AT_END", "AT_END_STRING"):
            line = value.name == "AT_END" and name.endswith("\n")
            return at & (1 << n | (1 << (n - 1) if line else 0))
        self.budget.take(n)
        word = [False, *map(_CATEGORIES["CATEGORY_WORD"], name), False]
        edges = sum(1 << i for i in range(n + 1) if word[i] != word[i + 1])
        return at & (edges if value.name == "AT_BOUNDARY" else ~edges)


def _fits(op: str, value: Any, c: str) -> bool:
    """Whether a part of a pattern that stands for one character stands for ``c``."""
    if op == "LITERAL":
        return bool(ord(c) == value)
    if op == "NOT_LITERAL":
        return bool(ord(c) != value)
    if op == "ANY":
        return c != "\n"
    if op == "RANGE":
        return bool(value[0] <= ord(c) <= value[1])
    if op == "CATEGORY":
        negated = "_NOT_" in value.name
        return _CATEGORIES[value.name.replace("_NOT_", "_")](c) is not negated
    if op != "IN":
        raise _Unknown(op.lower())
    negated = bool(value) and value[0][0].name == "NEGATE"
    return any(_fits(inner.name, part, c) for inner, part in value[negated:]) is not negated
