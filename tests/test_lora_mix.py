# SPDX-License-Identifier: MIT
"""Several adapters over one model: PEFT's load_adapter, set_adapter and add_weighted_adapter are the oracles."""

import copy
import json
import math
import pickle
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

from minimal.gpt import GPT, GPTConfig
from minimal.lora import add_lora, load_lora, lora_parameters, merge_lora, remove_lora, save_lora
from minimal.lora_mix import drop, held, hold, use, used, write_sum
from minimal.quant import dequantise, quantise

IDS = torch.arange(14).reshape(2, 7) * 5 % 48
# ranks, scales and layers that differ: (rank, alpha, options, targets of gpt2, targets of llama)
KINDS = {
    "en": (3, 7, {}, "all-linear", "all-linear"),
    "zh": (2, 5, {"rslora": True}, ["c_attn", "mlp.c_proj"], ["q_proj", "v_proj", "down_proj"]),
    "fr": (4, 4, {}, ["h.0.attn.c_attn"], ["layers.0.self_attn.q_proj"]),
    "dora": (3, 6, {"dora": True}, ["c_attn", "c_fc"], ["q_proj", "up_proj"]),
}


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # peft and transformers: fan_in_fan_out, deprecations of their own
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\.")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        yield


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()  # fmt: skip


def llama(width=16):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=48, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)).eval()  # fmt: skip


MODELS = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory):
    """One folder for each adapter of a model, and how to make the model."""
    make, place = MODELS[request.param], tmp_path_factory.mktemp(request.param)
    for seed, (name, (rank, alpha, options, *targets)) in enumerate(KINDS.items()):
        model = make()
        add_lora(model, rank, alpha, 0.0, targets[make is llama], **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in lora_parameters(model):
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        save_lora(model, place / name)
    return make, {name: place / name for name in KINDS}


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def peft_model(make, folders):
    name, *others = folders
    oracle = peft.PeftModel.from_pretrained(make(), folders[name], adapter_name=name)
    for name in others:
        oracle.load_adapter(folders[name], adapter_name=name)
    return oracle.eval()


def state(model):
    """All that hold may not change while nothing is in use: names, bits, what trains, modules, hooks."""
    weights = {n: (t.dtype, t.detach().contiguous().view(torch.uint8).clone()) for n, t in model.state_dict().items()}
    return weights, {n: p.requires_grad for n, p in model.named_parameters()}


def same(a, b):
    return (a[0].keys() == b[0].keys() and a[1] == b[1]
            and all(a[0][n][0] == b[0][n][0] and torch.equal(a[0][n][1], b[0][n][1]) for n in a[0]))  # fmt: skip


# ---- PEFT as the oracle --------------------------------------------------------------------------------------------


def test_each_adapter_is_what_peft_makes_of_it(folders):
    make, folders = folders
    model = make()
    bare, before = logits(model), state(model)
    hold(model, folders)
    assert held(model) == list(KINDS)
    assert torch.equal(logits(model), bare)  # held, not used
    oracle = peft_model(make, folders)
    for name in [*KINDS, *reversed(KINDS)]:  # and back: nothing of the one before stays
        use(model, name)
        oracle.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=1e-5)
        assert (logits(model) - bare).abs().max() > 1e-3
        assert same(state(model), before)
        load_lora(single := make(), folders[name])
        torch.testing.assert_close(logits(model), logits(single), rtol=0, atol=1e-6)
    use(model, None)
    with oracle.disable_adapter():
        assert torch.equal(logits(oracle), bare)
    assert torch.equal(logits(model), bare)


SUMS = [{"en": 0.7, "zh": 0.3}, {"zh": 1.5, "en": -0.5}, {"en": 1.0, "zh": 1.0, "fr": 1.0}, {"fr": 2.0}]


