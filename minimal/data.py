# SPDX-License-Identifier: MIT
"""From raw text to batches: read, clean, remove duplicates, split, pack into blocks of tokens, draw in a seeded order.

Near-duplicates are found with MinHash (Broder, "On the resemblance and containment of documents", 1997), as in Lee et
al. ("Deduplicating training data makes language models better", 2021, arXiv 2107.06499). With S(d) the set of word
5-grams of a document d, and h_1 .. h_K random orderings of all 5-grams,

    J(a, b) = |S(a) & S(b)| / |S(a) | S(b)|             resemblance (Jaccard similarity)
    P[min h_k(S(a)) = min h_k(S(b))] = J(a, b)          so the share of equal minima estimates J, +- sqrt(J (1 - J) / K)
    P[some band equal] = 1 - (1 - J^r)^b                K minima cut into b bands of r rows nominate candidates

Departures: J itself, computed on the sets, decides each candidate, so nothing is removed by chance (the paper: an edit
distance). K = 128, and r is the largest that misses a pair at the threshold with P < 0.001 (r = 5, b = 25 at 0.8; the
paper: r = 450, b = 20). A document falls when it resembles an earlier kept one (the paper: connected components, which
chain). Passages repeated in documents that differ otherwise stay. Blocks run across documents, as GPT-2's did.

    documents = [d._replace(text=clean(d.text)) for d in read_documents("corpus/")]
    train, val = split(deduplicate(documents))
    write_tokens("train.npy", (tokenizer.encode(d.text) + [tokenizer.eos_id] for d in train), tokenizer.vocab_size)
    ids = TokenBlocks("train.npy", seq_len=256, seed=0).batch(step=0, batch_size=8)  # (8, 257): inputs and next tokens

Shape letters: B batch, L tokens scored in a block (seq_len), N tokens or images, K minima, n shingles.
"""

import ast
import contextlib
import functools
import hashlib
import json
import mmap
import os
import re
import sysconfig
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SUFFIXES = ".jsonl .txt .md .rst .tex .html .csv .json .yaml .toml .py .c .h .cpp .cu .go .java .js .ts .rs .sh".split()
K, NGRAM = 128, 5  # minima in a signature (standard error of J: at most 0.044); words in a shingle, as in Lee et al.


class Document(NamedTuple):
    """A text, and the key that `split` hashes ("" for the text itself): those of one key fall on the same side."""
    text: str
    key: str = ""


