# SPDX-License-Identifier: MIT
"""The CUDA kernels. Without a GPU they are built, linked and imported, and executed on the CPU (tests/cuda_on_cpu.py).

Oracle: the definitions in float64. Bound: at most twice the error of torch.softmax at the same dtype, and a few ulp.
Each kernel runs with its threads in three orders, under AddressSanitizer and under ThreadSanitizer; and errors sown
into a copy of it show which of these catches what. On a machine with a GPU, the tests marked `cuda` run the same there.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from cuda_on_cpu import DTYPES, ORDERS, ROOT, Fault, compiler, library, program
from hypothesis import given
from hypothesis import strategies as st

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ here (Linux): the kernels cannot run on the CPU")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here: the CUDA build cannot be tried")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


# ---------------------------------------------------------------------------------------------- softmax


def definition(x, scale, causal, mask):
    s = scale * x
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    if causal:
        Tq, Tk = s.shape[-2:]
        s = s.masked_fill(~torch.ones(Tq, Tk, dtype=torch.bool, device=s.device).tril(Tk - Tq), -math.inf)
    nothing = (s == -math.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def with_gradient(f, x, scale, causal, mask, grad, dtype):
    x = x.detach().to(dtype).requires_grad_()
    y = f(x, scale, causal, mask)
    return y.detach(), *torch.autograd.grad(y, x, grad.to(dtype))


def on_cpu(call, x, scale, causal, mask, grad, **how):
    """y and dx of the kernels, through the entries of tests/cuda/softmax_on_cpu.cpp."""
    y, dx = torch.full(x.shape, math.nan, dtype=x.dtype), torch.full(x.shape, math.nan, dtype=x.dtype)
    kind, full = 0, None
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2 if mask.dtype == torch.float32 else 3
        full = mask.expand(x.shape)
    numbers = [DTYPES[x.dtype], causal, kind, *x.shape, *x.stride(), *(full.stride() if kind else (0, 0, 0, 0))]
    call("softmax", numbers, [scale], [x, full, y], **how)
    # The kernel's own y goes into its backward pass, as in use.
    numbers = [DTYPES[x.dtype], *x.shape, *grad.stride(), *y.stride()]
    call("softmax_backward", numbers, [scale], [grad, y, dx], **how)
    return y, dx


def check_softmax(case, got):
    x, scale, causal, mask, grad = case
    wanted = with_gradient(definition, *case, torch.float64)
    theirs = with_gradient(definition, *case, x.dtype)
    for name, g, w, t in zip(("y", "dx"), got, wanted, theirs, strict=True):
        error, theirs_is = (g - w).abs().max().item(), (t - w).abs().max().item()
        # The backward pass of both reads y, rounded to x's dtype, for sum(dy * y): cancellation leaves that error.
        dot = abs(scale) * (grad.double() * wanted[0]).abs().sum(-1).max().item() if name == "dx" else 0.0
        terms = abs(scale) * grad.abs().max().item() if name == "dx" else 1.0
        ulps = EPS[x.dtype] * (2 * w.abs().max().item() + dot) + 4 * EPS[torch.float32] * terms
        assert error <= 2 * theirs_is + ulps, f"{name}: error {error:.2e}, torch's {theirs_is:.2e}, ulps {ulps:.1e}"


WIDTHS = (1, 2, 7, 8, 31, 32, 33, 64, 129, 256, 1000, 1023, 1024, 1025, 1032, 2100)


@st.composite
def softmax_cases(draw, dtypes=tuple(DTYPES), widths=WIDTHS, device="cpu"):
    dtype, width = draw(st.sampled_from(dtypes)), draw(st.sampled_from(widths) | st.integers(1, 300))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 6)), width)

    def laid_out():
        layout = draw(st.sampled_from(["contiguous", "shifted", "swapped", "every second", "expanded", "heads inside"]))
        B, H, rows, _ = shape
        if layout == "shifted":  # not on a multiple of 16 bytes
            return torch.randn(math.prod(shape) + 1, generator=gen).to(dtype)[1:].view(shape)
        if layout == "swapped":
            return torch.randn(B, H, width, rows, generator=gen).to(dtype).mT
        if layout == "every second":
            return torch.randn(B, H, rows, 2 * width + 1, generator=gen).to(dtype)[..., 1::2]
        if layout == "expanded":
            return torch.randn(1, H, rows, width, generator=gen).to(dtype).expand(shape)
        if layout == "heads inside":
            return torch.randn(B, rows, H, width, generator=gen).to(dtype).transpose(1, 2)
        return torch.randn(shape, generator=gen).to(dtype)

    x, grad = laid_out(), laid_out()
    kind = draw(st.sampled_from(["none", "bool", "additive", "additive float32"]))
    mask = None
    if kind != "none":
        sizes = [n if draw(st.booleans()) else 1 for n in shape][draw(st.integers(0, 3)) :]
        hidden = torch.rand(sizes, generator=gen) < draw(st.sampled_from([0.05, 0.5, 0.97]))
        mask = ~hidden
        if kind != "bool":  # multiples of 1/4, exact in every dtype
            mask = (torch.randint(-12, 8, sizes, generator=gen) / 4).masked_fill(hidden, -math.inf)
            mask = mask.to(dtype) if kind == "additive" else mask
    return x, draw(st.sampled_from([1.0, 0.125, 7.0, -1.5])), draw(st.booleans()), mask, grad


def simple(*shape, dtype=torch.float32, causal=False):
    gen = torch.Generator().manual_seed(math.prod(shape))
    x, grad = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
    return x.to(dtype), 1.0, causal, None, grad.to(dtype)


@pytest.fixture(scope="session")
def softmax_library(tmp_path_factory):
    return library(tmp_path_factory.mktemp("softmax") / "library", "softmax")


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
@given(case=softmax_cases(), seed=st.integers(0, 2**31))
def test_softmax_on_the_cpu(softmax_library, order, case, seed):
    check_softmax(case, on_cpu(softmax_library, *case, order=order, seed=seed))


@needs_compiler
def test_softmax_of_extreme_scores(softmax_library):
    # Scores so large that scale x - m, fused into one instruction, would be far above zero; all of them, and none.
    for values in ([1e30, 1e30, -1e30], [3.0e38, -3.0e38, 0], [-math.inf, 5.0, -math.inf], [-math.inf] * 3):
        for width, scale in ((3, 0.1), (1500, 0.7)):
            x = torch.tensor(values).repeat(width // 3).reshape(1, 1, 1, width)
            case = (x, scale, False, None, torch.ones_like(x))
            check_softmax(case, on_cpu(softmax_library, *case))
    x = torch.tensor([1.0, math.nan, 2.0]).reshape(1, 1, 1, 3)
    assert on_cpu(softmax_library, x, 1.0, False, None, x)[0].isnan().all()  # as torch.softmax has it


# Rows that a warp takes, and rows that a block takes; few threads, as ThreadSanitizer is slow and has room for 8000.
SMALLER = [("softmax.cuh", "constexpr int THREADS = 256;", "constexpr int THREADS = 64;")]
SANITIZED = [simple(2, 1, 9, 40), simple(1, 2, 2, 1027), simple(1, 1, 2, 1100, causal=True)]


@needs_compiler
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_softmax_under_sanitizers(tmp_path, mode):
    call = program(tmp_path / "program", "softmax", mode, changes=SMALLER, extra=["-DONLY_FLOAT32"])
    for case, order in zip(SANITIZED, ORDERS, strict=True):
        check_softmax(case, on_cpu(call, *case, order=order))


# What was done to the kernel; and, of the ways to run it, some that notice, with what they say.
SOFTMAX_BUGS = {
    "no barrier before the parts are read": (
        "__syncthreads();  // the parts of this one are there",
        "",
        {"last in": "error ", "thread": "data race"},
    ),
    "no barrier before the parts are overwritten": (
        "__syncthreads();  // the parts of the last call have been read",
        "",
        {"thread": "data race"},
    ),
    "a barrier that half of the block does not reach": (
        "__syncthreads();  // the parts of this one are there",
        "if (threadIdx.x < THREADS / 2) __syncthreads();",
        dict.fromkeys(ORDERS, "divergent barrier|deadlock"),
    ),
    "a shuffle that one lane does not reach": (
        "  x = MAXIMUM ? warp_max(x) : warp_sum(x);\n  if (ROW",
        "  if (threadIdx.x % 32 < 31) x = MAXIMUM ? warp_max(x) : warp_sum(x);\n  if (ROW",
        dict.fromkeys(ORDERS, "lane that has returned|lane returns while others wait|divergent warp|deadlock"),
    ),
    "rows past the last one": (
        "row < total; row += gridDim.x * at_once) {\n    const T* const x_row",
        "row <= total; row += gridDim.x * at_once) {\n    const T* const x_row",
        {"address": "heap-buffer-overflow"},
    ),
    "16 bytes from an address that is no multiple of 16": (
        "v.stride[1] % V == 0 && v.stride[2] % V == 0;",
        "true;",
        {"address": "misaligned address"},
    ),
    "a write past shared memory": (
        "part[threadIdx.x / 32] = x;",
        "part[threadIdx.x / 32 + 1] = x;",
        {"address": "heap-buffer-overflow"},
    ),
    "all blocks write the first rows": (
        "T* const y_row = y + row * columns;",
        "T* const y_row = y + row % at_once * columns;",
        {"first in": "error nan", "thread": "data race"},
    ),
    "all blocks write all rows, the same": (
        "row = blockIdx.x * at_once + threadIdx.x / ROW_THREADS; row < total; row += gridDim.x * at_once) {\n"
        "    const T* const x_row",
        "row = threadIdx.x / ROW_THREADS; row < total; row += at_once) {\n    const T* const x_row",
        {"thread": "data race"},
    ),
}


def check_caught(build, catchers, run):
    """Each catcher notices: an order of the threads, or a sanitizer with the first of them."""
    programs = {}
    for catcher, message in catchers.items():
        mode, order = ("plain", catcher) if catcher in ORDERS else (catcher, "first in")
        if mode not in programs:
            programs[mode] = build(mode)
        with pytest.raises((Fault, AssertionError), match=message):
            run(programs[mode], order)


@needs_compiler
@pytest.mark.parametrize("bug", SOFTMAX_BUGS)
def test_softmax_with_a_bug_is_caught(tmp_path, bug):
    old, new, catchers = SOFTMAX_BUGS[bug]
    changes = [*SMALLER, ("softmax.cuh", old, new)]

    def build(mode):
        return program(tmp_path / mode, "softmax", mode, changes=changes, extra=["-DONLY_FLOAT32"])

    def run(call, order):
        for case in SANITIZED:
            check_softmax(case, on_cpu(call, *case, order=order))

    check_caught(build, catchers, run)


# ---------------------------------------------------------------------------------------------- attention


def visible(B, Tq, Tk, causal, window, documents):
    """(B, Tq, Tk): which query sees which key."""
    i, j = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)
    seen = torch.ones(B, Tq, Tk, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window:
        seen &= (i - j).abs() < window
    if documents is not None:
        number = (documents[:, None] <= torch.arange(B * Tq)).sum(0).view(B, Tq)  # how many have begun by this token
        seen &= number[:, :, None] == number[:, None, :]
    return seen


def by_definition(case, dtype):
    """(out, lse, dq, dk, dv) of PyTorch's autograd at that dtype."""
    q, k, v, grad, scale, causal, window, documents = case
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    K, V = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in inputs[1:])
    seen = visible(q.shape[0], q.shape[2], k.shape[2], causal, window, documents)[:, None]
    nothing = ~seen.any(-1, keepdim=True)
    s = (scale * (inputs[0] @ K.mT)).masked_fill(~seen, -math.inf)
    out = torch.softmax(s.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0) @ V
    gradients = torch.autograd.grad(out, inputs, grad.to(dtype))
    lse = s.detach().to(torch.promote_types(dtype, torch.float32)).logsumexp(-1)
    return out.detach(), lse, *gradients


