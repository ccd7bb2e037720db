// Products of bfloat16 matrices by AVX512_BF16, whose one instruction adds two products to each of
// 16 float32 sums. Compiled with the flags of that instruction set (setup.py).
//
// A word is the pair of neighbours along the summed dimension that it takes. B is packed in panels
// of 16 columns, a word of each beside the other: [panel][pair][16]. A tile of C stays in
// registers.
#include "bf16.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "kernels.h"

namespace fd {
namespace avx512 {

#include "transpose.inl"

namespace {

constexpr int kPanels = kBf16Columns / kBf16Lanes;

FD_INLINE __mmask16 lanes_below(int64_t n) {
  return static_cast<__mmask16>(n >= kBf16Lanes ? 0xffff : (1 << n) - 1);
}

// Columns from `first` on, 16 of them: the words are neighbours in a column.
void pack_panel(const Bf16Matrix& x, int64_t first, uint32_t* to) {
  const __mmask16 mask = lanes_below(x.cols - first);
  const uint16_t* from = x.data + first;
  for (int64_t k = 0; k < x.rows; k += 2, from += 2 * x.step, to += kBf16Lanes) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    const __mmask16 second = k + 1 < x.rows ? mask : 0;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, from + x.step));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// Rows from `first` on, 16 of them, as columns: the words are neighbours in a row. Lanes beyond the
// last row repeat it.
void pack_rows(const Bf16Matrix& x, int64_t first, uint32_t* to) {
  const int64_t pairs = x.cols / 2;
  alignas(64) float block[kBf16Lanes][kBf16Lanes], beyond[kBf16Lanes];
  for (int64_t k = 0; k < pairs; k += kBf16Lanes) {
    const __mmask16 mask = lanes_below(pairs - k);
    const float* from[kBf16Lanes];
    float* column[kBf16Lanes];
    for (int64_t i = 0; i < kBf16Lanes; i++) {
      const int64_t row = first + i < x.rows ? first + i : x.rows - 1;
      _mm512_store_ps(block[i], _mm512_maskz_loadu_ps(mask, x.data + row * x.step + 2 * k));
      from[i] = block[i];
      column[i] = k + i < pairs ? reinterpret_cast<float*>(to + (k + i) * kBf16Lanes) : beyond;
    }
    transpose(from, column);  // it moves the words
  }
}

// What becomes of the sums of a row of a tile, 16 columns of it.
struct Store {
  float* c;
  int64_t step;
  float alpha;
  FD_INLINE_MEMBER void operator()(int64_t row, int64_t column, __mmask16 mask, __m512 sum) const {
    _mm512_mask_storeu_ps(c + row * step + column, mask, _mm512_mul_ps(sum, _mm512_set1_ps(alpha)));
  }
};

struct Narrow {
  uint16_t* c;
  int64_t step;
  float alpha;
  FD_INLINE_MEMBER void operator()(int64_t row, int64_t column, __mmask16 mask, __m512 sum) const {
    float wide[kLanes];
    uint16_t narrow[kLanes];
    _mm512_storeu_ps(wide, _mm512_mul_ps(sum, _mm512_set1_ps(alpha)));
    narrow_bf16(wide, narrow);
    _mm256_mask_storeu_epi16(c + row * step + column, mask,
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(narrow)));
  }
};

struct Add {
  float* c;
  int64_t step;
  FD_INLINE_MEMBER void operator()(int64_t row, int64_t column, __mmask16 mask, __m512 sum) const {
    float* to = c + row * step + column;
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to)));
  }
};

