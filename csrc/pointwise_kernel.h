// SPDX-License-Identifier: MIT
// What stands between the products of a Transformer's MLP, and its gradient: GELU in its tanh form (Hendrycks and Gimpel
// 2016, arXiv 1606.08415) and the gate of SwiGLU (Shazeer 2020, arXiv 2002.05202). Numbers lie without gaps. With the
// logistic function, s(x) = 1 / (1 + exp(-x)), and as (1 + tanh(z)) / 2 = s(2 z):
//
//     gelu(x)   = x s(p),  p = 2 sqrt(2 / pi) (x + 0.044715 x^3)     gelu' = s(p) + x s(p) (1 - s(p)) p'
//     silu(g) u = g s(g) u                                           d/dg  = u s(g) (1 + g (1 - s(g))),  d/du = silu(g)

// Where exp would overflow, s is 0 to all digits of a product with x. NaN stays: the comparisons are false for it.
INLINE vf bounded(vf x, float most) { return x < -most ? splat(-most) : x > most ? splat(most) : x; }
struct Logistic {
  vf s, rest;  // rest = 1 - s, without the digits that the subtraction would lose
};
INLINE Logistic logistic(vf x) {
  const vf e = exp(-bounded(x, 87.0f)), s = 1.0f / (1.0f + e);
  return {s, e * s};
}

constexpr float P1 = 1.5957691216f, P3 = 0.0713548163f;  // 2 sqrt(2 / pi), and that times 0.044715

INLINE vf gelu(vf x) {
  const vf s = logistic(x * (x * x * P3 + P1)).s;
  return x < -10.0f ? vf{} : x * s;  // there s is no longer exact
}
INLINE vf gelu_slope(vf x) {
  const vf c = bounded(x, 10.0f), square = c * c;
  const Logistic l = logistic(c * (square * P3 + P1));
  return l.s + c * l.s * l.rest * (square * (3 * P3) + P1);
}

// Elements i to i + n of an array, n up to W: past its end nothing is read or written.
INLINE vf load_some(const float* p, int64_t n) {
  if (n >= W) return load(p);
  alignas(64) float line[W] = {};
  for (int64_t i = 0; i < n; i++) line[i] = p[i];
  return load(line);
}
INLINE void store_some(float* p, int64_t n, vf v) {
  if (n >= W) return store(p, v);
  alignas(64) float line[W];
  store(line, v);
  for (int64_t i = 0; i < n; i++) p[i] = line[i];
}

// Pieces begin to end of the arrays, PIECE numbers each.
template <void each(const Pointwise& a, int64_t i, int64_t n)>
static void pieces(void* context, int64_t begin, int64_t end) {
  const Pointwise& a = *(const Pointwise*)context;
  for (int64_t i = begin * PIECE; i < least(end * PIECE, a.n); i += W) each(a, i, a.n - i);
}

INLINE void gelu_at(const Pointwise& a, int64_t i, int64_t n) { store_some(a.out[0] + i, n, gelu(load_some(a.in[0] + i, n))); }
INLINE void gelu_backward_at(const Pointwise& a, int64_t i, int64_t n) {
  store_some(a.out[0] + i, n, load_some(a.in[0] + i, n) * gelu_slope(load_some(a.in[1] + i, n)));
}
INLINE void swiglu_at(const Pointwise& a, int64_t i, int64_t n) {
  const vf g = load_some(a.in[0] + i, n);
  store_some(a.out[0] + i, n, g * logistic(g).s * load_some(a.in[1] + i, n));
}
INLINE void swiglu_backward_at(const Pointwise& a, int64_t i, int64_t n) {
  const vf d = load_some(a.in[0] + i, n), g = load_some(a.in[1] + i, n), u = load_some(a.in[2] + i, n);
  const Logistic l = logistic(g);
  const vf silu = g * l.s;
  store_some(a.out[0] + i, n, d * u * (l.s + silu * l.rest));
  store_some(a.out[1] + i, n, d * silu);
}
constexpr auto gelu_pieces = pieces<gelu_at>, gelu_backward_pieces = pieces<gelu_backward_at>;
constexpr auto swiglu_pieces = pieces<swiglu_at>, swiglu_backward_pieces = pieces<swiglu_backward_at>;
