# SPDX-License-Identifier: MIT
"""minimal/recompute.py against plain calls and torch.utils.checkpoint; what its meter counts against sums by hand."""

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from minimal.bert import BERT, BERTConfig
from minimal.gpt import GPT, GPTConfig
from minimal.llama import Llama, LlamaConfig
from minimal.lora import add_lora, lora_parameters
from minimal.prefix import add_prefix
from minimal.recompute import Meter, add_recompute, memory, recompute, remove_recompute, table
from minimal.transformer import Transformer, TransformerConfig


class Noisy(nn.Module):
    """Two outputs, dropout, an argument by name, one that is no tensor, and a parameter that is not used."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(2, 2)

    def forward(self, x, factor, *, shift=None, sign=1):
        y = nn.functional.dropout(torch.tanh(self.up(x)), 0.5, self.training)
        y = sign * self.down(y) * factor
        return (y if shift is None else y + shift), y.detach().sum()


def gradients(module, call, *leaves):
    torch.manual_seed(3)
    y, _ = call()
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    return y.detach(), torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)


def same(a, b):
    assert torch.equal(a[0], b[0])
    for x, y in zip(a[1], b[1], strict=True):
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_as_the_plain_call_and_as_pytorchs_checkpoint(data):
    flag = st.booleans()
    torch.manual_seed(data.draw(st.integers(0, 100)))
    module = Noisy().train(data.draw(flag, label="training"))
    for p in module.parameters():
        p.requires_grad_(data.draw(flag, label="parameter trains"))
    shape = data.draw(st.sampled_from([(8,), (3, 8), (2, 5, 8), (0, 8)]))
    x, shift = torch.randn(shape), torch.randn(8)
    x.requires_grad_(data.draw(flag, label="x trains"))
    shift.requires_grad_(data.draw(flag, label="shift trains"))
    leaves = [t for t in (x, shift) if t.requires_grad]
    if not leaves and not any(p.requires_grad for p in (*module.up.parameters(), *module.down.parameters())):
        return
    options = {"shift": shift, "sign": data.draw(st.sampled_from([1, -1]))}
    with torch.autocast("cpu", torch.bfloat16, enabled=data.draw(flag, label="autocast")):
        plain = gradients(module, lambda: module(x, 2.0, **options), *leaves)
        same(gradients(module, lambda: recompute(module, x, 2.0, **options), *leaves), plain)
        theirs = gradients(module, lambda: checkpoint(module, x, 2.0, use_reentrant=False, **options), *leaves)
        same(theirs, plain)


def test_the_generator_goes_on_as_after_the_plain_call():
    module, x = Noisy(), torch.randn(4, 8, requires_grad=True)
    after = []
    for call in (module, lambda *a: recompute(module, *a)):
        torch.manual_seed(5)
        y, _ = call(x, 1.0)
        first = torch.rand(())
        y.sum().backward()
        after.append((first, torch.rand(())))
    assert after[0] == after[1]


def sizes(name):
    common = dict(vocab_size=50)
    return {
        "gpt": lambda: GPT(GPTConfig(n_positions=16, n_embd=16, n_layer=3, n_head=2, dropout=0.2, **common)),
        "llama": lambda: Llama(LlamaConfig(50, 16, 24, 3, 4, 2, max_position_embeddings=16)),
        "bert": lambda: BERT(BERTConfig(50, 16, 3, 2, 32, max_position_embeddings=16)),
        "transformer": lambda: Transformer(TransformerConfig(50, 16, 2, 3, 3, 32, dropout=0.2)),
    }[name]()


def batch(name):
    ids = torch.randint(5, 50, (2, 12))
    documents = torch.arange(12).div(5, rounding_mode="floor").expand(2, 12)
    return {
        "gpt": lambda: dict(ids=ids, documents=documents),
        "llama": lambda: dict(ids=ids, documents=documents),
        "bert": lambda: dict(ids=ids, labels=ids),
        "transformer": lambda: dict(source=ids, target=ids),
    }[name]()


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "transformer"])
@pytest.mark.parametrize("frozen", [False, True])
def test_models_and_their_frozen_bases(name, frozen):
    """Over a frozen embedding the input of the first block needs no gradient: its adapters still get theirs."""
    torch.manual_seed(0)
    model, inputs = sizes(name).train(), batch(name)
    if frozen:
        add_lora(model, rank=2)
        for p in lora_parameters(model):
            nn.init.normal_(p, std=0.1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found, peaks = [], []
    for _ in range(2):
        torch.manual_seed(1)
        with Meter(model) as meter:
            loss, count = model.loss(**inputs)
            (loss / count).backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
        peaks.append(meter.peak)
        model.zero_grad(set_to_none=True)
        gc.collect()
        assert meter.now == 0  # all that was kept has gone
        if not found[1:]:
            before = list(model.state_dict())
            assert add_recompute(model) is model and list(model.state_dict()) == before
    assert torch.equal(found[0][0], found[1][0]) and names
    for n in names:
        a, b = found[0][1][n], found[1][1][n]
        assert (a is None) == (b is None), n
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert any(g is not None and g.abs().sum() > 0 for g in found[1][1].values())
    assert peaks[1] < 0.7 * peaks[0]
    clone = copy.deepcopy(model)  # its blocks are its own
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    with torch.no_grad():
        model.eval()
        assert model.loss(**inputs)[0] != clone.eval().loss(**inputs)[0]
    remove_recompute(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "transformer"])
def test_what_the_blocks_share_gets_its_gradient(name):
    """The MLP of all prefixes is no block's own; PyTorch's checkpoint is the second oracle."""
    torch.manual_seed(0)
    model, inputs = sizes(name).eval(), batch(name)
    add_prefix(model, 4, hidden=8)
    for n, p in model.named_parameters():
        if "W_2" in n:
            nn.init.normal_(p, std=0.3)
    blocks = [m for m in model.modules() if type(m).__name__ in ("Block", "Layer", "EncoderLayer", "DecoderLayer")]

    def found():
        model.zero_grad(set_to_none=True)
        loss, count = model.loss(**inputs)
        (loss / count).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain = found()
    add_recompute(model)
    ours = found()
    remove_recompute(model)
    for block in blocks:
        block.forward = (lambda f: lambda *a, **k: checkpoint(f, *a, use_reentrant=False, **k))(block.forward)
    theirs = found()
    assert blocks and any("W_1" in n for n in plain)
    for n, g in plain.items():
        assert g is not None and g.abs().sum() > 0, n
        torch.testing.assert_close(ours[n], g, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(theirs[n], g, rtol=1e-5, atol=1e-7)


def test_decoding_with_a_cache_is_left_alone():
    model = add_recompute(sizes("gpt").eval())
    ids = torch.randint(0, 50, (1, 9))
    cache = []
    steps = torch.cat([model(ids[:, i : i + 1], cache) for i in range(9)], dim=1)  # gradients are on
    torch.testing.assert_close(steps, model(ids))
    assert cache[0][0].shape[2] == 9


def test_what_is_held_is_counted_by_hand():
    """x (n, d) -> relu(x W) -> square: kept are x, the relu's result (float32) and, for the square, the same again."""
    W, x = nn.Linear(32, 48, bias=False), torch.randn(10, 32, requires_grad=True)
    with Meter(W) as meter:
        y = torch.relu(W(x)).square().sum()
        assert meter.now == meter.peak == 4 * (10 * 32 + 10 * 48)
        y.backward()
        del y
    gc.collect()
    assert meter.now == 0 and meter.peak == 4 * (10 * 32 + 10 * 48)


