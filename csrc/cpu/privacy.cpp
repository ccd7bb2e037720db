// The driver of the privacy kernels: two passes over the samples, threads, the order of sums.
#include <cmath>
#include <vector>

#include "parallel.h"
#include "privacy_call.h"

namespace fd {
namespace {

constexpr int64_t kChunk = 4096;  // elements of a work item: their sums are 32 KB

static_assert(kChunk % kNoiseGroup == 0, "a chunk has to be whole groups of noise");

struct Chunk {
  const GradSamples* of;
  uint32_t parameter;
  int64_t first, size;
};

std::vector<Chunk> chunks_of(const std::vector<GradSamples>& parameters) {
  std::vector<Chunk> chunks;
  uint32_t parameter = 0;
  for (const GradSamples& p : parameters) {
    for (int64_t first = 0; first < p.size; first += kChunk)
      chunks.push_back({&p, parameter, first, std::min(kChunk, p.size - first)});
    parameter++;
  }
  return chunks;
}

const void* at(const Chunk& chunk, int64_t sample) {
  const GradSamples& p = *chunk.of;
  return static_cast<const char*>(p.data) + (sample * p.size + chunk.first) * item_bytes(p.type);
}

// The factor of each sample; 0 for one that is not finite. First pass over the samples.
std::vector<double> factors(const PrivacyKernels& kernels, const PrivacyCall& call,
                            const std::vector<Chunk>& chunks, int threads) {
  const int64_t per_sample = static_cast<int64_t>(chunks.size());
  std::vector<double> squares(static_cast<size_t>(call.samples * per_sample));
  parallel_chunks(call.samples * per_sample, 1, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Chunk& chunk = chunks[static_cast<size_t>(i % per_sample)];
      squares[static_cast<size_t>(i)] =
          kernels.square(chunk.of->type, at(chunk, i / per_sample), chunk.size, call.unit);
    }
  });
  std::vector<double> factor(static_cast<size_t>(call.samples));
  const double* square = squares.data();
  for (double& c : factor) {
    double sum = 0;
    for (int64_t k = 0; k < per_sample; k++) sum += *square++;
    const double norm = std::sqrt(sum) / call.unit;
    c = std::isfinite(norm) ? std::min(1.0, call.clip / (norm + kEps)) : 0.0;
  }
  return factor;
}

}  // namespace

void add_noise(const PrivacyKernels& kernels, const PrivacyCall& call) {
  const std::vector<Chunk> chunks = chunks_of(call.parameters);
  int64_t elements = 0;
  for (const GradSamples& p : call.parameters) elements += p.size;
  const int threads = elements < kSerialElements ? 1 : call.threads;
  parallel_chunks(static_cast<int64_t>(chunks.size()), 1, threads,
                  [&](int, int64_t begin, int64_t end) {
                    Noise noise = call.noise;
                    for (int64_t i = begin; i < end; i++) {
                      const Chunk& chunk = chunks[static_cast<size_t>(i)];
                      noise.draws.counter[0] = call.noise.draws.counter[0] + (chunk.parameter << 8);
                      kernels.release(noise, chunk.first, chunk.size, at(chunk, 0),
                                      chunk.of->out_double, chunk.of->out, chunk.of->out_double);
                    }
                  });
}

void square_norms(const PrivacyKernels& kernels, const GradSamples& samples, int64_t count,
                  double* out, int threads) {
  const std::vector<Chunk> chunks = chunks_of({samples});
  if (samples.size * count < kSerialElements) threads = 1;
  parallel_chunks(count, 1, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      double sum = 0;
      for (const Chunk& chunk : chunks)
        sum += kernels.square(samples.type, at({&samples, 0, chunk.first, chunk.size}, i),
                              chunk.size, 1.0);
      out[i] = sum;
    }
  });
}

void clip_and_noise(const PrivacyKernels& kernels, const PrivacyCall& call) {
  const std::vector<Chunk> chunks = chunks_of(call.parameters);
  int64_t elements = 0;
  for (const GradSamples& p : call.parameters) {
    const int64_t bytes = p.size * (p.out_double ? 8 : 4);
    if (bytes >= kHugePageBytes) advise_huge_pages(p.out, bytes);
    elements += p.size;
  }
  const int threads = elements * (call.samples + 1) < kSerialElements ? 1 : call.threads;
  const std::vector<double> factor = factors(kernels, call, chunks, threads);
  std::vector<int64_t> kept;  // a sample that is not finite is not read again: 0 times NaN is NaN
  std::vector<double> factor_kept;
  for (int64_t i = 0; i < call.samples; i++) {
    if (factor[static_cast<size_t>(i)] == 0) continue;
    kept.push_back(i);
    factor_kept.push_back(factor[static_cast<size_t>(i)]);
  }
  const int64_t count = static_cast<int64_t>(kept.size());
  parallel_chunks(static_cast<int64_t>(chunks.size()), 1, threads,
                  [&](int, int64_t begin, int64_t end) {
                    alignas(64) double sum[kChunk];
                    std::vector<const void*> rows(kept.size());
                    Noise noise = call.noise;
                    for (int64_t i = begin; i < end; i++) {
                      const Chunk& chunk = chunks[static_cast<size_t>(i)];
                      for (size_t k = 0; k < kept.size(); k++) rows[k] = at(chunk, kept[k]);
                      if (count) {
                        std::fill_n(sum, chunk.size, 0.0);
                        kernels.add(chunk.of->type, rows.data(), factor_kept.data(), count,
                                    chunk.size, call.magic, sum);
                      }
                      noise.draws.counter[0] = call.noise.draws.counter[0] + (chunk.parameter << 8);
                      kernels.release(noise, chunk.first, chunk.size, count ? sum : nullptr, true,
                                      chunk.of->out, chunk.of->out_double);
                    }
                  });
}

}  // namespace fd
