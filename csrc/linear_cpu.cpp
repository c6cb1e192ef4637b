// SPDX-License-Identifier: MIT
// Linear layers with quantised weights: how the outputs are shared between the threads, for each instruction set.
#include <cstdint>

#include "kernels.h"

namespace minimal {

struct Linear {
  View x;
  Weight weight;
  View bias;
  bool dynamic, many;         // many: a lane is an output (linear_kernel.h); only where all products are of integers
  View out;
  int64_t row = 0, rows = 0;  // of x, that are worked on
  char* prepared = nullptr;   // these rows, as the products read them
  int64_t next = 0;           // bytes from one of them to the next: ROW-rounded C floats, of many rows less
};
struct Unpack {
  Weight weight;
  View out;
};
constexpr int64_t MANY = 16;  // rows from which laying out the weights pays
constexpr int64_t ROW = 512;  // 32 columns for each lane of the widest vector

}  // namespace minimal

#define MINIMAL_KERNEL "linear_kernel.h"
#include "every_isa.h"

namespace minimal {

namespace {
// The 64-byte products need VNNI, which all but the first processors with AVX-512 have: those take the 32-byte ones.
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

bool many_rows_in_integers(Kind kind) {
  return (kind == Kind::int8 || kind == Kind::int4) && isa() >= Isa::avx2;
}

void linear_forward(View x, const Weight& weight, View bias, bool dynamic, View out, Parallel parallel) {
  const int64_t N = x.size[2], wide = (weight.C + ROW - 1) / ROW * ROW;
  dynamic = dynamic && (weight.kind == Kind::int8 || weight.kind == Kind::int4);
  const bool many = dynamic && N >= MANY && many_rows_in_integers(weight.kind);
  // So many rows at a time that they stay in a cache beside the weights: of the second level, or the first. Of many a row
  // is a byte for each column and three numbers for each group, in an odd number of lines: else rows would share places.
  const int64_t groups = (weight.C + 31) / 32, lines = (groups * (32 + 12) + 63) / 64, next = many ? (lines | 1) * 64 : wide * 4;
  const int64_t fit = many ? (1 << 18) / (next + 1) : 8, at_a_time = many && fit < 48 ? 48 : fit;
  const int64_t parts = N ? (N + at_a_time - 1) / at_a_time : 1;  // of equal size
  const int64_t rows = many ? ((N + parts - 1) / parts + 11) / 12 * 12 : at_a_time;
  ScratchBlock block((N < rows ? N : rows) * next / 4);
  const auto prepare = MINIMAL_BEST_VNNI(linear_prepare), outputs = MINIMAL_BEST_VNNI(linear_outputs);
  const int64_t width = MINIMAL_BEST_VNNI(OUTPUTS), pieces = (weight.O + width - 1) / width;
  const int64_t bytes = (const char*)weight.end - (const char*)weight.codes;
  Linear a{x, weight, bias, dynamic, many, out, 0, 0, (char*)block.start().next, next};
  for (; a.row < N; a.row += rows) {
    a.rows = N - a.row < rows ? N - a.row : rows;
    if (many) parallel(a.rows, prepare, &a); else prepare(&a, 0, a.rows);
    if (bytes * (many ? 8 : 1) < 80000) outputs(&a, 0, pieces);  // waking threads takes as long
    else parallel(pieces, outputs, &a);
  }
}

void unpack(const Weight& weight, View out, Parallel parallel) {
  Unpack a{weight, out};
  const int64_t groups = weight.O * ((weight.C + 31) / 32);
  const auto run = MINIMAL_BEST_VNNI(unpack_groups);
  if (groups < 3000) run(&a, 0, groups); else parallel(groups, run, &a);
}

}  // namespace minimal
