// The distance of two feature vectors, for a range of rows, with its gradient: one read of each.
// Included once per instruction set, inside that set's namespace.
//
// A row is brought into L1 as the arithmetic's type, normalised there where that is asked for, and
// its gradient goes back through the normalisation before it is stored. Where nothing is normalised
// a distance by elements takes a chunk of kLanes straight from its types to that of the gradient. A
// cosine distance is half the squared distance of the unit vectors: 1 - cos would cancel where they
// are close.
#pragma once
#include "lanes.inl"
#include "stream.inl"

constexpr double kLayerNormEps = 1e-5;  // the defaults of torch's F.layer_norm,
constexpr double kL2Eps = 1e-12;        // F.normalize
constexpr double kCosineEps = 1e-8;     // and F.cosine_similarity

template <class R>
static R sum_of(const R* __restrict x, int64_t n) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i];
  return sum;
}

template <class R>
static R sum_of_products(const R* x, const R* y, int64_t n) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

// y = (x - mean) factor, or x factor.
template <class R>
struct Normalised {
  R factor;
  bool clamped;  // the norm is below its eps, which stands in its place: a constant
};

template <class R>
static Normalised<R> unit_factor(const R* x, int64_t n, double eps) {
  const double square = sum_of_products(x, x, n);
  const double norm = __builtin_sqrt(square);
  const bool clamped = norm < eps;  // a NaN is none
  return {R(1.0 / (clamped ? eps : norm)), clamped};
}

template <class R>
static void times(R* __restrict x, int64_t n, R factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

// In place. n is padded; what lies beyond `cols` is 0 and stays so.
template <class R>
static Normalised<R> normalise(FeatureNorm norm, R* __restrict x, int64_t cols, int64_t n) {
  if (norm == FeatureNorm::none) return {R(1), false};
  if (norm == FeatureNorm::l2) {
    const Normalised<R> unit = unit_factor(x, n, kL2Eps);
    times(x, n, unit.factor);
    return unit;
  }
  const R mean = sum_of(x, n) / R(cols);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] -= mean;
  for (int64_t i = cols; i < n; i++) x[i] = R(0);
  const double variance = sum_of_products(x, x, n) / R(cols);
  const R factor = R(1.0 / __builtin_sqrt(variance + kLayerNormEps));
  times(x, n, factor);
  return {factor, false};
}

// The gradient of the normalised y into that of x, in place.
template <class R>
static void through(FeatureNorm norm, Normalised<R> by, const R* __restrict y, int64_t cols,
                    int64_t n, R* __restrict g) {
  if (norm == FeatureNorm::none) return;
  const R rate = norm == FeatureNorm::l2 ? R(by.clamped ? 0 : 1) : R(1) / R(cols);
  const R mean = norm == FeatureNorm::l2 ? R(0) : sum_of(g, n) * rate;
  const R along = rate == R(0) ? R(0) : sum_of_products(g, y, n) * rate;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) g[i] = by.factor * ((g[i] - mean) - y[i] * along);
}

// What the difference of a feature adds, and its derivative.
template <class R, Distance D>
FD_INLINE R term(R d, R* slope) {
  if (D == Distance::mse) {
    *slope = d + d;
    return d * d;
  }
  const R size = d < R(0) ? -d : d;
  const R sign = d > R(0) ? R(1) : d < R(0) ? R(-1) : d;  // 0, or NaN
  if (D == Distance::l1) {
    *slope = sign;
    return size;
  }
  const bool near = size < R(1);
  *slope = near ? d : sign;
  return near ? R(0.5) * d * d : size - R(0.5);
}

// The sum over the features, and `factor` times its derivative into g.
template <class R, Distance D, bool GRADIENT>
static R elementwise(const R* __restrict x, const R* __restrict t, int64_t n, R factor,
                     R* __restrict g) {
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    R slope;
    sum += term<R, D>(x[i] - t[i], &slope);
    if (GRADIENT) g[i] = factor * slope;
  }
  return sum;
}

// kLanes elements of a type, or the first n of them and zeros: where they lie if they can stay so.
template <Type T>
FD_INLINE const float* take(const char* from, int64_t n, float* room) {
  if (n < kLanes) {
    for (int j = 0; j < kLanes; j++) room[j] = j < n ? element<float>(T, from, j) : 0;
  } else if (T == Type::f32) {
    return reinterpret_cast<const float*>(from);
  } else {
    widen(T, reinterpret_cast<const uint16_t*>(from), room);
  }
  return room;
}

