#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "engine/attention.h"
#include "engine/input_buffer.h"
#include "engine/thread_pool.h"

namespace llmq {
namespace {

// Rows of gate and up that a task turns into int8 at once: a multiple of every kernel group, or the whole row.
constexpr std::int64_t kFfnRows = 128;
// Floats below which a row-wise pass stays in the calling thread.
constexpr std::int64_t kAloneFloats = 1 << 14;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// f(row) for rows 0 .. m - 1 of `width` floats each.
template <class F>
void for_rows(std::int64_t m, std::int64_t width, const F& f) {
  if (m * width < kAloneFloats || num_threads() == 1) {
    for (std::int64_t row = 0; row < m; ++row) f(row);
    return;
  }
  const std::int64_t chunk = std::max<std::int64_t>(1, ceil_div(m, num_threads() * 4));
  parallel_for(ceil_div(m, chunk), [&](std::int64_t c) noexcept {
    for (std::int64_t row = c * chunk; row < std::min(m, (c + 1) * chunk); ++row) f(row);
  });
}

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

void require_shape(const Matrix& w, const std::string& name, std::int64_t n, std::int64_t k) {
  require(w.n == n && w.k == k, name + " is " + std::to_string(w.n) + " x " + std::to_string(w.k) +
                                    "; the decoder needs " + std::to_string(n) + " x " + std::to_string(k));
}

}  // namespace

struct Decoder::Chunk {
  std::vector<Slice> slices;
  std::vector<std::int64_t> ids;
  std::vector<std::int64_t> keep;  // rows whose final states are wanted
  Output output;
  bool float_activations;
  float* out;  // of the first row in keep

