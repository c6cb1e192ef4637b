# SPDX-License-Identifier: MIT
"""The fused softmax operator against torch.softmax in float64, on every instruction set that this machine has."""

import itertools
import math
import os
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimal import fused

if not fused.available():  # as in test_fused.py
    if os.environ.get("MINIMAL_REQUIRE_FUSED") == "1":
        raise RuntimeError(f"MINIMAL_REQUIRE_FUSED=1, but the fused operators are {fused.why_not()}")
    pytest.skip(f"the fused operators are {fused.why_not()}", allow_module_level=True)

C = sys.modules["minimal._C"]
SETS = C.instruction_sets().split(",")
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
ops = torch.ops.minimal


@pytest.fixture(autouse=True)
def _two_threads_and_best_set():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    C.choose_instruction_set("")


def definition(x, scale, causal, mask, *, offset=None, empty="zeros", dim=-1):
    """softmax(scale x + mask). `offset`, `empty` and `dim` exist for the buggy variants that the checks must reject."""
    s = scale * x
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    if causal:
        Tq, Tk = s.shape[-2:]
        hidden = torch.arange(Tk) > torch.arange(Tq)[:, None] + (Tk - Tq if offset is None else offset)
        s = s.masked_fill(hidden, -math.inf)
    if empty == "nan":
        return torch.softmax(s, dim)
    nothing = (s == -math.inf).all(dim, keepdim=True)
    y = torch.softmax(s.masked_fill(nothing, 0.0), dim)
    return y.masked_fill(nothing, 0.0) if empty == "zeros" else y


def run_fused(x, scale, causal, mask):
    return fused.softmax(x, scale=scale, causal=causal, mask=mask)


def both(f, x, scale, causal, mask, grad, dtype):
    x = x.detach().to(dtype).requires_grad_()
    y = f(x, scale, causal, mask)
    return y.detach(), *torch.autograd.grad(y, x, grad.to(dtype))


def check(case, f=run_fused):
    """At most twice the error of torch.softmax at the same dtype, both against float64, and a few ulp."""
    x, scale, causal, mask, grad = case
    got = both(f, *case, x.dtype)
    wanted = both(definition, *case, torch.float64)
    theirs = both(definition, *case, x.dtype)
    for name, g, w, t in zip(("y", "dx"), got, wanted, theirs, strict=True):
        assert g.shape == x.shape and g.dtype == x.dtype, (name, g.shape, g.dtype)
        if g.numel():
            error, theirs_is = (g - w).abs().max().item(), (t - w).abs().max().item()
            # The backward pass of both reads y, rounded to x's dtype, for sum(dy * y): cancellation leaves that error.
            dot = abs(scale) * (grad.double() * wanted[0]).abs().sum(-1).max().item() if name == "dx" else 0.0
            terms = abs(scale) * grad.abs().max().item() if name == "dx" else 1.0
            ulps = EPS[x.dtype] * (2 * w.abs().max().item() + dot) + 4 * EPS[torch.float32] * terms
            assert error <= 2 * theirs_is + ulps, f"{name}: error {error:.2e}, torch's {theirs_is:.2e}, ulps {ulps:.1e}"


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = draw(st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 64, 100, 257, 1000, 4097]), st.integers(0, 300)))
    shape = (*draw(st.lists(st.integers(0, 5), max_size=5)), width)

    def laid_out():
        layout = draw(st.sampled_from(["contiguous", "swapped", "every second", "expanded"]))
        if layout == "swapped" and len(shape) > 1:
            return torch.randn(*shape[:-2], width, shape[-2], generator=gen).to(dtype).mT
        if layout == "every second":
            return torch.randn(*shape[:-1], 2 * width + 1, generator=gen).to(dtype)[..., 1::2]
        if layout == "expanded" and len(shape) > 1:
            return torch.randn(1, *shape[1:], generator=gen).to(dtype).expand(shape)
        return torch.randn(shape, generator=gen).to(dtype)

    x, grad = laid_out(), laid_out()
    kind = draw(st.sampled_from(["none", "bool", "additive", "additive float32"]))
    mask = None
    if kind != "none":
        sizes = [n if draw(st.booleans()) else 1 for n in shape][draw(st.integers(0, len(shape))) :]
        hidden = torch.rand(sizes, generator=gen) < draw(st.sampled_from([0.05, 0.5, 0.97]))
        mask = ~hidden
        if kind != "bool":
            mask = (torch.randint(-12, 8, sizes, generator=gen) / 4).masked_fill(hidden, -math.inf)
            mask = mask.to(dtype) if kind == "additive" else mask
    causal = len(shape) > 1 and draw(st.booleans())
    return x, draw(st.sampled_from([1.0, 0.125, 7.0, -1.5])), causal, mask, grad


