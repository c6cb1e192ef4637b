# SPDX-License-Identifier: MIT
"""Losses against torch.nn.functional, float64 and closed forms; the memory of the chunked one; traps, written out."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minimal.loss import cross_entropy, focal, info_nce, linear_cross_entropy, mse

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative(a, b):
    """Largest difference, as a share of the largest number of b."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if b.numel() else 0.0


def leaf(t, dtype=None):
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()


def targets_of(n, classes, ignored=0.0, ignore_index=IGNORED):
    y = torch.randint(classes, (n,))
    return torch.where(torch.rand(n) < ignored, ignore_index, y)


class Recorder(TorchDispatchMode):
    """Multiplications in matrix products, their dtypes, and the most numbers that a result in new memory holds."""

    def __init__(self):
        super().__init__()
        self.products, self.dtypes, self.largest = 0, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.products += a.size(0) * a.size(1) * b.size(1)
            self.dtypes.add(a.dtype)
        old = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.data_ptr() not in old:  # a view takes no memory
            self.largest = max(self.largest, out.numel())
        return out


seeds = st.integers(0, 10**6)
shares = st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0])
smoothings = st.sampled_from([0.0, 0.1, 0.5, 1.0])


# ---- worked examples ----


def test_cross_entropy_of_three_probabilities():
    total, count = cross_entropy(torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([1]))
    assert round(total.item(), 4) == 1.2040 and count == 1
    assert count.dtype == torch.int64 and count.dim() == 0


def test_a_product_worked_by_hand():
    """X W = [[-2, 5], [-2, 11], [-2, 17]]: the first class is behind by 7, 13 and 19, costing ln(1 + e^gap) each."""
    X = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)
    W = torch.tensor([[1.0, 0], [0, 1], [-1, 1]], dtype=torch.float64)
    total, count = linear_cross_entropy(X, W.t(), torch.zeros(3, dtype=torch.long))
    assert abs(total - sum(math.log1p(math.exp(gap)) for gap in (7, 13, 19))) < 1e-12 and count == 3


def test_the_gradient_is_a_softmax_whose_rows_sum_to_one_less_the_target():
    z, y = leaf(torch.randn(5, 7, dtype=torch.float64)), torch.randint(7, (5,))
    cross_entropy(z, y)[0].backward()
    p = z.grad + F.one_hot(y, 7)
    assert (p > 0).all() and (p.sum(1) - 1).abs().max() < 1e-12


# ---- cross_entropy ----


@given(
    n=st.integers(0, 9),
    classes=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    ignored=shares,
    smoothing=smoothings,
    ignore_index=st.sampled_from([-100, -1, 0]),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    seed=seeds,
)
def test_cross_entropy_is_that_of_pytorch(n, classes, dtype, scale, ignored, smoothing, ignore_index, layout, seed):
    torch.manual_seed(seed)
    z = (torch.randn(n, classes) * scale).to(dtype)
    z = {"plain": z, "transposed": z.t().contiguous().t(), "strided": z.repeat_interleave(2, 1)[:, ::2]}[layout]
    z, y = z.detach().requires_grad_(), targets_of(n, classes, ignored, ignore_index)
    total, count = cross_entropy(z, y, label_smoothing=smoothing, ignore_index=ignore_index)
    wide = torch.promote_types(dtype, torch.float32)
    assert total.dtype == wide and total.dim() == 0 and count == (y != ignore_index).sum()
    (grad,) = torch.autograd.grad(total, z)
    assert grad.dtype == dtype

    def theirs(dtype):
        t = leaf(z, dtype)
        loss = F.cross_entropy(t, y, reduction="sum", ignore_index=ignore_index, label_smoothing=smoothing)
        return loss.detach(), torch.autograd.grad(loss, t)[0]

    truth, peer = theirs(torch.float64), theirs(wide)
    epsilon = torch.finfo(wide).eps
    assert (total - truth[0]).abs() <= 2 * (peer[0] - truth[0]).abs() + 8 * epsilon * (1 + truth[0].abs())
    assert ((grad.double() - truth[1]).abs() <= 8 * epsilon + torch.finfo(dtype).eps * truth[1].abs()).all()


def test_low_precision_is_computed_in_float32():
    """A softmax in bfloat16 keeps three digits; the buggy variant is that."""
    z, y = (torch.randn(200, 50) * 3).bfloat16(), torch.randint(50, (200,))
    truth = F.cross_entropy(z.double(), y, reduction="sum")
    buggy = -z.log_softmax(1).gather(1, y[:, None]).sum()
    assert relative(cross_entropy(z, y)[0], truth) < 1e-6 < 1e-4 < relative(buggy, truth)


