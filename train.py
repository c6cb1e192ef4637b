# SPDX-License-Identifier: MIT
"""Pretrains and fine-tunes the models of `minimal/`.

    python train.py                                        pretrain a GPT on the standard library's source
    python train.py --finetune lora                        adapt the newest pretrained model to English prose
    python train.py --model bert                           pretrain a BERT; --model rnn, --model vae
    python train.py --task classify --finetune full        give it a task: classify, tag, qa; --task seq2seq
    python train.py --finetune distill                     teach a model of half the layers
    python train.py --base smollm2 --finetune lora --data chats.jsonl      adapt a model that others pretrained
    python train.py --base out/gpt-lora --sample "Return"  use a result

In order: settings, loop, runs, main. Beside it, models.py has the models, their adaptation and what they minimise,
tasks.py the data and the scores of each task, uses.py what a result is good for. A run is a folder: the model in the
Hugging Face layout (or the adapter in PEFT's), args.json, metrics.jsonl, metrics.json, loss.png, samples.txt, and
state/, with the data as it was prepared and the checkpoint that resumes the run exactly. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import io
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

# Waiting threads of GNU OpenMP spin, 300,000 turns and more, also while another program needs the core. Beside one that
# kept one of two cores busy, 5,000 turns made a training step take 0.85 s instead of 1.06, for half of the CPU time.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: no traceback
gc.disable()  # imports make 170,000 objects that stay: to look for garbage among them takes a fifth of their time
import torch
from safetensors import SafetensorError

from minimal import fused, quant, runs
from minimal.chat import START, kind_of
from minimal.checkpoint import load_checkpoint, save_checkpoint, write_beside
from minimal.examples import FIELDS
from minimal.matmul import use_onednn
from minimal.microbatch import free_bytes, largest_microbatch, peak_bytes
from minimal.optim import cosine_schedule
from minimal.recompute import Meter, table
from minimal.runs import newest, read_json, write_json
from minimal.settings import converter, flag, parse, setting
from models import (
    ADAPTERS,
    MODELS,
    PACKAGED,
    SIZES,
    adapt,
    attack_of,
    count,
    identity_of,
    load_model,
    load_tokenizer,
    locate,
    new_model,
    note_of,
    objective,
    optimizer_of,
    purpose_of,
    renew,
    save_model,
    save_tokenizer,
    savings,
    spare,
    student_of,
    weights_of,
)
from tasks import (
    SOURCES,
    TASK_OF,
    TASKS,
    better,
    chat_format,
    chats_of,
    check_data,
    check_prompt,
    check_unlabelled,
    context_of,
    describe,
    evaluate,
    load_data,
    loss_on,
    prepare_rows,
    prepare_text,
    read_rows,
    rows_of,
    taken_by,
)
from uses import (
    check_free,
    check_lora,
    check_options,
    compare,
    export,
    few_shot,
    merge,
    report,
    score,
    show_data,
    write_text,
    written_beside,
)

gc.freeze()  # they are not looked through again
gc.enable()

# --- settings ---------------------------------------------------------------------------------------------------------

RECIPES = {  # (model, task): what a setting left open becomes in training anew, and what of it adapting changes
    ("gpt", "lm"): (
        dict(data="stdlib-code", steps=330, batch_size=8, seq_len=256, lr=0.01, optimizer="muon", prompt="def"),
        dict(data="stdlib-prose", steps=200, prompt="Return"),
    ),
    ("gpt", "chat"): (
        dict(data="stdlib-signatures", steps=330, batch_size=8, seq_len=256, lr=0.01, optimizer="muon"),
        dict(steps=100),
    ),
    ("llama", "lm"): (
        dict(data="stdlib-code", steps=330, batch_size=8, seq_len=256, lr=0.01, optimizer="muon", prompt="def"),
        dict(data="stdlib-prose", steps=200, prompt="Return"),
    ),
    ("llama", "chat"): (
        dict(data="stdlib-signatures", steps=330, batch_size=8, seq_len=256, lr=0.01, optimizer="muon"),
        dict(steps=100),
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
RATES = {  # learning rates of adapting, with AdamW: of a small model trained here, and of a large one of others
    "full": (1e-3, 1e-4),
    "freeze": (2e-3, 5e-4),
    "surgical": (1e-3, 2e-4),
    "lora": (5e-3, 1e-3),
    "adapter": (5e-3, 1e-3),
    "prefix": (2e-2, 5e-3),
    "prompt": (5e-2, 1e-2),
    "distill": (2e-3, 5e-4),
}


@dataclasses.dataclass
class Settings:
    """Every setting of a run. None: taken from RECIPES, or found by itself."""

    model: str = setting(None, list(MODELS), "what to train; default: what the task or --base says, else gpt")
    task: str = setting(None, list(TASKS), "what to learn; default: what --data holds, or lm (gpt, llama, rnn), mlm "
                    "(bert), seq2seq (transformer)")  # fmt: skip
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
    base: str = setting(None, str, "what to adapt (default: the newest pretrained beside --out) or use (the newest): a "
                    "run's or a Hugging Face folder, a .gguf, " + ", ".join(PACKAGED) + ", or a hub's OWNER/NAME"
                    )  # fmt: skip
    finetune: str = setting(None, ["full", "freeze", "surgical", *ADAPTERS, "distill", "all"], "adapt --base instead "
                        "of training anew; all: each method but distill in turn, and a table")  # fmt: skip
    top: int = setting(1, (int, 1), "freeze: blocks that train, from the top, with what stands above them")
    rank: int = setting(8, (int, 1), "LoRA: rank of the update; 8 serves most tasks")
    alpha: float = setting(16.0, (float, 1e-9), "LoRA: the update counts alpha / rank; twice the rank is common")
    lora_dropout: float = setting(0.0, (float, 0, 1), "LoRA: dropout before A; an adapter this small seldom overfits")
    target: str = setting("all-linear", str, "LoRA: layers by name, suffix, list, expression; or all-linear")
    lora_plus: float = setting(1.0, (float, 1), "LoRA: B learns so many times as fast as A (LoRA+, where it is 16)")
    quantise_base: str = setting("none", ["none", *quant.KINDS], "LoRA: the frozen base in 4 bits (nf4: QLoRA) or 8; "
                             "--sample, --chat: the model so, int4 and int8 over twice as fast")  # fmt: skip
    rslora: bool = setting(False, bool, "LoRA: scale by alpha / sqrt(rank), steadier at high ranks")
    dora: bool = setting(False, bool, "LoRA: learn direction and magnitude apart (DoRA)")
    bottleneck: int = setting(32, (int, 1), "adapter: width between the two projections")
    placement: str = setting("pfeiffer", ["pfeiffer", "houlsby"], "adapter: after the MLP, or after attention too")
    virtual_tokens: int = setting(16, (int, 1), "prefix, prompt: virtual tokens before the text")
    prefix_hidden: int = setting(256, (int, 0), "prefix: width of the MLP that makes it while training; 0: without")
    budget: float = setting(0.25, (float, 1e-9, 1.0000001), "surgical: share of the parameters that may train")
    teacher: str = setting(None, str, "distill: folder of the teacher (default: the newest model of the task)")
    student_layers: int = setting(None, (int, 1), "distill: blocks of the student; default half of the teacher's")
    distill_temperature: float = setting(2.0, (float, 1e-3), "distill: softens both distributions (Hinton's T)")
    distill_weights: str = setting("5,2,1", str, "distill: soft targets, hard targets, cosine of hidden states")
    # optimisation
    steps: int = setting(None, (int, 1), "optimiser steps; by model and task, for about two minutes on two cores")
    batch_size: int = setting(None, (int, 1), "rows in a microbatch; by model and task, for two cores")
    grad_accum: int = setting(1, ("auto", int, 1), "microbatches in a step. auto: --batch-size is then the rows of a "
                          "step, in the largest microbatches that fit --memory")  # fmt: skip
    memory: float = setting(None, (float, 1e-3), "--grad-accum auto: GB that the process may take, on a GPU what "
                        "tensors take there; default: four fifths of what is free")  # fmt: skip
    seq_len: int = setting(None, (int, 1), "tokens in a row; by model and task (chat: 256), at most the base's "
                         "context")  # fmt: skip
    optimizer: str = setting(None, ["muon", "adamw", "sgd"], "muon pretrains in fewer steps, adamw adapts")
    lr: float = setting(None, (float, 0, 1e37), "peak learning rate; by model, task and method: RECIPES, RATES")
    warmup: int = setting(None, (int, 0), "steps of linear warm-up; default a twentieth of --steps")
    weight_decay: float = setting(0.1, (float, 0), "decay of matrices; norms, biases and embeddings have none")
    l1: float = setting(0.0, (float, 0), "weight of the sum of all matrices' absolute values; not in the loss shown")
    dropout: float = setting(None, (float, 0, 1), "default 0, or 0.1 for labelled tasks; adapting: as in the base")
    train_on: str = setting("answers", ["answers", "all"], "chat: which tokens count; the questions are no goal")
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
    recompute: bool = setting(False, bool, "keep no activations inside the blocks: less memory, a third more time")
    compile: bool = setting(
        False, bool, "torch.compile the loss; on a CPU the seconds it takes are hardly ever won back"
    )
    profile: bool = setting(False, bool, "profile the third to fifth step: trace.json for Perfetto, the ten costliest "
                        "operators, where the memory goes; then training goes on")  # fmt: skip
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
    shots: int = setting(0, (int, 0), "--eval of a language model on labelled rows: examples in the prompt")
    tolerance: float = setting(1e-3, (float, 0), "--merge: largest change of a logit that is accepted")
    beam: int = setting(1, (int, 1), "seq2seq: hypotheses kept in decoding; 1 is greedy")


# What may change when a run is resumed: all that shapes neither the model nor the order of its data.
CHANGEABLE = set("steps lr warmup weight_decay l1 clip patience device dtype recompute compile profile "
                 "threads save_every eval_every sample_every log_every prompt temperature "
                 "top_p new_tokens".split())  # fmt: skip

# What has no use beside an action: it does not train.
TRAINING = ("finetune steps lr optimizer warmup weight_decay l1 clip patience dropout label_smoothing adversarial "
            "epsilon augment profile recompute compile grad_accum memory save_every eval_every sample_every "
            "log_every").split()  # fmt: skip


ACTIONS = {  # instead of training; at most one
    "--resume": dict(nargs="?", const="", metavar="DIR", help="go on with a run, the newest unfinished by default"),
    "--sample": dict(metavar="TEXT", help="print what --base makes of TEXT: a continuation, label, tags, translation, "
                     "[MASK] filled in, or the answer to a question that ends in '?' from what follows it"),
    "--chat": dict(action="store_true", help="write together with --base, line by line"),
    "--eval": dict(action="store_true", help="score --base, on all rows of --data, or on what its run held out; the "
                   "scores replace those in its metrics.json. A language model labels rows of --task classify by "
                   "likelihood, after --shots examples, which are not scored"),
    "--merge": dict(action="store_true", help="write --base, an adapter, and its base as one model into --out, by "
                    "default BASE-merged"),
    "--export": dict(choices=["hf", "gguf", "torch"], help="write --base for others: a Hugging Face folder, a GGUF for "
                     "llama.cpp, a program of torch.export; LoRA is merged. Into --out, by default "
                     "BASE-hf, BASE.gguf or BASE.pt2 beside --base, if that is under out/, else in out/"),
    "--show-data": dict(type=converter((int, 1)), metavar="N", help="print N rows of the data as the model would read "
                        "them, what is trained in colour"),
    "--dry-run": dict(action="store_true", help="build all, time a step, write nothing"),
}  # fmt: skip


def choose_device(s):
    """-> s.device, the best there is if it names none. ValueError: one that is not to be had."""
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        usable = torch.device(s.device).type in ("cpu", "cuda", "mps") and torch.zeros(1, device=s.device) is not None
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ValueError(f"--device {s.device}: not to be had with this PyTorch here; wanted cpu, cuda or mps")
    return s.device


def complete(s):
    """Fills what was left open, from the task, the recipe and the machine; refuses what does not go together."""
    if s.teacher and s.base and Path(s.teacher).resolve() != Path(s.base).resolve():
        raise ValueError(f"--teacher {s.teacher} beside --base {s.base}: wanted one, which the student begins from too")
    if (s.task is None or s.model is None) and (s.base or s.teacher):
        s.model, task = purpose_of(s.teacher or s.base, s.model, "--teacher" if s.teacher else "--base")
        s.task = s.task or task
    if s.task is None and s.model in (None, *TASKS["chat"].models) and s.data:
        check_unlabelled(s.data)
        kind = kind_of(s.data) or ("unknown" if s.data.endswith(".jsonl") else "text")  # chats_of names what is wrong
        s.task = run_of(s.teacher or s.base).get("task") if kind == "text" else "chat"
    s.model = s.model or (TASKS[s.task].models[0] if s.task else "gpt")
    s.task = s.task or TASK_OF[s.model]
    if s.model not in (able := TASKS[s.task].models):
        raise ValueError(f"--task {s.task}: not for --model {s.model}; wanted --model {' or '.join(able)}")
    if s.model == "vae":
        asked = [flag(name) for name in ("adversarial", "label_smoothing", "augment") if getattr(s, name)]
        asked += [f"--finetune {s.finetune}"] if s.finetune not in (None, "full", "lora") else []
        if asked:
            raise ValueError(f"{asked[0]}: a VAE has no blocks, classes or tokens for it; wanted another --model")
    if s.finetune == "distill":
        weights_of(s)
        s.base = s.teacher = s.teacher or s.base
        if s.adversarial:
            raise ValueError(f"--adversarial {s.adversarial}: not beside --finetune distill")
    if s.base and not s.finetune:
        raise ValueError(f"--base {s.base}: wanted --finetune beside it, or an action such as --sample")
    if s.finetune == "all":
        raise ValueError("--finetune all: wanted no action beside it")
    if s.lora_plus != 1 and s.optimizer not in (None, "adamw"):
        raise ValueError(f"--lora-plus {s.lora_plus:g}: has two rates of AdamW; wanted no --optimizer {s.optimizer}")
    if s.adversarial and s.compile:
        raise ValueError(
            f"--adversarial {s.adversarial}: acts by a hook, which --compile passes over; wanted one of them"
        )
    if s.memory and s.grad_accum != "auto":
        raise ValueError(f"--memory {s.memory:g}: a budget in GB for --grad-accum auto; wanted that beside it")
    if s.recompute and (s.model in ("rnn", "vae") or s.compile):
        beside = "--compile" if s.compile else f"--model {s.model}, which has no blocks"
        raise ValueError(f"--recompute: not beside {beside}; wanted one of them")
    if s.label_smoothing and s.task == "qa":
        raise ValueError(f"--label-smoothing {s.label_smoothing}: not for --task qa, whose places are no classes")
    if s.augment and s.task not in ("classify", "seq2seq"):
        raise ValueError(
            f"--augment: would part the tokens of --task {s.task} from its targets; wanted classify or seq2seq"
        )
    anew, adapting = RECIPES[s.model, s.task]
    recipe = anew
    if s.finetune:
        # A task is learnt as from scratch, save by adapters and by one that others pretrained; other text
        # is learnt by smaller steps.
        foreign = bool(s.base) and not run_of(s.base)
        large = foreign and s.model in TASKS["chat"].models  # than what two cores pretrain
        gently = {"optimizer": "adamw", "lr": RATES[s.finetune][large]}
        if s.task in FIELDS and s.finetune not in ADAPTERS:
            gently = {"lr": 1e-2} if s.finetune == "freeze" else {}  # the blocks below cannot be spoilt
            gently |= {"lr": 1.5e-3} if foreign and s.finetune != "freeze" else {}
        recipe = anew | gently | adapting
        recipe |= {"steps": 60, "batch_size": 2} if large else {}
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
    half = choose_device(s).startswith("cuda") and torch.cuda.is_bf16_supported()
    s.dtype = s.dtype or ("bfloat16" if half else "float32")
    if s.threads:
        torch.set_num_threads(s.threads)
    if s.device == "cpu":
        use_onednn()
        short = {"bfloat16": "bf16", "float16": "fp16"}.get(s.dtype)
        known = short and torch.backends.mkldnn.is_available()
        if known and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported")():
            slow = f"note: --dtype {s.dtype}: this processor multiplies it several times as slowly as float32"
            print(slow, file=sys.stderr)
    return s


def split(s, model, loss, data):
    """--grad-accum auto: -> (rows in a microbatch, microbatches in a step), measured on the largest of some batches."""
    batch = max((data.batch(i) for i in range(16)), key=lambda batch: sum(t.numel() for t in batch.values()))
    rows, random = s.batch_size, torch.get_rng_state()
    model.train()  # with dropout, which keeps more

    def peak(r):
        part = {name: t[: len(t) * r // rows] if len(t) >= rows else t for name, t in batch.items()}
        needs = peak_bytes(lambda: loss_on(s, loss, part)[0].backward(), s.device)
        model.zero_grad(set_to_none=True)
        return needs + 8 * count(model)[1]  # and two numbers for each parameter that trains, in the optimiser

    try:
        budget = s.memory * 1e9 if s.memory else 0.8 * free_bytes(s.device)
        each = largest_microbatch(peak, rows, 0.95 * budget)  # later steps find a heap with holes
    except RuntimeError as error:
        raise ValueError(f"--grad-accum auto: {error}") from None
    except ValueError as error:
        raise ValueError(f"--memory {error}; wanted more, --recompute or a shorter --seq-len") from None
    torch.set_rng_state(random)
    print(f"microbatches: {rows // each} of {each} rows, for {budget / 1e9:.2f} GB")
    return each, rows // each


def run_of(folder):
    """The settings of the run that made a folder, or {}."""
    return note_of(folder).get("settings", {})


def peak_memory_mb(s):
    return torch.cuda.max_memory_allocated() / 2**20 if s.device.startswith("cuda") else runs.peak_memory_mb()


# --- loop -------------------------------------------------------------------------------------------------------------


def fit(s, model, data, teacher, folder, resume, record):
    """Trains to s.steps, or until patience runs out, and returns the progress. Keeps the best model by the task's score
    in `folder` and the last state in `folder/state`; record(status, progress) writes args.json. resume: the status of
    the run that goes on, or None."""
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
        progress = dict(step=0, elapsed=0.0, before=None, best=None, best_step=0, without_gain=0, over=None)
        if s.finetune:  # a new model's are told at the end: they need not delay its first step
            before = evaluate(s, model, data) | {"sample": sample(s, model, data, folder, "before training")}
            progress["before"] = before
            print("before: " + describe(before))
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
    due = progress.pop("due", None)  # of a step, already taken, whose evaluation a signal has ended: what to log of it
    saved, (seen, busy), sound, told = None, due[2:] if due else (0, 0.0), True, time.perf_counter()
    last = resume == "unfinished" and progress.get("over") == s.steps  # patience has run out
    first, trace = progress["step"], folder / "trace.json"
    model.train()
    with (
        runs.noted_signals() as signals,
        runs.profiled(trace, s.steps - first) if s.profile else contextlib.nullcontext(int) as profiled,
        tqdm(total=s.steps, initial=progress["step"], disable=None, unit="step") as bar,
    ):
        while progress["step"] < s.steps and not last:
            step, begun = progress["step"], time.perf_counter()
            lr = s.lr * cosine_schedule(step, s.steps, s.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)  # LoRA+ has groups that learn faster
            total, terms = due[:2] if due else (0.0, 0)
            meter = Meter(model) if s.profile and step == first else contextlib.nullcontext()
            for index in range(step * s.grad_accum, (step + 1) * s.grad_accum) if not due else ():
                with meter:
                    loss_sum, n = attack(functools.partial(backward, data.batch(index)))
                total, terms = total + float(loss_sum), terms + int(n)
            if terms and not due:  # with nothing to learn from, not even the decay is applied
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
                if s.profile and step == first:
                    bar.write(f"memory of a step:\n{table(model, optimizer, meter)}\nwhat would save some of it:")
                    batch = data.batch(step * s.grad_accum)
                    bar.write("\n".join(savings(s, model, loss, batch, meter.peak)) or "nothing that --help names")
            optimizer.zero_grad(set_to_none=True)
            progress["step"], last = step + 1, step + 1 == s.steps
            seen, busy, due = seen + terms, busy + time.perf_counter() - begun, None

            scores = {}
            if last or (step + 1) % s.eval_every == 0:
                try:
                    with runs.raised(signals):
                        scores = evaluate(s, model, data)
                except KeyboardInterrupt:  # it is what the resumed run begins with
                    progress.update(step=step, due=[total, terms, seen - terms, busy])
                    if progress["best"] is None:
                        save_model(s, model, folder)
                    keep(save())
                    break
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
            profiled()
            progress["over"] = s.steps if last else None  # at the end: the --steps it was trained for
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
    if signals:
        step = progress["step"] + ("due" in progress)
        print(f"stopped at step {step} and saved; to go on: python train.py --resume {folder}")
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


def folder_of(s):
    """The name of a run's folder under out/: its model, or its task if the model does not imply that."""
    return (s.model if s.task == TASK_OF[s.model] else s.task) + (f"-{s.finetune}" if s.finetune else "")


