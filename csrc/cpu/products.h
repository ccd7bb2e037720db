// What the kernels of per-sample weight gradients are given.
#pragma once
#include "rows.h"

namespace fd {

// Of each sample i, out_i[r, v] = sum_t g_i[t, r] a_i[t, v], and the square norm of out_i.
struct LinearProducts {
  bool in_double;     // else float: all of `a`, `g` and `made`
  const void *a, *g;  // [samples, rows, inputs], [samples, rows, outputs]; dense in the last
  int64_t a_sample, a_row, g_sample, g_row;  // elements from one to the next
  int64_t samples, rows, inputs, outputs;
  void* made;      // [samples, outputs, inputs]
  double* square;  // [samples]
};

// Likewise of a convolution: out_i[c, k, o] = sum_l x_i[c, l stride + k dilation] g_i[o, l], with
// zeros around x_i. The output channels come last, as vectors: no patch is ever copied.
struct ConvolutionProducts {
  bool in_double;
  const void* x;  // [samples, groups, channels, height, width]
  const void* g;  // [samples, groups, outputs, out[0], out[1]]
  int64_t samples, groups, channels, outputs;
  int64_t in[2], out[2], kernel[2], stride[2], dilation[2], padding[2];  // height, width
  void* made;      // [samples, groups, channels kernel, outputs]
  double* square;  // [samples]
};

// sum[j] = sum_i factor[i] x_i[j] of dense `x` [samples, size].
struct WeightedSum {
  bool in_double;  // else float: `x` and `sum`
  const void* x;
  const double* factor;  // numbers of the type of `x`
  int64_t samples, size;
  void* sum;
};

// What is added up for one output: sum_t of[at[t] + row[r]] by[t, v], t < depth, r < rows. The
// places are the same for each sample and each group, so that they are listed once.
struct Places {
  const int64_t *at, *row;
  int64_t depth, rows;
};

// One per instruction set; `scratch` belongs to one thread and is 64-byte aligned. The bits of a
// sample's product depend on that sample alone.
struct ProductKernels {
  size_t (*linear_scratch)(const LinearProducts&);
  void (*linear)(const LinearProducts&, const Places&, int64_t begin, int64_t end, void* scratch);
  size_t (*convolution_scratch)(const ConvolutionProducts&);
  void (*convolution)(const ConvolutionProducts&, const Places&, int64_t begin, int64_t end,
                      void* scratch);
  void (*weighted_sum)(const WeightedSum&, int64_t begin, int64_t end);  // of elements
};

// The samples, or the elements, over the threads.
void linear_products(const ProductKernels& kernels, const LinearProducts& call, int threads);
void convolution_products(const ProductKernels& kernels, const ConvolutionProducts& call,
                          int threads);
void weighted_sum(const ProductKernels& kernels, const WeightedSum& call, int threads);

}  // namespace fd
