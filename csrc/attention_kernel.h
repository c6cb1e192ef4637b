// SPDX-License-Identifier: MIT
// Attention, forward and backward, tile by tile, with the queries in the vector lanes of the scores.
//
//                query ->              A tile of up to 64 queries is transposed once, so that a vector holds the same
//              +-----------+           coordinate of W queries. Then, for each block of keys:
//     d        |   Q'      |  packed,
//     |        |           |  times      S' = K Q'              K is read as it lies, one broadcast per element
//     v        +-----------+  scale      m, alpha, P', l        vertical operations, lane = query: a row maximum
//   d ->                                                        or sum is never one along a vector
//  +----+      +-----------+             O = alpha O + P V      V is read as it lies, in vectors; P by broadcasts
//  | K  |      | S' -> P'  |  key
//  +----+      +-----------+  |        Backward, the same product five times (dP = dO V', so dP' = V dO'):
//                             v
//  query       d ->                      S' = K Q', P' = exp(S' - lse)      dP' = V dO', dS' = P' * (dP' - Delta)
//  |  +----+  +----+    +----+           dV += P' dO                        dK += dS' Q            dQ += dS K
//  v  | P  |  | V  | -> | O  |
//     +----+  +----+    +----+         (' is a transpose; Delta = rowsum(dO * O); dQ and dK are scaled as they leave.)
//
// A query sees one interval [lo, hi) of keys, whatever causal, window and documents say, and neither end falls from one
// query to the next. So the lanes that see a key are an interval, too. Blocks that a tile does not see are skipped, and
// where an edge passes through a block the products leave out, a few lanes at a time, what is not seen: with causal at
// T = 64 that is more than a third of the work.
//
//            query ->    * seen. Key 2 is seen by lanes [2, 5): the products S' and dP' go over the
//        0  * * * . . .  rows of S' with equal lanes together (first and last rounded to GRAIN), the
//   key  1  . * * * . .  others over GROUP queries and the keys from the first one's lo to the last
//    |   2  . . * * * .  one's hi.
//    v   3  . . . * * *
//
// Tiling and row log-sum-exp: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); Delta, and the division at the end:
// Dao 2023 (FlashAttention-2, arXiv 2307.08691); running maximum and sum: Milakov & Gimelshein 2018 (arXiv 1805.02867);
// ALiBi: Press et al. 2021 (arXiv 2108.12409).

constexpr int64_t GRAIN = W > 8 ? W : 8;  // lanes that are left out together
constexpr int64_t GROUP = 8;              // queries, or keys, of which the sums over lanes leave the same out
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

// Rows of a tensor as floats, `ld` apart: where they lie if whole vectors can be read there, else converted into `room`,
// padded with zeros.
struct Rows {
  const float* at;
  int64_t ld;
  const float* operator[](int64_t i) const { return at + i * ld; }
};
INLINE bool in_place(const View& x) { return x.type == Type::f32 && x.stride[3] == 1 && x.size[3] % 16 == 0; }
static Rows copy_rows(const View& x, int64_t from, int64_t n, float* room) {
  const int64_t D = x.size[3], ld = round_up(D, 16);
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < ld; d += W)
      store(room + i * ld + d, d < D ? read(x, from + i * x.stride[2] + d * x.stride[3], x.stride[3], D - d) : vf{});
  return {room, ld};
}
static Rows rows_of(const View& x, int64_t from, int64_t n, float* room) {
  if (in_place(x)) return {(const float*)x.data + from, x.stride[2]};
  return copy_rows(x, from, n, room);
}

