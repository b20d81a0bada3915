// Attention of some query rows over the cached keys and values of one key/value head (layout: KvView in
// kernel_table.h). Included inside an anonymous namespace, once an ISA.
//
// A lane is a token for the scores and a column of the head for the values, so no sum crosses lanes. Softmax is the
// online form (Milakov and Gimelshein 2018, arXiv 1805.02867): acc and sum are rescaled when a larger score turns up.

constexpr float kMinusInfinity = -__builtin_inff();

template <class Isa>
LLMQ_INLINE typename Isa::Floats load_kv(const std::uint16_t* p) {
  return Isa::halves_to_floats(p);
}
template <class Isa>
LLMQ_INLINE typename Isa::Floats load_kv(const float* p) {
  return Isa::load(p);
}

template <class Isa>
LLMQ_INLINE void store_kv(std::uint16_t* p, typename Isa::Floats a) {
  Isa::store_halves(p, a);
}
template <class Isa>
LLMQ_INLINE void store_kv(float* p, typename Isa::Floats a) {
  Isa::store(p, a);
}

template <class Kv>
LLMQ_INLINE Kv* keys_of(const KvView& kv, std::int64_t token) {
  auto* page = static_cast<Kv*>(kv.pages[token / kPageTokens]) + kv.head * kv.head_stride;
  return page + token % kPageTokens / kKeyTokens * (kKeyTokens * kv.head_dim);
}
template <class Kv>
LLMQ_INLINE Kv* values_of(const KvView& kv, std::int64_t token) {
  auto* page = static_cast<Kv*>(kv.pages[token / kPageTokens]) + kv.head * kv.head_stride;
  return page + kPageTokens * kv.head_dim + token % kPageTokens * kv.padded_dim;
}

// Store key and value f32[head_dim] of one token.
template <class Isa, class Kv>
void append_kv(const KvView& kv, std::int64_t token, const float* key, const float* value) {
  constexpr int kLanes = Isa::kRows;
  Kv* keys = keys_of<Kv>(kv, token) + token % kKeyTokens;
  Kv* values = values_of<Kv>(kv, token);
  float padded[kLanes];
  Kv converted[kLanes];
  for (std::int64_t d = 0; d < kv.padded_dim; d += kLanes) {
    const std::int64_t left = kv.head_dim - d;
    const int n = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
    for (int i = 0; i < kLanes; ++i) padded[i] = i < n ? value[d + i] : 0.0f;
    store_kv<Isa>(values + d, Isa::load(padded));
    for (int i = 0; i < kLanes; ++i) padded[i] = i < n ? key[d + i] : 0.0f;
    store_kv<Isa>(converted, Isa::load(padded));
    for (int i = 0; i < n; ++i) keys[(d + i) * kKeyTokens] = converted[i];
  }
}

// scores[r][16] = q_r . K of one block of 16 tokens, for kRows query rows.
template <class Isa, class Kv, int kRows>
LLMQ_INLINE void score_rows(const Kv* keys, std::int64_t head_dim, const float* const* q, float* scores) {
  constexpr int kVectors = kKeyTokens / Isa::kRows;
  typename Isa::Floats sum[kRows][kVectors];
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::set_floats(0.0f);
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    typename Isa::Floats key[kVectors];
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) key[v] = load_kv<Isa>(keys + d * kKeyTokens + v * Isa::kRows);
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto x = Isa::set_floats(q[r][d]);
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::fma(x, key[v], sum[r][v]);
    }
  }
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) Isa::store(scores + r * kKeyTokens + v * Isa::kRows, sum[r][v]);
  }
}

// acc[r] += sum over the block's tokens of p[r][t] * V[t], for kRows query rows.
template <class Isa, class Kv, int kRows>
LLMQ_INLINE void add_values(const Kv* values, std::int64_t padded_dim, const float* p, float* acc) {
  constexpr int kVectors = kHeadPadding / Isa::kRows;
  for (std::int64_t d = 0; d < padded_dim; d += kHeadPadding) {
    typename Isa::Floats sum[kRows][kVectors];
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::load(acc + r * padded_dim + d + v * Isa::kRows);
    }
    for (int t = 0; t < kKeyTokens; ++t) {
      typename Isa::Floats value[kVectors];
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) value[v] = load_kv<Isa>(values + t * padded_dim + d + v * Isa::kRows);
      LLMQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const auto x = Isa::set_floats(p[r * kKeyTokens + t]);
        LLMQ_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::fma(x, value[v], sum[r][v]);
      }
    }
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) Isa::store(acc + r * padded_dim + d + v * Isa::kRows, sum[r][v]);
    }
  }
}

