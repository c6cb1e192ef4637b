// SPDX-License-Identifier: MIT
// Attention for CUDA (compute capability 8.0 and above), forward and backward, without a Tq x Tk matrix in memory.
//
// A block of threads owns a tile of rows of one head. It passes over the tiles of the other side, which are copied into
// shared memory while the one before is worked on, and keeps what it sums in registers. A warp owns 16 M of the rows,
// and sees every row of the other side:
//
//                   other rows ->                        forward      own: queries, X = Q      other: keys, Y = K
//                 +-------+-------+-------+--
//                 |       |   Y   |       |  D               S = X Y'   (scaled; ' transposes)
//            D    +-------+-------+-------+--                m_new = max(m, rowmax(S))
//   own  +------+ +-------+-------+-------+--                P = exp(S - m_new)
//   rows |warp 0| | skip  |   S   |   S   |                  l = l exp(m - m_new) + rowsum(P)
//    |   +------+ |       | then  | then  |                  O = O exp(m - m_new) + P V
//    v   |warp 1| |       |   P   |   P   |                  in the end: O / l, lse = m + log l
//        +------+ |       | edge  | clear |
//        | ...  | +-------+-------+-------+--            backward     in attention_backward.cuh, by the same tiles
//        +------+
//            X
//
// S leaves the tensor cores in just the layout in which they want P for the next product, so P stays in registers. With
// g = lane / 4 and t = lane % 4, a lane holds of each 16 x 8 piece of a product the elements
//
//                         columns 2 t, 2 t + 1        as the left operand of the next product, two such pieces
//               row g        c[0]  c[1]               side by side are 16 x 16: registers (c[0], c[1]), (c[2], c[3])
//               row g + 8    c[2]  c[3]               of the first, then of the second, as pairs of 16-bit numbers
//
// A query sees one interval of keys, whatever causal, window and documents ask for, and a key is seen by one interval
// of queries; their ends never fall from one row to the next. So the first and the last row of a block say which tiles
// it skips, and which are clear: seen by all its rows, with nothing to mask. The others have an edge.
//
// Dao 2023 (FlashAttention-2, arXiv 2307.08691), Algorithms 1 and 2; the running maximum and sum: Milakov & Gimelshein
// 2018 (arXiv 1805.02867). float16 and bfloat16 are multiplied by the tensor cores (mma.sync, summed in float32), and
// float32 by ordinary multiply-adds from the same tiles in the same layout. Nothing of torch is seen here.
//
// Letters: B batch, H query heads, Hkv key and value heads (query head h uses h / (H / Hkv)), Tq queries, Tk keys,
// D head size, of keys and of values: 32, 64, 96 or 128.
#pragma once
#include <type_traits>

#include "device.cuh"
#ifdef MINIMAL_CUDA_ON_CPU
#define __grid_constant__
#define UNROLL
#define UNROLL_BY(n)
#else  // arrays live in registers only where every index is known, so every loop over one is unrolled
#define MINIMAL_PRAGMA(text) _Pragma(#text)
#define UNROLL MINIMAL_PRAGMA(unroll)
#define UNROLL_BY(n) MINIMAL_PRAGMA(unroll n)
#endif

