# SPDX-License-Identifier: MIT
"""Prefix-tuning: steer a frozen model by keys and values, learnt for every attention, that stand before the text's own.

Papers: prefix-tuning, Li & Liang 2021, arXiv 2101.00190; P-tuning v2, Liu et al. 2021, arXiv 2110.07602: the same
without the MLP, and for models of every kind. In each attention module, and not in front of the input embeddings,

    Attention(Q, [P_k; K], [P_v; V])      P_k, P_v (P, Hkv D): the prefix, as if P tokens had been read before the text
    [P_k; P_v] = start + W_2 tanh(W_1 E + b_1) + b_2      reparameterised (section 4.3): E (P, C'), W_1, b_1 are shared,
                                                          W_2, b_2 each attention's own, and these train
    [P_k; P_v] = start                                    P-tuning v2: these train

Files hold [P_k; P_v] alone: what is loaded has no MLP. There is no merging, as a prefix can be no part of the weights.

At the start the adapted model does not compute what the model did, and none could: the softmax gives every key some
weight. So start is keys and values of real words (section 7.4 recommends them): `words`, or some drawn from the
vocabulary; W_2 and b_2 start at zero. A GPT or Llama is then exactly one that has read these words before the text.

Departures from the papers, and what else to know:
- The authors start a reparameterised prefix from a random MLP; here the MLP adds to real words.
- Positions: a prefix is a past, the text begins at position P, as in the authors' code, PEFT, and BERT of transformers:
  model.position_offset is P, and the context P shorter. An encoder-decoder has three prefixes (its encoder's, its
  decoder's, and one between the two), and no offset.
- An attention module keeps its attention, a function, as an attribute (`attention`; BERT: `kernel`): a Prefix takes its
  place and calls it. So a cache never holds the prefix, documents packed in a row see it but not each other, and
  padding that had nothing to look at looks at the prefix. Causal masks, aligned bottom-right, need no change.
- The prefix is at least float32, cast to the keys' dtype at each call: in half precision Adam's small steps would round
  away. Whatever else requires a gradient trains in full and is saved too: PEFT's modules_to_save.
- PEFT reads and writes the same files for GPT-2 and Llama; its release 0.21 cannot run those of BERT, and those of an
  encoder-decoder, which it knows no way to write, name the attentions ("modules").

    add_prefix(model, length=16, words=tokenizer.encode("to sum up:"))  # turn a fresh head's requires_grad on again
    optimizer = torch.optim.AdamW(prefix_parameters(model), lr=1e-3)  # ... train as ever
    save_prefix(model, "adapter")  # in PEFT's format; load_prefix(model, "adapter") reads ours and PEFT's

Letters: B batch, T queries, S keys, H heads, Hkv key heads, D head size, P prefix length, L attention modules.
"""

import functools
import json
import pathlib

import torch
import torch.nn.functional as F
from torch import nn


class Trunk(nn.Module):
    """What the prefixes of all attentions share: tanh(W_1 E + b_1), (P, hidden). A submodule `prefix` of the model."""

    def __init__(self, length, width, hidden):
        super().__init__()
        self.E, self.W_1 = nn.Parameter(torch.randn(length, width)), nn.Linear(width, hidden)

    def forward(self):
        return self.W_1(self.E).tanh()


class Prefix(nn.Module):
    """A callable of attention's contract that puts keys and values, start (2, Hkv, P, D), before those it is given."""

    def __init__(self, attention, start, trunk=None):
        super().__init__()
        self.attention, self.trunk = attention, (trunk,)  # a tuple: it is a submodule of the model, once
        if trunk is None:
            self.start = nn.Parameter(start.clone())
        else:
            self.register_buffer("start", start.clone())
            self.W_2 = nn.Linear(trunk.W_1.out_features, start[:, :, 0].numel()).to(start)
            for p in self.W_2.parameters():
                nn.init.zeros_(p)

    def kv(self):
        """The keys and the values, (2, Hkv, P, D)."""
        if self.trunk[0] is None:
            return self.start
        _, Hkv, P, D = self.start.shape
        change = self.W_2(self.trunk[0]()).view(P, 2, Hkv, D)  # (P, hidden) x (2 Hkv D, hidden) -> (P, 2 Hkv D)
        return self.start + change.permute(1, 2, 0, 3)  # (2, Hkv, P, D)

    def forward(self, q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
        """q (B, H, T, D), k and v (B, Hkv, S, D), a mask that broadcasts to (B, H, T, S) -> (B, H, T, D)."""
        P_k, P_v = (t.to(k.dtype).expand(len(k), -1, -1, -1) for t in self.kv())  # 2 x (B, Hkv, P, D)
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], k.size(2))  # of width 1, which stood for any
            mask = F.pad(mask, (P_k.size(2), 0), value=mask.dtype == torch.bool)  # (..., P + S): True, or 0.0 to add
        k, v = torch.cat((P_k, k), dim=2), torch.cat((P_v, v), dim=2)  # 2 x (B, Hkv, P + S, D)
        return self.attention(q, k, v, causal=causal, mask=mask, scale=scale, dropout=dropout)


