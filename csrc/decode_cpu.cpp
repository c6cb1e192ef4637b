// SPDX-License-Identifier: MIT
// Attention of a single query, as in decoding with a cache: how the keys are shared between the threads.
#include <cstdint>

#include "kernels.h"

namespace minimal {

struct Decode {
  View q, k, v;
  Scores scores;
  View out, lse;
  float* parts;  // (B * Hkv, chunks, H / Hkv, 16 + Dv): m and l in front, then O
};
// Keys of a chunk. It never depends on the threads, so that neither do the bits of the result.
constexpr int64_t CHUNK = 256;
constexpr int64_t HEADER = 16;

}  // namespace minimal

#define MINIMAL_KERNEL "decode_kernel.h"
#include "every_isa.h"

namespace minimal {

bool decode_takes(const View& q, const View& k, const View& v, const Scores& scores) {
  auto whole = [](const View& x) { return x.type != Type::boolean && x.stride[3] == 1 && x.size[3] % 32 == 0; };
  return q.size[2] == 1 && k.size[2] >= 16 && whole(k) && whole(v) && !scores.cos.data;
}

void decode_forward(View q, View k, View v, const Scores& scores, View out, View lse, Parallel parallel) {
  const int64_t heads = k.size[0] * k.size[1], chunks = (k.size[2] + CHUNK - 1) / CHUNK;
  ScratchBlock block(heads * chunks * (q.size[1] / k.size[1]) * (HEADER + v.size[3]));
  Decode a{q, k, v, scores, out, lse, block.start().next};
  const bool small = heads * k.size[2] * (k.size[3] + v.size[3]) < 50000;
  auto run = [&](int64_t n, void (*body)(void*, int64_t, int64_t)) {
    if (small) body(&a, 0, n); else parallel(n, body, &a);
  };
  const auto joins = MINIMAL_BEST(decode_joins);  // in the order of the same instruction set
  run(heads * chunks, MINIMAL_BEST(decode_chunks));
  joins(&a, 0, heads);
}

}  // namespace minimal
