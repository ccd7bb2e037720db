// Norms, exact sums and counter-based Gaussian noise, in vectors of doubles.
// Included once per instruction set, inside that set's namespace, with -ffp-contract=off: the
// noise has the same bits on every backend, so each operation rounds as the reference's does.
#pragma once
#include "rows.inl"

#if defined(__AVX512F__)
#define FD_WIDE 8
#elif defined(__AVX__)
#define FD_WIDE 4
#else
#define FD_WIDE 2
#endif
constexpr int kWide = FD_WIDE;

typedef double Doubles __attribute__((vector_size(FD_WIDE * 8)));
typedef uint64_t Words __attribute__((vector_size(FD_WIDE * 8)));  // a word in each low half
typedef uint32_t Pairs __attribute__((vector_size(FD_WIDE * 8)));  // a word in each half
typedef float Floats __attribute__((vector_size(FD_WIDE * 4)));
typedef uint32_t Bits32 __attribute__((vector_size(FD_WIDE * 4)));
typedef uint16_t Bits16 __attribute__((vector_size(FD_WIDE * 2)));
#undef FD_WIDE

constexpr uint64_t kLow = 0xffffffffu;

#define FD_APART static __attribute__((noinline))  // so that bench/instructions.py finds its loops

template <class V>
FD_INLINE V read(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
FD_INLINE void write(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// The product of the low halves; the high halves may hold anything.
FD_INLINE Words multiply(Words a, Words b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Words>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & kLow) * (b & kLow);
#endif
}

FD_INLINE Doubles square_root(Doubles x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Doubles>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Doubles>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x)));
#else
  for (int j = 0; j < kWide; j++) x[j] = __builtin_sqrt(x[j]);
  return x;
#endif
}

// Conversions by name: g++ 12 makes __builtin_convertvector of two halves and their shuffles.
FD_INLINE Doubles widen(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Doubles>(_mm256_cvtps_pd(reinterpret_cast<__m128>(x)));
#else
  return __builtin_convertvector(x, Doubles);
#endif
}

FD_INLINE Bits32 widen(Bits16 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits32>(
      _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i*>(&x))));
#else
  return __builtin_convertvector(x, Bits32);
#endif
}

FD_INLINE Floats narrow(Doubles x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(x)));
#else
  return __builtin_convertvector(x, Floats);
#endif
}

FD_INLINE Words lanes() {
  Words v;
  for (int j = 0; j < kWide; j++) v[j] = static_cast<uint64_t>(j);
  return v;
}

// first + w unit, exactly: the word becomes the low bits of a double between 2^52 unit and twice
// that, from which a constant is taken.
FD_INLINE Doubles to_double(Words w, double unit, double first) {
  const double base = unit * 0x1p52;
  uint64_t bits;
  __builtin_memcpy(&bits, &base, sizeof bits);
  return reinterpret_cast<Doubles>(w | bits) - (base - first);
}

// A block's counter is (block, words): of ten rounds the first two are of numbers that all blocks
// share but for one product each.
struct Philox {
  uint64_t round[10][2];
  uint64_t second[3];  // what the first round leaves of the shared words, for the second
  uint64_t third;      // and the second for the third

  FD_INLINE_MEMBER Philox(const uint32_t* key, uint64_t c1, uint64_t c2, uint64_t c3) {
    for (uint32_t i = 0; i < 10; i++) {
      round[i][0] = key[0] + i * 0x9E3779B9u;
      round[i][1] = key[1] + i * 0xBB67AE85u;
    }
    const uint64_t p1 = c2 * 0xCD9E8D57u;
    const uint64_t p0 = ((p1 >> 32) ^ c1 ^ (round[0][0] & kLow)) * 0xD2511F53u;
    second[0] = c3 ^ round[0][1];
    second[1] = p1 ^ round[1][0];
    second[2] = (p0 >> 32) ^ round[1][1];
    third = p0 ^ round[2][1];
  }

