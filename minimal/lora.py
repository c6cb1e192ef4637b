# SPDX-License-Identifier: MIT
"""LoRA, rsLoRA, DoRA, LoRA+: fine-tune any module by training a small low-rank change of its linear layers.

Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; rsLoRA, Kalajdzievski 2023, arXiv 2312.03732; DoRA, Liu et al. 2024,
arXiv 2402.09353; LoRA+, Hayou et al. 2024, arXiv 2402.12354. A linear layer y = W x + b, with W frozen, becomes

    LoRA     y = W x + b + s B A dropout(x)      s = alpha / r         (LoRA eq. 3)
    rsLoRA   the same with                       s = alpha / sqrt(r)   (rsLoRA: then large ranks learn too)
    DoRA     y = g (W x + s B A dropout(x)) + b  g = m / ||W + s B A|| (DoRA eq. 5; the norm gets no gradient, sec. 4.3)

A starts uniform in +-1/sqrt(C), B at zero, m at the norms of W, so that s B A = 0 and g = 1: the adapted model starts
as exactly the model it was. Merging replaces W by g (W + s B A), after which there is nothing more to compute.

Departures from the papers, and what else to know:
- A's uniform start is the authors' code's and PEFT's (the paper says Gaussian); DoRA's "column norms" are one per
  output, a row of nn.Linear's (O, C) weight. Dropout is on the A path alone (PEFT's DoRA also drops the x in its
  (g - 1) W x). A, B and m are at least float32: in half precision Adam's small steps would round away.
- An adapter is a submodule `lora` of its layer and is called as its forward hook: class and weight names stay. A model
  saved while adapted holds its old weights and, beside them, `<layer>.lora.A` and `.B` (`.m`); load plain weights into
  an adapted model with strict=False. A merged model is plain again: its state_dict is the merged weights alone.
- A hook acts when the layer is called. nn.MultiheadAttention reads out_proj.weight instead: that is never a target. In
  a module of yours that does so, A and B get no gradient. A layer used twice has one adapter (PEFT adapts one place).
- Whatever else requires a gradient trains in full and is saved with them, by whole modules: PEFT's modules_to_save. A
  model that quant.py has quantised is adapted alike (QLoRA); to be merged it must be dequantised first.

    add_lora(model, rank=8, alpha=16)  # then model.classifier.requires_grad_(True), if there is a fresh head
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-3)  # or of lora_groups; ... train as ever
    save_lora(model, "adapter")  # in PEFT's format; load_lora(model, "adapter") reads ours and PEFT's

Shapes: C inputs of a layer, O outputs, r rank.
"""

import contextlib
import copy
import json
import math
import pathlib
import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoRA(nn.Module):
    """The adapter of one layer, its submodule `lora`: A (r, C), B (O, r) and, for DoRA, m (O)."""

    def __init__(self, layer, rank, alpha, dropout, rslora, dora):
        super().__init__()
        W = _weight(layer).detach()  # (O, C)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        like = {"dtype": torch.promote_types(W.dtype, torch.float32), "device": W.device}
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, W.shape[1], **like), 5**0.5))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, **like))
        self.m = nn.Parameter(self.V(W)[1].detach()) if dora else None

    def V(self, W):
        """V = W + s B A, (O, C), and the norms of its rows, (O,): both in float32 (float64 for float64 weights)."""
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        with torch.autocast(W.device.type, enabled=False):  # which would round B A to half precision
            V = W + self.scale * (self.B.to(W.dtype) @ self.A.to(W.dtype))  # (O,r) x (r,C) -> (O,C)
        return V, V.norm(dim=1).clamp_min(torch.finfo(V.dtype).tiny)  # a row of zeros must give g = 0, not 0/0

    def forward(self, layer, args, out):
        """The hook: from the layer's arguments, x (..., C), and its output (..., O) to the adapted output."""
        x = F.dropout(args[0].to(self.A.dtype), self.dropout, self.training)  # one mask on A would be all tokens' mask
        delta = F.linear(F.linear(x, self.A), self.B) * self.scale  # (..., C) -> (..., r) -> (..., O)
        if self.m is not None:
            g = self.m / self.V(_weight(layer))[1].detach()  # (O,); the norm is a constant to the gradient
            Wx = out.to(g.dtype) if layer.bias is None else out.to(g.dtype) - layer.bias.to(g.dtype)
            delta = (g - 1) * Wx + g * delta  # y - (W x + b)
        return (out + delta).to(out.dtype)  # added in the wider of the two dtypes, rounded once

    def attach(self, layer):
        layer.lora, self.handle = self.train(layer.training), layer.register_forward_hook(self)
        if "_dynamo" in vars(torch):  # once something is compiled
            torch.compiler.reset()  # torch.compile has no guard on hooks: a graph made before would run on without it

    def detach(self, layer):
        self.handle.remove()
        del layer.lora  # here torch.compile does notice: the parameters that its graph reads are gone