// Rotary positions (Su et al. 2021, arXiv 2104.09864): rows x of the n places from `place` on become R x, in place, or
// with sign = -1 R' x, which is also how a gradient comes back. The pairs that are turned are (d, d + D/2), as in Llama.
INLINE bool turns(const Attention& a) { return a.scores.cos.data; }
static void turn(const Attention& a, int64_t b, int64_t place, int64_t n, float* rows, float sign) {
  const View &cos = a.scores.cos, &sin = a.scores.sin;
  const int64_t half = cos.size[3];  // a multiple of 16
  for (int64_t i = 0; i < n; i++, rows += 2 * half)
    for (int64_t d = 0; d < half; d += W) {
      const vf c = read(cos, at(cos, b, 0, place + i) + d * cos.stride[3], cos.stride[3], W);
      const vf s = read(sin, at(sin, b, 0, place + i) + d * sin.stride[3], sin.stride[3], W) * sign;
      const vf x = load(rows + d), y = load(rows + half + d);
      store(rows + d, x * c - y * s);
      store(rows + half + d, y * c + x * s);
    }
}
// Keys, or queries (whose first stands at the place Tk - Tq), turned if there is anything to turn.
static Rows keys_of(const Attention& a, int64_t b, int64_t kv, int64_t k0, int64_t n, float* room) {
  if (!turns(a)) return rows_of(a.k, at(a.k, b, kv, k0), n, room);
  const Rows rows = copy_rows(a.k, at(a.k, b, kv, k0), n, room);
  turn(a, b, k0, n, room, 1);
  return rows;
}
static Rows queries_of(const Attention& a, int64_t b, int64_t h, int64_t q0, int64_t n, float* room) {
  if (!turns(a)) return rows_of(a.q, at(a.q, b, h, q0), n, room);
  const Rows rows = copy_rows(a.q, at(a.q, b, h, q0), n, room);
  turn(a, b, q0 + a.k.size[2] - a.q.size[2], n, room, 1);
  return rows;
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

INLINE View view_of(const Rows& rows, int64_t n, int64_t D) {
  return {(void*)rows.at, Type::f32, {1, 1, n, D}, {0, 0, rows.ld, 1}};
}

static void write_row(const View& x, int64_t to, const float* row, float factor) {
  const int64_t D = x.size[3];
  for (int64_t d = 0; d < D; d += W) write(x, to + d * x.stride[3], x.stride[3], D - d, load(row + d) * factor);
}

// ---- what a tile of queries and a block of keys see of each other ---------------------------------------------------

struct Range {
  int64_t begin, end;
};

struct Tile {
  int64_t b, h, q0, qn, NQ;  // NQ: qn rounded up to whole vectors
  int32_t lo[QUERIES], hi[QUERIES];
  int64_t begin() const { return lo[0]; }
  int64_t end() const { return hi[qn - 1]; }
};

static void tile_of(const Attention& a, int64_t b, int64_t h, int64_t q0, Tile& t) {
  const Scores& s = a.scores;
  const int64_t Tq = a.q.size[2], Tk = a.k.size[2], qn = least(QUERIES, Tq - q0);
  t.b = b, t.h = h, t.q0 = q0, t.qn = qn, t.NQ = round_up(qn, W);
  const int64_t place = q0 + Tk - Tq;  // of the first query; bottom-right: the last one of all stands at the last key
  const int64_t before = s.window ? s.window - 1 : Tk + Tq, after = s.causal ? 1 : s.window ? s.window : Tk + Tq;
  for (int64_t i = 0; i < QUERIES; i++) {
    t.lo[i] = (int32_t)most(0, place + i - before);
    t.hi[i] = (int32_t)most(0, least(Tk, place + i + after));
  }
  if (s.documents) {
    int64_t document = 0;  // the last boundary not after the query
    for (int64_t n = s.boundaries - 1; document < n;) {
      const int64_t middle = (document + n + 1) / 2;
      if (s.documents[middle] <= b * Tq + q0) document = middle; else n = middle - 1;
    }
    for (int64_t i = 0; i < qn; i++) {
      while (s.documents[document + 1] <= b * Tq + q0 + i) document++;
      t.lo[i] = (int32_t)most(t.lo[i], s.documents[document] - b * Tk);
      t.hi[i] = (int32_t)least(t.hi[i], s.documents[document + 1] - b * Tk);
    }
  }
  for (int64_t i = qn; i < QUERIES; i++) t.lo[i] = t.hi[i] = t.hi[qn - 1];
}

struct Block {
  int64_t k0, kn;  // the keys
  bool clear;      // every query of the tile sees all of them
};
INLINE Block block_of(const Tile& t, int64_t k0, int64_t end) {
  const int64_t kn = least(KEYS, end - k0);
  return {k0, kn, t.lo[t.qn - 1] <= k0 && t.hi[0] >= k0 + kn};
}
INLINE int64_t row_of(const Block& k, int64_t key) { return most(0, least(k.kn, key - k.k0)); }

// Goes through the rows of S' by runs [j, end) that leave out the same lanes, all but [first, last), where `grain` lanes
// are left out together. False: there are no more.
struct Run {
  int64_t j, end = 0, first = 0, last = 0;
};
INLINE bool next_run(const Tile& t, const Block& k, Run& r, int64_t grain, int64_t lanes) {
  if (k.clear) return r.last ? false : (r.j = 0, r.end = k.kn, r.last = lanes, true);
  do {
    r.j = r.end;
    if (r.j >= k.kn) return false;
    while (r.first < lanes && row_of(k, t.hi[r.first + grain - 1]) <= r.j) r.first += grain;  // they see no more
    while (r.last < lanes && row_of(k, t.lo[r.last]) <= r.j) r.last += grain;                 // these begin to see
    r.end = k.kn;
    if (r.first < lanes) r.end = least(r.end, row_of(k, t.hi[r.first + grain - 1]));
    if (r.last < lanes) r.end = least(r.end, row_of(k, t.lo[r.last]));
    r.last = least(r.last, lanes);
  } while (r.first >= r.last);
  return true;
}

// The rows of S' that the products write of the vector at lane n, and those of them that all its lanes see.
struct Seen {
  int64_t begin, clear_begin, clear_end, end;
};
INLINE Seen rows_seen(const Tile& t, const Block& k, int64_t n) {
  if (k.clear) return {0, 0, k.kn, k.kn};
  const int64_t g = n / GRAIN * GRAIN, begin = row_of(k, t.lo[g]), end = most(begin, row_of(k, t.hi[g + GRAIN - 1]));
  const int64_t clear_begin = least(end, most(begin, row_of(k, t.lo[n + W - 1])));
  return {begin, clear_begin, least(end, most(clear_begin, row_of(k, t.hi[n]))), end};
}
INLINE vi load_lanes(const int32_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE vi seen(const Tile& t, int64_t n, int64_t key) {
  return (load_lanes(t.lo + n) <= (int32_t)key) & (load_lanes(t.hi + n) > (int32_t)key);
}
// The rows of S' that some of the GROUP lanes from n on see.
INLINE Range rows_of_group(const Tile& t, const Block& k, int64_t n) {
  if (k.clear) return {0, k.kn};
  const int64_t begin = row_of(k, t.lo[n]);
  return {begin, most(begin, row_of(k, t.hi[least(n + GROUP, t.qn) - 1]))};
}

// What a boolean mask leaves of a block: a block of which nothing is left is skipped, and one that is left whole needs no
// mask, so a mask that keeps documents apart costs little more than cu_seqlens.
enum class Sight { nothing, part, everything };
static Sight sight_of(const Attention& a, const Tile& t, const Block& k) {
  const View& mask = a.scores.mask;
  if (!mask.data) return Sight::everything;
  if (mask.type != Type::boolean || mask.stride[3] != 1) return Sight::part;
  uint8_t any = 0, all = 1;
  for (int64_t i = 0; i < (mask.stride[2] ? t.qn : 1); i++) {
    const uint8_t* row = (const uint8_t*)mask.data + at(mask, t.b, t.h, t.q0 + i) + k.k0;
    for (int64_t j = 0; j < k.kn; j++) any |= row[j], all &= row[j];
  }
  return all ? Sight::everything : any ? Sight::part : Sight::nothing;
}

// What is done to S' before its softmax: soft cap, slopes, mask. `slope`, if given, gets the derivative of the soft cap.
static void adjust(const Attention& a, const Tile& t, const Block& k, Sight sight, float* s, float* slope, float* room) {
  const Scores& z = a.scores;
  if (sight == Sight::everything && !z.slopes.data && z.softcap == 0) return;
  const int64_t NQ = t.NQ, from = at(z.mask, t.b, t.h, t.q0) + k.k0 * z.mask.stride[3];
  const bool masked = sight == Sight::part, shared = z.mask.stride[2] == 0;
  if (masked && shared)  // the same for every query: read once
    for (int64_t j = 0; j < k.kn; j += W)
      store(room + j, read(z.mask, from + j * z.mask.stride[3], z.mask.stride[3], k.kn - j));
  else if (masked) {
    pack(z.mask, from, z.mask.stride[2], z.mask.stride[3], t.qn, k.kn, 1, room, NQ);
    for (int64_t j = 0; j < k.kn; j++)  // lanes without a query see nothing: K may be NaN
      for (int64_t n = t.qn; n < NQ; n++) room[j * NQ + n] = -INF;
  }
  const float alibi = z.slopes.data ? read(z.slopes, at(z.slopes, t.b, t.h, 0), 0, 1)[0] : 0;
  for (int64_t n = 0; n < NQ; n += W) {
    const Seen rows = rows_seen(t, k, n);
    const vi place = lane_numbers() + (int32_t)(t.q0 + n + a.k.size[2] - a.q.size[2]);
    for (int64_t j = rows.begin; j < rows.end; j++) {
      vf x = load(s + j * NQ + n);
      if (z.softcap > 0) {
        const vf y = tanh(x * (1 / z.softcap));
        if (slope) store(slope + j * NQ + n, 1 - y * y);
        x = y * z.softcap;
      }
      if (z.slopes.data) {
        const vf distance = __builtin_convertvector(place - (int32_t)(k.k0 + j), vf);
        x -= alibi * (distance < 0.0f ? -distance : distance);
      }
      if (masked) {
        const vf m = shared ? splat(room[j]) : load(room + j * NQ + n);
        x = m == -INF ? m : x + m;  // what is hidden may be NaN
      }
      store(s + j * NQ + n, x);
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// One block of online softmax, in place: S' becomes P'; m and l go on, and alpha says how O has to shrink for it.
static void softmax_block(const Tile& t, const Block& k, float* s, float* m, float* l, float* alpha) {
  const int64_t NQ = t.NQ;
  for (int64_t n = 0; n < NQ; n += W) {
    const Seen rows = rows_seen(t, k, n);
    const Range edges[2] = {{rows.begin, rows.clear_begin}, {rows.clear_end, rows.end}};
    for (const Range& hidden : edges)
      for (int64_t j = hidden.begin; j < hidden.end; j++)
        store(s + j * NQ + n, seen(t, n, k.k0 + j) ? load(s + j * NQ + n) : splat(-INF));
    const vf before = load(m + n);
    vf now[4] = {before, before, before, before};  // four chains: one would wait for each comparison
    int64_t j = rows.begin;
    for (; j + 4 <= rows.end; j += 4)
      UNROLL for (int i = 0; i < 4; i++) now[i] = maximum(load(s + (j + i) * NQ + n), now[i]);
    for (; j < rows.end; j++) now[0] = maximum(load(s + j * NQ + n), now[0]);
    const vf most_of = maximum(maximum(now[0], now[1]), maximum(now[2], now[3]));
    const vf shift = most_of == -INF ? vf{} : most_of;  // a row that has seen nothing: -inf - -inf would be NaN
    vf sums[2] = {};
    for (j = rows.begin; j + 2 <= rows.end; j += 2)
      UNROLL for (int i = 0; i < 2; i++) {
        const vf p = exp(load(s + (j + i) * NQ + n) - shift);
        store(s + (j + i) * NQ + n, p);
        sums[i] += p;
      }
    if (j < rows.end) {
      const vf p = exp(load(s + j * NQ + n) - shift);
      store(s + j * NQ + n, p);
      sums[0] += p;
    }
    const vf shrink = exp(before - shift);
    store(alpha + n, shrink);
    store(m + n, most_of);
    store(l + n, load(l + n) * shrink + (sums[0] + sums[1]));
  }
}

static void forward_tile(const Attention& a, int64_t b, int64_t h, int64_t q0, Rows K, Rows V, Scratch scratch) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], ldo = round_up(Dv, 16);
  Tile t;
  tile_of(a, b, h, q0, t);
  const int64_t NQ = t.NQ, qn = t.qn;
  float *q = scratch.take(D * QUERIES), *o = scratch.take(ldo * QUERIES);
  float *s = scratch.take(KEYS * QUERIES), *room = scratch.take(most(KEYS, D) * QUERIES);
  float *m = scratch.take(QUERIES), *l = scratch.take(QUERIES), *alpha = scratch.take(QUERIES);

  if (turns(a)) pack(view_of(queries_of(a, b, h, q0, qn, room), qn, D), 0, D, 1, qn, D, a.scores.scale, q, NQ);
  else pack(a.q, at(a.q, b, h, q0), a.q.stride[2], a.q.stride[3], qn, D, a.scores.scale, q, NQ);
  for (int64_t n = 0; n < NQ; n++) m[n] = -INF, l[n] = 0;
  for (int64_t n = 0; n < qn * ldo; n++) o[n] = 0;

  const int64_t begin = t.begin() / KEYS * KEYS;
  for (int64_t k0 = begin; k0 < t.end(); k0 += KEYS) {
    const Block k = block_of(t, k0, t.end());
    const Sight sight = sight_of(a, t, k);
    if (sight == Sight::nothing) continue;
    for (Run r; next_run(t, k, r, GRAIN, NQ);)  // (keys,D) x (D,queries) -> (keys,queries)
      product(r.end - r.j, r.last - r.first, D, K[k0 + r.j], K.ld, 1, q + r.first, NQ, s + r.j * NQ + r.first, NQ, false);
    adjust(a, t, k, sight, s, nullptr, room);
    softmax_block(t, k, s, m, l, alpha);
    if (k0 > begin)
      for (int64_t i = 0; i < qn; i++)
        if (alpha[i] != 1)
          for (int64_t d = 0; d < ldo; d += W) store(o + i * ldo + d, load(o + i * ldo + d) * alpha[i]);
    for (int64_t i = 0; i < qn; i += k.clear ? qn : GROUP) {  // (queries,keys) x (keys,Dv) -> (queries,Dv)
      const Range rows = rows_of_group(t, k, i);
      product(k.clear ? qn : least(GROUP, qn - i), ldo, rows.end - rows.begin, s + rows.begin * NQ + i, 1, NQ,
              V[k0 + rows.begin], V.ld, o + i * ldo, ldo, true);
    }
  }

  for (int64_t n = 0; n < NQ; n += W) {
    const vf sums = load(l + n), lse = load(m + n) + log(sums);
    store(m + n, sums == 0 ? splat(-INF) : sums == sums ? lse : sums);
    store(l + n, sums == 0 ? vf{} : 1 / sums);
    write(a.lse, at(a.lse, b, h, q0 + n), a.lse.stride[2], qn - n, load(m + n));
  }
  for (int64_t i = 0; i < qn; i++) write_row(a.out, at(a.out, b, h, q0 + i), o + i * ldo, l[i]);
}

// K and V of the head that a thread is at, whole: if they cannot be read where they lie, all its tiles share the copy.
struct Head {
  int64_t b = -1, kv = -1;
  Rows K, V;
  void fetch(const Attention& a, int64_t want_b, int64_t want_kv, Scratch scratch) {
    if (b == want_b && kv == want_kv) return;
    b = want_b, kv = want_kv;
    const int64_t Tk = a.k.size[2];
    K = keys_of(a, b, kv, 0, Tk, scratch.take(Tk * K_width(a)));
    V = rows_of(a.v, at(a.v, b, kv, 0), Tk, scratch.take(Tk * V_width(a)));
  }
  static int64_t K_width(const Attention& a) { return in_place(a.k) && !turns(a) ? 0 : round_up(a.k.size[3], 16); }
  static int64_t V_width(const Attention& a) { return in_place(a.v) ? 0 : round_up(a.v.size[3], 16); }
  static int64_t floats(const Attention& a) { return a.k.size[2] * (K_width(a) + V_width(a)); }
};

// Tiles in the order first, last, second, last but one ...: with causal they differ in cost, and a thread gets a range.
INLINE int64_t spread(int64_t i, int64_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

static void forward_tiles(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t H = a.q.size[1], tiles = (a.q.size[2] + QUERIES - 1) / QUERIES;
  const int64_t D = round_up(a.q.size[3], 16), Dv = round_up(a.v.size[3], 16);
  ScratchBlock block((D + Dv + KEYS + most(KEYS, D) + 3) * QUERIES), heads(Head::floats(a));
  Head head;
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / tiles / H, h = i / tiles % H;
    head.fetch(a, b, h / (H / a.k.size[1]), heads.start());
    forward_tile(a, b, h, spread(i % tiles, tiles) * QUERIES, head.K, head.V, block.start());
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What some queries of some heads, all on one key-value head, and some keys give each other. Written: dQ if want_q, and
// then the keys must be all there are; dK and dV if want_kv, and then the queries and heads must be all. However the
// work is cut into ranges, an element gets the same terms in the same order. K and V hold the rows from key k_base on.
static void backward_range(const Attention& a, int64_t b, Range h_range, Range q_range, Range k_range, bool want_q,
                           bool want_kv, Rows K, Rows V, int64_t k_base, Scratch scratch) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], kv = h_range.begin / (a.q.size[1] / a.k.size[1]);
  const int64_t ldd = round_up(D, 16), lddv = round_up(Dv, 16);
  const bool capped = a.scores.softcap > 0;
  float *q = scratch.take(D * QUERIES), *g = scratch.take(Dv * QUERIES), *dq = scratch.take(ldd * QUERIES);
  float *p = scratch.take(KEYS * QUERIES), *ds = scratch.take(KEYS * QUERIES), *room = scratch.take(KEYS * QUERIES);
  float *slope = capped ? scratch.take(KEYS * QUERIES) : nullptr;
  float *Q_room = scratch.take(ldd * QUERIES), *G_room = scratch.take(lddv * QUERIES);
  float *lse = scratch.take(QUERIES), *delta = scratch.take(QUERIES);
  const int64_t keys = want_kv ? k_range.end - k_range.begin : 0;
  float *dk = scratch.take(keys * ldd), *dv = scratch.take(keys * lddv);
  for (int64_t n = 0; n < keys * ldd; n++) dk[n] = 0;
  for (int64_t n = 0; n < keys * lddv; n++) dv[n] = 0;

  for (int64_t h = h_range.begin; h < h_range.end; h++)
    for (int64_t q0 = q_range.begin; q0 < q_range.end; q0 += QUERIES) {
      Tile t;
      tile_of(a, b, h, q0, t);
      const int64_t qn = t.qn, NQ = t.NQ;
      const int64_t begin = most(k_range.begin, t.begin() / KEYS * KEYS), end = least(k_range.end, t.end());
      if (begin >= end && !want_q) continue;
      const Rows Q = queries_of(a, b, h, q0, qn, Q_room), G = rows_of(a.dout, at(a.dout, b, h, q0), qn, G_room);
      if (turns(a)) pack(view_of(Q, qn, D), 0, Q.ld, 1, qn, D, a.scores.scale, q, NQ);
      else pack(a.q, at(a.q, b, h, q0), a.q.stride[2], a.q.stride[3], qn, D, a.scores.scale, q, NQ);
      pack(a.dout, at(a.dout, b, h, q0), a.dout.stride[2], a.dout.stride[3], qn, Dv, 1, g, NQ);
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
        for (int64_t n = 0; n < qn * ldd; n++) dq[n] = 0;

      for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
        const Block k = block_of(t, k0, end);
        const Sight sight = sight_of(a, t, k);
        if (sight == Sight::nothing) continue;
        for (Run r; next_run(t, k, r, GRAIN, NQ);) {  // (keys,D) x (D,queries) -> (keys,queries), twice
          const int64_t to = r.j * NQ + r.first;
          product(r.end - r.j, r.last - r.first, D, K[k0 - k_base + r.j], K.ld, 1, q + r.first, NQ, p + to, NQ, false);
          product(r.end - r.j, r.last - r.first, Dv, V[k0 - k_base + r.j], V.ld, 1, g + r.first, NQ, ds + to, NQ, false);
        }
        adjust(a, t, k, sight, p, slope, room);
        for (int64_t n = 0; n < NQ; n += W) {
          const vf L = load(lse + n), Delta = load(delta + n);
          const Seen rows = rows_seen(t, k, n);
          for (int64_t j = rows.begin; j < rows.end; j++) {
            const vf S_lse = load(p + j * NQ + n) - L;
            // never above 0 but by the rounding of huge scores: lse may come from another order of additions
            vf P = exp(S_lse > 0.0f ? vf{} : S_lse), dS = P * (load(ds + j * NQ + n) - Delta);
            if (capped) dS *= load(slope + j * NQ + n);
            if (j < rows.clear_begin || j >= rows.clear_end) {
              const vi here = seen(t, n, k0 + j);
              P = here ? P : vf{}, dS = here ? dS : vf{};
            }
            store(p + j * NQ + n, P);
            store(ds + j * NQ + n, dS);
          }
        }
        for (Run r; want_kv && next_run(t, k, r, GROUP, qn);) {  // (keys,queries) x (queries,D) -> (keys,D), twice
          const int64_t row = k0 - k_range.begin + r.j, from = r.j * NQ + r.first, depth = r.last - r.first;
          product(r.end - r.j, lddv, depth, p + from, NQ, 1, G[r.first], G.ld, dv + row * lddv, lddv, true);
          product(r.end - r.j, ldd, depth, ds + from, NQ, 1, Q[r.first], Q.ld, dk + row * ldd, ldd, true);
        }
        for (int64_t i = 0; want_q && i < qn; i += k.clear ? qn : GROUP) {  // (queries,keys) x (keys,D) -> (queries,D)
          const Range rows = rows_of_group(t, k, i);
          product(k.clear ? qn : least(GROUP, qn - i), ldd, rows.end - rows.begin, ds + rows.begin * NQ + i, 1, NQ,
                  K[k0 - k_base + rows.begin], K.ld, dq + i * ldd, ldd, true);
        }
      }
      if (want_q && turns(a)) turn(a, b, q0 + a.k.size[2] - a.q.size[2], qn, dq, -1);
      for (int64_t i = 0; want_q && i < qn; i++) write_row(a.dq, at(a.dq, b, h, q0 + i), dq + i * ldd, a.scores.scale);
    }

  if (turns(a)) turn(a, b, k_range.begin, keys, dk, -1);
  for (int64_t i = 0; i < keys; i++) {
    write_row(a.dk, at(a.dk, b, kv, k_range.begin + i), dk + i * ldd, a.scores.scale);
    write_row(a.dv, at(a.dv, b, kv, k_range.begin + i), dv + i * lddv, 1);
  }
}

INLINE int64_t backward_floats(const Attention& a, int64_t keys) {
  const int64_t D = round_up(a.q.size[3], 16), Dv = round_up(a.v.size[3], 16);
  return (3 * D + 2 * Dv + 4 * KEYS + 2) * QUERIES + (D + Dv) * keys;
}

// All of a key-value head at once: five products.
static void backward_heads(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t Hkv = a.k.size[1], G = a.q.size[1] / Hkv;
  ScratchBlock block(backward_floats(a, a.k.size[2])), heads(Head::floats(a));
  Head head;
  for (int64_t i = begin; i < end; i++) {
    const int64_t kv = i % Hkv;
    head.fetch(a, i / Hkv, kv, heads.start());
    backward_range(a, i / Hkv, {kv * G, kv * G + G}, {0, a.q.size[2]}, {0, a.k.size[2]}, true, true, head.K, head.V, 0,
                   block.start());
  }
}

// With fewer heads than threads: dK and dV by blocks of keys, then dQ by tiles of queries, seven products in all.
static void backward_keys(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t Hkv = a.k.size[1], G = a.q.size[1] / Hkv, blocks = (a.k.size[2] + KEYS - 1) / KEYS;
  const int64_t D = round_up(a.q.size[3], 16), Dv = round_up(a.v.size[3], 16);
  ScratchBlock block(backward_floats(a, KEYS) + (D + Dv) * KEYS);
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / blocks / Hkv, kv = i / blocks % Hkv, k0 = spread(i % blocks, blocks) * KEYS;
    const Range keys = {k0, least(a.k.size[2], k0 + KEYS)};
    Scratch scratch = block.start();
    const Rows K = keys_of(a, b, kv, k0, keys.end - k0, scratch.take(D * KEYS));
    const Rows V = rows_of(a.v, at(a.v, b, kv, k0), keys.end - k0, scratch.take(Dv * KEYS));
    backward_range(a, b, {kv * G, kv * G + G}, {0, a.q.size[2]}, keys, false, true, K, V, k0, scratch);
  }
}
static void backward_queries(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t H = a.q.size[1], tiles = (a.q.size[2] + QUERIES - 1) / QUERIES;
  ScratchBlock block(backward_floats(a, 0)), heads(Head::floats(a));
  Head head;
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / tiles / H, h = i / tiles % H, q0 = spread(i % tiles, tiles) * QUERIES;
    const Range queries = {q0, least(a.q.size[2], q0 + QUERIES)};
    head.fetch(a, b, h / (H / a.k.size[1]), heads.start());
    backward_range(a, b, {h, h + 1}, queries, {0, a.k.size[2]}, true, false, head.K, head.V, 0, block.start());
  }
}

#if MINIMAL_VECTOR_BYTES == 64
#include "attention_amx.h"
#endif
