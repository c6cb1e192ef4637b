// SPDX-License-Identifier: MIT
// Attention, forward and backward, tile by tile, with the queries in the vector lanes.
//
//            query ->                  A tile of up to 64 queries is transposed once, so that a vector holds the same
//          +-----------+               coordinate of W queries. Then, for each block of keys:
//     d    |   Q'      |  packed,
//     |    |           |  times scale    S' = K Q'                K is read as it lies, one broadcast per element
//     v    +-----------+                 m, alpha, P', l          vertical operations, lane = query: a row maximum
//   d ->                                                          or sum is never one along a vector
//  +----+  +-----------+                 O' = alpha O' + V' P'    V is read as it lies, too
//  | K  |  | S' -> P'  |  key
//  +----+  |           |   |           Backward, the same product five times (dP = dO V', so dP' = V dO'):
//  +----+  |           |   v
//  | V  |  +-----------+                 S' = K Q', P' = exp(S' - lse)      dP' = V dO', dS' = P' * (dP' - Delta)
//  +----+                                dV += P' dO                        dK += dS' Q              dQ' += K' dS'
//     d    +-----------+
//     |    |   O'      |  divided      (' is a transpose; Delta = rowsum(dO * O); dQ and dK are scaled as they leave.)
//     v    +-----------+  by l, unpacked
//
// Causal: blocks of keys that a tile cannot see are skipped, and on the diagonal the products leave out, a few at a
// time, the lanes that lie before the key: at T = 64 that is more than a third of the work.
//
// Tiling and row log-sum-exp: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); Delta, and the division at the end:
// Dao 2023 (FlashAttention-2, arXiv 2307.08691); running maximum and sum: Milakov & Gimelshein 2018 (arXiv 1805.02867).

constexpr int64_t GRAIN = W > 8 ? W : 8;  // lanes that are skipped together
constexpr float INF = __builtin_inff();

// ---- the one micro-kernel -------------------------------------------------------------------------------------------

// A block of C in registers, R rows of NV vectors: C (R x NV*W) = [C +] A (R x K) B (K x NV*W). Element (r, k)
// of A stands at A[r * row + k * column], so a transpose costs nothing.
template <int R, int NV>
static void micro(int64_t K, const float* A, int64_t row, int64_t column, const float* B, int64_t ldb, float* C,
                  int64_t ldc, bool add) {
  vf c[R][NV] = {};
  for (int64_t k = 0; k < K; k++) {
    vf b[NV];
    UNROLL for (int n = 0; n < NV; n++) b[n] = load(B + k * ldb + n * W);
    UNROLL for (int r = 0; r < R; r++) {
      const vf a = splat(A[r * row + k * column]);
      UNROLL for (int n = 0; n < NV; n++) c[r][n] += a * b[n];
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < NV; n++) store(C + r * ldc + n * W, add ? load(C + r * ldc + n * W) + c[r][n] : c[r][n]);
}

// As many rows as the registers hold beside NV vectors of B and one broadcast.
constexpr int MOST_VECTORS = MINIMAL_VECTOR_REGISTERS == 32 ? 4 : 2;
constexpr int most_rows(int NV) {
  return MINIMAL_VECTOR_REGISTERS == 32 ? (NV == 4 ? 6 : NV == 3 ? 8 : 12) : (NV == 2 ? 6 : 12);
}

template <int NV, int R = most_rows(NV)>
INLINE void micro_of(int64_t rows, int64_t K, const float* A, int64_t row, int64_t column, const float* B, int64_t ldb,
                     float* C, int64_t ldc, bool add) {
  if (rows == R) return micro<R, NV>(K, A, row, column, B, ldb, C, ldc, add);
  if constexpr (R > 1) micro_of<NV, R - 1>(rows, K, A, row, column, B, ldb, C, ldc, add);
}

template <int NV>
static void product_columns(int64_t M, int64_t K, const float* A, int64_t row, int64_t column, const float* B,
                            int64_t ldb, float* C, int64_t ldc, bool add) {
  // Groups of nearly equal size: a last one of a single row would crawl.
  int64_t groups = (M + most_rows(NV) - 1) / most_rows(NV);
  for (int64_t r = 0; groups > 0; groups--) {
    const int64_t rows = (M - r + groups - 1) / groups;
    micro_of<NV>(rows, K, A + r * row, row, column, B, ldb, C + r * ldc, ldc, add);
    r += rows;
  }
}

// C (M x N) = [C +] A (M x K) B (K x N); N counts floats and is a multiple of W.
static void product(int64_t M, int64_t N, int64_t K, const float* A, int64_t row, int64_t column, const float* B,
                    int64_t ldb, float* C, int64_t ldc, bool add) {
  int64_t groups = (N / W + MOST_VECTORS - 1) / MOST_VECTORS;
  for (int64_t n = 0; groups > 0; groups--) {
    const int64_t vectors = ((N - n) / W + groups - 1) / groups;
    if (vectors == 1) product_columns<1>(M, K, A, row, column, B + n, ldb, C + n, ldc, add);
    if (vectors == 2) product_columns<2>(M, K, A, row, column, B + n, ldb, C + n, ldc, add);
    if constexpr (MOST_VECTORS == 4) {
      if (vectors == 3) product_columns<3>(M, K, A, row, column, B + n, ldb, C + n, ldc, add);
      if (vectors == 4) product_columns<4>(M, K, A, row, column, B + n, ldb, C + n, ldc, add);
    }
    n += vectors * W;
  }
}

// ---- moving tiles ---------------------------------------------------------------------------------------------------

// n rows of a tensor, from `from` on, as floats: where they lie if a vector can be read there, else converted into
// `room`, padded with zeros to whole vectors. `ld` is the distance between rows.
static const float* rows_of(const View& x, int64_t from, int64_t n, bool whole_vectors, float* room, int64_t& ld) {
  const int64_t D = x.size[3];
  if (x.type == Type::f32 && x.stride[3] == 1 && (!whole_vectors || D % 16 == 0)) {
    ld = x.stride[2];
    return (const float*)x.data + from;
  }
  ld = round_up(D, 16);
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < ld; d += W)
      store(room + i * ld + d, d < D ? read(x, from + i * x.stride[2] + d * x.stride[3], x.stride[3], D - d) : vf{});
  return room;
}

