# SPDX-License-Identifier: MIT
"""Labelled rows: csv, json and the `datasets` library are the oracles. Every fault is one line: file, row, problem."""

import codecs
import collections
import csv
import hashlib
import itertools
import json
import math
import random
import re
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from minimal.examples import FIELDS, check_labels, check_row, label_names, labels_of, read_examples, split

# Not blank, no lone surrogate; with what splits lines in str.splitlines, but in neither JSONL nor CSV.
ODD = ["a\u2028b", "a\x85b", "a\x1cb", "a,b", '"', 'a "b" c', "two\nlines", "old\rmac", "dos\r\nend", "'", "\ufeffx"]
characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
texts = (st.text(characters, min_size=1, max_size=12) | st.sampled_from([*ODD, "👩\u200d🚀 e\u0301"])).filter(str.strip)


def fault(call, *parts, begins=""):
    """`call` raises one line that begins as given and holds the parts in order."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500, message
    assert re.search(".*".join(map(re.escape, parts)), message), message
    assert message.startswith(begins), message


def bare(rows):
    """Without where they stood."""
    return [{name: value for name, value in row.items() if name != "where"} for row in rows]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = {
    "classify": [{"text": f"text {i}", "label": "bad" if i % 2 else "good"} for i in range(6)],
    "tag": [{"tokens": ["Ada", "wrote", str(i)], "tags": ["B-PER", "O", "O"]} for i in range(6)],
    "qa": [
        {"question": "Who?", "context": f"{i} is Ada.", "answers": {"text": ["Ada"], "answer_start": [5]}}
        for i in range(6)
    ],
    "seq2seq": [{"source": f"one {i}", "target": f"eins {i}"} for i in range(6)],
}


# ---- files ---------------------------------------------------------------------------------------------------------


@hypothesis.given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_jsonl(tmp_path_factory, pairs, end, ascii_only, bom, blank_lines):
    """Whatever the text, the line ends and the blank lines: the rows as `json` has them, each with its line."""
    path, written, wanted = tmp_path_factory.mktemp("x") / "rows.JSONL", "", []
    for (source, target), blank in zip(pairs, blank_lines, strict=False):
        written += (" " + end) * blank
        number = written.count("\n") + 1
        written += json.dumps({"source": source, "target": target, "other": 1}, ensure_ascii=ascii_only) + end
        wanted.append({"source": source, "target": target, "where": f"{path}:{number}", "key": source})
    path.write_bytes(codecs.BOM_UTF8 * bom + written.encode())
    assert read_examples(path, "seq2seq") == (wanted, None)
    assert read_examples(str(path), "seq2seq") == (wanted, None)


def test_splitlines_would_break_rows(tmp_path):
    """The wrong variant: str.splitlines knows ten line ends, JSONL has one."""
    row = {"source": "a\u2028b", "target": "c"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(ValueError):
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert read_examples(path, "seq2seq")[0][0]["source"] == "a\u2028b"


@hypothesis.given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_csv(tmp_path_factory, pairs, end, quote_all, bom, blank_lines):
    """As csv.DictReader; a row's number is the line on which it begins, also after cells of several lines."""
    path, written, wanted = tmp_path_factory.mktemp("x") / "rows.csv", "source,other,target" + end, []

    def cell(text):  # csv.writer leaves a line end without quotes that is not its own
        return '"' + text.replace('"', '""') + '"' if quote_all or set(text) & set(',"\r\n') else text

    for (source, target), blank in zip(pairs, blank_lines, strict=False):
        written += end * blank
        number = len(re.findall("\r\n|\r|\n", written)) + 1
        written += f"{cell(source)},,{cell(target)}{end}"
        wanted.append({"source": source, "target": target, "where": f"{path}:{number}", "key": source})
    path.write_bytes(codecs.BOM_UTF8 * bom + written.encode())
    assert read_examples(path, "seq2seq") == (wanted, None)
    with open(path, encoding="utf-8-sig", newline="") as again:
        oracle = [(row["source"], row["target"]) for row in csv.DictReader(again)]
    assert [(row["source"], row["target"]) for row in wanted] == oracle


def test_the_line_of_a_csv_row(tmp_path):
    """csv's line_num is where a row ends: for a cell of three lines, or a quote that is never closed, far from it."""
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"one\ntwo\nthree",good\n\nx,bad\n"y\ny", \n')
    fault(lambda: read_examples(path, "classify"), f"{path}:7: label = ''")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert [reader.line_num for _ in reader] == [4, 6, 8]  # the wrong variant: they begin on 2, 6 and 7
    path.write_text('text,label\n"one\ntwo",good\n"x,bad\n' + "z,bad\n" * 999)
    fault(lambda: read_examples(path, "classify"), f"{path}:4: malformed CSV:")


