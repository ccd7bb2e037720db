#include "bindings.h"
#include "kd_call.h"

namespace py = pybind11;

namespace fd {
namespace {

py::tuple kd_fwd(uintptr_t student, int student_type, int64_t s_outer, int64_t s_step,
                 uintptr_t teacher, int teacher_type, int64_t t_outer, int64_t t_step, int64_t rows,
                 int64_t cols, int64_t inner, uintptr_t labels, uintptr_t mask,
                 uintptr_t row_weight, double temperature, double hard_weight, double soft_weight,
                 int divergence, bool scale_t2, int64_t ignore_index, double label_smoothing,
                 int reduction, double divisor, uintptr_t loss, uintptr_t hard, uintptr_t soft,
                 bool out_double, uintptr_t grad, int64_t grad_item_bytes, uintptr_t grad_scale,
                 int threads) {
  KdCall call{};
  KdArgs& a = call.args;
  a.student = {pointer<void>(student), static_cast<Type>(student_type), s_outer, s_step};
  a.teacher = {pointer<void>(teacher), static_cast<Type>(teacher_type), t_outer, t_step};
  a.rows = rows;
  a.cols = cols;
  a.inner = inner;
  a.labels = pointer<int64_t>(labels);
  a.temperature = temperature;
  a.hard_weight = hard_weight;
  a.soft_weight = soft_weight;
  a.label_smoothing = label_smoothing;
  a.divergence = static_cast<Divergence>(divergence);
  a.scale_t2 = scale_t2;
  a.grad = pointer<void>(grad);
  a.grad_scale = pointer<float>(grad_scale);
  call.mask = pointer<bool>(mask);
  call.row_weight = pointer<double>(row_weight);
  call.ignore_index = ignore_index;
  call.reduction = static_cast<Reduction>(reduction);
  call.divisor = divisor;
  call.loss = pointer<void>(loss);
  call.hard = pointer<void>(hard);
  call.soft = pointer<void>(soft);
  call.out_double = out_double;
  call.grad_item_bytes = grad_item_bytes;
  call.threads = threads;
  const KdKernels& kernels = active_kernels().kd;
  KdStatus status;
  {
    py::gil_scoped_release released;
    status = kd_forward(kernels, call);
  }
  return py::make_tuple(static_cast<int>(status.error), status.value);
}

void kd_scale_(uintptr_t in, uintptr_t out, int type, int64_t rows, int64_t cols,
               uintptr_t grad_scale, uintptr_t grad_output, bool grad_output_double,
               int64_t grad_output_stride, int64_t item_bytes, int threads) {
  KdScaleCall call{};
  call.args = {
      pointer<void>(in), pointer<void>(out), static_cast<Type>(type), rows, cols, nullptr, false};
  call.grad_scale = pointer<float>(grad_scale);
  call.grad_output = pointer<void>(grad_output);
  call.grad_output_double = grad_output_double;
  call.grad_output_stride = grad_output_stride;
  call.item_bytes = item_bytes;
  call.threads = threads;
  const KdKernels& kernels = active_kernels().kd;
  py::gil_scoped_release released;
  fd::kd_scale(kernels, call);
}

}  // namespace

void bind_kd(py::module_& m) {
  m.def("kd_fwd", &kd_fwd);
  m.def("kd_scale", &kd_scale_);
}

}  // namespace fd
