# SPDX-License-Identifier: MIT
"""How fast fused attention is beside F.scaled_dot_product_attention, forward and backward, and beside the machine.

    python bench/attention.py                        # everything below, on one thread and on two: about five minutes
    python bench/attention.py --only grid --threads 1
    python bench/attention.py --device cuda          # on a GPU; flash-attn's kernels too, where that package is

    grid       float32, T of 64 to 1,024 and D of 32, 64, 128, causal or not; also as a share of what torch.mm reaches
               at 1,024 x 1,024 x 1,024 in the same rounds, counting the products of unmasked scores only (4 D each
               forward, 10 D backward)
    shapes     those of train.py's models and a few more
    bfloat16   the causal grid, in and out in bfloat16; on a GPU T of 1,024 to 4,096
    grouped    9 query heads on 3 (SmolLM2), against enable_gqa=True
    packed     rows of several documents, causal within each: against the mask that PyTorch wants for it
    decode     one query on 2,048 keys: as a share of the rate at which torch.sum reads the same K and V
    window     sliding window, slopes, soft cap, rotary, (B, T, H, D) in memory: against what PyTorch makes of them
    memory     peak of forward and backward at T = 4,096

The contenders take turns, because a machine drifts by tens of per cent over minutes: a ratio is the median over the
rounds of theirs over ours, so above 1 we are faster, and the cases that we lose are marked. The backward pass is timed
alone, on a graph that is kept. Prints tables and writes bench/attention.json, replacing the parts that were run.
"""

import argparse
import json
import math
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

from minimal import fused  # noqa: E402

