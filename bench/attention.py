# SPDX-License-Identifier: MIT
"""How fast fused attention is beside F.scaled_dot_product_attention, forward and backward, and what memory it takes.

    python bench/attention.py                                  # float32, one thread and two
    python bench/attention.py --threads 2 --dtype bfloat16 --rounds 31

Both run in this process in turns, a b a b ..., because a machine drifts by tens of per cent over minutes: the ratio is
the median over the rounds of theirs over ours, so above 1 we are faster, and the cases that we lose are marked. Their
backward pass is timed alone, on a graph that is kept. Prints tables and writes bench/attention.json.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from minimal import fused  # noqa: E402

SHAPES = [(12, 4, 64, 32), (8, 6, 256, 64), (4, 9, 512, 64), (1, 12, 1024, 64), (2, 4, 512, 128)]  # (B, H, T, D)
MEMORY_SHAPE = (1, 8, 4096, 64)


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


def measure(shape, causal, dtype, rounds):
    q, k, v = (torch.randn(shape, dtype=dtype) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype)
    paths = {
        "ours": lambda q, k, v: fused.attention(q, k, v, causal=causal),
        "theirs": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }
    forward, backward = {}, {}
    for name, f in paths.items():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = f(*inputs)
        forward[name] = lambda f=f: f(q, k, v)
        backward[name] = lambda out=out, inputs=inputs: torch.autograd.grad(out, inputs, grad, retain_graph=True)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(forward["ours"](), forward["theirs"](), rtol=tolerance, atol=tolerance)
    for a, b in zip(backward["ours"](), backward["theirs"](), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    row = {}
    for name, calls in (("forward", forward), ("backward", backward)):
        ours, theirs, ratio = in_turns(calls["ours"], calls["theirs"], rounds)
        row[name] = {"ours_ms": 1e3 * ours, "theirs_ms": 1e3 * theirs, "ratio": ratio}
    return row


def memory(path):
    """MB that forward and backward need beside the inputs, at the peak: run in a process of its own."""
    attend = {
        "fused": lambda q, k, v: fused.attention(q, k, v, causal=True),
        "scaled_dot_product_attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "plain PyTorch": lambda q, k, v: fused._plain_attention(q, k, v, True, None, q.shape[-1] ** -0.5),
    }[path]

    def status(field):
        return int(re.search(field + r":\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

    small = [torch.randn(1, 1, 8, 64, requires_grad=True) for _ in range(3)]
    attend(*small).sum().backward()  # loads what is loaded late
    q, k, v = (torch.randn(MEMORY_SHAPE, requires_grad=True) for _ in range(3))
    grad = torch.randn(MEMORY_SHAPE)
    before = status("VmRSS")
    attend(q, k, v).backward(grad)
    return status("VmHWM") - before


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
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory(args.memory_of))
        return
    if not fused.available():
        sys.exit(f"bench/attention.py needs the fused operators, but they are {fused.why_not()}")

    C = sys.modules["minimal._C"]
    about = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "compiler": C.compiler}
    about |= {"instruction_set": C.instruction_set(), "rounds": args.rounds}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    torch.manual_seed(0)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            print(f"\n{dtype}, {threads} thread{'s' * (threads > 1)}: milliseconds, ours and theirs; theirs over ours")
            print(f"{'B, H, T, D':>18}  {'causal':>6}   {'forward':>26}   {'backward':>26}")
            for shape in SHAPES:
                for causal in (False, True):
                    row = measure(shape, causal, getattr(torch, dtype), args.rounds)
                    rows.append({"shape": shape, "causal": causal, "threads": threads, "dtype": dtype, **row})
                    cells = [
                        f"{c['ours_ms']:8.3f} {c['theirs_ms']:8.3f} {c['ratio']:5.2f} {' ' if c['ratio'] >= 1 else '<'}"
                        for c in (row["forward"], row["backward"])
                    ]
                    case = f"{', '.join(map(str, shape)):>18}  {'yes' if causal else 'no':>6}"
                    print(case, *cells, sep="   ", flush=True)
    print("(<: we are slower)")

    peaks = {}
    if sys.platform.startswith("linux"):
        inputs = 3 * 4 * torch.Size(MEMORY_SHAPE).numel() / 2**20
        print(f"\npeak memory of forward and backward beside q, k, v ({inputs:.0f} MB), {MEMORY_SHAPE}, causal:")
        for path in ("fused", "scaled_dot_product_attention", "plain PyTorch"):
            command = [sys.executable, str(HERE / "attention.py"), "--memory-of", path]
            peaks[path] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"  {path:<30} {peaks[path]:8.0f} MB")

    result = {"about": about, "rows": rows, "peak_memory_mb": {"shape": MEMORY_SHAPE, **peaks}}
    temporary = HERE / "attention.json.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, HERE / "attention.json")
    print(f"\nwrote {HERE.name}/attention.json")


if __name__ == "__main__":
    main()
