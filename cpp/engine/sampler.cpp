#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Where exp_sum ends: no candidate below has a weight.
constexpr float kWidest = 88.0f;
// Below the largest logit a candidate is sought first, in units of the temperature: a peaked distribution ends there.
constexpr float kNear = 4.0f;
// Bins a unit, for the search in a flat distribution.
constexpr float kBinsPerUnit = 16.0f;
// Blocks that a thread takes at once: about 10 us of work.
constexpr std::int64_t kBlocksPerChunk = 64;
// Candidates among which the end of the nucleus is found by sorting.
constexpr std::ptrdiff_t kSortedCandidates = 64;

void require(bool ok, const char* name, double value, const char* rule) {
  if (!ok) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; use " + rule);
}

std::int64_t blocks_of(std::int64_t n) { return (n + kLogitBlock - 1) / kLogitBlock; }

void check_tokens(const char* what, const std::int64_t* tokens, std::int64_t count, std::int64_t vocabulary) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) {
      throw std::out_of_range(std::string(what) + " holds token " + std::to_string(tokens[i]) +
                              "; the vocabulary has " + std::to_string(vocabulary));
    }
  }
}

}  // namespace

void philox(std::uint32_t (&counter)[4], std::uint32_t (&key)[2]) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<std::uint32_t>(b);
    counter[2] = static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<std::uint32_t>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t position) {
  std::uint32_t counter[4] = {static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
                              static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  philox(counter, key);
  const std::uint64_t bits = static_cast<std::uint64_t>(counter[0]) << 32 | counter[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

Sampler::Sampler(std::int64_t vocabulary, const SamplerOptions& options) : vocabulary_(vocabulary), options_(options) {
  const SamplerOptions& o = options_;
  require(vocabulary > 0, "vocabulary", static_cast<double>(vocabulary), "at least 1");
  require(o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty), "repetition_penalty", o.repetition_penalty,
          "a number above 0");
  require(o.temperature > 0 && std::isfinite(o.temperature), "temperature", o.temperature, "a number above 0");
  require(o.top_k >= 0, "top_k", static_cast<double>(o.top_k), "0 (all) or more");
  require(o.top_p >= 0 && o.top_p <= 1, "top_p", o.top_p, "0 to 1");
  require(o.min_p >= 0 && o.min_p <= 1, "min_p", o.min_p, "0 to 1");
  scale_ = 1.0f / o.temperature;
  block_max_.resize(static_cast<std::size_t>(blocks_of(vocabulary)));
}

std::int64_t Sampler::sample(const KernelTable& table, const Draw& draw, float* probabilities) {
  apply_history(draw);
  table.block_max(draw.logits, vocabulary_, block_max_.data());
  largest_ = -kInfinity;
  for (const float m : block_max_) largest_ = !(m <= largest_) ? m : largest_;  // a NaN stays
  if (!std::isfinite(largest_)) {
    throw std::invalid_argument("the largest logit is " + std::to_string(largest_) +
                                ": the model overflows or its weights are damaged");
  }
  if (probabilities) std::fill_n(probabilities, vocabulary_, 0.0f);
  if (options_.greedy) {
    const std::int64_t token = first_of_largest(draw.logits);
    if (probabilities) probabilities[token] = 1.0f;
    return token;
  }
  const double u = uniform(options_.seed, draw.stream, draw.position);
  if (options_.top_k > 0 && options_.top_k < vocabulary_) {
    keep_top_k(table, draw.logits);
    double total = 0.0;
    for (const Candidate& c : candidates_) total += c.weight;
    if (options_.top_p < 1.0) cut_to_mass(options_.top_p * total, kInfinity);
  } else {
    if (options_.top_p >= 1.0 && options_.min_p <= 0.0f) {
      const double total = weigh_blocks(table, draw.logits);
      return draw_from_all(table, draw.logits, total, u, probabilities);
    }
    const double mass = options_.top_p < 1.0 ? options_.top_p * weigh_blocks(table, draw.logits) : HUGE_VAL;
    cut_to_mass(mass, gather_likeliest(table, draw.logits, mass));
  }
  std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < options_.min_p; });
  return draw_from_candidates(u, probabilities);
}