template <Type T, bool PAST_CACHES>
FD_INLINE void give(const float* x, int64_t n, char* to) {
  constexpr int bytes = kLanes * (T == Type::f32 ? 4 : 2);
  alignas(64) uint16_t narrow[kLanes];
  const void* chunk = narrow;
  if (T == Type::f32) {
    chunk = x;
  } else if (T == Type::bf16) {
    narrow_bf16(x, narrow);
  } else {
    narrow_f16(x, narrow);
  }
  if (n < kLanes) {
    __builtin_memcpy(to, chunk, static_cast<size_t>(n * size_of(T)));
  } else if (PAST_CACHES) {
    stream_chunk<bytes>(to, chunk);
  } else {
    __builtin_memcpy(to, chunk, bytes);
  }
}

// The same straight from and to memory, for features of the types S and T and a gradient of the
// type G: `count` elements of a chunk, the terms of its lanes into `terms`.
template <Type S, Type T, Type G, Distance D, bool GRADIENT, bool PAST_CACHES>
FD_INLINE void straight_chunk(const char* x, const char* t, int64_t count, float factor, char* g,
                              float* __restrict terms) {
  alignas(64) float x_room[kLanes], t_room[kLanes], g_room[kLanes];
  const float* a = take<S>(x, count, x_room);  // which `g` may lie over
  const float* b = take<T>(t, count, t_room);
  const bool in_place = G == Type::f32 && !PAST_CACHES && count == kLanes;
  float* slopes = in_place ? reinterpret_cast<float*>(g) : g_room;
#pragma omp simd
  for (int j = 0; j < kLanes; j++) {
    float slope;
    terms[j] = term<float, D>(a[j] - b[j], &slope);
    if (GRADIENT) slopes[j] = factor * slope;
  }
  if (GRADIENT && !in_place) give<G, PAST_CACHES>(slopes, count, g);
}

// Whole chunks. By itself, and with a sum that is no array: else GCC keeps it in memory, and each
// turn waits for the store of the one before.
template <Type S, Type T, Type G, Distance D, bool GRADIENT, bool PAST_CACHES>
__attribute__((noinline)) static void straight_chunks(const char* x, const char* t, int64_t n,
                                                      float factor, char* g, float* total) {
#if defined(__AVX512F__)
  constexpr int width = 16;
#elif defined(__AVX__)
  constexpr int width = 8;
#else
  constexpr int width = 4;
#endif
  typedef float Vector __attribute__((vector_size(width * sizeof(float)), may_alias));
  constexpr int count = kLanes / width;
  Vector sum[count] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    alignas(64) float terms[kLanes];
    straight_chunk<S, T, G, D, GRADIENT, PAST_CACHES>(x + i * size_of(S), t + i * size_of(T),
                                                      kLanes, factor, g + i * size_of(G), terms);
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) sum[k] += reinterpret_cast<const Vector*>(terms)[k];
  }
#pragma GCC unroll 4
  for (int k = 0; k < count; k++) reinterpret_cast<Vector*>(total)[k] = sum[k];
}

template <Type S, Type T, Type G, Distance D, bool GRADIENT, bool PAST_CACHES>
static double straight(const char* x, const char* t, int64_t n, float factor, char* g) {
  const int64_t whole = n / kLanes * kLanes;
  Lanes<float> sum, last;
  straight_chunks<S, T, G, D, GRADIENT, PAST_CACHES>(x, t, whole, factor, g, sum.at);
  if (whole < n) {
    straight_chunk<S, T, G, D, GRADIENT, false>(x + whole * size_of(S), t + whole * size_of(T),
                                                n - whole, factor, g + whole * size_of(G), last.at);
    for (int j = 0; j < kLanes; j++) sum.at[j] += last.at[j];
  }
  return static_cast<double>(sum.sum());
}

template <class R>
static double short_of_one(const R* x, int64_t n, R factor) {
  const double unit = static_cast<double>(factor);
  return 0.5 * (1.0 - unit * unit * static_cast<double>(sum_of_products(x, x, n)));
}

