// The kernels of kd: one instance of each way to keep a row, and of each element type.
#include <sys/mman.h>

#include "kd.cuh"
#include "probe.h"

namespace {

std::vector<double> softmax(const std::vector<double>& x, double t) {
  std::vector<double> p(x);
  double max = -INFINITY, sum = 0;
  for (double v : x) max = std::fmax(max, v);
  for (double& v : p) sum += v = std::exp((v - max) / t);
  for (double& v : p) v /= sum;
  return p;
}

// Rows of `cols`, the student's `offset` elements into its memory, so that with an offset it does
// not share the gradient's alignment. The last row is dropped, and the first row's label is no
// class.
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
  // Would overflow without the maximum of all of its chunk.
  student.data[offset + 7] = static_cast<Student>(300.f);
  Buffer<float> hard(rows), soft(rows), row_scale(rows), grad_scale(rows);
  std::unique_ptr<int64_t[]> labels(new int64_t[rows]);
  for (int r = 0; r < rows; r++) {
    labels[r] = r == 0 ? cols : (r * 37 + cols - 38) % cols;
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
    if (labels[r] == cols) {
      expect("a label that is no class", std::isnan(hard.data[r]), 1, 0);
    } else {
      expect(what, hard.data[r], dropped ? 0 : ce, 1e-5);
    }
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

// Offsets of rows that lie further apart than 32 bits can say, without the memory.
void far_rows() {
  const int64_t far = int64_t{1} << 33, r = (int64_t{1} << 32) + 13;
  fd::KdParams a{};
  a.student = a.teacher = a.grad = reinterpret_cast<char*>(far);
  a.student_outer = a.teacher_outer = far;
  a.student_step = a.teacher_step = far / 2;
  a.inner = int64_t{1} << 30;
  a.cols = 1 << 20;
  const fd::Row<float, __half> row(a, r);
  const auto offset = [&](const void* p) { return reinterpret_cast<intptr_t>(p) - far; };
  const int64_t start = 4 * far + 13 * (far / 2);
  expect("far student", offset(row.student) == start * 4, 1, 0);
  expect("far teacher", offset(row.teacher) == start * 2, 1, 0);
  expect("far gradient", offset(row.grad) == r * a.cols * 4, 1, 0);
}

// The same in a kernel: 16 elements of each row, in place; the memory between is never touched.
void far_scaling() {
  constexpr int64_t cols = (int64_t{1} << 31) + 8, bytes = (2 * cols + 16) * 2;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return expect("memory for far rows", 0, 1, 0);
  __half* const x = static_cast<__half*>(memory);
  Buffer<float> factor(3), scale(3);
  for (int r = 0; r < 3; r++) {
    factor.data[r] = 2.f + r;
    scale.data[r] = 0.5f;
    for (int i = 0; i < 16; i++) x[r * cols + i] = static_cast<__half>(1.f + i);
  }
  fd::ScaleParams a{};
  a.in = a.out = memory;
  a.cols = cols;
  a.piece = 16;
  a.pieces_per_row = 1;
  a.pieces = 3;
  a.grad_scale = scale.data.get();
  a.grad_output = factor.data.get();
  a.grad_output_step = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(3);
  config.blockDim = dim3(32);
  const int status = cudaLaunchKernelEx(&config, fd::scale_rows<__half, fd::Warp>, a);
  expect("far scaling", status, 0, 0);
  for (int r = 0; r < 3; r++) {
    for (int i = 0; i < 16; i++) {
      expect("far scaling", as_float(x[r * cols + i]), (1.f + i) * (1.f + r / 2.f), 5e-3);
    }
  }
  munmap(memory, bytes);
}

}  // namespace

int main() {
  using fd::Divergence;
  using bf16 = __nv_bfloat16;
  for (int offset : {0, 1}) {
    forward<Divergence::forward_kl, fd::InShared<bf16, bf16>>("shared", 3, 1301, offset, 3, 128);
    forward<Divergence::reverse_kl, fd::InMemory<float, float>>("memory", 3, 517, offset, 3, 64);
    forward<Divergence::forward_kl, fd::InRegisters<__half, float>>("registers", 3, 1010, offset, 1,
                                                                    128);
    forward<Divergence::none, fd::InShared<float, fd::None>>("hard", 2, 260, offset, 2, 64);
  }
  scaling<bf16, fd::Block>("scale", 3, 1101, 512, 64);
  scaling<__half, fd::Warp>("scale", 5, 21, 21, 64);
  far_rows();
  far_scaling();
  return failures == 0 ? 0 : 1;
}
