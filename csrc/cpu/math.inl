// Branch-free elementary functions that the compiler vectorises inside `omp simd` loops.
// Included once per instruction set, inside that set's namespace.
#pragma once

#define FD_INLINE_MEMBER inline __attribute__((always_inline))
#define FD_INLINE static inline __attribute__((always_inline))

template <class R>
struct Real;

template <>
struct Real<float> {
  using Bits = int32_t;
  using Unsigned = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23 + exponent bias
  static constexpr double lowest = -88.0;               // exp of it and below is 0
};

template <>
struct Real<double> {
  using Bits = int64_t;
  using Unsigned = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double magic = 6755399441055744.0 + 1023.0;
  static constexpr double lowest = -709.1;
};

template <class R>
FD_INLINE typename Real<R>::Bits bits_of(R x) {
  typename Real<R>::Bits b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b;
}

template <class R>
FD_INLINE R from_bits(typename Real<R>::Bits b) {
  R x;
  __builtin_memcpy(&x, &b, sizeof x);
  return x;
}

// (2^f - 1) / f on |f| <= 1/2: minimax of degree 5 (error 4e-9 of 2^f), and the Chebyshev
// interpolant of degree 10 (6e-18).
FD_INLINE float exp2_tail(float f) {
  float p = 1.54697880735e-4f;
  p = p * f + 1.33909127944e-3f;
  p = p * f + 9.61803061345e-3f;
  p = p * f + 5.55035701933e-2f;
  p = p * f + 0.240226510851f;
  return p * f + 0.693147188047f;
}

FD_INLINE double exp2_tail(double f) {
  double p = 4.4549643712692967898e-10;
  p = p * f + 7.0725930278789965689e-9;
  p = p * f + 1.0178062426976923424e-7;
  p = p * f + 1.3215442552522291478e-6;
  p = p * f + 1.5252733829867080582e-5;
  p = p * f + 1.540353044179413737e-4;
  p = p * f + 1.3333558146416916877e-3;
  p = p * f + 9.6181291076068539459e-3;
  p = p * f + 5.5504108664821594368e-2;
  p = p * f + 0.24022650695910098274;
  return p * f + 0.69314718055994530942;
}

// exp(k d) for d <= 0, with k log2(e) in two parts: the product is exact where there is an FMA.
template <class R>
struct Exp {
  R high, low, lowest;

  explicit Exp(double k) {
    const long double rate = k * 1.44269504088896340735992468100189214L;
    high = static_cast<R>(rate);
    low = static_cast<R>(rate - high);
    lowest = static_cast<R>(Real<R>::lowest / k);
  }

  // Exactly 1 at 0, exactly 0 below the normal range (also at -inf), NaN at NaN.
  FD_INLINE_MEMBER R operator()(R d) const {
    using T = Real<R>;
    using U = typename T::Bits;
    const R x = lowest > d ? lowest : d;  // in this order a NaN stays one
    const R shifted = x * high + T::magic;
    const R n = shifted - T::magic;
    const R f = (x * high - n) + x * low;
    const R p = exp2_tail(f) * f + R(1);
    // 2^n as a factor, not added to the exponent: NaN p stays NaN. At `lowest` its bits are 0.
    return p * from_bits<R>(static_cast<U>(static_cast<typename T::Unsigned>(bits_of<R>(shifted))
                                           << T::mantissa));
  }
};

// (exp(v) - 1 - v) / v^2 on |v| < 0.1: minimax of degree 3 (3e-8) and 8 (2e-19).
FD_INLINE float bregman_tail(float v) {
  float p = 8.33631002327e-3f;
  p = p * v + 4.16805578589e-2f;
  p = p * v + 0.166666656744f;
  return p * v + 0.499999982635f;
}

FD_INLINE double bregman_tail(double v) {
  double p = 2.7563060867746342921e-7;
  p = p * v + 2.7562956496294149007e-6;
  p = p * v + 2.4801586740458566167e-5;
  p = p * v + 1.9841269418461054645e-4;
  p = p * v + 1.3888888888911725616e-3;
  p = p * v + 8.3333333333450781972e-3;
  p = p * v + 4.1666666666663323e-2;
  p = p * v + 0.16666666666666665786;
  return p * v + 0.5;
}

// log(1 + x) for -1 < x < 2^52, relative error of a few eps also near 0.
FD_INLINE double log1p_positive(double x) {
  const double y = 1.0 + x;
  const int64_t bits = bits_of<double>(y);
  const int64_t k = (bits - 0x3fe6a09e667f3bcd) >> 52;  // y = m 2^k, m in [sqrt(1/2), sqrt(2))
  const double m = from_bits<double>(bits - k * (int64_t{1} << 52));
  const double num = k == 0 ? x : m - 1.0;  // x itself where 1 + x would round it
  const double f = num / (2.0 + num), f2 = f * f;
  double p = 1.0 / 21;
  p = p * f2 + 1.0 / 19;
  p = p * f2 + 1.0 / 17;
  p = p * f2 + 1.0 / 15;
  p = p * f2 + 1.0 / 13;
  p = p * f2 + 1.0 / 11;
  p = p * f2 + 1.0 / 9;
  p = p * f2 + 1.0 / 7;
  p = p * f2 + 1.0 / 5;
  p = p * f2 + 1.0 / 3;
  const double log_m = 2.0 * f + 2.0 * f * (f2 * p);
  return y == y ? static_cast<double>(k) * 6.93147180559945309417e-1 + log_m : y;
}