// 1 - cos = |a - b|^2 / 2 for unit vectors a and b; a vector shorter than eps is not one, and adds
// half of what its square is short of 1. The derivative in x is ((a - b) - (1 - cos) a) / |x|.
template <class R>
static double cosine(const R* __restrict x, const R* __restrict t, int64_t n, double scale,
                     R* __restrict g) {
  const Normalised<R> of_x = unit_factor(x, n, kCosineEps), of_t = unit_factor(t, n, kCosineEps);
  const R a = of_x.factor, b = of_t.factor;
  // Vectors of about one length are differenced first: exactly 0 where they are equal, and no
  // rounding of the products where they are close.
  const bool near = a <= R(2) * b && b <= R(2) * a;
  R square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) {
    const R d = near ? (x[i] - t[i]) * a + t[i] * (a - b) : x[i] * a - t[i] * b;
    square += d * d;
  }
  double distance = 0.5 * static_cast<double>(square);
  if (of_x.clamped) distance += short_of_one(x, n, a);
  if (of_t.clamped) distance += short_of_one(t, n, b);
  if (g) {
    const R factor = R(scale) * a;
    const R along = of_x.clamped ? R(1) : R(distance);  // then a is constant: -b is left
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const R d = near ? (x[i] - t[i]) * a + t[i] * (a - b) : x[i] * a - t[i] * b;
      g[i] = factor * (d - along * (x[i] * a));
    }
  }
  return distance;
}

template <class R>
struct HintPass {
  const HintArgs& a;
  const int64_t n;  // padded
  const bool past_caches;
  R *x_room, *t_room, *g_room;  // [n] each

  // A row as R, 0 beyond its end: where it lies if it can stay so, else in `room`.
  const R* bring(const Rows& rows, int64_t row, int64_t inner, bool written, R* room) const {
    const R* from = load(rows.type, row_start(rows, row, inner), 0, a.cols, room);
    if (from != room) {
      if (!written) return from;
      __builtin_memcpy(room, from, static_cast<size_t>(a.cols) * sizeof(R));
    }
    for (int64_t i = a.cols; i < n; i++) room[i] = R(0);
    return room;
  }

  template <Distance D>
  double by_element(const R* x, const R* t, double scale, R* g) const {
    const double features = static_cast<double>(a.cols);
    const R factor = R(scale / features);
    const R sum = g ? elementwise<R, D, true>(x, t, n, factor, g)
                    : elementwise<R, D, false>(x, t, n, factor, g);
    return static_cast<double>(sum) / features;
  }

  double distance(const R* x, const R* t, double scale, R* g) const {
    switch (a.distance) {
      case Distance::mse:
        return by_element<Distance::mse>(x, t, scale, g);
      case Distance::l1:
        return by_element<Distance::l1>(x, t, scale, g);
      case Distance::smooth_l1:
        return by_element<Distance::smooth_l1>(x, t, scale, g);
      case Distance::cosine:
        return cosine(x, t, n, scale, g);
    }
    return 0;
  }

  template <Type S, Type T, Type G, Distance D>
  double straight_as(const char* x, const char* t, double scale, char* g) const {
    const float factor = static_cast<float>(scale / static_cast<double>(a.cols));
    if (!g) return straight<S, T, G, D, false, false>(x, t, a.cols, factor, g);
    if (past_caches) return straight<S, T, G, D, true, true>(x, t, a.cols, factor, g);
    return straight<S, T, G, D, true, false>(x, t, a.cols, factor, g);
  }

  // The distance times the number of features, if `straight` knows these types.
  template <Distance D>
  bool straight_row(const char* x, const char* t, double scale, char* g, double* sum) const {
    constexpr Type f32 = Type::f32, bf16 = Type::bf16;
    const Type from = a.student.type, to = g ? a.grad_type : a.teacher.type;
    if (to != a.teacher.type) return false;
    if (from == f32 && to == f32) {
      *sum = straight_as<f32, f32, f32, D>(x, t, scale, g);
    } else if (from == bf16 && to == bf16) {
      *sum = straight_as<bf16, bf16, bf16, D>(x, t, scale, g);
    } else if (from == f32 && to == bf16) {  // a projected block
      *sum = straight_as<f32, bf16, bf16, D>(x, t, scale, g);
    } else {
      return false;
    }
    return true;
  }

