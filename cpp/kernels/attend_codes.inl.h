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

// x f32[n] ~ scale * q, |q| <= 127. The scale is rounded to a half before q is made; NaN where x holds NaN or infinity.
template <class Isa>
LLMQ_INLINE std::uint16_t round_to_scale(const float* x, int n, std::int8_t* q) {
  const std::uint32_t bits = max_magnitude_bits(x, n);
  const bool usable = bits < 0x7f800000u;
  const std::uint16_t scale = usable ? nearest_half<Isa>(bits_to_float(bits) / 127.0f) : std::uint16_t{0x7e00};
  const float step = half_to_float(scale), inverse = usable && step > 0.0f ? 1.0f / step : 0.0f;
  for (int i = 0; i < n; ++i) {
    float v = usable ? x[i] * inverse : 0.0f;
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    q[i] = static_cast<std::int8_t>(float_to_bits(v + kRoundingMagic) & 0xffu);
  }
  return scale;
}

LLMQ_INLINE std::uint16_t* scales_of(const KvRows& rows, std::int64_t token) {
  return reinterpret_cast<std::uint16_t*>(page_of(rows, token) + rows.scales);
}
// Bytes of the keys of one block of tokens.
LLMQ_INLINE std::int64_t key_block_bytes(const KvRows& keys, int bits) { return keys.blocks() * bits * kVectorBytes; }
LLMQ_INLINE std::uint8_t* key_codes_of(const KvRows& keys, std::int64_t token, int bits) {
  return page_of(keys, token) + keys.data + token % kPageTokens / kKeyTokens * key_block_bytes(keys, bits);
}
LLMQ_INLINE std::uint16_t* key_scales_of(const KvRows& keys, std::int64_t token) {
  return scales_of(keys, token) + token % kPageTokens / kKeyTokens * (keys.groups() * kKeyTokens);
}
// The codes of 16 columns of a pair of tokens are 32 bytes; a strip holds those of a page's pairs.
LLMQ_INLINE std::int8_t* value_codes_of(const KvRows& values, std::int64_t token, std::int64_t column) {
  return reinterpret_cast<std::int8_t*>(page_of(values, token) + values.data) +
         column / kHeadPadding * (kPageTokens * kHeadPadding) + token % kPageTokens / 2 * (2 * kHeadPadding);
}

template <class Isa>
void append_key_codes(const KvRows& keys, std::int64_t token, const float* key) {
  constexpr int kBits = 8, kOffset = 128;
  std::uint8_t* to = key_codes_of(keys, token, kBits) + token % kKeyTokens * 4;
  std::uint16_t* scales = key_scales_of(keys, token) + token % kKeyTokens;
  std::int8_t q[kKeyGroup];
  for (std::int64_t d = 0; d < keys.dim; d += kKeyGroup) {
    const int n = lesser(keys.dim - d, kKeyGroup);
    scales[d / kKeyGroup * kKeyTokens] = round_to_scale<Isa>(key + d, n, q);
    for (int i = 0; i < n; ++i) {
      to[(d + i) / 4 * kVectorBytes + i % 4] = static_cast<std::uint8_t>(q[i] + kOffset);
    }
  }
}

template <class Isa>
void append_value_codes(const KvRows& values, std::int64_t token, const float* value) {
  std::int8_t q[kValueGroup];
  for (std::int64_t d = 0; d < values.dim; d += kValueGroup) {
    const int n = lesser(values.dim - d, kValueGroup);
    scales_of(values, token)[d / kValueGroup * kPageTokens + token % kPageTokens] =
        round_to_scale<Isa>(value + d, n, q);
    for (int i = 0; i < n; ++i) value_codes_of(values, token, d + i)[i % kHeadPadding * 2 + token % 2] = q[i];
  }
}

