// Counter-based Gaussian noise: the operations of fastdistill/privacy/reference.py, one by one, so
// that every value has the same bits on every backend.
#pragma once
#include <cstdint>

namespace fd {

// A double whose products and sums each round: the compiler would fuse those of `double`.
struct Real {
  double v;
};
__device__ __forceinline__ Real operator+(Real a, Real b) { return {__dadd_rn(a.v, b.v)}; }
__device__ __forceinline__ Real operator-(Real a, Real b) { return {__dadd_rn(a.v, -b.v)}; }
__device__ __forceinline__ Real operator*(Real a, Real b) { return {__dmul_rn(a.v, b.v)}; }
__device__ __forceinline__ Real operator/(Real a, Real b) { return {__ddiv_rn(a.v, b.v)}; }

// The nearest multiple of a power of two, ties to even: `magic` is 1.5 * 2^52 times it. 0: x.
__device__ __forceinline__ Real on_grid(Real x, double magic) {
  return x + Real{magic} - Real{magic};
}

enum class Generator : int { none = 0, philox = 1, chacha20 = 2 };

// Block b is that of the 128-bit counter (b, counter[0] + b / 2^32, counter[1], counter[2]).
struct Draws {
  uint32_t key[8];  // Philox takes two
  uint32_t counter[3];
};

__device__ __forceinline__ void begin(const Draws& d, uint64_t block, uint32_t* words) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = d.counter[0] + static_cast<uint32_t>(block >> 32);
  words[2] = d.counter[1];
  words[3] = d.counter[2];
}

// Philox-4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ void philox(const Draws& d, uint64_t block, uint32_t (&c)[4]) {
  begin(d, block, c);
  uint32_t k0 = d.key[0], k1 = d.key[1];
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

__device__ __forceinline__ uint32_t rotate(uint32_t x, int left) {
  return (x << left) | (x >> (32 - left));
}

__device__ __forceinline__ void quarter(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b;
  d = rotate(d ^ a, 16);
  c += d;
  b = rotate(b ^ c, 12);
  a += b;
  d = rotate(d ^ a, 8);
  c += d;
  b = rotate(b ^ c, 7);
}

// The ChaCha20 block function (RFC 8439, 2.3).
__device__ __forceinline__ void chacha20(const Draws& d, uint64_t block, uint32_t (&x)[16]) {
  uint32_t start[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
#pragma unroll
  for (int i = 0; i < 8; i++) start[4 + i] = d.key[i];
  begin(d, block, start + 12);
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] = start[i];
#pragma unroll 1
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
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] += start[i];
}

__device__ __forceinline__ Real horner(Real, double last) { return {last}; }
template <class... Rest>
__device__ __forceinline__ Real horner(Real x, double first, Rest... rest) {
  return horner(x, rest...) * x + Real{first};
}

__device__ __forceinline__ Real real_of(uint32_t word) { return {static_cast<double>(word)}; }

struct Pair {
  Real a, b;
};

// Two independent standard normals from four words.
__device__ __forceinline__ Pair box_muller(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const Real one{1.0}, half{0.5};
  const Real u = real_of(w1) * Real{0x1p-32} + (real_of(w0) + half) * Real{0x1p-64};
  const long long bits = __double_as_longlong(u.v);
  // u = m 2^k, m in [sqrt(1/2), sqrt(2)).
  const long long k = ((bits + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd)) >> 52) - 1023;
  const Real m{__longlong_as_double(bits - k * (1ll << 52))};
  const Real s = (m - one) / (m + one), z = s * s;
  const Real log_m =
      (s + s) + s * (z * horner(z, 0.6666666666666208, 0.40000000011206505, 0.2857142413832416,
                                0.22222862280108716, 0.18140193802865992, 0.16621817152858928));
  const Real square =
      (Real{static_cast<double>(k)} * Real{0.693147180559945309417} + log_m) * Real{-2.0};
  const Real radius{__dsqrt_rn(square.v)};
  const Real x = real_of(w3 & 0x1fffffffu) * Real{0x1p-29} + (real_of(w2) + half) * Real{0x1p-61};
  const Real y = x * x;
  const Real cosine =
      y * horner(y, -0.30842513753404227, 0.0158543442438019, -0.00032599188676870125,
                 3.5908597712602535e-06, -2.461006226754435e-08, 1.1384778780982284e-10) +
      one;
  const Real sine = x * horner(y, 0.7853981633974483, -0.08074551218828054, 0.002490394570188844,
                               -3.657620415891387e-05, 3.133616225433416e-07,
                               -1.7571500746983935e-09, 6.877360573166326e-12);
  const bool swap = (w3 & 0x20000000u) != 0;
  const double a = swap ? sine.v : cosine.v, b = swap ? cosine.v : sine.v;
  return {radius * Real{w3 & 0x80000000u ? -a : a}, radius * Real{w3 & 0x40000000u ? -b : b}};
}

}  // namespace fd