@given(n=st.integers(1, 6), classes=st.integers(2, 9), smoothing=smoothings, seed=seeds)
def test_invariances_and_bounds(n, classes, smoothing, seed):
    torch.manual_seed(seed)
    z, y = torch.randn(n, classes, dtype=torch.float64) * 4, torch.randint(classes, (n,))
    total, _ = cross_entropy(z, y, label_smoothing=smoothing)
    shifted, _ = cross_entropy(z + 100 * torch.randn(n, 1, dtype=torch.float64), y, label_smoothing=smoothing)
    order = torch.randperm(classes)
    permuted, _ = cross_entropy(z[:, order], order.argsort()[y], label_smoothing=smoothing)
    assert abs(shifted - total) < 1e-9 and abs(permuted - total) < 1e-9

    q = F.one_hot(y, classes).double() * (1 - smoothing) + smoothing / classes
    entropy = -torch.special.xlogy(q, q).sum()  # no logits do better than the targets' own distribution ...
    assert total >= entropy - 1e-9 and total >= 0
    best, _ = cross_entropy(q.clamp_min(1e-300).log(), y, label_smoothing=smoothing)
    assert abs(best - entropy) < 1e-9  # ... and that one reaches it
    largest = z.amax(1) - z.amin(1) + math.log(classes)
    assert total <= largest.sum() + 1e-9


def test_smoothing_spreads_over_all_classes():
    """The buggy variant spreads over the V - 1 others."""
    z, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    truth = F.cross_entropy(z, y, reduction="sum", label_smoothing=0.1)
    one_hot = F.one_hot(y, 5)
    buggy = -((0.9 * one_hot + 0.1 / 4 * (1 - one_hot)) * z.log_softmax(1)).sum()
    assert abs(cross_entropy(z, y, label_smoothing=0.1)[0] - truth) < 1e-12
    assert abs(buggy - truth) > 1e-2


def softmax_over_rows(z, y):
    return -z.log_softmax(0).gather(1, y[:, None]).sum(), torch.tensor(len(y))


@pytest.mark.parametrize(
    "loss, sound",
    [(cross_entropy, True), (focal, True), (softmax_over_rows, False)],
    ids=["cross_entropy", "focal", "wrong axis"],
)
def test_rows_do_not_see_each_other(loss, sound):
    """Square logits: no shape tells classes from rows. Changing row 1 must not move what row 0 costs."""
    z, y = torch.randn(6, 6, dtype=torch.float64), torch.randint(6, (6,))
    changed = z.clone()
    changed[1] += torch.randn(6)
    only_row_1 = loss(changed, y)[0] - loss(z, y)[0]
    alone = loss(changed[1:2], y[1:2])[0] - loss(z[1:2], y[1:2])[0]
    order = torch.randperm(6)
    columns = loss(z[:, order], order.argsort()[y])[0] - loss(z, y)[0]
    assert columns.abs() < 1e-12  # true of the wrong axis too: it takes what follows to tell
    assert (abs(only_row_1 - alone) < 1e-12) == sound


def naive(z, y):
    e = z.exp()
    return -(e.gather(1, y[:, None]).squeeze(1) / e.sum(1)).log().sum()


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_large_logits(offset):
    z, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    large = leaf(z + offset)
    expected = F.cross_entropy(large.detach().double(), y, reduction="sum")
    total, _ = cross_entropy(large, y)
    total.backward()
    assert abs(total - expected) < 1e-5 and large.grad.isfinite().all()
    assert not naive(large, y).isfinite()
    x, weight, bias = leaf(torch.eye(3)), z.t().contiguous(), torch.full((4,), float(offset))
    total, _ = linear_cross_entropy(x, weight, y, bias)
    total.backward()
    assert abs(total - F.cross_entropy((z + offset).double(), y, reduction="sum")) < 1e-5 and x.grad.isfinite().all()
    apart = torch.tensor([[0.0, 3e38, 0.0]])
    assert cross_entropy(apart, torch.tensor([1]))[0] == 0 and cross_entropy(apart, torch.tensor([0]))[0] > 2e38