// The penalty reads all values before it writes one, so that a token that came twice is penalized once.
void Sampler::apply_history(const Draw& draw) {
  if (options_.repetition_penalty != 1.0f) {
    check_tokens("history", draw.history, draw.history_size, vocabulary_);
    values_.resize(static_cast<std::size_t>(draw.history_size));
    for (std::int64_t i = 0; i < draw.history_size; ++i) {
      const float x = draw.logits[draw.history[i]];
      values_[i] = x < 0 ? x * options_.repetition_penalty : x / options_.repetition_penalty;
    }
    for (std::int64_t i = 0; i < draw.history_size; ++i) draw.logits[draw.history[i]] = values_[i];
  }
  check_tokens("banned", draw.banned, draw.banned_size, vocabulary_);
  for (std::int64_t i = 0; i < draw.banned_size; ++i) draw.logits[draw.banned[i]] = -kInfinity;
}

std::int64_t Sampler::first_of_largest(const float* logits) const {
  const auto block = std::find(block_max_.begin(), block_max_.end(), largest_) - block_max_.begin();
  return std::find(logits + block * kLogitBlock, logits + vocabulary_, largest_) - logits;
}

// Candidates: every token whose logit is at least `floor`, in the order of tokens.
void Sampler::gather(const float* logits, float floor) {
  candidates_.clear();
  for (std::size_t b = 0; b < block_max_.size(); ++b) {
    if (block_max_[b] < floor) continue;
    const std::int64_t begin = static_cast<std::int64_t>(b) * kLogitBlock;
    const std::int64_t end = std::min<std::int64_t>(vocabulary_, begin + kLogitBlock);
    for (std::int64_t i = begin; i < end; ++i) {
      if (logits[i] >= floor) candidates_.push_back({logits[i], 0.0f, static_cast<std::int32_t>(i)});
    }
  }
}

void Sampler::weigh(const KernelTable& table) {
  const std::size_t n = candidates_.size();
  values_.resize(n);
  weights_.resize(n);
  for (std::size_t i = 0; i < n; ++i) values_[i] = candidates_[i].logit;
  table.exp_sum(values_.data(), static_cast<std::int64_t>(n), largest_, scale_, weights_.data());
  for (std::size_t i = 0; i < n; ++i) candidates_[i].weight = weights_[i];
}

// k blocks have a largest logit of at least the k-th largest of these, so the k largest logits are at least that, too.
void Sampler::keep_top_k(const KernelTable& table, const float* logits) {
  const auto k = static_cast<std::size_t>(options_.top_k);
  float floor = -kInfinity;
  if (k <= block_max_.size()) {
    values_ = block_max_;
    std::nth_element(values_.begin(), values_.begin() + (k - 1), values_.end(), std::greater<>());
    floor = values_[k - 1];
  }
  gather(logits, floor);
  if (candidates_.size() > k) {
    values_.clear();
    for (const Candidate& c : candidates_) values_.push_back(c.logit);
    std::nth_element(values_.begin(), values_.begin() + (k - 1), values_.end(), std::greater<>());
    std::erase_if(candidates_, [smallest = values_[k - 1]](const Candidate& c) { return c.logit < smallest; });
  }
  weigh(table);
}

// Sum of the weights of the whole vocabulary, and of each block.
double Sampler::weigh_blocks(const KernelTable& table, const float* logits) {
  const auto blocks = static_cast<std::int64_t>(block_max_.size());
  block_sum_.resize(block_max_.size());
  parallel_for((blocks + kBlocksPerChunk - 1) / kBlocksPerChunk, [&](std::int64_t chunk) noexcept {
    float weights[kLogitBlock];
    const std::int64_t end = std::min(blocks, (chunk + 1) * kBlocksPerChunk);
    for (std::int64_t b = chunk * kBlocksPerChunk; b < end; ++b) {
      const std::int64_t n = std::min<std::int64_t>(kLogitBlock, vocabulary_ - b * kLogitBlock);
      block_sum_[b] = table.exp_sum(logits + b * kLogitBlock, n, largest_, scale_, weights);
    }
  });
  double total = 0.0;
  for (const float sum : block_sum_) total += sum;
  return total;
}

// Candidates: the likeliest tokens, enough of them to hold `mass` or all that min_p may keep. Returns a logit above
// which all of them belong to the mass.
float Sampler::gather_likeliest(const KernelTable& table, const float* logits, double mass) {
  // One unit of slack: min_p itself is decided by the weights.
  const float widest = options_.min_p > 0.0f ? std::min(kWidest, 1.0f - std::log(options_.min_p)) : kWidest;
  const auto gather_within = [&](float width) {
    gather(logits, largest_ - std::min(width, widest) / scale_);
    weigh(table);
  };
  if (mass == HUGE_VAL) {
    gather_within(widest);
    return -kInfinity;
  }
  gather_within(kNear);
  double found = 0.0;
  for (const Candidate& c : candidates_) found += c.weight;
  if (found >= mass || widest <= kNear) return kInfinity;
  const auto bin = static_cast<float>(bin_of_mass(table, logits, mass));
  gather_within((bin + 2.0f) /
                kBinsPerUnit);  // a bin of slack on both sides: a distance may be rounded across its edge
  return largest_ - (bin - 1.0f) / kBinsPerUnit / scale_;
}

