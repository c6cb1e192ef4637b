# SPDX-License-Identifier: MIT
"""Prompt tuning: PEFT is the oracle for values, training and files; words before the text for the start."""

import copy
import json

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import safetensors.torch
import test_prefix
import torch
import torch.nn.functional as F
import transformers
from test_prefix import (
    HF,
    IDS,
    KINDS,
    MODELS,
    OURS,
    WORDS,
    bert,
    bits,
    close,
    files,
    gpt,
    run,
    same_bits,
    stir,
    theirs,
    transformer,
)
from torch import nn

from minimal.bert import BERT
from minimal.checkpoint import load_checkpoint, save_checkpoint
from minimal.prompt import add_prompt, load_prompt, prompt_parameters, remove_prompt, save_prompt
from minimal.transformer import greedy

_quiet, folders = test_prefix._quiet, test_prefix.folders  # fixtures


# ---- PEFT as the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_saved_here_computes_the_same_in_peft(kind, folders, tmp_path):
    model = OURS[kind].from_pretrained(folders[kind])
    base = run(model)
    add_prompt(model, 5, WORDS)
    save_prompt(stir(model), tmp_path)
    oracle = peft.PeftModel.from_pretrained(HF[kind].from_pretrained(folders[kind]), tmp_path).eval()
    with torch.no_grad():
        expected = oracle(IDS).logits[:, 5:]  # PEFT gives the prompt's too
    assert (run(model) - base).abs().max() > 0.1  # the prompt does something
    close(run(model), expected)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_saved_by_peft_computes_the_same_here(kind, folders, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    oracle = peft.get_peft_model(HF[kind].from_pretrained(folders[kind]), config).eval()
    oracle.save_pretrained(tmp_path)
    model = OURS[kind].from_pretrained(folders[kind])
    base = run(model)
    load_prompt(model, tmp_path)
    with torch.no_grad():
        close(run(model), oracle(IDS).logits[:, 4:])
    assert (run(model) - base).abs().max() > 1e-2
    filled = OURS[kind].from_pretrained(folders[kind])
    add_prompt(filled, 4)
    load_prompt(filled, tmp_path)
    assert torch.equal(run(filled), run(model))
    save_prompt(model, tmp_path / "again")
    (ours, settings), (theirs, wanted) = files(tmp_path / "again"), files(tmp_path)
    assert same_bits(bits(ours), bits(theirs))
    for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "peft_type", "task_type"):
        assert settings[key] == wanted[key], key


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_peft(kind, folders, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    oracle = peft.get_peft_model(HF[kind].from_pretrained(folders[kind]), config)
    oracle.save_pretrained(tmp_path)
    model = OURS[kind].from_pretrained(folders[kind])
    load_prompt(model, tmp_path)

    def curve(parameters, loss):
        optimizer, losses = torch.optim.AdamW(parameters, lr=3e-2), []
        for _ in range(6):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return torch.tensor(losses)

    ours = curve(prompt_parameters(model), lambda: model.loss(IDS)[0] / 12)

    def oracle_loss():  # PEFT's own also counts the first token, said by the prompt's last place
        return F.cross_entropy(oracle(IDS).logits[:, 4:-1].flatten(0, 1), IDS[:, 1:].flatten())

    wanted = curve([p for p in oracle.parameters() if p.requires_grad], oracle_loss)
    assert ours[-1] < ours[0] - 0.05
    torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=0)