def finished(s, status="finished"):
    """The newest run beside --out that has what s builds on, or None: a teacher of the task for distillation, else a
    pretrained model, which for a task of BERT is one of masked words."""
    task, methods = s.task, (None,)
    if s.finetune == "distill" and task in FIELDS:
        methods = (None, "full", "freeze", "lora")
    else:
        task = TASK_OF[s.model]

    def wanted(run):
        of = run["settings"]
        return (of["model"], of["task"], run["status"]) == (s.model, task, status) and of["finetune"] in methods

    return newest(Path(s.out).parent, wanted)


def find_base(s):
    """The newest finished model that s builds on; without one, trains it first, or goes on with that."""
    root, base = Path(s.out).parent, finished(s)
    if base is None:
        same = "model size tokenizer vocab_size cell latent reconstruction beta seed device dtype threads".split()
        new = Settings(**{name: getattr(s, name) for name in same}, task=TASK_OF[s.model])
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
                bare = dataclasses.replace(s, quantise_base="none")  # there is nothing to quantise on this device
                adapt(bare, new_model(dataclasses.replace(new, task=s.task), Blank(s.vocab_size)))
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


def prepare(s, folder, resume=False):
    """-> (the base or None, data). A new run prepares its data in `folder`; a resumed one finds it there."""
    known = tokenizer = None
    if s.finetune:
        if s.finetune != "distill" and (locate(s.base) / "adapter_config.json").exists():
            raise ValueError(f"--base {s.base}: is an adapter; to build on it: python train.py --merge --base {s.base}")
        known, tokenizer = load_model(s.base)
        if type(known) is not MODELS[s.model]:
            kind = next(name for name, kind in MODELS.items() if type(known) is kind)
            raise ValueError(f"--base {s.base}: holds a {kind}; wanted a {s.model} for --task {s.task}")
    (folder / "state").mkdir(parents=True, exist_ok=True)
    if s.task != "images":
        context, taken = context_of(known) if known else None, taken_by(s, known)
        context = context and context - taken
        if taken and context < 1:
            raise ValueError(f"--virtual-tokens {s.virtual_tokens}: leaves nothing of the context of {s.base}")
        s.seq_len = s.seq_len or min(RECIPES[s.model, s.task][0]["seq_len"], 10**9 if context is None else context)
        if context is not None and s.seq_len > context:
            less = f" less {taken} of the {s.finetune}" if taken else ""
            wanted = f"; wanted --seq-len {context} or fewer --virtual-tokens" if taken else ""
            raise ValueError(
                f"--seq-len {s.seq_len}: longer than the context of {s.base}{less}, {context} tokens{wanted}"
            )
        if resume:
            tokenizer = load_tokenizer(folder)
        else:
            write = prepare_rows if s.task in (*FIELDS, "chat") else prepare_text
            tokenizer = write(s, folder / "state", tokenizer)
        if s.task == "chat":
            own = getattr(tokenizer, "chat_template", None)
            if own and START not in own:
                print("note: the chat template of --base is not ChatML, which is what is trained, and kept beside it")
            tokenizer.chat_template = own if own and START in own else chat_format(tokenizer).template
        save_tokenizer(tokenizer, folder)
        check_prompt(s, tokenizer)
    return known, load_data(s, folder / "state", tokenizer, known)


