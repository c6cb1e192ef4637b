# SPDX-License-Identifier: MIT
"""Executes PTX, the assembly that nvcc makes of a CUDA kernel, on the CPU in numpy: all threads of a launch at once.

What is checked is what the compiler made of a kernel, inline assembly included, and no GPU is needed. An instruction is
one step for all threads that stand at it. The threads that are furthest behind go first, so that those who parted at a
branch meet again behind it; at a barrier they wait for their block, at a shuffle, mma or ldmatrix for their warp. Fault
is raised for what a GPU would answer with an error, with garbage or not at all:

    an address outside every array, or misaligned, or written though it is an input; an integer divided by zero
    waiting for threads that have ended or wait elsewhere; no end
    two threads at one place of shared memory, one of them writing, with no barrier between them (__syncwarp within a
    warp, where only writes are told apart by thread); two blocks at one place of global memory, one of them writing

Memory that nobody wrote holds 0xFF, NaN in every floating-point type. cp.async writes when it is waited for, no sooner.
Not modelled: time, ptxas, other orders of execution than this one, the errors of ex2.approx and the like (rounded
correctly here), the order of the sums within an mma (numpy's, in float32). An opcode or a modifier that is not known
raises NotImplementedError when the kernel is read. Reference: NVIDIA, PTX ISA 9.0.

    memory = Memory()
    x, y = memory.add(array), memory.add(np.full_like(array, np.nan), writable=True)  # addresses
    launch(Kernel(ptx, "name"), 4, 128, [np.uint64(x), np.uint64(y)], memory)  # 4 blocks of 128 threads
    memory.array(y)

`who`, below: the threads that run an instruction, by their numbers in the launch, in order; a slice when it is all.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{kind}{8 * n}": f"{'i' if kind == 's' else 'u'}{n}" for kind in "bus" for n in UNSIGNED}
TYPES |= {"pred": "?", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
TYPES = {name: np.dtype(code) for name, code in TYPES.items()}
GAP = 256  # bytes between two arrays, and before the first
SHARED, LOCAL = 1 << 44, 1 << 45  # where generic addresses of these spaces begin; those of global memory are themselves
SEVERAL = np.int16(-1)


class Fault(RuntimeError):
    """The kernel did what a GPU would answer with an error, garbage or a hang."""


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
    """One kind of memory. A window of addresses for the launch (global, parameters), each block or each thread.

    allowed: for each byte of a window 0 (unmapped), 1 (to read) or 2 (to write too), with a gap at both ends.
    window: which window each thread has.
    """

    def __init__(self, name: str, allowed: np.ndarray, window: np.ndarray, data: np.ndarray | None = None):
        self.name, self.allowed, self.start = name, allowed, window.astype(np.int64) * allowed.size
        self.data = np.full(allowed.size * (int(window.max()) + 1), 0xFF, np.uint8) if data is None else data

    def cells(self, who, address: np.ndarray, size: int, verb: str) -> np.ndarray:
        """Where the threads' accesses lie in self.data, in units of their size."""
        needed = 2 if verb == "writes" else 1
        least = np.minimum(*(self.allowed.take(address + n, mode="clip") for n in (0, size - 1)))  # a gap is wider
        bad = (least < needed) | (address % size != 0)
        if bad.any():
            i = int(bad.argmax())
            why = "misaligned" if least[i] >= needed else "for reading only" if least[i] else "outside"
            raise Fault(f"thread {number(who, i)} {verb} {size} bytes at {self.name} {address[i]:#x}: {why}")
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
                raise Fault(f"race: thread {number(who, i)} {what}, {self.name} {cells[i] * size % self.allowed.size:#x}")

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


def number(who, i: int) -> int:
    return i if isinstance(who, slice) else int(who[i])


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


# ------------------------------------------------------------------------------------------------ reading a kernel


@dataclasses.dataclass
class Instruction:
    text: str
    run: Callable | None = None  # of the Launch; none for bra and ret
    guard: str = ""  # the predicate register of @p or @!p
    unless: bool = False
    target: int | None = None  # of bra; -1 for ret
    meets: str = ""  # whom its threads wait for: "warp" or "block"


