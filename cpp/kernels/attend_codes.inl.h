// Attention over keys and values that are stored as codes; see attend.inl.h. Included inside an anonymous namespace,
// once an ISA.
//
// A block of 16 keys is a panel of LQ16 whose rows are tokens, so the scores are a qgemm with the query rows for
// tokens. The weighted sum of values is in integers, too: a row's weights, each times its value's scale, become 15-bit
// integers with one scale a part, and products of 16 bits are summed exactly over the part.

constexpr int kWeightRows = 24;  // whose integer weights are held at a time
constexpr float kWeightSteps = 32767.0f;

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

template <class Isa, int kBits>
void key_scores_of_codes(const ScoreJob& job) {
  float* out = job.out;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    for (std::int64_t i = 0; i < job.rows * kKeyTokens; ++i) out[i] = 0.0f;
    const std::int64_t grid_at = key_grid_at(job.keys, token);
    const Cursor<1> at{.codes = {key_codes_of<kBits>(job.keys, token)},
                       .scales = {scales_of(job.keys, token) + grid_at},
                       .zeros = {kBits < 8 ? zeros_of(job.keys, token) + grid_at : nullptr},
                       .q = job.codes.q,
                       .x_scale = job.codes.scale,
                       .total = job.codes.total,
                       .stride = job.codes.stride,
                       .x_groups = job.codes.groups,
                       .columns = job.keys.dim,
                       .group = kKeyGroup,
                       .share = 1,
                       .left = 1,
                       .mid = 128};
    run_tiles<Isa, kBits, FromPanel<Isa, kBits>, 1, Isa::kTileTokens>(static_cast<int>(job.rows), at, out);
    out += job.rows * kKeyTokens;
  }
}

// Some rows' weights over the tokens of a job, times the scales of the values' column group: ~ step * codes. The step
// is NaN where a scale is.
struct RoundedWeights {
  alignas(64) std::int16_t codes[kWeightRows][kPartTokens];
  float steps[kWeightRows];
  std::int32_t offset[kWeightRows];  // minus the sum of code * zero
};

template <class Isa>
void round_weights(const ValueJob& job, std::int64_t row, std::int64_t group, int slot, RoundedWeights& to) {
  alignas(64) float x[kPartTokens];
  int n = 0;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens, n += kKeyTokens) {
    const float* weights = job.weights + (n / kKeyTokens * job.rows + row) * kKeyTokens;
    const std::int64_t at = group * job.values.page_tokens() + job.values.slot(token);
    const std::uint16_t* scales = scales_of(job.values, token) + at;
    LLMQ_UNROLL
    for (int i = 0; i < kKeyTokens; i += Isa::kRows) {
      Isa::store(x + n + i, Isa::mul(Isa::load(weights + i), Isa::halves_to_floats(scales + i)));
    }
  }
  const std::uint32_t bits = max_magnitude_bits(x, n);
  const float largest = bits_to_float(bits);
  const bool usable = bits < 0x7f800000u && largest >= kTinyGroup;
  const float inverse = usable ? kWeightSteps / largest : 0.0f;
  std::int16_t* codes = to.codes[slot];
  for (int i = 0; i < n; ++i) {
    const std::uint32_t code = float_to_bits((usable ? x[i] : 0.0f) * inverse + kRoundingMagic);
    codes[i] = static_cast<std::int16_t>(code & 0xffffu);
  }
  to.steps[slot] = bits >= 0x7f800000u ? bits_to_float(0x7fc00000u) : usable ? largest / kWeightSteps : 0.0f;
}

std::int32_t weighted_zeros(const ValueJob& job, std::int64_t group, const std::int16_t* codes) {
  std::int32_t sum = 0;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens, codes += kKeyTokens) {
    const std::uint8_t* zeros = zeros_of(job.values, token) + group * job.values.page_tokens() + job.values.slot(token);
    for (int i = 0; i < kKeyTokens; ++i) sum += codes[i] * zeros[i];
  }
  return sum;
}

