// A page of the key/value cache, shared by the sequences that have its tokens in common.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace llmq {

// Memory that copies share and the last of them frees. One pointer, so that a vector of pages is an array of addresses.
// Only a page that is not shared may be written; who finds it so is its only holder, and stays that until he copies it.
class KvPage {
 public:
  static constexpr std::size_t kAlignment = 64;

  KvPage() = default;
  // `bytes`, a multiple of kAlignment, of zeros: a block of 16 tokens is read whole, and what lies behind the last
  // token must be no NaN. Throws std::bad_alloc.
  explicit KvPage(std::size_t bytes) {
    void* memory = std::aligned_alloc(kAlignment, kAlignment + bytes);
    if (!memory) throw std::bad_alloc();
    new (memory) Holders(1);
    data_ = static_cast<std::byte*>(memory) + kAlignment;
    std::memset(data_, 0, bytes);
  }
  KvPage(const KvPage& other) : data_(other.data_) {
    if (data_) holders().fetch_add(1, std::memory_order_relaxed);
  }
  KvPage(KvPage&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  KvPage& operator=(KvPage other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~KvPage() {
    // What this holder has read or written comes before what the next only holder writes, and before the end.
    if (data_ && holders().fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(&holders());
  }

  void* get() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }
  bool shared() const { return data_ && holders().load(std::memory_order_acquire) > 1; }

 private:
  using Holders = std::atomic<std::int64_t>;
  Holders& holders() const { return *reinterpret_cast<Holders*>(static_cast<std::byte*>(data_) - kAlignment); }

  void* data_ = nullptr;
};

}  // namespace llmq
