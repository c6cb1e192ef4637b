# SPDX-License-Identifier: MIT
"""minimal/checkpoint.py: exact resuming, whole files or none, and nothing unpickled."""

import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimal import optim
from minimal.checkpoint import load_checkpoint, save_checkpoint, trained, write_beside

OPTIMIZERS = {
    "torch.AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "torch.SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "AdamW": lambda model: optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2),
    "SGD": lambda model: optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "Muon": lambda model: optim.Muon(optim.muon_groups(model, 0.1), lr=1e-2),
}


class Net(nn.Module):
    """Dropout (random numbers), a buffer that training moves, a tied weight, and a frozen layer."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.2)
        self.second, self.third = nn.Linear(width, width), nn.Linear(width, width)
        self.third.weight = self.second.weight
        self.frozen = nn.Linear(width, 1).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.third(self.second(self.drop(self.norm(self.first(x))).tanh())))


def fresh(kind, seed=0):
    torch.manual_seed(seed)
    model = Net()
    return model, OPTIMIZERS[kind](model)


def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().sum().backward()
        optimizer.step()


def everything(model, optimizer):
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{k}": torch.as_tensor(v) for i, entries in state.items() for k, v in entries.items()}
    return tensors | dict(model.state_dict()) | {"random": torch.get_rng_state()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_half_resume_half_equals_whole(kind, tmp_path):
    model, optimizer = fresh(kind)
    train(model, optimizer, 0, 10)
    whole = everything(model, optimizer)

    model, optimizer = fresh(kind)
    frozen = model.frozen.weight.clone()
    train(model, optimizer, 0, 5)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, {"step": 5, "note": ["any", 1.5, None]})
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]

    def resumed(load=load_checkpoint):
        model, optimizer = fresh(kind, seed=1)
        with torch.no_grad():
            model.frozen.load_state_dict({"weight": frozen, "bias": fresh(kind)[0].frozen.bias})
        progress = load(tmp_path / "c.safetensors", model, optimizer)
        assert progress == {"step": 5, "note": ["any", 1.5, None]}
        train(model, optimizer, progress["step"], 10)
        return everything(model, optimizer)

    assert equal(resumed(), whole)

    # The variants that shipped elsewhere: without the optimiser, and without the random generator.
    def forgets_optimizer(path, model, optimizer):
        return load_checkpoint(path, model, OPTIMIZERS[kind](model))

    def forgets_random(path, model, optimizer):
        progress = load_checkpoint(path, model, optimizer)
        torch.manual_seed(1)
        return progress

    assert not equal(resumed(forgets_optimizer), whole)
    assert not equal(resumed(forgets_random), whole)


def test_only_what_trains_is_kept_and_a_tied_weight_once():
    names = trained(Net()).keys()
    assert not any(name.startswith("frozen") for name in names)
    assert "second.weight" in names and "third.weight" not in names and "norm.running_mean" in names


def test_names_do_not_depend_on_compilation(tmp_path):
    model, optimizer = fresh("AdamW")
    compiled = torch.compile(model)  # not called, so nothing is compiled; its names get a prefix all the same
    assert any("_orig_mod." in name for name, _ in compiled.named_parameters())
    save_checkpoint(tmp_path / "c.safetensors", compiled, optimizer, {})
    again, optimizer = fresh("AdamW", seed=1)
    load_checkpoint(tmp_path / "c.safetensors", again, optimizer)
    assert equal(trained(model), trained(again))
    load_checkpoint(tmp_path / "c.safetensors", compiled, optimizer)


def test_scaler(tmp_path):
    model, optimizer = fresh("AdamW")
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, {}, scaler)
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_checkpoint(tmp_path / "c.safetensors", model, optimizer, other)
    assert other.get_scale() == 128.0


@pytest.fixture
def saved(tmp_path):
    model, optimizer = fresh("AdamW")
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, {"step": 1})
    return tmp_path / "c.safetensors"


def refused(path, model=None, optimizer=None):
    if model is None:
        model, optimizer = fresh("AdamW", seed=3)
    before = everything(model, optimizer)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, model, optimizer)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert equal(everything(model, optimizer), before), "a refused checkpoint has changed the model"
    return str(error.value)


@given(cut=st.floats(0, 0.9999))
def test_truncated(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    model, optimizer = fresh("torch.SGD")
    save_checkpoint(folder / "c.safetensors", model, optimizer, {})
    whole = (folder / "c.safetensors").read_bytes()
    (folder / "c.safetensors").write_bytes(whole[: int(cut * len(whole))])
    refused(folder / "c.safetensors", model, optimizer)


def test_another_architecture_a_pickle_and_a_plain_file(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    wide = Net(width=20)
    message = refused(saved, wide, OPTIMIZERS["AdamW"](wide))
    assert "first.bias" in message and "(16,)" in message and "(20,)" in message
    other = nn.Linear(4, 4)
    assert "another architecture" in refused(saved, other, OPTIMIZERS["AdamW"](other))
    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pickle", "text", "empty", "missing"):
        assert "not a whole checkpoint" in refused(tmp_path / name)


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "signal"])
def test_a_write_that_fails_leaves_the_former_file(kind, tmp_path):
    path = tmp_path / "file.json"
    write_beside(path, lambda beside: beside.write_text(json.dumps("first")))

    def fail(beside):
        beside.write_text('"sec')
        raise kind

    with pytest.raises(type(kind)):
        write_beside(path, fail)
    assert json.loads(path.read_text()) == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_full_disk_is_an_oserror_and_loses_nothing(saved, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    whole = saved.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    model, optimizer = fresh("AdamW")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, model, optimizer, {"step": 2})
    assert saved.read_bytes() == whole and [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(umask, mode, tmp_path):
    """safetensors by itself gives 0600."""
    model = nn.Linear(2, 2)
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "state.safetensors", model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    finally:
        os.umask(before)
    assert (tmp_path / "state.safetensors").stat().st_mode & 0o777 == mode
