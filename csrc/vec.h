// SPDX-License-Identifier: MIT
// Vectors of W floats, written with the vector extensions of GCC and Clang. No include guard: every_isa.h includes this
// once per instruction set, inside a namespace.

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

constexpr int W = MINIMAL_VECTOR_BYTES / 4;
typedef float vf __attribute__((vector_size(MINIMAL_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(MINIMAL_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(MINIMAL_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(MINIMAL_VECTOR_BYTES / 2)));
typedef uint8_t vb __attribute__((vector_size(MINIMAL_VECTOR_BYTES / 4)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);  // one unaligned load
  return v;
}
INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
// Past the caches, for results too large to stay in them: nothing is read before it is overwritten. p is aligned to W
// floats. Other threads may read what a thread streamed once it has called end_stream().
INLINE void stream(float* p, vf v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, (vf*)p);
#elif MINIMAL_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(p, v);
#elif MINIMAL_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(p, v);
#elif defined(__SSE__)
  __builtin_ia32_movntps(p, v);
#else
  store(p, v);
#endif
}
INLINE void end_stream() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}
INLINE vf splat(float x) { return x - vf{}; }

// Called as maximum(new, so far): a NaN in `new` is dropped here, and comes back through exp.
INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

#if MINIMAL_VECTOR_BYTES == 64
INLINE vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE vf zip_low(vf a, vf b) { return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
INLINE vf zip_high(vf a, vf b) { return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
INLINE vf evens(vf a, vf b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
INLINE vf odds(vf a, vf b) { return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
#elif MINIMAL_VECTOR_BYTES == 32
INLINE vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7}; }
INLINE vf zip_low(vf a, vf b) { return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE vf zip_high(vf a, vf b) { return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
INLINE vf evens(vf a, vf b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
INLINE vf odds(vf a, vf b) { return SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#else
INLINE vi lane_numbers() { return vi{0, 1, 2, 3}; }
INLINE vf zip_low(vf a, vf b) { return SHUFFLE(a, b, 0, 4, 1, 5); }
INLINE vf zip_high(vf a, vf b) { return SHUFFLE(a, b, 2, 6, 3, 7); }
INLINE vf evens(vf a, vf b) { return SHUFFLE(a, b, 0, 2, 4, 6); }
INLINE vf odds(vf a, vf b) { return SHUFFLE(a, b, 1, 3, 5, 7); }
#endif

// All lanes summed or compared: each step halves the number of different ones.
INLINE float sum_lanes(vf v) {
  UNROLL for (int n = 1; n < W; n *= 2) v = zip_low(v, v) + zip_high(v, v);
  return v[0];
}
INLINE float largest_lane(vf v) {
  UNROLL for (int n = 1; n < W; n *= 2) v = maximum(zip_low(v, v), zip_high(v, v));
  return v[0];
}
// The same for W vectors at once, lane i for r[i], in the same order of additions.
INLINE vf sum_lanes(vf (&r)[W]) {
  UNROLL for (int step = W / 2; step > 0; step /= 2)
    UNROLL for (int i = 0; i < step; i++) r[i] = zip_low(r[i], r[i + step]) + zip_high(r[i], r[i + step]);
  return r[0];
}
INLINE vf largest_lane(vf (&r)[W]) {
  UNROLL for (int step = W / 2; step > 0; step /= 2)
    UNROLL for (int i = 0; i < step; i++) r[i] = maximum(zip_low(r[i], r[i + step]), zip_high(r[i], r[i + step]));
  return r[0];
}

// r[i][j] <-> r[j][i]: log2(W) perfect shuffles.
INLINE void transpose(vf (&r)[W]) {
  UNROLL for (int step = 1; step < W; step *= 2) {
    vf t[W];
    UNROLL for (int i = 0; i < W / 2; i++) {
      t[2 * i] = zip_low(r[i], r[i + W / 2]);
      t[2 * i + 1] = zip_high(r[i], r[i + W / 2]);
    }
    UNROLL for (int i = 0; i < W; i++) r[i] = t[i];
  }
}

// exp(x) for x <= 88: 2^n exp(r) with n = round(x / ln 2), |r| <= ln(2) / 2, and a polynomial of degree 6 for exp(r)
// (our own minimax fit of the relative error). At most 1.1 ulp, 1.4 without fused multiply-add; results below the
// smallest normal number are 0; NaN stays NaN.
INLINE vf exp(vf x) {
  // 1.5 * 2^23 + 127: adding it rounds to an integer and leaves that plus 127, as exponents are written, in the low bits
  const float round = 12583039.0f;
  vf shifted = x * 1.44269504f + round;
  vf n = shifted - round;
  vf r = x - n * 0.693359375f;  // ln 2 in two parts: n times the first is exact
  r = r - n * -2.12194440e-4f;
  vf p = r * 0.00138436349f + 0.00837417152f;
  p = p * r + 0.0416680031f;
  p = p * r + 0.166664311f;
  p = p * r + 0.499999942f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  p *= (vf)((vu)shifted << 23);                // 2^n, made in the exponent field
  return x < -87.33654f ? vf{} : p;            // the comparison is false for NaN, and p is NaN then
}

// 2^t to 3e-6, a hundredth of what rounding to bfloat16 adds: a power of two times a polynomial of degree 4 (our own
// minimax fits) in what is left of t. In AVX-512 both steps are single operations, right for -inf as well.
INLINE vf power_of_two_for_bf16(vf t) {
#if MINIMAL_VECTOR_BYTES == 64
  vf r, p;
  asm("vreduceps $1, %1, %0" : "=v"(r) : "v"(t));  // t - floor(t)
  p = r * 0.013534168f + 0.0520114611f;
  p = p * r + 0.241442756f;
  p = p * r + 0.693003835f;
  p = p * r + 1.00000259f;
  asm("vscalefps %1, %0, %0" : "+v"(p) : "v"(t));  // times 2^floor(t)
  return p;
#else
  const float round = 12583039.0f;  // as in exp
  const vf shifted = t + round, r = t - (shifted - round);
  vf p = r * 0.009582853f + 0.055906426f;
  p = p * r + 0.24024099f;
  p = p * r + 0.6931242f;
  p = p * r + 1.0f;
  return p * (vf)((vu)shifted << 23);
#endif
}
INLINE vf exp_for_bf16(vf x) { return x < -87.33654f ? vf{} : power_of_two_for_bf16(x * 1.44269504f); }

// log(x) for normal x: x = 2^e f with f in [sqrt(1/2), sqrt(2)], log f = 2 atanh(s) for s = (f - 1) / (f + 1).
INLINE vf log(vf x) {
  vi e = ((vi)x - 0x3f3504f3) >> 23;
  vf f = (vf)((vi)x - (vi)((vu)e << 23));
  vf s = (f - 1.0f) / (f + 1.0f), s2 = s * s;
  vf p = s2 * (2.0f / 9) + (2.0f / 7);
  p = p * s2 + (2.0f / 5);
  p = p * s2 + (2.0f / 3);
  p = p * s2 + 2.0f;
  return __builtin_convertvector(e, vf) * 0.693147181f + p * s;
}

// tanh: odd polynomial below 0.625 (our own minimax fit), from exp above. At most 2 ulp.
INLINE vf tanh(vf x) {
  const vf size = x < 0.0f ? -x : x, z = x * x;
  vf p = z * -0.00570498453f + 0.0206390843f;
  p = p * z - 0.0537397154f;
  p = p * z + 0.133314416f;
  p = p * z - 0.333332807f;
  const vf large = 1.0f - 2.0f / (exp(2.0f * (size > 10.0f ? splat(10.0f) : size)) + 1.0f);
  return size < 0.625f ? x + x * z * p : x < 0.0f ? -large : large;
}

INLINE vf from_bf16(const void* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
// To nearest, ties to even, in the upper half; the lower is not cleared. Rounding could carry a NaN into infinity: it is
// kept, quiet.
INLINE vu round_to_bf16(vf v) {
  const vu u = (vu)v;
  return v == v ? u + 0x7fffu + ((u >> 16) & 1u) : u | 0x400000u;
}
INLINE void to_bf16(void* p, vf v) {
  vh h = __builtin_convertvector(round_to_bf16(v) >> 16, vh);
  __builtin_memcpy(p, &h, sizeof h);
}
// 2 W neighbouring elements as two vectors. Of bfloat16 these are the even and the odd ones, which costs an operation
// each, where a conversion in order costs more.
struct Two {
  vf a, b;
};
struct Bf16 {
  uint16_t bits;
};
INLINE Two load_two(const float* p) { return {load(p), load(p + W)}; }
INLINE Two load_two(const Bf16* p) {
  vu pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)};
}
INLINE void store_two(float* p, Two t) { store(p, t.a), store(p + W, t.b); }
INLINE void stream_two(float* p, Two t) { stream(p, t.a), stream(p + W, t.b); }
// A NaN is not looked for: those that come of bfloat16 and of arithmetic end in zeros, and rounding does not carry.
INLINE vu round_short_nan_to_bf16(vf v) {
  const vu u = (vu)v;
  return u + 0x7fffu + ((u >> 16) & 1u);
}
INLINE vf shorten_nan(vf v) { return (vf)(v == v ? (vu)v : ((vu)v & 0xffff0000u) | 0x400000u); }
INLINE vf pair_up(Two t) {
  return (vf)((round_short_nan_to_bf16(t.a) >> 16) | (round_short_nan_to_bf16(t.b) & 0xffff0000u));
}
INLINE void store_two(Bf16* p, Two t) { store((float*)p, pair_up(t)); }
INLINE void stream_two(Bf16* p, Two t) { stream((float*)p, pair_up(t)); }

// true: 0, false: -inf, so that a boolean mask is added like any other
INLINE vf from_bool(const void* p) {
  vb b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vi) == 0 ? splat(-__builtin_inff()) : vf{};
}

INLINE int64_t bytes(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

static __attribute__((noinline)) vf read_few(const char* p, Type type, int64_t stride, int64_t n) {
  alignas(64) char line[4 * W] = {};  // W elements of any type, the absent ones zero
  const int64_t size = bytes(type);
  for (int64_t i = 0; i < n && i < W; i++)
    for (int64_t byte = 0; byte < size; byte++) line[i * size + byte] = p[i * stride * size + byte];
  return type == Type::f32 ? load((const float*)line) : type == Type::bf16 ? from_bf16(line) : from_bool(line);
}
static __attribute__((noinline)) void write_few(char* p, Type type, int64_t stride, int64_t n, vf v) {
  alignas(64) char line[4 * W];
  if (type == Type::f32) store((float*)line, v); else to_bf16(line, v);
  const int64_t size = bytes(type);
  for (int64_t i = 0; i < n && i < W; i++)
    for (int64_t byte = 0; byte < size; byte++) p[i * stride * size + byte] = line[i * size + byte];
}

// Elements at, at + stride, ... of a tensor as floats: the first n of a vector (all W when n >= W), zero past them.
// Of a boolean tensor, -inf past them.
INLINE vf read(const View& x, int64_t at, int64_t stride, int64_t n) {
  const char* p = (const char*)x.data + at * bytes(x.type);
  if (stride != 1 || n < W) return read_few(p, x.type, stride, n);
  return x.type == Type::f32 ? load((const float*)p) : x.type == Type::bf16 ? from_bf16(p) : from_bool(p);
}
INLINE void write(const View& x, int64_t at, int64_t stride, int64_t n, vf v) {
  char* p = (char*)x.data + at * bytes(x.type);
  if (stride != 1 || n < W) return write_few(p, x.type, stride, n, v);
  if (x.type == Type::f32) store((float*)p, v); else to_bf16(p, v);
}
INLINE int64_t at(const View& x, int64_t i, int64_t j, int64_t k) {
  return i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}
