# SPDX-License-Identifier: MIT
"""Distillation: a small student learns from the soft predictions and hidden states of a large teacher.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015, 1503.02531), and the triple loss of
Sanh, Debut, Chaumond, Wolf, "DistilBERT" (2019, 1910.01108). With student logits z, teacher logits v, temperature T,
hidden states h and V classes:

    p = softmax(v / T)     q = softmax(z / T)                      (Hinton eq. 1)
    soft   = T^2 KL(p || q) = T^2 sum_c p_c (ln p_c - ln q_c)      T^2 keeps its gradient's size at every T (section 2)
           -> 1 / (2 V) sum_c (z'_c - v'_c)^2  as T -> infinity    z', v' have mean 0: logits are matched (eq. 4)
    hard   = - ln softmax(z)[target]                               at T = 1
    cosine = 1 - <h, h_teacher> / (|h| |h_teacher|)                DistilBERT, section 3
    loss   = (a_soft soft + a_hard hard + a_cos cosine) / (a_soft + a_hard + a_cos)

DistilBERT starts the student from one teacher block out of two; skip_layers does so for any ratio:
student block i = teacher block floor(i L_teacher / L_student).

Departures, and what else to know:
- The soft term is the KL divergence; Hinton and DistilBERT write the cross-entropy -sum p ln q, which differs by the
  entropy of p, a constant to the student: the gradient is the same, and this one is 0 when the student is the teacher.
- The three weights are divided by their sum, so that a learning rate keeps its meaning; 5, 2, 1 are DistilBERT's.
- All three terms are sums, and the loop divides once, by the number of targets n: only so is the gradient the same for
  every split into microbatches. The cosine term sums over all M hidden positions, of which there may be more than
  targets, so in loss / n it weighs M / n times as much as a mean would. That ratio must not be taken from the batch
  (n times the batch's mean is a mean of means again); multiply the weight by what n / M is expected to be: 1 for a
  causal language model, 0.15 for masked tokens, 1 / T for a classifier with texts of T tokens.
- The soft term counts where the hard term does (target not -100); DistilBERT's code counts it at every real token.
- DistilBERT's code takes the blocks 0, 2, 4, 7, 9, 11 of BERT's twelve; here 0, 2, 4, 6, 8, 10, as its paper says.

    skip_layers(teacher, student)                                       # once, before training
    with torch.no_grad(): soft_targets = teacher.eval().outputs(**batch)
    loss, count = distillation_loss(student.outputs(**batch), soft_targets);  (loss / count).backward()

Letters: N rows of logits, V classes or vocabulary, M hidden positions, C channels, n counted targets, L blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def soft_target_loss(student_logits, teacher_logits, temperature):
    """The sum over rows of T^2 KL(softmax(teacher / T) || softmax(student / T)): a scalar in nats, float32 or wider.

    student_logits, teacher_logits: (N, V), any floating dtype; the teacher gets no gradient. A class that the teacher
    rules out with -inf counts 0. Hinton et al., section 2. ValueError: shapes that differ, a temperature not above 0.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits of student and teacher of shapes {shapes}: wanted one shape (rows, classes) for both")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r}: wanted a finite number above 0")
    wide = torch.promote_types(student_logits.dtype, torch.float32)  # half precision loses small differences of ln p
    log_q = F.log_softmax(student_logits.to(wide) / temperature, dim=1)  # (N, V)
    log_p = F.log_softmax(teacher_logits.detach().to(wide) / temperature, dim=1)  # (N, V)
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)  # the limit of p ln p; -inf - -inf would be NaN
    return temperature**2 * terms.sum()


