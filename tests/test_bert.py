# SPDX-License-Identifier: MIT
"""BERT against that of transformers, in all four tasks and both directions, and traps, each one written out."""

import copy
import json
import math
import pathlib
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minimal import bert
from minimal.bert import BERT, BERTConfig, torch_attention
from minimal.lora import add_lora, lora_parameters, merge_lora, remove_lora

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
    type_vocab_size=2,
)
NAMES = {"classify": ("bad", "fair", "good"), "tag": ("O", "B", "I", "E"), "pretrain": (), "qa": ()}
CLASSES = {
    "pretrain": transformers.BertForPreTraining,
    "classify": transformers.BertForSequenceClassification,
    "tag": transformers.BertForTokenClassification,
    "qa": transformers.BertForQuestionAnswering,
}
TASKS = pytest.mark.parametrize("task", CLASSES)


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


def tiny(task="pretrain", attention=torch_attention, **changes):
    config = BERTConfig(**{**SIZES, "dropout": 0.0, "task": task, "labels": NAMES[task], **changes})
    return perturb(BERT(config, attention))


def hf_config(task="pretrain", **changes):
    names = {"id2label": dict(enumerate(NAMES[task]))} if NAMES[task] else {}
    return transformers.BertConfig(**{**SIZES, **names, **changes})


def theirs(task="pretrain", **changes):
    return perturb(CLASSES[task](hf_config(task, **changes)))


