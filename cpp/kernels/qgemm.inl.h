// out = x @ W^T over LQ16 panels, int8 activations. Included inside an anonymous namespace, once an ISA.
//
// A lane is an output row: a 4-byte load brings four columns ("quad") of a token to every lane, so no sum ever crosses
// lanes. Tokens read the codes from the packed panels as they go; where unpacking costs an ISA too much for that, many
// tokens ("sweep") unpack a strip of some columns to one byte a code in a small buffer, once, and pass all tokens over
// it. Both take the groups in the same order and give the same bits.

constexpr int kBlockQuads = kBlockColumns / 4;
// Tokens that pass over a pair of panels together: they read it from a near cache, and strips are unpacked once for
// them.
constexpr int kSweepTokens = 96;
// Columns unpacked at a time; a panel's 16 rows of them fill a quarter of a level 1 cache.
constexpr int kStripColumns = 512;
// How far ahead of the codes in use reading asks memory. DRAM's latency alone would take 2 to 4 KiB at one core's full
// speed; more bridges the pauses between panels. Panels follow each other, so what lies behind the last code is of use.
constexpr int kPrefetchBytes = 8192;

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

// Where codes come from: the packed panel, or the bytes of a sweep.
template <class Isa, int kBits>
struct FromPanel {
  static constexpr int kBlockBytes = kBits * kVectorBytes;

  static LLMQ_INLINE typename Isa::Bytes codes(const std::uint8_t* block, int i) {
    return unpack_quad<Isa, kBits>(block, i);
  }
  static LLMQ_INLINE void prefetch(const std::uint8_t* block) {
    LLMQ_UNROLL
    for (int i = 0; i < kBits; ++i) __builtin_prefetch(block + kPrefetchBytes + i * kVectorBytes);
  }
};

template <class Isa, int kBits>
struct FromStrip {
  static constexpr int kBlockBytes = kBlockQuads * kVectorBytes;

  static LLMQ_INLINE typename Isa::Bytes codes(const std::uint8_t* block, int i) {
    return Isa::load_bytes(block + i * kVectorBytes);
  }
  static LLMQ_INLINE void prefetch(const std::uint8_t*) {}
};

std::int64_t blocks_of(std::int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

// Where a run of groups begins in everything that a tile of tokens and panels reads. All of it is copied here: a kernel
// that writes floats may not assume that the job's own fields stay.
template <int kPanels>
struct Cursor {
  const std::uint8_t* codes[kPanels];
  const std::uint16_t* scales[kPanels];
  const std::uint8_t* zeros[kPanels];  // null: symmetric
  const std::int8_t* q;
  const float* x_scale;
  const std::int32_t* total;
  std::int64_t stride, x_groups;  // from one token to the next: of q, of x_scale and total
  std::int64_t columns;           // left from here to the end of the run
  int group, share, left;         // columns of a group; groups of a scale, and how many of them come with the first one
  int mid;
};

// Dot products of kTokens tokens with the rows of kPanels panels.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
struct Dots {
  using D = Dot<kBits>;
  using Ints = typename Isa::Ints;
  static constexpr int kPerPanel = kPanelRows / Isa::kRows;
  static constexpr int kVectors = kPanels * kPerPanel;
  // One token has too few sums to hide the latency of a long dot product: each is cut into several.
  static constexpr int kChains = kTokens == 1 ? D::kChains : 1;
  // Partial sums that are as wide as the sums themselves go on from these.
  static constexpr bool kGoOn = D::kWide && kChains == 1;

  const std::uint8_t* codes[kPanels];
  const std::int8_t* x[kTokens];

  LLMQ_INLINE Dots(const std::uint8_t* const (&panels)[kPanels], const std::int8_t* q, std::int64_t stride) {
    LLMQ_UNROLL
    for (int p = 0; p < kPanels; ++p) codes[p] = panels[p];
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      x[t] = q + t * stride;
      __asm__(""
              : "+r"(x[t]));  // a register a token: left alone, the compiler adds multiples of the stride at every load
    }
  }

  // acc += dot products of blocks that together are short enough for narrow partial sums.
  LLMQ_INLINE void add_span(int blocks, Ints (&acc)[kTokens][kVectors]) const {
    typename D::Part part[kTokens][kVectors][kChains];
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        LLMQ_UNROLL
        for (int c = 0; c < kChains; ++c) {
          if constexpr (kGoOn) {
            part[t][v][c] = acc[t][v];
          } else {
            part[t][v][c] = D::zero();
          }
        }
      }
    }
    for (int b = 0; b < blocks; ++b) {
      LLMQ_UNROLL
      for (int p = 0; p < kPanels; ++p) Source::prefetch(codes[p] + b * Source::kBlockBytes);
      LLMQ_UNROLL
      for (int i = 0; i < kBlockQuads; ++i) {
        typename D::Operand weight[kVectors];
        LLMQ_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const std::uint8_t* rows = codes[v / kPerPanel] + v % kPerPanel * Isa::kRows * 4;
          weight[v] = D::operand(Source::codes(rows + b * Source::kBlockBytes, i));
        }
        LLMQ_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const auto four = Isa::broadcast4(x[t] + b * kBlockColumns + 4 * i);
          LLMQ_UNROLL
          for (int v = 0; v < kVectors; ++v) part[t][v][i % kChains] = D::add(part[t][v][i % kChains], weight[v], four);
        }
      }
    }
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        LLMQ_UNROLL
        for (int c = 0; c < kChains; ++c) {
          if constexpr (kGoOn) {
            acc[t][v] = part[t][v][c];
          } else {
            acc[t][v] = D::widen(acc[t][v], part[t][v][c]);
          }
        }
      }
    }
  }

  // The dot products of one group.
  LLMQ_INLINE void add_group(std::int64_t columns, Ints (&acc)[kTokens][kVectors]) {
    for (int left = static_cast<int>(blocks_of(columns)); left > 0; left -= D::kSpanBlocks) {
      const int span = left < D::kSpanBlocks ? left : D::kSpanBlocks;
      add_span(span, acc);
      LLMQ_UNROLL
      for (int t = 0; t < kTokens; ++t) x[t] += span * kBlockColumns;
      LLMQ_UNROLL
      for (int p = 0; p < kPanels; ++p) codes[p] += span * Source::kBlockBytes;
    }
  }
};

