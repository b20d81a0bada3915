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
//   8 bits: two planes of 4 bits, the upper one widened by a factor of 16
template <int kBits>
struct Dot {
  static constexpr int kPlanes = kBits == 8 ? 2 : 1;
  static constexpr int kSpanBlocks = kBits == 2 ? 4 : kBits == 3 ? 2 : 1;
  static constexpr int kChains = 1;
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
  static Isa::Ints widen(Isa::Ints acc, Part part, int plane) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(part, _mm256_set1_epi16(plane == 0 ? 1 : 16)));
  }
};

}  // namespace
}  // namespace llmq
