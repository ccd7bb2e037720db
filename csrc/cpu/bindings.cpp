// The only file of the CPU module that knows Python: integers become pointers, no torch.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kd_call.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const fd::Isa& isa() {
  const char* problem = nullptr;
  const fd::Isa* found = fd::active_isa(&problem);
  if (!found) throw std::runtime_error(problem);
  return *found;
}

py::tuple kd_fwd(uintptr_t student, int student_type, int64_t s_outer, int64_t s_step,
                 uintptr_t teacher, int teacher_type, int64_t t_outer, int64_t t_step, int64_t rows,
                 int64_t cols, int64_t inner, uintptr_t labels, uintptr_t mask,
                 uintptr_t row_weight, double temperature, double hard_weight, double soft_weight,
                 int divergence, bool scale_t2, int64_t ignore_index, double label_smoothing,
                 int reduction, double divisor, uintptr_t loss, uintptr_t hard, uintptr_t soft,
                 bool out_double, uintptr_t grad, int64_t grad_item_bytes, uintptr_t grad_scale,
                 int threads) {
  fd::KdCall call{};
  fd::KdArgs& a = call.args;
  a.student = {pointer<void>(student), static_cast<fd::Type>(student_type), s_outer, s_step};
  a.teacher = {pointer<void>(teacher), static_cast<fd::Type>(teacher_type), t_outer, t_step};
  a.rows = rows;
  a.cols = cols;
  a.inner = inner;
  a.labels = pointer<int64_t>(labels);
  a.temperature = temperature;
  a.hard_weight = hard_weight;
  a.soft_weight = soft_weight;
  a.label_smoothing = label_smoothing;
  a.divergence = static_cast<fd::Divergence>(divergence);
  a.scale_t2 = scale_t2;
  a.grad = pointer<void>(grad);
  a.grad_scale = pointer<float>(grad_scale);
  call.mask = pointer<bool>(mask);
  call.row_weight = pointer<double>(row_weight);
  call.ignore_index = ignore_index;
  call.reduction = static_cast<fd::Reduction>(reduction);
  call.divisor = divisor;
  call.loss = pointer<void>(loss);
  call.hard = pointer<void>(hard);
  call.soft = pointer<void>(soft);
  call.out_double = out_double;
  call.grad_item_bytes = grad_item_bytes;
  call.threads = threads;
  const fd::KdKernels& kernels = *isa().kd;
  fd::KdStatus status;
  {
    py::gil_scoped_release released;
    status = fd::kd_forward(kernels, call);
  }
  return py::make_tuple(static_cast<int>(status.error), status.value);
}

void kd_scale(uintptr_t in, uintptr_t out, int type, int64_t rows, int64_t cols,
              uintptr_t grad_scale, uintptr_t grad_output, bool grad_output_double,
              int64_t grad_output_stride, int64_t item_bytes, int threads) {
  fd::KdScaleCall call{};
  call.args = {pointer<void>(in),
               pointer<void>(out),
               static_cast<fd::Type>(type),
               rows,
               cols,
               nullptr,
               false};
  call.grad_scale = pointer<float>(grad_scale);
  call.grad_output = pointer<void>(grad_output);
  call.grad_output_double = grad_output_double;
  call.grad_output_stride = grad_output_stride;
  call.item_bytes = item_bytes;
  call.threads = threads;
  const fd::KdKernels& kernels = *isa().kd;
  py::gil_scoped_release released;
  fd::kd_scale(kernels, call);
}

// For bench/: `repeats` rounds of n exponentials over a block that stays in L1, over the threads.
float exp_loop(int64_t n, int64_t repeats, int threads) {
  const fd::KdKernels& kernels = *isa().kd;
  py::gil_scoped_release released;
  constexpr int64_t most = 4096;  // x and e in half of an L1 of 64 KB
  n = std::min(std::max<int64_t>(n / 16 * 16, 16), most);
  std::vector<float> sums(static_cast<size_t>(threads) * 16);  // a cache line each
  fd::parallel_chunks(repeats, 1, threads, [&](int thread, int64_t begin, int64_t end) {
    alignas(64) float x[most], e[most];
    for (int64_t i = 0; i < n; i++) x[i] = -static_cast<float>(i % 64) / 8;
    sums[static_cast<size_t>(thread) * 16] += kernels.exp_loop(x, e, n, end - begin);
  });
  float sum = 0;
  for (const float s : sums) sum += s;
  return sum;
}

// For bench/: the traffic of a fused loss, into huge pages where kd_fwd asks for them.
void copy_limit(uintptr_t student, uintptr_t teacher, uintptr_t out, int64_t bytes, int threads,
                bool stream) {
  const fd::KdKernels& kernels = *isa().kd;
  py::gil_scoped_release released;
  constexpr int64_t unit = 4096;
  if (bytes >= 4 << 20) fd::advise_huge_pages(pointer<void>(out), bytes);
  const int64_t units = (bytes + unit - 1) / unit;
  fd::parallel_chunks(units, 1, threads, [&](int, int64_t begin, int64_t end) {
    const int64_t first = begin * unit, last = std::min(end * unit, bytes);
    kernels.read_read_write(pointer<char>(student) + first, pointer<char>(teacher) + first,
                            pointer<char>(out) + first, last - first, stream);
  });
}

py::list isas() {
  py::list names;
  for (int i = 0; i < fd::isa_count(); i++)
    names.append(py::make_tuple(fd::isa_at(i).name, fd::isa_at(i).supported()));
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastdistill: raw addresses in, nothing checked. Private.";
  m.def("kd_fwd", &kd_fwd);
  m.def("kd_scale", &kd_scale);
  m.def("exp_loop", &exp_loop);
  m.def("copy_limit", &copy_limit);
  m.def("active_isa", [] { return std::string(isa().name); });
  m.def("isas", &isas, "[(name, supported by this processor)], the preferred one first");
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
