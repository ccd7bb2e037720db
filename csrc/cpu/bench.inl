// For bench/ only: what this machine can do with the kernels' own instructions.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "rows.inl"

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

// Writes past the caches in full lines; the callers fence once at the end (`stream_fence`).
static void stream_copy(char* to, const char* from, int64_t bytes) {
#if defined(__AVX512F__)
  constexpr int64_t line = 64;
#elif defined(__AVX__)
  constexpr int64_t line = 32;
#else
  constexpr int64_t line = 16;
#endif
  int64_t head = -reinterpret_cast<intptr_t>(to) & (line - 1);
  head = head < bytes ? head : bytes;
  __builtin_memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
#if defined(__AVX512F__)
  for (; i + line <= bytes; i += line)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
  for (; i + line <= bytes; i += line)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#elif defined(__SSE2__)
  for (; i + line <= bytes; i += line)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

static void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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
