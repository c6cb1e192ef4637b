# SPDX-License-Identifier: MIT
"""minimal/tokenizer.py against Hugging Face `tokenizers` (ids, merges, files) and against brute force."""

import collections
import copy
import json
import os
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
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minimal import tokenizer as file
from minimal.tokenizer import END, Tokenizer, byte_alphabet, word_pattern

SOURCE = pathlib.Path(file.__file__).read_text(encoding="utf-8")
NASTY = [
    "I'm sure they've said it's what we'd do; you'll see, they're 'there. IT'S 'Tis ''s 's's ' s",
    "x=1;y_2 = __init__(self)[3:14] -> 0x7F + 1_000.5e-3  # TODO:\n\tif not(a!=b):\r\n\t\treturn\n\n\n    pass   \n",
    "    four,  two, one end   ",
    " \t \n \r\n\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000x\u3000 y",
    "\x00\x01\x02\x07\x1b[0m\x7f\x80\x9f\xad\u200b\u200d\u200e\u2060\ufeff\ufffd\uffff\U0010ffff\ue000",
    "naïve café cafe\u0301 Å A\u030a n\u0303o\u0308 ﬁ ß İi̇ Ǆ z\u0335\u0334\u0321\u0322 क्षि நி ที่ กำ",
    "漢字かな交じり文、テスト。中文，沒有空格的長句子 한국어 띄어쓰기 ᄒ\u1161ᆫ 𠀀𪛖 㐂一二三〇",
    "שלום עולם \u202bمرحبا بالعالم\u202c ١٢٣ ۴۵۶ १२३ ½ ⅷ Ⅻ ① ² ₃ ㊿ 𝟘𝟙 𝔘𝔫𝔦 ᛮᛯ 𐄇 𑁒",
    "👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 🇩🇪🇫🇷 ☺️ ☺ ❤️‍🔥 e\u20e3 1️⃣ 🫠",
    "a" * 70 + " " * 70 + "=" * 70 + "\n" * 70 + "ab" * 70,
    END + " and " + END + END + "<|endoftext| > <|ENDOFTEXT|>",
    "<0x41> <0xE2> Ġthe Ċ ġ Ā ł Ń",
    "",
    " ",
]
# An unassigned character can be a letter for `tokenizers` and nothing yet for Python (the limit that the file states).
ASSIGNED = st.text(st.characters(exclude_categories=("Cs", "Cn")))
ANY = st.text(st.characters(exclude_categories=("Cs",)))
MIXED = st.lists(st.sampled_from(NASTY) | ASSIGNED | st.sampled_from(["'s", "  ", "\n", END, "1", "é"])).map("".join)


@pytest.fixture(scope="module", params=["bpe", "bytes", "char"])
def ours(request):
    return Tokenizer.train([SOURCE, *NASTY[:-4]], 900, request.param)


def as_hf(tokenizer, folder):
    tokenizer.save(folder)
    return hf.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    return as_hf(ours, tmp_path_factory.mktemp(ours.kind))


def hf_ids(tokenizer, text, special):
    tokenizer.encode_special_tokens = not special
    return tokenizer.encode(text).ids


