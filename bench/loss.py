# SPDX-License-Identifier: MIT
"""Time and memory of linear_cross_entropy beside three ways to the same loss, forward and backward, float32.

    python bench/loss.py                     # two threads, under 3 minutes
    python bench/loss.py --threads 1 --rounds 9

Peers: "plain" is F.cross_entropy(F.linear(x, weight)). On the first case also "checkpoint", the same by 512 rows under
torch.utils.checkpoint, which forms the logits twice, and "torch", PyTorch's own F.linear_cross_entropy in chunks (since
2.13; with its default options).

Time: all take turns, in an order that turns too; medians, and medians of theirs over ours taken round by round. Memory:
each in a process of its own, the peak of the resident set during one forward and backward less what was resident
before. So inputs and parameters are not counted; logits are, and so are the gradients of x and weight that are the
result. "Beyond" leaves these out, for both sides. (Linux only: the peak is reset through /proc.)

Prints tables and writes bench/loss.json.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import report  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from minimal.loss import linear_cross_entropy  # noqa: E402

CASES = {  # name: classes, rows, channels, whether the weight trains, share of rows ignored
    "large vocabulary": (50_000, 2048, 576, True, 0.0),
    "frozen weight": (50_000, 2048, 576, False, 0.0),
    "3/4 ignored": (50_000, 2048, 576, True, 0.75),
    "medium vocabulary": (4096, 2048, 192, True, 0.0),
    "characters": (65, 2048, 128, True, 0.0),
}


def plain(x, weight, y):
    return F.cross_entropy(F.linear(x, weight), y, reduction="sum")


def checkpointed(x, weight, y):
    parts = zip(x.split(512), y.split(512), strict=True)
    return sum(checkpoint(plain, a, weight, b, use_reentrant=False) for a, b in parts)


def pytorch(x, weight, y):
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, y, reduction="sum", ignore_index=-100, options=options)


WAYS = {"ours": lambda x, weight, y: linear_cross_entropy(x, weight, y)[0], "plain": plain, "checkpoint": checkpointed}
if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
    WAYS["torch"] = pytorch


def step(way, V, N, C, trains, ignored):
    """A function that does one forward and backward, and returns the gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) / C**0.5).requires_grad_(trains)
    y = torch.randint(V, (N,), generator=generator)
    y[: int(ignored * N)] = -100
    count = (y != -100).sum()

    def run():
        x.grad = weight.grad = None
        (way(x, weight, y) / count).backward()
        return x.grad, weight.grad

    return run


def resident(which):
    kilobytes = re.search(which + r":\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
    return int(kilobytes) * 1024


def measure_memory(way, case, threads):
    """In this process: bytes at the peak of one step, less those before it."""
    torch.set_num_threads(threads)
    step(WAYS[way], 64, 2048, 16, *CASES[case][3:])()  # libraries, threads and their buffers are there before
    run = step(WAYS[way], *CASES[case])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def memory(way, case, threads):
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", way, case]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def measure_time(case, ways, rounds):
    """Seconds of every way, round by round."""
    runs, gradients, slowest = {way: step(WAYS[way], *CASES[case]) for way in ways}, [], 0.0
    for run in runs.values():
        start = time.perf_counter()
        gradients.append(run())
        slowest = max(slowest, time.perf_counter() - start)
        for a, b in zip(gradients[0], gradients[-1], strict=True):
            if a is not None and (a - b).norm() > 1e-4 * a.norm():
                sys.exit("bench/loss.py: the gradients differ: nothing to compare")
    del gradients, a, b
    calls, rounds = max(1, round(0.05 / slowest)), rounds if slowest > 0.5 else 5 * rounds
    seconds = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            start = time.perf_counter()
            for _ in range(calls):
                runs[way]()
            seconds[way].append((time.perf_counter() - start) / calls)
    return seconds


def cell(value, ratio):
    return f"{value:8.1f} {ratio:6.2f} {'<' if ratio < 1 else ' '}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns per way; three times as many where one is short")
    parser.add_argument("--memory-of", nargs=2, metavar=("WAY", "CASE"), help="print one peak in bytes and stop")
    args = parser.parse_args()
    if args.memory_of:
        return print(measure_memory(*args.memory_of, args.threads))

    torch.set_num_threads(args.threads)
    about = {
        "processor": report.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    about |= {"dtype": "float32", "rounds": args.rounds}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows = []
    for case, (V, N, C, trains, ignored) in CASES.items():
        ways = list(WAYS) if not rows else ["ours", "plain"]
        seconds = measure_time(case, ways, args.rounds)
        peaks = {way: memory(way, case, args.threads) for way in ways}
        gradients = 4 * (N * C + V * C * trains)  # bytes
        print(f"\n{case}: {V} classes, {N} rows, {ignored:.0%} ignored, {C} channels; beside figures theirs over ours")
        print(f"{'':>10}  {'ms':>17}  {'peak MB':>17}  {'MB beyond':>17}")
        for way in ways:
            row = {"case": case, "classes": V, "rows": N, "channels": C, "weight_trains": trains, "ignored": ignored}
            row |= {"way": way, "seconds": statistics.median(seconds[way])}
            pairs = zip(seconds[way], seconds["ours"], strict=True)
            row["time_ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
            cells = [cell(row["seconds"] * 1e3, row["time_ratio"])]
            if None not in peaks.values():
                for name, less in (("memory", 0), ("memory_beyond_gradients", gradients)):
                    row[f"{name}_bytes"] = peaks[way] - less
                    row[f"{name}_ratio"] = (peaks[way] - less) / max(1, peaks["ours"] - less)
                    cells.append(cell(row[f"{name}_bytes"] / 1e6, row[f"{name}_ratio"]))
            rows.append(row)
            print(f"{way:>10}", *cells, sep="  ", flush=True)
    print("\n(<: we are slower, or need more)")
    first = rows[1]  # plain, of the first case
    for name, ratio, least in (("memory", first.get("memory_ratio", 0), 4), ("time", first["time_ratio"], 1 / 1.15)):
        print(f"{name} of plain over ours, {first['case']}: {ratio:.2f}, wanted at least {least:.2f}"
              f"{'' if ratio >= least else ': MISSED'}")  # fmt: skip
    temporary = HERE / "loss.json.tmp"
    temporary.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, HERE / "loss.json")
    print(f"wrote {HERE.name}/loss.json")


if __name__ == "__main__":
    main()
