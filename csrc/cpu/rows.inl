// Rows of logits into arithmetic and back: element types and padding.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "math.inl"

constexpr int kLanes = 16;  // every inner loop runs over a multiple of this: no scalar remainder

FD_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

FD_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const float magnitude =
      from_bits<float>(static_cast<int32_t>((h & 0x7fffu) << 13)) * 5.192296858534828e33f;  // 2^112
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;  // inf and NaN
  return from_bits<float>(
      static_cast<int32_t>(static_cast<uint32_t>(bits_of<float>(magnitude)) | special | sign));
}

FD_INLINE uint16_t to_f16(float x) {  // round to nearest even
  const uint32_t bits = static_cast<uint32_t>(bits_of<float>(x));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24 in its last place.
  const uint32_t small = static_cast<uint32_t>(bits_of<float>(
                             from_bits<float>(static_cast<int32_t>(magnitude)) + 0.5f)) -
                         0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? small : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // rounds to 65536 and above: inf
  h = magnitude > 0x7f800000u ? 0x7e00u : h;   // NaN
  return static_cast<uint16_t>(h | sign);
}

// kLanes elements at once; the processor's own conversions where it has them (a third of the time).
FD_INLINE void widen_f16(const uint16_t* h, float* x) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h))));
#elif defined(__F16C__)
  for (int j = 0; j < kLanes; j += 8)
    _mm256_storeu_ps(x + j,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + j))));
#else
#pragma omp simd
  for (int j = 0; j < kLanes; j++) x[j] = from_f16(h[j]);
#endif
}

FD_INLINE void narrow_f16(const float* x, uint16_t* h) {  // round to nearest even
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_cvtps_ph(_mm512_loadu_ps(x), 0));
#elif defined(__F16C__)
  for (int j = 0; j < kLanes; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(h + j), _mm256_cvtps_ph(_mm256_loadu_ps(x + j), 0));
#else
#pragma omp simd
  for (int j = 0; j < kLanes; j++) h[j] = to_f16(x[j]);
#endif
}

FD_INLINE float from_bf16(uint16_t h) {
  return from_bits<float>(static_cast<int32_t>(static_cast<uint32_t>(h) << 16));
}

FD_INLINE void widen_bf16(const uint16_t* h, float* x) {
#if defined(__AVX512F__)  // at once: the compiler goes by halves, which cannot be forwarded as one
  const __m512i bits =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
  _mm512_storeu_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
#else
#pragma omp simd
  for (int j = 0; j < kLanes; j++) x[j] = from_bf16(h[j]);
#endif
}

FD_INLINE void widen(Type type, const uint16_t* h, float* x) {  // bf16 or f16
  if (type == Type::bf16) {
    widen_bf16(h, x);
  } else {
    widen_f16(h, x);
  }
}

FD_INLINE uint16_t to_bf16(float x) {  // round to nearest even
  const uint32_t bits = static_cast<uint32_t>(bits_of<float>(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FD_INLINE void narrow_bf16(const float* x, uint16_t* h) {
#if defined(__AVX512F__)
  const __m512 v = _mm512_loadu_ps(x);
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(sum, 16);
  const __m512i out = _mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_cvtepi32_epi16(out));
#elif defined(__AVX2__)
  __m256i half[2];
  for (int k = 0; k < 2; k++) {
    const __m256 v = _mm256_loadu_ps(x + 8 * k);
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    half[k] = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  }
  const __m256i both = _mm256_packus_epi32(half[0], half[1]);  // by 128-bit lanes
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm256_permute4x64_epi64(both, 0xd8));
#else
#pragma omp simd
  for (int j = 0; j < kLanes; j++) h[j] = to_bf16(x[j]);
#endif
}

FD_INLINE int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

FD_INLINE const char* row_start(const Rows& rows, int64_t row, int64_t inner) {
  const int64_t element =
      row < inner ? row * rows.step : (row / inner) * rows.outer + (row % inner) * rows.step;
  return static_cast<const char*>(rows.data) + element * size_of(rows.type);
}

template <class R>
static R element(Type type, const void* row, int64_t i) {
  switch (type) {
    case Type::f32:
      return static_cast<R>(static_cast<const float*>(row)[i]);
    case Type::f64:
      return static_cast<R>(static_cast<const double*>(row)[i]);
    case Type::bf16:
      return static_cast<R>(from_bf16(static_cast<const uint16_t*>(row)[i]));
    case Type::f16:
      return static_cast<R>(from_f16(static_cast<const uint16_t*>(row)[i]));
  }
  return R(0);
}

template <class R>
struct TypeOf {
  static constexpr Type value = sizeof(R) == 8 ? Type::f64 : Type::f32;
};

// Elements [first, first + n) of a row as R, padded with -inf to a multiple of kLanes. Returns
// the row itself where nothing has to change, else `buffer`.
template <class R>
static const R* load(Type type, const void* row, int64_t first, int64_t n, R* buffer) {
  if (type == TypeOf<R>::value) {
    const R* x = static_cast<const R*>(row) + first;
    if (n % kLanes == 0) return x;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = x[i];
  } else if (type == Type::bf16) {
    const uint16_t* x = static_cast<const uint16_t*>(row) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = static_cast<R>(from_bf16(x[i]));
  } else if (type == Type::f16) {
    const uint16_t* x = static_cast<const uint16_t*>(row) + first;
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      alignas(64) float lane[kLanes];
      widen_f16(x + i, lane);
#pragma omp simd
      for (int j = 0; j < kLanes; j++) buffer[i + j] = static_cast<R>(lane[j]);
    }
    for (int64_t i = whole; i < n; i++) buffer[i] = static_cast<R>(from_f16(x[i]));
  } else {
    const float* x = static_cast<const float*>(row) + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) buffer[i] = static_cast<R>(x[i]);
  }
  for (int64_t i = n; i < padded(n); i++) buffer[i] = -static_cast<R>(__builtin_inf());
  return buffer;
}

// Elements [first, first + n) of a row from `x`, rounded to nearest. `x` is overwritten where the
// type is narrower.
template <class R>
static void store(Type type, void* row, int64_t first, int64_t n, R* x) {
  char* to = static_cast<char*>(row) + first * size_of(type);
  uint16_t* narrow = reinterpret_cast<uint16_t*>(x);
  if (type == Type::bf16 || type == Type::f16) {
    for (int64_t i = 0; i < n; i += kLanes) {
      alignas(64) float wide[kLanes];
      uint16_t lane[kLanes];
#pragma omp simd
      for (int j = 0; j < kLanes; j++) wide[j] = static_cast<float>(x[i + j]);
      if (type == Type::bf16) {
        narrow_bf16(wide, lane);
      } else {
        narrow_f16(wide, lane);
      }
      __builtin_memcpy(narrow + i, lane, sizeof lane);
    }
  } else if (type == Type::f32 && sizeof(R) == 8) {
    float* single = reinterpret_cast<float*>(x);
    for (int64_t i = 0; i < n; i += kLanes) {
      float lane[kLanes];
#pragma omp simd
      for (int j = 0; j < kLanes; j++) lane[j] = static_cast<float>(x[i + j]);
      __builtin_memcpy(single + i, lane, sizeof lane);
    }
  }
  __builtin_memcpy(to, x, static_cast<size_t>(n * size_of(type)));
}
