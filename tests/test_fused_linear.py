# SPDX-License-Identifier: MIT
"""The operators for linear layers in few bits, and minimal/fused_linear.py around them.

Oracle: x W^T + b in float64, with W read from the codes by its definition. Bounds:
- weight-only: at most twice the error that F.linear makes in the same dtype with that W, both against float64;
- dynamic: what rounding x to q t does at most, |x_c - t q_c| <= t / 2 with t = max |x of the group| / 127, so that
  |error of y_o| <= sum_c |W_oc| max |x of c's group of 32| / 254, and a float32 sum's rounding beside it.
The operators are called on every instruction set that this machine has.
"""

import itertools
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from minimal import fused_linear, quant

if not fused_linear.available():  # CI sets MINIMAL_REQUIRE_FUSED=1, so that it cannot pass without having tested them
    if os.environ.get("MINIMAL_REQUIRE_FUSED") == "1":
        raise RuntimeError(f"MINIMAL_REQUIRE_FUSED=1, but the fused operators are {fused_linear.why_not()}")
    pytest.skip(f"the fused operators are {fused_linear.why_not()}", allow_module_level=True)

C_ = sys.modules["minimal._C"]
SETS = C_.instruction_sets().split(",")
ROOT = pathlib.Path(fused_linear.__file__).parent.parent
# of float32 the distance of two numbers, of bfloat16 what rounding does at most
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
ops = torch.ops.minimal
KINDS = list(fused_linear.HELD)
FEW_KINDS = [*KINDS, "float32"]  # of which the last has an operator for few rows, and nothing to unpack


@pytest.fixture(autouse=True)
def _two_threads_and_best_set():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    C_.choose_instruction_set("")


# ---------------------------------------------------------------------------------------------- the oracle


def drawn(kind, O, C, gen):
    """Parts with random codes, the extreme ones among them, and constants of both signs where that may be."""

    def randn(*shape):
        return torch.randn(shape, generator=gen)

    def integers(low, high, shape, dtype):
        return torch.randint(low, high, shape, generator=gen).to(dtype)

    groups, n = -(-C // 32), -(-O * C // 64)
    if kind == "int8":
        return {"codes": integers(-128, 128, (O, C), torch.int8), "scale": randn(O)}
    if kind == "int4":
        scale, least = randn(O, groups).half(), randn(O, groups).half() * 8
        return {"codes": integers(0, 256, (O, groups, 16), torch.uint8), "scale": scale, "least": least}
    if kind == "nf4":
        absmax, scale = integers(-127, 128, (n,), torch.int8), randn(-(-n // 256)).abs() / 100
        return {"codes": integers(0, 256, (32 * n,), torch.uint8), "absmax": absmax, "scale": scale, "mean": randn(1)}
    return {"weight": randn(O, C) if kind == "float32" else randn(O, C).bfloat16()}


def wide(kind, O, C, held, swapped=False):
    """W in float64 by the definition; `swapped` is a variant that must not pass."""
    held = {name: part.double() if part.is_floating_point() else part.long() for name, part in held.items()}
    if kind == "int8":
        return held["codes"] * held["scale"][:, None]
    if kind == "int4":
        low, high = held["codes"] % 16, held["codes"] // 16
        codes = torch.cat((high, low) if swapped else (low, high), 2)  # (O, C/32, 32)
        return (codes * held["scale"][..., None] + held["least"][..., None]).flatten(1)[:, :C]
    if kind == "nf4":
        a = held["absmax"] * held["scale"].repeat_interleave(256)[: len(held["absmax"])] + held["mean"]
        pairs = held["codes"] % 16, held["codes"] // 16
        codes = torch.stack(pairs if swapped else pairs[::-1], 1).view(-1, 64)
        return (quant.LEVELS.double()[codes] * a.clamp(min=0)[:, None]).flatten()[: O * C].view(O, C)
    return held["weight"]


def reach(x):
    """Of each element of x (N, C) the largest size in its group of 32 columns."""
    N, C = x.shape
    groups = F.pad(x.double().abs(), (0, -C % 32)).view(N, -1, 32)
    return groups.amax(2, keepdim=True).expand(groups.shape).flatten(1)[:, :C] if x.numel() else x.double()


def blur(kind, held):
    """How far float32 may be from a weight of `wide`, beside relative rounding: a of nf4 is a difference,
    whose product is rounded where the instruction set or the build has no fused multiply-add."""
    if kind != "nf4":
        return 0.0
    parts = [127 * held["scale"].abs().flatten(), held["mean"].abs()]
    return EPS[torch.float32] * sum(float(part.max()) for part in parts if len(part))


def check(y, x, W, bias, dynamic, blur=0.0):
    """y (N, O) against x W^T + bias. blur: how far each weight may be off."""
    assert y.shape == (x.shape[0], W.shape[0]) and y.dtype == x.dtype
    if y.numel() == 0:
        return
    b = torch.zeros(W.shape[0], dtype=torch.float64) if bias is None else bias.double()
    exact = F.linear(x.double(), W, b)
    theirs = F.linear(x, W.to(x.dtype), b.to(x.dtype)) if x.dtype == torch.float32 else exact.to(x.dtype)
    terms = x.double().abs() @ W.abs().mT + b.abs()  # what is added up, before it cancels: (N, O)
    allowed = 2 * (theirs.double() - exact).abs().max() + 4 * EPS[torch.float32] * terms
    allowed = allowed + EPS[x.dtype] * exact.abs() + blur * x.double().abs().sum(1, keepdim=True)
    if dynamic:
        allowed = allowed + reach(x) @ W.abs().mT / 254 * (1 + 1e-5)
    excess = ((y.double() - exact).abs() - allowed).max().item()
    assert excess <= 0, f"off by {(y.double() - exact).abs().max():.2e}, {excess:.1e} more than allowed"


SIZES = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 192]), st.integers(0, 200))
WIDTHS = st.one_of(SIZES, st.sampled_from([511, 512, 513, 544, 576, 640, 1023, 1024, 1056, 1536]))

