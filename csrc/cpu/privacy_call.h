// One call of the privacy driver, as the bindings fill it in.
#pragma once
#include <vector>

#include "privacy.h"

namespace fd {

struct GradSamples {  // of one parameter
  const void* data;   // [samples, size]
  Type type;
  int64_t size;
  void* out;  // [size]
  bool out_double;
};

struct PrivacyCall {
  std::vector<GradSamples> parameters;
  int64_t samples;
  double clip;   // in place of the clip norm
  double unit;   // a power of two: norms are taken of x unit
  double magic;  // that rounds a sample's contribution to its grid, or 0
  Noise noise;   // the counter is that of parameter 0
  int threads;
};

constexpr double kEps = 1e-6;  // Opacus's, in C / (n + 1e-6)

void noisy_row_sum(const PrivacyKernels& kernels, const RowSumCall& call);
// The noise alone: `data` is [size], float32 or float64, and may be `out`.
void add_noise(const PrivacyKernels& kernels, const PrivacyCall& call);
// out[i] = the square norm of sample i of `count`; `out` of `samples` is not used.
void square_norms(const PrivacyKernels& kernels, const GradSamples& samples, int64_t count,
                  double* out, int threads);
void clip_and_noise(const PrivacyKernels& kernels, const PrivacyCall& call);

}  // namespace fd
