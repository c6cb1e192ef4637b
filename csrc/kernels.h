// SPDX-License-Identifier: MIT
// What ops.cpp asks of the kernels. Nothing of torch is seen here: a kernel gets pointers, sizes and strides.
#pragma once
#include <cstdint>

namespace minimal {

enum class Type { f32, bf16, boolean, i32, i8, u8, f16 };  // the kernels' read() and write() know the first three

// A tensor of four dimensions. Strides count elements; 0 repeats (a broadcast mask). data == nullptr: absent.
struct View {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
};

// Calls body(context, begin, end) for disjoint ranges that cover [0, n), on the caller's thread pool.
using Parallel = void (*)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// y = softmax(scale * x + mask) over the last dimension; causal over the last two, aligned bottom-right.
void softmax_forward(View x, View mask, float scale, bool causal, View y, Parallel parallel);
// dx = scale * y * (dy - sum(dy * y))
void softmax_backward(View dy, View y, float scale, View dx, Parallel parallel);

// What becomes of q and k, and of the scores q k before their softmax. A query sees one interval of keys, whose ends
// never fall as the queries go on: causal (aligned bottom-right), window and documents only move these ends.
struct Scores {
  float scale;
  View mask;                            // (B,H,Tq,Tk), boolean or additive
  bool causal = false;
  int64_t window = 0;                   // > 0: only keys nearer than this to the query's own place
  const int32_t* documents = nullptr;   // cu_seqlens: boundaries in the tokens of all rows laid end to end, rising
  int64_t boundaries = 0;               // how many
  View slopes;                          // (B,H,1,1), ALiBi: minus slope times the distance is added
  float softcap = 0;                    // > 0: softcap * tanh(score / softcap), before slopes and mask
  View cos, sin;                        // (B,1,Tk,D/2), rotary positions: the pairs (d, d + D/2) of q and k are turned
};

// q (B,H,Tq,D) k (B,Hkv,Tk,D) v (B,Hkv,Tk,Dv) -> out (B,H,Tq,Dv), lse (B,H,Tq,1) float32
void attention_forward(View q, View k, View v, const Scores& scores, View out, View lse, Parallel parallel);
// dq, dk, dv are written whole: the caller need not clear them.
void attention_backward(View dout, View q, View k, View v, View out, View lse, const Scores& scores, View dq, View dk,
                        View dv, Parallel parallel);

// The same for a single query over long k and v, where all of the time is reading them (decode_cpu.cpp).
bool decode_takes(const View& q, const View& k, const View& v, const Scores& scores);
void decode_forward(View q, View k, View v, const Scores& scores, View out, View lse, Parallel parallel);

// The weight W (O, C) of a linear layer, in few bits; all of it without gaps. Code j of a group stands for column j.
enum class Kind { f32, bf16, int8, int4, nf4 };
struct Weight {
  Kind kind;
  int64_t O, C;
  const void* codes;        // f32, bf16: W itself; int8: (O, C); int4: (O, C/32, 16), columns j and j + 16 of a group of 32 in
                            // a byte, the first in the low half; nf4: W flattened, two to a byte, the first in the high half
  const void* end;          // of the codes
  const float* scale;       // int8: (O,), W = scale code; nf4: one for 256 blocks, see absmax
  const uint16_t *scale16, *least16;  // int4: (O, C/32) float16, W = scale code + least
  const int8_t* absmax;     // nf4: one for each block of 64, of which C is a multiple: W = a L[code] with
  const float *mean, *levels;  // a = max(0, absmax scale + mean) and L the 16 levels
  int64_t first = 0;        // nf4: the block that W begins with
};
// out (N, O) = x (N, C) W^T + bias (O,). dynamic: x is rounded to 8 bits, in groups of 32 columns (int8 and int4 only).
// Meant for few rows, where all of the time is reading W; dynamic for as many as one likes, if many_rows_in_integers(kind).
void linear_forward(View x, const Weight& weight, View bias, bool dynamic, View out, Parallel parallel);
bool many_rows_in_integers(Kind kind);
// out = W in floats; not of f32 and bf16.
void unpack(const Weight& weight, View out, Parallel parallel);

// A few new tokens of each row through a block of a Llama (block_cpu.cpp), all float32 but the weights.
struct Block {
  int64_t rows, tokens, C, D, heads, kv_heads, context, start;
  float eps;
  bool dynamic;
  const float *x, *norm1, *norm2;    // (rows, tokens, C), (C,), (C,)
  Weight qkv, o, gate_up, down;
  const float *cos, *sin;            // (tokens, D), of the places from `start` on; the first half of sin is negative
  float* cache;                      // (rows, 2 kv_heads, context, D): k, then v, written from `start` on
  float* out;                        // (rows, tokens, C)
};
void llama_block(const Block& a, Parallel parallel);

// Over n numbers without gaps (pointwise_cpu.cpp): y = gelu(x) in its tanh form, dx = grad gelu'(x); y = silu(g) u; the
// gradients to g and u.
void gelu(int64_t n, const float* x, float* y, Parallel parallel);
void gelu_backward(int64_t n, const float* grad, const float* x, float* dx, Parallel parallel);
void swiglu(int64_t n, const float* g, const float* u, float* y, Parallel parallel);
void swiglu_backward(int64_t n, const float* grad, const float* g, const float* u, float* dg, float* du, Parallel parallel);

// The instruction sets compiled in that this processor can run, best first, comma-separated ("avx512,avx2,generic");
// and the choice of one by name ("" for the best; MINIMAL_ISA in the environment sets the first choice). False: unknown name.
const char* instruction_sets();
const char* instruction_set();
bool choose_instruction_set(const char* name);

}  // namespace minimal
