// SPDX-License-Identifier: MIT
// y = x W^T + b for a weight W (O, C) that is held in few bits. For a few rows x (N, C) all of the time is reading W once.
// Two ways to multiply:
//
//     weight-only    the codes become floats in registers:            y_o = sum_c W_oc x_c
//     dynamic        x is rounded to 8-bit integers, x_c ~ t_g q_c,   y_o = s_o sum_g t_g sum_(c in g) code_oc q_c
//                    with t_g = max |x_c| / 127 of its group g of 32 columns; the inner sums are exact, in integers
//
// The second (as llama.cpp has it, too) does 4 products an instruction and lane where the first does one, on codes as they
// are read. A lane holds a few columns; W outputs at a time are worked on, so that the sums over their lanes cost one
// transposition. For many rows a lane is an output: see there.

typedef int8_t vc __attribute__((vector_size(MINIMAL_VECTOR_BYTES)));
typedef uint8_t vuc __attribute__((vector_size(MINIMAL_VECTOR_BYTES)));
typedef int16_t vs __attribute__((vector_size(MINIMAL_VECTOR_BYTES)));

constexpr int64_t GROUP = 32;        // columns
constexpr int GROUP_VECTORS = GROUP / W;
constexpr int BYTES = MINIMAL_VECTOR_BYTES;
constexpr int BESIDE = 4;  // outputs whose sums go side by side
constexpr float TINY = 1e-30f;       // a group of x below this counts as zero: its reciprocal must be finite

// ------------------------------------------------------------------------------------------------ reading

template <class V>
INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// A whole vector although only n bytes are wanted: what follows is arbitrary, but lies in the tensor, or is zero.
template <class V>
INLINE V load_over(const void* p, int64_t n, const void* end) {
  if ((const char*)p + sizeof(V) <= (const char*)end) return load_as<V>(p);
  alignas(64) char line[sizeof(V)] = {};
  for (int64_t i = 0; i < n && i < (int64_t)sizeof(V); i++) line[i] = ((const char*)p)[i];
  return load_as<V>(line);
}

// float16 -> float32.
INLINE vf from_half(vh h) {
#if MINIMAL_VECTOR_BYTES == 64
  vf f;
  asm("vcvtph2ps %1, %0" : "=v"(f) : "v"(h));
  return f;
#elif MINIMAL_VECTOR_BYTES == 32
  vf f;
  asm("vcvtph2ps %1, %0" : "=x"(f) : "x"(h));
  return f;
#else
  const vu u = __builtin_convertvector(h, vu), magnitude = u & 0x7fffu;
  const vf f = (vf)(magnitude << 13) * 0x1p112f;  // the exponent's bias is 15 there, 127 here; right for subnormals, too
  const vu bits = magnitude >= 0x7c00u ? (vu)f | 0x7f800000u : (vu)f;  // infinity and NaN
  return (vf)(bits | (u & 0x8000u) << 16);
#endif
}
INLINE vf half_everywhere(const uint16_t* p) { return from_half(vh{} + *p); }

// Lane i of table, for lanes 0 to 15 of `index`; higher bits of the index do not count.
INLINE vf look_up(const float* table, vi index) {
#if MINIMAL_VECTOR_BYTES == 64
  vf v;
  asm("vpermps %1, %2, %0" : "=v"(v) : "v"(load(table)), "v"(index));
  return v;
#elif MINIMAL_VECTOR_BYTES == 32
  vf low, high;
  asm("vpermps %1, %2, %0" : "=x"(low) : "x"(load(table)), "x"(index));
  asm("vpermps %1, %2, %0" : "=x"(high) : "x"(load(table + 8)), "x"(index));
  return (index & 8) != 0 ? high : low;
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = table[index[i] & 15];
  return v;
#endif
}

// W integers of fewer bits, in lanes. GCC takes __builtin_convertvector of bytes apart, element by element.
INLINE vi widen(const int8_t* p) {
  typedef int8_t few __attribute__((vector_size(W)));
#if MINIMAL_VECTOR_BYTES >= 32
  vi v;
  asm("vpmovsxbd %1, %0" : "=v"(v) : "m"(*(const few*)p));
  return v;
#else
  return __builtin_convertvector(load_as<few>(p), vi);
#endif
}
INLINE vi widen(const uint8_t* p) {
#if MINIMAL_VECTOR_BYTES >= 32
  vi v;
  asm("vpmovzxbd %1, %0" : "=v"(v) : "m"(*(const vb*)p));
  return v;
#else
  return __builtin_convertvector(load_as<vb>(p), vi);
#endif
}
INLINE vi widen(const uint16_t* p) {
#if MINIMAL_VECTOR_BYTES >= 32
  vi v;
  asm("vpmovzxwd %1, %0" : "=v"(v) : "m"(*(const vh*)p));
  return v;
#else
  return __builtin_convertvector(load_as<vh>(p), vi);
#endif
}
INLINE vf as_floats(vi v) { return __builtin_convertvector(v, vf); }

