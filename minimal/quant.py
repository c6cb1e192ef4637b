# SPDX-License-Identifier: MIT
"""Quantisation: the weights of a frozen model in 8 or 4 bits, to run it in less memory or to train adapters over it.

Papers: QLoRA, Dettmers et al. 2023, arXiv 2305.14314 (NF4, double quantisation); int8 with one scale per output is the
older, common scheme (Krishnamoorthi 2018, arXiv 1806.08342, sec. 3.1). A weight W (O, C) becomes codes and constants:

    int8  W ~ s_o q,       q = round(W / s_o) in -127..127,  s_o = max_c |W_oc| / 127             8 bits + 32 / C
    NF4   W ~ a_b L[q],    q the nearest level to W / a_b,   a_b = max |W| in a block of 64      4 bits + 8/64 + ...
          a_b ~ mean + t_g p_b,  p_b in -127..127,  t_g = max_b |a_b - mean| / 127 of 256 blocks  ... + 32/(64 256)

L are 16 levels, at equal steps of probability under a normal distribution (QLoRA, sec. 3), for weights are close to
normal: nf4_levels() derives them. In all NF4 takes 4.127 bits a weight, float32 32. A layer computes x W^T + b with the
W that its codes stand for, made anew in the forward pass and again in the backward pass: only codes are kept between.

Departures: the a_b are rounded to 8-bit integers (the authors round them to 8-bit floats); q is chosen after that, so
that it is the nearest level to what will be read back. The last block of 64 is filled up with zeros.

A layer stays the same object, with its hooks and adapters, and becomes a QuantisedLinear, still an nn.Linear: `weight`
can be read (made anew at each reading) but is no parameter; its bias is as before. A cast of the model changes the
dtype of `weight`, not codes and constants. What reads `weight` and not the layer works, at the cost of a whole W.

    quantise(model)  # then add_lora(model) and train the adapters: QLoRA; dequantise(model) makes plain layers again
    safetensors.torch.save_model(model, "model.safetensors")  # state_dict holds the codes
    quantise(again := Model(config)); safetensors.torch.load_model(again, "model.safetensors")

Shapes: C inputs of a layer, O outputs; n = O C / 64 blocks, m = n / 256 groups of blocks, each rounded up.
"""

import collections
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


def encode_int8(W):
    """W (O, C) float32 -> codes int8 (O, C), scale float32 (O,)."""
    scale = W.abs().amax(1) / 127  # (O,)
    return {"codes": (W / scale.clamp_min(_TINY)[:, None]).round().to(torch.int8), "scale": scale}


def decode_int8(shape, codes, scale):
    """The inverse: float32 (O, C), off by at most scale / 2."""
    return codes * scale[:, None]


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


KINDS = {"int8": (encode_int8, decode_int8), "nf4": (encode_nf4, decode_nf4)}


class QuantisedLinear(nn.Linear):
    """What quantise makes of an nn.Linear (O, C): `kind`, buffers for the codes and constants (`held` names them).

    Constants are float32 but held as the int32 of the same bits: a cast of the model would round float buffers."""

    @property
    def weight(self):
        """The weight that the codes stand for: (O, C), in the dtype of the model, without gradient; a new tensor."""
        return _decode(self.kind, (self.out_features, self.in_features), self.like.dtype, *self._held())

    def _held(self):
        return [self._buffers[name] for name in self.held]

    def forward(self, x):
        """x (..., C) -> (..., O), by the dequantised weight; the gradient to x and the bias is exact for that."""
        shape = self.out_features, self.in_features
        return _Product.apply(x, self.bias, self.kind, shape, self.like.dtype, *self._held())

    def extra_repr(self):
        return f"{super().extra_repr()}, kind={self.kind}"


def _decode(kind, shape, dtype, *held):
    held = [t.view(torch.float32) if t.dtype == torch.int32 else t for t in held]
    return KINDS[kind][1](shape, *held).to(dtype)


class _Product(torch.autograd.Function):
    """F.linear, but between the passes autograd keeps the codes, which the layer has anyway, and not W."""

    @staticmethod
    def forward(ctx, x, bias, kind, shape, dtype, *held):
        ctx.save_for_backward(*held)
        ctx.how = kind, shape, dtype
        return F.linear(x, _decode(kind, shape, dtype, *held), bias)  # (..., C) x (O, C) -> (..., O)

    @staticmethod
    def backward(ctx, grad):  # (..., O)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ _decode(*ctx.how, *ctx.saved_tensors).to(grad.dtype)  # (..., O) x (O, C) -> (..., C)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)  # (O,)
        return to_x, to_bias, None, None, None, *[None] * len(ctx.saved_tensors)


