#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings.h"
#include "privacy.h"

namespace py = pybind11;

namespace fd {
namespace {

void square(uintptr_t x, int type, int64_t count, int64_t size, int64_t step, double unit,
            int64_t chunk, uintptr_t squares, int64_t square_step, int64_t first,
            uintptr_t stream) {
  const SquareArgs args{{pointer<void>(x), static_cast<Element>(type), count, size, step},
                        unit,
                        chunk,
                        pointer<double>(squares),
                        square_step,
                        first};
  int status;
  {
    py::gil_scoped_release release;
    status = fd_privacy_square(&args, pointer<void>(stream));
  }
  check("clip_and_noise", status);
}

void release(uintptr_t x, int type, int64_t count, int64_t size, int64_t step, uintptr_t factors,
             uintptr_t out, bool out_double, int generator, const std::array<uint32_t, 8>& key,
             const std::array<uint32_t, 3>& counter, double fine, double grid, double scale,
             double inverse, uintptr_t stream) {
  ReleaseArgs args{};
  args.of = {pointer<void>(x), static_cast<Element>(type), count, size, step};
  args.factors = pointer<double>(factors);
  args.out = pointer<void>(out);
  args.out_double = out_double;
  args.generator = generator;
  std::copy(key.begin(), key.end(), args.key);
  std::copy(counter.begin(), counter.end(), args.counter);
  args.fine = fine;
  args.grid = grid;
  args.scale = scale;
  args.inverse = inverse;
  int status;
  {
    py::gil_scoped_release release;
    status = fd_privacy_release(&args, pointer<void>(stream));
  }
  check("clip_and_noise", status);
}

void sum_rows(uintptr_t table, int type, int64_t teachers, int64_t rows, int64_t cols, int64_t step,
              uintptr_t sums, uintptr_t highest, uintptr_t factors, double inverse_temperature,
              double exponentials, double fine, double clip, double unit, uintptr_t stream) {
  const RowSumArgs args{pointer<uint64_t>(table),
                        static_cast<Element>(type),
                        teachers,
                        rows,
                        cols,
                        step,
                        pointer<double>(sums),
                        pointer<double>(highest),
                        pointer<double>(factors),
                        inverse_temperature,
                        exponentials,
                        fine,
                        clip,
                        unit};
  int status;
  {
    py::gil_scoped_release release;
    status = fd_privacy_sum_rows(&args, pointer<void>(stream));
  }
  check("a sum over teachers", status);
}

}  // namespace

void bind_privacy(py::module_& m) {
  m.def("privacy_square", &square, py::arg("x"), py::arg("type"), py::arg("count"), py::arg("size"),
        py::arg("step"), py::arg("unit"), py::arg("chunk"), py::arg("squares"),
        py::arg("square_step"), py::arg("first"), py::arg("stream"));
  m.def("privacy_release", &release, py::arg("x"), py::arg("type"), py::arg("count"),
        py::arg("size"), py::arg("step"), py::arg("factors"), py::arg("out"), py::arg("out_double"),
        py::arg("generator"), py::arg("key"), py::arg("counter"), py::arg("fine"), py::arg("grid"),
        py::arg("scale"), py::arg("inverse"), py::arg("stream"));
  m.def("privacy_sum_rows", &sum_rows, py::arg("table"), py::arg("type"), py::arg("teachers"),
        py::arg("rows"), py::arg("cols"), py::arg("step"), py::arg("sums"), py::arg("highest"),
        py::arg("factors"), py::arg("inverse_temperature"), py::arg("exponentials"),
        py::arg("fine"), py::arg("clip"), py::arg("unit"), py::arg("stream"));
}

}  // namespace fd
