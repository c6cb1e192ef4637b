# SPDX-License-Identifier: MIT
"""From labelled rows to padded batches of ids, and from logits back to answers: BERT's four ways to use one encoder.

Devlin, Chang, Lee, Toutanova, "BERT", 2018 (arXiv 1810.04805), figure 4 and section 4; for seq2seq Sutskever, Vinyals,
Le 2014 (1409.3215):

    classify  [CLS] text [SEP]                      one label a row, from the logits (L,) of [CLS]
    tag       [CLS] pieces of the tokens [SEP]      a token's tag stands at its first piece, -100 at the others (5.3)
    qa        [CLS] question [SEP] context [SEP]    the span i <= j of the context with the largest s_i + e_j (4.2); it
                                                    answers if that exceeds s_0 + e_0, the score of [CLS] (4.3)
                                                    segments: 0 question, 1 context; 2 its words of the question
    seq2seq   source <eos>  and  <eos> target <eos> a decoder that is trained to begin and to stop

Departures: a context that does not fit is read in windows that overlap by half, and the window whose span gains most
over its [CLS] answers (the paper's code takes the largest sum, which is not comparable between windows); tokens that do
not fit go on in another feature of the same row; a longer text, source or target loses its end, as does a question
beyond a third of the length. An answer of at most half a window is whole in one of them; a window without the whole
answer has none. The threshold of "no answer" is 0. Character offsets need no support from the tokenizer: byte-level
pieces spell the text without loss, and others, such as WordPiece, are placed by whole words. Segment 2 is the exact
match of Chen, Fisch, Weston, Bordes, "Reading Wikipedia", 2017 (1704.00051, 3.2), for a model that has such a segment:
to find a word again is learnt late, and from much text.

    features = encode("classify", rows, tokenizer, length=128, labels=("bad", "good"))
    batch = collate("classify", [features[i] for i in epoch_batches(lengths, 32, seed=0, epoch=0)[0]])
    predicted = answers("classify", rows, features, logits, labels=("bad", "good"))

Letters: B rows of a batch, T their tokens after padding, S those of a source, L labels, n tokens of a context.
"""

import hashlib
import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor

POOL = 16  # batches whose rows are sorted by length together: less padding, and in the large the order stays random
LONGEST_ANSWER = 64  # tokens: a longer span answers no question


def encode(task: str, rows: Sequence[dict], tokenizer, length: int, labels: Sequence[str] = (),
           segments: int = 2) -> list[dict]:  # fmt: skip
    """Rows -> features: dicts of lists of at most `length` ids, with "row", the index that each came from. (A target
    has length + 1, as a decoder reads all but the last and is asked for all but the first.)

    tokenizer: minimal/tokenizer.py's, with the tokens [CLS] and [SEP], or an eos_id for seq2seq. segments: how many the
    model knows; with a third, qa marks the context's words that stand in the question. Rows need not have
    labels, tags, answers or a target (to predict): then the features have none. Raises ValueError when `length` leaves
    no room, the tokenizer lacks those tokens, or a label is none of `labels`."""
    cls, sep, eos = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"), tokenizer.eos_id
    number = {name: i for i, name in enumerate(labels)}
    if length < 8:
        raise ValueError(f"length = {length}: wanted at least 8 tokens a row")
    if None in ([eos] if task == "seq2seq" else [cls, sep]):
        raise ValueError(f"[CLS] = {cls}, [SEP] = {sep}, eos_id = {eos}: the tokenizer has no token that {task} needs")
    for row in rows if task in ("classify", "tag") else ():
        for name in row.get("tags", [row["label"]] if "label" in row else []):
            if name not in number:
                raise ValueError(f"the label {name!r}: wanted one of {', '.join(map(repr, labels)):.200}")
    features = []
    for index, row in enumerate(rows):
        if task == "seq2seq":
            new = {"row": index, "source": tokenizer.encode(row["source"])[: length - 1] + [eos]}
            if "target" in row:
                new["target"] = [eos, *tokenizer.encode(row["target"])[: length - 1], eos]
            features.append(new)
        elif task == "classify":
            new = {"row": index, "ids": [cls, *tokenizer.encode(row["text"])[: length - 2], sep]}
            features.append(new | ({"labels": number[row["label"]]} if "label" in row else {}))
        elif task == "tag":
            # A space before each token but the first, as in running text: the pieces that pretraining has seen.
            pieces = [tokenizer.encode(" " * (i > 0) + t)[: length - 2] for i, t in enumerate(row["tokens"])]
            new, first = None, len(features)
            for i, ids in enumerate(pieces):
                if new is None or len(new["ids"]) + len(ids) >= length:
                    new = {"row": index, "ids": [cls], "labels": [-100], "places": []}
                    features.append(new)
                new["places"].append(len(new["ids"]))
                new["labels"] += [number[row["tags"][i]] if "tags" in row else -100] + [-100] * (len(ids) - 1)
                new["ids"] += ids
            for new in features[first:]:
                new["ids"].append(sep)
                new["labels"].append(-100)
                if "tags" not in row:
                    del new["labels"]
        elif task == "qa":
            features += _windows(index, row, tokenizer, length, cls, sep, segments > 2)
        else:
            raise ValueError(f"task = {task!r}: wanted classify, tag, qa or seq2seq")
    return features