def test_csv_of_tags_and_answers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("tokens,tags\nAda wrote  it,B-PER O O\n")
    row = {"tokens": ["Ada", "wrote", "it"], "tags": ["B-PER", "O", "O"], "where": f"{path}:2", "key": "Ada wrote it"}
    assert read_examples(path, "tag") == ([row], None)
    answers = ["it", "", '{"text": ["it", "Ada"], "answer_start": [10, 0]}', '["it", "wrote"]', '{"text": "it"}', "[]"]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerow(["question", "context", "answers"])
        csv.writer(file).writerows(["What?", "Ada wrote it.", a] for a in answers)
    found = [tuple(row["answers"].values()) for row in read_examples(path, "qa")[0]]
    it, none = (["it"], [10]), ([], [])
    assert found == [it, none, (["it", "Ada"], [10, 0]), (["it", "wrote"], [10, 4]), it, none]


def test_a_text_beyond_the_limit_of_csv(tmp_path):
    path, text = tmp_path / "rows.csv", "word " * 40_000
    path.write_text(f"text,label\n{text},good\n")
    csv.field_size_limit(131_072)  # its default
    with pytest.raises(csv.Error, match="field larger"), open(path) as file:
        list(csv.DictReader(file))
    assert read_examples(path, "classify")[0][0]["text"] == text


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_what_is_not_utf8_is_named_by_line_and_byte(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    row, bad = (
        (b"one,eins\n", b"caf\xe9,x\n") if suffix == ".csv" else (b'{"source": "a", "target": "b"}\n', b'{"\xe9": 1}\n')
    )
    good = codecs.BOM_UTF8 + b"source,target\n" * (suffix == ".csv") + row * 3000
    path.write_bytes(good + bad)
    at = len(good) + bad.index(b"\xe9")
    line = good.count(b"\n") + 1
    fault(lambda: read_examples(path, "seq2seq"), f"{path}:{line}: byte {at} of the file is not UTF-8")
    with pytest.raises(UnicodeDecodeError) as caught, open(path, encoding="utf-8-sig") as file:
        list(file)
    assert caught.value.start < at  # the wrong variant: the error's own position counts from the start of a buffer


ROW = '{"text": "a", "label": "good"}\n'
ACCEPTED = "wanted a string, a whole number (1, not 1.0) or a bool"
BAD = {  # content, task, line, problem
    "broken": (ROW + "{'text': 1}\n", "classify", 2, "malformed JSON: Expecting property name"),
    "cut": (ROW + ROW[:-9], "classify", 2, "malformed JSON: "),
    "two in a line": (ROW.strip() + ROW, "classify", 1, "malformed JSON: Extra data"),
    "deep": ("[" * 100_000 + "\n", "classify", 1, "malformed JSON: "),
    "a list": (ROW + "[1]\n", "classify", 2, "wanted an object with text, label, found a list"),
    "a number": ("7\n", "classify", 1, "found a int"),
    "null": ("null\n", "classify", 1, "found a NoneType"),
    "missing": (ROW + "\n" + '{"text": "b", "lable": "x"}\n', "classify", 3, "found the fields 'text', 'lable'"),
    "line end in a name": ('{"a\\nb": 1}\n', "classify", 1, r"found the fields 'a\nb'"),
    "no label": ('{"text": "b", "label": null}\n', "classify", 1, "found nothing under label"),
    "blank label": (ROW + '{"text": "b", "label": " \\t"}\n', "classify", 2, "label = '': wanted a string that"),
    "blank text": ('{"text": "\\n", "label": "x"}\n', "classify", 1, r"text = '\n': wanted a string that"),
    "text a number": ('{"text": 5, "label": "x"}\n', "classify", 1, "text = 5: wanted a string"),
    "text a list": ('{"text": ["a"], "label": "x"}\n', "classify", 1, "text = ['a']: wanted a string"),
    "label a fraction": ('{"text": "a", "label": 0.5}\n', "classify", 1, "label = 0.5: " + ACCEPTED),
    "label as pandas writes it": ('{"text": "a", "label": 1.0}\n', "classify", 1, "label = 1.0: " + ACCEPTED),
    "label no number": ('{"text": "a", "label": NaN}\n', "classify", 1, "label = nan: " + ACCEPTED),
    "label a list": ('{"text": "a", "label": ["x"]}\n', "classify", 1, "label = ['x']: " + ACCEPTED),
    "label a list of a number": ('{"text": "a", "label": [1]}\n', "classify", 1, "label = [1]: " + ACCEPTED),
    "tag a fraction": ('{"tokens": ["a"], "tags": [1.0]}\n', "tag", 1, "tags[0] = 1.0: " + ACCEPTED),
    "a key twice": (ROW + '{"text": "a", "label": "x", "label": "y"}\n', "classify", 2, "the key 'label' stands twice"),
    "an inner key twice": ('{"question": "q", "context": "c", "answers": {"text": "c", "text": "q"}}\n', "qa", 1,
                           "the key 'text' stands twice"),
    "a name in capitals": ('{"Text": "a", "label": "x"}\n', "classify", 1, "(wanted text, not 'Text')"),
    "names with blanks": ('{" text": "a", "Label ": 1}\n', "classify", 1,
                          "(wanted text, not ' text'; wanted label, not 'Label ')"),
    "a slip": ('{"text": "a", "lable": 1}\n', "classify", 1, "'text', 'lable' (wanted label, not 'lable')"),
    "tags of the hub": ('{"id": "0", "tokens": ["a"], "pos_tags": [1], "ner_tags": [0]}\n', "tag", 1,
                        "'id', 'tokens', 'pos_tags', 'ner_tags' (wanted tags, not 'pos_tags' or 'ner_tags')"),
    "surrogate": ('{"text": "ab\\ud800", "label": "x"}\n', "classify", 1, r"surrogate, '\ud800' at character 2"),
    "key a list": ('{"text": "a", "label": "x", "key": [1]}\n', "classify", 1, "key = [1]: wanted a string or a whole"),
    "tags fewer": ('{"tokens": ["a", "b"], "tags": ["O"]}\n', "tag", 1, "2 tokens and 1 tags"),
    "tags more": ('{"tokens": "a b", "tags": "O O O"}\n', "tag", 1, "2 tokens and 3 tags"),
    "no tokens": ('{"tokens": [], "tags": []}\n', "tag", 1, "tokens = []: wanted a list"),
    "blank token": ('{"tokens": ["a", " "], "tags": ["O", "O"]}\n', "tag", 1, "tokens[1] = ' ': wanted a string that"),
    "blank tag": ('{"tokens": ["a", "b"], "tags": ["O", ""]}\n', "tag", 1, "tags[1] = ''"),
    "tags an object": ('{"tokens": ["a"], "tags": {"a": "O"}}\n', "tag", 1, "tags = {'a': 'O'}: wanted a list"),
    "token a number": ('{"tokens": [1], "tags": ["O"]}\n', "tag", 1, "tokens[0] = 1: wanted a string"),
    "no target": ('{"source": "a", "target": ""}\n', "seq2seq", 1, "target = '': wanted a string that"),
}  # fmt: skip
BAD = {name: (content, task, line, problem, ".jsonl") for name, (content, task, line, problem) in BAD.items()} | {
    "csv: label empty": ("text,label\na,x\nb,\n", "classify", 3, "label = ''", ".csv"),
    "csv: a comma too many": ("text,label\na,x\none, two,x\n", "classify", 3, "3 cells, wanted 2 as in", ".csv"),
    "csv: a cell too few": ("text,label\na\n", "classify", 2, "1 cells, wanted 2", ".csv"),
    "csv: no header": ("a fine meal,good\ncold,bad\n", "classify", 2, "found the fields 'a fine meal', 'good'", ".csv"),
    "csv: a column twice": ("text,label,label\na,x,y\n", "classify", 1, "the column 'label' stands twice", ".csv"),
    "csv: a column twice, after a blank line": ("\nid,text,label,id\n", "classify", 2, "the column 'id'", ".csv"),
    "csv: a column with a blank": ("text, label\na, x\n", "classify", 2, "(wanted label, not ' label')", ".csv"),
    "csv: an inner key twice": (
        'question,context,answers\nq,c,"{""text"": ""c"", ""text"": ""q""}"\n',
        "qa",
        2,
        "the key 'text' stands twice",
        ".csv",
    ),
    "csv: semicolons": ("text;label\na;x\n", "classify", 2, "found the fields 'text;label'", ".csv"),
    "csv: text after a quote": ('text,label\n"a"b,x\n', "classify", 2, "malformed CSV: ", ".csv"),
    "csv: open quote": ('text,label\nx,y\n"a,x\n', "classify", 3, "malformed CSV: ", ".csv"),
    "csv: tags fewer": ("tokens,tags\na b,O\n", "tag", 2, "2 tokens and 1 tags", ".csv"),
    "csv: answers broken": ('question,context,answers\nq,c,"{""text"": "\n', "qa", 2, "malformed JSON", ".csv"),
    "utf-16": ("text,label\na,x\n".encode("utf-16"), "classify", 1, "byte 0 of the file is not UTF-8", ".csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_with_file_row_and_problem(tmp_path, name):
    content, task, line, problem, suffix = BAD[name]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fault(lambda: read_examples(path, task), problem, begins=f"{path}:{line}: ")


def test_no_name_is_near():
    with pytest.raises(ValueError) as caught:
        check_row({"text": "a", "x": 1}, "classify", "rows:1")
    assert str(caught.value) == "rows:1: wanted an object with text, label, found the fields 'text', 'x'"


def qa(answers, context="Ada wrote it. It is good."):
    return check_row({"question": "What?", "context": context, "answers": answers}, "qa", "rows:1")["answers"]


@pytest.mark.parametrize(
    "answers, problem",
    [
        ("Grace", "the answer 'Grace' is not in its context"),
        ({"text": ["Ada"], "answer_start": [1]}, "the answer 'Ada' is not in its context at character 1"),
        ({"text": ["Ada"], "answer_start": [-25]}, "at character -25"),  # a negative index would find it
        ({"text": ["good"], "answer_start": [10**9]}, "at character 1000000000"),
        ({"text": ["Ada"], "answer_start": [None]}, "at character None"),
        ({"text": ["Ada"], "answer_start": ["0"]}, "at character '0'"),
        ({"text": ["Ada", "it"], "answer_start": [0]}, "2 answers and 1 in answer_start"),
        ({"text": ["Ada"], "answer_start": {"0": 0}}, "1 answers and {'0': 0} in answer_start"),
        ({"text": ["Ada"], "answer_start": 0.0}, "1 answers and 0.0 in answer_start"),
        ({"text": None}, "wanted a string, or a list of them under text"),
        ({"answer": "Ada"}, "wanted a string, or a list of them under text"),
        ([{"text": "Ada", "answer_start": 1}], "the answer 'Ada' is not in its context at character 1"),
        ([{"text": "it"}, {"text": "Ada", "answer_start": 0}], "'it' is not in its context at character None"),
        ([{"answer_start": 0}], "answers = {'answer_start': [0]}: wanted a string, or a list of them under text"),
        ([{"text": ["Ada"], "answer_start": [0]}], "wanted a string, or a list of them under text"),
        ([{"text": "Ada", "answer_start": 0}, "it"], "wanted a string, or a list of them under text"),
        ([1], "wanted a string, or a list of them under text"),
        (3, "wanted a string, or a list of them under text"),
        ("[[", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
    ],
)
def test_bad_answers(answers, problem):
    fault(lambda: qa(answers), problem, begins="rows:1: ")


def test_answers():
    two = {"text": ["it", "good"], "answer_start": [10, 20]}
    assert qa(two) == qa(["it", "good"]) == qa(json.dumps(two)) == qa({"text": ["it", "good"]}) == two
    assert qa("it") == qa({"text": "it", "answer_start": 10}) == {"text": ["it"], "answer_start": [10]}
    nested = [{"text": "it", "answer_start": 10}, {"text": "good", "answer_start": 20}]  # as SQuAD's own files have it
    assert qa(nested) == qa(json.dumps(nested)) == qa([{"text": "it"}, {"text": "good"}]) == two
    none = {"text": [], "answer_start": []}
    assert qa("") == qa([]) == qa(" ") == qa(none) == qa([""]) == none
    assert qa({"text": ["", "it"], "answer_start": [0, 10]}) == {"text": ["it"], "answer_start": [10]}
    assert qa("it", "it or it") == {"text": ["it"], "answer_start": [0]}  # where it is first found
    # An answer that looks like JSON is an answer where the context has it.
    assert qa("[]", "the default is [].") == {"text": ["[]"], "answer_start": [15]}
    assert qa("{x}", "the set {x}") == {"text": ["{x}"], "answer_start": [8]}
    assert qa("🚀", "👩‍🚀 flies") == {"text": ["🚀"], "answer_start": [2]}  # in code points


def test_an_answer_in_another_normal_form():
    """é is one character or two: no match, and nothing to be seen. An answer that is elsewhere has no such excuse."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for answer, context in ((composed, f"the {apart} is"), (apart, f"the {composed} is")):
        for answers in (answer, {"text": [answer], "answer_start": [4]}):
            hint = "its context has it in another Unicode normal form (NFC or NFD)"
            fault(lambda a=answers, c=context: qa(a, c), "is not in its context", hint, begins="rows:1: ")
    for answers, context in (("tea", f"the {apart}"), ({"text": [composed], "answer_start": [0]}, f"the {composed}")):
        with pytest.raises(ValueError) as caught:
            qa(answers, context)
        assert "Unicode" not in str(caught.value)


def test_columns_without_a_name_may_be_many(tmp_path):
    """A spreadsheet's empty columns are no fields, and lose nothing."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label,,\na,x,,\n")
    assert read_examples(path, "classify")[0][0]["label"] == "x"


def test_numbers_bools_and_spaces_of_labels():
    def label(value):
        return check_row({"text": "a", "label": value}, "classify", "rows:1")["label"]

    values = (0, 12, -1, True, False, " good ", "good")
    assert [label(v) for v in values] == ["0", "12", "-1", "True", "False", "good", "good"]
    assert label("1.0") == "1.0"  # a cell of a .csv is text, whatever it looks like
    row = check_row({"tokens": ["a", " b "], "tags": [3, " O"]}, "tag", "rows:1")
    assert (row["tokens"], row["tags"]) == (["a", " b "], ["3", "O"])


def test_key():
    def key(task="classify", **key):
        return check_row(GOOD[task][0] | key, task, "rows:1")["key"]

    assert [key(), key(key=""), key(key=None), key(key="k"), key(key=0)] == ["text 0", "text 0", "text 0", "k", "0"]
    assert [key("tag"), key("qa"), key("seq2seq")] == ["Ada wrote 0", "0 is Ada.", "one 0"]


some_text, some_keys = (st.sampled_from(x.split("|")) for x in ("| |a|[|{}|\ud800|b\nc", "text|answer_start|x\n"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 30) | st.floats() | some_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(some_keys, inner, max_size=2),
    max_leaves=5,
)


@hypothesis.given(st.sampled_from(sorted(FIELDS)), st.data())
def test_any_row_is_checked_or_refused_in_one_line(task, data):
    """Valid fields, some replaced by any JSON value: a row that is checked again stays as it is, or one line."""
    row = dict(data.draw(st.sampled_from(GOOD[task])))
    for name in data.draw(st.lists(st.sampled_from([*FIELDS[task], "key"]), max_size=2)):
        row[name] = data.draw(json_values)
    try:
        new = check_row(row, task, "rows:1")
    except ValueError as error:
        assert str(error).startswith("rows:1: ") and len(str(error).splitlines()) == 1
    else:
        assert check_row(new, task, "rows:1") == new
        assert set(new) == {*FIELDS[task], "where", "key"} and json.loads(json.dumps(new)) == new


pieces = [b"text,label\n", ROW.encode(), b'"', b",", b"a,b\r\n", b"\r", b"\n", codecs.BOM_UTF8]


@hypothesis.given(st.sampled_from([".jsonl", ".csv"]), st.lists(st.binary(max_size=3) | st.sampled_from(pieces)))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, suffix, parts):
    path = tmp_path_factory.mktemp("x") / f"rows{suffix}"
    path.write_bytes(b"".join(parts))
    try:
        rows, val = read_examples(path, "classify")
    except ValueError as error:
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", str(error)) and len(str(error).splitlines()) == 1
    else:
        assert rows and val is None


@pytest.mark.parametrize("content", ["", "\n \n", "text,label\n", "\ufeff"])
def test_no_rows(tmp_path, content):
    suffix = ".csv" if "label" in content else ".jsonl"
    path = tmp_path / f"rows{suffix}"
    path.write_text(content)
    fault(lambda: read_examples(path, "classify"), "holds no examples; wanted rows of text, label", begins=f"{path}: ")
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train.jsonl", GOOD["classify"])
    path = path.rename(tmp_path / "folder" / f"validation{suffix}")  # empty is not the same as not there
    fault(lambda: read_examples(tmp_path / "folder", "classify"), "holds no examples", begins=f"{path}: ")


def test_paths(tmp_path):
    missing = tmp_path / "missing.csv"
    fault(lambda: read_examples(missing, "classify"), f"path '{missing}' does not exist")
    for name in ("rows.tsv", "rows"):
        path = tmp_path / name
        path.write_text("text\tlabel\n")
        fault(lambda path=path: read_examples(path, "classify"), f"{path}: wanted a .jsonl or .csv file of text, label")
    fault(
        lambda: read_examples(tmp_path, "classify"),
        "wanted a train.jsonl or train.csv of text, label",
        begins=str(tmp_path),
    )
    for call in (lambda: read_examples(tmp_path, "lm"), lambda: check_row({}, "lm", "")):
        fault(call, "task = 'lm': wanted classify, tag, qa, seq2seq")


def test_a_folder(tmp_path):
    rows = GOOD["classify"]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "train.backup.jsonl", [{"not": "read"}])
    jsonl(tmp_path / "test.jsonl", [{"not": "read"}])
    train, val = read_examples(tmp_path, "classify")
    assert [row["text"] for row in train] == [row["text"] for row in rows] and val is None
    for name, text in (("dev.jsonl", "c"), ("valid.jsonl", "b"), ("validation.csv", "a")):  # ever better names
        row = json.dumps({"text": text, "label": "good"})
        (tmp_path / name).write_text(f"text,label\n{text},good\n" if "csv" in name else row)
        assert [row["text"] for row in read_examples(tmp_path, "classify")[1]] == [text]
    assert read_examples(tmp_path, "classify")[1][0]["where"] == f"{tmp_path / 'validation.csv'}:2"
    (tmp_path / "train.csv").write_text("text,label\nlast,good\n")
    assert [row["text"] for row in read_examples(tmp_path, "classify")[0]] == [*(row["text"] for row in rows), "last"]


# ---- the datasets library ------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return datasets


@pytest.mark.parametrize("task", FIELDS)
def test_the_library_reads_the_same(tmp_path, datasets, task):
    jsonl(tmp_path / "data" / "train.jsonl", GOOD[task])
    jsonl(tmp_path / "data" / "validation.jsonl", GOOD[task][:2])
    hub, own = read_examples("hf:./data", task), read_examples("data", task)
    assert [bare(rows) for rows in hub] == [bare(rows) for rows in own]
    assert hub[1][1]["where"] == "hf:./data validation:2"


def test_the_library_reads_the_same_csv(tmp_path, datasets):
    content = 'text,label,key\n"one, ""two""\nthree",1,x\né,0,y\n"👩‍🚀",1,\n'
    (tmp_path / "data" / "train.csv").write_text(content, encoding="utf-8", newline="")
    hub, own = (read_examples(path, "classify")[0] for path in ("hf:./data", "data"))
    assert bare(hub) == bare(own) and [row["label"] for row in hub] == ["1", "0", "1"]
    (tmp_path / "data" / "train.csv").write_text("text,label\none,good\ntwo,\n")
    fault(lambda: read_examples("hf:./data", "classify"), "found nothing under label", begins="hf:./data train:2: ")
    (tmp_path / "data" / "train.csv").write_text("text,label\none,1\ntwo,\n")
    fault(lambda: read_examples("hf:./data", "classify"), "label", begins="hf:./data train:")


def test_label_numbers_become_names(tmp_path, datasets):
    names, tags = ["neg", "pos"], ["O", "B-PER", "I-PER"]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    features["tokens"] = datasets.Sequence(datasets.Value("string"))
    features["tags"] = datasets.Sequence(datasets.ClassLabel(names=tags))

    def write(part, labels, tag_ids):
        columns = {"text": ["a", "b"], "label": labels, "tokens": [["x", "y"], ["z"]], "tags": tag_ids}
        file = tmp_path / "data" / f"{part}.parquet"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)

    write("train", [1, 0], [[1, 2], [0]])
    write("test", [-1, 0], [[0, -1], [0]])
    write("validation", [0, 1], [[0, 0], [1]])
    train, val = read_examples("hf:./data", "classify")  # the labels of test are held back; it is not asked for
    assert [row["label"] for row in train + val] == ["pos", "neg", "neg", "pos"]
    train, val = read_examples("hf:./data", "tag")
    assert [row["tags"] for row in train + val] == [["B-PER", "I-PER"], ["O"], ["O", "O"], ["B-PER"]]
    assert names[-1] == "pos"  # the wrong variant: a label that is not told becomes the last class
    write("train", [0, -1], [[0, -1], [0]])
    fault(lambda: read_examples("hf:./data", "classify"), "found nothing under label", begins="hf:./data train:2: ")
    fault(lambda: read_examples("hf:./data", "tag"), "tags[1] = None", begins="hf:./data train:1: ")


def test_a_declared_class_without_a_row(tmp_path, datasets):
    """The numbers below it would still be right, but a model could never say its name."""

    def write(part, labels, tag_ids):
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "never"])}
        features["tokens"] = datasets.Sequence(datasets.Value("string"))
        features["tags"] = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
        columns = {"text": ["a", "b", "c"], "label": labels, "tokens": [["x", "y"], ["z"], ["w"]], "tags": tag_ids}
        file = tmp_path / "data" / f"{part}.parquet"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)

    write("train", [1, 0, 0], [[0, 1], [0], [2]])
    write("validation", [2, 2, 2], [[0, 0], [0], [0]])  # what validates need not hold all, nor does it help
    fault(lambda: read_examples("hf:./data", "classify"), "no row has the label 'never'", begins="hf:./data train: ")
    assert len(read_examples("hf:./data", "tag")[0]) == 3  # its own column alone is asked
    write("train", [1, 0, 2], [[0, 1], [0], [1]])
    fault(lambda: read_examples("hf:./data", "tag"), "no row has the label 'I-PER'", begins="hf:./data train: ")
    assert len(read_examples("hf:./data", "classify")[1]) == 3


