"""What tells one model, or one tokenizer, from another: short digests of their contents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Weights are sampled, so that a digest takes no longer than opening the files: so many bytes out of each stride.
SAMPLE, STRIDE = 1 << 14, 1 << 22
# A text on which tokenizers of one vocabulary may still differ: case, spaces, digits, accents, line ends.
PROBE = "The quick brown fox,\n  12 km away: naïve?"


def model_digest(folder: Path) -> str:
    """16 hex digits of a folder's weights: the headers of its safetensors files, their sizes, and samples of them.

    Models of one shape that were trained differently differ in every sample. The files' names do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for at in range(0, size, STRIDE):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits of a tokenizer: its vocabulary with the ids, and what it makes of a probe, BOS included."""
    content = [sorted(tokenizer.get_vocab().items()), list(tokenizer(PROBE)["input_ids"])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