def attention_on_cpu(call, case, **how):
    """The same of the kernels, through the entries of tests/cuda/attention_on_cpu.cpp."""
    q, k, v, grad, scale, causal, window, documents = case
    out, dq, dk, dv = (torch.full(x.shape, math.nan, dtype=x.dtype) for x in (q, q, k, v))
    lse, scratch = torch.full(q.shape[:3], math.nan), torch.full((*q.shape[:3], 2), math.nan)
    boundaries = 0 if documents is None else len(documents)
    numbers = [
        DTYPES[q.dtype],
        *q.shape[:2],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        causal,
        window,
        boundaries,
    ]
    numbers += [n for x in (q, k, v, out) for n in x.stride()[:3]]
    call("attention", numbers, [scale], [q, k, v, out, lse, documents], **how)
    numbers += [n for x in (grad, dq, dk, dv) for n in x.stride()[:3]]
    tensors = [q, k, v, out, lse, documents, grad, dq, dk, dv, scratch]
    call("attention_backward", numbers, [scale], tensors, **how)
    return out, lse, dq, dk, dv


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def check_attention(case, got):
    """Against float64: at most twice the error of PyTorch at the same dtype, and a few ulp (as in test_fused.py)."""
    q, k, v, grad, scale, *_ = case
    wanted, theirs = by_definition(case, torch.float64), by_definition(case, q.dtype)
    K, V = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    dS = abs(scale) * largest(grad.double().abs() @ V.abs().mT)
    scores = abs(scale) * largest(q.double().abs() @ K.abs().mT)
    terms = (largest(v), scores, dS * largest(k), dS * largest(q), largest(grad))  # what the sums add up
    delta = abs(scale) * largest((grad.double() * wanted[0]).abs().sum(-1))
    rounded = (0.0, 0.0, delta * largest(k), delta * largest(q), 0.0)  # `out` is, for rowsum(dO * O)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, g, w, t, term, r in zip(names, got, wanted, theirs, terms, rounded, strict=True):
        assert g.shape == w.shape and torch.equal(g.isinf(), w.isinf()), name  # lse is -inf where nothing is seen
        g, w, t = (x.double().masked_fill(x == -math.inf, 0.0) for x in (g, w, t))
        error, eps = (g - w).abs().max().item(), EPS[torch.float32 if name == "lse" else q.dtype]
        ulps = eps * (2 * largest(w) + r) + 4 * EPS[torch.float32] * term
        assert error <= 2 * largest(t - w) + ulps, (
            f"{name}: error {error:.2e}, PyTorch's {largest(t - w):.2e}, {ulps:.1e}"
        )


