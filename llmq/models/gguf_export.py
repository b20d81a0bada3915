"""Write the model of a Hugging Face folder as an unquantized GGUF file, so that llama.cpp runs the same checkpoint.

Names and metadata keys are those of the ``gguf`` package. What GGUF stores otherwise than safetensors: rows of q and k
are in the order of llama.cpp's rope (llama, mistral); Gemma's norms are stored as 1 + w; llama 3's rope scaling is a
tensor of divisors. Tensors are written one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from llmq.compat import API
from llmq.config import one_of
from llmq.models.load import SourceModel, open_model

FILE_TYPES: dict[str, tuple[torch.dtype, Any]] = {
    "f32": (torch.float32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.LlamaFileType.MOSTLY_F16),
}


@dataclass(frozen=True)
class GgufFamily:
    """How a family's ``model_type`` is written.

    Attributes:
        arch: the architecture in the file.
        permute: rows of q and k are reordered.
        extras: further metadata, of the config.
    """

    arch: gguf.MODEL_ARCH
    permute: bool = False
    extras: tuple[Callable[[gguf.GGUFWriter, Any], None], ...] = ()


def _rope_dimension(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_rope_dimension_count(head_dim(config))


def _sliding_window(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _soft_caps(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


# model_type -> row. llama.cpp's loader of gemma3 takes every sixth layer as global and the local rope as 10000.
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, permute=True, extras=(_rope_dimension,)),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, permute=True, extras=(_rope_dimension,)),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3),
    "gemma2": GgufFamily(gguf.MODEL_ARCH.GEMMA2, extras=(_sliding_window, _soft_caps)),
    "gemma3_text": GgufFamily(gguf.MODEL_ARCH.GEMMA3, extras=(_sliding_window,)),
}
GEMMA3_PERIOD = 6


def export_gguf(folder: Path, path: Path, *, file_type: str = "f16", vocabulary: Path | None = None) -> Path:
    """Write the model in ``folder`` to the new file ``path`` and return ``path``.

    Args:
        folder: a Hugging Face model of a family in ``GGUF_FAMILIES``, not quantized.
        path: the file.
        file_type: ``f16`` or ``f32``, of matrices; vectors are always float32.
        vocabulary: a GGUF file whose tokenizer is copied; without one the file has no tokenizer, which is enough for
            programs that feed token ids.

    Raises:
        ValueError: another family or file type; a value beyond the range of float16; a config GGUF cannot express.
    """
    one_of("file_type", file_type, FILE_TYPES)
    source = open_model(folder)
    config = source.config.get_text_config()
    one_of("model_type of a GGUF export", config.model_type, GGUF_FAMILIES)
    family = GGUF_FAMILIES[config.model_type]
    check_layers(config, family)
    dtype, kind = FILE_TYPES[file_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    try:
        writer.add_file_type(kind)
        add_config(writer, config, family)
        add_vocabulary(writer, vocabulary)
        tensors = list(_plan(source, family))
        for name, _, shape in tensors:
            stored = _stored(shape, dtype)
            writer.add_tensor_info(name, shape, _numpy_dtype(stored), math.prod(shape) * stored.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, read, shape in tensors:
            value = read().float().to(_stored(shape, dtype))
            if not bool(value.isfinite().all()):
                raise ValueError(f"{folder}: {name} has values that {file_type} does not hold; use file_type 'f32'")
            writer.write_tensor_data(value.numpy())
    finally:
        writer.close()
    return path


def _stored(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """llama.cpp wants vectors in float32."""
    return torch.float32 if len(shape) == 1 else dtype


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype


def head_dim(config: Any) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> dict[str, Any]:
    """Rope parameters of the layers with full attention."""
    rope = API.rope_parameters(config)
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def check_layers(config: Any, family: GgufFamily) -> None:
    """Refuse windows that the file has no field for: llama.cpp would run another model."""
    if getattr(config, "sliding_window", None) and _sliding_window not in family.extras:
        raise ValueError(
            f"{config.model_type} with a sliding window of {config.sliding_window} cannot be written:"
            f" GGUF's {family.arch.name} has none; a model without one can"
        )
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "gemma3_text" and kinds is not None:
        for i, kind in enumerate(kinds):
            if (kind == "full_attention") != (i % GEMMA3_PERIOD == GEMMA3_PERIOD - 1):
                raise ValueError(f"layer {i} is {kind}; a GGUF of Gemma 3 has full attention in every sixth layer only")


def add_config(writer: gguf.GGUFWriter, config: Any, family: GgufFamily) -> None:
    """Write the metadata of a config. ValueError for a rope type that GGUF has no field for."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    one_of("rope_type of a GGUF export", kind, ("default", "linear", "llama3"))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for extra in family.extras:
        extra(writer, config)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Path | None) -> None:
    """Copy the tokenizer of the GGUF file ``vocabulary``; None: say that there is none."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    for name, field in gguf.GGUFReader(vocabulary).fields.items():
        if name.startswith("tokenizer."):
            kinds = field.types
            sub = kinds[1] if len(kinds) > 1 else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub)


Planned = tuple[str, Callable[[], Tensor], tuple[int, ...]]


def _plan(source: SourceModel, family: GgufFamily) -> Iterator[Planned]:
    """(name in the file, a reader of the values, shape) of every tensor."""
    config = source.config.get_text_config()
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for stored in sorted(source.reader.names()):
        if tied and stored == "lm_head.weight":
            continue
        name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{source.folder}: tensor {stored} has no name in a GGUF of {family.arch.name}")
        yield name, _reader(source, stored, family), source.reader.shape(stored)
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", lambda: llama3_divisors(rope, head_dim(config)), (head_dim(config) // 2,)


def _reader(source: SourceModel, stored: str, family: GgufFamily) -> Callable[[], Tensor]:
    config = source.config.get_text_config()
    n_heads = heads_to_permute(stored, config, family)

    def read() -> Tensor:
        value = source.reader.tensor(stored)
        if n_heads:
            return rope_order(value, n_heads)
        if value.dim() == 1 and stored.endswith("norm.weight"):
            return value.float() + source.family.norm_offset
        return value

    return read


def heads_to_permute(stored: str, config: Any, family: GgufFamily) -> int | None:
    """Heads of a tensor of q or k whose rows are in another order in the file; None for all other tensors."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(stored.split(".")[-2]) if family.permute and "." in stored else None


def halves_order(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of :func:`rope_order`."""
    pairs = weight.reshape(n_heads, weight.shape[0] // n_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def rope_order(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k, [n_heads * d, ...], from halves (i, i + d/2) to neighbours (2i, 2i + 1) in each head."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """f32[head_dim / 2]: what llama 3's scaling divides each rope frequency by (transformers' ``llama3`` rope type)."""
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    context = float(rope["original_max_position_embeddings"])
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = context * frequencies / (2 * math.pi)  # of the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / (smooth + (1 - smooth) / factor)
    return divisors.float()
