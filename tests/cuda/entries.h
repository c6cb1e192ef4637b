// SPDX-License-Identifier: MIT
// How the tests reach kernels that run on the CPU: every entry takes whole numbers, real numbers and pointers, in an
// order of its own, and returns nullptr or what went wrong. So one caller, in Python or in program.h, serves them all.
#pragma once
#include "cuda_on_cpu.h"
#ifdef MINIMAL_PROGRAM
#include "program.h"
#endif

#define ENTRY(name) extern "C" const char* name(const int64_t* n, const double* f, void* const* p)

extern "C" void schedule(int64_t order, int64_t seed) {
  cuda_on_cpu::schedule = {static_cast<cuda_on_cpu::Order>(order), unsigned(seed)};
}

// run(T()) with T the type of that number; what it throws is returned as text.
template <class F>
const char* with_dtype(int64_t dtype, F run) {
  return cuda_on_cpu::error_of([&] {
    if (dtype == 0) return run(float());
#ifndef ONLY_FLOAT32  // quicker to compile
    if (dtype == 1) return run(__half());
    if (dtype == 2) return run(__nv_bfloat16());
#endif
    throw std::runtime_error("dtype " + std::to_string(dtype));
  });
}

const auto launch = [](auto kernel, dim3 blocks, dim3 threads, size_t shared, auto... arguments) {
  cuda_on_cpu::launch(blocks, threads, shared, [=] { kernel(arguments...); });
};
