# SPDX-License-Identifier: MIT
"""Labelled data for five tasks, real and without a download: the standard library of the Python that is running.

Each task has the form of a known one, and takes its rows from the library's source and from pydoc's topics:

    prose       text                                sentences in their order, as for BERT's pretraining (Devlin et al.,
                                                    2018, arXiv 1810.04805): masked words, next sentence or not
    areas       docstring -> chapter of the manual  classification of a text
    lexical     pieces of source -> their classes   tagging, as of named entities (Tjong Kim Sang & De Meulder, 2003,
                                                    arXiv cs/0306050): a piece needs its context
    signatures  sentence -> signature               text to code, the pairs of CodeSearchNet (Husain et al., 2019,
                                                    arXiv 1909.09436) cut down to a function's first line
    questions   question, context -> span           extractive answers in the layout of SQuAD (Rajpurkar et al., 2016,
                                                    arXiv 1606.05250): context[start : start + len(answer)] == answer

Nothing is random and nothing is invented but the form of a question: two runs give equal rows. Rows have a "key": split
by its hash, as `split` in data.py does, so that equal keys never straddle training and validation; hash each key once,
as those of `lexical` and `questions` are whole files. The number of rows depends on the version of Python.

Departures: no annotator has seen a row. The chapters are those of Python 3.10's manual, the last that listed cgi, uu or
telnetlib by their subject (3.11 gathered them under "Superseded Modules"; imp and optparse, which were there already,
stand beside importlib and argparse here). Left out: chapters with under 40 docstrings (from 3.12 on, which has no
distutils, also "Software Packaging and Distribution"), idlelib (a program about everything), and what is in no chapter.

    rows = list(areas())                                    # [{"text": ..., "label": "Data Types", "key": ...}, ...]
    held = [r for r in rows if int(hashlib.sha256(r["key"].encode()).hexdigest(), 16) < 0.05 * 2**256]
    first, *others = sentences(next(prose())["text"])
"""

import ast
import contextlib
import functools
import io
import keyword
import os
import re
import sysconfig
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PIECES, STEP = 56, 176  # pieces in a row of `lexical`, and from one row's start to the next: about 12,000 rows in all
LEAST = 40  # docstrings of a chapter in `areas`: a classifier learns nothing of fewer, and validation would hold two
FEWEST, MOST, LONGEST = 4, 6, 900  # entries in a context of `questions`; its characters, so that 256 tokens can hold it

_CHAPTERS = {
    "Text Processing Services": "string re sre_compile sre_constants sre_parse difflib textwrap stringprep rlcompleter",
    "Binary Data Services": "struct codecs encodings",
    "Data Types": """datetime _pydatetime zoneinfo calendar collections _collections_abc heapq bisect weakref
        _weakrefset types copy pprint reprlib enum graphlib""",
    "Numeric and Mathematical Modules": "numbers decimal _pydecimal fractions random statistics",
    "Functional Programming Modules": "itertools functools operator",
    "File and Directory Access": """pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch
        linecache shutil""",
    "Data Persistence": "pickle _compat_pickle copyreg shelve dbm sqlite3",
    "Data Compression and Archiving": "gzip bz2 lzma _compression zipfile tarfile",
    "File Formats": "csv configparser tomllib netrc xdrlib plistlib",
    "Cryptographic Services": "hashlib hmac secrets",
    "Generic Operating System Services": """os io _pyio _strptime argparse optparse getopt logging getpass curses
        platform ctypes""",
    "Concurrent Execution": "threading _threading_local multiprocessing concurrent subprocess sched queue contextvars",
    "Networking and Interprocess Communication": "asyncio socket ssl selectors asyncore asynchat signal",
    "Internet Data Handling": "email json mailcap mailbox mimetypes base64 binhex quopri uu",
    "Structured Markup Processing Tools": "html _markupbase xml",
    "Internet Protocols and Support": """webbrowser cgi cgitb wsgiref urllib nturl2path http ftplib poplib imaplib
        nntplib smtplib smtpd telnetlib uuid socketserver xmlrpc ipaddress""",
    "Multimedia Services": "aifc sunau wave chunk colorsys imghdr sndhdr",
    "Internationalization": "gettext locale",
    "Program Frameworks": "turtle turtledemo cmd shlex",
    "Graphical User Interfaces with Tk": "tkinter",
    "Development Tools": "typing pydoc doctest unittest lib2to3",
    "Debugging and Profiling": "bdb pdb cProfile profile pstats timeit trace tracemalloc",
    "Software Packaging and Distribution": "distutils ensurepip venv zipapp",
    "Python Runtime Services": """sysconfig warnings dataclasses contextlib abc _py_abc traceback __future__ inspect
        site _sitebuiltins""",
    "Custom Python Interpreters": "code codeop",
    "Importing Modules": "zipimport pkgutil modulefinder runpy importlib imp",
    "Python Language Services": """ast symtable token keyword tokenize tabnanny pyclbr py_compile compileall dis opcode
        _opcode_metadata pickletools""",
    "Unix Specific Services": "crypt tty pty pipes",
}
CHAPTERS = {module: chapter for chapter, modules in _CHAPTERS.items() for module in modules.split()}


