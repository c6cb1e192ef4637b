# SPDX-License-Identifier: MIT
"""minimal/stdlib_tasks.py against imported modules (inspect), syntax trees, characters counted by hand, and data.py."""

import ast
import hashlib
import importlib
import inspect
import io
import itertools
import json
import keyword
import os
import re
import subprocess
import sys
import time
import tokenize
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimal import data as D
from minimal import stdlib_tasks as S

TASKS = ["prose", "areas", "signatures", "lexical", "questions"]
RERUN = """
import itertools, json, runpy, sys
tasks = runpy.run_path(sys.argv[1])
for task in sys.argv[2:]:
    rows = itertools.islice(tasks[task](), 500 if task == "lexical" else None)  # the slowest, and no set is in it
    print(json.dumps([dict(r, key=len(r["key"])) for r in rows]))
"""


@pytest.fixture(scope="module")
def rows():
    """Every row of every task, and the processor time that each took."""
    S._library.cache_clear()
    found, S.seconds = {}, {}
    for task in TASKS:
        began = time.process_time()
        found[task] = list(getattr(S, task)())
        S.seconds[task] = time.process_time() - began
    return found


@pytest.fixture
def library(monkeypatch):
    """A function that puts files in the place of the standard library: library(module=source, ...)."""

    def use(**files):
        parsed = [(name, source, S._entries(ast.parse(source), name)) for name, source in files.items()]
        monkeypatch.setattr(S, "_library", lambda: parsed)

    return use


# --- all tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_plain_and_clean(rows, task):
    def texts(value):
        if isinstance(value, str):
            return [value]
        assert isinstance(value, (list, dict, int)), value
        if isinstance(value, int):
            return []
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in texts(v)]

    for row in rows[task]:
        assert isinstance(row["key"], str) and row["key"].strip()
        own = texts({k: v for k, v in row.items() if k != "key"})
        assert all(text.strip() for text in own)
        assert (joined := "\n".join(own)) == S.clean(joined)
    # of `lexical` some are equal: two files may start with the same licence
    assert len({repr([v for k, v in r.items() if k != "key"]) for r in rows[task]}) > 0.99 * len(rows[task])


def test_enough_rows_and_soon(rows):
    least = {"prose": 4000, "areas": 5000, "signatures": 4500, "lexical": 9000, "questions": 8000}
    assert {t: len(rows[t]) >= n for t, n in least.items()} == dict.fromkeys(TASKS, True)
    assert len(rows["lexical"]) <= 13000
    assert max(S.seconds.values()) < 20  # on an idle core the slowest takes 5


