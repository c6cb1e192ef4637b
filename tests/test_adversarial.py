# SPDX-License-Identifier: MIT
"""Adversarial training against loops that feed e + delta themselves; R-Drop against F.kl_div; traps written out."""

import collections
import functools
import math
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minimal.adversarial import augment, fgm, free_lb, pgd, r_drop
from minimal.gpt import GPT, GPTConfig
from minimal.transformer import Transformer, TransformerConfig

V = 11


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Labels each token with a tied head; the loss of a text depends on all its tokens. `seen`: what it embedded."""

    def __init__(self, C=6, twice=False):
        super().__init__()
        self.embedding, self.inner, self.twice, self.seen = nn.Embedding(V, C), nn.Linear(C, C), twice, []

    def embed(self, ids):
        e = self.embedding(ids)  # (B, T, C)
        self.seen.append(e.detach().clone())
        return e

    def after(self, e, ids, other=None):
        """From the embedded tokens on: what the oracle differentiates."""
        x = torch.tanh(self.inner(e))  # (B, T, C)
        x = x + x.cumsum(1) * (1 if other is None else other.sin().mean(1, keepdim=True))
        return x @ self.embedding.weight.T  # (B, T, V)

    def loss(self, ids, targets):
        other = self.embed(ids.flip(1)[:, 1:]) if self.twice else None  # (B, T - 1, C): another shape
        z = self.after(self.embed(ids), ids, other)
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


def example(B=3, T=5, C=6, seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    model = Net(C, **settings).to(dtype)
    ids = torch.randint(V, (B, T))
    targets = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < torch.rand(B, 1), -100)
    targets[0, 0] = 1
    return model, ids, targets


def backward_on(model, *batch, scale=1.0, losses=None):
    def backward(weight):
        loss, n = model.loss(*batch)
        (scale * weight * loss).backward()
        if losses is not None:
            losses.append(loss.item())
        return loss.detach(), n

    return backward


def gradients(model):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def unit(g):
    """g / ||g|| row by row, in Python's loop; a row of zeros stays one."""
    return torch.stack([row / row.norm() if row.norm() > 0 else row for row in g])


def norms(x):
    return x.flatten(1).norm(dim=1)


class Oracle:
    """The same model with e + delta fed in, differentiated with torch.autograd.grad: no hook, no .grad."""

    def __init__(self, model, ids, targets):
        self.model, self.ids, self.targets = model, ids, targets

    def loss(self, delta):
        e = F.embedding(self.ids, self.model.embedding.weight) + delta
        z = self.model.after(e, self.ids)
        return F.cross_entropy(z.flatten(0, 1), self.targets.flatten(), reduction="sum")

    def start(self):
        return torch.zeros(*self.ids.shape, self.model.embedding.embedding_dim, dtype=torch.float64)

    def g(self, delta):
        delta = delta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(delta), delta)[0]

    def step(self, delta, step_size, epsilon):
        delta = delta + step_size * unit(self.g(delta))
        return torch.stack([d * min(1.0, epsilon / d.norm().item()) if d.norm() > 0 else d for d in delta])

    def gradient(self, delta):
        g = torch.autograd.grad(self.loss(delta), list(self.model.parameters()), allow_unused=True)
        return torch.cat([t.flatten() for t in g])


# ---- The three methods against the oracle ----


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))


@given(shapes, st.floats(0, 5))
def test_fgm(shape, epsilon):
    model, *batch = example(*shape)
    oracle, losses = Oracle(model, *batch), []
    loss, n = fgm(backward_on(model, *batch, losses=losses), model.embedding, epsilon)
    delta = epsilon * unit(oracle.g(oracle.start()))
    clean, attacked = model.seen
    torch.testing.assert_close(attacked - clean, delta)
    assert torch.equal(clean, model.embedding(batch[0])), "the clean pass was perturbed"
    assert (norms(attacked - clean) <= epsilon + 1e-9).all()
    want = (oracle.gradient(oracle.start()) + oracle.gradient(delta)) / 2
    torch.testing.assert_close(gradients(model), want)
    torch.testing.assert_close(loss, oracle.loss(oracle.start()).detach())
    assert n == (batch[1] != -100).sum() and len(losses) == 2 and losses[0] == loss


