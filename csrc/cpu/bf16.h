// Products of bfloat16 matrices with float32 sums, for processors with AVX512_BF16.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fd {

struct Bf16Matrix {
  const uint16_t* data;
  int64_t rows, cols, step;  // [rows, cols], `step` elements from row to row
};

// C = alpha A B, rounded once to C's type.
struct Bf16Product {
  Bf16Matrix a;       // [m, k], k even
  Bf16Matrix b;       // [k, n], or its transpose [n, k]
  bool b_transposed;  // the latter
  int64_t n;
  void* c;  // [m, n] of bfloat16 or float32, `c_step` elements from row to row
  int64_t c_step;
  bool c_bf16;
  float alpha;
};

// C += A' B in float32.
struct Bf16Sum {
  Bf16Matrix a, b;   // [k, m] and [k, n]
  uint32_t* packed;  // bf16_packed_words(k, n) of scratch
  float* c;          // [m, n]
  int64_t c_step;
};

constexpr int64_t kBf16Lanes = 16;    // columns of a panel of B
constexpr int64_t kBf16Columns = 48;  // of C that are summed at once: three panels
constexpr int64_t kBf16Rows = 8;      // by so many rows: 24 sums and 4 operands in 32 registers

inline int64_t bf16_packed_words(int64_t k, int64_t n) {
  return (n + kBf16Lanes - 1) / kBf16Lanes * kBf16Lanes * ((k + 1) / 2);
}

// Ranges are of rows (a multiple of kBf16Rows apart) or of columns (of kBf16Lanes).
struct Bf16Kernels {
  // Of C's rows [row, row_end) and columns from `column` on, kBf16Columns of them.
  void (*product)(const Bf16Product&, int64_t row, int64_t row_end, int64_t column,
                  uint32_t* scratch);
  void (*pack)(const Bf16Matrix&, int64_t begin, int64_t end, uint32_t* packed);
  void (*sum)(const Bf16Sum&, int64_t begin, int64_t end, uint32_t* scratch);
};

// Null where the processor, the compiler or the instruction set in use has none.
const Bf16Kernels* bf16_kernels();

// The processor has tile registers (AMX), with which oneMKL's product is several times as fast.
bool has_bf16_tiles();

void bf16_product(const Bf16Kernels& kernels, const Bf16Product& product, int threads);
void bf16_add_product(const Bf16Kernels& kernels, const Bf16Sum& sum, int threads);

}  // namespace fd