namespace minimal::cuda {

// ---- the interface --------------------------------------------------------------------------------------------------

enum class Dtype { f32, f16, bf16 };

// A tensor (batch, head, token, D). Strides count elements; the last dimension is contiguous.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

struct AttentionArgs {
  Dtype dtype = Dtype::f32;  // of every tensor that is Strided
  int64_t B = 0, H = 0, Hkv = 0, Tq = 0, Tk = 0, D = 0;
  Strided q, k, v, out;
  float* lse = nullptr;  // (B, H, Tq), contiguous, natural logarithm: written by forward, read by backward
  float scale = 1;
  bool causal = false;
  int64_t window = 0;                  // 0: none; else only keys with |i + Tk - Tq - j| < window
  const int32_t* documents = nullptr;  // cu_seqlens (n_documents + 1,), on the device, or none; needs Tq == Tk
  int64_t n_documents = 0;
  // backward only
  Strided dout, dq, dk, dv;
  float* scratch = nullptr;  // room for (B, H, Tq, 2)
};

// Why the kernels cannot take these arguments, in one line; nullptr when they can. Looks at no memory of the device:
// documents that do not rise from 0 to B T give wrong results, but read and write nothing outside the tensors.
inline const char* attention_unfit(const AttentionArgs& a, bool backward);

// launch(kernel, blocks, threads, bytes, a) runs kernel(a), which takes nothing else than the AttentionArgs, on 1 to
// 2^31 - 1 blocks (an int64_t) with `bytes` of dynamic shared memory. More than 48 KB must be asked for first, by
// cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes).
template <class Launch>
void attention_forward(const AttentionArgs& a, Launch launch);  // writes out and lse
template <class Launch>
void attention_backward(const AttentionArgs& a, Launch launch);  // in attention_backward.cuh: all of dq, dk and dv

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class T_, int D_, int M_, int WARPS_, int N_>
struct Tiles {
  using T = T_;
  static constexpr int D = D_, M = M_, N = N_;  // a warp owns 16 M rows; a tile of the other side has N
  static constexpr int WARPS = WARPS_, THREADS = 32 * WARPS, ROWS = 16 * M * WARPS;
  // Elements from one row to the next in shared memory: 16 bytes more than needed, or the eight rows that are read
  // together would lie in the same banks.
  static constexpr int LD = D + 16 / int(sizeof(T));
  static constexpr int OWN = ROWS * LD * int(sizeof(T)), OTHER = N * LD * int(sizeof(T)), RANGES = 8 * ROWS;  // bytes
  static constexpr int AHEAD = D / 16;  // steps of a product along D that are unrolled, to load ahead
};
constexpr int MOST_SHARED = 99 * 1024;  // bytes a block may have on 8.6 and 8.9, the least of the devices served

// The sizes: as large as the registers allow, since shared memory is read less often then. Two blocks of 128 threads
// share a processor, as a thread has at most 255 registers (144 to 250 of them with nvcc 13.0, for 8.0 and for 9.0).
template <class T, int D>
struct Forward : Tiles<T, D, sizeof(T) == 2 || D <= 64 ? 2 : 1, 4, sizeof(T) == 4 || D >= 96 ? 32 : 64> {
  using C = Forward;
  static constexpr int SHARED = C::OWN + 2 * C::OTHER;  // Q; K and V
  static_assert(SHARED + C::RANGES <= MOST_SHARED);
};

// ---- instructions ---------------------------------------------------------------------------------------------------

#ifndef MINIMAL_CUDA_ON_CPU
__device__ __forceinline__ uint32_t in_shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ uint64_t in_global(const void* p) { return uint64_t(__cvta_generic_to_global(p)); }
#endif

// Starts to copy 8 or 16 bytes from global to shared memory. Unless `there`, nothing is read, and zeros arrive.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#ifdef MINIMAL_CUDA_ON_CPU
  cuda_on_cpu::cp_async(to, from, BYTES, there ? BYTES : 0);
#else
  if constexpr (BYTES == 16)  // .cg: past the first-level cache, since nobody else on this processor wants it
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(in_shared(to)), "l"(in_global(from)), "r"(there ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 ::"r"(in_shared(to)), "l"(in_global(from)), "r"(there ? 8 : 0) : "memory");
#endif
}