def _sites(model):
    """Where the model keeps its attention functions, in their order: {name: (module, attribute)}."""
    sites = {}
    for name, module in model.named_modules():
        for key in ("kernel", "attention"):
            inside = not isinstance(module, Prefix) and callable(vars(module).get(key))
            if inside or isinstance(module._modules.get(key), Prefix):
                sites[f"{name}.{key}".lstrip(".")] = module, key
    if not sites:
        raise ValueError(f"model={type(model).__name__} keeps no attention function as an attribute of its modules")
    return sites


def _prefixes(model):
    """The unwrapped model and its prefixes by name; an error if there are none."""
    model = getattr(model, "_orig_mod", model)  # which torch.compile puts around
    if not hasattr(model, "prefix_before"):
        raise ValueError(f"model={type(model).__name__} has no prefix; wanted the module that add_prefix was given")
    return model, {name: getattr(*site) for name, site in _sites(model).items()}


@torch.no_grad()
def _read(model, sites, ids):
    """The keys and values of ids (P,) at each site, {name: (2, Hkv, P, D)}, without dropout; float32 or wider."""
    seen, functions = {}, {name: getattr(*site) for name, site in sites.items()}
    training = [m for m in model.modules() if m.training]

    def record(name, q, k, v, **options):
        seen[name] = torch.stack((k[0], v[0])).to(torch.promote_types(k.dtype, torch.float32))
        return functions[name](q, k, v, **options)

    try:
        for module in training:
            module.training = False
        for name, site in sites.items():
            setattr(*site, functools.partial(record, name))
        ids = ids.expand(1, -1).to(next(model.parameters()).device)  # (1, P)
        model(*[ids] * (2 if hasattr(model, "encode") else 1))  # of an encoder-decoder, both texts are the words
    finally:
        for name, site in sites.items():
            setattr(*site, functions[name])
        for module in training:
            module.training = True
    return seen


def _check_length(model, length):
    context = min(getattr(model.config, n, 1 << 30) for n in ("n_positions", "max_position_embeddings", "max_len"))
    if type(length) is not int or not 1 <= length < context:
        raise ValueError(f"length={length!r} does not fit; wanted a whole number from 1, below the context, {context}")


def _attach(model, starts, sites, hidden):
    """Prefixes in place of the functions; hidden None: no MLP."""
    first = next(iter(starts.values()))  # (2, Hkv, P, D)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.prefix_before = before, getattr(model, "position_offset", None)  # for remove_prefix
    model.requires_grad_(False)
    trunk = None if hidden is None else Trunk(first.size(2), first.size(1) * first.size(3), hidden).to(first)
    for name, (module, key) in sites.items():
        prefix = Prefix(getattr(module, key), starts[name], trunk).train(module.training)
        delattr(module, key)  # a function: a module cannot take its place while it is there
        setattr(module, key, prefix)
    if trunk is not None:
        model.prefix = trunk
    if hasattr(model, "position_offset"):
        model.position_offset += first.size(2)


