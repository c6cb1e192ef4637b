# SPDX-License-Identifier: MIT
"""A GPT's block as one function with its backward pass by hand: back-propagation in full view.

Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors" (1986, Nature 323), for the block of
minimal/gpt.py (Radford et al. 2019). With N = B T rows, x_ = (x - mean) / sqrt(var + eps) and LN(x) = x_ w + b:

    n = LN_1(x)     [q k v] = n W_qkv^T + b     a = x + attention(q, k, v) W_o^T + b
    m = LN_2(a)     h = m W_f^T + b             y = a + gelu(h) W_p^T + b

Each line is gone through backwards. With G the gradient of the loss with respect to what a line computes:

    y = n W^T + b       dn = G W        dW = G^T n       db = sum of G's rows
    y = gelu(h)         dh = G gelu'(h)
    y = w x_ + b        dx = r (D - mean(D) - x_ mean(D x_)),  D = G w,  r = 1 / sqrt(var + eps)
                        dw = sum of G x_'s rows      db = sum of G's rows
    y = a + f(a)        da = G + df

The attention is whatever the model was given, and its gradient autograd's. Sums go into memory that is there, and a
weight's gradient comes out as its owner keeps it, where autograd makes a transpose and copies it. The numbers are those
of the model's own forward and backward up to rounding. A call of another kind runs as before: without gradients, with a
cache, with dropout, with weights that do not train, hooks, under autocast.

    make_lean(model)                       # of minimal/gpt.py; make_plain(model) undoes it
    make_lean(model, gelu, gelu_backward)  # such as those of minimal/fused_mlp.py
    loss, count = model.loss(ids);  (loss / count).backward()      # once: a second backward() needs another forward

Letters: B batch, T tokens, N = B T, C width, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn


def gelu(h):
    """GELU in its tanh form, of each number."""
    return F.gelu(h, approximate="tanh")


def gelu_backward(G, h):
    """G gelu'(h), of each number; both of one shape."""
    return torch.ops.aten.gelu_backward(G, h, approximate="tanh")


class _Given(torch.autograd.Function):
    """apply(y, G) -> a scalar whose gradient to y is G. autograd.grad(y, x, G) itself imports sympy first: 0.2 s."""

    @staticmethod
    def forward(ctx, y, G):
        ctx.G = G
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.G, None


class _Block(torch.autograd.Function):
    """apply(block, mask, x (B, T, C), the twelve parameters in _parameters' order) -> (B, T, C)"""

    @staticmethod
    def forward(ctx, block, mask, x, *parameters):
        w1, b1, W_qkv, b_qkv, W_o, b_o, w2, b2, W_f, b_f, W_p, b_p = parameters
        (B, T, C), H, eps = x.shape, block.attn.config.n_head, block.ln_1.eps
        x = x.reshape(-1, C)  # (N, C)
        n, mean1, r1 = torch.native_layer_norm(x, (C,), w1, b1, eps)  # (N, C), (N, 1), (N, 1)
        qkv = torch.addmm(b_qkv, n, W_qkv.t())  # (N,C) x (3C,C) -> (N,3C)
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in qkv.split(C, dim=1))  # 3 x (B, H, T, D)
        with torch.enable_grad():  # a graph of its own, of the attention alone
            q, k, v = (t.requires_grad_() for t in (q, k, v))
            seen = block.attn.attention(q, k, v, causal=True, mask=mask, dropout=0.0)  # (B, H, T, D)
        s = seen.detach().transpose(1, 2).reshape(-1, C)  # (N, C), heads side by side
        a = torch.addmm(b_o, s, W_o.t()).add_(x)  # (N,C) x (C,C) -> (N,C)
        m, mean2, r2 = torch.native_layer_norm(a, (C,), w2, b2, eps)
        h = torch.addmm(b_f, m, W_f.t())  # (N,C) x (4C,C) -> (N,4C)
        g = block.lean_gelu[0](h)
        y = torch.addmm(b_p, g, W_p.t()).add_(a)  # (N,4C) x (C,4C) -> (N,C)
        ctx.block, ctx.attended = block, (seen, q, k, v)
        ctx.save_for_backward(x, n, mean1, r1, s, a, m, mean2, r2, h, g, *parameters)
        return y.view(B, T, C)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        if ctx.attended is None:
            raise RuntimeError("backward() a second time: wanted another forward pass before it, as make_lean says")
        (seen, *qkv), (B, T, C) = ctx.attended, G.shape
        ctx.attended = None  # what the attention has kept goes with its graph
        x, n, mean1, r1, s, a, m, mean2, r2, h, g, *parameters = ctx.saved_tensors
        w1, b1, W_qkv, _, W_o, _, w2, b2, W_f, _, W_p, _ = parameters
        G = G.reshape(-1, C)  # (N, C)
        of_p = G.t() @ g, G.sum(0)  # (N,C) x (N,4C) -> (C,4C), and (C,)
        dh = ctx.block.lean_gelu[1](G @ W_p, h)  # (N,C) x (C,4C) -> (N,4C)
        of_f = dh.t() @ m, dh.sum(0)  # (4C, C), (4C,)
        da, *of_2 = torch.ops.aten.native_layer_norm_backward(dh @ W_f, a, (C,), mean2, r2, w2, b2, [True] * 3)
        da += G
        of_o = da.t() @ s, da.sum(0)  # (C, C), (C,)
        ds = (da @ W_o).view(B, T, -1, seen.size(3)).transpose(1, 2)  # (B, H, T, D)
        with torch.enable_grad():
            dqkv = torch.autograd.grad(_Given.apply(seen, ds), qkv)  # 3 x (B, H, T, D)
        dqkv = torch.cat([t.transpose(1, 2).reshape(-1, C) for t in dqkv], dim=1)  # (N, 3C)
        of_qkv = dqkv.t() @ n, dqkv.sum(0)  # (3C, C), (3C,)
        dx, *of_1 = torch.ops.aten.native_layer_norm_backward(dqkv @ W_qkv, x, (C,), mean1, r1, w1, b1, [True] * 3)
        return None, None, dx.add_(da).view(B, T, C), *of_1, *of_qkv, *of_o, *of_2, *of_f, *of_p


