"""llmq.AutoModelForCausalLM: transformers' class, and quantized folders and files of other tools besides."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from llmq.config import one_of
from llmq.dialects import INEXACT, quantization_block
from llmq.runtime.foreign import foreign_config


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """As transformers' ``AutoModelForCausalLM``; opens GPTQ, AWQ, compressed-tensors and MLX folders, too.

    Their integers go onto llmq's kernels as they are.
    """

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, inexact: str = "refuse", **kwargs: Any) -> Any:  # type: ignore[override]
        """A model from a folder or a hub id; all arguments of transformers' method, and one more.

        Args:
            name: folder or hub id.
            args, kwargs: as transformers takes them. Folders of other tools are computed in float32 unless ``dtype``
                says otherwise.
            inexact: what to do with stored numbers that the kernels cannot hold exactly: ``refuse`` (an error that
                names them) or ``requantize`` (a warning for each matrix says what it cost).

        Raises:
            ValueError: a method that llmq does not read, a damaged folder, numbers that cannot be held.
        """
        one_of("inexact", inexact, INEXACT)
        if "config" in kwargs or "gguf_file" in kwargs:
            return super().from_pretrained(name, *args, **kwargs)
        hub = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "revision", "subfolder", "token") if k in kwargs}
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name, **hub)
        if not _is_foreign(raw):
            return super().from_pretrained(name, *args, **kwargs)
        config = transformers.AutoConfig.from_pretrained(name, **hub)
        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(name, *args, config=foreign_config(config, inexact), **kwargs)


def _is_foreign(raw: dict[str, Any]) -> bool:
    """Whether a config.json is that of a foreign dialect; other methods are left to transformers."""
    try:
        found = quantization_block(raw)
    except ValueError:
        return False
    return found is not None and found[0] != "llmq"
