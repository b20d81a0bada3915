"""English text that every CPython carries: its own documentation.

First the language reference topics of ``pydoc_data`` (about 65,000 words), then the docstrings of the standard
library's top-level modules (about 110,000), read from their source without importing them. The text is that of the
running Python version: another version gives other windows, and the provenance says which one it was.
"""

from __future__ import annotations

import ast
import importlib
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

# Shorter docstrings are mostly signatures and labels, not prose.
MIN_DOC_WORDS = 12
_RULE = re.compile(r"[*=\-~^\"#]{3,}")
_ITEM = re.compile(r"([*+-]|\d+\.) ")


def _unwrap(block: str) -> str:
    """One block without blank lines: prose and list items become one line each, indented blocks (code) stay."""
    lines = [line.rstrip() for line in block.split("\n") if not _RULE.fullmatch(line.strip())]
    if not lines or lines[0].startswith(" "):
        return "\n".join(lines)
    joined: list[str] = []
    for line in lines:
        continues = joined and not _ITEM.match(line) and not line.startswith("    ")
        if continues:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return "\n".join(joined)


def clean(text: str) -> str:
    """Documentation source to plain text: underlines of headings dropped, hard-wrapped paragraphs joined."""
    blocks = (_unwrap(block) for block in re.split(r"\n[ \t]*\n", text.strip("\n")))
    return "\n\n".join(block for block in blocks if block.strip())


def topic_texts() -> Iterator[str]:
    """The topics of ``pydoc_data``, cleaned, in alphabetical order.

    Raises:
        ValueError: this Python comes without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ValueError(
            f"calibration text 'stdlib' needs the module pydoc_data, and Python at {sys.executable} comes without it; "
            "give a text file, a folder, or 'self'"
        ) from None
    for name in sorted(topics):
        yield clean(topics[name])


@lru_cache(maxsize=1)
def docstring_texts() -> tuple[str, ...]:
    """One text for each standard-library module with docstrings, in alphabetical order; repeated docstrings once.

    A Python whose library is stored without source gives an empty tuple.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    texts = []
    for name in sorted(sys.stdlib_module_names):
        path = root / f"{name}.py"
        if not path.is_file():
            continue
        kept = []
        for doc in _docstrings(ast.parse(path.read_bytes())):
            if doc not in seen and len(doc.split()) >= MIN_DOC_WORDS:
                seen.add(doc)
                kept.append(clean(doc))
        if kept:
            texts.append("\n\n".join(kept))
    return tuple(texts)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Docstrings of a module and of the classes and functions in it, in the order of the source."""
    doc = ast.get_docstring(node)
    if doc:
        yield doc
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def texts() -> Iterator[str]:
    """Topics, then docstrings; the topics alone if the library's source is not there."""
    yield from topic_texts()
    yield from docstring_texts()


def name() -> str:
    """What a report calls this text, with the version that decides its content."""
    return f"Python {platform.python_version()} documentation (pydoc topics, standard library docstrings)"
