// SPDX-License-Identifier: MIT
// Attention of a single query over many keys: all of the time is reading K and V once, so here a vector holds W
// coordinates of one key, and the query heads that share K and V take what was read from the first-level cache.
//
//     per chunk of keys, in blocks of KEYS:    s_j = K_j q     p = exp(s - m)     O += p_j V_j
//     then, over the chunks c of a head:       O = sum_c exp(m_c - m) O_c / sum_c exp(m_c - m) l_c
//
// The second line is what lets several threads share one head: Dao et al. 2023, "Flash-Decoding".

constexpr int64_t KEYS = 128;   // of a block
constexpr int64_t AHEAD = 32;   // keys that are fetched before their turn
constexpr float INF = __builtin_inff();

// The place of element d in the order of load_two(), in which q and O are kept.
template <class E>
INLINE int64_t place(int64_t d) {
  const int64_t in = d % (2 * W);
  return sizeof(E) == 4 ? d : d - in + in % 2 * W + in / 2;
}

// While a block is worked on, the next one has to be on its way: the processor would not look that far ahead.
INLINE void fetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i);
}

// s[g][j] = K_j q_g for n keys and NG query heads, W keys at a time: part[g][i] holds parts of key i's sum. A few keys go
// side by side, so that an element of q, once loaded, serves them all.
constexpr int BESIDE = MINIMAL_VECTOR_REGISTERS == 32 ? 4 : 2;
template <int NG, class E>
static void scores_of(const float* q, const E* K, int64_t row, int64_t n, int64_t D, bool fetch, float* s) {
  for (int64_t j = 0; j < n; j += W) {
    vf part[NG][W];
    for (int i = 0; i < W; i += BESIDE) {
      const E* key[BESIDE];
      UNROLL for (int c = 0; c < BESIDE; c++) {
        key[c] = K + least(j + i + c, n - 1) * row;
        if (fetch) fetch_row(key[c] + AHEAD * row, D * sizeof(E));
      }
      vf sums[NG][BESIDE] = {};
      for (int64_t d = 0; d < D; d += 2 * W) {
        Two k[BESIDE];
        UNROLL for (int c = 0; c < BESIDE; c++) k[c] = load_two(key[c] + d);
        UNROLL for (int g = 0; g < NG; g++) {
          const vf a = load(q + g * D + d), b = load(q + g * D + d + W);
          UNROLL for (int c = 0; c < BESIDE; c++) sums[g][c] += k[c].a * a;
          UNROLL for (int c = 0; c < BESIDE; c++) sums[g][c] += k[c].b * b;
        }
      }
      UNROLL for (int g = 0; g < NG; g++)
        UNROLL for (int c = 0; c < BESIDE; c++) part[g][i + c] = sums[g][c];
    }
    UNROLL for (int g = 0; g < NG; g++) store(s + g * KEYS + j, sum_lanes(part[g]));
  }
}

// O_g (Dv) += sum_j p[g][j] V_j for NG query heads, 2 N vectors at a time; the heads' O lie `next` apart.
template <int NG, int N, class E>
INLINE void weighted_columns(const float* p, const E* V, int64_t row, int64_t n, bool fetch, float* o, int64_t next) {
  vf sums[NG][2 * N];
  UNROLL for (int g = 0; g < NG; g++)
    UNROLL for (int i = 0; i < 2 * N; i++) sums[g][i] = load(o + g * next + i * W);
  for (int64_t j = 0; j < n; j++) {
    if (fetch) fetch_row(V + (j + AHEAD) * row, 2 * N * W * sizeof(E));
    UNROLL for (int i = 0; i < N; i++) {
      const Two v = load_two(V + j * row + 2 * i * W);
      UNROLL for (int g = 0; g < NG; g++)
        sums[g][2 * i] += p[g * KEYS + j] * v.a, sums[g][2 * i + 1] += p[g * KEYS + j] * v.b;
    }
  }
  UNROLL for (int g = 0; g < NG; g++)
    UNROLL for (int i = 0; i < 2 * N; i++) store(o + g * next + i * W, sums[g][i]);
}
template <int NG, class E>
static void weighted(const float* p, const E* V, int64_t row, int64_t n, int64_t Dv, bool fetch, float* o, int64_t next) {
  int64_t d = 0;
  for (; d + 4 * W <= Dv; d += 4 * W) weighted_columns<NG, 2>(p, V + d, row, n, fetch, o + d, next);
  for (; d < Dv; d += 2 * W) weighted_columns<NG, 1>(p, V + d, row, n, fetch, o + d, next);
}