// One group of 32 columns of W as floats: columns 32 g to 32 g + 31 of output o. Past column C is anything finite.
struct Group {
  vf w[GROUP_VECTORS];
};
// The codes of a group; those of the last one, where it is not whole, from a copy in `line`.
template <class T>
INLINE const T* codes_of(const Weight& a, int64_t o, int64_t g, T (&line)[GROUP]) {
  const T* p = (const T*)a.codes + o * a.C + g * GROUP;
  if (__builtin_expect(p + GROUP <= (const T*)a.end, 1)) return p;
  for (int i = 0; i < GROUP; i++) line[i] = g * GROUP + i < a.C ? p[i] : T(0);
  return line;
}
struct Int8 {
  static INLINE_MEMBER Group read(const Weight& a, int64_t o, int64_t g) {
    int8_t line[GROUP];
    const int8_t* p = codes_of(a, o, g, line);
    Group to;
    UNROLL for (int i = 0; i < GROUP_VECTORS; i++) to.w[i] = as_floats(widen(p + i * W));
    return to;
  }
  static INLINE_MEMBER Group scaled(const Weight& a, int64_t o, int64_t g) {
    Group to = read(a, o, g);
    UNROLL for (int i = 0; i < GROUP_VECTORS; i++) to.w[i] *= a.scale[o];
    return to;
  }
  static INLINE_MEMBER vf scale(const Weight& a, int64_t o) { return load_over<vf>(a.scale + o, (a.O - o) * 4, a.scale + a.O); }
};
struct Unscaled {  // what is multiplied by its scales while it is read
  static INLINE_MEMBER vf scale(const Weight&, int64_t) { return splat(1); }
};
struct Int4 : Unscaled {
  static INLINE_MEMBER Group read(const Weight& a, int64_t o, int64_t g) {
    const int64_t at = o * ((a.C + GROUP - 1) / GROUP) + g;
    const vf scale = half_everywhere(a.scale16 + at), least = half_everywhere(a.least16 + at);
    const uint8_t* p = (const uint8_t*)a.codes + at * GROUP / 2;
    Group to;
    UNROLL for (int i = 0; i < GROUP_VECTORS / 2; i++) {  // column j and column j + 16 share a byte
      const vi both = widen(p + i * W);
      to.w[i] = as_floats(both & 15) * scale + least;
      to.w[i + GROUP_VECTORS / 2] = as_floats(both >> 4) * scale + least;
    }
    return to;
  }
  static INLINE_MEMBER Group scaled(const Weight& a, int64_t o, int64_t g) { return read(a, o, g); }
};
struct Nf4 : Unscaled {  // blocks of 64 of the flattened weight: two groups each, and no block reaches into the next row
  static INLINE_MEMBER Group read(const Weight& a, int64_t o, int64_t g) {
    const int64_t at = a.first * 2 + o * (a.C / GROUP) + g, block = at / 2;
    const float absmax = a.absmax[block] * a.scale[block / 256] + a.mean[0];
    const vf factor = splat(absmax > 0 ? absmax : 0);
    const uint8_t* p = (const uint8_t*)a.codes + at * GROUP / 2;
    Group to;
    UNROLL for (int i = 0; i < GROUP_VECTORS / 2; i++) {  // columns 2 j and 2 j + 1 share a byte
      const vi both = widen(p + i * W);
      const vf even = look_up(a.levels, both >> 4) * factor, odd = look_up(a.levels, both) * factor;
      to.w[2 * i] = zip_low(even, odd), to.w[2 * i + 1] = zip_high(even, odd);
    }
    return to;
  }
  static INLINE_MEMBER Group scaled(const Weight& a, int64_t o, int64_t g) { return read(a, o, g); }
};
struct F32Weight : Unscaled {
  static INLINE_MEMBER Group read(const Weight& a, int64_t o, int64_t g) {
    float line[GROUP];
    const float* p = codes_of(a, o, g, line);
    const int32_t left = (int32_t)(a.C - g * GROUP);
    Group to;
    UNROLL for (int i = 0; i < GROUP_VECTORS; i++) to.w[i] = load(p + i * W);
    if (left < GROUP)  // the next row's could be NaN
      UNROLL for (int i = 0; i < GROUP_VECTORS; i++) to.w[i] = lane_numbers() < left - i * W ? to.w[i] : vf{};
    return to;
  }
};
struct Bf16Weight : Unscaled {
  static INLINE_MEMBER Group read(const Weight& a, int64_t o, int64_t g) {
    uint16_t line[GROUP];
    const uint16_t* p = codes_of(a, o, g, line);
    const int32_t left = (int32_t)(a.C - g * GROUP);
    Group to;
    UNROLL for (int i = 0; i < GROUP_VECTORS; i++) to.w[i] = (vf)((vu)widen(p + i * W) << 16);
    if (left < GROUP)  // the next row's could be NaN
      UNROLL for (int i = 0; i < GROUP_VECTORS; i++) to.w[i] = lane_numbers() < left - i * W ? to.w[i] : vf{};
    return to;
  }
};