@st.composite
def attention_cases(draw, dtypes=tuple(DTYPES), longest=150):
    dtype, D = draw(st.sampled_from(dtypes)), draw(st.sampled_from([32, 64, 96, 128]))
    B, Hkv, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = st.integers(1, longest) | st.sampled_from([1, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129])
    Tq, Tk = draw(lengths), draw(lengths)
    documents = None
    if draw(st.booleans()):
        Tk = Tq
        inside = sorted(draw(st.lists(st.integers(0, B * Tq), max_size=5)))  # two at one place: an empty document
        documents = torch.tensor([0, *inside, B * Tq], dtype=torch.int32)
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def laid_out(H, T):
        layout = draw(st.sampled_from(["B,H,T,D", "B,T,H,D", "from a wider one"]))
        if layout == "B,H,T,D":
            return torch.randn(B, H, T, D, generator=gen).to(dtype)
        wide = torch.randn(B, T + 1, H, 3 * D, generator=gen).to(dtype)
        wide = wide[:, :T, :, :D].contiguous() if layout == "B,T,H,D" else wide[:, 1:, :, D : 2 * D]
        return wide.transpose(1, 2)

    q, k, v, grad = (laid_out(*of) for of in ((Hkv * groups, Tq), (Hkv, Tk), (Hkv, Tk), (Hkv * groups, Tq)))
    window = draw(st.just(0) | st.integers(1, 40))
    return q, k, v, grad, draw(st.sampled_from([D**-0.5, 0.3, -0.1])), draw(st.booleans()), window, documents


