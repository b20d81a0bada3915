#include "engine/kv_cache.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace llmq {

Sequence::Sequence(const KvShape& shape) : shape_(shape), pages_(static_cast<std::size_t>(shape.layers)) {}

Sequence::Sequence(const Sequence& other) : shape_(other.shape_), pages_(other.pages_.size()) {
  reserve(other.length_);
  for (std::size_t layer = 0; layer < pages_.size(); ++layer) {
    for (std::size_t i = 0; i < pages_[layer].size(); ++i) {
      std::memcpy(pages_[layer][i].get(), other.pages_[layer][i].get(), static_cast<std::size_t>(shape_.page_bytes()));
    }
  }
  length_ = other.length_;
}

void Sequence::Free::operator()(void* p) const { std::free(p); }

// Zeroed: a block of 16 tokens is read whole, and what lies behind the last token must be no NaN.
Sequence::Page Sequence::new_page() const {
  const auto bytes = static_cast<std::size_t>((shape_.page_bytes() + 63) / 64 * 64);
  Page page(std::aligned_alloc(64, bytes));
  if (!page) throw std::bad_alloc();
  std::memset(page.get(), 0, bytes);
  return page;
}

std::int64_t Sequence::bytes() const {
  std::int64_t count = 0;
  for (const auto& layer : pages_) count += static_cast<std::int64_t>(layer.size());
  return count * shape_.page_bytes();
}

void Sequence::reserve(std::int64_t length) {
  const auto wanted = static_cast<std::size_t>((length + kPageTokens - 1) / kPageTokens);
  if (pages_.empty() || wanted <= pages_.back().size()) return;
  std::vector<std::vector<Page>> fresh(pages_.size());
  for (std::size_t layer = 0; layer < pages_.size(); ++layer) {
    pages_[layer].reserve(wanted);
    while (pages_[layer].size() + fresh[layer].size() < wanted) fresh[layer].push_back(new_page());
  }
  for (std::size_t layer = 0; layer < pages_.size(); ++layer) {
    for (Page& page : fresh[layer]) pages_[layer].push_back(std::move(page));
  }
}

void Sequence::crop(std::int64_t length) {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("cannot crop a sequence of " + std::to_string(length_) + " tokens to " +
                                std::to_string(length) + "; use 0 to " + std::to_string(length_));
  }
  length_ = length;
  const auto wanted = static_cast<std::size_t>((length + kPageTokens - 1) / kPageTokens);
  for (auto& layer : pages_) {
    // One spare page stays: speculative decoding crops and grows again at every step.
    if (layer.size() > wanted + 1) layer.resize(wanted + 1);
  }
}

KvView Sequence::view(std::int64_t layer, std::int64_t head) const {
  // unique_ptr<void, Free> with an empty deleter is one pointer, so the vector's data is an array of pages.
  static_assert(sizeof(Page) == sizeof(void*));
  return {.pages = reinterpret_cast<void* const*>(pages_[static_cast<std::size_t>(layer)].data()),
          .head = head,
          .head_stride = shape_.head_elements(),
          .head_dim = shape_.head_dim,
          .padded_dim = shape_.padded_dim()};
}

}  // namespace llmq
