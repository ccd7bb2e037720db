// Runs a .cu file as host C++: g++ -x c++ -std=c++17 -include cuemu.h -I<this directory> kernel.cu
//
// Of CUDA's execution model it keeps what a program can be wrong about: clusters (of one block where
// the launch asks for none) run one after the other; the threads of a cluster run as fibers, from
// one barrier or warp collective to the next, so that a missing barrier shows as a value not yet
// written; shared memory starts as NaN in every block; a barrier or a collective that some threads
// never reach is reported, not waited for, and so is shared memory of a block that has returned.
// (Real GPUs interleave more finely: build with CUEMU_THREADS, one std::thread per CUDA thread,
// under ThreadSanitizer for that.) Under AddressSanitizer both kinds of shared memory end where the
// kernel says they do.
//
// Environment: CUEMU_REVERSE runs the threads of a block from the last to the first;
// CUEMU_SHARED_LIMIT is the shared memory that a block may ask for (default: sm_90's).
//
// Clusters: cudaLaunchAttributeClusterDimension, and cooperative_groups' this_cluster() (sync,
// block_rank, num_blocks, map_shared_rank). cuda_emulation.py puts a call of launch_bounds() into
// each kernel that has __launch_bounds__: a launch with more threads is reported.
//
// Not modelled: time, ordering between clusters, anything asynchronous, tensor cores.
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
#ifdef CUEMU_THREADS
inline thread_local uint3 threadIdx, blockIdx;
#else
inline uint3 threadIdx, blockIdx;  // of the fiber that runs
#endif

namespace cuemu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { ready, at_barrier, in_collective, at_cluster_barrier, done };

struct Warp {  // one collective at a time: the lanes leave a value each, the last one opens it
  std::mutex mutex;
  std::condition_variable opened;
  unsigned mask = 0, arrived = 0, generation = 0;
  uint64_t left[kWarp], seen[kWarp];
};

struct Thread {
  State state = State::ready;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer = nullptr;
};

struct FreeDeleter {
  void operator()(void* p) const { free(p); }
};

struct Shared {  // the memory of one declaration, in one block
  std::unique_ptr<char, FreeDeleter> memory;
  size_t bytes = 0;
};

struct Barrier {
  unsigned waiting = 0, generation = 0;
  std::condition_variable opened;
};

struct Block {
  unsigned alive = 0;
  Barrier barrier;
  std::unique_ptr<Warp[]> warps;
  std::mutex shared_mutex;
  std::map<const void*, Shared> shared;  // declaration -> memory
};

// One kernel launch, at one of its clusters.
struct Launch {
  unsigned count = 0, cluster = 1;  // threads of a block, blocks of a cluster
  size_t dynamic_bytes = 0;
  unsigned first = 0;  // the cluster's first block
  std::function<void()> kernel;
  std::vector<Thread> threads;  // of all the cluster
  std::unique_ptr<Block[]> blocks;
  std::mutex mutex;  // of the barriers and of who is alive
  Barrier barrier;   // of the cluster

  void* scheduler = nullptr;  // where the fibers return to
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

inline Launch* launch_now = nullptr;

inline unsigned rank() { return blockIdx.x - launch_now->first; }  // of the block in its cluster
inline unsigned self() { return rank() * launch_now->count + threadIdx.x; }
inline Block& block_now() { return launch_now->blocks[rank()]; }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuemu: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  fflush(stderr);
  _Exit(86);
}

// Whether the fault number `n`, of those that cuda_faults.py has put into a copy of the kernels, is
// to be made in this run.
inline bool fault(int n) {
  static const char* const text = getenv("CUEMU_FAULT");
  static const int chosen = text == nullptr ? -1 : atoi(text);
  return n == chosen;
}

