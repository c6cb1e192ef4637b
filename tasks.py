# SPDX-License-Identifier: MIT
"""What train.py can learn: for each task its data, the answers of a model, their scores, and what they have to beat.

    task       model        a row                          scores                              baselines
    lm         gpt, llama,  running text                   bits per byte                       unigram
               rnn
    chat       gpt, llama   messages                       accuracy of the answers' tokens     unigram
    mlm        bert         two segments, words masked     accuracy of words and of order      unigram
    classify   bert         text, label                    accuracy, macro F1                  majority, bag of words
    tag        bert         tokens, tags                   accuracy, macro F1, entity F1       majority, usual tags
    qa         bert         question, context, answers     exact match, F1                     sentences by rules
    seq2seq    transformer  source, target                 chrF, exact match                   a constant, the source
    images     vae          a picture                      the bound on log p                  none

Data is prepared once, into the folder of the run, and read again from there: `prepare_text` and `prepare_rows` write,
`load_data` reads. What it gives has

    batch(index)               a batch as a function of its index alone, so that resuming needs nothing but the index
    validation()               the same batches at every call
    scores(model, loss_sum)    the task's scores beyond the loss; `baselines()` the same of what is to be beaten
    sample(model, folder)      a few results to look at

`s` is everywhere the Settings of train.py.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import random
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from minimal import adversarial, baselines, metrics, stdlib_tasks
from minimal import data as corpus
from minimal.chat import ChatML, default_system, read_conversations, read_row
from minimal.checkpoint import write_beside
from minimal.examples import FIELDS, check_labels, check_row, label_names, load_hub, read_examples, split
from minimal.features import answers, collate, encode, epoch_batches
from minimal.generate import stream_text
from minimal.mlm import join_pair, mask_tokens, sentence_pair
from minimal.packing import PackedRows, fit_rows
from minimal.runs import read_json, write_json
from minimal.tokenizer import END, Tokenizer
from minimal.transformer import beam_search
from minimal.vae import grid

LEARNT = ("bpe", "char", "bytes")  # kinds of --tokenizer; else it is the path of one
PREPARED, NOTE = ("train.npy", "val.npy", "tokenizer.json"), "prepared.json"  # in a run's state/, of running text
SPECIAL = (END, "[PAD]", "[CLS]", "[SEP]", "[MASK]")  # of BERT's tokenizer; the others have END alone


class Task(NamedTuple):
    """What there is to say of a task that is not code."""

    models: tuple  # that can learn it, the default first
    best: str  # the score by which the best checkpoint is known: a loss, or one of which more is better


TASKS = {
    "lm": Task(("gpt", "rnn", "llama"), "val_loss"),
    "chat": Task(("gpt", "llama"), "val_loss"),
    "mlm": Task(("bert",), "val_loss"),
    "classify": Task(("bert",), "accuracy"),
    "tag": Task(("bert",), "macro_f1"),
    "qa": Task(("bert",), "f1"),
    "seq2seq": Task(("transformer",), "chrf"),
    "images": Task(("vae",), "val_loss"),
}
LABELLED = {  # of these, the ones that are rows with answers, and for which task
    "stdlib-areas": "classify",
    "stdlib-lexical": "tag",
    "stdlib-questions": "qa",
    "stdlib-signatures": "seq2seq",
}
SOURCES = {  # data without a download: what `python train.py` learns from
    "stdlib-code": corpus.stdlib_source,
    "stdlib-prose": corpus.stdlib_prose,
    "stdlib-docs": lambda: (corpus.Document(row["text"], row["key"]) for row in stdlib_tasks.prose()),
    "stdlib-areas": stdlib_tasks.areas,
    "stdlib-lexical": stdlib_tasks.lexical,
    "stdlib-questions": stdlib_tasks.questions,
    "stdlib-signatures": stdlib_tasks.signatures,
    "digits": corpus.digits,
}
TASK_OF = {
    "gpt": "lm",
    "llama": "lm",
    "rnn": "lm",
    "bert": "mlm",
    "transformer": "seq2seq",
    "vae": "images",
}  # of a model by itself
PART = 2**28  # characters of text prepared at a time: about 2 GB of memory
EVAL_TOKENS = 32_768  # scored at each evaluation: a second or two, and a standard error of about 1 %
EVAL_WORK = 6e11  # and at most so many parameters times tokens: half a minute on two cores, where the model is large
EVAL_ROWS = 1000  # the same for labelled rows; --eval takes all
IMAGE_SIZE = 32  # pixels a side that a folder's images are brought to


# --- text -------------------------------------------------------------------------------------------------------------


def new_tokenizer(s, texts):
    if s.tokenizer in LEARNT:
        return Tokenizer.train(texts, s.vocab_size, s.tokenizer, SPECIAL if s.model == "bert" else SPECIAL[:1])
    return Tokenizer.load(s.tokenizer)


def checked(s, tokenizer):
    """The tokenizer, if it has the special tokens that the model needs."""
    needed = [token for token in SPECIAL[1:] if s.model == "bert" and tokenizer.token_to_id(token) is None]
    if s.model != "bert" and tokenizer.eos_id is None:
        needed = [END]
    if needed:
        raise ValueError(f"--tokenizer {s.tokenizer}: has no {needed[0]}, which --model {s.model} needs")
    return tokenizer


def start_ids(tokenizer):
    """What stands before every text: [the token that begins one] where the tokenizer's own file puts it there."""
    tree = getattr(tokenizer, "tree", None) or {}  # of another's tokenizer.json; ours has no such token
    parts = [tree.get("post_processor") or {}]
    parts = [inner for part in parts for inner in part.get("processors", [part])]
    first = next((p["single"][0] for p in parts if p.get("type") == "TemplateProcessing" and p.get("single")), {})
    token = first.get("SpecialToken", {}).get("id")
    return [] if token is None else [tokenizer.token_to_id(token)]


