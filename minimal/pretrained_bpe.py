# SPDX-License-Identifier: MIT
r"""Byte-level BPE as others trained it: `tokenizer.json` of SmolLM2, Llama 3, Qwen 2, GPT-2, StarCoder and their like.

Papers: R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
arXiv:1508.07909, for the merges; A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019
(GPT-2), section 2.2, for bytes instead of characters. The file describes a pipeline, followed here in its order:

    added tokens   "<|im_end|>" and the like are cut out first
    normalizer     of what they leave: none, NFC, NFD, NFKC or NFKD
    pre_tokenizer  cuts it into words: Digits, Split by a pattern, at last ByteLevel with or without GPT-2's pattern
    model          in each word, spelt in bytes: while some neighbours have a rank, join the pair of lowest rank, the
                   leftmost first; with ignore_merges a word that is a token stays whole

Departures from the `tokenizers` library, and why:
- Special tokens in a text stay plain text unless asked for (special=True): others may have written it. None is ever
  added at the ends: a post_processor is kept in the file but not run.
- Parts that would be encoded differently here are refused by name: other models and steps, byte_fallback, dropout,
  and patterns that Oniguruma, the library's engine, may not read as Python does.

Limits: characters younger than the Unicode tables of your Python (or `regex`, needed for Split by a Regex) may be cut
differently; normalizers differ for those after Unicode 9 (2016), where the library's stop. As in the library, bytes
without a token are left out (`missing_bytes`; SmolLM2 lacks a few control characters).

    tokenizer = PretrainedBPE.load("SmolLM2-135M")                 # the folder of tokenizer.json, or the file
    ids = tokenizer.encode("<|im_start|>user\n", special=True)     # encode adds nothing by itself
    tokenizer = PretrainedBPE(tree); text = tokenizer.decode(ids)  # tree: a parsed tokenizer.json

Letters: V vocabulary size, N bytes of a word. A word is encoded in O(N log N).
"""

import functools
import heapq
import itertools
import json
import operator
import os
import pathlib
import re
import unicodedata

ENDS = ("<|endoftext|>", "<|im_end|>", "</s>", "<|end_of_text|>")  # what ends a text, the likeliest name first
SPACES = re.compile(r"[^\S\x1c-\x1f]*")  # Unicode's White_Space; Python's has four control characters more
CLITICS = r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)"  # elsewhere (?i:) differs: Oniguruma lets ß match (?i:ss)
IN_CLASS = r"\\[pP]\{[CLMNPSZ][a-z]?\}|\\[dDsSnrt]|\\[^\w\s]"  # a category, a class, an escaped sign
MIXED = r"\^(?=(?:\\.|[^]\\])*\\[DSP])(?:\\.|[^]\\])*\\[dsp]"  # [^\d\D] matches nothing; with `regex`, everything
# No lookbehind, no ^ and $ (Oniguruma's are of lines), no nested classes, no (..)* (it may take exponential time).
UNDERSTOOD = re.compile(
    rf"(?:{CLITICS}|{IN_CLASS}|\[(?!{MIXED})\^?(?:{IN_CLASS}|&(?!&)|[^\\\[\]&])+\]|\((?:\?[:!])?(?![?*+{{])"
    r"|\)(?![*+{])|[?*+|]|\{\d{1,3}(?:,\d{0,3})?\}(?![+?])|[^][(){}.^$?*+|\\])+"
)


# Same as minimal/tokenizer.py: word_pattern
@functools.cache
def word_pattern():
    r"""GPT-2's pattern `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` for `re`."""
    codes = [c for c in range(0x20000) if unicodedata.category(chr(c)) in ("Nl", "No")]
    runs = [[c for _, c in run] for _, run in itertools.groupby(enumerate(codes), lambda ic: ic[1] - ic[0])]
    other = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)  # as ranges: `re` is slow on a list of 1,100
    letters, numbers = rf"[^\W\d_{other}]", rf"[\d{other}]"
    rest = r"(?:[^\w\s]+|[_\x1c-\x1f]+)"  # [^\s\p{L}\p{N}]+ in two disjoint parts: \w has _, \s has \x1c-\x1f
    space, no_space = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
    # a run of spaces leaves its last one to the word that follows
    return re.compile(rf"'(?:[stmd]|re|ve|ll)| ?{letters}+| ?{numbers}+| ?{rest}+|{space}+(?!{no_space})|{space}+")


@functools.cache
def digit_pattern(individual):
    """Digits of every script (Rust's char::is_numeric: Nd, Nl, No; str.isnumeric has 一 too), and what lies between."""
    numbers = re.search(r"\[(\\d[^]]+)", word_pattern().pattern)[1]  # as they are spelt out there
    return re.compile(rf"[{numbers}]{'' if individual else '+'}|[^{numbers}]+")


