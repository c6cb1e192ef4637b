// SPDX-License-Identifier: MIT
// Softmax over rows, forward and backward, at the speed of memory: a row is read from it once and written to it once.
//
//     x -> z = scale x + mask, and its maximum M         z is scratch of a few rows, so the passes between find it in
//     z -> z = exp(z - M), and its sum L                 a first- or second-level cache
//     z -> y = z / L
//
//     dx = scale y (dy - sum(dy y)): the sum, then the rest, which finds dy and y in cache
//
// The arithmetic is in the second pass. So that memory never waits for it, this pass also writes the y of the row before,
// bit by bit, and fetches what will be read AHEAD of it. Short rows are taken several at a time, up to W: M and L of all
// of them are then found with a few shuffles a row. A result too large for the caches is streamed past them, where its
// rows begin on whole vectors.

constexpr float INF = __builtin_inff();
constexpr int64_t AHEAD = 4096;  // numbers, if a row has fewer
constexpr int64_t BLOCK = 4096;  // numbers in as many rows, at most W, as are taken at a time: z of two blocks is 32 KB

// The rows of a tensor in their order, with no division but at the first.
struct Place {
  int64_t b, h, k, H, rows;
  Place(const View& x, int64_t row)
      : b(row / x.size[2] / x.size[1]), h(row / x.size[2] % x.size[1]), k(row % x.size[2]), H(x.size[1]), rows(x.size[2]) {}
  void next() {
    if (++k < rows) return;
    k = 0;
    if (++h < H) return;
    h = 0, b++;
  }
};

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
// bfloat16 again, but 2 W elements in their order: of what was read one by one.
struct Bf16InOrder {
  uint16_t bits;
};
INLINE void store_two(Bf16InOrder* p, Two t) { to_bf16(p, t.a), to_bf16(p + W, t.b); }
INLINE void stream_two(Bf16InOrder* p, Two t) { store_two(p, t); }

// The first n of 2 W elements, n < 2 W; zero past them.
template <class E>
INLINE Two load_few(const E* p, int64_t n) {
  E line[2 * W] = {};
  for (int64_t i = 0; i < n; i++) line[i] = p[i];
  return load_two(line);
}
template <class E>
INLINE void store_few(E* p, int64_t n, Two t) {
  E line[2 * W];
  store_two(line, t);
  for (int64_t i = 0; i < n; i++) p[i] = line[i];
}
INLINE Two operator*(Two t, float x) { return {t.a * x, t.b * x}; }

// A row y = z * inverse that is still to be written, 2 W elements at a time.
template <class E>
struct Result {
  const float* z = nullptr;
  E* y = nullptr;
  float inverse = 0;
  int64_t n = 0;
  bool past_caches = false;
  INLINE_MEMBER void put(int64_t c) const {
    const Two t = load_two(z + c) * inverse;
    if (past_caches) stream_two(y + c, t); else store_two(y + c, t);
  }
  INLINE_MEMBER void put_from(int64_t c) const {
    for (; c + 2 * W <= n; c += 2 * W) put(c);
    if (c < n) store_few(y + c, n - c, load_two(z + c) * inverse);
  }
};
// Streaming wants whole vectors of memory.
INLINE bool aligned(const void* p) { return (uintptr_t)p % sizeof(vf) == 0; }

// z = scale * x, -inf past n up to a multiple of 2 W -> the maxima in the lanes of a vector.
template <class E>
INLINE vf scores(const E* x, float scale, int64_t n, float* z) {
  vf m[4] = {splat(-INF), splat(-INF), splat(-INF), splat(-INF)};  // chains: one would wait for each comparison
  int64_t c = 0;
  for (; c + 4 * W <= n; c += 4 * W) {
    const Two t = load_two(x + c) * scale, u = load_two(x + c + 2 * W) * scale;
    store_two(z + c, t), store_two(z + c + 2 * W, u);
    m[0] = maximum(t.a, m[0]), m[1] = maximum(t.b, m[1]), m[2] = maximum(u.a, m[2]), m[3] = maximum(u.b, m[3]);
  }
  for (; c < n; c += 2 * W) {
    Two t = (c + 2 * W <= n ? load_two(x + c) : load_few(x + c, n - c)) * scale;
    if (c + 2 * W > n) {
      float line[2 * W];
      store_two(line, t);
      // of bfloat16 the first W are the even ones
      for (int64_t i = n - c; i < 2 * W; i++) line[sizeof(E) == 4 ? i : i % 2 * W + i / 2] = -INF;
      t = load_two(line);
    }
    store_two(z + c, t);
    m[0] = maximum(t.a, m[0]), m[1] = maximum(t.b, m[1]);
  }
  return maximum(maximum(m[0], m[1]), maximum(m[2], m[3]));
}
INLINE vf scores(const Bf16InOrder*, float, int64_t, float*) { return vf{}; }  // these are read one by one
// The same with a mask, and of any elements that lie side by side.
static vf masked_scores(const View& x, int64_t from, const View& mask, int64_t mask_from, float scale, int64_t n,
                        float* z) {
  vf m = splat(-INF);
  for (int64_t c = 0; c < round_up(n, 2 * W); c += W) {
    vf s = splat(-INF);
    if (c < n) {
      const vf hidden = mask.data ? read(mask, mask_from + c, 1, n - c) : vf{};
      s = hidden == -INF ? hidden : read(x, from + c, 1, n - c) * scale + hidden;  // what is hidden may be NaN
    }
    s = lane_numbers() < (int32_t)(n - c) ? s : splat(-INF);
    store(z + c, s);
    m = maximum(s, m);
  }
  return m;
}
// A row of a tensor whose elements lie side by side: as it is, or copied into `room`.
INLINE View side_by_side(const View& x, int64_t& from, int64_t n, float* room) {
  if (!x.data || x.stride[3] == 1) return x;
  read_row(x, from, n, room);
  from = 0;
  return {room, Type::f32, {1, 1, 1, n}, {0, 0, 0, 1}};
}

