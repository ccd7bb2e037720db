// Per-sample gradients of weights: products of many small matrices, in tiles of registers.
// Included once per instruction set, inside that set's namespace.
//
// A tile is kTileRows outputs by a panel of `by`: each element of `of` is broadcast where it lies,
// so that neither rows of a Linear nor patches of a convolution are copied; `by` is packed a panel
// at a time, which stays in L1. The square norm is taken of the tile while it is in registers, in
// float64, of the very numbers that are stored.
#pragma once
#include "tile.inl"

#if defined(__AVX512F__)
#define FD_VECTOR 64
#elif defined(__AVX__)
#define FD_VECTOR 32
#else
#define FD_VECTOR 16
#endif

template <class R>
struct Wide {
  typedef R Vector __attribute__((vector_size(FD_VECTOR)));
  static constexpr int lanes = FD_VECTOR / sizeof(R);
};

// Sums, `by` and one broadcast fill the registers: 32 of AVX-512, 16 elsewhere, where a product
// that is not fused takes one more.
constexpr int kTileRows = FD_VECTOR == 16 ? 4 : 6;
constexpr int kTileVectors = FD_VECTOR == 64 ? 4 : 2;
constexpr int64_t kDepth = 128;  // rows of a panel at most: 64 KB

// The sum of squares of all that is stored of a sample.
struct Squares {
  typedef double Doubles __attribute__((vector_size(FD_VECTOR)));
  static constexpr int chains = 4;
  Doubles sum[chains];

  FD_INLINE_MEMBER void clear() {
    for (Doubles& s : sum) s = Doubles{};
  }
  FD_INLINE_MEMBER void add(Doubles x, int chain) { sum[chain % chains] += x * x; }
  FD_INLINE_MEMBER void add(Wide<float>::Vector x, int chain) {
    Doubles low, high;
#if defined(__AVX512F__)
    const __m512 v = reinterpret_cast<__m512>(x);
    low = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    high = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(__AVX__)
    const __m256 v = reinterpret_cast<__m256>(x);
    low = reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    high = reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
    for (int j = 0; j < 2; j++) {
      low[j] = static_cast<double>(x[j]);
      high[j] = static_cast<double>(x[2 + j]);
    }
#endif
    add(low, chain);
    add(high, chain + 1);
  }
  FD_INLINE_MEMBER double total() const {
    const Doubles all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    double result = 0;
    for (int j = 0; j < Wide<double>::lanes; j++) result += all[j];
    return result;
  }
};

template <class R>
FD_INLINE typename Wide<R>::Vector load_vector(const R* from) {
  typename Wide<R>::Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class R>
FD_INLINE void store_vector(R* to, typename Wide<R>::Vector v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Where a tile goes: whole vectors.
template <class R>
struct TileOut {
  R* to;
  int64_t step;      // from row to row
  bool first;        // nothing is there yet
  Squares* squares;  // or null: more will be added
};

template <class R, int ROWS, int VECTORS>
__attribute__((noinline)) static void product_tile(const R* of, const Places& p, int64_t row,
                                                   const int64_t* at, int64_t depth, const R* by,
                                                   const TileOut<R>& out) {
  using V = typename Wide<R>::Vector;
  constexpr int lanes = Wide<R>::lanes;
  const R* x[ROWS];
  V sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    x[r] = of + p.row[row + r];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[r][v] = V{};
  }
  for (int64_t t = 0; t < depth; t++) {
    V y[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) y[v] = load_vector(by + v * lanes);
    by += VECTORS * lanes;
    const int64_t place = at[t];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const R one = x[r][place];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] += one * y[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      R* to = out.to + r * out.step + v * lanes;
      if (!out.first) sum[r][v] += load_vector(to);
      store_vector(to, sum[r][v]);
    }
  }
  if (!out.squares) return;
  Squares squares = *out.squares;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) squares.add(sum[r][v], 2 * (r * VECTORS + v));
  }
  *out.squares = squares;
}

template <class R, int VECTORS, int ROWS = kTileRows>
FD_INLINE void product_rows(const R* of, const Places& p, int64_t row, int64_t rows,
                            const int64_t* at, int64_t depth, const R* by, const TileOut<R>& out) {
  if (rows == ROWS) return product_tile<R, ROWS, VECTORS>(of, p, row, at, depth, by, out);
  if constexpr (ROWS > 1) product_rows<R, VECTORS, ROWS - 1>(of, p, row, rows, at, depth, by, out);
}

// All rows by one panel of VECTORS vectors.
template <class R, int VECTORS = kTileVectors>
static void product_panel(int vectors, const R* of, const Places& p, const int64_t* at,
                          int64_t depth, const R* by, TileOut<R> out) {
  if (vectors < VECTORS) {
    if constexpr (VECTORS > 1) product_panel<R, VECTORS - 1>(vectors, of, p, at, depth, by, out);
    return;
  }
  for (int64_t row = 0; row < p.rows; row += kTileRows) {
    const int64_t rows = p.rows - row < kTileRows ? p.rows - row : kTileRows;
    product_rows<R, VECTORS>(of, p, row, rows, at, depth, by, out);
    out.to += kTileRows * out.step;
  }
}

