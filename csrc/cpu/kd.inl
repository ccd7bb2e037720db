// The distillation loss of a range of rows, with its gradient: one read of the logits from memory.
// Included once per instruction set, inside that set's namespace.
//
// Rows are handled in groups: several at once where they have few classes, so that the work of a
// row (logarithms, reciprocals) is vectorised over the group; one at a time, in blocks of classes,
// where they have many. Three steps a group:
//   1 exponentials   per block: maxima, exp((z - block maximum)/T) into a cache, their sums
//   2 constants      per row: maximum, normalisers, the factor that rescales each block's cache
//   3 gradient       per block: divergence as a sum of terms >= 0, gradient, store
// With u = log q - log p, D = sum p (exp(u) - 1 - u) for KL(p || q): see fastdistill/kd/reference.py.

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
  R *e_s, *e_t, *e_1;  // [group, stride]: the cached exponentials, at T, T and 1
  R *x_s, *x_t;        // the inputs: [group, stride] where a row is one block, else [block]
  R* g;                // [block]: the gradient on its way out
  double *m_s, *m_t;           // [group * blocks]: block maxima, then the factors of the blocks
  double *z_s, *z_t, *z_1;     // [group * blocks]: block sums
  double *f_s, *f_t, *f_1;     // [group * blocks]: what turns a cached exponential into a probability
  double *row_m_s, *row_m_t;   // [group]
  double *log_ratio;           // [group]: log(Z_s / Z_t), which u subtracts
  double *log_z_s, *log_z_1;   // [group]
  int64_t* row;                // [group]: which row of the problem
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
  double** const per_item[] = {&w.m_s, &w.m_t, &w.z_s, &w.z_t, &w.z_1, &w.f_s, &w.f_t, &w.f_1};
  for (double** p : per_item)
    *p = c.take<double>(items);
  double** const per_row[] = {&w.row_m_s, &w.row_m_t, &w.log_ratio, &w.log_z_s, &w.log_z_1};
  for (double** p : per_row)
    *p = c.take<double>(rows);
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
FD_INLINE R block_maximum(const R* x, int64_t n) {
  R m = -static_cast<R>(__builtin_inf());
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;  // a NaN is caught by the sum
  return m;
}

// Step 1 for one block of n classes (a multiple of kLanes). K = 0: exp(z) has a cache of its own.
template <class R, bool SOFT, bool HARD, int K>
static void exponentials(const R* __restrict x_s, const R* __restrict x_t, int64_t n, R inv_t,
                         R* __restrict e_s, R* __restrict e_t, R* __restrict e_1, double* m_s,
                         double* m_t, double* z_s, double* z_t, double* z_1) {
  const R infinity = static_cast<R>(__builtin_inf());
  const R max_s = block_maximum(x_s, n);
  const R max_t = SOFT ? block_maximum(x_t, n) : R(0);
  const R from_s = max_s == -infinity ? R(0) : max_s;  // all masked: exp(-inf - 0) = 0, not NaN
  const R from_t = max_t == -infinity ? R(0) : max_t;
  R sum_s = 0, sum_t = 0, sum_1 = 0;
#pragma omp simd reduction(+ : sum_s, sum_t, sum_1)
  for (int64_t i = 0; i < n; i++) {
    const R d = x_s[i] - from_s;
    const R e = exp_nonpositive<R>(SOFT ? d * inv_t : d);
    e_s[i] = e;
    sum_s += e;
    if (SOFT) {
      const R f = exp_nonpositive<R>((x_t[i] - from_t) * inv_t);
      e_t[i] = f;
      sum_t += f;
    }
    if (HARD && K == 0) {
      const R h = exp_nonpositive<R>(d);
      e_1[i] = h;
      sum_1 += h;
    } else if (HARD) {
      sum_1 += power<K>(e);
    }
  }
  *m_s = max_s;
  *m_t = max_t;
  *z_s = sum_s;
  *z_t = sum_t;
  *z_1 = sum_1;
}