  bool straight_row(const char* x, const char* t, double scale, char* g, double* sum) const {
    switch (a.distance) {
      case Distance::mse:
        return straight_row<Distance::mse>(x, t, scale, g, sum);
      case Distance::l1:
        return straight_row<Distance::l1>(x, t, scale, g, sum);
      case Distance::smooth_l1:
        return straight_row<Distance::smooth_l1>(x, t, scale, g, sum);
      case Distance::cosine:
        return false;
    }
    return false;
  }

  void row(int64_t r) const {
    const int64_t at = a.at ? a.at[r] : a.first + r;
    const double scale = a.row_scale ? a.row_scale[at] : a.uniform;
    char* out = static_cast<char*>(a.grad) + r * a.grad_step * size_of(a.grad_type);
    R* sums = static_cast<R*>(a.bias_grad) + r / kBiasRows * a.cols;
    if (a.bias_grad && r % kBiasRows == 0)
      for (int64_t i = 0; i < a.cols; i++) sums[i] = R(0);
    if (scale == 0) {
      a.loss[at] = 0;
      if (a.grad) __builtin_memset(out, 0, static_cast<size_t>(a.cols * size_of(a.grad_type)));
      return;
    }
    const bool norm_x = a.student_norm != FeatureNorm::none;
    const bool norm_t = a.teacher_norm != FeatureNorm::none;
    const int64_t t_row = a.teacher_in_block ? r : at;
    if (sizeof(R) == 4 && !a.bias && !a.bias_grad && !norm_x && !norm_t) {
      const char* from = row_start(a.student, r, a.student_inner);
      const char* target = row_start(a.teacher, t_row, a.teacher_inner);
      double sum;
      if (straight_row(from, target, scale, a.grad ? out : nullptr, &sum)) {
        a.loss[at] = sum / static_cast<double>(a.cols);
        return;
      }
    }
    const R* x = bring(a.student, r, a.student_inner, a.bias || norm_x, x_room);
    const R* t = bring(a.teacher, t_row, a.teacher_inner, norm_t, t_room);
    if (a.bias) {
      const R* __restrict bias = static_cast<const R*>(a.bias);
#pragma omp simd
      for (int64_t i = 0; i < a.cols; i++) x_room[i] += bias[i];
    }
    const Normalised<R> by = normalise(a.student_norm, x_room, a.cols, n);
    normalise(a.teacher_norm, t_room, a.cols, n);
    // Straight into place where nothing has to be converted, and the row itself is not read there.
    const bool in_place = a.grad_type == TypeOf<R>::value && a.cols == n &&
                          static_cast<const void*>(x) != static_cast<void*>(out);
    R* g = !a.grad ? nullptr : in_place ? reinterpret_cast<R*>(out) : g_room;
    a.loss[at] = distance(x, t, scale, g);
    if (!g) return;
    through(a.student_norm, by, x, a.cols, n, g);
    if (a.bias_grad) {
#pragma omp simd
      for (int64_t i = 0; i < a.cols; i++) sums[i] += g[i];
    }
    if (!in_place) store(a.grad_type, out, 0, a.cols, g);
  }
};

template <class R>
static void hint_range(const HintArgs& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t n = padded(a.cols);
  R* at = static_cast<R*>(scratch);
  const int64_t chunk = kLanes * size_of(a.grad_type), step = a.grad_step * size_of(a.grad_type);
  const bool aligned = (reinterpret_cast<uintptr_t>(a.grad) | static_cast<uintptr_t>(step)) %
                           static_cast<uintptr_t>(chunk) ==
                       0;
  const HintPass<R> pass{a, n, a.past_caches && aligned, at, at + n, at + 2 * n};
  for (int64_t r = begin; r < end; r++) pass.row(r);
  if (pass.past_caches) stream_fence();
}

static size_t hint_scratch_bytes(const HintArgs& a) {
  return static_cast<size_t>(padded(a.cols)) * 3 * (a.in_double ? 8 : 4);
}

static void hint_rows(const HintArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.in_double) {
    hint_range<double>(a, begin, end, scratch);
  } else {
    hint_range<float>(a, begin, end, scratch);
  }
}
