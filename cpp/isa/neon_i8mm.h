// ARM with i8mm (ARMv8.6): usdot multiplies unsigned codes by signed activations and adds four products to a lane.
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
  static constexpr int kOffset = 0;
  using Operand = uint8x16_t;
  using Part = int32x4_t;

  static Operand operand(Isa::Bytes codes) { return codes; }
  static Part add(Part part, Operand codes, int8x16_t x) { return vusdotq_s32(part, codes, x); }
  static Part zero() { return vdupq_n_s32(0); }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return vaddq_s32(acc, part); }
};

}  // namespace
}  // namespace llmq
