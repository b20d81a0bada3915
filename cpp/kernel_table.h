// The contract between the ISA-specific kernels and everything else: one table of functions an ISA, every slot filled.
// Plain structs and pointers only: this header is compiled with the flags of every ISA, so it must emit no code.
#pragma once

#include <cstdint>

namespace llmq {

// Rows of a panel: the panel is the unit in which output rows are packed and shared out to threads.
constexpr int kPanelRows = 16;
// The payload comes in blocks of this many columns ...
constexpr int kBlockColumns = 32;
// ... that are as many vectors of 16 rows x 4 bytes as a code has bits.
constexpr int kVectorBytes = 64;

// Widths of a code, and where a table's arrays hold the kernels of a width.
constexpr int kBitWidths = 4;
constexpr int slot_of(int bits) { return bits == 8 ? 3 : bits - 2; }  // 2, 3, 4, 8

// Half-open range of rows, panels or tokens.
struct Range {
  std::int64_t begin, end;
};

// A packed matrix W f32[n, k] ~ scale * (code - zero); see layout.h for the bytes behind `panels`.
struct PackedMatrix {
  const std::uint8_t* panels;   // first panel; panel p starts at panels + p * panel_stride
  std::int64_t panel_stride;    // bytes
  std::int64_t zeros_offset;    // bytes from the panel's start to u8 zero[][16]; 0: symmetric, zero is `mid`
  std::int64_t payload_offset;  // bytes from the panel's start to the first block
  std::int64_t n, k;            // rows (out_features), columns (in_features)
  std::int64_t group, groups;   // columns of a full group; groups a row
  std::int32_t mid;             // zero point of a symmetric matrix
  std::int32_t share;           // neighbouring groups that share one scale and zero
};

// Activations quantized per row and group: x ~ scale * q. Rows are padded with zeros up to their stride.
struct QuantizedRows {
  std::int8_t* q;       // i8[m, stride], -127 .. 127
  float* scale;         // f32[m, groups]; NaN for a group that held a NaN or an infinity
  std::int32_t* total;  // i32[m, groups]: sum of q over the group
  std::int64_t stride;  // columns between rows of q
  std::int64_t groups;  // groups a row
};

struct Qgemm {
  PackedMatrix w;
  QuantizedRows x;
  const float* bias;        // f32[n] or null
  float* out;               // f32[m, out_stride]
  std::int64_t out_stride;  // floats between rows of out
};

// Tokens whose keys are interleaved in the key/value cache, and what heads are padded to.
constexpr int kKeyTokens = 16;
constexpr int kHeadPadding = 16;
// Attention looks at keys in parts of this many tokens, the first of which begins at token 0.
constexpr int kPartTokens = 128;

// Tokens of a page whose keys have a scale a column.
constexpr int kColumnTokens = 64;

// How keys or values are stored; the kernels' arrays hold them in this order. Those from kKvTypes on are for keys: a
// column has one scale and zero over a page of kColumnTokens tokens, and a page is stored as a whole.
enum KvType { kKvHalf, kKvFloat, kKv8, kKv4, kKv2, kKvTypes, kKv4Columns = kKvTypes, kKv2Columns, kKeyTypes };
constexpr int kv_bits(KvType type) {
  return type == kKvHalf ? 16 : type == kKvFloat ? 32 : type == kKv8 ? 8 : type == kKv4 || type == kKv4Columns ? 4 : 2;
}
constexpr bool kv_is_code(KvType type) { return type >= kKv8; }
constexpr bool kv_by_column(KvType type) { return type >= kKvTypes; }
// 8-bit codes are symmetric, codes of fewer bits have a zero point.
constexpr bool kv_has_zero(KvType type) { return type > kKv8; }
// Columns of a head that share a scale and zero: of a key, and of the query that meets it; of a value.
constexpr int kKeyGroup = 32;
// Columns of a query, times the scales of a page of keys, that share a scale.
constexpr int kColumnGroup = 64;
constexpr int value_group(KvType type) { return type == kKv8 ? 128 : type == kKv4 ? 64 : 32; }
constexpr int kMaxKvGroup = 128;

// The keys, or the values, of one key/value head of one sequence. From `data` on, a page of T tokens holds, as
// elements,
//   keys    [T / 16][dim][16]: the 16 tokens of a block side by side
//   values  [T][padded]: dim rounded up to kHeadPadding, the rest 0
// or, as codes of `bits` bits, x ~ scale * (code - zero),
//   keys    [T / 16] payloads of the layout LQ16 (layout.h) with tokens for rows
//   values  [columns / 16 / (8 / bits), rounded up][T / 2][16][2] bytes: byte (c, token) of a pair of tokens holds,
//   from
//           its lowest bits on, the columns c, c + 16, ... of the token; 8-bit codes are signed, less 128
// from `scales` on f16: keys [T / 16][groups][16], values [groups][T]; from `zeros` on u8 zeros in the same order. Keys
// with scales by column: f16 [dim], u8 [dim], and x ~ scale * (code - zero * (2^bits - 1) / 255).
struct KvRows {
  void* const* pages;                // by number
  int page_shift;                    // log2 T
  std::int64_t data, scales, zeros;  // bytes from a page's start
  std::int64_t dim, padded;
  std::int64_t group;        // columns that share a scale
  std::int64_t token_bytes;  // a page's elements or codes by its tokens
  std::int64_t grid_bytes;   // of keys: from `scales` on, with those of the values

