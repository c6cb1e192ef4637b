# SPDX-License-Identifier: MIT
"""Bottleneck adapters: fine-tune any module by training small networks that are put in between its frozen layers.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, AdapterFusion, arXiv 2005.00247, and AdapterHub, arXiv
2007.07779. With h what a sublayer gives, before it is added to the residual stream,

    adapter(h)  = h + W_up f(W_down h + b_down) + b_up         (Houlsby section 2.1, figure 2)
    houlsby     one after the attention (each of them, where there are two) and one after the feed-forward network
    pfeiffer    one for each block, after the feed-forward network
    parameters  = 2 m d + d + m for each

W_up and b_up start at zero, so that the adapted model starts as exactly the model it was. Because of f, an adapter
cannot be merged into the weights: unlike LoRA it costs two small products at every call, for good.

Departures from the papers, and what else to know:
- Houlsby et al. start both matrices near zero (sigma 0.01); here W_up is exactly zero and W_down uniform in
  +-1/sqrt(d), as nn.Linear starts. f is their choice: ReLU as in AdapterHub's Pfeiffer, or another.
- AdapterHub's Pfeiffer reads LN(x + h) and adds to h; here both placements read h, as Houlsby's do. The sublayer's own
  dropout comes after the adapter, not before it.
- Houlsby et al. also train the layer norms. Here nothing but the adapters trains unless you turn requires_grad on again
  after add_adapter, for norms or for a fresh head. What does so is saved with the adapters, and remove_adapter leaves
  it as trained.
- An adapter is a submodule `adapter` of the sublayer's last linear layer, and is called as its forward hook: class and
  weight names stay. It acts when that layer is called, so nn.MultiheadAttention's out_proj, which never is, is no
  target. Load plain weights into an adapted model with strict=False. A layer used twice has one adapter.
- Adapters are at least float32: in half precision Adam's small steps would round away. The files are our own.

    add_adapter(model, size=64, placement="pfeiffer")  # then model.classifier.requires_grad_(True) for a fresh head
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)  # ... train as ever
    save_adapter(model, "adapter")  # load_adapter(model, "adapter"); remove_adapter(model)

Shapes: d outputs of a layer, m the adapter's size.
"""

import contextlib
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
# The last linear layers of the sublayers, after the number of their block: of attention, of the feed-forward network.
SUBLAYERS = (
    (r"(attn|crossattention)\.c_proj", r"mlp\.c_proj"),  # GPT
    (r"self_attn\.o_proj", r"mlp\.down_proj"),  # Llama
    (r"(cross)?attention\.output\.dense", r"output\.dense"),  # BERT
    (r"(self|cross|encoder)_attn\.out_proj", r"fc2"),  # Transformer; and BART, whose cross attention is encoder_attn
)


class Adapter(nn.Module):
    """The adapter of one layer, its submodule `adapter`: W_down (m, d), b_down (m), W_up (d, m), b_up (d)."""

    def __init__(self, layer, size, activation, dropout):
        super().__init__()
        like, d = next(t for t in (*layer.parameters(), *layer.buffers())), _width(layer)
        options = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        self.f, self.dropout = ACTIVATIONS[activation], dropout
        self.W_down = nn.Parameter(torch.empty(size, d, **options).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))
        self.b_down = nn.Parameter(torch.zeros(size, **options))
        self.W_up = nn.Parameter(torch.zeros(d, size, **options))
        self.b_up = nn.Parameter(torch.zeros(d, **options))

    def forward(self, layer, args, h):
        """The hook: from the layer's output h (..., d) to the adapted one, of the same dtype."""
        z = self.f(F.linear(h.to(self.W_down.dtype), self.W_down, self.b_down))  # (..., d) x (m, d) -> (..., m)
        z = F.dropout(z, self.dropout, self.training)
        return (h + F.linear(z, self.W_up, self.b_up)).to(h.dtype)  # added in the wider of the two dtypes, rounded once


# Same as minimal/lora.py: _is_conv1d
def _is_conv1d(layer):
    return type(layer).__name__ == "Conv1D" and tuple(layer.weight.shape[1:]) == (getattr(layer, "nf", None),)


# Same as minimal/lora.py: _plain
def _plain(name):
    return f"{name}.".replace("_orig_mod.", "")[:-1]


# Same as minimal/lora.py: _one_of
def _one_of(names):
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))


