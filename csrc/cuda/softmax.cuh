// The kernels of the temperature softmaxes: a warp or a block for each row.
//
// Forward: pass 1 finds the maximum and the sum of the exponentials, online; pass 2 writes.
// Backward: pass 1 sums g p (g for the logarithm), pass 2 writes and sums what the gradient of T is
// made of. Each pass reads the row anew, from the caches where the rows in flight fit.
#pragma once
#include "chunk.cuh"
#include "group.cuh"
#include "softmax.h"

namespace fd {

constexpr float kSoftmaxLog2e = 1.44269504088896340736f;

template <class Group>
constexpr int kThreadsOf = kMaxThreads;
template <>
constexpr int kThreadsOf<Warp> = 128;

struct SoftmaxParams {  // SoftmaxGradArgs as the kernels want it
  const void *x, *grad;
  void* out;                                       // y, or the gradient of x
  int64_t x_outer, x_step, grad_outer, grad_step;  // in elements
  int64_t rows, inner;
  int cols;
  const float* temperature;  // or null
  float inverse;             // 1 / T where it is null
  float* stats;
  float* grad_temperature;  // or null
};

// Of some logits: their maximum, and the sum of exp((x - max) / T).
struct Exponentials {
  float max, sum;
};

struct Sum {
  float value;
};

struct Moment {
  float value;
};

__device__ __forceinline__ Exponentials merge(const Exponentials& a, const Exponentials& b,
                                              float exponent) {
  const bool above = b.max > a.max;  // commutes to the bit: the lower one is scaled
  const float max = above ? b.max : a.max, low = above ? a.max : b.max;
  return {max, fmaf(above ? a.sum : b.sum, exp2f((low - max) * exponent), above ? b.sum : a.sum)};
}

// Chunk j of a row is its elements [8 j - shift, 8 j - shift + 8), on 16-byte boundaries of the
// output; the first and the last may reach over the row's ends.
template <class E>
struct SoftmaxRow {
  const E* x;
  const E* grad;
  E* out;
  int cols, shift, chunks;
  bool x_aligned, grad_aligned;

  __device__ __forceinline__ SoftmaxRow(const SoftmaxParams& a, int64_t r) {
    const int64_t outer = r / a.inner, step = r % a.inner;
    x = static_cast<const E*>(a.x) + outer * a.x_outer + step * a.x_step;
    grad = static_cast<const E*>(a.grad) + outer * a.grad_outer + step * a.grad_step;
    out = static_cast<E*>(a.out) + r * a.cols;
    cols = a.cols;
    shift = shift_of(out);
    chunks = (shift + cols + kChunk - 1) / kChunk;
    x_aligned = aligned(x, shift);
    grad_aligned = aligned(grad, shift);
  }

  __device__ __forceinline__ int first(int chunk) const { return chunk * kChunk - shift; }

  __device__ __forceinline__ void load_x(int j, float (&v)[kChunk]) const {
    Chunk<E>::load(x, first(j), cols, x_aligned).unpack(v);
  }

  // 0 outside the row, not -inf: with a probability of 0 it stays out of the sums.
  __device__ __forceinline__ void load_grad(int j, float (&v)[kChunk]) const {
    Chunk<E>::load(grad, first(j), cols, grad_aligned).unpack(v);
    if (first(j) < 0 || first(j) + kChunk > cols) {
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        if (first(j) + i < 0 || first(j) + i >= cols) v[i] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void store(int j, const float (&v)[kChunk]) const {
    Chunk<E>::rounded(v).store(out, first(j), cols);
  }
};

__device__ __forceinline__ float inverse_of(const SoftmaxParams& a, int64_t r) {
  return a.temperature == nullptr ? a.inverse : 1.f / a.temperature[r];
}

template <class E, class Group, bool LOG>
__global__ void __launch_bounds__(kThreadsOf<Group>) softmax_forward(const SoftmaxParams a) {
  const int64_t r = Group::index();
  if (r >= a.rows) return;
  const SoftmaxRow<E> row(a, r);
  const float inverse = inverse_of(a, r), exponent = inverse * kSoftmaxLog2e;
  Exponentials found{-3.402823466e38f, 0.f};  // the lowest: -inf would make inf - inf
  for (int j = Group::rank(); j < row.chunks; j += Group::size()) {
    float x[kChunk];
    row.load_x(j, x);
    Exponentials here{found.max, 0.f};
#pragma unroll
    for (int i = 0; i < kChunk; i++) here.max = fmaxf(here.max, x[i]);
#pragma unroll
    for (int i = 0; i < kChunk; i++) here.sum += exp2f((x[i] - here.max) * exponent);
    found.sum = fmaf(found.sum, exp2f((found.max - here.max) * exponent), here.sum);
    found.max = here.max;
  }
  found = Group::reduce(found, [&](const Exponentials& p, const Exponentials& q) -> Exponentials {
    return merge(p, q, exponent);
  });
  if (found.sum == 0.f) found.sum = NAN;  // nothing but -inf
  if (Group::rank() == 0) {
    a.stats[r] = found.max;
    a.stats[a.rows + r] = found.sum;
  }
  const float scale = 1.f / found.sum, log_sum = logf(found.sum);
  for (int j = Group::rank(); j < row.chunks; j += Group::size()) {
    float x[kChunk];
    row.load_x(j, x);
    float y[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      const float d = x[i] - found.max;
      y[i] = LOG ? d * inverse - log_sum : exp2f(d * exponent) * scale;
    }
    row.store(j, y);
  }
}

template <class E, class Group, bool LOG>
__global__ void __launch_bounds__(kThreadsOf<Group>) softmax_backward(const SoftmaxParams a) {
  const int64_t r = Group::index();
  if (r >= a.rows) return;
  const SoftmaxRow<E> row(a, r);
  const float inverse = inverse_of(a, r), exponent = inverse * kSoftmaxLog2e;
  const float max = a.stats[r], scale = 1.f / a.stats[a.rows + r];
  Sum total{0.f};
  for (int j = Group::rank(); j < row.chunks; j += Group::size()) {
    float g[kChunk];
    row.load_grad(j, g);
    if (LOG) {
#pragma unroll
      for (const float v : g) total.value += v;
    } else {
      float x[kChunk];
      row.load_x(j, x);
#pragma unroll
      for (int i = 0; i < kChunk; i++)
        total.value += g[i] * (exp2f((x[i] - max) * exponent) * scale);
    }
  }
  total =
      Group::reduce(total, [](const Sum& p, const Sum& q) -> Sum { return {p.value + q.value}; });
  Moment moment{0.f};  // of which the gradient of T is made; a masked class has no part in it
  for (int j = Group::rank(); j < row.chunks; j += Group::size()) {
    float x[kChunk], g[kChunk];
    row.load_x(j, x);
    row.load_grad(j, g);
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      const float p = exp2f((x[i] - max) * exponent) * scale;
      const float slope = LOG ? g[i] - p * total.value : p * (g[i] - total.value);
      if (a.grad_temperature != nullptr) {
        moment.value += x[i] == -INFINITY ? 0.f * scale : slope * (x[i] - max);
      }
      g[i] = slope * inverse;
    }
    row.store(j, g);
  }
  if (a.grad_temperature != nullptr) {
    moment = Group::reduce(
        moment, [](const Moment& p, const Moment& q) -> Moment { return {p.value + q.value}; });
    if (Group::rank() == 0) a.grad_temperature[r] = -moment.value * inverse * inverse;
  }
}

}  // namespace fd
