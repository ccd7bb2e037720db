// The launchers of the kernels of private releases.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "privacy.cuh"
#include "privacy.h"

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

template <class E>
int release(const ReleaseParams& a, int generator, void* stream) {
  const int64_t tiles = (a.size + kTile - 1) / kTile;
  switch (static_cast<Generator>(generator)) {
    case Generator::none:
      return launch(privacy_release<E, Generator::none>, a, tiles, kReleaseThreads, stream);
    case Generator::philox:
      return launch(privacy_release<E, Generator::philox>, a, tiles, kReleaseThreads, stream);
    case Generator::chacha20:
      return launch(privacy_release<E, Generator::chacha20>, a, tiles, kReleaseThreads, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fd

int fd_privacy_square(const fd::SquareArgs* args, void* stream) {
  using namespace fd;
  const Samples& x = args->of;
  const int64_t chunks = (x.size + args->chunk - 1) / args->chunk;
  const SquareParams a{x.data,     x.size,     x.step,        args->chunk,
                       chunks,     args->unit, args->squares, args->square_step,
                       args->first};
  const int64_t blocks = x.count * chunks;
  if (blocks == 0) return cudaSuccess;
  const int threads = square_threads(x.size);
  switch (x.type) {
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
  const Samples& x = args->of;
  ReleaseParams a{x.data, x.size,     x.count,    x.step,      args->factors, args->out,
                  {},     args->fine, args->grid, args->scale, args->inverse};
  std::copy_n(args->key, 8, a.draws.key);
  std::copy_n(args->counter, 3, a.draws.counter);
  if (a.size == 0) return cudaSuccess;
  switch (x.type) {
    case Element::f32:
      return release<float>(a, args->generator, stream);
    case Element::f64:
      return release<double>(a, args->generator, stream);
    case Element::bf16:
      return release<__nv_bfloat16>(a, args->generator, stream);
    case Element::f16:
      return release<__half>(a, args->generator, stream);
  }
  return cudaErrorInvalidValue;
}
