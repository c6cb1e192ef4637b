# SPDX-License-Identifier: MIT
"""LoRA, rsLoRA, DoRA: PEFT is the oracle for values, training, files and targets, closed forms for gradients."""

import copy
import io
import json
import math
import pathlib
import pickle
import subprocess
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minimal import lora
from minimal.lora import (
    add_lora,
    load_lora,
    lora_groups,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)
from minimal.quant import dequantise, memory, quantise

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "both": {"rslora": True, "dora": True}}
PEFT_KINDS = {n: {f"use_{k}": v for k, v in kind.items()} for n, kind in KINDS.items()}
Conv1D = transformers.pytorch_utils.Conv1D
IDS = torch.arange(14).reshape(2, 7) * 5 % 48


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # peft and transformers: fan_in_fan_out, deprecations of their own
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        yield


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama}


def stir(model):
    """Adapters as if trained: no B is zero, no m is the norm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def mlp(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5, bias=bias))


def bits(tensors):
    return {n: (t.dtype, t.detach().contiguous().view(torch.uint8).clone()) for n, t in tensors.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a)


# ---- PEFT as the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_adapters_saved_here_compute_the_same_in_peft(make, kind, tmp_path):
    model = MODELS[make]()
    base = logits(model)
    add_lora(model, rank=3, alpha=7, **KINDS[kind])
    save_lora(stir(model), tmp_path)
    oracle = peft.PeftModel.from_pretrained(MODELS[make](), tmp_path).eval()
    assert (logits(model) - base).abs().max() > 0.01  # the adapters do something
    torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(logits(model), logits(oracle.merge_and_unload()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_adapters_saved_by_peft_compute_the_same_here(make, kind, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", **PEFT_KINDS[kind])
    oracle = peft.get_peft_model(MODELS[make](), config).eval()
    with torch.no_grad():
        for n, p in oracle.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn_like(p) * 0.1)
    oracle.save_pretrained(tmp_path)
    model = MODELS[make]()
    load_lora(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=1e-5)
    filled = MODELS[make]()
    add_lora(filled, rank=3, alpha=7, **KINDS[kind])
    load_lora(filled, tmp_path)
    assert torch.equal(logits(filled), logits(model))
    # back again, tensor by tensor: the same names, shapes, dtypes and values
    save_lora(model, tmp_path / "again")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "again", tmp_path)]
    ours, theirs = (bits(safetensors.torch.load_file(file)) for file in files)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize(("kind", "dropout"), [("lora", 0.0), ("lora", 0.3), ("rslora", 0.0), ("dora", 0.0)])
@pytest.mark.parametrize("make", MODELS)
def test_training_follows_peft(make, kind, dropout, tmp_path):
    model = MODELS[make]()
    add_lora(model, rank=3, alpha=7, dropout=dropout, **KINDS[kind])
    save_lora(model, tmp_path)
    oracle = peft.PeftModel.from_pretrained(MODELS[make](), tmp_path, is_trainable=True)

    def curve(model, parameters):
        model.train()
        torch.manual_seed(5)  # with the same masks: both draw one number for each element of x, layer by layer
        optimizer, losses = torch.optim.AdamW(parameters, lr=2e-2), []
        for _ in range(6):
            loss = F.cross_entropy(model(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    ours = curve(model, lora_parameters(model))
    theirs = curve(oracle, [p for p in oracle.parameters() if p.requires_grad])
    assert ours[-1] < ours[0] - 0.1
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    # the same check rejects a wrong scale
    wrong = MODELS[make]()
    load_lora(wrong, tmp_path)
    for layer in lora._adapted(wrong).values():
        layer.lora.scale = 7.0 if kind != "rslora" else 7 / 3
    assert not torch.allclose(curve(wrong, lora_parameters(wrong)), theirs, rtol=2e-5, atol=0)


TARGETS = [
    ("gpt2", "all-linear"), ("gpt2", ["c_attn"]), ("gpt2", ["attn.c_proj", "c_fc"]), ("gpt2", r".*h\.1\..*c_(proj|fc)"),
    ("gpt2", ["transformer.h.0.mlp.c_proj"]), ("gpt2", ["lm_head"]), ("llama", "all-linear"),
    ("llama", ["q_proj", "v_proj"]), ("llama", ["self_attn.o_proj"]), ("llama", r"model\.layers\.\d\.mlp\..*_proj"),
    ("llama", ["down_proj", "lm_head"]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "target"), TARGETS)
def test_targets_are_those_peft_chooses_and_finds_again(make, target, tmp_path):
    def chosen(model):
        return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "base_layer")}

    oracle = peft.get_peft_model(MODELS[make](), peft.LoraConfig(r=2, target_modules=target))
    model = MODELS[make]()
    names = add_lora(model, rank=2, target=target)
    assert set(names) == chosen(oracle) and len(names) == len(set(names)) > 0
    save_lora(model, tmp_path)
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], list)
    again = peft.PeftModel.from_pretrained(MODELS[make](), tmp_path)
    assert chosen(again) == set(names)


class Twice(nn.Module):
    """One name is the end of another: the one case in which a list of full names is ambiguous to PEFT."""

    def __init__(self):
        super().__init__()
        self.fc, self.block = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.fc(x) + self.block["fc"](x)


def test_a_name_that_ends_another_name_stays_exact(tmp_path):
    model, x = Twice(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    assert add_lora(model, rank=2, target=r"fc|none") == ["fc"]
    assert add_lora(copy.deepcopy(plain), rank=2, target="fc") == ["fc", "block.fc"]
    save_lora(stir(model), tmp_path)
    oracle = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert [n for n, m in oracle.base_model.model.named_modules() if hasattr(m, "base_layer")] == ["fc"]
    torch.testing.assert_close(oracle(x), model(x))
    load_lora(plain, tmp_path)
    assert torch.equal(plain(x), model(x)) and not hasattr(plain.block["fc"], "lora")


def test_adapters_of_linear_layers_fit_the_transposed_conv1d(tmp_path):
    """A GPT-2 written with nn.Linear shares its adapters with the one of transformers, whose weights are transposed."""
    model = gpt2()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf)
                linear.load_state_dict({"weight": child.weight.T, "bias": child.bias})
                setattr(module, name, linear)
    add_lora(model, rank=3, dora=True)
    save_lora(stir(model), tmp_path)
    theirs = gpt2()
    load_lora(theirs, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    oracle = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    torch.testing.assert_close(logits(oracle), logits(model), rtol=0, atol=1e-5)


# ---- the start, the scale, the dropout (trap 10) -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_is_exactly_the_model_it_was(make, kind, dtype):
    model = MODELS[make]().to(dtype).train()
    before, weights = logits(model), bits(model.state_dict())
    add_lora(model, rank=3, dropout=0.5, **KINDS[kind])
    assert torch.equal(logits(model).view(torch.uint8), before.view(torch.uint8))
    now = bits(model.state_dict())
    assert same_bits({n: now[n] for n in weights}, weights)  # names and values of the base stay
    assert all(".lora." in n for n in now.keys() - weights.keys())
    loss = logits_grad = model(IDS).logits.float().pow(2).mean()
    del logits_grad
    loss.backward()
    # only the adapters get a gradient, and at the start it reaches every B and m but no A (B is zero)
    for n, p in model.named_parameters():
        assert p.requires_grad == (".lora." in n)
        assert (p.grad is not None) == (".lora." in n)
        if n.endswith((".B", ".m")):
            assert p.grad.abs().max() > 0, n


def test_a_is_uniform_as_in_peft_and_b_zero():
    model = nn.Sequential(nn.Linear(400, 300))
    add_lora(model, rank=100)
    A, B = model[0].lora.A, model[0].lora.B
    assert A.shape == (100, 400) and B.shape == (300, 100) and not B.any()
    assert 0.99 / 20 < A.abs().max() <= 1 / 20  # 1 / sqrt(400)
    assert A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind):
    """alpha / rank, and alpha / sqrt(rank) for rsLoRA: the weight that PEFT merges decides."""
    rank, alpha = 3, 7
    options = {"r": rank, "lora_alpha": alpha, "target_modules": ["0"], "init_lora_weights": False}
    oracle = peft.get_peft_model(mlp(), peft.LoraConfig(**options, **PEFT_KINDS[kind]))
    parameters = dict(oracle.base_model.model[0].named_parameters())
    theirs = oracle.merge_and_unload()[0].weight

    def agrees(scale):
        model = mlp()
        add_lora(model, rank, alpha, target="0", **KINDS[kind])
        adapter = model[0].lora
        adapter.A.data.copy_(parameters["lora_A.default.weight"])
        adapter.B.data.copy_(parameters["lora_B.default.weight"])
        if "dora" in KINDS[kind]:
            adapter.m.data.copy_(parameters["lora_magnitude_vector.default.weight"])
        adapter.scale = scale or adapter.scale
        merge_lora(model)
        return torch.allclose(model[0].weight, theirs, atol=1e-6)

    assert agrees(None)
    right = alpha / math.sqrt(rank) if "rslora" in KINDS[kind] else alpha / rank
    assert agrees(right)
    for wrong in (alpha, 1.0, alpha / rank**2, alpha / rank if right != alpha / rank else alpha / math.sqrt(rank)):
        assert not agrees(wrong)


def test_dropout_is_drawn_for_each_element_and_in_training_only():
    x = torch.randn(1, 1, 6).expand(2, 40, 6)  # the same token everywhere: only the masks can differ

    def shared_mask(self, layer, args, out):
        A = self.A * F.dropout(torch.ones(1, self.A.shape[1]), self.dropout, self.training)
        return out + F.linear(F.linear(args[0], A), self.B) * self.scale

    def tokens_differ(model):
        out = model(x).flatten(0, 1)
        return (out != out[0]).any(1).float().mean() > 0.5

    model = nn.Sequential(nn.Linear(6, 5))
    add_lora(model, rank=4, dropout=0.5)
    stir(model)
    assert tokens_differ(model.train())
    wide = x.repeat(100, 1, 1)
    mean = (model(wide) - model[0].lora.V(model[0].weight)[0].mv(x[0, 0]) - model[0].bias).mean((0, 1))
    assert mean.abs().max() < 0.02  # what survives is scaled up
    assert not tokens_differ(model.eval())
    original = lora.LoRA.forward
    try:
        lora.LoRA.forward = shared_mask
        assert not tokens_differ(model.train())  # the buggy variant is caught
    finally:
        lora.LoRA.forward = original
    # eval() while merged must still hold after unmerging, and train() too
    model.train()
    merge_lora(model)
    model.eval()
    unmerge_lora(model)
    assert torch.equal(model(x), model(x)) and not tokens_differ(model)


# ---- shapes, dtypes, gradients -------------------------------------------------------------------------------------


@st.composite
def layers(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    C, O = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype, bias, conv = draw(st.sampled_from(dtypes)), draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layer = Conv1D(O, C) if conv else nn.Linear(C, O, bias=bias)
    layer.weight.data.normal_()
    model = nn.Sequential(layer).to(dtype)
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    rank, alpha = draw(st.integers(1, min(C, O))), draw(st.sampled_from([1, 2.5, 16]))
    shape = draw(st.sampled_from([(), (1,), (5,), (2, 3), (0,)]))
    shape = shape or ((1,) if conv else ())
    x = torch.randn(*shape, C, dtype=dtype)
    add_lora(model, rank, alpha, **kind)
    return model, layer, x, kind


def dense(layer, W=None):
    """The effective weight (O, C) by the formulas of the papers, in float64."""
    adapter = layer.lora
    W = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).double() if W is None else W
    V = W + adapter.scale * adapter.B.double() @ adapter.A.double()
    return V if adapter.m is None else (adapter.m.double() / V.pow(2).sum(1).sqrt())[:, None] * V


@hypothesis.given(layers())
def test_adapted_equals_merged_equals_dense_and_unmerging_restores_bits(case):
    model, layer, x, _ = case
    stir(model)
    before, parameter = bits(dict(layer.named_parameters(recurse=False))), layer.weight
    bias = 0 if layer.bias is None else layer.bias.double()
    W, original = dense(layer).detach(), layer.weight.detach().double()
    original = original.T if isinstance(layer, Conv1D) else original
    exact = x.double() @ W.T + bias
    eps = torch.finfo(layer.weight.dtype).eps
    # A row of W + s B A may cancel, and g = m / norm then magnifies its rounding: the bound is on the terms.
    adapter = layer.lora
    terms = original.abs() + adapter.scale * adapter.B.detach().double().abs() @ adapter.A.detach().double().abs()
    V = original + adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()
    terms = terms.norm(dim=1) * (1 if adapter.m is None else 1 + adapter.m.detach().double().abs() / V.norm(dim=1))
    limit = 16 * eps * (x.double().norm(dim=-1, keepdim=True) * terms + (0 if layer.bias is None else bias.abs()))
    adapted = model(x)
    assert adapted.dtype == layer.weight.dtype and adapted.shape == (*x.shape[:-1], W.shape[0])
    assert ((adapted.double() - exact).abs() <= limit).all()
    change = merge_lora(model)
    merged_weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).double()
    assert change == pytest.approx((merged_weight - original).abs().max().item(), rel=1e-5, abs=1e-30)
    assert not list(layer.children()) and not layer._forward_hooks  # nothing left to compute
    assert ((model(x).double() - exact).abs() <= limit).all()
    # float32 rounding of the sum, then one rounding to the weight's dtype: half a unit in the last place
    ulp = eps * 2.0 ** (torch.frexp(W).exponent.double() - 1)
    assert ((merged_weight - W).abs() <= 0.5 * ulp + 16 * min(eps, 2.0**-23) * terms[:, None]).all()
    unmerge_lora(model)
    assert layer.weight is parameter and same_bits(bits(dict(layer.named_parameters(recurse=False))), before)
    assert torch.equal(model(x), adapted)


@hypothesis.given(layers(dtypes=(torch.float64,)))
def test_gradients_follow_from_the_dense_gradient(case):
    """dA = s B^T dW, dB = s dW A^T; with DoRA, dW is scaled by g row by row, and dm = <dW, V> / ||V||."""
    model, layer, x, kind = case
    stir(model)
    adapter = layer.lora
    W = dense(layer).detach().requires_grad_()
    seed = torch.randn(*x.shape[:-1], W.shape[0], dtype=torch.float64)
    (dW,) = torch.autograd.grad((F.linear(x, W, layer.bias) * seed).sum(), W)
    V = adapter.V(layer.weight.T if isinstance(layer, Conv1D) else layer.weight)[0].detach()
    norm = V.pow(2).sum(1).sqrt()
    g = adapter.m.detach() / norm if "dora" in kind else torch.ones_like(norm)
    dV = g[:, None] * dW
    wanted = {"A": adapter.scale * adapter.B.T @ dV, "B": adapter.scale * dV @ adapter.A.T}
    if "dora" in kind:
        wanted["m"] = (dW * V).sum(1) / norm
    (model(x) * seed).sum().backward()
    got = {n: p.grad for n, p in adapter.named_parameters()}
    assert got.keys() == wanted.keys()
    for n in wanted:
        torch.testing.assert_close(got[n], wanted[n].detach(), rtol=1e-9, atol=1e-9)
    assert layer.weight.grad is None
    # the input's gradient is that of the dense layer too
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad((model(x) * seed).sum(), x)
    torch.testing.assert_close(dx, seed @ W.detach(), rtol=1e-9, atol=1e-9)


def test_dora_holds_its_norm_constant():
    """Section 4.3: a norm inside the graph gives another gradient, which the check above would reject."""
    model = nn.Sequential(nn.Linear(5, 4).double())
    add_lora(model, rank=2, dora=True)
    stir(model)
    x, adapter, layer = torch.randn(7, 5, dtype=torch.float64), model[0].lora, model[0]
    model(x).pow(2).sum().backward()
    through_the_norm = torch.autograd.grad(F.linear(x, dense(layer), layer.bias).pow(2).sum(), adapter.A)[0]
    assert not torch.allclose(adapter.A.grad, through_the_norm, rtol=1e-3)


def test_dora_starts_exactly_at_rows_of_zeros_too():
    for dtype in (torch.float32, torch.float16):
        layer = nn.Linear(4, 3).to(dtype)
        layer.weight.data[1] = 0
        model, x = nn.Sequential(layer), torch.randn(5, 4, dtype=dtype)
        before = model(x)
        add_lora(model, rank=2, dora=True)
        assert torch.equal(model(x), before)
        model(x).sum().backward()
        assert all(p.grad.isfinite().all() for p in lora_parameters(model))
        assert merge_lora(model) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, x = mlp(), torch.randn(9, 6)
    add_lora(model, rank=3, **KINDS[kind])
    stir(model)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().pow(2).mean().backward()
        change = merge_lora(model)  # in full precision even here
        weights = bits(model.state_dict())
    unmerge_lora(model)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in lora_parameters(model))
    assert change == merge_lora(model) and same_bits(bits(model.state_dict()), weights)


# ---- merging (trap 11) ---------------------------------------------------------------------------------------------


def test_merging_in_half_precision_rounds_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    add_lora(model, rank=32, alpha=64)
    stir(model)
    layer, adapter = model[0], model[0].lora
    W = dense(layer).detach()
    ulp = 2.0**-7 * 2.0 ** (torch.frexp(W).exponent.double() - 1)

    def rounded_once(merged):
        return bool(((merged.double() - W).abs() <= 0.501 * ulp).all())

    in_half = layer.weight.data + (adapter.B.bfloat16() @ adapter.A.bfloat16()) * adapter.scale
    merge_lora(model)
    assert rounded_once(layer.weight) and not rounded_once(in_half)
    # a change below the weight's resolution is lost, and merge_lora says so
    small = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    small[0].weight.data.fill_(1)
    add_lora(small, rank=1)
    small[0].lora.B.data.fill_(1e-5)
    assert merge_lora(small) == 0.0


def test_merging_twice_is_an_error_and_would_be_seen():
    model, x = mlp(), torch.randn(4, 6)
    add_lora(model, rank=2)
    stir(model)[0].lora.B.data.mul_(5)  # the first layer changes more than the last
    adapted = model(x)

    def right(model):
        return torch.allclose(model(x), adapted, atol=1e-5)

    V = {n: layer.lora.V(layer.weight)[0] - layer.weight for n, layer in lora._adapted(model).items()}
    assert V["0"].abs().max() > 2 * V["2"].abs().max()
    assert merge_lora(model) == pytest.approx(V["0"].abs().max().item(), rel=1e-5)
    assert right(model)
    with pytest.raises(ValueError, match=r"adapters that are merged; wanted unmerge_lora first$"):
        merge_lora(model)
    assert right(model)
    twice = copy.deepcopy(model)
    for n, delta in V.items():
        twice.get_submodule(n).weight.data += delta
    assert not right(twice)
    for verb in (lora_parameters, lambda m: load_lora(m, "nowhere")):
        with pytest.raises(ValueError):
            verb(model)
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(model)
    with pytest.raises(RuntimeError, match="does not require grad"):  # nothing to train while merged
        model(x).sum().backward()
    unmerge_lora(model)
    with pytest.raises(ValueError, match="not merged; wanted merge_lora first"):
        unmerge_lora(model)


def test_unmerging_by_subtraction_would_not_restore_the_bits():
    model = mlp()
    before = bits(model.state_dict())
    add_lora(model, rank=2)
    stir(model)
    deltas = {n: layer.lora.V(layer.weight)[0] - layer.weight for n, layer in lora._adapted(model).items()}
    merge_lora(model)
    subtracted = {n: model.state_dict()[n] - deltas.get(n.removesuffix(".weight"), 0) for n in before}
    assert not same_bits(bits({n: t.detach() for n, t in subtracted.items()}), before)
    remove_lora(model)  # from the merged state
    assert same_bits(bits(model.state_dict()), before)


def test_a_tied_head_leaves_the_embedding_alone():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    embedding, before = model.transformer.wte.weight.detach().clone(), bits(model.state_dict())
    add_lora(model, rank=2, target=["lm_head", "c_attn"])
    adapted = logits(stir(model))

    def right(model):
        kept = torch.equal(model.transformer.wte.weight, embedding)
        return kept and torch.allclose(logits(model), adapted, atol=1e-5)

    with pytest.warns(UserWarning, match=r"lm_head.weight was tied .*tie_word_embeddings"):
        merge_lora(model)
    assert right(model)
    in_place = gpt2()  # the buggy variant writes into the shared parameter
    for n in ("lm_head", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"):
        in_place.get_submodule(n).weight.data.copy_(model.get_submodule(n).weight)
    assert not right(in_place)
    unmerge_lora(model)
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(logits(model), adapted)
    with pytest.warns(UserWarning, match="was tied"):
        merge_lora(model)
    remove_lora(model)
    assert model.lm_head.weight is model.transformer.wte.weight and same_bits(bits(model.state_dict()), before)


def test_saving_while_merged(tmp_path):
    model = gpt2()
    add_lora(model, rank=2, dora=True)
    adapted = logits(stir(model))
    save_lora(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "adapted")
    merge_lora(model)
    save_lora(model, tmp_path / "m")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    # the merged model is a plain model: what transformers saves and opens again is the adapted model, once
    assert model.state_dict().keys() == gpt2().state_dict().keys()
    model.save_pretrained(tmp_path / "merged")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), adapted, rtol=0, atol=1e-5)
    # saved while adapted but not merged, it is the old model, which the adapter then adapts, once
    old = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "adapted").eval()
    assert torch.equal(logits(old), logits(gpt2()))
    load_lora(old, tmp_path / "a")
    torch.testing.assert_close(logits(old), adapted, rtol=0, atol=1e-5)
    # plain weights load into an adapted model
    load_lora(other := gpt2(), tmp_path / "a")
    assert not other.load_state_dict(gpt2().state_dict(), strict=False).unexpected_keys


def test_a_merge_that_overflows_changes_nothing():
    model = mlp().half()
    before = bits(model.state_dict())
    add_lora(model, rank=1)
    model[2].lora.B.data.fill_(1e9)
    with pytest.raises(ValueError, match=r"merging layer '2' into torch.float16 changes it by inf; wanted finite"):
        merge_lora(model)
    lora_parameters(model)  # not merged
    remove_lora(model)
    assert same_bits(bits(model.state_dict()), before)


def test_a_merged_model_may_be_moved_or_cast():
    model, x = mlp(), torch.randn(4, 6)
    add_lora(model, rank=2)
    adapted = stir(model)(x)
    merge_lora(model)
    model.double()
    unmerge_lora(model)
    assert model(x.double()).dtype == torch.float64 and len(lora_parameters(model)) == 4
    model.to(torch.float32)
    torch.testing.assert_close(model(x), adapted)


# ---- half precision (trap 14) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_model_learn_in_float32(dtype, tmp_path):
    def moves(cast):
        model = mlp().to(dtype)
        add_lora(model, rank=4, dora=True)
        parameters = lora_parameters(model)
        if cast:
            model.to(dtype)  # the buggy variant: adapters in the precision of the base
        start = [p.detach().float().clone() for p in parameters]
        optimizer = torch.optim.Adam(parameters, lr=1e-5)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.ones(3, 6, dtype=dtype)).float().sum().backward()
            optimizer.step()
        return all((p.detach().float() - s).abs().max() > 5e-5 for p, s in zip(parameters, start, strict=True))

    assert moves(cast=False)
    assert not moves(cast=True)
    model = mlp().to(dtype)
    add_lora(model, rank=4)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    save_lora(stir(model), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    model.to(dtype)
    with pytest.raises(ValueError, match="cast to half precision after add_lora"):
        lora_parameters(model)
    merge_lora(model)  # still right, in float32


# ---- life with the rest of PyTorch ---------------------------------------------------------------------------------


def test_requires_grad_is_restored():
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].attn.c_attn.bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    add_lora(model, rank=2)
    model.lm_head.requires_grad_(True)
    merge_lora(stir(model))
    remove_lora(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not any(m._forward_hooks or hasattr(m, "lora") for m in model.modules())
    assert not any("lora" in key for m in model.modules() for key in vars(m))
    for verb in (remove_lora, merge_lora, unmerge_lora, lora_parameters, lambda m: save_lora(m, "nowhere")):
        with pytest.raises(ValueError, match="has no adapters; wanted the module that add_lora was given"):
            verb(model)
    add_lora(model, rank=2)  # and again


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_independent(how, merged):
    model = gpt2()
    before = logits(model)
    add_lora(model, rank=2, dora=True)
    adapted = logits(stir(model))
    if merged:
        merge_lora(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(twin), logits(model))
    if merged:
        unmerge_lora(twin)
    layer = twin.transformer.h[0].attn.c_attn
    assert list(layer._forward_hooks.values()) == [layer.lora]  # one hook, and it is the copy's own adapter
    assert twin.lm_head.weight is twin.transformer.wte.weight
    layer.lora.B.data.add_(1)
    remove_lora(twin)
    assert torch.equal(logits(twin), before) and twin.transformer.wte.weight.requires_grad
    if merged:
        unmerge_lora(model)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("grad", [True, False])
def test_compile_follows_every_verb(kind, grad, tmp_path):
    """Graphs made before a verb must not go on running after it: torch.compile has no guards on hooks."""
    model, x = mlp(), torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def follows():
        return torch.allclose(compiled(x), model(x), atol=1e-6)

    with torch.set_grad_enabled(grad):
        base = model(x)
        assert follows()
        model.requires_grad_(False)  # so that no other guard can notice
        assert follows()
        add_lora(compiled, rank=2, **KINDS[kind])
        assert follows()
        stir(compiled)
        assert follows() and not torch.allclose(model(x), base, atol=1e-3)
        if grad:
            compiled(x).sum().backward()
            assert all(p.grad.abs().max() > 0 for p in lora_parameters(model))
        save_lora(compiled, tmp_path)
        for verb in (merge_lora, unmerge_lora, merge_lora, remove_lora):
            verb(compiled)
            assert follows()
        assert torch.equal(model(x), base)
        load_lora(compiled, tmp_path)
        assert follows() and not torch.allclose(model(x), base, atol=1e-3)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert all("_orig_mod" not in n for n in names)
    remove_lora(model)  # added through one handle, removed through the other
    assert all(not p.requires_grad for p in model.parameters())


def test_compile_would_keep_an_old_graph(monkeypatch):
    """The buggy variant of the test above: without the reset the new adapter is not seen."""
    model, x = mlp().requires_grad_(False), torch.randn(4, 6)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    add_lora(model, rank=2)
    stir(model)
    assert not torch.allclose(compiled(x), model(x), atol=1e-3)


def test_a_shared_layer_has_one_adapter():
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 4)
    add_lora(model, rank=2)
    stir(model)
    W = dense(layer).float()
    torch.testing.assert_close(model(x), F.linear(torch.tanh(F.linear(x, W, layer.bias)), W, layer.bias))
    assert len(lora_parameters(model)) == 2 and len(layer._forward_hooks) == 1
    adapted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), adapted)


def test_torchs_own_encoder_layer():
    """Its fast path reads weights and calls no layer: hooks switch it off. out_proj is never called: never adapted."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    encoder, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval(), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    names = add_lora(encoder, rank=2)
    assert names == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with pytest.raises(ValueError, match=r"target=\['out_proj'\] matches no linear layer"):
        add_lora(copy.deepcopy(layer), rank=2, target=["linear1", "out_proj"])
    stir(encoder)
    slow = encoder(x)  # with gradients
    with torch.no_grad():
        fast, padded = encoder(x), encoder(x, src_key_padding_mask=mask)
        merge_lora(encoder)
        merged = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[~mask], merged[~mask], rtol=0, atol=1e-5)


