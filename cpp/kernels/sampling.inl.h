// Passes over a row of logits, for the sampler. Included inside an anonymous namespace, once an ISA; the compiler
// vectorizes them.

constexpr int kLogitLanes = 32;  // independent chains: enough for two vectors of any ISA to be in flight

// Floats as integers of the same order: negative ones have their magnitude bits flipped.
LLMQ_INLINE std::int32_t ordered_bits(float value) {
  const std::int32_t bits = static_cast<std::int32_t>(float_to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

float max_of_block(const float* x, std::int64_t n) {
  std::int32_t largest[kLogitLanes], magnitude[kLogitLanes] = {};
  for (int j = 0; j < kLogitLanes; ++j) largest[j] = ordered_bits(x[0]);
  std::int64_t i = 0;
  for (; i + kLogitLanes <= n; i += kLogitLanes) {
    for (int j = 0; j < kLogitLanes; ++j) {
      const std::int32_t a = ordered_bits(x[i + j]);
      const std::int32_t m = static_cast<std::int32_t>(float_to_bits(x[i + j]) & 0x7fffffffu);
      largest[j] = a > largest[j] ? a : largest[j];
      magnitude[j] = m > magnitude[j] ? m : magnitude[j];
    }
  }
  std::int32_t top = largest[0], top_magnitude = magnitude[0];
  for (; i < n; ++i) {
    const std::int32_t a = ordered_bits(x[i]);
    const std::int32_t m = static_cast<std::int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    top = a > top ? a : top;
    top_magnitude = m > top_magnitude ? m : top_magnitude;
  }
  for (int j = 0; j < kLogitLanes; ++j) {
    top = largest[j] > top ? largest[j] : top;
    top_magnitude = magnitude[j] > top_magnitude ? magnitude[j] : top_magnitude;
  }
  if (top_magnitude > 0x7f800000) return bits_to_float(0x7fc00000u);
  return bits_to_float(static_cast<std::uint32_t>(top ^ ((top >> 31) & 0x7fffffff)));
}

void block_max(const float* x, std::int64_t n, float* out) {
  for (std::int64_t begin = 0; begin < n; begin += kLogitBlock) {
    out[begin / kLogitBlock] = max_of_block(x + begin, n - begin < kLogitBlock ? n - begin : kLogitBlock);
  }
}

// exp(x) for x <= 0; 0 below -87.7.
LLMQ_INLINE float decay(float x) {
  // The bound is taken on the integers: a branch on the float would keep the compiler from vectorizing.
  const std::int32_t magnitude = static_cast<std::int32_t>(float_to_bits(x) & 0x7fffffffu);
  return exp_within_88(-bits_to_float(static_cast<std::uint32_t>(magnitude < 0x42b00000 ? magnitude : 0x42b00000)));
}

float exp_sum(const float* x, std::int64_t n, float shift, float scale, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = decay((x[i] - shift) * scale);
  float lanes[kLogitLanes] = {};
  std::int64_t i = 0;
  for (; i + kLogitLanes <= n; i += kLogitLanes) {
    for (int j = 0; j < kLogitLanes; ++j) lanes[j] += out[i + j];
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += out[i];
  float sum = 0.0f;
  for (int j = 0; j < kLogitLanes; ++j) sum += lanes[j];
  return sum;
}
