// The kernels of the knowledge-distillation loss: one row body, three places to keep a row.
//
// Per row, with p = softmax(t / T) the teacher's and q = softmax(s / T) the student's
// distribution: pass 1 sums the exponentials, online, so that it needs no maximum beforehand;
// pass 2 writes the gradient and sums the loss. Reverse KL takes one pass more, because its
// gradient holds a mean over the row. A row that is kept on chip is read from memory by pass 1
// alone.
//
// Modelled bytes per class in bfloat16 (loads of student and teacher, store of the gradient): 6
// where the row is kept on chip; else 10, and 14 for reverse KL, of which L2 serves the repeated
// reads only where all the rows in flight fit in it.
#pragma once
#include <type_traits>

#include "chunk.cuh"
#include "group.cuh"
#include "kd.h"

namespace fd {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLowest = -3.402823466e38f;  // the maximum of nothing: -inf would make inf - inf
constexpr float kNear = 0.1f;  // |u| below which p (exp(u) - 1 - u) is summed as a series
constexpr int kNoClass = INT32_MIN;

struct KdParams {  // KdArgs as the kernels want it
  const void *student, *teacher;
  void* grad;                                                        // or null
  int64_t student_outer, student_step, teacher_outer, teacher_step;  // in elements
  int64_t rows, inner;
  int cols;
  const int64_t* labels;  // null without a hard term
  const float* row_scale;
  float exponent;   // log2(e) / T: exp(x / T) = exp2(x exponent)
  float inverse_t;  // 1 / T
  float soft_loss;  // the soft part over the sum of its terms: T^2, or 1
  float soft_grad;  // its gradient over q - p: soft_weight T, or soft_weight / T
  float hard_grad;  // hard_weight
  float smoothing;  // eps of the hard term
  bool separate;    // the hard term needs exponentials of its own: T is not 1
  float *grad_scale, *hard, *soft;
};

// ---- Sums of exponentials ---------------------------------------------------------------------

// Of some logits x_i: their maximum m, the sum of exp((x_i - m) / T), and that of exp(x_i - m).
struct Sums {
  float max, at_t, at_1;
};

// Student and teacher take the same operations here and in `join` (fmaf is explicit, so that no
// compiler decides otherwise): equal logits give equal sums, to the bit. The logits become
// exponentials at T. exp2f is one instruction in a build with -ftz=true.
__device__ __forceinline__ void add(Sums& sums, float (&x)[kChunk], const KdParams& p, bool at_1) {
  float max = sums.max, sum_t = 0.f, sum_1 = 0.f;
#pragma unroll
  for (int i = 0; i < kChunk; i++) max = fmaxf(max, x[i]);
  const float down = sums.max - max;
  if (at_1) {
#pragma unroll
    for (int i = 0; i < kChunk; i++) sum_1 += exp2f((x[i] - max) * kLog2e);
    sums.at_1 = fmaf(sums.at_1, exp2f(down * kLog2e), sum_1);
  }
#pragma unroll
  for (int i = 0; i < kChunk; i++) sum_t += x[i] = exp2f((x[i] - max) * p.exponent);
  sums.at_t = fmaf(sums.at_t, exp2f(down * p.exponent), sum_t);
  sums.max = max;
}

// `excess` is student.at_t - teacher.at_t, as a sum of differences of exponentials: the rounding
// of a difference of sums would be common to log(q / p) of all classes, which at high T is less.
struct Totals {
  Sums student, teacher;
  float excess;
};

// The excess once the maxima have become these: each sum is multiplied by its own power of e.
__device__ __forceinline__ float moved(const Totals& from, float student_max, float teacher_max,
                                       const KdParams& p) {
  const float down_s = from.student.max - student_max, down_t = from.teacher.max - teacher_max;
  if (down_s == 0.f && down_t == 0.f) return from.excess;
  const float f_s = exp2f(down_s * p.exponent), f_t = exp2f(down_t * p.exponent);
  const float apart = (down_s - down_t) * p.inverse_t;  // f_s / f_t = exp(apart)
  const float difference = apart > 0.f ? -f_s * expm1f(-apart) : f_t * expm1f(apart);
  return fmaf(f_s, from.excess, difference * from.teacher.at_t);
}

__device__ __forceinline__ void scale_to(Sums& sums, float max, const KdParams& p, bool at_1) {
  const float down = sums.max - max;
  sums.at_t *= exp2f(down * p.exponent);
  if (at_1) sums.at_1 *= exp2f(down * kLog2e);
  sums.max = max;
}

struct Maxima {
  float student, teacher;
};

struct Parts {  // of a row's sums, under its maxima
  float student, student_1, teacher, excess;
};

// The row's totals from those of the threads: first the maxima, then one scaling for each thread.
template <class Group>
__device__ __forceinline__ Totals join(Totals mine, const KdParams& p) {
  const Maxima top = Group::reduce(
      Maxima{mine.student.max, mine.teacher.max}, [](const Maxima& x, const Maxima& y) -> Maxima {
        return {fmaxf(x.student, y.student), fmaxf(x.teacher, y.teacher)};
      });
  mine.excess = moved(mine, top.student, top.teacher, p);
  scale_to(mine.student, top.student, p, p.separate);
  scale_to(mine.teacher, top.teacher, p, false);
  const Parts sum =
      Group::reduce(Parts{mine.student.at_t, mine.student.at_1, mine.teacher.at_t, mine.excess},
                    [](const Parts& x, const Parts& y) -> Parts {
                      return {x.student + y.student, x.student_1 + y.student_1,
                              x.teacher + y.teacher, x.excess + y.excess};
                    });
  return {{top.student, sum.student, sum.student_1}, {top.teacher, sum.teacher, 0.f}, sum.excess};
}

struct Losses {
  float soft;        // the sum of the divergence's terms
  float smooth;      // the sum of m_s - s, for label smoothing
  float mean, peak;  // reverse KL: the sum of q u, and the maximum of |q u|
};

// ---- One class --------------------------------------------------------------------------------

struct Softmax {  // exp((x - max) / T) / sum
  float max, sum, inverse;

