// SPDX-License-Identifier: MIT
// torch.ops.minimal.*: the schemas, the check of every argument, the registration for the CPU, and the Python module
// minimal._C with facts about this build. The mathematics is in the kernels (kernels.h); fake and autograd rules are
// in minimal/fused.py, beside the call.
//
// Only PyTorch's stable ABI is used (torch/csrc/stable), so one binary serves every torch from the version named by
// TORCH_TARGET_VERSION on. Nothing here may trust its caller: an operator can be reached from anywhere with anything,
// and a wrong size that reaches a kernel is a segmentation fault.
//
// Letters: B batch, H query heads, Hkv key and value heads, Tq queries, Tk keys, D head size, Dv value size.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/version.h>

// The pybind11 that torch 2.10 bundles refuses files of the stable ABI, for its casters of tensors; none are used here.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "kernels.h"

namespace {

using minimal::Kind;
using minimal::kMaxLength;
using minimal::shape;
using minimal::text;
using minimal::Type;
using minimal::View;
using minimal::Weight;
using torch::stable::Tensor;
using Sizes = std::array<int64_t, 4>;

constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kMaxScores = int64_t{1} << 53;  // B * H * Tq * Tk: a kernel may multiply it by D + Dv without overflow

// ---------------------------------------------------------------------------------------------------- arguments

std::string text(const Sizes& s) { return text(s.data(), 4); }

std::string dtype_name(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int8()) return "int8";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  return "ScalarType " + std::to_string(dtype);
}

const char* name_of(Type type) {
  return type == Type::f32 ? "float32" : type == Type::bf16 ? "bfloat16" : "bool";
}
int64_t bytes_of(Type type) {
  return type == Type::f32 || type == Type::i32 ? 4 : type == Type::bf16 || type == Type::f16 ? 2 : 1;
}

struct Dtypes {
  bool f32, bf16, boolean;
  const char* text;
  bool i32 = false, i8 = false, u8 = false, f16 = false;
};
constexpr Dtypes kFloats{true, true, false, "float32 or bfloat16"};
constexpr Dtypes kFloat32{true, false, false, "float32"};
constexpr Dtypes kInt32{false, false, false, "int32", true};
constexpr Dtypes kInt8{false, false, false, "int8", false, true};
constexpr Dtypes kBytes{false, false, false, "uint8", false, false, true};
constexpr Dtypes kFloat16{false, false, false, "float16", false, false, false, true};
constexpr Dtypes kBfloat16{false, true, false, "bfloat16"};
constexpr Dtypes kMasks{true, true, true, "bool, float32 or bfloat16"};

// What a kernel may be shown of a tensor of up to four dimensions, aligned to the right: (Tq, Tk) becomes (1, 1, Tq, Tk).
// `op` and `name` are for the message.
View view(const char* op, const char* name, const Tensor& t, const Dtypes& wanted, int64_t min_dim) {
  minimal::check_dense(op, name, t);
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU, like the other arguments");
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));

  View v;
  if (wanted.f32 && dtype == aoti_torch_dtype_float32()) v.type = Type::f32;
  else if (wanted.bf16 && dtype == aoti_torch_dtype_bfloat16()) v.type = Type::bf16;
  else if (wanted.boolean && dtype == aoti_torch_dtype_bool()) v.type = Type::boolean;
  else if (wanted.i32 && dtype == aoti_torch_dtype_int32()) v.type = Type::i32;
  else if (wanted.i8 && dtype == aoti_torch_dtype_int8()) v.type = Type::i8;
  else if (wanted.u8 && dtype == aoti_torch_dtype_uint8()) v.type = Type::u8;
  else if (wanted.f16 && dtype == aoti_torch_dtype_float16()) v.type = Type::f16;
  else STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", dtype_name(dtype), "; wanted ", wanted.text);
  v.data = minimal::read_sizes(op, name, t, min_dim, 4, bytes_of(v.type), v.size, v.stride);
  return v;
}

void check_same_type(const char* op, const char* name, const View& v, const char* as, Type type) {
  STD_TORCH_CHECK(v.type == type, op, ": ", name, " has dtype ", name_of(v.type), "; wanted ", name_of(type), ", as ", as);
}

void check_size(const char* op, const char* name, const View& v, const Sizes& wanted, const char* letters) {
  for (int d = 0; d < 4; d++)
    STD_TORCH_CHECK(v.size[d] == wanted[d], op, ": ", name, " has shape ", text(v.size, 4), "; wanted ", text(wanted), " = ",
                    letters);
}

// A mask broadcasts by strides of 0; it is never copied out to the full size.
View mask_view(const char* op, const std::optional<Tensor>& mask, Type type, const Sizes& full) {
  if (!mask.has_value()) return View{};
  View m = view(op, "mask", *mask, kMasks, 0);
  STD_TORCH_CHECK(m.type != Type::bf16 || type == Type::bf16, op, ": mask has dtype bfloat16; wanted bool or float32, as the "
                  "scores are float32");
  for (int d = 0; d < 4; d++) {
    STD_TORCH_CHECK(m.size[d] == full[d] || m.size[d] == 1, op, ": mask has shape ", shape(*mask),
                    "; wanted a shape that broadcasts to ", text(full));
    if (m.size[d] == 1) m.stride[d] = 0;
    m.size[d] = full[d];
  }
  return m;
}

