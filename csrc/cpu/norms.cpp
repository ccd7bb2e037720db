#include "norms.h"

#include "parallel.h"

namespace fd {

void norm_sums(const NormKernels& kernels, const NormSums& c, int threads) {
  if (c.samples * c.rows * c.cols < kSerialElements) threads = 1;
  parallel_chunks(c.samples, 1, threads,
                  [&](int, int64_t begin, int64_t end) { kernels.sums(c, begin, end); });
}

}  // namespace fd
