// What the hint kernels are given.
#pragma once
#include "rows.h"

namespace fd {

enum class Distance : int { mse = 0, l1 = 1, smooth_l1 = 2, cosine = 3 };
enum class FeatureNorm : int { none = 0, layer_norm = 1, l2 = 2 };

struct HintArgs {
  const void* student;  // or its projection; rows are dense, `student_step` elements apart
  Type student_type;
  int64_t student_step;
  const void* teacher;
  Type teacher_type;
  int64_t teacher_step;
  int64_t rows, cols;
  const float* bias;       // [cols], added to the student, or null
  const float* row_scale;  // [rows]: the factor of a row in the gradient; 0 drops it
  Distance distance;
  FeatureNorm student_norm, teacher_norm;
  void* grad;  // [rows, cols] contiguous, or null; it may not lie over an input
  Type grad_type;
  float* loss;  // [rows] out: the distance of each row, no factor in it
};

}  // namespace fd

extern "C" int fd_hint_rows(const fd::HintArgs* args, void* stream);  // a cudaError_t