def test_a_class_ruled_out_by_minus_infinity():
    z = leaf(torch.tensor([[0.0, -math.inf, 0.0]]))
    total, _ = cross_entropy(z, torch.tensor([0]))
    total.backward()
    assert abs(total - math.log(2)) < 1e-6 and z.grad.tolist() == [[-0.5, 0.0, 0.5]]
    x, b = torch.zeros(1, 2), torch.tensor([0.0, -math.inf, 0.0])
    weight = torch.zeros(3, 2).requires_grad_()
    total, _ = linear_cross_entropy(x + 1, weight, torch.tensor([0]), b)
    total.backward()
    assert abs(total - math.log(2)) < 1e-6 and weight.grad[:, 0].tolist() == [-0.5, 0.0, 0.5]


# ---- linear_cross_entropy: values and gradients ----


def case(n, classes, channels, dtype, bias, ignored, ignore_index=IGNORED):
    x, weight = torch.randn(n, channels), torch.randn(classes, channels) / channels**0.5
    b = torch.randn(classes) if bias else None
    tensors = [leaf(t, dtype) for t in (x, weight, b) if t is not None]
    return tensors, targets_of(n, classes, ignored, ignore_index)


def plain(x, weight, y, bias=None, smoothing=0.0, ignore_index=IGNORED):
    z = F.linear(x, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.cross_entropy(z, y, reduction="sum", ignore_index=ignore_index, label_smoothing=smoothing)


def value_and_gradients(loss, tensors, y, dtype=None, **settings):
    x, weight, *bias = (leaf(t, dtype) for t in tensors)
    total = loss(x, weight, y, *bias, **settings)
    total = total[0] if isinstance(total, tuple) else total
    return [total.detach(), *torch.autograd.grad(total, (x, weight, *bias))]


@given(
    n=st.integers(0, 20),
    classes=st.integers(1, 15),
    channels=st.integers(1, 8),
    chunk=st.sampled_from([None, 1, 2, 3, 7, 100]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    ignored=shares,
    smoothing=smoothings,
    ignore_index=st.sampled_from([-100, 0]),
    seed=seeds,
)
def test_linear_cross_entropy_is_that_of_pytorch(
    n, classes, channels, chunk, bias, dtype, ignored, smoothing, ignore_index, seed
):
    """Errors against float64 at most twice those of PyTorch's own path at the same dtype, and some roundings."""
    torch.manual_seed(seed)
    tensors, y = case(n, classes, channels, dtype, bias, ignored, ignore_index)
    count = linear_cross_entropy(*tensors[:2], y, *tensors[2:], ignore_index=ignore_index, chunk=chunk)[1]
    assert count == (y != ignore_index).sum() and count.dtype == torch.int64 and count.dim() == 0
    settings = dict(label_smoothing=smoothing, ignore_index=ignore_index, chunk=chunk)
    ours = value_and_gradients(linear_cross_entropy, tensors, y, **settings)
    settings = dict(smoothing=smoothing, ignore_index=ignore_index)
    peer = value_and_gradients(plain, tensors, y, **settings)
    truth = value_and_gradients(plain, tensors, y, torch.float64, **settings)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    for a, b, t, source in zip(ours, peer, truth, [None, *tensors], strict=True):
        assert source is None or (a.dtype == dtype and a.shape == source.shape)
        scale = max(1.0, t.abs().max().item()) if t.numel() else 1.0
        bound = 2 * (b.double() - t).abs().max() if t.numel() else 0.0
        assert ((a.double() - t).abs() <= bound + 4 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_errors_at_a_real_size(dtype, smoothing):
    """Chunked sums must not cost digits: no slack beyond twice PyTorch's error."""
    tensors, y = case(1500, 700, 64, dtype, True, 0.2)
    ours = value_and_gradients(linear_cross_entropy, tensors, y, label_smoothing=smoothing)
    peer = value_and_gradients(plain, tensors, y, smoothing=smoothing)
    truth = value_and_gradients(plain, tensors, y, torch.float64, smoothing=smoothing)
    for a, b, t in zip(ours[1:], peer[1:], truth[1:], strict=True):
        assert (a.double() - t).norm() <= 2 * (b.double() - t).norm()
    assert relative(ours[0], truth[0]) < {torch.float32: 1e-6, torch.bfloat16: 1e-4}[dtype]


@given(chunk=st.integers(1, 40), other=st.integers(1, 40), ignored=shares, seed=seeds)
def test_the_chunk_does_not_matter(chunk, other, ignored, seed):
    torch.manual_seed(seed)
    tensors, y = case(33, 11, 5, torch.float64, True, ignored)
    a = value_and_gradients(linear_cross_entropy, tensors, y, chunk=chunk, label_smoothing=0.1)
    b = value_and_gradients(linear_cross_entropy, tensors, y, chunk=other, label_smoothing=0.1)
    assert all(relative(s, t) < 1e-12 for s, t in zip(a, b, strict=True) if t.abs().max() > 0)


@pytest.mark.parametrize("needing", range(1, 8))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(needing, smoothing):
    """Every choice of what needs a gradient: x, weight, bias as the bits of `needing`."""
    tensors, y = case(7, 5, 3, torch.float64, True, 0.0)
    y[2] = IGNORED
    for bit, t in enumerate(tensors):
        t.requires_grad_(bool(needing >> bit & 1))

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, y, bias, label_smoothing=smoothing, chunk=3)[0]

    assert torch.autograd.gradcheck(loss, tensors)
    torch.autograd.backward(loss(*tensors))
    assert [t.grad is not None for t in tensors] == [bool(needing >> bit & 1) for bit in range(3)]


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout):
    """x as part of a larger tensor, the weight stored the other way round (as GPT-2's Conv1D does)."""
    x, weight, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64), targets_of(9, 5, 0.2)
    layouts = {"transposed": x.t().contiguous().t(), "strided": torch.stack((x, -x), 1)[:, 0]}
    x = {**layouts, "expanded": x[:1].expand(9, 6)}[layout]
    tensors = [x.detach().requires_grad_(), weight.t().contiguous().t().requires_grad_()]
    assert not x.is_contiguous() and not tensors[1].is_contiguous()
    total, _ = linear_cross_entropy(*tensors, y, chunk=4)
    grads = torch.autograd.grad(total, tensors)
    truth = value_and_gradients(plain, [x, weight], y)
    assert all(relative(a, b) < 1e-12 for a, b in zip([total, *grads], truth, strict=True))


