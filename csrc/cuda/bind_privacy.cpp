#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings.h"
#include "privacy.h"

namespace py = pybind11;

namespace fd {
namespace {

Tensors tensors(uintptr_t table, uintptr_t of_chunk, int64_t chunks, int64_t chunk, int type,
                int64_t samples) {
  return {pointer<Entry>(table),
          pointer<int64_t>(of_chunk),
          chunks,
          chunk,
          static_cast<Element>(type),
          samples};
}

void square(uintptr_t table, uintptr_t of_chunk, int64_t chunks, int64_t chunk, int type,
            int64_t samples, int64_t most, double unit, uintptr_t squares, int64_t square_step,
            int64_t first, uintptr_t stream) {
  const SquareArgs args{tensors(table, of_chunk, chunks, chunk, type, samples),
                        most,
                        unit,
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

void release(uintptr_t table, uintptr_t of_chunk, int64_t chunks, int64_t chunk, int type,
             int64_t samples, uintptr_t factors, bool out_double, int generator,
             const std::array<uint32_t, 8>& key, const std::array<uint32_t, 2>& counter,
             double fine, double grid, double scale, double inverse, uintptr_t stream) {
  ReleaseArgs args{};
  args.of = tensors(table, of_chunk, chunks, chunk, type, samples);
  args.factors = pointer<double>(factors);
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
  m.def("privacy_square", &square, py::arg("table"), py::arg("of_chunk"), py::arg("chunks"),
        py::arg("chunk"), py::arg("type"), py::arg("samples"), py::arg("most"), py::arg("unit"),
        py::arg("squares"), py::arg("square_step"), py::arg("first"), py::arg("stream"));
  m.def("privacy_release", &release, py::arg("table"), py::arg("of_chunk"), py::arg("chunks"),
        py::arg("chunk"), py::arg("type"), py::arg("samples"), py::arg("factors"),
        py::arg("out_double"), py::arg("generator"), py::arg("key"), py::arg("counter"),
        py::arg("fine"), py::arg("grid"), py::arg("scale"), py::arg("inverse"), py::arg("stream"));
  m.def("privacy_sum_rows", &sum_rows, py::arg("table"), py::arg("type"), py::arg("teachers"),
        py::arg("rows"), py::arg("cols"), py::arg("step"), py::arg("sums"), py::arg("highest"),
        py::arg("factors"), py::arg("inverse_temperature"), py::arg("exponentials"),
        py::arg("fine"), py::arg("clip"), py::arg("unit"), py::arg("stream"));
}

}  // namespace fd