def end_id(tokenizer):
    """The id that ends a document in a file of tokens; WordPiece has none, and [PAD], which is no text, serves."""
    return tokenizer.token_to_id("[PAD]") if tokenizer.eos_id is None else tokenizer.eos_id


def prepare_text(s, folder, tokenizer):
    """Running text as token files in `folder`; returns the tokenizer, trained if new. What a run beside --out has
    prepared from the same text in the same way is taken from there."""
    started, given, how = time.perf_counter(), tokenizer, ""
    if given is None and s.tokenizer not in LEARNT:
        given = Tokenizer.load(s.tokenizer)
    mark = mark_of(s, folder, given)
    if earlier := mark and taken(s, folder, mark):
        tokenizer, how = given or Tokenizer.load(folder), f", prepared by {earlier}"
    else:
        tokenizer = cut_text(s, folder, given)
        tokenizer.save(folder)
        if mark and mark == mark_of(s, folder, given):  # else the text has changed meanwhile
            write_json(folder / NOTE, {"prepared_from": mark, "sha256": sha256_of(folder / name for name in PREPARED)})
    n_train, n_val = (len(tokens_of(folder / name)) for name in PREPARED[:2])
    print(f"data: {s.data}, {n_train:,} tokens and {n_val:,} for validation, vocabulary {tokenizer.vocab_size:,}{how}; "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return tokenizer


def sha256_of(files, *facts):
    """SHA-256 of the files' names and contents, in their order, and of the facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with open(file, "rb") as content:
            while part := content.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def mark_of(s, folder, tokenizer):
    """What tokens follow from, as a SHA-256: the text itself, the tokenizer or how to train it, this code, this Python.
    None of data of the hub, which is not in files of its own, and of a pipe, which can be read but once."""
    if s.data not in SOURCES and not (Path(s.data).is_file() or Path(s.data).is_dir()):
        return None
    if tokenizer:
        tokenizer.save(folder)
    code = [Path(__file__), *sorted(Path(corpus.__file__).parent.glob("*.py"))]
    path, skip = Path(s.data), ()
    if s.data in SOURCES:  # all come from the standard library's files, and none from these folders
        path, skip = Path(sysconfig.get_path("stdlib")), ("test", "site-packages", "dist-packages")
    text = [f for f in corpus.walk(path, skip) if f.suffix.lower() in corpus.SUFFIXES] if path.is_dir() else [path]
    facts = s.task, s.model == "bert", s.data if skip else "", sys.version, torch.__version__
    how = [folder / "tokenizer.json"] if tokenizer else []
    return sha256_of([*code, *how, *text], *facts, *([] if tokenizer else [s.tokenizer, s.vocab_size]))


def taken(s, folder, mark):
    """The folder of the run beside --out that has prepared what has this mark, now copied into `folder`, or None."""
    for note in sorted(Path(s.out).parent.glob(f"*/state/{NOTE}")):
        with contextlib.suppress(OSError, ValueError):  # another program's, or being replaced
            known = read_json(note)
            if known.get("prepared_from") == mark:
                for name in (*PREPARED, NOTE):
                    shutil.copyfile(note.with_name(name), folder / name)
                if known.get("sha256") == sha256_of(folder / name for name in PREPARED):  # else damaged
                    return note.parent.parent
    return None


def cut_text(s, folder, tokenizer):
    """Documents, cleaned, deduplicated, split, as token files in `folder`; returns the tokenizer, trained if new."""
    held_out = []
    # BERT's pretraining holds out the docstrings that its task will be judged on: not even their text was seen.
    share = 0.1 if s.data == "stdlib-docs" else 0.05
    parts = prepared(documents_of(s), share)
    part = next(parts, None)
    if part is None:
        raise ValueError(f"--data {s.data}: nothing is left of it after cleaning")
    tokenizer = checked(s, tokenizer or new_tokenizer(s, (document.text for document in part[0])))
    sep_id = tokenizer.token_to_id("[SEP]")

    def ids_of(text):
        # Each document ends with the end token, which is trained like any other: so the model learns to stop.
        if s.task == "lm":
            return [*start_ids(tokenizer), *tokenizer.encode(text), tokenizer.eos_id]
        sentences = stdlib_tasks.sentences(text)
        return [i for sentence in sentences for i in (*tokenizer.encode(sentence), sep_id)] + [end_id(tokenizer)]

    def train_rows():
        nonlocal part
        while part:
            held_out.extend(array.array("I", ids_of(document.text)) for document in part[1])
            yield from (ids_of(document.text) for document in part[0])
            part = next(parts, None)

    corpus.write_tokens(folder / "train.npy", train_rows(), tokenizer.vocab_size)
    corpus.write_tokens(folder / "val.npy", held_out, tokenizer.vocab_size)
    return tokenizer


def check_data(s):
    if s.data not in SOURCES and not s.data.startswith("hf:") and not Path(s.data).exists():
        raise ValueError(f"--data {s.data}: no such file or folder")


def check_unlabelled(data):
    """Refuses rows of text and label where the text alone would be read."""
    path = Path(data, "train.jsonl") if Path(data).is_dir() else Path(data)
    if path.suffix != ".jsonl" or not path.is_file():
        return
    try:
        row = json.loads(next((line for line in open(path, "rb") if line.strip()), b"null"))
    except ValueError:  # read_conversations says what and where
        return
    if isinstance(row, dict) and {"text", "label"} <= row.keys():
        how = "--task classify (a BERT learns the labels, with --eval any model guesses them)"
        raise ValueError(f"--data {data}: rows of text and label; wanted {how}, or --task lm for the text alone")


def documents_of(s):
    """The documents of --data: a source of our own, files, or the column "text" of a data set of the hub."""
    if s.data in SOURCES:
        return SOURCES[s.data]()
    if not s.data.startswith("hf:"):
        return corpus.read_documents(s.data)
    part = next(iter(load_hub(s.data[3:]).values()))  # "train", where there is one; a part of it validates
    if "text" not in part.column_names:
        raise ValueError(f"--data {s.data}: has the columns {', '.join(part.column_names)}; wanted text")
    return (corpus.Document(row["text"]) for row in part if row["text"])


def prepared(documents, share):
    """Yields (training documents, validation documents) part by part: a corpus need not fit into memory. Exact
    duplicates are removed from the whole, near ones from each part."""
    seen, part, size = set(), [], 0
    for document in itertools.chain(documents, [None]):
        if document:
            text = corpus.clean(document.text)
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                part.append((digest, document._replace(text=text)))
                size += len(text)
        if part and (size > PART or document is None):
            # In the order of a hash, so that the first validation rows, which are scored, come from anywhere.
            yield corpus.split(corpus.deduplicate(document for _, document in sorted(part)), share)
            part, size = [], 0


def tokens_of(path):
    """The token ids of a file that `prepare_text` wrote, mapped, not read."""
    return torch.from_numpy(numpy.load(path, mmap_mode="c"))  # (N,)


class Text:
    """lm: rows of tokens; of a .jsonl, each of whose rows is a document, those do not see each other."""

    unit = "tokens"

    def __init__(self, s, folder, tokenizer, base=None):
        self.s, self.tokenizer, self.folder = s, tokenizer, folder
        self.rows, self.alone = s.data.endswith(".jsonl") and s.model != "rnn", prompted(s, base)
        self.limit = max(1, eval_tokens(base) // (s.seq_len * s.batch_size))
        try:
            # The shorter part first: a --seq-len that suits it suits both.
            self.val, self.train = (corpus.TokenBlocks(folder / n, s.seq_len, s.seed) for n in ("val.npy", "train.npy"))
        except ValueError as error:
            if not (held := re.search(r"holds (\d+) tokens", str(error))):
                raise
            part, found = "validation" if "val.npy" in str(error) else "training", int(held[1])
            why = f"its {part} part has {found} tokens, --seq-len {s.seq_len} needs {s.seq_len + 1}; wanted more text"
            fits = f", or --seq-len {2 ** (found.bit_length() - 1 - (found.bit_count() == 1))}" if found > 8 else ""
            raise ValueError(f"--data {s.data}: too short: {why}{fits}") from None
        sizes = [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
        sizes[tokenizer.eos_id] = 0  # it stands for no byte of the text
        self.scored = torch.cat([batch["labels"][:, 1:].flatten() for batch in self.validation()])
        self.scored = self.scored[self.scored >= 0]
        self.n_bytes = int(torch.tensor(sizes)[self.scored].sum())

    def batch(self, index):
        ids = self.train.batch(index, self.s.batch_size)  # (B, T + 1)
        return self.documents(ids, ids) if self.rows else {"ids": ids}

    def validation(self):
        for ids, labels in self.val.sequential(self.s.batch_size, self.limit):
            yield self.documents(ids, labels) if self.rows else {"ids": ids, "labels": labels}

    def documents(self, ids, labels):
        """A batch with the number of each token's document; the end of one is not asked for the next one's start."""
        ends = (ids == self.tokenizer.eos_id)[:, :-1]  # (B, T)
        numbers = torch.nn.functional.pad(ends.cumsum(1), (1, 0))  # (B, T + 1)
        labels = torch.cat((labels[:, :1], labels[:, 1:].masked_fill(ends, -100)), 1)
        # A prompt stands before one text: with it documents do see each other, and the same labels count.
        return {"ids": ids, "labels": labels} | ({} if self.alone else {"documents": numbers})

    def scores(self, model, loss_sum):
        return {"bits_per_byte": metrics.bits_per_byte(loss_sum, self.n_bytes)} if self.n_bytes else {}

    def own_rows(self):
        """(where, a batch of one) of each training row: a document of a .jsonl, else what is cut from running text."""
        if not self.rows:
            yield from (("", {"ids": ids[None]}) for ids in self.train)
            return
        ids = tokens_of(self.folder / "train.npy")
        for document in ids.tensor_split((ids.int() == self.tokenizer.eos_id).nonzero().flatten() + 1)[:-1]:
            yield "", {"ids": document[None].long()}

    def baselines(self):
        ids = tokens_of(self.folder / "train.npy")[:10_000_000].int()
        if self.rows:  # what begins a document is not asked for
            ids = torch.cat((ids[:0], ids[1:][ids[:-1] != self.tokenizer.eos_id]))
        nats = baselines.unigram(ids, self.scored, self.tokenizer.vocab_size)
        return {"unigram": {"val_loss": nats / len(self.scored)} | self.scores(None, nats)}

    def sample(self, model, folder):
        return self.s.prompt + "".join(continue_text(self.s, model, self.tokenizer, self.s.prompt))


class Chats:
    """chat: conversations, packed into rows in which none sees another; batches as in Text."""

    unit = "trained tokens"

    def __init__(self, s, tokenizer, train, val, base=None, whole=False):
        """whole: all of val is scored, and not only as much as evaluations during training have time for."""
        self.s, self.tokenizer, self.val, self.format = s, tokenizer, val, chat_format(tokenizer)
        room = base and (context_of(base) or 0) - taken_by(s, base)
        limit = f"--seq-len {s.seq_len}" + (f" (the base takes up to {room:,})" if base and room > s.seq_len else "")
        features = [self.format.feature(row, s.train_on) | {"where": f" ({row['where']})"} for row in train]
        # Without training rows there is nothing to train on, but to score: --eval of a model that others trained.
        features, report = fit_rows(features, s.seq_len, limit) if train else ([], "")
        held_out, lost = fit_rows([self.format.feature(row) for row in val], s.seq_len, limit)
        ends = itertools.accumulate(len(f["ids"]) for f in held_out)  # the same rows whether they are packed or not
        bound = math.inf if whole else eval_tokens(base)
        held_out = [f for f, end in zip(held_out, ends, strict=True) if end <= bound] or held_out[:1]
        for part, what in (("training", report), ("validation", lost)):
            if what:
                print(f"note: {part}: {what}")
        how, size = dict(pad_id=pad_id(tokenizer), pack=not prompted(s, base)), s.batch_size
        if not how["pack"]:  # as many tokens a step as packed rows have
            size = max(1, size * s.seq_len * len(features) // max(1, sum(len(f["ids"]) for f in features)))
        self.rows = PackedRows(features, s.seq_len, size, s.seed, **how) if features else None
        self.right = []
        self.held_out = PackedRows(held_out, s.seq_len, s.batch_size, 0, **how)

    def batch(self, index):
        return self.rows.batch(index)

    def own_rows(self):
        """(where, a batch of one) of each training row"""
        for f in self.rows.features:
            yield f["where"], {name: torch.tensor([f[name]]) for name in ("ids", "labels")}

    def validation(self):
        return self.held_out.sequential()

    def targets(self, batches):
        """The ids that are asked for, (N,)."""
        labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
        return labels[labels != -100]

    def loss(self, model, **batch):
        """As model.loss, and notes on the way how many of the targets are the likeliest token."""
        logits, targets, _ = model.outputs(**batch)  # (N, V), (N,)
        self.right.append(int((logits.argmax(-1) == targets).sum()))
        total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total, (targets != -100).sum()

    def scores(self, model, loss_sum):
        right, self.right = sum(self.right), []
        return {"token_accuracy": right / len(self.targets(self.validation()))}

    def baselines(self):
        if not self.rows:
            return {}
        ids = torch.tensor([x for f in self.rows.features for x in f["labels"][1:] if x != -100])
        scored = self.targets(self.validation())
        usual = (scored == ids.bincount().argmax()).double().mean().item()
        nats = baselines.unigram(ids, scored, self.tokenizer.vocab_size) / len(scored)
        return {"unigram": {"val_loss": nats, "token_accuracy": usual}}

    def sample(self, model, folder):
        shown = []
        rows = [row for row in self.val if "messages" in row]
        for row in rows[:: max(1, len(rows) // 3)][:3]:
            asked, true = row["messages"][:-1], row["messages"][-1]["content"]
            said = "".join(answer(self.s, model, self.tokenizer, asked, min(self.s.new_tokens, len(true) // 2 + 16)))
            shown.append(f"{asked[-1]['content'].strip():.200}\n-> {said!r} (true: {true!r:.200})")
        return "\n".join(shown)


def chat_format(tokenizer):
    """ChatML with the system message that the model's own chat template begins with."""
    return ChatML(tokenizer, default_system(getattr(tokenizer, "chat_template", None)))


def answer(s, model, tokenizer, messages, new_tokens=None):
    """Yields the pieces of an assistant's answer to messages."""
    chat = chat_format(tokenizer)
    return drawn(s, model, tokenizer, chat.prompt(messages), new_tokens or s.new_tokens, eos_id=chat.end)


def eval_tokens(base):
    """How many tokens an evaluation scores, for a model that is as large as `base`."""
    if base is None:
        return EVAL_TOKENS
    with torch.device("meta"):  # its own size, whatever was added or quantised: so that each scores the same rows
        size = sum(p.numel() for p in type(base)(base.config).parameters())
    return min(EVAL_TOKENS, int(EVAL_WORK / size))


def prompted(s, base):
    """Whether a prompt is trained or there: it stands before one document alone, not before several in a row."""
    return s.finetune == "prompt" or hasattr(base, "prompt")


class Pairs:
    """mlm: pairs of segments, masked anew in every epoch;"""

    unit = "masked tokens"

    def __init__(self, s, folder, tokenizer):
        self.s, self.tokenizer, self.folder = s, tokenizer, folder
        self.special = torch.tensor([token in SPECIAL for token in tokenizer.tokens])  # (V,)
        self.ordinary = (~self.special).nonzero().flatten()
        self.train, self.val = (self.documents(folder / name) for name in ("train.npy", "val.npy"))
        for name, part in (("training", self.train), ("validation", self.val)):
            if len(part) < 2:
                raise ValueError(f"--data {s.data}: {len(part)} documents in its {name} part; wanted two or more, as a "
                                 "random next sentence comes from another one")  # fmt: skip
        masked = torch.cat([(batch["labels"] != -100).sum(1) for batch in self.validation()])  # (rows,)
        self.masked_per_pair = masked.double().mean().item()

    def documents(self, path):
        """[[sentence, ...], ...], each sentence a view of the file's ids"""
        ids, found = tokens_of(path), []
        for document in ids.tensor_split((ids.int() == end_id(self.tokenizer)).nonzero().flatten() + 1):
            ends = (document.int() == self.tokenizer.token_to_id("[SEP]")).nonzero().flatten().tolist()
            spans = zip([0, *(e + 1 for e in ends)], ends, strict=False)
            found.append([document[a:b] for a, b in spans if b > a])
        return [sentences for sentences in found if len(sentences) > 1]  # of one alone nothing could follow

    def rows(self, documents, indices, seed):
        """One pair from each of the documents, masked: what BERT.loss takes."""
        generator = torch.Generator().manual_seed(seed)
        cls, sep, mask = (self.tokenizer.token_to_id(token) for token in SPECIAL[2:])
        features, random_next, longest = [], [], 0
        for index in indices:
            a, b, is_random = sentence_pair(documents, index, self.s.seq_len, generator)
            features.append(join_pair(a, b, cls, sep))
            random_next.append(int(is_random))
            longest = max(longest, len(features[-1][0]))
        ids, segments, special = (
            torch.stack([torch.nn.functional.pad(x, (0, longest - len(x)), value=filling) for x in part])  # (B, T)
            for part, filling in zip(zip(*features, strict=True), (pad_id(self.tokenizer), 0, True), strict=True)
        )
        lengths = torch.tensor([len(f[0]) for f in features])
        masked, labels = mask_tokens(ids, special, len(self.special), mask, ordinary=self.ordinary, generator=generator)
        real = torch.arange(longest) < lengths[:, None]  # (B, T)
        return dict(ids=masked, segments=segments, mask=real, labels=labels, next=torch.tensor(random_next))

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def epoch(self, number):
        lengths = [min(sum(map(len, sentences)), self.s.seq_len) for sentences in self.train]
        return epoch_batches(lengths, self.s.batch_size, self.s.seed, number)

    def batch(self, index):
        per_epoch = len(self.epoch(0))
        return self.rows(self.train, self.epoch(index // per_epoch)[index % per_epoch], seed_of(self.s, index))

    def validation(self):
        for i in range(max(1, EVAL_TOKENS // (self.s.seq_len * 32))):  # 32 rows, whatever --batch-size: the same masks
            batch = self.rows(self.val, [k % len(self.val) for k in range(i * 32, (i + 1) * 32)], i)
            for j in range(0, 32, n := at_once(self.s, 32)):
                yield {name: tensor[j : j + n] for name, tensor in batch.items()}

    def scores(self, model, loss_sum):
        right, masked, same, rows = 0, 0, 0, 0
        for batch in self.validation():
            batch = {name: tensor.to(self.s.device) for name, tensor in batch.items()}
            following = batch.pop("next")
            logits, targets, _ = model.outputs(**batch)  # (N, V), (N,)
            right, masked = right + int((logits.argmax(-1) == targets).sum()), masked + len(targets)
            guessed = model.next_logits(batch["ids"], batch["segments"], batch["mask"]).argmax(-1)  # (B,)
            same, rows = same + int((guessed == following).sum()), rows + len(following)
        return {"masked_accuracy": right / masked, "next_sentence_accuracy": same / rows}

    def baselines(self):
        """Words by their frequency alone, and one answer to every pair."""
        ids = tokens_of(self.folder / "train.npy")[:10_000_000].int()
        ids = ids[~self.special[ids.long()]]
        masked = torch.cat([batch["labels"][batch["labels"] != -100] for batch in self.validation()])
        following = torch.cat([batch["next"] for batch in self.validation()]).double().mean().item()
        nats = baselines.unigram(ids, masked, self.tokenizer.vocab_size) / len(masked) + math.log(
            2
        )  # ln 2: of the pairs
        usual = (masked == ids.bincount().argmax()).double().mean().item()
        return {"unigram": {"val_loss": nats, "masked_accuracy": usual,
                            "next_sentence_accuracy": max(following, 1 - following)}}  # fmt: skip

    def sample(self, model, folder):
        return fill_masks(self.s, model, self.tokenizer, self.s.prompt)


def seed_of(s, index):
    """A seed for what is drawn for the batch of that index."""
    return int(hashlib.sha256(f"{s.seed} {index}".encode()).hexdigest()[:14], 16)


# --- labelled rows ----------------------------------------------------------------------------------------------------


def rows_of(s):
    """(train, val): the rows of --data, checked and split. Raises ValueError naming file, row and problem."""
    if s.data in SOURCES:
        if LABELLED.get(s.data) != s.task:
            wanted = next(name for name, task in LABELLED.items() if task == s.task)
            raise ValueError(
                f"--data {s.data}: has no {' and '.join(FIELDS[s.task])} for --task {s.task}; wanted {wanted}"
            )
        train, val = split([check_row(row, s.task, f"{s.data}:{i}") for i, row in enumerate(SOURCES[s.data](), 1)])
    else:
        train, val = split(*read_examples(s.data, s.task))
    if s.task in ("classify", "tag"):
        label_names(train, val)
    return train, val


def chats_of(s):
    """(train, val): the conversations of --data, checked and split."""
    return split(*read_chats(s))


def read_chats(s):
    """(rows, rows to validate on or None): the conversations of --data, checked."""
    if s.data in SOURCES and LABELLED.get(s.data) != "seq2seq":
        wanted = next(name for name, task in LABELLED.items() if task == "seq2seq")
        raise ValueError(f"--data {s.data}: holds no conversations; wanted a .jsonl, hf:OWNER/NAME or {wanted}")
    if s.data in SOURCES:
        rows = ({"prompt": row["source"], "completion": row["target"]} for row in SOURCES[s.data]())
    elif s.data.startswith("hf:"):
        rows = next(iter(load_hub(s.data[3:]).values()))  # "train", where there is one; a tenth of it validates
    else:
        return read_conversations(s.data)
    return [read_row(row, f"{s.data}:{i}") for i, row in enumerate(rows, 1)], None


def rows_to_score(s, labels, part):
    """The rows of --data for --eval: those for validation, if the data has such a part or is to be split (part), else
    all of them."""
    if s.task == "chat":
        train, val = chats_of(s) if part else read_chats(s)
    else:
        train, val = rows_of(s) if part else read_examples(s.data, s.task)
    if s.task in ("classify", "tag"):
        check_labels(val or train, labels)
    print(f"data: {s.data}, {len(val or train):,} rows to score")
    note_few(val or train)
    return val or train


def note_few(rows):
    if len(rows) < 30:
        what = "1 row for validation is" if len(rows) == 1 else f"{len(rows)} rows for validation are"
        print(f"note: {what} few: a score of them is rough")


def prepare_rows(s, folder, tokenizer):
    """Labelled rows, checked and split, as .jsonl files in `folder`; returns the tokenizer, trained if new."""
    train, val = chats_of(s) if s.task == "chat" else rows_of(s)
    for name, rows in (("train", train), ("val", val)):
        lines = "".join(json.dumps(row | {"key": ""}) + "\n" for row in rows)  # a key may be a whole source file
        write_beside(folder / f"{name}.jsonl", lambda beside, lines=lines: beside.write_text(lines, encoding="utf-8"))
    if tokenizer is None:
        texts = (" ".join(text) if isinstance(text, list) else text for row in train for text in texts_of(s.task, row))
        tokenizer = new_tokenizer(s, texts)
    print(f"data: {s.data}, {len(train):,} rows and {len(val):,} for validation, vocabulary {tokenizer.vocab_size:,}")
    note_few(val)
    return checked(s, tokenizer)


def read_rows(path):
    """The rows of a file that `prepare_rows` wrote; none if there is no such file."""
    return [json.loads(line) for line in open(path, encoding="utf-8")] if path.exists() else []


def texts_of(task, row):
    """What a tokenizer learns of a row."""
    if task == "chat":
        return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]
    return [row[name] for name in FIELDS[task] if name not in ("label", "tags", "answers")]


class Labelled:
    """classify, tag, qa, seq2seq: rows with answers; batches as in Text, of rows of like length."""

    def __init__(self, s, tokenizer, train, val, labels, segments):
        self.s, self.tokenizer, self.train, self.val, self.labels = s, tokenizer, train, val, labels
        if s.task == "seq2seq" and importlib.util.find_spec("sacrebleu") is None:
            raise ImportError("--task seq2seq is scored with sacrebleu: pip install sacrebleu")
        self.unit = {"classify": "texts", "qa": "ends of answers"}.get(s.task, "tokens")
        how = tokenizer, s.seq_len, labels, segments
        self.features, self.val_features = (encode(s.task, rows, *how) for rows in (train, val))
        full = sum(len(f.get("source") or f["ids"]) == s.seq_len for f in self.features)
        if full and s.task in ("classify", "seq2seq"):
            print(f"note: {full} of {len(train)} texts fill a row of {s.seq_len} tokens; what is beyond is not read")
        self.lengths = [len(f["source"]) + len(f["target"]) if "source" in f else len(f["ids"]) for f in self.features]

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def epoch(self, number):
        return epoch_batches(self.lengths, self.s.batch_size, self.s.seed, number)

    def batch(self, index):
        per_epoch = len(self.epoch(0))
        few = [self.features[i] for i in self.epoch(index // per_epoch)[index % per_epoch]]
        if self.s.augment:
            few = [self.augmented(f, random.Random(f"{self.s.seed} {index} {i}")) for i, f in enumerate(few)]
        return collate(self.s.task, few, pad_id(self.tokenizer))

    def own_rows(self):
        """(where, a batch of one) of each training row"""
        for f in self.features:
            yield f" ({self.train[f['row']]['where']})", collate(self.s.task, [f], pad_id(self.tokenizer))

    def augmented(self, f, rng):
        """A feature with its text, but not the special tokens around it, swapped, deleted and masked."""
        (name, first), mask_id = ("source", 0) if "source" in f else ("ids", 1), self.tokenizer.token_to_id("[MASK]")
        share = 0.0 if mask_id is None else 0.1  # an encoder-decoder's tokenizer has no such token
        ids = f[name]
        return f | {name: [*ids[:first], *adversarial.augment(ids[first:-1], mask_id, rng, mask=share), ids[-1]]}

    def validation(self):
        for i in range(0, len(self.val_features), n := at_once(self.s, 64)):
            yield collate(self.s.task, self.val_features[i : i + n], pad_id(self.tokenizer))

    def scores(self, model, loss_sum):
        return judge(self.s.task, predict(self.s, model, self.tokenizer, self.val), self.val)

    def baselines(self):
        s, train, val, named = self.s, self.train, self.val, {}
        if not train:  # --eval on other data, where the run's own rows are gone
            return {}
        if s.task == "classify":
            texts, labels = [row["text"] for row in train], [row["label"] for row in train]
            named["majority class"] = baselines.majority(labels, len(val))
            try:
                named["bag of words"] = baselines.bag_of_words(texts, labels, [row["text"] for row in val])
            except ImportError as error:
                print(f"no baseline of a bag of words: {error}")
        elif s.task == "tag":
            usual = baselines.majority([tag for row in train for tag in row["tags"]], 1)
            named["majority tag"] = [usual * len(row["tags"]) for row in val]
            named["each token's usual tag"] = baselines.usual_tags(train, val)
        elif s.task == "qa":
            named["sentence at the usual place"] = baselines.usual_sentence(train, val)
            named["sentence with most words of the question"] = baselines.overlapping_sentence(val)
        else:
            named["the most frequent target"] = baselines.constant([row["target"] for row in train], len(val))
            named["the source"] = [row["source"] for row in val]
        return {name: judge(s.task, predicted, val) for name, predicted in named.items()}

    def sample(self, model, folder):
        rows = self.val[:: max(1, len(self.val) // 5)][:5]
        found = predict(self.s, model, self.tokenizer, rows)
        return "\n".join(show(self.s.task, row, answer) for row, answer in zip(rows, found, strict=True))


def context_of(model):
    """The most tokens of text that a model can read, or None where there is no limit."""
    config = model.config
    context = getattr(config, "n_positions", getattr(config, "max_position_embeddings", None))
    context = config.max_len - 1 if hasattr(config, "max_len") else context  # a target has one token more
    taken = len(model.prompt.P_e) if hasattr(model, "prompt") else getattr(model, "position_offset", 0)
    return context and context - taken  # less what a prefix or a prompt takes


def taken_by(s, base):
    """How much of the base's context the virtual tokens of --finetune will take."""
    # A prefix takes places where they are counted from the text's start, not in an encoder-decoder.
    takes = s.finetune == "prompt" or (s.finetune == "prefix" and hasattr(base, "position_offset"))
    return s.virtual_tokens if takes else 0


def segments_of(model):
    """How many kinds of segments a model tells apart; None stands for one that is trained anew."""
    return getattr(model.config, "type_vocab_size", 1) if model else 3  # BERT's two, and words of the question


def pad_id(tokenizer):
    padding = tokenizer.token_to_id("[PAD]")
    return (tokenizer.eos_id or 0) if padding is None else padding  # a mask and labels of -100 say what is padding


# --- images -----------------------------------------------------------------------------------------------------------


class Images:
    """Images in memory, (N, C, H, W) in [0, 1]; batches as in Text, drawn with replacement."""

    unit = "images"

    def __init__(self, s):
        self.s = s
        images = corpus.digits() if s.data == "digits" else corpus.read_images(s.data, IMAGE_SIZE)
        if len(images) < 20:  # two of them for validation: the walk goes from one to the next
            raise ValueError(f"--data {s.data}: {len(images)} images; wanted at least 20, a tenth to validate on")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same for every --seed
        self.val, self.train = images[order].tensor_split([len(images) // 10])
        print(f"data: {s.data}, {len(self.train):,} images and {len(self.val):,} for validation")

    def batch(self, index):
        generator = torch.Generator().manual_seed(self.s.seed * 1_000_003 + index)
        return {"x": self.train[torch.randint(len(self.train), (self.s.batch_size,), generator=generator)]}

    def validation(self):
        return ({"x": x} for x in self.val.split(at_once(self.s, 256)))

    def scores(self, model, loss_sum):
        return {}

    def baselines(self):
        return {}

    @torch.no_grad()
    def sample(self, model, folder):
        """Writes pictures: originals over reconstructions, samples, and a walk through latent space."""
        from matplotlib import image as png

        few = self.val[:10].to(self.s.device)  # (10, C, H, W)
        generator = torch.Generator(self.s.device).manual_seed(self.s.seed)
        pictures = {
            "reconstructions.png": torch.cat([few, model(few)]),
            "samples.png": model.sample(60, generator=generator),
            "walk.png": torch.cat([model.interpolate(few[i - 1], few[i], 10) for i in range(1, min(len(few), 7))]),
        }
        for name, images in pictures.items():
            tile = grid(images, 10).cpu().movedim(0, -1).expand(-1, -1, 3)  # (C, H, W) -> (H, W, 3)
            tile = tile.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
            write_beside(folder / name, lambda beside, tile=tile: png.imsave(beside, tile, format="png"))
        return f"see {', '.join(pictures)}"


def load_data(s, folder, tokenizer, base=None):
    """The data that was prepared in `folder`, for a model to come or for `base`, whose labels and segments it has."""
    if s.task == "images":
        return Images(s)
    if s.task in FIELDS:
        train, val = (read_rows(folder / f"{name}.jsonl") for name in ("train", "val"))
        labels = label_names(train, val) if s.task in ("classify", "tag") else ()
        own = getattr(base.config, "labels", ()) if base else ()
        labels = own if set(own) == set(labels) else labels  # in the order of the base's head, which then stays
        return Labelled(s, tokenizer, train, val[:: -(-len(val) // EVAL_ROWS)], labels, segments_of(base))
    if s.task == "chat":
        return Chats(s, tokenizer, *(read_rows(folder / f"{name}.jsonl") for name in ("train", "val")), base)
    return Text(s, folder, tokenizer, base) if s.task == "lm" else Pairs(s, folder, tokenizer)


# --- answers and scores -----------------------------------------------------------------------------------------------


def judge(task, predicted, rows):
    """Predictions for rows with answers -> the task's scores."""
    if task in ("classify", "tag"):
        true = [row["label" if task == "classify" else "tags"] for row in rows]
        a, b = (predicted, true) if task == "classify" else (list(itertools.chain(*x)) for x in (predicted, true))
        names = sorted({*a, *b})
        ids = [torch.tensor([names.index(name) for name in x]) for x in (a, b)]
        scores = {"accuracy": metrics.accuracy(*ids),
                  "macro_f1": metrics.precision_recall_f1(*ids, len(names), "macro")[2]}  # fmt: skip
        if task == "tag" and "B-" in "".join(names) and all(re.fullmatch("O|[BI]-.+", name) for name in names):
            scores["entity_f1"] = metrics.entity_f1(predicted, true)[2]
        return scores
    if task == "qa":
        true = [row["answers"]["text"] or [""] for row in rows]
        pairs = [metrics.span_em_f1(*pair) for pair in zip(predicted, true, strict=True)]
        return {"exact_match": sum(em for em, _ in pairs) / len(rows), "f1": sum(f1 for _, f1 in pairs) / len(rows)}
    import sacrebleu

    true = [row["target"] for row in rows]
    same = sum(a == b for a, b in zip(predicted, true, strict=True))
    return {"chrf": sacrebleu.corpus_chrf(predicted, [true]).score, "exact_match": same / len(rows)}


@torch.no_grad()
def predict(s, model, tokenizer, rows):
    """What the model says of rows, whose own answers it does not see: labels, lists of tags, or texts."""
    training, labels = model.training, getattr(model.config, "labels", ())
    model.eval()
    asked = [{name: row[name] for name in FIELDS[s.task][: 2 if s.task == "qa" else 1]} for row in rows]
    features, found = encode(s.task, asked, tokenizer, s.seq_len, labels, segments_of(model)), []
    order = sorted(range(len(features)), key=lambda i: len(features[i].get("source") or features[i]["ids"]))
    n = at_once(s, 64)
    for few in (order[i : i + n] for i in range(0, len(order), n)):  # of like length: less padding
        batch = collate(s.task, [features[i] for i in few], pad_id(tokenizer))
        batch = {name: tensor.to(s.device) for name, tensor in batch.items()}
        if s.task == "seq2seq":
            ids = beam_search(model, batch["source"], s.seq_len, s.beam, source_mask=batch["source_mask"])[0]
            found += zip(few, (tokenizer.decode(x) for x in ids), strict=True)
        else:
            logits = model(batch["ids"], batch["segments"], batch["mask"]).float().cpu()
            found += zip(few, logits, strict=True)
    found = [x for _, x in sorted(found, key=lambda pair: pair[0])]
    model.train(training)
    return found if s.task == "seq2seq" else answers(s.task, asked, features, found, labels)


def show(task, row, answer):
    """One line of a row, the model's answer, and, where the row has it and they differ, the true one."""
    if task == "tag" and "tags" in row:  # the mistakes alone
        pairs = zip(row["tokens"], answer, row["tags"], strict=True)
        return " ".join(token if a == b else f"{token}[{a}, true: {b}]" for token, a, b in pairs)
    if task == "tag":
        return " ".join(f"{token}/{tag}" for token, tag in zip(row["tokens"], answer, strict=True))
    true = row["answers"]["text"][:1] if "answers" in row else [row[n] for n in ("label", "target") if n in row]
    told = f" (true: {true[0]!r})" if true and true[0] != answer else ""
    return f"{' '.join(row[FIELDS[task][0]].split())[:100]!r} -> {answer!r}{told}"


def continue_text(s, model, tokenizer, prompt):
    """Yields the pieces of a continuation, up to whichever token ends a text."""
    ends = getattr(model.config, "eos_token_id", None), *getattr(model.config, "other_eos_token_ids", ())
    ends = {*ends, chat_format(tokenizer).end if getattr(tokenizer, "chat_template", None) else None} - {None}
    stop = [tokenizer.decode([i]) for i in ends if i < tokenizer.vocab_size]
    ids = [*start_ids(tokenizer), *tokenizer.encode(prompt)]
    return drawn(s, model, tokenizer, ids, s.new_tokens, stop=stop)


def drawn(s, model, tokenizer, ids, new_tokens, **how):
    """Yields the pieces of what follows ids, drawn with a generator of its own: a sample does not move training's."""
    how |= dict(temperature=s.temperature, top_p=s.top_p, context=context_of(model))
    generator = torch.Generator(s.device).manual_seed(s.seed)
    return stream_text(model, tokenizer, ids, new_tokens, generator=generator, **how)


def check_prompt(s, tokenizer):
    """Refuses a --prompt that cannot be continued or filled in, which is better known before training."""
    if s.task == "lm":
        tokenizer.encode(s.prompt)
    elif s.task == "mlm":
        masked_ids(s, tokenizer, s.prompt, "--prompt")


def masked_ids(s, tokenizer, text, name="--sample"):
    """The ids of a text with [MASK] in it, as BERT reads them. name: the option that gave it."""
    cls, sep, mask = (tokenizer.token_to_id(token) for token in SPECIAL[2:])
    ids = [cls, *tokenizer.encode(text, special=True), sep]
    if mask not in ids:
        raise ValueError(f"{name} {text!r:.60}: wanted a text with [MASK] where a word is to be filled in")
    if len(ids) > s.seq_len:
        raise ValueError(f"{name} {text!r:.60}: is {len(ids)} tokens long; wanted at most {s.seq_len}")
    return ids


@torch.no_grad()
def fill_masks(s, model, tokenizer, text):
    """The text with BERT's likeliest token for each [MASK]."""
    ids, mask = masked_ids(s, tokenizer, text), tokenizer.token_to_id("[MASK]")
    likeliest = model(torch.tensor([ids], device=s.device))[0].argmax(-1).tolist()
    return tokenizer.decode([b if a == mask else a for a, b in zip(ids, likeliest, strict=True)][1:-1])


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(s, model, data):
    """-> {"val_loss": nats per token, label or image} and the task's scores, on the same rows at every call."""
    training, total, terms = model.training, 0.0, 0
    loss = functools.partial(data.loss, model) if hasattr(data, "loss") else model.loss
    model.eval()
    with torch.random.fork_rng():  # a VAE draws latents here: the same ones each time, and none of training's
        torch.manual_seed(s.seed)
        for batch in data.validation():
            loss_sum, n = loss_on(s, loss, batch)
            total, terms = total + float(loss_sum), terms + int(n)
        scores = {"val_loss": total / max(terms, 1)} | data.scores(model, total)
    model.train(training)
    return scores


def at_once(s, most):
    """How many rows are evaluated at a time: where a batch has to be small, so has this; no gradient needs less."""
    return min(most, 4 * s.batch_size)


def loss_on(s, loss, batch):
    with torch.autocast(s.device.split(":")[0], getattr(torch, s.dtype), enabled=s.dtype != "float32"):
        return loss(**{name: tensor.to(s.device) for name, tensor in batch.items()})


def better(s, scores, best):
    name = "entity_f1" if "entity_f1" in scores else TASKS[s.task].best
    if best is None:
        return True
    sign = 1 if name.endswith("loss") else -1
    a, b = ((sign * x[name], x["val_loss"]) for x in (scores, best))
    return a < b  # of equal scores, which are common on few rows, the loss decides


def describe(scores):
    words = {
        "val_loss": "validation loss",
        "f1": "F1",
        "macro_f1": "macro F1",
        "entity_f1": "entity F1",
        "chrf": "chrF",
    }
    told = [(words.get(name, name.replace("_", " ")), value) for name, value in scores.items() if name != "sample"]
    return ", ".join(
        f"{value:.4f} {name}" if name == "bits per byte" else f"{name} {value:.4f}" for name, value in told
    )
