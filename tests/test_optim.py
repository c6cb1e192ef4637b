# SPDX-License-Identifier: MIT
"""Optimisers against torch.optim, an exact SVD and closed forms; each wrong variant is written out and must fail."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimal.optim import (
    SGD,
    Adam,
    AdamW,
    Muon,
    cosine_schedule,
    decay_groups,
    muon_groups,
    orthogonalise,
    transformer_schedule,
)

torch.set_num_threads(1)

SHAPES = [(), (1,), (7,), (3, 5), (5, 3), (2, 3, 4), (0,), (0, 4)]
MATRICES = [(1, 1), (1, 6), (6, 1), (4, 4), (3, 8), (8, 3)]
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31 - 1)
fractions = st.floats(0.0, 0.999)
pairs = st.tuples(fractions, fractions)
decays = st.sampled_from([0.0, 0.01, 0.3])


def parameters(shapes, dtype, seed):
    """The same parameters twice; every second matrix with strides of a transposed one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors = [x.T.contiguous().T if i % 2 and x.ndim == 2 else x for i, x in enumerate(tensors)]
    return [nn.Parameter(x.clone()) for x in tensors], [nn.Parameter(x.clone()) for x in tensors], generator


def march(ours, theirs, optimizer, reference, generator, steps=12, missing=0.3):
    """The same random gradients to both, some of them missing at some steps; asserts equality after every step."""
    for step in range(steps):
        for p, q in zip(ours, theirs, strict=True):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 10 ** (step % 3 - 1)
            absent = torch.rand((), generator=generator) < missing
            p.grad, q.grad = (None, None) if absent else (grad, grad.clone())
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            group["lr"] = other["lr"] = group["lr"] * 0.9  # a schedule must take effect at once
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q)


def close(a, b):
    tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- against torch.optim


@given(shapes, dtypes, seeds, st.floats(0, 0.5), st.one_of(st.just(0.0), fractions), st.booleans(), decays)
def test_sgd_equals_torch(shapes, dtype, seed, lr, momentum, nesterov, weight_decay):
    settings = dict(lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay)
    ours, theirs, generator = parameters(shapes, dtype, seed)
    march(ours, theirs, SGD(ours, **settings), torch.optim.SGD(theirs, **settings), generator)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@given(shapes, dtypes, seeds, st.floats(0, 0.5), pairs, st.sampled_from([0, 1e-8, 0.1]), decays)
def test_adam_equals_torch(name, shapes, dtype, seed, lr, betas, eps, weight_decay):
    settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    ours, theirs, generator = parameters(shapes, dtype, seed)
    make, reference = {"Adam": (Adam, torch.optim.Adam), "AdamW": (AdamW, torch.optim.AdamW)}[name]
    march(ours, theirs, make(ours, **settings), reference(theirs, **settings, foreach=False), generator)


def test_defaults_equal_torch():
    p = [nn.Parameter(torch.ones(2))]
    for ours, theirs in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)):
        mine, reference = ours(p).defaults, theirs(p).defaults
        assert mine == {key: reference[key] for key in mine}


@given(
    st.lists(st.sampled_from(MATRICES), min_size=1, max_size=3),
    seeds,
    st.sampled_from([1e-3, 0.02, 0.5]),
    fractions,
    st.sampled_from([0.0, 0.1]),
)
def test_muon_equals_torch_but_for_rounding(shapes, seed, lr, momentum, weight_decay):
    """torch.optim.Muon iterates in bfloat16, we in the parameters' dtype: equal to a few per cent of the update."""
    ours, theirs, generator = parameters(shapes, torch.float32, seed)
    optimizer = Muon(ours, lr=lr, momentum=momentum, weight_decay=weight_decay)
    reference = torch.optim.Muon(
        theirs, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            moved = 0.2 * lr * max(p.shape) ** 0.5 * min(p.shape) ** 0.5  # the norm of an exactly orthogonal update
            # A singular value that is nearly zero is another one in bfloat16, and is brought to the size of the others.
            sizes = torch.linalg.svdvals(p.grad.lerp(optimizer.state[p]["momentum_buffer"], momentum))
            allowed = 0.15 if sizes[-1] > sizes[0] / 100 else 0.6  # the largest of 15,000: 0.062 and 0.30
            assert (p - q).norm() <= allowed * moved + 1e-6
            assert (p - old).norm() >= 0.5 * moved - 0.1 * lr * old.norm()  # so that the line above can fail
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])
            with torch.no_grad():  # from equal points again: no accumulation of rounding
                q.copy_(p)


