// SPDX-License-Identifier: MIT
// Compiles one kernel header once per instruction set, each time in a namespace of its own, so that one plain build
// (no -march) holds them all and the processor that runs it picks one:
//
//     #define MINIMAL_KERNEL "softmax_kernel.h"
//     #include "every_isa.h"
//     ... MINIMAL_BEST(function)(arguments)
//
// Every function in vec.h and in a kernel header is static, and no std:: template is used there: the linker keeps one
// copy of an inline function, and if it kept the AVX-512 copy of std::max then the generic path would die of it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels.h"

#if !defined(__GNUC__)
#error "the kernels use the vector extensions of GCC and Clang: build with one of them (on Windows: clang-cl)"
#endif
#if defined(__x86_64__)
#define MINIMAL_X86 1
#endif

namespace minimal {

enum class Isa { generic, avx2, avx512, amx };  // amx: avx512, and attention's products on the matrix unit
Isa isa();  // the one in use: softmax_cpu.cpp

// Hands out pieces of a block, and is passed by value: a callee's pieces are free again when it returns. Pieces stay on
// cache lines as long as their sizes are multiples of 16 floats.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
};

// One block of heap a thread: a tile would not fit the 512 KB stack of a macOS thread. Throws std::bad_alloc.
class ScratchBlock {
 public:
  explicit ScratchBlock(int64_t floats)
      : block_(static_cast<float*>(::operator new(sizeof(float) * size_t(floats), std::align_val_t(64)))) {}
  ~ScratchBlock() { ::operator delete(block_, std::align_val_t(64)); }
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
  Scratch start() const { return {block_}; }

 private:
  float* block_;
};

}  // namespace minimal

#if MINIMAL_X86
#define MINIMAL_VECTOR_BYTES 64
#define MINIMAL_VECTOR_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace minimal {
namespace avx512 {
#include "vec.h"
#include MINIMAL_KERNEL
}  // namespace avx512
}  // namespace minimal
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MINIMAL_VECTOR_BYTES
#undef MINIMAL_VECTOR_REGISTERS

#define MINIMAL_VECTOR_BYTES 32
#define MINIMAL_VECTOR_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace minimal {
namespace avx2 {
#include "vec.h"
#include MINIMAL_KERNEL
}  // namespace avx2
}  // namespace minimal
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MINIMAL_VECTOR_BYTES
#undef MINIMAL_VECTOR_REGISTERS

#define MINIMAL_BEST(f) (isa() >= Isa::avx512 ? avx512::f : isa() == Isa::avx2 ? avx2::f : generic::f)
#else
#define MINIMAL_BEST(f) generic::f
#endif  // MINIMAL_X86

// 16 bytes: SSE2, which every x86-64 has, NEON, and whatever the compiler makes of it elsewhere.
#define MINIMAL_VECTOR_BYTES 16
#if defined(__aarch64__)
#define MINIMAL_VECTOR_REGISTERS 32
#else
#define MINIMAL_VECTOR_REGISTERS 16
#endif
namespace minimal {
namespace generic {
#include "vec.h"
#include MINIMAL_KERNEL
}  // namespace generic
}  // namespace minimal