def test_recomputation_over_a_frozen_base_still_trains():
    model = gpt2().train()
    add_lora(model, rank=2)
    stir(model)
    grads = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS).logits.pow(2).mean().backward()
        grads.append([p.grad.clone() for p in lora_parameters(model)])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


# ---- targets and arguments -----------------------------------------------------------------------------------------


class Headed(nn.Module):
    def __init__(self, head, tie=False):
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
        setattr(self, head, nn.Linear(4, 9, bias=False))
        if tie:
            getattr(self, head).weight = self.embed.weight


@pytest.mark.parametrize(("head", "tie"), [("lm_head", False), ("score", False), ("to_vocabulary", True)])
def test_all_linear_leaves_the_head_out(head, tie):
    assert add_lora(Headed(head, tie), rank=2) == ["body"]
    assert add_lora(Headed(head, tie), rank=2, target=[head]) == [head]


def test_all_linear_asks_the_model_for_its_head():
    model = nn.Sequential(Headed("decoder"))  # also when it is inside another module
    model[0].get_output_embeddings = lambda: model[0].decoder
    assert add_lora(model, rank=2) == ["0.body"]


def test_all_linear_keeps_an_ordinary_last_layer():
    assert add_lora(Headed("decoder"), rank=2) == ["body", "decoder"]


