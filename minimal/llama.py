# SPDX-License-Identifier: MIT
"""Llama: the decoder that most open models share, in one file, with Hugging Face's names and weights.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023, 2302.13971), with Zhang & Sennrich's
RMSNorm (2019, 1910.07467), Su et al.'s rotary positions (2021, 2104.09864), Shazeer's SwiGLU (2020, 2002.05202) and
Ainslie et al.'s grouped queries (2023, 2305.13245). No matrix has a bias; one head of the attention shown:

    h_0     = E[ids]                                   RMSNorm(x) = g x / sqrt(mean(x^2) + eps)
    a_l     = h_{l-1} + Attention(RMSNorm(h_{l-1}))    Attention(x) = softmax(R Q (R K)^T / sqrt(D) + causal) V W_o
    h_l     = a_l + MLP(RMSNorm(a_l))                  MLP(x) = (SiLU(x W_gate) * x W_up) W_down
    logits  = RMSNorm(h_L) W^T                         W is E where the head is tied
    R turns pair i of a head by t theta^(-2i/D), t its position: q . k then depends on the distance of the two only
    parameters = V C (2 V C untied) + L (2 H D C + 2 Hkv D C + 3 C F + 2 C) + C        SmolLM2-135M: 134,515,008

Departures: a pair is (x[i], x[i + D/2]), as in Hugging Face's weights; Llama 3.1's frequencies; GPT-2's dropout.

    model = Llama(LlamaConfig(65, 128, 344, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    loss, count = model.loss(ids);  (loss / count).backward();  model.save_pretrained("out")
    model = Llama.from_pretrained("out")  # or Llama.from_tensors(*read_llama("x.gguf")), of minimal/gguf_llama.py

Letters: B batch, T new tokens, S cached + new, H query heads, Hkv key-value heads, D head size, C width, F the MLP's
width, V vocabulary, P context, L layers.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
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


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
_SCALED = {"linear": ("factor",),
           "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}  # fmt: skip
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what is computed


@dataclass
class LlamaConfig:
    """Sizes of the model; names and defaults are those of Hugging Face's LlamaConfig (the first Llama, 7B)."""

    vocab_size: int = 32000
    hidden_size: int = 4096  # C
    intermediate_size: int = 11008  # F, about 8/3 C: three matrices of it weigh what GELU's two of 4 C do
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H, divides C
    num_key_value_heads: int | None = None  # Hkv, divides H: the cache shrinks by H / Hkv; None: H
    head_dim: int | None = None  # D, even; None: C / H
    max_position_embeddings: int = 2048  # the context
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # larger for longer contexts: the slowest pair must not come round within one
    rope_scaling: dict | None = None  # {"rope_type": "llama3" or "linear", ...}: stretches the context a model learnt
    tie_word_embeddings: bool = False  # small models tie: SmolLM2-135M's embedding is a fifth of it
    bos_token_id: int | None = None  # written to config.json, as the next one, for other programs
    eos_token_id: int | None = None
    dropout: float = 0.0  # after the embedding, on the attention weights, on both branches
    other_eos_token_ids: tuple = ()  # where config.json lists several: those after the first, kept for saving

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in _SIZES:
            if name == "head_dim" and self.head_dim is None:
                self.head_dim = self.hidden_size // self.num_attention_heads
            if type(x := getattr(self, name)) is not int or not 1 <= x < 2**31:
                raise ValueError(f"{name} = {x!r}: wanted a whole number of at least 1")
        for name, least, bound in (("rms_norm_eps", 0, 1), ("rope_theta", 1, math.inf), ("dropout", 0, 1)):
            if type(x := getattr(self, name)) not in (int, float) or not least <= x < bound:
                raise ValueError(f"{name} = {x!r}: wanted a number from {least} up to, not including, {bound}")
        C, H, Hkv, D = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if C % H or H % Hkv or D % 2:
            raise ValueError(f"hidden_size, num_attention_heads, num_key_value_heads = {C}, {H}, {Hkv}: wanted each a "
                             f"multiple of the next, and an even head_dim, not {D}")  # fmt: skip
        s = self.rope_scaling or {"type": "default"}
        if (kind := str(s.get("rope_type", s.get("type")))) != "default":
            s = {name: s.get(name) for name in _SCALED.get(kind, ())}
            good = s and all(type(x) in (int, float) and 0 < x < math.inf for x in s.values())
            if not good or s.get("low_freq_factor", 0) >= s.get("high_freq_factor", 1):
                raise ValueError(f"rope_scaling of type {kind!r}, {s}: wanted llama3 or linear, above 0, low < high")
        self.rope_scaling = None if kind == "default" else {"rope_type": kind, **s}


