# SPDX-License-Identifier: MIT
"""A Llama that decodes in few operations: products joined, tables made once, keys and values written in place.

A new token costs one read of all weights at the memory's rate, and beside it what each operation costs before it has
computed anything: some microseconds, hundreds of times a token. minimal/llama.py spends more on the second than a
quantised model on the first. So here, of minimal/llama.py's equations,

    q, k and v are one product, and so are gate and up      W = [W_q; W_k; W_v],  [W_gate; W_up]
    q and k turn together                                   x cos + (x rolled by D/2) (-sin, sin), from a table
    k and v go to their place in one buffer                 (B, 2 Hkv, P, D), allocated once: no copy of the whole cache
    the head reads the last position alone                  logits (B, 1, V), or of the last n; so does the last block,
                                                            behind its keys and values

The numbers are minimal/llama.py's up to rounding (the test says how near). How W is held and multiplied is an argument:

    product(W) -> y(x)      x (N, C) -> x W^T (N, O), with a method rows(ids) -> W[ids] where W is the embedding too

so a weight may be float32, as by default, or codes of a few bits with a fused product (minimal/fused_linear.py), where
`block` computes all of this for a few new tokens in one operation. The weights are the decoder's own: the model can be
deleted, or never have had any (on the meta device, where `weights` gives them one at a time). It is no nn.Module, and
gives no gradients.

    decoder = Decoder(model)                             # or product=..., attention=...
    cache = []
    logits = decoder(ids, cache)                         # (B, T) -> (B, 1, V); reads on where the cache ends
    for token in stream(decoder, ids, 100): ...          # of minimal/generate.py; for speculate(): Decoder(..., last=5)

Letters: B batch, T new tokens, P context, H query heads, Hkv key-value heads, D head size, C width, V vocabulary.
"""

import math
import operator
import re
import types

import torch
import torch.nn.functional as F

FEW = 16  # new tokens, of all rows together, up to which `block` is taken where there are several of a row


# Same as minimal/llama.py: rotary_frequencies
def rotary_frequencies(config, dtype=torch.float32, device=None):
    """Radians that each pair turns per position, (D/2,): theta^(-2i/D), slowed down as config.rope_scaling says."""
    D, s, keep = config.head_dim, config.rope_scaling or {"factor": 1.0}, 0.0
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=dtype, device=device) / D)
    if "low_freq_factor" in s:
        # Llama 3.1: a pair that turns less than low_freq_factor times in the old context would meet angles never seen.
        turns = frequency * s["original_max_position_embeddings"] / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return frequency * (keep + (1 - keep) / s["factor"])


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) weight, over the last dimension: F.rms_norm passes over memory more often on a CPU."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * r).mul_(weight).to(x.dtype)


class Product:
    """x W^T for a W (O, C) that is kept as it is: the default of Decoder's `product`."""

    def __init__(self, W):
        self.W = W.detach().clone()

    def __call__(self, x):
        return F.linear(x, self.W)

    def rows(self, ids):
        return F.embedding(ids, self.W)


