# SPDX-License-Identifier: MIT
"""Pretrains and fine-tunes the models of `minimal/`.

    python train.py                                        pretrain a GPT on the standard library's source
    python train.py --finetune lora                        adapt the newest pretrained model to English prose
    python train.py --model bert                           pretrain a BERT; --model rnn, --model vae
    python train.py --task classify --finetune full        give it a task: classify, tag, qa; --task seq2seq
    python train.py --finetune distill                     teach a model of half the layers
    python train.py --base out/gpt-lora --sample "Return"  use a result

In order: settings, model and adaptation, evaluation, loop, runs, uses of a model, main; tasks.py has the data and the
scores of each task. A run is a folder with the model in the Hugging Face layout (or the adapter in PEFT's), args.json,
metrics.jsonl, metrics.json, loss.png, samples.txt, and state/, which holds the data as it was prepared and the
checkpoint that resumes the run exactly. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Waiting threads of GNU OpenMP spin, 300,000 turns and more, also while another program needs the core. Beside one that
# kept one of two cores busy, 5,000 turns made a training step take 0.85 s instead of 1.06, for half of the CPU time.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from safetensors import SafetensorError
from torch import nn

from minimal import adversarial, fused, runs
from minimal.attention import attention
from minimal.bert import ARCHITECTURES, BERT, BERTConfig
from minimal.checkpoint import load_checkpoint, save_checkpoint, write_beside
from minimal.distill import distillation_loss, skip_layers
from minimal.examples import FIELDS
from minimal.gpt import GPT, GPTConfig
from minimal.lora import add_lora, load_lora, lora_parameters, merge_lora, save_lora
from minimal.optim import SGD, AdamW, Muon, cosine_schedule, decay_groups, muon_groups
from minimal.rnn import RNN, RNNConfig
from minimal.runs import newest, read_json, write_json
from minimal.settings import flag, parse, setting
from minimal.tokenizer import Tokenizer
from minimal.transformer import Transformer, TransformerConfig, sinusoidal_positions
from minimal.vae import VAE, VAEConfig
from tasks import (
    SOURCES,
    TASK_OF,
    TASKS,
    Labelled,
    continue_text,
    fill_masks,
    load_data,
    pad_id,
    predict,
    prepare_rows,
    prepare_text,  # fmt: skip
    read_rows,
    rows_of,
    rows_to_score,
    segments_of,
    show,
)

# --- settings ---------------------------------------------------------------------------------------------------------

SIZES = {  # layers, heads, width
    "tiny": (2, 2, 64),
    "mini": (2, 4, 128),
    "small": (4, 4, 192),
    "medium": (6, 6, 384),
    "gpt2": (12, 12, 768),
}
MODELS = {"gpt": GPT, "rnn": RNN, "bert": BERT, "transformer": Transformer, "vae": VAE}
KINDS = {"gpt2": "gpt"} | {name: name for name in MODELS if name != "gpt"}  # model_type in config.json -> --model
EMBEDDINGS = {"gpt": "transformer.wte", "rnn": "embedding", "bert": "bert.embeddings.word_embeddings",
              "transformer": "embedding"}  # fmt: skip
HEADS = ("classifier", "qa_outputs")  # of a task: new on a pretrained body, so LoRA trains them in full
RECIPES = {  # (model, task): what a setting left open becomes in training anew, and what of it adapting changes
    ("gpt", "lm"): (
        dict(data="stdlib-code", steps=330, batch_size=8, seq_len=256, lr=0.01, optimizer="muon", prompt="def"),
        dict(data="stdlib-prose", steps=200, prompt="Return"),
    ),
    ("rnn", "lm"): (
        dict(data="stdlib-code", steps=250, batch_size=16, seq_len=128, lr=5e-3, optimizer="adamw", prompt="def"),
        dict(data="stdlib-prose", steps=150, prompt="Return"),
    ),
    ("bert", "mlm"): (  # predicts 15 % of what it reads: so a small model, which reads more in the time
        dict(data="stdlib-docs", size="mini", steps=950, batch_size=32, seq_len=128, lr=3e-3, optimizer="muon",
             prompt="Return a [MASK] of the object."),
        dict(data="stdlib-prose", steps=300),
    ),
    ("bert", "classify"): (
        dict(data="stdlib-areas", size="mini", steps=200, batch_size=32, seq_len=128, lr=3e-3, optimizer="muon",
             dropout=0.1), {},
    ),
    ("bert", "tag"): (
        dict(data="stdlib-lexical", size="mini", steps=400, batch_size=32, seq_len=128, lr=3e-3, optimizer="muon",
             dropout=0.1), {},
    ),
    ("bert", "qa"): (
        dict(data="stdlib-questions", size="mini", steps=400, batch_size=16, seq_len=256, lr=5e-3, optimizer="muon"),
        {},
    ),
    ("transformer", "seq2seq"): (
        dict(data="stdlib-signatures", size="mini", steps=900, batch_size=32, seq_len=64, lr=5e-3, optimizer="muon",
             dropout=0.1),
        dict(steps=200),
    ),
    ("vae", "images"): (
        dict(data="digits", steps=2000, batch_size=64, lr=2e-3, optimizer="adamw"), dict(steps=500),
    ),
}  # fmt: skip
RATES = {"full": 1e-3, "freeze": 2e-3, "lora": 5e-3, "distill": 2e-3}  # learning rates of adapting, with AdamW


@dataclasses.dataclass
class Settings:
    """Every setting of a run. None: taken from RECIPES, or found by itself."""

    model: str = setting(None, list(MODELS), "what to train; default: what the task or --base says, else gpt")
    task: str = setting(None, list(TASKS), "what to learn; default lm (gpt, rnn), mlm (bert), seq2seq (transformer)")
    size: str = setting(
        None, list(SIZES), "layers, heads and width; default small, for most tasks mini: minutes on two cores"
    )
    data: str = setting(None, str, "file or folder: .txt .md .py .jsonl ..., rows in .jsonl or .csv for a task, images "
                    f"for the VAE; hf:OWNER/NAME; or, without a download, {', '.join(SOURCES)}")  # fmt: skip
    tokenizer: str = setting("bpe", str, "bpe, char, bytes, or PATH of a tokenizer.json; adapting keeps the base's")
    vocab_size: int = setting(4096, (int, 257), "tokens that bpe learns; small, for the head's cost grows with it")
    cell: str = setting("lstm", ["rnn", "lstm", "gru"], "RNN: its cell")
    latent: int = setting(8, (int, 1, 65537), "VAE: latent dimensions; eight hold the digits' shapes")
    reconstruction: str = setting("mse", ["mse", "bce"], "VAE: squared error, or cross-entropy, which blurs greys")
    beta: float = setting(1.0, (float, 0), "VAE: weight of the KL term; 1 makes the loss a bound on the likelihood")
    # adaptation
    base: str = setting(None, str, "folder to adapt (default: the newest pretrained beside --out) or use (the newest)")
    finetune: str = setting(None, ["full", "freeze", "lora", "distill"], "adapt --base instead of training anew")
    top: int = setting(1, (int, 1), "freeze: blocks that train, from the top, with what stands above them")
    rank: int = setting(8, (int, 1), "LoRA: rank of the update; 8 serves most tasks")
    alpha: float = setting(16.0, (float, 1e-9), "LoRA: the update counts alpha / rank; twice the rank is common")
    lora_dropout: float = setting(0.0, (float, 0, 1), "LoRA: dropout before A; an adapter this small seldom overfits")
    target: str = setting("all-linear", str, "LoRA: layers by name, suffix, list, expression; or all-linear")
    rslora: bool = setting(False, bool, "LoRA: scale by alpha / sqrt(rank), steadier at high ranks")
    dora: bool = setting(False, bool, "LoRA: learn direction and magnitude apart (DoRA)")
    teacher: str = setting(None, str, "distill: folder of the teacher (default: the newest model of the task)")
    student_layers: int = setting(None, (int, 1), "distill: blocks of the student; default half of the teacher's")
    distill_temperature: float = setting(2.0, (float, 1e-3), "distill: softens both distributions (Hinton's T)")
    distill_weights: str = setting("5,2,1", str, "distill: soft targets, hard targets, cosine of hidden states")
    # optimisation
    steps: int = setting(None, (int, 1), "optimiser steps; by model and task, for about two minutes on two cores")
    batch_size: int = setting(None, (int, 1), "rows in a microbatch; by model and task, for two cores")
    grad_accum: int = setting(1, (int, 1), "microbatches in a step; more when memory is short")
    seq_len: int = setting(None, (int, 1), "tokens in a row; by model and task, or the base's context")
    optimizer: str = setting(None, ["muon", "adamw", "sgd"], "muon pretrains in fewer steps, adamw adapts")
    lr: float = setting(None, (float, 0, 1e37), "peak learning rate; by model, task and method: RECIPES, RATES")
    warmup: int = setting(None, (int, 0), "steps of linear warm-up; default a twentieth of --steps")
    weight_decay: float = setting(0.1, (float, 0), "decay of matrices; norms, biases and embeddings have none")
    l1: float = setting(0.0, (float, 0), "weight of the sum of all matrices' absolute values; not in the loss shown")
    dropout: float = setting(None, (float, 0, 1), "default 0, or 0.1 for labelled tasks; adapting: as in the base")
    label_smoothing: float = setting(0.0, (float, 0, 1), "share of the target spread over all classes; 0.1 is common")
    adversarial: str = setting(None, ["fgm", "pgd", "freelb", "rdrop"], "perturbed embeddings, or dropout twice")
    epsilon: float = setting(0.1, (float, 0), "adversarial: norm of the change, as a share of a full row's embeddings")
    augment: bool = setting(False, bool, "classify, seq2seq: swap, delete, mask a tenth of the tokens")
    clip: float = setting(1.0, (float, 0), "largest gradient norm; 0 does not clip")
    patience: int = setting(0, (int, 0), "stop after so many evaluations without gain; 0 never does")
    seed: int = setting(1337, (int, 0, 2**31), "of initialisation, data order, dropout and samples")
    # machine
    device: str = setting(None, str, "cpu, cuda, mps; default: the best there is")
    dtype: str = setting(None, ["float32", "bfloat16", "float16"], "of the products; default: float32, GPU bfloat16")
    compile: bool = setting(False, bool, "torch.compile the loss; its minute of compiling pays on long runs only")
    threads: int = setting(None, (int, 1, 1025), "CPU threads; default PyTorch's choice")
    # output
    out: str = setting(None, str, "output folder; default out/MODEL, out/TASK or either with -METHOD")
    overwrite: bool = setting(False, bool, "replace the run in --out")
    save_every: int = setting(100, (int, 1), "steps between checkpoints")
    eval_every: int = setting(100, (int, 1), "steps between evaluations")
    sample_every: int = setting(200, (int, 1), "steps between samples")
    log_every: int = setting(10, (int, 1), "steps between lines of metrics.jsonl")
    prompt: str = setting(None, str, "what samples continue (lm) or fill in (mlm)")
    temperature: float = setting(0.6, (float, 0), "of samples; low suits a small model, 0 is greedy")
    top_p: float = setting(0.95, (float, 1e-9, 1.0000001), "of samples; the least likely tokens are seldom sensible")
    new_tokens: int = setting(120, (int, 1), "length of a sample")
    beam: int = setting(1, (int, 1), "seq2seq: hypotheses kept in decoding; 1 is greedy")


# What may change when a run is resumed: all that shapes neither the model nor the order of its data.
CHANGEABLE = set("steps lr warmup weight_decay l1 clip patience device dtype compile threads save_every eval_every "
                 "sample_every log_every prompt temperature top_p new_tokens".split())  # fmt: skip


ACTIONS = {  # instead of training; at most one
    "--resume": dict(nargs="?", const="", metavar="DIR", help="go on with a run, the newest unfinished by default"),
    "--sample": dict(metavar="TEXT", help="print what --base makes of TEXT: a continuation, label, tags, translation, "
                     "[MASK] filled in, or the answer to a question that ends in '?' from what follows it"),
    "--chat": dict(action="store_true", help="write together with --base, line by line"),
    "--eval": dict(action="store_true", help="score --base on --data; the scores replace those in its metrics.json"),
    "--merge": dict(action="store_true", help="write --base, an adapter, and its base as one model into --out"),
    "--dry-run": dict(action="store_true", help="build all, time a step, write nothing"),
}  # fmt: skip


def complete(s):
    """Fills what was left open, from the task, the recipe and the machine; refuses what does not go together."""
    if s.teacher and s.base and Path(s.teacher).resolve() != Path(s.base).resolve():
        raise ValueError(f"--teacher {s.teacher} beside --base {s.base}: wanted one, which the student begins from too")
    if s.task is None and (s.base or s.teacher):
        s.model, s.task = purpose_of(s.teacher or s.base, s.model)
    s.model = s.model or (TASKS[s.task].models[0] if s.task else "gpt")
    s.task = s.task or TASK_OF[s.model]
    if s.model not in TASKS[s.task].models:
        raise ValueError(
            f"--task {s.task}: not for --model {s.model}; wanted --model {' or '.join(TASKS[s.task].models)}"
        )
    if s.model == "vae" and (s.finetune in ("freeze", "distill") or s.adversarial or s.label_smoothing or s.augment):
        asked = [flag(name) for name in ("adversarial", "label_smoothing", "augment") if getattr(s, name)]
        asked = asked[0] if asked else f"--finetune {s.finetune}"
        raise ValueError(f"{asked}: a VAE has no blocks, classes or tokens for it; wanted another --model")
    if s.teacher and s.finetune != "distill":
        raise ValueError(f"--teacher {s.teacher}: wanted --finetune distill beside it")
    if s.finetune == "distill":
        weights_of(s)
        s.base = s.teacher = s.teacher or s.base
        if s.adversarial:
            raise ValueError(f"--adversarial {s.adversarial}: not beside --finetune distill")
    if s.adversarial and s.compile:
        raise ValueError(
            f"--adversarial {s.adversarial}: acts by a hook, which --compile passes over; wanted one of them"
        )
    if s.label_smoothing and s.task == "qa":
        raise ValueError(f"--label-smoothing {s.label_smoothing}: not for --task qa, whose places are no classes")
    if s.augment and s.task not in ("classify", "seq2seq"):
        raise ValueError(
            f"--augment: would part the tokens of --task {s.task} from its targets; wanted classify or seq2seq"
        )
    anew, adapting = RECIPES[s.model, s.task]
    recipe = anew
    if s.finetune:
        # A task is learnt as from scratch, but for LoRA; a model is adapted to other text by smaller steps.
        gently = {"optimizer": "adamw", "lr": RATES[s.finetune]} if s.finetune == "lora" or s.task not in FIELDS else {}
        if s.finetune == "freeze" and s.task in FIELDS:
            gently = {"lr": 1e-2}  # the blocks below cannot be spoilt
        recipe = anew | gently | adapting
        recipe = {name: value for name, value in recipe.items() if name not in ("dropout", "seq_len")}  # the base's
        if s.finetune == "distill":  # a student learns on what its teacher learnt on
            recipe |= {"data": anew["data"], "prompt": anew.get("prompt")}
            if s.task not in FIELDS:
                recipe["steps"] = 100  # a short way: later the labels teach as well, and what the teacher does not know
        if (of := run_of(s.base)).get("task") == s.task and (s.task in FIELDS or s.finetune == "distill"):
            recipe["data"] = of["data"]  # what the base learnt, it goes on with
    for name, value in ({"size": "small"} | recipe).items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    if s.adversarial == "rdrop" and s.task == "mlm":
        raise ValueError("--adversarial rdrop: not for --task mlm, whose next sentences it leaves out; wanted another")
    s.out = s.out or f"out/{folder_of(s)}"
    s.warmup = s.steps // 20 if s.warmup is None else s.warmup
    if s.warmup > s.steps:
        raise ValueError(f"--warmup {s.warmup}: wanted at most --steps, {s.steps}")
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        usable = torch.device(s.device).type in ("cpu", "cuda", "mps") and torch.zeros(1, device=s.device) is not None
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ValueError(f"--device {s.device}: not to be had with this PyTorch here; wanted cpu, cuda or mps")
    half = s.device.startswith("cuda") and torch.cuda.is_bf16_supported()
    s.dtype = s.dtype or ("bfloat16" if half else "float32")
    if s.threads:
        torch.set_num_threads(s.threads)
    return s


def run_of(folder):
    """The settings of the run that made a folder, or {}."""
    path = Path(folder or "") / "args.json"
    return read_json(path)["settings"] if folder and path.exists() else {}


def purpose_of(folder, model):
    """(--model, --task) of a model's folder where they are not given; None where it does not say."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.exists() else {}
    kind, task = model or KINDS.get(config.get("model_type")), None
    if kind == "bert" and config.get("architectures"):
        task = ARCHITECTURES.get(config["architectures"][0])
    return kind, "mlm" if task == "pretrain" else task


