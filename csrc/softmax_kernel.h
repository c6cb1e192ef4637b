// SPDX-License-Identifier: MIT
// Softmax over rows, forward and backward. The loops over a row follow each other while it is in cache: the maximum;
// exp and the sum; the division. A contiguous row of float32 or bfloat16 is used where it lies; any other, or one with
// a mask, is first made into one of float32 in scratch.

constexpr float INF = __builtin_inff();
constexpr int CHAINS = 4;  // one chain of additions or comparisons would wait for each to end

struct Bf16 {
  uint16_t bits;
};
INLINE vf load(const Bf16* p) { return from_bf16(p); }
INLINE void store(Bf16* p, vf v) { to_bf16(p, v); }

INLINE bool plain(const View& x, Type type) { return x.type == type && x.stride[3] == 1; }
template <class E>
INLINE E* place(const View& x, int64_t from) { return (E*)x.data + from; }

static void read_row(const View& x, int64_t from, int64_t n, float* to) {
  const int64_t stride = x.stride[3];
  const char* p = (const char*)x.data + from * bytes(x.type);
  int64_t c = 0;
  if (stride == 1 && x.type == Type::f32)
    for (; c + W <= n; c += W) store(to + c, load((const float*)p + c));
  if (stride == 1 && x.type == Type::bf16)
    for (; c + W <= n; c += W) store(to + c, from_bf16(p + 2 * c));
  if (stride == 1 && x.type == Type::boolean)
    for (; c + W <= n; c += W) store(to + c, from_bool(p + c));
  if (stride == 0 && n > 0)
    for (const vf one = read(x, from, 0, W); c < n; c += W) store(to + c, one);
  for (; c < n; c += W) store(to + c, read(x, from + c * stride, stride, n - c));
}
static void write_row(const View& x, int64_t to, int64_t n, const float* from) {
  for (int64_t c = 0; c < n; c += W) write(x, to + c * x.stride[3], x.stride[3], n - c, load(from + c));
}
template <class E>
INLINE vf load_few(const E* p, int64_t n, float fill) {
  E line[W] = {};
  for (int i = 0; i < W; i++)
    if (i < n) line[i] = p[i];
  return lane_numbers() < (int32_t)n ? load(line) : splat(fill);
}
template <class E>
INLINE void store_few(E* p, int64_t n, vf v) {
  E line[W];
  store(line, v);
  for (int i = 0; i < W; i++)
    if (i < n) p[i] = line[i];
}
// In all lanes: each step halves the number of different ones.
INLINE vf sum_lanes(vf v) {
  UNROLL for (int n = 1; n < W; n *= 2) v = zip_low(v, v) + zip_high(v, v);
  return v;
}
INLINE vf largest_lane(vf v) {
  UNROLL for (int n = 1; n < W; n *= 2) v = maximum(zip_low(v, v), zip_high(v, v));
  return v;
}

// y = softmax(factor * s) over n elements, for factor > 0; p is room for the row, and may be s or y. The factor goes on
// the difference from the maximum, which is never above zero: factor * s - maximum, contracted into one instruction,
// could be, and far, for huge s.
template <class E>
static void softmax_row(const E* s, float factor, int64_t n, float* p, E* y) {
  const vf lowest = splat(-INF);
  vf m[CHAINS], l[CHAINS] = {};
  UNROLL for (int i = 0; i < CHAINS; i++) m[i] = lowest;
  int64_t c = 0;
  for (; c + CHAINS * W <= n; c += CHAINS * W)
    UNROLL for (int i = 0; i < CHAINS; i++) m[i] = maximum(load(s + c + i * W), m[i]);
  for (; c + W <= n; c += W) m[0] = maximum(load(s + c), m[0]);
  vf last = lowest;
  if (c < n) last = load_few(s + c, n - c, -INF);
  vf M = largest_lane(maximum(last, maximum(maximum(m[0], m[1]), maximum(m[2], m[3]))));
  M = M == -INF ? vf{} : M;  // nothing to see: exp(-inf - 0) = 0 everywhere, where -inf - -inf would be NaN

  for (c = 0; c + CHAINS * W <= n; c += CHAINS * W)
    UNROLL for (int i = 0; i < CHAINS; i++) {
      const vf e = exp((load(s + c + i * W) - M) * factor);
      store(p + c + i * W, e);
      l[i] += e;
    }
  for (; c + W <= n; c += W) {
    const vf e = exp((load(s + c) - M) * factor);
    store(p + c, e);
    l[0] += e;
  }
  const vf e = exp((last - M) * factor);
  const vf L = sum_lanes((l[0] + l[1]) + (l[2] + l[3]) + e);
  const vf inverse = L == 0 ? vf{} : 1 / L;

  for (c = 0; c + W <= n; c += W) store(y + c, load(p + c) * inverse);
  if (c < n) store_few(y + c, n - c, e * inverse);
}

