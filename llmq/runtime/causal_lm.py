"""A Hugging Face causal language model whose ``forward`` and ``generate`` run on the native decoder.

``adopt`` gives a loaded model a subclass of its own class. Whatever the decoder cannot do runs in the Hugging Face
graph as before, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmq import kernels
from llmq.config import KVCacheConfig
from llmq.runtime import generation
from llmq.runtime.adapters import AdapterMethods, LowRank
from llmq.runtime.cache import NativeCache, check_positions, shown_columns
from llmq.runtime.native import NativeDecoder
from llmq.runtime.options import quantized_cache, say_once
from llmq.runtime.parts import Unsupported
from llmq.runtime.quantized_cache import QuantizedKVCache
from llmq.runtime.stopping import StopStrings

# Arguments of forward that change nothing here, whatever their value.
IGNORED_ARGUMENTS = frozenset(["use_cache", "return_dict", "cache_position", "tokenizer", "inputs_tensor"])
# Those that the native forward understands.
NATIVE_ARGUMENTS = frozenset(
    ["input_ids", "attention_mask", "position_ids", "past_key_values", "labels", "logits_to_keep", "num_items_in_batch"]
)

# Fields of a model's config that ask for more than logits.
GRAPH_OPTIONS = ("output_hidden_states", "output_attentions")


def native_decoder(model: nn.Module) -> NativeDecoder:
    """The decoder of ``model``, with as many threads as torch is told to use.

    Raises Unsupported when there is none, or when something listens to or replaces the graph's modules.
    """
    kernels.follow_torch()
    decoder = NativeDecoder.of(model)
    _check_untouched(model)
    for option in GRAPH_OPTIONS:
        if getattr(model.config, option, False):
            raise Unsupported(f"config.{option}={getattr(model.config, option)!r}")
    if model.training and torch.is_grad_enabled():
        raise Unsupported("the model is in training mode and gradients are on")
    return decoder


def decoder_of(model: Any) -> NativeDecoder | None:
    """The native decoder behind ``model``'s forward, None where the Hugging Face graph runs."""
    try:
        return native_decoder(model) if issubclass(type(model), NativeCausalLM) else None
    except Unsupported:
        return None


def _check_untouched(model: nn.Module) -> None:
    """Raise Unsupported naming a submodule that has a hook or another ``forward`` than its class."""
    waiting = [*model._modules.values()]  # quicker than named_modules, and this runs in every call
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        waiting.extend(module._modules.values())
        hooked = (module._forward_hooks or module._forward_pre_hooks) and _listens(module)
        # A module that was given its class's own forward (transformers 5.0 does that) is as it was.
        replaced = module.__dict__.get("forward")
        if hooked or (replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward):
            name = next(name for name, other in model.named_modules() if other is module)
            what = "a forward hook" if hooked else "a forward of its own"
            raise Unsupported(f"{name} has {what}, which only the Hugging Face graph calls")


def _listens(module: nn.Module) -> bool:
    """Whether there is a hook besides our adapters and those that transformers leaves behind to collect outputs."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks = [hook for hook in hooks if not isinstance(hook, LowRank)]
    return any(not getattr(hook, "__module__", "").startswith("transformers.utils.") for hook in hooks)


def set_kv_cache(model: nn.Module, kv: KVCacheConfig | str | None) -> None:
    """Bits of the keys and values that ``generate`` and ``forward`` of ``model`` cache natively from now on.

    Args:
        kv: a configuration or its text (``"8"``, ``"k8v16"``, ``"16"``); None: what the checkpoint's
            ``quantization_config["kv_bits"]`` says, without one 16 bits.

    Raises ValueError for an unknown text.
    """
    model.__dict__["kv_cache_config"] = None if kv is None else KVCacheConfig.of(kv)


def kv_config(model: Any) -> KVCacheConfig | None:
    """What :func:`set_kv_cache` was told, else the checkpoint's default, else None."""
    told: KVCacheConfig | None = model.__dict__.get("kv_cache_config")
    stored = getattr(getattr(model.config, "quantization_config", None), "kv_bits", None)
    return told if told is not None or stored is None else KVCacheConfig.of(str(stored))


