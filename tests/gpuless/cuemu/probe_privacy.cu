// The kernels of private releases: each element type and generator, and the generators on the
// vectors of their authors.
#include "probe.h"
#include "row_sums.cuh"

namespace {

constexpr double kFine = 0x1p-31, kGrid = 0x1p-13, kMagic = 1.5 * 0x1p52;

double rounded(double x, double grid) { return std::nearbyint(x / grid) * grid; }

double wide(double x) { return x; }
double wide(float x) { return x; }
double wide(__nv_bfloat16 x) { return as_float(x); }
double wide(__half x) { return as_float(x); }

fd::Draws draws() {
  fd::Draws d{};
  for (uint32_t i = 0; i < 8; i++) d.key[i] = 0x9e3779b9u * (i + 1);
  d.counter[0] = 1u << 24 | 5u << 8;
  d.counter[1] = 0xfffffff0u;
  d.counter[2] = 77;
  return d;
}

// Element e of the noise, in plain doubles; its words are those of the kernel's generators, which
// the vectors below check.
template <fd::Generator G>
double normal(const fd::Draws& d, int64_t e) {
  const int64_t t = e / 32, j = e % 16;
  uint32_t w[16];
  int at = 0;
  if constexpr (G == fd::Generator::philox) {
    uint32_t four[4];
    fd::philox(d, static_cast<uint64_t>(16 * t + j), four);
    for (int i = 0; i < 4; i++) w[i] = four[i];
  } else {
    fd::chacha20(d, static_cast<uint64_t>(t / 4 * 16 + j), w);
    at = static_cast<int>(t % 4) * 4;
  }
  const double u = w[at + 1] * 0x1p-32 + (w[at] + 0.5) * 0x1p-64;
  const double angle =
      0.78539816339744830962 * ((w[at + 3] & 0x1fffffffu) * 0x1p-29 + (w[at + 2] + 0.5) * 0x1p-61);
  const bool swap = w[at + 3] & 0x20000000u, second = e % 32 >= 16;
  const double value = swap != second ? std::sin(angle) : std::cos(angle);
  const bool negative = w[at + 3] & (second ? 0x40000000u : 0x80000000u);
  return std::sqrt(-2 * std::log(u)) * (negative ? -value : value);
}

// A launch of two tensors, cut into chunks: a small one, with none of its own memory but `small`
// elements of the other's, and the one that is looked at.
struct Two {
  fd::Entry entries[2];
  std::vector<int64_t> of_chunk;

  Two(fd::Entry small, fd::Entry large, int64_t chunk) : entries{small, large} {
    for (int t = 0; t < 2; t++) {
      entries[t].first = static_cast<int64_t>(of_chunk.size());
      for (int64_t at = 0; at < entries[t].size; at += chunk) of_chunk.push_back(t);
    }
  }
  fd::Tensors of(int64_t chunk, int64_t samples) const {
    const int64_t chunks = static_cast<int64_t>(of_chunk.size());
    return {entries, of_chunk.data(), chunks, chunk, fd::Element::f32, samples};
  }
};

// `count` samples of `size` elements, `step` apart; sample 1 is left out, and is NaN.
template <class E, fd::Generator G, class Out = float>
void release(const char* what, int count, int64_t size, int64_t step, int64_t offset,
             int64_t out_offset = 0) {
  const size_t n = count == 0 ? 0 : static_cast<size_t>((count - 1) * step + size);
  Buffer<E> x(n + static_cast<size_t>(offset));
  for (int s = 0; s < count; s++) {
    for (int64_t e = 0; e < size; e++)
      if (s != 1) x.data[offset + s * step + e] = static_cast<E>((rand() % 2001 - 1000) / 250.f);
  }
  Buffer<double> factors(static_cast<size_t>(count));
  for (int s = 0; s < count; s++) factors.data[s] = s == 1 ? 0.0 : 0.3 + 0.1 * s;
  Buffer<Out> out(static_cast<size_t>(size + out_offset)), small(3);
  const E* data = x.data.get() + offset;
  const uint64_t word = draws().counter[0];
  const Two two({data, 3, step, 0, small.data.get(), word + 256},
                {data, size, step, 0, out.data.get() + out_offset, word}, fd::kTile);
  fd::ReleaseParams a{};
  a.of = two.of(fd::kTile, count);
  a.factors = factors.data.get();
  a.draws = draws();
  a.draws.counter[0] = 0;  // each tensor has its own
  a.fine = kMagic * kFine;
  a.grid = kMagic * kGrid;
  a.scale = 3;
  a.inverse = 0.25;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(two.of_chunk.size()));
  config.blockDim = dim3(fd::kReleaseThreads);
  expect(what, cudaLaunchKernelEx(&config, fd::privacy_release<E, Out, G>, a), 0, 0);
  const auto expected = [&](int64_t e, uint64_t counter) {
    double sum = 0;
    for (int s = 0; s < count; s++) {
      if (s != 1) sum += rounded(wide(x.data[offset + s * step + e]) * factors.data[s], kFine);
    }
    double want = rounded(sum, kGrid);
    fd::Draws d = a.draws;
    d.counter[0] = static_cast<uint32_t>(counter);
    if constexpr (G != fd::Generator::none) want += rounded(normal<G>(d, e) * 3, kGrid);
    return want * 0.25;
  };
  for (int64_t e = 0; e < size; e++)
    expect(what, wide(out.data[out_offset + e]), expected(e, word), 1e-7);
  for (int64_t e = 0; e < 3; e++) expect(what, wide(small.data[e]), expected(e, word + 256), 1e-7);
}

