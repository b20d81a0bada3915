#include "engine/attention.h"

#include <algorithm>
#include <cmath>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

// Query rows of a task, at most (or the heads of one group, if there are more): their sums stay in a core's own cache.
constexpr std::int64_t kTaskRows = 24;
// Keys are seen in parts of this many tokens, which are merged in their order, whoever computes them: a row's result
// does not depend on the threads, nor on how many rows are computed together.
constexpr std::int64_t kPartTokens = 128;
constexpr std::int64_t kTasksPerThread = 2;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// `count` tokens of a slice from `token` on, all query heads of one key/value head.
struct Task {
  const Slice* slice;
  std::int64_t head, token, count;
  Range keys;             // begins at the start of a part
  std::int64_t part = 0;  // where its parts are stored, when they are tasks of their own
};

// Sums of some rows over some keys, as AttendJob describes them.
struct Sums {
  float *acc, *max, *sum;

  Sums(float* memory, std::int64_t rows, std::int64_t width)
      : acc(memory), max(memory + rows * width), sum(max + rows) {}
};

// Add the sums of a part of the keys to what was summed before it.
void merge(const Sums& all, const Sums& part, std::int64_t rows, std::int64_t width) {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (part.max[r] == -INFINITY) continue;  // the row sees none of these keys
    const float largest = std::max(all.max[r], part.max[r]);
    const float keep = std::exp(all.max[r] - largest), add = std::exp(part.max[r] - largest);
    all.max[r] = largest;
    all.sum[r] = all.sum[r] * keep + part.sum[r] * add;
    float* to = all.acc + r * width;
    const float* from = part.acc + r * width;
    for (std::int64_t d = 0; d < width; ++d) to[d] = to[d] * keep + from[d] * add;
  }
}

class Run {
 public:
  Run(const KernelTable& table, const std::vector<Slice>& slices, const AttentionInputs& in)
      : table_(table),
        in_(in),
        group_(in.heads / in.kv_heads),
        padded_(ceil_div(in.head_dim, kHeadPadding) * kHeadPadding) {
    plan(slices);
  }

  void run() {
    const auto count = static_cast<std::int64_t>(tasks_.size());
    if (num_threads() == 1 || count >= kTasksPerThread * num_threads() || parts_ == count) {
      parallel_for(count, [&](std::int64_t i) noexcept { attend(tasks_[i]); });
      return;
    }
    // Few rows, many keys: the parts are the tasks.
    memory_.resize(static_cast<std::size_t>(parts_ * floats()));
    std::vector<const Task*> owners;
    for (const Task& task : tasks_) owners.insert(owners.end(), static_cast<std::size_t>(part_count(task)), &task);
    parallel_for(parts_, [&](std::int64_t i) noexcept {
      const Task& task = *owners[i];
      attend_part(task, i - task.part, memory_.data() + i * floats());
    });
    for (const Task& task : tasks_) {
      float* first = memory_.data() + task.part * floats();
      for (std::int64_t i = 1; i < part_count(task); ++i) add_part(task, first, first + i * floats());
      finish(task, first);
    }
  }

 private:
  std::int64_t task_tokens() const { return std::max<std::int64_t>(1, kTaskRows / group_); }
  std::int64_t floats() const { return group_ * task_tokens() * (padded_ + 2); }
  std::int64_t rows(const Task& task) const { return task.count * group_; }
  static std::int64_t part_count(const Task& task) { return ceil_div(task.keys.end - task.keys.begin, kPartTokens); }

  Range visible(std::int64_t position) const {
    return {in_.window > 0 ? std::max<std::int64_t>(0, position - in_.window + 1) : 0, position + 1};
  }

  void plan(const std::vector<Slice>& slices) {
    for (const Slice& s : slices) {
      for (std::int64_t token = 0; token < s.count; token += task_tokens()) {
        const std::int64_t count = std::min(task_tokens(), s.count - token);
        const Range keys{visible(s.start + token).begin / kPartTokens * kPartTokens, s.start + token + count};
        for (std::int64_t head = 0; head < in_.kv_heads; ++head) {
          tasks_.push_back({&s, head, token, count, keys, parts_});
          parts_ += part_count(tasks_.back());
        }
      }
    }
  }

  void attend(const Task& task) const noexcept {
    static thread_local std::vector<float> scratch;
    scratch.resize(static_cast<std::size_t>(2 * floats()));
    float *all = scratch.data(), *part = all + floats();
    attend_part(task, 0, all);
    for (std::int64_t i = 1; i < part_count(task); ++i) {
      attend_part(task, i, part);
      add_part(task, all, part);
    }
    finish(task, all);
  }

  // Sums of one part of a task's keys into `memory`. Row r is query head r % group of token r / group.
  void attend_part(const Task& task, std::int64_t part, float* memory) const noexcept {
    static thread_local std::vector<const float*> q;
    static thread_local std::vector<Range> seen;
    q.resize(static_cast<std::size_t>(rows(task)));
    seen.resize(static_cast<std::size_t>(rows(task)));
    for (std::int64_t r = 0; r < rows(task); ++r) {
      const std::int64_t token = task.token + r / group_;
      q[r] = in_.q + (task.slice->first + token) * in_.q_stride + (task.head * group_ + r % group_) * in_.head_dim;
      seen[r] = visible(task.slice->start + token);
    }
    const std::int64_t begin = task.keys.begin + part * kPartTokens;
    const Sums sums(memory, rows(task), padded_);
    table_.attend[in_.full_floats]({.kv = task.slice->sequence->view(in_.layer, task.head),
                                    .q = q.data(),
                                    .visible = seen.data(),
                                    .rows = rows(task),
                                    .tokens = {begin, std::min(task.keys.end, begin + kPartTokens)},
                                    .softcap = in_.softcap,
                                    .acc = sums.acc,
                                    .max = sums.max,
                                    .sum = sums.sum});
  }

  void add_part(const Task& task, float* all, float* part) const {
    merge(Sums(all, rows(task), padded_), Sums(part, rows(task), padded_), rows(task), padded_);
  }

  void finish(const Task& task, float* memory) const {
    const Sums sums(memory, rows(task), padded_);
    for (std::int64_t r = 0; r < rows(task); ++r) {
      const std::int64_t token = task.slice->first + task.token + r / group_;
      float* out = in_.out + (token * in_.heads + task.head * group_ + r % group_) * in_.head_dim;
      const float inverse = 1.0f / sums.sum[r];
      for (std::int64_t d = 0; d < in_.head_dim; ++d) out[d] = sums.acc[r * padded_ + d] * inverse;
    }
  }

  const KernelTable& table_;
  const AttentionInputs& in_;
  std::int64_t group_, padded_, parts_ = 0;  // parts_: of all tasks together
  std::vector<Task> tasks_;
  std::vector<float> memory_;
};

}  // namespace

void attend_slices(const KernelTable& table, const std::vector<Slice>& slices, const AttentionInputs& in) {
  Run(table, slices, in).run();
}

}  // namespace llmq
