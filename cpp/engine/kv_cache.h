// Keys and values of one sequence, in pages that are added as the sequence grows.
#pragma once

#include <cstdint>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "engine/kv_page.h"
#include "kernel_table.h"

namespace llmq {

// Tokens processed together, at most: enough to reuse an unpacked weight many times, few enough for the activations to
// stay in the last cache.
constexpr std::int64_t kChunkTokens = 512;
// Tokens that a crop may take back without a trace in a layer that forgets: more than speculative decoding guesses.
constexpr std::int64_t kCropTokens = 32;
// A step of at most so many tokens may be taken back as a whole, too.
constexpr std::int64_t kStepTaken = 256;

// Raised with every change of what the bytes of a page mean, or of which pages a sequence holds: files name it.
constexpr int kKvLayoutVersion = 2;

// No memory for pages, and how many bytes of it.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// How one layer stores its tokens. Where `near` is set, tokens are stored in that type as well as long as a query sees
// them so: the first `sinks` and the last `recent` before each query, both rounded up to whole blocks of kKeyTokens.
// Keys with scales by column need it: what the last page, not full yet, holds is stored in `near` only, and seen so.
struct KvLayerShape {
  KvType keys, values;
  bool rotate = false;  // keys, and the queries that meet them, are rotated by a Hadamard matrix
  std::optional<KvType> near = {};
  std::int64_t sinks = 0, recent = 0;
  std::int64_t window = 0;  // tokens that a token sees, itself included; 0: all
};

struct KvShape {
  std::int64_t heads, head_dim;
  std::vector<KvLayerShape> layers;
};

// Pages of one layer, numbered by the tokens they hold. For each head in turn a page holds the keys, the values, the
// scales of the keys, the scales of the values, the zeros of both, as KvRows describes them. Copies share their pages;
// one that is written to is copied first.
class KvPages {
 public:
  static constexpr std::int64_t kEverything = std::int64_t{1} << 60;

  // The first `fixed` tokens and `reach` before those of a step stay, the others are forgotten; `block` tokens
  // together, as long as one of them may be the last.
  KvPages(std::int64_t heads, std::int64_t head_dim, KvType keys, KvType values, int page_shift, std::int64_t fixed,
          std::int64_t reach, std::int64_t block = 1);
  KvPages(const KvPages& other);
  KvPages(KvPages&&) = default;

  KvType key_type() const { return key_type_; }
  KvType value_type() const { return value_type_; }
  std::int64_t bytes() const { return held() * page_bytes_; }
  std::int64_t page_bytes() const { return page_bytes_; }
  // Of the pages that are not among those counted already.
  std::int64_t bytes(std::unordered_set<const void*>& counted) const;
  std::int64_t fixed() const { return fixed_; }
  // All tokens from here on are held, besides the fixed ones.
  std::int64_t begin() const { return begin_; }

  using Page = KvPage;
  // Pages that it takes, beyond those held, to add `count` tokens to `start`, by steps.
  std::int64_t missing(std::int64_t start, std::int64_t count) const;
  // Throws std::bad_alloc.
  std::vector<Page> new_pages(std::int64_t count) const;
  void give(std::vector<Page> fresh);
  // Make room for `count` tokens from `start` on, out of pages that were given or are forgotten.
  void slide(std::int64_t start, std::int64_t count);
  // Forget the tokens behind `length`, and pages that are not in use.
  void crop(std::int64_t length);
  // Pages that it takes to hold all tokens from `from` to `end` again, where they can be written.
  std::int64_t missing_between(std::int64_t from, std::int64_t end) const;
  // Hold them, out of pages that were given; what they contain is the caller's.
  void reopen(std::int64_t from, std::int64_t end);

  KvRows keys(std::int64_t head) const;
  KvRows values(std::int64_t head) const;

  // Which pages are held, ascending, and where they begin; `begin` as above.
  struct Held {
    std::vector<std::int64_t> numbers;
    std::int64_t first, begin;
  };
  Held held_pages() const;
  // Their bytes, one page after the other.
  void read(std::byte* out) const;
  // Hold `held` pages of `bytes` instead, for a sequence of `length` tokens. Throws std::invalid_argument where a page
  // is missing that a later step could look at, or is one too many; std::bad_alloc.
  void restore(const Held& held, std::int64_t length, const std::byte* bytes);