// Waits for the copies that this thread started; a barrier must follow before others read them.
__device__ __forceinline__ void wait_for_copies() {
#ifdef MINIMAL_CUDA_ON_CPU
  cuda_on_cpu::cp_async_commit();
  cuda_on_cpu::cp_async_wait(0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements: lane 8 m + i points to row i of matrix m. A lane gets two neighbours of row
// lane / 4 of each, or of column lane / 4 if transposed.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#ifdef MINIMAL_CUDA_ON_CPU
  cuda_on_cpu::ldmatrix<4, transposed>(r, row);
#else
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(in_shared(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(in_shared(row)) : "memory");
#endif
}

// c (16 x 8) += a (16 x 16) b (16 x 8). Lane 4 g + t holds rows g and g + 8, and columns 2 t and 2 t + 1, of c:
// c[2 i + j] is row g + 8 i, column 2 t + j.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MINIMAL_CUDA_ON_CPU
  const uint32_t b[2] = {b0, b1};
  cuda_on_cpu::mma_m16n8k16<T>(c, a, b);
#else
#define MINIMAL_MMA(type)                                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                      \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) MINIMAL_MMA("f16");
  else MINIMAL_MMA("bf16");
#undef MINIMAL_MMA
#endif
}

// 2^x, with 2^-inf = 0, to a relative error of about 2^-22.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef MINIMAL_CUDA_ON_CPU
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ int lane_of() { return int(threadIdx.x) % 32; }

__device__ __forceinline__ float quad_max(float x) {  // over the four lanes that hold a row
  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(FULL_WARP, x, 1);
  return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// ---- elements -------------------------------------------------------------------------------------------------------

template <class To, class From>
__device__ __forceinline__ To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y);  // x in the lower half
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  return bits_of<uint32_t>(__floats2half2_rn(x, y));
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  return bits_of<uint32_t>(__floats2bfloat162_rn(x, y));
}
template <class T>
__device__ __forceinline__ void put2(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
}
__device__ __forceinline__ void put2(float* to, float x, float y) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bits_of<uint32_t>(x), bits_of<uint32_t>(y));
}
__device__ __forceinline__ float4 get4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 get4(const __half* p) {
  const uint2 u = *reinterpret_cast<const uint2*>(p);
  const float2 x = __half22float2(bits_of<__half2>(u.x)), y = __half22float2(bits_of<__half2>(u.y));
  return make_float4(x.x, x.y, y.x, y.y);
}
__device__ __forceinline__ float4 get4(const __nv_bfloat16* p) {
  const uint2 u = *reinterpret_cast<const uint2*>(p);
  const float2 x = __bfloat1622float2(bits_of<__nv_bfloat162>(u.x));
  const float2 y = __bfloat1622float2(bits_of<__nv_bfloat162>(u.y));
  return make_float4(x.x, x.y, y.x, y.y);
}

template <class T>
__device__ __forceinline__ T* head_of(const Strided& x, int b, int h) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head;
}

// ---- tiles, moved and multiplied ------------------------------------------------------------------------------------

// Starts to copy rows [from, from + ROWS) of x into shared memory; zeros stand for those from `end` on, since whatever
// lay there, a NaN perhaps, would be multiplied by a P of 0.
template <class C, int ROWS, class T = typename C::T>
__device__ __forceinline__ void load_rows(T* to, const T* x, int64_t stride, int from, int end) {
  constexpr int E = 16 / sizeof(T), PIECES = C::D / E;  // of 16 bytes, in a row
  constexpr int STEP = C::THREADS / PIECES;             // rows that the block copies at once
  const int first = int(threadIdx.x) / PIECES, d = int(threadIdx.x) % PIECES * E;
  if (first >= STEP) return;
  x += from * stride + d;
  UNROLL for (int i = 0; i < ROWS; i += STEP) {
    const int row = first + i;
    const bool there = from + row < end;
    if (row < ROWS) copy_async<16>(to + row * C::LD + d, x + row * stride, there);
  }
}

// Writes the first `rows` rows of a warp's sums c, by way of its own rows in shared memory, which nobody else reads:
// memory wants 16 bytes from a lane, and whole rows from its neighbours.
template <class C, class T = typename C::T>
__device__ __forceinline__ void store_rows(const float (&c)[C::M][C::D / 8][4], T* own, T* to, int64_t stride,
                                           int rows) {
  constexpr int E = 16 / sizeof(T), PIECES = C::D / E;
  const int lane = lane_of(), g = lane / 4, t = lane % 4;
  UNROLL for (int m = 0; m < C::M; m++)
    UNROLL for (int n = 0; n < C::D / 8; n++)
      UNROLL for (int i = 0; i < 2; i++)
        put2(own + (16 * m + 8 * i + g) * C::LD + 8 * n + 2 * t, c[m][n][2 * i], c[m][n][2 * i + 1]);
  __syncwarp();
  for (int p = lane; p < rows * PIECES; p += 32) {
    const int row = p / PIECES, d = p % PIECES * E;
    *reinterpret_cast<uint4*>(to + row * stride + d) = *reinterpret_cast<const uint4*>(own + row * C::LD + d);
  }
}