def test_two_runs_are_equal_whatever_the_hash_seed(rows):
    env = dict(os.environ, PYTHONHASHSEED="7" if os.environ.get("PYTHONHASHSEED") != "7" else "8")
    command = [sys.executable, "-c", RERUN, S.__file__, *TASKS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    for task, line in zip(TASKS, done.stdout.splitlines(), strict=True):
        here = [dict(r, key=len(r["key"])) for r in rows[task][: 500 if task == "lexical" else None]]
        assert json.loads(line) == here, task


def test_keys_divide_into_training_and_validation(rows):
    """By the hash of its key about a tenth of each task's rows is held out: no key is most of a task."""
    for task in TASKS:
        hashes = {key: hashlib.sha256(key.encode()).hexdigest() for key in {r["key"] for r in rows[task]}}
        held = [int(hashes[r["key"]], 16) < 2**256 // 10 for r in rows[task]]
        assert 0.05 < sum(held) / len(held) < 0.18, task


def test_the_files_are_those_of_data():
    """So that what `stdlib_source` validates there is no training row here: the keys are equal."""
    assert [source for _, source, _ in S._library()] == [d.key for d in D.stdlib_source()]


def test_module_names_are_those_to_import():
    names = [module for module, _, _ in S._library()]
    assert len(set(names)) == len(names)
    assert {"json", "json.decoder", "os", "email.mime.text", "xml.dom", "asyncio.events"} <= set(names)
    assert not [n for n in names if set(n.split(".")) & {"test", "tests", "site-packages", "__init__"}]


# --- docstrings and signatures ----------------------------------------------------------------------------------------

IMPORTED = ["textwrap", "shutil", "json.decoder", "statistics", "queue", "argparse", "difflib", "random", "logging"]


def members(module):
    """(name, object) of what a module defines itself: functions, classes, and plain functions in its classes."""
    for name, obj in vars(module).items():
        if getattr(obj, "__module__", None) == module.__name__ and getattr(obj, "__name__", None) == name:
            if inspect.isfunction(obj) or inspect.isclass(obj):
                yield name, obj
            if inspect.isclass(obj):
                yield from ((n, f) for n, f in vars(obj).items() if inspect.isfunction(f) and f.__name__ == n)


@pytest.mark.parametrize("name", IMPORTED)
def test_entries_are_what_the_imported_module_says_of_itself(name):
    module = importlib.import_module(name)
    entries = next(entries for n, _, entries in S._library() if n == name)
    found = {(e.name, e.doc): e for e in entries}
    checked = 0
    for known, obj in members(module):
        file = inspect.unwrap(obj).__code__.co_filename if inspect.isfunction(obj) else module.__file__
        if not obj.__doc__ or file != module.__file__ or hasattr(obj, "__wrapped__"):
            continue  # also what dataclasses and named tuples make: it is in no source
        if inspect.isclass(obj) and obj.__doc__.startswith(f"{known}("):
            continue
        entry = found[known, S.clean(inspect.cleandoc(obj.__doc__)).strip()]
        checked += 1
        if inspect.isfunction(obj):
            node = ast.parse(f"def {entry.signature}: pass").body[0]
            assert node.name == known
            args = node.args
            args.defaults = [ast.Constant(0) for _ in args.defaults]  # as written they may name what only a class knows
            args.kw_defaults = [d and ast.Constant(0) for d in args.kw_defaults]
            exec(ast.unparse(node), space := {})
            mine = inspect.signature(space[known]).parameters.values()
            shape = [(p.name, p.kind, p.default is p.empty) for p in mine]
            real = inspect.signature(obj).parameters.values()
            assert shape == [(p.name, p.kind, p.default is p.empty) for p in real]
        else:
            assert entry.signature.split("(")[0] == f"class {known}"
    assert checked >= 5


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("def f(): 'd'", "f()"),
        ("def f(a, /, b: int, *c: str, d: int = 1, **e) -> int: 'd'", "f(a, /, b, *c, d=1, **e)"),
        ("async def f(self, *, x: 'A' = \"q\"): 'd'", "f(self, *, x='q')"),
        ("def f(a=lambda x: (x, -1), *, b=A.B[0]): 'd'", "f(a=lambda x: (x, -1), *, b=A.B[0])"),
        ("class A(B, metaclass=M): 'd'", "class A(B)"),
        ("class A: 'd'", "class A"),
    ],
)
def test_signatures_by_hand(source, wanted):
    tree = ast.parse(source)
    before = ast.dump(tree)
    assert [e.signature for e in S._entries(tree, "m")] == [wanted]
    assert ast.dump(tree) == before  # annotations are left out of a copy, not out of the caller's tree


def test_entries_by_hand():
    source = '"""Top."""\nclass A:\n    """Of A.\n\n      Indented.\n    Not.\n    """\n'
    source += '    def f(self):\n        """Of f.\x07"""\n'
    source += "        def g():\n            'Of g.'\n    def h(self): pass\n    def i(self): '  '\ndef j(): b'bytes'\n"
    assert S._entries(ast.parse(source), "m") == [
        ("module", "m", "m", "Top."),
        ("class", "A", "class A", "Of A.\n\n  Indented.\nNot."),
        ("function", "f", "f(self)", "Of f."),
        ("function", "g", "g()", "Of g."),
    ]


def test_signatures_are_python_and_annotations_are_gone(rows):
    for row in rows["signatures"]:
        node = ast.parse(f"def {row['target']}: pass").body[0]
        assert isinstance(node, ast.FunctionDef) and not re.fullmatch("__.*__", node.name)
        assert not [a for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation]
        assert len(row["source"].split()) >= 3 and len(row["source"]) <= 200 and len(row["target"]) <= 100
        assert row["key"] == row["source"] and f"{node.name}(" not in row["source"]


def test_signatures_of_a_module_by_hand(library):
    library(
        m='def f(a: int = 2):\n    "Do this thing. Then more."\ndef g():\n    "Too short."\ndef __len__(self):\n    '
        '"Of one special method."\ndef h(x):\n    "Calls h(x) for you."\nclass A:\n    "A class of things."\n'
        'def f(a: str = 2):\n    "Do this thing."\ndef k(b):\n    "Do this thing."\n'
    )
    assert list(S.signatures()) == [
        {"source": "Do this thing.", "target": "f(a=2)", "key": "Do this thing."},
        {"source": "Do this thing.", "target": "k(b)", "key": "Do this thing."},
    ]


