#include "engine/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

constexpr auto kAlignment = static_cast<std::int64_t>(KvPage::kAlignment);
// log2 of the tokens of a page; a page of near tokens is one block.
constexpr int kPageShift = 6;
constexpr int kNearShift = 4;
static_assert(kKeyTokens == 1 << kNearShift);
static_assert(kColumnTokens == 1 << kPageShift);

std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

KvPages stored_pages(const KvShape& shape, const KvLayerShape& layer) {
  const std::int64_t reach = layer.window > 0 ? layer.window + kKeyTokens + kCropTokens : KvPages::kEverything;
  return {shape.heads, shape.head_dim, layer.keys, layer.values, kPageShift, 0, reach};
}

std::optional<KvPages> near_pages(const KvShape& shape, const KvLayerShape& layer) {
  if (!layer.near) return std::nullopt;
  return KvPages(shape.heads, shape.head_dim, *layer.near, *layer.near, kNearShift, round_up(layer.sinks, kKeyTokens),
                 layer.recent + kCropTokens, kv_by_column(layer.keys) ? kColumnTokens : 1);
}

std::int64_t page_start(std::int64_t token) { return token / kColumnTokens * kColumnTokens; }

}  // namespace

KvPages::KvPages(std::int64_t heads, std::int64_t head_dim, KvType keys, KvType values, int page_shift,
                 std::int64_t fixed, std::int64_t reach, std::int64_t block)
    : head_dim_(head_dim),
      padded_dim_(round_up(head_dim, kHeadPadding)),
      key_type_(keys),
      value_type_(values),
      page_shift_(page_shift),
      fixed_(fixed),
      reach_(reach),
      block_(block),
      first_(pages_of(fixed)) {
  const std::int64_t tokens = std::int64_t{1} << page_shift;
  const KvRows rows{.pages = nullptr,
                    .page_shift = page_shift,
                    .data = 0,
                    .scales = 0,
                    .zeros = 0,
                    .dim = head_dim,
                    .padded = padded_dim_,
                    .group = 1,
                    .token_bytes = 0,
                    .grid_bytes = 0};
  keys_ = values_ = rows;
  keys_.group = kKeyGroup, values_.group = value_group(values);
  std::int64_t at = 0;
  const auto place = [&](std::int64_t bytes) {
    const std::int64_t begin = at;
    at += round_up(bytes, kKeyTokens);
    return begin;
  };
  const std::int64_t key_columns = kv_is_code(keys) ? round_up(head_dim, kBlockColumns) : head_dim;
  keys_.token_bytes = key_columns * kv_bits(keys) / 8;
  keys_.data = place(tokens * keys_.token_bytes);
  // Strips of kHeadPadding columns share bytes.
  const std::int64_t value_columns =
      kv_is_code(values) ? round_up(head_dim, kHeadPadding * 8 / kv_bits(values)) : padded_dim_;
  values_.token_bytes = value_columns * kv_bits(values) / 8;
  values_.data = place(tokens * values_.token_bytes);
  const std::int64_t key_scales = kv_by_column(keys) ? head_dim : tokens * keys_.groups();
  keys_.scales = place(kv_is_code(keys) ? key_scales * 2 : 0);
  values_.scales = place(kv_is_code(values) ? tokens * values_.groups() * 2 : 0);
  keys_.zeros = place(kv_has_zero(keys) ? key_scales : 0);
  values_.zeros = place(kv_has_zero(values) ? tokens * values_.groups() : 0);
  keys_.grid_bytes = at - keys_.scales;
  head_bytes_ = round_up(at, kAlignment);
  page_bytes_ = heads * head_bytes_;
}

KvPages::KvPages(const KvPages& other)
    : head_dim_(other.head_dim_),
      padded_dim_(other.padded_dim_),
      key_type_(other.key_type_),
      value_type_(other.value_type_),
      page_shift_(other.page_shift_),
      fixed_(other.fixed_),
      reach_(other.reach_),
      block_(other.block_),
      begin_(other.begin_),
      first_(other.first_),
      in_use_(other.in_use_),
      keys_(other.keys_),
      values_(other.values_),
      head_bytes_(other.head_bytes_),
      page_bytes_(other.page_bytes_),
      pages_(other.pages_) {}

std::int64_t KvPages::pages_of(std::int64_t tokens) const {
  return (tokens + (std::int64_t{1} << page_shift_) - 1) >> page_shift_;
}

std::int64_t KvPages::bytes(std::unordered_set<const void*>& counted) const {
  std::int64_t pages = 0;
  for (const auto* list : {&pages_, &spare_}) {
    for (const Page& page : *list) pages += page && counted.insert(page.get()).second;
  }
  return pages * page_bytes_;
}

