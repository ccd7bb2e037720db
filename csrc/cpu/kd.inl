// The distillation loss of a range of rows, with its gradient: one read of the logits from memory.
// Included once per instruction set, inside that set's namespace.
//
// Rows are handled in groups: several at once where they have few classes, so that the work of a
// row (logarithms, reciprocals) is vectorised over the group; one at a time, in blocks of classes,
// where they have many. Three steps a group:
//   1 exponentials   per block: maxima, exp((z - block maximum)/T) into a cache, their sums
//   2 constants      per row: maximum, normalisers, the factor that rescales each block's cache
//   3 gradient       per block: divergence as a sum of terms >= 0, gradient, store
// With u = log q - log p, D = sum p (exp(u) - 1 - u) for KL(p || q): see
// fastdistill/kd/reference.py.
#pragma once
#include "rows.inl"

constexpr int64_t kBlock = 2048;           // classes a block: two inputs and two caches fit in L1
constexpr int64_t kGroupBytes = 96 << 10;  // caches and inputs of a group stay in L2
constexpr int64_t kGroupRows = 64;

struct Shape {
  int64_t blocks;  // per row
  int64_t stride;  // of a row in the cache
  int64_t group;   // rows a group; more than one only where a row is one block
};

static Shape shape_of(const KdArgs& a) {
  Shape s;
  s.blocks = a.cols <= kBlock ? 1 : (a.cols + kBlock - 1) / kBlock;
  s.stride = padded(a.cols);
  const int64_t row_bytes = s.stride * 5 * 4;
  s.group = s.blocks > 1 ? 1 : kGroupBytes / row_bytes;
  s.group = s.group < 1 ? 1 : s.group > kGroupRows ? kGroupRows : s.group;
  return s;
}

static int64_t kd_group_rows(const KdArgs& a) { return shape_of(a).group; }

// What a thread keeps for one group; carved out of its scratch.
template <class R>
struct Group {
  R *e_s, *e_t, *e_1;       // [group, stride]: the cached exponentials, at T, T and 1
  R *x_s, *x_t;             // the inputs: [group, stride] where a row is one block, else [block]
  R* g;                     // [block]: the gradient on its way out
  double *m_s, *m_t;        // [group * blocks]: block maxima, then the factors of the blocks
  double *z_s, *z_t, *z_1;  // [group * blocks]: block sums
  double* z_d;              // [group * blocks]: sums of e_s - e_t
  double *f_s, *f_t, *f_1;  // [group * blocks]: what turns a cached exponential into a probability
  double *row_m_s, *row_m_t;  // [group]
  double* log_ratio;          // [group]: log(Z_s / Z_t), which u subtracts
  double *log_z_s, *log_z_1;  // [group]
  const R **p_s, **p_t;       // [group]: the inputs of each row, for rows of one block
  const char **at_s, **at_t;  // [group]: where the row begins
  int64_t* row;               // [group]: which row of the problem
};

