// What the softmax kernels are given.
#pragma once
#include "rows.h"

namespace fd {

constexpr int64_t kSoftmaxFew = 192;  // classes up to which 16 rows at once are faster

// What forward and backward share: y = softmax(x / T), or its logarithm, row by row.
struct SoftmaxRows {
  Rows x;
  int64_t rows, cols, inner;
  const double* temperature;  // [rows], or [1] where `uniform`
  bool uniform;
  bool log;
  bool wide;  // float64 arithmetic; the driver decides
};

struct SoftmaxArgs {
  SoftmaxRows of;
  void* y;            // [rows, cols] contiguous in x's type
  void* stats;        // [2, rows]: the maximum m of x, and the sum of exp((x - m) / T)
  bool stats_double;  // they are float64, else float32
};

struct SoftmaxGradArgs {
  SoftmaxRows of;
  Rows grad;  // of y, in x's type
  const void* stats;
  bool stats_double;
  void* grad_x;            // [rows, cols] contiguous in x's type
  void* grad_temperature;  // [rows] in the type of `stats`, or null
};

// One per instruction set; `scratch` belongs to one thread and is 64-byte aligned.
struct SoftmaxKernels {
  size_t (*scratch_bytes)(const SoftmaxRows&);
  void (*forward)(const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const SoftmaxGradArgs&, int64_t begin, int64_t end, void* scratch);
};

void softmax_forward(const SoftmaxKernels& kernels, SoftmaxArgs args, int threads);
void softmax_backward(const SoftmaxKernels& kernels, SoftmaxGradArgs args, int threads);

}  // namespace fd