class NativeCausalLM(AdapterMethods):
    """The part that comes before the Hugging Face class: see :func:`adopt`."""

    def _decoder(self) -> NativeDecoder:
        return native_decoder(self)  # type: ignore[arg-type]

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``, options included; in the native loop where it honours them.

        ``kv_cache``, a KVCacheConfig or its text such as ``"8"``, holds for this call; see :func:`set_kv_cache`.

        Raises ValueError for an empty prompt, one longer than the context, a token id out of range, ``kv_cache`` beside
        ``past_key_values``, or a prompt that does not begin as the saved one behind ``past_key_values``.
        """
        kv = kwargs.pop("kv_cache", None)
        if kv is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError(
                    f"kv_cache={kv!r} stands beside past_key_values, whose bits are settled; leave one out"
                )
            kwargs["past_key_values"] = NativeCache(KVCacheConfig.of(kv))
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(prompt, Tensor) and prompt.numel() == 0 and kwargs.get("inputs_embeds") is None:
            raise ValueError(
                f"the prompt is empty: input_ids has shape {tuple(prompt.shape)}; give at least one token, such as the "
                "tokenizer's BOS"
            )
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(past, NativeCache) and isinstance(prompt, Tensor):
            follows = mask is not None and mask.shape[-1] > prompt.shape[-1]  # what the cache holds is left out
            past.check_prompt(prompt[:, :0] if follows else prompt)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False
        quantized = None if given else quantized_cache(generation_config)
        if quantized is not None:
            native = decoder_of(self) is not None
            model_kwargs["past_key_values"] = (
                NativeCache(quantized) if native else QuantizedKVCache(quantized, self.config)  # type: ignore[attr-defined]
            )
            return None
        other = generation_config.cache_implementation not in (None, "dynamic")
        if not (given or other):
            with contextlib.suppress(Unsupported):  # the loops say why
                self._decoder()
                model_kwargs["past_key_values"] = NativeCache(kv_config(self))
                return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:
        strings = generation_config.stop_strings
        if not strings or tokenizer is None:
            return super()._get_stopping_criteria(generation_config, *args, tokenizer=tokenizer, **kwargs)  # type: ignore[misc]
        others = copy.copy(generation_config)
        others.stop_strings = None
        criteria = super()._get_stopping_criteria(others, *args, tokenizer=tokenizer, **kwargs)  # type: ignore[misc]
        criteria.append(StopStrings(strings, tokenizer))
        return criteria

    def _sample(self, input_ids: Tensor, **arguments: Any) -> Any:
        run = self._native_run(input_ids, **arguments)
        return super()._sample(input_ids, **arguments) if run is None else run.generate(generation.sample)  # type: ignore[misc]

    def _assisted_decoding(self, input_ids: Tensor, **arguments: Any) -> Any:
        reason = None
        if arguments.get("assistant_model") is not None or not arguments["generation_config"].prompt_lookup_num_tokens:
            reason = "assisted decoding with a model"
        elif input_ids.shape[0] > 1:
            reason = f"prompt lookup of {input_ids.shape[0]} rows"
        run = self._native_run(input_ids, reason, **arguments)
        if run is None:
            if isinstance(arguments.get("past_key_values"), QuantizedKVCache):
                arguments["past_key_values"].activate_past_recording()  # transformers 4 does not
            return super()._assisted_decoding(input_ids, **arguments)  # type: ignore[misc]
        return run.generate(generation.look_up)

    def _native_run(
        self,
        input_ids: Tensor,
        reason: str | None = None,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **arguments: Any,
    ) -> generation.Run | None:
        """A run of the native loop, or None, said once, for ``reason`` or where the loop or the decoder refuses."""
        try:
            if reason:
                raise Unsupported(reason)
            return generation.Run(
                self._decoder(),
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
                arguments=arguments,
            )
        except Unsupported as refusal:
            say_once(f"generate: {refusal}; transformers' own loop runs instead of the native one")
            return None

    def _beam_search(self, input_ids: Tensor, **kwargs: Any) -> Any:
        beams = kwargs["generation_config"].num_beams
        say_once(f"generate: num_beams={beams}; transformers' own loop runs instead of the native one")
        return super()._beam_search(input_ids, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the Hugging Face class; the compiled decoder is made anew."""
        return _empty, (graph_class(self),), dict(self.__dict__)