@torch.no_grad()
def quantise(model, kind="nf4", skip=()):
    """Replaces the weight of each nn.Linear by codes, in place; returns the names of these layers.

    kind: "nf4" or "int8". Left out are embeddings, a weight that is shared (tied), what get_output_embeddings() gives,
    all that is called lm_head, head, classifier, score, qa_outputs or seq_relationship, subclasses of nn.Linear (and
    transformers' Conv1D), and what `skip` names: names of layers or their ends ("c_proj", "mlp.c_proj"). ValueError,
    and nothing has changed: an unknown kind, no layer to quantise, a skip that matches nothing, weights that are not
    finite, merged adapters."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; wanted one of: {', '.join(KINDS)}")
    linear = {_plain(n): m for n, m in model.named_modules() if type(m) is nn.Linear and "weight" in m._parameters}
    heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values())
    called = {"lm_head", "head", "classifier", "score", "qa_outputs", "seq_relationship"}
    layers = {n: m for n, m in linear.items()
              if id(m) not in heads and owners[id(m.weight)] == 1 and not called & {*n.split(".")}}  # fmt: skip
    for entry in [skip] if isinstance(skip, str) else skip:
        hits = {n for n in linear if f".{n}".endswith(f".{entry}")}
        if not hits:
            raise ValueError(f"skip={entry!r} matches no linear layer; wanted some of: {_one_of(linear)}")
        layers = {n: m for n, m in layers.items() if n not in hits}
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no nn.Linear to quantise; wanted one beside its head")
    codes = {}
    for name, layer in layers.items():
        if hasattr(layer, "lora_aside"):
            raise ValueError(f"layer {name!r} holds a merged adapter; wanted unmerge_lora or remove_lora first")
        if not layer.weight.isfinite().all():
            raise ValueError(f"layer {name!r} has weights that are not finite; wanted numbers")
        codes[name] = KINDS[kind][0](layer.weight.float())
    for name, layer in layers.items():
        like = layer.weight.new_empty(0)  # its dtype is the model's, and follows a cast of the model
        del layer.weight
        layer.__class__, layer.kind, layer.held = QuantisedLinear, kind, list(codes[name])
        layer.register_buffer("like", like, persistent=False)
        for key, tensor in codes[name].items():
            tensor = tensor.clone()  # the part of a padded tensor would keep all of it alive
            layer.register_buffer(key, tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor)
    return list(layers)


def dequantise(model):
    """Makes plain nn.Linear layers of the quantised ones, in place; returns their names. ValueError: there are none.

    Their weights are what the codes stand for (not what was quantised), in the dtype of the model, without gradient.
    Adapters stay, and can then be merged."""
    layers = {_plain(n): m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no quantised layers; wanted one that quantise was given")
    for layer in layers.values():
        weight = layer.weight
        for name in (*layer.held, "like", "kind", "held"):
            delattr(layer, name)
        layer.__class__ = nn.Linear
        layer.weight = nn.Parameter(weight, requires_grad=False)
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
    import copy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("levels:", " ".join(f"{x:.3f}" for x in LEVELS.tolist()))
    plain = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).requires_grad_(False)
    for layer in (plain[0], plain[2]):
        nn.init.normal_(layer.weight, std=0.02)
    weights, x = 2 * 512 * 1024, torch.randn(64, 512)
    print(f"float32  {memory(plain):9,} bytes")
    for kind in KINDS:
        model = copy.deepcopy(plain)
        quantise(model, kind)
        bits = sum(t.numel() * t.element_size() for t in model.buffers()) * 8 / weights
        off = (model[0].weight - plain[0].weight).norm() / plain[0].weight.norm()
        y = ((model(x) - plain(x)).norm() / plain(x).norm()).item()
        print(f"{kind:7}  {memory(model):9,} bytes, {bits:.3f} bits a weight: W is off by {off:.2%}, y by {y:.2%}")
    W, W4 = plain[0].weight, model[0].weight
    blocks = W.view(-1, 64)
    even = ((blocks / (s := blocks.abs().amax(1, True) / 7)).round() * s - blocks).norm() / W.norm()
    print(f"4 bits at even steps, in blocks of 64: W would be off by {even:.2%}")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        (y := model[0](x.requires_grad_())).sum().backward()
        exact = torch.equal(x.grad, torch.ones_like(y) @ W4)
        F.linear(x, W4.clone()).sum()
    print(f"kept for the backward pass: {sum(kept[:-1]):,} bytes, W would be {kept[-1]:,}; gradient exact: {exact}")
