"""OpenVINO GenAI and ONNX Runtime GenAI as sessions of ``llmq/bench/worker.py``: random tokens, greedy, no early end.

Both sample in their own C++ loop, as llmq does, and are timed from outside by the clock of this process.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np


def _json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


class OnnxGenai:
    """A folder of ONNX Runtime GenAI's builder. A prompt is fed and one token chosen, then one token a step."""

    cache_bytes = 0

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai

        self.genai: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(path)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        described = _json(f"{path}/genai_config.json")["model"]
        self.vocabulary = int(described["vocab_size"])
        # Its attention refuses a cache shorter than the sliding window.
        self.shortest = int(described["decoder"].get("sliding_window", {}).get("window_size", 0))
        self.version = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        self.notes: list[str] = []
        self.random = np.random.default_rng(0)

    def _start(self, prompt: int, new_tokens: int, batch: int) -> tuple[Any, float]:
        """A generator that has its first new token, and the seconds that took."""
        length = max(prompt + new_tokens, self.shortest)
        parameters = self.genai.GeneratorParams(self.model)
        # min_length: an end token is never chosen before it.
        parameters.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        generator = self.genai.Generator(self.model, parameters)
        ids = self.random.integers(0, self.vocabulary, (batch, prompt), dtype=np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return generator, time.perf_counter() - start

    def prefill(self, tokens: int) -> float:
        """As in ``worker.Session``."""
        return self._start(tokens, 1, 1)[1]

    def decode(self, depth: int, new_tokens: int, batch: int) -> float:
        """As in ``worker.Session``."""
        prompt = max(depth, 1)
        generator, _ = self._start(prompt, new_tokens + 1, batch)
        start = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        seconds = time.perf_counter() - start
        given = len(generator.get_sequence(0)) - prompt
        if given != new_tokens + 1:
            raise RuntimeError(f"ONNX Runtime GenAI gave {given} tokens, {new_tokens + 1} were asked for")
        return seconds / new_tokens


class OpenVino:
    """A folder of ``optimum-cli export openvino`` in ``openvino_genai.LLMPipeline``."""

    cache_bytes = 0

    def __init__(self, path: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self.openvino: Any = openvino
        self.genai: Any = openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
        self.vocabulary = int(_json(f"{path}/config.json")["vocab_size"])
        self.version = f"openvino-genai {openvino_genai.__version__}"
        self.notes = ["OpenVINO's default cache of keys and values has 8 bits"]
        self.random = np.random.default_rng(0)

    def _times(self, prompt: int, new_tokens: int, batch: int) -> list[float]:
        """Clock at the start and at each new token (one sequence), or at the start and the end (several)."""
        ids = self.random.integers(0, self.vocabulary, (batch, prompt), dtype=np.int64)
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        clock = _clock(self.genai) if batch == 1 else None
        start = time.perf_counter()
        found = self.pipeline.generate(inputs, config, clock)
        end = time.perf_counter()
        given = {len(tokens) for tokens in found.tokens}
        if given != {new_tokens}:
            raise RuntimeError(f"OpenVINO gave {given} tokens, {new_tokens} were asked for")
        return [start, *clock.times] if clock is not None else [start, end]

    def prefill(self, tokens: int) -> float:
        """As in ``worker.Session``."""
        times = self._times(tokens, 1, 1)
        return times[1] - times[0]

    def decode(self, depth: int, new_tokens: int, batch: int) -> float:
        """As in ``worker.Session``. Streamers take one sequence, so a batch is the difference of two lengths."""
        prompt = max(depth, 1)
        if batch == 1:
            times = self._times(prompt, new_tokens + 1, 1)[1:]
            return (times[-1] - times[0]) / (len(times) - 1)
        short, whole = (self._times(prompt, n, batch) for n in (1, new_tokens + 1))
        return ((whole[1] - whole[0]) - (short[1] - short[0])) / new_tokens


def _clock(genai: Any) -> Any:
    """A streamer of OpenVINO GenAI that notes when each new token came."""

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, tokens: Any) -> Any:
            count = len(tokens) if isinstance(tokens, list) else 1
            self.times += [time.perf_counter()] * count
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Clock()