// c (16 M x N) = X (16 M x D) Y' (D x N), both X and Y row by row in shared memory.
template <class C, class T = typename C::T>
__device__ __forceinline__ void multiply_rows(float (&c)[C::M][C::N / 8][4], const T* X, const T* Y) {
  const int lane = lane_of(), g = lane / 4, t = lane % 4;
  UNROLL for (int m = 0; m < C::M; m++)
    UNROLL for (int n = 0; n < C::N / 8; n++)
      UNROLL for (int e = 0; e < 4; e++) c[m][n][e] = 0;
  if constexpr (sizeof(T) == 2) {
    // A row of Y is a column of Y', two neighbours of which a lane wants: so neither is transposed on the way.
    X += lane % 16 * C::LD + lane / 16 * 8;
    Y += (lane / 16 * 8 + lane % 8) * C::LD + lane / 8 % 2 * 8;
    UNROLL_BY(C::AHEAD) for (int d = 0; d < C::D; d += 16) {
      uint32_t x[C::M][4], y[4];
      UNROLL for (int m = 0; m < C::M; m++) load_matrices<false>(x[m], X + 16 * m * C::LD + d);
      UNROLL for (int n = 0; n < C::N / 8; n += 2) {
        load_matrices<false>(y, Y + 8 * n * C::LD + d);
        UNROLL for (int m = 0; m < C::M; m++) {
          multiply<T>(c[m][n], x[m], y[0], y[1]);
          multiply<T>(c[m][n + 1], x[m], y[2], y[3]);
        }
      }
    }
  } else {
    X += g * C::LD;
    Y += 2 * t * C::LD;
    UNROLL_BY(2) for (int d = 0; d < C::D; d += 4) {
      float4 x[C::M][2];
      UNROLL for (int m = 0; m < C::M; m++)
        UNROLL for (int i = 0; i < 2; i++) x[m][i] = get4(X + (16 * m + 8 * i) * C::LD + d);
      UNROLL for (int n = 0; n < C::N / 8; n++)
        UNROLL for (int j = 0; j < 2; j++) {
          const float4 y = get4(Y + (8 * n + j) * C::LD + d);
          UNROLL for (int m = 0; m < C::M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
              float& sum = c[m][n][2 * i + j];
              sum = fmaf(x[m][i].x, y.x, sum);
              sum = fmaf(x[m][i].y, y.y, sum);
              sum = fmaf(x[m][i].z, y.z, sum);
              sum = fmaf(x[m][i].w, y.w, sum);
            }
        }
    }
  }
}

// c (16 M x D) += P (16 M x N) Y (N x D), P in the registers as multiply_rows leaves its product.
template <class C, class T = typename C::T>
__device__ __forceinline__ void multiply_add(float (&c)[C::M][C::D / 8][4], const float (&P)[C::M][C::N / 8][4],
                                             const T* Y) {
  const int lane = lane_of(), t = lane % 4;
  if constexpr (sizeof(T) == 2) {
    Y += lane % 16 * C::LD + lane / 16 * 8;
    UNROLL for (int k = 0; k < C::N / 8; k += 2) {
      uint32_t p[C::M][4], y[4];
      UNROLL for (int m = 0; m < C::M; m++)  // the left operand: rows g and g + 8 of columns 2 t .., then of 2 t + 8 ..
        UNROLL for (int i = 0; i < 4; i++)
          p[m][i] = pack<T>(P[m][k + i / 2][i % 2 * 2], P[m][k + i / 2][i % 2 * 2 + 1]);
      UNROLL for (int n = 0; n < C::D / 8; n += 2) {
        load_matrices<true>(y, Y + 8 * k * C::LD + 8 * n);
        UNROLL for (int m = 0; m < C::M; m++) {
          multiply<T>(c[m][n], p[m], y[0], y[1]);
          multiply<T>(c[m][n + 1], p[m], y[2], y[3]);
        }
      }
    }
  } else {
    Y += 2 * t;
    UNROLL for (int k = 0; k < C::N / 8; k++)
      UNROLL for (int j = 0; j < 8; j++) {
        float p[C::M][2];
        UNROLL for (int m = 0; m < C::M; m++)
          UNROLL for (int i = 0; i < 2; i++)  // column j is held by lane j / 2 of the four
            p[m][i] = __shfl_sync(FULL_WARP, P[m][k][2 * i + j % 2], lane - t + j / 2);
        UNROLL for (int n = 0; n < C::D / 8; n++) {
          const float2 y = *reinterpret_cast<const float2*>(Y + (8 * k + j) * C::LD + 8 * n);
          UNROLL for (int m = 0; m < C::M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
              c[m][n][2 * i] = fmaf(p[m][i], y.x, c[m][n][2 * i]);
              c[m][n][2 * i + 1] = fmaf(p[m][i], y.y, c[m][n][2 * i + 1]);
            }
        }
      }
  }
}

