# SPDX-License-Identifier: MIT
"""Labelled examples as people write them: read from JSONL, CSV or the hub, checked row by row, split for validation.

No paper, but for the answers, which are SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250). Four tasks and their fields:

    classify  {"text", "label"}                    seq2seq  {"source", "target"}
    tag       {"tokens", "tags"}                   qa       {"question", "context", "answers"}

answers is {"text": [...], "answer_start": [...]} in characters, as in SQuAD's files a list of {"text", "answer_start"},
a string, or a list of strings (each then stands where it is first found); an empty one says that there is no answer.
A .csv needs a header; in it tokens and tags are parted by spaces, and answers may be JSON. A folder holds train.jsonl
or train.csv and, if you like, validation.jsonl or .csv; "hf:NAME" asks the `datasets` library (a hub's OWNER/NAME or a
local folder). Rows with the same "key", if they have one, else with the same text, fall on the same side:

    in validation iff SHA-256(key) < share * 2^256          so no row moves when others come or go

Every fault is one line that names the file, the row and the problem: nothing is skipped in silence. A row's number is
the line on which it begins, or its place in a hub's split, from 1.

    train, val = split(*read_examples("reviews.csv", "classify"))
    labels = label_names(train, val)            # ("bad", "good")
    check_labels(read_examples("later.csv", "classify")[0], labels)

There are no tensors here.
"""

import collections
import csv
import difflib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

FIELDS = {
    "classify": ("text", "label"),
    "tag": ("tokens", "tags"),
    "qa": ("question", "context", "answers"),
    "seq2seq": ("source", "target"),
}
VALIDATION = ("validation", "valid", "val", "dev")  # what that part is called, the first that is there


def check_row(row: object, task: str, where: str) -> dict:
    """A row as read -> {its fields, "where", "key"}: text as str, tokens and tags as lists, answers as in SQuAD.

    Labels and tags may be whole numbers or bools, which become text ("1", "True"), and lose the spaces around them.
    Raises ValueError, one line that begins with `where`, for a field that is missing or of the wrong type, tokens and
    tags of different numbers, an empty text, label or tag, and an answer that is not in its context."""
    if task not in FIELDS:
        raise ValueError(f"task = {task!r}: wanted {', '.join(FIELDS)}")
    fields = FIELDS[task]
    if not isinstance(row, dict) or any(row.get(name) is None for name in fields):
        found = f"the fields {', '.join(map(repr, row)):.80}" if isinstance(row, dict) else f"a {type(row).__name__}"
        missing = [name for name in fields if isinstance(row, dict) and name in row and row[name] is None]
        found = f"nothing under {', '.join(missing)}" if missing else found
        found += _near(row, fields) if isinstance(row, dict) else ""
        raise ValueError(f"{where}: wanted an object with {', '.join(fields)}, found {found}")
    new = {name: row[name] for name in fields}
    for name, value in new.items():
        if task == "tag":
            value = value.split() if isinstance(value, str) else value
            if not isinstance(value, list) or not value:
                raise ValueError(f"{where}: {name} = {value!r:.60}: wanted a list of strings")
            new[name] = [_string(v, f"{name}[{i}]", where, name == "tags") for i, v in enumerate(value)]
        elif name != "answers":
            new[name] = _string(value, name, where, name == "label")
    if task == "tag" and len(new["tokens"]) != len(new["tags"]):
        raise ValueError(f"{where}: {len(new['tokens'])} tokens and {len(new['tags'])} tags: wanted as many")
    if task == "qa":
        new["answers"] = _answers(new["answers"], new["context"], where)
    key = row.get("key")
    if key is None or key == "":
        key = " ".join(new["tokens"]) if task == "tag" else new["context" if task == "qa" else fields[0]]
    elif not isinstance(key, (str, int)):
        raise ValueError(f"{where}: key = {key!r:.60}: wanted a string or a whole number")
    return new | {"where": where, "key": str(key)}