def rotary_frequencies(config, dtype=torch.float32, device=None):
    """Radians that each pair turns per position, (D/2,): theta^(-2i/D), slowed down as config.rope_scaling says."""
    D, s, keep = config.head_dim, config.rope_scaling or {"factor": 1.0}, 0.0
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=dtype, device=device) / D)
    if "low_freq_factor" in s:
        # Llama 3.1: a pair that turns less than low_freq_factor times in the old context would meet angles never seen.
        turns = frequency * s["original_max_position_embeddings"] / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return frequency * (keep + (1 - keep) / s["factor"])


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and at those before it; H / Hkv query heads share one key-value head."""

    def __init__(self, config, attention):
        super().__init__()
        self.config, self.attention, C, D = config, attention, config.hidden_size, config.head_dim
        H, Hkv = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.o_proj = nn.Linear(C, H * D, bias=False), nn.Linear(H * D, C, bias=False)
        self.k_proj, self.v_proj = nn.Linear(C, Hkv * D, bias=False), nn.Linear(C, Hkv * D, bias=False)

    def forward(self, x, angles, cache=None, layer=0, mask=None):
        (cos, sin), D = angles, self.config.head_dim
        q, k, v = (f(x).unflatten(2, (-1, D)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        halves = (t.to(cos.dtype).chunk(2, dim=-1) for t in (q, k))  # of q (B, H, T, D) and k (B, Hkv, T, D), as v is
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(v.dtype) for a, b in halves)  # R q, R k
        if hasattr(cache, "write"):  # buffers with room, such as StaticCache of minimal/generate.py
            k, v = cache.write(layer, k, v)  # 2 x (B, Hkv, S, D)
        elif cache is not None:
            if layer < len(cache):
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[layer], (k, v), strict=True))  # (B, Hkv, S, D)
            cache[layer : layer + 1] = [(k, v)]  # replaces the entry, or appends the first one
        p = self.config.dropout if self.training else 0.0
        y = self.attention(q, k, v, causal=True, mask=mask, dropout=p)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, H D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): one product opens and closes the other, the same at every position."""

    def __init__(self, C, width):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(C, width, bias=False), nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised, so gradients reach every layer undiminished."""

    def __init__(self, config, attention):
        super().__init__()
        self.config, C, eps = config, config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.self_attn = nn.RMSNorm(C, eps), CausalSelfAttention(config, attention)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(C, eps), MLP(C, config.intermediate_size)

    def forward(self, x, angles, cache=None, layer=0, mask=None):
        p = self.config.dropout if self.training else 0.0
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), angles, cache, layer, mask), p)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), p)


# Same as minimal/gpt.py: apart
def apart(documents, past=0):
    """Documents packed into one row, int64 (B, S), a number each: positions (B, T) and mask (B, 1, T, S); see there."""
    at = torch.arange(documents.size(1), device=documents.device)  # (S,)
    first = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)  # (B, S)
    number, positions = first.cumsum(1), at - (at * first).cummax(1).values  # (B, S), (B, S)
    return positions[:, past:], (number[:, past:, None] == number[:, None])[:, None]


class Llama(nn.Module):
    """Llama with its language-model head. attention: a callable of torch_attention's contract, such as a fused one.
    `model.config.dropout` is read at every call. position_offset: the places that a prefix takes before the text."""

    def __init__(self, config, attention=torch_attention):
        super().__init__()
        self.config, self.position_offset = config, 0
        self.model = nn.Module()  # a name and no more: the one under which Llama's weights are published
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, attention) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # 2 L branches add into the residual stream: its variance shall not grow with depth
                branches = 2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(branches))

    def forward(self, ids, cache=None, documents=None):
        """Logits (B, T, V) for the token after each of `ids`, int64 (B, T). cache: None, or the caller's own list, `[]`
        at first; each call extends its one (k, v) per layer, each (B, Hkv, S, D), and counts on from its length.
        documents: (B, S), see `apart`; padding on the left is one too. ValueError: other shapes, S > P."""
        return self.lm_head(self.hidden(ids, cache, documents))  # (B,T,C) x (V,C) -> (B,T,V)

    def hidden(self, ids, cache=None, documents=None):
        """What the head reads, (B, T, C); arguments as in `forward`."""
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: wanted token ids of shape (batch, tokens)")
        (B, T), past, P = ids.shape, cache[0][0].size(2) if cache else 0, self.config.max_position_embeddings
        if documents is not None and documents.shape != (B, past + T):
            raise ValueError(f"documents of shape {tuple(documents.shape)}: wanted {(B, past + T)}, cached tokens too")
        if (before := self.position_offset + past) + T > P:
            raise ValueError(f"ids: {before} cached + {T} new tokens do not fit max_position_embeddings = {P}")
        t, mask = (past + torch.arange(T, device=ids.device), None) if documents is None else apart(documents, past)
        x = F.dropout(self.model.embed_tokens(ids), self.config.dropout, self.training)  # (B, T, C)
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot tell position 256 from 257
        angle = (self.position_offset + t).to(wide)[..., None] * rotary_frequencies(self.config, wide, ids.device)
        angles = angle.unsqueeze(-3).cos(), angle.unsqueeze(-3).sin()  # (1, T, D/2) or (B, 1, T, D/2): as every head's
        for layer, block in enumerate(self.model.layers):
            x = block(x, angles, cache, layer, mask)
        return self.model.norm(x)

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

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors as Hugging Face, or no file; ValueError: adapters not merged yet."""
        import safetensors.torch
        c, tensors = self.config, self.state_dict()
        with torch.device("meta"):
            _same_names("the model: ", tensors, Llama(c).state_dict())
        if c.tie_word_embeddings and not torch.equal(tensors.pop("lm_head.weight"), self.model.embed_tokens.weight):
            raise ValueError("lm_head.weight differs from model.embed_tokens.weight, wanted a tied head")
        ends, dtype = [c.eos_token_id, *c.other_eos_token_ids], str(self.model.norm.weight.dtype)
        settings = asdict(c) | _FIXED | {"architectures": ["LlamaForCausalLM"], "attention_dropout": c.dropout}
        settings |= {"eos_token_id": ends if ends[1:] else ends[0], "torch_dtype": dtype.removeprefix("torch.")}
        del settings["dropout"], settings["other_eos_token_ids"]
        beside = Path(folder) / "model.safetensors.tmp", Path(folder) / "config.json.tmp"
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, beside[0], {"format": "pt"})
            beside[1].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            beside[0].chmod(beside[1].stat().st_mode)  # safetensors lets the owner alone read
            for path in beside:
                path.replace(path.with_suffix(""))
        finally:
            for path in beside:
                path.unlink(missing_ok=True)

    @classmethod
    def from_tensors(cls, config, tensors, attention=torch_attention, where="the tensors", copy=True):
        """The model, in eval mode, of a dict as in config.json and {Hugging Face's name: tensor}: as float32, copied or
        with copy=False shared where it is that (on meta too). Raises ValueError, one line that begins with `where`."""
        try:
            c, state = _config(config), dict(tensors)
            with torch.device("meta"):  # names and shapes without memory, and few if a number is damaged
                model = cls(replace(c, num_hidden_layers=min(c.num_hidden_layers, len(state) // 9 + 1)), attention)
            if c.tie_word_embeddings:
                state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
            _same_names("", state, expected := model.state_dict())
            for name, t in state.items():
                if t.shape != (shape := expected[name].shape) or not t.is_floating_point():
                    raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}, wanted floating point {tuple(shape)}")
                state[name] = t.to(torch.float32, copy=copy).contiguous()
            model.load_state_dict(state, assign=True)
            if c.tie_word_embeddings:
                embed = model.model.embed_tokens.weight
                if "lm_head.weight" in tensors and not torch.equal(model.lm_head.weight, embed):
                    raise ValueError("lm_head.weight differs from model.embed_tokens.weight, wanted a tied head")
                model.lm_head.weight = embed
            return model.eval()
        except Exception as error:
            raise _in_one_line(where, error) from None

    @classmethod
    def from_pretrained(cls, folder, attention=torch_attention):
        """Read a folder of Hugging Face's Llama layout, shards too: the model in float32, on the CPU, in eval mode.
        Raises ValueError in one line that names the file and what is wrong in it. Pickles are never opened."""
        import safetensors
        folder, tensors = Path(folder), {}
        try:
            if (path := folder).suffix == ".gguf":
                raise ValueError("read it with minimal/gguf_llama.py: Llama.from_tensors(*read_llama(path))")
            config = json.loads((path := folder / "config.json").read_text(encoding="utf-8"))
            _config(config)  # its errors come first, and with this file's name
            files = [where := folder / "model.safetensors"]
            if not where.exists() and (index := folder / "model.safetensors.index.json").exists():
                listed = json.loads((path := index).read_text(encoding="utf-8"))["weight_map"].values()
                where, files = index, sorted({folder / Path(name).name for name in listed})
            for path in files:
                if not path.is_file():
                    raise ValueError("no such file, and no other kind of weights is opened")
                with safetensors.safe_open(path, framework="pt") as file:  # old ones also keep the frequencies
                    tensors |= {n: file.get_tensor(n).clone() for n in file.keys() if not n.endswith(".inv_freq")}
        except Exception as error:
            raise _in_one_line(path, error) from None
        return cls.from_tensors(config, tensors, attention, where, copy=False)


def _in_one_line(where, error):  # libraries raise all kinds on damaged bytes; a name in a file may hold line ends
    said = str(error) if isinstance(error, ValueError) else f"unreadable ({type(error).__name__}: {error})"
    return ValueError("".join(c if c.isprintable() else " " for c in f"{where}: {said}"[:600]))


def _same_names(what, have, want):
    for kind, names in (("missing", want.keys() - have.keys()), ("unexpected", have.keys() - want.keys())):
        if names:
            raise ValueError(f"{what}{kind} tensors, among them {', '.join(sorted(names)[:3])}; wanted Llama's alone")


def _config(c):
    """What config.json says -> LlamaConfig."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # as transformers writes it from 5 on, and before
    c = dict.fromkeys(("model_type", *_SIZES[:5])) | c | rope
    for name, value in (_FIXED | {"partial_rotary_factor": 1.0, "quantization_config": None}).items():
        if c.get(name, value) != value:
            raise ValueError(f"{name} = {c[name]!r}, wanted {value!r}")
    eos, *others = eos if isinstance(eos := c.get("eos_token_id"), list) and eos else [eos]
    c |= {"eos_token_id": eos, "other_eos_token_ids": tuple(others), "dropout": c.get("attention_dropout", 0.0)}
    old = {"type": "default", "original_max_position_embeddings": c.get("max_position_embeddings")}
    return LlamaConfig(**{f.name: c[f.name] for f in fields(LlamaConfig) if f.name in c} | {"rope_scaling": old | rope})


if __name__ == "__main__":
    ids = torch.randint(65, (1, 40), generator=torch.manual_seed(0))
    for heads in (4, 2, 1):
        model, cache = Llama(LlamaConfig(65, 128, 344, 4, num_attention_heads=4, num_key_value_heads=heads)), []
        pieces = torch.cat([model(piece, cache) for piece in ids.split(10, dim=1)], dim=1)
        size, off = sum(t[0, :, 0].numel() for pair in cache for t in pair), (pieces - model(ids)).abs().max()
        print(f"{heads} key-value heads: {size:4d} numbers a token in the cache; logits of pieces off by {off:.0e}")
    model.position_offset = 1000
    print(f"1000 places further on, the logits move by {(model(ids) - pieces).abs().max():.0e}: only distances count")
