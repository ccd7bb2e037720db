// The launchers of the kd kernels: which kernel takes a call, and with what resources.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kd.cuh"

namespace fd {
namespace {

// Static shared memory of the block reductions, which the row kept in dynamic memory must leave.
constexpr int kReserved = (sizeof(Maxima) + sizeof(Parts) + sizeof(Losses)) * kMaxThreads / kWarp;
constexpr int kDefaultShared = 48 * 1024;  // more than this has to be asked for

template <class Params>
int launch(void (*kernel)(Params), const Params& params, int64_t blocks, int threads, int shared,
           void* stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared + kReserved > kDefaultShared) {
    const cudaError_t status = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Bytes of shared memory that a block may have on the current device: 163 KB on sm_80, 227 on
// sm_90, 99 on sm_86 and sm_89.
int shared_limit(int* bytes) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Two to four chunks for each thread, as far as blocks go; a power of two (Block::reduce).
int block_threads(int64_t chunks, int most) {
  int threads = 128;
  while (threads < most && chunks >= 4 * threads) threads *= 2;
  return threads;
}

template <Divergence D, class Student, class Teacher>
int forward(const KdParams& a, void* stream) {
  // A row that starts between two boundaries has a chunk more than one that starts on one.
  const int64_t chunks = (a.cols + 2 * (kChunk - 1)) / kChunk;
  using Registers = InRegisters<Student, Teacher>;
  if (chunks <= Registers::kChunks * kWarp) {
    constexpr int kRows = Registers::kThreads / kWarp;
    return launch(kd_forward<D, Registers>, a, (a.rows + kRows - 1) / kRows, Registers::kThreads, 0,
                  stream);
  }
  const int64_t row_bytes =
      chunks * (Chunk<Student>::kVectors + Chunk<Teacher>::kVectors) * sizeof(uint4);
  int limit = 0;
  const int status = shared_limit(&limit);
  if (status != cudaSuccess) return status;
  if (row_bytes <= limit - kReserved) {
    // Where two rows fit on a multiprocessor, its 64 K registers should do so too: one row's loads
    // then run under the other's arithmetic.
    const int most = row_bytes <= limit / 2 - kReserved ? kMaxThreads / 2 : kMaxThreads;
    return launch(kd_forward<D, InShared<Student, Teacher>>, a, a.rows, block_threads(chunks, most),
                  static_cast<int>(row_bytes), stream);
  }
  return launch(kd_forward<D, InMemory<Student, Teacher>>, a, a.rows,
                block_threads(chunks, kMaxThreads), 0, stream);
}

template <class Student, class Teacher>
int forward_of(Divergence divergence, const KdParams& a, void* stream) {
  switch (divergence) {
    case Divergence::none:
      return forward<Divergence::none, Student, None>(a, stream);
    case Divergence::forward_kl:
      return forward<Divergence::forward_kl, Student, Teacher>(a, stream);
    case Divergence::reverse_kl:
      return forward<Divergence::reverse_kl, Student, Teacher>(a, stream);
    case Divergence::cross_entropy:
      return forward<Divergence::cross_entropy, Student, Teacher>(a, stream);
  }
  return cudaErrorInvalidValue;
}

// 16-bit logits go with their own kind or with float32: the pairs that people have.
int forward_of(const KdArgs& args, const KdParams& a, void* stream) {
  const Type s = args.student.type;
  const Type t = args.divergence == Divergence::none ? s : args.teacher.type;
  const auto pair = [&](Type student, Type teacher) { return s == student && t == teacher; };
  const Divergence d = args.divergence;
  if (pair(Type::f32, Type::f32)) return forward_of<float, float>(d, a, stream);
  if (pair(Type::bf16, Type::bf16)) return forward_of<__nv_bfloat16, __nv_bfloat16>(d, a, stream);
  if (pair(Type::f16, Type::f16)) return forward_of<__half, __half>(d, a, stream);
  if (pair(Type::f32, Type::bf16)) return forward_of<float, __nv_bfloat16>(d, a, stream);
  if (pair(Type::bf16, Type::f32)) return forward_of<__nv_bfloat16, float>(d, a, stream);
  if (pair(Type::f32, Type::f16)) return forward_of<float, __half>(d, a, stream);
  if (pair(Type::f16, Type::f32)) return forward_of<__half, float>(d, a, stream);
  return cudaErrorInvalidValue;
}

// A quotient as float, within its finite range: 0 times it must be 0.
float to_finite(double x) { return static_cast<float>(std::min(x, static_cast<double>(FLT_MAX))); }

template <class E>
int scale(const ScaleArgs& args, void* stream) {
  constexpr int64_t kPiece = 8192;  // elements of a block: four chunks for each of 256 threads
  ScaleParams a{};
  a.in = args.in;
  a.out = args.out;
  // With one factor for all, the rows are one.
  const bool flat = args.uniform && args.grad_scale == nullptr;
  const int64_t rows = flat ? 1 : args.rows;
  a.cols = flat ? args.rows * args.cols : args.cols;
  a.piece = static_cast<int>(std::min(a.cols, kPiece));
  a.pieces_per_row = (a.cols + a.piece - 1) / a.piece;
  a.pieces = rows * a.pieces_per_row;
  a.grad_scale = args.grad_scale;
  a.grad_output = args.grad_output;
  a.grad_output_step = args.uniform ? 0 : 1;
  if (a.piece > kChunk * kWarp * 4) {
    return launch(scale_rows<E, Block>, a, a.pieces, 256, 0, stream);
  }
  return launch(scale_rows<E, Warp>, a, (a.pieces + 7) / 8, 8 * kWarp, 0, stream);
}

}  // namespace
}  // namespace fd

int fd_kd_forward(const fd::KdArgs* args, void* stream) {
  using namespace fd;
  if (args->rows == 0) return cudaSuccess;
  if (args->cols > INT32_MAX - 2 * kChunk) return cudaErrorInvalidValue;
  const double t = args->divergence == Divergence::none ? 1.0 : args->temperature;
  KdParams a{};
  a.student = args->student.data;
  a.teacher = args->teacher.data;
  a.grad = args->grad;
  a.student_outer = args->student.outer;
  a.student_step = args->student.step;
  a.teacher_outer = args->teacher.outer;
  a.teacher_step = args->teacher.step;
  a.rows = args->rows;
  a.inner = args->inner;
  a.cols = static_cast<int>(args->cols);
  a.labels = args->labels;
  a.row_scale = args->row_scale;
  a.exponent = to_finite(1.44269504088896340736 / t);
  a.inverse_t = to_finite(1.0 / t);
  a.soft_loss = static_cast<float>(args->scale_t2 ? t * t : 1.0);
  a.soft_grad = static_cast<float>(args->soft_weight * (args->scale_t2 ? t : 1.0 / t));
  a.hard_grad = args->labels == nullptr ? 0.f : static_cast<float>(args->hard_weight);
  a.smoothing = args->labels == nullptr ? 0.f : static_cast<float>(args->label_smoothing);
  a.separate = args->labels != nullptr && t != 1.0;
  a.grad_scale = args->grad_scale;
  a.hard = args->hard;
  a.soft = args->soft;
  return forward_of(*args, a, stream);
}

int fd_kd_scale(const fd::ScaleArgs* args, void* stream) {
  if (args->rows == 0 || args->cols == 0) return cudaSuccess;
  switch (args->type) {
    case fd::Type::f32:
      return fd::scale<float>(*args, stream);
    case fd::Type::bf16:
      return fd::scale<__nv_bfloat16>(*args, stream);
    case fd::Type::f16:
      return fd::scale<__half>(*args, stream);
  }
  return cudaErrorInvalidValue;
}
