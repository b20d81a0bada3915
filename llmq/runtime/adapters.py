"""LoRA adapters on a loaded model, under the names that transformers gives its own methods.

An adapter is a forward hook on each linear that it changes. The Hugging Face graph calls the hooks; the native decoder
reads them and adds the same products itself (cpp/engine/matrix.h). The integers of the model stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import cached_file

from llmq.kernels import reference
from llmq.models.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, LoraMatrices, read_adapter
from llmq.models.reader import read_json
from llmq.runtime.qlinear import QLinear

# Where a model keeps its adapters, by name, and which of them is in use.
LOADED, ACTIVE, DISABLED = "llmq_adapters", "llmq_active_adapter", "llmq_adapters_disabled"
# Arguments of transformers' load_adapter that say where the files are, and those that ask for nothing here.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
IGNORED_OPTIONS = ("adapter_kwargs", "load_config", "low_cpu_mem_usage", "device_map")


class LowRank:
    """A forward hook: ``scale * (x A^T) B^T`` on top of a linear's output, in fp32, rounded to the output's dtype.

    Attributes:
        matrices: A, B and scale.
        digest: of the whole adapter, which tells adapters apart.
    """

    def __init__(self, matrices: LoraMatrices, digest: str) -> None:
        self.matrices, self.digest = matrices, digest

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """float[..., in_features] and float[..., out_features] -> float[..., out_features]."""
        m = self.matrices
        return reference.add_low_rank(out.float(), args[0].float() @ m.a.float().T, m.bt, m.scale).to(out.dtype)


def adapter_of(module: nn.Module) -> LowRank | None:
    """The adapter in use on a linear."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, LowRank):
            return hook
    return None


class AdapterMethods:
    """Adapters of a causal language model: loaded one after another, at most one in use.

    peft's own layers in the model (``add_adapter``, ``get_peft_model``) stay with transformers and peft.
    """

    def load_adapter(
        self, peft_model_id: str | Path | None = None, adapter_name: str | None = None, **options: Any
    ) -> Any:
        """Load a LoRA adapter that peft has saved, and use it. peft need not be installed.

        Args:
            peft_model_id: a folder with adapter_config.json and adapter_model.safetensors, or a hub id.
            adapter_name: what to call it; None: ``default``.
            options: where to find the files on the hub, as transformers takes them. Anything else, such as
                ``is_trainable=True``, is left to transformers, which needs peft and puts its layers into the graph.

        Raises:
            FileNotFoundError: a folder without an adapter.
            ValueError: the name is taken; an adapter of another kind than LoRA on linears of the blocks; one of another
                model. The model is as before then.
        """
        where = {**options, **(options.get("adapter_kwargs") or {})}
        hub = {key: where[key] for key in HUB_OPTIONS if where.get(key) is not None}
        others = {k: v for k, v in options.items() if k not in HUB_OPTIONS + IGNORED_OPTIONS}
        asked = [k for k, v in others.items() if v is not None and v is not False and (k, v) != ("hotswap", "auto")]
        if peft_model_id is None or asked or getattr(self, "_hf_peft_config_loaded", False):
            return super().load_adapter(peft_model_id, adapter_name, **options)  # type: ignore[misc]
        name, loaded = adapter_name or "default", _loaded(self)
        if name in loaded:
            raise ValueError(f"there is an adapter {name!r} already; give another adapter_name, or delete_adapter it")
        adapter = read_adapter(_folder(peft_model_id, hub))
        _check_fits(self, adapter)
        loaded[name] = adapter
        _use(self, name)
        return None

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Use another of the loaded adapters. Raises ValueError for an unknown name, or several."""
        if not _loaded(self):
            return super().set_adapter(adapter_name)  # type: ignore[misc, no-any-return]
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"set_adapter got {len(names)} adapters; one at a time can be in use")
        _check_known(self, names)
        return _use(self, names[0])

    def disable_adapters(self) -> None:
        """Run the model without its adapter until ``enable_adapters``."""
        if not _loaded(self):
            return super().disable_adapters()  # type: ignore[misc, no-any-return]
        return _use(self, self.__dict__.get(ACTIVE), disabled=True)

    def enable_adapters(self) -> None:
        """Use the adapter again that was in use before ``disable_adapters``."""
        if not _loaded(self):
            return super().enable_adapters()  # type: ignore[misc, no-any-return]
        return _use(self, self.__dict__.get(ACTIVE))

    def active_adapters(self) -> list[str]:
        """The adapter in use, in a list; an empty one while adapters are disabled."""
        if not _loaded(self):
            return super().active_adapters()  # type: ignore[misc, no-any-return]
        name = None if self.__dict__.get(DISABLED) else self.__dict__.get(ACTIVE)
        return [] if name is None else [name]

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Forget adapters; if the one in use is among them, the model runs without any."""
        if not _loaded(self):
            return super().delete_adapter(adapter_names)  # type: ignore[misc, no-any-return]
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        _check_known(self, names)
        for name in names:
            _loaded(self).pop(name, None)
        active = self.__dict__.get(ACTIVE)
        return _use(self, None if active in names else active, disabled=bool(self.__dict__.get(DISABLED)))


def _loaded(model: Any) -> dict[str, Adapter]:
    found: dict[str, Adapter] = model.__dict__.setdefault(LOADED, {})
    return found


def _check_known(model: Any, names: list[str]) -> None:
    for name in names:
        if name not in _loaded(model):
            raise ValueError(f"there is no adapter {name!r}; loaded are: {', '.join(_loaded(model))}")


def _folder(name: str | Path, hub: dict[str, Any]) -> Path:
    if Path(name).is_dir():
        return Path(name, hub["subfolder"]) if "subfolder" in hub else Path(name)
    for file in (WEIGHTS_NAME, CONFIG_NAME):
        found = cached_file(str(name), file, **hub)
    assert found is not None
    return Path(found).parent


def _check_fits(model: Any, adapter: Adapter) -> None:
    """Raise ValueError unless every matrix of the adapter belongs to a linear of the model's blocks, shape and all."""
    modules = dict(model.named_modules())
    outside = [model.get_input_embeddings(), model.get_output_embeddings()]
    base = read_json(adapter.folder / CONFIG_NAME).get("base_model_name_or_path")
    for name, m in adapter.matrices.items():
        module = modules.get(name)
        where = f"{adapter.folder}: the adapter (of {base!r}) changes {name}"
        if module is None:
            raise ValueError(f"{where}, which {type(model).__name__} does not have: it was made for another model")
        if type(module) not in (QLinear, nn.Linear) or any(module is other for other in outside):
            raise ValueError(f"{where}, a {type(module).__name__}; only linears inside the blocks can have an adapter")
        shape, wanted = (m.bt.shape[1], m.a.shape[1]), (module.out_features, module.in_features)
        if shape != wanted:
            raise ValueError(
                f"{where} as a {shape[0]} x {shape[1]} matrix; the model's is {wanted[0]} x {wanted[1]}: it was made "
                "for another model"
            )


def _use(model: Any, name: str | None, *, disabled: bool = False) -> None:
    """Put the hooks of one adapter, or of none, in place of those that are there."""
    model.__dict__.update({ACTIVE: name, DISABLED: disabled})
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, LowRank):
                del module._forward_hooks[key]
    if name is None or disabled:
        return
    adapter = _loaded(model)[name]
    digest = adapter.digest
    for path, matrices in adapter.matrices.items():
        model.get_submodule(path).register_forward_hook(LowRank(matrices, digest))