// Soft cap, slopes and mask on the scores of head h with keys k0 to k0 + n; what lies past them becomes -inf.
static void adjust(const Decode& a, int64_t b, int64_t h, int64_t k0, int64_t n, float* s) {
  const Scores& z = a.scores;
  const float alibi = z.slopes.data ? read(z.slopes, at(z.slopes, b, h, 0), 0, 1)[0] : 0;
  const int64_t mask = at(z.mask, b, h, 0) + k0 * z.mask.stride[3];
  for (int64_t j = 0; j < n; j += W) {
    vf x = load(s + j);
    if (z.softcap > 0) x = tanh(x * (1 / z.softcap)) * z.softcap;
    if (z.slopes.data) x -= alibi * __builtin_convertvector((int32_t)(a.k.size[2] - 1 - k0 - j) - lane_numbers(), vf);
    if (z.mask.data) {
      const vf m = read(z.mask, mask + j * z.mask.stride[3], z.mask.stride[3], n - j);
      x = m == -INF ? m : x + m;  // what is hidden may be NaN
    }
    store(s + j, lane_numbers() < (int32_t)(n - j) ? x : splat(-INF));
  }
}

// One online-softmax step of one head: s becomes p; m and l go on, and O shrinks to the new maximum.
static void softmax_step(float* s, int64_t n, float& m, float& l, float* o, int64_t Dv) {
  vf largest = splat(m), sums = {};
  for (int64_t j = 0; j < n; j += W) largest = maximum(load(s + j), largest);
  const float most_of = largest_lane(largest), shift = most_of == -INF ? 0 : most_of;  // -inf - -inf would be NaN
  for (int64_t j = 0; j < n; j += W) {
    const vf p = exp(load(s + j) - shift);
    store(s + j, p);
    sums += p;
  }
  const float alpha = exp(splat(m - shift))[0];
  m = most_of, l = l * alpha + sum_lanes(sums);
  if (alpha != 1)
    for (int64_t d = 0; d < Dv; d += W) store(o + d, load(o + d) * alpha);
}

// Keys [begin, end) and NG query heads from h on.
template <int NG, class E>
static void decode_heads(const Decode& a, int64_t b, int64_t h, int64_t begin, int64_t end, bool fetch, float* q,
                         float* part) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], kv = h / (a.q.size[1] / a.k.size[1]), next = HEADER + Dv;
  alignas(64) float s[NG * KEYS], line[W];
  for (int64_t g = 0; g < NG; g++) {
    part[g * next] = -INF, part[g * next + 1] = 0;
    for (int64_t d = 0; d < Dv; d++) part[g * next + HEADER + d] = 0;
    for (int64_t d = 0; d < D; d += W) {
      store(line, a.scores.scale * read(a.q, at(a.q, b, h + g, 0) + d * a.q.stride[3], a.q.stride[3], D - d));
      for (int64_t i = 0; i < W; i++) q[g * D + place<E>(d + i)] = line[i];
    }
  }
  for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
    const int64_t n = least(KEYS, end - k0);
    const E *K = (const E*)a.k.data + at(a.k, b, kv, k0), *V = (const E*)a.v.data + at(a.v, b, kv, k0);
    scores_of<NG>(q, K, a.k.stride[2], n, D, fetch, s);
    for (int64_t g = 0; g < NG; g++) {
      float* to = part + g * next;
      adjust(a, b, h + g, k0, n, s + g * KEYS);
      softmax_step(s + g * KEYS, n, to[0], to[1], to + HEADER, Dv);
    }
    weighted<NG>(s, V, a.v.stride[2], n, Dv, fetch, part + HEADER, next);
  }
}
// Up to four heads at a time take a key from the registers it was read into.
template <class E>
static void decode_chunk(const Decode& a, int64_t b, int64_t kv, int64_t begin, int64_t end, float* q, float* part) {
  const int64_t G = a.q.size[1] / a.k.size[1], next = HEADER + a.v.size[3];
  for (int64_t g = 0; g < G; g += 4) {
    const int64_t heads = least(4, G - g), h = kv * G + g;
    if (heads == 1) decode_heads<1, E>(a, b, h, begin, end, !g, q, part + g * next);
    if (heads == 2) decode_heads<2, E>(a, b, h, begin, end, !g, q, part + g * next);
    if (heads == 3) decode_heads<3, E>(a, b, h, begin, end, !g, q, part + g * next);
    if (heads == 4) decode_heads<4, E>(a, b, h, begin, end, !g, q, part + g * next);
  }
}

