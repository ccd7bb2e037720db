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

struct PhiloxKeys {
  uint64_t round[10][2];

  FD_INLINE_MEMBER explicit PhiloxKeys(const uint32_t* key) {
    for (uint32_t i = 0; i < 10; i++) {
      round[i][0] = key[0] + i * 0x9E3779B9u;
      round[i][1] = key[1] + i * 0xBB67AE85u;
    }
  }
};

// Ten rounds on N vectors of blocks; side by side, since each is one chain of multiplications.
template <int N>
FD_INLINE void philox(const PhiloxKeys& keys, Words (&c)[4][N]) {
  const Words m0 = Words{} + 0xD2511F53u, m1 = Words{} + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (const auto& k : keys.round) {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      const Words p0 = multiply(c[0][i], m0), p1 = multiply(c[2][i], m1);
      c[0][i] = (p1 >> 32) ^ c[1][i] ^ k[0];
      c[1][i] = p1;
      c[2][i] = (p0 >> 32) ^ c[3][i] ^ k[1];
      c[3][i] = p0;
    }
  }
  for (auto& word : c)
    for (Words& w : word) w &= kLow;
}

template <int Left>
FD_INLINE Pairs rotate(Pairs x) {
  return (x << Left) | (x >> (32 - Left));
}

FD_INLINE void quarter(Pairs& a, Pairs& b, Pairs& c, Pairs& d) {
  a += b;
  d = rotate<16>(d ^ a);
  c += d;
  b = rotate<12>(b ^ c);
  a += b;
  d = rotate<8>(d ^ a);
  c += d;
  b = rotate<7>(b ^ c);
}

