// What the hint kernels are given.
#pragma once
#include "rows.h"

namespace fd {

enum class Distance : int { mse = 0, l1 = 1, smooth_l1 = 2, cosine = 3 };
enum class FeatureNorm : int { none = 0, layer_norm = 1, l2 = 2 };

constexpr int64_t kBiasRows = 32;  // rows that share a partial sum of the bias's gradient

struct HintArgs {
  Rows student, teacher;
  int64_t rows, cols;
  int64_t student_inner, teacher_inner;
  // Row r of the student, or of its projected block, belongs to row at[r] of the teacher, of
  // `row_scale` and of `loss`; without `at` to row first + r.
  int64_t first;
  const int64_t* at;
  bool teacher_in_block;    // but the teacher's rows are a block's too: row r
  bool in_double;           // the type of the arithmetic, and of `bias` and `bias_grad`
  const void* bias;         // [cols], added to the student, or null
  const double* row_scale;  // the factor of a row in the gradient; 0 drops it; null: `uniform`
  double uniform;
  Distance distance;
  FeatureNorm student_norm, teacher_norm;
  void* grad;  // of the student (with its bias) in `grad_type`, `grad_step` elements from row to
  Type grad_type;     // row; null without need. It may lie over the student's own rows: each is
  int64_t grad_step;  // read before it is written.
  bool past_caches;   // it is better stored there: set by the driver
  void* bias_grad;    // [ceil(rows / kBiasRows), cols] out: sums of `grad`; or null
  double* loss;       // out: the distance of each row, no factor in it
};

// One per instruction set; `scratch` belongs to one thread and is 64-byte aligned.
struct HintKernels {
  size_t (*scratch_bytes)(const HintArgs&);
  void (*rows)(const HintArgs&, int64_t begin, int64_t end, void* scratch);
};

// The rows over the threads.
void hint_rows(const HintKernels& kernels, const HintArgs& args, int threads);

}  // namespace fd