def hf_train(texts, vocab_size, special_tokens=(END,), alphabet=True):
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def learnt(tokenizer):
    """(vocab, merges) of a tokenizer of either library."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.vocab, tokenizer.merges
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


# ---------------------------------------------------------------------------------------------- words


def test_every_assigned_character_is_cut_as_tokenizers_does():
    oracle = pre_tokenizers.ByteLevel(add_prefix_space=False)
    skipped = ("Cs", "Cn")
    assigned = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in skipped]
    assert len(assigned) > 200_000  # with the private-use planes

    def agrees(pattern, characters):
        text = "".join(f"a{c}1{c}.{c} {c}  {c}" for c in characters)
        ends = [match.end() for match in pattern.finditer(text)]
        return ends == [end for _, (_, end) in oracle.pre_tokenize_str(text)]

    # ideographs, Hangul and private use are long runs of one kind: every 16th of those
    rest = [c for c in assigned if not (0x3400 <= ord(c) <= 0xF8FF or ord(c) > 0x1FFFF) or ord(c) % 16 == 0]
    for i in range(0, len(rest), 4096):
        assert agrees(word_pattern(), rest[i : i + 4096]), f"between {rest[i]!a} and {rest[i : i + 4096][-1]!a}"
    tail = r"| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"
    other = "".join(c for c in assigned if unicodedata.category(c) in ("Nl", "No"))
    variants = {  # what one writes first; each must fail the check above
        "No and Nl taken for letters": r" ?[^\W\d_]+| ?\d+",
        "Python's own white space": rf" ?[^\W\d_{other}]+| ?[\d{other}]+",
    }
    for name, variant in variants.items():
        assert not agrees(re.compile(rf"'(?:[stmd]|re|ve|ll)|{variant}{tail}"), rest[:4096]), name


@given(MIXED)
def test_words_are_those_of_tokenizers(text):
    oracle = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert word_pattern().findall(text) == [text[a:b] for _, (a, b) in oracle]


@given(ANY)
def test_words_join_to_the_text(text):
    assert "".join(word_pattern().findall(text)) == text


def test_byte_alphabet():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet()) and len(set(byte_alphabet())) == 256
    raw = bytes(range(256)).decode("latin-1")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(raw)
    assert "".join(p for p, _ in pieces) == "".join(byte_alphabet()[b] for b in raw.encode())


# ---------------------------------------------------------------------------------------------- round trips, same ids


@given(text=ANY | MIXED)
@settings(max_examples=100)
def test_round_trip(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text and ours.decode_bytes(ids) == text.encode()
    assert ours.decode(ours.encode(text, special=True)) == text
    assert all(0 <= i < ours.vocab_size for i in ids)


@pytest.mark.parametrize("special", [False, True])
def test_same_ids_as_tokenizers_on_nasty_text(ours, theirs, special):
    for text in [*NASTY, "".join(NASTY), SOURCE]:
        ids = ours.encode(text, special=special)
        assert ids == hf_ids(theirs, text, special)
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab() == ours.vocab and theirs.get_vocab_size() == ours.vocab_size


@given(text=MIXED, special=st.booleans())
@settings(max_examples=150)
def test_same_ids_as_tokenizers(ours, theirs, text, special):
    assert ours.encode(text, special=special) == hf_ids(theirs, text, special)


@given(data=st.data())
def test_broken_utf8_decodes_as_in_tokenizers(data):
    tokenizer = Tokenizer.train([], 257, "bytes")
    oracle = hf.Tokenizer(models.BPE(vocab=tokenizer.vocab, merges=[]))
    oracle.decoder = decoders.ByteLevel()
    ids = data.draw(st.lists(st.integers(1, 256)))
    assert tokenizer.decode(ids) == oracle.decode(ids)


def merge_by_definition(symbols, ranks):
    """Encoding as the file's docstring states it, quadratic."""
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
        if not found:
            return symbols
        _, i = min(found)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def merge_all_of_a_pair_at_once(symbols, ranks):
    """The variant in GPT-2's own code; it differs where a merge can make a pair of lower rank."""
    while True:
        found = [ranks[pair] for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]
        if not found:
            return symbols
        out, i = [], 0
        while i < len(symbols):
            n = 2 if i + 1 < len(symbols) and ranks.get((symbols[i], symbols[i + 1])) == min(found) else 1
            out.append("".join(symbols[i : i + n]))
            i += n
        symbols = out


def any_merges(seed):
    """Merges in an order that no training gives, where several can spell one token."""
    r = random.Random(seed)
    names, merges = ["a", "b"], []
    for _ in range(r.randrange(1, 25)):
        pair = r.choice(names), r.choice(names)
        if len("".join(pair)) < 9 and pair not in merges:
            merges.append(pair)
            names.append("".join(pair))
    r.shuffle(merges)
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*byte_alphabet(), *names]))}
    return Tokenizer(vocab, merges, [], "bpe"), hf.Tokenizer(models.BPE(vocab=vocab, merges=merges))


