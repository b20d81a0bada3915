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

// Activations quantized per row and group: x ~ scale * q. Rows are padded with zeros to a multiple of 64 columns.
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

// Tokens of a page of the key/value cache, tokens whose keys are interleaved, and what heads are padded to.
constexpr int kPageTokens = 64;
constexpr int kKeyTokens = 16;
constexpr int kHeadPadding = 16;

// Keys and values of one key/value head of one sequence, in elements of f16 or f32. Within a page, at head *
// head_stride:
//   keys    [kPageTokens / 16][head_dim][16]: the 16 tokens of a block side by side
//   values  [kPageTokens][padded_dim]: head_dim rounded up to kHeadPadding, the rest 0
struct KvView {
  void* const* pages;  // one a kPageTokens tokens
  std::int64_t head, head_stride;
  std::int64_t head_dim, padded_dim;
};

// Query rows that attend to one key/value head; the result is not divided by `sum` yet, so that parts can be merged.
struct AttendJob {
  KvView kv;
  const float* const* q;  // rows of f32[head_dim], already scaled
  const Range* visible;   // tokens each row sees
  std::int64_t rows;
  Range tokens;   // tokens to look at: begin a multiple of kKeyTokens, or the first of all
  float softcap;  // 0: none
  float* acc;     // f32[rows, padded_dim]: sum of exp(score - max) * value
  float* max;     // f32[rows]; -infinity: the row saw nothing
  float* sum;     // f32[rows]: sum of exp(score - max)
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

  // out f32[n] = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*add_rows)(float* x, const float* y, std::int64_t n);  // x += y
  // Rotate the pairs (x[i], x[i + half]), then multiply by `scale`.
  void (*rope)(float* x, const float* cosine, const float* sine, std::int64_t half, float scale);
  // out = activation(gate) * up
  void (*gated[kActivations])(const float* gate, const float* up, std::int64_t n, float* out);
  void (*softcap)(float* x, std::int64_t n, float cap);  // x = cap * tanh(x / cap)

  // Key/value cache of f16 and of f32.
  void (*append_kv[2])(const KvView& kv, std::int64_t token, const float* key, const float* value);
  void (*attend[2])(const AttendJob& job);

  // out f32[ceil(n / kLogitBlock)]: the largest of each block of x f32[n], NaN where the block holds a NaN.
  void (*block_max)(const float* x, std::int64_t n, float* out);
  // out f32[n] = exp((x - shift) * scale), 0 below exp(-88); no x may exceed shift. Returns the sum.
  float (*exp_sum)(const float* x, std::int64_t n, float shift, float scale, float* out);

  // Read `words` 64-bit words once and return their xor: the machine's reading speed, to compare kernels with.
  std::uint64_t (*stream_read)(const std::uint64_t* data, std::int64_t words);
};

}  // namespace llmq
