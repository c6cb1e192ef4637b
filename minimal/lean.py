# SPDX-License-Identifier: MIT
"""A Llama's adapters trained in less time and memory: each block as one function, with its backward pass by hand.

The weights W of a block are frozen, only the A and B of its LoRA (Hu et al. 2021, arXiv 2106.09685) learn. Autograd
then keeps what each operation needs by itself, and adds up in new memory what could be added in place. In a block

    n = RMSNorm(x)      q, k, v = n W_q, n W_k, n W_v      a = x + attention(q, k, v) W_o      each W with its adapter,
    m = RMSNorm(a)      g, u = m W_g, m W_u                y = a + (silu(g) * u) W_d           W + s A^T B^T

only x, q, k, v, the attention's own, a, g and u are kept here; n, m and silu(g) * u, a pass over memory each, are made
again. With recompute, g and u are too: two of the seven products once more, and half of the memory is left.
With G the gradient of the output of a product h = n A^T, o = n W + s h B^T:

    dn = G W^T + s (G B) A      dA = s (G B)^T n      dB = s G^T h      no dW: a third of a training step is not done
    dx = r (w d - x r^2 mean(x w d))  through RMSNorm, y = w x r, r = 1 / sqrt(mean(x^2) + eps), d the gradient of y
    dg = G u sigmoid(g) (1 + g (1 - sigmoid(g)))      du = G silu(g)      through silu(g) * u

The attention is whatever the model was given, and its gradient autograd's. The numbers are those of the model's own
forward and backward up to rounding. A call that is not of this kind runs as before: without gradients, with a cache,
with dropout, DoRA, weights that train, other hooks, or adapters of another dtype than the activations (half precision).

    add_lora(model); make_lean(model)         # of minimal/llama.py, quantised or not; make_plain(model) undoes it
    loss, count = model.loss(ids);  (loss / count).backward()      # once: a second backward() needs another forward

Letters: B batch, T tokens, N = B T, C width, O outputs of a layer, F the MLP's width, D head size, r rank.
"""

import torch
import torch.nn.functional as F
from torch import nn


def swiglu(g, u):
    """silu(g) u of each number; both of one shape."""
    return F.silu(g).mul_(u)


def swiglu_backward(d, g, u):
    """The gradients to g and u; d is overwritten."""
    du = F.silu(g).mul_(d)
    return torch.ops.aten.silu_backward(d.mul_(u), g), du


def _product(layer, x):
    """x (N, C) -> the layer's output with its adapter, (N, O), and h = x A^T (N, r) or None."""
    y, lora = layer.forward(x), getattr(layer, "lora", None)  # without its hooks, and without gradient
    if lora is None:
        return y, None
    h = x @ lora.A.t()  # (N,C) x (r,C) -> (N,r)
    return y.addmm_(h, lora.B.t(), alpha=lora.scale), h


def _product_back(layer, G, x, h, into=None):
    """G (N, O) -> the gradient to x (N, C), added to `into` if that is given; those of A (r, C) and B (O, r), or ()."""
    dx = G @ layer.weight if into is None else into.addmm_(G, layer.weight)  # (N,O) x (O,C) -> (N,C)
    if h is None:
        return dx, ()
    A, B, s = layer.lora.A, layer.lora.B, layer.lora.scale
    GB = (G @ B).mul_(s)  # (N, r)
    return dx.addmm_(GB, A), (GB.t() @ x, (h.t() @ G).t().mul_(s))


def _inverse_norm(norm, x):
    return (torch.linalg.vector_norm(x, dim=1, keepdim=True).square_() / x.size(1)).add_(norm.eps).rsqrt_()  # (N, 1)


def _norm(norm, x, r):
    return (x * r).mul_(norm.weight)  # (N, C)


def _norm_back(norm, d, x, r):
    """d (N, C), which is overwritten by the gradient to x, also (N, C)."""
    d.mul_(norm.weight)
    mean = (d * x).mean(1, keepdim=True)  # (N, 1)
    return d.mul_(r).addcmul_(x, mean.mul_(r**3), value=-1)