@pytest.mark.parametrize(
    "parts, wanted",
    [
        ("train test", ("train", "test")),
        ("train", ("train", None)),
        ("test", ("test", None)),
        ("test train validation", ("train", "validation")),
        ("validation test", ("validation", "test")),
    ],
)
def test_parts_of_the_library(tmp_path, datasets, parts, wanted):
    for part in parts.split():
        jsonl(tmp_path / "data" / f"{part}.jsonl", [{"text": f"{part} {i}", "label": "x"} for i in range(2)])
    found = [rows and rows[0]["text"].split()[0] for rows in read_examples("hf:./data", "classify")]
    assert tuple(found) == wanted


def test_an_empty_part_of_the_library(tmp_path, datasets):
    jsonl(tmp_path / "data" / "train.jsonl", GOOD["classify"])
    jsonl(tmp_path / "data" / "validation.jsonl", [])
    fault(lambda: read_examples("hf:./data", "classify"), begins="hf:./data: cannot be loaded: ")


def test_faults_of_the_library(tmp_path, datasets, monkeypatch):
    jsonl(tmp_path / "data" / "train.jsonl", [{"text": "a", "lable": "x"}])
    fault(
        lambda: read_examples("hf:./data", "classify"), "found the fields 'text', 'lable'", begins="hf:./data train:1: "
    )
    for name in ("./nothing", "nobody/nothing"):
        fault(lambda name=name: read_examples(f"hf:{name}", "classify"), "cannot be loaded: ", begins=f"hf:{name}: ")
    (tmp_path / "data" / "train.jsonl").write_text('{"text": \n')
    fault(lambda: read_examples("hf:./data", "classify"), "cannot be loaded: ", begins="hf:./data: ")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_examples("hf:./data", "classify")


