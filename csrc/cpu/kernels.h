// What an instruction set has to offer: one table of functions for each room.
#pragma once
#include "hint.h"
#include "kd.h"
#include "norms.h"
#include "privacy.h"
#include "products.h"
#include "softmax.h"

namespace fd {

struct BenchKernels {  // bench.inl
  float (*exp_loop)(const float* x, float* e, int64_t n, int64_t repeats);
  void (*read_read_write)(const char* a, const char* b, char* out, int64_t bytes, bool stream);
  uint32_t (*read_only)(const char* a, int64_t bytes);
};

struct Kernels {
  KdKernels kd;
  SoftmaxKernels softmax;
  HintKernels hint;
  const PrivacyKernels* privacy;  // compiled by itself: exact.inl
  ProductKernels products;
  NormKernels norms;
  BenchKernels bench;
};

}  // namespace fd
