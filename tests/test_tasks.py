# SPDX-License-Identifier: MIT
"""train.py on every task, from files as users have them: it learns, resumes exactly, says what is wrong with rows."""

import csv
import json
import math
import os
import pathlib
import re
import shlex
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_train import exact, fails, interrupt_at, lines, same

import models
import tasks
import train

TINY = ["--size", "tiny", "--tokenizer", "bytes", "--seq-len", "48", "--batch-size", "8", "--eval-every", "4"]
TINY += ["--sample-every", "100", "--save-every", "4", "--log-every", "1", "--threads", "1"]
MODEL = {"lm": "rnn", "mlm": "bert", "classify": "bert", "tag": "bert", "qa": "bert", "seq2seq": "transformer"}
WORDS = "red blue green black white amber coral ivory lilac ochre".split()
NUMBERS = ["1", "22", "333", "4444"]


def rows_of(task, n=120):
    """Rows whose answers follow from their texts by a rule that a small model finds."""
    for i in range(n):
        word, number = WORDS[i % len(WORDS)], NUMBERS[i // len(WORDS) % len(NUMBERS)]
        if task == "classify":
            yield {"text": f"{word} {'cat' if i % 3 else 'dog'} {number} {i}", "label": "feline" if i % 3 else "canine"}
        elif task == "tag":
            tokens = [word, number, "Ada", "Lovelace", str(i)]
            yield {"tokens": tokens, "tags": ["O", "B-NUM", "B-PER", "I-PER", "B-NUM"]}
        elif task == "qa":
            context = f"The {word} box holds {number}. It is row {i}."
            yield {"question": "What does it hold?", "context": context, "answers": number}
        else:
            yield {"source": f"{word} {i}", "target": word.upper()[:4]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    for task in tasks.FIELDS:
        pathlib.Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    text = [
        f"The {w} house has {n} rooms. They are {v}. No one lives there." for w in WORDS for n in NUMBERS for v in WORDS
    ]
    pathlib.Path("lm.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    pathlib.Path("mlm.jsonl").write_text(pathlib.Path("lm.jsonl").read_text())
    yield tmp_path
    torch.set_num_threads(threads)


def flags(task, *more, steps=8):
    return [*TINY, "--model", MODEL[task], "--task", task, "--data", f"{task}.jsonl", "--steps", str(steps), *more]


def go(task, *more, out=None, steps=8):
    out = pathlib.Path(out or f"out/{task}")
    train.main(flags(task, *more, "--out", str(out), steps=steps))
    return out


def scores(out):
    return json.loads((out / "metrics.json").read_text())


# --- every task -------------------------------------------------------------------------------------------------------

LEARNS = {  # steps, flags and what the best score of a constant is: the model has to beat it
    "classify": (60, ["--lr", "3e-3", "--dropout", "0", "--optimizer", "adamw"], "accuracy", "majority class"),
    "tag": (60, ["--lr", "3e-3", "--dropout", "0", "--optimizer", "adamw"], "entity_f1", "majority tag"),
    "qa": (150, ["--lr", "5e-3", "--optimizer", "adamw"], "f1", "sentence at the usual place"),
    "seq2seq": (60, ["--lr", "5e-3", "--dropout", "0", "--optimizer", "adamw"], "chrf", "the most frequent target"),
    "lm": (60, ["--lr", "1e-2", "--optimizer", "adamw"], "bits_per_byte", "unigram"),
    "mlm": (60, ["--lr", "3e-3", "--optimizer", "adamw"], "val_loss", "unigram"),
}


@pytest.mark.parametrize("task", LEARNS)
def test_a_task_is_learnt_better_than_its_baseline(task, capsys):
    steps, more, score, baseline = LEARNS[task]
    out = go(task, *more, "--eval-every", "30", steps=steps)
    said, found = capsys.readouterr().out, scores(out)
    assert found["task"] == task and f"baseline, {baseline}: " in said and "before: " in said and "after: " in said
    assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))
    ours, theirs = found[score], found["baselines"][baseline][score]
    assert ours < theirs if score in ("val_loss", "bits_per_byte") else ours > theirs, found
    if score == "val_loss":
        assert found["val_loss"] == min(r["val_loss"] for r in lines(out) if r["val_loss"])

    before = (out / "metrics.json").read_bytes()
    train.main(["--eval", "--base", str(out)])  # on what the run kept: the same numbers again
    again = scores(out)
    assert (
        again[score] == pytest.approx(found[score], abs=1e-6) and again["baselines"].keys() == found["baselines"].keys()
    )
    assert json.loads(before).keys() == again.keys()


@pytest.mark.parametrize("task", ["lm", "mlm", "classify", "seq2seq"])
def test_resuming_is_exact(task, monkeypatch):
    more = ["--dropout", "0.1", "--grad-accum", "2", *(["--augment"] if task in ("classify", "seq2seq") else [])]
    whole = exact(go(task, *more, out="out/whole"))
    undo = interrupt_at(5, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        go(task, *more, out="out/parts")
    assert stop.value.code == 128 + signal.SIGINT
    undo()
    train.main(["--resume"])
    assert same(exact(pathlib.Path("out/parts")), whole)


def test_samples_of_every_task(capsys):
    asked = {"classify": ("red cat 1", r"-> '(feline|canine)'"), "tag": ("red 1 Ada", r"red/\S+ 1/\S+ Ada/\S+"),
             "qa": ("Is it? The red box holds 1.", "'Is it.' -> "), "seq2seq": ("red 1", "'red 1' -> "),
             "mlm": ("The [MASK] house", "^The .* house$"), "lm": ("The ", "^The ")}  # fmt: skip
    for task, (text, wanted) in asked.items():
        out = go(task, steps=2)
        capsys.readouterr()
        train.main(["--base", str(out), "--sample", text, "--new-tokens", "4"])
        assert re.search(wanted, capsys.readouterr().out, re.M), task
    fails(["--base", "out/qa", "--sample", "no question"], capsys, "--sample", "'?'")
    fails(["--base", "out/tag", "--chat"], capsys, "--chat", "tag")


def test_the_next_command_asks_what_the_data_asks(capsys):
    for task, word in {"classify": "cat", "tag": "Lovelace", "qa": "box holds", "seq2seq": "1"}.items():
        out = go(task, steps=1)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
        command = shlex.split(line.removeprefix("next: "))
        assert command[2:5] == ["--base", str(out), "--sample"] and word in command[5], line
        train.main(command[2:])
        assert capsys.readouterr().out


def test_evaluation_on_other_rows_scores_all_of_them(capsys):
    """Every row counts, not a tenth of them: of two labels swapped everywhere, the accuracy is the complement."""
    out = go("classify", "--lr", "3e-3", "--optimizer", "adamw", "--dropout", "0", steps=40)
    rows = list(rows_of("classify", 20))
    other = {"feline": "canine", "canine": "feline"}
    found = []
    for name, swap in (("same", False), ("swapped", True)):
        new = [row | {"label": other[row["label"]] if swap else row["label"]} for row in rows]
        pathlib.Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
        train.main(["--eval", "--base", str(out), "--data", f"{name}.jsonl"])
        found.append(scores(out)["accuracy"])
    assert sum(found) == pytest.approx(1) and found[0] > 0.5
    pathlib.Path("new.jsonl").write_text('{"text": "a", "label": "feline"}\n{"text": "b", "label": "equine"}\n')
    fails(
        ["--eval", "--base", str(out), "--data", "new.jsonl"], capsys, "new.jsonl:2", "'equine'", "not seen in training"
    )


def test_csv_and_a_local_dataset_give_the_same_model_as_jsonl(capsys):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = list(rows_of("classify"))
    with open("classify.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    pathlib.Path("local").mkdir()
    pathlib.Path("local/train.jsonl").write_text(pathlib.Path("classify.jsonl").read_text())
    expected = load_file(go("classify", steps=2) / "model.safetensors")
    for name in ("classify.csv", "hf:local", "local"):
        train.main([*flags("classify", steps=2)[:-4], "--data", name, "--steps", "2", "--out", "out/b", "--overwrite"])
        found = load_file("out/b/model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("task", ["lm", "mlm"])
def test_running_text_of_a_dataset(task, capsys):
    pytest.importorskip("datasets").disable_progress_bars()
    pathlib.Path("local").mkdir()
    pathlib.Path("local/train.jsonl").write_text(pathlib.Path("lm.jsonl").read_text())
    expected = load_file(go(task, steps=2) / "model.safetensors")
    argv = [*flags(task)[:-4], "--steps", "2", "--out", "out/b"]
    train.main([*argv, "--data", "hf:local"])
    found = load_file("out/b/model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    pathlib.Path("local/train.jsonl").write_text('{"source": "a", "target": "b"}\n')
    fails([*argv, "--data", "hf:local", "--overwrite"], capsys, "hf:local", "source, target", "wanted text")


# --- adapting ---------------------------------------------------------------------------------------------------------


def test_a_pretrained_bert_gets_the_head_of_each_task(capsys):
    """All the ways to adapt it; what is frozen stays as it was, bit for bit."""
    base = go("mlm", out="out/bert", steps=4)
    start = load_file(base / "model.safetensors")
    for task in ("classify", "tag", "qa"):
        for method in ("full", "freeze", "lora"):
            out = go(
                task,
                "--finetune",
                method,
                *(["--top", "1"] if method == "freeze" else []),
                out=f"out/{task}-{method}",
                steps=2,
            )
            said = capsys.readouterr().out
            assert f"base: {base}" in said
            found = re.search(r"([\d,]+) parameters, ([\d,]+) trained", said).groups()
            every, trained = (int(x.replace(",", "")) for x in found)
            assert (trained == every) == (method == "full")
            if method != "lora":
                end = load_file(out / "model.safetensors")
                moved = {name for name in start.keys() & end.keys() if not torch.equal(start[name], end[name])}
                below = {name for name in start if "embeddings" in name or "layer.0." in name}
                assert bool(moved & below) == (method == "full") and moved - below
            train.main(["--eval", "--base", str(out)])  # the head of an adapter comes back with it
            told = re.findall(r"validation loss ([\d.]+)", capsys.readouterr().out)
            assert float(told[0]) == pytest.approx(
                json.loads((out / "args.json").read_text())["best"]["val_loss"], abs=1e-4
            )
    train.main(["--merge", "--base", "out/classify-lora"])
    first, merged = re.findall(r"validation loss ([\d.]+)", capsys.readouterr().out)
    assert float(first) == pytest.approx(float(merged), abs=1e-3)
    import transformers

    opened = transformers.AutoModelForSequenceClassification.from_pretrained("out/classify-lora-merged")
    assert set(opened.config.id2label.values()) == {"feline", "canine"}


def test_renewing_changes_nothing_that_the_encoder_computes():
    model = models.BERT(models.BERTConfig(60, 32, 2, 2, 64, 16, task="classify", labels=("a", "b"))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        batch = {"ids": torch.randint(60, (3, 9)), "labels": torch.tensor([0, 1, 0])}
        before, pooler = model.outputs(**batch)[2], model.bert.pooler.dense.weight.clone()
        train.renew(model)
        torch.testing.assert_close(model.outputs(**batch)[2], before, atol=1e-5, rtol=1e-5)
    assert model.bert.embeddings.word_embeddings.weight.detach().std().item() == pytest.approx(0.02)
    assert not torch.equal(model.bert.pooler.dense.weight, pooler)


def test_without_a_base_it_pretrains_first_and_bad_rows_are_refused_before_that(monkeypatch, capsys):
    monkeypatch.setitem(tasks.SOURCES, "stdlib-docs", lambda: tasks.corpus.read_documents("mlm.jsonl"))
    short = train.RECIPES["bert", "mlm"][0] | {"steps": 2, "batch_size": 4, "seq_len": 48}
    monkeypatch.setitem(train.RECIPES, ("bert", "mlm"), (short, {}))
    pathlib.Path("bad.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    argv = [*TINY, "--task", "classify", "--steps", "2"]
    fails([*argv, "--finetune", "full", "--data", "bad.jsonl"], capsys, "bad.jsonl:2", "label")
    for method in ("full", "freeze", "lora"):
        train.main([*argv, "--finetune", method, "--data", "classify.jsonl", "--out", f"{method}/tuned"])
        said = capsys.readouterr().out
        assert f"training one first, into {method}/bert" in said
        assert any(
            os.path.exists(f"{method}/tuned/{kind}_model.safetensors".replace("/_", "/")) for kind in ("", "adapter")
        )
        assert lines(pathlib.Path(f"{method}/bert"))[-1]["step"] == 2


def test_a_base_is_trained_for_the_length_asked_for(monkeypatch):
    short = train.RECIPES["transformer", "seq2seq"][0] | {"steps": 2}
    monkeypatch.setitem(train.RECIPES, ("transformer", "seq2seq"), (short, {}))
    argv = ["--size", "tiny", "--tokenizer", "bytes", "--task", "seq2seq", "--data", "seq2seq.jsonl", "--steps", "2"]
    train.main([*argv, "--finetune", "full", "--seq-len", "96"])
    assert json.loads(pathlib.Path("out/transformer/config.json").read_text())["max_len"] == 97


def test_a_run_needs_its_data_file_no_more(monkeypatch, capsys):
    """What was prepared from it lies in state/: sampling, scoring and resuming work where the file is gone."""
    whole = exact(go("classify", out="out/whole"))
    undo = interrupt_at(5, monkeypatch)
    with pytest.raises(SystemExit):
        go("classify", out="out/parts")
    undo()
    os.remove("classify.jsonl")
    train.main(["--resume", "out/parts"])
    assert same(exact(pathlib.Path("out/parts")), whole)
    train.main(["--base", "out/whole", "--sample", "red dog 22"])
    train.main(["--base", "out/whole", "--eval"])
    fails(["--base", "out/whole", "--eval", "--data", "classify.jsonl"], capsys, "classify.jsonl", "no such file")


def test_a_base_goes_on_with_its_own_data(capsys):
    base = go("classify", out="out/base", steps=1)
    for method in ("lora", "distill"):
        train.main(
            ["--finetune", method, "--base", str(base), "--steps", "1", "--out", f"out/{method}", "--threads", "1"]
        )
        assert json.loads(pathlib.Path(f"out/{method}/args.json").read_text())["settings"]["data"] == "classify.jsonl"


def test_scoring_on_labels_that_were_not_learnt_names_the_row(capsys):
    out = go("classify", out="out/a", steps=1)
    fails(["--base", str(out), "--eval", "--data", "stdlib-areas"], capsys, "stdlib-areas:", "not seen in training")


def test_few_rows_for_validation_are_noted(capsys):
    go("classify", out="out/a", steps=1)
    n = len(pathlib.Path("out/a/state/val.jsonl").read_text().splitlines())
    assert 0 < n < 30 and f"note: {n} rows for validation are few" in capsys.readouterr().out


def test_a_base_says_what_it_was_trained_for(capsys):
    """--finetune of a classifier, with no --task, goes on with classification, in the order of the base's labels."""
    base = go("classify", out="out/base", steps=2)
    config = json.loads((base / "config.json").read_text())
    names = config["id2label"].values()
    config["id2label"] = dict(zip("01", reversed(names), strict=True))
    config["label2id"] = {name: int(i) for i, name in config["id2label"].items()}
    (base / "config.json").write_text(json.dumps(config))
    train.main([*TINY, "--finetune", "full", "--base", str(base), "--data", "classify.jsonl", "--steps", "2",
                "--lr", "0", "--out", "out/tuned"])  # fmt: skip
    assert json.loads(pathlib.Path("out/tuned/config.json").read_text())["id2label"] == config["id2label"]
    a, b = (load_file(f"{folder}/model.safetensors") for folder in ("out/base", "out/tuned"))
    assert torch.equal(a["classifier.weight"], b["classifier.weight"]), "the head of the base was thrown away"


@pytest.mark.parametrize("task", ["lm", "mlm", "classify", "seq2seq"])
def test_distillation_takes_blocks_of_the_teacher(task, capsys):
    teacher = go(task, out="out/teacher", steps=4)
    out = go(task, "--finetune", "distill", out="out/student", steps=4)
    said = capsys.readouterr().out
    assert f"base: {teacher}" in said and "student: blocks" in said
    count = [sum(t.numel() for t in load_file(f / "model.safetensors").values()) for f in (teacher, out)]
    assert count[1] < count[0] or task == "lm"  # the tiny RNN has one layer
    if task == "mlm":
        a, b = (load_file(f / "state" / "checkpoint.safetensors") for f in (teacher, out))
        head = "model.cls.seq_relationship.bias"
        assert not torch.equal(a[head], b[head]), "the head for next sentences is not trained"
    again = go(
        task, "--finetune", "distill", "--teacher", str(teacher), "--distill-weights", "0,1,0", out="out/b", steps=4
    )
    a, b = (load_file(f / "state" / "checkpoint.safetensors") for f in (out, again))
    assert not all(torch.equal(a[k], b[k]) for k in a), "the teacher teaches nothing"


def test_settings_reach_distillation(monkeypatch, capsys):
    seen, plain = [], models.distillation_loss
    monkeypatch.setattr(models, "distillation_loss", lambda *a, **how: seen.append(how) or plain(*a, **how))
    argv = [*flags("classify", "--overwrite", steps=1), "--size", "small", "--out", "out/teacher"]
    train.main(argv)
    argv = [*flags("classify", steps=1), "--finetune", "distill", "--student-layers", "3", "--out", "out/student"]
    train.main([*argv, "--distill-temperature", "3", "--distill-weights", "4,3,2", "--label-smoothing", "0.2"])
    assert "student: blocks 0, 1, 2 of" in capsys.readouterr().out
    how = seen[0]
    assert (how["temperature"], how["soft"], how["hard"], how["label_smoothing"]) == (3, 4, 3, 0.2)
    # 2 times the mean over hidden states, which are summed over all tokens of 8 texts of 1 label each
    assert 2 / 48 < how["cosine"] < 2 / 5


def test_resuming_a_distillation_is_exact(monkeypatch):
    go("seq2seq", out="out/teacher", steps=4)
    whole = exact(go("seq2seq", "--finetune", "distill", out="out/whole"))
    undo = interrupt_at(5, monkeypatch)
    with pytest.raises(SystemExit):
        go("seq2seq", "--finetune", "distill", out="out/parts")
    undo()
    train.main(["--resume", "out/parts"])
    assert same(exact(pathlib.Path("out/parts")), whole)


# --- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    ["--label-smoothing", "0.1"], ["--l1", "0.001"], ["--augment"], ["--adversarial", "fgm"], ["--adversarial", "pgd"],
    ["--adversarial", "freelb", "--epsilon", "0.5"], ["--adversarial", "rdrop", "--dropout", "0.1"],
], ids=lambda more: " ".join(more))  # fmt: skip
def test_each_changes_training_and_not_evaluation(more):
    plain = go("classify", "--dropout", "0.1", out="out/plain", steps=4)
    other = go("classify", "--dropout", "0.1", *more, out="out/other", steps=4)
    a, b = lines(plain), lines(other)
    assert a[-1]["loss"] != b[-1]["loss"]
    before = [json.loads((out / "args.json").read_text())["before"]["val_loss"] for out in (plain, other)]
    assert before[0] == before[1], "the loss that is compared between runs must not change"


@pytest.mark.parametrize("method", ["fgm", "pgd", "free_lb"])
def test_epsilon_reaches_the_method(method, monkeypatch):
    seen, plain = [], getattr(models.adversarial, method)
    monkeypatch.setattr(models.adversarial, method, lambda *a, **how: seen.append((a[1], how)) or plain(*a, **how))
    go("classify", "--adversarial", method.replace("_", ""), "--epsilon", "0.25", steps=2)
    words, how = seen[0]
    assert len(seen) == 2 and words.weight.shape == (261, 64), "not the words' embedding"
    # 48 tokens of the mean norm; it has changed since by two steps at most
    assert how["epsilon"] == pytest.approx(0.25 * words.weight.norm(dim=1).mean().item() * 48**0.5, rel=0.3)


def test_r_drop_without_dropout_is_refused_on_a_base_too(capsys):
    base = go("mlm", out="out/base", steps=2)  # pretrained without
    argv = [*flags("classify", steps=2), "--finetune", "full", "--base", str(base), "--adversarial", "rdrop"]
    fails(argv, capsys, "rdrop", "--dropout")
    train.main([*argv, "--dropout", "0.1"])


def test_smoothing_is_that_of_the_loss(monkeypatch):
    seen, plain = [], models.BERT.loss
    monkeypatch.setattr(models.BERT, "loss", lambda self, **how: seen.append(how) or plain(self, **how))
    go("classify", "--label-smoothing", "0.3", steps=1)
    training = [how["label_smoothing"] for how in seen if "label_smoothing" in how]
    assert training == [0.3] and len(seen) > 1, "evaluation is not smoothed"


def test_augmentation_spares_the_special_tokens():
    s = train.complete(train.Settings(task="classify", augment=True, seq_len=48, batch_size=8, size="tiny"))
    rows = list(rows_of("classify"))
    tokenizer = tasks.Tokenizer.train(["x"], 300, "bytes", tasks.SPECIAL)
    data = tasks.Labelled(s, tokenizer, rows, rows[:3], ("canine", "feline"), 2)
    cls, sep, mask = (tokenizer.token_to_id(name) for name in tasks.SPECIAL[2:])
    changed = 0
    for index in range(15):
        for row, real in zip(*[data.batch(index)[name] for name in ("ids", "mask")], strict=True):
            row = row[real].tolist()
            assert row[0] == cls and row[-1] == sep and not {cls, sep} & set(row[1:-1])
            changed += mask in row
    assert changed > 50


def test_augmentation_of_a_source_has_no_end_in_its_middle():
    s = train.complete(train.Settings(task="seq2seq", augment=True, seq_len=48, batch_size=8, size="tiny"))
    rows = [{"source": "one two three four five six", "target": "x"}] * 40
    tokenizer = tasks.Tokenizer.train(["x"], 300, "bytes", tasks.SPECIAL[:1])
    data, texts = tasks.Labelled(s, tokenizer, rows, rows[:3], (), 1), set()
    for batch in map(data.batch, range(5)):
        for ids, real in zip(batch["source"], batch["source_mask"], strict=True):
            *ids, end = ids[real].tolist()
            assert end == tokenizer.eos_id not in ids
            texts.add(tokenizer.decode(ids))
    assert len(texts) > 20 and all(len(text) == 24 for text in texts)  # 27 less a tenth, and swapped


def test_a_cell_is_what_was_asked_for():
    for cell in ("gru", "rnn"):
        out = go("lm", "--cell", cell, out=f"out/{cell}", steps=1)
        assert json.loads((out / "config.json").read_text())["cell"] == cell


def test_beams_reach_the_search(monkeypatch):
    seen, plain = [], tasks.beam_search
    monkeypatch.setattr(tasks, "beam_search", lambda *a, **how: seen.append(a[3]) or plain(*a, **how))
    go("seq2seq", "--beam", "3", steps=1)
    assert set(seen) == {3}


@pytest.mark.parametrize("task", ["lm", "mlm", "seq2seq"])
def test_perturbed_embeddings_on_every_model(task):
    plain, other = (go(task, *more, out=f"out/{len(more)}", steps=2) for more in ([], ["--adversarial", "fgm"]))
    a, b = (load_file(out / "state" / "checkpoint.safetensors") for out in (plain, other))
    assert not all(torch.equal(a[key], b[key]) for key in a), "the perturbation did not reach the gradient"


def test_l1_leaves_weights_nearer_to_zero():
    sizes = []
    for more in ([], ["--l1", "0.01"]):
        out = go(
            "classify",
            "--optimizer",
            "sgd",
            "--lr",
            "0.1",
            "--weight-decay",
            "0",
            "--clip",
            "0",
            "--overwrite",
            *more,
            steps=20,
        )
        tensors = load_file(out / "state" / "checkpoint.safetensors")
        sizes.append(sum(t.abs().sum().item() for n, t in tensors.items() if n.startswith("model.") and t.dim() > 1))
    assert sizes[1] < 0.95 * sizes[0]


@pytest.mark.parametrize("task", ["tag", "qa", "classify"])
def test_places_of_a_new_bert(task):
    """For tags and answers, sinusoids four times as large as words, by the formula; for a text's class as in BERT."""
    torch.manual_seed(0)
    s = train.complete(train.Settings(task=task, size="tiny", seq_len=48))
    tables = train.new_model(s, train.Blank(300)).bert.embeddings
    words, segments = (float(m.weight.detach().std()) for m in (tables.word_embeddings, tables.token_type_embeddings))
    assert words == pytest.approx(0.02, rel=0.05) and tables.token_type_embeddings.weight.shape == (3, 64)
    assert segments == pytest.approx(0.02 if task == "classify" else 0.08, rel=0.25)
    found = tables.position_embeddings.weight.detach()
    assert float(found.std()) < 0.021 if task == "classify" else found.square().mean() ** 0.5 == pytest.approx(0.08)
    for p, i in [(0, 0), (1, 0), (7, 5), (47, 31)]:
        angle = p / 10000 ** (2 * i / 64)
        pair = [0.08 * 2**0.5 * math.sin(angle), 0.08 * 2**0.5 * math.cos(angle)]
        assert (found[p, 2 * i : 2 * i + 2].tolist() == pytest.approx(pair, abs=1e-6)) == (task != "classify")


def test_renewing_a_pretrained_body_changes_its_scale_and_its_pooler_alone():
    """LayerNorm takes the scale away, so the encoder computes the same; its embeddings are as small as new ones."""
    torch.manual_seed(0)
    config = models.BERTConfig(50, 32, 2, 2, 64, 16, task="classify", labels=("a", "b"))
    model, ids = models.BERT(config).eval(), torch.randint(50, (3, 9))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    known, before = model.state_dict(), model.outputs(ids, labels=torch.zeros(3, dtype=torch.long))[2].detach()
    known = {name: t.clone() for name, t in known.items()}
    train.renew(model)
    after = model.outputs(ids, labels=torch.zeros(3, dtype=torch.long))[2]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, known[name])}
    assert changed == {f"bert.embeddings.{n}.weight" for n in tables} | {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # fmt: skip
    assert abs(float(model.bert.embeddings.word_embeddings.weight.detach().std()) - 0.02) < 1e-3
    assert float(model.bert.pooler.dense.weight.detach().std()) < 0.03 and not model.bert.pooler.dense.bias.any()


def test_full_tuning_for_a_task_renews_the_base(monkeypatch):
    base, seen = go("mlm", out="out/base", steps=1), []
    monkeypatch.setattr(train, "renew", lambda model: seen.append(type(model)))
    for method in ("full", "freeze", "lora"):
        go("classify", "--finetune", method, "--base", str(base), out=f"out/{method}", steps=1)
    assert seen == [models.BERT]


def test_the_rows_that_are_scored_come_from_all_of_them(monkeypatch):
    monkeypatch.setattr(tasks, "EVAL_ROWS", 4)
    rows, seen = list(rows_of("classify", 100)), []
    pathlib.Path("parts").mkdir()
    for name, part in (("train", rows[:70]), ("validation", rows[70:])):
        pathlib.Path(f"parts/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.setattr(tasks, "judge", lambda task, found, val: seen.append(val) or {"accuracy": 0.0, "macro_f1": 0.0})
    train.main([*TINY, "--task", "classify", "--data", "parts", "--steps", "1"])
    texts = [[row["text"] for row in val] for val in seen]
    assert texts[0] == [row["text"] for row in rows[70::8]] and all(t == texts[0] for t in texts)


def test_the_best_checkpoint_is_that_of_the_metric(monkeypatch):
    """Accuracy decides for a task, whatever the loss does; the model that is kept is the one that had it."""
    told = iter([0.2, 0.9, 0.5, 0.1, 0.3])  # at each evaluation, and at the end of the model before training
    monkeypatch.setattr(
        tasks.Labelled, "scores", lambda self, model, loss_sum: {"accuracy": next(told), "macro_f1": 0.0}
    )
    out = go("classify", "--patience", "2", steps=40)
    run = json.loads((out / "args.json").read_text())
    assert run["best_step"] == 8 and lines(out)[-1]["step"] == 16 and scores(out)["accuracy"] == 0.9
    assert run["before"]["accuracy"] == 0.3


def test_of_equal_scores_the_loss_decides():
    """On few rows accuracy stands still while the model learns: what it learnt must not be thrown away."""
    s = train.Settings(task="classify")
    known = {"accuracy": 0.75, "val_loss": 1.0}
    assert train.better(s, {"accuracy": 0.75, "val_loss": 0.9}, known)
    assert not train.better(s, {"accuracy": 0.75, "val_loss": 1.0}, known)
    assert not train.better(s, {"accuracy": 0.7, "val_loss": 0.1}, known)
    assert train.better(s, {"accuracy": 0.8, "val_loss": 9.0}, known)
    s = train.Settings(task="lm")
    assert train.better(s, {"val_loss": 0.9}, known) and not train.better(s, {"val_loss": 1.1}, known)


def test_what_is_shown_at_the_end_is_of_the_model_that_is_kept(monkeypatch):
    told, seen, plain = iter([0.9, 0.5, 0.2]), [], train.sample  # the second evaluation is the worse
    monkeypatch.setattr(
        tasks.Labelled, "scores", lambda self, model, loss_sum: {"accuracy": next(told), "macro_f1": 0.0}
    )
    monkeypatch.setattr(
        train, "sample", lambda s, model, *more: seen.append(model.state_dict()) or plain(s, model, *more)
    )
    out = go("classify", steps=8)
    kept = load_file(out / "model.safetensors")
    assert all(torch.equal(kept[name], seen[-1][name]) for name in kept)


def test_tuning_that_makes_a_model_worse_keeps_what_it_was(monkeypatch):
    base = go("classify", out="out/base")
    told = iter([0.8, 0.3, 0.2])
    monkeypatch.setattr(
        tasks.Labelled, "scores", lambda self, model, loss_sum: {"accuracy": next(told), "macro_f1": 0.0}
    )
    out = go("classify", "--finetune", "freeze", "--base", str(base), out="out/tuned")
    a, b = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert all(torch.equal(a[name], b[name]) for name in a) and scores(out)["accuracy"] == 0.8
    assert json.loads((out / "args.json").read_text())["best_step"] == 0


# --- what bad input gets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, rows, words", [
    ("classify", [{"text": "a", "label": "x"}, {"text": "b", "label": " "}], ["bad.jsonl:2", "label"]),
    ("classify", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], ["bad.jsonl:1", "'x'", "two labels"]),
    ("classify", [{"text": "a", "label": "x"}], ["bad.jsonl", "two"]),
    ("tag", [{"tokens": ["a", "b"], "tags": ["O", "X"]}, {"tokens": ["a", "b"], "tags": ["O"]}],
     ["bad.jsonl:2", "2 tokens and 1 tags"]),
    ("qa", [{"question": "q?", "context": "c", "answers": "c"}, {"question": "q?", "context": "c", "answers": "d"}],
     ["bad.jsonl:2", "'d'", "not in its context"]),
    ("seq2seq", [{"source": "a"}], ["bad.jsonl:1", "target"]),
    ("seq2seq", [], ["bad.jsonl", "no examples"]),
])  # fmt: skip
def test_bad_rows(task, rows, words, capsys):
    pathlib.Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails([*TINY, "--task", task, "--data", "bad.jsonl"], capsys, *words)


def test_a_validation_file_with_a_label_unseen_in_training(capsys):
    pathlib.Path("parts").mkdir()
    pathlib.Path("parts/train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    pathlib.Path("parts/validation.csv").write_text("text,label\nc,x\nd,z\n")
    fails([*TINY, "--task", "classify", "--data", "parts"], capsys, "validation.csv:3", "'z'", "not seen in training")


@pytest.mark.parametrize("argv, words", [
    (["--task", "clasify"], ["--task", "'clasify'", "'classify'"]),
    (["--task", "classify", "--model", "gpt"], ["--task classify", "--model gpt", "--model bert"]),
    (["--model", "bert", "--task", "lm"], ["--task lm", "--model bert", "gpt"]),
    (["--task", "classify", "--data", "stdlib-lexical"], ["stdlib-lexical", "stdlib-areas"]),
    (["--task", "tag", "--augment"], ["--augment", "tag"]),
    (["--teacher", "x"], ["--teacher x", "--finetune distill"]),
    (["--finetune", "distill", "--distill-weights", "1,2"], ["--distill-weights", "1,2"]),
    (["--finetune", "distill", "--teacher", "missing"], ["missing"]),
    (["--model", "vae", "--finetune", "freeze"], ["--finetune freeze", "VAE"]),
    (["--model", "vae", "--label-smoothing", "0.1"], ["--label-smoothing", "VAE"]),
    (["--task", "classify", "--adversarial", "rdrop", "--dropout", "0"], ["rdrop", "--dropout"]),
    (["--task", "classify", "--adversarial", "fgm", "--compile"], ["--adversarial fgm", "--compile"]),
    (["--recompute", "--compile"], ["--recompute", "--compile"]),
    (["--model", "rnn", "--recompute"], ["--recompute", "--model rnn", "no blocks"]),
    (["--model", "bert", "--adversarial", "rdrop", "--dropout", "0.1"], ["rdrop", "mlm"]),
    (["--finetune", "distill", "--teacher", "a", "--base", "b"], ["--teacher a", "--base b"]),
    (["--task", "qa", "--label-smoothing", "0.1"], ["--label-smoothing", "qa"]),
    (["--task", "classify", "--data", "hf:nowhere/nothing"], ["hf:nowhere/nothing"]),
    (["--task", "classify", "--data", "classify.txt"], ["classify.txt"]),
    (["--model", "bert", "--data", "one.txt"], ["one.txt"]),
    (["--task", "classify", "--data", "classify.jsonl", "--tokenizer", "tokenizer.json"], ["[PAD]", "--tokenizer"]),
], ids=lambda value: " ".join(value) if value[0].startswith("--") else "")  # fmt: skip
def test_bad_settings(argv, words, capsys):
    pathlib.Path("one.txt").write_text("A single document. It has sentences. " * 3)
    pathlib.Path("classify.txt").write_text("text")
    tasks.Tokenizer.train(["x"], 300, "bytes").save("tokenizer.json")
    fails([*TINY, *argv], capsys, *words)


def test_a_teacher_of_other_labels(capsys):
    go("classify", out="out/teacher", steps=2)
    pathlib.Path("other.jsonl").write_text(
        "".join(json.dumps({"text": f"t {i}", "label": str(i % 3)}) + "\n" for i in range(30))
    )
    argv = [*flags("classify")[:-4], "--finetune", "distill", "--data", "other.jsonl", "--steps", "2"]
    fails([*argv, "--teacher", "out/teacher"], capsys, "--teacher out/teacher", "labels")
