# SPDX-License-Identifier: MIT
"""minimal/fused.py where there are no operators to run: switched off, not built, broken, or copied out alone; and
setup.py where they cannot be built. None of these tests needs the extension."""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minimal import fused

ROOT = pathlib.Path(__file__).resolve().parent.parent

REPORT = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from minimal import fused
    import importlib, torch
    q = torch.arange(24.0).reshape(1, 2, 3, 4) / 10
    out = fused.attention(q, q[:, :1], q[:, :1], causal=True)
    fused.softmax(q)
print(fused.available(), [f"{w.category.__name__}: {w.message}" for w in seen], fused.why_not(q, q, q), sep="|")
print(f"{out.double().pow(2).sum().item():.6f}")
"""


def run(folder, *command, **environment):
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def report(folder, **environment):
    done = run(folder, sys.executable, "-c", REPORT, **environment)
    assert done.returncode == 0, done.stderr
    state, number = done.stdout.strip().splitlines()
    return (*state.split("|"), float(number))


def copied(tmp_path):
    """A package with the two files that matter and no compiled module."""
    (tmp_path / "minimal").mkdir()
    for name in ("__init__.py", "fused.py"):
        shutil.copy(ROOT / "minimal" / name, tmp_path / "minimal")
    return tmp_path


def wanted():
    q = torch.arange(24.0).reshape(1, 2, 3, 4) / 10
    k = q[:, [0, 0]]
    return F.scaled_dot_product_attention(q, k, k, is_causal=True).double().pow(2).sum().item()


def test_switched_off_process():
    available, seen, why, number = report(ROOT, MINIMAL_FUSED="0")
    assert (available, seen, why) == ("False", "[]", "switched off by MINIMAL_FUSED=0")
    assert number == pytest.approx(wanted(), rel=1e-5)


def test_not_built_process_is_silent(tmp_path):
    available, seen, why, number = report(copied(tmp_path))
    assert (available, seen) == ("False", "[]") and why.startswith("not built: ")
    assert number == pytest.approx(wanted(), rel=1e-5)


@pytest.mark.parametrize("content", [b"not a library", b"\x7fELF" + bytes(60)], ids=["text", "header alone"])
def test_broken_binary_process_warns_once(tmp_path, content):
    folder = copied(tmp_path)
    (folder / "minimal" / "_C.so").write_bytes(content)
    available, seen, why, number = report(folder)
    assert available == "False" and why.startswith("broken: ") and "_C.so" in why
    assert seen.count("RuntimeWarning") == 1 and seen.count("Warning:") == 1 and why[8:] in seen
    assert number == pytest.approx(wanted(), rel=1e-5)


def test_file_alone_process(tmp_path):
    shutil.copy(ROOT / "minimal" / "fused.py", tmp_path)
    done = run(tmp_path, sys.executable, "fused.py")
    assert done.returncode == 0 and "plain PyTorch, as not built" in done.stdout and done.stderr == ""


def test_module_process_says_which_path_runs():
    done = run(ROOT, sys.executable, "-m", "minimal.fused")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.endswith("fused") if fused.available() else "plain PyTorch, as" in first


# ---------------------------------------------------------------------------------------------- plain PyTorch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_plain_attention_against_pytorch(dtype):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 3)
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[..., 0] = True  # a row with nothing left is another test
    hidden = torch.ones(5, 7).tril(2).bool()  # bottom-right
    for causal, m in ((False, None), (True, None), (False, mask), (True, mask)):
        see = (hidden if causal else torch.ones(5, 7).bool()) & (m if m is not None else torch.ones(5, 7).bool())
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=see, enable_gqa=True)
        got = fused._plain_attention(q.to(dtype), k.to(dtype), v.to(dtype), causal, m, 8**-0.5)
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.03)
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
        assert got.dtype == dtype
        added = torch.zeros(2, 1, 5, 7).masked_fill(~m, -torch.inf) if m is not None else None
        again = fused._plain_attention(q.to(dtype), k.to(dtype), v.to(dtype), causal, added, 8**-0.5)
        torch.testing.assert_close(got, again)


def test_plain_rows_with_nothing_to_see():
    q, k, v = (torch.randn(1, 1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([True, False, True, True])[:, None]
    out = fused._plain_attention(q, k, v, True, mask, 1.0)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out[0, 0, 1].eq(0).all() and gradients[0][0, 0, 1].eq(0).all()
    assert all(g.isfinite().all() for g in gradients) and out[0, 0, 0].ne(0).all()
    assert torch.autograd.gradgradcheck(lambda q: fused._plain_attention(q, k, v, True, mask, 1.0), q)


def test_plain_documents_window_slopes_and_softcap():
    B, H, T = 2, 4, 6
    q, k, v = torch.randn(B, H, T, 8).double(), torch.randn(B, 2, T, 8).double(), torch.randn(B, 2, T, 3).double()
    slopes, cu = torch.rand(B, H).double(), torch.tensor([0, 2, 7, 12])
    number = [[0, 0, 1, 1, 1, 1], [1, 2, 2, 2, 2, 2]]
    got = fused._plain_attention(q, k, v, False, None, 0.5, cu, 3, slopes, 2.0)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = [j for j in range(T) if number[b][i] == number[b][j] and abs(i - j) < 3]
                s = torch.stack([0.5 * (q[b, h, i] * k[b, h // 2, j]).sum() for j in seen])
                s = 2 * torch.tanh(s / 2) - slopes[b, h] * torch.tensor([abs(i - j) for j in seen])
                wanted = torch.softmax(s, 0) @ v[b, h // 2, seen]
                torch.testing.assert_close(got[b, h, i], wanted, rtol=1e-6, atol=1e-7)


def test_plain_rotary():
    q, k, v, angles = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.rand(2, 5, 4)
    got = fused._plain_attention(q, k, v, True, None, 0.5, rotary=(angles.cos(), angles.sin()))

    def turn(x):  # pair by pair, by a rotation matrix
        x = x.clone()
        for b, t, d in itertools.product(range(2), range(x.shape[2]), range(4)):
            angle = angles[b, 5 - x.shape[2] + t, d]
            matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
            x[b, :, t, [d, d + 4]] = x[b, :, t, [d, d + 4]] @ matrix.mT
        return x

    torch.testing.assert_close(got, fused._plain_attention(turn(q), turn(k), v, True, None, 0.5))


def test_slopes_that_need_a_gradient_get_it():
    q, slopes = torch.randn(1, 2, 5, 8), torch.rand(2, requires_grad=True)
    assert "slopes needs a gradient" in fused.why_not(q, q, q, slopes=slopes) or not fused.available()
    (grad,) = torch.autograd.grad(fused.attention(q, q, q, slopes=slopes, causal=True).square().sum(), slopes)
    assert grad.abs().sum() > 0


def test_integer_mask_is_an_error():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(TypeError, match="mask has dtype torch.int64; wanted bool"):
        fused.attention(q, q, q, mask=torch.ones(3, 3).long())


# ---------------------------------------------------------------------------------------------- setup.py


@pytest.fixture
def checkout(tmp_path):
    """What setup.py needs, in another place, with a source that no compiler takes."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "minimal").mkdir()
    shutil.copy(ROOT / "minimal" / "__init__.py", tmp_path / "minimal")
    (tmp_path / "csrc").mkdir()
    for name in ("ops.cpp", "softmax_cpu.cpp", "attention_cpu.cpp"):
        (tmp_path / "csrc" / name).write_text("#error this does not compile\n")
    return tmp_path


