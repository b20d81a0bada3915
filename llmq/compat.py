"""Where transformers 4 and 5 differ: one row each, VERSIONS. Nothing else in llmq asks for the version."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PretrainedConfig, PreTrainedTokenizerFast, modeling_utils


@dataclass(frozen=True)
class Rope:
    """A rotary embedding as its module makes it: its type, f32[d / 2] frequencies, scaling of sine and cosine."""

    type: str
    frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class Version:
    """What llmq must know of a major version of transformers.

    Attributes:
        register: prepares transformers once, when llmq registers itself.
        checkpoint_files: from the arguments of a quantizer's hook before loading to the files that are to be loaded.
        casts_scales: whether the loader casts a quantized matrix's fp16 scales to the model's dtype.
        mismatched_name: the weight that an item of the loader's ``mismatched_keys`` is about.
        leave_untied: keeps the loader from tying the weights of a model, once its embedding or head holds integers.
        embedding_scale: what an embedding of a class of its own multiplies its rows by; None: not known.
        scaled_embeddings: model types whose decoder, not its embedding, multiplies by the root of ``hidden_size``.
        rope_parameters: of a text config, as transformers 5 writes them.
        set_rope_parameters: puts them into a text config. ValueError where its class has no fields for them.
        cache_layers: the layers of transformers' cache for a text config. ValueError for layers that keep other things
            than keys and values where it would not tell them apart.
        ropes: from a decoder and its config to new rotary embeddings by layer type; one alone has the key "".
        makes_gguf_tokenizers: whether the tokenizer that it makes of a GGUF file is the file's.
        head_renames: (regex, replacement) from stored names to module names, for architectures without a family row.
    """

    register: Callable[[], None]
    checkpoint_files: Callable[[dict[str, Any]], tuple[str, ...]]
    casts_scales: bool
    mismatched_name: Callable[[Any], str]
    leave_untied: Callable[[nn.Module], None]
    embedding_scale: Callable[[nn.Module], float | None]
    scaled_embeddings: frozenset[str]
    rope_parameters: Callable[[Any], dict[str, Any]]
    set_rope_parameters: Callable[[Any, dict[str, Any]], None]
    cache_layers: Callable[[Any], list[Any]]
    ropes: Callable[[Any, Any], dict[str, Rope]]
    makes_gguf_tokenizers: bool
    head_renames: tuple[tuple[str, str], ...]


# transformers 5


def _handed_over(arguments: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, arguments.get("checkpoint_files") or ()))


def _no_tied_keys(model: nn.Module) -> None:
    model.__dict__.update(_tied_weights_keys=None, all_tied_weights_keys={})


def _scale_attribute(module: nn.Module) -> float | None:
    scale = getattr(module, "scalar_embed_scale", None)
    return float(scale) if isinstance(scale, float | int) else None


def _ropes_of_one_module(decoder: Any, config: Any) -> dict[str, Rope]:
    rotary = type(decoder.rotary_emb)(config=config)
    types = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    return {kind: _rope(rotary, name, f"{kind}_" if kind else "") for kind, name in types.items()}


def _rope(rotary: Any, name: str, prefix: str = "") -> Rope:
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    return Rope(name, getattr(rotary, f"{prefix}inv_freq").float(), scaling)


# transformers 4

# Fields of GPT-NeoX that say the same once more.
SECOND_NAMES = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
# The files that a thread's from_pretrained has found last.
_found = threading.local()


def _note_files() -> None:
    """transformers 4 tells its quantizers nothing of the files, so they are noted where it finds them."""
    find = modeling_utils._get_resolved_checkpoint_files

    @functools.wraps(find)
    def noted(*args: Any, **kwargs: Any) -> Any:
        found = find(*args, **kwargs)
        _found.files = found[0]
        return found

    modeling_utils._get_resolved_checkpoint_files = noted


def _noted(_arguments: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, _found.__dict__.pop("files", None) or ()))


def _no_tying(model: nn.Module) -> None:
    model.__dict__.update(_tied_weights_keys=None, _tie_or_clone_weights=_leave_apart)


def _leave_apart(_head: nn.Module, _embedding: nn.Module) -> None:
    """Stands in for a model's method, which would look for a float weight."""


def _scale_buffer(module: nn.Module) -> float | None:
    scale = getattr(module, "embed_scale", None)
    return float(scale) if isinstance(scale, Tensor | float | int) else None


class TokenizersBackend(PreTrainedTokenizerFast):
    """The name that transformers 5 writes into tokenizer_config.json for a class of transformers 4."""


class _NoModelConfig(PretrainedConfig):
    """AutoTokenizer finds a class by its name among those that are registered with a config."""


