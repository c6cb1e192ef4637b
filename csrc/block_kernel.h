// SPDX-License-Identifier: MIT
// What stands between the products of a Llama's block, token by token: norm, rotary positions, gate. Rows lie without gaps.

// y = x / sqrt(mean(x^2) + eps) * weight, of C numbers.
static void block_norm(const float* x, const float* weight, int64_t C, float eps, float* y) {
  vf sum = {};
  int64_t c = 0;
  for (; c + W <= C; c += W) sum += load(x + c) * load(x + c);
  float total = sum_lanes(sum);
  for (int64_t i = c; i < C; i++) total += x[i] * x[i];
  const float r = 1.0f / __builtin_sqrtf(total / (float)C + eps);
  for (c = 0; c + W <= C; c += W) store(y + c, load(x + c) * r * load(weight + c));
  for (; c < C; c++) y[c] = x[c] * r * weight[c];
}

// x (heads, D), in place: the pair (d, d + D/2) is turned. cos and sin (D), the first half of sin negative.
static void block_turn(float* x, int64_t heads, int64_t D, const float* cos, const float* sin) {
  const int64_t half = D / 2;
  for (int64_t h = 0; h < heads; h++, x += D)
    for (int64_t d = 0; d < half; d++) {
      const float a = x[d], b = x[d + half];
      x[d] = a * cos[d] + b * sin[d];
      x[d + half] = b * cos[d + half] + a * sin[d + half];
    }
}

// y = silu(g) u, of F numbers: g / (1 + exp(-g)) u. Where exp would overflow, silu is zero.
INLINE vf gated(vf g, vf u) {
  const vf low = splat(-87.0f), bounded = g < low ? low : g;  // false for NaN, which stays
  return g / (1.0f + exp(-bounded)) * u;
}
static void block_gate(const float* g, const float* u, int64_t F, float* y) {
  int64_t f = 0;
  for (; f + W <= F; f += W) store(y + f, gated(load(g + f), load(u + f)));
  if (f < F) {
    alignas(64) float line[3 * W] = {};
    for (int64_t i = f; i < F; i++) line[i - f] = g[i], line[W + i - f] = u[i];
    store(line + 2 * W, gated(load(line), load(line + W)));
    for (int64_t i = f; i < F; i++) y[i] = line[2 * W + i - f];
  }
}
