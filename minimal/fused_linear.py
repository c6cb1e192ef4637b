# SPDX-License-Identifier: MIT
"""Linear layers whose weight is held in few bits, for the CPU: torch.ops.minimal.linear_*, plain PyTorch behind them.

A layer computes y = x W^T + b with the W (O, C) that its codes stand for (minimal/quant.py makes them):

    int8       W = scale_o code              codes int8 (O, C), scale float32 (O,)
    int4       W = scale_g code + least_g    codes uint8 (O, C/32, 16), scale and least float16 (O, C/32): groups of 32
               columns, C rounded up; byte j of a group has column j in its low half, j + 16 in the high; code 0..15
    nf4        W = a_b L[code]               codes uint8 (32 n,), absmax int8 (n,), scale float32 (n/256,), mean (1,)
               for blocks of 64 of W flattened; two codes to a byte, the first in the high half; L has 16 levels,
               a_b = max(0, absmax_b scale + mean): QLoRA, Dettmers et al. 2023, arXiv 2305.14314
    bfloat16   weight bfloat16 (O, C)

A few rows of x, as in decoding, take as long as reading the codes once. There are two ways to multiply:

    weight-only    codes become floats in registers; y has the rounding of a float32 sum, about that of F.linear
    dynamic        x becomes 8-bit integers too, x_c ~ t q_c with t = max |x| / 127 of each group of 32 columns, and
                   integers are multiplied: faster than memory where the first is not (int8, int4 only). Rounding moves
                   x_c by at most t / 2, so y_o by at most sum_c |W_oc| max |x of c's group| / 254; that is the worst
                   case: for normal x and W, y is off by about 0.6 % (root mean square)

Departure from the common way, one t for a row of x: a group is not spoilt by a large number elsewhere in the row.
Many rows (prefill): dynamic is faster than F.linear with a float32 weight too, where there is AVX2.
Else they are a product of floats: a panel of W at a time, 4 MB, is unpacked while the cache has it and multiplied, so
that a layer never needs the memory of W, forward or backward. Where a gradient is wanted x is never rounded, and the
gradients to x and b are exact for W; the codes have none.

    from minimal import fused_linear
    y = fused_linear.linear(x, "int8", (O, C), bias, codes=codes, scale=scale)
    W = fused_linear.unpack("int8", (O, C), codes=codes, scale=scale)      # float32 (O, C)

MINIMAL_FUSED=0 in the environment, read at import, forces plain PyTorch. Letters: N rows of x, C inputs, O outputs.
"""

import importlib.machinery
import importlib.util
import math
import os
import statistics
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function, forward_ad

HELD = {
    "int8": ("codes", "scale"),
    "int4": ("codes", "scale", "least"),
    "nf4": ("codes", "absmax", "scale", "mean"),
    "bfloat16": ("weight",),
}
FEW = 16  # rows up to which the operators win over F.linear and over unpacking W, where they do not for all
PANEL = 1 << 20  # weights that are unpacked at a time: 4 MB of float32


# Same as minimal/quant.py: nf4_levels
def nf4_levels():
    """The 16 levels of NormalFloat4, float32, ascending from -1 to 1: minimal/quant.py derives them."""
    quantile, end = statistics.NormalDist().inv_cdf, 1 - (1 / 32 + 1 / 30) / 2
    right = [quantile(0.5 + (end - 0.5) * i / 8) for i in range(1, 9)]
    left = [-quantile(0.5 + (end - 0.5) * i / 7) for i in range(7, 0, -1)]
    return torch.tensor([q / right[-1] for q in (*left, 0.0, *right)])  # (16,)


LEVELS = nf4_levels()


def _load() -> str | None:
    """Load minimal/_C, if minimal/fused.py has not. Returns None, or in one line why there are no operators."""
    if os.environ.get("MINIMAL_FUSED") == "0":
        return "switched off by MINIMAL_FUSED=0"
    # Registering the operators twice would abort the process, and nothing could catch that: so look before loading.
    if not hasattr(torch.ops.minimal, "attention"):
        spec = importlib.machinery.PathFinder.find_spec("_C", [os.path.dirname(os.path.abspath(__file__))])
        if spec is None or spec.origin is None:
            return "not built: there is no compiled minimal/_C (pip install --no-build-isolation -e . makes it)"
        try:
            spec = importlib.util.spec_from_file_location("minimal._C", spec.origin)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (ImportError, OSError) as error:  # built for another Python or torch, or a damaged file
            reason = f"broken: {spec.origin} does not load: {' '.join(str(error).split())}"
            warnings.warn(f"minimal.fused_linear runs in plain PyTorch; {reason}", RuntimeWarning, stacklevel=3)
            return reason
        sys.modules["minimal._C"] = module
    if getattr(sys.modules["minimal._C"], "version", 1) < 2:
        return "too old: the compiled minimal/_C lacks linear layers; build it again"
    if not hasattr(torch.ops.minimal, "has_linear_rules"):  # a second copy of this file must not add them again
        _register_rules()
        torch.ops.minimal.has_linear_rules = True
    return None


