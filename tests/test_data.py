# SPDX-License-Identifier: MIT
"""minimal/data.py against brute force, numpy's own reader and writer, unicodedata, and exact Jaccard similarity."""

import argparse
import ast
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimal import data as D
from minimal.data import Document, TokenBlocks, clean, deduplicate, read_documents, split, write_tokens

FILE = Path(D.__file__)
texts = st.text(max_size=60)
words = st.lists(st.sampled_from("a b c d e".split()), max_size=14)


def grams(text):
    """The definition of S(d), as tuples of words."""
    found = re.findall(r"\w+", text) or [text]
    return {tuple(found[i : i + 5]) for i in range(max(len(found) - 4, 1))}


def exact(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_file_is_one_document_whatever_its_suffix(tmp_path):
    for name in ("a.txt", "b.py", "c"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
        assert list(read_documents(tmp_path / name)) == [Document("one\r\ntwo\n")]
        assert list(read_documents(str(tmp_path / name))) == [Document("one\r\ntwo\n")]


def test_jsonl_gives_a_document_per_row(tmp_path):
    rows = ["a\nb", "line \u2028 separator", "\ud800", "é", "next\x85line"]
    path = tmp_path / "a.JSONL"
    path.write_text("\n\n".join(json.dumps({"text": t, "other": 1}) for t in rows) + '\n{"text": " "}\n')
    assert [d.text for d in read_documents(path)] == rows
    # rows end at \n alone: str.splitlines would also cut at U+2028 and U+0085, which JSON allows inside a string
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in rows if t != "\ud800"), "utf-8")
    assert [d.text for d in read_documents(path)] == [t for t in rows if t != "\ud800"]
    with pytest.raises(json.JSONDecodeError):
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_folder_is_read_in_sorted_order_at_any_depth(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a/z.md", "a/b/c.py", "B.TXT", ".git/x.txt", ".hidden.txt", "c.bin"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "d.jsonl").write_text('{"text": "row"}')
    os.symlink(tmp_path, tmp_path / "loop")  # a folder that holds itself must not be walked for ever
    os.symlink(tmp_path / "gone", tmp_path / "dangling.txt")
    assert [d.text for d in read_documents(tmp_path)] == ["B.TXT", "b.txt", "row", "a/z.md", "a/b/c.py"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, "'{}' does not exist"),
        ("empty.txt", b"", "'{}' holds no text in 1 files"),
        ("blank.txt", b" \n\t", "'{}' holds no text in 1 files"),
        ("empty.jsonl", b"\n", "'{}' holds no text in 1 files"),
        ("latin.txt", b"caf\xe9 au lait", "{}: byte 3 of the file is not UTF-8"),
        ("bom.txt", b"\xef\xbb\xbfab\xff", "{}: byte 5 of the file is not UTF-8"),
        ("utf16.txt", "hello".encode("utf-16"), "{}: byte 0 of the file is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "{}:2: byte 24 of the file is not UTF-8"),
        ("b.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "{}:3: malformed JSON: Expecting ',' delimiter"),
        ("c.jsonl", b'\n{"a": 2}', '{}:2: wanted an object with a string under "text", found the keys [\'a\']'),
        ("d.jsonl", b'["text"]', '{}:1: wanted an object with a string under "text", found a list'),
        ("e.jsonl", b'{"text": null}', '{}:1: wanted an object with a string under "text", found the keys'),
        ("f.jsonl", b"[" * 100_000, "{}:1: malformed JSON: "),
        ("g.jsonl", b"NaN x", "{}:1: malformed JSON: Extra data at column 5"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_documents(path))
    assert message.format(path) in one_line(error)


def test_a_bad_text_file_in_a_folder_is_an_error_and_an_empty_folder_too(tmp_path):
    with pytest.raises(ValueError) as error:
        list(read_documents(tmp_path))
    assert "holds no text in 0 files (.jsonl .txt" in one_line(error)
    (tmp_path / "a.bin").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"good")
    assert [d.text for d in read_documents(tmp_path)] == ["good"]
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="c.txt: byte 0 of the file is not UTF-8"):
        list(read_documents(tmp_path))


# --- the standard library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    return list(D.stdlib_source())


@pytest.fixture(scope="module")
def prose():
    return list(D.stdlib_prose())


def test_stdlib_source_is_code_that_people_wrote(source):
    root = Path(sysconfig.get_path("stdlib"))
    found = {d.text for d in source}
    assert all(d.key == d.text for d in source) and len(source) > 400
    assert 6e6 < sum(map(len, found)) < 14e6
    for name in "argparse json/decoder asyncio/base_events typing pickletools _pydecimal dataclasses".split():
        name += ".py"
        assert (root / name).read_bytes().decode() in found, name
    out = "this html/entities encodings/cp1252 encodings/aliases pydoc_data/topics stringprep keyword token".split()
    for name in [f"{n}.py" for n in out] + [f.name for f in root.glob("_sysconfigdata*.py")]:
        assert not (root / name).exists() or (root / name).read_bytes().decode() not in found, name
    for file in [*root.glob("**/test/**/*.py"), *root.glob("**/tests/**/*.py"), *root.glob("**/idle_test/*.py")]:
        text = file.read_bytes()
        assert len(text) < 200 or text.decode("utf-8", "replace") not in found, file
    packages = re.compile(r"^# Copyright.*(pip|setuptools) developers", re.M)
    assert not any(packages.search(text) for text in found)


def test_stdlib_is_the_same_each_time_and_in_sorted_order(source):
    script = "from minimal.data import stdlib_source as s; import hashlib\nh = hashlib.sha256()\n"
    script += "for d in s(): h.update(d.text.encode())\nprint(h.hexdigest())"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(FILE.parent.parent)}
    other = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for document in source:
        digest.update(document.text.encode())
    assert other.strip() == digest.hexdigest()


