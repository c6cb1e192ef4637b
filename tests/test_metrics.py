# SPDX-License-Identifier: MIT
"""Metrics: scikit-learn and seqeval are the oracles, plain loops for SQuAD's scores, and what must hold for any data.

For each mistake that is often made with a metric, its wrong variant is here too, and rejected."""

import math
import random
import re
import string
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import seqeval.metrics
import seqeval.metrics.sequence_labeling
import sklearn.metrics
import torch
import torch.nn.functional as F

from minimal.metrics import (
    accuracy,
    bits_per_byte,
    confusion_matrix,
    entities,
    entity_f1,
    normalise_answer,
    perplexity,
    precision_recall_f1,
    span_em_f1,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # both programs warn of 0/0, scikit-learn also of a single class
        warnings.filterwarnings("ignore", module=r"(sklearn|seqeval)\.")
        yield


def raises(message, function, *args):
    with pytest.raises(ValueError, match=message) as error:
        function(*args)
    assert "\n" not in str(error.value)


# ---- classes -------------------------------------------------------------------------------------------------------


@st.composite
def labelled(draw, classes=None, ignored=True):
    """(predictions, targets, n_classes): lists; some classes do not occur, some targets are -100."""
    n_classes = draw(st.integers(1, 6)) if classes is None else classes
    label = st.integers(0, n_classes - 1)
    targets = draw(st.lists(label, min_size=1, max_size=25))
    predictions = draw(st.lists(label, min_size=len(targets), max_size=len(targets)))
    if ignored and draw(st.booleans()):
        for i in draw(st.lists(st.integers(1, 24))):
            if i < len(targets):  # the first one always counts
                targets[i] = -100
                predictions[i] = draw(st.sampled_from([0, -1, 10**6]))  # whatever is predicted there
    return predictions, targets, n_classes


def counted(predictions, targets):
    pairs = [(p, t) for p, t in zip(predictions, targets, strict=True) if t != -100]
    return [p for p, _ in pairs], [t for _, t in pairs]


def sklearn_scores(predictions, targets, average, **options):
    """For the labels that count. 0 for 0/0."""
    functions = [getattr(sklearn.metrics, f"{n}_score") for n in ("precision", "recall", "f1")]
    options |= {"average": average, "zero_division": 0}
    return [f(*reversed(counted(predictions, targets)), **options) for f in functions]


@hypothesis.given(labelled(), st.sampled_from([torch.int64, torch.int32, torch.int16, "list", "matrix"]))
def test_against_scikit_learn(data, kind):
    predictions, targets, n_classes = data
    ours = predictions, targets
    if kind != "list":
        predictions = [min(p, 100) for p in predictions]
        dtype = torch.int64 if kind == "matrix" else kind
        ours = [torch.tensor(x, dtype=dtype) for x in (predictions, targets)]
    if kind == "matrix":
        ours = [x.reshape(1, 1, -1) for x in ours]
    p, t = counted(predictions, targets)
    confusion = confusion_matrix(*ours, n_classes)
    assert confusion.dtype == torch.int64 and confusion.shape == (n_classes, n_classes)
    assert confusion.tolist() == sklearn.metrics.confusion_matrix(t, p, labels=range(n_classes)).tolist()
    assert accuracy(*ours) == pytest.approx(sklearn.metrics.accuracy_score(t, p), abs=1e-12)
    for average in ("micro", "macro"):
        scores = precision_recall_f1(*ours, n_classes, average)
        assert all(type(score) is float for score in scores)
        assert scores == pytest.approx(sklearn_scores(predictions, targets, average), abs=1e-12)


@hypothesis.given(labelled(classes=2), st.sampled_from([0, 1]))
def test_binary_against_scikit_learn(data, positive):
    predictions, targets, n_classes = data
    ours = precision_recall_f1(predictions, targets, n_classes, "binary", positive=positive)
    # labels=[...] with macro is what "binary" means, and is defined also where the positive class does not occur
    assert ours == pytest.approx(sklearn_scores(predictions, targets, "macro", labels=[positive]), abs=1e-12)
    if {0, 1} <= {*counted(predictions, targets)[0], *counted(predictions, targets)[1]}:
        assert ours == pytest.approx(sklearn_scores(predictions, targets, "binary", pos_label=positive), abs=1e-12)
    if positive == 1:
        assert ours == precision_recall_f1(predictions, targets, n_classes, "binary")


@hypothesis.given(labelled(), st.randoms(use_true_random=False))
def test_what_holds_for_any_labels(data, rng):
    predictions, targets, n_classes = data
    micro, macro = (precision_recall_f1(predictions, targets, n_classes, a) for a in ("micro", "macro"))
    assert all(0 <= score <= 1 for score in (*micro, *macro))
    assert micro == (accuracy(predictions, targets),) * 3
    p, t = counted(predictions, targets)
    assert confusion_matrix(predictions, targets, n_classes).sum() == len(t)
    assert accuracy(predictions, targets) == sum(a == b for a, b in zip(p, t, strict=True)) / len(t)
    # the order of the samples and the names of the classes do not matter
    order, names = rng.sample(range(len(t)), len(t)), rng.sample(range(n_classes), n_classes)
    q, u = [names[p[i]] for i in order], [names[t[i]] for i in order]
    assert accuracy(q, u) == accuracy(p, t)
    assert precision_recall_f1(q, u, n_classes, "micro") == micro
    assert precision_recall_f1(q, u, n_classes, "macro") == pytest.approx(macro, abs=1e-12)
    renamed = confusion_matrix(q, u, n_classes)[names][:, names]  # [names]: row i is the class that was i
    assert torch.equal(renamed, confusion_matrix(p, t, n_classes))
    # truth and prediction change places: precision and recall do, F1 stays
    assert precision_recall_f1(t, p, n_classes, "macro") == pytest.approx((macro[1], macro[0], macro[2]), abs=1e-12)
    assert torch.equal(confusion_matrix(t, p, n_classes), confusion_matrix(p, t, n_classes).T)
    for average in ("micro", "macro"):
        assert precision_recall_f1(t, t, n_classes, average) == (1.0, 1.0, 1.0)
    # more classes than occur change nothing
    assert precision_recall_f1(p, t, n_classes + 3, "macro") == macro


def test_rows_are_true_and_columns_predicted():
    assert confusion_matrix([0, 1, 1, 2], [0, 0, 0, 1], 3).tolist() == [[1, 2, 0], [0, 0, 1], [0, 0, 0]]


def test_the_wrong_variants_differ():
    """Each of these is a figure that somebody has reported as F1: the data tell them from the right one."""
    p, t = [0, 0, 0, 1, 2, 0, 0, 0], [0, 0, 1, 1, 0, 1, 2, 1]
    p_macro, r_macro, f1 = precision_recall_f1(p, t, 5, "macro")
    assert f1 == pytest.approx(sklearn.metrics.f1_score(t, p, average="macro"))
    each = sklearn.metrics.f1_score(t, p, average=None)
    wrong = {
        "F1 of the means": 2 * p_macro * r_macro / (p_macro + r_macro),
        "mean over all 5 classes": sum(each) / 5,
        "mean over the classes that are predicted rightly": sum(each) / sum(x > 0 for x in each),
        "weighted by the class's share": sklearn.metrics.f1_score(t, p, average="weighted"),
        "micro": precision_recall_f1(p, t, 5, "micro")[2],
        "mean of two batches": (precision_recall_f1(p[:4], t[:4], 5, "macro")[2]
                                + precision_recall_f1(p[4:], t[4:], 5, "macro")[2]) / 2,
    }  # fmt: skip
    for name, value in wrong.items():
        assert abs(value - f1) > 0.01, name
    # a place that does not count is not a class of its own, and not a wrong prediction
    assert accuracy([1, 0, 1], [1, 0, -100]) == 1.0
    assert precision_recall_f1([1, 0, 1], [1, 0, -100], 2, "binary") == (1.0, 1.0, 1.0)


def test_nothing_to_divide_by():
    assert precision_recall_f1([0, 0], [0, 0], 2, "binary") == (0.0, 0.0, 0.0)
    assert precision_recall_f1([0, 0], [1, 1], 2, "binary") == (0.0, 0.0, 0.0)
    assert precision_recall_f1([1, 1], [0, 0], 2, "binary") == (0.0, 0.0, 0.0)
    assert precision_recall_f1([0, 0], [0, 0], 2, "macro") == (1.0, 1.0, 1.0)  # class 1 does not occur


def test_small_dtypes_and_booleans():
    """-100 is no number of these types; a comparison in uint8 would take the label 156 for it."""
    p, t = torch.tensor([156, 1], dtype=torch.uint8), torch.tensor([156, 2], dtype=torch.uint8)
    assert accuracy(p, t) == 0.5 and confusion_matrix(p, t, 200).sum() == 2
    p, t = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    assert precision_recall_f1(p, t, 2, "binary") == (0.5, 0.5, 0.5)
    assert confusion_matrix(torch.tensor([99], dtype=torch.int8), [99], 100)[99, 99] == 1  # 99 * 100 is no int8


def test_a_large_matrix_of_labels():
    generator = torch.Generator().manual_seed(0)
    p, t = torch.randint(50, (2, 400, 25), generator=generator)
    t = t.where(torch.rand(400, 25, generator=generator) < 0.8, -100)
    keep = t != -100
    theirs = sklearn.metrics.f1_score(t[keep], p[keep], average="macro")
    assert precision_recall_f1(p, t, 50, "macro")[2] == pytest.approx(theirs, abs=1e-12)


BAD_LABELS = [
    (([0, 1], [0], 2), r"predictions \(2,\), targets \(1,\): wanted equal shapes"),
    (([[0], [1]], [0, 1], 2), r"predictions \(2, 1\), targets \(2,\): wanted equal shapes"),  # would broadcast
    (([], [], 2), "targets are empty: wanted at least one"),
    (([0, 1], [-100, -100], 2), "targets are all -100: wanted at least one that counts"),
    (([0.0, 1.0], [0, 1], 2), "predictions are torch.float32: wanted integer class labels"),
    (([0, 1], [0.0, 1.0], 2), "targets are torch.float32: wanted integer class labels"),
]
BAD_CLASSES = [
    (([0, 2], [0, 1], 2), r"predictions hold the label 2: wanted 0 to 1 \(n_classes = 2\)"),
    (([0, 1], [0, 3], 2), r"targets hold the label 3: wanted 0 to 1 \(n_classes = 2\)"),
    (([0, -1], [0, 1], 2), r"predictions hold the label -1: wanted 0 to 1"),
    (([0, -100], [0, 1], 2), r"predictions hold the label -100: wanted 0 to 1"),
    (([0, 1], [0, -1], 2), r"targets hold the label -1: wanted 0 to 1"),
    (([0], [0], 0), "n_classes = 0: wanted a whole number of at least 1"),
    (([0], [0], 2.0), "n_classes = 2.0: wanted a whole number of at least 1"),
    (([0], [0], True), "n_classes = True: wanted a whole number of at least 1"),
]


@pytest.mark.parametrize(("args", "message"), BAD_LABELS + BAD_CLASSES)
def test_bad_labels(args, message):
    raises(message, confusion_matrix, *args)
    raises(message, precision_recall_f1, *args, "macro")
    if (args, message) in BAD_LABELS:
        raises(message, accuracy, *args[:2])


def test_bad_averages():
    for average in ("weighted", None, "Macro"):
        raises(f"average = {average!r}: wanted 'binary', 'micro' or 'macro'", precision_recall_f1, [0], [0], 2, average)
    raises("n_classes = 3, positive = 1: wanted 2 and 0 or 1 with 'binary'", precision_recall_f1, [0], [0], 3, "binary")
    raises("n_classes = 2, positive = 2: wanted", precision_recall_f1, [0], [0], 2, "binary", 2)
    raises("n_classes = 2, positive = True: wanted", precision_recall_f1, [0], [0], 2, "binary", True)  # a mask


# ---- language models -----------------------------------------------------------------------------------------------


@hypothesis.given(st.integers(2, 50), st.integers(1, 40), st.integers(0, 99))
def test_perplexity_against_its_definition(V, N, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    product = logits.softmax(-1)[range(N), targets].prod().item()  # 1 / perplexity is the geometric mean of these
    assert perplexity(loss, torch.tensor(N)) == pytest.approx(product ** (-1 / N))
    assert perplexity(loss, N) >= 1
    uniform = F.cross_entropy(torch.zeros(N, V), targets, reduction="sum")
    assert perplexity(uniform, N) == pytest.approx(V, rel=1e-5)
    if N > 1:  # however the sum is split, as long as sums are added
        half = F.cross_entropy(logits[:1], targets[:1], reduction="sum")
        rest = F.cross_entropy(logits[1:], targets[1:], reduction="sum")
        assert perplexity(half + rest, 1 + N - 1) == pytest.approx(perplexity(loss, N))


def test_the_mean_of_the_batches_perplexities_is_another_number():
    losses, counts = [200.0, 8.0], [50, 4]
    right = perplexity(sum(losses), sum(counts))
    assert right == pytest.approx(math.exp(208 / 54))
    assert abs(sum(map(perplexity, losses, counts)) / 2 - right) > 1
    assert abs(math.exp((200 / 50 + 8 / 4) / 2) - right) > 1  # the mean of means


def test_perplexity_at_the_ends():
    assert perplexity(torch.tensor(0.0, requires_grad=True), torch.tensor(3)) == 1.0  # a warning would be an error
    assert perplexity(0.0, 3) == 1.0 and perplexity(1e9, 1) == math.inf and perplexity(math.inf, 1) == math.inf
    assert perplexity(709.5, 1) == pytest.approx(math.exp(709.5)) and math.isnan(perplexity(math.nan, 1))
    for n in (0, -1, torch.tensor(0), math.nan):
        raises(r"n_terms = \S+: wanted at least 1", perplexity, 1.0, n)
        raises(r"n_bytes = \S+: wanted at least 1", bits_per_byte, 1.0, n)


@hypothesis.given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1))
def test_bits_per_byte(text):
    """A model that gives each byte 1/256 needs 8 bits, one token a byte or a token a character."""
    n = len(text.encode())
    assert bits_per_byte(torch.tensor(n * math.log(256), dtype=torch.float64), n) == pytest.approx(8)
    per_character = sum(len(c.encode()) * math.log(256) for c in text)
    assert bits_per_byte(per_character, n) == pytest.approx(8)
    assert bits_per_byte(3.0, n) == pytest.approx(math.log2(perplexity(3.0, n)))