def test_bert_with_a_prompt_is_transformers_bert_on_its_embeddings(tmp_path):
    """All but the pooled vector: ours is that of [CLS] behind the prompt, PEFT's that of the prompt's first."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32)  # fmt: skip
    oracle = transformers.BertModel(config).eval()
    oracle.save_pretrained(tmp_path)
    model = BERT.from_pretrained(tmp_path, task="classify", labels=("a", "b"))
    add_prompt(model, 3, WORDS)
    stir(model)
    mask, segments = torch.ones(2, 7, dtype=torch.bool), (torch.arange(14).reshape(2, 7) % 7 > 3).long()
    mask[1, 4:] = False
    wide = torch.cat((model.prompt.P_e.expand(2, -1, -1), oracle.embeddings.word_embeddings(IDS)), dim=1)
    with torch.no_grad():
        for m, s in ((None, None), (mask, segments)):
            given = {} if m is None else {
                "attention_mask": F.pad(mask, (3, 0), value=True).long(), "token_type_ids": F.pad(segments, (3, 0))
            }  # fmt: skip
            expected = oracle(inputs_embeds=wide, **given).last_hidden_state[:, 3:]
            real = torch.ones_like(mask) if m is None else mask
            close(model.hidden(IDS, s, m)[real], expected[real])
            close(model.hidden(IDS, mask=m, segments=s)[real], expected[real])
        assert model(IDS).shape == (2, 2)


def test_files_of_bert_are_those_of_peft(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3)  # fmt: skip
    settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    oracle = peft.get_peft_model(transformers.BertForSequenceClassification(config), settings)
    oracle.save_pretrained(tmp_path / "peft")
    model = bert()
    load_prompt(model, tmp_path / "peft")
    assert model.classifier.weight.requires_grad and not model.bert.pooler.dense.weight.requires_grad
    save_prompt(model, tmp_path / "ours")
    (ours, mine), (wanted, _) = files(tmp_path / "ours"), files(tmp_path / "peft")
    assert same_bits(bits(ours), bits(wanted)) and mine["modules_to_save"] == ["classifier"]
    save_prompt(stir(model), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(transformers.BertForSequenceClassification(config), tmp_path / "ours")
    close(again.prompt_encoder.default.embedding.weight, model.prompt.P_e, 0)
    close(again.base_model.classifier.modules_to_save.default.weight, model.classifier.weight, 0)


# ---- the start ----------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=15)
@hypothesis.given(words=st.lists(st.integers(0, 47), min_size=1, max_size=6), length=st.integers(1, 6))
@pytest.mark.parametrize("make", MODELS)
def test_at_the_start_the_words_stand_before_the_text(make, words, length):
    model = MODELS[make]()
    read = torch.tensor((words * length)[:length]).expand(2, -1)
    if make == "transformer":
        expected = model.encode(torch.cat((read, IDS), dim=1))[:, length:]
        assert add_prompt(model, length, words) == (length, 16)
        close(model.encode(IDS), expected, 1e-6)
    else:
        expected = model.hidden(torch.cat((read, IDS), dim=1))[:, length:]
        assert add_prompt(model, length, torch.tensor(words)) == (length, 16)
        close(model.hidden(IDS), expected, 1e-6)


def test_without_words_the_prompt_is_rows_of_the_vocabulary():
    model = gpt()
    add_prompt(model, 9)
    table = model.transformer.wte.weight
    found = (model.prompt.P_e[:, None] == table).all(-1)  # (9, V)
    assert found.any(1).all() and len(set(found.long().argmax(1).tolist())) > 3
    assert model.prompt.P_e.data_ptr() != table.data_ptr()


# ---- caches, documents, masks, ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=10)
@hypothesis.given(cuts=st.sets(st.integers(1, 6)))
def test_with_a_cache_and_without(kind, folders, cuts):
    model = OURS[kind].from_pretrained(folders[kind])
    add_prompt(model, 5, WORDS)
    stir(model)
    edges, cache = [0, *sorted(cuts), 7], []
    with torch.no_grad():
        pieces = [model(IDS[:, a:b], cache) for a, b in zip(edges, edges[1:], strict=False)]
    close(torch.cat(pieces, dim=1), run(model))
    assert [tuple(t.shape[2] for t in kv) for kv in cache] == [(12, 12)] * 2  # the prompt is in it, once


def test_documents_have_no_place_for_it():
    model = gpt()
    add_prompt(model, 3)
    documents = torch.zeros_like(IDS)
    for call in (lambda: model(IDS, documents=documents), lambda: model.loss(IDS, documents=documents)):
        with pytest.raises(ValueError, match="documents beside a prompt"):
            call()


def test_padding_does_not_reach_the_text_of_bert():
    model = bert()
    add_prompt(model, 4, WORDS)
    stir(model)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        close(model.hidden(IDS, mask=mask)[1, :4], model.hidden(IDS[1:, :4])[0])
        with pytest.raises(ValueError, match="mask of shape"):
            model.hidden(IDS, mask=mask[:, :4])


def test_an_encoder_decoder_has_it_before_the_source(tmp_path):
    model, source = transformer(), IDS[:, :5]
    base, mask = run(model), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    add_prompt(model, 4, WORDS)
    stir(model)
    assert model.encode(source).shape == (2, 5, 16) and (run(model) - base).abs().max() > 0.1
    memory, cache = model.encode(source, mask), []
    whole = model.decode(IDS, memory, mask)
    close(torch.cat([model.decode(IDS[:, t : t + 1], memory, mask, cache) for t in range(7)], dim=1), whole)
    close(model.decode(IDS[1:], model.encode(source[1:, :3]))[0], whole[1])
    assert len(greedy(model, source, 6, mask)) == 2
    save_prompt(model, tmp_path)
    again = transformer()
    load_prompt(again, tmp_path)
    close(run(again), run(model), 0)


@pytest.mark.parametrize("ids", [[[-1, 2]], [[-100, 2]], [[48, 2]]])
def test_wrong_ids_stay_errors(ids):
    """None may be taken for one that stands for the prompt."""
    model = gpt()
    add_prompt(model, 4)
    with pytest.raises(IndexError):
        model(torch.tensor(ids))
    with pytest.raises(ValueError, match="wanted token ids"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="wanted token ids"):
        model(torch.zeros(1, 3))


def test_the_context_is_shorter_by_the_prompt():
    model = gpt()
    add_prompt(model, 20)
    model(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_positions = 32"):
        model(torch.zeros(1, 13, dtype=torch.int64))


# ---- training, saving, removing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_training_lowers_the_loss_and_leaves_the_base(make):
    model = MODELS[make]()
    batch = {
        "gpt": dict(ids=IDS), "bert": dict(ids=IDS, labels=torch.tensor([1, 2])),
        "transformer": dict(source=IDS, target=IDS),
    }[make]  # fmt: skip
    base = bits(model.state_dict())
    add_prompt(model, 4, WORDS)
    parameters = prompt_parameters(model)
    assert [id(p) for p in parameters] == [id(model.prompt.P_e)]
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.1), []
    model.train()
    for _ in range(40):
        total, count = model.loss(**batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    assert losses[-1] < 0.93 * losses[0], losses
    assert model.prompt.P_e.grad.abs().sum(1).min() > 0  # of each vector
    remove_prompt(model)
    assert same_bits(bits(model.state_dict()), base)


def test_a_fresh_head_trains_and_is_saved(tmp_path):
    model = bert()
    add_prompt(model, 4, WORDS)
    model.classifier.requires_grad_(True)
    save_prompt(stir(model), tmp_path)
    again = bert()
    nn.init.zeros_(again.classifier.weight)
    load_prompt(again, tmp_path)
    assert torch.equal(again.classifier.weight, model.classifier.weight) and again.classifier.weight.requires_grad
    assert torch.equal(run(again), run(model))
    bare = bert()
    add_prompt(bare, 4, WORDS)
    save_prompt(bare, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"classifier\.bias is not there"):
        load_prompt(again, tmp_path / "bare")


@pytest.mark.parametrize("make", MODELS)
def test_remove_restores_everything(make):
    model = MODELS[make]()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before, kept, state = run(model), bits(model.state_dict()), set(vars(model))
    add_prompt(model, 4, WORDS)
    stir(model)
    assert not torch.equal(run(model), before)
    with pytest.raises(ValueError, match="already has a prompt; wanted remove_prompt first"):
        add_prompt(model, 4)
    remove_prompt(model)
    assert torch.equal(run(model), before) and same_bits(bits(model.state_dict()), kept)
    assert set(vars(model)) == state and not any("forward" in vars(m) for m in model.modules())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    with pytest.raises(ValueError, match="has no prompt"):
        remove_prompt(model)


def test_a_copy_is_independent():
    model = gpt()
    add_prompt(model, 4, WORDS)
    twin, before = copy.deepcopy(model), run(model)
    assert torch.equal(run(twin), before)
    stir(twin)
    assert torch.equal(run(model), before) and not torch.equal(run(twin), before)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    assert not torch.equal(run(model), before)
    remove_prompt(twin)
    close(run(twin), run(gpt()), 0)


def test_a_checkpoint_resumes(tmp_path):
    models = []
    for seed in (1, 2):
        model = gpt()
        torch.manual_seed(seed)
        add_prompt(model, 4)
        models.append((model, torch.optim.AdamW(prompt_parameters(model))))
    save_checkpoint(tmp_path / "state", *models[0], {"step": 3})
    assert not torch.equal(run(models[0][0]), run(models[1][0]))
    assert load_checkpoint(tmp_path / "state", *models[1]) == {"step": 3}
    assert torch.equal(run(models[0][0]), run(models[1][0]))


def test_dropout_is_off_in_evaluation():
    """Trap 7."""
    model = gpt(dropout=0.3)
    add_prompt(model, 4, WORDS)
    model.eval()
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


def test_half_precision():
    model = gpt().to(torch.bfloat16)
    add_prompt(model, 4, WORDS)
    assert model.prompt.P_e.dtype == torch.float32
    assert run(model).dtype == torch.bfloat16 and run(model).isfinite().all()
    model.loss(IDS)[0].backward()
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cast to half precision after add_prompt"):
        prompt_parameters(model)


def test_compiled_before_or_after():
    model = gpt().eval()
    compiled = torch.compile(model, backend="aot_eager")
    base = run(model)
    close(run(compiled), base)
    add_prompt(compiled, 4, WORDS)
    stir(compiled)
    close(run(compiled), run(model))
    assert (run(compiled) - base).abs().max() > 1e-3
    compiled.loss(IDS)[0].backward()
    assert model.prompt.P_e.grad is not None
    remove_prompt(compiled)
    close(run(compiled), base)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"length": 0}, r"length=0 does not fit; wanted a whole number from 1, below the context, 32"),
    ({"length": 32}, r"length=32 does not fit"), ({"words": []}, r"words=\[\] are no tokens"),
    ({"words": [48]}, r"words=\[48\] are no tokens; wanted one or more ids of 0 to 47"),
    ({"words": [0.5]}, "are no tokens"), ({"words": [[1]]}, "are no tokens"), ({"words": [-1]}, "are no tokens"),
])  # fmt: skip
def test_bad_settings_change_nothing(settings, message):
    model = gpt()
    before, base = run(model), bits(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_prompt(model, **settings)
    assert torch.equal(run(model), before) and same_bits(bits(model.state_dict()), base)
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_have_one():
    for model in (nn.Linear(2, 2), theirs("gpt2")):
        with pytest.raises(ValueError, match=f"model={type(model).__name__} has no method hidden or encode"):
            add_prompt(model)
    for verb in (prompt_parameters, remove_prompt, lambda model: save_prompt(model, "never")):
        with pytest.raises(ValueError, match="model=GPT has no prompt; wanted the module that add_prompt was given"):
            verb(gpt())


DAMAGES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-9]), "adapter_model.safetensors cannot be read"),
    "a prefix": (lambda f: change(f, peft_type="PREFIX_TUNING"), "is not supported; wanted 'PROMPT_TUNING'"),
    "two": (lambda f: change(f, num_transformer_submodules=2), "submodules=2 is not supported; wanted 1"),
    "unknown": (lambda f: change(f, gate=True), "option gate=True is not supported; wanted it off"),
    "length": (lambda f: change(f, num_virtual_tokens=3), r"prompt_embeddings is .*\(4, 16\); wanted \(3, 16\)"),
    "no length": (lambda f: change(f, num_virtual_tokens=None), "length=None does not fit"),
    "integers": (lambda f: safetensors.torch.save_file(
        {"prompt_embeddings": torch.zeros(4, 16, dtype=torch.int32)}, f / "adapter_model.safetensors"), "torch.int32"),
}  # fmt: skip


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_change_nothing(damage, tmp_path):
    model = gpt()
    add_prompt(model, 4, WORDS)
    save_prompt(model, tmp_path)
    act, message = DAMAGES[damage]
    act(tmp_path)
    bare = gpt()
    before = run(bare), bits(bare.state_dict()), set(vars(bare))
    with pytest.raises(ValueError, match=message) as error:
        load_prompt(bare, tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(run(bare), before[0]) and same_bits(bits(bare.state_dict()), before[1])
    assert set(vars(bare)) == before[2]


def test_made_for_another_base(tmp_path):
    model = gpt()
    add_prompt(model, 4, WORDS)
    save_prompt(model, tmp_path)
    with pytest.raises(ValueError, match=r"prompt_embeddings is torch.float32 \(4, 16\); wanted \(4, 32\)"):
        load_prompt(gpt(n_embd=32), tmp_path)
