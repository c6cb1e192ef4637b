# SPDX-License-Identifier: MIT
"""Surgical fine-tuning: measure on the task's own data which blocks of a model to tune, and freeze the others.

Lee, Chen, Tajwar, Kumar, Yao, Liang, Finn 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
arXiv 2210.11466. Where the new task differs from the old in its inputs, tuning the first block alone can beat tuning
everything; where it differs in its labels, the last. Auto-RGN finds the place by the relative gradient norm. For a
block with parameters theta and batches 1..N of the new task, with the loss L_n a mean over the terms of batch n,

    RGN        = 1/N sum_n ||dL_n / dtheta|| / ||theta||       norms over all numbers of the block, as one vector
    hard       tune the blocks of the largest RGN that fit a budget of parameters, all at one learning rate
    soft       tune all, each at the learning rate lr RGN / max RGN        (the paper's Auto-RGN)

Each batch has a say of its own, as it is one step of an optimiser: how far would a step move the block, relative to
where it is? (The norm of the mean gradient would forget what differs between batches.) L_n is the mean, not the sum,
so that neither the size of a batch nor padding counts.

Departures from the paper, and what else to know:
- The paper measures each tensor, in every epoch, and its choice by hand is of blocks; here blocks are measured, once.
  The hard choice under a budget is ours: a frozen block needs no optimiser state, and none below the lowest chosen one
  needs a backward pass.
- Blocks: each item of the outermost nn.ModuleLists and nn.Sequentials; what is registered before the first of them,
  "embedding"; what comes after, "head" (final norms, poolers, heads). A model without such stacks has its children as
  blocks. A tied tensor counts once, where it first stands: a head tied to the embedding belongs to "embedding".
- RGN is a hint, not a proof. It depends on scale: where a norm follows that undoes it, weights half as large have an
  RGN four times as large, and small weights early in a model may come first whatever has shifted, or if nothing has.
  What is no fault of a block averages out over a batch's examples: large batches tell blocks apart better than many.
- A fresh head has random gradients, hands them down to all others, and its small weights make its own RGN large: train
  it alone first, then measure. Or turn its requires_grad on after add_surgical, as it must learn whatever was chosen.
- What was tuned is saved as the whole model is, with save_pretrained: there is no file format of its own.

    table = add_surgical(model, batches, budget=0.25);  print(describe(table))  # batches: dicts for model.loss(**batch)
    optimizer = torch.optim.AdamW(surgical_parameters(model), lr=1e-3)  # ... train as ever
    remove_surgical(model);  model.save_pretrained("out")

Letters: N batches.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import nn


class Block(NamedTuple):
    """A row of the table: a block of the model, how large it is, and what became of it."""

    name: str
    parameters: int  # how many numbers, a tied tensor once
    rgn: float  # relative gradient norm, one over the unit of the parameters; inf for a block of zeros
    chosen: bool = False
    why: str = ""


# Same as minimal/lora.py: _plain
def _plain(name):
    return f"{name}.".replace("_orig_mod.", "")[:-1]


def _blocks(model):
    """The floating-point parameters of each block, by the block's name, in the model's order."""
    stacks, blocks, above = [], {}, False
    for name, module in model.named_modules():  # a stack before those inside it
        name, stack = _plain(name), isinstance(module, (nn.ModuleList, nn.Sequential))
        if name and stack and not name.startswith(tuple(f"{outer}." for outer in stacks)):
            stacks.append(name)
    for name, p in model.named_parameters():  # a tied tensor is named once
        name = _plain(name)
        stack = next((s for s in stacks if name.startswith(f"{s}.")), None)
        if stack is not None:
            block, above = f"{stack}.{name[len(stack) + 1 :].split('.')[0]}", True
        elif stacks:
            block = "head" if above else "embedding"
        else:
            block = name.split(".")[0]
        if p.is_floating_point():  # quantised weights get no gradient
            blocks.setdefault(block, []).append(p)
    return blocks


def measure(model, batches):
    """The table of all blocks in the model's order, with their RGN on these batches; nothing is chosen yet.

    batches: an iterable of dicts for model.loss(**batch) -> (sum, count), on the model's device; a few are enough. All
    parameters are measured, frozen ones too, in evaluation mode (no dropout). After it, weights, .grad, requires_grad,
    training modes and torch's random state are what they were, also if it fails. A batch of which nothing counts is
    left out. ValueError: no batch that counts; a gradient or weight that is not finite; a model without parameters."""
    blocks = _blocks(model)
    parameters = [p for block in blocks.values() for p in block]
    if not parameters:
        raise ValueError(f"model={type(model).__name__} has no floating-point parameters; wanted a model to tune")
    flags, modes = [p.requires_grad for p in parameters], [(m, m.training) for m in model.modules()]
    sums, N = dict.fromkeys(blocks, 0.0), 0
    try:
        model.eval()
        for p in parameters:
            p.requires_grad_(True)
        with torch.random.fork_rng({p.device for p in parameters if p.is_cuda}), torch.enable_grad():
            for batch in batches:
                loss, count = model.loss(**batch)
                if count == 0:
                    continue
                # not .backward(), which would add to .grad
                grads = iter(torch.autograd.grad(loss / count, parameters, allow_unused=True))
                N += 1
                for name, block in blocks.items():
                    norms = _norm(block), _norm([g for g in itertools.islice(grads, len(block)) if g is not None])
                    if not all(map(math.isfinite, norms)):
                        raise ValueError(f"block {name!r} has weights and gradient of norms {norms} on batch {N}; "
                                         "wanted finite ones")  # fmt: skip
                    sums[name] += norms[1] / norms[0] if norms[0] else math.inf if norms[1] else 0.0
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
    if not N:
        raise ValueError("batches hold no term that counts; wanted at least one batch with targets")
    return [Block(name, sum(p.numel() for p in block), sums[name] / N) for name, block in blocks.items()]


def _norm(tensors):
    """Of all numbers in them as one vector; half precision is squared and summed in float32."""
    wide = (torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    return math.hypot(*(norm.item() for norm in wide))


def choose(ranking, budget=0.25):
    """The table in the order of RGN, with what is chosen within the budget, and why.

    ranking: Blocks of `measure`, in any order. budget: a float, the share of all their parameters, above 0 and up to
    1.0; or an int, their number. The rule: from the largest RGN down, equal ones in the order given, a block is chosen
    if it fits into what is left of the budget, and otherwise passed over for those after it. A block that no gradient
    reaches is never chosen. ValueError: a bad budget, or one that fits no block; an RGN that is no number."""
    total = sum(block.parameters for block in ranking)
    if type(budget) not in (int, float) or not (0 < budget <= 1.0 if type(budget) is float else budget >= 1):
        raise ValueError(f"budget={budget!r} is out of range; wanted a share above 0.0 up to 1.0, or a number from 1")
    limit = left = int(budget * total) if type(budget) is float else budget
    table = []
    for block in sorted(ranking, key=lambda block: -block.rgn):
        if math.isnan(block.rgn):
            raise ValueError(f"block {block.name!r} has an RGN of nan; wanted a number")
        fits = block.parameters <= left
        if block.rgn == 0:
            chosen, why = False, "no gradient reaches it"
        else:
            chosen, why = fits, f"{'fits' if fits else 'does not fit'}: {left:,} left of {limit:,}"
            left -= block.parameters * fits
        table.append(block._replace(chosen=chosen, why=why))
    if not any(block.chosen for block in table):
        sizes = [block.parameters for block in table if block.rgn]
        raise ValueError(f"budget={budget!r} is {limit:,} of {total:,} parameters and fits no block; wanted at least "
                         f"{min(sizes, default=0):,}, those of the smallest that a gradient reaches")  # fmt: skip
    return table


def add_surgical(model, batches, budget=0.25):
    """Measures the blocks, freezes all but the chosen ones, in place, and returns the table, the largest RGN first.

    batches as for `measure`, budget as for `choose`. The model computes what it did before. ValueError: as for both,
    and for a model that is so already; then it is as it was."""
    if hasattr(model, "surgical_trainable"):
        raise ValueError(f"model={type(model).__name__} is surgical already; wanted remove_surgical first")
    table = choose(measure(model, batches), budget)
    model.surgical_trainable = {_plain(n) for n, p in model.named_parameters() if p.requires_grad}  # to be put back
    blocks = _blocks(model)
    model.requires_grad_(False)
    for p in (p for block in table if block.chosen for p in blocks[block.name]):
        p.requires_grad_(True)
    return table


def surgical_parameters(model):
    """A list of all parameters that train: those of the chosen blocks, and what else was made to require a gradient."""
    if not hasattr(model, "surgical_trainable"):
        raise ValueError(f"model={type(model).__name__} has no chosen blocks; wanted add_surgical first")
    return [p for p in model.parameters() if p.requires_grad]


def remove_surgical(model):
    """Each requires_grad is again as before add_surgical; the weights stay as trained. ValueError: not surgical."""
    surgical_parameters(model)
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.requires_grad_(_plain(name) in model.surgical_trainable)
    del model.surgical_trainable


def surgical_groups(model, ranking, lr):
    """The soft choice: groups for an optimiser, one for each Block of `measure`, at the rate lr RGN / max RGN.

    "scale" of a group is RGN / max RGN, for a loop that sets rates itself. ValueError: blocks of another model; a
    largest RGN of 0 or infinity."""
    blocks, largest = _blocks(model), max((block.rgn for block in ranking), default=0.0)
    if {block.name for block in ranking} != blocks.keys() or not 0 < largest < math.inf:
        raise ValueError(f"ranking has {len(ranking)} blocks and a largest RGN of {largest}; wanted the "
                         f"{len(blocks)} blocks of this model, and a finite number above 0")  # fmt: skip
    scales = {block.name: block.rgn / largest for block in ranking}
    return [{"params": blocks[name], "lr": lr * scale, "scale": scale} for name, scale in scales.items()]


def describe(table):
    """The table as text, a line for each block: chosen or not, RGN, parameters, share of all, name and why."""
    total = sum(block.parameters for block in table)
    lines = [
        f"{'tune' if b.chosen else '':6}{b.rgn:9.3g}{b.parameters:13,}{b.parameters / total:6.0%}  {b.name:24}{b.why}"
        for b in table
    ]
    return "\n".join([f"{'':6}{'RGN':>9}{'parameters':>13}{'':6}  {'block':24}why", *lines])


if __name__ == "__main__":
    import copy

    import torch.nn.functional as F

    class Residual(nn.Module):
        """A block: x + W_2 GELU(W_1 LN(x))."""

        def __init__(self, C):
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

        def forward(self, x):
            return x + self.fc2(F.gelu(self.fc1(self.norm(x))))

    class Net(nn.Module):
        """16 numbers in, 8 classes out."""

        def __init__(self, C=32):
            super().__init__()
            self.embed, self.blocks = nn.Linear(16, C), nn.ModuleList(Residual(C) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 8)
            nn.init.normal_(self.embed.weight, std=16**-0.5)  # keeps the variance: RGN depends on a block's scale

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

        def loss(self, x, y):
            return F.cross_entropy(self(x), y, reduction="sum"), len(y)

    def draw(n):  # two clusters for each class
        cluster = torch.randint(16, (n,))
        return {"x": 0.9 * centres[cluster] + 0.42 * torch.randn(n, 16), "y": cluster % 8}

    def train(model, parameters, batches, lr):
        optimiser = torch.optim.AdamW(parameters, lr)
        for batch in batches:
            loss, count = model.loss(**batch)
            optimiser.zero_grad()
            (loss / count).backward()
            optimiser.step()

    def inputs(x, y):  # 4 of the 16 are measured with the other sign
        return {"x": x * torch.tensor([-1.0] * 4 + [1.0] * 12), "y": y}

    def labels(x, y):  # each class has the next one's name
        return {"x": x, "y": (y + 1) % 8}

    torch.manual_seed(0)
    torch.set_num_threads(1)
    centres, base = torch.randn(16, 16), Net()
    train(base, base.parameters(), (draw(128) for _ in range(400)), 2e-3)
    test, names = draw(1000), list(_blocks(base))
    for shift in (inputs, labels):
        few, held_out = [shift(**draw(32)) for _ in range(2)], shift(**test)
        table, losses = add_surgical(model := copy.deepcopy(base), few, budget=0.05), {}
        remove_surgical(model)
        print(f"{shift.__name__} have shifted:", f"{model.loss(**held_out)[0] / 1000:.3f} nats, 64 examples to tune on")
        print(describe(table))
        for name in (*names, "soft", "all"):
            for rate in (3e-3, 1e-2, 3e-2):  # each has the best of the same three
                tuned = copy.deepcopy(base)
                parts = {**_blocks(tuned), "soft": surgical_groups(tuned, table, rate), "all": tuned.parameters()}
                train(tuned, parts[name], few * 40, rate)
                losses[name] = min(losses.get(name, 99.0), tuned.loss(**held_out)[0].item() / 1000)
        print("after tuning:", ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()), end="\n\n")
