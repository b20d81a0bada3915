// A weight matrix of the decoder, packed or dense, and its product with some rows of activations.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "layout.h"

namespace llmq {

// What is added to a matrix's product: scale * B (A x), LoRA's (arXiv 2106.09685, section 4.1).
struct Adapter {
  const void* a = nullptr;  // [rank, k]
  const void* b = nullptr;  // [rank, stride]: B's columns, the matrix's n of them or more
  DenseType type = kFloat;
  std::int64_t rank = 0, stride = 0;  // rank 0: none
  float scale = 0.0f;
};

struct Matrix {
  std::int64_t n = 0, k = 0;
  int bits = 0;         // of a packed matrix's codes; 0: dense
  PackedMatrix packed;  // where bits > 0
  const void* dense = nullptr;
  DenseType type = kFloat;
  const float* bias = nullptr;  // f32[n] or null
  Adapter adapter;

  bool quantized() const { return bits > 0; }

  // Rows first .. first + rows - 1 as a matrix of its own; `first` is a multiple of kPanelRows.
  Matrix slice(std::int64_t first, std::int64_t rows) const;

  static Matrix of_packed(const Layout& layout, const PackedMatrix& w, const float* bias) {
    Matrix m;
    m.n = w.n, m.k = w.k, m.bits = layout.bits, m.packed = w, m.bias = bias;
    return m;
  }
  static Matrix of_dense(const void* data, std::int64_t n, std::int64_t k, DenseType type, const float* bias) {
    Matrix m;
    m.n = n, m.k = k, m.dense = data, m.type = type, m.bias = bias;
    return m;
  }
};

// Widths of int8 groups that the matrices of one input may ask for: q, k and v may each have a grid of its own.
constexpr int kMaxWidths = 3;

// The inputs of a product: rows f32[m, k], and the same rows as int8 for each group width that a matrix asks for.
struct Inputs {
  const float* x = nullptr;
  std::int64_t m = 0, k = 0;
  int count = 0;  // widths in use
  std::array<std::int64_t, kMaxWidths> width{};
  std::array<QuantizedRows, kMaxWidths> quantized{};

  const QuantizedRows& rows_for(const Matrix& w) const;
  Inputs slice(std::int64_t first, std::int64_t rows) const;
};

// out f32[m, stride] = W x + bias for one matrix.
struct Product {
  const Matrix* w;
  float* out;
  std::int64_t stride;
  const float* low = nullptr;  // f32[m, rank]: A x of the matrix's adapter, see low_products

  // The same for the tokens from `first` on, without the output.
  const float* low_from(std::int64_t first) const { return low ? low + first * w->adapter.rank : nullptr; }
};

// All products of the same inputs, adapters included, shared out to the threads together. With float_activations the
// int8 rows are not used.
void multiply(const KernelTable& table, const Inputs& in, std::vector<Product> products, bool float_activations);

// A x of every matrix with an adapter, into `memory`; `low` of its product then points there. The inputs are floats.
void low_products(const KernelTable& table, const Inputs& in, std::vector<Product>& products,
                  std::vector<float>& memory);

// Rows begin .. end - 1 (panels of 16 rows) of W x for the tokens given, in the calling thread;
// where `low` is set, the adapter's share besides.
void multiply_panels(const KernelTable& table, const Inputs& in, const Product& product, Range panels, Range tokens,
                     bool float_activations);

// out f32[k] = row `row` of W.
void take_row(const KernelTable& table, const Matrix& w, std::int64_t row, float* out);

// Columns from one row of int8 activations to the next: a whole and odd number of cache lines. With an even one, a
// power of two above all, the rows of a tile would fall on few sets of the level 1 cache and push each other out.
constexpr std::int64_t activation_stride(std::int64_t k) { return ((k + 63) / 64 | 1) * 64; }

// Tokens whose activations stay in a core's own cache while panels pass by.
std::int64_t token_block(std::int64_t m, std::int64_t bytes_a_token);

}  // namespace llmq
