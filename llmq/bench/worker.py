"""One engine that lives in Python, measured in a process of its own: ``python -m llmq.bench.worker ORDER`` (JSON).

The model is used as a user would use it. Prefill is a ``generate`` of one token; decoding is timed by a streamer, from
the second new token on, so that it holds no prefill. Greedy, end-of-text tokens are ignored.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from llmq.bench.drivers import BATCH_PROMPT, MARK
from llmq.bench.peers import OnnxGenai, OpenVino
from llmq.memory import peak_rss

WARM_UP = 16  # tokens of the first prompt, which is not timed


class Session(Protocol):
    """A loaded model."""

    version: str
    cache_bytes: int  # of keys and values after the last measurement; 0: not known
    notes: list[str]  # what a reader must know, such as that something fell back to a slower way

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt of ``tokens``, up to the first new token."""

    def decode(self, depth: int, new_tokens: int, batch: int) -> float:
        """Seconds a step of ``batch`` sequences after ``depth`` tokens each, mean of ``new_tokens`` steps."""


class Transformers:
    """Any folder that ``AutoModelForCausalLM.from_pretrained`` opens, an llmq checkpoint or not."""

    def __init__(self, path: str, threads: int, dtype: str | None = None, kv_cache: str = "") -> None:
        import torch

        import llmq
        from llmq import kernels
        from llmq.runtime.causal_lm import NativeCausalLM
        from llmq.runtime.parts import Unsupported

        self.notes: list[str] = []
        logging.getLogger("llmq").addHandler(_Notes(self.notes))
        torch.set_num_threads(threads)
        kernels.set_num_threads(threads)
        options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        self.cache_bytes = 0
        self.model: Any = llmq.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options).eval()
        self.model.generation_config.eos_token_id = None  # nothing ends before its length
        self.model.generation_config.pad_token_id = 0
        if kv_cache:
            llmq.set_kv_cache(self.model, kv_cache)
        self.version = f"Hugging Face graph, torch {torch.__version__}"
        if isinstance(self.model, NativeCausalLM):
            try:
                self.model._decoder()
                self.version = f"native decoder, kernels {kernels.current_isa()}"
            except Unsupported as reason:
                self.version += f", kernels {kernels.current_isa()}: the native decoder cannot run this ({reason})"

    def _times(self, prompt: int, new_tokens: int, batch: int = 1) -> list[float]:
        """Clock at the start and at each new token of one ``generate``."""
        import torch

        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (batch, prompt))
        streamer = Clock() if batch == 1 else None
        options = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        start = time.perf_counter()
        done = self.model.generate(ids, streamer=streamer, return_dict_in_generate=True, **options)
        end = time.perf_counter()
        out = done.sequences
        self.cache_bytes = int(getattr(done.past_key_values, "nbytes", 0))
        if out.shape[1] != prompt + new_tokens:
            raise RuntimeError(f"generate gave {out.shape[1] - prompt} tokens, {new_tokens} were asked for")
        return [start, *streamer.times] if streamer else [start, end]

    def prefill(self, tokens: int) -> float:
        """As in :class:`Session`."""
        times = self._times(tokens, 1)
        return times[1] - times[0]

    def decode(self, depth: int, new_tokens: int, batch: int) -> float:
        """As in :class:`Session`. Streamers take one sequence, so a batch is the difference of two lengths."""
        if batch == 1:
            times = self._times(max(depth, 1), new_tokens + 1)[1:]
            return (times[-1] - times[0]) / (len(times) - 1)
        short, whole = (self._times(depth, n, batch) for n in (1, new_tokens + 1))
        return ((whole[1] - whole[0]) - (short[1] - short[0])) / new_tokens


class _Notes(logging.Handler):
    """Collects warnings."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        """Keep its text."""
        self.notes.append(record.getMessage())


class Clock:
    """A streamer that notes when each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, _value: Any) -> None:
        """A token, or first of all the prompt."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to show."""