// ---- who sees whom --------------------------------------------------------------------------------------------------

struct alignas(8) Range {
  int lo, hi;
  __device__ bool has(int j) const { return lo <= j && j < hi; }
};

// The keys that query i of batch row b sees or, of_key, the queries that see key i.
template <bool of_key>
__device__ inline Range seen(const AttentionArgs& a, int b, int i) {
  const int ahead = int(a.Tk - a.Tq), T = int(of_key ? a.Tq : a.Tk);  // bottom-right: the last query is at the last key
  const int at = of_key ? i - ahead : i + ahead;
  int lo = 0, hi = T;
  if (a.causal && of_key) lo = max(lo, at);
  if (a.causal && !of_key) hi = min(hi, at + 1);
  if (a.window > 0) {
    const int w = int(min(a.window, int64_t(1) << 30));
    lo = max(lo, at - w + 1);
    hi = min(hi, at + w);
  }
  if (a.documents) {
    const int64_t start = b * a.Tq;
    int64_t d = 0, e = a.n_documents;  // the token's document is one of [d, e)
    while (e - d > 1) {
      const int64_t middle = (d + e) / 2;
      if (a.documents[middle] <= start + i) d = middle;
      else e = middle;
    }
    lo = int(max(int64_t(lo), a.documents[d] - start));
    hi = int(min(int64_t(hi), a.documents[d + 1] - start));
  }
  return {min(lo, T), max(hi, 0)};
}

// The block's own rows [from, end), and what they see: tiles [first, last) of the other side. Only tiles that reach
// out of `by_all`, what every row sees, need to be masked.
template <class C, bool of_keys>
struct Block {
  int b, h, from, end, first, last;
  Range by_all;

  __device__ explicit Block(const AttentionArgs& a) {
    const int T = int(of_keys ? a.Tk : a.Tq), heads = int(of_keys ? a.Hkv : a.H);
    const int tiles = (T + C::ROWS - 1) / C::ROWS, block = int(blockIdx.x), tile = block % tiles;
    b = block / tiles / heads;
    h = block / tiles % heads;
    from = (of_keys ? tile : tiles - 1 - tile) * C::ROWS;  // causal: the last queries have most to do, and start first
    end = min(from + C::ROWS, T);
    const Range top = seen<of_keys>(a, b, from), bottom = seen<of_keys>(a, b, end - 1);
    by_all = {bottom.lo, top.hi};
    first = top.lo / C::N;
    last = max(first, (bottom.hi + C::N - 1) / C::N);
  }
  __device__ bool is_edge(int tile) const { return tile * C::N < by_all.lo || tile * C::N + C::N > by_all.hi; }
  // Into shared memory, before a barrier. Rows past the end, which nobody will store, see as the last.
  __device__ void find_ranges(const AttentionArgs& a, Range* range) const {
    for (int i = int(threadIdx.x); i < C::ROWS; i += C::THREADS) range[i] = seen<of_keys>(a, b, min(from + i, end - 1));
  }
};

// Sets the elements of a warp's c that its rows do not see; column 0 of c is row `from` of the other side.
template <class C>
__device__ __forceinline__ void hide(float (&c)[C::M][C::N / 8][4], const Range* range, int from, float to) {
  const int g = lane_of() / 4, t = lane_of() % 4;
  UNROLL for (int m = 0; m < C::M; m++)
    UNROLL for (int i = 0; i < 2; i++) {
      const Range seen = range[16 * m + 8 * i + g];
      UNROLL for (int n = 0; n < C::N / 8; n++)
        UNROLL for (int j = 0; j < 2; j++)
          if (!seen.has(from + 8 * n + 2 * t + j)) c[m][n][2 * i + j] = to;
    }
}

// Whether any of a warp's rows may see something of the tile: at an edge, and among short documents, many see nothing.
template <class C>
__device__ __forceinline__ bool warp_sees(const Range* range, int tile) {
  return range[0].lo < (tile + 1) * C::N && tile * C::N < range[16 * C::M - 1].hi;
}