struct Carver {
  char* at;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

template <class R>
static Group<R> carve(const KdArgs& a, const Shape& s, void* scratch, size_t* bytes) {
  Carver c{static_cast<char*>(scratch)};
  Group<R> w;
  const int64_t cache = s.group * s.stride;
  const int64_t inputs = s.blocks == 1 ? cache : kBlock;
  const int64_t items = (s.group * s.blocks + kLanes) / kLanes * kLanes;
  const int64_t rows = (s.group + kLanes) / kLanes * kLanes;
  w.e_s = c.take<R>(cache);
  w.e_t = c.take<R>(a.divergence == Divergence::none ? 0 : cache);
  w.e_1 = c.take<R>(a.hard_weight == 0 ? 0 : cache);
  w.x_s = c.take<R>(inputs);
  w.x_t = c.take<R>(inputs);
  w.g = c.take<R>(kBlock);
  double** const per_item[] = {&w.m_s, &w.m_t, &w.z_s, &w.z_t, &w.z_1,
                               &w.z_d, &w.f_s, &w.f_t, &w.f_1};
  for (double** p : per_item) *p = c.take<double>(items);
  double** const per_row[] = {&w.row_m_s, &w.row_m_t, &w.log_ratio, &w.log_z_s, &w.log_z_1};
  for (double** p : per_row) *p = c.take<double>(rows);
  w.p_s = c.take<const R*>(rows);
  w.p_t = c.take<const R*>(rows);
  w.at_s = c.take<const char*>(rows);
  w.at_t = c.take<const char*>(rows);
  w.row = c.take<int64_t>(rows);
  if (bytes) *bytes = static_cast<size_t>(c.at - static_cast<char*>(scratch));
  return w;
}

// e^K for the temperatures at which exp(z) is a small power of exp(z/T).
template <int K, class R>
FD_INLINE R power(R e) {
  if (K == 2) return e * e;
  if (K == 3) return e * e * e;
  if (K == 4) return (e * e) * (e * e);
  return e;
}

template <class R>
FD_INLINE R larger(R x, R m) {
  return x > m ? x : m;  // a NaN is caught by the sum of the exponentials
}

// One value per lane: the sums and maxima of a loop. The loops below run over whole chunks of
// kLanes classes, an inner `omp simd` loop each; a scalar reduction would end in kLanes dependent
// additions per row, which rows of 100 classes feel.
template <class R>
struct Lanes {
  alignas(64) R at[kLanes];

  FD_INLINE_MEMBER void fill(R x) {
    for (int j = 0; j < kLanes; j++) at[j] = x;
  }
  FD_INLINE_MEMBER R sum() const { return folded<true>(); }
  FD_INLINE_MEMBER R maximum() const { return folded<false>(); }

 private:
  template <int N>
  struct Vector {
    typedef R Type __attribute__((vector_size(N * sizeof(R)), may_alias));
  };

  // Halves with halves, in vector registers: as scalars it is a fifth of a row of 100 classes.
  template <bool ADD>
  FD_INLINE_MEMBER R folded() const {
    alignas(64) R x[kLanes];
    __builtin_memcpy(x, at, sizeof x);
    fold<ADD, kLanes / 2>(x);
    return x[0];
  }
  template <bool ADD, int N>
  FD_INLINE_MEMBER static void fold(R* x) {
    if constexpr (N >= 2) {
      typedef typename Vector<N>::Type V;
      V low, high;
      __builtin_memcpy(&low, x, sizeof low);
      __builtin_memcpy(&high, x + N, sizeof high);
      if constexpr (ADD) {
        low += high;
      } else {
        low = low > high ? low : high;
      }
      __builtin_memcpy(x, &low, sizeof low);
      fold<ADD, N / 2>(x);
    } else {
      x[0] = ADD ? x[0] + x[1] : larger(x[0], x[1]);
    }
  }
};

// The maxima of one block: n classes, a multiple of kLanes.
template <class R, bool SOFT>
static void maxima(const R* __restrict x_s, const R* __restrict x_t, int64_t n, R* m_s, R* m_t) {
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
  *m_s = s.maximum();
  *m_t = t.maximum();
}

struct Ahead {
  const char* data;
  int64_t bytes;  // of an element
};

// Step 1 for one block of n classes (a multiple of kLanes), given its maxima. K = 0: exp(z) has a
// cache of its own. `ahead` is what will be read next: it comes from memory while this computes
// (without it the maxima wait for memory, 3/5 of the step).
template <class R, bool SOFT, bool HARD, int K>
static void exponentials(const R* __restrict x_s, const R* __restrict x_t, int64_t n, R max_s,
                         R max_t, Exp<R> at_t, Exp<R> at_1, R* __restrict e_s, R* __restrict e_t,
                         R* __restrict e_1, double* z_s, double* z_t, double* z_1, double* z_d,
                         Ahead ahead_s, Ahead ahead_t) {
  const R infinity = static_cast<R>(__builtin_inf());
  const R from_s = max_s == -infinity ? R(0) : max_s;  // all masked: exp(-inf - 0) = 0, not NaN
  const R from_t = max_t == -infinity ? R(0) : max_t;
  Lanes<R> sum_s, sum_t, sum_1, sum_d;
  sum_s.fill(R(0));
  sum_t = sum_1 = sum_d = sum_s;
  for (int64_t i = 0; i < n; i += kLanes) {
    __builtin_prefetch(ahead_s.data + i * ahead_s.bytes, 0, 2);  // into L2: L1 is full
    if (SOFT) __builtin_prefetch(ahead_t.data + i * ahead_t.bytes, 0, 2);
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      const R d = x_s[i + j] - from_s;
      const R e = at_t(d);
      e_s[i + j] = e;
      sum_s.at[j] += e;
      if (SOFT) {
        const R f = at_t(x_t[i + j] - from_t);
        e_t[i + j] = f;
        sum_t.at[j] += f;
        sum_d.at[j] += e - f;
      }
      if (HARD && K == 0) {
        const R h = at_1(d);
        e_1[i + j] = h;
        sum_1.at[j] += h;
      } else if (HARD) {
        sum_1.at[j] += power<K>(e);
      }
    }
  }
  *z_s = sum_s.sum();
  *z_t = sum_t.sum();
  *z_1 = sum_1.sum();
  *z_d = sum_d.sum();
}

