"""TARGETS: one row a format that llmq writes: which rows of FORMATS it uses, what it cannot hold, its config block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmq.checkpoint import quantization_config
from llmq.config import QuantScheme
from llmq.formats import FORMATS


@dataclass(frozen=True)
class Places:
    """What a model's modules are, for the config blocks.

    Attributes:
        schemes: scheme of every matrix that is written quantized, by module.
        dense: linears that are written in floating point.
        embed, head: paths of token embedding and output head.
        tied: module -> module whose matrix it uses.
    """

    schemes: dict[str, QuantScheme]
    dense: tuple[str, ...]
    embed: str
    head: str
    tied: dict[str, str]

    @property
    def usual(self) -> QuantScheme:
        """The scheme of most matrices."""
        schemes = list(self.schemes.values())
        return max(schemes, key=schemes.count)


Block = Callable[[Places, str], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A format that llmq writes.

    Attributes:
        row: the key of FORMATS, by all schemes that will be written.
        embeddings: whether a token embedding can be quantized.
        block: (places, row) -> entries of config.json.
        file: name of the copy of the block that loaders look for, or None.
        bits: bits that a lossy conversion may round to, in order of preference after a matrix's own.
    """

    row: Callable[[dict[str, QuantScheme]], str]
    embeddings: bool
    block: Block
    file: str | None = None
    bits: tuple[int, ...] = (8, 4)

    def refusal(self, name: str, shape: tuple[int, int], scheme: QuantScheme, row: str, embed: str) -> str | None:
        """Why a matrix cannot be written as it is, or None."""
        if name == embed and not self.embeddings:
            return "token embeddings cannot be quantized in this format"
        return FORMATS[row].refusal(*shape, scheme)


def _all_sym(schemes: dict[str, QuantScheme]) -> bool:
    return all(s.sym for s in schemes.values())


def _native(p: Places, _row: str) -> dict[str, Any]:
    return {"quantization_config": quantization_config(p.schemes, p.usual, p.tied, "llmq")}


def _gptq(p: Places, row: str) -> dict[str, Any]:
    """GPTQModel's and AutoGPTQ's keys. Other schemes than the usual one are in ``dynamic``."""
    usual = p.usual
    other = {
        f"+:^{_escaped(n)}$": {"bits": s.bits, "group_size": s.group_size} for n, s in p.schemes.items() if s != usual
    }
    skipped: dict[str, Any] = {f"-:^{_escaped(n)}$": {} for n in p.dense if n != p.head}
    block: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "desc_act": False,
        "sym": _all_sym(p.schemes),
        "checkpoint_format": row,
        "format": row,
        "true_sequential": True,
        "static_groups": False,
        "lm_head": p.head in p.schemes,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["llmq"]},
    }
    return {"quantization_config": block | ({"dynamic": other | skipped} if other or skipped else {})}


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _awq(p: Places, _row: str) -> dict[str, Any]:
    kept = [name for name in p.dense if name != p.head]
    block = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": p.usual.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }
    return {"quantization_config": block}


def _compressed(p: Places, row: str) -> dict[str, Any]:
    """A config group for each scheme, its modules by name."""
    groups: dict[str, Any] = {}
    for i, scheme in enumerate(sorted(set(p.schemes.values()), key=str)):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.sym,
            "strategy": "channel" if scheme.group_size == -1 else "group",
            "group_size": None if scheme.group_size == -1 else scheme.group_size,
            "actorder": None,
            "dynamic": False,
            "block_structure": None,
        }
        names = [name for name, s in p.schemes.items() if s == scheme]
        alone = len(set(p.schemes.values())) == 1
        targets = ["Linear"] if alone else names
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    block = {
        "quant_method": "compressed-tensors",
        "format": row,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": list(p.dense),
        "config_groups": groups,
    }
    return {"quantization_config": block}


def _mlx(p: Places, _row: str) -> dict[str, Any]:
    usual = p.usual

    def entry(s: QuantScheme) -> dict[str, Any]:
        return {"group_size": s.group_size, "bits": s.bits}

    others: dict[str, Any] = {n: entry(s) for n, s in p.schemes.items() if entry(s) != entry(usual)}
    dense: dict[str, Any] = dict.fromkeys(p.dense, False)
    block = {**entry(usual), "mode": "affine", **others, **dense}
    return {"quantization": block, "quantization_config": block}


TARGETS: dict[str, Target] = {
    "llmq": Target(lambda _: "llmq", True, _native),
    "gptq": Target(lambda s: "gptq" if _all_sym(s) else "gptq_v2", False, _gptq, file="quantize_config.json"),
    "awq": Target(lambda _: "awq", False, _awq, file="quant_config.json", bits=(4,)),
    # int-quantized is for int8 activations: the package unpacks weights alone from pack-quantized only.
    "compressed-tensors": Target(lambda _: "pack-quantized", False, _compressed),
    "mlx": Target(lambda _: "mlx", True, _mlx),
    "gguf": Target(lambda _: "gguf", True, lambda _p, _r: {}),
}
CONFIG_FILES = tuple(t.file for t in TARGETS.values() if t.file)