# ---- answers -------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "an", "the", "The", "A", "cat", "Cat", "cats", "U.S.", "-", "it's", "and", "theatre", "",
                         "3.5", "naïve", "“cat”", "–", "\t", "\xa0"])  # fmt: skip
SENTENCES = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=12)


def plain_normal_form(text):
    """The published rules as single steps on characters and words."""
    kept = [c for c in text.lower() if c not in set(string.punctuation)]
    words, word = [], ""
    for c in [*kept, " "]:  # a word: letters, digits and _ of any script; what is between them is kept as it is
        if re.match(r"\w", c):
            word += c
        else:
            words += [" " if word in ("a", "an", "the") else word, c]
            word = ""
    return " ".join("".join(words).split())


def plain_em_f1(prediction, answers):
    best = [0.0, 0.0]
    answers = [a for a in answers if plain_normal_form(a)] or [""]
    for answer in answers:
        p, a = plain_normal_form(prediction).split(), plain_normal_form(answer).split()
        left, shared = list(a), 0
        for word in p:
            if word in left:  # each word of the answer is used up once
                left.remove(word)
                shared += 1
        if p and a and shared:
            precision, recall = shared / len(p), shared / len(a)
            f1 = 2 * precision * recall / (precision + recall)
        else:
            f1 = 1.0 if p == a else 0.0
        best = [max(best[0], 1.0 if p == a else 0.0), max(best[1], f1)]
    return tuple(best)


