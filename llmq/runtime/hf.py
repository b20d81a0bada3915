"""Registration with transformers: after ``import llmq`` its ``AutoModelForCausalLM`` opens llmq folders.

Without the import transformers does not know the method, warns, and returns random weights; there is no hook by which a
package could prevent that, so the model card of every folder says it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint import (
    QUANT_METHOD,
    check_files,
    matrix_from_tensors,
    matrix_layout,
    parse_quantization_config,
)
from llmq.compat import API
from llmq.config import QuantScheme
from llmq.kernels import PackedWeight
from llmq.models.reader import WeightReader
from llmq.runtime import packed_cache
from llmq.runtime.causal_lm import adopt
from llmq.runtime.qlinear import QEmbedding, QLinear, QuantizedMatrix, TiedHead


class LlmqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` block of an llmq folder; keys as in docs/FORMATS.md, unknown ones are kept.

    ``activation_bits``, set in config.json: 8 (default) quantizes activations to int8, 16 keeps them in float.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("quant_method", None)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # its enum knows only transformers' own
        self.activation_bits = kwargs.pop("activation_bits", 8)
        for key, value in kwargs.items():
            setattr(self, key, value)


class LlmqQuantizer(HfQuantizer):
    """Puts QLinear, QEmbedding and TiedHead in place before the weights arrive, packs them afterwards."""

    requires_calibration = True
    _files: tuple[str, ...] = ()
    _packed: dict[str, PackedWeight] = {}

    def validate_environment(self, *_args: Any, **kwargs: Any) -> None:
        """Refuse devices other than the CPU."""
        device_map = kwargs.get("device_map")
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        bad = [d for d in devices if d is not None and str(d) != "cpu"]
        if bad:
            raise ValueError(
                f"device_map asks for {bad[0]}; llmq's kernels run on the CPU: use device_map='cpu' or none"
            )

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """``save_pretrained`` writes the same integers back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the integers can be: gradients flow through; the integers stay."""
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales stay fp16, whatever dtype the model is loaded in: they are part of the integers' meaning."""
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        if dtype == torch.float16 and stored in ("F16", "torch.float16"):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:  # noqa: ARG002
        """Refuse folders that lack a weight. Only transformers 4 asks; it names some modules otherwise than 5 does."""
        patterns: Any = model._keys_to_ignore_on_load_missing or ()
        missing = [name for name in missing_keys if not any(re.search(p, name) for p in patterns)]
        if missing:
            raise ValueError(
                f"{getattr(model, 'name_or_path', 'the checkpoint')} lacks {len(missing)} weights that "
                f"{type(model).__name__} has in transformers {transformers.__version__}, among them "
                f"{', '.join(missing[:3])}; a folder that another major version has written may need that one"
            )
        return missing_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        block = self.quantization_config.to_dict()
        where = str(getattr(model, "name_or_path", "") or "checkpoint")
        schemes, tied = parse_quantization_config(block, where)
        activation_bits = int(block.get("activation_bits", 8))
        replace_matrices(model, schemes, tied, activation_bits, where)
        self._files = API.checkpoint_files(kwargs)
        if self._files:
            check_files(self._files, _expected(model, schemes), where)
            self._packed = packed_cache.load(self._files, _matrices(model))
        if self._packed or (self._files and API.casts_scales):
            # Without buffers the modules ask for no tensors, and those in the files are left unread.
            for module in _matrices(model).values():
                module.drop_buffers()
            leave_unread(model, {f"{name}.{key}" for name in schemes for key in ("qweight", "scales", "zeros")})

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        dtype, config = model.dtype, model.config
        assert isinstance(dtype, torch.dtype)
        config.quantization_config = self.quantization_config  # type: ignore[union-attr]  # transformers 4 does not
        matrices = _matrices(model)
        for name, module in matrices.items():
            if name in self._packed:
                module.set_packed(self._packed[name])
            else:
                self._fill(name, module)
            module.pack_()
            if isinstance(module, QEmbedding):
                module.reset_output_scale(dtype)
        if self._files and not self._packed:
            packed_cache.save(self._files, matrices)
        _let_go_of_files(model)
        return adopt(model)

    @functools.cached_property
    def _reader(self) -> WeightReader:
        return WeightReader(Path(self._files[0]).parent, files=self._files)

    def _fill(self, name: str, module: QuantizedMatrix) -> None:
        """Give a module its matrix where transformers did not fill its buffers."""
        if self._files and API.casts_scales:
            layout = matrix_layout(module.n, module.k, module.scheme)
            tensors = {key: self._reader.tensor(f"{name}.{key}") for key in layout}
            module.set_qtensor(matrix_from_tensors(tensors, module.n, module.k, module.scheme, name))


