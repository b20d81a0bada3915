// Test builds only (LLMQ_EMULATE_VNNI): the AVX-512 intrinsics of avx512vnni.h through SIMDe, on a CPU without them.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

namespace llmq {
namespace {

// Intrinsics that SIMDe 0.7.4 lacks, each as two AVX2 halves.
__m512i emulated_cvtepu8_epi32(__m128i a) {
  const __m256i low = _mm256_cvtepu8_epi32(a);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)), 1);
}

__m512i emulated_cvtepu8_epi16(__m256i a) {
  const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(a));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)), 1);
}

__m512 emulated_join(__m256 low, __m256 high) {
  const __m512i whole = _mm512_castsi256_si512(_mm256_castps_si256(low));
  return _mm512_castsi512_ps(_mm512_inserti64x4(whole, _mm256_castps_si256(high), 1));
}

__m512 emulated_cvtph_ps(__m256i a) {
  return emulated_join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

__m512 emulated_cvtepi32_ps(__m512i a) {
  return emulated_join(_mm256_cvtepi32_ps(_mm512_castsi512_si256(a)),
                       _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(a, 1)));
}

__m256i emulated_cvtps_ph(__m512 a) {
  const __m512i whole = _mm512_castps_si512(a);
  const __m256 low = _mm256_castsi256_ps(_mm512_castsi512_si256(whole));
  const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(whole, 1));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT)),
                                 _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1);
}

__m512i emulated_cvtepu16_epi32(__m256i a) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)), 1);
}

}  // namespace
}  // namespace llmq

// SIMDe 0.7.4 gives this alias the four arguments of the masked intrinsic.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_ph(a, rounding) emulated_cvtps_ph(a)
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