@hypothesis.settings(max_examples=200)
@hypothesis.given(SENTENCES, st.lists(SENTENCES, max_size=4))
def test_span_scores_against_plain_loops(prediction, answers):
    assert normalise_answer(prediction) == plain_normal_form(prediction)
    exact, f1 = span_em_f1(prediction, answers)
    assert (exact, f1) == pytest.approx(plain_em_f1(prediction, answers), abs=1e-12)
    assert exact in (0.0, 1.0) and 0.0 <= f1 <= 1.0 and f1 >= exact
    assert type(exact) is type(f1) is float
    assert span_em_f1(prediction, answers[::-1]) == (exact, f1)
    assert span_em_f1(prediction, tuple(answers)) == (exact, f1)
    if prediction.isascii():  # upper().lower() is not lower() for a few letters of other scripts
        assert span_em_f1(f" THE {prediction.upper()}! ", answers) == (exact, f1)
    if plain_normal_form(prediction):
        assert span_em_f1(prediction, [*answers, prediction]) == (1.0, 1.0)
        for answer in answers:  # the largest: another answer can only help
            if plain_normal_form(answer):
                assert all(a >= b for a, b in zip((exact, f1), span_em_f1(prediction, [answer]), strict=True))


@pytest.mark.parametrize(("text", "normal"), [
    ("The Eiffel Tower!", "eiffel tower"), ("  two\t words\n", "two words"), ("U.S.A.", "usa"), ("a-b", "ab"),
    ("the-end", "theend"), ("banana theatre Anna", "banana theatre anna"), ("an a the", ""), ("A", ""), ("", ""),
    ("don't", "dont"), ("“the” cat", "“ ” cat"), ("a.n", ""), ("a, b", "b"), ("Ünïcode", "ünïcode"),
])  # fmt: skip
def test_normal_form_by_hand(text, normal):
    assert normalise_answer(text) == normal


