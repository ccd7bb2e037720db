// Runs a .cu file as host C++: g++ -x c++ -std=c++17 -include cuemu.h -I<this directory> kernel.cu
//
// Of CUDA's execution model it keeps what a program can be wrong about: blocks run one after the
// other; the threads of a block run as fibers, from one barrier or warp collective to the next, so
// that a missing barrier shows as a value not yet written; shared memory starts as NaN in every
// block; a barrier or a collective that some threads never reach is reported, not waited for.
// (Real GPUs interleave more finely: build with CUEMU_THREADS, one std::thread per CUDA thread,
// under ThreadSanitizer for that.) Under AddressSanitizer both kinds of shared memory end where the
// kernel says they do.
//
// Environment: CUEMU_REVERSE runs the threads of a block from the last to the first;
// CUEMU_SHARED_LIMIT is the shared memory that a block may ask for (default: sm_90's).
//
// Not modelled: time, ordering between blocks, anything asynchronous, tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline dim3 gridDim, blockDim;
inline uint3 blockIdx;
#ifdef CUEMU_THREADS
inline thread_local uint3 threadIdx;
#else
inline uint3 threadIdx;  // of the fiber that runs
#endif

namespace cuemu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { ready, at_barrier, in_collective, done };

struct Warp {  // one collective at a time: the lanes leave a value each, the last one opens it
  std::mutex mutex;
  std::condition_variable opened;
  unsigned mask = 0, arrived = 0, generation = 0;
  uint64_t left[kWarp], seen[kWarp];
};

struct Thread {
  State state = State::ready;
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  void* sanitizer = nullptr;
};

struct FreeDeleter {
  void operator()(void* p) const { free(p); }
};

// One kernel launch, at one of its blocks.
struct Launch {
  unsigned count = 0;  // threads of a block
  std::function<void()> kernel;
  std::vector<Thread> threads;
  std::unique_ptr<Warp[]> warps;

  std::mutex mutex;  // of the three counts
  std::condition_variable opened;
  unsigned alive = 0, waiting = 0, generation = 0;

  std::mutex shared_mutex;
  std::map<const void*, std::unique_ptr<void, FreeDeleter>> shared;  // declaration -> memory
  std::unique_ptr<void, FreeDeleter> dynamic;

  void* scheduler = nullptr;  // where the fibers return to
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

inline Launch* launch_now = nullptr;

inline unsigned self() { return threadIdx.x; }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuemu: block %u, thread %u: %s\n", blockIdx.x, self(), what);
  fflush(stderr);
  _Exit(86);
}

// ---- Waiting ------------------------------------------------------------------------------------

#ifdef CUEMU_THREADS

template <class Condition>
void wait(State, std::unique_lock<std::mutex>& lock, std::condition_variable& opened,
          Condition condition) {
  if (!opened.wait_for(lock, std::chrono::seconds(20), condition)) {
    fail("deadlock: a barrier or collective that not all of its threads reach");
  }
}

#else

// Saves the callee's registers on the stack that it leaves and takes them from the one it enters.
extern "C" void cuemu_switch(void** save, void* enter);
__asm__(R"(
.text
.weak cuemu_switch
.type cuemu_switch, @function
cuemu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

inline void to_scheduler(bool for_good) {
  Launch& l = *launch_now;
  Thread& thread = l.threads[self()];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.sanitizer, l.scheduler_stack,
                                 l.scheduler_stack_size);
#endif
  cuemu_switch(&thread.stack_pointer, l.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.sanitizer, nullptr, nullptr);
#endif
  (void)for_good;
}

template <class Condition>
void wait(State state, std::unique_lock<std::mutex>& lock, std::condition_variable&,
          Condition condition) {
  lock.unlock();
  Thread& thread = launch_now->threads[self()];
  while (!condition()) {
    thread.state = state;
    to_scheduler(false);
  }
  lock.lock();
}

inline void fiber_body() {
  Launch& l = *launch_now;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &l.scheduler_stack, &l.scheduler_stack_size);