// Step 2: from block maxima and sums to the constants of each row of the group.
template <class R>
static void constants(const Group<R>& w, int64_t rows, int64_t blocks, double inv_t) {
  const int64_t items = rows * blocks;
  const Exp<double> at_t(inv_t), at_1(1.0);
  for (int64_t r = 0; r < rows; r++) {
    double m_s = -__builtin_inf(), m_t = -__builtin_inf();
    for (int64_t i = r * blocks; i < (r + 1) * blocks; i++) {
      m_s = w.m_s[i] > m_s ? w.m_s[i] : m_s;
      m_t = w.m_t[i] > m_t ? w.m_t[i] : m_t;
    }
    w.row_m_s[r] = m_s;
    w.row_m_t[r] = m_t;
    for (int64_t i = r * blocks; i < (r + 1) * blocks; i++) {
      w.m_s[i] -= m_s;
      w.m_t[i] -= m_t;
    }
  }
  if (blocks == 1) {  // the block's maximum is the row's
    for (int64_t i = 0; i < items; i++) {
      w.f_s[i] = w.m_s[i] == 0 ? 1.0 : w.m_s[i];  // NaN stays NaN
      w.f_t[i] = w.m_t[i] == 0 ? 1.0 : w.m_t[i];
      w.f_1[i] = w.f_s[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < items; i++) {
      w.f_s[i] = at_t(w.m_s[i]);
      w.f_t[i] = at_t(w.m_t[i]);
      w.f_1[i] = at_1(w.m_s[i]);
    }
  }
  double z_s[kGroupRows], z_t[kGroupRows], z_1[kGroupRows], z_d[kGroupRows];
  for (int64_t r = 0; r < rows; r++) {
    double s = 0, t = 0, one = 0, difference = 0;
    for (int64_t i = r * blocks; i < (r + 1) * blocks; i++) {
      s += w.z_s[i] * w.f_s[i];
      t += w.z_t[i] * w.f_t[i];
      one += w.z_1[i] * w.f_1[i];
      difference += w.f_s[i] * w.z_d[i] + (w.f_s[i] - w.f_t[i]) * w.z_t[i];
    }
    z_s[r] = s;
    z_t[r] = t;
    z_1[r] = one;
    z_d[r] = difference;  // not s - t, whose rounding all u would share: 3e-5 of q - p at T = 1000
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; r++) {
    w.log_ratio[r] = log1p_positive(z_d[r] / z_t[r]);
    w.log_z_s[r] = log1p_positive(z_s[r] - 1.0);
    w.log_z_1[r] = log1p_positive(z_1[r] - 1.0);
    z_s[r] = 1.0 / z_s[r];
    z_t[r] = 1.0 / z_t[r];
    z_1[r] = 1.0 / z_1[r];
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = r * blocks; i < (r + 1) * blocks; i++) {
      w.f_s[i] *= z_s[r];
      w.f_t[i] *= z_t[r];
      w.f_1[i] *= z_1[r];
    }
  }
}

