"""The last step of a run: read the written folder back and refuse to publish one that does not reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.checkpoint import read_qtensor
from llmq.plan import Plan
from llmq.runtime.hf import register
from llmq.runtime.qlinear import set_activation_bits

# The loaded model multiplies the same fp32 numbers as the run did, in another order: errors of a few 2**-24 a product,
# summed over layers. A wrong scale or code shows at 1e-2.
TOLERANCE = 1e-3


class ProbeLike(Protocol):
    """What the run knows of its model: ids i64[1, t], f32[1, t, hidden] before the first and after the last block."""

    ids: Tensor
    entering: Tensor
    leaving: Tensor


@torch.no_grad()
def check_folder(
    folder: Path, plan: Plan, digests: dict[str, str], probe: ProbeLike | None, block_names: list[str]
) -> dict[str, Any]:
    """Compare the folder with what was solved.

    Every matrix is read back and must have the digest it was solved with; the folder is loaded as a user would load it,
    and its decoder must give the hidden states that the run computed (float activations), and finite logits on the
    kernels (int8 activations).

    Returns:
        What was compared, for the report: matrices, relative difference of the hidden states, and how far int8
        activations move them.

    Raises:
        ValueError: the folder does not reproduce; names the tensor or both numbers.
    """
    for matrix in (*plan.linears, *plan.tables):
        found = read_qtensor(folder, matrix.name, matrix.n, matrix.k, matrix.scheme).digest()
        if found != digests[matrix.name]:
            raise ValueError(
                f"{matrix.name}: what was read back differs from what was solved; the folder is not published"
            )
    model = _load(folder)
    result: dict[str, Any] = {"matrices": len(digests)}
    ids = (
        probe.ids if probe is not None else torch.arange(min(64, int(model.config.get_text_config().vocab_size)))[None]
    )
    if probe is not None:
        set_activation_bits(model, 16)
        exact = _leaving(model, block_names, ids, probe.entering)
        difference = float((exact - probe.leaving).norm() / probe.leaving.norm())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the written model's hidden states differ from the solved one's by {difference:.2g} "
                f"(limit {TOLERANCE:g}); the folder is not published"
            )
        set_activation_bits(model, 8)
        result["hidden_difference"] = difference
        int8 = _leaving(model, block_names, ids, probe.entering)
        result["int8_activation_difference"] = float((int8 - exact).norm() / exact.norm())
    logits = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("the written model gives logits that are not finite; the folder is not published")
    return result


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    register()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise ValueError(f"the written folder loads with {kind.replace('_', ' ')}: {names}; it is not published")
    return model.eval()


def _leaving(model: Any, block_names: list[str], ids: Tensor, entering: Tensor) -> Tensor:
    """Output of the last block when the first one is given ``entering``, whatever the embedding makes of ``ids``."""
    first, last = model.get_submodule(block_names[0]), model.get_submodule(block_names[-1])
    seen: list[Tensor] = []

    def enter(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (entering, *args[1:]), kwargs
        return (), {**kwargs, next(iter(kwargs)): entering}

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        first.register_forward_pre_hook(enter, with_kwargs=True),
        last.register_forward_hook(leave),
    ]
    try:
        model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]
