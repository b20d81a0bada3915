"""Calibration and evaluation text from the Hugging Face hub, through ``datasets``: one row a data set.

A data set that is downloaded whole stays in the cache of ``datasets``. A streamed one is kept here, as the rows read so
far (``$LLMQ_CACHE``, by default ``~/.cache/llmq``), so that the same run works again without a network.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.config import cache_folder, one_of

# Long enough for a slow line, short enough not to be taken for a hang.
PROBE_SECONDS = 4.0
OFFLINE_WAYS = "without a network use a file or folder (--calib FILE), 'self' or 'stdlib'"


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set: its name on the hub, the file of it that is read, and how its rows become one text.

    ``eval_rows`` caps the rows of an evaluation text (None: all of them).
    """

    split: str
    separator: str
    data_file: str | None = None
    eval_rows: int | None = None


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub.

    Attributes:
        path: repository id.
        splits: what the field calls train, validation, test -> the split that serves it.
        config: configuration name, or None.
        revision: branch of the repository, or None for the main one.
        column: column that holds the text.
        streaming: read row by row instead of downloading the whole.
        calibration: key of ``splits`` that calibration reads.
        codec: package that unpacks its files, or None.
    """

    path: str
    splits: dict[str, HubSplit]
    config: str | None = None
    revision: str | None = None
    column: str = "text"
    streaming: bool = False
    calibration: str = "train"
    codec: str | None = None

    def split(self, name: str) -> HubSplit:
        """The split called ``name``. Raises ValueError listing the known ones."""
        one_of(f"split of {self.path}", name, self.splits)
        return self.splits[name]

    def describe(self, name: str) -> str:
        """Exact identity of a split, for reports."""
        split = self.split(name)
        parts = (self.path, self.config, split.data_file, self.revision, split.split)
        return " ".join(p for p in parts if p)


def rows_folder() -> Path:
    """Folder of streamed rows: ``$LLMQ_CACHE/calibration``, by default ``~/.cache/llmq/calibration``."""
    return cache_folder() / "calibration"


def reachable() -> bool:
    """Whether the hub answers within PROBE_SECONDS; False at once when offline mode is set in the environment.

    Asked before every use: ``datasets`` alone retries an unreachable hub for half a minute and more.
    """
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return False
    answers: list[int] = []

    def probe() -> None:
        with suppress(Exception):  # whatever goes wrong, the hub did not answer
            session = huggingface_hub.get_session()
            answers.append(session.head(huggingface_hub.constants.ENDPOINT, timeout=PROBE_SECONDS).status_code)

    # A thread, because looking up a name ignores every timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers)


@contextmanager
def offline_mode() -> Iterator[None]:
    """Make ``datasets`` and ``huggingface_hub`` look into their caches only; both read these switches at each call."""
    import datasets
    import huggingface_hub

    places = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        setattr(place, "HF_HUB_OFFLINE", True)  # noqa: B010 (a module, whose attributes mypy takes for constants)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, "HF_HUB_OFFLINE", value)  # noqa: B010


def rows(hub: HubSet, name: str, notes: list[str] | None = None) -> Iterator[str]:
    """Texts of one split, in the order of the hub.

    Args:
        hub: row of the table.
        name: key of ``hub.splits``.
        notes: gets a line when the network is away and only rows read earlier can be given.

    Raises:
        ValueError: unknown split, or a package that is missing.
        FileNotFoundError: neither reachable nor cached, or not readable; says what works offline.
    """
    hub.split(name)
    for package in ("datasets", hub.codec):
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"data set {hub.path} needs the package {package}: pip install {package}; "
                "or use a file or folder (--calib FILE), 'self' or 'stdlib'"
            )
    return _streamed(hub, name, [] if notes is None else notes) if hub.streaming else _live(hub, name)


def _live(hub: HubSet, name: str) -> Iterator[str]:
    """The split as ``datasets`` gives it, from the hub or, when that does not answer, from its cache."""
    import datasets

    split = hub.split(name)
    optional = {
        "name": hub.config,
        "revision": hub.revision,
        "data_files": split.data_file and {split.split: split.data_file},
    }
    arguments: dict[str, Any] = {key: value for key, value in optional.items() if value}
    online = reachable()
    try:
        with nullcontext() if online else offline_mode():
            table = datasets.load_dataset(hub.path, split=split.split, streaming=hub.streaming, **arguments)
        for row in table:
            yield row[hub.column]
    except Exception as e:  # datasets raises anything from OSError to its own classes
        if online:
            raise FileNotFoundError(
                f"data set {hub.describe(name)} could not be read ({type(e).__name__}: {e}); {OFFLINE_WAYS}"
            ) from e
        looked = rows_folder() if hub.streaming else datasets.config.HF_DATASETS_CACHE
        raise FileNotFoundError(
            f"data set {hub.describe(name)}: the hub cannot be reached, and it is not in the cache {looked}; "
            f"{OFFLINE_WAYS}"
        ) from e


def _streamed(hub: HubSet, name: str, notes: list[str]) -> Iterator[str]:
    """Rows kept from earlier runs, then the live stream; what was read live is kept when the reader stops."""
    path = rows_folder() / f"{hub.path.replace('/', '--')}-{hub.split(name).split}.jsonl"
    kept = _kept(path)
    yield from kept
    if kept and not reachable():
        notes.append(f"the hub cannot be reached: only the {len(kept)} rows of {hub.path} read earlier were there")
        return
    fresh: list[str] = []
    try:
        for text in itertools.islice(_live(hub, name), len(kept), None):
            fresh.append(text)
            yield text
    finally:
        # A cache that cannot be written costs the next run a download, not this one its result.
        with suppress(OSError):
            _keep(path, fresh)


def _kept(path: Path) -> list[str]:
    """Rows of a cache file; an unreadable one counts as absent, for it can be read again."""
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError):
        return []


def _keep(path: Path, fresh: list[str]) -> None:
    """Add rows to a cache file, atomically."""
    if not fresh:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in [*_kept(path), *fresh]), encoding="utf-8")
    temporary.replace(path)
