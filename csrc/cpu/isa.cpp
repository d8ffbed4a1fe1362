// Chooses the table of kernels of this process.

#include "isa.h"

#include <cstdlib>
#include <string>

#include "../cuda/checks.h"

namespace t2t {
namespace {

// The tables that this CPU supports, the widest first.
const Kernels* const* runnable(int& count) {
  static const Kernels* tables[4];
  static const int found = [] {
    int n = 0;
#ifdef T2T_X86_KERNELS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && __builtin_cpu_supports("avx512bf16")) tables[n++] = &kAvx512Bf16;
    if (v4) tables[n++] = &kAvx512;
    if (v3) tables[n++] = &kAvx2;
#endif
    tables[n++] = &kPortable;
    return n;
  }();
  count = found;
  return tables;
}

const Kernels& choose() {
  int count = 0;
  const Kernels* const* tables = runnable(count);
  const char* name = std::getenv("T2T_CPU_ISA");
  if (name == nullptr || *name == '\0') return *tables[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(tables[i]->name) == name) return *tables[i];
    names += (i ? ", " : "") + std::string(tables[i]->name);
  }
  T2T_CHECK(false, "T2T_CPU_ISA: got '", name, "', expected one that this CPU runs: ", names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace t2t