// The bin (of distances below the largest logit) in which the weights of the likeliest tokens reach `mass`.
std::int64_t Sampler::bin_of_mass(const KernelTable& table, const float* logits, double mass) {
  constexpr auto kBins = static_cast<std::int32_t>(kWidest * kBinsPerUnit) + 1;
  histogram_.assign(kBins, 0.0);
  weights_.resize(kLogitBlock);
  std::int32_t bins[kLogitBlock];
  const float per_logit = scale_ * kBinsPerUnit;
  for (std::int64_t begin = 0; begin < vocabulary_; begin += kLogitBlock) {
    const std::int64_t n = std::min<std::int64_t>(kLogitBlock, vocabulary_ - begin);
    table.exp_sum(logits + begin, n, largest_, scale_, weights_.data());
    for (std::int64_t i = 0; i < n; ++i) {
      const float distance = (largest_ - logits[begin + i]) * per_logit;
      bins[i] = distance < kBins - 1 ? static_cast<std::int32_t>(distance) : kBins - 1;
    }
    for (std::int64_t i = 0; i < n; ++i) histogram_[bins[i]] += weights_[i];
  }
  std::int64_t bin = 0;
  for (double before = histogram_[0]; before < mass && bin + 1 < kBins; before += histogram_[++bin]) {
  }
  return bin;
}

// Keep the likeliest candidates: those whose likelier ones weigh less than `mass` together; at least one. Of equally
// likely ones the later tokens come first, as in transformers, which sorts upwards and cuts from below. Logits above
// `kept` are known to stay.
void Sampler::cut_to_mass(double mass, float kept) {
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token > b.token;
  };
  auto end = candidates_.end();
  auto begin = std::partition(candidates_.begin(), end, [&](const Candidate& c) { return c.logit > kept; });
  double before = 0.0;
  for (auto c = candidates_.begin(); c != begin; ++c) before += c->weight;
  while (end - begin > kSortedCandidates) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, likelier);
    double half = 0.0;
    for (auto c = begin; c != middle; ++c) half += c->weight;
    if (before + half >= mass) {
      end = middle;
    } else {
      before += half;
      begin = middle;
    }
  }
  std::sort(begin, end, likelier);
  while (begin != end && (before < mass || begin == candidates_.begin())) before += (begin++)->weight;
  candidates_.erase(begin, candidates_.end());
}

std::int64_t Sampler::draw_from_all(const KernelTable& table, const float* logits, double total, double u,
                                    float* probabilities) {
  if (probabilities) {
    table.exp_sum(logits, vocabulary_, largest_, scale_, probabilities);
    for (std::int64_t i = 0; i < vocabulary_; ++i) probabilities[i] = static_cast<float>(probabilities[i] / total);
  }
  weights_.resize(kLogitBlock);
  const double target = u * total;
  double before = 0.0;
  std::int64_t token = -1;
  for (std::size_t b = 0; b < block_sum_.size(); ++b) {
    if (before + block_sum_[b] <= target && b + 1 < block_sum_.size()) {
      before += block_sum_[b];
      continue;
    }
    const std::int64_t begin = static_cast<std::int64_t>(b) * kLogitBlock;
    const std::int64_t n = std::min<std::int64_t>(kLogitBlock, vocabulary_ - begin);
    table.exp_sum(logits + begin, n, largest_, scale_, weights_.data());
    // The block's sum was rounded: its elements may end a little short of the target, and then the last one is it.
    for (std::int64_t i = 0; i < n; ++i) {
      if (weights_[i] > 0.0f) token = begin + i;
      before += weights_[i];
      if (before > target) break;
    }
    break;
  }
  return token >= 0 ? token : first_of_largest(logits);
}

std::int64_t Sampler::draw_from_candidates(double u, float* probabilities) const {
  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.weight;
  if (probabilities) {
    for (const Candidate& c : candidates_) probabilities[c.token] = static_cast<float>(c.weight / total);
  }
  double before = 0.0;
  for (const Candidate& c : candidates_) {
    before += c.weight;
    if (before > u * total) return c.token;
  }
  return candidates_.front().token;
}

}  // namespace llmq
