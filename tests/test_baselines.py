# SPDX-License-Identifier: MIT
"""Each baseline against scikit-learn, PyTorch or brute force: one too weak would make every model look good."""

import math
import random
import sys
from collections import Counter

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from minimal import baselines
from minimal.baselines import bag_of_words, majority, overlapping_sentence, unigram, usual_sentence, usual_tags


@given(labels=st.lists(st.sampled_from(["b", "a", "c", "B", "é"]), min_size=1), n=st.integers(0, 5))
def test_majority_is_scikit_learns_dummy(labels, n):
    dummy = DummyClassifier(strategy="most_frequent").fit(numpy.zeros((len(labels), 1)), labels)
    assert majority(labels, n) == baselines.constant(labels, n) == dummy.predict(numpy.zeros((n, 1))).tolist()


@given(st.data(), st.integers(1, 9), st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_unigram_is_the_cross_entropy_of_counts_plus_one(data, vocab_size, dtype):
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=20)
    train, new = (torch.tensor(data.draw(ids), dtype=dtype) for _ in range(2))
    counts = torch.tensor([1.0 + train.tolist().count(i) for i in range(vocab_size)], dtype=torch.float64)
    logits = counts.log().expand(len(new), vocab_size)  # (N, V)
    oracle = F.cross_entropy(logits, new.long(), reduction="sum").item()
    assert unigram(train, new, vocab_size) == pytest.approx(oracle, rel=1e-12, abs=1e-12)


def test_unigram_by_hand_and_what_it_refuses():
    nats = unigram(torch.tensor([0, 0, 1]), torch.tensor([0, 2]), 3)
    assert nats == pytest.approx(-math.log(3 / 6) - math.log(1 / 6))
    # The sum is in float64: a million terms in float32 would lose digits.
    many = torch.zeros(10**6, dtype=torch.int32)
    assert unigram(many, many, 2) == pytest.approx(10**6 * math.log1p(1 / (10**6 + 1)), rel=1e-9)
    fine = torch.tensor([0, 2])
    for wrong in (torch.tensor([0, -100]), torch.tensor([3, 1])):  # -100 would index from the end, without a word
        for name, pair in (("train", (wrong, fine)), ("new", (fine, wrong))):
            with pytest.raises(ValueError, match=f"{name}: ids from .*, wanted 0 to 2"):
                unigram(*pair, 3)


tagged = st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("XYZ")), min_size=1, max_size=5))


@given(train=tagged.filter(len), new=st.lists(st.lists(st.sampled_from("abcdef"), max_size=5)))
def test_usual_tags_by_brute_force(train, new):
    pairs = [pair for row in train for pair in row]

    def usual(tags):  # of equals the one seen first, as max() has it
        return max(tags, key=tags.count)

    seen = list(dict.fromkeys(token for token, _ in pairs))
    of = {token: usual([tag for other, tag in pairs if other == token]) for token in seen}
    once = [of[token] for token in seen if [t for t, _ in pairs].count(token) == 1]
    rare = usual(once or [of[token] for token in seen])
    rows = [dict(zip(("tokens", "tags"), map(list, zip(*row, strict=True)), strict=True)) for row in train]
    assert usual_tags(rows, [{"tokens": tokens} for tokens in new]) == [[of.get(t, rare) for t in row] for row in new]


def test_an_unseen_token_is_like_the_rare_ones():
    """Not like most tokens: punctuation and function words are many, and all seen."""
    train = [{"tokens": "the a an the a an cat dog ran".split(), "tags": "D D D D D D N N V".split()}]
    assert usual_tags(train, [{"tokens": ["the", "fox", "ran"]}, {"tokens": []}]) == [["D", "N", "V"], []]
    with pytest.raises(ValueError):
        usual_tags([{"tokens": ["a", "b"], "tags": ["X"]}], [])


def another_bag_of_words(texts, labels, new):
    counts, weights = CountVectorizer(token_pattern=r"\w+"), TfidfTransformer(sublinear_tf=True)
    x = weights.fit_transform(counts.fit_transform(texts))
    return LogisticRegression(C=10.0, max_iter=200).fit(x, labels), weights.transform(counts.transform(new))


def test_bag_of_words_is_the_usual_pipeline():
    rng, words = random.Random(0), [f"w{i}" for i in range(30)]
    labels = [rng.choice(["x", "y", "z"]) for _ in range(120)]
    texts = [" ".join(rng.choices(words, k=6) + [f"W{'xyz'.index(y)}"] * rng.randrange(3) + ["!"]) for y in labels]
    model, x = another_bag_of_words(texts[:80], labels[:80], texts[80:])
    found = bag_of_words(texts[:80], labels[:80], texts[80:])
    clear = numpy.diff(numpy.sort(model.predict_proba(x), axis=1))[:, -1] > 1e-3  # (40,), not equal up to rounding
    assert clear.sum() > 35 and (numpy.array(found) == model.predict(x))[clear].all()
    right = sum(a == b for a, b in zip(found, labels[80:], strict=True))
    assert right > 5 + sum(a == b for a, b in zip(majority(labels[:80], 40), labels[80:], strict=True))


