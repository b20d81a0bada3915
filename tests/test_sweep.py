"""eval/sweep.py: its rows, the counting of bits, scoring together, restarting, peers; on tiny random models."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from llmq import QuantScheme, quantize_model
from llmq.config import PRESETS, RecipeConfig
from llmq.models.gguf_export import export_gguf
from llmq.models.load import open_model
from llmq.qtensor import expand_groups
from llmq.solvers import rtn
from llmq.sweep import command, making, peers, report, scoring
from llmq.sweep.peers import MAKERS, Maker, MakerFailed
from llmq.sweep.rows import ablation, parse_grid, presets
from llmq.sweep.stored_bits import linears_of, of_checkpoint

Tiny = Callable[..., Path]
TEXT = "def main(argv):\n    '''Parse the arguments – naïvely.'''\n    return json.loads(argv[0])\n" * 12


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows are made in this process, which is faster; nothing is kept in the user's cache."""
    monkeypatch.setattr(making, "apart", lambda function, *args: function(*args))
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))


def flags(model: Path, folder: Path, grid: str = "", *more: str) -> list[str]:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    out = ["--model", str(model), "--eval", str(text), "--eval-seqlen", "40", "--eval-windows", "2"]
    out += ["--calib", str(text), "--nsamples", "3", "--seqlen", "32", "--json", str(folder / "out.json")]
    return [*out, *(["--grid", grid] if grid else []), *more]


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_a_grid_is_methods_by_recipes_by_schemes() -> None:
    rows = parse_grid("gptq:w4g128,2.5bpw rtn:w3g64sym autoround-50:w2g64", presets("fast,best"))
    assert [r.name for r in rows] == [
        *("gptq fast w4g128", "gptq best w4g128", "gptq fast 2.5bpw", "gptq best 2.5bpw"),
        *("rtn w3g64sym", "autoround-50 w2g64"),
    ]
    assert [r.recipe.preset for r in rows[:2]] == ["fast", "best"]
    assert rows[2].budget.target_bpw == 2.5
    assert rows[4].scheme == QuantScheme(3, 64, sym=True)
    assert [r.is_peer for r in rows] == [False] * 5 + [True]


def test_the_ablation_adds_step_after_step() -> None:
    steps = [recipe.steps for recipe in ablation().values()]
    best = PRESETS["best"]
    assert steps == [best[:i] for i in range(len(best) + 1)]
    (row,) = (r for r in parse_grid("gptq:w3g64", ablation()) if r.name == "gptq +refit w3g64")
    assert row.recipe == RecipeConfig(only="target,refit")
    assert row.folder == "gptq-plus-refit-w3g64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtpq:w4g128", "'gtpq'; known: gptq, awq, .*, autoround-50"),
        ("gptq", "'gptq' has no schemes; write gptq:w4g128"),
        ("gptq:w5g128", "known: 2, 3, 4, 8"),
        ("gptq:w4g128,w4g128", "asks twice for gptq fast w4g128"),
        ("rtn:3bpw", "rtn takes one scheme such as w4g128; 3bpw needs gptq"),
    ],
)
def test_a_grid_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_grid(text, presets("fast"))


