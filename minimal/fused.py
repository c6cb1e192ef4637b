# SPDX-License-Identifier: MIT
"""Fused softmax and attention for the CPU: the door to torch.ops.minimal.*, with plain PyTorch behind it.

The kernels follow FlashAttention-2 (Dao 2023, arXiv 2307.08691) in tiles, with the running maximum and sum of online
softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), so that no Tq x Tk matrix is ever stored:

    S = scale Q K^T + M      P = softmax(S)      O = P V      L_i = log sum_j exp S_ij  (kept for the backward pass)
    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * O))      dQ = scale dS K      dK = scale dS^T Q

Departures from the paper: CPUs come first; masks, grouped queries, causal with Tq != Tk (aligned bottom-right), packed
documents, a window, ALiBi, a soft cap and rotary positions are inside; a row with nothing to see gives zeros, not NaN.

    from minimal import fused
    out = fused.attention(q, k, v, causal=True)     # the kernels where they can, else the same in plain PyTorch
    print(fused.why_not(q, k, v) or "fused")        # one line: why the slow path runs

MINIMAL_FUSED=0 in the environment, read at import, forces plain PyTorch; MINIMAL_FUSED=cuda lets tensors on a GPU take
the CUDA kernels, faster than PyTorch's on an H100 with documents and windows only. `python -m minimal.fused` says.
Here are the operators' rules: fake (shapes, for torch.compile and torch.export) and autograd (once differentiable).

Letters: B batch, H query heads, Hkv key and value heads, Tq queries, Tk keys, D head size, Dv value size.
"""

import importlib.machinery
import importlib.util
import math
import os
import sys
import warnings

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function, forward_ad