static void decode_chunks(void* context, int64_t begin, int64_t end) {
  const Decode& a = *(const Decode*)context;
  const int64_t D = a.q.size[3], Dv = a.v.size[3], Tk = a.k.size[2], Hkv = a.k.size[1], G = a.q.size[1] / Hkv;
  const int64_t chunks = (Tk + CHUNK - 1) / CHUNK;
  const int64_t first = a.scores.window ? most(0, Tk - a.scores.window) : 0;  // the query stands at the last key
  ScratchBlock block(4 * D);
  float* q = block.start().next;
  for (int64_t i = begin; i < end; i++) {
    const int64_t b = i / chunks / Hkv, kv = i / chunks % Hkv, k0 = i % chunks * CHUNK, k1 = least(Tk, k0 + CHUNK);
    float* part = a.parts + i * G * (HEADER + Dv);
    if (a.k.type == Type::bf16) decode_chunk<Bf16>(a, b, kv, least(most(k0, first), k1), k1, q, part);
    else decode_chunk<float>(a, b, kv, least(most(k0, first), k1), k1, q, part);
  }
}

static void decode_joins(void* context, int64_t begin, int64_t end) {
  const Decode& a = *(const Decode*)context;
  const int64_t Dv = a.v.size[3], Hkv = a.k.size[1], G = a.q.size[1] / Hkv;
  const int64_t chunks = (a.k.size[2] + CHUNK - 1) / CHUNK, head = G * (HEADER + Dv);
  ScratchBlock block(Dv);
  float* o = block.start().next;
  alignas(64) float line[W];
  for (int64_t i = begin; i < end; i++)
    for (int64_t g = 0; g < G; g++) {
      const float* part = a.parts + i * chunks * head + g * (HEADER + Dv);
      float m = -INF, l = 0;
      for (int64_t c = 0; c < chunks; c++) m = part[c * head] > m ? part[c * head] : m;
      for (int64_t d = 0; d < Dv; d++) o[d] = 0;
      for (int64_t c = 0; c < chunks; c++) {
        const float* of = part + c * head;
        const float factor = of[1] == 0 ? 0 : exp(splat(of[0] - m))[0];
        l += factor * of[1];
        for (int64_t d = 0; d < Dv; d += W) store(o + d, load(o + d) + factor * load(of + HEADER + d));
      }
      const int64_t b = i / Hkv, h = i % Hkv * G + g;
      const float inverse = l == 0 ? 0 : 1 / l;
      for (int64_t d = 0; d < Dv; d += W) {
        for (int64_t i = 0; i < W; i++) line[i] = o[a.v.type == Type::bf16 ? place<Bf16>(d + i) : d + i];
        write(a.out, at(a.out, b, h, 0) + d * a.out.stride[3], a.out.stride[3], Dv - d, load(line) * inverse);
      }
      *((float*)a.lse.data + at(a.lse, b, h, 0)) = l == 0 ? -INF : l == l ? m + log(splat(l))[0] : l;
    }
}
