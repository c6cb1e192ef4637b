// SPDX-License-Identifier: MIT
// GELU and SwiGLU with their gradients: one pass over memory each, where PyTorch takes several or computes a tanh.
#include <cstdint>

#include "kernels.h"

namespace minimal {
struct Pointwise {
  int64_t n;
  const float* in[3];
  float* out[2];
};
constexpr int64_t PIECE = 4096;  // numbers; a multiple of every vector
}  // namespace minimal

#define MINIMAL_KERNEL "pointwise_kernel.h"
#include "every_isa.h"

namespace minimal {

namespace {
void run(Pointwise a, void (*body)(void*, int64_t, int64_t), Parallel parallel) {
  const int64_t n = (a.n + PIECE - 1) / PIECE;
  if (n < 4) body(&a, 0, n); else parallel(n, body, &a);
}
}  // namespace

void gelu(int64_t n, const float* x, float* y, Parallel parallel) {
  run({n, {x}, {y}}, MINIMAL_BEST(gelu_pieces), parallel);
}
void gelu_backward(int64_t n, const float* grad, const float* x, float* dx, Parallel parallel) {
  run({n, {grad, x}, {dx}}, MINIMAL_BEST(gelu_backward_pieces), parallel);
}
void swiglu(int64_t n, const float* g, const float* u, float* y, Parallel parallel) {
  run({n, {g, u}, {y}}, MINIMAL_BEST(swiglu_pieces), parallel);
}
void swiglu_backward(int64_t n, const float* grad, const float* g, const float* u, float* dg, float* du, Parallel parallel) {
  run({n, {grad, g, u}, {dg, du}}, MINIMAL_BEST(swiglu_backward_pieces), parallel);
}

}  // namespace minimal
