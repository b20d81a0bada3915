// What an adapter adds to a product, in float: out += scale * (A x) B^T, A x being given. B is stored with its columns
// together, so that no sum runs across lanes. Included inside an anonymous namespace, once an ISA.

// kVectors vectors of columns for kTokens tokens; the sum over the ranks is ascending whatever their number.
template <class Isa, class Load, int kTokens, int kVectors>
LLMQ_INLINE void low_rank_tile(const LowRankSum& job, std::int64_t column, std::int64_t token) {
  constexpr int kLanes = Isa::kRows;
  typename Isa::Floats sum[kTokens][kVectors];
  LLMQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[t][v] = Isa::set_floats(0.0f);
  }
  const auto* b = static_cast<const typename Load::Type*>(job.b) + column;
  const float* low = job.low + token * job.rank;
  for (std::int64_t j = 0; j < job.rank; ++j, b += job.stride) {
    typename Isa::Floats row[kVectors];
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = Load::template load<Isa>(b + v * kLanes);
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const auto factor = Isa::set_floats(low[t * job.rank + j]);
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[t][v] = Isa::fma(row[v], factor, sum[t][v]);
    }
  }
  const auto scale = Isa::set_floats(job.scale);
  LLMQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    float* out = job.out + (token + t) * job.out_stride + column;
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Isa::store(out + v * kLanes, Isa::add(Isa::load(out + v * kLanes), Isa::mul(sum[t][v], scale)));
    }
  }
}

template <class Isa, class Load, int kVectors>
LLMQ_INLINE void low_rank_columns(const LowRankSum& job, std::int64_t column, Range tokens) {
  std::int64_t t = tokens.begin;
  for (; t + 4 <= tokens.end; t += 4) low_rank_tile<Isa, Load, 4, kVectors>(job, column, t);
  for (; t < tokens.end; ++t) low_rank_tile<Isa, Load, 1, kVectors>(job, column, t);
}

// The columns left over where n is no multiple of a vector.
template <class Load>
void low_rank_rest(const LowRankSum& job, Range columns, Range tokens) {
  const auto* b = static_cast<const typename Load::Type*>(job.b);
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    for (std::int64_t c = columns.begin; c < columns.end; ++c) {
      float sum = 0.0f;
      for (std::int64_t j = 0; j < job.rank; ++j) sum += Load::one(b[j * job.stride + c]) * job.low[t * job.rank + j];
      job.out[t * job.out_stride + c] += sum * job.scale;
    }
  }
}

template <class Isa, class Load>
void add_low_rank(const LowRankSum& job, Range columns, Range tokens) {
  constexpr int kLanes = Isa::kRows;
  std::int64_t c = columns.begin;
  for (; c + 2 * kLanes <= columns.end; c += 2 * kLanes) low_rank_columns<Isa, Load, 2>(job, c, tokens);
  for (; c + kLanes <= columns.end; c += kLanes) low_rank_columns<Isa, Load, 1>(job, c, tokens);
  low_rank_rest<Load>(job, {c, columns.end}, tokens);
}