  __device__ __forceinline__ Softmax(float max_, float sum_)
      : max(max_), sum(sum_ == 0.f ? NAN : sum_), inverse(1.f / sum) {}  // 0: nothing but -inf

  __device__ __forceinline__ float operator()(float x, float exponent) const {
    return exp2f((x - max) * exponent) * inverse;
  }
};

struct Bregman {
  float term;        // p (exp(u) - 1 - u), exp(u) = q / p: never negative, 0 at u = 0
  float difference;  // q - p, not cancelling where they are close
};

// p = 0 leaves q: the sum over the classes is then a divergence of unnormalised measures, which is
// the KL where both sum to 1.
__device__ __forceinline__ Bregman bregman(float p, float q, float u) {
  const float pu = p * u;
  const float series =
      pu * (u * (1.f / 2 + u * (1.f / 6 + u * (1.f / 24 + u * (1.f / 120 + u * (1.f / 720))))));
  const bool near = fabsf(u) < kNear;
  const float difference = near ? pu + series : q - p;
  return {p == 0.f ? q : near ? series : difference - pu, difference};
}

// ---- A row, and where it is kept between the passes ---------------------------------------------

// Chunk j of a row is its elements [8 j - shift, 8 j - shift + 8): `shift` puts the gradient's (or
// without one the student's) chunks on 16-byte boundaries, whatever the row length. The first and
// the last chunk may reach over the row's ends. Logits that do not lie on boundaries where the
// gradient does are loaded by element.
template <class Student, class Teacher>
struct Row {
  const Student* student;
  const Teacher* teacher;
  Student* grad;
  int cols, shift, chunks;
  bool student_aligned, teacher_aligned;

  __device__ __forceinline__ Row(const KdParams& a, int64_t r) {
    const int64_t outer = r / a.inner, step = r % a.inner;
    student =
        static_cast<const Student*>(a.student) + outer * a.student_outer + step * a.student_step;
    teacher =
        static_cast<const Teacher*>(a.teacher) + outer * a.teacher_outer + step * a.teacher_step;
    grad = a.grad == nullptr ? nullptr : static_cast<Student*>(a.grad) + r * a.cols;
    cols = a.cols;
    shift = shift_of(grad == nullptr ? student : grad);
    chunks = (shift + cols + kChunk - 1) / kChunk;
    student_aligned = aligned(student, shift);
    teacher_aligned = aligned(teacher, shift);
  }

  __device__ __forceinline__ int first(int chunk) const { return chunk * kChunk - shift; }

