// From the logits of one position to a token: the processors of transformers' sampling, in its order, without a sort of
// the vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace llmq {

struct SamplerOptions {
  bool greedy = true;               // the largest logit (the first of equal ones); what follows penalty is unused
  float repetition_penalty = 1.0f;  // logits of `history`: x / penalty where x >= 0, else x * penalty
  float temperature = 1.0f;         // x / temperature
  std::int64_t top_k = 0;           // keep the k largest and what equals the smallest of them; 0: all
  double top_p = 1.0;               // then the likeliest whose likelier ones sum up to less than top_p
  float min_p = 0.0f;               // then those at least min_p times as likely as the likeliest
  std::uint64_t seed = 0;
};

// A uniform number in [0, 1): 53 bits of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3") at counter (position, stream), key `seed`. So the draw for a position depends on nothing that happened before it.
double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t position);

// The generator's block function, in place.
void philox(std::uint32_t (&counter)[4], std::uint32_t (&key)[2]);

// What a token is chosen from.
struct Draw {
  float* logits;  // f32[vocabulary]; penalty and bans are written into it
  const std::int64_t* history;
  std::int64_t history_size;
  const std::int64_t* banned;  // tokens that may not come
  std::int64_t banned_size;
  std::uint64_t stream, position;  // of the random number: row of the batch, tokens generated before
};

// Owns the scratch memory: one object for one thread at a time.
class Sampler {
 public:
  // Throws std::invalid_argument naming an option out of range.
  Sampler(std::int64_t vocabulary, const SamplerOptions& options);

  // The chosen token. `probabilities` f32[vocabulary], or null, receives the distribution it was drawn from.
  // Throws std::invalid_argument when the largest logit is not finite or one is NaN, std::out_of_range for a token of
  // history or bans that is not in the vocabulary.
  std::int64_t sample(const KernelTable& table, const Draw& draw, float* probabilities);

 private:
  struct Candidate {
    float logit, weight;  // weight: exp((logit - largest) / temperature)
    std::int32_t token;
  };

  void apply_history(const Draw& draw);
  std::int64_t first_of_largest(const float* logits) const;
  void gather(const float* logits, float floor);
  void weigh(const KernelTable& table);
  void keep_top_k(const KernelTable& table, const float* logits);
  double weigh_blocks(const KernelTable& table, const float* logits);
  float gather_likeliest(const KernelTable& table, const float* logits, double mass);
  std::int64_t bin_of_mass(const KernelTable& table, const float* logits, double mass);
  void cut_to_mass(double mass, float kept);
  std::int64_t draw_from_all(const KernelTable& table, const float* logits, double total, double u,
                             float* probabilities);
  std::int64_t draw_from_candidates(double u, float* probabilities) const;

  std::int64_t vocabulary_;
  SamplerOptions options_;
  float largest_ = 0.0f, scale_ = 1.0f;
  std::vector<float> block_max_, block_sum_, values_, weights_;
  std::vector<double> histogram_;
  std::vector<Candidate> candidates_;
};

}  // namespace llmq