class Kernel:
    """One .entry of a PTX text, the only one whose (mangled) name contains `name`."""

    def __init__(self, ptx: str, name: str):
        ptx = re.sub(r"//[^\n]*|^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.M)
        entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx))
        chosen = [e for e in entries if name in e[1]]
        if len(chosen) != 1:
            raise KeyError(f"{len(chosen)} kernels with {name!r} in the name; there are {', '.join(e[1] for e in entries)}")
        self.name, parameters, limit = chosen[0].groups()
        depth, end = 1, chosen[0].end()
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        body = ptx[chosen[0].end() : end - 1]
        limit = re.search(r"\.maxntid\s+([\d, ]+)", limit)
        self.max_threads = int(np.prod([int(x) for x in limit[1].split(",")])) if limit else 1024
        self.registers: dict[str, np.dtype] = {}
        self.symbols: dict[str, int] = {}  # addresses, each in its own space
        variable = r"\.({})\b([^;,\[]*?)([\w$]+)(\[\d*\])?\s*[;,]"
        self.parameters = self.place(re.findall(variable.format("param"), parameters.strip() + ","))
        declared = re.findall(variable.format("shared|local"), ptx)
        declared = [d for d in declared if re.search(rf"(?<![\w$]){re.escape(d[2])}(?![\w$])", body)]
        self.shared = self.place([d for d in declared if d[0] == "shared"])
        self.local = self.place([d for d in declared if d[0] == "local"])
        self.code = self.read(body)

    def place(self, declared) -> list[tuple[int, int]]:
        """Finds room for variables, with gaps between: (address, bytes). What is dynamic comes last, of 0 bytes."""
        placed, at = [], GAP
        for _, kind, name, count in sorted(declared, key=lambda d: d[3] == "[]"):
            size = TYPES[re.search(r"\.([busf]\d+)\b", kind)[1]].itemsize
            align = max(size, int((re.search(r"\.align\s+(\d+)", kind) or "01")[1]))
            at = self.symbols[name] = -(-at // align) * align
            placed.append((at, size * int(count[1:-1] or 0) if count else size))
            at += placed[-1][1] + GAP if count != "[]" else 0
        return placed

    def read(self, body: str) -> list[Instruction]:
        lines, labels, scopes = [], {}, [{}]  # inline assembly has names of its own, within braces
        for brace, label, line in re.findall(r"\s*(?:([{}])|([\w$]+):(?=\s)|((?:[^;{}]|\{[^{};]*\})+);)", body):
            if brace:
                scopes = [*scopes, {}] if brace == "{" else scopes[:-1]
            elif label:
                labels[label] = len(lines)
            elif register := re.match(r"\.reg\s+\.(\w+)\s+(.*)", line, re.S):
                size = TYPES[register[1]].itemsize
                for name, count in re.findall(r"([%\w$]+)(?:<(\d+)>)?", register[2]):
                    for new in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                        unique = scopes[-1][new] = new if len(scopes) == 1 else f"{new}@{len(lines)}"
                        self.registers[unique] = np.dtype(bool if register[1] == "pred" else UNSIGNED[size])
            elif line[0] != ".":
                names = {k: v for scope in scopes for k, v in scope.items()} if len(scopes) > 1 else scopes[0]
                guard, opcode, operands = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", line, re.S).groups(default="")
                guard, operands = (
                    re.sub(r"%?[\w$]+", lambda t, names=names: names.get(t[0], t[0]), x) for x in (guard, operands)
                )
                operands = [x.strip() for x in re.split(r",(?![^{]*\})", operands)] if operands else []
                lines.append((Instruction(" ".join(line.split()), None, guard.strip("!"), "!" in guard), opcode, operands))
            elif not re.match(r"\.(shared|local|pragma)\b", line):
                raise NotImplementedError(f"{self.name}: {line}")
        for instruction, opcode, operands in lines:
            self.decode(instruction, labels, opcode, operands)
        return [instruction for instruction, _, _ in lines]

    def decode(self, instruction, labels, opcode, operands):
        head, *words = opcode.replace("::cta", "").split(".")
        if head in ("bra", "ret"):
            instruction.target = labels[operands[0]] if operands else -1
            return
        decoder, known, instruction.meets = DECODERS.get(head, (None, (), ""))
        types, flags = [w for w in words if w in TYPES], {w for w in words if w not in TYPES}
        if decoder is None or flags - known:
            raise NotImplementedError(f"{self.name}: {instruction.text}")
        instruction.run = decoder(self, head, flags, types, operands)
        if "warp" in flags:
            instruction.meets = "warp"

    # Operands, as functions of the launch.

    def source(self, text: str, type: str) -> Callable:
        """Gives the operand's value for each thread (or one value for all), as numbers of this type."""
        want = TYPES[type]
        if "{" in text:
            parts, whole = elements(text), UNSIGNED[want.itemsize]
            get = [self.source(x, f"b{8 * want.itemsize // len(parts)}") for x in parts]
            return lambda s: numbers(np.stack(np.broadcast_arrays(*[g(s) for g in get]), -1).view(whole)[:, 0], type)
        if text.startswith("!"):
            get = self.source(text[1:], type)
            return lambda s: ~get(s)
        if text in self.registers:
            if self.registers[text].itemsize < want.itemsize:
                raise NotImplementedError(f"{self.name}: {text} read as {type}")
            if type == "pred":
                return lambda s: s.registers[text][s.who]
            return lambda s: numbers(s.registers[text][s.who].astype(UNSIGNED[want.itemsize], copy=False), type)
        if text.startswith("%"):
            if text not in SPECIAL:
                raise NotImplementedError(f"{self.name}: {text}")
            return lambda s: s.special[text][s.who].astype(want)
        if text[:2] in ("0f", "0F", "0d", "0D"):
            constant = int(text[2:], 16)
        elif symbol := re.match(r"([A-Za-z_$][\w$]*)(?:\+(-?\d+))?$", text):
            constant = self.symbols[symbol[1]] + int(symbol[2] or 0)
        else:
            constant = int(text.rstrip("U"), 0)
        constant = np.array([constant & ((1 << 8 * want.itemsize) - 1)], UNSIGNED[want.itemsize])
        constant = numbers(constant, type) if type != "pred" else constant != 0
        return lambda s: constant

    def sink(self, text: str, type: str) -> Callable:
        """Takes the launch and the operand's new value for each thread (or one for all)."""
        if "{" in text:
            parts = elements(text)
            narrow = f"b{8 * TYPES[type].itemsize // len(parts)}"
            put = [self.sink(x, narrow) for x in parts]

            def unpack(s, x):
                for i, p in enumerate(put):
                    p(s, bits(x, type).view(TYPES[narrow]).reshape(-1, len(parts))[:, i])

            return unpack
        if text == "_":
            return lambda s, x: None
        if self.registers[text].itemsize < TYPES[type].itemsize:
            raise NotImplementedError(f"{self.name}: {text} written as {type}")

        def put(s, x):
            s.registers[text][s.who] = bits(x, type)

        return put

    def address(self, text: str) -> Callable:
        base, offset = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]$", text).groups(default="0")
        narrow = base in self.registers and self.registers[base].itemsize == 4
        get, offset = self.source(base, "b32" if narrow else "b64"), int(offset)
        return lambda s: get(s).astype(np.int64) + offset


