#include "bindings.h"
#include "softmax.h"

namespace py = pybind11;

namespace fd {
namespace {

SoftmaxArgs arguments(uintptr_t x, int type, int64_t x_outer, int64_t x_step, int64_t rows,
                      int64_t cols, int64_t inner, uintptr_t temperature, double scalar, bool log,
                      uintptr_t stats) {
  SoftmaxArgs args{};
  args.x = {pointer<void>(x), static_cast<Type>(type), x_outer, x_step};
  args.rows = rows;
  args.cols = cols;
  args.inner = inner;
  args.temperature = pointer<float>(temperature);
  args.scalar = scalar;
  args.log = log;
  args.stats = pointer<float>(stats);
  return args;
}

void softmax_forward(uintptr_t x, int type, int64_t x_outer, int64_t x_step, int64_t rows,
                     int64_t cols, int64_t inner, uintptr_t temperature, double scalar, bool log,
                     uintptr_t y, uintptr_t stats, uintptr_t stream) {
  SoftmaxArgs args =
      arguments(x, type, x_outer, x_step, rows, cols, inner, temperature, scalar, log, stats);
  args.y = pointer<void>(y);
  int status;
  {
    py::gil_scoped_release release;
    status = fd_softmax_forward(&args, pointer<void>(stream));
  }
  check("temperature_softmax", status);
}

void softmax_backward(uintptr_t grad, int64_t grad_outer, int64_t grad_step, uintptr_t x, int type,
                      int64_t x_outer, int64_t x_step, int64_t rows, int64_t cols, int64_t inner,
                      uintptr_t temperature, double scalar, bool log, uintptr_t stats,
                      uintptr_t grad_x, uintptr_t grad_temperature, uintptr_t stream) {
  SoftmaxGradArgs args{};
  args.of = arguments(x, type, x_outer, x_step, rows, cols, inner, temperature, scalar, log, stats);
  args.grad = {pointer<void>(grad), static_cast<Type>(type), grad_outer, grad_step};
  args.grad_x = pointer<void>(grad_x);
  args.grad_temperature = pointer<float>(grad_temperature);
  int status;
  {
    py::gil_scoped_release release;
    status = fd_softmax_backward(&args, pointer<void>(stream));
  }
  check("temperature_softmax backward", status);
}

}  // namespace

void bind_softmax(py::module_& m) {
  m.def("softmax_forward", &softmax_forward, py::arg("x"), py::arg("type"), py::arg("x_outer"),
        py::arg("x_step"), py::arg("rows"), py::arg("cols"), py::arg("inner"),
        py::arg("temperature"), py::arg("scalar"), py::arg("log"), py::arg("y"), py::arg("stats"),
        py::arg("stream"));
  m.def("softmax_backward", &softmax_backward, py::arg("grad"), py::arg("grad_outer"),
        py::arg("grad_step"), py::arg("x"), py::arg("type"), py::arg("x_outer"), py::arg("x_step"),
        py::arg("rows"), py::arg("cols"), py::arg("inner"), py::arg("temperature"),
        py::arg("scalar"), py::arg("log"), py::arg("stats"), py::arg("grad_x"),
        py::arg("grad_temperature"), py::arg("stream"));
}

}  // namespace fd