def _parameters(block):
    layers = block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj
    return [p for layer in layers for p in (layer.weight, layer.bias)]


class _Lean:
    """What make_lean puts before the class of a block: its forward pass, where this file's kind of call is made."""

    def forward(self, x, cache=None, layer=0, mask=None):
        if cache is not None or not torch.is_grad_enabled() or self._unfit(x):
            return super().forward(x, cache, layer, mask)
        return _Block.apply(self, mask, x, *_parameters(self))

    def _unfit(self, x):
        kinds = nn.LayerNorm, nn.Linear, nn.Linear
        layers = self.ln_1, self.attn.c_attn, self.attn.c_proj, self.ln_2, self.mlp.c_fc, self.mlp.c_proj
        return (
            (self.training and self.attn.config.dropout > 0)
            or any(type(layer) is not kind for layer, kind in zip(layers, 2 * kinds, strict=True))
            or any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
            or any(m._backward_hooks or m._backward_pre_hooks for m in self.modules())
            or any(p is None or not p.requires_grad or p.dtype != x.dtype for p in _parameters(self))
            or len(list(self.parameters())) != 12
            or torch.is_autocast_enabled(x.device.type)
        )


def _blocks(model):
    return {n: m for n, m in model.named_modules() if all(hasattr(m, w) for w in ("ln_1", "attn", "ln_2", "mlp"))}


def make_lean(model, gelu=gelu, gelu_backward=gelu_backward):
    """Lets each block of a GPT train as this file does, in place; returns the names of the blocks.

    gelu: h -> gelu(h); gelu_backward: G, h -> G gelu'(h), both without a graph. Parameters, names and hooks stay. A
    forward pass serves one backward pass: RuntimeError at the next. ValueError: no such block."""
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(f"model={type(model).__name__} has no blocks like GPT-2's; wanted one of minimal/gpt.py")
    for block in blocks.values():
        if not isinstance(block, _Lean):
            block.__class__ = type(type(block).__name__, (_Lean, type(block)), {})
        block.lean_gelu = gelu, gelu_backward
    return list(blocks)


def make_plain(model):
    """Undoes make_lean; returns the names of the blocks that were lean."""
    blocks = {n: m for n, m in _blocks(model).items() if isinstance(m, _Lean)}
    for block in blocks.values():
        block.__class__ = type(block).__mro__[2]
        del block.lean_gelu
    return list(blocks)


if __name__ == "__main__":
    import time
    import types

    class Attention(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.config = types.SimpleNamespace(n_head=4, dropout=0.0)
            self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

        def attention(self, q, k, v, *, causal, mask, dropout):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)

        def forward(self, x):
            q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
            return self.c_proj(self.attention(q, k, v, causal=True, mask=None, dropout=0.0).transpose(1, 2).flatten(2))

    class MLP(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x):
            return self.c_proj(gelu(self.c_fc(x)))

    class Block(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(C), Attention(C), nn.LayerNorm(C), MLP(C)

        def forward(self, x, cache=None, layer=0, mask=None):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    torch.manual_seed(0)
    torch.set_num_threads(1)
    blocks, x, first = nn.ModuleList(Block(256) for _ in range(4)), torch.randn(4, 128, 256), None
    for how in ("autograd", "by hand"):
        if how == "by hand":
            make_lean(blocks)
        seconds = []
        for _ in range(7):
            start, y = time.perf_counter(), x
            for block in blocks:
                y = block(y)
            grads = torch.autograd.grad(y.square().sum(), list(blocks.parameters()))
            seconds.append(time.perf_counter() - start)
        first = first or grads
        off = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, first, strict=True))
        print(f"{how:9} {1e3 * min(seconds):4.0f} ms, gradients {off:.0e} from autograd's")