def _register_rules() -> None:
    def fake(name, rule):
        def on_one_device(*inputs):  # the rule also answers where one argument alone is on `meta`
            devices = {str(x.device) for x in inputs if isinstance(x, Tensor)}
            if len(devices) != 1:
                raise RuntimeError(f"minimal::{name}: arguments on {', '.join(sorted(devices))}; wanted one device")
            return rule(*inputs)

        torch.library.register_fake(f"minimal::{name}", on_one_device)
        torch.library.register_autograd(f"minimal::{name}", _no_gradient)  # else it would be silently absent

    def dtype(bfloat16):
        return torch.bfloat16 if bfloat16 else torch.float32

    fake("linear_int8", lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]))
    fake("linear_int4", lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]))
    fake("linear_nf4", lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0] * 2 // x.shape[1]))
    for name in ("linear_bf16", "linear_f32"):
        fake(name, lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))
    torch.library.register_fake("minimal::llama_block", lambda x, *rest: torch.empty_like(x))
    fake("unpack_int8", lambda codes, scale, half: codes.new_empty(codes.shape, dtype=dtype(half)))
    fake("unpack_int4", lambda codes, scale, least, C, half: codes.new_empty(codes.shape[0], C, dtype=dtype(half)))
    fake("unpack_nf4", lambda codes, *rest: codes.new_empty(rest[-2], dtype=dtype(rest[-1])))


def _no_gradient(ctx, *grads):
    raise RuntimeError("torch.ops.minimal.linear_* and unpack_* give no gradient; minimal.fused_linear.linear does")


_reason = _load()  # None: the operators are there
_INTEGERS = [] if _reason else sys.modules["minimal._C"].many_rows_in_integers().split(",")


def available() -> bool:
    """Whether the compiled operators are loaded and not switched off."""
    return _reason is None


def why_not(x: Tensor | None = None) -> str | None:
    """None when linear(x, ...) takes the compiled operators; else one line that says why not."""
    if _reason is not None or x is None:
        return _reason
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype} on {x.device}; the fused path takes float32 or bfloat16 on the CPU"
    return None


def linear(x, kind: str, shape, bias=None, *, dynamic=True, **held) -> Tensor:
    """x W^T + bias for the weight W of shape (O, C) that `held` stands for; x (..., C) -> (..., O) of x's dtype.

    kind and held: "int8" with codes and scale, "int4" with codes, scale and least, "nf4" with codes, absmax, scale and
    mean, "bfloat16" with weight (formats above). x float32 or bfloat16 runs fused and is summed in float32; bias (O,).
    dynamic: whether x may be rounded to 8 bits (int8, int4), where no gradient is wanted and that is faster.
    Gradients: to x and bias, exact for W. ValueError: an unknown kind, other parts than it has, an x that does not fit.
    RuntimeError: parts that do not fit the shape; each names the argument, its value and what was wanted."""
    parts, (O, C) = _parts(kind, held), shape
    device = "cpu" if x.is_cpu else x.device.type  # the second takes longer
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    if x.dim() < 1 or x.shape[-1] != C:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (..., {C}), as W has shape {(O, C)}")
    if _functorch.maybe_current_level() is not None or forward_ad._current_level >= 0 or parts[0].requires_grad:
        return F.linear(x, _rows(kind, C, 0, O, x.dtype, parts, plain=True), bias)  # for which autograd has all rules
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), C)  # (N, C)
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        y = _Linear.apply(rows, bias, kind, (O, C), *parts)
    else:
        y = _product(rows, bias, kind, (O, C), dynamic, parts)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], O)


def unpack(kind: str, shape, dtype=torch.float32, **held) -> Tensor:
    """The weight W of shape (O, C) that `held` stands for (see linear), in this dtype; without gradient."""
    return _rows(kind, shape[1], 0, shape[0], dtype, [part.detach() for part in _parts(kind, held)])