#endif
  l.kernel();
  l.threads[self()].state = State::done;
  to_scheduler(true);
}

#endif

inline void wake(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; i++) {
    Thread& thread = launch_now->threads[i];
    if (thread.state == state) thread.state = State::ready;
  }
}

// ---- Barriers and collectives -------------------------------------------------------------------

inline void sync_block() {
  Launch& l = *launch_now;
  std::unique_lock<std::mutex> lock(l.mutex);
  if (l.alive != l.count) fail("__syncthreads after a thread of the block has returned");
  const unsigned generation = l.generation;
  if (++l.waiting == l.count) {
    l.waiting = 0;
    l.generation++;
#ifdef CUEMU_THREADS
    l.opened.notify_all();
#else
    wake(0, l.count, State::at_barrier);
#endif
    return;
  }
  wait(State::at_barrier, lock, l.opened, [&] { return l.generation != generation; });
}

// All lanes of `mask` meet; `all` is what each of them has left. A mutex per warp, so that warps do
// not order each other's accesses.
inline void meet(unsigned mask, uint64_t mine, uint64_t (&all)[kWarp]) {
  Launch& l = *launch_now;
  const unsigned lane = self() % kWarp, begin = self() - lane;
  const unsigned lanes = std::min(kWarp, l.count - begin);
  Warp& warp = l.warps[begin / kWarp];
  std::unique_lock<std::mutex> lock(warp.mutex);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail("a warp collective whose mask lacks the calling lane");
  if (warp.arrived != 0 && warp.mask != mask) fail("lanes disagree on a collective's mask");
  warp.mask = mask;
  warp.left[lane] = mine;
  warp.arrived |= 1u << lane;
  const unsigned generation = warp.generation;
  if (warp.arrived == mask) {
    memcpy(warp.seen, warp.left, sizeof warp.seen);
    warp.arrived = 0;
    warp.generation++;
#ifdef CUEMU_THREADS
    warp.opened.notify_all();
#else
    wake(begin, begin + lanes, State::in_collective);
#endif
  } else {
    wait(State::in_collective, lock, warp.opened, [&] { return warp.generation != generation; });
  }
  memcpy(all, warp.seen, sizeof all);
}

template <class V>
V from_lane(unsigned mask, V value, unsigned lane) {
  static_assert(sizeof(V) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0, all[kWarp];
  memcpy(&bits, &value, sizeof value);
  meet(mask, bits, all);
  if (lane >= kWarp || !(mask >> lane & 1)) fail("a shuffle from a lane outside its mask");
  memcpy(&value, &all[lane], sizeof value);
  return value;
}

// ---- Shared memory ------------------------------------------------------------------------------

inline void* poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) abort();
  memset(memory, 0xff, bytes);  // NaN as any floating-point type
  return memory;
}

// The memory of one declaration, made when the first thread of a block comes by.
inline void* shared(const void* declaration, size_t bytes) {
  std::lock_guard<std::mutex> lock(launch_now->shared_mutex);
  auto& memory = launch_now->shared[declaration];
  if (!memory) memory.reset(poisoned(bytes));
  return memory.get();
}

inline int shared_limit() {
  const char* text = getenv("CUEMU_SHARED_LIMIT");
  return text != nullptr ? atoi(text) : 227 * 1024;
}

inline std::map<const void*, int> dynamic_allowed;  // kernel -> what it was given beyond 48 KB

// ---- Launches -----------------------------------------------------------------------------------

#ifdef CUEMU_THREADS

