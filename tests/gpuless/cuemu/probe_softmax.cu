// The kernels of softmax: a warp and a block for a row, each element type, both functions.
#include "probe.h"
#include "softmax.cuh"

namespace {

// Forward and backward on rows of `cols`, with an offset padded ones that lie `offset` elements
// into their memory, so that they do not share the output's alignment. The first class is masked;
// the last row's T is NaN.
template <class E, class Group, bool LOG>
void softmax(const char* what, int rows, int cols, int offset, unsigned blocks, unsigned threads,
             bool learned) {
  const int pitch = cols + 3 * offset;
  const size_t n = static_cast<size_t>(rows - 1) * pitch + cols, out = size_t(rows) * cols;
  Buffer<E> x(n + offset), grad(n), y(out), grad_x(out);
  x.randomize(n + offset);
  grad.randomize(n);
  for (int r = 0; r < rows; r++) x.data[offset + r * pitch] = static_cast<E>(-INFINITY);
  x.data[offset + 7] = static_cast<E>(300.f);  // would overflow without the maximum of all
  Buffer<float> stats(2 * rows), temperature(rows), grad_temperature(rows);
  for (int r = 0; r < rows; r++) temperature.data[r] = learned && r + 1 == rows ? NAN : 2.f + r;

  fd::SoftmaxParams a{};
  a.x = x.data.get() + offset;
  a.grad = grad.data.get();
  a.out = y.data.get();
  a.x_step = a.grad_step = pitch;
  a.rows = a.inner = rows;
  a.cols = cols;
  a.temperature = learned ? temperature.data.get() : nullptr;
  a.inverse = 0.4f;
  a.stats = stats.data.get();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  expect(what, cudaLaunchKernelEx(&config, fd::softmax_forward<E, Group, LOG>, a), 0, 0);
  a.out = grad_x.data.get();
  a.grad_temperature = learned ? grad_temperature.data.get() : nullptr;
  expect(what, cudaLaunchKernelEx(&config, fd::softmax_backward<E, Group, LOG>, a), 0, 0);

  for (int r = 0; r < rows; r++) {
    const double t = learned ? static_cast<double>(temperature.data[r]) : 2.5;
    const auto of = [&](const Buffer<E>& b, int i, int shift) {
      return static_cast<double>(as_float(b.data[shift + static_cast<size_t>(r) * pitch + i]));
    };
    double max = -INFINITY, sum = 0, along = 0, moment = 0;
    for (int i = 0; i < cols; i++) max = std::fmax(max, of(x, i, offset));
    for (int i = 0; i < cols; i++) sum += std::exp((of(x, i, offset) - max) / t);
    const auto p = [&](int i) { return std::exp((of(x, i, offset) - max) / t) / sum; };
    for (int i = 0; i < cols; i++) along += LOG ? of(grad, i, 0) : of(grad, i, 0) * p(i);
    for (int i = 0; i < cols; i++) {
      const double g = of(grad, i, 0), slope = LOG ? g - p(i) * along : p(i) * (g - along);
      const double want = LOG ? (of(x, i, offset) - max) / t - std::log(sum) : p(i);
      const double got = as_float(y.data[static_cast<size_t>(r) * cols + i]);
      const double got_x = as_float(grad_x.data[static_cast<size_t>(r) * cols + i]);
      if (i > 0) moment += slope * (of(x, i, offset) - max);
      if (std::isnan(t)) {
        expect("a row with a bad T", std::isnan(got) && std::isnan(got_x), 1, 0);
      } else {
        if (LOG && i == 0) {
          expect("a masked class", std::isinf(got), 1, 0);
        } else {
          expect(what, got, want, Tolerance<E>::value);
        }
        expect(what, got_x, slope / t, 4 * Tolerance<E>::value);
      }
    }
    if (learned && !std::isnan(t)) {
      expect("gradient of T", grad_temperature.data[r], -moment / (t * t), 1e-4);
    }
  }
}

// Offsets of rows that lie further apart than 32 bits can say, without the memory.
void far_rows() {
  const int64_t far = int64_t{1} << 33, r = (int64_t{1} << 32) + 13;
  fd::SoftmaxParams a{};
  a.x = a.grad = a.out = reinterpret_cast<char*>(far);
  a.x_outer = a.grad_outer = far;
  a.x_step = a.grad_step = far / 2;
  a.inner = int64_t{1} << 30;
  a.cols = 1 << 20;
  const fd::SoftmaxRow<__half> row(a, r);
  const auto offset = [&](const void* p) { return reinterpret_cast<intptr_t>(p) - far; };
  const int64_t start = 4 * far + 13 * (far / 2);
  expect("far x", offset(row.x) == start * 2, 1, 0);
  expect("far gradient", offset(row.grad) == start * 2, 1, 0);
  expect("far output", offset(row.out) == r * a.cols * 2, 1, 0);
}

}  // namespace

int main() {
  using bf16 = __nv_bfloat16;
  for (int offset : {0, 1}) {
    softmax<bf16, fd::Block, false>("softmax", 3, 1301, offset, 3, 128, true);
    softmax<float, fd::Block, true>("log", 2, 517, offset, 2, 64, true);
    softmax<__half, fd::Warp, true>("log of a warp", 3, 260, offset, 1, 128, false);
    softmax<float, fd::Warp, false>("a warp", 5, 21, offset, 2, 128, true);
  }
  far_rows();
  return failures == 0 ? 0 : 1;
}