def _width(layer):  # d, or None: no linear layer. Quantised ones have no nn.Linear's class, but its out_features
    width = layer.nf if _is_conv1d(layer) else getattr(layer, "out_features", None)
    return width if isinstance(width, int) else None


def _layers(model):  # every layer that can be adapted, by name
    uncalled = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {_plain(n): m for n, m in model.named_modules() if _width(m) and m not in uncalled}


def _adapted(model):
    """The adapted layers by name; ValueError if there are none."""
    layers = {n: m for n, m in _layers(model).items() if isinstance(getattr(m, "adapter", None), Adapter)}
    if not layers or not hasattr(model, "adapter_settings"):
        raise ValueError(f"model={type(model).__name__} has no adapters; wanted the module that add_adapter was given")
    return layers


def _targets(layers, placement, target):
    """The names of the layers to adapt, in the model's order."""
    if placement not in ("pfeiffer", "houlsby"):
        raise ValueError(f"placement={placement!r} is unknown; wanted 'pfeiffer' or 'houlsby'")
    if target is None:
        for kinds in SUBLAYERS:
            attention, mlp = ([n for n in layers if re.fullmatch(rf"(.*\.)?\d+\.{kind}", n)] for kind in kinds)
            if attention and mlp:
                return mlp if placement == "pfeiffer" else [n for n in layers if n in attention or n in mlp]
        raise ValueError(f"target=None: the model has no sublayers of known names; wanted some of: {_one_of(layers)}")
    names, missing = [], []
    for entry in [target] if isinstance(target, str) else target:
        hits = {n for n in layers if f".{n}".endswith(f".{entry}")}
        with contextlib.suppress(re.error):  # no regular expression either
            hits = hits or {n for n in layers if re.fullmatch(entry, n)}
        missing += [] if hits else [entry]
        names = [n for n in layers if n in names or n in hits]
    if missing or not names:
        raise ValueError(f"target={missing or target} matches no linear layer; wanted some of: {_one_of(layers)}")
    return names


def _check(size, activation, dropout):
    if type(size) is not int or size < 1:
        raise ValueError(f"size={size!r} is out of range; wanted a whole number of at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; wanted one of {', '.join(ACTIVATIONS)}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is out of range; wanted 0 <= dropout < 1")


def add_adapter(model, size=64, placement="pfeiffer", activation="relu", dropout=0.0, target=None):
    """Freezes the model and adds an adapter to each target layer, in place; returns the names of these layers.

    size: m, the width of the bottleneck. placement: "pfeiffer" or "houlsby", for blocks whose layers are called as
    those of GPT, Llama, BERT or the Transformer here and in transformers (where cross attention counts too). target:
    for other models, in place of it, one or more of: the name of a layer, the end of names ("mlp.c_proj"), a regular
    expression for whole names. Layers are nn.Linear, what has its out_features, and Conv1D of transformers' GPT-2.
    activation: relu, gelu, silu or tanh. dropout: the probability, in training, that an element of f(..) is dropped.
    ValueError: adapters there already; sublayers not found; a target that matches nothing (even one of several); a size
    below 1; an unknown placement or activation; dropout < 0 or >= 1."""
    _check(size, activation, dropout)
    layers = _layers(model)
    names = _targets(layers, placement, target)
    if any(isinstance(m, Adapter) for m in model.modules()):
        raise ValueError(f"model={type(model).__name__} already has adapters; wanted remove_adapter first")
    settings = {"size": size, "placement": None if target else placement, "activation": activation, "dropout": dropout}
    model.adapter_settings = settings
    model.adapter_trainable = {_plain(n) for n, p in model.named_parameters() if p.requires_grad}  # for remove_adapter
    model.requires_grad_(False)
    for layer in (layers[name] for name in names):
        adapter = layer.adapter = Adapter(layer, size, activation, dropout).train(layer.training)
        adapter.handle = layer.register_forward_hook(adapter)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # torch.compile has no guard on hooks: a graph made before would run on without them
    return names


def adapter_parameters(model):
    """A list of all parameters that train: each adapter's four, and what else requires a gradient.

    ValueError: no adapters, or adapters that were cast to half precision (cast the model before add_adapter)."""
    half = (torch.float16, torch.bfloat16)
    if any(p.dtype in half for layer in _adapted(model).values() for p in layer.adapter.parameters()):
        raise ValueError("model was cast to half precision after add_adapter, its adapters too; wanted it cast before")
    return [p for p in model.parameters() if p.requires_grad]


