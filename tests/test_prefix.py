# SPDX-License-Identifier: MIT
"""Prefix-tuning: PEFT is the oracle for values, training and files, brute force in float64 for the attention."""

import copy
import json
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

from minimal.attention import attention
from minimal.bert import BERT, BERTConfig
from minimal.checkpoint import load_checkpoint, save_checkpoint
from minimal.gpt import GPT, GPTConfig, torch_attention
from minimal.llama import Llama
from minimal.prefix import Prefix, add_prefix, load_prefix, prefix_parameters, remove_prefix, save_prefix
from minimal.transformer import Transformer, TransformerConfig, greedy

IDS = torch.arange(14).reshape(2, 7) * 5 % 48
WORDS = [3, 1, 4]
FORMS = {"mlp": {"hidden": 8}, "direct": {"reparameterise": False}}


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
        yield


def theirs(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of transformers with large weights, so that attention is far from uniform, and their folders."""
    made = {}
    for kind in ("gpt2", "llama"):
        model, folder = theirs(kind), tmp_path_factory.mktemp(kind)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 2 and "wpe" not in name:
                    p.mul_(10)
        model.save_pretrained(folder)
        made[kind] = folder
    return made


HF = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}
OURS = {"gpt2": GPT, "llama": Llama}
KINDS = list(OURS)


def loud(model):
    """Fresh weights are so small that attention is all but uniform and a prefix has little to say."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(10)
    return model


def gpt(**sizes):
    torch.manual_seed(0)
    small = dict(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, dropout=0.0)
    return loud(GPT(GPTConfig(**{**small, **sizes})))


def bert(task="classify", labels=("a", "b", "c"), **sizes):
    torch.manual_seed(0)
    return loud(BERT(BERTConfig(48, 16, 2, 2, 24, 32, 2, 0.0, task=task, labels=labels, **sizes))).eval()


def transformer():
    torch.manual_seed(0)
    return Transformer(TransformerConfig(48, 16, 2, 2, 2, 24, dropout=0.0, norm="pre", eos_token_id=1)).eval()


MODELS = {"gpt": gpt, "bert": bert, "transformer": transformer}


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids, ids) if isinstance(model, Transformer) else model(ids)


@torch.no_grad()
def stir(model):
    generator = torch.Generator().manual_seed(1)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


def bits(tensors):
    return {n: (t.dtype, t.detach().contiguous().view(torch.uint8).clone()) for n, t in tensors.items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a)


