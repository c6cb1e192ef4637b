# SPDX-License-Identifier: MIT
"""Llama against that of transformers, its folders both ways, damaged files, and traps written out."""

import json
import math
import os
import pathlib
import tempfile

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from minimal import llama
from minimal.generate import StaticCache, generate
from minimal.llama import Llama, LlamaConfig, rotary_frequencies, torch_attention

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=24)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=48)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(model):
    """Move every parameter off its initial value: unit gains would hide a missing one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model.eval()


def tiny(**changes):
    return perturb(Llama(LlamaConfig(**{**SIZES, **changes})))


def theirs(**changes):
    sizes = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, **changes}
    return perturb(LlamaForCausalLM(TheirConfig(**sizes)))


def tokens(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def check_logits(ours, reference, bound=1e-5):
    ids = tokens(3, 24)
    with torch.no_grad():
        a, b = ours(ids), reference(ids).logits
    assert (a - b).abs().max() < bound * b.abs().max().clamp_min(1)


def check_same_weights(ours, reference):
    a, b = ours.state_dict(), reference.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == torch.float32 and torch.equal(a[name], b[name].float()), name


# ---- transformers' model ----


@st.composite
def configs(draw):
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv * group
    c = dict(
        vocab_size=draw(st.integers(2, 70)), hidden_size=heads * draw(st.sampled_from([2, 4, 6])),
        intermediate_size=draw(st.integers(1, 50)), num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=draw(st.sampled_from([None, 2, 8, 10])),
        max_position_embeddings=64, rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip
    theta, kind = (
        draw(st.sampled_from([10000.0, 500000.0, 3.5])),
        draw(st.sampled_from(["default", "llama3", "linear"])),
    )
    scaling = {"llama3": LLAMA3 | {"factor": draw(st.sampled_from([1.5, 8.0]))},
               "linear": {"rope_type": "linear", "factor": 2.5}, "default": None}[kind]  # fmt: skip
    ours = LlamaConfig(**c, rope_theta=theta, rope_scaling=scaling)
    return ours, TheirConfig(
        **c,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_theta": theta, "rope_type": "default"} | (scaling or {}),
    )


def pair(config, their_config, dtype):
    reference = perturb(LlamaForCausalLM(their_config)).to(dtype)
    model = Llama(config).to(dtype).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


@given(configs(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
@settings(max_examples=15)
def test_logits_loss_and_gradients_are_those_of_transformers(both, dtype, seed):
    torch.manual_seed(seed)
    model, reference = pair(*both, dtype)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    ids = tokens(2, 40, vocab=both[0].vocab_size, seed=seed)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[0, 1] = ids[0, 1]  # one term at least
    want = reference(ids, labels=labels)
    # The reference takes norms and angles in float32 whatever the model has, so float64 gains one digit only.
    bound = 2e-5 if dtype == torch.float32 else 2e-6
    with torch.no_grad():
        assert (model(ids) - want.logits).abs().max() < bound * want.logits.abs().max().clamp_min(1)
    total, count = model.loss(ids, labels)
    assert count == (labels[:, 1:] != -100).sum() and abs(total / count - want.loss) < bound * want.loss.clamp_min(1)
    (total / count).backward()
    want.loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}  # registered in another order
    for name, p in model.named_parameters():
        other = gradients.pop(name)
        assert (p.grad - other).norm() <= 20 * bound * other.norm().clamp_min(1e-2), name
    assert not gradients


@given(configs())
def test_parameters_are_those_of_the_docstring(both):
    c = both[0]
    V, C, L, F_, D = c.vocab_size, c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.head_dim
    H, Hkv = c.num_attention_heads, c.num_key_value_heads
    want = V * C * (2 - c.tie_word_embeddings) + L * (2 * H * D * C + 2 * Hkv * D * C + 3 * C * F_ + 2 * C) + C
    assert sum(p.numel() for p in Llama(c).parameters()) == want


def test_parameters_of_smollm2():
    with torch.device("meta"):
        smol = Llama(LlamaConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True))
    assert f"SmolLM2-135M: {sum(p.numel() for p in smol.parameters()):,}\n" in llama.__doc__


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_norms_of_half_precision_do_not_overflow(dtype, bound):
    """The square of 1000 is beyond float16, whose largest number is 65504; sums of squares want float32."""
    model, ids = tiny(), tokens(2, 12)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000 / model.model.embed_tokens.weight.abs().mean())
        want = model.double()(ids)
        assert (model.to(dtype)(ids).double() - want).abs().max() < bound * want.abs().max()


@given(configs())
@settings(max_examples=15)
def test_rotary_frequencies_are_those_of_transformers(both):
    reference = LlamaForCausalLM(both[1]).model.rotary_emb
    torch.testing.assert_close(rotary_frequencies(both[0]), reference.inv_freq, rtol=1e-5, atol=0)


def test_traps_of_the_rotation():
    """Trap 13: neighbours for halves; and a llama3 scaling that is dropped. Both run, and are merely wrong."""
    config = TheirConfig(**SIZES, rope_parameters=LLAMA3 | {"rope_theta": 1e4})
    scaled, reference = pair(LlamaConfig(**SIZES, rope_scaling=LLAMA3), config, torch.float32)
    check_logits(scaled, reference)
    plain = Llama(LlamaConfig(**SIZES)).eval()
    plain.load_state_dict(scaled.state_dict())
    with pytest.raises(AssertionError):
        check_logits(plain, reference)

    with torch.no_grad():  # neighbours turned in W's rows are halves turned in these
        for block in scaled.model.layers:
            for linear, heads in ((block.self_attn.q_proj, 4), (block.self_attn.k_proj, 2)):
                linear.weight.copy_(linear.weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2))
    with pytest.raises(AssertionError):
        check_logits(scaled, reference)


def test_greedy_generation_is_that_of_transformers(tmp_path):
    reference = theirs()
    reference.generation_config.eos_token_id = None
    reference.save_pretrained(tmp_path)
    model, ids = Llama.from_pretrained(tmp_path), tokens(2, 6)
    want = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=18, do_sample=False, pad_token_id=0
    )
    for use_cache in (True, False):
        assert torch.equal(generate(model, ids, 18, temperature=0, use_cache=use_cache), want)


# ---- folders, both ways ----


@pytest.mark.parametrize("shard", [None, "20kB"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_opens_a_folder_written_by_transformers(tmp_path, shard, tie, scaling):
    rope = {"rope_theta": 5e5, "rope_type": "default"} | (scaling or {})
    reference = theirs(tie_word_embeddings=tie, rope_parameters=rope, attention_dropout=0.125, rms_norm_eps=1e-4)
    reference.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shard)
    model = Llama.from_pretrained(tmp_path)
    assert model.config == LlamaConfig(**SIZES, rms_norm_eps=1e-4, rope_theta=5e5, rope_scaling=scaling, dropout=0.125,
                                       tie_word_embeddings=tie, bos_token_id=1, eos_token_id=2)  # fmt: skip
    assert not model.training and (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    check_same_weights(model, reference)
    check_logits(model, reference)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("scaling", [None, LLAMA3 | {"original_max_position_embeddings": 12},
                                     {"rope_type": "linear", "factor": 2.0}])  # fmt: skip
def test_transformers_opens_our_folder(tmp_path, tie, scaling):
    model = tiny(tie_word_embeddings=tie, rope_scaling=scaling, rope_theta=777.0, head_dim=6, rms_norm_eps=1e-3,
                 dropout=0.2, bos_token_id=5, eos_token_id=7)  # fmt: skip
    folder = tmp_path / "new" / "folder"
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) != tie
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    reference, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(reference) is LlamaForCausalLM
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    c = reference.config
    assert (c.bos_token_id, c.eos_token_id, c.attention_dropout, c.head_dim) == (5, 7, 0.2, 6)
    check_logits(model, reference.eval())
    again = Llama.from_pretrained(folder)
    assert again.config == model.config
    check_same_weights(again, model)


def test_older_and_newer_config_files_mean_the_same(tmp_path):
    model = tiny(rope_scaling=LLAMA3, rope_theta=3e4)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    assert old["rope_theta"] == 3e4 and old["rope_scaling"] == LLAMA3
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = LLAMA3 | {"rope_theta": 3e4}
    oldest = {**old, "rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}}
    for settings_ in (old, new, oldest):
        path.write_text(json.dumps(settings_))
        assert Llama.from_pretrained(tmp_path).config == model.config


def test_llama3_scaling_without_the_old_context_means_the_present_one(tmp_path):
    scaling = {name: x for name, x in LLAMA3.items() if name != "original_max_position_embeddings"}
    theirs(rope_parameters=LLAMA3 | {"rope_theta": 1e4}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": scaling | {"rope_theta": 1e4}}))
    want = LlamaForCausalLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary_frequencies(Llama.from_pretrained(tmp_path).config), want, rtol=1e-5, atol=0)


def test_several_end_tokens_survive_a_round_trip(tmp_path):
    theirs(eos_token_id=[7, 8, 9]).save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path)
    assert model.config.eos_token_id == 7
    model.save_pretrained(tmp_path / "again")
    assert TheirConfig.from_pretrained(tmp_path / "again").eos_token_id == [7, 8, 9]
    assert Llama.from_pretrained(tmp_path / "again").config == model.config


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    check_same_weights(Llama.from_pretrained(tmp_path), model)


def test_loaded_weights_do_not_live_in_the_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in Llama.from_pretrained(tmp_path).parameters():
            p.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_old_buffers_are_passed_over(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    edit(
        tmp_path,
        lambda s: s.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}),
    )
    check_same_weights(Llama.from_pretrained(tmp_path), model)


# ---- tensors ----


@pytest.mark.parametrize("tie", [False, True])
def test_from_tensors_is_what_transformers_holds(tie):
    reference = theirs(tie_word_embeddings=tie, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    config, tensors = reference.config.to_dict(), dict(reference.named_parameters())  # that require gradients
    assert ("lm_head.weight" in tensors) != tie
    before = dict(config), {name: t.clone() for name, t in tensors.items()}
    model = Llama.from_tensors(config, tensors, top_left)
    assert not model.training and (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert all(block.self_attn.attention is top_left for block in model.model.layers)
    check_same_weights(model, reference)
    check_logits(model, reference)
    with torch.no_grad():
        for p in model.parameters():
            assert p.requires_grad and p.is_leaf
            p.zero_()  # copies: what was given stays
    assert config == before[0] and tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], t) for name, t in before[1].items())


def test_from_tensors_names_where_they_are_from():
    config = theirs().config.to_dict()
    tensors = tiny().state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    for c, t, pattern in [
        (config | {"hidden_act": "gelu"}, tensors, "hidden_act = 'gelu', wanted 'silu'"),
        (config, tensors | {name: tensors[name].int()}, f"{name} is torch.int32 .*, wanted floating point"),
        (config, {k: v for k, v in tensors.items() if k != name}, f"missing tensors, among them {name}"),
        (config | {"tie_word_embeddings": True}, tensors, "lm_head.weight differs"),
        ([config], tensors, "unreadable"),
        (config, None, "unreadable"),
    ]:
        for where, begin in (({}, "the tensors"), ({"where": "here"}, "here")):
            with pytest.raises(ValueError, match=f"^{begin}: {pattern}"):
                Llama.from_tensors(c, t, **where)


def test_a_gguf_is_sent_to_the_file_that_reads_it(tmp_path):
    advice = r"read it with minimal/gguf_llama.py: Llama.from_tensors\(\*read_llama\(path\)\)"
    refused(tmp_path / "x.gguf", f"x.gguf: {advice}")


# ---- folders that are wrong ----


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    theirs().save_pretrained(tmp_path, max_shard_size="20kB")
    return tmp_path


def refused(path, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        Llama.from_pretrained(path)
    assert str(caught.value).isprintable() and str(path) in str(caught.value)


def edit(folder, change):
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    change(stored)
    safetensors.torch.save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model_type": "gpt2"}, "config.json: model_type = 'gpt2', wanted 'llama'"),
        ({"model_type": "mistral"}, "model_type = 'mistral', wanted 'llama'"),
        ({"model_type": None}, "model_type = None, wanted 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', wanted 'silu'"),
        ({"attention_bias": True}, "attention_bias = True, wanted False"),
        ({"mlp_bias": True}, "mlp_bias = True, wanted False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}, wanted None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, wanted 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5, wanted 1.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn', .*: wanted llama3 or"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling of type 'dynamic'"),
        ({"rope_scaling": {"type": ["linear"], "factor": 4.0}}, "rope_scaling of type"),
        ({"rope_scaling": [1]}, "config.json: "),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear', {'factor': None}: wanted"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "'low_freq_factor': 4.0, .* wanted .*, low < high"),
        ({"rope_scaling": LLAMA3 | {"factor": -8.0}}, "'factor': -8.0, .*: wanted llama3 or linear, above 0"),
        ({"rope_theta": 0}, "rope_theta = 0: wanted a number from 1"),
        ({"rope_theta": None}, "rope_theta = None"),
        ({"rms_norm_eps": -1}, "rms_norm_eps = -1: wanted"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: wanted"),
        ({"attention_dropout": 2}, "dropout = 2: wanted"),
        ({"num_attention_heads": 5}, "num_key_value_heads = 32, 5, 2: wanted each a multiple of the next"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 32, 4, 3: wanted each a multiple of the next"),
        ({"head_dim": 7}, "an even head_dim, not 7"),
        ({"hidden_size": "32"}, "hidden_size = '32': wanted a whole number"),
        ({"hidden_size": None}, "hidden_size = None: wanted a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: wanted a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: wanted a whole number"),
        ({"num_hidden_layers": 10**9}, "missing tensors, among them model.layers.3.input_layernorm.weight, "),
        ({"num_hidden_layers": 2}, "model.safetensors: unexpected tensors, among them model.layers.2.input_layern"),
        ({"vocab_size": 2**30, "intermediate_size": 2**30}, r"\(61, 32\), wanted floating point \(1073741824, 32\)"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4}, "unreadable|wanted"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight, wanted a tied head"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is torch.float32 \(16, 32\), wanted floating point \(32, 32\)"),
    ],
)
def test_wrong_config_is_named(folder, changes, pattern):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(folder, pattern)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads", "model_type"])  # fmt: skip
def test_config_without_what_it_needs_is_named(folder, name):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))
    refused(folder, f"config.json: {name}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"llama"', "\udcff", "[" * 100_000])
def test_config_that_is_no_object_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json: ")


def test_absent_files_are_named(folder, tmp_path):
    refused(tmp_path / "nowhere", "config.json: .*No such file")
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused(folder, "model.safetensors: no such file, and no other kind of weights is opened")


def test_wrong_tensors_are_named(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda s: s.update({name: s[name].t().contiguous()}))
    refused(folder, rf"model.safetensors: {name} is torch.float32 \(32, 44\), wanted floating point \(44, 32\)")
    edit(folder, lambda s: s.update({name: s[name].t().contiguous().to(torch.int8)}))
    refused(folder, rf"{name} is torch.int8 \(44, 32\), wanted floating point")
    edit(folder, lambda s: s.pop(name))
    refused(folder, f"missing tensors, among them {name}; wanted Llama's alone")
    edit(folder, lambda s: s.update({name: torch.zeros(44, 32), "head.\nextra": torch.zeros(2)}))
    refused(folder, "unexpected tensors, among them head. extra")
    edit(folder, lambda s: (s.pop("head.\nextra"), s.pop("lm_head.weight")))
    refused(folder, "missing tensors, among them lm_head.weight")


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    listed = json.loads(path.read_text())
    change(listed["weight_map"])
    path.write_text(json.dumps(listed))


def test_wrong_shards_are_named(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    shards = sorted(sharded.glob("*.safetensors"))
    outside.write_bytes(shards[0].read_bytes())
    place = dict(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"])
    other = str(outside), f"../{outside.parent.name}/{outside.name}", "..\\secret.safetensors"
    for name in (*other, "..", "", "weights.bin", 7, None, ["x"]):
        index(sharded, lambda m, name=name: m.update({"lm_head.weight": name}))
        refused(sharded, f"{sharded.name}(/[^/]*)?: (no such file, and no other kind of weights is opened|unreadable)")
    index(sharded, lambda m: m.update(place))
    shards[1].rename(sharded / "lost")
    refused(sharded, f"{shards[1].name}: no such file")
    shards[1].write_bytes((sharded / "lost").read_bytes()[:-4])
    refused(sharded, f"{shards[1].name}: unreadable")
    (sharded / "lost").rename(shards[1])
    Llama.from_pretrained(sharded)
    index(sharded, lambda m: m.clear())
    refused(sharded, "index.json: missing tensors")
    for text in ("{}", "[]", '{"weight_map": []}', '{"weight_map": null}', "{"):
        (sharded / "model.safetensors.index.json").write_text(text)
        refused(sharded, "index.json")


def test_saving_an_adapted_model_is_refused(folder):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = tiny()
    model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match="the model: missing tensors, among them model.layers.0.self_attn.q_proj"):
        model.save_pretrained(folder)
    model = tiny()
    model.model.layers[0].mlp.up_proj.A = nn.Parameter(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="the model: unexpected tensors, among them model.layers.0.mlp.up_proj.A"):
        model.save_pretrained(folder)
    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failing_write_leaves_the_old_files(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        if not isinstance(args[0], dict) or "model_type" not in args[0]:
            pathlib.Path(args[1]).write_bytes(b"half")
        raise OSError("No space left on device")

    for module, name in ((safetensors.torch, "save_file"), (llama.json, "dumps")):
        monkeypatch.setattr(module, name, full)
        with pytest.raises(OSError, match="No space"):
            tiny(num_hidden_layers=2).save_pretrained(folder)
        monkeypatch.undo()
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# ---- the cache, documents, positions ----


def check_chunks(model, ids, sizes, cache=None):
    """The logits of a text do not depend on the pieces in which it is read."""
    with torch.no_grad():
        whole, cache, pieces = model(ids), [] if cache is None else cache, []
        for piece in ids.split(sizes, dim=1):
            pieces.append(model(piece, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    c, T = model.config, ids.size(1)
    assert [tuple(t.shape) for entry in cache for t in entry] == [
        (ids.size(0), c.num_key_value_heads, T, c.head_dim)
    ] * 2 * c.num_hidden_layers


@given(st.lists(st.integers(1, 9), min_size=1, max_size=24).filter(lambda s: sum(s) <= 24), st.integers(1, 3))
def test_cached_chunked_and_whole_prefill_agree(sizes, B):
    torch.manual_seed(0)
    check_chunks(tiny(), tokens(B, sum(sizes)), sizes)
    check_chunks(tiny(), tokens(B, sum(sizes)), sizes, StaticCache(room=5))


def top_left(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):  # trap 5: PyTorch's own alignment
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


class PositionsFromZero(Llama):
    def hidden(self, ids, cache=None, documents=None):  # trap 8: each chunk is taken for the beginning of the text
        past = cache[0][0].size(2) if cache else 0
        self.position_offset = -past
        return super().hidden(ids, cache, documents)


@pytest.mark.parametrize("make", [lambda c: PositionsFromZero(c), lambda c: Llama(c, top_left)])
def test_traps_of_the_cache(make):
    model, ids = perturb(make(LlamaConfig(**SIZES))), tokens(2, 20)
    check_chunks(model, ids, [20])  # without a cache the two traps do not show
    for sizes in ([8, 12], [19, 1]):
        with pytest.raises(AssertionError):
            check_chunks(model, ids, sizes)


def test_the_context_is_never_overrun():
    model, cache = tiny(), []
    with torch.no_grad():
        model(tokens(1, 20), cache)
        before = [tuple(t.clone() for t in entry) for entry in cache]
        with pytest.raises(ValueError, match="ids: 20 cached . 5 new tokens do not fit max_position_embeddings = 24"):
            model(tokens(1, 5), cache)
        for a, b in zip(before, cache, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert model(tokens(1, 4), cache).shape == (1, 4, 61)


def check_packed(model, lengths, seed):
    parts = [tokens(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    # Numbers need not rise: a document is a run of one number, so 0 0 1 0 are three.
    documents = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), documents=documents)
        alone = torch.cat([model(part) for part in parts], 1)
    assert (packed - alone).abs().max() < 1e-5 * alone.abs().max().clamp_min(1)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5).filter(lambda s: sum(s) <= 24), st.integers(0, 9))
def test_packed_documents_equal_documents_alone(lengths, seed):
    torch.manual_seed(seed)
    check_packed(tiny(), lengths, seed)


def test_rows_are_packed_each_in_its_own_way():
    model, ids = tiny(), tokens(2, 20)
    documents = torch.stack((torch.arange(20) // 7, torch.arange(20) // 12))
    with torch.no_grad():
        rows = torch.cat([model(ids[i : i + 1], documents=documents[i : i + 1]) for i in range(2)])
        assert (model(ids, documents=documents) - rows).abs().max() < 1e-5 * rows.abs().max()


def test_documents_beside_a_cache():
    """Read in pieces they give what they give read whole; the keys tell where a document's positions begin."""
    model, ids = tiny(), tokens(2, 20)
    documents = torch.stack((torch.arange(20) // 7, torch.arange(20) > 12))
    with torch.no_grad():
        whole, one = model(ids, documents=documents), []
        model(ids, one, documents)
        for sizes in ([1] * 20, [8, 12], [13, 1, 6]):
            for cache in ([], StaticCache(room=3)):
                pieces = [model(part, cache, documents[:, :end]) for part, end in zip(
                    ids.split(sizes, 1), torch.tensor(sizes).cumsum(0), strict=True)]  # fmt: skip
                torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
                for (k, _), (want, _) in zip(cache, one, strict=True):
                    torch.testing.assert_close(k, want, rtol=1e-5, atol=1e-5)


def test_trap_packed_documents_leak():
    """Trap 9: change document A: B's logits stay, bit for bit; the variant without documents moves them."""
    model, ids = tiny(), tokens(1, 20)
    documents = torch.arange(20)[None] // 10
    changed = torch.cat((tokens(1, 10, seed=7), ids[:, 10:]), 1)
    with torch.no_grad():
        assert torch.equal(model(ids, documents=documents)[:, 10:], model(changed, documents=documents)[:, 10:])
        assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:])


