"""Memory of a process: what it holds, the most it held, and giving back what was freed."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    # Not ``ru_maxrss`` where the system says it better: that begins with what the process that started this one held.
    peak = peak_of("self")
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(process: int | str) -> int:
    """Largest resident memory of a process so far, bytes; 0 where /proc does not say or the process has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def current_rss() -> int:
    """Resident memory of this process now, bytes (the peak where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_rss()
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def release_memory() -> None:
    """Give what was freed back to the system, where the C library keeps it (glibc does)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
