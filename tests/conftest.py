"""Fixtures shared by all tests: tiny random models of every family, and the text data."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# No test downloads anything: without these a missing file costs minutes of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(family, **options)``: folder of a tiny random model, made once a session. Do not write to it.

    Options are those of ``make_tiny_model`` in scripts/make_tiny_model.py: seed, tied, shard_size, blocks.
    """
    make = load_script("make_tiny_model").make_tiny_model
    made: dict[str, Path] = {}

    def get(family: str, **options: object) -> Path:
        key = " ".join([family, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if key not in made:
            made[key] = make(family, tmp_path_factory.mktemp(family) / family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of wikitext2-test.txt and wikitext2-valid.txt; skips the test where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "wikitext2-test.txt").is_file():
        pytest.skip("needs wikitext2-test.txt and wikitext2-valid.txt in ../shared/data beside the repository")
    return folder
