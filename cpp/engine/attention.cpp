#include "engine/attention.h"

#include <algorithm>
#include <cmath>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

// Query rows of a task, at most (or the heads of one group, if there are more): their sums stay in a core's own cache.
constexpr std::int64_t kTaskRows = 24;
// A part of the keys below this many tokens is not worth a task of its own.
constexpr std::int64_t kPartTokens = 64;
constexpr std::int64_t kTasksPerThread = 2;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// `count` tokens of a slice from `token` on, all query heads of one key/value head, over one part of the keys.
struct Task {
  const Slice* slice;
  std::int64_t head, token, count;
  Range keys;
  std::int64_t part;  // index among the stored parts; -1: the only part of its rows
};

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
    parts_.resize(static_cast<std::size_t>(part_count_ * part_floats()));
    if (tasks_.size() == 1) return attend(tasks_[0]);
    parallel_for(static_cast<std::int64_t>(tasks_.size()), [&](std::int64_t i) noexcept { attend(tasks_[i]); });
    merge();
  }

 private:
  std::int64_t task_tokens() const { return std::max<std::int64_t>(1, kTaskRows / group_); }
  std::int64_t part_floats() const { return group_ * task_tokens() * (padded_ + 2); }

  Range visible(std::int64_t position) const {
    return {in_.window > 0 ? std::max<std::int64_t>(0, position - in_.window + 1) : 0, position + 1};
  }

  void plan(const std::vector<Slice>& slices) {
    std::int64_t whole = 0;
    for (const Slice& s : slices) whole += in_.kv_heads * ceil_div(s.count, task_tokens());
    const std::int64_t wanted = num_threads() > 1 ? ceil_div(kTasksPerThread * num_threads(), whole) : 1;
    for (const Slice& s : slices) {
      for (std::int64_t token = 0; token < s.count; token += task_tokens()) {
        const std::int64_t count = std::min(task_tokens(), s.count - token);
        const Range keys{visible(s.start + token).begin / kKeyTokens * kKeyTokens, s.start + token + count};
        add_parts(s, token, count, keys, wanted);
      }
    }
  }

  void add_parts(const Slice& s, std::int64_t token, std::int64_t count, Range keys, std::int64_t wanted) {
    const std::int64_t length = keys.end - keys.begin;
    const std::int64_t parts = std::clamp<std::int64_t>(length / kPartTokens, 1, wanted);
    const std::int64_t step = ceil_div(ceil_div(length, parts), kKeyTokens) * kKeyTokens;
    for (std::int64_t head = 0; head < in_.kv_heads; ++head) {
      const auto first = tasks_.size();
      for (std::int64_t k = keys.begin; k < keys.end; k += step) {
        tasks_.push_back({&s, head, token, count, {k, std::min(keys.end, k + step)}, -1});
      }
      if (tasks_.size() - first == 1) continue;
      merges_.push_back({first, tasks_.size()});
      for (auto i = first; i < tasks_.size(); ++i) tasks_[i].part = part_count_++;
    }
  }

  // Row r of a task is query head r % group of token r / group.
  float* output(const Task& task, std::int64_t row) const {
    const std::int64_t token = task.slice->first + task.token + row / group_;
    return in_.out + (token * in_.heads + task.head * group_ + row % group_) * in_.head_dim;
  }

  void attend(const Task& task) noexcept {
    static thread_local std::vector<float> scratch;
    static thread_local std::vector<const float*> q;
    static thread_local std::vector<Range> seen;
    const std::int64_t rows = task.count * group_;
    q.resize(static_cast<std::size_t>(rows));
    seen.resize(static_cast<std::size_t>(rows));
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t token = task.token + r / group_;
      q[r] = in_.q + (task.slice->first + token) * in_.q_stride + (task.head * group_ + r % group_) * in_.head_dim;
      seen[r] = visible(task.slice->start + token);
    }
    float* acc;
    if (task.part < 0) {
      scratch.resize(static_cast<std::size_t>(part_floats()));
      acc = scratch.data();
    } else {
      acc = parts_.data() + task.part * part_floats();
    }
    float* max = acc + rows * padded_;
    const AttendJob job{.kv = task.slice->sequence->view(in_.layer, task.head),
                        .q = q.data(),
                        .visible = seen.data(),
                        .rows = rows,
                        .tokens = task.keys,
                        .softcap = in_.softcap,
                        .acc = acc,
                        .max = max,
                        .sum = max + rows};
    table_.attend[in_.full_floats](job);
    if (task.part >= 0) return;
    for (std::int64_t r = 0; r < rows; ++r) {
      const float inverse = 1.0f / job.sum[r];
      float* out = output(task, r);
      for (std::int64_t d = 0; d < in_.head_dim; ++d) out[d] = acc[r * padded_ + d] * inverse;
    }
  }

  // Rows whose keys were seen in parts: weigh each part by exp(its max - the largest max).
  void merge() {
    for (const auto& [first, last] : merges_) {
      const Task& task = tasks_[first];
      const std::int64_t rows = task.count * group_;
      for (std::int64_t r = 0; r < rows; ++r) {
        float largest = -INFINITY, sum = 0.0f;
        for (auto i = first; i < last; ++i) largest = std::max(largest, part_max(tasks_[i], rows)[r]);
        float* out = output(task, r);
        std::fill_n(out, in_.head_dim, 0.0f);
        for (auto i = first; i < last; ++i) {
          const float* max = part_max(tasks_[i], rows);
          if (max[r] == -INFINITY) continue;  // this part was outside the row's window
          const float weight = std::exp(max[r] - largest);
          sum += weight * max[rows + r];
          const float* acc = parts_.data() + tasks_[i].part * part_floats() + r * padded_;
          for (std::int64_t d = 0; d < in_.head_dim; ++d) out[d] += weight * acc[d];
        }
        for (std::int64_t d = 0; d < in_.head_dim; ++d) out[d] /= sum;
      }
    }
  }

  const float* part_max(const Task& task, std::int64_t rows) const {
    return parts_.data() + task.part * part_floats() + rows * padded_;
  }

  const KernelTable& table_;
  const AttentionInputs& in_;
  std::int64_t group_, padded_, part_count_ = 0;
  std::vector<Task> tasks_;
  std::vector<std::pair<std::size_t, std::size_t>> merges_;  // ranges of tasks_
  std::vector<float> parts_;
};

}  // namespace

void attend_slices(const KernelTable& table, const std::vector<Slice>& slices, const AttentionInputs& in) {
  Run(table, slices, in).run();
}

}  // namespace llmq
