# SPDX-License-Identifier: MIT
"""Executes PTX, the assembly that nvcc makes of a CUDA kernel, on the CPU in numpy: all threads of a launch at once.

What is checked here is what the compiler made of a kernel, its inline assembly included, without a GPU. An instruction
is a step for every thread that stands at it, and the threads furthest behind step first, so that those who parted at a
branch meet again where the branches do. Threads wait at a barrier for their block and at a shuffle, mma or ldmatrix for
their warp. A Fault is raised where a GPU would give an error, garbage or a hang:

    an address outside every array, or misaligned, or written though it is an input
    waiting for threads that have ended or wait elsewhere; a division of integers by zero; no end
    two threads at one place of shared memory, one of them writing, with no barrier between (within a warp:
    __syncwarp; reads are only told apart by warp); two blocks at one place of global memory, one having written

Memory that nobody wrote holds 0xFF, which is NaN in every floating-point type; cp.async writes when it is waited for.
What it does not show: time, registers, what ptxas makes of the PTX, and the error of the approximate functions (ex2,
lg2, rcp, ..., here rounded correctly). mma sums in float32 in numpy's order. An opcode that is not known raises
NotImplementedError when the kernel is read. Reference: NVIDIA, Parallel Thread Execution ISA 9.0.

    memory = Memory()
    x, y = memory.add(array), memory.add(np.full_like(array, np.nan), writable=True)       # addresses
    launch(Kernel(ptx, "name"), grid=4, block=128, arguments=[np.uint64(x), np.uint64(y)], memory=memory)
    memory.array(y)

Letters: n threads of the launch in order of block, then z, y, x. `who` is the threads that run an instruction, as an
array of their numbers or, when it is all of them, a slice.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{kind}{8 * n}": f"{'i' if kind == 's' else 'u'}{n}" for kind in "bus" for n in UNSIGNED}
TYPES |= {"pred": "?", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
TYPES = {name: np.dtype(code) for name, code in TYPES.items()}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid"]
GAP = 256  # bytes between two arrays, and before the first
SHARED, LOCAL = 1 << 44, 1 << 45  # where generic addresses of these spaces begin; those of global memory are themselves


class Fault(RuntimeError):
    """The kernel did what a GPU would answer with an error, garbage or a hang."""


# ------------------------------------------------------------------------------------------------ bits and numbers


def numbers(bits: np.ndarray, type: str) -> np.ndarray:
    """What the bits of a register mean. bf16 becomes float32; a packed pair a last axis of two, the low half first."""
    if type.endswith("x2"):
        return numbers(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2), type[:-2])
    if type == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(TYPES[type])


def bits(x: np.ndarray, type: str) -> np.ndarray:
    """The inverse of numbers(), rounding to nearest even. Integers keep their sign, for the register to extend."""
    if type.endswith("x2"):
        return np.ascontiguousarray(bits(x, type[:-2])).view(np.uint32).reshape(-1)
    if type == "bf16":
        x = np.ascontiguousarray(x, np.float32)
        u = x.view(np.uint32)
        return np.where(np.isnan(x), 0x7FFF, (u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    x = np.ascontiguousarray(x).astype(TYPES[type], copy=False)
    return x.view(UNSIGNED[x.itemsize]) if x.dtype.kind == "f" else x


# ------------------------------------------------------------------------------------------------ memory


class Space:
    """One kind of memory: a window of addresses for the launch (global, parameters), each block or each thread.

    allowed: for each byte of a window 0 (unmapped), 1 (to read) or 2 (to write too). It begins and ends with a gap.
    window: which window each thread has.
    """

    def __init__(self, name: str, allowed: np.ndarray, window: np.ndarray, data: np.ndarray | None = None):
        self.name, self.allowed = name, allowed
        self.window = window.astype(np.int64) * allowed.size
        self.data = np.full(allowed.size * (int(window.max()) + 1), 0xFF, np.uint8) if data is None else data

    def cells(self, who, address: np.ndarray, size: int, verb: str) -> np.ndarray:
        """Where the accesses lie in self.data, in units of their size."""
        needed = 2 if verb == "writes" else 1
        first, last = (self.allowed.take(address + n, mode="clip") for n in (0, size - 1))  # gaps are wider than this
        bad = (first < needed) | (last < needed) | (address % size != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            why = "misaligned" if min(first[i], last[i]) >= needed else "not allowed" if first[i] else "outside"
            raise Fault(f"thread {thread(who, i)} {verb} {size} bytes at {self.name} {address[i]:#x}: {why}")
        return (address + self.window[who]) // size

    def load(self, who, address: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes for each thread, as void scalars."""
        return self.data.view(f"V{size}")[self.cells(who, address, size, "reads")]

    def store(self, who, address: np.ndarray, value: np.ndarray) -> None:
        size = value.itemsize
        self.data.view(f"V{size}")[self.cells(who, address, size, "writes")] = value