  __device__ __forceinline__ Chunk<Student> student_chunk(int j) const {
    return Chunk<Student>::load(student, first(j), cols, student_aligned);
  }
  __device__ __forceinline__ Chunk<Teacher> teacher_chunk(int j) const {
    return Chunk<Teacher>::load(teacher, first(j), cols, teacher_aligned);
  }
};

// A warp per row: small rows, whole in registers.
template <class Student_, class Teacher_>
struct InRegisters {
  using Student = Student_;
  using Teacher = Teacher_;
  using Group = Warp;
  static constexpr int kThreads = 128;
  static constexpr int kChunks = 4;  // of each lane

  Chunk<Student> student[kChunks];
  Chunk<Teacher> teacher[kChunks];

  template <class F>
  __device__ __forceinline__ void first_pass(const Row<Student, Teacher>& row, F use) {
#pragma unroll
    for (int k = 0; k < kChunks; k++) {  // all loads before the first use: in flight together
      const int j = k * kWarp + Warp::rank();
      if (j < row.chunks) {
        student[k] = row.student_chunk(j);
        teacher[k] = row.teacher_chunk(j);
      }
    }
    next_pass(row, use);
  }

  template <class F>
  __device__ __forceinline__ void next_pass(const Row<Student, Teacher>& row, F use) {
#pragma unroll
    for (int k = 0; k < kChunks; k++) {
      const int j = k * kWarp + Warp::rank();
      if (j < row.chunks) use(row.first(j), student[k], teacher[k]);
    }
  }
};

// A block per row: kept in shared memory. Every thread reads back what it wrote itself, so this
// needs no barrier.
template <class Student_, class Teacher_>
struct InShared {
  using Student = Student_;
  using Teacher = Teacher_;
  using Group = Block;
  static constexpr int kThreads = kMaxThreads;

  template <class F>
  __device__ __forceinline__ void first_pass(const Row<Student, Teacher>& row, F use) {
    FD_DYNAMIC_SHARED(uint4, cache);
    for (int j = Block::rank(); j < row.chunks; j += Block::size()) {
      const Chunk<Student> s = row.student_chunk(j);
      const Chunk<Teacher> t = row.teacher_chunk(j);
      use(row.first(j), s, t);
      uint4* to = cache + j;
      for (int v = 0; v < s.kVectors; v++, to += row.chunks) *to = s.vectors[v];
      for (int v = 0; v < t.kVectors; v++, to += row.chunks) *to = t.vectors[v];
    }
  }

  template <class F>
  __device__ __forceinline__ void next_pass(const Row<Student, Teacher>& row, F use) {
    FD_DYNAMIC_SHARED(uint4, cache);
    for (int j = Block::rank(); j < row.chunks; j += Block::size()) {
      Chunk<Student> s;
      Chunk<Teacher> t;
      const uint4* from = cache + j;
      for (int v = 0; v < s.kVectors; v++, from += row.chunks) s.vectors[v] = *from;
      for (int v = 0; v < t.kVectors; v++, from += row.chunks) t.vectors[v] = *from;
      use(row.first(j), s, t);
    }
  }
};

// A block per row that fits nowhere: read anew by each pass, from L2 where the rows in flight fit.
template <class Student_, class Teacher_>
struct InMemory {
  using Student = Student_;
  using Teacher = Teacher_;
  using Group = Block;
  static constexpr int kThreads = kMaxThreads;

  template <class F>
  __device__ __forceinline__ void first_pass(const Row<Student, Teacher>& row, F use) {
    for (int j = Block::rank(); j < row.chunks; j += Block::size()) {
      use(row.first(j), row.student_chunk(j), row.teacher_chunk(j));
    }
  }