def add_prefix(model, length=16, words=None, reparameterise=True, hidden=512):
    """Freezes the model and gives each attention module a prefix, in place; returns the names of these modules.

    length: P. words: token ids, int64 (N,) or a list, whose keys and values the prefix starts from: repeated, or cut
    off, to P; None: drawn from the vocabulary, each equally likely. reparameterise: train through the MLP of width
    `hidden` (the paper's 512; steadier), else the keys and values themselves (P-tuning v2). ValueError: a prefix is
    there already, no attention found, length < 1 or not shorter than the context, words that are no tokens."""
    model = getattr(model, "_orig_mod", model)
    sites, V = _sites(model), model.config.vocab_size
    if hasattr(model, "prefix_before"):
        raise ValueError(f"model={type(model).__name__} already has a prefix; wanted remove_prefix first")
    _check_length(model, length)
    if type(hidden) is not int or hidden < 1:
        raise ValueError(f"hidden={hidden!r} is out of range; wanted a whole number, at least 1")
    words = torch.randint(V, (length,)) if words is None else torch.as_tensor(words)
    if words.dim() != 1 or not len(words) or words.is_floating_point() or not 0 <= words.min() <= words.max() < V:
        raise ValueError(f"words={words.tolist()} are no tokens; wanted one or more ids of 0 to {V - 1}")
    words = words.repeat(-(-length // len(words)))[:length]  # (P,)
    _attach(model, _read(model, sites, words), sites, hidden if reparameterise else None)
    return list(sites)


def prefix_parameters(model):
    """A list of all parameters that train: those of the prefixes, and what else requires a gradient.

    ValueError: no prefix, or one cast to half precision (cast the model before add_prefix)."""
    model, prefixes = _prefixes(model)
    if any(p.start.dtype in (torch.float16, torch.bfloat16) for p in prefixes.values()):
        raise ValueError("model was cast to half precision after add_prefix, its prefix too; wanted it cast before")
    return [p for p in model.parameters() if p.requires_grad]


def remove_prefix(model):
    """Takes the prefixes away: all but what trained in full, and each requires_grad, is as it was before add_prefix."""
    model, prefixes = _prefixes(model)
    for name, (module, key) in _sites(model).items():
        delattr(module, key)
        setattr(module, key, prefixes[name].attention)
    trainable, offset = model.prefix_before
    if offset is not None:
        model.position_offset = offset
    vars(model).pop("prefix_before"), model._modules.pop("prefix", None)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)


def _whole(model, own, names=None):
    """What trains in full beside the parameters of `own` modules, or is in the modules named: their names, tensors."""
    own = {id(p) for m in model.modules() if isinstance(m, own) for p in m.parameters()}
    other = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in own}
    if names is None:
        names = sorted({n.rpartition(".")[0] for n, p in other.items() if p.requires_grad})
    return names, {n: p for n, p in other.items() if f".{n}".rpartition(".")[0].endswith(tuple(f".{m}" for m in names))}


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
_TASKS = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "qa": "QUESTION_ANS", "pretrain": "FEATURE_EXTRACTION"}  # BERT's
# PEFT's options that load_prefix follows, or that change no result of what is saved.
_KNOWN = set("num_virtual_tokens num_layers num_attention_heads token_dim modules modules_to_save task_type revision "
             "encoder_hidden_size prefix_projection init_weights inference_mode base_model_name_or_path auto_mapping "
             "peft_version".split())  # fmt: skip
_ACCEPTED = {"peft_type": ("PREFIX_TUNING",), "num_transformer_submodules": (1,)}


def _write(folder, tensors, config):
    import safetensors.torch

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = {_WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}), _CONFIG: json.dumps(config).encode()}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (folder / f"{name}.tmp").write_bytes(content)
        (folder / f"{name}.tmp").replace(folder / name)


def _open(folder, known, accepted):
    """The tensors and the settings of an adapter's folder; one line of what is wrong with it."""
    import safetensors.torch

    folder = pathlib.Path(folder)
    if not (folder / _WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder / 'adapter_model.bin'} is a pickle and is never opened; wanted {_WEIGHTS}")
    try:
        config = dict(json.loads((file := folder / _CONFIG).read_bytes()))
        tensors = safetensors.torch.load((file := folder / _WEIGHTS).read_bytes())
    except Exception as e:  # safetensors has errors of its own
        raise ValueError(f"{file} cannot be read: {e}") from None
    for key, value in {"peft_type": None, **config}.items():
        if key in accepted and value not in accepted[key] and (value or key == "peft_type"):
            raise ValueError(f"{folder / _CONFIG}: {key}={value!r} is not supported; wanted {accepted[key][0]!r}")
        if value and key not in known and key not in accepted:
            raise ValueError(f"{folder / _CONFIG}: option {key}={value!r} is not supported; wanted it off")
    return tensors, config


def _fit(file, tensors, wanted):
    """Raises ValueError unless the tensors have the names and shapes that are wanted."""
    for name in sorted(tensors.keys() | wanted.keys()):
        t, want = tensors.get(name), tuple(wanted.get(name, ()))
        if t is None or name not in wanted or tuple(t.shape) != want or not t.is_floating_point():
            now = "not there" if t is None else f"{t.dtype} {tuple(t.shape)}"
            raise ValueError(f"{file}: {name} is {now}; wanted {want or 'no such tensor'} for this model")


def save_prefix(model, folder):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does, each whole or not at all.

    prompt_embeddings is (P, L 2 Hkv D): for each place in the prefix, each attention's key, then its value."""
    model, prefixes = _prefixes(model)
    kv, (names, tensors) = torch.stack([p.kv() for p in prefixes.values()]), _whole(model, (Prefix, Trunk))
    L, _, Hkv, P, D = kv.shape
    tensors = {f"base_model.{n}": t for n, t in tensors.items()}
    tensors["prompt_embeddings"] = kv.permute(3, 0, 1, 2, 4).flatten(1)  # (L, 2, Hkv, P, D) -> (P, L 2 Hkv D)
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": _TASKS.get(getattr(model.config, "task", None), "CAUSAL_LM"),
        "base_model_name_or_path": getattr(model, "name_or_path", None), "inference_mode": True,
        "num_virtual_tokens": P, "num_layers": L, "num_attention_heads": Hkv, "token_dim": Hkv * D,
        "num_transformer_submodules": 1, "prefix_projection": False, "encoder_hidden_size": Hkv * D,
        "modules_to_save": names or None,
    }  # fmt: skip
    _write(folder, tensors, config | ({"task_type": None, "modules": [*prefixes]} if hasattr(model, "encode") else {}))


