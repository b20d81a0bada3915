// LQ16: the packed form of a quantized matrix in memory. One layout serves every ISA.
//
//   header   64 bytes (struct Header)
//   panel p  rows 16p .. 16p+15, padded to a multiple of 64 bytes, one after the other:
//     f16 scale[groups][16]
//     u8  zero[groups][16]            only if has_zero
//     padding to a multiple of 64 bytes
//     payload, a block for every 32 columns: as many vectors of 64 bytes as a code has bits. Columns 4i .. 4i + 3 of a
//     block are its quad i; byte 4r + j of a vector belongs to row r of the panel and to column j of each quad it
//     holds:
//       bits 2: vector v holds quads 4v .. 4v + 3, quad 4v + s in bits 2s and 2s + 1
//       bits 3: vectors 0 and 1 hold the lower two bits as above; bit i of vector 2 is the upper bit of quad i
//       bits 4: vector v holds quads 2v (lower half of the byte) and 2v + 1 (upper half)
//       bits 8: vector v holds quad v
//
// Rows beyond n have scale 0. Columns beyond k have code 0; their activations are 0. Activations share a scale over at
// most kMaxGroup columns, and the kernels sum integers no further: they cut wider groups into such pieces.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel_table.h"

namespace llmq {

constexpr std::uint32_t kMagic = 0x3631514c;  // "LQ16" in memory
constexpr std::uint32_t kLayoutVersion = 3;

struct Header {
  std::uint32_t magic, version;
  std::int64_t n, k, bytes;  // rows, columns, bytes of the whole packed form
  std::uint32_t bits, group, has_zero, mid;
  std::uint8_t reserved[16];
};
static_assert(sizeof(Header) == 64, "the panels after the header must stay aligned to 64 bytes");

// The shape and grid of a packed matrix, and all offsets that follow from them.
struct Layout {
  std::int64_t n, k;
  std::int64_t source_group;  // columns of a group of the matrix before packing
  int bits;                   // 2, 3, 4 or 8
  bool has_zero;
  int mid;  // zero point where has_zero is false

  // Throws std::invalid_argument for a shape or grid that cannot be packed.
  Layout(std::int64_t n, std::int64_t k, std::int64_t source_group, int bits, bool has_zero, int mid);

  // Columns over which int8 activations share a scale, at most: what rounding them costs must be small beside what the
  // weights' bits cost. The pieces of a wider group of the weights share its scale, which is stored once.
  static constexpr std::int64_t kMaxGroup = 64;
  std::int64_t group() const { return source_group < kMaxGroup ? source_group : kMaxGroup; }
  std::int64_t groups() const { return (k + group() - 1) / group(); }
  std::int64_t source_groups() const { return (k + source_group - 1) / source_group; }
  std::int64_t panels() const { return (n + kPanelRows - 1) / kPanelRows; }
  std::int64_t block_bytes() const { return bits * kVectorBytes; }
  std::int64_t zeros_offset() const { return source_groups() * kPanelRows * 2; }
  std::int64_t payload_offset() const;
  std::int64_t panel_bytes() const;
  std::int64_t bytes() const { return static_cast<std::int64_t>(sizeof(Header)) + panels() * panel_bytes(); }

  // The matrix behind `data`; throws std::invalid_argument naming what the header says and what this layout expects.
  PackedMatrix view(const void* data, std::size_t size) const;

  // q u8[n, k], scale f16[n, source_groups], zero u8[n, source_groups] or null -> `bytes()` bytes at `out`.
  void pack(const std::uint8_t* q, const std::uint16_t* scale, const std::uint8_t* zero, std::uint8_t* out) const;
  // The exact inverse of pack.
  void unpack(const PackedMatrix& w, std::uint8_t* q, std::uint16_t* scale, std::uint8_t* zero) const;
};

}  // namespace llmq