def test_the_incoming_gradient_and_a_retained_graph():
    """Two backward passes give twice the gradient; the buggy variant scales its saved gradients in place."""
    (x, weight), y = case(8, 6, 4, torch.float64, False, 0.0)
    total, count = linear_cross_entropy(x, weight, y, chunk=3)
    (-3.5 * total / count).backward(retain_graph=True)
    once = weight.grad.clone()
    (-3.5 * total / count).backward()
    truth = value_and_gradients(plain, (x, weight), y)[2]
    assert relative(once, -3.5 / 8 * truth) < 1e-12 and torch.equal(weight.grad, 2 * once)

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.saved = torch.ones_like(w)
            return w.sum()

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved.mul_(grad)

    w = torch.zeros(3).requires_grad_()
    total = 0.5 * InPlace.apply(w)
    first, second = (torch.autograd.grad(total, w, retain_graph=True)[0].clone() for _ in range(2))
    assert not torch.equal(first, second)


def test_second_derivatives_are_refused_rather_than_wrong():
    (x, weight), y = case(4, 3, 2, torch.float64, False, 0.0)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(linear_cross_entropy(x, weight, y)[0], x, create_graph=True)


def test_a_tied_weight():
    """The head is the embedding: its gradient has two parts."""
    results = []
    for loss in (linear_cross_entropy, plain):
        torch.manual_seed(1)
        E, ids, y = torch.randn(10, 4).requires_grad_(), torch.randint(10, (7,)), torch.randint(10, (7,))
        total = loss(E[ids].tanh(), E, y)
        results.append(torch.autograd.grad(total[0] if isinstance(total, tuple) else total, E)[0])
    assert relative(*results) < 1e-5


# ---- linear_cross_entropy: what it costs ----


def test_products_are_only_those_that_are_needed():
    """One product for the logits, one for each gradient of x and weight, of the rows that count."""
    n, V, C = 24, 50, 6
    x, weight, bias = torch.randn(n, C), torch.randn(V, C), torch.randn(V)
    y = targets_of(n, V)
    y[::3] = IGNORED
    kept = 16

    def products(x_grad, weight_grad, bias_grad, enabled=True):
        tensors = [t.detach().requires_grad_(g) for t, g in ((x, x_grad), (weight, weight_grad), (bias, bias_grad))]
        with torch.set_grad_enabled(enabled), Recorder() as seen:
            total, _ = linear_cross_entropy(*tensors[:2], y, tensors[2], chunk=5)
            if total.requires_grad:
                total.backward()
        assert seen.largest <= max(5 * V, V * C, n * C)  # never all n V logits, and ...
        if not (weight_grad and enabled):
            assert seen.largest <= 5 * V  # ... a frozen weight has no gradient, not even an empty one
        assert seen.products % (kept * V * C) == 0
        return seen.products // (kept * V * C)

    assert products(True, True, True) == 3
    assert products(True, False, False) == 2
    assert products(False, True, False) == 2
    assert products(False, False, True) == 1
    assert products(False, False, False) == 1
    assert products(True, True, True, enabled=False) == 1  # needs_input_grad would say True here


