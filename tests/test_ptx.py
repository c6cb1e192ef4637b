# SPDX-License-Identifier: MIT
"""What nvcc makes of the CUDA kernels, executed without a GPU: tests/cuda/ptx.py runs their PTX in numpy.

First the interpreter itself, on small kernels written for it and with faults put into them; then the kernels of csrc/,
and bugs put into copies of those. Oracles: Python's integers, float64, a list of all accesses for the races. Bound for
the kernels: twice the error that PyTorch makes at the same dtype, and a few units in the last place.
"""

import functools
import math
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parent / "cuda"))
import ptx  # noqa: E402

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on the PATH, which makes the PTX", allow_module_level=True)

kernel = functools.lru_cache(20)(ptx.Kernel)


@functools.cache
def compiled(folder, name, source, *flags, arch="compute_80"):
    """The PTX of a .cu file with this text."""
    cu, out = folder / f"{name}.cu", folder / f"{name}.ptx"
    cu.write_text(source)
    command = ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", "-O3", *flags, str(cu), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out.read_text()


# ---------------------------------------------------------------------------------------------- kernels to try it on

# Rows of a matrix; one argument, a struct; shuffles within a warp and shared memory between the two warps of a block.
SOFTMAX = r"""
#include <cuda_bf16.h>
struct Arguments { const float* x; __nv_bfloat16* y; long long x_stride, y_stride; int rows, columns; float scale; };

__device__ float block_sum(float value, float* partial, bool maximum, int fault) {
  for (int offset = 16; offset > 0; offset /= 2) {
    if (fault == 4 && threadIdx.x % 32 >= 16) break;  // half of the warp does not come to the shuffle
    const float other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = maximum ? fmaxf(value, other) : value + other;
  }
  if (fault != 1 || threadIdx.x / 32 == 0)  // 1: the second warp's part is never written
    if (threadIdx.x % 32 == 0 || fault == 11) partial[threadIdx.x / 32] = value;  // 11: by all threads of a warp
  if (fault == 2 && threadIdx.x < 32) __syncthreads();  // 2: the first warp waits once more than the second
  if (fault == 10) __syncwarp();  // 10: enough for the own warp's part only
  else if (fault != 3) __syncthreads();
  value = maximum ? fmaxf(partial[0], partial[1]) : partial[0] + partial[1];
  if (fault != 13) __syncthreads();  // 13: the next call writes what is still being read
  return value;
}

template <int fault> __global__ void __launch_bounds__(64) softmax(Arguments a) {
  __shared__ float partial[2];
  const float* x = a.x + blockIdx.x * a.x_stride;
  __nv_bfloat16* y = a.y + blockIdx.x * a.y_stride;
  float m = -INFINITY, l = 0.f;
  for (int j = threadIdx.x; j < a.columns; j += 64) m = fmaxf(m, a.scale * x[j]);
  m = block_sum(m, partial, true, fault == 1 || fault == 13 ? fault : 0);
  for (int j = threadIdx.x; j < a.columns; j += 64) l += __expf(a.scale * x[j] - m);
  l = block_sum(l, partial, false, fault);
  const int end = fault == 5 ? (a.columns + 63) / 64 * 64 : a.columns;  // 5: the ragged end of a row is overrun
  for (int j = threadIdx.x; j < end; j += 64) y[j] = __float2bfloat16(__expf(a.scale * x[j] - m) / l);
  if (fault == 6) a.y[threadIdx.x] = __float2bfloat16(0.f);  // 6: every block writes the first row
  if (fault == 7) *(long long*)(a.y + 1) = 0;  // 7: misaligned
  if (fault == 8) const_cast<float*>(a.x)[threadIdx.x] = 0.f;  // 8: writes its input
  if (fault == 9) for (;;) __syncthreads();  // 9: no end
  if (fault == 12) {  // 12: the first half of it is inside
    const float4 v = reinterpret_cast<const float4*>(a.x)[76];
    y[0] = __float2bfloat16(v.x + v.y + v.z + v.w);
  }
}
#define INSTANCE(n) template __global__ void softmax<n>(Arguments);
INSTANCE(0) INSTANCE(1) INSTANCE(2) INSTANCE(3) INSTANCE(4) INSTANCE(5) INSTANCE(6) INSTANCE(7) INSTANCE(8) INSTANCE(9)
INSTANCE(10) INSTANCE(11) INSTANCE(12) INSTANCE(13)
"""
ARGUMENTS = np.dtype(
    [("x", "u8"), ("y", "u8"), ("strides", "i8", 2), ("rows", "i4"), ("columns", "i4"), ("scale", "f4")], align=True
)

# C = A B, one warp for each 16 x 8 tile: cp.async into dynamic shared memory, ldmatrix (B's transposed), mma.
PRODUCT = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>
template <typename T> __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define MMA(type) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, " \
      "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) MMA("f16"); else MMA("bf16");
}
__device__ uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void copy(void* to, const void* from, bool there) {  // beyond K: zeros, and nothing is read
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared(to)), "l"(from), "r"(bytes));
}

