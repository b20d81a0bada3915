"""LoRA adapters (arXiv 2106.09685) as peft saves them: adapter_config.json and adapter_model.safetensors, distrusted.

peft itself is not needed. What would change the numbers in a way that is not ``W x + scale * B (A x)`` is an error that
names the key; so is a setting that this reader has never heard of.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmq.models.patterns import Patterns
from llmq.models.reader import read_header, read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Keys of the configuration that the numbers of a finished adapter do not depend on, or that are read below.
KNOWN = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "lora_alpha"),
        *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
        *("target_modules", "task_type", "use_rslora", "velora_config"),
    )
)
# Keys that ask for something else when they are set, and what.
REFUSED = {
    "alora_invocation_tokens": "the adapter begins in the middle of a text (aLoRA)",
    "arrow_config": "it routes between adapters (Arrow)",
    "fan_in_fan_out": "its matrices are stored the other way round (Conv1D)",
    "kasa_config": "it has singular values besides A and B (KaSA)",
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "B has a bias",
    "modules_to_save": "it replaces whole modules of the model",
    "monteclora_config": "it samples its weights (MonteCLoRA)",
    "target_parameters": "it changes parameters that are no linears",
    "trainable_token_indices": "it changes rows of the embedding",
    "use_bdlora": "its matrices are block-diagonal",
    "use_dora": "it scales the columns of the weights (DoRA)",
    "use_qalora": "it sums its inputs in groups (QA-LoRA)",
}
# Ways to begin training that leave the model's weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
WAY_OUT = "merge it into the original model with peft (merge_and_unload) and quantize the result"
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class LoraMatrices:
    """What is added to the product of one linear: ``scale * (x A^T) B^T``.

    Attributes:
        a: [rank, in_features].
        bt: [rank, out_features], B transposed, contiguous, in the dtype of ``a``: bf16, f16 or f32.
        scale: ``lora_alpha / rank``, or ``/ sqrt(rank)`` (rsLoRA, arXiv 2312.03732).
    """

    a: Tensor
    bt: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Adapter:
    """An adapter by the names of the modules it changes, as the base model calls them, and the folder it came from."""

    matrices: dict[str, LoraMatrices]
    folder: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, scales and all numbers."""
        found = hashlib.sha256()
        for name, m in sorted(self.matrices.items()):
            found.update(f"{name} {m.a.dtype} {tuple(m.a.shape)} {tuple(m.bt.shape)} {m.scale!r} ".encode())
            for t in (m.a, m.bt):
                found.update(t.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder that peft has written.

    Raises:
        FileNotFoundError: no adapter_config.json or adapter_model.safetensors.
        ValueError: damaged files, an adapter of another kind than LoRA on linears, ranks that disagree with the shapes.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    where = str(folder / CONFIG_NAME)
    _check_config(config, where)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = " (adapter_model.bin is pickled and can run code: save it anew)"
        also = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}: is it the folder of a peft adapter?{also}")
    read_header(path)
    parts = _parts(load_file(path), path)
    if not parts:
        raise ValueError(f"{path} holds no tensors: the adapter is empty")
    patterns = {key: _patterns(config, key, where) for key in ("rank_pattern", "alpha_pattern")}
    return Adapter({name: _matrices(name, pair, config, patterns, path) for name, pair in parts.items()}, folder)


def _check_config(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}; only 'LORA' adapters are read: {WAY_OUT}")
    for key, value in config.items():
        if not value:
            continue
        if key in REFUSED:
            raise ValueError(f"{where}: {key} is {_short(value)}: {REFUSED[key]}, which is not supported; {WAY_OUT}")
        if key not in KNOWN:
            raise ValueError(
                f"{where}: {key} is {_short(value)}, a setting that this version of llmq does not know and that may "
                f"change what the adapter computes; {WAY_OUT}"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}: it changes biases of the model; {WAY_OUT}")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights is {_short(start)}: training may have begun by changing the model's own "
            "weights; save the adapter with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def _short(value: Any) -> str:
    return repr(value)[:60]


def _parts(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """module -> {"A": [r, in], "B": [out, r]}."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _NAME.fullmatch(key)
        if found is None:
            raise ValueError(
                f"{path}: tensor {key} is no lora_A.weight or lora_B.weight of a linear; embeddings, biases, "
                f"magnitudes and whole modules are not supported: {WAY_OUT}"
            )
        if tensor.dtype not in DTYPES or tensor.dim() != 2:
            raise ValueError(
                f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)}; expected a matrix of bf16, f16 or f32"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity: the adapter is damaged")
        parts.setdefault(found["module"], {})[found["part"]] = tensor
    for name, pair in parts.items():
        if len(pair) != 2:
            raise ValueError(f"{path}: {name} has lora_{next(iter(pair))} only; A and B belong together: damaged")
    return parts


def _matrices(
    name: str, pair: dict[str, Tensor], config: dict[str, Any], patterns: dict[str, Patterns], path: Path
) -> LoraMatrices:
    a, b = pair["A"], pair["B"]
    ranks, alphas = (
        _of_module(config, patterns, key, name, path)
        for key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    rank = a.shape[0]
    if not (rank == b.shape[1] > 0 and rank in ranks):
        raise ValueError(
            f"{path}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}; {CONFIG_NAME} gives it rank "
            f"{' or '.join(map(str, ranks))}: A must have that many rows, B as many columns"
        )
    if len(alphas) > 1:
        raise ValueError(
            f"{path.parent / CONFIG_NAME}: alpha_pattern gives {name} {' and '.join(map(str, alphas))}; peft takes the "
            "first, but writes patterns in another order than they were given in: name each module by one pattern"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    scale = alphas[0] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraMatrices(a.to(dtype).contiguous(), b.to(dtype).T.contiguous(), scale)


def _patterns(config: dict[str, Any], key: str, where: str) -> Patterns:
    """The regular expressions of a pattern: each is for the end of a module's name (get_pattern_key in peft)."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {key} is {_short(found)}; an object of regular expressions was expected")
    return Patterns([rf"(.*\.)?({pattern})" for pattern in found], f"{where}: {key}", whole=True)


def _of_module(
    config: dict[str, Any], patterns: dict[str, Patterns], keys: tuple[str, str], name: str, path: Path
) -> list[float]:
    """What a pattern or, where none matches, its default says of a module: the distinct values, usually one."""
    pattern, default = keys
    said = list((config.get(pattern) or {}).values())
    values = [said[i] for i in patterns[pattern].matching(name)] or [config.get(default)]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path.parent / CONFIG_NAME}: {default} of {name} is {_short(value)}; expected a number")
    return list(dict.fromkeys(values))