// Turn the scores of one row over 16 tokens into weights exp(score - max) and rescale what was summed before. False:
// the row sees none of these tokens.
LLMQ_INLINE bool soften_row(const AttendJob& job, std::int64_t row, std::int64_t token, float* s) {
  const std::int64_t from = job.visible[row].begin - token, to = job.visible[row].end - token;
  if (from >= kKeyTokens || to <= 0) {
    for (int i = 0; i < kKeyTokens; ++i) s[i] = 0.0f;
    return false;
  }
  if (job.softcap > 0.0f) softcap(s, kKeyTokens, job.softcap);
  float largest = job.max[row];
  for (int i = 0; i < kKeyTokens; ++i) {
    s[i] = i >= from && i < to ? s[i] : kMinusInfinity;
    largest = s[i] > largest ? s[i] : largest;
  }
  if (largest > job.max[row]) {
    const float shrink = job.sum[row] > 0.0f ? fast_exp(job.max[row] - largest) : 0.0f;
    job.sum[row] *= shrink;
    float* acc = job.acc + row * job.kv.padded_dim;
    for (std::int64_t d = 0; d < job.kv.padded_dim; ++d) acc[d] *= shrink;
    job.max[row] = largest;
  }
  float sum = 0.0f;
  for (int i = 0; i < kKeyTokens; ++i) {
    const float e = fast_exp(s[i] - largest);
    s[i] = s[i] == kMinusInfinity ? 0.0f : e;
  }
  for (int i = 0; i < kKeyTokens; ++i) sum += s[i];
  job.sum[row] += sum;
  return true;
}

template <class Isa, class Kv, int kRows>
LLMQ_INLINE void attend_rows(const AttendJob& job, std::int64_t row, std::int64_t token) {
  float weights[kRows * kKeyTokens];
  score_rows<Isa, Kv, kRows>(keys_of<Kv>(job.kv, token), job.kv.head_dim, job.q + row, weights);
  bool any = false;
  for (int r = 0; r < kRows; ++r) any |= soften_row(job, row + r, token, weights + r * kKeyTokens);
  if (any) {
    add_values<Isa, Kv, kRows>(values_of<Kv>(job.kv, token), job.kv.padded_dim, weights,
                               job.acc + row * job.kv.padded_dim);
  }
}

// The rows that do not fill a tile: one tile of exactly as many.
template <class Isa, class Kv, int kRows>
LLMQ_INLINE void attend_remainder(const AttendJob& job, std::int64_t row, std::int64_t token) {
  if (job.rows - row == kRows) {
    attend_rows<Isa, Kv, kRows>(job, row, token);
  } else if constexpr (kRows > 1) {
    attend_remainder<Isa, Kv, kRows - 1>(job, row, token);
  }
}

template <class Isa, class Kv>
void attend(const AttendJob& job) {
  // 6 rows x 16 tokens: 12 sums of 8 floats, two keys and a query fill 16 registers.
  constexpr int kTile = Isa::kRows >= 8 ? 6 : 2;
  for (std::int64_t r = 0; r < job.rows; ++r) {
    job.max[r] = kMinusInfinity;
    job.sum[r] = 0.0f;
  }
  for (std::int64_t i = 0; i < job.rows * job.kv.padded_dim; ++i) job.acc[i] = 0.0f;
  for (std::int64_t token = job.tokens.begin / kKeyTokens * kKeyTokens; token < job.tokens.end; token += kKeyTokens) {
    std::int64_t row = 0;
    for (; row + kTile <= job.rows; row += kTile) attend_rows<Isa, Kv, kTile>(job, row, token);
    if (row < job.rows) attend_remainder<Isa, Kv, kTile - 1>(job, row, token);
  }
}