def build(checkout, **environment):
    return run(checkout, sys.executable, "setup.py", "build_ext", "--inplace", **environment)


def lines(done):
    return [line for line in done.stderr.splitlines() if line.startswith("minimal: ")]


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"MINIMAL_BUILD_EXTENSION": "0"}, "MINIMAL_BUILD_EXTENSION=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler is not on the PATH"),
        ({}, "Error compiling"),
    ],
)
def test_setup_process_goes_on_as_pure_python(checkout, environment, reason):
    done = build(checkout, **environment)
    assert done.returncode == 0, done.stderr
    assert len(lines(done)) == 1 and reason in lines(done)[0]
    assert "installing as pure Python" in lines(done)[0]
    assert not list(checkout.glob("minimal/*.so"))


def test_setup_process_stops_where_the_extension_is_required(checkout):
    done = build(checkout, MINIMAL_BUILD_EXTENSION="1", CXX="no-such-compiler")
    assert done.returncode == 1 and "no-such-compiler" in done.stderr.splitlines()[-1]


def test_setup_process_without_torch(checkout):
    (checkout / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    done = build(checkout)  # a script finds its neighbours first
    assert done.returncode == 0, done.stderr
    assert len(lines(done)) == 1 and "there is no torch here" in lines(done)[0]
