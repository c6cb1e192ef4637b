// SPDX-License-Identifier: MIT
// Runs kernels written in CUDA C++ on the CPU, so that they can be tested where there is no GPU. A kernel file includes
// this instead of the CUDA headers when MINIMAL_CUDA_ON_CPU is defined, and is compiled by g++:
//
//     cuda_on_cpu::schedule = {cuda_on_cpu::Order::random, seed};
//     cuda_on_cpu::launch({blocks, 1, 1}, {threads, 1, 1}, bytes_of_shared_memory, [&] { kernel<float>(x, y, n); });
//
// Each CUDA thread is a fiber (a stack of its own, no thread of the system); a fiber runs until it has to wait for
// others. Blocks run one after another. What goes wrong inside a kernel is thrown by launch() as std::runtime_error:
//
//     threads of a block that wait at different barriers, or for ever          always
//     lanes of a warp that meet in different shuffles, or whose partner left   always
//     work that is right in one order of the threads only                      with the schedule that breaks it
//     shared memory that is read before it is written                          always: it starts as NaN
//     a cp.async that is not waited for, or that starts too early              always: NaN until waited for
//     reading or writing past global or shared memory                          -fsanitize=address
//     two threads at one address without a barrier between, or two blocks      -fsanitize=thread
//
// Not modelled: the approximations of fast mathematics, memory as weakly ordered as a GPU's beyond what ThreadSanitizer
// checks, time. Under ThreadSanitizer a launch may have 8000 threads in all.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// __shared__ itself is left undefined: a kernel says MINIMAL_SHARED, and the array becomes an allocation of its own.
#define MINIMAL_SHARED(T, name, n) \
  static char name##_place;        \
  T* const name = static_cast<T*>(::cuda_on_cpu::shared_array(&name##_place, sizeof(T) * (n)))
#define MINIMAL_DYN_SHARED(T, name) T* const name = static_cast<T*>(::cuda_on_cpu::block->dynamic)

// ---- as much of CUDA's types and functions as the kernels use -------------------------------------------------------

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
struct __half { _Float16 value; };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __half2float(__half h) { return float(h.value); }
inline float __bfloat162float(__nv_bfloat16 b) { return same_bits<float>(uint32_t(b.bits) << 16); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = same_bits<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};  // to nearest, ties to even
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __fmul_rn(float x, float y) { return x * y; }  // compile with -ffp-contract=off
inline float __fadd_rn(float x, float y) { return x + y; }

// ---- what the sanitizers have to be told ----------------------------------------------------------------------------

#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_TSAN(code) code
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define CUDA_ON_CPU_TSAN(code)
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN(code) code
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define CUDA_ON_CPU_ASAN(code)
#endif

// The switch between two stacks. With ucontext it costs a system call; under ThreadSanitizer nobody notices, and so the
// way of other processors is tested, too.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define CUDA_ON_CPU_ASSEMBLY 1
extern "C" void cuda_on_cpu_switch(void** leave, void* enter);
asm(R"(
  .pushsection .text
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %r15; pushq %r14; pushq %r13; pushq %r12; pushq %rbp; pushq %rbx
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %rbx; popq %rbp; popq %r12; popq %r13; popq %r14; popq %r15
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
  .popsection
)");
#else
#define CUDA_ON_CPU_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

// While one of these lives, ThreadSanitizer does not look: the bookkeeping here is shared by all threads of a kernel.
struct Unwatched {
  Unwatched() { CUDA_ON_CPU_TSAN(AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0);) }
  ~Unwatched() { CUDA_ON_CPU_TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);) }
};
// What a thread did before release(clock) happened before what another does after acquire(clock).
inline void release([[maybe_unused]] char* clock) { CUDA_ON_CPU_TSAN(__tsan_release(clock);) }
inline void acquire([[maybe_unused]] char* clock) { CUDA_ON_CPU_TSAN(__tsan_acquire(clock);) }

// ---- fibers and their schedule --------------------------------------------------------------------------------------

