"""What a run will do, before it does it: matrices, what stays in 16 bit and why, sizes, time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from llmq.calibration.self_generated import BATCH
from llmq.checkpoint import matrix_layout
from llmq.config import QuantScheme
from llmq.models.load import SourceModel
from llmq.products import matmul
from llmq.runtime.hf import embedding_scale
from llmq.solvers import Method
from llmq.solvers.recipe import DAMPINGS

# Bytes of Python, torch and transformers before a model is touched; measured on Linux.
BASE_BYTES = 600 << 20
# Rounds of polishing that a linear takes, as seen on real models.
POLISH_ROUNDS = 4
# Seconds of a sampling step over those of its products at gemm_rate(): they are of integers, but the draw is costly.
SAMPLING_COST = 1.3


@dataclass(frozen=True)
class Matrix:
    """A matrix [n, k] that will be quantized; ``shared_with`` names a module that uses the same one."""

    name: str
    n: int
    k: int
    scheme: QuantScheme
    shared_with: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        layout = matrix_layout(self.n, self.k, self.scheme).values()
        return sum(shape[0] * shape[1] * torch.empty(0, dtype=dtype).element_size() for shape, dtype in layout)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.n * self.k


@dataclass(frozen=True)
class Kept:
    """A tensor that is not quantized, the dtype it is stored in, and why."""

    name: str
    weights: int
    dtype: torch.dtype
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.weights * torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Plan:
    """The whole run. ``seconds`` and ``peak_bytes`` are predictions, everything else is exact.

    ``learning_seconds``: at most so long a run learns by gradients, on top of ``seconds``.
    """

    linears: list[Matrix]
    tables: list[Matrix]
    kept: list[Kept]
    tied: dict[str, str]
    seconds: float = 0.0
    peak_bytes: int = 0
    learning_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of the model with every weight in 16 bit."""
        return 2 * self.weights

    @property
    def weights(self) -> int:
        """Weights of the model, shared ones once."""
        return sum(m.weights for m in (*self.linears, *self.tables)) + sum(k.weights for k in self.kept)

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensors that will be written."""
        return sum(m.nbytes for m in (*self.linears, *self.tables)) + sum(k.nbytes for k in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight over the quantized linears: codes, scales and zeros."""
        return 8 * sum(m.nbytes for m in self.linears) / max(1, sum(m.weights for m in self.linears))

    @property
    def bits_per_weight_all(self) -> float:
        """Bits a weight over the whole model, embedding, head and norms included."""
        return 8 * self.bytes_after / max(1, self.weights)

    def schemes(self) -> dict[str, QuantScheme]:
        """Scheme by module name."""
        return {m.name: m.scheme for m in (*self.linears, *self.tables)}


def table_scheme(scheme: QuantScheme, head_bits: int) -> QuantScheme:
    """Grid of embedding and head: symmetric at 8 bits, where a zero point buys nothing; groups as the linears'."""
    return QuantScheme(head_bits, scheme.group_size if scheme.group_size > 0 else 128, sym=head_bits == 8)


def kept_dtype(stored: torch.dtype, dims: int) -> torch.dtype:
    """Vectors stay in fp32 (they are tiny, AWQ may fold scales into them); matrices in their own 16 bits, or bf16."""
    if dims < 2:
        return torch.float32
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def make_plan(
    source: SourceModel,
    scheme: QuantScheme,
    head_bits: int,
    method: Method,
    n_tokens: int,
    seqlen: int,
    *,
    steps: tuple[str, ...] = (),
    schemes: Mapping[str, QuantScheme] | None = None,
    sampled: bool = False,
    banked: bool = False,
) -> Plan:
    """Decide for every tensor of the model; predict time and memory for ``n_tokens`` of calibration.

    ``steps``: of the recipe. ``schemes``: of single matrices, by name; the other linears get ``scheme``. ``sampled``:
    the model itself writes the tokens first, all its weights in memory. ``banked``: their statistics are there already.
    """
    linears = [
        Matrix(f"{block}.{name}", n, k, (schemes or {}).get(f"{block}.{name}", scheme))
        for i, block in enumerate(source.block_names)
        for name, (n, k) in source.block_linears(i).items()
    ]
    tables, reasons = _tables(source, scheme, head_bits)
    tables = [replace(m, scheme=(schemes or {}).get(m.name, m.scheme)) for m in tables]
    tied = {m.shared_with: m.name for m in tables if m.shared_with}
    quantized = {f"{m.name}.weight" for m in (*linears, *tables)} | {f"{name}.weight" for name in tied}
    kept = []
    for name, parameter in source.model.named_parameters():
        if name not in quantized and name in source.reader:
            why = reasons.get(name.removesuffix(".weight")) or _why_kept(name, parameter, source)
            kept.append(Kept(name, parameter.numel(), kept_dtype(source.reader.dtype(name), parameter.dim()), why))
    plan = Plan(linears, tables, kept, tied)
    _predict(plan, source, method, n_tokens, seqlen, steps, banked)
    if sampled:
        plan.seconds += SAMPLING_COST * 2 * n_tokens * plan.weights / gemm_rate()
        # It is loaded as it is stored; the copy that writes, a byte a weight, takes its place matrix by matrix.
        stored = max(source.reader.dtype(f"{m.name}.weight").itemsize for m in linears)
        needed = BASE_BYTES + stored * plan.weights + _cache_bytes(source.config, seqlen)
        plan.peak_bytes = max(plan.peak_bytes, needed)
    return plan


