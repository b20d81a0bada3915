// A sequence's pages as plain bytes, and back; what comes from a file is checked before it is used.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "engine/kv_cache.h"

namespace llmq {

KvPages::Held KvPages::held_pages() const {
  Held held{.numbers = {}, .first = first_, .begin = begin_};
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    if (pages_[i]) held.numbers.push_back(static_cast<std::int64_t>(i));
  }
  return held;
}

void KvPages::read(std::byte* out) const {
  for (const Page& page : pages_) {
    if (!page) continue;
    std::memcpy(out, page.get(), static_cast<std::size_t>(page_bytes_));
    out += page_bytes_;
  }
}

void KvPages::restore(const Held& held, std::int64_t length, const std::byte* bytes) {
  const std::int64_t end = end_page(length), fixed = pages_of(fixed_);
  bool fits = held.first >= fixed && held.first <= std::max(fixed, end) && held.begin >= 0 &&
              held.begin % kKeyTokens == 0 && held.begin < length + kKeyTokens;
  std::int64_t last = -1;
  for (const std::int64_t number : held.numbers) {
    fits = fits && number > last && number < end && (number < fixed || number >= held.first);
    last = number;
  }
  const auto holds = [&](std::int64_t i) { return std::binary_search(held.numbers.begin(), held.numbers.end(), i); };
  for (std::int64_t i = 0; fits && i < end; ++i) fits = holds(i) || (i >= fixed && i < held.begin >> page_shift_);
  if (!fits) {
    throw std::invalid_argument(std::to_string(held.numbers.size()) + " pages from token " +
                                std::to_string(held.begin) + " on are not those of " + std::to_string(length) +
                                " tokens");
  }
  std::vector<Page> fresh = new_pages(static_cast<std::int64_t>(held.numbers.size()));
  std::vector<Page> all(static_cast<std::size_t>(held.numbers.empty() ? 0 : end));
  for (std::size_t i = 0; i < fresh.size(); ++i, bytes += page_bytes_) {
    std::memcpy(fresh[i].get(), bytes, static_cast<std::size_t>(page_bytes_));
    all[static_cast<std::size_t>(held.numbers[i])] = std::move(fresh[i]);
  }
  pages_ = std::move(all), spare_.clear();
  in_use_ = static_cast<std::int64_t>(held.numbers.size());
  first_ = held.first, begin_ = held.begin;
}

void Sequence::restore(std::int64_t length, const std::vector<KvPages::Held>& held,
                       const std::vector<const std::byte*>& bytes) {
  Sequence made(shape_);
  std::size_t i = 0;
  made.for_pages([&](KvPages& pages) { pages.restore(held[i], length, bytes[i]), ++i; });
  made.length_ = length;
  for (const KvLayer& layer : made.layers_) {
    if (layer.stored.begin() > 0 && layer.shape.window == 0) {
      throw std::invalid_argument("pages of a layer that forgets nothing begin at token " +
                                  std::to_string(layer.stored.begin()));
    }
    const std::int64_t open = length / kColumnTokens * kColumnTokens;
    if (kv_by_column(layer.shape.keys) && layer.near->begin() > std::max(open, layer.near->fixed())) {
      throw std::invalid_argument("tokens of the page that is not full, from " + std::to_string(open) + " to " +
                                  std::to_string(layer.near->begin()) + ", are missing");
    }
  }
  if (made.least_crop() > length) {
    throw std::invalid_argument("pages of a layer with a sliding window begin too late for " + std::to_string(length) +
                                " tokens");
  }
  length_ = length;
  layers_ = std::move(made.layers_);
}

}  // namespace llmq
