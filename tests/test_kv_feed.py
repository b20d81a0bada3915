"""--kv-bits: windows through a quantized cache, and what the commands print about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from llmq import CalibConfig, KVCacheConfig, QuantScheme, RuntimeConfig, quantize_model, set_kv_cache
from llmq.evaluation import EvalProtocol, evaluate, load_for_eval, main, windows
from llmq.kv_feed import KVFeed
from llmq.likelihood import score

Tiny = Callable[..., Path]
TEXT = "def main(argv):\n    '''Parse the arguments – naïvely.'''\n    return json.loads(argv[0])\n" * 30
PROTOCOL = EvalProtocol(seqlen=150, max_windows=2)


@pytest.fixture(params=["llama", "gemma3"])
def loaded(request: pytest.FixtureRequest, tiny_model: Tiny) -> tuple[Any, Any]:
    return load_for_eval(str(tiny_model(request.param)), log=lambda _: None)


@pytest.mark.parametrize("chunk", [1, 32, 150, 1000])
def test_16_bits_score_as_no_cache(chunk: int, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    tokens = windows(TEXT, tokenizer, PROTOCOL)
    fed = score(model, tokens, kv=KVFeed(KVCacheConfig(), chunk))
    # The same sums in other orders: see TOLERANCE in test_evaluation.py.
    torch.testing.assert_close(fed.nll, score(model, tokens).nll, atol=2e-5, rtol=0)
    assert fed.kv_cache is not None
    assert fed.kv_cache.tokens == 150
    assert fed.kv_cache.nbytes == 2 * fed.kv_cache.nbytes_16bit  # held in the model's float32


def test_the_cache_is_really_used(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    config = KVCacheConfig(2, 2, key_scales="token", sinks=0, recent=0)
    results = [
        evaluate(model, tokenizer, TEXT, PROTOCOL, reference=model, kv=KVFeed(config, chunk)) for chunk in (1, 150)
    ]
    kl = [r.kl.mean for r in results if r.kl is not None]
    assert kl[0] > 1e-6
    assert abs(kl[1]) < 1e-9  # one chunk: its tokens see one another exactly
    assert (
        "QuantizedKVCache: keys 2 bits, values 2 bits; keys below 8 bits have scales by token; heads rotated"
        in results[0].protocol
    )
    assert "0 sinks and, below 8 bits, 0 recent tokens in 16 bits; fed 1 tokens at a time" in results[0].protocol
    assert "Hugging Face graph" in results[0].protocol


@pytest.fixture(scope="module")
def quantized(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a native decoder whose own cache has 8 bits."""
    pytest.importorskip("llmq._core", reason="llmq was installed without its compiled module")
    out, calib = tmp_path_factory.mktemp("feed") / "gemma3", CalibConfig(calib="stdlib", nsamples=2, seqlen=32)
    options: dict[str, Any] = {"method": "rtn", "calib": calib, "runtime": RuntimeConfig("8"), "output": out}
    return quantize_model(tiny_model("gemma3"), QuantScheme(4, 32), **options).folder


def test_a_checkpoint_of_llmq_is_scored_through_its_native_cache(quantized: Path) -> None:
    model, tokenizer = load_for_eval(str(quantized), log=lambda _: None)
    tokens = windows(TEXT, tokenizer, PROTOCOL)
    plain = score(model, tokens)
    for bits in ("16", "8", "4"):
        feeds = [KVFeed(KVCacheConfig.parse(bits), chunk) for chunk in (1, 32, 1000)]
        found = [score(model, tokens, kv=feed) for feed in feeds]
        # The decoder's own forward, with that cache: the same sums.
        set_kv_cache(model, bits)
        logp = model(input_ids=tokens).logits.log_softmax(-1)[:, :-1]
        nll = -logp.gather(-1, tokens[:, 1:, None])[..., 0].double()
        for result in found:
            torch.testing.assert_close(result.nll, nll, atol=1e-6, rtol=0)
            assert torch.equal(result.nll, plain.nll) == (bits == "16")
        memory = found[1].kv_cache
        assert memory is not None
        sequence = model(input_ids=tokens[:1, :32]).past_key_values.sequences[0]
        for part in tokens[0, 32:].split(32):
            feeds[1].native(model).forward([part], [sequence])  # type: ignore[union-attr]
        assert (memory.tokens, memory.nbytes) == (150, sequence.nbytes)
        assert (memory.nbytes == memory.nbytes_16bit) == (bits == "16")