def files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return safetensors.torch.load_file(folder / "adapter_model.safetensors"), config


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- PEFT as the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_saved_here_computes_the_same_in_peft(kind, form, folders, tmp_path):
    model = OURS[kind].from_pretrained(folders[kind])
    base = run(model)
    add_prefix(model, 5, WORDS, **FORMS[form])
    save_prefix(stir(model), tmp_path)
    oracle = peft.PeftModel.from_pretrained(HF[kind].from_pretrained(folders[kind]), tmp_path).eval()
    with torch.no_grad():
        expected = oracle(IDS).logits
    assert (run(model) - base).abs().max() > 0.1  # the prefix does something
    close(run(model), expected)
    # trap 8: a text whose positions start at 0 under a prefix is not what PEFT computes
    model.position_offset = 0
    assert (run(model) - expected).abs().max() > 1e-3
    model.position_offset = 5
    # cached decoding, in pieces and token by token: what PEFT writes when it reads all of the text anew each time
    # (PEFT 0.21 generates without the prefix, as its name of the cache is not that of the transformers of today)
    cache = []
    with torch.no_grad():
        pieces = torch.cat([model(IDS[:, a:b], cache) for a, b in ((0, 3), (3, 6), (6, 7))], dim=1)
        close(pieces, expected)
        ids, cache = IDS, []
        for _ in range(6):
            ids = torch.cat((ids, model(ids if not cache else ids[:, -1:], cache)[:, -1:].argmax(-1)), dim=1)
        written = IDS
        for _ in range(6):
            written = torch.cat((written, oracle(written).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ids, written)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_saved_by_peft_computes_the_same_here(kind, projected, folders, tmp_path):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projected, encoder_hidden_size=12
    )
    oracle = peft.get_peft_model(HF[kind].from_pretrained(folders[kind]), config).eval()
    oracle.save_pretrained(tmp_path)
    model = OURS[kind].from_pretrained(folders[kind])
    base = run(model)
    load_prefix(model, tmp_path)
    with torch.no_grad():
        close(run(model), oracle(IDS).logits)
    assert (run(model) - base).abs().max() > 1e-2
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in prefix_parameters(model))  # no views of the file
    for form in FORMS.values():  # into prefixes that are there, with and without an MLP
        filled = OURS[kind].from_pretrained(folders[kind])
        add_prefix(filled, 4, **form)
        load_prefix(stir(filled), tmp_path)
        assert torch.equal(run(filled), run(model))
    save_prefix(model, tmp_path / "again")
    (ours, settings), (theirs, wanted) = files(tmp_path / "again"), files(tmp_path)
    assert same_bits(bits(ours), bits(theirs))
    for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "peft_type", "task_type"):
        assert settings[key] == wanted[key], key


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_peft(kind, folders, tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    oracle = peft.get_peft_model(HF[kind].from_pretrained(folders[kind]), config)
    oracle.save_pretrained(tmp_path)
    model = OURS[kind].from_pretrained(folders[kind])
    load_prefix(model, tmp_path)

    def curve(model, parameters, logits):
        optimizer, losses = torch.optim.AdamW(parameters, lr=3e-2), []
        for _ in range(6):
            loss = F.cross_entropy(logits(model(IDS[:, :-1])).flatten(0, 1), IDS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    ours = curve(model, prefix_parameters(model), lambda y: y)
    wanted = curve(oracle, [p for p in oracle.parameters() if p.requires_grad], lambda y: y.logits)
    assert ours[-1] < ours[0] - 0.05
    torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=0)


def test_bert_under_a_prefix_is_transformers_bert_with_a_past(tmp_path):
    """PEFT cannot run BERT with the transformers of today; BERT itself takes a past and counts positions from it on."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, attn_implementation="eager")  # fmt: skip
    oracle = transformers.BertModel(config).eval()
    oracle.save_pretrained(tmp_path)
    model = BERT.from_pretrained(tmp_path, task="classify", labels=("a", "b"))
    add_prefix(model, 3, WORDS, reparameterise=False)
    stir(model)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    prefixes = [m for m in model.modules() if isinstance(m, Prefix)]
    for given in (None, mask):
        past = transformers.DynamicCache()
        for layer, prefix in enumerate(prefixes):
            k, v = (t.detach().expand(2, -1, -1, -1) for t in prefix.kv())
            past.update(k, v, layer)
        wide = F.pad(mask if given is not None else torch.ones_like(mask), (3, 0), value=True)
        with torch.no_grad():
            expected = oracle(IDS, attention_mask=wide.long(), past_key_values=past).last_hidden_state
            found = model.hidden(IDS, mask=given)
        real = mask if given is not None else torch.ones_like(mask)
        close(found[real], expected[real])
    model.position_offset = 0
    with torch.no_grad():
        assert (model.hidden(IDS, mask=mask)[mask] - expected[mask]).abs().max() > 1e-3


def test_files_of_bert_are_those_of_peft(tmp_path):
    """The head too: PEFT makes the same file, and finds in ours what it wants."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3)  # fmt: skip
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    oracle = peft.get_peft_model(transformers.BertForSequenceClassification(config), settings)
    oracle.save_pretrained(tmp_path / "peft")
    model = bert()
    load_prefix(model, tmp_path / "peft")
    assert model.classifier.weight.requires_grad and model.classifier.bias.requires_grad
    assert not model.bert.pooler.dense.weight.requires_grad
    save_prefix(model, tmp_path / "ours")
    (ours, mine), (wanted, _) = files(tmp_path / "ours"), files(tmp_path / "peft")
    assert same_bits(bits(ours), bits(wanted))
    assert mine["task_type"] == "SEQ_CLS" and mine["modules_to_save"] == ["classifier"]
    stir(model)
    save_prefix(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(transformers.BertForSequenceClassification(config), tmp_path / "ours")
    close(again.prompt_encoder.default.embedding.weight, files(tmp_path / "ours")[0]["prompt_embeddings"], 0)
    close(again.base_model.classifier.modules_to_save.default.weight, model.classifier.weight, 0)


# ---- the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_a_decoder_has_read_the_words(kind, form, folders):
    model = OURS[kind].from_pretrained(folders[kind])
    words = torch.tensor([3, 1, 4, 3, 1]).expand(2, -1)
    expected = run(model, torch.cat((words, IDS), dim=1))[:, 5:]
    model.train()
    add_prefix(model, 5, WORDS, **FORMS[form])  # repeated to 5
    assert all(m.training for m in model.modules())
    close(run(model), expected)
    remove_prefix(model)
    add_prefix(model, 2, torch.tensor(WORDS), **FORMS[form])  # cut off after 2
    expected = run(remove_copy(model), torch.cat((words[:, :2], IDS), dim=1))[:, 2:]
    close(run(model), expected)


def remove_copy(model):
    bare = copy.deepcopy(model)
    remove_prefix(bare)
    return bare


def test_each_place_comes_from_its_own_row_by_the_mlp():
    """Section 4.3, by hand: row p of E gives the keys and values of place p, in every attention."""
    model = gpt()
    add_prefix(model, 3, WORDS, hidden=8)
    stir(model)
    E, W_1, b_1 = model.prefix.E, model.prefix.W_1.weight, model.prefix.W_1.bias
    for site in (block.attn.attention for block in model.transformer.h):
        for p in range(3):
            made = site.W_2.weight @ torch.tanh(W_1 @ E[p] + b_1) + site.W_2.bias  # (2 Hkv D,)
            close(site.kv()[:, :, p], site.start[:, :, p] + made.view(2, 2, 8), 1e-6)


def test_the_start_is_read_without_dropout_and_drawn_from_the_vocabulary():
    model = gpt(dropout=0.5).train()
    words = torch.tensor([torch.randint(48, (1,), generator=torch.Generator().manual_seed(7)) for _ in range(1)])
    torch.manual_seed(7)
    add_prefix(model, 1, reparameterise=False)
    drawn = model.transformer.h[0].attn.attention.start.clone()
    remove_prefix(model)
    add_prefix(model, 1, words, reparameterise=False)
    assert torch.equal(model.transformer.h[0].attn.attention.start, drawn)


# ---- the attention, by brute force --------------------------------------------------------------------------------


def brute_force(q, k, v, causal, mask, scale):
    """One query, one head, one key at a time, float64; of no visible key, zeros."""
    B, H, T, D = q.shape
    S, groups = k.size(2), H // k.size(1)
    out = torch.zeros(B, H, T, v.size(3), dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                x = torch.full((S,), -torch.inf, dtype=torch.float64)
                for s in range(S):
                    add = 0.0 if mask is None else mask[b, h, t, s].item()
                    add = (0.0 if add else -torch.inf) if isinstance(add, bool) else add
                    if not (causal and s > t + S - T):
                        x[s] = scale * (q[b, h, t] @ k[b, h // groups, s]) + add
                if x.max() > -torch.inf:
                    out[b, h, t] = x.softmax(0) @ v[b, h // groups]
    return out


@hypothesis.given(data=st.data())
def test_attention_over_the_prefix_and_the_text(data):
    B, Hkv, groups, T, past, P, D = (data.draw(st.integers(1, 3), label=n) for n in ("B", "Hkv", *"gTSPD"))
    S, H, causal = T + past - 1, Hkv * groups, data.draw(st.booleans(), label="causal")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    q, k, v = (torch.randn(B, n, m, D, dtype=torch.float64) for n, m in ((H, T), (Hkv, S), (Hkv, S)))
    start = torch.randn(2, Hkv, P, D, dtype=torch.float64)
    kind = data.draw(st.sampled_from(["none", "bool", "additive"]), label="mask")
    shape = [data.draw(st.sampled_from([1, n]), label="size") for n in (B, H, T, S)]
    shape = shape[data.draw(st.integers(0, 3), label="dims cut off") :]
    mask = None if kind == "none" else torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape).double()
    if kind == "additive" and data.draw(st.booleans(), label="with -inf"):
        mask = mask.masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    scale = data.draw(st.sampled_from([None, 0.3]), label="scale")
    found = Prefix(torch_attention, start)(q, k, v, causal=causal, mask=mask, scale=scale)
    if mask is not None:
        seen = torch.ones(()) == 1 if kind == "bool" else torch.zeros((), dtype=torch.float64)
        mask = torch.cat((seen.expand(B, H, T, P), mask.expand(B, H, T, S)), dim=3)
    k, v = (torch.cat((t.expand(B, -1, -1, -1), x), dim=2) for t, x in zip(start, (k, v), strict=True))
    close(found, brute_force(q, k, v, causal, mask, D**-0.5 if scale is None else scale), 1e-12)


def test_a_row_with_nothing_but_the_prefix_is_finite_forward_and_backward():
    """Trap 6, with a prefix of one: what is fully masked sees it alone. A variant that widens by False gives zeros."""
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    prefix, mask = Prefix(torch_attention, torch.randn(2, 2, 1, 4)), torch.zeros(3, 3, dtype=torch.bool)
    out = prefix(q, k, v, causal=True, mask=mask)
    close(out, prefix.start[1].expand(1, -1, 3, -1), 1e-6)
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v, prefix.start)) and not v.grad.any()
    assert prefix.start.grad[1].abs().min() > 0
    k, v = (torch.cat((t.expand(1, -1, -1, -1), x), dim=2) for t, x in zip(prefix.start, (k, v), strict=True))
    assert not torch_attention(q, k, v, causal=True, mask=F.pad(mask, (1, 0), value=False)).any()


# ---- caches, documents, masks, positions --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(cuts=st.sets(st.integers(1, 6)))
def test_with_a_cache_and_without(kind, folders, cuts):
    model = OURS[kind].from_pretrained(folders[kind])
    add_prefix(model, 5, WORDS, reparameterise=False)
    stir(model)
    edges, cache = [0, *sorted(cuts), 7], []
    with torch.no_grad():
        pieces = [model(IDS[:, a:b], cache) for a, b in zip(edges, edges[1:], strict=False)]
    close(torch.cat(pieces, dim=1), run(model))
    assert [tuple(t.shape[2] for t in kv) for kv in cache] == [(7, 7)] * 2  # and no prefix in it


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_see_the_prefix_and_not_each_other(kind, folders):
    model = OURS[kind].from_pretrained(folders[kind])
    add_prefix(model, 5, WORDS, reparameterise=False)
    stir(model)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 5, 2, 2, 2, 7, 7]])
    with torch.no_grad():
        packed = model(IDS, documents=documents)
        close(packed[0, :3], model(IDS[:1, :3])[0])  # prefix and positions as if alone
        close(packed[0, 3:], model(IDS[:1, 3:])[0])
        close(packed[1, 2:5], model(IDS[1:, 2:5])[0])
        other = IDS.clone()
        other[0, :3] = 40
        assert torch.equal(model(other, documents=documents)[0, 3:], packed[0, 3:])  # trap 9
    before = packed
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Prefix):
                m.start.add_(1.0)
        assert ((model(IDS, documents=documents) - before).abs().amax(-1) > 1e-3).all()  # every document sees it