def set_up(s, folder, resume=False):
    """-> (model, data, teacher or None)"""
    (known, data), teacher = prepare(s, folder, resume), None
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
        if s.finetune == "full" and s.task in FIELDS and run_of(s.base):
            renew(model)
    else:
        model = known or new_model(s, data)
    if s.finetune and s.dropout is not None and s.model != "vae":
        model.config.dropout = s.dropout
    if s.adversarial == "rdrop" and not model.config.dropout:
        raise ValueError("--adversarial rdrop: compares two passes of different dropout; wanted --dropout above 0")
    begins = s.finetune in ("prefix", "prompt") and not resume
    bare = evaluate(s, model.to(s.device), data) if begins and not getattr(model, "fresh", ()) else None
    adapt(s, model, data)
    model.to(s.device)
    spare(s, model)
    if s.grad_accum == "auto":
        s.batch_size, s.grad_accum = split(s, model, objective(s, model, teacher, data), data)
        s.memory = None  # a resumed run keeps the numbers
        if s.task != "images":
            data = load_data(s, folder / "state", data.tokenizer, known)
    every, trained = count(model)
    why = fused.why_not(*[torch.empty(1, 1, 1, 8, device=s.device, dtype=getattr(torch, s.dtype))] * 3)
    how = f"; attention: {f'plain PyTorch ({why})' if why else 'fused'}" if s.model not in ("vae", "rnn") else ""
    print(f"model: {every:,} parameters, {trained:,} trained ({trained / every:.1%}); {s.device}, {s.dtype}{how}")
    if begins:  # as real words, which changes what the base says
        base = f"; the base itself: {describe(bare)}" if bare else ""
        print(f"before, here: with the {s.finetune} as it begins, made of words of the data{base}")
    return model, data, teacher