# --- sentences and prose ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("One thing.  Two\n  things? Yes! done", ["One thing.", "Two things?", "Yes! done"]),
        ("A title\n*******\n\nBody text", ["A title", "Body text"]),
        ("See 3.11. Or 1. First, e.g. This and i.e. That.", ["See 3.11. Or 1. First, e.g. This and i.e. That."]),
        ('He said so. "Quoted." (Bracket.) `Code`', ["He said so.", '"Quoted." (Bracket.) `Code`']),
        ("Wait... What? No.", ["Wait... What?", "No."]),
        ("Use:\n\n    >>> f()\n    Out. Put.\n    ...\n\nAfter.", ["Use:", "After."]),
        ("Text.\n>>> f()\n3", ["Text."]),
        ("Items\n - one\n   more\n * two", ["Items", "- one more", "* two"]),
        ("Args:\n  x: the x\n  y", ["Args:", "x: the x y"]),
        ("Intro.\n\na    table row\nb    other\n\nEnd.", ["Intro.", "End."]),
        ("", []),
        (" \n\n ---- \n", []),
        (">>> f()", []),
    ],
)
def test_sentences_by_hand(text, wanted):
    assert S.sentences(text) == wanted


@given(st.text(alphabet="ab A.?!\n:-*>", max_size=60))
def test_sentences_invent_nothing(text):
    found = S.sentences(text)
    assert all(s and s == " ".join(s.split()) for s in found)
    rest = iter(text.split())  # the words of the sentences are words of the text, in its order
    assert all(word in rest for s in found for word in s.split())


def test_sentences_take_linear_time():
    for text in (">>> a\n" * 20000, "a\n" * 50000, "x " * 50000 + "\n", ". A" * 30000, "    " * 30000, "\n>>>" * 20000):
        began = time.process_time()
        S.sentences(text)
        assert time.process_time() - began < 2


def test_prose_is_the_language_reference_and_docstrings(rows):
    topics = [d.text for d in itertools.takewhile(lambda d: not d.key, D.stdlib_prose())]  # its files have keys
    texts = [row["text"] for row in rows["prose"]]
    assert texts[: len(topics)] == [D.clean(t).strip() for t in topics]
    assert len(topics) > 20 and len(set(texts)) == len(texts)
    assert all(row["key"] == row["text"] and len(row["text"].split()) >= 12 for row in rows["prose"])
    assert S.clean(inspect.cleandoc(os.walk.__doc__)).strip() in texts
    assert sum(len(S.sentences(t)) >= 2 for t in texts) > 3000  # what next-sentence pairs are made of


