// The softmax of a row, added to a sum: fixed sequences of IEEE operations, as in reference.py.
// Included once per instruction set, after privacy.inl.
#pragma once

constexpr double kExp[] = {0.5000000000000001,     0.16666666666666669,    0.04166666666662413,
                           0.008333333333330062,   0.0013888888917213717,  0.00019841269863053618,
                           2.4801521295954376e-05, 2.7557268459997064e-06, 2.7620088445409746e-07,
                           2.510038549551032e-08};

// e^x for -708 <= x <= 0.
template <int N>
FD_INLINE void exponential(Doubles (&x)[N]) {
  constexpr double round = 0x1.8p52;
  Doubles shifted[N], p[N];
  for (int i = 0; i < N; i++) {
    shifted[i] = x[i] * 1.4426950408889634 + round;
    const Doubles k = shifted[i] - round;
    x[i] = (x[i] - k * 0.6931471805592082) - k * 7.371002565167799e-13;
  }
  horner(kExp, x, p);
  for (int i = 0; i < N; i++) {
    const Words power = (reinterpret_cast<Words>(shifted[i]) << 52) + 0x3ff0000000000000u;
    x[i] = (((x[i] * x[i]) * p[i] + x[i]) + 1.0) * reinterpret_cast<Doubles>(power);
  }
}

FD_INLINE double highest(Doubles x) {
  double top = x[0];
  for (int j = 1; j < kWide; j++) top = x[j] > top ? x[j] : top;
  return top;
}

template <class From>
static void add_softmax_of(const RowSumCall& call, const void* data, double* row, double* sum) {
  const auto* x = static_cast<const typename From::Element*>(data);
  const int64_t n = call.classes, whole = n / kWide * kWide;
  const double infinity = __builtin_inf();
  Doubles top = Doubles{} - infinity, zero = {};
  for (int64_t j = 0; j < n; j += kWide) {
    Doubles v = j < whole ? From::get(x + j) : get_tail<From>(x + j, n - j);
    zero += v * 0.0;  // NaN where v is not finite
    for (int64_t k = n - j; k < kWide; k++) v[k] = -infinity;
    top = v > top ? v : top;
    write(row + j, v);
  }
  double finite = 0;
  for (int k = 0; k < kWide; k++) finite += zero[k];
  if (finite != 0) return;  // a NaN: the row is left out by a select

  constexpr int chains = 2;  // each exponential is a long chain
  const double first = highest(top);
  Doubles total = {};
  const int64_t end = (n + kWide - 1) / kWide * kWide;
  for (int64_t j = 0; j < end; j += chains * kWide) {
    const int here = end - j < chains * kWide ? 1 : chains;
    Doubles e[chains];
    for (int i = 0; i < chains; i++) {
      const Doubles v = i < here ? read<Doubles>(row + j + i * kWide) : Doubles{} + first;
      const Doubles d = (v - first) * call.inverse_temperature;
      e[i] = d > -708.0 ? d : Doubles{} - 708.0;
    }
    exponential(e);
    for (int i = 0; i < here; i++) {
      const Doubles rounded = e[i] + call.magic_exp - call.magic_exp;
      total += rounded;
      write(row + j + i * kWide, rounded);
    }
  }
  double s = 0;
  for (int k = 0; k < kWide; k++) s += total[k];
  const double factor = call.clip / s;
  for (int64_t j = 0; j < whole; j += kWide) {
    const Doubles p = read<Doubles>(row + j) * factor + call.magic - call.magic;
    write(sum + j, read<Doubles>(sum + j) + p);
  }
  for (int64_t j = whole; j < n; j++) {
    const double p = row[j] * factor + call.magic - call.magic;
    sum[j] += p;
  }
}

static void privacy_add_softmax(const RowSumCall& call, const void* x, double* row, double* sum) {
  switch (call.type) {
    case Type::f32:
      return add_softmax_of<FromF32>(call, x, row, sum);
    case Type::f64:
      return add_softmax_of<FromF64>(call, x, row, sum);
    case Type::bf16:
      return add_softmax_of<FromBf16>(call, x, row, sum);
    case Type::f16:
      return add_softmax_of<FromF16>(call, x, row, sum);
  }
}
