# SPDX-License-Identifier: MIT
"""Packed rows: a plain first fit and the best packing by search are the oracles, and GPT on each row alone."""

import copy
import itertools
import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from minimal.gpt import GPT, GPTConfig
from minimal.packing import POOL, PackedRows, fit_rows, pack

T = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, n_positions=T, n_embd=16, n_layer=2, n_head=2, dropout=0.0)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def fault(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert re.search(".*".join(map(re.escape, parts)), message), message


@st.composite
def rows(draw, longest=T + 1):
    """Features of which the last token at least is trained; now and then all of it, as of a text."""
    ids = draw(st.lists(st.integers(1, 30), min_size=2, max_size=longest))
    trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)) | st.just([True] * len(ids)))
    trained = [*trained[:-1], True]
    return {"ids": ids, "labels": [i if t else -100 for i, t in zip(ids, trained, strict=True)]}


features_ = st.lists(rows(), min_size=1, max_size=12)


def contents(batch):
    """The rows of features, as (ids, labels) with the label of a first token dropped, found from `documents` alone."""
    found = []
    documents = batch.get("documents")
    for b, (ids, labels) in enumerate(zip(batch["ids"].tolist(), batch["labels"].tolist(), strict=True)):
        numbers = documents[b].tolist() if documents is not None else [0] * len(ids)
        at = 0
        for _, run in itertools.groupby(numbers):
            n = len(list(run))
            part = [i for i in ids[at : at + n] if i], labels[at : at + n]  # padding is id 0 in these tests
            if part[0]:
                found.append((tuple(part[0]), tuple(part[1][: len(part[0])])))
                assert all(label == -100 for label in part[1][len(part[0]) :])
            else:
                assert all(label == -100 for label in part[1])
            at += n
    return found


def wanted(features):
    return sorted((tuple(f["ids"]), (-100, *f["labels"][1:])) for f in features)


# ---- packing -------------------------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_first_fit_decreasing(lengths, capacity):
    """Against the definition, bin by bin."""
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in bins:
            if sum(lengths[j] for j in row) + lengths[i] <= capacity:
                row.append(i)
                break
        else:
            bins.append([i])
    assert pack(lengths, capacity) == bins


@hypothesis.given(st.lists(st.integers(1, 10), min_size=1, max_size=8))
def test_how_far_from_the_best(lengths):
    """At most 11/9 of the fewest bins + 6/9; the fewest by search."""

    def fewest(room, rest):
        if not rest:
            return 0
        best = 1 + fewest([*room, 10 - rest[0]], rest[1:])
        for k in {r: k for k, r in enumerate(room) if r >= rest[0]}.values():
            left = [*room]
            left[k] -= rest[0]
            best = min(best, fewest(left, rest[1:]))
        return best

    assert len(pack(lengths, 10)) <= 11 / 9 * fewest([], lengths) + 6 / 9


def test_pack_is_fast_and_checks():
    lengths = [1 + i * 7919 % 2048 for i in range(50_000)]
    start = time.perf_counter()
    bins = pack(lengths, 2049)
    assert time.perf_counter() - start < 10  # it takes 1 s; a search through all bins would take minutes
    assert sorted(itertools.chain(*bins)) == list(range(50_000)) and len(bins) < 1.01 * sum(lengths) / 2049
    assert pack([], 4) == [] and pack([4], 4) == [[0]]
    fault(lambda: pack([1, 5], 4), "lengths[1] = 5: wanted 1 to 4")
    fault(lambda: pack([0], 4), "lengths[0] = 0: wanted 1 to 4")


# ---- batches -------------------------------------------------------------------------------------------------------


