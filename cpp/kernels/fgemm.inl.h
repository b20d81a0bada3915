// out = x @ W^T with activations in float: for matrices that are not quantized, and to check the int8 kernels on those
// that are. Included inside an anonymous namespace, once an ISA.

struct LoadFloat {
  using Type = float;
  template <class Isa>
  static LLMQ_INLINE typename Isa::Floats load(const float* p) {
    return Isa::load(p);
  }
  static float one(float value) { return value; }
};
struct LoadHalf {
  using Type = std::uint16_t;
  template <class Isa>
  static LLMQ_INLINE typename Isa::Floats load(const std::uint16_t* p) {
    return Isa::halves_to_floats(p);
  }
  static float one(std::uint16_t value) { return half_to_float(value); }
};
struct LoadBrain {
  using Type = std::uint16_t;
  template <class Isa>
  static LLMQ_INLINE typename Isa::Floats load(const std::uint16_t* p) {
    return Isa::brains_to_floats(p);
  }
  static float one(std::uint16_t value) { return bits_to_float(static_cast<std::uint32_t>(value) << 16); }
};

// out[t * out_stride] = row . x_t for kTokens tokens.
template <class Isa, class Load, int kTokens>
LLMQ_INLINE void dot_tokens(const typename Load::Type* row, std::int64_t k, const float* x, std::int64_t x_stride,
                            float bias, float* out, std::int64_t out_stride) {
  constexpr int kLanes = Isa::kRows;
  constexpr int kChains = 2;  // the same for one token and for many: the same order of additions, the same bits
  typename Isa::Floats sum[kTokens][kChains];
  LLMQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    LLMQ_UNROLL
    for (int c = 0; c < kChains; ++c) sum[t][c] = Isa::set_floats(0.0f);
  }
  std::int64_t i = 0;
  for (; i + kLanes * kChains <= k; i += kLanes * kChains) {
    LLMQ_UNROLL
    for (int c = 0; c < kChains; ++c) {
      const auto w = Load::template load<Isa>(row + i + c * kLanes);
      LLMQ_UNROLL
      for (int t = 0; t < kTokens; ++t)
        sum[t][c] = Isa::fma(w, Isa::load(x + t * x_stride + i + c * kLanes), sum[t][c]);
    }
  }
  LLMQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    float lanes[kChains * kLanes];
    LLMQ_UNROLL
    for (int c = 0; c < kChains; ++c) Isa::store(lanes + c * kLanes, sum[t][c]);
    float total = 0.0f;
    for (int j = 0; j < kChains * kLanes; ++j) total += lanes[j];
    for (std::int64_t j = i; j < k; ++j) total += Load::one(row[j]) * x[t * x_stride + j];
    out[t * out_stride] = total + bias;
  }
}

template <class Isa, class Load>
void dot_row(const typename Load::Type* weights, std::int64_t row, const FloatGemm& job, Range tokens) {
  const float bias = job.bias ? job.bias[row] : 0.0f;
  std::int64_t t = tokens.begin;
  for (; t + 4 <= tokens.end; t += 4) {
    dot_tokens<Isa, Load, 4>(weights, job.k, job.x + t * job.x_stride, job.x_stride, bias,
                             job.out + t * job.out_stride + row, job.out_stride);
  }
  for (; t < tokens.end; ++t) {
    dot_tokens<Isa, Load, 1>(weights, job.k, job.x + t * job.x_stride, job.x_stride, bias,
                             job.out + t * job.out_stride + row, job.out_stride);
  }
}

// W dense, row-major.
template <class Isa, class Load>
void fgemm_dense(const FloatGemm& job, Range rows, Range tokens) {
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    dot_row<Isa, Load>(static_cast<const typename Load::Type*>(job.dense) + row * job.k, row, job, tokens);
  }
}

// A row that was dequantized into `row` f32[k].
template <class Isa>
void fgemm_row(const FloatGemm& job, const float* weights, std::int64_t row, Range tokens) {
  dot_row<Isa, LoadFloat>(weights, row, job, tokens);
}

// out f32[k] = row `row` of a dense matrix.
template <class Load>
void take_dense(const void* dense, std::int64_t k, std::int64_t row, float* out) {
  const auto* from = static_cast<const typename Load::Type*>(dense) + row * k;
  for (std::int64_t i = 0; i < k; ++i) out[i] = Load::one(from[i]);
}
