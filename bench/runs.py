# SPDX-License-Identifier: MIT
"""How long the default runs of train.py take, as whole processes: `python bench/runs.py`.

    python train.py                     limits that were set for two cores: 150 s, the first step within 25 s
    python train.py --finetune lora     on top of it: 90 s
    MINIMAL_FUSED=0 python train.py     the first again with PyTorch's own attention instead of the fused one

There is no peer here; the losses before and after stand beside the times. Prints a table, writes bench/runs.json.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import report
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(flags, folder, fused=True):
    """-> {total seconds, seconds to the end of the first step and in training, losses}"""
    started, first, said = time.perf_counter(), None, []
    command = [sys.executable, "-u", ROOT / "train.py", *flags, "--log-every", "1"]
    environment = os.environ | ({} if fused else {"MINIMAL_FUSED": "0"})
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 1/"):
            first = time.perf_counter() - started
    if process.wait():
        raise SystemExit("".join(said))
    found = re.findall(r"^(?:before|after): validation loss ([\d.]+), ([\d.]+) bits", "".join(said), re.M)
    log = json.loads((folder / "out" / ("gpt-lora" if flags else "gpt") / "args.json").read_text())
    return {
        "command": " ".join([*([] if fused else ["MINIMAL_FUSED=0"]), "python train.py", *flags]),
        "seconds": round(time.perf_counter() - started, 1),
        "first_step_s": round(first, 1), "training_s": round(log["elapsed"], 1),
        "bits_per_byte_before": float(found[0][1]), "bits_per_byte_after": float(found[-1][1]),
    }  # fmt: skip


def main():
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(flags, pathlib.Path(folder)) for flags in ([], ["--finetune", "lora"])]
    with tempfile.TemporaryDirectory() as folder:
        rows.append(run([], pathlib.Path(folder), fused=False))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'':36}  seconds  first step  training  bits per byte before, after")
    for r in rows:
        bits = f"{r['bits_per_byte_before']:.3f}  {r['bits_per_byte_after']:.3f}"
        print(f"{r['command']:36}  {r['seconds']:7.0f}  {r['first_step_s']:10.1f}  {r['training_s']:8.1f}  {bits:>26}")
    report.write("runs", {"runs": rows})


if __name__ == "__main__":
    main()
