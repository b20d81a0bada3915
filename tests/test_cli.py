"""The command llmq: hands over to the commands it names, and says what it knows."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from llmq import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_gets_the_rest_of_the_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = importlib.import_module(f"llmq.{name}")
    monkeypatch.setattr(module, "main", lambda argv: seen.append(argv) or 7)
    assert cli.main([name, "a", "--help"]) == 7
    monkeypatch.setattr(sys, "argv", ["llmq", name, "b"])
    assert cli.main() == 7
    assert seen == [["a", "--help"], ["b"]]


@pytest.mark.parametrize(("argv", "said"), [([], "no command was given"), (["quantise"], "no command 'quantise'")])
def test_a_command_that_is_none(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "known: quantize, convert, diff" in shown


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert all(f"  {name}" in capsys.readouterr().out for name in ["quantize"])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llmq 0.")


def test_it_is_installed() -> None:
    command = Path(sys.executable).parent / "llmq"
    if not command.exists():
        pytest.skip("llmq is not installed here, only imported")
    done = subprocess.run(
        [command, "convert", "/no/such/model", "out", "--format", "gptq"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "/no/such/model" in done.stderr