@pytest.fixture(scope="session")
def attention_library(tmp_path_factory):
    return library(tmp_path_factory.mktemp("attention") / "library", "attention")


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
@given(case=attention_cases(), seed=st.integers(0, 2**31))
def test_attention_on_the_cpu(attention_library, order, case, seed):
    check_attention(case, attention_on_cpu(attention_library, case, order=order, seed=seed))


def small_attention(dtype, Tq, Tk, D, *, B=1, H=1, Hkv=1, causal=False, window=0, documents=None):
    gen = torch.Generator().manual_seed(Tq * 1000 + Tk)
    shapes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D), (B, H, Tq, D)
    q, k, v, grad = (torch.randn(shape, generator=gen).to(dtype) for shape in shapes)
    return q, k, v, grad, D**-0.5, causal, window, documents


# Several tiles of queries and of keys, the last ones ragged. One block in the last case: ThreadSanitizer has no room.
ATTENTION_SANITIZED = [
    small_attention(torch.float16, 70, 150, 64),
    small_attention(torch.float16, 40, 130, 32, H=2, causal=True),
    small_attention(torch.float32, 70, 70, 32, window=20, documents=torch.tensor([0, 31, 70], dtype=torch.int32)),
]
# What these do not use takes a sanitizer's compiler long.
FEWER = [
    ("attention.cuh", "  if (a.dtype == Dtype::bf16) with_head_size<__nv_bfloat16>(a.D, f);\n", ""),
    ("attention.cuh", "  if (D == 96) f(T(), std::integral_constant<int, 96>());\n", ""),
    ("attention.cuh", "  if (D == 128) f(T(), std::integral_constant<int, 128>());\n", ""),
]


