// SPDX-License-Identifier: MIT
// What the CUDA kernels share. No kernel file sees a header of torch, so that nvcc compiles it for the GPU in seconds,
// and g++ for the CPU, where the tests execute it (tests/cuda/cuda_on_cpu.h).
#pragma once
#include <cstdint>
#ifdef MINIMAL_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MINIMAL_SHARED(T, name, n) __shared__ T name[n]
#define MINIMAL_DYN_SHARED(T, name)                              \
  extern __shared__ __align__(128) unsigned char minimal_shared[]; \
  T* const name = reinterpret_cast<T*>(minimal_shared)
#endif

namespace minimal::cuda {

constexpr unsigned FULL_WARP = 0xffffffff;
constexpr float INF = __builtin_huge_valf();

// Arithmetic is in float32, whatever the tensors hold.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, bits));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(FULL_WARP, x, bits);
  return x;
}

}  // namespace minimal::cuda
