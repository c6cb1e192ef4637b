# SPDX-License-Identifier: MIT
r"""WordPiece, BERT's tokenizer: text is cleaned, cut into words, and each word spelt by the longest tokens that fit.

Papers: M. Schuster, K. Nakajima, "Japanese and Korean Voice Search", ICASSP 2012; Y. Wu et al., 2016, arXiv:1609.08144,
section 4.1; J. Devlin et al., 2018, arXiv:1810.04805 (BERT), whose code has the cleaning; X. Song et al., 2020,
arXiv:2012.15524, for the rule of spelling as below, and for a linear algorithm.

    clean   drop control characters; white space becomes " "; a space on both sides of each Chinese character
    strip   NFD, then drop the accents (the marks of category Mn); lower: each character by itself
    cut     at white space, and on both sides of each character of punctuation
    spell   a word w: s = 0; while s < |w|: take the longest w[s:e] in V if s = 0, else the longest with ##w[s:e] in V,
            s = e. If there is none, or |w| > 100, then the whole word is the one token [UNK]

Departures from the papers, and why:
- No training: a vocabulary comes with its model. No linear algorithm: a word is spelt once and then remembered.
- What a control character, mark or punctuation is comes from Unicode 8, and NFD from 9, as in the `tokenizers` library
  that BERT is used with. Python's tables are newer: what they have more is listed, so that the ids are the library's.

Limit: lower(), and single_word of added tokens, ask the running Python's tables (3.10: Unicode 13, 3.13: 15.1), and the
library newer ones. A capital letter that your Python calls unassigned stays as it is.

    tokenizer = WordPiece.load("all-MiniLM-L6-v2")           # a folder with tokenizer.json, or with an old vocab.txt
    ids = [tokenizer.token_to_id("[CLS]"), *tokenizer.encode("Hello, world"), tokenizer.token_to_id("[SEP]")]
    tokenizer.decode(ids)                                    # "[CLS] hello, world [SEP]": what was cleaned is gone

Letters: V vocabulary, w a word of |w| characters.
"""

import json
import operator
import os
import pathlib
import re
import unicodedata


def character_class(ranges):
    """The regular expression for one character of these ranges: "9-D 20" (hexadecimal, ends included) -> [\\t-\\r ]."""
    ends = ["-".join(f"\\U{int(end, 16):08X}" for end in part.split("-")) for part in ranges.split()]
    return re.compile(f"([{''.join(ends)}])")


SPACE = character_class("9-D 20 85 A0 1680 2000-200A 2028-2029 202F 205F 3000")  # Python's \s also has 1C-1F
# Cc, Cf and Co of Unicode 8, and U+FFFD; BERT counts \t, \n and \r as white space instead
CONTROL = character_class("""0-8 B-C E-1F 7F-9F AD 600-605 61C 6DD 70F 180E 200B-200F 202A-202E 2060-2064 2066-206F
    E000-F8FF FEFF FFF9-FFFB FFFD 110BD 1BCA0-1BCA3 1D173-1D17A E0001 E0020-E007F F0000-FFFFD 100000-10FFFD""")
WORD_TOO = character_class("200C-200D 24B6-24E9 1F130-1F149 1F150-1F169 1F170-1F189")
CHINESE = character_class("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B81F 2B920-2CEAF 2F800-2FA1F")
# What Unicode up to 17 has as marks (as punctuation; as changed by NFD) and Unicode 8 (8; 9) has not. To be few, ranges
# run on over whatever is no such thing in either.
NO_MARK = character_class("""7FD 897-8E1 9FE AFA-AFF B55 C04-C3C D00 D3B-D3C D81 EBA ECE 180F-1886 1ABF-1AEB 1DF6-1DFB
    A82C A8C5 A8FF A9BD 10D24-10F85 11070-11074 110C2 111C9 111CF 1123E-11241 1133B 113BB-1145E 1182F-1612F 16F4F 16FE4
    1CF00-1CF46 1E000-1E6F5 1E944-1E94A""")
