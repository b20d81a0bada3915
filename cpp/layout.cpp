#include "layout.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "engine/thread_pool.h"

namespace llmq {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

void require_field(const char* field, std::int64_t actual, std::int64_t expected) {
  require(actual == expected, std::string("packed weight: its header says ") + field + " " + std::to_string(actual) +
                                  ", expected " + std::to_string(expected) + "; pack the QTensor again");
}

// A code lies in up to two places of its block: its low bits, and for 3 bits the high one in a vector of its own.
struct Place {
  int byte, shift, bits;
};

struct Places {
  Place low, high;
};

// Of column `within` (0 .. 31) of a block, in row `lane` of the panel.
Places places_of(int bits, int lane, int within) {
  const int low_bits = bits == 3 ? 2 : bits, quads = 8 / low_bits, quad = within / 4;
  const int byte = 4 * lane + within % 4;
  return {.low = {quad / quads * kVectorBytes + byte, quad % quads * low_bits, low_bits},
          .high = {2 * kVectorBytes + byte, quad, bits - low_bits}};
}

void put(std::uint8_t* block, const Places& at, int code) {
  block[at.low.byte] |= static_cast<std::uint8_t>((code & ((1 << at.low.bits) - 1)) << at.low.shift);
  if (at.high.bits) block[at.high.byte] |= static_cast<std::uint8_t>(code >> at.low.bits << at.high.shift);
}

int get(const std::uint8_t* block, const Places& at) {
  const int low = (block[at.low.byte] >> at.low.shift) & ((1 << at.low.bits) - 1);
  return at.high.bits ? low | ((block[at.high.byte] >> at.high.shift) & 1) << at.low.bits : low;
}

}  // namespace

Layout::Layout(std::int64_t rows, std::int64_t columns, std::int64_t source, int width, bool zeros, int middle)
    : n(rows),
      k(columns),
      source_group(source < columns ? source : columns),
      bits(width),
      has_zero(zeros),
      mid(middle) {
  require(n >= 1 && k >= 1,
          "a packed matrix needs at least one row and column, got " + std::to_string(n) + " x " + std::to_string(k));
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8,
          "bits of a code are " + std::to_string(bits) + "; the kernels read 2, 3, 4 and 8");
  require(source_group == k || source_group % 32 == 0,
          "group size " + std::to_string(source_group) + " is neither the whole row nor a multiple of 32");
  require(source_group <= kMaxGroup || source_group % kMaxGroup == 0 || source_group == k,
          "group size " + std::to_string(source_group) + " is above " + std::to_string(kMaxGroup) +
              " and no multiple of it");
}

std::int64_t Layout::payload_offset() const {
  return round_up(source_groups() * kPanelRows * (has_zero ? 3 : 2), kVectorBytes);
}

std::int64_t Layout::panel_bytes() const {
  return payload_offset() + round_up(k, kBlockColumns) / kBlockColumns * block_bytes();
}

PackedMatrix Layout::view(const void* data, std::size_t size) const {
  require(reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0,
          "packed weight: its data is not aligned to 64 bytes; copy it into a new tensor");
  require(size >= sizeof(Header), "packed weight: " + std::to_string(size) + " bytes cannot hold the header of 64");
  Header h;
  std::memcpy(&h, data, sizeof h);
  require(h.magic == kMagic, "packed weight: it does not start with 'LQ16', so llmq.kernels.pack did not make it");
  require_field("layout version", h.version, kLayoutVersion);
  require_field("bits", h.bits, bits);
  require_field("rows", h.n, n);
  require_field("columns", h.k, k);
  require_field("group", h.group, source_group);
  require_field("has_zero", h.has_zero, has_zero);
  require_field("mid", h.mid, mid);
  require_field("bytes", h.bytes, bytes());
  require(size == static_cast<std::size_t>(bytes()),
          "packed weight: it has " + std::to_string(size) + " bytes, its shape needs " + std::to_string(bytes()));
  return {.panels = static_cast<const std::uint8_t*>(data) + sizeof(Header),
          .panel_stride = panel_bytes(),
          .zeros_offset = has_zero ? zeros_offset() : 0,
          .payload_offset = payload_offset(),
          .n = n,
          .k = k,
          .group = group(),
          .groups = groups(),
          .mid = mid,
          .share = static_cast<std::int32_t>(source_group == k ? groups() : source_group / group())};
}

void Layout::pack(const std::uint8_t* q, const std::uint16_t* scale, const std::uint8_t* zero,
                  std::uint8_t* out) const {
  const Header h{.magic = kMagic,
                 .version = kLayoutVersion,
                 .n = n,
                 .k = k,
                 .bytes = bytes(),
                 .bits = static_cast<std::uint32_t>(bits),
                 .group = static_cast<std::uint32_t>(source_group),
                 .has_zero = has_zero,
                 .mid = static_cast<std::uint32_t>(mid),
                 .reserved = {}};
  std::memcpy(out, &h, sizeof h);
  parallel_for(panels(), [&](std::int64_t p) noexcept {
    std::uint8_t* panel = out + sizeof(Header) + p * panel_bytes();
    std::memset(panel, 0, static_cast<std::size_t>(panel_bytes()));
    for (std::int64_t row = p * kPanelRows; row < n && row < (p + 1) * kPanelRows; ++row) {
      const int lane = static_cast<int>(row % kPanelRows);
      for (std::int64_t g = 0; g < source_groups(); ++g) {
        const std::int64_t from = row * source_groups() + g, to = g * kPanelRows + lane;
        std::memcpy(panel + 2 * to, scale + from, 2);
        if (has_zero) panel[zeros_offset() + to] = zero[from];
      }
      for (std::int64_t column = 0; column < k; ++column) {
        put(panel + payload_offset() + column / kBlockColumns * block_bytes(),
            places_of(bits, lane, static_cast<int>(column % kBlockColumns)), q[row * k + column]);
      }
    }
  });
}

void Layout::unpack(const PackedMatrix& w, std::uint8_t* q, std::uint16_t* scale, std::uint8_t* zero) const {
  parallel_for(panels(), [&](std::int64_t p) noexcept {
    const std::uint8_t* panel = w.panels + p * w.panel_stride;
    for (std::int64_t row = p * kPanelRows; row < n && row < (p + 1) * kPanelRows; ++row) {
      const int lane = static_cast<int>(row % kPanelRows);
      for (std::int64_t g = 0; g < source_groups(); ++g) {
        const std::int64_t from = g * kPanelRows + lane, to = row * source_groups() + g;
        std::memcpy(scale + to, panel + 2 * from, 2);
        if (has_zero) zero[to] = panel[w.zeros_offset + from];
      }
      for (std::int64_t column = 0; column < k; ++column) {
        q[row * k + column] =
            static_cast<std::uint8_t>(get(panel + w.payload_offset + column / kBlockColumns * block_bytes(),
                                          places_of(bits, lane, static_cast<int>(column % kBlockColumns))));
      }
    }
  });
}

}  // namespace llmq