@needs_compiler
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_attention_under_sanitizers(tmp_path, mode):
    call = program(tmp_path / "program", "attention", mode, changes=FEWER)
    for case, order in zip(ATTENTION_SANITIZED, ORDERS, strict=True):
        check_attention(case, attention_on_cpu(call, case, order=order))


FEWEST = [
    *FEWER,
    ("attention.cuh", "  if (a.dtype == Dtype::f32) with_head_size<float>(a.D, f);\n", ""),
    ("attention.cuh", "  if (D == 64) f(T(), std::integral_constant<int, 64>());\n", ""),
]
DIVERGED = "divergent|deadlock|a lane (that has returned|returns while others wait)"
K_IS_HERE = "__syncthreads();  // K is here, and nobody is at the last V any more\n"
V_IS_HERE = "__syncthreads();  // V is here, and nobody is at K any more\n"
LOAD_V = "    load_rows<C, C::N>(V, v, a.v.token, tile * C::N, Tk);\n"
ATTENTION_BUGS = {
    "no barrier before K is read": (K_IS_HERE, "\n", {"last in": "error nan", "thread": "data race"}),
    "no barrier before V is read": (V_IS_HERE, "\n", {"last in": "error nan", "thread": "data race"}),
    "V is overwritten while others read it": (
        f"{K_IS_HERE}{LOAD_V}",
        f"{LOAD_V}{K_IS_HERE}",
        {"last in": "error nan", "thread": "data race"},
    ),
    "V is not waited for": (f"wait_for_copies();\n    {V_IS_HERE}", V_IS_HERE, dict.fromkeys(ORDERS, "error nan")),
    "rows of K and V past the last": (
        "const bool there = from + row < end;",
        "const bool there = true;",
        {"address": "heap-buffer-overflow"},
    ),
    "rows of the output past the last": (
        "min(16 * C::M, block.end - first));\n}\n\n// ---- which",
        "16 * C::M);\n}\n\n// ---- which",
        {"address": "heap-buffer-overflow"},
    ),
    "less shared memory than is used": (
        "SHARED = C::OWN + 2 * C::OTHER;  // Q; K and V",
        "SHARED = C::OWN + 2 * C::OTHER - 32;",
        {"address": "heap-buffer-overflow"},
    ),
    "rows that do not start at a multiple of 16 bytes": (
        "LD = D + 16 / int(sizeof(T));",
        "LD = D + 8 / int(sizeof(T));",
        dict.fromkeys(ORDERS, "not a multiple of 16"),
    ),
    "a shuffle that some lanes skip": (
        "quad_max(most) * LOG2_E",
        "(t ? quad_max(most) : most) * LOG2_E",
        dict.fromkeys(ORDERS, DIVERGED),
    ),
    "a warp reads what its lanes write, without waiting": (
        "__syncwarp();\n  for (int p = lane",
        "\n  for (int p = lane",
        {"thread": "data race"},
    ),
    "all heads write one lse": (
        "a.lse[(block.b * a.H + block.h) * a.Tq + q] =",
        "a.lse[block.b * a.H * a.Tq + q] =",
        {"first in": "lse", "thread": "data race"},
    ),
}
BACKWARD_BUGS = {
    "no barrier in backward": (
        "__syncthreads();  // this tile is here, and nobody is at the one before any more",
        "",
        {"last in": "error nan", "thread": "data race"},
    ),
}


