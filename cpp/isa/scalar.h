// Baseline C++ with the compilers' generic 16-byte vectors: no intrinsics, runs on every CPU (SSE2 and NEON are enough
// to make it quick, and neither is needed).
#pragma once

#include <cstdint>

namespace llmq {
namespace {

float half_to_float(std::uint16_t half);
float bits_to_float(std::uint32_t bits);
std::uint32_t float_to_bits(float value);

// Float to IEEE half, ties to even; beyond the largest half: infinity. NaN stays NaN.
std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the half is denormal: adding 0.5 leaves its bits, rounded, at the end of the float.
    const std::uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return static_cast<std::uint16_t>(sign | (shifted - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | (magnitude + 0x0fffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}

typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));
typedef std::uint16_t UShorts8 __attribute__((vector_size(16)));
typedef std::int16_t Shorts8 __attribute__((vector_size(16)));
typedef std::int32_t Ints4 __attribute__((vector_size(16)));
typedef float Floats4 __attribute__((vector_size(16)));

// Sum of the two 16-bit halves of each 32-bit lane, widened.
Ints4 add_halves(Shorts8 a) {
  const UShorts8 bits = (UShorts8)a;
  const Ints4 lanes = (Ints4)bits;
  return (((lanes) << 16) >> 16) + (lanes >> 16);
}

struct Isa {
  static constexpr int kRows = 4;
  static constexpr int kPanelsOneToken = 1;
  static constexpr int kTilePanels = 1;
  static constexpr int kTileTokens = 2;

  using Bytes = Bytes16;
  using Ints = Ints4;
  using Floats = Floats4;

  static Bytes load_bytes(const std::uint8_t* p) {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return bytes;
  }
  static void store_bytes(std::uint8_t* p, Bytes a) { __builtin_memcpy(p, &a, sizeof a); }
  // (byte >> shift) & mask; a negative shift goes left. The mask drops what 16-bit shifts bring in from neighbours.
  static LLMQ_INLINE Bytes bits_at(Bytes a, int shift, int mask) {
    const UShorts8 pairs = (UShorts8)a;
    return (Bytes)(shift < 0 ? pairs << -shift : pairs >> shift) & static_cast<std::uint8_t>(mask);
  }
  static Bytes either(Bytes a, Bytes b) { return a | b; }

  // Four activations as 16-bit numbers, those of even and those of odd columns, once a 32-bit lane.
  struct Four {
    Shorts8 even, odd;
  };

  static Four broadcast4(const std::int8_t* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const Shorts8 pairs = (Shorts8)set_ints(four);
    return {(Shorts8)((UShorts8)pairs << 8) >> 8, pairs >> 8};
  }

  static Ints set_ints(std::int32_t value) { return Ints{value, value, value, value}; }

  // offset - zero[r]; without zeros offset - mid
  static Ints offset_minus_zeros(int offset, const std::uint8_t* zeros, std::int32_t mid) {
    return zeros ? offset - Ints{zeros[0], zeros[1], zeros[2], zeros[3]} : set_ints(offset - mid);
  }
  static Ints add_product(Ints acc, Ints a, Ints total) { return acc + a * total; }

  // Two 16-bit numbers a 32-bit lane, widened.
  struct Pairs {
    Ints first, second;
  };
  static Pairs load_pairs(const std::int8_t* p) { return {Ints{p[0], p[2], p[4], p[6]}, Ints{p[1], p[3], p[5], p[7]}}; }
  static Pairs load_unsigned_pairs(const std::uint8_t* p) {
    return {Ints{p[0], p[2], p[4], p[6]}, Ints{p[1], p[3], p[5], p[7]}};
  }
  static LLMQ_INLINE Pairs pairs_above(const Pairs& a, int shift) { return {a.first >> shift, a.second >> shift}; }
  static LLMQ_INLINE Pairs bits_of_pairs(const Pairs& a, int mask) { return {a.first & mask, a.second & mask}; }
  static Pairs broadcast_pair(const std::int16_t* p) { return {set_ints(p[0]), set_ints(p[1])}; }
  // acc + the sum of both products
  static Ints add_pairs(Ints acc, const Pairs& a, const Pairs& b) {
    return acc + a.first * b.first + a.second * b.second;
  }

  static Floats set_floats(float value) { return Floats{value, value, value, value}; }

  static Floats halves_to_floats(const std::uint16_t* halves) {
    return Floats{half_to_float(halves[0]), half_to_float(halves[1]), half_to_float(halves[2]),
                  half_to_float(halves[3])};
  }

  static Floats to_floats(Ints a) { return __builtin_convertvector(a, Floats); }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // rounds twice: this CPU may have no fma
  static Floats load(const float* p) {
    Floats a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static Floats brains_to_floats(const std::uint16_t* p) {
    Ints4 bits{p[0], p[1], p[2], p[3]};
    return (Floats)(bits << 16);
  }
  static void store_halves(std::uint16_t* p, Floats a) {
    for (int i = 0; i < 4; ++i) p[i] = float_to_half(a[i]);
  }
  static void store(float* out, Floats a) { __builtin_memcpy(out, &a, sizeof a); }
};

// Codes as 16-bit numbers, those of even and those of odd columns, four columns a 32-bit lane.
struct Codes {
  Shorts8 even, odd;
};

// Narrow sums are int16, two a row. A block of 32 columns adds at most 16 * c * 127 = 2032 c to one, codes going up to
// c: 24384 in 4 blocks of 2-bit codes, 28448 in 2 blocks of 3-bit codes, 30480 in one of 4-bit codes, all below 32767.
template <int kBits>
struct Dot {
  static constexpr int kSpanBlocks = kBits == 2 ? 4 : kBits == 3 ? 2 : 1;
  static constexpr int kChains = 1;
  static constexpr bool kWide = false;
  static constexpr int kUnpackTokens = 4;
  static constexpr int kOffset = 0;
  using Operand = Codes;
  using Part = Shorts8;

  static Operand operand(Isa::Bytes codes) {
    const UShorts8 pairs = (UShorts8)codes;
    return {(Shorts8)(pairs & 255), (Shorts8)(pairs >> 8)};
  }
  static Part zero() { return Part{}; }
  static Part add(Part part, const Operand& codes, const Isa::Four& x) {
    return part + codes.even * x.even + codes.odd * x.odd;
  }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return acc + add_halves(part); }
};

// 8-bit codes: a product is at most 255 * 127 = 32385 < 32767, and is widened before it is added.
template <>
struct Dot<8> {
  static constexpr int kSpanBlocks = 1;
  static constexpr int kChains = 1;
  static constexpr bool kWide = true;
  static constexpr int kUnpackTokens = kNever;
  static constexpr int kOffset = 0;
  using Operand = Codes;
  using Part = Isa::Ints;

  static Operand operand(Isa::Bytes codes) { return Dot<4>::operand(codes); }
  static Part zero() { return Part{}; }
  static Part add(Part part, const Operand& codes, const Isa::Four& x) {
    return part + add_halves(codes.even * x.even) + add_halves(codes.odd * x.odd);
  }
  static Isa::Ints widen(Isa::Ints acc, Part part) { return acc + part; }
};

}  // namespace
}  // namespace llmq