def test_muon_equals_torch_run_in_float64(monkeypatch):
    """The same algorithm exactly: with the reference's rounding to bfloat16 taken out, the two agree to 1e-12."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    ours, theirs, generator = parameters(MATRICES, torch.float64, 1)
    optimizer, reference = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn="match_rms_adamw")
    march(ours, theirs, optimizer, reference, generator)


def test_muons_other_groups_are_adamw():
    ours, theirs, generator = parameters([(4, 3), (4,), (2, 3, 4)], torch.float64, 2)
    settings = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    optimizer = Muon([{"params": ours, "use_muon": False}], **settings)
    march(ours, theirs, optimizer, torch.optim.AdamW(theirs, **settings), generator)


# ------------------------------------------------------------------------------------- orthogonalise against the SVD


def spread_matrix(rows, columns, smallest, seed):
    """A float64 matrix with singular values between `smallest` and 1, and its U, V."""
    torch.manual_seed(seed)
    k = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, k, dtype=torch.float64))[0]
    S = torch.logspace(0, math.log10(smallest), k, dtype=torch.float64)
    return U * S @ V.T, U, S, V


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(1e-3, 1e3), seeds)
def test_orthogonalise_against_the_polar_factor(rows, columns, smallest, size, seed):
    G, U, S, V = spread_matrix(rows, columns, smallest, seed)
    X = orthogonalise(size * G)
    inside = U.T @ X @ V
    # The same singular vectors exactly, and the scalar polynomial, applied five times, on the singular values.
    s = S / S.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(inside, torch.diag(s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(X, U @ inside @ V.T, rtol=1e-9, atol=1e-9)
    # Hence within the known band around the polar factor U V^T.
    assert s.min() > 0.68 and s.max() < 1.21
    assert torch.linalg.matrix_norm(X - U @ V.T, ord=2) < 0.33


def test_orthogonalise_band_and_slope_as_documented():
    s = torch.logspace(math.log10(0.002), 0, 400, dtype=torch.float64)
    rest = (1 - s * s).clamp(min=0).sqrt()  # the other singular value, for a norm of 1
    values = torch.stack([orthogonalise(torch.diag(pair))[0, 0] for pair in torch.stack([s, rest], 1)])
    assert 0.68 < values.min() < 0.69 and 1.20 < values.max() < 1.21
    tiny = orthogonalise(torch.diag(torch.tensor([1e-7, 1.0], dtype=torch.float64)))[0, 0]
    assert tiny == pytest.approx(1e-7 * 3.4445**5, rel=1e-3) and round(3.4445**5) == 485


def test_orthogonalise_dtypes_and_zero():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        G = torch.randn(5, 9).to(dtype)
        X = orthogonalise(G)
        assert X.shape == (5, 9) and X.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_muons_update_has_adamws_root_mean_square():
    """0.2 in root mean square times the mean singular value, 0.85, whatever the shape and the size of the gradient."""
    for shape in [(64, 64), (32, 128), (128, 32), (16, 256)]:
        for size in (1e-4, 1e4):
            p = nn.Parameter(torch.zeros(shape))
            p.grad = size * torch.randn(shape)
            Muon([p], lr=1.0, weight_decay=0.0).step()
            assert p.detach().square().mean().sqrt().item() == pytest.approx(0.17, rel=0.1)


# ------------------------------------------------------------------------------------------- decay (trap 14), groups


class AddNorm(nn.Module):
    """A block that holds a norm, a linear layer, a gain of its own and a bias with two dimensions."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm((3, 4))  # a norm whose gain is a matrix
        self.gain, self.position_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(3, 3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(4, 9, bias=False)  # registered before the embedding it is tied to
        self.embed = nn.Embedding(9, 4)
        self.lm_head.weight = self.embed.weight
        self.block = AddNorm()
        self.conv = nn.Conv1d(4, 4, 3)
        self.rms = nn.RMSNorm(4)
        self.classifier = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


MAY_DECAY = {"block.linear.weight", "conv.weight", "classifier.weight"}


def decayed_names(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    everyone = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in everyone}) == len(everyone) == sum(p.requires_grad for p in model.parameters())
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def test_decay_groups():
    model = Model()
    assert decayed_names(model, decay_groups(model, 0.1)) == MAY_DECAY
    assert decayed_names(model, decay_groups(model, 0.0)) == set()
    optimizer = AdamW(decay_groups(model, 0.5), lr=0.1)  # zero gradients: nothing moves but by decay
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        close(p, before[name] * (0.95 if name in MAY_DECAY else 1.0))