@torch.no_grad()
def load_prefix(model, folder):
    """Reads a prefix that save_prefix or PEFT wrote: adds it to a bare model, without an MLP, or makes it the start of
    an adapted one, where an MLP begins anew. Modules saved whole are filled and train. ValueError, and the model is as
    it was: a file is missing, damaged or a pickle; an option is not one of ours; tensors or settings do not fit."""
    model, file = getattr(model, "_orig_mod", model), pathlib.Path(folder) / _WEIGHTS
    tensors, config = _open(folder, _KNOWN, _ACCEPTED)
    tensors, sites = {n.removeprefix("base_model."): t for n, t in tensors.items()}, _sites(model)
    if config.get("modules") not in (None, list(sites)):
        raise ValueError(f"{folder}: made for the attentions {config['modules']}; wanted {list(sites)}")
    adapted, zero = hasattr(model, "prefix_before"), torch.zeros(1, dtype=torch.int64)
    starts = [p.start for p in _prefixes(model)[1].values()] if adapted else [*_read(model, sites, zero).values()]
    L, (_, Hkv, P, D) = len(sites), starts[0].shape
    P = P if adapted else config.get("num_virtual_tokens")
    _check_length(model, P)
    if config.get("num_attention_heads", Hkv) != Hkv:
        raise ValueError(f"{folder}: num_attention_heads={config['num_attention_heads']}; wanted {Hkv} for this model")
    whole = _whole(model, (Prefix, Trunk), config.get("modules_to_save") or ())[1]
    whole |= _whole(model, (Prefix, Trunk))[1] if adapted else {}  # what trains here must be in the file
    _fit(file, tensors, {n: p.shape for n, p in whole.items()} | {"prompt_embeddings": (P, L * 2 * Hkv * D)})
    kv = tensors.pop("prompt_embeddings").view(P, L, 2, Hkv, D).permute(1, 2, 3, 0, 4)  # (L, 2, Hkv, P, D)
    if not adapted:
        _attach(model, dict(zip(sites, kv.to(starts[0]).contiguous(), strict=True)), sites, None)
    for prefix, t in zip(_prefixes(model)[1].values(), kv, strict=True):
        for p in prefix.parameters():  # an MLP's W_2 and b_2, if there are any
            p.zero_()
        prefix.start.copy_(t)
    for name, p in whole.items():
        p.requires_grad_(True).copy_(tensors[name])


if __name__ == "__main__":
    def attend(q, k, v, causal, mask=None, scale=None, dropout=0.0):
        seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        return F.scaled_dot_product_attention(q, k, v, seen)
    class Toy(nn.Module):  # a decoder of one layer
        config, position_offset = type("Config", (), {"vocab_size": 20}), 0
        def __init__(self):
            super().__init__()
            self.words, self.places, self.attention = nn.Embedding(20, 32), nn.Embedding(20, 32), attend
            self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 20)
            self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32))
        def forward(self, ids):
            x = self.words(ids) + self.places.weight[self.position_offset :][: ids.size(1)]  # (B, T, C)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
            x = x + self.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)
            return self.head(x + self.mlp(x))
    def loss(model, low, high):  # 12 places round a dial of 20, by a step from low to high that the second place tells
        ids = (torch.randint(20, (64, 1)) + torch.randint(low, high + 1, (64, 1)) * torch.arange(12)) % 20
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    def train(parameters, steps, low, high):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, low, high).backward()
            optimizer.step()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Toy()
    for model.position_offset in [*range(9)] * 5 + [0]:  # wherever a text begins
        train(model.parameters(), 20, 1, 4)
    print(f"steps of 1 to 4: {loss(model, 1, 4):.3f} nats (ln 4 / 11 at the least); of 3: {loss(model, 3, 3):.3f}")
    for P, mlp in ((1, False), (1, True), (8, False), (8, True)):
        add_prefix(model, P, [0, 3, 6, 9, 12, 15, 18, 1], mlp, hidden=32)
        before = loss(model, 3, 3)
        train(prefix_parameters(model), 100, 3, 3)
        print(f"P = {P}, {P * 64:3} numbers{' by an MLP' * mlp:10}: of 3: {before:.3f} -> {loss(model, 3, 3):.3f}")
        remove_prefix(model)
