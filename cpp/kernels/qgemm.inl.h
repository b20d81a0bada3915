// out = x @ W^T over LQ16 panels, int8 activations. Included inside an anonymous namespace, once an ISA.
//
// A tile is kVectors row vectors (of Isa::kRows output rows each) x kTokens tokens. One 4-byte load brings four columns
// of a token to every lane; a lane is an output row, so no sum ever crosses lanes. The integer accumulator starts at
// (offset - zero) * sum(x) instead of 0, which makes the zero point exact and free.

// Columns between two widenings of a dot product's narrow partial sums (see Dot<>::Part in isa/avx2.h).
constexpr int kBlockColumns = 32;

template <class Isa>
const std::uint8_t* panel_of(const PackedMatrix& w, std::int64_t vector) {
  return w.panels + vector / (kPanelRows / Isa::kRows) * w.panel_stride;
}

template <class Isa>
int row_in_panel(std::int64_t vector) {
  return static_cast<int>(vector % (kPanelRows / Isa::kRows)) * Isa::kRows;
}

template <class Isa, int kBits, int kVectors, int kTokens>
struct Tile {
  using D = Dot<kBits>;
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  static constexpr int kColumns = 4 * D::kOperands;  // columns of a step
  static constexpr int kBlockSteps = kBlockColumns / kColumns;

  const std::uint8_t* panel[kVectors];
  int lane[kVectors];  // first row of the vector within its panel
  const std::int8_t* q[kTokens];
  Ints acc[kTokens][kVectors];
  Floats sum[kTokens][kVectors];

  LLMQ_INLINE void start(const Qgemm& job, std::int64_t group, std::int64_t token) {
    for (int v = 0; v < kVectors; ++v) {
      const std::uint8_t* zeros = panel[v] + job.w.zeros_offset + group * kPanelRows + lane[v];
      for (int t = 0; t < kTokens; ++t) {
        const std::int32_t total = job.x.total[(token + t) * job.x.groups + group];
        acc[t][v] = job.w.zeros_offset ? Isa::offset_minus_zeros_times(D::kOffset, zeros, total)
                                       : Isa::set_ints((D::kOffset - job.w.mid) * total);
      }
    }
  }

  // acc += dot products over `steps` steps; at most one block, so that narrow partial sums cannot overflow.
  LLMQ_INLINE void block(const PackedMatrix& w, std::int64_t first_step, int steps) {
    typename D::Part part[kTokens][kVectors];
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) part[t][v] = D::begin(acc[t][v]);
    }
    for (int s = 0; s < steps; ++s) {
      typename D::Operand weight[kVectors][D::kOperands];
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        D::unpack(panel[v] + w.payload_offset + (first_step + s) * kStepBytes + 4 * lane[v], weight[v]);
      }
      LLMQ_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        LLMQ_UNROLL
        for (int i = 0; i < D::kOperands; ++i) {
          const auto four = Isa::broadcast4(q[t] + (first_step + s) * kColumns + 4 * i);
          LLMQ_UNROLL
          for (int v = 0; v < kVectors; ++v) part[t][v] = D::add(part[t][v], weight[v][i], four);
        }
      }
    }
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[t][v] = D::end(acc[t][v], part[t][v]);
    }
  }

  LLMQ_INLINE void add_group(const Qgemm& job, std::int64_t group, std::int64_t token) {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const auto* scales = reinterpret_cast<const std::uint16_t*>(panel[v]) + group * kPanelRows + lane[v];
      const Floats weight_scale = Isa::halves_to_floats(scales);
      LLMQ_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Floats scale = Isa::mul(weight_scale, Isa::set_floats(job.x.scale[(token + t) * job.x.groups + group]));
        sum[t][v] = Isa::add(sum[t][v], Isa::mul(Isa::to_floats(acc[t][v]), scale));
      }
    }
  }

  LLMQ_INLINE void store(const Qgemm& job, std::int64_t vector, std::int64_t token) const {
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t row = (vector + v) * Isa::kRows;
      const std::int64_t left = job.w.n - row;
      const int rows = left < Isa::kRows ? static_cast<int>(left) : Isa::kRows;
      for (int t = 0; t < kTokens; ++t) {
        float* out = job.out + (token + t) * job.out_stride + row;
        float values[Isa::kRows];
        Isa::store(values, sum[t][v]);
        for (int r = 0; r < rows; ++r) out[r] = job.bias ? values[r] + job.bias[row + r] : values[r];
      }
    }
  }
};

