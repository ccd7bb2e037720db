// The distance of two feature vectors with its gradient: a warp or a block per row.
//
// Up to five passes over a row, of which all but the first are served by L1 and L2: the means and
// the squared sizes (for the norms and for cosine), the distance, the sums that the gradient of a
// norm takes, the gradient. A distance by element without a norm of the student is one pass.
#pragma once
#include "chunk.cuh"
#include "group.cuh"
#include "hint.h"

namespace fd {

constexpr float kLayerNormEps = 1e-5f;  // the defaults of torch's F.layer_norm,
constexpr float kL2Eps = 1e-12f;        // F.normalize
constexpr float kCosineEps = 1e-8f;     // and F.cosine_similarity

// What the group sums up; a type for each sum, as Block::reduce wants it.
struct Means {
  float student, teacher;
};
struct Squares {
  float student, teacher;
};
struct Total {
  float distance;
};
struct Slopes {
  float sum, along;
};

struct Side {  // y = (x - mean) factor is normalised; y unit has length 1
  float mean, factor, unit;
  bool clamped, short_of_unit;  // the norm, or the length, is below its eps: a constant
  float square;                 // of y

  __device__ __forceinline__ Side(FeatureNorm norm, float mean_, float sum, int cols)
      : mean(mean_), factor(1.f), clamped(false) {
    if (norm == FeatureNorm::layer_norm) {
      factor = 1.f / sqrtf(sum / cols + kLayerNormEps);
    } else if (norm == FeatureNorm::l2) {
      const float size = sqrtf(sum);
      clamped = size < kL2Eps;
      factor = 1.f / (clamped ? kL2Eps : size);
    }
    const float length = sqrtf(sum) * factor;
    short_of_unit = length < kCosineEps;
    unit = 1.f / (short_of_unit ? kCosineEps : length);
    square = length * length;
  }

  __device__ __forceinline__ float operator()(float x) const { return (x - mean) * factor; }
};

// The derivative of one feature's part, which is added to `sum`.
template <Distance D>
__device__ __forceinline__ float by_element(float d, float& sum) {
  if constexpr (D == Distance::mse) {
    sum += d * d;
    return 2.f * d;
  } else {
    const float size = fabsf(d);
    const float sign = d > 0.f ? 1.f : d < 0.f ? -1.f : d;  // 0, or NaN
    if constexpr (D == Distance::l1) {
      sum += size;
      return sign;
    } else {
      const bool near = size < 1.f;
      sum += near ? 0.5f * d * d : size - 0.5f;
      return near ? d : sign;
    }
  }
}

// An element of the difference of two unit vectors. Vectors of about one length are differenced
// first: exactly 0 where they are equal, and no rounding of the products where they are close.
__device__ __forceinline__ float apart(float y, const Side& s, float z, const Side& t) {
  const bool near = s.unit <= 2.f * t.unit && t.unit <= 2.f * s.unit;
  return near ? (y - z) * s.unit + z * (s.unit - t.unit) : y * s.unit - z * t.unit;
}

template <class Student, class Teacher, class Grad>
struct HintRow {
  const Student* student;
  const Teacher* teacher;
  Grad* grad;
  const float* bias;
  int cols, shift, chunks;
  bool student_aligned, teacher_aligned;

  __device__ __forceinline__ HintRow(const HintArgs& a, int64_t r)
      : student(static_cast<const Student*>(a.student) + r * a.student_step),
        teacher(static_cast<const Teacher*>(a.teacher) + r * a.teacher_step),
        grad(a.grad == nullptr ? nullptr : static_cast<Grad*>(a.grad) + r * a.cols),
        bias(a.bias),
        cols(static_cast<int>(a.cols)) {
    shift = grad == nullptr ? shift_of(student) : shift_of(grad);
    chunks = (shift + cols + kChunk - 1) / kChunk;
    student_aligned = aligned(student, shift);
    teacher_aligned = aligned(teacher, shift);
  }

  // use(first, x, t) for each chunk of this thread: 8 features from `first`, some maybe outside.
  template <class Group, class F>
  __device__ __forceinline__ void each(F use) const {
    for (int j = Group::rank(); j < chunks; j += Group::size()) {
      const int first = j * kChunk - shift;
      float x[kChunk], t[kChunk];
      Chunk<Student>::load(student, first, cols, student_aligned).unpack(x);
      Chunk<Teacher>::load(teacher, first, cols, teacher_aligned).unpack(t);
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        if (first + i < 0 || first + i >= cols) {
          x[i] = t[i] = 0.f;
        } else if (bias != nullptr) {
          x[i] += bias[first + i];
        }
      }
      use(first, x, t);
    }
  }
};

