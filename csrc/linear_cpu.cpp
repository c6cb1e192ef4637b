// SPDX-License-Identifier: MIT
// Linear layers with quantised weights: how the outputs are shared between the threads, for each instruction set.
#include <cstdint>

#include "kernels.h"

namespace minimal {

struct Linear {
  View x;
  Weight weight;
  View bias;
  bool dynamic;
  View out;
  int64_t row = 0, rows = 0;  // of x, that are worked on
  char* prepared = nullptr;   // these rows, as the products read them: ROW-rounded C floats each, or what fits there
};
struct Unpack {
  Weight weight;
  View out;
};
constexpr int64_t ROW = 512;  // 32 columns for each lane of the widest vector

}  // namespace minimal

#define MINIMAL_KERNEL "linear_kernel.h"
#include "every_isa.h"

namespace minimal {

namespace {
// The 64-byte products need VNNI, which every processor with AVX-512 has but the first: that one takes the 32-byte ones.
bool has_vnni() {
#if MINIMAL_X86
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vnni"));
  return has;
#else
  return true;
#endif
}
}  // namespace

#if MINIMAL_X86
#define MINIMAL_BEST_VNNI(f) (isa() >= Isa::avx512 && has_vnni() ? avx512::f : isa() >= Isa::avx2 ? avx2::f : generic::f)
#else
#define MINIMAL_BEST_VNNI(f) generic::f
#endif

void linear_forward(View x, const Weight& weight, View bias, bool dynamic, View out, Parallel parallel) {
  constexpr int64_t ROWS = 8;  // of x at a time: they stay in the first-level cache beside the weights
  const int64_t N = x.size[2], wide = (weight.C + ROW - 1) / ROW * ROW;
  ScratchBlock block(((N < ROWS ? N : ROWS) + 1) * wide);
  const auto prepare = MINIMAL_BEST_VNNI(linear_prepare);
  const auto outputs = MINIMAL_BEST_VNNI(linear_outputs);
  Linear a{x, weight, bias, dynamic, out};
  for (const char* p = (const char*)weight.codes, *begin = p; p < weight.end && p < begin + 8192; p += 64)
    __builtin_prefetch(p);  // on its way while x is prepared
  const bool small = (const char*)weight.end - (const char*)weight.codes < 80000;  // waking threads takes as long
  for (a.row = 0; a.row < N; a.row += ROWS) {
    a.rows = N - a.row < ROWS ? N - a.row : ROWS;
    const int64_t pieces = prepare(a, block.start().next);
    if (small) outputs(&a, 0, pieces); else parallel(pieces, outputs, &a);
  }
}

void unpack(const Weight& weight, View out, Parallel parallel) {
  Unpack a{weight, out};
  const int64_t groups = weight.O * ((weight.C + 31) / 32);
  const auto run = MINIMAL_BEST_VNNI(unpack_groups);
  if (groups < 3000) run(&a, 0, groups); else parallel(groups, run, &a);
}

}  // namespace minimal