MEMORY = """
import pathlib, re, torch, torch.nn.functional as F
from minimal.loss import linear_cross_entropy
torch.set_num_threads(1)

def resident(which):
    return int(re.search(which + r":\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1e3

def peak(loss, N, V, C):
    x, weight = torch.randn(N, C).requires_grad_(), torch.randn(V, C).requires_grad_()
    y = torch.randint(V, (N,))
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss(x, weight, y).backward()
    return resident("VmHWM") - before

def ours(x, weight, y):
    return linear_cross_entropy(x, weight, y)[0]

def plain(x, weight, y):
    return F.cross_entropy(F.linear(x, weight), y, reduction="sum")

for loss in (ours, plain):
    peak(loss, 600, 64, 16)
print(peak(ours, 2048, 12_000, 64), peak(plain, 2048, 12_000, 64))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory(tmp_path):
    """98 MB of logits, and three times that at PyTorch's peak; a quarter of it here, with some 8 MB of gradients."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    ours, theirs = map(float, done.stdout.split())
    assert theirs > 200  # what is measured does see logits
    assert ours < 45 and ours < theirs / 4


# ---- low precision ----


def test_autocast():
    """Products in bfloat16; the sum and the parameters' gradients in float32, no further off than PyTorch's."""
    tensors, y = case(300, 90, 32, torch.float32, True, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        with Recorder() as seen:
            ours = value_and_gradients(linear_cross_entropy, tensors, y, chunk=50)
        peer = value_and_gradients(plain, tensors, y)
    truth = value_and_gradients(plain, tensors, y, torch.float64)
    assert seen.dtypes == {torch.bfloat16} and all(t.dtype == torch.float32 for t in ours)
    for a, b, t in zip(ours[1:], peer[1:], truth[1:], strict=True):
        assert (a - t).norm() <= 2 * (b - t).norm()
    assert relative(ours[0], truth[0]) < 1e-3
    (x, weight, bias), _ = tensors, None
    with torch.autocast("cpu", torch.bfloat16):  # as in a model: a hidden state in bfloat16, parameters in float32
        total, _ = linear_cross_entropy(leaf(x, torch.bfloat16), weight, y, bias)
    assert relative(total, truth[0]) < 1e-3
    doubles = [leaf(t, torch.float64) for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):  # autocast leaves float64 alone
        assert relative(linear_cross_entropy(*doubles[:2], y, doubles[2])[0], truth[0]) < 1e-12


def test_gradients_of_many_chunks_are_added_in_float32():
    """The buggy variant adds to a bfloat16 gradient: past some size, a row more changes nothing."""
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight, y = leaf(torch.zeros(2, 1), torch.bfloat16), torch.zeros(4096, dtype=torch.long)
    linear_cross_entropy(x, weight, y, chunk=4)[0].backward()
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]
    buggy = torch.zeros(2, 1, dtype=torch.bfloat16)
    for rows in x.split(4):
        buggy += torch.tensor([[-0.5], [0.5]], dtype=torch.bfloat16) * rows.sum()
    assert buggy.abs().max() < 1024


def test_a_sum_beyond_float16_whose_mean_is_not():
    """Rounded to float16 before the division by the count, the gradient of the weight would be infinite."""
    x = torch.full((2048, 2), 64.0, dtype=torch.float16)
    weight, y = leaf(torch.zeros(3, 2), torch.float16), torch.zeros(2048, dtype=torch.long)
    total, count = linear_cross_entropy(x, weight, y)
    (total / count).backward()
    assert relative(weight.grad[:, 0], torch.tensor([-2.0, 1, 1]) / 3 * 64) < 1e-3
    assert not (torch.tensor(2 / 3 * 2048 * 64).half() / 2048).isfinite()


# ---- nothing to count, and what must not count ----