// to (depth x NQ) = scale * the transpose of n rows of `depth` elements (zero past n).
static void pack(const View& x, int64_t from, int64_t row_stride, int64_t stride, int64_t n, int64_t depth, float scale,
                 float* to, int64_t NQ) {
  for (int64_t i0 = 0; i0 < NQ; i0 += W)
    for (int64_t d0 = 0; d0 < depth; d0 += W) {
      vf r[W];
      const int64_t tile = from + i0 * row_stride + d0 * stride, rows = n - i0, columns = depth - d0;
      if (x.type == Type::f32 && stride == 1 && rows >= W && columns >= W)
        UNROLL for (int i = 0; i < W; i++) r[i] = load((const float*)x.data + tile + i * row_stride);
      else
        UNROLL for (int i = 0; i < W; i++) r[i] = i < rows ? read(x, tile + i * row_stride, stride, columns) : vf{};
      transpose(r);
      UNROLL for (int d = 0; d < W; d++)
        if (d < columns) store(to + (d0 + d) * NQ + i0, r[d] * scale);
    }
}

// n rows of x = the transpose of `tile` (D x NQ), each row times its lane of `factor`.
static void unpack(const float* tile, int64_t NQ, const float* factor, const View& x, int64_t from, int64_t n) {
  const int64_t D = x.size[3];
  for (int64_t i0 = 0; i0 < n; i0 += W)
    for (int64_t d0 = 0; d0 < D; d0 += W) {
      vf r[W], f = load(factor + i0);
      const int64_t to = from + i0 * x.stride[2] + d0 * x.stride[3], rows = n - i0, columns = D - d0;
      UNROLL for (int d = 0; d < W; d++) r[d] = d < columns ? load(tile + (d0 + d) * NQ + i0) * f : vf{};
      transpose(r);
      if (x.type == Type::f32 && x.stride[3] == 1 && rows >= W && columns >= W)
        UNROLL for (int i = 0; i < W; i++) store((float*)x.data + to + i * x.stride[2], r[i]);
      else
        UNROLL for (int i = 0; i < W; i++)
          if (i < rows) write(x, to + i * x.stride[2], x.stride[3], columns, r[i]);
    }
}

