# SPDX-License-Identifier: MIT
"""Distillation against F.kl_div, closed forms and models with blocks cut out; each known trap written out."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from minimal.bert import BERT, BERTConfig
from minimal.distill import cosine_loss, distillation_loss, skip_layers, soft_target_loss
from minimal.gpt import GPT, GPTConfig
from minimal.transformer import Transformer, TransformerConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(model):
    """Move every parameter and floating buffer off its initial value, so that one left out shows."""
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.add_(torch.randn_like(t), alpha=0.15)
    return model.eval()


# ---- The soft term ----


@given(st.integers(1, 9), st.integers(2, 30), st.floats(0.3, 20), st.sampled_from([torch.float32, torch.float64]))
def test_soft_targets_against_kl_div(N, V, T, dtype):
    student, teacher = 3 * torch.randn(2, N, V, dtype=dtype)
    want = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="batchmean") * T**2 * N
    got = soft_target_loss(student, teacher, T)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * T**2 if dtype == torch.float32 else 1e-9 * T**2)


def check_soft_term(loss):
    # Two classes by hand: at T = 2 the teacher says (1/4, 3/4) and the student (1/2, 1/2); two such rows, summed.
    student, teacher = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[0.0, 2 * math.log(3)]] * 2).double()
    want = 2 * 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert abs(loss(student, teacher, 2.0) - want) < 1e-6, "by hand"
    # Hinton's eq. 4: T -> infinity matches logits, of which only differences within a row count.
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    want = difference.square().sum() / (2 * 7)
    assert abs(loss(student, teacher, 1e4) / want - 1) < 1e-3, "limit"


def test_soft_term_and_its_traps():
    """Trap: 'mean' divides by N V and no T^2 lets the term vanish; the wrong direction, and softmax over the rows."""
    check_soft_term(soft_target_loss)

    def mean(student, teacher, T):
        kl = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="none")
        return kl.mean() * T**2 * len(student)

    def without_square(student, teacher, T):
        return F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="sum")

    def reverse(student, teacher, T):
        return T**2 * F.kl_div(F.log_softmax(teacher / T, 1), F.softmax(student / T, 1), reduction="sum")

    def over_rows(student, teacher, T):
        return soft_target_loss(student.T, teacher.T, T)

    for wrong in (mean, without_square, reverse, over_rows):
        with pytest.raises(AssertionError):
            check_soft_term(wrong)


@given(st.integers(1, 6), st.integers(2, 12), st.floats(0.5, 8))
def test_soft_gradient_in_closed_form(N, V, T):
    """d/dz T^2 KL(p || q) = T (q - p), and none for the teacher."""
    student, teacher = (torch.randn(N, V, dtype=torch.float64, requires_grad=True) for _ in range(2))
    soft_target_loss(student, teacher, T).backward()
    want = T * ((student / T).softmax(1) - (teacher / T).softmax(1))
    torch.testing.assert_close(student.grad, want.detach())
    assert teacher.grad is None


def test_soft_term_of_the_teacher_itself_is_zero():
    logits = 5 * torch.randn(6, 11)
    student = logits.clone().requires_grad_()
    loss = soft_target_loss(student, logits + 3.0, 2.0)  # a shift changes no probability
    loss.backward()
    assert abs(loss) < 1e-5 and student.grad.abs().max() < 1e-5
    assert soft_target_loss(logits, logits, 2.0) == 0


def test_a_class_that_the_teacher_rules_out():
    """0 ln 0 is 0, forward and backward: as if the class were not there for both."""
    student, teacher = torch.randn(2, 4, 6)
    keep = torch.tensor([0, 1, 2, 4, 5])
    both = student.clone()
    teacher[:, 3] = both[:, 3] = -math.inf
    both.requires_grad_()
    loss = soft_target_loss(both, teacher, 1.5)
    loss.backward()
    torch.testing.assert_close(loss, soft_target_loss(student[:, keep], teacher[:, keep], 1.5))
    assert both.grad.isfinite().all()
    one_sided = soft_target_loss(student, teacher, 1.5)  # and the student pays for what it gives to that class
    assert one_sided.isfinite() and one_sided > loss


def test_half_precision_is_summed_in_float32():
    student, teacher = torch.randn(2, 500, 40).bfloat16()
    want = soft_target_loss(student.double(), teacher.double(), 2.0)
    got = soft_target_loss(student, teacher, 2.0)
    assert got.dtype == torch.float32 and abs(got / want - 1) < 1e-4
    want = cosine_loss(student.double(), teacher.double())
    got = cosine_loss(student, teacher)
    assert got.dtype == torch.float32 and abs(got / want - 1) < 1e-4


# ---- The cosine term ----


@given(st.integers(0, 9), st.integers(1, 30))
def test_cosine_against_torch(M, C):
    student, teacher = (torch.randn(M, C, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = cosine_loss(student, teacher)
    want = nn.CosineEmbeddingLoss(reduction="sum")(student, teacher, torch.ones(M))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.backward()
    assert teacher.grad is None and student.grad is not None


def test_cosine_by_hand():
    ours, theirs = torch.tensor([[1.0, 0], [1, 0], [2, 0], [1, 1]]), torch.tensor([[0, 3.0], [-5, 0], [7, 0], [1, 0]])
    assert abs(cosine_loss(ours, theirs) - (1 + 2 + 0 + 1 - math.sqrt(0.5))) < 1e-6
    hidden = torch.zeros(2, 3, requires_grad=True)
    cosine_loss(hidden, torch.randn(2, 3)).backward()
    assert hidden.grad.isfinite().all()


# ---- The triple loss ----


def triple(N=8, V=5, M=12, C=6, dtype=torch.float64):
    targets = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.4, -100)
    targets[0] = 1
    return [(torch.randn(N, V, dtype=dtype, requires_grad=True), targets, torch.randn(M, C, dtype=dtype))
            for _ in range(2)]  # fmt: skip


@given(st.floats(0, 9), st.floats(0.1, 9), st.floats(0, 9), st.floats(0.5, 9), st.floats(0, 0.5), st.integers(0, 99))
def test_triple_loss_row_by_row(soft, hard, cosine, T, smoothing, seed):
    """The definition, in Python's own floats."""
    torch.manual_seed(seed)
    student, teacher = triple()
    got, count = distillation_loss(student, teacher, temperature=T, soft=soft, hard=hard, cosine=cosine,
                                   label_smoothing=smoothing)  # fmt: skip
    total, n, V = 0.0, 0, student[0].shape[1]
    for z, v, y in zip(student[0].tolist(), teacher[0].tolist(), student[1].tolist(), strict=True):
        if y == -100:
            continue
        n += 1
        log_q1 = [a - math.log(sum(map(math.exp, z))) for a in z]
        total -= hard * ((1 - smoothing) * log_q1[y] + smoothing / V * sum(log_q1))
        p, q = ([math.exp(a / T) / sum(math.exp(b / T) for b in logits) for a in logits] for logits in (v, z))
        total += soft * T * T * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    for h, k in zip(student[2].tolist(), teacher[2].tolist(), strict=True):
        total += cosine * (1 - sum(a * b for a, b in zip(h, k, strict=True)) / math.hypot(*h) / math.hypot(*k))
    assert count.dtype == torch.int64 and count.dim() == 0 and count == n
    assert abs(got - total / (soft + hard + cosine)) < 1e-9 * max(1, total)