// kTokens tokens against kPanels panels.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
struct Tile : Dots<Isa, kBits, Source, kPanels, kTokens> {
  using Base = Dots<Isa, kBits, Source, kPanels, kTokens>;
  using D = Dot<kBits>;
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  static constexpr int kPerPanel = Base::kPerPanel;
  static constexpr int kVectors = Base::kVectors;
  static constexpr bool kGoOn = Base::kGoOn;

  Cursor<kPanels> at;

  LLMQ_INLINE explicit Tile(const Cursor<kPanels>& from) : Base(from.codes, from.q, from.stride), at(from) {}

  // -zero of the cursor's group
  LLMQ_INLINE void zeros(Ints (&zero)[kVectors]) const {
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const std::uint8_t* from = at.zeros[v / kPerPanel];
      if (from) from += v % kPerPanel * Isa::kRows;
      zero[v] = Isa::offset_minus_zeros(D::kOffset, from, at.mid);
    }
  }

  // acc = what the group's dot products are added to: -zero * sum(x) where sums go on from it, else 0.
  LLMQ_INLINE void begin(Ints (&acc)[kTokens][kVectors]) const {
    Ints zero[kVectors];
    if constexpr (kGoOn) zeros(zero);
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const Ints total = Isa::set_ints(at.total[t * at.x_groups]);
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[t][v] = Isa::set_ints(0);
        if constexpr (kGoOn) acc[t][v] = Isa::add_product(acc[t][v], zero[v], total);
      }
    }
  }

  // sum += float(acc, less zero * sum(x)) * (weight scale * activation scale)
  LLMQ_INLINE void add_scaled(const Ints (&acc)[kTokens][kVectors], Floats (&sum)[kTokens][kVectors]) const {
    Ints zero[kVectors];
    if constexpr (!kGoOn) zeros(zero);
    Floats scale[kVectors];
    LLMQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = Isa::halves_to_floats(at.scales[v / kPerPanel] + v % kPerPanel * Isa::kRows);
    }
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const Floats x_scale = Isa::set_floats(at.x_scale[t * at.x_groups]);
      const Ints total = Isa::set_ints(at.total[t * at.x_groups]);
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Ints dot = acc[t][v];
        if constexpr (!kGoOn) dot = Isa::add_product(dot, zero[v], total);
        sum[t][v] = Isa::add(sum[t][v], Isa::mul(Isa::to_floats(dot), Isa::mul(scale[v], x_scale)));
      }
    }
  }

  LLMQ_INLINE void next_group() {
    ++at.x_scale;
    ++at.total;
    if (--at.left > 0) return;
    at.left = at.share;
    LLMQ_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      at.scales[p] += kPanelRows;
      if (at.zeros[p]) at.zeros[p] += kPanelRows;
    }
  }

  LLMQ_INLINE void run(float* sums) {
    Floats sum[kTokens][kVectors];
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[t][v] = Isa::load(sums + t * kPanels * kPanelRows + v * Isa::kRows);
    }
    for (; at.columns > 0; at.columns -= at.group, next_group()) {
      Ints acc[kTokens][kVectors];
      begin(acc);
      this->add_group(at.columns < at.group ? at.columns : at.group, acc);
      add_scaled(acc, sum);
    }
    LLMQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LLMQ_UNROLL
      for (int v = 0; v < kVectors; ++v) Isa::store(sums + t * kPanels * kPanelRows + v * Isa::kRows, sum[t][v]);
    }
  }
};

