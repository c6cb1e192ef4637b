# SPDX-License-Identifier: MIT
"""Pretrains and fine-tunes the models of `minimal/`.

    python train.py                                        pretrain a GPT on the standard library's source
    python train.py --finetune lora                        adapt the newest pretrained model to English prose
    python train.py --model vae                            train a VAE on handwritten digits
    python train.py --base out/gpt-lora --sample "Return"  use a result

In order: settings, data, model and adaptation, evaluation, loop, runs, uses of a model, main. A run is a folder with
the model in the Hugging Face layout (or the adapter in PEFT's), args.json, metrics.jsonl, loss.png, samples.txt, and
state/, which holds the token files and the checkpoint that resumes the run exactly. Nothing is ever pickled.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

# Waiting threads of GNU OpenMP spin, 300,000 turns and more, also while another program needs the core. Beside one that
# kept one of two cores busy, 5,000 turns made a training step take 0.85 s instead of 1.06, for half of the CPU time.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from safetensors import SafetensorError

from minimal import data as corpus
from minimal import fused
from minimal.attention import attention
from minimal.checkpoint import load_checkpoint, save_checkpoint, write_beside
from minimal.generate import stream_text
from minimal.gpt import GPT, GPTConfig
from minimal.lora import add_lora, load_lora, merge_lora, save_lora
from minimal.optim import SGD, AdamW, Muon, cosine_schedule, decay_groups, muon_groups
from minimal.settings import flag, parse, setting
from minimal.tokenizer import Tokenizer
from minimal.vae import VAE, VAEConfig, grid

# --- settings ---------------------------------------------------------------------------------------------------------

SIZES = {"tiny": (2, 2, 64), "small": (4, 4, 192), "medium": (6, 6, 384), "gpt2": (12, 12, 768)}  # layers, heads, width
SOURCES = {"stdlib-code": corpus.stdlib_source, "stdlib-prose": corpus.stdlib_prose}
RECIPES = {  # what a setting left open becomes; each default run ends in about two minutes on two cores
    ("gpt", None): dict(data="stdlib-code", steps=330, batch_size=8, lr=0.01, optimizer="muon", prompt="def"),
    ("gpt", "lora"): dict(data="stdlib-prose", steps=200, batch_size=8, lr=5e-3, optimizer="adamw", prompt="Return"),
    ("gpt", "full"): dict(data="stdlib-prose", steps=200, batch_size=8, lr=1e-3, optimizer="adamw", prompt="Return"),
    ("vae", None): dict(data="digits", steps=2000, batch_size=64, lr=2e-3, optimizer="adamw", prompt=""),
    ("vae", "lora"): dict(data="digits", steps=500, batch_size=64, lr=2e-3, optimizer="adamw", prompt=""),
    ("vae", "full"): dict(data="digits", steps=500, batch_size=64, lr=1e-3, optimizer="adamw", prompt=""),
}
PART = 2**28  # characters of text prepared at a time: about 2 GB of memory
EVAL_TOKENS = 32_768  # scored at each evaluation: a second or two, and a standard error of about 1 %
IMAGE_SIZE = 32  # pixels a side that a folder's images are brought to


@dataclasses.dataclass
class Settings:
    """Every setting of a run. None: taken from RECIPES, or found by itself."""

    model: str = setting("gpt", ["gpt", "vae"], "what to train")
    size: str = setting("small", list(SIZES), "layers, heads and width; small learns in minutes on two cores")
    data: str = setting(None, str, "file or folder: .txt .md .py .jsonl ..., or images for the VAE; or stdlib-code, "
                    "stdlib-prose, digits. The default needs no download")  # fmt: skip
    tokenizer: str = setting("bpe", str, "bpe, char, bytes, or PATH of a tokenizer.json; adapting keeps the base's")
    vocab_size: int = setting(4096, (int, 257), "tokens that bpe learns; small, for the head's cost grows with it")
    latent: int = setting(8, (int, 1, 65537), "VAE: latent dimensions; eight hold the digits' shapes")
    reconstruction: str = setting("mse", ["mse", "bce"], "VAE: squared error, or cross-entropy, which blurs greys")
    beta: float = setting(1.0, (float, 0), "VAE: weight of the KL term; 1 makes the loss a bound on the likelihood")
    # adaptation
    base: str = setting(None, str, "folder to adapt (default: the newest pretrained beside --out) or use (the newest)")
    finetune: str = setting(None, ["full", "lora"], "adapt --base instead of training from scratch")
    rank: int = setting(8, (int, 1), "LoRA: rank of the update; 8 serves most tasks")
    alpha: float = setting(16.0, (float, 1e-9), "LoRA: the update counts alpha / rank; twice the rank is common")
    lora_dropout: float = setting(0.0, (float, 0, 1), "LoRA: dropout before A; an adapter this small seldom overfits")
    target: str = setting("all-linear", str, "LoRA: layers by name, suffix, list, expression; or all-linear")
    rslora: bool = setting(False, bool, "LoRA: scale by alpha / sqrt(rank), steadier at high ranks")
    dora: bool = setting(False, bool, "LoRA: learn direction and magnitude apart (DoRA)")
    # optimisation
    steps: int = setting(None, (int, 1), "optimiser steps; default 330 (GPT), 2000 (VAE), less to adapt: two minutes")
    batch_size: int = setting(None, (int, 1), "rows in a microbatch; default 8 (GPT) or 64 (VAE), for two cores")
    grad_accum: int = setting(1, (int, 1), "microbatches in a step; more when memory is short")
    seq_len: int = setting(None, (int, 1), "tokens in a row; default 256, or the base's context")
    optimizer: str = setting(None, ["muon", "adamw", "sgd"], "muon pretrains in fewer steps, adamw adapts")
    lr: float = setting(None, (float, 0, 1e37), "peak learning rate; default by model and method, see RECIPES")
    warmup: int = setting(None, (int, 0), "steps of linear warm-up; default a twentieth of --steps")
    weight_decay: float = setting(0.1, (float, 0), "decay of matrices; norms, biases and embeddings have none")
    dropout: float = setting(0.0, (float, 0, 1), "dropout of a new model; one epoch does not overfit")
    clip: float = setting(1.0, (float, 0), "largest gradient norm; 0 does not clip")
    patience: int = setting(0, (int, 0), "stop after so many evaluations without gain; 0 never does")
    seed: int = setting(1337, (int, 0, 2**31), "of initialisation, data order, dropout and samples")
    # machine
    device: str = setting(None, str, "cpu, cuda, mps; default: the best there is")
    dtype: str = setting(None, ["float32", "bfloat16", "float16"], "of the products; default: float32, GPU bfloat16")
    compile: bool = setting(False, bool, "torch.compile the loss; its minute of compiling pays on long runs only")
    threads: int = setting(None, (int, 1, 1025), "CPU threads; default PyTorch's choice")
    # output
    out: str = setting(None, str, "output folder; default out/MODEL or out/MODEL-METHOD")
    overwrite: bool = setting(False, bool, "replace the run in --out")
    save_every: int = setting(100, (int, 1), "steps between checkpoints")
    eval_every: int = setting(100, (int, 1), "steps between evaluations")
    sample_every: int = setting(200, (int, 1), "steps between samples")
    log_every: int = setting(10, (int, 1), "steps between lines of metrics.jsonl")
    prompt: str = setting(None, str, "what samples continue")
    temperature: float = setting(0.6, (float, 0), "of samples; low suits a small model, 0 is greedy")
    top_p: float = setting(0.95, (float, 1e-9, 1.0000001), "of samples; the least likely tokens are seldom sensible")
    new_tokens: int = setting(120, (int, 1), "length of a sample")


# What may change when a run is resumed: all that shapes neither the model nor the order of its data.
CHANGEABLE = set("steps lr warmup weight_decay clip patience device dtype compile threads "
                 "save_every eval_every sample_every log_every prompt temperature top_p new_tokens".split())


ACTIONS = {  # instead of training; at most one
    "--resume": dict(nargs="?", const="", metavar="DIR", help="go on with a run, the newest unfinished by default"),
    "--sample": dict(metavar="TEXT", help="print a continuation of TEXT by --base"),
    "--chat": dict(action="store_true", help="write together with --base, line by line"),
    "--eval": dict(action="store_true", help="print the validation loss of --base on --data"),
    "--merge": dict(action="store_true", help="write --base, an adapter, and its base as one model into --out"),
    "--dry-run": dict(action="store_true", help="build all, time a step, write nothing"),
}


def complete(s):
    """Fills what was left open, from the recipe and the machine."""
    for name, value in RECIPES[s.model, s.finetune].items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    s.out = s.out or f"out/{s.model}" + (f"-{s.finetune}" if s.finetune else "")
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
    if s.data not in (*SOURCES, "digits") and not Path(s.data).exists():
        raise ValueError(f"--data {s.data}: no such file or folder")
    half = s.device.startswith("cuda") and torch.cuda.is_bf16_supported()
    s.dtype = s.dtype or ("bfloat16" if half else "float32")
    if s.threads:
        torch.set_num_threads(s.threads)
    return s


# --- data -------------------------------------------------------------------------------------------------------------


def prepare_text(s, folder, tokenizer):
    """Documents, cleaned, deduplicated, split, as token files in `folder`; returns the tokenizer, trained if new."""
    started, held_out = time.perf_counter(), []
    parts = prepared(SOURCES.get(s.data, lambda: corpus.read_documents(s.data))())
    part = next(parts, None)
    if part is None:
        raise ValueError(f"--data {s.data}: nothing is left of it after cleaning")
    if tokenizer is None and s.tokenizer in ("bpe", "char", "bytes"):
        tokenizer = Tokenizer.train((document.text for document in part[0]), s.vocab_size, kind=s.tokenizer)
    tokenizer = tokenizer or Tokenizer.load(s.tokenizer)
    if tokenizer.eos_id is None:
        raise ValueError(f"--tokenizer {s.tokenizer}: has no <|endoftext|>, which ends every document")

    def rows(documents):
        # Each document ends with the end token, which is trained like any other: so the model learns to stop.
        return (tokenizer.encode(document.text) + [tokenizer.eos_id] for document in documents)

    def train_rows():
        nonlocal part
        while part:
            held_out.extend(array.array("I", row) for row in rows(part[1]))
            yield from rows(part[0])
            part = next(parts, None)

    n_train = corpus.write_tokens(folder / "train.npy", train_rows(), tokenizer.vocab_size)
    n_val = corpus.write_tokens(folder / "val.npy", held_out, tokenizer.vocab_size)
    print(f"data: {s.data}, {n_train:,} tokens and {n_val:,} for validation, vocabulary {tokenizer.vocab_size:,}; "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return tokenizer


def prepared(documents):
    """Yields (training documents, validation documents) part by part: a corpus need not fit into memory. Exact
    duplicates are removed from the whole, near ones from each part."""
    seen, part, size = set(), [], 0
    for document in itertools.chain(documents, [None]):
        if document:
            text = corpus.clean(document.text)
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                part.append((digest, document._replace(text=text)))
                size += len(text)
        if part and (size > PART or document is None):
            # In the order of a hash, so that the first validation rows, which are scored, come from anywhere.
            yield corpus.split(corpus.deduplicate(document for _, document in sorted(part)))
            part, size = [], 0


class Text:
    """Rows of tokens; every batch is a function of its index alone, so that resuming needs nothing but the index."""

    unit = "tokens"

    def __init__(self, s, folder, tokenizer):
        self.s, self.tokenizer = s, tokenizer
        try:
            self.train, self.val = (corpus.TokenBlocks(folder / n, s.seq_len, s.seed) for n in ("train.npy", "val.npy"))
        except ValueError as error:
            if "seq_len" not in str(error):
                raise
            held = re.search(r"holds (\d+) tokens", str(error))
            found = f"{held[1]} tokens" if held else "too few tokens"
            why = f"too short: {found} in its training or validation part, --seq-len {s.seq_len} needs {s.seq_len + 1}"
            raise ValueError(f"--data {s.data}: {why}") from None
        sizes = [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
        sizes[tokenizer.eos_id] = 0  # it stands for no byte of the text
        self.bytes_of = torch.tensor(sizes)

    def batch(self, index):
        return {"ids": self.train.batch(index, self.s.batch_size)}  # (B, T + 1)

    def validation(self):
        limit = max(1, EVAL_TOKENS // (self.s.seq_len * self.s.batch_size))
        return ({"ids": ids, "labels": labels} for ids, labels in self.val.sequential(self.s.batch_size, limit))

    def count_bytes(self, labels, **_):
        scored = labels[:, 1:]
        return int(self.bytes_of[scored[scored >= 0]].sum())

    def sample(self, model, folder):
        return self.s.prompt + "".join(continue_text(self.s, model, self.tokenizer, self.s.prompt))


class Images:
    """Images in memory, (N, C, H, W) in [0, 1]; batches as in Text, drawn with replacement."""

    unit = "images"

    def __init__(self, s):
        self.s = s
        images = corpus.digits() if s.data == "digits" else corpus.read_images(s.data, IMAGE_SIZE)
        if len(images) < 20:  # two of them for validation: the walk goes from one to the next
            raise ValueError(f"--data {s.data}: {len(images)} images; wanted at least 20, a tenth to validate on")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the same for every --seed
        self.val, self.train = images[order].tensor_split([len(images) // 10])
        print(f"data: {s.data}, {len(self.train):,} images and {len(self.val):,} for validation")

    def batch(self, index):
        generator = torch.Generator().manual_seed(self.s.seed * 1_000_003 + index)
        return {"x": self.train[torch.randint(len(self.train), (self.s.batch_size,), generator=generator)]}

    def validation(self):
        return ({"x": x} for x in self.val.split(256))

    def count_bytes(self, x):
        return 0

    @torch.no_grad()
    def sample(self, model, folder):
        """Writes pictures: originals over reconstructions, samples, and a walk through latent space."""
        from matplotlib import image as png

        few = self.val[:10].to(self.s.device)  # (10, C, H, W)
        generator = torch.Generator(self.s.device).manual_seed(self.s.seed)
        pictures = {
            "reconstructions.png": torch.cat([few, model(few)]),
            "samples.png": model.sample(60, generator=generator),
            "walk.png": torch.cat([model.interpolate(few[i - 1], few[i], 10) for i in range(1, min(len(few), 7))]),
        }
        for name, images in pictures.items():
            tile = grid(images, 10).cpu().movedim(0, -1).expand(-1, -1, 3)  # (C, H, W) -> (H, W, 3)
            tile = tile.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
            write_beside(folder / name, lambda beside, tile=tile: png.imsave(beside, tile, format="png"))
        return f"see {', '.join(pictures)}"


# --- model and adaptation ---------------------------------------------------------------------------------------------


def new_model(s, data):
    layers, heads, width = SIZES[s.size]
    if s.model == "gpt":
        vocab_size, eos_id = data.tokenizer.vocab_size, data.tokenizer.eos_id
        config = GPTConfig(vocab_size, s.seq_len, width, layers, heads, dropout=s.dropout, eos_token_id=eos_id)
        return GPT(config, attention=attention)
    channels, size = data.train.shape[1:3]
    kind, hidden = ("conv", (width // 2, width)) if size >= 16 else ("mlp", (2 * width, width))
    return VAE(VAEConfig(size, channels, s.latent, hidden, kind, s.reconstruction, beta=s.beta))


def load_model(folder, what="--base"):
    """-> (model, tokenizer or None) of a model's folder, or of an adapter's folder together with its base."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        named = Path(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "?")
        base = named if named.is_dir() else folder.parent / named.name  # the second: both were moved together
        model, tokenizer = load_model(base, f"the base of {folder},")
        was = read_json(folder / "args.json").get("base_sha256") if (folder / "args.json").exists() else None
        if was not in (None, identity_of(base)):
            raise ValueError(f"{what} {folder}: its base {base} has changed since the adapter was trained")
        load_lora(model, folder)
        return model, tokenizer
    if not (folder / "config.json").exists():
        why = "holds no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{what} {folder}: {why}; wanted the output folder of a run, or a model in the same layout")
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "gpt2":
        return GPT.from_pretrained(folder, attention=attention), Tokenizer.load(folder)
    if kind == "vae":
        return VAE.from_pretrained(folder), None
    raise ValueError(f"{what} {folder}: model_type {kind!r} is not supported; wanted gpt2 or vae")


