// What the parts of the Python module share. Arrays come as addresses: llmq/ checks dtype, shape and contiguity first.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace llmq {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_decoder(pybind11::module_& m);

}  // namespace llmq