def _near(row, fields):
    """Which names of the row may be meant by the fields that it lacks; blanks and capitals do not count."""
    others, hints = {str(name).strip().lower(): name for name in row if name not in fields}, []
    for field in fields:
        near = difflib.get_close_matches(field, others, 2) if field not in row else []
        hints += [f"wanted {field}, not " + " or ".join(f"{others[name]!r:.40}" for name in near)] if near else []
    return f" ({'; '.join(hints)})" if hints else ""


def _string(value, name, where, is_label):
    """The value, if it is a string that holds something; a label may be a number."""
    if is_label and isinstance(value, (int, str)):
        value = str(value).strip()
    elif is_label:
        wanted = "a string, a whole number (1, not 1.0) or a bool"
        raise ValueError(f"{where}: {name} = {value!r:.60}: wanted {wanted}")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name} = {value!r:.60}: wanted a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold what no tokenizer takes
        at = f"{value[error.start]!a} at character {error.start}"
        raise ValueError(f"{where}: {name} holds a lone surrogate, {at}, which is no text") from None
    return value


def _answers(answers, context, where):
    """Any way to write answers -> {"text": [...], "answer_start": [...]}"""
    if isinstance(answers, str) and answers.lstrip()[:1] in ("{", "[") and answers not in context:  # a cell of a .csv
        try:
            answers = json.loads(answers, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: answers = {answers!r:.60}: malformed JSON: {error}") from None
    if isinstance(answers, list) and answers and all(isinstance(a, dict) for a in answers):  # as in SQuAD's files
        there = [name for name in ("text", "answer_start") if any(name in a for a in answers)]
        answers = {name: [a.get(name) for a in answers] for name in there}
    texts = answers.get("text") if isinstance(answers, dict) else answers
    texts = [texts] if isinstance(texts, str) else texts
    starts = answers.get("answer_start") if isinstance(answers, dict) else None
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{where}: answers = {answers!r:.60}: wanted a string, or a list of them under text")
    if starts is not None and (not isinstance(starts, list) or len(starts) != len(texts)):
        n = len(starts) if isinstance(starts, list) else f"{starts!r:.60}"
        raise ValueError(f"{where}: {len(texts)} answers and {n} in answer_start: wanted as many")
    found = [(t, context.find(t) if starts is None else starts[i]) for i, t in enumerate(texts) if t.strip()]
    for text, start in found:
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            at = "" if starts is None else f" at character {start!r:.60}"
            same = text not in context and unicodedata.normalize("NFC", text) in unicodedata.normalize("NFC", context)
            at += "; its context has it in another Unicode normal form (NFC or NFD)" if same else ""
            raise ValueError(f"{where}: the answer {text[:60]!r} is not in its context{at}")
    return {"text": [t for t, _ in found], "answer_start": [start for _, start in found]}


def _twice(names):
    """The first of the names that stands there more than once, or None."""
    return next((name for name, count in collections.Counter(names).items() if count > 1), None)


def _object(pairs):
    """A JSON object, where `json` would let the last of equal keys win."""
    if (key := _twice(key for key, _ in pairs)) is not None:
        raise ValueError(f"the key {key!r:.60} stands twice in an object")
    return dict(pairs)


def _read(path: Path) -> Iterator[tuple[int, object]]:
    """(line on which it begins, row), unchecked, for each row of a .jsonl or .csv file"""
    csv.field_size_limit(2**31 - 1)  # for the whole process; else a text of more than 131,072 characters is an error
    line, header = 1, None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # newline: a cell keeps its line ends
            if path.suffix.lower() == ".csv":
                for cells in (reader := csv.reader(file, strict=True)):
                    if cells and header is None:
                        header = cells
                        if (name := _twice(filter(str.strip, cells))) is not None:  # a spreadsheet's may have no name
                            raise ValueError(f"{path}:{line}: the column {name!r:.60} stands twice in the header")
                    elif cells and len(cells) != len(header):
                        raise ValueError(f"{path}:{line}: {len(cells)} cells, wanted {len(header)} as in the header")
                    elif cells:
                        yield line, dict(zip(header, cells, strict=True))
                    line = reader.line_num + 1
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    try:
                        row = json.loads(text, object_pairs_hook=_object)
                    except (ValueError, RecursionError) as error:
                        what = str(error).replace(": line 1 ", " at ")
                        raise ValueError(f"{path}:{line}: malformed JSON: {what}") from None
                    yield line, row
    except UnicodeDecodeError:
        data = path.read_bytes()  # all of it: the error's own position counts from the start of a buffer
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = len((data[: error.start] + b".").splitlines())
            raise ValueError(f"{path}:{line}: byte {error.start} of the file is not UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: malformed CSV: {error}") from None


def _rows(path: Path, task: str) -> list[dict]:
    """The checked rows of a .jsonl or .csv file."""
    wanted = f"of {', '.join(FIELDS[task])}"
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: wanted a .jsonl or .csv file {wanted}")
    rows = [check_row(row, task, f"{path}:{line}") for line, row in _read(path)]
    if not rows:
        raise ValueError(f"{path}: holds no examples; wanted rows {wanted}")
    return rows


def load_hub(name: str):
    """The `datasets` library's dict of parts of a dataset of the hub, or of a local folder in one of its layouts.

    Raises ImportError without the library, ValueError when it cannot load that."""
    try:
        import datasets
    except ImportError:
        raise ImportError("--data hf:OWNER/NAME needs the datasets library: pip install datasets") from None
    try:
        return datasets.load_dataset(name)
    except Exception as error:  # the library has many kinds, network errors among them
        raise ValueError(f"hf:{name}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None


def _from_hub(name: str, task: str) -> tuple[list[dict], list[dict] | None]:
    """`read_examples` of what `load_hub` finds."""
    found = load_hub(name)
    # Only what is used is checked: the labels of a test part are often held back.
    used = ["train" if "train" in found else next(iter(found))]
    used += [part for part in (*VALIDATION, "test") if part in found and part not in used][:1]
    result = []
    for part in used:
        column = {"classify": "label", "tag": "tags"}.get(task)
        feature = found[part].features.get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)  # that its numbers stand for
        result.append([])
        for number, row in enumerate(found[part], 1):
            if names:
                row[column] = _named(row[column], names)
            result[-1].append(check_row(row, task, f"hf:{name} {part}:{number}"))
        seen = {label for row in result[0] for label in labels_of(row)}
        for label in names or ():
            if label.strip() not in seen:  # it would be lost without a word: what has no row cannot be learnt
                wanted = f"a row of each of the {len(names)} classes that it declares"
                raise ValueError(f"hf:{name} {used[0]}: no row has the label {label!r:.60}; wanted {wanted}")
    return result[0], result[1] if len(result) > 1 else None


def _named(value, names):
    """A label number, or a list of them, -> names; None for -1, which says that it is not told."""
    if isinstance(value, list):
        return [_named(v, names) for v in value]
    return None if value is None or value < 0 else names[value]


def read_examples(path: str | os.PathLike, task: str) -> tuple[list[dict], list[dict] | None]:
    """(rows to train on, rows to validate on or None) of a file, a folder or "hf:NAME"; see the module for the kinds.

    Raises ValueError as `check_row` does, for a file without rows, a column or key that stands twice, and a class that
    a dataset of the `datasets` library declares without a row to train on; ImportError without it for "hf:"."""
    if task not in FIELDS:
        raise ValueError(f"task = {task!r}: wanted {', '.join(FIELDS)}")
    if os.fspath(path).startswith("hf:"):
        return _from_hub(os.fspath(path)[3:], task)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"path {str(path)!r} does not exist")
    if not path.is_dir():
        return _rows(path, task), None
    files = []
    for part in ("train", *VALIDATION):
        there = [file for file in (path / f"{part}.jsonl", path / f"{part}.csv") if file.is_file()]
        if part == "train" and not there:
            raise ValueError(f"{path}: wanted a train.jsonl or train.csv of {', '.join(FIELDS[task])} in it")
        files += [there] if there else []
    parts = [[row for file in there for row in _rows(file, task)] for there in files[:2]]
    return parts[0], parts[1] if len(parts) > 1 else None