class Entry(NamedTuple):
    """What a file documents: kind is "module", "class" or "function"; signature is as `questions` shows it."""
    kind: str
    name: str
    signature: str
    doc: str


# Same as minimal/data.py: walk
def walk(folder: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """A folder's files at any depth, sorted (file systems are not), without hidden ones and folders named in `skip`."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        yield from (Path(here, n) for n in sorted(names) if not n.startswith(".") and Path(here, n).is_file())


# Same as minimal/data.py: clean
def clean(text: str) -> str:
    """Lines end in \\n, no byte order mark, no control character but \\t and \\n, Unicode NFC. Idempotent."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", re.sub("\r\n?", "\n", text))
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", "", text)
    return unicodedata.normalize("NFC", text)  # last: what was removed may have stood between a letter and its accent


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`name(arguments)` as Python writes it, without annotations: they are not what a call needs."""
    args = ast.arguments(**dict(ast.iter_fields(node.args)))
    for field in ("posonlyargs", "args", "kwonlyargs"):
        setattr(args, field, [ast.arg(a.arg) for a in getattr(args, field)])
    args.vararg, args.kwarg = (a and ast.arg(a.arg) for a in (args.vararg, args.kwarg))
    return f"{node.name}({ast.unparse(args)})"


def _entries(tree: ast.Module, module: str) -> list[Entry]:
    """The docstrings of a file, cleaned, in source order: its own, its classes', its functions' and methods'."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    found = []
    for node in [tree] + sorted(nodes, key=lambda n: n.lineno):
        if not (doc := clean(ast.get_docstring(node) or "").strip()):
            continue
        if node is tree:
            found.append(Entry("module", module, module, doc))
        elif isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            found.append(Entry("class", node.name, f"class {node.name}({bases})".replace("()", ""), doc))
        else:
            found.append(Entry("function", node.name, clean(_signature(node)), doc))
    return found


@functools.cache
def _library() -> list[tuple[str, str, list[Entry]]]:
    """(module, source, entries) of the files that stdlib_source in data.py gives, in its order. Trees are not kept."""
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_vendor", "_bundled", "pip"}
    root, found = Path(sysconfig.get_path("stdlib")), []
    for file in walk(root, skip=others):
        try:
            source = file.read_bytes().decode() if file.suffix == ".py" and "config-" not in file.parent.name else ""
            tree = ast.parse(source)
        except (ValueError, SyntaxError):  # not UTF-8, or not Python of this version
            continue
        table = sum(n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)))
        if source.strip() and table <= 0.6 * (source.count("\n") + 1):
            module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found.append((module, source, _entries(tree, module)))
    return found


def sentences(text: str) -> list[str]:
    """The sentences of prose, in order, white space normalised; a paragraph's last one may lack its full stop.

    A sentence ends at a blank line, after a line's last colon, before a list's next item, or at `.`, `?` or `!` before
    a space and a capital. Left out are doctest examples, tables (three spaces inside a line), lines without a letter.
    """
    text, found = re.sub(r"(?m)^[ \t]*>>>.*(?:\n[ \t]*\S.*)*", "", text), []  # an example ends at its blank line
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] )|(?<=:)\n", text):
        lines = " ".join(line for line in paragraph.split("\n") if re.search(r"[^\W\d_]", line)).split()
        if lines and not re.search(r"\S {3,}\S", paragraph):
            # the dot of a number ("1. First") or of an abbreviation ends nothing
            found += re.split(r"(?<=[^\d.][.?!]) (?<!e\.g\. )(?<!i\.e\. )(?=[\"'`(]?[A-Z])", " ".join(lines))
    return found