# ---- the split -----------------------------------------------------------------------------------------------------


def row(key, label=None, n=1):
    return {"key": str(key), "where": f"rows:{n}"} | ({} if label is None else {"label": label})


labelled = st.lists(st.tuples(st.integers(0, 25), st.sampled_from("aaaaaabbc")), min_size=2, max_size=40)


def spare(rows):
    """Whether some key can be taken from training: brute force over the definition."""
    keys = {r["key"] for r in rows}
    return any({r["label"] for r in rows if r["key"] == k} <= {r["label"] for r in rows if r["key"] != k} for k in keys)


@hypothesis.given(labelled, st.sampled_from([0.01, 0.1, 0.5, 0.99]), st.randoms(use_true_random=False))
def test_split(pairs, share, rng):
    rows = [row(key, label, n) for n, (key, label) in enumerate(pairs)]
    if len({r["key"] for r in rows}) < 2 or not spare(rows):
        return fault(lambda: split(rows, None, share), "wanted", begins="rows:0: ")
    train, val = split(rows, None, share)
    assert train and val and sorted(train + val, key=lambda r: int(r["where"][5:])) == rows
    assert [r for r in rows if r in train] == train and [r for r in rows if r in val] == val  # in order
    assert not {r["key"] for r in train} & {r["key"] for r in val}
    assert {r["label"] for r in train} == {r["label"] for r in rows}  # rare ones too
    shuffled = rng.sample(rows, len(rows))
    assert {r["where"] for r in split(shuffled, None, share)[1]} == {r["where"] for r in val}  # of no order
    # A key below the share is in training only for a label that nothing else there has.
    for r in train:
        if int(hashlib.sha256(r["key"].encode()).hexdigest(), 16) < int(share * 2**256):
            own = {x["label"] for x in train if x["key"] == r["key"]}
            assert not own <= {x["label"] for x in train if x["key"] != r["key"]}


