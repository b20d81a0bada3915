"""DIALECTS: one row a kind of quantized folder, by its config's ``quant_method``. A new dialect is a file and a row.

A dialect finds the quantized matrices of a folder and gives each as a QTensor; the tensors' laws are those of
``llmq.formats``. What the files hold decides, where it contradicts the config in a way that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.config import one_of
from llmq.dialects import awq, compressed_tensors, gptq, mlx, native
from llmq.dialects.stored import INEXACT, Found, Stored
from llmq.models.families import family_of
from llmq.models.load import check_depth
from llmq.models.reader import WeightReader, read_json

Find = Callable[..., Found]

DIALECTS: dict[str, Find] = {
    "llmq": native.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "compressed-tensors": compressed_tensors.find,
    "mlx": mlx.find,
}


@dataclass
class QuantizedFolder:
    """An open quantized folder.

    Attributes:
        folder: where it lies.
        dialect: a key of ``DIALECTS``.
        config: its config.json.
        matrices: every quantized matrix, by module.
        tied: module -> module whose matrix it uses.
        reader: all stored tensors.
    """

    folder: Path
    dialect: str
    config: dict[str, Any]
    matrices: dict[str, Stored]
    tied: dict[str, str]
    reader: WeightReader

    @property
    def notes(self) -> list[str]:
        """A line for every matrix whose numbers were changed."""
        return [f"{name}: {m.note}" for name, m in self.matrices.items() if m.note]

    def others(self) -> list[str]:
        """Names of the tensors that belong to no quantized matrix."""
        own = {name for m in self.matrices.values() for name in m.tensors}
        return sorted(self.reader.names() - own)


def quantization_block(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(dialect, its block) of a config.json; None for a model that is not quantized.

    Raises:
        ValueError: a method that has no row; lists those that have.
    """
    block = config.get("quantization_config")
    if block is None and isinstance(config.get("text_config"), dict):
        block = config["text_config"].get("quantization_config")
    if block is not None and not isinstance(block, dict):
        raise ValueError(f"quantization_config is a {type(block).__name__}; an object was expected")
    plain = config.get("quantization")
    if isinstance(plain, dict) and (block is None or "quant_method" not in block):
        return "mlx", plain
    if block is None:
        return None
    method = block.get("quant_method")
    one_of("quant_method", method, DIALECTS)
    return str(method), block


def open_quantized(folder: Path, *, inexact: str = "refuse") -> QuantizedFolder:
    """Open a quantized folder without reading its codes.

    Args:
        folder: the folder.
        inexact: what happens to numbers that no QTensor holds: ``refuse`` or ``requantize`` (see ``notes``).

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: a folder that is not quantized or damaged; names the tensor and the numbers.
        Inexact: numbers that no QTensor holds, under ``refuse``; a ValueError.
    """
    one_of("inexact", inexact, INEXACT)
    folder = Path(folder)
    config = read_json(folder / "config.json")
    try:
        found = quantization_block(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if found is None:
        raise ValueError(f"{folder} is not quantized: its config.json has no quantization_config")
    dialect, block = found
    family = family_of(str(config.get("model_type")))
    reader = WeightReader(folder, renames=family.key_renames if family else ())
    check_depth(config, len(reader.names()), str(folder))
    got = DIALECTS[dialect](reader, block, where=str(folder), inexact=inexact)
    if not got.matrices:
        raise ValueError(f"{folder}: config.json says {dialect}, but the files hold no quantized matrix of that kind")
    return QuantizedFolder(folder, dialect, config, got.matrices, got.tied, reader)


__all__ = ["DIALECTS", "INEXACT", "QuantizedFolder", "Stored", "open_quantized", "quantization_block"]