def run(s, resume=None):
    """Trains from settings to a finished folder, which it returns. resume: the status of the run that goes on."""
    started, out = time.perf_counter(), Path(s.out)
    if not resume or s.task == "images":  # which is read anew; all else was kept as it was prepared
        check_data(s)
    if not resume:
        check_free(s, out)
        if s.finetune:
            if s.task in (*FIELDS, "chat") and not s.base:
                # What is wrong with them is better known before the base is trained.
                (chats_of if s.task == "chat" else rows_of)(s)
            s.base = s.base or find_base(s)
            started = time.perf_counter()
            if out.resolve() == Path(s.base).resolve():
                raise ValueError(f"--out {out}: is --base too; wanted another folder")
    identity = identity_of(s.base) if s.finetune else None
    labels, trained = (), None

    def record(status, progress, folder=out):
        note = dict(status=status, **progress, base_sha256=identity, labels=labels, trained=trained)
        write_json(folder / "args.json", dict(settings=dataclasses.asdict(s), **note, torch=torch.__version__))

    if resume:
        if read_json(out / "args.json").get("base_sha256") != identity:
            raise ValueError(f"--resume {out}: the weights of {s.base} are no longer what the run began with")
        model, data, teacher = set_up(s, out, resume=True)
        labels, trained = getattr(data, "labels", ()), count(model)[1]
    else:
        with written_beside(out) as beside:  # what is in --out stays until all is set up
            model, data, teacher = set_up(s, beside)
            labels, trained = getattr(data, "labels", ()), count(model)[1]
            record("begun", {"step": 0}, beside)
        data.folder = out / "state"  # where its files lie now

    with runs.held(out / "state"):
        progress = fit(s, model, data, teacher, out, resume, record)
    runs.plot(out)
    if progress["best_step"] != progress["step"]:
        model = load_model(out)[0].to(s.device)
    if not progress["before"]:
        torch.manual_seed(s.seed)  # as in set_up: it makes the same model again
        new = new_model(s, data).to(s.device)
        progress["before"] = evaluate(s, new, data) | {"sample": sample(s, new, data, out, "before training")}
    after, before = sample(s, model, data, out, "after training"), progress["before"]
    best = {name: value for name, value in progress["best"].items() if name != "sample"}
    others = report(s, out, best, data)
    record("finished", progress)  # not before: what is missing of the end, --resume does
    print(f"\nbefore: {describe(before)}\n{before['sample']}\n")
    print(f"after: {describe(best)}, step {progress['best_step']}\n{after}\n")
    for name, scores in others.items():
        print(f"baseline, {name}: {describe(scores)}")
    whole = " in all" if resume else f", {time.perf_counter() - started:.0f} s with all set-up"
    if progress["best_step"] == 0:
        print("nothing was gained: what was kept is the model as it was before")
    print(f"{out}: {trained:,} parameters trained in {progress['elapsed']:.0f} s{whole}")
    return out