def split(train: Sequence[dict], val: Sequence[dict] | None = None, validation=0.1) -> tuple[list[dict], list[dict]]:
    """(train, val): the given parts, or `train` cut by the SHA-256 of its keys, as minimal/data.py cuts documents.

    Equal keys stay together. Every label and tag stays in training: its last key there is not taken away. Both parts
    have a row: if no key lies below the share, the lowest that can be spared validates. Raises ValueError for a single
    key, or if every key has a label of its own: these cannot be cut."""
    if val:
        return list(train), list(val)
    if not train or not 0 < validation < 1:
        raise ValueError(f"wanted rows and 0 < validation < 1, got {len(train)} rows and validation = {validation}")
    names = {}  # key -> its labels
    for row in train:
        names.setdefault(row["key"], set()).update(labels_of(row))
    hashes = {key: int(hashlib.sha256(key.encode("utf-8", "replace")).hexdigest(), 16) for key in names}
    in_training = collections.Counter(name for some in names.values() for name in some)  # label -> number of keys
    to_val, bound = set(), int(validation * 2**256)
    for key in sorted(hashes, key=hashes.get):
        if (hashes[key] < bound or not to_val) and len(to_val) < len(hashes) - 1:
            if all(in_training[name] > 1 for name in names[key]):
                to_val.add(key)
                in_training.subtract(names[key])
    if not to_val:
        what = "at least two different rows" if len(hashes) < 2 else "a row whose labels other rows have too"
        raise ValueError(f"{train[0]['where']}: wanted {what}, to validate on, among the {len(train)} rows")
    return [row for row in train if row["key"] not in to_val], [row for row in train if row["key"] in to_val]


