#include "bindings.h"
#include "hint.h"

namespace py = pybind11;

namespace fd {
namespace {

void hint_rows(uintptr_t student, int student_type, int64_t student_step, uintptr_t teacher,
               int teacher_type, int64_t teacher_step, int64_t rows, int64_t cols, uintptr_t bias,
               uintptr_t row_scale, int distance, int student_norm, int teacher_norm,
               uintptr_t grad, int grad_type, uintptr_t loss, uintptr_t stream) {
  HintArgs args{};
  args.student = pointer<void>(student);
  args.student_type = static_cast<Type>(student_type);
  args.student_step = student_step;
  args.teacher = pointer<void>(teacher);
  args.teacher_type = static_cast<Type>(teacher_type);
  args.teacher_step = teacher_step;
  args.rows = rows;
  args.cols = cols;
  args.bias = pointer<float>(bias);
  args.row_scale = pointer<float>(row_scale);
  args.distance = static_cast<Distance>(distance);
  args.student_norm = static_cast<FeatureNorm>(student_norm);
  args.teacher_norm = static_cast<FeatureNorm>(teacher_norm);
  args.grad = pointer<void>(grad);
  args.grad_type = static_cast<Type>(grad_type);
  args.loss = pointer<float>(loss);
  int status;
  {
    py::gil_scoped_release release;
    status = fd_hint_rows(&args, pointer<void>(stream));
  }
  check("hint_loss", status);
}

}  // namespace

void bind_hint(py::module_& m) {
  m.def("hint_rows", &hint_rows, py::arg("student"), py::arg("student_type"),
        py::arg("student_step"), py::arg("teacher"), py::arg("teacher_type"),
        py::arg("teacher_step"), py::arg("rows"), py::arg("cols"), py::arg("bias"),
        py::arg("row_scale"), py::arg("distance"), py::arg("student_norm"), py::arg("teacher_norm"),
        py::arg("grad"), py::arg("grad_type"), py::arg("loss"), py::arg("stream"));
}

}  // namespace fd
