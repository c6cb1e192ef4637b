// SPDX-License-Identifier: MIT
// Attention of bfloat16 with AMX, the matrix unit of Intel's processors since 2023: it multiplies 16 x 32 by 32 x 16
// bfloat16 and adds up in float32, sixteen times as fast as the vector unit multiplies float32.
//
// Tiles, blocks and masks are those of attention_kernel.h, and the queries again lie in the lanes of the scores. But
// here O and dQ stand transposed, too, and all products are of one form, C = A B, by squares of 32 x 32:
//
//     S' = K Q'     dP' = V dO'     O' += V' P'     dV += P' dO     dK += dS' Q     dQ' += K' dS'
//
// What no query of a square sees is neither multiplied nor read; where an edge passes through one, P and dS are 0. As
// in PyTorch's attention of bfloat16, P and dS are rounded to bfloat16 for the products, as are Q and K once their rotary
// positions have turned them. (The unit takes numbers below 2^-126 for 0.)
//
// The unit reads A by rows. Of B it wants pairs: row j of a matrix of pairs holds B[2j][i], B[2j+1][i] for each column.
//
//          A = K, as it lies          B = Q' in pairs            B = P' in pairs         A = P'
//             d ->                       query ->                   query ->                query ->
//        +-----------+             d   +-----------+          key +-----------+       key +-----------+
//    key | 0 1 2 3 . |             0 1 | the pairs |          0 1 | rows of S'|           | rows of S'|
//      | |           |             2 3 | of Q,     |          2 3 | two and   |           | as they   |
//      v +-----------+              .  | transposed|           .  | two       |           | lie       |
//                                      +-----------+              +-----------+           +-----------+

constexpr int64_t SIDE = 32;  // of a square: 2 x 2 tiles of C, so that a tile of A or B, once loaded, serves two

// ---- the unit -------------------------------------------------------------------------------------------------------