def prose() -> Iterator[dict]:
    """{"text", "key"}: docstrings of at least 12 words, each once, and the language reference. The key is the text."""
    topics = {}
    with contextlib.suppress(ImportError):  # some distributions package it apart
        from pydoc_data.topics import topics
    lines = {name: set(text.split("\n")) for name, text in topics.items()}
    # a section is printed again in its chapter: keep the chapter alone, or the split would leak
    whole = [name for name, own in sorted(lines.items())
             if not any(len(o) > len(own) and len(own - o) <= 0.2 * len(own) for o in lines.values())]  # fmt: skip
    docs = [e.doc for _, _, entries in _library() for e in entries if len(e.doc.split()) >= 12]
    for text in dict.fromkeys([clean(topics[name]).strip() for name in whole] + docs):
        yield {"text": text, "key": text}


def areas() -> Iterator[dict]:
    """{"text", "label", "key"}: a docstring of at least 5 words, and the chapter of the Library Reference that holds
    its module. The key is the text; each text comes once, and one that two chapters share not at all.

    Which labels occur depends on the version of Python: chapters of fewer than LEAST texts are left out."""
    labels: dict[str, set] = {}
    for module, _, entries in _library():
        chapter = CHAPTERS.get(module.split(".")[0])
        for doc in (e.doc for e in entries if chapter and len(e.doc.split()) >= 5):
            labels.setdefault(doc, set()).add(chapter)
    unique = {text: chapters.pop() for text, chapters in labels.items() if len(chapters) == 1}
    counts = Counter(unique.values())
    for text, label in unique.items():
        if counts[label] >= LEAST:
            yield {"text": text, "label": label, "key": text}


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def signatures() -> Iterator[dict]:
    """{"source", "target", "key"}: the first sentence (3 words or more) of a function's docstring, and the function's
    signature (100 characters at most, without annotations): `def TARGET: ...` is Python. The key is the sentence.

    Left out: special methods, whose signature the language fixes, and sentences that give the signature away."""
    pairs = {}
    for _, _, entries in _library():
        for e in entries:
            first = next(iter(sentences(e.doc)), "")
            short = len(first) <= 200 and len(e.signature) <= 100  # longer ones are lists of options
            plain = e.kind == "function" and not _dunder(e.name) and f"{e.name}(" not in first
            if plain and short and len(first.split()) >= 3:
                pairs[first, e.signature] = None
    for source, target in pairs:
        yield {"source": source, "target": target, "key": source}


def _spans(tokens: Iterable[tuple], starts: list[int]) -> Iterator[tuple[int, int, str]]:
    """(start, end, class) of tokenize's tokens, in characters; starts[i] is where line i begins, from 1.

    From Python 3.12 on an f-string is several tokens: it counts as one STRING from its first to its last, as before.
    The tokens between do not cover it: "{{" is one character of a FSTRING_MIDDLE."""
    depth, outer = 0, 0
    for kind, text, (row, column), (end_row, end_column), _ in tokens:
        name, start, end = tokenize.tok_name[kind], starts[row] + column, starts[end_row] + end_column
        if name.endswith("STRING_START"):
            depth, outer = depth + 1, outer if depth else start
        elif name.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield outer, end, "STRING"
        elif not depth and name == "NAME":
            yield start, end, "KEYWORD" if keyword.iskeyword(text) else "NAME"
        elif not depth and name in ("NUMBER", "STRING", "COMMENT", "OP"):
            yield start, end, name