  // N vectors of blocks, side by side: each is one chain of multiplications. High halves may hold
  // anything before and after.
  template <int N>
  FD_INLINE_MEMBER void operator()(const Words (&block)[N], Words (&c)[4][N]) const {
    const Words m0 = Words{} + 0xD2511F53u, m1 = Words{} + 0xCD9E8D57u;
    for (int i = 0; i < N; i++) {
      const Words p0 = multiply(block[i], m0);
      const Words p1 = multiply((p0 >> 32) ^ second[0], m1);
      c[0][i] = (p1 >> 32) ^ second[1];
      c[1][i] = p1;
      c[2][i] = p0 ^ second[2];
      c[3][i] = Words{} + third;
    }
#pragma GCC unroll 10
    for (int k = 2; k < 10; k++) {
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        const Words p0 = multiply(c[0][i], m0), p1 = multiply(c[2][i], m1);
        c[0][i] = (p1 >> 32) ^ c[1][i] ^ round[k][0];
        c[1][i] = p1;
        // The key of the third round is in `third`.
        c[2][i] = k == 2 ? (p0 >> 32) ^ c[3][i] : (p0 >> 32) ^ c[3][i] ^ round[k][1];
        c[3][i] = p0;
      }
    }
  }
};

template <int Left>
FD_INLINE Pairs rotate(Pairs x) {
  return (x << Left) | (x >> (32 - Left));
}

// to += by, with = rotate(with ^ to), for the four quarters of a round in each of SETS states.
// Columns at Diagonal = 0; step by step, since each quarter is one chain.
template <int SETS, int Diagonal, int To, int By, int With, int Left>
FD_INLINE void step(Pairs (&x)[SETS][16]) {
  const auto at = [](int row, int column) { return 4 * row + (column + Diagonal * row) % 4; };
#pragma GCC unroll 2
  for (int s = 0; s < SETS; s++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      x[s][at(To, i)] += x[s][at(By, i)];
      x[s][at(With, i)] = rotate<Left>(x[s][at(With, i)] ^ x[s][at(To, i)]);
    }
  }
}

template <int SETS, int Diagonal>
FD_INLINE void quarters(Pairs (&x)[SETS][16]) {
  step<SETS, Diagonal, 0, 1, 3, 16>(x);
  step<SETS, Diagonal, 2, 3, 1, 12>(x);
  step<SETS, Diagonal, 0, 1, 3, 8>(x);
  step<SETS, Diagonal, 2, 3, 1, 7>(x);
}

// The ChaCha20 block function (RFC 8439, 2.3) on SETS states side by side: x[s][12] comes in as the
// counters, and `nonce` is x[s][13..15].
template <int SETS>
FD_INLINE void chacha20(const uint32_t* key, const uint32_t* nonce, Pairs (&x)[SETS][16]) {
  constexpr uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
  Pairs counter[SETS];
  for (int s = 0; s < SETS; s++) {
    counter[s] = x[s][12];
    for (int i = 0; i < 4; i++) x[s][i] = Pairs{} + constants[i];
    for (int i = 0; i < 8; i++) x[s][4 + i] = Pairs{} + key[i];
    for (int i = 0; i < 3; i++) x[s][13 + i] = Pairs{} + nonce[i];
  }
  for (int round = 0; round < 10; round++) {
    quarters<SETS, 0>(x);
    quarters<SETS, 1>(x);
  }
  for (int s = 0; s < SETS; s++) {
    for (int i = 0; i < 4; i++) x[s][i] += constants[i];
    for (int i = 0; i < 8; i++) x[s][4 + i] += key[i];
    x[s][12] += counter[s];
    for (int i = 0; i < 3; i++) x[s][13 + i] += nonce[i];
  }
}

// Coefficients and their errors: reference.py; kLog is times -2.
constexpr double kLog[] = {-2 * 0.6666666666666208,  -2 * 0.40000000011206505,
                           -2 * 0.2857142413832416,  -2 * 0.22222862280108716,
                           -2 * 0.18140193802865992, -2 * 0.16621817152858928};
constexpr double kCos[] = {-0.30842513753404227,   0.0158543442438019,     -0.00032599188676870125,
                           3.5908597712602535e-06, -2.461006226754435e-08, 1.1384778780982284e-10};