def everything_decays(model, weight_decay):
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]


def matrices_decay(model, weight_decay):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def names_without_norm(model, weight_decay):
    def decays(name):
        return not any(word in name for word in ("norm", "bias", "embed"))

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if decays(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays(name)], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("variant", [everything_decays, matrices_decay, names_without_norm])
def test_decay_groups_rejects(variant):
    """Decay on norms and biases; on a gain that is a matrix; on a tied head or `rms.weight`, by looking at names."""
    model = Model()
    assert decayed_names(model, variant(model, 0.1)) != MAY_DECAY


def test_groups_leave_out_the_empty_and_refuse_the_frozen():
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    with pytest.raises(ValueError, match="^model: Linear has no parameter that requires a gradient$"):
        decay_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_muon_groups(weight_decay):
    model = Model()
    groups = muon_groups(model, weight_decay)
    assert decayed_names(model, groups) == (MAY_DECAY if weight_decay else set())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for g in groups if g["use_muon"] for p in g["params"]} == {"block.linear.weight"}
    optimizer = Muon(groups)
    model.frozen.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    kinds = {names[id(p)]: set(state) for p, state in optimizer.state.items()}
    assert kinds.pop("block.linear.weight") == {"momentum_buffer"}
    assert all(kind == {"step", "exp_avg", "exp_avg_sq"} for kind in kinds.values()) and len(kinds) == 11


def adam_l2(p, m, v, t, grad, lr, beta1, beta2, eps, decay):
    return adam_by_hand(p, m, v, t, grad + decay * p, lr, beta1, beta2, eps, 0.0)


def eps_before_correction(p, m, v, t, grad, lr, beta1, beta2, eps, decay):
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    step = m / (1 - beta1**t) / ((v.sqrt() + eps) / (1 - beta2**t) ** 0.5)
    return (1 - lr * decay) * p - lr * step, m, v


def no_correction(p, m, v, t, grad, lr, beta1, beta2, eps, decay):
    return adam_by_hand(p, m, v, 10**9, grad, lr, beta1, beta2, eps, decay)


def adam_by_hand(p, m, v, t, grad, lr, beta1, beta2, eps, decay):
    """Loshchilov & Hutter 2017, algorithm 2, in the paper's order."""
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@pytest.mark.parametrize("variant", [adam_by_hand, adam_l2, eps_before_correction, no_correction])
def test_adamw_by_hand_and_wrong_variants(variant):
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=0.01, weight_decay=0.3)
    x, m, v = p.detach().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for t in range(1, 6):
        p.grad = torch.randn(3, dtype=torch.float64)
        optimizer.step()
        x, m, v = variant(x, m, v, t, p.grad, 0.1, 0.9, 0.99, 0.01, 0.3)
    assert torch.allclose(p, x, rtol=1e-12, atol=1e-12) == (variant is adam_by_hand)


def test_bias_correction_counts_the_parameters_own_steps():
    """A parameter first used at step 10 takes a full first step of lr; with the optimiser's count it does not."""
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Adam([p, q], lr=0.1)
    for step in range(10):
        p.grad, q.grad = torch.ones(1), torch.ones(1) if step == 9 else None
        optimizer.step()
    assert q.item() == pytest.approx(-0.1, rel=1e-6)
    with_the_optimisers_count = -0.1 * (0.1 / (1 - 0.9**10)) / (0.001 / (1 - 0.999**10)) ** 0.5
    assert with_the_optimisers_count != pytest.approx(-0.1, rel=0.4)


# ------------------------------------------------------------------------------------------------------- checkpoints


def tiny_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randint(5, (6,))), torch.randint(3, (6,))).backward()
        optimizer.step()


