// The driver of the kd kernels: which rows count, threads, the reduction over rows.
#include <cmath>
#include <cstring>
#include <vector>

#include "kd_call.h"
#include "parallel.h"

namespace fd {
namespace {

// The factor of each row in the loss, and the checks of the values that decide it.
KdStatus row_scales(const KdCall& c, std::vector<double>& scale) {
  const int64_t rows = c.args.rows;
  double total = 0;
  for (int64_t r = 0; r < rows; r++) {
    double w = 1.0;
    if (c.row_weight) {
      w = c.row_weight[r];
      if (!(w >= 0 && w < INFINITY)) return {KdError::weight, w};
    }
    if (c.mask && !c.mask[r]) w = 0;
    if (c.args.labels && w != 0) {
      const int64_t y = c.args.labels[r];
      if (y == c.ignore_index) {
        w = 0;
      } else if (y < 0 || y >= c.args.cols) {
        return {KdError::label, static_cast<double>(y)};
      }
    }
    scale[r] = w;
    total += w;
  }
  double divisor = 1.0;
  if (c.reduction == Reduction::mean) divisor = total == 0 ? 1.0 : total;
  if (c.reduction == Reduction::sum) divisor = c.divisor;
  if (divisor != 1.0)
    for (double& w : scale) w /= divisor;
  return {KdError::none, 0};
}

void put(void* out, bool is_double, int64_t i, double value) {
  if (is_double) {
    static_cast<double*>(out)[i] = value;
  } else {
    static_cast<float*>(out)[i] = static_cast<float>(value);
  }
}

// One order of summation, whatever the number of threads.
void reduce(const KdCall& c, const std::vector<double>& scale, const double* hard,
            const double* soft) {
  const KdArgs& a = c.args;
  double sums[2] = {0, 0};
  const double weights[2] = {a.hard_weight, a.soft_weight};
  for (int64_t r = 0; r < a.rows; r++) {
    const double h = scale[r] == 0 ? 0 : hard[r] * scale[r];
    const double s = scale[r] == 0 ? 0 : soft[r] * scale[r];
    if (c.reduction == Reduction::none) {
      put(c.hard, c.out_double, r, h);
      put(c.soft, c.out_double, r, s);
      put(c.loss, c.out_double, r,
          (weights[0] == 0 ? 0 : weights[0] * h) + (weights[1] == 0 ? 0 : weights[1] * s));
    }
    sums[0] += h;
    sums[1] += s;
  }
  if (c.reduction == Reduction::none) return;
  put(c.hard, c.out_double, 0, sums[0]);
  put(c.soft, c.out_double, 0, sums[1]);
  put(c.loss, c.out_double, 0,
      (weights[0] == 0 ? 0 : weights[0] * sums[0]) + (weights[1] == 0 ? 0 : weights[1] * sums[1]));
}

}  // namespace

KdStatus kd_forward(const KdKernels& kernels, const KdCall& call) {
  KdArgs a = call.args;
  std::vector<double> scale(a.rows), hard(a.rows), soft(a.rows);
  const KdStatus status = row_scales(call, scale);
  if (status.error != KdError::none) return status;

  const int64_t bytes = a.rows * a.cols * call.grad_item_bytes;
  if (a.grad && bytes >= kHugePageBytes) advise_huge_pages(a.grad, bytes);
  a.row_scale = scale.data();
  a.hard = hard.data();
  a.soft = soft.data();
  if (a.hard_weight == 0 && a.soft_weight == 0) {  // neither term is computed
    if (a.grad) std::memset(a.grad, 0, static_cast<size_t>(bytes));
    if (a.grad_scale) std::memset(a.grad_scale, 0, static_cast<size_t>(a.rows) * sizeof(float));
  } else if (a.rows > 0) {
    const int threads = a.rows * a.cols < kSerialElements ? 1 : call.threads;
    parallel_chunks_with_scratch(a.rows, kernels.group_rows(a), threads, kernels.scratch_bytes(a),
                                 [&](char* scratch, int64_t begin, int64_t end) {
                                   kernels.forward(a, begin, end, scratch);
                                 });
  }
  reduce(call, scale, hard.data(), soft.data());
  return status;
}

void kd_scale(const KdKernels& kernels, const KdScaleCall& call) {
  ScaleArgs a = call.args;
  const bool per_row = call.grad_output_stride != 0 || call.grad_scale != nullptr;
  std::vector<double> factor(per_row ? a.rows : 1);
  for (size_t r = 0; r < factor.size(); r++) {
    const int64_t at = static_cast<int64_t>(r) * call.grad_output_stride;
    factor[r] = call.grad_output_double ? static_cast<const double*>(call.grad_output)[at]
                                        : static_cast<const float*>(call.grad_output)[at];
    if (call.grad_scale) factor[r] *= call.grad_scale[r];
  }
  if (a.in == a.out && !per_row && factor[0] == 1.0) return;
  a.factor = factor.data();
  a.uniform = !per_row;
  const int64_t bytes = a.rows * a.cols * call.item_bytes;
  if (a.in != a.out && bytes >= kHugePageBytes) advise_huge_pages(a.out, bytes);
  const int threads = a.rows * a.cols < kSerialElements ? 1 : call.threads;
  parallel_chunks(a.rows, 1, threads,
                  [&](int, int64_t begin, int64_t end) { kernels.scale(a, begin, end); });
}

}  // namespace fd