def check_pgd(method, steps, step_size, epsilon, shape=(3, 5, 6, 0)):
    model, *batch = example(*shape)
    oracle = Oracle(model, *batch)
    loss, n = method(backward_on(model, *batch), model.embedding, epsilon, step_size, steps)
    delta = oracle.start()
    for seen in model.seen:
        torch.testing.assert_close(seen - model.seen[0], delta)
        last, delta = delta, oracle.step(delta, step_size, epsilon)
        assert (norms(seen - model.seen[0]) <= epsilon + 1e-9).all()
    assert len(model.seen) == steps + 1
    want = (oracle.gradient(oracle.start()) + oracle.gradient(last)) / 2
    torch.testing.assert_close(gradients(model), want)
    torch.testing.assert_close(loss, oracle.loss(oracle.start()).detach())
    assert n == (batch[1] != -100).sum()


@given(shapes, st.integers(1, 4), st.floats(0, 2), st.floats(0, 3))
def test_pgd(shape, steps, step_size, epsilon):
    check_pgd(pgd, steps, step_size, epsilon, shape)


def test_trap_the_search_leaves_gradients_behind():
    """Trap: a search step that also adds its gradient, as a plain call of backward would."""

    def leaky(backward, embedding, epsilon, step_size, steps):
        class Leaky:
            used = True

            def __init__(self, inputs):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minimal.adversarial._OnlyTo", Leaky)
            return pgd(backward, embedding, epsilon, step_size, steps)

    check_pgd(leaky, 1, 0.5, 1.0)  # a single step has none of it
    check_pgd(pgd, 3, 0.5, 1.0)
    with pytest.raises(AssertionError):
        check_pgd(leaky, 3, 0.5, 1.0)


@given(shapes, st.integers(1, 4), st.floats(0, 2), st.floats(0.01, 3))
def test_free_lb(shape, steps, step_size, epsilon):
    model, *batch = example(*shape)
    oracle = Oracle(model, *batch)
    loss, n = free_lb(backward_on(model, *batch), model.embedding, epsilon, step_size, steps)
    plain = model.embedding(batch[0]).detach()
    delta = model.seen[0] - plain
    T, C = delta.shape[1:]
    assert 0 < delta.abs().max() <= epsilon / math.sqrt(T * C) + 1e-12
    want, total = 0.0, 0.0
    for seen in model.seen:
        torch.testing.assert_close(seen - plain, delta, rtol=1e-6, atol=1e-9)
        assert (norms(seen - plain) <= epsilon + 1e-9).all()
        want, total = want + oracle.gradient(delta) / steps, total + oracle.loss(delta).item() / steps
        delta = oracle.step(delta, step_size, epsilon)
    assert len(model.seen) == steps
    torch.testing.assert_close(gradients(model), want, rtol=1e-6, atol=1e-8)
    assert abs(loss - total) < 1e-6 * max(1, total) and n == (batch[1] != -100).sum()


