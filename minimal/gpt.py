# SPDX-License-Identifier: MIT
"""GPT-2: a decoder-only transformer that predicts the next token, in one file, with Hugging Face's names and weights.

Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised Multitask Learners" (2019, no arXiv id),
with Hendrycks & Gimpel's GELU (2016, 1606.08415) and Press & Wolf's tied head (2016, 1608.05859). With E the token
embedding, W_p the learned positions, LN the layer norm and one head of the attention shown:

    h_0     = E[ids] + W_p[0..T-1]
    a_l     = h_{l-1} + Attention(LN_1(h_{l-1}))           Attention(x) = softmax(Q K^T / sqrt(D) + causal) V W_o
    h_l     = a_l + MLP(LN_2(a_l))                         MLP(x) = GELU(x W_1 + b_1) W_2 + b_2,  GELU in its tanh form
    logits  = LN_f(h_L) E^T                                the head is the embedding itself (tied)
    loss    = - sum_t ln softmax(logits_t)[ids_{t+1}]      a sum and a count, divided once by whoever trains

    parameters = V C + P C + L (12 C^2 + 13 C) + 2 C       GPT-2 small: 124,439,808

Departures: one dropout rate for the three places where GPT-2 has one each; positions start from N(0, 0.02^2) like every
other matrix (OpenAI's code starts them from 0.01); weights are kept as nn.Linear has them, (out, in), and transposed to
GPT-2's (in, out) when saved and loaded; they are loaded as float32, whatever the file holds.

    model = GPT(GPTConfig(vocab_size=65, n_positions=64, n_embd=128, n_layer=4, n_head=4, dropout=0.0))
    loss, count = model.loss(ids);  (loss / count).backward()
    model.save_pretrained("out");   model = GPT.from_pretrained("out")      # transformers opens the folder too

Letters: B batch, T new tokens, S cached + new, H heads, D head size, C = H D, V vocabulary, P context, L layers.
"""

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# Same as minimal/attention.py: torch_attention
def torch_attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """Attention by PyTorch's kernels: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) -> (B,H,Tq,Dv); see that file."""
    Tq, Tk = q.shape[2], k.shape[2]
    causal = causal if Tq > 1 else False  # a lone query is the last token: it sees every key
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # PyTorch fails on a mask of 1 dim, and takes a slow path on 3
        if mask.is_floating_point():
            mask = mask.to(q.dtype)  # a float32 mask on float64 q passes PyTorch's check and is then misread on the CPU
    if causal and (mask is not None or Tq != Tk):  # is_causal is aligned top-left, and refuses a mask beside it
        seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)  # (Tq, Tk)
        if mask is None:
            mask = seen
        else:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
        causal = False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)


_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