constexpr double kSin[] = {0.7853981633974483,     -0.08074551218828054,  0.002490394570188844,
                           -3.657620415891387e-05, 3.133616225433416e-07, -1.7571500746983935e-09,
                           6.877360573166326e-12};

template <int Terms, int N>
FD_INLINE void horner(const double (&c)[Terms], const Doubles (&x)[N], Doubles (&y)[N]) {
  for (int i = 0; i < N; i++) y[i] = Doubles{} + c[Terms - 1];
#pragma GCC unroll 8
  for (int k = Terms - 2; k >= 0; k--)
    for (int i = 0; i < N; i++) y[i] = y[i] * x[i] + c[k];
}

// Of x pi / 4 with y = x x: both at once, as each is one chain.
template <int N>
FD_INLINE void cosine_and_sine(const Doubles (&x)[N], const Doubles (&y)[N], Doubles (&cosine)[N],
                               Doubles (&sine)[N]) {
  for (int i = 0; i < N; i++) {
    cosine[i] = Doubles{} + kCos[5];
    sine[i] = kSin[6] * y[i] + kSin[5];
  }
#pragma GCC unroll 8
  for (int k = 4; k >= 0; k--) {
    for (int i = 0; i < N; i++) {
      cosine[i] = cosine[i] * y[i] + kCos[k];
      sine[i] = sine[i] * y[i] + kSin[k];
    }
  }
  for (int i = 0; i < N; i++) {
    cosine[i] = y[i] * cosine[i] + 1.0;
    sine[i] = x[i] * sine[i];
  }
}

// A double's exponent, as a number.
FD_INLINE Doubles exponent_of(Words bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_maskz_getexp_pd(0xff, reinterpret_cast<__m512d>(bits)));
#else
  return to_double(bits >> 52, 1, -1023);
#endif
}

// The random words of vectors of pairs of normals, in low halves; high halves may hold anything.
template <int N>
struct Random {
  Words w[4][N];
  Words high[N];  // w[3] in high halves
};

// Two vectors of independent standard normals for each of N vectors of words, side by side: each is
// a long chain. Products with powers of two, which change no digit, are not where reference.py has
// them: the logarithm comes times -2.
template <int N>
FD_INLINE void box_muller(const Random<N>& random, Doubles (&a)[N], Doubles (&b)[N]) {
  const auto& w = random.w;
  Doubles k[N], s[N], z[N], p[N], radius[N], x[N], y[N], cosine[N], sine[N];
  for (int i = 0; i < N; i++) {
    const Doubles u =
        to_double(w[1][i] & kLow, 0x1p-32, 0) + to_double(w[0][i] & kLow, 0x1p-64, 0x1p-65);
    // u = m 2^k, m in [sqrt(1/2), sqrt(2)); `shifted` has the exponent of 2^k.
    constexpr uint64_t root = 0x3fe6a09e667f3bcdu;
    const Words shifted = reinterpret_cast<Words>(u) + (0x3ff0000000000000u - root);
    k[i] = exponent_of(shifted);
    const Doubles m = reinterpret_cast<Doubles>((shifted & 0x000fffffffffffffu) + root);
    s[i] = (m - 1.0) / (m + 1.0);
    z[i] = s[i] * s[i];
  }
  for (int i = 0; i < N; i++) {
    x[i] =
        to_double(w[3][i] & 0x1fffffffu, 0x1p-29, 0) + to_double(w[2][i] & kLow, 0x1p-61, 0x1p-62);
    y[i] = x[i] * x[i];
  }
  cosine_and_sine(x, y, cosine, sine);
  horner(kLog, z, p);
  for (int i = 0; i < N; i++) {
    const Doubles log_m = s[i] * -4.0 + s[i] * (z[i] * p[i]);
    radius[i] = square_root(k[i] * (-2 * 0.693147180559945309417) + log_m);
  }
  for (int i = 0; i < N; i++) {
    constexpr uint64_t sign = uint64_t{1} << 63;
    const Doubles c = cosine[i], d = sine[i];
    const auto swap = (w[3][i] & 0x20000000u) != 0;
    const Words e = reinterpret_cast<Words>(swap ? d : c) ^ (random.high[i] & sign);
    const Words f = reinterpret_cast<Words>(swap ? c : d) ^ ((random.high[i] << 1) & sign);
    a[i] = radius[i] * reinterpret_cast<Doubles>(e);
    b[i] = radius[i] * reinterpret_cast<Doubles>(f);
  }
}