def batch(task, B=3, T=12, seed=1, vocab=61, padded=True, masked=3):
    """A batch of the task: rows of unequal length, both segments, and `masked` masked tokens in each row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (B, T), generator=g)
    lengths = torch.randint(masked, T + 1, (B,), generator=g) if padded else torch.full((B,), T)
    lengths[0] = T
    mask = torch.arange(T) < lengths[:, None]
    segments = (torch.arange(T) >= lengths[:, None] // 2).long() * mask
    ids = ids * mask
    out = {"ids": ids, "segments": segments, "mask": mask}
    if task == "pretrain":
        places = torch.rand((B, T), generator=g).masked_fill(~mask, 2).argsort(1)[:, :masked]
        chosen = torch.zeros(B, T).scatter(1, places, 1.0).bool()
        out |= {"labels": ids.masked_fill(~chosen, -100), "next": torch.randint(2, (B,), generator=g)}
    elif task == "classify":
        out["labels"] = torch.randint(len(NAMES[task]), (B,), generator=g)
    elif task == "tag":
        out["labels"] = torch.randint(len(NAMES[task]), (B, T), generator=g).masked_fill(~mask, -100)
        out["labels"][:, 0] = -100
    else:
        out["starts"] = (torch.rand(B, generator=g) * lengths).long()
        out["ends"] = (torch.rand(B, generator=g) * lengths).long()
    return out


def their_forward(model, ids, segments, mask, labels=None, next=None, starts=None, ends=None):
    extra = {"labels": labels, "next_sentence_label": next, "start_positions": starts, "end_positions": ends}
    extra = {name: t for name, t in extra.items() if t is not None}
    out = model(input_ids=ids, token_type_ids=segments, attention_mask=mask.long(), **extra)
    if "prediction_logits" in out:
        return out.prediction_logits, out.loss
    return (torch.stack((out.start_logits, out.end_logits), -1) if "start_logits" in out else out.logits), out.loss


def check_same(ours, reference, bound=1e-5):
    """Logits and the mean loss of a batch without padding (transformers lets padding be an answer), and of one with."""
    task = ours.config.task
    ours = copy.deepcopy(ours)
    ours.config.next_weight = 3.0  # exactly as many tokens as are masked in each row
    for padded in (False, True):
        b = batch(task, padded=padded)
        with torch.no_grad():
            logits, want = ours(b["ids"], b["segments"], b["mask"]), their_forward(reference, **b)
            total, count = ours.loss(**b)
        real = b["mask"] if logits.dim() == 3 else ...
        assert (logits - want[0])[real].abs().max() < bound * want[0].abs().max().clamp_min(1)
        if not (padded and task == "qa"):
            assert abs(total / count - want[1]) < bound
        if task == "pretrain":
            theirs = reference(b["ids"], b["mask"].long(), b["segments"]).seq_relationship_logits
            assert (ours.next_logits(b["ids"], b["segments"], b["mask"]) - theirs).abs().max() < bound


# ---- Hugging Face's models and folders ----


@TASKS
def test_opens_a_folder_written_by_transformers(task, tmp_path):
    reference = theirs(task)
    reference.save_pretrained(tmp_path)
    model = BERT.from_pretrained(tmp_path)
    assert model.config == BERTConfig(**SIZES, task=task, labels=NAMES[task]) and not model.training
    assert model.fresh == () and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    check_same(model, reference)


@TASKS
def test_transformers_opens_our_folder(task, tmp_path):
    model = tiny(task, dropout=0.2, pad_token_id=5)
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    reference, report = CLASSES[task].from_pretrained(folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert reference.config.architectures == [CLASSES[task].__name__] and reference.config.pad_token_id == 5
    assert reference.config.hidden_dropout_prob == reference.config.attention_probs_dropout_prob == 0.2
    if NAMES[task]:
        assert tuple(reference.config.id2label.values()) == NAMES[task]
        assert reference.config.label2id == {name: i for i, name in enumerate(NAMES[task])}
    check_same(model, reference.eval())


@TASKS
def test_names_and_shapes_are_those_of_transformers(task):
    model, reference = tiny(task), theirs(task)
    ours, want = ({n: t.shape for n, t in m.state_dict().items()} for m in (model, reference))
    assert ours == want
    assert set(dict(model.named_modules())) <= set(dict(reference.named_modules()))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in reference.named_parameters()}
    reference.load_state_dict(model.state_dict(), strict=True)
    check_same(model, reference)


@TASKS
def test_gradients_are_those_of_transformers(task):
    model, reference = tiny(task, next_weight=3.0), theirs(task)
    reference.load_state_dict(model.state_dict())
    b = batch(task, padded=task != "qa")
    total, count = model.loss(**b)
    (total / count).backward()
    their_forward(reference, **b)[1].backward()
    want = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        # padding_idx: transformers gives the padding's row nothing from the input; here it is masked, so it has nothing
        assert (p.grad - want[name].grad).norm() < 1e-4 * want[name].grad.norm().clamp_min(0.1), name


def test_round_trip_keeps_every_bit_and_tied_tensors_once(tmp_path):
    model = tiny(next_weight=7.5)
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "cls.predictions.bias" in stored and not any("decoder" in name for name in stored)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    again = BERT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForMaskedLM])
def test_files_with_less_than_two_heads(kind, tmp_path):
    reference = perturb(kind(hf_config()))
    reference.save_pretrained(tmp_path)
    model = BERT.from_pretrained(tmp_path)
    assert model.config.task == "pretrain"
    head = {n for n, _ in model.named_parameters() if n.startswith("cls.")}
    nsp = {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    b = batch("pretrain")
    with torch.no_grad():
        want = reference(b["ids"], b["mask"].long(), b["segments"])
    if kind is transformers.BertModel:
        assert set(model.fresh) == head
        x = model.hidden(b["ids"], b["segments"], b["mask"])
        assert (x - want.last_hidden_state)[b["mask"]].abs().max() < 1e-5
        assert (model._pool(x) - want.pooler_output).abs().max() < 1e-5
    else:
        assert set(model.fresh) == nsp | pooler
        assert (model(b["ids"], b["segments"], b["mask"]) - want.logits)[b["mask"]].abs().max() < 1e-5


@TASKS
@pytest.mark.parametrize("source", CLASSES)
def test_another_task_takes_the_body_and_starts_its_head_fresh(task, source, tmp_path):
    reference = theirs(source)
    reference.save_pretrained(tmp_path)
    names = ("x", "y") if NAMES[task] else None
    torch.manual_seed(3)
    model, given_ = BERT.from_pretrained(tmp_path, task, names), reference.state_dict()
    fresh = {n for n, _ in model.named_parameters() if n.startswith(("cls.", "classifier.", "qa_outputs."))}
    fresh = set() if task == source and not names else fresh
    fresh |= {n for n, _ in model.named_parameters() if n.startswith("bert.pooler") and n not in given_}
    assert set(model.fresh) == fresh and model.config.task == task and model.config.labels == (names or ())
    for name, p in model.named_parameters():
        if name not in fresh:
            assert torch.equal(p, given_[name]), name
        elif p.dim() == 2:
            assert 0.005 < p.std() < 0.035 and abs(p.mean()) < 0.01, name
        else:
            assert (p == float(name.endswith("LayerNorm.weight"))).all(), name
    model(batch(task)["ids"])


def test_labels_of_the_same_task(tmp_path):
    theirs("classify").save_pretrained(tmp_path)
    head = ("classifier.weight", "classifier.bias")
    assert BERT.from_pretrained(tmp_path, "classify", NAMES["classify"]).fresh == ()
    assert BERT.from_pretrained(tmp_path, labels=list(NAMES["classify"])).fresh == ()
    assert BERT.from_pretrained(tmp_path, labels=NAMES["classify"][::-1]).fresh == head  # other meanings of its logits
    assert BERT.from_pretrained(tmp_path, labels=("a", "b", "c")).fresh == head
    assert BERT.from_pretrained(tmp_path, labels=("a", "b")).fresh == head
    assert BERT.from_pretrained(tmp_path, "tag", NAMES["classify"]).fresh == head, "a head of texts, for tokens"
    refused(tmp_path, r"labels = \(\): wanted distinct names", task="tag")


def test_labels_that_transformers_does_not_write(tmp_path):
    reference = perturb(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)))
    reference.save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    model = BERT.from_pretrained(tmp_path)
    assert model.config.labels == ("LABEL_0", "LABEL_1") and model.fresh == ()


def test_a_new_model_is_fresh_all_over():
    model = tiny("qa")
    assert model.fresh == tuple(n for n, _ in model.named_parameters())


def test_old_names_of_norms(tmp_path):
    """Trap: files converted from TensorFlow call a norm's weight and bias gamma and beta; if skipped, 1 and 0."""
    reference = theirs()
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in stored.items()}
    assert len(old.keys() - stored.keys()) == 2 * (1 + 2 * SIZES["num_hidden_layers"] + 1)
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    safetensors.torch.save_file(old, path, {"format": "pt"})
    model = BERT.from_pretrained(tmp_path)
    assert model.fresh == ()
    check_same(model, reference)
    skipped = copy.deepcopy(model)
    for module in skipped.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    with pytest.raises(AssertionError):
        check_same(skipped, reference)
    old = {n.removeprefix("bert."): t for n, t in old.items() if n.startswith("bert.")}  # a bare body
    safetensors.torch.save_file(old, path, {"format": "pt"})
    body = BERT.from_pretrained(tmp_path, "qa")
    assert set(body.fresh) == {"qa_outputs.weight", "qa_outputs.bias"}
    for name, p in body.bert.named_parameters():
        assert torch.equal(p, model.bert.get_parameter(name)), name


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path):
    model = tiny("tag").bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    for a, b in zip(model.parameters(), BERT.from_pretrained(tmp_path).parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)
    tiny("pretrain").bfloat16().save_pretrained(tmp_path)
    assert not BERT.from_pretrained(tmp_path, "tag", NAMES["tag"]).training  # a pooler in half precision is passed over


