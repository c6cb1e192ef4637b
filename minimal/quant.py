# SPDX-License-Identifier: MIT
"""Quantisation: the weights of a frozen model in 8 or 4 bits, to run it in less memory or to train adapters over it.

Papers: QLoRA, Dettmers et al. 2023, arXiv 2305.14314 (NF4, double quantisation); integers with one scale per output or
group are the older, common scheme (Krishnamoorthi 2018, arXiv 1806.08342, sec. 2 and 3), and so is rounding activations
as they come (sec. 3.1.2; Jacob et al. 2018, arXiv 1712.05877). A weight W (O, C) becomes codes q and constants:

    int8  W ~ s_o q,         q in -127..127,  s_o = max_c |W_oc| / 127, or what `grid` finds      8 bits + 32 / C
    int4  W ~ m_g + s_g q,   q in 0..15, of a group of 32 columns: m_g the least, m_g + 15 s_g    5 bits
                             the largest of it, or what `grid` finds; both in float16
    NF4   W ~ a_b L[q],      q the nearest level to W / a_b,   a_b = max |W| in a block of 64     4.127 bits
          a_b ~ mean + t_g p_b,  p_b in -127..127,  t_g = max_b |a_b - mean| / 127 of 256 blocks

q is the nearest to W, given the constants as they will be read back. int4 is the layout of GGUF's Q4_1: what came from
such a file is kept without loss. A symmetric int4 (m = -8 s) is a worse grid, and saves nothing. L are 16 levels, at
equal steps of probability under a normal distribution (QLoRA, sec. 3), for weights are close to normal: nf4_levels()
derives them. A layer computes x W^T + b with the W that its codes stand for, made anew in the forward pass and again in
the backward pass: only codes are kept between. `dynamic` rounds x too, to 8 bits: one scale for 32 columns of a row.

Departures: the a_b are rounded to 8-bit integers (the authors round them to 8-bit floats). A last block that is not
full is filled with zeros.

A layer stays the same object, with its hooks and adapters, and becomes a QuantisedLinear, still an nn.Linear: `weight`
can be read (made anew at each reading) but is no parameter; its bias is as before. A cast of the model changes the
dtype of `weight`, not codes and constants. What reads `weight` and not the layer works, at the cost of a whole W.

    quantise(model)  # then add_lora(model) and train the adapters: QLoRA; dequantise(model) makes plain layers again
    quantise(model, bits=4, head="int8")  # to decode: of a tied head the codes serve as the embedding too
    safetensors.torch.save_model(model, "model.safetensors")  # state_dict holds the codes
    quantise(again := Model(config)); safetensors.torch.load_model(again, "model.safetensors")

Shapes, rounded up: C inputs of a layer, O outputs, G = C / 32 groups, n = O C / 64 blocks, m = n / 256 groups of those.
"""

import collections
import copy
import re
import statistics

import torch
import torch.nn.functional as F
from torch import nn


def nf4_levels():
    """The 16 levels of NormalFloat4, float32, ascending from -1 to 1: QLoRA, sec. 3 and appendix E.

    Quantiles of N(0, 1) at equal steps of probability: 7 from the left end up to 0, 8 from there to the right end. So 0
    is a level itself, for padding and pruned weights. The ends lie half a step inside 0 and 1, whose quantiles are
    infinite: a step of 16 levels (1/32) and one of 15 (1/30), averaged so that both ends are alike."""
    quantile, end = statistics.NormalDist().inv_cdf, 1 - (1 / 32 + 1 / 30) / 2
    right = [quantile(0.5 + (end - 0.5) * i / 8) for i in range(1, 9)]
    left = [-quantile(0.5 + (end - 0.5) * i / 7) for i in range(7, 0, -1)]
    return torch.tensor([q / right[-1] for q in (*left, 0.0, *right)])  # (16,)


LEVELS = nf4_levels()
_TINY = torch.finfo(torch.float32).tiny  # for x / max|x| where all are 0


