from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from llmq.compat import API
from llmq.models import gguf
from llmq.models.load import open_model

pytestmark = pytest.mark.skipif(not API.makes_gguf_tokenizers, reason="transformers 4 makes wrong tokenizers")


def write_gguf(path: Path, *, bos: bool = True, split: int = 0, arch: str = "llama") -> tuple[Path, torch.Tensor]:
    """A tiny llama in GGUF, float32, with a byte-level vocabulary; returns the file and its embedding matrix."""
    import gguf as library
    import numpy as np

    rng = np.random.default_rng(0)
    writer = library.GGUFWriter(path, arch)
    writer.add_name("tiny")
    width, mlp, vocab = 48, 112, 98  # 94 printable characters and 4 tokens more
    for key, value in (
        ("context_length", 128), ("embedding_length", width), ("block_count", 1), ("feed_forward_length", mlp),
        ("attention.head_count", 4), ("attention.head_count_kv", 2), ("vocab_size", vocab),
        ("rope.dimension_count", 12),
    ):  # fmt: skip
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    if split:
        writer.add_uint16("split.count", split)
    tokens = ["<unk>", "<s>", "</s>", "!!", *(chr(0x21 + i) for i in range(vocab - 4))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocab - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    shapes = {"token_embd": (vocab, width), "output_norm": (width,)}
    block = {"attn_q": (48, 48), "attn_k": (24, 48), "attn_v": (24, 48), "attn_output": (48, 48)}
    block |= {"ffn_gate": (mlp, 48), "ffn_up": (mlp, 48), "ffn_down": (48, mlp), "attn_norm": (48,), "ffn_norm": (48,)}
    for name, shape in {**shapes, **{f"blk.0.{k}": v for k, v in block.items()}}.items():
        value = rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", value)
        if name == "token_embd":
            embedding = torch.from_numpy(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, embedding


def test_expansion_is_an_ordinary_model(tmp_path: Path) -> None:
    path, embedding = write_gguf(tmp_path / "x.gguf", bos=False)
    folder = gguf.expand_gguf(path, tmp_path / "out")
    source = open_model(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert source.tied
    assert "lm_head.weight" not in source.reader.names()
    assert torch.equal(source.reader.tensor("model.embed_tokens.weight"), embedding)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")  # refused for a model that still counts as quantized
    assert (folder / "generation_config.json").is_file()


@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_keeps_the_bos_of_the_file(tmp_path: Path, bos: bool) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf", bos=bos)
    tokenizer = open_model(gguf.expand_gguf(path, tmp_path / "out")).tokenizer
    assert (tokenizer("x").input_ids[0] == tokenizer.bos_token_id == 1) is bos


def test_tokenizer_that_loses_bos_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf", bos=True)
    load = gguf._load

    def without_bos(path: Path) -> tuple[object, object]:
        model, tokenizer = load(path)
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
        return model, tokenizer

    monkeypatch.setattr(gguf, "_load", without_bos)
    with pytest.raises(ValueError, match=r"add_bos_token is True, but the tokenizer .* gives .*BOS is 1"):
        gguf.expand_gguf(path, tmp_path / "out")


def test_split_gguf_is_refused(tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path / "x-00001-of-00003.gguf", split=3)
    with pytest.raises(ValueError, match=r"one part of a model split into 3 files; join them"):
        gguf.expand_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("keep", [4, 20, 200, 1500, -1000])
def test_truncated_gguf(tmp_path: Path, keep: int) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"x.gguf \({path.stat().st_size} bytes\) could not be read: .*truncated"):
        gguf.expand_gguf(path, tmp_path / "out")


def test_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf", arch="nonesuch")
    with pytest.raises(ValueError, match=r"could not be read: .*nonesuch.*does not read from GGUF"):
        gguf.expand_gguf(path, tmp_path / "out")


def test_expansion_that_does_not_fit_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf")
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"expands to 0.0 GB in .*, where 0.0 GB are free; .*LLMQ_CACHE"):
        gguf.expand_gguf(path, tmp_path / "out")


def test_errors_of_the_other_process_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_gguf(tmp_path / "x.gguf", split=3)
    with pytest.raises(ValueError, match=r"x.gguf is one part of a model split into 3 files"):
        gguf.expand_apart(path, tmp_path / "out")
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(gguf.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(ValueError, match=r"x.gguf could not be expanded: the process ended with code -9"):
        gguf.expand_apart(path, tmp_path / "out")
