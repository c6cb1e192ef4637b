# SPDX-License-Identifier: MIT
"""What a trained model is used for, --sample, --chat, --eval, --merge, --export, and what looks at several runs or at
data: --finetune all, --show-data. `s` is everywhere the Settings of train.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minimal import baselines, gguf_format, quant, runs
from minimal.attention import attention, torch_attention
from minimal.chat import show as show_row
from minimal.checkpoint import write_beside
from minimal.examples import FIELDS, label_names, read_examples
from minimal.features import collate, encode, mean_pool
from minimal.likelihood import choose_examples, classify
from minimal.lora import merge_lora
from minimal.runs import read_json, write_json
from minimal.settings import flag
from models import base_of, decoder, identity_of, load_model, note_of, save_tokenizer
from tasks import (
    SOURCES,
    Chats,
    Labelled,
    answer,
    chat_format,
    chats_of,
    check_data,
    context_of,
    continue_text,
    describe,
    evaluate,
    fill_masks,
    judge,
    load_data,
    loss_on,
    note_few,
    pad_id,
    predict,
    prepare_text,
    read_rows,
    rows_of,
    rows_to_score,
    segments_of,
    show,
)

RUN_FILES = ["args.json", "metrics.jsonl", "state", "config.json", "model.safetensors", "tokenizer.json", "loss.png",
             "metrics.json", "samples.txt", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
             "tokenizer_config.json", "reconstructions.png", "samples.png", "walk.png", "merge.json", "table.md",
             "table.json", "table.png", "trace.json"]  # fmt: skip


def check_free(s, out):
    """Refuses an output folder that holds something which the run would replace."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; wanted a folder")
    there = [name for name in RUN_FILES if (out / name).exists()]
    status = read_json(out / "args.json").get("status") if "args.json" in there else None
    if there and not s.overwrite and status != "begun":  # begun: was killed before its first checkpoint
        go_on = f"an unfinished run (--resume {out} goes on with it)"
        what = go_on if status == "unfinished" else "a finished run" if status else f"a result ({there[0]})"
        raise ValueError(f"--out {out}: holds {what}; wanted --overwrite to replace it, or another --out")
    if (out / "state").is_dir():
        with runs.held(out / "state"):
            pass


def report(s, folder, scores, data):
    """Writes metrics.json, the scores of the model beside the baselines', which it returns."""
    others = data.baselines()
    if (folder / "args.json").exists():  # else it is another program's folder
        write_json(folder / "metrics.json", {"task": s.task, "data": s.data, **scores, "baselines": others})
    return others


def write_text(action, s, use, prompt):
    """--sample and --chat. use: [folder, model, tokenizer], emptied here: a decoder has weights of its own."""
    folder, model, tokenizer = use
    use.clear()
    if s.task == "images":
        raise ValueError(f"{action}: {folder} is a VAE, which writes no text; its pictures are in its folder")
    if s.task not in ("lm", "chat"):
        if action == "--chat":
            raise ValueError(f"--chat: {folder} was trained for {s.task}; wanted --sample, or a language model")
        if s.quantise_base != "none":
            raise ValueError(f"--quantise-base {s.quantise_base}: {folder} writes no text; wanted a model that does")
        if s.task == "mlm" and any(name.startswith("cls.") for name in model.fresh):  # a body alone, as minilm
            return print(similarities(s, model, tokenizer, prompt.split("|")))
        if s.task == "mlm":
            return print(fill_masks(s, model, tokenizer, prompt))
        row = {FIELDS[s.task][0]: prompt}
        if s.task == "tag":
            row = {"tokens": re.findall(r"\w+|[^\w\s]", prompt)}
        if s.task == "qa":
            question, mark, context = prompt.partition("?")
            if not (mark and context.strip()):
                raise ValueError(f"--sample {prompt!r:.60}: wanted a question that ends in '?' and, after it, a text")
            row = {"question": question + mark, "context": context.strip()}
        return print(show(s.task, row, *predict(s, model, tokenizer, [row])))
    model = decoder(model, s.quantise_base)
    runs.trim_memory()  # of the weights that it has now in a form of its own
    if s.task == "chat" or (tokenizer.chat_template and action == "--chat"):
        return converse(s, folder, model, tokenizer, prompt)
    if action == "--chat":
        print(f"{folder} goes on with what you write; an empty line ends")
    text = prompt if action == "--sample" else ""
    while True:
        if action == "--chat":
            try:
                line = input("> ")
            except EOFError:
                line = ""
            if not line:
                return
            text += line + "\n"
        else:
            print(text, end="")
        for piece in continue_text(s, model, tokenizer, text):
            print(piece, end="", flush=True)
            text += piece
        print()
        if action == "--sample":
            return
        text += "\n" * (not text.endswith("\n"))


