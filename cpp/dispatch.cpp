#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>

#include "isa_rows.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace llmq {
namespace {

// A feature needs its bit and the register state that the operating system must save for it.
struct Feature {
  const char* name;
  std::uint64_t CpuWords::* word;
  int bit;
  std::uint64_t state;
};

constexpr std::uint64_t kYmm = 0x06;  // xmm and ymm
constexpr std::uint64_t kZmm = 0xe6;  // and the opmask, zmm0-15 upper halves, zmm16-31
constexpr int kOsxsave = 27;          // leaf 1 ecx: XGETBV may be asked

constexpr Feature kFeatures[] = {
    {"fma", &CpuWords::leaf1_ecx, 12, kYmm},      {"f16c", &CpuWords::leaf1_ecx, 29, kYmm},
    {"avx2", &CpuWords::leaf7_ebx, 5, kYmm},      {"avx512f", &CpuWords::leaf7_ebx, 16, kZmm},
    {"avx512dq", &CpuWords::leaf7_ebx, 17, kZmm}, {"avx512bw", &CpuWords::leaf7_ebx, 30, kZmm},
    {"avx512vl", &CpuWords::leaf7_ebx, 31, kZmm}, {"avx512vnni", &CpuWords::leaf7_ecx, 11, kZmm},
    {"avxvnni", &CpuWords::leaf7_1_eax, 4, kYmm}, {"asimddp", &CpuWords::hwcap, 20, 0},
    {"i8mm", &CpuWords::hwcap2, 13, 0},
};

bool known(const std::string& name) {
  return std::any_of(std::begin(kFeatures), std::end(kFeatures), [&](const Feature& f) { return name == f.name; });
}

bool runs_here(const KernelTable& table, const std::vector<std::string>& features) {
  std::istringstream needed(table.features);
  for (std::string name; needed >> name;) {
    if (!known(name))
      throw std::logic_error("CPU feature '" + name + "' of isa " + table.isa + " has no test in dispatch.cpp");
    if (std::find(features.begin(), features.end(), name) == features.end()) return false;
  }
  return true;
}

std::atomic<const KernelTable*>& selected() {
  static std::atomic<const KernelTable*> table{available_tables().front()};
  return table;
}

}  // namespace

CpuWords read_cpu_words() {
  CpuWords words{};
#if defined(__x86_64__)
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(1, 0, &a, &b, &c, &d)) words.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words.leaf7_ebx = b;
    words.leaf7_ecx = c;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) words.leaf7_1_eax = a;
  }
  if (words.leaf1_ecx >> kOsxsave & 1) {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    words.xcr0 = static_cast<std::uint64_t>(high) << 32 | low;
  }
#elif defined(__aarch64__) && defined(__linux__)
  words.hwcap = getauxval(AT_HWCAP);
  words.hwcap2 = getauxval(AT_HWCAP2);
#endif
  return words;
}

std::vector<std::string> features_of(const CpuWords& words) {
  std::vector<std::string> names;
  for (const Feature& f : kFeatures) {
    if ((words.*f.word >> f.bit & 1) && (words.xcr0 & f.state) == f.state) names.emplace_back(f.name);
  }
  return names;
}

const std::vector<const KernelTable*>& available_tables() {
  static const std::vector<const KernelTable*> tables = [] {
    const std::vector<std::string> features = features_of(read_cpu_words());
    std::vector<const KernelTable*> found;
    for (const KernelTable* table : kIsaRows) {
      if (runs_here(*table, features)) found.push_back(table);
    }
    return found;
  }();
  return tables;
}

const KernelTable& current_table() { return *selected().load(std::memory_order_relaxed); }

void use_table(const std::string& isa) {
  std::string names;
  for (const KernelTable* table : available_tables()) {
    if (isa == table->isa) {
      selected().store(table, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("isa '" + isa + "' is not available on this machine; available: " + names);
}

}  // namespace llmq
