"""The keys and values of a prompt in a file, so that a long system prompt is computed once.

One safetensors file. Its metadata says what it was made from (format, layout of the pages, model, bits) and which pages
each sequence holds; its tensors are ``ids`` i64[B, T], ``seen`` bool[B, T] and, for row r and part p (a layer's tokens,
behind them its near ones), ``pages.r.p`` u8[pages, bytes], which only the compiled decoder understands. It is written
under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint import usual_mode
from llmq.config import KVCacheConfig
from llmq.runtime.cache import NativeCache
from llmq.runtime.causal_lm import native_decoder
from llmq.runtime.native import NativeDecoder
from llmq.runtime.parts import Unsupported, core
from llmq.runtime.sequence import Sequence

FORMAT = "llmq prompt cache"
VERSION = 2
# Fields of a model's configuration that its keys and values do not depend on.
OTHER_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "kv_bits", "producer")


def save_prompt_cache(path: str | Path, model: Any, input_ids: Tensor, cache: NativeCache | None = None) -> NativeCache:
    """Write the keys and values of a prompt to ``path``, replacing a file of that name when the new one is whole.

    Args:
        path: the file.
        model: one that runs on the native decoder.
        input_ids: i64[B, T], the prompt.
        cache: holds the prompt already, such as ``past_key_values`` of a forward; None: computed here, with the bits
            that ``set_kv_cache`` or the checkpoint says.

    Returns the cache; ``copy.deepcopy`` of it shares its pages.

    Raises:
        ValueError: the model has no native decoder, or ``cache`` does not hold as many tokens.
        OSError: the file cannot be written; one that was there stays.
    """
    path, decoder = Path(path), _decoder(model)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.absolute().parent} does not exist; create it first")
    if cache is None:
        with torch.no_grad():
            cache = model(input_ids=input_ids, use_cache=True, logits_to_keep=1).past_key_values
    if not isinstance(cache, NativeCache):
        raise ValueError(f"the cache is a {type(cache).__name__}; only a NativeCache can be saved")
    if tuple(cache.seen.shape) != tuple(input_ids.shape):
        raise ValueError(
            f"the cache holds {tuple(cache.seen.shape)} rows and columns, input_ids has {tuple(input_ids.shape)}; "
            "save the cache together with the tokens that it holds"
        )
    cache.prompt = input_ids.clone()
    tensors = {"ids": input_ids.contiguous(), "seen": cache.seen.contiguous()}
    if cache.offsets is not None:
        tensors["offsets"] = cache.offsets.contiguous()
    rows = []
    for row, sequence in enumerate(cache.sequences):
        parts, pages = sequence.state()
        rows.append({"length": sequence.length, "parts": parts})
        tensors.update({f"pages.{row}.{part}": data for part, data in enumerate(pages)})
    kv = None if cache.kv is None else asdict(cache.kv)
    metadata = {**_origin(model, decoder), "kv": json.dumps(kv), "rows": json.dumps(rows)}
    _write(path, tensors, metadata | {"checksum": _checksum(tensors)})
    return cache


def load_prompt_cache(path: str | Path, model: Any) -> NativeCache:
    """A cache of its own from a file of :func:`save_prompt_cache`, for ``generate(..., past_key_values=...)``.

    ``generate`` then takes the whole prompt, the saved one first, and computes only what follows it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, of another version, or was made by another model or with other settings.
    """
    path, decoder = Path(path), _decoder(model)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; llmq.save_prompt_cache writes one")
    try:
        with safe_open(path, framework="pt") as f:
            metadata: dict[str, str] = f.metadata() or {}
            _check_origin(path, metadata, _origin(model, decoder))
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
        if metadata["checksum"] != _checksum(tensors):
            raise SafetensorError("its bytes have changed")
        kv = json.loads(metadata["kv"])
        cache = NativeCache(None if kv is None else KVCacheConfig(**{**kv, "layers": tuple(kv["layers"])}))
        ids, cache.seen, cache.offsets = tensors["ids"], tensors["seen"], tensors.get("offsets")
        cache.prompt, cache.made_by, rows = ids, decoder.fingerprint, json.loads(metadata["rows"])
        cache.sequences = [_sequence(decoder, cache.kv, row, i, tensors) for i, row in enumerate(rows)]
        if ids.shape != cache.seen.shape or [s.length for s in cache.sequences] != cache.seen.sum(1).tolist():
            raise SafetensorError("its sequences are not those of its tokens")
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as a prompt cache ({error}); it is truncated or damaged: make it anew with "
            "llmq.save_prompt_cache"
        ) from error
    return cache


def _decoder(model: Any) -> NativeDecoder:
    try:
        return native_decoder(model)
    except Unsupported as reason:
        raise ValueError(f"a prompt cache is one of the native decoder, and the model has none: {reason}") from reason


def _origin(model: Any, decoder: NativeDecoder) -> dict[str, str]:
    """What a file must have been made from to be used, in the order in which it is checked."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "kv_layout": str(core().KV_LAYOUT_VERSION),
        "byteorder": sys.byteorder,
        "config": hashlib.sha256(json.dumps(_relevant(model.config.to_dict()), default=str).encode()).hexdigest(),
        "adapter": decoder.adapter,
        "weights": decoder.fingerprint,
        "activation_bits": str(decoder.activation_bits),
    }


WHY = {
    "format": "it is no prompt cache of llmq",
    "version": "another version of llmq wrote it; make it anew with llmq.save_prompt_cache",
    "kv_layout": "another version of llmq wrote it, with other pages; make it anew with llmq.save_prompt_cache",
    "byteorder": "a machine of another byte order wrote it; make it anew here",
    "config": "it was made by another model; load that one, or make the file anew with this one",
    "adapter": "it was made with another adapter; load or set that one (or none), or make the file anew with this one",
    "weights": "it was made by a model with other weights; load that one, or make the file anew with this one",
    "activation_bits": "activations were rounded otherwise; use llmq.set_activation_bits, or make the file anew",
}


def _check_origin(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"{path}: its {name} is {str(found.get(name))[:16]} instead of {value[:16]}: {WHY[name]}")


def _relevant(value: Any) -> Any:
    """``value`` (of a configuration) without what changes no key or value, its keys in order."""
    if not isinstance(value, dict):
        return value
    kept = (k for k in value if k not in OTHER_FIELDS and not str(k).endswith("_token_id"))
    return {str(k): _relevant(value[k]) for k in sorted(kept, key=str)}


def _sequence(
    decoder: NativeDecoder, kv: KVCacheConfig | None, row: dict[str, Any], index: int, tensors: dict[str, Tensor]
) -> Sequence:
    length = int(row["length"])
    if not 0 <= length <= decoder.max_positions:
        raise SafetensorError(f"row {index} has {length} tokens; the model's context is {decoder.max_positions}")
    made, pages = decoder.new_sequence(kv=kv), [tensors[f"pages.{index}.{p}"] for p in range(len(row["parts"]))]
    try:
        made.set_state(length, row["parts"], pages)
    except ValueError as error:
        raise SafetensorError(f"row {index}: {error}") from error
    return made


def _checksum(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.absolute().parent, delete=False) as f:
        temporary = Path(f.name)
    try:
        save_file(tensors, temporary, metadata)
        usual_mode(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