enum class Order { first_in, last_in, random };  // which of the threads that could go on does so
struct Schedule {
  Order order = Order::first_in;
  unsigned seed = 0;
};
inline Schedule schedule;

constexpr size_t STACK = 256 * 1024;
constexpr unsigned FULL = 0xffffffff;

struct Context {
#if CUDA_ON_CPU_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  CUDA_ON_CPU_TSAN(void* fiber = nullptr;)
  CUDA_ON_CPU_ASAN(void* fake = nullptr; const void* stack = nullptr; size_t size = 0;)
};

struct Copy {  // one cp.async
  void* to;
  alignas(16) char data[16];
  int bytes, group;
};

struct Thread {
  Context context;
  uint3 index;
  int number = 0;  // in its block
  bool done = false;
  std::vector<Copy> copies;
  int groups = 0;  // of copies, closed by commit
};

struct Warp {
  unsigned living = 0, mask = 0, arrived = 0;  // one bit a lane
  const char* what = nullptr;                  // they meet in, and at which line
  int line = 0;
  int met = 0;
  void* lane[32] = {};
};

struct Block {
  dim3 grid, size;
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::deque<int> ready;  // threads that could go on
  int living = 0;
  int waiting = 0, line = 0, barriers = 0;  // at the barrier, and which one
  Thread* running = nullptr;
  Context scheduler;
  void* dynamic = nullptr;
  std::vector<std::pair<const void*, void*>> arrays;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  char *clocks = nullptr, *end = nullptr;  // for ThreadSanitizer: of this block's barriers and warps; of the grid's end
};
inline Block* block = nullptr;

inline Thread& me() { return *block->running; }
inline int lane() { return me().number % 32; }
inline Warp& warp() { return block->warps[me().number / 32]; }

inline void jump(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
  CUDA_ON_CPU_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake, to.stack, to.size);)
  CUDA_ON_CPU_TSAN(__tsan_switch_to_fiber(to.fiber, 1);)  // 1: nothing happens before anything by this
#if CUDA_ON_CPU_ASSEMBLY
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);)
}

inline void wait() { jump(me().context, block->scheduler); }

// Ends the launch. Kernels hold nothing that would have to be destroyed, so their stacks can be left as they are.
[[noreturn]] inline void fail(const std::string& what) {
  const uint3 b = block->index, t = me().index;
  const auto text = [](uint3 i) { return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z); };
  block->error = what + " (block " + text(b) + ", thread " + text(t) + ")";
  CUDA_ON_CPU_TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);)  // called inside an Unwatched
  jump(me().context, block->scheduler, true);
  std::abort();
}

inline std::string place(const char* what, int line) { return std::string(what) + " of line " + std::to_string(line); }

inline void open_barrier() {
  block->waiting = 0;
  block->barriers++;
  for (Thread& t : block->threads)
    if (!t.done) block->ready.push_back(t.number);
}

inline void barrier(int line) {
  Unwatched here;
  Block& b = *block;
  if (b.waiting && b.line != line)
    fail("divergent barrier: " + place("__syncthreads", line) + " while others are at line " + std::to_string(b.line));
  b.line = line;
  char* const clock = b.clocks + b.barriers % 2;  // two: who leaves one late must not see what others did since
  release(clock);
  if (++b.waiting == b.living) open_barrier();
  wait();
  acquire(clock);
}

// The lanes of `mask` meet, and the last one to come runs act(lanes), where lanes[i] points to what lane i brought.
// This orders no memory, as on the GPU.
template <class Lane, class Act>
void meet(unsigned mask, const char* what, int line, Lane& mine, Act act) {
  Warp& w = warp();
  const unsigned bit = 1u << lane();
  if (!(mask & bit)) fail(place(what, line) + ": its mask lacks the lane that calls it");
  if (mask & ~w.living) fail(place(what, line) + ": its mask names a lane that has returned");
  if (w.arrived && (w.mask != mask || w.what != what || w.line != line))
    fail("divergent warp: " + place(what, line) + " while other lanes are in " + place(w.what, w.line));
  w.mask = mask, w.what = what, w.line = line;
  w.lane[lane()] = &mine;
  w.arrived |= bit;
  if (w.arrived == mask) {
    Lane* lanes[32] = {};
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) lanes[i] = static_cast<Lane*>(w.lane[i]);
    act(lanes);
    w.arrived = 0;
    w.met++;
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) block->ready.push_back(me().number / 32 * 32 + i);
  }
  wait();
}