INLINE vf exp_for(float, vf x) { return exp(x); }
INLINE vf exp_for(Bf16, vf x) { return exp_for_bf16(x); }
INLINE vf exp_for(Bf16InOrder, vf x) { return exp_for_bf16(x); }

// z = exp(z - M) -> the sums in the lanes of a vector. Meanwhile `before` is written and `next` fetched.
template <class E>
INLINE vf exponentials(float* z, float M, int64_t n, Result<E> before, const E* next) {
  const float shift = M == -INF ? 0 : M;  // nothing to see: exp(-inf - 0) = 0 everywhere, where -inf - -inf would be NaN
  vf l[2] = {};
  auto step = [&](int64_t c) {
    const Two t = load_two(z + c), e = {exp_for(E{}, t.a - shift), exp_for(E{}, t.b - shift)};
    store_two(z + c, e);
    l[0] += e.a, l[1] += e.b;
    if (next)
      UNROLL for (int64_t i = 0; i < 2 * W; i += 64 / (int64_t)sizeof(E)) __builtin_prefetch(next + c + i);
  };
  const int64_t both = least(n, before.n) / (2 * W) * (2 * W);
  for (int64_t c = 0; c < both; c += 2 * W) step(c), before.put(c);
  for (int64_t c = both; c < n; c += 2 * W) step(c);
  before.put_from(both);
  return l[0] + l[1];
}

// What lies some rows further on, whose memory is fetched.
template <class E>
INLINE const E* ahead(const E* row, const View& x) {
  return row + most(1, AHEAD / x.size[3]) * x.stride[2];
}

template <class E>
static void softmax_rows_of(const Softmax& a, int64_t begin, int64_t end) {
  const int64_t rows = a.x.size[2], columns = a.x.size[3], room = round_up(columns, 32);
  const int64_t block = most(1, least(W, BLOCK / most(1, columns)));
  const bool as_it_lies = !a.mask.data && a.x.stride[3] == 1;
  ScratchBlock scratch((2 * block + 1) * room);
  float *z = scratch.start().next, *other = z + block * room, *mask = other + block * room;
  Result<E> results[2][W], *result = results[0], *before = results[1];
  Place at_row(a.x, begin);

  for (int64_t first = begin; first < end; first += block) {
    const int64_t R = least(block, end - first);
    const E* x[W];
    vf r[W];
    for (int64_t i = R; i < W; i++) r[i] = vf{};  // only these: clearing the 1 KB takes rows of 64 a fifth of their time
    float M[W], L[W];
    for (int64_t i = 0; i < R; i++, at_row.next()) {
      const int64_t b = at_row.b, h = at_row.h, k = at_row.k;
      // causal, bottom-right: the last row sees every column
      const int64_t n = a.causal ? most(0, least(columns, k + 1 + columns - rows)) : columns, from = at(a.x, b, h, k);
      E* y = place<E>(a.y, at(a.y, b, h, k));
      float* to = z + i * room;
      x[i] = place<const E>(a.x, from);
      if (as_it_lies) {
        r[i] = scores(x[i], a.scale, n, to);
      } else {
        int64_t x_from = from, mask_from = at(a.mask, b, h, k);
        const View row = side_by_side(a.x, x_from, n, to), row_mask = side_by_side(a.mask, mask_from, n, mask);
        r[i] = masked_scores(row, x_from, row_mask, mask_from, a.scale, n, to);
      }
      result[i] = {to, y, 0, n, a.past_caches && aligned(y)};
      for (int64_t c = n; c < columns; c++) y[c] = E{};
    }
    if (block == 1) M[0] = largest_lane(r[0]); else store(M, largest_lane(r));
    for (int64_t i = 0; i < R; i++)
      r[i] = exponentials(z + i * room, M[i], result[i].n, before[i], ahead(x[i], a.x));
    if (block == 1) L[0] = sum_lanes(r[0]); else store(L, sum_lanes(r));
    for (int64_t i = R; i < block; i++) before[i].put_from(0);  // of a last, smaller block
    for (int64_t i = 0; i < block; i++) {
      result[i].inverse = i >= R || L[i] == 0 ? 0 : 1 / L[i];
      if (i >= R) result[i].n = 0;
    }
    float* swap = z;
    z = other, other = swap;
    Result<E>* results_swap = result;  // by their addresses: a copy would wait for what was just stored in parts
    result = before, before = results_swap;
  }
  for (int64_t i = 0; i < block; i++) before[i].put_from(0);
  end_stream();
}

