// Attention over cached keys and values as a case.
//
//   attend count= length= heads= kv_heads= head_dim= keys= values= near= sinks= recent= window=
//         q f32[count, heads, head_dim], k and v f32[length, kv_heads, head_dim], expected and tolerance as q
// keys, values and near (-1: none) are numbers of KvType. The results may differ by the tolerance.
#include <cmath>
#include <sstream>

#include "dispatch.h"
#include "engine/attention.h"
#include "engine/thread_pool.h"
#include "tests/replay.h"

namespace llmq::replay {

void replay_attend(const Case& c) {
  const std::int64_t count = c["count"], length = c["length"], heads = c["heads"], dim = c["head_dim"];
  const std::int64_t n = count * heads * dim, cached = length * c["kv_heads"] * dim;
  const auto q = c.read<float>(n), k = c.read<float>(cached), v = c.read<float>(cached);
  const auto expected = c.read<float>(n), tolerance = c.read<float>(n);
  KvLayerShape layer{.keys = static_cast<KvType>(c["keys"]), .values = static_cast<KvType>(c["values"])};
  if (c["near"] >= 0) layer.near = static_cast<KvType>(c["near"]);
  layer.sinks = c["sinks"], layer.recent = c["recent"], layer.window = c["window"];
  for (const KernelTable* table : available_tables()) {
    for (const int threads : {1, 2}) {
      set_num_threads(threads);
      std::vector<float> out(expected.size(), -1.0f);
      attend_last(*table, layer, k.data(), v.data(), length, count,
                  {.layer = 0,
                   .heads = heads,
                   .kv_heads = c["kv_heads"],
                   .head_dim = dim,
                   .window = layer.window,
                   .softcap = 0.0f,
                   .q = q.data(),
                   .q_stride = heads * dim,
                   .out = out.data()});
      for (std::size_t i = 0; i < expected.size(); ++i) {
        if (std::fabs(out[i] - expected[i]) <= tolerance[i]) continue;
        std::ostringstream message;
        message << table->isa << ", '" << c.line << "': value " << i << " is " << out[i] << ", expected " << expected[i]
                << " within " << tolerance[i];
        throw std::range_error(message.str());
      }
    }
  }
}

}  // namespace llmq::replay
