# SPDX-License-Identifier: MIT
"""Activation recomputation: forget what a block computed inside, and compute it again in the backward pass.

Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. A chain of n blocks
y = f_n(... f_1(x)) keeps the inside of every f_i from the forward pass to the backward pass. Recomputing keeps only the
inputs x_i of the blocks, and, from the last block to the first,

    y_i = f_i(x_i) once more, now with its inside      dx_i, dtheta_i = (dy_i / dx_i)^T g_i, (dy_i / dtheta_i)^T g_i

so that the insides of two blocks never stand side by side: memory O(n x + inside) instead of O(n inside), for one more
forward pass, about a third more time. The numbers are the same: the second pass draws the same dropout, as the state of
the random generators is put back for it.

    add_recompute(model)                      # each block of the model; remove_recompute(model)
    y = recompute(block, x, mask=mask)        # one call of one module

    with Meter(model) as meter:               # what autograd keeps, now and at most
        loss = model(x)
        loss.backward()
    print(table(model, optimizer, meter))     # weights, gradients, optimiser, activations

Departures and traps:
- The trainable parameters are inputs of the autograd.Function beside the arguments. Without that, a block whose input
  needs no gradient gets none for its parameters either, in silence: the first block over a frozen embedding, that is
  the first LoRA block of a frozen model.
- Gradients reach parameters and tensors among the arguments. Tensors inside of lists or dicts are passed on as they
  are; if one of them needs a gradient, ValueError. What a function closes over gets none: pass it. A module shared by
  blocks, such as the MLP of minimal/prefix.py, counts where a part of the block holds it in a tuple.
- The generators put back are those of the CPU and of CUDA.
- A block that is given a list (a cache, to which it would append twice) runs as ever, and so does one where nothing
  needs a gradient. The backward pass is differentiable once.
- Meter counts each storage once, without the tensors of the modules it was given. It sees what autograd saves, not
  the workspace of an operator, nor gradients on their way.
"""

import contextlib
import functools
import types

import torch
from torch import nn


