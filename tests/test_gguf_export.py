"""A GGUF written from a model folder holds the same model: transformers reads it back to equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmq.models.gguf import expand_gguf
from llmq.models.gguf_export import FILE_TYPES, GGUF_FAMILIES, export_gguf, llama3_divisors, rope_order

Tiny = Callable[..., Path]


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def read_back(folder: Path, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the folder and of the file; both with the folder's config (transformers reads some keys only)."""
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"gguf_file": path.name, "config": original.config, "dtype": torch.float32}
    return logits(original), logits(AutoModelForCausalLM.from_pretrained(path.parent, **options))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_file_holds_the_same_weights(tiny_model: Tiny, tmp_path: Path, family: str) -> None:
    folder = tiny_model(family)
    path = export_gguf(folder, tmp_path / "x.gguf", file_type="f32")
    expected, found = read_back(folder, path)
    # The same floats in the same graph; Gemma's norms lose bits where 1 is added and taken off again.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gemma3_with_every_sixth_layer_global(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 1 is full_attention"):
        export_gguf(tiny_model("gemma3"), tmp_path / "x.gguf")
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gemma3", blocks=6))
    model.config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    model.save_pretrained(tmp_path / "six")
    path = export_gguf(tmp_path / "six", tmp_path / "x.gguf", file_type="f32")
    expected, found = read_back(tmp_path / "six", path)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_f16_rounds_matrices_and_keeps_vectors(tiny_model: Tiny, tmp_path: Path) -> None:
    path = export_gguf(tiny_model("llama"), tmp_path / "x.gguf", file_type="f16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    expected, found = read_back(tiny_model("llama"), path)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_large_values_are_refused_in_f16(tiny_model: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "big")
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has values that f16 does not hold"):
        export_gguf(tmp_path / "big", tmp_path / "x.gguf")


def test_config_and_vocabulary_of_another_file(tmp_path: Path) -> None:
    """Expanded from a GGUF and written again: transformers reads config, weights and tokenizer as from the first."""
    first, _ = write_gguf(tmp_path / "first.gguf")
    folder = expand_gguf(first, tmp_path / "folder")
    export_gguf(folder, tmp_path / "second.gguf", file_type="f32", vocabulary=first)
    again = expand_gguf(tmp_path / "second.gguf", tmp_path / "again")
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (folder, again)]
    assert torch.equal(*(logits(m) for m in models))
    texts = [AutoTokenizer.from_pretrained(f)("Hello, world!!").input_ids for f in (folder, again)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 5


def test_rows_of_a_head_become_neighbours() -> None:
    rows = rope_order(torch.arange(8)[:, None], 2)
    assert rows[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_divisors_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / llama3_divisors(rope, 64), scaled, rtol=1e-5)


def test_what_cannot_be_written_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file_type is 'q4_0'; known: f32, f16"):
        export_gguf(tiny_model("llama"), tmp_path / "x.gguf", file_type="q4_0")
    with pytest.raises(ValueError, match="model_type of a GGUF export is 'gpt_neox'"):
        export_gguf(tiny_model("gpt_neox"), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="mistral with a sliding window of 8 cannot be written"):
        export_gguf(tiny_model("mistral"), tmp_path / "x.gguf")
    assert MistralConfig.model_type in GGUF_FAMILIES
    assert set(FILE_TYPES) == {"f32", "f16"}
