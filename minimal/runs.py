# SPDX-License-Identifier: MIT
"""A run is a folder: found again by its notes, interrupted without loss, plotted, and kept apart from other files.

No paper. A training program leaves behind

    args.json       its settings and where it stands, an object that `newest` looks through
    metrics.jsonl   one object per logged step: "step", "loss", and perhaps "val_loss", a number or null
    loss.png        the two of them, drawn by `plot`

Each JSON file is written beside its place and renamed over it: a reader sees the old one or the new one, whole. The
lines of metrics.jsonl are appended, since to rewrite a log at every line would be quadratic in its length.

    write_json(folder / "args.json", {"settings": {...}, "status": "unfinished", "step": 0})
    with noted_signals() as signals:
        while not signals: ...                       # Ctrl-C ends the loop after the step, not in the middle of it
    newest("out", lambda run: run["status"] == "unfinished")

    with held(folder): ...                           # no second process trains into it

There are no tensors here.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator


# Same as minimal/checkpoint.py: write_beside
def write_beside(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write(temporary path)` in the folder of `path`, then renames the result to `path`: it stays whole."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as the umask has it; safetensors writes files that their owner alone can read
        write(beside)
        beside.chmod(mode)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes a JSON file, whole or not at all."""
    write_beside(path, lambda beside: beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. Raises ValueError, in one line with the file's name, for anything else."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except (OSError, ValueError, RecursionError) as error:  # the last of brackets nested a thousand deep
        raise ValueError(f"{path}: not readable as a JSON object ({error})") from None


def newest(root: str | os.PathLike, wanted: Callable[[dict], bool]) -> pathlib.Path | None:
    """The folder under `root` with the newest of the args.json that `wanted` accepts, or None.

    An args.json that cannot be read, or that `wanted` fails on, is another program's and no run of ours."""
    runs = []
    for path in pathlib.Path(root).glob("*/args.json"):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OSError):
            if wanted(read_json(path)):
                runs.append((path.stat().st_mtime_ns, path.parent))
    return max(runs)[1] if runs else None


def clear(folder: str | os.PathLike, names: list[str], but: tuple[str, ...] = ()) -> None:
    """Removes the files and folders `names` of a run, in that order, and nothing else that may be in the folder.

    A link goes, and what it leads to stays."""
    for path in (pathlib.Path(folder, name) for name in names if name not in but):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def handled(note: Callable) -> Iterator[None]:
    """Calls note(number, frame) for SIGINT and SIGTERM."""
    handlers = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yields a list that SIGINT and SIGTERM are noted in, instead of ending the program; the second ends it."""
    signals = []

    def note(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    with handled(note):
        yield signals


@contextlib.contextmanager
def raised(signals: list[int]) -> Iterator[None]:
    """Inside `noted_signals`, around a part that changes nothing: a signal, noted as well, ends it at once by
    KeyboardInterrupt, and one that was noted before keeps it from beginning."""

    def note(number, frame):
        signals.append(number)
        raise KeyboardInterrupt

    with handled(note):
        if signals:
            raise KeyboardInterrupt
        yield


@contextlib.contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps a folder, by a file `lock` in it, to this process while the body runs, or until the process ends, however
    it does. ValueError: another one, or a body around this, holds it. No effect on Windows, and on a file system
    without locks."""
    try:
        import fcntl
    except ImportError:
        fcntl = None
    with open(pathlib.Path(folder) / "lock", "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process works there; wanted that one to end first") from None
        except OSError:
            pass
        yield


def peak_memory_mb() -> float:
    """The most memory that this process has had in RAM so far, in MiB; 0 where the system does not say (Windows)."""
    with contextlib.suppress(OSError):  # Linux: its ru_maxrss begins at the peak of the process that started this one
        found = re.search(rb"^VmHWM:\s*(\d+) kB$", pathlib.Path("/proc/self/status").read_bytes(), re.MULTILINE)
        if found:
            return int(found[1]) / 2**10
    try:
        import resource
    except ImportError:
        return 0.0
    # macOS counts bytes, others KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def trim_memory() -> None:
    """Gives freed memory back to the system, which glibc otherwise keeps for later; nothing where there is no glibc."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def profiled(path: str | os.PathLike, planned: int, steps: int = 3, skip: int = 2) -> Iterator[Callable[[], None]]:
    """Yields a function to call at the end of each of the `planned` steps. After `skip` of them it profiles `steps`,
    fewer where there are not so many, writes a trace for Perfetto or chrome://tracing to `path` and prints the ten
    costliest operators, by their own time."""
    from torch.profiler import profile, schedule

    skip = max(0, min(skip, planned - steps))
    ended = 0

    def done(profiler):
        seen = min(max(ended - skip, 1), steps)
        write_beside(path, lambda beside: profiler.export_chrome_trace(str(beside)))
        on_gpu = any(event.self_device_time_total for event in profiler.key_averages())
        rows = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key)
                for e in profiler.key_averages() if not e.key.startswith("ProfilerStep")]  # fmt: skip
        whole = max(sum(time for time, *_ in rows), 1e-9)
        print(f"\n{seen} step{'s' * (seen > 1)} profiled into {path}; by their own time{' on the GPU' * on_gpu}:")
        for time, count, name in sorted(rows, reverse=True)[:10]:
            per_step = f"{count / seen:7.0f} calls {time / 1e3 / seen:9.2f} ms a step"
            print(f"  {name[:60]:60} {per_step} {time / whole:6.1%}")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # of so few steps none is left for it
        when = schedule(wait=max(skip - 1, 0), warmup=min(skip, 1), active=steps, repeat=1)
    with profile(on_trace_ready=done, schedule=when) as profiler:

        def step():
            nonlocal ended
            ended += 1
            profiler.step()

        yield step


def plot(folder: str | os.PathLike) -> None:
    """Draws the losses of metrics.jsonl into loss.png. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a display for the whole program
    except ImportError:
        raise ImportError("loss.png is drawn with matplotlib: pip install matplotlib") from None
    folder = pathlib.Path(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [row for row in rows if row.get("val_loss") is not None]
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    axes.plot([row["step"] for row in scored], [row["val_loss"] for row in scored], "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.set_title(str(folder), parse_math=False)  # $ is a letter in the name of a folder
    axes.legend()
    write_beside(folder / "loss.png", lambda beside: figure.savefig(beside, format="png", bbox_inches="tight"))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        for name, steps, stop in (("first", 40, 40), ("second", 40, 25)):
            folder = pathlib.Path(root, name)
            folder.mkdir()
            with noted_signals() as signals, open(folder / "metrics.jsonl", "w") as log:
                for step in range(1, steps + 1):
                    value = None if step % 10 else 2 / step
                    log.write(json.dumps({"step": step, "loss": 1 / step, "val_loss": value}) + "\n")
                    if step == stop < steps:
                        signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
                    if signals:
                        break
            status = "unfinished" if signals else "finished"
            write_json(folder / "args.json", {"status": status, "step": step})
            plot(folder)
            print(f"{name}: {status} at step {step}, loss.png has {(folder / 'loss.png').stat().st_size:,} bytes")
        for status in ("finished", "unfinished", "begun"):
            found = newest(root, lambda run, status=status: run["status"] == status)
            print(f"newest that is {status}: {found and found.name}")
        clear(folder, ["args.json", "metrics.jsonl"])
        print("left after clearing two names:", [path.name for path in folder.iterdir()])
        print(f"peak memory {peak_memory_mb():.0f} MB")
