// softmax(x / T) or its logarithm for a range of rows, and the gradients of x and T.
// Included once per instruction set, inside that set's namespace.
//
// Rows of few classes go kLanes at once, a row to a lane (tile.inl): nothing is padded, nothing is
// folded, and what a row costs beside its classes is shared by vectors. Others go one at a time: a
// row is read from memory once, in blocks of classes; what is read again comes from the caches.
// The forward pass takes the exponentials of a block at the block's own maximum, and rescales them
// when the row's is known. The backward pass takes them anew, at the maximum and the sum that the
// forward pass has left: so the probabilities are exact in every element type, where an output
// rounded to bfloat16 would give them with an error of 0.4 %, and its exponential with one of 3 %.
#pragma once
#include "tile.inl"

constexpr int64_t kSoftmaxBlock = 2048;  // classes: inputs, exponentials and output fit in L1
constexpr int64_t kSoftmaxPiece = 64;    // classes of a tile that are summed in R

// Whether rows go kLanes at once: they have one temperature.
template <class R>
FD_INLINE bool softmax_few(const SoftmaxRows& a) {
  return sizeof(R) == 4 && a.uniform && a.cols <= kSoftmaxFew;
}

// The backward pass has a transpose more, and none is needed of a gradient of T, summed in double.
template <class R>
FD_INLINE bool softmax_few(const SoftmaxGradArgs& f) {
  const bool in_place = f.of.x.type == Type::f32 && f.of.cols % kLanes == 0;
  return softmax_few<R>(f.of) && !f.grad_temperature && !(in_place && f.of.cols > 96);
}

template <class R>
FD_INLINE bool softmax_few(const SoftmaxArgs& f) {
  return softmax_few<R>(f.of);
}

template <class R>
static R block_maximum(const R* __restrict x, int64_t n) {
  Lanes<R> m;
  m.fill(-static_cast<R>(__builtin_inf()));
  for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; j++) m.at[j] = larger(x[i + j], m.at[j]);
  }
  return m.maximum();
}

// The sum of e = exp((x - from) / T). What follows comes from memory while this computes: without
// it the next maximum waits.
template <class R, bool KEEP>
static R block_exponentials(const R* __restrict x, int64_t n, R from, Exp<R> at_t, R* __restrict e,
                            Ahead next) {
  Lanes<R> sum;
  sum.fill(R(0));
  for (int64_t i = 0; i < n; i += kLanes) {
    __builtin_prefetch(next.data + i * next.bytes, 0, 2);  // into L2: L1 is full
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      const R v = at_t(x[i + j] - from);
      if (KEEP) e[i + j] = v;
      sum.at[j] += v;
    }
  }
  return sum.sum();
}

// The same exponentials, and the sum of g e; of g for the logarithm.
template <class R, bool LOG>
static R block_dot(const R* __restrict x, const R* __restrict g, int64_t n, R from, Exp<R> at_t,
                   R* __restrict e, Ahead next_x, Ahead next_g) {
  Lanes<R> sum;
  sum.fill(R(0));
  for (int64_t i = 0; i < n; i += kLanes) {
    __builtin_prefetch(next_x.data + i * next_x.bytes, 0, 2);
    __builtin_prefetch(next_g.data + i * next_g.bytes, 0, 2);
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      const R v = at_t(x[i + j] - from);
      e[i + j] = v;
      sum.at[j] += LOG ? g[i + j] : g[i + j] * v;
    }
  }
  return sum.sum();
}

// The sum of (x - from) (g - mean) e, or for the logarithm of (x - from) (g - mean e), in which a
// masked class, x = -inf, has no part at any T. In double: it cancels down to a hundredth.
template <class R, bool LOG>
static double block_moment(const R* __restrict x, const R* __restrict g, const R* __restrict e,
                           int64_t n, R from, double mean) {
  Lanes<double> sum;
  sum.fill(0);
  for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      const R d = x[i + j] - from;
      const double v = e[i + j], w = g[i + j];
      const double u = LOG ? w - v * mean : v * (w - mean);
      sum.at[j] += d == -static_cast<R>(__builtin_inf()) ? 0.0 : u * static_cast<double>(d);
    }
  }
  return sum.sum();
}

