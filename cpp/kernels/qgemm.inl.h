// out = x @ W^T over LQ16 panels, int8 activations. Included inside an anonymous namespace, once an ISA.
//
// A lane is an output row: a 4-byte load brings four columns ("quad") of a token to every lane, so no sum ever crosses
// lanes. Few tokens read the codes from the packed panels as they go. Many tokens ("sweep") unpack a strip of some
// columns to one byte a code in a small buffer, once, and pass all tokens over it. Both take the groups in the same
// order and give the same bits.

constexpr int kBlockQuads = kBlockColumns / 4;
// Tokens of a sweep: unpacking is paid once for them, their sums stay in the level 1 cache.
constexpr int kSweepTokens = 48;
// Columns unpacked at a time; a panel's 16 rows of them fill a quarter of a level 1 cache.
constexpr int kStripColumns = 512;
// How far ahead of the codes in use one token's reading asks memory: further than DRAM's latency at its full speed.
constexpr int kPrefetchBytes = 1024;

// Codes of quad `i` of a block of 32 columns, a byte each, of the rows whose bytes `block` points to.
template <class Isa, int kBits>
LLMQ_INLINE typename Isa::Bytes unpack_quad(const std::uint8_t* block, int i) {
  if constexpr (kBits == 8) {
    return Isa::load_bytes(block + i * kVectorBytes);
  } else if constexpr (kBits == 4) {
    return Isa::bits_at(Isa::load_bytes(block + i / 2 * kVectorBytes), i % 2 * 4, 15);
  } else {
    const auto low = Isa::bits_at(Isa::load_bytes(block + i / 4 * kVectorBytes), i % 4 * 2, 3);
    if constexpr (kBits == 2) return low;
    return Isa::either(low, Isa::bits_at(Isa::load_bytes(block + 2 * kVectorBytes), i - 2, 4));
  }
}

// Where a group's codes come from: the packed panel, or the bytes of a sweep. A Dot may cut codes into planes of fewer
// bits, whose products fit its narrow sums.
template <class Isa, int kBits>
struct FromPanel {
  using D = Dot<kBits>;
  static constexpr int kBlockBytes = kBits * kVectorBytes;

  static LLMQ_INLINE typename Isa::Bytes codes(const std::uint8_t* block, int plane, int i) {
    const auto whole = unpack_quad<Isa, kBits>(block, i);
    if constexpr (D::kPlanes == 1) return whole;
    return Isa::bits_at(whole, plane * (kBits / D::kPlanes), (1 << kBits / D::kPlanes) - 1);
  }
  static LLMQ_INLINE void prefetch(const std::uint8_t* block) {
    LLMQ_UNROLL
    for (int i = 0; i < kBits; ++i) __builtin_prefetch(block + kPrefetchBytes + i * kVectorBytes);
  }
};

template <class Isa, int kBits>
struct FromStrip {
  using D = Dot<kBits>;
  static constexpr int kBlockBytes = D::kPlanes * kBlockQuads * kVectorBytes;

  static LLMQ_INLINE typename Isa::Bytes codes(const std::uint8_t* block, int plane, int i) {
    return Isa::load_bytes(block + (plane * kBlockQuads + i) * kVectorBytes);
  }
  static LLMQ_INLINE void prefetch(const std::uint8_t*) {}
};