// Of (B, H, T, D) in memory, what lies outermost first: B, T, H, D where a tensor's heads lie inside its tokens.
bool heads_inside(const View& v) { return v.stride[1] > 0 && v.stride[1] < v.stride[2]; }

// A new tensor without gaps, dimensions in memory order if not `heads_inside`; the first `dim` sizes count.
Tensor empty(const char* op, const Sizes& sizes, int64_t dim, Type type, bool heads_inside = false) {
  Sizes strides{1, 1, 1, 1};
  int64_t n = bytes_of(type), length = 1;
  for (int64_t i = dim - 1; i >= 0; i--) {
    const int64_t d = heads_inside && (i == 1 || i == 2) ? 3 - i : i;
    strides[d] = length;
    const int64_t size = sizes[d] > 0 ? sizes[d] : 1;  // the stride under an empty dimension, as torch writes it
    STD_TORCH_CHECK(!__builtin_mul_overflow(n, size, &n), op, ": a result of shape ", text(sizes.data(), dim), " is too large");
    length *= size;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = type == Type::f32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  const auto failed = aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(!failed, op, ": no memory for a result of shape ", text(sizes.data(), dim), " (", n, " bytes)");
  return Tensor(handle);
}

// The view of a tensor that we have just made: `dim` dimensions aligned to the right or, for lse, to the left.
View fresh(const Tensor& t, const Sizes& sizes, Type type, bool heads_inside = false) {
  View v;
  v.data = t.mutable_data_ptr();
  v.type = type;
  int64_t stride = 1;
  for (int i = 3; i >= 0; i--) {
    const int d = heads_inside && (i == 1 || i == 2) ? 3 - i : i;
    v.size[d] = sizes[d];
    v.stride[d] = stride;
    stride *= sizes[d];
  }
  return v;
}

bool is_empty(const Sizes& s) { return s[0] == 0 || s[1] == 0 || s[2] == 0 || s[3] == 0; }
Sizes sizes_of(const View& v) { return {v.size[0], v.size[1], v.size[2], v.size[3]}; }

// PyTorch's own thread pool. An exception must not cross the C function in between, which would lose its type and its
// text: the first one waits here until every thread is done.
void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    try {
      body(context, begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// ---------------------------------------------------------------------------------------------------- operators

Tensor softmax(const Tensor& x, const std::optional<Tensor>& mask, double scale, bool causal) {
  const char* op = "minimal::softmax";
  const View vx = view(op, "x", x, kFloats, causal ? 2 : 1);
  const Sizes full = sizes_of(vx);
  const View vm = mask_view(op, mask, vx.type, full);
  STD_TORCH_CHECK(!mask.has_value() || mask->dim() <= x.dim(), op, ": mask has shape ", shape(*mask),
                  "; wanted a shape that broadcasts to ", shape(x));
  Sizes own{};
  for (int64_t d = 0; d < x.dim(); d++) own[d] = x.sizes()[d];
  Tensor y = empty(op, own, x.dim(), vx.type);
  if (!is_empty(full)) minimal::softmax_forward(vx, vm, static_cast<float>(scale), causal, fresh(y, full, vx.type), parallel);
  return y;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& y, double scale) {
  const char* op = "minimal::softmax_backward";
  const View vy = view(op, "y", y, kFloats, 1);
  const View vg = view(op, "grad", grad, kFloats, 1);
  const Sizes full = sizes_of(vy);
  check_same_type(op, "grad", vg, "y", vy.type);
  STD_TORCH_CHECK(grad.dim() == y.dim() && sizes_of(vg) == full, op, ": grad has shape ", shape(grad), "; wanted ", shape(y),
                  ", as y");
  Sizes own{};
  for (int64_t d = 0; d < y.dim(); d++) own[d] = y.sizes()[d];
  Tensor dx = empty(op, own, y.dim(), vy.type);
  if (!is_empty(full)) minimal::softmax_backward(vg, vy, static_cast<float>(scale), fresh(dx, full, vy.type), parallel);
  return dx;
}

struct Qkv {
  View q, k, v;
  minimal::Scores scores;
  Sizes out;  // (B, H, Tq, Dv)
  Sizes lse;  // (B, H, Tq, 1)
};

// What is done to the scores, as the schema has it.
struct Options {
  const std::optional<Tensor>& mask;
  double scale;
  bool causal;
  const std::optional<Tensor>& cu_seqlens;
  int64_t window;
  const std::optional<Tensor>& slopes;
  double softcap;
  const std::optional<Tensor>&cos, &sin;
};

Qkv check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  Qkv a{view(op, "q", q, kFloats, 4), view(op, "k", k, kFloats, 4), view(op, "v", v, kFloats, 4), {}, {}, {}};
  check_same_type(op, "k", a.k, "q", a.q.type);
  check_same_type(op, "v", a.v, "q", a.q.type);
  const int64_t B = a.q.size[0], H = a.q.size[1], Tq = a.q.size[2], D = a.q.size[3];
  const int64_t Hkv = a.k.size[1], Tk = a.k.size[2], Dv = a.v.size[3];
  STD_TORCH_CHECK(H >= 1, op, ": q has shape ", shape(q), " = (B, H, Tq, D); wanted H of 1 or more");
  STD_TORCH_CHECK(D >= 1 && D <= kMaxHeadSize, op, ": q has shape ", shape(q), " = (B, H, Tq, D); wanted D of 1 to ",
                  kMaxHeadSize);
  STD_TORCH_CHECK(Dv >= 1 && Dv <= kMaxHeadSize, op, ": v has shape ", shape(v), " = (B, Hkv, Tk, Dv); wanted Dv of 1 to ",
                  kMaxHeadSize);
  STD_TORCH_CHECK(Hkv >= 1 && H % Hkv == 0, op, ": k has shape ", shape(k), " = (B, Hkv, Tk, D); wanted an Hkv that divides H = ",
                  H);
  check_size(op, "k", a.k, {B, Hkv, Tk, D}, "(B, Hkv, Tk, D), with B and D of q");
  check_size(op, "v", a.v, {B, Hkv, Tk, Dv}, "(B, Hkv, Tk, Dv), with B, Hkv and Tk of k");
  int64_t scores = B;
  for (int64_t n : {H, Tq, Tk})
    STD_TORCH_CHECK(!__builtin_mul_overflow(scores, n, &scores) && scores <= kMaxScores, op, ": q has shape ", shape(q),
                    " and k ", shape(k), "; wanted at most ", kMaxScores, " scores");
  a.out = {B, H, Tq, Dv};
  a.lse = {B, H, Tq, 1};

  minimal::Scores& s = a.scores;
  s.scale = static_cast<float>(o.scale);
  s.mask = mask_view(op, o.mask, a.q.type, {B, H, Tq, Tk});
  s.causal = o.causal;
  STD_TORCH_CHECK(o.window >= 0 && o.window <= kMaxLength, op, ": window is ", o.window, "; wanted 0 (none) to ", kMaxLength);
  s.window = o.window;
  using Float = std::numeric_limits<float>;
  STD_TORCH_CHECK(o.softcap == 0 || (o.softcap >= Float::min() && o.softcap < Float::max()), op, ": softcap is ",
                  o.softcap, "; wanted 0 (none) or a positive number of float32");
  s.softcap = static_cast<float>(o.softcap);
  if (o.slopes.has_value()) {
    const View m = view(op, "slopes", *o.slopes, kFloat32, 1);
    STD_TORCH_CHECK(o.slopes->dim() <= 2 && m.size[3] == H && (o.slopes->dim() == 1 || m.size[2] == B), op,
                    ": slopes has shape ", shape(*o.slopes), "; wanted (", H, ") or (", B, ", ", H, "), one a head");
    s.slopes = {m.data, m.type, {B, H, 1, 1}, {m.stride[2], m.stride[3], 0, 0}};
  }
  STD_TORCH_CHECK(o.cos.has_value() == o.sin.has_value(), op, ": cos and sin; wanted both or neither");
  if (o.cos.has_value()) {
    STD_TORCH_CHECK(D % 32 == 0, op, ": cos and sin with q of shape ", shape(q), "; wanted a D that is a multiple of 32");
    STD_TORCH_CHECK(Tq <= Tk, op, ": cos and sin with ", Tq, " queries and ", Tk, " keys; wanted at least as many keys");
    for (auto [name, given, to] : {std::tuple{"cos", &*o.cos, &s.cos}, std::tuple{"sin", &*o.sin, &s.sin}}) {
      *to = view(op, name, *given, kFloat32, 2);
      STD_TORCH_CHECK(given->dim() <= 3 && (to->size[1] == B || to->size[1] == 1), op, ": ", name, " has shape ",
                      shape(*given), "; wanted (", Tk, ", ", D / 2, ") or (", B, ", ", Tk, ", ", D / 2, ") = (B, Tk, D / 2)");
      const int64_t rows = to->size[1] == 1 ? 0 : to->stride[1];
      *to = {to->data, to->type, {B, 1, to->size[2], to->size[3]}, {rows, 0, to->stride[2], to->stride[3]}};
      check_size(op, name, *to, {B, 1, Tk, D / 2}, "(B, 1, Tk, D / 2)");
    }
  }
  if (o.cu_seqlens.has_value()) {
    const View c = view(op, "cu_seqlens", *o.cu_seqlens, kInt32, 1);
    STD_TORCH_CHECK(Tq == Tk, op, ": cu_seqlens with ", Tq, " queries and ", Tk, " keys; wanted as many of both");
    STD_TORCH_CHECK(o.cu_seqlens->dim() == 1 && c.size[3] >= 2 && (c.stride[3] == 1 || c.size[3] == 1), op,
                    ": cu_seqlens has shape ", shape(*o.cu_seqlens), "; wanted one dimension of 2 or more, without gaps");
    s.documents = static_cast<const int32_t*>(c.data);
    s.boundaries = c.size[3];
    for (int64_t i = 0; i < s.boundaries; i++)
      STD_TORCH_CHECK(s.documents[i] >= (i ? s.documents[i - 1] : 0), op, ": cu_seqlens[", i, "] is ", s.documents[i],
                      "; wanted numbers that start at 0 and never fall");
    STD_TORCH_CHECK(s.documents[0] == 0 && s.documents[s.boundaries - 1] == B * Tq, op, ": cu_seqlens goes from ",
                    s.documents[0], " to ", s.documents[s.boundaries - 1], "; wanted 0 to ", B * Tq, " = B * T");
  }
  return a;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                                     double scale, bool causal, const std::optional<Tensor>& cu_seqlens, int64_t window,
                                     const std::optional<Tensor>& slopes, double softcap, const std::optional<Tensor>& cos,
                                     const std::optional<Tensor>& sin) {
  const char* op = "minimal::attention";
  const Qkv a = check_qkv(op, q, k, v, {mask, scale, causal, cu_seqlens, window, slopes, softcap, cos, sin});
  const bool inside = heads_inside(a.q);  // the result is laid out as q is
  Tensor out = empty(op, a.out, 4, a.q.type, inside);
  Tensor lse = empty(op, a.lse, 3, Type::f32);
  if (!is_empty(a.out))
    minimal::attention_forward(a.q, a.k, a.v, a.scores, fresh(out, a.out, a.q.type, inside),
                               fresh(lse, a.lse, Type::f32), parallel);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse, const std::optional<Tensor>& mask,
                                                      double scale, bool causal, const std::optional<Tensor>& cu_seqlens,
                                                      int64_t window, const std::optional<Tensor>& slopes, double softcap,
                                                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  const char* op = "minimal::attention_backward";
  const Qkv a = check_qkv(op, q, k, v, {mask, scale, causal, cu_seqlens, window, slopes, softcap, cos, sin});
  const View vg = view(op, "grad", grad, kFloats, 4), vo = view(op, "out", out, kFloats, 4);
  check_same_type(op, "grad", vg, "q", a.q.type);
  check_same_type(op, "out", vo, "q", a.q.type);
  check_size(op, "grad", vg, a.out, "(B, H, Tq, Dv)");
  check_size(op, "out", vo, a.out, "(B, H, Tq, Dv)");
  View vl = view(op, "lse", lse, kFloat32, 3);
  STD_TORCH_CHECK(lse.dim() == 3 && vl.size[1] == a.lse[0] && vl.size[2] == a.lse[1] && vl.size[3] == a.lse[2], op,
                  ": lse has shape ", shape(lse), "; wanted ", text(a.lse.data(), 3), " = (B, H, Tq)");
  for (int d = 0; d < 4; d++) {  // (B, H, Tq) -> (B, H, Tq, 1)
    vl.size[d] = a.lse[d];
    vl.stride[d] = d < 3 ? vl.stride[d + 1] : 1;
  }

  const Sizes sq = sizes_of(a.q), sk = sizes_of(a.k), sv = sizes_of(a.v);
  const bool q_inside = heads_inside(a.q), k_inside = heads_inside(a.k), v_inside = heads_inside(a.v);
  const Type type = a.q.type;
  Tensor dq = empty(op, sq, 4, type, q_inside), dk = empty(op, sk, 4, type, k_inside), dv = empty(op, sv, 4, type, v_inside);
  if (!is_empty(sq) || !is_empty(sk))
    minimal::attention_backward(vg, a.q, a.k, a.v, vo, vl, a.scores, fresh(dq, sq, type, q_inside),
                                fresh(dk, sk, type, k_inside), fresh(dv, sv, type, v_inside), parallel);
  return {dq, dk, dv};
}

// ---------------------------------------------------------------------------------------------------- gates of an MLP

// float32 of up to four dimensions without gaps; `like`: the shape wanted.
float* numbers(const char* op, const char* name, const Tensor& t, const Tensor* like = nullptr, const char* as = nullptr) {
  const View v = view(op, name, t, kFloat32, 0);
  if (like) {
    bool same = t.dim() == like->dim();
    for (int64_t d = 0; same && d < t.dim(); d++) same = t.sizes()[d] == like->sizes()[d];
    STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape(t), "; wanted ", shape(*like), ", as ", as);
  }
  int64_t stride = 1;
  bool whole = true;
  for (int64_t d = 3; d >= 0; d--) {
    whole &= v.size[d] <= 1 || v.stride[d] == stride;
    stride *= v.size[d] > 0 ? v.size[d] : 1;
  }
  STD_TORCH_CHECK(whole || v.data == nullptr, op, ": ", name, " of shape ", shape(t),
                  " has gaps or swapped dimensions; wanted a contiguous tensor");
  return static_cast<float*>(v.data);
}
Tensor numbers_like(const char* op, const Tensor& t) {
  Sizes own{};
  for (int64_t d = 0; d < t.dim(); d++) own[d] = t.sizes()[d];
  return empty(op, own, t.dim(), Type::f32);
}
float* data_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor gelu(const Tensor& x) {
  const char* op = "minimal::gelu";
  const float* in = numbers(op, "x", x);
  Tensor y = numbers_like(op, x);
  if (x.numel()) minimal::gelu(x.numel(), in, data_of(y), parallel);
  return y;
}
Tensor gelu_backward(const Tensor& grad, const Tensor& x) {
  const char* op = "minimal::gelu_backward";
  const float *in = numbers(op, "x", x), *g = numbers(op, "grad", grad, &x, "x");
  Tensor dx = numbers_like(op, x);
  if (x.numel()) minimal::gelu_backward(x.numel(), g, in, data_of(dx), parallel);
  return dx;
}
Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const char* op = "minimal::swiglu";
  const float *g = numbers(op, "gate", gate), *u = numbers(op, "up", up, &gate, "gate");
  Tensor y = numbers_like(op, gate);
  if (gate.numel()) minimal::swiglu(gate.numel(), g, u, data_of(y), parallel);
  return y;
}
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const char* op = "minimal::swiglu_backward";
  const float *g = numbers(op, "gate", gate), *u = numbers(op, "up", up, &gate, "gate"), *d = numbers(op, "grad", grad, &gate, "gate");
  Tensor dg = numbers_like(op, gate), du = numbers_like(op, gate);
  if (gate.numel()) minimal::swiglu_backward(gate.numel(), d, g, u, data_of(dg), data_of(du), parallel);
  return {dg, du};
}

