# SPDX-License-Identifier: MIT
"""Metrics of classification, language models, question answering and entity tagging, as the reference programs do them.

Perplexity: Jelinek et al. 1977 (J. Acoust. Soc. Am. 62, S63). Exact match and F1 of answers: Rajpurkar et al. 2016,
arXiv 1606.05250; without an answer: Rajpurkar, Jia, Liang 2018, arXiv 1806.03822. Two things called macro F1: Opitz &
Burst 2019, arXiv 1911.03347. Entities: Tjong Kim Sang & De Meulder 2003, arXiv cs/0306050. With tp, fp and fn the true
positives, false positives and false negatives of a class:

    P = tp / (tp + fp)      R = tp / (tp + fn)      F1 = 2 tp / (2 tp + fp + fn), the harmonic mean of P and R
    micro: the counts are added over the classes first; for one label a sample P = R = F1 = accuracy
    macro: the mean over the classes of each class's own value (not the F1 of the mean P and the mean R)
    perplexity = exp(loss / terms)                  bits per byte = loss / (bytes ln 2), the loss a sum in nats
    span F1: P and R over the bags of words of the normalised prediction and answer, the largest over the answers
    entity F1: micro, an entity counts only if type, start and end are all right

Departures: 0/0 is 0 throughout, as scikit-learn and seqeval do (with a warning; here without). BLEU and chrF are not
here: call sacrebleu where they are wanted, for its tokenisation is part of the figure. F1 or perplexity of batches must
not be averaged: pass all predictions, or the summed loss and the summed count.

    precision, recall, f1 = precision_recall_f1(logits.argmax(-1), targets, n_classes=3, average="macro")
    exact, f1 = span_em_f1("the Eiffel Tower", ["Eiffel Tower", "tower"])  # (1.0, 1.0)
    precision, recall, f1 = entity_f1([["B-PER", "O"]], [["B-PER", "I-PER"]])  # (0.0, 0.0, 0.0): the end is wrong

Letters: N samples, L classes.
"""

import collections
import math
import re
import string

import torch


def _counted(predictions, targets):
    """Both as flat int64 (N,), without the places whose target is -100."""
    predictions, targets = torch.as_tensor(predictions), torch.as_tensor(targets)
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)}: wanted equal shapes")
    if targets.numel() == 0:  # before the dtype, which torch.tensor([]) has wrong
        raise ValueError("targets are empty: wanted at least one")
    for name, labels in (("predictions", predictions), ("targets", targets)):
        if labels.is_floating_point() or labels.is_complex():  # logits or probabilities
            raise ValueError(f"{name} are {labels.dtype}: wanted integer class labels")
    predictions, targets = predictions.to(targets.device).long(), targets.long()  # long first: to uint8, -100 is 156
    counted = targets != -100
    if not counted.any():
        raise ValueError("targets are all -100: wanted at least one that counts")
    return predictions[counted], targets[counted]  # 2 x (N,)


def _ratios(tp, predicted, true):
    """Precision, recall and F1 of counts: tensors or numbers; predicted = tp + fp, true = tp + fn; 0/0 is 0."""
    tp, predicted, true = (torch.as_tensor(count, dtype=torch.float64) for count in (tp, predicted, true))
    # A denominator of 0 has a tp of 0 above it: with 1 instead the ratio is 0.
    return tuple(n / d.clamp_min(1) for n, d in ((tp, predicted), (tp, true), (2 * tp, predicted + true)))


def confusion_matrix(predictions, targets, n_classes):
    """Counts, int64 (L, L): row i and column j hold the samples of true class i that were predicted as j.

    predictions, targets: integer labels 0 .. n_classes - 1 (tensors or lists) of one shape. A target of -100 is not
    counted, whatever is predicted there. ValueError: shapes differ, nothing to count, a label is out of range."""
    predictions, targets = _counted(predictions, targets)
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < 1:
        raise ValueError(f"n_classes = {n_classes!r}: wanted a whole number of at least 1")
    for name, labels in (("predictions", predictions), ("targets", targets)):
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= n_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} hold the label {wrong}: wanted 0 to {n_classes - 1} (n_classes = {n_classes})")
    pairs = torch.bincount(targets * n_classes + predictions, minlength=n_classes**2)  # (L * L,)
    return pairs.view(n_classes, n_classes)  # (L, L)


