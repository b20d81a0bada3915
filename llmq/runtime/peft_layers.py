"""peft's LoRA layers around QLinear, for training adapters on a quantized model (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib
from typing import Any

from llmq.runtime.qlinear import QLinear


def patch_peft() -> None:
    """Let peft put LoRA layers around quantized linears, for this process. Safe to call again.

    ``get_peft_model``, ``PeftModel.from_pretrained`` and a model's ``add_adapter`` then take a QLinear as they take an
    ``nn.Linear`` (name the target modules: ``"all-linear"`` finds only the latter).

    Raises ImportError without peft.
    """
    lora_layer, lora_model = (importlib.import_module(f"peft.tuners.lora.{part}") for part in ("layer", "model"))
    theirs = lora_model.dispatch_default
    if getattr(theirs, "for_llmq", False):
        return

    class QLinearLora(lora_layer.Linear):  # type: ignore[misc, name-defined]
        """peft's layer; what would need a weight in floats says so."""

        def merge(self, *_args: Any, **_kwargs: Any) -> None:
            """Raise ValueError: integers cannot take the sum."""
            raise ValueError(
                "an adapter cannot be merged into a quantized linear: its integers would change; merge it into the "
                "original model (PeftModel.from_pretrained(original, folder).merge_and_unload()), or keep it apart: "
                "model.load_adapter(folder) of llmq runs it beside the integers"
            )

    def dispatch(target: Any, adapter_name: str, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, QLinear):
            return QLinearLora(target, adapter_name, **kwargs)
        return theirs(target, adapter_name, **kwargs)

    dispatch.for_llmq = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch  # type: ignore[attr-defined]