def run_all(s, given):
    """--finetune all"""
    first = complete(dataclasses.replace(s, finetune="full"))
    s.base, s.out = s.base or find_base(first), s.out or f"{first.out.removesuffix('-full')}-all"
    if not s.seq_len and s.model != "vae":  # the same for all, so also less by what a prefix or a prompt takes
        context = (context_of(load_model(s.base)[0]) or 10**9) - s.virtual_tokens
        if context < 1:
            raise ValueError(f"--virtual-tokens {s.virtual_tokens}: leaves nothing of the context of {s.base}")
        s.seq_len = min(RECIPES[first.model, first.task][0]["seq_len"], context)
        given = [*given, "seq_len"]
    return compare(s, given, s.base)


def resume_run(name, changed, given):
    """Goes on with a run; settings given anew replace the run's, save those that made its model and data."""
    out = Path(name) if name else newest("out", lambda run: run["status"] == "unfinished")
    if out is None or not (out / "args.json").exists():
        raise ValueError(f"--resume {out}: holds no args.json" if out else "--resume: no unfinished run under out/")
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
    # Whether only the scores, samples and plot of its end are missing.
    closing = saved.get("over") if status == "unfinished" else not (out / "metrics.json").exists()
    if s.steps <= step and status != "begun" and not closing:
        raise ValueError(f"--resume {out}: {status} at step {step}; to go on, add --steps with more than {step}")
    return run(complete(s), resume=None if status == "begun" else status)  # begun: killed before its first checkpoint


