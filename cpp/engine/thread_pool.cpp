#include "engine/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace llmq {
namespace {

using Clock = std::chrono::steady_clock;

// A worker looks for the next job this long before it sleeps: longer than the pause between two linears of a model that
// generates token by token, because waking a sleeper takes about as long as such a linear; not longer, because the CPU
// then belongs to other libraries' threads.
constexpr auto kSpin = std::chrono::microseconds(200);
// After so many polls a waiting thread offers its CPU to others at each further poll.
constexpr int kPolitePolls = 256;
constexpr int kMaxThreads = 1024;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void wait_a_little(int polls) {
  if (polls < kPolitePolls) {
    relax();
  } else {
    sched_yield();
  }
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) {
      try {
        workers_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        break;  // the system grants no more threads: the ones there do the work
      }
    }
  }

  ~Pool() {
    {
      const std::lock_guard lock(sleep_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  bool has_workers() const { return !workers_.empty(); }

  // One caller at a time.
  void run(std::int64_t count, detail::Chunk chunk, void* context) {
    const std::uint64_t last = ticket_.load(std::memory_order_relaxed) >> 32;
    ticket_.store(last << 32 | kClosed);  // a late worker that has read the new fields now fails to claim an old chunk
    chunk_.store(chunk, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((last + 1) << 32);  // publishes the job
    if (sleepers_.load() > 0) {
      const std::lock_guard lock(sleep_);
      wake_.notify_all();
    }
    claim_chunks();
    for (int polls = 0; done_.load(std::memory_order_acquire) < count; ++polls) wait_a_little(polls);
  }

 private:
  // The ticket is (job number << 32 | next chunk). A chunk is claimed by counting the ticket up, which fails when the
  // ticket has changed meanwhile. run() closes the ticket before it changes a field, so a claim that succeeds has read
  // the fields of its own job, and that job stays open until the chunk is done.
  static constexpr std::uint64_t kClosed = 0xffffffffu;

  void claim_chunks() {
    std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const detail::Chunk chunk = chunk_.load(std::memory_order_acquire);
      void* const context = context_.load(std::memory_order_acquire);
      const std::int64_t index = static_cast<std::int64_t>(ticket & kClosed);
      if (index >= count_.load(std::memory_order_acquire)) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      chunk(context, index);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work() {
    std::uint64_t seen = 0;  // number of the last job this worker took part in
    while (wait_for_job(seen)) {
      seen = ticket_.load(std::memory_order_acquire) >> 32;
      claim_chunks();
    }
  }

  // True when there is a job after `seen`, false when the pool stops.
  bool wait_for_job(std::uint64_t seen) {
    const auto news = [&] { return ticket_.load() >> 32 != seen || stop_.load(); };
    const auto until = Clock::now() + kSpin;
    for (int polls = 0; !news(); ++polls) {
      wait_a_little(polls);
      if (polls % 32 == 0 && Clock::now() > until) {
        std::unique_lock lock(sleep_);
        sleepers_.fetch_add(
            1);  // before the last look at the ticket: run() looks at sleepers_ after it writes the ticket
        wake_.wait(lock, news);
        sleepers_.fetch_sub(1);
      }
    }
    return !stop_.load();
  }

  // Counters that different threads write sit on cache lines of their own.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  alignas(64) std::atomic<std::int64_t> done_{0};
  alignas(64) std::atomic<std::int64_t> count_{0};
  std::atomic<detail::Chunk> chunk_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// The process's pool. Never destroyed at exit: a worker may still look at it while the process ends.
struct State {
  std::mutex busy;       // held while a job runs and while the pool is replaced
  Pool* pool = nullptr;  // made at the first job
  std::atomic<int> threads{1};
};

State* state = new State;

// A forked child has the parent's memory but none of its threads: leave the old pool alone and start anew.
void forget_after_fork() {
  auto* fresh = new State;
  fresh->threads.store(state->threads.load());
  state = fresh;
}

const int fork_handler = pthread_atfork(nullptr, nullptr, forget_after_fork);

void run_alone(std::int64_t count, detail::Chunk chunk, void* context) {
  for (std::int64_t i = 0; i < count; ++i) chunk(context, i);
}

}  // namespace

int num_threads() { return state->threads.load(std::memory_order_relaxed); }

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("number of threads is " + std::to_string(n) + "; use 1 to " +
                                std::to_string(kMaxThreads));
  }
  const std::lock_guard lock(state->busy);
  delete state->pool;
  state->pool = nullptr;
  state->threads.store(n);
}

void detail::run_chunks(std::int64_t count, Chunk chunk, void* context) {
  if (count <= 1 || num_threads() == 1) return run_alone(count, chunk, context);
  const std::unique_lock lock(state->busy, std::try_to_lock);
  if (!lock) return run_alone(count, chunk, context);
  if (!state->pool) state->pool = new Pool(num_threads());
  if (!state->pool->has_workers()) return run_alone(count, chunk, context);
  state->pool->run(count, chunk, context);
}

}  // namespace llmq