def identity_of(folder):
    """SHA-256 of a model's weights: by it an adapter knows its base again."""
    path = Path(folder) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def adapt(s, model):
    target = s.target.split(",") if "," in s.target and "{" not in s.target else s.target
    try:
        add_lora(model, s.rank, s.alpha, s.lora_dropout, target, rslora=s.rslora, dora=s.dora)
    except ValueError as error:
        raise ValueError(f"--rank {s.rank} --target {s.target}: {error}") from None


def save_model(s, model, folder):
    if s.finetune != "lora":
        return model.save_pretrained(folder)
    model.name_or_path = s.base  # goes into adapter_config.json
    save_lora(model, folder)


def optimizer_of(s, model):
    if s.optimizer == "muon":
        return Muon(muon_groups(model, s.weight_decay), lr=s.lr)
    groups = decay_groups(model, s.weight_decay)
    return AdamW(groups, lr=s.lr, betas=(0.9, 0.95)) if s.optimizer == "adamw" else SGD(groups, lr=s.lr, momentum=0.9)


def count(model):
    """(all parameters, those that train)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def write_json(path, value):
    write_beside(path, lambda beside: beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a JSON object ({error})") from None


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(s, model, data):
    """-> {"val_loss": nats per token or image} and, for text, "bits_per_byte", on the same rows at every call."""
    training, total, terms, n_bytes = model.training, 0.0, 0, 0
    model.eval()
    with torch.random.fork_rng():  # a VAE draws latents here: the same ones each time, and none of training's
        torch.manual_seed(s.seed)
        for batch in data.validation():
            loss_sum, n = loss_on(s, model.loss, batch)
            total, terms, n_bytes = total + float(loss_sum), terms + int(n), n_bytes + data.count_bytes(**batch)
    model.train(training)
    return {"val_loss": total / max(terms, 1)} | ({"bits_per_byte": total / math.log(2) / n_bytes} if n_bytes else {})


def loss_on(s, loss, batch):
    with torch.autocast(s.device.split(":")[0], getattr(torch, s.dtype), enabled=s.dtype != "float32"):
        return loss(**{name: tensor.to(s.device) for name, tensor in batch.items()})


def describe(scores):
    bits = f", {scores['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in scores else ""
    return f"validation loss {scores['val_loss']:.4f}{bits}"


def continue_text(s, model, tokenizer, prompt):
    """Yields the pieces of a continuation, drawn with a generator of its own: a sample does not move training's."""
    generator = torch.Generator(s.device).manual_seed(s.seed)
    how = dict(temperature=s.temperature, top_p=s.top_p, generator=generator)
    return stream_text(model, tokenizer, prompt, s.new_tokens, **how)


