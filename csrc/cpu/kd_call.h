// One call of the kd driver, as the bindings fill it in.
#pragma once
#include "kd.h"

namespace fd {

struct KdCall {
  KdArgs args;               // row_scale, hard and soft are filled in by the driver
  const bool* mask;          // [rows] or null; true keeps
  const double* row_weight;  // [rows] or null
  int64_t ignore_index;
  Reduction reduction;
  double divisor;            // of Reduction::sum
  void *loss, *hard, *soft;  // [rows] with Reduction::none, else [1]
  bool out_double;           // they are float64, else float32
  int64_t grad_item_bytes;
  int threads;
};

enum class KdError : int { none = 0, label = 1, weight = 2 };

struct KdStatus {
  KdError error;
  double value;  // the one that was refused
};

struct KdScaleCall {
  ScaleArgs args;
  const float* grad_scale;  // [rows] or null
  const void* grad_output;
  bool grad_output_double;
  int64_t grad_output_stride;  // 0: one for all rows
  int64_t item_bytes;
  int threads;
};

KdStatus kd_forward(const KdKernels& kernels, const KdCall& call);
void kd_scale(const KdKernels& kernels, const KdScaleCall& call);

}  // namespace fd
