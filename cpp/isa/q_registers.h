// What the ISAs of 64-bit ARM share: 16-byte registers and conversions that every ARMv8 CPU has.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace llmq {
namespace {

struct Isa {
  static constexpr int kRows = 4;
  static constexpr int kPanelsOneToken = 1;
  // 24 sums, 4 codes and an activation of 32 registers.
  static constexpr int kTilePanels = 1;
  static constexpr int kTileTokens = 6;

  using Bytes = uint8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static Bytes load_bytes(const std::uint8_t* p) { return vld1q_u8(p); }
  static void store_bytes(std::uint8_t* p, Bytes a) { vst1q_u8(p, a); }
  // (byte >> shift) & mask; a negative shift goes left.
  static LLMQ_INLINE Bytes bits_at(Bytes a, int shift, int mask) {
    return (shift < 0 ? a << -shift : a >> shift) & vdupq_n_u8(static_cast<std::uint8_t>(mask));
  }
  static Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }

  static int8x16_t broadcast4(const std::int8_t* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }

  static Ints set_ints(std::int32_t value) { return vdupq_n_s32(value); }

  // offset - zero[r]; without zeros offset - mid
  static Ints offset_minus_zeros(int offset, const std::uint8_t* zeros, std::int32_t mid) {
    if (!zeros) return vdupq_n_s32(offset - mid);
    std::uint32_t four;
    __builtin_memcpy(&four, zeros, sizeof four);
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vsubq_s32(vdupq_n_s32(offset), vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))));
  }
  // acc + a * total
  static Ints add_product(Ints acc, Ints a, Ints total) { return vmlaq_s32(acc, a, total); }

  // Two 16-bit numbers a 32-bit lane.
  struct Pairs {
    int16x4_t first, second;
  };
  static Pairs load_pairs(const std::int8_t* p) {
    const int8x8_t pairs = vld1_s8(p);
    return {vget_low_s16(vmovl_s8(vuzp1_s8(pairs, pairs))), vget_low_s16(vmovl_s8(vuzp2_s8(pairs, pairs)))};
  }
  static Pairs load_unsigned_pairs(const std::uint8_t* p) {
    const uint8x8_t pairs = vld1_u8(p);
    return {vreinterpret_s16_u16(vget_low_u16(vmovl_u8(vuzp1_u8(pairs, pairs)))),
            vreinterpret_s16_u16(vget_low_u16(vmovl_u8(vuzp2_u8(pairs, pairs))))};
  }
  static LLMQ_INLINE Pairs pairs_above(const Pairs& a, int shift) { return {a.first >> shift, a.second >> shift}; }
  static LLMQ_INLINE Pairs bits_of_pairs(const Pairs& a, int mask) {
    const int16x4_t bits = vdup_n_s16(static_cast<std::int16_t>(mask));
    return {vand_s16(a.first, bits), vand_s16(a.second, bits)};
  }
  static Pairs broadcast_pair(const std::int16_t* p) { return {vdup_n_s16(p[0]), vdup_n_s16(p[1])}; }
  // acc + the sum of both products
  static Ints add_pairs(Ints acc, Pairs a, Pairs b) {
    return vmlal_s16(vmlal_s16(acc, a.first, b.first), a.second, b.second);
  }

  static Floats set_floats(float value) { return vdupq_n_f32(value); }
  static Floats halves_to_floats(const std::uint16_t* halves) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
  }
  static Floats to_floats(Ints a) { return vcvtq_f32_s32(a); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats load(const float* p) { return vld1q_f32(p); }
  static Floats brains_to_floats(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static void store_halves(std::uint16_t* p, Floats a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static void store(float* out, Floats a) { vst1q_f32(out, a); }
};

}  // namespace
}  // namespace llmq
