# SPDX-License-Identifier: MIT
"""Classify without training: which label does a language model find likeliest behind the text, with K examples shown?

Brown et al., "Language Models are Few-Shot Learners" (2020, arXiv 2005.14165), section 2.4; Holtzman, West, Shwartz,
Choi, Zettlemoyer, "Surface Form Competition" (2021, 2104.08315); Zhao, Wallace, Feng, Klein, Singh, "Calibrate Before
Use" (2021, 2102.09690). With the label y of tokens y_1 .. y_n behind the prompt x, the prediction is argmax_y of

    sum            ln p(y | x) = sum_i ln p(y_i | x, y_1 .. y_{i-1})
    mean           ln p(y | x) / n                       long labels pay no more than short ones
    unconditional  ln p(y | x) - ln p(y | "Label:")      what the model says in any case counts for nothing (PMI)
    calibrated     ln p(y | x) - ln p(y | x_cf)          x_cf: the same examples, "N/A" as the text

    Label the text as one of: bad, good.
                                                         K examples, then the text; the model has only to go on
    Text: cold soup
    Label: bad

    Text: a fine meal
    Label:

Departures: Zhao et al. average over three texts without content; one is used here. Labels of which one begins another
("1", "10") end in a line end, or in a chat in the turn's end, else the shorter could not lose. The examples are drawn
evenly from the labels, which take turns, as the label that stood last is favoured. A prompt beyond the context loses
examples from the front, then the text its end; how often is told.

    scores = label_scores(model, prompt_ids, [[17], [23, 5]])       # (2,)
    result = classify(model, tokenizer, ["a fine meal"], ("bad", "good"), examples=train, shots=8)
    result.labels, result.scores, result.fewer_examples, result.shortened

Letters: L labels, n tokens of the longest, P of the prompt, S read before, N texts, V vocabulary, K examples.
"""

import hashlib
import random
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

NORMALISE = ("sum", "mean", "unconditional", "calibrated")
NO_CONTENT = "N/A"


class Predictions(NamedTuple):
    """What `classify` returns."""

    labels: list[str]  # one for each text
    scores: Tensor  # (N, L) nats, float32 or wider, on the CPU
    fewer_examples: int  # of how many texts the prompt lost examples, as it did not fit the context
    shortened: int  # how many of these texts lost their own end too, as they did not fit without any example


# Same as minimal/generate.py: _evaluating
@contextmanager
def _evaluating(model):
    """Dropout off inside; outside exactly the modules that were training still are, whatever mixture that was."""
    training = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def label_scores(model, prompt_ids: Sequence[int], label_ids: Sequence[Sequence[int]], state=None) -> Tensor:
    """ln p(label | prompt) of each label, (L,), float32 or wider, on the CPU: exact, with dropout off.

    model: model(ids, cache) -> logits (B, T, V), as minimal/generate.py wants it. The prompt is read once with a cache,
    all labels then go on from it as one padded batch. state: a dict that the caller keeps between calls ({} at first),
    so that what the next prompt shares with this one's beginning, such as the examples, is not read again; not to be
    kept when the model changes. Raises ValueError for an empty prompt or label, and logits with NaN."""
    if not prompt_ids or not label_ids or not all(map(len, label_ids)):
        raise ValueError(f"{len(prompt_ids)} ids of a prompt, {len(label_ids)} labels: wanted at least 1, none empty")
    place = next(model.parameters(), torch.empty(0)).device if isinstance(model, torch.nn.Module) else None
    state, prompt = {} if state is None else state, list(prompt_ids)
    before, cache = state.get("ids", []), state.get("cache", [])
    same = next((i for i, (a, b) in enumerate(zip(before, prompt[:-1], strict=False)) if a != b), None)
    same = min(len(before), len(prompt) - 1) if same is None else same
    cache = [(k[:, :, :same], v[:, :, :same]) for k, v in cache] if same else []
    with _evaluating(model):
        if prompt[same:-1]:  # `hidden` spares the logits of the prompt, V for each token
            getattr(model, "hidden", model)(torch.tensor([prompt[same:-1]], device=place), cache)
        state["ids"], state["cache"] = prompt[:-1], list(cache)
        longest = max(map(len, label_ids))
        targets = [[*label, *[-100] * (longest - len(label))] for label in label_ids]
        targets = torch.tensor(targets, device=place)  # (L, n)
        ids = torch.cat((torch.full_like(targets[:, :1], prompt[-1]), targets[:, :-1].clamp(min=0)), dim=1)  # (L, n)
        L = len(label_ids)
        cache = [(k.expand(L, -1, -1, -1), v.expand(L, -1, -1, -1)) for k, v in cache]  # (1, H, S, D) -> (L, H, S, D)
        logits = model(ids, cache)  # (L, n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[:, :, None]).squeeze(2)  # (L, n)
    scores = each.masked_fill(targets == -100, 0.0).sum(1)  # (L,)
    if scores.isnan().any():
        raise ValueError(f"the scores are {scores.tolist()!s:.60}: the model gives logits that are NaN (diverged?)")
    return scores.cpu()


