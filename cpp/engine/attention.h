// Attention of a chunk of tokens over the cache, cut into tasks for the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kv_cache.h"
#include "kernel_table.h"

namespace llmq {

// Tokens of one sequence within a chunk.
struct Slice {
  Sequence* sequence;
  std::int64_t first;  // row of its first token in the chunk
  std::int64_t count;
  std::int64_t start;  // position of that token in the sequence
};

struct AttentionInputs {
  std::int64_t layer, heads, kv_heads, head_dim;
  std::int64_t window;  // 0: none
  float softcap;
  const float* q;  // f32[tokens, q_stride], rotated and scaled; heads side by side
  std::int64_t q_stride;
  float* out;  // f32[tokens, heads * head_dim]
};

void attend_slices(const KernelTable& table, const std::vector<Slice>& slices, const AttentionInputs& in);

// Attention of the last `count` of `length` tokens of a sequence of one layer, `layer`, whose keys and values
// f32[length, kv_heads, head_dim] are stored first, chunk by chunk, as a decoder does it. `in` is of the first of these
// tokens.
void attend_last(const KernelTable& table, const KvLayerShape& layer, const float* keys, const float* values,
                 std::int64_t length, std::int64_t count, AttentionInputs in);

}  // namespace llmq
