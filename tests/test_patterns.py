"""Regular expressions of untrusted configs: the answers of ``re``, without the time that it may take."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from test_dialects import ASYM, CT_ARGS, GPTQ, original, write  # noqa: F401

from llmq.dialects import open_quantized
from llmq.models import patterns
from llmq.models.patterns import MAX_LENGTH, MAX_NAME, Patterns

ATOMS = (
    "a",
    "b",
    ".",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    r"\W",
    r"\.",
    r"[a-c\d]",
    r"[^\s]",
    "1",
    "^",
    "$",
    r"\b",
    r"\B",
    "",
)
REPEATS = ("*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{2,}", "{0,3}", "{3,3}?")
AROUND = ("(?=", "(?!", "(", "(?:")
# Years with re: ways to cut one run of letters, ways through alternatives, optional parts, and runs inside runs.
SLOW = ("(a+)+b", "(a|aa)*b", "(.*a){30}b", "a?" * 60 + "b" * 61, "((.*)*)*b", "(?:a*){9,}(?:a*){9,}b", ".*" * 40 + "b")


def expression(rng: random.Random, depth: int) -> str:
    """A random pattern."""
    kind = rng.random()
    if not depth or kind < 0.3:
        return rng.choice(ATOMS)
    inner = expression(rng, depth - 1)
    if kind < 0.55:
        return inner + expression(rng, depth - 1)
    if kind < 0.7:
        return f"(?:{inner}|{expression(rng, depth - 1)})"
    if kind < 0.9:
        return f"(?:{inner}){rng.choice(REPEATS)}"
    return rng.choice(AROUND) + inner + ")" if kind < 0.97 else rng.choice(("(?<=ab)", "(?<!.)", "(?<=a|b)"))


def test_answers_are_those_of_re() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(4000):
        pattern, name = expression(rng, 4), "".join(rng.choices("ab1. \n", k=rng.randrange(1, 8)))
        expected = [re.match(pattern, name) is not None, re.fullmatch(pattern, name) is not None]
        found = [Patterns([pattern], "x", whole=whole).matching(name) == [0] for whole in (False, True)]
        assert found == expected, (pattern, name)
        hits += sum(expected)
    assert 1000 < hits < 7000


@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_is_slow(pattern: str) -> None:
    slow = Patterns([pattern], "x")
    assert slow.matching("a" * MAX_NAME) == []
    assert slow.steps < 100_000
    assert slow.matching("a" * 60 + "b" * 61) == [0]


def test_positions_of_all_that_match() -> None:
    found = Patterns([r"^a\.b$", ".*b", "a", r"a\.b$", "b", r"a\.c$"], "x")
    assert found.matching("a.b") == [0, 1, 2, 3]
    assert found.matching("a.bb") == [1, 2]
    assert found.matching("c") == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"^x: '\(' is no regular expression that can be used here \(missing \)"),
        ("a{9999999999999}", "too large"),
        ("(" * 2000 + ")" * 2000, "recursion|too deeply"),
        ("a" * (MAX_LENGTH + 1), rf"it has {MAX_LENGTH + 1} characters; {MAX_LENGTH} are allowed"),
        (r"(a)\1", "it uses groupref, which"),
        ("(?i)a", "it sets flags"),
        ("(?i:a)", "it uses flags"),
        ("(?<=a*)b", "a look behind of no fixed width"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_patterns(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Patterns([pattern], "x").matching("aab")
    assert len(str(caught.value)) < 500


def test_bad_names_and_too_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=rf"x: a name of {MAX_NAME + 1} characters, aaa.*; {MAX_NAME} are allowed"):
        Patterns(["a"], "x").matching("a" * (MAX_NAME + 1))
    monkeypatch.setattr(patterns, "MAX_STEPS", 1000)
    many = Patterns([".*b"] * 100, "x")
    assert many.matching("a") == []
    with pytest.raises(ValueError, match="x: its 100 regular expressions take more than 1000 steps"):
        [many.matching(f"a{i}") for i in range(10)]


@pytest.mark.parametrize("slow", ["(([^z]+)+)+z", "(?:.*.*.*)*z"])
def test_folders_with_slow_patterns_open(slow: str, original: Path, tmp_path: Path) -> None:  # noqa: F811
    """What the pattern says of modules that it does not name (8 bits) is not used, and it names none."""
    held = write(original, tmp_path / "g", "gptq", ASYM, {**GPTQ, "sym": False, "dynamic": {f"+:{slow}": {"bits": 8}}})
    group: dict[str, Any] = {"targets": [f"re:{slow}"], "weights": {**CT_ARGS, "num_bits": 8}}
    usual = {"targets": ["Linear"], "weights": {**CT_ARGS, "symmetric": False}}
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": group, "b": usual},
        "ignore": [f"re:{slow}"],
    }
    write(original, tmp_path / "c", "pack-quantized", ASYM, block)
    for folder in ("g", "c"):
        found = open_quantized(tmp_path / folder).matrices
        assert {name: m.scheme for name, m in found.items()} == dict.fromkeys(held, ASYM)
