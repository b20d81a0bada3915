// Activations to int8, per row and group. Included inside an anonymous namespace, once an ISA; the compiler vectorizes
// it.

// A group whose largest magnitude is below this counts as zero: 127 / amax must stay finite.
constexpr float kTinyGroup = 0x1p-100f;
// Adding 1.5 * 2^23 leaves the nearest integer (ties to even) of |v| < 2^22 in the low bits of the float.
constexpr float kRoundingMagic = 12582912.0f;

// Largest |x| as float bits: non-negative floats order like their bits, and NaN and infinity come out on top.
LLMQ_INLINE std::uint32_t max_magnitude_bits(const float* x, int n) {
  std::int32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const std::int32_t magnitude = static_cast<std::int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<std::uint32_t>(largest);
}

// q = round(x * inverse), ties to even; returns the sum of q. |x * inverse| <= 127 * (1 + 2^-22), so q needs no clamp.
LLMQ_INLINE std::int32_t round_group(const float* x, int n, float inverse, std::int8_t* q) {
  std::int32_t total = 0;
  for (int i = 0; i < n; ++i) {
    const std::int32_t code = static_cast<std::int32_t>(float_to_bits(x[i] * inverse + kRoundingMagic) & 0xffu);
    const std::int8_t value = static_cast<std::int8_t>(code);
    q[i] = value;
    total += value;
  }
  return total;
}

// Inlined where n is known.
LLMQ_INLINE void round_columns(const float* x, int n, std::int8_t* q, float* scale, std::int32_t* total) {
  const std::uint32_t bits = max_magnitude_bits(x, n);
  const float amax = bits_to_float(bits);
  if (bits >= 0x7f800000u || amax < kTinyGroup) {
    // A NaN scale makes every output of the row NaN; a finite result would hide the bad input.
    *scale = bits >= 0x7f800000u ? bits_to_float(0x7fc00000u) : 0.0f;
    *total = 0;
    for (int i = 0; i < n; ++i) q[i] = 0;
    return;
  }
  *scale = amax / 127.0f;
  *total = round_group(x, n, 127.0f / amax, q);
}

void quantize_group(const float* x, int n, std::int8_t* q, float* scale, std::int32_t* total) {
  round_columns(x, n, q, scale, total);
}

void quantize_rows(const float* x, Range rows, std::int64_t k, std::int64_t group, const QuantizedRows& out) {
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    std::int8_t* q = out.q + row * out.stride;
    for (std::int64_t g = 0; g < out.groups; ++g) {
      const std::int64_t column = g * group;
      const std::int64_t width = k - column < group ? k - column : group;
      const std::int64_t at = row * out.groups + g;
      quantize_group(x + row * k + column, static_cast<int>(width), q + column, out.scale + at, out.total + at);
    }
    for (std::int64_t column = k; column < out.stride; ++column) q[column] = 0;
  }
}
