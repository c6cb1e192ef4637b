# SPDX-License-Identifier: MIT
"""Quantisation-aware training: a model learns with the weights that it will have once they are rounded to a few bits.

Papers: Jacob et al. 2018, arXiv 1712.05877, sec. 3 (simulated quantisation); Bengio, Leonard & Courville 2013, arXiv
1308.3432 (the straight-through estimator); for learnt ranges LSQ, Esser et al. 2020, arXiv 1902.08153, and its offset,
LSQ+, Bhalgat et al. 2020, arXiv 2004.09576. Each layer multiplies by W^ in place of its weight W,

    W^ = least + scale q,   q = clamp(round(v), 0, levels - 1),   v = (W - least) / scale

with a scale and least for each group of 32 columns (2 to 4 bits: 2^bits levels), or a scale for each output (8 bits:
255 levels about 0). round has the derivative 0 almost everywhere: nothing would learn. The straight-through estimator
takes it to be 1, and W, which stays in full precision, moves until some q changes. With it autograd gives

    dL/dW_i    =  dL/dW^_i           where v_i lies within the range, 0 where it was cut off
    dL/dscale  =  sum_i dL/dW^_i (q_i - v_i)    within, and   sum_i dL/dW^_i q_i   cut off          (LSQ eq. 3)
    dL/dleast  =  0                             within, and   sum_i dL/dW^_i       cut off          (LSQ+)

Ranges are found anew from W in each forward pass (min-max), or with learn=True they train: scale = s_0 exp(a) and least
= l_0 + s_0 b, from what is found at the start. At 4 bits rounding afterwards is nearly as good; at 3 and 2 bits, where
that destroys a model, this does not.

Departures: a and b in place of LSQ's own parameters, whose gradients need a factor to suit the learning rate of W: a
step of Adam changes a range by the same share of it, whatever its size. Activations are not rounded, for 8 bits of them
cost too little to train for. Constants of 2 to 4 bits are rounded to float16, as they will be stored.

    prepare(model, bits=4)                                # then train as ever, a few hundred steps at a low rate
    codes = convert(model)                                # the weights are W^ now
    quantise(model, bits=4, codes=codes)                  # of quant.py: loses nothing more

Shapes: C inputs of a layer, O outputs, G groups in a row of W, n columns in a group (32, of 8 bits C).
"""

import collections

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

_TINY = torch.finfo(torch.float32).tiny  # for x / scale where all of a group are equal


# Same as minimal/quant.py: minmax
def minmax(x, levels):
    """x (N, n) -> scale and least, (N,) each, of the grid least + scale * code, code 0..levels-1, that just spans x."""
    least, most = x.aminmax(dim=1)
    return (most - least) / (levels - 1), least


# Same as minimal/quant.py: pack_int4
def pack_int4(q):
    """q (O, G, 32) in 0..15 -> uint8 (O, G, 16): byte j has column j in its low half, column j + 16 in its high one."""
    q = q.to(torch.uint8)
    return q[..., :16] | q[..., 16:] << 4