@hypothesis.given(features_, st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_an_epoch_has_every_row_once(features, size, packed, seed):
    """Batches straddle epochs, so n len(rows) batches are n `size` whole epochs; the validation is one epoch."""
    data = PackedRows(features, T, size, seed, pack=packed)
    n = 1 if packed else max(1, min(POOL, len(features) // size))  # whole pools too: rows change their place in them
    batches = [data.batch(i) for i in range(n * len(data))]
    assert all(len(b["ids"]) == size and b["ids"].shape[1] <= T + 1 for b in batches)
    found = [c for b in batches for c in contents(b)]
    assert sorted(found) == sorted(wanted(features) * size * n)
    again = [c for b in data.sequential() for c in contents(b)]
    assert sorted(again) == wanted(features)
    assert [c for b in PackedRows(features, T, 3, 77, pack=packed).sequential(size) for c in contents(b)] == again
    assert ("documents" in batches[0]) == packed
    if not packed:
        assert len(data) == len(features) and 0 < data.filled <= 1
    assert data.filled == pytest.approx(sum(len(f["ids"]) for f in features) / len(data) / (T + 1))


@hypothesis.given(features_, st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_a_batch_is_a_function_of_its_index(features, size, packed, index):
    data = PackedRows(features, T, size, 5, pack=packed)
    for i in (3, 0, index + 7):
        data.batch(i)
    for name, value in data.batch(index).items():
        assert torch.equal(value, PackedRows(features, T, size, 5, pack=packed).batch(index)[name])
        assert value.dtype == torch.int64


@pytest.mark.parametrize("packed", [True, False])
def test_epochs_and_seeds_differ(packed):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, T + 1, (60,), generator=generator).tolist()
    features = [{"ids": [1 + i % 30] * n, "labels": [1 + i % 30] * n} for i, n in enumerate(lengths)]

    def epoch(seed, number):
        data = PackedRows(features, T, 1, seed, pack=packed)
        return [data.batch(number * len(data) + i)["ids"][0].tolist() for i in range(len(data))]

    epochs = {(s, e): epoch(s, e) for s in (0, 1) for e in (0, 1)}
    for a, b in itertools.combinations(epochs, 2):
        assert epochs[a] != epochs[b], (a, b)  # seed + epoch as the key would make (0, 1) equal (1, 0)
        if packed:  # other neighbours too, not the same rows in another order
            rows = [{tuple(sorted(row)) for row in epochs[e]} for e in (a, b)]
            assert rows[0] != rows[1]
    firsts = [epoch(seed, 0)[0] for seed in range(9)]
    assert not all(row.count(row[0]) == T for row in firsts)  # bins in the order of packing: the longest come first


def test_rows_of_like_length_come_together():
    """Where they are not packed; and no batch has one row twice, however few there are."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, T + 2, (400,), generator=generator).tolist()
    features = [{"ids": [1] * n, "labels": [1] * n} for n in lengths]
    data = PackedRows(features, T, 10, pack=False)
    padded = sum(data.batch(i)["ids"].numel() for i in range(40))
    unsorted = sum(10 * max(lengths[i : i + 10]) for i in range(0, 400, 10))
    assert sum(lengths) <= padded < 1.1 * sum(lengths) < 1.5 * sum(lengths) < unsorted
    few = PackedRows([{"ids": [i, i], "labels": [i, i]} for i in range(1, 5)], T, 4, pack=False)
    assert all(sorted(few.batch(i)["ids"][:, 0].tolist()) == [1, 2, 3, 4] for i in range(20))


def test_a_few_numbers():
    rows = PackedRows([{"ids": [i] * i, "labels": [i] * i} for i in (2, 3, 4)], 9, 2, pad_id=9)
    batch = next(rows.sequential())
    assert batch["ids"].tolist() == [[4, 4, 4, 4, 3, 3, 3, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 4, 4, 4, -100, 3, 3, -100, 2]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    batch = next(PackedRows([{"ids": [i] * i, "labels": [i] * i} for i in (2, 3, 4)], 5, 2, pad_id=9).sequential())
    assert batch["ids"].tolist() == [[4, 4, 4, 4, 2, 2], [3, 3, 3, 9, 9, 9]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 4, 4, 4, -100, 2], [-100, 3, 3, -100, -100, -100]]
    assert [len(b["ids"]) for b in rows.sequential(1, limit=0)] == []


def test_faults_of_rows():
    feature = {"ids": [1] * 6, "labels": [1] * 6}
    fault(lambda: PackedRows([], 4, 1), "0 features")
    fault(lambda: PackedRows([feature], 5, 0), "batch_size = 0")
    fault(lambda: PackedRows([feature], 0, 1), "seq_len = 0")
    for packed in (True, False):
        fault(lambda packed=packed: PackedRows([feature], 4, 1, pack=packed), "lengths[0] = 6: wanted 1 to 5")
    fault(lambda: PackedRows([feature], 5, 1).batch(-1), "index = -1")


# ---- through a model -----------------------------------------------------------------------------------------------


def alone(model, features):
    """The sum over the rows, each run alone."""
    total, count = 0.0, 0
    for f in features:
        loss, n = model.loss(torch.tensor([f["ids"]]), torch.tensor([f["labels"]]))
        total, count = total + loss, count + n
    return total, count


@hypothesis.given(features_, st.booleans())
def test_losses_and_gradients_are_those_of_the_rows_alone(model, features, packed):
    batches = list(PackedRows(features, T, 3, pack=packed).sequential())
    summed = [model.loss(**batch) for batch in batches]
    total, count = sum(loss for loss, _ in summed), sum(n for _, n in summed)
    wanted_total, wanted_count = alone(model, features)
    assert count == wanted_count and abs(total - wanted_total) <= 1e-9 * (1 + abs(wanted_total))
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(wanted_total, parameters), strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())


def test_the_variants_that_leak(model):
    """Without documents, rows see their neighbours; with the first token of each as a target, the count is too high."""
    features = []
    for k in (3, 7, 11):
        ids = [1 + i * k % 30 for i in range(5)]
        features.append({"ids": ids, "labels": ids})
    batch = next(PackedRows(features, T, 1).sequential())
    total, count = alone(model, features)
    loss, n = model.loss(**batch)
    assert n == count == 12 and torch.allclose(loss, total)
    leaky = {name: value for name, value in batch.items() if name != "documents"}
    assert not torch.allclose(model.loss(**leaky)[0], total)
    first = batch["labels"].where(batch["ids"] == 0, batch["ids"])
    assert model.loss(batch["ids"], first, batch["documents"])[1] == count + 2


def test_one_document_does_not_move_anothers_logits(model):
    features = [{"ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"ids": [9, 10, 11], "labels": [9, 10, 11]}]
    changed = copy.deepcopy(features)
    changed[0]["ids"] = [20, 21, 22, 23]
    a, b = (next(PackedRows(f, T, 1).sequential()) for f in (features, changed))
    mine = a["documents"][0] == 1
    assert a["ids"][0, mine].tolist() == [9, 10, 11]
    with torch.no_grad():
        before, after = (model(x["ids"], documents=x["documents"])[0] for x in (a, b))
        assert torch.equal(before[mine], after[mine]) and not torch.allclose(before[~mine], after[~mine])
        leaky = [model(x["ids"])[0, mine] for x in (a, b)]
    assert not torch.allclose(*leaky)


# ---- rows that are too long ----------------------------------------------------------------------------------------


@hypothesis.given(st.lists(rows(longest=60), min_size=1, max_size=8), st.integers(1, 20))
def test_fit_rows(features, seq_len):
    """Every target of a text once; of other rows those of the beginning; all that is cut stands in the report."""
    before = copy.deepcopy(features)
    targets, cut, lost, pieces, texts = [], 0, 0, 0, 0
    for f in features:
        text = -100 not in f["labels"]
        end = len(f["ids"]) if text else seq_len + 1
        new = [(f["ids"][i - 1], f["labels"][i]) for i in range(1, min(end, len(f["ids"]))) if f["labels"][i] != -100]
        targets += new
        if len(f["ids"]) > seq_len + 1:
            pieces += -(-(len(f["ids"]) - 1) // seq_len) if text else 0
            texts, cut, lost = texts + text, cut + (not text and bool(new)), lost + (not text and not new)
    if not targets:
        fault(lambda: fit_rows(features, seq_len), "no row is left", f"{lost} left out")
        return
    kept, report = fit_rows(features, seq_len)
    assert features == before, "the caller's rows were changed"
    assert all(2 <= len(f["ids"]) == len(f["labels"]) <= seq_len + 1 for f in kept)
    found = [(f["ids"][i - 1], f["labels"][i]) for f in kept for i in range(1, len(f["ids"])) if f["labels"][i] != -100]
    assert found == targets
    assert len(kept) == len(features) - texts + pieces - lost
    n = cut + lost + texts
    said = [f"{n} of {len(features)} rows are longer than the context of {seq_len} tokens: "] if n else []
    said += [f"{texts} cut into {pieces} pieces"] if texts else []
    said += [f"{cut} lost their end"] if cut else []
    said += [f"{lost} left out, as no answer would remain"] if lost else []
    assert all(part in report for part in said) and bool(report) == bool(n)
    PackedRows(kept, seq_len, 2).batch(0)  # they fit


def test_what_fit_rows_refuses():
    good, idle = {"ids": [1, 2], "labels": [-100, 2]}, {"ids": [1, 2], "labels": [1, -100]}  # of a first token alone
    assert fit_rows([good, idle], 4) == ([good], "1 of 2 rows left out, as they have nothing to train on")
    fault(lambda: fit_rows([idle], 4), "no row is left to train on: 1 of 1 rows left out")
    fault(lambda: fit_rows([], 4), "no row is left to train on: there are no features")
    fault(lambda: fit_rows([good, {"ids": [1, 2], "labels": [1]}], 4), "features[1]: 2 ids and 1 labels")
    fault(lambda: fit_rows([good], 0), "seq_len = 0: wanted at least 1")
    named = fit_rows([{"ids": [1, 2, 3], "labels": [1, 2, 3], "key": "a"}], 1)[0]
    assert named == [{"ids": [i, i + 1], "labels": [i, i + 1], "key": "a"} for i in (1, 2)]
