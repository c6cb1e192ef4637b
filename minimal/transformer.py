# SPDX-License-Identifier: MIT
"""The transformer: an encoder reads the source, a decoder writes the target, by greedy or beam search with a cache.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, "Attention Is All You Need" (2017, 1706.03762);
pre-norm: Xiong et al. (2020, 2002.04745); length penalty: Wu et al. (2016, 1609.08144), equation 14. E: the embedding:

    x            = sqrt(C) E[ids] + PE                 PE(pos, 2i) = sin(pos / 10000^(2i/C)),  PE(pos, 2i+1) = cos(same)
    Attention    = softmax(Q K^T / sqrt(D)) V          equation 1, H of them side by side, then W_o; no biases
    FFN(x)       = max(0, x W_1 + b_1) W_2 + b_2       equation 2
    encoder      x = LN(x + Attention(x));  x = LN(x + FFN(x))                                post-norm, as in the paper
    decoder      the same, causal, with x = LN(x + Attention(x, memory)) between the two
    pre-norm     x = x + Sublayer(LN(x)), and one more LN at the end of each stack
    logits       = x E^T                               section 3.4: source, target and head share one matrix
    beam search  maximises log P(Y | X) / lp(Y),       lp(Y) = ((5 + |Y|) / 6)^alpha,  |Y| counts the eos
    parameters   = V C + n_encoder (4 C^2 + M + 4 C) + n_decoder (8 C^2 + M + 6 C),  M = (2 C + 1) d_ff + C, by default

Departures: dropout also on the attention weights, as in most later models; learned positions are one table a side.

    model = Transformer(TransformerConfig(vocab_size=8000, d_model=256, n_head=4, d_ff=1024))
    total, count = model.loss(source, target, source_mask, label_smoothing=0.1);  (total / count).backward()
    tokens, scores = beam_search(model.eval(), source, max_new_tokens=100, beam=4, source_mask=source_mask)

Letters: B batch, S source and T target tokens, H heads, D head size, C = H D, V vocabulary, K beam, L longest output.
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# Same as minimal/attention.py: torch_attention
def torch_attention(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """Attention by PyTorch's kernels (B, H, Tq, D); True in mask: may attend; a row with nothing to see gives zeros."""
    Tq, Tk = q.shape[2], k.shape[2]
    causal = causal if Tq > 1 else False  # a lone query is the last token: it sees every key
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.is_floating_point():
            mask = mask.to(q.dtype)
    if causal and (mask is not None or Tq != Tk):  # is_causal is aligned top-left, and refuses a mask beside it
        seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)  # (Tq, Tk)
        if mask is None:
            mask = seen
        else:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
        causal = False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)


@dataclasses.dataclass
class TransformerConfig:
    """Sizes and choices; the defaults are the paper's base model (its table 3). Raises ValueError for wrong values."""

    vocab_size: int  # one vocabulary for both sides; the paper's had 37,000 pieces
    d_model: int = 512  # C; 64 per head in both of the paper's models
    n_head: int = 8  # H; d_model must divide into it
    n_encoder: int = 6  # layers
    n_decoder: int = 6
    d_ff: int = 2048  # four times d_model, as in the paper
    dropout: float = 0.1  # on embedded tokens, sublayers and attention weights; read at every call
    max_len: int = 512  # the longest source or target; no weight depends on it with sinusoids: raise it at any time
    positions: str = "sinusoidal"  # or "learned": nearly the same in the paper (table 3, row E), but not past max_len
    norm: str = "post"  # the paper's, which needs warm-up; "pre" trains without
    tied: bool = True  # one matrix for source, target and head; False: three
    bos_token_id: int = 0  # begins every target
    eos_token_id: int = 0  # ends it; may be the same token, since one is only read and the other only written
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_head", "n_encoder", "n_decoder", "d_ff", "max_len")
        for names, wanted, good in (
            (sizes, "a whole number of at least 1", lambda x: type(x) is int and x >= 1),
            (("positions",), "'sinusoidal' or 'learned'", lambda x: x in ("sinusoidal", "learned")),
            (("norm",), "'post' or 'pre'", lambda x: x in ("post", "pre")),
            (("tied",), "True or False", lambda x: type(x) is bool),
            (("bos_token_id", "eos_token_id"), "a token", lambda x: type(x) is int and 0 <= x < self.vocab_size),
            (("n_head",), f"a divisor of d_model = {self.d_model}", lambda x: self.d_model % x == 0),
            (("d_model",), "an even number for sines and cosines", lambda x: x % 2 == 0 or self.positions == "learned"),
            (("dropout",), "a number from 0 up to, not including, 1", lambda x: type(x) in (int, float) and 0 <= x < 1),
            (("layer_norm_epsilon",), "a number above 0", lambda x: type(x) in (int, float) and x > 0),
        ):
            for name in names:
                if not good(getattr(self, name)):
                    raise ValueError(f"{name} = {getattr(self, name)!r}: wanted {wanted}")


