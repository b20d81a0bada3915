"""Quantize into the formats of other tools: the native folder first, then each of the others from its integers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.checkpoint import check_output
from llmq.config import QuantScheme
from llmq.conversion import convert
from llmq.dialects.targets import TARGETS
from llmq.models.load import open_model
from llmq.models.resolve import resolve
from llmq.pipeline import quantize_model
from llmq.report import silent
from llmq.request import default_output

NATIVE = "llmq"


def check_exports(model: str, scheme: QuantScheme, formats: Sequence[str], *, by_module: bool) -> None:
    """Raise before the long work where a format will not hold the linears of ``model`` in ``scheme``.

    With schemes ``by_module`` only what is true of every scheme is known before; the conversion says the rest.

    Raises:
        ValueError: names format, linear and reason.
    """
    source = open_model(resolve(model, log=silent).folder)
    for name in formats:
        target = TARGETS[name]
        if name == "gguf" and not scheme.sym:
            raise ValueError(f"--format gguf holds symmetric grids exactly (Q4_0, Q8_0); {scheme} is none: add --sym")
        if by_module:
            continue
        for block in range(len(source.block_names)):
            for linear, shape in source.block_linears(block).items():
                full = f"{source.block_names[block]}.{linear}"
                row = target.row({full: scheme})
                reason = target.refusal(full, shape, scheme, row, source.embed_name)
                if reason is not None:
                    raise ValueError(f"--format {name} cannot hold {full}: {reason}")


def paths(output: str | Path, formats: Sequence[str]) -> dict[str, Path]:
    """Where each format goes: a single one to ``output``, of several llmq does, the others get their name added."""
    out = Path(output)
    several = len(formats) > 1
    found = {}
    for name in formats:
        path = out.with_name(f"{out.name}-{name}") if several and name not in (NATIVE, "gguf") else out
        if name == "gguf" and path.suffix != ".gguf":
            path = path.with_name(f"{path.name}.gguf")
        found[name] = path
    return found


def quantize_to(
    formats: Sequence[str],
    model: str,
    scheme: QuantScheme,
    *,
    output: str | Path | None,
    head_bits: int | None,
    overwrite: bool,
    log: Any,
    **options: Any,
) -> Path:
    """``quantize_model``, then a conversion for each of ``formats``; returns the first one's folder or file.

    Args:
        formats: keys of ``TARGETS``.
        model, scheme, output, overwrite, log, options: as :func:`llmq.pipeline.quantize_model` takes them.
        head_bits: as there; None: 8, or 16 where a format has no quantized embedding.

    Raises:
        As quantize_model; ValueError for a conversion that is not exact. The native folder is then kept, and named.
    """
    tables = all(TARGETS[name].embeddings for name in formats)
    bits = head_bits if head_bits is not None else 8 if tables else 16
    budget = options.get("budget")
    out = output or default_output(model, scheme, budget)
    places = paths(out, formats)
    common: dict[str, Any] = {**options, "head_bits": bits, "overwrite": overwrite, "log": log}
    if list(formats) == [NATIVE]:
        return quantize_model(model, scheme, output=output, **common).folder
    for name, path in places.items():
        if name != NATIVE and path.suffix != ".gguf":
            check_output(path.absolute(), overwrite=overwrite)
        elif path.suffix == ".gguf" and path.exists() and not overwrite:
            raise FileExistsError(f"output file {path} exists; use --overwrite to replace it")
    if NATIVE in places:
        native = quantize_model(model, scheme, output=places[NATIVE], **common).folder
        _convert_all(native, places, overwrite, log)
        return places[formats[0]]
    parent = Path(out).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{Path(out).name}.llmq-", dir=parent))
    try:
        native = quantize_model(model, scheme, output=scratch / Path(out).name, **common).folder
        try:
            _convert_all(native, places, overwrite, log)
        except (ValueError, OSError) as error:
            kept = Path(f"{out}-llmq")
            if kept.exists():
                raise
            native.replace(kept)
            raise ValueError(f"{error}. What was quantized is kept, in llmq's format, in {kept}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return places[formats[0]]


def _convert_all(native: Path, places: dict[str, Path], overwrite: bool, log: Any) -> None:
    for name, path in places.items():
        if name != NATIVE:
            log(f"writing {path} ({name})")
            convert(native, path, name, overwrite=overwrite, log=log)
