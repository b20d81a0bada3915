// Keys and values of one sequence, in pages that are added as the sequence grows.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernel_table.h"

namespace llmq {

struct KvTypes {
  KvType keys, values;
};

struct KvShape {
  std::int64_t heads, head_dim;
  std::vector<KvTypes> layers;
};

// The pages of one layer. A page holds kPageTokens tokens: for each head in turn the keys, the values, the scales of
// the keys, the scales of the values, as KvRows describes them.
class KvPages {
 public:
  struct Free {
    void operator()(void* p) const;
  };
  using Page = std::unique_ptr<void, Free>;

  KvPages(std::int64_t heads, std::int64_t head_dim, KvTypes types);

  KvTypes types() const { return types_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(pages_.size()) * page_bytes_; }

  // The pages that `length` tokens need beyond those that are there. Throws std::bad_alloc.
  std::vector<Page> missing(std::int64_t length) const;
  void add(std::vector<Page> fresh);
  // Forget the pages behind those of `length` tokens and `spare` more.
  void shrink(std::int64_t length, std::size_t spare);
  // Copies of all pages. Throws std::bad_alloc.
  std::vector<Page> copies() const;

  KvRows keys(std::int64_t head) const;
  KvRows values(std::int64_t head) const;

 private:
  Page new_page() const;

  std::int64_t head_dim_, padded_dim_;
  KvTypes types_;
  std::int64_t values_at_, key_scales_at_, value_scales_at_, head_bytes_, page_bytes_;
  std::vector<Page> pages_;
};

class Sequence {
 public:
  explicit Sequence(const KvShape& shape);
  Sequence(const Sequence& other);
  Sequence& operator=(const Sequence&) = delete;

  const KvShape& shape() const { return shape_; }
  std::int64_t length() const { return length_; }
  std::int64_t bytes() const;
  const KvPages& layer(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  // Store keys and values f32[heads, head_dim] of one token of one layer; there must be room for it.
  void append(const KernelTable& table, std::int64_t layer, std::int64_t token, const float* keys,
              const float* values) const;
  // Room for `length` tokens in every layer. Throws std::bad_alloc and leaves the sequence as it was.
  void reserve(std::int64_t length);
  // The tokens up to `length` count from now on; their keys and values have been stored.
  void grow(std::int64_t length) { length_ = length; }
  // Forget the tokens behind `length`. Throws std::invalid_argument when there are not so many.
  void crop(std::int64_t length);

  // Held while a step runs: two steps on one sequence would write the same pages.
  std::mutex busy;

 private:
  KvShape shape_;
  std::int64_t length_ = 0;
  std::vector<KvPages> layers_;
};

}  // namespace llmq
