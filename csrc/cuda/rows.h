// What all kernels over rows are given: raw pointers, sizes and strides. No torch, no Python.
#pragma once
#include <cstdint>

namespace fd {

enum class Type : int { f32 = 0, bf16 = 2, f16 = 3 };

// Row r of a strided [..., V] tensor starts at (r / inner) * outer + (r % inner) * step.
struct Rows {
  const void* data;
  Type type;
  int64_t outer, step;  // in elements
};

}  // namespace fd

extern "C" const char* fd_error_text(int status);  // of a cudaError_t