def rewritten(path: Path, out: Path, kinds: dict[str, gguf.GGMLQuantizationType]) -> Path:
    """The GGUF file with the tensors named in ``kinds`` quantized to these types."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for tensor in reader.tensors:
        value = np.array(tensor.data, dtype=np.float32).reshape([int(n) for n in reversed(tensor.shape)])
        kind = kinds.get(tensor.name)
        if kind is None:
            writer.add_tensor(tensor.name, value)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_bits_of_a_gguf_are_those_of_its_tensor_types(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "m")
    source = open_model(tmp_path / "m")
    plain = export_gguf(source.folder, tmp_path / "f16.gguf")
    assert of_checkpoint(plain, source) == 16.0
    n, k = source.block_linears(0)["self_attn.q_proj"]
    kinds = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_0, "output.weight": gguf.GGMLQuantizationType.Q8_0}
    mixed = rewritten(plain, tmp_path / "mixed.gguf", kinds)
    total = sum(a * b for a, b in linears_of(source).values())
    # Q4_0: 18 bytes for 32 weights; all others are now float32; the head does not count.
    assert of_checkpoint(mixed, source) == pytest.approx((4.5 * n * k + 32 * (total - n * k)) / total, rel=1e-12)


def test_bits_of_a_folder_are_what_is_stored_of_its_linears(tiny_model: Tiny, tmp_path: Path) -> None:
    source = open_model(tiny_model("qwen2"))  # its q, k and v have a bias
    assert (
        of_checkpoint(source.folder, source)
        == 8 * source.reader.dtype(next(iter(linears_of(source))) + ".weight").itemsize
    )
    tensors = {"model.embed_tokens.weight": torch.zeros(384, 8)}
    for name, (n, k) in linears_of(source).items():
        tensors |= {f"{name}.qweight": torch.zeros(k // 8, n, dtype=torch.int32), f"{name}.bias": torch.zeros(n)}
        tensors |= {f"{name}.scales": torch.zeros(k // 16, n, dtype=torch.float16)}
        tensors |= {f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // 16}
    save_file(tensors, tmp_path / "model.safetensors")
    assert of_checkpoint(tmp_path, source) == 4 + 1
    first = next(iter(linears_of(source)))
    tensors[f"{first}.g_idx"] = tensors[f"{first}.g_idx"].flip(0)  # an order that a reader needs
    save_file(tensors, tmp_path / "model.safetensors")
    total = sum(n * k for n, k in linears_of(source).values())
    assert of_checkpoint(tmp_path, source) == pytest.approx(5 + 32 * linears_of(source)[first][1] / total)
    del tensors[f"{first}.qweight"], tensors[f"{first}.scales"], tensors[f"{first}.g_idx"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"stores nothing under the name {first}"):
        of_checkpoint(tmp_path, source)


def test_a_sweep_is_made_scored_kept_and_taken_up_again(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("llama")
    assert command.main(flags(folder, tmp_path, "gptq:w4g32 rtn:w8g32", "--presets", "fast")) == 0
    first = read(tmp_path)
    assert list(first["rows"]) == ["gptq fast w4g32", "rtn w8g32"]
    coarse, fine = first["rows"].values()
    assert 4 < coarse["bits_per_weight"] < 5.2 < 8 < fine["bits_per_weight"]
    assert coarse["score"]["kl"] > 10 * fine["score"]["kl"] > 0
    assert coarse["activations"] == "float"
    table = capsys.readouterr().out
    assert f"| gptq fast w4g32 | {coarse['bits_per_weight']:.3f} | {coarse['score']['perplexity']:.3f} |" in table
    assert f"| unquantized | – | {first['reference']['perplexity']:.3f} |" in table

    # Nothing is done twice: neither rows of the record, nor folders made with the same options.
    made: list[str] = []
    monkeypatch.setattr(making, "quantize_row", lambda row, *_: made.append(row.name))
    with monkeypatch.context() as m:
        m.setattr(scoring, "score_together", lambda *_, **__: pytest.fail("scored again"))
        assert command.main(flags(folder, tmp_path, "gptq:w4g32 rtn:w8g32", "--presets", "fast")) == 0
    again = read(tmp_path)
    del again["rows"]["rtn w8g32"]
    (tmp_path / "out.json").write_text(json.dumps(again))
    assert command.main(flags(folder, tmp_path, "rtn:w8g32")) == 0
    assert made == []
    assert read(tmp_path)["rows"]["rtn w8g32"]["score"] == fine["score"]

    assert command.main(["--read", str(tmp_path / "out.json")]) == 0
    assert "| rtn w8g32 |" in capsys.readouterr().out
    # Figures of another protocol never join the table.
    assert command.main([*flags(folder, tmp_path, "rtn:w8g32"), "--eval-windows", "1"]) == 2
    assert "out.json holds rows of another sweep: protocol was" in capsys.readouterr().err


def test_a_folder_of_other_options_is_made_anew(tiny_model: Tiny, tmp_path: Path) -> None:
    folder, args = tiny_model("llama"), flags(tiny_model("llama"), tmp_path, "gptq:w4g32", "--presets", "fast")
    assert command.main(args) == 0
    before = (tmp_path / "out-models" / "gptq-fast-w4g32" / "llmq_report.json").read_text()
    (tmp_path / "out.json").unlink()
    assert command.main([*args, "--no-act-order"]) == 0
    after = (tmp_path / "out-models" / "gptq-fast-w4g32" / "llmq_report.json").read_text()
    assert json.loads(before)["options"]["gptq"]["act_order"] is True
    assert json.loads(after)["options"]["gptq"]["act_order"] is False
    assert str(folder) in after


def test_peers_are_scored_by_the_same_protocol(tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path / "peer.gguf")
    base = tmp_path / "base"
    from llmq.models.gguf import expand_gguf

    expand_gguf(path, base)
    other = quantize_model(base, QuantScheme(4, 32), method="rtn", head_bits=16, output=tmp_path / "llmq").folder
    (tmp_path / "text.txt").write_text("abcdefgh!!ijklm" * 40)
    args = ["--model", str(base), "--eval", str(tmp_path / "text.txt"), "--eval-seqlen", "32", "--eval-windows", "2"]
    args += ["--json", str(tmp_path / "out.json"), "--peer", f"GGUF={path}", "--peer", f"ours={other}"]
    (tmp_path / "empty").mkdir()
    assert command.main([*args, "--peer", f"broken={tmp_path / 'empty'}"]) == 1
    record = read(tmp_path)
    assert record["rows"]["GGUF"]["bits_per_weight"] == 32.0
    assert record["rows"]["GGUF"]["score"]["kl"] == pytest.approx(0, abs=1e-6)
    assert record["rows"]["ours"]["score"]["kl"] > 1e-4
    assert record["rows"]["ours"]["activations"] == "int8"  # a checkpoint given by its path is scored as it is
    assert "cannot be counted" in record["failed"]["broken"]


def test_a_model_that_overflows_does_not_take_the_others_with_it(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    (shard,) = bad.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"].fill_(math.inf)
    save_file(tensors, shard, {"format": "pt"})
    assert command.main(flags(folder, tmp_path, "", "--peer", f"bad={bad}", "--peer", f"good={folder}")) == 1
    record = read(tmp_path)
    assert list(record["rows"]) == ["good"]
    assert "likelihood is not finite" in record["failed"]["bad"]


FAKE = """
import json, sys, shutil
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
out = Path(job["folder"])
assert (out / "tokens.safetensors").is_file()
for name in ("packed", "plain"):
    shutil.copytree({plain!r}, out / name)