# --- uses of a model --------------------------------------------------------------------------------------------------


def load_for(action, s):
    """-> (folder, model, tokenizer) of --base or the newest finished run; settings are completed to fit it."""
    folder = locate(s.base) if s.base else newest("out", lambda run: run["status"] == "finished")
    if folder is None:
        raise ValueError(f"{action}: no finished run under out/; wanted --base")
    if action == "--merge":  # before anything large is read
        check_lora(folder, action)
    if not s.base:
        print(f"base: {folder}", file=sys.stderr)
    writes = action in ("--sample", "--chat") and choose_device(s) == "cpu"
    outline = writes and s.quantise_base != "nf4"  # a decoder reads the weights by itself
    model, tokenizer = load_model(folder, outline=outline)
    s.model = next(name for name, kind in MODELS.items() if type(model) is kind)
    note, own, asked = note_of(folder), getattr(model.config, "task", None), s.task  # the second is a BERT's
    of_run = note.get("settings", note)
    s.task = ("mlm" if own == "pretrain" else own) or of_run.get("task") or TASK_OF[s.model]
    if asked in ("lm", "chat") and s.model in TASKS[asked].models:
        s.task = asked
    elif s.task in ("lm", "chat") and s.data:
        if asked is None:
            check_unlabelled(s.data)
        s.task = "lm" if kind_of(s.data) in (None, "text") else "chat"
    if action == "--sample" and s.task == "lm" and asked is None and tokenizer.chat_template:
        print(f"note: {folder} has a chat template: --task chat answers in it", file=sys.stderr)
    s.data, s.seq_len = s.data or of_run.get("data"), s.seq_len or of_run.get("seq_len")
    s.train_on = of_run.get("train_on", s.train_on)
    context = context_of(model) if s.model != "vae" else None
    if s.seq_len and context and s.seq_len > context:
        raise ValueError(f"--seq-len {s.seq_len}: the context of {folder} is {context} tokens")
    s.seq_len = s.seq_len or (context and min(context, 512))
    s.finetune = s.base = None  # nothing of them matters from here on
    complete(s)
    return folder, model if hasattr(model, "weights") else model.to(s.device).eval(), tokenizer