def forward(model: Any, given: dict[str, Any]) -> CausalLMOutputWithPast:
    """The native forward.

    Args:
        model: an adopted model.
        given: arguments of its class's forward that are not None. Rows may be padded on either side; positions outside
            attention_mask get logits of 0. Without position_ids the tokens that the mask shows are counted.

    Raises:
        Unsupported: an argument that only the Hugging Face graph understands.
        ValueError: no tokens, ids out of range, a context too long, a cache that does not fit.
    """
    for name, value in given.items():
        if name not in NATIVE_ARGUMENTS | IGNORED_ARGUMENTS and value is not False:
            raise Unsupported(f"the argument {name}")
    decoder = native_decoder(model)
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    if ids is None or ids.dim() != 2:
        raise Unsupported("input_ids are missing or not [batch, length]")
    if ids.numel() == 0:
        raise ValueError(f"input_ids are empty, their shape is {tuple(ids.shape)}; give at least one token")
    if cache is not None and not isinstance(cache, NativeCache):
        raise Unsupported(f"past_key_values of class {type(cache).__name__}")
    kept = cache if cache is not None else NativeCache(kv_config(model))
    kept.begin(decoder, ids.shape[0])
    shown = shown_columns(given.get("attention_mask"), kept.seen, *ids.shape)
    check_positions(given.get("position_ids"), shown, kept)
    logits = _logits(decoder, ids, shown, kept, given.get("logits_to_keep", 0))
    kept.extend(shown)
    loss, labels = None, given.get("labels")
    if labels is not None:
        counts = {k: given[k] for k in ("num_items_in_batch",) if k in given}
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=decoder.vocab_size, **counts)
    use_cache = given.get("use_cache", getattr(model.config, "use_cache", True))
    past = kept if use_cache or cache is not None else None
    return CausalLMOutputWithPast(loss=loss, logits=logits.to(model.dtype), past_key_values=past)


def _logits(decoder: NativeDecoder, ids: Tensor, shown: Tensor, cache: NativeCache, keep: int | Tensor) -> Tensor:
    """f32[B, kept columns, V] logits after the ``shown`` columns of ``ids`` i64[B, columns]; 0 outside them."""
    rows = shown.any(1).nonzero()[:, 0].tolist()  # a row may show nothing here, and then has nothing to do
    tokens = [ids[row][shown[row]] for row in rows]
    sequences = [cache.sequences[row] for row in rows]
    if isinstance(keep, int) and keep == 1 and bool(shown[:, -1].all()):
        return decoder.forward(tokens, sequences)[:, None]
    states = torch.zeros(*ids.shape, decoder.hidden_size)
    states[shown] = decoder.forward(tokens, sequences, output="states") if rows else 0.0
    kept: Any = slice(-keep, None) if isinstance(keep, int) and keep else slice(None) if isinstance(keep, int) else keep
    wanted = shown[:, kept]
    logits = torch.zeros(*wanted.shape, decoder.vocab_size)
    logits[wanted] = decoder.logits(states[:, kept][wanted])
    return logits


@functools.cache
def native_class(base: Any) -> Any:
    """A subclass of ``base`` with the same name and signature whose forward and generate are native."""
    parameters = inspect.signature(base.forward).parameters
    names = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(base.forward)
    def native_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            out = forward(self, given)
        except Unsupported as reason:
            cache = given.get("past_key_values")
            kv = cache.kv if isinstance(cache, NativeCache) else kv_config(self)
            unused = f" and caches keys and values in 16 bits instead of {kv}" if kv else ""
            say_once(
                f"{base.__name__}.forward: {reason}; the Hugging Face graph runs instead of the native decoder{unused}"
            )
            return base.forward(self, **_without_native_cache(self, given))
        return out if given.get("return_dict", getattr(self.config, "return_dict", True)) else out.to_tuple()

    same = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (NativeCausalLM, base), {**same, "forward": native_forward})


def _without_native_cache(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with an empty NativeCache replaced by a cache of the graph's own."""
    cache = given.get("past_key_values")
    if not isinstance(cache, NativeCache):
        return given
    if cache.get_seq_length():
        raise ValueError(
            "this call needs the Hugging Face graph, which cannot continue from what the native decoder has cached; "
            "ask for the same outputs from the first call on, or start with past_key_values=None"
        )
    return {**given, "past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True))}


def graph_class(model: object) -> type[Any]:
    """The Hugging Face class of ``model``, whose forward and generate are transformers' own."""
    return next(c for c in type(model).__mro__ if not issubclass(c, AdapterMethods))


def _empty(base: Any) -> Any:
    made = native_class(base)
    return made.__new__(made)


def adopt(model: nn.Module) -> nn.Module:
    """Let ``model`` run natively where it can: ``generate`` and ``forward`` of a causal language model.

    Its class becomes a subclass of the same name. Models that do not generate are left alone.
    """
    kind: Any = type(model)
    if issubclass(kind, PreTrainedModel) and issubclass(kind, GenerationMixin) and not issubclass(kind, NativeCausalLM):
        model.__class__ = native_class(kind)
    return model
