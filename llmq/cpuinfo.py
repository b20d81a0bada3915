"""What Linux says of the CPU: its maker and its instruction sets."""

from __future__ import annotations

from pathlib import Path

LISTING = Path("/proc/cpuinfo")


def first_cpu(listing: Path = LISTING) -> dict[str, str]:
    """The lines of the first CPU by their names; empty where the system does not tell."""
    try:
        text = listing.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def vendor(listing: Path = LISTING) -> str:
    """What the CPU calls its maker, e.g. ``AuthenticAMD``; empty where the system does not tell."""
    return first_cpu(listing).get("vendor_id", "")


def flags(listing: Path = LISTING) -> set[str]:
    """The CPU's instruction sets by Linux's names; empty where the system does not tell."""
    info = first_cpu(listing)
    return set((info.get("flags") or info.get("Features") or "").split())
