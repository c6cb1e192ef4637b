# SPDX-License-Identifier: MIT
"""Adapters against the formula in einsum at the residual addition, the paper's count, and modules in place of hooks."""

import copy
import importlib.util
import json
import pathlib
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minimal import adapter
from minimal.adapter import ACTIVATIONS, adapter_parameters, add_adapter, load_adapter, remove_adapter, save_adapter
from minimal.bert import BERT, BERTConfig
from minimal.gpt import GPT, GPTConfig
from minimal.transformer import Transformer, TransformerConfig

C, V = 16, 48
IDS = torch.arange(14).reshape(2, 7) * 5 % V
PLACES = ("pfeiffer", "houlsby")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ---- models: how to make one, what to call, and the sublayers of it that each placement adapts ---------------------


def large(model):
    """Weights of a size that a trained model has: at N(0, 0.02^2) and this width hardly anything reaches the output."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    return model.eval()


def gpt():
    torch.manual_seed(0)
    return large(GPT(GPTConfig(V, n_positions=16, n_embd=C, n_layer=2, n_head=2, dropout=0.0)))


def bert(task="classify", labels=("a", "b")):
    torch.manual_seed(0)
    return large(BERT(BERTConfig(V, C, 2, 2, 24, 16, dropout=0.0, task=task, labels=labels)))


def transformer(**options):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(V, C, 2, 2, 1, 24, dropout=0.0, **options)).eval()


def llama():
    torch.manual_seed(0)
    module = pytest.importorskip("minimal.llama")
    sizes = {"vocab_size": V, "hidden_size": C, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}  # fmt: skip
    return large(module.Llama(module.LlamaConfig(**sizes)))


def hf(kind, **options):
    torch.manual_seed(0)
    config, make = {
        "gpt2": (transformers.GPT2Config(vocab_size=V, n_positions=16, n_embd=C, n_layer=2, n_head=2, bos_token_id=0,
                                         eos_token_id=0, **options), transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig(vocab_size=V, hidden_size=C, intermediate_size=24, num_hidden_layers=2,
                                           num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
                                           eos_token_id=0), transformers.LlamaForCausalLM),
        "bert": (transformers.BertConfig(vocab_size=V, hidden_size=C, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=24), transformers.BertForSequenceClassification),
        "bart": (transformers.BartConfig(vocab_size=V, d_model=C, encoder_layers=2, decoder_layers=1,
                                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                                         decoder_ffn_dim=24, max_position_embeddings=16),
                 transformers.BartForConditionalGeneration),
    }[kind]  # fmt: skip
    return make(config).eval()


def of(names, *blocks):
    return [f"{block}.{name}" for block in blocks for name in names]


MODELS = {
    "gpt": (gpt, lambda m: m(IDS), of(["attn.c_proj", "mlp.c_proj"], "transformer.h.0", "transformer.h.1")),
    "llama": (llama, lambda m: m(IDS), of(["self_attn.o_proj", "mlp.down_proj"], "model.layers.0", "model.layers.1")),
    "bert": (bert, lambda m: m(IDS),
             of(["attention.output.dense", "output.dense"], "bert.encoder.layer.0", "bert.encoder.layer.1")),
    "transformer": (transformer, lambda m: m(IDS, IDS),
                    of(["self_attn.out_proj", "fc2"], "encoder.0", "encoder.1")
                    + of(["self_attn.out_proj", "cross_attn.out_proj", "fc2"], "decoder.0")),
    "hf gpt2": (lambda: hf("gpt2"), lambda m: m(IDS).logits,
                of(["attn.c_proj", "mlp.c_proj"], "transformer.h.0", "transformer.h.1")),
    "hf gpt2 cross": (lambda: hf("gpt2", add_cross_attention=True),
                      lambda m: m(IDS, encoder_hidden_states=torch.ones(2, 3, C)).logits,
                      of(["attn.c_proj", "crossattention.c_proj", "mlp.c_proj"], "transformer.h.0", "transformer.h.1")),
    "hf llama": (lambda: hf("llama"), lambda m: m(IDS).logits,
                 of(["self_attn.o_proj", "mlp.down_proj"], "model.layers.0", "model.layers.1")),
    "hf bert": (lambda: hf("bert"), lambda m: m(IDS).logits,
                of(["attention.output.dense", "output.dense"], "bert.encoder.layer.0", "bert.encoder.layer.1")),
    "hf bart": (lambda: hf("bart"), lambda m: m(IDS).logits,
                of(["self_attn.out_proj", "fc2"], "model.encoder.layers.0", "model.encoder.layers.1")
                + of(["self_attn.out_proj", "encoder_attn.out_proj", "fc2"], "model.decoder.layers.0")),
}  # fmt: skip
OURS = ("gpt", "llama", "bert", "transformer")
LAST = ("mlp.c_proj", "mlp.down_proj", "fc2")  # of a feed-forward network; BERT's has a name that ends another


def wanted(name, placement):
    last = [n for n in MODELS[name][2] if n.endswith(LAST) or (".output.dense" in n and ".attention." not in n)]
    return last if placement == "pfeiffer" else MODELS[name][2]


def output(name, model):
    with torch.no_grad():
        return MODELS[name][1](model)


def stir(model, scale=0.1):
    """Adapters as if trained: nothing in them is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    return model


