// The driver of the hint kernels: rows over threads.
#include "hint.h"

#include "parallel.h"

namespace fd {
// Of a gradient: above, the caches hold little of it when it is read, and plain stores first read
// what they overwrite.
constexpr int64_t kPastCachesBytes = 8 << 20;

void hint_rows(const HintKernels& kernels, const HintArgs& args, int threads) {
  HintArgs a = args;
  if (a.rows == 0) return;
  if (a.rows * a.cols < kSerialElements) threads = 1;
  const int64_t bytes = a.rows * a.grad_step * item_bytes(a.grad_type);
  if (a.grad && a.grad != a.student.data && bytes >= kHugePageBytes)
    advise_huge_pages(a.grad, bytes);
  a.past_caches = a.grad && a.grad != a.student.data && bytes >= kPastCachesBytes;
  parallel_chunks_with_scratch(
      a.rows, kBiasRows, threads, kernels.scratch_bytes(a),
      [&](char* scratch, int64_t begin, int64_t end) { kernels.rows(a, begin, end, scratch); });
}

}  // namespace fd
