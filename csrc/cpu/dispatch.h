// Chooses the instruction set once, by cpuid, from one ordered list.
#pragma once
#include "kernels.h"

namespace fd {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// The first supported one, or the one that FASTDISTILL_CPU_ISA names. A name that is unknown, or
// not supported by this processor, is an error: `problem` then says so, and the result is null.
const Isa* active_isa(const char** problem);

int isa_count();
const Isa& isa_at(int i);

}  // namespace fd