// ---------------------------------------------------------------------------------------------------- linear layers

// Letters here: N rows of x, O outputs and C inputs of the layer.

// A part of a weight: without gaps, and of this shape (-1: any size).
View held(const char* op, const char* name, const Tensor& t, const Dtypes& wanted, std::initializer_list<int64_t> sizes,
          const char* letters) {
  const int64_t dim = static_cast<int64_t>(sizes.size()), own = t.dim();
  const View v = view(op, name, t, wanted, dim < own ? dim : own);
  bool fits = own == dim;
  int64_t stride = 1, d = 4;
  bool whole = true;
  for (auto size = sizes.end(); size != sizes.begin();) {
    d--, size--;
    fits &= *size < 0 || v.size[d] == *size;
    whole &= v.size[d] <= 1 || v.stride[d] == stride;
    whole = whole && !__builtin_mul_overflow(stride, v.size[d], &stride);
  }
  if (!fits) {
    std::string text;
    for (int64_t size : sizes) text += (text.empty() ? "(" : ", ") + (size < 0 ? "any" : std::to_string(size));
    STD_TORCH_CHECK(false, op, ": ", name, " has shape ", shape(t), "; wanted ", text, dim == 1 ? ",) = " : ") = ", letters);
  }
  STD_TORCH_CHECK(whole || v.data == nullptr, op, ": ", name, " of shape ", shape(t),
                  " has gaps or swapped dimensions; wanted a contiguous tensor");
  return v;
}

