# SPDX-License-Identifier: MIT
"""GPTQ: weights rounded to 4 or 8 bits such that a layer's outputs on a calibration text change least.

Paper: Frantar, Ashkboos, Hoefler & Alistarh 2022, arXiv 2210.17323, over the exact but slower OBQ (Frantar & Alistarh
2022, arXiv 2208.11580). A layer W (O, C) meets inputs X (N, C) of the text. Sought is the W^ on a grid with the least

    || X W^T - X W^^T ||^2 = tr((W - W^) H (W - W^)^T)      H = X^T X  (C, C), the Hessian up to a factor of 2   (eq. 1)

Columns are rounded one after the other, and what a column loses the columns still to come make up for (eq. 2): with F
these columns and H_F their part of H, of an error e = w_j - w^_j in any row

    w_F <- w_F - e / [H_F^-1]_jj  [H_F^-1]_j,F              = w_F - e / U_jj  U_j,F    U^T U = H^-1, U upper triangular

One factorisation gives the rows of all these inverses (sec. 3.3, step 3; algorithm 1). All rows of W are rounded at a
time, and updates of columns beyond a block of 128 wait until the block is done. H gets 1 % of its mean diagonal added
to the diagonal. A group's range is found when its first column is reached, from the weights as they then are. With
act_order the columns come in the order of falling H_jj (the authors' code): those that matter most are rounded while
many others can still make up for it; the ranges are then those of the weights at the start.

Layers see inputs from layers that are rounded already (sec. 4). That takes one forward pass over all of the text: a
hook rounds each layer before it computes. So a text is as long as memory allows: N = 8,192 is enough for 135 M weights.

    codes = gptq(model, lambda: model.hidden(ids), "int4")  # ids (B, T), all of the text; the head is not called
    quantise(model, "int4", codes=codes)                    # of quant.py, whose layouts these codes have

Letters: N rows of inputs, C inputs of a layer, O outputs, n columns in a group (32; int8: C), G groups.
"""

import collections

import torch
from torch import nn

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


