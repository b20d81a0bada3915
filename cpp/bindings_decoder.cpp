// The decoder's part of the Python module llmq._core; llmq/runtime/native.py is its one caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings.h"
#include "dispatch.h"
#include "engine/attention.h"
#include "engine/decoder.h"

namespace py = pybind11;
using namespace py::literals;

namespace llmq {
namespace {

void bind_matrix(py::module_& m) {
  py::class_<Matrix>(m, "Matrix", "A weight matrix of the decoder; its memory belongs to the caller.")
      .def_static(
          "packed",
          [](const Layout& layout, Address data, std::size_t nbytes, Address bias) {
            return Matrix::of_packed(layout, layout.view(at<const void>(data), nbytes), at<const float>(bias));
          },
          py::kw_only(), "layout"_a, "data"_a, "nbytes"_a, "bias"_a)
      .def_static(
          "dense",
          [](Address data, std::int64_t n, std::int64_t k, int type, Address bias) {
            return Matrix::of_dense(at<const void>(data), n, k, static_cast<DenseType>(type), at<const float>(bias));
          },
          py::kw_only(), "data"_a, "n"_a, "k"_a, "type"_a, "bias"_a, "type: 0 bf16, 1 f16, 2 f32")
      .def(
          "adapt",
          [](Matrix& w, Address a, Address b, std::int64_t rank, int type, float scale) {
            w.adapter = {.a = at<const void>(a),
                         .b = at<const void>(b),
                         .type = static_cast<DenseType>(type),
                         .rank = rank,
                         .stride = w.n,
                         .scale = scale};
          },
          py::kw_only(), "a"_a, "b"_a, "rank"_a, "type"_a, "scale"_a, "a [rank, k], b [rank, n]; type as of dense");
}

// A pointer to numbers that Python sets as an address.
template <class Owner, class T>
void vector_field(py::class_<Owner>& owner, const char* name, const T* Owner::* field) {
  owner.def_property(
      name, [field](const Owner& o) { return reinterpret_cast<Address>(o.*field); },
      [field](Owner& o, Address address) { o.*field = at<const T>(address); });
}

void bind_spec(py::module_& m) {
  py::class_<Rope>(m, "Rope").def(py::init<std::vector<float>, float>(), py::kw_only(), "inverse_frequency"_a,
                                  "scaling"_a);
  py::class_<DecoderLayer> layer(m, "DecoderLayer");
  layer.def(py::init<>())
      .def_readwrite("q", &DecoderLayer::q)
      .def_readwrite("k", &DecoderLayer::k)
      .def_readwrite("v", &DecoderLayer::v)
      .def_readwrite("o", &DecoderLayer::o)
      .def_readwrite("gate", &DecoderLayer::gate)
      .def_readwrite("up", &DecoderLayer::up)
      .def_readwrite("down", &DecoderLayer::down)
      .def_readwrite("window", &DecoderLayer::window)
      .def_readwrite("rope", &DecoderLayer::rope);
  vector_field(layer, "attention_norm", &DecoderLayer::attention_norm);
  vector_field(layer, "attention_post_norm", &DecoderLayer::attention_post_norm);
  vector_field(layer, "ffn_norm", &DecoderLayer::ffn_norm);
  vector_field(layer, "ffn_post_norm", &DecoderLayer::ffn_post_norm);
  vector_field(layer, "q_norm", &DecoderLayer::q_norm);
  vector_field(layer, "k_norm", &DecoderLayer::k_norm);
  vector_field(layer, "qkv_order", &DecoderLayer::qkv_order);
  vector_field(layer, "o_order", &DecoderLayer::o_order);
  vector_field(layer, "ffn_order", &DecoderLayer::ffn_order);
  vector_field(layer, "down_order", &DecoderLayer::down_order);

  py::class_<DecoderSpec> spec(m, "DecoderSpec");
  spec.def(py::init<>())
      .def_readwrite("hidden", &DecoderSpec::hidden)
      .def_readwrite("heads", &DecoderSpec::heads)
      .def_readwrite("kv_heads", &DecoderSpec::kv_heads)
      .def_readwrite("head_dim", &DecoderSpec::head_dim)
      .def_readwrite("max_positions", &DecoderSpec::max_positions)
      .def_readwrite("eps", &DecoderSpec::eps)
      .def_readwrite("attention_scale", &DecoderSpec::attention_scale)
      .def_readwrite("embedding_scale", &DecoderSpec::embedding_scale)
      .def_readwrite("attention_softcap", &DecoderSpec::attention_softcap)
      .def_readwrite("final_softcap", &DecoderSpec::final_softcap)
      .def_property(
          "activation", [](const DecoderSpec& s) { return static_cast<int>(s.activation); },
          [](DecoderSpec& s, int value) { s.activation = static_cast<Activation>(value); }, "0 silu, 1 gelu (tanh)")
      .def_readwrite("ropes", &DecoderSpec::ropes)
      .def_readwrite("layers", &DecoderSpec::layers)
      .def_readwrite("embedding", &DecoderSpec::embedding)
      .def_readwrite("head", &DecoderSpec::head);
  vector_field(spec, "final_norm", &DecoderSpec::final_norm);
}

KvType kv_type(int bits) {
  for (int type = 0; type < kKvTypes; ++type) {
    if (kv_bits(static_cast<KvType>(type)) == bits) return static_cast<KvType>(type);
  }
  throw std::invalid_argument(std::to_string(bits) + " bits of a key or value cannot be stored");
}

// Bits of keys and of values, and what KVCacheConfig says besides; see llmq/config.py.
KvLayerShape layer_shape(std::pair<int, int> bits, int near_bits, bool by_column, bool rotate, std::int64_t sinks,
                         std::int64_t recent) {
  KvLayerShape shape{.keys = kv_type(bits.first), .values = kv_type(bits.second), .sinks = sinks, .recent = recent};
  const KvType columns = bits.first == 4 ? kKv4Columns : kKv2Columns;
  if (by_column && bits.first < 8) shape.keys = columns;
  shape.rotate = rotate && bits.first < 16 && !kv_by_column(shape.keys);
  // Codes of 8 bits are as good for every token.
  if ((bits.first < 8 || bits.second < 8) && sinks + recent > 0) shape.near = kv_type(near_bits);
  if (kv_by_column(shape.keys)) shape.near = kv_type(near_bits);
  return shape;
}

std::vector<KvLayerShape> layer_shapes(const std::vector<std::pair<int, int>>& layers, int near_bits, bool by_column,
                                       bool rotate, std::int64_t sinks, std::int64_t recent) {
  std::vector<KvLayerShape> shapes;
  for (const auto& bits : layers) shapes.push_back(layer_shape(bits, near_bits, by_column, rotate, sinks, recent));
  return shapes;
}

std::unique_ptr<Sequence> new_sequence(const Decoder& decoder, const std::vector<std::pair<int, int>>& layers,
                                       int near_bits, bool by_column, bool rotate, std::int64_t sinks,
                                       std::int64_t recent) {
  return std::make_unique<Sequence>(
      decoder.kv_shape(layer_shapes(layers, near_bits, by_column, rotate, sinks, recent)));
}

// A sequence of no decoder; a layer without a window has 0.
std::unique_ptr<Sequence> shaped_sequence(std::int64_t kv_heads, std::int64_t head_dim,
                                          const std::vector<std::int64_t>& windows,
                                          const std::vector<std::pair<int, int>>& layers, int near_bits, bool by_column,
                                          bool rotate, std::int64_t sinks, std::int64_t recent) {
  std::vector<KvLayerShape> shapes = layer_shapes(layers, near_bits, by_column, rotate, sinks, recent);
  for (std::size_t i = 0; i < shapes.size(); ++i) shapes[i].window = windows.at(i);
  return std::make_unique<Sequence>(KvShape{.heads = kv_heads, .head_dim = head_dim, .layers = std::move(shapes)});
}

// Attention of the last `count` of `length` tokens, as one layer of a decoder computes it. Rotation is the caller's.
void attend(Address q, Address k, Address v, std::int64_t count, std::int64_t length, std::int64_t heads,
            std::int64_t kv_heads, std::int64_t head_dim, std::pair<int, int> bits, bool by_column, std::int64_t sinks,
            std::int64_t recent, std::int64_t window, float softcap, Address out) {
  KvLayerShape shape = layer_shape(bits, 16, by_column, false, sinks, recent);
  shape.window = window;
  const py::gil_scoped_release unlocked;
  attend_last(current_table(), shape, at<const float>(k), at<const float>(v), length, count,
              {.layer = 0,
               .heads = heads,
               .kv_heads = kv_heads,
               .head_dim = head_dim,
               .window = window,
               .softcap = softcap,
               .q = at<const float>(q),
               .q_stride = heads * head_dim,
               .out = at<float>(out)});
}

using HeldPages = std::tuple<std::vector<std::int64_t>, std::int64_t, std::int64_t, std::int64_t>;

std::vector<HeldPages> held_pages(const Sequence& sequence) {
  std::vector<HeldPages> all;
  for (const KvPages* part : sequence.pages()) {
    KvPages::Held held = part->held_pages();
    all.emplace_back(std::move(held.numbers), held.first, held.begin, part->page_bytes());
  }
  return all;
}

void read_pages(const Sequence& sequence, const std::vector<Address>& out) {
  const py::gil_scoped_release unlocked;
  const auto held = sequence.lock();
  const std::vector<const KvPages*> parts = sequence.pages();
  for (std::size_t i = 0; i < parts.size(); ++i) parts[i]->read(at<std::byte>(out.at(i)));
}

// Throws std::invalid_argument where the pages have another size or number than the sequence's.
void restore(Sequence& sequence, std::int64_t length, const std::vector<HeldPages>& pages,
             const std::vector<Address>& data) {
  const py::gil_scoped_release unlocked;
  const auto busy = sequence.lock();
  const std::vector<const KvPages*> parts = sequence.pages();
  if (pages.size() != parts.size() || data.size() != parts.size()) {
    throw std::invalid_argument("pages of " + std::to_string(pages.size()) + " parts are given; the sequence has " +
                                std::to_string(parts.size()));
  }
  std::vector<KvPages::Held> held;
  std::vector<const std::byte*> bytes;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto& [numbers, first, begin, page_bytes] = pages[i];
    if (page_bytes != parts[i]->page_bytes()) {
      throw std::invalid_argument("pages of part " + std::to_string(i) + " have " + std::to_string(page_bytes) +
                                  " bytes; the sequence's have " + std::to_string(parts[i]->page_bytes()));
    }
    held.push_back({numbers, first, begin});
    bytes.push_back(at<const std::byte>(data[i]));
  }
  sequence.restore(length, held, bytes);
}

void bind_sequence(py::module_& m) {
  m.attr("KV_LAYOUT_VERSION") = kKvLayoutVersion;
  m.def("shared_bytes", &shared_bytes, "sequences"_a, "bytes held by sequences together; a shared page counts once");
  m.def("shaped_sequence", &shaped_sequence, py::kw_only(), "kv_heads"_a, "head_dim"_a, "windows"_a, "layers"_a,
        "near_bits"_a, "by_column"_a, "rotate"_a, "sinks"_a, "recent"_a,
        "keys and values of no decoder, to see what they take");
  // What changes a sequence takes its lock, so that no step runs meanwhile.
  py::class_<Sequence>(m, "Sequence", "Keys and values of one sequence.")
      .def_property_readonly("length", &Sequence::length)
      .def_property_readonly("nbytes", [](const Sequence& s) { return s.bytes(); })
      .def_property_readonly("least_crop", &Sequence::least_crop)
      .def(
          "crop",
          [](Sequence& s, std::int64_t length) {
            const auto held = s.lock();
            s.crop(current_table(), length);
          },
          "length"_a)
      .def(
          "skip",
          [](Sequence& s, std::int64_t count) {
            const auto held = s.lock();
            s.skip(count);
          },
          "count"_a)
      .def("copy", [](const Sequence& s) { return std::make_unique<Sequence>(s); })
      .def("held_pages", &held_pages, "for each part: numbers of pages, first, begin, bytes of a page")
      .def("read_pages", &read_pages, "out"_a, "an address for each part")
      .def("restore", &restore, py::kw_only(), "length"_a, "pages"_a, "data"_a);
}

}  // namespace

