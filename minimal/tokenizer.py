# SPDX-License-Identifier: MIT
r"""Byte-level byte-pair encoding (BPE): text to ids and back without loss, in Hugging Face's `tokenizer.json`.

Papers: R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
arXiv:1508.07909, algorithm 1; A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2),
section 2.2, for bytes instead of characters and for the rule that no token crosses a word boundary.

    words     a text is cut by GPT-2's pattern into words w (" the", "'s", "2024", " +=", "\n\n"); c(w) counts them
    training  repeat: (a, b) = argmax over pairs of  sum over w of c(w) * #{i : w[i] = a, w[i+1] = b}
              ab becomes a new symbol and replaces a, b everywhere; the order of the merges is their rank
    encoding  in each word, while some neighbours have a rank: join the pair of lowest rank, the leftmost first

Departures from the papers, and why:
- No end-of-word mark: GPT-2's words carry the space before them, so joining the tokens gives the text back.
- Ties go to the pair with the smaller ids (a, then b), and a pair seen once is never merged: the same merges and ids
  as the `tokenizers` library's BpeTrainer(min_frequency=2, initial_alphabet=ByteLevel.alphabet()).
- A merge that would spell a special token is passed over, so that plain text never encodes to one.
- kind="bytes" is BPE without merges. kind="char" has a token per character seen; others are spelt in bytes (<0xE2>).

Limit: GPT-2's pattern asks what a letter is. Python answers from its own Unicode tables (3.10: version 13.0, 3.13:
15.1), `tokenizers` from newer ones. A character that your Python calls unassigned may be cut differently (never lost).

    tokenizer = Tokenizer.train(documents, vocab_size=8192)          # documents: an iterable of str
    ids = tokenizer.encode("Hello, world") + [tokenizer.eos_id]      # encode adds nothing by itself
    tokenizer.save("out"); text = Tokenizer.load("out").decode(ids)

Letters: V vocabulary size, N symbols of a word. A word is encoded in O(N log N).
"""

import collections
import functools
import heapq
import itertools
import json
import operator
import os
import pathlib
import re
import unicodedata

END = "<|endoftext|>"


@functools.cache
def word_pattern():
    r"""GPT-2's pattern `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` for `re`.

    `re` lacks \p, but its \w is L, N and _, and its \d is the part Nd of N, so spelling out Nl and No is enough.
    Python's \s has four control characters that Unicode's White_Space lacks. Built at the first use, in about 20 ms.
    """
    codes = [c for c in range(0x20000) if unicodedata.category(chr(c)) in ("Nl", "No")]
    runs = [[c for _, c in run] for _, run in itertools.groupby(enumerate(codes), lambda ic: ic[1] - ic[0])]
    other = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)  # as ranges: `re` is slow on a list of 1,100
    letters, numbers = rf"[^\W\d_{other}]", rf"[\d{other}]"
    rest = r"(?:[^\w\s]+|[_\x1c-\x1f]+)"  # [^\s\p{L}\p{N}]+ in two disjoint parts: \w has _, \s has \x1c-\x1f
    space, no_space = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
    # a run of spaces leaves its last one to the word that follows
    return re.compile(rf"'(?:[stmd]|re|ve|ll)| ?{letters}+| ?{numbers}+| ?{rest}+|{space}+(?!{no_space})|{space}+")


def byte_alphabet():
    """GPT-2's 256 printable stand-ins, byte -> character: `!` to `~` stay, a space is `Ġ`, a newline `Ċ`."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return [chr(b) if b in shown else chr(next(spare)) for b in range(256)]


BYTE_TOKENS = {"bpe": byte_alphabet(), "bytes": byte_alphabet(), "char": [f"<0x{b:02X}>" for b in range(256)]}


def check_text(text, name):
    """TypeError unless `text` is a str; ValueError naming the place of a lone surrogate, which UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{name} must hold no lone surrogate, got {text[e.start]!a} at position {e.start}") from None