def sinusoidal_positions(positions, d_model):
    """Section 3.5: positions (T,) -> float32 (T, d_model), a sine and a cosine of each of d_model / 2 wavelengths."""
    angles = positions[:, None] / 10000 ** (torch.arange(0, d_model, 2, device=positions.device) / d_model)  # (T, C/2)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)  # (T, C), interleaved


class Attention(nn.Module):
    """Section 3.2.2 with its residual and norm: x looks at itself or, where given, at the memory."""

    def __init__(self, config, attention):
        super().__init__()
        self.config, self.attention, self.pre, C = config, attention, config.norm == "pre", config.d_model
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(C, config.layer_norm_epsilon)

    def forward(self, x, memory=None, causal=False, mask=None, kept=None):
        """kept: None, or [] at first, then [k, v] (B, S, C): extended by self-attention, reused with a memory."""
        p = self.config.dropout if self.training else 0.0
        h = self.norm(x) if self.pre else x
        cross, seen = memory is not None, h if memory is None else memory
        k, v = kept if cross and kept else (self.k_proj(seen), self.v_proj(seen))  # 2 x (B, S, C)
        if kept and not cross:
            k, v = torch.cat((kept[0], k), dim=1), torch.cat((kept[1], v), dim=1)  # 2 x (B, cached + T, C)
        if kept is not None:
            kept[:] = k, v
        heads = self.config.n_head, self.config.d_model // self.config.n_head
        q, k, v = (t.unflatten(2, heads).transpose(1, 2) for t in (self.q_proj(h), k, v))  # 3 x (B, H, T or S, D)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, S): the same for all heads and queries
        y = self.attention(q, k, v, causal=causal, mask=mask, dropout=p)  # (B, H, T, D)
        x = x + F.dropout(self.out_proj(y.transpose(1, 2).flatten(2)), p)  # (B, T, C)
        return x if self.pre else self.norm(x)


class Block(nn.Module):
    """A source token looks at all real ones; a target token at itself and those before it, then at the source."""

    def __init__(self, config, attention, decoder):
        super().__init__()
        self.config, self.pre, self.self_attn = config, config.norm == "pre", Attention(config, attention)
        self.cross_attn = Attention(config, attention) if decoder else None
        self.fc1, self.fc2 = nn.Linear(config.d_model, config.d_ff), nn.Linear(config.d_ff, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x, mask=None, memory=None, kept=(None, None)):
        if self.cross_attn is None:
            x = self.self_attn(x, mask=mask)
        else:
            x = self.cross_attn(self.self_attn(x, causal=True, kept=kept[0]), memory, mask=mask, kept=kept[1])
        y = self.fc2(F.relu(self.fc1(self.norm(x) if self.pre else x)))  # (B, T, C) -> (B, T, d_ff) -> (B, T, C)
        x = x + F.dropout(y, self.config.dropout, self.training)
        return x if self.pre else self.norm(x)