static void softmax_rows(void* context, int64_t begin, int64_t end) {
  const Softmax& a = *(const Softmax*)context;
  if (a.x.type == Type::f32) softmax_rows_of<float>(a, begin, end);
  else if (!a.mask.data && a.x.stride[3] == 1) softmax_rows_of<Bf16>(a, begin, end);
  else softmax_rows_of<Bf16InOrder>(a, begin, end);
}

// The parts of sum(dy y), in the lanes of a vector.
template <class E>
INLINE vf products(const E* dy, const E* y, int64_t n) {
  vf dot[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= n; c += 4 * W) {
    const Two g = load_two(dy + c), p = load_two(y + c), h = load_two(dy + c + 2 * W), q = load_two(y + c + 2 * W);
    dot[0] += g.a * p.a, dot[1] += g.b * p.b, dot[2] += h.a * q.a, dot[3] += h.b * q.b;
  }
  for (; c < n; c += 2 * W) {
    const bool whole = c + 2 * W <= n;
    const Two g = whole ? load_two(dy + c) : load_few(dy + c, n - c), p = whole ? load_two(y + c) : load_few(y + c, n - c);
    dot[0] += g.a * p.a, dot[1] += g.b * p.b;
  }
  return (dot[0] + dot[1]) + (dot[2] + dot[3]);
}
// dx = (dy - D) * (y * scale), E read and F written; meanwhile `next_dy` and `next_y` are fetched.
template <class E, class F>
INLINE void differences(const E* dy, const E* y, float D, float scale, int64_t n, const E* next_dy, const E* next_y,
                        bool past_caches, F* dx) {
  auto of = [=](Two g, Two p) -> Two { return {(g.a - D) * (p.a * scale), (g.b - D) * (p.b * scale)}; };
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W) {
    if (next_y)
      UNROLL for (int64_t i = 0; i < 2 * W; i += 64 / (int64_t)sizeof(E))
        __builtin_prefetch(next_dy + c + i), __builtin_prefetch(next_y + c + i);
    const Two t = of(load_two(dy + c), load_two(y + c));
    if (past_caches) stream_two(dx + c, t); else store_two(dx + c, t);
  }
  if (c < n) store_few(dx + c, n - c, of(load_few(dy + c, n - c), load_few(y + c, n - c)));
}

// dy and y are used where they lie if they are of E and without gaps, and else copied to rows of float32.
template <class E, class F>
static void softmax_rows_backward_of(const SoftmaxBackward& a, int64_t begin, int64_t end, bool copy) {
  const int64_t columns = a.y.size[3], room = round_up(columns, 32);
  const int64_t block = most(1, least(W, BLOCK / most(1, columns)));
  ScratchBlock scratch(copy ? 2 * block * room : 0);
  Place at_row(a.y, begin);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t R = least(block, end - first);
    const E *dy[W], *y[W];
    F* dx[W];
    vf r[W];
    for (int64_t i = R; i < W; i++) r[i] = vf{};
    float D[W];
    for (int64_t i = 0; i < R; i++, at_row.next()) {
      const int64_t b = at_row.b, h = at_row.h, k = at_row.k;
      dy[i] = place<const E>(a.dy, at(a.dy, b, h, k)), y[i] = place<const E>(a.y, at(a.y, b, h, k));
      dx[i] = place<F>(a.dx, at(a.dx, b, h, k));
      if (copy) {
        float *dy_room = scratch.start().next + 2 * i * room, *y_room = dy_room + room;
        read_row(a.dy, at(a.dy, b, h, k), columns, dy_room);
        read_row(a.y, at(a.y, b, h, k), columns, y_room);
        dy[i] = (const E*)dy_room, y[i] = (const E*)y_room;
      }
      r[i] = products(dy[i], y[i], columns);
    }
    if (block == 1) D[0] = sum_lanes(r[0]); else store(D, sum_lanes(r));
    for (int64_t i = 0; i < R; i++)
      differences(dy[i], y[i], D[i], a.scale, columns, copy ? nullptr : ahead(dy[i], a.dy),
                  copy ? nullptr : ahead(y[i], a.y), a.past_caches && aligned(dx[i]), dx[i]);
  }
  end_stream();
}

static void softmax_rows_backward(void* context, int64_t begin, int64_t end) {
  const SoftmaxBackward& a = *(const SoftmaxBackward*)context;
  const bool copy = a.dy.stride[3] != 1 || a.y.stride[3] != 1;
  if (a.y.type == Type::f32) softmax_rows_backward_of<float, float>(a, begin, end, copy);
  else if (!copy) softmax_rows_backward_of<Bf16, Bf16>(a, begin, end, false);
  else softmax_rows_backward_of<float, Bf16InOrder>(a, begin, end, true);
}
