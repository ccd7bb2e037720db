// Per-sample gradients of LayerNorm's and GroupNorm's parameters: one read of input and gradient.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "math.inl"

template <class R>
static void layer_norm_sample(const R* x, const R* g, const R* mean, const R* rstd, int64_t rows,
                              int64_t cols, R* __restrict weight, R* __restrict bias) {
  for (int64_t j = 0; j < cols; j++) weight[j] = bias[j] = R(0);
  for (int64_t t = 0; t < rows; t++, x += cols, g += cols) {
    const R m = mean[t], r = rstd[t];
#pragma omp simd
    for (int64_t j = 0; j < cols; j++) {
      weight[j] += (x[j] - m) * r * g[j];
      bias[j] += g[j];
    }
  }
}

template <class R>
static void group_norm_sample(const R* x, const R* g, const R* mean, const R* rstd, int64_t rows,
                              int64_t cols, int64_t groups, R* weight, R* bias) {
  const int64_t each = rows / groups;
  for (int64_t c = 0; c < rows; c++, x += cols, g += cols) {
    const R m = mean[c / each];
    R along = R(0), sum = R(0);
#pragma omp simd reduction(+ : along, sum)
    for (int64_t j = 0; j < cols; j++) {
      along += (x[j] - m) * g[j];
      sum += g[j];
    }
    weight[c] = along * rstd[c / each];
    bias[c] = sum;
  }
}

template <class R>
static void norm_range(const NormSums& c, int64_t begin, int64_t end) {
  const int64_t means = c.groups ? c.groups : c.rows, out = c.groups ? c.rows : c.cols;
  for (int64_t i = begin; i < end; i++) {
    const R* x = static_cast<const R*>(c.x) + i * c.rows * c.cols;
    const R* g = static_cast<const R*>(c.g) + i * c.rows * c.cols;
    const R* mean = static_cast<const R*>(c.mean) + i * means;
    const R* rstd = static_cast<const R*>(c.rstd) + i * means;
    R* weight = static_cast<R*>(c.weight) + i * out;
    R* bias = static_cast<R*>(c.bias) + i * out;
    if (c.groups) {
      group_norm_sample(x, g, mean, rstd, c.rows, c.cols, c.groups, weight, bias);
    } else {
      layer_norm_sample(x, g, mean, rstd, c.rows, c.cols, weight, bias);
    }
  }
}

static void norm_sums(const NormSums& c, int64_t begin, int64_t end) {
  if (c.in_double) {
    norm_range<double>(c, begin, end);
  } else {
    norm_range<float>(c, begin, end);
  }
}
