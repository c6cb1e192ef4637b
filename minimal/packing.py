# SPDX-License-Identifier: MIT
"""Rows of uneven length packed into full batches: little padding, nothing dropped in silence, no look at a neighbour.

Krell, Kosec, Perez, Fitzgibbon, "Efficient Sequence Packing without Cross-contamination" (2021, arXiv 2107.02027), with
first-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973, no arXiv id) as the packing:

    pack        from the longest row to the shortest, each into the first bin that still has room for it
    bins        at most 11/9 of the fewest possible + 6/9 (Dósa 2007)
    documents   the number of the row that a token belongs to: attention stays within it and positions restart at 0
    labels      -100 at the first token of each row: else the last token of one would be trained to begin the next
    loss        a sum over tokens, so that a packed batch has the loss and the gradient of its rows run one by one

Departures: the paper packs a histogram of lengths and trains BERT, whose loss is averaged per row; here rows are packed
one by one and every token weighs the same, packed or not. Rows of one length are interchangeable, so each epoch packs
the rows in another order: other neighbours, as many bins.

    features, report = fit_rows(features, seq_len=256)       # [{"ids": [...], "labels": [...]}, ...]
    rows = PackedRows(features, seq_len=256, batch_size=8, seed=0)
    loss, count = model.loss(**rows.batch(step))             # from the seed and the step alone: resuming is exact

Letters: B rows of a batch, T = seq_len the tokens that a model reads of one (a row has T + 1, as each but the first is
the target of the one before), N features.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

POOL = 16  # batches whose rows are sorted by length together where rows are not packed: less padding


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: bins of indices into `lengths`, whose lengths sum to `capacity` at most; N log N steps.

    Of equal lengths the smaller index comes first. Raises ValueError for a length below 1 or above the capacity."""
    for i, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths[{i}] = {length}: wanted 1 to {capacity}, the capacity of a bin")
    # A tree of maxima: its leaves, from `size` on, are the room in each bin, and node n has children 2n and 2n + 1.
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room, bins = [capacity] * (2 * size), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < lengths[i])  # to the left if there is room for it: the first bin
        if node - size == len(bins):
            bins.append([])
        bins[node - size].append(i)
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def fit_rows(features: Sequence[dict], seq_len: int, limit: str = "") -> tuple[list[dict], str]:
    """Features that fit into seq_len + 1 tokens each, in order, and a sentence on what was done for it ("": nothing).
    limit: what it calls that length, by default "the context of {seq_len} tokens".

    A text, all of whose tokens are trained, is cut into pieces that share a token, so each token but the first is a
    target once, as before. Another row keeps its beginning if that has a trained token, else it is left out, as is a
    row that trains nothing at any length. Raises ValueError for labels of another length than ids, for seq_len < 1, and
    when no row remains."""
    if seq_len < 1:
        raise ValueError(f"seq_len = {seq_len}: wanted at least 1")
    kept, long, texts, pieces, cut, none, idle = [], 0, 0, 0, 0, 0, 0
    for i, feature in enumerate(features):
        ids, labels = feature["ids"], feature["labels"]
        if len(ids) != len(labels):
            raise ValueError(f"features[{i}]: {len(ids)} ids and {len(labels)} labels: wanted as many")
        long += len(ids) > seq_len + 1
        if all(label == -100 for label in labels[1:]):
            idle += 1
        elif len(ids) <= seq_len + 1:
            kept.append(feature)
        elif all(label != -100 for label in labels):
            starts = range(0, len(ids) - 1, seq_len)
            parts = [slice(start, start + seq_len + 1) for start in starts]
            kept += [feature | {"ids": ids[part], "labels": labels[part]} for part in parts]
            texts, pieces = texts + 1, pieces + len(starts)
        elif any(label != -100 for label in labels[1 : seq_len + 1]):
            kept.append(feature | {"ids": ids[: seq_len + 1], "labels": labels[: seq_len + 1]})
            cut += 1
        else:
            none += 1
    said = [f"{texts} cut into {pieces} pieces"] if texts else []
    said += [f"{cut} lost their end"] if cut else []
    said += [f"{none} left out, as no answer would remain"] if none else []
    limit = limit or f"the context of {seq_len} tokens"
    report = f"{long} of {len(features)} rows are longer than {limit}: " if said else ""
    report += ", ".join(said) + ("; " if said and idle else "")
    report += f"{idle} of {len(features)} rows left out, as they have nothing to train on" if idle else ""
    if not kept:
        raise ValueError(f"no row is left to train on: {report or 'there are no features'}")
    return kept, report