Weight held_int8(const char* op, const Tensor& codes, const Tensor& scale) {
  const View c = held(op, "codes", codes, kInt8, {-1, -1}, "(O, C)");
  const View s = held(op, "scale", scale, kFloat32, {c.size[2]}, "(O,)");
  Weight w{Kind::int8, c.size[2], c.size[3], c.data};
  w.end = static_cast<const char*>(c.data) + w.O * w.C;
  w.scale = static_cast<const float*>(s.data);
  return w;
}

Weight held_int4(const char* op, const Tensor& codes, const Tensor& scale, const Tensor& least, int64_t C) {
  const View c = held(op, "codes", codes, kBytes, {-1, -1, 16}, "(O, C/32, 16)");
  const int64_t O = c.size[1], groups = c.size[2];
  STD_TORCH_CHECK(C >= 0 && C <= kMaxLength && (C + 31) / 32 == groups, op, ": codes has shape ", shape(codes), " for C = ", C,
                  "; wanted (O, ", C >= 0 && C <= kMaxLength ? (C + 31) / 32 : 0, ", 16) = (O, C/32, 16)");
  const View s = held(op, "scale", scale, kFloat16, {O, groups}, "(O, C/32)");
  const View l = held(op, "least", least, kFloat16, {O, groups}, "(O, C/32)");
  Weight w{Kind::int4, O, C, c.data};
  w.end = static_cast<const char*>(c.data) + O * groups * 16;
  w.scale16 = static_cast<const uint16_t*>(s.data), w.least16 = static_cast<const uint16_t*>(l.data);
  return w;
}