def walk(folder: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """A folder's files at any depth, sorted (file systems are not), without hidden ones and folders named in `skip`."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        yield from (Path(here, n) for n in sorted(names) if not n.startswith(".") and Path(here, n).is_file())


def _texts(path: Path) -> Iterator[str]:
    rows, offset = path.suffix.lower() == ".jsonl", 0
    with open(path, "rb") as file:  # as bytes, to name the offset of a bad one
        for number, part in enumerate(file if rows else [file.read()], 1):
            where = f"{path}:{number}" if rows else path
            try:
                text = part.decode().removeprefix("\ufeff")
                row = json.loads(text) if rows and text.strip() else {"text": text}
            except UnicodeDecodeError as e:
                raise ValueError(f"{where}: byte {offset + e.start} of the file is not UTF-8") from None
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{where}: malformed JSON: {e}".replace(": line 1 ", " at ")) from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                what = f"the keys {sorted(row)[:9]}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ValueError(f'{where}: wanted an object with a string under "text", found {what}')
            offset += len(part)
            yield row["text"]


def read_documents(path: str | os.PathLike) -> Iterator[Document]:
    """The documents of a file (one; in a .jsonl, one per row {"text": ...}) or of a folder's files, sorted by name.

    A folder's hidden files and other suffixes than SUFFIXES are passed over, and blank documents. Raises ValueError, as
    documents are drawn: no such path, no text, not UTF-8 (with the offset), a malformed row (with the line)."""
    path, n = Path(path), 0
    if not path.exists():
        raise ValueError(f"path {str(path)!r} does not exist")
    files = [f for f in walk(path) if f.suffix.lower() in SUFFIXES] if path.is_dir() else [path]
    for n, text in enumerate((text for file in files for text in _texts(file) if text.strip()), 1):  # noqa: B007
        yield Document(text)
    if not n:
        raise ValueError(f"path {str(path)!r} holds no text in {len(files)} files ({' '.join(SUFFIXES)})")


def _stdlib() -> Iterator[tuple[str, ast.Module]]:
    """(source, syntax tree) of the standard library's files, less tests, bundled packages, and tables: files in which
    over 60 % of the lines are module-level assignments (code pages, HTML entities, topics, build settings: 2 MB)."""
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled", "pip"}
    for file in walk(Path(sysconfig.get_path("stdlib")), skip=others):
        try:
            source = file.read_bytes().decode() if file.suffix == ".py" and "config-" not in file.parent.name else ""
            tree = ast.parse(source)
        except (ValueError, SyntaxError):  # not UTF-8, or not Python of this version
            continue
        table = sum(n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)))
        if source.strip() and table <= 0.6 * (source.count("\n") + 1):
            yield source, tree


def stdlib_source() -> Iterator[Document]:
    """The Python source of the running Python's standard library (see `_stdlib`): 9 to 10 MB, without a download."""
    yield from (Document(source, key=source) for source, _ in _stdlib())


def stdlib_prose() -> Iterator[Document]:
    """English of the same installation, 2 MB: the language reference (pydoc's topics) and the docstrings of each file.

    The key of a file's docstrings is its source: what `split` validates here was not trained on as `stdlib_source`."""
    topics = {}
    with contextlib.suppress(ImportError):  # some distributions package it apart
        from pydoc_data.topics import topics
    lines = {name: set(text.split("\n")) for name, text in topics.items()}
    for name, own in sorted(lines.items()):
        # a section is printed again in its chapter: keep the chapter alone, or the split would leak
        if not any(len(o) > len(own) and len(own - o) <= 0.2 * len(own) for o in lines.values()):
            yield Document(topics[name])
    for source, tree in _stdlib():
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        docs = [ast.get_docstring(n) or "" for n in [tree] + sorted(nodes, key=lambda n: n.lineno)]
        docs = [d for d in docs if len(d.split()) >= 12]  # shorter ones are labels ("Return self."), not prose
        if docs:
            yield Document("\n\n".join(docs) + "\n", key=source)


def clean(text: str) -> str:
    """Lines end in \\n, no byte order mark, no control character but \\t and \\n, Unicode NFC. Idempotent.

    NFC unites what Unicode calls equal ("e" and a combining accent become "é") and no more; NFKC would make "x²" "x2",
    even in source code. A lone surrogate, which JSON can hold and UTF-8 cannot, becomes U+FFFD."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", re.sub("\r\n?", "\n", text))
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", "", text)
    return unicodedata.normalize("NFC", text)  # last: what was removed may have stood between a letter and its accent


def shingles(text: str) -> Tensor:
    """The set S of a text's word 5-grams, as sorted 64-bit hashes, int64 (n,). A text of fewer words is one shingle."""
    found = re.findall(r"\w+", text) or [text]
    words = {w: hashlib.blake2b(w.encode("utf-8", "replace"), digest_size=8).digest() for w in set(found)}
    ids = torch.tensor([int.from_bytes(words[w], "little", signed=True) for w in found], dtype=torch.int64)
    width = min(NGRAM, len(ids))
    hashed = torch.zeros(len(ids) + 1 - width, dtype=torch.int64)  # (n,)
    for i in range(width):  # a polynomial in an odd number, so that the order of words counts; int64 wraps: modulo 2^64
        hashed = (hashed + ids[i : i + len(hashed)]) * -0x61C8864680B583EB
    return hashed.unique()


def minhash(shingles: Tensor) -> Tensor:
    """Broder's signature: the minimum of the set under each of K random orderings, int64 (n,) -> (K,)."""
    a, b = 4 * torch.randint(2**62, (2, K, 1), generator=torch.Generator().manual_seed(1997))
    least = torch.full((K,), torch.iinfo(torch.int64).max)
    for part in shingles.split(128):  # (K, 128) stays in the cache and in one thread, however long the document
        least = torch.minimum(least, ((a + 1) * part + b).amin(dim=1))  # odd a: a permutation of 64-bit numbers. (K,)
    return least


def jaccard(a: Tensor, b: Tensor) -> float:
    """J of two sets of shingles, exactly; 0 if both are empty."""
    union = len(torch.cat((a, b)).unique())
    return (len(a) + len(b) - union) / max(union, 1)


def deduplicate(documents: Iterable[Document], threshold: float = 0.8) -> list[Document]:
    """The documents in order, less those whose text equals, or resembles with J >= threshold, an earlier kept one."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    r = max((r for r in range(1, 17) if (1 - threshold**r) ** (K // r) < 0.001), default=1)
    kept, sets = [], []
    buckets: dict[tuple, list[int]] = {}  # (start of the band, its r minima) -> indices into kept
    for document in {d.text: d for d in documents}.values():  # equal texts first: that is cheap
        minima = minhash(grams := shingles(document.text)).tolist()
        bands = [(i, *minima[i : i + r]) for i in range(0, len(minima) + 1 - r, r)]
        if any(jaccard(grams, sets[i]) >= threshold for i in {i for band in bands for i in buckets.get(band, ())}):
            continue
        for band in bands:
            buckets.setdefault(band, []).append(len(kept))
        kept.append(document)
        sets.append(grams)
    return kept


def split(documents: Iterable[Document], validation: float = 0.05) -> tuple[list[Document], list[Document]]:
    """(train, val): a document is in val iff SHA-256 of its key, as a fraction of 2^256, lies below `validation`.

    So none moves when others come or go, and equal keys never straddle; but the lowest hash is in val, the highest in
    train. Exception: all keys equal, or val with over a fifth of all characters (and twice its share), as few documents
    may give. Then texts are cut, each at 1 - validation of its length, or at the start of that line if nearer than half
    of val's part; those with < 100 characters for val stay in train. If all are so short, keys that differ decide."""
    documents = list(documents)
    if not documents or not 0 < validation < 1:
        raise ValueError(f"wanted documents and 0 < validation < 1, got {len(documents)} and validation = {validation}")
    hashes = [int(hashlib.sha256((d.key or d.text).encode("utf-8", "replace")).hexdigest(), 16) for d in documents]
    bound = min(max(int(validation * 2**256), min(hashes) + 1), max(hashes))
    train, val = ([d for d, h in zip(documents, hashes, strict=True) if (h < bound) == s] for s in (False, True))
    held, longest = sum(len(d.text) for d in val), max(len(d.text) for d in documents)
    limit = max(0.2, 2 * validation) * sum(len(d.text) for d in documents)
    if min(hashes) < max(hashes) and (held <= limit or longest * validation < 100):
        return train, val
    train, val = [], []
    for text, key in documents:
        part = len(text) * validation
        at = min(max(round(len(text) - part), 1), len(text) - 1)
        line = text.rfind("\n", 0, at) + 1
        at = line if line and at - line < part / 2 else at
        whole = part < 100 and len(text) < longest
        train.append(Document(text if whole else text[:at], key))
        val += [] if whole else [Document(text[at:], key)]
    return train, val


def write_tokens(path: str | os.PathLike, token_lists: Iterable[list[int]], vocab_size: int) -> int:
    """Write lists of ids one after the other to a .npy file: (N,) little-endian uint16, uint32 if vocab_size > 65536.

    Returns N. Holds one list at a time, writes beside `path` and renames. Raises ValueError for an id out of range."""
    code, descr = ("H", "<u2") if vocab_size <= 2**16 else ("I", "<u4")
    beside, n = f"{os.fspath(path)}.tmp", 0
    with open(beside, "wb") as file:
        file.write(bytes(128))  # room for the header, which has to name N
        for number, ids in enumerate(token_lists):
            if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(f"token_lists[{number}] has ids {min(ids)} .. {max(ids)}, vocab_size is {vocab_size}")
            array(code, ids).tofile(file)
            n += len(ids)
        file.seek(0)  # numpy's format 1.0: magic, 118 (bytes to come) as uint16, a dict padded up to the data
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({n},), }}".encode()
        file.write(b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117) + b"\n")
    os.replace(beside, path)
    return n


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, blocks: int, seq_len: int) -> tuple[int, Tensor]:
    """(shift < seq_len, permutation of the blocks) of an epoch. Only the last one asked for is kept in memory."""
    key = hashlib.sha256(f"{seed} {epoch}".encode())  # seed + epoch would give seeds each other's orders
    g = torch.Generator().manual_seed(int(key.hexdigest()[:14], 16))
    return int(torch.randint(seq_len, (), generator=g)), torch.randperm(blocks, generator=g)