class Product:
    """x W^T of a weight W (O, C) held in parts, without gradient and with few checks: for minimal/decoder.py.

    kind, shape, held and dynamic as in linear, and "float32" with weight, which is F.linear for more than 16 rows.
    Called with x (N, C) it gives (N, O); rows(ids) gives W[ids] in float32, (n, C), for ids (n,); not of nf4, whose
    blocks do not end with the rows (ValueError)."""

    def __init__(self, kind, shape, *, dynamic=True, **held):
        whole = [held["weight"].contiguous()] if kind == "float32" and [*held] == ["weight"] else _parts(kind, held)
        self.how = kind, tuple(shape), dynamic, whole
        self.parts = (*whole, None, None)[:3]  # codes, scale and least, as llama_block wants them

    def __call__(self, x):
        if self.how[0] != "float32":
            return _product(x, None, *self.how)
        few, W = x.shape[0] <= FEW and why_not(x) is None, self.parts[0]
        return torch.ops.minimal.linear_f32.default(x, W, None) if few else F.linear(x, W)

    def rows(self, ids):
        kind, (_, C), _, parts = self.how
        if kind == "nf4":
            raise ValueError("kind='nf4' has no rows of its own; wanted int8, int4 or a float")
        rows = [part[ids] for part in parts]
        return rows[0] if kind == "float32" else _rows(kind, C, 0, len(ids), torch.float32, rows)


def llama_block(x, layer, cache, cos, sin, start, eps):
    """T tokens of each row through a block of minimal/decoder.py, as its Decoder calls `block`: x (B T, C) -> the same.

    layer: norms, two of (C,), and qkv, o, gate_up and down, each a Product here (not of nf4). cache (B, 2 Hkv, P, D) is
    written from `start` on; cos, sin (T, D). float32 on the CPU; RuntimeError for what does not fit."""
    weights = (*layer.qkv.parts, *layer.o.parts, *layer.gate_up.parts, *layer.down.parts)
    return torch.ops.minimal.llama_block.default(x, *layer.norms, *weights, cos, sin, cache, start, eps, layer.o.how[2])


def _parts(kind, held):
    try:
        parts = [held[name] for name in HELD[kind]]
    except KeyError:
        parts = None
    if parts is None or len(parts) != len(held):
        if kind not in HELD:
            raise ValueError(f"kind={kind!r} is unknown; wanted one of: {', '.join(HELD)}")
        raise ValueError(f"kind={kind!r} was given {', '.join(held) or 'nothing'}; wanted {', '.join(HELD[kind])}")
    return parts


class _Linear(Function):
    """Between the passes autograd keeps the codes, which the layer has anyway, and not W."""

    @staticmethod
    def forward(ctx, x, bias, kind, shape, *parts):
        ctx.save_for_backward(*parts)
        ctx.how = kind, shape
        return _product(x, bias, kind, shape, False, parts)

    @staticmethod
    def backward(ctx, grad):  # (N, O)
        (kind, (O, C)), parts, to_x = ctx.how, ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:
            for begin, end in _panels(O, C):
                W = _rows(kind, C, begin, end, grad.dtype, parts)  # (P, C)
                if to_x is None:
                    to_x = grad[:, begin:end] @ W  # (N, P) x (P, C) -> (N, C)
                else:
                    to_x.addmm_(grad[:, begin:end], W)
            to_x = grad.new_zeros(len(grad), C) if to_x is None else to_x
        to_bias = grad.sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None, None, *[None] * len(parts)