def bits(tensors):
    return {n: (t.dtype, t.detach().contiguous().view(torch.uint8).clone()) for n, t in tensors.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a)


def delta(a, h, f):
    """W_up f(W_down h + b_down) + b_up, one sum at a time, in float64."""
    W_down, b_down, W_up, b_up = (t.detach().double() for t in (a.W_down, a.b_down, a.W_up, a.b_up))
    z = f(torch.einsum("md,btd->btm", W_down, h.double()) + b_down)
    return (torch.einsum("dm,btm->btd", W_up, z) + b_up).to(h.dtype)


# ---- where, how many, and the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_placement_count_and_start(name, placement):
    model = MODELS[name][0]()
    before, weights = output(name, model), bits(model.state_dict())
    names = add_adapter(model, 5, placement, "gelu")  # ReLUs of so small a model may all be off
    assert sorted(names) == sorted(wanted(name, placement))
    assert torch.equal(output(name, model), before)
    assert sum(p.numel() for p in adapter_parameters(model)) == len(names) * (2 * 5 * C + C + 5)  # 2 m d + d + m
    now = bits(model.state_dict())
    assert same_bits({n: now[n] for n in weights}, weights)
    new = {f"{n}.adapter.{w}" for n in names for w in ("W_down", "b_down", "W_up", "b_up")}
    assert now.keys() - weights.keys() == new
    stir(model)
    assert (output(name, model) - before).abs().max() > 1e-3
    MODELS[name][1](model).float().pow(2).mean().backward()
    for n, p in model.named_parameters():
        assert p.requires_grad == (".adapter." in n) == (p.grad is not None and p.grad.abs().max().item() > 0), n


def test_the_first_gradient_reaches_w_up_and_is_zero_in_w_down():
    model = gpt()
    add_adapter(model, 5)
    model.loss(IDS)[0].backward()
    for layer in adapter._adapted(model).values():
        assert layer.adapter.W_up.grad.abs().min(dim=1).values.max() > 0 and layer.adapter.b_up.grad.any()
        assert not layer.adapter.W_down.grad.any()


def test_w_down_starts_uniform_and_the_rest_zero():
    model = nn.Sequential(nn.Linear(3, 400))
    add_adapter(model, 300, target="0")
    a = model[0].adapter
    assert a.W_down.shape == (300, 400) and a.W_up.shape == (400, 300)
    assert not a.W_up.any() and not a.b_up.any() and not a.b_down.any()
    assert 0.999 / 20 < a.W_down.abs().max() <= 1 / 20  # 1 / sqrt(400)
    assert a.W_down.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_pretrained_adapters_can_be_put_in_by_hand():
    """A known case: W_down = W_up = 1, ReLU: each output gets the positive part of the sum of all."""
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
    add_adapter(model, 1, target="0")
    for p in (model[0].adapter.W_down, model[0].adapter.W_up):
        nn.init.ones_(p)
    x = torch.tensor([[1.0, 2.0], [1.0, -3.0]])
    assert model(x).tolist() == [[4.0, 5.0], [1.0, -3.0]]


# ---- the formula, at the residual addition --------------------------------------------------------------------------


