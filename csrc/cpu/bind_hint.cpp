#include "bindings.h"

namespace py = pybind11;

namespace fd {
namespace {

void hint_rows_(uintptr_t student, int student_type, int64_t s_outer, int64_t s_step,
                int64_t s_inner, uintptr_t teacher, int teacher_type, int64_t t_outer,
                int64_t t_step, int64_t t_inner, int64_t rows, int64_t cols, int64_t first,
                uintptr_t at, bool teacher_in_block, bool in_double, uintptr_t bias,
                uintptr_t row_scale, double uniform, int distance, int student_norm,
                int teacher_norm, uintptr_t grad, int grad_type, int64_t grad_step,
                uintptr_t bias_grad, uintptr_t loss, int threads) {
  HintArgs a{};
  a.student = {pointer<void>(student), static_cast<Type>(student_type), s_outer, s_step};
  a.teacher = {pointer<void>(teacher), static_cast<Type>(teacher_type), t_outer, t_step};
  a.rows = rows;
  a.cols = cols;
  a.student_inner = s_inner;
  a.teacher_inner = t_inner;
  a.first = first;
  a.at = pointer<int64_t>(at);
  a.teacher_in_block = teacher_in_block;
  a.in_double = in_double;
  a.bias = pointer<void>(bias);
  a.row_scale = pointer<double>(row_scale);
  a.uniform = uniform;
  a.distance = static_cast<Distance>(distance);
  a.student_norm = static_cast<FeatureNorm>(student_norm);
  a.teacher_norm = static_cast<FeatureNorm>(teacher_norm);
  a.grad = pointer<void>(grad);
  a.grad_type = static_cast<Type>(grad_type);
  a.grad_step = grad_step;
  a.bias_grad = pointer<void>(bias_grad);
  a.loss = pointer<double>(loss);
  const HintKernels& kernels = active_kernels().hint;
  py::gil_scoped_release released;
  hint_rows(kernels, a, threads);
}

}  // namespace

void bind_hint(py::module_& m) {
  m.def("hint_rows", &hint_rows_);
  m.attr("hint_bias_rows") = kBiasRows;
}

}  // namespace fd
