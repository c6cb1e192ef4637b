# SPDX-License-Identifier: MIT
"""What limits the fused kernels on this machine, piece by piece and on one thread: `python bench/roofline.py`.

    tile       bench/roofline.cpp is compiled against csrc/: the multiply-adds that a core can do at most, the two
               products of a forward tile (64 queries, 64 keys), its softmax and the exponential alone, all from
               first-level cache. With the two products at their rate and the softmax between them, a forward pass of
               unmasked scores can reach `bound` of the peak; what is missing to it is memory and edges
    torch.mm   1,024 x 1,024 x 1,024, against the same peak
    decode     one query on keys that lie in cache, as GB/s of K and V: what it could read if memory were no limit

Needs a C++ compiler (CXX, or c++). Prints a table, writes bench/roofline.json; takes half a minute.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from minimal import fused  # noqa: E402


def pieces():
    """-> {name: operations a second}, from bench/roofline.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder, "roofline")
        flags = ["-std=c++17", "-O3", "-I", ROOT / "csrc", "-I", ROOT / "bench", ROOT / "bench" / "roofline.cpp"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, "-o", program], check=True)
        said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name, rate in (line.split() for line in said.splitlines())}


def seconds(f, calls):
    f()
    rounds = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def decode_from_cache(H, Hkv, dtype):
    q, k, v = (torch.randn(1, h, T, 64).to(dtype) for h, T in ((H, 1), (Hkv, 512), (Hkv, 512)))
    empty = (torch.randn(1, h, T, 64).to(dtype) for h, T in ((H, 1), (Hkv, 16), (Hkv, 16)))
    q0, k0, v0 = empty  # what a call costs beside the keys
    beside = seconds(lambda: fused.attention(q0, k0, v0), 2000)
    return (k.nbytes + v.nbytes) / (seconds(lambda: fused.attention(q, k, v), 1000) - beside) / 1e9


def main():
    if not fused.available():
        sys.exit(f"bench/roofline.py needs the fused operators, but they are {fused.why_not()}")
    torch.set_num_threads(1)
    rates = pieces()
    peak = rates["peak"]
    print(f"peak {peak / 1e9:.0f} GFLOP/s of one thread (float32)")
    result = {"rates": rates, "bound": {}, "decode_gb_per_s": {}}
    for D in (32, 64, 128):
        product = 2 * 64 * 64 * D
        products = product / rates[f"scores_{D}"] + product / rates[f"values_{D}"]
        softmax = 64 * 64 / rates["softmax"]
        bound = 2 * product / (products + softmax) / peak
        result["bound"][D] = bound
        print(
            f"D={D}: K Q' {rates[f'scores_{D}'] / peak:.2f} of it, P V {rates[f'values_{D}'] / peak:.2f}, softmax "
            f"{softmax / products:.2f} of the time of both: bound {bound:.2f}"
        )
    x = torch.randn(1024, 1024)
    result["torch_mm"] = 2 * 1024**3 / seconds(lambda: torch.mm(x, x), 3)
    print(f"torch.mm {result['torch_mm'] / 1e9:.0f} GFLOP/s, {result['torch_mm'] / peak:.2f} of it")
    for dtype, exponential, read_and_written in (("float32", "exp", 8), ("bfloat16", "exp_for_bf16", 4)):
        print(f"its exponential alone: {rates[exponential] * read_and_written / 1e9:.0f} GB/s of a {dtype} softmax")
    for dtype in (torch.float32, torch.bfloat16):
        for H, Hkv in ((2, 2), (6, 2)):
            name = f"{H} heads on {Hkv}, {str(dtype).removeprefix('torch.')}"
            result["decode_gb_per_s"][name] = rate = decode_from_cache(H, Hkv, dtype)
            print(f"decoding from cache, {name}: {rate:.0f} GB/s")
    path = ROOT / "bench" / "roofline.json"
    path.with_suffix(".json.tmp").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(path.with_suffix(".json.tmp"), path)


if __name__ == "__main__":
    main()