ROWS = st.integers(0, 9)


@st.composite
def cases(draw, kinds=KINDS, rows=ROWS, multiple=False):
    kind, N, O, C = draw(st.sampled_from(kinds)), draw(rows), draw(SIZES), draw(WIDTHS)
    C = -(-C // 64) * 64 if multiple and kind == "nf4" else C
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    held, layout = drawn(kind, O, C, gen), draw(st.sampled_from(["contiguous", "every second", "swapped", "one row"]))
    if layout == "every second":
        x = torch.randn(N + 1, 2 * C + 1, generator=gen).to(dtype)[1:, 1::2]
    elif layout == "swapped":
        x = torch.randn(C, N, generator=gen).to(dtype).mT
    elif layout == "one row":
        x = torch.randn(1, C, generator=gen).to(dtype).expand(N, C)
    else:
        x = torch.randn(N, C, generator=gen).to(dtype)
    if draw(st.booleans()):  # groups of very different size
        x = x * (10.0 ** torch.randint(-3, 4, (1, C), generator=gen)).to(dtype)
    bias = (
        torch.randn(O, generator=gen).to(draw(st.sampled_from([torch.float32, dtype]))) if draw(st.booleans()) else None
    )
    return kind, x, (O, C), bias, held


def few(kind, x, bias, held, dynamic):
    """The operator itself."""
    if kind in ("int8", "int4"):
        return getattr(ops, f"linear_{kind}")(x, *held.values(), bias, dynamic)
    if kind == "nf4":
        return ops.linear_nf4(x, *held.values(), fused_linear.LEVELS, bias)
    return (ops.linear_f32 if kind == "float32" else ops.linear_bf16)(x, *held.values(), bias)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("isa", SETS)
@given(case=cases(kinds=["int8", "int4"], rows=st.integers(16, 70)))
def test_many_rows_in_integers(isa, case):  # with AVX-512, and AVX2 for int4, they have a kernel of their own, in tiles
    C_.choose_instruction_set(isa)
    kind, x, (O, C), bias, held = case
    check(few(kind, x, bias, held, True), x, wide(kind, O, C, held), bias, True, blur(kind, held))


@pytest.mark.parametrize("isa", SETS)
@given(case=cases(FEW_KINDS, multiple=True), dynamic=st.booleans())
def test_few_rows_against_float64(isa, case, dynamic):
    C_.choose_instruction_set(isa)
    kind, x, (O, C), bias, held = case
    if kind == "nf4" and C == 0:
        return
    check(few(kind, x, bias, held, dynamic), x, wide(kind, O, C, held), bias, dynamic, blur(kind, held))


@given(case=cases(rows=st.sampled_from([0, 1, 3, 16, 17, 40])), dynamic=st.booleans(), leading=st.booleans())
def test_linear_takes_any_number_of_rows(case, dynamic, leading):
    kind, x, (O, C), bias, held = case
    bias = None if bias is None else bias.to(x.dtype)
    given_x = x[None, :, None] if leading else x
    y = fused_linear.linear(given_x, kind, (O, C), bias, dynamic=dynamic, **held)
    assert y.shape == (*given_x.shape[:-1], O)
    y = y.view(len(x), O)
    integers = dynamic and kind in fused_linear._INTEGERS
    if (
        x.dtype == torch.bfloat16 and len(x) > fused_linear.FEW and not integers
    ):  # a product of PyTorch's, of W rounded to bfloat16
        W = wide(kind, O, C, held).bfloat16()
        exact = F.linear(x.double(), W.double(), None if bias is None else bias.double())
        terms = x.double().abs() @ W.double().abs().mT + (0 if bias is None else bias.double().abs())
        assert ((y.double() - exact).abs() <= 4 * EPS[torch.bfloat16] * terms + 1e-30).all()
    else:
        check(y, x, wide(kind, O, C, held), bias, dynamic, blur(kind, held))


@pytest.mark.parametrize("isa", SETS)
@given(case=cases(kinds=["int8", "int4", "nf4"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_unpack_against_float64(isa, case, dtype):
    C_.choose_instruction_set(isa)
    kind, _, (O, C), _, held = case
    W, exact = fused_linear.unpack(kind, (O, C), dtype, **held), wide(kind, O, C, held)
    assert W.shape == (O, C) and W.dtype == dtype
    # Two roundings of float32, of terms that may cancel (int4: scale code and least; nf4: absmax scale and mean)
    terms = {
        "int8": 0.0,
        "int4": 0.0 if kind != "int4" else held["least"].double().abs().max() if O * C else 0.0,
        "nf4": 4,
    }
    allowed = (EPS[dtype] + 2 * EPS[torch.float32]) * exact.abs() + EPS[torch.float32] * terms[kind]
    assert ((W.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_what_quant_makes_is_read(kind):
    """The formats of minimal/quant.py and these are the same."""
    if kind not in quant.KINDS:
        pytest.skip(f"minimal/quant.py has no {kind}")
    W = torch.randn(96, 576)
    held = quant.KINDS[kind][0](W)
    assert tuple(held) == fused_linear.HELD[kind]
    assert torch.allclose(fused_linear.unpack(kind, W.shape, **held), quant.KINDS[kind][1](W.shape, **held), 1e-6, 1e-7)
    assert torch.equal(fused_linear.LEVELS, quant.LEVELS)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_swapped_halves_would_be_seen(kind):
    x, held = torch.randn(2, 64), drawn(kind, 5, 64, torch.Generator().manual_seed(0))
    y = few(kind, x, None, held, True)
    check(y, x, wide(kind, 5, 64, held), None, True)
    with pytest.raises(AssertionError, match="more than allowed"):
        check(y, x, wide(kind, 5, 64, held, swapped=True), None, True)


def test_one_scale_for_a_row_of_x_would_be_seen():
    """The groups of x have a scale each: beside one large number, the others keep their 8 bits."""
    x = torch.randn(1, 64)
    x[0, 0] = 1e4
    held = drawn("int8", 8, 64, torch.Generator().manual_seed(0))
    held["codes"][:, :32] = 0
    W = wide("int8", 8, 64, held)
    check(few("int8", x, None, held, True), x, W, None, True)
    t = x.abs().max() / 127
    rounded = F.linear(((x / t).round() * t).double(), W).float()
    with pytest.raises(AssertionError, match="more than allowed"):
        check(rounded, x, W, None, True)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_codes_do_not_overflow(isa, kind):
    """All products of the largest size, in a long row: 16- and 32-bit sums must hold them."""
    C_.choose_instruction_set(isa)
    C = 100_000
    for code, sign in itertools.product((-128, 127) if kind == "int8" else (0, 255), (-1.0, 1.0)):
        for rows in (1, 16):
            x = torch.full((rows, C), sign)
            if kind == "int8":
                held = {"codes": torch.full((3, C), code, dtype=torch.int8), "scale": torch.ones(3)}
            else:
                codes = torch.full((3, C // 32, 16), code, dtype=torch.uint8)
                held = {"codes": codes, "scale": torch.ones(3, C // 32).half(), "least": torch.zeros(3, C // 32).half()}
            check(few(kind, x, None, held, True), x, wide(kind, 3, C, held), None, False)  # 1 is 127 / 127: exact


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 17])
def test_what_is_not_finite_stays_in_its_row(isa, kind, bad, rows):
    C_.choose_instruction_set(isa)
    x, held = torch.randn(rows, 64), drawn(kind, 5, 64, torch.Generator().manual_seed(0))
    x[1, 40] = bad
    y = few(kind, x, None, held, True)
    assert not y[1].isfinite().any() and y[[0, *range(2, rows)]].isfinite().all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("O", [1, 33])
def test_a_bad_weight_stays_in_its_output(isa, O):  # although vectors reach over the end of a row
    C_.choose_instruction_set(isa)
    for C, rows in itertools.product((1, 17, 40, 100), (2, 18)):
        x = torch.randn(rows, C)
        for kind, name in (
            ("int4", "scale"),
            ("int4", "least"),
            ("bfloat16", "weight"),
            ("float32", "weight"),
            ("int8", "scale"),
        ):
            held = drawn(kind, O, C, torch.Generator().manual_seed(0))
            held[name][O // 2] = float("nan")
            good = torch.arange(O) != O // 2
            for dynamic in (False, True):
                y = few(kind, x, None, held, dynamic)
                assert y[:, good].isfinite().all() and y[:, ~good].isnan().all(), (kind, name, C, dynamic)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by name")
def test_nothing_past_the_end_is_read():
    """Each tensor ends where a page begins that must not be read: in a process of its own, which would die of it."""
    code = """
        import ctypes, mmap, sys, torch
        sys.path.insert(0, "tests")
        from test_fused_linear import C_, FEW_KINDS, SETS, drawn, few, fused_linear
        libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []
        def at_the_end(t):
            if t is None or not t.numel():
                return t
            room = -(-t.nbytes // page) * page
            block = mmap.mmap(-1, room + page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(block))
            assert libc.mprotect(ctypes.c_void_p(start + room), page, 0) == 0
            kept.append(block)
            moved = torch.frombuffer(block, dtype=t.dtype, count=t.numel(), offset=room - t.nbytes).view(t.shape)
            return moved.copy_(t)
        gen = torch.Generator().manual_seed(0)
        for kind in FEW_KINDS:
            for O, C in ((1, 1), (3, 31), (5, 64), (17, 100), (33, 192), (2, 577), (18, 1057), (7, 32), (15, 160)):
                if kind == "nf4":
                    C = -(-C // 64) * 64
                held = {name: at_the_end(t) for name, t in drawn(kind, O, C, gen).items()}
                for N in (1, 3, 8, 17):
                    x, bias = at_the_end(torch.randn(N, C)), at_the_end(torch.randn(O))
                    for isa in SETS:
                        C_.choose_instruction_set(isa)
                        few(kind, x, bias, held, True), few(kind, x.bfloat16(), None, held, False)
                        if kind != "float32":
                            fused_linear.unpack(kind, (O, C), **held)
        if "check" in sys.argv:  # the guard itself: what reads too far does die
            ctypes.string_at(x.data_ptr(), x.nbytes + 1)
        print("fine")
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "fine\n", (done.returncode, done.stderr)
    # a signal kills it, or AddressSanitizer, where that is loaded, ends it with 1
    died = subprocess.run([*run, "check"], env=env, cwd=ROOT, capture_output=True, text=True)
    assert died.returncode and died.stdout == "" and (died.returncode < 0 or "AddressSanitizer" in died.stderr)


@pytest.mark.parametrize("isa", SETS)
def test_every_float16_is_read(isa):
    C_.choose_instruction_set(isa)
    scale = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(-1, 1)  # all there are
    held = {"codes": torch.full((len(scale), 1, 16), 0x11, dtype=torch.uint8), "scale": scale, "least": 0 * scale.abs()}
    held["least"] = torch.zeros_like(scale)
    W = fused_linear.unpack("int4", (len(scale), 1), **held)
    assert torch.equal(W.nan_to_num(7.0), scale.float().nan_to_num(7.0))


@pytest.mark.parametrize("isa", SETS)
@given(case=cases(FEW_KINDS, rows=st.integers(1, 8), multiple=True), dynamic=st.booleans())
def test_same_bits_for_every_number_of_threads_and_rows(isa, case, dynamic):
    """So that what a token gets does not depend on what else is in the batch."""
    C_.choose_instruction_set(isa)
    kind, x, (_, C), bias, held = case
    if kind == "nf4" and C == 0:
        return
    y = few(kind, x, bias, held, dynamic)
    torch.set_num_threads(1)
    assert torch.equal(few(kind, x, bias, held, dynamic), y)
    for n in range(len(x)):
        assert torch.equal(few(kind, x[n : n + 1], bias, held, dynamic), y[n : n + 1])
    torch.set_num_threads(2)


@given(case=cases(["float32"], rows=st.integers(0, 2 * fused_linear.FEW)))
def test_a_product_of_floats_takes_any_number_of_rows(case):
    kind, x, (O, C), _, held = case
    x = x.float()
    product = fused_linear.Product(kind, (O, C), **held)
    check(product(x), x, wide(kind, O, C, held), None, False)
    assert torch.equal(product.rows(torch.arange(O)), held["weight"])


def test_large_layers_use_both_threads():  # past the size below which one thread does it all
    for kind in FEW_KINDS:
        held = drawn(kind, 1000, 320, torch.Generator().manual_seed(0))
        for rows in (3, 300):  # more than are worked on at a time
            x = torch.randn(rows, 320)
            check(few(kind, x, None, held, True), x, wide(kind, 1000, 320, held), None, True)
        exact = wide(kind, 1000, 320, held)
        assert kind == "float32" or torch.allclose(
            fused_linear.unpack(kind, (1000, 320), **held).double(), exact, 1e-5, 1e-5
        )


# ---------------------------------------------------------------------------------------------- gradients


@given(case=cases(rows=st.sampled_from([0, 1, 2, 9, 33])), x_needs=st.booleans())
@example(case=("nf4", torch.ones(2, 192), (1500, 192), torch.ones(1500), None), x_needs=True)  # several panels
def test_gradients_against_float64(case, x_needs):
    kind, x, (O, C), bias, held = case
    held = drawn(kind, O, C, torch.Generator().manual_seed(1)) if held is None else held
    x = x.detach().float().requires_grad_(x_needs)
    bias = None if bias is None else bias.detach().float().requires_grad_()
    leaves = [t for t in (x, bias) if t is not None and t.requires_grad]
    y = fused_linear.linear(x, kind, (O, C), bias, **held)
    assert y.requires_grad == bool(leaves)
    W = wide(kind, O, C, held)
    plain = None if bias is None else bias.detach()
    check(y.detach(), x.detach(), W, plain, not leaves, blur(kind, held))
    if not leaves:
        return
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(y, leaves, grad)
    if x_needs:
        check(got[0], grad, W.mT, None, False, blur(kind, held))
    if bias is not None:
        assert torch.allclose(got[-1].double(), grad.double().sum(0), 1e-5, 1e-5)


def test_autograd_keeps_codes_only():
    held = drawn("nf4", 512, 576, torch.Generator().manual_seed(0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fused_linear.linear(torch.randn(20, 576, requires_grad=True), "nf4", (512, 576), **held).sum().backward()
    assert sum(kept) == sum(t.nbytes for t in held.values())


def test_a_bfloat16_weight_may_be_trained():
    W, x = torch.randn(5, 7).bfloat16().requires_grad_(), torch.randn(3, 7)
    fused_linear.linear(x, "bfloat16", (5, 7), weight=W).sum().backward()
    assert torch.allclose(W.grad.float(), x.sum(0).expand(5, 7), 1e-2, 1e-2)


def test_other_transforms_take_plain_pytorch():
    held = drawn("int8", 5, 7, torch.Generator().manual_seed(0))
    x, W = torch.randn(4, 7), wide("int8", 5, 7, held).float()

    def f(x):
        return fused_linear.linear(x, "int8", (5, 7), **held)

    assert torch.allclose(torch.func.vmap(f)(x), x @ W.mT, 1e-4, 1e-3)
    assert torch.allclose(torch.func.jacrev(f)(x[0]), W, 1e-4, 1e-3)
    assert torch.allclose(torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], W.sum(1).expand(4, 5), 1e-4, 1e-3)


def test_the_operators_say_that_they_give_no_gradient():
    held = drawn("int8", 5, 7, torch.Generator().manual_seed(0))
    y = ops.linear_int8(torch.randn(1, 7, requires_grad=True), *held.values(), None, True)
    with pytest.raises(RuntimeError, match="give no gradient; minimal.fused_linear.linear does"):
        y.sum().backward()


def test_autocast():
    held = drawn("int8", 5, 64, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_linear.linear(torch.randn(2, 64), "int8", (5, 64), torch.randn(5), **held)
    assert y.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_compile_rules(kind):
    held = drawn(kind, 5, 64, torch.Generator().manual_seed(0))
    parts, x, bias = list(held.values()), torch.randn(2, 64), torch.randn(5)
    if kind in ("int8", "int4"):
        torch.library.opcheck(getattr(ops, f"linear_{kind}").default, (x, *parts, bias, True))
        torch.library.opcheck(getattr(ops, f"linear_{kind}").default, (x, *parts, None, False))
    if kind == "int8":
        torch.library.opcheck(ops.unpack_int8.default, (*parts, False))
    if kind == "int4":
        torch.library.opcheck(ops.unpack_int4.default, (*parts, 64, True))
    if kind == "nf4":
        torch.library.opcheck(ops.linear_nf4.default, (x, *parts, fused_linear.LEVELS, bias))
        torch.library.opcheck(ops.unpack_nf4.default, (*parts, fused_linear.LEVELS, 64, 200, False))
    if kind == "bfloat16":
        torch.library.opcheck(ops.linear_bf16.default, (x, *parts, bias))
        torch.library.opcheck(ops.linear_f32.default, (x, parts[0].float(), bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 20])
def test_compiles_whole(kind, N):
    held = drawn(kind, 40, 64, torch.Generator().manual_seed(0))
    bias = torch.randn(40)

    def f(x):
        return fused_linear.linear(x, kind, (40, 64), bias, **held)

    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x = torch.randn(N, 64)
    assert torch.allclose(compiled(x), f(x), 1e-5, 1e-5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).square().sum().backward()
    f(b).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, 1e-4, 1e-2)


# ---------------------------------------------------------------------------------------------- what is wrong


def wrong():
    """(kind, name, the wrong tensor, what the message says) for x (2, 64), O = 5."""
    x, b = torch.randn(2, 64), torch.randn(5)
    yield "int8", "x", torch.randn(2, 63), r"x has shape \(2, 63\); wanted \(N, 64\)"
    yield "int8", "x", torch.randn(64), r"x has shape \(64\); wanted 2 to 4 dimensions"
    yield "int8", "x", torch.randn(1, 2, 64), r"x has shape \(1, 2, 64\); wanted \(N, 64\)"
    yield "int8", "x", x.double(), "x has dtype float64; wanted float32 or bfloat16"
    yield "int8", "x", x.to("meta"), "arguments on cpu, meta; wanted one device"
    yield "int8", "x", x.to_sparse(), "."
    yield "int8", "codes", torch.zeros(5, 64), "codes has dtype float32; wanted int8"
    yield "int8", "codes", torch.zeros(5, 64, dtype=torch.uint8), "codes has dtype uint8; wanted int8"
    yield (
        "int8",
        "codes",
        torch.zeros(64, 5, dtype=torch.int8).mT,
        "codes .* has gaps or swapped dimensions; wanted a cont",
    )
    yield "int8", "codes", torch.zeros(5, 128, dtype=torch.int8)[:, ::2], "codes .* has gaps"
    yield "int8", "codes", torch.zeros(320, dtype=torch.int8), "codes has shape .*; wanted"
    yield "int8", "codes", torch.zeros(1, 64, dtype=torch.int8).expand(5, 64), "codes .* has gaps"
    yield "int8", "scale", torch.zeros(4), r"scale has shape \(4\); wanted \(5,\) = \(O,\)"
    yield "int8", "scale", torch.zeros(5, dtype=torch.int32), "scale has dtype int32; wanted float32"
    yield "int8", "bias", torch.zeros(6), r"bias has shape \(6\); wanted \(5,\) = \(O,\)"
    yield "int8", "bias", torch.zeros(1, 5), r"bias has shape \(1, 5\)"
    yield "int8", "bias", b.double(), "bias has dtype float64"
    yield (
        "int4",
        "codes",
        torch.zeros(5, 3, 16, dtype=torch.uint8),
        r"codes has shape \(5, 3, 16\) for C = 64",
    )
    yield "int4", "codes", torch.zeros(5, 2, 32, dtype=torch.uint8), r"codes has shape \(5, 2, 32\)"
    yield "int4", "codes", torch.zeros(5, 32, dtype=torch.uint8), r"codes has shape \(5, 32\)"
    yield "int4", "scale", torch.zeros(5, 2), "scale has dtype float32; wanted float16"
    yield "int4", "scale", torch.zeros(5, 1).half(), r"scale has shape \(5, 1\); wanted \(5, 2\)"
    yield "int4", "least", torch.zeros(4, 2).half(), r"least has shape \(4, 2\); wanted \(5, 2\)"
    yield "nf4", "x", torch.randn(2, 32 * 5), "wanted a C that is a multiple of 64"
    yield "nf4", "x", torch.randn(2, 192), "wanted a C that is a multiple of 64, and O C / 2 codes"
    yield "nf4", "codes", torch.zeros(159, dtype=torch.uint8), r"codes has shape \(159\); wanted \(160,\)"
    yield "nf4", "absmax", torch.zeros(6, dtype=torch.int8), r"codes has shape \(160\); wanted \(192,\)"
    yield "nf4", "scale", torch.zeros(2), r"scale has shape \(2\); wanted \(1,\)"
    yield "nf4", "mean", torch.zeros(()), "mean has shape"
    yield "bfloat16", "weight", torch.zeros(5, 64), "weight has dtype float32; wanted bfloat16"
    yield "float32", "weight", torch.zeros(5, 64).bfloat16(), "weight has dtype bfloat16; wanted float32"
    yield "float32", "weight", torch.zeros(64, 5).mT, "weight .* has gaps or swapped dimensions; wanted a cont"
    yield "bfloat16", "weight", torch.zeros(5, 60).bfloat16(), r"x has shape \(2, 64\); wanted \(N, 60\)"
    gone = torch.zeros(5, 64, dtype=torch.int8)
    gone.untyped_storage().resize_(0)
    yield "int8", "codes", gone, "its storage holds only 0 bytes"


@pytest.mark.parametrize("kind, name, tensor, says", list(wrong()), ids=lambda x: x if isinstance(x, str) else "")
def test_malformed_input_is_an_error(kind, name, tensor, says):
    held = drawn(kind, 5, 64, torch.Generator().manual_seed(0))
    given_ = {"x": torch.randn(2, 64), **held, "bias": None, name: tensor}
    x, bias = given_.pop("x"), given_.pop("bias")
    with pytest.raises((RuntimeError, NotImplementedError), match=says):
        few(kind, x, bias, given_, True)


def test_malformed_unpack_is_an_error():
    held = drawn("int4", 5, 64, torch.Generator().manual_seed(0))
    for C in (-1, 0, 32, 65, 2**40, 2**63 - 1):
        with pytest.raises(RuntimeError, match="codes has shape .* for C = "):
            ops.unpack_int4(*held.values(), C, False)
    held = drawn("nf4", 5, 64, torch.Generator().manual_seed(0))
    for first, count in ((-64, 64), (32, 1), (0, -1), (0, 321), (320, 1), (2**63 - 64, 2**63 - 1), (384, 0)):
        with pytest.raises(RuntimeError, match="first is .* and count"):
            ops.unpack_nf4(*held.values(), fused_linear.LEVELS, first, count, False)
    with pytest.raises(RuntimeError, match="levels has shape"):
        ops.unpack_nf4(*held.values(), fused_linear.LEVELS[:15], 0, 64, False)


def test_linear_says_what_is_wrong():
    held = drawn("int8", 5, 64, torch.Generator().manual_seed(0))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="kind='int3' is unknown; wanted one of: int8, int4, nf4, bfloat16"):
        fused_linear.linear(x, "int3", (5, 64), **held)
    with pytest.raises(ValueError, match="kind='int4' was given codes, scale; wanted codes, scale, least"):
        fused_linear.linear(x, "int4", (5, 64), **held)
    with pytest.raises(ValueError, match=r"x has shape \(2, 64\); wanted \(..., 32\)"):
        fused_linear.linear(x, "int8", (5, 32), **held)
    for rows in (2, 20):
        with pytest.raises(RuntimeError, match="outputs"):
            fused_linear.linear(x[:1].expand(rows, 64), "int8", (6, 64), **held)
    with pytest.raises(RuntimeError, match="wanted"):
        fused_linear.linear(
            torch.randn(20, 64), "nf4", (6, 64), **drawn("nf4", 5, 64, torch.Generator().manual_seed(0))
        )


def test_the_plain_path_in_a_process_of_its_own():
    """MINIMAL_FUSED=0: the same values and gradients, without an extension."""
    code = """
        import sys, torch
        sys.path.insert(0, "tests")
        from minimal import fused_linear, quant
        assert not fused_linear.available() and "minimal._C" not in sys.modules, fused_linear.why_not()
        W, x = torch.randn(70, 130), torch.randn(3, 130, requires_grad=True)
        for kind in quant.KINDS:
            held = quant.KINDS[kind][0](W)
            near = quant.KINDS[kind][1](W.shape, **held)
            y = fused_linear.linear(x, kind, W.shape, **held)
            assert torch.allclose(y, x @ near.mT, 1e-5, 1e-5)
            assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], near.sum(0).expand(3, 130), 1e-5, 1e-5)
            assert torch.allclose(fused_linear.linear(x.detach(), kind, W.shape, **held), y, 1e-5, 1e-5)
        print("fine")
    """
    env = os.environ | {"MINIMAL_FUSED": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@given(case=cases(rows=st.integers(0, 20)))
def test_plain_rows_are_the_fused_ones(case):
    kind, _, (O, C), _, held = case
    plain = fused_linear._rows(kind, C, 0, O, torch.float32, list(held.values()), plain=True)
    assert torch.allclose(plain.double(), wide(kind, O, C, held), 1e-5, 1e-4)


def test_an_extension_of_an_earlier_version_is_not_used(monkeypatch):
    assert fused_linear._load() is None
    monkeypatch.setattr(sys.modules["minimal._C"], "version", 1)
    assert fused_linear._load().startswith("too old: ")
    monkeypatch.delattr(sys.modules["minimal._C"], "version")
    assert fused_linear._load().startswith("too old: ")