def test_loaded_weights_do_not_live_in_the_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = BERT.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- Folders that are wrong ----


@pytest.fixture
def folder(tmp_path):
    tiny("classify").save_pretrained(tmp_path)
    return tmp_path


def refused(folder, pattern, **arguments):
    with pytest.raises(ValueError, match=pattern) as caught:
        BERT.from_pretrained(folder, **arguments)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def edit_config(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model_type": "roberta"}, "model_type = 'roberta', wanted 'bert'"),
        ({"model_type": None}, "model_type = None, wanted 'bert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new', wanted 'gelu'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu', wanted 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key', wanted 'absolute'"),
        ({"is_decoder": True}, "is_decoder = True, wanted False"),
        ({"add_cross_attention": True}, "add_cross_attention = True, wanted False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False, wanted True"),
        ({"problem_type": "regression"}, "problem_type = 'regression', wanted None"),
        ({"problem_type": "multi_label_classification"}, "problem_type = 'multi_label_classification', wanted None"),
        ({"architectures": ["BertForMultipleChoice"]}, "task = None: wanted one of pretrain, classify, tag, qa"),
        ({"architectures": None}, "task = None: wanted one of"),
        ({"num_attention_heads": 5}, "hidden_size = 32: wanted a multiple of num_attention_heads = 5"),
        ({"hidden_size": "32"}, "hidden_size = '32': wanted a whole number"),
        ({"vocab_size": None}, "vocab_size = None: wanted a whole number"),
        ({"hidden_dropout_prob": 2}, "dropout = 2: wanted"),
        ({"id2label": {"0": "a", "2": "b"}}, r"labels = \('a', None\): wanted distinct names"),
        ({"id2label": {"0": "a", "1": "a"}}, r"labels = \('a', 'a'\): wanted distinct names"),
        ({"id2label": ["a"]}, "config.json: "),
        ({"id2label": {"0": "a", "1": "b"}}, "size mismatch for classifier.weight"),
        ({"num_hidden_layers": 1}, "bert.encoder.layer.1.attention.output.LayerNorm.bias, .* missing, unexpected"),
        ({"num_hidden_layers": 3}, "bert.encoder.layer.2.attention.output.LayerNorm.bias, .* missing, unexpected"),
        ({"max_position_embeddings": 25}, "size mismatch for bert.embeddings.position_embeddings.weight"),
    ],
)
def test_wrong_config_is_named(folder, changes, pattern):
    edit_config(folder, changes)
    refused(folder, pattern)


def test_problem_types_that_are_the_same_thing(folder):
    edit_config(folder, {"problem_type": "single_label_classification", "position_embedding_type": None})
    assert BERT.from_pretrained(folder).fresh == ()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"bert"', "\udcff"])
def test_config_that_is_no_object_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json: ")


