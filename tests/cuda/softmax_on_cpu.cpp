// SPDX-License-Identifier: MIT
#include "entries.h"
#include "softmax.cuh"

using namespace minimal::cuda;

namespace {
Shape4 shape(const int64_t* n) { return {n[0], n[1], n[2], n[3]}; }
template <class T>
View4<T> view(void* data, const int64_t* n) {
  return {static_cast<T*>(data), {n[0], n[1], n[2], n[3]}};
}
}  // namespace

// n: dtype, causal, mask type, shape[4], strides of x[4] and of the mask[4]   f: scale   p: x, mask, y
ENTRY(softmax) {
  return with_dtype(n[0], [&](auto zero) {
    using T = decltype(zero);
    const Mask mask{view<const void>(p[1], n + 11), static_cast<MaskType>(n[2])};
    const auto x = view<const T>(p[0], n + 7);
    softmax_forward<T>(x, mask, shape(n + 3), float(f[0]), n[1], static_cast<T*>(p[2]), launch);
  });
}

// n: dtype, shape[4], strides of dy[4] and of y[4]   f: scale   p: dy, y, dx
ENTRY(softmax_backward) {
  return with_dtype(n[0], [&](auto zero) {
    using T = decltype(zero);
    const auto dy = view<const T>(p[0], n + 5), y = view<const T>(p[1], n + 9);
    softmax_backward<T>(dy, y, shape(n + 1), float(f[0]), static_cast<T*>(p[2]), launch);
  });
}
