// Memory for the inputs of a product: rows of floats and the int8 forms that the matrices ask for.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "engine/matrix.h"

namespace llmq {

// Rows of floats and their int8 forms; memory is kept and only ever enlarged.
class InputBuffer {
 public:
  // Room for m rows of k columns, in the int8 groups that `matrices` ask for (none with float activations).
  Inputs& prepare(std::int64_t m, std::int64_t k, const std::vector<const Matrix*>& matrices, bool float_activations) {
    grow(x_, m * k);
    view_ = Inputs{};
    view_.x = x_.data(), view_.m = m, view_.k = k;
    for (const Matrix* w : matrices) {
      if (!w->quantized() || float_activations) continue;
      const auto end = view_.width.begin() + view_.count;
      if (std::find(view_.width.begin(), end, w->packed.group) == end) add_width(m, k, w->packed.group);
    }
    return view_;
  }

  float* row(std::int64_t r) { return x_.data() + r * view_.k; }

  // Row r is whole: put its columns into the order given (null: as they are) and make its int8 forms.
  void finish_row(const KernelTable& table, std::int64_t r, const std::int64_t* order = nullptr) {
    if (order != nullptr) {
      static thread_local std::vector<float> before;
      before.assign(row(r), row(r) + view_.k);
      for (std::int64_t j = 0; j < view_.k; ++j) row(r)[j] = before[order[j]];
    }
    for (int i = 0; i < view_.count; ++i) {
      table.quantize_rows(view_.x, {r, r + 1}, view_.k, view_.width[i], view_.quantized[i]);
    }
  }

 private:
  template <class T>
  static void grow(std::vector<T>& v, std::int64_t size) {
    if (static_cast<std::int64_t>(v.size()) < size) v.resize(static_cast<std::size_t>(size));
  }

  void add_width(std::int64_t m, std::int64_t k, std::int64_t width) {
    const int i = view_.count++;
    const std::int64_t stride = activation_stride(k), groups = (k + width - 1) / width;
    grow(q_[i], m * stride);
    // The columns of padding are read, too; what is left there of another shape must not count.
    for (std::int64_t r = 0; r < m; ++r) std::fill_n(q_[i].data() + r * stride + k, stride - k, std::int8_t{0});
    grow(scale_[i], m * groups);
    grow(total_[i], m * groups);
    view_.width[i] = width;
    view_.quantized[i] = {
        .q = q_[i].data(), .scale = scale_[i].data(), .total = total_[i].data(), .stride = stride, .groups = groups};
  }

  Inputs view_;
  std::vector<float> x_;
  std::array<std::vector<std::int8_t>, kMaxWidths> q_;
  std::array<std::vector<float>, kMaxWidths> scale_;
  std::array<std::vector<std::int32_t>, kMaxWidths> total_;
};

}  // namespace llmq