// A tile of exactly `tokens` <= kTokens tokens.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
__attribute__((noinline)) void run_exactly(const Cursor<kPanels>& at, float* sums) {
  Tile<Isa, kBits, Source, kPanels, kTokens>(at).run(sums);
}

template <class Isa, int kBits, class Source, int kPanels, int kTokens>
void run_tile(int tokens, const Cursor<kPanels>& at, float* sums) {
  if (tokens == kTokens) {
    run_exactly<Isa, kBits, Source, kPanels, kTokens>(at, sums);
  } else if constexpr (kTokens > 1) {
    run_tile<Isa, kBits, Source, kPanels, kTokens - 1>(tokens, at, sums);
  }
}

// `tokens` tokens from the cursor's on, in tiles of nearly equal size: a remainder of one token would read the codes
// for little work.
template <class Isa, int kBits, class Source, int kPanels, int kTokens>
void run_tiles(int tokens, Cursor<kPanels> at, float* sums) {
  for (int tiles = (tokens + kTokens - 1) / kTokens; tiles > 0; --tiles) {
    const int size = (tokens + tiles - 1) / tiles;
    run_tile<Isa, kBits, Source, kPanels, kTokens>(size, at, sums);
    at.q += size * at.stride;
    at.x_scale += size * at.x_groups;
    at.total += size * at.x_groups;
    sums += size * kPanels * kPanelRows;
    tokens -= size;
  }
}

// The codes of some blocks of a panel, a byte each.
template <class Isa, int kBits>
void unpack_strip(const std::uint8_t* packed, std::int64_t blocks, std::uint8_t* strip) {
  using Strip = FromStrip<Isa, kBits>;
  for (std::int64_t b = 0; b < blocks; ++b) {
    LLMQ_UNROLL
    for (int i = 0; i < kBlockQuads; ++i) {
      for (int byte = 0; byte < kVectorBytes; byte += Isa::kRows * 4) {
        Isa::store_bytes(strip + b * Strip::kBlockBytes + i * kVectorBytes + byte,
                         unpack_quad<Isa, kBits>(packed + b * kBits * kVectorBytes + byte, i));
      }
    }
  }
}

// From group `group` of the neighbouring panels from `panel` on, and from token `token`, `columns` columns.
template <int kBits, int kPanels>
Cursor<kPanels> cursor_at(const Qgemm& job, std::int64_t panel, std::int64_t token, std::int64_t group,
                          std::int64_t columns) {
  const PackedMatrix& w = job.w;
  const std::int64_t from = token * job.x.groups + group, shared = group / w.share;
  Cursor<kPanels> at{.codes = {},
                     .scales = {},
                     .zeros = {},
                     .q = job.x.q + token * job.x.stride + group * w.group,
                     .x_scale = job.x.scale + from,
                     .total = job.x.total + from,
                     .stride = job.x.stride,
                     .x_groups = job.x.groups,
                     .columns = columns,
                     .group = static_cast<int>(w.group),
                     .share = w.share,
                     .left = static_cast<int>((shared + 1) * w.share - group),
                     .mid = w.mid};
  for (int p = 0; p < kPanels; ++p) {
    const std::uint8_t* begin = w.panels + (panel + p) * w.panel_stride;
    at.codes[p] = begin + w.payload_offset + blocks_of(group * w.group) * (kBits * kVectorBytes);
    at.scales[p] = reinterpret_cast<const std::uint16_t*>(begin) + shared * kPanelRows;
    at.zeros[p] = w.zeros_offset ? begin + w.zeros_offset + shared * kPanelRows : nullptr;
  }
  return at;
}

