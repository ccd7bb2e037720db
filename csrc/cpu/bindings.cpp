#include "bindings.h"

#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace py = pybind11;

namespace fd {
namespace {

const Isa& isa() {
  const char* problem = nullptr;
  const Isa* found = active_isa(&problem);
  if (!found) throw std::runtime_error(problem);
  return *found;
}

py::list isas() {
  py::list names;
  for (int i = 0; i < isa_count(); i++)
    names.append(py::make_tuple(isa_at(i).name, isa_at(i).supported()));
  return names;
}

}  // namespace

const Kernels& active_kernels() { return *isa().kernels; }

}  // namespace fd

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastdistill: raw addresses in, nothing checked. Private.";
  fd::bind_kd(m);
  fd::bind_softmax(m);
  fd::bind_hint(m);
  fd::bind_privacy(m);
  fd::bind_products(m);
  fd::bind_bf16(m);
  fd::bind_bench(m);
  m.def("active_isa", [] { return std::string(fd::isa().name); });
  m.def("isas", &fd::isas, "[(name, supported by this processor)], the preferred one first");
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