GRID = [(2048 // T, 4, T, D) for D in (32, 64, 128) for T in (64, 128, 256, 512, 1024)]  # (B, H, T, D)
SHAPES = [(12, 4, 64, 32), (8, 6, 256, 64), (4, 9, 512, 64), (1, 12, 1024, 64), (2, 4, 512, 128), (1, 8, 2048, 64)]
LARGE = [(8, 16, 1024, 64), (4, 16, 2048, 64), (4, 16, 2048, 128), (2, 16, 4096, 128)]  # for a GPU
MEMORY_SHAPE = (1, 8, 4096, 64)
PARTS = ("grid", "shapes", "bfloat16", "grouped", "packed", "decode", "window", "memory")
DEVICE = "cpu"


def seconds(f, calls):
    start = time.perf_counter()
    for _ in range(calls):
        f()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def in_turns(rounds, *contenders):
    """-> the contenders' seconds in each round, [contender][round]: each is called for about 10 ms a turn."""
    calls = [max(1, math.ceil(0.01 / max(seconds(f, 2), 1e-7))) for f in contenders]
    return [
        *zip(*[[seconds(f, n) for f, n in zip(contenders, calls, strict=True)] for _ in range(rounds)], strict=True)
    ]


def ratio(above, below):
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare(inputs, ours, theirs, rounds, flops=None, tolerance=1e-4, backward=True):
    """ours(*inputs) and theirs, forward and backward, with torch.mm between if the forward flops are given."""
    grad = torch.randn_like(ours(*inputs))
    calls = {"forward": [], "backward": []}
    for f in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        calls["forward"].append(lambda f=f: f(*inputs))
        if backward:
            calls["backward"].append(lambda o=out, x=leaves: torch.autograd.grad(o, x, grad, retain_graph=True))
    torch.testing.assert_close(calls["forward"][0](), calls["forward"][1](), rtol=tolerance, atol=tolerance)
    if backward:
        for a, b in zip(*[f() for f in calls["backward"]], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    row, x = {}, torch.randn(1024, 1024, device=DEVICE)
    for name, pair in calls.items():
        if not pair:
            continue
        if flops is None:
            a, b = in_turns(rounds, *pair)
        else:
            a, b, gemm = in_turns(rounds, *pair, lambda: torch.mm(x, x))
        row[name] = {
            "ours_ms": 1e3 * statistics.median(a),
            "theirs_ms": 1e3 * statistics.median(b),
            "ratio": ratio(b, a),
        }
        if flops is not None:
            needed = flops * (2.5 if name == "backward" else 1)
            row[name]["share_of_gemm"] = ratio(gemm, a) * needed / (2 * 1024**3)
            row[name]["theirs_share"] = ratio(gemm, b) * needed / (2 * 1024**3)
    return row


def against_sdpa(shape, causal, dtype, rounds, flops=True):
    B, H, T, D = shape
    inputs = [torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3)]
    pairs = T * (T + 1) / 2 if causal else T * T
    return compare(
        inputs,
        lambda q, k, v: fused.attention(q, k, v, causal=causal),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        rounds,
        4 * B * H * D * pairs if flops else None,
        1e-4 if dtype == torch.float32 else 5e-2,
    )


def grouped(rounds):
    for B, T in ((4, 256), (4, 512), (1, 1024)):
        q, k, v = (torch.randn(B, H, T, 64, device=DEVICE) for H in (9, 3, 3))
        row = compare(
            (q, k, v),
            lambda q, k, v: fused.attention(q, k, v, causal=True),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            rounds,
        )
        yield {"case": f"B={B}, T={T}, D=64, heads 9 on 3", **row}


def packed(rounds):
    for B, T, documents in ((4, 512, 4), (2, 1024, 8), (1, 2048, 16)):
        q, k, v = (torch.randn(B, 8, T, 64, device=DEVICE) for _ in range(3))
        gen = torch.Generator().manual_seed(T)
        cu = torch.cat([torch.tensor([0, B * T]), torch.randint(0, B * T, (B * documents - 1,), generator=gen)]).sort()[
            0
        ]
        cu = cu.to(DEVICE, torch.int32)
        number = torch.searchsorted(cu.cpu(), torch.arange(B * T), right=True).view(B, 1, T)
        mask = ((number.mT == number) & torch.ones(T, T, dtype=torch.bool).tril())[:, None].to(DEVICE)
        row = compare(
            (q, k, v),
            lambda q, k, v, cu=cu: fused.attention(q, k, v, causal=True, cu_seqlens=cu),
            lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            rounds,
        )
        yield {"case": f"B={B}, T={T}, H=8, D=64, about {documents} documents a row", **row}


def decode(rounds):
    """Sets of K and V in turn, more than a last-level cache holds: each call finds its own in memory."""
    for B, H, Hkv, dtype in [
        (B, H, Hkv, d) for d in ("float32", "bfloat16") for H, Hkv in ((12, 12), (9, 3)) for B in (1, 8)
    ]:
        q = torch.randn(B, H, 1, 64).to(getattr(torch, dtype))
        sets = max(2, math.ceil(3e8 / (2 * B * Hkv * 2048 * 64 * q.element_size())))
        kv = [torch.randn(2, B, Hkv, 2048, 64).to(q.dtype) for _ in range(sets)]
        ints = [
            x.view(torch.int32 if q.element_size() == 4 else torch.int16) for x in kv
        ]  # sums of floats convert first
        turn = iter(range(10**9))
        gqa = {"enable_gqa": True} if H != Hkv else {}

        def ours(q=q, kv=kv, turn=turn):
            fused.attention(q, *kv[next(turn) % len(kv)])

        def theirs(q=q, kv=kv, turn=turn, gqa=gqa):
            F.scaled_dot_product_attention(q, *kv[next(turn) % len(kv)], **gqa)

        def read(kv=ints if dtype == "float32" else kv, turn=turn):
            kv[next(turn) % len(kv)].view(-1).view(torch.float32).sum()

        a, b, c = in_turns(rounds, ours, theirs, read)
        gb = kv[0].nbytes / 1e9
        yield {
            "case": f"B={B}, heads {H} on {Hkv}, 2,048 keys, D=64, {dtype}",
            "gb_per_s": gb / statistics.median(a),
            "share_of_reading": ratio(c, a),
            "forward": {
                "ours_ms": 1e3 * statistics.median(a),
                "theirs_ms": 1e3 * statistics.median(b),
                "ratio": ratio(b, a),
            },
        }


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def window(rounds):
    B, H, T, D = 2, 8, 1024, 64
    q, k, v = (torch.randn(B, H, T, D, device=DEVICE) for _ in range(3))
    distance = (torch.arange(T)[:, None] - torch.arange(T)).to(DEVICE)
    slopes = 2.0 ** -torch.arange(1, H + 1, device=DEVICE)
    near = (distance >= 0) & (distance < 256)
    alibi = torch.where(distance >= 0, -slopes[:, None, None] * distance, -math.inf)[None]

    def capped(q, k, v):
        s = 30 * torch.tanh(q @ k.mT * (D**-0.5 / 30))
        return torch.softmax(s.masked_fill(distance < 0, -math.inf), -1) @ v

    def laid_out(attend):  # as a model has them: (B, T, C) in, (B, T, C) out
        def f(q, k, v):
            q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in (q, k, v))
            return attend(q, k, v).transpose(1, 2).reshape(B, T, H * D)

        return f

    cases = {
        "window of 256, causal": ({"window": 256}, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, near)),
        "ALiBi, causal": ({"slopes": slopes}, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, alibi)),
        "soft cap, causal": ({"softcap": 30.0}, capped),
    }
    if DEVICE == "cuda":  # the others are plain PyTorch there
        cases = {"window of 256, causal": cases["window of 256, causal"]}
    for name, (options, theirs) in cases.items():
        row = compare((q, k, v), lambda q, k, v, o=options: fused.attention(q, k, v, causal=True, **o), theirs, rounds)
        yield {"case": f"{name}: {B}, {H}, {T}, {D}", **row}
    if DEVICE == "cuda":
        return
    angles = torch.rand(T, D // 2, device=DEVICE) * 7
    cos, sin = angles.cos(), angles.sin()
    row = compare(
        (q, k, v),
        lambda q, k, v: fused.attention(q, k, v, causal=True, rotary=(cos, sin)),
        lambda q, k, v: F.scaled_dot_product_attention(*(turn(x, cos, sin) for x in (q, k)), v, is_causal=True),
        rounds,
    )
    yield {"case": f"rotary positions, causal: {B}, {H}, {T}, {D}", **row}
    row = compare(
        (q, k, v),
        lambda q, k, v: fused.attention(q, k, v, causal=True, rotary=(cos, sin)),
        lambda q, k, v: fused.attention(*(turn(x, cos, sin) for x in (q, k)), v, causal=True),
        rounds,
    )
    yield {"case": "the same against turning in PyTorch, then fused", **row}
    row = compare(
        [torch.randn(B, T, H * D, device=DEVICE) for _ in range(3)],
        laid_out(lambda q, k, v: fused.attention(q, k, v, causal=True)),
        laid_out(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        rounds,
    )
    yield {"case": f"laid out (B, T, H, D), causal: {B}, {H}, {T}, {D}", **row}


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


def peaks():
    inputs = 3 * 4 * torch.Size(MEMORY_SHAPE).numel() / 2**20
    print(f"\npeak memory of forward and backward beside q, k, v ({inputs:.0f} MB), {MEMORY_SHAPE}, causal:")
    result = {"shape": MEMORY_SHAPE}
    for path in ("fused", "scaled_dot_product_attention", "plain PyTorch"):
        command = [sys.executable, str(HERE / "attention.py"), "--memory-of", path]
        result[path] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"  {path:<30} {result[path]:8.0f} MB")
    return result


def flash_attn(rounds):
    """On a GPU, the flash-attn package beside ours, float16 and bfloat16."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        print("\nflash-attn is not installed (pip install flash-attn): not compared")
        return
    for dtype in (torch.float16, torch.bfloat16):
        for B, H, T, D in GRID:
            q, k, v = (torch.randn(B, T, H, D, dtype=dtype, device=DEVICE) for _ in range(3))
            row = compare(
                (q, k, v),
                lambda q, k, v: fused.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2),
                lambda q, k, v: flash_attn_func(q, k, v, causal=True),
                rounds,
                tolerance=5e-2,
            )
            yield {"case": f"flash-attn: {B}, {H}, {T}, {D}, {dtype}, causal", **row}


def show(row, label):
    cells = []
    for name in ("forward", "backward"):
        if c := row.get(name):
            share = f"{c['share_of_gemm']:5.2f} ({c['theirs_share']:.2f})" if "share_of_gemm" in c else ""
            mark = " " if c["ratio"] >= 1 else "<"
            cells.append(f"{c['ours_ms']:8.3f} {c['theirs_ms']:8.3f} {c['ratio']:5.2f} {mark} {share}")
    if "share_of_reading" in row:
        cells.append(f"{row['gb_per_s']:5.1f} GB/s, {row['share_of_reading']:.2f} of reading")
    print(f"{label:>44}", *cells, sep="   ", flush=True)


def geometric_means(rows):
    """Printed and returned: over the shapes of a list, for each of forward and backward."""
    means = {}
    for causal in (False, True):
        for name in ("forward", "backward"):
            ratios = [r[name]["ratio"] for r in rows if r["causal"] == causal]
            if ratios:
                means[f"{'causal' if causal else 'full'} {name}"] = statistics.geometric_mean(ratios)
    print("geometric means:", ", ".join(f"{k} {v:.2f}" for k, v in means.items()), flush=True)
    return means


def main():
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=15, help="turns that the medians are taken over (default 15)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory(args.memory_of))
        return
    if not fused.available():
        sys.exit(f"bench/attention.py needs the fused operators, but they are {fused.why_not()}")
    DEVICE = args.device
    if DEVICE == "cuda":
        if why := fused.why_not(torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)):
            sys.exit(f"bench/attention.py --device cuda: {why}")
        args.threads = [1]

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
    path = HERE / ("attention.json" if DEVICE == "cpu" else "attention_cuda.json")
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {k: v for k, v in result.items() if k in PARTS} | {"about": about}
    halves = GRID if DEVICE == "cpu" else LARGE
    lists = {"grid": (GRID, torch.float32), "shapes": (SHAPES, torch.float32), "bfloat16": (halves, torch.bfloat16)}
    others = {"grouped": grouped, "packed": packed, "decode": decode, "window": window}
    if DEVICE == "cuda":
        del others["decode"]
        others["flash-attn"] = flash_attn
    print("milliseconds, ours and theirs; theirs over ours (<: we are slower); share of torch.mm's rate, ours (theirs)")
    for part in [p for p in [*lists, *others] if p in args.only or p not in PARTS]:
        rows, means = [], {}
        for threads in args.threads:
            torch.set_num_threads(threads)
            print(f"\n{part}, {f'{threads} thread' + 's' * (threads > 1) if DEVICE == 'cpu' else 'cuda'}")
            here = []
            if part in lists:
                shapes, dtype = lists[part]
                for shape in shapes:
                    for causal in (True,) if part == "bfloat16" else (False, True):
                        row = against_sdpa(shape, causal, dtype, args.rounds, flops=dtype == torch.float32)
                        here.append({"shape": shape, "causal": causal, **row})
                        show(row, f"{', '.join(map(str, shape))}{', causal' if causal else '        '}")
                means[f"{threads} threads"] = geometric_means(here)
            else:
                for row in others[part](args.rounds):
                    here.append(row)
                    show(row, row["case"])
            rows += [{"threads": threads, **row} for row in here]
        result[part] = {"rows": rows, "geometric_means": means} if means else {"rows": rows}
    if "memory" in args.only and DEVICE == "cpu" and sys.platform.startswith("linux"):
        result["memory"] = peaks()

    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"\nwrote {HERE.name}/{path.name}")


if __name__ == "__main__":
    main()
