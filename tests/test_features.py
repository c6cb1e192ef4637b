# SPDX-License-Identifier: MIT
"""Batches of labelled rows and answers from logits: `tokenizers` and transformers are the oracles, or a double loop."""

import math
import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
import torch
import transformers

from minimal.examples import check_row
from minimal.features import LONGEST_ANSWER, POOL, _place, answers, collate, encode, epoch_batches
from minimal.tokenizer import END, Tokenizer
from minimal.wordpiece import WordPiece

SPECIAL = (END, "[PAD]", "[CLS]", "[SEP]", "[MASK]")
CORPUS = [
    "Ada wrote the first program in 1843. Naïve café, 東京 and 👩‍🚀.",
    "The answer is in the context, the the context.",
] * 9


@pytest.fixture(scope="module")
def kinds():
    return {kind: Tokenizer.train(CORPUS, 420, kind, SPECIAL) for kind in ("bpe", "bytes", "char")}


@pytest.fixture(scope="module")
def bpe(kinds):
    return kinds["bpe"]


@pytest.fixture(scope="module")
def file(bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(path)
    return str(path)


def fault(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message


# words of the corpus; letters of one to four bytes, combining marks, joined emoji, spaces of three kinds
pieces = [
    "Ada",
    " wrote",
    " the",
    " context",
    "é",
    "e\u0301",
    "東",
    "👩‍🚀",
    "🏽",
    "\u0301",
    " ",
    "\n",
    "\xa0",
    "\u2028",
    "a",
    ",",
    "ß",
    "1843",
]
contexts = st.lists(st.sampled_from(pieces) | st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
contexts = contexts.map("".join).filter(str.strip)


@st.composite
def questions(draw):
    """A row of qa as `check_row` gives it, with no answer, one or two."""
    context = draw(contexts)
    texts, starts = [], []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(context) - 1))
        text = context[start : start + draw(st.integers(1, 12))]
        if text.strip():
            texts, starts = [*texts, text], [*starts, start]
    found = {"text": texts, "answer_start": starts}
    row = {"question": draw(st.sampled_from(["Who?", "What is it, " * 30])), "context": context, "answers": found}
    return check_row(row, "qa", "rows:1")


def room_of(feature, length):
    return length - feature["head"] - 1


def whole(windows, length):
    """The context's (ids, offsets) put together from its windows, which overlap."""
    ids, offsets, step = [], [], max(1, room_of(windows[0], length) // 2)
    for k, f in enumerate(windows):
        part = f["ids"][f["head"] : -1]
        assert len(part) == len(f["offsets"])
        seen = len(ids) - k * step  # how much of this window the earlier ones had
        assert 0 <= seen < len(part) or len(windows) == 1, "a hole, or a window with nothing new"
        assert part[:seen] == ids[k * step :]
        ids, offsets = ids + part[seen:], offsets + f["offsets"][seen:]
    return ids, offsets


# ---- questions -----------------------------------------------------------------------------------------------------


@hypothesis.given(contexts)
def test_offsets_are_those_of_tokenizers(bpe, file, context):
    """Also of tokens that hold a part of a character: they are said to touch all of it."""
    oracle = tokenizers.Tokenizer.from_file(file).encode(context)
    ours = encode("qa", [{"question": "q", "context": context}], bpe, 10_000)
    assert len(ours) == 1 and (ours[0]["ids"][3:-1], ours[0]["offsets"]) == (oracle.ids, oracle.offsets)


@hypothesis.given(contexts, st.sampled_from([24, 32, 33, 40, 64]))
def test_windows_are_those_of_transformers(file, bpe, context, length):
    """Sliding windows with overlap: the same ids, segments and offsets, window by window."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    room = length - 3 - len(bpe.encode("Who?"))
    options = dict(truncation="only_second", max_length=length, stride=room - room // 2, return_overflowing_tokens=True)
    options |= dict(return_offsets_mapping=True, return_token_type_ids=True)
    theirs = fast("Who?", context, **options)
    ours = encode("qa", [{"question": "Who?", "context": context}], bpe, length)
    assert [f["ids"] for f in ours] == theirs["input_ids"]
    assert [f["segments"] for f in ours] == theirs["token_type_ids"]
    for f, offsets in zip(ours, theirs["offset_mapping"], strict=True):
        assert f["offsets"] == offsets[f["head"] : -1]


@hypothesis.given(questions(), st.integers(8, 70), st.sampled_from(["bpe", "bytes", "char"]))
def test_every_token_is_in_a_window_and_the_answer_in_one(kinds, row, length, kind):
    """And the gold places, decoded, are the answer: or, where a token straddles its ends, the smallest run with it."""
    tokenizer, context = kinds[kind], row["context"]
    windows = encode("qa", [row], tokenizer, length)
    for f in windows:
        assert len(f["ids"]) == len(f["segments"]) <= length
        assert f["ids"][0] == tokenizer.token_to_id("[CLS]") and f["ids"][-1] == tokenizer.token_to_id("[SEP]")
        assert f["ids"][1 : f["head"] - 1] == tokenizer.encode(row["question"])[: length // 3]
        assert f["segments"] == [0] * f["head"] + [1] * (len(f["ids"]) - f["head"])
    ids, offsets = whole(windows, length)
    assert ids == tokenizer.encode(context)
    if not row["answers"]["text"]:
        assert all(f["starts"] == f["ends"] == 0 for f in windows)
        return
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    # The smallest run, by brute force over bytes: the tokens that hold a byte of the answer.
    first = len(context[:start].encode())
    wanted, end = range(first, first + len(text.encode())), 0
    run = []
    for i, token in enumerate(ids):
        end, begin = end + len(tokenizer.decode_bytes([token])), end
        if set(range(begin, end)) & set(wanted):
            run.append(i)
    room = room_of(windows[0], length)
    step, found = max(1, room // 2), 0
    for k, f in enumerate(windows):
        inside = k * step <= run[0] and run[-1] < k * step + room
        places = (f["head"] + run[0] - k * step, f["head"] + run[-1] - k * step) if inside else (0, 0)
        assert (f["starts"], f["ends"]) == places
        if not inside:
            continue
        found += 1
        a, b = (f["offsets"][place - f["head"]] for place in places)
        assert text in context[a[0] : b[1]] and a[0] <= start and b[1] >= start + len(text)
        if len(run) <= LONGEST_ANSWER:
            logits = [torch.zeros(len(x["ids"]), 2) for x in windows]
            logits[k][places[0], 0] = logits[k][places[1], 1] = 3.0
            assert answers("qa", [row], windows, logits) == [context[a[0] : b[1]].strip()]
            if (a[0], b[1]) == (start, start + len(text)):
                assert answers("qa", [row], windows, logits) == [text.strip()]
    assert found or len(run) > room - step + 1  # no more than this is promised: half a window, and one


def test_an_answer_is_found_to_the_character(bpe):
    """Behind letters of more than a byte: the wrong variant, which takes bytes for characters, is beside it."""
    context = "Ünïcödé 東京 👩‍🚀: Ada wrote it in 1843."
    for text in ("Ada", "1843", "東京", "👩‍🚀", "Ada wrote it"):
        row = check_row({"question": "Who?", "context": context, "answers": text}, "qa", "rows:1")
        (f,) = encode("qa", [row], bpe, 128)
        (a, _), (_, b) = f["offsets"][f["starts"] - f["head"]], f["offsets"][f["ends"] - f["head"]]
        assert context[a:b].strip() == text
        lengths = [len(bpe.decode_bytes([i])) for i in f["ids"][f["head"] : -1]]
        in_bytes = sum(lengths[: f["starts"] - f["head"]]), sum(lengths[: f["ends"] - f["head"] + 1])
        assert context[slice(*in_bytes)].strip() != text


def test_a_token_over_the_end_of_the_answer(bpe):
    """Its whole is taken: " the" for "th". Of half a character there is no answer at all."""
    context = "in the context"
    row = check_row(
        {"question": "q", "context": context, "answers": {"text": ["he"], "answer_start": [4]}}, "qa", "rows:1"
    )
    (f,) = encode("qa", [row], bpe, 64)
    assert bpe.decode_bytes([f["ids"][f["starts"]]]) == b" the" and f["starts"] == f["ends"]
    logits = torch.zeros(len(f["ids"]), 2)
    logits[f["starts"]] = 3.0
    assert answers("qa", [row], [f], [logits]) == ["the"]


def test_half_a_character_is_no_answer():
    """A window may begin or end between the bytes of a letter. The wrong variant compares characters, and takes it."""
    bytewise, taken = Tokenizer.train([], 261, "bytes", SPECIAL), 0
    for before in range(14, 26):
        row = {"question": "q", "context": "x" * before + "é" + "y" * 20}
        row["answers"] = {"text": ["é"], "answer_start": [before]}
        for k, f in enumerate(encode("qa", [row], bytewise, 14)):
            begin, end = 5 * k, 5 * k + len(f["offsets"])  # bytes of the context
            assert bool(f["starts"]) == (begin <= before and before + 2 <= end)
            inside = [i for i, (a, b) in enumerate(f["offsets"]) if a < before + 1 and b > before]
            taken += bool(inside) and not f["starts"]
    assert taken


@hypothesis.given(st.lists(st.sampled_from("Ada ada WROTE wrote it_ it program naïve 東京 . _ 1".split()), max_size=30),
                  st.lists(st.sampled_from("Ada wrote it_ naïve 東京 ? _ 1".split()), max_size=4))  # fmt: skip
def test_words_of_the_question_have_a_segment_of_their_own(bpe, context, question):
    """By hand: token by token the characters that it spells, and whether one is in a whole word that was asked for."""
    row = {"question": " ".join(question), "context": " ".join(context)}
    words = {w.lower() for w in question if w.replace("_", "a").isalnum()}
    asked = [w.lower() in words for w in context for _ in range(len(w) + 1)]  # each character, and the space after it
    for i, c in enumerate(row["context"]):
        asked[i] = asked[i] and c != " "
    plain, marked = (encode("qa", [row], bpe, 40, segments=n) for n in (2, 3))
    for a, b in zip(plain, marked, strict=True):
        wanted = [0] * a["head"] + [1 + any(asked[i:j]) for i, j in a["offsets"]] + [1]
        assert b["segments"] == wanted and a["segments"] == [min(n, 1) for n in wanted]
        assert {**a, "segments": 0} == {**b, "segments": 0}


def test_of_several_answers_the_first_is_learnt(bpe):
    context = "Ada wrote it. " * 20
    row = {"question": "q", "context": context, "answers": {"text": ["wrote it", "Ada"], "answer_start": [172, 0]}}
    windows = encode("qa", [check_row(row, "qa", "rows:1")], bpe, 40)
    assert windows[0]["starts"] == 0 and any(f["starts"] for f in windows[1:])
    for f in windows:
        if f["starts"]:
            a, b = f["offsets"][f["starts"] - f["head"]], f["offsets"][f["ends"] - f["head"]]
            assert (a[0], b[1]) in ((171, 180), (172, 180))  # with the space before it


logit = st.integers(-4, 4).map(lambda n: n / 2)  # so that sums are exact and ties occur


@hypothesis.given(st.lists(st.tuples(questions(), st.integers(12, 40)), min_size=1, max_size=3), st.data())
def test_the_best_span_by_a_double_loop(bpe, rows_and_lengths, data):
    """Of all windows the largest gain over [CLS]; never a place outside the context, never j < i, never padding."""
    rows, length = [row for row, _ in rows_and_lengths], rows_and_lengths[0][1]
    features = encode("qa", rows, bpe, length)
    longest = max(len(f["ids"]) for f in features) + 3
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = torch.randint(-4, 5, (len(features), longest, 2), generator=generator) / 2 - data.draw(logit)
    logits[:, longest - 3 :] = 100.0  # padding, whatever it holds
    for f, x in zip(features, logits, strict=True):
        x[1 : f["head"]], x[len(f["ids"]) - 1] = 100.0, 100.0  # the question and [SEP]
        x[0] += data.draw(logit)
    found = answers("qa", rows, features, list(logits))
    for k, (row, answer) in enumerate(zip(rows, found, strict=True)):
        best, allowed = 0.0, {""}
        for f, x in zip(features, logits.tolist(), strict=True):
            if f["row"] != k:
                continue
            for i in range(len(f["offsets"])):
                for j in range(i, min(i + LONGEST_ANSWER, len(f["offsets"]))):
                    gain = x[f["head"] + i][0] + x[f["head"] + j][1] - sum(x[0])
                    if gain >= best and gain > 0:
                        allowed = (allowed if gain == best else set()) | {
                            row["context"][f["offsets"][i][0] : f["offsets"][j][1]].strip()
                        }
                        best = gain
        assert answer in allowed


def test_the_end_does_not_come_before_the_start():
    """The wrong variant: each argmax alone."""
    row, f = {"context": "abc"}, {"row": 0, "head": 3, "offsets": [(0, 1), (1, 2), (2, 3)]}
    x = torch.tensor([[0.0, 0], [9, 9], [9, 9], [1, 5], [1, 1], [5, 1], [9, 9]])
    assert x[3:6].argmax(0).tolist() == [2, 0]
    assert answers("qa", [row], [f], [x]) in (["a"], ["c"])
    assert answers("qa", [row], [f], [x + torch.tensor([[3.0]] + [[0.0]] * 6)]) == [""]  # 6 at [CLS]: no more than that
    assert answers("qa", [row, row], [f], [x])[1] == ""  # a row without features
    assert answers("qa", [{"context": ""}], [{"row": 0, "head": 3, "offsets": []}], [x]) == [""]


def test_the_window_with_the_largest_gain_answers():
    """The wrong variant takes the largest sum, though that window says itself that its [CLS] is better."""
    row = {"context": "abcd"}
    f = [{"row": 0, "head": 3, "offsets": [(0, 1)]}, {"row": 0, "head": 3, "offsets": [(3, 4)]}]
    x = [
        torch.tensor([[9.0, 9], [0, 0], [0, 0], [8, 8], [0, 0]]),
        torch.tensor([[0.0, 0], [0, 0], [0, 0], [2, 2], [0, 0]]),
    ]
    assert answers("qa", [row], f, x) == ["d"]
    assert max(range(2), key=lambda k: float(x[k][3].sum())) == 0


def test_an_answer_of_at_most_64_tokens():
    n = LONGEST_ANSWER + 10
    row, f = {"context": "x" * n}, {"row": 0, "head": 3, "offsets": [(i, i + 1) for i in range(n)]}
    x = torch.zeros(n + 4, 2)
    x[3, 0] = 4.0
    x[3 + LONGEST_ANSWER - 1, 1] = 2.0
    x[3 + LONGEST_ANSWER, 1] = 3.0
    assert answers("qa", [row], [f], [x]) == ["x" * LONGEST_ANSWER]


# ---- texts and tags ------------------------------------------------------------------------------------------------


@hypothesis.given(contexts, st.integers(8, 40), st.sampled_from(["bpe", "bytes", "char"]))
def test_classify(kinds, text, length, kind):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    for row, wanted in (({"text": text, "label": "good"}, {"labels": 1}), ({"text": text}, {})):
        (f,) = encode("classify", [row], tokenizer, length, ("bad", "good"))
        cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        assert f == {"row": 0, "ids": [cls, *ids[: length - 2], sep]} | wanted
    logits = [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])]
    assert answers("classify", [{}] * 2, [f, f], logits, ("bad", "good")) == ["good", "bad"]


some = ["Ada", "wrote", "context", "東京", "👩\u200d🚀", "e\u0301", ",", "a b", "x" * 50, "New York"]
words = st.lists(st.sampled_from(some) | contexts, min_size=1, max_size=12)
LABELS = ("B-PER", "I-PER", "O")


@hypothesis.given(words, st.data())
def test_tags_stand_at_first_pieces(file, bpe, tokens, data):
    """As the recipe of transformers, which goes by word_ids."""
    tags = data.draw(st.lists(st.sampled_from(LABELS), min_size=len(tokens), max_size=len(tokens)))
    (f,) = encode("tag", [{"tokens": tokens, "tags": tags}], bpe, 10_000, LABELS)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    spaced = [" " * (i > 0) + token for i, token in enumerate(tokens)]
    oracle = fast(spaced, is_split_into_words=True)
    assert f["ids"][1:-1] == oracle["input_ids"]
    labels, before = [-100], None
    for word in oracle.word_ids():
        labels.append(-100 if word == before else LABELS.index(tags[word]))
        before = word
    assert f["labels"] == [*labels, -100] and len(f["labels"]) == len(f["ids"])
    assert f["places"] == [i for i, label in enumerate(f["labels"]) if label != -100]


@hypothesis.given(
    st.lists(words, min_size=1, max_size=4), st.integers(8, 40), st.sampled_from(["bpe", "bytes", "char"]), st.data()
)
def test_cut_rows_join_without_loss(kinds, token_lists, length, kind, data):
    """Logits that say each token's own tag give back the tags, however a row is cut and however the batch is padded."""
    tokenizer, rows = kinds[kind], []
    for tokens in token_lists:
        tags = data.draw(st.lists(st.sampled_from(LABELS), min_size=len(tokens), max_size=len(tokens)))
        rows.append({"tokens": tokens, "tags": tags})
    features = encode("tag", rows, tokenizer, length, LABELS)
    assert [f["row"] for f in features] == sorted(f["row"] for f in features)
    for f in features:
        assert len(f["ids"]) == len(f["labels"]) <= length and f["labels"][0] == f["labels"][-1] == -100
        assert (f["ids"][0], f["ids"][-1]) == (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    for k, row in enumerate(rows):  # every piece is there, but for the end of a token longer than a feature
        own = [tokenizer.encode(" " * (i > 0) + token)[: length - 2] for i, token in enumerate(row["tokens"])]
        mine = [f for f in features if f["row"] == k]
        assert sum(own, []) == sum((f["ids"][1:-1] for f in mine), [])
        for f, g in zip(mine, mine[1:], strict=False):  # and no feature could have taken the next token
            end = g["places"][1] if len(g["places"]) > 1 else len(g["ids"]) - 1
            assert len(f["ids"]) + end - 1 > length
    labels = collate("tag", features)["labels"]  # (B, T)
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), len(LABELS)).float()  # (B, T, L)
    assert answers("tag", rows, features, logits, LABELS) == [row["tags"] for row in rows]
    unknown = encode("tag", [{"tokens": row["tokens"]} for row in rows], tokenizer, length)
    assert unknown == [{name: f[name] for name in ("row", "ids", "places")} for f in features]
    assert "labels" not in collate("tag", unknown)


def test_a_row_without_tokens_leaves_the_others_alone(bpe):
    """The wrong variant ended the feature of the row before a second time."""
    features = encode("tag", [{"tokens": ["Ada"]}, {"tokens": []}, {"tokens": ["wrote"]}], bpe, 16)
    assert [f["row"] for f in features] == [0, 2] and [f["ids"].count(bpe.token_to_id("[SEP]")) for f in features] == [
        1,
        1,
    ]
    logits = [torch.eye(3)[torch.zeros(9, dtype=torch.long)]] * 2
    assert answers("tag", [{}] * 3, features, logits, LABELS) == [["B-PER"], [], ["B-PER"]]


def test_the_cost_of_tags_is_linear(bpe):
    """40,000 rows in less than a second. The wrong variant looks, for each, at all features so far: 20 s."""
    started = time.process_time()
    assert len(encode("tag", [{"tokens": ["Ada"], "tags": ["O"]}] * 40_000, bpe, 16, LABELS)) == 40_000
    assert time.process_time() - started < 6


# ---- sources and targets -------------------------------------------------------------------------------------------


@hypothesis.given(contexts, contexts, st.integers(8, 30), st.sampled_from(["bpe", "bytes", "char"]))
@hypothesis.example("abc" * 30, "xyz" * 30, 16, "bytes")
@hypothesis.example("abcdefg", "abcdefg", 8, "bytes")  # these just fit
@hypothesis.example("abcdefgh", "abcdefgh", 8, "bytes")  # these just do not
def test_seq2seq(kinds, source, target, length, kind):
    """A long source or target loses its end, never its <eos>: the model is trained to stop, in `length` tokens."""
    tokenizer = kinds[kind]
    eos = tokenizer.eos_id
    before, f = encode(
        "seq2seq", [{"source": "a", "target": "b"}, {"source": source, "target": target}], tokenizer, length
    )
    assert (before["row"], f["row"]) == (0, 1)
    assert f["source"] == [*tokenizer.encode(source)[: length - 1], eos] and len(f["source"]) <= length
    assert f["target"] == [eos, *tokenizer.encode(target)[: length - 1], eos] and len(f["target"]) <= length + 1
    (g,) = encode("seq2seq", [{"source": source}], tokenizer, length)
    assert g == {"row": 0, "source": f["source"]}
    assert set(collate("seq2seq", [g])) == {"source", "source_mask"}


def test_no_eos_is_masked_where_it_is_the_padding_too(kinds):
    """The wrong variant: labels are -100 wherever the target is pad_id, so the model never learns to stop."""
    tokenizer = kinds["bytes"]
    rows = [{"source": "a", "target": "bcd"}, {"source": "efgh", "target": "i"}]
    batch = collate("seq2seq", encode("seq2seq", rows, tokenizer, 16), pad_id=tokenizer.eos_id)
    e, (b, c, d, i) = tokenizer.eos_id, tokenizer.encode("bcdi")
    assert batch["target"].tolist() == [[e, b, c, d, e], [e, i, e, e, e]]
    assert batch["labels"].tolist() == [[e, b, c, d, e], [e, i, e, -100, -100]]
    assert batch["source_mask"].tolist() == [[True, True, False, False, False], [True] * 5]
    wrong = batch["target"].masked_fill(batch["target"] == e, -100)
    assert not (wrong == e).any() and ((batch["labels"] == e).sum(1) == 2).all()


# ---- batches -------------------------------------------------------------------------------------------------------


@hypothesis.given(st.lists(questions(), min_size=1, max_size=4), st.integers(8, 40))
def test_collate(bpe, rows, length):
    """Row by row what the feature has, then padding: an oracle from torch.nn.utils.rnn."""
    pad, pad_id = torch.nn.utils.rnn.pad_sequence, bpe.token_to_id("[PAD]")

    def padded(lists, value):
        return pad([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)

    features = encode("qa", rows, bpe, length)
    batch = collate("qa", features, pad_id)
    assert set(batch) == {"ids", "segments", "mask", "starts", "ends"}
    assert torch.equal(batch["ids"], padded([f["ids"] for f in features], pad_id))
    assert torch.equal(batch["segments"], padded([f["segments"] for f in features], 0))
    assert torch.equal(batch["mask"], padded([[True] * len(f["ids"]) for f in features], False))
    assert batch["starts"].tolist() == [f["starts"] for f in features]
    assert batch["ends"].tolist() == [f["ends"] for f in features]
    assert {name: x.dtype for name, x in batch.items() if name != "mask"} == dict.fromkeys(
        ("ids", "segments", "starts", "ends"), torch.int64
    )
    # places point at what they meant, also in the batch
    for f, ids, start in zip(features, batch["ids"], batch["starts"], strict=True):
        assert ids[start] == f["ids"][f["starts"]]
    assert set(collate("qa", encode("qa", [{"question": "q", "context": "c"}], bpe, length))) == {
        "ids",
        "segments",
        "mask",
    }

    texts = [{"text": row["context"], "label": "good"} for row in rows]
    batch = collate("classify", encode("classify", texts, bpe, length, ("good",)), pad_id)
    assert batch["labels"].tolist() == [0] * len(rows) and not batch["segments"].any()
    assert batch["labels"].dtype == torch.int64
    token_lists = [row["context"].split() for row in rows]
    tagged = [{"tokens": tokens, "tags": ["O"] * len(tokens)} for tokens in token_lists]
    tagged = encode("tag", tagged, bpe, length, LABELS)
    batch = collate("tag", tagged, pad_id)
    assert torch.equal(batch["labels"], padded([f["labels"] for f in tagged], -100))


@hypothesis.given(
    st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5)
)
def test_epoch_batches(lengths, size, seed, epoch):
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))  # each once
    assert len(batches) == math.ceil(len(lengths) / size) and sorted(map(len, batches))[1:] == [size] * (
        len(batches) - 1
    )
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    assert batches == epoch_batches(tuple(lengths), size, seed, epoch)  # of its arguments alone
    assert torch.equal(state, torch.random.get_rng_state())