def below(key, share):
    return int.from_bytes(hashlib.sha256(str(key).encode()).digest(), "big") / 2**256 < share


def test_split_is_the_hash_of_the_key():
    """So it has the share that is asked for, and no row moves when others come or go."""
    rows = [row(i) for i in range(20_000)]
    for share in (0.1, 0.25):
        train, val = split(rows, validation=share)
        assert {r["key"] for r in val} == {str(i) for i in range(20_000) if below(i, share)}
        assert abs(len(val) / len(rows) - share) < 4 * math.sqrt(share * (1 - share) / len(rows))
    few_train, few_val = split(rows[::3])
    train, val = split(rows)
    side = {r["key"]: "train" for r in train} | {r["key"]: "val" for r in val}
    assert all(side[r["key"]] == "train" for r in few_train) and all(side[r["key"]] == "val" for r in few_val)

    def shuffled(rows):  # the wrong variant: a seeded shuffle
        order = random.Random(0).sample(rows, len(rows))
        return order[len(rows) // 10 :], order[: len(rows) // 10]

    _, few_val = shuffled(rows[::3])
    assert any(r in shuffled(rows)[0] for r in few_val)


def test_split_of_given_parts_and_of_too_little():
    train, val = [row(1, "a")], [row(1, "b")]
    assert split(train, val) == (train, val)
    fault(
        lambda: split([row("x", "a")] * 3), "wanted at least two different rows", "among the 3 rows", begins="rows:1: "
    )
    fault(lambda: split([row(i, str(i)) for i in range(9)]), "wanted a row whose labels other rows have too")
    for share in (0, 1, -0.1, math.nan):
        fault(lambda share=share: split([row(1), row(2)], None, share), "0 < validation < 1", f"validation = {share}")
    fault(lambda: split([]), "wanted rows")
    for share in (1e-9, 1 - 1e-9):  # both parts have a row
        for label in ("a", None):
            train, val = split([row(i, label) for i in range(50)], None, share)
            assert min(len(train), len(val)) == 1


def test_a_rare_label_is_trained_on():
    """Also where its key alone would be in validation: there the plain cut by the hash loses it."""
    inside = next(i for i in itertools.count() if below(i, 0.1))
    outside = [i for i in range(20) if not below(i, 0.1)]
    rows = [row(inside, "rare"), *(row(i, "ab"[i % 2]) for i in outside)]
    assert "rare" not in {r["label"] for r in rows if not below(r["key"], 0.1)}
    train, val = split(rows)
    assert label_names(train, val) == ("a", "b", "rare") and len(val) == 1
    both = [i for i in itertools.islice(filter(lambda i: below(i, 0.1), itertools.count()), 2)]
    train, val = split([row(i, "rare") for i in both] + rows[1:])  # one of the two is enough
    assert collections.Counter(r["label"] for r in train)["rare"] == 1 == len(val)


# ---- labels --------------------------------------------------------------------------------------------------------


def test_label_names():
    assert [labels_of(r) for r in (row(1, "x"), {"tags": ["O", "B"]}, {"source": "a"})] == [["x"], ["O", "B"], []]
    assert label_names([row(1, "b"), row(2, "a"), row(3, "b")], [row(4, "a")]) == ("a", "b")
    assert label_names([{"tags": ["O", "B-X"], "where": ""}], []) == ("B-X", "O")
    assert label_names([{"source": "a", "where": ""}], []) == ()
    fault(
        lambda: label_names([row(1, "a", 7)], []),
        "every row has the label 'a'; wanted at least two labels",
        begins="rows:7: ",
    )
    fault(lambda: label_names([{"tags": ["O", "O"], "where": "rows:1"}], []), "every row has the label 'O'")


def test_labels_that_training_has_not_seen(tmp_path):
    """In a validation file, or in one that comes later: the file, the row, the label, and those that are known."""
    jsonl(tmp_path / "train.jsonl", GOOD["classify"])
    path = jsonl(tmp_path / "validation.jsonl", [*GOOD["classify"][:2], {"text": "c", "label": "ne\nutral"}])
    parts = split(*read_examples(tmp_path, "classify"))
    problem = r"the label 'ne\nutral' was not seen in training; known: 'bad', 'good'"
    fault(lambda: label_names(*parts), problem, begins=f"{path}:3: ")
    fault(lambda: check_labels(read_examples(path, "classify")[0], ("bad", "good")), problem, begins=f"{path}:3: ")
    many = [f"l{i:02}" for i in range(30)]
    fault(lambda: check_labels([{"tags": ["l00", "x"], "where": "rows:1"}], many), "known: 'l00', ", "'l08', ...")
    check_labels([row(1, "bad"), {"source": "a"}], ("bad", "good"))