// The codes of 16 columns over the tokens of a job, a byte each: [pairs][16][2]. 8-bit codes are read where they lie.
template <class Isa, int kBits>
LLMQ_INLINE void unpack_values(const ValueJob& job, std::int64_t column, std::uint8_t* out) {
  const int shift = shift_of<kBits>(column);
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    const std::uint8_t* packed = value_codes_of<kBits>(job.values, token, column);
    for (int byte = 0; byte < kKeyTokens / 2 * kPairBytes; byte += 4 * Isa::kRows, out += 4 * Isa::kRows) {
      Isa::store_bytes(out, Isa::bits_at(Isa::load_bytes(packed + byte), shift, (1 << kBits) - 1));
    }
  }
}

// sum[row] += weights of kRows rows . codes of 16 columns, over `tokens` tokens.
template <class Isa, int kRows, int kVectors>
LLMQ_INLINE void add_codes(const std::int8_t* codes, int tokens, const std::int16_t* weights,
                           typename Isa::Ints (&sum)[kRows][kVectors]) {
  for (int t = 0; t < tokens; t += 2, weights += 2, codes += 2 * kHeadPadding) {
    typename Isa::Pairs value[kVectors];
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) value[v] = Isa::load_pairs(codes + v * 2 * Isa::kRows);
    LLMQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto weight = Isa::broadcast_pair(weights + r * kPartTokens);
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::add_pairs(sum[r][v], value[v], weight);
    }
  }
}

// acc[row][16] += weights . values of the 16 columns from `column` on, for kRows query rows from `row` on among those
// rounded. No sum overflows: a part's is at most 128 * 32767 * 128 < 2^31.
template <class Isa, int kBits, int kRows>
LLMQ_INLINE void add_strip(const ValueJob& job, std::int64_t column, const std::uint8_t* unpacked,
                           const RoundedWeights& weights, std::int64_t row, float* acc) {
  constexpr int kVectors = kHeadPadding / Isa::kRows;
  typename Isa::Ints sum[kRows][kVectors];
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::set_ints(weights.offset[row + r]);
  }
  const std::int16_t* codes = weights.codes[row];
  if constexpr (kBits < 8) {
    add_codes<Isa, kRows, kVectors>(reinterpret_cast<const std::int8_t*>(unpacked),
                                    static_cast<int>(job.tokens.end - job.tokens.begin), codes, sum);
  } else {
    for (std::int64_t token = job.tokens.begin; token < job.tokens.end;) {
      const int here =
          lesser(job.tokens.end - token, static_cast<int>(job.values.page_tokens() - job.values.slot(token)));
      const auto* values = reinterpret_cast<const std::int8_t*>(value_codes_of<kBits>(job.values, token, column));
      add_codes<Isa, kRows, kVectors>(values, here, codes + (token - job.tokens.begin), sum);
      token += here;
    }
  }
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = acc + r * job.values.padded + v * Isa::kRows;
      const auto product = Isa::mul(Isa::to_floats(sum[r][v]), Isa::set_floats(weights.steps[row + r]));
      Isa::store(to, Isa::add(Isa::load(to), product));
    }
  }
}

template <class Isa, int kBits>
void sum_values_of_codes(const ValueJob& job) {
  RoundedWeights weights;
  alignas(64) std::uint8_t unpacked[kBits < 8 ? kPartTokens * kHeadPadding : 1];
  for (std::int64_t first = 0; first < job.rows; first += kWeightRows) {
    const int rows = lesser(job.rows - first, kWeightRows);
    for (std::int64_t g = 0; g < job.values.groups(); ++g) {
      for (int r = 0; r < rows; ++r) {
        round_weights<Isa>(job, first + r, g, r, weights);
        weights.offset[r] = kBits < 8 ? -weighted_zeros(job, g, weights.codes[r]) : 0;
      }
      const std::int64_t begin = g * job.values.group,
                         end = begin + lesser(job.values.padded - begin, static_cast<int>(job.values.group));
      for (std::int64_t column = begin; column < end; column += kHeadPadding) {
        if constexpr (kBits < 8) unpack_values<Isa, kBits>(job, column, unpacked);
        for_row_tiles<kAttendTile<Isa>>(rows, [&]<int kRows>(std::int64_t r) __attribute__((always_inline)) {
          add_strip<Isa, kBits, kRows>(job, column, unpacked, weights, r,
                                       job.acc + (first + r) * job.values.padded + column);
        });
      }
    }
  }
}