std::int64_t KvPages::end_page(std::int64_t tokens) const {
  return kv_by_column(key_type_) ? tokens >> page_shift_ : pages_of(tokens);
}

std::int64_t KvPages::first_kept(std::int64_t start) const {
  const std::int64_t last = std::max<std::int64_t>(0, start - kCropTokens) / block_ * block_;
  return std::max<std::int64_t>(0, std::min(start - reach_, last));
}

std::int64_t KvPages::missing(std::int64_t start, std::int64_t count) const {
  const std::int64_t end = end_page(start + count);
  // Pages of the fixed tokens, of those that stay and of the new ones; of a long step, which slides, those of a part.
  const std::int64_t within = std::max(reach_, kCropTokens + block_) + std::min(count, kChunkTokens);
  const std::int64_t from = std::max(pages_of(fixed_), first_kept(start) >> page_shift_);
  std::int64_t wanted = std::min(end, pages_of(fixed_) + std::min(pages_of(within) + 1, end - from));
  // Shared pages are of no use to others when they are forgotten, and take a copy when they are written.
  const auto size = static_cast<std::int64_t>(pages_.size());
  const std::int64_t kept = first_kept(start + count) >> page_shift_;
  for (std::int64_t i = first_; i < std::min(kept, size); ++i) wanted += pages_[static_cast<std::size_t>(i)].shared();
  for (std::int64_t i = start >> page_shift_; i < size; ++i) wanted += pages_[static_cast<std::size_t>(i)].shared();
  return std::max<std::int64_t>(0, wanted - held());
}

std::vector<KvPages::Page> KvPages::new_pages(std::int64_t count) const {
  std::vector<Page> fresh;
  while (count-- > 0) fresh.emplace_back(static_cast<std::size_t>(page_bytes_));
  return fresh;
}

void KvPages::give(std::vector<Page> fresh) {
  for (Page& page : fresh) spare_.push_back(std::move(page));
}

void KvPages::slide(std::int64_t start, std::int64_t count) {
  const std::int64_t from = std::max(pages_of(fixed_), first_kept(start) >> page_shift_);
  const std::int64_t end = end_page(start + count);
  if (static_cast<std::int64_t>(pages_.size()) < end) pages_.resize(static_cast<std::size_t>(end));
  for (; first_ < from; ++first_) take_back(first_);
  if (first_ > pages_of(fixed_)) begin_ = std::max(begin_, first_ << page_shift_);
  for (std::int64_t i = start >> page_shift_; i < end; ++i) take_spare(i);
}

void KvPages::take_spare(std::int64_t number) {
  Page& page = pages_[static_cast<std::size_t>(number)];
  if (page && !page.shared()) return;
  Page own = std::move(spare_.back());
  spare_.pop_back();
  if (page) {
    std::memcpy(own.get(), page.get(), static_cast<std::size_t>(page_bytes_));
  } else {
    ++in_use_;
  }
  page = std::move(own);
}

void KvPages::take_back(std::int64_t number) {
  if (number >= static_cast<std::int64_t>(pages_.size()) || !pages_[static_cast<std::size_t>(number)]) return;
  Page page = std::move(pages_[static_cast<std::size_t>(number)]);
  if (!page.shared()) spare_.push_back(std::move(page));
  --in_use_;
}

std::int64_t KvPages::missing_between(std::int64_t from, std::int64_t end) const {
  std::int64_t wanted = 0;
  for (std::int64_t i = from >> page_shift_; i < pages_of(end); ++i) {
    const bool own = i < static_cast<std::int64_t>(pages_.size()) && pages_[static_cast<std::size_t>(i)] &&
                     !pages_[static_cast<std::size_t>(i)].shared();
    wanted += !own;
  }
  return std::max<std::int64_t>(0, wanted - static_cast<std::int64_t>(spare_.size()));
}

void KvPages::reopen(std::int64_t from, std::int64_t end) {
  for (std::int64_t i = from >> page_shift_; i < pages_of(end); ++i) take_spare(i);
  first_ = std::max(pages_of(fixed_), from >> page_shift_);
  begin_ = from;
}