def test_encoding_by_definition_and_by_tokenizers_for_any_merges():
    rejected = 0
    for seed in range(150):
        ours, theirs = any_merges(seed)
        ranks = {pair: i for i, pair in enumerate(ours.merges)}
        for length in (1, 2, 5, 17, 60):
            word = "".join(random.Random(seed + length).choices("ab", k=length))
            ids = ours.encode(word)
            assert [ours.tokens[i] for i in ids] == merge_by_definition(list(word), ranks)
            assert ids == theirs.encode(word).ids
            rejected += [ours.tokens[i] for i in ids] != merge_all_of_a_pair_at_once(list(word), ranks)
    assert rejected > 5  # the check tells the variant from the definition


# ---------------------------------------------------------------------------------------------- training


def train_by_definition(texts, vocab_size, tie=lambda pair: pair):
    """Algorithm 1 of Sennrich et al., all pairs counted again at each step; ties to the smaller ids."""
    stand_in = byte_alphabet()
    names = [END, *sorted(stand_in)]
    words = collections.Counter(w for text in texts for w in word_pattern().findall(text))
    words = {w: ([names.index(stand_in[b]) for b in w.encode()], n) for w, n in words.items()}
    merges = []
    while len(names) < vocab_size:
        counts = collections.Counter()
        for symbols, n in words.values():
            for pair in zip(symbols, symbols[1:], strict=False):
                counts[pair] += n
        best = max(counts, key=lambda pair: (counts[pair], *(-i for i in tie(pair))), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append((names[best[0]], names[best[1]]))
        for symbols, _ in words.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [len(names)]
                i += 1
        names.append(merges[-1][0] + merges[-1][1])
    return {name: i for i, name in enumerate(names)}, merges


@given(st.lists(st.text("ab c", max_size=40) | st.text("aé\n", max_size=40), max_size=6), st.integers(257, 300))
@settings(max_examples=100)
def test_training_by_definition_and_by_tokenizers(texts, vocab_size):
    tokenizer = Tokenizer.train(iter(texts), vocab_size)
    assert learnt(tokenizer) == train_by_definition(texts, vocab_size)
    assert learnt(tokenizer) == learnt(hf_train(texts, vocab_size))


@pytest.mark.parametrize("vocab_size", [257, 258, 700, 100_000])
def test_training_gives_the_merges_of_tokenizers(vocab_size):
    texts = [SOURCE, *NASTY, NASTY[6] * 3]
    tokenizer = Tokenizer.train(texts, vocab_size)
    assert learnt(tokenizer) == learnt(hf_train(texts, vocab_size))
    assert tokenizer.vocab_size <= vocab_size  # 100,000: the data is exhausted first
    assert Tokenizer.train(reversed(texts), vocab_size).merges == tokenizer.merges  # the order of documents is nothing


def test_another_tie_break_is_rejected():
    texts = [SOURCE[:3000]]
    assert learnt(Tokenizer.train(texts, 320)) == train_by_definition(texts, 320)
    assert learnt(Tokenizer.train(texts, 320)) != train_by_definition(texts, 320, tie=lambda pair: (-pair[0], pair[1]))


def test_encoding_gives_the_segmentation_of_training():
    texts = ["low lower lowest newer wider new wide widest " * 3]
    tokenizer = Tokenizer.train(texts, 290)
    ranks = {pair: i for i, pair in enumerate(tokenizer.merges)}
    words = word_pattern().findall(texts[0])
    expected = [token for w in words for token in merge_by_definition([byte_alphabet()[b] for b in w.encode()], ranks)]
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode(texts[0])] == expected


def test_char_keeps_the_most_frequent_and_spells_the_others():
    tokenizer = Tokenizer.train(["€ccccbbbaé", "é"], 257 + 4, "char")
    assert tokenizer.tokens[257:] == ["a", "b", "c", "é"]  # a and € once each: the smaller code point
    assert tokenizer.encode("c€") == [tokenizer.token_to_id(t) for t in ("c", "<0xE2>", "<0x82>", "<0xAC>")]
    assert tokenizer.decode(tokenizer.encode("€")) == "€"


# ---------------------------------------------------------------------------------------------- special tokens


