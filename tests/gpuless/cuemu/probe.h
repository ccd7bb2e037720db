// What the probes of all rooms share. A probe runs kernels on small rows against plain loops in
// double, and exits with 1 where a value is wrong. Built for the host with sanitizers and with
// faults; by nvcc for its machine code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

inline int failures = 0;

inline float as_float(float x) { return x; }
inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float as_float(__half x) { return __half2float(x); }

// Exactly as large as it says, so that a sanitizer sees the first byte outside.
template <class E>
struct Buffer {
  std::unique_ptr<E[]> data;
  explicit Buffer(size_t n) : data(new E[n]) {
    for (size_t i = 0; i < n; i++) data[i] = static_cast<E>(NAN);
  }
  void randomize(size_t n) {
    for (size_t i = 0; i < n; i++) {
      data[i] = static_cast<E>(static_cast<float>(rand() % 2001 - 1000) / 250.f);
    }
  }
};

template <class E>
struct Tolerance {
  static constexpr double value = sizeof(E) == 4 ? 1e-5 : 5e-3;
};

inline void expect(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
  if (failures++ < 5) fprintf(stderr, "probe: %s: got %g, expected %g\n", what, got, want);
}