 private:
  std::int64_t pages_of(std::int64_t tokens) const;
  // Of `tokens` tokens; keys with scales by column have none for those that do not fill it.
  std::int64_t end_page(std::int64_t tokens) const;
  std::int64_t first_kept(std::int64_t start) const;
  std::int64_t held() const { return in_use_ + static_cast<std::int64_t>(spare_.size()); }
  void take_back(std::int64_t number);
  // A page that may be written.
  void take_spare(std::int64_t number);

  std::int64_t head_dim_, padded_dim_;
  KvType key_type_, value_type_;
  int page_shift_;
  std::int64_t fixed_, reach_, block_, begin_ = 0;
  std::int64_t first_;  // page beyond the fixed ones before which none is held
  std::int64_t in_use_ = 0;
  KvRows keys_, values_;  // of head 0
  std::int64_t head_bytes_, page_bytes_;
  std::vector<Page> pages_, spare_;
};

struct KvLayer {
  KvLayerShape shape;
  KvPages stored;
  std::optional<KvPages> near;
};

class Sequence {
 public:
  explicit Sequence(const KvShape& shape);
  Sequence(const Sequence& other);
  Sequence& operator=(const Sequence&) = delete;

  const KvShape& shape() const { return shape_; }
  std::int64_t length() const { return length_; }
  std::int64_t bytes() const;
  std::int64_t bytes(std::unordered_set<const void*>& counted) const;
  const KvLayer& layer(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  // Memory for `count` more tokens in every layer. Throws OutOfMemory and leaves the sequence as it was.
  void reserve(std::int64_t count);
  // Room for `count` <= kChunkTokens tokens from `start` on, for which memory was reserved.
  void slide(std::int64_t start, std::int64_t count);
  // Store keys and values f32[heads, head_dim] of one token of one layer; there must be room for it.
  void append(const KernelTable& table, std::int64_t layer, std::int64_t token, const float* keys,
              const float* values) const;
  // Room for `count` more tokens, counted as if they had been stored: shows the memory that they take.
  void skip(std::int64_t count);
  // Make codes of the pages that the `count` tokens from `start` on fill, where keys have scales by column; all of them
  // must have been appended.
  void fill_pages(const KernelTable& table, std::int64_t layer, std::int64_t start, std::int64_t count) const;
  // The tokens up to `length` count from now on; their keys and values have been stored.
  void grow(std::int64_t length);
  // Forget the tokens behind `length`. Throws std::invalid_argument when there are not so many, or where tokens that
  // the next one sees have left the window: 0 and least_crop() to length() are possible. Throws std::bad_alloc. In both
  // cases the sequence stays as it was.
  void crop(const KernelTable& table, std::int64_t length);
  std::int64_t least_crop() const;

  // Held while a call changes the sequence, or reads its pages: two steps would write the same ones. Throws
  // std::invalid_argument when another call holds it.
  std::unique_lock<std::mutex> lock() const;

  // The pages of every layer, those of its near tokens behind the others.
  std::vector<const KvPages*> pages() const;
  // Become a sequence of `length` tokens with these pages. Throws as KvPages::restore and leaves it as it was.
  void restore(std::int64_t length, const std::vector<KvPages::Held>& held, const std::vector<const std::byte*>& bytes);

 private:
  Sequence(const Sequence& other, const std::unique_lock<std::mutex>& held);
  template <class F>
  void for_pages(const F& f) {
    for (KvLayer& layer : layers_) {
      f(layer.stored);
      if (layer.near) f(*layer.near);
    }
  }
  void fill_page(const KernelTable& table, const KvLayer& layer, std::int64_t page, std::int64_t head) const;
  // Tokens of a page cut by a crop to `length` that are left as codes only.
  Range cut(const KvLayer& layer, std::int64_t length) const;
  void read_back(const KernelTable& table, const KvLayer& layer, Range tokens, float* numbers) const;

  KvShape shape_;
  std::int64_t length_ = 0;
  std::vector<KvLayer> layers_;
  mutable std::mutex busy_;
};

// Bytes that the sequences hold together: a page that several share counts once.
std::int64_t shared_bytes(const std::vector<const Sequence*>& sequences);

}  // namespace llmq
