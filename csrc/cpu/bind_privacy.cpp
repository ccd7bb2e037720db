#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings.h"
#include "privacy_call.h"

namespace py = pybind11;

namespace fd {
namespace {

constexpr double kMagic = 1.5 * 4503599627370496.0;  // 1.5 * 2^52

Draws draws_of(int generator, uintptr_t key, const std::array<uint32_t, 3>& counter) {
  Draws draws{};
  draws.generator = static_cast<Generator>(generator);
  const int64_t* words = pointer<int64_t>(key);
  for (int i = 0; i < 8; i++) draws.key[i] = static_cast<uint32_t>(words[i]);
  for (int i = 0; i < 3; i++) draws.counter[i] = counter[static_cast<size_t>(i)];
  return draws;
}

using Parameter = std::tuple<uintptr_t, int, int64_t, uintptr_t, bool>;  // as GradSamples

void clip_and_noise_(const std::vector<Parameter>& parameters, int64_t samples, double clip,
                     double unit, double fine, double grid, double scale, double inverse,
                     int generator, uintptr_t key, const std::array<uint32_t, 3>& counter,
                     int threads) {
  PrivacyCall call{};
  for (const auto& [data, type, size, out, out_double] : parameters)
    call.parameters.push_back(
        {pointer<void>(data), static_cast<Type>(type), size, pointer<void>(out), out_double});
  call.samples = samples;
  call.clip = clip;
  call.unit = unit;
  call.magic = kMagic * fine;
  call.noise = {draws_of(generator, key, counter), scale, kMagic * grid, inverse};
  call.threads = threads;
  const PrivacyKernels& kernels = *active_kernels().privacy;
  py::gil_scoped_release released;
  clip_and_noise(kernels, call);
}

void noisy_row_sum_(const std::vector<uintptr_t>& teachers, int type, int64_t rows, int64_t classes,
                    uintptr_t out, bool out_double, double inverse_temperature, double exponentials,
                    double clip, double unit, double fine, double grid, double scale,
                    double inverse, int generator, uintptr_t key,
                    const std::array<uint32_t, 3>& counter, int threads) {
  RowSumCall call{};
  for (uintptr_t x : teachers) call.teachers.push_back(pointer<void>(x));
  call.type = static_cast<Type>(type);
  call.rows = rows;
  call.classes = classes;
  call.out = pointer<void>(out);
  call.out_double = out_double;
  call.inverse_temperature = inverse_temperature;
  call.magic_exp = kMagic * exponentials;
  call.clip = clip;
  call.unit = unit;
  call.magic = kMagic * fine;
  call.noise = {draws_of(generator, key, counter), scale, kMagic * grid, inverse};
  call.threads = threads;
  const PrivacyKernels& kernels = *active_kernels().privacy;
  py::gil_scoped_release released;
  noisy_row_sum(kernels, call);
}

void add_noise_(const std::vector<Parameter>& parameters, double grid, double scale, double inverse,
                int generator, uintptr_t key, const std::array<uint32_t, 3>& counter, int threads) {
  PrivacyCall call{};
  for (const auto& [data, type, size, out, out_double] : parameters)
    call.parameters.push_back(
        {pointer<void>(data), static_cast<Type>(type), size, pointer<void>(out), out_double});
  call.noise = {draws_of(generator, key, counter), scale, kMagic * grid, inverse};
  call.threads = threads;
  const PrivacyKernels& kernels = *active_kernels().privacy;
  py::gil_scoped_release released;
  add_noise(kernels, call);
}

void square_norms_(uintptr_t data, int type, int64_t samples, int64_t size, uintptr_t out,
                   int threads) {
  const PrivacyKernels& kernels = *active_kernels().privacy;
  py::gil_scoped_release released;
  square_norms(kernels, {pointer<void>(data), static_cast<Type>(type), size, nullptr, false},
               samples, pointer<double>(out), threads);
}

// For the tests: the generators on the vectors of their authors.
py::list random_words(int generator, uintptr_t key, int64_t block,
                      const std::array<uint32_t, 3>& counter) {
  uint32_t words[16];
  active_kernels().privacy->words(draws_of(generator, key, counter), block, words);
  py::list out;
  for (int i = 0; i < (static_cast<Generator>(generator) == Generator::philox ? 4 : 16); i++)
    out.append(words[i]);
  return out;
}

}  // namespace

void bind_privacy(py::module_& m) {
  m.def("clip_and_noise", &clip_and_noise_);
  m.def("noisy_row_sum", &noisy_row_sum_);
  m.def("add_noise", &add_noise_);
  m.def("square_norms", &square_norms_);
  m.def("random_words", &random_words);
}

}  // namespace fd