def minmax(x, levels):
    """x (N, n) -> scale and least, (N,) each, of the grid least + scale * code, code 0..levels-1, that just spans x.

    The default `grid`: another function of these arguments and results may take its place (percentile, least error)."""
    least, most = x.aminmax(dim=1)
    return (most - least) / (levels - 1), least


def encode_int8(W, grid=minmax):
    """W (O, C) float32 -> codes int8 (O, C), scale float32 (O,)."""
    scale = grid(torch.cat((W, -W), 1), 255)[0]  # (O,); of W and -W, so that zero is in the middle of the grid
    return {"codes": (W / scale.clamp_min(_TINY)[:, None]).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def decode_int8(shape, codes, scale):
    """The inverse: float32 (O, C), off by at most scale / 2."""
    return codes * scale[:, None]


def pack_int4(q):
    """q (O, G, 32) in 0..15 -> uint8 (O, G, 16): byte j has column j in its low half, column j + 16 in its high one."""
    q = q.to(torch.uint8)
    return q[..., :16] | q[..., 16:] << 4


def encode_int4(W, grid=minmax):
    """W (O, C) float32 -> codes uint8 (O, G, 16), scale and least float16 (O, G).

    Where C is no multiple of 32, the last column is repeated: a product has to pad x with zeros, or cut W off."""
    groups = F.pad(W, (0, -W.shape[1] % 32), mode="replicate").unflatten(1, (-1, 32))  # (O, G, 32)
    scale, least = (t.view(groups.shape[:2]).half() for t in grid(groups.flatten(0, 1), 16))  # (O, G) each
    q = (groups - least.float()[..., None]) / scale.float().clamp_min(_TINY)[..., None]
    return {"codes": pack_int4(q.round().clamp(0, 15)), "scale": scale, "least": least}


def decode_int4(shape, codes, scale, least):
    """The inverse: float32 of the shape (O, C)."""
    q = torch.cat((codes & 15, codes >> 4), 2)  # (O, G, 32)
    return (q * scale.float()[..., None] + least.float()[..., None]).flatten(1)[:, : shape[1]]


def encode_nf4(W):
    """W (O, C) float32 -> codes uint8 (32 n,), two to a byte, absmax int8 (n,), scale (m,) and mean (1,) float32."""
    blocks = F.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64)  # (n, 64)
    absmax = blocks.abs().amax(1)  # (n,)
    mean = absmax.mean(0, True)  # they are all positive: without their mean, the 8 bits are for what differs
    groups = F.pad(absmax - mean, (0, -len(absmax) % 256)).view(-1, 256)  # (m, 256)
    scale = groups.abs().amax(1) / 127  # (m,)
    rounded = (groups / scale.clamp_min(_TINY)[:, None]).round().to(torch.int8).flatten()[: len(absmax)]  # (n,)
    x = blocks / _absmax(rounded, scale, mean).clamp_min(_TINY)[:, None]  # (n, 64), in -1..1 but for rounding
    levels = LEVELS.to(W.device)
    codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)  # (32 n, 2)
    return {"codes": codes[:, 0] << 4 | codes[:, 1], "absmax": rounded, "scale": scale, "mean": mean}


def decode_nf4(shape, codes, absmax, scale, mean):
    """The inverse: float32 of the shape (O, C)."""
    levels = LEVELS.to(codes.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): what a byte stands for, so that one look-up reads two
    W = pairs.index_select(0, codes.int()).view(-1, 64) * _absmax(absmax, scale, mean)[:, None]  # (n, 64)
    return W.flatten()[: shape[0] * shape[1]].view(shape)


def _absmax(rounded, scale, mean):  # (n,); rounding must not make a tiny one negative, which would flip its block
    return (rounded * scale.repeat_interleave(256)[: len(rounded)] + mean).clamp_min(0)


KINDS = {"int8": (encode_int8, decode_int8), "int4": (encode_int4, decode_int4), "nf4": (encode_nf4, decode_nf4)}