// ------------------------------------------------------------------------------------------------ integer products

// Products u * s of bytes, neighbours added up by twos, then by fours. u has no sign and is at most 128: 16 bits hold it.
INLINE vs dot_pairs(vc u, vc s) {
#if MINIMAL_VECTOR_BYTES == 32
  vs pairs;
  asm("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(u), "x"(s));
  return pairs;
#else
  return ((vs)u & 0xff) * ((vs)((vs)s << 8) >> 8) + (vs)((vs)u >> 8) * ((vs)s >> 8);
#endif
}
INLINE vi add_pairs(vs pairs) {
#if MINIMAL_VECTOR_BYTES == 32
  vi fours;
  asm("vpmaddwd %2, %1, %0" : "=x"(fours) : "x"(pairs), "x"(vs{} + 1));
  return fours;
#else
  return ((vi)((vi)pairs << 16) >> 16) + ((vi)pairs >> 16);
#endif
}
#if MINIMAL_VECTOR_BYTES == 64
INLINE vi dot_vnni(vi sum, vc u, vc s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
}
#endif
// u * s + v * t for u and v from 0 to 15, of which four products fit 16 bits.
INLINE vi dot_small(vc u, vc s, vc v, vc t) {
#if MINIMAL_VECTOR_BYTES == 64
  return dot_vnni(dot_vnni(vi{}, u, s), v, t);
#else
  return add_pairs(dot_pairs(u, s) + dot_pairs(v, t));
#endif
}
// w * x for signed bytes. The instructions take one operand without sign: with VNNI 128 is added to w, and 128 times the
// sum of x, which `start` holds, taken off; else the sign of w goes over to x.
INLINE vi dot_signed(vi start, vc w, vc x) {
#if MINIMAL_VECTOR_BYTES == 64
  return dot_vnni(start, w ^ (vc{} + (int8_t)-128), x);
#elif MINIMAL_VECTOR_BYTES == 32
  vc size, turned;
  asm("vpabsb %1, %0" : "=x"(size) : "x"(w));
  asm("vpsignb %2, %1, %0" : "=x"(turned) : "x"(x), "x"(w));
  return start + add_pairs(dot_pairs(size, turned));
#else
  const vs even = ((vs)((vs)w << 8) >> 8) * ((vs)((vs)x << 8) >> 8), odd = ((vs)w >> 8) * ((vs)x >> 8);
  return start + add_pairs(even + odd);
#endif
}
constexpr int64_t OUTPUTS = W;  // of a piece of work
constexpr int OFFSET = MINIMAL_VECTOR_BYTES == 64 ? 128 : 0;

// The scales of W groups, of which each quarter of a vector of codes has W / 4: first those with a remainder of 0 by W / 4,
// then 1, ...; and lane K of each four in all four of them.
INLINE vf by_remainder(vf v) {
#if MINIMAL_VECTOR_BYTES == 64
  return SHUFFLE(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#elif MINIMAL_VECTOR_BYTES == 32
  return SHUFFLE(v, v, 0, 2, 4, 6, 1, 3, 5, 7);
#else
  return v;
#endif
}
template <int K>
INLINE vf spread(vf v) {
#if MINIMAL_VECTOR_BYTES == 64
  constexpr int a = K + 4, b = K + 8, c = K + 12;
  return SHUFFLE(v, v, K, K, K, K, a, a, a, a, b, b, b, b, c, c, c, c);
#elif MINIMAL_VECTOR_BYTES == 32
  return SHUFFLE(v, v, K, K, K, K, K + 4, K + 4, K + 4, K + 4);
#else
  return SHUFFLE(v, v, K, K, K, K);
#endif
}

// ------------------------------------------------------------------------------------------------ x, prepared

struct Slice {  // for int8: as many columns as a vector has bytes
  vc q;
  vi start;  // -OFFSET times the sum of q of each lane
  vf scale;  // t of each lane
};
struct Block {  // for int4: W groups, a quarter of them in each vector of bytes
  vc low[4], high[4];
  vf scale, sum;  // of each group: t, and t times the sum of q
};

struct RowGroup {  // for many rows: beside the q of a row in order, of each group
  float scale, sum;  // t, and t times the sum of q
  int32_t start;     // -OFFSET times the sum of q
};

// q of one group, and its t: NaN where x is not finite, so that the result is NaN.
static float round_group(const float* x, int8_t* q) {
  vi largest = {};  // without a sign floats are ordered as their bits are, and past infinity is NaN
  UNROLL for (int i = 0; i < GROUP; i += W) {
    const vi size = (vi)load(x + i) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  UNROLL for (int n = 1; n < W; n *= 2) {
    const vi low = (vi)zip_low((vf)largest, (vf)largest), high = (vi)zip_high((vf)largest, (vf)largest);
    largest = low > high ? low : high;
  }
  const bool finite = largest[0] < 0x7f800000;
  const float most_of = ((vf)largest)[0], inverse = finite && most_of > TINY ? 127 / most_of : 0;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  alignas(64) int32_t line[GROUP];
  UNROLL for (int i = 0; i < GROUP; i += W) store((float*)line + i, load(x + i) * inverse + round);
  for (int i = 0; i < GROUP; i++) q[i] = (int8_t)line[i];
  return finite ? (most_of > TINY ? most_of / 127 : 0) : __builtin_nanf("");
}

// Row n of x as the products read it. `line` has room for a row of floats.
static void prepare(const Linear& a, int64_t n, float* line, char* to) {
  const Weight& w = a.weight;
  const int64_t C = w.C, used = round_up(C, a.many ? GROUP : GROUP * W);
  if (!a.dynamic) line = (float*)to;
  for (int64_t c = 0; c < C; c += W) store(line + c, read(a.x, n * a.x.stride[2] + c * a.x.stride[3], a.x.stride[3], C - c));
  for (int64_t c = C; c < used; c++) line[c] = 0;
  if (!a.dynamic) return;
  alignas(64) int8_t q[GROUP];
  for (int64_t c = 0; c < used; c += GROUP) {
    const float t = round_group(line + c, q);
    int32_t sum = 0;
    if (a.many) {
      for (int i = 0; i < GROUP; i++) sum += q[i];
      __builtin_memcpy(to + c, q, GROUP);
      ((RowGroup*)(to + used))[c / GROUP] = {t, t * sum, -OFFSET * sum};
    } else if (w.kind == Kind::int8)
      for (int i = 0; i < GROUP; i += BYTES < GROUP ? BYTES : GROUP) {
        Slice& s = ((Slice*)to)[(c + i) / BYTES];
        const int64_t n = least(BYTES, GROUP), at = (c + i) % BYTES;
        __builtin_memcpy((char*)&s.q + at, q + i, n);
        for (int64_t j = 0; j < n; j += 4) {
          ((float*)&s.scale)[(at + j) / 4] = t;
          if (OFFSET) ((int32_t*)&s.start)[(at + j) / 4] = -OFFSET * (q[i + j] + q[i + j + 1] + q[i + j + 2] + q[i + j + 3]);
        }
      }
    else {
      const int64_t g = c / GROUP % W;
      Block& b = ((Block*)to)[c / GROUP / W];
      __builtin_memcpy((char*)b.low + g * 16, q, 16);
      __builtin_memcpy((char*)b.high + g * 16, q + 16, 16);
      for (int i = 0; i < GROUP; i++) sum += q[i];
      ((float*)&b.scale)[g] = t, ((float*)&b.sum)[g] = t * sum;
    }
  }
}

// ------------------------------------------------------------------------------------------------ sums of W outputs

// sums[n][i] += the products of x's row n with output o[i], lane by lane, for M outputs.
template <int N, int M>
INLINE void add_slice(const char* x, int64_t next, int64_t slice, const vc (&w)[M], vf (&sums)[M][N]) {
  UNROLL for (int n = 0; n < N; n++) {
    const Slice& s = ((const Slice*)(x + n * next))[slice];
    UNROLL for (int i = 0; i < M; i++)
      sums[i][n] += as_floats(dot_signed(OFFSET ? s.start : vi{}, w[i], s.q)) * s.scale;
  }
}
template <int N, int M>
INLINE void add_int8(const Weight& a, const char* x, int64_t next, const int64_t (&o)[M], vf (&sums)[M][N]) {
  const int8_t* row[M];
  UNROLL for (int i = 0; i < M; i++) row[i] = (const int8_t*)a.codes + o[i] * a.C;
  vc w[M];
  int64_t c = 0;
  for (; c + BYTES <= a.C; c += BYTES) {
    UNROLL for (int i = 0; i < M; i++) w[i] = load_as<vc>(row[i] + c);
    add_slice<N, M>(x, next, c / BYTES, w, sums);
  }
  if (c < a.C) {
    for (int i = 0; i < M; i++) w[i] = load_over<vc>(row[i] + c, a.C - c, a.end);
    add_slice<N, M>(x, next, c / BYTES, w, sums);
  }
}

template <int K, int N>
INLINE void add_quarter(const Block* (&x)[N], vc codes, const vf (&scale)[N], vf (&sums)[N]) {
  const vc low = codes & 15, high = (vc)((vuc)codes >> 4);
  UNROLL for (int n = 0; n < N; n++)
    sums[n] += as_floats(dot_small(low, x[n]->low[K], high, x[n]->high[K])) * spread<K>(scale[n]);
}
// Adds W groups from number `at` on, or the `left` ones at the end of a row.
template <bool WHOLE, int N>
INLINE void add_groups(const Weight& a, const Block* (&x)[N], int64_t at, int64_t left, vf (&sums)[N]) {
  const char* p = (const char*)a.codes + at * 16;
  const uint16_t *scales = a.scale16 + at, *leasts = a.least16 + at;
  vf scale, least, of[N];
  if (WHOLE) scale = from_half(load_as<vh>(scales)), least = from_half(load_as<vh>(leasts));
  else {
    const auto there = lane_numbers() < (int32_t)left;
    const int64_t all = a.O * ((a.C + GROUP - 1) / GROUP);
    scale = there ? from_half(load_over<vh>(scales, left * 2, a.scale16 + all)) : vf{};
    least = there ? from_half(load_over<vh>(leasts, left * 2, a.least16 + all)) : vf{};
  }
  UNROLL for (int n = 0; n < N; n++) of[n] = by_remainder(scale * x[n]->scale), sums[n] += least * x[n]->sum;
  auto codes = [&](int k) { return WHOLE ? load_as<vc>(p + k * BYTES) : load_over<vc>(p + k * BYTES, left * 16 - k * BYTES, a.end); };
  add_quarter<0, N>(x, codes(0), of, sums);
  if (WHOLE || left > W / 4) add_quarter<1, N>(x, codes(1), of, sums);
  if (WHOLE || left > W / 2) add_quarter<2, N>(x, codes(2), of, sums);
  if (WHOLE || left > W / 4 * 3) add_quarter<3, N>(x, codes(3), of, sums);
}
template <int N, int M>
INLINE void add_int4(const Weight& a, const char* x, int64_t next, const int64_t (&o)[M], vf (&sums)[M][N]) {
  const int64_t G = (a.C + GROUP - 1) / GROUP;
  const Block* block[N];
  int64_t g = 0;
  for (; g + W <= G; g += W) {
    UNROLL for (int n = 0; n < N; n++) block[n] = (const Block*)(x + n * next) + g / W;
    UNROLL for (int i = 0; i < M; i++) add_groups<true, N>(a, block, o[i] * G + g, W, sums[i]);
  }
  if (g == G) return;
  UNROLL for (int n = 0; n < N; n++) block[n] = (const Block*)(x + n * next) + g / W;
  for (int i = 0; i < M; i++) add_groups<false, N>(a, block, o[i] * G + g, G - g, sums[i]);
}

template <class K, int N, int M>
INLINE void add_floats(const Weight& a, const char* x, int64_t next, const int64_t (&o)[M], vf (&sums)[M][N]) {
  const int64_t G = (a.C + GROUP - 1) / GROUP;
  for (int64_t g = 0; g < G; g++) {
    UNROLL for (int i = 0; i < M; i++) {
      const Group w = K::read(a, o[i], g);
      UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int j = 0; j < GROUP_VECTORS; j++)
          sums[i][n] += w.w[j] * load((const float*)(x + n * next) + g * GROUP + j * W);
    }
  }
}

// N rows of x from row n on, with M times W outputs: those from o, o + far, ...
template <class K, bool DYNAMIC, int N, int M>
static void outputs(const Linear& a, const char* x, int64_t next, int64_t n, int64_t o, int64_t far) {
  const Weight& w = a.weight;
  vf part[M][N][W];
  for (int i = 0; i < W; i++) {
    vf sums[M][N] = {};
    int64_t at[M];
    UNROLL for (int j = 0; j < M; j++) at[j] = least(o + j * far + i, w.O - 1);
    if constexpr (!DYNAMIC) add_floats<K, N, M>(w, x, next, at, sums);
    else if constexpr (__is_same(K, Int8)) add_int8<N, M>(w, x, next, at, sums);
    else add_int4<N, M>(w, x, next, at, sums);
    UNROLL for (int m = 0; m < N; m++)
      UNROLL for (int j = 0; j < M; j++) part[j][m][i] = sums[j][m];
  }
  for (int j = 0; j < M; j++, o += far) {
    const vf scale = K::scale(w, o);
    const vf bias = a.bias.data ? read(a.bias, o * a.bias.stride[3], a.bias.stride[3], w.O - o) : vf{};
    UNROLL for (int m = 0; m < N; m++) write(a.out, (n + m) * w.O + o, 1, w.O - o, sum_lanes(part[j][m]) * scale + bias);
  }
}
template <class K, bool DYNAMIC, int M>
static void all_rows(const Linear& a, int64_t o, int64_t far) {
  const int64_t next = a.next;
  for (int64_t n = 0; n < a.rows; n += 4) {
    const char* x = a.prepared + n * next;
    const int64_t rows = least(4, a.rows - n), m = a.row + n;
    if (rows == 1) outputs<K, DYNAMIC, 1, M>(a, x, next, m, o, far);
    if (rows == 2) outputs<K, DYNAMIC, 2, M>(a, x, next, m, o, far);
    if (rows == 3) outputs<K, DYNAMIC, 3, M>(a, x, next, m, o, far);
    if (rows == 4) outputs<K, DYNAMIC, 4, M>(a, x, next, m, o, far);
  }
}
// A processor fetches several rows far apart, each on to the next, sooner than it does one row after the other: so the
// pieces of a range are not worked on in order, but one from each quarter side by side.
template <class K, bool DYNAMIC>
static void all_outputs(const Linear& a, int64_t begin, int64_t end) {
  const int64_t far = (end - begin) / BESIDE, rest = begin + far * BESIDE;
  for (int64_t i = begin; i < begin + far; i++) all_rows<K, DYNAMIC, BESIDE>(a, i * W, far * W);
  for (int64_t i = rest; i < end; i++) all_rows<K, DYNAMIC, 1>(a, i * W, 0);
}

// ------------------------------------------------------------------------------------------------ many rows of integers

// Here a lane is an output: the sum over a group stays in integers and needs one conversion for 32 products, so that this
// is faster than a product of floats. W outputs are laid out for it first, four columns of each side by side, which pays
// from MANY rows on. With AVX2 a few rows of x go with twice W outputs, as four columns of x have to be loaded into all
// lanes first, which VNNI does by itself.
#if MINIMAL_VECTOR_BYTES >= 32
constexpr int TILE = MINIMAL_VECTOR_BYTES == 64 ? 12 : 3;  // rows of x side by side
constexpr int ACROSS = MINIMAL_VECTOR_BYTES == 64 ? 1 : 2;  // with so many times W outputs
struct Laid {
  vc* codes;          // C/4 of them: byte 4 j + i of number k is the code of output j and column 4 k + i
  vf *scale, *least;  // of each group, for int4
};

template <bool INT4>
static void lay_out(const Weight& a, int64_t o, const Laid& to) {
  const int64_t G = (a.C + GROUP - 1) / GROUP;
  vf r[W], high[W];
  if constexpr (!INT4) {
    for (int64_t c = 0; c < a.C; c += BYTES) {
      for (int j = 0; j < W; j++) {
        const int8_t* p = (const int8_t*)a.codes + least(o + j, a.O - 1) * a.C + c;
        r[j] = (vf)(load_over<vc>(p, a.C - c, a.end) ^ (vc{} + (int8_t)OFFSET));
      }
      transpose(r);
      for (int j = 0; j < W; j++) to.codes[c / 4 + j] = (vc)r[j];
    }
  } else {
    for (int64_t g = 0; g < G; g += W / 4) {
      for (int j = 0; j < W; j++) {
        const char* p = (const char*)a.codes + (least(o + j, a.O - 1) * G + g) * 16;
        const vc both = load_over<vc>(p, (G - g) * 16, a.end);
        r[j] = (vf)(both & 15), high[j] = (vf)((vc)((vuc)both >> 4));
      }
      transpose(r), transpose(high);
      for (int j = 0; j < W; j++) {
        vc* group = to.codes + (g + j / 4) * 8 + j % 4;
        group[0] = (vc)r[j], group[4] = (vc)high[j];
      }
    }
    for (int which = 0; which < 2; which++) {
      const uint16_t* from = which ? a.least16 : a.scale16;
      vf* into = which ? to.least : to.scale;
      for (int64_t g = 0; g < G; g += W) {
        for (int j = 0; j < W; j++) {
          const uint16_t* p = from + least(o + j, a.O - 1) * G + g;
          r[j] = from_half(load_over<vh>(p, (G - g) * 2, from + a.O * G));
        }
        transpose(r);
        for (int j = 0; j < W; j++) into[g + j] = g + j < G ? r[j] : vf{};
      }
    }
  }
}

// N rows of x with M times W outputs.
template <bool INT4, int N, int M>
static void tile(const Linear& a, const Laid (&w)[ACROSS], int64_t o, int64_t row) {
  const int64_t next = a.next, G = (a.weight.C + GROUP - 1) / GROUP;
  const char* x = a.prepared + row * next;
  const RowGroup* group = (const RowGroup*)(x + G * GROUP);
  vf sums[M][N] = {};
  for (int64_t g = 0; g < G; g++, x += GROUP, group++) {
    auto of_row = [&](int n) { return *(const RowGroup*)((const char*)group + n * next); };
    vi dots[M][N];
#if MINIMAL_VECTOR_BYTES == 64
    UNROLL for (int n = 0; n < N; n++)
      UNROLL for (int m = 0; m < M; m++) dots[m][n] = INT4 ? vi{} : vi{} + of_row(n).start;
    UNROLL for (int k = 0; k < 8; k++)
      UNROLL for (int m = 0; m < M; m++) {
        const vc codes = w[m].codes[g * 8 + k];
        UNROLL for (int n = 0; n < N; n++)
          asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(dots[m][n]) : "v"(codes), "m"(*(const int32_t*)(x + n * next + 4 * k)));
      }
#else
    vs pairs[M][N] = {};
    if (!INT4) UNROLL for (int n = 0; n < N; n++) UNROLL for (int m = 0; m < M; m++) dots[m][n] = vi{};
    UNROLL for (int k = 0; k < 8; k++)
      UNROLL for (int n = 0; n < N; n++) {
        const vc four = (vc)(vi{} + load_as<int32_t>(x + n * next + 4 * k));
        UNROLL for (int m = 0; m < M; m++) {
          if constexpr (INT4) {
            pairs[m][n] += dot_pairs(w[m].codes[g * 8 + k], four);
            asm("" : "+x"(pairs[m][n]));  // or GCC would add later, and spill until then
          } else {
            dots[m][n] = dot_signed(dots[m][n], w[m].codes[g * 8 + k], four);
            asm("" : "+x"(dots[m][n]));
          }
        }
      }
    if (INT4) UNROLL for (int n = 0; n < N; n++) UNROLL for (int m = 0; m < M; m++) dots[m][n] = add_pairs(pairs[m][n]);
#endif
    UNROLL for (int n = 0; n < N; n++) {
      const RowGroup t = of_row(n);
      UNROLL for (int m = 0; m < M; m++) {
        const vf dot = as_floats(dots[m][n]);
        sums[m][n] += (INT4 ? dot * w[m].scale[g] : dot) * t.scale;
        if (INT4) sums[m][n] += w[m].least[g] * t.sum;
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++, o += W) {
    const vf scale = INT4 ? splat(1) : Int8::scale(a.weight, o);
    const vf bias = a.bias.data ? read(a.bias, o * a.bias.stride[3], a.bias.stride[3], a.weight.O - o) : vf{};
    UNROLL for (int n = 0; n < N; n++)
      write(a.out, (a.row + row + n) * a.weight.O + o, 1, a.weight.O - o, sums[m][n] * scale + bias);
  }
}
template <bool INT4, int M>
static void with_all_rows(const Linear& a, const Laid (&laid)[ACROSS], int64_t o) {
  int64_t n = 0;
  for (int m = 0; m < M; m++) lay_out<INT4>(a.weight, o + m * W, laid[m]);
  for (; n + TILE <= a.rows; n += TILE) tile<INT4, TILE, M>(a, laid, o, n);
  for (; n + 3 <= a.rows; n += 3) tile<INT4, 3, M>(a, laid, o, n);
  for (; n < a.rows; n++) tile<INT4, 1, M>(a, laid, o, n);
}
template <bool INT4>
static void many_outputs(const Linear& a, int64_t begin, int64_t end) {
  const int64_t wide = round_up(a.weight.C, ROW), constants = wide / GROUP * W;
  ScratchBlock block(ACROSS * (wide * W / 4 + 2 * constants));  // wide / 4 vectors of codes, and of each group two
  Scratch scratch = block.start();
  Laid laid[ACROSS];
  for (Laid& l : laid) l = {(vc*)scratch.take(wide * W / 4), (vf*)scratch.take(constants), (vf*)scratch.take(constants)};
  int64_t i = begin;
  for (; i + ACROSS <= end; i += ACROSS) with_all_rows<INT4, ACROSS>(a, laid, i * W);
  for (; i < end; i++) with_all_rows<INT4, 1>(a, laid, i * W);
}
#endif

// Rows a.row to a.row + a.rows of x, made ready; then all outputs for them, W at a time.
static void linear_prepare(void* context, int64_t begin, int64_t end) {
  const Linear& a = *(const Linear*)context;
  ScratchBlock line(round_up(a.weight.C, ROW));
  for (int64_t n = begin; n < end; n++) prepare(a, a.row + n, line.start().next, a.prepared + n * a.next);
}
static void linear_outputs(void* context, int64_t begin, int64_t end) {
  const Linear& a = *(const Linear*)context;
#if MINIMAL_VECTOR_BYTES >= 32
  if (a.many) return a.weight.kind == Kind::int8 ? many_outputs<false>(a, begin, end) : many_outputs<true>(a, begin, end);
#endif
  switch (a.weight.kind) {
    case Kind::int8: return a.dynamic ? all_outputs<Int8, true>(a, begin, end) : all_outputs<Int8, false>(a, begin, end);
    case Kind::int4: return a.dynamic ? all_outputs<Int4, true>(a, begin, end) : all_outputs<Int4, false>(a, begin, end);
    case Kind::nf4: return all_outputs<Nf4, false>(a, begin, end);
    case Kind::bf16: return all_outputs<Bf16Weight, false>(a, begin, end);
    case Kind::f32: return all_outputs<F32Weight, false>(a, begin, end);
  }
}

// ------------------------------------------------------------------------------------------------ W itself

// Groups [begin, end) of all outputs laid end to end.
template <class K>
static void unpack_as(const Unpack& a, int64_t begin, int64_t end) {
  const Weight& w = a.weight;
  const int64_t G = (w.C + GROUP - 1) / GROUP;
  int64_t o = begin / G, g = begin % G;
  for (int64_t i = begin; i < end; i++) {
    const Group from = K::scaled(w, o, g);
    const int64_t at = o * w.C + g * GROUP, left = w.C - g * GROUP;
    UNROLL for (int j = 0; j < GROUP_VECTORS; j++)
      if (j * W < left) write(a.out, at + j * W, 1, left - j * W, from.w[j]);
    if (++g == G) g = 0, o++;
  }
}
static void unpack_groups(void* context, int64_t begin, int64_t end) {
  const Unpack& a = *(const Unpack*)context;
  switch (a.weight.kind) {
    case Kind::int8: return unpack_as<Int8>(a, begin, end);
    case Kind::int4: return unpack_as<Int4>(a, begin, end);
    case Kind::nf4: return unpack_as<Nf4>(a, begin, end);
    case Kind::bf16:
    case Kind::f32: return;
  }
}
