// Whole-matrix operations on packed weights: scratch memory, threads and blocking around the kernels of one table.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "layout.h"

namespace llmq {

// out f32[m, n] = x f32[m, k] @ W^T + bias f32[n] (or null). x is quantized to int8 per row and kernel group first.
void qgemm(const KernelTable& table, const Layout& layout, const PackedMatrix& w, const float* x, std::int64_t m,
           const float* bias, float* out);

// out f32[count, k] = dequantized rows `ids` i64[count]. Throws std::out_of_range naming an id that is not a row.
void take_rows(const KernelTable& table, const Layout& layout, const PackedMatrix& w, const std::int64_t* ids,
               std::int64_t count, float* out);

// Xor of `words` 64-bit words, each read once by one of the threads.
std::uint64_t stream_read(const KernelTable& table, const std::uint64_t* data, std::int64_t words);

}  // namespace llmq