static void softmax_rows(void* context, int64_t begin, int64_t end) {
  const Softmax& a = *(const Softmax*)context;
  const int64_t rows = a.x.size[2], columns = a.x.size[3], room = round_up(columns, 16);
  ScratchBlock block(2 * room);
  float *z = block.start().take(2 * room), *mask = z + room;

  for (int64_t row = begin; row < end; row++) {
    const int64_t i = row / rows / a.x.size[1], j = row / rows % a.x.size[1], k = row % rows;
    // causal, bottom-right: the last row sees every column
    const int64_t n = a.causal ? most(0, least(columns, k + 1 + columns - rows)) : columns;
    const int64_t x = at(a.x, i, j, k), y = at(a.y, i, j, k);
    const bool as_it_is = !a.mask.data && a.scale > 0;
    if (as_it_is && plain(a.x, Type::f32) && plain(a.y, Type::f32)) {
      softmax_row(place<const float>(a.x, x), a.scale, n, place<float>(a.y, y), place<float>(a.y, y));
    } else if (as_it_is && plain(a.x, Type::bf16) && plain(a.y, Type::bf16)) {
      softmax_row(place<const Bf16>(a.x, x), a.scale, n, z, place<Bf16>(a.y, y));
    } else {
      read_row(a.x, x, n, z);
      if (a.mask.data) read_row(a.mask, at(a.mask, i, j, k), n, mask);
      for (int64_t c = 0; c < n; c += W)
        store(z + c, a.mask.data ? load(z + c) * a.scale + load(mask + c) : load(z + c) * a.scale);
      softmax_row(z, 1, n, z, z);
      write_row(a.y, y, n, z);
    }
    for (int64_t c = n; c < columns; c += W) write(a.y, y + c * a.y.stride[3], a.y.stride[3], columns - c, vf{});
  }
}

// dx = scale * y * (dy - sum(dy * y))
template <class E>
static void softmax_row_backward(const E* dy, const E* y, float scale, int64_t n, E* dx) {
  vf dot[CHAINS] = {};
  int64_t c = 0;
  for (; c + CHAINS * W <= n; c += CHAINS * W)
    UNROLL for (int i = 0; i < CHAINS; i++) dot[i] += load(dy + c + i * W) * load(y + c + i * W);
  for (; c + W <= n; c += W) dot[0] += load(dy + c) * load(y + c);
  vf last_dy = {}, last_y = {};
  if (c < n) last_dy = load_few(dy + c, n - c, 0), last_y = load_few(y + c, n - c, 0);
  const vf D = sum_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]) + last_dy * last_y);
  for (c = 0; c + W <= n; c += W) store(dx + c, (load(dy + c) - D) * (load(y + c) * scale));
  if (c < n) store_few(dx + c, n - c, (last_dy - D) * (last_y * scale));
}

static void softmax_rows_backward(void* context, int64_t begin, int64_t end) {
  const SoftmaxBackward& a = *(const SoftmaxBackward*)context;
  const int64_t rows = a.y.size[2], columns = a.y.size[3], room = round_up(columns, 16);
  ScratchBlock block(2 * room);
  float *dy_room = block.start().take(2 * room), *y_room = dy_room + room;
  for (int64_t row = begin; row < end; row++) {
    const int64_t i = row / rows / a.y.size[1], j = row / rows % a.y.size[1], k = row % rows;
    const int64_t dy = at(a.dy, i, j, k), y = at(a.y, i, j, k), dx = at(a.dx, i, j, k);
    if (plain(a.dy, Type::f32) && plain(a.y, Type::f32) && plain(a.dx, Type::f32)) {
      softmax_row_backward(place<const float>(a.dy, dy), place<const float>(a.y, y), a.scale, columns,
                           place<float>(a.dx, dx));
    } else if (plain(a.dy, Type::bf16) && plain(a.y, Type::bf16) && plain(a.dx, Type::bf16)) {
      softmax_row_backward(place<const Bf16>(a.dy, dy), place<const Bf16>(a.y, y), a.scale, columns,
                           place<Bf16>(a.dx, dx));
    } else {
      read_row(a.dy, dy, columns, dy_room);
      read_row(a.y, y, columns, y_room);
      softmax_row_backward(dy_room, y_room, a.scale, columns, dy_room);
      write_row(a.dx, dx, columns, dy_room);
    }
  }
}
