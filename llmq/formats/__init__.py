"""FORMATS: one row a way to store a QTensor as named tensors. A new format is a file and a row."""

from __future__ import annotations

from functools import partial

from llmq.formats import awq, compressed_tensors, gguf, gptq, mlx, native
from llmq.formats.row import Format, Inexact, never

FORMATS: dict[str, Format] = {
    "llmq": Format("llmq", native.pack, native.unpack, native.layout, never),
    "gptq": Format(
        "GPTQ, version 1", partial(gptq.pack, version=1), partial(gptq.unpack, version=1), gptq.layout, gptq.refusal
    ),
    "gptq_v2": Format(
        "GPTQ, version 2", partial(gptq.pack, version=2), partial(gptq.unpack, version=2), gptq.layout, gptq.refusal
    ),
    "awq": Format("AWQ gemm", awq.pack, awq.unpack, awq.layout, awq.refusal),
    "awq_gemv": Format("AWQ gemv", awq.pack_gemv, awq.unpack_gemv, awq.layout_gemv, awq.refusal),
    "pack-quantized": Format(
        "compressed-tensors, packed",
        compressed_tensors.pack,
        compressed_tensors.unpack,
        compressed_tensors.layout,
        compressed_tensors.refusal,
    ),
    "pack-quantized-padded": Format(
        "compressed-tensors, packed as before 2026",
        partial(compressed_tensors.pack, padded=True),
        partial(compressed_tensors.unpack, padded=True),
        partial(compressed_tensors.layout, padded=True),
        compressed_tensors.refusal,
    ),
    "int-quantized": Format(
        "compressed-tensors, int8",
        compressed_tensors.pack_int8,
        compressed_tensors.unpack_int8,
        compressed_tensors.layout_int8,
        compressed_tensors.refusal_int8,
    ),
    "gguf": Format("GGUF Q4_0, Q4_1, Q8_0", gguf.pack, gguf.unpack, gguf.layout, gguf.refusal),
    "mlx": Format("MLX affine", mlx.pack, mlx.unpack, mlx.layout, mlx.refusal),
}

__all__ = ["FORMATS", "Format", "Inexact"]