@dataclass
class GPTConfig:
    """Sizes of the model; the defaults are GPT-2 small, the names are those of Hugging Face's GPT2Config."""

    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_positions: int = 1024  # the context: positions are learned, so nothing longer can be asked
    n_embd: int = 768  # C; 64 per head, as in every GPT-2
    n_layer: int = 12  # the four GPT-2s have 12, 24, 36, 48
    n_head: int = 12  # H; n_embd must divide into it
    dropout: float = 0.1  # after the embedding, on the attention weights, on both branches; 0.0 when data is plenty
    layer_norm_epsilon: float = 1e-5  # GPT-2's; the weights were trained with it
    eos_token_id: int | None = None  # written to config.json, so that other programs stop where this model should

    def __post_init__(self):
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}: wanted a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd}: wanted a multiple of n_head = {self.n_head}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout!r}: wanted a number from 0 up to, not including, 1")
        if not isinstance(self.layer_norm_epsilon, (int, float)) or not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon = {self.layer_norm_epsilon!r}: wanted a number above 0")


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and at the tokens before it."""

    def __init__(self, config, attention):
        super().__init__()
        self.config, self.attention = config, attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=0, mask=None):
        (B, T, C), H = x.shape, self.config.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in (q, k, v))  # 3 x (B, H, T, D), views: no copy
        if hasattr(cache, "write"):  # buffers with room, such as StaticCache of minimal/generate.py
            k, v = cache.write(layer, k, v)  # 2 x (B, H, S, D)
        elif cache is not None:
            if layer < len(cache):
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[layer], (k, v), strict=True))  # 2 x (B, H, S, D)
            cache[layer : layer + 1] = [(k, v)]  # replaces the entry, or appends the first one
        p = self.config.dropout if self.training else 0.0
        y = self.attention(q, k, v, causal=True, mask=mask, dropout=p)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C), heads side by side
        return F.dropout(self.c_proj(y), p)


class MLP(nn.Module):
    """Two products with a GELU between them, the same at every position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised, so gradients reach every layer undiminished."""

    def __init__(self, config, attention):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, attention)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0, mask=None):
        x = x + self.attn(self.ln_1(x), cache, layer, mask)
        return x + self.mlp(self.ln_2(x))


def apart(documents, past=0):
    """Documents packed into one row, int64 (B, S), a number each: of all tokens but the first `past`, positions (B, T),
    which restart at 0 with each document, and the mask (B, 1, T, S) within it. A document is a run of one number."""
    at = torch.arange(documents.size(1), device=documents.device)  # (S,)
    first = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)  # (B, S)
    number, positions = first.cumsum(1), at - (at * first).cummax(1).values  # (B, S), (B, S)
    return positions[:, past:], (number[:, past:, None] == number[:, None])[:, None]


class GPT(nn.Module):
    """GPT-2 with its language-model head. attention: a callable of torch_attention's contract, such as a fused one.

    `model.config.dropout` is read at every call. position_offset counts the places that a prefix takes before the text.
    """

    def __init__(self, config, attention=torch_attention):
        super().__init__()
        self.config, self.position_offset = config, 0
        self.transformer = nn.Module()  # a name and no more: the one under which GPT-2's weights are published
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():  # a tied tensor is named once
            if p.dim() == 2:  # 2 n_layer branches add into the residual stream: its variance shall not grow with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache=None, documents=None):
        """Logits (B, T, V) for the token after each of `ids`, int64 (B, T).

        cache: None, or a list that the caller owns: `[]` at first; each call extends its one (k, v) per layer, each
        (B, H, S, D), and takes positions from their length on. documents: (B, S), see `apart`; padding on the left is
        one too. Raises ValueError for other shapes and when S > n_positions.
        """
        return self.lm_head(self.hidden(ids, cache, documents))  # (B,T,C) x (V,C) -> (B,T,V)

    def hidden(self, ids, cache=None, documents=None):
        """What the head reads, (B, T, C); arguments as in `forward`."""
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: wanted token ids of shape (batch, tokens)")
        (B, T), past, P = ids.shape, cache[0][0].size(2) if cache else 0, self.config.n_positions
        if documents is not None and documents.shape != (B, past + T):
            raise ValueError(f"documents of shape {tuple(documents.shape)}: wanted {(B, past + T)}, cached tokens too")
        if (before := self.position_offset + past) + T > P:
            raise ValueError(f"ids: {before} cached + {T} new tokens do not fit the context, n_positions = {P}")
        t, mask = (past + torch.arange(T, device=ids.device), None) if documents is None else apart(documents, past)
        x = self.transformer.wte(ids) + self.transformer.wpe(self.position_offset + t)  # (B,T,C) + (T,C) or (B,T,C)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer, mask)
        return self.transformer.ln_f(x)

    def states(self, ids, labels=None, documents=None):
        """What the head reads, hidden (B T, C), and the tokens it shall give, targets (B T,), -100 where none counts.
        ids, documents: int64 (B, T+1), as in `forward`. labels: likewise, labels[t] is the token at t, -100 where it
        does not count; default ids. The shift happens here and nowhere else."""
        labels, documents = ids if labels is None else labels, None if documents is None else documents[:, :-1]
        if labels.shape != ids.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: wanted that of ids, {tuple(ids.shape)}")
        return self.hidden(ids[:, :-1], None, documents).flatten(0, 1), labels[:, 1:].flatten()

    def outputs(self, ids, labels=None, documents=None):
        """What the loss compares: logits (B T, V), targets (B T,), and hidden (B T, C); arguments as in `states`."""
        hidden, targets = self.states(ids, labels, documents)
        return self.lm_head(hidden), targets, hidden

    def loss(self, ids, labels=None, documents=None, label_smoothing=0.0):
        """Cross-entropy summed over the next tokens (nats, float32 or wider; 0 of none), and their number (int64)."""
        logits, targets, _ = self.outputs(ids, labels, documents)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum in bfloat16 keeps three digits
        total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)  # without the -100
        return total, (targets != -100).sum()

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in Hugging Face's GPT-2 layout; a failed write changes no file.

        Raises ValueError when the model's tensors are not GPT-2's (an adapter: merge or remove it first)."""
        safetensors, c, tensors = _safetensors(), self.config, self.state_dict()
        with torch.device("meta"):
            _same_names("the model", tensors, GPT(c).state_dict())
        if not torch.equal(tensors.pop("lm_head.weight"), tensors["transformer.wte.weight"]):
            raise ValueError("lm_head.weight differs from transformer.wte.weight, wanted a tied head")
        tensors = {n: (t.t() if n.endswith(_CONV1D) else t).contiguous() for n, t in tensors.items()}
        settings = {
            "architectures": ["GPT2LMHeadModel"],
            **{name: getattr(c, name) for name in (*_SIZES, "layer_norm_epsilon", "eos_token_id")},
            "bos_token_id": c.eos_token_id,  # GPT-2's one special token both begins and ends a document
            **(dict.fromkeys(_DROPOUTS, c.dropout) | _FIXED),
            "torch_dtype": str(self.transformer.wte.weight.dtype).removeprefix("torch."),
        }
        beside = Path(folder) / "model.safetensors.tmp", Path(folder) / "config.json.tmp"
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            safetensors.torch.save_file(tensors, beside[0], {"format": "pt"})  # transformers refuses files without it
            beside[1].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            beside[0].chmod(beside[1].stat().st_mode)  # safetensors lets the owner alone read
            for path in beside:
                os.replace(path, path.with_suffix(""))
        finally:
            for path in beside:
                path.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder, attention=torch_attention):
        """Read a folder in Hugging Face's GPT-2 layout: the model in float32, on the CPU, in eval mode.

        Raises ValueError in one line that names the file and what is wrong in it. Pickles are never opened."""
        safetensors, path = _safetensors(), Path(folder) / "model.safetensors"
        config = _read_config(Path(folder) / "config.json")
        with torch.device("meta"):  # names and shapes without memory: the numbers come from the file
            model = cls(config, attention)
        state, expected = {}, model.state_dict()
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # Published files have names with and without the prefix; old ones also keep the causal mask.
                    ours = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
                    if not ours.endswith((".attn.bias", ".attn.masked_bias")):
                        state[ours] = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file, the one kind opened ({error})") from None
        head = state.setdefault("lm_head.weight", state.get("transformer.wte.weight"))
        _same_names(path, state, expected)
        for name, t in state.items():
            shape = expected[name].t().shape if name.endswith(_CONV1D) else expected[name].shape
            if t.shape != shape or not t.is_floating_point():
                raise ValueError(f"{path}: {name} is {t.dtype} {tuple(t.shape)}, wanted floating point {tuple(shape)}")
            state[name] = (t.t() if name.endswith(_CONV1D) else t).to(torch.float32, copy=True).contiguous()
        if not torch.equal(head, state["transformer.wte.weight"].to(head.dtype)):
            raise ValueError(f"{path}: lm_head.weight differs from transformer.wte.weight, wanted a tied head")
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model.eval()