  std::int64_t size() const { return static_cast<std::int64_t>(ids.size()); }
};

struct Decoder::Workspace {
  std::int64_t rows = 0;       // of x: the chunk's tokens, in the end only those that are kept
  std::vector<float> x;        // residual stream
  std::vector<float> qkv;      // [rows, (heads + 2 kv_heads) * head_dim]
  std::vector<float> product;  // [rows, hidden]: what a block half adds to the stream
  std::vector<float> angles;   // [ropes][rows][2][head_dim / 2]: cos, sin
  std::vector<float> low;      // A x of the adapters of gate and up
  InputBuffer normed, attended, activated;
};

Decoder::Decoder(DecoderSpec spec) : spec_(std::move(spec)) {
  const std::int64_t h = spec_.hidden, d = spec_.head_dim;
  require(h > 0 && d > 0 && d % 2 == 0 && spec_.kv_heads > 0 && spec_.heads % spec_.kv_heads == 0,
          "heads " + std::to_string(spec_.heads) + ", key/value heads " + std::to_string(spec_.kv_heads) +
              ", head_dim " + std::to_string(d) + ": heads must be a multiple of key/value heads, head_dim even");
  require_shape(spec_.embedding, "the embedding", spec_.embedding.n, h);
  require_shape(spec_.head, "the head", spec_.embedding.n, h);
  for (std::size_t i = 0; i < spec_.layers.size(); ++i) {
    const DecoderLayer& l = spec_.layers[i];
    const std::string at = "layer " + std::to_string(i) + " ";
    require_shape(l.q, at + "q", spec_.heads * d, h);
    require_shape(l.k, at + "k", spec_.kv_heads * d, h);
    require_shape(l.v, at + "v", spec_.kv_heads * d, h);
    require_shape(l.o, at + "o", h, spec_.heads * d);
    require_shape(l.up, at + "up", l.gate.n, h);
    require_shape(l.gate, at + "gate", l.gate.n, h);
    require_shape(l.down, at + "down", h, l.gate.n);
    require(l.rope >= 0 && l.rope < static_cast<std::int64_t>(spec_.ropes.size()),
            at + "names a rope that is not there");
  }
  for (const Rope& r : spec_.ropes) {
    require(static_cast<std::int64_t>(r.inverse_frequency.size()) * 2 == d,
            "a rope has " + std::to_string(r.inverse_frequency.size()) + " frequencies; head_dim " + std::to_string(d) +
                " needs half as many as columns");
  }
}

KvShape Decoder::kv_shape(std::vector<KvLayerShape> layers) const {
  require(layers.size() == spec_.layers.size(), "types of keys and values are given for " +
                                                    std::to_string(layers.size()) + " layers; the model has " +
                                                    std::to_string(spec_.layers.size()));
  for (std::size_t i = 0; i < layers.size(); ++i) layers[i].window = spec_.layers[i].window;
  return {.heads = spec_.kv_heads, .head_dim = spec_.head_dim, .layers = std::move(layers)};
}

void Decoder::check(const Step& step) const {
  require(!step.sequences.empty(), "no sequence was given; a step needs at least one");
  std::set<const Sequence*> seen;
  const std::int64_t* id = step.ids;
  for (std::size_t i = 0; i < step.sequences.size(); ++i) {
    const Sequence& s = *step.sequences[i];
    const std::string at = "sequence " + std::to_string(i);
    require(seen.insert(&s).second, at + " is given twice");
    const KvShape& shape = s.shape();
    require(
        shape.layers.size() == spec_.layers.size() && shape.heads == spec_.kv_heads && shape.head_dim == spec_.head_dim,
        at + " belongs to another model");
    require(step.counts[i] > 0, at + " gets no token; a prompt needs at least one");
    const std::int64_t length = s.length() + step.counts[i];
    require(length <= spec_.max_positions, at + " would hold " + std::to_string(length) +
                                               " tokens; the model's context is " +
                                               std::to_string(spec_.max_positions) + ": shorten the prompt");
    for (std::int64_t t = 0; t < step.counts[i]; ++t, ++id) {
      require(*id >= 0 && *id < spec_.embedding.n,
              "token id " + std::to_string(*id) + " at position " + std::to_string(t) + " of " + at +
                  " is outside the vocabulary of " + std::to_string(spec_.embedding.n));
    }
  }
}

void Decoder::forward(const KernelTable& table, const Step& step) const {
  require(!step.sequences.empty(), "no sequence was given; a step needs at least one");
  std::vector<std::unique_lock<std::mutex>> locks;
  for (Sequence* s : step.sequences) {
    locks.push_back(s->lock());
  }
  check(step);
  for (std::size_t i = 0; i < step.sequences.size(); ++i) {
    step.sequences[i]->reserve(step.counts[i]);
  }
  static thread_local Workspace work;
  const std::int64_t width = step.output == Output::kStates ? spec_.hidden : spec_.head.n;
  Chunk chunk{.slices = {},
              .ids = {},
              .keep = {},
              .output = step.output,
              .float_activations = step.float_activations,
              .out = step.out};
  const auto flush = [&] {
    if (chunk.size() == 0) return;
    for (const Slice& s : chunk.slices) s.sequence->slide(s.start, s.count);
    run(table, chunk, work);
    chunk.out += static_cast<std::int64_t>(chunk.keep.size()) * width;
    chunk.slices.clear(), chunk.ids.clear(), chunk.keep.clear();
  };
  const std::int64_t* id = step.ids;
  for (std::size_t i = 0; i < step.sequences.size(); ++i) {
    for (std::int64_t done = 0; done < step.counts[i];) {
      const std::int64_t count = std::min(step.counts[i] - done, kChunkTokens - chunk.size());
      chunk.slices.push_back({step.sequences[i], chunk.size(), count, step.sequences[i]->length() + done});
      for (std::int64_t t = 0; t < count; ++t, ++done) {
        if (step.output != Output::kLast || done + 1 == step.counts[i]) chunk.keep.push_back(chunk.size());
        chunk.ids.push_back(*id++);
      }
      if (chunk.size() == kChunkTokens) flush();
    }
  }
  flush();
  for (std::size_t i = 0; i < step.sequences.size(); ++i) {
    step.sequences[i]->grow(step.sequences[i]->length() + step.counts[i]);
  }
}

void Decoder::run(const KernelTable& table, const Chunk& chunk, Workspace& work) const {
  embed(table, chunk, work);
  const auto layers = static_cast<std::int64_t>(spec_.layers.size());
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    attention(table, chunk, layer, work);
    // Behind the last layer's cache nobody needs the other tokens any more.
    if (layer + 1 == layers) keep_outputs(chunk, work);
    if (work.rows > 0) feed_forward(table, chunk, layer, work);
  }
  if (work.rows == 0) return;
  const std::int64_t h = spec_.hidden;
  float* states = chunk.output == Output::kStates ? chunk.out : work.product.data();
  for_rows(work.rows, h, [&](std::int64_t r) noexcept {
    table.rms_norm(work.x.data() + r * h, spec_.final_norm, spec_.eps, h, states + r * h);
  });
  if (chunk.output != Output::kStates) logits(table, states, work.rows, chunk.float_activations, chunk.out);
}

