// The launchers of the softmax kernels: a warp for a short row, a block for a long one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cfloat>

#include "softmax.cuh"

namespace fd {
namespace {

constexpr int kWarpCols = 1024;  // up to here a warp takes a row: four chunks for each lane
constexpr int kWarps = kThreadsOf<Warp> / kWarp;  // of a block of such rows

int launch(void (*kernel)(SoftmaxParams), const SoftmaxParams& params, int64_t blocks, int threads,
           void* stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Two to four chunks for each thread; a power of two (Block::reduce).
int block_threads(int64_t cols) {
  int threads = 128;
  while (threads < kMaxThreads && cols / kChunk >= 4 * threads) threads *= 2;
  return threads;
}

template <class E, bool LOG>
int run(const SoftmaxParams& a, bool backward, void* stream) {
  if (a.cols <= kWarpCols) {
    return launch(backward ? softmax_backward<E, Warp, LOG> : softmax_forward<E, Warp, LOG>, a,
                  (a.rows + kWarps - 1) / kWarps, kWarps * kWarp, stream);
  }
  return launch(backward ? softmax_backward<E, Block, LOG> : softmax_forward<E, Block, LOG>, a,
                a.rows, block_threads(a.cols), stream);
}

template <class E>
int run(const SoftmaxParams& a, bool log, bool backward, void* stream) {
  return log ? run<E, true>(a, backward, stream) : run<E, false>(a, backward, stream);
}

int run(const SoftmaxArgs& args, const SoftmaxGradArgs* grad, void* stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.cols > INT32_MAX - 2 * kChunk) return cudaErrorInvalidValue;
  SoftmaxParams a{};
  a.x = args.x.data;
  a.x_outer = args.x.outer;
  a.x_step = args.x.step;
  a.rows = args.rows;
  a.inner = args.inner;
  a.cols = static_cast<int>(args.cols);
  a.temperature = args.temperature;
  a.inverse = static_cast<float>(std::min(1.0 / args.scalar, double{FLT_MAX} / 2));
  a.stats = args.stats;
  a.out = args.y;
  if (grad != nullptr) {
    a.grad = grad->grad.data;
    a.grad_outer = grad->grad.outer;
    a.grad_step = grad->grad.step;
    a.out = grad->grad_x;
    a.grad_temperature = grad->grad_temperature;
  }
  switch (args.x.type) {
    case Type::f32:
      return run<float>(a, args.log, grad != nullptr, stream);
    case Type::bf16:
      return run<__nv_bfloat16>(a, args.log, grad != nullptr, stream);
    case Type::f16:
      return run<__half>(a, args.log, grad != nullptr, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fd

int fd_softmax_forward(const fd::SoftmaxArgs* args, void* stream) {
  return fd::run(*args, nullptr, stream);
}

int fd_softmax_backward(const fd::SoftmaxGradArgs* args, void* stream) {
  return fd::run(args->of, args, stream);
}
