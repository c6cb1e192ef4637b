# SPDX-License-Identifier: MIT
"""How long minimal/tokenizer.py takes beside the Hugging Face `tokenizers` library (Rust), on the same documents.

    python bench/tokenizer.py                         # the standard library's source: about 11 MB of Python
    python bench/tokenizer.py --data corpus.txt       # one document
    python bench/tokenizer.py --vocab-size 32768 --repeats 5

Both run on one core, in turns, and must give the same merges and the same ids, or the script fails. Prints a table and
writes bench/tokenizer.json. Times are processor seconds, the least of the repeats; the ratio is ours over theirs, so
above 1 we are slower. Each repeat starts with new tokenizers, their caches empty; "again" encodes with the caches full.
The library encodes by its quickest call, encode_batch_fast, kept to one thread here; on n cores it gains up to n times,
and minimal/tokenizer.py nothing.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import sysconfig
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the library is imported
os.environ["RAYON_NUM_THREADS"] = "1"
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

try:
    import tokenizers as hf
except ImportError:
    sys.exit("bench/tokenizer.py needs the tokenizers library: pip install tokenizers")

from minimal.tokenizer import END, Tokenizer, word_pattern  # noqa: E402


def standard_library():
    """Documents: the modules of the running Python, without its tests and without installed packages."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    files = sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
    return [f.read_text(encoding="utf-8") for f in files]


def theirs(documents, vocab_size):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, help="a UTF-8 text file (default: the standard library's source)")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "tokenizer.json")
    args = parser.parse_args()
    documents = [args.data.read_text(encoding="utf-8")] if args.data else standard_library()
    size = sum(len(d.encode()) for d in documents)

    best = {}

    def timed(work, who, call):
        start = time.process_time()
        result = call()
        best[work, who] = min(best.get((work, who), float("inf")), time.process_time() - start)
        return result

    for _ in range(args.repeats):
        word_pattern.cache_clear()
        a = timed("train", "ours", lambda: Tokenizer.train(documents, args.vocab_size))
        b = timed("train", "theirs", lambda: theirs(documents, args.vocab_size))
        model = json.loads(b.to_str())["model"]
        assert model["vocab"] == a.vocab and [tuple(m) for m in model["merges"]] == a.merges, "the merges differ"
        b.encode_special_tokens = True  # as ours by default: the end token's spelling in a text is plain text
        for work in ("encode", "encode again"):
            ids = timed(work, "ours", lambda: [a.encode(d) for d in documents])  # noqa: B023, called at once
            same = timed(work, "theirs", lambda: [e.ids for e in b.encode_batch_fast(documents)])  # noqa: B023
            assert ids == same, "the ids differ"
        text = timed("decode", "ours", lambda: [a.decode(i) for i in ids])  # noqa: B023
        same = timed("decode", "theirs", lambda: [b.decode(i, skip_special_tokens=False) for i in ids])  # noqa: B023
        assert text == same == documents, "the texts differ"
    for work, letters in (("1 MB of one letter", "a" * 10**6), ("1 MB of spaces", " " * 10**6)):
        ids = timed(work, "ours", lambda: a.encode(letters))  # noqa: B023
        same = timed(work, "theirs", lambda: b.encode_batch_fast([letters])[0].ids)  # noqa: B023
        assert ids == same, "the ids differ"

    tokens = sum(map(len, map(a.encode, documents)))
    name = args.data.name if args.data else "the standard library"
    print(
        f"{name}: {len(documents)} documents, {size / 1e6:.2f} MB; {a.vocab_size} tokens, "
        f"{size / tokens:.2f} bytes per token; merges and ids equal\n"
        f"Python {platform.python_version()}, tokenizers {hf.__version__}, one core each, least of {args.repeats}\n"
    )
    rows = []
    print("| work | minimal, s | tokenizers, s | ratio | minimal, MB/s |\n|---|---|---|---|---|")
    for work in dict.fromkeys(work for work, _ in best):
        ours, other = best[work, "ours"], best[work, "theirs"]
        rate = (1e6 if work.startswith("1 MB") else size) / 1e6 / ours
        rows.append({"work": work, "minimal_s": ours, "tokenizers_s": other, "ratio": ours / other, "mb_per_s": rate})
        print(f"| {work} | {ours:.2f} | {other:.2f} | {ours / other:.2f} | {rate:.1f} |")
    facts = {"documents": len(documents), "bytes": size, "tokens": tokens, "vocab_size": a.vocab_size}
    facts |= {"python": platform.python_version(), "tokenizers": hf.__version__, "repeats": args.repeats}
    written = args.json.with_name(args.json.name + ".tmp")
    written.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(written, args.json)
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
