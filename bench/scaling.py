# SPDX-License-Identifier: MIT
"""What a token costs as the context, the width and the cache grow, and what a step keeps: `python bench/scaling.py`

    context   a training step of minimal.gpt.GPT (4 blocks of width 128, heads of 64, n_positions 8,192) on 8,192
              tokens, in rows of T = 64 to 8,192:        time per token = a + b T, the products and the attention
    width     the same on 4 rows of 256 tokens, with C = 64 to 768:           time per token = a + b C + c C^2
    memory    a step on one row of T = 512 to 8,192, with and without minimal.recompute:           peak = a + b T
    decoding  minimal.decoder with random weights of SmolLM2-135M's sizes but 10 blocks instead of 30, one row,
              after S = 64 to 8,192 tokens:              time per token = a + b S, the weights and the cache

A training step, as train.py's, is forward, backward, clipping at 1 and torch.optim.AdamW(fused=True), in float32
without dropout, on random tokens of 65 classes; the fused attention and PyTorch's, which the model has by default, take
turns, and so do all sizes; medians over the rounds. Memory: each point in a process of its own, the peak of the
resident set over two steps less what was resident once the model was there (Linux: the peak is reset through /proc),
so gradients, the optimiser's state and activations; with glibc's malloc as it comes, whose heap keeps holes between
tensors, and told to map every tensor of 64 KB or more by itself, which leaves none ("no holes"). Decoding: the cache is
filled by one prefill and its length set back before each token, which then reads S + 1 positions; b is compared with
the bytes of a position over the rate of a sum over 512 MB in the same rounds. Fits are least squares of the relative
errors, as the error of a timing grows with the time; R^2 is that of the values themselves.

Prints tables, writes bench/scaling.json and draws bench/scaling.png; takes four to six minutes. `--only` measures some
parts again and keeps the others.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from minimal import fused  # noqa: E402
from minimal.attention import attention  # noqa: E402
from minimal.gpt import GPT, GPTConfig, torch_attention  # noqa: E402
from minimal.llama import Llama, LlamaConfig  # noqa: E402
from minimal.matmul import use_onednn  # noqa: E402
from minimal.recompute import add_recompute  # noqa: E402

VOCABULARY, BLOCKS, HEAD = 65, 4, 64
CONTEXTS = [2**n for n in range(6, 14)]  # 64 to 8,192
WIDTHS = [64, 128, 192, 256, 384, 512, 768]
SIDES = {"fused": attention, "PyTorch": torch_attention}
LLAMA = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=9)
HOWS = {how: {} for how in ("kept", "recomputed")}  # name: environment
HOWS |= {f"{how}, no holes": {"MALLOC_MMAP_THRESHOLD_": str(2**16)} for how in HOWS}
NEW = 16  # tokens decoded at each length in a round


def training_step(C, P, attend, recompute=False):
    """-> a function that takes a step on ids (B, T + 1) and returns its seconds."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCABULARY, P, C, BLOCKS, C // HEAD, dropout=0.0), attention=attend)
    if recompute:
        add_recompute(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(ids):
        started = time.perf_counter()
        loss, count = model.loss(ids)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def tokens(rows, length, classes=VOCABULARY):
    return torch.randint(0, classes, (rows, length), generator=torch.Generator().manual_seed(0))


def in_turns(cases, rounds):
    """cases: {x: ({side: a step}, ids)} -> ({side: median microseconds per token of each x}, the sides' median ratio of
    each x); each side takes a first step that does not count."""
    steps, ids = next(iter(cases.values()))
    for step in steps.values():
        step(ids)
    taken = [[[step(ids) for step in steps.values()] for steps, ids in cases.values()] for _ in range(rounds)]
    by_case = [list(zip(*of_case, strict=True)) for of_case in zip(*taken, strict=True)]  # [x][side][round]
    count = [ids.size(0) * (ids.size(1) - 1) for _, ids in cases.values()]
    micro = [[1e6 * statistics.median(s) / n for s in sides] for sides, n in zip(by_case, count, strict=True)]
    ratios = [statistics.median(b / a for a, b in zip(*sides, strict=True)) for sides in by_case]
    return dict(zip(SIDES, map(list, zip(*micro, strict=True)), strict=True)), ratios


def context(args):
    steps = {side: training_step(128, CONTEXTS[-1], attend) for side, attend in SIDES.items()}
    cases = {T: (steps, tokens(CONTEXTS[-1] // T, T + 1)) for T in CONTEXTS}
    sides, ratios = in_turns(cases, args.rounds)
    return CONTEXTS, sides, {"PyTorch_over_fused": ratios}


def width(args):
    ids = tokens(4, 256 + 1)
    cases = {C: ({side: training_step(C, 256, attend) for side, attend in SIDES.items()}, ids) for C in WIDTHS}
    sides, ratios = in_turns(cases, args.rounds)
    return WIDTHS, sides, {"PyTorch_over_fused": ratios}


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024  # MB


def peak(T, how):
    step = training_step(128, CONTEXTS[-1], attention, recompute="recomputed" in how)
    ids = tokens(1, T + 1)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    for _ in range(2):  # the first makes the optimiser's state, which the second's activations lie beside
        step(ids)
    return resident("VmHWM") - before


def memory(args):
    lengths = [T for T in CONTEXTS if T >= 512]
    command = [sys.executable, __file__, "--threads", str(args.threads), "--memory-of"]

    def of(T, how):
        environment = os.environ | HOWS[how]
        done = subprocess.run([*command, str(T), how], env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout)

    return lengths, {how: [of(T, how) for T in lengths] for how in HOWS}, {}


def decoding(args):
    from models import decoder  # as train.py writes text; here, as the processes of `memory` start sooner without

    longest = CONTEXTS[-1]
    config = LlamaConfig(**LLAMA, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=longest + 1)
    torch.manual_seed(0)
    decode = decoder(Llama(config))
    ids, cache, much = tokens(1, longest, config.vocab_size), [], torch.ones(2**27)
    started = time.perf_counter()
    decode(ids, cache)
    prefill = time.perf_counter() - started
    token = ids[:, :1]
    decode(token, cache)  # the buffers grow to their last size
    state, taken, rates = cache[0], {S: [] for S in CONTEXTS}, []
    for _ in range(args.rounds * 3):
        started = time.perf_counter()
        much.sum()
        rates.append(much.nbytes / (time.perf_counter() - started))
        for S in CONTEXTS:
            for _ in range(NEW):
                state.length = S
                started = time.perf_counter()
                decode(token, cache)
                taken[S].append(time.perf_counter() - started)
    size = sum(kv[:, :, 0].nbytes for kv in state.kv)
    rate = statistics.median(rates)
    facts = {"prefill_s": prefill, "bytes_per_position": size, "bytes_per_s": rate, "reading_ms": 1e3 * size / rate}
    return CONTEXTS, {"decoder": [1e3 * statistics.median(s) for s in taken.values()]}, facts


PARTS = {  # name: (measures, letter, unit, degree of the fit)
    "context": (context, "T", "µs per token", 1),
    "width": (width, "C", "µs per token", 2),
    "memory": (memory, "T", "MB", 1),
    "decoding": (decoding, "S", "ms per token", 1),
}


def fit(x, y, degree):
    """-> the coefficients from the constant on, by least squares of the relative errors; R^2; the largest of them."""
    x, y = (torch.tensor(t, dtype=torch.float64) for t in (x, y))
    powers = (x / x.max())[:, None] ** torch.arange(
        degree + 1
    )  # (N, degree + 1); x up to 1, or the system is too stiff
    scaled = torch.linalg.lstsq(powers / y[:, None], torch.ones_like(y)[:, None]).solution[:, 0]
    off = powers @ scaled - y
    coefficients = scaled / x.max() ** torch.arange(degree + 1)
    r2 = 1 - off.square().sum() / (y - y.mean()).square().sum()
    return {"fit": coefficients.tolist(), "r2": r2.item(), "largest_error": (off / y).abs().max().item()}


def formula(side, letter):
    terms = zip(side["fit"], ("", f" {letter}", f" {letter}²"), strict=False)
    return " ".join(f"{'-' if c < 0 else '+'} {abs(c):.3g}{power}" for c, power in terms).removeprefix("+ ")


def show(name, part):
    _, letter, unit, _ = PARTS[name]
    ratios = part.get("PyTorch_over_fused")
    print(f"\n{name}: {unit}{' (and tokens per second)' * ('s per' in unit)}")
    print(f"{letter:>6}{''.join(f'{side:>22}' for side in part['sides'])}{'  ratio' if ratios else ''}")
    for i, x in enumerate(part["x"]):
        cells = [side["y"][i] for side in part["sides"].values()]
        per_s = {"µs per token": 1e6, "ms per token": 1e3}.get(unit)
        shown = (f"{y:11.3f} {f'({per_s / y:,.0f})' if per_s else '':>10}" for y in cells)
        print(f"{x:6}{''.join(shown)}{f'{ratios[i]:7.2f}' if ratios else ''}")
    for label, side in part["sides"].items():
        a, b = side["fit"][:2]
        both = name == "context" and a > 0 < b
        more = f", as much again from {letter} = {a / b:,.0f} on" if both else ""
        quality = f"R^2 {side['r2']:.5f}, off by at most {side['largest_error']:.1%}"
        print(f"  {label}: {formula(side, letter)} {unit}{more}; {quality}")
    if name == "decoding":
        ratio = part["sides"]["decoder"]["fit"][1] / part["reading_ms"]
        read = f"{part['bytes_per_position']:,} bytes, read at {part['bytes_per_s'] / 1e9:.1f} GB/s"
        print(f"  a position: {read} in {part['reading_ms']:.3g} ms; b is {ratio:.2f} times that")


def draw(parts, path):
    from matplotlib.figure import Figure  # not pyplot, which would choose a display

    titles = {
        "context": ("training, 8,192 tokens a step, width 128", "tokens in a row, T", "tokens per second"),
        "width": ("training, 4 x 256 tokens a step", "width, C", "tokens per second"),
        "memory": ("peak of a step above the model, one row", "tokens in a row, T", "MB"),
        "decoding": ("decoding, one row", "tokens in the cache, S", "ms per token"),
    }
    figure = Figure(figsize=(10, 7.5), dpi=110, layout="constrained")
    for axes, (name, part) in zip(figure.subplots(2, 2).flat, parts.items(), strict=False):
        _, letter, unit, _ = PARTS[name]
        trains = name in ("context", "width")
        ends = part["x"][0] if trains else 0, part["x"][-1]
        along = torch.linspace(*ends, 400).tolist()
        for i, (label, side) in enumerate(part["sides"].items()):
            curve = [sum(c * x**k for k, c in enumerate(side["fit"])) for x in along]
            points = side["y"]
            if trains:
                curve, points = ([1e6 / y for y in ys] for ys in (curve, points))
            said = f"{label}: {formula(side, letter)} {unit.split()[0]}"
            axes.plot(part["x"], points, "osD^"[i], color=f"C{i}", markersize=5)
            axes.plot(along, curve, color=f"C{i}", linewidth=1, label=said)
        if name == "decoding":
            a = part["sides"]["decoder"]["fit"][0]
            reading = [a + part["reading_ms"] * x for x in along]
            axes.plot(
                along, reading, "--", color="grey", linewidth=1, label="a + reading the cache at the rate of a sum"
            )
        title, x, y = titles[name]
        axes.set(title=title, xlabel=x, ylabel=y)
        if trains:
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(part["x"], [f"{x:,}" for x in part["x"]])
            axes.minorticks_off()
            low, high = axes.get_ylim()
            marks = [m * 10**n for n in range(1, 7) for m in (1, 2, 3, 5) if low <= m * 10**n <= high]
            axes.set_yticks(marks, [f"{m:,}" for m in marks])
        else:
            axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    beside = path.with_suffix(".png.tmp")
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="turns that the medians are taken over (default 3)")
    parser.add_argument("--memory-of", nargs=2, metavar=("T", "HOW"), help="print one peak in MB and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_onednn()  # as train.py does
    if args.memory_of:
        print(peak(int(args.memory_of[0]), args.memory_of[1]))
        return
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("bench/scaling.py draws a picture: pip install matplotlib")
    if not fused.available():
        sys.exit(f"bench/scaling.py needs the fused operators, but they are {fused.why_not()}")
    if "memory" in args.only and not os.path.exists("/proc/self/clear_refs"):
        sys.exit("bench/scaling.py measures memory through Linux's /proc; wanted --only without memory")
    path, started = ROOT / "bench" / "scaling.json", time.perf_counter()
    found = json.loads(path.read_text()) if path.exists() else {}
    facts = {"threads": args.threads, "rounds": args.rounds, "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name in args.only:
        measure, _, _, degree = PARTS[name]
        x, sides, more = measure(args)
        sides = {side: {"y": y} | fit(x, y, degree) for side, y in sides.items()}
        found[name] = {"x": x, "sides": sides} | more | facts
        show(name, found[name])
        print(f"  {time.perf_counter() - started:.0f} s so far", flush=True)
        path.with_suffix(".json.tmp").write_text(json.dumps(found, indent=1) + "\n")
        os.replace(path.with_suffix(".json.tmp"), path)
    draw({name: found[name] for name in PARTS if name in found}, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