def test_packed_positions_restart():
    """Rotary logits do not tell, as only distances count; the keys do: a document's are those of it alone."""
    seen = []

    def spy(q, k, v, **settings):
        seen.append((q, k))
        return torch_attention(q, k, v, **settings)

    model, ids = perturb(Llama(LlamaConfig(**SIZES), spy)), tokens(1, 20)
    with torch.no_grad():
        model(ids, documents=torch.arange(20)[None] // 8)
        packed, _ = seen[: SIZES["num_hidden_layers"]], seen.clear()
        model(ids[:, 8:16])
    for a, b in zip(packed, seen, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x[:, :, 8:16], y, rtol=1e-4, atol=1e-5)


def test_loss_of_packed_documents_is_the_sum_of_theirs():
    model, parts = tiny(), [tokens(1, n, seed=n) for n in (5, 9, 3)]
    ids = torch.cat(parts, 1)
    documents = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)], 1)
    labels = torch.cat([torch.cat((torch.full((1, 1), -100), part[:, 1:]), 1) for part in parts], 1)
    total, count = model.loss(ids, labels, documents)
    alone = [model.loss(part) for part in parts]
    assert count == sum(int(n) for _, n in alone) == 4 + 8 + 2
    torch.testing.assert_close(total, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_position_offset_turns_keys_further_and_shortens_the_context():
    """The keys are those that transformers computes at the moved positions; logits cannot tell, distances are equal."""
    model, reference = pair(LlamaConfig(**SIZES), TheirConfig(**SIZES), torch.float32)
    ids, cache = tokens(2, 12), []
    with torch.no_grad():
        plain = model(ids)
        model.position_offset = 5
        pieces = torch.cat([model(part, cache) for part in ids.split(5, 1)], 1)
        want = reference(ids, position_ids=torch.arange(5, 17)[None], use_cache=True).past_key_values
        torch.testing.assert_close(pieces, plain, rtol=1e-4, atol=1e-4)
        for layer, (k, _) in enumerate(cache):
            torch.testing.assert_close(k, want.layers[layer].keys, rtol=1e-4, atol=1e-5)
        model(tokens(1, 19))
        with pytest.raises(ValueError, match="5 cached . 20 new tokens do not fit"):
            model(tokens(1, 20))


def test_input_errors():
    model, ids, cache = tiny(), tokens(2, 6), []
    model(ids, cache)
    for call, pattern in [
        (lambda: model(ids[0]), "ids of shape"),
        (lambda: model(ids.float()), "ids of shape .* torch.float32"),
        (lambda: model(tokens(1, 25)), "ids: 0 cached . 25 new tokens do not fit"),
        (lambda: model.loss(ids, ids[:, :3]), r"labels of shape \(2, 3\): wanted that of ids, \(2, 6\)"),
        (lambda: model(ids, documents=ids[:, :5]), "documents of shape"),
        (lambda: model(ids, cache, ids), r"documents of shape .*: wanted \(2, 12\), cached tokens too"),
    ]:
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_dropout_is_read_at_every_call_and_off_in_eval():
    model, ids = tiny(), tokens(2, 12)
    with torch.no_grad():
        still = model(ids)
        model.train()
        assert torch.equal(model(ids), still)
        model.config.dropout = 0.5
        a, b = model(ids), model(ids)
        assert not torch.equal(a, b)
        assert torch.equal(model.eval()(ids), still)


def test_dropout_is_on_both_branches():
    """What a block adds is nothing or twice what the branch gave, at a rate of 0.5."""
    model, seen = tiny(dropout=0.5).train(), {}
    block = model.model.layers[1]
    for name in ("self_attn", "mlp"):
        getattr(block, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    block.register_forward_hook(lambda m, args, out: seen.update(first=args[0], last=out))
    block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(middle=args[0]))
    with torch.no_grad():
        model(tokens(3, 20))
    for before, branch, after in (("first", "self_attn", "middle"), ("middle", "mlp", "last")):
        added = seen[after] - seen[before]
        none, twice = ((added - k * seen[branch]).abs() < 1e-4 for k in (0, 2))
        assert (none | twice).all() and none.float().mean() > 0.3 and twice.float().mean() > 0.3


def test_attention_gets_what_it_needs():
    calls = []

    def spy(q, k, v, **settings):
        calls.append((q.shape, k.shape, v.shape, settings))
        return torch_attention(q, k, v, **settings)

    model = Llama(LlamaConfig(**SIZES, dropout=0.25), spy)
    assert all(block.self_attn.attention is spy for block in model.model.layers)
    model(tokens(2, 10))
    assert calls == [((2, 4, 10, 8), (2, 2, 10, 8), (2, 2, 10, 8), dict(causal=True, mask=None, dropout=0.25))] * 3


def test_initialisation():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(500, 96, 200, 8, 4))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < std / 20, name