def test_the_command_says_that_the_native_cache_was_used(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT, encoding="utf-8")
    argv = ["--model", str(quantized), "--dataset", str(text), "--seqlen", "400", "--max-windows", "1"]
    argv += ["--json", str(out)]
    words = {
        "8": "native decoder, int8 activations; native KV cache: keys 8 bits, values 8 bits",
        "4": "native KV cache: keys 4 bits, values 4 bits; keys below 8 bits have scales by channel",
        "16": "native KV cache: keys 16 bits, values 16 bits",
    }
    perplexities = {}
    for bits, said in words.items():
        assert main([*argv, *([] if bits == "8" else ["--kv-bits", bits])]) == 0  # 8: the checkpoint's default
        assert said in capsys.readouterr().out
        found = json.loads(out.read_text(encoding="utf-8"))
        assert found["kv"]["k_bits"] == int(bits)
        share = found["kv_cache"]["nbytes"] / found["kv_cache"]["nbytes_16bit"]
        assert (share == 1) == (bits == "16")
        perplexities[bits] = found["perplexity"]
    assert len(set(perplexities.values())) == 3
    budget = found["kv_cache"]["nbytes_16bit"] * 9 // 10
    assert main([*argv, "--kv-budget", str(budget), "--kv-context", "400"]) == 0
    assert "native decoder, int8 activations; native KV cache: layers k" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["kv"]["layers"]) == 2
    assert found["kv_cache"]["nbytes"] <= budget
    assert main([*argv, "--kv-bits", "auto"]) == 0
    assert "protected, 4 bits would cost more than 1 %: " in capsys.readouterr().out


def test_a_model_that_is_scored_by_the_full_forward_goes_through_the_cache_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(vocab_size=384, logit_scale=7.0, initializer_range=0.3, **sizes))
    tokens = torch.randint(10, 384, (1, 60))
    fed = score(model, tokens, kv=KVFeed(KVCacheConfig(), 7))
    torch.testing.assert_close(fed.nll, score(model, tokens).nll, atol=2e-5, rtol=0)


def test_the_command_prints_protocol_and_memory(
    tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT, encoding="utf-8")
    argv = ["--model", str(tiny_model("qwen3")), "--dataset", str(text), "--seqlen", "150", "--max-windows", "1"]
    argv += ["--kv-bits", "k8v4", "--kv-chunk", "16", "--kv-recent", "8", "--no-kv-rotate", "--json", str(out)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert (
        "QuantizedKVCache: keys 8 bits, values 4 bits; keys below 8 bits have scales by channel; no rotation" in shown
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    memory = found["kv_cache"]
    assert f"{memory['nbytes'] / memory['nbytes_16bit']:.3f} of" in shown
    # Two layers of two heads of 16: keys of 18 bytes but for 4 sinks, values of 11 but for 4 sinks and 8 recent tokens.
    assert memory["nbytes"] == 4 * (146 * 18 + 4 * 32 + 138 * 11 + 12 * 32)
    assert found["kv"]["chunk"] == 16
    assert found["kv"]["rotate"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kv-bits", "5"], "known: 16, 8, 4, 2"),
        (["--kv-bits", "k8"], "kv bits 'k8' are not of the form"),
        (["--kv-bits", "8", "--kv-chunk", "0"], "kv-chunk is 0"),
        (["--kv-bits", "8", "--kv-sinks", "-1"], "sinks is -1"),
        (["--kv-bits", "8", "--kv-budget", "1M"], "exclude each other"),
        (["--kv-budget", "much"], "size 'much' is not of the form 600M"),
        (["--kv-budget", "1M", "--kv-context", "0"], "kv-context is 0"),
    ],
)
def test_wrong_options_end_before_the_model_is_found(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "/no/such/model", "--dataset", "/no/such/text", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_budget_chooses_bits_for_each_layer(
    tiny_model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT, encoding="utf-8")
    argv = ["--model", str(tiny_model("llama")), "--dataset", str(text), "--seqlen", "400", "--max-windows", "1"]
    argv += ["--kv-recent", "0", "--kv-context", "400", "--json", str(out)]
    assert main([*argv, "--kv-budget", "25K"]) == 0
    assert "KV cache of 400 tokens: 0.0" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["kv"]["layers"]) == 2
    assert 17_000 < found["kv_cache"]["nbytes"] <= 25_000
    assert main([*argv, "--kv-budget", "1K"]) == 2
    assert "the least there is" in capsys.readouterr().err