class LlamaCpp:
    """The ``llama_cpp`` package through its C interface, as llama-bench does it: no sampling, flash attention."""

    cache_bytes = 0

    def __init__(self, path: str, threads: int, cache_type: str = "f16") -> None:
        import ctypes

        import llama_cpp

        self.c: Any = llama_cpp
        self.threads = threads
        self.cache_type = getattr(llama_cpp, f"GGML_TYPE_{cache_type.upper()}")
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.notes: list[str] = []

    def _context(self, positions: int, sequences: int) -> Any:
        parameters = self.c.llama_context_default_params()
        parameters.n_ctx = positions * sequences
        parameters.n_batch, parameters.n_ubatch = 2048, 512
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = self.cache_type
        parameters.flash_attn_type = self.c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = self.c.llama_init_from_model(self.model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp could not make a context of {positions} tokens and {sequences} sequences")
        return context

    def _feed(self, context: Any, first: int, tokens: int, sequences: int) -> None:
        """Tokens at positions ``first ...`` of each sequence; logits of the last position, at most 2048 at a time."""
        import random

        step = max(1, 2048 // sequences)
        for start in range(first, first + tokens, step):
            count = min(step, first + tokens - start)
            batch = self.c.llama_batch_init(count * sequences, 0, 1)
            batch.n_tokens = count * sequences
            for i in range(count * sequences):
                batch.token[i] = random.randrange(self.vocabulary)
                batch.pos[i] = start + i // sequences
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = i % sequences
                batch.logits[i] = i // sequences == count - 1
            code = self.c.llama_decode(context, batch)
            self.c.llama_batch_free(batch)
            if code:
                raise RuntimeError(f"llama_decode ended with code {code}")
        self.c.llama_synchronize(context)

    def prefill(self, tokens: int) -> float:
        """As in :class:`Session`."""
        context = self._context(tokens, 1)
        start = time.perf_counter()
        self._feed(context, 0, tokens, 1)
        seconds = time.perf_counter() - start
        self.c.llama_free(context)
        return seconds

    def decode(self, depth: int, new_tokens: int, batch: int) -> float:
        """As in :class:`Session`."""
        first = max(depth, 1)
        context = self._context(first + new_tokens, batch)
        self._feed(context, 0, first, batch)
        start = time.perf_counter()
        for i in range(new_tokens):
            self._feed(context, first + i, 1, batch)
        seconds = time.perf_counter() - start
        self.c.llama_free(context)
        return seconds / new_tokens


BACKENDS: dict[str, Callable[..., Session]] = {
    "transformers": Transformers,
    "llama-cpp-python": LlamaCpp,
    "onnx-genai": OnnxGenai,
    "openvino": OpenVino,
}


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure what the order's plan says; the fields of ``drivers.Result`` that the worker knows."""
    plan, backend = order.pop("plan"), BACKENDS[order.pop("backend")]
    start_bytes = peak_rss()
    start = time.perf_counter()
    session = backend(**order)
    load_seconds = time.perf_counter() - start
    session.prefill(WARM_UP)
    session.decode(WARM_UP, 4, 1)
    speeds: dict[str, list[float]] = {}
    cache_bytes: dict[str, int] = {}
    for tokens in plan["prefill"]:
        session.prefill(tokens)
        speeds[f"prefill {tokens}"] = [tokens / session.prefill(tokens) for _ in range(plan["repeats"])]
    new = plan["new_tokens"]
    for depth in plan["depths"]:
        speeds[f"decode {depth}"] = [1 / session.decode(depth, new, 1) for _ in range(plan["repeats"])]
        if session.cache_bytes:
            cache_bytes[f"decode {depth}"] = session.cache_bytes
    for batch in plan["batches"]:
        speeds[f"batch {batch}"] = [batch / session.decode(BATCH_PROMPT, new, batch) for _ in range(plan["repeats"])]
    said = {"version": session.version, "notes": session.notes, "cache_bytes": cache_bytes}
    return {"speeds": speeds, "load_seconds": load_seconds, "start_bytes": start_bytes, **said}


def main() -> None:
    """Run the order of the command line and print its result in one marked line."""
    order = json.loads(sys.argv[1])
    print(MARK + json.dumps(run(order)), flush=True)


if __name__ == "__main__":
    main()
