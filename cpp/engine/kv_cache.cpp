#include "engine/kv_cache.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace llmq {
namespace {

constexpr std::int64_t kAlignment = 64;

std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

std::size_t pages_of(std::int64_t length) {
  return static_cast<std::size_t>(round_up(length, kPageTokens) / kPageTokens);
}

std::int64_t scale_bytes(KvType type, std::int64_t columns, std::int64_t group) {
  return kv_is_code(type) ? round_up(columns, group) / group * kPageTokens * 2 : 0;
}

}  // namespace

void KvPages::Free::operator()(void* p) const { std::free(p); }

KvPages::KvPages(std::int64_t heads, std::int64_t head_dim, KvTypes types)
    : head_dim_(head_dim), padded_dim_(round_up(head_dim, kHeadPadding)), types_(types) {
  const std::int64_t key_columns = kv_is_code(types.keys) ? round_up(head_dim, kBlockColumns) : head_dim;
  const auto bytes = [](KvType type, std::int64_t columns) {
    return round_up(kPageTokens * columns * kv_bits(type) / 8, kAlignment);
  };
  values_at_ = bytes(types.keys, key_columns);
  key_scales_at_ = values_at_ + bytes(types.values, padded_dim_);
  value_scales_at_ = key_scales_at_ + scale_bytes(types.keys, head_dim, kKeyGroup);
  head_bytes_ = value_scales_at_ + scale_bytes(types.values, head_dim, kValueGroup);
  page_bytes_ = heads * head_bytes_;
}

// Zeroed: a block of 16 tokens is read whole, and what lies behind the last token must be no NaN.
KvPages::Page KvPages::new_page() const {
  Page page(std::aligned_alloc(kAlignment, static_cast<std::size_t>(page_bytes_)));
  if (!page) throw std::bad_alloc();
  std::memset(page.get(), 0, static_cast<std::size_t>(page_bytes_));
  return page;
}

std::vector<KvPages::Page> KvPages::missing(std::int64_t length) const {
  std::vector<Page> fresh;
  while (pages_.size() + fresh.size() < pages_of(length)) fresh.push_back(new_page());
  return fresh;
}

void KvPages::add(std::vector<Page> fresh) {
  for (Page& page : fresh) pages_.push_back(std::move(page));
}

void KvPages::shrink(std::int64_t length, std::size_t spare) {
  if (pages_.size() > pages_of(length) + spare) pages_.resize(pages_of(length) + spare);
}

std::vector<KvPages::Page> KvPages::copies() const {
  std::vector<Page> copies;
  for (const Page& page : pages_) {
    copies.push_back(new_page());
    std::memcpy(copies.back().get(), page.get(), static_cast<std::size_t>(page_bytes_));
  }
  return copies;
}

KvRows KvPages::keys(std::int64_t head) const {
  // unique_ptr<void, Free> with an empty deleter is one pointer, so the vector's data is an array of pages.
  static_assert(sizeof(Page) == sizeof(void*));
  return {.pages = reinterpret_cast<void* const*>(pages_.data()),
          .data = head * head_bytes_,
          .scales = head * head_bytes_ + key_scales_at_,
          .dim = head_dim_,
          .padded = padded_dim_,
          .group = kKeyGroup};
}

KvRows KvPages::values(std::int64_t head) const {
  KvRows rows = keys(head);
  rows.data = head * head_bytes_ + values_at_;
  rows.scales = head * head_bytes_ + value_scales_at_;
  rows.group = kValueGroup;
  return rows;
}

Sequence::Sequence(const KvShape& shape) : shape_(shape) {
  for (const KvTypes& types : shape.layers) layers_.emplace_back(shape.heads, shape.head_dim, types);
}

Sequence::Sequence(const Sequence& other) : Sequence(other.shape_) {
  for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].add(other.layers_[i].copies());
  length_ = other.length_;
}

std::int64_t Sequence::bytes() const {
  std::int64_t sum = 0;
  for (const KvPages& layer : layers_) sum += layer.bytes();
  return sum;
}

void Sequence::append(const KernelTable& table, std::int64_t layer, std::int64_t token, const float* keys,
                      const float* values) const {
  const KvPages& pages = layers_[static_cast<std::size_t>(layer)];
  for (std::int64_t head = 0; head < shape_.heads; ++head) {
    table.append_key[pages.types().keys](pages.keys(head), token, keys + head * shape_.head_dim);
    table.append_value[pages.types().values](pages.values(head), token, values + head * shape_.head_dim);
  }
}

void Sequence::reserve(std::int64_t length) {
  std::vector<std::vector<KvPages::Page>> fresh;
  for (const KvPages& layer : layers_) fresh.push_back(layer.missing(length));
  for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].add(std::move(fresh[i]));
}

void Sequence::crop(std::int64_t length) {
  if (length < 0 || length > length_) {
    throw std::invalid_argument("cannot crop a sequence of " + std::to_string(length_) + " tokens to " +
                                std::to_string(length) + "; use 0 to " + std::to_string(length_));
  }
  length_ = length;
  // One spare page stays: speculative decoding crops and grows again at every step.
  for (KvPages& layer : layers_) layer.shrink(length, 1);
}

}  // namespace llmq
