# SPDX-License-Identifier: MIT
"""GPT-2 against that of transformers, the cache against no cache, and traps that once shipped, each one written out."""

import copy
import json
import math
import os
import pathlib
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from minimal import gpt
from minimal.generate import StaticCache, generate
from minimal.gpt import GPT, GPTConfig, torch_attention

SIZES = dict(vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(model):
    """Move every parameter off its initial value: zero biases and unit norms would hide a missing one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model.eval()


def tiny(**changes):
    return perturb(GPT(GPTConfig(**{**SIZES, "dropout": 0.0, **changes})))


def theirs(**changes):
    return perturb(GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=60, eos_token_id=60, **changes)))


def tokens(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def check_logits(ours, reference, bound=1e-5):
    ids = tokens(3, 24)
    with torch.no_grad():
        a, b = ours(ids), reference(ids).logits
    assert (a - b).abs().max() < bound * b.abs().max().clamp_min(1)


def check_losses(ours, reference):
    ids = tokens(3, 24)
    labels = ids.clone()
    labels[0, :10], labels[1, 5:], labels[2, ::3] = -100, -100, -100
    for y in (ids, labels):
        total, count = ours.loss(ids, y)
        assert count == (y[:, 1:] != -100).sum()
        assert abs(total / count - reference(ids, labels=y).loss) < 1e-5


# ---- Hugging Face's model and folder ----


def test_opens_a_folder_written_by_transformers(tmp_path):
    reference = theirs()
    reference.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config == GPTConfig(**SIZES, dropout=0.1, eos_token_id=60) and not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    check_logits(model, reference)
    check_losses(model, reference)


def test_transformers_opens_our_folder(tmp_path):
    model = tiny(eos_token_id=7, dropout=0.2)
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    reference, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(reference) is GPT2LMHeadModel
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert reference.lm_head.weight is reference.transformer.wte.weight
    assert reference.config.eos_token_id == 7 and reference.config.resid_pdrop == 0.2
    check_logits(model, reference.eval())
    check_losses(model, reference)


def test_round_trip_keeps_every_bit_and_the_tied_head_once(tmp_path):
    model = tiny(eos_token_id=3)
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_greedy_generation_is_that_of_transformers(tmp_path):
    reference = theirs()
    reference.generation_config.eos_token_id = None
    reference.save_pretrained(tmp_path)
    model, ids = GPT.from_pretrained(tmp_path), tokens(2, 6)
    out, cache, new = ids, [], ids
    with torch.no_grad():
        for _ in range(18):
            new = model(new, cache)[:, -1:].argmax(-1)
            out = torch.cat((out, new), dim=1)
    want = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=18, do_sample=False, pad_token_id=0
    )
    assert torch.equal(out, want)


def test_names_without_prefix_and_old_buffers(tmp_path):
    reference = theirs()
    reference.save_pretrained(tmp_path)
    old = {n.removeprefix("transformer."): t for n, t in reference.state_dict().items()}
    old["lm_head.weight"] = old["lm_head.weight"].clone()
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file({n: t.clone() for n, t in old.items()}, tmp_path / "model.safetensors")
    check_logits(GPT.from_pretrained(tmp_path), reference)


def test_trap_conv1d_left_as_it_lies(tmp_path):
    """c_proj is square, so a forgotten transpose passes every check of shapes: only the logits tell."""
    reference = theirs()
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    for name in [n for n in stored if n.endswith("attn.c_proj.weight")]:
        stored[name] = stored[name].t().contiguous()
    safetensors.torch.save_file(stored, path, {"format": "pt"})
    wrong = GPT.from_pretrained(tmp_path)
    with pytest.raises(AssertionError):
        check_logits(wrong, reference)


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    again = GPT.from_pretrained(tmp_path)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)


def test_loaded_weights_do_not_live_in_the_file(tmp_path):
    """The file is mapped while it is read; training must neither write through nor lose the weights with it."""
    model = tiny()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = GPT.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_one_dropout_rate_for_three_is_said(tmp_path):
    theirs(attn_pdrop=0.0).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"dropout rates \[0.1, 0.1, 0.0\]"):
        assert GPT.from_pretrained(tmp_path).config.dropout == 0.1


# ---- Folders that are wrong ----


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


def refused(folder, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model_type": "llama"}, "model_type = 'llama', wanted 'gpt2'"),
        ({"model_type": None}, "model_type = None, wanted 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function = 'relu', wanted 'gelu_new'"),
        ({"n_inner": 64}, "n_inner = 64, wanted None"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True, wanted False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False, wanted True"),
        ({"n_head": 5}, "n_embd = 32: wanted a multiple of n_head = 5"),
        ({"n_embd": "32"}, "n_embd = '32': wanted a whole number"),
        ({"n_embd": None}, "config.json"),
        ({"n_layer": 0}, "n_layer = 0: wanted a whole number"),
        ({"resid_pdrop": 2, "embd_pdrop": 2, "attn_pdrop": 2}, "dropout = 2: wanted"),
        ({"n_layer": 2}, "unexpected tensors transformer.h.2.attn.c_attn.bias.* and 9 more"),
        ({"n_layer": 4}, "missing tensors transformer.h.3.attn.c_attn.bias.* and 9 more"),
        ({"n_positions": 25}, r"transformer.wpe.weight is torch.float32 \(24, 32\), wanted floating point \(25, 32\)"),
    ],
)
def test_wrong_config_is_named(folder, changes, pattern):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert str(folder) in refused(folder, pattern)


@pytest.mark.parametrize("name", SIZES)
def test_config_without_a_size_is_named(folder, name):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings[name]
    path.write_text(json.dumps(settings))
    refused(folder, f"config.json: {name} is missing")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"gpt2"', "\udcff"])
def test_config_that_is_no_object_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json: ")


def test_absent_files_are_named(folder, tmp_path):
    refused(tmp_path / "nowhere", "config.json")
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused(folder, "model.safetensors: not a whole safetensors file, the one kind opened")


def edit(folder, change):
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    change(stored)
    safetensors.torch.save_file(stored, folder / "model.safetensors")


def test_wrong_tensors_are_named(folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    edit(folder, lambda s: s.update({name: s[name].t().contiguous()}))
    refused(folder, rf"{name} is torch.float32 \(128, 32\), wanted floating point \(32, 128\)")  # as the file has it
    edit(folder, lambda s: s.update({name: s[name].t().contiguous().to(torch.int8)}))
    refused(folder, rf"{name} is torch.int8 \(32, 128\), wanted floating point")
    edit(folder, lambda s: s.update({name: torch.zeros(())}))
    refused(folder, rf"{name} is torch.float32 \(\), wanted floating point \(32, 128\)")
    edit(folder, lambda s: s.pop(name))
    refused(folder, f"missing tensors {name}; wanted those of GPT-2")
    edit(folder, lambda s: s.update({name: torch.zeros(32, 128), "head.extra": torch.zeros(2)}))
    refused(folder, "unexpected tensors transformer.head.extra")
    edit(folder, lambda s: (s.pop("head.extra"), s.pop("transformer.wte.weight")))
    refused(folder, "missing tensors transformer.wte.weight")


def test_untied_head_is_refused_both_ways(folder):
    edit(folder, lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"] + 1}))
    refused(folder, "lm_head.weight differs")
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        model.save_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors: not a whole safetensors file")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("dump", [lambda b, p: p.write_bytes(pickle.dumps(b)), lambda b, p: torch.save(b, p)])
def test_a_pickle_is_never_run(folder, dump, monkeypatch):
    monkeypatch.chdir(folder)
    dump(Bomb(), folder / "model.safetensors")
    refused(folder, "model.safetensors: not a whole safetensors file")
    assert not pathlib.Path("unpickled").exists()


def test_saving_an_adapted_model_is_refused(folder):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.A = base, nn.Parameter(torch.zeros(2, 32))

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = tiny()
    model.transformer.h[0].attn.c_attn = Adapted(model.transformer.h[0].attn.c_attn)
    with pytest.raises(ValueError, match="the model: missing tensors transformer.h.0.attn.c_attn.bias"):
        model.save_pretrained(folder)
    model = tiny()
    model.transformer.h[0].attn.c_attn.A = nn.Parameter(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="the model: unexpected tensors transformer.h.0.attn.c_attn.A"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def check_whole_after_a_failing_write(folder, save, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def half(tensors, path, metadata=None):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save(folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failing_write_leaves_the_old_files(folder, monkeypatch):
    model = tiny(n_layer=2)
    check_whole_after_a_failing_write(folder, model.save_pretrained, monkeypatch)

    def no_config(*args, **settings):
        raise OSError("No space left on device")

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(gpt.json, "dumps", no_config)  # the weights are written by then
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

    def in_place(folder):
        safetensors.torch.save_file({}, folder / "model.safetensors")

    with pytest.raises(AssertionError):
        check_whole_after_a_failing_write(folder, in_place, monkeypatch)


# ---- The cache: positions and causal alignment ----


def check_chunks(model, ids, sizes, cache=None):
    """The logits of a text do not depend on the pieces in which it is read."""
    with torch.no_grad():
        whole, cache, pieces = model(ids), [] if cache is None else cache, []
        for piece in ids.split(sizes, dim=1):
            pieces.append(model(piece, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    config, T = model.config, ids.size(1)
    assert [tuple(t.shape) for pair in cache for t in pair] == [
        (ids.size(0), config.n_head, T, config.n_embd // config.n_head)
    ] * 2 * config.n_layer


@given(st.lists(st.integers(1, 9), min_size=1, max_size=24).filter(lambda s: sum(s) <= 24), st.integers(1, 3))
def test_cached_chunked_and_whole_prefill_agree(sizes, B):
    torch.manual_seed(0)
    check_chunks(tiny(), tokens(B, sum(sizes)), sizes)
    check_chunks(tiny(), tokens(B, sum(sizes)), sizes, StaticCache(room=5))


class PositionsFromZero(GPT):
    def forward(self, ids, cache=None):  # trap 8: each chunk is taken for the beginning of the text
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.size(1)))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        return self.lm_head(self.transformer.ln_f(x))


def top_left(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):  # trap 5: PyTorch's own alignment
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("make", [lambda c: PositionsFromZero(c), lambda c: GPT(c, top_left)])
def test_traps_of_the_cache(make):
    model, ids = perturb(make(GPTConfig(**SIZES, dropout=0.0))), tokens(2, 20)
    check_chunks(model, ids, [20])  # without a cache the two traps do not show
    for sizes in ([8, 12], [19, 1]):
        with pytest.raises(AssertionError):
            check_chunks(model, ids, sizes)


def test_the_context_is_never_overrun():
    model, cache = tiny(), []
    with torch.no_grad():
        model(tokens(1, 20), cache)
        before = [tuple(t.clone() for t in pair) for pair in cache]
        with pytest.raises(ValueError, match="ids: 20 cached . 5 new tokens do not fit the context, n_positions = 24"):
            model(tokens(1, 5), cache)
        for a, b in zip(before, cache, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert model(tokens(1, 4), cache).shape == (1, 4, 61)


# ---- The loss ----


def three_tokens():
    """A GPT that gives 0.2, 0.3, 0.5 after every text: LN_f gives a constant c, and E c = ln p."""
    model = GPT(GPTConfig(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=1, dropout=0.0))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.transformer.wte.weight[:, 0] = torch.tensor([0.2, 0.3, 0.5]).log()
    return model


def check_three_token_loss(loss):
    total, count = loss(three_tokens(), torch.tensor([[0, 1, 2]]), None)
    assert count == 2 and abs(total - -math.log(0.3 * 0.5)) < 1e-6  # token 1 after 0, token 2 after 0 1
    total, count = loss(three_tokens(), torch.tensor([[0, 1, 2]]), torch.tensor([[-100, -100, 2]]))
    assert count == 1 and abs(total - -math.log(0.5)) < 1e-6


def test_three_token_loss_by_hand():
    check_three_token_loss(lambda model, ids, labels: model.loss(ids, labels))

    def unshifted(model, ids, labels):
        labels = ids if labels is None else labels
        total = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        return total, (labels != -100).sum()

    def shifted_twice(model, ids, labels):
        labels = ids if labels is None else labels
        return model.loss(ids, F.pad(labels[:, 1:], (0, 1), value=-100))

    for wrong in (unshifted, shifted_twice):
        with pytest.raises(AssertionError):
            check_three_token_loss(wrong)


def check_nothing_to_count(loss):
    model = tiny()
    for ids, labels in ((tokens(2, 9), torch.full((2, 9), -100)), (tokens(2, 1), None)):
        total = loss(model, ids, labels)
        total.backward()
        assert total == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
        assert model.transformer.wte.weight.grad is not None


def test_all_masked_is_zero_and_not_nan():
    check_nothing_to_count(lambda model, ids, labels: model.loss(ids, labels)[0])
    assert tiny().loss(tokens(2, 9), torch.full((2, 9), -100))[1] == 0

    def mean(model, ids, labels):
        labels = ids if labels is None else labels
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())

    with pytest.raises(AssertionError):
        check_nothing_to_count(mean)


def check_splits(model, ids, labels, parts, accumulate):
    def gradient(split):
        model.zero_grad()
        accumulate(model, list(zip(ids.split(split), labels.split(split), strict=True)))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([len(ids)])
    assert (gradient(parts) - whole).norm() <= 1e-12 * whole.norm()


def by_total(model, batches):
    count = sum(model.loss(*batch)[1] for batch in batches)
    for batch in batches:
        (model.loss(*batch)[0] / count).backward()


def by_mean_of_means(model, batches):
    for batch in batches:
        total, count = model.loss(*batch)
        (total / count.clamp_min(1) / len(batches)).backward()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_gradient_is_the_same_for_every_split(parts, seed):
    torch.manual_seed(seed)
    model = perturb(GPT(GPTConfig(23, n_positions=12, n_embd=16, n_layer=2, n_head=2, dropout=0.0)).double())
    ids = tokens(sum(parts), 10, vocab=23)
    labels = ids.masked_fill(torch.rand(ids.shape) < torch.rand(len(ids), 1), -100)  # rows unequally masked
    labels[0, 1] = ids[0, 1]  # one term at least
    check_splits(model, ids, labels, parts, by_total)


def test_trap_mean_of_means():
    model = perturb(GPT(GPTConfig(23, n_positions=12, n_embd=16, n_layer=2, n_head=2, dropout=0.0)).double())
    ids = tokens(4, 10, vocab=23)
    labels = ids.clone()
    check_splits(model, ids, labels, [2, 2], by_mean_of_means)  # equal counts hide it
    labels[:2, 3:] = -100
    check_splits(model, ids, labels, [2, 2], by_total)
    with pytest.raises(AssertionError):
        check_splits(model, ids, labels, [2, 2], by_mean_of_means)


END = 12  # closes every document, and is what a batch would be padded with


def learn_to_count(labels_of):
    """Documents that count up to 11, each closed by END, one after the other in a row, as training packs them."""
    torch.manual_seed(0)
    documents, g = [[*range(first, 12), END] for first in (0, 3, 6, 9)], torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(13, n_positions=32, n_embd=32, n_layer=1, n_head=2, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        rows = [sum((documents[i] for i in torch.randint(4, (7,), generator=g)), [])[:25] for _ in range(8)]
        ids = torch.tensor(rows)  # (8, 25): the shortest document has 4 tokens
        total, count = model.loss(ids, labels_of(ids))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model.eval()


def check_stops(model):
    for first in (0, 3, 6, 9):
        ids = generate(model, torch.tensor([[first]]), 20, temperature=0, eos_id=END)[0].tolist()
        assert ids[: 12 - first] == [*range(first, 12)], "the document itself was not learnt"
        assert ids[12 - first :] == [END], "it did not stop"


def test_trap_the_end_token_masked_as_if_it_were_padding():
    """Trap: with pad == eos, masking the padding masks every end, and nothing teaches the model to stop."""
    check_stops(learn_to_count(lambda ids: ids))
    with pytest.raises(AssertionError, match="it did not stop"):
        check_stops(learn_to_count(lambda ids: ids.masked_fill(ids == END, -100)))


# ---- The model itself ----


def check_causal(model):
    ids = tokens(2, 16)
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 61
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :9], b[:, :9]), "a token changed what came before it"
    assert ((a - b)[:, 9:].abs().amax(-1) > 1e-4).all(), "a token went unseen by those after it"


def check_permutation(attention):
    """One layer and no positions: what comes last sees those before it as a set."""
    model, ids = perturb(GPT(GPTConfig(**{**SIZES, "n_layer": 1}, dropout=0.0), attention)), tokens(2, 12)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        shuffled = torch.cat((ids[:, torch.randperm(11)], ids[:, 11:]), dim=1)
        torch.testing.assert_close(model(ids)[:, -1], model(shuffled)[:, -1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids.flip(0)), model(ids).flip(0), rtol=1e-5, atol=1e-5)


def softmax_over(dim):
    def attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~torch.ones(q.size(2), k.size(2)).bool().tril(), -math.inf)
        return scores.softmax(dim) @ v

    return attention


def test_causality_and_permutation():
    check_causal(tiny())
    check_permutation(torch_attention)
    check_permutation(softmax_over(-1))
    with pytest.raises(AssertionError):
        check_permutation(softmax_over(-2))  # trap 7: over the queries
    everything = perturb(GPT(GPTConfig(**SIZES, dropout=0.0), lambda q, k, v, **_: torch_attention(q, k, v)))
    with pytest.raises(AssertionError, match="came before"):
        check_causal(everything)


def check_dropout(model):
    ids = tokens(2, 16)
    model.eval()
    assert torch.equal(model(ids), model(ids)), "evaluated twice, two results"
    model.train()
    assert not torch.equal(model(ids), model(ids)), "trained twice, one result"


def test_dropout_in_training_only():
    model = tiny(dropout=0.3)
    check_dropout(model)
    model.eval()
    plain = model(tokens(2, 16))
    model.config.dropout = 0.0
    model.train()
    assert torch.equal(model(tokens(2, 16)), plain)

    def always(q, k, v, *, dropout=0.0, **settings):  # trap 7: functional dropout that never hears of eval()
        return torch_attention(q, k, v, dropout=0.3, **settings)

    with pytest.raises(AssertionError, match="evaluated twice"):
        check_dropout(perturb(GPT(GPTConfig(**SIZES, dropout=0.3), always)))


@pytest.mark.parametrize("place", ["wte", "attn.c_proj", "mlp.c_proj", "attention"])
def test_dropout_is_in_all_four_places(place, monkeypatch):
    """With every other place silenced, the one left still makes two passes differ."""
    seen, real = [], F.dropout

    def only(x, p=0.5, training=True, inplace=False):
        seen.append(p if training else 0.0)
        here = ("wte", "attn.c_proj", "mlp.c_proj")[(len(seen) - 1) % 3]  # the order in which one layer asks
        return real(x, p, training) if here == place else x

    def attention(q, k, v, *, dropout=0.0, **settings):
        return torch_attention(q, k, v, dropout=dropout if place == "attention" else 0.0, **settings)

    monkeypatch.setattr(gpt.F, "dropout", only)
    model = perturb(GPT(GPTConfig(**{**SIZES, "n_layer": 1}, dropout=0.3), attention)).train()
    ids = tokens(2, 16)
    assert not torch.equal(model(ids), model(ids)) and set(seen) == {0.3} and len(seen) == 6


def test_initial_loss_and_spread():
    for layers in (2, 8):
        model = GPT(GPTConfig(vocab_size=500, n_positions=64, n_embd=128, n_layer=layers, n_head=4, dropout=0.0))
        total, count = model.loss(tokens(8, 65, vocab=500))
        assert abs(total / count - math.log(500)) < 0.1
        for name, p in model.named_parameters():
            if p.dim() == 2:
                want = 0.02 / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 0.02
                assert abs(p.std() / want - 1) < 0.05 and abs(p.mean()) < 0.1 * want, name
            else:
                assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_parameters_of_gpt2_small():
    with torch.device("meta"):
        model, reference = GPT(GPTConfig()), GPT2LMHeadModel(GPT2Config())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert set(dict(model.named_modules())) <= set(dict(reference.named_modules()))


def test_attention_gets_views_and_what_it_needs():
    calls = []

    def spy(q, k, v, **settings):
        calls.append((q, k, v, settings))
        return torch_attention(q, k, v, **settings)

    model = perturb(GPT(GPTConfig(**SIZES, dropout=0.25), spy))
    model(tokens(2, 10))
    for q, k, v, settings in calls:
        assert q.shape == k.shape == v.shape == (2, 4, 10, 8)
        assert settings == {"causal": True, "mask": None, "dropout": 0.0}
        starts = {t.untyped_storage().data_ptr() for t in (q, k, v)}
        assert len(starts) == 1 and q.stride() == k.stride() == v.stride() == (960, 8, 96, 1), "a needless copy"
    calls.clear()
    model.train()(tokens(2, 10))
    assert [settings["dropout"] for *_, settings in calls] == [0.25] * 3


def test_bfloat16_autocast():
    model, ids = tiny(), tokens(4, 24)
    exact = model.loss(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, count = model.loss(ids)
    assert total.dtype == torch.float32 and abs(total / exact - 1) < 0.02
    (total / count).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_weights_sum_in_float32():
    """In bfloat16 a sum of some hundreds keeps a step of 2 or 4 between neighbours: the count would be off as much."""
    model, ids = tiny().bfloat16(), tokens(8, 24)
    total, _ = model.loss(ids)
    logits = model(ids[:, :-1]).double()
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert total.dtype == torch.float32 and abs(total - want) < 1e-3


def test_compiles_without_a_break():
    model = tiny(n_layer=1)
    compiled, ids = copy.deepcopy(model), tokens(2, 20)
    compiled.compile(backend="aot_eager", fullgraph=True)  # in place: loss() goes through it too
    a, b = model.loss(ids)[0], compiled.loss(ids)[0]
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        check_chunks(compiled, ids, [12, 8])


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"vocab_size": 0}, "vocab_size = 0: wanted a whole number of at least 1"),
        ({"n_positions": 2.0}, "n_positions = 2.0: wanted a whole number of at least 1"),
        ({"n_layer": True}, "n_layer = True: wanted a whole number of at least 1"),
        ({"n_embd": 30}, "n_embd = 30: wanted a multiple of n_head = 4"),
        ({"dropout": 1.0}, "dropout = 1.0: wanted a number from 0"),
        ({"dropout": float("nan")}, "dropout = nan: wanted a number from 0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0: wanted a number above 0"),
    ],
)
def test_config_errors(changes, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        GPTConfig(**{**SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_input_errors():
    model = tiny()
    for call, pattern in (
        (lambda: model(tokens(25)[None]), "ids: 0 cached . 25 new tokens do not fit the context, n_positions = 24"),
        (lambda: model(tokens(5)), r"ids of shape \(5,\), torch.int64: wanted token ids"),
        (lambda: model(torch.zeros(1, 5)), r"ids of shape \(1, 5\), torch.float32: wanted token ids"),
        (lambda: model.loss(tokens(2, 5), tokens(2, 4)), r"labels of shape \(2, 4\): wanted that of ids, \(2, 5\)"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


# --- documents in one row, and places before the text -----------------------------------------------------------------


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 9))
def test_packed_documents_equal_documents_alone(lengths, seed):
    """Trap 9: each document's logits are those of it alone, positions from 0, whatever stands beside it."""
    lengths = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= SIZES["n_positions"]]
    torch.manual_seed(seed)
    model = tiny()
    parts = [tokens(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    # Numbers need not rise: a document is a run of one number, so 1 1 2 1 are three.
    documents = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), documents=documents)
        alone = torch.cat([model(part) for part in parts], 1)
    assert (packed - alone).abs().max() < 1e-5 * alone.abs().max().clamp_min(1)


