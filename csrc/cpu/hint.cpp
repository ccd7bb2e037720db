// The driver of the hint kernels: rows over threads.
#include "hint.h"

#include "parallel.h"

namespace fd {
void hint_rows(const HintKernels& kernels, const HintArgs& a, int threads) {
  if (a.rows == 0) return;
  if (a.rows * a.cols < kSerialElements) threads = 1;
  const int64_t bytes = a.rows * a.grad_step * item_bytes(a.grad_type);
  if (a.grad && a.grad != a.student.data && bytes >= kHugePageBytes)
    advise_huge_pages(a.grad, bytes);
  parallel_chunks_with_scratch(
      a.rows, kBiasRows, threads, kernels.scratch_bytes(a),
      [&](char* scratch, int64_t begin, int64_t end) { kernels.rows(a, begin, end, scratch); });
}

}  // namespace fd