// Registers for chains side by side, in vectors of words of 64 bits.
constexpr int kSide = kWide == 8 ? 4 : 2;

// Where a block's pair of normals goes, from its first element on: reference.py.
FD_INLINE int64_t philox_place(int64_t block) { return block / 16 * 32 + block % 16; }

// GROUPS groups of 128 elements of a parameter's noise, to their places from 0 on.
template <class To, int GROUPS>
FD_APART void philox_groups(const Draws& d, int64_t group, const To& to) {
  const uint64_t first = static_cast<uint64_t>(group) * 64;
  const Philox philox(d.key, static_cast<uint32_t>(d.counter[0] + (first >> 32)), d.counter[1],
                      d.counter[2]);
  for (int64_t j = 0; j < GROUPS * 64; j += kSide * kWide) {
    Words block[kSide];
    for (int i = 0; i < kSide; i++)
      block[i] = lanes() + (first + static_cast<uint64_t>(j + i * kWide));
    Random<kSide> random;
    philox(block, random.w);
    Doubles a[kSide], b[kSide];
    for (int i = 0; i < kSide; i++) random.high[i] = random.w[3][i] << 32;
    box_muller(random, a, b);
    for (int i = 0; i < kSide; i++) {
      to.put(philox_place(j + i * kWide), a[i]);
      to.put(philox_place(j + i * kWide) + 16, b[i]);
    }
  }
}

// SETS groups from `group` on, likewise. A group is 16 blocks, of which a state has 2 kWide.
template <class To, int SETS>
FD_APART void chacha20_groups(const Draws& d, int64_t group, const To& to) {
  const uint64_t first = static_cast<uint64_t>(group) * 16;
  const uint32_t nonce[3] = {static_cast<uint32_t>(d.counter[0] + (first >> 32)), d.counter[1],
                             d.counter[2]};
  for (int64_t j = 0; j < 16; j += 2 * kWide) {
    Pairs x[SETS][16];
    for (int s = 0; s < SETS; s++) {
      // Low halves: blocks j, j + 1, ...; high halves: those from j + kWide on.
      const Words low =
          lanes() + (static_cast<uint32_t>(first) + static_cast<uint64_t>(16 * s + j));
      x[s][12] = reinterpret_cast<Pairs>(low | ((low + static_cast<uint64_t>(kWide)) << 32));
    }
    chacha20(d.key, nonce, x);
#pragma GCC unroll 1
    for (int q = 0; q < 4; q++) {
      Random<2 * SETS> random;
      for (int s = 0; s < SETS; s++) {
        for (int i = 0; i < 4; i++) {
          const Words both = reinterpret_cast<Words>(x[s][4 * q + i]);
          random.w[i][2 * s] = both;
          random.w[i][2 * s + 1] = both >> 32;
        }
        const Words both = reinterpret_cast<Words>(x[s][4 * q + 3]);
        random.high[2 * s] = both << 32;
        random.high[2 * s + 1] = both;
      }
      Doubles a[2 * SETS], b[2 * SETS];
      box_muller(random, a, b);
      for (int i = 0; i < 2 * SETS; i++) {
        const int64_t at = i / 2 * kNoiseGroup + q * 32 + j + i % 2 * kWide;
        to.put(at, a[i]);
        to.put(at + 16, b[i]);
      }
    }
  }
}