class Tracked(Space):
    """Memory that knows, for each two bytes, who wrote and who read it since the last barrier.

    Kept in arrays laid out as the data itself, so that one index serves all. written: 0 nobody, 1 + who, or -1 - group
    once the group has been synchronised. was_read: 0 nobody, 1 + group, or -1 several groups.
    """

    def __init__(self, name, allowed, window, who: np.ndarray, group: np.ndarray, data=None):
        super().__init__(name, allowed, window, data)
        self.who, self.group = (1 + who).astype(np.int16), (1 + group).astype(np.int16)
        self.written, self.was_read = np.zeros((2, self.data.size // 2), np.int16)

    def load(self, who, address, size):
        cells = self.cells(who, address, size, "reads")
        unit, at = max(size, 2), cells if size > 1 else cells // 2
        self.alone(who, self.written, unit, at, "reads what another wrote")
        readers, group = self.was_read.view(f"V{unit}"), self.group[who][:, None]
        before = readers[at].view(np.int16).reshape(at.size, -1)
        after = np.where((before == 0) | (before == group), group, np.int16(-1))
        readers[at] = after.view(f"V{unit}")[:, 0]
        lost = readers[at].view(np.int16).reshape(at.size, -1) != after  # several threads at one place: one has won
        if lost.any():
            readers[at[lost.any(1)]] = np.full(unit // 2, -1, np.int16).view(f"V{unit}")
        return self.data.view(f"V{size}")[cells]

    def store(self, who, address, value):
        self.claim(who, address, value.itemsize)
        super().store(who, address, value)

    def claim(self, who, address, size):
        """Note that these threads write here, from now on."""
        cells = self.cells(who, address, size, "writes")
        unit, at = max(size, 2), cells if size > 1 else cells // 2
        self.alone(who, self.written, unit, at, "writes where another wrote")
        self.alone(who, self.was_read, unit, at, "writes where another read")
        mine = np.repeat(self.who[who][:, None], unit // 2, 1)
        self.written.view(f"V{unit}")[at] = mine.view(f"V{unit}")[:, 0]
        self.alone(who, self.written, unit, at, "writes where another wrote")  # two in one instruction

    def alone(self, who, past, unit, at, what):
        past = past.view(f"V{unit}")[at].view(np.int16).reshape(at.size, -1)
        if past.any():
            me, group = self.who[who][:, None], self.group[who][:, None]
            mine = past == (me if "wrote" in what else group)
            bad = ~(mine | (past == 0) | ((past == -group) & ("wrote" in what))).all(1)
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise Fault(f"thread {thread(who, i)} {what} at {self.name} {at[i] * unit % self.allowed.size:#x}: race")

    def synchronise(self, windows: np.ndarray, groups: np.ndarray | None = None) -> None:
        """At a barrier of these windows all is forgotten; at one of groups within them, what was theirs is shared."""
        shape = (-1, self.allowed.size // 2)
        written, was_read = self.written.reshape(shape), self.was_read.reshape(shape)
        if groups is None:
            written[windows] = was_read[windows] = 0
            return
        for w, g in zip(windows, groups, strict=True):
            row = written[w]
            row[(row > 0) & ((row - 1) // 32 == g)] = -1 - g


class Memory:
    """Global memory: numpy arrays with unmapped gaps between them."""

    def __init__(self):
        self.allowed, self.data, self.arrays = np.zeros(GAP, np.uint8), np.full(GAP, 0xFF, np.uint8), {}

    def add(self, array: np.ndarray, writable: bool = False) -> int:
        """Copy the array to a new place, aligned to 256 bytes; its address."""
        address, size = self.allowed.size, -(-array.nbytes // GAP) * GAP + GAP
        new = np.zeros((2, size), np.uint8)
        new[0, : array.nbytes] = 2 if writable else 1
        new[1] = 0xFF
        new[1, : array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.allowed, self.data = np.append(self.allowed, new[0]), np.append(self.data, new[1])
        self.arrays[address] = array.dtype, array.shape
        return address

    def array(self, address: int) -> np.ndarray:
        """What the array that was put at this address holds now."""
        dtype, shape = self.arrays[address]
        return self.data[address:][: dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)


def thread(who, i: int) -> int:
    return i if isinstance(who, slice) else int(who[i])


# ------------------------------------------------------------------------------------------------ reading a kernel


@dataclasses.dataclass
class Instruction:
    text: str
    run: Callable | None  # of the Launch; None where the loop of launch() does it
    guard: str | None = None  # the predicate register, if any
    unless: bool = False  # @!p
    jump: str = ""  # "bra" or "ret"
    target: int = 0
    meets: str = ""  # whom it waits for: "warp" or "block"


class Kernel:
    """One .entry of a PTX text, the only one whose (mangled) name contains `name`."""

    def __init__(self, ptx: str, name: str):
        ptx = re.sub(r"//[^\n]*|^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.M)
        entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx))
        (entry,) = [e for e in entries if name in e[1]] or [None]
        if entry is None:
            raise KeyError(f"no kernel {name!r} in this PTX; it has {', '.join(e[1] for e in entries) or 'none'}")
        self.name, depth, end = entry[1], 1, entry.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        body = ptx[entry.end() : end - 1]
        limit = re.search(r"\.(max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3])
        self.max_threads = int(np.prod([int(x or 1) for x in limit.groups()[1:]])) if limit else 1024
        self.registers: dict[str, np.dtype] = {}
        self.symbols: dict[str, int] = {}  # addresses in their own spaces
        self.parameters = self.place(re.findall(r"\.(param)\b([^,\[]*?)([\w$]+)(\[\d+\])?\s*(?:,|$)", entry[2].strip()))
        declared = re.findall(r"\.(shared|local)\b([^;\[]*?)([\w$]+)(\[\d*\])?\s*;", ptx)
        declared = [d for d in declared if re.search(rf"(?<![\w$]){re.escape(d[2])}(?![\w$])", body)]
        self.shared = self.place([d for d in declared if d[0] == "shared"])
        self.local = self.place([d for d in declared if d[0] == "local"])
        self.code = self.read(body)

    def place(self, declared) -> list[tuple[int, int]]:
        """Addresses for variables, with gaps between them; (address, bytes) of each, the dynamic one last, of 0 bytes."""
        placed, at = [], GAP
        for _, kind, name, count in sorted(declared, key=lambda d: d[3] == "[]"):
            size = TYPES[re.search(r"\.([busf]\d+)\b", kind)[1]].itemsize
            align = max(size, int((re.search(r"\.align\s+(\d+)", kind) or "01")[1]))
            at = self.symbols[name] = -(-at // align) * align
            placed.append((at, size * int(count[1:-1] or 0) if count else size))
            at += placed[-1][1] + GAP if count != "[]" else 0
        return placed

    def read(self, body: str) -> list[Instruction]:
        code, labels, scopes = [], {}, [{}]
        for brace, label, line in re.findall(r"\s*(?:([{}])|([\w$]+):(?=\s)|((?:[^;{}]|\{[^{};]*\})+);)", body):
            if brace == "{":  # inline assembly has its own names
                scopes.append({})
            elif brace:
                scopes.pop()
            elif label:
                labels[label] = len(code)
            elif register := re.match(r"\.reg\s+\.(\w+)\s+(.*)", line, re.S):
                for name, count in re.findall(r"([%\w$]+)(?:<(\d+)>)?", register[2]):
                    for new in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                        scopes[-1][new] = new if len(scopes) == 1 else f"{new}@{len(code)}"
                        dtype = TYPES[register[1]]
                        self.registers[scopes[-1][new]] = dtype if dtype == bool else np.dtype(UNSIGNED[dtype.itemsize])
            elif not re.match(r"\.(shared|local|pragma|extern)\b", line):
                names = {k: v for scope in scopes for k, v in scope.items()} if len(scopes) > 1 else scopes[0]
                guard, opcode, operands = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", line, re.S).groups()
                operands = re.sub(r"%?[\w$]+", lambda t, names=names: names.get(t[0], t[0]), operands)
                guard = guard and re.sub(r"[%\w$]+", lambda t, names=names: names.get(t[0], t[0]), guard)
                code.append((" ".join(line.split()), guard, opcode, operands))
        return [self.decode(labels, *one) for one in code]

    def decode(self, labels, text, guard, opcode, operands) -> Instruction:
        operands = [x.strip() for x in re.split(r",(?![^{]*\})", operands)] if operands else []
        head, *words = opcode.replace("::cta", "").split(".")
        instruction = Instruction(text, None, guard and guard.lstrip("!"), bool(guard) and guard[0] == "!")
        if head == "bra":
            instruction.jump, instruction.target = "bra", labels[operands[0]]
        elif head in ("ret", "exit"):
            instruction.jump = "ret"
        else:
            known = DECODERS.get(head)
            if known is None:
                raise NotImplementedError(f"{self.name}: {text}")
            decoder, flags, instruction.meets = known
            types = [w for w in words if w in TYPES]
            if unknown := set(words) - set(types) - flags:
                raise NotImplementedError(f"{self.name}: {text}: {', '.join(unknown)}")
            instruction.run = decoder(self, head, {w for w in words if w not in TYPES}, types, operands)
            if "warp" in words:
                instruction.meets = "warp"
        return instruction

    # An operand, as a function of the launch.

    def source(self, text: str, type: str) -> Callable:
        """Gives the operand's value for each thread (or one value for all), as numbers of this type."""
        want = TYPES[type]
        if text.startswith("!"):
            get = self.source(text[1:], type)
            return lambda s: ~get(s)
        if text.startswith("{"):
            parts = elements(text)
            get = [self.source(x, f"b{8 * want.itemsize // len(parts)}") for x in parts]
            packed = UNSIGNED[want.itemsize]
            return lambda s: numbers(np.stack(np.broadcast_arrays(*[g(s) for g in get]), -1).view(packed)[:, 0], type)
        if text in self.registers:
            if type == "pred":
                return lambda s: s.registers[text][s.who]
            if self.registers[text].itemsize < want.itemsize:
                raise NotImplementedError(f"{self.name}: {text} read as {type}")
            unsigned = UNSIGNED[want.itemsize]
            return lambda s: numbers(s.registers[text][s.who].astype(unsigned, copy=False), type)
        if text.startswith("%"):
            if text not in SPECIAL:
                raise NotImplementedError(f"{self.name}: {text}")
            return lambda s: s.special[text][s.who].astype(want)
        if text[:2].lower() in ("0f", "0d"):
            constant = int(text[2:], 16)
        elif symbol := re.match(r"([A-Za-z_$][\w$]*)(?:\+(-?\d+))?$", text):
            constant = self.symbols[symbol[1]] + int(symbol[2] or 0)
        else:
            constant = int(text.rstrip("U"), 0)
        constant &= (1 << 8 * want.itemsize) - 1
        constant = numbers(np.array([constant], UNSIGNED[want.itemsize]), type)
        return lambda s: constant

    def sink(self, text: str, type: str) -> Callable:
        """Takes the launch and a value for each thread of it (or one for all)."""
        if text == "_":
            return lambda s, x: None
        if text.startswith("{"):
            parts = elements(text)
            narrow = f"b{8 * TYPES[type].itemsize // len(parts)}"
            put = [self.sink(x, narrow) for x in parts]

            def unpack(s, x):
                x = bits(x, type).view(TYPES[narrow]).reshape(-1, len(parts))
                for i, p in enumerate(put):
                    p(s, x[:, i])

            return unpack
        if self.registers[text].itemsize < TYPES[type].itemsize:
            raise NotImplementedError(f"{self.name}: {text} written as {type}")

        def put(s, x):
            s.registers[text][s.who] = bits(x, type)

        return put

    def address(self, text: str) -> Callable:
        base, offset = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]$", text).groups()
        wide = base not in self.registers or self.registers[base].itemsize == 8
        get, offset = self.source(base, "b64" if wide else "b32"), int(offset or 0)
        return lambda s: get(s).astype(np.int64) + offset


def elements(text: str) -> list[str]:
    return [x.strip() for x in text.strip("{}").split(",")]


# ------------------------------------------------------------------------------------------------ instructions

DECODERS: dict[str, tuple[Callable, set[str], str]] = {}


def decodes(heads: str, flags: str = "", meets: str = ""):
    """Registers a decoder: (kernel, head, flags, types, operands) -> what a launch does for s.who."""

    def register(decoder):
        DECODERS.update({head: (decoder, set(flags.split()), meets) for head in heads.split()})
        return decoder

    return register


def flush(x):
    """.ftz: subnormal numbers become zeros."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(x.dtype.type(0), x), x)


def saturate(x):
    return np.fmin(np.fmax(x, 0), 1)  # NaN becomes 0


def plain(k, function, flags, type, target, sources) -> Callable:
    """target = function(sources), the sources given as (operand, type)."""
    get, put = [k.source(*x) for x in sources], k.sink(target, type)
    if "ftz" in flags:
        return lambda s: put(s, flush(function(*[flush(g(s)) for g in get])))
    if "sat" in flags:
        return lambda s: put(s, saturate(function(*[g(s) for g in get])))
    return lambda s: put(s, function(*[g(s) for g in get]))


def divide(x, y):
    """Of integers, towards zero."""
    if (y == 0).any():
        raise Fault("an integer is divided by zero")
    return (x - np.fmod(x, y)) // y


FUNCTIONS = {
    **{"add": np.add, "sub": np.subtract, "rem": lambda x, y: x - y * divide(x, y), "copysign": lambda x, y: np.copysign(y, x)},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert},
    **{"neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax},
    **{"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "tanh": np.tanh},
    **{"rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x)},
}


@decodes(" ".join([*FUNCTIONS, "div"]), "rn approx full ftz sat NaN")
def elementwise(k, head, flags, types, args):
    (type,) = types
    if head == "div":
        function = np.divide if "f" in type else divide
    elif "NaN" in flags:
        function = {"min": np.minimum, "max": np.maximum}[head]
    elif head in ("ex2", "lg2", "sqrt", "tanh", "rcp", "rsqrt"):
        function = lambda x: FUNCTIONS[head](x.astype(np.float64))  # noqa: E731
    else:
        function = FUNCTIONS[head]
    return plain(k, function, flags, type, args[0], [(x, type) for x in args[1:]])


@decodes("mul mad fma", "rn lo hi wide ftz sat")
def multiply(k, head, flags, types, args):
    (type,) = types
    result = type
    if "f" in type:
        exact = np.float64 if head != "mul" else None  # products of float32 are exact in float64; then one sum, rounded
        function = lambda x, y, z=None: x * y if z is None else x.astype(exact) * y + z  # noqa: E731
    else:
        size = 8 * TYPES[type].itemsize
        if "wide" in flags:
            result = f"{type[0]}{2 * size}"
        wide = object if size == 64 else TYPES[f"{type[0]}{2 * size}"]
        narrow = TYPES[result]

        def function(x, y, z=0):
            if "lo" in flags:
                return x * y + z
            x = x.astype(wide) * y.astype(wide)
            return (x if "wide" in flags else x >> size).astype(narrow) + z

    return plain(k, function, flags, result, args[0], [*((x, type) for x in args[1:3]), *((x, result) for x in args[3:])])


@decodes("shl shr")
def shift(k, head, flags, types, args):
    (type,) = types
    size = 8 * TYPES[type].itemsize

    def function(x, n):
        some = np.minimum(n, size - 1).astype(x.dtype)
        y = x << some if head == "shl" else x >> some
        return y if type[0] == "s" else np.where(n < size, y, 0)

    return plain(k, function, flags, type, args[0], [(args[1], type), (args[2], "u32")])


@decodes("shf", "l r wrap clamp")
def funnel_shift(k, head, flags, types, args):
    def function(low, high, n):
        n = n.astype(np.uint64) & 31 if "wrap" in flags else np.minimum(n, 32).astype(np.uint64)
        both = high.astype(np.uint64) << 32 | low
        return both << n >> 32 if "l" in flags else both >> n

    return plain(k, function, flags, "b32", args[0], [(x, "u32") for x in args[1:]])


@decodes("bfe bfi")
def bit_field(k, head, flags, types, args):
    (type,) = types
    if TYPES[type].itemsize != 4:
        raise NotImplementedError(f"{head}.{type}")

    def field(position, length):
        return np.minimum(position & 255, 32).astype(np.int64), np.minimum(length & 255, 32).astype(np.int64)

    def extract(x, position, length):
        position, length = field(position, length)
        y = (x.astype(np.int64) >> position) & ((1 << length) - 1)
        negative = (type[0] == "s") & (length > 0) & (y >> np.maximum(length - 1, 0) & 1 == 1)
        return (y - np.where(negative, 1 << length, 0)).astype(TYPES[type])

    def insert(x, into, position, length):
        position, length = field(position, length)
        mask = ((1 << length) - 1) << position
        return ((x.astype(np.int64) << position & mask) | (into & ~mask)).astype(np.uint32)

    kinds = [type, *["b32"] * (len(args) - 2)] if head == "bfe" else ["b32"] * 4
    return plain(k, extract if head == "bfe" else insert, flags, type, args[0], list(zip(args[1:], kinds, strict=True)))


@decodes("prmt")
def permute_bytes(k, head, flags, types, args):
    def function(a, b, selector):
        both, y = b.astype(np.uint64) << 32 | a, np.uint32(0)
        for i in range(4):
            which = (selector >> 4 * i & 15).astype(np.uint64)
            byte = both >> 8 * (which & 7) & 255
            y = y | (np.where(which & 8, (byte >> 7) * 255, byte) << 8 * i).astype(np.uint32)
        return y

    return plain(k, function, flags, "b32", args[0], [(x, "u32") for x in args[1:]])


@decodes("lop3")
def any_logic(k, head, flags, types, args):
    table = int(args.pop(), 0)

    def function(a, b, c):
        terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
        return np.bitwise_or.reduce(np.broadcast_arrays(*terms)) if terms else np.uint32(0)

    return plain(k, function, flags, "b32", args[0], [(x, "b32") for x in args[1:]])


@decodes("mov")
def move(k, head, flags, types, args):
    return plain(k, lambda x: x, flags, types[0], args[0], [(args[1], types[0])])


@decodes("cvta", "to global shared local")
def convert_address(k, head, flags, types, args):
    offset = (SHARED if "shared" in flags else LOCAL if "local" in flags else 0) * (-1 if "to" in flags else 1)
    return plain(k, lambda x: x + offset, flags, "s64", args[0], [(args[1], "s64")])


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt", "rn rni rzi rmi rpi ftz sat")
def convert(k, head, flags, types, args):
    to, of = types
    whole = ROUNDINGS.get("".join(flags & set(ROUNDINGS)))
    sources = [(x, of) for x in args[1:]]
    if to.endswith("x2"):  # cvt.rn.bf16x2.f32 d, high, low
        function = lambda high, low: np.stack(np.broadcast_arrays(low, high), -1)  # noqa: E731
    elif "f" in of and "f" not in to:
        range_ = np.iinfo(TYPES[to])
        highest = float(range_.max) if range_.bits < 64 else np.nextafter(float(range_.max), 0)

        def function(x):  # beyond the range: its end; NaN: 0
            x = np.clip(whole(x.astype(np.float64)), float(range_.min), highest)
            return np.where(np.isnan(x), 0, x).astype(TYPES[to])

        flags = flags - {"sat"}
    elif "sat" in flags and "f" not in to:
        raise NotImplementedError("cvt.sat between integers")
    else:
        function = whole or (lambda x: x)
    return plain(k, function, flags if "f" in of else flags - {"ftz"}, to, args[0], sources)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARISONS |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@decodes("setp", " ".join([*COMPARISONS, *UNORDERED, *LOGIC, "num nan ftz"]))
def compare(k, head, flags, types, args):
    (type,) = types
    (name,) = flags - set(LOGIC) - {"ftz"}
    logic = LOGIC.get("".join(flags & set(LOGIC)))
    targets = [k.sink(x.strip(), "pred") for x in args[0].split("|")]
    x, y, *more = [k.source(a, t) for a, t in zip(args[1:], (type, type, "pred"), strict=False)]

    def run(s):
        a, b = (flush(g(s)) if "ftz" in flags else g(s) for g in (x, y))
        answer = np.zeros(1, bool)
        if name not in ("num", "nan"):
            answer = COMPARISONS[UNORDERED.get(name, name)](a, b)
        if "f" in type:  # NaN compares true in the unordered kind only, where numpy says so of "not equal" always
            unordered = np.isnan(a) | np.isnan(b)
            answer = answer | unordered if name in UNORDERED or name == "nan" else (answer | (name == "num")) & ~unordered
        for put, value in zip(targets, (answer, ~answer), strict=False):
            put(s, logic(value, more[0](s)) if logic else value)

    return run


@decodes("selp")
def select(k, head, flags, types, args):
    sources = [*((x, types[0]) for x in args[1:3]), (args[3], "pred")]
    return plain(k, lambda x, y, p: np.where(p, x, y), flags, types[0], args[0], sources)


SPACES = {"global", "shared", "local", "param"}
HINTS = "nc ca cg cs lu cv wb wt weak volatile L1::no_allocate L1::evict_first L1::evict_last L2::64B L2::128B L2::256B"


def place(k, flags, operand) -> Callable:
    """(space, address in it) of a memory operand; a generic address says its space itself."""
    get, name = k.address(operand), "".join(flags & SPACES)

    def run(s):
        address = get(s)
        if name:
            return s.spaces[name], address
        first = int(address[0])
        kind, start = ("local", LOCAL) if first >= LOCAL else ("shared", SHARED) if first >= SHARED else ("global", 0)
        return s.spaces[kind], address - start

    return run


@decodes("ld st", f"{' '.join(SPACES)} v2 v4 {HINTS}")
def load_or_store(k, head, flags, types, args):
    type, count = types[0], 4 if "v4" in flags else 2 if "v2" in flags else 1
    size = TYPES[type].itemsize * count
    registers, where = args if head == "ld" else args[::-1]
    registers, where = elements(registers), place(k, flags, where)
    if head == "ld":
        put = [k.sink(x, type) for x in registers]

        def run(s):
            space, address = where(s)
            x = space.load(s.who, address, size).view(TYPES[type]).reshape(-1, count)
            for i, p in enumerate(put):
                p(s, x[:, i])
    else:
        get = [k.source(x, type) for x in registers]

        def run(s):
            space, address = where(s)
            x = np.empty((s.count, count), TYPES[type])
            for i, g in enumerate(get):
                x[:, i] = g(s)
            space.store(s.who, address, x.view(f"V{size}")[:, 0])

    return run


@decodes("red atom", "global add relaxed gpu")
def atomic_add(k, head, flags, types, args):
    """Only the sum: nobody may use what was there before."""
    (type,) = types
    where, get = place(k, flags, args[-2]), k.source(args[-1], type)
    poison = k.sink(args[0], type) if head == "atom" else lambda s, x: None

    def run(s):
        space, address = where(s)
        cells = space.cells(s.who, address, TYPES[type].itemsize, "writes")
        np.add.at(space.data.view(TYPES[type]), cells, get(s))
        poison(s, np.full(1, np.nan if "f" in type else -1, TYPES[type]))

    return run


@decodes("cp", f"async ca cg shared global commit_group wait_group wait_all {HINTS}")
def asynchronous_copy(k, head, flags, types, args):
    """Read when issued, written when waited for: who reads too early reads what was there before."""
    if "commit_group" in flags:

        def run(s):
            s.committed[s.who] += 1

    elif flags & {"wait_group", "wait_all"}:
        keep = 0 if "wait_all" in flags else int(args[0])

        def run(s):
            s.committed[s.who] += "wait_all" in flags
            waits = np.zeros(s.committed.size, bool)
            waits[s.who] = True
            for n in range(len(s.copies)):
                who, address, x, group = s.copies.pop(0)
                now = waits[who] & (group < s.committed[who] - keep)
                s.spaces["shared"].store(who[now], address[now], x[now])
                if not now.all():
                    s.copies.append([part[~now] for part in (who, address, x, group)])
    else:
        to, of, size = k.address(args[0]), k.address(args[1]), int(args[2])
        get = k.source(args[3] if len(args) > 3 else args[2], "u32")

        def run(s):
            who = np.arange(s.committed.size)[s.who]
            address, start, given = (np.broadcast_to(x(s), who.shape) for x in (to, of, get))
            x = np.zeros((who.size, size), np.uint8)
            for length in set(given[given > 0].tolist()):  # the rest of `size` is filled with zeros
                some = given == length
                if length == size:
                    x[some] = s.spaces["global"].load(who[some], start[some], size).view(np.uint8).reshape(-1, size)
                else:
                    for i in range(length):
                        x[some, i] = s.spaces["global"].load(who[some], start[some] + i, 1).view(np.uint8)
            s.spaces["shared"].claim(who, address, size)
            s.copies.append([who, address, x.view(f"V{size}")[:, 0], s.committed[who]])

    return run


# Instructions of a whole warp: s.who is whole warps, in order.


@decodes("bar barrier", "sync warp aligned", meets="block")
def barrier(k, head, flags, types, args):
    if "warp" in flags:
        check = whole_warp(k, args[0])
        return lambda s: check(s) or s.spaces["shared"].synchronise(s.block[s.who][::32], s.thread[s.who][::32] // 32)
    if args != ["0"]:
        raise NotImplementedError("a barrier other than that of the whole block")
    return lambda s: s.spaces["shared"].synchronise(np.unique(s.block[s.who]))


def whole_warp(k, mask: str) -> Callable:
    get = k.source(mask, "s32")

    def check(s):
        if (get(s) != -1).any():
            raise NotImplementedError("an instruction of a part of a warp")

    return check


@decodes("shfl", "sync up down bfly idx", meets="warp")
def shuffle(k, head, flags, types, args):
    check = whole_warp(k, args[4])
    value, b, c = (k.source(x, "b32") for x in args[1:4])
    target, *inside = args[0].split("|")
    put, put_inside = k.sink(target, "b32"), k.sink(inside[0] if inside else "_", "pred")
    (mode,) = flags - {"sync"}

    def run(s):
        check(s)
        shape = (s.count // 32, 32)
        x, n, limits = (np.broadcast_to(g(s), s.count).reshape(shape).astype(np.int64) for g in (value, b, c))
        lane, n, clamp, segment = np.arange(32), n & 31, limits & 31, limits >> 8 & 31
        first, last = lane & segment, (lane & segment) | (clamp & ~segment)
        j = {"up": lane - n, "down": lane + n, "bfly": lane ^ n, "idx": first | (n & ~segment)}[mode]
        found = j >= last if mode == "up" else j <= last
        put(s, np.take_along_axis(x, np.where(found, j, lane), 1).astype(np.uint32).reshape(-1))
        put_inside(s, found.reshape(-1))

    return run


@decodes("vote", "sync any all ballot", meets="warp")
def vote(k, head, flags, types, args):
    check = whole_warp(k, args[2])
    get, put = k.source(args[1], "pred"), k.sink(args[0], types[0])

    def run(s):
        check(s)
        x = np.broadcast_to(get(s), s.count).reshape(-1, 32)
        if "ballot" in flags:
            x = (x.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        else:
            x = x.any(1) if "any" in flags else x.all(1)
        put(s, np.repeat(x, 32))

    return run


@decodes("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared", meets="warp")
def load_matrices(k, head, flags, types, args):
    put, get = [k.sink(x, "b32") for x in elements(args[0])], k.address(args[1])
    n = len(put)

    def run(s):  # thread i of a warp gives the address of row i % 8 of matrix i // 8
        threads = np.arange(s.block.size)[s.who].reshape(-1, 32)[:, : 8 * n].reshape(-1)
        address = np.broadcast_to(get(s), s.count).reshape(-1, 32)[:, : 8 * n].reshape(-1)
        x = s.spaces["shared"].load(threads, address, 16).view(np.uint16).reshape(-1, n, 8, 8)
        x = np.ascontiguousarray(x.swapaxes(2, 3) if "trans" in flags else x)
        x = x.view(np.uint32).reshape(-1, n, 32)  # thread 4 r + c gets elements 2 c and 2 c + 1 of row r
        for i, p in enumerate(put):
            p(s, x[:, i].reshape(-1))

    return run


@decodes("mma", "sync aligned m16n8k16 m16n8k8 row col", meets="warp")
def matrix_product(k, head, flags, types, args):
    """D = A B + C, with A (16, K), B (K, 8). Thread 4 g + t holds pairs 2 t, 2 t + 1 along K of A's rows and B's columns
    g (and 8 rows or 8 of K on in the further registers), and of C and D the columns 2 t, 2 t + 1 in rows g and g + 8."""
    if types[0] != "f32" or types[3] != "f32" or types[1] != types[2] or types[1] not in ("f16", "bf16"):
        raise NotImplementedError(f"mma of {types}")
    D, A, B, C = (elements(x) for x in args)
    put, get_C = [k.sink(x, "f32") for x in D], [k.source(x, "f32") for x in C]
    get_A, get_B = ([k.source(x, types[1] + "x2") for x in registers] for registers in (A, B))
    g, t = np.divmod(np.arange(32), 4)

    def run(s):
        warps, pairs = s.count // 32, 4 * len(B)
        a, b = np.empty((warps, 16, pairs, 2), np.float32), np.empty((warps, 8, pairs, 2), np.float32)
        for i, get in enumerate(get_A):
            a[:, g + 8 * (i % 2), t + 4 * (i // 2)] = get(s).reshape(warps, 32, 2)
        for i, get in enumerate(get_B):
            b[:, g, t + 4 * i] = get(s).reshape(warps, 32, 2)
        product = a.reshape(warps, 16, -1) @ b.reshape(warps, 8, -1).swapaxes(1, 2)  # (warps, 16, 8)
        for i, (c, p) in enumerate(zip([c(s) for c in get_C], put, strict=True)):
            p(s, c + product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1))

    return run


@decodes("membar fence", "cta gl sys acq_rel sc gpu")
def fence(k, head, flags, types, args):
    return lambda s: None


@decodes("trap")
def trap(k, head, flags, types, args):
    def run(s):
        raise Fault("trap")

    return run


# ------------------------------------------------------------------------------------------------ running


class Launch:
    """The state: registers, memories, and in `who` and `count` the threads that run the present instruction."""

    def __init__(self, kernel: Kernel, grid, block, arguments, memory: Memory, dynamic_shared: int):
        grid, block = (((x,) if isinstance(x, int) else tuple(x)) + (1, 1, 1) for x in (grid, block))
        blocks, threads = int(np.prod(grid[:3])), int(np.prod(block[:3]))
        n = blocks * threads
        if threads % 32 or threads > kernel.max_threads or not 0 < blocks < 2**15:
            raise ValueError(f"{blocks} blocks of {threads} threads: whole warps, up to {kernel.max_threads} threads")
        self.block, self.thread = np.divmod(np.arange(n), threads)
        self.special = {"%laneid": self.thread % 32}
        for size, of_grid, place in ((block, "", self.thread), (grid, "cta", self.block)):
            for i, axis in enumerate("xyz"):
                name = f"%{of_grid or 't'}id.{axis}"
                self.special[name] = place // int(np.prod(size[:i])) % size[i]
                self.special[f"%n{name[1:]}"] = np.full(n, size[i])
        self.registers = {name: np.zeros(n, dtype) for name, dtype in kernel.registers.items()}
        self.committed, self.copies = np.zeros(n, np.int64), []  # cp.async: groups so far; (who, where, what, group)
        sizes = [size for _, size in kernel.parameters]
        given = [np.asarray(x).tobytes() for x in arguments]
        if [len(x) for x in given] != sizes:
            raise ValueError(f"{kernel.name} takes arguments of {sizes} bytes, not {[len(x) for x in given]}")
        launch_, warp = np.zeros(n, np.int64), self.thread // 32
        shared = [(at, size or dynamic_shared) for at, size in kernel.shared]
        self.spaces = {
            "global": Tracked("global", memory.allowed, launch_, self.block, self.block, memory.data),
            "param": Space("param", mapped(kernel.parameters, 1), launch_),
            "shared": Tracked("shared", mapped(shared, 2), self.block, self.thread, warp),
            "local": Space("local", mapped(kernel.local, 2), np.arange(n) if kernel.local else launch_),
        }
        for (at, size), x in zip(kernel.parameters, given, strict=True):
            self.spaces["param"].data[at : at + size] = np.frombuffer(x, np.uint8)


def mapped(variables: list[tuple[int, int]], how: int) -> np.ndarray:
    """The bytes of a window that these variables are in; a multiple of 16 long, and a gap at the end."""
    allowed = np.zeros(-(-max([at + size for at, size in variables], default=0) // 16) * 16 + GAP, np.uint8)
    for at, size in variables:
        allowed[at : at + size] = how
    return allowed


def launch(kernel, grid, block, arguments, memory, dynamic_shared=0, limit=1_000_000) -> int:
    """Run the kernel; how many instructions were stepped. grid, block: a number or up to three.

    arguments: numpy scalars of the parameters' sizes, a struct as one of a structured dtype with align=True.
    """
    s = Launch(kernel, grid, block, arguments, memory, dynamic_shared)
    n, blocks = s.block.size, int(s.block[-1]) + 1
    alive = np.bincount(s.block)
    standing, waiting = {0: np.arange(n)}, {}  # instruction -> the threads that stand at it, in order

    def go(at, threads):
        if threads.size:
            standing[at] = np.sort(np.concatenate([standing[at], threads])) if at in standing else threads

    for step in range(limit):
        if not standing:
            if not waiting:
                return step
            where = ", ".join(f"{t.size} threads at {kernel.code[at].text!r}" for at, t in waiting.items())
            raise Fault(f"{kernel.name}: nobody can go on: {where} wait for others, {n - alive.sum()} have ended")
        at = min(standing)
        if at in waiting:
            go(at, waiting.pop(at))
        here, i = standing.pop(at), kernel.code[at]
        if i.guard:
            chosen = s.registers[i.guard][here] != i.unless
            go(at + 1, here[~chosen])
            here = here[chosen]
        if i.meets and here.size < n:
            if i.meets == "warp":
                complete = np.bincount(here // 32, minlength=n // 32)[here // 32] == 32
            else:
                complete = (np.bincount(s.block[here], minlength=blocks) == alive)[s.block[here]]
            if not complete.all():
                waiting[at] = here[~complete]
            here = here[complete]
        if not here.size:
            continue
        if i.jump == "bra":
            go(i.target, here)
        elif i.jump == "ret":
            alive -= np.bincount(s.block[here], minlength=blocks)
            for stop in list(waiting):  # those who waited for these threads may go on
                go(stop, waiting.pop(stop))
        else:
            s.who, s.count = slice(None) if here.size == n else here, here.size
            try:
                with np.errstate(all="ignore"):
                    i.run(s)
            except Fault as fault:
                raise Fault(f"{kernel.name}: {i.text!r}: {fault}") from None
            go(at + 1, here)
    raise Fault(f"{kernel.name}: no end after {limit} steps")
