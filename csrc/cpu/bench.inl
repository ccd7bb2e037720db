// For bench/ only: what this machine can do with the kernels' own instructions.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "rows.inl"
#include "stream.inl"

// `repeats` rounds of n exponentials (n a multiple of kLanes) as step 1 of kd.inl makes them:
// subtract, exp, store, sum. Returns the sum, so that none of it is dead code.
static float exp_loop(const float* __restrict x, float* __restrict e, int64_t n, int64_t repeats) {
  const Exp<float> at_t(0.5);
  alignas(64) float sum[kLanes] = {};
  for (int64_t r = 0; r < repeats; r++) {
    const float from = static_cast<float>(r & 1);  // no round can be taken from the one before
    for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; j++) {
        const float v = at_t(x[i + j] - from);
        e[i + j] = v;
        sum[j] += v;
      }
    }
  }
  float total = 0;
  for (int j = 0; j < kLanes; j++) total += sum[j];
  return total;
}

// The traffic of a fused loss and nothing else: reads two inputs, writes one output of their size.
static void read_read_write(const char* a, const char* b, char* out, int64_t bytes, bool stream) {
  constexpr int64_t block = 4096;
  alignas(64) uint32_t both[block / 4];
  for (int64_t first = 0; first < bytes; first += block) {
    const int64_t n = bytes - first < block ? bytes - first : block;
    const uint32_t* __restrict x = reinterpret_cast<const uint32_t*>(a + first);
    const uint32_t* __restrict y = reinterpret_cast<const uint32_t*>(b + first);
    uint32_t* __restrict z = stream ? both : reinterpret_cast<uint32_t*>(out + first);
#pragma omp simd
    for (int64_t i = 0; i < n / 4; i++) z[i] = x[i] ^ y[i];
    if (stream) stream_copy(out + first, reinterpret_cast<const char*>(both), n);
  }
  if (stream) stream_fence();
}

// Every word of `bytes` (a multiple of 4), into registers.
static uint32_t read_only(const char* a, int64_t bytes) {
  const uint32_t* x = reinterpret_cast<const uint32_t*>(a);
  uint32_t all = 0;
#pragma omp simd reduction(^ : all)
  for (int64_t i = 0; i < bytes / 4; i++) all ^= x[i];
  return all;
}
