"""The rules of the house: layers, sizes, names, documents that tell the truth. See docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# A file may import modules of its own layer and of the layers before it. The longest prefix decides.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "llmq.compat",
        "llmq.config",
        "llmq.cpuinfo",
        "llmq.masked_attention",
        "llmq.memory",
        "llmq.parallel",
        "llmq.products",
        "llmq.qtensor",
        "llmq.packing",
        "llmq.models.families",
    ),
    ("llmq.kernels.reference", "llmq.solvers", "llmq.formats", "llmq.calibration", "llmq.kv_quant"),
    ("llmq.kernels", "llmq._core", "llmq.models", "llmq.checkpoint", "llmq.dialects"),
    (
        "llmq.allocate",
        "llmq.distill",
        "llmq.importance",
        "llmq.job",
        "llmq.learn",
        "llmq.own_text",
        "llmq.pipeline",
        "llmq.blockwise",
        "llmq.plan",
        "llmq.records",
        "llmq.report",
        "llmq.request",
        "llmq.smallest",
        "llmq.sensitivity",
        "llmq.stats_bank",
        "llmq.student",
        "llmq.rounding",
        "llmq.tables",
        "llmq.tune",
        "llmq.verify",
        "llmq.runtime",
        "llmq.score",
        "llmq.likelihood",
        "llmq.logits",
        "llmq.kv_feed",
        "llmq.kv_budget",
        "llmq.needle",
        "llmq.evaluation",
        "llmq.conversion",
        "llmq.speed",
        "llmq.difference",
        "llmq.exports",
    ),
    ("llmq",),
    ("llmq.quantize", "llmq.convert", "llmq.diff", "llmq.cli", "llmq.bench", "llmq.sweep"),
    ("eval", "scripts"),
)
# Rooms that meet only in QTensor.
STRANGERS = ("llmq.solvers", "llmq.formats", "llmq.runtime")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_FILE_BYTES = 250_000

SOURCES = sorted(p for room in ("llmq", "eval", "scripts") for p in (ROOT / room).rglob("*.py"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXT_SUFFIXES = {".py", ".h", ".cpp", ".in", ".txt", ".md", ".toml", ".yaml", ".sh", ".cmake", ""}
SKIPPED = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__", "quickstart", "build", "dist"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return relative(path.with_suffix("")).replace("/", ".").removesuffix(".__init__")


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands; ``from a import b`` gives a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{relative(path)}:{node.lineno}: write imports in full, not relative"
            assert node.level == 0, f"{relative(path)}:{node.lineno}: write imports in full, not relative"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if exists(whole) or whole == "llmq._core" else node.module


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def layer(module: str) -> int:
    """The number of a module's layer, or -1 for one that has none. The row ``llmq`` is the package itself only."""
    rooms = {room: number for number, row in enumerate(LAYERS) for room in row}
    matching = [room for room in rooms if room == module or (room != "llmq" and is_in(module, room))]
    return rooms[max(matching, key=len)] if matching else -1


def repository_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not path.is_symlink() and not SKIPPED.intersection(parts) and path.suffix != ".so":
            yield path


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    own = layer(module)
    assert own >= 0, f"{module} has no layer: give it one in LAYERS and in docs/ARCHITECTURE.md"
    for line, name in imported_names(path):
        if is_in(name, "llmq"):
            where = f"{relative(path)}:{line}"
            assert 0 <= layer(name) <= own, f"{where} (layer {own}) imports {name} (layer {layer(name)})"
        for room in STRANGERS:
            others = [other for other in STRANGERS if other != room and is_in(name, other)]
            assert not (is_in(module, room) and others), f"{relative(path)}:{line}: {room} must not know {name}"


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("llmq", 4),
        ("llmq.config", 0),
        ("llmq.models.families", 0),
        ("llmq.models.load", 2),
        ("eval.kl", 6),
        ("llmq.unheard_of", -1),
    ],
)
def test_layer_of_a_module(module: str, number: int) -> None:
    assert layer(module) == number


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines, at most {MAX_FILE_LINES}: split a concept off"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{relative(path)}:{node.lineno} {node.name}"
            assert length <= MAX_FUNCTION_LINES, f"{where} has {length} lines, at most {MAX_FUNCTION_LINES}"