  // Inlined always: an ISA's object must not hold a copy that the linker could hand to another.
  [[gnu::always_inline]] std::int64_t page_tokens() const { return std::int64_t{1} << page_shift; }
  // Of a token in its page.
  [[gnu::always_inline]] std::int64_t slot(std::int64_t token) const { return token & (page_tokens() - 1); }
  [[gnu::always_inline]] std::int64_t groups() const { return (dim + group - 1) / group; }
  [[gnu::always_inline]] std::int64_t blocks() const { return (dim + kBlockColumns - 1) / kBlockColumns; }
};

// Keys or values that are read after a job. The kernel asks memory for them bit by bit, so that it computes while they
// come: a page's part of a head is too short for the CPU to guess what follows.
struct Ahead {
  KvRows rows;
  Range tokens;  // none: nothing to ask for
};

// out[block][row][16] = q_row . key of the tokens of each block of kKeyTokens, whether the row sees them or not.
struct ScoreJob {
  KvRows keys;
  Range tokens;           // begin a multiple of kKeyTokens; the last block may go beyond end
  const float* const* q;  // rows of f32[dim], already scaled
  // The same rows, for keys that are codes, in groups of kKeyGroup columns. With scales by column: memory for the
  // kernel, in groups of kColumnGroup.
  QuantizedRows codes;
  std::int64_t rows;
  float* out;
  Ahead ahead;
};

// scores[block][row][16] of one part become weights exp(score - max), 0 where the row does not look.
struct SoftmaxJob {
  Range tokens;
  const Range* visible;  // tokens each row sees
  std::int64_t rows;
  float softcap;  // of the scores, before; 0: none
  float* scores;
  float* max;  // f32[rows]; -infinity: the row saw nothing
  float* sum;  // f32[rows]: sum of the weights
  Ahead ahead;
};

// acc[row] += sum over the tokens of weights[block][row][16] * value.
struct ValueJob {
  KvRows values;
  Range tokens;  // of one part
  const float* weights;
  std::int64_t rows;
  float* acc;  // f32[rows, padded]
  Ahead ahead;
};

// out[t * out_stride + r] = row r . x_t + bias[r], in float.
struct FloatGemm {
  const void* dense;  // [n, k] row-major, of the type that the slot says; null where rows are dequantized
  std::int64_t k;
  const float* x;  // f32[m, x_stride]
  std::int64_t x_stride;
  const float* bias;  // f32[n] or null
  float* out;         // f32[m, out_stride]
  std::int64_t out_stride;
};

// out[t * out_stride + c] += scale * (sum over j, ascending, of low[t * rank + j] * b[j * stride + c]), in float.
struct LowRankSum {
  const void* b;  // [rank, stride], of the type that the slot says
  std::int64_t rank, stride;
  const float* low;  // f32[m, rank]
  float scale;
  float* out;  // f32[m, out_stride]
  std::int64_t out_stride;
};

// Logits that the sampler looks at together.
constexpr int kLogitBlock = 256;

// Types of a dense matrix, in the order of the slots below.
enum DenseType { kBrain, kHalf, kFloat, kDenseTypes };

enum Activation { kSilu, kGeluTanh, kActivations };

struct KernelTable {
  const char* isa;
  const char* features;  // CPU features needed, separated by blanks; empty: runs anywhere

