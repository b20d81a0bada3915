"""SOURCES: one row a calibration text. A new data set is a new row, nothing else names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmq.calibration import files, stdlib_text
from llmq.calibration.hub import HubSet, HubSplit, rows
from llmq.calibration.windows import Text


@dataclass(frozen=True)
class Source:
    """A text that windows are cut from.

    Attributes:
        about: what it is, for help and error texts.
        describe: gives the exact identity for reports.
        texts: gives the texts in order, and may add lines for the report to its argument; None: the model itself
            writes the windows.
        separator: what joins two texts.
        huge: read only as far as the windows need, and little further.
        hub: the data set, for a row that comes from the hub.
    """

    about: str
    describe: Callable[[], str]
    texts: Callable[[list[str]], Iterator[Text]] | None
    separator: str = "\n\n"
    huge: bool = False
    hub: HubSet | None = None


def _from_hub(about: str, hub: HubSet) -> Source:
    name = hub.calibration
    return Source(
        about,
        lambda: hub.describe(name),
        lambda notes: rows(hub, name, notes),
        separator=hub.split(name).separator,
        huge=hub.streaming,
        hub=hub,
    )


def from_files(name: str) -> Source:
    """The row made for a file, folder or glob; ``texts`` raises what :func:`files.expand` and the readers raise."""
    found = files.expand(name)
    label = name if len(found) == 1 and str(found[0]) == name else f"{name} ({len(found)} files)"
    return Source("local files", lambda: label, lambda _: files.read(found))


SOURCES: dict[str, Source] = {
    "wikitext2": _from_hub(
        "WikiText-2 raw, train split",
        HubSet(
            "Salesforce/wikitext",
            {name: HubSplit(name, "\n\n") for name in ("train", "validation", "test")},
            config="wikitext-2-raw-v1",
        ),
    ),
    "c4": _from_hub(
        "C4 English, first shard",
        HubSet(
            "allenai/c4",
            {
                "train": HubSplit("train", "\n\n", "en/c4-train.00000-of-01024.json.gz"),
                # C4 has no test split: the field scores the first 1,100 validation rows (GPTQ, "c4-new").
                "validation": HubSplit("validation", " ", "en/c4-validation.00000-of-00008.json.gz", eval_rows=1100),
                "test": HubSplit("validation", " ", "en/c4-validation.00000-of-00008.json.gz", eval_rows=1100),
            },
            streaming=True,
        ),
    ),
    "pileval": _from_hub(
        "validation split of The Pile (as AWQ uses it)",
        HubSet(
            "mit-han-lab/pile-val-backup",
            {"validation": HubSplit("validation", "\n\n", eval_rows=1100)},
            streaming=True,
            calibration="validation",
            codec="zstandard",
        ),
    ),
    "ptb": _from_hub(
        "Penn Treebank, train split",
        HubSet(
            "ptb-text-only/ptb_text_only",
            {name: HubSplit(name, " ") for name in ("train", "validation", "test")},
            # The main branch holds a loading script, which datasets no longer runs; this branch holds the tables.
            revision="refs/convert/parquet",
            column="sentence",
        ),
    ),
    "self": Source("text sampled from the model itself", lambda: "sampled from the model itself", None),
    "stdlib": Source("documentation that ships with Python", stdlib_text.name, lambda _: stdlib_text.texts()),
}
