// Keys with a scale and a zero a column, over a page of tokens (KIVI, arXiv 2402.02750), and numbers read back.
// Included inside an anonymous namespace, once an ISA.
//
// The scales go into the query rows, which become int8 once a page; the scores of its blocks are then a qgemm of
// weights without scales, begun at what the zeros contribute, the same for all tokens of the page.

// Zeros count in these parts of a code: 255 is the largest code.
template <int kBits>
constexpr int kZeroSteps = 255 / ((1 << kBits) - 1);

// What the codes of kColumnGroup columns are made with: code = round(x * inverse + shift), x of usable columns only.
struct ColumnGrid {
  float inverse[kColumnGroup], shift[kColumnGroup];
  std::uint32_t magnitude[kColumnGroup];  // bits of the largest
  bool usable(int i) const { return magnitude[i] < 0x7f800000u; }
};

// The grid of n columns of x f32[tokens, dim]; scales and zeros are stored. A scale is NaN where x holds NaN or
// infinity.
template <class Isa, int kBits>
void grid_of_columns(const float* x, std::int64_t tokens, std::int64_t dim, int n, ColumnGrid& grid,
                     std::uint16_t* scales, std::uint8_t* zeros) {
  constexpr float kTop = (1 << kBits) - 1;
  float low[kColumnGroup], high[kColumnGroup];
  for (int i = 0; i < n; ++i) low[i] = high[i] = 0.0f, grid.magnitude[i] = 0;
  for (std::int64_t t = 0; t < tokens; ++t, x += dim) {
    for (int i = 0; i < n; ++i) {
      low[i] = x[i] < low[i] ? x[i] : low[i];
      high[i] = x[i] > high[i] ? x[i] : high[i];
      const std::uint32_t bits = float_to_bits(x[i]) & 0x7fffffffu;
      grid.magnitude[i] = bits > grid.magnitude[i] ? bits : grid.magnitude[i];
    }
  }
  for (int i = 0; i < n; ++i) {
    const bool usable = grid.usable(i);
    scales[i] = usable ? nearest_half<Isa>((high[i] - low[i]) / kTop) : std::uint16_t{0x7e00};
    const float step = half_to_float(scales[i]);
    grid.inverse[i] = usable && step > 0.0f ? 1.0f / step : 0.0f;
    const float zero =
        clamp(-low[i] * grid.inverse[i] * kZeroSteps<kBits> + kRoundingMagic, kRoundingMagic, kRoundingMagic + 255.0f) -
        kRoundingMagic;
    zeros[i] = static_cast<std::uint8_t>(zero);
    grid.shift[i] = zero / kZeroSteps<kBits>;
  }
}

template <class Isa, int kBits>
void store_key_page(const KvRows& keys, Range tokens, const float* x) {
  constexpr float kTop = (1 << kBits) - 1;
  constexpr int kQuads = 8 / kBits;  // that share a vector
  ColumnGrid grid;
  std::uint8_t codes[kColumnGroup];
  for (std::int64_t first = 0; first < keys.dim; first += kColumnGroup) {
    const int n = lesser(keys.dim - first, kColumnGroup);
    grid_of_columns<Isa, kBits>(x + first, tokens.end - tokens.begin, keys.dim, n, grid,
                                scales_of(keys, tokens.begin) + first, zeros_of(keys, tokens.begin) + first);
    for (std::int64_t token = tokens.begin; token < tokens.end; ++token) {
      const float* row = x + (token - tokens.begin) * keys.dim + first;
      for (int i = 0; i < n; ++i) {
        const float v = (grid.usable(i) ? row[i] : 0.0f) * grid.inverse[i] + grid.shift[i];
        codes[i] = static_cast<std::uint8_t>(clamp((v + kRoundingMagic) - kRoundingMagic, 0.0f, kTop));
      }
      std::uint8_t* to = key_codes_of<kBits>(keys, token) + token % kKeyTokens * 4;
      for (int i = 0; i < n; ++i) {
        const auto quad = static_cast<int>(first + i) / 4;
        put_code<kBits>(to + quad / kQuads * kVectorBytes + i % 4, quad % kQuads * kBits, codes[i]);
      }
    }
  }
}

// n columns of a query row times the scales of a page, as int8; `total` becomes the sum of each code times its column's
// zero.
template <class Isa>
LLMQ_INLINE void fold_group(const float* q, const std::uint16_t* scales, const std::uint8_t* zeros, int n,
                            std::int8_t* codes, float* scale, std::int32_t* total) {
  alignas(64) float x[kColumnGroup];
  int i = 0;
  for (; i + Isa::kRows <= n; i += Isa::kRows) {
    Isa::store(x + i, Isa::mul(Isa::load(q + i), Isa::halves_to_floats(scales + i)));
  }
  for (; i < n; ++i) x[i] = q[i] * half_to_float(scales[i]);
  std::int32_t sum = 0;
  round_columns(x, n, codes, scale, &sum);
  sum = 0;
  for (i = 0; i < n; ++i) sum += codes[i] * zeros[i];
  *total = sum;
}