class _Through(torch.autograd.Function):
    """apply(x, value) is value, with the gradient as though it were x."""

    @staticmethod
    def forward(ctx, x, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight_through(function, x):
    """function(x), with the gradient of x itself."""
    return _Through.apply(x, function(x.detach()))


class Rounded(nn.Module):
    """The parametrisation of a weight: W (O, C) -> W^ (O, C), in the dtype of W."""

    def __init__(self, W, bits, learn, grid):
        super().__init__()
        self.bits, self.grid, self.levels = bits, grid, 2**bits if bits < 8 else 255
        if learn:
            scale, least = self.found(self.groups(W.detach()))
            self.register_buffer("scale", scale)
            self.register_buffer("least", least)
            self.a = nn.Parameter(torch.zeros_like(scale))
            self.b = nn.Parameter(torch.zeros_like(least)) if bits < 8 else None

    def groups(self, W):
        """W (O, C) -> float32 (O, G, n), the last column repeated where C is no multiple of n."""
        n = 32 if self.bits < 8 else W.shape[1]
        return F.pad(W.float(), (0, -W.shape[1] % n), mode="replicate").unflatten(1, (-1, n))

    def found(self, groups):
        """scale and least, (O, G) each, of the weights as they are."""
        x = groups.flatten(0, 1)  # (O G, n)
        scale, least = self.grid(x if self.bits < 8 else torch.cat((x, -x), 1), self.levels)
        return scale.view(groups.shape[:2]), least.view(groups.shape[:2])

    def range(self, groups):
        """scale and least, (O, G, 1) each, as they will be stored; with a gradient if they are learnt."""
        if hasattr(self, "a"):
            scale = self.scale * self.a.exp()
            least = self.least + self.scale * self.b if self.bits < 8 else None
        else:
            scale, least = self.found(groups.detach())
        if self.bits == 8:
            return scale[..., None], -127 * scale[..., None]
        scale, least = (straight_through(lambda t: t.half().float(), t) for t in (scale, least))
        return scale[..., None], least[..., None]

    def codes(self, groups, scale, least):
        """q (O, G, n), whole floats of 0..levels-1, with the straight-through gradient."""
        return straight_through(torch.round, (groups - least) / scale.clamp_min(_TINY)).clamp(0, self.levels - 1)

    def forward(self, W):
        groups = self.groups(W)
        scale, least = self.range(groups)
        q = self.codes(groups, scale, least)  # (O, G, n)
        rounded = q * scale + least if self.bits < 8 else (q - 127) * scale
        return rounded.flatten(1)[:, : W.shape[1]].to(W.dtype)

    @torch.no_grad()
    def encoded(self, W):
        """What encode_int4 of quant.py (encode_int8 for 8 bits) gives for W^: codes of 2 and 3 bits take 4, too."""
        groups = self.groups(W)
        scale, least = self.range(groups)
        q = self.codes(groups, scale, least)
        if self.bits == 8:
            return {"codes": (q[:, 0] - 127).to(torch.int8), "scale": scale[:, 0, 0].clone()}
        return {"codes": pack_int4(q), "scale": scale[..., 0].half(), "least": least[..., 0].half()}


def prepare(model, bits=4, learn=False, skip=(), grid=minmax):
    """Lets the linear layers multiply by rounded weights, in place; returns their names. Train the model after this.

    bits: 2, 3, 4 or 8. learn: the ranges train, too: they are new parameters, so make the optimiser afterwards. grid:
    finds the range (and where a learnt one starts), a function like minmax. Left out are a weight that is shared
    (tied), what get_output_embeddings() gives, all that is called lm_head, head, classifier, score, qa_outputs or
    seq_relationship, and what `skip` names: names of layers or their ends. ValueError, and nothing has changed: other
    bits, a model that is prepared already, a skip that matches nothing, no layer left."""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits={bits!r} is out of range; wanted 2, 3, 4 or 8")
    if _prepared(model):
        raise ValueError(f"model={type(model).__name__} is prepared already; wanted convert(model) first")
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values())
    called = {"lm_head", "head", "classifier", "score", "qa_outputs", "seq_relationship"}
    layers = {n: m for n, m in linears.items()
              if id(m) not in heads and owners[id(m.weight)] == 1 and not called & {*n.split(".")}}  # fmt: skip
    for entry in [skip] if isinstance(skip, str) else skip:
        if not (hits := {n for n in linears if f".{n}".endswith(f".{entry}")}):
            raise ValueError(f"skip={entry!r} matches no linear layer; wanted some of: {', '.join(linears):.200}")
        layers = {n: m for n, m in layers.items() if n not in hits}
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no nn.Linear to prepare; wanted one that is not left out")
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", Rounded(layer.weight, bits, learn, grid))
    return list(layers)


def convert(model):
    """Makes plain layers of the prepared ones, whose weights are the rounded ones; returns {name: codes}.

    With these, quantise(model, bits=8 or 4, codes=...) of quant.py changes nothing more (of 2 and 3 bits: bits=4). The
    weights are new parameters, without a gradient so far. ValueError: a model that is not prepared."""
    layers = _prepared(model)
    if not layers:
        raise ValueError(f"model={type(model).__name__} is not prepared; wanted one that prepare was given")
    codes = {}
    for name, layer in layers.items():
        weight = layer.parametrizations["weight"]
        codes[name] = weight[0].encoded(weight.original)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return codes


def _prepared(model):
    found = {n: m for n, m in model.named_modules() if parametrize.is_parametrized(m, "weight")}
    return {n: m for n, m in found.items() if isinstance(m.parametrizations["weight"][0], Rounded)}


if __name__ == "__main__":
    import copy

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(4096, 8)
    y = torch.sin(2 * x[:, :1] + x[:, 1:2] * x[:, 2:3]) + 0.5 * x[:, 3:4].abs()  # what is to be learnt

    def train(model, steps, lr):
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
            at = torch.randint(0, 3072, (256,))
            optimiser.zero_grad()
            F.mse_loss(model(x[at]), y[at]).backward()
            optimiser.step()
        return model

    @torch.no_grad()
    def loss(model):
        return F.mse_loss(model(x[3072:]), y[3072:]).item()

    layers = nn.Linear(8, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1)
    plain = train(nn.Sequential(*layers), 800, 3e-3)
    longer = train(copy.deepcopy(plain), 300, 1e-3)
    print(f"mean squared error on new inputs: {loss(plain):.4f} in float32, {loss(longer):.4f} 300 steps later")
    for bits in (4, 3, 2):
        after, shown = longer, []
        prepare(after, bits)
        shown.append(loss(after))
        for learn in (False, True):
            model = copy.deepcopy(plain)
            prepare(model, bits, learn)
            codes = convert(train(model, 300, 1e-3))
            shown.append(loss(model))
        for layer in after.modules():  # undone, for the next round
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        print(f"{bits} bits: {shown[0]:.4f} rounded then; {shown[1]:.4f} if these 300 steps know of the rounding, "
              f"{shown[2]:.4f} with learnt ranges, too")  # fmt: skip
    print(f"codes of {', '.join(codes)}: {sum(t.nbytes for held in codes.values() for t in held.values()):,} bytes")