// kWide elements as doubles, exactly.
struct FromF32 {
  static constexpr bool halves = false;
  using Element = float;
  static FD_INLINE_MEMBER Doubles get(const float* x) { return widen(read<Floats>(x)); }
};
struct FromF64 {
  static constexpr bool halves = false;
  using Element = double;
  static FD_INLINE_MEMBER Doubles get(const double* x) { return read<Doubles>(x); }
};
struct FromBf16 {
  static constexpr bool halves = true;  // the high ones of float32's
  using Element = uint16_t;
  static FD_INLINE_MEMBER Doubles get(const uint16_t* x) {
    const Bits32 bits = widen(read<Bits16>(x)) << 16;
    return widen(reinterpret_cast<Floats>(bits));
  }
};
struct FromF16 {
  static constexpr bool halves = false;
  using Element = uint16_t;
  static FD_INLINE_MEMBER Doubles get(const uint16_t* x) {
    Floats v;
#if defined(__AVX512F__)
    v = reinterpret_cast<Floats>(_mm256_maskz_cvtph_ps(0xff, read<__m128i>(x)));
#elif defined(__F16C__)
    v = reinterpret_cast<Floats>(
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
    for (int j = 0; j < kWide; j++) v[j] = from_f16(x[j]);
#endif
    return widen(v);
  }
};

// The last n < kWide elements, and zeros.
template <class From>
FD_INLINE Doubles get_tail(const typename From::Element* x, int64_t n) {
  typename From::Element padded[kWide] = {};
  for (int64_t j = 0; j < n; j++) padded[j] = x[j];
  return From::get(padded);
}

// sum + v v, where the product is exact.
FD_INLINE Doubles add_exact_square(Doubles v, Doubles sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_fmadd_pd(
      reinterpret_cast<__m512d>(v), reinterpret_cast<__m512d>(v), reinterpret_cast<__m512d>(sum)));
#elif defined(__FMA__)
  return reinterpret_cast<Doubles>(_mm256_fmadd_pd(
      reinterpret_cast<__m256d>(v), reinterpret_cast<__m256d>(v), reinterpret_cast<__m256d>(sum)));
#else
  return sum + v * v;
#endif
}

// 2 kWide elements, in any order: those in the high and those in the low halves of words.
template <class From>
FD_INLINE void get_two(const typename From::Element* x, Doubles (&v)[2]) {
  if constexpr (From::halves) {
    const Bits32 both = read<Bits32>(x);
    v[0] = widen(reinterpret_cast<Floats>(both << 16));
    v[1] = widen(reinterpret_cast<Floats>(both & 0xffff0000u));
  } else {
    v[0] = From::get(x);
    v[1] = From::get(x + kWide);
  }
}

template <class From>
FD_APART double square_of(const void* data, int64_t n, double unit) {
  const auto* x = static_cast<const typename From::Element*>(data);
  constexpr int chains = 8;
  // Squares of the narrower types are exact in a double; a power of two changes no digit.
  constexpr bool fits = sizeof(typename From::Element) < sizeof(double);
  const auto add = [unit](Doubles v, Doubles sum) {
    if constexpr (fits) return add_exact_square(v, sum);
    v *= unit;
    return sum + v * v;
  };
  Doubles sum[chains] = {};
  int64_t j = 0;
  for (; j + chains * kWide <= n; j += chains * kWide)
    for (int k = 0; k < chains; k += 2) {
      Doubles v[2];
      get_two<From>(x + j + k * kWide, v);
      sum[k] = add(v[0], sum[k]);
      sum[k + 1] = add(v[1], sum[k + 1]);
    }
  for (; j < n; j += kWide)
    sum[0] = add(n - j < kWide ? get_tail<From>(x + j, n - j) : From::get(x + j), sum[0]);
  const Doubles all =
      ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  double total = 0;
  for (int k = 0; k < kWide; k++) total += all[k];
  return fits ? total * unit * unit : total;
}