_CPU_DTYPES, _CUDA_DTYPES = (torch.float32, torch.bfloat16), (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE, _CUDA_HEAD_SIZES = 256, (32, 64, 96, 128)


def _load() -> str | None:
    """Load minimal/_C and give its operators their rules. Returns None, or in one line why there are no operators."""
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
            warnings.warn(f"minimal.fused runs in plain PyTorch; {reason}", RuntimeWarning, stacklevel=3)
            return reason
        sys.modules["minimal._C"] = module
    if not hasattr(torch.ops.minimal, "has_rules"):  # a second copy of this file, or a reload, must not add them again
        _register_rules()
        torch.ops.minimal.has_rules = True
    return None


def _like(x: Tensor, *others: Tensor | None) -> Tensor:
    """A fake result: contiguous, shaped as x. The fake rule also answers where one argument alone is on `meta`."""
    devices = {str(t.device) for t in (x, *others) if t is not None}
    if x is None or len(devices) > 1:  # None: an undefined tensor
        raise RuntimeError(f"torch.ops.minimal: arguments on {', '.join(sorted(devices))}; wanted all on one device")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _laid_out_as(x: Tensor, size: int) -> Tensor:
    """A fake (B, H, T, size), without gaps, its heads inside its tokens if x's are: (B, T, H, size) in memory."""
    B, H, T, inside = *x.shape[:3], 0 < x.stride(1) < x.stride(2)
    return x.new_empty((B, T, H, size)).transpose(1, 2) if inside else x.new_empty((B, H, T, size))


def _fake_attention(q, k, v, mask, scale, causal, cu_seqlens=None, window=0, slopes=None, softcap=0.0, *rotary):
    _like(q, k, v, mask, cu_seqlens, slopes, *rotary)
    return _laid_out_as(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)  # (B, H, Tq, Dv), (B, H, Tq)


def _fake_attention_backward(grad, q, k, v, out, lse, mask, scale, causal, cu_seqlens=None, *options):
    _like(q, grad, k, v, out, lse, mask, cu_seqlens, *(x for x in options if isinstance(x, Tensor)))
    return tuple(_laid_out_as(x, x.shape[3]) for x in (q, k, v))


def _register_rules() -> None:
    fake, autograd = torch.library.register_fake, torch.library.register_autograd
    fake("minimal::softmax", lambda x, mask, scale, causal: _like(x, mask))
    fake("minimal::softmax_backward", lambda grad, y, scale: _like(y, grad))
    fake("minimal::attention", _fake_attention)
    fake("minimal::attention_backward", _fake_attention_backward)
    autograd("minimal::softmax", _softmax_backward, setup_context=_softmax_context)
    autograd("minimal::attention", _attention_backward, setup_context=_attention_context)
    for name in ("softmax_backward", "attention_backward"):  # else a second derivative would be silently zero
        autograd(f"minimal::{name}", _no_second_derivative)


def _softmax_context(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.scale = inputs[2]


def _check_leaves(ctx, leaves):
    if any(ctx.needs_input_grad[leaves:]):
        raise RuntimeError("torch.ops.minimal gives mask, slopes, cos and sin no gradient; minimal.fused does")


def _softmax_backward(ctx, grad):
    _check_leaves(ctx, 1)
    return torch.ops.minimal.softmax_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


def _attention_context(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.causal, cu_seqlens, ctx.window, slopes, ctx.softcap, cos, sin = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, mask, cu_seqlens, slopes, cos, sin)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # or a gradient of zeros would be made for lse


def _attention_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    _check_leaves(ctx, 3)
    q, k, v, out, lse, mask, cu_seqlens, slopes, cos, sin = ctx.saved_tensors
    options = (mask, ctx.scale, ctx.causal, cu_seqlens, ctx.window, slopes, ctx.softcap, cos, sin)
    return *torch.ops.minimal.attention_backward(grad, q, k, v, out, lse, *options), *(None,) * 9


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("torch.ops.minimal is differentiable once; for second derivatives set MINIMAL_FUSED=0")


# The registered rules serve torch.compile, torch.export and direct calls of the operators. In eager mode they cost more
# than they need, a trip through Python inside the dispatcher even when no gradient is wanted. So there the call goes
# past them, and the same two functions stand in an autograd.Function: about half the time before any arithmetic.
def _eager(op, context, backward, leaves: int):
    """`op` as eager mode calls it; its first `leaves` inputs may need gradients."""

    def below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def forward(ctx, *inputs):
        output = below(*inputs)
        context(ctx, inputs, output)
        return output

    rule = type("Fused", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})

    def call(*inputs):
        if torch.compiler.is_compiling():
            return op(*inputs)
        if torch.is_grad_enabled() and any([x.requires_grad for x in inputs[:leaves]]):
            return rule.apply(*inputs)
        return below(*inputs)

    return call


_reason, _cuda = _load(), False  # None: the operators are there
if _reason is None:
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("minimal::attention", "CUDA")
    _cuda = has_cuda and os.environ.get("MINIMAL_FUSED") == "cuda"
    _softmax = _eager(torch.ops.minimal.softmax.default, _softmax_context, _softmax_backward, leaves=1)
    _attention = _eager(torch.ops.minimal.attention.default, _attention_context, _attention_backward, leaves=3)


def available() -> bool:
    """Whether the compiled operators are loaded and not switched off."""
    return _reason is None


def _barred() -> str | None:
    if _reason is not None:
        return _reason
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on: the fused path has the backward mode only"
    if _functorch.maybe_current_level() is not None:
        return "inside a transform of torch.func (grad, vmap, ...): the fused path has no rules for them"
    return None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that attention computes in: x's own or, under autocast, what autocast gives to PyTorch's attention."""
    cast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype


def _unfit(name: str, x: Tensor) -> str | None:
    if not (x.is_cpu or (x.is_cuda and _cuda)) or x.layout != torch.strided:
        where = "on the CPU, and on a GPU with MINIMAL_FUSED=cuda" if x.is_cuda else "on the CPU"
        return f"{name} is a {x.layout} tensor on {x.device}; the fused path takes dense tensors {where}"
    return None


def _unfit_option(name: str, x: Tensor, dtypes: tuple = (torch.float32,)) -> str | None:
    if x.requires_grad and torch.is_grad_enabled():
        return f"{name} needs a gradient, which the fused path does not give"
    if x.dtype not in dtypes:
        return f"{name} has dtype {x.dtype}; the fused path takes {', '.join(map(str, dtypes))}"
    return _unfit(name, x)


def why_not(q=None, k=None, v=None, *, mask=None, dropout=0.0, slopes=None, softcap=0.0, rotary=None) -> str | None:
    """None when attention(q, k, v, mask=mask, ...) runs fused; else one line that says why not. Give what is known.

    Only what decides the path is looked at: shapes that do not fit together are for the operator, which raises.
    """
    if (reason := _barred()) is not None or dropout:
        return reason or f"dropout={dropout}: the fused path has none"
    dtype, autocast = None, torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    for name, x in [(n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t is not None]:
        if (reason := _unfit(name, x)) is not None:
            return reason
        own = _compute_dtype(x) if autocast else x.dtype
        takes, shape = _CPU_DTYPES if x.is_cpu else _CUDA_DTYPES, x.shape
        if own not in takes or own != (dtype or own):
            wanted = " or all ".join(str(t).removeprefix("torch.") for t in takes)
            return f"{name} has dtype {own}; the fused path takes q, k and v all {wanted}"
        dtype = own
        if len(shape) != 4 or not 1 <= shape[3] <= MAX_HEAD_SIZE:
            return f"{name} has shape {tuple(shape)}; the fused path takes 4 dimensions, the last up to {MAX_HEAD_SIZE}"
        options = mask is not None or slopes is not None or rotary is not None or softcap
        if x.is_cuda and (options or shape[3] not in _CUDA_HEAD_SIZES or q is not None and shape[3] != q.shape[3]):
            return f"the CUDA kernels take one head size of {_CUDA_HEAD_SIZES}, and no mask, slopes, softcap or rotary"
    for name, x in (("slopes", slopes), *(zip(("cos", "sin"), rotary, strict=True) if rotary else ())):
        if x is not None and (reason := _unfit_option(name, x)) is not None:
            return reason
    if rotary is not None and q is not None and q.shape[-1] % 32:
        return f"q has shape {tuple(q.shape)}; the fused path turns (rotary) head sizes that are multiples of 32"
    return None if mask is None else _unfit_option("mask", mask, (torch.bool, torch.float32, dtype or torch.float32))


def attention(
    q, k, v, *, causal=False, mask=None, scale=None, cu_seqlens=None, window=0, slopes=None, softcap=0.0, rotary=None
) -> Tensor:
    """softmax(scale q k^T + mask) v, fused where why_not(q, k, v, mask=mask) is None, else in plain PyTorch.

    q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv) of q's dtype; fused, it is without gaps
    and (B, Tq, H, Dv) in memory where q's heads lie inside its tokens. Hkv divides H: query head h uses key and value
    head h // (H // Hkv). float32 or bfloat16 (summed in float32), any strides.
    mask: boolean (True: may attend) or additive, of any shape that broadcasts to (B, H, Tq, Tk); never copied.
    causal: query i sees key j iff j <= i + Tk - Tq, in addition to the mask. A row that sees nothing gives zeros.
    scale: 1/sqrt(D) by default. Under torch.autocast q, k and v are cast as for F.scaled_dot_product_attention.
    cu_seqlens, int32 or int64 (n + 1,): documents packed into the rows do not see each other. They begin at these
    places in the tokens of all rows laid end to end, from 0 to B T (Tq = Tk = T); no document goes past its row.
    window > 0: a query sees only keys nearer than that, |i + Tk - Tq - j| < window; what no query sees is skipped.
    slopes, float32 (H,) or (B, H): ALiBi (Press et al. 2021, arXiv 2108.12409), adds -slope |i + Tk - Tq - j|.
    softcap > 0: softcap tanh(scale q k^T / softcap), before slopes and mask (Gemma 2, arXiv 2408.00118).
    rotary: cos and sin, float32 (Tk, D/2) or (B, Tk, D/2), that turn the pairs (d, d + D/2) of q and k on their way in
    (Su et al. 2021, arXiv 2104.09864); query i takes row i + Tk - Tq >= 0. Keys from a cache were turned before.
    Raises RuntimeError, in one line that names the argument, where sizes do not fit; fused, for a bad cu_seqlens, too.
    """
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    if why_not(q, k, v, mask=mask, slopes=slopes, softcap=softcap, rotary=rotary) is not None:
        return _plain_attention(q, k, v, causal, mask, scale, cu_seqlens, window, slopes, softcap, rotary)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(_compute_dtype(x)) for x in (q, k, v))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device, torch.int32).contiguous()
    cos, sin = rotary or (None, None)
    return _attention(q, k, v, mask, scale, causal, cu_seqlens, window, slopes, softcap, cos, sin)[0]


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """softmax(scale x + mask) over the last dimension, fused where it can, else in plain PyTorch.

    x (..., Tk), or (..., Tq, Tk) when causal; float32 or bfloat16 -> the same shape and dtype, contiguous.
    mask and causal as in attention(), the mask broadcasting to x's shape; a row with nothing left gives zeros.
    """
    unfit = _barred() or _unfit("x", x)
    unfit = unfit or mask is not None and _unfit_option("mask", mask, (torch.bool, torch.float32, x.dtype))
    if unfit or x.dim() == 0 or x.dtype not in (_CPU_DTYPES if x.is_cpu else _CUDA_DTYPES):
        return _plain_softmax(x, causal, mask, scale)
    shape = x.shape
    if x.dim() > 4:  # the operator takes four; fold the leading ones
        mask = mask.expand(shape).flatten(0, -4) if mask is not None and mask.dim() > 3 else mask
        x = x.flatten(0, -4)
    y = _softmax(x, mask, float(scale), causal)
    return y.reshape(shape) if y.dim() != len(shape) else y


def _plain_softmax(x: Tensor, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
    """The definition, differentiable as often as one likes."""
    s = scale * (x if x.dtype == torch.float64 else x.float())
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():  # 0s and 1s would be added, and mask nothing
            raise TypeError(f"mask has dtype {mask.dtype}; wanted bool (True: may attend) or floating point (added)")
        pairs = zip(mask.shape[::-1], x.shape[::-1], strict=False)
        if mask.dim() > x.dim() or any(m not in (n, 1) for m, n in pairs):
            raise RuntimeError(f"mask has shape {tuple(mask.shape)}; wanted one that broadcasts to {tuple(x.shape)}")
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    if causal:
        Tq, Tk = s.shape[-2:]
        s = s.masked_fill(~torch.ones(Tq, Tk, dtype=torch.bool, device=s.device).tril(Tk - Tq), -math.inf)
    empty = (s == -math.inf).all(-1, keepdim=True)  # torch.softmax would give NaN there
    return torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (B, H, T, D) and the last T rows of cos and sin (Tk, D/2) or (B, Tk, D/2) -> R x."""
    cos, sin = (t[..., t.shape[-2] - x.shape[2] :, :].unsqueeze(-3) for t in (cos, sin))  # (1, T, D/2), perhaps (B, ..)
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _plain_attention(q, k, v, causal, mask, scale, cu_seqlens=None, window=0, slopes=None, softcap=0.0, rotary=None):
    # What the operator refuses is refused here, too: PyTorch would broadcast some of it.
    if not q.dim() == k.dim() == v.dim() == 4 or min(q.shape[1], k.shape[1]) < 1 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise RuntimeError(f"q, k and v have shapes {shapes}; wanted 4 dimensions each, and Hkv >= 1 that divides H")
    (B, H, Tq, D), (Hkv, Tk), (cos, sin) = q.shape, k.shape[1:3], rotary or (None, None)
    tables = [(Tk, D // 2), (1, Tk, D // 2), (B, Tk, D // 2)]
    wanted = [(B, Hkv, Tk, D)], [(B, Hkv, Tk, v.shape[3])], [(H,), (B, H)], tables, tables
    for name, x, shapes in zip(("k", "v", "slopes", "cos", "sin"), (k, v, slopes, cos, sin), wanted, strict=True):
        if x is not None and x.shape not in shapes:
            raise RuntimeError(f"{name} has shape {tuple(x.shape)}; wanted {' or '.join(map(str, shapes))}")
    if cos is not None and Tq > Tk or cu_seqlens is not None and Tq != Tk:
        raise RuntimeError(f"{Tq} queries, {Tk} keys; wanted as many with cu_seqlens, no more queries with cos and sin")
    if not (0 <= window < 2**31 and 0 <= softcap < math.inf):
        raise RuntimeError(f"window is {window} and softcap {softcap}; wanted 0 (none) or a positive number")
    if rotary is not None:
        q, k = _turn(q, *rotary), _turn(k, *rotary)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (B, H, Tk, D), (B, H, Tk, Dv)
    s = q @ k.mT  # (B, H, Tq, Tk)
    if softcap or window or slopes is not None or cu_seqlens is not None:
        s, scale = scale * (s if s.dtype == torch.float64 else s.float()), 1.0
        i, j = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq, torch.arange(Tk, device=q.device)
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if slopes is None else s - slopes.expand(B, H)[..., None, None] * (i - j).abs()
        s = s.masked_fill((i - j).abs() >= window, -math.inf) if window else s
        if cu_seqlens is not None:
            token = torch.arange(B * Tk, device=q.device)
            document = torch.searchsorted(cu_seqlens.to(token), token, right=True).view(B, 1, 1, Tk)
            s = s.masked_fill(document.mT != document, -math.inf)
    return _plain_softmax(s, causal, mask, scale).to(v.dtype) @ v  # (B,H,Tq,Tk) x (B,H,Tk,Dv) -> (B,H,Tq,Dv)


if __name__ == "__main__":
    print(f"torch {torch.__version__}:", "fused" if available() else f"plain PyTorch, as {_reason}")
    if C := sys.modules.get("minimal._C") if available() else None:
        print(f"  built by {C.compiler} with {C.flags}, torch {C.torch_built_with} (needs {C.torch_needed})")
        print(f"  instruction sets: {C.instruction_sets()}; in use: {C.instruction_set()} (MINIMAL_ISA chooses)")
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 8, 7, 64), torch.randn(2, 1, 2, 9, 64)
    exact = _plain_attention(q.double(), k.double(), v.double(), True, None, 0.125)
    error = (attention(q, k, v, causal=True) - exact).abs().max().item()
    print(f"  7 queries over 9 keys, 8 heads on 2, causal: largest error against float64 {error:.1e}")
