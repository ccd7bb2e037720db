// The driver of per-sample weight gradients: samples over threads, and where their elements are.
#include "products.h"

#include <vector>

#include "parallel.h"

namespace fd {
namespace {

constexpr int64_t kSerialProducts = 1 << 20;  // below this a second thread costs more than it gives

constexpr int64_t kSumElements = 2048;  // of a work item: its sums stay in L1

}  // namespace

void linear_products(const ProductKernels& kernels, const LinearProducts& c, int threads) {
  if (c.samples == 0) return;
  std::vector<int64_t> at, row;
  for (int64_t t = 0; t < c.rows; t++) at.push_back(t * c.g_row);
  for (int64_t r = 0; r < c.outputs; r++) row.push_back(r);
  const Places places{at.data(), row.data(), c.rows, c.outputs};
  if (c.samples * c.rows * c.inputs * c.outputs < kSerialProducts) threads = 1;
  parallel_chunks_with_scratch(c.samples, 1, threads, kernels.linear_scratch(c),
                               [&](char* scratch, int64_t begin, int64_t end) {
                                 kernels.linear(c, places, begin, end, scratch);
                               });
}

void convolution_products(const ProductKernels& kernels, const ConvolutionProducts& c,
                          int threads) {
  if (c.samples == 0) return;
  const int64_t width = c.in[1] + 2 * c.padding[1];
  const int64_t plane = (c.in[0] + 2 * c.padding[0]) * width;
  std::vector<int64_t> at, row;
  for (int64_t y = 0; y < c.out[0]; y++)
    for (int64_t x = 0; x < c.out[1]; x++) at.push_back(y * c.stride[0] * width + x * c.stride[1]);
  for (int64_t channel = 0; channel < c.channels; channel++)
    for (int64_t y = 0; y < c.kernel[0]; y++)
      for (int64_t x = 0; x < c.kernel[1]; x++)
        row.push_back(channel * plane + y * c.dilation[0] * width + x * c.dilation[1]);
  const Places places{at.data(), row.data(), static_cast<int64_t>(at.size()),
                      static_cast<int64_t>(row.size())};
  if (c.samples * c.groups * places.depth * places.rows * c.outputs < kSerialProducts) threads = 1;
  parallel_chunks_with_scratch(c.samples, 1, threads, kernels.convolution_scratch(c),
                               [&](char* scratch, int64_t begin, int64_t end) {
                                 kernels.convolution(c, places, begin, end, scratch);
                               });
}

void weighted_sum(const ProductKernels& kernels, const WeightedSum& c, int threads) {
  if (c.samples * c.size < kSerialElements) threads = 1;
  const int64_t items = (c.size + kSumElements - 1) / kSumElements;
  parallel_chunks(items, 1, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernels.weighted_sum(c, i * kSumElements, std::min((i + 1) * kSumElements, c.size));
  });
}

}  // namespace fd