def _tables(source: SourceModel, scheme: QuantScheme, head_bits: int) -> tuple[list[Matrix], dict[str, str]]:
    """Embedding and head as matrices to quantize, and the reason for each that is not."""
    embed, head = source.model.get_submodule(source.embed_name), source.model.get_submodule(source.head_name)
    both = {source.embed_name: "--head-bits 16", source.head_name: "--head-bits 16"}
    if head_bits == 16:
        return [], both
    assert isinstance(embed, nn.Embedding)
    grid = table_scheme(scheme, head_bits)
    known_embedding = embedding_scale(embed) is not None
    known_head = isinstance(head, nn.Linear) and (not source.tied or head.bias is None)
    tables, reasons = [], {}
    if known_embedding and (known_head or not source.tied):
        shared = source.head_name if source.tied else None
        tables.append(Matrix(source.embed_name, embed.num_embeddings, embed.embedding_dim, grid, shared))
    else:
        reasons[source.embed_name] = f"embedding of class {type(embed).__name__}"
    if not source.tied and known_head:
        assert isinstance(head, nn.Linear)
        tables.append(Matrix(source.head_name, head.out_features, head.in_features, grid))
    elif not known_head:
        reasons[source.head_name] = f"head of class {type(head).__name__}"
    return tables, reasons


def _why_kept(name: str, parameter: torch.Tensor, source: SourceModel) -> str:
    if parameter.dim() < 2:
        return "norm or bias"
    if any(name.startswith(block + ".") for block in source.block_names):
        return "not a linear of the block"
    return "outside the decoder blocks"


def _predict(
    plan: Plan, source: SourceModel, method: Method, n_tokens: int, seqlen: int, steps: tuple[str, ...], banked: bool
) -> None:
    """Fill in seconds and peak bytes from the shapes and a short measurement of this machine's matrix product."""
    blocks = len(source.block_names)
    block = source.block_linears(0)
    weights = sum(n * k for n, k in block.values())
    widths = [max(block[name][1] for name in group) for group in source.family.linear_groups]
    hidden = min(k for _, k in block.values())
    if method.needs_text:
        rate = gemm_rate()
        attention = 2 * seqlen * max(k for name, (_, k) in block.items() if "mlp" not in name or len(block) == 1)
        passes = 2.0 * weights + attention + sum(k * k for k in widths) + (weights + attention if method.awq else 0)
        if "target" in steps:  # a second stream, and the full product of both streams' inputs
            passes += 2.0 * weights + attention + 2 * sum(k * k for k in widths)
        if "importance" in steps:  # forth, and forth again and back with twice the work for attention; the head besides
            head = int(source.config.get_text_config().vocab_size) * hidden / blocks
            passes += 3.0 * weights + 5.0 * attention + head
        passes = 0.0 if banked else passes
        solve = sum(weights / max(1, sum(n for n, _ in block.values())) * k for k in widths) + 120 * weights
        # A round is a product of the matrix with H for every step, and one to judge it.
        solve += POLISH_ROUNDS * sum(2 * n * k * k for n, k in block.values()) * len({"refit", "descent"} & set(steps))
        solve *= len(DAMPINGS) if "damping" in steps else 1
        plan.seconds = blocks * (2 * n_tokens * passes + 2 * solve) / rate + blocks * 0.5
        streams = 0 if banked else 2 if "target" in steps else 1
        memory = n_tokens * 4 * streams * (2 * hidden + max(widths)) + 8 * 4 * (1 + streams) * max(widths) ** 2
    else:
        plan.seconds, memory = 1e-7 * plan.weights, 0
    plan.seconds += 2e-7 * plan.weights
    # The last shard is made in memory: codes of the tables, and kept tensors beside the fp32 copy they are made from.
    outside = sum(m.nbytes + m.weights for m in plan.tables) + sum(k.nbytes for k in plan.kept)
    outside += 4 * max([0, *(k.weights for k in plan.kept)])
    # The check at the end loads the folder: kept matrices in fp32, in 16 bits for the kernels, and as mapped file.
    check = sum(8 * k.weights for k in plan.kept) + 2 * sum(m.nbytes for m in (*plan.linears, *plan.tables))
    plan.peak_bytes = int(BASE_BYTES + max(memory + 16 * weights, outside, check))
    wide = [k for k in widths if method.needs_text and n_tokens < 2 * k]
    if wide:
        plan.warnings.append(
            f"{n_tokens} calibration tokens are few for layers of {max(wide)} inputs; "
            f"use {2 * max(wide)} or more (--nsamples {-(-2 * max(wide) // seqlen)} --seqlen {seqlen})"
        )


def check_memory(plan: Plan) -> None:
    """Raise ValueError if the model, which is to write its own text, does not fit into this machine's memory."""
    have = memory_bytes()
    if plan.peak_bytes > have:
        raise ValueError(
            f"to write its own calibration text the model must be in memory whole: {plan.peak_bytes / 2**30:.1f} GiB,"
            f" and this machine has {have / 2**30:.1f}; give a text file, or --calib stdlib"
        )


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cache_bytes(config: Any, seqlen: int) -> int:
    """Keys and values, fp16, of the windows that are sampled at once, as if every layer attended to all tokens."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = (getattr(text, "num_key_value_heads", None) or heads) * (
        getattr(text, "head_dim", None) or text.hidden_size // heads
    )
    return int(BATCH * seqlen * text.num_hidden_layers * 2 * width * 2)


def gemm_rate(seconds: float = 0.15) -> float:
    """fp32 operations a second of this machine's matrix product, as a run multiplies, measured now."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    matmul(a, b)
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        matmul(a, b)
        n += 1
    return 2 * 1024**3 * n / (time.perf_counter() - start)