// O and C are not known from these: n blocks of 64 are flat.
Weight held_nf4(const char* op, const Tensor& codes, const Tensor& absmax, const Tensor& scale, const Tensor& mean,
                const Tensor& levels) {
  const View a = held(op, "absmax", absmax, kInt8, {-1}, "(n,), one for a block of 64");
  const int64_t n = a.size[3];
  const View c = held(op, "codes", codes, kBytes, {32 * n}, "(32 n,)");
  const View s = held(op, "scale", scale, kFloat32, {(n + 255) / 256}, "(n/256,)");
  const View m = held(op, "mean", mean, kFloat32, {1}, "(1,)");
  const View l = held(op, "levels", levels, kFloat32, {16}, "(16,)");
  Weight w{Kind::nf4, 1, 64 * n, c.data};
  w.end = static_cast<const char*>(c.data) + 32 * n;
  w.absmax = static_cast<const int8_t*>(a.data), w.scale = static_cast<const float*>(s.data);
  w.mean = static_cast<const float*>(m.data), w.levels = static_cast<const float*>(l.data);
  return w;
}

Weight held_floats(const char* op, const char* name, const Tensor& weight, const Dtypes& wanted, int64_t C) {
  const View v = held(op, name, weight, wanted, {-1, C}, "(O, C)");
  Weight w{v.type == Type::f32 ? Kind::f32 : Kind::bf16, v.size[2], v.size[3], v.data};
  w.end = static_cast<const char*>(v.data) + bytes_of(v.type) * w.O * w.C;
  return w;
}

