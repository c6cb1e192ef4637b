# SPDX-License-Identifier: MIT
"""RGN against norms taken tensor by tensor in float64; shifts planted where they are to be found; the budget's rule."""

import copy
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimal.bert import BERT, BERTConfig
from minimal.gpt import GPT, GPTConfig
from minimal.surgical import (
    Block,
    add_surgical,
    choose,
    describe,
    measure,
    remove_surgical,
    surgical_groups,
    surgical_parameters,
)
from minimal.transformer import Transformer, TransformerConfig

C, V = 16, 48


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ---- models, their batches, and which of their parameters is in which block ----------------------------------------


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(V, n_positions=16, n_embd=C, n_layer=3, n_head=2, dropout=0.1))


def bert():
    torch.manual_seed(0)
    return BERT(BERTConfig(V, C, 3, 2, 24, 16, dropout=0.1, task="classify", labels=("a", "b")))


def transformer(tied=True):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(V, C, 2, 2, 1, 24, dropout=0.1, norm="pre", tied=tied))


def llama():
    torch.manual_seed(0)
    module = pytest.importorskip("minimal.llama")
    sizes = {"vocab_size": V, "hidden_size": C, "intermediate_size": 24, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}  # fmt: skip
    return module.Llama(module.LlamaConfig(**sizes))


def ids(n=2, T=7):
    return torch.randint(V, (n, T))


MODELS = {
    "gpt": (gpt, lambda: {"ids": ids()}, ("transformer.wte", "transformer.wpe"),
            [f"transformer.h.{i}" for i in range(3)]),
    "llama": (llama, lambda: {"ids": ids()}, ("model.embed_tokens",), [f"model.layers.{i}" for i in range(3)]),
    "bert": (bert, lambda: {"ids": ids(), "labels": torch.randint(2, (2,))}, ("bert.embeddings",),
             [f"bert.encoder.layer.{i}" for i in range(3)]),
    "transformer": (transformer, lambda: {"source": ids(), "target": ids()}, ("embedding",),
                    ["encoder.0", "encoder.1", "decoder.0"]),
    "untied": (lambda: transformer(False), lambda: {"source": ids(), "target": ids()},
               ("source_embedding", "target_embedding"), ["encoder.0", "encoder.1", "decoder.0"]),
}  # fmt: skip


def block_of(name, parameter):
    """Which block a parameter belongs to, as a person would say it."""
    _, _, embeddings, stack = MODELS[name]
    inside = [block for block in stack if parameter.startswith(f"{block}.")]
    return inside[0] if inside else "embedding" if parameter.startswith(embeddings) else "head"


def brute_force(name, model, batches):
    """The definition: per batch, per block, the root of the sum of squares of g over that of theta; then the mean."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    ratios = {}
    for batch in batches:
        loss, count = model.loss(**batch)
        model.zero_grad()
        (loss / count).backward()
        g, theta = {}, {}
        for n, p in model.named_parameters():
            block = block_of(name, n)
            g[block] = g.get(block, 0.0) + (0.0 if p.grad is None else p.grad.pow(2).sum().item())
            theta[block] = theta.get(block, 0.0) + p.detach().pow(2).sum().item()
        for block in g:
            ratios.setdefault(block, []).append(math.sqrt(g[block]) / math.sqrt(theta[block]))
    return {block: sum(values) / len(values) for block, values in ratios.items()}


@pytest.mark.parametrize("name", MODELS)
def test_rgn_is_that_of_the_definition(name):
    make, draw, _, stack = MODELS[name]
    model, batches = make(), [draw() for _ in range(3)]
    table = measure(model, batches)
    oracle = brute_force(name, model, batches)
    assert [b.name for b in table] == ["embedding", *stack, "head"]
    assert {b.name: b.rgn for b in table} == pytest.approx(oracle, rel=1e-4)
    assert {b.name: b.rgn for b in measure(model.double(), batches)} == pytest.approx(oracle, rel=1e-9)
    sizes = {}
    for n, p in model.named_parameters():
        sizes[block_of(name, n)] = sizes.get(block_of(name, n), 0) + p.numel()
    assert {b.name: b.parameters for b in table} == sizes
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())  # a tied head is counted once
    assert not any(b.chosen or b.why for b in table)


def test_variants_of_the_mean_differ_from_the_definition():
    """A sum in place of the mean, the norm of the mean gradient, and the ratio without theta: all are other numbers."""
    model = gpt()
    batches = [{"ids": ids(n, T)} for n, T in ((1, 4), (2, 9), (3, 13))]
    want = brute_force("gpt", model, batches)
    assert {b.name: b.rgn for b in measure(model, batches)} == pytest.approx(want, rel=1e-4)
    twin = copy.deepcopy(model).eval()
    per_batch = []
    for batch in batches:
        loss, count = twin.loss(**batch)
        per_batch.append((torch.autograd.grad(loss, list(twin.transformer.h[0].parameters())), count))
    theta = torch.cat([p.detach().flatten() for p in twin.transformer.h[0].parameters()]).norm()
    flat = [torch.cat([t.flatten() for t in g]) for g, _ in per_batch]
    wrong = {
        "sum": sum(g.norm() for g in flat) / 3 / theta,
        "norm of the mean": sum(g / n for g, (_, n) in zip(flat, per_batch, strict=True)).norm() / 3 / theta,
        "absolute": sum(g.norm() / n for g, (_, n) in zip(flat, per_batch, strict=True)) / 3,
        "tokens weighted": sum(g.norm() for g in flat) / sum(n for _, n in per_batch) / theta,
    }
    for value in wrong.values():
        assert value.item() != pytest.approx(want["transformer.h.0"], rel=1e-2)


class Slices(nn.Module):
    """Block k reads numbers 4 k .. 4 k + 3 of the input; what one block does no other can, and without biases each is
    odd: the error of one is no other's in the mean."""

    def __init__(self, blocks=5):
        super().__init__()
        two = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
        self.blocks = nn.ModuleList(copy.deepcopy(two) for _ in range(blocks))
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x):
        return sum(block(part) for block, part in zip(self.blocks, x.split(4, dim=1), strict=True))

    def loss(self, x, y):
        return (self(x) - y).square().sum(), y.numel()


