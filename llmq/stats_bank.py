"""A bank of statistics: what the original model feeds its linears, collected once, for any number of later runs.

A run solves each block on what the quantized blocks before it give. Those streams depend on every choice that was made,
so they cannot be kept. What can be kept is the sum of x x^T over the original model's inputs: it depends on model and
text alone, and sums over parts of a text add up. A run from a bank needs no forward pass, and cannot take the steps of
the recipe that need the streams (:data:`BANKED_STEPS` are those it can).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmq.blockwise import BlockRunner, Observed, block_inputs, listening
from llmq.calibration import CalibrationSet
from llmq.checkpoint import check_output, disk_errors
from llmq.models.digest import model_digest, tokenizer_digest
from llmq.models.load import SourceModel, materialize
from llmq.report import Log, duration, versions
from llmq.solvers.hessian import InputStats

BANK_NAME = "bank.json"
BANK_VERSION = 2
# Steps of the recipe that look at a linear's inputs only, not at what the quantized model makes of them.
BANKED_STEPS = ("refit", "descent", "restarts", "damping")
# Every so many windows one is held out to judge the steps. By its number, so that parts of a text that are multiples
# of it hold out the same windows as the whole.
HELD_EVERY = 8
PARTS = ("train", "held")


@dataclass(frozen=True)
class Bank:
    """Statistics of a model's linears, on disk; several folders count as one.

    Attributes:
        folders: as given.
        tokens: calibration tokens, held-out ones included.
        calibration: provenance of each text.
    """

    folders: tuple[Path, ...]
    tokens: int
    calibration: tuple[dict[str, Any], ...]

    def observed(self, linear: str, *, judged: bool) -> Observed:
        """Statistics of the group that begins with ``linear`` (its full name); unless ``judged``, nothing is held out.

        Raises ValueError for a damaged folder; names it.
        """
        train, held = (_sum([_read(folder, linear, part) for folder in self.folders]) for part in PARTS)
        if judged and held.n_tokens:
            return Observed(train, held)
        train.include(held)
        return Observed(train)

    def to_json(self) -> dict[str, Any]:
        """For a report: folders, tokens, texts."""
        return {"folders": [str(f) for f in self.folders], "tokens": self.tokens, "calibration": list(self.calibration)}

    def describe(self) -> str:
        """Where the statistics come from, in words."""
        return f"statistics of {self.tokens} tokens in {', '.join(map(str, self.folders))}"


def held_windows(n: int) -> list[int]:
    """Numbers of the windows that are held out of ``n``: every eighth; of fewer the last; of one none."""
    return list(range(HELD_EVERY - 1, n, HELD_EVERY)) or ([n - 1] if n > 1 else [])


def check_bank_output(folder: Path) -> None:
    """Raise FileExistsError (or what ``check_output`` raises) if a bank cannot be written to ``folder``."""
    if folder.exists():
        raise FileExistsError(f"--save-stats {folder} exists; name a new folder (banks are merged with --stats A,B)")
    check_output(folder.absolute(), overwrite=False)


@torch.no_grad()
def collect(source: SourceModel, texts: CalibrationSet, folder: Path, sink_share: float, log: Log) -> None:
    """Run the original model over the windows of ``texts``, block by block, and write the bank ``folder``.

    Raises ValueError for inputs that are not finite; nothing is left behind then.
    """
    check_bank_output(folder)
    start, held = time.perf_counter(), set(held_windows(len(texts.tokens)))
    hidden, calls = block_inputs(source, texts.tokens)
    with _Partial(folder) as partial:
        for i, name in enumerate(source.block_names):
            with materialize(source.block(i), name, source.reader) as block:
                found = _observe(BlockRunner(block, calls[i], hidden, {}, sink_share=sink_share), source.groups, held)
            tensors: dict[str, Tensor] = {}
            for (linear, part), stats in found.items():
                if part == "train":
                    stats.hessian(f"{name}.{linear}")  # finite, and of some token
                tensors |= _tensors(f"{name}.{linear}.{part}", stats)
            _write_block(partial, name, tensors)
            left = (time.perf_counter() - start) / (i + 1) * (len(source.block_names) - i - 1)
            log(f"  statistics of block {i + 1}/{len(source.block_names)}  left {duration(left)}")
        about = {
            "version": BANK_VERSION,
            "model_digest": model_digest(source.folder),
            "tokenizer_digest": tokenizer_digest(source.tokenizer),
            "tokens": texts.tokens.numel(),
            "sink_share": sink_share,
            "calibration": [texts.provenance()],
            "producer": f"llmq {versions()['llmq']}",
        }
        _write_about(partial, about)


def _observe(runner: BlockRunner, groups: Sequence[Sequence[str]], held: set[int]) -> dict[tuple[str, str], InputStats]:
    """Statistics by (first linear of a group, part) in one pass, which also advances the runner."""
    found: dict[tuple[str, str], InputStats] = {}
    part = PARTS[0]

    def hear(name: str) -> Callable[[Tensor], None]:
        return lambda x: found[name, part].add(x)

    with ExitStack() as stack:
        for first, *_ in groups:
            linear = runner.block.get_submodule(first)
            assert isinstance(linear, nn.Linear)
            found |= {(first, p): InputStats(linear.in_features, sink_share=runner.sink_share) for p in PARTS}
            stack.enter_context(listening(linear, hear(first)))
        for i in range(len(runner.hidden)):
            part = PARTS[i in held]
            runner.hidden[i] = runner.run(i)
    return found


def open_bank(text: str, source: SourceModel, sink_share: float) -> Bank:
    """The bank in the folders of ``text``, separated by commas.

    Raises:
        FileNotFoundError: no bank there.
        ValueError: of another model, tokenizer or ``sink_share``, of too few tokens for the model's linears, or the
            same text twice; names the folder and both values.
    """
    folders = tuple(Path(part) for part in text.split(",") if part)
    abouts = [_about(folder) for folder in folders]
    want = {"model_digest": model_digest(source.folder), "tokenizer_digest": tokenizer_digest(source.tokenizer)}
    for folder, about in zip(folders, abouts, strict=True):
        for key, what in (("model_digest", "model"), ("tokenizer_digest", "tokenizer")):
            if about[key] != want[key]:
                raise ValueError(
                    f"--stats {folder} holds statistics of another {what} (digest {about[key]}; {source.folder} has "
                    f"{want[key]}): collect them anew with --save-stats"
                )
        if about["sink_share"] != sink_share:
            raise ValueError(
                f"--stats {folder} was collected with --sink-share {about['sink_share']:g}, this run asks for "
                f"{sink_share:g}: ask for the same, or collect anew with --save-stats"
            )
    bank = _joined(folders, abouts)
    k, name = max((k, name) for name, (_, k) in source.block_linears(0).items())
    if bank.tokens < k:
        raise ValueError(
            f"--stats {text} holds {bank.tokens} tokens, fewer than the {k} inputs of {name}: collect at least {k} "
            f"(--nsamples, --seqlen), or add other folders: --stats A,B"
        )
    return bank


def merge(folders: Sequence[Path], out: Path) -> None:
    """Write the bank ``out``, the sum of ``folders``. Raises as :func:`open_bank`, and for banks that differ."""
    check_bank_output(out)
    abouts = [_about(folder) for folder in folders]
    for folder, about in zip(folders[1:], abouts[1:], strict=True):
        for key in ("model_digest", "tokenizer_digest", "sink_share"):
            if about[key] != abouts[0][key]:
                raise ValueError(
                    f"{folder} has the {key} {about[key]}, {folders[0]} has {abouts[0][key]}; "
                    "only banks of one model, collected alike, add up"
                )
    bank = _joined(tuple(folders), abouts)
    with _Partial(out) as partial:
        for file in sorted(folders[0].glob("*.safetensors")):
            with safe_open(file, framework="pt") as f:
                linears = dict.fromkeys(name.rsplit(".", 2)[0] for name in f.keys())  # noqa: SIM118 - not a dict
            tensors: dict[str, Tensor] = {}
            for linear in linears:
                for part in PARTS:
                    stats = _sum([_read(folder, linear, part) for folder in folders])
                    tensors |= _tensors(f"{linear}.{part}", stats)
            _write_block(partial, file.stem, tensors)
        _write_about(partial, abouts[0] | {"tokens": bank.tokens, "calibration": list(bank.calibration)})


def _joined(folders: tuple[Path, ...], abouts: list[dict[str, Any]]) -> Bank:
    texts = [text for about in abouts for text in about["calibration"]]
    seen = [text["sha256"] for text in texts]
    for text in texts:
        if seen.count(text["sha256"]) > 1:
            raise ValueError(
                f"--stats {','.join(map(str, folders))}: the text {text['source']} (sha256 {text['sha256'][:12]}) "
                "is in it twice; give each part once"
            )
    return Bank(folders, sum(about["tokens"] for about in abouts), tuple(texts))


def _about(folder: Path) -> dict[str, Any]:
    path = folder / BANK_NAME
    if not path.is_file():
        raise FileNotFoundError(f"--stats {folder} is no bank: it has no {BANK_NAME}; write one with --save-stats")
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--stats {folder}: {BANK_NAME} is damaged ({error}); collect the statistics anew") from error
    if about.get("version") != BANK_VERSION:
        raise ValueError(f"--stats {folder} has version {about.get('version')}, this llmq reads {BANK_VERSION}")
    return about


class _Partial:
    """A folder under a temporary name; renamed at the end, removed after an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.partial-", dir=self.folder.parent))
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            umask = os.umask(0o077)
            os.umask(umask)
            self.path.chmod(0o777 & ~umask)
            self.path.replace(self.folder)
        shutil.rmtree(self.path, ignore_errors=True)


