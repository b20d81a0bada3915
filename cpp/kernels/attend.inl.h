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

// Asks memory for what a job names as read later, in its order.
class Fetch {
 public:
  static constexpr std::int64_t kLine = 64;

  LLMQ_INLINE explicit Fetch(const Ahead& ahead) : ahead_(ahead), token_(ahead.tokens.begin) {}
  // Lines in all.
  LLMQ_INLINE std::int64_t lines() const {
    return (ahead_.tokens.end - ahead_.tokens.begin) * ahead_.rows.token_bytes / kLine;
  }
  LLMQ_INLINE void next(std::int64_t lines) {
    if (at_ == end_) next_page();
    for (; lines > 0 && at_ < end_; --lines, at_ += kLine) __builtin_prefetch(at_);
  }

 private:
  LLMQ_INLINE void next_page() {
    if (token_ >= ahead_.tokens.end) return;
    const KvRows& rows = ahead_.rows;
    const std::int64_t slot = rows.slot(token_), left = ahead_.tokens.end - token_, here = rows.page_tokens() - slot;
    const std::uint8_t* page = page_of(rows, token_);
    for (std::int64_t i = 0; i < rows.grid_bytes; i += kLine) __builtin_prefetch(page + rows.scales + i);
    at_ = page + rows.data + slot * rows.token_bytes;
    end_ = at_ + (left < here ? left : here) * rows.token_bytes / kLine * kLine;
    token_ += here;
  }

  const Ahead& ahead_;
  std::int64_t token_;
  const std::uint8_t *at_ = nullptr, *end_ = nullptr;
};

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
// As many sums where a vector holds 16 floats: fewer would wait for each other. Codes take two strips for that.
template <class Isa>
constexpr int kFloatTile = kAttendTile<Isa> * (Isa::kRows >= 16 ? 2 : 1);

// Blocks of 16 tokens.
LLMQ_INLINE std::int64_t blocks_of(Range tokens) { return (tokens.end - tokens.begin + kKeyTokens - 1) / kKeyTokens; }
// What each of `steps` steps must ask for, so that all is asked for at the end.
LLMQ_INLINE std::int64_t lines_a_step(const Fetch& fetch, std::int64_t steps) {
  return (fetch.lines() + steps - 1) / steps;
}

template <class Isa, class Kv>
void key_scores(const ScoreJob& job) {
  float* out = job.out;
  Fetch fetch(job.ahead);
  const std::int64_t lines = lines_a_step(fetch, blocks_of(job.tokens));
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    const Kv* keys = keys_of<Kv>(job.keys, token);
    fetch.next(lines);
    for_row_tiles<kFloatTile<Isa>>(job.rows, [&]<int kRows>(std::int64_t row) __attribute__((always_inline)) {
      score_rows<Isa, Kv, kRows>(keys, job.keys.dim, job.q + row, out + row * kKeyTokens);
    });
    out += job.rows * kKeyTokens;
  }
}

template <class Isa, class Kv>
void sum_values(const ValueJob& job) {
  const float* weights = job.weights;
  Fetch fetch(job.ahead);
  const std::int64_t lines = lines_a_step(fetch, blocks_of(job.tokens));
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    const Kv* values = values_of<Kv>(job.values, token);
    fetch.next(lines);
    for_row_tiles<kFloatTile<Isa>>(job.rows, [&]<int kRows>(std::int64_t row) __attribute__((always_inline)) {
      add_values<Isa, Kv, kRows>(values, job.values.padded, weights + row * kKeyTokens,
                                 job.acc + row * job.values.padded);
    });
    weights += job.rows * kKeyTokens;
  }
}

// Vectors of the compiler's: left to loops over arrays, it takes them apart into single floats.
typedef float LaneFloats __attribute__((vector_size(4 * Isa::kRows)));
typedef std::uint32_t LaneBits __attribute__((vector_size(4 * Isa::kRows)));

struct Lanes {
  static constexpr int kVectors = kKeyTokens / Isa::kRows;

