#include <pybind11/stl.h>

#include <array>

#include "bindings.h"

namespace py = pybind11;

namespace fd {
namespace {

void linear_products_(bool in_double, uintptr_t a, int64_t a_sample, int64_t a_row, uintptr_t g,
                      int64_t g_sample, int64_t g_row, int64_t samples, int64_t rows,
                      int64_t inputs, int64_t outputs, uintptr_t made, uintptr_t square,
                      int threads) {
  LinearProducts call{};
  call.in_double = in_double;
  call.a = pointer<void>(a);
  call.a_sample = a_sample;
  call.a_row = a_row;
  call.g = pointer<void>(g);
  call.g_sample = g_sample;
  call.g_row = g_row;
  call.samples = samples;
  call.rows = rows;
  call.inputs = inputs;
  call.outputs = outputs;
  call.made = pointer<void>(made);
  call.square = pointer<double>(square);
  const ProductKernels& kernels = active_kernels().products;
  py::gil_scoped_release released;
  linear_products(kernels, call, threads);
}

using Pair = std::array<int64_t, 2>;

void convolution_products_(bool in_double, uintptr_t x, uintptr_t g, int64_t samples,
                           int64_t groups, int64_t channels, int64_t outputs, const Pair& in,
                           const Pair& out, const Pair& kernel, const Pair& stride,
                           const Pair& dilation, const Pair& padding, uintptr_t made,
                           uintptr_t square, int threads) {
  ConvolutionProducts call{};
  call.in_double = in_double;
  call.x = pointer<void>(x);
  call.g = pointer<void>(g);
  call.samples = samples;
  call.groups = groups;
  call.channels = channels;
  call.outputs = outputs;
  for (size_t i = 0; i < 2; i++) {
    call.in[i] = in[i];
    call.out[i] = out[i];
    call.kernel[i] = kernel[i];
    call.stride[i] = stride[i];
    call.dilation[i] = dilation[i];
    call.padding[i] = padding[i];
  }
  call.made = pointer<void>(made);
  call.square = pointer<double>(square);
  const ProductKernels& kernels = active_kernels().products;
  py::gil_scoped_release released;
  convolution_products(kernels, call, threads);
}

void weighted_sum_(bool in_double, uintptr_t x, uintptr_t factor, int64_t samples, int64_t size,
                   uintptr_t sum, int threads) {
  const WeightedSum call = {in_double, pointer<void>(x),  pointer<double>(factor), samples,
                            size,      pointer<void>(sum)};
  const ProductKernels& kernels = active_kernels().products;
  py::gil_scoped_release released;
  weighted_sum(kernels, call, threads);
}

void norm_sums_(bool in_double, uintptr_t x, uintptr_t g, uintptr_t mean, uintptr_t rstd,
                int64_t samples, int64_t rows, int64_t cols, int64_t groups, uintptr_t weight,
                uintptr_t bias, int threads) {
  const NormSums call = {in_double,
                         pointer<void>(x),
                         pointer<void>(g),
                         pointer<void>(mean),
                         pointer<void>(rstd),
                         samples,
                         rows,
                         cols,
                         groups,
                         pointer<void>(weight),
                         pointer<void>(bias)};
  const NormKernels& kernels = active_kernels().norms;
  py::gil_scoped_release released;
  norm_sums(kernels, call, threads);
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("linear_products", &linear_products_);
  m.def("convolution_products", &convolution_products_);
  m.def("weighted_sum", &weighted_sum_);
  m.def("norm_sums", &norm_sums_);
}

}  // namespace fd