// ---- what a tile of queries and a block of keys see of each other ---------------------------------------------------

struct Pair {
  int64_t q0, qn, NQ;  // the queries; NQ is qn rounded up to whole vectors
  int64_t k0, kn;      // the keys
  int64_t ahead;       // key k0 + j is hidden from the lanes before j - ahead
};

// The next rows [j, end) of S' that leave out the same lanes, those before `first`. False: there are no more rows.
INLINE bool next_rows(const Pair& t, int64_t& j, int64_t& end, int64_t& first, int64_t grain = GRAIN) {
  j = end;
  if (j >= t.kn) return false;
  const int64_t lane = j - t.ahead;
  first = lane > 0 ? lane / grain * grain : 0;
  end = least(t.kn, j + first + grain - lane);
  return true;
}
// The rows of S' that vector n (a lane number) takes part in, and from which of them on some of its lanes are hidden.
INLINE int64_t rows_seen(const Pair& t, int64_t n) { return most(0, least(t.kn, (n / GRAIN + 1) * GRAIN + t.ahead)); }
INLINE int64_t rows_clear(const Pair& t, int64_t n) { return most(0, least(t.kn, n + t.ahead + 1)); }
INLINE vi seen(const Pair& t, int64_t n, int64_t j) { return lane_numbers() >= (int32_t)(j - t.ahead - n); }

INLINE Pair pair_of(const Attention& a, int64_t q0, int64_t qn, int64_t k0) {
  const int64_t offset = a.k.size[2] - a.q.size[2];  // bottom-right: the last query sees every key
  const int64_t end = a.causal ? least(a.k.size[2], q0 + qn + offset) : a.k.size[2];
  return {q0, qn, round_up(qn, W), k0, least(KEYS, end - k0), a.causal ? q0 + offset - k0 : int64_t(1) << 30};
}

// Adds the mask to S'. A mask that is the same for every query is read once.
static void add_mask(const Attention& a, int64_t b, int64_t h, const Pair& t, float* s, float* room) {
  const int64_t from = at(a.mask, b, h, t.q0) + t.k0 * a.mask.stride[3];
  const bool shared = a.mask.stride[2] == 0;
  if (shared)
    for (int64_t j = 0; j < t.kn; j += W)
      store(room + j, read(a.mask, from + j * a.mask.stride[3], a.mask.stride[3], t.kn - j));
  else
    pack(a.mask, from, a.mask.stride[2], a.mask.stride[3], t.qn, t.kn, 1, room, t.NQ);
  for (int64_t n = 0; n < t.NQ; n += W)
    for (int64_t j = 0; j < rows_seen(t, n); j++)
      store(s + j * t.NQ + n, load(s + j * t.NQ + n) + (shared ? splat(room[j]) : load(room + j * t.NQ + n)));
}

// ---- forward --------------------------------------------------------------------------------------------------------

// One block of online softmax, in place: S' becomes P'; m and l go on, and O' is scaled down to the new maximum.
static void softmax_block(const Pair& t, float* s, float* m, float* l, float* o, int64_t Dv) {
  const int64_t NQ = t.NQ;
  for (int64_t n = 0; n < NQ; n += W) {
    const int64_t rows = rows_seen(t, n);
    if (!rows) continue;
    const vf before = load(m + n);
    vf now[4] = {before, before, before, before};  // four chains: one would wait for each comparison
    for (int64_t j = rows_clear(t, n); j < rows; j++)
      store(s + j * NQ + n, seen(t, n, j) ? load(s + j * NQ + n) : splat(-INF));
    int64_t j = 0;
    for (; j + 4 <= rows; j += 4)
      UNROLL for (int i = 0; i < 4; i++) now[i] = maximum(load(s + (j + i) * NQ + n), now[i]);
    for (; j < rows; j++) now[0] = maximum(load(s + j * NQ + n), now[0]);
    const vf most_of = maximum(maximum(now[0], now[1]), maximum(now[2], now[3]));
    const vf shift = most_of == -INF ? vf{} : most_of;  // a row that has seen nothing: -inf - -inf would be NaN
    vf sums[2] = {};
    for (j = 0; j + 2 <= rows; j += 2)
      UNROLL for (int i = 0; i < 2; i++) {
        const vf p = exp(load(s + (j + i) * NQ + n) - shift);
        store(s + (j + i) * NQ + n, p);
        sums[i] += p;
      }
    if (j < rows) {
      const vf p = exp(load(s + j * NQ + n) - shift);
      store(s + j * NQ + n, p);
      sums[0] += p;
    }
    const vf alpha = exp(before - shift);
    store(m + n, most_of);
    store(l + n, load(l + n) * alpha + (sums[0] + sums[1]));
    if (t.k0)
      for (int64_t d = 0; d < Dv; d++) store(o + d * NQ + n, load(o + d * NQ + n) * alpha);
  }
}

