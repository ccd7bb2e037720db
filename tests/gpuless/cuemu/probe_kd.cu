// One kernel of each kind on small rows, against plain loops in double: quick to build, for
// sanitizers, mutants and the inspection of compiled code. Exits with 1 where a value is wrong.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kd.cuh"

namespace {

int failures = 0;

float as_float(float x) { return x; }
float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
float as_float(__half x) { return __half2float(x); }

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

void expect(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
  if (failures++ < 5) fprintf(stderr, "probe: %s: got %g, expected %g\n", what, got, want);
}

std::vector<double> softmax(const std::vector<double>& x, double t) {
  std::vector<double> p(x);
  double max = -INFINITY, sum = 0;
  for (double v : x) max = std::fmax(max, v);
  for (double& v : p) sum += v = std::exp((v - max) / t);
  for (double& v : p) v /= sum;
  return p;
}

// Rows of `cols`, the student's `offset` elements into its memory, so that with an offset it does
// not share the gradient's alignment. The last row is dropped.
template <fd::Divergence D, class Store>
void forward(const char* what, int rows, int cols, int offset, unsigned blocks, unsigned threads) {
  using Student = typename Store::Student;
  using Teacher = std::conditional_t<std::is_same_v<typename Store::Teacher, fd::None>, float,
                                     typename Store::Teacher>;
  constexpr bool kSoft = D != fd::Divergence::none;
  constexpr bool kReverse = D == fd::Divergence::reverse_kl;
  constexpr double t = 2, eps = 0.1;
  const size_t n = static_cast<size_t>(rows) * cols;
  Buffer<Student> student(n + offset), grad(n);
  Buffer<Teacher> teacher(n);
  student.randomize(n + offset);
  teacher.randomize(n);
  Buffer<float> hard(rows), soft(rows), row_scale(rows), grad_scale(rows);
  std::unique_ptr<int64_t[]> labels(new int64_t[rows]);
  for (int r = 0; r < rows; r++) {
    labels[r] = (r * 37 + cols - 1) % cols;
    row_scale.data[r] = r + 1 == rows ? 0.f : 0.5f + r;
  }

  fd::KdParams a{};
  a.student = student.data.get() + offset;
  a.teacher = teacher.data.get();
  a.grad = grad.data.get();
  a.student_step = a.teacher_step = cols;
  a.rows = a.inner = rows;
  a.cols = cols;
  a.labels = labels.get();
  a.row_scale = row_scale.data.get();
  const double at = kSoft ? t : 1;
  a.exponent = static_cast<float>(1.4426950408889634 / at);
  a.inverse_t = static_cast<float>(1 / at);
  a.soft_loss = 1;
  a.soft_grad = kSoft ? static_cast<float>(1 / at) : 0.f;
  a.hard_grad = 1;
  a.smoothing = static_cast<float>(eps);
  a.separate = kSoft;
  a.grad_scale = grad_scale.data.get();
  a.hard = hard.data.get();
  a.soft = soft.data.get();

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  const size_t chunks = (cols + 2 * (fd::kChunk - 1)) / fd::kChunk;
  config.dynamicSmemBytes =
      chunks * 16 * (fd::Chunk<Student>::kVectors + fd::Chunk<typename Store::Teacher>::kVectors);
  const int status = cudaLaunchKernelEx(&config, fd::kd_forward<D, Store>, a);
  expect(what, status, 0, 0);

  for (int r = 0; r < rows; r++) {
    std::vector<double> s(cols), u(cols);
    for (int i = 0; i < cols; i++) {
      s[i] = as_float(student.data[offset + static_cast<size_t>(r) * cols + i]);
      u[i] = as_float(teacher.data[static_cast<size_t>(r) * cols + i]);
    }
    const std::vector<double> q = softmax(s, t), p = softmax(u, t), q1 = softmax(s, 1);
    double kl = 0, reverse = 0, ce = 0;
    for (int i = 0; i < cols; i++) {
      kl += p[i] * std::log(p[i] / q[i]);
      reverse += q[i] * std::log(q[i] / p[i]);
      ce -= ((labels[r] == i ? 1 - eps : 0) + eps / cols) * std::log(q1[i]);
    }
    const double scale = row_scale.data[r];
    const double stored =
        std::is_same_v<Student, __half> ? static_cast<double>(grad_scale.data[r]) : 1;
    const bool dropped = scale == 0;
    expect(what, hard.data[r], dropped ? 0 : ce, 1e-5);
    if (kSoft) expect(what, soft.data[r], dropped ? 0 : kReverse ? reverse : kl, 1e-5);
    for (int i = 0; i < cols; i++) {
      const double of_soft = kReverse ? q[i] * (std::log(q[i] / p[i]) - reverse) : q[i] - p[i];
      const double of_hard = q1[i] - eps / cols - (labels[r] == i ? 1 - eps : 0);
      const double want = ((kSoft ? of_soft / t : 0) + of_hard) * scale;
      expect(what, as_float(grad.data[static_cast<size_t>(r) * cols + i]) * stored, want,
             Tolerance<Student>::value);
    }
  }
}

template <class E, class Group>
void scaling(const char* what, int rows, int cols, int piece, unsigned threads) {
  const size_t n = static_cast<size_t>(rows) * cols;
  Buffer<E> in(n), out(n);
  in.randomize(n);
  Buffer<float> factor(rows);
  factor.randomize(rows);
  fd::ScaleParams a{};
  a.in = in.data.get();
  a.out = out.data.get();
  a.cols = cols;
  a.piece = piece;
  a.pieces_per_row = (cols + piece - 1) / piece;
  a.pieces = rows * a.pieces_per_row;
  a.grad_output = factor.data.get();
  a.grad_output_step = 1;
  cudaLaunchConfig_t config{};
  const unsigned groups = std::is_same_v<Group, fd::Warp> ? threads / 32 : 1;
  config.gridDim = dim3((static_cast<unsigned>(a.pieces) + groups - 1) / groups);
  config.blockDim = dim3(threads);
  const int status = cudaLaunchKernelEx(&config, fd::scale_rows<E, Group>, a);
  expect(what, status, 0, 0);
  for (size_t i = 0; i < n; i++) {
    expect(what, as_float(out.data[i]), as_float(in.data[i]) * factor.data[i / cols],
           Tolerance<E>::value);
  }
}

}  // namespace

int main() {
  using fd::Divergence;
  using bf16 = __nv_bfloat16;
  for (int offset : {0, 1}) {
    forward<Divergence::forward_kl, fd::InShared<bf16, bf16>>("shared", 3, 1301, offset, 3, 128);
    forward<Divergence::reverse_kl, fd::InMemory<float, float>>("memory", 3, 517, offset, 3, 64);
    forward<Divergence::forward_kl, fd::InRegisters<__half, float>>("registers", 3, 301, offset, 1,
                                                                    128);
    forward<Divergence::none, fd::InShared<float, fd::None>>("hard", 2, 260, offset, 2, 64);
  }
  scaling<bf16, fd::Block>("scale", 3, 1101, 512, 64);
  scaling<__half, fd::Warp>("scale", 5, 21, 21, 64);
  return failures == 0 ? 0 : 1;
}
