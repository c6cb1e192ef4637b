# SPDX-License-Identifier: MIT
"""How fast linear layers in few bits are, in SmolLM2-135M's shapes: `python bench/linear.py`, some minutes.

    one row     bytes of codes and constants read a second with one row of x, beside torch.sum of as many bytes: 1.0 is
                as fast as memory. Each call takes another copy of the weight, 300 MB in all: caches do not help.
                `calls` is what a call costs before any reading: the time for a layer of 16 outputs
    many rows   seconds of a product with 512 rows (the weights in few bits unpacked, panel by panel) over F.linear's
                with a float32 weight; gradients are the same product
    unpack      float32 numbers a second that come of the codes, beside a copy of as many

x rounded: the activations become 8-bit integers (minimal/fused_linear.py says what that costs in precision).
The contenders take turns; medians of ratios. Writes bench/linear.json.
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
import torch.nn.functional as F  # noqa: E402

from minimal import fused_linear  # noqa: E402

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)]  # (O, C)
CONTENDERS = [("float32", False), ("bfloat16", False), ("int8", True), ("int8", False), ("int4", True), ("int4", False)]
CONTENDERS += [("nf4", False)]  # (kind, whether x is rounded)
TOTAL = 300e6  # bytes of all copies


def seconds(f, calls=1):
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def in_turns(rounds, *contenders):
    """-> the contenders' seconds in each round: [contender][round]."""
    for f in contenders:
        f()
    return list(zip(*[[seconds(f) for f in contenders] for _ in range(rounds)], strict=True))


def ratio(above, below):
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def random_parts(kind, O, C):
    """Codes of every value and constants of a usual size: speed does not depend on them."""
    groups, n = -(-C // 32), -(-O * C // 64)
    if kind == "float32":
        return {"weight": torch.randn(O, C)}
    if kind == "bfloat16":
        return {"weight": torch.randn(O, C).bfloat16()}
    if kind == "int8":
        return {"codes": torch.randint(-127, 128, (O, C), dtype=torch.int8), "scale": torch.rand(O)}
    if kind == "int4":
        codes = torch.randint(0, 256, (O, groups, 16), dtype=torch.uint8)
        return {"codes": codes, "scale": torch.rand(O, groups).half(), "least": -torch.rand(O, groups).half()}
    parts = {"codes": torch.randint(0, 256, (32 * n,), dtype=torch.uint8)}
    parts |= {"absmax": torch.randint(-127, 128, (n,), dtype=torch.int8), "scale": torch.rand(-(-n // 256)) / 127}
    return parts | {"mean": torch.ones(1)}


def product(x, kind, shape, parts, rounded):
    if kind == "float32":
        return F.linear(x, parts["weight"])
    return fused_linear.linear(x, kind, shape, dynamic=rounded, **parts)


def one_row(kind, shape, rounded, rounds):
    parts = random_parts(kind, *shape)
    size = sum(t.nbytes for t in parts.values())
    copies = [{name: t.clone() for name, t in parts.items()} for _ in range(max(2, round(TOTAL / size)))]
    x, plain = torch.randn(1, shape[1]), torch.ones(size * len(copies) // 4)
    few = random_parts(kind, 16, shape[1])

    def ours():
        for copy in copies:
            product(x, kind, shape, copy, rounded)

    def call():
        for _ in range(len(copies)):
            product(x, kind, (16, shape[1]), few, rounded)

    taken, read, empty = in_turns(rounds, ours, plain.sum, call)
    gigabytes = size * len(copies) / 1e9
    return {
        "gb_per_s": gigabytes / statistics.median(taken),
        "of_reading": ratio(read, taken),
        "us": statistics.median(taken) / len(copies) * 1e6,
        "call_us": statistics.median(empty) / len(copies) * 1e6,
    }


def many_rows(kind, shape, rounds, N=512):
    parts, W, x = random_parts(kind, *shape), torch.randn(shape), torch.randn(N, shape[1])
    ours, theirs = in_turns(rounds, lambda: product(x, kind, shape, parts, False), lambda: F.linear(x, W))
    return ratio(ours, theirs)


def unpacked(kind, shape, rounds):
    parts, W = random_parts(kind, *shape), torch.randn(shape)
    ours, copy = in_turns(3 * rounds, lambda: fused_linear.unpack(kind, shape, **parts), W.clone)
    return W.numel() / statistics.median(ours) / 1e9, ratio(copy, ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="turns that the medians are taken over (default 9)")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "linear.json")
    args = parser.parse_args()
    if not fused_linear.available():
        sys.exit(f"bench/linear.py needs the fused operators, but they are {fused_linear.why_not()}")

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
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            print(f"\n{threads} thread{'s' * (threads > 1)}; one row: GB/s, of reading, us (calls); many rows; unpack")
            for kind, rounded in CONTENDERS:
                for shape in SHAPES:
                    row = {"kind": kind, "rounded": rounded, "shape": shape, "threads": threads}
                    row |= one_row(kind, shape, rounded, args.rounds)
                    cells = f"{row['gb_per_s']:6.1f} {row['of_reading']:5.2f} {row['us']:8.1f} ({row['call_us']:4.1f})"
                    if kind != "float32" and not rounded:
                        row["many_rows"] = many_rows(kind, shape, args.rounds)
                        cells += f"   {row['many_rows']:5.2f}"
                        row["unpack_g_per_s"], row["unpack_of_copy"] = unpacked(kind, shape, args.rounds)
                        cells += f"   {row['unpack_g_per_s']:5.2f} {row['unpack_of_copy']:5.2f}"
                    name = f"{kind}{', x rounded' * rounded}"
                    print(f"{name:>17} {shape[1]:>5} -> {shape[0]:<5}  {cells}", flush=True)
                    rows.append(row)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": about, "bytes": TOTAL, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, args.output)
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