@pytest.mark.parametrize("what", SUMS, ids=str)
def test_sums_are_those_of_peft(folders, what, tmp_path):
    make, folders = folders
    model = make()
    hold(model, folders)
    use(model, what)
    ours = logits(model)
    with torch.no_grad():  # add_weighted_adapter merges the scales in, so an oracle of dense weights beside it
        plain = make()
        bare = {n: m.weight.clone() for n, m in plain.named_modules() if hasattr(m, "weight")}
        for name, w in what.items():
            load_lora(one := make(), folders[name])
            merge_lora(one)
            for n, m in plain.named_modules():
                if hasattr(m, "weight"):
                    m.weight += w * (one.get_submodule(n).weight - bare[n])
    torch.testing.assert_close(ours, logits(plain), rtol=0, atol=1e-5)
    oracle = peft_model(make, {n: folders[n] for n in what})
    if all(w > 0 for w in what.values()) and "fr" not in what:  # PEFT wants the same layers of all
        oracle.add_weighted_adapter(list(what), list(what.values()), "sum", combination_type="cat")
        oracle.set_adapter("sum")
        torch.testing.assert_close(ours, logits(oracle), rtol=0, atol=1e-5)
    # written as one adapter: PEFT, load_lora and hold read it, and it is the same
    rank = write_sum(model, what, tmp_path)
    assert rank == sum(KINDS[n][0] for n in what)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), ours, rtol=0, atol=1e-5)
    if rank <= 8:  # the smallest width of the llama: load_lora asks for no more
        load_lora(other := make(), tmp_path)
        torch.testing.assert_close(logits(other), ours, rtol=0, atol=1e-5)
    hold(model, {"sum": tmp_path})
    use(model, "sum")
    assert torch.allclose(logits(model), ours, rtol=0, atol=1e-6)


def test_means_of_a_and_b_would_be_another_thing(folders):
    """The buggy variant: adding the A and the B (here both of one adapter, at 1/2 each) is not adding the changes."""
    make, folders = folders
    model = make()
    hold(model, {"en": folders["en"], "twin": folders["en"]})
    use(model, "en")
    ours = logits(model)
    use(model, {"en": 0.5, "twin": 0.5})
    torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-6)
    use(model, {"en": 0.25})  # w_A = w_B = 1/2 gives this
    assert (logits(model) - ours).abs().max() > 0.01


@hypothesis.given(data=st.data())
def test_a_layer_computes_the_sum_of_the_changes(data, tmp_path_factory):
    """Against the dense sum in float64: any ranks, weights, shapes of x, with and without a bias."""
    C, O = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    model = nn.Sequential(nn.Linear(C, O, bias=data.draw(st.booleans()))).double()
    folder, what, dense = tmp_path_factory.mktemp("drawn"), {}, model[0].weight.detach().clone()
    for i in range(data.draw(st.integers(1, 4))):
        twin = copy.deepcopy(model)
        rank = data.draw(st.integers(1, min(C, O)))
        add_lora(twin, rank, data.draw(st.sampled_from([1, 2.5, 16])), rslora=data.draw(st.booleans()))
        nn.init.normal_(twin[0].lora.B)
        save_lora(twin, folder / str(i))
        what[str(i)] = data.draw(st.floats(-3, 3))
        dense += what[str(i)] * (twin[0].lora.V(model[0].weight)[0] - model[0].weight).detach()
    hold(model, {name: folder / name for name in what})
    x = torch.randn(data.draw(st.sampled_from([(C,), (3, C), (2, 3, C), (0, C)])), dtype=torch.float64)
    with used(model, what):
        torch.testing.assert_close(model(x), F.linear(x, dense, model[0].bias), rtol=1e-9, atol=1e-9)
    assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))


# ---- the verbs -----------------------------------------------------------------------------------------------------


def test_used_puts_back_what_was_before(folders):
    make, folders = folders
    model = make()
    hold(model, folders)
    use(model, "zh")
    zh = logits(model)
    with used(model, {"en": 0.5}) as same_model:
        assert same_model is model
        half = logits(model)
        with used(model, None):
            assert torch.equal(logits(model), logits(make()))
        assert torch.equal(logits(model), half)
    assert torch.equal(logits(model), zh)
    with pytest.raises(KeyError), used(model, "en"):
        raise KeyError
    assert torch.equal(logits(model), zh)
    weights = {"en": 0.5}
    use(model, weights)
    weights["zh"] = 9.0  # the caller's dict is the caller's
    with used(model, None):
        pass
    assert torch.equal(logits(model), half)


