# SPDX-License-Identifier: MIT
"""Builds the CUDA kernels of csrc/ for the CPU (tests/cuda/cuda_on_cpu.h) and calls them with tensors.

    library(folder, "softmax")                   in this process: quick
    program(folder, "softmax", "thread")         in one of its own, under ThreadSanitizer ("address": AddressSanitizer)
    program(..., changes=[("softmax.cuh", old, new)])      with an error sown into a copy of the kernels

Both give call(entry, whole numbers, real numbers, tensors, order=..., seed=...), which writes into the tensors.
"""

import ctypes
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
ORDERS = ("first in", "last in", "random")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SANITIZE = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
# Vectors of the CUDA types are aligned as on the GPU; pragmas that g++ does not know are for nvcc.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DMINIMAL_CUDA_ON_CPU"]


def compiler() -> str | None:
    """g++ itself: the flags and the sanitizers' names for fibers are its."""
    return shutil.which("g++") if sys.platform == "linux" else None


class Fault(Exception):
    """What went wrong in a kernel, or what a sanitizer said."""


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"stands {text.count(old)} times in the kernel, wanted once: {old!r}"
    return text.replace(old, new)


def build(folder, kernel: str, mode: str, extra, changes) -> pathlib.Path:
    folder, cuda = pathlib.Path(folder), ROOT / "tests" / "cuda"
    shutil.copytree(ROOT / "csrc", folder, ignore=lambda _, names: [n for n in names if not n.endswith(".cuh")])
    for file, old, new in changes:
        (folder / file).write_text(changed((folder / file).read_text(), old, new))
    warnings = [] if changes else ["-Wall", "-Wextra"]
    command = [compiler(), *FLAGS, *SANITIZE[mode], *warnings, f"-I{folder}", f"-I{cuda}", *extra]
    result = folder / kernel
    done = subprocess.run(
        [*command, cuda / f"{kernel}_on_cpu.cpp", "-ldl", "-o", result], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return result


def library(folder, kernel: str):
    lib = ctypes.CDLL(str(build(folder, kernel, "plain", ["-shared", "-fPIC"], [])))
    lib.schedule.argtypes = [ctypes.c_int64, ctypes.c_int64]

    def call(entry, n, f, tensors, order="first in", seed=0):
        function = getattr(lib, entry)
        function.restype = ctypes.c_char_p
        lib.schedule(ORDERS.index(order), seed)
        pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
        error = function((ctypes.c_int64 * len(n))(*n), (ctypes.c_double * len(f))(*f), pointers)
        if error:
            raise Fault(error.decode())

    return call


def memory(t):
    """The elements from the first to the last of a tensor with strides of 0 or more, as bytes."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).view(torch.uint8).numpy()


def program(folder, kernel: str, mode: str, *, changes=(), extra=()):
    path = build(folder, kernel, mode, ["-DMINIMAL_PROGRAM", "-rdynamic", *extra], changes)
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}

    def call(entry, n, f, tensors, order="first in", seed=0):
        parts = [struct.pack("<qqq", ORDERS.index(order), seed, len(entry)), entry.encode()]
        parts += [struct.pack(f"<q{len(n)}q", len(n), *n), struct.pack(f"<q{len(f)}d", len(f), *f)]
        parts += [struct.pack("<q", len(tensors))]
        for t in tensors:
            if t is None:
                parts += [struct.pack("<qq", -1, 0)]
            else:
                parts += [struct.pack("<qq", memory(t).nbytes, t.data_ptr() % 16), memory(t).tobytes()]
        done = subprocess.run([path], input=b"".join(parts), capture_output=True, env={**os.environ, **options})
        if done.returncode:
            raise Fault(f"exit {done.returncode}: {done.stderr.decode(errors='replace')}")
        (length,), answer = struct.unpack_from("<q", done.stdout), done.stdout[8:]
        if length:
            raise Fault(answer[:length].decode())
        for t in tensors:
            if t is not None:
                memory(t)[:] = numpy.frombuffer(answer[: memory(t).nbytes], dtype=numpy.uint8)
                answer = answer[memory(t).nbytes :]

    return call
