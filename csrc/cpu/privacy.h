// What the privacy kernels are given. The arithmetic is specified, operation by operation, in
// fastdistill/privacy/reference.py; mechanism.py proves what it guarantees.
#pragma once
#include <vector>

#include "rows.h"

namespace fd {

enum class Generator : int { none = 0, philox = 1, chacha20 = 2 };

// The block of 128-bit counter (block, counter[0] + block / 2^32, counter[1], counter[2]).
struct Draws {
  Generator generator;
  uint32_t key[8];  // Philox takes two
  uint32_t counter[3];
};

struct Noise {
  Draws draws;
  double scale;    // standard deviation
  double magic;    // 1.5 * 2^52 times the grid: adding it rounds to the grid; 0 without a grid
  double inverse;  // 1 / expected batch size
};

struct RowSumCall {                   // a sum over teachers, row by row
  std::vector<const void*> teachers;  // each [rows, classes]
  Type type;
  int64_t rows, classes;
  void* out;  // [rows, classes]
  bool out_double;
  double inverse_temperature;  // 0: clipped rows, not softmax
  double magic_exp;            // that rounds exponentials to their grid, or 0
  double clip;                 // in place of 1, or of the clip norm
  double unit;                 // a power of two: norms are taken of x unit
  double magic;                // that rounds a teacher's contribution to its grid, or 0
  Noise noise;
  int threads;
};

constexpr int64_t kNoiseGroup = 128;  // elements of a group of blocks; chunks are whole groups

// One per instruction set, compiled without contraction of a product and a sum.
struct PrivacyKernels {
  // The sum of (x unit)^2.
  double (*square)(Type type, const void* x, int64_t n, double unit);
  // sum[j] += x[i][j] factor[i], rounded to the grid of `magic`, for i < count, j < n.
  void (*add)(Type type, const void* const* x, const double* factor, int64_t count, int64_t n,
              double magic, double* sum);
  // sum[j] += the softmax of row x, rounded to its grid; nothing where x is not finite. `scratch`
  // has place for the row in whole vectors.
  void (*add_softmax)(const RowSumCall& call, const void* x, double* scratch, double* sum);
  // out[first + j] = (sum[j] on the grid + noise[first + j]) inverse; `sum` null: no sum. It may be
  // where the results go, of one type.
  void (*release)(const Noise& noise, int64_t first, int64_t n, const void* sum, bool sum_double,
                  void* out, bool out_double);
  // The random words of one block: 4 of Philox, 16 of ChaCha20.
  void (*words)(const Draws& draws, int64_t block, uint32_t* out);
};

}  // namespace fd