def _is_conv1d(layer):  # the linear layer of GPT-2 in transformers: its weight is (C, O)
    return type(layer).__name__ == "Conv1D" and tuple(layer.weight.shape[1:]) == (getattr(layer, "nf", None),)


def _weight(layer):
    return layer.weight.T if _is_conv1d(layer) else layer.weight  # (O, C)


def _plain(name):
    return f"{name}.".replace("_orig_mod.", "")[:-1]  # which torch.compile puts between


def _layers(model):  # every layer that can be adapted, by name: with a weight of its own, or the codes of quant.py
    uncalled = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = {_plain(n): m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    return {n: m for n, m in found.items() if m not in uncalled and {"weight", "codes"} & {*m._parameters, *m._buffers}}


def _adapted(model, merged=None):
    """The adapted layers by name; an error if there are none, or if they are merged (or not) against what is asked."""
    layers = {n: m for n, m in _layers(model).items() if hasattr(m, "lora") or hasattr(m, "lora_aside")}
    if not layers or not hasattr(model, "lora_trainable"):
        raise ValueError(f"model={type(model).__name__} has no adapters; wanted the module that add_lora was given")
    if merged not in (None, any(hasattr(m, "lora_aside") for m in layers.values())):
        now = "not merged; wanted merge_lora first" if merged else "merged; wanted unmerge_lora first"
        raise ValueError(f"model={type(model).__name__} has adapters that are {now}")
    return layers


def _whole(model, layers, names=None):
    """Names of modules that train in full beside these layers' adapters (or names given); tensors of what ends so."""
    modules = {_plain(n): m for n, m in model.named_modules(remove_duplicate=False) if not isinstance(m, LoRA)}
    holders = {n for n, m in modules.items() if not layers.isdisjoint(m.modules())}
    if names is None:
        names = [n for n, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))]
        if both := holders.intersection(names):
            raise ValueError(f"module {min(both)!r} holds adapters and trains in full; wanted one of the two")
    return names, {_plain(f"{n}.{key}"): tensor for n in modules if n.endswith(tuple(names)) and n not in holders
                   for key, tensor in modules[n].state_dict(keep_vars=True).items()}  # fmt: skip


def _one_of(names):
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))  # h.0.fc, h.1.fc -> h.*.fc