// All query rows for the page that `token` lies in.
template <class Isa>
void fold_scales(const ScoreJob& job, std::int64_t token) {
  const QuantizedRows& to = job.codes;
  const std::uint16_t* scales = scales_of(job.keys, token);
  const std::uint8_t* zeros = zeros_of(job.keys, token);
  for (std::int64_t row = 0; row < job.rows; ++row) {
    std::int8_t* codes = to.q + row * to.stride;
    for (std::int64_t g = 0; g < to.groups; ++g) {
      const std::int64_t first = g * kColumnGroup, at = row * to.groups + g;
      const int n = lesser(job.keys.dim - first, kColumnGroup);
      const float* q = job.q[row] + first;
      if (n == kColumnGroup) {  // the compiler unrolls
        fold_group<Isa>(q, scales + first, zeros + first, kColumnGroup, codes + first, to.scale + at, to.total + at);
      } else {
        fold_group<Isa>(q, scales + first, zeros + first, n, codes + first, to.scale + at, to.total + at);
      }
    }
    for (std::int64_t column = job.keys.dim; column < to.stride; ++column) codes[column] = 0;
  }
}

// Keys with scales by column, of a page whose scales are folded into the query.
template <class Isa, int kBits, int kRows>
struct ByColumn {
  using T = ScoreTile<Isa, kBits, kRows>;
  static_assert(T::D::kOffset == 0);
  static constexpr int kGroup = kColumnGroup;

  const ScoreJob& job;
  std::int64_t row;
  float starts[kRows];  // what the zeros contribute

  LLMQ_INLINE ByColumn(const ScoreJob& of, std::int64_t first, std::int64_t) : job(of), row(first) {
    for (int r = 0; r < kRows; ++r) {
      starts[r] = 0.0f;
      for (std::int64_t g = (row + r) * job.codes.groups; g < (row + r + 1) * job.codes.groups; ++g) {
        starts[r] -= static_cast<float>(job.codes.total[g]) * (job.codes.scale[g] / kZeroSteps<kBits>);
      }
    }
  }
  LLMQ_INLINE float start(int r) const { return starts[r]; }

  LLMQ_INLINE void add_scaled(std::int64_t, std::int64_t g, const typename T::Ints& acc,
                              typename T::Floats& sum) const {
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto q_scale = Isa::set_floats(job.codes.scale[(row + r) * job.codes.groups + g]);
      LLMQ_UNROLL
      for (int v = 0; v < T::kVectors; ++v) {
        sum[r][v] = Isa::add(sum[r][v], Isa::mul(Isa::to_floats(acc[r][v]), q_scale));
      }
    }
  }
};

template <class Isa, int kBits>
void key_scores_of_columns(const ScoreJob& job) {
  Fetch fetch(job.ahead);
  const std::int64_t lines = lines_a_step(fetch, blocks_of(job.tokens));
  for (Range page = job.tokens; page.begin < job.tokens.end; page.begin = page.end) {
    page.end = page.begin + lesser(job.tokens.end - page.begin,
                                   static_cast<int>(job.keys.page_tokens() - job.keys.slot(page.begin)));
    fold_scales<Isa>(job, page.begin);
    score_all_rows<Isa, kBits, ByColumn>(job, page, fetch, lines);
  }
}

LLMQ_INLINE float number(std::uint16_t half) { return half_to_float(half); }
LLMQ_INLINE float number(float x) { return x; }

template <class Kv>
void take_key(const KvRows& keys, std::int64_t token, float* out) {
  const Kv* from = keys_of<Kv>(keys, token) + token % kKeyTokens;
  for (std::int64_t d = 0; d < keys.dim; ++d) out[d] = number(from[d * kKeyTokens]);
}

template <class Kv>
void take_value(const KvRows& values, std::int64_t token, float* out) {
  const Kv* from = values_of<Kv>(values, token);
  for (std::int64_t d = 0; d < values.dim; ++d) out[d] = number(from[d]);
}

template <int kBits>
LLMQ_INLINE int key_code(const KvRows& keys, std::int64_t token, std::int64_t d) {
  const std::uint8_t* block = key_codes_of<kBits>(keys, token) + d / kBlockColumns * (kBits * kVectorBytes);
  return code_at<kBits>(block, static_cast<int>(token % kKeyTokens), static_cast<int>(d % kBlockColumns));
}

template <int kBits>
void take_key_codes(const KvRows& keys, std::int64_t token, float* out) {
  for (std::int64_t d = 0; d < keys.dim; ++d) {
    const std::int64_t at = key_grid_at(keys, token) + d / keys.group * kKeyTokens + token % kKeyTokens;
    const int zero = kBits == 8 ? 128 : zeros_of(keys, token)[at];
    out[d] = half_to_float(scales_of(keys, token)[at]) * static_cast<float>(key_code<kBits>(keys, token, d) - zero);
  }
}

template <int kBits>
void take_key_of_columns(const KvRows& keys, std::int64_t token, float* out) {
  for (std::int64_t d = 0; d < keys.dim; ++d) {
    const float zero = static_cast<float>(zeros_of(keys, token)[d]) / kZeroSteps<kBits>;
    out[d] = half_to_float(scales_of(keys, token)[d]) * (static_cast<float>(key_code<kBits>(keys, token, d)) - zero);
  }
}

template <int kBits>
void take_value_codes(const KvRows& values, std::int64_t token, float* out) {
  for (std::int64_t d = 0; d < values.dim; ++d) {
    const std::int64_t at = d / values.group * values.page_tokens() + values.slot(token);
    const std::uint8_t byte = value_codes_of<kBits>(values, token, d)[d % kHeadPadding * 2 + token % 2];
    const int code = kBits == 8 ? static_cast<std::int8_t>(byte) : byte >> shift_of<kBits>(d) & ((1 << kBits) - 1);
    const int zero = kBits == 8 ? 0 : zeros_of(values, token)[at];
    out[d] = half_to_float(scales_of(values, token)[at]) * static_cast<float>(code - zero);
  }
}
