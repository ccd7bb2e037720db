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
  void* out;              // [size] float, or double for double
  int generator;
  uint32_t key[8], counter[3];
  double fine, grid;  // 1.5 * 2^52 times the grids of a contribution and of the sum
  double scale;       // standard deviation of the noise
  double inverse;
};

}  // namespace fd

// Both return a cudaError_t: 0 for success. `stream` is a cudaStream_t.
extern "C" {
int fd_privacy_square(const fd::SquareArgs* args, void* stream);
int fd_privacy_release(const fd::ReleaseArgs* args, void* stream);
}