template <class E>
void square(const char* what, int count, int64_t size, int64_t step, int64_t offset,
            unsigned threads) {
  Buffer<E> x(static_cast<size_t>((count - 1) * step + size + offset));
  for (int s = 0; s < count; s++)
    for (int64_t e = 0; e < size; e++)
      x.data[offset + s * step + e] = static_cast<E>((rand() % 2001 - 1000) / 250.f);
  const int64_t chunk = 1024, chunks = (size + chunk - 1) / chunk, all = chunks + 4;
  Buffer<double> squares(static_cast<size_t>(count * all - 1));  // the last column is another's
  const E* data = x.data.get() + offset;
  const Two two({data, 3, step, 0, nullptr, 0}, {data, size, step, 0, nullptr, 0}, chunk);
  fd::SquareParams a{};
  a.of = two.of(chunk, count);
  a.unit = 0.5;
  a.squares = squares.data.get();
  a.square_step = all;
  a.first = 2;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(count * (chunks + 1)));
  config.blockDim = dim3(threads);
  expect(what, cudaLaunchKernelEx(&config, fd::privacy_square<E>, a), 0, 0);
  for (int s = 0; s < count; s++) {
    for (int64_t c = -1; c < chunks; c++) {  // the first is the small tensor's
      double want = 0;
      const int64_t end = c < 0 ? 3 : std::min(size, (c + 1) * chunk);
      for (int64_t e = std::max(c, int64_t{0}) * chunk; e < end; e++) {
        const double v = wide(x.data[offset + s * step + e]) * 0.5;
        want += v * v;
      }
      expect(what, squares.data[s * all + 3 + c], want, 1e-12);
    }
    expect("beside", std::isnan(squares.data[s * all + 1]), 1, 0);
  }
}

// The sum of rows of softmax, or clipped, of `teachers`; one row of one of them is not finite.
template <class E, bool Softmax>
void sum_rows(const char* what, int teachers, int64_t rows, int64_t cols, int64_t step,
              int64_t offset, unsigned threads) {
  std::vector<Buffer<E>> x;
  std::vector<uint64_t> table;
  for (int t = 0; t < teachers; t++) {
    x.emplace_back(static_cast<size_t>((rows - 1) * step + cols + offset));
    E* data = x.back().data.get() + offset;
    table.push_back(reinterpret_cast<uintptr_t>(data));
    for (int64_t r = 0; r < rows; r++)  // far below zero, so that one beside a row would show
      for (int64_t c = 0; c < cols; c++)
        data[r * step + c] = static_cast<E>((rand() % 1000) / 250.f - 60.f);
  }
  x[1].data[offset + 7] = static_cast<E>(NAN);
  Buffer<double> sums(static_cast<size_t>(rows * cols));
  Buffer<double> highest(static_cast<size_t>(rows * teachers));
  Buffer<double> factors(static_cast<size_t>(rows * teachers));
  fd::RowParams a{};
  a.table = table.data();
  a.sums = sums.data.get(), a.highest = highest.data.get(), a.factors = factors.data.get();
  a.teachers = teachers, a.rows = rows, a.cols = cols, a.x_step = step;
  a.inverse = 0.75, a.exponentials = kMagic * 0x1p-32, a.fine = kMagic * kFine;
  a.clip = 0.9, a.unit = 0.5;
  a.chunks = (cols + threads * fd::kEach - 1) / (threads * fd::kEach);
  a.lanes = 1;
  while (a.lanes < fd::kWarp && a.lanes * fd::kEach < cols) a.lanes *= 2;
  const auto start = [&](auto kernel, int64_t blocks) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    expect(what, cudaLaunchKernelEx(&config, kernel, a), 0, 0);
  };
  if (cols <= fd::kNarrow) {
    const int64_t each = threads / a.lanes;
    start(fd::privacy_narrow_rows<E, Softmax>, (rows + each - 1) / each);
  } else {
    start(fd::privacy_row_factor<E, Softmax>, rows * teachers);
    start(fd::privacy_row_sum<E, Softmax>, rows * a.chunks);
  }
  std::vector<double> want(static_cast<size_t>(rows * cols));
  for (int t = 0; t < teachers; t++) {
    for (int64_t r = t == 1; r < rows; r++) {
      const E* row = x[t].data.get() + offset + r * step;
      double top = -INFINITY, total = 0, square = 0;
      for (int64_t c = 0; c < cols; c++) top = std::max(top, wide(row[c]));
      const auto e = [&](int64_t c) { return std::exp((wide(row[c]) - top) * a.inverse); };
      for (int64_t c = 0; c < cols; c++) total += e(c), square += wide(row[c]) * wide(row[c]);
      const double factor = std::min(a.clip / (std::sqrt(square) + 1e-6), 1.0);
      for (int64_t c = 0; c < cols; c++)
        want[r * cols + c] += Softmax ? e(c) * a.clip / total : wide(row[c]) * factor;
    }
  }
  for (int64_t i = 0; i < rows * cols; i++) expect(what, sums.data[i], want[i], 1e-8);
}

