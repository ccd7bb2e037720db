// The driver of noisy sums over teachers, row by row: softmax rows, or clipped gradients.
#include <cmath>
#include <vector>

#include "parallel.h"
#include "privacy_call.h"

namespace fd {
namespace {

constexpr int64_t kItem = 4096;  // values of a work item, at least one row

const void* row_at(const void* data, Type type, int64_t row, int64_t classes) {
  return static_cast<const char*>(data) + row * classes * item_bytes(type);
}

}  // namespace

void noisy_row_sum(const PrivacyKernels& kernels, const RowSumCall& call) {
  const int64_t classes = call.classes, rows_at_once = std::max<int64_t>(kItem / classes, 1);
  const int64_t padded = (classes + 7) / 8 * 8;  // whole vectors of every instruction set
  const size_t teachers = call.teachers.size();
  const int64_t bytes = call.rows * classes * (call.out_double ? 8 : 4);
  if (bytes >= kHugePageBytes) advise_huge_pages(call.out, bytes);
  const int64_t work = call.rows * classes * static_cast<int64_t>(teachers + 1);
  const int threads = work < kSerialElements ? 1 : call.threads;
  parallel_chunks(
      (call.rows + rows_at_once - 1) / rows_at_once, 1, threads,
      [&](int, int64_t begin, int64_t end) {
        std::vector<double> sum(static_cast<size_t>(rows_at_once * classes)),
            scratch(static_cast<size_t>(padded)), factor(teachers);
        std::vector<const void*> kept(teachers);
        for (int64_t item = begin; item < end; item++) {
          const int64_t first = item * rows_at_once;
          const int64_t rows = std::min(rows_at_once, call.rows - first);
          std::fill(sum.begin(), sum.end(), 0.0);
          for (int64_t i = 0; i < rows; i++) {
            double* total = sum.data() + i * classes;
            int64_t count = 0;
            for (const void* teacher : call.teachers) {
              const void* x = row_at(teacher, call.type, first + i, classes);
              if (call.inverse_temperature != 0) {
                kernels.add_softmax(call, x, scratch.data(), total);
                continue;
              }
              const double norm =
                  std::sqrt(kernels.square(call.type, x, classes, call.unit)) / call.unit;
              if (!std::isfinite(norm)) continue;  // not read again: 0 times NaN is NaN
              kept[static_cast<size_t>(count)] = x;
              factor[static_cast<size_t>(count++)] = std::min(1.0, call.clip / (norm + kEps));
            }
            kernels.add(call.type, kept.data(), factor.data(), count, classes, call.magic, total);
          }
          kernels.release(call.noise, first * classes, rows * classes, sum.data(), true, call.out,
                          call.out_double);
        }
      });
}

}  // namespace fd