static void forward_tile(const Attention& a, int64_t b, int64_t h, int64_t q0, Scratch scratch) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], kv = h / (a.q.size[1] / a.k.size[1]);
  const int64_t qn = least(QUERIES, a.q.size[2] - q0), NQ = round_up(qn, W);
  float *q = scratch.take(D * NQ), *o = scratch.take(Dv * NQ);
  float *s = scratch.take(KEYS * NQ), *mask = scratch.take(KEYS * NQ);
  float *K_room = scratch.take(KEYS * round_up(D, 16)), *V_room = scratch.take(KEYS * round_up(Dv, 16));
  float *m = scratch.take(NQ), *l = scratch.take(NQ);

  pack(a.q, at(a.q, b, h, q0), a.q.stride[2], a.q.stride[3], qn, D, a.scale, q, NQ);
  for (int64_t n = 0; n < NQ; n++) m[n] = -INF, l[n] = 0;
  for (int64_t n = 0; n < Dv * NQ; n++) o[n] = 0;

  for (int64_t k0 = 0;; k0 += KEYS) {
    const Pair t = pair_of(a, q0, qn, k0);
    if (t.kn <= 0) break;
    int64_t ldk, ldv, first, j, end;
    const float* K = rows_of(a.k, at(a.k, b, kv, k0), t.kn, false, K_room, ldk);
    const float* V = rows_of(a.v, at(a.v, b, kv, k0), t.kn, false, V_room, ldv);
    for (end = 0; next_rows(t, j, end, first);)
      product(end - j, NQ - first, D, K + j * ldk, ldk, 1, q + first, NQ, s + j * NQ + first, NQ, false);
    if (a.mask.data) add_mask(a, b, h, t, s, mask);
    softmax_block(t, s, m, l, o, Dv);
    for (end = 0; next_rows(t, j, end, first);)
      product(Dv, NQ - first, end - j, V + j * ldv, 1, ldv, s + j * NQ + first, NQ, o + first, NQ, true);
  }

  for (int64_t n = 0; n < NQ; n += W) {
    const vf sums = load(l + n), lse = load(m + n) + log(sums);
    store(m + n, sums == 0 ? splat(-INF) : sums == sums ? lse : sums);
    store(l + n, sums == 0 ? vf{} : 1 / sums);
    write(a.lse, at(a.lse, b, h, q0 + n), a.lse.stride[2], qn - n, load(m + n));
  }
  unpack(o, NQ, l, a.out, at(a.out, b, h, q0), qn);
}