def cosine_loss(student_hidden, teacher_hidden):
    """The sum over positions of 1 - cos(student, teacher): a scalar from 0 to 2 M, float32 or wider.

    student_hidden, teacher_hidden: (M, C), any floating dtype; the teacher gets no gradient. DistilBERT, section 3.
    ValueError: shapes that differ. Widths differ in most pairs that were not made for each other: leave this term out.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.dim() != 2:
        shapes = f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        raise ValueError(f"hidden of student and teacher of shapes {shapes}: wanted one (M, C) for both, or cosine=0")
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    cos = F.cosine_similarity(student_hidden.to(wide), teacher_hidden.detach().to(wide), dim=1)  # (M,)
    return (1 - cos).sum()


def distillation_loss(student, teacher, *, temperature=2.0, soft=5.0, hard=2.0, cosine=1.0, label_smoothing=0.0):
    """The triple loss, summed, and the number n of targets that it counts (0-dim int64): divide once, at the end.

    student, teacher: what `model.outputs(**batch)` gives for the same batch: logits (N, V), targets int64 (N,) with
    -100 where nothing counts, hidden (M, C). soft, hard, cosine: the weights, divided by their sum; cosine is a weight
    for each hidden position, see the head of this file. With soft=0, cosine=0 it is the student's plain loss.
    label_smoothing: of the hard term alone. A microbatch without targets adds its cosine term and 0 to n.
    ValueError: other targets, classes or widths than the teacher's, a weight below 0, all weights 0.
    """
    whole = soft + hard + cosine
    if not (min(soft, hard, cosine) >= 0 and 0 < whole < math.inf):
        weights = f"soft = {soft!r}, hard = {hard!r}, cosine = {cosine!r}"
        raise ValueError(f"{weights}: wanted finite weights of at least 0, and one above 0")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing = {label_smoothing!r}: wanted a number from 0 to 1")
    logits, targets, hidden = student
    teacher_logits, teacher_targets, teacher_hidden = teacher
    if not torch.equal(targets, teacher_targets):  # such as a mask that each model drew for itself
        raise ValueError("targets of student and teacher differ: wanted outputs of both for the same batch")
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = hard / whole * F.cross_entropy(logits.to(wide), targets, reduction="sum", ignore_index=-100,
                                           label_smoothing=label_smoothing)  # fmt: skip
    counted = targets != -100  # (N,)
    if soft:
        total = total + soft / whole * soft_target_loss(logits[counted], teacher_logits[counted], temperature)
    if cosine:
        total = total + cosine / whole * cosine_loss(hidden, teacher_hidden)
    return total, counted.sum()


@torch.no_grad()
def skip_layers(teacher, student):
    """Start the student from the teacher, some of its blocks skipped; returns {list name: [teacher's block indices]}.

    teacher, student: two modules of one class, of which each nn.ModuleList may be shorter in the student. There block i
    gets teacher block floor(i L_teacher / L_student), the rest is copied name by name, parameters and buffers alike,
    into the student's own tensors (which keep dtype, device and ties). DistilBERT, section 3.
    ValueError, and nothing has changed: other classes, a longer list, a tensor that the teacher lacks or has in another
    shape, two tied tensors of the student for which the teacher has different values.
    """
    if type(teacher) is not type(student):
        raise ValueError(f"student is a {type(student).__name__}: wanted a {type(teacher).__name__}, as the teacher is")
    tensors = [*student.named_parameters(remove_duplicate=False), *student.named_buffers(remove_duplicate=False)]
    lists, sources = {}, {}
    for name, tensor in tensors:
        source, found = _counterpart(teacher, student, name, lists)
        if found is None or found.shape != tensor.shape:
            has = "is missing" if found is None else f"is {tuple(found.shape)}"
            raise ValueError(f"teacher's {source} {has}: wanted {tuple(tensor.shape)}, as the student's {name} is")
        first_name, _, first = sources.setdefault(id(tensor), (name, tensor, found))
        if first is not found and not torch.equal(first, found):
            raise ValueError(f"student's {first_name} and {name} are tied: wanted equal tensors in the teacher")
    for _, tensor, found in sources.values():
        tensor.copy_(found)  # in place: whatever shares this tensor goes on sharing it
    return lists


def _counterpart(teacher, student, name, lists):
    """Name and tensor (None if there is none) in the teacher for the student's tensor `name`; notes lists it passes."""
    *path, last = name.split(".")
    source = []
    for depth, part in enumerate(path):
        at = part
        if isinstance(student, nn.ModuleList):
            long, short, here = len(teacher), len(student), ".".join(path[:depth])
            if short > long:
                raise ValueError(f"student's {here} has {short} blocks: wanted at most the teacher's {long}")
            lists[here] = [i * long // short for i in range(short)]
            at = str(lists[here][int(part)])
        source.append(at)
        student, teacher = getattr(student, part), getattr(teacher, at, None)
    return ".".join([*source, last]), getattr(teacher, last, None)


if __name__ == "__main__":

    class Net(nn.Module):  # a stack of residual blocks
        def __init__(self, n_blocks, C=64, V=8):
            super().__init__()
            self.stem = nn.Linear(10, C)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C))
                                        for _ in range(n_blocks))  # fmt: skip
            self.head = nn.Linear(C, V)

        def outputs(self, x, y):
            h = self.stem(x)  # (N, C)
            for block in self.blocks:
                h = h + block(F.layer_norm(h, h.shape[1:]))
            return self.head(h), y, h  # (N, V), (N,), (N, C)

    def train(model, x, y, steps, teacher=None, **weights):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        for step in range(steps):
            rows = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
            given = teacher.outputs(x[rows], y[rows]) if teacher else model.outputs(x[rows], y[rows])
            loss, count = distillation_loss(model.outputs(x[rows], y[rows]), given, **weights)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    with torch.no_grad():
        world[0].weight.mul_(2)
        world[2].weight.mul_(12)

    def draw(n):  # the label is drawn, not the likeliest class: one label says little about an input, p says all
        x = torch.randn(n, 10)  # (n, 10)
        return x, world(x).softmax(1).multinomial(1).flatten()  # (n,)

    def accuracy(model):
        return (model.outputs(x_test, None)[0].argmax(1) == world(x_test).argmax(1)).float().mean().item()

    (x, y), (x_test, _) = draw(20000), draw(4000)
    teacher = Net(4)
    train(teacher, x, y, 600, soft=0, hard=1, cosine=0)
    teacher.requires_grad_(False)
    print(f"teacher, 4 blocks, 20000 examples: {accuracy(teacher):.1%} of test inputs get the likeliest class")
    kinds = {"labels alone": (0, 1, 0), "soft targets alone": (1, 0, 0), "labels and soft targets": (5, 2, 0),
             "skip_layers, labels alone": (0, 1, 0), "skip_layers, triple loss": (5, 2, 1)}  # fmt: skip
    for kind, (soft, hard, cosine) in kinds.items():
        scores, blocks = [], {}
        for seed in range(3):
            torch.manual_seed(seed)
            student = Net(2)
            if "skip" in kind:
                blocks = skip_layers(teacher, student)
            few = torch.randperm(len(x))[:300]
            # 60 steps are best for labels alone, which then overfit; soft targets gain 1 % more until 150.
            train(student, x[few], y[few], 60, teacher, soft=soft, hard=hard, cosine=cosine)
            scores.append(accuracy(student))
        note = f", from teacher blocks {blocks['blocks']}" if blocks else ""
        print(f"student, 2 blocks, 300 examples: {sum(scores) / len(scores):.1%} with {kind}{note}")
