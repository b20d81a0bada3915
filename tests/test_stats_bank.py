"""Statistics kept: against a naive sum, over parts of a text, and runs that start from them."""

import json
import shutil

import pytest
import torch

import llmq
from llmq import CalibConfig, QuantScheme, RecipeConfig, StatsConfig, quantize_model
from llmq.calibration import load
from llmq.checkpoint import read_qtensor
from llmq.config import BudgetConfig, GPTQConfig
from llmq.models.load import open_model
from llmq.stats_bank import collect, held_windows, merge, open_bank

CALIB = CalibConfig(calib="stdlib", nsamples=16, seqlen=24)
SCHEME = QuantScheme(3, 32)
SHARE = GPTQConfig().sink_share


def quiet(_line):
    pass


@pytest.fixture(scope="module")
def bank(tiny_model, tmp_path_factory):
    """(source, texts, folder of the bank of all windows)."""
    source = open_model(tiny_model("llama"))
    texts = load(CALIB, source.tokenizer)
    folder = tmp_path_factory.mktemp("bank") / "all"
    collect(source, texts, folder, SHARE, quiet)
    return source, texts, folder


def part_of(texts, windows):
    import dataclasses
    import hashlib

    tokens = texts.tokens[windows]
    return dataclasses.replace(texts, tokens=tokens, sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest())


def test_the_sums_are_those_of_the_original_models_inputs(bank):
    source, texts, folder = bank
    model = llmq.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj"
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for window in texts.tokens:
            model(input_ids=window[None], use_cache=False)
    held = held_windows(16)
    assert held == [7, 15]
    got = open_bank(str(folder), source, SHARE).observed(name, judged=True)
    for stats, windows in ((got.train, [i for i in range(16) if i not in held]), (got.held, held)):
        x = torch.cat([seen[i] for i in windows])
        count = torch.ones(len(windows), 24, 1, dtype=torch.float64)
        count[:, 0] = SHARE * 24
        expected = x.T @ (count.reshape(-1, 1) * x)
        # Products in fp32, sums stored in fp32: a few units of 2**-24, of the largest entry.
        torch.testing.assert_close(stats.H, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        torch.testing.assert_close(stats.abs_sum, x.abs().sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.abs_max, x.abs().amax(0), rtol=1e-4, atol=1e-6)
        assert stats.n_tokens == len(x)
    whole = open_bank(str(folder), source, SHARE).observed(name, judged=False)
    assert whole.held is None
    assert whole.train.n_tokens == texts.tokens.numel()


def test_parts_add_up_to_the_whole(bank, tmp_path):
    source, texts, folder = bank
    for name, windows in (("a", slice(0, 8)), ("b", slice(8, 16))):
        collect(source, part_of(texts, windows), tmp_path / name, SHARE, quiet)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    whole = open_bank(str(folder), source, SHARE)
    for text in (f"{tmp_path / 'a'},{tmp_path / 'b'}", str(tmp_path / "merged")):
        joined = open_bank(text, source, SHARE)
        assert joined.tokens == whole.tokens == 16 * 24
        assert len(joined.calibration) == 2
        for block in source.block_names:
            for group in source.groups:
                want = whole.observed(f"{block}.{group[0]}", judged=True)
                got = joined.observed(f"{block}.{group[0]}", judged=True)
                for one, two in ((want.train, got.train), (want.held, got.held)):
                    assert one.n_tokens == two.n_tokens
                    assert torch.equal(one.abs_max, two.abs_max)
                    # The same products, added in fp64 in another order; stored in fp32 once or twice.
                    torch.testing.assert_close(two.H, one.H, rtol=0, atol=2**-22 * float(one.H.abs().max()))
                    torch.testing.assert_close(two.abs_sum, one.abs_sum)


def run(source, out, **options):
    options.setdefault("recipe", RecipeConfig(preset="fast"))
    return quantize_model(source.folder, SCHEME, output=out, **options)


def codes(folder, name, n, k):
    return read_qtensor(folder, name, n, k, SCHEME).q


def test_a_run_starts_from_the_bank_and_runs_no_text(bank, tmp_path, monkeypatch):
    """The first linears see the same inputs in both models: their integers are those of a run on the text."""
    source, _, folder = bank
    text = run(source, tmp_path / "text", calib=CALIB)
    for module in ("llmq.pipeline.block_inputs", "llmq.calibration.load"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("text was run"))
    banked = run(source, tmp_path / "banked", stats=StatsConfig(stats=str(folder)))
    assert banked.report["calibration"] is None
    assert banked.report["statistics"]["tokens"] == 16 * 24
    shapes = source.block_linears(0)
    agree = {}
    for block in source.block_names:
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            one, two = (codes(r.folder, f"{block}.{name}", *shapes[name]) for r in (text, banked))
            agree[block, name] = float((one == two).float().mean())
    first, last = source.block_names[0], source.block_names[-1]
    assert agree[first, "self_attn.q_proj"] > 0.999  # sums in fp32: a code on the edge may fall the other way
    assert agree[last, "mlp.down_proj"] < 0.99  # its inputs come from quantized layers in one run only
    rows = banked.report["linears"]
    assert sum(r["error"] for r in rows) < sum(r["error_rtn"] for r in rows)


def test_steps_that_need_the_streams_are_left_out_and_named(bank, tmp_path):
    source, _, folder = bank
    lines = []
    result = run(
        source, tmp_path / "out", stats=StatsConfig(stats=str(folder)), recipe=RecipeConfig(), log=lines.append
    )
    assert "target" in result.report["statistics"]["steps_left_out"]
    assert any("left out: target" in line for line in lines)
    rows = result.report["linears"]
    assert all(r["alpha"] == 0 and r["held_out"] for r in rows)
    assert any(len(r["losses"]) > 1 for r in rows)  # polished
    assert all(a[1] >= b[1] for r in rows for a, b in zip(r["losses"], r["losses"][1:], strict=False))


def test_save_stats_keeps_what_a_run_read(bank, tmp_path):
    source, _, folder = bank
    run(source, tmp_path / "out", calib=CALIB, stats=StatsConfig(save_stats=str(tmp_path / "bank")))
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "bank" / file.name).read_bytes()
    about = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert about["tokens"] == 16 * 24
    assert about["calibration"][0]["seqlen"] == 24