def ends_once(ids, eos):
    return ids[-1] == eos and ids.count(eos) == 1


def test_end_of_text_is_kept_and_never_doubled(ours):
    """Trap 4: the model must be trained to stop, on exactly one end token."""
    document = "def f():\n    return 1\n"
    eos = ours.eos_id
    assert eos == ours.token_to_id(END) == 0 and ours.id_to_token(eos) == END
    assert eos not in ours.encode(document)  # nothing is added by itself
    assert ends_once(ours.encode(document) + [eos], eos)
    assert ours.encode(document + END, special=True) == ours.encode(document) + [eos]
    assert ours.decode(ours.encode(document) + [eos]) == document + END  # and it is not dropped in decoding
    doubled = ours.encode(document + END, special=True) + [eos]  # an encode that appended it once more
    lost = [i for i in doubled if i != eos]  # padding's label mask, where pad == eos
    assert not ends_once(doubled, eos) and not ends_once(lost, eos)


def test_special_tokens_in_a_text_are_plain_text_by_default(ours):
    assert ours.eos_id not in ours.encode(f"ignore the above {END}")
    assert ours.encode(f"a{END}{END}b", special=True).count(ours.eos_id) == 2


def test_no_merge_spells_a_special_token():
    texts = ["the theme of the day"] * 9
    special = (END, "the", "Ġthe")

    def leaks(ids):
        return any(i < len(special) for i in ids)

    tokenizer = Tokenizer.train(texts, 300, special_tokens=special)
    assert not leaks(tokenizer.encode(texts[0])) and leaks(tokenizer.encode(texts[0], special=True))
    # the library's trainer gives the word the special token's id: the variant that this check must reject
    assert leaks(hf_ids(hf_train(texts, 300, special), texts[0], special=False))


def test_several_special_tokens(tmp_path):
    special = ("<|a|>", "<|a|>b", "|>b<|", "[.*]", "é€ ", END)
    for kind in ("bpe", "char"):
        tokenizer = Tokenizer.train([SOURCE], 700, kind, special)
        theirs = as_hf(tokenizer, tmp_path / kind)
        text = "x<|a|>b<|a|><|a|>b<|>b<|[.*]é€  é€<|a" + END
        for flag in (False, True):
            assert tokenizer.encode(text, special=flag) == hf_ids(theirs, text, flag)
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert Tokenizer.train([], 256, "bytes", special_tokens=()).eos_id is None


# ---------------------------------------------------------------------------------------------- decoding, errors


def test_streaming_by_bytes(ours):
    text = NASTY[8] + NASTY[6]
    assert b"".join(ours.decode_bytes([i]) for i in ours.encode(text)).decode() == text
    assert ours.decode_bytes([]) == b"" and ours.decode(iter(ours.encode("ab"))) == "ab"
    first = ours.encode("\U0001f9ff")[:1]  # half a character
    assert ours.decode(first) == "\ufffd"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: t.decode([1, t.vocab_size]), ValueError, "got {V}"),
        (lambda t: t.decode([5, -1]), ValueError, "size {V}, got -1"),
        (lambda t: t.decode_bytes([2**70]), ValueError, "got 1180591620717411303424"),
        (lambda t: t.decode([0.5]), TypeError, "float"),
        (lambda t: t.encode("ab\ud800c"), ValueError, r"text .*'\\ud800' at position 2"),
        (lambda t: t.encode(b"ab"), TypeError, "text must be str, got bytes"),
        (lambda t: Tokenizer.train(["ok", "\udfff"], 300), ValueError, r"texts .*'\\udfff' at position 0"),
        (lambda t: Tokenizer.train(["ok", 3], 300), TypeError, "texts must be str, got int"),
        (lambda t: Tokenizer.train("one text", 300), TypeError, "texts must be an iterable"),
        (lambda t: Tokenizer.train([], 256), ValueError, "vocab_size must be at least 257 .*got 256"),
        (lambda t: Tokenizer.train([], 256, "char"), ValueError, "vocab_size must be at least 257 .*got 256"),
        (lambda t: Tokenizer.train([], 300, "word"), ValueError, "kind must be one of bpe, bytes, char, got 'word'"),
        (lambda t: Tokenizer.train([], 300, special_tokens=("<a>", "<a>")), ValueError, "special_tokens .*'<a>'"),
        (lambda t: Tokenizer.train([], 300, special_tokens=("",)), ValueError, "special_tokens .*''"),
        (lambda t: Tokenizer.train([], 300, special_tokens=("a",)), ValueError, "special_tokens .*'a'"),
        (lambda t: Tokenizer.train([], 300, "char", special_tokens=("a",)), ValueError, "special_tokens .*'a'"),
        (lambda t: Tokenizer.train([], 300, "char", ("<0x41>",)), ValueError, "special_tokens .*'<0x41>'"),
        (lambda t: Tokenizer.train([], 300, special_tokens=END), ValueError, "special_tokens must be distinct"),
    ],
)
def test_errors_are_one_line(ours, call, error, words):
    with pytest.raises(error, match=words.replace("{V}", str(ours.vocab_size))) as caught:
        call(ours)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize(("word", "size"), [("a", 1_000_000), (" ", 200_000), ("=", 200_000), ("é", 200_000)])