// The ChaCha20 block function (RFC 8439, 2.3); x[12..15] come in as counter and nonce.
FD_INLINE void chacha20(const uint32_t* key, Pairs (&x)[16]) {
  constexpr uint32_t constants[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
  for (int i = 0; i < 4; i++) x[i] = Pairs{} + constants[i];
  for (int i = 0; i < 8; i++) x[4 + i] = Pairs{} + key[i];
  const Pairs counter[4] = {x[12], x[13], x[14], x[15]};
  for (int round = 0; round < 10; round++) {
    quarter(x[0], x[4], x[8], x[12]);
    quarter(x[1], x[5], x[9], x[13]);
    quarter(x[2], x[6], x[10], x[14]);
    quarter(x[3], x[7], x[11], x[15]);
    quarter(x[0], x[5], x[10], x[15]);
    quarter(x[1], x[6], x[11], x[12]);
    quarter(x[2], x[7], x[8], x[13]);
    quarter(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 4; i++) {
    x[i] += constants[i];
    x[12 + i] += counter[i];
  }
  for (int i = 0; i < 8; i++) x[4 + i] += key[i];
}

// Coefficients and their errors: reference.py.
constexpr double kLog[] = {0.6666666666666208,  0.40000000011206505, 0.2857142413832416,
                           0.22222862280108716, 0.18140193802865992, 0.16621817152858928};
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

// Two vectors of independent standard normals for each vector of blocks, by the words of N of them
// side by side: each is a long chain.
template <int N>
FD_INLINE void box_muller(const Words (&w)[4][N], Doubles (&a)[N], Doubles (&b)[N]) {
  Doubles k[N], s[N], z[N], p[N], radius[N], x[N], y[N], cosine[N], sine[N];
  for (int i = 0; i < N; i++) {
    const Doubles u = to_double(w[1][i], 0x1p-32, 0) + to_double(w[0][i], 0x1p-64, 0x1p-65);
    const Words bits = reinterpret_cast<Words>(u);
    // u = m 2^k, m in [sqrt(1/2), sqrt(2)); the exponent is k + 1023.
    const Words exponent = (bits + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu)) >> 52;
    k[i] = to_double(exponent, 1, -1023);
    const Doubles m = reinterpret_cast<Doubles>(bits - (exponent << 52) + 0x3ff0000000000000u);
    s[i] = (m - 1.0) / (m + 1.0);
    z[i] = s[i] * s[i];
  }
  horner(kLog, z, p);
  for (int i = 0; i < N; i++) {
    const Doubles log_m = (s[i] + s[i]) + s[i] * (z[i] * p[i]);
    radius[i] = square_root((k[i] * 0.693147180559945309417 + log_m) * -2.0);
  }
  for (int i = 0; i < N; i++) {
    x[i] = to_double(w[3][i] & 0x1fffffffu, 0x1p-29, 0) + to_double(w[2][i], 0x1p-61, 0x1p-62);
    y[i] = x[i] * x[i];
  }
  horner(kCos, y, cosine);
  horner(kSin, y, sine);
  for (int i = 0; i < N; i++) {
    const Doubles c = y[i] * cosine[i] + 1.0, d = x[i] * sine[i];
    const auto swap = (w[3][i] & 0x20000000u) != 0;
    const Words e = reinterpret_cast<Words>(swap ? d : c) ^ ((w[3][i] & 0x80000000u) << 32);
    const Words f = reinterpret_cast<Words>(swap ? c : d) ^ ((w[3][i] & 0x40000000u) << 33);
    a[i] = radius[i] * reinterpret_cast<Doubles>(e);
    b[i] = radius[i] * reinterpret_cast<Doubles>(f);
  }
}

// The noise of N vectors of blocks, the first of them at z: scaled, and on the grid.
template <int N>
FD_INLINE void put_noise(const Noise& noise, const Words (&w)[4][N], double* z) {
  Doubles a[N], b[N];
  box_muller(w, a, b);
  for (int i = 0; i < N; i++) {
    write(z + i * kWide, a[i] * noise.scale + noise.magic - noise.magic);
    write(z + i * kWide + 16, b[i] * noise.scale + noise.magic - noise.magic);
  }
}

// Elements [128 group, 128 (group + 1)) of a parameter's noise.
static void philox_group(const Noise& noise, const PhiloxKeys& keys, int64_t group, double* z) {
  const Draws& d = noise.draws;
  for (int t = 0; t < 4; t++) {
    for (int j = 0; j < 16; j += 2 * kWide) {
      const uint64_t block = static_cast<uint64_t>(group) * 64 + static_cast<uint64_t>(t * 16 + j);
      Words c[4][2];
      for (int i = 0; i < 2; i++) {
        c[0][i] = lanes() + ((block + static_cast<uint64_t>(i * kWide)) & kLow);
        c[1][i] = Words{} + (d.counter[0] + (block >> 32));
        c[2][i] = Words{} + d.counter[1];
        c[3][i] = Words{} + d.counter[2];
      }
      philox(keys, c);
      put_noise(noise, c, z + t * 32 + j);
    }
  }
}

static void chacha20_group(const Noise& noise, int64_t group, double* z) {
  const Draws& d = noise.draws;
  for (int j = 0; j < 16; j += 2 * kWide) {
    const uint64_t block = static_cast<uint64_t>(group) * 16 + static_cast<uint64_t>(j);
    // Low halves: blocks j, j + 1, ...; high halves: those from j + kWide on.
    const Words low = lanes() + (block & kLow);
    Pairs x[16];
    x[12] = reinterpret_cast<Pairs>(low | ((low + static_cast<uint64_t>(kWide)) << 32));
    x[13] = Pairs{} + static_cast<uint32_t>(d.counter[0] + (block >> 32));
    x[14] = Pairs{} + d.counter[1];
    x[15] = Pairs{} + d.counter[2];
    chacha20(d.key, x);
    for (int q = 0; q < 4; q++) {
      Words w[4][2];
      for (int i = 0; i < 4; i++) {
        const Words both = reinterpret_cast<Words>(x[4 * q + i]);
        w[i][0] = both & kLow;
        w[i][1] = both >> 32;
      }
      put_noise(noise, w, z + q * 32 + j);
    }
  }
}

// kWide elements as doubles, exactly.
struct FromF32 {
  using Element = float;
  static FD_INLINE_MEMBER Doubles get(const float* x) { return widen(read<Floats>(x)); }
};
struct FromF64 {
  using Element = double;
  static FD_INLINE_MEMBER Doubles get(const double* x) { return read<Doubles>(x); }
};
struct FromBf16 {
  using Element = uint16_t;
  static FD_INLINE_MEMBER Doubles get(const uint16_t* x) {
    const Bits32 bits = widen(read<Bits16>(x)) << 16;
    return widen(reinterpret_cast<Floats>(bits));
  }
};
struct FromF16 {
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

template <class From>
static double square_of(const void* data, int64_t n, double unit) {
  const auto* x = static_cast<const typename From::Element*>(data);
  constexpr int chains = 4;
  // Squares of the narrower types fit a double as they are; a power of two changes no digit.
  constexpr bool fits = sizeof(typename From::Element) < sizeof(double);
  const double scale = fits ? 1.0 : unit;
  Doubles sum[chains] = {};
  int64_t j = 0;
  for (; j + chains * kWide <= n; j += chains * kWide)
    for (int k = 0; k < chains; k++) {
      const Doubles v = From::get(x + j + k * kWide) * scale;
      sum[k] += v * v;
    }
  for (; j < n; j += kWide) {
    const Doubles v = (n - j < kWide ? get_tail<From>(x + j, n - j) : From::get(x + j)) * scale;
    sum[0] += v * v;
  }
  const Doubles all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double total = 0;
  for (int k = 0; k < kWide; k++) total += all[k];
  return fits ? total * unit * unit : total;
}

// N samples at once: the sums are read and written once for all of them.
template <class From, int N>
static void add_samples(const void* const* data, const double* factor, int64_t n, double magic,
                        double* sum) {
  const typename From::Element* x[N];
  Doubles c[N];
  for (int i = 0; i < N; i++) {
    x[i] = static_cast<const typename From::Element*>(data[i]);
    c[i] = Doubles{} + factor[i];
  }
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) {
    Doubles s = read<Doubles>(sum + j);
    for (int i = 0; i < N; i++) s += From::get(x[i] + j) * c[i] + magic - magic;
    write(sum + j, s);
  }
  if (j < n) {
    Doubles s = get_tail<FromF64>(sum + j, n - j);
    for (int i = 0; i < N; i++) s += get_tail<From>(x[i] + j, n - j) * c[i] + magic - magic;
    for (int k = 0; j + k < n; k++) sum[j + k] = s[k];
  }
}

template <class From>
static void add_of(const void* const* x, const double* factor, int64_t count, int64_t n,
                   double magic, double* sum) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) add_samples<From, 4>(x + i, factor + i, n, magic, sum);
  for (; i < count; i++) add_samples<From, 1>(x + i, factor + i, n, magic, sum);
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

