// SPDX-License-Identifier: MIT
// Softmax on the CPU, and the choice of the instruction set that both kernels run on.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

namespace minimal {
struct Softmax {
  View x, mask, y;
  float scale;
  bool causal, past_caches;
};
struct SoftmaxBackward {
  View dy, y, dx;
  float scale;
  bool past_caches;
};
}  // namespace minimal

#define MINIMAL_KERNEL "softmax_kernel.h"
#include "every_isa.h"

namespace minimal {
namespace {

// Waking the threads costs some microseconds, which a small tensor does not earn back.
void run(const View& x, void (*body)(void*, int64_t, int64_t), void* context, Parallel parallel) {
  const int64_t rows = x.size[0] * x.size[1] * x.size[2];
  if (rows * x.size[3] == 0) return;
  if (rows * x.size[3] < 16384) body(context, 0, rows);
  else parallel(rows, body, context);
}

// Whether a result is larger than what a processor's caches keep of it until it is used.
bool past_caches(const View& y) {
  return y.size[0] * y.size[1] * y.size[2] * y.size[3] * (y.type == Type::f32 ? 4 : 2) > int64_t(16) << 20;
}

constexpr struct { Isa isa; const char* name; } names[] = {
#if MINIMAL_X86
    {Isa::amx, "amx"}, {Isa::avx512, "avx512"}, {Isa::avx2, "avx2"},
#endif
    {Isa::generic, "generic"}};

#if MINIMAL_X86
// The matrix unit, and the system's leave to use it: its registers are 8 KB more for each thread to keep.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  const unsigned tile = 1u << 24, bf16 = 1u << 22, vector_bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tile) || !(d & bf16)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & vector_bf16)) return false;  // a virtual machine may hide it
  const long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

bool runs_here(Isa isa) {
#if MINIMAL_X86
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  const bool half = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // whose name not every compiler's builtin knows
  const bool avx2 = half && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::amx) return avx512 && has_amx();
#endif
  return isa == Isa::generic;
}

// "" chooses the best. False: not a name, or not for this processor.
bool find(const char* name, Isa& found) {
  for (const auto& n : names)
    if ((!*name || !std::strcmp(name, n.name)) && runs_here(n.isa)) {
      found = n.isa;
      return true;
    }
  return false;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = [] {
    const char* wanted = std::getenv("MINIMAL_ISA");
    Isa first = Isa::generic;
    if (!wanted || !find(wanted, first)) find("", first);  // an unknown name is not worth dying for while importing
    return first;
  }();
  return isa;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* instruction_set() {
  for (const auto& n : names)
    if (n.isa == isa()) return n.name;
  return "";
}

const char* instruction_sets() {
  static char list[32] = "";
  static const bool once = [] {
    for (const auto& n : names)
      if (runs_here(n.isa)) std::strcat(std::strcat(list, *list ? "," : ""), n.name);
    return true;
  }();
  (void)once;
  return list;
}

bool choose_instruction_set(const char* name) {
  Isa wanted;
  if (!find(name, wanted)) return false;
  chosen() = wanted;
  return true;
}

void softmax_forward(View x, View mask, float scale, bool causal, View y, Parallel parallel) {
  Softmax a{x, mask, y, scale, causal, past_caches(y)};
  run(x, MINIMAL_BEST(softmax_rows), &a, parallel);
}

void softmax_backward(View dy, View y, float scale, View dx, Parallel parallel) {
  SoftmaxBackward a{dy, y, dx, scale, past_caches(dx)};
  run(y, MINIMAL_BEST(softmax_rows_backward), &a, parallel);
}

}  // namespace minimal