class PackedRows:
    """Batches of packed rows, in an endless sequence of epochs: each epoch takes every feature once, in another order.

    features: [{"ids", "labels"}, ...], at most seq_len + 1 long each (`fit_rows`). `len(rows)`: the rows of an epoch,
    the same number in each. pack=False: a row for each feature, for methods that cannot keep documents apart; rows of
    like length then come together, for which the rows of 16 batches change places, also at the seam of two epochs.
    Raises ValueError for no features, a longer one, seq_len < 1 and batch_size < 1."""

    def __init__(self, features: Sequence[dict], seq_len: int, batch_size: int, seed: int = 0, pad_id: int = 0,
                 pack: bool = True):  # fmt: skip
        if not features or seq_len < 1 or batch_size < 1:
            wanted = "wanted at least one feature, 1 and 1"
            raise ValueError(f"{len(features)} features, seq_len = {seq_len}, batch_size = {batch_size}: {wanted}")
        self.features, self.seq_len, self.batch_size = features, seq_len, batch_size
        self.seed, self.pad_id, self.packed, self._last = int(seed), pad_id, pack, (None, None)
        self._lengths = [len(f["ids"]) for f in features]
        self._in_order = self._bins(range(len(features)))

    def _bins(self, order):
        """The rows of an epoch, lists of indices of features."""
        order = list(order)
        bins = pack([self._lengths[i] for i in order], self.seq_len + 1)  # for its errors where nothing is packed, too
        return [[order[i] for i in row] for row in bins] if self.packed else [[i] for i in order]

    def __len__(self) -> int:
        return len(self._in_order)

    @property
    def filled(self) -> float:
        """The share of the tokens of an epoch's rows, seq_len + 1 each, that are no padding."""
        return sum(self._lengths) / (len(self) * (self.seq_len + 1))

    def _random(self, *key):
        text = " ".join(map(str, (self.seed, *key)))  # seed + epoch would give seeds each other's orders
        return random.Random(hashlib.sha256(text.encode()).digest())

    def _row(self, k):
        """Row k of the endless sequence."""
        epoch, place = divmod(k, len(self))
        if self._last[0] != epoch:
            rng, order = self._random("epoch", epoch), list(range(len(self.features)))
            rng.shuffle(order)
            rows = self._bins(order)
            rng.shuffle(rows)  # else the longest would come first
            for row in rows:
                rng.shuffle(row)
            self._last = epoch, rows
        return self._last[1][place]

    def batch(self, index: int) -> dict[str, Tensor]:
        """Batch `index` of the endless sequence, from the arguments and the index alone; batches straddle epochs.

        {"ids", "labels", "documents"}, int64 (B, T + 1), or shorter if no row is as long. documents numbers a row's
        features from 0; its padding has a number of its own, label -100. With pack=False there are no documents: a
        causal model does not see padding that comes behind."""
        if index < 0:
            raise ValueError(f"index = {index}: wanted 0 or more")
        # A pool is no larger than an epoch: else sorting would bring copies of a row into one batch.
        pool = 1 if self.packed else max(1, min(POOL, len(self) // self.batch_size))
        first, size = index // pool * pool, self.batch_size
        rows = [self._row(k) for k in range(first * size, (first + pool) * size)]
        rows.sort(key=lambda row: self._lengths[row[0]] if pool > 1 else 0)
        order = list(range(pool))
        self._random("pool", index // pool).shuffle(order)
        at = order[index - first] * size
        return self._collate(rows[at : at + size])

    def sequential(self, batch_size: int | None = None, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches as `batch` gives them, over all features once and the same at each call, to validate on; the last may
        have fewer rows. At most `limit` batches."""
        size = batch_size or self.batch_size
        for at in range(0, len(self), size)[:limit]:
            yield self._collate(self._in_order[at : at + size])

    def _collate(self, rows):
        longest = max(sum(self._lengths[i] for i in row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)  # (B, T + 1)
        labels, documents = torch.full_like(ids, -100), torch.zeros_like(ids)
        for b, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row):
                end = at + self._lengths[i]
                ids[b, at:end] = torch.tensor(self.features[i]["ids"])
                labels[b, at + 1 : end] = torch.tensor(self.features[i]["labels"][1:], dtype=torch.long)
                documents[b, at:] = number
                at = end
            documents[b, at:] = len(row)
        return {"ids": ids, "labels": labels} | ({"documents": documents} if self.packed else {})


if __name__ == "__main__":
    rng = random.Random(0)
    features = []
    for _ in range(2000):
        ids = [rng.randrange(1, 99) for _ in range(min(900, 8 + int(rng.expovariate(1 / 60))))]
        features.append({"ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    features, report = fit_rows(features, 256)
    print(report)
    tokens = sum(len(f["ids"]) for f in features)
    for name, bins in (
        ("one a row", [[i] for i in range(len(features))]),
        ("first-fit decreasing", pack([len(f["ids"]) for f in features], 257)),
        ("no packing can have fewer", [[]] * -(-tokens // 257)),
    ):
        print(f"{name}: {len(bins)} rows of 257 tokens, {1 - tokens / (257 * len(bins)):.1%} padding")
    for packed in (True, False):
        rows = PackedRows(features, 256, 16, pack=packed)
        batches = [rows.batch(i)["labels"] for i in range(40)]
        part = sum(int((y != -100).sum()) for y in batches) / sum(y.numel() for y in batches)
        print(f"40 batches of 16, pack={packed}: {part:.1%} of their tokens are trained", end="; ")
        again = PackedRows(features, 256, 16, pack=packed).batch(30)
        print("resumed at 30, the same:", torch.equal(again["labels"], batches[30]))
    rows = PackedRows([{"ids": [i] * 3, "labels": [-100, i, i]} for i in (1, 2, 3)], 9, 1)
    for name, value in rows.batch(0).items():
        print(f"{name:9}", value[0].tolist())