def add_lora(model, rank=8, alpha=16, dropout=0.0, target="all-linear", rslora=False, dora=False):
    """Freezes the model and adds an adapter to each target layer, in place; returns the names of these layers.
    target: "all-linear", or one or more of: a layer's name, the end of names ("c_attn", "attn.c_proj"), a regular
    expression for whole names. Layers are nn.Linear and transformers' Conv1D. "all-linear" leaves out the head: what
    get_output_embeddings() returns, shares its weight with an nn.Embedding (or, in quant.py, its codes), or is called
    lm_head, head, classifier, score, qa_outputs, seq_relationship. dropout: the probability, in training, that an
    element of x does not reach A. ValueError: adapters there already, a target that matches nothing, rank < 1 or above
    min(C, O), alpha <= 0, dropout < 0 or >= 1."""
    layers, names, missing = _layers(model), [], []
    if target == "all-linear":
        heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
        heads |= {id(x) for m in model.modules() if isinstance(m, nn.Embedding) for x in getattr(m, "of", [m.weight])}
        heads |= {"lm_head", "head", "classifier", "score", "qa_outputs", "seq_relationship"}
        names = [n for n, m in layers.items() if not {id(m), id(m._parameters.get("weight", m)), *n.split(".")} & heads]
    else:
        for entry in [target] if isinstance(target, str) else target:
            hits = {n for n in layers if f".{n}".endswith(f".{entry}")}
            with contextlib.suppress(re.error):  # no regular expression either
                hits = hits or {n for n in layers if re.fullmatch(entry, n)}
            missing += [] if hits else [entry]
            names = [n for n in layers if n in names or n in hits]
    if missing or not names:
        raise ValueError(f"target={missing or target} matches no linear layer; wanted some of: {_one_of(layers)}")
    if any(hasattr(m, "lora") or hasattr(m, "lora_aside") for m in layers.values()):
        raise ValueError(f"model={type(model).__name__} already has adapters; wanted remove_lora first")
    width, name = min((min(layers[n].weight.shape), n) for n in names)
    if not isinstance(rank, int) or not 1 <= rank <= width:
        raise ValueError(f"rank={rank!r} does not fit layer {name!r} of width {width}; wanted 1 to {width}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} is out of range; wanted a finite number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is out of range; wanted 0 <= dropout < 1")
    model.lora_trainable = {_plain(n) for n, p in model.named_parameters() if p.requires_grad}  # for remove_lora
    model.requires_grad_(False)
    for name in names:
        LoRA(layers[name], rank, alpha, dropout, rslora, dora).attach(layers[name])
    return names


def lora_parameters(model):
    """A list of all parameters that train: A and B (and m) of each adapted layer, and what else requires a gradient.
    ValueError: adapters that are merged, cast to half precision (cast before add_lora) or in what trains in full."""
    layers = set(_adapted(model, merged=False).values())
    if any(p.dtype in (torch.float16, torch.bfloat16) for layer in layers for p in layer.lora.parameters()):
        raise ValueError("model was cast to half precision after add_lora, its adapters too; wanted it cast before")
    _whole(model, layers)  # for its error: now, not when all is trained and to be saved
    return [p for p in model.parameters() if p.requires_grad]


def lora_groups(model, ratio=16.0, weight_decay=0.0, lr=None):
    """LoRA+: groups of lora_parameters(model), for any optimizer, in which B learns ratio times as fast as all else. A
    loop with a schedule sets group["lr"] = rate * group["lr_scale"]; without one, lr fills "lr" in. Only matrices decay
    (and PEFT gives m and biases B's rate). ValueError: ratio <= 0 or not finite, and as lora_parameters says."""
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio={ratio} is out of range; wanted a finite number above 0")
    groups, fast = {}, {id(m.B) for m in model.modules() if isinstance(m, LoRA)}
    for p in lora_parameters(model):
        scale, decay = float(ratio) if id(p) in fast else 1.0, weight_decay if p.ndim > 1 else 0.0
        group = {"params": [], "lr_scale": scale, "weight_decay": decay} | ({} if lr is None else {"lr": lr * scale})
        groups.setdefault((id(p) in fast, p.ndim > 1), group)["params"].append(p)
    return list(groups.values())


@torch.no_grad()
def merge_lora(model):
    """Puts the adapters into the weights; returns the largest absolute change that made to a weight. The sum is made in
    float32 (float64 for float64 weights) and rounded once. Then these layers are plain: no hook, no cost. Merged
    weights are new parameters (a tied one is tied no more: a warning says so), the originals are kept too.
    ValueError, and nothing has changed: already merged, a quantised layer, a merged weight that is not finite."""
    layers, weights, largest = _adapted(model, merged=False), {}, 0.0
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ValueError(f"layer {name!r} is quantised, its weight cannot change; wanted dequantise(model) first")
        lora, W = layer.lora, _weight(layer)
        V, norm = lora.V(W)
        new = (V if lora.m is None else (lora.m / norm)[:, None] * V).to(W.dtype)  # (O, C)
        weights[name] = new.T.contiguous() if _is_conv1d(layer) else new
        change = (new.to(V.dtype) - W.to(V.dtype)).abs().max().item()
        if not math.isfinite(change):
            raise ValueError(f"merging layer {name!r} into {W.dtype} changes it by {change}; wanted finite weights")
        largest = max(largest, change)
    owners = [id(p) for m in model.modules() for p in m._parameters.values()]
    for name, layer in layers.items():
        if owners.count(id(layer.weight)) > 1:
            warnings.warn(f"{name}.weight was tied and is now its own: a loader that ties them again "
                          "(tie_word_embeddings=True) would lose the merge", stacklevel=3)
        layer.lora_aside = (layer.lora, layer.weight)  # a tuple is in neither parameters() nor state_dict()
        layer.lora.detach(layer)
        layer.weight = nn.Parameter(weights[name], requires_grad=False)
    return largest


