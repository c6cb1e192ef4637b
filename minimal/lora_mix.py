# SPDX-License-Identifier: MIT
"""Several trained LoRA adapters over one frozen model: switch between them, disable them, add them up with weights.

Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; weighted sums of adapters: LoraHub, Huang et al. 2023, arXiv 2307.13269.
An adapter i changes a linear layer y = W x + b by s_i B_i A_i, s = alpha / r (rsLoRA, arXiv 2312.03732: alpha /
sqrt(r)). With weights w_i the sum of several is one LoRA of their ranks put together:

    y = W x + b + sum_i w_i s_i B_i (A_i x) = W x + b + [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...] x

so that any number costs two products, and can be written as one adapter, exactly. DoRA (Liu et al. 2024, 2402.09353)
y = g (W x + s B A x) + b, with g = m / ||W + s B A||, is not linear in its adapter: it is held and used, by itself.

Departures: LoraHub also averages the A and the B of adapters of equal rank, which multiplies A_i into B_j of another;
here, as in PEFT's "cat", nothing is mixed but the changes of W. It searches for the weights without gradients: any
search can call `used` (the demo tries seven). Adapters here do not train: a weight to be learnt is not differentiated.

A layer gets a submodule `lora_mix` that is called as its forward hook. Tensors in it are buffers outside of state_dict:
parameters, requires_grad, state_dict and saving are those of the bare model. They are at least float32; cast the model
before, not after. Layers are nn.Linear, also as quantised by quant.py, and Conv1D of transformers. Not for a model
that add_lora has adapted: merge_lora or remove_lora it first.

    hold(model, {"en": "out/en", "zh": "out/zh"})  # folders that save_lora or PEFT wrote
    use(model, "en");  use(model, {"en": 0.7, "zh": 0.3});  use(model, None)  # the bare model, bit for bit
    write_sum(model, {"en": 0.7, "zh": 0.3}, "out/both")  # one adapter, for load_lora, PEFT and hold

Shapes: C inputs of a layer, O outputs, r rank, R the sum of ranks.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import sys

import torch
import torch.nn.functional as F
from torch import nn


class Mix(nn.Module):
    """The held adapters of one layer, its submodule `lora_mix`: buffers A/name (r, C), B/name (O, r) with s in it, and
    for DoRA m/name (O,); and of those in use, A (R, C), B (O, R) with the weights in it, and g (O,), or None."""

    def __init__(self):
        super().__init__()
        for name in ("A", "B", "g"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, layer, args, out):
        """The hook: from the layer's arguments, x (..., C), and its output (..., O) to the adapted output."""
        if self.A is None:
            return out
        delta = F.linear(F.linear(args[0].to(self.A.dtype), self.A), self.B)  # (..., C) -> (..., R) -> (..., O)
        if self.g is not None:
            Wx = out.to(self.g.dtype) if layer.bias is None else out.to(self.g.dtype) - layer.bias.to(self.g.dtype)
            delta = (self.g - 1) * Wx + self.g * delta
        return (out + delta).to(out.dtype)  # added in the wider of the two dtypes, rounded once


# Same as minimal/lora.py: _is_conv1d
def _is_conv1d(layer):  # the linear layer of GPT-2 in transformers: its weight is (C, O)
    return type(layer).__name__ == "Conv1D" and tuple(layer.weight.shape[1:]) == (getattr(layer, "nf", None),)


# Same as minimal/lora.py: _weight
def _weight(layer):
    return layer.weight.T if _is_conv1d(layer) else layer.weight  # (O, C)


# Same as minimal/lora.py: _plain
def _plain(name):
    return f"{name}.".replace("_orig_mod.", "")[:-1]  # which torch.compile puts between


# Same as minimal/lora.py: _one_of
def _one_of(names):
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))  # h.0.fc, h.1.fc -> h.*.fc


