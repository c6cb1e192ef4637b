# SPDX-License-Identifier: MIT
"""train.py from end to end, on files small enough for seconds: it learns, resumes bit for bit, and loses nothing."""

import copy
import dataclasses
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from safetensors.torch import load_file

import models
import tasks
import train
from minimal import quant
from minimal.recompute import add_recompute

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ["--size", "tiny", "--seq-len", "32", "--batch-size", "4", "--tokenizer", "bytes", "--new-tokens", "8"]
TINY += ["--eval-every", "4", "--sample-every", "100", "--save-every", "4", "--log-every", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test in a folder of its own, with a small corpus: real prose, the licence and this file."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    pathlib.Path("corpus").mkdir()
    for name in ("LICENSE", "tests/test_train.py", "tests/conftest.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        pathlib.Path("corpus", pathlib.Path(name).stem + ".txt").write_text(text, encoding="utf-8")
    pathlib.Path("other.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    yield tmp_path
    torch.set_num_threads(threads)


def pretrain(*flags, out="out/gpt", data="corpus", steps=8):
    train.main([*TINY, "--data", data, "--out", out, "--steps", str(steps), *flags])
    return pathlib.Path(out)


def lora(*flags, out="out/gpt-lora", data="other.txt", steps=8):
    train.main([*TINY, "--finetune", "lora", "--data", data, "--out", out, "--steps", str(steps), *flags])
    return pathlib.Path(out)


def fails(argv, capsys, *words, code=2, changes=False):
    """Runs train.py, which must end with one line on stderr that has the words in it, and change no file."""
    before = snapshot()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == code, err
    assert "\n" not in err and "Traceback" not in err and err.startswith("train.py: error: "), err
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    assert changes or snapshot() == before, "a refused command has changed a file"
    return err


def snapshot():
    return {str(path): path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def exact(out):
    """What must be equal, bit for bit, in two runs: the result, the whole state, and every logged loss."""
    tensors = load_file(out / "state" / "checkpoint.safetensors")
    name = "model.safetensors" if (out / "model.safetensors").exists() else "adapter_model.safetensors"
    tensors |= {f"result.{k}": t for k, t in load_file(out / name).items()}
    return tensors, [(r["step"], r["loss"], r["val_loss"], r["lr"]) for r in lines(out)]


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def interrupt_at(step, monkeypatch, number=signal.SIGINT):
    """Sends this process a signal in the middle of the given step (counted from 0)."""
    schedule = train.cosine_schedule

    def tap(now, *rest):
        if now == step:
            os.kill(os.getpid(), number)
        return schedule(now, *rest)

    monkeypatch.setattr(train, "cosine_schedule", tap)
    return lambda: monkeypatch.setattr(train, "cosine_schedule", schedule)


# --- the main path ----------------------------------------------------------------------------------------------------


def test_pretrain_adapt_merge_and_leave(capsys):
    """The whole road, ending in the libraries that others use: transformers and peft open what train.py wrote."""
    import peft
    import transformers

    out = pretrain("--tokenizer", "bpe", "--vocab-size", "300", "--lr", "0.01", steps=60)
    said = capsys.readouterr().out
    log = lines(out)
    assert set(log[0]) == {"step", "loss", "val_loss", "lr", "tokens_per_s", "elapsed_s", "peak_memory_mb"}
    assert [r["step"] for r in log] == list(range(1, 61))
    assert log[-1]["val_loss"] < log[3]["val_loss"] - 0.5, "it does not learn"
    names = {p.name for p in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "args.json", "metrics.jsonl", "loss.png",
                     "metrics.json", "samples.txt", "state"}  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in said and "parameters trained in" in said and "next: python train.py" in said
    assert "--model gpt --finetune lora\n" in said  # the newest there is: it finds it by itself

    adapter = lora("--lr", "0.02", steps=60)
    said = capsys.readouterr().out
    assert f"base: {out}" in said
    before, after = (float(x) for x in re.findall(r"^(?:before|after): validation loss ([\d.]+)", said, re.M)[-2:])
    assert after < before - 0.3
    found = re.search(r"([\d,]+) parameters, ([\d,]+) trained", said)
    every, trained = (int(x.replace(",", "")) for x in found.groups())
    assert trained == sum(t.numel() for t in load_file(adapter / "adapter_model.safetensors").values()) < every / 4
    assert not (adapter / "model.safetensors").exists()

    ids = torch.randint(0, 300, (2, 16))
    base = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ours, tokenizer = train.load_model(out)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), base(ids).logits, atol=1e-5, rtol=1e-5)
    text = "Permission is hereby granted, free of charge"
    assert transformers.AutoTokenizer.from_pretrained(out).encode(text) == tokenizer.encode(text)

    adapted, _ = train.load_model(adapter)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        expected = adapted(ids)
        torch.testing.assert_close(expected, theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert (expected - ours(ids)).abs().max() > 0.1, "the adapter does nothing"

    train.main(["--merge", "--base", str(adapter)])
    merged = transformers.AutoModelForCausalLM.from_pretrained("out/gpt-lora-merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    train.main(["--eval", "--base", str(adapter)])
    train.main(["--eval", "--base", "out/gpt-lora-merged", "--data", "other.txt"])
    scores = re.findall(r"^out/\S+ validation loss ([\d.]+)", capsys.readouterr().out, re.M)
    assert abs(float(scores[0]) - after) < 2e-4 and len(scores) == 2


def test_with_no_pretrained_model_it_pretrains_first_and_goes_on(capsys, monkeypatch):
    monkeypatch.setitem(train.SOURCES, "stdlib-code", lambda: tasks.corpus.read_documents("corpus"))
    short = train.RECIPES["gpt", "lm"][0] | {"steps": 4, "batch_size": 2}
    monkeypatch.setitem(train.RECIPES, ("gpt", "lm"), (short, train.RECIPES["gpt", "lm"][1]))
    undo = interrupt_at(2, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        lora()
    undo()
    assert stop.value.code == 128 + signal.SIGINT
    said = capsys.readouterr().out
    assert "no finished model to build on under out/" in said and "--resume out/gpt" in said
    lora()  # the same command again finishes what was begun
    said = capsys.readouterr().out
    assert "going on with out/gpt" in said and "base: out/gpt" in said
    assert lines(pathlib.Path("out/gpt"))[-1]["step"] == 4 and lines(pathlib.Path("out/gpt-lora"))[-1]["step"] == 8


def test_full_finetuning_and_a_second_base(capsys):
    first, second = pretrain(), pretrain(out="out/second", steps=2)
    train.main([*TINY, "--finetune", "full", "--data", "other.txt", "--steps", "2", "--base", str(first)])
    a, b = (load_file(p / "model.safetensors") for p in (first, pathlib.Path("out/gpt-full")))
    assert a.keys() == b.keys() and not all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    lora(steps=1)
    assert f"base: {second}" in capsys.readouterr().out, "the newest pretrained model is the base, not a fine-tuned one"


def test_vae_writes_pictures(capsys):
    train.main(["--model", "vae", "--size", "tiny", "--steps", "40", "--eval-every", "20", "--batch-size", "32"])
    out = pathlib.Path("out/vae")
    for name in ("reconstructions.png", "samples.png", "walk.png", "loss.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    scored = [r["val_loss"] for r in lines(out) if r["val_loss"]]
    assert scored[-1] < scored[0]
    train.main(["--model", "vae", "--finetune", "lora", "--rank", "2", "--steps", "2", "--batch-size", "8"])
    train.main(["--eval", "--base", "out/vae-lora"])
    assert "validation loss" in capsys.readouterr().out


def test_sample_and_chat(capsys, monkeypatch):
    pretrain("--temperature", "0")
    capsys.readouterr()
    written = []
    for _ in range(2):
        train.main(["--sample", "The ", "--new-tokens", "5"])
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and written[0].startswith("The ")
    answers = iter(["Once", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    train.main(["--chat", "--new-tokens", "5"])
    assert "goes on with what you write" in capsys.readouterr().out


def test_dry_run_writes_nothing(capsys):
    before = snapshot()
    train.main([*TINY, "--data", "corpus", "--dry-run", "--steps", "7"])
    assert "nothing was written" in capsys.readouterr().out and snapshot() == before and not os.path.exists("out")
    pretrain(steps=1)
    before = snapshot()
    train.main([*TINY, "--finetune", "lora", "--data", "other.txt", "--dry-run", "--steps", "7"])  # finds its base
    said = capsys.readouterr().out
    assert "7 steps would take" in said and "--base out/gpt" in said and snapshot() == before


def test_patience_stops_and_keeps_the_best(capsys):
    out = pretrain("--lr", "0", "--patience", "2", steps=40)  # no learning: the first evaluation is the best for ever
    assert lines(out)[-1]["step"] == 12 and "stopped early at step 12" in "".join(capsys.readouterr())
    assert json.loads((out / "args.json").read_text())["best_step"] == 4


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--dropout", "0.1", "--grad-accum", "2"],
    ["--optimizer", "adamw", "--dtype", "bfloat16"],
    ["--optimizer", "sgd", "--dtype", "float16", "--lr", "0.1"],
], ids=["muon", "adamw-bfloat16", "sgd-float16"])  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resuming_is_exact(flags, number, monkeypatch, capsys):
    whole = exact(pretrain(*flags, out="out/whole"))
    undo = interrupt_at(5, monkeypatch, number)
    with pytest.raises(SystemExit) as stop:
        pretrain(*flags, out="out/parts")
    assert stop.value.code == 128 + number
    assert "python train.py --resume out/parts" in capsys.readouterr().out
    undo()
    assert lines(pathlib.Path("out/parts"))[-1]["step"] == 6
    train.main(["--resume"])  # needs no other flag: the newest unfinished run
    assert same(exact(pathlib.Path("out/parts")), whole)


def test_resuming_an_adapter_is_exact(monkeypatch):
    pretrain()
    whole = exact(lora("--lora-dropout", "0.1", "--dora", out="out/whole"))
    undo = interrupt_at(3, monkeypatch)
    with pytest.raises(SystemExit):
        lora("--lora-dropout", "0.1", "--dora", out="out/parts")
    undo()
    train.main(["--resume", "out/parts"])
    assert same(exact(pathlib.Path("out/parts")), whole)


def test_resuming_a_vae_is_exact(monkeypatch):
    flags = ["--model", "vae", "--size", "tiny", "--steps", "8", "--eval-every", "3", "--log-every", "1"]
    train.main([*flags, "--out", "out/whole"])
    undo = interrupt_at(4, monkeypatch)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", "out/parts"])
    undo()
    train.main(["--resume", "out/parts"])
    assert same(exact(pathlib.Path("out/parts")), exact(pathlib.Path("out/whole")))


def test_the_check_of_exactness_sees_a_repeated_batch(monkeypatch):
    """The bug that shipped elsewhere: resuming draws the first batches again."""
    whole = exact(pretrain(out="out/whole"))
    undo = interrupt_at(5, monkeypatch)
    with pytest.raises(SystemExit):
        pretrain(out="out/parts")
    undo()
    batch = tasks.Text.batch
    monkeypatch.setattr(tasks.Text, "batch", lambda self, index: batch(self, index - 6))
    train.main(["--resume", "out/parts"])
    assert not same(exact(pathlib.Path("out/parts")), whole)


def test_kill_at_any_moment(tmp_path):
    """kill -9, again and again; the run that comes through equals the one that was never killed."""
    whole = exact(pretrain("--save-every", "1", out="out/whole", steps=30))
    first = [*TINY, "--data", "corpus", "--out", "out/parts", "--steps", "30", "--save-every", "1"]
    killed, wait, steps = 0, 0.0, [0]  # steps: those that the checkpoint had after each kill
    for attempt in range(12):
        started = os.path.exists("out/parts/args.json")
        command = ["--resume", "out/parts"] if started else first
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *command], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
        if attempt >= 4:
            assert process.wait(timeout=120) == 0, process.stdout.read()
            break
        heard = 0
        for line in process.stdout:  # let it come a little further each time, then strike
            heard += line.startswith(("model:", "step"))
            if heard > attempt:
                break
        time.sleep(wait)
        wait += 0.01
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if os.path.exists("out/parts/args.json"):
            steps.append(train.read_json("out/parts/args.json")["step"])
            if train.read_json("out/parts/args.json")["status"] == "finished":
                break
    assert killed >= 2 and steps[-1] > 0, f"no kill fell between two steps: {steps}"
    assert same(exact(pathlib.Path("out/parts")), whole)


def signal_in_evaluation(step, monkeypatch, number):
    """Sends this process a signal when the evaluation after that step begins; it may score no batch more."""
    schedule, loss_on, now, sent = train.cosine_schedule, tasks.loss_on, [0], []

    def tap(step, *rest):
        now[0] = step + 1
        return schedule(step, *rest)

    def scored(*args):
        assert not sent, "the evaluation went on after the signal"
        if now[0] == step:
            sent.append(os.kill(os.getpid(), number))
        return loss_on(*args)

    monkeypatch.setattr(train, "cosine_schedule", tap)
    monkeypatch.setattr(tasks, "loss_on", scored)  # train.py has its own name for it, for training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_ends_an_evaluation_and_resuming_does_it_again(step, number, monkeypatch, capsys):
    flags = ["--dropout", "0.1", "--grad-accum", "2"]
    whole = exact(pretrain(*flags, out="out/whole"))
    with monkeypatch.context() as patches:
        signal_in_evaluation(step, patches, number)
        with pytest.raises(SystemExit) as stop:
            pretrain(*flags, out="out/parts")
    assert stop.value.code == 128 + number
    assert f"stopped at step {step} and saved; to go on: python train.py --resume out/parts" in capsys.readouterr().out
    assert step not in [line["step"] for line in lines(pathlib.Path("out/parts"))]
    train.main(["--resume"])
    assert same(exact(pathlib.Path("out/parts")), whole)
    assert all(line["tokens_per_s"] < 1e6 for line in lines(pathlib.Path("out/parts")))
    assert os.path.exists("out/parts/loss.png")


@pytest.mark.parametrize("where", ["plot", "report"])
@pytest.mark.parametrize("flags", [[], ["--lr", "0", "--patience", "1"]], ids=["all-steps", "patience"])
def test_an_interrupted_closing_is_done_by_resume(where, flags, monkeypatch, capsys):
    """All steps are done, the scores, samples and the plot that end a run are not."""
    place = train.runs if where == "plot" else train
    whole = pretrain(*flags, out="out/whole", steps=12)
    done = getattr(place, where)
    monkeypatch.setattr(place, where, lambda *args: os.kill(os.getpid(), signal.SIGINT) or done(*args))
    with pytest.raises(SystemExit) as stop:
        pretrain(*flags, out="out/parts", steps=12)
    assert stop.value.code == 130
    monkeypatch.setattr(place, where, done)
    assert not os.path.exists("out/parts/metrics.json")
    capsys.readouterr()
    train.main(["--resume"])  # it counts as unfinished
    said = capsys.readouterr().out
    assert "\nafter: validation loss" in said and "baseline, unigram" in said and "step 8/" not in said
    assert same(exact(pathlib.Path("out/parts")), exact(whole))
    assert train.read_json("out/parts/metrics.json") == train.read_json("out/whole/metrics.json")
    assert os.path.exists("out/parts/loss.png")
    if not flags:
        fails(["--resume", "out/parts"], capsys, "finished at step 12; to go on, add --steps with more than 12")
        os.remove("out/parts/metrics.json")
        train.main(["--resume", "out/parts"])
        assert os.path.exists("out/parts/metrics.json")


def test_uses_say_which_model_they_chose(monkeypatch, capsys):
    pretrain()
    done = train.runs.plot
    monkeypatch.setattr(train.runs, "plot", lambda folder: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        pretrain(out="out/later")
    monkeypatch.setattr(train.runs, "plot", done)
    capsys.readouterr()
    train.main(["--sample", "The ", "--new-tokens", "5"])
    said = capsys.readouterr()
    assert said.err == "base: out/gpt\n" and said.out.startswith("The ")
    train.main(["--sample", "The ", "--new-tokens", "5", "--base", "out/gpt"])
    assert capsys.readouterr().err == ""


def test_a_dry_run_names_what_is_wrong_and_nothing_else(capsys):
    pathlib.Path("short.txt").write_text("short\nfile\n")
    with pytest.raises(SystemExit):
        train.main([*TINY, "--data", "short.txt", "--dry-run"])
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "too short" in said.err


def test_resuming_with_other_settings(monkeypatch, capsys):
    undo = interrupt_at(2, monkeypatch)
    with pytest.raises(SystemExit):
        pretrain()
    undo()
    for flags in (["--size", "small"], ["--seq-len", "16"], ["--data", "other.txt"], ["--model", "vae"]):
        fails(["--resume", "out/gpt", *flags], capsys, flags[0], flags[1], "resuming cannot change")
    train.main(["--resume", "out/gpt", "--lr", "0.002", "--steps", "9"])
    said = capsys.readouterr().out
    assert "--lr: 0.01 -> 0.002" in said and "--steps: 8 -> 9" in said
    fails(["--resume", "out/gpt"], capsys, "finished at step 9")
    fails(["--resume", "out/gpt", "--batch-size", "2"], capsys, "--batch-size 2", "resuming cannot change")
    train.main(["--resume", "out/gpt", "--steps", "10"])
    assert lines(pathlib.Path("out/gpt"))[-1]["step"] == 10


def test_resuming_on_a_changed_base(monkeypatch, capsys):
    pretrain()
    undo = interrupt_at(2, monkeypatch)
    with pytest.raises(SystemExit):
        lora()
    undo()
    pretrain("--overwrite", "--lr", "0.02")
    fails(["--resume", "out/gpt-lora"], capsys, "the weights of out/gpt", "no longer what the run began with")


# --- the gradient -----------------------------------------------------------------------------------------------------


def test_any_split_into_microbatches_gives_the_same_step(monkeypatch):
    """With unequal masks, in float64: 8 rows at once, or in 2, 4, 8 microbatches; the mean of means does not pass."""
    batch = tasks.Text.batch

    def masked(self, index):
        ids = batch(self, index)["ids"]
        labels = ids.clone()
        for row in range(len(ids)):
            keep = (index * len(ids) + row) * 7 % 32  # some rows have no target at all
            labels[row, keep + 1 :] = -100
        return {"ids": ids, "labels": labels}

    monkeypatch.setattr(tasks.Text, "batch", masked)

    def weights(rows, parts, loss=None):
        if loss:
            monkeypatch.setattr(models.GPT, "loss", loss)
        out = pretrain("--batch-size", str(rows), "--grad-accum", str(parts), "--optimizer", "sgd", "--lr", "0.5",
                       "--overwrite", out=f"out/{rows}", steps=3)  # fmt: skip
        return load_file(out / "state" / "checkpoint.safetensors")["model.transformer.wte.weight"]

    torch.set_default_dtype(torch.float64)
    try:
        whole = weights(8, 1)
        assert whole.dtype == torch.float64
        for parts in (2, 4, 8):
            torch.testing.assert_close(weights(8 // parts, parts), whole, atol=1e-12, rtol=0)
        summed = models.GPT.loss

        def mean(self, ids, labels=None):
            total, n = summed(self, ids, labels)
            return total / n.clamp(min=1), torch.tensor(1)

        assert (weights(2, 4, mean) - whole).abs().max() > 1e-6, "the check does not see a mean of means"
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_with_nothing_to_learn_changes_nothing(monkeypatch):
    batch = tasks.Text.batch
    monkeypatch.setattr(tasks.Text, "batch", lambda self, i: {k: v for k, v in batch(self, i).items()} | {
        "labels": torch.full_like(batch(self, i)["ids"], -100)})  # fmt: skip
    before = train.new_model
    made = []
    monkeypatch.setattr(train, "new_model", lambda *a: made.append(before(*a)) or made[-1])
    copies = []
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda s, model, *a: copies.append(model.lm_head.weight.detach().clone())
                        or fit(s, model, *a))  # fmt: skip
    pretrain(steps=4)
    assert torch.equal(made[0].lm_head.weight, copies[0])


def test_gradients_are_clipped_after_unscaling(monkeypatch):
    """With SGD of rate 1 and no momentum yet, the first step is as long as the clip allows, at any scale."""
    starts = []
    fit = train.fit

    def remember(s, model, *rest):
        starts.append({k: v.clone() for k, v in model.named_parameters()} | {"model": model})
        return fit(s, model, *rest)

    monkeypatch.setattr(train, "fit", remember)

    def length(*flags):
        pretrain("--optimizer", "sgd", "--lr", "1", "--warmup", "0", "--clip", "0.01", "--weight-decay", "0",
                 "--overwrite", *flags, steps=1)  # fmt: skip
        start = starts.pop()
        model = start.pop("model")
        return sum((p - start[n]).square().sum() for n, p in model.named_parameters()).sqrt().item()

    assert length() == pytest.approx(0.01, rel=1e-3)
    assert length("--dtype", "float16") == pytest.approx(0.01, rel=1e-3)
    unscale = torch.amp.GradScaler.unscale_
    clip = torch.nn.utils.clip_grad_norm_
    late = []  # the buggy order: clip first, unscale afterwards
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, o: late.append((self, o)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, m: (clip(p, m), unscale(*late.pop()))[0])
    assert length("--dtype", "float16") != pytest.approx(0.01, rel=0.5)


def test_a_corpus_is_prepared_part_by_part(monkeypatch, tmp_path):
    """Many small parts give the same documents as one, each once, with its end token, and none on both sides."""
    rows = [f"document number {i} says {i * i}\n" for i in range(300)]
    pathlib.Path("many.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, rows[0]]))
    s = train.Settings(model="gpt", task="lm", tokenizer="bytes", data="many.jsonl", out="out/gpt")
    for size in (2**28, 500):
        monkeypatch.setattr(tasks, "PART", size)
        tokenizer = train.prepare_text(s, tmp_path, None)
        sides = []
        for name in ("train.npy", "val.npy"):
            text = tokenizer.decode(numpy.load(tmp_path / name).tolist())
            sides.append(text.split("<|endoftext|>"))
            assert sides[-1].pop() == "", "the last document has no end token"
        assert sorted(sides[0] + sides[1]) == sorted(rows) and sides[0] and sides[1]


def cuts(monkeypatch):
    """A list to which every preparation of text that is not taken from an earlier run adds its --out."""
    cut, made = tasks.cut_text, []
    monkeypatch.setattr(tasks, "cut_text", lambda s, *rest: (made.append(s.out), cut(s, *rest))[1])
    return made


def test_a_second_run_takes_the_tokens_of_the_first(monkeypatch, capsys):
    """It is the same run bit for bit, also for an adapter, whose base brings the tokenizer; and a source for others."""
    made = cuts(monkeypatch)
    for first, second, begin in (
        ("out/gpt", "out/b", lambda out: pretrain("--tokenizer", "bpe", "--vocab-size", "300", out=out, steps=3)),
        ("out/gpt-lora", "out/c", lambda out: lora("--base", "out/gpt", out=out, steps=3)),
    ):
        a, b = begin(first), begin(second)
        assert made.pop() == first and not made
        assert f"prepared by {first};" in capsys.readouterr().out
        assert same(exact(a), exact(b))
        for name in ("tokenizer.json", "state/train.npy", "state/val.npy", "samples.txt"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    os.rename("out/gpt", "elsewhere")
    pretrain("--tokenizer", "bpe", "--vocab-size", "300", "--overwrite", out="out/b", steps=1)  # its own
    assert not made and "prepared by out/b;" in capsys.readouterr().out


def rewritten(path, change):
    """Changes a file's bytes, but neither its size nor its time."""
    path, stat = pathlib.Path(path), os.stat(path)
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns


CHANGES = {  # what is no longer the same text, prepared in the same way
    "a letter, size and time kept": lambda s: rewritten("corpus/LICENSE.txt", lambda b: b.replace(b"MIT", b"TIM", 1)),
    "one file more": lambda s: pathlib.Path("corpus/more.md").write_text("Some more of it.\n" * 20),
    "one file less": lambda s: os.remove("corpus/conftest.txt"),
    "another order": lambda s: os.rename("corpus/LICENSE.txt", "corpus/zlicence.txt"),
    "more merges": lambda s: setattr(s, "vocab_size", 310),
    "characters": lambda s: setattr(s, "tokenizer", "char"),
    "the tokens are damaged": lambda s: rewritten("out/a/state/train.npy", lambda b: b[:-2] + b"\1\1"),
    "the tokenizer is damaged": lambda s: rewritten("out/a/state/tokenizer.json", lambda b: b.replace(b"e", b"E")),
    "the tokens are cut short": lambda s: os.truncate("out/a/state/val.npy", 200),
    "half of a note": lambda s: os.truncate("out/a/state/prepared.json", 30),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_run_gets_tokens_of_another_text(change, monkeypatch):
    """After any change they are those of a run that has no other beside it."""
    s = train.Settings(model="gpt", task="lm", vocab_size=300, data="corpus", out="out/a")
    made, state = cuts(monkeypatch), pathlib.Path("out/a/state")
    state.mkdir(parents=True)
    train.prepare_text(s, state, None)
    change(s)
    for s.out in ("out/b", "alone/b"):
        state = pathlib.Path(s.out, "state")
        state.mkdir(parents=True)
        train.prepare_text(s, state, None)
    assert made == ["out/a", "out/b", "alone/b"]
    for name in tasks.PREPARED:
        assert pathlib.Path("out/b/state", name).read_bytes() == pathlib.Path("alone/b/state", name).read_bytes()


def test_text_that_changes_while_it_is_prepared_is_not_noted(monkeypatch):
    s = train.Settings(model="gpt", task="lm", tokenizer="bytes", data="other.txt", out="out/a")
    write = tasks.corpus.write_tokens
    monkeypatch.setattr(tasks.corpus, "write_tokens", lambda *a: (open("other.txt", "a").write("More."), write(*a))[1])
    train.prepare_text(s, pathlib.Path("corpus"), None)
    assert not pathlib.Path("corpus", tasks.NOTE).exists()


def test_the_first_step_waits_for_no_scores(monkeypatch):
    """A new model's scores before training are computed at the end, and are those of the model that it was."""
    events, score, schedule, fit = [], train.evaluate, train.cosine_schedule, train.fit
    monkeypatch.setattr(train, "evaluate", lambda *a: (events.append("evaluate"), score(*a))[1])
    monkeypatch.setattr(train, "cosine_schedule", lambda *a: (events.append("step"), schedule(*a))[1])
    monkeypatch.setattr(
        train, "fit", lambda s, model, data, *a: (first.append(score(s, model, data)), fit(s, model, data, *a))[1]
    )
    first = []
    out = pretrain("--dropout", "0.1")
    before = json.loads((out / "args.json").read_text())["before"]
    assert events == ["step"] * 4 + ["evaluate"] + ["step"] * 4 + ["evaluate"] * 2
    assert {name: before[name] for name in first[0]} == first[0]
    monkeypatch.setattr(train, "fit", fit)
    interrupt_at(5, monkeypatch)
    with pytest.raises(SystemExit):
        pretrain("--dropout", "0.1", out="out/b")
    train.main(["--resume", "out/b"])
    assert json.loads(pathlib.Path("out/b/args.json").read_text())["before"] == before
    assert (out / "samples.txt").read_bytes() == pathlib.Path("out/b/samples.txt").read_bytes()


def test_a_prompt_is_checked_before_training(capsys):
    fails(
        [*TINY, "--model", "bert", "--data", "corpus", "--prompt", "no gap"], capsys, "--prompt 'no gap'", "with [MASK]"
    )


def test_divergence_stops_and_keeps_the_last_good_checkpoint(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain("--lr", "1e30", "--optimizer", "sgd", "--clip", "0", "--save-every", "1", steps=40)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    step = int(re.search(r"not finite at step (\d+)", said)[1])
    assert "--resume out/gpt" in said and step > 1
    state = load_file("out/gpt/state/checkpoint.safetensors")
    assert all(t.isfinite().all() for name, t in state.items() if t.is_floating_point() and name.startswith("model."))
    assert train.read_json("out/gpt/args.json")["status"] == "unfinished"


def test_after_divergence_the_printed_advice_works(capsys):
    """The weights that gave the first loss that is not finite were written too: but never as the checkpoint."""
    with pytest.raises(SystemExit) as stop:
        pretrain("--lr", "1e36", "--optimizer", "sgd", "--clip", "0", "--warmup", "0", "--save-every", "1", steps=3)
    assert stop.value.code == 2 and "not finite at step" in capsys.readouterr().err
    train.main(["--resume", "out/gpt", "--lr", "0.01"])
    assert all(0 < r["loss"] < 10 for r in lines(pathlib.Path("out/gpt")))
    # a validation loss that is not finite ends the run as well, and is not the best of anything
    argv = [*TINY, "--data", "corpus", "--out", "out/b", "--steps", "1", "--lr", "1e36", "--optimizer", "sgd"]
    fails([*argv, "--clip", "0", "--warmup", "0"], capsys, "not finite at step 1", changes=True)
    assert not os.path.exists("out/b/model.safetensors")
    assert train.read_json("out/b/args.json")["status"] == "unfinished"


# --- what bad input gets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    (["--modle", "gpt"], ["--modle", "--model"]),
    (["--finetune", "lorra"], ["--finetune", "'lorra'", "'lora'"]),
    (["--size", "smal"], ["--size", "'smal'", "'small'"]),
    (["--steps", "0"], ["--steps", "'0'", "at least 1"]),
    (["--steps", "ten"], ["--steps", "'ten'", "whole number"]),
    (["--lr", "nan"], ["--lr", "'nan'"]),
    (["--dropout", "1.0"], ["--dropout", "below 1"]),
    (["--rank"], ["--rank"]),
    (["--seed", "99999999999"], ["--seed"]),
    (["--device", "meta"], ["--device", "meta"]),
    (["--data", "nothing.txt"], ["nothing.txt", "after cleaning"]),
    (["--data", "missing.txt", "--finetune", "lora"], ["missing.txt"]),
    (["--finetune", "lora", "--rank", "65"], ["--rank", "65"]),
    (["--finetune", "lora", "--target", "c_atn"], ["--target", "c_atn"]),
    (["--device", "warp"], ["--device", "warp"]),
    (["--warmup", "9", "--steps", "8"], ["--warmup", "9", "8"]),
    (["--chat", "--eval"], ["--chat", "--eval"]),
    (["--data", "missing.txt"], ["missing.txt"]),
    (["--data", "empty.txt"], ["empty.txt"]),
    (["--data", "short.txt"], ["short.txt", "--seq-len"]),
    (["--data", "latin.txt"], ["latin.txt", "UTF-8"]),
    (["--data", "bad.jsonl"], ["bad.jsonl:2"]),
    (["--data", "keys.jsonl"], ["keys.jsonl:1", "txt"]),
    (["--data", "corpus", "--tokenizer", "missing.json"], ["missing.json"]),
    (["--data", "corpus", "--tokenizer", "bpe", "--vocab-size", "100"], ["--vocab-size", "'100'"]),
    (["--data", "corpus", "--out", "short.txt"], ["--out", "short.txt"]),
    (["--finetune", "lora", "--base", "missing"], ["--base", "missing"]),
    (["--finetune", "lora", "--base", "corpus"], ["--base", "corpus", "config.json"]),
    (["--resume"], ["--resume", "no unfinished run"]),
    (["--resume", "corpus"], ["--resume", "corpus", "args.json"]),
    (["--sample", "x"], ["--sample", "--base"]),
    (["--model", "vae", "--data", "corpus"], ["corpus"]),
], ids=lambda value: " ".join(value) if value[0].startswith("--") and len(value) < 9 else "")  # fmt: skip
def test_bad_input(argv, words, capsys):
    pathlib.Path("empty.txt").touch()
    pathlib.Path("nothing.txt").write_bytes(bytes(1000))
    pathlib.Path("short.txt").write_text("short\nfile\n")
    pathlib.Path("latin.txt").write_bytes("naïve".encode("latin-1") * 100)
    pathlib.Path("bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    pathlib.Path("keys.jsonl").write_text('{"txt": "no text"}\n')
    fails([*(TINY if argv[0] not in ("--resume", "--sample") else []), *argv], capsys, *words)


@pytest.mark.parametrize("dtype, short", [("float16", "fp16"), ("bfloat16", "bf16")])
def test_a_dtype_that_the_processor_lacks_is_said_to_be_slow(dtype, short, capsys, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", lambda there=there: there)
        train.complete(train.Settings(dtype=dtype, device="cpu"))
        assert (f"note: --dtype {dtype}" in capsys.readouterr().err) is not there
    train.complete(train.Settings(device="cpu"))
    assert "note" not in capsys.readouterr().err


def test_a_result_is_not_replaced_unasked(capsys):
    out = pretrain()
    fails([*TINY, "--data", "corpus"], capsys, "--out out/gpt", "--overwrite")
    # with --overwrite, but bad data: what was there is still there
    fails([*TINY, "--data", "missing", "--overwrite"], capsys, "missing")
    fails([*TINY, "--data", "corpus", "--overwrite", "--finetune", "full", "--out", str(out)], capsys, "--base")
    if sys.platform != "win32":
        with train.runs.held(out / "state"):  # by another process
            fails([*TINY, "--data", "corpus", "--overwrite"], capsys, "out/gpt/state: another process works there")
            fails(["--resume", str(out), "--steps", "99"], capsys, "out/gpt/state: another process works there")
    pathlib.Path("mine/state").mkdir(parents=True)
    pathlib.Path("mine/state/thesis.txt").write_text("mine")
    fails([*TINY, "--data", "corpus", "--out", "mine"], capsys, "--out mine", "--overwrite")
    pathlib.Path("out/other").mkdir()
    for content in ("{}", "[]", "nonsense"):  # another program's file is no run of ours, and no reason to fail
        pathlib.Path("out/other/args.json").write_text(content)
        assert train.newest("out", lambda run: run["status"] == "finished") == out
        fails(["--resume", "out/other"], capsys, "out/other/args.json")
    (out / "notes.txt").write_text("mine")
    pretrain("--overwrite", steps=2)
    assert (out / "notes.txt").read_text() == "mine" and lines(out)[-1]["step"] == 2


def test_adapting_what_does_not_fit(capsys):
    pretrain()
    base = [*TINY, "--finetune", "lora", "--data", "other.txt"]
    fails([*base, "--rank", "65"], capsys, "rank", "65", "64")
    fails([*base, "--target", "c_atn"], capsys, "c_atn", "c_attn")
    fails([*base, "--target", "c_attn,nothing"], capsys, "nothing", "c_attn")
    fails([*base, "--seq-len", "33"], capsys, "--seq-len 33", "32")
    fails([*base, "--model", "vae", "--base", "out/gpt"], capsys, "--base out/gpt")
    adapter = lora(steps=1)
    fails([*base, "--base", str(adapter), "--out", "out/x"], capsys, "is an adapter", "--merge")
    fails(["--merge", "--base", "out/gpt"], capsys, "is no adapter")
    for target in ("out/gpt", str(adapter)):
        fails(["--merge", "--base", str(adapter), "--out", target, "--overwrite"], capsys, f"--out {target}")
    fails(["--eval", "--base", str(adapter), "--seq-len", "99"], capsys, "--seq-len 99", "32")
    pretrain("--overwrite", "--lr", "0.02", steps=1)
    fails(["--sample", "x", "--base", str(adapter)], capsys, str(adapter), "has changed")


def damaged(change):
    """Rewrites out/gpt's weights; each kind of damage has the words that the message must hold."""
    path = pathlib.Path("out/gpt/model.safetensors")
    whole = path.read_bytes()
    if change == "truncated":
        path.write_bytes(whole[:-100])
    elif change == "pickle":
        path.write_bytes(pickle.dumps({"transformer.wte.weight": [1.0]}))
    elif change == "only a pickle":
        path.rename(path.with_name("pytorch_model.bin"))
    elif change == "architecture":
        config = path.with_name("config.json")
        config.write_text(config.read_text().replace('"n_embd": 64', '"n_embd": 32'))
    elif change == "kind":
        config = path.with_name("config.json")
        config.write_text(config.read_text().replace('"gpt2"', '"mamba"'))


@pytest.mark.parametrize("change, word", [
    ("truncated", "model.safetensors"), ("pickle", "model.safetensors"), ("only a pickle", "model.safetensors"),
    ("architecture", "model.safetensors"), ("kind", "mamba"),
])  # fmt: skip
def test_a_damaged_base(change, word, capsys):
    pretrain(steps=1)
    damaged(change)
    fails([*TINY, "--finetune", "lora", "--data", "other.txt"], capsys, word)


def test_a_damaged_checkpoint(monkeypatch, capsys):
    interrupt_at(2, monkeypatch)
    with pytest.raises(SystemExit):
        pretrain()
    path = pathlib.Path("out/gpt/state/checkpoint.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-50], pickle.dumps([1]), b""):
        path.write_bytes(content)
        fails(["--resume", "out/gpt"], capsys, "checkpoint.safetensors", "not a whole checkpoint")


def test_a_full_disk(capsys):
    """The file size limit of the process stands in for the disk: a write beyond it fails in the middle of a file."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import tasks
import train
save = train.save_checkpoint
def later(path, model, optimizer, progress, scaler):
    if progress["step"] == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return save(path, model, optimizer, progress, scaler)
train.save_checkpoint = later
train.main({[*TINY, "--data", "corpus", "--steps", "8", "--save-every", "2"]!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "state/checkpoint" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in pathlib.Path("out").rglob("*.tmp")]
    train.main(["--resume", "out/gpt"])  # the checkpoint of step 2 is whole
    assert lines(pathlib.Path("out/gpt"))[-1]["step"] == 8


def test_help_and_no_traceback_from_the_shell():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for field in dataclasses.fields(train.Settings):
        assert train.flag(field.name) in done.stdout and field.metadata["help"], field.name
    done = subprocess.run([sys.executable, ROOT / "train.py", "--data", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_the_fused_path_and_the_plain_one_train_alike():
    """MINIMAL_FUSED=0 in a process of its own gives the same losses, up to rounding."""
    losses, said = [], []
    for value in ("1", "0"):
        env = os.environ | {"MINIMAL_FUSED": value}
        flags = [*TINY, "--data", "corpus", "--steps", "4", "--out", f"out/{value}"]
        command = [sys.executable, ROOT / "train.py", *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        losses.append(torch.tensor([r["loss"] for r in lines(pathlib.Path(f"out/{value}"))]))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=0)
    from minimal import fused

    assert ("attention: fused" in said[0]) == fused.available()
    assert "plain PyTorch" in said[1] and "MINIMAL_FUSED=0" in said[1]


def test_recomputed_activations_give_the_same_run():
    flags = [*TINY, "--data", "corpus", "--steps", "4", "--dropout", "0.2"]
    losses = []
    for recompute in ([], ["--recompute"]):
        out = pathlib.Path(f"out/{len(losses)}")
        train.main([*flags, "--out", str(out), *recompute])
        losses.append([r["loss"] for r in lines(out)])
    assert losses[0] == losses[1] and len(losses[0]) > 1


@pytest.mark.parametrize("flags", [
    ["--tokenizer", "char", "--vocab-size", "400", "--seed", "7", "--prompt", "Per", "--top-p", "0.5"],
    ["--compile"],
    ["--grad-accum", "2", "--warmup", "0", "--dropout", "0.2", "--clip", "0"],
], ids=["char", "compile", "accumulate"])  # fmt: skip
def test_other_flags(flags, monkeypatch):
    compile = torch.compile  # without code generation, which takes a minute
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="aot_eager"))
    out = pretrain(*flags, steps=4)
    if flags[0] == "--tokenizer":
        second = pretrain("--tokenizer", str(out / "tokenizer.json"), out="out/second", steps=1)
        assert (second / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    adapter = lora("--rslora", "--alpha", "4", "--target", "c_attn,c_fc", steps=2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_alpha"] == 4 and len(config["target_modules"]) == 4


def test_a_run_killed_before_its_first_checkpoint_begins_again():
    """`begun`: the files are there, and no checkpoint yet. Neither --overwrite nor anything else is asked for."""
    out = pretrain(steps=2)
    report = train.read_json(out / "args.json")
    (out / "state" / "checkpoint.safetensors").unlink()
    train.write_json(out / "args.json", report | {"status": "begun", "step": 0})
    train.main(["--resume", "out/gpt"])
    assert train.read_json(out / "args.json")["status"] == "finished"
    train.write_json(out / "args.json", report | {"status": "begun", "step": 0})
    pretrain(steps=2)


def test_a_kill_between_the_last_checkpoint_and_its_note():
    """The checkpoint is of the last step, args.json of an earlier one: resuming finishes the run."""
    out = pretrain()
    report = train.read_json(out / "args.json")
    train.write_json(out / "args.json", report | {"status": "unfinished", "step": 4})
    before = exact(out)
    train.main(["--resume"])
    assert train.read_json(out / "args.json")["status"] == "finished" and same(exact(out), before)


def test_the_largest_microbatches_that_fit(capsys):
    """--grad-accum auto: the run of one large microbatch, up to the order of sums."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured through Linux's /proc")
    flags = ["--batch-size", "12", "--optimizer", "adamw", "--lr", "1e-3"]
    whole = pretrain(*flags, out="out/whole", steps=4)
    auto = pretrain(*flags, "--grad-accum", "auto", "--memory", "400", out="out/auto", steps=4)
    assert "microbatches: 1 of 12 rows, for 400.00 GB" in capsys.readouterr().out
    assert [a["loss"] for a in lines(auto)] == [a["loss"] for a in lines(whole)]
    rows = iter([1.0, 1.1, 1.2])  # GB of 1 row, of 2, of what was chosen

    def peak(call, device):
        call()
        return next(rows) * 1e9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "peak_bytes", peak)
        split = pretrain(*flags, "--grad-accum", "auto", "--memory", "1.3", out="out/split", steps=4)
    assert "microbatches: 4 of 3 rows, for 1.30 GB" in capsys.readouterr().out
    settings = json.loads((split / "args.json").read_text())["settings"]
    assert (settings["batch_size"], settings["grad_accum"], settings["memory"]) == (3, 4, None)  # for --resume
    for a, b in zip(lines(split), lines(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    train.main(["--resume", str(split), "--steps", "5"])


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_a_budget_is_kept(task, capsys):
    """By a process of its own, dropout and evaluation included; and the budget does decide."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured through Linux's /proc")
    rows = [{"text": "alpha beta gamma delta " * 20 + str(i), "label": "pq"[i % 2]} for i in range(300)]
    pathlib.Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if task == "lm":
        flags = ["--finetune", "full", "--base", str(pretrain("--seq-len", "256", steps=1)), "--data", "corpus"]
    else:
        flags = ["--task", "classify", "--size", "small", "--data", "rows.jsonl", "--tokenizer", "bytes"]
    flags += ["--seq-len", "256", "--batch-size", "64", "--dropout", "0.1", "--steps", "3", "--log-every", "1"]
    flags += ["--threads", "1", "--grad-accum", "auto", "--out", "out/kept", "--memory"]
    budget = 0.5
    run = [sys.executable, str(ROOT / "train.py"), *flags, str(budget)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-500:]
    each = int(re.search(r"microbatches: \d+ of (\d+) rows", done.stdout)[1])
    peak = max(row["peak_memory_mb"] for row in lines(pathlib.Path("out/kept"))) * 2**20
    assert peak <= budget * 1e9, (peak, each)
    assert task == "lm" or each < 64


def test_the_microbatch_is_measured_with_dropout(monkeypatch):
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured through Linux's /proc")
    base, seen = pretrain(steps=1), []
    monkeypatch.setattr(train, "largest_microbatch", lambda peak, rows, budget: seen.append(peak(rows)) or rows)
    split = train.split

    def tap(s, model, loss, data):
        assert not model.training  # as it is loaded
        result = split(s, model, loss, data)
        assert model.training
        return result

    monkeypatch.setattr(train, "split", tap)
    flags = ["--finetune", "full", "--base", str(base), "--dropout", "0.1", "--grad-accum", "auto", "--memory", "50"]
    pretrain(*flags, out="out/full", steps=1)
    assert seen


def test_a_budget_for_not_even_one_row(capsys):
    line = [*TINY, "--data", "corpus", "--grad-accum", "auto"]
    if pathlib.Path("/proc/self/clear_refs").exists():
        fails([*line, "--memory", "0.01"], capsys, "--memory 0.01 GB", "one row needs", "--recompute", changes=True)
    fails([*line[:-1], "many"], capsys, "--grad-accum: 'many'", "auto or a whole number of at least 1")
    fails([*line[:-2], "--memory", "2"], capsys, "--memory 2", "--grad-accum auto")


def test_profile_says_where_time_and_memory_go(capsys):
    out = pretrain("--profile", steps=6)
    said = capsys.readouterr().out
    assert "memory of a step:\nweights" in said and re.search(r"\nactivations +0*[1-9.]", said)
    table = said.split("by their own time:")[1].splitlines()[1:11]
    assert all(re.fullmatch(r"  \S.* +\d+ calls +\d+\.\d\d ms a step +\d+\.\d%", line) for line in table), table
    shares = [float(line.split()[-1][:-1]) for line in table]
    assert shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.5
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"} and len(lines(out)) == 6
    plain = pretrain(out="out/plain", steps=6)
    assert [a["loss"] for a in lines(out)] == [a["loss"] for a in lines(plain)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_profile_of_a_short_run(steps, capsys):
    out = pretrain("--profile", steps=steps)
    said = capsys.readouterr().out
    n = min(steps, 3)
    assert f"\n{n} step{'s' * (n > 1)} profiled into {out}/trace.json" in said
    pretrain("--overwrite", steps=1)
    assert not (out / "trace.json").exists()  # of the run before
    fails([*TINY, "--data", "corpus", "--profile", "--dry-run"], capsys, "--profile: writes trace.json")
    for asked in (["--profile"], ["--finetune", "lora"], ["--lr", "0.1"], ["--dtype", "bfloat16"]):
        fails(["--base", str(out), "--sample", "a", *asked], capsys, f"{asked[0]}: is of training", "--sample")


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("method", [None, "full", "lora"])
def test_profile_says_what_would_save_memory(model, method, capsys):
    """Against the run that does it; and measuring it leaves the run as it was."""
    kind = ["--model", model, "--dropout", "0.1"]
    base = pretrain(*kind, out="out/base")
    adapt = [] if method is None else ["--base", str(base), "--finetune", method, "--data", "other.txt"]
    said = {}
    for name, more in (("kept", []), ("recomputed", ["--recompute"]), ("halved", ["--batch-size", "2"])):
        out = pretrain(*kind, "--profile", *adapt, *more, out=f"out/{name}", steps=2)
        said[name] = capsys.readouterr().out
    plain = pretrain(*kind, *adapt, out="out/plain", steps=2)
    assert [a["loss"] for a in lines(pathlib.Path("out/kept"))] == [a["loss"] for a in lines(plain)]

    def number(text, pattern):
        return float(re.search(pattern, text)[1])

    now = number(said["kept"], r"\nactivations +([\d.]+) MB")
    of = number(said["recomputed"], r"\nactivations +([\d.]+) MB")
    found = re.search(r"\n--recompute +activations ([\d.]+) -> ([\d.]+) MB", said["kept"])
    assert (float(found[1]), float(found[2])) == (now, pytest.approx(of, abs=0.11)) and of < now
    assert "\n--recompute" not in said["recomputed"]
    half = number(said["kept"], r"\n--batch-size 2 --grad-accum 2 +activations [\d.]+ -> ([\d.]+) MB")
    assert half == pytest.approx(number(said["halved"], r"\nactivations +([\d.]+) MB"), abs=0.11)
    assert ("--quantise-base nf4" in said["kept"]) == (method == "lora") and out


def test_what_a_base_in_few_bits_would_save_is_what_it_saves():
    """The head that the embedding shares is not quantised, and not counted."""
    sizes = dict(vocab_size=600, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = models.Llama(models.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
    s = train.Settings(model="llama", finetune="lora", device="cpu", dtype="float32", rank=4)
    models.adapt(s, model)
    said = models.savings(s, model, model.loss, {"ids": torch.randint(600, (1, 8))}, 1)
    for kind in ("int8", "nf4"):
        found = next(re.search(r"weights ([\d.]+) -> ([\d.]+) MB", line) for line in said if kind in line)
        other = copy.deepcopy(model)
        before = quant.memory(other)
        quant.quantise(other, kind)
        assert float(found[1]) - float(found[2]) == pytest.approx((before - quant.memory(other)) / 1e6, abs=0.11)


def test_recomputing_reaches_a_base_with_dropout_of_its_own(monkeypatch):
    base, calls = pretrain("--model", "llama", "--dropout", "0.2", out="out/llama"), []
    monkeypatch.setattr(models, "add_recompute", lambda model: calls.append(model) or add_recompute(model))
    flags = ["--base", str(base), "--finetune", "lora", "--data", "other.txt"]
    plain = pretrain(*flags, out="out/plain", steps=4)
    assert not calls
    again = pretrain(*flags, "--recompute", out="out/again", steps=4)
    assert len(calls) == 1 and exact(plain)[1] == exact(again)[1]


def test_a_task_beside_a_base_does_not_hide_what_the_base_is():
    pathlib.Path("chats.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(40))
    )
    base = pretrain("--model", "llama", "--seq-len", "100", out="out/llama", steps=2)
    flags = ["--task", "chat", "--finetune", "lora", "--base", str(base), "--data", "chats.jsonl", "--seq-len", "100"]
    train.main([*TINY, *flags, "--steps", "2", "--out", "out/chat"])
    assert json.loads(pathlib.Path("out/chat/args.json").read_text())["settings"]["model"] == "llama"


def test_nothing_of_the_compiler_is_imported():
    """torch._dynamo takes a second, sympy a fifth of one: no run needs them, of a new model or of one that is read."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
def check(*flags):
    train.main([*flags])
    slow = {{"sympy", "torch._dynamo"}} & sys.modules.keys()
    assert not slow, (flags, slow)
tiny = {[*TINY, "--data", "corpus", "--steps", "2"]!r}
for model in "gpt", "llama":
    check(*tiny, "--model", model)
    check(*tiny, "--finetune", "lora", "--base", f"out/{{model}}")
    check("--base", f"out/{{model}}", "--sample", "def", "--new-tokens", "3")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
