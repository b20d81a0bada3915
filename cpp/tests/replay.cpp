// Replays cases that the Python reference wrote, on every kernel set this CPU can run, and compares bits. Needs neither
// Python nor torch, so it also runs on an emulated CPU.
//
//   replay            prints the kernel sets, best first
//   replay FILE ...   exit code 0: every case gives the expected bits; 1: one does not; 2: a file cannot be read
//
// A file is a sequence of cases. A case is a line of text, `kind name=value ...` (values are whole numbers), then the
// arrays of its kind one after the other, little-endian, without padding:
//   qgemm n= k= group= bits= zeros= mid= m= bias=
//         q u8[n, k], scale f16[n, G], zero u8[n, G] if zeros, x f32[m, k], bias f32[n] if bias, expected f32[m, n]
//   take_rows n= k= group= bits= zeros= mid= count=
//         q, scale, zero as above, ids i64[count], expected f32[count, k]
//   model ...: see replay_model.cpp; the logits may differ by the tolerance that the case states
//   attend ...: see replay_attend.cpp; the same
// with G = ceil(k / group). A new kind is a function and a row of kKinds.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "engine/linear.h"
#include "engine/thread_pool.h"
#include "layout.h"
#include "tests/replay.h"

namespace {

using namespace llmq;
using namespace llmq::replay;

// Equal bits; any NaN is as good as another.
void compare(const Case& c, const std::string& what, const std::vector<float>& actual,
             const std::vector<float>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(float)) == 0) continue;
    if (actual[i] != actual[i] && expected[i] != expected[i]) continue;
    std::ostringstream message;
    message << what << ", '" << c.line << "': value " << i << " is " << actual[i] << ", expected " << expected[i];
    throw std::range_error(message.str());
  }
}

void replay_qgemm(const Case& c) {
  const Weights w = read_weights(c);
  const std::int64_t m = c["m"], n = w.layout.n, k = w.layout.k;
  const auto x = c.read<float>(m * k), bias = c.read<float>(c["bias"] ? n : 0), expected = c.read<float>(m * n);
  for (const KernelTable* table : available_tables()) {
    for (const int threads : {1, 2}) {
      set_num_threads(threads);
      std::vector<float> out(expected.size(), -1.0f);
      qgemm(*table, w.layout, w.view, x.data(), m, bias.empty() ? nullptr : bias.data(), out.data());
      compare(c, table->isa, out, expected);
    }
  }
}

void replay_take_rows(const Case& c) {
  const Weights w = read_weights(c);
  const auto ids = c.read<std::int64_t>(c["count"]);
  const auto expected = c.read<float>(c["count"] * w.layout.k);
  for (const KernelTable* table : available_tables()) {
    std::vector<float> out(expected.size(), -1.0f);
    take_rows(*table, w.layout, w.view, ids.data(), c["count"], out.data());
    compare(c, table->isa, out, expected);
  }
}

struct Kind {
  const char* name;
  void (*replay)(const Case&);
};

constexpr Kind kKinds[] = {
    {"qgemm", replay_qgemm}, {"take_rows", replay_take_rows}, {"model", replay_model}, {"attend", replay_attend}};

void replay_case(const std::string& line, std::istream& file) {
  std::istringstream words(line);
  std::string kind;
  words >> kind;
  Values values;
  for (std::string word; words >> word;) {
    const auto equals = word.find('=');
    if (equals == std::string::npos) throw std::runtime_error("'" + line + "': '" + word + "' is not name=value");
    values[word.substr(0, equals)] = std::stoll(word.substr(equals + 1));
  }
  for (const Kind& known : kKinds) {
    if (kind == known.name) return known.replay({line, values, file});
  }
  throw std::runtime_error("'" + line + "': the kind is unknown");
}

int replay_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("it cannot be opened");
  int cases = 0;
  for (std::string line; std::getline(file, line); ++cases) replay_case(line, file);
  if (cases == 0) throw std::runtime_error("it holds no case");
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  for (const KernelTable* table : available_tables()) std::cout << table->isa << '\n';
  for (int i = 1; i < argc; ++i) {
    try {
      std::cout << replay_file(argv[i]) << " cases of " << argv[i] << " give the expected bits\n";
    } catch (const std::range_error& difference) {
      std::cerr << difference.what() << '\n';
      return 1;
    } catch (const std::exception& error) {
      std::cerr << argv[i] << ": " << error.what() << '\n';
      return 2;
    }
  }
}
