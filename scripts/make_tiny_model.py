#!/usr/bin/env python3
"""Make a tiny random model of a family, complete with a real tokenizer: ``make_tiny_model.py FAMILY OUT``.

For tests and for trying the tools without a download. Sizes are odd on purpose (48 or 80 wide, 112 in the MLP):
nothing is a multiple of 32, heads are grouped, Gemma's heads are wider than hidden_size / heads. Same arguments, same
bytes.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 384
MAX_POSITIONS = 512
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS = 0, 1, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
_SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 4}
_ODD: dict[str, Any] = {**_COMMON, **_SIZES, "num_key_value_heads": 2}
# 80 / 4 heads would be 20; Gemma's heads are 24 wide here, so q_proj is 96 x 80 and o_proj 80 x 96.
_GEMMA: dict[str, Any] = {**_ODD, "hidden_size": 80, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8}
_SLIDING = ["sliding_attention", "full_attention"]


def _gemma3_multimodal() -> PreTrainedConfig:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {**_GEMMA, "layer_types": _SLIDING}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)


# family -> (config, tied by the family's habit, tokenizer begins with BOS). gpt_neox has no family row on purpose.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedConfig], bool, bool]] = {
    "llama": (lambda: LlamaConfig(**_ODD), False, True),
    "mistral": (lambda: MistralConfig(**_ODD, sliding_window=8), False, True),
    "qwen2": (lambda: Qwen2Config(**_ODD), True, False),
    "qwen3": (lambda: Qwen3Config(**_ODD, head_dim=16), True, False),
    "gemma2": (lambda: Gemma2Config(**_GEMMA, layer_types=_SLIDING), True, True),
    "gemma3": (lambda: Gemma3TextConfig(**_GEMMA, layer_types=_SLIDING), True, True),
    "gemma3-multimodal": (_gemma3_multimodal, True, True),
    "gpt_neox": (lambda: GPTNeoXConfig(**_COMMON, **_SIZES), False, False),
}


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCAB`` tokens trained on the sources of the standard library's argparse and json modules."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts = [inspect.getsource(module) for module in (argparse, json)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(s, special=True) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: matrices N(0, 1/in_features), embeddings N(0, 1/width), vectors near where they began.

    The standard 0.02 would make blocks this narrow nearly the identity and the logits flat.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * noise)
        # Logits of standard deviation about 2.5. The gain sits in the final norm: in a tied head it would also blow up
        # the embeddings, and a token would predict itself.
        for name, module in model.get_decoder().named_children():  # type: ignore[operator]
            if "norm" in name:
                module.weight.add_(1.5)


def make_tiny_model(
    family: str,
    out: Path,
    *,
    seed: int = 0,
    tied: bool | None = None,
    shard_size: str = "5GB",
    blocks: int | None = None,
) -> Path:
    """Write a random model of ``family`` and its tokenizer to ``out`` and return ``out``.

    Args:
        family: a key of ``FAMILIES``; ValueError lists them.
        out: folder to make.
        seed: of the weights.
        tied: one matrix for embedding and head; None: as the family's models usually are.
        shard_size: largest safetensors file, as save_pretrained takes it.
        blocks: number of decoder blocks; None: 2.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; known: {', '.join(FAMILIES)}")
    make_config, usually_tied, bos = FAMILIES[family]
    config = make_config()
    text = config.get_text_config()
    config.tie_word_embeddings = text.tie_word_embeddings = usually_tied if tied is None else tied
    if blocks is not None:
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(blocks)]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(out, max_shard_size=shard_size)
    make_tokenizer(bos=bos).save_pretrained(out)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="one matrix for embedding and head")
    parser.add_argument("--blocks", type=int, default=None, help="decoder blocks (default 2)")
    args = parser.parse_args()
    print(make_tiny_model(args.family, args.out, seed=args.seed, tied=args.tied, blocks=args.blocks))


if __name__ == "__main__":
    main()