inline void run_block(Launch& l) {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < l.count; i++) {
    threads.emplace_back([&l, i] {
      threadIdx = {i, 0, 0};
      _mm_setcsr(_mm_getcsr() | 0x8040);
      l.kernel();
      std::lock_guard<std::mutex> lock(l.mutex);
      l.alive--;
      if (l.waiting != 0) fail("a thread has returned while others wait in __syncthreads");
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

inline void run_block(Launch& l) {
  const bool reverse = getenv("CUEMU_REVERSE") != nullptr;
  for (Thread& thread : l.threads) {
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    void** top = reinterpret_cast<void**>(
        (reinterpret_cast<uintptr_t>(thread.stack.get()) + kStack) & ~uintptr_t{15});
    *--top = nullptr;  // where fiber_body would return to, and what keeps its stack aligned
    *--top = reinterpret_cast<void*>(fiber_body);
    thread.stack_pointer = top - 6;
    memset(thread.stack_pointer, 0, 6 * sizeof(void*));
  }
  while (l.alive != 0) {
    bool progress = false;
    for (unsigned k = 0; k < l.count; k++) {
      threadIdx = {reverse ? l.count - 1 - k : k, 0, 0};
      Thread& thread = l.threads[threadIdx.x];
      if (thread.state != State::ready) continue;
      progress = true;
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&l.scheduler_sanitizer, thread.stack.get(), kStack);
#endif
      cuemu_switch(&l.scheduler, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(l.scheduler_sanitizer, nullptr, nullptr);
#endif
      if (thread.state == State::done) {
        l.alive--;
        if (l.waiting != 0) fail("a thread has returned while others wait in __syncthreads");
      }
    }
    if (!progress) fail("deadlock: a barrier or collective that not all of its threads reach");
  }
}

#endif

inline void run(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> kernel) {
  Launch l;
  launch_now = &l;
  gridDim = grid;
  blockDim = block;
  l.count = block.x;
  l.kernel = std::move(kernel);
  l.threads = std::vector<Thread>(l.count);
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // subnormal numbers are 0, as with nvcc -ftz=true
  for (unsigned index = 0; index < grid.x; index++) {
    blockIdx = {index, 0, 0};
    l.alive = l.count;
    l.shared.clear();
    l.dynamic.reset(poisoned(dynamic_bytes));
    l.warps.reset(new Warp[(l.count + kWarp - 1) / kWarp]);
    for (Thread& thread : l.threads) thread.state = State::ready;
    run_block(l);
  }
  _mm_setcsr(control);
  launch_now = nullptr;
}

// ex2.approx.ftz.f32 may be wrong by 2 units in the last place: so this one is, in a direction that
// depends on the argument in no useful way. exp2(0) is exact.
inline float approximate_exp2(float x) {
  const float exact = ::exp2f(x);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits *= 2654435761u;
  const float ulps = static_cast<float>(static_cast<int>(bits >> 30) - 1);  // -1, 0, 1 or 2
  return x == 0.f || std::isinf(exact) ? exact : exact + exact * (ulps * 1.1920929e-7f);
}

}  // namespace cuemu

// ---- CUDA's names -------------------------------------------------------------------------------

#define exp2f cuemu::approximate_exp2

// A place of its own for each instance of a template.
#define FD_SHARED(type, name, count)        \
  static const char name##_declaration = 0; \
  type* const name = static_cast<type*>(cuemu::shared(&name##_declaration, sizeof(type) * (count)))
#define FD_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(cuemu::launch_now->dynamic.get())

using std::max;
using std::min;

inline void __syncthreads() { cuemu::sync_block(); }

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bit) {
  return cuemu::from_lane(mask, value, (cuemu::self() % cuemu::kWarp) ^ bit);
}

template <class V>
V __ldg(const V* p) {
  return *p;
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Given&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  const auto allowed = cuemu::dynamic_allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = allowed == cuemu::dynamic_allowed.end() ? 48 * 1024 : allowed->second;
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  cuemu::run(grid, block, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

// The runtime's own functions, for one device of sm_90's size. Weak: several .cu files may be
// linked.
#define CUEMU_RUNTIME extern "C" __attribute__((weak)) cudaError_t

CUEMU_RUNTIME cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

CUEMU_RUNTIME cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = cuemu::shared_limit();
  return cudaSuccess;
}

CUEMU_RUNTIME cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (value > cuemu::shared_limit()) return cudaErrorInvalidValue;
  cuemu::dynamic_allowed[kernel] = value;
  return cudaSuccess;
}

extern "C" __attribute__((weak)) const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "cuemu: invalid launch";
}
