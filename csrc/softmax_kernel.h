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

// The first n of the 2 W elements of E that a Two holds; `rest` in place of the others.
INLINE Two first(Two t, int64_t n, float rest, float) {
  const vi i = lane_numbers();
  return {i < (int32_t)n ? t.a : splat(rest), i < (int32_t)n - W ? t.b : splat(rest)};
}
INLINE Two first(Two t, int64_t n, float rest, Bf16) {
  const vi i = 2 * lane_numbers();
  return {i < (int32_t)n ? t.a : splat(rest), i < (int32_t)n - 1 ? t.b : splat(rest)};
}

// A row in scratch: whole pairs of vectors, in the order that load_two(const E*) has them, so that it can meet such rows.
struct Worked {
  float number;
};
INLINE Two load_two(const Worked* p) { return load_two((const float*)p); }
INLINE Two in_order_of(float, Two t) { return t; }
INLINE Two in_order_of(Bf16, Two t) { return {shorten_nan(evens(t.a, t.b)), shorten_nan(odds(t.a, t.b))}; }

// A row of any type and stride, zero past n up to a multiple of 2 W.
template <class E>
static void read_row(const View& x, int64_t from, int64_t n, Worked* to) {
  const int64_t stride = x.stride[3];
  const vf same = stride == 0 && n > 0 ? read(x, from, 0, W) : vf{};
  for (int64_t c = 0; c < n; c += 2 * W) {
    const int64_t i = from + c * stride;
    Two t{same, same};
    if (stride != 0) t = {read(x, i, stride, n - c), read(x, i + W * stride, stride, n - c - W)};
    t = in_order_of(E{}, t);
    store_two((float*)to + c, n - c < 2 * W ? first(t, n - c, 0, E{}) : t);
  }
}

// The first n of 2 W elements, n < 2 W; zero past them.
template <class E>
INLINE Two load_few(const E* p, int64_t n) {
  E line[2 * W] = {};
  for (int64_t i = 0; i < n; i++) line[i] = p[i];
  return load_two(line);
}
INLINE Two load_few(const Worked* p, int64_t) { return load_two(p); }
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

struct NoMask {};
INLINE Two masked(Two s, const NoMask*, int64_t, int64_t) { return s; }
INLINE vf masked(vf s, vf hidden) { return hidden == -INF ? hidden : s + hidden; }  // what is hidden may be NaN
template <class M>
INLINE Two masked(Two s, const M* mask, int64_t c, int64_t n) {
  const Two hidden = n - c >= 2 * W ? load_two(mask + c) : load_few(mask + c, n - c);
  return {masked(s.a, hidden.a), masked(s.b, hidden.b)};
}
// z = scale * x + mask, -inf past n up to a multiple of 2 W -> the maxima in the lanes of a vector.
template <class E, class X, class M>
INLINE vf scores(const X* x, const M* mask, float scale, int64_t n, float* z) {
  vf m[4] = {splat(-INF), splat(-INF), splat(-INF), splat(-INF)};  // chains: one would wait for each comparison
  int64_t c = 0;
  for (; c + 4 * W <= n; c += 4 * W) {
    const Two t = masked(load_two(x + c) * scale, mask, c, n);
    const Two u = masked(load_two(x + c + 2 * W) * scale, mask, c + 2 * W, n);
    store_two(z + c, t), store_two(z + c + 2 * W, u);
    m[0] = maximum(t.a, m[0]), m[1] = maximum(t.b, m[1]), m[2] = maximum(u.a, m[2]), m[3] = maximum(u.b, m[3]);
  }
  for (; c < n; c += 2 * W) {
    Two t = masked((c + 2 * W <= n ? load_two(x + c) : load_few(x + c, n - c)) * scale, mask, c, n);
    if (c + 2 * W > n) t = first(t, n - c, -INF, E{});
    store_two(z + c, t);
    m[0] = maximum(t.a, m[0]), m[1] = maximum(t.b, m[1]);
  }
  return maximum(maximum(m[0], m[1]), maximum(m[2], m[3]));
}

