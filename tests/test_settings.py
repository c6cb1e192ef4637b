# SPDX-License-Identifier: MIT
"""minimal/settings.py: what was typed is what one gets, or one line and exit code 2."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimal.settings import flag, parse, setting


@dataclasses.dataclass
class Settings:
    size: str = setting("small", ["small", "medium", "large"], "how much; small fits")
    batch_size: int = setting(16, (int, 1), "rows, 100 % of them")
    rate: float = setting(None, (float, 0, 1), "a share")
    name: str = setting(None, str, "any text")
    quick: bool = setting(False, bool, "a switch")


ACTIONS = {"--go": dict(action="store_true", help="go"), "--back-to": dict(nargs="?", const="", help="back")}


def read(*argv):
    return parse(Settings, list(argv), ACTIONS, "prog", "what it does")


@given(size=st.sampled_from(["small", "medium", "large"]), batch=st.integers(1, 10**12), quick=st.booleans(),
       rate=st.floats(0, 1, exclude_max=True), name=st.text().filter(lambda t: not t.startswith("-")))  # fmt: skip
def test_what_was_typed_comes_back(size, batch, rate, name, quick):
    argv = ["--size", size, "--batch-size", str(batch), "--rate", repr(rate), "--name", name] + ["--quick"] * quick
    settings, names, action = read(*argv)
    assert settings == Settings(size, batch, rate, name, quick)
    assert names == {"size", "batch_size", "rate", "name"} | ({"quick"} if quick else set()) and action == (None, None)


def test_nothing_given_is_the_defaults():
    assert read() == (Settings(), set(), (None, None))
    assert read("--go")[2] == ("--go", True)
    assert read("--back-to")[2] == ("--back-to", "") and read("--back-to", "x")[2] == ("--back-to", "x")
    assert flag("batch_size") == "--batch-size"


def refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("prog: error: "), err
    return err


@pytest.mark.parametrize("argv, words", [
    ("--size medum", ["--size", "'medum'", "did you mean 'medium'", "small, medium, large"]),
    ("--size zzz", ["'zzz'", "small, medium, large"]),
    ("--batch-sise 4", ["--batch-sise", "did you mean --batch-size"]),
    ("--batch 4", ["--batch", "did you mean --batch-size"]),  # never an abbreviation
    ("--xyzzy", ["--xyzzy is no flag"]),
    ("stray", ["stray"]),
    ("--batch-size 0", ["--batch-size", "'0'", "whole number of at least 1"]),
    ("--batch-size 1.5", ["'1.5'", "whole number"]),
    ("--rate 1", ["--rate", "'1'", "at least 0, below 1"]),
    ("--rate nan", ["'nan'"]),
    ("--batch-size", ["--batch-size"]),
    ("--go --back-to", ["--go", "--back-to", "exclude"]),
])  # fmt: skip
def test_one_line_for_what_cannot_be_read(argv, words, capsys):
    err = refused(argv.split(), capsys)
    assert all(word in err for word in words), err


@given(value=st.floats() | st.integers())
def test_bounds(value):
    """Against the plain comparison: in [0, 1), NaN and infinities out."""
    inside = 0 <= value < 1 and math.isfinite(value)
    try:
        assert read("--rate", repr(value))[0].rate == value and inside
    except SystemExit as stop:
        assert stop.code == 2 and not inside


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "what it does" in out and "100 %" in out and "[16]" in out
    assert all(flag(field.name) in out for field in dataclasses.fields(Settings)) and "--go" in out