def test_wrong_variants_of_the_normal_form_differ():
    articles = r"\b(a|an|the)\b"
    assert re.sub("(a|an|the)", "", "banana") != normalise_answer("banana")  # no word boundary
    first = " ".join(re.sub(articles, " ", "the-end").translate(str.maketrans("", "", string.punctuation)).split())
    assert first == "end" != normalise_answer("the-end")  # articles before punctuation
    spaced = " ".join(re.sub(r"[^\w\s]", " ", "U.S.").lower().split())
    assert spaced == "u s" != normalise_answer("U.S.")  # punctuation leaves a space


def test_span_f1_by_hand():
    exact, f1 = span_em_f1("cat cat dog", ["cat bird"])
    assert (exact, f1) == (0.0, pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)))
    p, a = {"cat", "dog"}, {"cat", "bird"}  # sets instead of bags count the second cat as none
    assert abs(2 * len(p & a) / (len(p) + len(a)) - f1) > 0.05
    answers = ["cat", "big black cat"]
    assert span_em_f1("the black cat", answers) == (0.0, pytest.approx(0.8))
    mean = sum(span_em_f1("the black cat", [answer])[1] for answer in answers) / 2
    assert abs(mean - 0.8) > 0.05  # the mean over the answers instead of the largest
    assert span_em_f1("cat the", ["cat"]) == (1.0, 1.0)
    assert span_em_f1("dog", ["cat"]) == (0.0, 0.0)
    assert span_em_f1("black cat", ["cat black"]) == (0.0, 1.0)  # a bag has no order, a match has


