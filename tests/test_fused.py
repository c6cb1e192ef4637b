# SPDX-License-Identifier: MIT
"""The fused attention operator and minimal/fused.py around it.

Oracle: attention written out in float64, with autograd for the gradients, itself held against a loop over scores.
Bound: at most twice the error that F.scaled_dot_product_attention makes at the same dtype, both against float64.
The operator is called on every instruction set that this machine has.
"""

import importlib
import itertools
import math
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimal import fused

if not fused.available():  # CI sets MINIMAL_REQUIRE_FUSED=1, so that it cannot pass without having tested the operators
    if os.environ.get("MINIMAL_REQUIRE_FUSED") == "1":
        raise RuntimeError(f"MINIMAL_REQUIRE_FUSED=1, but the fused operators are {fused.why_not()}")
    pytest.skip(f"the fused operators are {fused.why_not()}", allow_module_level=True)

C = sys.modules["minimal._C"]
SETS = C.instruction_sets().split(",")
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
ROOT = pathlib.Path(fused.__file__).parent.parent
ops = torch.ops.minimal


@pytest.fixture(autouse=True)
def _two_threads_and_best_set():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    C.choose_instruction_set("")


# ---------------------------------------------------------------------------------------------- the oracle


def bias_of(B, Tq, Tk, cu_seqlens=None, window=0, slopes=None, softcap=0.0):
    """What documents, window and slopes add to the scores, (B or 1, H or 1, Tq, Tk): from loops and the definitions."""
    bias = torch.zeros(B, 1, Tq, Tk, dtype=torch.float64)
    distance = (torch.arange(Tk) - (torch.arange(Tq)[:, None] + Tk - Tq)).abs()
    if slopes is not None:
        bias = bias - slopes.double().view(-1, slopes.shape[-1], 1, 1) * distance
    if window:
        bias = bias.masked_fill(distance >= window, -math.inf)
    if cu_seqlens is not None:
        number = torch.zeros(B * Tk, dtype=torch.long)
        for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            number[begin:end] = n
        number = number.view(B, 1, Tk)
        bias = bias.masked_fill((number.mT != number)[:, None], -math.inf)
    return bias


def turned(x, cos, sin):
    """Rotary positions by complex numbers: the pair (d, d + D/2) of place t times e^(i angle)."""
    T, D = x.shape[2:]
    wide = x.double()
    pairs = torch.complex(wide[..., : D // 2], wide[..., D // 2 :])
    factor = torch.complex(cos.double(), sin.double())[..., cos.shape[-2] - T :, :]
    pairs = pairs * (factor if cos.dim() == 2 else factor[:, None])
    return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)


def naive(q, k, v, mask, scale, causal, *, offset=None, empty="zeros", rotary=None, **options):
    """Attention as it is defined. `offset` and `empty` exist for the buggy variants that the checks must reject."""
    if rotary is not None:
        q, k = turned(q, *rotary), turned(k, *rotary)
    B, H, Tq, Hkv, Tk = *q.shape[:3], *k.shape[1:3]
    k, v = k.repeat_interleave(H // Hkv, 1), v.repeat_interleave(H // Hkv, 1)
    s = scale * (q @ k.mT)  # (B, H, Tq, Tk)
    if cap := options.get("softcap"):
        s = cap * torch.tanh(s / cap)
    if options:
        s = s + bias_of(B, Tq, Tk, **options).to(s.dtype)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    if causal:
        j, i = torch.arange(Tk), torch.arange(Tq)[:, None]
        s = s.masked_fill(j > i + (Tk - Tq if offset is None else offset), -math.inf)
    nothing = (s == -math.inf).all(-1, keepdim=True)
    if empty == "nan":
        return torch.softmax(s, -1) @ v
    p = torch.softmax(s.masked_fill(nothing, 0.0), -1)
    return (p.masked_fill(nothing, 0.0) if empty == "zeros" else p) @ v


def sdpa(q, k, v, mask, scale, causal, rotary=None, **options):
    """PyTorch's own attention under the same contract: one additive mask, and the empty rows cleared afterwards.

    It has no soft cap: there the definition stands for it, at its dtype."""
    if options.get("softcap"):
        return naive(q, k, v, mask, scale, causal, rotary=rotary, **options)
    if rotary is not None:
        q, k = turned(q, *rotary), turned(k, *rotary)
    B, H, Tq, Hkv, Tk = *q.shape[:3], *k.shape[1:3]
    bias = bias_of(B, Tq, Tk, **options).float().expand(B, H, Tq, Tk)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask.float()
    if causal:
        bias = bias.masked_fill(torch.arange(Tk) > torch.arange(Tq)[:, None] + Tk - Tq, -math.inf)
    nothing = (bias == -math.inf).all(-1, keepdim=True)
    bias = bias.masked_fill(nothing, 0.0).to(q.dtype)
    k, v = k.repeat_interleave(H // Hkv, 1), v.repeat_interleave(H // Hkv, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).masked_fill(nothing, 0.0)


def run_fused(q, k, v, mask, scale, causal, **options):
    return fused.attention(q, k, v, mask=mask, scale=scale, causal=causal, **options)


def with_grads(f, q, k, v, mask, scale, causal, grad, dtype, **options):
    """(out, dq, dk, dv) of f at this dtype; the inputs keep their strides."""
    inputs = [x.detach().to(dtype) if x.dtype != dtype else x.detach() for x in (q, k, v)]
    inputs = [x.requires_grad_() for x in inputs]
    out = f(*inputs, mask, scale, causal, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def check(case, f=run_fused, **options):
    """f against the oracle, forward and backward, with PyTorch's own error as the measure."""
    q, k, v, mask, scale, causal, grad = case
    got = with_grads(f, q, k, v, mask, scale, causal, grad, q.dtype, **options)
    wanted = with_grads(naive, q, k, v, mask, scale, causal, grad, torch.float64, **options)
    if 0 in (q.numel(), k.numel()):  # PyTorch's attention does not take these; the results are exact zeros or empty
        theirs = [w.to(q.dtype) for w in wanted]
    else:
        theirs = with_grads(sdpa, q, k, v, mask, scale, causal, grad, q.dtype, **options)
    dS = abs(scale) * largest(grad.double().abs() @ v.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    terms = (largest(v), dS * largest(k), dS * largest(q), largest(grad))  # what the sums add up, before cancellation
    # The backward pass of both reads `out`, rounded to q's dtype, for rowsum(dO * O).
    delta = abs(scale) * largest((grad.double() * wanted[0]).abs().sum(-1))
    rounded = (0.0, delta * largest(k), delta * largest(q), 0.0)
    for name, g, w, t, term, r in zip(("out", "dq", "dk", "dv"), got, wanted, theirs, terms, rounded, strict=True):
        assert g.shape == w.shape and g.dtype == q.dtype, (name, g.shape, g.dtype)
        if g.numel() == 0:
            continue
        error, theirs_is = (g - w).abs().max().item(), (t - w).abs().max().item()
        # A few ulp more, as PyTorch's error in a few numbers can be zero by luck. NaN fails the comparison.
        ulps = EPS[q.dtype] * (2 * largest(w) + r) + 4 * EPS[torch.float32] * term
        assert error <= 2 * theirs_is + ulps, f"{name}: error {error:.2e}, PyTorch's {theirs_is:.2e}, ulps {ulps:.1e}"


# ---------------------------------------------------------------------------------------------- cases

LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 3, 16, 17, 63, 64, 65, 96, 97, 129]), st.integers(0, 140))
SIZES = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 32, 63, 64, 65, 128, 129, 255, 256]), st.integers(1, 256))
BATCHES = st.integers(0, 3)
LAYOUTS = ("contiguous", "B,T,H,D", "every second", "one batch", "last two swapped")


