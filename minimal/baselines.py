# SPDX-License-Identifier: MIT
"""What a model has to beat before it may be called good: the best constant, counts of words, and rules of one line.

No one paper; Wang & Manning, "Baselines and Bigrams", 2012 (ACL P12-2018), show how strong a bag of words is. With c(.)
counts in the training rows:

    majority      argmax_y c(y)                            for every row: what accuracy is worth under skewed classes
    usual_tags    argmax_y c(token, y)                     each token by itself: the rest is what context adds
    bag_of_words  logistic regression on tf-idf weights    of words: the rest is what their order adds
    constant      argmax_y c(y) of whole outputs           for texts
    unigram       - sum_t ln((c(t) + 1) / (N + V))         nats of tokens drawn each by itself: what a language model
                                                           without any context would lose
    usual_sentence, overlapping_sentence                   for questions: the sentence at the place of most answers, and
                                                           the one with the most words of the question

Each gives predictions in the form of the model's own, so that the same metric scores both.

    guesses = bag_of_words(train_texts, train_labels, val_texts)
    guesses = majority(train_labels, len(val_labels))
    nats = unigram(train_ids, val_ids, vocab_size) / len(val_ids)

Letters: N tokens, V vocabulary.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def constant(outputs: Sequence[str], n: int) -> list[str]:
    """The most frequent of the training outputs, n times; of several, the first in the order of the alphabet."""
    counts = Counter(outputs)
    return [min(counts, key=lambda x: (-counts[x], x))] * n


majority = constant  # for labels it goes by this name


def usual_tags(train: Sequence[dict], rows: Sequence[dict]) -> list[list[str]]:
    """Each token's most frequent tag in training; for an unseen token, that of the tokens seen once (without any, the
    one that is usual for most tokens). Of equals, the first seen."""
    counts = defaultdict(Counter)
    for row in train:
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            counts[token][tag] += 1
    usual = {token: tags.most_common(1)[0][0] for token, tags in counts.items()}
    once = Counter(tag for tags in counts.values() if tags.total() == 1 for tag in tags)
    rare = (once or Counter(usual.values())).most_common(1)[0][0]
    return [[usual.get(token, rare) for token in row["tokens"]] for row in rows]


def bag_of_words(texts: Sequence[str], labels: Sequence[str], new: Sequence[str]) -> list[str]:
    """Labels of the new texts by logistic regression (scikit-learn's) on tf-idf weights of their words.

    Raises ImportError without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise ImportError("the bag-of-words baseline needs scikit-learn: pip install scikit-learn") from None
    if len(set(labels)) == 1 or not any(re.search(r"\w", text) for text in texts):
        return majority(labels, len(new))  # scikit-learn fails on one class, and on texts without words
    # C = 10: tf-idf rows have length 1, for which the default of 1 regularises too much.
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+"),
        LogisticRegression(C=10.0, max_iter=200),
    )
    return model.fit(texts, labels).predict(new).tolist()


def unigram(train: Tensor, new: Tensor, vocab_size: int) -> float:
    """Nats that the new ids (N,) cost in sum, each drawn by itself with the training ids' counts plus one.

    Raises ValueError for an id outside the vocabulary, such as the -100 of a place that does not count."""
    for name, ids in (("train", train), ("new", new)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"{name}: ids from {ids.min()} to {ids.max()}, wanted 0 to {vocab_size - 1}")
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[new.long()].sum())


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def usual_sentence(train: Sequence[dict], rows: Sequence[dict]) -> list[str]:
    """The sentence of each context at the place where in training most answers begin; the last of a shorter one."""
    places = Counter()
    for row in train:
        for start in row["answers"]["answer_start"][:1]:
            # The letter stands for the answer's first: it ends the sentence that the answer is in, or begins it.
            places[len(_sentences(row["context"][:start] + "a")) - 1] += 1
    place = min(places, key=lambda n: (-places[n], n), default=0)
    found = [_sentences(row["context"]) for row in rows]
    return [sentences[min(place, len(sentences) - 1)] for sentences in found]


def overlapping_sentence(rows: Sequence[dict]) -> list[str]:
    """The sentence of each context that shares the most different words with the question; the first of equals."""
    best = []
    for row in rows:
        asked = set(re.findall(r"\w+", row["question"].lower()))
        found = _sentences(row["context"])
        shared = [len(asked & set(re.findall(r"\w+", sentence.lower()))) for sentence in found]
        best.append(found[shared.index(max(shared))])
    return best


if __name__ == "__main__":
    import keyword

    tongues = {"en": "the cat sat on the mat and the dog ran", "de": "die katze saß auf der matte und der hund lief"}
    tongues["fr"] = "le chat était sur le tapis et le chien courait"
    texts, labels = [], []
    for label, text in tongues.items():
        words = text.split()
        for i in range(len(words) - 2):
            texts.append(" ".join(words[i : i + 3]))
            labels.append(label)
    new, true = ["the dog and the cat", "der hund und die katze", "le chien et le chat"], ["en", "de", "fr"]
    try:
        found = bag_of_words(texts, labels, new)
    except ImportError as error:
        found = [str(error)]
    print(f"majority: {sum(a == b for a, b in zip(majority(labels, 3), true, strict=True))} of 3 right")
    print(f"bag of words: {sum(a == b for a, b in zip(found, true, strict=False))} of 3 right, {found}")
    code = [["for", "x", "in", "rows"], ["if", "x", "is", "None"], ["x", "for", "x"]]
    rows = [{"tokens": c, "tags": ["KEY" if keyword.iskeyword(t) else "NAME" for t in c]} for c in code]
    print("usual tags of 'for y in x':", usual_tags(rows, [{"tokens": "for y in x".split()}])[0])
    ids = torch.tensor([ord(c) for c in "abracadabra" * 500])
    print(f"unigram: {unigram(ids, ids, 128) / len(ids):.3f} nats a letter of abracadabra; ln 5 = 1.609")
    row = {"question": "What does walk do?", "context": "It opens files. To walk is to visit all. It ends."}
    seen = {"context": "One. Two. Three.", "answers": {"text": ["Three."], "answer_start": [10]}}
    print("usual place:", usual_sentence([seen], [row]), "overlapping:", overlapping_sentence([row]))