// Eight registers of 16 rows of 64 bytes. The state before is put back: others in the process use the unit as well.
class Unit {
 public:
  Unit() {
    const State eight;
    asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before_) : "m"(eight));
  }
  ~Unit() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;

 private:
  struct State {
    uint8_t palette = 1, start_row = 0, none[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  State before_;
};

template <int T>
INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void multiply_tiles() {  // C (16 x 16) += A (16 x 32) B (32 x 16)
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

struct Matrix {  // of bfloat16, rows `ld` apart; of pairs, a row has two elements a column
  Bf16* at = nullptr;
  int64_t ld = 0;
  Matrix from(int64_t row, int64_t element) const { return {at + row * ld + element, ld}; }
};

// The one micro-kernel: a square C (32 x 32) = [C +] A (32 x depth) B (depth x 32, in pairs).
static void square(Matrix A, Matrix B, int64_t depth, float* C, int64_t ldc, bool add) {
  float* low = C + 16 * ldc;
  if (add) {
    load_tile<0>(C, 4 * ldc), load_tile<1>(C + 16, 4 * ldc);
    load_tile<2>(low, 4 * ldc), load_tile<3>(low + 16, 4 * ldc);
  } else {
    asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  }
  for (int64_t k = 0; k < depth; k += 32) {
    const Bf16 *a = A.at + k, *b = B.at + k / 2 * B.ld;
    load_tile<4>(a, 2 * A.ld), load_tile<5>(a + 16 * A.ld, 2 * A.ld);
    load_tile<6>(b, 2 * B.ld), load_tile<7>(b + 32, 2 * B.ld);
    multiply_tiles<0, 4, 6>(), multiply_tiles<1, 4, 7>(), multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(C, 4 * ldc), store_tile<1>(C + 16, 4 * ldc);
  store_tile<2>(low, 4 * ldc), store_tile<3>(low + 16, 4 * ldc);
}

// Squares still to be multiplied, begun one by one between pieces of vector work: the unit falls asleep within half a
// microsecond, and takes a third of one to wake.
struct Squares {
  struct Square {
    Matrix A, B;
    int64_t depth;
    float* C;
    int64_t ldc;
    bool add;
  };
  Square waiting[64];
  int begun = 0, n = 0;
  void put(Matrix A, Matrix B, int64_t depth, float* C, int64_t ldc, bool add) {
    if (n == 64) begin_all();
    waiting[n++] = {A, B, depth, C, ldc, add};
  }
  void begin_one() {
    const Square& w = waiting[begun++];
    square(w.A, w.B, w.depth, w.C, w.ldc, w.add);
  }
  // The first `part` of `parts`. Without a square the unit gets work in registers that each square fills anew.
  void begin_part(int64_t part, int64_t parts) {
    const int before = begun;
    while (begun * parts < n * part) begin_one();
    if (begun == before && part % 4 == 0) multiply_tiles<0, 4, 6>();
  }
  void begin_all() {
    while (begun < n) begin_one();
    begun = n = 0;
  }
};

// ---- making operands ------------------------------------------------------------------------------------------------

INLINE vf load_pairs(const Bf16* p) { return load((const float*)p); }  // W pairs, only moved
INLINE void store_pairs(Bf16* p, vf pairs) { store((float*)p, pairs); }

// X (n x depth) -> X' (depth x n) in pairs
static void transpose_pairs(Matrix X, int64_t n, int64_t depth, Matrix to) {
  for (int64_t i = 0; i < n; i += 16)
    for (int64_t d = 0; d < depth; d += 32) {
      vf r[16];
      UNROLL for (int j = 0; j < 16; j++) r[j] = load_pairs(X.from(i + j, d).at);
      transpose(r);
      UNROLL for (int j = 0; j < 16; j++) store_pairs(to.from(d / 2 + j, 2 * i).at, r[j]);
    }
}
// Rows 2j and 2j + 1 as pairs: of the first 16 columns, and of the next 16.
INLINE Two pairs_of_rows(Matrix X, int64_t row, int64_t column) {
  const vu a = (vu)load_pairs(X.from(row, column).at), b = (vu)load_pairs(X.from(row + 1, column).at);
  const vf even = (vf)((a & 0xffffu) | (b << 16)), odd = (vf)((a >> 16) | (b & 0xffff0000u));
  return {zip_low(even, odd), zip_high(even, odd)};
}
// X (depth x n) -> the same in pairs
static void pair_rows(Matrix X, int64_t depth, int64_t n, Matrix to) {
  for (int64_t d = 0; d < depth; d += 2)
    for (int64_t i = 0; i < n; i += 32) {
      const Two pairs = pairs_of_rows(X, d, i);
      store_pairs(to.from(d / 2, 2 * i).at, pairs.a);
      store_pairs(to.from(d / 2, 2 * i + 32).at, pairs.b);
    }
}
// X (n x width) -> X' (width x n)
static void transpose_rows(Matrix X, int64_t n, int64_t width, Matrix to) {
  for (int64_t i = 0; i < n; i += 32)
    for (int64_t d = 0; d < width; d += 32) {
      vf a[16], b[16];
      UNROLL for (int j = 0; j < 16; j++) {
        const Two pairs = pairs_of_rows(X, i + 2 * j, d);
        a[j] = pairs.a, b[j] = pairs.b;
      }
      transpose(a), transpose(b);
      UNROLL for (int j = 0; j < 16; j++) {
        store_pairs(to.from(d + j, i).at, a[j]);
        store_pairs(to.from(d + 16 + j, i).at, b[j]);
      }
    }
}

// Of float32, the lanes of x and those of y after them
INLINE vf row_to_bf16(vf x, vf y) {
  vf both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(x), "v"(y));
  return both;
}
// To nearest, ties away from 0. A NaN of 0x7fff8000 or more, as only a mask or slopes can bring, becomes 0.
INLINE vf pairs_to_bf16(vf x, vf y) {
  return (vf)((((vu)x + 0x8000u) >> 16) | (((vu)y + 0x8000u) & 0xffff0000u));
}

// n rows of a tensor as they lie, or else copied and padded with zeros to a multiple of 32, both ways. With a place
// they are turned by their rotary positions.
static Matrix matrix_of(const Attention& a, const View& x, int64_t b, int64_t h, int64_t row, int64_t n, int64_t place,
                        Bf16* copy, float* room) {
  const int64_t D = x.size[3], ld = round_up(D, SIDE);
  const bool turned = turns(a) && place >= 0, whole = x.stride[3] == 1 && D % SIDE == 0 && !turned;
  if (whole && n % SIDE == 0) return {(Bf16*)x.data + at(x, b, h, row), x.stride[2]};
  for (int64_t i = 0; i < round_up(n, SIDE); i++) {
    const int64_t from = at(x, b, h, row + i);
    if (whole || i >= n) {
      for (int64_t d = 0; d < ld; d += 32)
        store_pairs(copy + i * ld + d, i < n ? load_pairs((const Bf16*)x.data + from + d) : vf{});
      continue;
    }
    for (int64_t d = 0; d < ld; d += W)
      store(room + d, d < D ? read(x, from + d * x.stride[3], x.stride[3], D - d) : vf{});
    if (turned) turn(a, b, place + i, 1, room, 1);
    for (int64_t d = 0; d < ld; d += W) to_bf16(copy + i * ld + d, load(room + d));
  }
  return {copy, ld};
}
// 32 elements to a row of a tensor, or as many as it has.
INLINE void write_row_of_32(const View& x, int64_t to, int64_t n, vf pairs) {
  Bf16* row = (Bf16*)x.data + to;
  if (x.stride[3] == 1 && n >= 32) return store_pairs(row, pairs);
  Bf16 elements[32];
  store_pairs(elements, pairs);
  for (int64_t c = 0; c < least(32, n); c++) row[c * x.stride[3]] = elements[c];
}
static void write_rows(const float* rows, int64_t ld, float factor, const View& x, int64_t b, int64_t h, int64_t row,
                       int64_t n) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < x.size[3]; d += 32)
      write_row_of_32(x, at(x, b, h, row + i) + d * x.stride[3], x.size[3] - d,
                      row_to_bf16(load(rows + i * ld + d) * factor, load(rows + i * ld + d + W) * factor));
}
static Matrix take_matrix(Scratch& scratch, int64_t rows, int64_t width) {
  return {(Bf16*)scratch.take(rows * width / 2), width};
}