  template <class F>
  __device__ __forceinline__ void next_pass(const Row<Student, Teacher>& row, F use) {
    first_pass(row, use);
  }
};

// ---- The forward pass ---------------------------------------------------------------------------

// float16 keeps weights and 1 / divisor out of the saved gradient: they would flush most of it to
// 0. It is scaled to just below 2^15 instead, and this is the exponent for a gradient <= bound.
__device__ __forceinline__ int headroom(float bound) {
  if (!(bound > 0.f && bound < INFINITY)) return 0;
  int exponent;
  frexpf(bound, &exponent);
  return min(15 - exponent, 100);
}

template <Divergence D, class Store>
__global__ void __launch_bounds__(Store::kThreads) kd_forward(const KdParams a) {
  using Student = typename Store::Student;
  using Teacher = typename Store::Teacher;
  using Group = typename Store::Group;
  constexpr bool kSoft = D != Divergence::none;
  constexpr bool kReverse = D == Divergence::reverse_kl;
  constexpr bool kHalf = std::is_same<Student, __half>::value;
  static_assert(kSoft != std::is_same<Teacher, None>::value, "a teacher for a soft term only");

  const int64_t r = Group::index();
  if (r >= a.rows) return;
  const bool leader = Group::rank() == 0;
  const Row<Student, Teacher> row(a, r);
  const float scale = a.row_scale[r];
  if (scale == 0.f) {  // dropped: its logits are not read
    if (row.grad != nullptr) {
      const float zeros[kChunk] = {};
      for (int j = Group::rank(); j < row.chunks; j += Group::size()) {
        Chunk<Student>::rounded(zeros).store(row.grad, row.first(j), row.cols);
      }
    }
    if (leader) {
      a.hard[r] = a.soft[r] = 0.f;
      if (kHalf && row.grad != nullptr) a.grad_scale[r] = 0.f;
    }
    return;
  }

  Store store;
  Totals totals{{kLowest, 0.f, 0.f}, {kLowest, 0.f, 0.f}, 0.f};
  store.first_pass(row, [&](int, const Chunk<Student>& s, const Chunk<Teacher>& t) {
    float x[kChunk];
    s.unpack(x);
    if constexpr (kSoft) {
      const Totals before = totals;
      float y[kChunk];
      t.unpack(y);
      add(totals.student, x, a, a.separate);
      add(totals.teacher, y, a, false);
      float excess = 0.f;
#pragma unroll
      for (int i = 0; i < kChunk; i++) excess += x[i] - y[i];
      totals.excess = moved(before, totals.student.max, totals.teacher.max, a) + excess;
    } else {
      add(totals.student, x, a, a.separate);
    }
  });
  totals = join<Group>(totals, a);
  const Softmax q_of(totals.student.max, totals.student.at_t);
  const Softmax p_of(totals.teacher.max, totals.teacher.at_t);
  const Softmax q1_of(q_of.max, a.separate ? totals.student.at_1 : q_of.sum);

  // u = log(q / p) = shifted - log_sum_ratio, the logits differenced first: log q - log p would
  // lose 8 % of the divergence of a teacher 1e-5 away. Far from 1, 1 + x has lost the ratio.
  const float max_difference = q_of.max - p_of.max;
  const float excess = totals.excess / p_of.sum;
  const float log_sum_ratio = fabsf(excess) < 0.5f ? log1pf(excess) : logf(q_of.sum / p_of.sum);
  const auto shifted = [&](float s, float t) { return ((s - t) - max_difference) * a.inverse_t; };

  Losses losses{0.f, 0.f, 0.f, 0.f};
  const auto add_smooth = [&](int first, const float (&s)[kChunk]) {
    if (a.smoothing == 0.f) return;
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      if (first + i >= 0 && first + i < row.cols) losses.smooth += q_of.max - s[i];
    }
  };
  const auto reduce_losses = [&] {
    losses = Group::reduce(losses, [](const Losses& x, const Losses& y) -> Losses {
      return {x.soft + y.soft, x.smooth + y.smooth, x.mean + y.mean, fmaxf(x.peak, y.peak)};
    });
  };

