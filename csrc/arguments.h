// SPDX-License-Identifier: MIT
// What the operators for the CPU (ops.cpp) and for CUDA (ops_cuda.cu) check alike of a tensor, through the stable ABI.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

namespace minimal {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();  // of one dimension

inline std::string text(const int64_t* sizes, int64_t n) {
  std::ostringstream s;
  s << "(";
  for (int64_t i = 0; i < n; i++) s << (i ? ", " : "") << sizes[i];
  s << ")";
  return s.str();
}
inline std::string shape(const torch::stable::Tensor& t) { return text(t.sizes().data(), t.dim()); }

inline void check_dense(const char* op, const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.defined(), op, ": ", name, " is an undefined tensor");
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), op, ": ", name, " must be a dense (strided) tensor");
}

// Sizes and strides of a tensor of min_dim to max_dim dimensions, at most four, aligned to the right: (Tq, Tk) becomes
// (1, 1, Tq, Tk). Returns its memory, which is there and holds all of it, or nullptr where it has no elements.
inline void* read_sizes(const char* op, const char* name, const torch::stable::Tensor& t, int64_t min_dim,
                        int64_t max_dim, int64_t element_bytes, int64_t* size, int64_t* stride) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim >= min_dim && dim <= max_dim, op, ": ", name, " has shape ", shape(t), "; wanted ", min_dim,
                  min_dim == max_dim ? "" : " to " + std::to_string(max_dim), " dimensions");
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t d = 0; d < 4; d++) {
    const int64_t from = d - (4 - dim);
    size[d] = from < 0 ? 1 : sizes[from];
    stride[d] = from < 0 ? 0 : strides[from];
    STD_TORCH_CHECK(size[d] <= kMaxLength, op, ": ", name, " has shape ", shape(t), "; wanted at most ", kMaxLength,
                    " in a dimension");
  }
  if (t.numel() == 0) return nullptr;

  // The last element must lie in the storage. torch checks that when it makes a view, but a storage can be shrunk
  // afterwards (untyped_storage().resize_(0) is how sharded training frees parameters).
  int64_t last = t.storage_offset(), held = 0, step = 0, end = 0;
  bool overflow = false;
  for (int64_t d = 0; d < 4; d++) {
    overflow |= __builtin_mul_overflow(size[d] - 1, stride[d], &step);
    overflow |= __builtin_add_overflow(last, step, &last);
  }
  overflow |= __builtin_mul_overflow(last + 1, element_bytes, &end);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  STD_TORCH_CHECK(!overflow && end <= held, op, ": ", name, " has shape ", shape(t), " but its storage holds only ",
                  held, " bytes");
  void* const data = const_cast<void*>(t.const_data_ptr());  // the kernels only read their inputs
  STD_TORCH_CHECK(data != nullptr, op, ": ", name, " has no memory");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % element_bytes == 0, op, ": ", name,
                  " does not start at a multiple of its element size (", element_bytes, " bytes)");
  return data;
}

}  // namespace minimal