constexpr float LOG2_E = 1.44269504f;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(Forward<T, D>::THREADS, 1) forward_kernel(const __grid_constant__ AttentionArgs a) {
  using C = Forward<T, D>;
  MINIMAL_DYN_SHARED(char, memory);
  T* const Q = reinterpret_cast<T*>(memory);
  T *const K = Q + C::ROWS * C::LD, *const V = K + C::N * C::LD;
  MINIMAL_SHARED(Range, range, C::ROWS);  // what each own row sees

  const Block<C, false> block(a);
  const int lane = lane_of(), g = lane / 4, t = lane % 4;
  const int mine = int(threadIdx.x) / 32 * 16 * C::M;  // the warp's first row
  const int kv = block.h / int(a.H / a.Hkv), Tk = int(a.Tk);
  const T *const k = head_of<T>(a.k, block.b, kv), *const v = head_of<T>(a.v, block.b, kv);

  block.find_ranges(a, range);
  load_rows<C, C::ROWS>(Q, head_of<T>(a.q, block.b, block.h), a.q.token, block.from, block.end);
  if (block.first < block.last) load_rows<C, C::N>(K, k, a.k.token, block.first * C::N, Tk);

  float o[C::M][D / 8][4] = {}, l[C::M][2] = {};
  float base[C::M][2];  // the maximum m so far, times log2 e: exp(S - m) = 2^(S log2 e - base)
  UNROLL for (int m = 0; m < C::M; m++) base[m][0] = base[m][1] = -INF;

  for (int tile = block.first; tile < block.last; tile++) {
    wait_for_copies();
    __syncthreads();  // K is here, and nobody is at the last V any more
    load_rows<C, C::N>(V, v, a.v.token, tile * C::N, Tk);

    float s[C::M][C::N / 8][4];
    const bool looks = warp_sees<C>(range + mine, tile);
    if (looks) {
      multiply_rows<C>(s, Q + mine * C::LD, K);  // S = Q K'
      UNROLL for (int m = 0; m < C::M; m++)
        UNROLL for (int n = 0; n < C::N / 8; n++)
          UNROLL for (int e = 0; e < 4; e++) s[m][n][e] *= a.scale;
      if (block.is_edge(tile)) hide<C>(s, range + mine, tile * C::N, -INF);
      float shrink[C::M][2];
      bool higher = false;
      UNROLL for (int m = 0; m < C::M; m++)
        UNROLL for (int i = 0; i < 2; i++) {
          float most = -INF;
          UNROLL for (int n = 0; n < C::N / 8; n++) most = fmaxf(most, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
          const float next = fmaxf(base[m][i], quad_max(most) * LOG2_E);
          const float shift = next == -INF ? 0 : next;  // nothing seen yet: -inf - -inf would be NaN
          shrink[m][i] = exp2_of(base[m][i] - shift);  // exp(m - m_new)
          higher |= shrink[m][i] != 1;
          base[m][i] = next;
          l[m][i] *= shrink[m][i];  // of this lane's columns; summed over the four lanes in the end
          UNROLL for (int n = 0; n < C::N / 8; n++)
            UNROLL for (int j = 0; j < 2; j++) {
              float& x = s[m][n][2 * i + j];
              x = exp2_of(fmaf(x, LOG2_E, -shift));  // P
              l[m][i] += x;
            }
        }
      if (higher)  // seldom, after the first tiles
        UNROLL for (int m = 0; m < C::M; m++)
          UNROLL for (int n = 0; n < D / 8; n++)
            UNROLL for (int e = 0; e < 4; e++) o[m][n][e] *= shrink[m][e / 2];
    }

    wait_for_copies();
    __syncthreads();  // V is here, and nobody is at K any more
    if (tile + 1 < block.last) load_rows<C, C::N>(K, k, a.k.token, (tile + 1) * C::N, Tk);
    if (looks) multiply_add<C>(o, s, V);  // O += P V
  }
  wait_for_copies();
  __syncthreads();  // where there was no tile, Q may still be on its way

  UNROLL for (int m = 0; m < C::M; m++)
    UNROLL for (int i = 0; i < 2; i++) {
      const float sum = quad_sum(l[m][i]), inverse = sum == 0 ? 0 : 1 / sum;
      UNROLL for (int n = 0; n < D / 8; n++) {
        o[m][n][2 * i] *= inverse;
        o[m][n][2 * i + 1] *= inverse;
      }
      // In double, once a row: m comes back from base, whose rounding also went into every P and so into l.
      const double lse = base[m][i] * (1 / double(LOG2_E)) + double(logf(sum));
      const int q = block.from + mine + 16 * m + 8 * i + g;
      if (t == 0 && q < block.end) a.lse[(block.b * a.H + block.h) * a.Tq + q] = sum == 0 ? -INF : float(lse);
    }
  const int first = block.from + mine;
  store_rows<C>(o, Q + mine * C::LD, head_of<T>(a.out, block.b, block.h) + first * a.out.token, a.out.token,
                min(16 * C::M, block.end - first));
}

// ---- which kernel ---------------------------------------------------------------------------------------------------

template <class T, class F>
void with_head_size(int64_t D, F f) {
  if (D == 32) f(T(), std::integral_constant<int, 32>());
  if (D == 64) f(T(), std::integral_constant<int, 64>());
  if (D == 96) f(T(), std::integral_constant<int, 96>());
  if (D == 128) f(T(), std::integral_constant<int, 128>());
}
template <class F>
void with_types(const AttentionArgs& a, F f) {
  if (a.dtype == Dtype::f32) with_head_size<float>(a.D, f);
  if (a.dtype == Dtype::f16) with_head_size<__half>(a.D, f);
  if (a.dtype == Dtype::bf16) with_head_size<__nv_bfloat16>(a.D, f);
}
inline int64_t blocks_of(int64_t tokens, int64_t rows, int64_t heads) { return (tokens + rows - 1) / rows * heads; }

template <class Launch>
void attention_forward(const AttentionArgs& a, Launch launch) {
  with_types(a, [&](auto type, auto D) {
    using T = decltype(type);
    using C = Forward<T, D()>;
    if (const int64_t blocks = blocks_of(a.Tq, C::ROWS, a.B * a.H))
      launch(forward_kernel<T, D()>, blocks, C::THREADS, C::SHARED, a);
  });
}

// Whether every row of x starts at a multiple of 16 bytes.
inline bool in_pieces(const Strided& x, int64_t B, int64_t heads, int64_t tokens, int64_t bytes) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride * bytes % 16 == 0; };
  const bool start = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  return start && fits(B, x.batch) && fits(heads, x.head) && fits(tokens, x.token);
}

