// Rows over threads, and pages for large outputs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "rows.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fd {

// Calls body(thread, begin, end) over [0, rows) in chunks of whole groups. Which thread takes a
// chunk changes nothing in the result. One thread never enters OpenMP: a forked child would hang.
template <class Body>
void parallel_chunks(int64_t rows, int64_t group, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && rows > 0) {
    const int64_t share = (rows + threads * 8 - 1) / (threads * 8);
    const int64_t chunk = (share + group - 1) / group * group;
    const int64_t chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; i++)
      body(omp_get_thread_num(), i * chunk, std::min(rows, (i + 1) * chunk));
    return;
  }
#endif
  (void)group;
  if (rows > 0) body(0, 0, rows);
}

constexpr int64_t kSerialElements = 16384;  // below this a second thread costs more than it gives

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// The same with `bytes` of scratch for each thread: body(scratch, begin, end). It is 64-byte
// aligned.
template <class Body>
void parallel_chunks_with_scratch(int64_t rows, int64_t group, int threads, size_t bytes,
                                  const Body& body) {
  bytes = (bytes + 63) / 64 * 64;
  std::unique_ptr<char, Free> memory(
      static_cast<char*>(std::aligned_alloc(64, bytes * static_cast<size_t>(threads))));
  if (!memory) throw std::bad_alloc();
  parallel_chunks(rows, group, threads, [&](int thread, int64_t begin, int64_t end) {
    body(memory.get() + bytes * static_cast<size_t>(thread), begin, end);
  });
}

inline int64_t item_bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

constexpr int64_t kHugePageBytes = 3 << 20;  // of an output: below, few hold a whole page

// Before first touch: 2 MB pages for the aligned interior of a large output.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace fd