def learn_merges(words, vocab, limit, reserved):
    """Algorithm 1 of Sennrich et al. with counts kept up to date instead of taken again.

    words: {tuple of ids: how often it occurs}; vocab: {token: id}, grown in place to `limit` tokens at most, with none
    of `reserved`. Returns the merges [(left, right), ...] as tokens, in the order learnt. All words lie in one doubly
    linked list, split by -1, so that a merge costs what it changes, however long the words are.
    """
    names = sorted(vocab, key=vocab.get)
    symbol, weight = [-1], [0]
    for word, count in words.items():
        symbol += (*word, -1)
        weight += itertools.repeat(count, len(word) + 1)
    before, after = list(range(-1, len(symbol) - 1)), list(range(1, len(symbol) + 1))
    counts, places = collections.defaultdict(int), collections.defaultdict(list)
    for i, pair in enumerate(itertools.pairwise(symbol)):
        if min(pair) >= 0:
            counts[pair] += weight[i]
            places[pair].append(i)

    merges = []
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(vocab) < limit:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # counts fall without notice to the heap: put right when met
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:
            break
        a, b = pair
        token, new = names[a] + names[b], len(names)
        if token in reserved:
            continue
        # No earlier merge can have made this token: tokens only grow, so its two ends have been borders from the start,
        # and between two borders the same text is always merged in the same way.
        names.append(token)
        vocab[token] = new
        merges.append((names[a], names[b]))

        change = collections.defaultdict(int)
        for i in places.pop(pair):  # left to right, so that aaa becomes aa a
            j = after[i]
            if symbol[i] != a or symbol[j] != b:
                continue  # an earlier merge took one of the two
            left, right, n = before[i], after[j], weight[i]
            if symbol[left] >= 0:
                change[symbol[left], a] -= n
                change[symbol[left], new] += n
                places[symbol[left], new].append(left)
            if symbol[right] >= 0:
                change[b, symbol[right]] -= n
                change[new, symbol[right]] += n
                places[new, symbol[right]].append(i)
            symbol[i], symbol[j] = new, -2
            after[i], before[right] = right, i
        for other, n in change.items():
            counts[other] += n
            if n > 0:
                heapq.heappush(heap, (-counts[other], other))
    return merges


def what_differs(tree):
    """The first part of a parsed tokenizer.json that this file would encode or decode differently, or None."""
    model, char = tree["model"], tree["model"].get("byte_fallback", False)
    cutter, decoder = tree.get("pre_tokenizer") or {}, tree.get("decoder") or {}
    facts = [
        ("model", model.get("type", "BPE"), ["BPE"]),  # old files do not name it
        ("normalizer", (tree.get("normalizer") or {}).get("type"), [None]),
        ("pre_tokenizer", cutter.get("type"), [None] if char else ["ByteLevel"]),
        ("use_regex", cutter.get("use_regex", True), [True]),
        ("post_processor", (tree.get("post_processor") or {}).get("type"), [None, "ByteLevel"]),  # moves offsets only
        ("decoder", decoder.get("decoders", [decoder])[0].get("type"), ["ByteFallback" if char else "ByteLevel"]),
        ("byte_fallback with merges", bool(char and model["merges"]), [False]),
    ]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "add_prefix_space")
    facts += [(name, (model | cutter).get(name) or None, [None]) for name in options]
    for token, flag in itertools.product(tree.get("added_tokens", []), ("single_word", "lstrip", "rstrip")):
        facts.append((f"added token {token['content']!r} with {flag}", token[flag], [False]))
    return next((f"{name} {value!r}" for name, value, wanted in facts if value not in wanted), None)