def test_the_defaults_are_distilberts():
    student, teacher = triple()
    want = distillation_loss(student, teacher, temperature=2, soft=0.625, hard=0.25, cosine=0.125)[0]
    torch.testing.assert_close(distillation_loss(student, teacher)[0], want)


def test_hard_alone_is_the_plain_loss():
    (logits, targets, hidden), teacher = triple()
    wider = (torch.randn(8, 77), teacher[1], torch.randn(12, 99))  # widths that are not looked at
    for smoothing in (0.0, 0.1):
        got, count = distillation_loss((logits, targets, hidden), wider, soft=0, cosine=0, label_smoothing=smoothing)
        assert got == F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        assert count == (targets != -100).sum()


def test_what_is_not_counted_does_not_matter():
    student, teacher = triple()
    before, _ = distillation_loss(student, teacher)
    before.backward()
    out = student[1] == -100
    assert out.any() and (student[0].grad[out] == 0).all() and (student[0].grad[~out] != 0).any(1).all()
    assert teacher[0].grad is None
    changed = teacher[0].detach().masked_fill(out[:, None], math.nan)
    assert distillation_loss(student, (changed, *teacher[1:]))[0] == before


def test_nothing_to_count_is_zero_and_not_nan():
    (logits, targets, hidden), teacher = triple()
    none = torch.full_like(targets, -100)
    total, count = distillation_loss((logits, none, hidden), (teacher[0], none, teacher[2]), cosine=0)
    total.backward()
    assert total == 0 and count == 0 and (logits.grad == 0).all()
    with_cosine, _ = distillation_loss((logits, none, hidden), (teacher[0], none, teacher[2]))
    torch.testing.assert_close(with_cosine, cosine_loss(hidden, teacher[2]) / 8)