def replace_matrices(
    model: nn.Module, schemes: dict[str, QuantScheme], tied: dict[str, str], activation_bits: int, where: str
) -> None:
    """Put QLinear, QEmbedding and TiedHead in the places of the modules that ``schemes`` and ``tied`` name.

    Raises ValueError for a module that the model lacks or that cannot be quantized.
    """
    for name, scheme in schemes.items():
        _replace(model, name, _quantized_twin(_module(model, name, where), scheme, activation_bits, name))
    for name, source in tied.items():
        embedding = model.get_submodule(source)
        if not isinstance(embedding, QEmbedding):
            raise ValueError(f"{where}: {name} is tied to {source}, which is not an embedding")
        _replace(model, name, TiedHead(embedding, activation_bits=activation_bits))
    if tied:
        untie(model)


def untie(model: nn.Module) -> None:
    """Leave nothing for transformers to tie."""
    API.leave_untied(model)


def leave_unread(model: nn.Module, names: set[str]) -> None:
    """Let transformers pass over stored tensors of these names without a word, whatever the numbers in them.

    It tries every pattern on every name: one for all layers keeps that short.
    """
    patterns = {f"^{re.sub('[0-9]+', '[0-9]+', re.escape(name))}$" for name in names}
    known: Any = model._keys_to_ignore_on_load_unexpected
    # A set in newer transformers, a list or None in 5.0.
    both = known | patterns if isinstance(known, set) else [*(known or ()), *patterns]
    model.__dict__["_keys_to_ignore_on_load_unexpected"] = both


def _let_go_of_files(model: nn.Module) -> None:
    """Copy the vectors, which may lie in mapped files: a norm must not keep a whole shard in memory."""
    for p in model.parameters():
        if p.dim() < 2:
            p.data = p.data.clone()


def _matrices(model: nn.Module) -> dict[str, QuantizedMatrix]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}


def _module(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{where}: quantization_config names {name}, which {type(model).__name__} does not have"
        ) from None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def embedding_scale(module: nn.Module) -> float | None:
    """The factor an embedding module multiplies its rows by; None when the module is of a kind we do not know."""
    if type(module) is nn.Embedding:
        return 1.0
    return API.embedding_scale(module)


def _quantized_twin(module: nn.Module, scheme: QuantScheme, activation_bits: int, name: str) -> QuantizedMatrix:
    """The module that takes the place of a linear or an embedding, with empty buffers on the same device."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    with weight.device:
        if isinstance(module, nn.Embedding):
            scale = embedding_scale(module)
            if scale is None:
                raise ValueError(f"{name}: embeddings of class {type(module).__name__} cannot be quantized")
            return QEmbedding(module.num_embeddings, module.embedding_dim, scheme, scale=scale)
        if isinstance(module, nn.Linear):
            bias = module.bias is not None
            return QLinear(module.in_features, module.out_features, scheme, bias=bias, activation_bits=activation_bits)
    raise ValueError(f"{name}: a {type(module).__name__} cannot be quantized; only linears and embeddings can")


def _expected(
    model: nn.Module, schemes: dict[str, QuantScheme]
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor the checkpoint must hold for ``model``."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, scheme in schemes.items():
        matrix = model.get_submodule(name)
        assert isinstance(matrix, QuantizedMatrix)
        for key, value in matrix_layout(matrix.n, matrix.k, scheme).items():
            expected[f"{name}.{key}"] = value
    return expected


def register() -> None:
    """Make ``quant_method: "llmq"`` known to transformers. Safe to call again."""
    API.register()
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LlmqConfig)
        register_quantizer(QUANT_METHOD)(LlmqQuantizer)
