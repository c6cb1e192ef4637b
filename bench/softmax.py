# SPDX-License-Identifier: MIT
"""How fast fused softmax is beside torch.softmax, forward and backward, over rows of 64 to 50,000 numbers.

    python bench/softmax.py                                    # float32, one thread and two
    python bench/softmax.py --threads 2 --dtype bfloat16

Measured as in bench/attention.py: in turns, medians of ratios, the cases that we lose are marked. GB/s counts what must
move: one read and one write forward, two reads and one write backward. Prints tables and writes bench/softmax.json.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from minimal import fused  # noqa: E402

WIDTHS = [64, 256, 1024, 4096, 16_384, 50_000]
NUMBERS = 4_000_000  # in a tensor: 16 MB of float32, past a second-level cache


def seconds(f, calls):
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def in_turns(ours, theirs, rounds):
    """Medians: our seconds, their seconds, and theirs over ours taken round by round."""
    calls = max(1, round(0.02 / max(seconds(ours, 2), seconds(theirs, 2))))  # about 20 ms a turn
    pairs = [(seconds(ours, calls), seconds(theirs, calls)) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def measure(width, dtype, rounds):
    x = torch.randn(max(1, NUMBERS // width), width).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    forward, backward = [], []
    for f in (fused.softmax, lambda x: torch.softmax(x, -1)):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        forward.append(lambda f=f: f(x))
        backward.append(lambda y=y, leaf=leaf: torch.autograd.grad(y, leaf, grad, retain_graph=True))
    row = {}
    for name, calls, moved in (("forward", forward, 2), ("backward", backward, 3)):
        ours, theirs, ratio = in_turns(*calls, rounds)
        gigabytes = moved * x.nbytes / 1e9
        row[name] = {"ours_gb_per_s": gigabytes / ours, "theirs_gb_per_s": gigabytes / theirs, "ratio": ratio}
    return row


def processor():
    try:
        return re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=21, help="turns that the medians are taken over (default 21)")
    args = parser.parse_args()
    if not fused.available():
        sys.exit(f"bench/softmax.py needs the fused operators, but they are {fused.why_not()}")

    C = sys.modules["minimal._C"]
    about = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "compiler": C.compiler}
    about |= {"instruction_set": C.instruction_set(), "rounds": args.rounds}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    torch.manual_seed(0)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            print(f"\n{dtype}, {threads} thread{'s' * (threads > 1)}: GB/s, ours and theirs; ours over theirs")
            print(f"{'row length':>10}   {'forward':>22}   {'backward':>22}")
            for width in WIDTHS:
                row = measure(width, getattr(torch, dtype), args.rounds)
                rows.append({"width": width, "threads": threads, "dtype": dtype, **row})
                cells = []
                for c in (row["forward"], row["backward"]):
                    mark = " " if c["ratio"] >= 1 else "<"
                    cells.append(f"{c['ours_gb_per_s']:6.1f} {c['theirs_gb_per_s']:6.1f} {c['ratio']:5.2f} {mark}")
                print(f"{width:>10}", *cells, sep="   ", flush=True)
    print("(<: we are slower)")
    temporary = HERE / "softmax.json.tmp"
    temporary.write_text(json.dumps({"about": about, "numbers": NUMBERS, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, HERE / "softmax.json")
    print(f"\nwrote {HERE.name}/softmax.json")


if __name__ == "__main__":
    main()