def choose_examples(examples: Sequence[dict], shots: int, seed: int = 0) -> list[dict]:
    """K of the rows {"text", "label"}, drawn by the seed: as many of each label as can be had, the labels taking turns.

    Raises ValueError for fewer than 0 shots or more than there are rows."""
    if not 0 <= shots <= len(examples):
        raise ValueError(f"shots = {shots}: wanted 0 to {len(examples)}, the number of examples")
    rng = random.Random(hashlib.sha256(f"{seed}".encode()).digest())
    of_label = {}
    for row in rng.sample(list(examples), len(examples)):
        of_label.setdefault(row["label"], []).append(row)
    chosen = []
    while len(chosen) < shots:
        turn = [rows.pop() for _, rows in sorted(of_label.items()) if rows]
        rng.shuffle(turn)
        chosen += turn
    return chosen[:shots]


def few_shot_prompt(examples: Sequence[dict], text: str, instruction: str = "") -> str:
    """The prompt as text: instruction, examples {"text", "label"}, and the text whose label is to come (see above)."""
    blocks = [instruction] if instruction else []
    blocks += [f"Text: {row['text']}\nLabel: {row['label']}" for row in examples]
    return "\n\n".join([*blocks, f"Text: {text}\nLabel:"])


def few_shot_messages(examples: Sequence[dict], text: str, instruction: str = "") -> list[dict]:
    """The same as messages {"role", "content"}: each text a user turn with the instruction, its label the answer."""
    messages = []
    for row in examples:
        messages.append({"role": "user", "content": f"{instruction}\n\n{row['text']}".strip()})
        messages.append({"role": "assistant", "content": str(row["label"])})
    return [*messages, {"role": "user", "content": f"{instruction}\n\n{text}".strip()}]


def classify(model, tokenizer, texts: Sequence[str], labels: Sequence[str], examples: Sequence[dict] = (),
             shots: int = 0, seed: int = 0, chat=None, instruction: str | None = None, normalise: str = "sum",
             context: int | None = None) -> Predictions:  # fmt: skip
    """The likeliest of `labels` for each text, with `shots` of the examples {"text", "label"} shown before it.

    chat: None, or minimal/chat.py's ChatML for a model that was trained on turns: its prompt(messages) and end are
    used. instruction: default "Label the text as one of: ...". normalise: one of NORMALISE. context: the most tokens
    that the model reads, default model.config's. Raises ValueError for labels that are empty, equal or fewer than two,
    an unknown normalise, shots as `choose_examples`, and a context too short for a prompt without a text."""
    labels = [str(label) for label in labels]
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(map(str.strip, labels)):
        raise ValueError(f"labels = {labels!s:.60}: wanted two at least, all different, none empty")
    if normalise not in NORMALISE:
        raise ValueError(f"normalise = {normalise!r}: wanted {', '.join(NORMALISE)}")
    if context is None:
        config = getattr(model, "config", None)
        context = getattr(config, "n_positions", getattr(config, "max_position_embeddings", None))
        context = None if context is None else context - getattr(model, "position_offset", 0)
    if instruction is None:
        instruction = f"Label the text as one of: {', '.join(labels)}."
    chosen = choose_examples(examples, shots, seed)
    label_ids = [tokenizer.encode(label if chat else " " + label) for label in labels]
    if any(a is not b and a == b[: len(a)] for a in label_ids for b in label_ids):
        label_ids = [[*ids, *([chat.end] if chat else tokenizer.encode("\n"))] for ids in label_ids]
    # The last token of a label is never read.
    room = None if context is None else context - max(map(len, label_ids)) + 1

    def prompt(kept, text):
        if chat:
            return chat.prompt(few_shot_messages(kept, text, instruction))
        return tokenizer.encode(few_shot_prompt(kept, text, instruction))

    def fitted(text, most):
        """(ids of the prompt, how many examples it has, `most` or fewer, whether the text was cut)"""
        for k in range(most, -1, -1):
            ids = prompt(chosen[len(chosen) - k :], text)
            if room is None or len(ids) <= room:
                return ids, k, False
        part = tokenizer.encode(text)
        while part and len(ids) > room:  # once, as a rule: a cut may change how the tokens beside it are joined
            part = part[: max(0, len(part) - (len(ids) - room))]
            ids = prompt([], tokenizer.decode(part).rstrip("\ufffd"))
        if len(ids) > room:
            raise ValueError(f"context = {context}: the prompt without a text has {len(ids)} tokens, wanted <= {room}")
        return ids, 0, True

    scores, fewer, shortened, state, neutral = [], 0, 0, {}, {}
    for text in texts:
        ids, k, cut = fitted(text, len(chosen))
        fewer, shortened = fewer + (k < len(chosen)), shortened + cut
        score = label_scores(model, ids, label_ids, state)  # (L,)
        if normalise == "mean":
            score = score / torch.tensor([len(ids) for ids in label_ids])
        elif normalise != "sum":
            if k not in neutral:
                ids = chat.prompt([]) if chat else tokenizer.encode("Label:")
                ids = fitted(NO_CONTENT, k)[0] if normalise == "calibrated" else ids
                neutral[k] = label_scores(model, ids, label_ids)
            score = score - neutral[k]
        scores.append(score)
    scores = torch.stack(scores) if scores else torch.empty(0, len(labels))  # (N, L)
    return Predictions([labels[i] for i in scores.argmax(1).tolist()], scores, fewer, shortened)