@pytest.mark.parametrize("answers", [[], [""], ["The"], ["", "?!"], ()])
def test_a_question_without_an_answer(answers):
    for nothing in ("", "  ", "the", "..."):
        assert span_em_f1(nothing, answers) == (1.0, 1.0)
    assert span_em_f1("cat", answers) == (0.0, 0.0)


def test_an_empty_prediction_for_a_question_with_an_answer():
    assert span_em_f1("", ["cat"]) == (0.0, 0.0)
    assert span_em_f1("the", ["the", "cat"]) == (0.0, 0.0)  # "the" is dropped: an annotator's slip


def test_bad_answers():
    for args in (("cat", "cat"), (None, ["cat"]), ("cat", ["cat", None]), ("cat", None), (3, [])):
        raises("wanted a string and a list of strings", span_em_f1, *args)


# ---- entities ------------------------------------------------------------------------------------------------------

TAGS = st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ("PER", "LOC", "O"))])
SEQUENCES = st.lists(st.lists(st.tuples(TAGS, TAGS), max_size=12), min_size=1, max_size=4)


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(TAGS, max_size=15))
def test_entities_against_seqeval(tags):
    ours = entities(tags)
    theirs = [(kind, start, end + 1) for kind, start, end in seqeval.metrics.sequence_labeling.get_entities(tags)]
    assert ours == theirs
    # back to tags: well-formed, the same places are O, and the same entities
    again = ["O"] * len(tags)
    for kind, start, end in ours:
        assert 0 <= start < end <= len(tags) and {tag[2:] for tag in tags[start:end]} == {kind}
        again[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    assert entities(again) == ours
    assert [tag == "O" for tag in again] == [tag == "O" for tag in tags]
    assert entities(tuple(tags)) == ours


def seqeval_scores(predicted, true):
    return [getattr(seqeval.metrics, f"{n}_score")(true, predicted) for n in ("precision", "recall", "f1")]


@hypothesis.settings(max_examples=150)
@hypothesis.given(SEQUENCES, st.randoms(use_true_random=False))
def test_entity_f1_against_seqeval(pairs, rng):
    predicted = [[a for a, _ in sequence] for sequence in pairs]
    true = [[b for _, b in sequence] for sequence in pairs]
    scores = entity_f1(predicted, true)
    if any(entities(tags) for tags in (*predicted, *true)):
        assert scores == pytest.approx(seqeval_scores(predicted, true), abs=1e-12)
    else:
        assert scores == (0.0, 0.0, 0.0)
    assert all(0 <= score <= 1 and type(score) is float for score in scores)
    assert entity_f1(true, predicted) == pytest.approx((scores[1], scores[0], scores[2]), abs=1e-12)
    order = rng.sample(range(len(pairs)), len(pairs))
    assert entity_f1([predicted[i] for i in order], [true[i] for i in order]) == scores
    names = {"PER": "LOC", "LOC": "O", "O": "PER"}

    def renamed(sequences):
        return [[tag if tag == "O" else f"{tag[:2]}{names[tag[2:]]}" for tag in tags] for tags in sequences]

    assert entity_f1(renamed(predicted), renamed(true)) == scores
    perfect = (1.0, 1.0, 1.0) if any(entities(tags) for tags in true) else (0.0, 0.0, 0.0)
    assert entity_f1(true, true) == perfect


@pytest.mark.parametrize(("tags", "found"), [
    ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
    ("I-PER I-PER O", [("PER", 0, 2)]),  # no B-: it begins all the same
    ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # another type
    ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),  # two that touch
    ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
    ("O O", []), ("", []), ("O B-PER", [("PER", 1, 2)]),  # one that reaches the end
    ("B-per-son I-per-son I-son", [("per-son", 0, 2), ("son", 2, 3)]),  # the type is all behind the first hyphen
])  # fmt: skip
def test_entities_by_hand(tags, found):
    assert entities(tags.split()) == found


