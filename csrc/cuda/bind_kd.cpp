#include "bindings.h"
#include "kd.h"

namespace py = pybind11;

namespace fd {
namespace {

void kd_forward(uintptr_t student, int student_type, int64_t student_outer, int64_t student_step,
                uintptr_t teacher, int teacher_type, int64_t teacher_outer, int64_t teacher_step,
                int64_t rows, int64_t cols, int64_t inner, uintptr_t labels, uintptr_t row_scale,
                double temperature, double hard_weight, double soft_weight, double label_smoothing,
                int divergence, bool scale_t2, uintptr_t grad, uintptr_t grad_scale, uintptr_t hard,
                uintptr_t soft, uintptr_t stream) {
  KdArgs args{};
  args.student = {pointer<void>(student), static_cast<Type>(student_type), student_outer,
                  student_step};
  args.teacher = {pointer<void>(teacher), static_cast<Type>(teacher_type), teacher_outer,
                  teacher_step};
  args.rows = rows;
  args.cols = cols;
  args.inner = inner;
  args.labels = pointer<int64_t>(labels);
  args.row_scale = pointer<float>(row_scale);
  args.temperature = temperature;
  args.hard_weight = hard_weight;
  args.soft_weight = soft_weight;
  args.label_smoothing = label_smoothing;
  args.divergence = static_cast<Divergence>(divergence);
  args.scale_t2 = scale_t2;
  args.grad = pointer<void>(grad);
  args.grad_scale = pointer<float>(grad_scale);
  args.hard = pointer<float>(hard);
  args.soft = pointer<float>(soft);
  int status;
  {
    py::gil_scoped_release release;
    status = fd_kd_forward(&args, pointer<void>(stream));
  }
  check("kd_loss", status);
}

void kd_scale(uintptr_t in, uintptr_t out, int type, int64_t rows, int64_t cols,
              uintptr_t grad_scale, uintptr_t grad_output, bool uniform, uintptr_t stream) {
  ScaleArgs args{};
  args.in = pointer<void>(in);
  args.out = pointer<void>(out);
  args.type = static_cast<Type>(type);
  args.rows = rows;
  args.cols = cols;
  args.grad_scale = pointer<float>(grad_scale);
  args.grad_output = pointer<float>(grad_output);
  args.uniform = uniform;
  int status;
  {
    py::gil_scoped_release release;
    status = fd_kd_scale(&args, pointer<void>(stream));
  }
  check("kd_loss backward", status);
}

}  // namespace

void bind_kd(py::module_& m) {
  m.def("kd_forward", &kd_forward, py::arg("student"), py::arg("student_type"),
        py::arg("student_outer"), py::arg("student_step"), py::arg("teacher"),
        py::arg("teacher_type"), py::arg("teacher_outer"), py::arg("teacher_step"), py::arg("rows"),
        py::arg("cols"), py::arg("inner"), py::arg("labels"), py::arg("row_scale"),
        py::arg("temperature"), py::arg("hard_weight"), py::arg("soft_weight"),
        py::arg("label_smoothing"), py::arg("divergence"), py::arg("scale_t2"), py::arg("grad"),
        py::arg("grad_scale"), py::arg("hard"), py::arg("soft"), py::arg("stream"));
  m.def("kd_scale", &kd_scale, py::arg("input"), py::arg("output"), py::arg("type"),
        py::arg("rows"), py::arg("cols"), py::arg("grad_scale"), py::arg("grad_output"),
        py::arg("uniform"), py::arg("stream"));
}

}  // namespace fd