// x (N, C); C is asked for before the weight is known.
View rows(const char* op, const Tensor& x) { return view(op, "x", x, kFloats, 2); }

Tensor linear(const char* op, const Tensor& given, const View& x, const Weight& w, const std::optional<Tensor>& bias, bool dynamic) {
  STD_TORCH_CHECK(given.dim() == 2 && x.size[3] == w.C, op, ": x has shape ", shape(given), "; wanted (N, ", w.C, ") = (N, C)");
  View b;
  if (bias.has_value()) {
    b = view(op, "bias", *bias, kFloats, 1);
    STD_TORCH_CHECK(bias->dim() == 1 && b.size[3] == w.O, op, ": bias has shape ", shape(*bias), "; wanted (", w.O, ",) = (O,)");
  }
  const Sizes sizes{x.size[2], w.O, 0, 0};
  Tensor y = empty(op, sizes, 2, x.type);
  const Sizes full{1, 1, x.size[2], w.O};
  if (!is_empty(full)) minimal::linear_forward(x, w, b, dynamic, fresh(y, full, x.type), parallel);
  return y;
}

Tensor linear_int8(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias, bool dynamic) {
  const char* op = "minimal::linear_int8";
  return linear(op, x, rows(op, x), held_int8(op, codes, scale), bias, dynamic);
}
Tensor linear_int4(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& least,
                   const std::optional<Tensor>& bias, bool dynamic) {
  const char* op = "minimal::linear_int4";
  const View v = rows(op, x);
  return linear(op, x, v, held_int4(op, codes, scale, least, v.size[3]), bias, dynamic);
}
Tensor linear_nf4(const Tensor& x, const Tensor& codes, const Tensor& absmax, const Tensor& scale, const Tensor& mean,
                  const Tensor& levels, const std::optional<Tensor>& bias) {
  const char* op = "minimal::linear_nf4";
  const View v = rows(op, x);
  Weight w = held_nf4(op, codes, absmax, scale, mean, levels);
  const int64_t C = v.size[3];
  STD_TORCH_CHECK(C > 0 && C % 64 == 0 && w.C % C == 0, op, ": x has shape ", shape(x), " and codes ", shape(codes),
                  "; wanted a C that is a multiple of 64, and O C / 2 codes");
  w.O = w.C / C, w.C = C;
  return linear(op, x, v, w, bias, false);
}
Tensor linear_bf16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "minimal::linear_bf16";
  return linear(op, x, rows(op, x), held_floats(op, "weight", weight, kBfloat16, -1), bias, false);
}
Tensor linear_f32(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "minimal::linear_f32";
  return linear(op, x, rows(op, x), held_floats(op, "weight", weight, kFloat32, -1), bias, false);
}

Tensor unpacked(const char* op, const Weight& w, const Sizes& sizes, int64_t dim, bool bfloat16) {
  const Type type = bfloat16 ? Type::bf16 : Type::f32;
  Tensor out = empty(op, sizes, dim, type);
  const Sizes full{1, 1, w.O, w.C};
  if (!is_empty(full)) minimal::unpack(w, fresh(out, full, type), parallel);
  return out;
}
Tensor unpack_int8(const Tensor& codes, const Tensor& scale, bool bfloat16) {
  const char* op = "minimal::unpack_int8";
  const Weight w = held_int8(op, codes, scale);
  return unpacked(op, w, {w.O, w.C, 0, 0}, 2, bfloat16);
}
Tensor unpack_int4(const Tensor& codes, const Tensor& scale, const Tensor& least, int64_t C, bool bfloat16) {
  const char* op = "minimal::unpack_int4";
  const Weight w = held_int4(op, codes, scale, least, C);
  return unpacked(op, w, {w.O, w.C, 0, 0}, 2, bfloat16);
}
Tensor unpack_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& scale, const Tensor& mean, const Tensor& levels,
                  int64_t first, int64_t count, bool bfloat16) {
  const char* op = "minimal::unpack_nf4";
  Weight w = held_nf4(op, codes, absmax, scale, mean, levels);
  STD_TORCH_CHECK(first >= 0 && first % 64 == 0 && count >= 0 && first <= w.C && count <= w.C - first, op, ": first is ", first,
                  " and count ", count, "; wanted a part of the ", w.C, " weights that begins at a multiple of 64");
  w.first = first / 64, w.C = count;
  return unpacked(op, w, {count, 0, 0, 0}, 1, bfloat16);
}

// ---------------------------------------------------------------------------------------------------- a Llama's block

// A weight of as many inputs as `C` says, in what the dtype of its codes tells: float32, bfloat16, int8 or 4 bits (uint8).
Weight weight_of(const char* op, const char* name, const Tensor& codes, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& least, int64_t C) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(codes.get(), &dtype));
  const bool int8 = dtype == aoti_torch_dtype_int8(), int4 = dtype == aoti_torch_dtype_uint8();
  STD_TORCH_CHECK(scale.has_value() == (int8 || int4) && least.has_value() == int4, op, ": ", name, " of ", dtype_name(dtype),
                  "; wanted a scale beside int8, scale and least beside uint8, and neither beside floats");
  if (int8 || int4) {
    const Weight w = int8 ? held_int8(op, codes, *scale) : held_int4(op, codes, *scale, *least, C);
    STD_TORCH_CHECK(w.C == C, op, ": ", name, " has ", w.C, " inputs; wanted ", C);
    return w;
  }
  constexpr Dtypes floats{true, true, false, "float32, bfloat16, int8 or uint8"};
  return held_floats(op, name, codes, floats, C);
}

