// What the kd kernels are given.
#pragma once
#include "rows.h"

namespace fd {

enum class Divergence : int { none = 0, forward_kl = 1, reverse_kl = 2, cross_entropy = 3 };

struct KdArgs {
  Rows student, teacher;  // the teacher is not read where `divergence` is none
  int64_t rows, cols, inner;
  const int64_t* labels;   // [rows], or null without a hard term
  const float* row_scale;  // [rows]: weight over divisor; 0 drops the row, NaN spoils it
  double temperature, hard_weight, soft_weight, label_smoothing;
  Divergence divergence;  // none where soft_weight is 0
  bool scale_t2;
  void* grad;         // [rows, cols] contiguous in the student's type, or null
  float* grad_scale;  // [rows] for f16: what `grad` still has to be multiplied by; else null
  float* hard;        // [rows] out: the parts of each row, T^2 included, no weight
  float* soft;
};

struct ScaleArgs {  // out = in * grad_output * grad_scale, for the backward pass
  const void* in;   // [rows, cols] contiguous
  void* out;        // == in for the in-place form, which skips rows whose factor is exactly 1
  Type type;
  int64_t rows, cols;
  const float* grad_scale;   // [rows], or null
  const float* grad_output;  // [rows], or [1] where `uniform`
  bool uniform;
};

}  // namespace fd

// Both return a cudaError_t: 0 for success. `stream` is a cudaStream_t.
extern "C" {
int fd_kd_forward(const fd::KdArgs* args, void* stream);
int fd_kd_scale(const fd::ScaleArgs* args, void* stream);
}