def test_a_long_word_does_not_hang(word, size):
    tokenizer = Tokenizer.train([word * 5000], 280)
    text = word * (size // len(word.encode()))
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 30  # about 2 s for a million; a quadratic loop takes hours
    assert len(ids) < size / 4 and tokenizer.decode(ids) == text


def test_training_on_a_long_word_does_not_hang():
    letters = "".join(random.Random(0).choices("etaoin", k=100_000))
    start = time.process_time()
    tokenizer = Tokenizer.train([letters, "a" * 100_000], 600)
    assert time.process_time() - start < 30 and tokenizer.vocab_size == 600


def test_the_cache_is_bounded():
    tokenizer = Tokenizer.train([SOURCE], 400)
    ids = tokenizer.encode("a new word " + "z" * 100)
    assert 0 < len(tokenizer._cache) == 3  # not the long one
    tokenizer._cache = {str(i): (0,) for i in range(1 << 18)}
    assert tokenizer.encode("a new word " + "z" * 100) == ids and len(tokenizer._cache) == 1 << 18


def test_import_is_cheap_and_needs_only_the_standard_library(tmp_path):
    shutil.copy(file.__file__, tmp_path / "tokenizer.py")
    code = "import sys, tokenizer as t; assert t.word_pattern.cache_info().currsize == 0; print(*sys.modules)"
    run = [sys.executable, "-c", code], [sys.executable, "tokenizer.py"]
    loaded, demo = (subprocess.run(r, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8") for r in run)
    assert loaded.returncode == 0 and not {"torch", "regex", "numpy", "tokenizers"} & set(loaded.stdout.split())
    assert demo.returncode == 0, demo.stderr
    assert "Ġ+Ġ" in demo.stdout and "bytes per token" in demo.stdout and "False" not in demo.stdout


# ---------------------------------------------------------------------------------------------- files


def test_save_and_load(ours, tmp_path):
    ours.save(tmp_path / "new" / "folder")
    ours.save(str(tmp_path / "file.json"))
    for place in (tmp_path / "new" / "folder", str(tmp_path / "new/folder/tokenizer.json"), tmp_path / "file.json"):
        again = Tokenizer.load(place)
        assert learnt(again) == learnt(ours) and (again.kind, again.added) == (ours.kind, ours.added)
        for text in NASTY:
            assert again.encode(text, special=True) == ours.encode(text, special=True)
    again.save(tmp_path / "new" / "folder")
    assert (tmp_path / "new/folder/tokenizer.json").read_bytes() == (tmp_path / "file.json").read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.json", "folder", "new", "tokenizer.json"]


def test_a_failed_save_leaves_the_old_file(ours, tmp_path, monkeypatch):
    ours.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(self, *args, **kwargs):
        with open(self, "w") as out:
            out.write("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_pickle_and_copy(ours):
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert again.encode(SOURCE + END, special=True) == ours.encode(SOURCE + END, special=True)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path)


def test_transformers_opens_our_file(ours, tmp_path):
    from transformers import PreTrainedTokenizerFast

    ours.save(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END)
    assert theirs.eos_token_id == ours.eos_id and len(theirs) == ours.vocab_size
    assert theirs("naïve 東京" + END)["input_ids"] == ours.encode("naïve 東京" + END, special=True)


def gpt2_like():
    """A file of `tokenizers` with what GPT-2's own has: byte level, a post-processor, the end token at the end."""
    tokenizer = hf_train([SOURCE, *NASTY], 600, special_tokens=())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END, "<|x|>"])
    tokenizer.add_tokens(["self.", "x<|", "  ", "東京"])  # not special: part of the text, always found
    return tokenizer


@pytest.mark.parametrize("old", [False, True], ids=["pairs", "strings"])
def test_load_a_file_of_tokenizers(tmp_path, old):
    theirs = gpt2_like()
    tree = json.loads(theirs.to_str())
    if old:  # as written before 2024: merges "a b", no name of the model, empty strings for None
        tree["model"]["merges"] = ["#version: 0.2", *(" ".join(m) for m in tree["model"]["merges"])]
        tree["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        del tree["model"]["type"], tree["model"]["byte_fallback"], tree["model"]["ignore_merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    assert learnt(hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))[0] == learnt(theirs)[0]
    ours = Tokenizer.load(tmp_path)
    assert ours.kind == "bpe" and ours.eos_id == theirs.token_to_id(END) == ours.vocab_size - 6
    assert all(ours.token_to_id(t) == i and ours.id_to_token(i) == t for t, i in theirs.get_vocab().items())
    ours.save(tmp_path / "again")
    for tokenizer in (ours, Tokenizer.load(tmp_path / "again")):
        for text in [*NASTY, SOURCE, "x<|x|>  self.  東京x<|" + END]:
            for special in (False, True):
                assert tokenizer.encode(text, special=special) == hf_ids(theirs, text, special)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_without_all_bytes_says_so_instead_of_dropping_text(tmp_path):
    theirs = hf_train(["abab abab"], 30, alphabet=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("abba ab") == theirs.encode("abba ab").ids
    assert theirs.encode("abz").ids == theirs.encode("ab").ids  # the library loses the z
    with pytest.raises(ValueError, match=r"text has byte 0x7A in 'abz'"):
        ours.encode("abz")


def changed(**parts):
    tokenizer = gpt2_like()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_added(**flags):
    tokenizer = gpt2_like()
    tokenizer.add_tokens([hf.AddedToken("odd", **flags)])
    return tokenizer


def with_model(**options):
    return changed(model=models.BPE(vocab={"a": 0, "b": 1}, merges=[], **options))


BEGIN = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 600)])
UNSUPPORTED = {
    "model 'WordPiece'": lambda: changed(model=models.WordPiece({"a": 0, "[UNK]": 1})),
    "model 'Unigram'": lambda: changed(model=models.Unigram([("a", -1.0)], 0)),
    "model 'WordLevel'": lambda: changed(model=models.WordLevel({"a": 0}, "a")),
    "normalizer 'NFC'": lambda: changed(normalizer=normalizers.NFC()),
    "normalizer 'Lowercase'": lambda: changed(normalizer=normalizers.Lowercase()),
    "pre_tokenizer 'Whitespace'": lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()),
    "pre_tokenizer 'Metaspace'": lambda: changed(pre_tokenizer=pre_tokenizers.Metaspace()),
    "pre_tokenizer 'Sequence'": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    ),
    "add_prefix_space True": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "use_regex False": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(False, use_regex=False)),
    "post_processor 'TemplateProcessing'": lambda: changed(post_processor=BEGIN),
    "decoder 'WordPiece'": lambda: changed(decoder=decoders.WordPiece()),
    "decoder 'Metaspace'": lambda: changed(decoder=decoders.Metaspace()),
    "dropout 0.5": lambda: with_model(dropout=0.5),
    "continuing_subword_prefix '##'": lambda: with_model(continuing_subword_prefix="##"),
    "end_of_word_suffix '</w>'": lambda: with_model(end_of_word_suffix="</w>"),
    "ignore_merges True": lambda: with_model(ignore_merges=True),
    "added token 'odd' with lstrip True": lambda: with_added(lstrip=True),
    "added token 'odd' with rstrip True": lambda: with_added(rstrip=True),
    "added token 'odd' with single_word True": lambda: with_added(single_word=True),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_files_are_refused_by_name(what, tmp_path):
    UNSUPPORTED[what]().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=re.escape(what)) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "tokenizer.json")) and "supported: byte-level BPE" in message
    assert "\n" not in message


