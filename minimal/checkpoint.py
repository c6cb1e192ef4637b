# SPDX-License-Identifier: MIT
"""A training checkpoint that survives `kill -9` and resumes bit for bit: one safetensors file, renamed into place.

No paper: the file holds everything that the next step depends on,

    step n+1 = f(parameters, buffers, optimiser state, random generators, gradient scaler, n)

and the data order must be a function of n (as in minimal/data.py). Leave one out and the resumed run goes another way:
the demo below measures how far. Tensors go into the safetensors body, numbers into its header as JSON, so that nothing
is unpickled on the way back. Learning rates are not kept: a schedule is a function of n as well.

Only parameters that need a gradient are kept, so the checkpoint of a LoRA run is small; its frozen base comes from
where it came from before. A tied parameter is stored once. `torch.compile`'s `_orig_mod.` is taken out of the names, so
that a compiled run resumes uncompiled and the other way round.

    save_checkpoint("state.safetensors", model, optimizer, {"step": n})
    ...
    n = load_checkpoint("state.safetensors", model, optimizer)["step"]
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


def write_beside(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write(temporary path)` in the folder of `path`, then renames the result to `path`.

    Whatever happens in between (an exception, a full disk, a kill), the former file at `path` stays whole.
    """
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as the umask has it; safetensors writes files that their owner alone can read
        write(beside)
        beside.chmod(mode)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: parameters that need a gradient, a tied one once, and persistent buffers."""
    persistent = model.state_dict().keys()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named.items()}


def save_checkpoint(path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict, scaler=None) -> None:
    """Writes `path`, atomically, from the model, the optimiser, the random generators and a GradScaler, if any.

    Args:
        progress: any JSON value; what `load_checkpoint` returns, usually with the step in it.

    Raises: ImportError without safetensors; OSError when the disk is full (the former file stays whole).
    """
    safetensors = _safetensors()
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in trained(model).items()}
    numbers = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if torch.is_tensor(value):
                tensors[f"optimizer.{index}.{key}"] = value.detach().contiguous()
            elif value is not None:
                numbers[f"optimizer.{index}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    header = {"progress": progress, "numbers": numbers, "scaler": scaler.state_dict() if scaler else {}}
    header = {key: json.dumps(value) for key, value in header.items()}

    def write(beside):
        try:
            safetensors.torch.save_file(tensors, beside, metadata=header)
        except safetensors.SafetensorError as error:  # its only name for a failed write
            raise OSError(f"{path}: could not be written ({error})") from None

    write_beside(path, write)


def load_checkpoint(path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler=None) -> dict:
    """Puts a checkpoint back into the model, the optimiser, the random generators and the scaler; returns `progress`.

    The file and the model's names and shapes are checked before anything is changed. Of CUDA's generators, that of the
    current device is kept.

    Raises: ValueError, in one line naming the file, when it is not a whole checkpoint (truncated, a pickle, another
        kind of file) or does not fit the model (the first tensor that is missing, extra or of another shape).
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        progress, numbers, scaling = header["progress"], header["numbers"], header["scaler"]
        random = tensors["random.cpu"]
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from None

    stored = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    wanted = trained(model)
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored or name not in wanted:
            where = "the checkpoint" if name not in stored else "the model"
            raise ValueError(f"{path}: belongs to another architecture: {where} has no {name}")
        if stored[name].shape != wanted[name].shape:
            a, b = tuple(stored[name].shape), tuple(wanted[name].shape)
            raise ValueError(f"{path}: belongs to another architecture: {name} has shape {a}, the model wants {b}")
    state: dict[int, dict] = {}
    for key, value in (tensors | numbers).items():
        if key.startswith("optimizer."):
            _, index, entry = key.split(".", 2)
            state.setdefault(int(index), {})[entry] = value

    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if scaler is not None and scaling:
        scaler.load_state_dict(scaling)
    torch.set_rng_state(random)
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return progress


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints are safetensors files: pip install safetensors") from None
    return safetensors


def _demo():
    import tempfile

    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))  # the data: a function of the step
            loss = (model(x) - x.square().sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model[0].weight.detach().clone()

    whole = train(*fresh(), 0, 200)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "state.safetensors")
        model, optimizer = fresh()
        train(model, optimizer, 0, 100)
        save_checkpoint(path, model, optimizer, {"step": 100})
        print(f"checkpoint after 100 of 200 steps: {path.stat().st_size:,} bytes")
        model, optimizer = fresh()
        step = load_checkpoint(path, model, optimizer)["step"]
        difference = (train(model, optimizer, step, 200) - whole).abs().max().item()
        print(f"resumed to step 200, largest difference from the run that never stopped: {difference}")
        for left_out in ("optimizer", "random"):
            model, optimizer = fresh()
            bare = torch.optim.AdamW(model.parameters(), lr=1e-2)
            load_checkpoint(path, model, optimizer)
            if left_out == "random":
                torch.manual_seed(1)
            end = train(model, bare if left_out == "optimizer" else optimizer, step, 200)
            print(f"the same without the state of {left_out}: {(end - whole).abs().max():.3f}")
        path.write_bytes(path.read_bytes()[:-100])
        try:
            load_checkpoint(path, model, optimizer)
        except ValueError as error:
            print(f"cut short by 100 bytes: {str(error).replace(folder, '')}")


if __name__ == "__main__":
    _demo()
