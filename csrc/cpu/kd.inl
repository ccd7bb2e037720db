// The distillation loss of a range of rows, with its gradient: one read of the logits from memory.
// Included once per instruction set, inside that set's namespace.
//
// Rows are handled in groups, in three steps:
//   1 exponentials   maxima, exp((z - maximum)/T) and their sums
//   2 constants      per row: maximum, normalisers
//   3 gradient       divergence as a sum of terms >= 0, gradient, store
// With u = log q - log p, D = sum p (exp(u) - 1 - u) for KL(p || q): see
// fastdistill/kd/reference.py. The shape of the loops depends on the number of classes (shape_of):
//   few     kLanes rows at once, a row to a lane: nothing is padded, nothing is folded
//   more    one row at a time, lanes of classes; step 2 is vectorised over the rows of the group
//   many    one row in blocks of classes, so that step 1 reads a block's maxima and its
//   exponentials
//           out of L1; a factor per block turns its exponentials into probabilities
// Step 1 keeps the exponentials for step 3.
#pragma once
#include "kd_steps.inl"
#include "tile.inl"

constexpr int64_t kFew = 192;              // classes up to which kLanes rows at once are faster,
constexpr int64_t kFewWhole = 112;         // and where a row needs no padding
constexpr int64_t kBlock = 2048;           // classes a block: two inputs and two caches fit in L1
constexpr int64_t kGroupBytes = 96 << 10;  // caches and inputs of a group stay in L2
constexpr int64_t kGroupRows = 64;

struct Shape {
  bool few;        // kLanes rows at once
  int64_t blocks;  // per row
  int64_t stride;  // of a row in the caches
  int64_t group;   // rows a group; more than one only where a row is one block
};

template <class R>
static Shape shape_of(const KdArgs& a) {
  Shape s;
  s.few = sizeof(R) == 4 && a.cols <= (a.cols % kLanes == 0 ? kFewWhole : kFew);
  s.blocks = a.cols <= kBlock ? 1 : (a.cols + kBlock - 1) / kBlock;
  s.stride = s.few ? a.cols : padded(a.cols);
  const int64_t row_bytes = s.stride * 5 * 4;
  s.group = s.blocks > 1 ? 1 : kGroupBytes / row_bytes;
  s.group = s.group < 1 ? 1 : s.group > kGroupRows ? kGroupRows : s.group;
  if (s.few) s.group = kLanes;
  return s;
}

// What a thread keeps for one group; carved out of its scratch.
template <class R>
struct Group {
  Exponentials<R> e;          // [group, stride], or [stride, kLanes] of few classes
  R *x_s, *x_t;               // the inputs, likewise; [block] where a row has several
  R* g;                       // the gradient on its way out: [block], or [stride, kLanes]
  double *m_s, *m_t;          // [group * blocks]: block maxima, then the factors of the blocks
  double *z_s, *z_t, *z_1;    // [group * blocks]: block sums
  double* z_d;                // [group * blocks]: sums of e_s - e_t
  double *f_s, *f_t, *f_1;    // [group * blocks]: what turns an exponential into a probability
  double *row_m_s, *row_m_t;  // [group]
  double* log_ratio;          // [group]: log(Z_s / Z_t), which u subtracts
  double *log_z_s, *log_z_1;  // [group]
  const R **p_s, **p_t;       // [group]: the inputs of each row, for rows of one block
  const char **at_s, **at_t;  // [group]: where the row begins
  char** at_g;                // [group]: where its gradient goes
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
  w.e.s = c.take<R>(cache);
  w.e.t = c.take<R>(a.divergence == Divergence::none ? 0 : cache);
  w.e.one = c.take<R>(a.hard_weight == 0 ? 0 : cache);
  w.x_s = c.take<R>(inputs);
  w.x_t = c.take<R>(inputs);
  w.g = c.take<R>(s.few ? cache : kBlock);
  double** const per_item[] = {&w.m_s, &w.m_t, &w.z_s, &w.z_t, &w.z_1,
                               &w.z_d, &w.f_s, &w.f_t, &w.f_1};
  for (double** p : per_item) *p = c.take<double>(items);
  double** const per_row[] = {&w.row_m_s, &w.row_m_t, &w.log_ratio, &w.log_z_s, &w.log_z_1};
  for (double** p : per_row) *p = c.take<double>(rows);
  w.p_s = c.take<const R*>(rows);
  w.p_t = c.take<const R*>(rows);
  w.at_s = c.take<const char*>(rows);
  w.at_t = c.take<const char*>(rows);
  w.at_g = c.take<char*>(rows);
  w.row = c.take<int64_t>(rows);
  if (bytes) *bytes = static_cast<size_t>(c.at - static_cast<char*>(scratch));
  return w;
}

