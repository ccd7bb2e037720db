// The kernel of hint: a warp and a block for a row, each distance, norms on either side.
#include "hint.cuh"
#include "probe.h"

namespace {

using fd::Distance;
using fd::FeatureNorm;

struct Vector {  // a row, normalised; `factor` and `mean` as in the kernel
  std::vector<double> y;
  double factor = 1;
};

Vector normalised(FeatureNorm norm, const std::vector<double>& x) {
  Vector v{x};
  double mean = 0, square = 0;
  if (norm == FeatureNorm::layer_norm) {
    for (double e : x) mean += e / x.size();
  }
  for (double e : x) square += (e - mean) * (e - mean);
  if (norm == FeatureNorm::layer_norm) v.factor = 1 / std::sqrt(square / x.size() + 1e-5);
  if (norm == FeatureNorm::l2) v.factor = 1 / std::sqrt(square);
  for (double& e : v.y) e = (e - mean) * v.factor;
  return v;
}

double distance(Distance d, const std::vector<double>& y, const std::vector<double>& z) {
  double sum = 0, yy = 0, zz = 0, yz = 0;
  for (size_t i = 0; i < y.size(); i++) {
    const double e = y[i] - z[i], size = std::fabs(e);
    yy += y[i] * y[i], zz += z[i] * z[i], yz += y[i] * z[i];
    sum += d == Distance::mse  ? e * e
           : d == Distance::l1 ? size
           : size < 1          ? e * e / 2
                               : size - 0.5;
  }
  return d == Distance::cosine ? 1 - yz / std::sqrt(yy * zz) : sum / y.size();
}

// The derivative of `distance` in y, then through the norm of the student.
std::vector<double> gradient(Distance d, FeatureNorm norm, const Vector& s,
                             const std::vector<double>& z) {
  const size_t n = z.size();
  std::vector<double> u(n);
  double yy = 0, zz = 0, yz = 0;
  for (size_t i = 0; i < n; i++) yy += s.y[i] * s.y[i], zz += z[i] * z[i], yz += s.y[i] * z[i];
  for (size_t i = 0; i < n; i++) {
    const double e = s.y[i] - z[i], sign = e > 0 ? 1 : e < 0 ? -1 : 0;
    u[i] = d == Distance::cosine ? yz / std::sqrt(yy * zz) * s.y[i] / yy - z[i] / std::sqrt(yy * zz)
           : d == Distance::mse  ? 2 * e / n
           : d == Distance::l1   ? sign / n
                                 : (std::fabs(e) < 1 ? e : sign) / n;
  }
  if (norm == FeatureNorm::none) return u;
  double sum = 0, along = 0;
  for (size_t i = 0; i < n; i++) sum += u[i], along += u[i] * s.y[i];
  const bool centred = norm == FeatureNorm::layer_norm;
  for (size_t i = 0; i < n; i++) {
    u[i] = s.factor * (u[i] - (centred ? sum / n : 0) - s.y[i] * along / (centred ? n : 1));
  }
  return u;
}

// Rows of `cols`, the student's `offset` elements into its memory. The first row is dropped and
// NaN; under the l2 norm there is no bias, and the second one is shorter than 1.
template <Distance D, class S, class T, class G, class Group>
void hint(const char* what, int rows, int cols, int offset, FeatureNorm student,
          FeatureNorm teacher, bool with_grad, unsigned blocks, unsigned threads) {
  const size_t n = static_cast<size_t>(rows) * cols;
  Buffer<S> s(n + offset);
  Buffer<T> t(n);
  Buffer<G> grad(n);
  Buffer<float> bias(cols), scale(rows), loss(rows);
  s.randomize(n + offset);
  t.randomize(n);
  bias.randomize(cols);
  const bool biased = student != FeatureNorm::l2;
  for (int i = 0; i < cols; i++) {
    s.data[offset + i] = static_cast<S>(NAN);
    t.data[i] = static_cast<T>(NAN);
    S& second = s.data[offset + cols + i];
    if (!biased) second = static_cast<S>(as_float(second) / 256);
  }
  for (int r = 0; r < rows; r++) scale.data[r] = static_cast<float>(r);

  fd::HintArgs a{};
  a.student = s.data.get() + offset;
  a.teacher = t.data.get();
  a.student_step = a.teacher_step = cols;
  a.rows = rows;
  a.cols = cols;
  a.bias = biased ? bias.data.get() : nullptr;
  a.row_scale = scale.data.get();
  a.distance = D;
  a.student_norm = student;
  a.teacher_norm = teacher;
  a.grad = with_grad ? grad.data.get() : nullptr;
  a.loss = loss.data.get();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  expect(what, cudaLaunchKernelEx(&config, fd::hint_rows<D, S, T, G, Group>, a), 0, 0);

  for (int r = 0; r < rows; r++) {
    const double factor = static_cast<double>(scale.data[r]);
    if (factor == 0) {
      expect("a dropped row", loss.data[r], 0, 0);
      for (int i = 0; with_grad && i < cols; i++) {
        expect("a dropped row", as_float(grad.data[static_cast<size_t>(r) * cols + i]), 0, 0);
      }
      continue;
    }
    std::vector<double> x(cols), z(cols);
    for (int i = 0; i < cols; i++) {
      x[i] = as_float(s.data[offset + static_cast<size_t>(r) * cols + i]) +
             (biased ? bias.data[i] : 0.f);
      z[i] = as_float(t.data[static_cast<size_t>(r) * cols + i]);
    }
    const Vector y = normalised(student, x), w = normalised(teacher, z);
    expect(what, loss.data[r], distance(D, y.y, w.y), 1e-5);
    if (!with_grad) continue;
    const std::vector<double> u = gradient(D, student, y, w.y);
    for (int i = 0; i < cols; i++) {  // relative to 1 / cols: its elements are that small
      const double got = as_float(grad.data[static_cast<size_t>(r) * cols + i]);
      expect(what, got * cols, u[i] * factor * cols, 4 * Tolerance<G>::value);
    }
  }
}

// Offsets of rows that lie further apart than 32 bits can say, without the memory.
void far_rows() {
  const int64_t far = int64_t{1} << 33, r = (int64_t{1} << 32) + 13;
  fd::HintArgs a{};
  a.student = a.teacher = a.grad = reinterpret_cast<char*>(far);
  a.student_step = a.teacher_step = 1 << 20;
  a.cols = 1 << 20;
  const fd::HintRow<__half, float, __half> row(a, r);
  const auto offset = [&](const void* p) { return reinterpret_cast<intptr_t>(p) - far; };
  expect("far student", offset(row.student) == (r << 20) * 2, 1, 0);
  expect("far teacher", offset(row.teacher) == (r << 20) * 4, 1, 0);
  expect("far gradient", offset(row.grad) == (r << 20) * 2, 1, 0);
}

}  // namespace

int main() {
  using bf16 = __nv_bfloat16;
  constexpr auto kNone = FeatureNorm::none, kLayer = FeatureNorm::layer_norm, kL2 = FeatureNorm::l2;
  for (int offset : {0, 1}) {
    hint<Distance::mse, bf16, bf16, bf16, fd::Block>("mse", 3, 1301, offset, kNone, kLayer, true, 3,
                                                     128);
    hint<Distance::cosine, float, float, float, fd::Block>("cosine", 3, 517, offset, kLayer, kL2,
                                                           true, 3, 64);
    hint<Distance::smooth_l1, __half, float, __half, fd::Warp>("smooth", 5, 260, offset, kL2, kNone,
                                                               true, 2, 128);
    hint<Distance::l1, float, bf16, bf16, fd::Warp>("l1", 3, 21, offset, kNone, kNone, true, 1,
                                                    128);
    hint<Distance::l1, float, bf16, bf16, fd::Warp>("value", 3, 21, offset, kLayer, kLayer, false,
                                                    1, 128);
  }
  far_rows();
  return failures == 0 ? 0 : 1;
}