LOSSES = {
    "cross_entropy": lambda x, y: cross_entropy(x, y, label_smoothing=0.1),
    "linear_cross_entropy": lambda x, y: linear_cross_entropy(x, torch.eye(5), y, label_smoothing=0.1, chunk=2),
    "focal": lambda x, y: focal(x, y, alpha=torch.arange(5.0)),
    "mse": lambda x, y: mse(x, torch.ones_like(x), (y != IGNORED)[:, None]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_all_ignored(name):
    """The buggy variant is a mean over nothing."""
    x, y = torch.randn(4, 5).requires_grad_(), torch.full((4,), IGNORED)
    total, count = LOSSES[name](x, y)
    total.backward()
    assert total == 0 and count == 0 and count.dtype == torch.int64 and torch.equal(x.grad, torch.zeros(4, 5))
    assert F.cross_entropy(x, y).isnan()


def test_all_ignored_leaves_zero_gradients_on_parameters():
    tensors, _ = case(3, 4, 2, torch.float32, True, 0.0)
    total, _ = linear_cross_entropy(*tensors[:2], torch.full((3,), IGNORED), tensors[2])
    total.backward()
    assert total == 0 and not any(t.grad.any() for t in tensors)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_what_an_ignored_row_holds_does_not_matter(name, rubbish):
    """The buggy variant multiplies by a mask: 0 times NaN is NaN."""
    x, y = torch.randn(4, 5), torch.tensor([1, IGNORED, 3, 0])
    a, b = leaf(x), leaf(x)
    b.data[1] = rubbish
    (total, _), (other, _) = LOSSES[name](a, y), LOSSES[name](b, y)
    total.backward(), other.backward()
    assert torch.equal(total, other) and torch.equal(a.grad, b.grad) and not b.grad[1].any()
    z = leaf(b)
    buggy = (F.cross_entropy(z, y.clamp_min(0), reduction="none") * (y != IGNORED)).sum()
    assert buggy.isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_a_split_does_not_change_the_mean(name):
    """5 + 1 rows that count in microbatches of 5 and 3; the buggy variant is a mean of means."""
    x, y = torch.randn(8, 5), torch.tensor([0, 1, 2, 3, 4, 0, IGNORED, IGNORED])
    whole, (a, m), (b, n) = LOSSES[name](x, y), LOSSES[name](x[:5], y[:5]), LOSSES[name](x[5:], y[5:])
    assert m + n == whole[1] and abs((a + b) / (m + n) - whole[0] / whole[1]) < 1e-5
    assert abs((a / m + b / n) / 2 - whole[0] / whole[1]) > 1e-2


# ---- mse ----


@given(shape=st.lists(st.integers(0, 4), max_size=3), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_mse_is_that_of_pytorch(shape, dtype, seed):
    torch.manual_seed(seed)
    a, b = leaf(torch.randn(shape), dtype), torch.randn(shape).to(dtype)
    mask = torch.rand(shape) < 0.5
    total, count = mse(a, b)
    assert count == a.numel() and total.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(total, F.mse_loss(a.to(total.dtype), b.to(total.dtype), reduction="sum"))
    total, count = mse(a, b, mask)
    (grad,) = torch.autograd.grad(total, a)
    wide = (a - b).detach() if dtype == torch.float64 else a.detach().float() - b.float()
    assert count == mask.sum() and torch.allclose(total, wide[mask].square().sum())
    assert torch.allclose(grad, torch.where(mask, 2 * wide, 0).to(dtype))


def test_mse_in_nats():
    a, b = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    density = torch.distributions.Normal(a, 0.5**0.5).log_prob(b).sum()
    assert abs(mse(a, b)[0] - (-density - 6 * 0.5 * math.log(math.pi))) < 1e-12


def test_mse_masks_broadcast_but_predictions_do_not():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    total, count = mse(a, b, torch.tensor([True, False, True])[:, None])
    assert count == 16 and abs(total - (a - b)[:, ::2].square().sum()) < 1e-4
    with pytest.raises(ValueError, match="target of shape"):
        mse(torch.zeros(5), torch.zeros(5, 1))
    assert (torch.zeros(5) - torch.zeros(5, 1)).numel() == 25  # what PyTorch would have made of it


# ---- focal ----


@given(n=st.integers(0, 6), classes=st.integers(1, 7), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]), seed=seeds)
def test_focal_is_its_formula(n, classes, gamma, seed):
    torch.manual_seed(seed)
    z, y = leaf(torch.randn(n, classes) * 3, torch.float64), targets_of(n, classes, 0.3)
    for weights in (None, torch.rand(classes, dtype=torch.float64) + 0.1):
        total, count = focal(z, y, gamma, weights)
        (grad,) = torch.autograd.grad(total, z)
        kept = y != IGNORED
        t = leaf(z)
        p = t[kept].softmax(1).gather(1, y[kept, None]).squeeze(1)
        truth = -((1 if weights is None else weights[y[kept]]) * (1 - p) ** gamma * p.log()).sum()
        assert count == kept.sum() and abs(total - truth) < 1e-9
        if classes > 1:
            assert torch.allclose(grad, torch.autograd.grad(truth, t)[0], atol=1e-9)
        peer = F.cross_entropy(z.detach(), y, weights, reduction="sum")
        assert (abs(total - peer) < 1e-9 if gamma == 0 else -1e-12 <= total <= peer + 1e-12) or n == 0


def test_focal_of_two_classes_is_the_papers():
    """One sigmoid per row, p_t = p for the foreground and 1 - p otherwise: equations 2 to 5."""
    z, y, alpha, gamma = torch.randn(50, dtype=torch.float64) * 3, torch.randint(2, (50,)), 0.25, 2.0
    p = z.sigmoid()
    p_t, alpha_t = torch.where(y == 1, p, 1 - p), torch.where(y == 1, alpha, 1 - alpha)
    truth = -(alpha_t * (1 - p_t) ** gamma * p_t.log()).sum()
    two = torch.stack((torch.zeros_like(z), z), 1)
    ours, _ = focal(two, y, gamma, torch.tensor([1 - alpha, alpha], dtype=torch.float64))
    assert abs(ours - truth) < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 20.0, 200.0, 1e30, -1e30])