template <class Isa, int kBits>
void key_scores_of_codes(const ScoreJob& job) {
  float* out = job.out;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    for (std::int64_t i = 0; i < job.rows * kKeyTokens; ++i) out[i] = 0.0f;
    const Cursor<1> at{.codes = {key_codes_of(job.keys, token, kBits)},
                       .scales = {key_scales_of(job.keys, token)},
                       .zeros = {nullptr},
                       .q = job.codes.q,
                       .x_scale = job.codes.scale,
                       .total = job.codes.total,
                       .stride = job.codes.stride,
                       .x_groups = job.codes.groups,
                       .columns = job.keys.dim,
                       .group = kKeyGroup,
                       .share = 1,
                       .left = 1,
                       .mid = 1 << (kBits - 1)};
    run_tiles<Isa, kBits, FromPanel<Isa, kBits>, 1, Isa::kTileTokens>(static_cast<int>(job.rows), at, out);
    out += job.rows * kKeyTokens;
  }
}

// A row's weights over a part, times the scales of the values' column group: ~ step * codes. NaN where a scale is.
template <class Isa>
float round_weights(const ValueJob& job, std::int64_t row, std::int64_t group, std::int16_t* codes) {
  alignas(64) float x[kPartTokens];
  int n = 0;
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens, n += kKeyTokens) {
    const float* weights = job.weights + (n / kKeyTokens * job.rows + row) * kKeyTokens;
    const std::uint16_t* scales = scales_of(job.values, token) + group * kPageTokens + token % kPageTokens;
    LLMQ_UNROLL
    for (int i = 0; i < kKeyTokens; i += Isa::kRows) {
      Isa::store(x + n + i, Isa::mul(Isa::load(weights + i), Isa::halves_to_floats(scales + i)));
    }
  }
  const std::uint32_t bits = max_magnitude_bits(x, n);
  const float largest = bits_to_float(bits);
  const bool usable = bits < 0x7f800000u && largest >= kTinyGroup;
  const float inverse = usable ? kWeightSteps / largest : 0.0f;
  for (int i = 0; i < n; ++i) {
    const std::uint32_t code = float_to_bits((usable ? x[i] : 0.0f) * inverse + kRoundingMagic);
    codes[i] = static_cast<std::int16_t>(code & 0xffffu);
  }
  return bits >= 0x7f800000u ? bits_to_float(0x7fc00000u) : usable ? largest / kWeightSteps : 0.0f;
}

// acc[row][16] += weights . values of the 16 columns from `column` on, for kRows query rows. No sum overflows: a part's
// is at most 128 * 32767 * 127 < 2^31.
template <class Isa, int kRows>
LLMQ_INLINE void add_strip(const ValueJob& job, std::int64_t column, const std::int16_t* weights, const float* steps,
                           float* acc) {
  constexpr int kVectors = kHeadPadding / Isa::kRows;
  typename Isa::Ints sum[kRows][kVectors];
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::set_ints(0);
  }
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end;) {
    const std::int8_t* codes = value_codes_of(job.values, token, column);
    const int here = lesser(job.tokens.end - token, static_cast<int>(kPageTokens - token % kPageTokens));
    for (int t = 0; t < here; t += 2, weights += 2, codes += 2 * kHeadPadding) {
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
    token += here;
  }
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = acc + r * job.values.padded + v * Isa::kRows;
      const auto product = Isa::mul(Isa::to_floats(sum[r][v]), Isa::set_floats(steps[r]));
      Isa::store(to, Isa::add(Isa::load(to), product));
    }
  }
}

template <class Isa>
void sum_values_of_codes(const ValueJob& job) {
  alignas(64) std::int16_t weights[kWeightRows * kPartTokens];
  float steps[kWeightRows];
  for (std::int64_t first = 0; first < job.rows; first += kWeightRows) {
    const int rows = lesser(job.rows - first, kWeightRows);
    for (std::int64_t d = 0; d < job.values.dim; d += kValueGroup) {
      for (int r = 0; r < rows; ++r) {
        steps[r] = round_weights<Isa>(job, first + r, d / kValueGroup, weights + r * kPartTokens);
      }
      const std::int64_t end = d + kValueGroup < job.values.padded ? d + kValueGroup : job.values.padded;
      for (std::int64_t column = d; column < end; column += kHeadPadding) {
        for_row_tiles<kAttendTile<Isa>>(rows, [&]<int kRows>(std::int64_t r) __attribute__((always_inline)) {
          add_strip<Isa, kRows>(job, column, weights + r * kPartTokens, steps + r,
                                job.acc + (first + r) * job.values.padded + column);
        });
      }
    }
  }
}
