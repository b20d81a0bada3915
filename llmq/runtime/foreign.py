"""GPTQ, AWQ, compressed-tensors and MLX folders as transformers models on llmq's kernels, integers untouched.

``llmq.AutoModelForCausalLM`` opens them; after :func:`patch_transformers` transformers' own ``AutoModel`` classes do,
except MLX folders, whose config transformers does not take.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint import quantization_config
from llmq.compat import API
from llmq.dialects import QuantizedFolder, open_quantized
from llmq.runtime import packed_cache
from llmq.runtime.hf import LlmqConfig, LlmqQuantizer, leave_unread, replace_matrices, untie
from llmq.runtime.qlinear import QLinear, QuantizedMatrix

# What a config says whose folder is to be opened by ForeignQuantizer.
METHOD = "llmq-foreign"
# Methods of transformers' own that patch_transformers() takes over.
PATCHED = ("gptq", "awq", "compressed-tensors")
log = logging.getLogger(__name__)


class ForeignConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a foreign folder, kept as it is; ``inexact`` as in :func:`open_quantized`."""

    def __init__(self, **kwargs: Any) -> None:
        self.inexact = kwargs.pop("inexact", "refuse")
        for key, value in kwargs.items():
            setattr(self, key, value)


class ForeignQuantizer(LlmqQuantizer):
    """Puts llmq's modules in place; once transformers has loaded the rest, fills them from the folder's own tensors."""

    _folder: QuantizedFolder

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """``save_pretrained`` writes an llmq folder; matrices with a column order of their own are in no such one."""
        return all(m.order is None for m in self._folder.matrices.values())

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._files = API.checkpoint_files(kwargs)
        if not self._files:
            raise ValueError("a quantized folder of another tool needs its files; none came with the config")
        for file in filter(os.path.isdir, self._files):
            raise ValueError(f"{file} is a folder; its index names it in the place of a file of tensors: damaged")
        where = str(Path(self._files[0]).parent)
        with torch.device("cpu"):  # transformers builds the model on the meta device
            self._folder = open_quantized(
                Path(where), inexact=str(getattr(self.quantization_config, "inexact", "refuse"))
            )
            modules = dict(model.named_modules())
            for name in self._folder.matrices:
                self._check_bias(name, modules.get(name), where)
        for line in self._folder.notes:
            log.warning("%s", line)
        schemes = {name: m.scheme for name, m in self._folder.matrices.items()}
        tied = self._folder.tied or _tie(model, schemes)
        for name, m in self._folder.matrices.items():
            _check_shape(modules.get(name), name, (m.n, m.k), where)
        replace_matrices(model, schemes, tied, 8, where)
        for name, m in self._folder.matrices.items():
            module = model.get_submodule(name)
            assert isinstance(module, QuantizedMatrix)
            module.drop_buffers()
            if m.order is not None:
                if not isinstance(module, QLinear):
                    raise ValueError(f"{where}: {name} has a column order, but is no linear")
                module.column_order = m.order
        leave_unread(model, {t for m in self._folder.matrices.values() for t in self._unread(m.name)})
        self._packed = packed_cache.load(self._files, _named(model, schemes))
        # From here on the model is one of llmq's own: this is what save_pretrained writes.
        first = next(iter(schemes.values()))
        self.quantization_config = LlmqConfig(**quantization_config(schemes, first, tied, "llmq"))

    def _unread(self, name: str) -> list[str]:
        """Stored names that the module does not ask transformers for."""
        return [*self._folder.matrices[name].tensors, f"{name}.bias"]

    def _check_bias(self, name: str, module: nn.Module | None, where: str) -> None:
        """AutoGPTQ stores biases of zeros for linears that have none; others would be lost."""
        full, reader = f"{name}.bias", self._folder.reader
        if getattr(module, "bias", None) is None and full in reader and bool(reader.tensor(full).any()):
            raise ValueError(f"{where}: {full} is not zero, but the model's {name} has no bias")

    def _fill(self, name: str, module: QuantizedMatrix) -> None:
        module.set_qtensor(self._folder.matrices[name].read())


def _named(model: nn.Module, schemes: Any) -> dict[str, QuantizedMatrix]:
    found = {name: model.get_submodule(name) for name in schemes}
    return {name: m for name, m in found.items() if isinstance(m, QuantizedMatrix)}


def _tie(model: nn.Module, schemes: Any) -> dict[str, str]:
    """What a quantized embedding or head means for the other one, where the config ties them."""
    config: Any = model.config
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return {}
    paths = {id(m): path for path, m in model.named_modules()}
    embed = paths[id(model.get_input_embeddings())]  # type: ignore[operator]
    head = paths[id(model.get_output_embeddings())]  # type: ignore[operator]
    if head in schemes:
        untie(model)
        return {}
    return {head: embed} if embed in schemes else {}


def _check_shape(module: nn.Module | None, name: str, shape: tuple[int, int], where: str) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and tuple(weight.shape) != shape:
        raise ValueError(
            f"{where}: {name} is a {shape[0]} x {shape[1]} matrix in the files, {tuple(weight.shape)} in the model:"
            " config.json and the weights are not of one model"
        )


def register() -> None:
    """Make the method of :data:`METHOD` known to transformers. Safe to call again."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(ForeignConfig)
        register_quantizer(METHOD)(ForeignQuantizer)


def patch_transformers() -> None:
    """Let transformers' ``AutoModel`` classes load GPTQ, AWQ and compressed-tensors folders through llmq's kernels.

    For this process, and for the CPU: transformers' own loaders of these methods are out of reach afterwards. Numbers
    that no kernel holds exactly are an error. Safe to call again.
    """
    for method in PATCHED:
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = ForeignConfig
        AUTO_QUANTIZER_MAPPING[method] = ForeignQuantizer


def foreign_config(config: Any, inexact: str) -> Any:
    """``config`` (of a foreign folder), changed in place so that transformers calls ForeignQuantizer."""
    for holder in (config, config.get_text_config()):
        for name in ("quantization", "quantization_config"):
            if hasattr(holder, name):
                delattr(holder, name)
    config.quantization_config = {"quant_method": METHOD, "inexact": inexact}
    return config
