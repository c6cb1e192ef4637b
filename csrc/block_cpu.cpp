// SPDX-License-Identifier: MIT
// A block of a Llama for a few new tokens of each row: minimal/decoder.py has the same in PyTorch. The products and the
// attention are the kernels of linear_cpu.cpp and decode_cpu.cpp; between them a few thousand numbers are worked on.
#include <cstdint>

#include "kernels.h"

#define MINIMAL_KERNEL "block_kernel.h"
#include "every_isa.h"

namespace minimal {

namespace {
View rows_of(float* data, int64_t rows, int64_t width) {
  return {data, Type::f32, {1, 1, rows, width}, {rows * width, rows * width, width, 1}};
}
}  // namespace

void llama_block(const Block& a, Parallel parallel) {
  const int64_t B = a.rows, T = a.tokens, N = B * T, C = a.C, D = a.D, H = a.heads, Hkv = a.kv_heads, F = a.down.C;
  const int64_t wide = (H + 2 * Hkv) * D, units = 16;
  auto room = [&](int64_t n) { return (n + units - 1) / units * units; };
  ScratchBlock block(room(N * C) + room(N * wide) + room(N * H * D) + room(B * H) + room(2 * N * F) + room(N * F) + room(N * C));
  Scratch scratch = block.start();
  float *n = scratch.take(room(N * C)), *qkv = scratch.take(room(N * wide)), *seen = scratch.take(room(N * H * D));
  float *lse = scratch.take(room(B * H)), *gu = scratch.take(room(2 * N * F)), *h = scratch.take(room(N * F));
  float* branch = scratch.take(room(N * C));
  const auto norm = MINIMAL_BEST(block_norm);
  const auto turn = MINIMAL_BEST(block_turn);
  const auto gate = MINIMAL_BEST(block_gate);

  for (int64_t i = 0; i < N; i++) norm(a.x + i * C, a.norm1, C, a.eps, n + i * C);
  linear_forward(rows_of(n, N, C), a.qkv, View{}, a.dynamic, rows_of(qkv, N, wide), parallel);
  const int64_t head = a.context * D, row = 2 * Hkv * head;  // of the cache (B, 2 Hkv, context, D)
  for (int64_t i = 0; i < N; i++) {
    const int64_t b = i / T, t = i % T;
    float* at = qkv + i * wide;
    turn(at, H + Hkv, D, a.cos + t * D, a.sin + t * D);
    for (int64_t k = 0; k < 2 * Hkv; k++)
      __builtin_memcpy(a.cache + b * row + k * head + (a.start + t) * D, at + (H + k) * D, sizeof(float) * size_t(D));
  }
  Scores scores;
  scores.scale = 1.0f / __builtin_sqrtf((float)D);
  for (int64_t t = 0; t < T; t++) {  // one place at a time: a tile of so few queries would be all but empty
    const int64_t end = a.start + t + 1;
    const View q{qkv + t * wide, Type::f32, {B, H, 1, D}, {T * wide, D, D, 1}};
    const View k{a.cache, Type::f32, {B, Hkv, end, D}, {row, head, D, 1}};
    const View v{a.cache + Hkv * head, Type::f32, {B, Hkv, end, D}, {row, head, D, 1}};
    const View out{seen + t * H * D, Type::f32, {B, H, 1, D}, {T * H * D, D, D, 1}};
    attention_forward(q, k, v, scores, out, View{lse, Type::f32, {B, H, 1, 1}, {H, 1, 1, 1}}, parallel);
  }
  linear_forward(rows_of(seen, N, H * D), a.o, View{}, a.dynamic, rows_of(branch, N, C), parallel);
  for (int64_t i = 0; i < N * C; i++) a.out[i] = a.x[i] + branch[i];

  for (int64_t i = 0; i < N; i++) norm(a.out + i * C, a.norm2, C, a.eps, n + i * C);
  linear_forward(rows_of(n, N, C), a.gate_up, View{}, a.dynamic, rows_of(gu, N, 2 * F), parallel);
  for (int64_t i = 0; i < N; i++) gate(gu + 2 * i * F, gu + (2 * i + 1) * F, F, h + i * F);
  linear_forward(rows_of(h, N, F), a.down, View{}, a.dynamic, rows_of(branch, N, C), parallel);
  for (int64_t i = 0; i < N * C; i++) a.out[i] += branch[i];
}

}  // namespace minimal