template <class T>
T shuffle(unsigned mask, T value, int from, const char* what, int line) {
  struct Lane {
    T value, result;
    int from;
  };
  Unwatched here;
  Lane mine{value, value, from};
  meet(mask, what, line, mine, [&](Lane** lanes) {
    for (int i = 0; i < 32; i++) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->from]) fail(place(what, line) + ": reads a lane that its mask lacks");
      lanes[i]->result = lanes[lanes[i]->from]->value;
    }
  });
  return mine.result;
}

inline void sync_warp(unsigned mask, int line) {
  Unwatched here;
  char* const clock = block->clocks + 2 + 2 * (me().number / 32) + warp().met % 2;
  release(clock);
  meet(mask, "__syncwarp", line, mask, [](unsigned**) {});
  acquire(clock);
}

inline void* shared_memory(size_t bytes) {
  void* p = ::operator new(bytes, std::align_val_t(128));  // of exactly this size: AddressSanitizer watches its end
  std::memset(p, 0xff, bytes);                             // NaN in every floating-point type
  return p;
}
inline void free_shared_memory(void* p) { ::operator delete(p, std::align_val_t(128)); }

inline void* shared_array(const void* which, size_t bytes) {
  Unwatched here;
  for (auto& [key, p] : block->arrays)
    if (key == which) return p;
  return block->arrays.emplace_back(which, shared_memory(bytes)).second;
}

// ---- instructions of PTX --------------------------------------------------------------------------------------------

inline float as_float(__half*, uint16_t bits) { return __half2float(same_bits<__half>(bits)); }
inline float as_float(__nv_bfloat16*, uint16_t bits) { return __bfloat162float({bits}); }

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32, d += a b. With g = lane / 4 and t = lane % 4, half h of register r is
//     a: row g + 8 (r % 2), column 2 t + h + 8 (r / 2)      b: row 2 t + h + 8 r, column g
//     d[i]: row g + 8 (i / 2), column 2 t + i % 2
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  };
  Unwatched here;
  Lane mine{d, a, b};
  meet(FULL, "mma", line, mine, [](Lane** lanes) {
    float A[16][16], B[16][8], C[16][8] = {};
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4;
      for (int h = 0; h < 2; h++) {
        for (int r = 0; r < 4; r++)
          A[g + 8 * (r % 2)][2 * t + h + 8 * (r / 2)] = as_float((T*)nullptr, uint16_t(lanes[l]->a[r] >> 16 * h));
        for (int r = 0; r < 2; r++) B[2 * t + h + 8 * r][g] = as_float((T*)nullptr, uint16_t(lanes[l]->b[r] >> 16 * h));
      }
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) lanes[l]->d[i] += C[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  });
}

// ldmatrix.sync.aligned.m8n8.x{N}[.trans].shared.b16: lane 8 m + i names row i of matrix m; register m of a lane gets
// two neighbours of row lane / 4 of matrix m, or of column lane / 4 when transposed.
template <int N, bool transposed>
void ldmatrix(uint32_t (&out)[N], const void* row, int line = __builtin_LINE()) {
  struct Lane {
    uint16_t row[8];
    uint32_t* out;
  };
  Lane mine{{}, out};
  if (lane() < 8 * N) {
    if (reinterpret_cast<uintptr_t>(row) % 16) {
      Unwatched here;
      fail(place("ldmatrix", line) + ": a row that does not start at a multiple of 16 bytes");
    }
    std::memcpy(mine.row, row, 16);  // watched: the lane that names a row reads it
  }
  Unwatched here;
  meet(FULL, transposed ? "ldmatrix.trans" : "ldmatrix", line, mine, [](Lane** lanes) {
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < N; m++) {
        const int i = l / 4, j = 2 * (l % 4);
        const uint32_t low = transposed ? lanes[8 * m + j]->row[i] : lanes[8 * m + i]->row[j];
        const uint32_t high = transposed ? lanes[8 * m + j + 1]->row[i] : lanes[8 * m + i]->row[j + 1];
        lanes[l]->out[m] = low | high << 16;
      }
  });
}

