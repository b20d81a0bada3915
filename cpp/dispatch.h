// Which kernels this CPU can run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace llmq {

// The words that decide about vector instructions: of CPUID and XGETBV on x86, of the auxiliary vector on ARM.
struct CpuWords {
  std::uint64_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_1_eax;
  std::uint64_t xcr0;  // register state that the operating system saves; 0 when it does not say
  std::uint64_t hwcap, hwcap2;
};

CpuWords read_cpu_words();

// Names of the features that both the CPU has and the operating system supports.
std::vector<std::string> features_of(const CpuWords& words);

// Tables this CPU can run, best first; never empty, because "scalar" runs everywhere.
const std::vector<const KernelTable*>& available_tables();

// The table in use; the best one until use_table is called.
const KernelTable& current_table();

// Throws std::invalid_argument listing the available names.
void use_table(const std::string& isa);

}  // namespace llmq
