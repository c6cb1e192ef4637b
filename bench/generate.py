# SPDX-License-Identifier: MIT
"""A token's time with StaticCache beside a plain list, and prompts of several lengths in one batch.

    python bench/generate.py                     # two threads, about six minutes
    python bench/generate.py --threads 1 --rounds 9

The models are GPT-2 small, with room for 4,200 positions, and a Llama of SmolLM2-135M's sizes, in float32 with random
weights, which cost what trained ones do. Greedy tokens, the caches on the CPU.

cache    one row, 8 tokens a turn after 100, 1,000 or 4,000 that stand in the cache; ratio: list over StaticCache. What
         a full buffer costs when it doubles, once in as many tokens as it held, is not in it.
batch    8 prompts of 16 to 128 tokens, 32 more for each: one after another, and together by pad_left; ratio: the first
         over the second.

Peers, where transformers is installed: its model with its DynamicCache, called in the same way, and its generate with
the same padding. All take turns; times are medians, ratios medians of those of single rounds, above 1 where ours is
faster. Prints tables and writes bench/generate.json.
"""

import argparse
import importlib.util
import pathlib
import statistics
import sys
import time
import warnings

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import report  # noqa: E402
import torch  # noqa: E402

from minimal import fused  # noqa: E402
from minimal.attention import attention  # noqa: E402
from minimal.generate import StaticCache, generate, pad_left  # noqa: E402
from minimal.gpt import GPT, GPTConfig  # noqa: E402
from minimal.llama import Llama, LlamaConfig  # noqa: E402

warnings.simplefilter("ignore", FutureWarning)  # transformers renames an argument
TOKENS, PROMPTS, NEW = 8, [16 * n for n in range(1, 9)], 32


def ours(name):
    how = {"attention": attention} if fused.available() else {}
    if name == "GPT-2 small":
        return GPT(GPTConfig(n_positions=4200, dropout=0.0), **how).eval()
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)
    return Llama(LlamaConfig(**sizes, **heads), **how).eval()


def theirs(name):
    import transformers as t

    if name == "GPT-2 small":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_positions=4200))
    else:
        c = ours(name).config
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
        model = t.LlamaForCausalLM(t.LlamaConfig(**{n: getattr(c, n) for n in names}, head_dim=c.head_dim))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def filled(model, kind, have):
    """A cache of `have` tokens: 8 that were read, repeated, as what they are does not matter to time."""
    cache = kind()
    model(torch.arange(8)[None], cache)
    times = -(-have // 8)
    cache[:] = [tuple(t.repeat(1, 1, times, 1)[:, :, :have] for t in pair) for pair in cache]
    return cache


class Row:
    """One row of ours, its cache a list or a StaticCache."""

    def __init__(self, model, kind, have):
        self.model, self.have, self.cache = model, have, filled(model, kind, have)

    def __call__(self):
        token = torch.zeros(1, 1, dtype=torch.long)
        self.cache[:] = [(k[:, :, : self.have], v[:, :, : self.have]) for k, v in self.cache]
        started = time.perf_counter()
        for _ in range(TOKENS):
            token = self.model(token, self.cache)[:, -1:].argmax(-1)
        return (time.perf_counter() - started) / TOKENS


class TheirRow:
    """The same with transformers' model and cache."""

    def __init__(self, model, ours, have):
        from transformers import DynamicCache

        self.model, self.have, self.cache = model, have, DynamicCache()
        for layer, (k, v) in enumerate(filled(ours, list, have)):
            self.cache.update(k, v, layer)

    def __call__(self):
        token = torch.zeros(1, 1, dtype=torch.long)
        if more := self.cache.get_seq_length() - self.have:
            self.cache.crop(-more)
        started = time.perf_counter()
        for _ in range(TOKENS):
            token = self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)
        return (time.perf_counter() - started) / TOKENS


def timed(call):
    def run():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return run


def in_turns(sides, rounds):
    """{side: seconds of each round}; the order turns, and a first round warms up."""
    taken = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides) if i % 2 else list(sides)[::-1]:
            seconds = sides[name]()
            if i:
                taken[name].append(seconds)
    return taken


def row_of(taken, slow, fast, scale):
    """Medians, times `scale`, and the ratios to the side that is `fast`."""
    row = {name: scale * statistics.median(times) for name, times in taken.items()}
    for other in (slow, "transformers"):
        if other in taken:
            pairs = zip(taken[other], taken[fast], strict=True)
            row[f"{other} / {fast}"] = statistics.median(a / b for a, b in pairs)
    return row


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peers, rows = importlib.util.find_spec("transformers") is not None, []
    path = "fused attention" if fused.available() else "PyTorch's attention"
    print(f"{args.threads} threads, torch {torch.__version__}, {path}")
    for name in ("GPT-2 small", "Llama 135M"):
        model, other = ours(name), theirs(name) if peers else None
        for have in (100, 1000, 4000):
            sides = {"list": Row(model, list, have), "StaticCache": Row(model, StaticCache, have)}
            if peers:
                sides["transformers"] = TheirRow(other, model, have)
            row = row_of(in_turns(sides, args.rounds), "list", "StaticCache", 1e3)
            rows.append({"part": "cache", "model": name, "tokens": have, **row})
            print(f"{name}, ms a token after {have:4d}:  " + ",  ".join(f"{n} {x:.2f}" for n, x in row.items()))
        vocab = model.config.vocab_size
        prompts = [torch.randint(vocab, (n,)).tolist() for n in PROMPTS]
        ids, documents = pad_left(prompts)

        def alone(model=model, prompts=prompts):
            for prompt in prompts:
                generate(model, torch.tensor([prompt]), NEW, temperature=0)

        def together(model=model, ids=ids, documents=documents):
            generate(model, ids, NEW, temperature=0, documents=documents)

        def batch(other=other, ids=ids, documents=documents):
            how = dict(attention_mask=documents, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
            other.generate(input_ids=ids, **how)

        sides = {"alone": timed(alone), "together": timed(together)} | ({"transformers": timed(batch)} if peers else {})
        row = row_of(in_turns(sides, args.rounds), "alone", "together", 1)
        rows.append({"part": "batch", "model": name, **row})
        print(f"{name}, s for {len(PROMPTS)} x {NEW} tokens:  " + ",  ".join(f"{n} {x:.2f}" for n, x in row.items()))
    report.write("generate", {"threads": args.threads, "rounds": args.rounds, "attention": path, "rows": rows})


if __name__ == "__main__":
    main()
