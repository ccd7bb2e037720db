#include "bindings.h"

#include <stdexcept>
#include <string>

#include "kd.h"

namespace py = pybind11;

namespace fd {

void check(const char* what, int status) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) +
                             ": the CUDA kernel did not start: " + fd_error_text(status));
  }
}

}  // namespace fd

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of fastdistill; private.";
  fd::bind_kd(m);
  fd::bind_softmax(m);
  fd::bind_hint(m);
  fd::bind_privacy(m);
}