class TokenBlocks:
    """Blocks of L + 1 ids, int64, from a .npy file of tokens (N,) that stays on disk: it is mapped, and read as needed.

    Block i is tokens [i L, i L + L + 1): L inputs and, one to the right, L targets; neighbours share a token. There are
    (N - 1) // L. Raises ValueError for a file that is not such a .npy, is cut short, or has N < L + 1."""

    def __init__(self, path: str | os.PathLike, seq_len: int, seed: int = 0):
        header = rb"\x93NUMPY\x01\x00(..)\{'descr': '<u([24])', 'fortran_order': \w+, 'shape': \((\d+),\), \}"
        with open(path, "rb") as file:
            if not (head := re.match(header, file.read(128), re.DOTALL)):
                raise ValueError(f"path {str(path)!r} must be a .npy file of uint16 or uint32 tokens of shape (N,)")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.seq_len, self.seed, self.n = seq_len, int(seed), int(head[3])
        self._start, self._width = 10 + int.from_bytes(head[1], "little"), int(head[2])
        if len(self._map) < self._start + self.n * self._width:
            raise ValueError(f"path {str(path)!r} is cut short: {len(self._map)} bytes for {self.n} tokens")
        if not 1 < seq_len + 1 <= self.n:
            raise ValueError(f"path {str(path)!r} holds {self.n} tokens, wanted seq_len + 1 = {seq_len + 1} (> 1)")

    def _read(self, start: int) -> Tensor:
        stop = min(start + self.seq_len + 1, self.n)
        part = self._map[self._start + start * self._width : self._start + stop * self._width]
        return torch.frombuffer(bytearray(part), dtype=torch.uint16 if self._width == 2 else torch.uint32).long()

    def __len__(self) -> int:
        return (self.n - 1) // self.seq_len

    def __getitem__(self, i: int) -> Tensor:
        return self._read(range(0, self.n - self.seq_len, self.seq_len)[i])  # (L + 1,)

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Batch `step` of an endless sequence of epochs, (B, L + 1): from (seed, step, B) alone, so resuming is exact.

        An epoch takes each block once, in random order, all shifted by one random offset < L, so that tokens change
        their place in a block between epochs; the last is pulled back to the file's end. Batches straddle epochs."""
        rows = []
        for k in range(step * batch_size, (step + 1) * batch_size):
            shift, order = epoch_order(self.seed, k // len(self), len(self), self.seq_len)
            rows.append(self._read(min(shift + int(order[k % len(self)]) * self.seq_len, self.n - 1 - self.seq_len)))
        return torch.stack(rows)  # (B, L + 1)

    def sequential(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, labels), (<= B, L + 1), over the file in order: each token but the first is once a label right of
        column 0, for an exact loss. The last row is padded with id 0 and label -100. At most `limit` batches."""
        starts = range(0, self.n - 1, self.seq_len)
        for at in range(0, len(starts), batch_size)[:limit]:
            rows = [self._read(start) for start in starts[at : at + batch_size]]
            rows[-1] = torch.nn.functional.pad(rows[-1], (0, self.seq_len + 1 - len(rows[-1])), value=-100)
            labels = torch.stack(rows)  # (B, L + 1)
            yield labels.clamp(min=0), labels


def digits() -> Tensor:
    """1797 handwritten digits, float32 (N, 1, 8, 8) in [0, 1], from scikit-learn's own files: no download."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("digits() needs scikit-learn: pip install scikit-learn") from None
    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16  # (N, 1, 8, 8)


def read_images(folder: str | os.PathLike, size: int, channels: int = 1) -> Tensor:
    """A folder's images, sorted by name, cut to the middle square and resized: float32 (N, C, size, size) in [0, 1]."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("read_images() needs Pillow: pip install pillow") from None
    images, suffixes = [], (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm")
    for file in (f for f in walk(Path(folder)) if f.suffix.lower() in suffixes):
        try:
            image = ImageOps.fit(Image.open(file).convert("L" if channels == 1 else "RGB"), (size, size))
        except (OSError, ValueError, SyntaxError) as e:  # Pillow raises all three for broken files
            raise ValueError(f"{file}: not a readable image: {e}") from None
        images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, -1))
    if not images:
        raise ValueError(f"folder {str(folder)!r} holds no image ({' '.join(suffixes)})")
    return torch.stack(images).permute(0, 3, 1, 2) / 255  # (N, size, size, C) -> (N, C, size, size)


if __name__ == "__main__":
    import random
    import tempfile

    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(400)}" for _ in range(200)) + "\r\n" for _ in range(12)]
    texts += [texts[0].replace("\r\n", "\n\x00"), "\ufeff" + texts[1]]  # the same once cleaned
    for share in (0.004, 0.02, 0.1):  # near-duplicates: every word drawn anew with this probability
        texts.append(" ".join(f"w{rng.randrange(400)}" if rng.random() < share else w for w in texts[2].split()))
    documents = [Document(clean(t)) for t in texts]
    kept = deduplicate(documents)
    print(f"{len(texts)} texts, {len(set(documents))} differ once cleaned, {len(kept)} without near-duplicates")
    for i in range(14, 17):
        a, b = shingles(texts[2]), shingles(texts[i])
        estimate = (minhash(a) == minhash(b)).float().mean()
        print(f"{i} and 2: J = {jaccard(a, b):.3f}, estimate {estimate:.3f}, kept: {documents[i] in kept}")
    train, val = split(kept, validation=0.2)
    with tempfile.TemporaryDirectory() as folder:
        n = write_tokens(path := Path(folder, "train.npy"), ([*d.text.encode(), 256] for d in train), vocab_size=257)
        blocks, resumed = (TokenBlocks(path, seq_len=1000, seed=0) for _ in range(2))
        print(f"train {len(train)}, val {len(val)}; {n} tokens in {path.stat().st_size} bytes, {len(blocks)} blocks")
        print("shift and order of epochs 0 and 1:", *(epoch_order(0, e, len(blocks), 1000) for e in range(2)), sep="\n")
        run = [blocks.batch(step, batch_size=4) for step in range(9)]
        print("resumed at step 5, same to step 8:", all(torch.equal(run[s], resumed.batch(s, 4)) for s in range(5, 9)))
        print("scored:", sum(int((y[:, 1:] >= 0).sum()) for _, y in blocks.sequential(4)), "of", n - 1, "next tokens")
