# SPDX-License-Identifier: MIT
"""Executes PTX, the assembly that nvcc makes of a CUDA kernel, on the CPU in numpy: all threads of a launch at once.

What is checked is what the compiler made of a kernel, inline assembly included, and no GPU is needed. An instruction is
one step for all threads that stand at it. The threads that are furthest behind go first, so that those who parted at a
branch meet again behind it; at a barrier they wait for their block, at a shuffle, mma or ldmatrix for their warp. Fault
is raised for what a GPU would answer with an error, with garbage or not at all: waiting for threads that have ended or
wait elsewhere, no end, a division of integers by zero, and what ptx_memory.py sees: addresses outside every array, or
misaligned, and races. What the instructions do is in ptx_instructions.py; NotImplementedError is raised for one that is
not known, when the kernel is read. Reference: NVIDIA, PTX ISA 9.0.

Not modelled: time; ptxas; other orders of execution than this one; the errors of ex2.approx and the like, which are
rounded correctly here; the order of the sums within an mma, here numpy's in float32.

    memory = Memory()
    x, y = memory.add(array), memory.add(np.full_like(array, np.nan), writable=True)  # addresses
    launch(Kernel(ptx, "name"), 4, 128, [np.uint64(x), np.uint64(y)], memory)  # 4 blocks of 128 threads
    memory.array(y)

`who`, in all three files: the threads that run an instruction, by their numbers in the launch, in order; when it is all
of them, a slice.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
from ptx_instructions import DECODERS, TYPES, UNSIGNED, bits, elements, numbers
from ptx_memory import GAP, Fault, Memory, Space, Tracked

SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid"]


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
            raise KeyError(f"{len(chosen)} kernels have {name!r} in their name, of {', '.join(e[1] for e in entries)}")
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
        variable = r"^\s*(?:\.extern\s+)?\.(param|shared|local)\s([^;,\[\n]*?)([\w$]+)(\[\d*\])?\s*[;,]"
        self.parameters = self.place(re.findall(variable, parameters.strip() + ",", re.M))
        declared, words = re.findall(variable, ptx, re.M), set(re.findall(r"[\w$]+", body))
        declared = [d for d in declared if d[2] in words]
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
        lines, labels = [], {}
        for label, line in re.findall(r"\s*(?:[{}]|([\w$]+):(?=\s)|((?:[^;{}]|\{[^{};]*\})+);)", body):
            if label:
                labels[label] = len(lines)
            elif register := re.match(r"\.reg\s+\.(\w+)\s+(.*)", line, re.S):
                dtype = np.dtype(bool if register[1] == "pred" else UNSIGNED[TYPES[register[1]].itemsize])
                for name, count in re.findall(r"([%\w$]+)(?:<(\d+)>)?", register[2]):
                    for new in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                        # Inline assembly declares its own within braces: nobody needs it afterwards.
                        if self.registers.setdefault(new, dtype) != dtype:
                            raise NotImplementedError(f"{self.name}: {new} is declared twice, differently")
            elif line and line[0] != ".":
                guard, opcode, operands = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", line, re.S).groups(default="")
                operands = [x.strip() for x in re.split(r",(?![^{]*\})", operands)] if operands else []
                instruction = Instruction(" ".join(line.split()), None, guard.strip("!"), "!" in guard)
                lines.append((instruction, opcode, operands))
            elif line and not re.match(r"\.(shared|local|pragma)\b", line):
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
        if text[:2].lower() in ("0f", "0d"):
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


# ------------------------------------------------------------------------------------------------ running


class Launch:
    """The state: registers, memories, and in `who` and `count` the threads that run the present instruction."""

    def __init__(self, kernel: Kernel, grid, block, arguments, memory: Memory, dynamic_shared: int):
        grid, block = (((x,) if np.isscalar(x) else tuple(x)) + (1, 1, 1) for x in (grid, block))
        blocks, threads = int(np.prod(grid)), int(np.prod(block))
        if threads % 32 or not 0 < threads <= kernel.max_threads or not 0 < blocks < 2**15:
            raise ValueError(f"{blocks} blocks of {threads} threads; wanted whole warps, up to {kernel.max_threads}")
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
            who = ", ".join(f"{who.size} threads wait at {kernel.code[at].text!r}" for at, who in waiting.items())
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
