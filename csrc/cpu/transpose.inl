// The transpose of kLanes by kLanes floats.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "lanes.inl"

// to[i][j] = from[j][i], kLanes by kLanes; top[j] becomes the largest of it and of from[j], here
// where all are in registers. A NaN is passed over, and may hide others of its row.
template <bool TOP = false>
FD_INLINE void transpose(const float* const* from, float* const* to, float* top = nullptr) {
  static_assert(kLanes == 16, "the shuffles below are written for 16");
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from[i]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then rows by fours, in each 128-bit lane
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
      const __m512d x = _mm512_castps_pd(b[i + k]), y = _mm512_castps_pd(b[i + k + 2]);
      a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  __m512 most = TOP ? _mm512_loadu_ps(top) : _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // then the 128-bit lanes
    const __m512 even = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    const __m512 out[4] = {
        _mm512_shuffle_f32x4(even, even2, 0x88), _mm512_shuffle_f32x4(odd, odd2, 0x88),
        _mm512_shuffle_f32x4(even, even2, 0xdd), _mm512_shuffle_f32x4(odd, odd2, 0xdd)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) _mm512_storeu_ps(to[4 * k + i], out[k]);
    if (TOP)
      most = _mm512_max_ps(
          _mm512_max_ps(_mm512_max_ps(out[0], out[1]), _mm512_max_ps(out[2], out[3])), most);
  }
  if (TOP) _mm512_storeu_ps(top, most);
#elif defined(__AVX2__)
  for (int r = 0; r < 16; r += 8) {
    __m256 most = TOP ? _mm256_loadu_ps(top + r) : _mm256_setzero_ps();
    for (int c = 0; c < 16; c += 8) {
      __m256 a[8], b[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from[r + i] + c);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
          const __m256d x = _mm256_castps_pd(b[i + k]), y = _mm256_castps_pd(b[i + k + 2]);
          a[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
          a[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m256 low = _mm256_permute2f128_ps(a[i], a[4 + i], 0x20);
        const __m256 high = _mm256_permute2f128_ps(a[i], a[4 + i], 0x31);
        _mm256_storeu_ps(to[c + i] + r, low);
        _mm256_storeu_ps(to[c + 4 + i] + r, high);
        if (TOP) most = _mm256_max_ps(_mm256_max_ps(low, high), most);
      }
    }
    if (TOP) _mm256_storeu_ps(top + r, most);
  }
#else
  for (int i = 0; i < kLanes; i++) {
    for (int j = 0; j < kLanes; j++) {
      to[i][j] = from[j][i];
      if (TOP) top[j] = larger(from[j][i], top[j]);
    }
  }
#endif
}
