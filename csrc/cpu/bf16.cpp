// The drivers of the bfloat16 products: which processors, and tiles over threads.
#include "bf16.h"

#include <cstring>

#include "dispatch.h"
#include "parallel.h"

#if defined(FD_X86)
#include <cpuid.h>
#endif

namespace fd {

#if defined(FD_X86)
namespace avx512 {
extern const Bf16Kernels bf16;
}
#endif

namespace {

#if defined(FD_X86)
// Leaf 7 of cpuid: older compilers do not know these by name.
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

int64_t up_to(int64_t n, int64_t group) { return (n + group - 1) / group; }

}  // namespace

const Bf16Kernels* bf16_kernels() {
#if defined(FD_X86)
  const Isa* isa = active_isa(nullptr);
  static const bool has = avx512::bf16.product && has_avx512_bf16();
  if (has && isa && std::strcmp(isa->name, "avx512") == 0) return &avx512::bf16;
#endif
  return nullptr;
}

bool has_bf16_tiles() {
#if defined(FD_X86)
  static const bool has = has_amx_bf16();
  return has;
#else
  return false;
#endif
}

void bf16_product(const Bf16Kernels& kernels, const Bf16Product& f, int threads) {
  if (f.a.rows == 0 || f.n == 0) return;
  // A task packs its columns of B for itself; where there are few of them, rows are split as well.
  const int64_t groups = up_to(f.n, kBf16Columns);
  const int64_t wanted = threads > 1 ? up_to(4 * threads, groups) : 1;
  const int64_t rows = up_to(up_to(f.a.rows, wanted), kBf16Rows) * kBf16Rows;
  const int64_t parts = up_to(f.a.rows, rows);
  const size_t bytes = static_cast<size_t>(f.a.cols / 2 * kBf16Columns) * sizeof(uint32_t);
  parallel_chunks_with_scratch(
      groups * parts, 1, threads, bytes, [&](char* scratch, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t row = i % parts * rows, last = std::min(row + rows, f.a.rows);
          kernels.product(f, row, last, i / parts * kBf16Columns,
                          reinterpret_cast<uint32_t*>(scratch));
        }
      });
}

void bf16_add_product(const Bf16Kernels& kernels, const Bf16Sum& f, int threads) {
  if (f.a.rows == 0) return;
  parallel_chunks(f.b.cols, kBf16Lanes, threads, [&](int, int64_t begin, int64_t end) {
    kernels.pack(f.b, begin, end, f.packed);
  });
  const size_t bytes = static_cast<size_t>(bf16_packed_words(f.a.rows, kBf16Lanes)) * 4;
  parallel_chunks_with_scratch(f.a.cols, kBf16Lanes, threads, bytes,
                               [&](char* scratch, int64_t begin, int64_t end) {
                                 kernels.sum(f, begin, end, reinterpret_cast<uint32_t*>(scratch));
                               });
}

}  // namespace fd
