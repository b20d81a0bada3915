// AVX2 + F16C, no VNNI: products of unsigned codes and signed activations go through vpmaddubsw, which adds two of them
// in int16 and saturates. The bounds below say why it never does.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llmq {
namespace {

struct Isa {
  static constexpr int kRows = 8;
  static constexpr int kRowVectorsOneToken = 4;
  // 8 partial sums + 4 weights + activation, product and nibble mask fill the 16 registers; the 8 accumulators wait in
  // L1.
  static constexpr int kTileVectors = 2;
  static constexpr int kTileTokens = 4;

  using Ints = __m256i;
  using Floats = __m256;

  static __m256i broadcast4(const std::int8_t* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }

  static Ints set_ints(std::int32_t value) { return _mm256_set1_epi32(value); }

  // (offset - zero[r]) * total. Both factors fit 16 bits (|total| <= 127 * 128) and the upper half of total is cleared,
  // so vpmaddwd multiplies the lower halves only.
  static Ints offset_minus_zeros_times(int offset, const std::uint8_t* zeros, std::int32_t total) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
    return _mm256_madd_epi16(_mm256_sub_epi32(_mm256_set1_epi32(offset), wide), _mm256_set1_epi32(total & 0xffff));
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

// Add in the order written. Left alone, the compiler regroups the sums of a block and spills a register for each
// product.
__m256i in_order(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

template <int kBits>
struct Dot;

// 4-bit codes: |product pair| <= 2 * 15 * 127 = 3810, and a block of 32 columns adds 8 of them: 30480 < 32767.
template <>
struct Dot<4> {
  static constexpr int kOperands = 2;
  static constexpr int kOffset = 0;
  using Operand = __m256i;
  using Part = __m256i;  // i16[16]: two a row

  static void unpack(const std::uint8_t* p, Operand* operands) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i low = _mm256_set1_epi8(15);
    operands[0] = _mm256_and_si256(bytes, low);
    operands[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
  }

  static Part begin(Isa::Ints) { return _mm256_setzero_si256(); }
  static Part add(Part part, Operand codes, __m256i x) {
    return in_order(_mm256_add_epi16(part, _mm256_maddubs_epi16(codes, x)));
  }
  static Isa::Ints end(Isa::Ints acc, Part part) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
};

// 8-bit codes minus 128, as magnitude and sign: |product pair| <= 2 * 128 * 127 = 32512 < 32767, widened at once.
template <>
struct Dot<8> {
  static constexpr int kOperands = 1;
  static constexpr int kOffset = 128;
  struct Operand {
    __m256i magnitude, sign;
  };
  using Part = __m256i;  // i32[8]

  static void unpack(const std::uint8_t* p, Operand* operands) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    operands->sign = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    operands->magnitude = _mm256_abs_epi8(operands->sign);  // |-128| is 128 when read as unsigned
  }

  static Part begin(Isa::Ints acc) { return acc; }
  static Part add(Part part, const Operand& w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.sign));
    return in_order(_mm256_add_epi32(part, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
  static Isa::Ints end(Isa::Ints, Part part) { return part; }
};

}  // namespace
}  // namespace llmq
