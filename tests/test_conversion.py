"""Conversions keep every integer, or refuse; what is written opens again, through other code where there is some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_dialects import IDS, check_logits, dense_logits, linears, original, write  # noqa: F401
from test_formats import random_qtensor
from test_gguf import write_gguf

import llmq
from llmq import convert as command
from llmq.checkpoint import CheckpointWriter, matrix_tensors, quantization_config
from llmq.config import QuantScheme
from llmq.conversion import convert, same_numbers
from llmq.dialects import open_quantized
from llmq.dialects.source import open_source
from llmq.formats import Inexact
from llmq.models.gguf_export import rope_order
from llmq.qtensor import QTensor
from llmq.report import silent

SYM, ASYM, HEAD = QuantScheme(4, 64, sym=True), QuantScheme(4, 64), QuantScheme(8, 64, sym=True)


def native(original: Path, folder: Path, scheme: QuantScheme, *, table: bool = False) -> dict[str, QTensor]:  # noqa: F811
    """An llmq folder of random codes, with a quantized embedding if asked for; what it holds."""
    dense = load_file(original / "model.safetensors")
    schemes = dict.fromkeys(linears(original), scheme) | ({"model.embed_tokens": HEAD} if table else {})
    held, tensors = {}, dict(dense)
    for name, s in schemes.items():
        t = random_qtensor(*tensors.pop(f"{name}.weight").shape, s)
        held[name] = QTensor(t.q, t.scale * 0.05, t.zero, s)
        tensors.update({f"{name}.{key}": value for key, value in matrix_tensors(held[name]).items()})
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = quantization_config(schemes, scheme, {}, "test")
    with CheckpointWriter(folder, 1, overwrite=False) as writer:
        writer.write_shard(tensors)
        writer.finish(original, config, {"linears": []}, "card")
        (writer.partial / "tokenizer_config.json").write_text("{}")
        writer.publish()
    return held


def found(path: Path) -> dict[str, QTensor]:
    return {name: m.read() for name, m in open_source(path, inexact="refuse", log=silent).matrices.items()}


def check_same(a: dict[str, QTensor], b: dict[str, QTensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_numbers(a[name], b[name]), name


FOLDERS = ("gptq", "awq", "compressed-tensors", "mlx")


@pytest.mark.parametrize("scheme", [SYM, ASYM], ids=str)
@pytest.mark.parametrize("target", FOLDERS)
def test_there_and_back(target: str, scheme: QuantScheme, original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", scheme)
    convert(tmp_path / "a", tmp_path / "b", target)
    check_same(found(tmp_path / "b"), held)
    convert(tmp_path / "b", tmp_path / "c", "llmq")
    check_same(found(tmp_path / "c"), held)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert (tmp_path / "b" / "tokenizer_config.json").is_file()
    # It runs, and gives what the numbers say.
    model = llmq.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    check_logits(model, dense_logits(original, {name: t.dequantize() for name, t in held.items()}))


def test_files_that_loaders_look_for(original: Path, tmp_path: Path) -> None:  # noqa: F811
    native(original, tmp_path / "a", ASYM)
    convert(tmp_path / "a", tmp_path / "gptq", "gptq")
    block = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert block == json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert block["checkpoint_format"] == "gptq_v2", "asymmetric zeros are fragile in version 1"
    assert block["sym"] is False
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert "integer by integer" in card
    assert "llmq.AutoModelForCausalLM" in card
    convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    assert (tmp_path / "awq" / "quant_config.json").is_file()
    assert not (tmp_path / "awq" / "quantize_config.json").exists(), "a loader would believe it"


def test_schemes_by_module(original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", SYM)
    mixed = tmp_path / "mixed"
    schemes = {name: QuantScheme(3, 32, True) if "down" in name else SYM for name in held}
    held = {name: random_qtensor(*t.shape, schemes[name]) for name, t in held.items()}
    tensors = {n: t for n, t in load_file(original / "model.safetensors").items() if "_proj" not in n}
    for name, t in held.items():
        tensors.update({f"{name}.{key}": value for key, value in matrix_tensors(t).items()})
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = quantization_config(schemes, SYM, {}, "test")
    with CheckpointWriter(mixed, 1, overwrite=False) as writer:
        writer.write_shard(tensors)
        writer.finish(original, config, {}, "card")
        writer.publish()
    for target in ("gptq", "compressed-tensors", "mlx"):
        convert(mixed, tmp_path / target, target)
        check_same(found(tmp_path / target), held)
    with pytest.raises(Inexact, match=r"cannot be written as awq exactly: .*down_proj: w3g32sym has 3 bits"):
        convert(mixed, tmp_path / "awq", "awq")
    convert(mixed, tmp_path / "awq", "awq", lossy=True)
    rounded = found(tmp_path / "awq")
    for name, t in held.items():
        if "down" not in name:
            assert same_numbers(rounded[name], t), name
        else:
            # Half a step of the new grid, and a whole one at the end that a full-range grid clips (8 becomes 7).
            step = rounded[name].scale.float().abs().max()
            assert (rounded[name].dequantize() - t.dequantize()).abs().max() <= 1.01 * step


def test_embedding_stays_where_the_format_has_a_place(original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", SYM, table=True)
    convert(tmp_path / "a", tmp_path / "mlx", "mlx")
    check_same(found(tmp_path / "mlx"), held)
    convert(tmp_path / "a", tmp_path / "gptq", "gptq")
    embedding = held.pop("model.embed_tokens")
    check_same(found(tmp_path / "gptq"), held)
    stored = open_quantized(tmp_path / "gptq").reader.tensor("model.embed_tokens.weight")
    assert torch.equal(stored, embedding.dequantize()), "exact, in float32"


def test_gguf_there_and_back(original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", SYM, table=True)
    vocabulary, _ = write_gguf(tmp_path / "v.gguf")
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf", vocabulary=vocabulary)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    back = found(path)
    for name, t in held.items():
        assert torch.equal(back[name].q, t.q), name
        assert torch.equal(back[name].dequantize(), t.dequantize()), name
    # transformers' own reader undoes llama.cpp's order of q and k by itself: it must come to the same model.
    expected = dense_logits(original, {name: t.dequantize() for name, t in held.items()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="b.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    check_logits(llmq.AutoModelForCausalLM.from_pretrained(path), expected)


@pytest.mark.parametrize("target", ["gguf", "gptq"])
def test_three_lines_from_a_file_to_text(target: str, original: Path, tmp_path: Path) -> None:  # noqa: F811
    """Those of the README: the tokenizer is found where the model says it came from, for a file, too."""
    native(original, tmp_path / "a", SYM)
    vocabulary, _ = write_gguf(tmp_path / "v.gguf")
    path = tmp_path / ("b.gguf" if target == "gguf" else "b")
    convert(tmp_path / "a", path, target, vocabulary=vocabulary if target == "gguf" else None)
    if target == "gptq":
        own = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="v.gguf")
        own.init_kwargs.pop("gguf_file", None)
        own.save_pretrained(path)
    model = llmq.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    inputs = tokenizer("Hello", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4)
    length = inputs["input_ids"].shape[1]
    assert length > 1
    assert out[0, :length].tolist() == inputs["input_ids"][0].tolist()
    assert out.shape[1] > length


def test_gguf_of_a_gemma_with_a_tied_embedding(tmp_path: Path) -> None:
    """Norms are 1 + w in the file; the head is the embedding."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=64,
    )
    model = transformers.Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0, 0.1)  # new ones are 0
    model.save_pretrained(tmp_path / "gemma")
    held = native(tmp_path / "gemma", tmp_path / "a", SYM, table=True)
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert "output.weight" not in stored
    weight = load_file(tmp_path / "gemma" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(values(stored["output_norm.weight"]), weight + 1)
    expected = dense_logits(tmp_path / "gemma", {name: t.dequantize() for name, t in held.items()})
    found = llmq.AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(found.get_input_embeddings(), llmq.QEmbedding)
    check_logits(found, expected)


def test_q4_1_is_refused_unless_its_offsets_may_be_rounded(original: Path, tmp_path: Path) -> None:  # noqa: F811
    held = native(original, tmp_path / "a", ASYM)
    with pytest.raises(Inexact, match=r"cannot be written as gguf exactly: .*are no fp16 numbers, as Q4_1 needs"):
        convert(tmp_path / "a", tmp_path / "b.gguf", "gguf")
    assert not (tmp_path / "b.gguf").exists()
    convert(tmp_path / "a", tmp_path / "b.gguf", "gguf", lossy=True)
    for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            assert tensor.tensor_type.name == "Q4_1"
            t = held["model.layers.1.mlp.down_proj"]
            value = values(tensor)
            assert (value - t.dequantize()).abs().max() <= 2.0**-11 * 15 * t.scale.float().abs().max()


def test_types_without_a_grid_are_refused_or_rounded(original: Path, tmp_path: Path) -> None:  # noqa: F811
    native(original, tmp_path / "a", SYM)
    vocabulary, _ = write_gguf(tmp_path / "v.gguf")
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf", vocabulary=vocabulary)
    other = rewritten(path, tmp_path / "c.gguf", {"blk.0.ffn_up.weight": "Q5_1", "token_embd.weight": "IQ4_NL"})
    with pytest.raises(Inexact, match=r"model.layers.0.mlp.up_proj is Q5_1, which no grid of ours holds"):
        open_source(other, inexact="refuse", log=silent)
    source = open_source(other, inexact="requantize", log=silent)
    notes = "\n".join(source.notes)
    assert "model.layers.0.mlp.up_proj: Q5_1 rounded to w8g32sym, relative error 0.00" in notes
    assert "embed_tokens" not in notes, "IQ4_NL is exact"
    weight = next(t for t in gguf.GGUFReader(other).tensors if t.name == "blk.0.ffn_up.weight")
    value = values(weight)
    got = source.matrices["model.layers.0.mlp.up_proj"].dequantize()
    assert (got - value).norm() <= 0.01 * value.norm()


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def rewritten(path: Path, out: Path, kinds: dict[str, str]) -> Path:
    """A copy of a GGUF file with some tensors of random numbers in other block types."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for name, f in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            sub = f.types[1] if len(f.types) > 1 else None
            writer.add_key_value(name, f.contents(), f.types[0], sub_type=sub)
    for t in reader.tensors:
        kind, data = t.tensor_type, t.data
        if t.name in kinds:
            kind = gguf.GGMLQuantizationType[kinds[t.name]]
            size, nbytes = gguf.GGML_QUANT_SIZES[kind]
            rows, columns = int(t.shape[1]), int(t.shape[0])
            W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).numpy()
            try:
                data = gguf.quants.quantize(W, kind)
            except NotImplementedError:  # any bytes are codes; below 0x3C all their fp16 numbers are finite
                draw = torch.Generator().manual_seed(2)
                shape = (rows, columns // size * nbytes)
                data = torch.randint(0, 0x3C, shape, dtype=torch.uint8, generator=draw).numpy()
        writer.add_tensor(t.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_types_that_8_bits_hold_exactly(original: Path, tmp_path: Path) -> None:  # noqa: F811
    native(original, tmp_path / "a", SYM)
    vocabulary, _ = write_gguf(tmp_path / "v.gguf")
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf", vocabulary=vocabulary)
    kinds = {"blk.0.attn_q.weight": "Q5_0", "blk.0.ffn_up.weight": "IQ4_NL", "token_embd.weight": "Q5_1"}
    other = rewritten(path, tmp_path / "c.gguf", kinds)
    source = open_source(other, inexact="refuse", log=silent)
    # A table in a type without a grid is no reason to refuse the model: it is a plain tensor, and a note says so.
    assert source.notes == ["model.embed_tokens: Q5_1, which no grid of ours holds, kept dense in float32"]
    dense = {t.name: values(t) for t in gguf.GGUFReader(other).tensors}
    assert torch.equal(source.others["model.embed_tokens.weight"].read(), dense["token_embd.weight"])
    up = source.matrices["model.layers.0.mlp.up_proj"]
    assert torch.equal(up.dequantize(), dense["blk.0.ffn_up.weight"])
    assert up.scheme == QuantScheme(8, 32, sym=True)
    q = source.matrices["model.layers.0.self_attn.q_proj"].dequantize()
    assert torch.equal(rope_order(q, 4), dense["blk.0.attn_q.weight"])


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2, 0.99])
def test_a_file_cut_short_is_refused(share: float, original: Path, tmp_path: Path) -> None:  # noqa: F811
    native(original, tmp_path / "a", SYM)
    path = convert(tmp_path / "a", tmp_path / "b.gguf", "gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"b\.gguf"):
        convert(path, tmp_path / "c", "llmq")
    assert not (tmp_path / "c").exists()


def test_the_command(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    native(original, tmp_path / "a", SYM)
    assert command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "gptq"]) == 0
    out = capsys.readouterr().out
    assert "GPTQ, version 1, w4g64sym" in out
    assert "exact" in out
    for flags, message in (
        (["--format", "exl2"], "format is 'exl2'; known: llmq, gptq"),
        (["--format", "gptq"], "exists; use --overwrite"),
        (["--format", "mlx", "--vocabulary", "x.gguf"], "a vocabulary belongs into a GGUF file"),
    ):
        assert command.main([str(tmp_path / "a"), str(tmp_path / "b"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert command.main([str(original), str(tmp_path / "c"), "--format", "gptq"]) == 2
    assert "is not quantized" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_folder_that_does_not_read_back_is_not_published(
    original: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmq import conversion

    native(original, tmp_path / "a", SYM)
    monkeypatch.setattr(conversion, "same_numbers", lambda *_: False)
    with pytest.raises(ValueError, match="what was read back differs from what was written"):
        convert(tmp_path / "a", tmp_path / "b", "gptq")
    assert not (tmp_path / "b").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_same_numbers() -> None:
    t: Any = random_qtensor(4, 64, SYM)
    assert same_numbers(t, QTensor(t.q, t.scale, torch.full(t.scale.shape, 8, dtype=torch.uint8), ASYM))
    assert not same_numbers(t, QTensor(t.q ^ 1, t.scale, None, SYM))
    assert not same_numbers(t, QTensor(t.q, t.scale * 2, None, SYM))
