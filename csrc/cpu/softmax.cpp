// The drivers of the softmax kernels: arithmetic, threads, pages.
#include "softmax.h"

#include <algorithm>

#include "parallel.h"

namespace fd {
namespace {

// Also for temperatures whose products with a float leave its range.
bool in_double(const SoftmaxRows& a) {
  if (a.x.type == Type::f64) return true;
  for (int64_t r = 0; r < (a.uniform ? 1 : a.rows); r++)
    if (a.temperature[r] > 1e30 || a.temperature[r] < 1e-30) return true;
  return false;
}

// One temperature for all rows, or a tensor of nothing but that.
bool one_temperature(const SoftmaxRows& a) {
  if (a.uniform) return true;
  return std::all_of(a.temperature, a.temperature + a.rows,
                     [&](double t) { return t == a.temperature[0]; });
}

template <class Args, class Kernel>
void run(const SoftmaxKernels& kernels, Kernel kernel, Args& args, void* out, int threads) {
  SoftmaxRows& a = args.of;
  if (a.rows == 0) return;
  a.uniform = one_temperature(a);
  a.wide = in_double(a);
  const int64_t bytes = a.rows * a.cols * item_bytes(a.x.type);
  if (bytes >= kHugePageBytes) advise_huge_pages(out, bytes);
  if (a.rows * a.cols < kSerialElements) threads = 1;
  const int64_t group = a.cols <= kSoftmaxFew ? 16 : 1;
  parallel_chunks_with_scratch(
      a.rows, group, threads, kernels.scratch_bytes(a),
      [&](char* scratch, int64_t begin, int64_t end) { kernel(args, begin, end, scratch); });
}

}  // namespace

void softmax_forward(const SoftmaxKernels& kernels, SoftmaxArgs args, int threads) {
  run(kernels, kernels.forward, args, args.y, threads);
}

void softmax_backward(const SoftmaxKernels& kernels, SoftmaxGradArgs args, int threads) {
  run(kernels, kernels.backward, args, args.grad_x, threads);
}

}  // namespace fd