def _tagged(source: str) -> tuple[list[str], list[str]]:
    """The pieces of a source text (words and single marks), and the class of the token that holds each one's start."""
    starts = [0, 0]
    for line in source.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    spans = _spans(tokenize.generate_tokens(io.StringIO(source).readline), starts)
    pieces, tags, end, tag = [], [], 0, "OP"
    for match in re.finditer(r"\w+|[^\w\s]", source):
        while end <= match.start():
            start, end, tag = next(spans, (len(source), len(source) + 1, "OP"))
        pieces.append(match[0])
        tags.append(tag if start <= match.start() else "OP")  # a backslash that joins two lines is in no token
    return pieces, tags


def lexical() -> Iterator[dict]:
    """{"tokens", "tags", "key"}: 48 to 56 consecutive pieces of a file (words and single marks, `\\w+|[^\\w\\s]`) and
    their classes: KEYWORD, NAME, NUMBER, STRING, COMMENT or OP. The key is the file's source.

    A word of a string or a comment has the class of that string or comment, and a row may begin inside one."""
    for _, source, _ in _library():
        pieces, tags = _tagged(clean(source))
        for start in range(0, len(pieces) - 47, STEP):
            part = slice(start, start + PIECES)
            yield {"tokens": pieces[part], "tags": tags[part], "key": source}


def _windows(entries: list[Entry], start: int) -> Iterator[list[tuple[Entry, str, str]]]:
    """Runs of up to 6 entries, from entry `start` on, that fit LONGEST: [(entry, answer, as the context shows it)]."""
    window, length = [], 0
    for e in entries[start:]:
        first = [s for i, s in enumerate(sentences(e.doc)[:2]) if not (i and s.endswith(":"))]  # "Args:" says nothing
        # on one line, if a reader can tell where the first one ends
        shown = (" " if sentences(" ".join(first)) == first else "\n    ").join(first)
        shown = f"{e.signature}\n    {shown}\n"
        if len(window) == MOST or length + len(shown) > LONGEST:
            yield window
            window, length = [], 0
        window.append((e, first[0], shown))
        length += len(shown)
    yield window


def _questions(entries: list[Entry], key: str) -> Iterator[dict]:
    usable = [e for e in entries if e.kind != "module" and not _dunder(e.name) and len(e.signature) <= 100]
    usable = [e for e in usable if (s := sentences(e.doc)) and 3 <= len(s[0].split()) and len(" ".join(s[:2])) <= 300]
    tilings = [list(_windows(usable, start)) for start in (0, MOST // 2)]
    # boundaries of the two may coincide, from where on the windows are the same
    for window in tilings[0] + [w for w in tilings[1] if w not in tilings[0]]:
        names, context = [e.name for e, _, _ in window], "".join(shown for _, _, shown in window)
        if len(window) < FEWEST:
            continue
        for i, (e, answer, _) in enumerate(window):
            if names.count(e.name) == 1:  # methods of two classes may share a name
                start = sum(len(shown) for _, _, shown in window[:i]) + len(e.signature) + 5
                question = f"What is {e.name}?" if e.kind == "class" else f"What does {e.name} do?"
                answers = {"text": [answer], "answer_start": [start]}
                yield {"question": question, "context": context, "answers": answers, "key": key}


def questions() -> Iterator[dict]:
    """{"question", "context", "answers": {"text": [str], "answer_start": [int]}, "key"}: what does a function do?

    The context is an excerpt of its module's documentation, as help() prints it: signatures and the first sentences of
    4 to 6 neighbours; the answer is the first sentence below the name asked for. Most are asked twice, with the answer
    in another place. The key is the source of the module."""
    for _, source, entries in _library():
        yield from _questions(entries, key=source)


if __name__ == "__main__":
    import time

    for task in (prose, areas, signatures, lexical, questions):
        began = time.perf_counter()
        rows = list(task())
        print(f"{task.__name__}: {len(rows)} rows, {len({r['key'] for r in rows})} keys, "
              f"{time.perf_counter() - began:.1f} s")  # fmt: skip
        row = {k: v for k, v in rows[len(rows) // 2].items() if k != "key"}
        print(*(f"  {k}: {str(v)[:300]!r}" for k, v in row.items()), sep="\n")
        if task is areas:
            print("  ", Counter(r["label"] for r in rows).most_common())
        if task is lexical:
            print("  ", Counter(tag for r in rows for tag in r["tags"]).most_common())
