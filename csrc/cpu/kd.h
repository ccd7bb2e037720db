// What the kd kernels are given.
#pragma once
#include "rows.h"

namespace fd {

enum class Divergence : int { none = 0, forward_kl = 1, reverse_kl = 2, cross_entropy = 3 };

struct KdArgs {
  Rows student, teacher;
  int64_t rows, cols, inner;
  const int64_t* labels;    // [rows], or null without a hard term
  const double* row_scale;  // [rows]: weight over divisor; 0 drops the row
  double temperature, hard_weight, soft_weight, label_smoothing;
  Divergence divergence;  // none where soft_weight is 0
  bool scale_t2;
  void* grad;         // [rows, cols] contiguous in the student's type, or null
  float* grad_scale;  // [rows] for f16: what `grad` still has to be multiplied by; else null
  double* hard;       // [rows] out: the parts of each row, T^2 included, no weight
  double* soft;
};

struct ScaleArgs {  // out = in * factor of the row, for the backward pass
  const void* in;
  void* out;  // == in for the in-place form
  Type type;
  int64_t rows, cols;
  const double* factor;  // [rows], or [1] where `uniform`
  bool uniform;
};

// One per instruction set; `scratch` belongs to one thread and is 64-byte aligned.
struct KdKernels {
  size_t (*scratch_bytes)(const KdArgs&);
  int64_t (*group_rows)(const KdArgs&);
  void (*forward)(const KdArgs&, int64_t begin, int64_t end, void* scratch);
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
};

}  // namespace fd