Tensor llama_block(const Tensor& x, const Tensor& norm1, const Tensor& norm2,
                   const Tensor& qkv, const std::optional<Tensor>& qkv_scale, const std::optional<Tensor>& qkv_least,
                   const Tensor& o, const std::optional<Tensor>& o_scale, const std::optional<Tensor>& o_least,
                   const Tensor& gate_up, const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& gate_up_least,
                   const Tensor& down, const std::optional<Tensor>& down_scale, const std::optional<Tensor>& down_least,
                   const Tensor& cos, const Tensor& sin, const Tensor& cache, int64_t start, double eps, bool dynamic) {
  const char* op = "minimal::llama_block";
  const View vx = held(op, "x", x, kFloat32, {-1, -1}, "(B T, C)");
  const View kv = held(op, "cache", cache, kFloat32, {-1, -1, -1, -1}, "(B, 2 Hkv, context, D)");
  minimal::Block a;
  a.rows = kv.size[0], a.C = vx.size[3], a.kv_heads = kv.size[1] / 2, a.context = kv.size[2], a.D = kv.size[3];
  STD_TORCH_CHECK(a.C > 0 && kv.size[1] > 0 && kv.size[1] % 2 == 0 && a.D > 0 && a.D % 2 == 0 && a.D <= kMaxHeadSize, op, ": cache has shape ",
                  shape(cache), " and x ", shape(x), "; wanted (B, 2 Hkv, context, D) with an even D up to ", kMaxHeadSize);
  const View vcos = held(op, "cos", cos, kFloat32, {-1, a.D}, "(T, D)");
  a.tokens = vcos.size[2];
  STD_TORCH_CHECK(a.tokens > 0 && vx.size[2] / a.tokens == a.rows && vx.size[2] % a.tokens == 0, op, ": x has shape ", shape(x), ", cos ",
                  shape(cos), " and cache ", shape(cache), "; wanted B T rows, T of 1 or more, and B");
  STD_TORCH_CHECK(start >= 0 && start <= a.context - a.tokens, op, ": start is ", start, " for ", a.tokens, " tokens; wanted 0 to ",
                  a.context - a.tokens, ", as the cache has ", a.context, " places");
  a.start = start, a.eps = static_cast<float>(eps), a.dynamic = dynamic;
  a.x = static_cast<const float*>(vx.data), a.cache = static_cast<float*>(kv.data);
  auto line = [&](const char* name, const Tensor& t, int64_t n) {
    return static_cast<const float*>(held(op, name, t, kFloat32, {n}, "(n,)").data);
  };
  a.norm1 = line("norm1", norm1, a.C), a.norm2 = line("norm2", norm2, a.C);
  a.cos = static_cast<const float*>(vcos.data);
  a.sin = static_cast<const float*>(held(op, "sin", sin, kFloat32, {a.tokens, a.D}, "(T, D)").data);
  a.qkv = weight_of(op, "qkv", qkv, qkv_scale, qkv_least, a.C);
  a.heads = a.qkv.O / a.D - 2 * a.kv_heads;
  STD_TORCH_CHECK(a.qkv.O % a.D == 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op, ": qkv has ", a.qkv.O,
                  " outputs; wanted (H + 2 Hkv) D for Hkv = ", a.kv_heads, ", D = ", a.D, " and an H that Hkv divides");
  a.o = weight_of(op, "o", o, o_scale, o_least, a.heads * a.D);
  a.gate_up = weight_of(op, "gate_up", gate_up, gate_up_scale, gate_up_least, a.C);
  a.down = weight_of(op, "down", down, down_scale, down_least, a.gate_up.O / 2);
  STD_TORCH_CHECK(a.o.O == a.C && a.down.O == a.C && a.gate_up.O % 2 == 0, op, ": o, down and gate_up have ", a.o.O, ", ", a.down.O,
                  " and ", a.gate_up.O, " outputs; wanted C = ", a.C, " twice, and 2 F");
  Tensor out = empty(op, {vx.size[2], a.C, 0, 0}, 2, Type::f32);
  a.out = static_cast<float*>(out.mutable_data_ptr());
  if (a.rows > 0) minimal::llama_block(a, parallel);
  return out;
}

// ---------------------------------------------------------------------------------------------------- build facts

std::string torch_version(uint64_t abi) {  // one byte each: major, minor, patch
  return std::to_string(abi >> 56) + "." + std::to_string(abi >> 48 & 255) + "." + std::to_string(abi >> 40 & 255);
}

}  // namespace

