// SPDX-License-Identifier: MIT
// The kernels of csrc/ piece by piece, from first-level cache: compiled and run by bench/roofline.py.
#include <chrono>
#include <cstdio>
#include <vector>

#include "kernels.h"

namespace minimal {
struct Attention {
  View q, k, v;
  Scores scores;
  View out, lse;
  View dout, dq, dk, dv;
};
constexpr int64_t QUERIES = 64, KEYS = 64;
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace minimal

#define MINIMAL_KERNEL "roofline.h"
#include "every_isa.h"

namespace minimal {
Isa isa() {
#if MINIMAL_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}
void run(float* memory) { MINIMAL_BEST(roofline)(memory, 0, 0); }
}  // namespace minimal

int main() {
  std::vector<float> room(4 * 65536 + 16, 0.5f);
  minimal::run((float*)(((uintptr_t)room.data() + 63) / 64 * 64));
}
