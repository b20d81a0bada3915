// The Python module llmq._core. Arrays come as addresses: llmq/kernels checks dtype, shape and contiguity before it
// calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "dispatch.h"
#include "engine/linear.h"
#include "engine/sampler.h"
#include "engine/thread_pool.h"
#include "layout.h"

namespace py = pybind11;
using namespace py::literals;

namespace llmq {
namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const KernelTable* table : available_tables()) names.emplace_back(table->isa);
  return names;
}

void bind_layout(py::module_& m) {
  py::class_<Layout>(m, "Layout", "Shape and grid of a matrix in the packed form LQ16.")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, int, bool, int>(), py::kw_only(), "n"_a, "k"_a,
           "source_group"_a, "bits"_a, "has_zero"_a, "mid"_a)
      .def_property_readonly("group", &Layout::group)
      .def_property_readonly("groups", &Layout::groups)
      .def_property_readonly("nbytes", &Layout::bytes)
      .def(
          "pack",
          [](const Layout& layout, Address q, Address scale, Address zero, Address out) {
            const py::gil_scoped_release unlocked;
            layout.pack(at<const std::uint8_t>(q), at<const std::uint16_t>(scale), at<const std::uint8_t>(zero),
                        at<std::uint8_t>(out));
          },
          py::kw_only(), "q"_a, "scale"_a, "zero"_a, "out"_a)
      .def(
          "unpack",
          [](const Layout& layout, Address data, std::size_t nbytes, Address q, Address scale, Address zero) {
            const PackedMatrix w = layout.view(at<const void>(data), nbytes);
            const py::gil_scoped_release unlocked;
            layout.unpack(w, at<std::uint8_t>(q), at<std::uint16_t>(scale), at<std::uint8_t>(zero));
          },
          py::kw_only(), "data"_a, "nbytes"_a, "q"_a, "scale"_a, "zero"_a)
      .def(
          "qgemm",
          [](const Layout& layout, Address data, std::size_t nbytes, Address x, std::int64_t m, Address bias,
             Address out) {
            const PackedMatrix w = layout.view(at<const void>(data), nbytes);
            const py::gil_scoped_release unlocked;
            qgemm(current_table(), layout, w, at<const float>(x), m, at<const float>(bias), at<float>(out));
          },
          py::kw_only(), "data"_a, "nbytes"_a, "x"_a, "m"_a, "bias"_a, "out"_a)
      .def(
          "take_rows",
          [](const Layout& layout, Address data, std::size_t nbytes, Address ids, std::int64_t count, Address out) {
            const PackedMatrix w = layout.view(at<const void>(data), nbytes);
            const py::gil_scoped_release unlocked;
            take_rows(current_table(), layout, w, at<const std::int64_t>(ids), count, at<float>(out));
          },
          py::kw_only(), "data"_a, "nbytes"_a, "ids"_a, "count"_a, "out"_a);
}

Sampler make_sampler(std::int64_t vocabulary, bool greedy, float repetition_penalty, float temperature,
                     std::int64_t top_k, double top_p, float min_p, std::uint64_t seed) {
  return Sampler(vocabulary, {.greedy = greedy,
                              .repetition_penalty = repetition_penalty,
                              .temperature = temperature,
                              .top_k = top_k,
                              .top_p = top_p,
                              .min_p = min_p,
                              .seed = seed});
}

void bind_sampler(py::module_& m) {
  py::class_<Sampler>(m, "Sampler", "Chooses tokens; one object for one thread at a time.")
      .def(py::init(&make_sampler), py::kw_only(), "vocabulary"_a, "greedy"_a, "repetition_penalty"_a, "temperature"_a,
           "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a)
      .def(
          "sample",
          [](Sampler& sampler, Address logits, Address history, std::int64_t history_size, Address banned,
             std::int64_t banned_size, std::uint64_t stream, std::uint64_t position, Address probabilities) {
            const py::gil_scoped_release unlocked;
            const Draw draw{at<float>(logits), at<const std::int64_t>(history),
                            history_size,      at<const std::int64_t>(banned),
                            banned_size,       stream,
                            position};
            return sampler.sample(current_table(), draw, at<float>(probabilities));
          },
          "logits"_a, "history"_a, "history_size"_a, "banned"_a, "banned_size"_a, "stream"_a, "position"_a,
          "probabilities"_a = 0);
  m.def("uniform", &uniform, "seed"_a, "stream"_a, "position"_a, "The sampler's random number in [0, 1).");
  m.def(
      "philox",
      [](std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
        std::uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
        philox(c, k);
        return std::array<std::uint32_t, 4>{c[0], c[1], c[2], c[3]};
      },
      "counter"_a, "key"_a, "Block function of the generator Philox4x32-10.");
}

}  // namespace
}  // namespace llmq