FD_INLINE double statistic(const void* stats, bool is_double, int64_t i) {
  return is_double ? static_cast<const double*>(stats)[i] : static_cast<const float*>(stats)[i];
}

FD_INLINE void put_statistic(void* stats, bool is_double, int64_t i, double value) {
  if (is_double) {
    static_cast<double*>(stats)[i] = value;
  } else {
    static_cast<float*>(stats)[i] = static_cast<float>(value);
  }
}

// What a thread keeps for the row at hand.
template <class R>
struct SoftmaxBuffers {
  R* e;               // [cols]: its exponentials
  R *x, *g, *out;     // [block]; x and g of few classes [cols, kLanes]
  double *top, *sum;  // [blocks]: maxima and sums of the exponentials, then the factors
};

template <class R>
static SoftmaxBuffers<R> softmax_buffers(const SoftmaxRows& a, void* scratch, size_t* bytes) {
  char* at = static_cast<char*>(scratch);
  const auto take = [&at](int64_t n) {
    char* p = at;
    at += (n + 63) / 64 * 64;
    return p;
  };
  const int64_t size = sizeof(R), blocks = (a.cols + kSoftmaxBlock - 1) / kSoftmaxBlock;
  const int64_t tile = softmax_few<R>(a) ? a.cols * kLanes : 0;
  const int64_t inputs = tile > kSoftmaxBlock ? tile : kSoftmaxBlock;
  SoftmaxBuffers<R> b;
  b.e = reinterpret_cast<R*>(take(padded(a.cols) * size));
  b.x = reinterpret_cast<R*>(take(inputs * size));
  b.g = reinterpret_cast<R*>(take(inputs * size));
  b.out = reinterpret_cast<R*>(take(kSoftmaxBlock * size));
  b.top = reinterpret_cast<double*>(take(blocks * 8));
  b.sum = reinterpret_cast<double*>(take(blocks * 8));
  if (bytes) *bytes = static_cast<size_t>(at - static_cast<char*>(scratch));
  return b;
}

// What a temperature makes of differences of logits.
template <class R>
struct Tempered {
  double inv_t;
  Exp<R> exp;
  Exp<double> wide_exp;
  explicit Tempered(double t) : inv_t(1.0 / t), exp(inv_t), wide_exp(inv_t) {}
};

template <class R>
struct SoftmaxPass {
  const SoftmaxRows& a;
  const SoftmaxBuffers<R> w;

  int64_t length(int64_t first) const {
    const int64_t left = a.cols - first;
    return left < kSoftmaxBlock ? left : kSoftmaxBlock;
  }

  // What comes after a block: the next one, or the next row.
  Ahead after(const Rows& rows, const char* row, int64_t first) const {
    const int64_t bytes = size_of(rows.type);
    const int64_t next = first + kSoftmaxBlock < a.cols ? first + kSoftmaxBlock : rows.step;
    return {row + next * bytes, bytes};
  }

  // Padding of a gradient is 0, not -inf: times an exponential of 0 it must stay out of the sums.
  const R* load_gradient(const Rows& grad, const char* row, int64_t first, int64_t n) const {
    const R* g = load(grad.type, row, first, n, w.g);
    if (g == w.g)
      for (int64_t i = n; i < padded(n); i++) w.g[i] = R(0);
    return g;
  }

  void put(void* y, int64_t row, int64_t first, int64_t n) const {
    char* to = static_cast<char*>(y) + row * a.cols * size_of(a.x.type);
    store(a.x.type, to, first, n, w.out);
  }

