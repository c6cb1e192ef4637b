# SPDX-License-Identifier: MIT
"""matmul.py: oneDNN's products, where they are chosen, against float64; and that they are chosen nowhere else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal import matmul

sizes = st.integers(1, 70) | st.sampled_from([128, 200, 333])


@given(N=sizes, K=sizes, M=sizes, turned=st.tuples(st.booleans(), st.booleans()), bias=st.booleans(), data=st.data())
def test_no_digit_is_lost(N, K, M, turned, bias, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    reason = matmul.use_onednn()
    assert torch.get_float32_matmul_precision() == ("highest" if reason else "medium")
    a, b = (torch.randn(n[::-1]).t() if t else torch.randn(n) for n, t in zip(((N, K), (K, M)), turned, strict=True))
    c = torch.randn(M) if bias else None
    y = a @ b if c is None else torch.addmm(c, a, b)
    torch.set_float32_matmul_precision("highest")
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    exact, size = (exact, size) if c is None else (exact + c, size + c.abs())
    assert ((y - exact).abs() <= 1e-6 * size).all()  # 8 bits would be off by 2e-3 of it


def test_gradients_and_batches():
    matmul.use_onednn()
    x, W, v = torch.randn(5, 64, 96).requires_grad_(), torch.randn(96, 80).requires_grad_(), torch.randn(5, 64, 80)
    got = torch.autograd.grad(((x @ W) * v).sum(), (x, W))
    torch.testing.assert_close(torch.bmm(x, x.mT).double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-5)
    exact = v.double() @ W.double().mT, (x.double().mT @ v.double()).sum(0)
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.fixture
def an_amd(tmp_path, monkeypatch):
    """The rule's inputs on a processor for which it says yes."""
    (tmp_path / "cpuinfo").write_text("processor : 0\nvendor_id : AuthenticAMD\n")
    monkeypatch.setattr(matmul, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return tmp_path / "cpuinfo"


def test_only_on_an_amd_with_avx512(an_amd, monkeypatch):
    assert matmul.why_not() is None
    an_amd.write_text("vendor_id : GenuineIntel\n")
    assert matmul.use_onednn() == "not an AMD: MKL is as fast"
    an_amd.unlink()
    assert "does not say who made" in matmul.use_onednn()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert matmul.use_onednn().startswith("PyTorch runs with AVX2")
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_somebody_has_set_stays(an_amd):
    torch.set_float32_matmul_precision("high")
    assert matmul.use_onednn() == "float32 products are set to 'high' already"
    assert torch.get_float32_matmul_precision() == "high"


def test_rounding_is_noticed_and_taken_back(an_amd, monkeypatch):
    assert not matmul._rounds()
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args: full(*args).bfloat16().float())  # what AMX would make of it
    assert matmul._rounds()
    assert matmul.use_onednn() == "oneDNN rounds to bfloat16 here"
    assert torch.get_float32_matmul_precision() == "highest"


def test_train_uses_it(monkeypatch):
    import train

    called = []
    monkeypatch.setattr(train, "use_onednn", lambda: called.append(1))
    train.complete(train.Settings(device="cpu"))
    assert called == [1]