def test_three_token_loss_by_hand():
    model = Llama(LlamaConfig(3, 4, 4, 1, 1))
    with torch.no_grad():
        for p in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            p.zero_()
        model.model.embed_tokens.weight.copy_(torch.tensor([[2.0, 0, 0, 0]] * 3))  # RMSNorm gives (2, 0, 0, 0)
        model.lm_head.weight[:, 0] = torch.tensor([0.2, 0.3, 0.5]).log() / 2
    total, count = model.loss(torch.tensor([[0, 1, 2]]))
    assert count == 2 and abs(total - -math.log(0.3 * 0.5)) < 1e-5  # token 1 after 0, token 2 after 0 1
    total, count = model.loss(torch.tensor([[0, 1, 2]]), torch.tensor([[-100, -100, 2]]))
    assert count == 1 and abs(total - -math.log(0.5)) < 1e-5
    total, count = model.loss(torch.tensor([[0, 1, 2]]), torch.full((1, 3), -100))
    assert count == 0 and total == 0


# ---- damaged files: one line or a model, never anything else, in little time and memory ----


def attempt(folder):
    """Opens a folder that may be damaged -> whether it did. Any error but a ValueError in one line fails the test."""
    try:
        model = Llama.from_pretrained(folder)
    except ValueError as error:
        assert str(error).isprintable() and str(folder) in str(error) and len(str(error)) <= 600
        return False
    model(torch.zeros(1, 2, dtype=torch.int64))
    return True


