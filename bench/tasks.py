# SPDX-License-Identifier: MIT
"""How well and how fast every default run of a task ends, beside its baselines: `python bench/tasks.py`.

Whole processes, one after the other in one folder, as a user would type them, with their default data: what Python's
installation holds. Limits set for two cores: 180 s a run. Two comparisons decide whether a method is worth its place:

    fine-tuning      BERT on areas of the standard library from its own pretraining, and the same model from scratch,
                     for as many steps on the same batches
    distillation     a GPT of half the blocks with its teacher's soft targets, and the same student on the text alone,
                     from the same blocks of the teacher, for as many steps on the same batches; and so for classes

Prints a table and writes bench/tasks.json. Takes 20 minutes; `--only rnn classify` runs a part, and replaces that part.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import report
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {  # name: flags, and the score to look at
    "rnn": ("--model rnn", "bits_per_byte"),
    "bert": ("--model bert", "val_loss"),
    "classify-scratch": ("--task classify", "accuracy"),
    "classify": ("--task classify --finetune full", "accuracy"),
    "tag": ("--task tag", "macro_f1"),
    "qa": ("--task qa", "f1"),
    "seq2seq": ("--task seq2seq", "chrf"),
    "gpt": ("", "bits_per_byte"),
    "distill": ("--finetune distill --teacher out/gpt", "bits_per_byte"),
    "distill-alone": ("--finetune distill --teacher out/gpt --distill-weights 0,1,0", "bits_per_byte"),
    "teacher": ("--task classify --finetune full --steps 800", "accuracy"),
    "distill-classify": ("--task classify --finetune distill --teacher out/teacher --student-layers 1", "accuracy"),
    "distill-classify-alone": (
        "--task classify --finetune distill --teacher out/teacher --student-layers 1 --distill-weights 0,1,0",
        "accuracy",
    ),
    "classify-freeze": ("--task classify --finetune freeze", "accuracy"),
    "classify-lora": ("--task classify --finetune lora", "accuracy"),
}
PAIRS = [("classify", "classify-scratch"), ("distill", "distill-alone"),
         ("distill-classify", "distill-classify-alone")]  # fmt: skip
LIMIT = 180  # seconds that a default run may take
NEEDS = {"classify": ["bert"], "classify-freeze": ["bert"], "classify-lora": ["bert"], "teacher": ["bert"],
         "distill": ["gpt"], "distill-alone": ["gpt"], "distill-classify": ["bert", "teacher"],
         "distill-classify-alone": ["bert", "teacher"]}  # fmt: skip


def run(name, folder):
    """-> {command, seconds, training seconds, parameters, the scores of metrics.json}"""
    flags, score = RUNS[name]
    command = [sys.executable, ROOT / "train.py", *flags.split(), "--out", f"out/{name}"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    scores = json.loads((folder / "out" / name / "metrics.json").read_text())
    log = json.loads((folder / "out" / name / "args.json").read_text())
    row = {"command": f"python train.py {flags}", "seconds": round(seconds, 1), "training_s": round(log["elapsed"], 1)}
    return row | {"steps": log["settings"]["steps"], "best_step": log["best_step"], "score": score, "scores": scores}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    only = parser.parse_args().only
    names = [name for name in RUNS if name in only or any(name in NEEDS.get(other, ()) for other in only)]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{os.cpu_count()} cores, torch {torch.__version__}")
        for name in names:
            rows[name] = row = run(name, pathlib.Path(folder))
            found = {"ours": row["scores"], **row["scores"]["baselines"]}
            told = ", ".join(f"{who} {values[row['score']]:.4g}" for who, values in found.items())
            slow = ": over 180 s" if row["seconds"] > LIMIT else ""
            print(f"{row['command']}: {row['seconds']:.0f} s{slow}; {row['score']}: {told}", flush=True)
        for a, b in ((a, b) for a, b in PAIRS if a in rows and b in rows):
            name = RUNS[a][1]
            ours, other = (rows[x]["scores"][name] for x in (a, b))
            wins = (ours < other) == (name in ("val_loss", "bits_per_byte")) and ours != other
            print(f"{a} {ours:.4g} {'beats' if wins else 'LOSES TO'} {b} {other:.4g} ({name})")
    known = report.read("tasks").get("runs", {})  # a part replaces its rows alone
    report.write("tasks", {"runs": {name: rows.get(name) or known[name] for name in RUNS if name in rows | known}})


if __name__ == "__main__":
    main()
