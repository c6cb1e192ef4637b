# SPDX-License-Identifier: MIT
"""Recurrent layers against torch.nn's, the state across pieces and cuts, and traps, each written out."""

import copy
import json
import math
import os
import pathlib
import pickle
import weakref

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minimal import rnn
from minimal.generate import generate
from minimal.lora import add_lora, lora_parameters, merge_lora, unmerge_lora
from minimal.rnn import RNN, Recurrent, RNNConfig, bptt_chunks, gru_step, lstm_step, rnn_step

SIZES = dict(vocab_size=31, hidden_size=12, n_layer=2)
THEIRS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
KINDS = list(THEIRS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes):
    return RNN(RNNConfig(**{**SIZES, **changes})).eval()


def tokens(*shape, vocab=31, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


# ---- The cells ----


def pair(kind, size, hidden, layers):
    """torch.nn's stack, and ours with its weights, copied by the names that the docstring gives."""
    theirs = THEIRS[kind](size, hidden, layers, batch_first=True)
    ours = nn.ModuleList(Recurrent(kind, hidden if n else size, hidden) for n in range(layers))
    for n, layer in enumerate(ours):
        layer.load_state_dict(
            {f"{m}.{w}": getattr(theirs, f"{w}_{m}_l{n}").detach() for m in ("ih", "hh") for w in ("weight", "bias")}
        )
    return theirs, ours


def check_against_torch(kind, size=5, hidden=7, layers=2, B=3, T=9, started=True):
    theirs, ours = pair(kind, size, hidden, layers)
    count = 2 if kind == "lstm" else 1
    x = torch.randn(B, T, size, requires_grad=True)
    states = torch.randn(count, layers, B, hidden, requires_grad=True)
    given_to_it = (tuple(states) if kind == "lstm" else states[0]) if started else None
    want, last = theirs(x, given_to_it)
    last = torch.stack(last) if kind == "lstm" else last[None]  # (count, L, B, C)
    y, ends = x, []
    for n, layer in enumerate(ours):
        y, state = layer(y, tuple(states[:, n]) if started else None)
        ends.append(torch.stack(state))
    ends = torch.stack(ends, dim=1)  # (count, L, B, C)

    def close(a, b, what):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1), what

    close(y, want, "outputs")
    close(ends, last, "states")
    u, v = torch.randn_like(want), torch.randn_like(last)  # every output and every state pulls another way
    wrt = [x, states] if started else [x]
    a = torch.autograd.grad((y * u).sum() + (ends * v).sum(), [*wrt, *ours.parameters()])
    b = torch.autograd.grad((want * u).sum() + (last * v).sum(), [*wrt, *theirs.parameters()])
    names = [*("x", "states")[: len(wrt)], *(n for n, _ in ours.named_parameters())]
    a, b = dict(zip(names, a, strict=True)), list(b)
    for name in names[: len(wrt)]:
        close(a.pop(name), b.pop(0), name)
    theirs_named = dict(zip((n for n, _ in theirs.named_parameters()), b, strict=True))
    for name, grad in a.items():
        n, m, w = name.split(".")
        close(grad, theirs_named[f"{w}_{m}_l{n}"], name)


@given(
    st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4),
    st.integers(1, 12), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_outputs_states_and_gradients_are_those_of_torch(kind, size, hidden, layers, B, T, started, seed):
    torch.manual_seed(seed)
    check_against_torch(kind, size, hidden, layers, B, T, started)


def ifog(a, u, h, c):  # the order of other libraries
    i, f, o, g = (a + u).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def no_forget_gate(a, u, h, c):  # 1997
    i, f, g, o = (a + u).chunk(4, dim=1)
    c = c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def bare_output(a, u, h, c):
    i, f, g, o = (a + u).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c, c


def z_the_other_way(a, u, h):  # Chung et al. 2014
    r, z, _ = (a + u).sigmoid().chunk(3, dim=1)
    n = torch.tanh(a.chunk(3, dim=1)[2] + r * u.chunk(3, dim=1)[2])
    return (h + z * (n - h),)


def reset_of_everything(a, u, h):
    r, z, _ = (a + u).chunk(3, dim=1)
    n = torch.tanh(r.sigmoid() * (a + u).chunk(3, dim=1)[2])
    return (n + z.sigmoid() * (h - n),)


@pytest.mark.parametrize(
    "kind, step",
    [("lstm", ifog), ("lstm", no_forget_gate), ("lstm", bare_output), ("gru", z_the_other_way)]
    + [("gru", reset_of_everything), ("rnn", lambda a, u, h: (torch.sigmoid(a + u),))],
)
def test_traps_of_the_cells(kind, step, monkeypatch):
    check_against_torch(kind)
    monkeypatch.setitem(rnn._CELLS, kind, (step, *rnn._CELLS[kind][1:]))
    with pytest.raises(AssertionError):
        check_against_torch(kind)


