// What the kernels of private releases are given. fastdistill/privacy/reference.py specifies their
// arithmetic, mechanism.py proves what it guarantees.
#pragma once
#include <cstdint>

namespace fd {

enum class Element : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// One tensor, [samples, size], and its result. Fields of 8 bytes: gpu.Tensors.table makes them.
struct Entry {
  const void* x;
  int64_t size;
  int64_t step;      // elements from one sample to the next
  int64_t first;     // of all the launch's chunks
  void* out;         // [size]
  uint64_t counter;  // word 1 of the counters of its noise
};

// The tensors of one launch, in device memory, cut into chunks.
struct Tensors {
  const Entry* table;
  const int64_t* of_chunk;  // [chunks]: which tensor each is of
  int64_t chunks, chunk;    // their number, elements of one
  Element type;
  int64_t samples;
};

// squares[sample, first + c] = the sum of (x unit)^2 over chunk c of a sample, a multiple of 8.
struct SquareArgs {
  Tensors of;
  int64_t most;  // elements of the largest tensor
  double unit;
  double* squares;
  int64_t square_step, first;
};

// out[e] = (sum over samples of x[e] factor, on grids, + noise[e]) inverse; by chunks of 1024.
struct ReleaseArgs {
  Tensors of;
  const double* factors;  // [samples]; 0 leaves the sample out
  bool out_double;        // results of double; of float otherwise
  int generator;
  uint32_t key[8], counter[2];  // words 2 and 3
  double fine, grid;            // 1.5 * 2^52 times the grids of a contribution and of the sum
  double scale;                 // standard deviation of the noise
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
