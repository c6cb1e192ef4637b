# SPDX-License-Identifier: MIT
"""From the command to the end of the first training step, beside transformers' Trainer: `python bench/start.py`.

    ours      python train.py, its default GPT, on a text that a run beside it has prepared: the text is hashed to see
              that it is the same, and the tokens of that run are taken
    theirs    transformers' Trainer on a GPT2LMHeadModel of the same sizes, on the same tokens, memory-mapped, in
              batches of the same size; without dropout, evaluation, reports and anything saved
    bare      the same where Trainer does not find the packages that it imports if they are there, and that it does not
              need here (OPTIONAL): as if transformers and accelerate had been installed alone
    torch     `import torch` and nothing else, which all need; the last table is of what comes on top of it

On the CPU, in float32. Whole processes in turns: seconds from just before the process starts to the line that it prints
when the step is done, at which it is ended. Before the rounds each starts once untimed, so that files are in memory and
byte-compiled; the first of ours prepares the text, and its seconds are printed. Medians over --rounds; the ratio is the
median of theirs over ours in the same round, above 1 where we are sooner. pip install transformers accelerate.
Prints a table, writes bench/start.json; takes four minutes.
"""

import argparse
import importlib.metadata
import json
import operator
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import SIZES  # noqa: E402

TORCH = "import torch; print('step 1')"
OPTIONAL = ("datasets", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "sklearn", "torchvision")
HIDDEN = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {OPTIONAL} else find(name, *rest)
"""
THEIRS = """
import json, sys
import numpy, torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

tokens, config, batch, out = sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4]
ids = numpy.load(tokens, mmap_mode="r")
T = config["n_positions"]

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ids) // T
    def __getitem__(self, i):
        row = torch.from_numpy(ids[i * T : (i + 1) * T].astype("int64"))
        return {"input_ids": row, "labels": row}

class Told(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)

off = dict(bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
model = GPT2LMHeadModel(GPT2Config(**config, **off))
how = dict(use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
arguments = TrainingArguments(out, max_steps=330, per_device_train_batch_size=batch, learning_rate=1e-3, **how)
Trainer(model, arguments, train_dataset=Rows(), callbacks=[Told()]).train()
"""


def first_step(command, threads):
    """Seconds from before a process starts to its line "step 1...", at which it is ended."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile("w+") as errors:
        started, said = time.perf_counter(), []
        pipes = dict(stdout=subprocess.PIPE, stderr=errors, text=True)
        with subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes) as process:
            for line in process.stdout:
                said.append(line)
                if line.startswith("step 1"):
                    seconds = time.perf_counter() - started
                    process.kill()
                    return seconds
        errors.seek(0)
        raise SystemExit("".join(said) + errors.read() + f"ended before its first step: {command[:3]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", help="the text; default: train.py's own, the standard library's source")
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    print(f"{args.threads} threads, " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder, "prepared")
        flags = [
            "--log-every",
            1,
            "--device",
            "cpu",
            "--overwrite",
            *(["--data", os.path.abspath(args.data)] if args.data else []),
        ]
        ours = [ROOT / "train.py", *flags, "--out"]
        first = first_step([*ours, prepared], args.threads)
        print(f"ours for the first time, the text prepared and train.py byte-compiled: {first:.1f} s")
        run = json.loads((prepared / "args.json").read_text())["settings"]
        vocabulary = json.loads((prepared / "tokenizer.json").read_text())["model"]["vocab"]
        layers, heads, width = SIZES[run["size"]]
        sizes = dict(vocab_size=len(vocabulary), n_positions=run["seq_len"], n_embd=width, n_layer=layers, n_head=heads)
        rest = [prepared / "state" / "train.npy", json.dumps(sizes), run["batch_size"], pathlib.Path(folder, "theirs")]
        commands = {
            "ours": [*ours, pathlib.Path(folder, "ours")],
            "theirs": ["-c", THEIRS, *rest],
            "bare": ["-c", HIDDEN + THEIRS, *rest],
            "torch": ["-c", TORCH],
        }
        for command in commands.values():
            first_step(command, args.threads)
        rounds = [{name: first_step(c, args.threads) for name, c in commands.items()} for _ in range(args.rounds)]
    rows = {}
    print(
        f"{'seconds to the end of the first step':38} {'ours':>7} {'theirs':>7} {'ratio':>6} {'bare':>7} {'ratio':>6}"
    )
    for what, less in ("whole processes", 0), ("less import torch", 1):
        seconds = {n: [r[n] - less * r["torch"] for r in rounds] for n in ("ours", "theirs", "bare")}
        ratio = {n: statistics.median(map(operator.truediv, seconds[n], seconds["ours"])) for n in ("theirs", "bare")}
        a, b, c = (statistics.median(s) for s in seconds.values())
        print(f"{what:38} {a:7.2f} {b:7.2f} {ratio['theirs']:6.2f} {c:7.2f} {ratio['bare']:6.2f}")
        rows[what] = dict(ours=a, theirs=b, bare=c, ratio=ratio)
    torch_s = statistics.median(r["torch"] for r in rounds)
    print(f"{'import torch':38} {torch_s:7.2f}")
    facts = dict(threads=args.threads, **versions, unprepared_s=first, import_torch_s=torch_s, **rows)
    import report

    report.write("start", facts | {"rounds": rounds})


if __name__ == "__main__":
    main()
