// SPDX-License-Identifier: MIT
// What bench/roofline.cpp measures, once per instruction set: the pieces of a tile of 64 queries by 64 keys.
#include "attention_kernel.h"

#if defined(__x86_64__)
#define REGISTER(x) "+v"(x)
#else
#define REGISTER(x) "+w"(x)
#endif

// Seconds that one call takes: the least of several rounds, as nothing but interruptions can make it longer.
template <class F>
static double seconds(F f) {
  double least_of = 1;
  for (int round = 0; round < 9; round++) {
    const double start = now();
    for (int i = 0; i < 2000; i++) f();
    const double one = (now() - start) / 2000;
    if (one < least_of) least_of = one;
  }
  return least_of;
}

static void roofline(void* memory, int64_t, int64_t) {
  float *a = (float*)memory, *b = a + 65536, *c = b + 65536, *m = c + 65536;
  const double peak = seconds([&] {
    vf sums[16], x = load(a), y = load(b);
    UNROLL for (int i = 0; i < 16; i++) sums[i] = load(a + i * W);  // equal ones would be computed once
    for (int k = 0; k < 64; k++) {
      UNROLL for (int i = 0; i < 16; i++) sums[i] += x * y;
      asm volatile("" : REGISTER(x), REGISTER(y));  // else the product would be computed once
    }
    UNROLL for (int i = 0; i < 16; i++) store(c + i * W, sums[i]);
    asm volatile("" ::: "memory");
  });
  std::printf("peak %.6g\n", 64 * 16 * 2.0 * W / peak);  // floating-point operations a second

  for (int64_t D : {32, 64, 128}) {
    const double flops = 2.0 * 64 * 64 * D;
    std::printf("scores_%d %.6g\n", int(D), flops / seconds([&] { product(64, 64, D, a, D, 1, b, 64, c, 64, false); }));
    std::printf("values_%d %.6g\n", int(D), flops / seconds([&] { product(64, D, 64, a, 1, 64, b, D, c, D, true); }));
  }

  Attention attention{};
  attention.q.size[2] = attention.k.size[2] = 64;
  Tile tile;
  tile_of(attention, 0, 0, 0, tile);
  const Block block = block_of(tile, 0, 64);
  float *l = m + 64, *alpha = m + 128;
  const double softmax = seconds([&] {
    for (int i = 0; i < 64; i++) m[i] = -INF, l[i] = 0;
    softmax_block(tile, block, c, m, l, alpha);
    asm volatile("" ::: "memory");
  });
  std::printf("softmax %.6g\n", 64 * 64 / softmax);  // scores a second
  const double exponential = seconds([&] {
    for (int i = 0; i < 4096; i += W) store(c + i, exp(load(a + i)));
    asm volatile("" ::: "memory");
  });
  std::printf("exp %.6g\n", 4096 / exponential);  // numbers a second
  const double short_one = seconds([&] {
    for (int i = 0; i < 4096; i += W) store(c + i, exp_for_bf16(load(a + i)));
    asm volatile("" ::: "memory");
  });
  std::printf("exp_for_bf16 %.6g\n", 4096 / short_one);
}
