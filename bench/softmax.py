# SPDX-License-Identifier: MIT
"""How fast fused softmax is beside torch.softmax and beside a copy, over rows of 64 to 50,000 numbers.

    python bench/softmax.py                                    # one thread and two, float32 and bfloat16
    python bench/softmax.py --threads 2 --dtype bfloat16

`masked` is softmax(scale x + mask) with an additive mask of a row, against the same in PyTorch. `of copy` is the rate
at which a call moves what it must, one read and one write forward, two reads and one write backward, over the rate of
torch.empty_like(x).copy_(x) in the same rounds: 1.0 is as fast as memory. A tensor has 28 MB, as larger ones
are mapped anew by the C library for each call, and then every contender waits for the kernel's page faults.

The contenders take turns; medians of ratios; the cases that we lose are marked. Writes bench/softmax.json.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import report  # noqa: E402
import torch  # noqa: E402

from minimal import fused  # noqa: E402

WIDTHS = [64, 256, 1024, 4096, 16_384, 50_000]
BYTES = 28_000_000  # of a tensor


def seconds(f, calls):
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def in_turns(rounds, *contenders):
    """-> the contenders' seconds in each round, [contender][round]: each is called for about 10 ms a turn."""
    calls = [max(1, round(0.01 / seconds(f, 2))) for f in contenders]
    return [
        *zip(*[[seconds(f, n) for f, n in zip(contenders, calls, strict=True)] for _ in range(rounds)], strict=True)
    ]


def ratio(above, below):
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measure(width, dtype, masked, rounds):
    x = torch.randn(max(1, BYTES // dtype.itemsize // width), width).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    mask = torch.randn(width).to(dtype)
    paths = (
        (lambda x: fused.softmax(x, scale=0.125, mask=mask), lambda x: torch.softmax(0.125 * x + mask, -1))
        if masked
        else (fused.softmax, lambda x: torch.softmax(x, -1))
    )
    forward, backward = [], []
    for f in paths:
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        forward.append(lambda f=f: f(x))
        backward.append(lambda y=y, leaf=leaf: torch.autograd.grad(y, leaf, grad, retain_graph=True))
    row = {}
    for name, calls, moved in (("forward", forward, 2), ("backward", backward, 3)):
        ours, theirs, copy = in_turns(rounds, *calls, lambda: torch.empty_like(x).copy_(x))
        gigabytes = moved * x.nbytes / 1e9
        row[name] = {
            "ours_gb_per_s": gigabytes / statistics.median(ours),
            "theirs_gb_per_s": gigabytes / statistics.median(theirs),
            "ratio": ratio(theirs, ours),
            "of_copy": ratio(copy, ours) * moved / 2,
        }
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15, help="turns that the medians are taken over (default 15)")
    args = parser.parse_args()
    if not fused.available():
        sys.exit(f"bench/softmax.py needs the fused operators, but they are {fused.why_not()}")

    C = sys.modules["minimal._C"]
    about = {
        "processor": report.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "compiler": C.compiler,
    }
    about |= {"instruction_set": C.instruction_set(), "rounds": args.rounds}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    torch.manual_seed(0)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            print(f"\n{dtype}, {threads} thread{'s' * (threads > 1)}: GB/s, ours and theirs; ours over theirs; of copy")
            print(f"{'row length':>17}   {'forward':>28}   {'backward':>28}")
            for width in WIDTHS:
                for masked in (False, True):
                    row = measure(width, getattr(torch, dtype), masked, args.rounds)
                    rows.append({"width": width, "masked": masked, "threads": threads, "dtype": dtype, **row})
                    cells = []
                    for c in (row["forward"], row["backward"]):
                        mark = " " if c["ratio"] >= 1 else "<"
                        gb = f"{c['ours_gb_per_s']:6.1f} {c['theirs_gb_per_s']:6.1f}"
                        cells.append(f"{gb} {c['ratio']:5.2f} {mark} {c['of_copy']:5.2f}")
                    print(f"{width:>10}{' masked' * masked:>7}", *cells, sep="   ", flush=True)
    print("(<: we are slower)")
    temporary = HERE / "softmax.json.tmp"
    temporary.write_text(json.dumps({"about": about, "bytes": BYTES, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, HERE / "softmax.json")
    print(f"\nwrote {HERE.name}/softmax.json")


if __name__ == "__main__":
    main()
