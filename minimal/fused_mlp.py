# SPDX-License-Identifier: MIT
"""What stands between the products of an MLP, in one pass over memory: torch.ops.minimal.gelu and swiglu, for the CPU.

GELU in its tanh form is from Hendrycks and Gimpel 2016, arXiv 1606.08415, SwiGLU from Shazeer 2020, arXiv 2002.05202.
With s(x) = 1 / (1 + exp(-x)), and as (1 + tanh(z)) / 2 = s(2 z), one exponential serves for the tanh:

    gelu(x)      = x s(p),  p = 2 sqrt(2 / pi) (x + 0.044715 x^3)      gelu'(x) = s(p) + x s(p) (1 - s(p)) p'
    swiglu(g, u) = g s(g) u           to g: u s(g) (1 + g (1 - s(g)))            to u: g s(g)

PyTorch computes a tanh and its polynomial, and takes several passes for the gate and its gradient. float32 is computed
fused, where the operators are there; all else in plain PyTorch, which gives the same up to rounding.

    from minimal import fused_mlp
    y = fused_mlp.gelu(x);   y = fused_mlp.swiglu(gate, up)                  # with gradients
    dx = fused_mlp.gelu_backward(dy, x)                                      # for a backward pass by hand
    dgate, dup = fused_mlp.swiglu_backward(dy, gate, up)

MINIMAL_FUSED=0 in the environment, read at import, forces plain PyTorch.
"""

import importlib.machinery
import importlib.util
import os
import sys

import torch
import torch.nn.functional as F
from torch._C import _functorch
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable


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
            return f"broken: {spec.origin} does not load: {' '.join(str(error).split())}"
        sys.modules["minimal._C"] = module
    if not hasattr(torch.ops.minimal, "gelu"):
        return "too old: the compiled minimal/_C has no gelu; build it again"
    if not hasattr(torch.ops.minimal, "has_mlp_rules"):  # a second copy of this file must not add them again
        for name in ("gelu", "gelu_backward", "swiglu", "swiglu_backward"):
            fake = _fake_two if name == "swiglu_backward" else _fake
            torch.library.register_fake(f"minimal::{name}", fake)
            torch.library.register_autograd(f"minimal::{name}", _no_gradient)  # else it would be silently absent
        torch.ops.minimal.has_mlp_rules = True
    return None


def _fake(x, *others):
    if any(t.device != x.device for t in others):  # the rule also answers where one argument alone is on `meta`
        raise RuntimeError(f"torch.ops.minimal: arguments on {x.device} and elsewhere; wanted all on one device")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_two(*inputs):
    return _fake(*inputs), _fake(*inputs)


def _no_gradient(ctx, *grads):
    raise RuntimeError("torch.ops.minimal.gelu and swiglu give no gradient; minimal.fused_mlp does")


_reason = _load()  # None: the operators are there


def available() -> bool:
    """Whether the compiled operators are loaded and not switched off."""
    return _reason is None


def _fits(*tensors):
    x = tensors[0]
    same = all(t.dtype == torch.float32 and t.is_cpu and t.dim() <= 4 and t.shape == x.shape for t in tensors)
    return _reason is None and same and _functorch.maybe_current_level() is None and forward_ad._current_level < 0


class _Gelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.minimal.gelu.default(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return gelu_backward(grad, *ctx.saved_tensors)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.ops.minimal.swiglu.default(gate.contiguous(), up.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return swiglu_backward(grad, *ctx.saved_tensors)


def gelu(x):
    """x s(p) of each number, see above: x of any shape -> the same shape and dtype, contiguous where it runs fused."""
    return _Gelu.apply(x) if _fits(x) else F.gelu(x, approximate="tanh")


def gelu_backward(grad, x):
    """grad gelu'(x): grad and x of one shape and dtype -> the same, without a graph of its own."""
    if _fits(x, grad):
        with torch.no_grad():
            return torch.ops.minimal.gelu_backward.default(grad.contiguous(), x.contiguous())
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def swiglu(gate, up):
    """silu(gate) up: two tensors of one shape and dtype -> the same. ValueError for shapes that differ."""
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; wanted one shape")
    return _SwiGLU.apply(gate, up) if _fits(gate, up) else F.silu(gate) * up


def swiglu_backward(grad, gate, up):
    """The gradients to gate and up for that of swiglu(gate, up), all of one shape and dtype: two tensors, no graph."""
    with torch.no_grad():
        if _fits(gate, up, grad):
            return torch.ops.minimal.swiglu_backward.default(grad.contiguous(), gate.contiguous(), up.contiguous())
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    print(f"torch {torch.__version__}:", "fused" if available() else f"plain PyTorch, as {_reason}")
    x, u, dy = (torch.randn(2048, 1536) for _ in range(3))
    exact = F.gelu(x.double(), approximate="tanh")
    print(f"gelu: largest error {(gelu(x) - exact).abs().max():.0e}, PyTorch's "
          f"{(F.gelu(x, approximate='tanh') - exact).abs().max():.0e}")  # fmt: skip
    plain = {
        "gelu": lambda: F.gelu(x, approximate="tanh"),
        "gelu_backward": lambda: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
        "swiglu": lambda: F.silu(x) * u,
        "swiglu_backward": lambda: (torch.ops.aten.silu_backward(dy * u, x), dy * F.silu(x)),
    }
    ours = {
        "gelu": lambda: gelu(x),
        "gelu_backward": lambda: gelu_backward(dy, x),
        "swiglu": lambda: swiglu(x, u),
        "swiglu_backward": lambda: swiglu_backward(dy, x, u),
    }
    for name in ours:
        taken = []
        for f in (ours[name], plain[name]):
            seconds = []
            for _ in range(9):
                start = time.perf_counter()
                f()
                seconds.append(time.perf_counter() - start)
            taken.append(sorted(seconds)[4])
        print(f"{name:16} {1e3 * taken[0]:5.1f} ms, in plain PyTorch {1e3 * taken[1]:5.1f} ms")