void Decoder::embed(const KernelTable& table, const Chunk& chunk, Workspace& work) const {
  const std::int64_t h = spec_.hidden, half = spec_.head_dim / 2, n = chunk.size();
  const auto ropes = static_cast<std::int64_t>(spec_.ropes.size());
  work.rows = n;
  work.x.resize(static_cast<std::size_t>(n * h));
  work.product.resize(static_cast<std::size_t>(n * h));
  work.qkv.resize(static_cast<std::size_t>(n * (spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim));
  work.angles.resize(static_cast<std::size_t>(ropes * n * 2 * half));
  for (const Slice& s : chunk.slices) {
    for_rows(s.count, h, [&](std::int64_t t) noexcept {
      const std::int64_t row = s.first + t;
      float* x = work.x.data() + row * h;
      take_row(table, spec_.embedding, chunk.ids[row], x);
      for (std::int64_t i = 0; i < h; ++i) x[i] *= spec_.embedding_scale;
      const auto position = static_cast<float>(s.start + t);
      for (std::int64_t kind = 0; kind < ropes; ++kind) {
        const Rope& rope = spec_.ropes[kind];
        float* angles = work.angles.data() + (kind * n + row) * 2 * half;
        for (std::int64_t i = 0; i < half; ++i) {
          const float angle = position * rope.inverse_frequency[i];
          angles[i] = std::cos(angle) * rope.scaling;
          angles[half + i] = std::sin(angle) * rope.scaling;
        }
      }
    });
  }
}

void Decoder::attention(const KernelTable& table, const Chunk& chunk, std::int64_t layer, Workspace& work) const {
  const DecoderLayer& l = spec_.layers[layer];
  const std::int64_t h = spec_.hidden, d = spec_.head_dim, n = work.rows;
  const std::int64_t stride = (spec_.heads + 2 * spec_.kv_heads) * d;
  const Inputs& in = work.normed.prepare(n, h, {&l.q, &l.k, &l.v}, chunk.float_activations);
  for_rows(n, h, [&](std::int64_t r) noexcept {
    table.rms_norm(work.x.data() + r * h, l.attention_norm, spec_.eps, h, work.normed.row(r));
    work.normed.finish_row(table, r, l.qkv_order);
  });
  float* qkv = work.qkv.data();
  multiply(table, in,
           {{&l.q, qkv, stride},
            {&l.k, qkv + spec_.heads * d, stride},
            {&l.v, qkv + (spec_.heads + spec_.kv_heads) * d, stride}},
           chunk.float_activations);
  store_keys(table, chunk, layer, work);

  const Inputs& attended = work.attended.prepare(n, spec_.heads * d, {&l.o}, chunk.float_activations);
  attend_slices(table, chunk.slices,
                {.layer = layer,
                 .heads = spec_.heads,
                 .kv_heads = spec_.kv_heads,
                 .head_dim = d,
                 .window = l.window,
                 .softcap = spec_.attention_softcap,
                 .q = qkv,
                 .q_stride = stride,
                 .out = work.attended.row(0)});
  for_rows(n, spec_.heads * d, [&](std::int64_t r) noexcept { work.attended.finish_row(table, r, l.o_order); });
  multiply(table, attended, {{&l.o, work.product.data(), h}}, chunk.float_activations);
}

// Norm and rotate queries and keys, put keys and values into the cache.
void Decoder::store_keys(const KernelTable& table, const Chunk& chunk, std::int64_t layer, Workspace& work) const {
  const DecoderLayer& l = spec_.layers[layer];
  const std::int64_t d = spec_.head_dim, half = d / 2, n = chunk.size();
  const std::int64_t stride = (spec_.heads + 2 * spec_.kv_heads) * d;
  const auto turn = [&](float* x, const float* norm, const float* angles, float scale) {
    if (norm) table.rms_norm(x, norm, spec_.eps, d, x);
    table.rope(x, angles, angles + half, half, scale);
  };
  for (const Slice& s : chunk.slices) {
    const bool rotate = s.sequence->layer(layer).shape.rotate;
    for_rows(s.count, stride, [&](std::int64_t t) noexcept {
      float* q = work.qkv.data() + (s.first + t) * stride;
      const float* angles = work.angles.data() + (l.rope * n + s.first + t) * 2 * half;
      for (std::int64_t i = 0; i < spec_.heads; ++i) turn(q + i * d, l.q_norm, angles, spec_.attention_scale);
      float* keys = q + spec_.heads * d;
      for (std::int64_t i = 0; i < spec_.kv_heads; ++i) turn(keys + i * d, l.k_norm, angles, 1.0f);
      if (rotate) {
        for (std::int64_t i = 0; i < spec_.heads + spec_.kv_heads; ++i) table.hadamard(q + i * d, d);
      }
      s.sequence->append(table, layer, s.start + t, keys, keys + spec_.kv_heads * d);
    });
    s.sequence->fill_pages(table, layer, s.start, s.count);
  }
}

// Leave only the rows in chunk.keep; they are in ascending order.
void Decoder::keep_outputs(const Chunk& chunk, Workspace& work) const {
  const std::int64_t h = spec_.hidden;
  work.rows = static_cast<std::int64_t>(chunk.keep.size());
  if (work.rows == chunk.size()) return;
  for (std::int64_t r = 0; r < work.rows; ++r) {
    std::copy_n(work.x.data() + chunk.keep[r] * h, h, work.x.data() + r * h);
    std::copy_n(work.product.data() + chunk.keep[r] * h, h, work.product.data() + r * h);
  }
}

void Decoder::feed_forward(const KernelTable& table, const Chunk& chunk, std::int64_t layer, Workspace& work) const {
  const DecoderLayer& l = spec_.layers[layer];
  const bool floats = chunk.float_activations;
  const std::int64_t h = spec_.hidden, n = work.rows, width = l.gate.n;
  float* product = work.product.data();
  const auto add_product = [&](std::int64_t r, const float* post_norm) {
    float* y = product + r * h;
    if (post_norm) table.rms_norm(y, post_norm, spec_.eps, h, y);
    table.add_rows(work.x.data() + r * h, y, h);
  };
  const Inputs& in = work.normed.prepare(n, h, {&l.gate, &l.up}, floats);
  for_rows(n, h, [&](std::int64_t r) noexcept {
    add_product(r, l.attention_post_norm);
    table.rms_norm(work.x.data() + r * h, l.ffn_norm, spec_.eps, h, work.normed.row(r));
    work.normed.finish_row(table, r, l.ffn_order);
  });

  const Inputs& mid = work.activated.prepare(n, width, {&l.down}, floats);
  const std::int64_t tokens = token_block(n, h + 2 * 4 * kFfnRows), token_blocks = ceil_div(n, tokens);
  const std::int64_t row_blocks = ceil_div(width, kFfnRows);
  std::vector<Product> halves{{&l.gate, nullptr, kFfnRows}, {&l.up, nullptr, kFfnRows}};
  low_products(table, in, halves, work.low);
  // With an order of its own a group of the down projection is spread over all columns: int8 has to wait for them.
  const bool quantize_later = l.down_order != nullptr;
  const bool keep_floats = mid.count == 0 || l.down.adapter.rank > 0 || quantize_later;
  parallel_for(row_blocks * token_blocks, [&](std::int64_t c) noexcept {
    static thread_local std::vector<float> gate, up;
    const std::int64_t first = c % row_blocks * kFfnRows, rows = std::min(kFfnRows, width - first);
    const std::int64_t t0 = c / row_blocks * tokens, count = std::min(tokens, n - t0);
    gate.resize(static_cast<std::size_t>(tokens * kFfnRows));
    up.resize(static_cast<std::size_t>(tokens * kFfnRows));
    const Matrix gate_part = l.gate.slice(first, rows), up_part = l.up.slice(first, rows);
    const Inputs part = in.slice(t0, count);
    const Range panels{0, ceil_div(rows, kPanelRows)};
    const Product gate_job{&gate_part, gate.data(), kFfnRows, halves[0].low_from(t0)};
    const Product up_job{&up_part, up.data(), kFfnRows, halves[1].low_from(t0)};
    multiply_panels(table, part, gate_job, panels, {0, count}, floats);
    multiply_panels(table, part, up_job, panels, {0, count}, floats);
    for (std::int64_t t = 0; t < count; ++t) {
      float* y = gate.data() + t * kFfnRows;
      table.gated[spec_.activation](y, up.data() + t * kFfnRows, rows, y);
      if (keep_floats) std::copy_n(y, rows, work.activated.row(t0 + t) + first);
      for (int i = 0; i < (quantize_later ? 0 : mid.count); ++i) {
        const QuantizedRows& q = mid.quantized[i];
        for (std::int64_t column = 0; column < rows; column += mid.width[i]) {
          const std::int64_t at = (t0 + t) * q.groups + (first + column) / mid.width[i];
          const auto columns = static_cast<int>(std::min(mid.width[i], rows - column));
          table.quantize_group(y + column, columns, q.q + (t0 + t) * q.stride + first + column, q.scale + at,
                               q.total + at);
        }
      }
    }
  });
  if (quantize_later) {
    for_rows(n, width, [&](std::int64_t r) noexcept { work.activated.finish_row(table, r, l.down_order); });
  }
  multiply(table, mid, {{&l.down, product, h}}, floats);
  for_rows(n, h, [&](std::int64_t r) noexcept { add_product(r, l.ffn_post_norm); });
}

void Decoder::logits(const KernelTable& table, const float* states, std::int64_t rows, bool float_activations,
                     float* out) const {
  static thread_local InputBuffer own;
  InputBuffer& buffer = own;  // by reference: the lambda below runs in threads that have an `own` of their own
  const std::int64_t h = spec_.hidden, vocabulary = spec_.head.n;
  const Inputs& in = buffer.prepare(rows, h, {&spec_.head}, float_activations);
  for_rows(rows, h, [&](std::int64_t r) noexcept {
    std::copy_n(states + r * h, h, buffer.row(r));
    buffer.finish_row(table, r);
  });
  multiply(table, in, {{&spec_.head, out, vocabulary}}, float_activations);
  if (spec_.final_softcap > 0.0f) {
    constexpr std::int64_t kPiece = 1 << 14;
    const std::int64_t all = rows * vocabulary;
    parallel_for(ceil_div(all, kPiece), [&](std::int64_t c) noexcept {
      table.softcap(out + c * kPiece, std::min(kPiece, all - c * kPiece), spec_.final_softcap);
    });
  }
}

}  // namespace llmq