// N samples at once: the sums are read and written once for all of them. On a grid a sum is a whole
// number in the last bits of `magic`, and so is a contribution: they are added as such.
template <class From, int N, bool GRID>
static void add_samples(const void* const* data, const double* factor, int64_t n, double magic,
                        double* sum) {
  const typename From::Element* x[N];
  Doubles c[N];
  for (int i = 0; i < N; i++) {
    x[i] = static_cast<const typename From::Element*>(data[i]);
    c[i] = Doubles{} + factor[i];
  }
  const auto added = [&](Doubles s, const auto& get) {
    Words bits = reinterpret_cast<Words>(s);
    for (int i = 0; i < N; i++) {
      if constexpr (GRID) {
        bits += reinterpret_cast<Words>(get(i) * c[i] + magic);
      } else {
        s += get(i) * c[i];
      }
    }
    return GRID ? reinterpret_cast<Doubles>(bits) : s;
  };
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide)
    write(sum + j, added(read<Doubles>(sum + j), [&](int i) { return From::get(x[i] + j); }));
  if (j < n) {
    const Doubles s = added(get_tail<FromF64>(sum + j, n - j),
                            [&](int i) { return get_tail<From>(x[i] + j, n - j); });
    for (int k = 0; j + k < n; k++) sum[j + k] = s[k];
  }
}

template <class From, bool GRID>
static void add_all(const void* const* x, const double* factor, int64_t count, int64_t n,
                    double magic, double* sum) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) add_samples<From, 4, GRID>(x + i, factor + i, n, magic, sum);
  for (; i < count; i++) add_samples<From, 1, GRID>(x + i, factor + i, n, magic, sum);
}

template <class From>
static void add_of(const void* const* x, const double* factor, int64_t count, int64_t n,
                   double magic, double* sum) {
  if (magic == 0) return add_all<From, false>(x, factor, count, n, magic, sum);
  for (int64_t j = 0; j < n; j++) sum[j] += magic;
  add_all<From, true>(x, factor, count, n, magic, sum);
  // Each contribution has brought the bits of `magic` with it.
  uint64_t once;
  __builtin_memcpy(&once, &magic, sizeof once);
  const uint64_t brought = once * static_cast<uint64_t>(count);
  for (int64_t j = 0; j < n; j++) {
    uint64_t bits;
    __builtin_memcpy(&bits, sum + j, sizeof bits);
    bits -= brought;
    double s;
    __builtin_memcpy(&s, &bits, sizeof s);
    sum[j] = s - magic;
  }
}

static double privacy_square(Type type, const void* x, int64_t n, double unit) {
  switch (type) {
    case Type::f32:
      return square_of<FromF32>(x, n, unit);
    case Type::f64:
      return square_of<FromF64>(x, n, unit);
    case Type::bf16:
      return square_of<FromBf16>(x, n, unit);
    case Type::f16:
      return square_of<FromF16>(x, n, unit);
  }
  return 0;
}

static void privacy_add(Type type, const void* const* x, const double* factor, int64_t count,
                        int64_t n, double magic, double* sum) {
  switch (type) {
    case Type::f32:
      return add_of<FromF32>(x, factor, count, n, magic, sum);
    case Type::f64:
      return add_of<FromF64>(x, factor, count, n, magic, sum);
    case Type::bf16:
      return add_of<FromBf16>(x, factor, count, n, magic, sum);
    case Type::f16:
      return add_of<FromF16>(x, factor, count, n, magic, sum);
  }
}

struct FromNothing {
  using Element = double;
  static FD_INLINE_MEMBER Doubles get(const double*) { return Doubles{}; }
};
template <class From>
constexpr bool kSummed = true;
template <>
constexpr bool kSummed<FromNothing> = false;

FD_INLINE void store(double* to, Doubles x) { write(to, x); }
FD_INLINE void store(float* to, Doubles x) { write(to, narrow(x)); }

// Elements of a result: (sum on the grid + noise on the grid) inverse. On the grid all is exact.
template <class From, class Out>
struct Release {
  double scale, magic, inverse;
  const typename From::Element* sum;
  Out* out;

  FD_INLINE_MEMBER Release(const Noise& noise, const typename From::Element* s, Out* o)
      : scale(noise.scale), magic(noise.magic), inverse(noise.inverse), sum(s), out(o) {}

