// What the softmax kernels are given.
#pragma once
#include "rows.h"

namespace fd {

// y = softmax(x / T), or its logarithm, row by row.
struct SoftmaxArgs {
  Rows x;
  int64_t rows, cols, inner;
  const float* temperature;  // [rows], NaN spoils the row; or null
  double scalar;             // T where `temperature` is null
  bool log;
  void* y;       // [rows, cols] contiguous in x's type
  float* stats;  // [2, rows]: the maximum m of x, and the sum of exp((x - m) / T)
};

struct SoftmaxGradArgs {
  SoftmaxArgs of;           // `y` is not used, `stats` is read
  Rows grad;                // of y, in x's type
  void* grad_x;             // [rows, cols] contiguous in x's type
  float* grad_temperature;  // [rows], or null
};

}  // namespace fd

// Both return a cudaError_t: 0 for success. `stream` is a cudaStream_t.
extern "C" {
int fd_softmax_forward(const fd::SoftmaxArgs* args, void* stream);
int fd_softmax_backward(const fd::SoftmaxGradArgs* args, void* stream);
}