def dry_run(s):
    if s.finetune and not s.base:
        base = finished(s)
        if base is None:
            raise ValueError(f"--finetune {s.finetune}: nothing pretrained under {Path(s.out).parent}/; wanted --base")
        s.base = str(base)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(said):
        short = dataclasses.replace(s, out=f"{temporary}/run", steps=3, warmup=0, log_every=1, eval_every=9)
        run(short)
        lines = (Path(short.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for name, value in (dataclasses.asdict(s) | {"seq_len": short.seq_len}).items():  # nothing was wrong with them
        print(flag(name), value)
    print(
        *(
            line
            for line in said.getvalue().splitlines()
            if line.startswith(("data:", "note:", "model:", "microbatches:"))
        ),
        sep="\n",
    )
    first, second = (json.loads(line)["elapsed_s"] for line in lines[:2])  # the third evaluates
    print(f"{s.steps} steps would take {s.steps * (second - first):.0f} s and {peak_memory_mb(s):,.0f} MB; "
          "nothing was written")  # fmt: skip


def main(argv=None):
    s, given, (action, value) = parse(Settings, argv, ACTIONS, "train.py", __doc__.split("In order:")[0])
    try:
        if action != "--resume":
            check_options(s, given - {"quantise_base"} if action in ("--sample", "--chat") else given)
        if action in ("--sample", "--chat", "--eval", "--merge", "--export"):
            unused = TRAINING if action == "--eval" else [*TRAINING, "dtype", "batch_size"]
            if asked := [name for name in unused if name in given]:
                raise ValueError(f"{flag(asked[0])}: is of training, and {action} does none; wanted one of the two")
            s.task = s.task or ("classify" if "shots" in given else None)
            labelled = s.task == "classify"
            use = list(load_for(action, s))
            if action == "--export":
                return export(s, *use, value, s.out if "out" in given else None)
            if "shots" in given and s.model not in TASKS["chat"].models:
                raise ValueError(f"--shots {s.shots}: {use[0]} is a {s.model}; wanted a language model to show them to")
            if action == "--eval" and labelled and s.model in TASKS["chat"].models:
                return few_shot(s, *use, s.data if "data" in given else None)
            if action in ("--sample", "--chat"):
                return write_text(action, s, use, value)
            if action == "--eval":
                return score(s, *use, "data" in given)
            return merge(s, *use, "data" in given, s.out if "out" in given else None)
        if action == "--dry-run":
            if s.profile:
                raise ValueError("--profile: writes trace.json, and --dry-run nothing; wanted --steps 5 in its place")
            return dry_run(complete(s))
        if action == "--show-data":
            with tempfile.TemporaryDirectory() as temporary:
                s = complete(s)
                s.base = s.base or (s.finetune and str(finished(s) or ""))
                if s.base == "":
                    raise ValueError("--show-data: nothing pretrained whose tokenizer could cut it; wanted --base")
                return show_data(prepare(s, Path(temporary))[1], value)
        if s.finetune == "all" and not action:
            return run_all(s, given)
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
    name = shlex.quote(str(out))
    beside = f" --base {name}" if out != Path("out", folder_of(s)) else ""  # else it is found by itself
    if s.task == "images":
        then = f"python train.py --model vae --latent 2 --out {name}-2"
        return print(f"next: look at the pictures in {out}, then: {then}")
    print(f"next: python train.py --base {name} --sample {shlex.quote(asked_of(s, out))}")
    if s.task == "chat":
        print(f"      python train.py --base {name} --chat")
    elif s.finetune == "lora":
        print(f"      python train.py --base {name} --merge")
    elif s.task == "mlm":
        print(f"      python train.py --task classify --finetune full{beside}")
    elif s.task == "lm":
        print(f"      python train.py --base {name} --chat" if s.finetune else
              f"      python train.py --model {s.model} --finetune lora{beside}")  # fmt: skip
    else:
        print(f"      python train.py --base {name} --eval")


def asked_of(s, out):
    """What to ask the model of a finished run: of rows, one of those for validation, of a length to read."""
    rows = read_rows(out / "state" / "val.jsonl")
    if not rows:
        return s.prompt

    def text_of(row, name):
        if s.task == "chat":
            text = next((m["content"] for m in row.get("messages", ()) if m["role"] == "user"), row.get("text", ""))
        else:
            text = row[name]
        return " ".join(text.split() if isinstance(text, str) else text)

    name = FIELDS[s.task][0] if s.task in FIELDS else None
    row = min(rows, key=lambda row: abs(len(text_of(row, name)) - 40))
    asked = text_of(row, name)[:60].strip(" -")  # what begins with - would be taken for a flag
    return f"{asked.rstrip('?')}? {text_of(row, 'context')[:200]}" if s.task == "qa" else asked


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