def inverse_factor(H, damp=0.01):
    """H (C, C), symmetric -> U (C, C) float64, upper triangular, with U^T U = (H + damp mean(diag H) I)^-1."""
    H = H.double()
    H = H + (damp * H.diagonal().mean()).clamp_min(_TINY) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def round_layer(W, H, kind="int4", act_order=False, grid=minmax, damp=0.01, block=128):
    """W (O, C), H (C, C) -> (W^ (O, C) float32, codes and constants as quant.py's encode functions lay them out).

    kind: "int4" or "int8". grid: finds a group's range, as minmax does. block: columns between two updates of all that
    follow, a multiple of 32; it changes the time and not the result. ValueError: an unknown kind, other shapes."""
    (O, C), levels = W.shape, {"int4": 16, "int8": 255}.get(kind)
    if levels is None:
        raise ValueError(f"kind={kind!r} is unknown; wanted int4 or int8")
    if H.shape != (C, C) or block % 32:
        raise ValueError(f"H {tuple(H.shape)}, block={block} beside W {(O, C)}; wanted {(C, C)}, a multiple of 32")
    n = 32 if kind == "int4" else C
    G = -(-C // n)
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(C, device=W.device)
    U = inverse_factor(H[order][:, order], damp).float()
    rows = W.float().t()[order].contiguous()  # (C, O): a column of W is a row here, and is overwritten when it is due
    scale, least, q = rows.new_zeros(G, O), rows.new_zeros(G, O), rows.new_zeros(G * n, O)

    def find_range(g, part):  # part (O, n)
        if kind == "int4":  # the grid is that of the constants as float16 holds them
            scale[g], least[g] = (t.half() for t in grid(part, levels))
        else:
            scale[g] = grid(torch.cat((part, -part), 1), levels)[0]  # symmetric
            least[g] = -127 * scale[g]

    if act_order:
        for g in range(G):
            find_range(g, W[:, g * n : (g + 1) * n].float())
    for i in range(0, C, block):
        end, errors = min(i + block, C), []
        for j in range(i, end):
            g, w = int(order[j]) // n, rows[j]  # (O,)
            if not act_order and j % n == 0:
                find_range(g, rows[j : j + n].t() if kind == "int4" else W.float())
            q[order[j]] = code = ((w - least[g]) / scale[g].clamp_min(_TINY)).round().clamp(0, levels - 1)
            errors.append((w - (code * scale[g] + least[g])) / U[j, j])
            rows[j + 1 : end].addr_(U[j, j + 1 : end], errors[-1], alpha=-1)  # (n, O) - (n,) x (O,)
        rows[end:].addmm_(U[i:end, end:].t(), torch.stack(errors), alpha=-1)  # (C', b) x (b, O) -> (C', O)
    q = q.t().reshape(O, G, n)  # (O, G, n)
    scale, least = scale.t().contiguous(), least.t().contiguous()  # (O, G)
    if kind == "int8":
        codes = (q[:, 0] - 127).to(torch.int8)  # (O, C)
        return codes * scale, {"codes": codes, "scale": scale[:, 0].clone()}
    rounded = (q * scale[..., None] + least[..., None]).flatten(1)[:, :C]
    return rounded, {"codes": pack_int4(q), "scale": scale.half(), "least": least.half()}


@torch.no_grad()
def gptq(model, run, kind="int4", names=None, act_order=False, grid=minmax, damp=0.01):
    """Rounds each layer in the order in which run() calls them; returns {name: codes and constants}.

    The weights of the model become those that the codes stand for, in place. run: a function without arguments that
    passes all of the text through the model, once. names: of the layers; by default each nn.Linear that is called and
    whose weight is its own. kind, act_order, grid, damp: see round_layer; for a layer that is called again, its first
    call counts. ValueError: an unknown name, a named layer that is not called, inputs that are not finite."""
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and "weight" in m._parameters}
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values())
    if names is None:
        wanted = {n: m for n, m in layers.items() if owners[id(m.weight)] == 1}
    else:
        wanted = {n: layers[n] for n in names if n in layers}
    if not wanted or len(wanted) < len(names or ()):
        raise ValueError(f"names={names} in {type(model).__name__}; wanted names of its linear layers, such as "
                         f"{next(iter(layers), None)!r}")  # fmt: skip
    found, last = {}, (None, None, None)  # last: the inputs that came last, their version, H: q, k and v have the same

    def hook_of(name):
        def hook(layer, args):
            nonlocal last
            if name in found:
                return
            x = args[0]
            version = object() if x.is_inference() else x._version  # grows when x is changed in place
            if x is not last[0] or version != last[1]:
                X = x.reshape(-1, layer.in_features).float()  # (N, C)
                last = x, version, X.t() @ X
            if not last[2].isfinite().all():
                raise ValueError(f"layer {name!r} is given inputs that are not finite; wanted numbers")
            rounded, found[name] = round_layer(layer.weight, last[2], kind, act_order, grid, damp)
            layer.weight.copy_(rounded)

        return hook

    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in wanted.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [n for n in names or () if n not in found]:
        raise ValueError(f"layer {missing[0]!r} was not called by run(); wanted a run that calls it")
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    N, C, O = 4096, 256, 256
    mix = torch.randn(C, C) * torch.logspace(0, -2, C)[:, None]  # inputs that vary along few directions, as real ones
    X, W = torch.randn(N, C) @ mix, torch.randn(O, C)
    H = X.t() @ X
    print("error of the outputs of one layer, relative, and of its weights:")
    for kind in ("int8", "int4"):
        for how, options in (("nearest", None), ("GPTQ", {}), ("GPTQ, act_order", {"act_order": True})):
            if options is None:  # without correlations between inputs there is nothing to make up for
                rounded = round_layer(W, torch.eye(C), kind)[0]
            else:
                rounded = round_layer(W, H, kind, **options)[0]
            off = ((X @ (W - rounded).t()).norm() / (X @ W.t()).norm(), (W - rounded).norm() / W.norm())
            print(f"  {kind} {how:16} {off[0]:.3%}  {off[1]:.2%}")
    model = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, O))
    with torch.no_grad():
        before = model(X)
        codes = gptq(model, lambda: model(X[:2048]))
        print(f"layers {', '.join(codes)}: the model's output on inputs that it was not rounded for is off by "
              f"{(model(X[2048:]) - before[2048:]).norm() / before[2048:].norm():.2%}")  # fmt: skip