def test_cpp_files_are_short() -> None:
    files = [p for p in repository_files() if (ROOT / "cpp") in p.parents]
    lines = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {name: n for name, n in lines.items() if n > MAX_FILE_LINES} == {}


def test_text_files_end_with_one_newline_and_are_small() -> None:
    for path in repository_files():
        data = path.read_bytes()
        assert len(data) <= MAX_FILE_BYTES, f"{relative(path)} has {len(data)} bytes, at most {MAX_FILE_BYTES}"
        if path.suffix in TEXT_SUFFIXES and data:
            assert data.endswith(b"\n"), f"{relative(path)} does not end with a newline"
            assert not data.endswith(b"\n\n"), f"{relative(path)} ends with empty lines"


def test_there_is_no_room_for_odds_and_ends() -> None:
    assert [relative(p) for p in SOURCES if p.stem in {"util", "utils", "helpers", "misc", "common"}] == []


def option_names(path: Path) -> list[str]:
    """Fields of a file's dataclasses that are declared with ``option(...)``."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [
        node.target.id
        for node in nodes
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "option"
    ]


def flags(path: Path) -> list[str]:
    """Every flag that a file's ``add_argument`` calls spell out."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    added = (node.args for node in calls if getattr(node.func, "attr", "") == "add_argument")
    return [a.value for args in added for a in args if isinstance(a, ast.Constant) and str(a.value).startswith("--")]


def test_each_option_is_declared_once() -> None:
    names = option_names(ROOT / "llmq" / "config.py")
    assert len(names) > 8
    assert [name for name, n in Counter(names).items() if n > 1] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_each_flag_is_spelt_out_once(path: Path) -> None:
    assert [flag for flag, n in Counter(flags(path)).items() if n > 1] == []


def named_paths(document: Path) -> Iterator[str]:
    """Paths in backquotes or code blocks that start in a room of the repository, and the targets of relative links."""
    text = document.read_text(encoding="utf-8")
    rooms = r"(?:llmq|cpp|docs|eval|scripts|tests|\.ci)/"
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    yield from (found.rstrip(".:,") for found in re.findall(rf"(?<![\w./<-]){rooms}[\w./<>*{{}}-]*", code))
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        yield ((document.parent / target).resolve().relative_to(ROOT)).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documents_name_paths_that_exist(document: Path) -> None:
    for name in named_paths(document):
        if "<" not in name and "{" not in name:  # a place-holder, as in llmq/solvers/<name>.py
            assert list(ROOT.glob(name.rstrip("/"))), f"{relative(document)} names {name}, which does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documents_name_modules_that_exist(document: Path) -> None:
    for name in re.findall(r"python3? -m (llmq[\w.]*)", document.read_text(encoding="utf-8")):
        assert exists(name), f"{relative(document)} runs `python -m {name}`, which does not exist"


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_version_is_the_same_in_both_places() -> None:
    assert f'__version__ = "{project()["version"]}"' in (ROOT / "llmq" / "__init__.py").read_text(encoding="utf-8")


def pins() -> list[Requirement]:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements() -> list[Requirement]:
    """Dependencies and extras of pyproject.toml."""
    extras = project()["optional-dependencies"].values()
    return [Requirement(line) for line in [*project()["dependencies"], *(line for extra in extras for line in extra)]]


def test_every_dependency_is_pinned_inside_its_range() -> None:
    for requirement in requirements():
        found = [pin for pin in pins() if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert found, f"{requirement.name} is in pyproject.toml but constraints.txt pins no version of it"
        for pin in found:
            (version,) = (spec.version for spec in pin.specifier)
            assert requirement.specifier.contains(version), f"constraints.txt: {pin}; pyproject.toml: {requirement}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imported_packages_are_declared(path: Path) -> None:
    # Modules are named like their distributions, but for the dash and one exception.
    modules = {"llama_cpp_python": "llama_cpp"}
    names = (canonicalize_name(requirement.name).replace("-", "_") for requirement in requirements())
    declared = {modules.get(name, name) for name in names}
    siblings = {other.stem for other in path.parent.glob("*.py")} if path.parent.name in {"eval", "scripts"} else set()
    known = declared | siblings | sys.stdlib_module_names | {"llmq"}
    for line, name in imported_names(path):
        assert name.split(".")[0] in known, f"{relative(path)}:{line}: {name} is not declared in pyproject.toml"