def test_prose_leaves_out_labels_and_repetitions(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # some distributions lack it
    long = "one two three four five six seven eight nine ten eleven twelve"
    library(m=f'"{long}"\nclass A:\n    "{long}"\n    def f(): "{long[:-7]}"', n=f'"{long}."')
    assert [row["text"] for row in S.prose()] == [long, long + "."]


# --- areas ------------------------------------------------------------------------------------------------------------


def test_the_table_names_modules_once_and_spells_them_right():
    words = [module for modules in S._CHAPTERS.values() for module in modules.split()]
    assert len(words) == len(set(words)) == len(S.CHAPTERS)
    some = """aifc asynchat asyncore binhex cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap nntplib pipes
        smtpd sndhdr sunau telnetlib tomllib uu xdrlib sre_compile sre_constants sre_parse _compression
        _pydatetime _opcode_metadata""".split()
    assert set(words) - set(some) <= sys.stdlib_module_names  # some: not in every version from 3.10 on


def test_areas_have_labels_of_the_table_and_enough_docstrings(rows):
    counts = Counter(row["label"] for row in rows["areas"])
    assert set(counts) <= set(S._CHAPTERS) and min(counts.values()) >= 40
    assert 20 < len(counts) < len(S._CHAPTERS)
    assert max(counts.values()) < 0.2 * len(rows["areas"])
    texts = [row["text"] for row in rows["areas"]]
    assert len(set(texts)) == len(texts) and all(row["key"] == row["text"] for row in rows["areas"])
    assert all(len(t.split()) >= 5 for t in texts)


@pytest.mark.parametrize(
    "function, label",
    [
        ("textwrap.dedent", "Text Processing Services"),
        ("calendar.isleap", "Data Types"),
        ("shutil.copyfileobj", "File and Directory Access"),
        ("statistics.median", "Numeric and Mathematical Modules"),
        ("concurrent.futures.as_completed", "Concurrent Execution"),
        ("asyncio.gather", "Networking and Interprocess Communication"),
        ("xml.dom.minidom.parseString", "Structured Markup Processing Tools"),
        ("urllib.parse.urljoin", "Internet Protocols and Support"),
        ("inspect.getsource", "Python Runtime Services"),
        ("ast.literal_eval", "Python Language Services"),
        ("functools.wraps", "Functional Programming Modules"),
    ],
)
def test_areas_of_known_functions(rows, function, label):
    module, name = function.rsplit(".", 1)
    obj = getattr(importlib.import_module(module), name)
    doc = S.clean(inspect.cleandoc(obj.__doc__)).strip()
    assert [row["label"] for row in rows["areas"] if row["text"] == doc] == [label]


def test_areas_by_hand(library, monkeypatch):
    monkeypatch.setattr(S, "LEAST", 1)
    library(**{
        "json.a": '"Common to two of them all."\ndef f():\n    "Only here, but two times here."',
        "json": 'def f():\n    "Only here, but two times here."\n    def g(): "Too short by one"',
        "xml.b": '"Common to two of them all."\ndef f():\n    "And this one is markup\\x07."',
        "idlelib.c": '"Belongs to no chapter at all."',
        "jsonb": '"Its name starts like json, only."',
    })  # fmt: skip
    assert [(r["text"], r["label"], r["key"]) for r in S.areas()] == [
        ("Only here, but two times here.", "Internet Data Handling", "Only here, but two times here."),
        ("And this one is markup.", "Structured Markup Processing Tools", "And this one is markup."),
    ]
    monkeypatch.setattr(S, "LEAST", 2)
    assert not list(S.areas())


# --- lexical ----------------------------------------------------------------------------------------------------------


def by_hand(source):
    """Pieces and tags by one class per character, and a walk over the characters: no expression, no offsets."""
    rows = [["OP"] * (len(line) + 1) for line in source.split("\n")]
    open_strings = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name, begin = tokenize.tok_name[token.type], token.start
        if name.endswith("STRING_START"):
            open_strings.append(begin)
        if name.endswith("STRING_END"):  # the parts between have gaps: "{{" is a middle of one character
            name, begin = "STRING", open_strings.pop()
        if name == "NAME" and keyword.iskeyword(token.string):
            name = "KEYWORD"
        if name in ("NAME", "NUMBER", "STRING", "COMMENT", "KEYWORD"):
            (row, column), end = begin, token.end
            while (row, column) < end:
                if column < len(rows[row - 1]):
                    rows[row - 1][column] = name
                    column += 1
                else:
                    row, column = row + 1, 0
    pieces, tags, word = [], [], False
    for char, tag in zip(source, itertools.chain(*rows), strict=False):
        part = char.isalnum() or char == "_"
        if part and word:
            pieces[-1] += char
        elif not char.isspace():
            pieces.append(char)
            tags.append(tag)
        word = part
    return pieces, tags


def test_lexical_against_characters(rows):
    """On every 9th file: each row is a cut of the file's pieces, at the places the module names."""
    of = {}
    for row in rows["lexical"]:
        of.setdefault(row["key"], []).append(row)
    same = 0
    for key in list(of)[::9]:
        pieces, tags = by_hand(D.clean(key))
        starts = range(0, len(pieces) - 47, S.STEP)
        assert len(of[key]) == len(starts)
        for row, at in zip(of[key], starts, strict=True):
            assert row["tokens"] == pieces[at : at + S.PIECES] and row["tags"] == tags[at : at + S.PIECES]
            same += 1
    assert same > 300


def test_lexical_against_the_syntax_tree():
    """Names, numbers and docstrings where ast says that they are."""
    for name in ("textwrap", "json.decoder", "random", "_strptime", "turtle"):
        source = D.clean(next(s for n, s, _ in S._library() if n == name))
        pieces, tags = S._tagged(source)
        at, found = {m.start(): i for i, m in enumerate(re.finditer(r"\w+|[^\w\s]", source))}, Counter()
        assert [m[0] for m in re.finditer(r"\w+|[^\w\s]", source)] == pieces
        lines = source.split("\n")
        starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))

        def offset(row, column, lines=lines, starts=starts):
            return starts[row - 1] + len(lines[row - 1].encode()[:column].decode())  # ast counts bytes

        tree = ast.parse(source)
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if id(node) in inside:
                continue
            if isinstance(node, (ast.Name, ast.arg)):
                assert tags[at[offset(node.lineno, node.col_offset)]] == "NAME"
                found["NAME"] += 1
            if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                first, end = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
                assert {tags[i] for p, i in at.items() if first <= p < end} == {"NUMBER"}
                found["NUMBER"] += 1
            if isinstance(node, ast.Constant) and (node.value is None or type(node.value) is bool):
                assert tags[at[offset(node.lineno, node.col_offset)]] == "KEYWORD"
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and type(node.value.value) is str:
                first, end = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
                assert {tags[i] for p, i in at.items() if first <= p < end} == {"STRING"}
                found["STRING"] += 1
        assert min(found["NAME"], found["STRING"]) > 5