@needs_compiler
@pytest.mark.parametrize("bug", [*ATTENTION_BUGS, *BACKWARD_BUGS])
def test_attention_with_a_bug_is_caught(tmp_path, bug):
    file = "attention.cuh" if bug in ATTENTION_BUGS else "attention_backward.cuh"
    old, new, catchers = {**ATTENTION_BUGS, **BACKWARD_BUGS}[bug]

    def run(call, order):
        for case in (
            small_attention(torch.float16, 70, 150, 32, H=2, Hkv=2),
            small_attention(torch.float16, 40, 130, 32, causal=True),
        ):
            check_attention(case, attention_on_cpu(call, case, order=order))

    changes = [*FEWEST, (file, old, new)]
    check_caught(lambda mode: program(tmp_path / mode, "attention", mode, changes=changes), catchers, run)


# ---------------------------------------------------------------------------------------------- the build


# Registers a thread may have: with more, so few of them fit a processor that loads from memory are not hidden.
REGISTERS = {
    "softmax_kernel": 64,
    "softmax_backward_kernel": 64,
    "forward_kernel": 255,
    "backward_kernel": 255,
    "delta_kernel": 40,
}
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>sm_\d+)'.*?(?P<spilled>\d+) bytes spill stores, "
    r"(?P<filled>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="session")
def cross_build(tmp_path_factory):
    """A checkout whose extension has the CUDA kernels, built with a torch that has no CUDA; and what ptxas reported."""
    folder = tmp_path_factory.mktemp("cross")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "minimal").mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "minimal/__init__.py", "minimal/fused.py"):
        shutil.copy(ROOT / file, folder / file)
    how = {"MINIMAL_CUDA": "cross", "MINIMAL_BUILD_EXTENSION": "1", "NVCC_APPEND_FLAGS": "-Xptxas -v"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **how}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