  template <bool LOG>
  void forward(const SoftmaxArgs& f, int64_t row, const Tempered<R>& t) const {
    const char* from = row_start(a.x, row, a.inner);
    double m = -__builtin_inf(), sum = 0;
    int64_t blocks = 0;
    for (int64_t first = 0; first < a.cols; first += kSoftmaxBlock, blocks++) {
      const int64_t n = padded(length(first));
      const R* x = load(a.x.type, from, first, length(first), w.x);
      const R top = block_maximum(x, n);
      const R base = top == -static_cast<R>(__builtin_inf()) ? R(0) : top;  // exp(-inf - 0) = 0
      w.sum[blocks] =
          block_exponentials<R, !LOG>(x, n, base, t.exp, w.e + first, after(a.x, from, first));
      w.top[blocks] = top;
      m = top > m ? top : m;
    }
    for (int64_t b = 0; b < blocks; b++) {
      w.top[b] = t.wide_exp(w.top[b] - m);  // 1 at the maximum; NaN for a row of -inf, or of +inf
      sum += w.sum[b] * w.top[b];
    }
    put_statistic(f.stats, f.stats_double, row, m);
    put_statistic(f.stats, f.stats_double, a.rows + row, sum);
    const R log_sum = LOG ? R(log1p_positive(sum - 1.0)) : R(0), top = R(m), inv_t = R(t.inv_t);
    for (int64_t first = 0, b = 0; first < a.cols; first += kSoftmaxBlock, b++) {
      const int64_t n = padded(length(first));
      R* __restrict out = w.out;
      if (LOG) {
        const R* __restrict x = load(a.x.type, from, first, length(first), w.x);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = (x[i] - top) * inv_t - log_sum;
      } else {
        const R* __restrict e = w.e + first;
        const R factor = R(w.top[b] / sum);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = e[i] * factor;
      }
      put(f.y, row, first, length(first));
    }
  }

  // Of softmax p (g - sum g p) / T, of its logarithm (g - p sum g) / T. That of T is
  // -sum gx (x - m) / T with either: the sum of gx is 0, so any m will do, and the row's maximum
  // keeps the terms small.
  template <bool LOG>
  void backward(const SoftmaxGradArgs& f, int64_t row, const Tempered<R>& t) const {
    const char* at_x = row_start(a.x, row, a.inner);
    const char* at_g = row_start(f.grad, row, a.inner);
    const R m = R(statistic(f.stats, f.stats_double, row));
    const double sum = statistic(f.stats, f.stats_double, a.rows + row);
    double total = 0;
    for (int64_t first = 0; first < a.cols; first += kSoftmaxBlock) {
      const int64_t n = padded(length(first));
      const R* g = load_gradient(f.grad, at_g, first, length(first));
      const R* x = load(a.x.type, at_x, first, length(first), w.x);
      total += block_dot<R, LOG>(x, g, n, m, t.exp, w.e + first, after(a.x, at_x, first),
                                 after(f.grad, at_g, first));
    }
    const double exact_mean = total / sum;
    const R mean = R(exact_mean);
    const R inv_t = R(t.inv_t), factor = R(t.inv_t / sum);
    double moment = 0;
    for (int64_t first = 0; first < a.cols; first += kSoftmaxBlock) {
      const int64_t n = padded(length(first));
      const R* __restrict g = load_gradient(f.grad, at_g, first, length(first));
      R* __restrict out = w.out;
      const R* __restrict e = w.e + first;
#pragma omp simd
      for (int64_t i = 0; i < n; i++)
        out[i] = LOG ? (g[i] - e[i] * mean) * inv_t : e[i] * factor * (g[i] - mean);
      if (f.grad_temperature) {
        const R* x = load(a.x.type, at_x, first, length(first), w.x);
        moment += block_moment<R, LOG>(x, g, e, n, m, exact_mean);
      }
      put(f.grad_x, row, first, length(first));
    }
    if (f.grad_temperature) {
      const double value = -moment * t.inv_t * t.inv_t / (LOG ? 1.0 : sum);
      put_statistic(f.grad_temperature, f.stats_double, row, value);
    }
  }

  // ---- kLanes rows at once, a row to a lane; x and g become what is written.