def round_activations(x):
    """x (..., C) in 8 bits, a scale max |x| / 127 for each 32 columns: one for a row costs SmolLM2 six times more."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))  # (..., G, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127  # (..., G, 1)
    return ((groups / scale.clamp_min(_TINY)).round() * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def torch_linear(x, kind, shape, dtype, bias, dynamic, **held):
    """x (..., C) -> x W^T + bias, (..., O), for the W of `shape` (O, C) that `held` stands for, rounded to `dtype`.

    held: the codes and constants of that kind, as its encode function gives them. The default `linear`: a fused product
    of these arguments may take its place. It needs no gradient of its own, and gets none. If it has an attribute
    `unpack`, called with kind, shape and held, then that gives W wherever it is wanted."""
    x = round_activations(x) if dynamic else x
    return F.linear(x, KINDS[kind][1](shape, **held).to(dtype), bias)  # (..., C) x (O, C) -> (..., O)


def _decode(linear, kind, shape, held):
    return linear.unpack(kind, shape, **held) if hasattr(linear, "unpack") else KINDS[kind][1](shape, **held)


class QuantisedLinear(nn.Linear):
    """What quantise makes of an nn.Linear (O, C): `kind`, `dynamic`, the function `linear` that computes its product,
    and buffers for the codes and constants (`held` names them).

    Constants are floats but held as the integers of the same bits: a cast of the model would round float buffers."""

    @property
    def weight(self):
        """The weight that the codes stand for: (O, C), in the dtype of the model, without gradient; a new tensor."""
        shape = self.out_features, self.in_features
        return _decode(self.linear, self.kind, shape, self.encoded()).to(self.like.dtype)

    def encoded(self):
        """{name: tensor} of codes and constants, as its encode function gave them: views, no copies."""
        floats = {torch.int32: torch.float32, torch.int16: torch.float16}  # of these bits
        return {name: (t := self._buffers[name]).view(floats.get(t.dtype, t.dtype)) for name in self.held}

    def forward(self, x):
        """x (..., C) -> (..., O), by the dequantised weight; the gradient to x and the bias is exact for that.

        With dynamic the gradient is that of the product alone, straight through the rounding of x."""
        how = self.kind, (self.out_features, self.in_features), self.like.dtype
        if torch.is_grad_enabled():
            return _Product.apply(x, self.bias, self.linear, how, self.dynamic, self.held, *self.encoded().values())
        return self.linear(x, *how, self.bias, self.dynamic, **self.encoded())

    def extra_repr(self):
        return f"{super().extra_repr()}, kind={self.kind}{', dynamic' * self.dynamic}"


class QuantisedEmbedding(nn.Embedding):
    """What quantise makes of an nn.Embedding whose weight a linear layer shares: it reads rows of that layer's codes.

    It holds no tensor itself, and the layer only in a tuple (`of`): so it is in a file, and is moved, once."""

    @property
    def weight(self):
        """As of QuantisedLinear: the whole of it, a new tensor."""
        return self.of[0].weight

    def forward(self, ids):
        """ids (...) -> (..., C), only these rows dequantised, without gradient."""
        (layer,) = self.of
        rows = {name: t[ids.flatten()] for name, t in layer.encoded().items()}
        W = KINDS[layer.kind][1]((ids.numel(), self.embedding_dim), **rows)
        return W.to(layer.like.dtype).view(*ids.shape, self.embedding_dim)


class _Product(torch.autograd.Function):
    """layer.linear, but between the passes autograd keeps the codes, which the layer has anyway, and not W."""

    @staticmethod
    def forward(ctx, x, bias, linear, how, dynamic, names, *held):
        ctx.save_for_backward(*held)
        ctx.linear, ctx.how, ctx.names = linear, how, names
        return linear(x, *how, bias, dynamic, **dict(zip(names, held, strict=True)))

    @staticmethod
    def backward(ctx, grad):  # (..., O)
        to_x, (kind, shape, dtype) = None, ctx.how
        if ctx.needs_input_grad[0]:
            W = _decode(ctx.linear, kind, shape, dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
            to_x = grad @ W.to(dtype).to(grad.dtype)  # (..., O) x (O, C) -> (..., C)
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None  # (O,)
        return to_x, to_bias, *[None] * (4 + len(ctx.saved_tensors))


def chosen(model, kind="nf4", skip=(), head=None):
    """-> {name: kind} of the layers that quantise takes; all nn.Linear by name; who owns a parameter, by its id."""
    linears = {_plain(n): m for n, m in model.named_modules() if type(m) is nn.Linear and "weight" in m._parameters}
    heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
    owners = collections.defaultdict(list)
    for owner, p in ((m, p) for m in model.modules() for p in m._parameters.values()):
        owners[id(p)].append(owner)
    called = {"lm_head", "head", "classifier", "score", "qa_outputs", "seq_relationship"}
    skipped, body, tops = set(), {}, {}  # names; {name: kind}
    for entry in [skip] if isinstance(skip, str) else skip:
        if not (hits := {n for n in linears if f".{n}".endswith(f".{entry}")}):
            raise ValueError(f"skip={entry!r} matches no linear layer; wanted some of: {_one_of(linears)}")
        skipped |= hits
    for n, m in ((n, m) for n, m in linears.items() if n not in skipped):
        others = [other for other in owners[id(m.weight)] if other is not m]
        if not (id(m) in heads or others or called & {*n.split(".")}):
            body[n] = kind
        elif head and all(type(other) is nn.Embedding and other.max_norm is None for other in others):
            tops[n] = head
    if not (body or tops) or head and not tops:
        what = f"model={type(model).__name__} has no {'head' if body else 'nn.Linear'} to quantise"
        raise ValueError(f"{what}; wanted one that is not left out")
    return body | tops, linears, owners


@torch.no_grad()
def quantise(model, kind=None, bits=None, *, skip=(), head=None, dynamic=False, linear=torch_linear, grid=minmax,
             codes=None):  # fmt: skip
    """Replaces the weight of each nn.Linear by codes, in place; returns the names of these layers.

    kind: "nf4" (the default), "int8" or "int4"; or bits: 8 or 4, for the latter two. Left out are embeddings, a weight
    that is shared (tied), what get_output_embeddings() gives, all that is called lm_head, head, classifier, score,
    qa_outputs or seq_relationship, subclasses of nn.Linear (and transformers' Conv1D), and what `skip` names: names of
    layers or their ends ("c_proj", "mlp.c_proj"). head: "int8" or "int4" for the heads among these, too, and for
    embeddings that one is tied to (they stay tied). dynamic: activations in 8 bits. linear: computes the products, see
    torch_linear; it is in no state_dict. grid: the range of int8 and int4, see minmax. codes: {name: what an encode
    function gives} of layers encoded already. ValueError, and nothing has changed: an unknown kind, no layer to
    quantise, a skip that matches nothing, weights not finite (or too large for float16), merged adapters, bad codes."""
    if bits not in (None, 4, 8) or None not in (kind, bits):
        raise ValueError(f"bits={bits!r} beside kind={kind!r}; wanted one of the two, and bits 4 or 8")
    kind, codes = kind or ("nf4" if bits is None else f"int{bits}"), dict(codes or {})
    for name, value, known in (("kind", kind, KINDS), ("head", head or "int8", ("int8", "int4"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; wanted one of: {', '.join(known)}")
    if kind == "nf4" and (dynamic or grid is not minmax or codes):
        raise ValueError("kind='nf4' beside dynamic, grid or codes; wanted kind int8 or int4 for these")
    kinds, linears, owners = chosen(model, kind, skip, head)
    if unknown := codes.keys() - kinds.keys():
        raise ValueError(f"codes={min(unknown)!r} is no layer to quantise; wanted some of: {_one_of(kinds)}")
    for name, of in kinds.items():
        if hasattr(linears[name], "lora_aside"):
            raise ValueError(f"layer {name!r} holds a merged adapter; wanted unmerge_lora or remove_lora first")
        W, encode = linears[name].weight.float(), KINDS[of][0]
        if not W.isfinite().all():
            raise ValueError(f"layer {name!r} has weights that are not finite; wanted numbers")
        if name in codes:
            have, want = ({n: (t.dtype, *t.shape) for n, t in held.items()} for held in (codes[name], encode(W)))
            if have != want:
                raise ValueError(f"codes of layer {name!r} are {have}; wanted, for {of}, {want}")
        else:
            codes[name] = encode(W) if of == "nf4" else encode(W, grid)
        if not all(t.isfinite().all() for t in codes[name].values()):
            raise ValueError(f"layer {name!r} has weights too large for the float16 of {of}; wanted them below 65504")
    for name, of in kinds.items():
        layer, held = linears[name], codes[name]
        like = layer.weight.new_empty(0)  # its dtype is the model's, and follows a cast of the model
        for m in owners[id(layer.weight)]:
            del m.weight
            if m is not layer:
                m.__class__, m.of = QuantisedEmbedding, (layer,)
        layer.__class__, layer.kind, layer.held = QuantisedLinear, of, tuple(held)
        layer.linear, layer.dynamic = linear, dynamic
        layer.register_buffer("like", like, persistent=False)
        for key, t in held.items():  # copied: the part of a padded tensor would keep all of it alive
            layer.register_buffer(key, t.clone().view({4: torch.int32, 2: torch.int16}.get(t.element_size(), t.dtype)))
    return list(kinds)


def dequantise(model):
    """Makes plain nn.Linear layers of the quantised ones, in place; returns their names. ValueError: there are none.

    Their weights are what the codes stand for (not what was quantised), in the dtype of the model, without gradient;
    tied ones are tied again. Adapters stay, and can then be merged."""
    layers = {_plain(n): m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no quantised layers; wanted one that quantise was given")
    for layer in layers.values():
        weight = layer.weight
        for name in (*layer.held, "like", "kind", "held", "linear", "dynamic"):
            delattr(layer, name)
        layer.__class__ = nn.Linear
        layer.weight = nn.Parameter(weight, requires_grad=False)
    for m in [m for m in model.modules() if isinstance(m, QuantisedEmbedding)]:
        m.__class__, (layer,) = nn.Embedding, m.__dict__.pop("of")
        m.weight = layer.weight
    return list(layers)


def memory(model):
    """Bytes of all parameters and buffers, shared ones once; times 8 and over the count of weights: bits a weight."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


# Same as minimal/lora.py: _plain
def _plain(name):
    return f"{name}.".replace("_orig_mod.", "")[:-1]  # which torch.compile puts between


# Same as minimal/lora.py: _one_of
def _one_of(names):
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))  # h.0.fc, h.1.fc -> h.*.fc


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).requires_grad_(False)
    plain[0].weight.data.normal_(0, 0.02), plain[2].weight.data.normal_(0, 0.02)
    weights, x = 2 * 512 * 1024, torch.randn(64, 512)
    print(f"float32  {memory(plain):9,} bytes")
    for kind in KINDS:
        model = copy.deepcopy(plain)
        quantise(model, kind)
        bits = sum(t.numel() * t.element_size() for t in model.buffers()) * 8 / weights
        off = (model[0].weight - plain[0].weight).norm() / plain[0].weight.norm()
        y = ((model(x) - plain(x)).norm() / plain(x).norm()).item()
        print(f"{kind:7}  {memory(model):9,} bytes, {bits:.3f} bits a weight: W is off by {off:.2%}, y by {y:.2%}")
    W4, kept = model[0].weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        (y := model[0](x.requires_grad_())).sum().backward()
        exact = torch.equal(x.grad, torch.ones_like(y) @ W4)
    print(f"kept for the backward pass: {sum(kept):,} bytes, W would be {W4.nbytes:,}; gradient exact: {exact}")