def test_free_lb_starts_at_random_from_torchs_generator():
    starts = []
    for seed in (1, 1, 2):
        model, *batch = example(4, 6, 50)
        torch.manual_seed(seed)
        free_lb(backward_on(model, *batch), model.embedding, 2.0, 0.0, 2)
        assert torch.equal(model.seen[0], model.seen[1]), "a step of size 0 moved"
        starts.append(model.seen[0] - model.embedding(batch[0]).detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert (norms(starts[0]) / (2.0 / math.sqrt(3)) - 1).abs().max() < 0.1  # uniform: the variance is a third
    assert abs(starts[0].mean()) < 0.02 and starts[0].min() < 0 < starts[0].max()


# ---- Closed forms, and how the methods relate ----


@given(st.floats(1e-7, 1e-5), st.integers(0, 99))
def test_the_loss_rises_by_epsilon_times_the_norm(epsilon, seed):
    model, *batch = example(1, 6, 6, seed)
    losses, oracle = [], Oracle(model, *batch)
    fgm(backward_on(model, *batch, losses=losses), model.embedding, epsilon)
    norm = oracle.g(oracle.start()).norm().item()
    assert abs((losses[1] - losses[0]) / (epsilon * norm) - 1) < 1e-2


def test_pgd_reaches_the_maximum_of_a_linear_model():
    """L = sum_b <w_b, e_b + delta_b> is largest in the ball at epsilon ||w_b|| more, wherever the steps end."""
    embedding, w, ids = nn.Embedding(V, 4).double(), torch.randn(3, 5, 4).double(), torch.randint(V, (3, 5))
    for steps, step_size, reached in ((1, 5.0, 2.0), (4, 0.5, 2.0), (7, 0.9, 2.0), (3, 0.5, 1.5)):
        losses = []

        def backward(weight, losses=losses):
            loss = (w * embedding(ids)).sum()
            (weight * loss).backward()
            losses.append(loss.item())
            return loss.detach(), 3

        pgd(backward, embedding, 2.0, step_size, steps)
        assert abs(losses[-1] - losses[0] - reached * norms(w).sum()) < 1e-9
        assert all(b > a - 1e-9 for a, b in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("method", [pgd, free_lb])
def test_the_step_grows_with_epsilon(method):
    """By default 1.5 epsilon / steps. The trap is a fixed one: 3 steps of 0.4 never get as far as an epsilon of 5, and
    the first already leaves a ball of 0.05."""
    for steps in (1, 2, 3, 5):
        reached = {}
        for epsilon in (0.05, 1.0, 5.0):
            one, other = example(), example()
            for (model, *batch), settings in ((one, {}), (other, {"step_size": 1.5 * epsilon / steps})):
                torch.manual_seed(1)
                method(backward_on(model, *batch), model.embedding, epsilon, steps=steps, **settings)
            assert all(map(torch.equal, one[0].seen, other[0].seen))
            moved = [norms(seen - F.embedding(one[1], one[0].embedding.weight)) for seen in one[0].seen]
            reached[epsilon] = (torch.stack(moved).detach() / epsilon)[:, (one[2] != -100).any(1)]  # (passes, rows)
            assert (reached[epsilon] <= 1 + 1e-9).all()
            if method is pgd:  # the first step goes as far in every ball
                first = torch.full_like(reached[epsilon][1], min(1, 1.5 / steps))
                torch.testing.assert_close(reached[epsilon][1], first)
            if steps > 1:
                assert (reached[epsilon][-1] > 0.5).all()
        if method is pgd and steps == 3:
            fixed, *batch = example()
            pgd(backward_on(fixed, *batch), fixed.embedding, 5.0, 0.4, 3)
            assert (norms(fixed.seen[-1] - fixed.seen[0]) <= 1.2 + 1e-9).all()
    embedding, w, ids = nn.Embedding(V, 4).double(), torch.randn(3, 5, 4).double(), torch.randint(V, (3, 5))
    for epsilon in (0.1, 3.0):  # where the gradient never turns, the end is the boundary
        seen = []

        def backward(weight, seen=seen):
            e = embedding(ids)
            seen.append(e.detach())
            (weight * (w * e).sum()).backward()
            return torch.zeros(()), 3

        pgd(backward, embedding, epsilon)
        torch.testing.assert_close(norms(seen[-1] - seen[0]), torch.full((3,), epsilon, dtype=torch.float64))


def run(method, *settings, seed=0, **changes):
    model, *batch = example(seed=seed, **changes)
    torch.manual_seed(5)
    loss, n = method(backward_on(model, *batch), model.embedding, *settings)
    return gradients(model), loss


def test_relations():
    for seed in range(3):
        assert all(map(torch.equal, run(fgm, 0.7, seed=seed), run(pgd, 0.7, 0.7, 1, seed=seed)))
        torch.testing.assert_close(run(fgm, 0.7, seed=seed), run(pgd, 0.7, None, 1, seed=seed))  # so is the default
        torch.testing.assert_close(run(fgm, 0.7, seed=seed), run(pgd, 0.7, 99.0, 1, seed=seed))  # projected back
        model, *batch = example(seed=seed)
        backward_on(model, *batch)(1.0)
        plain = gradients(model)
        assert torch.equal(run(fgm, 0.0, seed=seed)[0], plain)
        torch.testing.assert_close(run(pgd, 1.0, 0.0, 3, seed=seed)[0], plain)
        torch.testing.assert_close(run(free_lb, 0.0, 0.5, 3, seed=seed)[0], plain)
        assert (run(pgd, 0.7, 0.5, 3, seed=seed)[0] - plain).norm() > 1e-3 * plain.norm()
    # One step of FreeLB is a pass at a random point; more steps climb from it.
    assert run(free_lb, 1.0, 0.5, 3)[1] > run(free_lb, 1.0, 0.5, 1)[1]


# ---- Microbatches, weights, hooks ----


def check_splits(method, parts, seed=0):
    model, ids, targets = example(sum(parts), 5, 6, seed)

    def gradient(sizes):
        model.zero_grad()
        for batch in zip(ids.split(sizes), targets.split(sizes), strict=True):
            method(backward_on(model, *batch), model.embedding)
        return gradients(model)

    whole = gradient([len(ids)])
    assert (gradient(parts) - whole).norm() <= 1e-12 * whole.norm()


methods = {"fgm": fgm, "pgd": pgd}


@given(st.sampled_from(sorted(methods)), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_every_split_into_microbatches_gives_the_same(name, parts, seed):
    """Also what was in .grad before stays: the microbatches add up in it."""
    check_splits(methods[name], parts, seed)


def fgm_on_the_weight(backward, embedding, epsilon=1.0):
    """Trap: the code that circulates, which moves the matrix by the gradient of the whole batch."""
    weight = embedding.weight
    before = None if weight.grad is None else weight.grad.clone()
    clean = backward(0.5)
    g, backup = weight.grad - (0 if before is None else before), weight.data.clone()
    weight.data.add_(epsilon * g / g.norm())
    backward(0.5)
    weight.data = backup
    return clean


def test_trap_moving_the_weight_depends_on_the_split_and_moves_the_head():
    check_splits(fgm, [1, 2])
    with pytest.raises(AssertionError):
        check_splits(fgm_on_the_weight, [1, 2])
    for method in (fgm, pgd, free_lb, fgm_on_the_weight):
        model, *batch = example()
        heads, backward = [], backward_on(model, *batch)

        def spy(weight, model=model, heads=heads, backward=backward):
            heads.append(model.embedding.weight.detach().clone())
            return backward(weight)

        method(spy, model.embedding)
        same = all(torch.equal(head, heads[0]) for head in heads)
        assert same == (method is not fgm_on_the_weight)
        assert torch.equal(model.embedding.weight, heads[0])


def test_trap_one_norm_for_the_whole_batch():
    def over_the_batch(backward, embedding, epsilon=1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minimal.adversarial._norm", lambda x, rows: x.norm())
            return fgm(backward, embedding, epsilon)

    with pytest.raises(AssertionError):
        check_splits(over_the_batch, [1, 2])


@pytest.mark.parametrize("method", [fgm, pgd, free_lb])
def test_what_was_there_stays(method):
    model, *batch = example()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    method(backward_on(model, *batch), model.embedding, 0.0)  # with epsilon = 0 nothing is drawn or moved
    plain = gradients(model)
    method(backward_on(model, *batch), model.embedding, 0.0)
    torch.testing.assert_close(gradients(model), 2 * plain)
    method(backward_on(model, *batch), model.embedding)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not model.embedding._forward_hooks
    before = len(model.seen)
    model.loss(*batch)
    assert torch.equal(model.seen[before], F.embedding(batch[0], model.embedding.weight)), "still perturbed"


@pytest.mark.parametrize("method, passes", [(fgm, 2), (pgd, 4), (free_lb, 3)])
def test_a_failing_pass_leaves_no_hook(method, passes):
    for failing in range(passes):
        for before in (True, False):  # before the backward pass, or after it
            model, *batch = example()
            calls, backward, forward = [], backward_on(model, *batch), functools.partial(model.loss, *batch)

            def broken(weight, calls=calls, backward=backward, forward=forward, failing=failing, before=before):
                calls.append(weight)
                if len(calls) - 1 < failing:
                    return backward(weight)
                forward() if before else backward(weight)
                raise RuntimeError("out of memory")

            with pytest.raises(RuntimeError, match="out of memory"):
                method(broken, model.embedding)
            assert len(calls) == failing + 1 and not model.embedding._forward_hooks
            model.zero_grad()
            backward(1.0)  # and no mode that would keep gradients from the parameters
            assert all(p.grad is not None for p in model.parameters())


def test_weights_of_the_passes_sum_to_one():
    for method, want in ((fgm, [0.5, 0.5]), (pgd, [0.5] * 4), (free_lb, [1 / 3] * 3)):
        model, *batch = example()
        seen, backward = [], backward_on(model, *batch)

        def spy(weight, seen=seen, backward=backward):
            seen.append(weight)
            return backward(weight)

        method(spy, model.embedding)
        assert seen == want


# ---- Awkward models and gradients ----


@pytest.mark.parametrize("method", [fgm, pgd, free_lb])
def test_frozen_weights(method):
    """Frozen embedding, and everything frozen but one bias: delta alone carries the gradient back to the tokens."""
    all_free, *batch = example()
    torch.manual_seed(1)
    method(backward_on(all_free, *batch), all_free.embedding)
    model, *batch = example()
    model.requires_grad_(False)
    model.inner.bias.requires_grad_(True)
    torch.manual_seed(1)
    method(backward_on(model, *batch), model.embedding)
    assert torch.equal(model.inner.bias.grad, all_free.inner.bias.grad)
    assert model.embedding.weight.grad is None and not model.embedding.weight.requires_grad
    for ours, theirs in zip(model.seen, all_free.seen, strict=True):
        assert torch.equal(ours, theirs)


def test_an_embedding_called_twice_has_two_perturbations():
    """As a shared embedding of encoder and decoder: each call has its own, of its own shape, in the order of calls."""
    model, ids, targets = example(twice=True)
    W, other = model.embedding.weight, ids.flip(1)[:, 1:]

    def loss(a, b):
        z = model.after(F.embedding(ids, W) + b, ids, F.embedding(other, W) + a)
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum")

    a = torch.zeros(3, 4, 6, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(3, 5, 6, dtype=torch.float64, requires_grad=True)
    g_a, g_b = torch.autograd.grad(loss(a, b), (a, b))
    d_a, d_b = 0.8 * unit(g_a), 0.8 * unit(g_b)
    total = loss(a.detach(), b.detach()) / 2 + loss(d_a, d_b) / 2
    want = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    fgm(backward_on(model, ids, targets), model.embedding, 0.8)
    torch.testing.assert_close(gradients(model), want)
    torch.testing.assert_close(model.seen[2] - model.seen[0], d_a)
    torch.testing.assert_close(model.seen[3] - model.seen[1], d_b)
    for method in (pgd, free_lb):
        model.seen.clear()
        method(backward_on(model, ids, targets), model.embedding, 0.8, 0.5, 3)
        for first, second in zip(model.seen[::2], model.seen[1::2], strict=True):
            assert (norms(first - F.embedding(other, W)) <= 0.8 + 1e-9).all()
            assert (norms(second - F.embedding(ids, W)) <= 0.8 + 1e-9).all()


@pytest.mark.parametrize("method", [fgm, pgd, free_lb])
def test_an_example_without_a_gradient(method):
    model, ids, targets = example()
    targets[1] = -100  # nothing to learn from this one
    method(backward_on(model, ids, targets), model.embedding)
    assert gradients(model).isfinite().all() and all(seen.isfinite().all() for seen in model.seen)
    if method is not free_lb:
        assert all(torch.equal(seen[1], model.seen[0][1]) for seen in model.seen)
        assert not torch.equal(model.seen[-1][0], model.seen[0][0])
    model.zero_grad()
    loss, n = method(backward_on(model, ids, torch.full_like(targets, -100)), model.embedding)
    assert loss == 0 and n == 0 and (gradients(model) == 0).all()


def test_padding_changes_nothing():
    """Of FGM and PGD: an example's perturbation is as long, and the same, however far it is padded."""
    for method in (fgm, pgd):
        model, ids, targets = example(2, 4)
        method(backward_on(model, ids, targets), model.embedding)
        want, before = gradients(model), list(model.seen)
        model.zero_grad()
        model.seen.clear()
        padded = F.pad(ids, (0, 3)), F.pad(targets, (0, 3), value=-100)  # causal: what comes after has no influence
        method(backward_on(model, *padded), model.embedding)
        torch.testing.assert_close(gradients(model), want)
        for long, short in zip(model.seen, before, strict=True):
            torch.testing.assert_close(long[:, :4], short)


def test_the_direction_does_not_see_a_scale():
    """As a GradScaler's: also of a scale at which the squares of the gradient would vanish in float32, or overflow."""
    for method in (fgm, pgd):
        plain, seen = None, None
        for scale in (1.0, 2.0**16, 2.0**-100, 2.0**90):
            model, *batch = example(dtype=torch.float32)
            method(backward_on(model, *batch, scale=scale), model.embedding, 0.9)
            if plain is None:
                plain, seen = gradients(model), model.seen
                assert (norms(seen[-1] - seen[0]) > 0.5)[(batch[1] != -100).any(1)].all()
            torch.testing.assert_close(gradients(model) / scale, plain)
            for a, b in zip(model.seen, seen, strict=True):
                torch.testing.assert_close(a, b)


def test_an_overflow_perturbs_nothing():
    model, *batch = example(dtype=torch.float32)
    fgm(backward_on(model, *batch, scale=math.inf), model.embedding)
    assert torch.equal(model.seen[0], model.seen[1])
    assert not gradients(model).isfinite().all()  # by which a scaler knows that it has to skip the step


def test_with_a_grad_scaler_and_bfloat16_autocast():
    exact = run(pgd, dtype=torch.float32)[0]
    model, *batch = example(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def backward(weight):
        with torch.autocast("cpu", torch.bfloat16):
            loss, n = model.loss(*batch)
        scaler.scale(weight * loss).backward()
        return loss.detach(), n

    pgd(backward, model.embedding)
    scaler.unscale_(optimizer)
    assert (gradients(model) - exact).norm() < 0.05 * exact.norm()


def test_bfloat16_weights():
    """The norm is bounded in float32; what is added is rounded once."""
    model, *batch = example(4, 6, 32, dtype=torch.bfloat16)
    fgm(backward_on(model, *batch), model.embedding, 3.0)
    clean, attacked = model.seen
    assert attacked.dtype == torch.bfloat16 and gradients(model).isfinite().all()
    moved = norms(attacked.double() - clean.double())
    assert ((moved / 3.0 - 1).abs() < 0.02)[(batch[1] != -100).any(1)].all()


def test_on_a_gpt_with_its_tied_head():
    model = GPT(GPTConfig(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, dropout=0.0)).double()
    ids, losses = torch.randint(13, (3, 8)), []
    e = model.transformer.wte

    def backward(weight):
        loss, n = model.loss(ids)
        (weight * loss).backward()
        losses.append(loss.item())
        return loss.detach(), n

    loss, n = fgm(backward, e, 1e-4)
    want = model.loss(ids)
    assert loss == want[0] and n == want[1] == 21 and losses[1] > losses[0]
    zero = torch.zeros(3, 7, 16, dtype=torch.float64, requires_grad=True)
    handle = e.register_forward_hook(lambda module, args, out: out + zero)
    g = torch.autograd.grad(model.loss(ids)[0], zero)[0]
    handle.remove()
    assert abs((losses[1] - losses[0]) / (1e-4 * norms(g).sum()) - 1) < 1e-2
    for method in (pgd, free_lb):
        losses.clear()
        method(backward, e, 0.5, 0.2, 3)
        assert losses == sorted(losses) and losses[0] < losses[-1]


def test_on_an_encoder_decoder_and_r_drop_on_it():
    """One embedding for source, target and head; in parts with padding of their own, FGM gives the same gradient."""
    sizes = dict(vocab_size=13, d_model=16, n_head=2, n_encoder=1, n_decoder=1, d_ff=32, max_len=9)
    model = Transformer(TransformerConfig(**sizes, dropout=0.0)).double()
    source, target = torch.randint(1, 13, (3, 9)), torch.randint(1, 13, (3, 7))
    real = torch.arange(9) < torch.tensor([[4], [9], [6]])
    labels = target.masked_fill(torch.arange(7) >= torch.tensor([[5], [3], [7]]), -100)

    def gradient(*parts):
        model.zero_grad()
        for rows, length in parts:
            batch = source[rows, :length], target[rows], real[rows, :length], labels[rows]
            fgm(backward_on(model, *batch), model.embedding, 0.5)
        assert not model.embedding._forward_hooks
        return gradients(model)

    whole, split = gradient((slice(3), 9)), gradient((slice(1), 4), (slice(1, 3), 9))
    assert (split - whole).norm() < 1e-12 * whole.norm()
    plain, n = model.loss(source, target, real, labels)
    loss, count = r_drop(lambda: model.outputs(source, target, real, labels))
    torch.testing.assert_close(loss, plain)
    model.config.dropout = 0.3
    dropped, _ = r_drop(lambda: model.train().outputs(source, target, real, labels), alpha=0.0)
    more, _ = r_drop(lambda: model.train().outputs(source, target, real, labels), alpha=50.0)
    assert n == count == 12 and dropped != plain and more > 2 * dropped


def test_errors():
    model, *batch = example()
    backward, e = backward_on(model, *batch), model.embedding

    def other_way(weight):
        loss, n = model.loss(*batch)
        torch.autograd.backward(weight * loss)
        return loss.detach(), n

    sizes = iter((1, 2))

    def growing(weight):
        rows = next(sizes)
        return backward_on(model, *(t.repeat(rows, 1) for t in batch))(weight)

    def calling(*times):
        remaining = iter(times)

        def backward(weight):
            loss = sum((e(batch[0]) ** 2).sum() for _ in range(next(remaining)))
            if isinstance(loss, torch.Tensor):
                (weight * loss).backward()
            return loss, 1

        return backward

    for call, pattern in (
        (lambda: fgm(backward, e, -1), "epsilon = -1: wanted a finite number of at least 0"),
        (lambda: free_lb(backward, e, math.inf), "epsilon = inf: wanted"),
        (lambda: pgd(backward, e, 1.0, math.nan), "step_size = nan: wanted a finite number of at least 0"),
        (lambda: pgd(backward, e, steps=0), "steps = 0: wanted a whole number of at least 1"),
        (lambda: pgd(backward, e, -2), "epsilon = -2: wanted a finite number of at least 0"),
        (lambda: free_lb(backward, e, steps=2.0), "steps = 2.0: wanted a whole number"),
        (lambda: free_lb(backward, e, steps=True), "steps = True: wanted a whole number"),
        (lambda: fgm(backward, e.weight), "embedding is a Parameter: wanted the nn.Embedding of the tokens"),
        (lambda: fgm(backward, nn.Embedding(3, 4)), "embedding was called 0 times by backward: wanted the one that"),
        (lambda: pgd(calling(2, 1), e), "embedding was called 1 times by backward: .* as often in each pass"),
        (lambda: pgd(calling(1, 2), e), r"call 2 of the embedding gives \(3, 5, 6\): .* as often, in each pass"),
        (lambda: fgm(growing, e), r"call 1 of the embedding gives \(6, 5, 6\): wanted the same microbatch"),
        (lambda: pgd(other_way, e), "backward did not call Tensor.backward: wanted"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value) and not e._forward_hooks
    pgd(other_way, e, steps=1)  # which needs no search of its own


# ---- R-Drop ----


def two_passes(N=7, seed=0):
    torch.manual_seed(seed)
    first, second = (2 * torch.randn(N, V, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -100)
    targets[0] = 3
    return first.requires_grad_(), second.requires_grad_(), targets


def outputs_of(first, second, targets):
    passes = iter((first, second))
    return lambda: (next(passes), targets, None)


@given(st.integers(1, 9), st.floats(0, 5), st.floats(0, 0.5), st.integers(0, 99))
def test_r_drop_against_kl_div(N, alpha, smoothing, seed):
    first, second, targets = two_passes(N, seed)
    loss, n = r_drop(outputs_of(first, second, targets), alpha, smoothing)
    hard = [F.cross_entropy(z, targets, reduction="sum", label_smoothing=smoothing) for z in (first, second)]
    p, q = (z[targets != -100].log_softmax(1) for z in (first, second))
    kl = F.kl_div(q, p, reduction="sum", log_target=True) + F.kl_div(p, q, reduction="sum", log_target=True)
    want = sum(hard) / 2 + alpha / 2 * kl
    torch.testing.assert_close(loss, want)
    assert n.dtype == torch.int64 and n.dim() == 0 and n == (targets != -100).sum()
    ours = torch.autograd.grad(loss, (first, second))
    theirs = torch.autograd.grad(want, (first, second))
    for a, b in zip(ours, theirs, strict=True):  # both passes learn
        torch.testing.assert_close(a, b)
        assert (a[targets == -100] == 0).all()


def test_r_drop_by_hand():
    """Two classes, (1/4, 3/4) and (1/2, 1/2): KL one way is 1/4 ln 1/2 + 3/4 ln 3/2, the other 1/2 ln 4/3."""
    first, second = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    loss, n = r_drop(outputs_of(first, second, torch.tensor([1])), alpha=3.0)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5) + 0.5 * math.log(4 / 3)
    assert n == 1 and abs(loss - ((math.log(4 / 3) + math.log(2)) / 2 + 3 / 2 * kl)) < 1e-6


def test_r_drop_without_dropout_is_the_plain_loss():
    first, _, targets = two_passes()
    for smoothing in (0.0, 0.2):
        loss, _ = r_drop(outputs_of(first, first, targets), 5.0, smoothing)
        torch.testing.assert_close(loss, F.cross_entropy(first, targets, reduction="sum", label_smoothing=smoothing))
    loss, n = r_drop(outputs_of(first, first, torch.full_like(targets, -100)))
    loss.backward()
    assert loss == 0 and n == 0 and (first.grad == 0).all()


def test_r_drop_is_a_sum_over_rows():
    first, second, targets = two_passes(9)
    whole, n = r_drop(outputs_of(first, second, targets))
    parts = [r_drop(outputs_of(first[rows], second[rows], targets[rows])) for rows in (slice(0, 2), slice(2, 9))]
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts))
    assert n == sum(count for _, count in parts)
    half, _ = r_drop(outputs_of(first.bfloat16(), second.bfloat16(), targets))
    assert half.dtype == torch.float32 and abs(half / whole - 1) < 0.02


def test_r_drop_errors():
    first, second, targets = two_passes()
    passes = iter(((first, targets, None), (second, targets + 1, None)))
    for call, pattern in (
        (lambda: r_drop(outputs_of(first, second, targets), -1.0), "alpha = -1.0: wanted a finite number"),
        (lambda: r_drop(outputs_of(first, second, targets), label_smoothing=2), "label_smoothing = 2: wanted"),
        (lambda: r_drop(lambda: next(passes)), "targets of the two passes differ"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- EDA ----

texts = st.lists(st.integers(0, 50), max_size=40)
shares = st.floats(0, 1)
MASK = -1


def acts(share, text):
    return math.floor(share * len(text) + 0.5)


@given(texts, shares, st.integers(0, 99))
def test_swapping_keeps_the_tokens(text, share, seed):
    before = list(text)
    out = augment(text, MASK, random.Random(seed), swap=share, delete=0, mask=0)
    assert text == before and out is not text, "the argument itself was changed"
    assert collections.Counter(out) == collections.Counter(text)
    if share == 0:
        assert out == text


def test_a_swap_moves_exactly_two():
    for seed in range(50):
        out = augment(range(10), MASK, random.Random(seed), swap=0.14, delete=0, mask=0)
        assert sum(a != b for a, b in enumerate(out)) == 2


@given(texts, shares, st.integers(0, 99))
def test_deleting_keeps_the_order_and_one_token(text, share, seed):
    marked = list(enumerate(text))
    out = augment(marked, MASK, random.Random(seed), swap=0, delete=share, mask=0)
    assert len(out) == max(len(text) - acts(share, text), min(1, len(text)))
    assert out == sorted(set(out)) and set(out) <= set(marked)


@given(texts, shares, st.integers(0, 99))
def test_masking_keeps_the_rest_where_it_is(text, share, seed):
    out = augment(text, MASK, random.Random(seed), swap=0, delete=0, mask=share)
    assert len(out) == len(text) and all(b in (a, MASK) for a, b in zip(text, out, strict=True))
    assert out.count(MASK) == min(acts(share, text), max(len(text) - 1, 0))


@given(texts, shares, shares, shares, st.integers(0, 99))
def test_all_three_are_reproducible(text, swap, delete, mask, seed):
    outs = [augment(text, MASK, random.Random(seed), swap, delete, mask) for _ in range(2)]
    assert outs[0] == outs[1] and bool(outs[0]) == bool(text)
    assert not text or any(token != MASK for token in outs[0])


def test_a_short_text_keeps_its_tokens():
    """A tenth of less than 5 tokens is nearer to none than to one. The trap is EDA's max(1, ...), by which a text of
    two tokens always loses one, and a text of one cannot."""
    for n in range(1, 5):
        for seed in range(20):
            assert augment(range(n), MASK, random.Random(seed)) == list(range(n))
    for n, changed in ((5, 1), (14, 1), (15, 2), (24, 2), (25, 3)):
        out = augment(range(n), MASK, random.Random(n), swap=0, delete=0.1, mask=0)
        assert len(out) == n - changed
        out = augment(range(n), MASK, random.Random(n), swap=0, delete=0, mask=0.1)
        assert out.count(MASK) == changed
    assert len(augment("ab", MASK, random.Random(0), delete=0.5)) == 1  # who asks for half of two gets it


def test_every_place_is_reached():
    deleted, masked, swapped, rng = set(), set(), set(), random.Random(0)
    for _ in range(300):
        deleted |= set(range(8)) - set(augment(range(8), MASK, rng, 0, 0.1, 0))
        masked.add(augment(range(8), MASK, rng, 0, 0, 0.1).index(MASK))
        out = augment(range(8), MASK, rng, 0.1, 0, 0)
        swapped.add(tuple(i for i in range(8) if out[i] != i))
    assert deleted == masked == set(range(8)) and len(swapped) == 28  # 8 * 7 / 2 pairs


def test_augment_errors():
    for changes, pattern in (({"swap": -0.1}, "swap = -0.1: wanted a share from 0 to 1"),
                             ({"delete": 1.5}, "delete = 1.5"), ({"mask": math.nan}, "mask = nan")):  # fmt: skip
        with pytest.raises(ValueError, match=pattern):
            augment([1, 2], MASK, random.Random(0), **changes)