def test_padding_does_not_reach_the_text_of_bert():
    model = bert()
    add_prefix(model, 4, WORDS)
    stir(model)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        padded = model.hidden(IDS, mask=mask)
        close(padded[1, :4], model.hidden(IDS[1:, :4])[0])
        other = IDS.clone()
        other[1, 4:] = 9
        assert torch.equal(model.hidden(other, mask=mask)[1, :4], padded[1, :4])
        assert model.hidden(IDS, mask=torch.zeros_like(mask)).isfinite().all()
    total, count = model.loss(ids=IDS, mask=mask, labels=torch.tensor([0, 2]))
    (total / count).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prefix_parameters(model))


def test_the_context_is_shorter_by_the_prefix():
    model = gpt()
    add_prefix(model, 20, WORDS)
    assert model.position_offset == 20
    model(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_positions = 32"):
        model(torch.zeros(1, 13, dtype=torch.int64))


def test_an_encoder_decoder_has_three_kinds_of_prefix(tmp_path):
    model, source = transformer(), IDS[:, :5]
    base, mask = run(model), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    names = add_prefix(model, 4, WORDS)
    assert names == [f"encoder.{i}.self_attn.attention" for i in (0, 1)] + [
        f"decoder.{i}.{kind}.attention" for i in (0, 1) for kind in ("self_attn", "cross_attn")]  # fmt: skip
    stir(model)
    assert not hasattr(model, "position_offset") and (run(model) - base).abs().max() > 0.1
    memory, cache = model.encode(source, mask), []
    whole = model.decode(IDS, memory, mask)
    close(torch.cat([model.decode(IDS[:, t : t + 1], memory, mask, cache) for t in range(7)], dim=1), whole)
    close(model.decode(IDS[1:], model.encode(source[1:, :3]))[0], whole[1])  # without the padding
    assert len(greedy(model, source, 6, mask)) == 2
    save_prefix(model, tmp_path)
    again = transformer()
    load_prefix(again, tmp_path)
    close(run(again), run(model), 1e-6)
    tensors, config = files(tmp_path)
    assert config["modules"] == names and tuple(tensors["prompt_embeddings"].shape) == (4, 6 * 2 * 16)
    for name in names:  # each has its own part in what comes out
        site, kept = model.get_submodule(name), run(model)
        site.start.add_(1.0)
        assert (run(model) - kept).abs().max() > 1e-3, name


# ---- training, saving, removing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", MODELS)
def test_training_lowers_the_loss_and_leaves_the_base(make, form):
    model = MODELS[make]()
    batch = {
        "gpt": dict(ids=IDS), "bert": dict(ids=IDS, labels=torch.tensor([1, 2])),
        "transformer": dict(source=IDS, target=IDS),
    }[make]  # fmt: skip
    base = bits(model.state_dict())
    add_prefix(model, 4, WORDS, **FORMS[form])
    parameters = prefix_parameters(model)
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-2), []
    model.train()
    for _ in range(40):
        total, count = model.loss(**batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    remove_prefix(model)
    assert same_bits(bits(model.state_dict()), base)


@pytest.mark.parametrize("make", MODELS)
def test_reparameterised_is_its_collapsed_form(make, tmp_path):
    model = MODELS[make]()
    add_prefix(model, 4, WORDS, hidden=8)
    save_prefix(stir(model), tmp_path)
    plain = MODELS[make]()
    load_prefix(plain, tmp_path)
    assert not any(isinstance(m, nn.Linear) for p in plain.modules() if isinstance(p, Prefix) for m in p.modules())
    assert not hasattr(plain, "prefix")
    close(run(plain), run(model), 1e-6)
    for a, b in zip(*([m.kv() for m in x.modules() if isinstance(m, Prefix)] for x in (plain, model)), strict=True):
        assert torch.equal(a, b)


def test_a_fresh_head_trains_and_is_saved(tmp_path):
    model = bert()
    add_prefix(model, 4, WORDS)
    model.classifier.requires_grad_(True)
    assert any(p is model.classifier.weight for p in prefix_parameters(model))
    save_prefix(stir(model), tmp_path)
    again = bert()
    nn.init.zeros_(again.classifier.weight)
    load_prefix(again, tmp_path)
    assert torch.equal(again.classifier.weight, model.classifier.weight) and again.classifier.weight.requires_grad
    close(run(again), run(model), 1e-6)
    remove_prefix(model)
    assert all(p.requires_grad for p in model.parameters())
    # a head that trains here must be in the file
    bare = bert()
    add_prefix(bare, 4, WORDS)
    save_prefix(bare, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"classifier\.bias is not there"):
        load_prefix(again, tmp_path / "bare")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", MODELS)
def test_remove_restores_everything(make, form):
    model = MODELS[make]()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before, kept, state = run(model), bits(model.state_dict()), set(vars(model))
    functions = [vars(m).get("kernel", vars(m).get("attention")) for m in model.modules()]
    add_prefix(model, 4, WORDS, **FORMS[form])
    stir(model)
    assert not torch.equal(run(model), before)
    with pytest.raises(ValueError, match="already has a prefix; wanted remove_prefix first"):
        add_prefix(model, 4)
    remove_prefix(model)
    assert torch.equal(run(model), before) and same_bits(bits(model.state_dict()), kept)
    assert [vars(m).get("kernel", vars(m).get("attention")) for m in model.modules()] == functions
    assert set(vars(model)) == state and getattr(model, "position_offset", 0) == 0
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    with pytest.raises(ValueError, match="has no prefix"):
        remove_prefix(model)


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_independent(form):
    model = gpt()
    add_prefix(model, 4, WORDS, **FORMS[form])
    twin, before = copy.deepcopy(model), run(model)
    assert torch.equal(run(twin), before)
    stir(twin)
    assert torch.equal(run(model), before) and not torch.equal(run(twin), before)
    names = [n for n, _ in twin.named_parameters(remove_duplicate=False)]
    assert len(names) - 1 == len(list(twin.parameters()))  # each has one name, but the tied head


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_resumes(form, tmp_path):
    models = []
    for seed in (1, 2):
        model = gpt()
        torch.manual_seed(seed)
        add_prefix(model, 4, **FORMS[form])
        models.append((model, torch.optim.AdamW(prefix_parameters(model))))
    save_checkpoint(tmp_path / "state", *models[0], {"step": 3})
    assert not torch.equal(run(models[0][0]), run(models[1][0]))
    assert load_checkpoint(tmp_path / "state", *models[1]) == {"step": 3}
    assert torch.equal(run(models[0][0]), run(models[1][0]))


def test_dropout_is_off_in_evaluation():
    """Trap 7."""
    model = gpt(dropout=0.3)
    add_prefix(model, 4, WORDS)
    model.eval()
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


def test_the_attention_gets_what_the_model_asked_for():
    asked = {"causal": True, "scale": 0.3, "dropout": 0.25}
    prefix = Prefix(lambda q, k, v, **options: (k.shape, v.shape, options), torch.zeros(2, 2, 3, 4))
    keys, values, given = prefix(*(torch.zeros(1, 2, 5, 4) for _ in range(3)), **asked)
    assert keys == values == (1, 2, 8, 4) and given == {**asked, "mask": None}


def test_half_precision():
    model = gpt().to(torch.bfloat16)
    add_prefix(model, 4, WORDS)
    assert all(p.dtype == torch.float32 for p in prefix_parameters(model))
    assert run(model).dtype == torch.bfloat16 and run(model).isfinite().all()
    model.loss(IDS)[0].backward()
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cast to half precision after add_prefix"):
        prefix_parameters(model)


def test_the_fused_attention_sees_the_prefix():
    torch.manual_seed(0)
    plain = gpt()
    fused = GPT(plain.config, attention=attention)
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        add_prefix(model, 4, WORDS, reparameterise=False)
        stir(model)
    close(run(fused), run(plain))


@pytest.mark.parametrize("form", FORMS)
def test_compiled_before_or_after(form):
    model = gpt().eval()
    compiled = torch.compile(model, backend="aot_eager")
    base = run(model)
    close(run(compiled), base)
    add_prefix(compiled, 4, WORDS, **FORMS[form])
    stir(compiled)
    close(run(compiled), run(model))
    assert (run(compiled) - base).abs().max() > 1e-3
    compiled.loss(IDS)[0].backward()
    assert all(p.grad is not None for p in prefix_parameters(compiled))
    assert not any("_orig_mod" in name for name in model.prefix_before[0])
    remove_prefix(compiled)
    close(run(compiled), base)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"length": 0}, r"length=0 does not fit; wanted a whole number from 1, below the context, 32"),
    ({"length": 32}, r"length=32 does not fit"), ({"length": 2.0}, r"length=2.0 does not fit"),
    ({"hidden": 0}, r"hidden=0 is out of range"), ({"words": []}, r"words=\[\] are no tokens"),
    ({"words": [48]}, r"words=\[48\] are no tokens; wanted one or more ids of 0 to 47"),
    ({"words": [0.5]}, "are no tokens"), ({"words": [[1]]}, "are no tokens"), ({"words": [-1]}, "are no tokens"),
])  # fmt: skip
def test_bad_settings_change_nothing(settings, message):
    model = gpt()
    before, base = run(model), bits(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_prefix(model, **settings)
    assert torch.equal(run(model), before) and same_bits(bits(model.state_dict()), base)
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_have_one():
    with pytest.raises(ValueError, match="model=Linear keeps no attention function"):
        add_prefix(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model=GPT2LMHeadModel keeps no attention function"):
        add_prefix(theirs("gpt2"))
    for verb in (prefix_parameters, remove_prefix, lambda model: save_prefix(model, "never")):
        with pytest.raises(ValueError, match="model=GPT has no prefix; wanted the module that add_prefix was given"):
            verb(gpt())


DAMAGES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-9]), "adapter_model.safetensors cannot be read"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "adapter_config.json cannot be read"),
    "LoRA": (lambda f: change(f, peft_type="LORA"), "peft_type='LORA' is not supported; wanted 'PREFIX_TUNING'"),
    "no type": (lambda f: change(f, peft_type=None), "peft_type=None is not supported; wanted 'PREFIX_TUNING'"),
    "two": (lambda f: change(f, num_transformer_submodules=2), "submodules=2 is not supported; wanted 1"),
    "unknown": (lambda f: change(f, gate=True), "option gate=True is not supported; wanted it off"),
    "length": (lambda f: change(f, num_virtual_tokens=3), r"prompt_embeddings is .*\(4, 64\); wanted \(3, 64\)"),
    "heads": (lambda f: change(f, num_attention_heads=4), "num_attention_heads=4; wanted 2 for this model"),
    "no length": (lambda f: change(f, num_virtual_tokens=None), "length=None does not fit"),
    "integers": (lambda f: safetensors.torch.save_file(
        {"prompt_embeddings": torch.zeros(4, 64, dtype=torch.int32)}, f / "adapter_model.safetensors"), "torch.int32"),
    "another name": (lambda f: safetensors.torch.save_file(
        {"prompt": torch.zeros(4, 64)}, f / "adapter_model.safetensors"), "prompt is .*; wanted no such tensor"),
}  # fmt: skip


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_change_nothing(damage, tmp_path):
    model = gpt()
    add_prefix(model, 4, WORDS)
    save_prefix(model, tmp_path)
    act, message = DAMAGES[damage]
    act(tmp_path)
    bare = gpt()
    before = run(bare), bits(bare.state_dict()), set(vars(bare))
    with pytest.raises(ValueError, match=message) as error:
        load_prefix(bare, tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(run(bare), before[0]) and same_bits(bits(bare.state_dict()), before[1])
    assert set(vars(bare)) == before[2]


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="is a pickle and is never opened; wanted adapter_model.safetensors"):
        load_prefix(gpt(), tmp_path)