// Tiles in the order first, last, second, last but one ...: with causal they differ in cost, and a thread gets a range.
INLINE int64_t spread(int64_t i, int64_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

static void forward_tiles(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t H = a.q.size[1], tiles = (a.q.size[2] + QUERIES - 1) / QUERIES;
  const int64_t D = round_up(a.q.size[3], 16), Dv = round_up(a.v.size[3], 16);
  ScratchBlock block((D + Dv + 2 * KEYS + 2) * QUERIES + (D + Dv) * KEYS);
  for (int64_t i = begin; i < end; i++)
    forward_tile(a, i / tiles / H, i / tiles % H, spread(i % tiles, tiles) * QUERIES, block.start());
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
};

// What some queries of some heads, all on one key-value head, and some keys give each other. Written: dQ if want_q, and
// then the keys must be all there are; dK and dV if want_kv, and then the queries and heads must be all. However the
// work is cut into ranges, an element gets the same terms in the same order.
static void backward_range(const Attention& a, int64_t b, Range h_range, Range q_range, Range k_range, bool want_q,
                           bool want_kv, Scratch scratch) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], kv = h_range.begin / (a.q.size[1] / a.k.size[1]);
  const int64_t ldd = round_up(D, 16), lddv = round_up(Dv, 16);
  float *q = scratch.take(D * QUERIES), *g = scratch.take(Dv * QUERIES), *dq = scratch.take(D * QUERIES);
  float *p = scratch.take(KEYS * QUERIES), *ds = scratch.take(KEYS * QUERIES), *mask = scratch.take(KEYS * QUERIES);
  float *Q_room = scratch.take(ldd * QUERIES), *G_room = scratch.take(lddv * QUERIES);
  float *K_room = scratch.take(ldd * KEYS), *V_room = scratch.take(lddv * KEYS);
  float *lse = scratch.take(QUERIES), *delta = scratch.take(QUERIES), *scales = scratch.take(QUERIES);
  const int64_t keys = want_kv ? k_range.end - k_range.begin : 0;
  float *dk = scratch.take(keys * ldd), *dv = scratch.take(keys * lddv);
  for (int64_t n = 0; n < QUERIES; n++) scales[n] = a.scale;
  for (int64_t n = 0; n < keys * ldd; n++) dk[n] = 0;
  for (int64_t n = 0; n < keys * lddv; n++) dv[n] = 0;

  for (int64_t h = h_range.begin; h < h_range.end; h++)
    for (int64_t q0 = q_range.begin; q0 < q_range.end; q0 += QUERIES) {
      const int64_t qn = least(QUERIES, q_range.end - q0), NQ = round_up(qn, W);
      int64_t ldq, ldg, ldk, ldv, first, j, end;
      if (pair_of(a, q0, qn, k_range.begin).kn <= 0 && !want_q) continue;
      pack(a.q, at(a.q, b, h, q0), a.q.stride[2], a.q.stride[3], qn, D, a.scale, q, NQ);
      pack(a.dout, at(a.dout, b, h, q0), a.dout.stride[2], a.dout.stride[3], qn, Dv, 1, g, NQ);
      const float* Q = rows_of(a.q, at(a.q, b, h, q0), qn, true, Q_room, ldq);
      const float* G = rows_of(a.dout, at(a.dout, b, h, q0), qn, true, G_room, ldg);
      for (int64_t n = 0; n < NQ; n += W) {
        // Summed in the order of the product dP': a query with a single key then gets dS = 0 exactly.
        vf sums = {};
        for (int64_t d0 = 0; d0 < Dv; d0 += W) {
          vf r[W];
          const int64_t tile = at(a.out, b, h, q0 + n) + d0 * a.out.stride[3];
          UNROLL for (int i = 0; i < W; i++)
            r[i] = n + i < qn ? read(a.out, tile + i * a.out.stride[2], a.out.stride[3], Dv - d0) : vf{};
          transpose(r);
          UNROLL for (int d = 0; d < W; d++)
            if (d0 + d < Dv) sums += r[d] * load(g + (d0 + d) * NQ + n);
        }
        store(delta + n, sums);
        // +inf where nothing is seen, and in the lanes past qn: exp(S - inf) = 0
        vf lses = read(a.lse, at(a.lse, b, h, q0 + n), a.lse.stride[2], qn - n);
        lses = lses == -INF ? splat(INF) : lses;
        store(lse + n, lane_numbers() < (int32_t)(qn - n) ? lses : splat(INF));
      }
      if (want_q)
        for (int64_t n = 0; n < D * NQ; n++) dq[n] = 0;

      for (int64_t k0 = k_range.begin; k0 < k_range.end; k0 += KEYS) {
        const Pair t = pair_of(a, q0, qn, k0);
        if (t.kn <= 0) break;
        const float* K = rows_of(a.k, at(a.k, b, kv, k0), t.kn, false, K_room, ldk);
        const float* V = rows_of(a.v, at(a.v, b, kv, k0), t.kn, false, V_room, ldv);
        for (end = 0; next_rows(t, j, end, first);) {
          product(end - j, NQ - first, D, K + j * ldk, ldk, 1, q + first, NQ, p + j * NQ + first, NQ, false);
          product(end - j, NQ - first, Dv, V + j * ldv, ldv, 1, g + first, NQ, ds + j * NQ + first, NQ, false);
        }
        if (a.mask.data) add_mask(a, b, h, t, p, mask);
        for (int64_t n = 0; n < NQ; n += W) {
          const vf L = load(lse + n), Delta = load(delta + n);
          const int64_t clear = rows_clear(t, n), rows = rows_seen(t, n);
          for (j = 0; j < rows; j++) {
            vf P = exp(load(p + j * NQ + n) - L), dS = P * (load(ds + j * NQ + n) - Delta);
            if (j >= clear) P = seen(t, n, j) ? P : vf{}, dS = seen(t, n, j) ? dS : vf{};
            store(p + j * NQ + n, P);
            store(ds + j * NQ + n, dS);
          }
        }
        // Here the lanes are summed over, one by one, so they need not be left out by whole vectors.
        for (end = 0; want_kv && next_rows(t, j, end, first, 8);) {
          const int64_t row = k0 - k_range.begin + j;
          product(end - j, lddv, qn - first, p + j * NQ + first, NQ, 1, G + first * ldg, ldg, dv + row * lddv, lddv,
                  true);
          product(end - j, ldd, qn - first, ds + j * NQ + first, NQ, 1, Q + first * ldq, ldq, dk + row * ldd, ldd,
                  true);
        }
        for (end = 0; want_q && next_rows(t, j, end, first);)
          product(D, NQ - first, end - j, K + j * ldk, 1, ldk, ds + j * NQ + first, NQ, dq + first, NQ, true);
      }
      if (want_q) unpack(dq, NQ, scales, a.dq, at(a.dq, b, h, q0), qn);
    }

  for (int64_t i = 0; i < keys; i++) {
    const int64_t to_dk = at(a.dk, b, kv, k_range.begin + i), to_dv = at(a.dv, b, kv, k_range.begin + i);
    for (int64_t d = 0; d < D; d += W)
      write(a.dk, to_dk + d * a.dk.stride[3], a.dk.stride[3], D - d, load(dk + i * ldd + d) * a.scale);
    for (int64_t d = 0; d < Dv; d += W)
      write(a.dv, to_dv + d * a.dv.stride[3], a.dv.stride[3], Dv - d, load(dv + i * lddv + d));
  }
}

