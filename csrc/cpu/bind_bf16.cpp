#include "bf16.h"
#include "bindings.h"

namespace py = pybind11;

namespace fd {
namespace {

Bf16Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t step) {
  return {pointer<uint16_t>(data), rows, cols, step};
}

void product(uintptr_t a, int64_t a_step, uintptr_t b, int64_t b_step, bool b_transposed,
             uintptr_t c, int64_t c_step, bool c_bf16, int64_t m, int64_t n, int64_t k, float alpha,
             int threads) {
  const Bf16Product f{matrix(a, m, k, a_step),
                      b_transposed ? matrix(b, n, k, b_step) : matrix(b, k, n, b_step),
                      b_transposed,
                      n,
                      pointer<void>(c),
                      c_step,
                      c_bf16,
                      alpha};
  py::gil_scoped_release released;
  bf16_product(*bf16_kernels(), f, threads);
}

void add_product(uintptr_t a, int64_t a_step, uintptr_t b, int64_t b_step, uintptr_t packed,
                 uintptr_t c, int64_t c_step, int64_t m, int64_t n, int64_t k, int threads) {
  const Bf16Sum f{matrix(a, k, m, a_step), matrix(b, k, n, b_step), pointer<uint32_t>(packed),
                  pointer<float>(c), c_step};
  py::gil_scoped_release released;
  bf16_add_product(*bf16_kernels(), f, threads);
}

}  // namespace

void bind_bf16(py::module_& m) {
  m.def("has_bf16", [] { return bf16_kernels() != nullptr; });
  m.def("has_bf16_tiles", &has_bf16_tiles);
  m.def("bf16_product", &product);
  m.def("bf16_add_product", &add_product);
  m.def("bf16_packed_words", &bf16_packed_words);
}

}  // namespace fd
