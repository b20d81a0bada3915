"""The files of OpenVINO and ONNX Runtime GenAI, made of the checkpoint by their own tools, and the widths in them.

``python -m llmq.bench.peer_files FOLDER OUT SCRATCH`` runs the builder of ONNX Runtime GenAI: in a process of its own,
because the builder changes the import path and keeps the whole model in memory.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPENVINO_MODEL = "openvino_model.xml"
ONNX_MODEL = "model.onnx"
# 4 bits, one scale for 32 weights: the builder's own default, as Q4_0. Only the last position's logits, as the others.
ONNX_OPTIONS = ("block_size=32", "accuracy_level=4", "prune_lm_head=true")
# Symmetric 4 bits, one scale for 32 weights, in every block; the exporter keeps the embedding and the head at 8.
OPENVINO_OPTIONS = (
    *("--task", "text-generation-with-past", "--weight-format", "int4"),
    *("--sym", "--group-size", "32", "--ratio", "1.0"),
)
# Beginnings of the names of rope tables, of which a token reads one row (Gemma 3 has a local and a global pair).
ROWS_ONLY = ("cos_cache", "sin_cache")


class ToolFailed(RuntimeError):
    """The tool of another engine could not make its file; that engine alone is left out."""


def make_onnx(folder: Path, path: Path) -> None:
    """Build the folder ``path`` for ONNX Runtime GenAI. Raises ToolFailed with the builder's last words."""
    scratch = path.with_name(f"{path.name}-scratch")
    _tool("llmq.bench.peer_files", str(folder), str(path), str(scratch))
    if scratch.is_dir():
        scratch.rmdir()


def make_openvino(folder: Path, path: Path) -> None:
    """Export the folder ``path`` for OpenVINO GenAI. Raises ToolFailed with the exporter's last words."""
    _tool("optimum.commands.optimum_cli", "export", "openvino", "--model", str(folder), *OPENVINO_OPTIONS, str(path))


def _tool(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolFailed(f"python -m {module} ended with code {run.returncode}: {last[:300]}")


def flat_rope(config: Any) -> Any:
    """``config`` with the rope of each kind of layer in the fields that transformers 4 had and the builder reads.

    The builder of onnxruntime-genai 0.18 looks for one ``rope_type`` for the model and for ``rope_local_base_freq``, so
    a Gemma 3 config of transformers 5 stops it with a KeyError. Raises ValueError for a rope that is scaled, which
    these fields do not say.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" not in rope:
        return config
    scaled = {kind: row["rope_type"] for kind, row in rope.items() if row.get("rope_type", "default") != "default"}
    if scaled:
        raise ValueError(f"the builder of ONNX Runtime GenAI cannot be told of a rope per kind of layer: {scaled}")
    config.rope_parameters = {"rope_type": "default"}
    config.rope_theta = rope["full_attention"]["rope_theta"]
    config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
    return config


def build_onnx(folder: str, path: str, scratch: str) -> None:
    """Run the builder here, on a config it can read."""
    from onnxruntime_genai.models import builder
    from transformers import AutoConfig

    class Flat:
        """Stands for AutoConfig in the builder."""

        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return flat_rope(AutoConfig.from_pretrained(*args, **kwargs))

    builder.AutoConfig = Flat
    options = builder.parse_extra_options(None, folder, path, "int4", "cpu", scratch, list(ONNX_OPTIONS))
    builder.create_model(None, folder, path, "int4", "cpu", scratch, **options)


def onnx_sizes(folder: Path) -> dict[str, tuple[int, float]]:
    """Initializer -> (values, bytes) of the ONNX model in ``folder``; two 4-bit codes count as one value."""
    import onnx

    sizes = {}
    for tensor in onnx.load(str(folder / ONNX_MODEL), load_external_data=False).graph.initializer:
        outside = {entry.key: entry.value for entry in tensor.external_data}
        count = math.prod(tensor.dims)
        nbytes = int(outside["length"]) if "length" in outside else tensor.ByteSize()
        if not tensor.name.startswith(ROWS_ONLY):
            sizes[tensor.name] = (count, float(nbytes))
    return sizes


def openvino_sizes(folder: Path) -> dict[str, tuple[int, float]]:
    """Constant -> (values, bytes) of the OpenVINO model in ``folder``."""
    import openvino

    sizes = {}
    for node in openvino.Core().read_model(folder / OPENVINO_MODEL).get_ordered_ops():
        if node.get_type_name() == "Constant":
            kind, shape = node.get_element_type(), node.get_output_shape(0)
            count = math.prod(shape)
            sizes[node.get_friendly_name()] = (count, count * kind.bitwidth / 8)
    return sizes


# File in a folder -> how its widths are read.
SIZES: dict[str, Callable[[Path], dict[str, tuple[int, float]]]] = {
    ONNX_MODEL: onnx_sizes,
    OPENVINO_MODEL: openvino_sizes,
}


if __name__ == "__main__":
    build_onnx(*sys.argv[1:4])