void bind_decoder(py::module_& m) {
  m.def("attend", &attend, py::kw_only(), "q"_a, "k"_a, "v"_a, "count"_a, "length"_a, "heads"_a, "kv_heads"_a,
        "head_dim"_a, "bits"_a, "by_column"_a, "sinks"_a, "recent"_a, "window"_a, "softcap"_a, "out"_a);
  bind_matrix(m);
  bind_spec(m);
  bind_sequence(m);
  py::class_<Decoder>(m, "Decoder", "Steps of a whole model; see cpp/engine/decoder.h.")
      .def(py::init<DecoderSpec>(), "spec"_a)
      .def("new_sequence", &new_sequence, py::kw_only(), "layers"_a, "near_bits"_a, "by_column"_a, "rotate"_a,
           "sinks"_a, "recent"_a, "layers: bits of keys and of values, one pair a layer; 32 and 16 are floats")
      .def(
          "forward",
          [](const Decoder& d, Address ids, std::vector<std::int64_t> counts, std::vector<Sequence*> sequences,
             int output, bool float_activations, Address out) {
            const Step step{.ids = at<const std::int64_t>(ids),
                            .counts = std::move(counts),
                            .sequences = std::move(sequences),
                            .output = static_cast<Output>(output),
                            .float_activations = float_activations,
                            .out = at<float>(out)};
            const py::gil_scoped_release unlocked;
            d.forward(current_table(), step);
          },
          py::kw_only(), "ids"_a, "counts"_a, "sequences"_a, "output"_a, "float_activations"_a, "out"_a,
          "output: 0 logits of the last token of each sequence, 1 of all tokens, 2 final states of all tokens")
      .def(
          "logits",
          [](const Decoder& d, Address states, std::int64_t rows, bool float_activations, Address out) {
            const py::gil_scoped_release unlocked;
            d.logits(current_table(), at<const float>(states), rows, float_activations, at<float>(out));
          },
          py::kw_only(), "states"_a, "rows"_a, "float_activations"_a, "out"_a);
}

}  // namespace llmq