def test_focal_has_finite_gradients_where_a_row_is_certain(gap, gamma):
    """The derivative of (1 - p)^gamma is infinite at p = 1 for gamma < 1; the buggy variant makes NaN of it."""
    z, y = leaf(torch.tensor([[gap, 0.0, 0.0]])), torch.tensor([0])
    total, _ = focal(z, y, gamma)
    total.backward()
    assert total.isfinite() and total >= 0 and z.grad.isfinite().all()
    if gap == 200.0 and gamma == 0.5:
        t = leaf(z)
        ln_p = t.log_softmax(1)[0, 0]
        buggy = -((1 - ln_p.exp()) ** gamma) * ln_p
        assert torch.autograd.grad(buggy, t)[0].isnan().any()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradcheck(gamma):
    z, y = leaf(torch.randn(4, 3), torch.float64), torch.tensor([0, 2, IGNORED, 1])
    assert torch.autograd.gradcheck(lambda z: focal(z, y, gamma, torch.tensor([0.2, 0.3, 0.5]))[0], z)


# ---- info_nce ----


def by_loops(q, k, temperature):
    """Equation 4 word by word, in Python's own float64."""
    total = 0.0
    for i in range(len(q)):
        scores = [F.cosine_similarity(q[i], k[j], dim=0).item() / temperature for j in range(len(k))]
        total -= math.log(math.exp(scores[i]) / sum(map(math.exp, scores)))
    return total


@given(n=st.integers(1, 7), c=st.integers(1, 5), temperature=st.sampled_from([0.07, 0.5, 3.0]), seed=seeds)
def test_info_nce_is_its_formula(n, c, temperature, seed):
    torch.manual_seed(seed)
    q, k = torch.randn(n, c, dtype=torch.float64), torch.randn(n, c, dtype=torch.float64)
    one, count = info_nce(q, k, temperature)
    both, twice = info_nce(q, k, temperature, symmetric=True)
    assert count == n and twice == 2 * n and count.dtype == twice.dtype == torch.int64
    forth, back = by_loops(q, k, temperature), by_loops(k, q, temperature)
    assert abs(one - forth) < 1e-9 and abs(both - forth - back) < 1e-9
    lengths = torch.rand(n, 1, dtype=torch.float64) * 10 + 0.1
    assert abs(info_nce(q * lengths, 3 * k, temperature)[0] - one) < 1e-9
    order = torch.randperm(n)
    assert abs(info_nce(q[order], k[order], temperature)[0] - one) < 1e-9
    assert 0 <= one <= n * (math.log(n) + 2 / temperature) + 1e-9


def test_info_nce_looks_along_the_keys():
    """One query close to everything: softmax over the queries, the buggy variant, gives another number."""
    q, k = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    z = F.normalize(q, dim=1) @ F.normalize(k, dim=1).t() / 0.07
    buggy = -z.log_softmax(0).diagonal().sum()
    truth = -z.log_softmax(1).diagonal().sum()
    assert abs(info_nce(q, k)[0] - truth) < 1e-9 and abs(buggy - truth) > 0.1