def refused_or_usable(place):
    """A damaged file must either be refused in one line or be a tokenizer that works."""
    try:
        tokenizer = Tokenizer.load(place)
    except ValueError as error:
        assert str(place) in str(error) and "\n" not in str(error) and len(str(error)) < 500
        return False
    try:
        ids = tokenizer.encode("naïve 東京" + END, special=True)
    except ValueError as error:
        assert "no token" in str(error)  # a byte's token is gone
        return True
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(ids)
    return True


def test_truncated_files(ours, tmp_path):
    ours.save(tmp_path)
    place = tmp_path / "tokenizer.json"
    whole = place.read_bytes()
    assert refused_or_usable(place)
    for n in [0, 1, 10, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        place.write_bytes(whole[:n])
        assert not refused_or_usable(place)
    for junk in [b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": {}}', b"\x80abc"]:
        place.write_bytes(junk)
        assert not refused_or_usable(place)


JUNK = st.sampled_from([None, True, False, -1, 0, 3, 1.5, 10**30, "", "x", "\ud800", [], [[]], ["a"], {}, {"type": ""}])


@given(data=st.data(), kind=st.sampled_from(["bpe", "char"]))
@settings(max_examples=200)
def test_one_damaged_place(tmp_path_factory, data, kind):
    folder = tmp_path_factory.getbasetemp()
    Tokenizer.train(["abab abab"], 262, kind).save(folder / "one.json")
    tree = json.loads((folder / "one.json").read_text(encoding="utf-8"))
    node = tree
    for _ in range(data.draw(st.integers(0, 4))):  # down to a random place
        keys = [k for k in (node if isinstance(node, dict) else range(len(node))) if isinstance(node[k], (dict, list))]
        if not keys or not data.draw(st.booleans()) and node is not tree:
            break
        node = node[data.draw(st.sampled_from(keys))]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if keys:
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()):
            node[key] = data.draw(JUNK)
        else:
            del node[key]
    (folder / "one.json").write_text(json.dumps(tree), encoding="utf-8")
    refused_or_usable(folder / "one.json")


def test_vocabularies_that_do_not_fit_together(tmp_path):
    Tokenizer.train(["abab abab"], 259).save(tmp_path)
    place = tmp_path / "tokenizer.json"
    whole = place.read_text(encoding="utf-8")
    edits = {
        "a merge of unknown tokens": lambda t: t["model"]["merges"].append(["Q", "nowhere"]),
        "a merge into an unknown token": lambda t: t["model"]["merges"].append(["Q", "Q"]),
        "a merge of three": lambda t: t["model"]["merges"].append(["a", "b", "c"]),
        "a vocabulary that is a list": lambda t: t["model"].update(vocab=list(t["model"]["vocab"].items())),
        "a decoder of nothing": lambda t: t.update(decoder={"type": "Sequence", "decoders": []}),
        "an id twice": lambda t: t["model"]["vocab"].update({"new": 5}),
        "an id left out": lambda t: t["model"]["vocab"].update({"new": 999}),
        "an id that is no integer": lambda t: t["model"]["vocab"].update({"a": float(t["model"]["vocab"]["a"])}),
        "an added token with two ids": lambda t: t["added_tokens"][0].update(id=7),
        "an empty added token": lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 259, "content": ""}),
    }
    for name, edit in edits.items():
        tree = json.loads(whole)
        edit(tree)
        place.write_text(json.dumps(tree), encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged") as caught:
            Tokenizer.load(tmp_path)
        assert os.fspath(place) in str(caught.value) and "\n" not in str(caught.value), name
