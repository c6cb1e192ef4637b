# SPDX-License-Identifier: MIT
"""What the instructions of PTX do, for tests/cuda/ptx.py: each as a function of a launch, on all its threads at once.

A decoder gets the instruction once, taken apart: its first word, the types among the others, the rest of these (flags)
and the operands. A flag that it does not declare is refused. Of the kernel it uses source(), sink() and address(),
which make functions of operands; of the launch s.who, the threads that run the instruction, and s.count, their number.
Reference: NVIDIA, PTX ISA 9.0, chapter 9.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from ptx_memory import Fault

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{kind}{8 * n}": f"{'i' if kind == 's' else 'u'}{n}" for kind in "bus" for n in UNSIGNED}
TYPES |= {"pred": "?", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
TYPES = {name: np.dtype(code) for name, code in TYPES.items()}
SHARED, LOCAL = 1 << 44, 1 << 45  # where generic addresses of these spaces begin; those of global memory are themselves


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


def elements(text: str) -> list[str]:
    return [x.strip() for x in text.strip("{}").split(",")]


# ------------------------------------------------------------------------------------------------ decoders

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
            if "ftz" in flags and {"f16", "bf16", "f16x2", "bf16x2"} & {*types}:
                raise NotImplementedError(f"{head}.ftz of {types}")
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


def rounded_once(x, y, z):
    """x y + z of doubles, exactly, then rounded: NumPy has nothing wide enough."""
    if not np.isfinite([x, y, z]).all():
        return x * y + z
    return float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))


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
        if type == "f64":
            return [np.vectorize(rounded_once, otypes=[np.float64])]
        return [lambda x, y, z: x.astype(np.float64) * y + z]  # as good as rounded once, since the product is exact
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
        address, space, start = get(s), name or "global", 0
        if not name and address[0] >= SHARED:
            space, start = ("local", LOCAL) if address[0] >= LOCAL else ("shared", SHARED)
        return s.spaces[space], address - start

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


# ------------------------------------------------------------------------------------------------ warps and blocks


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
