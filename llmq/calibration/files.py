"""Calibration text from local files: one row a file kind, and the paths a name stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmq.calibration.windows import Text

# Fields of a record that hold its text, the first one present wins.
RECORD_FIELDS = ("text", "messages")
GLOB_CHARS = frozenset("*?[")


def decode(path: Path) -> str:
    """The file's text as it stands (UTF-8, a byte order mark dropped).

    Raises:
        ValueError: not UTF-8; names the offset in bytes.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); save it as UTF-8") from None


def _value(value: Any, where: str) -> Text:
    """The text of a record's field: a string, or a list of messages with a role."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value):
        return value
    raise ValueError(f"{where} holds {type(value).__name__}; expected a string or a list of messages with a 'role'")


def _record(record: Any, where: str) -> Text:
    """The text of one JSON record: a plain string, or an object with one of RECORD_FIELDS."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(
            f"{where} is {type(record).__name__}; expected a string or an object with 'text' or 'messages'"
        )
    name = next((f for f in RECORD_FIELDS if f in record), None)
    if name is None:
        raise ValueError(f"{where} has the fields {sorted(record)}; it needs 'text' or 'messages'")
    return _value(record[name], f"{where}, field {name!r}")


def _read_txt(path: Path) -> Iterator[Text]:
    yield decode(path)


def _read_jsonl(path: Path) -> Iterator[Text]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as e:  # both bad JSON and bad UTF-8
                raise ValueError(f"{where} is not JSON ({e}); a .jsonl file holds one JSON object a line") from None
            yield _record(record, where)


def _read_json(path: Path) -> Iterator[Text]:
    try:
        records = json.loads(decode(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON ({e}); a file with one object a line must be named .jsonl") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} holds {type(records).__name__}; a .json file must hold a list of records or strings")
    for number, record in enumerate(records):
        yield _record(record, f"{path}, record {number}")


def _read_parquet(path: Path) -> Iterator[Text]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow, or save the text as .jsonl") from None
    try:
        table = pq.ParquetFile(path)
    except (OSError, ValueError) as e:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} is not a readable parquet file ({e})") from None
    columns = table.schema_arrow.names
    name = next((f for f in RECORD_FIELDS if f in columns), None)
    if name is None:
        raise ValueError(f"{path} has the columns {sorted(columns)}; it needs 'text' or 'messages'")
    for batch in table.iter_batches(batch_size=256, columns=[name]):
        for value in batch.column(0).to_pylist():
            if value is not None:
                yield _value(value, f"{path}, column {name!r}")


READERS: dict[str, Callable[[Path], Iterator[Text]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def looks_like_path(name: str) -> bool:
    """Whether ``name`` can only be meant as a file, folder or glob: it exists, has a glob sign or a known ending."""
    path = Path(name).expanduser()
    return path.exists() or bool(GLOB_CHARS & set(name)) or path.suffix.lower() in READERS


def expand(name: str) -> list[Path]:
    """The files that ``name`` (file, folder, or glob with ``**``) stands for, sorted; a folder is searched in depth.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file of a kind that has no reader; a folder without any that has.
    """
    kinds = ", ".join(READERS)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in READERS)
        if not files:
            raise ValueError(f"folder {name} holds no calibration text; files that are read: {kinds}")
        return files
    if path.is_file():
        files = [path]
    elif GLOB_CHARS & set(name):
        base = Path(path.anchor)
        files = sorted(p for p in base.glob(str(path.relative_to(base))) if p.is_file())
        if not files:
            raise FileNotFoundError(f"no file matches calibration text {name!r}; quote the pattern, or give a folder")
    else:
        raise FileNotFoundError(f"calibration file {name} does not exist; give a file ({kinds}), a folder or a glob")
    bad = next((p for p in files if p.suffix.lower() not in READERS), None)
    if bad is not None:
        raise ValueError(f"calibration file {bad} ends in {bad.suffix or 'nothing'!r}; endings that are read: {kinds}")
    return files


def read(files: list[Path]) -> Iterator[Text]:
    """The texts of ``files``, in order."""
    for path in files:
        yield from READERS[path.suffix.lower()](path)