@functools.cache  # once
def _prepare() -> None:
    _note_files()
    _adapt_configs()
    AutoTokenizer.register(_NoModelConfig, fast_tokenizer_class=TokenizersBackend)


def _adapt_configs() -> None:
    """Let what is read from a config.json that transformers 5 has written mean the same in transformers 4.

    It would ignore ``rope_parameters`` and compute with its default ropes.
    """
    base: Any = PretrainedConfig
    read = base.from_dict.__func__

    @functools.wraps(read)
    def adapted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = read(cls, *args, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if isinstance(part, PretrainedConfig):
                _adapt_config(part)
        return made

    base.from_dict = classmethod(adapted)


def _adapt_config(config: Any) -> None:
    parameters = config.__dict__.pop("rope_parameters", None)
    if parameters:
        _set_ropes(config, parameters)
    # Its scaled dot products leave the cap out without a word.
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation is None:
        config._attn_implementation = "eager"


def _set_ropes(text: Any, parameters: dict[str, Any]) -> None:
    layers = {kind: rope for kind, rope in parameters.items() if isinstance(rope, dict)}
    whole = dict(layers.pop("full_attention", {}) if layers else parameters)
    local = layers.pop("sliding_attention", {})
    fields = {name: whole.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in whole}
    if "rope_theta" in local:
        fields["rope_local_base_freq"] = local["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        fields["rope_scaling"] = whole
    elif hasattr(text, "rope_scaling"):
        fields["rope_scaling"] = None
    unknown = [name for name in fields if not hasattr(text, name)]
    if layers or unknown or set(local) - {"rope_theta", "rope_type"} or local.get("rope_type", "default") != "default":
        raise ValueError(
            f"the {text.model_type} config of transformers 5 has rope_parameters {parameters}, for which transformers "
            f"{transformers.__version__} has no fields; install transformers 5 to open this model"
        )
    fields |= {name: fields[of] for name, of in SECOND_NAMES.items() if hasattr(text, name) and of in fields}
    for name, value in fields.items():
        setattr(text, name, value)


def _rope_parameters(text: Any) -> dict[str, Any]:
    whole = {"rope_type": "default", **(getattr(text, "rope_scaling", None) or {}), "rope_theta": text.rope_theta}
    local = getattr(text, "rope_local_base_freq", None)
    if local is None:
        return whole
    return {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _cache_layers(text: Any) -> list[Any]:
    types = getattr(text, "layer_types", None) or ["full_attention"]
    others = sorted(set(types) - {"full_attention", "sliding_attention", "chunked_attention"})
    if others or not hasattr(text, "num_attention_heads"):
        raise ValueError(
            f"the model ({text.model_type}) has layers {', '.join(others) or 'without attention'}; a cache of keys and "
            "values does not hold what they keep"
        )
    return DynamicCache(config=text).layers


def _ropes_of_modules(decoder: Any, _config: Any) -> dict[str, Rope]:
    modules = {"": decoder.rotary_emb}
    if hasattr(decoder, "rotary_emb_local"):
        modules = {"full_attention": decoder.rotary_emb, "sliding_attention": decoder.rotary_emb_local}
    fresh: dict[str, Any] = {kind: type(module)(config=module.config) for kind, module in modules.items()}
    return {kind: _rope(rotary, rotary.rope_type) for kind, rotary in fresh.items()}


VERSIONS = {
    4: Version(
        register=_prepare,
        checkpoint_files=_noted,
        casts_scales=True,
        mismatched_name=str,
        leave_untied=_no_tying,
        embedding_scale=_scale_buffer,
        scaled_embeddings=frozenset({"gemma2"}),
        rope_parameters=_rope_parameters,
        set_rope_parameters=_set_ropes,
        cache_layers=_cache_layers,
        ropes=_ropes_of_modules,
        makes_gguf_tokenizers=False,
        head_renames=(),
    ),
    5: Version(
        register=lambda: None,
        checkpoint_files=_handed_over,
        casts_scales=False,
        mismatched_name=lambda item: str(item[0]),
        leave_untied=_no_tied_keys,
        embedding_scale=_scale_attribute,
        scaled_embeddings=frozenset(),
        rope_parameters=lambda text: dict(text.rope_parameters),
        set_rope_parameters=lambda text, parameters: setattr(text, "rope_parameters", parameters),
        cache_layers=lambda text: DynamicCache(config=text).layers,
        ropes=_ropes_of_one_module,
        makes_gguf_tokenizers=True,
        head_renames=((r"^embed_out\.", "lm_head."),),
    ),
}


def _installed() -> Version:
    major = int(transformers.__version__.split(".")[0])
    if major not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ImportError(f"transformers {transformers.__version__} is installed; llmq works with {known}")
    return VERSIONS[major]


API = _installed()
