"""Every block type: what we read of a GGUF file is what transformers' own reader makes of it."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers
from test_conversion import SYM, native, rewritten
from test_gguf import write_gguf

from llmq.conversion import convert
from llmq.dialects.source import open_source
from llmq.formats import gguf as blocks
from llmq.report import silent

FLOATS = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
KINDS = [t.name for t in gguf.GGMLQuantizationType if t.name not in FLOATS and blocks.readable(t.name)]
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.slow
def test_every_type_as_transformers_reads_it(tmp_path: Path) -> None:
    layers = -(-len(KINDS) // len(LINEARS))
    config = transformers.LlamaConfig(
        vocab_size=98,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "o")
    native(tmp_path / "o", tmp_path / "a", SYM)
    vocabulary, _ = write_gguf(tmp_path / "v.gguf")
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf", vocabulary=vocabulary)
    places = [f"blk.{i}.{name}.weight" for i in range(layers) for name in LINEARS]
    kinds = dict(zip(places, KINDS, strict=False))
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"} <= set(KINDS)
    file = rewritten(path, tmp_path / "c.gguf", kinds)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="c.gguf", dtype=torch.float32)
    source = open_source(file, inexact="requantize", log=silent)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    seen = set()
    for module, matrix in source.matrices.items():
        kind = kinds.get(f"{names.get_name(module)}.weight")
        if kind is None:
            continue
        seen.add(kind)
        weight, ours = theirs.get_submodule(module).weight, matrix.dequantize()
        if not matrix.note:
            assert torch.equal(ours, weight), kind
        else:  # rounded to 8 bits, or to a whole zero point: half a step of a grid, and the note says that it was
            assert "rounded to w8g32sym" in matrix.note or "offsets moved" in matrix.note, kind
            assert (ours - weight).norm() <= 0.02 * weight.norm(), kind
    assert seen == set(KINDS)
    exact = {"Q4_0", "Q8_0", "Q5_0", "IQ4_NL"}
    assert exact <= {kinds.get(f"{names.get_name(m)}.weight") for m, s in source.matrices.items() if not s.note}
