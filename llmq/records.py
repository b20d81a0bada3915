"""Records of long measurements, as ``--json`` keeps them: plain JSON, whole at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_record(path: Path, record: Record) -> None:
    """Write under a temporary name, then rename: whoever stops the run keeps what was measured."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_record(path: Path, fields: Iterable[str]) -> Record:
    """A record written by ``--json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or lacks one of ``fields``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--read: there is no file {path}")
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a file written by --json") from error
    lacking = set(fields) - set(record if isinstance(record, dict) else ())
    if lacking:
        raise ValueError(f"{path} has no {', '.join(sorted(lacking))}; give a file written by --json")
    found: Record = record
    return found
