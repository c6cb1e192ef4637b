// SPDX-License-Identifier: MIT
// What ops.cpp asks of the kernels. Nothing of torch is seen here: a kernel gets pointers, sizes and strides.
#pragma once
#include <cstdint>

namespace minimal {

enum class Type { f32, bf16, boolean };

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

// q (B,H,Tq,D) k (B,Hkv,Tk,D) v (B,Hkv,Tk,Dv) mask (B,H,Tq,Tk) -> out (B,H,Tq,Dv), lse (B,H,Tq,1) float32
void attention_forward(View q, View k, View v, View mask, float scale, bool causal, View out, View lse, Parallel parallel);
// dq, dk, dv are written whole: the caller need not clear them.
void attention_backward(View dout, View q, View k, View v, View out, View lse, View mask, float scale, bool causal,
                        View dq, View dk, View dv, Parallel parallel);

// The instruction sets compiled in that this processor can run, best first, comma-separated ("avx512,avx2,generic");
// and the choice of one by name ("" for the best; MINIMAL_ISA in the environment sets the first choice). False: unknown name.
const char* instruction_sets();
const char* instruction_set();
bool choose_instruction_set(const char* name);

}  // namespace minimal
