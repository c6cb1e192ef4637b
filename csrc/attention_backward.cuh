// SPDX-License-Identifier: MIT
// The backward pass of attention.cuh, by tiles as there. One kernel, used twice, multiplies two tiles of own rows, X1
// and X2, with two of the other side, Y1 and Y2:
//
//          own: queries, other: keys             own: keys, other: queries, those of all heads of the group in turn
//          X1 = Q, X2 = dO, Y1 = K, Y2 = V       X1 = K, X2 = V, Y1 = Q, Y2 = dO
//
//          S = Q K'                              S' = K Q'                               X1 Y1'      (' transposes)
//          P = exp(S - lse)                      P' = exp(S' - lse)
//                                                dV += P' dO                             P Y2
//          dP = dO V'                            dP' = V dO'                             X2 Y2'
//          dS = P (dP - Delta)                   dS' = P' (dP' - Delta)                  Delta = rowsum(dO * O)
//          dQ += dS K                            dK += dS' Q                             dS Y1
//
// (dQ and dK are scaled in the end.) These are seven products. Five would do if one kernel made all three gradients,
// but it would have to add to dQ from many blocks, in an order that changes: here the same input gives the same bits.
#pragma once
#include "attention.cuh"

namespace minimal::cuda {

template <class T, int D>
struct Backward : Tiles<T, D, sizeof(T) == 2 && D <= 64 ? 2 : 1, sizeof(T) == 4 && D == 128 ? 2 : 4,
                        sizeof(T) == 4 && D >= 96 ? 16 : 32> {
  using C = Backward;
  static constexpr int AHEAD = sizeof(T) == 2 && D == 64 ? 1 : D / 16;  // or there were not enough registers
  // X1, X2; twice: Y1, Y2, lse and Delta
  static constexpr int SHARED = 2 * C::OWN + 2 * (2 * C::OTHER + 8 * C::N);
  static_assert(SHARED + C::RANGES <= MOST_SHARED);
};

// For each query what P and dS are computed with: lse, but +inf where nothing is seen (then P = exp(-inf) = 0), and
// Delta = rowsum(dO * O). Eight lanes take a row.
constexpr int DELTA_THREADS = 256;
template <class T, int D>
__global__ void __launch_bounds__(DELTA_THREADS) delta_kernel(const __grid_constant__ AttentionArgs a) {
  const int64_t row = blockIdx.x * int64_t(DELTA_THREADS / 8) + threadIdx.x / 8, rows = a.B * a.H * a.Tq;
  float sum = 0;
  if (row < rows) {
    const int64_t token = row % a.Tq, head = row / a.Tq;
    const int b = int(head / a.H), h = int(head % a.H);
    const T* const out = head_of<T>(a.out, b, h) + token * a.out.token;
    const T* const dout = head_of<T>(a.dout, b, h) + token * a.dout.token;
    UNROLL for (int d = int(threadIdx.x) % 8 * 4; d < D; d += 32) {
      const float4 x = get4(out + d), y = get4(dout + d);
      sum += x.x * y.x + x.y * y.y + (x.z * y.z + x.w * y.w);
    }
  }
  sum = quad_sum(sum);
  sum += __shfl_xor_sync(FULL_WARP, sum, 4);
  if (row < rows && threadIdx.x % 8 == 0) {
    const float lse = a.lse[row];
    reinterpret_cast<float2*>(a.scratch)[row] = make_float2(lse == -INF ? INF : lse, sum);
  }
}

// dK and dV of a tile of keys (of_keys) or dQ of a tile of queries.
template <class T, int D, bool of_keys>
__global__ void __launch_bounds__(Backward<T, D>::THREADS, 1) backward_kernel(const __grid_constant__ AttentionArgs a) {
  using C = Backward<T, D>;
  MINIMAL_DYN_SHARED(char, memory);
  T* const X1 = reinterpret_cast<T*>(memory);
  T *const X2 = X1 + C::ROWS * C::LD, *const Y = X2 + C::ROWS * C::LD;  // Y1 and Y2 of an even tile, then of an odd one
  float2* const of_query = reinterpret_cast<float2*>(Y + 4 * C::N * C::LD);
  MINIMAL_SHARED(Range, range, C::ROWS);  // what each own row sees

  const Block<C, of_keys> block(a);
  const int lane = lane_of(), g = lane / 4, t = lane % 4, mine = int(threadIdx.x) / 32 * 16 * C::M;
  const int group = int(a.H / a.Hkv), tiles = block.last - block.first, total = of_keys ? tiles * group : tiles;
  const int T_other = int(of_keys ? a.Tq : a.Tk);
  block.find_ranges(a, range);

  const auto scratch = [&](int h) { return reinterpret_cast<const float2*>(a.scratch) + (block.b * a.H + h) * a.Tq; };
  const auto load_tile = [&](int n) {
    const int h = of_keys ? block.h * group + n / tiles : block.h / group;
    const int from = (block.first + n % tiles) * C::N;
    const Strided &y1 = of_keys ? a.q : a.k, &y2 = of_keys ? a.dout : a.v;
    T* const to = Y + n % 2 * 2 * C::N * C::LD;
    load_rows<C, C::N>(to, head_of<T>(y1, block.b, h), y1.token, from, T_other);
    load_rows<C, C::N>(to + C::N * C::LD, head_of<T>(y2, block.b, h), y2.token, from, T_other);
    if (of_keys && int(threadIdx.x) < C::N) {
      const int i = from + int(threadIdx.x);
      copy_async<8>(of_query + n % 2 * C::N + threadIdx.x, scratch(h) + (i < T_other ? i : 0), i < T_other);
    }
  };

  // lse and Delta of columns 8 c + 2 t and 8 c + 2 t + 1 of tile n, when they are queries
  const auto of_columns = [&](int n, int c) {
    const float2* const at = of_query + n % 2 * C::N + 8 * c + 2 * t;
    return of_keys ? get4(reinterpret_cast<const float*>(at)) : make_float4(0, 0, 0, 0);
  };

  const Strided &x1 = of_keys ? a.k : a.q, &x2 = of_keys ? a.v : a.dout;
  load_rows<C, C::ROWS>(X1, head_of<T>(x1, block.b, block.h), x1.token, block.from, block.end);
  load_rows<C, C::ROWS>(X2, head_of<T>(x2, block.b, block.h), x2.token, block.from, block.end);
  if (total > 0) load_tile(0);

  float2 of_row[C::M][2];  // lse and Delta, when the own rows are queries
  if constexpr (!of_keys)
    UNROLL for (int m = 0; m < C::M; m++)
      UNROLL for (int i = 0; i < 2; i++)
        of_row[m][i] = scratch(block.h)[min(block.from + mine + 16 * m + 8 * i + g, block.end - 1)];

  float d1[C::M][D / 8][4] = {}, d2[C::M][D / 8][4] = {};  // dK or dQ; dV
  for (int n = 0; n < total; n++) {
    wait_for_copies();
    __syncthreads();  // this tile is here, and nobody is at the one before any more
    if (n + 1 < total) load_tile(n + 1);
    const T *const Y1 = Y + n % 2 * 2 * C::N * C::LD, *const Y2 = Y1 + C::N * C::LD;
    const int tile = block.first + n % tiles;

    if (!warp_sees<C>(range + mine, tile)) continue;
    const bool edge = block.is_edge(tile);

    float p[C::M][C::N / 8][4], ds[C::M][C::N / 8][4];
    multiply_rows<C>(p, X1 + mine * C::LD, Y1);
    UNROLL for (int c = 0; c < C::N / 8; c++) {
      const float4 pair = of_columns(n, c);
      UNROLL for (int m = 0; m < C::M; m++)
        UNROLL for (int e = 0; e < 4; e++) {
          const float lse = !of_keys ? of_row[m][e / 2].x : e % 2 ? pair.z : pair.x;
          // P = exp(S - lse). S is rounded, which a fused multiply-add would not do, as lse was made of such: a query
          // with a single key then has P = 1.
          p[m][c][e] = exp2_of((__fmul_rn(p[m][c][e], a.scale) - lse) * LOG2_E);
        }
    }
    if (edge) hide<C>(p, range + mine, tile * C::N, 0);
    if constexpr (of_keys) multiply_add<C>(d2, p, Y2);  // dV += P' dO

    multiply_rows<C>(ds, X2 + mine * C::LD, Y2);  // dP
    UNROLL for (int c = 0; c < C::N / 8; c++) {
      const float4 pair = of_columns(n, c);
      UNROLL for (int m = 0; m < C::M; m++)
        UNROLL for (int e = 0; e < 4; e++) {
          const float Delta = !of_keys ? of_row[m][e / 2].y : e % 2 ? pair.w : pair.y;
          ds[m][c][e] = p[m][c][e] * (ds[m][c][e] - Delta);
        }
    }
    if (edge) hide<C>(ds, range + mine, tile * C::N, 0);  // P = 0 times an infinity would be NaN
    multiply_add<C>(d1, ds, Y1);                          // dK += dS' Q, dQ += dS K
  }
  wait_for_copies();
  __syncthreads();

  const int first = block.from + mine, rows = min(16 * C::M, block.end - first);
  UNROLL for (int m = 0; m < C::M; m++)
    UNROLL for (int d = 0; d < D / 8; d++)
      UNROLL for (int e = 0; e < 4; e++) d1[m][d][e] *= a.scale;
  const auto store = [&](const float (&c)[C::M][D / 8][4], T* own, const Strided& to) {
    store_rows<C>(c, own + mine * C::LD, head_of<T>(to, block.b, block.h) + first * to.token, to.token, rows);
  };
  store(d1, X1, of_keys ? a.dk : a.dq);
  if constexpr (of_keys) store(d2, X2, a.dv);
}

template <class Launch>
void attention_backward(const AttentionArgs& a, Launch launch) {
  with_types(a, [&](auto type, auto D) {
    using T = decltype(type);
    using C = Backward<T, D()>;
    if (const int64_t blocks = blocks_of(a.B * a.H * a.Tq, DELTA_THREADS / 8, 1))
      launch(delta_kernel<T, D()>, blocks, DELTA_THREADS, 0, a);
    if (const int64_t blocks = blocks_of(a.Tk, C::ROWS, a.B * a.Hkv))
      launch(backward_kernel<T, D(), true>, blocks, C::THREADS, C::SHARED, a);
    if (const int64_t blocks = blocks_of(a.Tq, C::ROWS, a.B * a.H))
      launch(backward_kernel<T, D(), false>, blocks, C::THREADS, C::SHARED, a);
  });
}

}  // namespace minimal::cuda