// Some keys of a head: K and V for S' and dP', transposed for O' and dQ'.
struct KeysAndValues {
  Matrix K, Kt, V, Vt;
};
constexpr int64_t APART = 32;  // between rows as long as the keys: a power of two would put all in one part of a cache
static KeysAndValues keys_and_values(const Attention& a, int64_t b, int64_t kv, Range keys, bool Kt, bool Vt,
                                     Scratch scratch) {
  const int64_t n = keys.end - keys.begin, padded = round_up(n, SIDE);
  const int64_t D = round_up(a.k.size[3], SIDE), Dv = round_up(a.v.size[3], SIDE);
  float* room = scratch.take(most(D, Dv));
  KeysAndValues r;
  r.K = matrix_of(a, a.k, b, kv, keys.begin, n, keys.begin, (Bf16*)scratch.take(padded * D / 2), room);
  r.V = matrix_of(a, a.v, b, kv, keys.begin, n, -1, (Bf16*)scratch.take(padded * Dv / 2), room);
  if (Kt) transpose_rows(r.K, padded, D, r.Kt = take_matrix(scratch, D, padded + APART));
  if (Vt) transpose_rows(r.V, padded, Dv, r.Vt = take_matrix(scratch, Dv, padded + APART));
  return r;
}
INLINE int64_t keys_and_values_floats(const Attention& a, int64_t n) {
  const int64_t D = round_up(a.k.size[3], SIDE), Dv = round_up(a.v.size[3], SIDE);
  return (round_up(n, SIDE) + APART) * (D + Dv) + most(D, Dv);
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// The rows of S', by whole squares, that some of the 32 lanes from n on see.
INLINE Range squares_of(const Tile& t, const Block& k, int64_t n) {
  if (k.clear) return {0, round_up(k.kn, SIDE)};
  const int64_t begin = row_of(k, t.lo[n]), end = row_of(k, t.hi[n + SIDE - 1]);
  return begin < end ? Range{begin / SIDE * SIDE, round_up(end, SIDE)} : Range{0, 0};
}

// S' of a block is put into the queue ...
static void put_scores(const Tile& t, const Block& k, Matrix K, Matrix Q, int64_t D, float* s, Squares& squares) {
  for (int64_t n = 0; n < t.NQ; n += SIDE) {
    const Range keys = squares_of(t, k, n);
    for (int64_t j = keys.begin; j < keys.end; j += SIDE)  // (keys,D) x (D,queries) -> (keys,queries)
      squares.put(K.from(j, 0), Q.from(0, 2 * n), D, s + j * t.NQ + n, t.NQ, false);
  }
}
// ... and, once multiplied, made into scores but for the factor that is returned; -inf where a query sees no key.
static float finish_scores(const Attention& a, const Tile& t, const Block& k, Sight sight, float* s, float* slope,
                           float* room) {
  const int64_t NQ = t.NQ;
  const Scores& z = a.scores;
  const bool plain = !z.mask.data && !z.slopes.data && z.softcap == 0 && z.scale > 0;
  for (int64_t n = 0; n < NQ && !plain; n += W) {
    const Seen rows = rows_seen(t, k, n);
    for (int64_t j = rows.begin; j < rows.end; j++) store(s + j * NQ + n, load(s + j * NQ + n) * z.scale);
  }
  if (!plain) adjust(a, t, k, sight, s, slope, room);
  for (int64_t n = 0; n < NQ; n += W) {
    const Range keys = squares_of(t, k, n / SIDE * SIDE);
    const Seen rows = rows_seen(t, k, n);
    for (int64_t j = keys.begin; j < keys.end; j++) {
      if (j == rows.clear_begin) j = rows.clear_end;
      if (j < keys.end) store(s + j * NQ + n, seen(t, n, k.k0 + j) ? load(s + j * NQ + n) : splat(-INF));
    }
  }
  return plain ? z.scale : 1;
}

constexpr float LOG2_E = 1.44269504f;

// ---- forward --------------------------------------------------------------------------------------------------------

// One block of online softmax: S' to P' in pairs, in bfloat16. m holds maxima of S before its factor.
static void amx_softmax(const Tile& t, const Block& k, const float* s, float factor, float* m, float* l, float* alpha,
                        Matrix P, Squares& squares) {
  const int64_t NQ = t.NQ;
  const vf to_log2 = splat(factor * LOG2_E);
  for (int64_t n = 0; n < NQ; n += W) {
    const Range rows = squares_of(t, k, n / SIDE * SIDE);
    const vf before = load(m + n);
    vf now[4] = {before, before, before, before};  // four chains: one would wait for each comparison
    for (int64_t j = rows.begin; j < rows.end; j += 4)
      UNROLL for (int i = 0; i < 4; i++) now[i] = maximum(load(s + (j + i) * NQ + n), now[i]);
    const vf most_of = maximum(maximum(now[0], now[1]), maximum(now[2], now[3]));
    const vf shift = most_of == -INF ? vf{} : most_of;  // a row that has seen nothing: -inf - -inf would be NaN
    vf sums[2] = {};
    for (int64_t j = rows.begin; j < rows.end; j += 2) {
      if (j % 16 == 0) squares.begin_part(n / W * KEYS / 16 + (j - rows.begin) / 16 + 1, NQ / W * KEYS / 16);
      vf p[2];
      UNROLL for (int i = 0; i < 2; i++) {
        p[i] = power_of_two_for_bf16((load(s + (j + i) * NQ + n) - shift) * to_log2);
        sums[i] += p[i];
      }
      store_pairs(P.from(j / 2, 2 * n).at, pairs_to_bf16(p[0], p[1]));
    }
    const vf shrink = power_of_two_for_bf16((before - shift) * to_log2);
    store(alpha + n, shrink);
    store(m + n, most_of);
    store(l + n, load(l + n) * shrink + (sums[0] + sums[1]));
  }
}

// X' (depth x NQ), each column times its factor, to n rows of a tensor.
static void write_transposed(const float* X, int64_t NQ, const float* factor, const View& x, int64_t b, int64_t h,
                             int64_t row, int64_t n) {
  const int64_t D = x.size[3];
  for (int64_t i0 = 0; i0 < n; i0 += W)
    for (int64_t d = 0; d < D; d += 32) {
      vf r[W];  // pairs of coordinates
      UNROLL for (int i = 0; i < W; i++) {
        const float* two = X + (d + 2 * i) * NQ + i0;
        r[i] = pairs_to_bf16(load(two) * load(factor + i0), load(two + NQ) * load(factor + i0));
      }
      transpose(r);
      for (int64_t i = 0; i < least(W, n - i0); i++)
        write_row_of_32(x, at(x, b, h, row + i0 + i) + d * x.stride[3], D - d, r[i]);
    }
}

static void amx_forward_tile(const Attention& a, int64_t b, int64_t h, int64_t q0, const KeysAndValues& head,
                             Scratch scratch) {
  const int64_t D = round_up(a.q.size[3], SIDE), Dv = round_up(a.v.size[3], SIDE);
  Tile t;
  tile_of(a, b, h, q0, t);
  const int64_t qn = t.qn = least(t.qn, SIDE), NQ = t.NQ = SIDE;
  const Matrix Q = take_matrix(scratch, D / 2, 2 * NQ), copy = take_matrix(scratch, NQ, D);
  const Matrix P[2] = {take_matrix(scratch, KEYS / 2, 2 * NQ), take_matrix(scratch, KEYS / 2, 2 * NQ)};
  float* s[2] = {scratch.take(KEYS * NQ), scratch.take(KEYS * NQ)};
  float *o = scratch.take(Dv * NQ), *room = scratch.take(most(KEYS, D) * NQ);
  float *m = scratch.take(NQ), *l = scratch.take(NQ), *alpha = scratch.take(NQ);

  const int64_t place = q0 + a.k.size[2] - a.q.size[2];
  transpose_pairs(matrix_of(a, a.q, b, h, q0, qn, place, copy.at, room), NQ, D, Q);
  for (int64_t n = 0; n < NQ; n++) m[n] = -INF, l[n] = 0;

  // While block i is at its softmax, the matrix unit multiplies P V of block i - 1 and K Q' of block i + 1.
  Squares squares;
  float factor = 1;
  bool begun = false;  // O holds something
  Sight sight;
  auto next_seen = [&](int64_t k0) {
    while (k0 < t.end() && (sight = sight_of(a, t, block_of(t, k0, t.end()))) == Sight::nothing) k0 += KEYS;
    return k0;
  };
  const int64_t begin = next_seen(t.begin() / KEYS * KEYS);
  if (begin < t.end()) put_scores(t, block_of(t, begin, t.end()), head.K.from(begin, 0), Q, D, s[0], squares);
  squares.begin_all();
  for (int64_t k0 = begin, next, i = 0; k0 < t.end(); k0 = next, i = 1 - i) {
    const Block k = block_of(t, k0, t.end());
    factor = finish_scores(a, t, k, sight, s[i], nullptr, room);
    next = next_seen(k0 + KEYS);
    if (next < t.end()) put_scores(t, block_of(t, next, t.end()), head.K.from(next, 0), Q, D, s[1 - i], squares);
    amx_softmax(t, k, s[i], factor, m, l, alpha, P[i], squares);
    squares.begin_all();
    for (int64_t n = 0; begun && n < NQ; n += W) {
      const vf shrink = load(alpha + n);
      const bool shrinks = sum_lanes(shrink) != W;
      for (int64_t d = 0; shrinks && d < Dv; d++) store(o + d * NQ + n, load(o + d * NQ + n) * shrink);
    }
    const Range keys = squares_of(t, k, 0);
    for (int64_t d = 0; keys.begin < keys.end && d < Dv; d += SIDE)  // (Dv,keys) x (keys,queries) -> (Dv,queries)
      squares.put(head.Vt.from(d, k0 + keys.begin), P[i].from(keys.begin / 2, 0), keys.end - keys.begin, o + d * NQ, NQ,
                  begun);
    begun |= keys.begin < keys.end;
  }
  squares.begin_all();
  for (int64_t n = 0; !begun && n < Dv * NQ; n += W) store(o + n, vf{});

  for (int64_t n = 0; n < NQ; n += W) {
    vf sums = load(l + n);
    sums = sums == sums ? sums : splat(__builtin_nanf(""));  // one without low bits, where a mask has another
    const vf lse = load(m + n) * factor + log(sums);
    store(l + n, sums == 0 ? vf{} : 1 / sums);
    const vf logsumexp = sums == 0 ? splat(-INF) : sums == sums ? lse : sums;
    write(a.lse, at(a.lse, b, h, q0 + n), a.lse.stride[2], qn - n, logsumexp);
  }
  write_transposed(o, NQ, l, a.out, b, h, q0, qn);
}

static void amx_forward_tiles(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t H = a.q.size[1], Tk = a.k.size[2], tiles = (a.q.size[2] + QUERIES - 1) / QUERIES;
  const int64_t D = round_up(a.q.size[3], SIDE), Dv = round_up(a.v.size[3], SIDE);
  ScratchBlock block((D + Dv + 3 * KEYS + most(KEYS, D) + 3) * SIDE), heads(keys_and_values_floats(a, Tk));
  const Unit unit;
  KeysAndValues head;
  for (int64_t i = begin, at_head = -1; i < end; i++) {
    const int64_t b = i / tiles / H, h = i / tiles % H, kv = h / (H / a.k.size[1]);
    if (at_head != b * a.k.size[1] + kv) head = keys_and_values(a, b, kv, {0, Tk}, false, true, heads.start());
    at_head = b * a.k.size[1] + kv;
    const int64_t q0 = spread(i % tiles, tiles) * QUERIES;
    for (int64_t q = q0; q < least(q0 + QUERIES, a.q.size[2]); q += SIDE)  // half a tile of queries fills the lanes
      amx_forward_tile(a, b, h, q, head, block.start());
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// X' (depth x NQ) to rows.
static void transpose_back(const float* X, int64_t NQ, int64_t depth, float* rows) {
  for (int64_t n = 0; n < NQ; n += W)
    for (int64_t d = 0; d < depth; d += W) {
      vf r[W];
      UNROLL for (int i = 0; i < W; i++) r[i] = load(X + (d + i) * NQ + n);
      transpose(r);
      UNROLL for (int i = 0; i < W; i++) store(rows + (n + i) * depth + d, r[i]);
    }
}

// P and dS of a block, rounded: by rows for dV and dK, dS in pairs for dQ'.
struct Rounded {
  Matrix P, dS, dS_pairs;
};
static void amx_softmax_backward(const Tile& t, const Block& k, const float* s, const float* dp, const float* slope,
                                 float factor, const float* lse, const float* delta, const Rounded& to) {
  const int64_t NQ = t.NQ;
  const vf to_log2 = splat(factor * LOG2_E);
  for (int64_t n = 0; n < NQ; n += SIDE) {
    const Range rows = squares_of(t, k, n);
    for (int64_t j = rows.begin; j < rows.end; j += 2) {
      vf P[2][2], dS[2][2];
      UNROLL for (int i = 0; i < 2; i++)
        UNROLL for (int w = 0; w < 2; w++) {
          const int64_t here = (j + i) * NQ + n + w * W;
          const vf x = load(s + here) * to_log2 - load(lse + n + w * W);
          P[i][w] = power_of_two_for_bf16(x > 0.0f ? vf{} : x);  // above only by the rounding of huge scores
          dS[i][w] = P[i][w] * (load(dp + here) - load(delta + n + w * W));
          if (slope) dS[i][w] *= load(slope + here);
          dS[i][w] = P[i][w] == 0.0f ? vf{} : dS[i][w];  // what is hidden may be NaN
        }
      UNROLL for (int i = 0; i < 2; i++) {
        store_pairs(to.P.from(j + i, n).at, row_to_bf16(P[i][0], P[i][1]));
        store_pairs(to.dS.from(j + i, n).at, row_to_bf16(dS[i][0], dS[i][1]));
      }
      UNROLL for (int w = 0; w < 2; w++)
        store_pairs(to.dS_pairs.from(j / 2, 2 * (n + w * W)).at, pairs_to_bf16(dS[0][w], dS[1][w]));
    }
  }
}

// As backward_range in attention_kernel.h.
static void amx_backward_range(const Attention& a, int64_t b, Range h_range, Range q_range, Range k_range, bool want_q,
                               bool want_kv, const KeysAndValues& head, int64_t k_base, Scratch scratch) {
  const int64_t D = round_up(a.q.size[3], SIDE), Dv = round_up(a.v.size[3], SIDE);
  const int64_t kv = h_range.begin / (a.q.size[1] / a.k.size[1]);
  const Matrix Qt = take_matrix(scratch, D / 2, 2 * QUERIES), Gt = take_matrix(scratch, Dv / 2, 2 * QUERIES);
  const Matrix Q_pairs = take_matrix(scratch, QUERIES / 2, 2 * D), G_pairs = take_matrix(scratch, QUERIES / 2, 2 * Dv);
  const Matrix Q_copy = take_matrix(scratch, QUERIES, D), G_copy = take_matrix(scratch, QUERIES, Dv);
  const Rounded rounded = {take_matrix(scratch, KEYS, QUERIES), take_matrix(scratch, KEYS, QUERIES),
                           take_matrix(scratch, KEYS / 2, 2 * QUERIES)};
  float *s = scratch.take(KEYS * QUERIES), *dp = scratch.take(KEYS * QUERIES), *dq = scratch.take(D * QUERIES);
  float *room = scratch.take(most(KEYS, most(D, Dv)) * QUERIES), *slope = scratch.take(KEYS * QUERIES);
  float *lse = scratch.take(QUERIES), *delta = scratch.take(QUERIES);
  const int64_t keys = want_kv ? round_up(k_range.end - k_range.begin, SIDE) : 0;
  float *dk = scratch.take(keys * D), *dv = scratch.take(keys * Dv);
  for (int64_t n = 0; n < keys * D; n += W) store(dk + n, vf{});
  for (int64_t n = 0; n < keys * Dv; n += W) store(dv + n, vf{});

  for (int64_t h = h_range.begin; h < h_range.end; h++)
    for (int64_t q0 = q_range.begin; q0 < q_range.end; q0 += QUERIES) {
      Tile t;
      tile_of(a, b, h, q0, t);
      const int64_t qn = t.qn, NQ = t.NQ = round_up(qn, SIDE), place = q0 + a.k.size[2] - a.q.size[2];
      const int64_t begin = most(k_range.begin, t.begin() / KEYS * KEYS), end = least(k_range.end, t.end());
      if (begin >= end && !want_q) continue;
      const Matrix Q = matrix_of(a, a.q, b, h, q0, qn, place, Q_copy.at, room);
      const Matrix G = matrix_of(a, a.dout, b, h, q0, qn, -1, G_copy.at, room);
      transpose_pairs(Q, NQ, D, Qt), transpose_pairs(G, NQ, Dv, Gt);
      if (want_kv) pair_rows(Q, NQ, D, Q_pairs), pair_rows(G, NQ, Dv, G_pairs);
      for (int64_t n = 0; n < NQ; n += W) {
        vf sums[W] = {};
        for (int64_t i = 0; i < least(W, qn - n); i++)
          for (int64_t d = 0, stride = a.out.stride[3]; d < a.v.size[3]; d += W)
            sums[i] += read(a.out, at(a.out, b, h, q0 + n + i) + d * stride, stride, a.v.size[3] - d) *
                       from_bf16(G.from(n + i, d).at);
        store(delta + n, sum_lanes(sums));
        // +inf where nothing is seen, and in the lanes past qn: 2^(S - inf) = 0
        vf lses = read(a.lse, at(a.lse, b, h, q0 + n), a.lse.stride[2], qn - n) * LOG2_E;
        lses = lses == -INF ? splat(INF) : lses;
        store(lse + n, lane_numbers() < (int32_t)(qn - n) ? lses : splat(INF));
      }
      for (int64_t n = 0; want_q && n < D * NQ; n += W) store(dq + n, vf{});

      Squares products;
      for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
        const Block k = block_of(t, k0, end);
        const Sight sight = sight_of(a, t, k);
        if (sight == Sight::nothing) continue;
        put_scores(t, k, head.K.from(k0 - k_base, 0), Qt, D, s, products);
        Range seeing[KEYS / SIDE];  // the queries that see a square of keys
        for (Range& queries : seeing) queries = {QUERIES, 0};
        for (int64_t n = 0; n < NQ; n += SIDE) {
          const Range squares = squares_of(t, k, n);
          for (int64_t j = squares.begin; j < squares.end; j += SIDE) {  // (keys,Dv) x (Dv,queries) -> (keys,queries)
            products.put(head.V.from(k0 - k_base + j, 0), Gt.from(0, 2 * n), Dv, dp + j * NQ + n, NQ, false);
            seeing[j / SIDE] = {least(seeing[j / SIDE].begin, n), n + SIDE};
          }
        }
        products.begin_all();
        const float factor = finish_scores(a, t, k, sight, s, slope, room);
        amx_softmax_backward(t, k, s, dp, a.scores.softcap > 0 ? slope : nullptr, factor, lse, delta, rounded);
        for (int64_t j = 0; want_kv && j < k.kn; j += SIDE) {  // (keys,queries) x (queries,D) -> (keys,D), twice
          const Range queries = seeing[j / SIDE];
          const int64_t row = k0 - k_range.begin + j, n = queries.begin, depth = queries.end - queries.begin;
          for (int64_t d = 0; depth > 0 && d < Dv; d += SIDE)
            square(rounded.P.from(j, n), G_pairs.from(n / 2, 2 * d), depth, dv + row * Dv + d, Dv, true);
          for (int64_t d = 0; depth > 0 && d < D; d += SIDE)
            square(rounded.dS.from(j, n), Q_pairs.from(n / 2, 2 * d), depth, dk + row * D + d, D, true);
        }
        for (int64_t n = 0; want_q && n < NQ; n += SIDE) {
          const Range squares = squares_of(t, k, n);
          for (int64_t d = 0; squares.begin < squares.end && d < D; d += SIDE)  // (D,keys) x (keys,queries)
            square(head.Kt.from(d, k0 - k_base + squares.begin), rounded.dS_pairs.from(squares.begin / 2, 2 * n),
                   squares.end - squares.begin, dq + d * NQ + n, NQ, true);
        }
      }
      if (!want_q) continue;
      transpose_back(dq, NQ, D, room);
      if (turns(a)) turn(a, b, place, qn, room, -1);
      write_rows(room, D, a.scores.scale, a.dq, b, h, q0, qn);
    }

  if (want_kv && turns(a)) turn(a, b, k_range.begin, k_range.end - k_range.begin, dk, -1);
  if (!want_kv) return;
  write_rows(dk, D, a.scores.scale, a.dk, b, kv, k_range.begin, k_range.end - k_range.begin);
  write_rows(dv, Dv, 1, a.dv, b, kv, k_range.begin, k_range.end - k_range.begin);
}

INLINE int64_t amx_backward_floats(const Attention& a, int64_t keys) {
  const int64_t D = round_up(a.q.size[3], SIDE), Dv = round_up(a.v.size[3], SIDE);
  const int64_t tile = 3 * (D + Dv + KEYS) / 2 + D + 3 * KEYS + most(KEYS, most(D, Dv)) + 2;
  return tile * QUERIES + (D + Dv) * round_up(keys, SIDE);
}
static void amx_backward_heads(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t Hkv = a.k.size[1], G = a.q.size[1] / Hkv, Tk = a.k.size[2];
  ScratchBlock block(amx_backward_floats(a, Tk)), heads(keys_and_values_floats(a, Tk));
  const Unit unit;
  for (int64_t i = begin; i < end; i++) {
    const int64_t kv = i % Hkv;
    const KeysAndValues head = keys_and_values(a, i / Hkv, kv, {0, Tk}, true, false, heads.start());
    amx_backward_range(a, i / Hkv, {kv * G, kv * G + G}, {0, a.q.size[2]}, {0, Tk}, true, true, head, 0, block.start());
  }
}
static void amx_backward_keys(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t Hkv = a.k.size[1], G = a.q.size[1] / Hkv, blocks = (a.k.size[2] + KEYS - 1) / KEYS;
  ScratchBlock block(amx_backward_floats(a, KEYS)), heads(keys_and_values_floats(a, KEYS));
  const Unit unit;
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / blocks / Hkv, kv = i / blocks % Hkv, k0 = spread(i % blocks, blocks) * KEYS;
    const Range keys = {k0, least(a.k.size[2], k0 + KEYS)};
    const KeysAndValues head = keys_and_values(a, b, kv, keys, false, false, heads.start());
    amx_backward_range(a, b, {kv * G, kv * G + G}, {0, a.q.size[2]}, keys, false, true, head, k0, block.start());
  }
}
static void amx_backward_queries(void* context, int64_t begin, int64_t end) {
  const Attention& a = *(const Attention*)context;
  const int64_t H = a.q.size[1], Tk = a.k.size[2], tiles = (a.q.size[2] + QUERIES - 1) / QUERIES;
  ScratchBlock block(amx_backward_floats(a, 0)), heads(keys_and_values_floats(a, Tk));
  const Unit unit;
  KeysAndValues head;
  for (int64_t i = begin, at_head = -1; i < end; i++) {
    const int64_t b = i / tiles / H, h = i / tiles % H, kv = h / (H / a.k.size[1]);
    const int64_t q0 = spread(i % tiles, tiles) * QUERIES;
    if (at_head != b * a.k.size[1] + kv) head = keys_and_values(a, b, kv, {0, Tk}, true, false, heads.start());
    at_head = b * a.k.size[1] + kv;
    const Range queries = {q0, least(a.q.size[2], q0 + QUERIES)};
    amx_backward_range(a, b, {h, h + 1}, queries, {0, Tk}, true, false, head, 0, block.start());
  }
}
