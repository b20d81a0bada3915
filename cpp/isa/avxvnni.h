// AVX-VNNI: vpdpbusd on 32-byte registers, on CPUs without AVX-512.
#pragma once

#include "isa/ymm.h"

namespace llmq {
namespace {

#if defined(LLMQ_EMULATE_VNNI)
// Test builds only: unsigned times signed bytes, exact in 32 bits, on a CPU with AVX2.
__m256i dot4(__m256i acc, __m256i codes, __m256i x) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#else
__m256i dot4(__m256i acc, __m256i codes, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, codes, x); }
#endif

// Codes of any width. Nothing saturates: |sum| <= 128 * 255 * 127 < 2^31.
template <int kBits>
struct Dot {
  static constexpr int kSpanBlocks = 4;
  static constexpr int kChains = 2;
  static constexpr bool kWide = true;
  static constexpr int kUnpackTokens = kBits == 8 ? kNever : 8;
  static constexpr int kOffset = 0;
  using Operand = __m256i;
  using Part = __m256i;

  static Operand operand(Isa::Bytes codes) { return codes; }
  static Part zero() { return _mm256_setzero_si256(); }
  static Part add(Part part, Operand codes, __m256i x) { return dot4(part, codes, x); }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return _mm256_add_epi32(acc, part); }
};

}  // namespace
}  // namespace llmq