def test_one_step_by_hand():
    """The module's equations in scalars."""

    def s(x):
        return 1 / (1 + math.exp(-x))

    a, u = [0.3, -0.7, 1.1, 0.2], [-0.5, 0.4, 0.6, 0.9]
    h, c = 0.25, -1.5
    t = [torch.tensor([v], dtype=torch.float64) for v in (a, u, [h], [c])]
    assert rnn_step(t[0][:, :1], t[1][:, :1], t[2])[0].item() == pytest.approx(math.tanh(0.3 - 0.5), abs=1e-14)
    new_h, new_c = lstm_step(*t)
    cell = s(-0.7 + 0.4) * c + s(0.3 - 0.5) * math.tanh(1.1 + 0.6)
    assert new_c.item() == pytest.approx(cell, abs=1e-14)
    assert new_h.item() == pytest.approx(s(0.2 + 0.9) * math.tanh(cell), abs=1e-14)
    r, z = s(0.3 - 0.5), s(-0.7 + 0.4)
    n = math.tanh(1.1 + r * 0.6)
    assert gru_step(t[0][:, :3], t[1][:, :3], t[2])[0].item() == pytest.approx((1 - z) * n + z * h, abs=1e-14)


def test_where_the_gru_departs_from_its_paper():
    """Cho et al. reset the state before the product. The two agree when U is diagonal, and not otherwise."""

    def cho(layer, x, h):  # equations 5 to 8, with the biases of ours
        W_r, W_z, W_n = layer.ih.weight.chunk(3)
        U_r, U_z, U_n = layer.hh.weight.chunk(3)
        r = (x @ W_r.T + h @ U_r.T).sigmoid()
        z = (x @ W_z.T + h @ U_z.T).sigmoid()
        return z * h + (1 - z) * (x @ W_n.T + (r * h) @ U_n.T).tanh()

    layer, x, h = Recurrent("gru", 4, 6).double(), torch.randn(3, 4).double(), torch.randn(3, 6).double()
    with torch.no_grad():
        layer.ih.bias.zero_()
        layer.hh.bias.zero_()
        gap = (layer(x[:, None], (h,))[0][:, 0] - cho(layer, x, h)).abs().max()
        layer.hh.weight[12:] = torch.diag(torch.randn(6))
        diagonal = (layer(x[:, None], (h,))[0][:, 0] - cho(layer, x, h)).abs().max()
    assert gap > 1e-2 and diagonal < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    layer = Recurrent(kind, 2, 3).double()
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind == "lstm")))
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *rest):
        values = dict(zip(names, rest[len(state) :], strict=True))
        y, last = torch.func.functional_call(layer, values, (x, rest[: len(state)]))
        return y, *last

    assert torch.autograd.gradcheck(run, (x, *state, *values))