def laid_out(shape, layout, dtype, generator):
    """Random numbers of this shape, in memory in one of several ways."""
    B, H, T, D = shape

    def randn(*s):
        return torch.randn(s, generator=generator).to(dtype)

    if layout == "B,T,H,D":
        return randn(B, T, H, D).transpose(1, 2)
    if layout == "every second":  # gaps, and an element stride of 2
        return randn(B, H + 1, T + 3, 2 * D + 1)[:, 1:, 2 : T + 2, 1::2]
    if layout == "one batch":
        return randn(1, H, T, D).expand(B, H, T, D)
    if layout == "last two swapped":
        return randn(B, H, D, T).mT
    return randn(B, H, T, D)


@st.composite
def cases(draw, lengths=LENGTHS, dtypes=(torch.float32, torch.bfloat16), batches=BATCHES):
    dtype = draw(st.sampled_from(dtypes))
    B, Hkv, groups = draw(batches), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    H, Tq, Tk, D, Dv = Hkv * groups, draw(lengths), draw(lengths), draw(SIZES), draw(SIZES)
    if draw(st.booleans()):
        Dv = D  # as nearly every caller has it
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = st.sampled_from(LAYOUTS)
    q = laid_out((B, H, Tq, D), draw(layout), dtype, gen)
    k = laid_out((B, Hkv, Tk, D), draw(layout), dtype, gen)
    v = laid_out((B, Hkv, Tk, Dv), draw(layout), dtype, gen)
    grad = laid_out((B, H, Tq, Dv), draw(layout), dtype, gen)
    kind = draw(st.sampled_from(["none", "bool", "additive", "additive float32"]))
    mask = None
    if kind != "none":
        shape = [n if draw(st.booleans()) else 1 for n in (B, H, Tq, Tk)][draw(st.integers(0, 4)) :]
        if kind == "bool":
            mask = torch.rand(shape, generator=gen) < draw(st.sampled_from([0.02, 0.5, 0.95]))
        else:  # multiples of 1/4, exact in bfloat16, so that every contender sees the same mask
            mask = torch.randint(-12, 8, shape, generator=gen) / 4
            hidden = torch.rand(shape, generator=gen) < draw(st.sampled_from([0.0, 0.4, 0.97]))
            mask = mask.masked_fill(hidden, -math.inf)
            mask = mask.to(dtype) if kind == "additive" else mask
        if draw(st.booleans()):
            mask = mask.clone().expand(torch.broadcast_shapes(mask.shape, (Tq, Tk)))
    scale = draw(st.sampled_from([1 / math.sqrt(D), 1.0 / D, -0.3 / math.sqrt(D)]))
    return q, k, v, mask, scale, draw(st.booleans()), grad


def simple(Tq, Tk, *, B=2, H=4, Hkv=2, D=16, Dv=24, dtype=torch.float32, mask=None, causal=False):
    gen = torch.Generator().manual_seed(Tq * 1000 + Tk)
    q, k, v = ((B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv))
    q, k, v = (laid_out(s, "contiguous", dtype, gen) for s in (q, k, v))
    return q, k, v, mask, D**-0.5, causal, laid_out((B, H, Tq, Dv), "contiguous", dtype, gen)


# ---------------------------------------------------------------------------------------------- values and gradients


