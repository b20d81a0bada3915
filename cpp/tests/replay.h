// What the kinds of cases of the replay program share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <istream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace llmq::replay {

using Values = std::map<std::string, std::int64_t>;

struct Case {
  std::string line;
  Values values;
  std::istream& file;

  std::int64_t operator[](const std::string& name) const {
    const auto found = values.find(name);
    if (found == values.end()) throw std::runtime_error("'" + line + "' does not say " + name);
    return found->second;
  }

  template <class T>
  std::vector<T> read(std::int64_t count) const {
    std::vector<T> array(static_cast<std::size_t>(count));
    const auto bytes = static_cast<std::streamsize>(array.size() * sizeof(T));
    file.read(reinterpret_cast<char*>(array.data()), bytes);
    if (file.gcount() != bytes) throw std::runtime_error("the file ends within '" + line + "'");
    return array;
  }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Weights {
  Layout layout;
  std::unique_ptr<void, Free> data;
  PackedMatrix view;
};

inline Weights read_weights(const Case& c) {
  const Layout layout(c["n"], c["k"], c["group"], static_cast<int>(c["bits"]), c["zeros"] != 0,
                      static_cast<int>(c["mid"]));
  const std::int64_t scales = layout.n * layout.source_groups();
  const auto q = c.read<std::uint8_t>(layout.n * layout.k);
  const auto scale = c.read<std::uint16_t>(scales);
  const auto zero = c.read<std::uint8_t>(layout.has_zero ? scales : 0);
  const auto bytes = static_cast<std::size_t>(layout.bytes());
  std::unique_ptr<void, Free> data(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  layout.pack(q.data(), scale.data(), zero.data(), static_cast<std::uint8_t*>(data.get()));
  const PackedMatrix view = layout.view(data.get(), bytes);
  return {layout, std::move(data), view};
}

void replay_model(const Case& c);
void replay_attend(const Case& c);

}  // namespace llmq::replay