BAD = [
    ({"target": "c_atn"}, r"target=\['c_atn'\] matches no linear layer; wanted some of: transformer.h.\*.attn.c_attn"),
    ({"target": ["c_attn", "wte", "c_fcc"]}, r"target=\['wte', 'c_fcc'\] matches no linear layer; wanted some of: "),
    ({"target": "*attn"}, r"target=\['\*attn'\] matches no linear layer"),
    ({"target": []}, r"target=\[\] matches no linear layer"),
    ({"rank": 17}, r"rank=17 does not fit layer 'transformer.h.0.attn.c_attn' of width 16; wanted 1 to 16"),
    ({"rank": 0}, r"rank=0 does not fit"),
    ({"rank": 2.0}, r"rank=2.0 does not fit"),
    ({"alpha": 0}, r"alpha=0 is out of range; wanted a finite number above 0"),
    ({"alpha": math.inf}, r"alpha=inf is out of range"),
    ({"alpha": math.nan}, r"alpha=nan is out of range"),
    ({"dropout": 1.0}, r"dropout=1.0 is out of range; wanted 0 <= dropout < 1"),
    ({"dropout": -0.1}, r"dropout=-0.1 is out of range"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_change_nothing(options, message):
    model = gpt2()
    with pytest.raises(ValueError, match=message) as error:
        add_lora(model, **{"rank": 2, **options})
    assert "\n" not in str(error.value)
    assert all(p.requires_grad for p in model.parameters()) and model.state_dict().keys() == gpt2().state_dict().keys()
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match="already has adapters; wanted remove_lora first"):
        add_lora(model, rank=2)


def test_no_linear_layer_but_the_head():
    with pytest.raises(ValueError, match="target=all-linear matches no linear layer; wanted some of: lm_head"):
        add_lora(nn.ModuleDict({"lm_head": nn.Linear(3, 3)}), rank=1)


# ---- modules that train in full beside the adapters ------------------------------------------------------------------


def bert(task="SequenceClassification", kind="Bert", seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    config = getattr(transformers, f"{kind}Config")(vocab_size=48, max_position_embeddings=16, **sizes, **options)
    return getattr(transformers, f"{kind}For{task}")(config).eval()


def outputs(model):
    with torch.no_grad():
        out = model(IDS)
    return out.logits if "logits" in out else torch.cat([out.start_logits, out.end_logits])


def headed(task="SequenceClassification", head="classifier", **kind):
    """As if trained: adapters and the head."""
    model = bert(task)
    names = add_lora(model, rank=3, alpha=7, **kind)
    assert len(names) > 0 and head not in names
    getattr(model, head).requires_grad_(True)
    return stir(model)  # which asks lora_parameters


HEADS = {"SequenceClassification": ("classifier", "SEQ_CLS"), "TokenClassification": ("classifier", "TOKEN_CLS"),
         "QuestionAnswering": ("qa_outputs", "QUESTION_ANS")}  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("task", HEADS)
def test_a_head_saved_here_is_the_same_in_peft(task, kind, tmp_path):
    head = HEADS[task][0]
    model = headed(task, head, **KINDS[kind])
    save_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [head]
    oracle = peft.PeftModel.from_pretrained(bert(task), tmp_path).eval()
    torch.testing.assert_close(outputs(oracle), outputs(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs(oracle.merge_and_unload()), outputs(model), rtol=0, atol=1e-5)
    # a head that is not saved is a fresh one, and the check sees it
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n: t for n, t in tensors.items() if "lora_" in n}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": None}))
    lost = peft.PeftModel.from_pretrained(bert(task), tmp_path).eval()
    assert (outputs(lost) - outputs(model)).abs().max() > 0.01


@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("task", HEADS)
def test_a_head_saved_by_peft_is_the_same_here(task, by_task, tmp_path):
    head, task_type = HEADS[task]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "output.dense"], modules_to_save=[head],
                             task_type=task_type if by_task else None)  # fmt: skip
    oracle = peft.get_peft_model(bert(task), config).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    oracle.save_pretrained(tmp_path)
    model = bert(task)
    load_lora(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(oracle), rtol=0, atol=1e-5)
    trains = {n for n, p in model.named_parameters() if p.requires_grad and ".lora." not in n}
    assert trains == {f"{head}.weight", f"{head}.bias"}
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    for head_trains in (False, True):  # into an adapted model, whether its head trains yet or not
        filled = bert(task, seed=1)
        filled.load_state_dict({n: p for n, p in bert(task).state_dict().items() if head not in n}, strict=False)
        add_lora(filled, rank=3, alpha=7, target=sorted(lora._adapted(model)))
        getattr(filled, head).requires_grad_(head_trains)
        optimizer = torch.optim.SGD(getattr(filled, head).parameters(), lr=1.0)
        load_lora(filled, tmp_path)
        assert torch.equal(outputs(filled), outputs(model))
        assert all(p.requires_grad for p in getattr(filled, head).parameters())
        outputs_before = outputs(filled)
        for p in getattr(filled, head).parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # an optimizer made before the load still moves the head: the same parameters, filled
        assert not torch.equal(outputs(filled), outputs_before)
    save_lora(model, tmp_path / "again")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "again", tmp_path)]
    assert same_bits(*(bits(safetensors.torch.load_file(file)) for file in files))