// cp.async: the bytes may arrive at any time until they are waited for. Here they do so as late as can be, and the old
// ones are gone at once. The last bytes - `from_bytes` are filled with zeros.
inline void cp_async(void* to, const void* from, int bytes, int from_bytes, int line = __builtin_LINE()) {
  Copy copy{to, {}, bytes, me().groups};
  if (reinterpret_cast<uintptr_t>(to) % bytes || (from_bytes && reinterpret_cast<uintptr_t>(from) % bytes)) {
    Unwatched here;
    fail(place("cp.async", line) + ": an address that is not a multiple of " + std::to_string(bytes));
  }
  if (from_bytes) std::memcpy(copy.data, from, from_bytes);
  std::memset(to, 0xff, bytes);
  Unwatched here;
  me().copies.push_back(copy);
}
inline void cp_async_commit() {
  Unwatched here;
  me().groups++;
}
// Until at most the last N groups are under way.
inline void cp_async_wait(int N) {
  std::vector<Copy>& copies = me().copies;
  for (const Copy& c : copies)
    if (c.group < me().groups - N) std::memcpy(c.to, c.data, c.bytes);
  Unwatched here;
  copies.erase(std::remove_if(copies.begin(), copies.end(), [&](const Copy& c) { return c.group < me().groups - N; }),
               copies.end());
}

// ---- a launch -------------------------------------------------------------------------------------------------------

inline void thread_main() {
  CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);)
  (*block->kernel)();
  {
    Unwatched here;
    Block& b = *block;
    release(b.end);
    me().done = true;
    warp().living &= ~(1u << lane());
    if (warp().arrived & warp().mask && warp().mask & ~warp().living)
      fail("a lane returns while others wait for it in " + place(warp().what, warp().line));
    if (--b.living && b.waiting == b.living) open_barrier();  // a barrier counts the threads that have not returned
  }
  jump(me().context, block->scheduler, true);
  std::abort();
}

inline void start(Context& c, char* stack) {
#if CUDA_ON_CPU_ASSEMBLY
  auto top = reinterpret_cast<void**>(stack + STACK) - 2;  // a function starts 8 bytes off a multiple of 16
  top[0] = reinterpret_cast<void*>(&thread_main);
  top[1] = nullptr;
  c.stack_pointer = top - 6;  // the registers that the switch restores, whatever they hold
#else
  getcontext(&c.registers);
  c.registers.uc_stack.ss_sp = stack;
  c.registers.uc_stack.ss_size = STACK;
  c.registers.uc_link = nullptr;
  makecontext(&c.registers, thread_main, 0);
#endif
  CUDA_ON_CPU_TSAN(c.fiber = __tsan_create_fiber(0);)
  CUDA_ON_CPU_ASAN(c.fake = nullptr; c.stack = stack; c.size = STACK; __asan_unpoison_memory_region(stack, STACK);)
}

inline void run_block(Block& b, std::mt19937& random) {
  while (b.error.empty() && !b.ready.empty()) {
    if (schedule.order == Order::first_in) {
      b.running = &b.threads[b.ready.front()];
      b.ready.pop_front();
    } else {
      if (schedule.order == Order::random) std::swap(b.ready[random() % b.ready.size()], b.ready.back());
      b.running = &b.threads[b.ready.back()];
      b.ready.pop_back();
    }
    jump(b.scheduler, b.running->context);
  }
  if (!b.error.empty() || !b.living) return;
  b.error = "deadlock: " + std::to_string(b.living) + " threads wait for ever";
  if (b.waiting) b.error += ", " + std::to_string(b.waiting) + " in " + place("__syncthreads", b.line);
  for (Warp& w : b.warps)
    if (w.arrived) b.error += ", lanes of a warp in " + place(w.what, w.line);
}