@torch.no_grad()
def similarities(s, model, tokenizer, sentences):
    """The cosines of the first sentence's embedding and the others', or, of a sentence alone, its embedding."""
    features = encode("classify", [{"text": text} for text in sentences], tokenizer, s.seq_len)
    batch = {name: x.to(s.device) for name, x in collate("classify", features, pad_id(tokenizer)).items()}
    embedded = mean_pool(model.hidden(**batch), batch["mask"]).cpu()  # (N, C)
    if len(sentences) == 1:
        return " ".join(f"{x:.4f}" for x in embedded[0].tolist())
    cosines = zip(sentences[1:], (embedded[1:] @ embedded[0]).tolist(), strict=True)
    return "\n".join(f"{cosine:.3f} {text.strip()}" for text, cosine in cosines)


def converse(s, folder, model, tokenizer, question):
    """--chat with a model of conversations, or, for --sample, one question to it"""
    chat, room, messages = question is True, context_of(model) - s.new_tokens, []
    if chat:
        print(f"{folder} answers; an empty line ends")
    while True:
        try:
            said = input("> ") if chat else question
        except EOFError:
            said = ""
        if not said:
            return
        messages.append({"role": "user", "content": said})
        while len(messages) > 1 and len(chat_format(tokenizer).prompt(messages)) > room:
            messages = messages[2:]  # the oldest question and answer, where all do not fit
        text = ""
        for piece in answer(s, model, tokenizer, messages):
            print(piece, end="", flush=True)
            text += piece
        print()
        if not chat:
            return
        messages.append({"role": "assistant", "content": text})


def score(s, folder, model, tokenizer, other):
    """--eval, on --data if it is given (other), else on what the run itself kept for validation"""
    with tempfile.TemporaryDirectory() as temporary:
        data = held_out(s, folder, model, tokenizer, other, Path(temporary))
        scores = evaluate(s, model, data)
        print(f"{folder}: {describe(scores)}")
        for name, others in report(s, folder, scores, data).items():
            print(f"baseline, {name}: {describe(others)}")


def held_out(s, folder, model, tokenizer, other, temporary):
    """Data to score a model on: what its run kept, or --data where it is given (other) or the run has kept none.

    Of rows in a file that the model did not learn from, all are scored."""
    if other or s.task == "images":
        check_data(s)
    own, kept = folder / "state", "val.jsonl" if s.task in (*FIELDS, "chat") else "val.npy"
    part, there = not other or only_part(s.data, folder), (own / kept).exists()
    other = not there or (other and not is_learnt(s.data, folder))
    if s.task in (*FIELDS, "chat"):
        labels, train = getattr(model.config, "labels", ()), read_rows(own / "train.jsonl")
        rows = rows_to_score(s, labels, part) if other else read_rows(own / kept)
        if s.task == "chat":
            train = train or (chats_of(s)[0] if part else [])  # for the baseline
            return Chats(s, tokenizer, train, rows, model, whole=not part)
        return Labelled(s, tokenizer, train, rows, labels, segments_of(model))
    if tokenizer and other:
        prepare_text(s, temporary, tokenizer)
    return load_data(s, temporary if other else own, tokenizer, model)


def learnt_from(folder):
    """The --data of the run that made a model, or None where that is not known."""
    note = note_of(folder)
    return note.get("settings", note).get("data")


def only_part(data, folder):
    """Whether a part of the data alone may be scored, as the model has learnt from the rest, or may have: ours."""
    return data in SOURCES or is_learnt(data, folder)