class Encoder(nn.Module):
    """Masked tokens as targets, hidden states at all that are not padding: M and N differ from batch to batch."""

    def __init__(self, V=9, C=8):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(V, C), nn.Linear(C, C), nn.Linear(C, V)

    def outputs(self, ids, targets, real):
        x = torch.tanh(self.inner(self.embedding(ids)))  # (B, T, C)
        return self.head(x).flatten(0, 1), targets.flatten(), x[real]


def check_splits(parts, loss, seed=0):
    torch.manual_seed(seed)
    student, teacher = Encoder().double(), Encoder().double()
    B, T = sum(parts), 7
    ids, real = torch.randint(9, (B, T)), torch.arange(T) < torch.randint(2, T + 1, (B, 1))  # 2 x (B, T)
    targets = ids.masked_fill(~real | (torch.rand(B, T) < torch.rand(B, 1)), -100)  # (B, T)
    targets[0, 0] = ids[0, 0]

    def gradient(sizes):
        student.zero_grad()
        count = 0
        for batch in zip(*(t.split(sizes) for t in (ids, targets, real)), strict=True):
            total, n = loss(student.outputs(*batch), teacher.outputs(*batch))
            total.backward()
            count += n
        return torch.cat([p.grad.flatten() for p in student.parameters()]) / count

    whole = gradient([B])
    assert (gradient(parts) - whole).norm() <= 1e-12 * whole.norm()
    assert all(p.grad is None for p in teacher.parameters())


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_gradient_is_the_same_for_every_split(parts, seed):
    check_splits(parts, distillation_loss, seed)


def test_trap_mean_of_means():
    def cosine_as_a_mean(student, teacher):  # joined to the sum as if each target had the batch's mean
        total, n = distillation_loss(student, teacher, soft=5 / 8, hard=2 / 8 + 1 / 8, cosine=0)
        return total + n * cosine_loss(student[2], teacher[2]) / len(student[2]), n

    def all_as_means(student, teacher):
        total, n = distillation_loss(student, teacher, cosine=0)
        return total / n.clamp_min(1), n / n.clamp_min(1)

    check_splits([2, 3], distillation_loss)
    for wrong in (cosine_as_a_mean, all_as_means):
        with pytest.raises(AssertionError):
            check_splits([2, 3], wrong)


# ---- Skipped layers, and the three together on the models of this project ----