_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_FIXED = {  # what this file computes: config.json says so when written, and must not say otherwise when read
    "model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # GPT-2 keeps (in, out)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("weights are read and written with safetensors: pip install safetensors") from None
    return safetensors

def _same_names(what, have, want):
    for kind, names in (("missing", want.keys() - have.keys()), ("unexpected", have.keys() - want.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{what}: {kind} tensors {some}; wanted those of GPT-2 and no others")


def _read_config(path):
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(c, dict):
            raise ValueError(f"{c!r}, wanted an object")
        if c.get("n_inner") == 4 * c.get("n_embd", 0):
            c["n_inner"] = None
        for name, value in _FIXED.items():
            if c.get(name, value) != value:
                raise ValueError(f"{name} = {c[name]!r}, wanted {value!r}")
        for name in _SIZES:
            if name not in c:
                raise ValueError(f"{name} is missing")
        rates = [c.get(name, 0.1) for name in _DROPOUTS]
        if rates.count(rates[0]) < 3:
            warnings.warn(f"{path}: dropout rates {rates}: training will use the first everywhere", stacklevel=3)
        epsilon, sizes = c.get("layer_norm_epsilon", 1e-5), {name: c[name] for name in _SIZES}
        return GPTConfig(**sizes, dropout=rates[0], layer_norm_epsilon=epsilon, eos_token_id=c.get("eos_token_id"))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model is slower when shared out
    text = "a model of language gives a number to every next token, and the loss says how surprised it was. " * 2
    ids = torch.tensor([[(letters := sorted(set(text))).index(ch) for ch in text]])  # (1, T+1)
    model = GPT(GPTConfig(len(letters), n_positions=256, n_embd=64, n_layer=2, n_head=4, dropout=0.0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f"{len(letters)} letters: knowing nothing costs ln V = {math.log(len(letters)):.4f} nats a token")
    for step in range(101):
        total, count = model.loss(ids)
        if step % 25 == 0:
            print(f"step {step:3d}: {total / count:.4f} nats a token")
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    with torch.no_grad():
        cached, cache, new = ids[:, :20], [], ids[:, :20]
        for _ in range(60):
            new = model(new, cache)[:, -1:].argmax(-1)  # reads one token, looks back into the cache
            cached = torch.cat((cached, new), dim=1)
        print("greedy:", "".join(letters[i] for i in cached[0]))
        print("the same without a cache:", torch.equal(model(cached)[:, 19:-1].argmax(-1), cached[:, 20:]))