def test_info_nce_knowing_nothing_and_everything():
    same = torch.ones(6, 4)
    assert abs(info_nce(same, same)[0] / 6 - math.log(6)) < 1e-6
    assert info_nce(torch.eye(6), torch.eye(6), 0.01)[0] < 1e-6
    assert info_nce(torch.ones(1, 4), -torch.ones(1, 4))[0] == 0  # no other key: nothing to find out


def test_info_nce_without_rows_or_length():
    empty = torch.zeros(0, 4).requires_grad_()
    for symmetric in (False, True):
        total, count = info_nce(empty, empty, symmetric=symmetric)
        assert total == 0 and count == 0
    total.backward()
    zero = torch.zeros(3, 4).requires_grad_()
    total, _ = info_nce(zero, torch.randn(3, 4))
    total.backward()
    assert abs(total - 3 * math.log(3)) < 1e-5 and zero.grad.isfinite().all()


def test_info_nce_in_low_precision():
    """Temperature 0.07 multiplies a cosine's error by 14: products in bfloat16, autocast's choice, are too coarse."""
    q, k = torch.randn(64, 32), torch.randn(64, 32)
    truth = info_nce(q.double(), k.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = info_nce(q, k)
        z = F.normalize(q, dim=1) @ F.normalize(k, dim=1).t() / 0.07
    buggy = -z.float().log_softmax(1).diagonal().sum()
    assert total.dtype == torch.float32 and relative(total, truth) < 1e-5 < relative(buggy, truth)
    halves = info_nce(q.half(), k.half())[0]
    assert halves.dtype == torch.float32 and relative(halves, info_nce(q.half().double(), k.half().double())[0]) < 1e-5


# ---- bad arguments ----

z, y, x, w = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2), torch.zeros(4, 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cross_entropy(z[0], y), ["logits", "(4,)", "(rows, classes)"]),
        (lambda: cross_entropy(z.long(), y), ["logits", "int64"]),
        (lambda: cross_entropy(z, y[:2]), ["targets", "(2,)", "(3,)"]),
        (lambda: cross_entropy(z, y.float()), ["targets", "float32", "int64"]),
        (lambda: cross_entropy(z, y + 4), ["targets", "4", "0 to 3"]),
        (lambda: cross_entropy(z, y - 1), ["targets", "-1", "0 to 3", "-100"]),
        (lambda: cross_entropy(z, y, label_smoothing=1.5), ["label_smoothing", "1.5", "0 to 1"]),
        (lambda: cross_entropy(z, y, label_smoothing=math.nan), ["label_smoothing", "nan"]),
        (lambda: linear_cross_entropy(x[0], w, y), ["x of shape (2,)"]),
        (lambda: linear_cross_entropy(x, w.t(), y), ["weight", "(2, 4)", "(classes, 2)"]),
        (lambda: linear_cross_entropy(x, w, y + 4), ["targets", "4", "0 to 3"]),
        (lambda: linear_cross_entropy(x, w, y, torch.zeros(2)), ["bias", "(2,)", "(4,)"]),
        (lambda: linear_cross_entropy(x, w.double(), y), ["float32, torch.float64", "one dtype"]),
        (lambda: linear_cross_entropy(x, w, y, chunk=0), ["chunk = 0", "at least 1"]),
        (lambda: linear_cross_entropy(x, w, y, chunk=True), ["chunk = True", "at least 1"]),
        (lambda: linear_cross_entropy(x, w, y, label_smoothing=-0.1), ["label_smoothing", "-0.1"]),
        (lambda: focal(z, y, gamma=-1), ["gamma = -1"]),
        (lambda: focal(z, y, alpha=torch.ones(3)), ["alpha", "(3,)", "(4,)"]),
        (lambda: focal(z, y, alpha=[1.0, 1.0, 1.0, 1.0]), ["alpha = [1.0,", "a tensor", "(4,)"]),
        (lambda: focal(z, y, alpha=0.25), ["alpha = 0.25", "a tensor", "(4,)"]),
        (lambda: focal(z, y + 4), ["targets", "4"]),
        (lambda: info_nce(x, w), ["(3, 2)", "(4, 2)"]),
        (lambda: info_nce(x, x, 0.0), ["temperature = 0.0"]),
        (lambda: mse(x, w), ["target", "(4, 2)", "(3, 2)"]),
        (lambda: mse(x, x, torch.ones(3, 2)), ["mask", "float32", "boolean"]),
        (lambda: mse(x, x, torch.ones(3, dtype=torch.bool)), ["mask", "(3,)", "(3, 2)"]),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value