def test_lexical_rows(rows):
    counts = Counter()
    for row in rows["lexical"]:
        assert 48 <= len(row["tokens"]) == len(row["tags"]) <= 56
        assert all(re.fullmatch(r"\w+|[^\w\s]", piece) for piece in row["tokens"])
        counts.update(row["tags"])
    assert set(counts) == {"KEYWORD", "NAME", "NUMBER", "STRING", "COMMENT", "OP"}
    assert min(counts.values()) > 0.005 * sum(counts.values()) and max(counts.values()) < 0.5 * sum(counts.values())


def test_a_piece_alone_does_not_tell_its_class(rows):
    """The variant that tags each piece by itself, as if it stood outside of strings and comments, is often wrong."""
    wrong = total = 0
    for row in rows["lexical"][::10]:
        for piece, tag in zip(row["tokens"], row["tags"], strict=True):
            word, number = piece[0].isalpha() or piece[0] == "_", piece[0].isdigit()
            alone = "KEYWORD" if keyword.iskeyword(piece) else "NAME" if word else "NUMBER" if number else "OP"
            wrong, total = wrong + (alone != tag), total + 1
    assert 0.3 < wrong / total < 0.7


@pytest.mark.parametrize(
    "source, pieces, tags",
    [
        ("x = 'a b' # if 1\n", "x = ' a b ' # if 1", "NAME OP STRING STRING STRING STRING COMMENT COMMENT COMMENT"),
        ("if 1.5e-3:\n    pass", "if 1 . 5e - 3 : pass", "KEYWORD NUMBER NUMBER NUMBER NUMBER NUMBER OP KEYWORD"),
        ("a = \\\n  b'''x\n1'''", "a = \\ b ' ' ' x 1 ' ' '", "NAME OP OP" + " STRING" * 9),
        ("é->f'{x!r:>{w}} y'\n", "é - > f ' { x ! r : > { w } } y '", "NAME OP OP" + " STRING" * 14),
        ("match _x:\n  case None: 1if 2", "match _x : case None : 1if 2", "NAME NAME OP NAME KEYWORD OP NUMBER NUMBER"),
        ("", "", ""),
    ],
)
def test_tagged_by_hand(source, pieces, tags):
    assert S._tagged(source) == (pieces.split(), tags.split())


def test_an_f_string_in_parts_is_one_string(monkeypatch):
    """Python 3.12 gives f'a{f"{b}"}c' + d as FSTRING_START, ..., nested; the kinds are put into tok_name here."""
    kinds = {901: "FSTRING_START", 902: "FSTRING_MIDDLE", 903: "FSTRING_END"}
    for kind, name in kinds.items():
        monkeypatch.setitem(tokenize.tok_name, kind, name)
    parts = [("f'", 901), ("a", 902), ("{", tokenize.OP), ('f"', 901), ("{", tokenize.OP), ("b", tokenize.NAME)]
    parts += [("}", tokenize.OP), ('"', 903), ("}", tokenize.OP), ("c", 902), ("'", 903), ("+", tokenize.OP)]
    parts += [("d", tokenize.NAME), ("", tokenize.ENDMARKER)]
    tokens, column = [], 2
    for text, kind in parts:
        tokens.append((kind, text, (2, column), (2, column + len(text)), ""))
        column += len(text)
    end = 10 + 2 + len("f'a{f\"{b}\"}c'")
    wanted = [(12, end, "STRING"), (end, end + 1, "OP"), (end + 1, end + 2, "NAME")]
    assert list(S._spans(tokens, [0, 0, 10])) == wanted