PYBIND11_MODULE(_core, m) {
  using namespace llmq;
  m.doc() = "Compiled kernels of llmq; use them through llmq.kernels.";
  bind_layout(m);
  bind_decoder(m);
  m.attr("LAYOUT_VERSION") = kLayoutVersion;
  bind_sampler(m);
  m.def("isas", isa_names, "Kernel sets this CPU can run, best first.");
  m.def("isa", [] { return current_table().isa; }, "The kernel set in use.");
  m.def("use_isa", use_table, "isa"_a, "Use another kernel set; ValueError lists the available ones.");
  m.def(
      "features",
      [](std::uint64_t leaf1_ecx, std::uint64_t leaf7_ebx, std::uint64_t leaf7_ecx, std::uint64_t leaf7_1_eax,
         std::uint64_t xcr0, std::uint64_t hwcap, std::uint64_t hwcap2) {
        return features_of({leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_1_eax, xcr0, hwcap, hwcap2});
      },
      py::kw_only(), "leaf1_ecx"_a = 0, "leaf7_ebx"_a = 0, "leaf7_ecx"_a = 0, "leaf7_1_eax"_a = 0, "xcr0"_a = 0,
      "hwcap"_a = 0, "hwcap2"_a = 0, "CPU features that these words of CPUID, XGETBV or the auxiliary vector grant.");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, "n"_a, py::call_guard<py::gil_scoped_release>());
  m.def(
      "quantize_rows",
      [](Address x, std::int64_t rows, std::int64_t k, std::int64_t group, std::int64_t stride, Address q,
         Address scale, Address total) {
        const QuantizedRows out{.q = at<std::int8_t>(q),
                                .scale = at<float>(scale),
                                .total = at<std::int32_t>(total),
                                .stride = stride,
                                .groups = (k + group - 1) / group};
        current_table().quantize_rows(at<const float>(x), {0, rows}, k, group, out);
      },
      py::kw_only(), "x"_a, "m"_a, "k"_a, "group"_a, "stride"_a, "q"_a, "scale"_a, "total"_a);
  m.def(
      "hadamard", [](Address x, std::int64_t n) { current_table().hadamard(at<float>(x), n); }, py::kw_only(), "x"_a,
      "n"_a);
  m.def(
      "add_low_rank",
      [](Address b, std::int64_t n, std::int64_t rank, int type, Address low, std::int64_t m, float scale,
         Address out) {
        const LowRankSum job{.b = at<const void>(b),
                             .rank = rank,
                             .stride = n,
                             .low = at<const float>(low),
                             .scale = scale,
                             .out = at<float>(out),
                             .out_stride = n};
        current_table().add_low_rank[static_cast<DenseType>(type)](job, {0, n}, {0, m});
      },
      py::kw_only(), "b"_a, "n"_a, "rank"_a, "type"_a, "low"_a, "m"_a, "scale"_a, "out"_a);
  m.def(
      "block_max",
      [](Address x, std::int64_t n, Address out) { current_table().block_max(at<const float>(x), n, at<float>(out)); },
      py::kw_only(), "x"_a, "n"_a, "out"_a);
  m.def(
      "exp_sum",
      [](Address x, std::int64_t n, float shift, float scale, Address out) {
        return current_table().exp_sum(at<const float>(x), n, shift, scale, at<float>(out));
      },
      py::kw_only(), "x"_a, "n"_a, "shift"_a, "scale"_a, "out"_a);
  m.def(
      "stream_read",
      [](Address data, std::int64_t nbytes) {
        return stream_read(current_table(), at<const std::uint64_t>(data), nbytes / 8);
      },
      "data"_a, "nbytes"_a, py::call_guard<py::gil_scoped_release>(),
      "Xor of the 64-bit words at an address, read once.");
}