@pytest.mark.parametrize("k", range(5))
def test_a_shift_planted_in_a_block_is_found(k):
    base = Slices()
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        for p in teacher.blocks[k].parameters():
            p.add_(0.1 * torch.randn_like(p))
    batches = [{"x": x, "y": teacher(x).detach()} for x in torch.randn(3, 512, 20)]
    assert [b.rgn for b in measure(base, [{"x": b["x"], "y": base(b["x"]).detach()} for b in batches])] == [0.0] * 5
    table = measure(base, batches)
    first, second = sorted(table, key=lambda b: -b.rgn)[:2]
    assert first.name == f"blocks.{k}" and first.rgn > 1.5 * second.rgn
    with torch.no_grad():  # the gradient alone does not find it once another block's weights are of another scale
        other = base.blocks[(k + 1) % 5]
        for p in other[2].parameters():
            p.mul_(30)
        for p in teacher.blocks[(k + 1) % 5][2].parameters():
            p.mul_(30)
    batches = [{"x": b["x"], "y": teacher(b["x"]).detach()} for b in batches]
    assert max(measure(base, batches), key=lambda b: b.rgn).name == f"blocks.{k}"
    loss, count = base.loss(**batches[0])
    (loss / count).backward()
    norms = [math.hypot(*(p.grad.norm().item() for p in block.parameters())) for block in base.blocks]
    assert max(range(5), key=norms.__getitem__) == (k + 1) % 5
    # and tuning what was chosen mends the task, tuning another block does not
    losses = {}
    for choice in (k, (k + 2) % 5):
        model = copy.deepcopy(base)
        if choice == k:
            assert [b.name for b in add_surgical(model, batches, 0.2) if b.chosen] == [f"blocks.{k}"]
        parameters = surgical_parameters(model) if choice == k else list(model.blocks[choice].parameters())
        optimizer = torch.optim.Adam(parameters, 3e-3)
        for batch in batches * 30:
            loss, count = model.loss(**batch)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
        losses[choice] = sum(model.loss(**b)[0].item() for b in batches)
    start = sum(base.loss(**b)[0].item() for b in batches)
    assert losses[k] < 0.2 * start and losses[(k + 2) % 5] > 0.5 * start