def accuracy(predictions, targets):
    """The share of predictions that equal their target, a float; integer labels of one shape, a target of -100 is not
    counted. ValueError: shapes differ, nothing to count."""
    predictions, targets = _counted(predictions, targets)
    return (predictions == targets).sum().item() / len(targets)


def precision_recall_f1(predictions, targets, n_classes, average, positive=1):
    """Precision, recall and F1, three floats in [0, 1].

    average: "binary" (of the class `positive`; n_classes must be 2), "micro" (counts added over all classes) or "macro"
    (the mean over the classes that occur in targets or predictions, where they count; a class that occurs in neither is
    left out, as scikit-learn does by default). Arguments and errors as for confusion_matrix; other errors: ValueError.
    """
    if average not in ("binary", "micro", "macro"):
        raise ValueError(f"average = {average!r}: wanted 'binary', 'micro' or 'macro'")
    confusion = confusion_matrix(predictions, targets, n_classes).cpu()  # (L, L), where float64 always is
    tp, predicted, true = confusion.diag(), confusion.sum(0), confusion.sum(1)  # 3 x (L,)
    if average == "binary":
        if n_classes != 2 or positive not in (0, 1) or isinstance(positive, bool):  # True would index as a mask
            raise ValueError(f"n_classes = {n_classes}, positive = {positive!r}: wanted 2 and 0 or 1 with 'binary'")
        tp, predicted, true = tp[positive], predicted[positive], true[positive]
    if average == "micro":
        tp, predicted, true = tp.sum(), predicted.sum(), true.sum()
    if average == "macro":
        occurs = predicted + true > 0
        tp, predicted, true = tp[occurs], predicted[occurs], true[occurs]
    return tuple(values.mean().item() for values in _ratios(tp, predicted, true))


def _number(value):
    return float(value.item() if isinstance(value, torch.Tensor) else value)  # float() warns if it needs a gradient


def perplexity(loss_sum, n_terms):
    """exp(loss_sum / n_terms), a float: inf where that overflows, nan for a loss that is nan.

    loss_sum: the negative log likelihood in nats, summed (a number or 0-dim tensor) over n_terms tokens: sum both over
    all batches first. ValueError: n_terms is below 1."""
    loss_sum, n_terms = _number(loss_sum), _number(n_terms)
    if not n_terms >= 1:
        raise ValueError(f"n_terms = {n_terms:g}: wanted at least 1")
    return torch.tensor(loss_sum / n_terms, dtype=torch.float64).exp().item()  # math.exp raises where this gives inf


def bits_per_byte(loss_sum_nats, n_bytes):
    """loss_sum_nats / (n_bytes ln 2), a float: independent of the tokenizer, so models with different ones compare.

    loss_sum_nats: summed over all tokens of a text of n_bytes bytes (UTF-8). ValueError: n_bytes is below 1."""
    loss_sum_nats, n_bytes = _number(loss_sum_nats), _number(n_bytes)
    if not n_bytes >= 1:
        raise ValueError(f"n_bytes = {n_bytes:g}: wanted at least 1")
    return loss_sum_nats / (n_bytes * math.log(2))


_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII alone: other quotes and dashes stay, as in SQuAD


def normalise_answer(text):
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles (a, an, the), single spaces.

    The order matters: punctuation goes first and leaves no space ("U.S.A." is "usa", "a-b" is "ab", "the-end" stays
    "theend"), and an article is a whole word ("banana" stays)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def span_em_f1(prediction, answers):
    """Exact match (0.0 or 1.0) and F1 of one predicted string: each the largest over a question's list of answers.

    Empty answers as in SQuAD 2.0: answers that normalise to nothing ("", "The") are dropped; with none left (or a list
    that was empty) the question has no answer, and a prediction scores (1.0, 1.0) if it too normalises to nothing, else
    (0.0, 0.0). SQuAD 1.1's program keeps such answers, and nothing against nothing is (1.0, 0.0) to it.
    ValueError: the prediction is no string, answers is no list of strings."""
    if not isinstance(answers, (list, tuple)) or not all(isinstance(text, str) for text in (prediction, *answers)):
        raise ValueError(f"prediction = {prediction!r}, answers = {answers!r}: wanted a string and a list of strings")
    words = normalise_answer(prediction).split()
    golds = [gold for gold in (normalise_answer(answer).split() for answer in answers) if gold] or [[]]
    exact = f1 = 0.0
    for gold in golds:
        shared = sum((collections.Counter(words) & collections.Counter(gold)).values())  # a word as often as in both
        exact = max(exact, float(words == gold))
        f1 = max(f1, 2 * shared / (len(words) + len(gold)) if words and gold else float(words == gold))
    return exact, f1