void KvPages::crop(std::int64_t length) {
  const std::int64_t end = end_page(length);
  for (std::int64_t i = end; i < static_cast<std::int64_t>(pages_.size()); ++i) take_back(i);
  pages_.resize(std::min(static_cast<std::size_t>(end), pages_.size()));
  if (length < begin_) {
    begin_ = round_up(length, kKeyTokens);
    first_ = std::max(pages_of(fixed_), length >> page_shift_);
  }
  // One stays: speculative decoding crops and grows again at every step. A page of near tokens is quickly had again.
  spare_.resize(std::min<std::size_t>(spare_.size(), page_shift_ == kNearShift ? 0 : 1));
}

KvRows KvPages::keys(std::int64_t head) const {
  static_assert(sizeof(Page) == sizeof(void*));
  KvRows rows = keys_;
  rows.pages = reinterpret_cast<void* const*>(pages_.data());
  rows.data += head * head_bytes_, rows.scales += head * head_bytes_, rows.zeros += head * head_bytes_;
  return rows;
}

KvRows KvPages::values(std::int64_t head) const {
  KvRows rows = values_;
  rows.pages = reinterpret_cast<void* const*>(pages_.data());
  rows.data += head * head_bytes_, rows.scales += head * head_bytes_, rows.zeros += head * head_bytes_;
  return rows;
}

Sequence::Sequence(const KvShape& shape) : shape_(shape) {
  for (const KvLayerShape& layer : shape.layers) {
    layers_.push_back({layer, stored_pages(shape, layer), near_pages(shape, layer)});
  }
}

Sequence::Sequence(const Sequence& other) : Sequence(other, other.lock()) {}

Sequence::Sequence(const Sequence& other, const std::unique_lock<std::mutex>& /*held*/)
    : shape_(other.shape_), length_(other.length_), layers_(other.layers_) {}

std::unique_lock<std::mutex> Sequence::lock() const {
  std::unique_lock<std::mutex> held(busy_, std::try_to_lock);
  if (!held) {
    throw std::invalid_argument("a sequence is in use by another call (or given twice); make a copy of it");
  }
  return held;
}

std::int64_t Sequence::bytes() const {
  std::int64_t sum = 0;
  for (const KvLayer& layer : layers_) sum += layer.stored.bytes() + (layer.near ? layer.near->bytes() : 0);
  return sum;
}

std::int64_t Sequence::bytes(std::unordered_set<const void*>& counted) const {
  std::int64_t sum = 0;
  for (const KvPages* part : pages()) sum += part->bytes(counted);
  return sum;
}

std::int64_t shared_bytes(const std::vector<const Sequence*>& sequences) {
  std::unordered_set<const void*> counted;
  std::int64_t sum = 0;
  for (const Sequence* sequence : sequences) sum += sequence->bytes(counted);
  return sum;
}

void Sequence::reserve(std::int64_t count) {
  std::vector<std::vector<KvPages::Page>> fresh;
  try {
    for_pages([&](KvPages& pages) { fresh.push_back(pages.new_pages(pages.missing(length_, count))); });
  } catch (const std::bad_alloc&) {
    fresh.clear();
    std::int64_t bytes = 0;
    for (const KvPages* part : pages()) bytes += part->missing(length_, count) * part->page_bytes();
    throw OutOfMemory("no memory for " + std::to_string(count) + " more tokens in the key/value cache: it takes " +
                      std::to_string(bytes >> 20) + " MiB more than the " + std::to_string(this->bytes() >> 20) +
                      " MiB held; shorten the prompt, or cache fewer bits (kv_cache=\"8\" or \"4\")");
  }
  std::size_t i = 0;
  for_pages([&](KvPages& pages) { pages.give(std::move(fresh[i++])); });
}

void Sequence::slide(std::int64_t start, std::int64_t count) {
  for_pages([&](KvPages& pages) { pages.slide(start, count); });
}

void Sequence::append(const KernelTable& table, std::int64_t layer, std::int64_t token, const float* keys,
                      const float* values) const {
  const KvLayer& at = layers_[static_cast<std::size_t>(layer)];
  const auto store = [&](const KvPages& pages) {
    for (std::int64_t head = 0; head < shape_.heads; ++head) {
      table.append_key[pages.key_type()](pages.keys(head), token, keys + head * shape_.head_dim);
      table.append_value[pages.value_type()](pages.values(head), token, values + head * shape_.head_dim);
    }
  };
  if (!kv_by_column(at.stored.key_type())) store(at.stored);
  if (at.near) store(*at.near);
}

void Sequence::skip(std::int64_t count) {
  reserve(count);
  const std::int64_t length = length_ + count;
  for (std::int64_t start = length_; start < length; start += kChunkTokens) {
    slide(start, std::min(kChunkTokens, length - start));
  }
  grow(length);
}

