#include <algorithm>
#include <vector>

#include "bindings.h"
#include "parallel.h"

namespace py = pybind11;

namespace fd {
namespace {

// For bench/: `repeats` rounds of n exponentials over a block that stays in L1, over the threads.
float exp_loop(int64_t n, int64_t repeats, int threads) {
  const BenchKernels& kernels = active_kernels().bench;
  py::gil_scoped_release released;
  constexpr int64_t most = 4096;  // x and e in half of an L1 of 64 KB
  n = std::min(std::max<int64_t>(n / 16 * 16, 16), most);
  std::vector<float> sums(static_cast<size_t>(threads) * 16);  // a cache line each
  parallel_chunks(repeats, 1, threads, [&](int thread, int64_t begin, int64_t end) {
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
  const BenchKernels& kernels = active_kernels().bench;
  py::gil_scoped_release released;
  constexpr int64_t unit = 4096;
  if (bytes >= kHugePageBytes) advise_huge_pages(pointer<void>(out), bytes);
  const int64_t units = (bytes + unit - 1) / unit;
  parallel_chunks(units, 1, threads, [&](int, int64_t begin, int64_t end) {
    const int64_t first = begin * unit, last = std::min(end * unit, bytes);
    kernels.read_read_write(pointer<char>(student) + first, pointer<char>(teacher) + first,
                            pointer<char>(out) + first, last - first, stream);
  });
}

// For bench/: reading and nothing else.
uint32_t read_limit(uintptr_t data, int64_t bytes, int threads) {
  const BenchKernels& kernels = active_kernels().bench;
  py::gil_scoped_release released;
  constexpr int64_t unit = 4096;
  std::vector<uint32_t> found(static_cast<size_t>(threads) * 16);  // a cache line each
  parallel_chunks((bytes + unit - 1) / unit, 1, threads, [&](int t, int64_t begin, int64_t end) {
    const int64_t first = begin * unit, last = std::min(end * unit, bytes);
    found[static_cast<size_t>(t) * 16] ^=
        kernels.read_only(pointer<char>(data) + first, last - first);
  });
  uint32_t all = 0;
  for (const uint32_t x : found) all ^= x;
  return all;
}

}  // namespace

void bind_bench(py::module_& m) {
  m.def("exp_loop", &exp_loop);
  m.def("copy_limit", &copy_limit);
  m.def("read_limit", &read_limit);
}

}  // namespace fd
