// The kernels of sums over teachers, row by row.
#pragma once
#include "privacy.cuh"

namespace fd {

constexpr int kRowThreads = 128;
constexpr int kNarrow = kWarp * kEach;  // the elements of a row that a warp can hold

struct RowParams {
  const uint64_t* table;
  double *sums, *highest, *factors;
  int64_t teachers, rows, cols, x_step;
  int64_t chunks;  // tiles of a row
  int lanes;       // threads of a narrow row: a power of two, at most a warp
  double inverse, exponentials, fine, clip, unit;
};

template <class E>
__device__ __forceinline__ const E* teacher_row(const RowParams& a, int64_t teacher, int64_t row) {
  return reinterpret_cast<const E*>(__ldg(a.table + teacher)) + row * a.x_step;
}

__device__ __forceinline__ double* sums_of(const RowParams& a, int64_t row) {
  return a.sums + row * a.cols;
}

// e^x for -708 <= x <= 0.
__device__ __forceinline__ Real exponential(Real x) {
  const Real round{0x1.8p52};
  const Real shifted = x * Real{1.4426950408889634} + round, k = shifted - round;
  const Real r = (x - k * Real{0.6931471805592082}) - k * Real{7.371002565167799e-13};
  const Real p =
      horner(r, 0.5000000000000001, 0.16666666666666669, 0.04166666666662413, 0.008333333333330062,
             0.0013888888917213717, 0.00019841269863053618, 2.4801521295954376e-05,
             2.7557268459997064e-06, 2.7620088445409746e-07, 2.510038549551032e-08);
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(shifted.v));
  const uint64_t power = (bits << 52) + 0x3ff0000000000000u;
  const Real scale{__longlong_as_double(static_cast<long long>(power))};
  return (((r * r) * p + r) + Real{1.0}) * scale;
}

// An exponential of a softmax, on its grid.
__device__ __forceinline__ Real weight(const RowParams& a, double x, double highest) {
  const double d = ((Real{x} - Real{highest}) * Real{a.inverse}).v;
  return on_grid(exponential({d > -708.0 ? d : -708.0}), a.exponentials);
}

// What threads find of a row of softmax: its highest value, and NaN where one is not finite.
struct Reach {
  double highest, finite;
};

struct Merge {
  __device__ __forceinline__ Reach operator()(const Reach& p, const Reach& q) const {
    return {p.highest > q.highest ? p.highest : q.highest, p.finite + q.finite};
  }
  __device__ __forceinline__ Square operator()(const Square& p, const Square& q) const {
    return {p.value + q.value};
  }
};

// Of eight elements, of which those from `size` on are beyond the row's end.
template <class E>
__device__ __forceinline__ void add_to(Reach& reach, const E (&x)[kEach], int64_t first,
                                       int64_t size) {
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const double v = to_double(x[i]);
    if (first + i < size) reach = Merge{}(reach, {v, v * 0.0});
  }
}

// The threads of a narrow row, `lanes` of a warp.
struct Lanes {
  int count;
  template <class V>
  __device__ __forceinline__ V reduce(V value) const {
    for (int bit = count / 2; bit > 0; bit /= 2) value = Merge{}(value, lane_across(value, bit));
    return value;
  }
};

// The factor of a row is 0 where it is not finite.
__device__ __forceinline__ double softmax_factor(const RowParams& a, double finite, double sum) {
  return finite == 0 ? (Real{a.clip} / Real{sum}).v : 0.0;
}

__device__ __forceinline__ double clip_factor(const RowParams& a, double square) {
  const Real norm = Real{__dsqrt_rn(square)} / Real{a.unit};
  const double factor = (Real{a.clip} / (norm + Real{1e-6})).v;
  return norm.v < INFINITY ? (factor < 1.0 ? factor : 1.0) : 0.0;
}

