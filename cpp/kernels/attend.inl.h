// Attention of some query rows over the cached keys and values of one key/value head (layout: KvRows in
// kernel_table.h), a part of kPartTokens tokens at a time: scores, softmax, weighted sum. Here for elements of f16 and
// f32; attend_codes.inl.h for codes. Included inside an anonymous namespace, once an ISA.
//
// A lane is a token for the scores and a column of the head for the values, so no sum crosses lanes.

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

LLMQ_INLINE std::uint8_t* page_of(const KvRows& rows, std::int64_t token) {
  return static_cast<std::uint8_t*>(rows.pages[token >> rows.page_shift]);
}
template <class Kv>
LLMQ_INLINE Kv* keys_of(const KvRows& keys, std::int64_t token) {
  return reinterpret_cast<Kv*>(page_of(keys, token) + keys.data) +
         keys.slot(token) / kKeyTokens * (kKeyTokens * keys.dim);
}
template <class Kv>
LLMQ_INLINE Kv* values_of(const KvRows& values, std::int64_t token) {
  return reinterpret_cast<Kv*>(page_of(values, token) + values.data) + values.slot(token) * values.padded;
}

LLMQ_INLINE int lesser(std::int64_t left, int most) { return left < most ? static_cast<int>(left) : most; }

// The n <= Isa::kRows floats of x as elements, the rest 0.
template <class Isa, class Kv>
LLMQ_INLINE void convert_lanes(const float* x, int n, Kv* out) {
  float padded[Isa::kRows];
  for (int i = 0; i < Isa::kRows; ++i) padded[i] = i < n ? x[i] : 0.0f;
  store_kv<Isa>(out, Isa::load(padded));
}

template <class Isa, class Kv>
void append_key(const KvRows& keys, std::int64_t token, const float* key) {
  Kv* to = keys_of<Kv>(keys, token) + token % kKeyTokens;
  Kv converted[Isa::kRows];
  for (std::int64_t d = 0; d < keys.dim; d += Isa::kRows) {
    const int n = lesser(keys.dim - d, Isa::kRows);
    convert_lanes<Isa>(key + d, n, converted);
    for (int i = 0; i < n; ++i) to[(d + i) * kKeyTokens] = converted[i];
  }
}

template <class Isa, class Kv>
void append_value(const KvRows& values, std::int64_t token, const float* value) {
  Kv* to = values_of<Kv>(values, token);
  for (std::int64_t d = 0; d < values.padded; d += Isa::kRows) {
    convert_lanes<Isa>(value + d, lesser(values.dim - d, Isa::kRows), to + d);
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

// f<n>(row) for tiles of n = kTile rows, and once for the rows that do not fill one.
template <int kTile, class F>
LLMQ_INLINE void for_last_rows(std::int64_t row, std::int64_t rows, const F& f) {
  if (rows - row == kTile) {
    f.template operator()<kTile>(row);
  } else if constexpr (kTile > 1) {
    for_last_rows<kTile - 1>(row, rows, f);
  }
}
template <int kTile, class F>
LLMQ_INLINE void for_row_tiles(std::int64_t rows, const F& f) {
  std::int64_t row = 0;
  for (; row + kTile <= rows; row += kTile) f.template operator()<kTile>(row);
  if (row < rows) for_last_rows<kTile - 1>(row, rows, f);
}

// 6 rows x 16 lanes: 12 sums of 8 floats, two vectors of keys or values and one of the rows fill 16 registers.
template <class Isa>
constexpr int kAttendTile = Isa::kRows >= 8 ? 6 : 2;

template <class Isa, class Kv>
void key_scores(const ScoreJob& job) {
  float* out = job.out;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    const Kv* keys = keys_of<Kv>(job.keys, token);
    for_row_tiles<kAttendTile<Isa>>(job.rows, [&]<int kRows>(std::int64_t row) __attribute__((always_inline)) {
      score_rows<Isa, Kv, kRows>(keys, job.keys.dim, job.q + row, out + row * kKeyTokens);
    });
    out += job.rows * kKeyTokens;
  }
}

template <class Isa, class Kv>
void sum_values(const ValueJob& job) {
  const float* weights = job.weights;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    const Kv* values = values_of<Kv>(job.values, token);
    for_row_tiles<kAttendTile<Isa>>(job.rows, [&]<int kRows>(std::int64_t row) __attribute__((always_inline)) {
      add_values<Isa, Kv, kRows>(values, job.values.padded, weights + row * kKeyTokens,
                                 job.acc + row * job.values.padded);
    });
    weights += job.rows * kKeyTokens;
  }
}

// s[16] becomes exp(s - largest), 0 where it is -infinity.
LLMQ_INLINE void soften_block(float* s, float largest) {
  for (int i = 0; i < kKeyTokens; ++i) {
    const float e = fast_exp(s[i] - largest);
    s[i] = s[i] == kMinusInfinity ? 0.0f : e;
  }
}

void softmax(const SoftmaxJob& job) {
  const std::int64_t blocks = (job.tokens.end - job.tokens.begin + kKeyTokens - 1) / kKeyTokens;
  const std::int64_t stride = job.rows * kKeyTokens;
  for (std::int64_t row = 0; row < job.rows; ++row) {
    float* scores = job.scores + row * kKeyTokens;
    const std::int64_t from = job.visible[row].begin - job.tokens.begin, to = job.visible[row].end - job.tokens.begin;
    float lanes[kKeyTokens], largest = kMinusInfinity, sum = 0.0f;
    for (int i = 0; i < kKeyTokens; ++i) lanes[i] = kMinusInfinity;
    for (std::int64_t b = 0; b < blocks; ++b) {
      float* s = scores + b * stride;
      if (job.softcap > 0.0f) softcap(s, kKeyTokens, job.softcap);
      const auto first = static_cast<int>(from - b * kKeyTokens), last = static_cast<int>(to - b * kKeyTokens);
      for (int i = 0; i < kKeyTokens; ++i) {
        s[i] = i >= first && i < last ? s[i] : kMinusInfinity;
        lanes[i] = s[i] > lanes[i] ? s[i] : lanes[i];
      }
    }
    for (int i = 0; i < kKeyTokens; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    for (int i = 0; i < kKeyTokens; ++i) lanes[i] = 0.0f;
    // From one block on, so that the sum does not depend on how many blocks of zeros come behind the row's last token.
    for (std::int64_t b = 0; b < blocks; ++b) {
      float* s = scores + b * stride;
      soften_block(s, largest);
      for (int i = 0; i < kKeyTokens; ++i) lanes[i] += s[i];
    }
    for (int i = 0; i < kKeyTokens; ++i) sum += lanes[i];
    job.max[row] = largest;
    job.sum[row] = sum;
  }
}
