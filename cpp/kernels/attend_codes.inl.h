// Attention over keys and values that are stored as codes; see attend.inl.h. Included inside an anonymous namespace,
// once an ISA.
//
// A block of 16 keys is a panel of LQ16 whose rows are tokens, so the scores are a qgemm with the query rows for
// tokens. For the weighted sum of values see attend_values.inl.h.

// The half nearest to x.
template <class Isa>
LLMQ_INLINE std::uint16_t nearest_half(float x) {
  std::uint16_t halves[Isa::kRows];
  Isa::store_halves(halves, Isa::set_floats(x));
  return halves[0];
}

// x f32[n] ~ scale * (code - zero); scale and zero are stored, and rounded before the codes are made. The scale is NaN
// where x holds NaN or infinity.
struct KvGrid {
  std::uint16_t scale;
  int zero;
};

LLMQ_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

template <class Isa, int kBits>
LLMQ_INLINE KvGrid round_to_codes(const float* x, int n, std::uint8_t* codes) {
  constexpr float kTop = (1 << kBits) - 1;
  const bool usable = max_magnitude_bits(x, n) < 0x7f800000u;
  float low = 0.0f, high = 0.0f;
  for (int i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  // 8 bits: -127 .. 127 around 128.
  const float reach = kBits == 8 ? (high > -low ? high : -low) / 127.0f : (high - low) / kTop;
  const std::uint16_t scale = usable ? nearest_half<Isa>(reach) : std::uint16_t{0x7e00};
  const float step = half_to_float(scale), inverse = usable && step > 0.0f ? 1.0f / step : 0.0f;
  const float zero =
      kBits == 8 ? 128.0f
                 : clamp(-low * inverse + kRoundingMagic, kRoundingMagic, kRoundingMagic + kTop) - kRoundingMagic;
  for (int i = 0; i < n; ++i) {
    // Rounded, ties to even, before the zero is added.
    const float v = ((usable ? x[i] : 0.0f) * inverse + kRoundingMagic) - kRoundingMagic + zero;
    codes[i] = static_cast<std::uint8_t>(clamp(v, kBits == 8 ? 1.0f : 0.0f, kTop));
  }
  return {scale, static_cast<int>(zero)};
}

// Put a code among others in a byte, at bit `shift`.
template <int kBits>
LLMQ_INLINE void put_code(std::uint8_t* byte, int shift, int code) {
  constexpr int kMask = (1 << kBits) - 1;
  *byte = static_cast<std::uint8_t>((*byte & ~(kMask << shift)) | code << shift);
}

LLMQ_INLINE std::uint16_t* scales_of(const KvRows& rows, std::int64_t token) {
  return reinterpret_cast<std::uint16_t*>(page_of(rows, token) + rows.scales);
}
LLMQ_INLINE std::uint8_t* zeros_of(const KvRows& rows, std::int64_t token) { return page_of(rows, token) + rows.zeros; }
// Where the scales and zeros of the first group of a block of 16 keys stand, from those of its page on.
LLMQ_INLINE std::int64_t key_grid_at(const KvRows& keys, std::int64_t token) {
  return keys.slot(token) / kKeyTokens * (keys.groups() * kKeyTokens);
}
template <int kBits>
LLMQ_INLINE std::uint8_t* key_codes_of(const KvRows& keys, std::int64_t token) {
  return page_of(keys, token) + keys.data + keys.slot(token) / kKeyTokens * (keys.blocks() * kBits * kVectorBytes);
}
// Columns of 16 that share bytes, and the bytes of a pair of tokens.
template <int kBits>
constexpr int kStrips = 8 / kBits;
constexpr int kPairBytes = 2 * kHeadPadding;
// The codes of the 16 columns that `column` is one of, of the pair that `token` belongs to; the first of these columns
// begins at bit shift_of<kBits>(column) of a byte.
template <int kBits>
LLMQ_INLINE std::uint8_t* value_codes_of(const KvRows& values, std::int64_t token, std::int64_t column) {
  return page_of(values, token) + values.data +
         column / (kStrips<kBits> * kHeadPadding) * (values.page_tokens() / 2 * kPairBytes) +
         values.slot(token) / 2 * kPairBytes;
}
template <int kBits>
LLMQ_INLINE int shift_of(std::int64_t column) {
  return static_cast<int>(column / kHeadPadding % kStrips<kBits>) * kBits;
}

template <class Isa, int kBits>
void append_key_codes(const KvRows& keys, std::int64_t token, const float* key) {
  constexpr int kQuads = 8 / kBits;  // that share a vector
  std::uint8_t codes[kMaxKvGroup], *to = key_codes_of<kBits>(keys, token) + token % kKeyTokens * 4;
  const std::int64_t grid_at = key_grid_at(keys, token) + token % kKeyTokens;
  for (std::int64_t g = 0; g < keys.groups(); ++g) {
    const std::int64_t first = g * keys.group;
    const int n = lesser(keys.dim - first, static_cast<int>(keys.group));
    const KvGrid grid = round_to_codes<Isa, kBits>(key + first, n, codes);
    scales_of(keys, token)[grid_at + g * kKeyTokens] = grid.scale;
    if (kBits < 8) zeros_of(keys, token)[grid_at + g * kKeyTokens] = static_cast<std::uint8_t>(grid.zero);
    for (int i = 0; i < n; ++i) {
      const auto quad = static_cast<int>(first + i) / 4;
      put_code<kBits>(to + quad / kQuads * kVectorBytes + i % 4, quad % kQuads * kBits, codes[i]);
    }
  }
}

template <class Isa, int kBits>
void append_value_codes(const KvRows& values, std::int64_t token, const float* value) {
  std::uint8_t codes[kMaxKvGroup];
  for (std::int64_t g = 0; g < values.groups(); ++g) {
    const std::int64_t first = g * values.group;
    const int n = lesser(values.dim - first, static_cast<int>(values.group));
    const KvGrid grid = round_to_codes<Isa, kBits>(value + first, n, codes);
    const std::int64_t grid_at = g * values.page_tokens() + values.slot(token);
    scales_of(values, token)[grid_at] = grid.scale;
    if (kBits < 8) zeros_of(values, token)[grid_at] = static_cast<std::uint8_t>(grid.zero);
    for (int i = 0; i < n; ++i) {
      const std::int64_t column = first + i;
      std::uint8_t* to = value_codes_of<kBits>(values, token, column) + column % kHeadPadding * 2 + token % 2;
      put_code<kBits>(to, shift_of<kBits>(column), kBits == 8 ? codes[i] ^ 128 : codes[i]);
    }
  }
}

// Codes of a block of 16 keys. Memory is asked for them elsewhere.
template <class Isa, int kBits>
struct FromBlock : FromPanel<Isa, kBits> {
  static LLMQ_INLINE void prefetch(const std::uint8_t*) {}
};

template <class Isa, int kBits, int kRows>
struct ScoreTile {
  using D = Dot<kBits>;
  using Sums = Dots<Isa, kBits, FromBlock<Isa, kBits>, 1, kRows>;
  static constexpr int kVectors = Sums::kVectors;
  using Ints = typename Isa::Ints[kRows][kVectors];
  using Floats = typename Isa::Floats[kRows][kVectors];
};

// Keys with scales by token: a group of 32 columns has one a token.
template <class Isa, int kBits, int kRows>
struct ByToken {
  using T = ScoreTile<Isa, kBits, kRows>;
  static constexpr int kGroup = kKeyGroup;

  const ScoreJob& job;
  std::int64_t row;

  LLMQ_INLINE ByToken(const ScoreJob& of, std::int64_t first, std::int64_t) : job(of), row(first) {}
  static LLMQ_INLINE float start(int) { return 0.0f; }

  // sum += float(acc - zero * sum(q)) * (key scale * query scale)
  LLMQ_INLINE void add_scaled(std::int64_t token, std::int64_t g, const typename T::Ints& acc,
                              typename T::Floats& sum) const {
    const std::int64_t at = key_grid_at(job.keys, token) + g * kKeyTokens;
    const std::uint16_t* scales = scales_of(job.keys, token) + at;
    const std::uint8_t* zeros = kBits < 8 ? zeros_of(job.keys, token) + at : nullptr;
    typename Isa::Ints zero[T::kVectors];
    typename Isa::Floats scale[T::kVectors];
    LLMQ_UNROLL
    for (int v = 0; v < T::kVectors; ++v) {
      zero[v] = Isa::offset_minus_zeros(T::D::kOffset, kBits < 8 ? zeros + v * Isa::kRows : nullptr, 128);
      scale[v] = Isa::halves_to_floats(scales + v * Isa::kRows);
    }
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t from = (row + r) * job.codes.groups + g;
      const auto q_scale = Isa::set_floats(job.codes.scale[from]);
      const auto total = Isa::set_ints(job.codes.total[from]);
      LLMQ_UNROLL
      for (int v = 0; v < T::kVectors; ++v) {
        // Products of 8-bit codes less 128 need no correction.
        const auto dot = kBits == 8 && T::D::kOffset == 128 ? acc[r][v] : Isa::add_product(acc[r][v], zero[v], total);
        sum[r][v] = Isa::add(sum[r][v], Isa::mul(Isa::to_floats(dot), Isa::mul(scale[v], q_scale)));
      }
    }
  }
};