inline const char* attention_unfit(const AttentionArgs& a, bool backward) {
  constexpr int64_t MOST = INT32_MAX;
  if (a.D != 32 && a.D != 64 && a.D != 96 && a.D != 128) return "the head size must be 32, 64, 96 or 128";
  if (a.H > 0 && (a.Hkv < 1 || a.H % a.Hkv)) return "the number of key and value heads must divide that of query heads";
  if (a.Tq >= 1 << 30 || a.Tk >= 1 << 30) return "there must be fewer than 2^30 tokens";
  if (a.documents && (a.Tq != a.Tk || a.B * a.Tq > MOST || a.n_documents < 1))
    return "documents need as many queries as keys, boundaries, and at most 2^31 - 1 tokens";
  if (blocks_of(a.Tq, 32, a.B * a.H) > MOST || blocks_of(a.Tk, 32, a.B * a.Hkv) > MOST)  // no tile has fewer rows
    return "there must be fewer than 2^31 tiles of 32 rows";
  const int64_t bytes = a.dtype == Dtype::f32 ? 4 : 2;
  const auto of_query = [&](const Strided& x) { return in_pieces(x, a.B, a.H, a.Tq, bytes); };
  const auto of_key = [&](const Strided& x) { return in_pieces(x, a.B, a.Hkv, a.Tk, bytes); };
  bool aligned = of_query(a.q) && of_key(a.k) && of_key(a.v) && of_query(a.out);
  if (backward) aligned = aligned && of_query(a.dout) && of_query(a.dq) && of_key(a.dk) && of_key(a.dv);
  return aligned ? nullptr : "every row of every tensor must start at a multiple of 16 bytes";
}

}  // namespace minimal::cuda
