# SPDX-License-Identifier: MIT
"""BERT: a transformer that reads a text in both directions at once, pretrained to fill in words that were hidden.

Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2018,
arXiv 1810.04805), on the encoder of Vaswani et al. (2017, 1706.03762), whose norms follow each addition:

    h_0     = LN(E[ids] + W_p[0..T-1] + W_s[segments])                                         (section 3, figure 2)
    a_l     = LN(h_{l-1} + Attention(h_{l-1}))     Attention(x) = softmax(Q K^T / sqrt(D)) V W_o, in both directions
    h_l     = LN(a_l + MLP(a_l))                   MLP(x) = GELU(x W_1 + b_1) W_2 + b_2, GELU exact (by erf)
    pooled  = tanh(h_L[first token] W + b)         what the next-sentence and the class heads see

    "pretrain"   MLM: LN(GELU(h_L W + b)) E^T + b_V at each token; next sentence: 2 classes of pooled  (section 3.1)
    "classify"   pooled W + b, a class for the text       "tag"  h_L W + b, a class for each token     (section 4)
    "qa"         h_L W + b, 2 numbers a token: softmax over the text says where the answer starts, and where it ends

    parameters = V C + P C + S C + 2 C + L (4 C^2 + 2 C F + 9 C + F) + C^2 + C     BERT base, pooled: 109,482,240

The pretraining loss is a sum, MLM over masked tokens + w (next sentence over pairs), and its count that of the masked
tokens: divided, the paper's mean MLM + mean next sentence where w tokens are masked per pair: 19.2 is 15 % of 128. w is
constant, as a ratio taken from each microbatch would make the gradient depend on the split. A pair with nothing masked
adds no next-sentence term either, so that a batch of only such pairs has sum and count 0.

Departures: one dropout rate (hidden_dropout_prob) for all places; weights start from N(0, 0.02^2), not cut off at two
sigmas; padding never starts or ends an answer (the authors let it, and answers depend on how far a batch is padded).

    model = BERT(BERTConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2))
    loss, count = model.loss(ids=ids, segments=segments, mask=mask, labels=labels, next=next)
    tagger = BERT.from_pretrained("path/to/a-bert", task="tag", labels=("O", "B-PER", "I-PER"))

Letters: B batch, T tokens, H heads, D = C / H, C and F widths, V vocabulary, P positions, S segments, L layers, labels.
"""

import json
import math
import os
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


# The tasks, and what transformers calls a model of each.
_TASKS = {"pretrain": "BertForPreTraining", "classify": "BertForSequenceClassification",
          "tag": "BertForTokenClassification", "qa": "BertForQuestionAnswering"}  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
          "max_position_embeddings", "type_vocab_size")  # fmt: skip
_KEPT = (*_SIZES, "layer_norm_eps", "pad_token_id", "next_weight")  # under the same names in config.json


@dataclass
class BERTConfig:
    """Sizes and task of the model; the defaults are BERT base, the names are those of Hugging Face's BertConfig."""

    vocab_size: int = 30522  # bert-base-uncased's WordPieces
    hidden_size: int = 768  # C; 64 per head, as in every BERT
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H; hidden_size must divide into it
    intermediate_size: int = 3072  # F, four times C
    max_position_embeddings: int = 512  # positions are learned, so nothing longer can be asked
    type_vocab_size: int = 2  # segments: A and B
    dropout: float = 0.1  # after the embedding, on the attention weights, on both branches, before a classifier
    layer_norm_eps: float = 1e-12  # BERT's; the weights were trained with it
    pad_token_id: int | None = 0  # written to config.json for other programs; here the mask alone says what is padding
    task: str = "pretrain"
    labels: tuple[str, ...] = ()  # of classify and tag: the names of the classes, in the order of the logits
    next_weight: float = 19.2  # w: as many masked tokens as a pair weighs in pretraining

    def __post_init__(self):
        def check(name, good, wanted):
            if not good(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r}: wanted {wanted}")
        H, named, number = self.num_attention_heads, self.task in ("classify", "tag"), (int, float)
        for name in _SIZES:
            check(name, lambda n: type(n) is int and n >= 1, "a whole number of at least 1")
        check("hidden_size", lambda C: C % H == 0, f"a multiple of num_attention_heads = {H}")
        check("dropout", lambda p: isinstance(p, number) and 0 <= p < 1, "a number from 0 up to, not including, 1")
        check("layer_norm_eps", lambda eps: isinstance(eps, number) and eps > 0, "a number above 0")
        check("next_weight", lambda w: isinstance(w, number) and 0 <= w < math.inf, "a finite number of at least 0")
        check("task", lambda task: task in _TASKS, f"one of {', '.join(_TASKS)}")
        self.labels = tuple(self.labels)  # JSON knows only lists
        distinct = len({x for x in self.labels if isinstance(x, str)}) == len(self.labels)
        check("labels", lambda xs: distinct and bool(xs) == named, "distinct names for classify and tag, else none")