@pytest.mark.parametrize(("make", "shapes"), [
    (lambda: gpt(n_layer=3), r"torch.float32 \(4, 128\); wanted \(4, 192\)|\(4, 64\); wanted \(4, 96\)"),
    (lambda: gpt(n_embd=32), r"prompt_embeddings is torch.float32 \(4, 64\); wanted \(4, 128\)"),
    (lambda: gpt(n_positions=4), "length=4 does not fit"),
    (transformer, r"prompt_embeddings is torch.float32 \(4, 64\); wanted \(4, 192\)"),
])  # fmt: skip
def test_made_for_another_base(make, shapes, tmp_path):
    model = gpt()
    add_prefix(model, 4, WORDS)
    save_prefix(model, tmp_path)
    with pytest.raises(ValueError, match=shapes):
        load_prefix(make(), tmp_path)


def test_of_an_encoder_decoder_into_another(tmp_path):
    model = transformer()
    add_prefix(model, 4, WORDS)
    save_prefix(model, tmp_path)
    six = gpt(n_layer=6)  # as many attentions, of the same shapes
    with pytest.raises(ValueError, match="made for the attentions .*encoder.0.self_attn.*; wanted .*transformer.h.0"):
        load_prefix(six, tmp_path)


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    model = gpt()
    add_prefix(model, 4, WORDS)
    save_prefix(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    stir(model)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_prefix(model, tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
