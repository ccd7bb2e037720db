// The loops of the distillation loss over n classes in kLanes lanes, for kd.inl.
// Included once per instruction set, inside that set's namespace.
//
// The lanes are kLanes neighbouring classes of one row (constants are then of type Same<R>, and
// sums and maxima are folded over the lanes afterwards), or the same class of kLanes rows
// (Lanes<R>).
#pragma once
#include "lanes.inl"

// e^K for the temperatures at which exp(z) is a small power of exp(z/T).
template <int K, class R>
FD_INLINE R power(R e) {
  if (K == 2) return e * e;
  if (K == 3) return e * e * e;
  if (K == 4) return (e * e) * (e * e);
  return e;
}

template <class R, bool SOFT>
static void maxima(const R* __restrict x_s, const R* __restrict x_t, int64_t n, Lanes<R>* m_s,
                   Lanes<R>* m_t) {
  Lanes<R> s, t;
  s.fill(-static_cast<R>(__builtin_inf()));
  t = s;
  for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      s.at[j] = larger(x_s[i + j], s.at[j]);
      if (SOFT) t.at[j] = larger(x_t[i + j], t.at[j]);
    }
  }
  *m_s = s;
  *m_t = t;
}

// What the exponentials count from: all masked, exp(-inf - 0) = 0 and not NaN.
template <class R>
FD_INLINE R origin(R maximum) {
  return maximum == -static_cast<R>(__builtin_inf()) ? R(0) : maximum;
}

// What comes from memory while step 1 computes: what will be read next (without it the maxima wait
// for memory, 3/5 of the step), and what will be written.
struct Prefetch {
  Ahead s, t, g;
};

template <class R>
struct Exponentials {
  R *s, *t, *one;  // exp(z_s/T), exp(z_t/T), exp(z_s); `one` only where it is no power of `s`
};

template <class R>
struct Sums {
  Lanes<R> s, t, one, difference;  // of e_s, e_t, exp(z_s), e_s - e_t
};

// Step 1. K = 0: exp(z) is no power of exp(z/T).
template <class R, bool SOFT, bool HARD, int K, class C>
static void exponentials(const R* __restrict x_s, const R* __restrict x_t, int64_t n, C from_s,
                         C from_t, Exp<R> at_t, Exp<R> at_1, Exponentials<R> e, Sums<R>* sums,
                         Prefetch ahead) {
  R* __restrict e_s = e.s, * __restrict e_t = e.t, * __restrict e_1 = e.one;
  Lanes<R> sum_s, sum_t, sum_1, sum_d;
  sum_s.fill(R(0));
  sum_t = sum_1 = sum_d = sum_s;
  for (int64_t i = 0; i < n; i += kLanes) {
    __builtin_prefetch(ahead.s.data + i * ahead.s.bytes, 0, 2);  // into L2: L1 is full
    if (SOFT) __builtin_prefetch(ahead.t.data + i * ahead.t.bytes, 0, 2);
    __builtin_prefetch(ahead.g.data + i * ahead.g.bytes, 1, 2);
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      const R d = x_s[i + j] - from_s[j];
      const R s = at_t(d);
      e_s[i + j] = s;
      sum_s.at[j] += s;
      if (SOFT) {
        const R t = at_t(x_t[i + j] - from_t[j]);
        e_t[i + j] = t;
        sum_t.at[j] += t;
        sum_d.at[j] += s - t;
      }
      if (HARD && K == 0) {
        const R one = at_1(d);
        e_1[i + j] = one;
        sum_1.at[j] += one;
      } else if (HARD) {
        sum_1.at[j] += power<K>(s);
      }
    }
  }
  sums->s = sum_s;
  sums->t = sum_t;
  sums->one = sum_1;
  sums->difference = sum_d;
}

// The constants of step 3, in the arithmetic of the row. C is Same<R> or Lanes<R>.
template <class R, class C>
struct Constants {
  C a_s, a_t, hard_a_1;         // probability = exponential times this
  C shift, log_ratio;           // u = ((s - t) - shift) / T - log_ratio
  C max_s, log_z;               // -log q = (max_s - s) / T + log_z
  C c_hard, c_soft, c_uniform;  // gradient = c_hard q_1 + c_soft (...) - c_uniform
  C mean;                       // reverse KL: sum q u of the row
  R inv_t;
};

// One class of sum p (exp(u) - 1 - u), and q - p without cancellation: both from one series near
// u = 0. p = 0 leaves q.
template <class R>
FD_INLINE R bregman(R p, R q, R u, R* difference) {
  const R pu = p == R(0) ? R(0) : p * u;  // u is infinite or NaN where a class is masked
  const R near_term = pu * u * bregman_tail(u);
  const R far_difference = q - p;
  const bool near = (u < R(0.1)) & (u > R(-0.1));
  *difference = near ? pu + near_term : far_difference;
  return near ? near_term : far_difference - pu;
}

// What step 3 sums. The gradient of reverse KL is q (u - sum q u): that sum, not the divergence
// (equal but for rounding), since it takes an error common to all u out again.
template <class R>
struct Terms {
  Lanes<R> divergence;
  Lanes<R> mean, largest;  // reverse KL, first round: sum q u, and the largest |q u|
};

// Step 3: the gradient into g, and the terms of the divergence. Reverse KL takes a first round for
// its sums (GRADIENT false) and a second one.
template <class R, Divergence DIV, bool HARD, int K, bool GRADIENT, class C>
static __attribute__((noinline)) void gradient(const Constants<R, C>& constants,
                                               const R* __restrict x_s, const R* __restrict x_t,
                                               Exponentials<R> e, int64_t n, R* __restrict g,
                                               Ahead ahead_g, Terms<R>* terms) {
  const Constants<R, C> c = constants;  // a copy: no store to g can change it
  const R* __restrict e_s = e.s, * __restrict e_t = e.t, * __restrict e_1 = e.one;
  Lanes<R> sum, largest, mean;
  sum.fill(R(0));
  largest = mean = sum;
  for (int64_t i = 0; i < n; i += kLanes) {
    __builtin_prefetch(ahead_g.data + i * ahead_g.bytes, 1, 2);
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      R out = -c.c_uniform[j];
      if (HARD) out += c.hard_a_1[j] * (K == 0 ? e_1[i + j] : power<K>(e_s[i + j]));
      if (DIV != Divergence::none) {
        const R q = e_s[i + j] * c.a_s[j], p = e_t[i + j] * c.a_t[j];
        const R u = ((x_s[i + j] - x_t[i + j]) - c.shift[j]) * c.inv_t - c.log_ratio[j];
        R difference;
        if (DIV == Divergence::reverse_kl) {
          sum.at[j] += bregman(q, p, -u, &difference);
          const R qu = q == R(0) ? R(0) : q * u;
          largest.at[j] = larger(qu < 0 ? -qu : qu, largest.at[j]);
          mean.at[j] += qu;
          out += c.c_soft[j] * (qu - q * c.mean[j]);
        } else {
          const R term = bregman(p, q, u, &difference);
          if (DIV == Divergence::forward_kl) {
            sum.at[j] += term;
          } else {
            const R surprise = (c.max_s[j] - x_s[i + j]) * c.inv_t + c.log_z[j];
            sum.at[j] += p == R(0) ? R(0) : p * surprise;
          }
          out += c.c_soft[j] * difference;
        }
      }
      if (GRADIENT) g[i + j] = out;
    }
  }
  terms->divergence = sum;
  terms->largest = largest;
  terms->mean = mean;
}