@pytest.mark.parametrize("kind, gates", [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_one_product_for_all_tokens_and_one_for_each_step(kind, gates):
    layer, seen = Recurrent(kind, 5, 7), []
    for m in (layer.ih, layer.hh):
        m.register_forward_hook(lambda m, args, out: seen.append((m is layer.ih, tuple(out.shape))))
    layer(torch.randn(3, 6, 5))
    assert seen == [(True, (6, 3, 7 * gates))] + [(False, (3, 7 * gates))] * 6


def test_initial_values():
    for kind in KINDS:
        layer = Recurrent(kind, 40, 64)
        for name, p in layer.named_parameters():
            free = p.detach().clone()
            if kind == "lstm" and name.endswith("bias"):
                assert (free[64:128] == (1.0 if name == "ih.bias" else 0.0)).all()
                free = torch.cat((free[:64], free[128:]))
            assert free.abs().max() <= 1 / 8 and abs(free.std() * 8 * math.sqrt(3) - 1) < 0.15, (kind, name)
    model = RNN(RNNConfig(vocab_size=500, hidden_size=128, tied=False))
    for p in (model.embedding.weight, model.lm_head.weight):
        assert abs(p.std() / 0.3 - 1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_initial_loss_is_near_that_of_a_guess(kind, tied):
    model = RNN(RNNConfig(vocab_size=300, hidden_size=128, cell=kind, tied=tied))
    total, count = model.loss(tokens(4, 33, vocab=300))
    assert abs(total / count - math.log(300)) < 0.4


# ---- The language model ----


@given(st.sampled_from(KINDS), st.booleans(), st.integers(1, 3), st.integers(1, 7), st.sampled_from([1, 3, 64, None]))
def test_logits_are_those_of_torch(kind, tied, layers, T, bptt):
    """An embedding, torch.nn's stack and a product: cutting gradients must not change a value."""
    model = RNN(RNNConfig(31, hidden_size=12, n_layer=layers, cell=kind, tied=tied, bptt=bptt)).eval()
    stack = THEIRS[kind](12, 12, layers, batch_first=True)
    state = {}
    for name, t in model.layers.state_dict().items():
        n, m, w = name.split(".")
        state[f"{w}_{m}_l{n}"] = t
    stack.load_state_dict(state)
    ids = tokens(2, T)
    head = model.embedding.weight if tied else model.lm_head.weight
    with torch.no_grad():
        want = stack(F.embedding(ids, model.embedding.weight))[0] @ head.T
        torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.embedding.weight) == tied
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind]
    wanted = 31 * 12 * (1 if tied else 2) + layers * gates * (2 * 12 * 12 + 2 * 12)
    assert sum(p.numel() for p in model.parameters()) == wanted


def check_pieces(model, ids, sizes):
    """The logits of a text do not depend on the pieces in which it is read."""
    cache = []
    with torch.no_grad():
        whole, pieces = model(ids), [model(piece, cache) for piece in ids.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    count = 2 if model.config.cell == "lstm" else 1
    assert [[tuple(t.shape) for t in state] for state in cache] == [[(len(ids), 12)] * count] * model.config.n_layer


@given(st.sampled_from(KINDS), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 3))
def test_a_text_read_in_pieces_is_the_text_read_whole(kind, sizes, B):
    check_pieces(tiny(cell=kind, bptt=5), tokens(B, sum(sizes)), sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token(kind):
    check_pieces(tiny(cell=kind, bptt=5), tokens(2, 20), [1] * 20)


class Forgetful(RNN):
    """The cell of the LSTM is not kept, only h."""

    def forward(self, ids, cache=None):
        if cache:
            cache[:] = [(h, torch.zeros_like(c)) for h, c in cache]
        return super().forward(ids, cache)


class Shared(RNN):
    """One state for all layers."""

    def forward(self, ids, cache=None):
        if cache:
            cache[:] = [cache[-1]] * len(cache)
        return super().forward(ids, cache)


class Restarted(RNN):
    def forward(self, ids, cache=None):
        if cache:
            cache.clear()
        return super().forward(ids, cache)


@pytest.mark.parametrize("wrong", [Forgetful, Shared, Restarted])
def test_traps_of_the_cache(wrong):
    model = wrong(RNNConfig(**SIZES)).eval()
    check_pieces(model, tokens(2, 20), [20])  # in one piece the traps do not show
    for sizes in ([8, 12], [19, 1]):
        with pytest.raises(AssertionError):
            check_pieces(model, tokens(2, 20), sizes)


def test_the_cache_is_the_callers_and_has_no_graph():
    model, cache = tiny(bptt=None), []
    mine = cache
    model(tokens(2, 6), cache)
    assert cache is mine and all(not t.requires_grad and t.grad_fn is None for state in cache for t in state)
    before = [tuple(t.clone() for t in state) for state in cache]
    for wrong, pattern in (
        (lambda: model(tokens(3, 1), cache), r"state of shapes \[\(2, 12\), \(2, 12\)\]: wanted 2 of \(3, 12\)"),
        (lambda: model(tokens(2, 1), cache[:1]), "cache of 1 states: wanted none, or 2, one for each layer"),
    ):
        with pytest.raises(ValueError, match=pattern):
            wrong()
    for a, b in zip(before, cache, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    model(tokens(2, 1), cache)
    assert not torch.equal(before[0][0], cache[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_generate_works_as_it_is(kind):
    model, ids = tiny(cell=kind, bptt=4), tokens(2, 6)
    want = ids
    with torch.no_grad():
        for _ in range(30):
            want = torch.cat((want, model(want)[:, -1:].argmax(-1)), dim=1)
    for use_cache in (True, False):
        assert torch.equal(generate(model, ids, 30, temperature=0, use_cache=use_cache), want)
    reads, real = [], model.hidden
    model.hidden = lambda ids, cache=None: reads.append(ids.size(1)) or real(ids, cache)
    generate(model, ids, 30, temperature=0)
    assert reads == [6] + [1] * 29  # no token is read twice


def test_a_token_changes_nothing_before_it_and_everything_after():
    for kind in KINDS:
        model, ids = tiny(cell=kind), tokens(2, 16)
        other = ids.clone()
        other[:, 9] = (other[:, 9] + 1) % 31
        with torch.no_grad():
            a, b = model(ids), model(other)
            flipped = model(ids.flip(0))
        assert torch.equal(a[:, :9], b[:, :9]) and ((a - b)[:, 9:].abs().amax(-1) > 0).all()
        torch.testing.assert_close(flipped.flip(0), a, rtol=1e-5, atol=1e-5)  # rows do not see each other


# ---- Truncated back-propagation through time ----


class Uncut(Recurrent):
    def forward(self, x, state=None, bptt=None):
        return super().forward(x, state)


class Reset(Recurrent):
    """At a cut the state goes with its gradient."""

    def forward(self, x, state=None, bptt=None):
        outputs = []
        for piece in x.split(bptt or x.size(1), dim=1):
            y, state = super().forward(piece)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state


class OneLate(Recurrent):
    def forward(self, x, state=None, bptt=None):
        return super().forward(x, state, bptt + 1)


def built(layer, kind, bptt, T):
    """A model in float64 that reads a token once at most, so that the embedding's gradient tells places apart."""
    model = RNN(RNNConfig(T, hidden_size=6, n_layer=2, cell=kind, tied=False, bptt=bptt)).double()
    for n, old in enumerate(model.layers):
        model.layers[n] = layer(kind, 6, 6).double()
        model.layers[n].load_state_dict(old.state_dict())
    return model


def check_truncation(model, T):
    bptt, ids = model.config.bptt, torch.arange(T)[None]
    for t in range(T):  # the loss of the token t + 1, from the logits at t
        logits = model(ids)[0, t]
        (grad,) = torch.autograd.grad(logits.square().sum(), model.embedding.weight)
        reached = (grad != 0).any(1).nonzero().flatten().tolist()
        assert min(reached) > t - bptt, f"the loss at {t} reaches back to {min(reached)}"
        assert reached == list(range(t - t % bptt, t + 1)), "a token within reach was not reached"
    whole = copy.deepcopy(model)
    whole.config.bptt = None
    with torch.no_grad():
        assert torch.equal(whole(ids), model(ids)), "the state was not carried over the cut"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_cut_and_states_are_not(kind):
    for bptt, T in ((1, 4), (4, 11), (5, 5)):
        check_truncation(built(Recurrent, kind, bptt, T), T)
    for wrong, message in (
        (Uncut, "the loss at 4 reaches back to 0"),
        (OneLate, "the loss at 4 reaches back to 0"),
        (Reset, "the state was not carried"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_truncation(built(wrong, kind, 4, 11), 11)


def test_no_cut_reaches_everything_and_equals_torch():
    model = built(Recurrent, "lstm", None, 12)
    (grad,) = torch.autograd.grad(model(torch.arange(12)[None])[0, -1].square().sum(), model.embedding.weight)
    assert (grad != 0).any(1).all()


def check_chunks(model, ids, labels, length, chunks):
    model.zero_grad()
    total, count, losses = 0.0, 0, 0
    for loss, n in chunks(model, ids, length, labels):
        loss.backward()
        total, count, losses = total + loss.detach(), count + n, losses + 1
    ours = gradients(model)
    model.zero_grad()
    before, model.config.bptt = model.config.bptt, length
    want, n = model.loss(ids, labels)
    want.backward()
    model.config.bptt = before
    assert losses == math.ceil((ids.size(1) - 1) / length)
    assert count == n and abs(total - want) <= 1e-12 * want.abs()
    assert (ours - gradients(model)).norm() <= 1e-12 * gradients(model).norm()


@given(st.sampled_from(KINDS), st.integers(2, 20), st.integers(1, 25), st.integers(1, 3), st.booleans())
def test_chunks_add_up_to_the_loss_of_the_whole_row(kind, T1, length, B, masked):
    model, ids = tiny(cell=kind, bptt=None).double(), tokens(B, T1)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100) if masked else None
    check_chunks(model, ids, labels, length, bptt_chunks)


def fresh_state(model, ids, length, labels):
    for start in range(0, ids.size(1) - 1, length):
        yield model.loss(ids[:, start : start + length + 1])


def last_target_lost(model, ids, length, labels):
    cache = []
    for start in range(0, ids.size(1) - 1, length):
        yield model.loss(ids[:, start : start + length], cache=cache)


def last_target_read_twice(model, ids, length, labels):
    cache = []
    for start in range(0, ids.size(1) - 1, length):
        model.hidden(ids[:, max(start - 1, 0) : start], cache) if start else None
        yield model.loss(ids[:, start : start + length + 1], cache=cache)


@pytest.mark.parametrize("wrong", [fresh_state, last_target_lost, last_target_read_twice])
def test_traps_of_chunks(wrong):
    model, ids = tiny(bptt=None).double(), tokens(2, 20)
    check_chunks(model, ids, None, 6, bptt_chunks)
    with pytest.raises(AssertionError):
        check_chunks(model, ids, None, 6, wrong)


def test_a_cut_within_a_chunk():
    model, ids = tiny(bptt=3).double(), tokens(2, 19)
    for loss, _ in bptt_chunks(model, ids, 9):
        loss.backward()
    ours = gradients(model)
    model.zero_grad()
    model.loss(ids)[0].backward()  # 9 is a multiple of 3: the same cuts
    torch.testing.assert_close(ours, gradients(model), rtol=1e-12, atol=1e-12)


def check_memory(run):
    """The most tensors that graphs hold at one time, for a row and for one of four times the length."""

    class Box:
        def __init__(self, t):
            self.t = t

    def peak(T):
        live, most = weakref.WeakSet(), [0]

        def pack(t):
            box = Box(t)
            live.add(box)
            most[0] = max(most[0], len(live))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.t):
            run(tiny(bptt=8), tokens(2, T + 1))
        assert not live, "a graph outlived the run"
        return most[0]

    assert peak(32) == peak(128) > 0, "memory grows with the row"


def backward_each(model, ids):
    for loss, _ in bptt_chunks(model, ids, 8):
        loss.backward()
        del loss


def test_memory_does_not_grow_with_the_row():
    check_memory(backward_each)
    for wrong in (
        lambda model, ids: model.loss(ids)[0].backward(),
        lambda model, ids: sum(loss for loss, _ in bptt_chunks(model, ids, 8)).backward(),
    ):
        with pytest.raises(AssertionError, match="memory grows"):
            check_memory(wrong)


def test_trap_a_state_with_its_graph():
    """Trap: the state is carried to the next piece as it is: that piece's backward runs into a graph that is gone."""
    model, ids = tiny(bptt=None), tokens(2, 17)
    states = [None, None]
    with pytest.raises(RuntimeError, match="second time"):
        for piece in ids.split(8, dim=1):
            x = model.embedding(piece)
            for n, layer in enumerate(model.layers):
                x, states[n] = layer(x, states[n])
            model.lm_head(x).sum().backward()
    backward_each(model, ids)


# ---- The loss ----


def three_tokens():
    """A model that gives 0.2, 0.3, 0.5 after every text: h is a constant, and the head's first column is ln p / h."""
    model = RNN(RNNConfig(vocab_size=3, hidden_size=4, n_layer=1, cell="rnn", tied=False))
    with torch.no_grad():
        for p in (*model.layers.parameters(), model.lm_head.weight):
            p.zero_()
        model.layers[0].ih.bias[0] = 1.0
        model.lm_head.weight[:, 0] = torch.tensor([0.2, 0.3, 0.5]).log() / math.tanh(1)
    return model


def check_three_token_loss(loss):
    total, count = loss(three_tokens(), torch.tensor([[0, 1, 2]]), None)
    assert count == 2 and abs(total - -math.log(0.3 * 0.5)) < 1e-6  # token 1 after 0, token 2 after 0 1
    total, count = loss(three_tokens(), torch.tensor([[0, 1, 2]]), torch.tensor([[-100, -100, 2]]))
    assert count == 1 and abs(total - -math.log(0.5)) < 1e-6


def test_three_token_loss_by_hand():
    check_three_token_loss(lambda model, ids, labels: model.loss(ids, labels))

    def unshifted(model, ids, labels):
        labels = ids if labels is None else labels
        total = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        return total, (labels != -100).sum()

    def shifted_twice(model, ids, labels):
        labels = ids if labels is None else labels
        return model.loss(ids, F.pad(labels[:, 1:], (0, 1), value=-100))

    for wrong in (unshifted, shifted_twice):
        with pytest.raises(AssertionError):
            check_three_token_loss(wrong)


def test_label_smoothing_by_hand():
    """Of V = 3: the true class counts 1 - 0.3 + 0.3 / 3, each other 0.3 / 3."""
    total, count = three_tokens().loss(torch.tensor([[0, 1, 2]]), label_smoothing=0.3)
    p = [math.log(x) for x in (0.2, 0.3, 0.5)]
    want = -(0.1 * p[0] + 0.8 * p[1] + 0.1 * p[2]) - (0.1 * p[0] + 0.1 * p[1] + 0.8 * p[2])
    assert count == 2 and count.dtype == torch.int64 and count.dim() == 0 and abs(total - want) < 1e-6


def test_outputs():
    model, ids = tiny(), tokens(3, 9)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    logits, targets, hidden = model.outputs(ids, labels)
    assert logits.shape == (24, 31) and hidden.shape == (24, 12) and targets.dtype == torch.int64
    assert torch.equal(logits.view(3, 8, 31), model(ids[:, :-1])) and torch.equal(targets.view(3, 8), labels[:, 1:])
    torch.testing.assert_close(hidden @ model.embedding.weight.T, logits)
    assert torch.equal(model.outputs(ids)[1].view(3, 8), ids[:, 1:])
    cache = []
    parts = [model.outputs(ids[:, :5], cache=cache)[0], model.outputs(ids[:, 4:], cache=cache)[0]]
    together = torch.cat([part.view(3, 4, 31) for part in parts], dim=1)
    torch.testing.assert_close(together, logits.view(3, 8, 31), rtol=1e-5, atol=1e-5)


def check_nothing_to_count(loss):
    for kind in KINDS:
        model = tiny(cell=kind)
        for ids, labels in ((tokens(2, 9), torch.full((2, 9), -100)), (tokens(2, 1), None)):
            total = loss(model, ids, labels)
            total.backward()
            assert total == 0 and (gradients(model) == 0).all() and model.embedding.weight.grad is not None


def test_all_masked_is_zero_and_not_nan():
    check_nothing_to_count(lambda model, ids, labels: model.loss(ids, labels)[0])
    check_nothing_to_count(lambda model, ids, labels: model.loss(ids, labels, label_smoothing=0.1)[0])
    assert tiny().loss(tokens(2, 9), torch.full((2, 9), -100))[1] == 0
    assert list(bptt_chunks(tiny(), tokens(2, 1), 4)) == []

    def mean(model, ids, labels):
        labels = ids if labels is None else labels
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())

    with pytest.raises(AssertionError):
        check_nothing_to_count(mean)


def check_splits(model, ids, labels, parts, accumulate):
    def gradient(split):
        model.zero_grad()
        accumulate(model, list(zip(ids.split(split), labels.split(split), strict=True)))
        return gradients(model)

    whole = gradient([len(ids)])
    assert (gradient(parts) - whole).norm() <= 1e-12 * whole.norm()


def by_total(model, batches):
    count = sum(model.loss(*batch)[1] for batch in batches)
    for batch in batches:
        (model.loss(*batch)[0] / count).backward()


def by_mean_of_means(model, batches):
    for batch in batches:
        total, count = model.loss(*batch)
        (total / count.clamp_min(1) / len(batches)).backward()


@given(st.sampled_from(KINDS), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_gradient_is_the_same_for_every_split(kind, parts, seed):
    torch.manual_seed(seed)
    model, ids = tiny(cell=kind, bptt=4).double(), tokens(sum(parts), 10)
    labels = ids.masked_fill(torch.rand(ids.shape) < torch.rand(len(ids), 1), -100)  # rows unequally masked
    labels[0, 1] = ids[0, 1]  # one term at least
    check_splits(model, ids, labels, parts, by_total)


def test_trap_mean_of_means():
    model, ids = tiny().double(), tokens(4, 10)
    labels = ids.clone()
    check_splits(model, ids, labels, [2, 2], by_mean_of_means)  # equal counts hide it
    labels[:2, 3:] = -100
    check_splits(model, ids, labels, [2, 2], by_total)
    with pytest.raises(AssertionError):
        check_splits(model, ids, labels, [2, 2], by_mean_of_means)


# ---- Dropout, precision, adapters ----


def check_dropout(model):
    ids = tokens(2, 16)
    model.eval()
    assert torch.equal(model(ids), model(ids)), "evaluated twice, two results"
    model.train()
    assert not torch.equal(model(ids), model(ids)), "trained twice, one result"


class AlwaysDrops(Recurrent):
    def forward(self, x, state=None, bptt=None):
        y, state = super().forward(x, state, bptt)
        return F.dropout(y, 0.3), state


def test_dropout_in_training_only():
    model = tiny(dropout=0.3)
    check_dropout(model)
    plain = model.eval()(tokens(2, 16))
    model.config.dropout = 0.0
    assert torch.equal(model.train()(tokens(2, 16)), plain)
    wrong = tiny(dropout=0.3)
    wrong.layers[1] = AlwaysDrops("lstm", 12, 12)  # trap 7
    with pytest.raises(AssertionError, match="evaluated twice"):
        check_dropout(wrong)


def test_dropout_is_between_the_layers_and_not_through_time(monkeypatch):
    """Three places in two layers, and what passes from step to step is untouched: the states of layer 0 follow from
    what it was given as if there were no dropout."""
    dropped, real = [], F.dropout
    monkeypatch.setattr(rnn.F, "dropout", lambda x, p: dropped.append((p, real(x, p))) or dropped[-1][1])
    model, cache = tiny(dropout=0.5).train(), []
    hidden = model.hidden(tokens(2, 10), cache)
    assert [p for p, _ in dropped] == [0.5] * 3 and hidden is dropped[2][1]
    for n, layer in enumerate(model.layers):
        y, state = layer(dropped[n][1])
        assert all(torch.equal(a, b) for a, b in zip(state, cache[n], strict=True))
        kept = dropped[n + 1][1] != 0
        torch.testing.assert_close(dropped[n + 1][1][kept], 2 * y[kept])
        assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    model, ids = tiny(cell=kind), tokens(4, 24)
    exact = model.loss(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, count = model.loss(ids)
    assert total.dtype == torch.float32 and abs(total / exact - 1) < 0.02
    (total / count).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_weights_sum_in_float32():
    """In bfloat16 a sum of some hundreds keeps a step of 2 or 4 between neighbours: the loss would be off as much."""
    model, ids = tiny().bfloat16(), tokens(8, 24)
    total, _ = model.loss(ids)
    logits = model(ids[:, :-1]).double()
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert total.dtype == torch.float32 and abs(total - want) < 1e-3


def test_compiles_without_a_break():
    model = tiny(n_layer=1, bptt=2)
    compiled, ids = copy.deepcopy(model), tokens(2, 5)
    loss = torch.compile(compiled.loss, backend="aot_eager", fullgraph=True)
    a, b = model.loss(ids)[0], loss(ids)[0]
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    torch.testing.assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_adapts_both_products(kind):
    model, ids = tiny(cell=kind), tokens(2, 12)
    plain = model.requires_grad_(False)(ids)  # frozen before: PyTorch picks its products by who needs a gradient
    names = add_lora(model, rank=2, alpha=4)
    assert names == [f"layers.{n}.{m}" for n in (0, 1) for m in ("ih", "hh")]  # and not the tied head
    assert torch.equal(model(ids), plain)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(torch.randn_like(p), alpha=0.3)
    model.loss(ids)[0].backward()
    for name in names:
        adapter = model.get_submodule(name).lora
        assert all((p.grad != 0).any() for p in (adapter.A, adapter.B)), name
    adapted = model(ids)
    assert (adapted - plain).abs().max() > 0.05
    merge_lora(model)
    torch.testing.assert_close(model(ids), adapted, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    assert torch.equal(model(ids), adapted)


def test_lower_layers_can_be_frozen():
    model = tiny(n_layer=3)
    model.layers[:2].requires_grad_(False)
    model.loss(tokens(2, 9))[0].backward()
    assert [layer.hh.weight.grad is None for layer in model.layers] == [True, True, False]
    assert (model.embedding.weight.grad != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_learns_to_copy_over_a_gap(kind):
    """Token t is token t - 3, drawn at random before: what the state holds is all there is to go by."""
    torch.manual_seed(0)
    model = RNN(RNNConfig(6, hidden_size=32, n_layer=1, cell=kind, bptt=8))
    optimizer, g = torch.optim.Adam(model.parameters(), lr=2e-2), torch.Generator().manual_seed(0)
    for _ in range(120):
        ids = torch.randint(6, (16, 3), generator=g).repeat(1, 5)
        labels = ids.clone()
        labels[:, :3] = -100
        total, count = model.loss(ids, labels)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert total / count < 0.1 < math.log(6)


# ---- Saving and loading ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_keeps_every_bit_and_a_tied_head_once(kind, tied, tmp_path):
    model = tiny(cell=kind, tied=tied, bptt=None if tied else 7, dropout=0.2, eos_token_id=3).train()
    folder = tmp_path / "new" / "folder"
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "rnn"
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    again = RNN.from_pretrained(folder)
    assert again.config == model.config and not again.training
    assert (again.lm_head.weight is again.embedding.weight) == tied
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert all(p.requires_grad for p in again.parameters())


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    for a, b in zip(model.parameters(), RNN.from_pretrained(tmp_path).parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


def refused(folder, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        RNN.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model_type": "gpt2"}, "config.json: model_type = 'gpt2', wanted 'rnn'"),
        ({"cell": "mgu"}, "config.json: cell = 'mgu': wanted one of 'rnn', 'lstm', 'gru'"),
        ({"cell": "gru"}, r"model.safetensors: .*layers.0.hh.bias has shape \(48,\), wanted \(36,\)"),
        ({"hidden_size": "12"}, "config.json: hidden_size = '12': wanted a whole number"),
        ({"n_layer": 3}, r"model.safetensors: .*layers.2.hh.bias has shape None, wanted \(48,\)"),
        ({"n_layer": 1}, r"model.safetensors: .*layers.1.hh.bias has shape \(48,\), wanted None"),
        ({"tied": False}, r"model.safetensors: .*lm_head.weight has shape None, wanted \(31, 12\)"),
        ({"width": 3}, "config.json: .*width"),
    ],
)
def test_wrong_config_is_named(folder, changes, pattern):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(folder, pattern)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"rnn"', '{"model_type": "rnn"}', "\udcff"])
def test_config_that_is_no_object_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json: ")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_wrong_weights_are_named_and_pickles_never_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / "model.safetensors"
    stored, whole = safetensors.torch.load_file(path), path.read_bytes()
    safetensors.torch.save_file({**stored, "layers.1.ih.weight": stored["layers.1.ih.weight"].to(torch.int8)}, path)
    refused(folder, "model.safetensors: .*layers.1.ih.weight is torch.int8, wanted floating point")
    for content in (b"", whole[:5], whole[:100], whole[:-1], pickle.dumps(Bomb())):
        path.write_bytes(content)
        refused(folder, "model.safetensors: ")
    torch.save(Bomb(), path)
    refused(folder, "model.safetensors: ")
    assert not pathlib.Path("unpickled").exists()
    path.unlink()
    refused(folder, "model.safetensors: ")


def test_what_cannot_be_read_back_is_not_saved(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    adapted, untied = tiny(), tiny()
    add_lora(adapted, rank=2)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight + 1)
    for model, pattern in (
        (adapted, r"the model: layers.0.hh.lora.A has shape \(2, 12\), wanted None"),
        (untied, "lm_head.weight differs from embedding.weight, wanted a tied head"),
    ):
        with pytest.raises(ValueError, match=pattern):
            model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def check_whole_after_a_failing_write(folder, save, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def half(tensors, path, metadata=None):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        save(folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failing_write_leaves_the_old_files(folder, monkeypatch):
    check_whole_after_a_failing_write(folder, tiny(cell="gru").save_pretrained, monkeypatch)

    def in_place(folder):
        safetensors.torch.save_file({}, folder / "model.safetensors")

    with pytest.raises(AssertionError):
        check_whole_after_a_failing_write(folder, in_place, monkeypatch)


# ---- Errors ----


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"vocab_size": 0}, "vocab_size = 0: wanted a whole number of at least 1"),
        ({"hidden_size": 2.0}, "hidden_size = 2.0: wanted a whole number of at least 1"),
        ({"n_layer": True}, "n_layer = True: wanted a whole number of at least 1"),
        ({"bptt": 0}, "bptt = 0: wanted a whole number of at least 1"),
        ({"cell": "LSTM"}, "cell = 'LSTM': wanted one of 'rnn', 'lstm', 'gru'"),
        ({"dropout": 1.0}, "dropout = 1.0: wanted a number from 0"),
        ({"dropout": float("nan")}, "dropout = nan: wanted a number from 0"),
        ({"tied": 1}, "tied = 1: wanted True or False"),
    ],
)
def test_config_errors(changes, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        RNNConfig(**{**SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_input_errors():
    model, x = tiny(), torch.zeros(2, 3, 5)
    for call, pattern in (
        (lambda: model(tokens(5)), r"ids of shape \(5,\), torch.int64: wanted token ids"),
        (lambda: model(torch.zeros(1, 5)), r"ids of shape \(1, 5\), torch.float32: wanted token ids"),
        (lambda: model.loss(tokens(2, 5), tokens(2, 4)), r"labels of shape \(2, 4\): wanted that of ids, \(2, 5\)"),
        (lambda: list(bptt_chunks(model, tokens(2, 5), 0)), "length = 0, .*wanted at least 1, and equal shapes"),
        (lambda: list(bptt_chunks(model, tokens(2, 5), 2, tokens(2, 6))), r"labels and ids \(2, 6\) and \(2, 5\)"),
        (lambda: Recurrent("mgu", 5, 4), "kind = 'mgu': wanted one of 'rnn', 'lstm', 'gru'"),
        (lambda: Recurrent("lstm", 5, 4)(x, (torch.zeros(2, 4),)), r"state of shapes \[\(2, 4\)\]: wanted 2 of"),
        (lambda: Recurrent("gru", 5, 4)(x, (torch.zeros(1, 2, 4),)), r"wanted 1 of \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)