INLINE int64_t backward_floats(const Attention& a, int64_t keys) {
  const int64_t D = round_up(a.q.size[3], 16), Dv = round_up(a.v.size[3], 16);
  return (3 * D + 2 * Dv + 3 * KEYS + 3) * QUERIES + (D + Dv) * (KEYS + keys);
}

// All of a key-value head at once: five products.
static void backward_heads(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t Hkv = a.k.size[1], G = a.q.size[1] / Hkv;
  ScratchBlock block(backward_floats(a, a.k.size[2]));
  for (int64_t i = begin; i < end; i++) {
    const int64_t kv = i % Hkv;
    backward_range(a, i / Hkv, {kv * G, kv * G + G}, {0, a.q.size[2]}, {0, a.k.size[2]}, true, true, block.start());
  }
}

// With fewer heads than threads: dK and dV by blocks of keys, then dQ by tiles of queries, seven products in all.
static void backward_keys(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t Hkv = a.k.size[1], G = a.q.size[1] / Hkv, blocks = (a.k.size[2] + KEYS - 1) / KEYS;
  ScratchBlock block(backward_floats(a, KEYS));
  for (int64_t i = begin; i < end; i++) {
    const int64_t kv = i / blocks % Hkv, k0 = spread(i % blocks, blocks) * KEYS;
    const Range keys = {k0, least(a.k.size[2], k0 + KEYS)};
    backward_range(a, i / blocks / Hkv, {kv * G, kv * G + G}, {0, a.q.size[2]}, keys, false, true, block.start());
  }
}
static void backward_queries(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t H = a.q.size[1], tiles = (a.q.size[2] + QUERIES - 1) / QUERIES;
  ScratchBlock block(backward_floats(a, 0));
  for (int64_t i = begin; i < end; i++) {
    const int64_t h = i / tiles % H, q0 = spread(i % tiles, tiles) * QUERIES;
    const Range queries = {q0, least(a.q.size[2], q0 + QUERIES)};
    backward_range(a, i / tiles / H, {h, h + 1}, queries, {0, a.k.size[2]}, true, false, block.start());
  }
}
