# SPDX-License-Identifier: MIT
"""lean_gpt.py. Oracle: the model's own forward and backward in float64, where the two may differ by rounding alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimal import fused_mlp, lean_gpt
from minimal.attention import attention
from minimal.gpt import GPT, GPTConfig, torch_attention
from minimal.lean_gpt import make_lean, make_plain
from minimal.lora import add_lora
from minimal.recompute import Meter


def gpt(attention=torch_attention, dtype=torch.float64, **changes):
    sizes = dict(vocab_size=50, n_positions=40, n_embd=24, n_layer=3, n_head=4, dropout=0.0)
    model = GPT(GPTConfig(**sizes | changes), attention).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "ln_" in name and name.endswith("weight") else 0, 0.3)
    return model.train()


def results(model, ids, **batch):
    total, count = model.loss(ids, **batch)
    return total.detach(), *torch.autograd.grad(total / count, [p for p in model.parameters() if p.requires_grad])


def same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * max(1.0, y.abs().max().item()))


@given(st.data())
def test_loss_and_gradients_are_the_models_own(data):
    heads = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    model = gpt(n_head=heads, n_layer=data.draw(st.integers(1, 3)), layer_norm_epsilon=data.draw(st.floats(1e-6, 0.1)))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    ids, batch = torch.randint(50, (B, T + 1), generator=gen), {}
    if data.draw(st.booleans()):
        batch["documents"] = torch.randint(2, (B, T + 1), generator=gen)
    wanted = results(model, ids, **batch)
    assert make_lean(model) == [f"transformer.h.{i}" for i in range(model.config.n_layer)]
    same(results(model, ids, **batch), wanted)
    make_plain(model)
    same(results(model, ids, **batch), wanted, 0.0)


def test_float32_with_the_fused_operators():
    model = gpt(n_embd=64).double()
    ids = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))
    exact = results(model, ids)
    model = model.float()
    for block in model.transformer.h:
        block.attn.attention = attention
    plain = results(model, ids)
    make_lean(model, fused_mlp.gelu, fused_mlp.gelu_backward)
    for ours, theirs, e in zip(results(model, ids), plain, exact, strict=True):
        assert (ours - e).norm() <= 2 * (theirs - e).norm() + 1e-6 * e.norm()


@pytest.fixture
def calls(monkeypatch):
    """How often a lean block was computed."""
    count, apply = [0], lean_gpt._Block.apply

    def counted(*args):
        count[0] += 1
        return apply(*args)

    monkeypatch.setattr(lean_gpt._Block, "apply", counted)
    return count


def test_what_is_not_of_its_kind_runs_as_before(calls):
    ids = torch.randint(50, (2, 9))
    model = gpt()
    make_lean(model)
    results(model, ids)
    assert calls == [3]
    with torch.no_grad():
        plain = model(ids)
    cache = []
    same([torch.cat([model(piece, cache) for piece in ids.split(4, dim=1)], 1)], [plain])
    assert calls == [3]  # neither without gradients nor with a cache

    def untouched(change, dtype=torch.float64):
        model = gpt(dtype=dtype)
        make_lean(model)
        change(model)
        reference = copy.deepcopy(model)
        make_plain(reference)
        torch.manual_seed(1)
        wanted = results(reference, ids)
        torch.manual_seed(1)
        same(results(model, ids), wanted, 0.0)

    blocks = lambda m: m.transformer.h  # noqa: E731
    untouched(lambda m: setattr(m.config, "dropout", 0.3))
    untouched(lambda m: [b.mlp.requires_grad_(False) for b in blocks(m)])
    untouched(lambda m: [b.mlp.register_forward_hook(lambda m, a, y: 2 * y) for b in blocks(m)])
    untouched(lambda m: [b.ln_2.register_forward_pre_hook(lambda m, args: (args[0] + 1,)) for b in blocks(m)])
    untouched(lambda m: add_lora(m, 2))
    untouched(lambda m: [b.mlp.register_full_backward_pre_hook(lambda m, g: (2 * g[0],)) for b in blocks(m)])
    untouched(lambda m: [setattr(b, "extra", nn.Linear(1, 1).double()) for b in blocks(m)] and
              [p.requires_grad_(False) for b in blocks(m) for p in b.extra.parameters()])  # fmt: skip
    untouched(lambda m: [b.ln_1.bias.requires_grad_(False) for b in blocks(m)])
    assert calls == [3]
    model.config.dropout = 0.5
    model.eval()  # dropout is off: lean again
    results(model, ids)
    assert calls == [6]
    with torch.autocast("cpu", torch.bfloat16):
        model.float().loss(ids)
    assert calls == [6]


def test_names_stay_and_less_is_kept():
    model, ids = gpt(n_embd=64), torch.randint(50, (2, 33))
    names, kept = list(model.state_dict()), []
    for how in ("plain", "lean"):
        if how == "lean":
            make_lean(model)
            make_lean(model)
        with Meter(model) as meter:
            model.loss(ids)
        kept.append(meter.peak)
    assert kept[1] <= kept[0] and list(model.state_dict()) == names
    assert len(make_plain(model)) == 3 and make_plain(model) == []
    assert type(model.transformer.h[0]).__name__ == "Block" and not hasattr(model.transformer.h[0], "lean_gelu")


def test_errors():
    with pytest.raises(ValueError, match="model=Linear has no blocks like GPT-2's"):
        make_lean(nn.Linear(3, 3))
    model = gpt()
    make_lean(model)
    total, _ = model.loss(torch.randint(50, (1, 5)))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="wanted another forward pass"):
        total.backward()
