"""Adapters for the tests: folders as peft writes them, made without peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from kernel_cases import seeded
from safetensors.torch import save_file
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(model: Any, targets: tuple[str, ...] = TARGETS) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the blocks' linears, by name."""
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if n.split(".")[-1] in targets}


def write_adapter(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    r: int = 8,
    lora_alpha: float = 8,
    size: float = 1.0,
    tensors: dict[str, Tensor | None] | None = None,
    told: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """An adapter of random matrices, B A x about ``size`` times x; ``tensors`` and ``told`` replace what is written."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor | None] = {}
    for name, (n, k) in shapes.items():
        ranks = config.get("rank_pattern") or {}
        rank = next((v for key, v in ranks.items() if re.match(rf"(.*\.)?({key})$", name)), r)
        draw = seeded(seed, name)
        stored[f"base_model.model.{name}.lora_A.weight"] = (torch.randn(rank, k, generator=draw) * k**-0.5).to(dtype)
        stored[f"base_model.model.{name}.lora_B.weight"] = (
            torch.randn(n, rank, generator=draw) * size * rank**-0.5
        ).to(dtype)
    stored |= tensors or {}
    save_file({k: t.contiguous() for k, t in stored.items() if t is not None}, folder / "adapter_model.safetensors")
    written: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "bias": "none"}
    written |= {"r": r, "lora_alpha": lora_alpha, "use_rslora": False, "use_dora": False, "modules_to_save": None}
    written |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": list(TARGETS), "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps({**written, **config, **(told or {})}))
    return folder


def pair(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """A and B of a module, in fp64."""
    from safetensors.torch import load_file

    t = load_file(folder / "adapter_model.safetensors")
    a, b = (t[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    return a, b