@pytest.mark.parametrize("isa", SETS)
@given(case=cases())
@settings(max_examples=60)
def test_softmax_against_float64(isa, case):
    C.choose_instruction_set(isa)
    check(case)


@pytest.mark.parametrize("isa", SETS)
def test_long_rows(isa):
    C.choose_instruction_set(isa)
    for shape in ((7, 50_000), (2, 65_537), (300, 1024)):
        check((torch.randn(shape) * 5, 1.0, False, None, torch.randn(shape)))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype, shape", [(torch.float32, (90, 50_001)), (torch.bfloat16, (8800, 999))])
@pytest.mark.parametrize("causal", [False, True])
def test_results_too_large_for_the_caches(isa, dtype, shape, causal):  # they are written past them; rows begin anywhere
    C.choose_instruction_set(isa)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y, dx = both(run_fused, x, 1.0, causal, None, grad, dtype)
    for row in (0, 1, 7, shape[0] // 2, shape[0] - 1):
        seen = min(shape[1], max(0, row + 1 + shape[1] - shape[0])) if causal else shape[1]
        small = both(run_fused, x[row, :seen].clone(), 1.0, False, None, grad[row, :seen].clone(), dtype)
        assert torch.equal(y[row, :seen], small[0]) and y[row, seen:].eq(0).all()
        torch.testing.assert_close(dx[row, :seen], small[1])
        assert dx[row, seen:].eq(0).all()
    torch.testing.assert_close(
        y.float().sum(-1), torch.ones(shape[0]) if not causal else y.gt(0).any(-1).float(), atol=0.02, rtol=0
    )


def test_traps_axis_alignment_and_empty_rows_and_that_the_checks_see_them():
    plain = (torch.randn(5, 5), 1.0, False, None, torch.randn(5, 5))
    wide = (torch.randn(3, 4, 9), 1.0, True, None, torch.randn(3, 4, 9))
    tall = (torch.randn(3, 9, 4), 1.0, True, None, torch.randn(3, 9, 4))
    masked = (torch.randn(4, 6), 1.0, False, torch.tensor([1, 0, 1, 1]).bool()[:, None], torch.randn(4, 6))
    for case in (plain, wide, tall, masked):
        check(case)
    with pytest.raises(AssertionError):
        check(plain, lambda *a: definition(*a, dim=-2))
    with pytest.raises(AssertionError):
        check(wide, lambda *a: definition(*a, offset=0))
    for case, variant in itertools.product((tall, masked), ("nan", "uniform")):
        with pytest.raises(AssertionError):
            check(case, lambda *a, variant=variant: definition(*a, empty=variant))
    y, dx = both(run_fused, *tall, torch.float32)
    assert y[:, :5].eq(0).all() and dx[:, :5].eq(0).all() and y[:, 5:].ne(0).any()


@pytest.mark.parametrize("isa", SETS)
def test_huge_and_bad_logits(isa):
    C.choose_instruction_set(isa)
    for width in (3, 16, 37):
        x = torch.randn(5, width) * 1e30
        torch.testing.assert_close(fused.softmax(x), torch.softmax(x, -1))
        x[1, 2] = -math.inf  # no weight, and no harm
        x[2, 2], x[3, 0] = math.inf, math.nan
        assert fused.softmax(x)[[0, 1, 4]].isfinite().all() and fused.softmax(x)[1, 2] == 0
        assert fused.softmax(x)[2:4].isnan().any(-1).all()
        assert fused.softmax(x)[3].isnan().all()


@pytest.mark.parametrize("isa", SETS)
def test_every_nan_survives_rounding_to_bfloat16(isa):
    """A NaN of ones to its end carries into the sign if it is rounded like a number."""
    C.choose_instruction_set(isa)
    ones = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for width in (1, 37, 64):
        x, mask = torch.randn(3, width).bfloat16(), torch.zeros(3, width)
        mask[1, width // 2] = ones
        y = fused.softmax(x, mask=mask)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
        x.view(torch.int16)[1, width // 2] = 0x7FFF
        leaf = x.requires_grad_()
        y = fused.softmax(leaf)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        for t in (y, dx):
            assert t[1].isnan().all() and t[[0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", SETS)
def test_rows_sum_to_one_and_order_is_kept(isa):
    C.choose_instruction_set(isa)
    x = torch.randn(40, 513) * 3
    y = fused.softmax(x)
    torch.testing.assert_close(y.sum(-1), torch.ones(40), rtol=1e-5, atol=0)
    permutation = torch.randperm(513)
    torch.testing.assert_close(fused.softmax(x[:, permutation]), y[:, permutation], rtol=1e-5, atol=1e-9)
    assert torch.equal(y.argmax(-1), x.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [61, 401, 5000])
def test_same_bits_for_every_number_of_threads(dtype, masked, width):
    x, grad = torch.randn(3, 70, width).to(dtype), torch.randn(3, 70, width).to(dtype)
    mask = torch.rand(width) < 0.8 if masked else None
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(both(run_fused, x, 0.5, True, mask, grad, dtype))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


def test_result_is_not_the_input():
    x = torch.randn(1, 1)
    assert fused.softmax(x).data_ptr() != x.data_ptr()
    assert x.item() != 1.0


def test_gradcheck():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradcheck says that float32 is coarse
        x = torch.randn(2, 3, 4, requires_grad=True)
        f = lambda x: fused.softmax(x, scale=0.7, causal=True)  # noqa: E731
        assert torch.autograd.gradcheck(f, x, eps=1e-2, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("raw", [False, True])
def test_second_derivative_is_an_error(raw):
    x = torch.randn(3, 4, requires_grad=True)
    y = ops.softmax(x, None, 1.0, False) if raw else fused.softmax(x)
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_what_the_operator_does_not_take_runs_in_plain_pytorch():
    for x in (torch.randn(3, 4).double(), torch.randn(3, 4).half(), torch.tensor(2.0)):
        torch.testing.assert_close(fused.softmax(x), torch.softmax(x, -1))
    mask = torch.randn(3, 4, requires_grad=True)
    fused.softmax(torch.randn(3, 4), mask=mask).pow(2).sum().backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="mask has dtype torch.int64"):
        fused.softmax(torch.randn(3, 4), mask=torch.ones(3, 4).long())
    x, tangent = torch.randn(3, 4), torch.randn(3, 4)
    got = torch.func.jvp(fused.softmax, (x,), (tangent,))
    torch.testing.assert_close(got, torch.func.jvp(lambda x: torch.softmax(x, -1), (x,), (tangent,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_compile_rules(dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    for mask, causal in ((None, False), (torch.rand(4, 5) < 0.8, True), (torch.randn(5).to(dtype), False)):
        torch.library.opcheck(ops.softmax.default, (x, mask, 0.5, causal))
        torch.library.opcheck(ops.softmax.default, (x.mT.requires_grad_(), None, 0.5, causal))
    torch.library.opcheck(ops.softmax_backward.default, (torch.randn(3, 4, 5).to(dtype), torch.softmax(x, -1), 0.5))


def test_compile_and_export():
    torch._dynamo.reset()

    def f(x, mask):
        return fused.softmax(2 * x, causal=True, mask=mask).square()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 4), (5, 6, 7)):
        x, mask = torch.randn(shape), torch.rand(shape[-1]) < 0.8
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        f(a, mask).sum().backward()
        compiled(b, mask).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)

    class Block(torch.nn.Module):
        def forward(self, x):
            return fused.softmax(x, scale=2.0)

    program = torch.export.export(Block(), (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    x = torch.randn(7, 4)
    torch.testing.assert_close(program.module()(x), torch.softmax(2 * x, -1))
    assert any(n.target == ops.softmax.default for n in program.graph.nodes)


MALFORMED = {
    "x has shape (); wanted 1 to 4 dimensions": (torch.tensor(1.0), None, 1.0, False),
    "x has shape (3); wanted 2 to 4 dimensions": (torch.randn(3), None, 1.0, True),
    "x has shape (1, 1, 1, 1, 2)": (torch.randn(1, 1, 1, 1, 2), None, 1.0, False),
    "x has dtype float64": (torch.randn(3).double(), None, 1.0, False),
    "mask has shape (2); wanted a shape that broadcasts to": (torch.randn(3), torch.ones(2), 1.0, False),
    "mask has shape (1, 3)": (torch.randn(3), torch.ones(1, 3), 1.0, False),
    "mask has dtype int64": (torch.randn(3), torch.ones(3).long(), 1.0, False),
    "mask has dtype bfloat16": (torch.randn(3), torch.ones(3).bfloat16(), 1.0, False),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_call_says_what_was_wrong(message):
    with pytest.raises(RuntimeError) as error:
        ops.softmax(*MALFORMED[message])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_malformed_backward_says_what_was_wrong():
    y = torch.softmax(torch.randn(3, 4), -1)
    for grad in (y[:2], y[0], y[None], y.double(), y.bfloat16(), y.to_sparse(), y.to("meta")):
        with pytest.raises(RuntimeError):
            ops.softmax_backward(grad, y, 1.0)
    y.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="storage holds only 8 bytes"):
        ops.softmax_backward(torch.randn(3, 4), y, 1.0)