void Sequence::fill_pages(const KernelTable& table, std::int64_t layer, std::int64_t start, std::int64_t count) const {
  const KvLayer& at = layers_[static_cast<std::size_t>(layer)];
  const std::int64_t first = start >> kPageShift, pages = ((start + count) >> kPageShift) - first;
  if (!kv_by_column(at.stored.key_type()) || pages == 0) return;
  parallel_for(pages * shape_.heads,
               [&](std::int64_t i) noexcept { fill_page(table, at, first + i / shape_.heads, i % shape_.heads); });
}

// From the numbers in `near`, so that the codes do not depend on how the tokens came. Tokens that stay there for good
// are left out: the sinks' keys would set the scales of the others.
void Sequence::fill_page(const KernelTable& table, const KvLayer& layer, std::int64_t page, std::int64_t head) const {
  static thread_local std::vector<float> numbers;
  const std::int64_t dim = shape_.head_dim;
  const Range tokens{std::max(page << kPageShift, layer.near->fixed()), (page + 1) << kPageShift};
  if (tokens.begin >= tokens.end) return;
  numbers.resize(static_cast<std::size_t>(kColumnTokens * dim));
  const KvPages &near = *layer.near, &stored = layer.stored;
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    table.take_key[near.key_type()](near.keys(head), t, numbers.data() + (t - tokens.begin) * dim);
  }
  table.store_key_page[stored.key_type() - kKvTypes](stored.keys(head), tokens, numbers.data());
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    table.take_value[near.value_type()](near.values(head), t, numbers.data());
    table.append_value[stored.value_type()](stored.values(head), t, numbers.data());
  }
}

void Sequence::grow(std::int64_t length) {
  slide(length - length_ <= kStepTaken ? length_ : length, 0);
  length_ = length;
  for_pages([&](KvPages& pages) { pages.crop(length); });
}

std::int64_t Sequence::least_crop() const {
  std::int64_t least = 0;
  for (const KvLayer& layer : layers_) {
    if (layer.stored.begin() > 0) least = std::max(least, layer.stored.begin() + layer.shape.window - 1);
  }
  return least;
}

std::vector<const KvPages*> Sequence::pages() const {
  std::vector<const KvPages*> all;
  for (const KvLayer& layer : layers_) {
    all.push_back(&layer.stored);
    if (layer.near) all.push_back(&*layer.near);
  }
  return all;
}

Range Sequence::cut(const KvLayer& layer, std::int64_t length) const {
  if (!kv_by_column(layer.stored.key_type())) return {0, 0};
  const std::int64_t from = std::max(page_start(length), layer.near->fixed());
  return {from, std::min(length, layer.near->begin())};
}

void Sequence::read_back(const KernelTable& table, const KvLayer& layer, Range tokens, float* numbers) const {
  const KvPages &near = *layer.near, &stored = layer.stored;
  for (std::int64_t head = 0; head < shape_.heads; ++head) {
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      table.take_key[stored.key_type()](stored.keys(head), t, numbers);
      table.append_key[near.key_type()](near.keys(head), t, numbers);
      table.take_value[stored.value_type()](stored.values(head), t, numbers);
      table.append_value[near.value_type()](near.values(head), t, numbers);
    }
  }
}

void Sequence::crop(const KernelTable& table, std::int64_t length) {
  const std::int64_t least = least_crop();
  if (length < 0 || length > length_ || (length > 0 && length < least)) {
    throw std::invalid_argument("cannot crop a sequence of " + std::to_string(length_) + " tokens to " +
                                std::to_string(length) + "; use " + std::to_string(least) + " to " +
                                std::to_string(length_) +
                                (least > 0 ? ", or 0: layers of a sliding window forget what lies before it" : ""));
  }
  // The page that is cut is open again: its tokens become numbers, those that their codes stand for.
  std::vector<std::vector<KvPages::Page>> fresh(layers_.size());
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Range tokens = cut(layers_[i], length);
    if (tokens.begin >= tokens.end) continue;
    KvPages& near = *layers_[i].near;
    fresh[i] = near.new_pages(near.missing_between(tokens.begin, tokens.end));
  }
  std::vector<float> numbers(static_cast<std::size_t>(shape_.head_dim));
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    KvLayer& layer = layers_[i];
    const Range tokens = cut(layer, length);
    if (tokens.begin >= tokens.end) continue;
    layer.near->give(std::move(fresh[i]));
    layer.near->reopen(tokens.begin, tokens.end);
    read_back(table, layer, tokens, numbers.data());
  }
  length_ = length;
  for_pages([&](KvPages& pages) { pages.crop(length); });
}

}  // namespace llmq
