// Eight elements of a row: how they are loaded, converted and stored.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace fd {

constexpr int kChunk = 8;  // elements: one 16-byte vector of 16-bit elements, two of float

struct None {};  // the element type of a teacher that is not there

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Two neighbours at once: one conversion instruction for a pair of 16-bit elements.
__device__ __forceinline__ void round_pair(float a, float b, float* to) { to[0] = a, to[1] = b; }
__device__ __forceinline__ void round_pair(float a, float b, __nv_bfloat16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = pair.x, to[1] = pair.y;
}
__device__ __forceinline__ void round_pair(float a, float b, __half* to) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = pair.x, to[1] = pair.y;
}

// The distance, in elements, from the last boundary of a chunk in memory to `row`.
template <class E>
__device__ __forceinline__ int shift_of(const E* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(E) % kChunk);
}

// Whether a row that begins `shift` elements after the start of a chunk can take 16-byte accesses.
template <class E>
__device__ __forceinline__ bool aligned(const E* row, int shift) {
  return (reinterpret_cast<uintptr_t>(row) - shift * sizeof(E)) % sizeof(uint4) == 0;
}

template <class E>
struct Chunk {
  static constexpr int kVectors = kChunk * sizeof(E) / sizeof(uint4);
  uint4 vectors[kVectors];

  // Elements [first, first + 8) of a row, -inf outside [0, cols): no mass, and exp makes it 0.
  static __device__ __forceinline__ Chunk load(const E* row, int first, int cols, bool aligned) {
    Chunk chunk;
    if (aligned && first >= 0 && first + kChunk <= cols) {
      const uint4* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
      for (int v = 0; v < kVectors; v++) chunk.vectors[v] = __ldg(from + v);
    } else {
      E x[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        const bool inside = first + i >= 0 && first + i < cols;
        x[i] = inside ? row[first + i] : static_cast<E>(-INFINITY);
      }
      memcpy(chunk.vectors, x, sizeof x);
    }
    return chunk;
  }

  static __device__ __forceinline__ Chunk rounded(const float (&x)[kChunk]) {
    E y[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) round_pair(x[i], x[i + 1], y + i);
    Chunk chunk;
    memcpy(chunk.vectors, y, sizeof y);
    return chunk;
  }

  // Those of the elements [first, first + 8) that lie in the row; `first` is on a boundary.
  __device__ __forceinline__ void store(E* row, int first, int cols) const {
    if (first >= 0 && first + kChunk <= cols) {
      uint4* to = reinterpret_cast<uint4*>(row + first);
#pragma unroll
      for (int v = 0; v < kVectors; v++) __stwb(to + v, vectors[v]);  // `=` may become four stores
    } else {
      E x[kChunk];
      memcpy(x, vectors, sizeof x);
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        if (first + i >= 0 && first + i < cols) row[first + i] = x[i];
      }
    }
  }

  __device__ __forceinline__ void unpack(float (&x)[kChunk]) const {
    E y[kChunk];
    memcpy(y, vectors, sizeof y);
#pragma unroll
    for (int i = 0; i < kChunk; i++) x[i] = to_float(y[i]);
  }
};

template <>
struct Chunk<None> {
  static constexpr int kVectors = 0;
  static constexpr uint4* vectors = nullptr;
  static __device__ __forceinline__ Chunk load(const None*, int, int, bool) { return {}; }
};

}  // namespace fd
