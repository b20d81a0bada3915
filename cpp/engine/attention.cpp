#include "engine/attention.h"

#include <algorithm>
#include <cmath>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

// Query rows of a task, at most (or the heads of one group, if there are more): their sums stay in a core's own cache.
constexpr std::int64_t kTaskRows = 24;
// Parts of kPartTokens keys are merged in their order to runs, and runs in theirs, whoever computes them: a row's
// result does not depend on the threads, nor on how many rows are computed together. The first run begins at token 0.
// Runs are what few rows share out: long enough for what they take besides their parts (the query's codes, a merge).
constexpr std::int64_t kRunTokens = 4 * kPartTokens;
constexpr std::int64_t kTasksPerThread = 2;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// `count` tokens of a slice from `token` on, all query heads of one key/value head.
struct Task {
  const Slice* slice;
  std::int64_t head, token, count;
  Range keys;            // begins at the start of a run
  std::int64_t run = 0;  // where its runs are stored, when they are tasks of their own
};

// Sums of some rows over some keys: acc f32[rows, width] = sum of exp(score - max) * value, not divided by `sum` yet,
// so that parts can be merged.
struct Sums {
  float *acc, *max, *sum;

  Sums(float* memory, std::int64_t rows, std::int64_t width)
      : acc(memory), max(memory + rows * width), sum(max + rows) {}
};