// One group of results; `sum` and `z` may be null.
template <class Out>
FD_INLINE void release_group(const Noise& noise, const double* sum, const double* z, Out* out) {
  for (int j = 0; j < kNoiseGroup; j += kWide) {
    Doubles v = {};
    if (sum) v = read<Doubles>(sum + j) + noise.magic - noise.magic;
    if (z) v += read<Doubles>(z + j);
    v *= noise.inverse;
    if (sizeof(Out) == 8) {
      write(out + j, v);
    } else {
      write(out + j, narrow(v));
    }
  }
}

template <class Out>
static void release_to(const Noise& noise, int64_t first, int64_t n, const double* sum, Out* out) {
  alignas(64) double z[kNoiseGroup], some[kNoiseGroup] = {};
  alignas(64) Out part[kNoiseGroup];
  const Generator generator = noise.draws.generator;
  const PhiloxKeys keys(noise.draws.key);
  for (int64_t j = 0; j < n;) {
    const int64_t group = (first + j) / kNoiseGroup, at = (first + j) % kNoiseGroup;
    const int64_t count = std::min(kNoiseGroup - at, n - j);
    if (generator == Generator::philox) philox_group(noise, keys, group, z);
    if (generator == Generator::chacha20) chacha20_group(noise, group, z);
    const double* drawn = generator == Generator::none ? nullptr : z;
    if (count == kNoiseGroup) {
      release_group(noise, sum ? sum + j : nullptr, drawn, out + first + j);
    } else {  // the first or the last group: it is whole in `some` and `part`
      if (sum)
        for (int64_t k = 0; k < count; k++) some[at + k] = sum[j + k];
      release_group(noise, sum ? some : nullptr, drawn, part);
      for (int64_t k = 0; k < count; k++) out[first + j + k] = part[at + k];
    }
    j += count;
  }
}

static void privacy_release(const Noise& noise, int64_t first, int64_t n, const double* sum,
                            void* out, bool out_double) {
  if (out_double) {
    release_to(noise, first, n, sum, static_cast<double*>(out));
  } else {
    release_to(noise, first, n, sum, static_cast<float*>(out));
  }
}

static void privacy_words(const Draws& d, int64_t block, uint32_t* out) {
  const uint64_t low = static_cast<uint64_t>(block) & kLow;
  const uint32_t high = d.counter[0] + static_cast<uint32_t>(block >> 32);
  if (d.generator == Generator::philox) {
    Words c[4][1] = {{Words{} + low},
                     {Words{} + static_cast<uint64_t>(high)},
                     {Words{} + static_cast<uint64_t>(d.counter[1])},
                     {Words{} + static_cast<uint64_t>(d.counter[2])}};
    philox(PhiloxKeys(d.key), c);
    for (int i = 0; i < 4; i++) out[i] = static_cast<uint32_t>(c[i][0][0]);
  } else {
    Pairs x[16];
    x[12] = Pairs{} + static_cast<uint32_t>(low);
    x[13] = Pairs{} + high;
    x[14] = Pairs{} + d.counter[1];
    x[15] = Pairs{} + d.counter[2];
    chacha20(d.key, x);
    for (int i = 0; i < 16; i++) out[i] = x[i][0];
  }
}