def test_bag_of_words_on_words_that_decide_and_on_none(monkeypatch):
    """Words of one letter and other alphabets count, case does not; an order of words is beyond it."""
    texts = ["a b", "a c", "Das b", "das c", "猫 b", "猫 c"] * 3
    labels = ["en", "en", "de", "de", "zh", "zh"] * 3
    found = bag_of_words(texts, labels, ["A unseen", "unseen DAS", "unseen, 猫!"])
    assert found == ["en", "de", "zh"] and all(type(label) is str for label in found)
    assert len(set(bag_of_words(["not bad", "not good"] * 5, ["p", "n"] * 5, ["bad not", "bad, bad not"]))) == 1
    assert bag_of_words(texts, labels, ["", "?!"])[0] in labels
    # Where scikit-learn would fail, the majority is all that there is to know.
    assert bag_of_words(["fine", "good"], ["p", "p"], ["bad"]) == ["p"]
    assert bag_of_words(["?", "!", "!!"], ["p", "n", "n"], ["bad", "?"]) == ["n", "n"]
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        bag_of_words(texts, labels, texts)


def sentences_by_hand(context):
    """-> [(place of the first letter, text)], letter by letter: a line's end, or a space after . ! or ?, ends one."""
    parts, begun = [], None
    for i, letter in enumerate(context + "\n"):
        if begun is None and not letter.isspace():
            begun = i
        elif begun is not None and (letter == "\n" or letter.isspace() and context[i - 1] in ".!?"):
            parts.append((begun, context[begun:i].rstrip()))
            begun = None
    return parts


contexts = st.lists(st.sampled_from(["a", "B", "cd", "e.g.", "2.5", ".", "! ", "? ", ". ", " ", "\n", "\n\n", "  "]),
                    min_size=1).map("".join).filter(str.strip)  # fmt: skip


@given(st.data(), st.lists(contexts, min_size=1, max_size=4), st.lists(contexts, max_size=3))
def test_usual_sentence_by_brute_force(data, train, new):
    rows, places = [], []
    for context in train:
        start = data.draw(st.sampled_from([i for i, letter in enumerate(context) if not letter.isspace()]))
        rows.append({"context": context, "answers": {"text": [context[start]], "answer_start": [start]}})
        places.append(sum(begun <= start for begun, _ in sentences_by_hand(context)) - 1)
    most = max(Counter(places).values())
    place = min(n for n in places if places.count(n) == most)
    wanted = [[text for _, text in sentences_by_hand(context)] for context in new]
    assert usual_sentence(rows, [{"context": c} for c in new]) == [w[min(place, len(w) - 1)] for w in wanted]


def test_an_answer_may_begin_inside_its_sentence():
    """The count of the sentences before it would take the rest of its own for one of them."""
    context = "It rains. Ada wrote it in May. It is good."
    inside = {"context": context, "answers": {"text": ["in May", "It"], "answer_start": [23, 0]}}
    none = {"context": context, "answers": {"text": [], "answer_start": []}}
    assert usual_sentence([inside, none], [none, {"context": "One."}]) == ["Ada wrote it in May.", "One."]
    first = {"context": context, "answers": {"text": ["It"], "answer_start": [0]}}
    assert usual_sentence([inside, first], [none]) == ["It rains."]  # of equals the earlier
    assert usual_sentence([none], [none]) == ["It rains."]


questions = st.lists(st.sampled_from(["a", "A", "b", "cd", "e", "2", "5?", ".", "x"])).map(" ".join)


@given(context=contexts, question=questions)
def test_overlapping_sentence_by_brute_force(context, question):
    def words(text):
        return {w for w in "".join(c if c.isalnum() else " " for c in text.lower()).split()}

    (found,) = overlapping_sentence([{"context": context, "question": question}])
    sentences = [text for _, text in sentences_by_hand(context)]
    shared = [len(words(text) & words(question)) for text in sentences]
    assert found == next(text for text, n in zip(sentences, shared, strict=True) if n == max(shared))


def test_overlapping_sentence_counts_different_words():
    rows = [
        {"question": "Who wrote it?", "context": "It, it, it! WHO wrote? Who wrote."},  # the first of two equals
        {"question": "Why?", "context": "None fits. At all."},
    ]
    assert overlapping_sentence(rows) == ["WHO wrote?", "None fits."] and overlapping_sentence([]) == []