template <class Isa, int kBits, int kPanels>
void sweep(const Qgemm& job, std::int64_t panel, Range tokens, float* sums) {
  using Strip = FromStrip<Isa, kBits>;
  alignas(64) std::uint8_t strips[kPanels][kStripColumns / kBlockColumns * Strip::kBlockBytes];
  const std::int64_t step = kStripColumns / job.w.group;
  for (std::int64_t group = 0; group < job.w.groups; group += step) {
    const std::int64_t left = job.w.k - group * job.w.group, full = step * job.w.group;
    const std::int64_t columns = left < full ? left : full;
    Cursor<kPanels> at = cursor_at<kBits, kPanels>(job, panel, tokens.begin, group, columns);
    for (int p = 0; p < kPanels; ++p) {
      unpack_strip<Isa, kBits>(at.codes[p], blocks_of(columns), strips[p]);
      at.codes[p] = strips[p];
    }
    run_tiles<Isa, kBits, Strip, kPanels, Isa::kTileTokens>(static_cast<int>(tokens.end - tokens.begin), at, sums);
  }
}

// At most kSweepTokens tokens, in tiles of kTokens, against kPanels neighbouring panels.
template <class Isa, int kBits, int kPanels, int kTokens>
void run_panels(const Qgemm& job, std::int64_t panel, Range tokens) {
  const int count = static_cast<int>(tokens.end - tokens.begin);
  alignas(64) float sums[kSweepTokens * kPanels * kPanelRows];
  for (int i = 0; i < count * kPanels * kPanelRows; ++i) sums[i] = 0.0f;
  if (count < Dot<kBits>::kUnpackTokens) {
    const auto at = cursor_at<kBits, kPanels>(job, panel, tokens.begin, 0, job.w.k);
    run_tiles<Isa, kBits, FromPanel<Isa, kBits>, kPanels, kTokens>(count, at, sums);
  } else if constexpr (kTokens > 1 && Dot<kBits>::kUnpackTokens != kNever) {
    sweep<Isa, kBits, kPanels>(job, panel, tokens, sums);
  }
  const std::int64_t row = panel * kPanelRows;
  const std::int64_t rows = job.w.n - row < kPanels * kPanelRows ? job.w.n - row : kPanels * kPanelRows;
  for (int t = 0; t < count; ++t) {
    float* out = job.out + (tokens.begin + t) * job.out_stride + row;
    const float* sum = sums + t * kPanels * kPanelRows;
    for (std::int64_t r = 0; r < rows; ++r) out[r] = job.bias ? sum[r] + job.bias[row + r] : sum[r];
  }
}

template <class Isa, int kBits, int kPanels, int kTokens>
void run_all_panels(const Qgemm& job, Range panels, Range tokens) {
  std::int64_t p = panels.begin;
  for (; p + kPanels <= panels.end; p += kPanels) run_panels<Isa, kBits, kPanels, kTokens>(job, p, tokens);
  for (; p < panels.end; ++p) run_panels<Isa, kBits, 1, kTokens>(job, p, tokens);
}

template <class Isa, int kBits>
void qgemm(const Qgemm& job, Range panels, Range tokens) {
  for (std::int64_t t = tokens.begin; t < tokens.end; t += kSweepTokens) {
    const Range some{t, t + kSweepTokens < tokens.end ? t + kSweepTokens : tokens.end};
    if (some.end - some.begin == 1) {
      run_all_panels<Isa, kBits, Isa::kPanelsOneToken, 1>(job, panels, some);
    } else {
      run_all_panels<Isa, kBits, Isa::kTilePanels, Isa::kTileTokens>(job, panels, some);
    }
  }
}
