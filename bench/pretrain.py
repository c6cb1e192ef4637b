# SPDX-License-Identifier: MIT
"""A pretraining step beside the one of transformers: `python bench/pretrain.py` (pip install transformers).

    ours      minimal.gpt.GPT with the fused attention, its blocks' backward pass by hand (minimal.lean_gpt), the fused
              GELU (minimal.fused_mlp), torch.optim.AdamW(fused=True) and, on an AMD with AVX-512, the products of
              minimal.matmul, as train.py trains
    compiled  the same model without lean_gpt, its loss by torch.compile, as `train.py --compile` has it
    theirs    transformers' GPT2LMHeadModel of the same sizes, eager, torch.optim.AdamW with its default settings

Both in float32 without dropout, on random tokens of 65 classes, gradients clipped at 1: forward, backward,
clipping, step. They take turns; the ratio is the median over the rounds of theirs over ours, above 1 where we are
faster. Break-even: the steps after which the seconds of compiling have been won back, if a compiled step is faster than
ours at all.
Memory: each in a process of its own, the peak of the resident set over three steps less what was resident once the
model was there (Linux only: the peak is reset through /proc), so gradients, the optimiser's state and activations.
Prints tables, writes bench/pretrain.json; takes five minutes.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import report  # noqa: E402
import torch  # noqa: E402

from minimal import fused, fused_mlp, lean_gpt  # noqa: E402
from minimal.attention import attention  # noqa: E402
from minimal.gpt import GPT, GPTConfig  # noqa: E402
from minimal.matmul import use_onednn  # noqa: E402

VOCABULARY = 65
CASES = {  # name: (blocks, width, heads, context, batch, rounds)
    "4 x 128, 12 x 64 tokens": (4, 128, 4, 64, 12, 41),
    "6 x 384, 16 x 256 tokens": (6, 384, 6, 256, 16, 7),
}


def ours(L, C, H, T):
    model = GPT(GPTConfig(VOCABULARY, T, C, L, H, dropout=0.0), attention=attention)
    lean_gpt.make_lean(model, fused_mlp.gelu, fused_mlp.gelu_backward)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    def loss(ids):
        total, count = model.loss(ids)
        return total / count

    return model, optimiser, loss


def compiled(L, C, H, T):
    model, optimiser, _ = ours(L, C, H, T)
    lean_gpt.make_plain(model)
    run = torch.compile(model.loss)

    def loss(ids):
        total, count = run(ids)
        return total / count

    return model, optimiser, loss


def theirs(L, C, H, T):
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=T, n_embd=C, n_layer=L, n_head=H)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off, loss_type="ForCausalLMLoss"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    return model, optimiser, lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss


def stepper(make, L, C, H, T, B):
    """-> the model, and a function that takes a step and returns its seconds."""
    torch.manual_seed(0)
    model, optimiser, loss = make(L, C, H, T)
    ids = torch.randint(0, VOCABULARY, (B, T + 1))

    def step():
        torch.set_float32_matmul_precision("highest")  # as PyTorch begins
        if make is not theirs:
            use_onednn()
        started = time.perf_counter()
        loss(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024  # MB


def memory(side, name, threads):
    """MB at the peak of three steps beyond the model, in a process of its own; None where /proc has no such files."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", side, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "CASE"), help="print one peak in MB and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides = {"ours": ours, "theirs": theirs}
    if args.memory_of:
        *sizes, _ = CASES[args.memory_of[1]]
        step = stepper(sides[args.memory_of[0]], *sizes)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = resident("VmRSS")
        for _ in range(3):
            step()
        print(resident("VmHWM") - before)
        return
    rows = {}
    print(f"{args.threads} threads, torch {torch.__version__}, attention {fused.why_not() or 'fused'}")
    print(
        f"{'':26} {'ours ms':>9} {'theirs ms':>9} {'ratio':>6} {'ours MB':>9} {'theirs MB':>9} {'ours of theirs':>14}"
    )
    for name, (*sizes, rounds) in CASES.items():
        steps = [stepper(make, *sizes) for make in (*sides.values(), compiled)]
        first = [step() for step in steps][2] + steps[2]()  # a second time where the first has left guesses open
        seconds = [*zip(*[[step() for step in steps] for _ in range(rounds)], strict=True)]
        *seconds, third = seconds
        won = statistics.median(a - c for a, c in zip(seconds[0], third, strict=True))
        third = statistics.median(third)
        peaks = [memory(side, name, args.threads) for side in sides]
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        ms = [1e3 * statistics.median(s) for s in seconds]
        rows[name] = dict(ours_ms=ms[0], theirs_ms=ms[1], ratio=ratio, ours_mb=peaks[0], theirs_mb=peaks[1])
        rows[name] |= dict(compiled_ms=1e3 * third, compiling_s=first - 2 * third)
        rows[name]["break_even_steps"] = round((first - 2 * third) / won) if won > 0 else None
        share = "" if None in peaks else f"{peaks[0]:9.0f} {peaks[1]:9.0f} {peaks[0] / peaks[1]:14.2f}"
        print(f"{name:26} {ms[0]:9.1f} {ms[1]:9.1f} {ratio:6.2f} {share}", flush=True)
        even = rows[name]["break_even_steps"]
        even = "never won back" if even is None else f"won back after {even:,} steps"
        print(
            f"{'':26} compiled: {1e3 * third:.1f} ms a step, {first - 2 * third:.0f} s of compiling, {even}", flush=True
        )
    report.write("pretrain", {"threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