// Step 2: from block maxima and sums to the constants of each row of the group.
template <class R>
static void normalisers(const Group<R>& w, const Shape& shape, int64_t rows, double inv_t) {
  const int64_t blocks = shape.blocks;
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

// What the gradient of reverse KL needs of the whole row.
struct Reverse {
  double mean;     // sum q u
  double largest;  // of |q u|
};

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
  const double inv_cols = 1.0 / static_cast<double>(a.cols);

  bool single() const { return shape.blocks == 1; }

  int64_t length(int64_t block) const {
    const int64_t left = a.cols - block * kBlock;
    return single() ? a.cols : left < kBlock ? left : kBlock;
  }

  // Block b of row r as R, padded. A row of one block keeps its copy for step 3.
  const R* input(Type type, const char* row, R* buffer, int64_t r, int64_t b) const {
    return load(type, row, b * kBlock, length(b), buffer + (single() ? r * shape.stride : 0));
  }

  Exponentials<R> kept(int64_t at) const { return {w.e.s + at, w.e.t + at, w.e.one + at}; }

  // What comes after block b of a row: the next block, or the next row.
  Ahead ahead(const Rows& rows, const char* row, int64_t b) const {
    const int64_t bytes = size_of(rows.type);
    const int64_t elements = b + 1 < shape.blocks ? (b + 1) * kBlock : rows.step;
    return {row + elements * bytes, bytes};
  }

  Ahead nowhere() const { return {reinterpret_cast<const char*>(w.g), 0}; }

  // Where the gradient of row r of the group, and the rows after it, will be written; of a row of
  // several blocks it would have left the caches by then: there step 3 looks a block ahead.
  Ahead gradient_of(int64_t r) const {
    return a.grad && single() ? Ahead{w.at_g[r], size_of(a.student.type)} : nowhere();
  }
  Ahead gradient_after(int64_t r, int64_t b) const {
    if (!a.grad || single()) return nowhere();
    const int64_t bytes = size_of(a.student.type);
    return {w.at_g[r] + (b + 1) * kBlock * bytes, bytes};
  }

  // What comes after a row.
  Ahead after(const Rows& rows, const char* row) const {
    return ahead(rows, row, shape.blocks - 1);
  }

  // ---- Rows one at a time: lanes of classes.

  template <bool SOFT, bool HARD, int K>
  void step1(int64_t r) const {
    for (int64_t b = 0; b < shape.blocks; b++) {
      const R* x_s = input(a.student.type, w.at_s[r], w.x_s, r, b);
      const R* x_t = SOFT ? input(a.teacher.type, w.at_t[r], w.x_t, r, b) : x_s;
      w.p_s[r] = x_s;
      w.p_t[r] = x_t;
      const int64_t n = padded(length(b)), i = r * shape.blocks + b;
      Lanes<R> lanes_s, lanes_t;
      maxima<R, SOFT>(x_s, x_t, n, &lanes_s, &lanes_t);
      const R max_s = lanes_s.maximum(), max_t = lanes_t.maximum();
      w.m_s[i] = max_s;
      w.m_t[i] = max_t;
      Sums<R> sums;
      exponentials<R, SOFT, HARD, K>(
          x_s, x_t, n, Same<R>{origin(max_s)}, Same<R>{origin(max_t)}, at_t, at_1,
          kept(r * shape.stride + b * kBlock), &sums,
          {ahead(a.student, w.at_s[r], b), ahead(a.teacher, w.at_t[r], b), gradient_of(r)});
      w.z_s[i] = sums.s.sum();
      w.z_t[i] = sums.t.sum();
      w.z_1[i] = sums.one.sum();
      w.z_d[i] = sums.difference.sum();
    }
  }

  // Rounds of step 3 over the blocks of row r; returns the sum of the divergence.
  template <Divergence DIV, bool HARD, int K, bool GRADIENT>
  double round(int64_t r, Constants<R, Same<R>>& c, Reverse* reverse) const {
    const int64_t y = HARD ? a.labels[w.row[r]] : -1;
    const bool soft = DIV != Divergence::none;
    const bool direct = a.student.type == TypeOf<R>::value;
    double sum = 0;
    for (int64_t b = 0; b < shape.blocks; b++) {
      const int64_t first = b * kBlock, n = length(b);
      const R* x_s = single() ? w.p_s[r] : input(a.student.type, w.at_s[r], w.x_s, r, b);
      const R* x_t = single() ? w.p_t[r]
                     : soft   ? input(a.teacher.type, w.at_t[r], w.x_t, r, b)
                              : x_s;
      to_probability(c, 0, r * shape.blocks + b);
      const bool whole = direct && n % kLanes == 0;  // no padding: straight to where it goes
      R* g = GRADIENT && a.grad && whole ? reinterpret_cast<R*>(w.at_g[r]) + first : w.g;
      Terms<R> terms;
      gradient<R, DIV, HARD, K, GRADIENT>(c, x_s, x_t, kept(r * shape.stride + first), padded(n), g,
                                          gradient_after(r, b), &terms);
      sum += terms.divergence.sum();
      if (reverse) {
        reverse->largest = larger(double(terms.largest.maximum()), reverse->largest);
        reverse->mean += terms.mean.sum();
      }
      if (GRADIENT && a.grad) {
        if (y >= first && y < first + n) g[y - first] -= c.c_hard[0] * R(1.0 - a.label_smoothing);
        if (!whole) store(a.student.type, w.at_g[r], first, n, w.g);
      }
    }
    return sum;
  }

  template <Divergence DIV, bool HARD, int K>
  void step3(int64_t r) const {
    Constants<R, Same<R>> c{};
    Reverse reverse{0, 0};
    double sum = 0;
    set_row(c, 0, r);
    if (DIV == Divergence::reverse_kl) {
      sum = round<DIV, HARD, K, false>(r, c, &reverse);
      set_mean(c, 0, sum, reverse.mean);
    }
    set_weights<DIV, HARD>(c, 0, r, reverse);
    if (DIV != Divergence::reverse_kl || a.grad) {
      const double s = round<DIV, HARD, K, true>(r, c, nullptr);
      if (DIV != Divergence::reverse_kl) sum = s;
    }
    finish<DIV, HARD>(r, sum);
  }

  // ---- Few classes: kLanes rows at once. Lanes beyond `rows` repeat the first row. The sums of a
  // lane are carried on in double from piece to piece: a lane adds up a whole row.

  static constexpr int64_t kPiece = 32 * kLanes;
  static int64_t piece(int64_t i, int64_t n) { return n - i < kPiece ? n - i : kPiece; }

  template <Divergence DIV, bool HARD, int K>
  void tile(int64_t rows) const {
    constexpr bool SOFT = DIV != Divergence::none;
    const int64_t n = a.cols * kLanes;
    for (int64_t r = rows; r < kLanes; r++) {
      w.at_s[r] = w.at_s[0];
      w.at_t[r] = w.at_t[0];
      w.row[r] = w.row[0];
    }
    const Lanes<R> max_s = load_tile<true>(a.student.type, w.at_s, a.cols, w.x_s);
    const Lanes<R> max_t = SOFT ? load_tile<true>(a.teacher.type, w.at_t, a.cols, w.x_t) : max_s;
    const R* x_t = SOFT ? w.x_t : w.x_s;

    Lanes<R> from_s, from_t;
    for (int j = 0; j < kLanes; j++) {
      from_s.at[j] = origin(max_s[j]);
      from_t.at[j] = origin(max_t[j]);
    }
    double* const totals[] = {w.z_s, w.z_t, w.z_1, w.z_d};
    for (double* total : totals)
      for (int j = 0; j < kLanes; j++) total[j] = 0;
    const Prefetch ahead{after(a.student, w.at_s[rows - 1]), after(a.teacher, w.at_t[rows - 1]),
                         gradient_of(0)};
    for (int64_t i = 0; i < n; i += kPiece) {
      Sums<R> sums;
      exponentials<R, SOFT, HARD, K>(w.x_s + i, x_t + i, piece(i, n), from_s, from_t, at_t, at_1,
                                     kept(i), &sums, {ahead.s + i, ahead.t + i, ahead.g + i});
      for (int j = 0; j < kLanes; j++) {
        w.z_s[j] += sums.s[j];
        w.z_t[j] += sums.t[j];
        w.z_1[j] += sums.one[j];
        w.z_d[j] += sums.difference[j];
      }
    }
    for (int j = 0; j < kLanes; j++) {
      w.m_s[j] = max_s[j];
      w.m_t[j] = max_t[j];
    }
    normalisers(w, shape, kLanes, inv_t);

    Constants<R, Lanes<R>> c;
    Reverse reverse[kLanes] = {};
    double sum[kLanes] = {}, unused[kLanes] = {};
    for (int j = 0; j < kLanes; j++) {
      set_row(c, j, j);
      to_probability(c, j, j);
    }
    if (DIV == Divergence::reverse_kl) {
      tile_round<DIV, HARD, K, false>(c, x_t, sum, reverse);
      for (int j = 0; j < kLanes; j++) set_mean(c, j, sum[j], reverse[j].mean);
    }
    for (int j = 0; j < kLanes; j++) {
      set_weights<DIV, HARD>(c, j, j, reverse[j]);
      to_probability(c, j, j);
    }
    if (DIV != Divergence::reverse_kl) {
      tile_round<DIV, HARD, K, true>(c, x_t, sum, nullptr);
    } else if (a.grad) {
      tile_round<DIV, HARD, K, true>(c, x_t, unused, nullptr);
    }
    if (a.grad) {
      for (int64_t r = 0; HARD && r < rows; r++) {
        const R share = c.c_hard[static_cast<int>(r)] * R(1.0 - a.label_smoothing);
        w.g[a.labels[w.row[r]] * kLanes + r] -= share;
      }
      store_tile(a.student.type, w.at_g, static_cast<int>(rows), a.cols, w.g);
    }
    for (int64_t r = 0; r < rows; r++) finish<DIV, HARD>(r, sum[r]);
  }

  template <Divergence DIV, bool HARD, int K, bool GRADIENT>
  void tile_round(const Constants<R, Lanes<R>>& c, const R* x_t, double* sum,
                  Reverse* reverse) const {
    const int64_t n = a.cols * kLanes;
    for (int64_t i = 0; i < n; i += kPiece) {
      Terms<R> terms;
      gradient<R, DIV, HARD, K, GRADIENT>(c, w.x_s + i, x_t + i, kept(i), piece(i, n), w.g + i,
                                          nowhere(), &terms);
      for (int j = 0; j < kLanes; j++) {
        sum[j] += terms.divergence[j];
        if (reverse) {
          reverse[j].mean += terms.mean[j];
          reverse[j].largest = larger(double(terms.largest[j]), reverse[j].largest);
        }
      }
    }
  }

  // ---- The constants of row r of the group, into lane j of c.

  template <class C>
  void set_row(Constants<R, C>& c, int j, int64_t r) const {
    // u = ((s - t) - shift) / T - log_ratio. All but the rounding of the sum goes into `shift`: an
    // error common to all u shows in the gradient of forward KL (1e-5 of it at T = 1000).
    const R apart = R(w.row_m_s[r]) - R(w.row_m_t[r]);  // rounded as s - t is
    const double shift = apart + temperature * w.log_ratio[r];
    c.inv_t = R(inv_t);
    c.shift.put(j, R(shift));
    c.log_ratio.put(j, R((shift - static_cast<double>(R(shift))) * inv_t));
    c.max_s.put(j, R(w.row_m_s[r]));
    c.log_z.put(j, R(w.log_z_s[r]));
    c.mean.put(j, R(0));
    c.c_hard.put(j, R(0));
    c.c_soft.put(j, R(0));
    c.c_uniform.put(j, R(0));
  }

  template <class C>
  void set_mean(Constants<R, C>& c, int j, double sum, double mean) const {
    const bool infinite = sum == __builtin_inf();  // no gradient: NaN
    c.mean.put(j, infinite ? R(__builtin_nan("")) : R(mean));
  }

  template <Divergence DIV, bool HARD, class C>
  void set_weights(Constants<R, C>& c, int j, int64_t r, const Reverse& reverse) const {
    const double step =
        DIV == Divergence::reverse_kl ? reverse.largest + __builtin_fabs(reverse.mean) : 1.0;
    const double soft = DIV == Divergence::none ? 0.0 : a.soft_weight * t2() * inv_t;
    const double hard_size = __builtin_fabs(a.hard_weight);
    const double factor = row_factor(w.row[r], hard_size + __builtin_fabs(soft) * step);
    c.c_hard.put(j, R(a.hard_weight * factor));
    c.c_soft.put(j, R(soft * factor));
    c.c_uniform.put(j, HARD ? R(a.hard_weight * factor * a.label_smoothing * inv_cols) : R(0));
  }

  // Item i (a block of a row) of the group; after `set_weights`.
  template <class C>
  void to_probability(Constants<R, C>& c, int j, int64_t i) const {
    c.a_s.put(j, R(w.f_s[i]));
    c.a_t.put(j, R(w.f_t[i]));
    c.hard_a_1.put(j, R(c.c_hard[j] * w.f_1[i]));
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

  // ---- The parts of the loss.

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

  double t2() const { return a.scale_t2 ? temperature * temperature : 1.0; }

  template <Divergence DIV, bool HARD>
  void finish(int64_t r, double sum) const {
    a.soft[w.row[r]] = DIV == Divergence::none ? 0.0 : sum * t2();
    a.hard[w.row[r]] = HARD ? hard_part(r) : 0.0;
  }

  // ---- All rows.

  template <Divergence DIV, bool HARD, int K>
  void group(int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) step1<DIV != Divergence::none, HARD, K>(r);
    normalisers(w, shape, rows, inv_t);
    for (int64_t r = 0; r < rows; r++) step3<DIV, HARD, K>(r);
  }

  template <Divergence DIV, bool HARD, int K>
  void run(int64_t begin, int64_t end) const {
    const int64_t grad_bytes = a.cols * size_of(a.student.type);
    for (int64_t row = begin; row < end;) {
      int64_t rows = 0;
      for (; row < end && rows < shape.group; row++) {
        if (a.row_scale[row] == 0) {
          fill_zero(a, row);
        } else {
          w.at_s[rows] = row_start(a.student, row, a.inner);
          w.at_t[rows] = row_start(a.teacher, row, a.inner);
          w.at_g[rows] = static_cast<char*>(a.grad) + row * grad_bytes;
          w.row[rows++] = row;
        }
      }
      if (rows == 0) continue;
      if constexpr (sizeof(R) == 4) {
        if (shape.few) {
          tile<DIV, HARD, K>(rows);
        } else {
          group<DIV, HARD, K>(rows);
        }
      } else {
        group<DIV, HARD, K>(rows);
      }
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

static int64_t kd_group_rows(const KdArgs& a) {
  return (in_double(a) ? shape_of<double>(a) : shape_of<float>(a)).group;
}

static size_t kd_scratch_bytes(const KdArgs& a) {
  size_t bytes = 0;
  if (in_double(a)) {
    carve<double>(a, shape_of<double>(a), nullptr, &bytes);
  } else {
    carve<float>(a, shape_of<float>(a), nullptr, &bytes);
  }
  return bytes;
}

static void kd_forward(const KdArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (in_double(a)) {
    const Shape shape = shape_of<double>(a);
    Pass<double>{a, shape, carve<double>(a, shape, scratch, nullptr)}.rows(begin, end);
  } else {
    const Shape shape = shape_of<float>(a);
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