def elements(text: str) -> list[str]:
    return [x.strip() for x in text.strip("{}").split(",")]


# ------------------------------------------------------------------------------------------------ instructions

DECODERS: dict[str, tuple[Callable, set[str], str]] = {}


def decodes(heads: str, flags: str = "", meets: str = ""):
    """Registers a decoder: from (kernel, head, flags, types, operands) to what the launch does for s.who."""

    def register(decoder):
        DECODERS.update({head: (decoder, set(flags.split()), meets) for head in heads.split()})
        return decoder

    return register


def computes(heads: str, flags: str = ""):
    """Registers a decoder of what is a function of numbers alone: from (head, flags, types) to that function.

    Sources and result have the one type of the instruction unless their types are given too, the result's first.
    """

    def register(choose):
        def decoder(k, head, flags, types, args):
            function, *given = choose(head, flags, types)
            result, *sources = given or [types[0]] * len(args)
            get, put = [k.source(x, t) for x, t in zip(args[1:], sources, strict=False)], k.sink(args[0], result)
            first = flush if "ftz" in flags else lambda x: x
            last = saturate if "sat" in flags and "f" in result else first
            return lambda s: put(s, last(function(*[first(g(s)) for g in get])))

        return decodes(heads, flags)(decoder)

    return register


def flush(x):
    """.ftz: zeros for subnormal float32."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(x.dtype.type(0), x), x) if x.dtype.kind == "f" else x


def saturate(x):
    return np.fmin(np.fmax(x, 0), 1)  # NaN becomes 0


def quotient(x, y):
    """Of integers, towards zero."""
    if (y == 0).any():
        raise Fault("an integer is divided by zero")
    return (x - np.fmod(x, y)) // y


INTEGER = {"div": quotient, "rem": lambda x, y: x - y * quotient(x, y), "min": np.minimum, "max": np.maximum}
FLOAT = {"div": np.divide, "min": np.fmin, "max": np.fmax, "rcp": lambda x: 1 / x, "sqrt": np.sqrt}
FLOAT |= {"ex2": lambda x: np.exp2(x, dtype=np.float64), "lg2": lambda x: np.log2(x, dtype=np.float64)}
EITHER = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "mov": lambda x: x}
EITHER |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@computes(" ".join({**INTEGER, **FLOAT, **EITHER}), "rn approx full ftz sat")
def elementwise(head, flags, types):
    return [({**EITHER, **(FLOAT if "f" in types[0] else INTEGER)})[head]]


@computes("mul mad fma", "rn lo hi wide ftz sat")
def multiply(head, flags, types):
    (type,) = types
    if "f" in type:
        if head == "mul":
            return [np.multiply]
        return [lambda x, y, z: x.astype(np.float64) * y + z]  # exact but for the sum, for all types but f64
    if "lo" in flags:
        return [lambda x, y, z=0: x * y + z]
    size = 8 * TYPES[type].itemsize
    double = f"{type[0]}{2 * size}"
    wide = TYPES.get(double, object)  # Python's own integers for the products of 64 bits
    if "wide" in flags:
        return [lambda x, y, z=0: x.astype(wide) * y + z, double, type, type, double]
    return [lambda x, y, z=0: (x.astype(wide) * y.astype(wide) >> size).astype(TYPES[type]) + z]


@computes("shl shr")
def shift(head, flags, types):
    (type,) = types
    size = 8 * TYPES[type].itemsize

    def function(x, n):
        some = np.minimum(n, size - 1).astype(x.dtype)
        y = x << some if head == "shl" else x >> some
        return y if type[0] == "s" else np.where(n < size, y, 0)

    return function, type, type, "u32"


@computes("bfe")
def bit_field(head, flags, types):
    def function(x, position, length):
        position, length = (np.minimum(n & 255, 32).astype(np.int64) for n in (position, length))
        y = x.astype(np.int64) >> position & (1 << length) - 1
        negative = (types[0] == "s32") & (length > 0) & (y >> np.maximum(length - 1, 0) & 1 == 1)
        return y - np.where(negative, 1 << length, 0)

    return function, types[0], types[0], "u32", "u32"


@computes("prmt")
def permute_bytes(head, flags, types):
    def function(a, b, selector):
        result, pair = np.uint32(0), b.astype(np.uint64) << 32 | a
        for i in range(4):
            n = (selector >> 4 * i & 15).astype(np.uint64)
            byte = pair >> 8 * (n & 7) & 255
            result = result | np.where(n & 8, (byte >> 7) * 255, byte).astype(np.uint32) << 8 * i
        return result

    return [function]


@computes("selp")
def select(head, flags, types):
    return lambda x, y, p: np.where(p, x, y), types[0], types[0], types[0], "pred"


@computes("cvta", "to global shared local")
def convert_address(head, flags, types):
    start = SHARED if "shared" in flags else LOCAL if "local" in flags else 0
    return lambda x: x - start if "to" in flags else x + start, "s64", "s64"


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@computes("cvt", "rn rni rzi rmi rpi ftz sat")
def convert(head, flags, types):
    to, of = types
    rounded = ROUNDINGS.get("".join(flags & {*ROUNDINGS}), lambda x: x)
    if to.endswith("x2"):  # cvt.rn.bf16x2.f32 d, high, low
        return lambda high, low: np.stack(np.broadcast_arrays(low, high), -1), to, of, of
    if "f" in of and "f" not in to:
        ends = np.iinfo(TYPES[to])
        most = float(ends.max) if ends.bits < 64 else np.nextafter(float(ends.max), 0)

        def function(x):  # what is beyond the range becomes its end, NaN 0
            x = np.clip(rounded(x.astype(np.float64)), float(ends.min), most)
            return np.where(np.isnan(x), 0, x)

        return function, to, of
    if "sat" in flags and "f" not in to:
        raise NotImplementedError("cvt.sat between integers")
    return rounded, to, of


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARISONS |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
UNORDERED = {f"{name}u": COMPARISONS[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}  # true of NaN
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@decodes("setp", " ".join([*COMPARISONS, *UNORDERED, *LOGIC, "num nan ftz"]))
def compare(k, head, flags, types, args):
    (name,) = flags - {*LOGIC, "ftz"}
    combine = LOGIC.get("".join(flags & {*LOGIC}))
    function = {**COMPARISONS, **UNORDERED}.get(name, lambda x, y: np.full(1, name == "num"))
    get = [k.source(x, types[0]) for x in args[1:3]]
    third = k.source(args[3], "pred") if combine else None
    put = [k.sink(x.strip(), "pred") for x in args[0].split("|")]

    def run(s):
        x, y = (flush(g(s)) if "ftz" in flags else g(s) for g in get)
        answer = function(x, y)
        if "f" in types[0]:
            nan = np.isnan(x) | np.isnan(y)
            answer = answer | nan if name in UNORDERED or name == "nan" else answer & ~nan
        for p, a in zip(put, (answer, ~answer), strict=False):
            p(s, combine(a, third(s)) if combine else a)

    return run


SPACES = ("global", "shared", "local", "param")
HINTS = "nc ca cg cs volatile L1::no_allocate L1::evict_first L1::evict_last L2::64B L2::128B L2::256B"


def memory_operand(k, flags, text) -> Callable:
    """The space and the addresses in it; a generic address says itself which space it is in."""
    get, (name, *_) = k.address(text), [*(flags & {*SPACES}), ""]

    def run(s):
        address = get(s)
        if name:
            return s.spaces[name], address
        kind, start = max((start, kind) for kind, start in (("global", 0), ("shared", SHARED), ("local", LOCAL)) if start <= address[0])[::-1]
        return s.spaces[kind], address - start

    return run


@decodes("ld st", f"{' '.join(SPACES)} v2 v4 {HINTS}")
def load_or_store(k, head, flags, types, args):
    (type,) = types
    registers, place = args if head == "ld" else args[::-1]
    registers, place = elements(registers), memory_operand(k, flags, place)
    count, size = len(registers), len(registers) * TYPES[type].itemsize
    if head == "ld":
        put = [k.sink(x, type) for x in registers]

        def run(s):
            space, address = place(s)
            x = space.load(s.who, address, size).view(TYPES[type]).reshape(-1, count)
            for i, p in enumerate(put):
                p(s, x[:, i])
    else:
        get = [k.source(x, type) for x in registers]

        def run(s):
            space, address = place(s)
            x = np.empty((s.count, count), TYPES[type])
            for i, g in enumerate(get):
                x[:, i] = g(s)
            space.store(s.who, address, x.view(f"V{size}")[:, 0])

    return run


@decodes("cp", f"async shared global commit_group wait_group wait_all {HINTS}")
def copy_async(k, head, flags, types, args):
    """Read when issued, written when waited for. Who reads too soon gets what was there before."""
    if "commit_group" in flags:

        def run(s):
            s.committed[s.who] += 1

    elif flags & {"wait_group", "wait_all"}:
        keep = -1 if "wait_all" in flags else int(args[0])  # how many groups may be on their way; -1: all must be here

        def run(s):
            waits = np.zeros(s.committed.size, bool)
            waits[s.who] = True
            for _ in range(len(s.copies)):
                who, address, x, group = s.copies.pop(0)
                now = waits[who] & (group < s.committed[who] - keep)
                s.spaces["shared"].store(who[now], address[now], x[now])
                if not now.all():
                    s.copies.append([part[~now] for part in (who, address, x, group)])
    else:
        get, size = [k.address(args[0]), k.address(args[1]), k.source(args[-1], "u32")], int(args[2])

        def run(s):
            who = np.arange(s.committed.size)[s.who]
            address, start, given = (np.broadcast_to(g(s), who.shape) for g in get)
            if not np.isin(given, (0, size)).all():
                raise NotImplementedError("cp.async of a part, the rest zeros")
            x, there = np.zeros(who.size, f"V{size}"), given > 0
            x[there] = s.spaces["global"].load(who[there], start[there], size)
            s.spaces["shared"].claim(who, address, size)
            s.copies.append([who, address, x, s.committed[who]])

    return run


# Of whole warps: those that s.who is made of, one after the other.


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
    check, get, (target, *inside) = whole_warp(k, args[4]), [k.source(x, "b32") for x in args[1:4]], args[0].split("|")
    put, put_inside = k.sink(target, "b32"), k.sink(inside[0] if inside else "_", "pred")
    (mode,) = flags - {"sync"}

    def run(s):
        check(s)
        x, n, limits = (np.broadcast_to(g(s), s.count).reshape(-1, 32).astype(np.int64) for g in get)
        lane, n, clamp, segment = np.arange(32), n & 31, limits & 31, limits >> 8 & 31
        first, last = lane & segment, lane & segment | clamp & ~segment
        j = {"up": lane - n, "down": lane + n, "bfly": lane ^ n, "idx": first | n & ~segment}[mode]
        found = j >= last if mode == "up" else j <= last
        put(s, np.take_along_axis(x, np.where(found, j, lane), 1).reshape(-1))
        put_inside(s, found.reshape(-1))

    return run


@decodes("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared", meets="warp")
def load_matrices(k, head, flags, types, args):
    put, get = [k.sink(x, "b32") for x in elements(args[0])], k.address(args[1])
    n = len(put)

    def run(s):  # thread i of a warp has the address of row i % 8 of matrix i // 8
        who = np.arange(s.block.size)[s.who]
        who, address = (x.reshape(-1, 32)[:, : 8 * n].reshape(-1) for x in (who, np.broadcast_to(get(s), who.shape)))
        x = s.spaces["shared"].load(who, address, 16).view(np.uint16).reshape(-1, n, 8, 8)
        x = np.ascontiguousarray(x.swapaxes(2, 3) if "trans" in flags else x).view(np.uint32).reshape(-1, n, 32)
        for i, p in enumerate(put):  # thread 4 r + t gets elements 2 t and 2 t + 1 of row r
            p(s, x[:, i].reshape(-1))

    return run


@decodes("mma", "sync aligned m16n8k16 row col", meets="warp")
def multiply_matrices(k, head, flags, types, args):
    """D = A B + C, (16, 8) = (16, 16) x (16, 8) + (16, 8), a number or a pair of numbers a register. Thread 4 g + t has

    A  columns 2 t, 2 t + 1 of row g, of row g + 8; then the same of columns 2 t + 8, 2 t + 9
    B  rows 2 t, 2 t + 1 of column g; then rows 2 t + 8, 2 t + 9
    C  row g, column 2 t; row g, column 2 t + 1; then the same of row g + 8
    """
    if types not in ([["f32", x, x, "f32"] for x in ("f16", "bf16")]):
        raise NotImplementedError(f"mma of {types}")
    D, A, B, C = (elements(x) for x in args)
    put, get_C = [k.sink(x, "f32") for x in D], [k.source(x, "f32") for x in C]
    get_A, get_B = ([k.source(x, types[1] + "x2") for x in registers] for registers in (A, B))
    g, t = np.divmod(np.arange(32), 4)

    def run(s):
        n = s.count // 32
        a, b = np.empty((n, 16, 8, 2), np.float32), np.empty((n, 8, 8, 2), np.float32)  # rows of A, columns of B; pairs
        for i, get in enumerate(get_A):
            a[:, g + 8 * (i % 2), t + 4 * (i // 2)] = get(s).reshape(n, 32, 2)
        for i, get in enumerate(get_B):
            b[:, g, t + 4 * i] = get(s).reshape(n, 32, 2)
        product = a.reshape(n, 16, 16) @ b.reshape(n, 8, 16).swapaxes(1, 2)  # (n, 16, 8)
        for i, (c, p) in enumerate(zip([c(s) for c in get_C], put, strict=True)):
            p(s, c + product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1))

    return run


# ------------------------------------------------------------------------------------------------ running

SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid"]


class Launch:
    """The state: registers, memories, and in `who` and `count` the threads that run the present instruction."""

    def __init__(self, kernel: Kernel, grid, block, arguments, memory: Memory, dynamic_shared: int):
        grid, block = (((x,) if np.isscalar(x) else tuple(x)) + (1, 1, 1) for x in (grid, block))
        blocks, threads = int(np.prod(grid)), int(np.prod(block))
        if threads % 32 or not 0 < threads <= kernel.max_threads or not 0 < blocks < 2**15:
            raise ValueError(f"{blocks} blocks of {threads} threads; {kernel.name} takes warps, to {kernel.max_threads}")
        sizes, given = [size for _, size in kernel.parameters], [np.asarray(x).tobytes() for x in arguments]
        if [len(x) for x in given] != sizes:
            raise ValueError(f"{kernel.name} takes arguments of {sizes} bytes, not {[len(x) for x in given]}")
        n = blocks * threads
        self.block, self.thread = np.divmod(np.arange(n), threads)
        self.special = {"%laneid": self.thread % 32}
        for name, sizes, place in (("tid", block, self.thread), ("ctaid", grid, self.block)):
            for i, axis in enumerate("xyz"):
                self.special[f"%{name}.{axis}"] = place // int(np.prod(sizes[:i])) % sizes[i]
                self.special[f"%n{name}.{axis}"] = np.full(n, sizes[i])
        self.registers = {name: np.zeros(n, dtype) for name, dtype in kernel.registers.items()}
        self.committed, self.copies = np.zeros(n, np.int64), []  # cp.async: groups so far; [who, where, what, group]
        one, shared = np.zeros(n, int), [(at, size or dynamic_shared) for at, size in kernel.shared]
        self.spaces = {
            "global": Tracked("global", memory.allowed, one, self.block, self.block, memory.data),
            "param": Space("param", mapped(kernel.parameters, 1), one),
            "shared": Tracked("shared", mapped(shared, 2), self.block, self.thread, self.thread // 32),
            "local": Space("local", mapped(kernel.local, 2), np.arange(n) if kernel.local else one),
        }
        for (at, size), x in zip(kernel.parameters, given, strict=True):
            self.spaces["param"].data[at : at + size] = np.frombuffer(x, np.uint8)


def mapped(variables: list[tuple[int, int]], how: int) -> np.ndarray:
    """A window with these variables in it; its size a multiple of 16, so that all windows are aligned alike."""
    allowed = np.zeros(-(-max([at + size for at, size in variables], default=0) // 16) * 16 + GAP, np.uint8)
    for at, size in variables:
        allowed[at : at + size] = how
    return allowed


def launch(kernel, grid, block, arguments, memory, dynamic_shared=0, limit=1_000_000) -> int:
    """Run the kernel; returns how many steps it took. grid, block: a number, or up to three.

    arguments: numpy scalars or arrays of the parameters' sizes; a struct is one of a structured dtype, align=True.
    """
    s = Launch(kernel, grid, block, arguments, memory, dynamic_shared)
    n, alive = s.block.size, np.bincount(s.block)
    standing, waiting = {0: np.arange(n)}, {}  # instruction -> the threads that stand at it, in order

    def go(at, threads):
        if threads.size:
            standing[at] = np.sort(np.concatenate([standing[at], threads])) if at in standing else threads

    for step in range(limit):
        if not standing:
            if not waiting:
                return step
            who = ", ".join(f"{threads.size} threads wait at {kernel.code[at].text!r}" for at, threads in waiting.items())
            raise Fault(f"{kernel.name}: nobody can go on: {who}; {n - alive.sum()} have ended")
        at = min(standing)
        if at in waiting:
            go(at, waiting.pop(at))
        here, i = standing.pop(at), kernel.code[at]
        if i.guard:
            chosen = s.registers[i.guard][here] != i.unless
            go(at + 1, here[~chosen])
            here = here[chosen]
        if i.meets and here.size < n:
            group, size = (here // 32, 32) if i.meets == "warp" else (s.block[here], alive[s.block[here]])
            complete = np.bincount(group)[group] == size if here.size else here > 0
            if not complete.all():
                waiting[at] = here[~complete]
            here = here[complete]
        if not here.size:
            continue
        if i.target is None:
            s.who, s.count = slice(None) if here.size == n else here, here.size
            try:
                with np.errstate(all="ignore"):
                    i.run(s)
            except Fault as fault:
                raise Fault(f"{kernel.name}: {i.text!r}: {fault}") from None
            go(at + 1, here)
        elif i.target >= 0:
            go(i.target, here)
        else:
            alive -= np.bincount(s.block[here], minlength=alive.size)
            for stop in list(waiting):  # who waited for these threads may go on
                go(stop, waiting.pop(stop))
    raise Fault(f"{kernel.name}: no end after {limit} steps")
