"""FORMATS: one row a way to store a QTensor as named tensors. A new format is a file and a row."""

from __future__ import annotations

from types import ModuleType

from llmq.formats import native

FORMATS: dict[str, ModuleType] = {"llmq": native}