template <typename T, int fault>
__global__ void product(const T* __restrict__ A, const T* __restrict__ B, float* __restrict__ C, int K, int N) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* a = reinterpret_cast<T*>(memory) + threadIdx.y * (16 * 16 + 16 * 8);  // (16, 16), (16, 8) for each warp
  T* b = a + 16 * 16;
  const int lane = threadIdx.x, column = 8 * (blockIdx.x * blockDim.y + threadIdx.y), row = 16 * blockIdx.y;
  float c[4] = {0.f, 0.f, 0.f, 0.f};
  for (int k = 0; k < K; k += 16) {
    const int r = lane / 2, s = lane % 2 * 8;
    copy(a + 16 * r + s, A + (row + r) * (int64_t)K + k + s, k + s < K);
    if (lane < 16) copy(b + 8 * lane, B + (k + lane) * (int64_t)N + column, k + lane < K);
    asm volatile("cp.async.commit_group;");
    if (fault == 4) asm volatile("cp.async.wait_group 1;");  // 4: the last group may still be on its way
    else if (fault != 1) asm volatile("cp.async.wait_group 0;");
    if (fault != 2) __syncwarp();
    if (fault == 3 && lane == 7) return;
    uint32_t fa[4], fb[2];
    const T* pa = a + 16 * (lane % 16) + 8 * (lane / 16);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(shared(pa)));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(fb[0]), "=r"(fb[1]) : "r"(shared(b + 8 * (lane % 16))));
    mma<T>(c, fa, fb);
    __syncwarp();
  }
  float* out = C + (row + lane / 4) * (int64_t)N + column + lane % 4 * 2;
  *reinterpret_cast<float2*>(out) = make_float2(c[0], c[1]);
  *reinterpret_cast<float2*>(out + 8 * (int64_t)N) = make_float2(c[2], c[3]);
}
// A tile is filled again after the second warp has read it; the copy may write at once, long before it is waited for.
template <bool barrier> __global__ void refill(const float4* from, float* out) {
  __shared__ float4 tile[32];
  const int i = threadIdx.x % 32;
  if (threadIdx.x < 32) tile[i] = from[i];
  __syncthreads();
  if (threadIdx.x >= 32) out[i] = tile[i].x;
  if (barrier) __syncthreads();
  if (threadIdx.x < 32)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(shared(tile + i)), "l"(from + 32 + i));
  __syncthreads();
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  if (threadIdx.x >= 32) out[32 + i] = tile[i].x;
}
template __global__ void refill<false>(const float4*, float*);
template __global__ void refill<true>(const float4*, float*);
#define INSTANCE(T, n) template __global__ void product<T, n>(const T*, const T*, float*, int, int);
INSTANCE(__half, 0) INSTANCE(__nv_bfloat16, 0) INSTANCE(__half, 1) INSTANCE(__half, 2) INSTANCE(__half, 3)
INSTANCE(__half, 4)
"""

# One result after another, each beside what it should be.
ARITHMETIC = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__device__ unsigned permute(unsigned a, unsigned b, unsigned selector) {
  unsigned to;  // not by __byte_perm, which clears the bits that ask for signs
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(to) : "r"(a), "r"(b), "r"(selector));
  return to;
}
template <typename T> __device__ T field(T x, unsigned position, unsigned length) {
  T to;
  if constexpr (T(-1) < 0) asm("bfe.s32 %0, %1, %2, %3;" : "=r"(to) : "r"(x), "r"(position), "r"(length));
  else asm("bfe.u32 %0, %1, %2, %3;" : "=r"(to) : "r"(x), "r"(position), "r"(length));
  return to;
}
__device__ unsigned shifted(unsigned x, unsigned n) {  // by 32 and more, which C++ does not define
  unsigned left, right;
  asm("shl.b32 %0, %1, %2;" : "=r"(left) : "r"(x), "r"(n));
  asm("shr.u32 %0, %1, %2;" : "=r"(right) : "r"(x), "r"(n));
  return left ^ right;
}
extern "C" __global__ void early(int* out) {  // who has ended is not waited for
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
extern "C" __global__ void integers(const int* a_, const int* b_, long long* out) {
  const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x, a = a_[i], b = b_[i];
  const unsigned ua = a, ub = b;
  const long long la = (long long)a * 0x100000001LL, lb = b;
  out += i;
  const auto put = [&](long long x) { *out = x; out += n; };
  put(a / b); put(a % b); put(ua / ub); put(ua % ub); put((long long)a * b); put(__mulhi(a, b)); put(__umulhi(ua, ub));
  put(a >> (b & 31)); put(ua >> (ub & 31)); put(a << (b & 31)); put(la >> (b & 63)); put(la / lb); put(la % lb);
  put(a / 7); put(ua / 10); put((ua >> 5) & 63); put((short)a); put((signed char)b); put((unsigned char)a);
  put(min(a, b)); put(max(ua, ub)); put(abs(a)); put(a < b); put(ua < ub); put((a & b) | (a ^ ~b)); put(-a);
  put(__byte_perm(a, b, 0x5342)); put(permute(a, b, b)); put(field<int>(a, b, b >> 8));
  put(field<unsigned>(a, b, b >> 8)); put(shifted(a, ub & 63));
  int local[8];
  for (int k = 0; k < 8; k++) local[(k + a) & 7] = k * a;
  put(local[b & 7]);
  put(__shfl_up_sync(0xffffffffu, a, 3)); put(__shfl_down_sync(0xffffffffu, a, 5));
  put(__shfl_sync(0xffffffffu, a, b & 31));
  put(__shfl_xor_sync(0xffffffffu, a, 6, 8)); put(__shfl_down_sync(0xffffffffu, a, 2, 8));
}
extern "C" __global__ void floats(const float* x_, const float* y_, float* out) {
  const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  const float x = x_[i], y = y_[i];
  out += i;
  const auto put = [&](float v) { *out = v; out += n; };
  put(x + y); put(x * y); put(fmaf(x, y, -x)); put(x / y); put(1 / x); put(sqrtf(x)); put(exp2f(x)); put(log2f(x));
  put(fminf(x, y)); put(fmaxf(x, y)); put(fabsf(x)); put(x < y); put(!(x < y)); put(x != y); put(x == y); put(isnan(x));
  put(__float2int_rn(x)); put(__float2int_rz(x)); put(floorf(x)); put(__saturatef(x)); put((float)__float2int_rn(y));
  put(__half2float(__float2half(x))); put(__bfloat162float(__float2bfloat16(x)));
  const __half2 h = __hfma2(__floats2half2_rn(x, y), __floats2half2_rn(y, y), __floats2half2_rn(1.f, x));
  put(__low2float(h)); put(__high2float(h));
  const __nv_bfloat162 b = __hadd2(__floats2bfloat162_rn(x, y), __floats2bfloat162_rn(y, 3.f));
  put(__low2float(b)); put(__high2float(b));
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture(scope="module")
def softmax(folder):
    return compiled(folder, "softmax", SOFTMAX)


@pytest.fixture(scope="module")
def product(folder):
    return compiled(folder, "product", PRODUCT)


# ---------------------------------------------------------------------------------------------- the interpreter itself


def wrapped(x, bits, signed=True):
    """A Python integer as an integer of so many bits."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if signed and x >> (bits - 1) else x