# Same as minimal/tokenizer.py: byte_alphabet
def byte_alphabet():
    """GPT-2's 256 printable stand-ins, byte -> character: `!` to `~` stay, a space is `Ġ`, a newline `Ċ`."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return [chr(b) if b in shown else chr(next(spare)) for b in range(256)]


# Same as minimal/tokenizer.py: check_text
def check_text(text, name):
    """TypeError unless `text` is a str; ValueError naming the place of a lone surrogate, which UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{name} must hold no lone surrogate, got {text[e.start]!a} at position {e.start}") from None


def is_word(c):
    r"""Rust's `\w`, for one character or "": letters, marks, digits (not ½), connectors, joiners, circled letters."""
    if not c or c in "\u200c\u200d" or "\u24b6" <= c <= "\u24e9":
        return c != ""
    circled = any(first <= ord(c) <= first + 25 for first in (0x1F130, 0x1F150, 0x1F170))
    return circled or unicodedata.category(c) in ("Nd", "Nl", "Pc") or unicodedata.category(c)[0] in "LM"


def flag(part, name, default=None):
    """A true or false out of a part of the file; ValueError for anything else."""
    if not isinstance(value := part.get(name, default), bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def steps(part, key):
    """A normalizer, pre_tokenizer or decoder of the file as a flat list: Sequences (their list is `key`) may nest."""
    part = part or {"type": "Sequence", key: []}
    return [s for inner in part[key] for s in steps(inner, key)] if part["type"] == "Sequence" else [part]


def cut_step(step):
    """One step of the pre_tokenizer as a function str -> list of str. Raises ValueError for one not known here."""
    kind = step["type"]
    if kind == "Digits":
        return digit_pattern(flag(step, "individual_digits", False)).findall
    if kind == "ByteLevel":
        prefix, use_regex = flag(step, "add_prefix_space"), flag(step, "use_regex", True)

        def byte_level(text):
            text = " " + text if prefix and not text.startswith(" ") else text
            return word_pattern().findall(text) if use_regex else [text]

        return byte_level
    if kind != "Split" or step["behavior"] not in ("Isolated", "Removed"):
        what = f"the pre_tokenizer {kind!r} {step.get('behavior', '')}"
        raise ValueError(f"{what}; supported: ByteLevel, Digits, Split (Isolated or Removed)")
    ((what, pattern),) = step["pattern"].items()
    removed, invert = step["behavior"] == "Removed", flag(step, "invert")
    if what == "String" and pattern:
        compiled = re.compile(re.escape(pattern))
    elif what == "Regex" and UNDERSTOOD.fullmatch(pattern):
        try:
            import regex

            compiled = regex.compile(pattern)
        except ImportError:
            raise ImportError("a Split by a Regex needs \\p{L}: pip install regex") from None
        except regex.error as error:
            raise ValueError(f"Split by Regex {pattern!r:.120}: {error}") from None
    else:
        raise ValueError(f"Split by {what} {pattern!r:.120}, which Oniguruma and Python may not read alike")
    if compiled.search(""):
        raise ValueError(f"Split by {what} {pattern!r:.120}, which matches the empty text")

    def split(text):
        borders = [0, *itertools.chain.from_iterable(match.span() for match in compiled.finditer(text)), len(text)]
        pieces = enumerate(itertools.pairwise(borders))  # the matches at odd places, what lies between at even ones
        return [text[a:b] for k, (a, b) in pieces if a < b and not (removed and (k % 2 > 0) != invert)]

    return split


class PretrainedBPE:
    """A byte-level BPE of V tokens with ids 0..V-1. tree: a parsed tokenizer.json, kept in `tree`, or its bytes.

    tokens: list, id -> token; vocab: dict, token -> id, both spelt as in the file: bytes by their stand-ins (" the" is
    "Ġthe"), added tokens as they are. vocab_size: V. missing_bytes: those without a token. eos_id: the id of the first
    of `ENDS` that there is, or None; set it where a model's other files name another. Raises ValueError, one line that
    begins with name, for a tree that is damaged or that `tokenizers` would encode differently.
    """

    def __init__(self, tree, name="tokenizer.json"):
        try:
            self.tree = json.loads(tree) if isinstance(tree, bytes) else tree
            self._read(self.tree)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
            what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            what = what.replace("\n", " ").encode(errors="backslashreplace").decode()
            raise ValueError(f"{name} is damaged or not supported: {what:.300}") from None
        self._cache = {}  # word -> its ids: a corpus repeats few words often

    def _read(self, tree):
        model, added = tree["model"], tree.get("added_tokens") or []
        own, self._alphabet = model["vocab"], byte_alphabet()
        self._byte_ids = [own.get(token) for token in self._alphabet]
        self.missing_bytes = frozenset(b for b, i in enumerate(self._byte_ids) if i is None)
        unk = [None] if self.missing_bytes else [None, model.get("unk_token")]  # with all bytes nothing is unknown
        facts = {"type": [None, "BPE"], "dropout": [None, 0], "byte_fallback": [None, False], "unk_token": unk}
        facts |= {"continuing_subword_prefix": [None, ""], "end_of_word_suffix": [None, ""]}
        for option, usual in facts.items():
            if model.get(option) not in usual:
                raise ValueError(f"the model has {option} {model[option]!r}, wanted a plain byte-level BPE")
        if (decoder := [step["type"] for step in steps(tree.get("decoder"), "decoders")]) != ["ByteLevel"]:
            raise ValueError(f"the decoder is {decoder}, wanted ByteLevel")
        self.vocab, contents = {**own}, set()
        for token in added:
            [flag(token, name) for name in ("special", "normalized", "single_word", "lstrip", "rstrip")]
            content = token["content"]
            check_text(content, "the content of an added token")
            if not content or content in contents or self.vocab.setdefault(content, token["id"]) != token["id"]:
                raise ValueError(f"the added token {content!r} is empty, there twice, or has two ids")
            contents.add(content)
        self.tokens, ids = sorted(self.vocab, key=self.vocab.get), [*self.vocab.values()]
        if sorted(ids) != [*range(len(ids))] or {*map(type, ids)} != {int}:
            raise ValueError(f"the vocabulary of {len(ids)} tokens must have the ids from 0 on, each once")
        self.vocab_size, self.eos_id = (
            len(ids),
            next((self.vocab[token] for token in ENDS if token in self.vocab), None),
        )
        self._ranks = {}  # (left id, right id) -> (rank, id of the two joined)
        for rank, merge in enumerate(model["merges"]):  # a merge is ["a", "b"], or "a b" in older files
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            self._ranks[own[a], own[b]] = rank, own[a + b]
        self._whole = own if flag(model, "ignore_merges", False) else {}
        self._bytes, byte_of = [], {token: b for b, token in enumerate(self._alphabet)}  # _bytes: of each id
        for token in self.tokens:
            parts = [byte_of.get(part) for part in token]
            self._bytes.append(token.encode() if token in contents or None in parts else bytes(parts))
        forms = [step["type"] for step in steps(tree.get("normalizer"), "normalizers")]
        if not {*forms} <= {"NFC", "NFD", "NFKC", "NFKD"}:
            raise ValueError(f"the normalizer {forms}; supported: NFC, NFD, NFKC, NFKD")
        self._normalize = lambda text: functools.reduce(lambda t, form: unicodedata.normalize(form, t), forms, text)
        cutters = steps(tree.get("pre_tokenizer"), "pretokenizers")
        if [step["type"] == "ByteLevel" for step in cutters] != [False] * (len(cutters) - 1) + [True]:
            raise ValueError(f"the pre_tokenizer is {[s['type'] for s in cutters]}, wanted one ByteLevel, at the end")
        self._cutters = [cut_step(step) for step in cutters]

        # In two passes as in `tokenizers`, those not normalized first; in each the leftmost wins, then the longest.
        self._added = []  # (a pattern that finds them, {what it finds: the added token})
        for normalized in (False, True):
            found = {}
            for token in sorted(added, key=lambda token: not token["special"]):
                if token["normalized"] == normalized:
                    found.setdefault(self._normalize(token["content"]) if normalized else token["content"], token)
            longest_first = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
            self._added.append((re.compile(longest_first), found) if found else None)

    def __reduce__(self):  # to pickle and copy: functions inside of functions cannot be
        return PretrainedBPE, (self.tree,), {"eos_id": self.eos_id}

    def token_to_id(self, token):
        """The id of a token as spelt in tokenizer.json, or None."""
        return self.vocab.get(token)

    def id_to_token(self, i):
        """The token of an id as spelt in tokenizer.json, or None."""
        return self.tokens[i] if 0 <= i < len(self.tokens) else None

    def _spell(self, word):
        """The ids of one word, from its bytes up, as in Tokenizer._spell of minimal/tokenizer.py."""
        data = word.encode()
        whole = self._whole and self._whole.get("".join(map(self._alphabet.__getitem__, data)))
        ids = [whole] if isinstance(whole, int) else [i for b in data if (i := self._byte_ids[b]) is not None]  # (N,)
        ranks, size = self._ranks, len(ids)
        # An entry is rank * N + position: one integer compares faster than a pair.
        heap = [ranks[pair][0] * size + i for i, pair in enumerate(itertools.pairwise(ids)) if pair in ranks]
        heapq.heapify(heap)
        # A doubly linked list. The None at N is also at -1, so it ends both sides: no pair with a None has a rank.
        ids, before, after = [*ids, None], [*range(-1, size)], [*range(1, size + 1), 0]
        while heap:
            rank, i = divmod(heapq.heappop(heap), size)
            j = after[i]
            found = ranks.get((ids[i], ids[j]))
            if found is None or found[0] != rank:
                continue  # one of the two has been joined to another since this entry was made
            ids[i], ids[j] = found[1], None
            after[i] = after[j]
            before[after[i]] = i
            for k in (before[i], i):
                if (pair := (ids[k], ids[after[k]])) in ranks:
                    heapq.heappush(heap, ranks[pair][0] * size + k)
        ids = tuple(i for i in ids if i is not None)
        if len(word) <= 64 and len(self._cache) < 1 << 18:  # tens of MB; the frequent words come first
            self._cache[word] = ids
        return ids

    def _cut_out(self, text, normalized, special):
        """Yields the added tokens of one pass as ids, and as str what lies between them."""
        last, (pattern, found) = 0, self._added[normalized] or (None, None)
        for match in pattern.finditer(text) if pattern else ():
            token, (start, end) = found[match[0]], match.span()
            within_word = is_word(text[start - 1 : start]) or is_word(text[end : end + 1])
            if (token["special"] and not special) or (token["single_word"] and within_word):
                continue
            if token["lstrip"]:  # what the token before has stripped is white space, and may be the whole of this one
                start = max(last, start - SPACES.match(text[last:start][::-1]).end())
            if token["rstrip"]:
                end = SPACES.match(text, max(last, end)).end()
            yield from [text[last:start]] if last < start else []
            yield from [self.vocab[token["content"]]] if start < end else []
            last = end
        yield from [text[last:]] if last < len(text) else []

    def encode(self, text, special=False):
        """text -> list of ids. Nothing is added at either end.

        special=False (the safe default for text that others wrote): "<|im_end|>" in the text is plain text.
        special=True: it becomes its id, as the `tokenizers` library does. Added tokens that are not special do so in
        both. Raises ValueError for a lone surrogate, with its position.
        """
        check_text(text, "text")
        pieces = []  # ids, and text that has no added token
        for piece in self._cut_out(text, False, special):
            pieces += [piece] if isinstance(piece, int) else self._cut_out(self._normalize(piece), True, special)
        ids = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                continue
            words = [piece]
            for cut in self._cutters:
                words = [part for word in words for part in cut(word)]
            for word in words:
                ids += self._cache.get(word) or self._spell(word)
        return ids

    def decode_bytes(self, ids):
        """ids (any iterable of integers) -> bytes; join these in streaming, where a character can span tokens."""
        ids = list(map(operator.index, ids))
        if ids and not 0 <= min(ids) <= max(ids) < len(self._bytes):
            wrong = next(i for i in ids if not 0 <= i < len(self._bytes))
            raise ValueError(f"ids must be 0 or more and below the vocabulary's size {len(self._bytes)}, got {wrong}")
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids):
        """ids -> text, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write the tree to tokenizer.json in the folder `path` (made if missing), or to `path` if it ends in .json."""
        file = path if (path := pathlib.Path(path)).suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_name(file.name + ".tmp")
        written.write_text(json.dumps(self.tree, ensure_ascii=False), encoding="utf-8")
        os.replace(written, file)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json (of its folder, or by name); its truncation and padding are left aside."""
        file = path if (path := pathlib.Path(path)).suffix == ".json" else path / "tokenizer.json"
        return cls(file.read_bytes(), file)


if __name__ == "__main__":
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
    vocab = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    added = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    smollm = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, gpt2]}
    tree = {"model": {"vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges}, "decoder": gpt2}
    tree |= {"normalizer": {"type": "NFC"}, "added_tokens": [added | {"id": len(vocab), "content": "<|im_end|>"}]}
    cutters = {"SmolLM2": smollm, "GPT-2": gpt2}
    for text, name in itertools.product(("hello hello 12", "cafe\u0301", "hello<|im_end|>"), cutters):
        tokenizer = PretrainedBPE(tree | {"pre_tokenizer": cutters[name]})
        ids = tokenizer.encode(text, special=True)
        print(f"{name:7} {ascii(text):17} -> {ids} {[tokenizer.id_to_token(i) for i in ids]}")
    print(f"without special=True the last has {len(tokenizer.encode(text))} tokens; eos_id {tokenizer.eos_id}")
