// ARM with dot products (ARMv8.2 dotprod): sdot multiplies signed by signed bytes and adds four products to a lane.
#pragma once

#include "isa/q_registers.h"

namespace llmq {
namespace {

// Nothing saturates: |sum| <= 128 * 255 * 127 < 2^31.
template <int kBits>
struct Dot {
  static constexpr int kSpanBlocks = 4;
  static constexpr int kChains = 2;
  static constexpr bool kWide = true;
  static constexpr int kUnpackTokens = kBits == 8 ? kNever : 12;
  // Codes up to 15 are signed bytes as they are; 8-bit codes are, less 128.
  static constexpr int kOffset = kBits == 8 ? 128 : 0;
  using Operand = int8x16_t;
  using Part = int32x4_t;

  static Operand operand(Isa::Bytes codes) {
    return vreinterpretq_s8_u8(kBits == 8 ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
  }
  static Part add(Part part, Operand codes, int8x16_t x) { return vdotq_s32(part, codes, x); }
  static Part zero() { return vdupq_n_s32(0); }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return vaddq_s32(acc, part); }
};

}  // namespace
}  // namespace llmq