def test_blocks_are_chosen_evenly():
    class Stack(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.h = nn.ModuleList(nn.Linear(1, 1) for _ in range(n))

    assert skip_layers(Stack(12), Stack(6)) == {"h": [0, 2, 4, 6, 8, 10]}
    for long in range(1, 10):
        for short in range(1, long + 1):
            teacher, student = Stack(long), Stack(short)
            chosen = skip_layers(teacher, student)["h"]
            steps = {b - a for a, b in zip(chosen, [*chosen[1:], long], strict=True)}
            assert chosen[0] == 0 and steps <= {long // short, -(-long // short)}, (long, short, chosen)
            for i, j in enumerate(chosen):
                assert torch.equal(student.h[i].weight, teacher.h[j].weight)
                assert torch.equal(student.h[i].bias, teacher.h[j].bias)


def gpt(n_layer):
    return perturb(GPT(GPTConfig(31, n_positions=12, n_embd=16, n_layer=n_layer, n_head=2, dropout=0.0)))


def our_bert(n_layer):
    sizes = dict(vocab_size=31, hidden_size=16, num_attention_heads=2, intermediate_size=32, dropout=0.0)
    return perturb(BERT(BERTConfig(**sizes, num_hidden_layers=n_layer, max_position_embeddings=12)))


def transformer(n_encoder, n_decoder):
    sizes = dict(vocab_size=31, d_model=16, n_head=2, d_ff=32, dropout=0.0, max_len=12)
    return perturb(Transformer(TransformerConfig(**sizes, n_encoder=n_encoder, n_decoder=n_decoder)))


def bert(n_layer):
    sizes = dict(vocab_size=31, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    return perturb(BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=n_layer, max_position_embeddings=12)))


def bart(n_encoder, n_decoder=None):
    sizes = dict(encoder_layers=n_encoder, decoder_layers=n_decoder or n_encoder, encoder_ffn_dim=32, vocab_size=31,
                 decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip
    return perturb(BartForConditionalGeneration(BartConfig(max_position_embeddings=12, d_model=16, **sizes)))


def cut(model, lists):
    """The oracle: the teacher itself with the other blocks taken out."""
    model = copy.deepcopy(model)
    for name, indices in lists.items():
        above, _, last = name.rpartition(".")
        blocks = model.get_submodule(name)
        setattr(model.get_submodule(above), last, nn.ModuleList(blocks[i] for i in indices))
    return model


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize(
    "make, long, short, lists",
    [
        (gpt, (5,), (2,), {"transformer.h": [0, 2]}),
        (gpt, (3,), (3,), {"transformer.h": [0, 1, 2]}),
        (bert, (4,), (2,), {"bert.encoder.layer": [0, 2]}),
        (bart, (4, 3), (2, 1), {"model.encoder.layers": [0, 2], "model.decoder.layers": [0]}),
        (bart, (2, 4), (2, 2), {"model.encoder.layers": [0, 1], "model.decoder.layers": [0, 2]}),
    ],
    ids=["gpt", "gpt-whole", "bert", "bart", "bart-decoder"],
)
def test_the_student_is_the_teacher_with_blocks_cut_out(make, long, short, lists):
    torch.manual_seed(0)
    teacher, student, ids = make(*long), make(*short), torch.randint(3, 31, (2, 9))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    want = logits(cut(teacher, lists), ids)
    assert not torch.allclose(logits(student, ids), want, atol=1e-2)
    assert skip_layers(teacher, student) == lists
    torch.testing.assert_close(logits(student, ids), want)
    ours = {p.data_ptr() for p in student.parameters()}
    assert not ours & {p.data_ptr() for p in teacher.parameters()}, "shared with the teacher"
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def batches():
    """One for each model: what `outputs` takes."""
    ids = torch.randint(3, 31, (3, 9))
    hidden = torch.rand(3, 9) < 0.6
    hidden[0, 0], hidden[0, 1] = True, False
    some = ids.masked_fill(hidden, -100)
    real = torch.arange(9) < torch.tensor([[9], [9], [4]])
    yield gpt, (4,), (2,), dict(ids=ids, labels=some)
    yield our_bert, (4,), (2,), dict(ids=ids, labels=some.masked_fill(~real, -100), mask=real)
    yield transformer, (4, 2), (2, 1), dict(source=ids, target=ids, source_mask=real, labels=some)


def test_on_the_models_of_this_project():
    for make, long, short, batch in batches():
        teacher, student = make(*long), make(*short)
        with torch.no_grad():
            given = teacher.outputs(**batch)
        hard, count = teacher.loss(**batch)
        loss, n = distillation_loss(teacher.outputs(**batch), given)
        torch.testing.assert_close(loss, hard * 2 / 8)  # its own student: the other two terms are 0
        assert n == count > 0
        far, _ = distillation_loss(student.outputs(**batch), given)
        lists = skip_layers(teacher, student)
        near, _ = distillation_loss(student.outputs(**batch), given)
        want, _ = distillation_loss(cut(teacher, lists).outputs(**batch), given)
        torch.testing.assert_close(near, want)
        assert (near - far).abs() > 1e-2
        near.backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert sum(p.grad is not None for p in student.parameters()) > 10


def check_ties(skip):
    torch.manual_seed(0)
    teacher, student = gpt(4), gpt(2)
    skip(teacher, student)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert student.lm_head.weight is student.transformer.wte.weight, "the tie is lost"


def test_ties_stay():
    check_ties(skip_layers)

    def assign(teacher, student):
        state = teacher.state_dict()
        student.load_state_dict({n: state[n].clone() for n in student.state_dict()}, assign=True)

    with pytest.raises(AssertionError, match="the tie is lost"):
        check_ties(assign)


class Experts(nn.Module):
    """Lists within lists, a buffer, a tensor of no float, a dtype and a bare parameter."""

    def __init__(self, n_layer, n_expert):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(n_layer):
            block = nn.Module()
            block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(n_expert))
            block.register_buffer("table", torch.randn(3), persistent=False)
            self.layers.append(block)
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("step", torch.randint(99, (1,)))


def test_nested_lists_buffers_and_dtypes():
    teacher, student = Experts(4, 6).bfloat16(), Experts(2, 3)
    frozen = student.layers[1].experts[1].weight.requires_grad_(False)
    lists = skip_layers(teacher, student)
    assert lists == {"layers": [0, 2], "layers.0.experts": [0, 2, 4], "layers.1.experts": [0, 2, 4]}
    assert torch.equal(frozen, teacher.layers[2].experts[2].weight.float())
    assert frozen.dtype == torch.float32 and not frozen.requires_grad and student.scale.requires_grad
    assert torch.equal(student.layers[1].table, teacher.layers[2].table.float())
    assert torch.equal(student.scale, teacher.scale.float()) and torch.equal(student.step, teacher.step)


def check_refusal(teacher, student, pattern):
    before = {name: t.clone() for name, t in student.state_dict().items()}
    with pytest.raises(ValueError, match=pattern) as caught:
        skip_layers(teacher, student)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items()), "half copied"