template <class Isa, int kBits, int kVectors, int kTokens>
void run_tile(const Qgemm& job, std::int64_t vector, std::int64_t token) {
  using T = Tile<Isa, kBits, kVectors, kTokens>;
  T tile;
  for (int v = 0; v < kVectors; ++v) {
    tile.panel[v] = panel_of<Isa>(job.w, vector + v);
    tile.lane[v] = row_in_panel<Isa>(vector + v);
  }
  for (int t = 0; t < kTokens; ++t) {
    tile.q[t] = job.x.q + (token + t) * job.x.stride;
    for (int v = 0; v < kVectors; ++v) tile.sum[t][v] = Isa::set_floats(0.0f);
  }
  std::int64_t step = 0;
  for (std::int64_t group = 0; group < job.w.groups; ++group) {
    const std::int64_t left = job.w.k - group * job.w.group;
    const std::int64_t columns = left < job.w.group ? left : job.w.group;
    const std::int64_t last = step + (columns + T::kColumns - 1) / T::kColumns;
    tile.start(job, group, token);
    for (; step + T::kBlockSteps <= last; step += T::kBlockSteps) tile.block(job.w, step, T::kBlockSteps);
    if (step < last) tile.block(job.w, step, static_cast<int>(last - step));
    step = last;
    tile.add_group(job, group, token);
  }
  tile.store(job, vector, token);
}

// The tokens that do not fill a tile: one tile of exactly as many.
template <class Isa, int kBits, int kVectors, int kTokens>
void run_remainder(const Qgemm& job, std::int64_t vector, Range tokens) {
  if (tokens.end - tokens.begin == kTokens) {
    run_tile<Isa, kBits, kVectors, kTokens>(job, vector, tokens.begin);
  } else if constexpr (kTokens > 1) {
    run_remainder<Isa, kBits, kVectors, kTokens - 1>(job, vector, tokens);
  }
}

template <class Isa, int kBits, int kVectors, int kTokens>
void run_vectors(const Qgemm& job, std::int64_t vector, Range tokens) {
  std::int64_t token = tokens.begin;
  for (; token + kTokens <= tokens.end; token += kTokens) run_tile<Isa, kBits, kVectors, kTokens>(job, vector, token);
  if (token < tokens.end) run_remainder<Isa, kBits, kVectors, kTokens>(job, vector, {token, tokens.end});
}

template <class Isa, int kBits, int kVectors, int kTokens>
void run_rows(const Qgemm& job, Range vectors, Range tokens) {
  std::int64_t v = vectors.begin;
  for (; v + kVectors <= vectors.end; v += kVectors) run_vectors<Isa, kBits, kVectors, kTokens>(job, v, tokens);
  for (; v < vectors.end; ++v) run_vectors<Isa, kBits, 1, kTokens>(job, v, tokens);
}

template <class Isa, int kBits>
void qgemm(const Qgemm& job, Range panels, Range tokens) {
  const std::int64_t per_panel = kPanelRows / Isa::kRows;
  const std::int64_t filled = (job.w.n + Isa::kRows - 1) / Isa::kRows;  // vectors that hold at least one row
  const std::int64_t end = panels.end * per_panel;
  const Range vectors{panels.begin * per_panel, end < filled ? end : filled};
  if (tokens.end - tokens.begin == 1) {
    run_rows<Isa, kBits, Isa::kRowVectorsOneToken, 1>(job, vectors, tokens);
  } else {
    run_rows<Isa, kBits, Isa::kTileVectors, Isa::kTileTokens>(job, vectors, tokens);
  }
}