def test_absent_files_are_named(folder, tmp_path):
    refused(tmp_path / "nowhere", "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "model.safetensors: ")


def edit(folder, change):
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    change(stored)
    safetensors.torch.save_file(stored, folder / "model.safetensors")


def test_wrong_tensors_are_named(folder):
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    edit(folder, lambda s: s.update({name: s[name].t().contiguous()}))
    refused(folder, f"size mismatch for {name}")
    edit(folder, lambda s: s.update({name: s[name].t().contiguous().to(torch.int8)}))
    refused(folder, f"{name} missing, unexpected, untied or no float")
    edit(folder, lambda s: s.pop(name))
    refused(folder, f"{name} missing")
    edit(folder, lambda s: s.update({name: torch.zeros(48, 32), "bert.extra": torch.zeros(2)}))
    refused(folder, "bert.extra missing, unexpected")
    edit(folder, lambda s: (s.pop("bert.extra"), s.pop("bert.embeddings.word_embeddings.weight")))
    refused(folder, "bert.embeddings.word_embeddings.weight missing")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors: ")


class Bomb:
    def __reduce__(self):
        return pathlib.Path.mkdir, (pathlib.Path("unpickled"),)


@pytest.mark.parametrize("dump", [lambda b, p: p.write_bytes(pickle.dumps(b)), lambda b, p: torch.save(b, p)])
def test_a_pickle_is_never_run(folder, dump, monkeypatch):
    monkeypatch.chdir(folder)
    dump(Bomb(), folder / "model.safetensors")
    refused(folder, "model.safetensors: ")
    assert not pathlib.Path("unpickled").exists()


def test_untied_head_is_refused_both_ways(tmp_path):
    for copied, original in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        tiny().save_pretrained(tmp_path)
        edit(tmp_path, lambda s, c=copied, o=original: s.update({c: s[o].clone()}))  # as old files have it: no harm
        assert BERT.from_pretrained(tmp_path).fresh == ()
        edit(tmp_path, lambda s, c=copied: s.update({c: s[c] + 1}))
        refused(tmp_path, f"{original} missing, unexpected, untied")
        model = tiny()
        setattr(model.cls.predictions.decoder, copied.split(".")[-1], nn.Parameter(model.state_dict()[copied] + 1))
        with pytest.raises(ValueError, match=f"the model: {copied} missing or unexpected"):
            model.save_pretrained(tmp_path)


def test_saving_an_adapted_model_is_refused(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = tiny("classify")
    add_lora(model, rank=2, target=["query"])
    with pytest.raises(ValueError, match="the model: bert.encoder.layer.0.attention.self.query.lora.A"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failing_write_leaves_the_old_files(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def no_config(*args, **settings):
        raise OSError("No space left on device")

    monkeypatch.setattr(bert.json, "dumps", no_config)  # the weights are written by then, beside the old ones
    with pytest.raises(OSError, match="No space"):
        tiny("qa").save_pretrained(folder)
    monkeypatch.undo()
    assert before == {name: (folder / name).read_bytes() for name in before}


# ---- The loss ----


@TASKS
def test_outputs_are_what_the_loss_sums(task):
    model, b = tiny(task, next_weight=2.0), batch(task)
    logits, targets, hidden = model.outputs(**b)
    total, count = model.loss(**b)
    whole = model(b["ids"], b["segments"], b["mask"])
    assert hidden.shape == (b["mask"].sum(), 32) and targets.dtype == torch.int64
    assert total.dim() == count.dim() == 0 and count.dtype == torch.int64
    if task == "pretrain":
        assert logits.shape == (9, 61)
        chosen = b["labels"] != -100
        torch.testing.assert_close(logits, whole[chosen])
        assert torch.equal(targets, b["labels"][chosen]) and count == 9
        nsp = F.cross_entropy(model.next_logits(b["ids"], b["segments"], b["mask"]), b["next"], reduction="sum")
        torch.testing.assert_close(total, F.cross_entropy(logits, targets, reduction="sum") + 2.0 * nsp)
        b.pop("next")
        alone = model.loss(**b)[0]
        torch.testing.assert_close(alone, F.cross_entropy(whole[chosen], b["labels"][chosen], reduction="sum"))
    elif task == "qa":
        assert logits.shape == (6, 12) and count == 6
        assert torch.equal(targets, torch.cat((b["starts"], b["ends"])))
        real = b["mask"].repeat(2, 1)
        torch.testing.assert_close(logits[real], torch.cat((whole[..., 0], whole[..., 1]))[real])
        assert (logits.softmax(-1)[~real] == 0).all() and logits.isfinite().all()
        rows = zip(logits, real.sum(1), targets, strict=True)
        torch.testing.assert_close(total, sum(F.cross_entropy(row[None, :n], t[None]) for row, n, t in rows))
    elif task == "tag":
        assert count == (b["labels"] != -100).sum() == len(logits)
        torch.testing.assert_close(total, F.cross_entropy(whole.flatten(0, 1), b["labels"].flatten(), reduction="sum"))
    else:
        torch.testing.assert_close(logits, whole)
        assert count == 3 and torch.equal(targets, b["labels"])
    if task != "qa":
        smooth = model.loss(**{n: t for n, t in b.items() if n != "next"}, label_smoothing=0.1)[0]
        log_p = logits.log_softmax(-1)
        want = -(0.9 * log_p.gather(1, targets[:, None]).sum() + 0.1 * log_p.mean(1).sum())
        torch.testing.assert_close(smooth, want)


def test_hidden_is_the_last_state():
    model, b = tiny("tag"), batch("tag")
    hidden = model.outputs(**b)[2]
    torch.testing.assert_close(model.classifier(hidden), model(b["ids"], b["segments"], b["mask"])[b["mask"]])
    b["mask"] = None
    assert model.outputs(**b)[2].shape == (36, 32)


def gradients(model, batches, accumulate):
    model.zero_grad()
    accumulate(model, batches)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def by_total(model, batches):
    count = sum(model.loss(**b)[1] for b in batches)
    for b in batches:
        (model.loss(**b)[0] / count).backward()


def by_mean_of_means(model, batches):
    for b in batches:
        total, count = model.loss(**b)
        (total / count.clamp_min(1) / len(batches)).backward()


def ratio_of_the_microbatch(model, batches):
    """Next sentences weighted by how many tokens this microbatch masks per pair, not by a constant."""
    config = model.config
    for b in batches:
        config.next_weight = float((b["labels"] != -100).sum() / len(b["ids"]))
        (model.loss(**b)[0] / sum((b["labels"] != -100).sum() for b in batches)).backward()


def cut(b, sizes, trim):
    """The batch in pieces; with trim, each without the columns that are padding in all of its rows."""
    pieces = [dict(zip(b, rows, strict=True)) for rows in zip(*(t.split(sizes) for t in b.values()), strict=True)]
    for piece in pieces:
        T = int(piece["mask"].sum(1).max())
        piece.update({n: t[:, :T] for n, t in piece.items() if t.dim() == 2 and trim})
    return pieces


def uneven(task, B, seed):
    """A batch whose rows count for unequal amounts, some for nothing."""
    b, g = batch(task, B=B, T=10, seed=seed), torch.Generator().manual_seed(seed)
    drop = torch.rand(b["labels"].shape if task != "qa" else (B,), generator=g) < torch.rand((), generator=g)
    name = "starts" if task == "qa" else "labels"
    b[name] = b[name].masked_fill(drop, -100)
    if task == "pretrain" and B > 1:
        b["labels"][1] = -100  # a pair without a masked token
    b[name][0] = torch.tensor([1, *[-100] * 9]) if b[name].dim() == 2 else 1
    return b


@TASKS
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
@settings(max_examples=12)
def test_gradient_is_the_same_for_every_split(task, parts, seed, trim):
    torch.manual_seed(seed)
    model, b = tiny(task, hidden_size=16, num_attention_heads=2).double(), uneven(task, sum(parts), seed)
    whole = gradients(model, [b], by_total)
    assert (gradients(model, cut(b, parts, trim), by_total) - whole).norm() <= 1e-12 * whole.norm()
    assert whole.norm() > 0


def test_traps_of_splitting():
    model, b = tiny().double(), uneven("pretrain", 4, 5)
    b["labels"][2:] = b["ids"][2:].masked_fill(~b["mask"][2:], -100)  # many in these, one in those
    pieces = cut(b, [2, 2], False)

    def check(accumulate):
        model.config.next_weight = 19.2
        whole = gradients(model, [b], accumulate)
        assert (gradients(model, pieces, accumulate) - whole).norm() <= 1e-12 * whole.norm()

    check(by_total)
    for wrong in (by_mean_of_means, ratio_of_the_microbatch):
        with pytest.raises(AssertionError):
            check(wrong)

    qa = tiny("qa").double()
    b = batch("qa", B=4, T=12, seed=2)
    b["mask"][2:] = torch.arange(12) < 7
    b["starts"][2:], b["ends"][2:] = 1, 6

    def padding_answers(model, batches):  # transformers' loss: the softmax is over the padding too
        for b in batches:
            logits = model(b["ids"], b["segments"], b["mask"])
            targets = torch.cat((b["starts"], b["ends"]))
            F.cross_entropy(logits.permute(2, 0, 1).flatten(0, 1), targets, reduction="sum").backward()

    for accumulate, same in ((by_total, True), (padding_answers, False)):
        whole, parts = gradients(qa, [b], accumulate), gradients(qa, cut(b, [2, 2], True), accumulate)
        assert ((parts - whole).norm() <= 1e-12 * whole.norm()) == same


def nothing(task):
    b = batch(task)
    for name in ("labels", "starts", "ends"):
        if name in b:
            b[name] = torch.full_like(b[name], -100)
    return b


@TASKS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nothing_to_count_is_zero_and_not_nan(task, label_smoothing):
    model = tiny(task)
    arguments = {"label_smoothing": label_smoothing} if task != "qa" else {}
    total, count = model.loss(**nothing(task), **arguments)
    total.backward()
    assert total == 0 and count == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    assert model.bert.embeddings.word_embeddings.weight.grad is not None
    b = nothing(task)
    if task == "tag":
        mean = F.cross_entropy(model(b["ids"], b["segments"], b["mask"]).flatten(0, 1), b["labels"].flatten())
        assert mean.isnan(), "what a mean would have given"


def test_next_sentence_labels_the_right_way_round():
    """0 is "follows": trained so, transformers' model says so."""
    model, b = tiny(), batch("pretrain", B=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        total, count = model.loss(**b)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    reference = theirs()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        (_, right), (_, wrong) = (their_forward(reference, **{**b, "next": t}) for t in (b["next"], 1 - b["next"]))
        logits = reference(b["ids"], b["mask"].long(), b["segments"]).seq_relationship_logits
    assert torch.equal(logits.argmax(1), b["next"]) and right < wrong - 1


# ---- The model itself ----


def check_padding(model, task):
    """What stands in the padding, and how much of it there is, changes nothing."""
    b = batch(task, B=4)
    ids, segments, mask = b["ids"], b["segments"], b["mask"]
    assert not mask.all()
    with torch.no_grad():
        want, loss = model(ids, segments, mask), model.loss(**b)[0]
        other = torch.where(mask, ids, torch.randint(61, ids.shape))
        wider = [F.pad(t, (0, 5)) for t in (other, segments, mask)]
        wider[0][:, 12:] = 7
        wide = {**b, **dict(zip(("ids", "segments", "mask"), wider, strict=True))}
        wide |= {"labels": F.pad(b["labels"], (0, 5), value=-100)} if task in ("pretrain", "tag") else {}
        logits = model(*wider)
        logits = logits[:, :12] if logits.dim() == 3 else logits
        real = mask if logits.dim() == 3 else ...
        torch.testing.assert_close(logits[real], want[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.loss(**wide)[0], loss, rtol=1e-5, atol=1e-5)
        for row, n in enumerate(mask.sum(1)):  # alone, and without a mask
            alone = model(ids[row : row + 1, :n], segments[row : row + 1, :n])
            torch.testing.assert_close(alone[0], want[row, :n] if want.dim() == 3 else want[row], rtol=1e-5, atol=1e-5)


def unmasked(q, k, v, *, mask=None, **settings):
    return torch_attention(q, k, v, **settings)


def queries_masked(q, k, v, *, mask=None, **settings):  # the mask on the wrong side: rows of nothing, keys of padding
    return torch_attention(q, k, v, mask=None if mask is None else mask.mT, **settings)


@TASKS
def test_padding_changes_nothing(task):
    check_padding(tiny(task), task)
    for wrong in (unmasked, queries_masked):
        with pytest.raises(AssertionError):
            check_padding(tiny(task, wrong), task)


@TASKS
def test_a_row_of_nothing_but_padding(task):
    """Trap 6: no NaN, forward or backward, and the other rows do not notice."""
    model, b = tiny(task), batch(task)
    alone = {n: t[:2] for n, t in b.items()}
    b["mask"][2] = False
    for name in {"labels", "starts", "ends"} & b.keys():
        b[name][2] = -100
    total, count = model.loss(**b)
    want = model.loss(**alone)
    torch.testing.assert_close(total, want[0])
    assert count == want[1]
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model(b["ids"], b["segments"], b["mask"]).isfinite().all()
    assert all(t.isfinite().all() for t in model.outputs(**b)[::2])


def check_dropout(model, b):
    model.eval()
    a, again = model.loss(**b)[0], model.loss(**b)[0]
    assert torch.equal(a, again), "evaluated twice, two results"
    model.train()
    assert not torch.equal(model.loss(**b)[0], model.loss(**b)[0]), "trained twice, one result"


@TASKS
def test_dropout_in_training_only(task):
    model, b = tiny(task, dropout=0.3), batch(task)
    check_dropout(model, b)
    plain = model.eval().loss(**b)[0]
    model.config.dropout = 0.0
    assert torch.equal(model.train().loss(**b)[0], plain)

    def always(q, k, v, *, dropout=0.0, **settings):  # trap 7
        return torch_attention(q, k, v, dropout=0.3, **settings)

    with pytest.raises(AssertionError, match="evaluated twice"):
        check_dropout(tiny(task, always, dropout=0.3), b)


@TASKS
def test_dropout_is_that_of_transformers(task):
    """The same draws at the same places, so the same numbers from the same seed: before a norm is not after it."""
    model, reference, b = tiny(task, dropout=0.3), theirs(task, hidden_dropout_prob=0.3), batch(task, padded=False)
    reference.config.attention_probs_dropout_prob = 0.3
    for layer in reference.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.3
    reference.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    ours = model.train()(b["ids"], b["segments"], b["mask"])
    torch.manual_seed(5)
    want, _ = their_forward(reference.train(), b["ids"], b["segments"], b["mask"])
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task, places", [("pretrain", 4), ("qa", 4), ("classify", 5), ("tag", 5)])
def test_dropout_is_in_each_place(task, places, monkeypatch):
    """With every other place silenced, the one left still makes two passes differ."""
    seen, real = [], F.dropout
    names = ["embedding", "attention output", "layer output", "classifier"][: places - 1]
    for place in [*names, "attention"]:

        def only(x, p=0.5, training=True, inplace=False, place=place):
            seen.append(p if training else 0.0)
            return real(x, p, training) if names[(len(seen) - 1) % len(names)] == place else x

        def attention(q, k, v, *, dropout=0.0, place=place, **kwargs):
            return torch_attention(q, k, v, dropout=dropout if place == "attention" else 0.0, **kwargs)

        seen.clear()
        monkeypatch.setattr(bert.F, "dropout", only)
        model = tiny(task, attention, num_hidden_layers=1, dropout=0.3).train()
        ids = batch(task)["ids"]
        assert not torch.equal(model(ids), model(ids)), place
        assert set(seen) == {0.3} and len(seen) == 2 * len(names), place


def check_permutation(attention):
    """Without positions a text is a set, so the logits of its tokens move with them."""
    model, ids = tiny("tag", attention), batch("tag")["ids"]
    order = torch.randperm(12)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
        torch.testing.assert_close(model(ids[:, order]), model(ids)[:, order], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids.flip(0)), model(ids).flip(0), rtol=1e-5, atol=1e-5)


def test_both_directions_and_permutation():
    check_permutation(torch_attention)
    with pytest.raises(AssertionError):
        check_permutation(lambda q, k, v, **_: torch_attention(q, k, v, causal=True))
    with pytest.raises(AssertionError):  # trap 7: over batches
        check_permutation(lambda q, k, v, **_: (q @ k.mT / q.size(-1) ** 0.5).softmax(0).cumsum(0) @ v)
    model, ids = tiny(), batch("pretrain", padded=False)["ids"]
    other = ids.clone()
    other[:, 5] = other[:, 5] % 60 + 1
    with torch.no_grad():
        assert ((model(ids) - model(other)).abs().amax(-1) > 1e-4).all(), "a token goes unseen by some"


def test_segments_default_to_zero_and_matter():
    model, b = tiny(), batch("pretrain")
    zeros = torch.zeros_like(b["ids"])
    assert torch.equal(model(b["ids"], None, b["mask"]), model(b["ids"], zeros, b["mask"]))
    assert not torch.allclose(model(b["ids"], b["segments"], b["mask"]), model(b["ids"], zeros, b["mask"]))
    assert torch.equal(model(b["ids"]), model(b["ids"], zeros))


def test_attention_gets_views_and_what_it_needs():
    calls = []

    def spy(q, k, v, **kwargs):
        calls.append((q, k, v, kwargs))
        return torch_attention(q, k, v, **kwargs)

    model, b = tiny("tag", spy, dropout=0.25), batch("tag")
    model(b["ids"], b["segments"], b["mask"])
    for q, k, v, kwargs in calls:
        assert q.shape == k.shape == v.shape == (3, 4, 12, 8) and kwargs.keys() == {"mask", "dropout"}
        assert kwargs["dropout"] == 0.0 and torch.equal(kwargs["mask"], b["mask"][:, None, None])
    model.train()(b["ids"])
    assert len(calls) == 4 and calls[-1][3] == {"mask": None, "dropout": 0.25}


def test_parameters_of_bert_base():
    with torch.device("meta"):
        model = BERT(BERTConfig())
        counted = {n: p.numel() for n, p in model.named_parameters()}
    V, C, P, S, L, W = 30522, 768, 512, 2, 12, 3072
    formula = V * C + P * C + S * C + 2 * C + L * (4 * C * C + 2 * C * W + 9 * C + W) + C * C + C
    assert formula == 109_482_240 == sum(n for name, n in counted.items() if name.startswith("bert."))
    with torch.device("meta"):
        assert formula == sum(p.numel() for p in transformers.BertModel(transformers.BertConfig()).parameters())
    assert math.isclose(BERTConfig().next_weight, 0.15 * 128)


@TASKS
def test_initial_weights_and_loss(task):
    model = BERT(BERTConfig(500, 128, 2, 4, 256, 64, dropout=0.0, task=task, labels=NAMES[task]))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.numel() < 1000 or abs(p.std() / 0.02 - 1) < 0.05 and abs(p.mean()) < 0.002, name
        else:
            assert (p == float(name.endswith("LayerNorm.weight"))).all(), name
    b = batch(task, B=16, vocab=500, padded=False)
    b.pop("next", None)
    total, count = model.loss(**b)
    choices = {"pretrain": 500, "qa": 12}.get(task) or len(NAMES[task])
    assert abs(total / count - math.log(choices)) < 0.15


def test_bfloat16_weights_sum_in_float32():
    model, b = tiny("tag").bfloat16(), batch("tag", B=32)
    total, _ = model.loss(**b)
    logits, targets, _ = model.outputs(**b)
    want = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert total.dtype == torch.float32 and abs(total - want) < 1e-3


@TASKS
def test_bfloat16_autocast(task):
    model, b = tiny(task), batch(task)
    exact = model.loss(**b)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, count = model.loss(**b)
    assert total.dtype == torch.float32 and abs(total / exact - 1) < 0.05
    (total / count).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- Adapters ----


BODY = [
    f"bert.encoder.layer.{i}.{name}"
    for i in range(2)
    for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "intermediate.dense", "output.dense")
]  # fmt: skip


@TASKS
def test_lora_adapts_every_layer_of_the_body(task):
    model, b = tiny(task), batch(task)
    before, state = model.loss(**b)[0], copy.deepcopy(model.state_dict())
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", r".*\d\.output\.dense"]
    assert sorted(add_lora(model, rank=2, target=targets)) == sorted(BODY)
    torch.testing.assert_close(model.loss(**b)[0], before)
    optimizer = torch.optim.Adam(lora_parameters(model), lr=1e-2)
    for _ in range(10):
        total, count = model.loss(**b)
        optimizer.zero_grad()
        (total / count).backward()
        assert all(p.grad is not None for p in lora_parameters(model)), "an adapter that the model does not call"
        optimizer.step()
    tuned = model.loss(**b)[0]
    assert tuned < before - 0.01
    merge_lora(model)
    torch.testing.assert_close(model.loss(**b)[0], tuned, rtol=1e-4, atol=1e-4)
    remove_lora(model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_all_linear_leaves_the_classifier_out(task):
    names = add_lora(tiny(task), rank=2, target="all-linear")
    assert set(names) - {"bert.pooler.dense"} == set(BODY)


def test_all_linear_leaves_the_tied_decoder_out():
    names = add_lora(tiny(), rank=2, target="all-linear")
    assert set(BODY) <= set(names) and "cls.predictions.decoder" not in names


# ---- Wrong arguments ----


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"vocab_size": 0}, "vocab_size = 0: wanted a whole number of at least 1"),
        ({"type_vocab_size": 2.0}, "type_vocab_size = 2.0: wanted a whole number of at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: wanted a whole number of at least 1"),
        ({"hidden_size": 30}, "hidden_size = 30: wanted a multiple of num_attention_heads = 4"),
        ({"dropout": 1.0}, "dropout = 1.0: wanted a number from 0"),
        ({"dropout": float("nan")}, "dropout = nan: wanted a number from 0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps = 0: wanted a number above 0"),
        ({"next_weight": -1}, "next_weight = -1: wanted a finite number"),
        ({"next_weight": math.inf}, "next_weight = inf: wanted a finite number"),
        ({"task": "mlm"}, "task = 'mlm': wanted one of pretrain, classify, tag, qa"),
        ({"task": "classify"}, r"labels = \(\): wanted distinct names for classify and tag, else none"),
        ({"task": "tag", "labels": ("a", "a")}, r"labels = \('a', 'a'\): wanted distinct names"),
        ({"task": "tag", "labels": (1, 2)}, r"labels = \(1, 2\): wanted distinct names"),
        ({"task": "qa", "labels": ("a",)}, r"labels = \('a',\): wanted distinct names for classify and tag, else none"),
    ],
)
def test_config_errors(changes, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        BERTConfig(**{**SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_input_errors():
    model, qa, b = tiny(), tiny("qa"), batch("pretrain")
    ids, mask = b["ids"], b["mask"]
    for call, pattern in (
        (lambda: model(torch.ones(1, 25).long()), "ids: 25 tokens do not fit, max_position_embeddings = 24"),
        (lambda: model(ids[0]), r"ids of shape \(12,\), torch.int64: wanted torch.int64, \(batch, tokens\)"),
        (lambda: model(ids.float()), r"ids of shape \(3, 12\), torch.float32: wanted torch.int64"),
        (lambda: model(ids, b["segments"][:2]), r"segments of shape \(2, 12\)"),
        (lambda: model(ids, mask), r"segments of shape \(3, 12\), torch.bool: wanted torch.int64"),
        (lambda: model(ids, None, mask.long()), r"mask of shape \(3, 12\), torch.int64: wanted torch.bool"),
        (lambda: model.loss(ids=ids, labels=b["labels"][:2]), r"labels of shape \(2, 12\): wanted that of ids, \(3, "),
        (lambda: model.loss(ids=ids), r"batch with \[\] beside its ids: wanted \['labels'\] for task 'pretrain'"),
        (lambda: model.loss(ids=ids, next=b["next"]), r"batch with \['next'\] beside its ids: wanted \['labels'\]"),
        (lambda: qa.loss(**b), r"batch with \['labels', 'next'\] beside its ids: wanted \['ends', 'starts'\]"),
        (lambda: qa.outputs(ids, starts=b["next"]), r"wanted \['ends', 'starts'\] for task 'qa'"),
        (lambda: qa.loss(**batch("qa"), label_smoothing=0.1), "label_smoothing = 0.1: wanted 0.0 for task 'qa'"),
        (lambda: tiny("tag").loss(ids=ids, labels=b["labels"], next=b["next"]), "for task 'tag'"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)