def is_learnt(data, folder):
    """Whether a model's run had this --data."""
    learnt = learnt_from(folder)
    return learnt is not None and Path(data).resolve() == Path(learnt).resolve()


FEW_SHOT_ROWS = 200  # scored by --eval of a language model on labelled rows of ours: a standard error of about 3 %


def few_shot(s, folder, model, tokenizer, data):
    """--eval of a language model on labelled rows: which label it finds likeliest, after --shots examples.

    Those are not scored; of a file that the model did not learn from, all other rows are."""
    s = dataclasses.replace(s, task="classify", data=data or "stdlib-areas")
    check_data(s)
    part = only_part(s.data, folder)
    train, val = rows_of(s) if part else read_examples(s.data, s.task)
    if s.shots >= len(train) + bool(val):
        raise ValueError(f"--shots {s.shots}: --data {s.data} has {len(train)} rows to show{' and score' * (not val)}")
    shown = choose_examples(train, s.shots, s.seed)
    rows = val or [row for row in train if not any(row is other for other in shown)]
    rows = rows[:: -(-len(rows) // FEW_SHOT_ROWS)] if part else rows
    chat = chat_format(tokenizer) if tokenizer.chat_template else None
    found = classify(model, tokenizer, [row["text"] for row in rows], label_names(train, val or ()), train, s.shots,
                     s.seed, chat, context=context_of(model))  # fmt: skip
    print(f"{folder}, {s.shots} examples shown: {describe(judge('classify', found.labels, rows))}, {len(rows)} rows")
    note_few(rows)
    if found.fewer_examples:
        print(f"note: {found.fewer_examples} prompts did not fit with all examples, {found.shortened} lost text too")
    usual = baselines.majority([row["label"] for row in train], len(rows))
    print(f"baseline, majority class: {describe(judge('classify', usual, rows))}")


def merge(s, folder, model, tokenizer, other, out):
    """--merge: an adapter and its base as one model, with a certificate that it computes what they do"""
    out = Path(out or f"{folder}-merged")
    check_free(s, out)
    check_apart(folder, out)
    with tempfile.TemporaryDirectory() as temporary, written_beside(out) as beside:
        data = held_out(s, folder, model, tokenizer, other, Path(temporary))
        batch = certified(data)
        before, scores = outputs_on(s, model, batch), evaluate(s, model, data)
        weights = merge_into(model, folder, "--merge")
        save_whole(s, model, tokenizer, beside, learnt_from(folder))
        merged = load_model(beside)[0].to(s.device)  # what the files hold, not what they were made from
        change = (outputs_on(s, merged, batch) - before).abs().max().item()
        told = f"the largest change of a logit is {change:.3g}, of a weight {weights:.3g}"
        if not change <= s.tolerance:
            raise ValueError(f"--merge {folder}: {told}; --tolerance is {s.tolerance:g}: nothing was written")
        base = base_of(folder)
        certificate = {
            "adapter": str(folder), "base": base, "base_sha256": identity_of(base), "data": s.data,
            "logits_compared": before.numel(), "largest_logit": before.abs().max().item(),
            "largest_logit_change": change, "largest_weight_change": weights, "tolerance": s.tolerance,
        }  # fmt: skip
        write_json(beside / "merge.json", certificate)
        print(f"{folder}: {describe(scores)}\nmerged: {describe(evaluate(s, merged, data))}; {told}")
    last = {"lm": "--chat", "chat": "--chat", "images": "--eval", "mlm": "--eval"}.get(s.task, '--sample "..."')
    print(f"next: python train.py --base {out} {last}")


@contextlib.contextmanager
def written_beside(out):
    """A folder beside `out`, whose files replace those of the model in `out` if all goes well; else nothing changes."""
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
    try:
        yield beside
        out.mkdir(parents=True, exist_ok=True)
        runs.clear(out, [*RUN_FILES, *(path.name for path in out.glob("model*.safetensors*"))])
        for path in sorted(beside.iterdir()):  # args.json first, by which a run is known
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_apart(folder, out):
    """Refuses to write over the model that is read, or over its base."""
    base = base_of(folder) if is_adapter(folder) else folder
    if out.resolve() in (folder.resolve(), Path(base).resolve()):
        raise ValueError(f"--out {out}: is the model itself or its base; wanted another place")


CERTIFIED = 2048  # tokens of held-out rows whose logits are compared; with 50,000 classes 400 MB


def certified(data):
    """The first held-out rows, as a batch."""
    batch = next(iter(data.validation()))
    longest = max(x.shape[1] for x in batch.values() if x.dim() > 1)
    return {name: x[: max(1, CERTIFIED // longest)] for name, x in batch.items()}


def is_adapter(folder):
    return (folder / "adapter_config.json").exists()


def check_lora(folder, action):
    """Refuses to merge what is no LoRA."""
    kind = read_json(folder / "adapter_config.json").get("peft_type") if is_adapter(folder) else None
    if kind != "LORA":
        why = f"is a {kind} adapter, which no weights can stand for" if kind else "is no adapter"
        raise ValueError(f"{action}: {folder} {why}; wanted --base to name the folder of a LoRA run")


def merge_into(model, folder, action):
    """Merges the adapter of a folder into the model's own weights; returns the largest change of a weight."""
    check_lora(folder, action)
    if any(isinstance(module, quant.QuantisedLinear) for module in model.modules()):
        quant.dequantise(model)  # into the weights that the adapter was trained over
    return merge_lora(model)


@torch.no_grad()
def outputs_on(s, model, batch):
    """The logits of a batch, on the CPU."""
    model.eval()
    return loss_on(s, model.outputs, batch)[0].float().cpu()


def save_whole(s, model, tokenizer, folder, data=None):
    """A model's folder that transformers opens, tokenizer and chat template included, and a note of what it is for."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(tokenizer, folder)
        special = {f"{name}_token": tokenizer.id_to_token(i) for name, i in specials(model, tokenizer).items()}
        # What AutoTokenizer asks for.
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)
    if s.task == "chat":  # of all else the configuration tells
        write_json(folder / "args.json", {"task": s.task, "data": data, "seq_len": s.seq_len})


def export(s, folder, model, tokenizer, kind, out):
    """--export hf | gguf | torch: a whole model (LoRA is merged first) in a form that other programs open"""
    beside = folder.parent if folder.is_dir() and Path("out").resolve() in folder.resolve().parents else Path("out")
    out = Path(out or beside / f"{folder.name if folder.is_dir() else folder.stem}{EXPORTS[kind]}")
    if out.exists() and not s.overwrite:
        raise ValueError(f"--out {out}: is there already; wanted --overwrite to replace it, or another --out")
    check_apart(folder, out)
    if s.model not in ("gpt", "llama") and not (s.model == "bert" and kind != "gguf"):
        raise ValueError(f"--export {kind}: {folder} is a {s.model}; wanted a gpt or llama, or, but for gguf, a bert")
    if is_adapter(folder):
        print(f"merged: the largest change of a weight is {merge_into(model, folder, '--export'):.3g}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "hf":
        with written_beside(out) as beside:
            save_whole(s, model, tokenizer, beside, learnt_from(folder))
    elif kind == "gguf":
        with tempfile.TemporaryDirectory() as temporary:
            save_whole(s, model, tokenizer, Path(temporary))
            try:
                gguf_format.write_gguf(temporary, out)
            except ValueError as error:  # which names the folder, and that means nothing to the user
                raise ValueError(f"--export gguf: {str(error).replace(temporary, str(folder))}") from None
    else:
        difference = export_torch(model, out)
        print(f"loaded again, its logits differ by {difference:.3g} at most")
    print(f"{out}: written")


def specials(model, tokenizer):
    """{name: id} of the tokens with a part to play, under transformers' names"""
    found = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep", "mask", "unk")}
    found["eos"] = getattr(model.config, "eos_token_id", None)
    return {name: i for name, i in found.items() if i is not None}


EXPORTS = {"hf": "-hf", "gguf": ".gguf", "torch": ".pt2"}  # how what --export writes is called


@torch.no_grad()
def export_torch(model, out):
    """torch.export of ids (B, T) -> logits, batch and length free; returns how much the loaded program differs."""
    for module in model.modules():  # the exported program has to run where our operators are not
        for name in ("attention", "kernel"):
            if getattr(module, name, None) is attention:
                setattr(module, name, torch_attention)
    model.cpu().eval()
    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    sizes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("tokens", min=2, max=context_of(model))}
    program = torch.export.export(model, (ids,), dynamic_shapes={"ids": sizes}, strict=False)
    beside = out.with_name(f".beside-{out.name}")  # torch asks for the ending .pt2
    torch.export.save(program, beside)
    os.replace(beside, out)
    again, other = torch.export.load(out).module(), torch.arange(21).view(3, 7) % model.config.vocab_size
    return (again(other) - model(other)).abs().max().item()


def show_data(data, number):
    """--show-data: rows as the model will read them, what is trained in colour"""
    if not hasattr(data, "tokenizer"):
        raise ValueError("--show-data: images have no tokens; look at the pictures")
    whole = data.own_rows() if hasattr(data, "own_rows") else (("", data.batch(i)) for i in itertools.count())
    rows = ((where, *row) for where, batch in whole for row in rows_of_batch(batch))
    for i, (where, ids, labels, more) in enumerate(itertools.islice(rows, number), 1):
        print(f"--- row {i}{where}: {len(ids)} tokens, {sum(x != -100 for x in labels)} trained{more}")
        print(show_row(ids, labels, data.tokenizer, sys.stdout.isatty()))


def rows_of_batch(batch):
    """(ids, labels, a note) of each row of a batch of any task that has tokens, padding left out"""
    ids = batch["ids" if "ids" in batch else "target"]
    labels = batch.get("labels", ids if "source" not in batch and "mask" not in batch else None)
    for i, row in enumerate(ids.tolist()):
        own = labels[i].tolist() if labels is not None and labels.dim() == 2 else [-100] * len(row)
        real = [bool(x) for x in batch["mask"][i]] if "mask" in batch else [True] * len(row)
        if "documents" in batch:
            numbers, last = batch["documents"][i], max((t for t, x in enumerate(own) if x != -100), default=0)
            real = [t <= last or bool(numbers[t] == numbers[last]) for t in range(len(row))]
        own[0] = -100 if "documents" in batch or "mask" not in batch else own[0]  # nothing asks for the first
        note = f", label {int(labels[i])}" if labels is not None and labels.dim() == 1 else ""
        kept = [t for t in range(len(row)) if real[t]]
        yield [row[t] for t in kept], [own[t] for t in kept], note


METHODS = "full freeze surgical lora dora qlora adapter prefix prompt".split()  # of --finetune all
FLAGS = {"dora": "lora --dora", "qlora": "lora --quantise-base nf4"}  # where the name is not what --finetune takes
OPTIONS = {  # settings of single methods: of which
    name: methods.split()
    for methods, names in {
        "freeze": "top",
        "surgical": "budget",
        "lora": "rank alpha lora_dropout target lora_plus quantise_base rslora dora",
        "adapter": "bottleneck placement",
        "prefix": "prefix_hidden",
        "prefix prompt": "virtual_tokens",
        "distill": "teacher student_layers distill_temperature distill_weights",
    }.items()
    for name in names.split()
}


def check_options(s, given):
    """Refuses a setting of another method than the run's. given: the names on the command line"""
    methods = METHODS if s.finetune == "all" else [s.finetune]
    for name, row in (("dora", "dora"), ("quantise_base", "qlora")):
        if s.finetune == "all" and name in given:
            raise ValueError(
                f"{flag(name)}: --finetune all has a row of its own for that, {row}; wanted --finetune lora"
            )
    for name in vars(s):
        if name in given and not set(OPTIONS.get(name, methods)) & set(methods):
            asked = flag(name) if getattr(s, name) is True else f"{flag(name)} {getattr(s, name)}".removesuffix(".0")
            instead = f" instead of {s.finetune}" if s.finetune else " beside it"
            instead += ", or --sample or --chat" if name == "quantise_base" else ""
            raise ValueError(f"{asked}: wanted --finetune {' or '.join(OPTIONS[name])}{instead}")


def compare(s, given, base):
    """--finetune all: every method from the same base, seed and data, each in a process of its own; then one table."""
    out, rows = Path(s.out), []
    check_free(s, out)
    out.mkdir(parents=True, exist_ok=True)
    runs.clear(out, RUN_FILES)
    kept = [name for name in given if name not in ("finetune", "base", "out", "overwrite")]
    same = {n: flag(n) if getattr(s, n) is True else f"{flag(n)}={getattr(s, n)}" for n in kept}
    for method in METHODS:
        print(f"\n=== {method}", flush=True)
        where = out / method
        taken = [text for n, text in same.items() if FLAGS.get(method, method).split()[0] in OPTIONS.get(n, METHODS)]
        command = [sys.executable, Path(__file__).with_name("train.py"), *taken, "--base", base, "--out", where]
        command += ["--overwrite", "--finetune", *FLAGS.get(method, method).split()]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode > 128:
            raise KeyboardInterrupt
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1].removeprefix("train.py: error: ") if done.stderr.strip() else "?"
            print(f"{method}: {why}")
            rows.append({"method": method, "failed": why})
            continue
        rows.append({"method": method} | row_of_table(where))
    if all("failed" in row for row in rows):
        raise ValueError(f"--finetune all: no method ran; {rows[0]['failed']}")
    write_table(out, rows, [f"base: {base}; seed {s.seed}"])
    if failed := [row["method"] for row in rows if "failed" in row]:
        print(f"train.py: error: --finetune all: failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    return out


def row_of_table(folder):
    """What the table says of a finished run."""
    run, scores = read_json(folder / "args.json"), read_json(folder / "metrics.json")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = [folder / name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).exists()]
    metric = next((x for x in scores if x not in ("task", "data", "val_loss", "baselines")), None)
    return {
        "optimizer": f"{run['settings']['optimizer']} {run['settings']['lr']:g}", "trainable": run["trained"],
        "seconds": run["elapsed"], "peak_mb": max(x["peak_memory_mb"] for x in logged),
        "file_mb": files[0].stat().st_size / 2**20, "val_loss_before": run["before"]["val_loss"],
        "val_loss": scores["val_loss"], "metric_name": metric, "metric_before": run["before"].get(metric),
        "metric": scores.get(metric),
    }  # fmt: skip


def write_table(out, rows, notes):
    """table.md, table.json and table.png; prints the table. The base's scores are those before LoRA, say, trains."""
    first = next((row for row in rows if row["method"] == "lora" and "failed" not in row), None)
    first = first or next(row for row in rows if "failed" not in row)
    metric = first["metric_name"]
    head = ["method", "optimiser, rate", "trained", "seconds", "peak MB", "file MB", "validation loss", metric or ""]
    base = ["base", *[""] * 5, f"{first['val_loss_before']:.4f}", f"{first['metric_before']:.4f}" if metric else ""]
    cells = [head, ["---"] * len(head), base]
    for row in rows:
        if "failed" in row:
            cells.append([row["method"], f"failed: {row['failed']}", *[""] * 6])
            continue
        cells.append([row["method"], row["optimizer"], f"{row['trainable']:,}", f"{row['seconds']:.0f}",
                      f"{row['peak_mb']:,.0f}", f"{row['file_mb']:.2f}", f"{row['val_loss']:.4f}",
                      f"{row['metric']:.4f}" if metric else ""])  # fmt: skip
    text = "".join("| " + " | ".join(line) + " |\n" for line in cells) + "\n" + "\n".join(notes) + "\n"
    print("\n" + text)
    write_beside(out / "table.md", lambda beside: beside.write_text(text, encoding="utf-8"))
    write_json(out / "table.json", {"rows": rows, "notes": notes})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes, ok = figure.subplots(), [row for row in rows if "failed" not in row]
    for row in ok:
        axes.plot(row["trainable"], row["val_loss"], "o")
        axes.annotate(row["method"], (row["trainable"], row["val_loss"]), (4, 4), textcoords="offset points")
    axes.axhline(first["val_loss_before"], linestyle=":", color="grey")
    axes.set(xlabel="parameters that train", ylabel="validation loss, nats", xscale="log")
    write_beside(out / "table.png", lambda beside: figure.savefig(beside, format="png", bbox_inches="tight"))