def unmerge_lora(model):
    """Undoes merge_lora: the original parameters are back, bit for bit and tied as before. ValueError: not merged."""
    for layer in _adapted(model, merged=True).values():
        lora, original = layer.lora_aside
        original.data = original.data.to(layer.weight)  # follows a move or cast of the merged model, else does nothing
        layer.weight = original
        del layer.lora_aside
        lora.to(original.device).attach(layer)


def remove_lora(model):
    """Takes the adapters away, merged or not: all but what trained in full, and each requires_grad, is as it was."""
    if any(hasattr(layer, "lora_aside") for layer in _adapted(model).values()):
        unmerge_lora(model)
    for layer in _adapted(model).values():
        layer.lora.detach(layer)
    for name, p in model.named_parameters():
        p.requires_grad_(_plain(name) in model.lora_trainable)
    del model.lora_trainable


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
# PEFT's options: those that load_lora follows or that change no result; values that mean what we do. Others must be off
_FOLLOWED = set("r lora_alpha lora_dropout use_rslora use_dora target_modules modules_to_save revision "
                "exclude_modules layers_to_transform layers_pattern fan_in_fan_out inference_mode peft_version "
                "base_model_name_or_path auto_mapping task_type megatron_core qalora_group_size".split())
_ACCEPTED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


