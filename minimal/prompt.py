# SPDX-License-Identifier: MIT
"""Prompt tuning: steer a frozen model by a few learnt word vectors that stand before those of the text.

Paper: Lester, Al-Rfou, Constant 2021, arXiv 2104.08691, section 2. With E the embedding of T tokens (T, C) and P_e the
prompt (P, C), of which alone

    [P_e; E] in R^((P + T) x C)      is read by the model as if it were the embedding of P + T tokens

and only P_e trains: P C numbers. (Prefix-tuning trains P 2 Hkv D for each attention, and is stronger on small models.)
It starts from the vectors of real words, which the paper finds best (section 3.2: those of the class labels, else of
the vocabulary): `words`, or some drawn from the vocabulary. At the start the adapted model is therefore exactly one
that has these words before its text, and not the model it was: no vector in front would leave the outputs as they were,
as the softmax gives each some weight.

Departures from the paper, and what else to know:
- A model's method from ids to hidden states (GPT, Llama and BERT: `hidden`; encoder-decoder: `encode`) is wrapped on
  the instance: it puts P ids that stand for the prompt before the others, widens a mask by True and segments by 0, and
  drops the first P outputs. The word embedding knows these ids, which lie far below those of any token.
- So what comes out belongs to the text alone: a loss does not count its first token (PEFT's does, as what the prompt's
  last place says); BERT's [CLS] is read where it stands (PEFT reads the prompt's first place instead); and a decoder
  does not see the prompt of its encoder (T5's does).
- The prompt takes P places: the text begins at position P, and the context is P shorter. A cache takes it up at the
  first call, when it is empty. Documents packed in a row have no place for it.
- The prompt is at least float32, cast to the words' dtype at each call: in half precision Adam's small steps would
  round away. Whatever else requires a gradient trains in full and is saved too: PEFT's modules_to_save.

    add_prompt(model, length=16, words=tokenizer.encode("good bad"))  # turn a fresh head's requires_grad on again
    optimizer = torch.optim.AdamW(prompt_parameters(model), lr=0.1)  # much more than weights want; the paper's: 0.3
    save_prompt(model, "adapter")  # in PEFT's format; load_prompt(model, "adapter") reads ours and PEFT's

Letters: B batch, T tokens, P prompt length, C width, V vocabulary.
"""

import inspect
import json
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

_FIRST = -(1 << 30)  # the id of the prompt's first vector: a wrong id such as -1 or -100 stays an error


class Prompt(nn.Module):
    """The prompt P_e (P, C), the submodule `prompt` of the model, and what it does to two of the model's methods."""

    def __init__(self, P_e, model, method, words):
        super().__init__()
        self.P_e = nn.Parameter(P_e)
        self.hidden, self.words = getattr(model, method), words.forward  # bound methods: the modules are not ours
        self.names = list(inspect.signature(self.hidden).parameters)

    def embed(self, ids):
        """In place of the word embedding: ids (B, T) -> (B, T, C); _FIRST + i stands for the prompt's vector i."""
        at = ids - _FIRST
        ours = at < len(self.P_e)  # (B, T)
        words = self.words(ids.masked_fill(ours, 0))
        P_e = F.embedding(at.masked_fill(~ours, 0), self.P_e.to(words.dtype))
        return torch.where(ours[..., None], P_e, words)

    def run(self, *args, **named):
        """In place of the model's method: the same arguments and, of its outputs, those of the text (B, T, C)."""
        given, P = dict(zip(self.names[: len(args)], args, strict=True)) | named, len(self.P_e)
        if given.get("documents") is not None:
            raise ValueError("documents beside a prompt: wanted one text a row, as the prompt stands before the first")
        ids = given[self.names[0]]
        if given.get("cache") or ids.dim() != 2:  # a cache that holds the prompt; ids that the model will refuse
            return self.hidden(**given)
        for name, value in (("segments", 0), ("mask", True), ("source_mask", True)):
            if given.get(name) is not None:
                given[name] = F.pad(given[name], (P, 0), value=value)  # (B, P + T)
        prompt = torch.arange(_FIRST, _FIRST + P, device=ids.device).expand(len(ids), P)
        return self.hidden(**{**given, self.names[0]: torch.cat((prompt, ids), dim=1)})[:, P:]


def _places(model):
    """The name of the method from ids to hidden states, and the word embedding: the first table, as wide as V."""
    method = "encode" if hasattr(model, "encode") else "hidden"
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if not tables or not hasattr(model, method):
        raise ValueError(f"model={type(model).__name__} has no method hidden or encode, or no nn.Embedding before it")
    return method, tables[0]


