# SPDX-License-Identifier: MIT
"""lean.py. Oracle: the model's own forward and backward in float64, where the two may differ by rounding alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimal.lean import make_lean, make_plain
from minimal.llama import Llama, LlamaConfig, torch_attention
from minimal.lora import add_lora, lora_parameters, merge_lora
from minimal.quant import quantise
from minimal.recompute import Meter


def llama(attention=torch_attention, dtype=torch.float64, **changes):
    sizes = dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(**sizes | dict(num_key_value_heads=2, max_position_embeddings=64) | changes)
    model = Llama(config, attention).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "norm" in name else 0, 0.2)
    return model


def adapted(model, rank=3, **kind):
    add_lora(model, rank, **kind)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora.B"):  # which begins at zero: then A has no gradient
                p.normal_(0, 0.3)
    return model.train()


def results(model, ids, **batch):
    """The loss, and the gradient of each parameter that trains."""
    total, count = model.loss(ids, **batch)
    grads = torch.autograd.grad(total / count, lora_parameters(model))
    return total.detach(), *grads


def same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * max(1.0, y.abs().max().item()))


@given(data=st.data())
def test_loss_and_gradients_are_the_models_own(data):
    heads, kv = data.draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1), (6, 3)]))
    D = data.draw(st.sampled_from([None, 4, 8, 32]))
    model = llama(num_attention_heads=heads, num_key_value_heads=kv, head_dim=D,
                  tie_word_embeddings=data.draw(st.booleans()))  # fmt: skip
    every = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    target = data.draw(st.just("all-linear") | st.lists(st.sampled_from(every), min_size=1, unique=True))
    adapted(model, data.draw(st.integers(1, 4)), target=target, rslora=data.draw(st.booleans()))
    if data.draw(st.booleans()):
        model.model.embed_tokens.weight.requires_grad_(True)  # then the first block has a gradient to give
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    ids, batch = torch.randint(50, (B, T + 1), generator=gen), {}
    if data.draw(st.booleans()):
        batch["documents"] = torch.randint(2, (B, T + 1), generator=gen)
    wanted = results(model, ids, **batch)
    assert make_lean(model, recompute=data.draw(st.booleans())) == [f"model.layers.{i}" for i in range(3)]
    same(results(model, ids, **batch), wanted)
    make_plain(model)
    same(results(model, ids, **batch), wanted, 0.0)


@pytest.fixture
def calls(monkeypatch):
    """How often a lean block was computed."""
    from minimal import lean

    count, apply = [0], lean._Block.apply

    def counted(*args):
        count[0] += 1
        return apply(*args)

    monkeypatch.setattr(lean._Block, "apply", counted)
    return count


def test_what_is_not_of_its_kind_runs_as_before(calls):
    ids = torch.randint(50, (2, 9))
    model = adapted(llama())
    make_lean(model)
    results(model, ids)
    assert calls == [3]
    with torch.no_grad():
        plain = model(ids)
    cache = []
    same([torch.cat([model(piece, cache) for piece in ids.split(4, dim=1)], 1)], [plain])
    assert calls == [3]  # neither without gradients nor with a cache

    def untouched(change, model):
        make_lean(model)
        change(model)
        reference = copy.deepcopy(model)
        make_plain(reference)
        torch.manual_seed(1)
        wanted = results(reference, ids)
        torch.manual_seed(1)
        same(results(model, ids), wanted, 0.0)

    before = calls[0]
    untouched(lambda m: setattr(m.config, "dropout", 0.3), adapted(llama()))
    untouched(lambda m: None, adapted(llama(), dora=True))
    untouched(lambda m: None, adapted(llama(), dropout=0.4))
    untouched(lambda m: [p.requires_grad_() for n, p in m.named_parameters() if "up_proj.weight" in n],
              adapted(llama(), target="q_proj"))  # fmt: skip
    untouched(lambda m: [p.requires_grad_() for n, p in m.named_parameters() if "norm" in n], adapted(llama()))
    untouched(lambda m: [b.mlp.register_forward_hook(lambda m, a, y: 2 * y) for b in m.model.layers], adapted(llama()))
    hook = nn.Module.register_full_backward_pre_hook
    untouched(lambda m: [hook(b.mlp, lambda m, g: (2 * g[0],)) for b in m.model.layers], adapted(llama()))
    hook = nn.Module.register_forward_pre_hook
    untouched(lambda m: [hook(b.mlp, lambda m, args: (args[0] + 1,)) for b in m.model.layers], adapted(llama()))
    untouched(lambda m: None, adapted(llama(dtype=torch.bfloat16)))
    assert calls[0] == before
    model.eval()  # dropout of the adapters and of the model is off: lean again
    model.config.dropout = 0.5
    results(model, ids)
    assert calls[0] == before + 3


def test_a_quantised_base(calls):
    ids = torch.randint(50, (2, 9))
    for kind in ("nf4", "int8"):
        model = llama()
        quantise(model, kind)
        adapted(model)
        wanted = results(model, ids)
        make_lean(model, recompute=kind == "int8")
        same(results(model, ids), wanted)
    assert calls == [6]


def test_merging_and_names_stay():
    model = adapted(llama())
    names = [n for n, _ in model.named_parameters()]
    make_lean(model)
    make_lean(model, recompute=True)  # again: only the setting changes
    assert [n for n, _ in model.named_parameters()] == names and copy.deepcopy(model).model.layers[0].lean_recompute
    ids = torch.randint(50, (1, 8))
    adapted_to = model(ids)
    merge_lora(model)
    same([model(ids)], [adapted_to])
    assert len(make_plain(model)) == 3 and make_plain(model) == []
    assert type(model.model.layers[0]).__name__ == "Block"


def test_what_is_kept_for_the_backward_pass():
    ids, kept = torch.randint(50, (2, 33)), {}
    for how in ("plain", "lean", "recompute"):
        model = adapted(llama(num_hidden_layers=2, hidden_size=64, intermediate_size=256), target=["up_proj", "q_proj"])
        if how != "plain":
            make_lean(model, recompute=how == "recompute")
        with Meter(model) as meter:
            model.loss(ids)
        kept[how] = meter.peak
    assert kept["recompute"] < 0.7 * kept["lean"] and kept["lean"] < 0.75 * kept["plain"]


def test_errors():
    with pytest.raises(ValueError, match="model=Linear has no blocks like Llama's"):
        make_lean(nn.Linear(3, 3))
    model = adapted(llama())
    make_lean(model)
    total, _ = model.loss(torch.randint(50, (1, 5)))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="wanted another forward pass"):
        total.backward()