def save_lora(model, folder):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does, each whole or not at all. The files are
    the same while the adapters are merged. ValueError: no adapters, or as lora_parameters says."""
    import safetensors.torch
    folder, layers = pathlib.Path(folder), _adapted(model)
    names, tensors = _whole(model, set(layers.values()))  # tied tensors more than once: cloned below, for safetensors
    loras = {n: m.lora if hasattr(m, "lora") else m.lora_aside[0] for n, m in layers.items()}
    tensors |= {f"{n}.{_KEYS[p]}": value for n, lora in loras.items() for p, value in lora.named_parameters()}
    tensors = {f"base_model.model.{n}": t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    # PEFT also takes a listed name for the end of longer names; where there are such, only an expression is exact.
    longer = any(_plain(other).endswith(f".{n}") for other, _ in model.named_modules() for n in loras)
    config = {
        "peft_type": "LORA", "init_lora_weights": True, "inference_mode": True, "modules_to_save": names or None,
        "base_model_name_or_path": getattr(model, "name_or_path", None), "task_type": getattr(model, "task_type", None),
        "r": (first := next(iter(loras.values()))).rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
        "use_dora": first.m is not None, "fan_in_fan_out": any(map(_is_conv1d, layers.values())), "bias": "none",
        "target_modules": "|".join(re.escape(n) for n in loras) if longer else list(loras), "use_rslora": first.rslora,
    }
    data = {_WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}), _CONFIG: json.dumps(config).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (folder / f"{name}.tmp").write_bytes(content)
        (folder / f"{name}.tmp").replace(folder / name)


def load_lora(model, folder):
    """Reads adapters that save_lora or PEFT wrote: adds them to a bare model, or fills those of an adapted one. Layers
    are those that the file has tensors for, whichever options chose them. Modules saved whole are filled and train.
    ValueError, and the model is as it was: a file missing, damaged or a pickle, an option not ours, a misfit."""
    import safetensors.torch
    folder = pathlib.Path(folder)
    if not (folder / _WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder / 'adapter_model.bin'} is a pickle and is never opened; wanted {_WEIGHTS}")
    try:
        config = json.loads((file := folder / _CONFIG).read_bytes())
        tensors = safetensors.torch.load((file := folder / _WEIGHTS).read_bytes())
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(f"{file} cannot be read: {e}") from None
    for key, value in config.items():
        if value and key not in _FOLLOWED and value not in _ACCEPTED.get(key, ()):
            raise ValueError(f"{folder / _CONFIG}: option {key}={value!r} is not supported; wanted it off")
    r, alpha, dropout = config.get("r", 0), config.get("lora_alpha", 0), config.get("lora_dropout", 0.0)
    rslora, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    layers, tensors = _layers(model), {n.removeprefix("base_model.model."): t for n, t in sorted(tensors.items())}
    found = {n: layers[n] for n in (key.rpartition(".lora_")[0] for key in tensors) if n in layers}
    whole = _whole(model, set(found.values()), config.get("modules_to_save") or ())[1]
    wanted = {key: tuple(p.shape) for key, p in whole.items()}
    for name, layer in found.items():
        O, C = _weight(layer).shape
        wanted |= {f"{name}.{_KEYS[p]}": s for p, s in (("A", (r, C)), ("B", (O, r)), ("m", (O,))) if dora or p != "m"}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(shapes.keys() | wanted.keys()):
        name = key.rpartition(".lora_")[0] or key.rpartition(".")[0]
        if name not in found and key not in whole:
            raise ValueError(f"{file}: no linear layer for base_model.model.{key}; wanted some of: {_one_of(layers)}")
        if shapes.get(key) != wanted.get(key):
            are, want = ({n: d[n] for n in d if n.startswith(f"{name}.")} for d in (shapes, wanted))
            raise ValueError(f"{file}: the tensors of {name} are {are}; wanted {want}")
    for key, p in whole.items():
        for n in (_plain(n) for n, twin in model.named_parameters(remove_duplicate=False) if twin is p):
            if n != key and not torch.equal(tensors.get(n, torch.empty(0)), tensors[key]):
                raise ValueError(f"{file}: {key} is tied to {n}; wanted the same values for both")
    if hasattr(model, "lora_trainable"):
        mine = _adapted(model, merged=False)
        kinds = {(m.lora.rank, m.lora.alpha, m.lora.rslora, m.lora.m is not None) for m in mine.values()}
        lacking = _whole(model, set(mine.values()))[1].keys() - whole.keys()  # what trains in the model alone
        if set(mine) != set(found) or kinds != {(r, alpha, rslora, dora)} or lacking:
            raise ValueError(f"{folder}: its layers, rank, alpha or kind are not those of the model's adapters")
    else:  # exactly these names, not names that end so
        add_lora(model, r, alpha, dropout, [f"(?:{re.escape(n)})" for n in found], rslora, dora)
    whole |= {f"{n}.{_KEYS[p]}": value for n, m in found.items() for p, value in m.lora.named_parameters()}
    for key, value in whole.items():
        value.requires_grad_(isinstance(value, nn.Parameter)).data.copy_(tensors[key])  # or else a buffer


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, x_test = torch.randn(64, 8), torch.randn(1024, 8)
    base = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    task = copy.deepcopy(base).requires_grad_(False)
    task[2].weight += torch.randn(64, 1) @ torch.randn(1, 64) / 10  # another task, of which there are 64 examples
    for name, kind in {"full": None, "LoRA": {}, "rsLoRA": {"rslora": True}, "DoRA": {"dora": True}}.items():
        model = copy.deepcopy(base)
        if kind is not None:
            add_lora(model, rank=2, alpha=4, **kind)
        share = sum(p.numel() * p.requires_grad for p in model.parameters()) / sum(p.numel() for p in base.parameters())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(300):
            optimizer.zero_grad()
            F.mse_loss(model(x), task(x)).backward()
            optimizer.step()
        before, after, y = *(F.mse_loss(m(x_test), task(x_test)) for m in (base, model)), model(x_test).detach()
        print(f"{name:6} {share:4.0%} of the weights learn: loss {before:.4f} -> {after:.4f}")
        if kind is not None:
            moved, off = merge_lora(model), F.l1_loss(model(x_test), y)
            unmerge_lora(model)
            print(f"       merged, W moves by {moved:.2f}, y by {off:.0e}; unmerged by {F.l1_loss(model(x_test), y):g}")
