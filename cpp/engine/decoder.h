// A whole decoder step: token ids in, final states or logits out, keys and values kept in the sequences.
//
// One decoder serves every family; what differs is data (DecoderSpec). All weights belong to the caller and must
// outlive the decoder; a decoder itself never changes, so any number of threads may run steps on different sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/matrix.h"
#include "kernel_table.h"

namespace llmq {

struct DecoderLayer {
  Matrix q, k, v, o, gate, up, down;
  const float* attention_norm = nullptr;       // f32[hidden]; before attention
  const float* attention_post_norm = nullptr;  // f32[hidden] or null; after it, before the residual is added
  const float* ffn_norm = nullptr;
  const float* ffn_post_norm = nullptr;
  const float* q_norm = nullptr;  // f32[head_dim] or null
  const float* k_norm = nullptr;
  // Null, or i64[k]: column j of the matrices that share this input belongs to its column order[j] (GPTQ's desc_act).
  const std::int64_t* qkv_order = nullptr;
  const std::int64_t* o_order = nullptr;
  const std::int64_t* ffn_order = nullptr;
  const std::int64_t* down_order = nullptr;
  std::int64_t window = 0;  // tokens a token sees, itself included; 0: all
  std::int64_t rope = 0;    // index into DecoderSpec::ropes
};

struct Rope {
  std::vector<float> inverse_frequency;  // [head_dim / 2]
  float scaling = 1.0f;                  // of cos and sin
};

struct DecoderSpec {
  std::int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, max_positions = 0;
  float eps = 0.0f, attention_scale = 0.0f, embedding_scale = 1.0f;
  float attention_softcap = 0.0f, final_softcap = 0.0f;  // 0: none
  Activation activation = kSilu;
  std::vector<Rope> ropes;
  std::vector<DecoderLayer> layers;
  Matrix embedding, head;
  const float* final_norm = nullptr;
};

enum class Output { kLast, kAll, kStates };

// What one call processes: counts[i] tokens, one sequence's after the other's, appended to sequences[i].
struct Step {
  const std::int64_t* ids;
  std::vector<std::int64_t> counts;
  std::vector<Sequence*> sequences;
  Output output;
  bool float_activations;
  float* out;  // kLast f32[sequences, vocabulary], kAll f32[tokens, vocabulary], kStates f32[tokens, hidden]
};

class Decoder {
 public:
  // Throws std::invalid_argument naming the matrix whose shape does not fit.
  explicit Decoder(DecoderSpec spec);

  const DecoderSpec& spec() const { return spec_; }
  // Throws std::invalid_argument unless there is one shape a layer.
  KvShape kv_shape(std::vector<KvLayerShape> layers) const;

  // Throws std::invalid_argument for a token id or a length out of range, a sequence of another model, or one that is
  // in use or given twice; std::bad_alloc. The sequences are unchanged then.
  void forward(const KernelTable& table, const Step& step) const;

  // out f32[rows, vocabulary] = logits of final states f32[rows, hidden].
  void logits(const KernelTable& table, const float* states, std::int64_t rows, bool float_activations,
              float* out) const;

 private:
  struct Chunk;
  struct Workspace;

  void check(const Step& step) const;
  void run(const KernelTable& table, const Chunk& chunk, Workspace& work) const;
  void embed(const KernelTable& table, const Chunk& chunk, Workspace& work) const;
  void attention(const KernelTable& table, const Chunk& chunk, std::int64_t layer, Workspace& work) const;
  void store_keys(const KernelTable& table, const Chunk& chunk, std::int64_t layer, Workspace& work) const;
  void feed_forward(const KernelTable& table, const Chunk& chunk, std::int64_t layer, Workspace& work) const;
  void keep_outputs(const Chunk& chunk, Workspace& work) const;

  DecoderSpec spec_;
};

}  // namespace llmq
