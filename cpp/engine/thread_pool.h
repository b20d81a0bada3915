// A small pool of threads for work of microseconds: workers spin a short while for the next job, then sleep.
#pragma once

#include <cstdint>
#include <type_traits>

namespace llmq {

// Threads that share a job, the caller included; at least 1.
int num_threads();

// Throws std::invalid_argument unless 1 <= n <= 1024. Waits for a running job.
void set_num_threads(int n);

namespace detail {
using Chunk = void (*)(void* context, std::int64_t index) noexcept;
void run_chunks(std::int64_t count, Chunk chunk, void* context);
}  // namespace detail

// f(0) .. f(count - 1), in any order, shared out to the pool and the caller; returns when all are done. f must be
// noexcept: no exception crosses threads. Chunks are claimed one by one, so a worker that the system does not schedule
// holds nothing up. A caller that finds the pool taken by another thread works alone.
template <class F>
void parallel_for(std::int64_t count, const F& f) {
  static_assert(noexcept(f(std::int64_t{0})), "work for the thread pool must be noexcept");
  detail::run_chunks(
      count, [](void* context, std::int64_t index) noexcept { (*static_cast<const F*>(context))(index); },
      const_cast<std::remove_const_t<F>*>(&f));
}

}  // namespace llmq