  FD_INLINE_MEMBER void put(int64_t at, Doubles normal) const {
    const Doubles noise = normal * scale + magic;
    if constexpr (kSummed<From>) {
      store(out + at, ((From::get(sum + at) + magic) + (noise - 2 * magic)) * inverse);
    } else {
      store(out + at, (noise - magic) * inverse);
    }
  }
  FD_INLINE_MEMBER void put_silent(int64_t at) const {
    store(out + at, (From::get(sum + at) + magic - magic) * inverse);
  }
};

constexpr int kSets = kWide == 8 ? 2 : 1;  // states that the registers hold

// GROUPS groups.
template <int GROUPS, class To>
FD_INLINE void release_groups(const Draws& draws, int64_t group, const To& to) {
  switch (draws.generator) {
    case Generator::none:
      for (int64_t j = 0; j < GROUPS * kNoiseGroup; j += kWide) to.put_silent(j);
      break;
    case Generator::philox:
      philox_groups<To, GROUPS>(draws, group, to);
      break;
    case Generator::chacha20:
      chacha20_groups<To, GROUPS>(draws, group, to);
      break;
  }
}

template <class From, class Out>
static void release_to(const Noise& noise, int64_t first, int64_t n,
                       const typename From::Element* sum, Out* out) {
  out += first;
  for (int64_t j = 0; j < n;) {
    const int64_t group = (first + j) / kNoiseGroup, at = (first + j) % kNoiseGroup;
    const auto* here = kSummed<From> ? sum + j : nullptr;
    if (at == 0 && group % kSets == 0 && n - j >= kSets * kNoiseGroup) {
      release_groups<kSets>(noise.draws, group, Release<From, Out>(noise, here, out + j));
      j += kSets * kNoiseGroup;
      continue;
    }
    const int64_t count = kNoiseGroup - at < n - j ? kNoiseGroup - at : n - j;
    // A part of a group is whole in `some` and `part`.
    alignas(64) typename From::Element some[kNoiseGroup] = {};
    alignas(64) Out part[kNoiseGroup];
    if (kSummed<From>)
      for (int64_t k = 0; k < count; k++) some[at + k] = here[k];
    release_groups<1>(noise.draws, group, Release<From, Out>(noise, some, part));
    for (int64_t k = 0; k < count; k++) out[j + k] = part[at + k];
    j += count;
  }
}

template <class Out>
static void release_from(const Noise& noise, int64_t first, int64_t n, const void* sum,
                         bool sum_double, Out* out) {
  if (!sum) {
    release_to<FromNothing>(noise, first, n, nullptr, out);
  } else if (sum_double) {
    release_to<FromF64>(noise, first, n, static_cast<const double*>(sum), out);
  } else {
    release_to<FromF32>(noise, first, n, static_cast<const float*>(sum), out);
  }
}

static void privacy_release(const Noise& noise, int64_t first, int64_t n, const void* sum,
                            bool sum_double, void* out, bool out_double) {
  if (out_double) {
    release_from(noise, first, n, sum, sum_double, static_cast<double*>(out));
  } else {
    release_from(noise, first, n, sum, sum_double, static_cast<float*>(out));
  }
}

static void privacy_words(const Draws& d, int64_t block, uint32_t* out) {
  const uint32_t low = static_cast<uint32_t>(block);
  const uint32_t high = d.counter[0] + static_cast<uint32_t>(block >> 32);
  if (d.generator == Generator::philox) {
    const Words blocks[1] = {Words{} + static_cast<uint64_t>(low)};
    Words c[4][1];
    Philox(d.key, high, d.counter[1], d.counter[2])(blocks, c);
    for (int i = 0; i < 4; i++) out[i] = static_cast<uint32_t>(c[i][0][0]);
  } else {
    const uint32_t nonce[3] = {high, d.counter[1], d.counter[2]};
    Pairs x[1][16];
    x[0][12] = Pairs{} + low;
    chacha20(d.key, nonce, x);
    for (int i = 0; i < 16; i++) out[i] = x[0][i][0];
  }
}