def remove_adapter(model):
    """Takes the adapters away: all but what trained beside them, and each requires_grad, is as it was before."""
    for layer in _adapted(model).values():
        layer.adapter.handle.remove()
        del layer.adapter  # here torch.compile does notice: the parameters that its graph reads are gone
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.requires_grad_(_plain(name) in model.adapter_trainable)
    del model.adapter_trainable, model.adapter_settings


# Same as minimal/gpt.py: _safetensors
def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("weights are read and written with safetensors: pip install safetensors") from None
    return safetensors


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEYS = {"peft_type", "base_model_name_or_path", "size", "placement", "activation", "dropout", "target", "trains"}


def _whole(model):
    """Parameters that train beside the adapters, by all their names, and all tensors of the modules that hold them."""
    inside = tuple(f"{n}.adapter." for n in _adapted(model)) if hasattr(model, "adapter_settings") else ()
    trains = {_plain(n) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    trains = sorted(n for n in trains if not n.startswith(inside or "\n"))
    holders = {n.rpartition(".")[0] for n in trains}
    state = {_plain(n): t for n, t in model.state_dict(keep_vars=True).items()}
    return trains, {n: t for n, t in state.items() if n.rpartition(".")[0] in holders}


def save_adapter(model, folder):
    """Writes adapter_model.safetensors, named as in state_dict(), and adapter_config.json, each whole or not at all.

    Beside the adapters: each module that holds a parameter that trains, with its buffers. ValueError: no adapters."""
    safetensors, folder, layers = _safetensors(), Path(folder), _adapted(model)
    trains, tensors = _whole(model)
    tensors |= {f"{n}.adapter.{key}": p for n, m in layers.items() for key, p in m.adapter.named_parameters()}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}  # clones: tied ones are refused
    base = getattr(model, "name_or_path", None)
    config = {"peft_type": "BOTTLENECK", "base_model_name_or_path": base, **model.adapter_settings,
              "target": list(layers), "trains": trains}  # fmt: skip
    data = {_WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
            _CONFIG: (json.dumps(config, indent=2) + "\n").encode()}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (folder / f"{name}.tmp").write_bytes(content)
        (folder / f"{name}.tmp").replace(folder / name)


