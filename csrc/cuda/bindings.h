// The bind_*.cpp files and bindings.cpp are all of the CUDA module that knows Python. Pointers and
// streams come as integers; the headers of the rooms say what each argument means.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fd {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* what, int status);  // throws unless `status` is cudaSuccess

void bind_kd(pybind11::module_& m);
void bind_softmax(pybind11::module_& m);
void bind_hint(pybind11::module_& m);
void bind_privacy(pybind11::module_& m);

}  // namespace fd