def test_half_the_weights_before_a_norm_have_four_times_the_rgn():
    """What the head of the file warns of: the model is the same, RGN is not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)

        def loss(self, x, y):
            return F.cross_entropy(self.two(F.layer_norm(self.one(x), (8,), eps=0.0)), y, reduction="sum"), len(y)

    model, batch = Net().double(), {"x": torch.randn(9, 4, dtype=torch.float64), "y": torch.arange(9) % 3}
    one, two = measure(model, [batch])
    assert (one.name, two.name) == ("one", "two")  # no stack: the children are the blocks
    model.one.weight.data.mul_(0.5)
    again = measure(model, [batch])
    assert again[0].rgn == pytest.approx(4 * one.rgn) and again[1].rgn == pytest.approx(two.rgn)


# ---- nothing else changes ------------------------------------------------------------------------------------------


def state(model):
    return (
        [(n, p.dtype, p.requires_grad, p.data.clone(), None if p.grad is None else p.grad.clone()) for n, p in
         model.named_parameters()], [m.training for m in model.modules()], torch.get_rng_state(), random.getstate(),
        [b.clone() for b in model.buffers()], torch.is_grad_enabled(),
    )  # fmt: skip


def same(a, b):
    def equal(x, y):
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return equal(a, b)


class Noisy(nn.Module):
    """Draws random numbers in evaluation too, moves statistics in training, and fails when told to."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def loss(self, x, fail=False):
        if fail:
            raise RuntimeError("told to")
        y = self.b(F.dropout(self.norm(self.a(x)), 0.5))
        return y.square().sum(), len(y)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("no_grad", [False, True])
def test_measure_leaves_everything_as_it_was(fails, no_grad):
    model = Noisy().train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.loss(torch.randn(5, 4))[0].backward()  # a gradient that someone still needs
    batches = [{"x": torch.randn(5, 4)}, {"x": torch.randn(5, 4), "fail": fails}]
    with torch.set_grad_enabled(not no_grad):
        before = state(model)
        if fails:
            with pytest.raises(RuntimeError, match="told to"):
                measure(model, batches)
            with pytest.raises(RuntimeError, match="told to"):
                add_surgical(model, batches)
        else:
            table = measure(model, batches)
            assert [b.name for b in table] == ["a", "norm", "b"] and all(b.rgn > 0 for b in table)  # frozen a too
        assert same(before, state(model))


@pytest.mark.parametrize("name", ["gpt", "bert", "transformer", "llama"])
def test_state_is_restored_and_dropout_is_off(name):
    make, draw, _, _ = MODELS[name]
    model, batches = make().train(), [draw(), draw()]
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    table = measure(model, batches)
    assert same(before, state(model))
    torch.manual_seed(7)
    assert measure(model, batches) == table  # no dropout: the same numbers from another random state
    assert measure(model.eval(), iter(batches)) == table and not any(m.training for m in model.modules())


def test_batches_of_which_nothing_counts_are_left_out():
    model, batch = gpt(), {"ids": ids()}
    nothing = {"ids": ids(), "labels": torch.full((2, 7), -100)}
    assert measure(model, [nothing, batch, nothing]) == measure(model, [batch])
    for empty in ([], [nothing]):
        with pytest.raises(ValueError, match="^batches hold no term that counts; wanted at least one batch with"):
            measure(model, empty)


def test_what_has_no_gradient_and_what_is_zero():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.zero = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            nn.init.zeros_(self.zero.weight), nn.init.zeros_(self.zero.bias)
            self.codes = nn.Parameter(torch.ones(5, dtype=torch.int8), requires_grad=False)

        def loss(self, x):
            return (self.used(x) + self.zero(x)).square().sum(), len(x)

    model = Net()
    table = measure(model, [{"x": torch.randn(4, 3)}])
    assert [(b.name, b.parameters) for b in table] == [("used", 12), ("unused", 12), ("zero", 12)]  # int8 cannot learn
    assert table[1].rgn == 0 and table[2].rgn == math.inf
    picked = add_surgical(model, [{"x": torch.randn(4, 3)}], 1.0)
    assert [(b.name, b.chosen) for b in picked] == [("zero", True), ("used", True), ("unused", False)]
    assert picked[2].why == "no gradient reaches it"
    with pytest.raises(ValueError, match="largest RGN of inf"):
        surgical_groups(model, table, 1e-3)
    remove_surgical(model)
    with pytest.raises(ValueError, match=r"^block 'used' has weights and gradient of norms \(.*nan\) on batch 1; "):
        measure(model, [{"x": torch.full((4, 3), math.nan)}])
    with pytest.raises(ValueError, match="^model=ReLU has no floating-point parameters; wanted a model to tune$"):
        measure(nn.ReLU(), [{}])