def _prompted(model):
    """The unwrapped model; an error if it has no prompt."""
    model = getattr(model, "_orig_mod", model)  # which torch.compile puts around
    if not hasattr(model, "prompt_trainable"):
        raise ValueError(f"model={type(model).__name__} has no prompt; wanted the module that add_prompt was given")
    return model


# Same as minimal/prefix.py: _check_length
def _check_length(model, length):
    context = min(getattr(model.config, n, 1 << 30) for n in ("n_positions", "max_position_embeddings", "max_len"))
    if type(length) is not int or not 1 <= length < context:
        raise ValueError(f"length={length!r} does not fit; wanted a whole number from 1, below the context, {context}")


def _attach(model, P_e):
    method, words = _places(model)
    model.prompt_trainable = {name for name, p in model.named_parameters() if p.requires_grad}  # for remove_prompt
    model.requires_grad_(False)
    P_e = P_e.to(words.weight.device, torch.promote_types(words.weight.dtype, torch.float32))
    model.prompt = Prompt(P_e, model, method, words).train(model.training)
    setattr(model, method, model.prompt.run)
    words.forward = model.prompt.embed


def add_prompt(model, length=16, words=None):
    """Freezes the model and puts a prompt before what it reads, in place; returns the shape of the prompt, (P, C).

    length: P. words: token ids, int64 (N,) or a list, whose vectors the prompt starts from: repeated, or cut off, to P;
    None: drawn from the vocabulary, each equally likely. ValueError: a prompt is there already, the model has no method
    that can be wrapped, length < 1 or not shorter than the context, words that are no tokens."""
    model = getattr(model, "_orig_mod", model)
    table = _places(model)[1].weight.detach()  # (V, C)
    if hasattr(model, "prompt_trainable"):
        raise ValueError(f"model={type(model).__name__} already has a prompt; wanted remove_prompt first")
    _check_length(model, length)
    V = model.config.vocab_size
    words = torch.randint(V, (length,)) if words is None else torch.as_tensor(words)
    if words.dim() != 1 or not len(words) or words.is_floating_point() or not 0 <= words.min() <= words.max() < V:
        raise ValueError(f"words={words.tolist()} are no tokens; wanted one or more ids of 0 to {V - 1}")
    _attach(model, table[words.to(table.device).repeat(-(-length // len(words)))[:length]])
    return tuple(model.prompt.P_e.shape)


def prompt_parameters(model):
    """A list of all parameters that train: the prompt, and what else requires a gradient.

    ValueError: no prompt, or one cast to half precision (cast the model before add_prompt)."""
    model = _prompted(model)
    if model.prompt.P_e.dtype in (torch.float16, torch.bfloat16):
        raise ValueError("model was cast to half precision after add_prompt, its prompt too; wanted it cast before")
    return [p for p in model.parameters() if p.requires_grad]


def remove_prompt(model):
    """Takes the prompt away: all but what trained in full, and each requires_grad, is as it was before add_prompt."""
    model = _prompted(model)
    method, words = _places(model)
    del vars(model)[method], words.forward
    for name, p in model.named_parameters():
        p.requires_grad_(name in model.prompt_trainable)
    del model.prompt, model.prompt_trainable


# Same as minimal/prefix.py: _whole
def _whole(model, own, names=None):
    """What trains in full beside the parameters of `own` modules, or is in the modules named: their names, tensors."""
    own = {id(p) for m in model.modules() if isinstance(m, own) for p in m.parameters()}
    other = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in own}
    if names is None:
        names = sorted({n.rpartition(".")[0] for n, p in other.items() if p.requires_grad})
    return names, {n: p for n, p in other.items() if f".{n}".rpartition(".")[0].endswith(tuple(f".{m}" for m in names))}


_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
_TASKS = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "qa": "QUESTION_ANS", "pretrain": "FEATURE_EXTRACTION"}  # BERT's
# PEFT's options that load_prompt follows, or that change no result of what is saved.
_KNOWN = set("num_virtual_tokens num_layers num_attention_heads token_dim modules_to_save task_type revision "
             "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs inference_mode "
             "base_model_name_or_path auto_mapping peft_version".split())  # fmt: skip
_ACCEPTED = {"peft_type": ("PROMPT_TUNING",), "num_transformer_submodules": (1,)}


# Same as minimal/prefix.py: _write
def _write(folder, tensors, config):
    import safetensors.torch

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = {_WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}), _CONFIG: json.dumps(config).encode()}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (folder / f"{name}.tmp").write_bytes(content)
        (folder / f"{name}.tmp").replace(folder / name)


# Same as minimal/prefix.py: _open
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