// The product of one sample (or of one of its groups). `pack(first, depth, column, width, to)`
// brings by[first .. first + depth, column .. column + width) to `to`, in rows of whole vectors
// with zeros at their ends. A panel that is not whole is made in `margin` and copied.
template <class R, class Pack>
static void sample_product(const R* of, const Places& p, int64_t columns, const Pack& pack,
                           R* panel, R* margin, R* out, Squares& squares) {
  constexpr int64_t lanes = Wide<R>::lanes, most = kTileVectors * lanes;
  // Blocks of about one size: a short one would cost as much to load and to store.
  const int64_t blocks = p.depth > kDepth ? (p.depth + kDepth - 1) / kDepth : 1;
  const int64_t block = (p.depth + blocks - 1) / blocks;
  for (int64_t column = 0; column < columns; column += most) {
    const int64_t width = columns - column < most ? columns - column : most;
    const int64_t vectors = (width + lanes - 1) / lanes, step = vectors * lanes;
    const bool whole = width == step;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t first = i * block;
      const int64_t depth = p.depth - first < block ? p.depth - first : block;
      pack(first, depth, column, width, step, panel);
      const TileOut<R> to = {whole ? out + column : margin, whole ? columns : step, i == 0,
                             i == blocks - 1 ? &squares : nullptr};
      product_panel<R>(static_cast<int>(vectors), of, p, p.at + first, depth, panel, to);
    }
    if (whole) continue;
    for (int64_t row = 0; row < p.rows; row++)
      for (int64_t j = 0; j < width; j++) out[row * columns + column + j] = margin[row * step + j];
  }
}

// Of a panel and its margin.
template <class R>
FD_INLINE int64_t panel_size() {
  return kDepth * kTileVectors * Wide<R>::lanes;
}

template <class R>
FD_INLINE int64_t margin_size(int64_t rows, int64_t columns) {
  return columns % Wide<R>::lanes ? rows * kTileVectors * Wide<R>::lanes : 0;
}

template <class R>
static void linear_range(const LinearProducts& c, const Places& p, int64_t begin, int64_t end,
                         void* scratch) {
  R *panel = static_cast<R*>(scratch), *margin = panel + panel_size<R>();
  for (int64_t i = begin; i < end; i++) {
    const R* a = static_cast<const R*>(c.a) + i * c.a_sample;
    const auto pack = [&](int64_t first, int64_t depth, int64_t column, int64_t width,
                          int64_t padded_width, R* to) {
      for (int64_t t = 0; t < depth; t++) {
        const R* from = a + (first + t) * c.a_row + column;
        if (width == kTileVectors * Wide<R>::lanes) {
          __builtin_memcpy(to, from, kTileVectors * FD_VECTOR);
        } else {
          for (int64_t j = 0; j < width; j++) to[j] = from[j];
          for (int64_t j = width; j < padded_width; j++) to[j] = R(0);
        }
        to += padded_width;
      }
    };
    Squares squares;
    squares.clear();
    sample_product(static_cast<const R*>(c.g) + i * c.g_sample, p, c.inputs, pack, panel, margin,
                   static_cast<R*>(c.made) + i * c.outputs * c.inputs, squares);
    c.square[i] = squares.total();
  }
}

FD_INLINE bool has_padding(const ConvolutionProducts& c) { return c.padding[0] || c.padding[1]; }

FD_INLINE int64_t padded_plane(const ConvolutionProducts& c) {
  return (c.in[0] + 2 * c.padding[0]) * (c.in[1] + 2 * c.padding[1]);
}

// The channels of one group of a sample with the zeros around them, which are there already.
template <class R>
static void copy_inside(const ConvolutionProducts& c, const R* x, R* to) {
  const int64_t width = c.in[1] + 2 * c.padding[1];
  for (int64_t channel = 0; channel < c.channels; channel++) {
    R* row = to + channel * padded_plane(c) + c.padding[0] * width + c.padding[1];
    for (int64_t y = 0; y < c.in[0]; y++) {
      for (int64_t j = 0; j < c.in[1]; j++) row[j] = x[j];
      x += c.in[1];
      row += width;
    }
  }
}

// to[t][j] = from[j][first + t] for j < width, else 0.
template <class R>
static void pack_transposed(const R* from, int64_t length, int64_t first, int64_t depth,
                            int64_t width, int64_t padded_width, R* to) {
  int64_t j = 0;
  if constexpr (sizeof(R) == sizeof(float)) {
    for (; j + kLanes <= width && depth >= kLanes; j += kLanes) {
      for (int64_t t = 0; t < depth; t = next_columns(t, depth)) {
        const float* rows[kLanes];
        float* columns[kLanes];
        for (int k = 0; k < kLanes; k++) {
          rows[k] = from + (j + k) * length + first + t;
          columns[k] = to + (t + k) * padded_width + j;
        }
        transpose(rows, columns);
      }
    }
  }
  for (; j < padded_width; j++)
    for (int64_t t = 0; t < depth; t++)
      to[t * padded_width + j] = j < width ? from[j * length + first + t] : R(0);
}