// The constants of step 3, for one block of one row, in the arithmetic of the row.
template <class R>
struct BlockConstants {
  R a_s, a_t, hard_a_1;         // probability = cached exponential times this
  R inv_t, shift, log_ratio;    // u = ((s - t) - shift) / T - log_ratio
  R from_s, log_z;              // -log q = (from_s - s) / T + log_z
  R c_hard, c_soft, c_uniform;  // gradient = c_hard q_1 + c_soft (...) - c_uniform
  R mean;                       // reverse KL: sum q u of the row
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

// What the gradient of reverse KL needs of the whole row. It is q (u - sum q u): that sum, not the
// divergence (equal but for rounding), since it takes an error common to all u out again.
template <class R>
struct Reverse {
  double mean;  // sum q u
  R largest;    // of |q u|
};

// Step 3 for one block of n classes: the gradient into g, the block's part of the divergence
// returned. Reverse KL takes a first round for the sum (GRADIENT false) and a second one.
template <class R, Divergence DIV, bool HARD, int K, bool GRADIENT>
static R gradient(const BlockConstants<R>& c, const R* __restrict x_s, const R* __restrict x_t,
                  const R* __restrict e_s, const R* __restrict e_t, const R* __restrict e_1,
                  int64_t n, R* __restrict g, Reverse<R>* reverse) {
  Lanes<R> sum, peak, mean;
  sum.fill(R(0));
  peak = mean = sum;
  for (int64_t i = 0; i < n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; j++) {
      R out = -c.c_uniform;
      if (HARD) out += c.hard_a_1 * (K == 0 ? e_1[i + j] : power<K>(e_s[i + j]));
      if (DIV != Divergence::none) {
        const R q = e_s[i + j] * c.a_s, p = e_t[i + j] * c.a_t;
        const R u = ((x_s[i + j] - x_t[i + j]) - c.shift) * c.inv_t - c.log_ratio;
        R difference;
        if (DIV == Divergence::reverse_kl) {
          sum.at[j] += bregman(q, p, -u, &difference);
          const R qu = q == R(0) ? R(0) : q * u;
          peak.at[j] = larger(qu < 0 ? -qu : qu, peak.at[j]);
          mean.at[j] += qu;
          out += c.c_soft * (qu - q * c.mean);
        } else {
          const R term = bregman(p, q, u, &difference);
          if (DIV == Divergence::forward_kl) {
            sum.at[j] += term;
          } else {
            const R surprise = (c.from_s - x_s[i + j]) * c.inv_t + c.log_z;
            sum.at[j] += p == R(0) ? R(0) : p * surprise;
          }
          out += c.c_soft * difference;
        }
      }
      if (GRADIENT) g[i + j] = out;
    }
  }
  if (reverse) {
    reverse->largest = larger(peak.maximum(), reverse->largest);
    reverse->mean += mean.sum();
  }
  return sum.sum();
}

static void fill_zero(const KdArgs& a, int64_t row) {
  a.hard[row] = a.soft[row] = 0;
  if (a.grad_scale) a.grad_scale[row] = 0;
  if (a.grad) {
    const int64_t bytes = a.cols * size_of(a.student.type);
    __builtin_memset(static_cast<char*>(a.grad) + row * bytes, 0, static_cast<size_t>(bytes));
  }
}