# Same as minimal/prefix.py: _fit
def _fit(file, tensors, wanted):
    """Raises ValueError unless the tensors have the names and shapes that are wanted."""
    for name in sorted(tensors.keys() | wanted.keys()):
        t, want = tensors.get(name), tuple(wanted.get(name, ()))
        if t is None or name not in wanted or tuple(t.shape) != want or not t.is_floating_point():
            now = "not there" if t is None else f"{t.dtype} {tuple(t.shape)}"
            raise ValueError(f"{file}: {name} is {now}; wanted {want or 'no such tensor'} for this model")


def save_prompt(model, folder):
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does: prompt_embeddings is P_e, (P, C)."""
    model, config = _prompted(model), model.config
    names, tensors = _whole(model, Prompt)
    P, C = model.prompt.P_e.shape
    layers = [getattr(config, n) for n in ("n_layer", "num_hidden_layers", "n_encoder") if hasattr(config, n)]
    heads = [getattr(config, n) for n in ("n_head", "num_attention_heads") if hasattr(config, n)]
    task = None if hasattr(model, "encode") else _TASKS.get(getattr(config, "task", None), "CAUSAL_LM")
    _write(folder, {f"base_model.{n}": t for n, t in tensors.items()} | {"prompt_embeddings": model.prompt.P_e}, {
        "peft_type": "PROMPT_TUNING", "task_type": task, "prompt_tuning_init": "RANDOM", "inference_mode": True,
        "base_model_name_or_path": getattr(model, "name_or_path", None), "modules_to_save": names or None,
        "num_virtual_tokens": P, "token_dim": C, "num_transformer_submodules": 1,
        "num_layers": (layers or [None])[0], "num_attention_heads": (heads or [None])[0],
    })  # fmt: skip


@torch.no_grad()
def load_prompt(model, folder):
    """Reads a prompt that save_prompt or PEFT wrote: adds it to a bare model, or fills that of an adapted one.

    Modules saved whole are filled and train. ValueError, and the model is as it was: a file is missing, damaged or a
    pickle; an option is not one of ours; tensors or settings do not fit."""
    model, file = getattr(model, "_orig_mod", model), pathlib.Path(folder) / _WEIGHTS
    tensors, config = _open(folder, _KNOWN, _ACCEPTED)
    tensors = {n.removeprefix("base_model."): t for n, t in tensors.items()}
    adapted = hasattr(model, "prompt_trainable")
    P, C = model.prompt.P_e.shape if adapted else (config.get("num_virtual_tokens"), _places(model)[1].embedding_dim)
    _check_length(model, P)
    whole = _whole(model, Prompt, config.get("modules_to_save") or ())[1]
    whole |= _whole(model, Prompt)[1] if adapted else {}  # what trains here must be in the file
    _fit(file, tensors, {n: p.shape for n, p in whole.items()} | {"prompt_embeddings": (P, C)})
    if not adapted:
        _attach(model, tensors["prompt_embeddings"])
    model.prompt.P_e.copy_(tensors["prompt_embeddings"])
    for name, p in whole.items():
        p.requires_grad_(True).copy_(tensors[name])


if __name__ == "__main__":
    class Toy(nn.Module):  # a decoder of one layer
        config, position_offset = type("Config", (), {"vocab_size": 20}), 0
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(20, 32), nn.Embedding(20, 32)
            self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 20)
            self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32))
        def hidden(self, ids, cache=None):
            x = self.words(ids) + self.places.weight[self.position_offset :][: ids.size(1)]  # (B, T, C)
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            return x + self.mlp(x)
        def forward(self, ids):
            return self.head(self.hidden(ids))
    def loss(model, low, high):  # 12 places round a dial of 20, by a step from low to high that the second place tells
        ids = (torch.randint(20, (64, 1)) + torch.randint(low, high + 1, (64, 1)) * torch.arange(12)) % 20
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    def train(parameters, steps, low, high, rate):
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, low, high).backward()
            optimizer.step()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Toy()
    for model.position_offset in [*range(9)] * 5 + [0]:  # wherever a text begins
        train(model.parameters(), 20, 1, 4, 1e-2)
    print(f"steps of 1 to 4: {loss(model, 1, 4):.3f} nats (ln 4 / 11 at the least); of 3: {loss(model, 3, 3):.3f}")
    model.position_offset = 0
    for P in 1, 4, 8:
        for words in [0, 3, 6, 9, 12, 15, 18, 1], None:
            add_prompt(model, P, words)
            before = loss(model, 3, 3)
            train(prompt_parameters(model), 100, 3, 3, 0.1)
            start = "words that count by 3" if words else "words drawn at random"
            print(f"P = {P}, {P * 32:3} numbers from {start}: of 3: {before:.3f} -> {loss(model, 3, 3):.3f}")
            remove_prompt(model)