def load_adapter(model, folder):
    """Reads what save_adapter wrote: adds these adapters to a bare model, or fills those of an adapted one.

    What was saved with them is filled too, and trains. ValueError, and the model is as it was: a file is missing or
    damaged; its layers, shapes, tied tensors or settings are not those of the model."""
    safetensors, folder = _safetensors(), Path(folder)
    try:
        config = json.loads((file := folder / _CONFIG).read_bytes())
        if not isinstance(config, dict) or config.get("peft_type") != "BOTTLENECK" or config.keys() != _KEYS:
            kind = config.get("peft_type") if isinstance(config, dict) else None
            raise ValueError(f"peft_type={kind!r} or its settings are not ours; wanted 'BOTTLENECK' by save_adapter")
        settings = {key: config[key] for key in ("size", "placement", "activation", "dropout")}
        size, placement, activation, dropout = settings.values()
        _check(size, activation, dropout)
        named = all(isinstance(name, str) for name in [*config["target"], *config["trains"]])
        if placement not in ("pfeiffer", "houlsby", None) or not named:
            raise ValueError(f"placement={placement!r}, target or trains are not what save_adapter writes")
        tensors = safetensors.torch.load((file := folder / _WEIGHTS).read_bytes())
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(f"{file} cannot be read: {' '.join(str(e).split())}") from None
    layers, names = _layers(model), config["target"]
    for name in names:
        if name not in layers:
            raise ValueError(f"{file}: the model has no linear layer {name}; wanted some of: {_one_of(layers)}")
    adapters = {n: {"W_down": (size, d := _width(layers[n])), "b_down": (size,), "W_up": (d, size), "b_up": (d,)}
                for n in names}  # fmt: skip
    wanted = {f"{n}.adapter.{key}": shape for n, shapes in adapters.items() for key, shape in shapes.items()}
    own = {_plain(n): t for n, t in model.state_dict(keep_vars=True).items() if _plain(n) not in wanted}
    whole = {n: own.get(n) for n in sorted(tensors.keys() - wanted.keys())}
    wanted |= {n: None if t is None else tuple(t.shape) for n, t in whole.items()}
    for name, shape in wanted.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape or got is None:
            words = ["no such tensor" if s is None else f"of shape {s}" for s in (got, shape)]
            raise ValueError(f"{file}: {name} is {words[0]} there, and {words[1]} in the model")
    if absent := set(config["trains"]) - whole.keys():
        raise ValueError(f"{file}: no tensor {min(absent)}, which trained; wanted the file that was saved")
    for name, twin in ((_plain(n), p) for n, p in model.named_parameters(remove_duplicate=False)):
        for other in (n for n, p in whole.items() if p is twin and n != name):
            if name not in tensors or not torch.equal(tensors[name], tensors[other]):
                raise ValueError(f"{file}: {other} is tied to {name} in the model; wanted the same values for both")
    if hasattr(model, "adapter_settings"):
        mine, lacking = model.adapter_settings, set(_whole(model)[0]) - whole.keys()  # what trains in the model alone
        same = list(_adapted(model)) == [n for n in layers if n in names]
        if not same or lacking or any(mine[key] != settings[key] for key in ("size", "activation", "dropout")):
            raise ValueError(f"{folder}: its layers, settings or what trained beside them are not those of the model")
    else:  # exactly these names, not names that end so
        add_adapter(model, size, "pfeiffer", activation, dropout, [f"(?:{re.escape(n)})" for n in names])
        model.adapter_settings["placement"] = placement
    own = {_plain(n): t for n, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    for name in config["trains"]:
        own[name].requires_grad_(True)


if __name__ == "__main__":
    import copy

    class Block(nn.Module):
        """A block of one head whose layers are called as the Transformer's."""

        def __init__(self, C):
            super().__init__()
            self.self_attn = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "out_proj": nn.Linear(C, C)})
            self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)

        def forward(self, x):
            q, k, v = self.self_attn.qkv(self.norm1(x)).chunk(3, dim=-1)
            x = x + self.self_attn.out_proj(F.scaled_dot_product_attention(q, k, v))
            return x + self.fc2(F.relu(self.fc1(self.norm2(x))))

    class Net(nn.Module):
        """Reads 6 digits, writes 6 digits."""

        def __init__(self, C=64):
            super().__init__()
            self.embedding, self.positions = nn.Embedding(10, C), nn.Parameter(torch.randn(6, C))
            self.blocks, self.head = nn.Sequential(Block(C), Block(C)), nn.Linear(C, 10)

        def loss(self, ids, targets):
            return F.cross_entropy(self.head(self.blocks(self.embedding(ids) + self.positions)).mT, targets)

    def train(model, task, steps, lr):
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
        for _ in range(steps):
            optimiser.zero_grad()
            model.loss(ids := torch.randint(10, (64, 6)), task(ids)).backward()
            optimiser.step()
        return model

    def even_first(ids):  # sorted, the even digits before the odd ones
        return (ids + 10 * (ids % 2)).sort(1).values % 10

    torch.manual_seed(0)
    torch.set_num_threads(1)
    test, model = torch.randint(10, (500, 6)), Net()
    train(model, lambda ids: ids.sort(1).values, 500, 2e-3)
    weights, total = copy.deepcopy(model.state_dict()), sum(p.numel() for p in model.parameters())
    print(f"pretrained to sort: {model.loss(test, test.sort(1).values):.3f} nats a digit; now the even digits first")
    start = model.loss(test, even_first(test))
    for kind in ("full", "head", "pfeiffer", "houlsby"):
        tuned = copy.deepcopy(model).requires_grad_(kind == "full")
        tuned.head.requires_grad_(True)
        if kind in ("pfeiffer", "houlsby"):
            add_adapter(tuned, 16, kind)
            assert torch.equal(tuned.loss(test, even_first(test)), start)  # exactly the model it was
        share = sum(p.numel() for p in tuned.parameters() if p.requires_grad) / total
        train(tuned, even_first, 200, 2e-3 if kind == "full" else 1e-2)
        print(f"{kind:8} {share:4.0%} of the weights learn: {start:.3f} -> {tuned.loss(test, even_first(test)):.3f}")
    remove_adapter(tuned)
    same = all(torch.equal(weights[name], tensor) for name, tensor in tuned.state_dict().items())
    print(f"the last one removed: every weight is as it was: {same}")