  // The rows of a tile, and their maxima; of fewer than kLanes the last one again.
  template <bool TOP>
  Lanes<float> load_rows(const Rows& rows, int64_t row, int count, R* to) const {
    const char* at[kLanes];
    for (int j = 0; j < kLanes; j++)
      at[j] = row_start(rows, row + (j < count ? j : count - 1), a.inner);
    return load_tile<TOP>(rows.type, at, a.cols, to);
  }

  // The rows after a tile, and those that it will write: asked for while it computes.
  Ahead tile_after(const Rows& rows, int64_t row) const {
    const int64_t bytes = size_of(rows.type);
    return {row_start(rows, row, a.inner) + kLanes * rows.step * bytes, bytes};
  }
  Ahead tile_of(void* y, int64_t row) const {
    const int64_t bytes = size_of(a.x.type);
    return {static_cast<char*>(y) + row * a.cols * bytes, bytes};
  }

  void put_rows(void* y, int64_t row, int count, const R* from) const {
    char* at[kLanes];
    for (int j = 0; j < kLanes; j++)
      at[j] = static_cast<char*>(y) + (row + j) * a.cols * size_of(a.x.type);
    store_tile(a.x.type, at, count, a.cols, from);
  }

  template <bool LOG>
  void forward_tile(const SoftmaxArgs& f, int64_t row, int count, const Tempered<R>& t) const {
    const int64_t n = a.cols * kLanes, piece = kSoftmaxPiece * kLanes;
    R* __restrict x = w.x;
    const Lanes<R> m = load_rows<true>(a.x, row, count, x);
    Lanes<R> base, scale;
    for (int j = 0; j < kLanes; j++)
      base.at[j] = m.at[j] == -static_cast<R>(__builtin_inf()) ? R(0) : m.at[j];
    const Ahead next = tile_after(a.x, row), to = tile_of(f.y, row);
    Lanes<double> sum;
    sum.fill(0);
    for (int64_t first = 0; first < n; first += piece) {
      const int64_t end = first + piece < n ? first + piece : n;
      Lanes<R> part;
      part.fill(R(0));
      for (int64_t i = first; i < end; i += kLanes) {
        __builtin_prefetch(next.data + i * next.bytes, 0, 2);
        __builtin_prefetch(to.data + i * to.bytes, 1, 2);
#pragma omp simd
        for (int j = 0; j < kLanes; j++) {
          const R v = t.exp(x[i + j] - base.at[j]);
          if (!LOG) x[i + j] = v;
          part.at[j] += v;
        }
      }
#pragma omp simd
      for (int j = 0; j < kLanes; j++) sum.at[j] += part.at[j];
    }
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      sum.at[j] *= 1.0 + (m.at[j] - m.at[j]);  // NaN for a row of -inf, or of +inf
      scale.at[j] = LOG ? R(log1p_positive(sum.at[j] - 1.0)) : R(1.0 / sum.at[j]);
    }
    for (int j = 0; j < count; j++) {
      put_statistic(f.stats, f.stats_double, row + j, m.at[j]);
      put_statistic(f.stats, f.stats_double, a.rows + row + j, sum.at[j]);
    }
    const R inv_t = R(t.inv_t);
    for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; j++)
        x[i + j] = LOG ? (x[i + j] - m.at[j]) * inv_t - scale.at[j] : x[i + j] * scale.at[j];
    }
    put_rows(f.y, row, count, x);
  }

  template <bool LOG>
  void backward_tile(const SoftmaxGradArgs& f, int64_t row, int count, const Tempered<R>& t) const {
    const int64_t n = a.cols * kLanes, piece = kSoftmaxPiece * kLanes;
    R* __restrict x = w.x;
    R* __restrict g = w.g;
    load_rows<false>(a.x, row, count, x);
    load_rows<false>(f.grad, row, count, g);
    Lanes<R> m, mean, factor;
    Lanes<double> sum, total;
    for (int j = 0; j < kLanes; j++) {
      const int64_t r = row + (j < count ? j : count - 1);
      m.at[j] = R(statistic(f.stats, f.stats_double, r));
      sum.at[j] = statistic(f.stats, f.stats_double, a.rows + r);
    }
    const Ahead next_x = tile_after(a.x, row), next_g = tile_after(f.grad, row);
    const Ahead to = tile_of(f.grad_x, row);
    total.fill(0);
    for (int64_t first = 0; first < n; first += piece) {
      const int64_t end = first + piece < n ? first + piece : n;
      Lanes<R> part;
      part.fill(R(0));
      for (int64_t i = first; i < end; i += kLanes) {
        __builtin_prefetch(next_x.data + i * next_x.bytes, 0, 2);
        __builtin_prefetch(next_g.data + i * next_g.bytes, 0, 2);
        __builtin_prefetch(to.data + i * to.bytes, 1, 2);
#pragma omp simd
        for (int j = 0; j < kLanes; j++) {
          const R v = t.exp(x[i + j] - m.at[j]);
          x[i + j] = v;
          part.at[j] += LOG ? g[i + j] : g[i + j] * v;
        }
      }
#pragma omp simd
      for (int j = 0; j < kLanes; j++) total.at[j] += part.at[j];
    }
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      mean.at[j] = R(total.at[j] / sum.at[j]);
      factor.at[j] = R(t.inv_t / sum.at[j]);
    }
    const R inv_t = R(t.inv_t);
    for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; j++)
        g[i + j] = LOG ? (g[i + j] - x[i + j] * mean.at[j]) * inv_t
                       : x[i + j] * factor.at[j] * (g[i + j] - mean.at[j]);
    }
    put_rows(f.grad_x, row, count, g);
  }

  template <bool LOG, bool FORWARD, class Args>
  void run_tiles(const Args& f, int64_t begin, int64_t end) const {
    const Tempered<R> t(a.temperature[0]);
    for (int64_t row = begin; row < end; row += kLanes) {
      const int count = static_cast<int>(end - row < kLanes ? end - row : kLanes);
      if constexpr (FORWARD) {
        forward_tile<LOG>(f, row, count, t);
      } else {
        backward_tile<LOG>(f, row, count, t);
      }
    }
  }

  template <bool LOG, bool FORWARD, class Args>
  void run(const Args& f, int64_t begin, int64_t end) const {
    if constexpr (sizeof(R) == 4) {
      if (softmax_few<R>(f)) return run_tiles<LOG, FORWARD>(f, begin, end);
    }
    Tempered<R> t(a.temperature[a.uniform ? 0 : begin]);
    for (int64_t row = begin; row < end; row++) {
      if (!a.uniform && row > begin) t = Tempered<R>(a.temperature[row]);
      if constexpr (FORWARD) {
        forward<LOG>(f, row, t);
      } else {
        backward<LOG>(f, row, t);
      }
    }
  }
};

template <class R, bool FORWARD, class Args>
static void softmax_rows(const Args& f, int64_t begin, int64_t end, void* scratch) {
  const SoftmaxPass<R> pass{f.of, softmax_buffers<R>(f.of, scratch, nullptr)};
  if (f.of.log) {
    pass.template run<true, FORWARD>(f, begin, end);
  } else {
    pass.template run<false, FORWARD>(f, begin, end);
  }
}

static size_t softmax_scratch_bytes(const SoftmaxRows& a) {
  size_t bytes = 0;
  if (a.wide) {
    softmax_buffers<double>(a, nullptr, &bytes);
  } else {
    softmax_buffers<float>(a, nullptr, &bytes);
  }
  return bytes;
}

static void softmax_forward(const SoftmaxArgs& f, int64_t begin, int64_t end, void* scratch) {
  if (f.of.wide) return softmax_rows<double, true>(f, begin, end, scratch);
  softmax_rows<float, true>(f, begin, end, scratch);
}

static void softmax_backward(const SoftmaxGradArgs& f, int64_t begin, int64_t end, void* scratch) {
  if (f.of.wide) return softmax_rows<double, false>(f, begin, end, scratch);
  softmax_rows<float, false>(f, begin, end, scratch);
}