def test_dropping_leaves_nothing(folders):
    make, folders = folders
    model = make()
    keys, bare = {n: set(vars(m)) for n, m in model.named_modules()}, logits(model)
    hold(model, {"en": folders["en"]})
    use(model, "en")
    en = logits(model)
    hold(model, {"zh": folders["zh"], "dora": folders["dora"]})
    assert torch.equal(logits(model), en)  # what is in use stays
    for what in ("en", {"en": 0.5, "zh": 0.5}):
        use(model, what)
        with pytest.raises(ValueError, match=r"'en' is in use; wanted use\(model, None\) or another first"):
            drop(model, "en")
    use(model, "zh")
    drop(model, "en")
    drop(model, "dora")
    assert held(model) == ["zh"]
    with pytest.raises(ValueError, match="adapter 'en' is not held; wanted some of: zh"):
        drop(model, "en")
    assert sum(hasattr(m, "lora_mix") for m in model.modules()) == len(load_lora_names(make, folders["zh"]))
    use(model, None)
    drop(model, "zh")
    assert held(model) == [] and {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert not any(m._forward_hooks for m in model.modules()) and torch.equal(logits(model), bare)
    with pytest.raises(ValueError, match="adapter 'zh' is not held"):
        use(model, "zh")
    use(model, None)
    assert not hasattr(model, "lora_used")
    hold(model, {"zh": folders["zh"]})  # and again


def load_lora_names(make, folder):
    model = make()
    load_lora(model, folder)
    return [n for n, m in model.named_modules() if hasattr(m, "lora")]


def test_wrong_uses_change_nothing(folders, tmp_path):
    make, folders = folders
    model = make()
    hold(model, folders)
    use(model, "zh")
    zh = logits(model)
    for what, message in [
        ("de", "adapter 'de' is not held; wanted some of: en, zh, fr, dora"),
        ({"en": 1.0, "de": 1.0}, "adapter 'de' is not held"),
        ({}, "no adapter is named; wanted a name, {name: weight, ...} or None"),
        ({"en": math.nan}, "adapter 'en' has the weight nan; wanted a finite number"),
        ({"en": "1"}, "adapter 'en' has the weight '1'; wanted a finite number"),
        ({"en": 0.5, "dora": 0.5}, "adapter 'dora' is a DoRA, which is used alone at weight 1; wanted it out of"),
        ({"dora": 0.5}, "adapter 'dora' is a DoRA"),
    ]:
        for verb in (use, lambda m, w: write_sum(m, w, tmp_path / "none")):
            with pytest.raises(ValueError, match=message.replace("{", r"\{").replace(".", r"\.")) as error:
                verb(model, what)
            assert "\n" not in str(error.value)
            assert torch.equal(logits(model), zh)
    with pytest.raises(ValueError, match="adapter 'dora' is a DoRA, which is no part of a sum"):
        write_sum(model, "dora", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    use(model, {"dora": 1})  # is the DoRA itself
    with used(model, "dora"):
        dora = logits(model)
    assert torch.equal(logits(model), dora)


def test_adapters_that_cannot_be_held(folders, tmp_path):
    make, folders = folders
    other = {gpt2: llama, llama: gpt2}[make]

    def refused(message, adapters, model):
        before, hooks = state(model), sum(len(m._forward_hooks) for m in model.modules())
        names, keys = held(model), {n: set(vars(m)) for n, m in model.named_modules()}
        with pytest.raises(ValueError, match=message) as error:
            hold(model, adapters)
        assert "\n" not in str(error.value) and same(state(model), before) and held(model) == names
        assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
        assert {n: set(vars(m)) for n, m in model.named_modules()} == keys

    refused(r"no linear layer for {'(transformer|model).*lora_A.weight': \(3, \d+\)", folders, other())
    if make is llama:  # the same names, other sizes: the shapes are named
        shapes = r"{.*\(3, 24\).*\(16, 3\).*; wanted {'A': \(3, 24\), 'B': \(32, 3\)"
        refused(f"tensors of model.layers.0.mlp.down_proj are {shapes}", folders, llama(32))
    held_already = make()
    hold(held_already, {"en": folders["en"]})
    # one that is good beside one that is bad: none is held
    bad = {"zh": folders["zh"], "no": tmp_path / "none"}
    refused("adapter_config.json cannot be read: .*No such file", bad, held_already)
    for name in ("en", "a.b", "", 3):
        refused("is no name or is taken; wanted one without dots", {name: folders["zh"]}, held_already)
    adapted = make()
    add_lora(adapted, rank=2)
    refused("has adapters of add_lora; wanted remove_lora first", folders, adapted)
    remove_lora(adapted)
    hold(adapted, folders)
    # files
    source = folders["en"]
    whole, config = (source / "adapter_model.safetensors").read_bytes(), json.loads(
        (source / "adapter_config.json").read_text())  # fmt: skip

    def write(weights, config):
        for f in tmp_path.iterdir():
            f.unlink()
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return {"x": tmp_path}

    refused("adapter_model.safetensors cannot be read", write(whole[:-1], config), make())
    refused("adapter_model.safetensors cannot be read", write(pickle.dumps([1]), config), make())
    refused("adapter_config.json.*cannot be read|cannot be read", write(whole, [1]), make())
    for option, value in (("bias", "all"), ("rank_pattern", {"c_attn": 4}), ("modules_to_save", ["lm_head"]),
                          ("peft_type", "LOHA"), ("an_option_of_next_year", 1)):  # fmt: skip
        refused(f"option {option}=.* is not supported; wanted it off", write(whole, {**config, option: value}), make())
    for change in ({"r": 4}, {"r": None}, {"use_dora": True}, {"lora_alpha": 0}):
        refused("wanted", write(whole, {**config, **change}), make())
    tensors = safetensors.torch.load(whole)
    first = min(tensors)
    for change in ({first: tensors[first] * math.nan}, {first.replace("lora_A", "lora_B").replace("weight", "bias"):
                                                        torch.zeros(1)}):  # fmt: skip
        refused("tensors of .* are", write(safetensors.torch.save({**tensors, **change}), config), make())
    del tensors[first]
    refused("tensors of .* are", write(safetensors.torch.save(tensors), config), make())
    refused("has no tensors", write(safetensors.torch.save({}), config), make())
    write(whole, config)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    refused("adapter_model.bin is a pickle and is never opened", {"x": tmp_path}, make())


def test_writing_a_sum_is_whole_or_not_at_all(folders, tmp_path, monkeypatch):
    make, folders = folders
    model = make()
    hold(model, folders)
    write_sum(model, {"en": 1.0, "zh": 1.0}, tmp_path)
    old = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert set(old) == {"adapter_model.safetensors", "adapter_config.json"}

    def full_disk(self, data):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_sum(model, {"en": 1.0}, tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in old} == old


# ---- what else a model may be --------------------------------------------------------------------------------------


def small(kind, tmp_path):
    """Our own GPT and two adapters for it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, n_positions=16, n_embd=32, n_layer=2, n_head=2, dropout=0.0)).eval()
    for name in ("a", "b"):
        twin = copy.deepcopy(model)
        add_lora(twin, 2, 8, dora=kind == "dora")
        with torch.no_grad():
            for p in lora_parameters(twin):
                p.add_(torch.randn_like(p) * 0.1)
        save_lora(twin, tmp_path / name)
    return model, {name: tmp_path / name for name in ("a", "b")}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(how, tmp_path):
    model, folders = small("lora", tmp_path)
    hold(model, folders)
    use(model, {"a": 1.0, "b": 2.0})
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    both = logits(model)
    assert torch.equal(logits(twin), both)
    use(twin, None)
    assert torch.equal(logits(model), both) and not torch.equal(logits(twin), both)
    drop(twin, "a")
    drop(twin, "b")
    assert held(model) == ["a", "b"] and not any(m._forward_hooks for m in twin.modules())


def test_compile_follows_every_verb(tmp_path):
    model, folders = small("lora", tmp_path)
    model.requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    bare = logits(model)

    def follows():
        return torch.allclose(logits(compiled), logits(model), atol=1e-6)

    assert follows()
    hold(compiled, folders)
    for what in ("a", None, "b", {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": -0.5}, "a"):
        use(compiled, what)
        assert follows() and torch.equal(logits(model), bare) == (what is None)
    use(model, None)
    drop(compiled, "a")
    drop(compiled, "b")
    assert follows() and held(model) == []


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_over_a_quantised_base(kind, codes, tmp_path):
    model, folders = small(kind, tmp_path)
    quantise(model, codes)
    plain = copy.deepcopy(model)
    dequantise(plain)
    for m in (model, plain):
        hold(m, folders)
        use(m, "a")
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)
    load_lora(single := dequantised(model, plain), folders["a"])
    torch.testing.assert_close(logits(model), logits(single), rtol=0, atol=1e-5)


def dequantised(model, plain):
    twin = copy.deepcopy(plain)
    use(twin, None)
    for name in held(twin):
        drop(twin, name)
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dtypes(kind, dtype, tmp_path):
    model, folders = small(kind, tmp_path)
    model.to(dtype)
    load_lora(single := copy.deepcopy(model), folders["a"])
    hold(model, folders)
    use(model, "a")
    assert logits(model).dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(logits(model), logits(single), rtol=tolerance, atol=tolerance)


def test_no_gradient_is_cut(tmp_path):
    """An adapter in use lets gradients through to what lies before it, such as a prefix; itself it does not train."""
    model, folders = small("lora", tmp_path)
    load_lora(single := copy.deepcopy(model), folders["a"])
    hold(model, folders)
    use(model, "a")
    model.requires_grad_(False)
    for m in (model, single):
        m.transformer.wte.weight.requires_grad_(True)
        total, _ = m.loss(IDS)
        total.backward()
    torch.testing.assert_close(model.transformer.wte.weight.grad, single.transformer.wte.weight.grad)
    assert sum(p.requires_grad for p in model.parameters()) == 1
