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
C = d_model channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
    # A row of -inf has softmax 0/0 = NaN. Zeroing P afterwards mends only the forward: the backward of softmax would
    # still multiply that NaN by the zero gradient. So such a row gets finite scores first, and is zeroed after.
    empty = (S == -math.inf).all(-1, keepdim=True)  # (B, H, Tq, 1); True when Tk = 0
    P = S.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)  # over keys: every row sums to 1, or to 0
    return (F.dropout(P, dropout) @ V).to(q.dtype)  # (B,H,Tq,Tk) x (B,H,Tk,Dv) -> (B,H,Tq,Dv)


def torch_attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """Attention by PyTorch's kernels: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) -> (B,H,Tq,Dv); Hkv divides H.

    mask is boolean (True: may attend) or additive, and broadcasts to (B, H, Tq, Tk); causal is aligned bottom-right and
    adds to it; a row with nothing to attend to gives zeros; dropout is always active: pass 0.0 in evaluation.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    causal = causal and Tq > 1  # a lone query is the last token: it sees every key
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
