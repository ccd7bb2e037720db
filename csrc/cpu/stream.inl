// Stores past the caches, for outputs that they would not hold: nothing is read before it is
// written. Included once per instruction set, inside that set's namespace.
#pragma once
#include "rows.inl"

// 32 or 64 bytes; `to` is aligned to them, or at least to the vectors of this instruction set.
template <int BYTES>
FD_INLINE void stream_chunk(char* to, const void* from) {
  const char* at = static_cast<const char*>(from);
#if defined(__AVX512F__)
  if (BYTES == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(at));
    return;
  }
#endif
#if defined(__AVX__)
  for (int i = 0; i < BYTES; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i)));
#elif defined(__SSE2__)
  for (int i = 0; i < BYTES; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + i)));
#else
  __builtin_memcpy(to, at, BYTES);
#endif
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
