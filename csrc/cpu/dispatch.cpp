#include "dispatch.h"

#if defined(FD_X86)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

namespace fd {

#if defined(FD_X86)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

#if defined(FD_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
#endif
bool always() { return true; }

const Isa kIsas[] = {
#if defined(FD_X86)
    {"avx512", has_avx512, &avx512::kernels},
    {"avx2", has_avx2, &avx2::kernels},
#endif
    {"baseline", always, &baseline::kernels},
};

struct Choice {
  const Isa* isa = nullptr;
  std::string problem;
};

Choice choose() {
  Choice choice;
  const char* forced = std::getenv("FASTDISTILL_CPU_ISA");
  const bool by_name = forced && *forced;
  std::string known;
  for (const Isa& isa : kIsas) {
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
    if (by_name && std::strcmp(forced, isa.name) != 0) continue;
    if (isa.supported()) {
      choice.isa = &isa;
      return choice;
    }
    if (by_name) {
      choice.problem =
          "FASTDISTILL_CPU_ISA: this processor does not support " + std::string(forced);
      return choice;
    }
  }
  choice.problem = "FASTDISTILL_CPU_ISA: expected one of " + known + "; got " + forced;
  return choice;
}

}  // namespace

const Isa* active_isa(const char** problem) {
  static const Choice choice = choose();
  if (problem) *problem = choice.problem.c_str();
  return choice.isa;
}

int isa_count() { return static_cast<int>(sizeof kIsas / sizeof *kIsas); }
const Isa& isa_at(int i) { return kIsas[i]; }

}  // namespace fd