template <Distance D, class Student, class Teacher, class Grad, class Group>
__global__ void __launch_bounds__(256) hint_rows(const HintArgs a) {
  constexpr bool kCosine = D == Distance::cosine;
  const int64_t r = Group::index();
  if (r >= a.rows) return;
  const bool leader = Group::rank() == 0;
  const HintRow<Student, Teacher, Grad> row(a, r);
  const float scale = a.row_scale[r];
  if (scale == 0.f) {  // dropped: its features are not read
    if (row.grad != nullptr) {
      const float zeros[kChunk] = {};
      for (int j = Group::rank(); j < row.chunks; j += Group::size()) {
        Chunk<Grad>::rounded(zeros).store(row.grad, j * kChunk - row.shift, row.cols);
      }
    }
    if (leader) a.loss[r] = 0.f;
    return;
  }

  const auto inside = [&](int first, int i) { return first + i >= 0 && first + i < row.cols; };
  const auto add = [](auto p, auto q) {
    auto sum = p;
    float* to = reinterpret_cast<float*>(&sum);
    const float* from = reinterpret_cast<const float*>(&q);
#pragma unroll
    for (unsigned i = 0; i < sizeof(sum) / sizeof(float); i++) to[i] += from[i];
    return sum;
  };

  const bool s_norm = a.student_norm != FeatureNorm::none;
  const bool t_norm = a.teacher_norm != FeatureNorm::none;
  const bool s_centred = a.student_norm == FeatureNorm::layer_norm;
  const bool t_centred = a.teacher_norm == FeatureNorm::layer_norm;
  Means means{0.f, 0.f};
  if (s_centred || t_centred) {
    row.template each<Group>([&](int, const float (&x)[kChunk], const float (&t)[kChunk]) {
#pragma unroll
      for (int i = 0; i < kChunk; i++) means.student += x[i], means.teacher += t[i];
    });
    means = Group::reduce(means, add);
    means.student = s_centred ? means.student / row.cols : 0.f;
    means.teacher = t_centred ? means.teacher / row.cols : 0.f;
  }
  Squares squares{0.f, 0.f};
  if (kCosine || s_norm || t_norm) {
    row.template each<Group>([&](int first, const float (&x)[kChunk], const float (&t)[kChunk]) {
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        const float p = x[i] - means.student, q = t[i] - means.teacher;
        if (inside(first, i)) squares.student += p * p, squares.teacher += q * q;
      }
    });
    squares = Group::reduce(squares, add);
  }
  const Side s_of(a.student_norm, means.student, squares.student, row.cols);
  const Side t_of(a.teacher_norm, means.teacher, squares.teacher, row.cols);

  // The derivative in the normalised feature, but for the row's factor.
  Total total{0.f};
  const auto slope = [&](float y, float z, float distance) {
    if constexpr (kCosine) {
      const float along = s_of.short_of_unit ? 1.f : distance;
      return s_of.unit * (apart(y, s_of, z, t_of) - along * (y * s_of.unit));
    } else {
      float ignored = 0.f;
      return by_element<D>(y - z, ignored);
    }
  };
  const float factor = kCosine ? scale : scale / row.cols;
  const bool at_once = !kCosine && !s_norm && row.grad != nullptr;
  row.template each<Group>([&](int first, const float (&x)[kChunk], const float (&t)[kChunk]) {
    float gradient[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      gradient[i] = 0.f;
      if (!inside(first, i)) continue;
      const float y = s_of(x[i]), z = t_of(t[i]);
      if constexpr (kCosine) {
        const float d = apart(y, s_of, z, t_of);
        total.distance += d * d;
      } else {
        gradient[i] = factor * by_element<D>(y - z, total.distance);
      }
    }
    if (at_once) Chunk<Grad>::rounded(gradient).store(row.grad, first, row.cols);
  });
  total = Group::reduce(total, add);
  float distance = total.distance / row.cols;
  if constexpr (kCosine) {
    distance = 0.5f * total.distance;  // 1 - cos of unit vectors, without its cancellation
    if (s_of.short_of_unit) distance += 0.5f * (1.f - s_of.square * s_of.unit * s_of.unit);
    if (t_of.short_of_unit) distance += 0.5f * (1.f - t_of.square * t_of.unit * t_of.unit);
  }
  if (leader) a.loss[r] = distance;
  if (row.grad == nullptr || at_once) return;

  Slopes slopes{0.f, 0.f};  // their parts along the normalised vector, and along (1, ..., 1)
  if (s_norm && !s_of.clamped) {
    row.template each<Group>([&](int first, const float (&x)[kChunk], const float (&t)[kChunk]) {
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
        if (!inside(first, i)) continue;
        const float y = s_of(x[i]), u = slope(y, t_of(t[i]), distance);
        if (s_centred) slopes.sum += u;
        slopes.along += u * y;
      }
    });
    slopes = Group::reduce(slopes, add);
    if (s_centred) slopes.sum /= row.cols, slopes.along /= row.cols;
  }
  row.template each<Group>([&](int first, const float (&x)[kChunk], const float (&t)[kChunk]) {
    float gradient[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      const float y = s_of(x[i]), u = slope(y, t_of(t[i]), distance);
      gradient[i] = factor * s_of.factor * ((u - slopes.sum) - y * slopes.along);
    }
    Chunk<Grad>::rounded(gradient).store(row.grad, first, row.cols);
  });
}

}  // namespace fd