if __name__ == "__main__":
    import re

    class Words:  # a tokenizer: a token is a word or a run of line ends
        vocab = {}

        def encode(self, text):
            return [self.vocab.setdefault(word, len(self.vocab)) for word in re.findall(r"\n+|\S+", text)]

    def reader(ids, cache=None):
        """A model without weights, (B, T) -> (B, T, 64): what followed the same token before will follow again, the
        likelier the more of the five tokens before are the same. Its cache holds the ids it has read."""
        read = torch.cat((cache[0][0][:, 0, :, 0], ids), dim=1) if cache else ids  # (B, S + T)
        if cache is not None:
            cache[:] = [(read[:, None, :, None], read[:, None, :, None])]
        counts = torch.full((*ids.shape, 64), 0.01)
        for b, row in enumerate(read.tolist()):
            for t in range(len(row) - ids.size(1), len(row)):
                for s in range(t):
                    if row[s] == row[t]:
                        shared = len({*row[max(0, s - 5) : s]} & {*row[max(0, t - 5) : t]})
                        counts[b, t - len(row), row[s + 1]] += 10.0**shared
        return counts.log()

    rng = random.Random(0)
    words = {"good": "fine kind warm fresh rich bright".split(), "bad": "cold rude stale burnt dull bland".split()}
    rows = []
    for label in ["good", "bad"] * 60:
        first, last = rng.choice(("the", "a", "this")), rng.choice(("soup", "place", "waiter", "meal"))
        rows.append({"text": f"{first} {rng.choice(words[label])} {last}", "label": label})
    train, test = rows[:60], rows[60:]
    print(few_shot_prompt(choose_examples(train, 2), test[0]["text"], "Label the text as one of: good, bad."), "\n")
    for shots in (0, 2, 4, 8, 16, 32):
        right = []
        for seed in range(3):  # which examples are drawn matters much
            result = classify(reader, Words(), [r["text"] for r in test], ("good", "bad"), train, shots, seed)
            right.append(sum(a == r["label"] for a, r in zip(result.labels, test, strict=True)) / len(test))
        print(f"{shots:2} examples shown: accuracy {', '.join(f'{r:.0%}' for r in right)} with three draws of them")
    result = classify(reader, Words(), [r["text"] for r in test], ("good", "bad"), train, 32, context=120)
    right = sum(a == r["label"] for a, r in zip(result.labels, test, strict=True)) / len(test)
    print(f"in a context of 120 tokens: {right:.0%}, {result.fewer_examples} of {len(test)} prompts had fewer than 32")