template <class R>
struct Pass {
  const KdArgs& a;
  const Shape shape;
  const Group<R> w;
  const double temperature = a.divergence == Divergence::none ? 1.0 : a.temperature;
  const double inv_t = 1.0 / temperature;
  const Exp<R> at_t{inv_t}, at_1{1.0};

  bool single() const { return shape.blocks == 1; }

  int64_t length(int64_t block) const {
    const int64_t left = a.cols - block * kBlock;
    return shape.blocks == 1 ? a.cols : left < kBlock ? left : kBlock;
  }

  // Block b of row r as R, padded. A row of one block keeps its copy for step 3.
  const R* input(Type type, const char* row, R* buffer, int64_t r, int64_t b) const {
    return load(type, row, b * kBlock, length(b), buffer + (single() ? r * shape.stride : 0));
  }

  // What comes after block b of a row: the next block, or the next row.
  Ahead ahead(const Rows& rows, const char* row, int64_t b) const {
    const int64_t bytes = size_of(rows.type);
    const int64_t elements = b + 1 < shape.blocks ? (b + 1) * kBlock : rows.step;
    return {row + elements * bytes, bytes};
  }

  template <bool SOFT, bool HARD, int K>
  void step1(int64_t r) const {
    for (int64_t b = 0; b < shape.blocks; b++) {
      const R* x_s = input(a.student.type, w.at_s[r], w.x_s, r, b);
      const R* x_t = SOFT ? input(a.teacher.type, w.at_t[r], w.x_t, r, b) : x_s;
      w.p_s[r] = x_s;
      w.p_t[r] = x_t;
      const int64_t n = padded(length(b)), i = r * shape.blocks + b;
      const int64_t at = r * shape.stride + b * kBlock;
      R max_s, max_t;
      maxima<R, SOFT>(x_s, x_t, n, &max_s, &max_t);
      w.m_s[i] = max_s;
      w.m_t[i] = max_t;
      exponentials<R, SOFT, HARD, K>(x_s, x_t, n, max_s, max_t, at_t, at_1, w.e_s + at, w.e_t + at,
                                     w.e_1 + at, w.z_s + i, w.z_t + i, w.z_1 + i, w.z_d + i,
                                     ahead(a.student, w.at_s[r], b),
                                     ahead(a.teacher, w.at_t[r], b));
    }
  }

  // Rounds of step 3 over the blocks of row r; returns the sum of the divergence.
  template <Divergence DIV, bool HARD, int K, bool GRADIENT>
  double round(int64_t r, BlockConstants<R> c, Reverse<R>* reverse) const {
    const int64_t y = HARD ? a.labels[w.row[r]] : -1;
    char* out = static_cast<char*>(a.grad) + w.row[r] * a.cols * size_of(a.student.type);
    double sum = 0;
    for (int64_t b = 0; b < shape.blocks; b++) {
      const int64_t first = b * kBlock, n = length(b), i = r * shape.blocks + b;
      const bool soft = DIV != Divergence::none;
      const R* x_s = single() ? w.p_s[r] : input(a.student.type, w.at_s[r], w.x_s, r, b);
      const R* x_t = single() ? w.p_t[r]
                     : soft   ? input(a.teacher.type, w.at_t[r], w.x_t, r, b)
                              : x_s;
      c.a_s = R(w.f_s[i]);
      c.a_t = R(w.f_t[i]);
      c.hard_a_1 = R(c.c_hard * w.f_1[i]);
      const int64_t at = r * shape.stride + first;
      sum += gradient<R, DIV, HARD, K, GRADIENT>(c, x_s, x_t, w.e_s + at, w.e_t + at, w.e_1 + at,
                                                 padded(n), w.g, reverse);
      if (GRADIENT && a.grad) {
        if (y >= first && y < first + n) w.g[y - first] -= c.c_hard * R(1.0 - a.label_smoothing);
        store(a.student.type, out, first, n, w.g);
      }
    }
    return sum;
  }

