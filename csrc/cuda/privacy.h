// What the kernels of private releases are given. fastdistill/privacy/reference.py specifies their
// arithmetic, mechanism.py proves what it guarantees.
#pragma once
#include <cstdint>

namespace fd {

enum class Element : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct Samples {  // of one tensor
  const void* data;
  Element type;
  int64_t count, size;
  int64_t step;  // elements from one sample to the next
};

// squares[sample, first + c] = the sum of (x unit)^2 over elements [c chunk, (c + 1) chunk).
struct SquareArgs {
  Samples of;
  double unit;
  int64_t chunk;  // a multiple of 8
  double* squares;
  int64_t square_step, first;
};

// out[e] = (sum over samples of x[e] factor, on grids, + noise[e]) inverse
struct ReleaseArgs {
  Samples of;
  const double* factors;  // [count]; 0 leaves the sample out
  void* out;              // [size]
  bool out_double;        // of double; of float otherwise
  int generator;
  uint32_t key[8], counter[3];
  double fine, grid;  // 1.5 * 2^52 times the grids of a contribution and of the sum
  double scale;       // standard deviation of the noise
  double inverse;
};

// A sum over teachers, row by row: of softmax rows, or of clipped ones.
struct RowSumArgs {
  const uint64_t* table;  // [teachers]: addresses of their [rows, cols], in device memory
  Element type;
  int64_t teachers, rows, cols;
  int64_t step;                // elements from one row of a teacher to the next
  double* sums;                // [rows, cols]
  double *highest, *factors;   // [rows, teachers]: used for rows of more than 256 elements
  double inverse_temperature;  // 0: clipped rows
  double exponentials, fine;   // 1.5 * 2^52 times their grid, and that of a contribution
  double clip;                 // in place of 1, or of the clip norm
  double unit;                 // as above
};

}  // namespace fd

// All return a cudaError_t: 0 for success. `stream` is a cudaStream_t.
extern "C" {
int fd_privacy_square(const fd::SquareArgs* args, void* stream);
int fd_privacy_release(const fd::ReleaseArgs* args, void* stream);
int fd_privacy_sum_rows(const fd::RowSumArgs* args, void* stream);
}