STABLE_TORCH_LIBRARY(minimal, m) {
  // A mask is boolean (true: may attend) or additive and broadcasts to the scores; causal is aligned bottom-right; a row
  // with nothing to attend to gives zeros. lse is the natural logarithm of the sum of exponentials, -inf for such a row.
  m.def("softmax(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor y, float scale) -> Tensor");
  // window > 0: only keys nearer than that to the query's own place. cu_seqlens: where documents begin, in the tokens of
  // all rows laid end to end. slopes: of ALiBi, one a head. softcap > 0: softcap * tanh(score / softcap), before slopes and
  // mask. cos, sin: of the rotary positions of all keys, by which q and k are turned on their way in.
#define MINIMAL_OPTIONS \
  "Tensor? mask, float scale, bool causal, Tensor? cu_seqlens=None, int window=0, Tensor? slopes=None, float softcap=0.0, " \
  "Tensor? cos=None, Tensor? sin=None"
  m.def("attention(Tensor q, Tensor k, Tensor v, " MINIMAL_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " MINIMAL_OPTIONS
        ") -> (Tensor, Tensor, Tensor)");

  // Between the products of an MLP, float32 without gaps: GELU in its tanh form; silu(gate) up, and the
  // gradients to gate and up.
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");

  // Linear layers with a weight (O, C) in few bits (kernels.h says how), for few rows x (N, C) -> (N, O) of x's dtype, and
  // the weight itself in floats. dynamic: x is rounded to 8 bits, in groups of 32 columns. nf4: C is a multiple of 64.
#define MINIMAL_NF4 "Tensor codes, Tensor absmax, Tensor scale, Tensor mean, Tensor levels, "
  m.def("linear_int8(Tensor x, Tensor codes, Tensor scale, Tensor? bias, bool dynamic) -> Tensor");
  m.def("linear_int4(Tensor x, Tensor codes, Tensor scale, Tensor least, Tensor? bias, bool dynamic) -> Tensor");
  m.def("linear_nf4(Tensor x, " MINIMAL_NF4 "Tensor? bias) -> Tensor");
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_f32(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("unpack_int8(Tensor codes, Tensor scale, bool bfloat16) -> Tensor");
  m.def("unpack_int4(Tensor codes, Tensor scale, Tensor least, int C, bool bfloat16) -> Tensor");
  m.def("unpack_nf4(" MINIMAL_NF4 "int first, int count, bool bfloat16) -> Tensor");  // of W flattened, a part
  // T tokens of each row, x (B T, C), through a block of a Llama: minimal/decoder.py has the equations. cos and sin (T, D) are
  // of the places from `start` on, where k and v are written into the cache (B, 2 Hkv, context, D). A weight (O, C) is float32 or bfloat16,
  // int8 with a scale, or uint8 with scale and least, as in linear_*.
#define MINIMAL_WEIGHT(name) "Tensor " name ", Tensor? " name "_scale, Tensor? " name "_least, "
  m.def("llama_block(Tensor x, Tensor norm1, Tensor norm2, " MINIMAL_WEIGHT("qkv") MINIMAL_WEIGHT("o") MINIMAL_WEIGHT("gate_up")
        MINIMAL_WEIGHT("down") "Tensor cos, Tensor sin, Tensor(a!) cache, int start, float eps, bool dynamic) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minimal, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("llama_block", TORCH_BOX(&llama_block));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("linear_nf4", TORCH_BOX(&linear_nf4));
  m.impl("linear_bf16", TORCH_BOX(&linear_bf16));
  m.impl("linear_f32", TORCH_BOX(&linear_f32));
  m.impl("unpack_int8", TORCH_BOX(&unpack_int8));
  m.impl("unpack_int4", TORCH_BOX(&unpack_int4));
  m.impl("unpack_nf4", TORCH_BOX(&unpack_nf4));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Importing this module registers torch.ops.minimal.*; its attributes are facts about the build.";
#if defined(__clang__)
  m.attr("compiler") = "Clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "GCC " __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
#ifdef MINIMAL_FLAGS
  m.attr("flags") = MINIMAL_FLAGS;
#else
  m.attr("flags") = "";
#endif
  m.attr("version") = 2;  // of the operators: more where one is added or takes other arguments
  m.attr("torch_built_with") = torch_version(TORCH_ABI_VERSION);
  m.attr("torch_needed") = torch_version(TORCH_TARGET_VERSION);
  m.def("instruction_sets", [] { return std::string(minimal::instruction_sets()); },
        "The instruction sets compiled in that this processor can run, best first, comma-separated.");
  m.def("instruction_set", [] { return std::string(minimal::instruction_set()); }, "The one in use.");
  m.def("many_rows_in_integers", [] {
    const bool int8 = minimal::many_rows_in_integers(Kind::int8), int4 = minimal::many_rows_in_integers(Kind::int4);
    return std::string(int8 ? "int8,int4" : int4 ? "int4" : "");
  }, "The kinds of weights, comma-separated, with which many rows of x rounded to 8 bits are faster than floats, too.");
  m.def("choose_instruction_set", [](const std::string& name) {
    if (!minimal::choose_instruction_set(name.c_str()))
      throw pybind11::value_error("name=\"" + name + "\" is not an instruction set of this build and processor; wanted one of " +
                                  minimal::instruction_sets() + ", or \"\" for the best");
  }, pybind11::arg("name"), "Use this one from now on (\"\": the best); ValueError if it cannot run here.");
}
