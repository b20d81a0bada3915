// Keys and values of one sequence, in pages that are added as the sequence grows.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernel_table.h"

namespace llmq {

struct KvShape {
  std::int64_t layers, heads, head_dim;
  bool full_floats;  // f32 instead of f16

  std::int64_t padded_dim() const { return (head_dim + kHeadPadding - 1) / kHeadPadding * kHeadPadding; }
  std::int64_t head_elements() const { return kPageTokens * (head_dim + padded_dim()); }
  std::int64_t page_bytes() const { return heads * head_elements() * (full_floats ? 4 : 2); }
};

class Sequence {
 public:
  explicit Sequence(const KvShape& shape);
  Sequence(const Sequence& other);
  Sequence& operator=(const Sequence&) = delete;

  const KvShape& shape() const { return shape_; }
  std::int64_t length() const { return length_; }
  std::int64_t bytes() const;

  // Room for `length` tokens in every layer. Throws std::bad_alloc and leaves the sequence as it was.
  void reserve(std::int64_t length);
  // The tokens up to `length` count from now on; their keys and values have been stored.
  void grow(std::int64_t length) { length_ = length; }
  // Forget the tokens behind `length`. Throws std::invalid_argument when there are not so many.
  void crop(std::int64_t length);

  KvView view(std::int64_t layer, std::int64_t head) const;

  // Held while a step runs: two steps on one sequence would write the same pages.
  std::mutex busy;

 private:
  struct Free {
    void operator()(void* p) const;
  };
  using Page = std::unique_ptr<void, Free>;
  Page new_page() const;

  KvShape shape_;
  std::int64_t length_ = 0;
  std::vector<std::vector<Page>> pages_;  // [layer][page]
};

}  // namespace llmq
