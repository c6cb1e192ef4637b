# SPDX-License-Identifier: MIT
"""minimal/fused_mlp.py and its operators. Oracle: the formulas of PyTorch in float64, and its own error in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minimal import fused_mlp

if not fused_mlp.available():  # CI sets MINIMAL_REQUIRE_FUSED=1, so that it cannot pass without having tested them
    if os.environ.get("MINIMAL_REQUIRE_FUSED") == "1":
        raise RuntimeError(f"MINIMAL_REQUIRE_FUSED=1, but the fused operators are {fused_mlp._reason}")
    pytest.skip(f"the fused operators are {fused_mlp._reason}", allow_module_level=True)

C_, ops = sys.modules["minimal._C"], torch.ops.minimal
SETS = C_.instruction_sets().split(",")
EPS = 2.0**-23


@pytest.fixture(autouse=True)
def _best_set():
    yield
    C_.choose_instruction_set("")


def gelu(x):
    return F.gelu(x, approximate="tanh")


def swiglu(g, u):
    return F.silu(g) * u


def gradients(f, dy, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs), inputs, dy)


def check(ours, theirs, exact):
    """Against float64: at most twice PyTorch's own largest error and three units in the last place beside it."""
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    if ours.numel():
        allowed = 2 * (theirs.double() - exact).abs().max() + 3 * EPS * (exact.abs() + 1e-3)
        assert ((ours.double() - exact).abs() <= allowed).all()


SHAPES = st.integers(0, 70).map(lambda n: (n,)) | st.lists(st.integers(0, 9), max_size=4).map(tuple)


@given(SHAPES, st.floats(0.01, 60), st.sampled_from(SETS), st.integers(0, 2**31), st.booleans())
def test_values_and_gradients(shape, size, isa, seed, swapped):
    C_.choose_instruction_set(isa)
    gen = torch.Generator().manual_seed(seed)
    x, u, dy = (torch.randn(shape, generator=gen) * s for s in (size, 1.0, 1.0))
    if swapped and len(shape) >= 2:  # not contiguous, all alike
        x, u, dy = x.mT, u.mT, dy.mT
    check(fused_mlp.gelu(x), gelu(x), gelu(x.double()))
    check(fused_mlp.swiglu(x, u), swiglu(x, u), swiglu(x.double(), u.double()))
    for ours, plain, inputs in ((fused_mlp.gelu, gelu, (x,)), (fused_mlp.swiglu, swiglu, (x, u))):
        got = gradients(ours, dy, *inputs)
        wanted = gradients(plain, dy.double(), *(t.double() for t in inputs))
        for mine, theirs, exact in zip(got, gradients(plain, dy, *inputs), wanted, strict=True):
            check(mine, theirs, exact)
    assert torch.equal(fused_mlp.gelu_backward(dy, x), gradients(fused_mlp.gelu, dy, x)[0])
    by_hand = fused_mlp.swiglu_backward(dy, x, u)
    for a, b in zip(by_hand, gradients(fused_mlp.swiglu, dy, x, u), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", SETS)
def test_the_ends_of_the_number_line(isa):
    C_.choose_instruction_set(isa)
    x = torch.tensor([0.0, -0.0, 1e-30, 9.99, 10.0, 10.01, 88.0, 1e30, torch.inf] + [0.0] * 8)
    x = torch.cat((x, -x[:-8]))
    y, dy = fused_mlp.gelu(x), torch.ones_like(x)
    assert torch.equal(y[x >= 9.99], x[x >= 9.99]) and (y[x < -10] == 0).all() and abs(y[x == -10]) < 1e-30
    slope = fused_mlp.gelu_backward(dy, x)
    assert torch.equal(slope[x >= 10], dy[x >= 10]) and (slope[x <= -10].abs() < 1e-30).all()
    assert slope[0] == 0.5 and y[0] == 0
    x = x[x.abs() < 1e20]
    gate = fused_mlp.swiglu(x, torch.ones_like(x))
    assert torch.allclose(gate, F.silu(x.double()).float(), 1e-6, 1e-30)
    nan = torch.full((3,), torch.nan)
    results = fused_mlp.gelu(nan), fused_mlp.gelu_backward(nan + 1, nan), fused_mlp.swiglu(nan, nan)
    assert all(r.isnan().all() for r in (*results, *fused_mlp.swiglu_backward(torch.ones(3), nan, nan)))


def test_many_threads_and_pieces():
    threads, gen = torch.get_num_threads(), torch.Generator().manual_seed(0)
    x, u, dy = (torch.randn(5, 70001, generator=gen) for _ in range(3))
    torch.set_num_threads(2)
    shared = fused_mlp.gelu(x), fused_mlp.gelu_backward(dy, x), *fused_mlp.swiglu_backward(dy, x, u)
    torch.set_num_threads(1)
    alone = fused_mlp.gelu(x), fused_mlp.gelu_backward(dy, x), *fused_mlp.swiglu_backward(dy, x, u)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_what_is_not_float32_runs_in_plain_pytorch():
    for x in (torch.randn(7, dtype=torch.float64), torch.randn(7).bfloat16(), torch.randn(1, 1, 1, 1, 3)):
        assert torch.equal(fused_mlp.gelu(x), gelu(x)) and torch.equal(fused_mlp.swiglu(x, x), swiglu(x, x))
        mine, theirs = fused_mlp.swiglu_backward(x, x, x), gradients(swiglu, x, x, x)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.func.vmap(fused_mlp.gelu)(torch.zeros(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"gate has shape \(3,\) and up \(4,\)"):
        fused_mlp.swiglu(torch.ones(3), torch.ones(4))


def test_operators_refuse_what_does_not_fit():
    x = torch.randn(4, 6)
    for call, message in (
        (lambda: ops.gelu(x.double()), "x has dtype float64; wanted float32"),
        (lambda: ops.gelu(x.t()), "gaps or swapped dimensions"),
        (lambda: ops.gelu(x[:, ::2]), "gaps or swapped dimensions"),
        (lambda: ops.gelu(torch.ones(1, 1, 1, 1, 1)), "wanted 0 to 4 dimensions"),
        (lambda: ops.gelu_backward(x[:3], x), r"grad has shape \(3, 6\); wanted \(4, 6\), as x"),
        (lambda: ops.swiglu(x, x.flatten()), r"up has shape \(24\); wanted \(4, 6\), as gate"),
        (lambda: ops.swiglu_backward(x[0], x, x), r"grad has shape \(6\)"),
        (lambda: ops.gelu(x.requires_grad_()).sum().backward(), "minimal.fused_mlp does"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    shrunk = torch.randn(64)
    shrunk.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage holds only 0 bytes"):
        ops.gelu(shrunk)


def test_a_process_without_the_operators():
    code = "from minimal import fused_mlp as f; import torch; print(f.available(), f.gelu(torch.ones(3)).sum().item())"
    root = Path(fused_mlp.__file__).parent.parent
    env = os.environ | {"MINIMAL_FUSED": "0", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"False {gelu(torch.ones(3)).sum().item()}\n"


def test_fake_rules_give_shapes():
    x = torch.empty(3, 5, device="meta")
    assert ops.gelu(x).shape == (3, 5) and [t.shape for t in ops.swiglu_backward(x, x, x)] == [(3, 5)] * 2
    torch.library.opcheck(ops.gelu.default, (torch.randn(3, 5),), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.swiglu_backward.default, tuple(torch.randn(3, 3, 5)), test_utils=("test_schema",))
