// SPDX-License-Identifier: MIT
// torch.ops.minimal.* on CUDA: the check of every argument, and the launch. The schemas are in ops.cpp; the kernels, in
// softmax.cuh and attention.cuh, know nothing of torch. Only PyTorch's stable ABI is used, which also links and loads
// where torch has no CUDA, so that this file can be built and imported for a test on any machine.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "attention.cuh"
#include "attention_backward.cuh"
#include "softmax.cuh"

#if TORCH_TARGET_VERSION < 0x020d000000000000
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using minimal::cuda::AttentionArgs;
using minimal::cuda::Dtype;
using minimal::cuda::Mask;
using minimal::cuda::MaskType;
using minimal::cuda::Shape4;
using minimal::cuda::Strided;
using minimal::cuda::View4;
using minimal::shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::array<int64_t, 4>;

// ---------------------------------------------------------------------------------------------------- arguments

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}
bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// Of a tensor of up to four dimensions, aligned to the right: (Tq, Tk) becomes (1, 1, Tq, Tk).
struct View {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;
  Sizes size{}, stride{};
};

int32_t device_of(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.defined(), op, ": ", name, " is an undefined tensor");
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " must be on CUDA, like the other arguments");
  return t.get_device_index();
}

// What a kernel may be shown of `t`. `op` and `name` are for the message, `device` is where it has to be.
View view(const char* op, const char* name, const Tensor& t, int32_t device, int64_t min_dim, int64_t max_dim = 4) {
  minimal::check_dense(op, name, t);
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": ", name, " must be on cuda:", device,
                  ", like the other arguments");
  View v;
  v.type = t.scalar_type();
  const bool half = v.type == ScalarType::Half || v.type == ScalarType::BFloat16;
  const int64_t bytes = v.type == ScalarType::Bool ? 1 : half ? 2 : 4;
  v.data = minimal::read_sizes(op, name, t, min_dim, max_dim, bytes, v.size.data(), v.stride.data());
  return v;
}

void check_float(const char* op, const char* name, const View& v) {
  STD_TORCH_CHECK(is_float(v.type), op, ": ", name, " has dtype ", name_of(v.type),
                  "; wanted float32, float16 or bfloat16");
}
void check_same_type(const char* op, const char* name, const View& v, const char* as, const View& other) {
  STD_TORCH_CHECK(v.type == other.type, op, ": ", name, " has dtype ", name_of(v.type), "; wanted ",
                  name_of(other.type), ", as ", as);
}

template <class T>
View4<T> shown(const View& v) {
  return {static_cast<T*>(v.data), {v.stride[0], v.stride[1], v.stride[2], v.stride[3]}};
}

// A mask broadcasts by strides of 0; it is never copied out to the full size.
Mask mask_of(const char* op, const std::optional<Tensor>& mask, const Tensor& x, const View& vx) {
  if (!mask.has_value()) return {};
  View m = view(op, "mask", *mask, x.get_device_index(), 0, x.dim());
  STD_TORCH_CHECK(m.type == ScalarType::Bool || m.type == ScalarType::Float || m.type == vx.type, op,
                  ": mask has dtype ", name_of(m.type), "; wanted bool, float32 or ", name_of(vx.type));
  for (int d = 0; d < 4; d++) {
    STD_TORCH_CHECK(m.size[d] == vx.size[d] || m.size[d] == 1, op, ": mask has shape ", shape(*mask),
                    "; wanted a shape that broadcasts to ", shape(x));
    if (m.size[d] == 1) m.stride[d] = 0;
  }
  return {shown<const void>(m), m.type == ScalarType::Bool ? MaskType::boolean
                                : m.type == ScalarType::Float ? MaskType::float32
                                                              : MaskType::same};
}

// ---------------------------------------------------------------------------------------------------- launches

cudaStream_t current_stream(int32_t device) {
#if TORCH_TARGET_VERSION >= 0x020d000000000000
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else  // before torch 2.13 only a torch with CUDA could say
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// run(T()) with T the type of the elements.
template <class F>
void with_dtype(ScalarType type, F run) {
  if (type == ScalarType::Float) run(float());
  else if (type == ScalarType::Half) run(__half());
  else run(__nv_bfloat16());
}

// What the kernels' files call to start a kernel.
struct Launch {
  const char* op;
  cudaStream_t stream;
  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA says: ", cudaGetErrorString(error));
  }
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                  const Arguments&... arguments) const {
    if (shared > 48 * 1024)  // more has to be asked for
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<unsigned(blocks), unsigned(threads), size_t(shared), stream>>>(arguments...);
    check(cudaGetLastError());
  }
};

Shape4 shape4(const View& v) { return {v.size[0], v.size[1], v.size[2], v.size[3]}; }

