#include "engine/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "engine/matrix.h"
#include "engine/thread_pool.h"

namespace llmq {
namespace {

// Multiply-adds below which a second thread costs more than it saves (about 2 us of work).
constexpr std::int64_t kAloneWork = 1 << 17;

// Memory that a thread keeps from call to call and only ever enlarges.
class Scratch {
 public:
  void* reserve(std::int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64)));
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  std::int64_t size_ = 0;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

QuantizedRows scratch_rows(std::int64_t m, const PackedMatrix& w) {
  static thread_local Scratch scratch;
  const std::int64_t stride = activation_stride(w.k);
  auto* bytes = static_cast<std::int8_t*>(scratch.reserve(m * (stride + 8 * w.groups)));
  auto* scale = reinterpret_cast<float*>(bytes + m * stride);
  auto* total = reinterpret_cast<std::int32_t*>(scale + m * w.groups);
  return {.q = bytes, .scale = scale, .total = total, .stride = stride, .groups = w.groups};
}

void quantize(const KernelTable& table, const float* x, std::int64_t m, const PackedMatrix& w,
              const QuantizedRows& rows) {
  const std::int64_t per_chunk = std::max<std::int64_t>(1, kAloneWork / 4 / w.k);
  parallel_for(ceil_div(m, per_chunk), [&](std::int64_t c) noexcept {
    table.quantize_rows(x, {c * per_chunk, std::min(m, (c + 1) * per_chunk)}, w.k, w.group, rows);
  });
}

}  // namespace

void qgemm(const KernelTable& table, const Layout& layout, const PackedMatrix& w, const float* x, std::int64_t m,
           const float* bias, float* out) {
  if (m == 0) return;
  const Matrix matrix = Matrix::of_packed(layout, w, bias);
  Inputs in;
  in.x = x, in.m = m, in.k = w.k, in.count = 1;
  in.width[0] = w.group, in.quantized[0] = scratch_rows(m, w);
  quantize(table, x, m, w, in.quantized[0]);
  multiply(table, in, {{&matrix, out, w.n}}, false);
}

void take_rows(const KernelTable& table, const Layout& layout, const PackedMatrix& w, const std::int64_t* ids,
               std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= w.n) {
      throw std::out_of_range("row id " + std::to_string(ids[i]) + " at position " + std::to_string(i) +
                              " is not a row of a matrix with " + std::to_string(w.n) + " rows");
    }
  }
  const auto kernel = table.take_row[slot_of(layout.bits)];
  const std::int64_t per_chunk = std::max<std::int64_t>(1, kAloneWork / 8 / w.k);
  parallel_for(ceil_div(count, per_chunk), [&](std::int64_t c) noexcept {
    const std::int64_t end = std::min(count, (c + 1) * per_chunk);
    for (std::int64_t i = c * per_chunk; i < end; ++i) kernel(w, ids[i], out + i * w.k);
  });
}

std::uint64_t stream_read(const KernelTable& table, const std::uint64_t* data, std::int64_t words) {
  std::atomic<std::uint64_t> all{0};
  const std::int64_t per_chunk = 1 << 16;
  parallel_for(ceil_div(words, per_chunk), [&](std::int64_t c) noexcept {
    all.fetch_xor(table.stream_read(data + c * per_chunk, std::min(per_chunk, words - c * per_chunk)));
  });
  return all.load();
}

}  // namespace llmq