class Tokenizer:
    """A vocabulary {token: id} of V tokens with ids 0..V-1, and merges [(left, right), ...] in order of rank.

    Tokens are spelt as in tokenizer.json: bytes by their stand-ins (" the" is "Ġthe"), special tokens as they are.
    added: the added_tokens of that file, which are cut out of a text before its words are.
    Also: vocab_size, and eos_id, the id of <|endoftext|> (None where the vocabulary has no such token).
    """

    def __init__(self, vocab, merges, added, kind):
        self.vocab, self.merges = {t: operator.index(i) for t, i in vocab.items()}, [tuple(m) for m in merges]
        self.added, self.kind, self.tokens = added, kind, sorted(self.vocab, key=self.vocab.get)
        if sorted(self.vocab.values()) != list(range(len(self.tokens))):
            raise ValueError(f"vocab must have the ids 0 to {len(self.tokens) - 1}, each once, got others")
        self.vocab_size, self.eos_id = len(self.tokens), self.vocab.get(END)
        self._byte_ids = [self.vocab.get(token) for token in BYTE_TOKENS[kind]]
        byte_of = {token: b for b, token in enumerate(BYTE_TOKENS[kind])}
        names, self._bytes = {token["content"] for token in added}, []  # _bytes: id -> the bytes that it stands for
        for token in self.tokens:
            parts = [byte_of.get(part) for part in ([token] if kind == "char" else token)]
            self._bytes.append(token.encode() if token in names or None in parts else bytes(parts))
        self._ranks = {}  # (left id, right id) -> (rank, id of the two joined)
        for rank, (a, b) in enumerate(self.merges):
            self._ranks[self.vocab[a], self.vocab[b]] = rank, self.vocab[a + b]
        # In two passes as in `tokenizers`, those not normalized first; in each the leftmost wins, then the longest.
        self._added = {False: [], True: []}
        for special, normalized in itertools.product((False, True), repeat=2):
            found = [t["content"] for t in added if t["special"] <= special and t["normalized"] == normalized]
            if found:
                longest_first = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
                self._added[special].append(re.compile(f"({longest_first})"))
        self._cache = {}  # word -> its ids: a corpus repeats few words often

    @classmethod
    def train(cls, texts, vocab_size, kind="bpe", special_tokens=(END,)):
        """A tokenizer of at most vocab_size tokens: the special ones, 256 bytes, then what the texts teach.

        texts: an iterable of str, one per document; no word spans two. kind: "bpe", "bytes" or "char" (the most
        frequent characters, ties to the smaller code point). Fewer tokens come out where no pair is left that occurs
        twice. Raises ValueError for a vocab_size that cannot hold the special tokens and the bytes.
        """
        if kind not in BYTE_TOKENS:
            raise ValueError(f"kind must be one of {', '.join(BYTE_TOKENS)}, got {kind!r}")
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, one per document, got one str: pass [text]")
        vocab = {}
        for token in (*special_tokens, *sorted(BYTE_TOKENS[kind])):
            check_text(token, "special_tokens")
            if token in vocab or (len(token) < 2 and token not in BYTE_TOKENS[kind]):
                raise ValueError(f"special_tokens must be distinct, longer than a character and no byte, got {token!r}")
            vocab[token] = len(vocab)
        if vocab_size < len(vocab):
            raise ValueError(f"vocab_size must be at least {len(vocab)} (special tokens and bytes), got {vocab_size}")
        counts, merges = collections.Counter(), []
        for text in texts if kind != "bytes" else ():
            check_text(text, "each of texts")
            counts.update(text if kind == "char" else word_pattern().findall(text))
        if kind == "char":
            kept = sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - len(vocab)]
            vocab.update((c, i) for i, c in enumerate(sorted(kept), len(vocab)))
        elif kind == "bpe":
            words = {tuple(vocab[BYTE_TOKENS[kind][b]] for b in word.encode()): n for word, n in counts.items()}
            merges = learn_merges(words, vocab, vocab_size, set(special_tokens))
        flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
        return cls(vocab, merges, [{"id": vocab[token], "content": token} | flags for token in special_tokens], kind)

    def token_to_id(self, token):
        """The id of a token as spelt in tokenizer.json, or None."""
        return self.vocab.get(token)

    def id_to_token(self, i):
        """The token of an id as spelt in tokenizer.json, or None."""
        return self.tokens[i] if 0 <= i < len(self.tokens) else None

    def _spell(self, word):
        """The ids of one word, from its bytes up: join the neighbours of lowest rank, the leftmost first."""
        known = self.kind == "char" and word in self.vocab
        ids = [self.vocab[word]] if known else [self._byte_ids[b] for b in word.encode()]  # (N,)
        if None in ids:
            byte = word.encode()[ids.index(None)]
            raise ValueError(f"text has byte 0x{byte:02X} in {word[:20]!r}, for which this vocabulary has no token")
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

    def encode(self, text, special=False):
        """text -> list of ids. Nothing is added at either end.

        special=False (the safe default for text that others wrote): "<|endoftext|>" in the text is plain text.
        special=True: special tokens in the text become their ids, as the `tokenizers` library always does.
        Raises ValueError for a lone surrogate, with its position.
        """
        check_text(text, "text")
        pieces = [text]  # plain text at even places, added tokens at odd ones
        for pattern in self._added[bool(special)]:
            pieces = [p for k, piece in enumerate(pieces) for p in ([piece] if k % 2 else pattern.split(piece))]
        ids = []
        for k, piece in enumerate(pieces):
            if k % 2:
                ids.append(self.vocab[piece])
            else:
                for word in piece if self.kind == "char" else word_pattern().findall(piece):
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
        """Write tokenizer.json into the folder `path` (made if missing), or to `path` itself if it ends in .json."""
        file = path if (path := pathlib.Path(path)).suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        fallback = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        char = self.kind == "char"
        model = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": char}
        model |= {"vocab": {token: i for i, token in enumerate(self.tokens)}, "merges": self.merges}
        tree = {"version": "1.0", "added_tokens": self.added, "normalizer": None, "post_processor": None}
        tree |= {"pre_tokenizer": None if char else byte_level, "decoder": fallback if char else byte_level}
        written = file.with_name(file.name + ".tmp")
        written.write_text(json.dumps(tree | {"model": model}, ensure_ascii=False), encoding="utf-8")
        os.replace(written, file)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote, or a byte-level BPE (GPT-2's kind) written by Hugging Face `tokenizers`.

        Truncation and padding in the file belong to a call and are left aside. Raises ValueError, one line with the
        file's name, for a damaged file and for every kind of tokenizer that would be encoded differently here.
        """
        file = path if (path := pathlib.Path(path)).suffix == ".json" else path / "tokenizer.json"
        try:
            tree = json.loads(file.read_bytes())
            difference = what_differs(tree)
            if difference is None:
                model, vocab, added = tree["model"], {**tree["model"]["vocab"]}, tree.get("added_tokens", [])
                for token in added:
                    if not token["content"] or vocab.setdefault(token["content"], token["id"]) != token["id"]:
                        raise ValueError(f"the added token {token['content']!r} is empty or has two ids")
                # a merge is ["a", "b"], or "a b" in older files, which may begin with a line for the version
                merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"] if m[:8] != "#version"]
                return cls(vocab, merges, added, "char" if model.get("byte_fallback") else "bpe" if merges else "bytes")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise ValueError(f"{file} is damaged, or no tokenizer.json ({what:.200})") from None
        raise ValueError(f"{file} has {difference}; supported: byte-level BPE as GPT-2's, or a file saved here")


if __name__ == "__main__":
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    for kind in ("bytes", "char", "bpe"):
        tokenizer = Tokenizer.train([text], vocab_size=1024, kind=kind)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        print(f"{kind:5}  {tokenizer.vocab_size:4} tokens, {len(text.encode()) / len(ids):.2f} bytes per token here")
    print("first merges:", ", ".join("+".join(pair) for pair in tokenizer.merges[:12]), " (Ġ: a space, Ċ: a newline)")
    for text in ("def encode(self, text):", "naïve 東京 👩\u200d🚀", f"stop{END}"):
        ids = tokenizer.encode(text)
        pieces = [tokenizer.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
        print(f"{text!r} -> {len(ids)} tokens {pieces}; back again: {tokenizer.decode(ids) == text}")
    print(f"{text!r} with special=True ends in id {tokenizer.encode(text, special=True)[-1]}, {END}")