// A tile of C: word (row r, pair k) of A lies at a[r] + k * pair_bytes. The first `rows` are kept.
template <int PANELS, class Put>
FD_INLINE void tile(const char* const* a, int64_t pair_bytes, const uint32_t* b, int64_t pairs,
                    int64_t rows, int64_t row, int64_t column, int64_t columns, const Put& put) {
  __m512 sum[kBf16Rows][PANELS];
#pragma GCC unroll 8
  for (int r = 0; r < kBf16Rows; r++) {
#pragma GCC unroll 3
    for (int p = 0; p < PANELS; p++) sum[r][p] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh right[PANELS];
#pragma GCC unroll 3
    for (int p = 0; p < PANELS; p++)
      right[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + (p * pairs + k) * kBf16Lanes));
#pragma GCC unroll 8
    for (int r = 0; r < kBf16Rows; r++) {
      int32_t word;
      __builtin_memcpy(&word, a[r] + k * pair_bytes, sizeof word);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
#pragma GCC unroll 3
      for (int p = 0; p < PANELS; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], left, right[p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBf16Rows; r++) {
#pragma GCC unroll 3
    for (int p = 0; p < PANELS; p++)
      if (r < rows)
        put(row + r, column + p * kBf16Lanes, lanes_below(columns - p * kBf16Lanes), sum[r][p]);
  }
}

template <class Put>
FD_INLINE void tile_of(const char* const* a, int64_t pair_bytes, const uint32_t* b, int64_t pairs,
                       int64_t rows, int64_t row, int64_t column, int64_t columns, const Put& put) {
  if (columns > 2 * kBf16Lanes)
    return tile<3>(a, pair_bytes, b, pairs, rows, row, column, columns, put);
  if (columns > kBf16Lanes)
    return tile<2>(a, pair_bytes, b, pairs, rows, row, column, columns, put);
  tile<1>(a, pair_bytes, b, pairs, rows, row, column, columns, put);
}

template <class Put>
void product_rows(const Bf16Product& f, int64_t row, int64_t end, int64_t column, const uint32_t* b,
                  const Put& put) {
  for (; row < end; row += kBf16Rows) {
    const char* a[kBf16Rows];
    for (int64_t r = 0; r < kBf16Rows; r++)
      a[r] = reinterpret_cast<const char*>(f.a.data + (row + r < end ? row + r : row) * f.a.step);
    tile_of(a, 4, b, f.a.cols / 2, end - row, row, column, f.n - column, put);
  }
}

void product(const Bf16Product& f, int64_t row, int64_t end, int64_t column, uint32_t* scratch) {
  const int64_t pairs = f.a.cols / 2;
  for (int p = 0; p < kPanels && column + p * kBf16Lanes < f.n; p++) {
    uint32_t* to = scratch + p * pairs * kBf16Lanes;
    if (f.b_transposed) {
      pack_rows(f.b, column + p * kBf16Lanes, to);
    } else {
      pack_panel(f.b, column + p * kBf16Lanes, to);
    }
  }
  if (f.c_bf16) {
    const Narrow put{static_cast<uint16_t*>(f.c), f.c_step, f.alpha};
    product_rows(f, row, end, column, scratch, put);
  } else {
    product_rows(f, row, end, column, scratch, Store{static_cast<float*>(f.c), f.c_step, f.alpha});
  }
}

void pack(const Bf16Matrix& x, int64_t begin, int64_t end, uint32_t* packed) {
  const int64_t pairs = (x.rows + 1) / 2;
  for (; begin < end; begin += kBf16Lanes) pack_panel(x, begin, packed + begin * pairs);
}

// Rows [begin, end) of C, which are columns of A.
void sum(const Bf16Sum& f, int64_t begin, int64_t end, uint32_t* scratch) {
  const int64_t pairs = (f.a.rows + 1) / 2;
  const Add put{f.c, f.c_step};
  for (; begin < end; begin += kBf16Lanes) {
    pack_panel(f.a, begin, scratch);
    for (int64_t column = 0; column < f.b.cols; column += kBf16Columns) {
      for (int64_t i = 0; i < kBf16Lanes && begin + i < end; i += kBf16Rows) {
        const char* a[kBf16Rows];
        for (int64_t r = 0; r < kBf16Rows; r++)
          a[r] = reinterpret_cast<const char*>(scratch + i + r);
        tile_of(a, 4 * kBf16Lanes, f.packed + column * pairs, pairs, end - begin - i, begin + i,
                column, f.b.cols - column, put);
      }
    }
  }
}

}  // namespace

extern const Bf16Kernels bf16;
const Bf16Kernels bf16 = {product, pack, sum};

}  // namespace avx512
}  // namespace fd

#else

namespace fd {
namespace avx512 {

extern const Bf16Kernels bf16;
const Bf16Kernels bf16 = {};

}  // namespace avx512
}  // namespace fd

#endif