  double hard_part(int64_t r) const {
    const void* s = w.at_s[r];
    const double m = w.row_m_s[r], log_z = w.log_z_1[r], eps = a.label_smoothing;
    const double nll = (m - element<double>(a.student.type, s, a.labels[w.row[r]])) + log_z;
    if (eps == 0) return nll;
    double all = 0;
    for (int64_t i = 0; i < a.cols; i++) all += m - element<double>(a.student.type, s, i);
    const double classes = static_cast<double>(a.cols);
    return (1.0 - eps) * nll + eps * (all / classes + log_z);
  }

  // f16 keeps the row weight and 1 / divisor out of the stored gradient, which would underflow,
  // and stores it times a power of two that cannot overflow.
  double row_factor(int64_t row, double bound) const {
    if (!a.grad_scale) return a.row_scale[row];
    const double power = bound > 0 && bound < 1e300
                             ? __builtin_exp2(__builtin_floor(__builtin_log2(32768.0 / bound)))
                             : 1.0;
    const double clamped = power > 1e30 ? 1e30 : power < 1e-30 ? 1e-30 : power;
    a.grad_scale[row] = static_cast<float>(a.row_scale[row] / clamped);
    return clamped;
  }

  template <Divergence DIV, bool HARD, int K>
  void step3(int64_t r) const {
    const int64_t row = w.row[r];
    const double t2 = a.scale_t2 ? temperature * temperature : 1.0;
    const double soft = DIV == Divergence::none ? 0.0 : a.soft_weight * t2 * inv_t;
    BlockConstants<R> c{};
    c.inv_t = R(inv_t);
    // u = ((s - t) - shift) / T - log_ratio. All but the rounding of the sum goes into `shift`: an
    // error common to all u shows in the gradient of forward KL (1e-5 of it at T = 1000).
    const R apart = R(w.row_m_s[r]) - R(w.row_m_t[r]);  // rounded as s - t is
    const double shift = apart + temperature * w.log_ratio[r];
    c.shift = R(shift);
    c.log_ratio = R((shift - static_cast<double>(c.shift)) * inv_t);
    c.from_s = R(w.row_m_s[r]);
    c.log_z = R(w.log_z_s[r]);
    double sum = 0, largest_step = 1.0;
    if (DIV == Divergence::reverse_kl) {
      Reverse<R> reverse{0, 0};
      sum = round<DIV, HARD, K, false>(r, c, &reverse);
      const double infinity = __builtin_inf();
      c.mean = sum == infinity ? R(__builtin_nan("")) : R(reverse.mean);  // no gradient: NaN
      largest_step = reverse.largest + __builtin_fabs(reverse.mean);
    }
    const double hard_size = __builtin_fabs(a.hard_weight);
    const double factor = row_factor(row, hard_size + __builtin_fabs(soft) * largest_step);
    c.c_hard = R(a.hard_weight * factor);
    c.c_soft = R(soft * factor);
    c.c_uniform = HARD ? R(a.hard_weight * factor * a.label_smoothing / a.cols) : R(0);
    if (DIV != Divergence::reverse_kl || a.grad) {
      const double s = round<DIV, HARD, K, true>(r, c, nullptr);
      if (DIV != Divergence::reverse_kl) sum = s;
    }
    a.soft[row] = DIV == Divergence::none ? 0.0 : sum * t2;
    a.hard[row] = HARD ? hard_part(r) : 0.0;
  }