template <class I>
I narrow(int n, I offset) {
  return fault(n) ? static_cast<I>(static_cast<int32_t>(offset)) : offset;
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

// The threads `begin` to `end` of the cluster meet at `barrier`; `alive` of them still run.
inline void sync(Barrier& barrier, unsigned begin, unsigned end, unsigned alive, State state,
                 std::unique_lock<std::mutex>& lock) {
  if (alive != end - begin) fail("a barrier after a thread that should meet there has returned");
  const unsigned generation = barrier.generation;
  if (++barrier.waiting == end - begin) {
    barrier.waiting = 0;
    barrier.generation++;
#ifdef CUEMU_THREADS
    barrier.opened.notify_all();
    (void)state;
#else
    wake(begin, end, state);
#endif
    return;
  }
  wait(state, lock, barrier.opened, [&] { return barrier.generation != generation; });
}

inline void sync_block() {
  Launch& l = *launch_now;
  Block& block = block_now();
  std::unique_lock<std::mutex> lock(l.mutex);
  const unsigned begin = rank() * l.count;
  sync(block.barrier, begin, begin + l.count, block.alive, State::at_barrier, lock);
}

inline unsigned alive() {
  unsigned sum = 0;
  for (unsigned i = 0; i < launch_now->cluster; i++) sum += launch_now->blocks[i].alive;
  return sum;
}

inline void sync_cluster() {
  Launch& l = *launch_now;
  std::unique_lock<std::mutex> lock(l.mutex);
  sync(l.barrier, 0, l.count * l.cluster, alive(), State::at_cluster_barrier, lock);
}

// The calling thread ends.
inline void leave() {
  block_now().alive--;
  if (block_now().barrier.waiting != 0 || launch_now->barrier.waiting != 0) {
    fail("a thread has returned while others wait in a barrier");
  }
}

// All lanes of `mask` meet; `all` is what each of them has left. A mutex per warp, so that warps do
// not order each other's accesses.
inline void meet(unsigned mask, uint64_t mine, uint64_t (&all)[kWarp]) {
  Launch& l = *launch_now;
  const unsigned lane = threadIdx.x % kWarp, of_block = threadIdx.x - lane;
  const unsigned lanes = std::min(kWarp, l.count - of_block);
  Warp& warp = block_now().warps[of_block / kWarp];
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
    wake(self() - lane, self() - lane + lanes, State::in_collective);
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

inline char* poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) abort();
  memset(memory, 0xff, bytes);  // NaN as any floating-point type
  return static_cast<char*>(memory);
}

// The memory of one declaration, made when the first thread comes by.
inline void* shared_of(Block& block, const void* declaration, size_t bytes) {
  std::lock_guard<std::mutex> lock(block.shared_mutex);
  Shared& found = block.shared[declaration];
  if (!found.memory) found.memory.reset(poisoned(found.bytes = bytes));
  return found.memory.get();
}

inline void* shared(const void* declaration, size_t bytes) {
  return shared_of(block_now(), declaration, bytes);
}

inline const char dynamic_declaration = 0;
inline void* dynamic() { return shared(&dynamic_declaration, launch_now->dynamic_bytes); }

// Where another block of the cluster has what lies at `mine` in this one.
inline void* map_shared(void* mine, unsigned target) {
  Launch& l = *launch_now;
  if (target >= l.cluster) fail("shared memory of a block outside the cluster");
  {
    std::lock_guard<std::mutex> lock(l.mutex);
    if (l.blocks[target].alive == 0) fail("shared memory of a block that has returned");
  }
  const void* declaration = nullptr;
  size_t offset = 0, bytes = 0;
  {
    std::lock_guard<std::mutex> lock(block_now().shared_mutex);
    for (const auto& [key, found] : block_now().shared) {
      const char* begin = found.memory.get();
      if (mine >= begin && mine < begin + found.bytes) {
        declaration = key;
        offset = static_cast<char*>(mine) - begin;
        bytes = found.bytes;
      }
    }
  }
  if (bytes == 0) fail("map_shared_rank of what is no shared memory");
  return static_cast<char*>(shared_of(l.blocks[target], declaration, bytes)) + offset;
}

inline int shared_limit() {
  const char* text = getenv("CUEMU_SHARED_LIMIT");
  return text != nullptr ? atoi(text) : 227 * 1024;
}

inline bool exact_exp2 = false;  // see approximate_exp2

inline std::map<const void*, int> dynamic_allowed;  // kernel -> what it was given beyond 48 KB

// ---- Launches -----------------------------------------------------------------------------------

#ifdef CUEMU_THREADS

