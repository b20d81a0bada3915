// What the ISAs of 32-byte registers share: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llmq {
namespace {

struct Isa {
  static constexpr int kRows = 8;
  static constexpr int kPanelsOneToken = 1;
  static constexpr int kTilePanels = 1;
  static constexpr int kTileTokens = 4;

  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;

  static Bytes load_bytes(const std::uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_bytes(std::uint8_t* p, Bytes a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
  // (byte >> shift) & mask; a negative shift goes left. The mask drops what 16-bit shifts bring in from neighbours.
  static LLMQ_INLINE Bytes bits_at(Bytes a, int shift, int mask) {
    const Bytes moved = shift < 0 ? _mm256_slli_epi16(a, -shift) : shift > 0 ? _mm256_srli_epi16(a, shift) : a;
    return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }

  static __m256i broadcast4(const std::int8_t* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }

  static Ints set_ints(std::int32_t value) { return _mm256_set1_epi32(value); }

  // offset - zero[r]; without zeros offset - mid
  static Ints offset_minus_zeros(int offset, const std::uint8_t* zeros, std::int32_t mid) {
    if (!zeros) return _mm256_set1_epi32(offset - mid);
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
    return _mm256_sub_epi32(_mm256_set1_epi32(offset), wide);
  }
  // acc + a * total. Both factors fit 16 bits (|a| <= 255, |total| <= 127 * 128): vpmaddwd multiplies the lower halves,
  // and the upper half of a is blanked to make the other product zero.
  static Ints add_product(Ints acc, Ints a, Ints total) {
    const __m256i low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(low, total));
  }

  // Two 16-bit numbers a 32-bit lane.
  using Pairs = __m256i;
  static Pairs load_pairs(const std::int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Pairs load_unsigned_pairs(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static LLMQ_INLINE Pairs pairs_above(Pairs a, int shift) { return _mm256_srli_epi16(a, shift); }
  static LLMQ_INLINE Pairs bits_of_pairs(Pairs a, int mask) {
    return _mm256_and_si256(a, _mm256_set1_epi16(static_cast<std::int16_t>(mask)));
  }
  static Pairs broadcast_pair(const std::int16_t* p) {
    std::int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  // acc + the sum of both products, in the order written: see Dot::add in avx2.h.
  static Ints add_pairs(Ints acc, Pairs a, Pairs b) {
    __m256i sum = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
    __asm__("" : "+x"(sum));
    return sum;
  }

  static Floats set_floats(float value) { return _mm256_set1_ps(value); }
  static Floats halves_to_floats(const std::uint16_t* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  }
  static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats brains_to_floats(const std::uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_halves(std::uint16_t* p, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(float* out, Floats a) { _mm256_storeu_ps(out, a); }
};

}  // namespace
}  // namespace llmq
