// The threads that share a row, a warp or a block, and how they combine what each has found.
#pragma once
#include <cstdint>
#include <cstring>

// Both kinds of shared memory, by macro so that a host build can put its own in their place.
#ifndef FD_SHARED
#define FD_SHARED(type, name, count) __shared__ type name[count]
#define FD_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace fd {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// The value, a struct of floats, of the lane whose number differs in `bit`.
template <class V>
__device__ __forceinline__ V lane_across(const V& mine, int bit) {
  float words[sizeof(V) / sizeof(float)];
  memcpy(words, &mine, sizeof(V));
#pragma unroll
  for (float& word : words) word = __shfl_xor_sync(0xffffffffu, word, bit);
  V theirs;
  memcpy(&theirs, words, sizeof(V));
  return theirs;
}

// `merge` has to commute to the bit: then every thread of the group ends with the same value.
struct Warp {
  static __device__ __forceinline__ int size() { return kWarp; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int64_t index() {
    return blockIdx.x * static_cast<int64_t>(blockDim.x / kWarp) + threadIdx.x / kWarp;
  }

  template <class V, class Merge>
  static __device__ __forceinline__ V reduce(V value, Merge merge) {
#pragma unroll
    for (int bit = kWarp / 2; bit > 0; bit /= 2) value = merge(value, lane_across(value, bit));
    return value;
  }
};

struct Block {
  static __device__ __forceinline__ int size() { return blockDim.x; }
  static __device__ __forceinline__ int rank() { return threadIdx.x; }
  static __device__ __forceinline__ int64_t index() { return blockIdx.x; }

  // Once per type V in a kernel: the slots are that type's own, so that no second barrier has to
  // keep them. The number of warps is a power of two.
  template <class V, class Merge>
  static __device__ __forceinline__ V reduce(V value, Merge merge) {
    FD_SHARED(V, slots, kMaxThreads / kWarp);
    value = Warp::reduce(value, merge);
    if (Warp::rank() == 0) slots[threadIdx.x / kWarp] = value;
    __syncthreads();
    // Lanes beyond the number of warps repeat the first ones, and stay among themselves.
    const int warps = blockDim.x / kWarp;
    value = slots[threadIdx.x % warps];
    for (int bit = warps / 2; bit > 0; bit /= 2) value = merge(value, lane_across(value, bit));
    return value;
  }
};

}  // namespace fd
