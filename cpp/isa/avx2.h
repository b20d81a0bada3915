// AVX2 without VNNI: products of unsigned codes and signed activations go through vpmaddubsw, which adds two of them in
// int16 and saturates. The bounds below say why it never does.
#pragma once

#include "isa/ymm.h"

namespace llmq {
namespace {

// Narrow sums are int16, two a row, each of two products of every quad: with codes up to c, a block of 32 columns adds
// at most 8 * 2 * c * 127 = 2032 c to them, and 32767 is the limit.
//   2 bits: c =  3,  6096 a block, 4 blocks 24384
//   3 bits: c =  7, 14224 a block, 2 blocks 28448
//   4 bits: c = 15, 30480 a block
template <int kBits>
struct Dot {
  static constexpr int kSpanBlocks = kBits == 2 ? 4 : kBits == 3 ? 2 : 1;
  static constexpr int kChains = 1;
  static constexpr bool kWide = false;
  // Unpacking 4 or 2 bits again for each tile costs less than reading them unpacked.
  static constexpr int kUnpackTokens = kBits == 3 ? 8 : kNever;
  static constexpr int kOffset = 0;
  using Operand = __m256i;
  using Part = __m256i;  // i16[16]

  static Operand operand(Isa::Bytes codes) { return codes; }
  static Part zero() { return _mm256_setzero_si256(); }
  // Adds in the order written. Left alone, the compiler regroups the sums and spills a register for each product.
  static Part add(Part part, Operand codes, __m256i x) {
    __m256i sum = _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, x));
    __asm__("" : "+x"(sum));
    return sum;
  }
  static Isa::Ints widen(Isa::Ints acc, Part part) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
};

// 8-bit codes minus 128, as magnitude and sign: |product pair| <= 2 * 128 * 127 = 32512 < 32767, widened at once.
template <>
struct Dot<8> {
  static constexpr int kSpanBlocks = 4;
  static constexpr int kChains = 1;
  static constexpr bool kWide = true;
  static constexpr int kUnpackTokens = kNever;
  static constexpr int kOffset = 128;
  struct Operand {
    __m256i magnitude, sign;
  };
  using Part = __m256i;  // i32[8]

  static Operand operand(Isa::Bytes codes) {
    const __m256i sign = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return {_mm256_abs_epi8(sign), sign};  // |-128| is 128 when read as unsigned
  }
  static Part zero() { return _mm256_setzero_si256(); }
  static Part add(Part part, const Operand& w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.sign));
    __m256i sum = _mm256_add_epi32(part, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(sum));
    return sum;
  }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return _mm256_add_epi32(acc, part); }
};

}  // namespace
}  // namespace llmq
