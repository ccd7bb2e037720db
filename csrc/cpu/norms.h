// What the kernels of per-sample gradients of LayerNorm's and GroupNorm's parameters are given.
#pragma once
#include "rows.h"

namespace fd {

// Of each sample: weight = sum (x - mean) rstd g, bias = sum g; over the rows of [rows, cols] with
// a mean for each row (LayerNorm: both are [cols]), or over the columns with a mean for each of
// `groups` equal blocks of rows (GroupNorm: both are [rows]).
struct NormSums {
  bool in_double;           // else float: all of them
  const void *x, *g;        // [samples, rows, cols]
  const void *mean, *rstd;  // [samples, rows] or [samples, groups]
  int64_t samples, rows, cols;
  int64_t groups;  // 0: LayerNorm
  void *weight, *bias;
};

struct NormKernels {  // one per instruction set
  void (*sums)(const NormSums&, int64_t begin, int64_t end);
};

// The samples over the threads.
void norm_sums(const NormKernels& kernels, const NormSums& call, int threads);

}  // namespace fd