def test_oracle_agrees_with_a_loop_over_single_scores():
    q, k, v, _, scale, _, _ = (x.double() if torch.is_tensor(x) else x for x in simple(3, 5))
    mask = torch.tensor([True, False, True, True, True]).expand(3, 5).clone()
    mask[0] = False
    for causal in (False, True):
        wanted = torch.zeros(2, 4, 3, 24, dtype=torch.float64)
        for b, h, i in itertools.product(range(2), range(4), range(3)):
            seen = [j for j in range(5) if mask[i, j] and (not causal or j <= i + 2)]
            weights = [math.exp(scale * (q[b, h, i] * k[b, h // 2, j]).sum().item()) for j in seen]
            for j, weight in zip(seen, weights, strict=True):
                wanted[b, h, i] += weight / sum(weights) * v[b, h // 2, j]
        torch.testing.assert_close(naive(q, k, v, mask, scale, causal), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("isa", SETS)
@given(case=cases())
def test_attention_against_float64(isa, case):
    C.choose_instruction_set(isa)
    check(case)


@given(case=cases(lengths=st.integers(150, 420), batches=st.just(1)), isa=st.sampled_from(SETS))
@settings(max_examples=10)
def test_long_sequences(case, isa):  # several tiles of queries and several blocks of keys
    C.choose_instruction_set(isa)
    check(case)


@st.composite
def options(draw, case):
    """Documents, window, slopes, soft cap and rotary positions for a case, any of them or none."""
    q, k = case[0], case[1]
    B, H, Tq, Tk = *q.shape[:3], k.shape[2]
    chosen = {}
    if draw(st.booleans()):
        chosen["window"] = draw(st.integers(1, max(Tq, Tk) + 2))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(H,), (B, H)]))
        chosen["slopes"] = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(B + H)) / 16
    if draw(st.booleans()):
        chosen["softcap"] = draw(st.sampled_from([0.3, 5.0, 50.0]))
    if q.shape[3] % 32 == 0 and Tq <= Tk and draw(st.booleans()):
        shape = draw(st.sampled_from([(Tk,), (B, Tk), (1, Tk)]))
        angles = torch.rand(*shape, q.shape[3] // 2, generator=torch.Generator().manual_seed(Tk)) * 7
        chosen["rotary"] = (angles.cos(), angles.sin())
    if Tq == Tk and draw(st.booleans()):
        inner = draw(st.lists(st.integers(0, B * Tq), max_size=6))
        chosen["cu_seqlens"] = torch.tensor([0, *sorted(inner), B * Tq], dtype=torch.int32)
    return chosen


@pytest.mark.parametrize("isa", SETS)
@given(data=st.data(), same=st.booleans())
def test_documents_window_slopes_softcap_and_rotary(isa, data, same):
    C.choose_instruction_set(isa)
    case = data.draw(cases())
    if same and case[0].shape[2]:  # documents want as many queries as keys
        q, k, v, _, scale, causal, grad = case
        T = q.shape[2]
        gen = torch.Generator().manual_seed(T)
        k = laid_out((*k.shape[:2], T, k.shape[3]), "B,T,H,D", q.dtype, gen)
        v = laid_out((*v.shape[:2], T, v.shape[3]), "contiguous", q.dtype, gen)
        case = (q, k, v, None, scale, causal, grad)
    check(case, **data.draw(options(case)))


@pytest.mark.parametrize("isa", SETS)
@given(case=cases(lengths=st.integers(16, 700)), data=st.data())
@settings(max_examples=25)
def test_single_queries(isa, case, data):  # decoding: a kernel of its own, for head sizes that are multiples of 32
    C.choose_instruction_set(isa)
    q, k, v, mask, scale, causal, grad = case
    mask = mask[..., -1:, :] if mask is not None and mask.dim() > 1 else mask
    D, Dv = q.shape[3] // 32 * 32 or 32, v.shape[3] // 32 * 32 or 32
    q, k = (F.pad(x, (0, D - x.shape[3])) if x.shape[3] < D else x[..., :D] for x in (q[:, :, -1:], k))
    v, grad = (F.pad(x, (0, Dv - x.shape[3])) if x.shape[3] < Dv else x[..., :Dv] for x in (v, grad[:, :, -1:]))
    case = (q, k, v, mask, scale, causal, grad)
    check(case, **data.draw(options(case)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_a_mask_hides_or_leaves_whole(isa, dtype):  # 64 by 64 scores; the kernel looks before it computes
    C.choose_instruction_set(isa)
    T = 200
    number = torch.searchsorted(torch.tensor([0, 64, 70, 128]), torch.arange(T), right=True)
    apart = number[:, None] == number
    empty_rows = apart.clone()
    empty_rows[64:128] = False
    for mask in (apart, apart | (torch.rand(T, T) < 0.001), empty_rows, apart.expand(2, 4, T, T), ~apart, apart[:, :1]):
        for causal in (False, True):
            check(simple(T, T, dtype=dtype, mask=mask, causal=causal))


def test_what_is_not_seen_has_no_influence():  # packed documents must not leak, nor a window
    q, k, v, _, scale, _, _ = simple(96, 96)
    cu = torch.tensor([0, 41, 43, 130, 192])  # a document ends at the row's end in any case
    other_k, other_v = k.clone(), v.clone()
    other_k[0, :, :41], other_v[0, :, :41] = torch.randn(2, 41, 16), 1e6
    for causal in (False, True):
        a = fused.attention(q, k, v, cu_seqlens=cu, causal=causal)
        b = fused.attention(q, other_k, other_v, cu_seqlens=cu, causal=causal)
        assert torch.equal(a[0, :, 41:], b[0, :, 41:]) and torch.equal(a[1], b[1]) and (b[0, :, :41] == 1e6).any()
        alone = fused.attention(q[:1, :, 43:], k[:1, :, 43:], v[:1, :, 43:], causal=causal)
        torch.testing.assert_close(a[:1, :, 43:], alone)
        a = fused.attention(q, k, v, window=8, causal=causal)
        b = fused.attention(q, other_k, other_v, window=8, causal=causal)
        assert torch.equal(a[0, :, 48:], b[0, :, 48:]) and (a[0, :, 47] != b[0, :, 47]).all()


@given(case=cases(), isa=st.sampled_from(SETS))
def test_logsumexp(case, isa):
    C.choose_instruction_set(isa)
    q, k, v, mask, scale, causal, _ = case
    out, lse = ops.attention(q, k, v, mask, scale, causal)
    assert lse.is_contiguous() and lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    # naive() on one-hot values gives P itself; the scores are then S = log P + lse
    s = scale * (q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.double()
    if causal:
        Tq, Tk = s.shape[-2:]
        s = s.masked_fill(torch.arange(Tk) > torch.arange(Tq)[:, None] + Tk - Tq, -math.inf)
    wanted = torch.logsumexp(s, -1) if s.shape[-1] else torch.full(s.shape[:-1], -math.inf)
    torch.testing.assert_close(lse.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def test_traps_alignment_and_empty_rows_and_that_the_checks_see_them():
    decode, chunk, tall = simple(1, 9, causal=True), simple(4, 9, causal=True), simple(9, 4, causal=True)
    masked = simple(5, 5, mask=torch.tensor([1, 0, 1, 1, 0]).bool()[:, None])
    additive = simple(5, 5, mask=torch.zeros(5, 1).masked_fill(torch.arange(5)[:, None] == 2, -math.inf))
    for case in (decode, chunk, tall, masked, additive):
        check(case)

    def top_left(*a):
        return naive(*a, offset=0)

    for case in (decode, chunk):
        with pytest.raises(AssertionError):
            check(case, top_left)
    for case in (tall, masked, additive):  # in `tall` the first five queries see nothing
        for variant in ("nan", "uniform"):
            with pytest.raises(AssertionError):
                check(case, lambda *a, variant=variant: naive(*a, empty=variant))

    q, k, v, mask, scale, causal, grad = masked
    out, dq, *_ = with_grads(run_fused, *masked, torch.float32)
    assert out[:, :, 1].eq(0).all() and dq[:, :, 1].eq(0).all() and out[:, :, 0].ne(0).any()


def test_chunked_prefill_equals_full_prefill():
    q, k, v, _, scale, _, _ = simple(37, 37)
    full = run_fused(q, k, v, None, scale, True)
    for cut in (1, 16, 36):
        parts = [run_fused(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], None, scale, True)]
        parts.append(run_fused(q[:, :, cut:], k, v, None, scale, True))
        torch.testing.assert_close(torch.cat(parts, 2), full, rtol=1e-5, atol=1e-6)


MASK_SHAPES = [(3, 5), (5,), (), (1, 5), (3, 1), (2, 1, 1, 5), (4, 3, 5), (4, 1, 1), (1, 1, 3, 5), (2, 4, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("additive", [False, True])
def test_every_broadcast_of_a_mask(shape, additive):
    mask = torch.rand(shape) < 0.6
    mask = torch.zeros(shape).masked_fill(~mask, -math.inf) + torch.randn(shape) if additive else mask
    check(simple(3, 5, mask=mask))
    check(simple(3, 5, mask=mask, causal=True))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("size", [1e4, 1e12, 1e18])
def test_huge_logits(isa, size):
    C.choose_instruction_set(isa)
    for q, k, v, _, scale, _, grad in (
        simple(20, 33),
        simple(1, 300, D=64, Dv=64),
    ):  # the second is the decoding kernel's
        case = q * size, k * size, v, None, scale, True, grad
        got = run_fused(*case[:6])  # one key wins each row: weights of exactly 0 and 1
        wanted = naive(*(x.double() for x in case[:3]), *case[3:6])
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
        gradients = with_grads(run_fused, *case, torch.float32)
        assert all(x.isfinite().all() for x in gradients) and largest(gradients[3]) <= 2.1 * q.shape[2] * largest(grad)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("Tq, D", [(40, 16), (1, 64)])
def test_what_a_mask_hides_may_be_nan(isa, Tq, D):  # as in plain PyTorch, whether a block is hidden whole or in part
    C.choose_instruction_set(isa)
    q, k, v, _, scale, _, _ = simple(Tq, 200, D=D, Dv=D)
    clean = k.clone()
    k[:, :, [3, 150]] = torch.tensor([math.nan, math.inf])[:, None]
    mask = torch.ones(200, dtype=torch.bool)
    mask[[3, 150]] = mask[64:128] = False
    for m in (mask, torch.zeros(200).masked_fill(~mask, -math.inf), mask.expand(Tq, 200).contiguous()):
        out = run_fused(q, k, v, m, scale, False)
        torch.testing.assert_close(out, run_fused(q, clean, v, mask, scale, False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Tq", [17, 40, 64])
def test_hidden_nan_gives_keys_and_values_no_gradient(isa, dtype, Tq):  # nor do the lanes past the last query
    C.choose_instruction_set(isa)
    q, k, v, _, scale, _, grad = simple(Tq, 100, D=32, Dv=32, dtype=dtype)
    mask = torch.ones(Tq, 100, dtype=torch.bool)
    mask[:, [3, 70]] = False
    wanted = with_grads(naive, q, k, v, mask, scale, False, grad, torch.float64)
    k[:, :, [3, 70]] = torch.tensor([math.nan, math.inf], dtype=dtype)[:, None]
    for m in (mask, torch.zeros(Tq, 100).masked_fill(~mask, -math.inf)):
        got = with_grads(run_fused, q, k, v, m, scale, False, grad, dtype)
        for g, w in ((got[2], wanted[2]), (got[3], wanted[3])):
            assert (g - w).abs().max() <= 16 * EPS[dtype] * largest(w) and g[:, :, [3, 70]].eq(0).all()


@pytest.mark.parametrize("isa", SETS)
def test_a_single_query_sees_what_is_bad(isa):
    C.choose_instruction_set(isa)
    q, k, v, _, scale, _, grad = simple(1, 600, D=32, Dv=64)
    k[0, 1, 400] = math.nan
    out, lse = ops.attention(q, k, v, None, scale, False)
    assert out[0, 2:].isnan().all() and lse[0, 2:].isnan().all() and out[0, :2].isfinite().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
    hidden = torch.zeros(600, dtype=torch.bool)
    out, lse = ops.attention(q, k, v, hidden, scale, False)
    assert out.eq(0).all() and lse.eq(-math.inf).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_not_swallowed(isa, dtype):
    C.choose_instruction_set(isa)
    for where, bad in itertools.product("qkv", (math.nan, math.inf)):
        q, k, v, _, scale, _, _ = simple(40, 70, B=1, H=2, Hkv=2, dtype=dtype)
        x = {"q": q, "k": k, "v": v}[where]
        x[0, 1, 7] = bad
        out = run_fused(q, k, v, None, scale, False)
        rows = [7] if where == "q" else list(range(40))
        wrong = ~out.isfinite()
        assert wrong[0, 1, rows].all() if (where, bad) != ("k", math.inf) else wrong[0, 1].any(), (where, bad)
        clean = wrong.clone()
        clean[0, 1, rows] = False
        assert not clean.any()
    q, k, v, _, scale, _, _ = simple(40, 70, B=1, H=2, Hkv=2, dtype=dtype)
    k[0, 1, 50] = math.nan  # under causal, query i sees keys up to i + 30: from query 20 on
    out = run_fused(q, k, v, None, scale, True)
    assert out[0, 1, 20:].isnan().all() and out[0, 1, :20].isfinite().all()
    grad = torch.ones_like(out)
    q, k, v, _, scale, _, _ = simple(40, 70, B=1, H=2, Hkv=2, dtype=dtype)
    grad[0, 0, 3, 5] = math.nan
    dq, dk, dv = with_grads(run_fused, q, k, v, None, scale, False, grad, dtype)[1:]
    assert dq[0, 0, 3].isnan().all() and dk[0, 0].isnan().all() and dv[0, 0, :, 5].isnan().all()
    assert dq[0, 1].isfinite().all() and dv[0, 1].isfinite().all()
    q, k, v, _, scale, _, grad = simple(40, 70, B=1, dtype=dtype)
    bias = torch.zeros(40, 70)
    bias.view(torch.int32)[7, 5] = 0x7FFFFFFF  # a NaN, too: rounding to bfloat16 must not carry out of it
    results = with_grads(run_fused, q, k, v, bias, scale, False, grad, dtype)
    assert all(x[:, :, 7].isnan().all() for x in results[:2]) and all(x.isnan().all() for x in results[2:])


OPTIONS = {  # shapes in the letters of minimal/fused.py, D2 for D/2; or numbers
    "nothing": {},
    "mask": {"mask": "B H Tq Tk"},
    "slopes": {"slopes": "B H"},
    "slopes of heads": {"slopes": "H"},
    "rotary": {"cos": "B Tk D2", "sin": "B Tk D2"},
    "rotary of one row": {"cos": "Tk D2", "sin": "Tk D2"},
    "cu_seqlens": {},
    "window": st.integers(-2, 3),
    "softcap": st.sampled_from([-1.0, 0.0, 0.5, math.inf, math.nan]),
}


@st.composite
def misfits(draw):
    """Shapes of q, k, v and of one option, and its number if it has one. One size is off, or one dimension is there too
    many or too few; or all is well."""
    option = draw(st.sampled_from(sorted(OPTIONS)))
    has_number = not isinstance(OPTIONS[option], dict)
    letters = {"q": "B H Tq D", "k": "B Hkv Tk D", "v": "B Hkv Tk Dv"} | ({} if has_number else OPTIONS[option])
    B, Hkv, Tq, Tk, Dv = (draw(st.integers(1, 3)) for _ in range(5))
    Tk = Tq if option == "cu_seqlens" else max(Tq, Tk)
    sizes = {"B": B, "H": Hkv * draw(st.integers(1, 2)), "Hkv": Hkv, "Tq": Tq, "Tk": Tk, "D": 32, "D2": 16, "Dv": Dv}
    shapes = {name: [sizes[x] for x in text.split()] for name, text in letters.items()}
    shape = shapes[draw(st.sampled_from(sorted(shapes)))]
    change = draw(st.sampled_from(["none", "a size", "a size", "a size", "more", "fewer"]))
    if change == "a size":
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 6))
    elif change == "more":
        shape.insert(0, draw(st.integers(1, 2)))
    elif change == "fewer":
        del shape[0]
    numbers = {option: draw(OPTIONS[option])} if has_number else {}
    return shapes, numbers | ({"cu_seqlens": [0, B * Tk]} if option == "cu_seqlens" else {})


def outcome(f):
    """(result, None), or (None, its error's one line without the place in our C++)."""
    try:
        return f(), None
    except RuntimeError as error:
        assert "\n" not in str(error)
        return None, str(error).split("minimal::attention: ")[-1]


@given(misfits(), st.booleans())
@settings(max_examples=300)
def test_both_paths_refuse_the_same_calls(case, boolean):
    """Plain PyTorch alone would broadcast some of these in silence, and name no argument in others."""
    shapes, given = case
    given = given | {name: torch.randn(shape) for name, shape in shapes.items()}
    if "mask" in given and boolean:
        given["mask"] = given["mask"] > 0
    if "cu_seqlens" in given:
        given["cu_seqlens"] = torch.tensor(given["cu_seqlens"])
    if "cos" in given:
        given["rotary"] = given.pop("cos"), given.pop("sin")
    out, error = outcome(lambda: fused.attention(**given))
    with mock.patch.object(fused, "_reason", "switched off by MINIMAL_FUSED=0"):
        plain, plain_error = outcome(lambda: fused.attention(**given))
    assert (error is None) == (plain_error is None), error or plain_error
    if error is None:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    else:
        argument = re.match(r"\w+", error)[0]
        assert re.search(rf"\b{argument}\b", plain_error) and "wanted" in plain_error


def test_both_paths_refuse_options_that_would_widen_the_scores():
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    for options in ({"mask": mask}, {"mask": mask.float()}, {"mask": mask[None]}, {"slopes": torch.ones(3, 4)}):
        given = (options.get("mask"), 1.0, None, 0, options.get("slopes"))
        with pytest.raises(RuntimeError):
            fused.attention(q, k, v, **options)
        with pytest.raises(RuntimeError):
            fused._plain_attention(q, k, v, False, *given)
    for softmax in (fused.softmax, lambda x, mask: fused._plain_softmax(x, False, mask, 1.0)):
        with pytest.raises(RuntimeError, match="broadcasts to"):
            softmax(torch.randn(5, 7), mask=torch.zeros(3, 5, 7))


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("name", ["mask", "slopes", "cos", "sin"])
def test_what_gets_no_gradient_says_so(name, others):
    """Of the operators an error, whether or not q, k and v need gradients, too; minimal.fused goes to plain PyTorch."""
    q, k, v = (torch.randn(1, 2, 5, 32, requires_grad=others) for _ in range(3))
    options = {"mask": torch.randn(5, 5), "slopes": torch.rand(2), "cos": torch.rand(5, 16), "sin": torch.rand(5, 16)}
    mask, slopes, cos, sin = options.values()
    arguments = (q, k, v, mask, 0.5, True, None, 0, slopes, 0.0, cos, sin)
    ops.attention(*arguments)[0].requires_grad_().sum().backward()  # none of them needs one: no error
    options[name].requires_grad_()
    with pytest.raises(RuntimeError, match="mask, slopes, cos and sin no gradient"):
        ops.attention(*arguments)[0].sum().backward()
    if name == "mask":
        with pytest.raises(RuntimeError, match="no gradient"):
            ops.softmax(torch.randn(5, 5, requires_grad=others), mask, 1.0, False).sum().backward()

    ours = fused.attention(q, k, v, scale=0.5, causal=True, mask=mask, slopes=slopes, rotary=(cos, sin))
    wide = {n: x.detach().double().requires_grad_(n == name) for n, x in options.items()}
    distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    bias = wide["mask"] - wide["slopes"][:, None, None] * distance
    wanted = naive(*(x.detach().double() for x in (q, k, v)), bias, 0.5, True, rotary=(wide["cos"], wide["sin"]))
    for out in (ours, wanted):
        out.pow(2).sum().backward()
    torch.testing.assert_close(options[name].grad.double(), wide[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("amx" not in SETS, reason="this processor has no AMX")
def test_the_matrix_unit_is_left_as_it_was():
    """PyTorch's products of bfloat16 use it too, and may think that it is still set up for them."""
    C.choose_instruction_set("amx")
    x, w = torch.randn(64, 96).bfloat16(), torch.randn(96, 160).bfloat16()
    q, k, v = (torch.randn(1, 2, 130, 64).bfloat16().requires_grad_() for _ in range(3))
    wanted, want_sdpa = x @ w, F.scaled_dot_product_attention(q, k, v)
    for _ in range(3):
        fused.attention(q, k, v, causal=True).sum().backward()
        assert torch.equal(x @ w, wanted) and torch.equal(F.scaled_dot_product_attention(q, k, v), want_sdpa)


def test_gradcheck():  # finite differences in float32: coarse, but they know nothing of our formulas
    q, k, v, _, scale, _, _ = simple(3, 4, B=1, D=3, Dv=2)
    mask = torch.tensor([0.5, -0.5, -math.inf, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradcheck says that float32 is coarse
        inputs = [x.requires_grad_() for x in (q, k, v)]
        for causal in (False, True):
            assert torch.autograd.gradcheck(
                lambda *a, c=causal: fused.attention(*a, mask=mask, causal=c), inputs, eps=1e-2, atol=5e-3, rtol=5e-3
            )


@given(case=cases(lengths=st.integers(1, 200)), isa=st.sampled_from(SETS), data=st.data(), single=st.booleans())
@settings(max_examples=20)
def test_same_bits_for_every_number_of_threads(case, isa, data, single):
    C.choose_instruction_set(isa)
    if single:
        q, k, v, _, scale, causal, grad = case
        D, Dv = 32 * (1 + q.shape[3] // 64), 32 * (1 + v.shape[3] // 64)
        q, k = (F.pad(x, (0, D))[..., :D] for x in (q[:, :, -1:], k.repeat(1, 1, 5, 1)))
        v, grad = (F.pad(x, (0, Dv))[..., :Dv] for x in (v.repeat(1, 1, 5, 1), grad[:, :, -1:]))
        case = (q, k, v, None, scale, causal, grad)
    chosen = data.draw(options(case))
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(with_grads(run_fused, *case, case[0].dtype, **chosen))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---------------------------------------------------------------------------------------------- autograd and friends


@pytest.mark.parametrize("needed", [p for p in itertools.product([False, True], repeat=3) if any(p)])
def test_only_the_gradients_that_are_asked_for(needed):
    q, k, v, _, scale, _, grad = simple(6, 7)
    everything = with_grads(run_fused, q, k, v, None, scale, True, grad, torch.float32)[1:]
    inputs = [x.clone().requires_grad_(n) for x, n in zip((q, k, v), needed, strict=True)]
    fused.attention(*inputs, scale=scale, causal=True).backward(grad)
    for x, n, wanted in zip(inputs, needed, everything, strict=True):
        assert torch.equal(x.grad, wanted) if n else x.grad is None


def test_no_result_is_an_input_and_inputs_stay():
    q, k, v, _, scale, _, grad = simple(1, 1, D=8, Dv=8)
    before = [x.clone() for x in (q, k, v)]
    out, lse = ops.attention(q, k, v, None, scale, False)
    results = [out, lse, *ops.attention_backward(grad, q, k, v, out, lse, None, scale, False)]
    storages = {x.untyped_storage().data_ptr() for x in (q, k, v, grad, *results)}
    assert len(storages) == 4 + len(results)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_lse_has_no_gradient():
    q, k, v, *_ = simple(3, 3)
    assert not ops.attention(q.requires_grad_(), k, v, None, 1.0, False)[1].requires_grad


@pytest.mark.parametrize("raw", [False, True])
def test_second_derivative_is_an_error(raw):
    q, k, v, _, scale, _, _ = simple(3, 3)
    q.requires_grad_()
    out = ops.attention(q, k, v, None, scale, False)[0] if raw else fused.attention(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.pow(2).sum().backward()


def test_mask_that_needs_a_gradient_gets_it():
    q, k, v, _, scale, _, _ = simple(3, 5)
    mask = torch.randn(4, 3, 5, requires_grad=True)
    assert "mask needs a gradient" in fused.why_not(q, k, v, mask=mask)
    fused.attention(q, k, v, mask=mask).pow(2).sum().backward()
    wanted = mask.detach().double().requires_grad_()
    naive(q.double(), k.double(), v.double(), wanted, scale, False).pow(2).sum().backward()
    torch.testing.assert_close(mask.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert fused.why_not(q, k, v, mask=mask) is None


def test_function_transforms_run_in_plain_pytorch():
    """grad, jacrev, hessian, jvp, vmap and vmap of grad give the numbers of the definition, and none refuses."""
    q, k, v, _, scale, _, _ = simple(3, 5, Hkv=4)
    mask, seen = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool(), []

    def ours(q):
        seen.append(fused.why_not(q, k, v, mask=mask))
        return fused.attention(q, k, v, mask=mask, causal=True)

    def exact(q):
        return naive(q, k, v, mask, scale, True)

    def softmax(q):
        return fused.softmax(q, scale=0.5)

    func, qs, tangent = torch.func, torch.stack([q, 2 * q]), torch.randn_like(q)
    for f, wanted in ((ours, exact), (softmax, lambda q: torch.softmax(0.5 * q, -1))):
        for transform in (
            lambda f: func.grad(lambda q: f(q).pow(2).sum())(q),
            lambda f: func.vjp(f, q)[1](f(q))[0],
            lambda f: func.jacrev(f)(q),
            lambda f: func.jacfwd(f)(q),
            lambda f: func.hessian(lambda x: f(torch.cat([x, q[:, :, :, 2:]], -1)).pow(2).sum())(q[:, :, :, :2]),
            lambda f: func.jvp(f, (q,), (tangent,)),
            lambda f: torch.vmap(f)(qs),
            lambda f: torch.vmap(func.grad(lambda q: f(q).pow(2).sum()))(qs),
        ):
            torch.testing.assert_close(transform(f), transform(wanted), rtol=1e-4, atol=1e-5)
    assert any("inside a transform of torch.func" in (line or "") for line in seen)
    assert fused.why_not(q, k, v, mask=mask) is None  # outside again


def test_autocast():
    q, k, v, _, scale, _, _ = simple(6, 6)
    mask = torch.randn(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16  # and so do we
        for mixed in ((q, k, v), (q.bfloat16(), k, v), (q, k.bfloat16(), v.bfloat16()), (q, k.half(), v)):
            mixed = [x.requires_grad_() for x in mixed]
            assert fused.why_not(*mixed, mask=mask) is None
            out = fused.attention(*mixed, mask=mask)
            assert out.dtype == torch.bfloat16
            for x, g in zip(mixed, torch.autograd.grad(out.float().sum(), mixed), strict=True):
                assert g.dtype == x.dtype
        assert fused.attention(q.double(), k.double(), v.double()).shape == (2, 4, 6, 24)
        assert fused.softmax(q).dtype == torch.float32  # as torch.softmax under the CPU's autocast
    with torch.autocast("cpu", torch.float16):
        assert "float16" in fused.why_not(q, k, v)
        assert fused.attention(q, k, v).isfinite().all()


SAMPLES = {
    "plain": lambda: simple(5, 7)[:3] + (None, 0.25, False),
    "causal, bool mask": lambda: simple(5, 7)[:3] + (torch.rand(5, 7) < 0.7, 0.25, True),
    "additive, strided": lambda: (
        torch.randn(2, 5, 4, 8).transpose(1, 2),
        torch.randn(2, 2, 8, 7).mT,
        torch.randn(2, 1, 7, 3).expand(2, 2, 7, 3),
        torch.randn(2, 1, 1, 7),
        0.25,
        False,
    ),
    "bfloat16": lambda: simple(1, 3, dtype=torch.bfloat16)[:3] + (None, 0.25, True),
    "no keys": lambda: simple(2, 0)[:3] + (None, 0.25, False),
    "every option": lambda: (
        torch.randn(2, 5, 4, 32).transpose(1, 2),
        torch.randn(2, 2, 5, 32),
        torch.randn(2, 5, 2, 3).transpose(1, 2),
        None,
        0.25,
        True,
        torch.tensor([0, 3, 7, 10], dtype=torch.int32),
        3,
        torch.rand(4),
        2.0,
        torch.rand(5, 16),
        torch.rand(2, 5, 16),
    ),
    "a single query": lambda: (
        torch.randn(1, 4, 1, 32),
        torch.randn(1, 2, 40, 32),
        torch.randn(1, 2, 40, 32),
        None,
        0.25,
        True,
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_compile_rules(sample):
    q, k, v, *rest = SAMPLES[sample]()
    torch.library.opcheck(ops.attention.default, (q, k, v, *rest))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.attention.default, (*leaves, *rest))
    out, lse = ops.attention(q, k, v, *rest)
    backward = (torch.randn_like(out), q, k, v, out, lse, *rest)
    torch.library.opcheck(ops.attention_backward.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward_with_dynamic_shapes(backend):
    torch._dynamo.reset()

    def f(q, k, v, mask):
        return fused.attention(2 * q, k, v, mask=mask, causal=True).relu()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for Tq, Tk in ((3, 5), (6, 9), (4, 11)):
        q, k, v, _, _, _, grad = simple(Tq, Tk)
        mask = torch.rand(2, 1, 1, Tk) < 0.8
        results = []
        for g in (f, compiled):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            out = g(*inputs, mask)
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
        torch.testing.assert_close(results[1], results[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, mask), f(q, k, v, mask))


def test_compile_with_documents_window_slopes_and_softcap():
    torch._dynamo.reset()
    cu, slopes = torch.tensor([0, 3, 7, 10]), torch.rand(4)

    def f(q, k, v):  # laid out (B, T, H, D), as a model has them after its projection
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = fused.attention(q, k, v, causal=True, cu_seqlens=cu, window=2, slopes=slopes, softcap=3.0)
        return out.transpose(1, 2)

    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    assert f(q, k, v).is_contiguous()
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="inductor")):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = g(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(results[1], results[0])


def test_export_keeps_the_operator():
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return fused.attention(q, k, v, causal=True)

    q, k, v, *_ = simple(5, 7)
    Tq, Tk = torch.export.Dim("Tq", min=2, max=99), torch.export.Dim("Tk", min=2, max=99)
    for strict in (False, True):
        program = torch.export.export(Block(), (q, k, v), dynamic_shapes=({2: Tq}, {2: Tk}, {2: Tk}), strict=strict)
        assert any(n.target == ops.attention.default for n in program.graph.nodes)
        q2, k2, v2, *_ = simple(11, 13)
        torch.testing.assert_close(program.module()(q2, k2, v2), fused.attention(q2, k2, v2, causal=True))


def test_state_under_reload_and_deep_copies():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = importlib.reload(fused)  # registering twice would abort the process
    assert again.available()
    check(simple(3, 4))


# ---------------------------------------------------------------------------------------------- which path, and why


def test_why_not_says_why_in_one_line():
    q, k, v, *_ = simple(3, 5)
    lines = {
        "float64": fused.why_not(q.double(), k.double(), v.double()),
        "float16": fused.why_not(q.half()),
        "k has dtype torch.bfloat16": fused.why_not(q, k.bfloat16(), v),
        "head size": None,
        "the last up to 256": fused.why_not(torch.zeros(1, 1, 1, 257)),
        "v has shape (2, 2, 5, 300)": fused.why_not(q, k, torch.zeros(2, 2, 5, 300)),
        "q has shape (3, 16)": fused.why_not(q[0, 0]),
        "meta": fused.why_not(q.to("meta")),
        "dropout=0.1": fused.why_not(q, k, v, dropout=0.1),
        "mask has dtype torch.float64": fused.why_not(q, k, v, mask=torch.zeros(3, 5).double()),
        "mask has dtype torch.bfloat16": fused.why_not(q, k, v, mask=torch.zeros(3, 5).bfloat16()),
    }
    for part, line in lines.items():
        if line is not None:
            assert part in line and "\n" not in line
    assert fused.why_not() is None and fused.why_not(q, k, v, mask=torch.zeros(3, 5)) is None


@given(case=cases(), isa=st.sampled_from(SETS))
@settings(max_examples=10)
def test_where_the_operator_refuses_plain_pytorch_answers(case, isa):
    q, k, v, mask, scale, causal, _ = case
    got = fused.attention(q.double(), k.double(), v.double(), mask=mask, scale=scale, causal=causal)
    wanted = naive(q.double(), k.double(), v.double(), mask, scale, causal)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # the scores pass through the mask's dtype


def test_instruction_sets():
    for name in SETS:
        C.choose_instruction_set(name)
        assert C.instruction_set() == name
    with pytest.raises(ValueError, match='name="avx3" is not an instruction set'):
        C.choose_instruction_set("avx3")
    assert C.instruction_set() == SETS[-1]
    C.choose_instruction_set("")
    assert C.instruction_set() == SETS[0]
    assert "generic" in SETS and C.compiler and C.torch_needed == "2.10.0"


# ---------------------------------------------------------------------------------------------- malformed calls


def bad(**changes):
    q, k, v, *_ = simple(3, 5)
    arguments = dict(q=q, k=k, v=v, mask=None, scale=0.25, causal=False)
    arguments.update(changes)
    return arguments


def one(*shape):
    return torch.zeros(1).expand(shape)  # any shape, in four bytes


def shrunk(*shape):
    x = torch.randn(shape)
    x.untyped_storage().resize_(4)
    return x


MALFORMED = {
    "q has shape (3, 16)": bad(q=torch.randn(3, 16)),
    "q has shape (2, 0, 3, 16)": bad(q=torch.randn(2, 0, 3, 16)),
    "wanted D of 1 to 256": bad(q=torch.randn(2, 4, 3, 257), k=torch.randn(2, 2, 5, 257)),
    "wanted Dv of 1 to 256": bad(v=torch.randn(2, 2, 5, 0)),
    "k has shape (2, 2, 5, 17)": bad(k=torch.randn(2, 2, 5, 17)),
    "k has shape (1, 2, 5, 16)": bad(k=torch.randn(1, 2, 5, 16)),
    "an Hkv that divides H = 4": bad(k=torch.randn(2, 3, 5, 16), v=torch.randn(2, 3, 5, 16)),
    "k has shape (2, 0, 5, 16)": bad(k=torch.randn(2, 0, 5, 16), v=torch.randn(2, 0, 5, 16)),
    "v has shape (2, 2, 6, 24)": bad(v=torch.randn(2, 2, 6, 24)),
    "v has shape (2, 1, 5, 24)": bad(v=torch.randn(2, 1, 5, 24)),
    "k has dtype bfloat16; wanted float32": bad(k=torch.randn(2, 2, 5, 16).bfloat16()),
    "q has dtype float64": bad(q=torch.randn(2, 4, 3, 16).double()),
    "q has dtype int64": bad(q=torch.ones(2, 4, 3, 16).long()),
    "q has dtype ScalarType": bad(q=torch.randn(2, 4, 3, 16).cfloat().conj()),
    "mask has dtype int64": bad(mask=torch.ones(3, 5).long()),
    "mask has dtype bfloat16": bad(mask=torch.ones(3, 5).bfloat16()),
    "mask has shape (3, 4)": bad(mask=torch.ones(3, 4).bool()),
    "mask has shape (5, 5)": bad(mask=torch.ones(5, 5)),
    "mask has shape (3, 4, 3, 5)": bad(mask=torch.ones(3, 4, 3, 5)),
    "mask has shape (1, 2, 4, 3, 5)": bad(mask=torch.ones(1, 2, 4, 3, 5)),
    "wanted at most 2147483647 in a dimension": bad(k=one(2, 2, 2**40, 16)),
    "cos and sin; wanted both or neither": bad(cos=torch.ones(5, 8)),
    "cos and sin with 6 queries and 5 keys": bad(
        q=torch.randn(2, 4, 6, 32), k=torch.randn(2, 2, 5, 32), cos=torch.ones(5, 16), sin=torch.ones(5, 16)
    ),
    "wanted a D that is a multiple of 32": bad(cos=torch.ones(5, 8), sin=torch.ones(5, 8)),
    "sin has shape (2, 1, 4, 16); wanted (2, 1, 5, 16)": bad(
        q=torch.randn(2, 4, 3, 32), k=torch.randn(2, 2, 5, 32), cos=torch.ones(5, 16), sin=torch.ones(4, 16)
    ),
    "cos has shape (3, 5, 16); wanted (5, 16) or (2, 5, 16)": bad(
        q=torch.randn(2, 4, 3, 32), k=torch.randn(2, 2, 5, 32), cos=torch.ones(3, 5, 16), sin=torch.ones(5, 16)
    ),
    "window is -1; wanted 0": bad(window=-1),
    "softcap is -1; wanted 0": bad(softcap=-1.0),
    "softcap is inf": bad(softcap=math.inf),
    "softcap is nan": bad(softcap=math.nan),
    "slopes has dtype float64": bad(slopes=torch.ones(4).double()),
    "slopes has shape (3); wanted (4) or (2, 4)": bad(slopes=torch.ones(3)),
    "slopes has shape (4, 1)": bad(slopes=torch.ones(4, 1)),
    "slopes has shape (1, 4)": bad(slopes=torch.ones(1, 4)),
    "cu_seqlens with 3 queries and 5 keys": bad(cu_seqlens=torch.tensor([0, 6]).int()),
    "cu_seqlens has dtype int64": bad(q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([0, 10])),
    "cu_seqlens has shape (1)": bad(q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([0]).int()),
    "cu_seqlens has shape (1, 2)": bad(q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([[0, 10]]).int()),
    "cu_seqlens goes from 0 to 9; wanted 0 to 10": bad(
        q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([0, 9]).int()
    ),
    "cu_seqlens goes from 1 to 10": bad(q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([1, 10]).int()),
    "cu_seqlens[2] is 3": bad(q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([0, 4, 3, 10]).int()),
    "cu_seqlens[0] is -1": bad(q=torch.randn(2, 4, 5, 16), cu_seqlens=torch.tensor([-1, 10]).int()),
    "storage holds only 4 bytes": bad(v=shrunk(2, 2, 5, 24)),
    "is too large": bad(q=one(2**23, 2**30, 1, 1), k=one(2**23, 1, 0, 1), v=one(2**23, 1, 0, 256)),
    "at most 9007199254740992 scores": bad(q=one(2, 4, 2**30, 1), k=one(2, 2, 2**30, 1), v=one(2, 2, 2**30, 1)),
    "no memory for a result": bad(q=one(2, 4, 2**30, 1), k=one(2, 2, 5, 1), v=one(2, 2, 5, 256)),
}


def test_one_argument_alone_on_meta_is_an_error_not_uninitialised_memory():
    q, k, v, _, scale, _, grad = simple(5, 5, D=32)
    angles = torch.rand(5, 16)
    options = dict(mask=torch.zeros(5, 5), cu_seqlens=torch.tensor([0, 10]).int(), slopes=torch.rand(4))
    arguments = dict(q=q, k=k, v=v, scale=scale, causal=False, **options, cos=angles.cos(), sin=angles.sin())
    out, lse = ops.attention(**arguments)
    backward = arguments | dict(grad=grad, out=out, lse=lse)
    for op, passed in ((ops.attention, arguments), (ops.attention_backward, backward)):
        for name in (n for n, x in passed.items() if isinstance(x, torch.Tensor)):
            with pytest.raises(RuntimeError, match="wanted all on one device"):
                op(**passed | {name: passed[name].to("meta")})


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_call_says_what_was_wrong(message):
    with pytest.raises(RuntimeError) as error:
        ops.attention(**MALFORMED[message])
    assert message in str(error.value) and "minimal::attention" in str(error.value) and "\n" not in str(error.value)


MALFORMED_BACKWARD = [
    ("grad", lambda x: x[:, :, :, 1:]),
    ("grad", lambda x: x.double()),
    ("out", lambda x: x[:1]),
    ("out", lambda x: x.bfloat16()),
    ("lse", lambda x: x[..., None]),
    ("lse", lambda x: x[:, :, 1:]),
    ("lse", lambda x: x.bfloat16()),
    ("k", lambda x: x[:, :, 1:]),
]


@pytest.mark.parametrize("change", MALFORMED_BACKWARD)
def test_malformed_backward_says_what_was_wrong(change):
    q, k, v, _, scale, _, grad = simple(3, 5)
    out, lse = ops.attention(q, k, v, None, scale, False)
    arguments = dict(grad=grad, q=q, k=k, v=v, out=out, lse=lse, mask=None, scale=scale, causal=False)
    name, f = change
    arguments[name] = f(arguments[name])
    with pytest.raises(RuntimeError, match="minimal::attention_backward: " + ("v" if name == "k" else name)):
        ops.attention_backward(**arguments)


MUTATIONS = {
    "one dimension fewer": lambda x: x[0] if x.dim() and x.shape[0] else x,
    "one more": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "a scalar": lambda x: x.sum(),
    "longer": lambda x: torch.cat([x, x], -1) if x.dim() else x,
    "shorter": lambda x: x[..., :-1] if x.dim() else x,
    "no batch": lambda x: x[:0] if x.dim() else x,
    "fewer heads": lambda x: x[:, 1:] if x.dim() > 1 else x,
    "swapped": lambda x: x.mT if x.dim() > 1 else x,
    "overlapping": lambda x: x.as_strided(x.shape, [1] * x.dim()) if x.numel() > 20 else x,
    "expanded": lambda x: x[..., :1].expand(x.shape) if x.dim() and x.shape[-1] else x,
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x > 0,
    "odd bytes as bool": lambda x: (x > 0).to(torch.uint8).mul(173).view(torch.bool),
    "complex, conjugated": lambda x: x.to(torch.complex64).conj(),
    "negative view": lambda x: torch._neg_view(x) if x.is_floating_point() else x,
    "imaginary part": lambda x: x.to(torch.complex64).conj().imag,
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 and x.shape[0] else x,
    "needs a gradient": lambda x: x.detach().requires_grad_() if x.is_floating_point() else x,
    "freed": lambda x: shrunk(*x.shape),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "nan": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x,
    "none": lambda x: None,
    "a number": lambda x: 3,
    "a list": lambda x: [x],
}
NAMES = ("q", "k", "v", "mask", "grad", "out", "lse")
ERRORS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)  # from torch's own parser, mostly


@given(
    mutations=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(sorted(MUTATIONS))), min_size=1, max_size=3),
    lengths=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    scale=st.sampled_from([0.25, 0.0, math.nan, math.inf, -1e38, 1e300]),
    causal=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=150)
@example([("k", "freed")], (3, 3), 0.25, True, True)
@example([("mask", "odd bytes as bool")], (17, 19), 0.25, True, True)
def test_nothing_malformed_crashes(mutations, lengths, scale, causal, masked):
    """Not crashing is the assertion: a fault would end the run here. tests/sanitize.sh finds the quiet ones, too."""
    q, k, v, _, _, _, grad = simple(*lengths)
    mask = torch.randn(lengths) if masked else None
    out, lse = ops.attention(q, k, v, mask, 0.25, causal)
    arguments = dict(q=q, k=k, v=v, mask=mask, scale=scale, causal=causal, grad=grad, out=out, lse=lse)
    # "freed" comes last: torch's own functions do not look at the size of the storage, and read on.
    for name, mutation in sorted(mutations, key=lambda m: m[1] == "freed"):
        if isinstance(arguments[name], torch.Tensor):
            try:
                arguments[name] = MUTATIONS[mutation](arguments[name])
            except ERRORS:
                pass  # torch cannot make such a tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, names in (
            (ops.attention, "q k v mask scale causal"),
            (ops.attention_backward, "grad q k v out lse mask scale causal"),
        ):
            try:
                results = op(*(arguments[n] for n in names.split()))
            except ERRORS as error:
                assert str(error)
            else:
                assert all(isinstance(r, torch.Tensor) for r in results)


@given(
    cu_seqlens=st.none() | st.lists(st.integers(-3, 14), max_size=5),
    slopes=st.none() | st.lists(st.integers(0, 5), max_size=2),
    window=st.integers(-2, 2**62) | st.integers(0, 9),
    softcap=st.floats(),
)
def test_no_option_crashes(cu_seqlens, slopes, window, softcap):
    q, k, v, _, _, _, grad = simple(6, 6)
    options = (
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        window,
        None if slopes is None else torch.ones(slopes),
        softcap,
    )
    out, lse = ops.attention(q, k, v, None, 0.25, True)
    for op, arguments in ((ops.attention, (q, k, v)), (ops.attention_backward, (grad, q, k, v, out, lse))):
        try:
            op(*arguments, None, 0.25, False, *options)
        except ERRORS as error:
            assert str(error)


def test_empty_and_degenerate_sizes():
    for Tq, Tk, B in itertools.product((0, 1, 3), (0, 1, 3), (0, 2)):
        for causal in (False, True):
            case = simple(Tq, Tk, B=B, causal=causal)
            check(case)
            if Tk == 0 and B:
                assert with_grads(run_fused, *case, torch.float32)[0].eq(0).all()


# ---------------------------------------------------------------------------------------------- memory

MEMORY = r"""
    import re, sys, torch
    from minimal import fused
    torch.set_num_threads(2)
    T, H, D = 4096, int(sys.argv[2]), 64
    def attend(q, k, v, mask):
        if sys.argv[1] == "fused":
            return fused.attention(q, k, v, mask=mask, causal=True)
        return fused._plain_attention(q, k, v, True, mask, D ** -0.5)
    attend(*(torch.randn(1, H, 8, D, requires_grad=True) for _ in range(3)), None).sum().backward()  # loads libraries
    q, k, v = (torch.randn(1, H, T, D, requires_grad=True) for _ in range(3))
    mask, grad = torch.ones(1, 1, 1, T).bool(), torch.randn(1, H, T, D)
    def status(field):  # not getrusage: its maximum begins with that of the parent process
        return int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
    resident = status("VmRSS")
    attend(q, k, v, mask).backward(grad)
    print((status("VmHWM") - resident) / (4 * q.nbytes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_of_a_process_at_4096_tokens():
    """Peak extra memory of forward and backward, in units of q + k + v + out (32 MB with 8 heads). out and the three
    gradients are one; a single 4096 x 4096 buffer would be two more, and there are eight heads and two threads."""

    def units(path, heads):
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), path, str(heads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert units("fused", 8) <= 3
    assert units("plain", 1) > 10  # the measure sees what it is meant to see