def test_epochs_and_seeds_differ():
    lengths = [i % 50 for i in range(500)]
    orders = {str(epoch_batches(lengths, 8, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # the wrong variant, a generator of seed + epoch, has 7
    first = [batch[0] for batch in epoch_batches(lengths, 8, 0, 0)]
    assert len({i // 100 for i in first[:8]}) > 2  # from anywhere
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in epoch_batches(lengths, 8, 0, 0)]
    assert sorted(means) != means and sorted(means, reverse=True) != means  # not from short to long
    one_pool = [lengths[batch[0]] for batch in epoch_batches(lengths[: 8 * POOL], 8, 0, 0)]
    assert sorted(one_pool) != one_pool


def test_less_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 100, (4000,), generator=generator).tolist()

    def padding(batches):
        return 1 - sum(lengths) / sum(len(b) * max(lengths[i] for i in b) for b in batches)

    order = torch.randperm(4000, generator=generator).tolist()
    anyhow = padding([order[i : i + 20] for i in range(0, 4000, 20)])
    assert padding(epoch_batches(lengths, 20, 0, 0)) < anyhow / 5 and POOL > 1
    lengths = [7] * 4000
    batches = epoch_batches(lengths, 20, 0, 0)
    assert batches[0] != sorted(batches[0])  # equal lengths stay in random order


# ---- faults --------------------------------------------------------------------------------------------------------


def test_faults(bpe, kinds):
    fault(lambda: encode("classify", [{"text": "a"}], bpe, 7), "length = 7: wanted at least 8")
    fault(lambda: encode("mlm", [{"text": "a"}], bpe, 8), "task = 'mlm': wanted classify, tag, qa or seq2seq")
    plain = Tokenizer.train([], 257, "bytes")
    for task in ("classify", "tag", "qa"):
        fault(lambda task=task: encode(task, [], plain, 8), "[CLS] = None, [SEP] = None", task)
    assert encode("seq2seq", [{"source": "a"}], plain, 8)
    no_end = Tokenizer.train([], 258, "bytes", ("[CLS]", "[SEP]"))
    fault(lambda: encode("seq2seq", [], no_end, 8), "eos_id = None")
    assert encode("classify", [{"text": "a"}], no_end, 8)
    fault(
        lambda: encode("classify", [{"text": "a", "label": "x\ny"}], bpe, 8, ("bad", "good")),
        r"'x\ny'",
        "'bad', 'good'",
    )
    fault(lambda: encode("tag", [{"tokens": ["a"], "tags": ["B-X"]}], bpe, 8, LABELS), "'B-X'", "'B-PER', 'I-PER', 'O'")
    with pytest.raises(ValueError):  # one tensor for each feature
        answers("tag", [{}], [{"row": 0, "places": [1]}], [], LABELS)


def test_special_tokens_in_a_text_are_text(bpe):
    """A text cannot forge the end of the question."""
    row = {"question": "a [SEP] b?", "context": "[CLS] [SEP] <|endoftext|>"}
    for f in encode("qa", [row], bpe, 64) + encode("classify", [{"text": row["context"]}], bpe, 64):
        special = {bpe.token_to_id(token) for token in SPECIAL}
        places = [i for i, token in enumerate(f["ids"]) if token in special]
        assert places in ([0, f.get("head", 0) - 1, len(f["ids"]) - 1], [0, len(f["ids"]) - 1])


@hypothesis.given(st.text(alphabet="abé e\u0301Z9 ,._-\n東", max_size=30))
def test_pieces_of_a_tokenizer_that_loses_text_are_placed(context):
    """WordPiece, which lower-cases and drops accents: the ids of the whole text, each with characters that hold it."""
    vocab = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abez9,._-東", *(f"##{c}" for c in "abez9")])}
    tokenizer = WordPiece(vocab)
    oracle = tokenizers.BertWordPieceTokenizer(vocab, lowercase=True)
    want = oracle.encode(context, add_special_tokens=False)
    ids, offsets = _place(context, tokenizer)
    assert ids == want.ids
    for (a, b), (start, end) in zip(offsets, want.offsets, strict=True):
        assert a <= start < end <= b and not re.search(r"\s", context[a:b])
