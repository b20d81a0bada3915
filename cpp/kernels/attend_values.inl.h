// The weighted sum of values that are stored as codes, behind attend_codes.inl.h. Included inside an anonymous
// namespace, once an ISA.
//
// It is in integers: a row's weights, each times its value's scale, become 15-bit integers with one scale a part, and
// products of 16 bits are summed exactly over the part.

constexpr int kWeightRows = 24;  // whose integer weights are held at a time
constexpr float kWeightSteps = 32767.0f;

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

// Strips of 16 columns whose sums are kept together: all that fit in the registers with those of kAttendTile rows.
template <class Isa>
constexpr int kStripsTogether = Isa::kRows >= 16 ? 2 : 1;

// (number >> kShift), kBits of it: the topmost need no mask.
template <class Isa, int kBits, int kShift>
LLMQ_INLINE typename Isa::Pairs code_bits(typename Isa::Pairs bytes) {
  const auto low = kShift > 0 ? Isa::pairs_above(bytes, kShift) : bytes;
  return kShift + kBits < 8 ? Isa::bits_of_pairs(low, (1 << kBits) - 1) : low;
}

// The codes of a pair of tokens in kTogether strips from `column` on, whose codes begin at bit kShift.
template <class Isa, int kBits, int kTogether, int kShift>
struct StripCodes {
  static constexpr int kVectors = kHeadPadding / Isa::kRows;
  static constexpr int kSources = kBits == 8 ? kTogether : 1;  // strips of fewer bits share bytes
  using Pairs = typename Isa::Pairs[kTogether * kVectors];

  const std::uint8_t* at[kSources];

  LLMQ_INLINE StripCodes(const KvRows& values, std::int64_t token, std::int64_t column) {
    LLMQ_UNROLL
    for (int s = 0; s < kSources; ++s) at[s] = value_codes_of<kBits>(values, token, column + s * kHeadPadding);
  }
  LLMQ_INLINE void next(Pairs& values) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kBits == 8) {
        LLMQ_UNROLL
        for (int s = 0; s < kTogether; ++s) {
          values[s * kVectors + v] = Isa::load_pairs(reinterpret_cast<const std::int8_t*>(at[s]) + v * 2 * Isa::kRows);
        }
      } else {
        const auto bytes = Isa::load_unsigned_pairs(at[0] + v * 2 * Isa::kRows);
        values[v] = code_bits<Isa, kBits, kShift>(bytes);
        if constexpr (kTogether == 2) values[kVectors + v] = code_bits<Isa, kBits, kShift + kBits>(bytes);
      }
    }
    LLMQ_UNROLL
    for (int s = 0; s < kSources; ++s) at[s] += kPairBytes;
  }
};

// acc[row] += weights . values of kTogether strips from `column` on, for kRows query rows from `row` on among those
// rounded. No sum overflows: a part's is at most 128 * 32767 * 128 < 2^31.
template <class Isa, int kBits, int kTogether, int kShift, int kRows>
LLMQ_INLINE void add_strips(const ValueJob& job, std::int64_t column, const RoundedWeights& weights, std::int64_t row,
                            float* acc, Fetch& fetch, std::int64_t lines) {
  constexpr int kVectors = kTogether * kHeadPadding / Isa::kRows;
  typename Isa::Ints sum[kRows][kVectors];
  LLMQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::set_ints(weights.offset[row + r]);
  }
  const std::int16_t* codes = weights.codes[row];
  for (std::int64_t token = job.tokens.begin; token < job.tokens.end; token += kKeyTokens) {
    fetch.next(lines);
    StripCodes<Isa, kBits, kTogether, kShift> strips(job.values, token, column);
    for (int pair = 0; pair < kKeyTokens / 2; ++pair, codes += 2) {
      typename Isa::Pairs values[kVectors];
      strips.next(values);
      LLMQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const auto weight = Isa::broadcast_pair(codes + r * kPartTokens);
        LLMQ_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Isa::add_pairs(sum[r][v], values[v], weight);
      }
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

// The same for all `rows` rows that were rounded.
template <class Isa, int kBits, int kTogether, int kShift>
__attribute__((noinline)) void add_rows_of_strips(const ValueJob& job, std::int64_t column,
                                                  const RoundedWeights& weights, std::int64_t rows, float* acc,
                                                  Fetch& fetch, std::int64_t lines) {
  for_row_tiles<kAttendTile<Isa>>(rows, [&]<int kRows>(std::int64_t r) __attribute__((always_inline)) {
    add_strips<Isa, kBits, kTogether, kShift, kRows>(job, column, weights, r, acc + r * job.values.padded + column,
                                                     fetch, r == 0 ? lines : 0);
  });
}

// The same, where strips begin at any bit.
template <class Isa, int kBits, int kTogether, int kShift = 0>
LLMQ_INLINE void add_strips_at(const ValueJob& job, std::int64_t column, const RoundedWeights& weights,
                               std::int64_t rows, float* acc, Fetch& fetch, std::int64_t lines) {
  if constexpr (kBits < 8 && kShift + kBits * kStripsTogether<Isa> < 8) {
    if (shift_of<kBits>(column) != kShift) {
      add_strips_at<Isa, kBits, kTogether, kShift + kBits * kStripsTogether<Isa>>(job, column, weights, rows, acc,
                                                                                  fetch, lines);
      return;
    }
  }
  add_rows_of_strips<Isa, kBits, kTogether, kShift>(job, column, weights, rows, acc, fetch, lines);
}

template <class Isa, int kBits>
void sum_values_of_codes(const ValueJob& job) {
  constexpr int kTogether = kStripsTogether<Isa>, kColumns = kTogether * kHeadPadding;
  RoundedWeights weights;
  Fetch fetch(job.ahead);
  const std::int64_t lines = lines_a_step(fetch, (job.values.padded + kColumns - 1) / kColumns * blocks_of(job.tokens));
  for (std::int64_t first = 0; first < job.rows; first += kWeightRows) {
    const int rows = lesser(job.rows - first, kWeightRows);
    float* acc = job.acc + first * job.values.padded;
    for (std::int64_t g = 0; g < job.values.groups(); ++g) {
      for (int r = 0; r < rows; ++r) {
        round_weights<Isa>(job, first + r, g, r, weights);
        weights.offset[r] = kBits < 8 ? -weighted_zeros(job, g, weights.codes[r]) : 0;
      }
      std::int64_t column = g * job.values.group;
      const std::int64_t end = column + lesser(job.values.padded - column, static_cast<int>(job.values.group));
      for (; column + kColumns <= end; column += kColumns) {
        add_strips_at<Isa, kBits, kTogether>(job, column, weights, rows, acc, fetch, lines);
      }
      if (kTogether > 1 && column < end) add_strips_at<Isa, kBits, 1>(job, column, weights, rows, acc, fetch, lines);
    }
  }
}