// ---------------------------------------------------------------------------------------------------- operators

Tensor softmax(const Tensor& x, const std::optional<Tensor>& mask, double scale, bool causal) {
  const char* op = "minimal::softmax";
  const int32_t device = device_of(op, "x", x);
  const View vx = view(op, "x", x, device, causal ? 2 : 1);
  check_float(op, "x", vx);
  const Mask m = mask_of(op, mask, x, vx);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Launch launch{op, current_stream(device)};
  with_dtype(vx.type, [&](auto zero) {
    using T = decltype(zero);
    minimal::cuda::softmax_forward<T>(shown<const T>(vx), m, shape4(vx), float(scale), causal,
                                      static_cast<T*>(y.mutable_data_ptr()), launch);
  });
  return y;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& y, double scale) {
  const char* op = "minimal::softmax_backward";
  const int32_t device = device_of(op, "y", y);
  const View vy = view(op, "y", y, device, 1), vg = view(op, "grad", grad, device, 1);
  check_float(op, "y", vy);
  check_same_type(op, "grad", vg, "y", vy);
  STD_TORCH_CHECK(grad.dim() == y.dim() && vg.size == vy.size, op, ": grad has shape ", shape(grad), "; wanted ",
                  shape(y), ", as y");
  Tensor dx = torch::stable::new_empty(y, y.sizes());
  if (y.numel() == 0) return dx;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Launch launch{op, current_stream(device)};
  with_dtype(vy.type, [&](auto zero) {
    using T = decltype(zero);
    minimal::cuda::softmax_backward<T>(shown<const T>(vg), shown<const T>(vy), shape4(vy), float(scale),
                                       static_cast<T*>(dx.mutable_data_ptr()), launch);
  });
  return dx;
}

// A tensor (B, heads, T, D) for the attention kernels, which read 16 bytes at a time: one that does not lie so is
// copied, and `t` is then the copy.
Strided rows(Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t bytes = t.scalar_type() == ScalarType::Float ? 4 : 2;
  bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && strides[3] == 1;
  for (int d = 0; d < 3; d++) fits &= sizes[d] <= 1 || strides[d] * bytes % 16 == 0;
  if (!fits) {
    Tensor copy = torch::stable::new_empty(t, sizes);
    torch::stable::copy_(copy, t);
    t = copy;
  }
  void* const data = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;  // inputs are only read
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}

// A new tensor of x's sizes without gaps, its heads inside its tokens, (B, T, H, D) in memory, if x's are.
Tensor laid_out_as(const Tensor& x) {
  if (!(x.stride(1) > 0 && x.stride(1) < x.stride(2))) return torch::stable::new_empty(x, x.sizes());
  return torch::stable::transpose(torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}), 1, 2);
}

// The arguments of attention that both directions have. The tensors stay alive as long as this does.
struct Attention {
  const char* op;
  int32_t device;
  Tensor q, k, v;
  std::optional<Tensor> documents;
  View vq, vk, vv;
  AttentionArgs a;

  Attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
            double scale, bool causal, const std::optional<Tensor>& cu_seqlens, int64_t window,
            const std::optional<Tensor>& slopes, double softcap,
            const std::optional<Tensor>& cos, const std::optional<Tensor>& sin)
      : op(op), device(device_of(op, "q", q)), q(q), k(k), v(v), documents(cu_seqlens), vq(view(op, "q", q, device, 4)),
        vk(view(op, "k", k, device, 4)), vv(view(op, "v", v, device, 4)) {
    STD_TORCH_CHECK(!mask.has_value(), op, ": mask: the CUDA kernels take none");
    STD_TORCH_CHECK(!slopes.has_value(), op, ": slopes: the CUDA kernels take none");
    STD_TORCH_CHECK(!cos.has_value() && !sin.has_value(), op, ": cos and sin: the CUDA kernels take none");
    STD_TORCH_CHECK(softcap == 0, op, ": softcap=", softcap, "; the CUDA kernels take none (0)");
    STD_TORCH_CHECK(window >= 0, op, ": window=", window, "; wanted 1 or more, or 0 for none");
    check_float(op, "q", vq);
    check_same_type(op, "k", vk, "q", vq);
    check_same_type(op, "v", vv, "q", vq);
    const auto [B, H, Tq, D] = vq.size;
    const int64_t Hkv = vk.size[1], Tk = vk.size[2];
    STD_TORCH_CHECK(H >= 1 && Hkv >= 1 && H % Hkv == 0, op, ": k has shape ", shape(k),
                    " = (B, Hkv, Tk, D); wanted an Hkv that divides H = ", H);
    STD_TORCH_CHECK((vk.size == Sizes{B, Hkv, Tk, D}), op, ": k has shape ", shape(k),
                    "; wanted (B, Hkv, Tk, D) with B and D of q, ", shape(q));
    STD_TORCH_CHECK((vv.size == Sizes{B, Hkv, Tk, D}), op, ": v has shape ", shape(v), "; wanted ", shape(k),
                    ", as k: the CUDA kernels take values of the size of a head");
    if (documents.has_value()) {
      const View d = view(op, "cu_seqlens", *documents, device, 1, 1);
      STD_TORCH_CHECK(d.type == ScalarType::Int && d.size[3] >= 2, op, ": cu_seqlens has dtype ", name_of(d.type),
                      " and shape ", shape(*documents), "; wanted int32 and 2 or more, from 0 to B * T");
      STD_TORCH_CHECK(Tq == Tk, op, ": cu_seqlens needs as many queries as keys, not ", Tq, " and ", Tk);
      documents = torch::stable::contiguous(*documents);
      a.documents = static_cast<const int32_t*>(documents->const_data_ptr());
      a.n_documents = d.size[3] - 1;
    }
    a.dtype = vq.type == ScalarType::Float ? Dtype::f32 : vq.type == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
    a.B = B, a.H = H, a.Hkv = Hkv, a.Tq = Tq, a.Tk = Tk, a.D = D;
    a.q = rows(this->q), a.k = rows(this->k), a.v = rows(this->v);
    a.scale = float(scale), a.causal = causal, a.window = window;
  }
  void check_size(const char* name, const Tensor& t, const View& vt) const {
    check_same_type(op, name, vt, "q", vq);
    STD_TORCH_CHECK(vt.size == vq.size, op, ": ", name, " has shape ", shape(t), "; wanted ", shape(q),
                    " = (B, H, Tq, D)");
  }
  void check_fit(bool backward) const {
    const char* reason = minimal::cuda::attention_unfit(a, backward);
    STD_TORCH_CHECK(!reason, op, ": q has shape ", shape(q), " and k ", shape(k), "; ", reason ? reason : "");
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& mask, double scale, bool causal,
                                     const std::optional<Tensor>& cu_seqlens, int64_t window,
                                     const std::optional<Tensor>& slopes, double softcap,
                                     const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  const char* op = "minimal::attention";
  const torch::stable::accelerator::DeviceGuard guard(device_of(op, "q", q));
  Attention x(op, q, k, v, mask, scale, causal, cu_seqlens, window, slopes, softcap, cos, sin);
  Tensor out = laid_out_as(q);
  Tensor lse = torch::stable::new_empty(q, {x.a.B, x.a.H, x.a.Tq}, ScalarType::Float);
  x.a.out = rows(out);
  x.a.lse = static_cast<float*>(lse.mutable_data_ptr());
  x.check_fit(false);
  if (out.numel()) minimal::cuda::attention_forward(x.a, Launch{op, current_stream(x.device)});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& mask, double scale, bool causal, const std::optional<Tensor>& cu_seqlens,
    int64_t window, const std::optional<Tensor>& slopes, double softcap, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin) {
  const char* op = "minimal::attention_backward";
  const torch::stable::accelerator::DeviceGuard guard(device_of(op, "q", q));
  Attention x(op, q, k, v, mask, scale, causal, cu_seqlens, window, slopes, softcap, cos, sin);
  x.check_size("grad", grad, view(op, "grad", grad, x.device, 4));
  x.check_size("out", out, view(op, "out", out, x.device, 4));
  const View vl = view(op, "lse", lse, x.device, 3, 3);
  STD_TORCH_CHECK(vl.type == ScalarType::Float && (vl.size == Sizes{1, x.a.B, x.a.H, x.a.Tq}), op, ": lse has dtype ",
                  name_of(vl.type), " and shape ", shape(lse), "; wanted float32 and (B, H, Tq) of q, ", shape(q));
  Tensor dout = grad, o = out, l = torch::stable::contiguous(lse);
  Tensor dq = laid_out_as(q), dk = laid_out_as(k), dv = laid_out_as(v);
  Tensor scratch = torch::stable::new_empty(q, {x.a.B, x.a.H, x.a.Tq, 2}, ScalarType::Float);
  x.a.dout = rows(dout), x.a.out = rows(o);
  x.a.dq = rows(dq), x.a.dk = rows(dk), x.a.dv = rows(dv);
  x.a.lse = static_cast<float*>(const_cast<void*>(l.const_data_ptr()));
  x.a.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  x.check_fit(true);
  if (dq.numel() || dk.numel()) minimal::cuda::attention_backward(x.a, Launch{op, current_stream(x.device)});
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minimal, CUDA, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