// The query rows of a task: row r is query head r % group of token r / group.
struct Rows {
  std::vector<const float*> q;
  std::vector<Range> visible;
  // As int8, for keys that are codes; with scales by column made anew for each page.
  std::vector<std::int8_t> codes;
  std::vector<float> scale;
  std::vector<std::int32_t> total;
  QuantizedRows quantized;
  std::vector<float> scores;
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
    if (num_threads() == 1 || count >= kTasksPerThread * num_threads() || runs_ == count) {
      parallel_for(count, [&](std::int64_t i) noexcept { attend(tasks_[i]); });
      return;
    }
    // Few rows, many keys: the runs are the tasks.
    memory_.resize(static_cast<std::size_t>(runs_ * floats()));
    std::vector<const Task*> owners;
    for (const Task& task : tasks_) owners.insert(owners.end(), static_cast<std::size_t>(run_count(task)), &task);
    parallel_for(runs_, [&](std::int64_t i) noexcept {
      const Task& task = *owners[i];
      const std::int64_t run = i - task.run;
      attend_run(task, rows_of(task), run, run_end(task, run), memory_.data() + i * floats(), scratch());
    });
    for (const Task& task : tasks_) {
      float* first = memory_.data() + task.run * floats();
      for (std::int64_t i = 1; i < run_count(task); ++i) add(task, first, first + i * floats());
      finish(task, first);
    }
  }

 private:
  std::int64_t task_tokens() const { return std::max<std::int64_t>(1, kTaskRows / group_); }
  std::int64_t floats() const { return group_ * task_tokens() * (padded_ + 2); }
  std::int64_t rows(const Task& task) const { return task.count * group_; }
  static std::int64_t run_end(const Task& task, std::int64_t run) {
    return std::min(task.keys.end, task.keys.begin + (run + 1) * kRunTokens);
  }
  static std::int64_t run_count(const Task& task) { return ceil_div(task.keys.end - task.keys.begin, kRunTokens); }

  Range visible(std::int64_t position) const {
    return {in_.window > 0 ? std::max<std::int64_t>(0, position - in_.window + 1) : 0, position + 1};
  }

  // The first token that a query at `position` sees as one of the recent ones, or in the page that is not full yet.
  static std::int64_t first_recent(const KvLayer& layer, std::int64_t position) {
    std::int64_t first = std::max<std::int64_t>(0, position + 1 - layer.shape.recent) / kKeyTokens * kKeyTokens;
    if (kv_by_column(layer.shape.keys)) first = std::min(first, (position + 1) / kColumnTokens * kColumnTokens);
    return std::max(first, layer.near->begin());
  }

  // Queries from `position` on that have the same first recent token.
  std::int64_t alike(const Slice& slice, std::int64_t position) const {
    const KvLayer& layer = slice.sequence->layer(in_.layer);
    if (!layer.near) return kChunkTokens;
    const std::int64_t beyond = position + 1 - layer.shape.recent;
    const std::int64_t recent = beyond < 0 ? kKeyTokens - beyond : kKeyTokens - beyond % kKeyTokens;
    const std::int64_t page = kColumnTokens - (position + 1) % kColumnTokens;
    return kv_by_column(layer.shape.keys) ? std::min(recent, page) : recent;
  }

  void plan(const std::vector<Slice>& slices) {
    for (const Slice& s : slices) {
      for (std::int64_t token = 0, count; token < s.count; token += count) {
        count = std::min({task_tokens(), s.count - token, alike(s, s.start + token)});
        const Range keys{visible(s.start + token).begin / kRunTokens * kRunTokens, s.start + token + count};
        for (std::int64_t head = 0; head < in_.kv_heads; ++head) {
          tasks_.push_back({&s, head, token, count, keys, runs_});
          runs_ += run_count(tasks_.back());
        }
      }
    }
  }

  // Room for the sums of two runs and a part, this thread's.
  float* scratch() const noexcept {
    static thread_local std::vector<float> kept;
    kept.resize(static_cast<std::size_t>(3 * floats()));
    return kept.data();
  }

  void attend(const Task& task) const noexcept {
    float *all = scratch(), *run = all + floats(), *part = run + floats();
    Rows& rows = rows_of(task);
    attend_run(task, rows, 0, task.keys.end, all, part);
    for (std::int64_t i = 1; i < run_count(task); ++i) {
      attend_run(task, rows, i, task.keys.end, run, part);
      add(task, all, run);
    }
    finish(task, all);
  }

  // Sums of one run of a task's keys into `memory`; `other` is room for a part's. This thread goes on up to token
  // `last`.
  void attend_run(const Task& task, Rows& rows, std::int64_t run, std::int64_t last, float* memory,
                  float* other) const noexcept {
    const std::int64_t end = run_end(task, run);
    // No row sees what lies before.
    std::int64_t at = std::max(task.keys.begin + run * kRunTokens, rows.visible[0].begin / kPartTokens * kPartTokens);
    attend_part(task, rows, at, last, memory);
    while ((at += kPartTokens) < end) {
      attend_part(task, rows, at, last, other);
      add(task, memory, other);
    }
  }

  // The query rows of a task, in memory of this thread.
  Rows& rows_of(const Task& task) const noexcept {
    static thread_local Rows kept;
    const auto count = static_cast<std::size_t>(rows(task));
    kept.q.resize(count);
    kept.visible.resize(count);
    kept.scores.resize(count * kPartTokens);
    for (std::int64_t r = 0; r < rows(task); ++r) {
      const std::int64_t token = task.token + r / group_;
      kept.q[r] = in_.q + (task.slice->first + token) * in_.q_stride + (task.head * group_ + r % group_) * in_.head_dim;
      kept.visible[r] = visible(task.slice->start + token);
    }
    const KvType type = task.slice->sequence->layer(in_.layer).stored.key_type();
    if (kv_is_code(type)) make_codes(kept, type);
    return kept;
  }

  void make_codes(Rows& rows, KvType type) const {
    const auto count = static_cast<std::int64_t>(rows.q.size());
    const std::int64_t stride = ceil_div(in_.head_dim, kVectorBytes) * kVectorBytes;
    const std::int64_t groups = ceil_div(in_.head_dim, kv_by_column(type) ? kColumnGroup : kKeyGroup);
    rows.codes.resize(static_cast<std::size_t>(count * stride));
    rows.scale.resize(static_cast<std::size_t>(count * groups));
    rows.total.resize(static_cast<std::size_t>(count * groups));
    rows.quantized = {rows.codes.data(), rows.scale.data(), rows.total.data(), stride, groups};
    for (std::int64_t r = 0; r < count && !kv_by_column(type); ++r) {
      const QuantizedRows row{.q = rows.codes.data() + r * stride,
                              .scale = rows.scale.data() + r * groups,
                              .total = rows.total.data() + r * groups,
                              .stride = stride,
                              .groups = groups};
      table_.quantize_rows(rows.q[r], {0, 1}, in_.head_dim, kKeyGroup, row);
    }
  }

  // Where the keys and values of a task's tokens are read, in ascending order.
  struct Span {
    const KvPages* pages;
    Range tokens;
  };
  struct Spans {
    Span span[3];
    int count = 0;

    void add(const KvPages& pages, std::int64_t begin, std::int64_t end) {
      if (begin < end) span[count++] = {&pages, {begin, end}};
    }
  };

  Spans spans(const Task& task, Range tokens) const {
    const KvLayer& layer = task.slice->sequence->layer(in_.layer);
    Spans spans;
    if (!layer.near) {
      spans.add(layer.stored, tokens.begin, tokens.end);
      return spans;
    }
    const std::int64_t sinks = std::clamp(layer.near->fixed(), tokens.begin, tokens.end);
    const std::int64_t recent = std::clamp(first_recent(layer, task.slice->start + task.token), sinks, tokens.end);
    spans.add(*layer.near, tokens.begin, sinks);
    spans.add(layer.stored, sinks, recent);
    spans.add(*layer.near, recent, tokens.end);
    return spans;
  }

  // Those of `spans` that lie in `pages`, to be read soon.
  static Ahead ahead(const Spans& spans, const KvPages& pages, KvRows rows) {
    for (int i = 0; i < spans.count; ++i) {
      if (spans.span[i].pages == &pages) return {.rows = rows, .tokens = spans.span[i].tokens};
    }
    return {.rows = rows, .tokens = {0, 0}};
  }

  // Tokens of the part that begins at `begin`, none if that is behind `last`.
  static Range part_tokens(const Rows& rows, std::int64_t begin, std::int64_t last) {
    begin = std::min(begin, last);
    return {std::max(begin, rows.visible[0].begin / kKeyTokens * kKeyTokens), std::min(last, begin + kPartTokens)};
  }

  // Sums of the part that begins at token `begin` into `memory`.
  void attend_part(const Task& task, Rows& rows, std::int64_t begin, std::int64_t last, float* memory) const noexcept {
    const auto count = static_cast<std::int64_t>(rows.q.size());
    const Range tokens = part_tokens(rows, begin, last);
    const Sums sums(memory, count, padded_);
    float* scores = rows.scores.data();
    const Spans read = spans(task, tokens);
    const Spans next = spans(task, part_tokens(rows, begin + kPartTokens, last));
    const auto scores_from = [&](const Span& span) { return scores + (span.tokens.begin - tokens.begin) * count; };
    for (int i = 0; i < read.count; ++i) {
      const KvPages& pages = *read.span[i].pages;
      table_.key_scores[pages.key_type()]({.keys = pages.keys(task.head),
                                           .tokens = read.span[i].tokens,
                                           .q = rows.q.data(),
                                           .codes = rows.quantized,
                                           .rows = count,
                                           .out = scores_from(read.span[i]),
                                           .ahead = ahead(read, pages, pages.values(task.head))});
    }
    // The next part's keys come while the weights are made, and the rest of them while the values are summed.
    const KvPages& stored = task.slice->sequence->layer(in_.layer).stored;
    const Ahead keys = ahead(next, stored, stored.keys(task.head));
    const std::int64_t half = keys.tokens.begin + (keys.tokens.end - keys.tokens.begin) / (3 * kKeyTokens) * kKeyTokens;
    table_.softmax({.tokens = tokens,
                    .visible = rows.visible.data(),
                    .rows = count,
                    .softcap = in_.softcap,
                    .scores = scores,
                    .max = sums.max,
                    .sum = sums.sum,
                    .ahead = {.rows = keys.rows, .tokens = {keys.tokens.begin, half}}});
    std::fill_n(sums.acc, count * padded_, 0.0f);
    for (int i = 0; i < read.count; ++i) {
      const KvPages& pages = *read.span[i].pages;
      table_.sum_values[pages.value_type()](
          {.values = pages.values(task.head),
           .tokens = read.span[i].tokens,
           .weights = scores_from(read.span[i]),
           .rows = count,
           .acc = sums.acc,
           .ahead = {.rows = keys.rows, .tokens = {half, &pages == &stored ? keys.tokens.end : half}}});
    }
  }

  void add(const Task& task, float* all, float* part) const {
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
  std::int64_t group_, padded_, runs_ = 0;  // runs_: of all tasks together
  std::vector<Task> tasks_;
  std::vector<float> memory_;
};

}  // namespace

void attend_slices(const KernelTable& table, const std::vector<Slice>& slices, const AttentionInputs& in) {
  Run(table, slices, in).run();
}

void attend_last(const KernelTable& table, const KvLayerShape& layer, const float* keys, const float* values,
                 std::int64_t length, std::int64_t count, AttentionInputs in) {
  Sequence sequence({.heads = in.kv_heads, .head_dim = in.head_dim, .layers = {layer}});
  for (std::int64_t start = 0, n; start < length; start += n) {
    const bool seen = start >= length - count;
    n = std::min(kChunkTokens, (seen ? length : length - count) - start);
    sequence.reserve(n);
    sequence.slide(start, n);
    for (std::int64_t t = start; t < start + n; ++t) {
      const std::int64_t at = t * in.kv_heads * in.head_dim;
      sequence.append(table, 0, t, keys + at, values + at);
    }
    sequence.fill_pages(table, 0, start, n);
    if (seen) {
      attend_slices(table, {{.sequence = &sequence, .first = 0, .count = n, .start = start}}, in);
      in.q += n * in.q_stride;
      in.out += n * in.heads * in.head_dim;
    }
    sequence.grow(start + n);
  }
}

}  // namespace llmq
