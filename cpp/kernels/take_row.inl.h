// One dequantized row of an LQ16 matrix. Included inside an anonymous namespace, once an ISA.

template <int kBits>
void take_row(const PackedMatrix& w, std::int64_t row, float* out) {
  constexpr int kColumns = 32 / kBits;  // columns of a step
  const std::uint8_t* panel = w.panels + row / kPanelRows * w.panel_stride;
  const int lane = static_cast<int>(row % kPanelRows);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(panel);
  for (std::int64_t group = 0; group < w.groups; ++group) {
    const float scale = half_to_float(scales[group * kPanelRows + lane]);
    const int zero = w.zeros_offset ? panel[w.zeros_offset + group * kPanelRows + lane] : w.mid;
    const std::int64_t begin = group * w.group;
    const std::int64_t end = begin + w.group < w.k ? begin + w.group : w.k;
    for (std::int64_t column = begin; column < end; ++column) {
      const int within = static_cast<int>(column % kColumns);
      const std::uint8_t byte = panel[w.payload_offset + column / kColumns * kStepBytes + 4 * lane + within % 4];
      const int code = kBits == 8 ? byte : (byte >> (within / 4 * 4)) & 15;
      out[column] = scale * static_cast<float>(code - zero);
    }
  }
}