NO_PUNCTUATION = character_class("""61D 9FD-A76 C77-C84 1B4E-1B4F 1B7D-1B7F 2E43-2E5D 10D6E-10F89 113D4-1145D
    11660-116B9 1183B-11FFF 12FF1-12FF2 16D6D-16FE2 1E5FF-1E95F""")
NO_NFD = character_class("""7FD 897-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AEB 1DF6-1DFA A82C 105C9-105E4 10D24-10F85 11070
    1133B 11383-113D0 1145E 11839-11A99 11D42-1612F 16D68-16FF1 1E08F-1E6F5""")


def without_mark(c):
    """c, or "" if Unicode 8 has it in category Mn; two characters have left that since."""
    return "" if unicodedata.category(c) == "Mn" and not NO_MARK.match(c) or c in "\u1734\U0001171e" else c


def spaced(c):
    """c with spaces around if it is punctuation, in Unicode 8 or as ASCII's signs are for BERT; " " for white space."""
    mark = unicodedata.category(c)[0] == "P" and not NO_PUNCTUATION.match(c) or c in "\u166d\U000111c9$+<=>^`|~"
    return " " if SPACE.match(c) else f" {c} " if mark else c


def is_word(c):
    r"""\w in the library's regular expressions: letters, marks, digits, connectors, joiners, Ⓐ and the like."""
    kind = unicodedata.category(c)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or bool(WORD_TOO.match(c))


