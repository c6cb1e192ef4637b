# SPDX-License-Identifier: MIT
"""The memories of a CUDA kernel, for tests/cuda/ptx.py: what is not there cannot be touched, and races are seen.

Fault is raised for an address outside every array, or misaligned, or written though the array is an input; and for

    two threads at one place of shared memory, one of them writing, with no barrier between them: __syncthreads, or
    __syncwarp within a warp (where a write after another thread's read goes unseen)
    two blocks at one place of global memory, one of them writing

Memory that nobody wrote holds 0xFF, which is NaN in every floating-point type.
"""

import numpy as np

GAP = 256  # bytes between two arrays, and before the first
SEVERAL = np.int16(-1)


class Fault(RuntimeError):
    """The kernel did what a GPU would answer with an error, garbage or a hang."""


class Space:
    """One kind of memory. A window of addresses for the launch (global, parameters), each block or each thread.

    allowed: for each byte of a window 0 (unmapped), 1 (to read) or 2 (to write too), with a gap at both ends.
    window: which window each thread has.
    """

    def __init__(self, name: str, allowed: np.ndarray, window: np.ndarray, data: np.ndarray | None = None):
        self.name, self.allowed, self.start = name, allowed, window.astype(np.int64) * allowed.size
        self.all = np.arange(window.size)
        self.data = np.full(allowed.size * (int(window.max()) + 1), 0xFF, np.uint8) if data is None else data

    def cells(self, who, address: np.ndarray, size: int, verb: str) -> np.ndarray:
        """Where the threads' accesses lie in self.data, in units of their size."""
        needed = 2 if verb == "writes" else 1
        least = np.minimum(*(self.allowed.take(address + n, mode="clip") for n in (0, size - 1)))  # a gap is wider
        bad = (least < needed) | (address % size != 0)
        if bad.any():
            i = int(bad.argmax())
            why = "misaligned" if least[i] >= needed else "for reading only" if least[i] else "outside"
            raise Fault(f"thread {self.all[who][i]} {verb} {size} bytes at {self.name} {address[i]:#x}: {why}")
        return (address + self.start[who]) // size

    def load(self, who, address: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes for each thread, as one void scalar."""
        return self.data.view(f"V{size}")[self.cells(who, address, size, "reads")]

    def store(self, who, address: np.ndarray, x: np.ndarray) -> None:
        self.data.view(f"V{x.itemsize}")[self.cells(who, address, x.itemsize, "writes")] = x


class Tracked(Space):
    """Memory that knows of each two bytes who wrote and who read them since the last barrier.

    The marks lie as the data does, so that one index serves both. writer: 0 nobody, 1 + the thread's `member`, or
    -1 - its group, once the group has been synchronised. reader: 0 nobody, 1 + group, or SEVERAL groups.
    """

    def __init__(self, name, allowed, window, member: np.ndarray, group: np.ndarray, data=None):
        super().__init__(name, allowed, window, data)
        self.member, self.group = (1 + member).astype(np.int16)[:, None], (1 + group).astype(np.int16)[:, None]
        self.writer, self.reader = np.zeros((2, self.data.size // 2), np.int16)

    def load(self, who, address, size):
        cells, group = self.cells(who, address, size, "reads"), self.group[who]
        self.alone(who, cells, size, self.writer, "reads what another wrote")
        before = marks(self.reader, cells, size)
        after = np.where((before == 0) | (before == group), group, SEVERAL)
        mark(self.reader, cells, size, after)
        if (lost := (marks(self.reader, cells, size) != after).any(1)).any():  # two groups at one place, just now
            mark(self.reader, cells[lost], size, np.full_like(after[lost], SEVERAL))
        return self.data.view(f"V{size}")[cells]

    def store(self, who, address, x):
        self.claim(who, address, x.itemsize)
        super().store(who, address, x)

    def claim(self, who, address, size):
        """These threads write here, from now on."""
        cells = self.cells(who, address, size, "writes")
        self.alone(who, cells, size, self.writer, "writes where another wrote")
        self.alone(who, cells, size, self.reader, "writes where another read")
        mark(self.writer, cells, size, np.repeat(self.member[who], max(size // 2, 1), 1))
        self.alone(who, cells, size, self.writer, "writes where another wrote")  # just now

    def alone(self, who, cells, size, past, what):
        if (past := marks(past, cells, size)).any():
            mine = [self.member[who], -self.group[who]] if "wrote" in what else [self.group[who]]
            bad = ~np.any([past == 0, *(past == x for x in mine)], 0).all(1)
            if bad.any():
                i = int(bad.argmax())
                at = cells[i] * size % self.allowed.size
                raise Fault(f"race: thread {self.all[who][i]} {what}, {self.name} {at:#x}")

    def synchronise(self, windows: np.ndarray, groups: np.ndarray | None = None) -> None:
        """A barrier of these windows; or of these groups of 32, one in each of the windows."""
        writer, reader = (x.reshape(-1, self.allowed.size // 2) for x in (self.writer, self.reader))
        if groups is None:
            writer[windows] = reader[windows] = 0
        else:
            for w, g in zip(windows, groups, strict=True):
                writer[w][(writer[w] > 0) & ((writer[w] - 1) // 32 == g)] = -1 - g


def marks(past: np.ndarray, cells: np.ndarray, size: int) -> np.ndarray:
    units = past.view(f"V{max(size, 2)}")[cells if size > 1 else cells // 2]
    return units.view(np.int16).reshape(-1, max(size // 2, 1))


def mark(past: np.ndarray, cells: np.ndarray, size: int, x: np.ndarray) -> None:
    past.view(f"V{max(size, 2)}")[cells if size > 1 else cells // 2] = x.view(f"V{max(size, 2)}")[:, 0]


class Memory:
    """Global memory: numpy arrays with unmapped gaps between them."""

    def __init__(self):
        self.allowed, self.data, self.arrays = np.zeros(GAP, np.uint8), np.full(GAP, 0xFF, np.uint8), {}

    def add(self, array: np.ndarray, writable: bool = False) -> int:
        """Copies the array to a new place, a multiple of 256; its address."""
        address, size = self.allowed.size, -(-array.nbytes // GAP) * GAP + GAP
        allowed, data = np.zeros(size, np.uint8), np.full(size, 0xFF, np.uint8)
        allowed[: array.nbytes] = 2 if writable else 1
        data[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self.allowed, self.data = np.append(self.allowed, allowed), np.append(self.data, data)
        self.arrays[address] = array.dtype, array.shape
        return address

    def array(self, address: int) -> np.ndarray:
        """What the array that was put at this address holds now."""
        dtype, shape = self.arrays[address]
        return self.data[address:][: dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)
