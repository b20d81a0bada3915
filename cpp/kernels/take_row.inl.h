// One dequantized row of an LQ16 matrix. Included inside an anonymous namespace, once an ISA.

// The code of column `within` (0 .. 31) of a block, in row `lane` of the panel.
template <int kBits>
int code_at(const std::uint8_t* block, int lane, int within) {
  constexpr int kPlane = kBits == 3 ? 2 : kBits;  // bits of a code that lie together
  constexpr int kQuads = 8 / kPlane;              // quads of columns in a vector
  const int quad = within / 4;
  const std::uint8_t* byte = block + 4 * lane + within % 4;
  const int code = (byte[quad / kQuads * kVectorBytes] >> (quad % kQuads * kPlane)) & ((1 << kPlane) - 1);
  return kBits == 3 ? code | (byte[2 * kVectorBytes] >> quad & 1) << 2 : code;
}

template <int kBits>
void take_row(const PackedMatrix& w, std::int64_t row, float* out) {
  const std::uint8_t* panel = w.panels + row / kPanelRows * w.panel_stride;
  const int lane = static_cast<int>(row % kPanelRows);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(panel);
  for (std::int64_t group = 0; group < w.groups; ++group) {
    const std::int64_t at = group / w.share * kPanelRows + lane;
    const float scale = half_to_float(scales[at]);
    const int zero = w.zeros_offset ? panel[w.zeros_offset + at] : w.mid;
    const std::int64_t begin = group * w.group;
    const std::int64_t end = begin + w.group < w.k ? begin + w.group : w.k;
    for (std::int64_t column = begin; column < end; ++column) {
      const std::uint8_t* block = panel + w.payload_offset + column / kBlockColumns * (kBits * kVectorBytes);
      out[column] = scale * static_cast<float>(code_at<kBits>(block, lane, column % kBlockColumns) - zero);
    }
  }
}
