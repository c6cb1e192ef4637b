# SPDX-License-Identifier: MIT
"""A dataclass is the command line: one line a setting gives its flag, its type, its bounds, its default and its help.

No paper. argparse does the work; this adds what a person who mistypes needs: every value is checked where it is read,
the error is one line that names the flag, the value and what was wanted, and a misspelt flag or name is answered with
the nearest right one. Exit code 2, no traceback. Flags are never abbreviated: a typo must not pass for another flag.

    @dataclasses.dataclass
    class Settings:
        size: str = setting("small", ["small", "large"], "how much to learn; small fits a laptop")
        lr: float = setting(1e-3, (float, 0, 1), "learning rate; what the paper used")

    settings, given, action = parse(Settings, ["--lr", "0.01"])    # given: {"lr"}, the names on the command line

There are no tensors here.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import sys


def setting(default, wanted, help, **extra):
    """A dataclass field that is also a flag.

    wanted: bool (a switch), str, (type, least), (type, least, below), either with a word before it that may stand in
    the number's place, or a list of names. extra: kept in the field's
    metadata beside `wanted` and `help`, for the program's own use. A default is not checked.
    """
    return dataclasses.field(default=default, metadata=dict(wanted=wanted, help=help, **extra))


def flag(name):
    """The flag of a setting: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def converter(wanted):
    """The argparse type for `wanted`: text -> value, or argparse.ArgumentTypeError saying what was wanted."""

    def convert(text):
        if isinstance(wanted, list):
            if text in wanted:
                return text
            near = difflib.get_close_matches(text, wanted, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; {hint}wanted one of {', '.join(wanted)}")
        word, numbers = (wanted[0], wanted[1:]) if isinstance(wanted[0], str) else (None, wanted)
        if text == word:
            return text
        kind, least, below = (*numbers, math.inf)[:3]
        with contextlib.suppress(ValueError):
            if least <= kind(text) < below:  # false for NaN and, for float, for infinity
                return kind(text)
        what = f"a {'whole ' * (kind is int)}number of at least {least:g}" + f", below {below:g}" * (below < 1e30)
        what = f"{word} or {what}" if word else what
        raise argparse.ArgumentTypeError(f"{text!r}: wanted {what}")

    return convert


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message.replace('argument ', '')}; --help lists all\n")


def parse(Settings, argv=None, actions=None, prog=None, description=None):
    """Reads the command line (`argv`, else sys.argv[1:]).

    actions: {"--flag": arguments of argparse's add_argument} for flags that say what to do; at most one may be given.

    Returns (an instance of Settings, the set of names that were given, (flag, value) of the action or (None, None)).
    Exits with code 2 and one line on stderr for anything it cannot read.
    """
    parser = _Parser(prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for field in dataclasses.fields(Settings):
        wanted, default = field.metadata["wanted"], field.default
        shown = "" if default is None or default is False else f" [{default}]"
        text = field.metadata["help"].replace("%", "%%") + shown
        if wanted is bool:
            parser.add_argument(flag(field.name), action="store_true", help=text)
            continue
        metavar = f"{{{','.join(wanted)}}}" if isinstance(wanted, list) else field.name.upper()
        kind = str if wanted is str else converter(wanted)
        parser.add_argument(flag(field.name), type=kind, help=text, metavar=metavar)
    names = {name[2:].replace("-", "_"): name for name in actions or {}}
    for name, how in (actions or {}).items():
        parser.add_argument(name, **how)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1, 0.5)
        parser.error(f"{unknown[0]} is no flag" + (f"; did you mean {near[0]}?" if near else ""))
    given = vars(namespace)
    chosen = [(name, given.pop(key)) for key, name in names.items() if key in given]
    if len(chosen) > 1:
        parser.error(f"{chosen[0][0]} and {chosen[1][0]} exclude each other")
    return Settings(**given), set(given), chosen[0] if chosen else (None, None)


def _demo():
    @dataclasses.dataclass
    class Settings:
        size: str = setting("small", ["small", "medium", "large"], "how much to learn; small fits a laptop")
        batch_size: int = setting(16, (int, 1), "rows at a time; more than this seldom speeds a CPU up")
        dropout: float = setting(0.0, (float, 0, 1), "dropout; one epoch needs none")
        overwrite: bool = setting(False, bool, "replace what is there")

    sys.stderr = sys.stdout  # so that the lines below stand in order
    for line in ("--size large --overwrite", "--size medum", "--batch-sise 4", "--batch-size 0", "--dropout 1.5"):
        print(f"\n$ prog {line}")
        try:
            settings, given, _ = parse(Settings, line.split(), prog="prog")
            print(f"{settings}\ngiven: {', '.join(sorted(given))}")
        except SystemExit as stop:
            print(f"(exit code {stop.code})")


if __name__ == "__main__":
    _demo()
