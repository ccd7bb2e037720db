// The header's own test: a row summed by a cluster of blocks through distributed shared memory, in
// static and in dynamic memory. No kernel of the package takes clusters yet.
#include <cooperative_groups.h>

#include "group.cuh"
#include "probe.h"

namespace cg = cooperative_groups;

constexpr int kThreads = 64;

// sums[c] of in[c * cols, (c + 1) * cols), c the cluster.
__global__ void __launch_bounds__(kThreads) cluster_sum(const float* in, float* sums, int cols) {
  FD_SHARED(float, part, 1);
  FD_DYNAMIC_SHARED(float, echo);
  const auto cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int64_t c = blockIdx.x / blocks;
  float sum = 0.f;
  for (int i = rank * kThreads + threadIdx.x; i < cols; i += blocks * kThreads) {
    sum += in[c * cols + i];
  }
  sum = fd::Block::reduce(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) part[0] = sum;
  cluster.sync();  // all parts are there
  float total = 0.f;
  for (int b = 0; b < blocks; b++) total += *cluster.map_shared_rank(part, b);
  // Each block tells the next one; thread by thread, so that a byte too many is seen.
  cluster.map_shared_rank(echo, (rank + 1) % blocks)[threadIdx.x] = total;
  cluster.sync();  // nobody leaves while it is read or written
  if (rank == 0 && threadIdx.x == kThreads - 1) sums[c] = echo[threadIdx.x];
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : kThreads;
  constexpr int kClusters = 3, kCols = 1000;
  for (unsigned size : {1u, 2u, 8u}) {
    Buffer<float> in(kClusters * kCols), sums(kClusters);
    in.randomize(kClusters * kCols);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kClusters * size);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = kThreads * sizeof(float);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const float* from = in.data.get();
    float* to = sums.data.get();
    expect("launch", cudaLaunchKernelEx(&config, cluster_sum, from, to, kCols), 0, 0);
    for (int c = 0; c < kClusters; c++) {
      double want = 0;
      for (int i = 0; i < kCols; i++) want += in.data[c * kCols + i];
      expect("sum of a cluster", sums.data[c], want, 1e-4);
    }
    config.gridDim = dim3(kClusters * size + 1);  // no whole number of clusters
    if (size > 1) {
      const int status = cudaLaunchKernelEx(&config, cluster_sum, from, to, kCols);
      expect("a cluster cut short", status, cudaErrorInvalidClusterSize, 0);
    }
  }
  return failures == 0 ? 0 : 1;
}
