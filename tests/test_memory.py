"""What a process says of its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmq import memory

MIB = 1 << 20
SLACK = MIB  # Linux counts pages by CPU, and adds them up now and then


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process itself held at most")
def test_the_peak_is_the_processs_own() -> None:
    """A process that a large one starts is not charged with what that one holds."""
    ballast = bytearray(300 * MIB)
    ballast[:: 1 << 12] = b"1" * len(ballast[:: 1 << 12])  # every page, so that they are there
    code = f"import runpy; m = runpy.run_path({memory.__file__!r}); print(m['peak_rss'](), m['current_rss']())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, now = map(int, run.stdout.split())
    assert memory.peak_rss() + SLACK >= memory.current_rss() >= len(ballast)
    assert 4 * MIB < now <= peak + SLACK < 150 * MIB


def test_the_peak_stays_when_memory_is_given_back() -> None:
    ballast = bytearray(200 * MIB)
    ballast[:: 1 << 12] = b"1" * len(ballast[:: 1 << 12])
    high = memory.current_rss()
    del ballast
    memory.release_memory()
    assert memory.current_rss() < high - 150 * MIB
    assert memory.peak_rss() >= high - SLACK


def test_a_process_that_is_not_there_has_no_peak(tmp_path: Path) -> None:
    assert memory.peak_of(str(tmp_path)[1:]) == 0