def torch_attention(q, k, v, causal):
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D); the T queries are the last of the S tokens."""
    mask = None
    if causal and 1 < q.size(2) < k.size(2):
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
    causal = causal and q.size(2) > 1 and mask is None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


class Decoder:
    """Called as a Llama is, (ids, cache) -> logits, but of the last positions; `config` is the model's.

    model: of minimal/llama.py, without adapters (merge them), of one dtype. product: see the module. attention: called
    with q (B, H, T, D), k, v (B, Hkv, S, D), which are views of longer buffers, and causal. head: `product` of the
    head (and of the embedding that it is tied to), which bears fewer bits worse. block: None, or what takes
    the place of `block` below for few tokens, such as fused_linear.llama_block. context: tokens at most, by default the
    model's. last: of how many positions at the end a call gives logits, if it reads so many. weights: None, or a
    function of a parameter's name that gives its tensor, in place of the model's own, such as the third that
    gguf_llama.open_llama gives: where `product` keeps codes, only one product's weights are floats at a time.
    ValueError: last below 1, a model of another kind, with hooks, or with other parameters."""

    def __init__(self, model, product=Product, attention=torch_attention, block=None, context=None, last=1,
                 weights=None, head=None):  # fmt: skip
        if last < 1:
            raise ValueError(f"last = {last!r}: wanted 1 or more positions to give logits of")
        if not all(hasattr(getattr(model, "model", None), name) for name in ("embed_tokens", "layers", "norm")):
            raise ValueError(f"model={type(model).__name__} is no Llama; wanted one of minimal/llama.py")
        if hooked := [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]:
            raise ValueError(f"layer {hooked[0]!r} has a hook, such as an adapter; wanted it merged or removed")
        known = re.compile(r"(model\.(embed_tokens|norm|layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|"
                           r"input_layernorm|post_attention_layernorm))|lm_head)\.weight")  # fmt: skip
        if other := [n for n, _ in model.named_parameters() if not known.fullmatch(n)]:
            raise ValueError(f"parameter {other[0]!r} is no Llama's, such as a prefix; wanted it merged or removed")
        self.config, self.attention, self.few, self.last = model.config, attention, block, last
        with torch.no_grad():
            get = weights or (lambda name: operator.attrgetter(name)(model))
            self.layers = [self._layer(f"model.layers.{i}.", get, product) for i in range(len(model.model.layers))]
            self.norm = get("model.norm.weight").detach().clone()
            tied = model.lm_head.weight is model.model.embed_tokens.weight
            self.head = (head or product)(get("model.embed_tokens.weight" if tied else "lm_head.weight"))
            shared = tied and hasattr(self.head, "rows")
            self.embed = self.head if shared else Product(get("model.embed_tokens.weight"))
            self.context = context or self.config.max_position_embeddings
            at = torch.arange(self.context, dtype=torch.float32, device=self.norm.device)
            angle = at[:, None] * rotary_frequencies(self.config, device=self.norm.device)  # (P, D/2)
            self.cos = torch.cat((angle.cos(), angle.cos()), 1).to(self.norm.dtype)  # (P, D)
            self.sin = torch.cat((-angle.sin(), angle.sin()), 1).to(self.norm.dtype)  # (P, D)

    @staticmethod
    def _layer(at, get, product):
        def joined(*names):
            parts = [get(f"{at}{name}_proj.weight") for name in names]
            return product(torch.cat(parts) if len(parts) > 1 else parts[0])

        return types.SimpleNamespace(
            norms=[get(f"{at}{name}_layernorm.weight").detach().clone() for name in ("input", "post_attention")],
            qkv=joined("self_attn.q", "self_attn.k", "self_attn.v"),
            o=joined("self_attn.o"),
            gate_up=joined("mlp.gate", "mlp.up"),
            down=joined("mlp.down"),
        )

    @torch.inference_mode()
    def __call__(self, ids, cache=None):
        """ids int64 (B, T) -> logits (B, n, V) for the tokens after the last n = min(last, T). cache: None, or a list,
        empty at first, which is given back at each call: it then holds the buffers, and how much of them is filled
        (`cache[0].length`, which may be set lower, to forget what was read after it).

        ValueError: other shapes, more tokens than the context, another number of rows than before."""
        if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: wanted token ids of shape (batch, tokens)")
        c, (B, T), state = self.config, ids.shape, cache[0] if cache else types.SimpleNamespace(length=0, kv=[])
        start, end = state.length, state.length + T
        if end > self.context:
            raise ValueError(f"ids: {start} cached + {T} new tokens do not fit the context, {self.context}")
        if state.kv and state.kv[0].size(0) != B:
            raise ValueError(f"ids have {B} rows: wanted the cache's {state.kv[0].size(0)}")
        self._reserve(state, B, end)
        x = self.embed.rows(ids.flatten())  # (B T, C)
        for layer, kv in zip(self.layers, state.kv, strict=True):
            if self.few is not None and (T == 1 or B * T <= FEW):
                x = self.few(x, layer, kv, self.cos[start:end], self.sin[start:end], start, c.rms_norm_eps)
            else:
                x = self.block(x, layer, kv, start, end, self.last if layer is self.layers[-1] else T)
        state.length = end
        if cache is not None:
            cache[:] = [state]
        x = x.view(B, -1, x.size(1))[:, -self.last :].flatten(0, 1)  # (B n, C)
        return self.head(rms_norm(x, self.norm, c.rms_norm_eps)).unflatten(0, (B, -1))  # (B, n, V)

    def block(self, x, layer, kv, start, end, last):
        """x (B T, C) of places start to end -> the last ones after the layer; kv (B, 2 Hkv, P, D) is written there."""
        H, Hkv, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        (B, T, C), eps, half = (len(kv), end - start, x.size(1)), self.config.rms_norm_eps, D // 2
        n = min(last, T)
        qkv = layer.qkv(rms_norm(x, layer.norms[0], eps)).view(B, T, H + 2 * Hkv, D)
        qk, v = qkv.split((H + Hkv, Hkv), dim=2)  # (B, T, H + Hkv, D), (B, T, Hkv, D)
        turned, sin = qk * self.cos[start:end, None], self.sin[start:end, None]
        turned[..., :half].addcmul_(qk[..., half:], sin[..., :half])
        turned[..., half:].addcmul_(qk[..., :half], sin[..., half:])
        kv[:, :Hkv, start:end] = turned[:, :, H:].transpose(1, 2)
        kv[:, Hkv:, start:end] = v.transpose(1, 2)
        seen = kv[:, :, :end]
        y = self.attention(turned[:, -n:, :H].transpose(1, 2), seen[:, :Hkv], seen[:, Hkv:], causal=True)
        x = layer.o(y.transpose(1, 2).reshape(B * n, H * D)).add_(x.view(B, T, C)[:, -n:].flatten(0, 1))
        gate, up = layer.gate_up(rms_norm(x, layer.norms[1], eps)).chunk(2, -1)
        return layer.down(F.silu(gate, inplace=True).mul_(up)).add_(x)

    def _reserve(self, state, B, length):
        """Buffers (B, 2 Hkv, at least `length`, D); grown by doubling, so that copying costs a constant per token."""
        have = state.kv[0].size(2) if state.kv else 0
        if length <= have:
            return
        size = min(max(length, 2 * have, 256), self.context)
        shape = B, 2 * self.config.num_key_value_heads, size, self.config.head_dim
        for i in range(len(self.layers)):
            new = torch.zeros(shape, dtype=self.norm.dtype, device=self.norm.device)
            if have:
                new[:, :, :have] = state.kv[i]
                state.kv[i] = new
            else:
                state.kv.append(new)


if __name__ == "__main__":
    import time

    class Block(torch.nn.Module):  # the parts of minimal/llama.py that are read here, with random weights
        def __init__(self, C, Hkv, F):
            super().__init__()
            linear = lambda i, o: torch.nn.Linear(i, o, bias=False)  # noqa: E731
            self.input_layernorm, self.post_attention_layernorm = torch.nn.RMSNorm(C), torch.nn.RMSNorm(C)
            self.self_attn, self.mlp = torch.nn.Module(), torch.nn.Module()
            self.self_attn.q_proj, self.self_attn.o_proj = linear(C, C), linear(C, C)
            self.self_attn.k_proj, self.self_attn.v_proj = linear(C, Hkv * 32), linear(C, Hkv * 32)
            self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj = linear(C, F), linear(C, F), linear(F, C)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, hidden_size=128, rms_norm_eps=1e-5,
        max_position_embeddings=4096, rope_theta=10000.0, rope_scaling=None,
    )  # fmt: skip
    model.model, model.lm_head = torch.nn.Module(), torch.nn.Linear(128, 500, bias=False)
    model.model.embed_tokens, model.model.norm = torch.nn.Embedding(500, 128), torch.nn.RMSNorm(128)
    model.model.layers = torch.nn.ModuleList(Block(128, 2, 384) for _ in range(8))
    decoder, ids = Decoder(model), torch.randint(500, (1, 3000))
    cache, whole = [], decoder(ids[:, :60])
    pieces = [decoder(piece, cache) for piece in ids[:, :60].split((31, 1, 1, 20, 7), dim=1)]
    print(f"60 tokens at once and in pieces: logits off by {(pieces[-1] - whole).abs().max():.0e}")
    for have in (100, 1000, 3000):
        cache = []
        decoder(ids[:, :have], cache)
        start = time.perf_counter()
        for _ in range(100):
            decoder(ids[:, :1], cache)
        took, state = (time.perf_counter() - start) / 100, cache[0]
        held = sum(t.nbytes for t in state.kv) / 1e6
        print(f"after {have:4d} tokens: {1e3 * took:.2f} ms a token, {held:4.1f} MB for {state.length} tokens")