def test_trap_packed_documents_leak():
    """Change document A: B's logits stay, bit for bit; the variant without documents moves them."""
    model, ids = tiny(), tokens(1, 20)
    documents = torch.arange(20)[None] // 10
    changed = torch.cat((tokens(1, 10, seed=7), ids[:, 10:]), 1)
    with torch.no_grad():
        assert torch.equal(model(ids, documents=documents)[:, 10:], model(changed, documents=documents)[:, 10:])
        assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:])


def test_loss_of_packed_documents_is_the_sum_of_theirs():
    model, parts = tiny(), [tokens(1, n, seed=n) for n in (5, 9, 3)]
    ids = torch.cat(parts, 1)
    documents = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)], 1)
    labels = torch.cat([torch.cat((torch.full((1, 1), -100), part[:, 1:]), 1) for part in parts], 1)
    total, count = model.loss(ids, labels, documents)
    alone = [model.loss(part) for part in parts]
    assert count == sum(int(n) for _, n in alone) == 4 + 8 + 2
    torch.testing.assert_close(total, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_documents_are_checked():
    model, ids, cache = tiny(), tokens(2, 6), []
    model(ids, cache)
    for wrong, held in ((ids[:, :5], []), (ids[:1], []), (ids, cache)):
        with pytest.raises(ValueError, match=r"documents of shape .*: wanted \(2, (6|12)\), cached tokens too"):
            model(ids, held, wrong)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 6), max_size=3), st.booleans())
