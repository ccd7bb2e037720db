// What an instruction set has to offer: one table of functions for each room.
#pragma once
#include "hint.h"
#include "kd.h"
#include "softmax.h"

namespace fd {

struct BenchKernels {  // bench.inl
  float (*exp_loop)(const float* x, float* e, int64_t n, int64_t repeats);
  void (*read_read_write)(const char* a, const char* b, char* out, int64_t bytes, bool stream);
};

struct Kernels {
  KdKernels kd;
  SoftmaxKernels softmax;
  HintKernels hint;
  BenchKernels bench;
};

}  // namespace fd