def test_wrong_variants_of_entity_f1_differ():
    true = ["B-PER I-PER O I-LOC O O O O B-PER B-PER".split()]
    ours = ["B-PER O O I-LOC O O O O B-PER I-PER".split()]
    f1 = entity_f1(ours, true)[2]
    assert f1 == pytest.approx(2 * 1 / (3 + 4))  # only LOC is right
    assert accuracy([ord(t[0]) for t in ours[0]], [ord(t[0]) for t in true[0]]) == 0.8  # tags, most of which are O
    overlapping = {(0, "PER"), (3, "LOC"), (8, "PER")}  # an entity found if it begins at the right place
    assert abs(2 * len(overlapping) / 7 - f1) > 0.5
    strict = {(kind, start, end) for kind, start, end in entities(true[0]) if true[0][start].startswith("B-")}
    assert len(strict) == 3  # a strict reader would not see the LOC at all
    # entities of different sequences must not be taken for one another, nor may the last run into the next
    assert entity_f1([["B-PER"], ["O"]], [["O"], ["B-PER"]]) == (0.0, 0.0, 0.0)
    assert entity_f1([["B-PER"], ["I-PER"]], [["B-PER"], ["I-PER"]]) == (1.0, 1.0, 1.0)
    assert entity_f1([["O", "B-PER"], ["I-PER"]], [["O", "B-PER"], ["B-PER"]]) == (1.0, 1.0, 1.0)
    # micro over the whole, not the mean over sequences
    a, b = ["B-PER"], ["B-PER", "B-PER", "B-PER"]
    wrong = ["O", "O", "B-PER"]
    whole = entity_f1([a, wrong], [a, b])[2]
    assert whole == pytest.approx(2 * 2 / (2 + 4)) != (1 + entity_f1([wrong], [b])[2]) / 2


def test_bad_tags():
    for tag in ("X-PER", "B", "I-", "PER", "o", "", "B_PER", 3, None, "S-PER"):
        raises(re.escape(f"tags[1] = {tag!r}: wanted 'O', 'B-TYPE' or 'I-TYPE'"), entities, ["O", tag])
    raises("predicted has 1 sequences, true has 2: wanted as many", entity_f1, [["O"]], [["O"], ["O"]])
    raises(r"predicted\[1\] has 1 tags, true\[1\] has 2: wanted as many", entity_f1, [[], ["O"]], [[], ["O", "O"]])
    raises("true holds no sequence: wanted at least one", entity_f1, [], [])


def test_random_tags_of_real_lengths():
    rng = random.Random(0)
    tags = ["O"] * 6 + ["B-A", "I-A", "B-B", "I-B"]
    true = [[rng.choice(tags) for _ in range(rng.randrange(1, 60))] for _ in range(100)]
    predicted = [[tag if rng.random() < 0.8 else rng.choice(tags) for tag in sequence] for sequence in true]
    scores = entity_f1(predicted, true)
    assert scores == pytest.approx(seqeval_scores(predicted, true), abs=1e-12)
    assert 0.3 < scores[2] < 0.9