def test_half_precision_is_measured_in_float32():
    model = gpt()
    batches = [{"ids": ids()}]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
    want = {b.name: b.rgn for b in measure(model, batches)}
    assert {b.name: b.rgn for b in measure(model.to(torch.bfloat16), batches)} == pytest.approx(want, rel=0.05)
    big = nn.Sequential(nn.Linear(300, 300)).to(torch.float16)
    nn.init.constant_(big[0].weight, 300.0)  # 90,000 numbers: a norm of 90,000 is infinite in float16
    big.loss = lambda x: (big(x).float().sum(), 1)
    (block,) = measure(big, [{"x": torch.ones(1, 300, dtype=torch.float16)}])
    assert block.rgn == pytest.approx(math.sqrt(90300) / math.hypot(90000, big[0].bias.float().norm().item()), rel=1e-3)


# ---- the choice ----------------------------------------------------------------------------------------------------

rows = st.lists(
    st.tuples(st.integers(1, 1000), st.one_of(st.sampled_from([0.0, 1.0, math.inf]), st.floats(0, 100))), min_size=1,
    max_size=12).map(lambda items: [Block(f"b{i}", n, rgn) for i, (n, rgn) in enumerate(items)])  # fmt: skip


@given(rows, st.one_of(st.integers(1, 5000), st.floats(0, 1, exclude_min=True)))
def test_the_budget_is_never_exceeded_and_the_rule_is_followed(ranking, budget):
    total = sum(b.parameters for b in ranking)
    limit = budget * total if isinstance(budget, float) else budget
    useful = [b for b in ranking if b.rgn > 0]
    if not any(b.parameters <= limit for b in useful):
        with pytest.raises(ValueError, match="fits no block; wanted at least"):
            choose(ranking, budget)
        return
    table = choose(ranking, budget)
    assert sum(b.parameters for b in table if b.chosen) <= limit
    assert sorted(b[:3] for b in table) == sorted(b[:3] for b in ranking)
    assert [b.rgn for b in table] == sorted((b.rgn for b in ranking), reverse=True)
    taken = 0
    for b in table:  # each is taken exactly if it fits beside those taken before it
        assert b.chosen == (b.rgn > 0 and taken + b.parameters <= limit), b
        taken += b.parameters * b.chosen
        assert ("no gradient" in b.why) == (b.rgn == 0) and b.why.startswith("fits") == b.chosen
    for x, y in itertools.pairwise(table):  # equal ones stay in the model's order
        assert x.rgn > y.rgn or int(x.name[1:]) < int(y.name[1:])
    lines = describe(table).splitlines()
    assert len(lines) == len(table) + 1
    assert all(line.startswith("tune") == b.chosen and b.why in line and b.name in line
               for line, b in zip(lines[1:], table, strict=True))  # fmt: skip


def test_the_choice_by_hand():
    ranking = [Block("embedding", 500, 0.1), Block("h.0", 300, 0.4), Block("h.1", 300, 0.4), Block("head", 100, 0.2)]
    table = choose(ranking, 0.35)  # 420 of 1200
    assert [(b.name, b.chosen, b.why) for b in table] == [
        ("h.0", True, "fits: 420 left of 420"), ("h.1", False, "does not fit: 120 left of 420"),
        ("head", True, "fits: 120 left of 420"), ("embedding", False, "does not fit: 20 left of 420")]  # fmt: skip
    assert [b.chosen for b in choose(ranking, 600)] == [True, True, False, False]
    assert all(b.chosen for b in choose(ranking, 1.0)) and all(b.chosen for b in choose(ranking, 10**9))
    for budget in (0, 0.0, -1, 1.5, True, None, "1", math.nan):
        with pytest.raises(ValueError, match=r"^budget=.* is out of range; wanted a share above 0.0 up to 1.0, "):
            choose(ranking, budget)
    with pytest.raises(ValueError, match="^budget=1 is 1 of 1,200 parameters and fits no block; wanted at least 100, "):
        choose(ranking, 1)
    with pytest.raises(ValueError, match="^block 'x' has an RGN of nan; wanted a number$"):
        choose([Block("x", 1, math.nan)], 1.0)
    with pytest.raises(ValueError, match="fits no block; wanted at least 0"):
        choose([Block("x", 1, 0.0)], 1.0)