  LaneFloats v[kVectors];

  static LLMQ_INLINE Lanes load(const float* p) {
    Lanes lanes;
    LLMQ_UNROLL
    for (int i = 0; i < kVectors; ++i) __builtin_memcpy(&lanes.v[i], p + i * Isa::kRows, sizeof lanes.v[i]);
    return lanes;
  }
  static LLMQ_INLINE Lanes all(float x) {
    Lanes lanes;
    LLMQ_UNROLL
    for (int i = 0; i < kVectors; ++i) lanes.v[i] = LaneFloats{} + x;
    return lanes;
  }
  LLMQ_INLINE void store(float* p) const {
    LLMQ_UNROLL
    for (int i = 0; i < kVectors; ++i) __builtin_memcpy(p + i * Isa::kRows, &v[i], sizeof v[i]);
  }
  LLMQ_INLINE void take_larger(const Lanes& other) {
    LLMQ_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = other.v[i] > v[i] ? other.v[i] : v[i];
  }
  LLMQ_INLINE void add(const Lanes& other) {
    LLMQ_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] += other.v[i];
  }
  // exp(v - shift) of lanes that are not above shift, 0 below exp(-87.7), as exp_within_88 computes it; NaN stays NaN.
  LLMQ_INLINE void soften(float shift) {
    LLMQ_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const LaneFloats x = v[i] - shift, low = LaneFloats{} - 88.0f;
      v[i] = exp_within_88<LaneFloats, LaneBits>(x < low ? low : x);
    }
  }
};

// s[16]: -infinity where the row does not look.
LLMQ_INLINE void hide_unseen(float* s, std::int64_t first, std::int64_t last) {
  for (int i = 0; i < kKeyTokens; ++i) s[i] = i < first || i >= last ? kMinusInfinity : s[i];
}

// The largest of one row's scores, whose first block is `s`, those of tokens that the row does not see being hidden.
LLMQ_INLINE float largest_score(const SoftmaxJob& job, std::int64_t row, float* s) {
  const Range seen{job.visible[row].begin - job.tokens.begin, job.visible[row].end - job.tokens.begin};
  auto lanes = Lanes::all(kMinusInfinity);
  const std::int64_t end = job.tokens.end - job.tokens.begin;
  for (std::int64_t at = 0; at < end; at += kKeyTokens, s += job.rows * kKeyTokens) {
    if (job.softcap > 0.0f) softcap(s, kKeyTokens, job.softcap);
    if (seen.begin > at || seen.end < at + kKeyTokens) hide_unseen(s, seen.begin - at, seen.end - at);
    lanes.take_larger(Lanes::load(s));
  }
  float each[kKeyTokens], largest = kMinusInfinity;
  lanes.store(each);
  for (int i = 0; i < kKeyTokens; ++i) largest = each[i] > largest ? each[i] : largest;
  return largest;
}

void softmax(const SoftmaxJob& job) {
  Fetch fetch(job.ahead);
  const std::int64_t lines = lines_a_step(fetch, job.rows * blocks_of(job.tokens));
  for (std::int64_t row = 0; row < job.rows; ++row) {
    float* s = job.scores + row * kKeyTokens;
    const float largest = largest_score(job, row, s);
    const float shift = largest == kMinusInfinity ? 0.0f : largest;  // a row that sees nothing, or NaN alone
    // From one block on, so that the sum does not depend on how many blocks of zeros come behind the row's last token.
    auto lanes = Lanes::all(0.0f);
    for (std::int64_t b = blocks_of(job.tokens); b > 0; --b, s += job.rows * kKeyTokens) {
      fetch.next(lines);
      auto weights = Lanes::load(s);
      weights.soften(shift);
      lanes.add(weights);
      weights.store(s);
    }
    float each[kKeyTokens], sum = 0.0f;
    lanes.store(each);
    for (int i = 0; i < kKeyTokens; ++i) sum += each[i];
    job.max[row] = sum == sum ? largest : sum;  // NaN counts as seen
    job.sum[row] = sum;
  }
}