def test_prose_is_docstrings_of_the_very_sources(source, prose):
    sources = {d.text for d in source}
    docs = [d for d in prose if d.key]
    assert {d.key for d in docs} <= sources and len(docs) > 300
    assert sum(len(d.text) for d in prose) > 1e6
    module = next(d for d in docs if d.key == Path(inspect.getsourcefile(argparse)).read_bytes().decode())
    assert inspect.cleandoc(argparse.__doc__) in module.text
    assert inspect.getdoc(argparse.ArgumentParser) in module.text
    assert module.text.index(inspect.getdoc(argparse.ArgumentParser)) > len(inspect.getdoc(argparse))
    assert "def " in module.key and "parser.add_argument(" in module.text and "self._prog_prefix" not in module.text


def test_prose_validation_was_not_trained_on_as_source(source, prose):
    (train, _), (_, prose_val) = split(source), split(prose)
    trained = {d.text for d in train}
    assert prose_val and not any(d.key in trained for d in prose_val)
    for documents in (source, prose):  # enough of them: none is cut, whatever the share
        assert all(Counter(documents) == Counter(sum(split(documents, share), [])) for share in (0.01, 0.05, 0.2))
    # the same through the pipeline: cleaning and deduplication change the texts, not the keys
    tidy = [d._replace(text=clean(d.text)) for d in prose]
    assert {d.key for d in split(tidy)[1]} == {d.key for d in prose_val}
    # what the key is for: hashing each prose document's own text puts files on both sides
    naive = split([Document(d.text) for d in prose])[1]
    keys = {d.text: d.key for d in prose}
    assert any(keys[d.text] in trained for d in naive)


def test_topics_do_not_repeat_one_another(prose):
    topics = pytest.importorskip("pydoc_data.topics").topics  # packaged apart by some distributions
    kept = [d.text for d in prose if not d.key]
    assert 20 < len(kept) < len(topics) and set(kept) <= set(topics.values())
    sets = [set(t.split("\n")) for t in kept]

    def shared(sets):
        return sum(len(a) < len(b) and len(a - b) <= 0.2 * len(a) for a in sets for b in sets)

    assert shared(sets) == 0 and shared([set(t.split("\n")) for t in topics.values()]) > 0
    covered = {line for s in sets for line in s}
    for text in set(topics.values()) - set(kept):  # nothing but repeats was dropped
        lines = set(text.split("\n"))
        assert len(lines - covered) <= 0.2 * len(lines)


# --- cleaning ---------------------------------------------------------------------------------------------------------

special = "\r\n\t\x00\x0c\x1b\x7f\x85\ufeff\ud800\udfffe\u0301a\u0308ﬁ²½\u212b"
dirty = st.text(st.one_of(st.sampled_from(special), st.characters()))