def test_training_with_a_head_follows_peft(tmp_path):
    model = bert()
    add_lora(model, rank=3, alpha=7)
    model.classifier.requires_grad_(True)
    save_lora(model, tmp_path)
    oracle = peft.PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)

    def curve(model, parameters):
        model.train()
        torch.manual_seed(5)  # the same dropout masks
        optimizer, losses = torch.optim.AdamW(parameters, lr=2e-2), []
        for _ in range(6):
            loss = F.cross_entropy(model(IDS).logits, torch.tensor([0, 1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    theirs = curve(oracle, [p for p in oracle.parameters() if p.requires_grad])
    ours = curve(model, lora_parameters(model))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    # the same check rejects a head that stays as it was
    frozen = bert()
    load_lora(frozen, tmp_path)
    frozen.classifier.requires_grad_(False)
    assert not torch.allclose(curve(frozen, lora_parameters(frozen)), theirs, rtol=2e-5, atol=0)


def test_a_name_stands_for_all_that_end_so(tmp_path):
    """PEFT takes "classifier" for "pre_classifier" too and fails to load a file without it: so both are saved."""
    model = bert(kind="DistilBert")
    add_lora(model, rank=3, target=["q_lin"])
    model.classifier.requires_grad_(True)
    save_lora(stir(model), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {n for n in tensors if "lora_" not in n} == {
        f"base_model.model.{n}.{p}" for n in ("classifier", "pre_classifier") for p in ("weight", "bias")}  # fmt: skip
    oracle = peft.PeftModel.from_pretrained(bert(kind="DistilBert"), tmp_path).eval()
    torch.testing.assert_close(outputs(oracle), outputs(model), rtol=0, atol=1e-5)
    load_lora(again := bert(kind="DistilBert"), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    without = {n: t for n, t in tensors.items() if "pre_classifier" not in n}
    safetensors.torch.save_file(without, tmp_path / "adapter_model.safetensors")
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(bert(kind="DistilBert"), tmp_path)
    refused(tmp_path, "the tensors of pre_classifier are {}; wanted {.*}$", bert(kind="DistilBert"))


def test_an_adapted_layer_whose_name_ends_like_a_head(tmp_path):
    """This PEFT cannot have at all: it refuses to adapt pre_classifier beside a classifier that it saves."""
    model = bert(kind="DistilBert")
    assert "pre_classifier" in add_lora(model, rank=3)
    model.classifier.requires_grad_(True)
    save_lora(stir(model), tmp_path)
    load_lora(again := bert(kind="DistilBert"), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    load_lora(model, tmp_path)
    save_lora(again, tmp_path / "again")
    assert (tmp_path / "again/adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


class Body(nn.Module):
    """A head of several layers, one of them with buffers, and a parameter of the model itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.gain = nn.Linear(6, 8), nn.Parameter(torch.ones(()))
        self.top = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.top(self.body(x)) * self.gain


@pytest.mark.parametrize("merged", [False, True])
def test_a_head_is_saved_whole_with_its_buffers(merged, tmp_path):
    model, x = Body(), torch.randn(5, 6)
    add_lora(model, rank=2, target="body")
    model.top.requires_grad_(True)
    model.top[3].bias.requires_grad_(False)  # saved all the same: PEFT saves whole modules
    model.top[3].bias.data.add_(1)
    model.top[0].weight.data = model.top[0].weight.data.T.contiguous().T  # which safetensors does not take as it is
    stir(model)(x)  # in training: the running statistics move
    model.eval()
    adapted = model(x)
    if merged:
        merge_lora(model)
    save_lora(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {n for n in tensors if "lora_" not in n} == {f"base_model.model.top.{n}" for n in model.top.state_dict()}
    oracle = peft.PeftModel.from_pretrained(Body(), tmp_path).eval()
    torch.testing.assert_close(oracle(x), adapted)
    load_lora(again := Body().eval(), tmp_path)
    torch.testing.assert_close(again(x), adapted)  # not bit by bit: a product may depend on how its weight lies
    for name, value in model.top.state_dict().items():
        assert torch.equal(again.top.state_dict()[name], value), name
    assert again.top[1].num_batches_tracked == 1
    assert all(p.requires_grad for p in again.top.parameters())


def test_whole_modules_of_peft_with_modules_inside(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["top"])
    oracle, x = peft.get_peft_model(Body(), config), torch.randn(5, 6)
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    oracle.train()(x)
    oracle.eval().save_pretrained(tmp_path)
    load_lora(model := Body().eval(), tmp_path)
    torch.testing.assert_close(model(x), oracle(x))


def test_verbs_leave_the_head_alone():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    fresh, weights = bits(model.classifier.state_dict()), bits(model.bert.state_dict())
    add_lora(model, rank=3)
    model.classifier.requires_grad_(True)
    adapters = [p for layer in lora._adapted(model).values() for p in layer.lora.parameters()]
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in (*adapters, *model.classifier.parameters())}
    assert len(lora_parameters(model)) == len(adapters) + 2
    stir(model)
    trained, adapted = bits(model.classifier.state_dict()), outputs(model)
    assert not same_bits(trained, fresh)
    merge_lora(model)
    torch.testing.assert_close(outputs(model), adapted, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in model.classifier.parameters())
    unmerge_lora(model)
    assert torch.equal(outputs(model), adapted)
    remove_lora(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert same_bits(bits(model.classifier.state_dict()), trained) and same_bits(bits(model.bert.state_dict()), weights)


def test_what_is_both_adapted_and_trained_in_full(tmp_path):
    """PEFT saves whole modules, and can save none that holds adapters: better said before the training than after."""
    query = "bert.encoder.layer.0.attention.self.query"
    for name, parameter in {"classifier": "classifier.weight", query: f"{query}.bias"}.items():
        model = bert()
        add_lora(model, rank=2, target=["classifier", "query"])
        model.get_parameter(parameter).requires_grad_(True)
        for verb in (lora_parameters, lambda m: save_lora(m, tmp_path / "none")):
            with pytest.raises(ValueError, match=rf"^module '{name}' holds adapters and trains in full; wanted one"):
                verb(model)
    model = Body()
    add_lora(model, rank=2, target="body")
    model.gain.requires_grad_(True)
    with pytest.raises(ValueError, match="^module '' holds adapters and trains in full"):
        lora_parameters(model)
    assert not (tmp_path / "none").exists()


def test_a_tied_head(tmp_path):
    """Head and embedding are one parameter here and two copies in PEFT, so a file for both has to hold both."""
    model = gpt2()
    add_lora(model, rank=2, target="c_attn")
    model.lm_head.requires_grad_(True)
    save_lora(stir(model), tmp_path)
    assert len(lora_parameters(model)) == 5
    oracle = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    torch.testing.assert_close(logits(oracle), logits(model), rtol=0, atol=1e-5)
    load_lora(again := gpt2(), tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.lm_head.weight is again.transformer.wte.weight
    # PEFT's head alone, or both with values of their own, do not fit a model that ties them
    for names in (["lm_head"], ["lm_head", "wte"]):
        oracle = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=names))
        with torch.no_grad():
            for p in oracle.parameters():
                p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
        oracle.eval().save_pretrained(tmp_path)
        refused(tmp_path, "lm_head.weight is tied to transformer.wte.weight|wte.weight is tied to lm_head.weight")
        untied = gpt2(tie_word_embeddings=False)
        untied.load_state_dict(gpt2().state_dict())
        load_lora(untied, tmp_path)
        torch.testing.assert_close(logits(untied), logits(oracle), rtol=0, atol=1e-5)


class TwoPlaces(Body):
    """One head under two names, both called."""

    def __init__(self):
        super().__init__()
        self.again = self.top

    def forward(self, x):
        return self.top(self.body(x)) + self.again(self.body(-x))


def test_a_head_in_two_places(tmp_path):
    model, x = TwoPlaces().eval(), torch.randn(5, 6)
    add_lora(model, rank=2, target="body")
    model.top.requires_grad_(True)
    assert len(lora_parameters(model)) == 2 + len(list(model.top.parameters()))
    save_lora(stir(model), tmp_path)
    oracle = peft.PeftModel.from_pretrained(TwoPlaces().eval(), tmp_path).eval()
    torch.testing.assert_close(oracle(x), model(x))  # PEFT makes two heads of it: both need the trained values
    load_lora(again := TwoPlaces().eval(), tmp_path)
    assert torch.equal(again(x), model(x)) and again.top is again.again


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_saves_its_head_under_plain_names(inner, tmp_path):
    model, x = Body().eval(), torch.randn(5, 6)
    add_lora(model, rank=2, target="body")
    model.top.requires_grad_(True)
    stir(model)
    y = model(x)
    if inner:
        model.top = torch.compile(model.top, backend="eager")
        model.body = torch.compile(model.body, backend="eager")
    handle = model if inner else torch.compile(model, backend="eager")
    save_lora(handle, tmp_path)
    names = {n.removeprefix("base_model.model.") for n in safetensors.torch.load_file(tmp_path / lora._WEIGHTS)}
    assert names == {f"top.{n}" for n in Body().top.state_dict()} | {"body.lora_A.weight", "body.lora_B.weight"}
    load_lora(plain := Body().eval(), tmp_path)
    assert torch.equal(plain(x), y)
    for p in lora_parameters(handle):
        p.data.zero_()
    load_lora(handle, tmp_path)
    torch.testing.assert_close(handle(x), y)


def test_heads_that_do_not_fit(tmp_path):
    save_lora(headed(target=["query"]), tmp_path)
    refused(tmp_path, r"no linear layer for base_model.model.classifier.bias; wanted", bert("QuestionAnswering"))
    refused(tmp_path, r"the tensors of classifier are .*\(2, 16\).*; wanted .*\(5, 16\)", bert(num_labels=5))
    adapted = bert(num_labels=5)
    add_lora(adapted, rank=3, alpha=7, target=["query"])
    refused(tmp_path, r"the tensors of classifier are .*\(2, 16\).*; wanted .*\(5, 16\)", adapted)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, settings = safetensors.torch.load_file(file), json.loads(config.read_text())
    for name in ("classifier.weight", "classifier.bias"):  # not to be half filled
        safetensors.torch.save_file({n: t for n, t in tensors.items() if n != f"base_model.model.{name}"}, file)
        refused(tmp_path, "the tensors of classifier are .*; wanted ", bert())
    safetensors.torch.save_file({n: t for n, t in tensors.items() if "lora_" in n}, file)
    refused(tmp_path, "the tensors of classifier are {}; wanted ", bert())
    safetensors.torch.save_file({**tensors, "base_model.model.classifier.scale": torch.ones(2)}, file)
    refused(tmp_path, "no linear layer for base_model.model.classifier.scale; wanted ", bert())
    safetensors.torch.save_file(tensors, file)
    for listed in (None, [], ["score"]):  # a tensor that no listed module has: perhaps of the base model
        config.write_text(json.dumps({**settings, "modules_to_save": listed}))
        refused(tmp_path, "no linear layer for base_model.model.classifier.bias; wanted ", bert())
    config.write_text(json.dumps({**settings, "modules_to_save": ["classifier", "bert.pooler"]}))
    refused(tmp_path, "the tensors of bert.pooler.dense are {}; wanted ", bert())
    config.write_text(json.dumps({**settings, "modules_to_save": ["classifier", "score"]}))  # as PEFT lists them
    load_lora(bert(), tmp_path)


def test_a_head_that_trains_in_the_model_but_is_not_in_the_file(tmp_path):
    model = bert()
    add_lora(model, rank=3, alpha=7)
    save_lora(stir(model), tmp_path)
    load_lora(model, tmp_path)
    model.classifier.requires_grad_(True)
    refused(tmp_path, "are not those of the model's adapters", model)  # else it would stay as it is, unnoticed


def test_all_linear_leaves_out_what_is_inside_a_head():
    names = add_lora(bert(kind="Roberta", pad_token_id=0), rank=2)
    assert names and not [n for n in names if "classifier" in n]  # classifier.dense, classifier.out_proj
    assert not [n for n in add_lora(bert("QuestionAnswering"), rank=2) if "qa_outputs" in n]


# ---- files ---------------------------------------------------------------------------------------------------------


def saved(folder, **kind):
    model = gpt2()
    add_lora(model, rank=3, alpha=7, **kind)
    save_lora(stir(model), folder)
    return model


def refused(folder, message, model=None):
    model = gpt2() if model is None else model
    before, hooks = bits(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=message) as error:
        load_lora(model, folder)
    assert "\n" not in str(error.value)
    assert same_bits(bits(model.state_dict()), before)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


def test_missing_damaged_and_pickled_files(tmp_path):
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    refused(tmp_path / "none", "adapter_config.json cannot be read: .*No such file")
    saved(tmp_path)
    whole = weights.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused(tmp_path, "adapter_model.safetensors cannot be read: ")
    weights.unlink()
    refused(tmp_path, "adapter_model.safetensors cannot be read: .*No such file")

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "adapter_model.bin is a pickle and is never opened; wanted adapter_model.safetensors$")
    weights.write_bytes(pickle.dumps(Bomb()))  # a pickle under a false name
    refused(tmp_path, "adapter_model.safetensors cannot be read: ")
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-5])
    refused(tmp_path, "adapter_config.json cannot be read: ")


def test_adapters_of_another_base(tmp_path):
    saved(tmp_path)
    refused(tmp_path, r"no linear layer for base_model.*transformer.h.0.attn.c_attn.lora_A.weight; wanted", llama())
    refused(tmp_path, r"no linear layer for base_model.model.transformer.h.1.", gpt2_small := gpt2_layers(1))
    assert not hasattr(gpt2_small, "lora_trainable")
    wide = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2,
                                                                bos_token_id=0, eos_token_id=0))  # fmt: skip
    refused(tmp_path, r"tensors of transformer.h.0.attn.c_attn are .*\(3, 16\).*; wanted .*\(3, 32\).*\(96, 3\)", wide)
    for options in ({"rank": 4}, {"alpha": 8}, {"dora": True}, {"rslora": True}, {"target": "c_attn"}):
        model = gpt2()
        add_lora(model, **{"rank": 3, "alpha": 7, **options})
        refused(tmp_path, "its layers, rank, alpha or kind are not those of the model's adapters", model)


def gpt2_layers(n):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=n, n_head=2, bos_token_id=0, eos_token_id=0))  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [
    ("bias", "all"), ("rank_pattern", {"c_attn": 4}), ("alpha_pattern", {"c_fc": 1}),
    ("lora_bias", True), ("init_lora_weights", "pissa"), ("peft_type", "LOHA"), ("use_qalora", True),
    ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]), ("target_parameters", ["x"]),
    ("loftq_config", {"bits": 4}), ("an_option_of_next_year", 1),
])  # fmt: skip
def test_options_that_change_the_computation_are_refused(option, value, tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    refused(tmp_path, rf"adapter_config.json: option {option}=.* is not supported; wanted it off$")


def test_layers_that_peft_chose_by_other_options(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], exclude_modules=["mlp.c_proj"],
                             layers_to_transform=[1], init_lora_weights=False)  # fmt: skip
    oracle = peft.get_peft_model(gpt2(), config).eval()
    oracle.save_pretrained(tmp_path)
    load_lora(model := gpt2(), tmp_path)
    assert sorted(lora._adapted(model)) == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]
    torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=1e-5)


def test_tensors_that_do_not_fit_the_configuration(tmp_path):
    saved(tmp_path, dora=True)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, settings = safetensors.torch.load_file(weights), json.loads(config.read_text())
    name = "base_model.model.transformer.h.0.attn.c_attn"
    for key in ("lora_B.weight", "lora_magnitude_vector"):
        safetensors.torch.save_file({n: t for n, t in whole.items() if n != f"{name}.{key}"}, weights)
        refused(tmp_path, "the tensors of transformer.h.0.attn.c_attn are ")
    safetensors.torch.save_file({**whole, f"{name}.lora_B.bias": torch.zeros(48)}, weights)
    refused(tmp_path, r"lora_B.bias")
    safetensors.torch.save_file({**whole, "base_model.model.lm_head.weight": torch.zeros(48, 16)}, weights)
    refused(tmp_path, r"no linear layer for base_model.model.lm_head.weight")
    safetensors.torch.save_file({}, weights)
    refused(tmp_path, r"target=\[\] matches no linear layer")
    safetensors.torch.save_file(whole, weights)
    for change in ({"r": 4}, {"r": None}, {"use_dora": False}, {"lora_alpha": 0}):
        config.write_text(json.dumps({**settings, **change}))
        refused(tmp_path, "wanted")


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = saved(tmp_path)
    old = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model.transformer.h[0].attn.c_attn.lora.B.data.add_(1)
    write = pathlib.Path.write_bytes

    def full_disk(self, data):
        write(self, data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_lora(model, tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in old} == old
    load_lora(gpt2(), tmp_path)


# ---- LoRA+ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_groups_are_those_of_peft(make, kind, tmp_path):
    """Which parameters are in which group, at what rate and decay."""
    from peft.optimizers import create_loraplus_optimizer

    model = MODELS[make]()
    add_lora(model, rank=3, alpha=7, **KINDS[kind])
    save_lora(stir(model), tmp_path)
    oracle = peft.PeftModel.from_pretrained(MODELS[make](), tmp_path, is_trainable=True)
    theirs = create_loraplus_optimizer(oracle, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0,
                                       loraplus_weight_decay=0.1)  # fmt: skip
    ours = torch.optim.AdamW(lora_groups(model, ratio=8, weight_decay=0.1, lr=1e-3))

    def groups(model, optimizer):
        names = {id(p): n.replace("base_model.model.", "").replace("lora_A.default.weight", "lora.A")
                 .replace("lora_B.default.weight", "lora.B") for n, p in model.named_parameters()}  # fmt: skip
        return sorted((g["lr"], g["weight_decay"], sorted(names[id(p)] for p in g["params"]))
                      for g in optimizer.param_groups if g["params"])  # fmt: skip

    assert groups(model, ours) == groups(oracle, theirs)
    assert sorted(g["lr_scale"] for g in ours.param_groups) == [1.0, 8.0]
    for _ in range(4):  # and they train alike
        for m, optimizer in ((model, ours), (oracle, theirs)):
            F.cross_entropy(m(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=2e-5)


def test_groups_with_a_head_and_a_schedule():
    """Each trained parameter is in one group; B alone is fast; vectors (DoRA's m, biases) do not decay."""
    model = headed(dora=True)
    groups = lora_groups(model, weight_decay=0.1)
    names, found = {id(p): n for n, p in model.named_parameters()}, {}
    for g in groups:
        assert set(g) == {"params", "lr_scale", "weight_decay"}
        found |= {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(lora_parameters(model))
    for n, group in found.items():
        last = n.rpartition(".")[2]
        want = {"A": (1.0, 0.1), "B": (16.0, 0.1), "m": (1.0, 0.0), "weight": (1.0, 0.1), "bias": (1.0, 0.0)}[last]
        assert group == want, n
    assert {"A", "B", "m", "weight", "bias"} == {n.rpartition(".")[2] for n in found}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lora_groups(model), lr=1.0)
    for g in optimizer.param_groups:
        g["lr"] = 1e-3 * g["lr_scale"]  # as a loop does
    model(IDS).logits.pow(2).sum().backward()
    optimizer.step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            step = p.grad * (16e-3 if n.endswith(".lora.B") else 1e-3)
            torch.testing.assert_close(p.detach(), before[n] - step, rtol=1e-6, atol=1e-8)


def test_groups_refuse_what_lora_parameters_refuses():
    model = gpt2()
    with pytest.raises(ValueError, match="has no adapters"):
        lora_groups(model)
    add_lora(model, rank=2)
    for ratio in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"ratio={ratio} is out of range; wanted a finite number above 0"):
            lora_groups(model, ratio)
    merge_lora(model)
    with pytest.raises(ValueError, match="merged; wanted unmerge_lora first"):
        lora_groups(model)


# ---- over a quantised base (QLoRA) ---------------------------------------------------------------------------------


def quantised(make, kind, dtype=torch.float64):
    """A model of codes, and the plain one of the weights that they stand for."""
    model = make().to(dtype).train()
    quantise(model, kind)
    plain = copy.deepcopy(model)
    dequantise(plain)
    return model, plain


@pytest.mark.parametrize("codes", ["nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_over_codes_are_those_over_the_weights_they_stand_for(kind, codes):
    model, plain = quantised(llama, codes)
    assert add_lora(model, rank=3, **KINDS[kind]) == add_lora(plain, rank=3, **KINDS[kind])
    with torch.no_grad():
        for m in (model, plain):
            generator = torch.Generator().manual_seed(1)
            for p in lora_parameters(m):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1 + (1 if p.ndim == 1 else 0))
    assert torch.allclose(logits(model), logits(plain), rtol=1e-9, atol=1e-12)
    for m in (model, plain):
        F.cross_entropy(m(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, plain))
    assert all((g is not None) == (".lora." in n) for n, g in ours.items())
    for n, g in ours.items():
        if g is not None:
            torch.testing.assert_close(g, theirs[n], rtol=1e-8, atol=1e-12)
            assert g.abs().max() > 0


def test_codes_with_adapters_keep_little_for_the_backward_pass():
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)])
    size = memory(model)
    quantise(model, "nf4")
    add_lora(model, rank=2)
    kept, x = {}, torch.randn(1, 256)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.nbytes) or t, lambda t: t
    ):
        model(x).sum()
    assert sum(kept.values()) < size / 5 and memory(model) < size / 5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_saving_and_loading_over_codes(kind, tmp_path):
    model, plain = quantised(llama, "nf4", torch.float32)
    held = bits({n: b for n, b in model.state_dict().items() if n.endswith((".codes", ".absmax", ".scale", ".mean"))})
    start = logits(model)
    add_lora(model, rank=4, **KINDS[kind])
    assert torch.equal(logits(model), start)
    optimizer, losses = torch.optim.AdamW(lora_groups(model, ratio=4, lr=2e-2)), []
    for _ in range(40):
        losses.append(F.cross_entropy(model(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2  # a frozen head this small cannot say more
    trained = logits(model)
    assert same_bits(bits({n: model.state_dict()[n] for n in held}), held)  # only the adapters have learnt
    save_lora(model, tmp_path)
    oracle = peft.PeftModel.from_pretrained(plain, tmp_path).eval()  # over the weights that the codes stand for
    torch.testing.assert_close(logits(oracle), trained, rtol=0, atol=1e-5)
    again, _ = quantised(llama, "nf4", torch.float32)
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), trained)
    remove_lora(again)
    assert torch.equal(logits(again), start) and all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_over_codes_wants_them_dequantised(kind):
    model, _ = quantised(llama, "int8", torch.float32)
    add_lora(model, rank=4, **KINDS[kind])
    adapted, state = logits(stir(model)), bits(model.state_dict())
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.*' is quantised, .* wanted dequantise\(model\) first"):
        merge_lora(model)
    assert same_bits(bits(model.state_dict()), state) and torch.equal(logits(model), adapted)
    dequantise(model)
    torch.testing.assert_close(logits(model), adapted)  # the adapters have stayed
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds a merged adapter; wanted unmerge_lora or remove_lora first"):
        quantise(model)
    unmerge_lora(model)
    quantise(model, "int8")  # below adapters that are there already
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-2)


def test_the_demo_runs_alone(tmp_path):
    (tmp_path / "lora.py").write_text(pathlib.Path(lora.__file__).read_text())
    done = subprocess.run([sys.executable, "-I", "lora.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unmerged by 0\n") == 3 and "100% of the weights learn" in done.stdout