def labels_of(row: dict) -> list[str]:
    """The labels in a row: one for classify, one per token for tag, else none."""
    return row["tags"] if "tags" in row else [row["label"]] if "label" in row else []


def label_names(train: Sequence[dict], val: Iterable[dict]) -> tuple[str, ...]:
    """The labels of the training rows, sorted. Raises ValueError, naming file and row, when there is but one, or when a
    validation row has another."""
    names = sorted({name for row in train for name in labels_of(row)})
    if len(names) == 1:
        raise ValueError(f"{train[0]['where']}: every row has the label {names[0]!r}; wanted at least two labels")
    check_labels(val, names)
    return tuple(names)


def check_labels(rows: Iterable[dict], labels: Sequence[str]) -> None:
    """Raises ValueError, naming file and row, at the first label that is none of `labels`."""
    known = set(labels)
    for row in rows:
        for name in labels_of(row):
            if name not in known:
                some = ", ".join(map(repr, list(labels)[:9])) + ", ..." * (len(labels) > 9)
                raise ValueError(f"{row['where']}: the label {name!r} was not seen in training; known: {some}")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reviews.csv")
        texts = [("a fine meal", "good"), ("cold soup", "bad"), ("kind people", "good"), ("no salt", "bad")] * 25
        path.write_text("text,label\n" + "".join(f"{t} {i},{label}\n" for i, (t, label) in enumerate(texts)))
        train, val = split(*read_examples(path, "classify"))
        print(f"{len(texts)} rows: {len(train)} to train on, {len(val)} to validate on:", label_names(train, val))
        again, _ = split(*read_examples(path, "classify"))
        half, _ = split(train[::2] + val)
        stay = sum(row in train for row in half)
        print(f"the same split again: {again == train}; with fewer rows {stay}/{len(half)} stay where they were")
    for task, row in (
        ("tag", {"tokens": ["Ada", "Lovelace", "wrote"], "tags": ["B-PER", "I-PER"]}),
        ("qa", {"question": "Who?", "context": "Ada wrote it.", "answers": "Grace"}),
        ("classify", {"text": "fine", "label": " "}),
        ("seq2seq", {"source": "one", "targets": "eins"}),
        ("qa", {"question": "Who?", "context": "Ada wrote it.", "answers": "Ada"}),
    ):
        try:
            print(check_row(row, task, "rows.jsonl:7"))
        except ValueError as error:
            print(f"error: {error}")