# Same as minimal/lean_gpt.py: _Given
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
    """apply(block, angles, mask, recompute, x (B, T, C), A and B of each adapter in _linear's order) -> (B, T, C)"""

    @staticmethod
    def forward(ctx, block, angles, mask, recompute, x, *adapters):
        q_proj, k_proj, v_proj, o_proj, gate, up, down = _linear(block)
        (B, T, C), norms = x.shape, (block.input_layernorm, block.post_attention_layernorm)
        x = x.reshape(-1, C)  # (N, C)
        n = _norm(norms[0], x, r1 := _inverse_norm(norms[0], x))
        (q, hq), (k, hk), (v, hv) = (_product(f, n) for f in (q_proj, k_proj, v_proj))
        q, k, v = (t.view(B, T, -1, block.config.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = _turn(q, *angles), _turn(k, *angles)  # (B, H, T, D), (B, Hkv, T, D)
        with torch.enable_grad():  # a graph of its own, of the attention alone
            q, k, v = (t.requires_grad_() for t in (q, k, v))
            seen = block.self_attn.attention(q, k, v, causal=True, mask=mask)  # (B, H, T, D)
        flat = seen.detach().transpose(1, 2).reshape(B * T, -1)
        a, ho = _product(o_proj, flat)
        a += x
        m = _norm(norms[1], a, r2 := _inverse_norm(norms[1], a))
        (g, hg), (u, hu) = _product(gate, m), _product(up, m)
        y, hd = _product(down, block.lean_gate[0](g, u))
        ctx.block, ctx.angles, ctx.attended = block, angles, (seen, q, k, v)
        kept = (None, None) if recompute else (g, u)
        ctx.save_for_backward(x, r1, hq, hk, hv, ho, a, r2, hg, hu, hd, *kept)
        return y.add_(a).view(B, T, C)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        if ctx.attended is None:
            raise RuntimeError("backward() a second time: wanted another forward pass before it, as make_lean says")
        block, (seen, *qkv) = ctx.block, ctx.attended
        ctx.attended = None  # what the attention has kept goes with its graph
        q_proj, k_proj, v_proj, o_proj, gate, up, down = _linear(block)
        x, r1, hq, hk, hv, ho, a, r2, hg, hu, hd, g, u = ctx.saved_tensors
        norms, (B, T, C) = (block.input_layernorm, block.post_attention_layernorm), G.shape
        G = G.reshape(-1, C)  # (N, C)
        m = _norm(norms[1], a, r2)
        if g is None:
            g, u = _product(gate, m)[0], _product(up, m)[0]  # (N, F)
        swiglu, swiglu_backward = block.lean_gate
        d, of_down = _product_back(down, G, swiglu(g, u), hd)  # (N, F)
        dg, du = swiglu_backward(d, g, u)
        dm, of_gate = _product_back(gate, dg, m, hg)
        dm, of_up = _product_back(up, du, m, hu, dm)
        del m, d, du, dg, g, u
        da = _norm_back(norms[1], dm, a, r2).add_(G)
        flat = seen.detach().transpose(1, 2).reshape(B * T, -1)
        d, of_o = _product_back(o_proj, da, flat, ho)
        with torch.enable_grad():
            d = d.view(B, T, -1, block.config.head_dim).transpose(1, 2)  # (B, H, T, D)
            dq, dk, dv = torch.autograd.grad(_Given.apply(seen, d), qkv)
        (cos, sin), seen, qkv = ctx.angles, None, None
        dq, dk = _turn(dq, cos, -sin), _turn(dk, cos, -sin)
        dq, dk, dv = (t.transpose(1, 2).reshape(B * T, -1) for t in (dq, dk, dv))
        n = _norm(norms[0], x, r1)
        dn, of_q = _product_back(q_proj, dq, n, hq)
        dn, of_k = _product_back(k_proj, dk, n, hk, dn)
        dn, of_v = _product_back(v_proj, dv, n, hv, dn)
        dx = _norm_back(norms[0], dn, x, r1).add_(da).view(B, T, C) if ctx.needs_input_grad[4] else None
        return None, None, None, None, dx, *of_q, *of_k, *of_v, *of_o, *of_gate, *of_up, *of_down


def _linear(block):
    s, m = block.self_attn, block.mlp
    return s.q_proj, s.k_proj, s.v_proj, s.o_proj, m.gate_proj, m.up_proj, m.down_proj


def _turn(x, cos, sin):
    """x (B, H, T, D), its pairs (i, i + D/2) turned by angles whose cos and sin broadcast to (B, H, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _Lean:
    """What make_lean puts before the class of a block: its forward pass, where this file's kind of call is made."""

    def forward(self, x, angles, cache=None, layer=0, mask=None):
        if cache is not None or not torch.is_grad_enabled() or self._unfit(x):
            return super().forward(x, angles, cache, layer, mask)
        adapters = [p for f in _linear(self) if hasattr(f, "lora") for p in (f.lora.A, f.lora.B)]
        return _Block.apply(self, angles, mask, self.lean_recompute, x, *adapters)

    def _unfit(self, x):
        loras = [f.lora for f in _linear(self) if hasattr(f, "lora")]
        adapters, hooks = [p for lora in loras for p in lora.parameters()], []
        for m in self.modules():
            for kind in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
                hooks += kind.values()
        learning = {id(p) for p in self.parameters() if p.requires_grad}
        return (
            (self.training and (self.config.dropout or any(lora.dropout for lora in loras)))
            or not (learning or x.requires_grad)
            or not learning.issubset(map(id, adapters))
            or any(lora.m is not None for lora in loras)
            or any(h not in loras for h in hooks)
            or any(p.dtype != x.dtype for p in self.parameters())
            or torch.is_autocast_enabled(x.device.type)
        )


def _blocks(model):
    wanted = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return {n: m for n, m in model.named_modules() if all(hasattr(m, w) for w in wanted) and hasattr(m, "config")}


def make_lean(model, recompute=False, swiglu=swiglu, swiglu_backward=swiglu_backward):
    """Lets each block of a Llama train its adapters as this file does, in place; returns the names of the blocks.

    Before or after add_lora and quantise. recompute: half of the memory, for about a fifth more time. swiglu and its
    backward: without a graph, such as those of minimal/fused_mlp.py. Parameters, names and hooks stay. A forward pass
    serves one backward pass: RuntimeError at the next. ValueError: no such block."""
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(f"model={type(model).__name__} has no blocks like Llama's; wanted one of minimal/llama.py")
    for block in blocks.values():
        if not isinstance(block, _Lean):
            block.__class__ = type(type(block).__name__, (_Lean, type(block)), {})
        block.lean_recompute, block.lean_gate = recompute, (swiglu, swiglu_backward)
    return list(blocks)


def make_plain(model):
    """Undoes make_lean; returns the names of the blocks that were lean."""
    blocks = {n: m for n, m in _blocks(model).items() if isinstance(m, _Lean)}
    for block in blocks.values():
        block.__class__ = type(block).__mro__[2]
        del block.lean_recompute, block.lean_gate
    return list(blocks)


if __name__ == "__main__":
    import contextlib
    import time

    class Norm(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(C), requires_grad=False), 1e-5

        def forward(self, x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    class Adapter(nn.Module):  # of minimal/lora.py, in short
        def __init__(self, C, O, r=8):
            super().__init__()
            self.A, self.B = nn.Parameter(torch.randn(r, C) / C**0.5), nn.Parameter(torch.randn(O, r) / 10)
            self.scale, self.dropout, self.m = 2.0, 0.0, None

        def forward(self, layer, args, out):
            return out + F.linear(F.linear(args[0], self.A), self.B) * self.scale

    def linear(C, O):
        layer = nn.Linear(C, O, bias=False).requires_grad_(False)
        layer.lora = Adapter(C, O)
        layer.register_forward_hook(layer.lora)
        return layer

    class Config:
        head_dim, dropout = 64, 0.0

    class Attention(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(C, C) for _ in range(4))

        def attention(self, q, k, v, causal, mask):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        def forward(self, x, angles):
            q, k, v = (f(x).unflatten(2, (-1, 64)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
            y = self.attention(_turn(q, *angles), _turn(k, *angles), v, True, None)
            return self.o_proj(y.transpose(1, 2).flatten(2))

    class MLP(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = linear(C, 3 * C), linear(C, 3 * C), linear(3 * C, C)

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.config, self.self_attn, self.mlp = Config(), Attention(C), MLP(C)
            self.input_layernorm, self.post_attention_layernorm = Norm(C), Norm(C)

        def forward(self, x, angles, cache=None, layer=0, mask=None):
            x = x + self.self_attn(self.input_layernorm(x), angles)
            return x + self.mlp(self.post_attention_layernorm(x))

    torch.manual_seed(0)
    torch.set_num_threads(1)
    blocks, x = nn.ModuleList(Block(256) for _ in range(4)), torch.randn(2, 256, 256)
    angle = torch.arange(256)[:, None] * 10000 ** (-torch.arange(32) / 32)
    angles, first = (angle.cos()[None], angle.sin()[None]), None
    for how in ("autograd", "by hand", "by hand, with recompute"):
        if how != "autograd":
            make_lean(blocks, recompute="recompute" in how)
        seconds, held = [], {}

        def keep(t, held=held):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        for turn in range(6):
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t) if not turn else contextlib.nullcontext():
                y = x
                for block in blocks:
                    y = block(y, angles)
            for p in blocks.parameters():
                held.pop(p.data_ptr(), None)
            grads = torch.autograd.grad(y.square().sum(), [p for p in blocks.parameters() if p.requires_grad])
            seconds.append(time.perf_counter() - start)
        first = first or grads
        off = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, first, strict=True))
        kept = sum(held.values()) / 1e6
        print(f"{how:24} {kept:4.0f} MB kept, {1e3 * min(seconds):4.0f} ms, gradients {off:.0e} from autograd's")
