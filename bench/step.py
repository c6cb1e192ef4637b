# SPDX-License-Identifier: MIT
"""A training step, forward and backward, with the fused attention and with PyTorch's: `python bench/step.py`.

The models are train.py's default GPT (4 blocks of 192, 8 x 256 tokens), the same with a context of 1,024, and a Llama
of those sizes with packed documents, whose mask keeps them apart. Both paths take turns on the same weights and
batch; the ratio is the median over the rounds, above 1 where the fused path is faster. Writes bench/step.json; takes a
minute.
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

from minimal import fused  # noqa: E402
from minimal.attention import attention, torch_attention  # noqa: E402
from minimal.gpt import GPT, GPTConfig  # noqa: E402
from minimal.llama import Llama, LlamaConfig  # noqa: E402
from minimal.matmul import use_onednn  # noqa: E402

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
    models = [model(attend, T) for attend in (attention, torch_attention)]
    models[1].load_state_dict(models[0].state_dict())
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
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    ours, theirs = zip(*[[step(m) for m in models] for _ in range(ROUNDS)], strict=True)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return {"fused_ms": 1e3 * statistics.median(ours), "plain_ms": 1e3 * statistics.median(theirs), "ratio": ratio}


def main():
    if not fused.available():
        sys.exit(f"bench/step.py needs the fused operators, but they are {fused.why_not()}")
    use_onednn()  # as train.py does
    rows = {}
    print(f"{os.cpu_count()} cores, torch {torch.__version__}; milliseconds a step: fused, PyTorch's attention; ratio")
    for name, case in CASES.items():
        rows[name] = r = measure(*case)
        print(f"{name:36} {r['fused_ms']:8.0f} {r['plain_ms']:8.0f} {r['ratio']:6.2f}", flush=True)
    report.write("step", {"rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