class Transformer(nn.Module):
    """The encoder, and the decoder with its head. attention: a callable of torch_attention's contract."""

    def __init__(self, config, attention=torch_attention):
        super().__init__()
        self.config, V, C, pre = config, config.vocab_size, config.d_model, config.norm == "pre"
        for name in ("embedding",) if config.tied else ("source_embedding", "target_embedding"):
            setattr(self, name, nn.Embedding(V, C))
        if config.positions == "learned":
            self.source_positions, self.target_positions = (nn.Embedding(config.max_len, C) for _ in range(2))
        self.encoder = nn.ModuleList(Block(config, attention, decoder=False) for _ in range(config.n_encoder))
        self.decoder = nn.ModuleList(Block(config, attention, decoder=True) for _ in range(config.n_decoder))
        # Pre-norm's stream only grows: one norm at its end. Post-norm's was normalised by the last sublayer.
        norms = (nn.LayerNorm(C, config.layer_norm_epsilon) if pre else nn.Identity() for _ in range(2))
        self.encoder_norm, self.decoder_norm = norms
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tied:
            self.lm_head.weight = self.embedding.weight
        for name, p in self.named_parameters():
            if "_positions" in name:
                nn.init.normal_(p, std=math.sqrt(0.5))  # the mean square of sines and cosines
            elif "embedding" in name or "lm_head" in name:
                nn.init.normal_(p, std=C**-0.5)  # times sqrt(C): unit variance, on a par with the positions
            elif p.dim() == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def _embed(self, ids, side, past=0):
        c, end = self.config, past + ids.size(-1)
        if ids.dim() != 2 or ids.is_floating_point() or end > c.max_len:
            got = f"{side} of shape {tuple(ids.shape)}, {ids.dtype}, after {past} cached"
            raise ValueError(f"{got}: wanted token ids (batch, tokens), up to max_len = {c.max_len} with the cached")
        x = (self.embedding if c.tied else getattr(self, f"{side}_embedding"))(ids) * math.sqrt(c.d_model)  # (B, T, C)
        at, learned = torch.arange(past, end, device=ids.device), getattr(self, f"{side}_positions", None)
        x = x + (learned(at) if learned else sinusoidal_positions(at, c.d_model).to(x.dtype))  # (B, T, C) + (T, C)
        return F.dropout(x, c.dropout, self.training)

    def encode(self, source, source_mask=None):
        """Memory (B, S, C) of source, int64 (B, S); source_mask: bool (B, S), True for a real token; None: all are.

        What memory holds at padded places means nothing and is not read. ValueError for wrong shapes or dtypes."""
        if source_mask is not None and (source_mask.dtype != torch.bool or source_mask.shape != source.shape):
            got, wanted = tuple(source_mask.shape), tuple(source.shape)
            raise ValueError(f"source_mask of shape {got}, {source_mask.dtype}: wanted {wanted}, torch.bool")
        x = self._embed(source, "source")
        for block in self.encoder:
            x = block(x, source_mask)
        return self.encoder_norm(x)

    def _states(self, target, memory, source_mask, cache=None):
        x = self._embed(target, "target", cache[0][0][0].size(1) if cache else 0)
        if cache == []:
            cache.extend(([], []) for _ in self.decoder)
        for layer, block in enumerate(self.decoder):
            x = block(x, source_mask, memory, cache[layer] if cache else (None, None))
        return self.decoder_norm(x)  # (B, T, C)

    def decode(self, target, memory, source_mask=None, cache=None):
        """Logits (B, T, V) for the token after each of target, int64 (B, T), given memory (B, S, C).

        cache: None, or a list that the caller owns, `[]` at first. Each call extends its entries, ([k, v], [k, v]) a
        layer: of the targets read so far (B, tokens, C), from where positions go on, and of the memory (B, S, C)."""
        return self.lm_head(self._states(target, memory, source_mask, cache))  # (B,T,C) x (V,C) -> (B,T,V)

    def forward(self, source, target, source_mask=None):
        """Logits (B, T, V): encode and decode."""
        return self.decode(target, self.encode(source, source_mask), source_mask)

    def outputs(self, source, target, source_mask=None, labels=None):
        """Logits (B T, V), their targets (B T,), and the last states (M, C) at the M places whose target counts.

        target: int64 (B, T+1), begins with bos. labels: aligned with it (labels[t] is the token at t), default target;
        -100 is not counted: mark padding so, never the eos, or the model will not learn to stop. Shifted here only.
        """
        labels = target if labels is None else labels
        if labels.shape != target.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: wanted that of target, {tuple(target.shape)}")
        states = self._states(target[:, :-1], self.encode(source, source_mask), source_mask).flatten(0, 1)  # (B T, C)
        targets = labels[:, 1:].flatten()  # (B T,)
        return self.lm_head(states), targets, states[targets != -100]

    def loss(self, source, target, source_mask=None, labels=None, label_smoothing=0.0):
        """Cross-entropy summed over the targets (nats, float32 or wider), and how many were counted (0-dim int64)."""
        logits, targets, _ = self.outputs(source, target, source_mask, labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum in bfloat16 keeps three digits
        total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing)
        return total, (targets != -100).sum()

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, a tied matrix once; ValueError for tensors that are not its own."""
        import safetensors.torch

        tensors, c, folder = self.state_dict(), self.config, Path(folder)
        with torch.device("meta"):
            strange = tensors.keys() ^ Transformer(c).state_dict().keys()
        if strange or c.tied and not torch.equal(tensors.pop("lm_head.weight"), tensors["embedding.weight"]):
            raise ValueError(f"{min(strange, default='lm_head.weight')}: wanted the model's own (merge adapters first)")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:  # a failed write leaves the old files whole
            new = Path(beside, "model.safetensors"), Path(beside, "config.json")
            safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, new[0], {"format": "pt"})
            new[1].write_text(json.dumps({"model_type": "transformer", **dataclasses.asdict(c)}, indent=2) + "\n")
            new[0].chmod(new[1].stat().st_mode)  # safetensors lets the owner alone read
            for path in new:
                path.replace(folder / path.name)

    @classmethod
    def from_pretrained(cls, folder, attention=torch_attention):
        """The saved model, float32, on the CPU, in eval mode. Raises ValueError that names the file and its fault."""
        import safetensors.torch

        path = Path(folder) / "config.json"
        try:
            settings = dict(json.loads(path.read_text(encoding="utf-8")))
            if (kind := settings.pop("model_type", None)) != "transformer":
                raise ValueError(f"model_type = {kind!r}: wanted 'transformer'")
            model, path = cls(TransformerConfig(**settings), attention), Path(folder) / "model.safetensors"
            tensors = safetensors.torch.load_file(path)
            if model.config.tied and "embedding.weight" in tensors:
                tensors["lm_head.weight"] = tensors["embedding.weight"]
            model.load_state_dict(tensors)
        except (OSError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(" ".join(f"{path}: {error}".split())) from None
        return model.eval()


@torch.no_grad()
def greedy(model, source, max_new_tokens, source_mask=None):
    """The likeliest token, again and again: B lists of up to max_new_tokens ids, without bos and eos; source as in
    `encode`. ValueError in training mode, where dropout would change the tokens, or for more of them than max_len."""
    if model.training or not 0 <= max_new_tokens <= model.config.max_len:
        wanted = f"False (model.eval()), 0 to {model.config.max_len}, max_len"
        raise ValueError(f"{model.training=}, {max_new_tokens=}: wanted {wanted}")
    eos, memory, cache = model.config.eos_token_id, model.encode(source, source_mask), []
    ids = source.new_full((len(source), 1), model.config.bos_token_id)
    for _ in range(max_new_tokens):
        ids = torch.cat((ids, model.decode(ids[:, -1:], memory, source_mask, cache).argmax(-1)), dim=1)  # (B, 1 + n)
        if (ids[:, 1:] == eos).any(dim=1).all():
            break
    return [row[: row.index(eos)] if eos in row else row for row in ids[:, 1:].tolist()]


@torch.no_grad()
def beam_search(model, source, max_new_tokens, beam=4, length_penalty=0.6, source_mask=None):
    """The best Y found by log P(Y | X) / lp(Y): B lists of ids without bos and eos, and their scores (B,).

    Each step keeps the K best continuations; those that end in eos leave the beam, and the best is remembered. At
    L = max_new_tokens what still lives is cut off and competes as it is. The log P of a live hypothesis can only fall
    and lp only grow, so log P / lp(L) bounds all that may come of it: it dies once that is not above the best score.
    Beam 1 is `greedy`. ValueError as there, and for beam < 1 and length_penalty < 0 (no bound there)."""
    if model.training or not 0 <= max_new_tokens <= model.config.max_len or beam < 1 or length_penalty < 0:
        wanted = f"False (model.eval()), 0 to {model.config.max_len}, max_len, at least 1, at least 0"
        raise ValueError(f"{model.training=}, {max_new_tokens=}, {beam=}, {length_penalty=}: wanted {wanted}")
    c, B, K, L, dead = model.config, len(source), beam, max_new_tokens, -math.inf
    memory, cache = model.encode(source, source_mask).repeat_interleave(K, dim=0), []  # (B K, S, C)
    mask = None if source_mask is None else source_mask.repeat_interleave(K, dim=0)  # (B K, S)
    ids = source.new_full((B * K, 1), c.bos_token_id)
    live = memory.new_full((B, K), dead, dtype=torch.promote_types(memory.dtype, torch.float32))  # log P
    live[:, 0] = 0.0  # the K rows begin alike: were all alive, the beam would hold one hypothesis K times
    best, scores = [[] for _ in range(B)], live.new_full((B,), dead)
    for n in range(1, L + 1):
        logp = model.decode(ids[:, -1:], memory, mask, cache)[:, -1].to(live.dtype).log_softmax(-1)  # (B K, V)
        live, chosen = (live[:, :, None] + logp.view(B, K, c.vocab_size)).flatten(1).topk(K)  # of (B, K V) -> (B, K)
        token, at = chosen % c.vocab_size, chosen // c.vocab_size
        at = (at + torch.arange(0, B * K, K, device=at.device)[:, None]).flatten()  # (B K,), the rows they continue
        ids = torch.cat((ids.index_select(0, at), token.view(-1, 1)), dim=1)  # (B K, 1 + n)
        for own, _ in cache:  # the other half, of the memory, is the same for all rows of a source
            own[:] = (t.index_select(0, at) for t in own)
        ends = (token == c.eos_token_id) | (n == L)  # (B, K)
        score, which = (live.masked_fill(~ends, dead) / ((5 + n) / 6) ** length_penalty).max(1)  # (B,)
        for b in (score > scores).nonzero().flatten().tolist():
            scores[b], best[b] = score[b], ids[b * K + which[b], 1:].tolist()
        live = live.masked_fill(ends | (live / ((5 + L) / 6) ** length_penalty <= scores[:, None]), dead)
        if live.isinf().all():
            break
    return [row[:-1] if row[-1:] == [c.eos_token_id] else row for row in best], scores


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def batch(n):  # source, target, source_mask, labels: 1 to 8 digits, and the same backwards; bos 10, eos and pad 11
        digits, length, at = torch.randint(10, (n, 8)), torch.randint(1, 9, (n, 1)), torch.arange(8)
        real = at < length  # (n, 8)
        back = digits.gather(1, (length - 1 - at).clamp_min(0)).where(real, 11)  # (n, 8)
        target = F.pad(F.pad(back, (1, 0), value=10), (0, 1), value=11)  # (n, 10)
        return digits.where(real, 11), target, real, target.where(F.pad(real, (2, 0), value=True), -100)

    config = TransformerConfig(12, 64, 4, 1, 1, 128, dropout=0.0, norm="pre", bos_token_id=10, eos_token_id=11)
    model, (source, target, mask, _) = Transformer(config), batch(200)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98), eps=1e-9)
    for step in range(241):
        total, count = model.train().loss(*batch(48))
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
        if step % 60 == 0:
            found = greedy(model.eval(), source, 9, mask), beam_search(model, source, 9, source_mask=mask)[0]
            right = [sum(t[1 : t.index(11)] == y for t, y in zip(target.tolist(), f, strict=True)) for f in found]
            print(f"step {step:3d}: {total / count:.4f} nats a token; exact of 200: greedy {right[0]}, beam {right[1]}")
    print(source[0][mask[0]].tolist(), "backwards:", found[1][0])