@needs_nvcc
def test_cross_build_links_and_loads(cross_build):
    program = """
        import sys, torch
        from minimal import fused
        assert fused.available(), fused.why_not()
        for op in sys.argv[1:]:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"minimal::{op}", "CUDA"), op
        x = torch.randn(3, 5)
        torch.testing.assert_close(torch.ops.minimal.softmax(x, None, 1.0, False), x.softmax(-1))
    """
    ops = ["softmax", "softmax_backward", "attention", "attention_backward"]
    command = [sys.executable, "-c", textwrap.dedent(program), *ops]
    done = subprocess.run(
        command, cwd=cross_build[0], env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_nvcc
def test_kernels_keep_to_their_registers(cross_build):
    found = list(REPORT.finditer(cross_build[1]))
    assert {m["arch"] for m in found} >= {"sm_80", "sm_90"}
    for m in found:
        (budget,) = [n for name, n in REGISTERS.items() if re.search(rf"\d{name}", m["kernel"])]
        at = f"{m['kernel']} for {m['arch']}"
        assert (m["spilled"], m["filled"]) == ("0", "0"), f"{at}: registers spill to memory"
        assert int(m["registers"]) <= budget, f"{at}: {m['registers']} registers, wanted at most {budget}"


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def loaded():
    from minimal import fused

    assert fused.available(), fused.why_not()


def on_gpu(x):
    """The same numbers with the same strides."""
    if x is None:
        return None
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.usefixtures("loaded")
@given(case=softmax_cases(widths=(*WIDTHS, 50257)))
def test_softmax_on_the_gpu(case):
    x, scale, causal, mask, grad = case
    y = torch.ops.minimal.softmax(on_gpu(x), on_gpu(mask), scale, causal)
    dx = torch.ops.minimal.softmax_backward(on_gpu(grad), y, scale)
    check_softmax(case, (y.cpu(), dx.cpu()))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.usefixtures("loaded")
@given(case=attention_cases(longest=700))
def test_attention_on_the_gpu(case):
    q, k, v, grad, scale, causal, window, documents = case
    options = (None, scale, causal, on_gpu(documents), window)
    inputs = [on_gpu(x) for x in (q, k, v)]
    out, lse = torch.ops.minimal.attention(*inputs, *options)
    assert out.stride(2) == (out.stride(1) * q.shape[1] if 0 < q.stride(1) < q.stride(2) else q.shape[3])
    gradients = torch.ops.minimal.attention_backward(on_gpu(grad), *inputs, out, lse, *options)
    check_attention(case, [x.cpu() for x in (out, lse, *gradients)])


@pytest.mark.cuda
@needs_gpu
@pytest.mark.usefixtures("loaded")
def test_what_the_kernels_lack_is_said_on_the_gpu():
    q = torch.randn(1, 2, 5, 32, device="cuda")
    for message, options in (
        ("mask: the CUDA kernels take none", (torch.ones(5, 5, device="cuda").bool(), 1.0, False)),
        ("softcap=2", (None, 1.0, False, None, 0, None, 2.0)),
        ("window=-1", (None, 1.0, False, None, -1)),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.minimal.attention(q, q, q, *options)
    with pytest.raises(RuntimeError, match="the head size must be 32, 64, 96 or 128"):
        torch.ops.minimal.attention(q[..., :16], q[..., :16], q[..., :16], None, 1.0, False)


def test_which_tensors_on_a_gpu_would_take_the_kernels(monkeypatch):  # tensors that only pretend to be there
    from torch._subclasses.fake_tensor import FakeTensorMode

    from minimal import fused

    def empty(H, D, dtype=torch.float16, device="cuda"):
        return torch.empty(1, H, 5, D, dtype=dtype, device=device)

    with FakeTensorMode():
        q, k = empty(4, 64), empty(2, 64)
        if fused.available():
            assert "MINIMAL_FUSED=cuda" in fused.why_not(q, k, k)
        monkeypatch.setattr(fused, "_reason", None)
        monkeypatch.setattr(fused, "_cuda", True)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert fused.why_not(*[empty(H, 96, dtype) for H in (4, 2, 2)]) is None
        for unfit in ([empty(2, 48)] * 3, [q, k, empty(2, 32)]):
            assert "one head size of (32, 64, 96, 128)" in fused.why_not(*unfit)
        assert "no mask" in fused.why_not(q, k, k, mask=torch.empty(5, 5, device="cuda")) and fused.why_not(
            q, softcap=1.0
        )
        assert "dtype torch.float64" in fused.why_not(empty(4, 64, torch.float64), k, k)
        assert "dtype torch.float32" in fused.why_not(q, empty(2, 64, torch.float32), k)
        assert "float16" in fused.why_not(*[empty(H, 64, device="cpu") for H in (4, 2, 2)])