@given(dirty)
@example("e\x00\u0301")
@example("\r\x00\n")
@example("\ufeff\ufeffa")
def test_cleaning_is_idempotent_and_leaves_what_it_says(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert "\ufeff" not in cleaned
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\t\n" for c in cleaned)
    cleaned.encode("utf-8")


@given(dirty)
def test_cleaning_matches_unicodedata_character_by_character(text):
    lines = re.sub("\r\n|\r", "\n", text)
    kept = "".join(c for c in lines if c in "\t\n" or unicodedata.category(c) != "Cc" and c != "\ufeff")
    kept = "".join("\ufffd" if unicodedata.category(c) == "Cs" else c for c in kept)
    assert clean(text) == unicodedata.normalize("NFC", kept)


def test_cleaning_in_the_other_order_or_with_nfkc_would_fail():
    def normalised_first(text):
        return re.sub("[\x00-\x08\x0b-\x1f]", "", unicodedata.normalize("NFC", text))

    assert normalised_first("e\x00\u0301") != normalised_first(normalised_first("e\x00\u0301"))
    code = 'area = "x²"  # ﬁve ½'
    assert clean(code) == code != unicodedata.normalize("NFKC", code)
    assert clean("a\r\nb\rc\x0c\n") == "a\nb\nc\n"


def test_cleaned_stdlib_is_the_same_program(source):
    for document in source[::20]:
        cleaned = clean(document.text)
        if unicodedata.is_normalized("NFC", document.text) and "\r" not in document.text:
            assert ast.dump(ast.parse(cleaned)) == ast.dump(ast.parse(document.text))


# --- duplicates -------------------------------------------------------------------------------------------------------


@given(words, words)
def test_shingles_count_as_tuples_of_words_do(a, b):
    a, b = " ".join(a), "\n".join(b)
    assert len(D.shingles(a)) == len(grams(a))
    assert D.jaccard(D.shingles(a), D.shingles(b)) == pytest.approx(exact(a, b), abs=1e-12)


def test_shingles_know_the_order_and_the_words():
    base = D.shingles("a b c d e")
    assert torch.equal(base, D.shingles("a, b; c -- d\n\ne!"))  # words alone
    for other in ("b a c d e", "a b c e d", "e d c b a", "a b c d f", "a a b c d", "a b c d", "A b c d e"):
        assert not torch.equal(base, D.shingles(other)), other
    assert len(D.shingles("")) == 1 and not torch.equal(D.shingles("!"), D.shingles("?"))
    assert len(D.shingles("\ud800")) == 1


def test_shingles_of_a_large_corpus_do_not_collide(source):
    some = "\n".join(d.text for d in source[:100])
    assert len(D.shingles(some)) == len(grams(some)) > 100_000


@given(st.integers(0, 2**32), st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_minhash_estimates_jaccard(seed, only_a, only_b, both):
    """Each of K equal minima has probability J: five standard errors, and one more minimum for J near 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    pool = torch.randint(-(2**63), 2**63 - 1, (only_a + only_b + both,), generator=g)
    a, b = pool[: only_a + both], pool[only_a:]
    j = both / len(pool)
    estimate = (D.minhash(a) == D.minhash(b)).double().mean().item()
    assert D.jaccard(a, b) == pytest.approx(j)
    assert abs(estimate - j) <= 5 * math.sqrt(j * (1 - j) / D.K) + 2 / D.K


def errors_of(minhash, trials=300):
    """(mean, standard deviation) of (estimate - J) over its theoretical standard error, at J = 1/2."""
    g = torch.Generator().manual_seed(0)
    z = []
    for _ in range(trials):
        pool = torch.randint(-(2**63), 2**63 - 1, (300,), generator=g)
        equal = (minhash(pool[:200]) == minhash(pool[100:])).double()
        # J = 100 / 300
        z.append((equal.mean().item() - 1 / 3) / math.sqrt(2 / 9 / len(equal)))
    return np.mean(z), np.std(z)


def test_minhash_has_the_bias_and_the_variance_of_independent_orderings():
    mean, std = errors_of(D.minhash)
    assert abs(mean) < 4 / math.sqrt(300) and 0.85 < std < 1.15
    # one ordering shifted K times is one estimate repeated: unbiased, but the variance gives it away
    mean, std = errors_of(lambda s: (s[None] + torch.arange(D.K)[:, None]).amin(1))
    assert std > 5


@given(st.integers(0, 5000), st.integers(0, 10))
def test_minhash_of_parts_is_the_minimum(n, seed):
    s = torch.randint(-(2**63), 2**63 - 1, (n + 1,), generator=torch.Generator().manual_seed(seed))
    cut = torch.randint(n + 1, ()).item()
    if cut:
        assert torch.equal(D.minhash(s), torch.minimum(D.minhash(s[:cut]), D.minhash(s[cut:])))
    assert torch.equal(D.minhash(s), D.minhash(s.flip(0)))  # a set has no order


def brute_force(documents, threshold):
    kept = []
    for d in documents:
        if not any(d.text == k.text or exact(d.text, k.text) >= threshold for k in kept):
            kept.append(d)
    return kept


@st.composite
def corpora(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    originals = [rng.integers(0, 50, rng.integers(1, 120)).tolist() for _ in range(draw(st.integers(1, 4)))]
    documents = []
    for _ in range(draw(st.integers(1, 14))):
        words = list(originals[rng.integers(len(originals))])
        for _ in range(rng.integers(0, 5)):
            words[rng.integers(len(words))] = int(rng.integers(0, 50))
        documents.append(Document(" ".join(f"w{i}" for i in words)))
    return documents


@given(corpora(), st.sampled_from([0.2, 0.5, 0.8, 0.9, 1.0]))
@settings(max_examples=60)
def test_deduplication_equals_comparing_all_pairs(documents, threshold):
    """Bands may miss a pair, with P < 0.001 at the threshold itself far less above; few examples lie right there."""
    assert deduplicate(documents, threshold) == brute_force(documents, threshold)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_miss_less_than_one_pair_in_a_thousand_at_the_threshold(threshold):
    r = max(r for r in range(1, 17) if (1 - threshold**r) ** (D.K // r) < 0.001)
    assert (1 - threshold**r) ** (D.K // r) < 0.001
    assert r == 16 or (1 - threshold ** (r + 1)) ** (D.K // (r + 1)) >= 0.001
    if threshold == 0.8:
        assert (r, D.K // r) == (5, 25)  # as the module says
        # the paper's rows with this few minima would miss most pairs
        assert (1 - threshold**16) ** (D.K // 16) > 0.5


def test_only_resemblance_to_kept_documents_counts():
    """a ~ b ~ c in a chain, a unlike c: b falls to a, and c stays. Connected components would drop c."""
    w = [f"w{i}" for i in range(100)]
    a, b, c = (" ".join(w[i : i + 80]) for i in (0, 6, 12))
    assert exact(a, b) >= 0.8 and exact(b, c) >= 0.8 and exact(a, c) < 0.8
    documents = [Document(t) for t in (a, b, c, a)]
    assert [d.text for d in deduplicate(documents)] == [a, c]


def test_documents_that_share_all_bands_are_all_compared():
    """b differs from a in one word of 1000, all minima are equal: at threshold 1 both stay, and c falls to a alone."""
    w = [f"w{i}" for i in range(1000)]
    a = " ".join(w)
    changed = (" ".join([*w[:i], "new", *w[i + 1 :]]) for i in range(0, 1000, 10))
    b = next(t for t in changed if torch.equal(D.minhash(D.shingles(t)), D.minhash(D.shingles(a))))
    c = a.replace(" ", ", ")
    assert exact(a, c) == 1 > exact(a, b) > 0.98
    documents = [Document(t) for t in (a, b, c)]
    assert deduplicate(documents, 1) == brute_force(documents, 1) == documents[:2]


def test_stdlib_has_few_duplicates_and_they_are_true_ones(source):
    kept = deduplicate(source)
    dropped = [d for d in source if d not in set(kept)]
    assert len(kept) > 0.98 * len(source)
    for document in dropped:
        assert max(exact(document.text, k.text) for k in kept if len(k.text) < 2 * len(document.text)) >= 0.8


def test_threshold_out_of_range():
    for threshold in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], got"):
            deduplicate([], threshold)


# --- splitting --------------------------------------------------------------------------------------------------------

collections = st.lists(st.builds(Document, texts, st.one_of(st.just(""), texts)), min_size=2, max_size=30)
keyed = collections.filter(lambda ds: len({(d.key or d.text).encode("utf-8", "replace") for d in ds}) > 1)


@given(keyed, st.floats(0.01, 0.99))
@example([Document("a"), Document("b")], 1e-9)
@example([Document("a"), Document("b")], 1 - 1e-9)
def test_split_is_a_partition_by_key(documents, share):
    """Of short texts whatever the shares come to: to cut those would be no use."""
    train, val = split(documents, share)
    assert train and val and Counter(train) + Counter(val) == Counter(documents)
    assert not {d.key or d.text for d in train} & {d.key or d.text for d in val}
    assert [d for d in documents if d in set(train)] == train  # the order stays


def by_hash_alone(documents, validation):
    """The rule without its exception for few documents."""
    values = {d: int(hashlib.sha256((d.key or d.text).encode()).hexdigest(), 16) / 2**256 for d in documents}
    low, high = min(values.values()), max(values.values())
    val = [d for d in documents if (values[d] < validation or values[d] == low) and values[d] != high]
    return [d for d in documents if d not in val], val


def characters(documents):
    return sum(len(d.text) for d in documents)


def check_few(split, documents, share=0.05):
    train, val = split(documents, share)
    assert characters(train) + characters(val) == characters(documents)
    assert 0.5 * share < characters(val) / characters(documents) < 2 * share


def test_few_documents_do_not_leave_most_of_the_corpus_to_validation():
    """Files of 1, 5 and 42 KB: if the lowest hash is that of the largest, it alone is all of validation."""
    texts = [f"{c} is a line\n" * (size // 12) for c, size in zip("abc", (1000, 5000, 42_000), strict=True)]
    hashed = sorted("123", key=lambda key: hashlib.sha256(key.encode()).digest())
    documents = [Document(text, key) for text, key in zip(texts, reversed(hashed), strict=True)]
    check_few(split, documents)
    with pytest.raises(AssertionError):
        check_few(by_hash_alone, documents)
    train, val = split(documents)
    assert train[0] == documents[0] and [d.key for d in train] == [d.key for d in documents]  # 1 KB: too short to cut
    assert [d.key for d in val] == [d.key for d in documents[1:]]
    for head, tail, whole in zip(train[1:], val, documents[1:], strict=True):
        assert head.text + tail.text == whole.text and tail.text.startswith(whole.text[:12])  # a whole line


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=12), st.sampled_from([0.01, 0.05, 0.3, 0.9]))
def test_documents_are_whole_by_hash_or_cut_and_never_too_many(lengths, share):
    documents = [Document(chr(97 + i) * n, f"key {i}") for i, n in enumerate(lengths)]
    by_hash, longest = by_hash_alone(documents, share), max(lengths)
    train, val = split(documents, share)
    large = characters(by_hash[1]) > max(0.2, 2 * share) * characters(documents)
    if len(documents) > 1 and not (large and longest * share >= 100):
        assert (train, val) == by_hash
        return
    cut = [d for d in documents if len(d.text) * share >= 100 or len(d.text) == longest]
    assert [d.key for d in train] == [d.key for d in documents] and [d.key for d in val] == [d.key for d in cut]
    tails = {d.key: d.text for d in val}
    assert [h.text + tails.get(h.key, "") for h in train] == [d.text for d in documents]
    for d in cut:
        assert abs(len(tails[d.key]) - share * len(d.text)) <= 1


def by_shuffle(documents, validation):
    """The usual way: shuffle with a seed, cut at a position."""
    order = np.random.default_rng(0).permutation(len(documents))
    cut = max(1, round(validation * len(documents)))
    return [documents[i] for i in sorted(order[cut:])], [documents[i] for i in sorted(order[:cut])]


def moved(split, share=0.2, n=300):
    """How many of n documents change sides when others are added and the order is turned round."""
    documents = [Document(f"document {i}") for i in range(n)]
    others = [Document(f"another {i}") for i in range(n // 3)]
    (before, _), (after, _) = split(documents, share), split((others + documents)[::-1], share)
    return len(set(before) ^ {d for d in after if d in set(documents)})


def test_no_document_moves_when_others_come_or_go():
    assert moved(split) == 0
    assert moved(by_shuffle) > 30


@given(st.sets(st.text(min_size=1, max_size=8), min_size=40, max_size=80), st.integers(0, 40))
def test_stability_at_any_size_but_for_the_two_extremes(keys, n):
    """Sides that would be empty take the extreme hash: only that document may move, when a more extreme one comes."""
    documents = [Document(k) for k in sorted(keys)]
    few, all_ = split(documents[: max(2, n)], 0.3), split(documents, 0.3)
    for side, other in zip(few, reversed(all_), strict=True):
        assert len(set(side) & set(other)) <= 1


def test_split_takes_about_its_share():
    train, val = split((Document(str(i)) for i in range(20_000)), 0.05)
    assert abs(len(val) - 1000) < 5 * math.sqrt(20_000 * 0.05 * 0.95)


def test_equal_documents_do_not_straddle_even_without_deduplication():
    documents = [Document(f"text {i % 10}") for i in range(100)]
    train, val = split(documents, 0.3)
    assert not set(train) & set(val)
    shuffled = by_shuffle(documents, 0.3)
    assert set(shuffled[0]) & set(shuffled[1])


@given(st.text(min_size=2, max_size=300), st.floats(0.01, 0.99))
def test_a_single_document_is_cut(text, share):
    (head,), (tail,) = split([Document(text, "k")], share)
    assert head.text + tail.text == text and head.text and tail.text and head.key == tail.key == "k"
    assert abs(len(tail.text) - share * len(text)) <= max(1.5, share * len(text) / 2 + 1)


def test_the_cut_is_at_a_line_if_one_starts_near():
    text = "".join(f"line {i:02}\n" for i in range(100))  # lines of 8 characters
    (head,), (tail,) = split([Document(text)], 0.101)
    assert tail.text.startswith("line 89\n") and head.text.endswith("line 88\n")
    text = "title\n" + "x" * 994
    (head,), (tail,) = split([Document(text)], 0.1)  # not after the title: that would validate on everything
    assert len(tail.text) == 100


def test_split_says_what_it_wants():
    for documents, share in (([], 0.1), ([Document("a b")], 0), ([Document("a b")], 1), ([Document("a")], -0.5)):
        with pytest.raises(ValueError, match="wanted documents and 0 < validation < 1, got"):
            split(documents, share)


# --- token files and blocks -------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=9), st.sampled_from([65536, 65537, 2**32]))
def test_token_files_are_numpys(tmp_path_factory, lists, vocab_size):
    path = tmp_path_factory.mktemp("tokens") / "t.npy"
    assert write_tokens(path, iter(lists), vocab_size) == sum(map(len, lists))
    found = np.load(path)
    assert found.dtype == (np.dtype("<u2") if vocab_size == 65536 else np.dtype("<u4"))
    assert found.tolist() == sum(lists, [])
    assert os.listdir(path.parent) == ["t.npy"]
    if len(found) > 1:
        assert TokenBlocks(path, 1)._read(0).tolist() == found[:2].tolist()


@given(st.integers(2, 400), st.sampled_from([np.uint16, np.uint32]))
def test_files_that_numpy_wrote_are_read(tmp_path_factory, n, dtype):
    path = tmp_path_factory.mktemp("tokens") / "t.npy"
    tokens = np.random.default_rng(n).integers(0, np.iinfo(dtype).max, n, dtype, endpoint=True)
    np.save(path, tokens)
    assert TokenBlocks(path, n - 1)[0].tolist() == tokens.tolist()


def test_the_boundary_of_uint16(tmp_path):
    path = tmp_path / "t.npy"
    for vocab_size, width, top in ((65535, 2, 65534), (65536, 2, 65535), (65537, 4, 65536), (2**32, 4, 2**32 - 1)):
        write_tokens(path, [[0, top]], vocab_size)
        assert path.stat().st_size == 128 + 2 * width
        assert TokenBlocks(path, 1)[0].tolist() == [0, top] and TokenBlocks(path, 1)[0].dtype == torch.int64
        with pytest.raises(ValueError) as error:
            write_tokens(path, [[1], [], [0, top + 1]], vocab_size)
        assert one_line(error) == f"token_lists[2] has ids 0 .. {top + 1}, vocab_size is {vocab_size}"
    # what the check is for: numpy wraps without a word
    assert np.array([65536]).astype("<u2").tolist() == [0]
    with pytest.raises(ValueError, match=r"token_lists\[0\] has ids -1 .. 3, vocab_size is 4"):
        write_tokens(path, [[3, -1]], 4)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.npy"
    write_tokens(path, [[1, 2, 3]], 4)
    with pytest.raises(ValueError):
        write_tokens(path, [[1], [9]], 4)
    assert np.load(path).tolist() == [1, 2, 3]


def tokens(path, n):
    """A file whose token at position i is i, so that a block tells where it came from."""
    write_tokens(path, [range(n)], max(n, 1))
    return path


@given(st.integers(2, 300), st.integers(1, 40))
def test_blocks_are_slices(tmp_path_factory, n, length):
    path = tokens(tmp_path_factory.mktemp("tokens") / "t.npy", n)
    if n < length + 1:
        with pytest.raises(ValueError, match=rf"holds {n} tokens, wanted seq_len \+ 1 = {length + 1}"):
            TokenBlocks(path, length)
        return
    blocks, ids = TokenBlocks(path, length), torch.arange(n)
    assert len(blocks) == (n - 1) // length == len(list(blocks))
    for i, block in enumerate(blocks):
        assert torch.equal(block, ids[i * length : i * length + length + 1])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_files_that_are_no_token_files(tmp_path):
    path = tmp_path / "t.npy"
    for save in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"PK" * 100),
        lambda: np.save(path, np.zeros(9, np.int64)),
        lambda: np.save(path, np.zeros(9, ">u2")),
        lambda: np.save(path, np.zeros((3, 3), np.uint16)),
        lambda: np.save(path, np.array([{}] * 9), allow_pickle=True),
    ):
        save()
        with pytest.raises(ValueError) as error:
            TokenBlocks(path, 2)
        assert one_line(error) == f"path {str(path)!r} must be a .npy file of uint16 or uint32 tokens of shape (N,)"
    write_tokens(path, [range(100)], 100)
    os.truncate(path, 300)
    with pytest.raises(ValueError, match="is cut short: 300 bytes for 100 tokens"):
        TokenBlocks(path, 2)
    for length in (0, -1):
        with pytest.raises(ValueError, match=rf"wanted seq_len \+ 1 = {length + 1} \(> 1\)"):
            TokenBlocks(tokens(path, 10), length)


@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**40))
def test_an_epoch_takes_each_block_once(tmp_path_factory, n, length, batch_size, seed):
    length = min(length, n - 1)
    blocks = TokenBlocks(tokens(tmp_path_factory.mktemp("tokens") / "t.npy", n), length, seed)
    count = len(blocks)
    steps = math.ceil(3 * count / batch_size)
    batches = [blocks.batch(step, batch_size) for step in range(steps)]
    assert all(b.shape == (batch_size, length + 1) and b.dtype == torch.int64 for b in batches)
    rows = torch.cat(batches)[: 3 * count]
    assert torch.equal(rows, rows[:, :1] + torch.arange(length + 1))  # each a run of the file, with nothing joined
    for epoch in range(3):
        starts = sorted(rows[epoch * count : (epoch + 1) * count, 0].tolist())
        shift = starts[0] if count > 1 else None
        if count > 1:
            assert 0 <= shift < length
            assert starts == [min(shift + i * length, n - 1 - length) for i in range(count)]
        targets = {t for s in starts for t in range(s + 1, s + length + 1)}
        assert len(targets) >= count * length - (length - 1)  # the last block may overlap with the one before


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    path = tokens(tmp_path / "t.npy", 4000)
    seen = Counter()
    for seed in range(4):
        blocks = TokenBlocks(path, 16, seed)
        for epoch in range(4):  # one epoch is one batch here
            seen[tuple(blocks.batch(epoch, len(blocks))[:, 0].tolist())] += 1
    assert len(seen) == 16
    sums = [torch.Generator().manual_seed(seed + epoch) for seed in range(4) for epoch in range(4)]
    # with seed + epoch, seed 1 starts with seed 0's second epoch
    assert len({tuple(torch.randperm(249, generator=g).tolist()) for g in sums}) == 7
    shifts = [D.epoch_order(0, e, 249, 16)[0] for e in range(200)]
    assert set(shifts) == set(range(16))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
def test_a_batch_does_not_depend_on_the_way_there(tmp_path_factory, step, other, batch_size):
    path = tokens(tmp_path_factory.mktemp("tokens") / "t.npy", 150)
    wanted = TokenBlocks(path, 7, 3).batch(step, batch_size)
    walked = TokenBlocks(path, 7, 3)
    for s in range(step):
        walked.batch(s, batch_size)
    assert torch.equal(walked.batch(step, batch_size), wanted)
    walked.batch(other, batch_size), walked[0], list(walked.sequential(3))
    torch.manual_seed(other)
    state = torch.get_rng_state()
    assert torch.equal(walked.batch(step, batch_size), wanted)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator belongs to the model
    if batch_size % 2 == 0:  # half batches are the halves of batches
        halves = [walked.batch(2 * step + i, batch_size // 2) for i in range(2)]
        assert torch.equal(torch.cat(halves), wanted)


def test_resuming_from_the_step_alone_is_exact_and_the_usual_way_is_not(tmp_path):
    """Trap: a loader that draws from a generator started at the seed repeats the first batches after resuming."""
    path = tokens(tmp_path / "t.npy", 3000)

    def ours(start, stop):
        blocks = TokenBlocks(path, 32, 0)
        return [blocks.batch(step, 8) for step in range(start, stop)]

    def stateful(start, stop):
        g, blocks = torch.Generator().manual_seed(0), TokenBlocks(path, 32, 0)
        draws = [torch.randint(len(blocks), (8,), generator=g).tolist() for _ in range(start, stop)]
        return [torch.stack([blocks[i] for i in draw]) for draw in draws]

    def exact(run):
        return torch.equal(torch.stack(run(0, 40)[25:]), torch.stack(run(25, 40)))

    assert exact(ours) and not exact(stateful)


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 7))
def test_sequential_scores_each_token_once(tmp_path_factory, n, length, batch_size):
    length = min(length, n - 1)
    blocks = TokenBlocks(tokens(tmp_path_factory.mktemp("tokens") / "t.npy", n), length)
    pairs = list(blocks.sequential(batch_size))
    scored = []
    for ids, labels in pairs:
        assert ids.shape == labels.shape and ids.shape[1] == length + 1 and 1 <= len(ids) <= batch_size
        assert ids.dtype == labels.dtype == torch.int64 and ids.min() >= 0
        known = labels != -100
        assert torch.equal(ids[known], labels[known]) and (ids[~known] == 0).all()
        assert torch.equal(ids[:, :-1][known[:, 1:]] + 1, labels[:, 1:][known[:, 1:]])  # the input is the token before
        scored += labels[:, 1:][known[:, 1:]].tolist()
    assert scored == list(range(1, n))
    for limit in (1, 2):
        assert len(list(blocks.sequential(batch_size, limit))) == min(limit, len(pairs))
    assert all(len(labels) == batch_size for _, labels in pairs[:-1])
    if (n - 1) % length:  # what the last row is for: full blocks alone leave a rest
        assert len(blocks) * length < n - 1


def test_a_loss_over_the_file_does_not_depend_on_the_batch_size(tmp_path):
    """A bigram model: its loss in one piece over the whole file equals the sum over sequential batches."""
    ids = torch.randint(50, (1000,), generator=torch.Generator().manual_seed(1))
    write_tokens(tmp_path / "t.npy", [ids.tolist()], 50)
    logits = torch.randn(50, 50, dtype=torch.float64)
    whole = torch.nn.functional.cross_entropy(logits[ids[:-1]], ids[1:], reduction="sum")
    for length, batch_size in ((7, 3), (999, 1), (100, 64), (1, 10)):
        total = 0
        for x, y in TokenBlocks(tmp_path / "t.npy", length).sequential(batch_size):
            rows, targets = logits[x[:, :-1]].flatten(0, 1), y[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(rows, targets, reduction="sum")  # leaves out -100
        assert total.item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_large_file_stays_on_disk(tmp_path):
    """200 MB of zeros that take no space on disk; the growth of the resident memory tells what was loaded."""
    path, n = tmp_path / "t.npy", 100_000_000
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({n},), }}".encode().ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header)
    os.truncate(path, 128 + 2 * n)
    script = """
import sys, torch
from minimal.data import TokenBlocks
def resident(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1000
before = resident()
blocks = TokenBlocks(sys.argv[1], 1024)
for step in range(9): assert blocks.batch(step, 8).shape == (8, 1025)
print(len(blocks), resident() - before)
whole = open(sys.argv[1], "rb").read()
print(resident() - before)
"""
    env = {**os.environ, "PYTHONPATH": str(FILE.parent.parent), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", script, path], env=env, capture_output=True, text=True, check=True)
    count, grown, whole = out.stdout.split()
    assert int(count) == (n - 1) // 1024
    assert float(grown) < 50 < 150 < float(whole)


def test_writing_holds_one_list_at_a_time(tmp_path):
    import tracemalloc

    def lists():
        for _ in range(300):
            yield [7] * 10_000

    def peak(write):
        tracemalloc.start()
        write()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    streamed = peak(lambda: write_tokens(tmp_path / "t.npy", lists(), 8))
    collected = peak(lambda: write_tokens(tmp_path / "t.npy", list(lists()), 8))
    assert streamed < 1e6 < 2e7 < collected


# --- images and the whole ---------------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    images = D.digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1
    assert np.array_equal((images * 16).flatten(1).numpy(), load_digits().data)


def test_read_images(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 6, 6, 3), np.uint8)
    for name, array in zip(("b.png", "a.PNG", "c/d.png"), pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = D.read_images(tmp_path, 6, channels=3)
    assert images.shape == (3, 3, 6, 6) and images.dtype == torch.float32
    wanted = torch.tensor(pixels[[1, 0, 2]]).permute(0, 3, 1, 2) / 255  # a, b, c/d
    assert torch.equal(images, wanted)
    grey = D.read_images(tmp_path, 6)
    luma = (wanted * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)  # ITU-R BT.601
    assert grey.shape == (3, 1, 6, 6) and (grey - luma).abs().max() < 1.01 / 255
    # a wide picture is cut to its middle square, not squeezed
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 200
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide" / "w.png")
    assert torch.equal(D.read_images(tmp_path / "wide", 8), torch.full((1, 1, 8, 8), 200 / 255))
    (tmp_path / "wide" / "x.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="x.jpg: not a readable image"):
        D.read_images(tmp_path / "wide", 8)
    with pytest.raises(ValueError) as error:
        D.read_images(tmp_path / "none", 8)
    assert "holds no image (.png" in one_line(error)


@pytest.mark.parametrize(
    "call, package, install",
    [(lambda: D.digits(), "sklearn", "scikit-learn"), (lambda: D.read_images(".", 8), "PIL", "pillow")],
)
def test_missing_packages_are_named(monkeypatch, call, package, install):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ImportError
    with pytest.raises(ImportError, match=f"pip install {install}"):
        call()


def test_the_file_runs_alone(tmp_path):
    """The demo, in an empty folder, on a copy of the file, with Python's hash randomised anew: twice the same."""
    copy = tmp_path / "copy.py"
    copy.write_bytes(FILE.read_bytes())
    options = dict(cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    run = [subprocess.run([sys.executable, "-I", copy], **options).stdout for _ in range(2)]
    assert run[0] == run[1] and "resumed at step 5, same to step 8: True" in run[0]
    assert "17 texts, 15 differ once cleaned, 13 without near-duplicates" in run[0]
    assert os.listdir(tmp_path) == ["copy.py"]


def test_the_usage_in_the_docstring_runs(tmp_path, monkeypatch):
    class Bytes:
        vocab_size, eos_id = 257, 256

        def encode(self, text):
            return list(text.encode())

    monkeypatch.chdir(tmp_path)
    os.mkdir("corpus")
    for i in range(20):
        Path(f"corpus/{i}.txt").write_text(" ".join(str(i * j) for j in range(200)))
    lines = [line[4:] for line in D.__doc__.split("\n") if line.startswith("    ") and line[4:6] not in ("J(", "P[")]
    assert len(lines) == 4
    names = {**vars(D), "tokenizer": Bytes()}
    exec("\n".join(lines), names)
    assert names["ids"].shape == (8, 257)
