# SPDX-License-Identifier: MIT
"""A training step, forward and backward, with the fused attention and with PyTorch's: `python bench/step.py`.

The models are train.py's default GPT (4 blocks of 192, 8 x 256 tokens), the same with a context of 1,024, and a Llama
of those sizes with packed documents, whose mask keeps them apart. Both paths take turns on the same weights and
batch; the ratio is the median over the rounds, above 1 where the fused path is faster. In the same turns: the step as
train.py takes it (a GPT's backward pass by hand), and with --recompute, whose ratio is its time over that. Writes
bench/step.json; takes two minutes.
"""

import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402
import torch  # noqa: E402

from minimal import fused, fused_mlp, lean_gpt  # noqa: E402
from minimal.attention import attention, torch_attention  # noqa: E402
from minimal.gpt import GPT, GPTConfig  # noqa: E402
from minimal.llama import Llama, LlamaConfig  # noqa: E402
from minimal.matmul import use_onednn  # noqa: E402
from minimal.recompute import add_recompute  # noqa: E402

ROUNDS = 15


def gpt(attend, T):
    return GPT(GPTConfig(4096, T, 192, 4, 6, dropout=0.0), attention=attend)


def llama(attend, T):
    return Llama(LlamaConfig(4096, 192, 512, 4, 6, 3, max_position_embeddings=T), attention=attend)


CASES = {  # name: (model, B, T, documents in a row)
    "GPT, 8 x 256 (train.py's default)": (gpt, 8, 256, 1),
    "GPT, 2 x 1,024": (gpt, 2, 1024, 1),
    "Llama, 4 x 512 in packed documents": (llama, 4, 512, 6),
}


def measure(model, B, T, documents):
    torch.manual_seed(0)
    models = [model(attend, T) for attend in (attention, torch_attention, attention, attention)]
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    if model is gpt:
        lean_gpt.make_lean(models[2], fused_mlp.gelu, fused_mlp.gelu_backward)
    add_recompute(models[3])
    ids = torch.randint(0, 4096, (B, T))
    batch = (
        {"documents": torch.arange(T).mul(documents).div(T, rounding_mode="floor").expand(B, T)}
        if documents > 1
        else {}
    )

    def step(m):
        m.zero_grad()
        started = time.perf_counter()
        loss, count = m.loss(ids, ids, **batch)
        (loss / count).backward()
        return time.perf_counter() - started

    for m in models:
        step(m)
    for a, *others in zip(*[m.parameters() for m in models], strict=True):
        for b in others:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    turns = [[step(m) for m in models] for _ in range(ROUNDS)]
    names = ("fused_ms", "plain_ms", "train_ms", "recompute_ms")
    row = {name: 1e3 * statistics.median(taken) for name, taken in zip(names, zip(*turns, strict=True), strict=True)}
    row["ratio"] = statistics.median(plain / fused for fused, plain, _, _ in turns)
    return row | {"recompute_ratio": statistics.median(again / kept for _, _, kept, again in turns)}


def main():
    if not fused.available():
        sys.exit(f"bench/step.py needs the fused operators, but they are {fused.why_not()}")
    use_onednn()  # as train.py does
    rows = {}
    print(f"{os.cpu_count()} cores, torch {torch.__version__}; milliseconds a step")
    print(
        " " * 36
        + "".join(f"{name:>16}" for name in ("fused", "PyTorch's", "ratio", "as train.py", "--recompute", "ratio"))
    )
    for name, case in CASES.items():
        rows[name] = r = measure(*case)
        shown = [r[key] for key in ("fused_ms", "plain_ms", "ratio", "train_ms", "recompute_ms", "recompute_ratio")]
        print(f"{name:36}" + "".join(f"{value:16.2f}" for value in shown), flush=True)
    report.write("step", {"rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