def _panels(O, C):
    step = max(PANEL // max(C, 1) // 64, 1) * 64  # rows; a multiple of 64, so that no block of 64 weights is cut
    return [(begin, min(begin + step, O)) for begin in range(0, O, step)]


def _product(x, bias, kind, shape, dynamic, parts):
    """x (N, C) -> (N, O), no gradient."""
    O, C = shape
    few = x.shape[0] <= FEW or dynamic and kind in _INTEGERS
    if few and why_not(x) is None and (kind != "nf4" or C % 64 == 0 and C > 0):
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _few(x, bias, kind, shape, dynamic, parts)
        with torch._C._AutoDispatchBelowAutograd():  # past the rules above, which cost more than they need
            return _few(x, bias, kind, shape, dynamic, parts)
    y = x.new_empty(x.shape[0], O)
    for begin, end in _panels(O, C):
        W = _rows(kind, C, begin, end, x.dtype, parts)  # (P, C)
        torch.mm(x, W.mT, out=y[:, begin:end])  # (N, C) x (C, P) -> (N, P)
    return y if bias is None else y.add_(bias)


def _few(x, bias, kind, shape, dynamic, parts):
    if kind == "int8":
        y = torch.ops.minimal.linear_int8.default(x, *parts, bias, dynamic)
    elif kind == "int4":
        y = torch.ops.minimal.linear_int4.default(x, *parts, bias, dynamic)
    elif kind == "nf4":
        y = torch.ops.minimal.linear_nf4.default(x, *parts, LEVELS, bias)
    else:
        y = torch.ops.minimal.linear_bf16.default(x, *parts, bias)
    if y.shape[1] != shape[0]:
        raise RuntimeError(f"{HELD[kind][0]} has {y.shape[1]} outputs; wanted {shape[0]}, as shape says")
    return y


def _rows(kind, C, begin, end, dtype, parts, plain=False):
    """Rows begin to end of W, (end - begin, C); begin is a multiple of 64."""
    fused = not plain and _reason is None and parts[0].is_cpu
    half, ops = dtype == torch.bfloat16, torch.ops.minimal
    if kind == "nf4":
        first, count = begin * C, (end - begin) * C
        if fused:
            W = ops.unpack_nf4(*parts, LEVELS, first, count, half)
        else:
            W = _plain_nf4(first // 64, -(-(first + count) // 64), *parts).flatten()[:count]
        return W.view(end - begin, C).to(dtype)
    codes, *constants = [part[begin:end] for part in parts]
    if codes.shape[0] != end - begin:
        raise RuntimeError(f"{HELD[kind][0]} has shape {tuple(parts[0].shape)}; wanted {end} outputs, as shape says")
    if kind == "bfloat16":
        return codes.to(dtype)
    if kind == "int8":
        W = ops.unpack_int8(codes, *constants, half) if fused else codes * constants[0][:, None]
    elif fused:
        W = ops.unpack_int4(codes, *constants, C, half)
    else:
        scale, least = (t.float()[..., None] for t in constants)  # (O, C/32, 1)
        W = (torch.cat((codes & 15, codes >> 4), -1) * scale + least).flatten(1)[:, :C]
    return W.to(dtype)


def _plain_nf4(begin, end, codes, absmax, scale, mean):
    """Blocks begin to end of W flattened: (end - begin, 64)."""
    block = torch.arange(begin, end, device=codes.device)
    a = (absmax[begin:end] * scale[block // 256] + mean).clamp_min(0)  # (n,)
    pairs = codes[32 * begin : 32 * end]
    both = torch.stack((pairs >> 4, pairs & 15), -1)  # (32 n, 2)
    return LEVELS.to(codes.device)[both.int()].view(-1, 64) * a[:, None]


if __name__ == "__main__":
    import time

    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}:", "fused" if available() else f"plain PyTorch, as {_reason}")
    O, C = 1536, 576
    W = torch.randn(O, C) / math.sqrt(C)
    int8 = {"scale": W.abs().amax(1) / 127}
    int8["codes"] = (W / int8["scale"][:, None]).round().to(torch.int8)
    groups = W.view(O, C // 32, 32)
    int4 = {"least": groups.amin(2).half(), "scale": ((groups.amax(2) - groups.amin(2)) / 15).half()}
    code = ((groups - int4["least"][..., None]) / int4["scale"][..., None]).round().clamp(0, 15).to(torch.uint8)
    int4["codes"] = code[..., :16] | code[..., 16:] << 4
    kinds = {"bfloat16": {"weight": W.bfloat16()}, "int8": int8, "int4": int4}

    def microseconds(f, calls=200):
        f()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        return (time.perf_counter() - start) / calls * 1e6

    x = torch.randn(1, C)
    print(f"one row through {C} -> {O}; float32: {microseconds(lambda: F.linear(x, W)):.0f} us")
    for kind, held in kinds.items():
        exact = x.double() @ unpack(kind, (O, C), **held).double().mT
        for dynamic in (False, True)[: 1 if kind == "bfloat16" else 2]:
            y = linear(x, kind, (O, C), dynamic=dynamic, **held)
            off, taken = (y - exact).norm() / exact.norm(), microseconds(
                lambda: linear(x, kind, (O, C), dynamic=dynamic, **held)  # noqa: B023, called at once
            )
            bits = sum(t.nbytes for t in held.values()) * 8 / (O * C)
            print(f"{kind:8} {bits:5.2f} bits a weight, {'x rounded' if dynamic else 'x as it is'}: {taken:4.0f} us, "
                  f"y off by {off:.1e} from the product with its W")  # fmt: skip
