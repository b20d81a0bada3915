// Norms, rotary embedding, activations and soft caps on rows of floats. Included inside an anonymous namespace, once an
// ISA; the compiler vectorizes it. LLMQ_ELEMENTWISE: element i of the result needs element i of the inputs only, so an
// output may be one of the inputs.

// exp(x) for -88 <= x <= 88, relative error below 2^-22: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial for e^r. Where n
// is -127 (below -87.7, e^x is no normal float) the bits of 2^n are those of 0, and so is the result.
// Of floats, or of vectors of them.
template <class Floats = float, class Bits = std::uint32_t>
LLMQ_INLINE Floats exp_within_88(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats shifted = x * 1.44269504f + kMagic;
  const Floats n = shifted - kMagic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  constexpr std::uint32_t kMagicBits = 0x4b400000u;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - kMagicBits + 127u) << 23;
  Floats power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// exp(x) for float x. Below -87 the result is that of -87 (1.6e-38), above 88 that of 88; NaN stays NaN.
LLMQ_INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  return exp_within_88(x);
}

LLMQ_INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

constexpr int kSumLanes = 32;  // independent partial sums: enough for two vectors of any ISA to be in flight

float add_lanes(const float* lanes) {
  float half[16];
  for (int i = 0; i < 16; ++i) half[i] = lanes[i] + lanes[i + 16];
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += half[i];
  return sum;
}

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  float lanes[kSumLanes] = {};
  std::int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (; i < n; ++i) lanes[0] += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(add_lanes(lanes) / static_cast<float>(n) + eps);
  LLMQ_ELEMENTWISE
  for (i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

void add_rows(float* x, const float* y, std::int64_t n) {
  LLMQ_ELEMENTWISE
  for (std::int64_t i = 0; i < n; ++i) x[i] += y[i];
}

// Rotate the pairs (x[i], x[i + half]) by the angles behind cos and sin, then multiply by `scale`.
void rope(float* x, const float* cosine, const float* sine, std::int64_t half, float scale) {
  float* y = x + half;
  LLMQ_ELEMENTWISE
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = y[i];
    x[i] = (a * cosine[i] - b * sine[i]) * scale;
    y[i] = (b * cosine[i] + a * sine[i]) * scale;
  }
}

// x = x * H / sqrt(size), H the Hadamard matrix of the largest power of two `size` that divides n, block by block.
void hadamard(float* x, std::int64_t n) {
  const std::int64_t size = n & -n;
  for (std::int64_t half = 1; half < size; half *= 2) {
    for (std::int64_t i = 0; i < n; i += 2 * half) {
      float *low = x + i, *high = low + half;
      LLMQ_ELEMENTWISE
      for (std::int64_t j = 0; j < half; ++j) {
        const float a = low[j], b = high[j];
        low[j] = a + b;
        high[j] = a - b;
      }
    }
  }
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  LLMQ_ELEMENTWISE
  for (std::int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// out = silu(gate) * up
void gated_silu(const float* gate, const float* up, std::int64_t n, float* out) {
  LLMQ_ELEMENTWISE
  for (std::int64_t i = 0; i < n; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// out = gelu(gate) * up, gelu in its tanh form: x * (1 + tanh(u)) / 2 = x * sigmoid(2u), u = sqrt(2/pi)(x + 0.044715
// x^3)
void gated_gelu(const float* gate, const float* up, std::int64_t n, float* out) {
  LLMQ_ELEMENTWISE
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = gate[i];
    const float u = 0.79788456f * (x + 0.044715f * x * x * x);
    out[i] = x * sigmoid(2.0f * u) * up[i];
  }
}

// x = cap * tanh(x / cap)
void softcap(float* x, std::int64_t n, float cap) {
  const float scale = 2.0f / cap;
  LLMQ_ELEMENTWISE
  for (std::int64_t i = 0; i < n; ++i) x[i] = cap * (2.0f * sigmoid(x[i] * scale) - 1.0f);
}
