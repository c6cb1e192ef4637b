// SPDX-License-Identifier: MIT
// A block of a Llama for one new token of each row: minimal/decoder.py has the same in PyTorch. The products and the
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
  const int64_t B = a.rows, C = a.C, D = a.D, H = a.heads, Hkv = a.kv_heads, F = a.down.C, end = a.start + 1;
  const int64_t wide = (H + 2 * Hkv) * D, units = 16;
  auto room = [&](int64_t n) { return (n + units - 1) / units * units; };
  ScratchBlock block(room(B * C) + room(B * wide) + room(B * H * D) + room(B * H) + room(2 * B * F) + room(B * F) + room(B * C));
  Scratch scratch = block.start();
  float *n = scratch.take(room(B * C)), *qkv = scratch.take(room(B * wide)), *seen = scratch.take(room(B * H * D));
  float *lse = scratch.take(room(B * H)), *gu = scratch.take(room(2 * B * F)), *h = scratch.take(room(B * F));
  float* branch = scratch.take(room(B * C));
  const auto norm = MINIMAL_BEST(block_norm);
  const auto turn = MINIMAL_BEST(block_turn);
  const auto gate = MINIMAL_BEST(block_gate);

  for (int64_t b = 0; b < B; b++) norm(a.x + b * C, a.norm1, C, a.eps, n + b * C);
  linear_forward(rows_of(n, B, C), a.qkv, View{}, a.dynamic, rows_of(qkv, B, wide), parallel);
  const int64_t head = a.context * D, row = 2 * Hkv * head;  // of the cache (B, 2 Hkv, context, D)
  for (int64_t b = 0; b < B; b++) {
    float* at = qkv + b * wide;
    turn(at, H + Hkv, D, a.cos, a.sin);
    for (int64_t k = 0; k < 2 * Hkv; k++)
      __builtin_memcpy(a.cache + b * row + k * head + a.start * D, at + (H + k) * D, sizeof(float) * size_t(D));
  }
  Scores scores;
  scores.scale = 1.0f / __builtin_sqrtf((float)D);
  const View q{qkv, Type::f32, {B, H, 1, D}, {wide, D, D, 1}};
  const View k{a.cache, Type::f32, {B, Hkv, end, D}, {row, head, D, 1}};
  const View v{a.cache + Hkv * head, Type::f32, {B, Hkv, end, D}, {row, head, D, 1}};
  const View out{seen, Type::f32, {B, H, 1, D}, {H * D, D, D, 1}}, sums{lse, Type::f32, {B, H, 1, 1}, {H, 1, 1, 1}};
  if (decode_takes(q, k, v, scores)) decode_forward(q, k, v, scores, out, sums, parallel);
  else attention_forward(q, k, v, scores, out, sums, parallel);
  linear_forward(rows_of(seen, B, H * D), a.o, View{}, a.dynamic, rows_of(branch, B, C), parallel);
  for (int64_t i = 0; i < B * C; i++) a.out[i] = a.x[i] + branch[i];

  for (int64_t b = 0; b < B; b++) norm(a.out + b * C, a.norm2, C, a.eps, n + b * C);
  linear_forward(rows_of(n, B, C), a.gate_up, View{}, a.dynamic, rows_of(gu, B, 2 * F), parallel);
  for (int64_t b = 0; b < B; b++) gate(gu + 2 * b * F, gu + (2 * b + 1) * F, F, h + b * F);
  linear_forward(rows_of(h, B, F), a.down, View{}, a.dynamic, rows_of(branch, B, C), parallel);
  for (int64_t i = 0; i < B * C; i++) a.out[i] += branch[i];
}

}  // namespace minimal