# Same as minimal/tokenizer.py: check_text
def check_text(text, name):
    """TypeError unless `text` is a str; ValueError naming the place of a lone surrogate, which UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{name} must hold no lone surrogate, got {text[e.start]!a} at position {e.start}") from None


class Table(dict):
    """For str.translate: {code point: text}, by a rule that is asked once for each character that occurs."""

    def __init__(self, rule):
        self.rule = rule

    def __missing__(self, code):
        return self.setdefault(code, self.rule(chr(code)))


def bert_parts(vocab, **normalizer):
    """BERT's tokenizer.json without the vocabulary; normalizer: those options of its cleaning that are not uncased."""
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
    parts = {"added_tokens": [{"id": vocab[t], "content": t} | flags for t in special]}
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    parts |= {"normalizer": bert | {"lowercase": True} | normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    if {"[CLS]", "[SEP]"} <= {*special}:  # [CLS] A [SEP] for a text, [CLS] A [SEP] B [SEP] for two
        ends = {"sep": ["[SEP]", vocab["[SEP]"]], "cls": ["[CLS]", vocab["[CLS]"]]}
        parts["post_processor"] = {"type": "BertProcessing"} | ends
    parts["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    return parts | {"model": model | {"max_input_chars_per_word": 100}}


def read_vocab_txt(folder):
    """What tokenizer.json would hold, from a folder as BERT's first ones: a token per line of vocab.txt."""
    file, tokens = folder / "tokenizer_config.json", (folder / "vocab.txt").read_text(encoding="utf-8")
    vocab = {token: i for i, token in enumerate(tokens.removesuffix("\n").split("\n"))}
    config = json.loads(file.read_bytes()) if file.exists() else {}
    names = [("lowercase", "do_lower_case"), ("handle_chinese_chars", "tokenize_chinese_chars"), ("strip_accents",) * 2]
    tree = bert_parts(vocab, **{ours: config[name] for ours, name in names if name in config})
    if "added_tokens_decoder" in config:
        tree["added_tokens"] = [{"id": int(i)} | token for i, token in config["added_tokens_decoder"].items()]
    elif (folder / "added_tokens.json").exists():
        raise ValueError("added_tokens.json beside it is not supported")
    for key, usual in {"do_basic_tokenize": [True], "never_split": [None, []], "unk_token": ["[UNK]"]}.items():
        value = config.get(key, usual[0])
        if (value["content"] if isinstance(value, dict) else value) not in usual:
            raise ValueError(f"{key} {value!r} in tokenizer_config.json is not supported")
    return tree | {"model": tree["model"] | {"vocab": vocab}}


def what_differs(tree):
    """The first part of a parsed tokenizer.json that this file would encode or decode differently, or None."""
    ends = tree.get("post_processor") or {}
    facts = [
        ("version", tree.get("version", "1.0"), ["1.0"]),
        ("model", tree["model"].get("type", "WordPiece"), ["WordPiece"]),  # old files do not name it
        ("normalizer", (tree.get("normalizer") or {}).get("type"), ["BertNormalizer"]),
        ("pre_tokenizer", (tree.get("pre_tokenizer") or {}).get("type"), ["BertPreTokenizer"]),
        ("decoder", (tree.get("decoder") or {}).get("type"), [None, "WordPiece"]),
    ]
    # What acts at the ends of a text is the caller's, but the text must be there, once.
    for end in ends["processors"] if ends.get("type") == "Sequence" else [ends]:
        known = [None, "TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel"]
        facts.append(("post_processor", kind := end.get("type"), known))
        if kind == "TemplateProcessing":
            texts = [part["Sequence"]["id"] for part in end["single"] if "Sequence" in part]
            facts.append(("post_processor with the texts", texts, [["A"]]))
    return next((f"{name} {value!r}" for name, value, wanted in facts if value not in wanted), None)


class WordPiece:
    """A vocabulary {token: id} with ids 0..len-1, in which a token that goes on with a word begins with ##.

    lowercase: uncased, which also strips accents. parts: a parsed tokenizer.json in place of BERT's, lowercase then
    being what it says; its added tokens may go beyond the vocabulary, with the ids that follow.
    Also: tokens (list), vocab (with the added tokens), vocab_size, and eos_id, None: BERT separates by [SEP], it does
    not stop. Raises ValueError where ids or parts do not fit together.
    """

    def __init__(self, vocab, lowercase=True, parts=None):
        self.parts = bert_parts(vocab, lowercase=lowercase) if parts is None else parts
        self.model, self.options = self.parts["model"], {**self.parts["normalizer"]}
        self.added, self.decoder = self.parts.get("added_tokens", []), self.parts.get("decoder") or None
        if self.options.get("strip_accents") is None:
            self.options["strip_accents"] = self.options["lowercase"]
        self._pieces, self.vocab, ids = dict(vocab), dict(vocab), [*vocab.values()]
        decoder = self.decoder or {"cleanup": False, "prefix": ""}
        limit, names = self.model["max_input_chars_per_word"], "special normalized single_word lstrip rstrip".split()
        flags = [token[name] for token in self.added for name in names] + [decoder["cleanup"]]
        flags += map(self.options.get, ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"))
        for met, wanted in (
            ({*map(type, ids)} == {int} and sorted(ids) == [*range(len(ids))], "vocab must have the ids 0, 1, 2, ..."),
            (self.model["unk_token"] in vocab, f"vocab must have unk_token {self.model['unk_token']!r}"),
            (type(limit) is int and limit >= 0, "max_input_chars_per_word must be an integer of 0 or more"),
            ({*map(type, flags)} == {bool}, "options and flags must be true or false"),
            (len({token["content"] for token in self.added}) == len(self.added), "added_tokens must be distinct"),
        ):
            if not met:
                raise ValueError(f"{wanted}, got others")
        for token in self.added:
            wanted = self.vocab.setdefault(token["content"], len(self.vocab))  # as `tokenizers`, whatever the file says
            if type(token["id"]) is not int or token["id"] != wanted:
                raise ValueError(f"added token {token['content']!r} must have the id {wanted}, got {token['id']!r}")
        self.tokens, self.vocab_size, self.eos_id = sorted(self.vocab, key=self.vocab.get), len(self.vocab), None
        check_text("".join([*self.tokens, self.model["continuing_subword_prefix"], decoder["prefix"]]), "vocab")
        self._clean, self._strip, self._cut = map(Table, (self._cleaned, without_mark, spaced))
        self._longest, self._cache = max(map(len, vocab)), {}  # word -> its ids: a corpus repeats few words often
        # Those not normalized are searched for in the text, the others in what is cleaned of the rest; in both, the
        # leftmost wins, then the longest.
        self._searches, self._shown = [], [*self.tokens]  # _shown: as decode writes them
        for normalized in (False, True):
            found = {}
            for token in (token for token in self.added if token["normalized"] == normalized):
                spelt = self.normalize(token["content"]) if normalized else token["content"]
                if not spelt or spelt in found:  # of two, `tokenizers` takes now the one, now the other
                    raise ValueError(f"added token {token['content']!r} must be cleaned to text of its own")
                found[spelt], self._shown[token["id"]] = token, spelt
            longest_first = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
            self._searches.append((re.compile(longest_first), found))

    def token_to_id(self, token):
        """The id of a token as spelt in the vocabulary, or None."""
        return self.vocab.get(token)

    def id_to_token(self, i):
        """The token of an id as spelt in the vocabulary, or None."""
        return self.tokens[i] if 0 <= i < len(self.tokens) else None

    def _cleaned(self, c):
        if self.options["clean_text"]:
            c = "" if CONTROL.match(c) else SPACE.sub(" ", c)
        return CHINESE.sub(r" \1 ", c) if self.options["handle_chinese_chars"] else c

    def normalize(self, text):
        """text -> the cleaned text, in which words are looked for."""
        text = text.translate(self._clean)
        if self.options["strip_accents"]:
            # A character that the old tables lack is in one piece, and no mark is moved over it.
            parts = [p if k % 2 else unicodedata.normalize("NFD", p) for k, p in enumerate(NO_NFD.split(text))]
            text = "".join(parts).translate(self._strip)
        # str.lower() has one rule that looks around: a sigma at the end of a word
        return text.replace("\u03a3", "\u03c3").lower() if self.options["lowercase"] else text

    def _search(self, text, normalized, special):
        """text -> a list of str and, for the added tokens found in it, int."""
        pattern, found = self._searches[normalized]
        out, done = [], 0
        for match in pattern.finditer(text) if found else ():
            token, (start, stop) = found[match[0]], match.span()
            if token["special"] and not special:
                continue
            if token["single_word"] and any(map(is_word, text[max(start - 1, 0) : start] + text[stop : stop + 1])):
                continue
            while token["lstrip"] and start > done and SPACE.match(text[start - 1]):
                start -= 1
            # what the token before has stripped is white space, and may be the whole of this one
            start = max(start, done) if token["lstrip"] else start
            stop = max(stop, done) if token["rstrip"] else stop
            while token["rstrip"] and stop < len(text) and SPACE.match(text[stop]):
                stop += 1
            out += [text[done:start], token["id"]] if start < stop else [text[done:start]]
            done = stop
        return [*out, text[done:]]

    def _spell(self, word):
        """The ids of one word: the longest token that it begins with, then the longest of the rest, and so on."""
        ids, start = [], 0
        while start < len(word) <= self.model["max_input_chars_per_word"]:
            prefix = self.model["continuing_subword_prefix"] if start else ""
            for stop in range(min(len(word), start + self._longest), start, -1):
                if (found := self._pieces.get(prefix + word[start:stop])) is not None:
                    break
            else:
                break
            ids.append(found)
            start = stop
        if start < len(word):
            ids = [self._pieces[self.model["unk_token"]]]  # not only for the part that has no token
        if len(word) <= 64 and len(self._cache) < 1 << 18:  # tens of MB; the frequent words come first
            self._cache[word] = ids
        return ids

    def encode(self, text, special=False):
        """text -> list of ids. Nothing is added at either end: [CLS] and [SEP] are the caller's.

        special=False (the safe default for text that others wrote): "[SEP]" in the text is plain text.
        special=True: it becomes its id, as in the `tokenizers` library. Added tokens that are not special always do.
        Raises ValueError for a lone surrogate, with its position.
        """
        check_text(text, "text")
        ids = []
        for piece in self._search(text, False, special):
            for part in [piece] if isinstance(piece, int) else self._search(self.normalize(piece), True, special):
                words = [] if isinstance(part, int) else part.translate(self._cut).split(" ")
                ids += [part] if isinstance(part, int) else []
                for word in filter(None, words):
                    ids += self._cache.get(word) or self._spell(word)
        return ids

    def decode(self, ids):
        """ids (any iterable of integers) -> text, special tokens included: spaces but before ##, and fewer at . , ' ?

        As the library's decoder does it, token by token; without a decoder, a space between any two. This is not the
        text that was encoded: its case, accents and spaces are lost. Raises ValueError for an id beyond the vocabulary.
        """
        ids = list(map(operator.index, ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"ids must be 0 or more and below the vocabulary's size {self.vocab_size}, got {wrong}")
        tokens = [self._shown[i] for i in ids]
        if self.decoder is None:
            return " ".join(tokens)
        prefix = self.decoder["prefix"]
        tokens[1:] = [t[len(prefix) :] if t.startswith(prefix) else f" {t}" for t in tokens[1:]]
        tight = [(f" {sign}", sign) for sign in (".", "?", "!", ",")] + [(" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
        tight += [(" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]
        for old, new in tight if self.decoder["cleanup"] else ():
            tokens = [t.replace(old, new) for t in tokens]
        return "".join(tokens)

    def decode_bytes(self, ids):
        """decode's text in UTF-8. A token's spaces depend on its place: decode a whole list, not piece by piece."""
        return self.decode(ids).encode()

    def save(self, path):
        """Write tokenizer.json into the folder `path` (made if missing), or to `path` itself if it ends in .json."""
        file = path if (path := pathlib.Path(path)).suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        tree = {"version": "1.0"} | self.parts | {"model": self.model | {"vocab": self._pieces}}
        written = file.with_name(file.name + ".tmp")
        written.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        os.replace(written, file)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json (`path` itself or in the folder `path`), or the vocab.txt of a folder without one.

        Truncation and padding in the file belong to a call and are left aside; its other parts are kept for `save`.
        Beside vocab.txt, tokenizer_config.json says whether it is cased; without that it is not. Raises ValueError, one
        line with the file's name, for a damaged file and for what would be encoded differently here.
        """
        file = path if (path := pathlib.Path(path)).suffix == ".json" else path / "tokenizer.json"
        try:
            if not file.exists() and (path / "vocab.txt").exists():
                file = path / "vocab.txt"
            tree = json.loads(file.read_bytes()) if file.suffix == ".json" else read_vocab_txt(path)
            json.dumps(tree, ensure_ascii=False).encode()  # for its error: half of a character somewhere
            if (difference := what_differs(tree)) is None:
                parts = {key: tree[key] for key in tree if key not in ("truncation", "padding")}
                return cls(tree["model"]["vocab"], parts=parts)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise ValueError(f"{file} is damaged, or no tokenizer ({what:.200})") from None
        raise ValueError(f"{file} has {difference:.200}; supported: WordPiece as BERT's")


if __name__ == "__main__":
    import collections

    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    words = [word for word, n in collections.Counter(re.findall("[a-z]+", text)).items() if n > 1]
    signs = sorted({c for c in text.lower() if c.isascii() and c.isprintable()} - {" "})
    pieces = ["##ed", "##ing", "##ize", *(f"##{c}" for c in signs if c.isalnum())]
    names = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *pieces, *words])
    tokenizer = WordPiece({name: i for i, name in enumerate(names)})
    ids = tokenizer.encode(text)
    print(f"{len(names)} tokens; this file is {len(text)} characters, {len(ids)} tokens, {ids.count(1)} of them [UNK]")
    for text in ("Tokenized words, token by token", "NA\u00cfVE  cafe\u0301!", "\u6771\u4eac a\u200bb", "[SEP]"):
        ids = tokenizer.encode(text)
        print(f"{text!r} -> {[tokenizer.tokens[i] for i in ids]} -> {tokenizer.decode(ids)!r}")