MAKERS = {
    "SGD": lambda model: SGD(decay_groups(model, 0.1), lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda model: Adam(model.parameters(), weight_decay=0.1),
    "AdamW": lambda model: AdamW(decay_groups(model, 0.1), lr=0.01),
    "Muon": lambda model: Muon(muon_groups(model, 0.1, heads=("3",)), lr=0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_resuming_is_exact_to_the_bit(name, tmp_path):
    whole = tiny_model()
    train(whole, MAKERS[name](whole), range(9))

    first = tiny_model()
    optimizer = MAKERS[name](first)
    train(first, optimizer, range(4))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(isinstance(value, (torch.Tensor, int, float)) for value in state.values())
    torch.save((first.state_dict(), saved), tmp_path / "state.pt")

    second = tiny_model()
    optimizer = MAKERS[name](second)
    weights, saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    train(second, optimizer, range(4, 9))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)

    third = tiny_model()  # and the check sees a lost state
    third.load_state_dict(weights)
    train(third, MAKERS[name](third), range(4, 9))
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), third.parameters(), strict=True))


def test_state_as_tensors_in_safetensors(tmp_path):
    """Every entry turned into a tensor, as safetensors needs, the step count too: still exact to the bit."""
    from safetensors.torch import load_file, save_file

    whole, model = tiny_model(), tiny_model()
    train(whole, MAKERS["Muon"](whole), range(6))
    optimizer = MAKERS["Muon"](model)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    flat = {f"{i}.{key}": torch.as_tensor(x) for i, state in saved["state"].items() for key, x in state.items()}
    save_file(flat, tmp_path / "optimizer.safetensors")

    optimizer = MAKERS["Muon"](model)
    state = {i: {} for i in saved["state"]}
    for key, x in load_file(tmp_path / "optimizer.safetensors").items():
        state[int(key.split(".")[0])][key.split(".")[1]] = x
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    train(model, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("there_and_back", [True, False])
def test_torchs_fused_adamw_can_take_over(there_and_back):
    def torchs(model):
        return torch.optim.AdamW(decay_groups(model, 0.1), lr=0.01, fused=True)

    whole, model = tiny_model(), tiny_model()
    train(whole, MAKERS["AdamW"](whole), range(8))
    first, second = (MAKERS["AdamW"], torchs) if there_and_back else (torchs, MAKERS["AdamW"])
    optimizer = first(model)
    train(model, optimizer, range(4))
    other = second(model)
    keep = [{key: value for key, value in group.items() if key != "params"} for group in other.param_groups]
    saved = optimizer.state_dict()
    groups = [{**k, "params": g["params"]} for k, g in zip(keep, saved["param_groups"], strict=True)]
    other.load_state_dict({"state": saved["state"], "param_groups": groups})
    train(model, other, range(4, 8))
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_closure_and_unused_parameters():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for optimizer in (SGD([p, q]), Adam([p, q]), AdamW([p, q]), Muon([{"params": [p, q], "use_muon": False}])):

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()  # needs gradients to be on, although step() turns them off
            return loss

        before = p.detach().clone()
        assert optimizer.step(closure).item() == before.square().sum().item()
        assert not torch.equal(p, before) and torch.equal(q, torch.ones(2)) and q not in optimizer.state


# --------------------------------------------------------------------------------------------------------- schedules


def test_cosine_schedule_at_known_points():
    assert [cosine_schedule(s, 100, 4) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine_schedule(52, 100, 4) == pytest.approx(0.55)  # half-way
    assert cosine_schedule(100, 100, 4) == cosine_schedule(10**6, 100, 4) == 0.1
    assert cosine_schedule(99, 100, 4) == pytest.approx(0.1, abs=1e-3)
    assert cosine_schedule(0, 100, 0) == 1.0 and cosine_schedule(5, 5, 5) == 0.1 and cosine_schedule(4, 5, 5) == 5 / 6


@given(st.integers(1, 300), st.data())
def test_cosine_schedule_against_transformers(total, data):
    """Theirs begins with a step of 0; without that step the two are one."""
    warmup = data.draw(st.integers(0, total - 1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, warmup + 1, total + 1).lr_lambdas[0]
    for step in range(total):
        assert cosine_schedule(step, total, warmup, floor=0.0) == pytest.approx(theirs(step + 1), abs=1e-12)


@given(st.integers(1, 100), st.floats(0, 1))
def test_cosine_schedule_against_torch(total, floor):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=floor)
    for step in range(total + 1):
        assert cosine_schedule(step, total, 0, floor) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_transformer_schedule():
    peak = transformer_schedule(3999, 512, 4000)  # the paper's base model
    assert peak == pytest.approx((512 * 4000) ** -0.5) == pytest.approx(6.9877e-4, rel=1e-4)
    assert max(transformer_schedule(s, 512, 4000) for s in range(0, 20000)) == peak
    assert transformer_schedule(0, 512, 4000) == pytest.approx(peak / 4000)
    assert transformer_schedule(15999, 512, 4000) == pytest.approx(peak / 2)


# ------------------------------------------------------------------------------------------------------------ errors

P = [nn.Parameter(torch.ones(2, 2))]
BAD = [
    (lambda: SGD(P, lr=-1), r"SGD: lr must be a number in [0, inf), got -1"),
    (lambda: SGD(P, momentum=1.0), r"SGD: momentum must be a number in [0, 1), got 1.0"),
    (lambda: SGD(P, nesterov=True), r"SGD: nesterov=True needs momentum > 0, got momentum=0"),
    (lambda: Adam(P, lr=math.nan), r"Adam: lr must be a number in [0, inf), got nan"),
    (lambda: Adam(P, lr="1e-3"), r"Adam: lr must be a number in [0, inf), got '1e-3'"),
    (lambda: AdamW(P, lr=math.inf), r"AdamW: lr must be a number in [0, inf), got inf"),
    (lambda: AdamW(P, betas=(0.9, 1.0)), r"AdamW: betas must be a pair of numbers in [0, 1), got (0.9, 1.0)"),
    (lambda: AdamW(P, betas=(-0.1, 0.9)), r"AdamW: betas must be a pair of numbers in [0, 1), got (-0.1, 0.9)"),
    (lambda: AdamW(P, betas=0.9), r"AdamW: betas must be a pair of numbers in [0, 1), got 0.9"),
    (lambda: AdamW(P, betas=(0.9,)), r"AdamW: betas must be a pair of numbers in [0, 1), got (0.9,)"),
    (lambda: AdamW(P, eps=-1e-8), r"AdamW: eps must be a number in [0, inf), got -1e-08"),
    (
        lambda: AdamW([{"params": P, "weight_decay": -1}]),
        r"AdamW: weight_decay must be a number in [0, inf), got -1",
    ),
    (lambda: Muon(P, momentum=-0.1), r"Muon: momentum must be a number in [0, 1), got -0.1"),
    (
        lambda: Muon([nn.Parameter(torch.ones(3))]),
        r"Muon: use_muon=True needs matrices (see muon_groups), got shape (3,)",
    ),
    (
        lambda: cosine_schedule(-1, 10, 2),
        "cosine_schedule: wanted step >= 0, 0 <= warmup <= total and 0 <= floor <= 1, "
        "got step=-1, total=10, warmup=2, floor=0.1",
    ),
    (
        lambda: cosine_schedule(1, 10, 11, 0.0),
        "cosine_schedule: wanted step >= 0, 0 <= warmup <= total and 0 <= floor <= 1, "
        "got step=1, total=10, warmup=11, floor=0.0",
    ),
    (
        lambda: transformer_schedule(0, 512, 0),
        "transformer_schedule: step=0, d_model=512, warmup=0 must be at least 0, 1 and 1",
    ),
]


@pytest.mark.parametrize("call, message", BAD)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_complex_and_sparse_are_refused():
    with pytest.raises(TypeError, match=r"^Adam: parameters must be real .* torch.complex64 of shape \(2,\)$"):
        Adam([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    table = nn.Embedding(4, 3, sparse=True)
    for optimizer in (SGD(table.parameters()), AdamW(table.parameters()), Muon(table.parameters())):
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match=r"gradients must be dense, got torch.sparse_coo for shape \(4, 3\)$"):
            optimizer.step()


def test_no_optimiser_imports_the_compiler():
    """PyTorch's own do with their first parameters, which a script of seconds would wait for."""
    code = """if True:
        import sys, torch
        from minimal.optim import SGD, Adam, AdamW, Muon
        for make in SGD, Adam, AdamW, Muon:
            p = torch.nn.Parameter(torch.ones(2, 2))
            p.grad = torch.ones(2, 2)
            optimizer = make([p], lr=0.1)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            assert p.grad is None and "torch._dynamo" not in sys.modules, make
        torch.optim.SGD([p])
        assert "torch._dynamo" in sys.modules, "PyTorch's no longer does: our wrapper can go"
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