def entities(tags):
    """The entities of one sequence of BIO tags: a list of (type, start, end), where tags[start:end] are its tags.

    Lenient, as the CoNLL program and seqeval's default mode: an I- that follows O, another type or nothing begins an
    entity. ValueError: a tag that is not "O", "B-TYPE" or "I-TYPE" (tags of subwords that do not count: drop them)."""
    found, kind, start = [], None, 0  # kind: the type of the entity that is open
    for i, tag in enumerate([*tags, "O"]):
        match = re.fullmatch("O|([BI])-(.+)", tag) if isinstance(tag, str) else None
        if match is None:
            raise ValueError(f"tags[{i}] = {tag!r}: wanted 'O', 'B-TYPE' or 'I-TYPE'")
        prefix, new = match.groups()  # (None, None) for O
        if kind is not None and (prefix != "I" or new != kind):
            found.append((kind, start, i))
            kind = None
        if kind is None and new is not None:
            kind, start = new, i
    return found


def entity_f1(predicted, true):
    """Micro-averaged precision, recall and F1 of entities, three floats in [0, 1].

    predicted, true: lists of sequences of BIO tags, read as `entities` does. Where there is no entity at all, the
    scores are 0 even if that is right: score the whole set at once.
    ValueError: no sequence, another number or length of sequences, a tag that is none."""
    if len(predicted) != len(true):
        raise ValueError(f"predicted has {len(predicted)} sequences, true has {len(true)}: wanted as many")
    if not true:
        raise ValueError("true holds no sequence: wanted at least one")
    tp = n_predicted = n_true = 0
    for i, (ours, theirs) in enumerate(zip(predicted, true, strict=True)):
        if len(ours) != len(theirs):
            raise ValueError(f"predicted[{i}] has {len(ours)} tags, true[{i}] has {len(theirs)}: wanted as many")
        ours, theirs = set(entities(ours)), set(entities(theirs))
        tp, n_predicted, n_true = tp + len(ours & theirs), n_predicted + len(ours), n_true + len(theirs)
    return tuple(value.item() for value in _ratios(tp, n_predicted, n_true))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    targets = (torch.rand(2000) < 0.05).long()  # one sample in twenty is positive
    never = torch.zeros_like(targets)
    often = torch.where(torch.rand(2000) < 0.9, targets, 1 - targets)  # right nine times of ten
    print(f"{int(targets.sum())} of {len(targets)} samples are positive")
    for name, predictions in (("never says yes", never), ("right 9 of 10 times", often)):
        p, r, f1 = precision_recall_f1(predictions, targets, 2, "binary")
        macro = precision_recall_f1(predictions, targets, 2, "macro")[2]
        print(f"{name:20} accuracy {accuracy(predictions, targets):.3f}, P {p:.3f}, R {r:.3f}, F1 {f1:.3f}, "
              f"macro F1 {macro:.3f}, confusion {confusion_matrix(predictions, targets, 2).tolist()}")  # fmt: skip
    losses, counts = [200.0, 8.0], [50, 4]  # two batches of different sizes
    each = [perplexity(loss, count) for loss, count in zip(losses, counts, strict=True)]
    print(f"perplexity {perplexity(sum(losses), sum(counts)):.2f}; the mean over the batches is {sum(each) / 2:.2f}")
    print(f"a byte at random: {bits_per_byte(1000 * math.log(256), 1000):g} bits per byte")
    for prediction in ("The Eiffel Tower!", "the tower in Paris", ""):
        exact, f1 = span_em_f1(prediction, ["Eiffel Tower", "a tower"])
        print(f"{prediction!r:20} -> {normalise_answer(prediction)!r:18} exact match {exact:g}, F1 {f1:.3f}")
    true = "B-PER I-PER O O O O O B-LOC".split()
    ours = "B-PER O     O O O O O I-LOC".split()
    right = sum(a == b for a, b in zip(ours, true, strict=True))
    print(f"{entities(ours)} for {entities(true)}:\n{right} of {len(true)} tags right, entity F1 "
          f"{entity_f1([ours], [true])[2]:g}")  # fmt: skip
