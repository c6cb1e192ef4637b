# SPDX-License-Identifier: MIT
"""A run's folder: files whole or not at all, other programs' files left alone, signals noted, memory measured."""

import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from minimal import runs
from minimal.runs import clear, held, newest, noted_signals, peak_memory_mb, plot, raised, read_json, write_json

ROOT = pathlib.Path(__file__).parent.parent

leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tree = st.recursive(leaf, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(), t, max_size=3), max_leaves=9)


@given(value=st.dictionaries(st.text(), tree, max_size=4))
def test_what_is_written_is_read_again(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == read_json(str(path)) == value
    assert path.read_bytes().endswith(b"}\n") and not path.with_name("value.json.tmp").exists()


BAD = [None, b"", b"{", b"[]", b"1", b'"{}"', b"null", b"\xff\xfe{}", b'{"a": 1} {}', b"[" * 10**5, b'{"a":' * 10**5]


@pytest.mark.parametrize("content", BAD, ids=lambda content: str(content)[:12])
def test_anything_but_an_object_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "run" / "args.json"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not readable as a JSON object")) as refused:
        read_json(path)
    assert "\n" not in str(refused.value)
    assert newest(tmp_path, lambda run: True) is None  # nor does it keep others from being found


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    write_json(path, {"step": 1})

    def fails(error, value):
        with pytest.raises(error):
            write_json(path, value)
        assert read_json(path) == {"step": 1} and os.listdir(tmp_path) == ["args.json"]

    def half(self, text, encoding):
        self.write_bytes(text.encode()[:5])
        raise OSError(28, "No space left on device")

    def stop(*given):
        raise KeyboardInterrupt

    fails(TypeError, {"step": {1, 2}})
    for owner, name, instead, error in [(pathlib.Path, "write_text", half, OSError), (os, "fsync", stop, BaseException),
                                        (os, "replace", stop, KeyboardInterrupt)]:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            fails(error, {"step": 2})
    write_json(path, {"step": 2})
    assert read_json(path) == {"step": 2}


def test_newest_goes_by_the_time_of_the_notes(tmp_path):
    """Not by name, nor by the time of the folder, which any new file in it changes."""
    assert newest(tmp_path / "missing", bool) is None is newest(tmp_path, bool)
    for name, age in (("a", 10), ("b", 30), ("c", 20)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "args.json", {"status": "finished", "step": age})
        os.utime(tmp_path / name / "args.json", (10**9 - age, 10**9 - age))
        os.utime(tmp_path / name, (10**9 + age, 10**9 + age))
    for name, other in (("d", "nonsense"), ("e", "{}"), ("f", '{"status": ["finished"]}'), ("g", '{"status": {}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(other)
    (tmp_path / "h" / "args.json").mkdir(parents=True)
    (tmp_path / "args.json").write_text('{"status": "finished"}')  # of the root itself: no run
    assert newest(tmp_path, lambda run: run["status"] == "finished") == tmp_path / "a"
    assert newest(str(tmp_path), lambda run: run["status"] == "finished" and run["step"] > 10) == tmp_path / "c"
    assert newest(tmp_path, lambda run: run["status"] == "unfinished") is None
    for fails in (lambda run: run["missing"], lambda run: run["status"][99], lambda run: run["status"].nothing,
                  lambda run: run["status"] + 1, lambda run: int(run["status"])):  # fmt: skip
        assert newest(tmp_path, fails) is None
    gone = tmp_path / "a" / "args.json"  # removed by another program, between our look at it and at its time
    assert newest(tmp_path, lambda run: run["status"] == "finished" and (run["step"] > 10 or not gone.unlink())) == (
        tmp_path / "c"
    )


def test_clear_removes_the_names_alone(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "state" / "deep", run / "mine", elsewhere):
        folder.mkdir(parents=True)
    for file in (run / "args.json", run / "kept.json", run / "state" / "deep" / "x", run / "mine" / "args.json"):
        file.touch()
    (elsewhere / "thesis.txt").touch()
    (run / "linked").symlink_to(elsewhere)
    (run / "dangling").symlink_to(tmp_path / "nowhere")
    clear(str(run), ["args.json", "missing", "kept.json", "state", "linked", "dangling"], but=("kept.json",))
    assert sorted(os.listdir(run)) == ["kept.json", "mine"] and os.listdir(run / "mine") == ["args.json"]
    assert os.listdir(elsewhere) == ["thesis.txt"]


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_signals_are_noted_and_the_second_ends(first, second):
    def handlers():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    before = handlers()
    with noted_signals() as signals:
        assert signals == [] and not set(handlers()) & set(before)
        signal.raise_signal(first)
        assert signals == [first]
        outer = handlers()
        with pytest.raises(ZeroDivisionError), noted_signals() as inner:
            assert inner == []
            raise ZeroDivisionError
        assert handlers() == outer
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt), noted_signals() as signals:
        signal.raise_signal(first)
        signal.raise_signal(second)
        pytest.fail("the second signal was not heard")
    assert handlers() == before and signals == [first]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_noted_signal_may_end_a_part_at_once(number):
    with noted_signals() as signals:
        noting = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt), raised(signals):
            signal.raise_signal(number)
            pytest.fail("the part went on")
        assert signals == [number] and signal.getsignal(number) is noting
        with pytest.raises(KeyboardInterrupt), raised(signals):
            pytest.fail("a part began after the signal")
    with noted_signals() as signals, raised(signals):
        pass
    assert signals == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_peak_memory_is_that_of_this_process(tmp_path):
    """A small process begun by this large one: getrusage alone would say at its start what this one has had."""
    script = f"""
import runpy
peak = runpy.run_path({runs.__file__!r})["peak_memory_mb"]
start = peak()
block = b"1" * (200 * 2**20)
full = peak()
del block
print(start, full, peak(), *(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    start, full, after, *kib = map(float, done.stdout.split())
    assert kib, "no VmHWM"
    assert 1 < start < 100 < peak_memory_mb()
    assert 190 < full - start < 230 and after == pytest.approx(full, abs=1) == kib[0] / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
def test_freed_memory_goes_back():
    code = """
        import runpy, sys, re
        runs = runpy.run_path(sys.argv[1])
        resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
        kept = [b"x" * 20_000 for _ in range(8000)]
        last = b"x" * 20_000  # above all of them: the heap cannot shrink from its end
        kept = None
        before = resident()
        runs["trim_memory"]()
        print(before - resident())
    """
    run = [sys.executable, "-c", textwrap.dedent(code), runs.__file__]
    assert int(subprocess.run(run, check=True, capture_output=True, text=True).stdout) > 100_000  # of 160,000 kB


def test_elsewhere_peak_memory_is_asked_of_getrusage(monkeypatch):
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: open("/missing"))  # no /proc
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for system, unit in (("linux", 2**10), ("darwin", 2**20)):
        monkeypatch.setattr(sys, "platform", system)
        assert peak_memory_mb() == pytest.approx(peak / unit, rel=0.05)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mb() == 0


def test_a_folder_is_held_by_one_process(tmp_path):
    pytest.importorskip("fcntl")
    code = f"from minimal.runs import held\nwith held({str(tmp_path)!r}): print('in')"

    def other():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    with held(tmp_path):
        with pytest.raises(ValueError, match="another process works there"), held(tmp_path):
            pass
        assert "another process works there" in other().stderr
    assert other().stdout == "in\n"
    with held(tmp_path):  # left by one that is over
        pass


def test_the_plot_shows_what_was_scored(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its choice of a display belongs to the program

    def orange(name, *values):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": i + 1, "loss": 5 / (i + 1)} | value for i, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plot(str(folder))
        assert sorted(os.listdir(folder)) == ["loss.png", "metrics.jsonl"]
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(folder / "loss.png")[..., :3]  # (height, width, 3)
        return int((abs(pixels - [1.0, 0.498, 0.055]).max(-1) < 0.02).sum())

    scored = orange("scored", {"val_loss": None}, {"val_loss": 4.0}, {"val_loss": None}, {"val_loss": 2.0})
    unscored = [orange("null", {"val_loss": None}, {"val_loss": None}), orange("none", {}, {}), orange("empty")]
    assert scored > 2 * max(unscored), (scored, unscored)
    orange("a$x_$ß", {}, {"val_loss": float("nan")})  # no formula, and no reason to fail
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot(tmp_path / "scored")
