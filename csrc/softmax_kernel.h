// SPDX-License-Identifier: MIT
// Softmax over rows, forward and backward. A row is read once from memory: it stays in cache, as float32, in `z` while the
// three loops pass over it (the maximum; exp and the sum; the division), and is written once.

static void softmax_rows(void* context, int64_t begin, int64_t end) {
  const Softmax& a = *(const Softmax*)context;
  const int64_t rows = a.x.size[2], columns = a.x.size[3];
  const vf lowest = splat(-__builtin_inff());
  ScratchBlock block(round_up(columns, W));
  float* z = block.start().take(round_up(columns, W));

  for (int64_t row = begin; row < end; row++) {
    const int64_t i = row / rows / a.x.size[1], j = row / rows % a.x.size[1], k = row % rows;
    const int64_t x = at(a.x, i, j, k), mask = at(a.mask, i, j, k), y = at(a.y, i, j, k);
    // causal, bottom-right: the last row sees every column
    const int64_t n = a.causal ? most(0, least(columns, k + 1 + columns - rows)) : columns;

    vf most_of = lowest;
    for (int64_t c = 0; c < n; c += W) {
      vf s = read(a.x, x + c * a.x.stride[3], a.x.stride[3], n - c) * a.scale;
      if (a.mask.data) s += read(a.mask, mask + c * a.mask.stride[3], a.mask.stride[3], n - c);
      if (n - c < W) s = lane_numbers() < (int32_t)(n - c) ? s : lowest;
      store(z + c, s);
      most_of = maximum(s, most_of);
    }
    float m = -__builtin_inff();
    for (int c = 0; c < W; c++) m = most_of[c] > m ? most_of[c] : m;
    if (m == -__builtin_inff()) m = 0;  // nothing to see: exp(-inf - 0) = 0 everywhere, where -inf - -inf would be NaN

    vf sums = {};
    for (int64_t c = 0; c < n; c += W) {
      vf p = exp(load(z + c) - m);
      store(z + c, p);
      sums += p;
    }
    float l = 0;
    for (int c = 0; c < W; c++) l += sums[c];
    const float inverse = l == 0 ? 0 : 1 / l;

    for (int64_t c = 0; c < n; c += W) write(a.y, y + c * a.y.stride[3], a.y.stride[3], n - c, load(z + c) * inverse);
    for (int64_t c = n; c < columns; c += W) write(a.y, y + c * a.y.stride[3], a.y.stride[3], columns - c, vf{});
  }
}

static void softmax_rows_backward(void* context, int64_t begin, int64_t end) {
  const SoftmaxBackward& a = *(const SoftmaxBackward*)context;
  const int64_t rows = a.y.size[2], columns = a.y.size[3];
  for (int64_t row = begin; row < end; row++) {
    const int64_t i = row / rows / a.y.size[1], j = row / rows % a.y.size[1], k = row % rows;
    const int64_t dy = at(a.dy, i, j, k), y = at(a.y, i, j, k), dx = at(a.dx, i, j, k);
    vf dots = {};
    for (int64_t c = 0; c < columns; c += W)
      dots += read(a.dy, dy + c * a.dy.stride[3], a.dy.stride[3], columns - c) *
              read(a.y, y + c * a.y.stride[3], a.y.stride[3], columns - c);
    float dot = 0;
    for (int c = 0; c < W; c++) dot += dots[c];
    for (int64_t c = 0; c < columns; c += W) {
      vf g = read(a.dy, dy + c * a.dy.stride[3], a.dy.stride[3], columns - c) - dot;
      g *= read(a.y, y + c * a.y.stride[3], a.y.stride[3], columns - c) * a.scale;
      write(a.dx, dx + c * a.dx.stride[3], a.dx.stride[3], columns - c, g);
    }
  }
}