def test_documents_beside_a_cache(lengths, sizes, static):
    """Documents read in pieces, cut anywhere, give what they give read whole: two of them are padding and text."""
    torch.manual_seed(len(sizes))
    lengths = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= SIZES["n_positions"]]
    ids, cache = tokens(2, sum(lengths)), StaticCache(room=3) if static else []
    documents = torch.cat([torch.full((2, n), i % 2) for i, n in enumerate(lengths)], 1)
    documents[1] = documents[1].flip(0)  # each row in its own way
    ends = sorted({min(sum(sizes[: i + 1]), ids.size(1)) for i in range(len(sizes))} | {ids.size(1)})
    with torch.no_grad():
        model = tiny()
        whole, pieces = model(ids, documents=documents), []
        for start, end in zip([0, *ends], ends, strict=False):
            pieces.append(model(ids[:, start:end], cache, documents[:, :end]))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


def test_wrong_positions_beside_a_cache_are_noticed():
    """Trap 8, with padding on the left: the padding's places are counted too."""

    class Counting(GPT):
        def forward(self, ids, cache=None, documents=None):
            self.position_offset = 4 if cache else 0
            return super().forward(ids, cache, documents)

    def check(model):
        ids, documents, cache = tokens(1, 12), torch.tensor([[0] * 4 + [1] * 8]), []
        with torch.no_grad():
            alone = model(ids[:, 4:])
            model(ids[:, :8], cache, documents[:, :8])
            padded = model(ids[:, 8:], cache, documents)
        torch.testing.assert_close(padded, alone[:, 4:], rtol=1e-5, atol=1e-5)

    check(tiny())
    with pytest.raises(AssertionError):
        check(perturb(Counting(GPTConfig(**SIZES, dropout=0.0))))


def test_position_offset_moves_every_position_and_shortens_the_context():
    """As if two tokens stood before the text that nothing looks at."""
    model, moved = tiny(), tiny(n_positions=22)
    moved.load_state_dict(model.state_dict() | {"transformer.wpe.weight": model.transformer.wpe.weight[2:]})
    ids, cache = tokens(2, 12), []
    with torch.no_grad():
        want = moved(ids)
        model.position_offset = 2
        assert torch.equal(model(ids), want)
        steps = torch.cat([model(part, cache) for part in ids.split(5, 1)], 1)
        assert (steps - want).abs().max() < 1e-5 * want.abs().max().clamp_min(1)
        with pytest.raises(ValueError, match="do not fit the context"):
            model(tokens(1, 23))
