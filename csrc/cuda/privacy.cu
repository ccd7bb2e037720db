// The launchers of the kernels of private releases.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "privacy.h"
#include "row_sums.cuh"

namespace fd {
namespace {

template <class Params>
int launch(void (*kernel)(Params), const Params& params, int64_t blocks, int threads,
           void* stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, params);
}

// A power of two (Block::reduce); no more warps than a small tensor fills.
int square_threads(int64_t size) {
  int threads = kSquareThreads;
  while (threads > kWarp && threads / 2 * int64_t{kEach} >= size) threads /= 2;
  return threads;
}

template <class E, class Out = float>
int release(const ReleaseParams& a, int generator, void* stream) {
  const int64_t tiles = a.of.chunks;
  switch (static_cast<Generator>(generator)) {
    case Generator::none:
      return launch(privacy_release<E, Out, Generator::none>, a, tiles, kReleaseThreads, stream);
    case Generator::philox:
      return launch(privacy_release<E, Out, Generator::philox>, a, tiles, kReleaseThreads, stream);
    case Generator::chacha20:
      return launch(privacy_release<E, Out, Generator::chacha20>, a, tiles, kReleaseThreads,
                    stream);
  }
  return cudaErrorInvalidValue;
}

template <class E, bool Softmax>
int sum_rows(const RowParams& a, void* stream) {
  const auto go = [&](void (*kernel)(RowParams), int64_t blocks) {
    return launch(kernel, a, blocks, kRowThreads, stream);
  };
  if (a.cols <= kNarrow) {
    const int64_t rows = kRowThreads / a.lanes;  // of a block
    return go(privacy_narrow_rows<E, Softmax>, (a.rows + rows - 1) / rows);
  }
  const int status = go(privacy_row_factor<E, Softmax>, a.rows * a.teachers);
  return status == cudaSuccess ? go(privacy_row_sum<E, Softmax>, a.rows * a.chunks) : status;
}

template <class E>
int sum_rows(const RowSumArgs& args, void* stream) {
  RowParams a{args.table,
              args.sums,
              args.highest,
              args.factors,
              args.teachers,
              args.rows,
              args.cols,
              args.step,
              0,
              1,
              args.inverse_temperature,
              args.exponentials,
              args.fine,
              args.clip,
              args.unit};
  a.chunks = (a.cols + kRowThreads * kEach - 1) / (kRowThreads * kEach);
  while (a.lanes < kWarp && a.lanes * kEach < a.cols) a.lanes *= 2;
  return a.inverse != 0 ? sum_rows<E, true>(a, stream) : sum_rows<E, false>(a, stream);
}

}  // namespace
}  // namespace fd

int fd_privacy_square(const fd::SquareArgs* args, void* stream) {
  using namespace fd;
  const SquareParams a{args->of, args->unit, args->squares, args->square_step, args->first};
  const int64_t blocks = a.of.samples * a.of.chunks;
  if (blocks == 0) return cudaSuccess;
  const int threads = square_threads(args->most);
  switch (a.of.type) {
    case Element::f32:
      return launch(privacy_square<float>, a, blocks, threads, stream);
    case Element::f64:
      return launch(privacy_square<double>, a, blocks, threads, stream);
    case Element::bf16:
      return launch(privacy_square<__nv_bfloat16>, a, blocks, threads, stream);
    case Element::f16:
      return launch(privacy_square<__half>, a, blocks, threads, stream);
  }
  return cudaErrorInvalidValue;
}

int fd_privacy_release(const fd::ReleaseArgs* args, void* stream) {
  using namespace fd;
  if (args->of.chunk != kTile) return cudaErrorInvalidValue;
  ReleaseParams a{args->of, args->factors, {}, args->fine, args->grid, args->scale, args->inverse};
  std::copy_n(args->key, 8, a.draws.key);
  std::copy_n(args->counter, 2, a.draws.counter + 1);
  if (a.of.chunks == 0) return cudaSuccess;
  switch (a.of.type) {
    case Element::f32:
      return release<float>(a, args->generator, stream);
    case Element::f64:
      return args->out_double ? release<double, double>(a, args->generator, stream)
                              : release<double>(a, args->generator, stream);
    case Element::bf16:
      return release<__nv_bfloat16>(a, args->generator, stream);
    case Element::f16:
      return release<__half>(a, args->generator, stream);
  }
  return cudaErrorInvalidValue;
}

int fd_privacy_sum_rows(const fd::RowSumArgs* args, void* stream) {
  using namespace fd;
  if (args->cols > kNarrow && args->factors == nullptr) return cudaErrorInvalidValue;
  switch (args->type) {
    case Element::f32:
      return sum_rows<float>(*args, stream);
    case Element::f64:
      return sum_rows<double>(*args, stream);
    case Element::bf16:
      return sum_rows<__nv_bfloat16>(*args, stream);
    case Element::f16:
      return sum_rows<__half>(*args, stream);
  }
  return cudaErrorInvalidValue;
}