def check_data(s):
    if s.data not in SOURCES and not s.data.startswith("hf:") and not Path(s.data).exists():
        raise ValueError(f"--data {s.data}: no such file or folder")


def weights_of(s):
    """--distill-weights as keywords of distillation_loss"""
    try:
        soft, hard, cosine = (float(x) for x in s.distill_weights.split(","))
        if not (min(soft, hard, cosine) >= 0 and 0 < soft + hard + cosine < math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(f"--distill-weights {s.distill_weights}: wanted three numbers, such as 5,2,1") from None
    return dict(soft=soft, hard=hard, cosine=cosine)


# --- model and adaptation ---------------------------------------------------------------------------------------------


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


def load_model(folder, what="--base", task=None, labels=None):
    """-> (model, tokenizer or None) of a model's folder, or of an adapter's folder together with its base.

    task, labels: for a BERT, whose head of another task gives way to a new one."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        named = Path(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "?")
        base = named if named.is_dir() else folder.parent / named.name  # the second: both were moved together
        run = read_json(folder / "args.json") if (folder / "args.json").exists() else {}
        own = run.get("settings", {}).get("task")
        model, tokenizer = load_model(base, f"the base of {folder},", own, run.get("labels"))
        if run.get("base_sha256") not in (None, identity_of(base)):
            raise ValueError(f"{what} {folder}: its base {base} has changed since the adapter was trained")
        load_lora(model, folder)
        return model, tokenizer
    if not (folder / "config.json").exists():
        why = "holds no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{what} {folder}: {why}; wanted the output folder of a run, or a model in the same layout")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{what} {folder}: model_type {kind!r} is not supported; wanted one of {', '.join(KINDS)}")
    if kind == "vae":
        return VAE.from_pretrained(folder), None
    if kind == "rnn":
        return RNN.from_pretrained(folder), Tokenizer.load(folder)
    how = {"attention": attention}
    if kind == "bert":
        how |= dict(task="pretrain" if task == "mlm" else task, labels=labels)
    return MODELS[KINDS[kind]].from_pretrained(folder, **how), Tokenizer.load(folder)


def identity_of(folder):
    """SHA-256 of a model's weights: by it an adapter knows its base again."""
    path = Path(folder) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def adapt(s, model):
    """LoRA or freezing, in place."""
    if s.finetune == "lora":
        target = s.target.split(",") if "," in s.target and "{" not in s.target else s.target
        try:
            add_lora(model, s.rank, s.alpha, s.lora_dropout, target, rslora=s.rslora, dora=s.dora)
        except ValueError as error:
            raise ValueError(f"--rank {s.rank} --target {s.target}: {error}") from None
        for name in HEADS:
            if hasattr(model, name):
                getattr(model, name).requires_grad_(True)
        lora_parameters(model)  # refuses what could not be saved: a head that is adapted and trains in full as well
    if s.finetune == "freeze":
        # What stands above the blocks trains too, but no embedding: nor a head tied to it, which would move the input.
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        below = {p for stack in stacks for block in stack[: -s.top] for p in block.parameters()}
        below |= {p for name, p in model.named_parameters() if "embed" in name}
        below |= {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for p in model.parameters():
            p.requires_grad_(p not in below)


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
    if s.finetune != "lora":
        return model.save_pretrained(folder)
    model.name_or_path = s.base  # goes into adapter_config.json
    save_lora(model, folder)


def optimizer_of(s, model):
    if s.optimizer == "muon":
        heads = ("lm_head", *HEADS, "seq_relationship")
        return Muon(muon_groups(model, s.weight_decay, heads), lr=s.lr)
    groups = decay_groups(model, s.weight_decay)
    return AdamW(groups, lr=s.lr, betas=(0.9, 0.95)) if s.optimizer == "adamw" else SGD(groups, lr=s.lr, momentum=0.9)


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


def count(model):
    """(all parameters, those that train)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(s, model, data):
    """-> {"val_loss": nats per token, label or image} and the task's scores, on the same rows at every call."""
    training, total, terms = model.training, 0.0, 0
    model.eval()
    with torch.random.fork_rng():  # a VAE draws latents here: the same ones each time, and none of training's
        torch.manual_seed(s.seed)
        for batch in data.validation():
            loss_sum, n = loss_on(s, model.loss, batch)
            total, terms = total + float(loss_sum), terms + int(n)
        scores = {"val_loss": total / max(terms, 1)} | data.scores(model, total)
    model.train(training)
    return scores


def loss_on(s, loss, batch):
    with torch.autocast(s.device.split(":")[0], getattr(torch, s.dtype), enabled=s.dtype != "float32"):
        return loss(**{name: tensor.to(s.device) for name, tensor in batch.items()})


def better(s, scores, best):
    name = "entity_f1" if "entity_f1" in scores else TASKS[s.task].best
    if best is None:
        return True
    sign = 1 if name.endswith("loss") else -1
    a, b = ((sign * x[name], x["val_loss"]) for x in (scores, best))
    return a < b  # of equal scores, which are common on few rows, the loss decides


def describe(scores):
    words = {
        "val_loss": "validation loss",
        "f1": "F1",
        "macro_f1": "macro F1",
        "entity_f1": "entity F1",
        "chrf": "chrF",
    }
    told = [(words.get(name, name.replace("_", " ")), value) for name, value in scores.items() if name != "sample"]
    return ", ".join(
        f"{value:.4f} {name}" if name == "bits per byte" else f"{name} {value:.4f}" for name, value in told
    )


def peak_memory_mb(s):
    return torch.cuda.max_memory_allocated() / 2**20 if s.device.startswith("cuda") else runs.peak_memory_mb()


# --- loop -------------------------------------------------------------------------------------------------------------


def fit(s, model, data, teacher, folder, resume, record):
    """Trains to s.steps, or until patience runs out, and returns the progress. Keeps the best model by the task's score
    in `folder` and the last state in `folder/state`; record(status, progress) writes args.json."""
    from tqdm import tqdm

    optimizer = optimizer_of(s, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss, attack = objective(s, model, teacher, data), attack_of(s, model)
    loss = torch.compile(loss) if s.compile else loss
    # The loss is a sum and its gradients larger than usual: start lower, the scaler finds the rest by itself.
    scale = 2.0**16 / (s.batch_size * (s.seq_len or 1))
    scaler = torch.amp.GradScaler(s.device.split(":")[0], init_scale=scale, enabled=s.dtype == "float16")
    checkpoint, metrics = folder / "state" / "checkpoint.safetensors", folder / "metrics.jsonl"
    fresh = checkpoint.with_name("checkpoint-next.safetensors")
    if resume:
        progress = load_checkpoint(checkpoint, model, optimizer, scaler)
        for name, size in progress["sizes"].items():  # what was written after the checkpoint will be written again
            content = (folder / name).read_bytes()[:size] if size else b""
            write_beside(folder / name, lambda beside, content=content: beside.write_bytes(content))
    else:
        progress = dict(step=0, elapsed=0.0, before=evaluate(s, model, data), best=None, best_step=0, without_gain=0)
        progress["before"]["sample"] = sample(s, model, data, folder, "before training")
        print("before: " + describe(progress["before"]))
        if teacher is not None:
            print("teacher: " + describe(evaluate(s, teacher, data)))
        if s.finetune and not getattr(model, "fresh", ()):  # it may become worse: then what it was stays
            progress["best"] = progress["before"]
            save_model(s, model, folder)
    started = time.perf_counter() - progress["elapsed"]

    def save():
        """Writes the checkpoint beside its place: it takes it (keep) once the next loss has shown that it is sound."""
        sizes = {p.name: p.stat().st_size if p.exists() else 0 for p in (metrics, folder / "samples.txt")}
        progress.update(elapsed=time.perf_counter() - started, sizes=sizes)
        save_checkpoint(fresh, model, optimizer, progress, scaler)
        return dict(progress)

    def keep(saved, status="unfinished"):
        os.replace(fresh, checkpoint)
        record(status, saved)

    def backward(batch, weight):
        loss_sum, n = loss_on(s, loss, batch)
        scaler.scale(weight * loss_sum).backward()
        return loss_sum.detach(), n

    keep(save())  # before the first step too: from now on the run can be killed at any moment and resumed
    saved, seen, busy, last, sound, told = None, 0, 0.0, False, True, time.perf_counter()
    model.train()
    with (
        runs.noted_signals() as signals,
        tqdm(total=s.steps, initial=progress["step"], disable=None, unit="step") as bar,
    ):
        while progress["step"] < s.steps and not last:
            step, begun = progress["step"], time.perf_counter()
            lr = s.lr * cosine_schedule(step, s.steps, s.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            total, terms = 0.0, 0
            for index in range(step * s.grad_accum, (step + 1) * s.grad_accum):
                loss_sum, n = attack(functools.partial(backward, data.batch(index)))
                total, terms = total + float(loss_sum), terms + int(n)
            if terms:  # with nothing to learn from, not even the decay is applied
                scaler.unscale_(optimizer)
                for p in parameters:
                    if p.grad is not None:
                        p.grad.div_(terms)  # once, by the terms of all microbatches: any split gives the same gradient
                        if s.l1 and p.dim() > 1:
                            p.grad.add_(p.detach().sign(), alpha=s.l1)
                norm = torch.nn.utils.clip_grad_norm_(parameters, s.clip or math.inf)
                # A float16 gradient may overflow: then the scaler skips the step and lowers its scale.
                sound = math.isfinite(total) and (scaler.is_enabled() or bool(norm.isfinite()))
                if not sound:
                    break
                if saved:
                    saved = keep(saved)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress["step"], last = step + 1, step + 1 == s.steps
            seen, busy = seen + terms, busy + time.perf_counter() - begun

            scores = {}
            if last or (step + 1) % s.eval_every == 0:
                scores = evaluate(s, model, data)
                sound = math.isfinite(scores["val_loss"])
                if not sound:
                    break
                gained = better(s, scores, progress["best"])
                progress["without_gain"] = 0 if gained else progress["without_gain"] + 1
                if gained:
                    progress["best"], progress["best_step"] = scores, step + 1
                    save_model(s, model, folder)
                if s.patience and progress["without_gain"] >= s.patience:
                    last = True
                    bar.write(f"stopped early at step {step + 1}: {s.patience} evaluations without gain")
            if scores or (step + 1) % s.log_every == 0:
                elapsed, rate, memory = time.perf_counter() - started, seen / busy, peak_memory_mb(s)
                entry = dict(step=step + 1, loss=total / max(terms, 1), val_loss=None, lr=lr, tokens_per_s=rate,
                             elapsed_s=elapsed, peak_memory_mb=memory) | scores  # fmt: skip
                with open(metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                text = f"loss {entry['loss']:.3f}, lr {lr:.1e}, {rate:,.0f} {data.unit}/s, {memory:,.0f} MB"
                bar.set_postfix_str(text)
                if bar.disable and (scores or step < s.log_every or time.perf_counter() > told + 15):  # no terminal
                    told = time.perf_counter()
                    left = elapsed / (step + 1) * (s.steps - step - 1)
                    print(f"step {step + 1}/{s.steps}: {text}, {left:.0f} s left", flush=True)
                if scores:
                    bar.write(f"step {step + 1}: {describe(scores)}")
                seen, busy = 0, 0.0
            if (step + 1) % s.sample_every == 0 and not last:
                bar.write(f"--- step {step + 1}\n{sample(s, model, data, folder, f'step {step + 1}')}\n---")
            bar.update()
            if last or signals or (step + 1) % s.save_every == 0:
                if signals and progress["best"] is None:
                    save_model(s, model, folder)  # something to look at; the next evaluation replaces it
                saved = save()
            if last or signals:
                keep(saved)
                break
    if not sound:
        fresh.unlink(missing_ok=True)
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step + 1}; the checkpoint in {folder} is from before: "
            f"python train.py --resume {folder} --lr {s.lr / 4:g}"
        )
    if progress["step"] == s.steps or last:
        record("finished", progress)
    if signals:
        print(f"stopped at step {progress['step']} and saved; to go on: python train.py --resume {folder}")
        raise SystemExit(128 + signals[0])
    return progress


def sample(s, model, data, folder, title):
    """Samples into samples.txt; returns the sample."""
    model.eval()
    text, path = data.sample(model, folder), folder / "samples.txt"
    model.train()
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_beside(path, lambda beside: beside.write_text(f"{earlier}--- {title}\n{text}\n\n", encoding="utf-8"))
    return text


# --- runs -------------------------------------------------------------------------------------------------------------

RUN_FILES = ["args.json", "metrics.jsonl", "state", "config.json", "model.safetensors", "tokenizer.json", "loss.png",
             "metrics.json", "samples.txt", "adapter_config.json", "adapter_model.safetensors", "reconstructions.png",
             "samples.png", "walk.png"]  # fmt: skip


def folder_of(s):
    """The name of a run's folder under out/: its model, or its task if the model does not imply that."""
    return (s.model if s.task == TASK_OF[s.model] else s.task) + (f"-{s.finetune}" if s.finetune else "")


def finished(s, status="finished"):
    """The newest run beside --out that has what s builds on, or None: a teacher of the task for distillation, else a
    pretrained model, which for a task of BERT is one of masked words."""
    task, methods = s.task, (None,)
    if s.finetune == "distill" and task in FIELDS:
        methods = (None, "full", "freeze", "lora")
    elif s.model == "bert" and task in FIELDS:
        task = "mlm"

    def wanted(run):
        of = run["settings"]
        return (of["model"], of["task"], run["status"]) == (s.model, task, status) and of["finetune"] in methods

    return newest(Path(s.out).parent, wanted)


def find_base(s):
    """The newest finished model that s builds on; without one, trains it first, or goes on with that."""
    root, base = Path(s.out).parent, finished(s)
    if base is None:
        same = "model size tokenizer vocab_size cell latent reconstruction beta seed device dtype threads".split()
        new = Settings(**{name: getattr(s, name) for name in same}, task="mlm" if s.model == "bert" else s.task)
        if s.finetune == "distill" and s.task in FIELDS and s.model == "bert":
            new.task, new.finetune, new.data = s.task, "full", s.data
        elif new.task in FIELDS:
            new.data = s.data
        if s.model != "vae":
            new.seq_len, new.dropout = s.seq_len, s.dropout
        complete(new)
        new.out = str(root / folder_of(new))
        if s.model != "vae" and s.finetune in ("lora", "freeze"):  # what cannot be adapted is better known before
            with torch.device("meta"):
                adapt(s, new_model(dataclasses.replace(new, task=s.task), Blank(s.vocab_size)))
        unfinished = finished(s, "unfinished")
        then = f"going on with {unfinished}" if unfinished else f"training one first, into {new.out}"
        print(f"no finished model to build on under {root}/: {then}")
        base = resume_run(unfinished, new, ()) if unfinished else run(new)
        print()
    print(f"base: {base}")
    return str(base)


class Blank:
    """Stands for data and tokenizer where only the sizes of a model are asked for."""

    labels, eos_id, masked_per_pair = ("a", "b"), 0, 1.0

    def __init__(self, vocab_size):
        self.vocab_size, self.tokenizer = vocab_size, self

    def token_to_id(self, token):
        return 0


def check_free(s, out):
    """Refuses an output folder that holds something which the run would replace."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; wanted a folder")
    there = [name for name in RUN_FILES if (out / name).exists()]
    status = read_json(out / "args.json").get("status") if "args.json" in there else None
    if there and not s.overwrite and status != "begun":  # begun: was killed before its first checkpoint
        go_on = f"an unfinished run (--resume {out} goes on with it)"
        what = go_on if status == "unfinished" else "a finished run" if status else f"a result ({there[0]})"
        raise ValueError(f"--out {out}: holds {what}; wanted --overwrite to replace it, or another --out")


def set_up(s, folder, resume=False):
    """-> (model, data, teacher or None). A new run prepares its data in `folder`; a resumed one finds it there."""
    known = tokenizer = teacher = None
    if s.finetune:
        if s.finetune != "distill" and (Path(s.base) / "adapter_config.json").exists():
            raise ValueError(f"--base {s.base}: is an adapter; to build on it: python train.py --merge --base {s.base}")
        known, tokenizer = load_model(s.base)
        if type(known) is not MODELS[s.model]:
            kind = next(name for name, kind in MODELS.items() if type(known) is kind)
            raise ValueError(f"--base {s.base}: holds a {kind}; wanted a {s.model} for --task {s.task}")
    (folder / "state").mkdir(parents=True, exist_ok=True)
    if s.task != "images":
        context = context_of(known) if known else None
        s.seq_len = s.seq_len or min(RECIPES[s.model, s.task][0]["seq_len"], context or 10**9)
        if context and s.seq_len > context:
            raise ValueError(f"--seq-len {s.seq_len}: longer than the context of {s.base}, {context} tokens")
        if resume:
            tokenizer = Tokenizer.load(folder)
        else:
            prepare = prepare_rows if s.task in FIELDS else prepare_text
            tokenizer = prepare(s, folder / "state", tokenizer)
        tokenizer.save(folder)
    data = load_data(s, folder / "state", tokenizer, known)
    torch.manual_seed(s.seed)
    if s.finetune == "distill":
        teacher = known
        of = "pretrain" if s.task == "mlm" else s.task
        if s.model == "bert" and (teacher.config.task, *teacher.config.labels) != (of, *getattr(data, "labels", ())):
            raise ValueError(f"--teacher {s.base}: was trained for {teacher.config.task}, or on other labels; wanted "
                             f"{of} on the labels of --data")  # fmt: skip
        model = student_of(s, teacher)
    elif known and s.model == "bert":
        model, _ = load_model(s.base, task=s.task, labels=getattr(data, "labels", None))
        if s.finetune == "full" and s.task in FIELDS:
            renew(model)
    else:
        model = known or new_model(s, data)
    if s.finetune and s.dropout is not None and s.model != "vae":
        model.config.dropout = s.dropout
    if s.adversarial == "rdrop" and not model.config.dropout:
        raise ValueError("--adversarial rdrop: compares two passes of different dropout; wanted --dropout above 0")
    adapt(s, model)
    model.to(s.device)
    every, trained = count(model)
    why = fused.why_not(*[torch.empty(1, 1, 1, 8, device=s.device, dtype=getattr(torch, s.dtype))] * 3)
    how = f"; attention: {f'plain PyTorch ({why})' if why else 'fused'}" if s.model not in ("vae", "rnn") else ""
    print(f"model: {every:,} parameters, {trained:,} trained ({trained / every:.1%}); {s.device}, {s.dtype}{how}")
    return model, data, teacher


def context_of(model):
    """The most tokens that a model can read, or None where there is no limit."""
    config = model.config
    context = getattr(config, "n_positions", getattr(config, "max_position_embeddings", None))
    return config.max_len - 1 if hasattr(config, "max_len") else context  # a target has one token more


def run(s, resume=False):
    """Trains from settings to a finished folder, which it returns."""
    started, out = time.perf_counter(), Path(s.out)
    if not resume or s.task == "images":  # which is read anew; all else was kept as it was prepared
        check_data(s)
    if not resume:
        check_free(s, out)
        if s.finetune:
            if s.task in FIELDS and not s.base:
                rows_of(s)  # what is wrong with them is better known before the base is trained
            s.base = s.base or find_base(s)
            if out.resolve() == Path(s.base).resolve():
                raise ValueError(f"--out {out}: is --base too; wanted another folder")
    identity = identity_of(s.base) if s.finetune else None
    labels = ()

    def record(status, progress, folder=out):
        note = dict(status=status, **progress, base_sha256=identity, labels=labels, torch=torch.__version__)
        write_json(folder / "args.json", dict(settings=dataclasses.asdict(s), **note))

    if resume:
        if read_json(out / "args.json").get("base_sha256") != identity:
            raise ValueError(f"--resume {out}: {s.base}/model.safetensors is no longer what the run began with")
        model, data, teacher = set_up(s, out, resume=True)
        labels = getattr(data, "labels", ())
    else:  # set up beside --out, in the nearest folder that exists: what is there stays until that has worked
        place = next(parent for parent in out.absolute().parents if parent.is_dir())
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
        try:
            model, data, teacher = set_up(s, beside)
            labels = getattr(data, "labels", ())
            record("begun", {"step": 0}, beside)
            out.mkdir(parents=True, exist_ok=True)
            runs.clear(out, RUN_FILES)
            for path in sorted(beside.iterdir()):  # args.json first
                os.replace(path, out / path.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        data.folder = out / "state"  # where its files lie now

    progress = fit(s, model, data, teacher, out, resume, record)
    runs.plot(out)
    if progress["best_step"] != progress["step"]:
        model = load_model(out)[0].to(s.device)
    after, before = sample(s, model, data, out, "after training"), progress["before"]
    best = {name: value for name, value in progress["best"].items() if name != "sample"}
    others = report(s, out, best, data)
    print(f"\nbefore: {describe(before)}\n{before['sample']}\n")
    print(f"after: {describe(best)}, step {progress['best_step']}\n{after}\n")
    for name, scores in others.items():
        print(f"baseline, {name}: {describe(scores)}")
    seconds = f"{progress['elapsed']:.0f} s" + (
        " in all" if resume else f", {time.perf_counter() - started:.0f} s with all set-up"
    )
    if progress["best_step"] == 0:
        print("nothing was gained: what was kept is the model as it was before")
    print(f"{out}: {count(model)[1]:,} parameters trained in {seconds}")
    return out


def report(s, folder, scores, data):
    """Writes metrics.json, the scores of the model beside the baselines', which it returns."""
    others = data.baselines()
    write_json(folder / "metrics.json", {"task": s.task, "data": s.data, **scores, "baselines": others})
    return others


def resume_run(name, changed, given):
    """Goes on with a run; settings given anew replace the run's, save those that made its model and data."""
    out = Path(name) if name else newest("out", lambda run: run["status"] == "unfinished")
    if out is None or not (out / "args.json").exists():
        raise ValueError(f"--resume {out or ''}: " + ("holds no args.json" if out else "no unfinished run under out/"))
    saved = read_json(out / "args.json")
    try:
        s, status, step = Settings(**saved["settings"]), saved["status"], saved["step"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{out}/args.json: not of this train.py ({error})") from None
    s.out = str(out)
    for field in dataclasses.fields(Settings):
        old, new = getattr(s, field.name), getattr(changed, field.name)
        if field.name in given and old != new:
            if field.name not in CHANGEABLE:
                raise ValueError(f"{flag(field.name)} {new}: the run in {out} has {old}, which resuming cannot change")
            print(f"{flag(field.name)}: {old} -> {new}")
            setattr(s, field.name, new)
    if s.steps <= step and status != "begun":
        raise ValueError(f"--resume {out}: {status} at step {step}; to go on, add --steps with more than {step}")
    return run(complete(s), resume=status != "begun")  # begun: killed before its first checkpoint


# --- uses of a model --------------------------------------------------------------------------------------------------


def load_for(action, s):
    """-> (folder, model, tokenizer) of --base or the newest finished run; settings are completed to fit it."""
    folder = Path(s.base) if s.base else newest("out", lambda run: run["status"] == "finished")
    if folder is None:
        raise ValueError(f"{action}: no finished run under out/; wanted --base")
    model, tokenizer = load_model(folder)
    s.model = next(name for name, kind in MODELS.items() if type(model) is kind)
    own = getattr(model.config, "task", None)  # a BERT's
    s.task = ("mlm" if own == "pretrain" else own) or TASK_OF[s.model]
    of_run = run_of(folder)
    s.data, s.seq_len = s.data or of_run.get("data"), s.seq_len or of_run.get("seq_len")
    context = context_of(model) if s.model != "vae" else None
    if s.seq_len and context and s.seq_len > context:
        raise ValueError(f"--seq-len {s.seq_len}: the context of {folder} is {context} tokens")
    s.seq_len = s.seq_len or context
    s.finetune = s.base = None  # nothing of them matters from here on
    return folder, model.to(complete(s).device).eval(), tokenizer


def write_text(action, s, prompt):
    """--sample and --chat"""
    folder, model, tokenizer = load_for(action, s)
    if s.task == "images":
        raise ValueError(f"{action}: {folder} is a VAE, which writes no text; its pictures are in its folder")
    if s.task != "lm":
        if action == "--chat":
            raise ValueError(f"--chat: {folder} was trained for {s.task}; wanted --sample, or a language model")
        if s.task == "mlm":
            return print(fill_masks(s, model, tokenizer, prompt))
        row = {FIELDS[s.task][0]: prompt}
        if s.task == "tag":
            row = {"tokens": re.findall(r"\w+|[^\w\s]", prompt)}
        if s.task == "qa":
            question, mark, context = prompt.partition("?")
            if not (mark and context.strip()):
                raise ValueError(f"--sample {prompt!r:.60}: wanted a question that ends in '?' and, after it, a text")
            row = {"question": question + mark, "context": context.strip()}
        return print(show(s.task, row, *predict(s, model, tokenizer, [row])))
    if action == "--chat":
        print(f"{folder} goes on with what you write; an empty line ends")
    text = prompt if action == "--sample" else ""
    while True:
        if action == "--chat":
            try:
                line = input("> ")
            except EOFError:
                line = ""
            if not line:
                return
            text += line + "\n"
        else:
            print(text, end="")
        for piece in continue_text(s, model, tokenizer, text):
            print(piece, end="", flush=True)
            text += piece
        print()
        if action == "--sample":
            return
        text += "\n" * (not text.endswith("\n"))


def score(action, s, given):
    """--eval and --merge, on --data if it is given, else on what the run itself kept for validation"""
    folder, model, tokenizer = load_for(action, s)
    out = Path(s.out if "out" in given else f"{folder}-merged")
    if "data" in given or s.task == "images":
        check_data(s)
    if action == "--merge":
        if not (folder / "adapter_config.json").exists():
            raise ValueError(f"--merge: {folder} is no adapter; wanted --base to name the folder of a LoRA run")
        check_free(s, out)
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or folder
        if out.resolve() in (folder.resolve(), Path(base).resolve()):
            raise ValueError(f"--out {out}: is the adapter or its base; wanted another folder")
    with tempfile.TemporaryDirectory() as temporary:
        own, kept = folder / "state", "val.jsonl" if s.task in FIELDS else "val.npy"
        other = "data" in given or not (own / kept).exists()
        if s.task in FIELDS:
            labels = getattr(model.config, "labels", ())
            rows = rows_to_score(s, labels) if other else read_rows(own / kept)
            data = Labelled(s, tokenizer, read_rows(own / "train.jsonl"), rows, labels, segments_of(model))
        else:
            if tokenizer and other:
                own = Path(temporary)
                prepare_text(s, own, tokenizer)
            data = load_data(s, own, tokenizer)
        scores = evaluate(s, model, data)
        print(f"{folder}: {describe(scores)}")
        if action == "--eval":
            for name, others in report(s, folder, scores, data).items():
                print(f"baseline, {name}: {describe(others)}")
        else:
            change = merge_lora(model)
            print(f"merged: {describe(evaluate(s, model, data))}; the largest change of a weight is {change:.3g}")
            out.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(out)
            if tokenizer:
                tokenizer.save(out)
            runs.clear(out, RUN_FILES, but=("model.safetensors", "config.json", "tokenizer.json"))
            print(f"next: python train.py --base {out} {'--chat' if s.task == 'lm' else '--eval'}")


def dry_run(s):
    if s.finetune and not s.base:
        base = finished(s)
        if base is None:
            raise ValueError(f"--finetune {s.finetune}: nothing pretrained under {Path(s.out).parent}/; wanted --base")
        s.base = str(base)
    for name, value in dataclasses.asdict(s).items():
        print(flag(name), value)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(said):
        short = dataclasses.replace(s, out=f"{temporary}/run", steps=3, warmup=0, log_every=1, eval_every=9)
        run(short)
        lines = (Path(short.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    print(*(line for line in said.getvalue().splitlines() if line.startswith(("data:", "model:"))), sep="\n")
    first, second = (json.loads(line)["elapsed_s"] for line in lines[:2])  # the third evaluates
    print(f"{s.steps} steps would take {s.steps * (second - first):.0f} s and {peak_memory_mb(s):,.0f} MB; "
          "nothing was written")  # fmt: skip


def main(argv=None):
    s, given, (action, value) = parse(Settings, argv, ACTIONS, "train.py", __doc__.split("In order:")[0])
    try:
        if action in ("--sample", "--chat"):
            return write_text(action, s, value)
        if action in ("--eval", "--merge"):
            return score(action, s, given)
        if action == "--dry-run":
            return dry_run(complete(s))
        out = resume_run(value, s, given) if action == "--resume" else run(complete(s))
    except (ValueError, OSError, ImportError, FloatingPointError, SafetensorError) as error:
        if os.environ.get("MINIMAL_TRACEBACK"):
            raise
        print("train.py: error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if "alloc" not in str(error) and "out of memory" not in str(error):
            raise
        print(f"train.py: error: not enough memory; wanted a smaller model or --batch-size: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; a run that had begun goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
    what_next(Settings(**read_json(out / "args.json")["settings"]), out)


def what_next(s, out):
    """Names the commands that suit a finished run."""
    beside = f" --base {out}" if out.parent != Path("out") else ""
    if s.task == "images":
        return print(f"next: look at the pictures in {out}, then: python train.py --model vae --latent 2 --out {out}-2")
    asked = {"classify": "Open a file.", "tag": "x = 'a for b'", "seq2seq": "Open a file."}.get(s.task, s.prompt)
    asked = "Who wrote it? It was written by Ada." if s.task == "qa" else asked
    print(f"next: python train.py --base {out} --sample {json.dumps(asked)}")
    if s.finetune == "lora":
        print(f"      python train.py --base {out} --merge")
    elif s.task == "mlm":
        print(f"      python train.py --task classify --finetune full{beside}")
    elif s.task == "lm":
        print(f"      python train.py --base {out} --chat" if s.finetune else
              f"      python train.py --model {s.model} --finetune lora{beside}")  # fmt: skip
    else:
        print(f"      python train.py --base {out} --eval")


if __name__ == "__main__":
    main()