# Same as minimal/lora.py: _layers
def _layers(model):  # every layer that can be adapted, by name: with a weight of its own, or the codes of quant.py
    uncalled = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = {_plain(n): m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    return {n: m for n, m in found.items() if m not in uncalled and {"weight", "codes"} & {*m._parameters, *m._buffers}}


def _mixes(model):
    return {n: m.lora_mix for n, m in _layers(model).items() if hasattr(m, "lora_mix")}


def _reset():
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # torch.compile has no guard on hooks: a graph made before would run on without them


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
# PEFT's options: those that are followed or change no result here; values that mean what we do. Others must be off
_FOLLOWED = set("r lora_alpha lora_dropout use_rslora use_dora target_modules revision exclude_modules "
                "layers_to_transform layers_pattern fan_in_fan_out inference_mode peft_version "
                "base_model_name_or_path auto_mapping task_type megatron_core qalora_group_size".split())  # fmt: skip
_ACCEPTED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


def _read(layers, folder):
    """What hold keeps of a folder: {layer: {"A": (r, C), "B": (O, r) with s in it, and for DoRA "m": (O,)}}."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapters are read and written with safetensors: pip install safetensors") from None
    folder = pathlib.Path(folder)
    if not (folder / _WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder / 'adapter_model.bin'} is a pickle and is never opened; wanted {_WEIGHTS}")
    try:
        config = json.loads((file := folder / _CONFIG).read_bytes())
        tensors = safetensors.torch.load((file := folder / _WEIGHTS).read_bytes())
        options, r, alpha = config.items(), config.get("r"), config.get("lora_alpha")
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(f"{file} cannot be read: {e}") from None
    for key, value in options:
        if value and key not in _FOLLOWED and value not in _ACCEPTED.get(key, ()):
            raise ValueError(f"{folder / _CONFIG}: option {key}={value!r} is not supported; wanted it off")
    if not (isinstance(r, int) and r > 0 and isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise ValueError(f"{folder / _CONFIG}: r={r!r}, lora_alpha={alpha!r}; wanted numbers above 0, r a whole one")
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in sorted(tensors.items())}
    found = dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors)
    if not found:
        raise ValueError(f"{file} has no tensors; wanted those of an adapter")
    for name in found:
        are = {key: tuple(t.shape) for key, t in tensors.items() if key.rpartition(".lora_")[0] == name}
        if name not in layers:
            raise ValueError(f"{file}: no linear layer for {are}; wanted some of: {_one_of(layers)}")
        W = _weight(layers[name])  # (O, C)
        want = {"A": (r, W.shape[1]), "B": (W.shape[0], r)} | ({"m": (W.shape[0],)} if config.get("use_dora") else {})
        if are != {f"{name}.{_KEYS[k]}": shape for k, shape in want.items()}:
            raise ValueError(f"{file}: the tensors of {name} are {are}; wanted {want}")
        wide, mine = torch.promote_types(W.dtype, torch.float32), {k: tensors[f"{name}.{_KEYS[k]}"] for k in want}
        if not all(t.isfinite().all() for t in mine.values()):
            raise ValueError(f"{file}: the tensors of {name} are not finite; wanted numbers")
        found[name] = {k: t.to(W.device, wide) * (scale if k == "B" else 1) for k, t in mine.items()}
    return found


def hold(model, adapters):
    """Reads adapters, {name: folder}, and holds them beside those that are held already; what is in use stays.

    The folders are PEFT's (save_lora writes them): LoRA, rsLoRA or DoRA of linear layers, and nothing else: no head
    saved whole. Names are not empty and have no dot. ValueError, and the model is as it was: a name that is taken, a
    model with adapters of add_lora, a file that is missing, damaged or a pickle, an option not supported, tensors that
    do not fit the model (those of another base: their shapes are named)."""
    layers, names = _layers(model), held(model)
    if any(hasattr(m, "lora") or hasattr(m, "lora_aside") for m in layers.values()):
        raise ValueError(f"model={type(model).__name__} has adapters of add_lora; wanted remove_lora first")
    for name in adapters:
        if not isinstance(name, str) or not name or "." in name or name in names:
            raise ValueError(f"adapter {name!r} is no name or is taken; wanted one without dots beside {names}")
    read = {name: _read(layers, folder) for name, folder in adapters.items()}
    for name, tensors in read.items():
        for layer, found in tensors.items():
            if not hasattr(layers[layer], "lora_mix"):
                layers[layer].lora_mix = Mix()
                layers[layer].lora_mix.handle = layers[layer].register_forward_hook(layers[layer].lora_mix)
            for key, tensor in found.items():
                layers[layer].lora_mix.register_buffer(f"{key}/{name}", tensor, persistent=False)
    model.lora_held, model.lora_used = names + list(read), getattr(model, "lora_used", None)
    _reset()


def held(model):
    """Names of the adapters that are held, in the order of coming: a list, empty for a bare model."""
    return list(getattr(model, "lora_held", ()))


def _sum(model, what):
    """{layer: (A (R, C), B (O, R) with weights in it, name of a DoRA or None)} of a sum, {name: weight}."""
    names = held(model)
    for name, w in what.items():
        if name not in names:
            raise ValueError(f"adapter {name!r} is not held; wanted some of: {', '.join(names) or '(none is held)'}")
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w):
            raise ValueError(f"adapter {name!r} has the weight {w!r}; wanted a finite number")
    if not what:
        raise ValueError("no adapter is named; wanted a name, {name: weight, ...} or None")
    parts = {}
    for layer, mix in _mixes(model).items():
        mine = [name for name in what if hasattr(mix, f"A/{name}")]
        dora = next((name for name in mine if hasattr(mix, f"m/{name}")), None)
        if dora and list(what.items()) != [(dora, 1)]:
            raise ValueError(f"adapter {dora!r} is a DoRA, which is used alone at weight 1; wanted it out of {what}")
        if mine:
            A = torch.cat([mix.get_buffer(f"A/{name}") for name in mine])  # (R, C)
            B = torch.cat([what[name] * mix.get_buffer(f"B/{name}") for name in mine], 1)  # (O, R)
            parts[layer] = A, B, dora
    return parts


@torch.no_grad()
def use(model, what):
    """Puts adapters to use: a name, a weighted sum {name: weight, ...}, or None for the bare model, bit for bit.

    Weights are finite numbers, of any sign; one alone scales its adapter. ValueError, and what is in use stays: a name
    that is not held (all that are, are named), a DoRA in a sum or at another weight than 1."""
    parts = {} if what is None else _sum(model, {what: 1.0} if isinstance(what, str) else what)
    layers = _layers(model)
    for layer, mix in _mixes(model).items():
        mix.A, mix.B, dora = parts.get(layer, (None, None, None))
        mix.g = None
        if dora:
            with torch.autocast(mix.A.device.type, enabled=False):  # which would round B A to half precision
                V = _weight(layers[layer]).to(mix.A.dtype) + mix.B @ mix.A  # (O,r) x (r,C) -> (O,C)
            mix.g = mix.get_buffer(f"m/{dora}") / V.norm(dim=1).clamp_min(torch.finfo(V.dtype).tiny)  # (O,)
    if held(model):
        model.lora_used = what if what is None or isinstance(what, str) else dict(what)


@contextlib.contextmanager
def used(model, what):
    """`with used(model, "en"): ...`: what use takes, for a while; after it, also after an error, what was before."""
    before = getattr(model, "lora_used", None)
    use(model, what)
    try:
        yield model
    finally:
        use(model, before)


def drop(model, name):
    """Forgets an adapter; with the last one the model is as before hold. ValueError: it is not held, or is in use."""
    if name not in held(model):
        raise ValueError(f"adapter {name!r} is not held; wanted some of: {', '.join(held(model)) or '(none is held)'}")
    if name == model.lora_used or isinstance(model.lora_used, dict) and name in model.lora_used:
        raise ValueError(f"adapter {name!r} is in use; wanted use(model, None) or another first")
    model.lora_held = [other for other in model.lora_held if other != name]
    for layer, mix in _mixes(model).items():
        for key in _KEYS:
            mix._buffers.pop(f"{key}/{name}", None)
        if not any("/" in key for key in mix._buffers):
            mix.handle.remove()
            del _layers(model)[layer].lora_mix
    if not model.lora_held:
        del model.lora_held, model.lora_used
    _reset()


def write_sum(model, what, folder):
    """Writes a weighted sum {name: weight, ...} of held adapters as one adapter in PEFT's format; returns its rank R.

    It changes W exactly as `use(model, what)` does. Where a layer has not all of the adapters, its A and B are filled
    up with zeros, for one rank everywhere (load_lora takes no rank above the width of a layer; PEFT and hold do). Each
    file is written whole or not at all. ValueError: as use, and for a DoRA."""
    import safetensors.torch
    parts, tensors, folder = _sum(model, {what: 1.0} if isinstance(what, str) else what), {}, pathlib.Path(folder)
    if dora := next((dora for _, _, dora in parts.values() if dora), None):
        raise ValueError(f"adapter {dora!r} is a DoRA, which is no part of a sum; wanted its own folder copied")
    R = max(len(A) for A, _, _ in parts.values())
    for layer, (A, B, _) in parts.items():
        zeros = R - len(A)
        tensors[f"base_model.model.{layer}.{_KEYS['A']}"] = F.pad(A, (0, 0, 0, zeros)).cpu().contiguous()  # (R, C)
        tensors[f"base_model.model.{layer}.{_KEYS['B']}"] = F.pad(B, (0, zeros)).cpu().contiguous()  # (O, R)
    # PEFT also takes a listed name for the end of longer names; where there are such, only an expression is exact.
    longer = any(_plain(other).endswith(f".{n}") for other, _ in model.named_modules() for n in parts)
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": R, "lora_alpha": R, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, "modules_to_save": None,
        "fan_in_fan_out": any(_is_conv1d(m) for n, m in _layers(model).items() if n in parts),
        "target_modules": "|".join(re.escape(n) for n in parts) if longer else list(parts),
    }  # fmt: skip
    data = {_WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}), _CONFIG: json.dumps(config).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (folder / f"{name}.tmp").write_bytes(content)
        os.replace(folder / f"{name}.tmp", folder / name)
    return R


if __name__ == "__main__":
    import tempfile

    import safetensors.torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4)).requires_grad_(False)
    tasks, x = {}, torch.randn(512, 8)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("en", "zh"):  # two adapters as if trained: two directions in which the outputs can move
            A, B = torch.randn(2, 64) / 8, torch.randn(4, 2) / 2
            tasks[name] = model(x) + F.linear(F.linear(model[:2](x), A), B) * 8 / 2
            place = pathlib.Path(folder, name)
            place.mkdir()
            tensors = {"base_model.model.2.lora_A.weight": A, "base_model.model.2.lora_B.weight": B}
            safetensors.torch.save_file(tensors, place / _WEIGHTS)
            (place / _CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
        bare = model(x)
        hold(model, {name: pathlib.Path(folder, name) for name in tasks})
        for what in (None, *tasks):
            with used(model, what):
                print(f"{what!s:4}", *(f"off task {n} by {F.mse_loss(model(x), y):.3f}," for n, y in tasks.items()))
        both, losses = 0.7 * tasks["en"] + 0.3 * tasks["zh"], {}
        for step in range(7):  # a task between the two, of which only examples are known: search for the weights
            weights = {"en": round(0.4 + step / 10, 1), "zh": round(0.6 - step / 10, 1)}
            with used(model, weights):
                losses[tuple(weights.values())] = F.mse_loss(model(x), both).item()
        best = min(losses, key=losses.get)
        print(f"the best of {len(losses)} sums is {best[0]} en + {best[1]} zh: off by {losses[best]:.0e}")
        rank = write_sum(model, dict(zip(("en", "zh"), best, strict=True)), pathlib.Path(folder, "sum"))
        hold(model, {"sum": pathlib.Path(folder, "sum")})
        with used(model, "sum"):
            print(f"as one adapter of rank {rank}: off by {F.mse_loss(model(x), both):.0e}")
    for name in held(model):
        drop(model, name)
    print("without adapters the same bits as ever:", torch.equal(model(x), bare), "| held:", len(held(model)))