  template <Divergence DIV, bool HARD, int K>
  void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end;) {
      int64_t rows = 0;
      for (; row < end && rows < shape.group; row++) {
        if (a.row_scale[row] == 0) {
          fill_zero(a, row);
        } else {
          w.at_s[rows] = row_start(a.student, row, a.inner);
          w.at_t[rows] = row_start(a.teacher, row, a.inner);
          w.row[rows++] = row;
        }
      }
      for (int64_t r = 0; r < rows; r++) step1<DIV != Divergence::none, HARD, K>(r);
      constants<R>(w, rows, shape.blocks, inv_t);
      for (int64_t r = 0; r < rows; r++) step3<DIV, HARD, K>(r);
    }
  }

  template <Divergence DIV>
  void by_power(int64_t begin, int64_t end) const {
    if (a.hard_weight == 0) return run<DIV, false, 1>(begin, end);
    if (temperature == 1.0) return run<DIV, true, 1>(begin, end);
    if (sizeof(R) == 4 && temperature == 2.0) return run<DIV, true, 2>(begin, end);
    if (sizeof(R) == 4 && temperature == 3.0) return run<DIV, true, 3>(begin, end);
    if (sizeof(R) == 4 && temperature == 4.0) return run<DIV, true, 4>(begin, end);
    run<DIV, true, 0>(begin, end);
  }

  void rows(int64_t begin, int64_t end) const {
    switch (a.divergence) {
      case Divergence::none:
        return run<Divergence::none, true, 1>(begin, end);
      case Divergence::forward_kl:
        return by_power<Divergence::forward_kl>(begin, end);
      case Divergence::reverse_kl:
        return by_power<Divergence::reverse_kl>(begin, end);
      case Divergence::cross_entropy:
        return by_power<Divergence::cross_entropy>(begin, end);
    }
  }
};

// Also for temperatures whose products with a float leave its range.
static bool in_double(const KdArgs& a) {
  return a.student.type == Type::f64 || a.teacher.type == Type::f64 || a.temperature > 1e30 ||
         a.temperature < 1e-30;
}

static size_t kd_scratch_bytes(const KdArgs& a) {
  size_t bytes = 0;
  if (in_double(a)) {
    carve<double>(a, shape_of(a), nullptr, &bytes);
  } else {
    carve<float>(a, shape_of(a), nullptr, &bytes);
  }
  return bytes;
}

static void kd_forward(const KdArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Shape shape = shape_of(a);
  if (in_double(a)) {
    Pass<double>{a, shape, carve<double>(a, shape, scratch, nullptr)}.rows(begin, end);
  } else {
    Pass<float>{a, shape, carve<float>(a, shape, scratch, nullptr)}.rows(begin, end);
  }
}

// The backward pass: a row times its factor. A factor of exactly 1 changes nothing in place.
template <class R>
static void scale_rows(const ScaleArgs& a, int64_t begin, int64_t end) {
  alignas(64) R buffer[kBlock];
  const int64_t bytes = a.cols * size_of(a.type);
  for (int64_t row = begin; row < end; row++) {
    const R factor = R(a.factor[a.uniform ? 0 : row]);
    if (factor == R(1) && a.in == a.out) continue;
    const char* in = static_cast<const char*>(a.in) + row * bytes;
    char* out = static_cast<char*>(a.out) + row * bytes;
    for (int64_t first = 0; first < a.cols; first += kBlock) {
      const int64_t n = a.cols - first < kBlock ? a.cols - first : kBlock;
      const R* x = load(a.type, in, first, n, buffer);
      for (int64_t i = 0; i < padded(n); i += kLanes) {
#pragma omp simd
        for (int j = 0; j < kLanes; j++) {
          // A gradient of 0 stays: a dropped row has none, whatever comes from outside.
          buffer[i + j] = x[i + j] == R(0) ? R(0) : x[i + j] * factor;
        }
      }
      store(a.type, out, first, n, buffer);
    }
  }
}

static void kd_scale(const ScaleArgs& a, int64_t begin, int64_t end) {
  if (a.type == Type::f64) {
    scale_rows<double>(a, begin, end);
  } else {
    scale_rows<float>(a, begin, end);
  }
}
