#include "engine/matrix.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

// Multiply-adds below which a second thread costs more than it saves (about 2 us of work).
constexpr std::int64_t kAloneWork = 1 << 17;
// Chunks a thread, so that one that is late or slow leaves its share to the others.
constexpr std::int64_t kChunksPerThread = 8;
// A core's own cache where the system does not tell: a common size.
constexpr std::int64_t kCacheBytes = 512 << 10;
constexpr std::int64_t kTokenBlockMultiple = 24;  // of every ISA's tile: blocks then leave no remainder

// Activations of a token block: three eighths of a core's own (level 2) cache; the rest is for panels and sums.
std::int64_t token_block_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const std::int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const std::int64_t cache = 0;
#endif
  return (cache > 0 ? cache : kCacheBytes) * 3 / 8;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t panels_of(const Matrix& w) { return ceil_div(w.n, kPanelRows); }

std::int64_t bytes_of(DenseType type) { return type == kFloat ? 4 : 2; }

const void* at(const void* data, std::int64_t bytes) { return static_cast<const std::uint8_t*>(data) + bytes; }

Range rows_of(const Matrix& w, Range panels) {
  return {panels.begin * kPanelRows, std::min(w.n, panels.end * kPanelRows)};
}

// The product without an adapter.
void multiply_own(const KernelTable& table, const Inputs& in, const Product& product, Range panels, Range tokens,
                  bool float_activations) {
  const Matrix& w = *product.w;
  if (w.quantized() && !float_activations) {
    const Qgemm job{
        .w = w.packed, .x = in.rows_for(w), .bias = w.bias, .out = product.out, .out_stride = product.stride};
    table.qgemm[slot_of(w.bits)](job, panels, tokens);
    return;
  }
  const Range rows = rows_of(w, panels);
  const FloatGemm job{.dense = w.dense,
                      .k = w.k,
                      .x = in.x,
                      .x_stride = in.k,
                      .bias = w.bias,
                      .out = product.out,
                      .out_stride = product.stride};
  if (!w.quantized()) return table.fgemm_dense[w.type](job, rows, tokens);
  static thread_local std::vector<float> row;
  row.resize(static_cast<std::size_t>(w.k));
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    take_row(table, w, r, row.data());
    table.fgemm_row(job, row.data(), r, tokens);
  }
}

}  // namespace

std::int64_t token_block(std::int64_t m, std::int64_t bytes_a_token) {
  const std::int64_t fit = token_block_bytes() / bytes_a_token / kTokenBlockMultiple * kTokenBlockMultiple;
  return std::min(m, std::max(fit, kTokenBlockMultiple));
}

Matrix Matrix::slice(std::int64_t first, std::int64_t rows) const {
  Matrix part = *this;
  part.n = rows;
  if (bias) part.bias += first;
  if (quantized()) {
    part.packed.panels += first / kPanelRows * packed.panel_stride;
    part.packed.n = rows;
  } else {
    part.dense = at(dense, first * k * bytes_of(type));
  }
  if (adapter.rank > 0) part.adapter.b = at(adapter.b, first * bytes_of(adapter.type));
  return part;
}

const QuantizedRows& Inputs::rows_for(const Matrix& w) const {
  int i = 0;
  while (i + 1 < count && width[i] != w.packed.group) ++i;
  return quantized[i];
}

Inputs Inputs::slice(std::int64_t first, std::int64_t rows) const {
  Inputs part = *this;
  part.x += first * k;
  part.m = rows;
  for (int i = 0; i < count; ++i) {
    QuantizedRows& r = part.quantized[i];
    r.q += first * r.stride;
    r.scale += first * r.groups;
    r.total += first * r.groups;
  }
  return part;
}

void take_row(const KernelTable& table, const Matrix& w, std::int64_t row, float* out) {
  if (w.quantized()) {
    table.take_row[slot_of(w.bits)](w.packed, row, out);
  } else {
    table.take_dense[w.type](w.dense, w.k, row, out);
  }
}

void multiply_panels(const KernelTable& table, const Inputs& in, const Product& product, Range panels, Range tokens,
                     bool float_activations) {
  multiply_own(table, in, product, panels, tokens, float_activations);
  if (!product.low) return;
  const Adapter& adapter = product.w->adapter;
  const LowRankSum job{.b = adapter.b,
                       .rank = adapter.rank,
                       .stride = adapter.stride,
                       .low = product.low,
                       .scale = adapter.scale,
                       .out = product.out,
                       .out_stride = product.stride};
  table.add_low_rank[adapter.type](job, rows_of(*product.w, panels), tokens);
}

void low_products(const KernelTable& table, const Inputs& in, std::vector<Product>& products,
                  std::vector<float>& memory) {
  std::int64_t ranks = 0;
  for (const Product& p : products) ranks += p.w->adapter.rank;
  if (ranks == 0) return;
  memory.resize(std::max(memory.size(), static_cast<std::size_t>(in.m * ranks)));
  std::vector<Matrix> a;
  a.reserve(products.size());
  std::vector<Product> jobs;
  float* out = memory.data();
  for (Product& p : products) {
    const Adapter& adapter = p.w->adapter;
    if (adapter.rank == 0) continue;
    a.push_back(Matrix::of_dense(adapter.a, adapter.rank, in.k, adapter.type, nullptr));
    jobs.push_back({&a.back(), out, adapter.rank});
    p.low = out;
    out += in.m * adapter.rank;
  }
  multiply(table, in, std::move(jobs), true);
}

void multiply(const KernelTable& table, const Inputs& in, std::vector<Product> products, bool float_activations) {
  static thread_local std::vector<float> memory;  // read by other threads through the products, not by name
  low_products(table, in, products, memory);
  std::int64_t panels = 0, work = 0;
  for (const Product& p : products) {
    panels += panels_of(*p.w);
    work += in.m * p.w->n * p.w->k;
  }
  const std::int64_t tokens = token_block(in.m, float_activations ? 4 * in.k : in.k);
  const std::int64_t token_blocks = ceil_div(in.m, tokens);
  const bool alone = num_threads() == 1 || work < kAloneWork;
  const std::int64_t wanted = alone ? 1 : ceil_div(num_threads() * kChunksPerThread, token_blocks);
  const std::int64_t chunk =
      ceil_div(ceil_div(panels, wanted), 2) * 2;  // pairs of panels: some tiles are two panels wide
  const std::int64_t chunks = ceil_div(panels, chunk);
  const auto run = [&](std::int64_t c) noexcept {
    const std::int64_t begin = c % chunks * chunk, end = std::min(panels, begin + chunk);
    const std::int64_t t = c / chunks * tokens;
    std::int64_t first = 0;  // the products' panels one after the other
    for (const Product& p : products) {
      const std::int64_t count = panels_of(*p.w);
      const Range range{std::max<std::int64_t>(0, begin - first), std::min(count, end - first)};
      if (range.begin < range.end) {
        multiply_panels(table, in, p, range, {t, std::min(in.m, t + tokens)}, float_activations);
      }
      first += count;
    }
  };
  if (alone) {
    for (std::int64_t c = 0; c < chunks * token_blocks; ++c) run(c);
  } else {
    parallel_for(chunks * token_blocks, run);
  }
}

}  // namespace llmq
