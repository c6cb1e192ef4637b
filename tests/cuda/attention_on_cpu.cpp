// SPDX-License-Identifier: MIT
#include "attention_backward.cuh"
#include "entries.h"

using namespace minimal::cuda;

namespace {
// n: dtype, B, H, Hkv, Tq, Tk, D, causal, window, boundaries of documents, and strides of batch, head and token of each
// tensor   f: scale   p: q, k, v, out, lse, documents; for backward also dout, dq, dk, dv, scratch
AttentionArgs arguments(const int64_t* n, const double* f, void* const* p, bool backward) {
  AttentionArgs a;
  a.dtype = static_cast<Dtype>(n[0]);
  a.B = n[1], a.H = n[2], a.Hkv = n[3], a.Tq = n[4], a.Tk = n[5], a.D = n[6];
  a.causal = n[7], a.window = n[8], a.n_documents = n[9] - 1;
  a.scale = float(f[0]);
  const int64_t* strides = n + 10;
  const auto strided = [&](void* data) {
    strides += 3;
    return Strided{data, strides[-3], strides[-2], strides[-1]};
  };
  a.q = strided(p[0]), a.k = strided(p[1]), a.v = strided(p[2]), a.out = strided(p[3]);
  a.lse = static_cast<float*>(p[4]);
  a.documents = static_cast<const int32_t*>(p[5]);
  if (backward) {
    a.dout = strided(p[6]), a.dq = strided(p[7]), a.dk = strided(p[8]), a.dv = strided(p[9]);
    a.scratch = static_cast<float*>(p[10]);
  }
  if (const char* reason = attention_unfit(a, backward)) throw std::runtime_error(reason);
  return a;
}
}  // namespace

ENTRY(attention) {
  return cuda_on_cpu::error_of([&] { attention_forward(arguments(n, f, p, false), launch); });
}
ENTRY(attention_backward) {
  return cuda_on_cpu::error_of([&] { attention_backward(arguments(n, f, p, true), launch); });
}
