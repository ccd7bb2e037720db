// The launcher of the hint kernels: which kernel takes a call.
#include <cuda_runtime_api.h>

#include "hint.cuh"

namespace fd {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpCols = 1024;  // up to here a warp has four chunks for each lane

int launch(void (*kernel)(HintArgs), const HintArgs& a, int64_t blocks, void* stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <Distance D, class Student, class Teacher, class Grad>
int run(const HintArgs& a, void* stream) {
  if (a.cols <= kWarpCols) {
    constexpr int kRows = kThreads / kWarp;
    return launch(hint_rows<D, Student, Teacher, Grad, Warp>, a, (a.rows + kRows - 1) / kRows,
                  stream);
  }
  return launch(hint_rows<D, Student, Teacher, Grad, Block>, a, a.rows, stream);
}

template <class Student, class Teacher, class Grad>
int by_distance(const HintArgs& a, void* stream) {
  switch (a.distance) {
    case Distance::mse:
      return run<Distance::mse, Student, Teacher, Grad>(a, stream);
    case Distance::l1:
      return run<Distance::l1, Student, Teacher, Grad>(a, stream);
    case Distance::smooth_l1:
      return run<Distance::smooth_l1, Student, Teacher, Grad>(a, stream);
    case Distance::cosine:
      return run<Distance::cosine, Student, Teacher, Grad>(a, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Student, class Grad>
int by_teacher(const HintArgs& a, void* stream) {
  switch (a.teacher_type) {
    case Type::f32:
      return by_distance<Student, float, Grad>(a, stream);
    case Type::bf16:
      return by_distance<Student, __nv_bfloat16, Grad>(a, stream);
    case Type::f16:
      return by_distance<Student, __half, Grad>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fd

// The gradient has the student's type, or a 16-bit one where the student is a projection in float.
int fd_hint_rows(const fd::HintArgs* args, void* stream) {
  using namespace fd;
  const HintArgs& a = *args;
  if (a.rows == 0) return cudaSuccess;
  if (a.cols > INT32_MAX - 2 * kChunk) return cudaErrorInvalidValue;
  const Type grad = a.grad == nullptr ? a.student_type : a.grad_type;
  switch (a.student_type) {
    case Type::f32:
      if (grad == Type::f32) return by_teacher<float, float>(a, stream);
      if (grad == Type::bf16) return by_teacher<float, __nv_bfloat16>(a, stream);
      return by_teacher<float, __half>(a, stream);
    case Type::bf16:
      if (grad == Type::bf16) return by_teacher<__nv_bfloat16, __nv_bfloat16>(a, stream);
      break;
    case Type::f16:
      if (grad == Type::f16) return by_teacher<__half, __half>(a, stream);
      break;
  }
  return cudaErrorInvalidValue;
}
