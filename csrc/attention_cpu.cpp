// SPDX-License-Identifier: MIT
// Attention on the CPU: how the work is shared between the threads. The tiles themselves are in attention_kernel.h.
#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace minimal {

struct Attention {
  View q, k, v;
  Scores scores;
  View out, lse;
  View dout, dq, dk, dv;  // backward only
};
constexpr int64_t QUERIES = 64;  // in a tile: four AVX-512 vectors
constexpr int64_t KEYS = 64;     // in a block: S' of a tile then takes 16 KB of a first-level cache of 32 or 48

}  // namespace minimal

#define MINIMAL_KERNEL "attention_kernel.h"
#include "every_isa.h"

namespace minimal {
namespace {

int64_t work(const Attention& a) {
  return a.q.size[0] * a.q.size[1] * a.q.size[2] * a.k.size[2] * (a.q.size[3] + a.v.size[3]);
}

// Waking the threads costs some microseconds, which a small product does not earn back.
void run(const Attention& a, int64_t n, void (*body)(void*, int64_t, int64_t), Parallel parallel) {
  if (n == 0) return;
  if (n == 1 || work(a) < 100000) body((void*)&a, 0, n);
  else parallel(n, body, (void*)&a);
}

// How many pieces the pool cuts a long loop into.
int64_t threads(Parallel parallel) {
  std::atomic<int64_t> pieces{0};
  parallel(4096, [](void* count, int64_t, int64_t) { ++*static_cast<std::atomic<int64_t>*>(count); }, &pieces);
  return pieces;
}

// One of the kernels' functions for this processor: for bfloat16 on its matrix unit, if it has one, and if there are rows
// enough to fill a square of it.
#if MINIMAL_X86
#define BEST(f) (on_matrix_unit(a) ? avx512::amx_##f : MINIMAL_BEST(f))
bool on_matrix_unit(const Attention& a) {
  const bool bf16 = a.q.type == Type::bf16 && a.k.type == Type::bf16 && a.v.type == Type::bf16;
  return isa() == Isa::amx && bf16 && a.q.size[2] >= 32 && a.k.size[2] >= 32;
}
#else
#define BEST(f) MINIMAL_BEST(f)
#endif

}  // namespace

void attention_forward(View q, View k, View v, const Scores& scores, View out, View lse, Parallel parallel) {
  if (decode_takes(q, k, v, scores)) return decode_forward(q, k, v, scores, out, lse, parallel);
  Attention a{q, k, v, scores, out, lse, {}, {}, {}, {}};
  run(a, q.size[0] * q.size[1] * ((q.size[2] + QUERIES - 1) / QUERIES), BEST(forward_tiles), parallel);
}

void attention_backward(View dout, View q, View k, View v, View out, View lse, const Scores& scores, View dq, View dk,
                        View dv, Parallel parallel) {
  Attention a{q, k, v, scores, out, lse, dout, dq, dk, dv};
  const int64_t heads = k.size[0] * k.size[1];
  if (heads == 0) return;
  // A thread takes whole key-value heads (5 products a head), unless so many threads would then stand idle that
  // 7 products spread over all of them are sooner done. Both give the same bits, so the choice may depend on the pool.
  const int64_t pool = work(a) < 100000 ? 1 : threads(parallel);
  const int64_t rounds = (heads + pool - 1) / pool;
  if (5 * rounds * pool <= 7 * heads) return run(a, heads, BEST(backward_heads), parallel);
  run(a, heads * ((k.size[2] + KEYS - 1) / KEYS), BEST(backward_keys), parallel);
  run(a, q.size[0] * q.size[1] * ((q.size[2] + QUERIES - 1) / QUERIES), BEST(backward_queries), parallel);
}

}  // namespace minimal