def _place(context, tokenizer):
    """-> (ids of the context, the characters [start, end) that each touches)"""
    ids = tokenizer.encode(context)
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    if b"".join(pieces) != context.encode():  # WordPiece, which cuts at spaces and punctuation: word by word
        for words in (r"\w+|[^\w\s]", r"\S+"):  # the second: where an accent stands in a word as a mark of its own
            parts = [(m.start(), m.end(), tokenizer.encode(m[0])) for m in re.finditer(words, context)]
            if ids == [i for *_, few in parts for i in few]:
                break
        return [i for *_, few in parts for i in few], [(a, b) for a, b, few in parts for _ in few]
    at_byte = [i for i, c in enumerate(context) for _ in c.encode()] + [len(context)]  # byte -> character
    offsets, here = [], 0
    for piece in pieces:
        there = here + len(piece)
        offsets.append((at_byte[here], at_byte[there - 1] + 1))
        here = there
    return ids, offsets


def _windows(index, row, tokenizer, length, cls, sep, mark):
    """The features of a question: its context in one window, or in several that overlap by half."""
    context = row["context"]
    question, (ids, offsets) = tokenizer.encode(row["question"])[: length // 3], _place(context, tokenizer)
    asked = set(re.findall(r"\w+", row["question"].lower())) if mark else ()
    same = [i for m in re.finditer(r"\w+", context) if m[0].lower() in asked for i in range(m.start(), m.end())]
    same, head = set(same), [cls, *question, sep]
    room = length - len(head) - 1
    step, answers, run = max(1, room // 2), row.get("answers"), []
    if answers is not None and answers["text"]:  # of several the first is learnt; all count when it is scored
        start, end = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
        run = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]  # the tokens that touch it
    for begin in range(0, max(1, len(ids) - room + step), step):  # the last is the first that reaches the end
        part = offsets[begin : begin + room]
        new = {"row": index, "ids": [*head, *ids[begin : begin + room], sep], "head": len(head), "offsets": part}
        new["segments"] = [0] * len(head) + [1 + (not same.isdisjoint(range(a, b))) for a, b in part] + [1]
        if answers is not None:
            new["starts"] = new["ends"] = 0  # [CLS]: no answer in this window
            if run and begin <= run[0] and run[-1] < begin + room:
                new["starts"], new["ends"] = len(head) + run[0] - begin, len(head) + run[-1] - begin
        yield new


def _pad(lists: Sequence[list[int]], value: int) -> Tensor:
    longest = max(map(len, lists))
    return torch.tensor([[*x, *[value] * (longest - len(x))] for x in lists])  # (B, T)


def collate(task: str, features: Sequence[dict], pad_id: int = 0) -> dict[str, Tensor]:
    """Features -> a batch, int64 but for the masks (bool, True: a token, no padding):

    seq2seq: source, source_mask (B, S), and target, labels (B, T + 1), labels -100 at the padding; else ids, segments,
    mask (B, T), and labels (B,) for classify, (B, T) for tag, starts and ends (B,) for qa."""
    first = features[0]
    if task == "seq2seq":
        lists = [f["source"] for f in features]
        batch = {"source": _pad(lists, pad_id), "source_mask": _pad([[1] * len(x) for x in lists], 0).bool()}
        if "target" in first:
            lists = [f["target"] for f in features]
            batch |= {"target": _pad(lists, pad_id), "labels": _pad(lists, -100)}
        return batch
    lists = [f["ids"] for f in features]
    batch = {"ids": _pad(lists, pad_id), "mask": _pad([[1] * len(x) for x in lists], 0).bool()}
    batch["segments"] = _pad([f.get("segments") or [0] * len(f["ids"]) for f in features], 0)
    for name in ("labels", "starts", "ends"):
        if name in first:
            values = [f[name] for f in features]
            batch[name] = _pad(values, -100) if task == "tag" else torch.tensor(values)
    return batch


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings of unit length, (B, C): the mean of hidden (B, T, C) where mask (B, T) is True (Reimers &
    Gurevych, "Sentence-BERT", 2019, 1908.10084, section 3); their products are cosines."""
    summed = (hidden * mask[..., None].to(hidden.dtype)).sum(1)  # (B, C); the length of the mean falls out
    return torch.nn.functional.normalize(summed, dim=1)


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: every index once, those of a batch of like lengths; from the arguments alone."""
    rng = random.Random(hashlib.sha256(f"{seed} {epoch}".encode()).digest())
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for i in range(0, len(order), POOL * batch_size):
        pool = sorted(order[i : i + POOL * batch_size], key=lengths.__getitem__)
        batches += [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


def answers(task: str, rows: Sequence[dict], features: Sequence[dict], logits: Sequence[Tensor],
            labels: Sequence[str] = ()) -> list:  # fmt: skip
    """Logits, one tensor per feature, -> what they say of each row: a label, a list of tags, or a text ("": no answer).

    logits: (L,) for classify, (T, L) for tag, (T, 2) of starts and ends for qa."""
    if task == "classify":
        return [labels[int(x.argmax())] for x in logits]
    if task == "tag":
        tags = [[] for _ in rows]
        for f, x in zip(features, logits, strict=True):
            tags[f["row"]] += [labels[i] for i in x[f["places"]].argmax(-1).tolist()]
        return tags
    best = [(0.0, "")] * len(rows)  # no span beats [CLS], whose score is taken off: no answer
    for f, x in zip(features, logits, strict=True):
        n, head = len(f["offsets"]), f["head"]
        start, end = x[head : head + n].unbind(-1)  # (n,) each, the context's tokens alone
        allowed = torch.ones(n, n, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        score = (start[:, None] + end).masked_fill(~allowed, -torch.inf)  # (n, n)
        place = int(score.argmax()) if n else 0
        gain = float(score.flatten()[place] - x[0].sum()) if n else 0.0
        if gain > best[f["row"]][0]:
            a, b = f["offsets"][place // n][0], f["offsets"][place % n][1]
            best[f["row"]] = gain, rows[f["row"]]["context"][a:b].strip()
    return [text for _, text in best]


if __name__ == "__main__":

    class Bytes:  # a tokenizer of bytes, as minimal/tokenizer.py's are at heart
        eos_id = 256

        def encode(self, text):
            return list(text.encode())

        def decode_bytes(self, ids):
            return bytes(ids)

        def token_to_id(self, token):
            return {"[CLS]": 257, "[SEP]": 258}[token]

    rows = [{"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]}, {"tokens": ["No", "one"], "tags": ["O", "O"]}]
    batch = collate("tag", encode("tag", rows, Bytes(), 32, ("B-PER", "O")))
    print("ids   ", batch["ids"][0].tolist(), "\nlabels", batch["labels"][0].tolist())
    context = "A café opened in 1686. " * 3 + "It serves coffee. " + "Writers came. " * 5
    row = {"question": "What is served?", "context": context, "answers": {"text": ["coffee"], "answer_start": [79]}}
    features = encode("qa", [row], Bytes(), 64)
    print(f"context of {len(context.encode())} bytes: {len(features)} windows, answer in", end=" ")
    print([(i, f["starts"], f["ends"]) for i, f in enumerate(features) if f["starts"]])
    logits = [torch.zeros(len(f["ids"]), 2) for f in features]
    for f, x in zip(features, logits, strict=True):  # what a perfect model would say
        x[f["starts"], 0] = x[f["ends"], 1] = 5.0
    print("decoded:", answers("qa", [row], features, logits))
    lengths = [random.Random(i).randrange(5, 100) for i in range(2000)]
    for name, batches in (
        ("in any order", [list(range(i, i + 20)) for i in range(0, 2000, 20)]),
        ("of like length", epoch_batches(lengths, 20, seed=0, epoch=0)),
    ):
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        print(f"batches {name}: {1 - sum(lengths) / padded:.1%} padding")