  float bound = fabsf(a.soft_grad);  // on the gradient of the soft term
  if constexpr (kReverse) {
    store.next_pass(row, [&](int first, const Chunk<Student>& s, const Chunk<Teacher>& t) {
      float x[kChunk], y[kChunk];
      s.unpack(x);
      t.unpack(y);
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        const float q = q_of(x[i], a.exponent), p = p_of(y[i], a.exponent);
        const float z = shifted(x[i], y[i]), u = z - log_sum_ratio;
        losses.soft += bregman(q, p, -u).term;
        if (q != 0.f) {
          losses.mean += q * z;
          losses.peak = fmaxf(losses.peak, fabsf(q * u));
        }
      }
      add_smooth(first, x);
    });
    reduce_losses();
    // The gradient is q (u - KL), that is q (shifted - its mean): the sums and their errors cancel.
    if (losses.soft == INFINITY) losses.mean = NAN;
    bound *= losses.peak + fabsf(losses.mean - log_sum_ratio);
  }

  const bool hard = a.labels != nullptr;
  const int64_t label = hard ? a.labels[r] : -1;
  const bool known = label >= 0 && label < row.cols;  // else `scale` is NaN
  const int hot = known ? static_cast<int>(label) : kNoClass;
  const float elsewhere = a.smoothing / row.cols;
  const int power = kHalf ? headroom(fabsf(a.hard_grad) + bound) : 0;
  const float factor = kHalf ? ldexpf(1.f, power) : scale;
  const float soft_grad = a.soft_grad * factor, hard_grad = a.hard_grad * factor;
  const float log_sum = logf(q_of.sum);

  if (row.grad != nullptr || (!kReverse && (kSoft || a.smoothing != 0.f))) {
    store.next_pass(row, [&](int first, const Chunk<Student>& s, const Chunk<Teacher>& t) {
      float x[kChunk], gradient[kChunk];
      s.unpack(x);
      if constexpr (kSoft) {
        float y[kChunk];
        t.unpack(y);
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
          const float q = q_of(x[i], a.exponent), p = p_of(y[i], a.exponent);
          const float z = shifted(x[i], y[i]);
          if constexpr (kReverse) {
            gradient[i] = soft_grad * (q == 0.f ? 0.f * losses.mean : q * (z - losses.mean));
          } else {
            const Bregman class_ = bregman(p, q, z - log_sum_ratio);
            gradient[i] = soft_grad * class_.difference;
            if constexpr (D == Divergence::forward_kl) {
              losses.soft += class_.term;
            } else {
              losses.soft += p == 0.f ? 0.f : p * ((q_of.max - x[i]) * a.inverse_t + log_sum);
            }
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; i++) gradient[i] = 0.f;
      }
      if (hard) {
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
          float difference = q1_of(x[i], kLog2e) - elsewhere;
          if (first + i == hot) difference -= 1.f - a.smoothing;
          gradient[i] += hard_grad * difference;
        }
      }
      if (row.grad != nullptr) {
        Chunk<Student>::rounded(gradient).store(row.grad, first, row.cols);
      }
      if constexpr (!kReverse) add_smooth(first, x);
    });
  }
  if constexpr (!kReverse) reduce_losses();

  if (leader) {
    float loss = 0.f;
    if (hard) {
      const float log_sum_1 = logf(q1_of.sum);
      const float chosen = known ? to_float(row.student[hot]) : NAN;
      loss = (q1_of.max - chosen) + log_sum_1;
      if (a.smoothing != 0.f) {
        loss = (1.f - a.smoothing) * loss + a.smoothing * (losses.smooth / row.cols + log_sum_1);
      }
    }
    a.hard[r] = loss;
    a.soft[r] = kSoft ? losses.soft * a.soft_loss : 0.f;
    if (kHalf && row.grad != nullptr) a.grad_scale[r] = ldexpf(scale, -power);
  }
}

// ---- The backward pass --------------------------------------------------------------------------

struct ScaleParams {  // ScaleArgs, rows cut in pieces
  const void* in;
  void* out;
  int64_t cols, pieces_per_row, pieces;
  int piece;                // elements of each but a row's last
  const float* grad_scale;  // or null
  const float* grad_output;
  int64_t grad_output_step;  // 0: one for all rows
};

template <class E, class Group>
__global__ void scale_rows(const ScaleParams a) {
  const int64_t index = Group::index();
  if (index >= a.pieces) return;
  const int64_t r = index / a.pieces_per_row, start = index % a.pieces_per_row * a.piece;
  float factor = a.grad_output[r * a.grad_output_step];
  if (a.grad_scale != nullptr) factor *= a.grad_scale[r];
  if (factor == 1.f && a.in == a.out) return;

  const E* in = static_cast<const E*>(a.in) + r * a.cols + start;
  E* out = static_cast<E*>(a.out) + r * a.cols + start;
  const int cols = static_cast<int>(min(static_cast<int64_t>(a.piece), a.cols - start));
  const int shift = shift_of(out);
  for (int first = Group::rank() * kChunk - shift; first < cols; first += Group::size() * kChunk) {
    float x[kChunk];
    Chunk<E>::load(in, first, cols, aligned(in, shift)).unpack(x);
    // A gradient of 0 stays: a dropped row has none, whatever comes from outside.
#pragma unroll
    for (float& value : x) value = value == 0.f ? value : value * factor;
    Chunk<E>::rounded(x).store(out, first, cols);
  }
}

}  // namespace fd
