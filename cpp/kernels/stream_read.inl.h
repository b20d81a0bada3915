// How fast this machine reads memory. Included inside an anonymous namespace, once an ISA; the compiler vectorizes it.

std::uint64_t stream_read(const std::uint64_t* data, std::int64_t words) {
  std::uint64_t lanes[32] = {};  // many independent chains: the loads, not the xors, must be the limit
  std::int64_t i = 0;
  for (; i + 32 <= words; i += 32) {
    for (int j = 0; j < 32; ++j) lanes[j] ^= data[i + j];
  }
  for (; i < words; ++i) lanes[0] ^= data[i];
  std::uint64_t all = 0;
  for (int j = 0; j < 32; ++j) all ^= lanes[j];
  return all;
}
