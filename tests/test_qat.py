# SPDX-License-Identifier: MIT
"""Training with rounded weights: torch's own fake quantisation, and its gradients, are the oracle."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimal import calibrate, quant
from minimal.bert import BERT, BERTConfig
from minimal.gpt import GPT, GPTConfig
from minimal.llama import Llama, LlamaConfig
from minimal.qat import Rounded, convert, prepare, straight_through

IDS = torch.arange(14).reshape(2, 7) * 5 % 48
BITS = [2, 3, 4, 8]


def gpt():
    return GPT(GPTConfig(48, n_positions=16, n_embd=32, n_layer=2, n_head=2, dropout=0.0))


def llama():
    return Llama(LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16))  # fmt: skip


def bert():
    return BERT(BERTConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=16)).eval()  # fmt: skip


def torch_s(x, scale, least, bits):
    """x (N, n) by torch: with 0 for zero point, so what lies between is shifted before and after."""
    if bits == 8:
        return torch.fake_quantize_per_channel_affine(
            x, scale, torch.zeros_like(scale, dtype=torch.int32), 0, -127, 127
        )
    x, zero = x - least[:, None], torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 2**bits - 1) + least[:, None]


@hypothesis.given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(BITS), st.booleans(), st.integers(0, 99))
def test_values_and_gradients_are_torch_s(O, G, bits, narrow, seed):
    W = torch.randn(O, 32 * G, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    grid = calibrate.percentile(0.9) if narrow else calibrate.minmax  # with numbers that are cut off, and without
    rounded = Rounded(W, bits, False, grid)
    y = rounded(W)
    n = 32 if bits < 8 else 32 * G
    x = W.detach().reshape(-1, n).requires_grad_()
    scale, least = grid(x.detach() if bits < 8 else torch.cat((x, -x), 1).detach(), 2**bits if bits < 8 else 255)
    if bits < 8:
        scale, least = scale.half().float(), least.half().float()
    want = torch_s(x, scale, least, bits)
    grad = torch.randn(O, 32 * G, generator=torch.Generator().manual_seed(seed + 1))
    ours = torch.autograd.grad(y, W, grad)[0]
    theirs = torch.autograd.grad(want, x, grad.view(-1, n))[0].view(O, -1)
    # torch multiplies by 1 / scale: a number in the middle of two levels may go the other way
    v = ((x.detach() - least[:, None]) / scale[:, None]) if bits < 8 else x.detach() / scale[:, None]
    clear = ((v - v.floor() - 0.5).abs() > 1e-3).view(O, -1)
    torch.testing.assert_close(y[clear], want.view(O, -1)[clear], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[clear] != 0, theirs[clear] != 0)
    torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-5, atol=1e-6)
    assert narrow or bits < 8 or (ours != 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_a_learnt_range(bits):
    """LSQ eq. 3, as torch's operator for learnable ranges has it; and the offset's, from what is cut off."""
    W, grad = torch.randn(12, 64), torch.randn(12, 64)
    rounded = Rounded(W, bits, True, calibrate.percentile(0.9))
    rounded(W).backward(grad)
    n = 32 if bits < 8 else 64
    scale, least = (t[..., 0].reshape(-1).detach() for t in rounded.range(rounded.groups(W)))
    x, low, high = W.reshape(-1, n), *((0, 2**bits - 1) if bits < 8 else (-127, 127))
    if bits < 8:
        x = x - least[:, None]
    s = scale.clone().requires_grad_()
    y = torch._fake_quantize_learnable_per_channel_affine(x, s, torch.zeros_like(s), 0, low, high, 1.0)
    y.backward(grad.view(-1, n))
    per_step = s.grad.view_as(rounded.a) * rounded.scale  # da is a share of the scale
    torch.testing.assert_close(rounded.a.grad, per_step, rtol=2e-3, atol=1e-3)
    if bits == 8:
        assert rounded.b is None
    else:
        steps = x / scale[:, None]
        cut = (steps.round() < low) | (steps.round() > high)
        want = (grad.view(-1, n) * cut).sum(1).view_as(rounded.b) * rounded.scale
        torch.testing.assert_close(rounded.b.grad, want, rtol=1e-4, atol=1e-5)
        assert (want != 0).any()


def test_straight_through_gives_the_exact_value():
    x = (torch.randn(1000) * 1e6).requires_grad_()
    y = straight_through(torch.round, x)
    assert torch.equal(y, x.round())  # x + (round(x) - x).detach() would be off
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(1000))


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", [gpt, llama, bert])
def test_convert_and_quantise_change_nothing_more(make, bits, learn):
    model = make()
    run = model.hidden
    plain = copy.deepcopy(model)
    names = prepare(model, bits, learn)
    kind = "int8" if bits == 8 else "int4"
    assert names == quant.quantise(copy.deepcopy(plain), kind)  # the same layers
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        run(IDS).square().sum().backward()
        optimiser.step()
    if learn:
        assert any(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith(".0.a"))
    with torch.no_grad():
        out = run(IDS)
    codes = convert(model)
    assert list(codes) == names and bits == 8 or max(int((h["codes"] & 15).max()) for h in codes.values()) < 2**bits
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(run(IDS), out)
        weights = {n: model.get_submodule(n).weight.clone() for n in names}
        coded = copy.deepcopy(model)
        assert quant.quantise(coded, kind, codes=codes) == names
        assert torch.equal(coded.hidden(IDS), out)
        if bits in (4, 8) and not learn:  # and without the codes: they are found again
            quant.quantise(model, kind)
            for n in names:
                assert torch.equal(model.get_submodule(n).codes, codes[n]["codes"])
                torch.testing.assert_close(model.get_submodule(n).weight, weights[n], rtol=1e-6, atol=0)


def test_weights_that_are_prepared_are_what_quantise_makes():
    for bits, kind in ((8, "int8"), (4, "int4")):
        for C in (32, 50, 100):
            plain = nn.Sequential(nn.Linear(C, 20))
            model = copy.deepcopy(plain)
            prepare(model, bits)
            quant.quantise(plain, kind)
            torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=0, atol=0)
            assert model[0].bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = nn.Sequential(nn.Linear(40, 8)).to(dtype)
    prepare(model, 3, learn=True)
    y = model(torch.randn(2, 40, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype and model[0].parametrizations.weight.original.grad.dtype == dtype
    convert(model)
    assert model[0].weight.dtype == dtype


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_rounding_afterwards(bits):
    """A small GPT that has learnt a text: the same steps with and without knowing of the rounding."""
    torch.manual_seed(0)
    text = "the weights of a model are rounded to a few bits, and it shall not forget what it has learnt of the text."
    letters = sorted(set(text))
    ids = torch.tensor([[letters.index(c) for c in text]])
    model = GPT(GPTConfig(len(letters), n_positions=128, n_embd=32, n_layer=2, n_head=2, dropout=0.0))

    def train(model, steps, lr):
        optimiser = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(steps):
            total, count = model.loss(ids)
            optimiser.zero_grad()
            (total / count).backward()
            optimiser.step()
        with torch.no_grad():
            total, count = model.loss(ids)
        return (total / count).item()

    train(model, 60, 5e-3)
    plain, losses = copy.deepcopy(model), {}
    before = train(plain, 40, 2e-3)
    for learn in (None, False, True):  # None: rounded afterwards
        rounded = copy.deepcopy(plain if learn is None else model)
        prepare(rounded, bits, bool(learn))
        losses[learn] = train(rounded, 0 if learn is None else 40, 2e-3)
    assert losses[False] < losses[None] and losses[True] < losses[None]
    if bits == 2:
        assert losses[False] - before < 0.7 * (losses[None] - before)


def test_what_is_refused():
    for bits in (1, 5, 16, None):
        with pytest.raises(ValueError, match=f"bits={bits} is out of range; wanted 2, 3, 4 or 8"):
            prepare(gpt(), bits)
    model = gpt()
    with pytest.raises(ValueError, match="skip='q_proj' matches no linear layer; wanted some of: transformer.h.0"):
        prepare(model, skip=["c_proj", "q_proj"])
    with pytest.raises(ValueError, match="model=GPT is not prepared; wanted one that prepare was given"):
        convert(model)
    with pytest.raises(ValueError, match="model=ModuleDict has no nn.Linear to prepare"):
        prepare(nn.ModuleDict({"head": nn.Linear(4, 4)}))
    assert len(prepare(model, skip="c_proj")) == 4
    with pytest.raises(ValueError, match="model=GPT is prepared already; wanted convert.model. first"):
        prepare(model)
    assert len(convert(model)) == 4


def test_training_moves_the_weights_below():
    """Updates far smaller than a step of the grid add up, until a code changes."""
    layer = nn.Sequential(nn.Linear(32, 1, bias=False))
    prepare(layer, 2)
    first = layer[0].weight.detach().clone()
    optimiser, x = torch.optim.SGD(layer.parameters(), lr=1e-3), torch.randn(64, 32)
    target = F.linear(x, torch.randn(1, 32))
    moved = []
    for _ in range(300):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
        moved.append(layer[0].weight.detach().unique().numel())
    assert max(moved) <= 4 and not torch.equal(layer[0].weight, first)
    assert (layer(x) - target).square().mean() < (F.linear(x, first) - target).square().mean()
