#include "bindings.h"
#include "softmax.h"

namespace py = pybind11;

namespace fd {
namespace {

SoftmaxRows rows_of(uintptr_t x, int type, int64_t outer, int64_t step, int64_t rows, int64_t cols,
                    int64_t inner, uintptr_t temperature, const double* scalar, bool log) {
  SoftmaxRows a{};
  a.x = {pointer<void>(x), static_cast<Type>(type), outer, step};
  a.rows = rows;
  a.cols = cols;
  a.inner = inner;
  a.uniform = temperature == 0;
  a.temperature = a.uniform ? scalar : pointer<double>(temperature);
  a.log = log;
  return a;
}

void softmax_fwd(uintptr_t x, int type, int64_t x_outer, int64_t x_step, int64_t rows, int64_t cols,
                 int64_t inner, uintptr_t temperature, double scalar, bool log, uintptr_t y,
                 uintptr_t stats, bool stats_double, int threads) {
  SoftmaxArgs args{};
  args.of = rows_of(x, type, x_outer, x_step, rows, cols, inner, temperature, &scalar, log);
  args.y = pointer<void>(y);
  args.stats = pointer<void>(stats);
  args.stats_double = stats_double;
  const SoftmaxKernels& kernels = active_kernels().softmax;
  py::gil_scoped_release released;
  softmax_forward(kernels, args, threads);
}

void softmax_bwd(uintptr_t grad, int64_t grad_outer, int64_t grad_step, uintptr_t x, int type,
                 int64_t x_outer, int64_t x_step, int64_t rows, int64_t cols, int64_t inner,
                 uintptr_t temperature, double scalar, bool log, uintptr_t stats, bool stats_double,
                 uintptr_t grad_x, uintptr_t grad_temperature, int threads) {
  SoftmaxGradArgs args{};
  args.of = rows_of(x, type, x_outer, x_step, rows, cols, inner, temperature, &scalar, log);
  args.grad = {pointer<void>(grad), static_cast<Type>(type), grad_outer, grad_step};
  args.stats = pointer<void>(stats);
  args.stats_double = stats_double;
  args.grad_x = pointer<void>(grad_x);
  args.grad_temperature = pointer<void>(grad_temperature);
  const SoftmaxKernels& kernels = active_kernels().softmax;
  py::gil_scoped_release released;
  softmax_backward(kernels, args, threads);
}

}  // namespace

void bind_softmax(py::module_& m) {
  m.def("softmax_fwd", &softmax_fwd);
  m.def("softmax_bwd", &softmax_bwd);
}

}  // namespace fd
