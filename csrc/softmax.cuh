// SPDX-License-Identifier: MIT
// Softmax over rows on the GPU, forward and backward. A warp takes a short row, a block a long one. Forward runs over a
// row twice: once for the running maximum m and sum l of exponentials (Milakov & Gimelshein 2018, arXiv 1805.02867),
//
//     m' = max(m, max_c s_c)      l' = l exp(m - m') + sum_c exp(s_c - m')      s_c = scale x_c + mask_c
//
// and once to write exp(s_c - m) / l; most rows are then still in cache. Backward also runs over it twice:
// D = sum_c dy_c y_c, then dx_c = scale y_c (dy_c - D).
#pragma once
#include "device.cuh"

namespace minimal::cuda {

// A tensor of four dimensions (B, H, rows, columns). Strides count elements; 0 repeats (a broadcast mask).
template <class T>
struct View4 {
  T* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};
struct Shape4 {
  int64_t B, H, rows, columns;
};
enum class MaskType { none, boolean, float32, same };  // same: the dtype of x
struct Mask {
  View4<const void> view;
  MaskType type = MaskType::none;
};

template <class T>
__host__ __device__ __forceinline__ int64_t row_start(const View4<T>& v, const Shape4& shape, int64_t row) {
  const int64_t head = row / shape.rows;
  return head / shape.H * v.stride[0] + head % shape.H * v.stride[1] + row % shape.rows * v.stride[2];
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// Elements c, c + 1, ... of a row whose n first count; `fill` past them. V > 1: one load of 16 bytes, if all V count.
template <class T, int V>
__device__ __forceinline__ void load(const T* row, int64_t stride, int64_t c, int64_t n, float fill, float (&x)[V]) {
  if (V > 1 && c + V <= n) {
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(row + c);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = to_float(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = c + i < n ? to_float(row[(c + i) * (V > 1 ? 1 : stride)]) : fill;
  }
}
template <class T, int V>
__device__ __forceinline__ void store(T* row, int64_t c, int64_t n, const float (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) from_float(x[i], pack.at[i]);
  if (V > 1 && c + V <= n) {
    *reinterpret_cast<Pack<T, V>*>(row + c) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < V; i++)
      if (c + i < n) row[c + i] = pack.at[i];
  }
}

// The scores s_c, -inf past the n that are seen. The roundings are asked for: a fused multiply-add would compute
// scale x - m with an error of its own, and far above zero for huge scores.
template <class T, int V>
__device__ __forceinline__ void scores(const T* x, int64_t stride, const Mask& mask, int64_t mask_row, float scale,
                                       int64_t c, int64_t n, float (&s)[V]) {
  load<T, V>(x, stride, c, n, 0, s);
#pragma unroll
  for (int i = 0; i < V; i++) s[i] = c + i < n ? __fmul_rn(s[i], scale) : -INF;
  if (mask.type == MaskType::none) return;
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (c + i >= n) break;
    const int64_t at = mask_row + (c + i) * mask.view.stride[3];
    if (mask.type == MaskType::boolean) s[i] = static_cast<const bool*>(mask.view.data)[at] ? s[i] : -INF;
    else if (mask.type == MaskType::float32) s[i] = __fadd_rn(s[i], static_cast<const float*>(mask.view.data)[at]);
    else s[i] = __fadd_rn(s[i], to_float(static_cast<const T*>(mask.view.data)[at]));
  }
}

constexpr int WARP_ROW = 1024;  // longest row that a warp takes
constexpr int THREADS = 256;    // of every block: 8 short rows, or one long one
constexpr int BLOCKS = 4;       // at least, on a processor: 64 registers a thread, if no loop over columns is unrolled

// The sum or the maximum over the threads of one row, in all of them. `part` has room for one number a warp.
template <bool MAXIMUM, int ROW_THREADS>
__device__ __forceinline__ float reduce(float x, float* part) {
  x = MAXIMUM ? warp_max(x) : warp_sum(x);
  if (ROW_THREADS == 32) return x;
  constexpr int WARPS = ROW_THREADS / 32;
  __syncthreads();  // the parts of the last call have been read
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();  // the parts of this one are there
  x = threadIdx.x % 32 < WARPS ? part[threadIdx.x % 32] : MAXIMUM ? -INF : 0;
  return MAXIMUM ? warp_max(x) : warp_sum(x);
}

// y is contiguous. V > 1: x has a column stride of 1 and every row of x and y starts at a multiple of 16 bytes.
template <class T, int V, int ROW_THREADS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    softmax_kernel(View4<const T> x, Mask mask, Shape4 shape, float scale, bool causal, T* y) {
  MINIMAL_SHARED(float, part, THREADS / 32);
  const int64_t total = shape.B * shape.H * shape.rows, columns = shape.columns;
  const int64_t at_once = THREADS / ROW_THREADS, step = int64_t(ROW_THREADS) * V;
  const int64_t first = int64_t(threadIdx.x % ROW_THREADS) * V;
  for (int64_t row = blockIdx.x * at_once + threadIdx.x / ROW_THREADS; row < total; row += gridDim.x * at_once) {
    const T* const x_row = x.data + row_start(x, shape, row);
    const int64_t mask_row = row_start(mask.view, shape, row);
    T* const y_row = y + row * columns;
    // causal, bottom-right: the last row sees every column
    int64_t n = columns;
    if (causal) n = max(int64_t(0), min(columns, row % shape.rows + 1 + columns - shape.rows));

    float m = -INF, l = 0;
#pragma unroll 1
    for (int64_t c = first; c < n; c += step) {
      float s[V], next = m;
      scores<T, V>(x_row, x.stride[3], mask, mask_row, scale, c, n, s);
#pragma unroll
      for (int i = 0; i < V; i++) next = fmaxf(next, s[i]);
      const float from = next == -INF ? 0 : next;  // nothing seen yet: -inf - -inf would be NaN
      l *= __expf(m - from);
#pragma unroll
      for (int i = 0; i < V; i++) l += __expf(s[i] - from);
      m = next;
    }
    float M = reduce<true, ROW_THREADS>(m, part);
    M = M == -INF ? 0 : M;
    const float L = reduce<false, ROW_THREADS>(l * __expf(m - M), part);
    const float inverse = L == 0 ? 0 : 1 / L;

#pragma unroll 1
    for (int64_t c = first; c < columns; c += step) {
      float s[V];
      scores<T, V>(x_row, x.stride[3], mask, mask_row, scale, c, n, s);
#pragma unroll
      for (int i = 0; i < V; i++) s[i] = c + i < n ? __expf(s[i] - M) * inverse : 0;
      store<T, V>(y_row, c, columns, s);
    }
  }
}

// dx is contiguous. V > 1: as above, of dy, y and dx.
template <class T, int V, int ROW_THREADS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    softmax_backward_kernel(View4<const T> dy, View4<const T> y, Shape4 shape, float scale, T* dx) {
  MINIMAL_SHARED(float, part, THREADS / 32);
  const int64_t total = shape.B * shape.H * shape.rows, columns = shape.columns;
  const int64_t at_once = THREADS / ROW_THREADS, step = int64_t(ROW_THREADS) * V;
  const int64_t first = int64_t(threadIdx.x % ROW_THREADS) * V;
  for (int64_t row = blockIdx.x * at_once + threadIdx.x / ROW_THREADS; row < total; row += gridDim.x * at_once) {
    const T* const dy_row = dy.data + row_start(dy, shape, row);
    const T* const y_row = y.data + row_start(y, shape, row);
    float a[V], b[V], D = 0;
#pragma unroll 1
    for (int64_t c = first; c < columns; c += step) {
      load<T, V>(dy_row, dy.stride[3], c, columns, 0, a);
      load<T, V>(y_row, y.stride[3], c, columns, 0, b);
#pragma unroll
      for (int i = 0; i < V; i++) D += a[i] * b[i];
    }
    D = reduce<false, ROW_THREADS>(D, part);
#pragma unroll 1
    for (int64_t c = first; c < columns; c += step) {
      load<T, V>(dy_row, dy.stride[3], c, columns, 0, a);
      load<T, V>(y_row, y.stride[3], c, columns, 0, b);
#pragma unroll
      for (int i = 0; i < V; i++) a[i] = scale * b[i] * (a[i] - D);
      store<T, V>(dx + row * columns, c, columns, a);
    }
  }
}

// ---- which kernel ---------------------------------------------------------------------------------------------------

// Whether 16 bytes may be read at once: everywhere, since every row starts alike.
template <class T>
bool in_packs(const View4<T>& v) {
  constexpr int64_t V = 16 / sizeof(T);
  const bool rows = v.stride[0] % V == 0 && v.stride[1] % V == 0 && v.stride[2] % V == 0;
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && rows && v.stride[3] == 1;
}
inline unsigned grid_of(const Shape4& shape) {
  const int64_t rows = shape.B * shape.H * shape.rows, rows_a_block = shape.columns <= WARP_ROW ? THREADS / 32 : 1;
  return unsigned(min((rows + rows_a_block - 1) / rows_a_block, int64_t(1) << 30));
}

// launch(kernel, blocks, threads, bytes of shared memory, arguments...) runs it. No dimension may be 0.
template <class T, class Launch>
void softmax_forward(const View4<const T>& x, const Mask& mask, const Shape4& shape, float scale, bool causal, T* y,
                     Launch launch) {
  constexpr int V = 16 / sizeof(T);
  const bool packs = in_packs(x) && in_packs(View4<T>{y, {0, 0, shape.columns, 1}}), warp = shape.columns <= WARP_ROW;
  const auto kernel = packs ? (warp ? softmax_kernel<T, V, 32> : softmax_kernel<T, V, THREADS>)
                            : (warp ? softmax_kernel<T, 1, 32> : softmax_kernel<T, 1, THREADS>);
  launch(kernel, grid_of(shape), THREADS, 0, x, mask, shape, scale, causal, y);
}

template <class T, class Launch>
void softmax_backward(const View4<const T>& dy, const View4<const T>& y, const Shape4& shape, float scale, T* dx,
                      Launch launch) {
  constexpr int V = 16 / sizeof(T);
  const bool packs = in_packs(dy) && in_packs(y) && in_packs(View4<T>{dx, {0, 0, shape.columns, 1}});
  const bool warp = shape.columns <= WARP_ROW;
  const auto kernel = packs ? (warp ? softmax_backward_kernel<T, V, 32> : softmax_backward_kernel<T, V, THREADS>)
                            : (warp ? softmax_backward_kernel<T, 1, 32> : softmax_backward_kernel<T, 1, THREADS>);
  launch(kernel, grid_of(shape), THREADS, 0, dy, y, shape, scale, dx);
}

}  // namespace minimal::cuda