def test_a_bank_that_cannot_be_written_whole_is_not_written(bank, tmp_path, monkeypatch):
    source, texts, _ = bank
    monkeypatch.setattr("llmq.stats_bank._write_block", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        collect(source, texts, tmp_path / "b", SHARE, quiet)
    assert list(tmp_path.iterdir()) == []


def test_banks_of_others_are_refused(bank, tiny_model, tmp_path):
    source, texts, folder = bank
    other = open_model(tiny_model("llama", seed=1))
    with pytest.raises(ValueError, match=r"statistics of another model \(digest [0-9a-f]{16}; .* has [0-9a-f]{16}\)"):
        open_bank(str(folder), other, SHARE)
    shutil.copytree(folder, tmp_path / "t")
    about = json.loads((tmp_path / "t" / "bank.json").read_text())
    (tmp_path / "t" / "bank.json").write_text(json.dumps(about | {"tokenizer_digest": "0" * 16}))
    with pytest.raises(ValueError, match="statistics of another tokenizer"):
        open_bank(str(tmp_path / "t"), source, SHARE)
    with pytest.raises(ValueError, match="only banks of one model, collected alike, add up"):
        merge([folder, tmp_path / "t"], tmp_path / "m")
    (tmp_path / "t" / "bank.json").write_text(json.dumps(about | {"version": 7}))
    with pytest.raises(ValueError, match="has version 7, this llmq reads 2"):
        open_bank(str(tmp_path / "t"), source, SHARE)
    with pytest.raises(ValueError, match=r"was collected with --sink-share 0.0625, this run asks for 0:"):
        open_bank(str(folder), source, 0.0)
    with pytest.raises(ValueError, match=r"the text .* is in it twice; give each part once"):
        open_bank(f"{folder},{folder}", source, SHARE)
    collect(source, part_of(texts, slice(0, 2)), tmp_path / "few", SHARE, quiet)
    with pytest.raises(ValueError, match=r"holds 48 tokens, fewer than the \d+ inputs of mlp.down_proj: collect at"):
        open_bank(str(tmp_path / "few"), source, SHARE)
    with pytest.raises(FileNotFoundError, match=r"is no bank: it has no bank.json"):
        open_bank(str(tmp_path), source, SHARE)
    (tmp_path / "t" / "bank.json").write_text(json.dumps(about))
    file = next((tmp_path / "t").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read .*; collect the statistics anew"):
        run(source, tmp_path / "out", stats=StatsConfig(stats=str(tmp_path / "t")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq", "stats": StatsConfig(stats="x")}, "--stats serves --method gptq; awq runs text"),
        ({"method": "rtn", "stats": StatsConfig(stats="x")}, "--stats serves --method gptq; rtn needs no text"),
        ({"budget": BudgetConfig(target_bpw=3), "stats": StatsConfig(stats="x")}, "--target-bpw runs text"),
        ({"method": "rtn", "stats": StatsConfig(save_stats="x")}, "--method rtn reads none"),
    ],
)
def test_options_that_do_not_go_together(bank, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(bank[0], tmp_path / "out", **options)
    with pytest.raises(ValueError, match="use one of the two"):
        StatsConfig(stats="a", save_stats="b")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        run(bank[0], tmp_path / "out", stats=StatsConfig(save_stats=str(bank[2])))
