// The kernels of private releases, in doubles: a block for a piece of a tensor.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "group.cuh"
#include "noise.cuh"
#include "privacy.h"

namespace fd {

constexpr int kSquareThreads = 256;
constexpr int kReleaseThreads = 128;
constexpr int kEach = 8;                        // elements of a thread at once
constexpr int kTile = kReleaseThreads * kEach;  // of a block: whole groups of 128
constexpr int kUnroll = 4;                      // samples that are read at once

struct SquareParams {
  Tensors of;
  double unit;
  double* squares;
  int64_t square_step, first;
};

struct ReleaseParams {
  Tensors of;
  const double* factors;
  Draws draws;
  double fine, grid, scale, inverse;
};

__device__ __forceinline__ double to_double(double x) { return x; }
__device__ __forceinline__ double to_double(float x) { return x; }
__device__ __forceinline__ double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double to_double(__half x) { return __half2float(x); }

template <class E>
__device__ __forceinline__ const E* row_of(const Entry& p, int64_t sample) {
  return static_cast<const E*>(p.x) + sample * p.step;
}

__device__ __forceinline__ double* square_of(const SquareParams& a, int64_t sample) {
  return a.squares + sample * a.square_step + a.first;
}

__device__ __forceinline__ bool on_vector(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// 16-byte vectors of 8 elements.
template <class E>
constexpr int kVectors = kEach * static_cast<int>(sizeof(E)) / static_cast<int>(sizeof(uint4));

// Elements [first, first + 8) of a row of `size`: 0 beyond its end.
template <class E>
__device__ __forceinline__ void load(const E* row, int64_t first, int64_t size, E (&x)[kEach]) {
  if (first + kEach <= size && on_vector(row + first)) {
    uint4 vectors[kVectors<E>];
    const uint4* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
    for (int v = 0; v < kVectors<E>; v++) vectors[v] = __ldg(from + v);
    memcpy(x, vectors, sizeof x);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; i++) x[i] = first + i < size ? row[first + i] : E(0.f);
  }
}

template <class Out>
__device__ __forceinline__ void store(Out* out, int64_t first, int64_t size,
                                      const Out (&y)[kEach]) {
  if (first + kEach <= size && on_vector(out + first)) {
    uint4 vectors[kVectors<Out>];
    memcpy(vectors, y, sizeof y);
    uint4* to = reinterpret_cast<uint4*>(out + first);
#pragma unroll
    for (int v = 0; v < kVectors<Out>; v++) __stwb(to + v, vectors[v]);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (first + i < size) out[first + i] = y[i];
    }
  }
}

struct Square {
  double value;
};

// The sum of (x unit)^2 over one chunk of one sample.
template <class E>
__global__ void __launch_bounds__(kSquareThreads) privacy_square(const SquareParams a) {
  const int64_t sample = blockIdx.x / a.of.chunks, chunk = blockIdx.x % a.of.chunks;
  const Entry p = a.of.table[a.of.of_chunk[chunk]];
  const E* row = row_of<E>(p, sample);
  const int64_t begin = (chunk - p.first) * a.of.chunk, end = min(begin + a.of.chunk, p.size);
  Square sum{0};
  for (int64_t first = begin + threadIdx.x * kEach; first < end; first += blockDim.x * kEach) {
    E x[kEach];
    load(row, first, end, x);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const double v = to_double(x[i]) * a.unit;
      sum.value += v * v;
    }
  }
  sum = Block::reduce(
      sum, [](const Square& p, const Square& q) -> Square { return {p.value + q.value}; });
  if (threadIdx.x == 0) square_of(a, sample)[chunk] = sum.value;
}

// The tile's noise: elements 32 t + j and 32 t + j + 16 are a pair, of Philox's block 16 t + j and
// of words 4 q to 4 q + 3 of ChaCha20's block 16 (t / 4) + j, q = t % 4.
template <Generator G>
__device__ __forceinline__ void make_noise(const Draws& draws, int64_t tile, double* noise) {
  constexpr int words = G == Generator::philox ? 4 : 16, blocks = kTile / words * 2;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    uint32_t w[words];
    if constexpr (G == Generator::philox) {
      philox(draws, static_cast<uint64_t>(tile) * blocks + i, w);
    } else {
      chacha20(draws, static_cast<uint64_t>(tile) * blocks + i, w);
    }
    double* pairs = noise + i / 16 * 8 * words + i % 16;
#pragma unroll
    for (int q = 0; q < words / 4; q++) {
      const Pair pair = box_muller(w[4 * q], w[4 * q + 1], w[4 * q + 2], w[4 * q + 3]);
      pairs[32 * q] = pair.a.v;
      pairs[32 * q + 16] = pair.b.v;
    }
  }
}

template <class E, class Out, Generator G>
__global__ void __launch_bounds__(kReleaseThreads) privacy_release(const ReleaseParams a) {
  FD_SHARED(double, noise, kTile);
  const Entry p = a.of.table[a.of.of_chunk[blockIdx.x]];
  const int64_t tile = blockIdx.x - p.first, first = tile * kTile + threadIdx.x * kEach;
  if constexpr (G != Generator::none) {
    Draws draws = a.draws;
    draws.counter[0] = static_cast<uint32_t>(p.counter);
    make_noise<G>(draws, tile, noise);
  }

  Real sum[kEach] = {};
  const int64_t samples = a.of.samples;
  for (int64_t at = 0; at < samples; at += kUnroll) {
    E x[kUnroll][kEach];
    double factors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int64_t sample = at + u;
      const bool there = sample < samples;
      factors[u] = there ? __ldg(a.factors + sample) : 0.0;
      load(row_of<E>(p, there ? sample : 0), first, there ? p.size : 0, x[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (factors[u] == 0) continue;  // a select, not a product: 0 times NaN is NaN
#pragma unroll
      for (int i = 0; i < kEach; i++)
        sum[i] = sum[i] + on_grid(Real{to_double(x[u][i])} * Real{factors[u]}, a.fine);
    }
  }

  if constexpr (G != Generator::none) __syncthreads();
  Out y[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    Real v = on_grid(sum[i], a.grid);
    if constexpr (G != Generator::none) {
      const Real z{noise[threadIdx.x * kEach + i]};
      v = v + on_grid(z * Real{a.scale}, a.grid);
    }
    y[i] = static_cast<Out>((v * Real{a.inverse}).v);
  }
  store(static_cast<Out*>(p.out), first, p.size, y);
}

}  // namespace fd