@pytest.fixture(scope="module")
def originals():
    """The small files of a folder: {name: bytes}."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tiny(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(folder)
        return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


@given(st.data())
@settings(max_examples=100)
def test_damaged_files_are_named(originals, data):
    name = data.draw(st.sampled_from(sorted(originals)))
    original = originals[name]
    if data.draw(st.booleans()):
        damaged = original[: data.draw(st.integers(0, len(original) - 1))]
    else:
        damaged, size = bytearray(original), len(original)
        places = st.one_of(st.integers(0, min(size, 2000) - 1), st.integers(0, size - 1))  # most of them in the header
        for byte, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=3)):
            damaged[byte] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        for other, content in originals.items():
            (pathlib.Path(folder) / other).write_bytes(damaged if other == name else content)
        opened = attempt(folder)
    if len(damaged) < len(original):  # a newline may end config.json: it is not missed
        assert not opened or original[len(damaged) :] == b"\n"


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2**31 - 1}, {"head_dim": 2**31 - 2},
                                     {"max_position_embeddings": 2**31 - 1}, {"vocab_size": 10**30},
                                     {"intermediate_size": 2**31 - 1, "hidden_size": 2**31 - 2**10}])  # fmt: skip
def test_absurd_sizes_in_a_config_cost_nothing(tmp_path, changes):
    model = tiny(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert attempt(tmp_path) == ("max_position_embeddings" in changes)