class _Recompute(torch.autograd.Function):
    """call(*inputs), keeping the inputs alone. n: how many of the tensors are inputs; the others are parameters."""

    @staticmethod
    def forward(ctx, call, n, *tensors):
        ctx.call, ctx.n = call, n
        ctx.devices = {t.device for t in tensors if t.is_cuda}
        ctx.random = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in ctx.devices]
        kind = "cuda" if ctx.devices else "cpu"
        ctx.autocast = dict(
            device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        ctx.save_for_backward(*tensors)
        return call(*tensors[:n])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        wanted = ctx.needs_input_grad[2:]
        tensors = ctx.saved_tensors  # raises where one was changed in place meanwhile, an optimiser step for example
        inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors[: ctx.n], wanted, strict=False)]
        with torch.random.fork_rng(ctx.devices), torch.enable_grad(), torch.autocast(**ctx.autocast):
            torch.set_rng_state(ctx.random[0])
            for device, state in zip(ctx.devices, ctx.random[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            outputs = ctx.call(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        given = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        leaves = [t for t, w in zip((*inputs, *tensors[ctx.n :]), wanted, strict=True) if w]
        outputs, gradients = zip(*given, strict=True) if given else ((), ())
        found = iter(
            torch.autograd.grad(outputs, leaves, gradients, allow_unused=True) if given else [None] * len(leaves)
        )
        return None, None, *(next(found) if w else None for w in wanted)


def recompute(module, *args, **kwargs):
    """module(*args, **kwargs), whose inside is not kept but computed again in the backward pass.

    module: an nn.Module, or a function without parameters. It gives a tensor or a tuple of tensors. Gradients are those
    of the plain call, dropout and autocast included. ValueError: a tensor inside of a list or dict needs a gradient.
    Source: Chen et al. 2016 (1604.06174), section 4.
    """
    return _call(module, _trained(module) if isinstance(module, nn.Module) else [], args, kwargs)


def _trained(module):
    """The parameters that train, of the module and of modules that its parts hold in a tuple, as not their own."""
    held = [t for m in module.modules() for value in vars(m).values() if isinstance(value, tuple) for t in value]
    owners = [module, *(m for m in held if isinstance(m, nn.Module))]
    return [p for p in dict.fromkeys(p for m in owners for p in m.parameters()) if p.requires_grad]


def _call(function, parameters, args, kwargs):
    values = [*args, *kwargs.values()]
    places = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    for name, value in zip([*range(len(args)), *kwargs], values, strict=True):
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        if any(isinstance(t, torch.Tensor) and t.requires_grad for t in inside):
            raise ValueError(
                f"argument {name} holds a tensor that needs a gradient; wanted it as an argument of its own"
            )

    def call(*tensors):
        full = values.copy()
        for i, t in zip(places, tensors, strict=True):
            full[i] = t
        return function(*full[: len(args)], **dict(zip(kwargs, full[len(args) :], strict=True)))

    tensors = [values[i] for i in places]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*tensors, *parameters)):
        return function(*args, **kwargs)
    for i in places:
        values[i] = None  # the Function keeps them, and can let go of them
    return _Recompute.apply(call, len(tensors), *tensors, *parameters)


def _forward(self, *args, **kwargs):
    plain = functools.partial(type(self).forward, self)
    if any(isinstance(value, list) for value in (*args, *kwargs.values())):
        return plain(*args, **kwargs)
    return _call(plain, _trained(self), args, kwargs)


def _blocks(model):  # the items of the outermost lists of modules
    outer, blocks = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{n}." for n in outer)):
            outer.append(name)
            blocks += module
    return blocks


def add_recompute(model):
    """From now on each block of the model, an item of its outermost nn.ModuleLists, is recomputed. Returns the model.

    Names, weights and results stay. ValueError: the model has no blocks, or is recomputed already."""
    blocks = _blocks(model)
    if not blocks or any("forward" in vars(block) for block in blocks):
        has = "has blocks with a forward of their own" if blocks else "has no nn.ModuleList"
        raise ValueError(f"model={type(model).__name__} {has}; wanted one with blocks that are not yet recomputed")
    for block in blocks:
        block.forward = types.MethodType(_forward, block)
    return model


def remove_recompute(model):
    """Undoes add_recompute. ValueError: there is nothing to undo."""
    blocks = [block for block in _blocks(model) if getattr(vars(block).get("forward"), "__func__", None) is _forward]
    if not blocks:
        raise ValueError(f"model={type(model).__name__} is not recomputed; wanted one that add_recompute was given")
    for block in blocks:
        del block.forward
    return model


class _Held:
    """A saved tensor: while one of these stands for a storage, the storage is held."""

    def __init__(self, meter, tensor):
        self.meter, self.tensor = meter, tensor.detach()  # itself, an output would hold its own graph for good
        self.key = tensor.untyped_storage().data_ptr()
        meter._held[self.key] = meter._held.get(self.key, 0) + 1
        if meter._held[self.key] == 1:
            meter.now += tensor.untyped_storage().nbytes()
            meter.peak = max(meter.peak, meter.now)

    def __del__(self):
        self.meter._held[self.key] -= 1
        if not self.meter._held[self.key]:
            del self.meter._held[self.key]
            self.meter.now -= self.tensor.untyped_storage().nbytes()


class Meter(contextlib.AbstractContextManager):
    """Counts the bytes that autograd keeps for the backward pass: `now`, and `peak`, the most at once."""

    def __init__(self, *modules):
        """modules: whose parameters and buffers are not counted, as they are there anyway."""
        self.now, self.peak, self._held = 0, 0, {}
        self._known = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor):
        known = tensor.device.type == "meta" or tensor.untyped_storage().data_ptr() in self._known
        return tensor.detach() if known else _Held(self, tensor)

    def _unpack(self, held):
        return held.tensor if isinstance(held, _Held) else held

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


def memory(model, optimizer=None):
    """-> {"weights", "gradients", "optimiser"}: bytes that these hold, each storage once. Buffers count as weights."""

    def size(tensors):
        return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

    state = [] if optimizer is None else [v for s in optimizer.state.values() for v in s.values()]
    return {
        "weights": size([*model.parameters(), *model.buffers()]),
        "gradients": size([p.grad for p in model.parameters() if p.grad is not None]),
        "optimiser": size([t for t in state if isinstance(t, torch.Tensor)]),
    }


def table(model, optimizer=None, meter=None):
    """Where the memory of a training step goes, in MB, one line each."""
    rows = memory(model, optimizer) | ({} if meter is None else {"activations": meter.peak})
    return "\n".join(f"{name:12} {size / 1e6:9.1f} MB" for name, size in rows.items())


if __name__ == "__main__":
    import time

    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            return x + nn.functional.dropout(self.down(nn.functional.gelu(self.up(x))), 0.1)

    class Chain(nn.Module):
        def __init__(self, width, n):
            super().__init__()
            self.blocks = nn.ModuleList(Block(width) for _ in range(n))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

    model, x, gradients = Chain(128, 12), torch.randn(2048, 128), []
    for how in ("kept", "recomputed"):
        torch.manual_seed(1)  # the same dropout
        started = time.perf_counter()
        with Meter(model) as meter:
            model(x).backward()
        gradients.append([p.grad for p in model.parameters()])
        print(f"{how}: {1e3 * (time.perf_counter() - started):.0f} ms\n{table(model, None, meter)}")
        model.zero_grad(set_to_none=True)
        if how == "kept":
            add_recompute(model)
    print("the same gradients:", all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)))