// Offsets of samples that lie further apart than 32 bits can say, without the memory.
void far_samples() {
  const int64_t far = int64_t{1} << 33, sample = 13;
  fd::SquareParams a{};
  fd::Entry p{};
  p.x = a.squares = reinterpret_cast<double*>(far);
  p.step = a.square_step = far / 4 + 1;
  const auto offset = [&](const void* p) { return reinterpret_cast<intptr_t>(p) - far; };
  expect("far sample", offset(fd::row_of<float>(p, sample)) == sample * p.step * 4, 1, 0);
  expect("far square", offset(fd::square_of(a, sample)) == sample * a.square_step * 8, 1, 0);
  const uint64_t address = far;
  fd::RowParams b{};
  b.table = &address;
  b.sums = reinterpret_cast<double*>(far);
  b.x_step = b.cols = far / 4 + 1;
  expect("far row", offset(fd::teacher_row<float>(b, 0, sample)) == sample * b.x_step * 4, 1, 0);
  expect("far sums", offset(fd::sums_of(b, sample)) == sample * b.cols * 8, 1, 0);
}

// Random123's kat_vectors (philox4x32 10), and RFC 8439, 2.3.2.
void vectors() {
  fd::Draws d{{0xa4093822u, 0x299f31d0u}, {0x85a308d3u, 0x13198a2eu, 0x03707344u}};
  const uint32_t philox[4] = {0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u};
  uint32_t w[16], four[4];
  fd::philox(d, 0x243f6a88u, four);
  for (int i = 0; i < 4; i++) expect("Random123's vector", four[i], philox[i], 0);
  const uint32_t chacha20[16] = {0xe4e7f110u, 0x15593bd1u, 0x1fdd0f50u, 0xc47120a3u,
                                 0xc7f4d1c7u, 0x0368c033u, 0x9aaa2204u, 0x4e6cd4c3u,
                                 0x466482d2u, 0x09aa9f07u, 0x05d7c214u, 0xa2028bd9u,
                                 0xd19c12b5u, 0xb94e16deu, 0xe883d0cbu, 0x4e3c50a2u};
  for (uint32_t i = 0; i < 8; i++) d.key[i] = 0x03020100u + 0x04040404u * i;
  d.counter[0] = 0x09000000u, d.counter[1] = 0x4a000000u, d.counter[2] = 0;
  fd::chacha20(d, 1, w);
  for (int i = 0; i < 16; i++) expect("RFC 8439's vector", w[i], chacha20[i], 0);
  // The block's number goes on in the second word.
  fd::Draws zero{};
  zero.counter[0] = 1;
  uint32_t again[4];
  fd::philox(zero, 1ull << 32, four);
  zero.counter[0] = 2;
  fd::philox(zero, 0, again);
  for (int i = 0; i < 4; i++) expect("a block beyond 2^32", four[i], again[i], 0);
}

}  // namespace

int main() {
  using bf16 = __nv_bfloat16;
  using fd::Generator;
  vectors();
  far_samples();
  for (int64_t offset : {0, 1}) {
    release<float, Generator::philox>("philox", 6, 1301, 1304 + offset, offset, offset);
    release<bf16, Generator::chacha20>("chacha20", 3, 136, 136, offset);
    release<double, Generator::chacha20, double>("double", 2, 130, 131, offset);
    release<double, Generator::philox>("double to float", 1, 35, 35, offset, offset);
    release<__half, Generator::none>("no noise", 5, 71, 72, offset);
    square<float>("square", 2, 1097, 1104 + offset, offset, 64);
    square<bf16>("square of bf16", 2, 1024, 1024, offset, 128);
    square<double>("square of double", 2, 23, 24, offset, 32);
    square<__half>("square of f16", 2, 71, 72, offset, 32);
  }
  release<float, Generator::chacha20>("noise alone", 0, 135, 0, 0);
  sum_rows<float, true>("softmax rows", 3, 3, 101, 104, 0, 32);
  sum_rows<bf16, false>("clipped rows", 2, 35, 8, 8, 1, 32);
  sum_rows<double, true>("softmax of double", 5, 2, 257, 258, 1, 32);
  sum_rows<__half, false>("clipped f16", 3, 2, 261, 264, 0, 64);
  sum_rows<float, false>("wide rows", 2, 2, 520, 520, 0, 64);
  sum_rows<__half, true>("wide softmax", 2, 1, 777, 777, 1, 64);
  return failures == 0 ? 0 : 1;
}