# --- questions --------------------------------------------------------------------------------------------------------


def asked(row):
    """(name, is it a class) of a question."""
    match = re.fullmatch(r"What does (\w+) do\?|What is (\w+)\?", row["question"])
    return match[1] or match[2], bool(match[2])


def line_above(row):
    """The line of the context before the one with the answer."""
    return row["context"][: row["answers"]["answer_start"][0]].split("\n")[-2]


def test_questions_have_exact_answers(rows):
    for row in rows["questions"]:
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        name, is_class = asked(row)
        assert type(start) is int and row["context"][start : start + len(answer)] == answer
        assert re.match(rf"class {name}(\(|$)" if is_class else rf"{name}\(", line_above(row))
        assert len(row["context"]) <= 900 and len(answer.split()) >= 3
        assert 4 <= sum(not line.startswith(" ") for line in row["context"].splitlines()) <= 6


def test_the_task_is_well_posed(rows):
    """The sentence below the line that starts with the name is the answer; the first sentence seldom is. And searching
    for the answer's text would give wrong offsets, as sentences repeat ("Return the value.")."""
    below = first = elsewhere = 0
    places = Counter()
    for row in rows["questions"]:
        context, (answer,), (start,) = row["context"], row["answers"]["text"], row["answers"]["answer_start"]
        lines = context.split("\n")
        heads = [i for i, line in enumerate(lines) if line and line[0] != " "]
        named = [i for i in heads if re.match(rf"(class )?{asked(row)[0]}(\(|$)", lines[i])]
        assert len(named) == 1
        below += S.sentences(lines[named[0] + 1])[0] == answer
        first += S.sentences(lines[1])[0] == answer
        elsewhere += context.find(answer) != start
        places[heads.index(named[0])] += 1
    n = len(rows["questions"])
    assert below > 0.99 * n and first < 0.25 * n and elsewhere > 20
    assert set(places) == set(range(6)) and max(places.values()) < 0.22 * n and min(places.values()) > 0.08 * n


def test_a_function_is_asked_at_different_places(rows):
    """Twice at most for one definition, each time in another context and with another offset."""
    of = {}
    for row in rows["questions"]:
        of.setdefault((row["key"], row["question"], row["answers"]["text"][0], line_above(row)), []).append(row)
    twice = 0
    for same in of.values():
        contexts = [r["context"] for r in same]
        assert len(set(contexts)) == len(contexts)
        if len(same) == 2:
            twice += 1
            assert same[0]["answers"]["answer_start"] != same[1]["answers"]["answer_start"]
    assert twice > 0.5 * len(of)


def test_questions_by_hand():
    source = '"Top of the module."\ndef a(x):\n    "Do the a.\\n\\nmore of it"\nclass B(C):\n    "A kind of B."\n'
    source += '    def __init__(self):\n        "Make one of them."\n    def a(self):\n        "Do the a."\n'
    source += '    def c(self):\n        "Take c away. Then e.g. Put it. Last."\ndef d():\n    "Too short"\n'
    rows = list(S._questions(S._entries(ast.parse(source), "m"), "the key"))
    context = "a(x)\n    Do the a.\n    more of it\nclass B(C)\n    A kind of B.\na(self)\n    Do the a.\n"
    context += "c(self)\n    Take c away. Then e.g. Put it.\n"
    assert rows == [
        {"question": "What is B?", "context": context, "key": "the key",
         "answers": {"text": ["A kind of B."], "answer_start": [context.index("A kind")]}},
        {"question": "What does c do?", "context": context, "key": "the key",
         "answers": {"text": ["Take c away."], "answer_start": [context.index("Take")]}},
    ]  # fmt: skip


@given(st.lists(st.integers(1, 400), max_size=25), st.sampled_from([0, 3]))
def test_windows_hold_every_entry_once(lengths, start):
    entries = [S.Entry("function", f"f{i}", f"f{i}()", "x" * n) for i, n in enumerate(lengths)]
    windows = list(S._windows(entries, start))
    assert [e for window in windows for e, _, _ in window] == entries[start:]
    for window, after in zip(windows, [*windows[1:], []], strict=True):
        size = sum(len(shown) for _, _, shown in window)
        assert len(window) <= 6 and size <= 900
        assert not after or len(window) == 6 or size + len(after[0][2]) > 900  # full, by one or the other