inline void launch(dim3 grid, dim3 size, size_t shared, const std::function<void()>& kernel) {
  Unwatched here;
  const size_t n = size_t(size.x) * size.y * size.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (n < 1 || n > 1024) throw std::runtime_error("a block of " + std::to_string(n) + " threads");
  if (!blocks || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("the grid's size");
  if (shared > 227 * 1024) throw std::runtime_error(std::to_string(shared) + " bytes of shared memory");

  std::mt19937 random(schedule.seed);
  const size_t warps = (n + 31) / 32, clocks = 2 + 2 * warps;
  // Kept to the end: at an address used again, ThreadSanitizer would see one block wait for another.
  std::vector<char> all_clocks(blocks * clocks + 1);
  std::vector<void*> fibers;
  std::unique_ptr<char, void (*)(void*)> stacks(nullptr, std::free);
  std::string error;
  for (size_t i = 0; i < blocks && error.empty(); i++) {
    Block b;
    block = &b;
    b.grid = grid, b.size = size;
    b.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    b.kernel = &kernel;
    b.living = int(n);
    b.clocks = &all_clocks[i * clocks];
    b.end = &all_clocks.back();
    b.dynamic = shared_memory(shared);
    b.threads.resize(n);
    b.warps.resize(warps);
#if defined(__SANITIZE_THREAD__)
    stacks.reset();  // new memory for each block, as its threads are others
    b.scheduler.fiber = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &b.scheduler.size);
    pthread_attr_destroy(&attributes);
    b.scheduler.stack = bottom;
#endif
    if (!stacks) stacks.reset(static_cast<char*>(std::aligned_alloc(4096, n * STACK)));
    for (unsigned t = 0; t < n; t++) {
      b.threads[t].number = int(t);
      b.threads[t].index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
      b.warps[t / 32].living |= 1u << t % 32;
      b.ready.push_back(int(t));
      start(b.threads[t].context, stacks.get() + t * STACK);
      CUDA_ON_CPU_TSAN(fibers.push_back(b.threads[t].context.fiber);)
    }
    run_block(b, random);
    error = b.error;
    free_shared_memory(b.dynamic);
    for (auto& [key, p] : b.arrays) free_shared_memory(p);
    block = nullptr;
  }
  CUDA_ON_CPU_TSAN(for (void* f : fibers) __tsan_destroy_fiber(f);)
  acquire(&all_clocks.back());  // what the kernel wrote is there for the caller; its blocks stay unordered
  if (!error.empty()) throw std::runtime_error(error);
}

// Calls f, and returns what it threw as text, nullptr if nothing: for entries that Python calls.
template <class F>
const char* error_of(F f) {
  static std::string text;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}

}  // namespace cuda_on_cpu

// ---- the names that CUDA gives to all this --------------------------------------------------------------------------

#define threadIdx (::cuda_on_cpu::me().index)
#define blockIdx (::cuda_on_cpu::block->index)
#define blockDim (::cuda_on_cpu::block->size)
#define gridDim (::cuda_on_cpu::block->grid)

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __syncwarp(unsigned mask = cuda_on_cpu::FULL, int line = __builtin_LINE()) {
  cuda_on_cpu::sync_warp(mask, line);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, x, from & 31, "__shfl_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, x, cuda_on_cpu::lane() ^ bits, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int line = __builtin_LINE()) {
  const int from = cuda_on_cpu::lane() + int(by);
  return cuda_on_cpu::shuffle(mask, x, from < 32 ? from : cuda_on_cpu::lane(), "__shfl_down_sync", line);
}