(out / "made.json").write_text(json.dumps({{"seconds": 12.0, "peak_bytes": 2**30, "versions": {{}}}}))
"""


def rounded_copy(folder: Path, out: Path, bits: int) -> Path:
    """The model with its linears rounded, as ordinary floats."""
    out.mkdir()
    source = open_model(folder)
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in linears_of(source):
            if f"{name}.weight" in tensors:
                W = tensors[f"{name}.weight"].float()
                tensors[f"{name}.weight"] = rtn.solve(W, QuantScheme(bits, 32)).dequantize()
        save_file(tensors, shard, {"format": "pt"})
    return out


@pytest.mark.parametrize(("bits", "code"), [(4, 0), (8, 1)])
def test_a_peers_package_makes_a_row(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, code: int
) -> None:
    """What comes back is held to the scheme: eight bits do not stand in a row of four."""
    folder = tiny_model("llama")
    plain = rounded_copy(folder, tmp_path / "rounded", bits)
    script = tmp_path / "script.py"
    script.write_text(FAKE.format(plain=str(plain)))
    monkeypatch.setattr(peers.peer_script, "__file__", str(script))
    monkeypatch.setitem(MAKERS, "fake", Maker("a fake", "json", "", "nothing"))
    assert command.main(flags(folder, tmp_path, "fake:w4g32")) == code
    record = read(tmp_path)
    if code:
        assert "a group holds" in record["failed"]["fake w4g32"]
        assert "w4g32 has 16; it is not quantized" in record["failed"]["fake w4g32"]
        assert not (tmp_path / "out-models" / "fake-w4g32").exists()
    else:
        assert record["rows"]["fake w4g32"]["made"]["seconds"] == 12.0
        assert record["rows"]["fake w4g32"]["score"]["kl"] > 1e-4


def test_a_package_that_is_absent_is_reported_with_the_way_to_get_it(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MAKERS, "absent", Maker("absent", "no_such_package", "pip install it", "nothing"))
    assert command.main(flags(tiny_model("llama"), tmp_path, "absent:w4g32 rtn:w4g32")) == 0
    out = capsys.readouterr().out
    assert "absent: absent w4g32: the package no_such_package is not installed; pip install it" in out
    assert "| rtn w4g32 |" in out
    row = Maker("x", "json", "", "nothing")
    assert row.missing({"json": Path(sys.executable)}) is None
    absent = Maker("x", "no_such_package", "get it", "nothing").missing({"no_such_package": Path(sys.executable)})
    assert absent is not None
    assert absent.startswith(f"the package no_such_package is not installed in {sys.executable}")


def test_a_script_that_fails_leaves_nothing(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('out of luck')")
    monkeypatch.setattr(peers.peer_script, "__file__", str(script))
    maker = Maker("a fake", "json", "", "nothing")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(MakerFailed, match="a fake ended with code 1: out of luck"):
        peers.make(maker, QuantScheme(4, 32), tiny_model("llama"), tokens, tmp_path / "w" / "row", None, lambda _: None)
    assert list((tmp_path / "w").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", ""], "--model is missing"),
        (["--eval", ""], "--eval is missing"),
        (["--grid", ""], "nothing is to be done"),
        (["--at-once", "0"], "--at-once is 0; it must be at least 1"),
        (["--presets", "slow"], "'slow'; known: fast, balanced, best"),
        (["--peer", "x"], "--peer 'x' is not of the form NAME=FOLDER"),
        (["--peer", "x=/nowhere"], "--peer x: there is no /nowhere"),
        (["--peer", "rtn w4g32=/"], "--peer rtn w4g32 has the name of a row of --grid"),
        (["--peer-python", "x=/bin/sh"], "'x'; known: auto_round"),
        (["--grid", "autoround-50:w4g32", "--calib", "self"], "peers need a text that can be given to them"),
        (["--activation-bits", "4"], "activation_bits is 4"),
    ],
)
def test_bad_input(
    tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert command.main([*flags(tiny_model("llama"), tmp_path, "rtn:w4g32"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(4.0, 10.0), (3.0, 20.0), (4.0, 12.0), (5.0, 10.0), (6.0, 9.0), (3.5, 25.0)]
    assert report.pareto(points) == [(3.0, 20.0), (4.0, 10.0), (6.0, 9.0)]


def test_the_plot(tiny_model: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install llmq[plot]")
    args = flags(tiny_model("llama"), tmp_path, "rtn:w4g32,w8g32", "--plot", str(tmp_path / "x.png"))
    assert command.main(args) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_weights_that_are_not_rounded_are_no_peers_row(tiny_model: Tiny, tmp_path: Path) -> None:
    source = open_model(tiny_model("llama"))
    peers.check_rounded(rounded_copy(source.folder, tmp_path / "r", 2), source, QuantScheme(2, 32))
    with pytest.raises(MakerFailed, match="it is not quantized"):
        peers.check_rounded(source.folder, source, QuantScheme(2, 32))


def test_a_peers_weights_that_were_read_wrongly_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    """Zeros that are one too small move every weight by a scale: few values a group still, and no model any more."""
    source = open_model(tiny_model("llama"))
    moved = rounded_copy(source.folder, tmp_path / "r", 4)
    name = min(linears_of(source))
    for shard in moved.glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{name}.weight" in tensors:
            t = rtn.solve(tensors[f"{name}.weight"].float(), QuantScheme(4, 32))
            tensors[f"{name}.weight"] += expand_groups(t.scale.float(), t.shape[1], t.scheme)
            save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(MakerFailed, match=f"{name}: what came back is .* more than 2: it was read wrongly"):
        peers.check_rounded(moved, source, QuantScheme(4, 32))
