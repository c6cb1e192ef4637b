# SPDX-License-Identifier: MIT
"""Masking against binomial bounds, pairs against the documents they came from, and traps, each one written out."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal.mlm import join_pair, mask_tokens, sentence_pair

V, MASK, LOW = 53, 4, 5  # ids below LOW are special


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Masking ----


def check_rates(mask):
    """1,000,000 ordinary tokens and as many special ones: which are chosen, and what becomes of them."""
    g = generator(1)
    ids = torch.randint(LOW, V, (5000, 400), generator=g)
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, ::2] = True
    masked, labels = mask(ids, special, V, MASK, ordinary=LOW, generator=g)
    chosen, n = labels != -100, int((~special).sum())
    assert n == 1_000_000 and masked.shape == labels.shape == ids.shape and masked.dtype == labels.dtype == torch.int64
    assert torch.equal(labels[chosen], ids[chosen]), "a label is not the original"
    assert not (chosen & special).any(), "a special token was chosen"
    assert torch.equal(masked[~chosen], ids[~chosen]), "a token that was not chosen changed"
    k = int(chosen.sum())
    assert scipy.stats.binomtest(k, n, 0.15).pvalue > 1e-4, f"{k / n:.4f} chosen"  # 200 in a row: 0.85**200 is 8e-15
    # 80 % [MASK]; 10 % from the V - LOW ordinary tokens, which draw the original itself once in V - LOW; 10 % stay
    same, hidden = int((masked == ids)[chosen].sum()), int((masked == MASK)[chosen].sum())
    again = 0.1 / (V - LOW)
    expected = [0.8 * k, (0.1 + again) * k, (0.1 - again) * k]
    assert scipy.stats.chisquare([hidden, same, k - hidden - same], expected).pvalue > 1e-4, (hidden / k, same / k)
    # evenly over positions, over originals, and over what replaces
    assert scipy.stats.chisquare(chosen[:, 1::2].sum(0)).pvalue > 1e-4
    replaced = chosen & (masked != ids) & (masked != MASK)
    drawn = torch.bincount(masked[replaced], minlength=V)
    assert drawn[:LOW].sum() == 0 and scipy.stats.chisquare(drawn[LOW:]).pvalue > 1e-4
    # tokens are chosen each by itself: neighbours together as often as by chance
    pairs = int((chosen[:, 1::4] & chosen[:, 3::4]).sum())
    assert scipy.stats.binomtest(pairs, n // 2, 0.15**2).pvalue > 1e-4
    return True


def test_rates():
    check_rates(mask_tokens)


def no_op(ids, special, V, mask_id, ordinary, generator):  # trap 15: the model sees what it is asked for
    return ids.clone(), mask_tokens(ids, special, V, mask_id, ordinary=ordinary, generator=generator)[1]


def labels_everywhere(ids, special, V, mask_id, ordinary, generator):
    masked, _ = mask_tokens(ids, special, V, mask_id, ordinary=ordinary, generator=generator)
    return masked, ids.clone()


def always_mask(ids, special, V, mask_id, ordinary, generator):
    masked, labels = mask_tokens(ids, special, V, mask_id, ordinary=ordinary, generator=generator)
    return torch.where(labels != -100, mask_id, ids), labels


def labels_of_the_masked(ids, special, V, mask_id, ordinary, generator):
    masked, labels = mask_tokens(ids, special, V, mask_id, ordinary=ordinary, generator=generator)
    return masked, masked.masked_fill(labels == -100, -100)


def only_what_changed_is_labelled(ids, special, V, mask_id, ordinary, generator):
    masked, labels = mask_tokens(ids, special, V, mask_id, ordinary=ordinary, generator=generator)
    return masked, labels.masked_fill(masked == ids, -100)


def any_token_at_random(ids, special, V, mask_id, ordinary, generator):  # special tokens appear inside of text
    return mask_tokens(ids, special, V, mask_id, ordinary=0, generator=generator)


def special_ones_too(ids, special, V, mask_id, ordinary, generator):
    return mask_tokens(ids, special & False, V, mask_id, rate=0.075, ordinary=ordinary, generator=generator)


def one_number_for_both(ids, special, V, mask_id, ordinary, generator):  # the choice and the use are dependent
    u = torch.rand(ids.shape, generator=generator)
    chosen = (u < 0.15) & ~special
    return torch.where(chosen & (u < 0.8), mask_id, ids), ids.masked_fill(~chosen, -100)


@pytest.mark.parametrize(
    "wrong",
    [no_op, labels_everywhere, always_mask, labels_of_the_masked, only_what_changed_is_labelled, any_token_at_random,
     special_ones_too, one_number_for_both],
)  # fmt: skip
def test_traps_of_masking(wrong):
    with pytest.raises(AssertionError):
        check_rates(wrong)


@given(
    st.lists(st.integers(1, 12), min_size=0, max_size=2),
    st.integers(1, 12),
    st.floats(0.01, 1.0),
    st.integers(0, 10**6),
)
def test_masking_of_any_shape(lead, T, rate, seed):
    g = generator(seed)
    ids = torch.randint(LOW, V, (*lead, T), generator=g)
    special = torch.rand(ids.shape, generator=g) < torch.rand(*lead, 1, generator=g)
    before = ids.clone()
    masked, labels = mask_tokens(ids, special, V, MASK, rate, LOW, g)
    chosen = labels != -100
    assert torch.equal(ids, before), "the argument was changed"
    assert torch.equal(chosen.any(-1), (~special).any(-1)), "a row with ordinary tokens has none chosen"
    assert not (chosen & special).any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert ((masked[chosen] == MASK) | (masked[chosen] >= LOW)).all()
    if rate == 1.0:
        assert torch.equal(chosen, ~special)


def test_the_forced_token_of_short_rows():
    """r n + (1 - r)^n of n tokens on average, never 0: without the forced one, half of the rows of 4 had none."""
    rows, n, r = 200_000, 4, 0.15
    ids = torch.full((rows, n), 9)
    chosen = mask_tokens(ids, ids < 0, V, MASK, ordinary=LOW, generator=generator())[1] != -100
    per_row, p0 = chosen.sum(1), (1 - r) ** n
    # exactly one: one by chance, or none and one forced
    expected = [p0 + n * r * (1 - r) ** 3] + [math.comb(n, k) * r**k * (1 - r) ** (n - k) for k in (2, 3, 4)]
    counts = torch.bincount(per_row, minlength=n + 1)
    assert counts[0] == 0
    assert scipy.stats.chisquare(counts[1:], [rows * p for p in expected]).pvalue > 1e-4
    assert scipy.stats.chisquare(chosen.sum(0)).pvalue > 1e-4, "the forced one prefers a position"
    assert abs(per_row.float().mean() - (r * n + p0)) < 0.004


def test_ordinary_as_a_tensor_and_mask_id_inside_of_a_range():
    ids = torch.full((400, 50), 9)
    masked, labels = mask_tokens(ids, ids < 0, V, MASK, 1.0, torch.tensor([11, 13]), generator())
    assert set(masked.unique().tolist()) == {MASK, 9, 11, 13} and (labels == 9).all()
    masked, _ = mask_tokens(ids, ids < 0, 12, 10, 1.0, 9, generator())  # from 9 and 11, never 10 as a random token
    assert abs((masked == 10).float().mean() - 0.8) < 0.01 and set(masked.unique().tolist()) == {9, 10, 11}


def test_masking_is_a_function_of_the_generator():
    ids = torch.randint(LOW, V, (4, 30))
    draws = [mask_tokens(ids, ids < 0, V, MASK, ordinary=LOW, generator=generator(s)) for s in (7, 7, 8)]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][1], draws[2][1])


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"rate": 0.0}, "rate = 0.0: wanted"),
        ({"rate": float("nan")}, "rate = nan: wanted"),
        ({"rate": 1.5}, "rate = 1.5: wanted"),
        ({"mask_id": V}, f"mask_id = {V}"),
        ({"mask_id": -1}, "mask_id = -1"),
        ({"ordinary": V}, r"ordinary = \[\]"),
        ({"ordinary": -3}, r"ordinary = \[\]"),
        ({"ordinary": torch.tensor([7, V])}, r"ordinary = \[7, 53\]"),
        ({"special": torch.zeros(2, 4, dtype=torch.bool)}, r"special torch.bool \(2, 4\): wanted int64 and bool"),
        ({"special": torch.zeros(2, 3)}, r"special torch.float32 \(2, 3\): wanted int64 and bool"),
        ({"ids": torch.zeros(2, 3)}, r"ids torch.float32 \(2, 3\)"),
        ({"ids": torch.zeros(2, 0).long(), "special": torch.zeros(2, 0).bool()}, "not empty"),
    ],
)
def test_masking_errors(changes, pattern):
    good = {"ids": torch.full((2, 3), 9), "special": torch.zeros(2, 3).bool(), "vocab_size": V, "mask_id": MASK}
    with pytest.raises(ValueError, match=pattern) as caught:
        mask_tokens(**{**good, **changes})
    assert "\n" not in str(caught.value)


# ---- Pairs ----


def numbered(sizes):
    """Documents whose tokens count through the whole corpus: each number says where it stands."""
    documents, n = [], 0
    for document in sizes:
        documents.append([])
        for size in document:
            documents[-1].append(list(range(n, n + size)))
            n += size
    return documents


def places(documents):
    """For each token: its document, and whether it begins and whether it ends a sentence."""
    return {
        token: (d, token == sentence[0], token == sentence[-1])
        for d, document in enumerate(documents)
        for sentence in document
        for token in sentence
    }


def check_pair(documents, index, length, pair):
    a, b, is_random = pair
    where, room = places(documents), length - 3
    assert a.dtype == b.dtype == torch.int64 and type(is_random) is bool
    a, b = a.tolist(), b.tolist()
    assert len(a) >= 1 and len(b) >= 1 and len(a) + len(b) <= room
    assert a == list(range(a[0], a[-1] + 1)) and b == list(range(b[0], b[-1] + 1)), "not consecutive"
    assert {where[t][0] for t in a} == {index}, "A is not of its document"
    homes = {where[t][0] for t in b}
    assert len(homes) == 1 and where[a[-1]][2] and where[b[0]][1], "the passages do not meet at the end of a sentence"
    if is_random:
        assert homes != {index}, "a random B of the same document"
    else:
        assert b[0] == a[-1] + 1 and homes == {index}, "B does not follow A"
    # what was cut, was cut from the longer one: a cut passage is the longer one, or both are of half the room
    cut_a, cut_b = not where[a[0]][1], not where[b[-1]][2]
    if cut_a or cut_b:
        assert len(a) + len(b) == room, "more was cut than had to be"
        assert not cut_a or len(a) >= len(b), "the shorter passage was cut"
        assert not cut_b or len(b) >= len(a) - 1, "the shorter passage was cut"
    return is_random


corpora = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=2, max_size=5)


@given(corpora, st.integers(5, 40), st.integers(0, 10**6), st.booleans())
def test_pairs_of_any_corpus(sizes, length, seed, as_tensors):
    documents, g = numbered(sizes), generator(seed)
    given_ = [[torch.tensor(s) for s in d] for d in documents] if as_tensors else documents
    for index in range(len(documents)):
        is_random = check_pair(documents, index, length, sentence_pair(given_, index, length, g))
        assert is_random or len(documents[index]) > 1


def test_half_of_the_pairs_are_random_and_everything_is_reached():
    documents = numbered([[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8], [9, 7]])
    g, where, n = generator(), places(documents), 8000
    pairs = [(i % 4, *sentence_pair(documents, i % 4, 60, g)) for i in range(n)]
    for index in range(4):
        mine = [p for p in pairs if p[0] == index]
        assert scipy.stats.binomtest(sum(p[3] for p in mine), len(mine), 0.5).pvalue > 1e-4
        homes = [where[int(p[2][0])][0] for p in mine if p[3]]
        counts = [homes.count(other) for other in range(4) if other != index]
        assert scipy.stats.chisquare(counts).pvalue > 1e-4, "some document is preferred"
    firsts = {int(p[1][0]) for p in pairs}
    assert firsts == {s[0] for d in documents for s in d[:-1]}, "A does not begin at each sentence but the last"
    assert {int(p[2][0]) for p in pairs if not p[3]} == {s[0] for d in documents for s in d[1:]}
    assert {t for p in pairs for t in (*p[1].tolist(), *p[2].tolist())} == where.keys(), "a token is never seen"


def test_the_length_does_not_tell():
    """Same number of sentences in a true and a random B, where the other documents have so many."""
    documents = numbered([[7] * 20, [7] * 20, [7] * 20])
    g = generator()
    lengths = {True: [], False: []}
    for i in range(6000):
        _, b, is_random = sentence_pair(documents, i % 3, 74, g)
        lengths[is_random].append(len(b))
    kinds = sorted(set(lengths[True]) | set(lengths[False]))
    table = [[lengths[r].count(k) for k in kinds] for r in (True, False)]
    table = [list(column) for column in zip(*table, strict=True) if sum(column) > 20]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_a_document_of_one_sentence_and_one_that_is_repeated():
    documents = [[[1, 2, 3]], [[4], [5]], [[6, 7]]]
    for seed in range(20):
        a, b, is_random = sentence_pair(documents, 0, 20, generator(seed))
        assert is_random and a.tolist() == [1, 2, 3] and b.tolist() in ([4], [5], [6, 7])
    # trap 15: the second document repeats the first, so a "random" B can be the true one
    twins, g = [[[1], [2], [3]], [[1], [2], [3]]], generator()
    randoms = 0
    for _ in range(300):
        a, b, is_random = sentence_pair(twins, 0, 20, g)
        assert is_random != (b[0] == a[-1] + 1)
        randoms += is_random
    assert 0 < randoms < 150  # fewer than half, as the coincidences count as true


def flipped(documents, index, length, g):  # trap 15: 1 for "follows"
    a, b, is_random = sentence_pair(documents, index, length, g)
    return a, b, not is_random


def from_anywhere(documents, index, length, g):  # trap 15: the random sentence may be of the same document
    a, b, is_random = sentence_pair(documents, index, length, g)
    if is_random:
        sentences = [s for d in documents for s in d]
        b = torch.tensor(sentences[int(torch.randint(len(sentences), (), generator=g))])[: length - 3 - len(a)]
    return a, b, is_random


def cut_at_the_seam(documents, index, length, g):  # a true B no longer follows what is left of A
    a, b, is_random = sentence_pair(documents, index, length * 2, g)
    return a[: (length - 3) // 2], b[: (length - 3) // 2], is_random


@pytest.mark.parametrize("wrong", [flipped, from_anywhere, cut_at_the_seam])
def test_traps_of_pairs(wrong):
    documents, g = numbered([[3, 4, 3, 5], [6, 2, 4], [5, 3, 5]]), generator()

    def run(pair):
        for i in range(120):
            check_pair(documents, i % 3, 16, pair(documents, i % 3, 16, g))

    run(sentence_pair)
    with pytest.raises(AssertionError):
        run(wrong)


@pytest.mark.parametrize(
    "documents, index, length, pattern",
    [
        ([[[1], [2]]], 0, 20, "1 documents: wanted two at least"),
        ([[[1]], [[2]]], 2, 20, "index = 2"),
        ([[[1]], [[2]]], -1, 20, "index = -1"),
        ([[[1]], [[2]]], 0, 4, "length = 4"),
        ([[], [[2]]], 0, 9, r"documents\[0\] or documents\[1\] is empty"),
        ([[[1]], []], 0, 9, r"documents\[0\] or documents\[1\] is empty"),
        ([[[]], [[2]]], 0, 9, r"documents\[0\] or documents\[1\] has empty sentences"),
    ],
)
def test_pair_errors(documents, index, length, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        sentence_pair(documents, index, length, generator())
    assert "\n" not in str(caught.value)


def test_joined_pair_is_that_of_transformers():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    reference = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    reference.pre_tokenizer = pre_tokenizers.Whitespace()
    reference.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    for a, b in (("a b c", "d e"), ("a", "b"), ("h g f e", "a b c d e f")):
        want = reference.encode(a, b)
        pair = (torch.tensor([vocab[t] for t in text.split()]) for text in (a, b))
        ids, segments, special = join_pair(*pair, cls_id=1, sep_id=2)
        assert ids.tolist() == want.ids and segments.tolist() == want.type_ids
        assert special.long().tolist() == want.special_tokens_mask
        assert ids.dtype == segments.dtype == torch.int64 and special.dtype == torch.bool