std::int64_t blocks_of(std::int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

// Columns of a group; the last one may be shorter.
std::int64_t group_columns(const PackedMatrix& w, std::int64_t group) {
  const std::int64_t left = w.k - group * w.group;
  return left < w.group ? left : w.group;
}

// kTokens tokens against kPanels panels. `codes` is where the codes of the first group of a run begin.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
struct Tile {
  using D = Dot<kBits>;
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  static constexpr int kPerPanel = kPanelRows / Isa::kRows;
  static constexpr int kVectors = kPanels * kPerPanel;
  // One token has too few sums to hide the latency of a long dot product: each is cut into several.
  static constexpr int kChains = kTokens == 1 ? D::kChains : 1;

  const Qgemm& job;
  const std::uint8_t* const (&codes)[kPanels];
  const std::uint8_t* const (&panels)[kPanels];
  std::int64_t token;

  // acc = (offset - zero) * sum(x): from here on the zero point is exact and free.
  LLMQ_INLINE void start(std::int64_t group, Ints (&acc)[kTokens][kVectors]) const {
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const std::int32_t total = job.x.total[(token + t) * job.x.groups + group];
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const std::uint8_t* zeros = panels[v / kPerPanel] + job.w.zeros_offset +
                                    group / job.w.share * kPanelRows + v % kPerPanel * Isa::kRows;
        acc[t][v] = job.w.zeros_offset ? Isa::offset_minus_zeros_times(D::kOffset, zeros, total)
                                       : Isa::set_ints((D::kOffset - job.w.mid) * total);
      }
    }
  }

  // acc += dot products of blocks that together are short enough for narrow partial sums.
  LLMQ_INLINE void add_span(const std::int8_t* q, std::int64_t first, int blocks, int plane,
                            Ints (&acc)[kTokens][kVectors]) const {
    typename D::Part part[kTokens][kVectors][kChains];
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        LLMQ_UNROLL
        for (int c = 0; c < kChains; ++c) part[t][v][c] = D::zero();
      }
    }
    for (int b = 0; b < blocks; ++b) {
      const std::int64_t at = (first + b) * Source::kBlockBytes;
      const std::int8_t* x = q + b * kBlockColumns;
      LLMQ_UNROLL
      for (int p = 0; p < kPanels; ++p) Source::prefetch(codes[p] + at);
      LLMQ_UNROLL
      for (int i = 0; i < kBlockQuads; ++i) {
        typename D::Operand weight[kVectors];
        LLMQ_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const std::uint8_t* rows = codes[v / kPerPanel] + at + v % kPerPanel * Isa::kRows * 4;
          weight[v] = D::operand(Source::codes(rows, plane, i));
        }
        LLMQ_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const auto four = Isa::broadcast4(x + t * job.x.stride + 4 * i);
          LLMQ_UNROLL
          for (int v = 0; v < kVectors; ++v)
            part[t][v][i % kChains] = D::add(part[t][v][i % kChains], weight[v], four);
        }
      }
    }
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        LLMQ_UNROLL
        for (int c = 0; c < kChains; ++c) acc[t][v] = D::widen(acc[t][v], part[t][v][c], plane);
      }
    }
  }

  // sums[t][row] += float(acc) * (weight scale * activation scale)
  LLMQ_INLINE void add_scaled(std::int64_t group, const Ints (&acc)[kTokens][kVectors], float* sums) const {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const auto* scales = reinterpret_cast<const std::uint16_t*>(panels[v / kPerPanel]);
      const Floats weight_scale =
          Isa::halves_to_floats(scales + group / job.w.share * kPanelRows + v % kPerPanel * Isa::kRows);
      LLMQ_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Floats scale = Isa::mul(weight_scale, Isa::set_floats(job.x.scale[(token + t) * job.x.groups + group]));
        float* sum = sums + t * kPanels * kPanelRows + v * Isa::kRows;
        Isa::store(sum, Isa::add(Isa::load(sum), Isa::mul(Isa::to_floats(acc[t][v]), scale)));
      }
    }
  }

  void run(Range groups, float* sums) const {
    std::int64_t block = 0;
    for (std::int64_t group = groups.begin; group < groups.end; ++group) {
      Ints acc[kTokens][kVectors];
      start(group, acc);
      const std::int8_t* q = job.x.q + token * job.x.stride + group * job.w.group;
      int left = static_cast<int>(blocks_of(group_columns(job.w, group)));
      while (left > 0) {
        const int blocks = left < D::kSpanBlocks ? left : D::kSpanBlocks;
        for (int plane = 0; plane < D::kPlanes; ++plane) add_span(q, block, blocks, plane, acc);
        q += blocks * kBlockColumns;
        block += blocks;
        left -= blocks;
      }
      add_scaled(group, acc, sums);
    }
  }
};

// A tile of exactly `tokens` <= kTokens tokens.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
void run_tile(int tokens, const Qgemm& job, const std::uint8_t* const (&codes)[kPanels],
              const std::uint8_t* const (&panels)[kPanels], std::int64_t token, Range groups, float* sums) {
  if (tokens == kTokens) {
    Tile<Isa, kBits, Source, kPanels, kTokens>{job, codes, panels, token}.run(groups, sums);
  } else if constexpr (kTokens > 1) {
    run_tile<Isa, kBits, Source, kPanels, kTokens - 1>(tokens, job, codes, panels, token, groups, sums);
  }
}

// All tokens, in tiles of nearly equal size: a remainder of one token would read the codes for little work.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
void run_tiles(const Qgemm& job, const std::uint8_t* const (&codes)[kPanels],
               const std::uint8_t* const (&panels)[kPanels], Range tokens, Range groups, float* sums) {
  int tiles = static_cast<int>((tokens.end - tokens.begin + kTokens - 1) / kTokens);
  for (std::int64_t t = tokens.begin; t < tokens.end; --tiles) {
    const int size = static_cast<int>((tokens.end - t + tiles - 1) / tiles);
    run_tile<Isa, kBits, Source, kPanels, kTokens>(size, job, codes, panels, t, groups,
                                                   sums + (t - tokens.begin) * kPanels * kPanelRows);
    t += size;
  }
}