def at_the_residual(name, plain, model, f):
    """The plain model with the formula added where a residual stream takes up a sublayer's output."""
    for layer_name, layer in adapter._adapted(model).items():
        a, block = layer.adapter, layer_name.rsplit(".", 1)[0]
        if name in ("gpt", "llama"):  # dropout 0: what the sublayer returns is added
            plain.get_submodule(block).register_forward_hook(lambda m, args, h, a=a: h + delta(a, h, f))
            continue
        kept = []  # post-norm: what the norm reads is x + h
        plain.get_submodule(layer_name).register_forward_hook(lambda m, args, h, kept=kept: kept.append(h))
        norm = f"{block}.LayerNorm" if name == "bert" else f"{block}.norm"
        plain.get_submodule(norm).register_forward_pre_hook(
            lambda m, args, a=a, kept=kept: (args[0] + delta(a, kept.pop(), f),)
        )
    return plain


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", OURS)
def test_the_output_is_the_papers_formula(name, activation):
    f = {"relu": lambda x: x.clamp_min(0), "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
         "silu": lambda x: x / (1 + (-x).exp()), "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1)}  # fmt: skip
    model = MODELS[name][0]().double()
    plain = copy.deepcopy(model)
    add_adapter(model, 5, "houlsby", activation)
    stir(model, 0.5)
    oracle = at_the_residual(name, plain, model, f[activation])
    torch.testing.assert_close(output(name, model), output(name, oracle))
    for other in f.keys() - {activation}:  # the comparison would not pass whatever f is
        wrong = at_the_residual(name, MODELS[name][0]().double(), model, f[other])
        assert not torch.allclose(output(name, model), output(name, wrong))


class Wrapped(nn.Module):
    """The layer and its adapter as two modules in a row, in place of a hook."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(layer.out_features, size), nn.Linear(size, layer.out_features)

    def forward(self, x):
        h = self.layer(x)
        return h + self.up(F.relu(self.down(h)))


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.lists(st.integers(1, 3), max_size=3))
def test_values_and_gradients_for_any_shape(inputs, d, size, batch):
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, d).double(), torch.randn(*batch, inputs, dtype=torch.float64)
    oracle, model = nn.Sequential(Wrapped(copy.deepcopy(layer), size)).double(), nn.Sequential(layer)
    add_adapter(model, size, target="0")
    stir(model)
    a, o = layer.adapter, oracle[0]
    o.down.weight.data, o.down.bias.data, o.up.weight.data, o.up.bias.data = (
        t.detach().clone() for t in (a.W_down, a.b_down, a.W_up, a.b_up))  # fmt: skip
    y, z = model(x), oracle(x)
    torch.testing.assert_close(y, z)
    mine = torch.autograd.grad(y.square().sum(), (a.W_down, a.b_down, a.W_up, a.b_up))
    theirs = torch.autograd.grad(z.square().sum(), (o.down.weight, o.down.bias, o.up.weight, o.up.bias))
    torch.testing.assert_close(mine, theirs)


def test_training_follows_two_modules_in_a_row():
    model, oracle = gpt(), gpt().requires_grad_(False)
    add_adapter(model, 5, "houlsby")
    for block, twin in zip(model.transformer.h, oracle.transformer.h, strict=True):
        for part, other in ((block.attn, twin.attn), (block.mlp, twin.mlp)):
            other.c_proj = wrapped = Wrapped(other.c_proj, 5)
            a = part.c_proj.adapter
            for p, value in ((wrapped.down.weight, a.W_down), (wrapped.down.bias, a.b_down)):
                p.data.copy_(value)
            nn.init.zeros_(wrapped.up.weight), nn.init.zeros_(wrapped.up.bias)

    def curve(model):
        optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2), []
        for _ in range(8):
            loss, n = model.loss(IDS)
            optimizer.zero_grad()
            (loss / n).backward()
            optimizer.step()
            losses.append((loss / n).item())
        return losses

    ours, base = curve(model), bits(gpt().state_dict())
    assert ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(curve(oracle), rel=1e-4)
    assert same_bits({n: t for n, t in bits(model.state_dict()).items() if ".adapter." not in n}, base)


@pytest.mark.parametrize("name", OURS)
def test_training_lowers_the_loss(name):
    model = MODELS[name][0]().train()
    add_adapter(model, 4, dropout=0.1)
    parameters, losses = adapter_parameters(model), []
    optimizer = torch.optim.Adam(parameters, 3e-2)
    batch = {"bert": {"ids": IDS, "labels": torch.tensor([0, 1])}, "transformer": {"source": IDS, "target": IDS}}
    for _ in range(25):
        loss, n = model.loss(**batch.get(name, {"ids": IDS}))
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
        losses.append((loss / n).item())
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_is_drawn_for_each_element_and_in_training_only():
    model = nn.Sequential(nn.Linear(6, 6))
    add_adapter(model, 8, dropout=0.5, target="0")
    stir(model, 0.5)
    x = torch.randn(1, 6).expand(20000, 6)
    clean = model.eval()(x[0])
    assert torch.equal(model(x[:3]), model(x[:3]))
    y = model.train()(x)
    assert len(y[:20].unique(dim=0)) > 10  # each row has a mask of its own
    torch.testing.assert_close(y.mean(0), clean, rtol=0, atol=0.05)  # what survives is scaled up
    add_adapter(late := nn.Sequential(nn.Linear(6, 6)).eval(), 8, dropout=0.5, target="0")
    stir(late, 0.5)
    torch.testing.assert_close(late(x[:9]), late(x[:1]).expand(9, 6))  # added to a model in evaluation: no dropout


# ---- dtypes, cache, compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt", "bert", "transformer", "hf gpt2"])
def test_a_half_precision_base_has_float32_adapters(name, dtype):
    model = MODELS[name][0]().to(dtype)
    before = output(name, model)
    add_adapter(model, 5, "houlsby")
    assert torch.equal(output(name, model), before)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    stir(model)
    now = output(name, model)
    assert now.dtype == dtype and not torch.equal(now, before)
    MODELS[name][1](model).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model))
    with pytest.raises(ValueError, match="cast to half precision after add_adapter"):
        adapter_parameters(model.to(dtype))


def test_small_steps_are_not_lost_on_a_half_precision_base():
    model = gpt().to(torch.bfloat16)
    add_adapter(model, 5)
    p = model.transformer.h[0].mlp.c_proj.adapter.W_down
    start = p.detach().clone()
    for _ in range(100):
        p.data.add_(1e-5)
    assert (p - start).mean().item() == pytest.approx(1e-3, rel=0.01)
    lost = start.to(torch.bfloat16)  # the variant in the base's dtype
    for _ in range(100):
        lost.add_(1e-5)
    assert (lost.float() - start).mean().item() != pytest.approx(1e-3, rel=0.3)


def test_the_sum_is_rounded_once():
    model = nn.Sequential(nn.Linear(1, 1)).to(torch.bfloat16)
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    add_adapter(model, 1, target="0")
    model[0].adapter.b_up.data.fill_(2**-8 + 2**-17)  # 1 + this rounds up; rounded before the sum it is a tie, to even
    assert model(torch.ones(1, 1, dtype=torch.bfloat16)).item() == 1 + 2**-7


def test_a_quantised_base(tmp_path):
    quant = pytest.importorskip("minimal.quant")
    model = gpt()
    quant.quantise(model)
    before, held = output("gpt", model), bits(dict(model.named_buffers()))
    add_adapter(model, 5, "houlsby", "gelu")
    assert torch.equal(output("gpt", model), before)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    model.loss(IDS)[0].backward()
    assert all(p.grad is not None for p in adapter_parameters(model))
    save_adapter(stir(model), tmp_path)
    load_adapter(again := gpt(), tmp_path)  # the same adapters on a base of full precision
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(again), adapter_parameters(model), strict=True))
    remove_adapter(model)
    assert torch.equal(output("gpt", model), before) and same_bits(bits(dict(model.named_buffers())), held)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_decoding_with_a_cache(name):
    model = MODELS[name][0]()
    add_adapter(model, 5, "houlsby")
    stir(model, 0.3)
    whole, cache = output(name, model), []
    with torch.no_grad():
        parts = [model(part, cache) for part in IDS.split([3, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_decoding_of_the_transformer_with_a_cache():
    model = transformer()
    add_adapter(model, 5, "houlsby")
    stir(model, 0.3)
    cache = []
    with torch.no_grad():
        memory = model.encode(IDS)
        parts = [model.decode(part, memory, cache=cache) for part in IDS.split([3, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), output("transformer", model))


def test_torch_compile_notices_adapters():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4)
    compiled = torch.compile(model.requires_grad_(False), backend="eager")  # frozen before: no guard sees a change
    plain = compiled(x)
    add_adapter(model, 3, target="2")
    stir(model, 0.5)
    assert not torch.allclose(compiled(x), plain)  # without torch.compiler.reset the old graph runs on
    torch.testing.assert_close(compiled(x), model(x))
    remove_adapter(model)
    torch.testing.assert_close(compiled(x), plain)


def test_through_the_handle_of_torch_compile(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    handle = torch.compile(model, backend="eager")
    assert add_adapter(handle, 3, target="2") == ["2"]
    model[0].requires_grad_(True)
    stir(handle)
    save_adapter(handle, tmp_path)
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), handle(x))
    remove_adapter(handle)
    assert not [n for n, _ in model.named_parameters() if "adapter" in n]


# ---- verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_remove_restores_every_bit(name):
    model = MODELS[name][0]()
    next(model.parameters()).requires_grad_(False)
    before, weights = output(name, model), bits(model.state_dict())
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    for _ in range(2):  # and it can be adapted again
        add_adapter(model, 5, "houlsby")
        stir(model)
        assert not torch.equal(output(name, model), before)
        remove_adapter(model)
        assert torch.equal(output(name, model), before) and same_bits(bits(model.state_dict()), weights)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
        assert not any(m._forward_hooks for m in model.modules())
        assert not hasattr(model, "adapter_settings") and not hasattr(model, "adapter_trainable")


def test_a_copied_or_pickled_model_has_adapters_of_its_own():
    model = gpt()
    add_adapter(model, 5)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    before = output("gpt", model)
    stir(twin)
    assert torch.equal(output("gpt", model), before) and not torch.equal(output("gpt", twin), before)
    remove_adapter(twin)
    assert torch.equal(output("gpt", twin), before) and adapter_parameters(model)


def test_a_layer_used_twice_has_one_adapter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.again = self.fc

        def forward(self, x):
            return self.again(self.fc(x))

    model, x = Twice(), torch.randn(3, 4)
    assert add_adapter(model, 2, target="fc") == ["fc"]
    stir(model)
    torch.testing.assert_close(model(x), model.fc(model.fc(x)))
    assert len(adapter_parameters(model)) == 4


TARGETS = [
    ("mlp.c_proj", ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]),
    (["transformer.h.1.mlp.c_fc"], ["transformer.h.1.mlp.c_fc"]),
    (r".*h\.1\..*c_proj", ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]),
    (["c_fc", "attn.c_proj"], of(["attn.c_proj", "mlp.c_fc"], "transformer.h.0", "transformer.h.1")),
    ("lm_head", ["lm_head"]),
]


@pytest.mark.parametrize(("target", "names"), TARGETS)
@pytest.mark.parametrize("make", ["gpt", "hf gpt2"])
def test_targets_by_name(make, target, names):
    model = MODELS[make][0]()
    assert add_adapter(model, 3, target=target) == names
    assert list(adapter._adapted(model)) == names and model.adapter_settings["placement"] is None


def test_errors_change_nothing():
    layers = "transformer.h.*.attn.c_attn, transformer.h.*.attn.c_proj, transformer.h.*.mlp.c_fc, "
    for options, message in [
        ({"target": "no_such"}, rf"^target=\['no_such'\] matches no linear layer; wanted some of: {layers}"),
        ({"target": ["c_fc", "no_such"]}, rf"^target=\['no_such'\] matches no linear layer; wanted some of: {layers}"),
        ({"target": ["c_fc", "["]}, r"^target=\['\['\] matches no"),
        ({"target": []}, r"^target=\[\] matches no linear layer"),
        ({"size": 0}, "^size=0 is out of range; wanted a whole number of at least 1$"),
        ({"size": 2.0}, "^size=2.0 is out of range"),
        ({"size": True}, "^size=True is out of range"),
        ({"placement": "houlsbey"}, "^placement='houlsbey' is unknown; wanted 'pfeiffer' or 'houlsby'$"),
        ({"activation": "swish"}, "^activation='swish' is unknown; wanted one of relu, gelu, silu, tanh$"),
        ({"dropout": 1.0}, "^dropout=1.0 is out of range; wanted 0 <= dropout < 1$"),
        ({"dropout": float("nan")}, "^dropout=nan is out of range"),
    ]:
        model = gpt()
        before = bits(model.state_dict())
        with pytest.raises(ValueError, match=message):
            add_adapter(model, **options)
        assert same_bits(bits(model.state_dict()), before) and all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "adapter_settings") and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="sublayers of known names; wanted some of: 0, 1$|some of: \\*$"):
        add_adapter(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    add_adapter(model)
    with pytest.raises(ValueError, match="^model=GPT already has adapters; wanted remove_adapter first$"):
        add_adapter(model)
    with pytest.raises(ValueError, match="^model=GPT already has adapters"):
        add_adapter(model, target="attn.c_proj")  # other layers, but then there would be two sets of settings
    for verb in (adapter_parameters, remove_adapter, lambda m: save_adapter(m, "none")):
        with pytest.raises(ValueError, match="^model=GPT has no adapters; wanted the module that add_adapter was"):
            verb(gpt())
    with pytest.raises(ValueError, match="has no adapters"):
        remove_adapter(model.transformer)


def test_an_out_proj_that_is_never_called_is_no_target():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="target=.'out_proj'. matches no linear layer; wanted some of: layers"):
        add_adapter(model, 2, target="out_proj")


# ---- files -----------------------------------------------------------------------------------------------------------


def adapted(name="gpt", size=5, placement="houlsby", **options):
    model = MODELS[name][0]()
    add_adapter(model, size, placement, **options)
    return stir(model)


def refused(folder, message, model=None):
    model = gpt() if model is None else model
    before, hooks = bits(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert same_bits(bits(model.state_dict()), before)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, placement, tmp_path):
    model = adapted(name, 5, placement, activation="gelu", dropout=0.25)
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert same_bits(bits(tensors), bits({n: t for n, t in model.state_dict().items() if ".adapter." in n}))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("target") == list(adapter._adapted(model)) and config.pop("base_model_name_or_path") in (None, "")
    assert config == {"peft_type": "BOTTLENECK", "size": 5, "placement": placement, "activation": "gelu",
                      "dropout": 0.25, "trains": []}  # fmt: skip
    bare, filled = MODELS[name][0](), MODELS[name][0]()
    add_adapter(filled, 5, placement, "gelu", 0.25)
    for other in (bare, filled):
        load_adapter(other, tmp_path)
        assert torch.equal(output(name, other), output(name, model))
        assert other.adapter_settings == model.adapter_settings
        assert {n for n, p in other.named_parameters() if p.requires_grad} == tensors.keys()
        save_adapter(other, tmp_path / "again")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "again"]


def test_heads_and_norms_train_and_are_saved(tmp_path):
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    body = bits(model.bert.state_dict())
    add_adapter(model, 5)
    model.classifier.requires_grad_(True)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for n in norms:
        model.get_submodule(n).requires_grad_(True)
    assert len(adapter_parameters(model)) == 2 * 4 + 2 + 2 * len(norms)
    stir(model)
    save_adapter(model, tmp_path)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {n.rpartition(".")[0] for n in names if ".adapter." not in n} == norms | {"classifier"}
    again = bert(labels=("c", "d"))
    nn.init.ones_(again.classifier.weight)
    load_adapter(again, tmp_path)
    assert torch.equal(output("bert", again), output("bert", model))
    for m in (model, again):
        assert len(adapter_parameters(m)) == 2 * 4 + 2 + 2 * len(norms)
    remove_adapter(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    left = {n for n, t in bits(model.bert.state_dict()).items() if not torch.equal(t[1], body[n][1])}
    assert {f"bert.{n}".rpartition(".")[0] for n in left} == norms  # what trained in full stays as trained
    refused(tmp_path, r"classifier.bias is of shape \(2,\) there, and of shape \(3,\) in the model",
            bert(labels=("a", "b", "c")))  # fmt: skip
    refused(tmp_path, "classifier.bias is of shape .* there, and no such tensor in the model", bert("qa", ()))
    save_adapter(adapted("bert", placement="pfeiffer"), tmp_path)
    head = bert()
    add_adapter(head, 5)
    head.classifier.requires_grad_(True)
    refused(tmp_path, "what trained beside them are not those of the model", head)  # it would stay as it is, unnoticed


def test_a_head_with_buffers(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, x = make(), torch.randn(9, 4)
    add_adapter(model, 3, target="0")
    model[1].requires_grad_(True)
    stir(model)
    model(x * 3 + 1)  # moves the running statistics
    save_adapter(model.eval(), tmp_path)
    load_adapter(again := make().eval(), tmp_path)
    assert torch.equal(again(x), model(x)) and not [b for b in again.buffers() if b.requires_grad]


def test_a_tied_head(tmp_path):
    model = gpt()
    add_adapter(model, 5)
    model.lm_head.requires_grad_(True)
    stir(model)
    save_adapter(model, tmp_path)
    load_adapter(again := gpt(), tmp_path)
    assert torch.equal(output("gpt", again), output("gpt", model))
    assert again.lm_head.weight is again.transformer.wte.weight
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for change in (lambda t: t.pop("transformer.wte.weight"), lambda t: t["transformer.wte.weight"].add_(1)):
        change(tensors)
        safetensors.torch.save_file(tensors, file)  # as of a model whose head is its own
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trains": ["lm_head.weight"]}))
        refused(tmp_path, "(wte|lm_head).weight is tied to .*(wte|lm_head).weight in the model; wanted the same values")
        tensors["transformer.wte.weight"] = tensors["lm_head.weight"].clone()


def test_adapters_of_another_model(tmp_path):
    save_adapter(adapted(), tmp_path)
    refused(tmp_path, "the model has no linear layer transformer.h.0.attn.c_proj; wanted some of: bert.enc", bert())
    shallow = GPT(GPTConfig(V, n_positions=16, n_embd=C, n_layer=1, n_head=2))
    refused(tmp_path, "the model has no linear layer transformer.h.1.attn.c_proj; wanted some of: trans", shallow)
    wide = GPT(GPTConfig(V, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    refused(tmp_path, r"c_proj.adapter.W_down is of shape \(5, 16\) there, and of shape \(5, 32\) in the model", wide)
    load_adapter(hf("gpt2"), tmp_path)  # the same names and widths
    for options in ({"size": 4}, {"placement": "pfeiffer"}, {"activation": "tanh"}, {"dropout": 0.1}):
        refused(tmp_path, "are not those of the model", adapted(**options))


def test_missing_damaged_and_foreign_files(tmp_path):
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    refused(tmp_path / "none", "adapter_config.json cannot be read: .*No such file")
    save_adapter(adapted(), tmp_path)
    whole, config = weights.read_bytes(), json.loads(path.read_text())
    for cut in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused(tmp_path, "adapter_model.safetensors cannot be read: ")
    weights.unlink()
    refused(tmp_path, "adapter_model.safetensors cannot be read: .*No such file")

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    weights.write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "adapter_model.safetensors cannot be read: ")
    tensors = safetensors.torch.load(whole)
    name = "transformer.h.0.attn.c_proj.adapter.b_up"
    safetensors.torch.save_file({n: t for n, t in tensors.items() if n != name}, weights)
    refused(tmp_path, rf"{name} is no such tensor there, and of shape \(16,\) in the model")
    safetensors.torch.save_file({**tensors, "lm_body.weight": torch.ones(2)}, weights)
    refused(tmp_path, r"lm_body.weight is of shape \(2,\) there, and no such tensor in the model")
    safetensors.torch.save_file(tensors, weights)
    for change in ({"peft_type": "LORA"}, {"size": 0}, {"size": 4}, {"size": None}, {"activation": "swish"},
                   {"activation": []}, {"dropout": 2}, {"placement": "none"}, {"target": []}, {"target": None},
                   {"target": ["x"]}, {"target": config["target"][1:]}, {"trains": ["lm_head.weight"]},
                   {"trains": None}, {"trains": [[]]}, {"an_option_of_next_year": 1}):  # fmt: skip
        path.write_text(json.dumps({**config, **change}))
        refused(tmp_path, "wanted|what save_adapter writes|cannot be read|no such tensor|of shape")
    for text in ("[]", "{", "null", json.dumps({k: v for k, v in config.items() if k != "dropout"})):
        path.write_text(text)
        refused(tmp_path, "adapter_config.json cannot be read: ")


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = adapted()
    save_adapter(model, tmp_path)
    old = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    write = pathlib.Path.write_bytes

    def full_disk(self, data):
        write(self, data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(stir(model), tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in old} == old


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_peft_does_not_take_the_file_for_its_own(tmp_path):
    import peft

    save_adapter(adapted("hf gpt2"), tmp_path)
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(hf("gpt2"), tmp_path)