def _dense_norm(inputs, outputs, eps):
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps)})


class Layer(nn.Module):
    """Attention, then two products with a GELU between them; post-norm: LN(x + branch(x))."""

    def __init__(self, config, attention):
        super().__init__()
        C, width, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.config, self.kernel = config, attention
        # A ModuleDict is a set of names and no more: those under which BERT's weights are published.
        qkv = nn.ModuleDict({name: nn.Linear(C, C) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": qkv, "output": _dense_norm(C, C, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, width)})
        self.output = _dense_norm(width, C, eps)

    def forward(self, x, mask=None):
        p = self.config.dropout if self.training else 0.0
        H, qkv, out = self.config.num_attention_heads, self.attention["self"].values(), self.attention.output
        q, k, v = (linear(x).unflatten(2, (H, -1)).transpose(1, 2) for linear in qkv)  # 3 x (B, H, T, D)
        y = self.kernel(q, k, v, mask=mask, dropout=p).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        x = out.LayerNorm(x + F.dropout(out.dense(y), p))
        y = F.gelu(self.intermediate.dense(x))  # (B, T, F)
        return self.output.LayerNorm(x + F.dropout(self.output.dense(y), p))  # (B, T, C)


class BERT(nn.Module):
    """BERT with the head of its task, under transformers' names. attention: a callable of torch_attention's contract.

    `model.config.dropout` is read at every call. `model.fresh` names the parameters that came from no file.
    """

    def __init__(self, config, attention=torch_attention):
        super().__init__()
        self.config, self.position_offset = config, 0  # places that a prefix takes before the text
        C, V, eps = config.hidden_size, config.vocab_size, config.layer_norm_eps
        tables = {"word": V, "position": config.max_position_embeddings, "token_type": config.type_vocab_size}
        embeddings = nn.ModuleDict({f"{name}_embeddings": nn.Embedding(n, C) for name, n in tables.items()})
        embeddings["LayerNorm"] = nn.LayerNorm(C, eps)
        encoder = {"layer": nn.ModuleList(Layer(config, attention) for _ in range(config.num_hidden_layers))}
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict(encoder)})
        if config.task in ("pretrain", "classify"):
            self.bert["pooler"] = nn.ModuleDict({"dense": nn.Linear(C, C)})
        if config.task == "pretrain":
            predictions = nn.ModuleDict({"transform": _dense_norm(C, C, eps), "decoder": nn.Linear(C, V)})
            predictions.decoder.weight, predictions.bias = embeddings.word_embeddings.weight, predictions.decoder.bias
            self.cls = nn.ModuleDict({"predictions": predictions, "seq_relationship": nn.Linear(C, 2)})
        elif config.task == "qa":
            self.qa_outputs = nn.Linear(C, 2)
        else:
            self.classifier = nn.Linear(C, len(config.labels))
        self.fresh = tuple(name for name, _ in self.named_parameters())  # a tied tensor is named once
        for p in (self.get_parameter(name) for name in self.fresh if not name.endswith("LayerNorm.weight")):
            nn.init.normal_(p, std=0.02) if p.dim() == 2 else nn.init.zeros_(p)

    def hidden(self, ids, segments=None, mask=None):
        """h_L (B, T, C), without a head; arguments as in `forward`."""
        for name, t, dtype in (("ids", ids, _LONG), ("segments", segments, _LONG), ("mask", mask, torch.bool)):
            if t is not None and (t.dim() != 2 or t.shape != ids.shape or t.dtype != dtype):
                raise ValueError(f"{name} of shape {tuple(t.shape)}, {t.dtype}: wanted {dtype}, (batch, tokens) in all")
        T, P, e = ids.size(1), self.config.max_position_embeddings - self.position_offset, self.bert.embeddings
        if T > P:
            raise ValueError(f"ids: {T} tokens do not fit, max_position_embeddings = {P}")
        places = e.position_embeddings.weight[self.position_offset :][:T]  # (T, C)
        segments = torch.zeros_like(ids) if segments is None else segments
        x = e.word_embeddings(ids) + places + e.token_type_embeddings(segments)  # (B, T, C)
        x = F.dropout(e.LayerNorm(x), self.config.dropout, self.training)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, T): the keys to be seen, by every query
        for layer in self.bert.encoder.layer:
            x = layer(x, mask)
        return x

    def _pool(self, x):
        return self.bert.pooler.dense(x[:, 0]).tanh()  # (B, C)

    def _head(self, x):  # logits from h_L at any places (..., C); for "classify", from all of it (B, T, C)
        if self.config.task == "pretrain":
            p = self.cls.predictions
            return p.decoder(p.transform.LayerNorm(F.gelu(p.transform.dense(x))))  # (..., V)
        if self.config.task == "qa":
            return self.qa_outputs(x)  # (..., 2)
        x = self._pool(x) if self.config.task == "classify" else x  # (B, C), or (..., C)
        return self.classifier(F.dropout(x, self.config.dropout, self.training))  # (..., L)

    def forward(self, ids, segments=None, mask=None):
        """Logits: "pretrain" those of the MLM (B, T, V); "classify" (B, L); "tag" (B, T, L); "qa" (B, T, 2).

        ids: int64 (B, T). segments: int64 (B, T), 0 for A and 1 for B; default 0. mask: bool (B, T), True for a real
        token; default all. Raises ValueError for other shapes and dtypes, and when T > max_position_embeddings.
        """
        return self._head(self.hidden(ids, segments, mask))

    def next_logits(self, ids, segments=None, mask=None):
        """The other logits of "pretrain", the next sentence's (B, 2): 0, B follows A; 1, B is random."""
        return self.cls.seq_relationship(self._pool(self.hidden(ids, segments, mask)))

    def _compare(self, ids, segments=None, mask=None, labels=None, next=None, starts=None, ends=None):
        task, given = self.config.task, {"labels": labels, "next": next, "starts": starts, "ends": ends}
        names, wanted = {n for n in given if given[n] is not None}, {"starts", "ends"} if task == "qa" else {"labels"}
        if names - ({"next"} if task == "pretrain" else set()) != wanted:
            raise ValueError(f"batch with {sorted(names)} beside its ids: wanted {sorted(wanted)} for task {task!r}")
        x = self.hidden(ids, segments, mask)
        if task == "classify":
            return self._head(x), labels, x
        if task == "qa":
            logits = self._head(x)  # (B, T, 2)
            logits = logits if mask is None else logits.masked_fill(~mask[..., None], _NOWHERE)
            return logits.permute(2, 0, 1).flatten(0, 1), torch.cat((starts, ends)), x  # (2B, T), (2B,)
        if labels.shape != ids.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: wanted that of ids, {tuple(ids.shape)}")
        counted = labels != -100  # of pretraining, 15 %: the head over V is the dearest part
        return self._head(x[counted]), labels[counted], x

    def outputs(self, ids, segments=None, mask=None, **targets):
        """What the loss compares: logits (N, V or L or T), targets int64 (N,), and h_L at the M real places (M, C).

        targets: "pretrain" (MLM alone, whatever `next`) and "tag": labels (B, T), of which N are not -100. "classify":
        labels (B,). "qa": starts (B,) and ends (B,), places in T: N = 2B, -100 does not count. ValueError: others."""
        logits, targets, x = self._compare(ids, segments, mask, **targets)
        return logits, targets, x.flatten(0, 1) if mask is None else x[mask]

    def loss(self, *, label_smoothing=0.0, **batch):
        """Cross-entropy summed over the targets of `outputs` (nats, float32 or more), and how many count (0-dim int64).

        "pretrain" adds next_weight times the next-sentence loss if next (B,) is given: 0, B follows A; 1, B is random.
        With nothing to count the sum is 0. ValueError: label smoothing for "qa", where places are no classes."""
        if label_smoothing and self.config.task == "qa":
            raise ValueError(f"label_smoothing = {label_smoothing}: wanted 0.0 for task 'qa', or padding had a share")
        def summed(logits, targets):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        logits, targets, x = self._compare(**batch)
        total = summed(logits, targets)
        if batch.get("next") is not None:
            pairs = batch["next"].masked_fill((batch["labels"] == -100).all(1), -100)  # (B,)
            total = total + self.config.next_weight * summed(self.cls.seq_relationship(self._pool(x)), pairs)
        return total, (targets != -100).sum()

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Write config.json and model.safetensors as transformers' class of the task does, each beside and renamed.

        Raises ValueError when the tensors are not BERT's (an adapter: merge or remove it first; an untied head)."""
        import safetensors.torch
        c, tensors = self.config, {name: p.contiguous() for name, p in self.named_parameters()}  # a tied one once
        with torch.device("meta"):
            odd = sorted(tensors.keys() ^ set(BERT(c).fresh))
        if odd:
            raise ValueError(f"the model: {', '.join(odd[:3])} missing or unexpected, wanted the tensors of BERT alone")
        settings = {"architectures": [_TASKS[c.task]]} | {name: values[0] for name, values in _FIXED.items()}
        settings |= {name: getattr(c, name) for name in _KEPT}
        settings["hidden_dropout_prob"] = settings["attention_probs_dropout_prob"] = c.dropout
        settings["torch_dtype"] = str(self.bert.embeddings.word_embeddings.weight.dtype).removeprefix("torch.")
        if c.labels:
            settings |= {"id2label": dict(enumerate(c.labels)), "label2id": {x: i for i, x in enumerate(c.labels)}}
        beside = Path(folder) / "model.safetensors.tmp", Path(folder) / "config.json.tmp"
        Path(folder).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, beside[0], {"format": "pt"})  # transformers refuses files without it
        beside[1].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        beside[0].chmod(beside[1].stat().st_mode)  # safetensors lets the owner alone read
        for path in beside:
            os.replace(path, path.with_suffix(""))

    @classmethod
    def from_pretrained(cls, folder, task=None, labels=None, attention=torch_attention):
        """Read a folder of any BERT of transformers: the model in float32, on the CPU, in eval mode.

        task: default the file's own. A head is read where task and labels are the file's; any other, and a pooler that
        the file lacks, start fresh: `model.fresh` names what did. ValueError in one line names the file and its fault.
        """
        import safetensors.torch
        path, state = Path(folder) / "config.json", {}
        try:
            c = json.loads(path.read_text(encoding="utf-8"))
            for name, values in _FIXED.items():
                if c.get(name, values[0]) not in values:
                    raise ValueError(f"{name} = {c[name]!r}, wanted {values[0]!r}")
            own = ARCHITECTURES.get((c.get("architectures") or [None])[0])
            names = c.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # which transformers leaves out
            own_labels = tuple(names.get(str(i)) for i in range(len(names))) if own in ("classify", "tag") else ()
            task = own if task is None else task
            labels = (own_labels if task == own else ()) if labels is None else tuple(labels)
            settings = {name: c[name] for name in _KEPT if name in c} | {"dropout": c.get("hidden_dropout_prob", 0.1)}
            config = BERTConfig(**settings, task=task, labels=labels)
            model, path = cls(config, attention).float(), Path(folder) / "model.safetensors"
            for name, t in safetensors.torch.load_file(path).items():
                # A bare body has no prefix; old files have TensorFlow's names of a norm, and a buffer of 0..P-1.
                name = name if name.startswith((*_HEADS, "bert.")) else f"bert.{name}"
                name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                head = name.startswith(_HEADS) and (task, labels) != (own, own_labels)
                if not head and name != "bert.embeddings.position_ids":
                    state[name] = t
            missing, unexpected = model.load_state_dict(state, strict=False)
            odd = [n for n in missing + unexpected if not n.startswith((*_HEADS, "bert.pooler."))]
            for name in state.keys() & model.state_dict().keys():  # a tied tensor was filled twice, and kept the latter
                equal = torch.equal(model.get_parameter(name), state[name].float())
                odd += [] if equal and state[name].is_floating_point() else [name]
            if odd:
                raise ValueError(f"{', '.join(sorted(odd)[:3])} missing, unexpected, untied or no float, wanted BERT's")
        except (AttributeError, OSError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
        model.fresh = tuple(name for name in model.fresh if name in missing)
        return model.eval()


_NOWHERE = -1e4  # the logit of a place that cannot be: exp(-1e4) is 0. With -inf, distillation would take inf - inf
_HEADS, _LONG = ("cls.", "classifier.", "qa_outputs."), torch.int64
ARCHITECTURES = {"BertForMaskedLM": "pretrain", "BertModel": "pretrain"} | {name: t for t, name in _TASKS.items()}
# What this file computes: config.json says so when written, and must not say otherwise when read.
_FIXED = {"model_type": ("bert",), "hidden_act": ("gelu",), "position_embedding_type": ("absolute", None),
          "is_decoder": (False,), "add_cross_attention": (False,), "tie_word_embeddings": (True,),
          "problem_type": (None, "single_label_classification")}  # fmt: skip


if __name__ == "__main__":
    def texts(n, rate=0.0):  # [CLS], 8 steps round a dial of 20; half of the texts break off and go on from elsewhere
        ids, next = (torch.randint(20, (n, 1)) + torch.arange(9)) % 20, torch.randint(2, (n,))  # (B, T), (B,)
        ids[:, 5:] = (ids[:, 5:] + next[:, None] * torch.randint(1, 20, (n, 1))) % 20
        ids[:, 0], hidden = 20, (torch.rand(n, 9) < rate) & (torch.arange(9) > 0)
        text = {"ids": ids.masked_fill(hidden, 21), "segments": (torch.arange(9) > 4).long().expand(n, 9)}
        return {**text, "labels": ids.masked_fill(~hidden, -100), "next": next} if rate else {**text, "labels": next}
    def train(model, steps, batch):
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):
            loss, count = model.loss(**batch())
            optimiser.zero_grad()
            (loss / count).backward()
            optimiser.step()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes, few, test, held_out = (22, 64, 2, 4, 128, 9, 2, 0.0), texts(64), texts(1000), texts(1000, 0.15)
    model = BERT(BERTConfig(*sizes, next_weight=0.15 * 8))
    for step in range(0, 281, 70):  # 22 tokens: knowing nothing costs ln 22 = 3.09 nats a masked one
        train(model, 70 if step else 0, lambda: texts(64, 0.15))
        next = model.next_logits(held_out["ids"], held_out["segments"]).argmax(1) == held_out["next"]
        mlm = F.cross_entropy(*model.outputs(**held_out)[:2])
        print(f"step {step:3}: MLM {mlm:.2f} nats, next sentence {next.float().mean():.0%} right")
    for start, weights in {"fresh": {}, "pretrained": model.state_dict()}.items():
        tuned = BERT(BERTConfig(*sizes, task="classify", labels=("goes on", "breaks off")))
        tuned.load_state_dict(weights, strict=False)
        train(tuned, 40, lambda: few)
        right = tuned.outputs(**test)[0].argmax(1) == test["labels"]
        print(f"a classifier of 64 texts, {start}: {right.float().mean():.0%} of 1000 others right")
