#!/usr/bin/env python3
"""Make a random model with a real tokenizer: tiny, of a family, or of the shape of a published model.

    make_tiny_model.py gemma3 OUT
    make_tiny_model.py --shape gemma-3-1b OUT

Tiny models are for tests and for trying the tools without a download. Their sizes are odd on purpose (48 or 80 wide,
112 in the MLP): nothing is a multiple of 32, heads are grouped, Gemma's heads are wider than hidden_size / heads.

A shape is for work on speed, where the weights' values do not matter: the published model's sizes, in bfloat16,
written matrix by matrix. Its tokenizer is the tiny one, which uses the first 384 tokens of the vocabulary only.
Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
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


def _gemma3_multimodal() -> PretrainedConfig:
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
FAMILIES: dict[str, tuple[Callable[[], PretrainedConfig], bool, bool]] = {
    "llama": (lambda: LlamaConfig(**_ODD), False, True),
    "mistral": (lambda: MistralConfig(**_ODD, sliding_window=8), False, True),
    "qwen2": (lambda: Qwen2Config(**_ODD), True, False),
    "qwen3": (lambda: Qwen3Config(**_ODD, head_dim=16), True, False),
    "gemma2": (lambda: Gemma2Config(**_GEMMA, layer_types=_SLIDING), True, True),
    "gemma3": (lambda: Gemma3TextConfig(**_GEMMA, layer_types=_SLIDING), True, True),
    "gemma3-multimodal": (_gemma3_multimodal, True, True),
    "gpt_neox": (lambda: GPTNeoXConfig(**_COMMON, **_SIZES), False, False),
}


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _gemma3_shape(**sizes: Any) -> Gemma3TextConfig:
    ropes = {"full_attention": _rope(1e6), "sliding_attention": _rope(1e4)}
    same = {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
    tokens = {"vocab_size": 262144, "max_position_embeddings": 32768, "rope_parameters": ropes}
    return Gemma3TextConfig(**same, **tokens, sliding_window=512, **_SPECIAL_IDS, **sizes)


_SPECIAL_IDS: dict[str, int] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_LLAMA3_ROPE = _rope(
    5e5,
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

# Name of a published model -> its config. All of them tie embedding and head.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma-3-1b": lambda: _gemma3_shape(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26),
    "gemma-3-270m": lambda: _gemma3_shape(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_parameters=_rope(1e5), **_SPECIAL_IDS,
    ),
    "llama-3.2-1b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_parameters=_LLAMA3_ROPE,
        **_SPECIAL_IDS,
    ),
}  # fmt: skip


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


def make_shape(shape: str, out: Path, *, seed: int = 0, blocks: int | None = None) -> Path:
    """Write a random bfloat16 model of the sizes of a published one, and the tiny tokenizer, to ``out``.

    Memory stays at the largest matrix: each is drawn, written as a shard of its own, and dropped.

    Args:
        shape: a key of ``SHAPES``; ValueError lists them.
        out: folder to make.
        seed: of the weights.
        blocks: number of decoder blocks; None: the published model's.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; known: {', '.join(SHAPES)}")
    config = SHAPES[shape]()
    config.tie_word_embeddings = True
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:blocks]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())  # tied ones once
    weight_map, total = {}, 0
    for i, (name, parameter) in enumerate(parameters.items(), 1):
        shard = f"model-{i:05d}-of-{len(parameters):05d}.safetensors"
        value = _drawn(parameter.shape, gemma="gemma" in config.model_type, draw=draw)
        save_file({name: value}, out / shard, metadata={"format": "pt"})
        weight_map[name] = shard
        total += value.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    make_tokenizer(bos=True).save_pretrained(out)
    return out


def _drawn(shape: torch.Size, *, gemma: bool, draw: torch.Generator) -> torch.Tensor:
    """A bf16 matrix of N(0, 1/in_features), or a norm that multiplies by one (0 where the model adds 1)."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if gemma else 1.0, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=draw) * shape[1] ** -0.5).bfloat16()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("family", nargs="?", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    what.add_argument("--shape", choices=SHAPES, metavar="NAME", help=f"of a published model: {', '.join(SHAPES)}")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="one matrix for embedding and head")
    parser.add_argument("--blocks", type=int, default=None, help="decoder blocks (default: 2; a shape's own)")
    args = parser.parse_args()
    if args.shape:
        if args.tied is False:
            parser.error("--no-tied does not go with --shape: the published models of these shapes tie their head")
        print(make_shape(args.shape, args.out, seed=args.seed, blocks=args.blocks))
        return
    print(make_tiny_model(args.family, args.out, seed=args.seed, tied=args.tied, blocks=args.blocks))


if __name__ == "__main__":
    main()