// A few whole rows of the sum: `lanes` threads have one, and read it of one teacher after the
// other.
template <class E, bool Softmax>
__global__ void __launch_bounds__(kRowThreads) privacy_narrow_rows(const RowParams a) {
  const int64_t row =
      blockIdx.x * static_cast<int64_t>(blockDim.x / a.lanes) + threadIdx.x / a.lanes;
  const int64_t first = threadIdx.x % a.lanes * kEach;
  const bool there = row < a.rows;  // the others take part in their warp's shuffles
  const int64_t size = there ? a.cols : 0;
  const Lanes lanes{a.lanes};
  Real sum[kEach] = {};
  for (int64_t teacher = 0; teacher < a.teachers; teacher++) {
    E x[kEach];
    load(teacher_row<E>(a, teacher, there ? row : 0), first, size, x);
    Real y[kEach];
    double factor;
    if constexpr (Softmax) {
      Reach reach{-INFINITY, 0};
      add_to(reach, x, first, size);
      reach = lanes.reduce(reach);
      Square total{0};
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        y[i] = weight(a, to_double(x[i]), reach.highest);
        if (first + i < size) total.value += y[i].v;
      }
      factor = softmax_factor(a, reach.finite, lanes.reduce(total).value);
    } else {
      Square square{0};
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        y[i] = {to_double(x[i])};
        square.value += (y[i].v * a.unit) * (y[i].v * a.unit);
      }
      factor = clip_factor(a, lanes.reduce(square).value);
    }
    if (factor == 0) continue;  // a select, not a product: 0 times NaN is NaN
#pragma unroll
    for (int i = 0; i < kEach; i++) sum[i] = sum[i] + on_grid(y[i] * Real{factor}, a.fine);
  }
  double out[kEach];
  memcpy(out, sum, sizeof out);
  if (there) store(sums_of(a, row), first, size, out);
}

// What a row of one teacher is multiplied with: a block for each.
template <class E, bool Softmax>
__global__ void __launch_bounds__(kRowThreads) privacy_row_factor(const RowParams a) {
  const E* row = teacher_row<E>(a, blockIdx.x % a.teachers, blockIdx.x / a.teachers);
  const auto each = [&](auto part) {
    for (int64_t first = threadIdx.x * kEach; first < a.cols; first += blockDim.x * kEach) {
      E x[kEach];
      load(row, first, a.cols, x);
      part(x, first);
    }
  };
  Square total{0};
  Reach reach{-INFINITY, 0};
  if constexpr (Softmax) {
    each([&](const E(&x)[kEach], int64_t first) { add_to(reach, x, first, a.cols); });
    reach = Block::reduce(reach, Merge{});
    each([&](const E(&x)[kEach], int64_t first) {
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (first + i < a.cols) total.value += weight(a, to_double(x[i]), reach.highest).v;
      }
    });
  } else {
    each([&](const E(&x)[kEach], int64_t) {
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        const double v = to_double(x[i]) * a.unit;
        total.value += v * v;
      }
    });
  }
  total = Block::reduce(total, Merge{});
  if (threadIdx.x == 0) {
    if constexpr (Softmax) a.highest[blockIdx.x] = reach.highest;
    a.factors[blockIdx.x] =
        Softmax ? softmax_factor(a, reach.finite, total.value) : clip_factor(a, total.value);
  }
}

// A tile of one row of the sum.
template <class E, bool Softmax>
__global__ void __launch_bounds__(kRowThreads) privacy_row_sum(const RowParams a) {
  const int64_t row = blockIdx.x / a.chunks, tile = blockIdx.x % a.chunks;
  const int64_t first = (tile * blockDim.x + threadIdx.x) * kEach;
  Real sum[kEach] = {};
  for (int64_t at = 0; at < a.teachers; at += kUnroll) {
    E x[kUnroll][kEach];
    double factors[kUnroll], highest[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int64_t teacher = at + u;
      const bool there = teacher < a.teachers;
      const int64_t of_row = row * a.teachers + (there ? teacher : 0);
      factors[u] = there ? __ldg(a.factors + of_row) : 0.0;
      if constexpr (Softmax) highest[u] = __ldg(a.highest + of_row);
      load(teacher_row<E>(a, there ? teacher : 0, row), first, there ? a.cols : 0, x[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (factors[u] == 0) continue;  // a select, as above
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        Real y{to_double(x[u][i])};
        if constexpr (Softmax) y = weight(a, y.v, highest[u]);
        sum[i] = sum[i] + on_grid(y * Real{factors[u]}, a.fine);
      }
    }
  }
  double out[kEach];
  memcpy(out, sum, sizeof out);
  store(sums_of(a, row), first, a.cols, out);
}

}  // namespace fd
