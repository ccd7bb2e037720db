// The bind_*.cpp files and bindings.cpp are all of the CPU module that knows Python: integers
// become pointers, no torch.
#pragma once
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace fd {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& active_kernels();  // throws where FASTDISTILL_CPU_ISA asks for what is not there

void bind_kd(pybind11::module_& m);
void bind_softmax(pybind11::module_& m);
void bind_hint(pybind11::module_& m);
void bind_privacy(pybind11::module_& m);
void bind_products(pybind11::module_& m);
void bind_bf16(pybind11::module_& m);
void bind_bench(pybind11::module_& m);

}  // namespace fd