def test_what_does_not_fit_is_refused():
    check_refusal(gpt(2), bert(1), "student is a BertForMaskedLM: wanted a GPT")
    check_refusal(gpt(2), gpt(3), "student's transformer.h has 3 blocks: wanted at most the teacher's 2")
    narrow = GPT(GPTConfig(31, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    check_refusal(gpt(2), narrow, r"teacher's transformer.wpe.weight is \(12, 16\): wanted \(8, 16\), as the student's")
    other = gpt(4)
    other.transformer.h[2].mlp.c_fc = nn.Linear(16, 64, bias=False)
    check_refusal(other, gpt(2), r"teacher's transformer.h.2.mlp.c_fc.bias is missing: wanted \(64,\)")
    untied = gpt(2)
    untied.lm_head.weight = nn.Parameter(torch.randn(31, 16))
    check_refusal(untied, gpt(1), "student's transformer.wte.weight and lm_head.weight are tied: wanted equal tensors")
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.transformer.wte.weight)
    assert skip_layers(untied, gpt(1)) == {"transformer.h": [0]}  # equal values do for two tied tensors


def test_errors():
    student, teacher = triple()
    z, y, h = student

    def with_(**changes):
        return distillation_loss(student, teacher, **changes)

    for call, pattern in (
        (lambda: with_(temperature=0), "temperature = 0: wanted a finite number above 0"),
        (lambda: with_(temperature=math.nan), "temperature = nan: wanted"),
        (lambda: with_(temperature=math.inf), "temperature = inf: wanted"),
        (lambda: with_(soft=-1.0), "soft = -1.0, hard = 2.0, cosine = 1.0: wanted finite weights of at least 0"),
        (lambda: with_(soft=0, hard=0, cosine=0), "soft = 0, hard = 0, cosine = 0: wanted"),
        (lambda: with_(hard=math.nan), "hard = nan, cosine = 1.0: wanted"),
        (lambda: with_(label_smoothing=1.5), "label_smoothing = 1.5: wanted a number from 0 to 1"),
        (lambda: distillation_loss((z, y + 1, h), teacher), "targets of student and teacher differ"),
        (lambda: distillation_loss((z, y, h[:, 1:]), teacher), r"hidden .*\(12, 5\) and \(12, 6\): .* or cosine=0"),
        (lambda: distillation_loss(student, (z[:, 1:], y, h)), r"logits .*, 5\) and .*, 4\): wanted one shape"),
        (lambda: soft_target_loss(z[0], z[0], 1.0), r"shapes \(5,\) and \(5,\): wanted one shape \(rows, classes\)"),
    ):
        with pytest.raises(ValueError, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)
