# SPDX-License-Identifier: MIT
"""Adversarial training on embeddings (FGM, PGD, FreeLB), with R-Drop and EDA: five ways to make few examples go far.

FGM: Miyato, Dai, Goodfellow (2017, 1605.07725). PGD: Madry et al. (2018, 1706.06083). FreeLB: Zhu et al. (2020,
1909.11764). R-Drop: Liang, Wu et al. (2021, 2106.14448). EDA: Wei & Zou (2019, 1901.11196). With e the embedded
tokens of one example, (T, C), L its loss, g = dL/d delta, || || the norm over all of (T, C) and P the projection onto
the ball of radius epsilon, P(delta) = delta min(1, epsilon / ||delta||):

    FGM     delta = epsilon g / ||g||                          1/2 L(e) + 1/2 L(e + delta)          2 passes
    PGD     delta_0 = 0, delta_k+1 = P(delta_k + a g / ||g||)  1/2 L(e) + 1/2 L(e + delta_K)        K + 1 passes
    FreeLB  delta_0 ~ U(-epsilon, epsilon) / sqrt(T C), then   1/K sum_k=0..K-1 L(e + delta_k)      K passes
    R-Drop  p, q: two passes with dropout                      1/2 (L_p + L_q) + alpha/2 (KL(p || q) + KL(q || p))

Departures, and what else to know:
- delta is added to what the nn.Embedding returns, by a forward hook. Code that circulates moves the embedding's weight
  instead: there one norm bounds the whole batch, a token moves alike wherever it stands, a tied head moves with it, and
  weights have to be put back. Here the bound is on each example, so a split into microbatches changes nothing, and no
  weight ever moves. An embedding called twice (a shared one of encoder and decoder) has one delta for each call.
- Clean and adversarial loss are averaged; Miyato et al. add them, Madry et al. train on the adversarial alone. PGD
  starts from 0, not at random, so that the clean pass is its first step: pgd with one step of epsilon is fgm.
- The steps of PGD that only look for delta take gradients to delta alone: no .grad of a parameter sees them.
- Miyato et al. normalise the embeddings, so that the model cannot outgrow epsilon by larger ones; here they are what
  they are: give epsilon in units of ||e||. Padding takes its share of FreeLB's random start, and of nothing else.
- Each pass draws its own dropout; FreeLB keeps one mask over its steps (a `backward` that seeds itself does so too).
- R-Drop's alpha is half of the paper's, which adds L_p and L_q instead of averaging them. EDA's deletion takes a fixed
  number of tokens, not each with a probability; masking stands in for its synonyms and insertions. The paper's number
  of changes, n = alpha l for l tokens, is rounded to the nearest; its code makes at least one, also in a text of two.

    def backward(weight):                                     # one microbatch; called once for each pass
        loss, count = model.loss(**batch)
        (weight * loss).backward()                            # adds to .grad; or scaler.scale(weight * loss).backward()
        return loss.detach(), count
    loss, count = fgm(backward, model.transformer.wte, epsilon=1.0)     # instead of backward(1.0); then divide and step

Letters: B examples, T tokens, C channels, K steps, N rows of logits, V classes.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


def fgm(backward, embedding, epsilon=1.0):
    """Adds to .grad the gradient of 1/2 L(e) + 1/2 L(e + epsilon g / ||g||); returns (loss_sum, n) of the clean pass.

    backward: callable(weight) -> (loss_sum, n), see the head of this file: runs one microbatch forward, multiplies the
    summed loss by the float `weight`, calls .backward() on it and returns the loss without the weight. It must give the
    embedding the same tokens at each call. embedding: the nn.Embedding of the tokens, whose first dimension is the
    example; frozen or not, but called eagerly, neither compiled nor recomputed. epsilon: norm bound for an example.
    An example without a gradient is not perturbed. Miyato et al. eq. 5 and 6. ValueError: a bad number; not an
    nn.Embedding, or one that was not called.
    """
    return pgd(backward, embedding, epsilon, step_size=epsilon, steps=1)


def pgd(backward, embedding, epsilon=1.0, step_size=None, steps=3):
    """Adds to .grad that of 1/2 L(e) + 1/2 L(e + delta), delta found in `steps` steps; (loss_sum, n) of the clean pass.

    step_size: norm of one step for an example. None is 1.5 epsilon / steps: from the centre the way to the boundary is
    epsilon, and half of that again is left for turns, in a ball of any size (a fixed step leaves a small one at once,
    and never crosses a large one). The rest is as for fgm. Madry et al. section 2.1, in the l2 norm.
    """
    step_size = _check(embedding, epsilon, step_size, steps)
    deltas = []
    with _perturbed(embedding, deltas):
        clean = backward(0.5)
    for _ in range(steps - 1):
        deltas = _ascend(deltas, step_size, epsilon)
        with _perturbed(embedding, deltas), _OnlyTo(deltas) as only:
            backward(0.5)
        if not only.used:
            raise ValueError("backward did not call Tensor.backward: wanted (weight * loss).backward() in it")
    with _perturbed(embedding, _ascend(deltas, step_size, epsilon)):
        backward(0.5)
    return clean


def free_lb(backward, embedding, epsilon=1.0, step_size=None, steps=3):
    """Adds to .grad the mean of the gradients at `steps` perturbations, each an ascent step from the last.

    The first is random, from torch's generator, so that steps - 1 climb. Returns the mean of the `steps` summed losses,
    and n. The rest, the default of step_size too, is as for pgd. Zhu et al. algorithm 1.
    """
    step_size = _check(embedding, epsilon, step_size, steps)
    deltas, mean = [], 0.0
    for step in range(steps):
        if step:
            deltas = _ascend(deltas, step_size, epsilon)
        with _perturbed(embedding, deltas, start=epsilon):
            loss_sum, n = backward(1 / steps)
        mean = mean + loss_sum / steps
    return mean, n


def _check(embedding, epsilon, step_size, steps):
    """The step size, once all four are sound."""
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"embedding is a {type(embedding).__name__}: wanted the nn.Embedding of the tokens")
    for name, value in (("epsilon", epsilon), ("step_size", 0.0 if step_size is None else step_size)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r}: wanted a finite number of at least 0")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps = {steps!r}: wanted a whole number of at least 1")
    return 1.5 * epsilon / steps if step_size is None else step_size


@contextlib.contextmanager
def _perturbed(embedding, deltas, start=0.0):
    """For one pass, adds deltas[i] to what the i-th call of the embedding returns; an empty list is filled.

    start: the radius of the ball in which the list's new entries are drawn.
    """
    fill, calls = not deltas, 0

    def hook(module, args, out):  # out: (B, T, C)
        nonlocal calls
        if fill:
            wide = torch.promote_types(out.dtype, torch.float32)  # half precision would round the norm away
            delta = torch.zeros_like(out, dtype=wide)
            if start:
                delta.uniform_(-1, 1).mul_(start / math.sqrt(math.prod(out.shape[1:])))  # a row's norm is at most start
            deltas.append(delta.requires_grad_())
        if calls == len(deltas) or deltas[calls].shape != out.shape:
            raise ValueError(f"call {calls + 1} of the embedding gives {tuple(out.shape)}: wanted the same microbatch, "
                             "embedded as often, in each pass")  # fmt: skip
        calls += 1
        return (out + deltas[calls - 1]).to(out.dtype)

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()  # also when backward fails: the next pass must not be perturbed
    if calls < max(1, len(deltas)):
        raise ValueError(f"embedding was called {calls} times by backward: wanted the one that the model calls, "
                         "uncompiled, and as often in each pass")  # fmt: skip


class _OnlyTo(TorchFunctionMode):
    """While active, .backward() takes gradients to these tensors alone; cheaper too: no weight gradient is computed."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.used = inputs, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.backward:
            kwargs, self.used = {**kwargs, "inputs": self.inputs}, True
        return function(*args, **kwargs)


