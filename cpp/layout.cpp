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

// Where code (row, column) sits: the byte and the shift within it.
struct Place {
  std::int64_t byte;
  int shift;
};

Place place_of(int bits, int lane, std::int64_t column) {
  const std::int64_t columns = 32 / bits;
  const std::int64_t within = column % columns;
  return {column / columns * kStepBytes + 4 * lane + within % 4, static_cast<int>(within / 4) * 4};
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
  require(bits == 4 || bits == 8, "bits of a stored code are " + std::to_string(bits) + "; the kernels read 4 or 8");
  require(source_group == k || source_group % 32 == 0,
          "group size " + std::to_string(source_group) + " is neither the whole row nor a multiple of 32");
  require(source_group <= max_group() || source_group % max_group() == 0 || source_group == k,
          "group size " + std::to_string(source_group) + " is above " + std::to_string(max_group()) +
              " and no multiple of it");
}

std::int64_t Layout::payload_offset() const { return round_up(groups() * kPanelRows * (has_zero ? 3 : 2), kStepBytes); }

std::int64_t Layout::panel_bytes() const {
  return payload_offset() + (k + step_columns() - 1) / step_columns() * kStepBytes;
}

PackedMatrix Layout::view(const void* data, std::size_t size) const {
  require(reinterpret_cast<std::uintptr_t>(data) % kStepBytes == 0,
          "packed weight: its data is not aligned to 64 bytes; copy it into a new tensor");
  require(size >= sizeof(Header), "packed weight: " + std::to_string(size) + " bytes cannot hold the header of 64");
  Header h;
  std::memcpy(&h, data, sizeof h);
  require(h.magic == kMagic, "packed weight: it does not start with 'LQ16', so llmq.kernels.pack did not make it");
  require_field("layout version", h.version, kLayoutVersion);
  require_field("bits", h.bits, bits);
  require_field("rows", h.n, n);
  require_field("columns", h.k, k);
  require_field("group", h.group, group());
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
          .mid = mid};
}

void Layout::pack(const std::uint8_t* q, const std::uint16_t* scale, const std::uint8_t* zero,
                  std::uint8_t* out) const {
  const Header h{.magic = kMagic,
                 .version = kLayoutVersion,
                 .n = n,
                 .k = k,
                 .bytes = bytes(),
                 .bits = static_cast<std::uint32_t>(bits),
                 .group = static_cast<std::uint32_t>(group()),
                 .has_zero = has_zero,
                 .mid = static_cast<std::uint32_t>(mid),
                 .reserved = {}};
  std::memcpy(out, &h, sizeof h);
  parallel_for(panels(), [&](std::int64_t p) noexcept {
    std::uint8_t* panel = out + sizeof(Header) + p * panel_bytes();
    std::memset(panel, 0, static_cast<std::size_t>(panel_bytes()));
    for (std::int64_t row = p * kPanelRows; row < n && row < (p + 1) * kPanelRows; ++row) {
      const int lane = static_cast<int>(row % kPanelRows);
      for (std::int64_t g = 0; g < groups(); ++g) {
        const std::int64_t from = row * source_groups() + g * group() / source_group;
        const std::int64_t to = g * kPanelRows + lane;
        std::memcpy(panel + 2 * to, scale + from, 2);
        if (has_zero) panel[zeros_offset() + to] = zero[from];
      }
      for (std::int64_t column = 0; column < k; ++column) {
        const Place at = place_of(bits, lane, column);
        panel[payload_offset() + at.byte] |= static_cast<std::uint8_t>(q[row * k + column] << at.shift);
      }
    }
  });
}

void Layout::unpack(const PackedMatrix& w, std::uint8_t* q, std::uint16_t* scale, std::uint8_t* zero) const {
  const int mask = (1 << bits) - 1;
  parallel_for(panels(), [&](std::int64_t p) noexcept {
    const std::uint8_t* panel = w.panels + p * w.panel_stride;
    for (std::int64_t row = p * kPanelRows; row < n && row < (p + 1) * kPanelRows; ++row) {
      const int lane = static_cast<int>(row % kPanelRows);
      for (std::int64_t g = 0; g < source_groups(); ++g) {
        const std::int64_t from = g * source_group / group() * kPanelRows + lane;
        std::memcpy(scale + row * source_groups() + g, panel + 2 * from, 2);
        if (has_zero) zero[row * source_groups() + g] = panel[w.zeros_offset + from];
      }
      for (std::int64_t column = 0; column < k; ++column) {
        const Place at = place_of(bits, lane, column);
        q[row * k + column] = static_cast<std::uint8_t>((panel[w.payload_offset + at.byte] >> at.shift) & mask);
      }
    }
  });
}

}  // namespace llmq