// Step 2: from block maxima and sums to the constants of each row of the group.
template <class R>
static void constants(const Group<R>& w, int64_t rows, int64_t blocks, double inv_t) {
  const int64_t items = rows * blocks;
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
#pragma omp simd
  for (int64_t i = 0; i < items; i++) {
    w.f_s[i] = exp_nonpositive<double>(w.m_s[i] * inv_t);
    w.f_t[i] = exp_nonpositive<double>(w.m_t[i] * inv_t);
    w.f_1[i] = exp_nonpositive<double>(w.m_s[i]);
  }
  double z_s[kGroupRows], z_t[kGroupRows], z_1[kGroupRows];
  for (int64_t r = 0; r < rows; r++) {
    double s = 0, t = 0, one = 0;
    for (int64_t i = r * blocks; i < (r + 1) * blocks; i++) {
      s += w.z_s[i] * w.f_s[i];
      t += w.z_t[i] * w.f_t[i];
      one += w.z_1[i] * w.f_1[i];
    }
    z_s[r] = s;
    z_t[r] = t;
    z_1[r] = one;
    for (int64_t i = r * blocks; i < (r + 1) * blocks; i++) {
      w.f_s[i] /= s;
      w.f_t[i] /= t;
      w.f_1[i] /= one;
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; r++) {
    w.log_ratio[r] = log1p_positive((z_s[r] - z_t[r]) / z_t[r]);
    w.log_z_s[r] = log1p_positive(z_s[r] - 1.0);
    w.log_z_1[r] = log1p_positive(z_1[r] - 1.0);
  }
}

// The constants of step 3, for one block of one row, in the arithmetic of the row.
template <class R>
struct BlockConstants {
  R a_s, a_t, a_1;      // probability = cached exponential times this
  R inv_t, shift, log_ratio;  // u = ((s - t) - shift) / T - log_ratio
  R from_s, log_z;      // -log q = (from_s - s) / T + log_z
  R c_hard, c_soft, c_uniform;  // gradient = c_hard q_1 + c_soft (...) - c_uniform
  R sum;                // reverse KL: the row's divergence
};

// sum_k v^k 2/(k+2)!, k < series, over 2: (exp(v) - 1 - v) / v^2.
template <class R>
FD_INLINE R series(R v) {
  constexpr double c[] = {1. / 2,    1. / 6,     1. / 24,     1. / 120,      1. / 720,      1. / 5040,
                          1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600};
  R p = R(c[Real<R>::series - 1]);
  for (int k = Real<R>::series - 2; k >= 0; k--) p = p * v + R(c[k]);
  return p;
}

// One class of sum p (exp(u) - 1 - u), and q - p without cancellation: both from one series near
// u = 0. p = 0 leaves q.
template <class R>
FD_INLINE R bregman(R p, R q, R u, R* difference) {
  const R square = p * u * u;
  const R near_term = square * series(u);
  const R far_difference = q - p;
  const bool near = (u < R(0.1)) & (u > R(-0.1));
  const R d = near ? p * u + near_term : far_difference;
  const R far_term = far_difference - p * u;
  const R term = near ? near_term : far_term;
  *difference = p == R(0) ? q : d;
  return p == R(0) ? q : term;
}

// Step 3 for one block of n classes: the gradient into g, the block's part of the divergence
// returned. Reverse KL takes a first round for the sum (GRADIENT false) and a second one.
template <class R, Divergence DIV, bool HARD, int K, bool GRADIENT>
static R gradient(const BlockConstants<R>& c, const R* __restrict x_s, const R* __restrict x_t,
                  const R* __restrict e_s, const R* __restrict e_t, const R* __restrict e_1,
                  int64_t n, R* __restrict g, R* largest) {
  R sum = 0, peak = 0;
#pragma omp simd reduction(+ : sum) reduction(max : peak)
  for (int64_t i = 0; i < n; i++) {
    R out = -c.c_uniform;
    if (HARD) out += c.c_hard * ((K == 0 ? e_1[i] : power<K>(e_s[i])) * c.a_1);
    if (DIV != Divergence::none) {
      const R q = e_s[i] * c.a_s, p = e_t[i] * c.a_t;
      const R u = ((x_s[i] - x_t[i]) - c.shift) * c.inv_t - c.log_ratio;
      R difference;
      if (DIV == Divergence::reverse_kl) {
        sum += bregman(q, p, -u, &difference);
        const R qu = q == R(0) ? R(0) : q * u;
        const R size = qu < 0 ? -qu : qu;
        peak = size > peak ? size : peak;
        out += c.c_soft * (qu - q * c.sum);
      } else {
        const R term = bregman(p, q, u, &difference);
        if (DIV == Divergence::forward_kl) {
          sum += term;
        } else {
          const R surprise = (c.from_s - x_s[i]) * c.inv_t + c.log_z;
          sum += p == R(0) ? R(0) : p * surprise;
        }
        out += c.c_soft * difference;
      }
    }
    if (GRADIENT) g[i] = out;
  }
  if (largest) *largest = peak > *largest ? peak : *largest;
  return sum;
}

template <class R>
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

  int64_t length(int64_t block) const {
    const int64_t left = a.cols - block * kBlock;
    return shape.blocks == 1 ? a.cols : left < kBlock ? left : kBlock;
  }

  template <bool SOFT, bool HARD, int K>
  void step1(int64_t r) const {
    const void* s = row_start(a.student, w.row[r], a.inner);
    const void* t = row_start(a.teacher, w.row[r], a.inner);
    const bool single = shape.blocks == 1;
    R* buffer_s = single ? w.x_s + r * shape.stride : w.x_s;
    R* buffer_t = single ? w.x_t + r * shape.stride : w.x_t;
    for (int64_t b = 0; b < shape.blocks; b++) {
      const int64_t first = b * kBlock, n = length(b), i = r * shape.blocks + b;
      const R* x_s = load(a.student.type, s, first, n, buffer_s, single);
      const R* x_t = SOFT ? load(a.teacher.type, t, first, n, buffer_t, single) : x_s;
      const int64_t at = r * shape.stride + first;
      exponentials<R, SOFT, HARD, K>(x_s, x_t, padded(n), R(inv_t), w.e_s + at, w.e_t + at,
                                     w.e_1 + at, w.m_s + i, w.m_t + i, w.z_s + i, w.z_t + i,
                                     w.z_1 + i);
    }
  }

  // Rounds of step 3 over the blocks of row r; returns the sum of the divergence.
  template <Divergence DIV, bool HARD, int K, bool GRADIENT>
  double round(int64_t r, BlockConstants<R> c, R* largest) const {
    const void* s = row_start(a.student, w.row[r], a.inner);
    const void* t = row_start(a.teacher, w.row[r], a.inner);
    const bool single = shape.blocks == 1;
    const int64_t y = HARD ? a.labels[w.row[r]] : -1;
    char* out = static_cast<char*>(a.grad) + w.row[r] * a.cols * size_of(a.student.type);
    double sum = 0;
    for (int64_t b = 0; b < shape.blocks; b++) {
      const int64_t first = b * kBlock, n = length(b), i = r * shape.blocks + b;
      const R* x_s = single ? w.x_s + r * shape.stride
                            : load(a.student.type, s, first, n, w.x_s, false);
      const R* x_t = DIV == Divergence::none ? x_s
                     : single                ? w.x_t + r * shape.stride
                                             : load(a.teacher.type, t, first, n, w.x_t, false);
      c.a_s = R(w.f_s[i]);
      c.a_t = R(w.f_t[i]);
      c.a_1 = R(w.f_1[i]);
      const int64_t at = r * shape.stride + first;
      sum += gradient<R, DIV, HARD, K, GRADIENT>(c, x_s, x_t, w.e_s + at, w.e_t + at, w.e_1 + at,
                                                 padded(n), w.g, largest);
      if (GRADIENT && a.grad) {
        if (y >= first && y < first + n)
          w.g[y - first] -= c.c_hard * R(1.0 - a.label_smoothing);
        store(a.student.type, out, first, n, w.g, a.stream);
      }
    }
    return sum;
  }

  double hard_part(int64_t r) const {
    const void* s = row_start(a.student, w.row[r], a.inner);
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
    const double power = bound > 0 && bound < 1e300 ? __builtin_exp2(__builtin_floor(
                             __builtin_log2(32768.0 / bound))) : 1.0;
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
    c.shift = R(w.row_m_s[r] - w.row_m_t[r]);
    c.log_ratio = R(w.log_ratio[r]);
    c.from_s = R(w.row_m_s[r]);
    c.log_z = R(w.log_z_s[r]);
    double sum = 0, largest_step = 1.0;
    if (DIV == Divergence::reverse_kl) {
      R largest = 0;
      sum = round<DIV, HARD, K, false>(r, c, &largest);
      const double infinity = __builtin_inf();
      c.sum = sum == infinity ? R(__builtin_nan("")) : R(sum);  // no gradient there: NaN
      largest_step = largest + sum;
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
          fill_zero<R>(a, row);
        } else {
          w.row[rows++] = row;
        }
      }
      for (int64_t r = 0; r < rows; r++) step1<DIV != Divergence::none, HARD, K>(r);
      constants<R>(w, rows, shape.blocks, inv_t);
      for (int64_t r = 0; r < rows; r++) step3<DIV, HARD, K>(r);
    }
    if (a.stream) stream_fence();
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

static bool in_double(const KdArgs& a) {
  return a.student.type == Type::f64 || a.teacher.type == Type::f64;
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
      load(a.type, in, first, n, buffer, true);
#pragma omp simd
      for (int64_t i = 0; i < kBlock; i++) buffer[i] *= factor;
      store(a.type, out, first, n, buffer, a.stream);
    }
  }
  if (a.stream) stream_fence();
}

static void kd_scale(const ScaleArgs& a, int64_t begin, int64_t end) {
  if (a.type == Type::f64) {
    scale_rows<double>(a, begin, end);
  } else {
    scale_rows<float>(a, begin, end);
  }
}