@torch.no_grad()
def _ascend(deltas, step_size, epsilon):
    """P(delta + step_size g / ||g||) for each delta (B, T, C), norms over all but the first dimension."""
    moved = []
    for delta in deltas:
        g = torch.zeros_like(delta) if delta.grad is None else delta.grad
        rows = tuple(range(1, g.dim()))
        # By its largest entry first: the squares of a small gradient would vanish, and g / ||g|| must not see a scale.
        largest = g.abs().amax(rows, keepdim=True)  # (B, 1, 1)
        g = torch.where(largest.isfinite(), g / largest.clamp_min(torch.finfo(g.dtype).tiny), 0.0)
        # Now ||g|| is at least 1, or 0 where there was no gradient (or an overflow, whose step a scaler will skip).
        new = delta + step_size * g / _norm(g, rows).clamp_min(1.0)
        new = new * (epsilon / _norm(new, rows).clamp_min(torch.finfo(g.dtype).tiny)).clamp_max(1.0)
        moved.append(new.requires_grad_())
    return moved


def _norm(x, rows):
    return torch.linalg.vector_norm(x, dim=rows, keepdim=True)  # (B, 1, 1)


def r_drop(outputs, alpha=1.0, label_smoothing=0.0):
    """The loss of R-Drop summed over the counted targets (nats, float32 or wider), and their number (0-dim int64).

    outputs: callable() -> (logits (N, V), targets int64 (N,), -100 where nothing counts, hidden), called twice: the
    model is in training and draws other dropout each time, as `lambda: model.outputs(**batch)` does. Without dropout it
    is the plain loss. Gradients flow into both passes. Liang et al. eq. 1 to 4, with alpha half of theirs.
    ValueError: alpha below 0, label_smoothing outside 0 to 1, targets that differ between the two calls.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha = {alpha!r}: wanted a finite number of at least 0")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing = {label_smoothing!r}: wanted a number from 0 to 1")
    (first, targets, _), (second, again, _) = outputs(), outputs()
    if not torch.equal(targets, again):
        raise ValueError("targets of the two passes differ: wanted the same batch twice")
    counted = targets != -100  # (N,)
    wide = torch.promote_types(first.dtype, torch.float32)
    logits = torch.cat((first[counted], second[counted])).to(wide)  # (2 n, V)
    hard = F.cross_entropy(logits, targets[counted].repeat(2), reduction="sum", label_smoothing=label_smoothing)
    log_p, log_q = F.log_softmax(logits, dim=1).chunk(2)  # 2 x (n, V)
    both = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()  # KL(p || q) + KL(q || p)
    return hard / 2 + alpha / 2 * both, counted.sum()


def augment(ids, mask_id, generator, swap=0.1, delete=0.1, mask=0.1):
    """A new list: ids with some pairs of tokens swapped, then some deleted, then some replaced by mask_id.

    ids: the tokens of one text, without [CLS] and the like. generator: the random.Random to draw from. swap, delete,
    mask: shares of the length, each for the nearest whole number of changes (a half is rounded up): at a tenth a text
    of fewer than 5 tokens stays as it is. The last token left is never deleted or masked. Wei & Zou section 2.
    ValueError: a share outside 0 to 1.
    """
    for name, share in (("swap", swap), ("delete", delete), ("mask", mask)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} = {share!r}: wanted a share from 0 to 1")
    n_swap, n_delete, n_mask = (int(share * len(ids) + 0.5) for share in (swap, delete, mask))
    out = list(ids)
    for _ in range(n_swap if len(out) > 1 else 0):
        i, j = generator.sample(range(len(out)), 2)
        out[i], out[j] = out[j], out[i]
    for _ in range(min(n_delete, len(out) - 1)):
        del out[generator.randrange(len(out))]
    for i in generator.sample(range(len(out)), max(0, min(n_mask, len(out) - 1))):
        out[i] = mask_id
    return out


if __name__ == "__main__":
    import random

    class Classifier(nn.Module):
        """For or against? Its embedding is frozen, so that it cannot outgrow epsilon."""

        def __init__(self, V=201, C=32):
            super().__init__()
            self.embedding = nn.Embedding(V, C).requires_grad_(False)
            self.inner, self.head = nn.Linear(C, 64), nn.Linear(64, 2)

        def outputs(self, ids, labels):
            x = F.dropout(F.relu(self.inner(self.embedding(ids))), 0.2, self.training)  # (B, T, 64)
            x = x.mean(1)  # (B, 64)
            return self.head(x), labels, x

    def draw(n):
        """Texts of 16 tokens: words 0 to 29 speak for, 30 to 59 against, 60 to 199 are filling; 200 is the mask."""
        labels = torch.randint(2, (n,))  # (n,)
        words = torch.randint(30, (n, 5)) + 30 * labels[:, None]  # (n, 5)
        words[:, 4] = (words[:, 4] + 30) % 60  # one of the five speaks for the other side
        return torch.cat((words, torch.randint(60, 200, (n, 11))), dim=1), labels  # (n, 16), (n,)

    def learn(kind, epsilon=2.0):
        torch.manual_seed(0)
        model, rng, (ids, labels) = Classifier(), random.Random(0), draw(200)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        right = []

        def backward(weight):
            if kind == "R-Drop" and model.training:
                loss, n = r_drop(lambda: model.outputs(x, y))
            else:
                logits, *_ = model.outputs(x, y)
                right.append((logits.argmax(1) == y).float().mean().item())
                loss, n = F.cross_entropy(logits, y, reduction="sum"), len(y)
            (weight * loss).backward()
            return loss.detach(), n

        for _ in range(150):
            rows = torch.randint(200, (32,))
            x, y = ids[rows], labels[rows]  # (32, 16), (32,)
            if kind == "FGM":
                _, n = fgm(backward, model.embedding, epsilon)
            elif kind == "PGD":
                _, n = pgd(backward, model.embedding, epsilon)
            elif kind == "FreeLB":
                _, n = free_lb(backward, model.embedding, epsilon)
            else:
                if kind == "EDA":  # masking alone keeps the length
                    x = torch.tensor([augment(row, 200, rng, swap=0, delete=0, mask=0.1) for row in x.tolist()])
                _, n = backward(1.0)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(n)
            optimizer.step()
            optimizer.zero_grad()
        (x, y), right = draw(1000), []
        model.eval()
        pgd(backward, model.embedding, epsilon, epsilon / 4, steps=10)  # the attack: for what it sees on its way
        return right[0], right[-1]

    torch.set_num_threads(1)
    print("200 texts; a text has ||e|| = 22.6, an attack changes it by 2.0. Accuracy on 1000 others:")
    for kind in ("plain", "FGM", "PGD", "FreeLB", "R-Drop", "EDA"):
        clean, under_attack = learn(kind)
        print(f"{kind:7} {clean:5.1%} as they are, {under_attack:5.1%} under attack")
    print("augment of 0 to 9:", augment(list(range(10)), "mask", random.Random(1)))
