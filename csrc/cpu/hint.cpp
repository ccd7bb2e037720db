// The driver of the hint kernels: rows over threads.
#include "hint.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"

namespace fd {
namespace {

constexpr int64_t kSerialElements = 16384;  // below this a second thread costs more than it gives

struct Free {
  void operator()(void* p) const { std::free(p); }
};

int64_t item_bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

}  // namespace

void hint_rows(const HintKernels& kernels, const HintArgs& a, int threads) {
  if (a.rows == 0) return;
  if (a.rows * a.cols < kSerialElements) threads = 1;
  const int64_t bytes = a.rows * a.grad_step * item_bytes(a.grad_type);
  if (a.grad && a.grad != a.student.data && bytes >= kHugePageBytes)
    advise_huge_pages(a.grad, bytes);
  const size_t scratch = (kernels.scratch_bytes(a) + 63) / 64 * 64;
  std::unique_ptr<char, Free> memory(
      static_cast<char*>(std::aligned_alloc(64, scratch * static_cast<size_t>(threads))));
  if (!memory) throw std::bad_alloc();
  parallel_chunks(a.rows, kBiasRows, threads, [&](int thread, int64_t begin, int64_t end) {
    kernels.rows(a, begin, end, memory.get() + scratch * static_cast<size_t>(thread));
  });
}

}  // namespace fd
