// Scalar number conversions shared by the kernel bodies. Included inside an anonymous namespace, once an ISA.

float bits_to_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// IEEE half to float, exact. No intermediate value is a denormal float, so flush-to-zero modes do not matter.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {
    value = bits_to_float(0x7f800000u | (magnitude << 13));
  } else if (magnitude >= 0x0400u) {
    value = bits_to_float((magnitude << 13) + (112u << 23));
  } else {
    value = bits_to_float((113u << 23) + (magnitude << 13)) - 0x1p-14f;
  }
  return bits_to_float(float_to_bits(value) | sign);
}
