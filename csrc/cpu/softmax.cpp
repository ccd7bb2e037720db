// The drivers of the softmax kernels: arithmetic, threads, pages.
#include "softmax.h"

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

// Also for temperatures whose products with a float leave its range.
bool in_double(const SoftmaxRows& a) {
  if (a.x.type == Type::f64) return true;
  for (int64_t r = 0; r < (a.uniform ? 1 : a.rows); r++)
    if (a.temperature[r] > 1e30 || a.temperature[r] < 1e-30) return true;
  return false;
}

template <class Args, class Kernel>
void run(const SoftmaxKernels& kernels, Kernel kernel, Args& args, void* out, int threads) {
  SoftmaxRows& a = args.of;
  if (a.rows == 0) return;
  a.wide = in_double(a);
  const int64_t bytes = a.rows * a.cols * item_bytes(a.x.type);
  if (bytes >= kHugePageBytes) advise_huge_pages(out, bytes);
  if (a.rows * a.cols < kSerialElements) threads = 1;
  const size_t scratch = (kernels.scratch_bytes(a) + 63) / 64 * 64;
  std::unique_ptr<char, Free> memory(
      static_cast<char*>(std::aligned_alloc(64, scratch * static_cast<size_t>(threads))));
  if (!memory) throw std::bad_alloc();
  parallel_chunks(a.rows, 1, threads, [&](int thread, int64_t begin, int64_t end) {
    kernel(args, begin, end, memory.get() + scratch * static_cast<size_t>(thread));
  });
}

}  // namespace

void softmax_forward(const SoftmaxKernels& kernels, SoftmaxArgs args, int threads) {
  run(kernels, kernels.forward, args, args.y, threads);
}

void softmax_backward(const SoftmaxKernels& kernels, SoftmaxGradArgs args, int threads) {
  run(kernels, kernels.backward, args, args.grad_x, threads);
}

}  // namespace fd