// Scores of kRows query rows from `row` on and of tokens that Scales is for.
template <class Isa, int kBits, template <class, int, int> class Scales, int kRows>
__attribute__((noinline)) void score_codes(const ScoreJob& job, Range tokens, std::int64_t row, Fetch& fetch,
                                           std::int64_t lines) {
  using T = ScoreTile<Isa, kBits, kRows>;
  constexpr int kGroup = Scales<Isa, kBits, kRows>::kGroup;
  const Scales<Isa, kBits, kRows> scales(job, row, tokens.begin);
  const std::int64_t groups = job.codes.groups, last = job.keys.dim - (groups - 1) * kGroup;
  float* out = job.out + ((tokens.begin - job.tokens.begin) / kKeyTokens * job.rows + row) * kKeyTokens;
  for (std::int64_t token = tokens.begin; token < tokens.end; token += kKeyTokens, out += job.rows * kKeyTokens) {
    fetch.next(lines);
    typename T::Sums dots({key_codes_of<kBits>(job.keys, token)}, job.codes.q + row * job.codes.stride,
                          job.codes.stride);
    typename T::Floats sum;
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < T::kVectors; ++v) sum[r][v] = Isa::set_floats(scales.start(r));
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      typename T::Ints acc;
      LLMQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        LLMQ_UNROLL
        for (int v = 0; v < T::kVectors; ++v) acc[r][v] = Isa::set_ints(0);
      }
      // Whole blocks: what lies behind the last column counts 0 in the query.
      if (kGroup > kBlockColumns && g == groups - 1 && last <= kBlockColumns) {
        dots.add_group(kBlockColumns, acc);
      } else {
        dots.add_group(kGroup, acc);
      }
      scales.add_scaled(token, g, acc, sum);
    }
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LLMQ_UNROLL
      for (int v = 0; v < T::kVectors; ++v) Isa::store(out + r * kKeyTokens + v * Isa::kRows, sum[r][v]);
    }
  }
}

// All rows' scores. Memory is asked for what is ahead while the first rows are computed.
template <class Isa, int kBits, template <class, int, int> class Scales>
LLMQ_INLINE void score_all_rows(const ScoreJob& job, Range tokens, Fetch& fetch, std::int64_t lines) {
  for_row_tiles<Isa::kTileTokens>(job.rows, [&]<int kRows>(std::int64_t row) __attribute__((always_inline)) {
    score_codes<Isa, kBits, Scales, kRows>(job, tokens, row, fetch, row == 0 ? lines : 0);
  });
}

template <class Isa, int kBits>
void key_scores_of_codes(const ScoreJob& job) {
  Fetch fetch(job.ahead);
  score_all_rows<Isa, kBits, ByToken>(job, job.tokens, fetch, lines_a_step(fetch, blocks_of(job.tokens)));
}
