// AVX-512 with VNNI: one 64-byte register is a whole panel, vpdpbusd multiplies unsigned codes by signed activations
// and adds four products to each 32-bit lane.
#pragma once

#if defined(LLMQ_EMULATE_VNNI)
#include "isa/avx512_emulation.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

namespace llmq {
namespace {

struct Isa {
  static constexpr int kRows = 16;
  static constexpr int kPanelsOneToken = 1;
  // 12 sums and 12 scaled ones, codes, constants: more would not stay in 32 registers while one group is scaled and the
  // next begins.
  static constexpr int kTilePanels = 2;
#if defined(LLMQ_EMULATE_VNNI)
  static constexpr int kTileTokens = 3;  // the same code in fewer sizes
#else
  static constexpr int kTileTokens = 6;
#endif

  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  static Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(p)); }
  static void store_bytes(std::uint8_t* p, Bytes a) { _mm512_storeu_si512(reinterpret_cast<__m512i*>(p), a); }
  // (byte >> shift) & mask; a negative shift goes left. The mask drops what 16-bit shifts bring in from neighbours.
  static LLMQ_INLINE Bytes bits_at(Bytes a, int shift, int mask) {
    const unsigned left = shift < 0 ? static_cast<unsigned>(-shift) : 0,
                   right = shift > 0 ? static_cast<unsigned>(shift) : 0;
    const Bytes moved = left ? _mm512_slli_epi16(a, left) : right ? _mm512_srli_epi16(a, right) : a;
    return _mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(mask)));
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }

  static __m512i broadcast4(const std::int8_t* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  }

  static Ints set_ints(std::int32_t value) { return _mm512_set1_epi32(value); }

  // offset - zero[r]; without zeros offset - mid
  static Ints offset_minus_zeros(int offset, const std::uint8_t* zeros, std::int32_t mid) {
    if (!zeros) return _mm512_set1_epi32(offset - mid);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    return _mm512_sub_epi32(_mm512_set1_epi32(offset), wide);
  }
  // acc + a * total. Both factors fit 16 bits (|a| <= 255, |total| <= 127 * 128): vpmaddwd multiplies the lower halves,
  // and the upper half of a is blanked to make the other product zero.
  static Ints add_product(Ints acc, Ints a, Ints total) {
    const __m512i low = _mm512_and_si512(a, _mm512_set1_epi32(0xffff));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(low, total));
  }

  // Two 16-bit numbers a 32-bit lane.
  using Pairs = __m512i;
  static Pairs load_pairs(const std::int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Pairs load_unsigned_pairs(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LLMQ_INLINE Pairs pairs_above(Pairs a, int shift) {
    return _mm512_srli_epi16(a, static_cast<unsigned>(shift));
  }
  static LLMQ_INLINE Pairs bits_of_pairs(Pairs a, int mask) {
    return _mm512_and_si512(a, _mm512_set1_epi16(static_cast<std::int16_t>(mask)));
  }
  static Pairs broadcast_pair(const std::int16_t* p) {
    std::int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  // acc + the sum of both products
  static Ints add_pairs(Ints acc, Pairs a, Pairs b) { return _mm512_dpwssd_epi32(acc, a, b); }

  static Floats set_floats(float value) { return _mm512_set1_ps(value); }
  static Floats halves_to_floats(const std::uint16_t* halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
  }
  static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats brains_to_floats(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_halves(std::uint16_t* p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(float* out, Floats a) { _mm512_storeu_ps(out, a); }
};

// Codes of any width. Nothing saturates: |sum| <= 128 * 255 * 127 < 2^31.
template <int kBits>
struct Dot {
  static constexpr int kSpanBlocks = 4;
  static constexpr int kChains = 4;
  static constexpr bool kWide = true;
  static constexpr int kUnpackTokens = kNever;
  static constexpr int kOffset = 0;
  using Operand = __m512i;
  using Part = __m512i;

  static Operand operand(Isa::Bytes codes) { return codes; }
  static Part zero() { return _mm512_setzero_si512(); }
  static Part add(Part part, Operand codes, __m512i x) { return _mm512_dpbusd_epi32(part, codes, x); }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return _mm512_add_epi32(acc, part); }
};

}  // namespace
}  // namespace llmq
