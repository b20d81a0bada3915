// A whole model as a case: a tiny decoder, some tokens, the logits of every one of them.
//
//   model hidden= heads= kv_heads= head_dim= layers= ropes= activation= max_positions= qk_norm= post_norms= count=
//   floats=
//         constants f32[7]: eps, attention_scale, embedding_scale, attention_softcap, final_softcap, tolerance, 0
//         inverse frequencies f32[ropes, head_dim / 2]
//         final norm f32[hidden]
//         embedding matrix, which is also the head
//         each layer: window and rope i64[2]; norms f32: attention, ffn, (post_norms: attention_post, ffn_post,)
//                     (qk_norm: q, k); matrices q k v o gate up down
//         ids i64[count], expected f32[count, vocabulary]
// A matrix is a line `matrix n= k= group= bits= zeros= mid=` and its q, scale, zero, as in a qgemm case. floats=1:
// float activations and cache.
#include <algorithm>
#include <cmath>
#include <deque>
#include <iostream>
#include <sstream>

#include "dispatch.h"
#include "engine/decoder.h"
#include "engine/thread_pool.h"
#include "tests/replay.h"

namespace llmq::replay {
namespace {

// Everything a spec points to; a deque never moves what it holds.
struct Model {
  DecoderSpec spec;
  std::deque<std::vector<float>> floats;
  std::deque<Weights> weights;

  const float* norm(const Case& c, std::int64_t n) { return floats.emplace_back(c.read<float>(n)).data(); }

  Matrix matrix(const Case& c) {
    std::string line, word;
    if (!std::getline(c.file, line)) throw std::runtime_error("the file ends within '" + c.line + "'");
    std::istringstream words(line);
    words >> word;
    Values values;
    while (words >> word) {
      const auto equals = word.find('=');
      values[word.substr(0, equals)] = std::stoll(word.substr(equals + 1));
    }
    const Weights& w = weights.emplace_back(read_weights(Case{line, values, c.file}));
    return Matrix::of_packed(w.layout, w.view, nullptr);
  }
};

void read_layer(const Case& c, Model& model) {
  DecoderLayer l;
  const auto kind = c.read<std::int64_t>(2);
  l.window = kind[0], l.rope = kind[1];
  const std::int64_t h = c["hidden"];
  l.attention_norm = model.norm(c, h);
  l.ffn_norm = model.norm(c, h);
  if (c["post_norms"]) l.attention_post_norm = model.norm(c, h), l.ffn_post_norm = model.norm(c, h);
  if (c["qk_norm"]) l.q_norm = model.norm(c, c["head_dim"]), l.k_norm = model.norm(c, c["head_dim"]);
  for (Matrix DecoderLayer::* field : {&DecoderLayer::q, &DecoderLayer::k, &DecoderLayer::v, &DecoderLayer::o,
                                       &DecoderLayer::gate, &DecoderLayer::up, &DecoderLayer::down}) {
    l.*field = model.matrix(c);
  }
  model.spec.layers.push_back(l);
}

float read_model(const Case& c, Model& model) {
  DecoderSpec& s = model.spec;
  s.hidden = c["hidden"], s.heads = c["heads"], s.kv_heads = c["kv_heads"], s.head_dim = c["head_dim"];
  s.max_positions = c["max_positions"];
  s.activation = static_cast<Activation>(c["activation"]);
  const auto constants = c.read<float>(7);
  s.eps = constants[0], s.attention_scale = constants[1], s.embedding_scale = constants[2];
  s.attention_softcap = constants[3], s.final_softcap = constants[4];
  for (std::int64_t i = 0; i < c["ropes"]; ++i) s.ropes.push_back({c.read<float>(s.head_dim / 2), 1.0f});
  s.final_norm = model.norm(c, s.hidden);
  s.embedding = s.head = model.matrix(c);
  for (std::int64_t i = 0; i < c["layers"]; ++i) read_layer(c, model);
  return constants[5];
}

}  // namespace

void replay_model(const Case& c) {
  Model model;
  const float tolerance = read_model(c, model);
  const std::int64_t count = c["count"], vocabulary = model.spec.head.n;
  const auto ids = c.read<std::int64_t>(count);
  const auto expected = c.read<float>(count * vocabulary);
  const Decoder decoder(model.spec);
  const bool floats = c["floats"] != 0;
  for (const KernelTable* table : available_tables()) {
    for (const int threads : {1, 2, 3}) {
      set_num_threads(threads);
      std::vector<float> out(expected.size());
      const KvType type = floats ? kKvFloat : kKvHalf;
      Sequence sequence(
          decoder.kv_shape(std::vector<KvLayerShape>(model.spec.layers.size(), {.keys = type, .values = type})));
      // A prompt, then one token at a time.
      for (std::int64_t at = 0, step = count / 2; at < count; at += step, step = 1) {
        decoder.forward(*table,
                        {ids.data() + at, {step}, {&sequence}, Output::kAll, floats, out.data() + at * vocabulary});
      }
      for (std::size_t i = 0; i < expected.size(); ++i) {
        if (std::fabs(out[i] - expected[i]) <= tolerance) continue;
        std::ostringstream message;
        message << table->isa << ", " << threads << " threads, '" << c.line << "': logit " << i << " is " << out[i]
                << ", expected " << expected[i] << " within " << tolerance;
        throw std::range_error(message.str());
      }
    }
  }
}

}  // namespace llmq::replay
