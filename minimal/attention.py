# SPDX-License-Identifier: MIT
"""Attention, from the definition to the tiled algorithm of the fused kernels, with heads and positions around it.

Papers and equations
    Vaswani et al. 2017, "Attention is all you need", 1706.03762. Equation 1, for each head:
        S = scale Q Kᵀ + mask      P = softmax(S) over the keys      O = P V      scale = 1 / √D
      A query asks, every key answers with a score, and the output is the mean of the values weighted by softmax(score).
      1/√D keeps the scores of random unit-variance q and k at variance 1, where softmax still has a gradient.
      MultiHead(x) = concat(O_1 .. O_H) W_O, with q, k, v linear in x. §3.5: sinusoidal positions.
    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", 1805.02867: softmax in one pass.
    Dao et al. 2022, "FlashAttention", 2205.14135: that pass over tiles, so that no Tq x Tk matrix is ever stored.
    Ainslie et al. 2023, "GQA", 2305.13245: query head h reads key-value head h // G; the cache is G times smaller.
    Su et al. 2021, "RoFormer", 2104.09864: rotary positions, where a score depends on the distance of two tokens only.

Every attention function here keeps one contract, `f(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0)`:
    q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv) in q's dtype; Hkv divides H.
    mask    boolean (True: may attend) or additive (-inf hides), any shape that broadcasts to (B, H, Tq, Tk).
    causal  aligned bottom-right: query i sees key j iff j <= i + Tk - Tq. With a cache, the last query is the last key.
            Combined with the mask: a key is seen when both allow it.
    scale   1/√D unless given.   dropout: probability, on P, always active: the caller passes 0.0 in evaluation.
    A row with nothing to attend to (all hidden, or Tk = 0) gives zeros and zero gradients, never NaN.

Departures: the papers leave empty rows undefined (0/0); rotary pairs halves, not neighbours (see `rotary`);
FlashAttention draws its dropout inside the tiles, `tiled_attention` has none.

Use
    out = attention(q, k, v, causal=True)                       # the fused CPU kernel if it is built, else PyTorch's
    layer = MultiHeadAttention(d_model=512, n_heads=8, n_kv_heads=2)
    y = layer(x, causal=True)                                   # (B, T, C) -> (B, T, C)

Letters: B batch, T tokens (Tq queries, Tk keys), H query heads, Hkv key-value heads, G = H / Hkv, D and Dv head sizes,
C = d_model channels; r x c rows and columns of a tile.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:  # The kernels of csrc/, when this file lives in the installed package. Copied or run alone, it works without.
    from minimal import fused
except ImportError:
    fused = None


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: want q (B, H, Tq, D) and k (B, Hkv, Tk, D)")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: want k and v to agree in (B, Hkv, Tk)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: want the {k.shape[1]} key-value heads to divide the {q.shape[1]} query heads")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():  # a 0/1 integer mask would be added to the scores
            raise TypeError(f"mask has dtype {mask.dtype}: want bool (True: may attend) or floating point (added)")
        full = (*q.shape[:3], k.shape[2])
        if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"mask has shape {tuple(mask.shape)}: want one that broadcasts to (B, H, Tq, Tk) = {full}")


def naive_attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """The definition (Vaswani et al. 2017, equation 1), line by line; see the module for the contract.

    float64 stays float64; float32, bfloat16 and float16 are computed in float32. Stores S and P: O(Tq Tk) memory.
    Raises ValueError or TypeError for shapes or a mask outside the contract.
    """
    _check(q, k, v, mask)
    Tq, Tk, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    K = k.to(wide).repeat_interleave(G, dim=1)  # (B, H, Tk, D)
    V = v.to(wide).repeat_interleave(G, dim=1)  # (B, H, Tk, Dv)
    S = q.to(wide) @ K.mT * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B,H,Tq,D) x (B,H,D,Tk) -> (B,H,Tq,Tk)
    if mask is not None:
        S = S.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else S + mask.to(wide)
    if causal:  # tril(Tk - Tq), not tril(): PyTorch's is_causal aligns top-left, which hides the cache from a new token
        S = S.masked_fill(~torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq), -math.inf)
    # A row of -inf has softmax 0/0 = NaN. Zeroing P afterwards mends only the forward: the backward of softmax still
    # multiplies that NaN, and past an additive mask it reaches q and k. So: finite scores first, zeros after.
    empty = (S == -math.inf).all(-1, keepdim=True)  # (B, H, Tq, 1); True when Tk = 0
    P = S.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)  # over keys: every row sums to 1, or to 0
    return (F.dropout(P, dropout) @ V).to(q.dtype)  # (B,H,Tq,Tk) x (B,H,Tk,Dv) -> (B,H,Tq,Dv)


def torch_attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """Attention by PyTorch's kernels: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) -> (B,H,Tq,Dv); Hkv divides H.

    mask is boolean (True: may attend) or additive, and broadcasts to (B, H, Tq, Tk); causal is aligned bottom-right and
    adds to it; a row with nothing to attend to gives zeros; dropout is always active: pass 0.0 in evaluation.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    causal = causal if Tq > 1 else False  # a lone query is the last token: it sees every key
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # PyTorch fails on a mask of 1 dim, and takes a slow path on 3
        if mask.is_floating_point():
            mask = mask.to(q.dtype)  # a float32 mask on float64 q passes PyTorch's check and is then misread on the CPU
    if causal and (mask is not None or Tq != Tk):  # is_causal is aligned top-left, and refuses a mask beside it
        seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)  # (Tq, Tk)
        if mask is None:
            mask = seen
        else:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
        causal = False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)


def attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """Attention by the fastest path that serves these arguments: the fused kernel, else `torch_attention`.

    `minimal.fused.why_not(q, k, v)` says in one line why the fused kernel does not run; MINIMAL_FUSED=0 forbids it.
    Contract and shapes: see the module. Raises ValueError or TypeError for arguments outside it.
    """
    _check(q, k, v, mask)
    if fused is not None and fused.why_not(q, k, v, mask=mask, dropout=dropout) is None:
        return fused.attention(q, k, v, causal=causal, mask=mask, scale=scale)
    return torch_attention(q, k, v, causal=causal, mask=mask, scale=scale, dropout=dropout)


# ---- The tiled algorithm: what the fused kernels compute, in plain PyTorch ----
#
# Softmax seems to need a whole row before it can weigh the first value: its maximum m (or exp overflows) and its sum l.
# Yet both can be carried along a row that arrives in pieces (online softmax). After some tiles of keys, hold
#     m = max S        l = Σ exp(S - m)        O = Σ exp(S - m) V        over the keys seen so far.
# The next tile may raise the maximum to m'. All that is held was measured against m, so all of it is off by the same
# factor: multiply l and O by α = exp(m - m') and add the tile's own terms. At the end O / l is exact, no approximation.
#
# The arithmetic is that of the definition; what is saved is memory traffic. Only a block x block tile of S exists at a
# time, small enough for the cache, while the definition writes and reads back S and P, Tq x Tk numbers each per head.
#
# The backward pass needs P again, and recomputes it tile by tile: cheaper than having stored it. The forward leaves one
# number per row, lse = m + log l = log Σ exp S, so that P = exp(S - lse) is normalised at once. With dO given:
#     dV = Pᵀ dO        dP = dO Vᵀ        dS = P ∘ (dP - Δ)        dQ = scale dS K        dK = scale dSᵀ Q
# Δ_i = Σ_j P_ij dP_ij is softmax's coupling of the row. It sums over all keys, which no tile has, but it collapses:
#     Δ_i = Σ_j P_ij (dO_i · V_j) = dO_i · Σ_j P_ij V_j = dO_i · O_i        known before the first tile.