// The codes of some blocks of a panel, a byte each.
template <class Isa, int kBits>
void unpack_strip(const std::uint8_t* packed, std::int64_t blocks, std::uint8_t* strip) {
  using Packed = FromPanel<Isa, kBits>;
  using Strip = FromStrip<Isa, kBits>;
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (int plane = 0; plane < Dot<kBits>::kPlanes; ++plane) {
      LLMQ_UNROLL
      for (int i = 0; i < kBlockQuads; ++i) {
        for (int byte = 0; byte < kVectorBytes; byte += Isa::kRows * 4) {
          Isa::store_bytes(strip + b * Strip::kBlockBytes + (plane * kBlockQuads + i) * kVectorBytes + byte,
                           Packed::codes(packed + b * Packed::kBlockBytes + byte, plane, i));
        }
      }
    }
  }
}

template <class Isa, int kBits, int kPanels>
void sweep(const Qgemm& job, const std::uint8_t* const (&panels)[kPanels], Range tokens, float* sums) {
  using Strip = FromStrip<Isa, kBits>;
  constexpr int kStripBytes = kStripColumns / kBlockColumns * Strip::kBlockBytes;
  alignas(64) std::uint8_t strips[kPanels][kStripBytes];
  const std::uint8_t* codes[kPanels];
  for (int p = 0; p < kPanels; ++p) codes[p] = strips[p];
  const std::int64_t step = kStripColumns / job.w.group;
  for (std::int64_t group = 0; group < job.w.groups; group += step) {
    const Range groups{group, group + step < job.w.groups ? group + step : job.w.groups};
    const std::int64_t first = blocks_of(group * job.w.group);
    const std::int64_t left = job.w.k - group * job.w.group;
    const std::int64_t blocks = blocks_of(left < step * job.w.group ? left : step * job.w.group);
    for (int p = 0; p < kPanels; ++p) {
      unpack_strip<Isa, kBits>(panels[p] + job.w.payload_offset + first * FromPanel<Isa, kBits>::kBlockBytes, blocks,
                               strips[p]);
    }
    run_tiles<Isa, kBits, Strip, kPanels, Isa::kTileTokens>(job, codes, panels, tokens, groups, sums);
  }
}

// At most kSweepTokens tokens against kPanels neighbouring panels.
template <class Isa, int kBits, int kPanels>
void run_panels(const Qgemm& job, std::int64_t panel, Range tokens) {
  const std::int64_t count = tokens.end - tokens.begin;
  alignas(64) float sums[kSweepTokens * kPanels * kPanelRows];
  for (std::int64_t i = 0; i < count * kPanels * kPanelRows; ++i) sums[i] = 0.0f;
  const std::uint8_t* panels[kPanels];
  const std::uint8_t* codes[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    panels[p] = job.w.panels + (panel + p) * job.w.panel_stride;
    codes[p] = panels[p] + job.w.payload_offset;
  }
  if (count <= Isa::kDirectTokens) {
    run_tiles<Isa, kBits, FromPanel<Isa, kBits>, kPanels, Isa::kDirectTokens>(job, codes, panels, tokens,
                                                                              {0, job.w.groups}, sums);
  } else {
    sweep<Isa, kBits, kPanels>(job, panels, tokens, sums);
  }
  const std::int64_t row = panel * kPanelRows;
  const std::int64_t rows = job.w.n - row < kPanels * kPanelRows ? job.w.n - row : kPanels * kPanelRows;
  for (std::int64_t t = 0; t < count; ++t) {
    float* out = job.out + (tokens.begin + t) * job.out_stride + row;
    const float* sum = sums + t * kPanels * kPanelRows;
    for (std::int64_t r = 0; r < rows; ++r) out[r] = job.bias ? sum[r] + job.bias[row + r] : sum[r];
  }
}

template <class Isa, int kBits>
void qgemm(const Qgemm& job, Range panels, Range tokens) {
  for (std::int64_t t = tokens.begin; t < tokens.end; t += kSweepTokens) {
    const Range some{t, t + kSweepTokens < tokens.end ? t + kSweepTokens : tokens.end};
    std::int64_t p = panels.begin;
    for (; p + Isa::kTilePanels <= panels.end; p += Isa::kTilePanels) {
      run_panels<Isa, kBits, Isa::kTilePanels>(job, p, some);
    }
    for (; p < panels.end; ++p) run_panels<Isa, kBits, 1>(job, p, some);
  }
}