def peak_memory_mb(s):
    if s.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # Unix; there ru_maxrss counts KiB, on macOS bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- loop -------------------------------------------------------------------------------------------------------------


def fit(s, model, data, folder, resume, record):
    """Trains to s.steps, or until patience runs out, and returns the progress. Keeps the best model by validation loss
    in `folder` and the last state in `folder/state`; record(status, progress) writes args.json."""
    from tqdm import tqdm

    optimizer = optimizer_of(s, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = torch.compile(model.loss) if s.compile else model.loss
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

    keep(save())  # before the first step too: from now on the run can be killed at any moment and resumed
    saved, seen, busy, last, sound, told = None, 0, 0.0, False, True, time.perf_counter()
    model.train()
    with noted_signals() as signals, tqdm(total=s.steps, initial=progress["step"], disable=None, unit="step") as bar:
        while progress["step"] < s.steps and not last:
            step, begun = progress["step"], time.perf_counter()
            lr = s.lr * cosine_schedule(step, s.steps, s.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            total, terms = 0.0, 0
            for index in range(step * s.grad_accum, (step + 1) * s.grad_accum):
                loss_sum, n = loss_on(s, loss, data.batch(index))
                scaler.scale(loss_sum).backward()
                total, terms = total + float(loss_sum.detach()), terms + int(n)
            if terms:  # with nothing to learn from, not even the decay is applied
                scaler.unscale_(optimizer)
                for p in parameters:
                    if p.grad is not None:
                        p.grad.div_(terms)  # once, by the terms of all microbatches: any split gives the same gradient
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
                gained = progress["best"] is None or scores["val_loss"] < progress["best"]["val_loss"]
                progress["without_gain"] = 0 if gained else progress["without_gain"] + 1
                if gained:
                    progress["best"], progress["best_step"] = scores, step + 1
                    save_model(s, model, folder)
                if s.patience and progress["without_gain"] >= s.patience:
                    last = True
                    bar.write(f"stopped early at step {step + 1}: {s.patience} evaluations without gain")
            if scores or (step + 1) % s.log_every == 0:
                elapsed, rate, memory = time.perf_counter() - started, seen / busy, peak_memory_mb(s)
                entry = dict(step=step + 1, loss=total / max(terms, 1), val_loss=scores.get("val_loss"), lr=lr,
                             tokens_per_s=rate, elapsed_s=elapsed, peak_memory_mb=memory)  # fmt: skip
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


@contextlib.contextmanager
def noted_signals():
    """Yields a list that SIGINT and SIGTERM are noted in, instead of ending the program; the second ends it."""
    signals = []

    def note(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    handlers = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield signals
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def sample(s, model, data, folder, title):
    """Samples into samples.txt; returns the sample."""
    model.eval()
    text, path = data.sample(model, folder), folder / "samples.txt"
    model.train()
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_beside(path, lambda beside: beside.write_text(f"{earlier}--- {title}\n{text}\n\n", encoding="utf-8"))
    return text


def plot(folder):
    """metrics.jsonl -> loss.png"""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [row for row in rows if row["val_loss"] is not None]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    axes.plot([row["step"] for row in scored], [row["val_loss"] for row in scored], "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats", title=str(folder))
    axes.legend()
    write_beside(folder / "loss.png", lambda beside: figure.savefig(beside, format="png", bbox_inches="tight"))
    pyplot.close(figure)


# --- runs -------------------------------------------------------------------------------------------------------------

RUN_FILES = ["args.json", "metrics.jsonl", "state", "config.json", "model.safetensors", "tokenizer.json", "loss.png",
             "samples.txt", "adapter_config.json", "adapter_model.safetensors", "reconstructions.png", "samples.png",
             "walk.png"]  # fmt: skip


def newest(root, wanted):
    """The newest run under `root` whose args.json `wanted` accepts, or None."""
    runs = []
    for path in Path(root).glob("*/args.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # another program's args.json is no run of ours
            if wanted(read_json(path)):
                runs.append((path.stat().st_mtime, path.parent))
    return max(runs)[1] if runs else None


def pretrained(s, status):
    """The newest pretrained model of the wanted kind beside --out, or None."""
    wanted = (s.model, None, status)
    return newest(
        Path(s.out).parent, lambda of: (of["settings"]["model"], of["settings"]["finetune"], of["status"]) == wanted
    )


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


def clear(out, but=()):
    """Removes a run's files, args.json first, and nothing else that may be in the folder."""
    for path in (out / name for name in RUN_FILES if name not in but):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def find_base(s):
    """The newest finished pretrained model beside --out; without one, pretrains it first, or finishes that."""
    root, base = Path(s.out).parent, pretrained(s, "finished")
    if base is None:
        if s.finetune == "lora" and s.model == "gpt":  # what cannot be adapted is better known before than after
            layers, heads, width = SIZES[s.size]
            with torch.device("meta"):
                adapt(s, GPT(GPTConfig(s.vocab_size, s.seq_len or 256, width, layers, heads)))
        unfinished = pretrained(s, "unfinished")
        then = f"going on with {unfinished}" if unfinished else "pretraining one first"
        print(f"no finished pretrained model under {root}/: {then}")
        same = "model size tokenizer vocab_size seq_len dropout latent reconstruction beta seed device dtype threads"
        new = Settings(**{name: getattr(s, name) for name in same.split()}, out=str(root / s.model))
        base = resume_run(unfinished, new, ()) if unfinished else run(complete(new))
        print()
    print(f"base: {base}")
    return str(base)


def set_up(s, folder, resume=False):
    """-> (model, data). A new run cuts its token files into `folder`; a resumed one finds them there."""
    model = tokenizer = None
    if s.finetune:
        if (Path(s.base) / "adapter_config.json").exists():
            raise ValueError(f"--base {s.base}: is an adapter; to build on it: python train.py --merge --base {s.base}")
        model, tokenizer = load_model(s.base)
        if not isinstance(model, GPT if s.model == "gpt" else VAE):
            raise ValueError(f"--base {s.base}: holds another kind of model; wanted --model to name it")
    (folder / "state").mkdir(parents=True, exist_ok=True)
    if s.model == "gpt":
        context = model.config.n_positions if model else s.seq_len or 256
        s.seq_len = s.seq_len or context
        if s.seq_len > context:
            raise ValueError(f"--seq-len {s.seq_len}: longer than the context of {s.base}, {context} tokens")
        tokenizer = Tokenizer.load(folder) if resume else prepare_text(s, folder / "state", tokenizer)
        tokenizer.save(folder)
    data = Text(s, folder / "state", tokenizer) if s.model == "gpt" else Images(s)
    torch.manual_seed(s.seed)
    model = model or new_model(s, data)
    if s.finetune == "lora":
        adapt(s, model)
    model.to(s.device)
    every, trained = count(model)
    why = fused.why_not(*[torch.empty(1, 1, 1, 8, device=s.device, dtype=getattr(torch, s.dtype))] * 3)
    how = f"; attention: {f'plain PyTorch ({why})' if why else 'fused'}" if s.model == "gpt" else ""
    print(f"model: {every:,} parameters, {trained:,} trained ({trained / every:.1%}); {s.device}, {s.dtype}{how}")
    return model, data


def run(s, resume=False):
    """Trains from settings to a finished folder, which it returns."""
    started, out = time.perf_counter(), Path(s.out)
    if not resume:
        check_free(s, out)
        if s.finetune:
            s.base = s.base or find_base(s)
            if out.resolve() == Path(s.base).resolve():
                raise ValueError(f"--out {out}: is --base too; wanted another folder")
    identity = identity_of(s.base) if s.finetune else None

    def record(status, progress, folder=out):
        note = dict(status=status, **progress, base_sha256=identity, torch=torch.__version__)
        write_json(folder / "args.json", dict(settings=dataclasses.asdict(s), **note))

    if resume:
        if read_json(out / "args.json").get("base_sha256") != identity:
            raise ValueError(f"--resume {out}: {s.base}/model.safetensors is no longer what the run began with")
        model, data = set_up(s, out, resume=True)
    else:  # set up beside --out, in the nearest folder that exists: what is there stays until that has worked
        place = next(parent for parent in out.absolute().parents if parent.is_dir())
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
        try:
            model, data = set_up(s, beside)
            record("begun", {"step": 0}, beside)
            out.mkdir(parents=True, exist_ok=True)
            clear(out)
            for path in sorted(beside.iterdir()):  # args.json first
                os.replace(path, out / path.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    progress = fit(s, model, data, out, resume, record)
    plot(out)
    after, before = sample(s, model, data, out, "after training"), progress["before"]
    print(f"\nbefore: {describe(before)}\n{before['sample']}\n")
    print(f"after: {describe(progress['best'])}, step {progress['best_step']}\n{after}\n")
    seconds = f"{progress['elapsed']:.0f} s, {time.perf_counter() - started:.0f} s with all set-up"
    print(f"{out}: {count(model)[1]:,} parameters trained in {seconds}")
    return out


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
    s.model = "vae" if tokenizer is None else "gpt"
    if (folder / "args.json").exists():
        of_run = read_json(folder / "args.json")["settings"]
        s.finetune, s.data, s.seq_len = of_run["finetune"], s.data or of_run["data"], s.seq_len or of_run["seq_len"]
    if s.model == "gpt":
        s.seq_len = s.seq_len or model.config.n_positions
        if s.seq_len > model.config.n_positions:
            raise ValueError(f"--seq-len {s.seq_len}: the context of {folder} is {model.config.n_positions} tokens")
    return folder, model.to(complete(s).device).eval(), tokenizer


def write_text(action, s, prompt):
    """--sample and --chat"""
    folder, model, tokenizer = load_for(action, s)
    if tokenizer is None:
        raise ValueError(f"{action}: {folder} is a VAE, which writes no text; its pictures are in its folder")
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
    if action == "--merge":
        if not (folder / "adapter_config.json").exists():
            raise ValueError(f"--merge: {folder} is no adapter; wanted --base to name the folder of a LoRA run")
        check_free(s, out)
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or folder
        if out.resolve() in (folder.resolve(), Path(base).resolve()):
            raise ValueError(f"--out {out}: is the adapter or its base; wanted another folder")
    with tempfile.TemporaryDirectory() as temporary:
        own = folder / "state"
        if tokenizer and ("data" in given or not (own / "val.npy").exists()):
            own = Path(temporary)
            prepare_text(s, own, tokenizer)
        data = Text(s, own, tokenizer) if tokenizer else Images(s)
        print(f"{folder}: {describe(evaluate(s, model, data))}")
        if action == "--merge":
            change = merge_lora(model)
            print(f"merged: {describe(evaluate(s, model, data))}; the largest change of a weight is {change:.3g}")
            out.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(out)
            if tokenizer:
                tokenizer.save(out)
            clear(out, but=("model.safetensors", "config.json", "tokenizer.json"))
            print(f"next: python train.py --base {out} {'--chat' if tokenizer else '--eval'}")


def dry_run(s):
    if s.finetune and not s.base:
        base = pretrained(s, "finished")
        if base is None:
            raise ValueError(f"--finetune {s.finetune}: nothing pretrained under {Path(s.out).parent}/; wanted --base")
        s.base = str(base)
    for name, value in dataclasses.asdict(s).items():
        print(flag(name), value)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(said):
        short = dataclasses.replace(s, out=f"{temporary}/run", steps=3, warmup=0, log_every=1, eval_every=9)
        run(short)
        last = (Path(short.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1]  # the third evaluates
    print(*(line for line in said.getvalue().splitlines() if line.startswith(("data:", "model:"))), sep="\n")
    seconds = s.steps * s.batch_size * s.grad_accum * (short.seq_len or 1) / json.loads(last)["tokens_per_s"]
    print(f"{s.steps} steps would take {seconds:.0f} s and {peak_memory_mb(s):,.0f} MB; nothing was written")


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
    s = Settings(**read_json(out / "args.json")["settings"])
    beside = f" --base {out}" if out.parent != Path("out") else ""
    if s.model == "vae":
        print(f"next: look at the pictures in {out}, then: python train.py --model vae --latent 2 --out {out}-2")
    elif s.finetune:
        print(f"next: python train.py --base {out} --sample {json.dumps(s.prompt)}")
        print(f"      python train.py --base {out} " + ("--merge" if s.finetune == "lora" else "--chat"))
    else:
        print(f"next: python train.py --base {out} --sample {json.dumps(s.prompt)}")
        print(f"      python train.py --finetune lora{beside}")


if __name__ == "__main__":
    main()
