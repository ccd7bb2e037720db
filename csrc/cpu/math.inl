// Branch-free elementary functions that the compiler vectorises inside `omp simd` loops.
// Included once per instruction set, inside that set's namespace.

#define FD_INLINE static inline __attribute__((always_inline))

template <class R>
struct Real;

template <>
struct Real<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23;
  static constexpr float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23 + exponent bias
  static constexpr float smallest = -87.33f;             // exp(x) is normal from here on
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  // Taylor coefficients of u^2 (1/2 + u/6 + ...) kept for |u| < 0.1.
  static constexpr int series = 5;
};

template <>
struct Real<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52;
  static constexpr double magic = 6755399441055744.0 + 1023.0;
  static constexpr double smallest = -708.39;
  static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
  static constexpr int series = 11;
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

// (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2: minimax of degree 4 (error 3e-9 of exp), and the
// Chebyshev interpolant of degree 9 (2e-17).
FD_INLINE float exp_tail(float r) {
  float p = 1.38145401768e-3f;
  p = p * r + 8.36874510894e-3f;
  p = p * r + 4.16683907835e-2f;
  p = p * r + 0.16666520399f;
  return p * r + 0.499999934321f;
}

FD_INLINE double exp_tail(double r) {
  double p = 2.5100375832561233664e-8;
  p = p * r + 2.7620075879983366586e-7;
  p = p * r + 2.7557268480310025526e-6;
  p = p * r + 2.4801521322368693266e-5;
  p = p * r + 1.9841269863040545271e-4;
  p = p * r + 1.3888888917196719077e-3;
  p = p * r + 8.3333333333300644495e-3;
  p = p * r + 4.1666666666624161903e-2;
  p = p * r + 0.16666666666666667452;
  return p * r + 0.50000000000000010211;
}

// exp(x) for x <= 0; exactly 1 at 0, 0 below the normal range (also at -inf), NaN at NaN.
// The scale 2^n enters as a factor, not as bits, so that a NaN stays one.
template <class R>
FD_INLINE R exp_nonpositive(R x) {
  using T = Real<R>;
  const R low = x < T::smallest ? T::smallest : x;
  const R shifted = low * R(1.44269504088896340736) + T::magic;
  const R n = shifted - T::magic;
  const R r = (low - n * T::ln2_hi) - n * T::ln2_lo;
  const R p = (exp_tail(r) * r) * r + r + R(1);
  using U = typename T::Bits;
  const R scale = from_bits<R>(static_cast<U>(bits_of<R>(shifted)) << T::mantissa);
  return x < T::smallest ? R(0) : p * scale;
}

// log(1 + x) for -1 < x < 2^52, relative error of a few eps also near 0.
FD_INLINE double log1p_positive(double x) {
  const double y = 1.0 + x;
  const int64_t bits = bits_of<double>(y);
  const int64_t k = (bits - 0x3fe6a09e667f3bcd) >> 52;  // y = m 2^k, m in [sqrt(1/2), sqrt(2))
  const double m = from_bits<double>(bits - (k << 52));
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