def _tensors(name: str, stats: InputStats) -> dict[str, Tensor]:
    """What is stored: the upper triangle of H in fp32 (off by 6e-8, far below any damping), the sums in fp64."""
    rows, columns = torch.triu_indices(*stats.H.shape)
    counts = torch.tensor([stats.n_tokens, stats.n_dropped])
    return {
        f"{name}.H": stats.H[rows, columns].float(),
        f"{name}.abs_sum": stats.abs_sum,
        f"{name}.abs_max": stats.abs_max,
        f"{name}.counts": counts,
    }


def _write_block(folder: Path, block: str, tensors: dict[str, Tensor]) -> None:
    with disk_errors(folder):
        save_file(tensors, folder / f"{block}.safetensors", {"format": "pt"})


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / BANK_NAME).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(folder: Path, linear: str, part: str) -> InputStats:
    name = f"{linear}.{part}"
    try:
        for file in folder.glob("*.safetensors"):
            if linear.startswith(f"{file.stem}."):
                with safe_open(file, framework="pt") as f:
                    H, abs_sum, abs_max, counts = (
                        f.get_tensor(f"{name}.{key}") for key in ("H", "abs_sum", "abs_max", "counts")
                    )
                stats = InputStats(len(abs_sum))
                rows, columns = torch.triu_indices(len(abs_sum), len(abs_sum))
                stats.H[rows, columns] = H.double()
                stats.H[columns, rows] = H.double()
                stats.abs_sum, stats.abs_max = abs_sum, abs_max
                stats.n_tokens, stats.n_dropped = counts.tolist()
                return stats
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"--stats {folder}: {name} cannot be read ({error}); collect the statistics anew") from error
    raise ValueError(f"--stats {folder} has no statistics of {linear}; it is incomplete: collect them anew")


def _sum(parts: list[InputStats]) -> InputStats:
    for other in parts[1:]:
        parts[0].include(other)
    return parts[0]