def _tile(Q, K, i, j, mask, diagonal, scale):
    """The r x c tile of S whose corner is (i, j). diagonal: Tk - Tq if causal, else None."""
    S = Q @ K.mT * scale  # (B,Hkv,G,r,D) x (B,Hkv,1,D,c) -> (B,Hkv,G,r,c)
    r, c = S.shape[-2:]
    if mask is not None:
        tile = mask[..., i : i + r, j : j + c]  # (B, Hkv, G, r, c)
        S = S.masked_fill(~tile, -math.inf) if mask.dtype == torch.bool else S + tile.to(S.dtype)
    if diagonal is not None:  # hidden iff j + b > i + a + diagonal, in row a, column b of the tile
        hidden = torch.ones(r, c, dtype=torch.bool, device=S.device).triu(1 + diagonal + i - j)
        S = S.masked_fill(hidden, -math.inf)
    return S


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, diagonal, scale, block):
        G, (Tq, Tk) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
        wide = torch.promote_types(q.dtype, torch.float32)  # sums over many tiles would drown in bfloat16's 8 bits
        Q = q.to(wide).unflatten(1, (-1, G))  # (B, Hkv, G, Tq, D)
        K, V = k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)  # (B, Hkv, 1, Tk, D): broadcast over G without a copy
        if mask is not None:
            mask = mask.expand(*q.shape[:3], Tk).unflatten(1, (-1, G))  # (B, Hkv, G, Tq, Tk) with stride 0: no memory
        out = Q.new_empty(*Q.shape[:4], v.shape[3])  # (B, Hkv, G, Tq, Dv)
        lse = Q.new_empty(*Q.shape[:4], 1)
        for i in range(0, Tq, block):
            Qi = Q[..., i : i + block, :]  # (B, Hkv, G, r, D), stays in the cache for the whole inner loop
            m = torch.full_like(Qi[..., :1], -math.inf)
            l = torch.zeros_like(m)
            O = torch.zeros_like(out[..., i : i + block, :])
            # Tiles above the diagonal are not computed at all: causal attention costs half.
            last = Tk if diagonal is None else min(Tk, i + Qi.shape[-2] + diagonal)
            for j in range(0, last, block):
                S = _tile(Qi, K[..., j : j + block, :], i, j, mask, diagonal, scale)  # (B, Hkv, G, r, c)
                m_new = torch.maximum(m, S.amax(-1, keepdim=True))
                # While a row has seen nothing, m = m_new = -inf, and -inf - -inf = NaN: measure against 0 instead.
                base = m_new.masked_fill(m_new == -math.inf, 0.0)
                P = torch.exp(S - base)
                alpha = torch.exp(m - base)  # 0 at the first tile that counts: m was -inf
                l = alpha * l + P.sum(-1, keepdim=True)
                O = alpha * O + P @ V[..., j : j + block, :]  # (B,Hkv,G,r,c) x (B,Hkv,1,c,Dv) -> (B,Hkv,G,r,Dv)
                m = m_new
            # One division per row, not per tile. l = 0 only in an empty row (a maximum itself adds 1): zeros, not 0/0.
            out[..., i : i + block, :] = O / l.masked_fill(l == 0, 1.0)
            lse[..., i : i + block, :] = m + torch.log(l)  # -inf in an empty row
        ctx.save_for_backward(Q, K, V, mask, out, lse)  # O(T) numbers; the definition keeps P, O(Tq Tk)
        ctx.rest = diagonal, scale, block, q.dtype
        lse = lse.flatten(1, 2).squeeze(-1)
        ctx.mark_non_differentiable(lse)
        return out.flatten(1, 2).to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        Q, K, V, mask, out, lse = ctx.saved_tensors
        diagonal, scale, block, dtype = ctx.rest
        dO = grad.to(Q.dtype).unflatten(1, Q.shape[1:3])  # (B, Hkv, G, Tq, Dv)
        delta = (dO * out).sum(-1, keepdim=True)  # Δ: (B, Hkv, G, Tq, 1)
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # an empty row: P = exp(-inf - 0) = 0, so every gradient is 0
        dQ, dK, dV = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
        Tq, Tk = Q.shape[-2], K.shape[-2]
        for j in range(0, Tk, block):  # keys outside: dK_j and dV_j are finished before the next tile
            Kj, Vj = K[..., j : j + block, :], V[..., j : j + block, :]
            first = 0 if diagonal is None else max(0, j - diagonal)  # the first query that sees key j
            for i in range(first // block * block, Tq, block):
                rows = slice(i, i + block)
                P = torch.exp(_tile(Q[..., rows, :], Kj, i, j, mask, diagonal, scale) - lse[..., rows, :])
                dP = dO[..., rows, :] @ Vj.mT  # (B,Hkv,G,r,Dv) x (B,Hkv,1,Dv,c) -> (B,Hkv,G,r,c)
                dS = P * (dP - delta[..., rows, :]) * scale
                dQ[..., rows, :] += dS @ Kj
                # A key-value head serves G query heads, so its gradient is the sum over them.
                dK[..., j : j + block, :] += (dS.mT @ Q[..., rows, :]).sum(2, keepdim=True)
                dV[..., j : j + block, :] += (P.mT @ dO[..., rows, :]).sum(2, keepdim=True)
        return dQ.flatten(1, 2).to(dtype), dK.squeeze(2).to(dtype), dV.squeeze(2).to(dtype), None, None, None, None


def tiled_attention(q, k, v, *, causal=False, mask=None, scale=None, block=64):
    """FlashAttention in plain PyTorch -> out (B, H, Tq, Dv) and lse (B, H, Tq), each row's log Σ exp S (-inf if empty).

    The contract of the module without dropout (a kernel would redraw the same random numbers in the backward pass) and
    without gradients to the mask or through lse. Made to be read: Python loops over tiles. Queries are the outer loop,
    as in FlashAttention-2 (Dao 2023, 2307.08691), so a row is finished at once; the 2022 paper has the keys outside.
    """
    _check(q, k, v, mask)
    if mask is not None and mask.requires_grad:
        raise ValueError("mask requires grad: want a constant mask here, or naive_attention for a learned bias")
    diagonal = k.shape[2] - q.shape[2] if causal else None
    return _Tiled.apply(q, k, v, mask, diagonal, q.shape[-1] ** -0.5 if scale is None else scale, block)


class MultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention to `context` (Vaswani et al. 2017, §3.2.2), with grouped queries (2305.13245).

    x (B, T, C), context (B, Tk, C) -> (B, T, C). With n_kv_heads = n_heads and the same weights it equals
    torch.nn.MultiheadAttention; mind that its masks are inverted (True: hidden) and must broadcast to (B, H, T, Tk)
    here: mask = ~key_padding_mask[:, None, None, :]. dropout acts on P and in training only.
    """

    def __init__(self, d_model, n_heads, n_kv_heads=None, bias=True, dropout=0.0, attention=attention):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if d_model % n_heads or n_heads % n_kv_heads:
            raise ValueError(f"{d_model=}, {n_heads=}, {n_kv_heads=}: want each to divide the one before")
        D = d_model // n_heads
        self.heads, self.dropout, self.attention = (n_heads, n_kv_heads), dropout, attention
        self.q_proj = nn.Linear(d_model, n_heads * D, bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * D, bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * D, bias)
        self.o_proj = nn.Linear(d_model, d_model, bias)

    def forward(self, x, context=None, *, causal=False, mask=None, positions=None, cache=None):
        """positions (T,) or (B, T): rotate q and k. cache: a list, at first empty, that keeps this layer's k and v."""
        if context is not None and (positions is not None or cache is not None):
            raise ValueError("context with positions or cache: want these in self-attention only")
        (H, Hkv), context = self.heads, x if context is None else context
        q = self.q_proj(x).unflatten(-1, (H, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        k = self.k_proj(context).unflatten(-1, (Hkv, -1)).transpose(1, 2)  # (B, Hkv, Tk, D)
        v = self.v_proj(context).unflatten(-1, (Hkv, -1)).transpose(1, 2)  # (B, Hkv, Tk, D)
        if positions is not None:
            q, k = rotary(q, positions), rotary(k, positions)  # v is not rotated: positions only steer who is read
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # (B, Hkv, T_cached + T, D)
            cache[:] = [k, v]
        dropout = self.dropout if self.training else 0.0  # the functions cannot know: dropout in eval is a silent bug
        out = self.attention(q, k, v, causal=causal, mask=mask, dropout=dropout)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H, D) -> (B, T, C)


def sinusoidal_positions(length, d_model):
    """Fixed positions (length, d_model), float32 (Vaswani et al. 2017, §3.5), added to the embeddings:

    PE[t, 2i] = sin(t / 10000^(2i / d_model)), PE[t, 2i+1] = cos of the same: turns of 2π to 10000 · 2π tokens.
    """
    if d_model % 2:
        raise ValueError(f"{d_model=}: want an even number, a sine and a cosine per frequency")
    t = torch.arange(length, dtype=torch.float64)[:, None]  # at t = 100,000 float32 leaves an angle 2 digits
    angle = t / 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (length, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()  # (length, d_model / 2, 2) -> interleaved


class LearnedPositions(nn.Module):
    """Adds a learned vector per position: x (B, T, C) -> (B, T, C); start: how many tokens stand before x (a cache)."""

    def __init__(self, max_length, d_model):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(max_length, d_model))  # small beside the token embeddings

    def forward(self, x, start=0):
        end = start + x.shape[1]
        if end > len(self.weight):
            raise ValueError(f"x and start reach {end} positions: want at most max_length = {len(self.weight)}")
        return x + self.weight[start:end]


def rotary(x, positions, base=10000.0):
    """Rotary positions (Su et al. 2021, §3.2.2): x (B, H, T, D), positions (T,) or (B, T) -> (B, H, T, D) in x's dtype.

    Pair i of x, a point of the plane, is turned by the angle t · base^(-2i / D), where t is its position. With q turned
    for m and k for n, q · k depends on m - n only. Turn q and k, before k enters a cache: a key keeps its own position.

    A pair here is (x[i], x[i + D/2]), the halves of Hugging Face's Llama; the paper, Meta's own weights and Llama's in
    GGUF pair neighbours (x[2i], x[2i+1]). Both are the same model with the rows of W_q and W_k reordered within each
    head; mixing them up raises no error, the loss is merely bad.
    """
    D = x.shape[-1]
    if D % 2:
        raise ValueError(f"x has head size {D}: want an even one, to be turned in pairs")
    wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot tell position 256 from 257
    frequency = 1.0 / base ** (torch.arange(0, D, 2, dtype=wide, device=x.device) / D)  # (D/2,)
    angle = (positions.to(x.device, wide)[..., None] * frequency).unsqueeze(-3)  # (1, T, D/2) or (B, 1, T, D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(wide).chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (B, H, T, D)


if __name__ == "__main__":
    torch.manual_seed(0)
    T, D = 1000, 64
    q, k, v = torch.randn(3, 1, 4, T, D)  # (B, H, T, D)
    exact = naive_attention(q.double(), k.double(), v.double(), causal=True)
    tiled, lse = tiled_attention(q, k, v, causal=True)
    paths = {"naive": naive_attention(q, k, v, causal=True), "torch": torch_attention(q, k, v, causal=True)}
    paths |= {"tiled": tiled, "attention": attention(q, k, v, causal=True)}
    print(f"causal, {T} tokens, 4 heads of {D}: largest error against float64")
    print("  " + ", ".join(f"{name} {(out - exact).abs().max():.1e}" for name, out in paths.items()))
    print(f"  scores held at once, per head: {T * T:,} by the definition, {64 * 64:,} by tiles of 64 x 64")
    print("  the fused kernel:", "not installed" if fused is None else fused.why_not(q, k, v) or "used by attention")

    new = q[:, :, -1:]  # decoding: one query, and the keys of all tokens so far
    wrong = F.scaled_dot_product_attention(new, k, v, is_causal=True)
    print("one new token against its row in the full pass: largest difference")
    print(f"  bottom-right {(attention(new, k, v, causal=True) - exact[:, :, -1:]).abs().max():.1e}, ", end="")
    print(f"PyTorch's is_causal, top-left {(wrong - exact[:, :, -1:]).abs().max():.1e}")
    nothing = attention(q, k, v, mask=torch.zeros(T, T, dtype=torch.bool)).abs().max()
    print(f"  every key hidden: {nothing}, and softmax alone: {torch.full((2,), -math.inf).softmax(0).tolist()}")

    for heads in (8, 2, 1):
        cache = []
        MultiHeadAttention(512, 8, heads)(torch.randn(1, 10, 512), causal=True, cache=cache)
        print(f"cache of 10 tokens, C = 512, 8 query heads, {heads} key-value: {sum(c.numel() for c in cache):,}")

    print("sinusoidal positions, C = 4:", [[round(x, 5) for x in row] for row in sinusoidal_positions(3, 4).tolist()])
    a, b = torch.randn(2, 1, 1, 1, D)
    for m, n in ((5, 2), (105, 102), (5, 4)):
        score = (rotary(a, torch.tensor([m])) * rotary(b, torch.tensor([n]))).sum()
        print(f"rotary: query at {m}, key at {n}, distance {m - n}: score {score:.4f}")