  // Quantize rows of x f32[m, k] (k contiguous) in groups of `group` columns.
  void (*quantize_rows)(const float* x, Range rows, std::int64_t k, std::int64_t group, const QuantizedRows& out);
  // The same for one group of n columns.
  void (*quantize_group)(const float* x, int n, std::int8_t* q, float* scale, std::int32_t* total);

  // out[t, r] = sum over groups, ascending, of float(integer dot product) * (scale_w * scale_x), + bias[r],
  // for the tokens t and the rows r of the panels given. Each float operation is rounded on its own (no fma), so that
  // all ISAs, and one token or many, give the same bits.
  void (*qgemm[kBitWidths])(const Qgemm& job, Range panels, Range tokens);

  // out f32[k] = dequantized row `row`.
  void (*take_row[kBitWidths])(const PackedMatrix& w, std::int64_t row, float* out);

  // Products in float: dense matrices, and one dequantized row f32[k] at a time.
  void (*fgemm_dense[kDenseTypes])(const FloatGemm& job, Range rows, Range tokens);
  void (*fgemm_row)(const FloatGemm& job, const float* weights, std::int64_t row, Range tokens);
  void (*take_dense[kDenseTypes])(const void* dense, std::int64_t k, std::int64_t row, float* out);

  // An adapter's share of a product (LoRA). `columns` begins at a multiple of kPanelRows and ends at one or at the last
  // column, so that a column has the same bits wherever it is cut.
  void (*add_low_rank[kDenseTypes])(const LowRankSum& job, Range columns, Range tokens);

  // out f32[n] = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*add_rows)(float* x, const float* y, std::int64_t n);  // x += y
  // Rotate the pairs (x[i], x[i + half]), then multiply by `scale`.
  void (*rope)(float* x, const float* cosine, const float* sine, std::int64_t half, float scale);
  // x = x times the normalized Hadamard matrix (Sylvester's) of the largest power of two that divides n, block by
  // block.
  void (*hadamard)(float* x, std::int64_t n);
  // out = activation(gate) * up
  void (*gated[kActivations])(const float* gate, const float* up, std::int64_t n, float* out);
  void (*softcap)(float* x, std::int64_t n, float cap);  // x = cap * tanh(x / cap)

  // Store key or value f32[dim] of one token.
  void (*append_key[kKvTypes])(const KvRows& keys, std::int64_t token, const float* key);
  void (*append_value[kKvTypes])(const KvRows& values, std::int64_t token, const float* value);
  // Store the keys f32[tokens, dim] of a page, or of its last tokens, with scales by column.
  void (*store_key_page[kKeyTypes - kKvTypes])(const KvRows& keys, Range tokens, const float* x);
  // out f32[dim] = the key or value of one token, as it is stored.
  void (*take_key[kKeyTypes])(const KvRows& keys, std::int64_t token, float* out);
  void (*take_value[kKvTypes])(const KvRows& values, std::int64_t token, float* out);
  // Attention of some query rows to a part of one head's tokens, in three steps.
  void (*key_scores[kKeyTypes])(const ScoreJob& job);
  void (*softmax)(const SoftmaxJob& job);
  void (*sum_values[kKvTypes])(const ValueJob& job);

  // out f32[ceil(n / kLogitBlock)]: the largest of each block of x f32[n], NaN where the block holds a NaN.
  void (*block_max)(const float* x, std::int64_t n, float* out);
  // out f32[n] = exp((x - shift) * scale), 0 below exp(-88); no x may exceed shift. Returns the sum.
  float (*exp_sum)(const float* x, std::int64_t n, float shift, float scale, float* out);

  // Read `words` 64-bit words once and return their xor: the machine's reading speed, to compare kernels with.
  std::uint64_t (*stream_read)(const std::uint64_t* data, std::int64_t words);
};

}  // namespace llmq