INLINE vf exp_for(float, vf x) { return exp(x); }
INLINE vf exp_for(Bf16, vf x) { return exp_for_bf16(x); }

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
  const Type type = sizeof(E) == 4 ? Type::f32 : Type::bf16;
  const bool x_as_it_lies = a.x.stride[3] == 1, mask_as_it_lies = a.mask.type == type && a.mask.stride[3] == 1;
  ScratchBlock scratch((2 * block + 1) * room);
  float *z = scratch.start().next, *other = z + block * room;
  const float scale = shorten_nan(splat(a.scale))[0];
  Worked* mask = (Worked*)(other + block * room);
  int64_t in_mask = -1;  // which row of a.mask, if any: often it is that of all rows
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
      if (!x_as_it_lies) read_row<E>(a.x, from, n, (Worked*)to);
      const int64_t mask_from = at(a.mask, b, h, k);
      if (a.mask.data && !mask_as_it_lies && in_mask != mask_from)
        read_row<E>(a.mask, mask_from, columns, mask), in_mask = mask_from;
      auto with = [&](auto* m) {
        return x_as_it_lies ? scores<E>(x[i], m, scale, n, to) : scores<E>((const Worked*)to, m, scale, n, to);
      };
      r[i] = !a.mask.data      ? with((const NoMask*)nullptr)
             : mask_as_it_lies ? with(place<const E>(a.mask, mask_from))
                               : with((const Worked*)mask);
      result[i] = {to, y, 0, n, a.past_caches && aligned(y)};
      for (int64_t c = n; c < columns; c++) y[c] = E{};
    }
    if (block == 1) M[0] = largest_lane(r[0]); else store(M, largest_lane(r));
    for (int64_t i = 0; i < R; i++)
      r[i] = exponentials(z + i * room, M[i], result[i].n, before[i],
                          x_as_it_lies ? ahead(x[i], a.x) : nullptr);
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
  else softmax_rows_of<Bf16>(a, begin, end);
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
// dx = (dy - D) * (y * scale), X read and E written; meanwhile `next_dy` and `next_y` are fetched.
template <class X, class E>
INLINE void differences(const X* dy, const X* y, float D, float scale, int64_t n, const X* next_dy, const X* next_y,
                        bool past_caches, E* dx) {
  auto of = [=](Two g, Two p) -> Two { return {(g.a - D) * (p.a * scale), (g.b - D) * (p.b * scale)}; };
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W) {
    if (next_y)
      UNROLL for (int64_t i = 0; i < 2 * W; i += 64 / (int64_t)sizeof(X))
        __builtin_prefetch(next_dy + c + i), __builtin_prefetch(next_y + c + i);
    const Two t = of(load_two(dy + c), load_two(y + c));
    if (past_caches) stream_two(dx + c, t); else store_two(dx + c, t);
  }
  if (c < n) store_few(dx + c, n - c, of(load_few(dy + c, n - c), load_few(y + c, n - c)));
}

// X is E, for dy and y where they lie, or Worked: they have gaps, and are copied.
template <class X, class E>
static void softmax_rows_backward_of(const SoftmaxBackward& a, int64_t begin, int64_t end, bool copy) {
  const int64_t columns = a.y.size[3], room = round_up(columns, 32);
  const int64_t block = most(1, least(W, BLOCK / most(1, columns)));
  const float scale = shorten_nan(splat(a.scale))[0];
  ScratchBlock scratch(copy ? 2 * block * room : 0);
  Place at_row(a.y, begin);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t R = least(block, end - first);
    const X *dy[W], *y[W];
    E* dx[W];
    vf r[W];
    for (int64_t i = R; i < W; i++) r[i] = vf{};
    float D[W];
    for (int64_t i = 0; i < R; i++, at_row.next()) {
      const int64_t b = at_row.b, h = at_row.h, k = at_row.k;
      dy[i] = place<const X>(a.dy, at(a.dy, b, h, k)), y[i] = place<const X>(a.y, at(a.y, b, h, k));
      dx[i] = place<E>(a.dx, at(a.dx, b, h, k));
      if (copy) {
        Worked *dy_room = (Worked*)scratch.start().next + 2 * i * room, *y_room = dy_room + room;
        read_row<E>(a.dy, at(a.dy, b, h, k), columns, dy_room);
        read_row<E>(a.y, at(a.y, b, h, k), columns, y_room);
        dy[i] = (const X*)dy_room, y[i] = (const X*)y_room;
      }
      r[i] = products(dy[i], y[i], columns);
    }
    if (block == 1) D[0] = sum_lanes(r[0]); else store(D, sum_lanes(r));
    for (int64_t i = 0; i < R; i++)
      differences(dy[i], y[i], D[i], scale, columns, copy ? nullptr : ahead(dy[i], a.dy),
                  copy ? nullptr : ahead(y[i], a.y), a.past_caches && aligned(dx[i]), dx[i]);
  }
  end_stream();
}

static void softmax_rows_backward(void* context, int64_t begin, int64_t end) {
  const SoftmaxBackward& a = *(const SoftmaxBackward*)context;
  const bool copy = a.dy.stride[3] != 1 || a.y.stride[3] != 1, f32 = a.y.type == Type::f32;
  if (f32 && copy) softmax_rows_backward_of<Worked, float>(a, begin, end, true);
  else if (f32) softmax_rows_backward_of<float, float>(a, begin, end, false);
  else if (copy) softmax_rows_backward_of<Worked, Bf16>(a, begin, end, true);
  else softmax_rows_backward_of<Bf16, Bf16>(a, begin, end, false);
}