inline void run_cluster(Launch& l) {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < l.count * l.cluster; i++) {
    threads.emplace_back([&l, i] {
      threadIdx = {i % l.count, 0, 0};
      blockIdx = {l.first + i / l.count, 0, 0};
      _mm_setcsr(_mm_getcsr() | 0x8040);
      l.kernel();
      std::lock_guard<std::mutex> lock(l.mutex);
      leave();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

// For all launches: to map them anew would take longer than most kernels that tests run.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

inline void run_cluster(Launch& l) {
  const bool reverse = getenv("CUEMU_REVERSE") != nullptr;
  const unsigned total = l.count * l.cluster;
  for (size_t i = 0; i < total; i++) {
    Thread& thread = l.threads[i];
    thread.stack = stack_of(i);
    void** top = reinterpret_cast<void**>(
        (reinterpret_cast<uintptr_t>(thread.stack) + kStack) & ~uintptr_t{15});
    *--top = nullptr;  // where fiber_body would return to, and what keeps its stack aligned
    *--top = reinterpret_cast<void*>(fiber_body);
    thread.stack_pointer = top - 6;
    memset(thread.stack_pointer, 0, 6 * sizeof(void*));
  }
  unsigned running = total;
  while (running != 0) {
    bool progress = false;
    for (unsigned k = 0; k < total; k++) {
      const unsigned i = reverse ? total - 1 - k : k;
      Thread& thread = l.threads[i];
      if (thread.state != State::ready) continue;
      threadIdx = {i % l.count, 0, 0};
      blockIdx = {l.first + i / l.count, 0, 0};
      progress = true;
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&l.scheduler_sanitizer, thread.stack, kStack);
#endif
      cuemu_switch(&l.scheduler, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(l.scheduler_sanitizer, nullptr, nullptr);
#endif
      if (thread.state == State::done) {
        running--;
        leave();
      }
    }
    if (!progress) fail("deadlock: a barrier or collective that not all of its threads reach");
  }
}

#endif

inline void run(dim3 grid, dim3 block, unsigned cluster, size_t dynamic_bytes,
                std::function<void()> kernel) {
  Launch l;
  launch_now = &l;
  exact_exp2 = getenv("CUEMU_EXACT_EXP2") != nullptr;
  gridDim = grid;
  blockDim = block;
  l.count = block.x;
  l.cluster = cluster;
  l.dynamic_bytes = dynamic_bytes;
  l.kernel = std::move(kernel);
  l.threads = std::vector<Thread>(l.count * cluster);
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // subnormal numbers are 0, as with nvcc -ftz=true
  for (l.first = 0; l.first < grid.x; l.first += cluster) {
    l.blocks.reset(new Block[cluster]);
    for (unsigned i = 0; i < cluster; i++) {
      l.blocks[i].alive = l.count;
      l.blocks[i].warps.reset(new Warp[(l.count + kWarp - 1) / kWarp]);
    }
    for (Thread& thread : l.threads) thread.state = State::ready;
    run_cluster(l);
  }
  _mm_setcsr(control);
  launch_now = nullptr;
}

// What stands in __launch_bounds__: more threads than that do not start on a GPU.
inline void launch_bounds(unsigned threads, unsigned = 0, unsigned blocks_of_cluster = 0) {
  if (blockDim.x > threads) fail("more threads than the kernel's __launch_bounds__");
  if (blocks_of_cluster != 0 && launch_now->cluster > blocks_of_cluster) {
    fail("a larger cluster than the kernel's __launch_bounds__");
  }
}

// ex2.approx.ftz.f32 may be wrong by 2 units in the last place: so this one is, in a direction that
// depends on the argument in no useful way. exp2(0) is exact.
// CUEMU_EXACT_EXP2 asks for the nearest one instead.
inline float approximate_exp2(float x) {
  const float exact = ::exp2f(x);
  if (exact_exp2) return exact;
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
  type* const name = static_cast<type*>(cuemu::dynamic())

using std::max;
using std::min;

inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }

inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline void __syncthreads() { cuemu::sync_block(); }

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bit) {
  return cuemu::from_lane(mask, value, (threadIdx.x % cuemu::kWarp) ^ bit);
}

template <class V>
V __ldg(const V* p) {
  return *p;
}

template <class V>
void __stwb(V* p, V value) {
  *p = value;
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
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) return cudaErrorNotSupported;
    cluster = attribute.val.clusterDim.x;
    if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) {
      return cudaErrorInvalidClusterSize;
    }
  }
  // 8 blocks are what every GPU with clusters has; more have to be asked for.
  if (cluster == 0 || cluster > 8 || grid.x % cluster != 0) return cudaErrorInvalidClusterSize;
  cuemu::run(grid, block, cluster, config->dynamicSmemBytes, [&] { kernel(arguments...); });
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