def test_integers_against_those_of_python(folder):
    rng = np.random.default_rng(0)
    n = 128
    a, b = rng.integers(-(2**31), 2**31, (2, n)).astype(np.int32)
    a[:32] %= 100
    b[:64] %= 50
    b[b == 0] = 1
    a[-1], b[-1] = -(2**31), 3
    text = compiled(folder, "arithmetic", ARITHMETIC)
    memory = ptx.Memory()
    out = memory.add(np.full((64, n), 99, np.int64), writable=True)
    arguments = [np.uint64(memory.add(a)), np.uint64(memory.add(b)), np.uint64(out)]
    ptx.launch(kernel(text, "integers"), 2, n // 2, arguments, memory)
    got = memory.array(out)

    def c_div(x, y):
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    def byte_perm(x, y, selector):
        both = (y << 32 | x).to_bytes(8, "little")
        chosen = []
        for i in range(4):
            s = selector >> 4 * i & 15
            chosen.append(both[s & 7] if s < 8 else 255 * (both[s & 7] >> 7))
        return int.from_bytes(bytes(chosen), "little")

    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        ux, uy, lx = x % 2**32, y % 2**32, wrapped(x * 0x100000001, 64)
        first, lane = i // 32 * 32, i % 32
        warp_a = a[first : first + 32].tolist()
        local = {(k + x) & 7: k * x for k in range(8)}
        wanted = [c_div(x, y), x - y * c_div(x, y), ux // uy, ux % uy, x * y, x * y >> 32, ux * uy >> 32]
        wanted += [x >> (y & 31), ux >> (y & 31), wrapped(x << (y & 31), 32), lx >> (y & 63), c_div(lx, y)]
        wanted += [lx - y * c_div(lx, y), c_div(x, 7), ux // 10, ux >> 5 & 63, wrapped(x, 16), wrapped(y, 8), x & 255]
        wanted += [min(x, y), max(ux, uy), wrapped(abs(x), 32), x < y, ux < uy, (x & y) | (x ^ ~y), wrapped(-x, 32)]
        position, length = y & 255, y >> 8 & 255
        unsigned = (ux >> position) % (1 << length)
        signed = (x >> position) % (1 << length)
        signed -= (1 << length) * (length > 0 and signed >> (length - 1))
        wanted += [byte_perm(ux, uy, 0x5342), byte_perm(ux, uy, uy), signed, unsigned]
        wanted += [(ux << (y & 63)) % 2**32 ^ ux >> (y & 63), wrapped(local[y & 7], 32)]
        wanted += [warp_a[lane - 3 if lane >= 3 else lane], warp_a[lane + 5 if lane + 5 < 32 else lane], warp_a[y & 31]]
        wanted += [warp_a[lane ^ 6], warp_a[lane + 2 if lane % 8 + 2 < 8 else lane]]
        assert [wrapped(int(w), 64) for w in wanted] == got[: len(wanted), i].tolist(), (i, x, y)


def test_a_barrier_does_not_wait_for_those_who_have_ended(folder):
    memory = ptx.Memory()
    out = memory.add(np.zeros(64, np.int32), writable=True)
    ptx.launch(kernel(compiled(folder, "arithmetic", ARITHMETIC), "early"), 1, 64, [np.uint64(out)], memory)
    assert memory.array(out).tolist() == [1] * 32 + [0] * 32


def test_floats_against_numpy_and_torch(folder):
    rng = np.random.default_rng(0)
    n = 128
    x, y = (rng.standard_normal((2, n)) * 10 ** rng.uniform(-2, 1, (2, n))).astype(np.float32)
    x[:8] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 1e-41, 65519.0
    y[:8] = 1.0, 0.0, 1.0, np.nan, 2.0, np.nan, -1e-41, 2.5
    text = compiled(folder, "arithmetic", ARITHMETIC)
    memory = ptx.Memory()
    out = memory.add(np.full((32, n), 99, np.float32), writable=True)
    arguments = [np.uint64(memory.add(x)), np.uint64(memory.add(y)), np.uint64(out)]
    ptx.launch(kernel(text, "floats"), 1, n, arguments, memory)
    X, Y = x.astype(np.float64), y.astype(np.float64)

    def through(values, dtype):
        return torch.from_numpy(np.asarray(values, np.float32)).to(dtype).double().numpy()

    def integer(values, how):
        return np.where(np.isnan(values), 0, np.clip(how(values), -(2.0**31), 2.0**31 - 1))

    with np.errstate(all="ignore"):
        wanted = [X + Y, X * Y, X * Y - X, X / Y, 1 / X, np.sqrt(X), np.exp2(X), np.log2(X)]
        wanted += [np.fmin(X, Y), np.fmax(X, Y), np.abs(X), X < Y, ~(X < Y), X != Y, X == Y, np.isnan(X)]
        wanted += [
            integer(X, np.rint),
            integer(X, np.trunc),
            np.floor(X),
            np.where(X > 0, np.minimum(X, 1), 0),
            integer(Y, np.rint),
        ]
        wanted += [through(X, torch.float16), through(X, torch.bfloat16)]
        f16x, f16y, bf16x, bf16y = (through(v, t) for t in (torch.float16, torch.bfloat16) for v in (X, Y))
        wanted += [through(f16x * f16y + 1, torch.float16), through(f16y * f16y + f16x, torch.float16)]
        wanted += [through(bf16x + bf16y, torch.bfloat16), through(bf16y + 3, torch.bfloat16)]
        for k, (got, want) in enumerate(zip(memory.array(out), wanted, strict=False)):
            close = np.abs(got - want) <= 3e-7 * np.abs(want)
            assert (close | (got == want.astype(np.float32)) | (np.isnan(got) & np.isnan(want))).all(), (k, got, want)


def run_softmax(text, fault=0, rows=3, columns=100):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns + 3), dtype=np.float32)
    memory = ptx.Memory()
    # the last row ends with the array: what is read or written past it is outside
    at = memory.add(x.reshape(-1)[: (rows - 1) * (columns + 3) + columns])
    y = memory.add(np.full((rows, columns), 0, np.uint16), writable=True)
    a = np.array((at, y, (columns + 3, columns), rows, columns, 0.7), ARGUMENTS)
    ptx.launch(kernel(text, f"softmaxILi{fault}E"), rows, 64, [a], memory, limit=20_000)
    got = torch.from_numpy(memory.array(y).view(np.int16)).view(torch.bfloat16).double()
    wanted = torch.softmax(0.7 * torch.from_numpy(x[:, :columns]).double(), -1)
    return got, wanted


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
def test_softmax(folder, arch):
    text = compiled(folder, f"softmax_{arch}", SOFTMAX, arch=arch)
    for rows, columns in [(3, 100), (1, 1), (2, 64), (5, 200)]:
        got, wanted = run_softmax(text, 0, rows, columns)
        assert ((got - wanted).abs() <= 2.0**-8 * wanted).all()


@pytest.mark.parametrize(
    "fault, message",
    [
        (2, "nobody can go on: .*bar"),
        (3, "race: .*reads what another wrote, shared"),
        (4, "nobody can go on: .*shfl"),
        (5, "4 bytes at global .*outside"),
        (6, "race: .*writes where another wrote, global"),
        (7, "8 bytes at global .*misaligned"),
        (8, "writes 4 bytes at global .*for reading only"),
        (9, "no end"),
        (10, "race: .*reads what another wrote, shared"),
        (11, "race: .*writes where another wrote, shared"),
        (12, "reads 16 bytes at global .*outside"),
        (13, "race: .*writes where another read, shared"),
    ],
)
def test_a_fault_is_raised(softmax, fault, message):
    with pytest.raises(ptx.Fault, match=message):
        run_softmax(softmax, fault)


def test_shared_memory_that_nobody_wrote_is_nan(softmax):
    assert run_softmax(softmax, 1)[0].isnan().all()


def run_product(text, dtype, fault=0, M=32, K=48, N=32):
    """Two warps in a block, side by side; A, B and their product in float64."""
    gen = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=gen).to(dtype) for shape in ((M, K), (K, N)))
    memory = ptx.Memory()
    a, b = (memory.add(x.view(torch.int16).numpy()) for x in (A, B))
    c = memory.add(np.full((M, N), np.nan, np.float32), writable=True)
    name = f"product{'I6__half' if dtype == torch.float16 else 'I13__nv_bfloat16'}Li{fault}E"
    arguments = [np.uint64(a), np.uint64(b), np.uint64(c), np.int32(K), np.int32(N)]
    ptx.launch(kernel(text, name), (N // 16, M // 16), (32, 2), arguments, memory, dynamic_shared=2 * 384 * 2)
    return torch.from_numpy(memory.array(c).copy()).double(), A.double(), B.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_product_with_copies_ldmatrix_and_mma(product, dtype):
    for M, K, N in [(32, 48, 32), (16, 16, 16), (16, 40, 16)]:  # 40: the last tile is half beyond the end
        got, A, B = run_product(product, dtype, 0, M, K, N)
        assert ((got - A @ B).abs() <= 2.0**-23 * K * (A.abs() @ B.abs())).all()


@pytest.mark.parametrize(
    "fault, message",
    [
        (2, "race: .*reads what another wrote, shared"),
        (3, "nobody can go on: .*ldmatrix"),
    ],
)
def test_a_fault_of_the_product_is_raised(product, fault, message):
    with pytest.raises(ptx.Fault, match=message):
        run_product(product, torch.float16, fault)


@pytest.mark.parametrize("fault", [1, 4])
def test_a_copy_that_is_not_waited_for_is_not_there(product, fault):
    assert run_product(product, torch.float16, fault)[0].isnan().all()


def test_a_copy_may_write_as_soon_as_it_is_issued(product):
    memory, x = ptx.Memory(), np.arange(256, dtype=np.float32)
    out = memory.add(np.zeros(64, np.float32), writable=True)
    arguments = [np.uint64(memory.add(x)), np.uint64(out)]
    ptx.launch(kernel(product, "refillILb1E"), 1, 64, arguments, memory)
    assert (memory.array(out) == x[::4]).all()
    with pytest.raises(ptx.Fault, match="cp.async.*race: .*writes where another read, shared"):
        ptx.launch(kernel(product, "refillILb0E"), 1, 64, arguments, memory)


def test_shared_memory_is_exactly_as_large_as_asked_for(product):
    memory = ptx.Memory()
    a, b = (memory.add(np.zeros((16, 16), np.int16)) for _ in range(2))
    c = memory.add(np.zeros((16, 16), np.float32), writable=True)
    arguments = [np.uint64(a), np.uint64(b), np.uint64(c), np.int32(16), np.int32(16)]
    whole = kernel(product, "productI6__halfLi0E")
    ptx.launch(whole, 1, (32, 2), arguments, memory, dynamic_shared=2 * 384 * 2)
    with pytest.raises(ptx.Fault, match="writes 16 bytes at shared .*outside"):
        ptx.launch(whole, 1, (32, 2), arguments, memory, dynamic_shared=2 * 384 * 2 - 16)


def test_what_is_not_known_is_refused(softmax):
    with pytest.raises(NotImplementedError, match="sin.approx"):
        ptx.Kernel(softmax.replace("ex2.approx", "sin.approx"), "softmaxILi0E")
    with pytest.raises(NotImplementedError, match="relu"):
        ptx.Kernel(softmax.replace("cvt.rn.bf16", "cvt.rn.relu.bf16"), "softmaxILi0E")
    with pytest.raises(KeyError, match="0 kernels have 'hardmax'"):
        ptx.Kernel(softmax, "hardmax")
    with pytest.raises(ValueError, match="takes arguments of .48. bytes, not .8."):
        ptx.launch(ptx.Kernel(softmax, "softmaxILi0E"), 1, 64, [np.int64(0)], ptx.Memory())


PLACES = st.dictionaries(st.sampled_from([0, 1, 32]), st.integers(0, 3), min_size=1)  # of threads
ACCESS = st.tuples(st.sampled_from(["load", "store"]), st.sampled_from([2, 4]), PLACES)
BARRIER = st.sampled_from(["block", "warp 0", "warp 1"])


@settings(max_examples=10 * settings.default.max_examples)
@example([("load", 2, {0: 0}), ("load", 2, {32: 0}), ("store", 2, {32: 0})])  # rarely drawn: the last reader writes
@given(st.lists(st.one_of(ACCESS, ACCESS, ACCESS, BARRIER), max_size=6))
def test_races_against_the_list_of_all_accesses(history):
    """Two warps at 8 bytes of shared memory. Kept for each: thread, place, whether it wrote, whether its warp met."""
    allowed = np.zeros(ptx.GAP + 8 + ptx.GAP, np.uint8)
    allowed[ptx.GAP :][:8] = 2
    threads = np.arange(64)
    memory = ptx.Tracked("shared", allowed, np.zeros(64, int), threads, threads // 32)
    past = []
    for step in history:
        if step == "block":
            memory.synchronise(np.array([0]))
            past = []
        elif isinstance(step, str):
            warp = int(step[-1])
            memory.synchronise(np.array([0]), np.array([warp]))
            past = [(t, place, wrote, met or t // 32 == warp) for t, place, wrote, met in past]
        else:
            kind, size, where = step
            who, address = np.array(sorted(where)), np.array([where[t] * 2 // size * size for t in sorted(where)])
            now = [(t, a + i, kind == "store") for t, a in zip(who, address, strict=True) for i in range(0, size, 2)]
            race = any(
                t != u and a == b and (wrote or w) and (t // 32 != u // 32 or (w and not met))
                for t, a, wrote in now
                for u, b, w, met in past + [(*x, False) for x in now if kind == "store"]
            )
            try:
                if kind == "load":
                    memory.load(who, address + ptx.GAP, size)
                else:
                    memory.store(who, address + ptx.GAP, np.zeros(who.size, f"V{size}"))
            except ptx.Fault:
                assert race
                return
            assert not race
            past += [(*x, False) for x in now]


# ---------------------------------------------------------------------------------------------- the kernels of csrc/

CSRC = pathlib.Path(__file__).parent.parent / "csrc"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
C_TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
MANGLED = {torch.float32: "f", torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16"}
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def put(memory, x, writable=False):
    """The address of a tensor; all of its storage is copied, so that its strides hold."""
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    at = memory.add((flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat).numpy(), writable)
    return at + x.storage_offset() * x.element_size()


def taken(memory, at, like):
    x = torch.from_numpy(memory.array(at).copy())
    return (x.view(torch.bfloat16) if like.dtype == torch.bfloat16 else x).view(like.shape)


# The kernels of softmax.cuh: elements a load, threads a row.
SOFTMAX_KERNELS = r"""
#include "softmax.cuh"
namespace minimal::cuda {
#define INSTANCE(T, V, ROW_THREADS) \
  template __global__ void softmax_kernel<T, V, ROW_THREADS>(View4<const T>, Mask, Shape4, float, bool, T*); \
  template __global__ void \
  softmax_backward_kernel<T, V, ROW_THREADS>(View4<const T>, View4<const T>, Shape4, float, T*);
INSTANCE(float, 4, 32) INSTANCE(float, 1, THREADS) INSTANCE(__half, 1, 32)
INSTANCE(__nv_bfloat16, 8, THREADS) INSTANCE(__nv_bfloat16, 1, 32)
}
"""
SOFTMAX_CASES = {
    "f32, 16 bytes at once, boolean mask": (torch.float32, 4, 32, (1, 2, 5, 36), torch.bool, False),
    "f32, long rows, causal, float32 mask": (torch.float32, 1, 256, (1, 1, 3, 1100), torch.float32, True),
    "f16, causal, more rows than columns": (torch.float16, 1, 32, (2, 1, 9, 5), None, True),
    "bf16, long rows, 16 bytes at once": (torch.bfloat16, 8, 256, (1, 1, 2, 1040), None, False),
    "bf16, ragged, bfloat16 mask": (torch.bfloat16, 1, 32, (2, 2, 3, 37), torch.bfloat16, False),
}


def view4(memory, x):
    return np.array((put(memory, x), x.stride()), [("data", "u8"), ("stride", "i8", 4)])


@pytest.mark.parametrize("case", SOFTMAX_CASES)
def test_softmax_of_csrc(folder, case):
    dtype, V, row_threads, shape, mask_dtype, causal = SOFTMAX_CASES[case]
    text = compiled(folder, "softmax_kernels", SOFTMAX_KERNELS, f"-I{CSRC}")
    gen, scale, (rows, columns) = torch.Generator().manual_seed(0), 0.7, shape[2:]
    x, dy = (torch.randn(shape, generator=gen).to(dtype) for _ in range(2))
    if V == 1:  # anything goes: columns first, and an offset
        x = torch.cat([x[..., :1], x], -1).mT.contiguous().mT[..., 1:]
    s, memory = scale * x.double(), ptx.Memory()
    mask = np.zeros((), np.dtype([("data", "u8"), ("stride", "i8", 4), ("type", "i4")], align=True))
    if mask_dtype is not None:  # the same for all rows
        hidden, added = torch.randn((2, columns), generator=gen)
        added = added.masked_fill(hidden > 1, -math.inf).to(dtype if mask_dtype == torch.bool else mask_dtype)
        s = s.masked_fill(hidden > 1, -math.inf) if mask_dtype == torch.bool else s + added.double()
        type = {torch.bool: 1, torch.float32: 2}.get(mask_dtype, 3)  # boolean, float32, same
        mask[()] = put(memory, hidden <= 1 if mask_dtype == torch.bool else added), (0, 0, 0, 1), type
    if causal:
        s = s.masked_fill(torch.arange(columns) > torch.arange(rows)[:, None] + columns - rows, -math.inf)
    wanted = torch.softmax(s, -1).nan_to_num(0)  # rows that see nothing
    y, dx = (put(memory, torch.full(shape, math.nan, dtype=dtype), True) for _ in range(2))
    name, shape4 = f"I{MANGLED[dtype]}Li{V}ELi{row_threads}EE", np.array(shape, np.int64)
    blocks = -(-math.prod(shape[:3]) // (256 // row_threads))
    arguments = [view4(memory, x), mask, shape4, np.float32(scale), np.bool_(causal), np.uint64(y)]
    ptx.launch(kernel(text, f"softmax_kernel{name}"), blocks, 256, arguments, memory)
    got = taken(memory, y, x)
    assert ((got - wanted).abs() <= (EPS[dtype] + 3e-6) * wanted + 2.0**-25).all()  # 2^-25: float16's least numbers

    given = view4(memory, got.contiguous())
    arguments = [view4(memory, dy), given, shape4, np.float32(scale), np.uint64(dx)]
    ptx.launch(kernel(text, f"softmax_backward_kernel{name}"), blocks, 256, arguments, memory)
    p, g = got.double(), dy.double()
    wanted = scale * p * (g - (g * p).sum(-1, keepdim=True))
    terms = scale * p * (g.abs() + (g.abs() * p).sum(-1, keepdim=True))
    assert ((taken(memory, dx, x) - wanted).abs() <= EPS[dtype] * wanted.abs() + 3e-6 * terms + 2.0**-25).all()


ATTENTION = r"""
#include "attention_backward.cuh"
namespace minimal::cuda {
// out: rows and threads of a block, and its shared memory: forward, then backward
__global__ void facts(int* out) {
  using F = Forward<TYPE, HEAD>;
  using B = Backward<TYPE, HEAD>;
  const int all[6] = {F::ROWS, F::THREADS, F::SHARED, B::ROWS, B::THREADS, B::SHARED};
  for (int i = 0; i < 6; i++) out[i] = all[i];
}
template __global__ void forward_kernel<TYPE, HEAD>(const __grid_constant__ AttentionArgs);
template __global__ void delta_kernel<TYPE, HEAD>(const __grid_constant__ AttentionArgs);
template __global__ void backward_kernel<TYPE, HEAD, true>(const __grid_constant__ AttentionArgs);
template __global__ void backward_kernel<TYPE, HEAD, false>(const __grid_constant__ AttentionArgs);
}
"""
STRIDED = np.dtype([("data", "u8"), ("batch", "i8"), ("head", "i8"), ("token", "i8")])
ATTENTION_ARGS = np.dtype(
    [("dtype", "i4"), *((x, "i8") for x in ("B", "H", "Hkv", "Tq", "Tk", "D"))]
    + [*((x, STRIDED) for x in ("q", "k", "v", "out")), ("lse", "u8"), ("scale", "f4"), ("causal", "?")]
    + [("window", "i8"), ("documents", "u8"), ("n_documents", "i8")]
    + [*((x, STRIDED) for x in ("dout", "dq", "dk", "dv")), ("scratch", "u8")],
    align=True,
)


def attention_ptx(folder, dtype, D, *, include=CSRC, arch="compute_80"):
    source = ATTENTION.replace("TYPE", C_TYPES[dtype]).replace("HEAD", str(D))
    return compiled(folder, f"attention_{C_TYPES[dtype]}_{D}_{arch}", source, f"-I{include}", arch=arch)


def run_attention(text, q, k, v, grad, scale, causal, window, documents):
    """out, lse, dq, dk and dv of the kernels, as attention_forward() and attention_backward() launch them."""
    (B, H, Tq, D), (Hkv, Tk), dtype = q.shape, k.shape[1:3], q.dtype
    memory, results = ptx.Memory(), {}
    a = np.zeros((), ATTENTION_ARGS)
    a["dtype"] = list(DTYPES.values()).index(dtype)
    for name, x in (("B", B), ("H", H), ("Hkv", Hkv), ("Tq", Tq), ("Tk", Tk), ("D", D)):
        a[name] = x
    for name, x in (("q", q), ("k", k), ("v", v), ("dout", grad)):
        a[name] = (put(memory, x), *x.stride()[:3])
    for name, like in (("out", q), ("dq", q), ("dk", k), ("dv", k)):
        x = torch.full(like.shape, math.nan, dtype=dtype)
        results[name] = x, put(memory, x, True)
        a[name] = (results[name][1], *x.stride()[:3])
    lse = torch.full((B, H, Tq), math.nan)
    results["lse"] = lse, put(memory, lse, True)
    a["lse"], a["scratch"] = results["lse"][1], put(memory, torch.full((B, H, Tq, 2), math.nan), True)
    a["scale"], a["causal"], a["window"] = scale, causal, window
    if documents is not None:
        a["documents"], a["n_documents"] = put(memory, torch.tensor(documents, dtype=torch.int32)), len(documents) - 1

    facts = memory.add(np.zeros(6, np.int32), writable=True)
    ptx.launch(kernel(text, "facts"), 1, 32, [np.uint64(facts)], memory)
    rows, threads, shared, rows_back, threads_back, shared_back = memory.array(facts).tolist()
    name = f"I{MANGLED[dtype]}Li{D}E"

    def launch(name, tokens, rows, heads, threads, shared):
        ptx.launch(kernel(text, name), -(-tokens // rows) * heads, threads, [a], memory, shared)

    launch(f"forward_kernel{name}E", Tq, rows, B * H, threads, shared)
    launch(f"delta_kernel{name}E", B * H * Tq, 32, 1, 256, 0)
    launch(f"backward_kernel{name}Lb1E", Tk, rows_back, B * Hkv, threads_back, shared_back)
    launch(f"backward_kernel{name}Lb0E", Tq, rows_back, B * H, threads_back, shared_back)
    return {name: taken(memory, at, x) for name, (x, at) in results.items()}


def visible(B, Tq, Tk, causal, window, documents):
    """(B, 1, Tq, Tk) as the contract of the operator says, key by key."""
    i, j = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)
    seen = torch.ones(B, 1, Tq, Tk, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window:
        seen &= (i - j).abs() < window
    if documents is not None:
        of = torch.bucketize(torch.arange(B * Tq), torch.tensor(documents), right=True).view(B, 1, Tq)
        seen &= of[..., :, None] == of[..., None, :]
    return seen


def by_torch(f, q, k, v, grad, dtype):
    """out, dq, dk, dv by autograd through f(q, k, v), the keys and values repeated for their group."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    n = q.shape[1] // k.shape[1]
    out = f(q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1))
    results = out, *torch.autograd.grad(out, (q, k, v), grad.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), results, strict=True))


def attention_case(dtype, B=1, H=2, Hkv=1, Tq=1, Tk=1, D=32, causal=False, window=0, documents=None, strided=False):
    gen = torch.Generator().manual_seed(0)

    def randn(heads, tokens):
        if strided:  # (B, T, H, D), within something wider
            return torch.randn(B, tokens, heads, D + 8, generator=gen).to(dtype)[..., :D].transpose(1, 2)
        return torch.randn(B, heads, tokens, D, generator=gen).to(dtype)

    q, k, v, grad = randn(H, Tq), randn(Hkv, Tk), randn(Hkv, Tk), randn(H, Tq)
    return q, k, v, grad, D**-0.5, causal, window, documents


def check_attention(text, case):
    """The kernels against float64, forward and backward, with PyTorch's own error at this dtype as the measure."""
    q, k, v, grad, scale, *how = case
    (B, H, Tq), (Hkv, Tk), dtype = q.shape[:3], k.shape[1:3], q.dtype
    seen = visible(B, Tq, Tk, *how)
    nothing = ~seen.any(-1, keepdim=True)

    def exact(q, k, v):
        s = (scale * q @ k.mT).masked_fill(~seen, -math.inf).masked_fill(nothing, 0)
        return (torch.softmax(s, -1) @ v).masked_fill(nothing, 0)

    def theirs(q, k, v):
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~(seen | nothing), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).masked_fill(nothing, 0)

    got = run_attention(text, *case)
    wanted, torchs = by_torch(exact, q, k, v, grad, torch.float64), by_torch(theirs, q, k, v, grad, dtype)
    # A few units in the last place more, as PyTorch's error in a few numbers can be zero by luck: in float32 of what is
    # added up, before cancellation; and of rowsum(dO O), for which the backward pass reads O rounded to the dtype.
    Q, K, V, dO, O = (x.double().abs() for x in (q, k, v, grad, wanted["out"]))
    dP, Delta = (dO @ V.repeat_interleave(H // Hkv, 1).mT).max() * scale, (dO * O).sum(-1).max() * scale
    added = {"out": V.max(), "dq": dP * K.max(), "dk": dP * Q.max(), "dv": dO.max()}
    rounded = {"dq": Delta * K.max(), "dk": Delta * Q.max()}
    for name, w in wanted.items():
        error, their_error = ((x[name] - w).abs().max().item() for x in (got, torchs))
        ulps = EPS[dtype] * (2 * w.abs().max() + rounded.get(name, 0)) + 4 * EPS[torch.float32] * added[name]
        assert error <= 2 * their_error + ulps, f"{name}: {error} against {their_error}"
    s = scale * q.double() @ k.double().repeat_interleave(H // Hkv, 1).mT
    lse = torch.logsumexp(s.masked_fill(~seen, -math.inf), -1)
    assert torch.allclose(got["lse"].double(), lse, rtol=0, atol=1e-5)


CASES = {
    "causal, ragged, grouped": dict(H=4, Hkv=2, Tq=70, Tk=133, causal=True),
    "more queries than keys": dict(Tq=50, Tk=20, causal=True),
    "window": dict(Tq=150, Tk=150, causal=True, window=20),
    "window of both sides": dict(Tq=90, Tk=60, window=17),
    "documents": dict(B=2, Tq=75, Tk=75, causal=True, documents=[0, 5, 30, 75, 81, 140, 150]),
    "one token, strided": dict(B=2, H=6, Hkv=2, Tq=1, Tk=65, strided=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention(folder, dtype, case):
    check_attention(attention_ptx(folder, DTYPES[dtype], 32), attention_case(DTYPES[dtype], **CASES[case]))


@pytest.mark.parametrize("dtype, D", [("f32", 64), ("f16", 128), ("bf16", 96)])
def test_attention_with_longer_heads(folder, dtype, D):
    case = attention_case(DTYPES[dtype], Tq=70, Tk=75, D=D, causal=True)
    check_attention(attention_ptx(folder, DTYPES[dtype], D), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_made_for_a_later_gpu(folder, dtype):
    case = attention_case(dtype, **CASES["causal, ragged, grouped"])
    check_attention(attention_ptx(folder, dtype, 32, arch="compute_90"), case)


@st.composite
def attention_cases(draw):
    lengths = st.integers(1, 140)
    Tq, B, Hkv = draw(lengths), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    Tk = draw(st.one_of(st.just(Tq), lengths))
    inner = st.lists(st.integers(1, B * Tq), max_size=5) if Tq == Tk else st.nothing()
    documents = draw(st.one_of(st.none(), inner.map(lambda at: sorted({0, *at, B * Tq}))))
    how = dict(causal=draw(st.booleans()), window=draw(st.sampled_from([0, 0, 1, 7, 64, 200])), documents=documents)
    shape = dict(B=B, H=Hkv * draw(st.integers(1, 3)), Hkv=Hkv, Tq=Tq, Tk=Tk, strided=draw(st.booleans()))
    return attention_case(DTYPES[draw(st.sampled_from(list(DTYPES)))], **shape, **how)


@settings(max_examples=settings.default.max_examples // 3)
@given(case=attention_cases())
def test_attention_on_whatever_is_drawn(folder, case):
    check_attention(attention_ptx(folder, case[0].dtype, 32), case)


# Bugs put into a copy of csrc/: the file, what is replaced (it must be there), by what, and how it is found.
BUGS = {
    "keys are read past the ragged end": (
        "attention.cuh",
        "const bool there = from + row < end;",
        "const bool there = true;",
        "reads 16 bytes at global .*outside",
    ),
    "rows are written past the ragged end": (
        "attention.cuh",
        "min(16 * C::M, block.end - first)",
        "16 * C::M",
        "writes 16 bytes at global .*outside|race: .*writes where another wrote, global",
    ),
    "no barrier before V is used": (
        "attention.cuh",
        "__syncthreads();  // V is here",
        "// V is here",
        "race: .*shared",
    ),
    "no barrier before K is overwritten": (
        "attention.cuh",
        "__syncthreads();  // K is here",
        "// K is here",
        "race: .*shared",
    ),
    "no barrier within a warp": ("attention.cuh", "__syncwarp();", "", "race: .*reads what another wrote, shared"),
    "copies are not waited for": (
        "attention.cuh",
        'asm volatile("cp.async.wait_all;" ::: "memory");',
        "",
        "out: nan against",
    ),
    "a quarter of the lanes do not come to the shuffle": (
        "attention.cuh",
        "x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));",
        "if (threadIdx.x % 4 == 3) return x;\n  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));",
        "nobody can go on: .*shfl",
    ),
    "what was summed is not scaled down": ("attention.cuh", " *= shrink", " *= 1 + 0 * shrink", "out: .* against"),
    "Delta is read past the end": (
        "attention_backward.cuh",
        "scratch(h) + (i < T_other ? i : 0), i < T_other",
        "scratch(h) + i, true",
        "reads 8 bytes at global .*outside",
    ),
    "Delta is forgotten": ("attention_backward.cuh", " - Delta);", ");", "dq: .* against"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_attention_is_found(tmp_path, bug):
    name, old, new, message = BUGS[bug]
    for path in CSRC.glob("*.cuh"):
        shutil.copy(path, tmp_path)
    text = (CSRC / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    text = attention_ptx(tmp_path, torch.float16, 32, include=tmp_path)
    with pytest.raises((ptx.Fault, AssertionError), match=message):
        check_attention(text, attention_case(torch.float16, Tq=70, Tk=133, causal=True))