template <class R>
static void convolution_range(const ConvolutionProducts& c, const Places& p, int64_t begin,
                              int64_t end, void* scratch) {
  R *panel = static_cast<R*>(scratch), *margin = panel + panel_size<R>();
  R* inside = margin + margin_size<R>(p.rows, c.outputs);
  const int64_t plane = c.in[0] * c.in[1], size = p.rows * c.outputs;
  if (has_padding(c))
    for (int64_t j = 0; j < c.channels * padded_plane(c); j++) inside[j] = R(0);
  for (int64_t i = begin; i < end; i++) {
    Squares squares;
    squares.clear();
    for (int64_t k = i * c.groups; k < (i + 1) * c.groups; k++) {
      const R* x = static_cast<const R*>(c.x) + k * c.channels * plane;
      const R* g = static_cast<const R*>(c.g) + k * c.outputs * p.depth;
      if (has_padding(c)) copy_inside(c, x, inside);
      const auto pack = [&](int64_t first, int64_t depth, int64_t column, int64_t width,
                            int64_t padded_width, R* to) {
        pack_transposed(g + column * p.depth, p.depth, first, depth, width, padded_width, to);
      };
      sample_product(has_padding(c) ? inside : x, p, c.outputs, pack, panel, margin,
                     static_cast<R*>(c.made) + k * size, squares);
    }
    c.square[i] = squares.total();
  }
}

template <class R>
static size_t linear_scratch(const LinearProducts& c) {
  return static_cast<size_t>(panel_size<R>() + margin_size<R>(c.outputs, c.inputs)) * sizeof(R);
}

template <class R>
static size_t convolution_scratch(const ConvolutionProducts& c) {
  const int64_t rows = c.channels * c.kernel[0] * c.kernel[1];
  const int64_t inside = has_padding(c) ? c.channels * padded_plane(c) : 0;
  return static_cast<size_t>(panel_size<R>() + margin_size<R>(rows, c.outputs) + inside) *
         sizeof(R);
}

static size_t product_linear_scratch(const LinearProducts& c) {
  return c.in_double ? linear_scratch<double>(c) : linear_scratch<float>(c);
}

static void product_linear(const LinearProducts& c, const Places& p, int64_t begin, int64_t end,
                           void* scratch) {
  if (c.in_double) {
    linear_range<double>(c, p, begin, end, scratch);
  } else {
    linear_range<float>(c, p, begin, end, scratch);
  }
}

static size_t product_convolution_scratch(const ConvolutionProducts& c) {
  return c.in_double ? convolution_scratch<double>(c) : convolution_scratch<float>(c);
}

static void product_convolution(const ConvolutionProducts& c, const Places& p, int64_t begin,
                                int64_t end, void* scratch) {
  if (c.in_double) {
    convolution_range<double>(c, p, begin, end, scratch);
  } else {
    convolution_range<float>(c, p, begin, end, scratch);
  }
}

// sum[j] += the next SAMPLES samples: the sums are read and written once for all of them.
template <class R, int SAMPLES>
FD_INLINE void add_weighted(const R* x, int64_t step, const double* factor, bool first, int64_t n,
                            R* sum) {
  constexpr int lanes = Wide<R>::lanes;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    typename Wide<R>::Vector s{};
    if (!first) s = load_vector(sum + j);
#pragma GCC unroll 8
    for (int i = 0; i < SAMPLES; i++) s += R(factor[i]) * load_vector(x + i * step + j);
    store_vector(sum + j, s);
  }
  if (first)
    for (int64_t k = j; k < n; k++) sum[k] = R(0);
  for (int i = 0; i < SAMPLES; i++)
    for (int64_t k = j; k < n; k++) sum[k] += R(factor[i]) * x[i * step + k];
}

template <class R>
static void weighted_range(const WeightedSum& c, int64_t begin, int64_t end) {
  const R* x = static_cast<const R*>(c.x) + begin;
  R* sum = static_cast<R*>(c.sum) + begin;
  const int64_t n = end - begin;
  if (c.samples == 0)
    for (int64_t j = 0; j < n; j++) sum[j] = R(0);
  int64_t i = 0;
  for (; i + 8 <= c.samples; i += 8)
    add_weighted<R, 8>(x + i * c.size, c.size, c.factor + i, i == 0, n, sum);
  for (; i < c.samples; i++)
    add_weighted<R, 1>(x + i * c.size, c.size, c.factor + i, i == 0, n, sum);
}

static void product_weighted_sum(const WeightedSum& c, int64_t begin, int64_t end) {
  if (c.in_double) {
    weighted_range<double>(c, begin, end);
  } else {
    weighted_range<float>(c, begin, end);
  }
}
#undef FD_VECTOR