def test_a_chain_keeps_its_inputs_and_one_inside():
    n, rows, d = 6, 64, 16

    class Square(nn.Module):
        def forward(self, x):
            for _ in range(4):
                x = torch.sin(x)  # keeps its input
            return x

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Square() for _ in range(n))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Chain(), torch.randn(rows, d, requires_grad=True)
    with Meter(model) as plain:
        model(x).sum().backward()
    add_recompute(model)
    with Meter(model) as meter:
        model(x).sum().backward()
    tensor = 4 * rows * d
    assert plain.peak == 4 * n * tensor
    assert meter.peak <= (n + 4) * tensor


def test_weights_gradients_and_the_optimisers_state():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model[0].bias = model[1].bias  # tied: counted once
    optimizer = torch.optim.AdamW(model.parameters())
    weights = 4 * (8 * 4 + 4 + 4 + 2 * 4) + 8  # W, the one bias, BatchNorm's weight, mean and variance; int64 count
    assert memory(model)["weights"] == weights and memory(model)["gradients"] == 0
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    trained = 4 * (8 * 4 + 2 * 4)
    found = memory(model, optimizer)
    assert found["gradients"] == trained and found["optimiser"] == 2 * trained + 3 * 4  # two moments, three counts
    assert table(model, optimizer).count("MB") == 3


def test_errors():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match="argument states holds a tensor that needs a gradient"):
        recompute(lambda y, states: y + states[0], torch.ones(2, 8), states=[x])
    with pytest.raises(ValueError, match="has no nn.ModuleList"):
        add_recompute(nn.Linear(2, 2))
    model = add_recompute(sizes("gpt"))
    with pytest.raises(ValueError, match="not yet recomputed"):
        add_recompute(model)
    remove_recompute(model)
    with pytest.raises(ValueError, match="is not recomputed"):
        remove_recompute(model)
    module = Noisy()
    y, _ = recompute(module, x, 1.0)
    with torch.no_grad():
        module.up.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # never gradients of other weights
        y.sum().backward()
    y, _ = recompute(module, x, 1.0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dx.sum().backward()