# ---- verbs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_what_is_chosen_trains_and_the_rest_stays(name):
    make, draw, _, _ = MODELS[name]
    model, batches = make(), [draw() for _ in range(3)]
    next(model.parameters()).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    weights = copy.deepcopy(model.state_dict())
    table = add_surgical(model, batches, 0.5)
    assert table == choose(measure(model, batches), 0.5)
    chosen = {b.name for b in table if b.chosen}
    assert chosen and len(chosen) < len(table)
    for n, p in model.named_parameters():
        assert p.requires_grad == (block_of(name, n) in chosen), n
    assert {id(p) for p in surgical_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in surgical_parameters(model)) <= 0.5 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(surgical_parameters(model), 1e-2)
    losses = []
    for batch in batches * 4:
        loss, count = model.loss(**batch)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append((loss / count).item())
    assert sum(losses[-3:]) < sum(losses[:3])
    for n, p in model.named_parameters():
        assert torch.equal(p, weights[n]) or block_of(name, n) in chosen, n
    with pytest.raises(ValueError, match="is surgical already; wanted remove_surgical first$"):
        add_surgical(model, batches)
    trained = copy.deepcopy(model.state_dict())
    remove_surgical(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())
    assert not hasattr(model, "surgical_trainable")
    for verb in (surgical_parameters, remove_surgical):
        with pytest.raises(ValueError, match="has no chosen blocks; wanted add_surgical first$"):
            verb(model)


def test_what_was_tuned_is_saved_whole(tmp_path):
    model = gpt().eval()
    add_surgical(model, [{"ids": ids()}], 0.5)
    with torch.no_grad():
        for p in surgical_parameters(model):
            p.add_(0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(x := ids()), model(x))


def test_a_failed_choice_changes_nothing():
    model = gpt().train()
    before = state(model)
    for batches, budget in (([], 0.5), ([{"ids": ids()}], 1), ([{"ids": ids()}], 2.0)):
        torch.set_rng_state(before[2])
        with pytest.raises(ValueError, match="wanted"):
            add_surgical(model, batches, budget)
        assert same(before, state(model)) and not hasattr(model, "surgical_trainable")


def test_a_tied_head_stays_tied_and_trains_with_the_embedding():
    model = gpt()
    table = measure(model, [{"ids": ids()}])
    assert table[-1] == Block("head", 2 * C, table[-1].rgn)  # the last norm alone
    add_surgical(model, [{"ids": ids()}], 10**9)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(surgical_parameters(model)) == len(list(model.parameters()))


def test_through_the_handle_of_torch_compile():
    plain, batch = Slices(), {"x": torch.randn(8, 20), "y": torch.randn(8, 6)}
    handle = torch.compile(copy.deepcopy(plain), backend="eager")
    inner = copy.deepcopy(plain)
    inner.blocks[1] = torch.compile(inner.blocks[1], backend="eager")
    assert measure(handle, [batch]) == measure(plain, [batch])
    assert [b[:2] for b in measure(inner, [batch])] == [b[:2] for b in measure(plain, [batch])]
    add_surgical(inner, [batch], 0.2)
    remove_surgical(inner)
    assert all(p.requires_grad for p in inner.parameters())


def test_stacks_in_stacks_and_what_comes_between():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(2, 2)
            self.stages = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(11))
            self.between, self.last = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
            self.stages_too = nn.Linear(2, 2)  # a name that begins with another's

        def loss(self, x):
            for m in (self.stem, *self.stages, self.between, self.last, self.stages_too):
                x = m(x)
            return x.square().sum(), len(x)

    table = measure(Net(), [{"x": torch.randn(3, 2)}])
    assert [b.name for b in table] == ["embedding", *(f"stages.{i}" for i in range(11)), "head", "last.0", "last.2"]
    assert [b.parameters for b in table] == [6, *[12] * 11, 12, 6, 6]


def test_the_soft_choice():
    model, batch = Slices(), {"x": torch.randn(64, 20), "y": torch.randn(64, 6)}
    ranking = measure(model, [batch])
    groups = surgical_groups(model, ranking, 0.01)
    largest = max(b.rgn for b in ranking)
    assert [g["scale"] for g in groups] == pytest.approx([b.rgn / largest for b in ranking]) and len(groups) == 5
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(groups)
    loss, count = model.loss(**batch)
    (loss / count).backward()
    optimizer.step()
    for block, old, b in zip(model.blocks, before.blocks, ranking, strict=True):
        for p, q in zip(block.parameters(), old.parameters(), strict=True):
            torch.testing.assert_close(p, q - 0.01 * b.rgn / largest * p.grad)
    shuffled = surgical_groups(model, ranking[::-1], 0.01)
    assert shuffled[-1]["params"][0] is next(model.blocks[0].parameters())
    for wrong in (ranking[1:], [], [b._replace(rgn=0.0) for b in ranking], [*ranking, Block("x", 1, 1.0)]):
        with pytest.raises(ValueError, match="^ranking has . blocks and a largest RGN of .*; wanted the 5 blocks"):
            surgical_groups(model, wrong, 0.01)
