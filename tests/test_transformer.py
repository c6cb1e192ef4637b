# SPDX-License-Identifier: MIT
"""The encoder-decoder against torch.nn.Transformer, its searches against brute force, and known traps, written out."""

import itertools
import json
import math
import re

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minimal import transformer
from minimal.transformer import (
    Transformer,
    TransformerConfig,
    beam_search,
    greedy,
    sinusoidal_positions,
    torch_attention,
)

SIZES = dict(vocab_size=23, d_model=16, n_head=4, n_encoder=2, n_decoder=3, d_ff=24, max_len=16, dropout=0.0,
             bos_token_id=1, eos_token_id=2)  # fmt: skip
EVERY = [
    dict(norm=norm, positions=positions, tied=tied)
    for norm in ("post", "pre")
    for positions, tied in (("sinusoidal", True), ("learned", False))
]

# torch.nn.Transformer says so of itself when it is pre-norm.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(model):
    """Move every parameter off its initial value: zero biases and unit norms would hide a missing one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def tiny(attention=torch_attention, kind=Transformer, **changes):
    return perturb(kind(TransformerConfig(**{**SIZES, **changes}), attention))


def tokens(*shape, vocab=23, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def padded(*lengths):
    """A mask (B, S), True for the first `length` places of each row."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ---- Against torch.nn.Transformer, and the closed form of the positions ----


def reference_of(model):
    """torch.nn.Transformer with copies of the model's weights; its own attention biases, absent in the paper, are 0."""
    c = model.config
    ours = nn.Transformer(c.d_model, c.n_head, c.n_encoder, c.n_decoder, c.d_ff, 0.0, batch_first=True,
                          norm_first=c.norm == "pre", layer_norm_eps=c.layer_norm_epsilon)  # fmt: skip
    ours = ours.to(next(model.parameters()).dtype)
    if c.norm == "post":
        ours.encoder.norm = ours.decoder.norm = None
    pairs = []  # (their parameter, ours) or (their parameter, None): stays 0
    for stack, blocks, final in (
        (ours.encoder, model.encoder, model.encoder_norm),
        (ours.decoder, model.decoder, model.decoder_norm),
    ):
        for layer, block in zip(stack.layers, blocks, strict=True):
            norms = [block.self_attn.norm, block.norm]
            attentions = [(layer.self_attn, block.self_attn)]
            if block.cross_attn is not None:
                norms.insert(1, block.cross_attn.norm)
                attentions.append((layer.multihead_attn, block.cross_attn))
            for theirs, mine in attentions:
                pairs.append((theirs.in_proj_weight, [mine.q_proj.weight, mine.k_proj.weight, mine.v_proj.weight]))
                pairs.append((theirs.out_proj.weight, [mine.out_proj.weight]))
                pairs += [(theirs.in_proj_bias, []), (theirs.out_proj.bias, [])]
            for i, mine in enumerate(norms, 1):
                theirs = getattr(layer, f"norm{i}")
                pairs += [(theirs.weight, [mine.weight]), (theirs.bias, [mine.bias])]
            for theirs, mine in ((layer.linear1, block.fc1), (layer.linear2, block.fc2)):
                pairs += [(theirs.weight, [mine.weight]), (theirs.bias, [mine.bias])]
        if c.norm == "pre":
            pairs += [(stack.norm.weight, [final.weight]), (stack.norm.bias, [final.bias])]
    assert len({id(theirs) for theirs, _ in pairs}) == len(list(ours.parameters())) == len(pairs)
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.copy_(torch.cat(mine)) if mine else theirs.zero_()
    return ours, pairs


def sinusoids_by_hand(n, C):
    table = [
        [(math.sin, math.cos)[j % 2](pos / 10000 ** (2 * (j // 2) / C)) for j in range(C)] for pos in range(n)
    ]  # fmt: skip
    return torch.tensor(table, dtype=torch.float64)


def check_reference(model, source, target, source_mask):
    c, (reference, pairs) = model.config, reference_of(model)
    E_source, E_target = (
        [model.embedding.weight] * 2 if c.tied else [model.source_embedding.weight, model.target_embedding.weight]
    )
    E_source, E_target = (E.detach().clone().requires_grad_() for E in (E_source, E_target))
    if c.positions == "learned":
        P_source, P_target = model.source_positions.weight.detach(), model.target_positions.weight.detach()
    else:
        P_source = P_target = sinusoids_by_hand(c.max_len, c.d_model).to(E_source.dtype)
    head = model.lm_head.weight.detach().clone().requires_grad_()
    pad = None if source_mask is None else ~source_mask
    states = reference(
        F.embedding(source, E_source) * c.d_model**0.5 + P_source[: source.size(1)],
        F.embedding(target, E_target) * c.d_model**0.5 + P_target[: target.size(1)],
        tgt_mask=torch.ones(target.size(1), target.size(1)).bool().triu(1),
        src_key_padding_mask=pad,
        memory_key_padding_mask=pad,
    )
    want, got = states @ head.mT, model(source, target, source_mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(want)
    model.zero_grad()
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for theirs, mine in pairs:
        if mine:
            torch.testing.assert_close(torch.cat([p.grad for p in mine]), theirs.grad, rtol=1e-5, atol=1e-5)
    if c.tied:
        want_grad, got_grad = E_source.grad + E_target.grad + head.grad, model.embedding.weight.grad
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-5)
    else:
        for mine, theirs in (
            (model.source_embedding.weight, E_source),
            (model.target_embedding.weight, E_target),
            (model.lm_head.weight, head),
        ):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choices", EVERY, ids=lambda c: "-".join(map(str, c.values())))
@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_logits_and_gradients_are_those_of_torch(choices, lengths, T, seed, masked):
    """In float64, where 1e-5 leaves nothing to rounding but the float32 angles of the positions."""
    torch.manual_seed(seed)
    model = tiny(**choices).double()
    mask = padded(*lengths) if masked else None
    check_reference(model, tokens(len(lengths), max(lengths), seed=seed), tokens(len(lengths), T), mask)


def test_float32_is_as_close():
    model = tiny()
    (reference, _), source, target, mask = reference_of(model), tokens(3, 9), tokens(3, 7), padded(9, 4, 6)
    scale, P = model.config.d_model**0.5, sinusoids_by_hand(9, 16).float()
    with torch.no_grad():
        want = reference(
            model.embedding(source) * scale + P,
            model.embedding(target) * scale + P[:7],
            tgt_mask=torch.ones(7, 7).bool().triu(1),
            src_key_padding_mask=~mask,
            memory_key_padding_mask=~mask,
        )
        torch.testing.assert_close(model(source, target, mask), model.lm_head(want), rtol=1e-5, atol=1e-5)


def test_the_reference_tells_a_wrong_model():
    """The comparison must not pass whatever is compared: one wrong detail each."""

    def everything(q, k, v, *, causal=False, **settings):  # the decoder sees its future
        return torch_attention(q, k, v, **settings)

    def unmasked(q, k, v, *, mask=None, **settings):  # the padding is attended to
        return torch_attention(q, k, v, **settings)

    def unscaled(q, k, v, *, scale=None, **settings):
        return torch_attention(q, k, v, scale=1.0, **settings)

    class Unscaled(Transformer):  # embeddings not multiplied by sqrt(C)
        def _embed(self, ids, side, past=0):
            return super()._embed(ids, side, past) - (self.config.d_model**0.5 - 1) * self.embedding(ids)

    batch = tokens(3, 9), tokens(3, 7), padded(9, 4, 6)
    check_reference(tiny().double(), *batch)
    for wrong in (tiny(everything), tiny(unmasked), tiny(unscaled), tiny(kind=Unscaled)):
        with pytest.raises(AssertionError):
            check_reference(wrong.double(), *batch)


def test_sinusoids_by_hand():
    got = sinusoidal_positions(torch.arange(3), 4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(got[1], torch.tensor([0.8415, 0.5403, 0.0100, 0.99995]), rtol=0, atol=5e-5)
    torch.testing.assert_close(got[2], torch.tensor([0.9093, -0.4161, 0.0200, 0.9998]), rtol=0, atol=5e-5)


@given(st.integers(1, 600), st.integers(1, 40))
def test_sinusoids_are_the_closed_form(n, half):
    got = sinusoidal_positions(torch.arange(n), 2 * half)
    assert got.shape == (n, 2 * half)
    torch.testing.assert_close(got.double(), sinusoids_by_hand(n, 2 * half), rtol=0, atol=1e-6 * max(n, 10))


@pytest.mark.parametrize("choices", EVERY, ids=lambda c: "-".join(map(str, c.values())))
def test_parameters_are_counted_by_the_formula(choices):
    c = TransformerConfig(**{**SIZES, **choices})
    V, C, M = c.vocab_size, c.d_model, 2 * c.d_model * c.d_ff + c.d_ff + c.d_model
    want = V * C + c.n_encoder * (4 * C * C + M + 4 * C) + c.n_decoder * (8 * C * C + M + 6 * C)
    want += (2 * V * C if not c.tied else 0) + (4 * C if c.norm == "pre" else 0)
    want += 2 * c.max_len * C if c.positions == "learned" else 0
    assert sum(p.numel() for p in Transformer(c).parameters()) == want


def test_initial_variances():
    """Tokens of unit variance, positions as large as sines, matrices by Xavier, and logits of about unit variance."""
    sizes = dict(vocab_size=500, d_model=128, n_head=4, n_encoder=2, n_decoder=2, d_ff=256, dropout=0.0)
    for choices in EVERY:
        model = Transformer(TransformerConfig(**sizes, **choices))
        for name, p in model.named_parameters():
            if "_positions" in name:
                assert abs(p.square().mean() - sinusoidal_positions(torch.arange(512), 128).square().mean()) < 0.02
            elif "embedding" in name or "lm_head" in name:
                assert abs((p * 128**0.5).var() - 1) < 0.05
            elif p.dim() == 2:
                bound = math.sqrt(6 / sum(p.shape))
                assert p.abs().max() <= bound and abs(p.std() / (bound / 3**0.5) - 1) < 0.05
            else:
                assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        if not choices["tied"]:
            total, count = model.loss(tokens(4, 20, vocab=500), tokens(4, 21, vocab=500, seed=2))
            assert abs(total / count - (math.log(500) + 0.5)) < 0.2  # E[ln sum e^x] of unit normals: ln V + 1/2


# ---- Masks ----


def check_padding_changes_nothing(model, encode_mask=lambda mask: mask):
    source, target, extra = tokens(3, 7), tokens(3, 6), tokens(3, 4, seed=3)
    mask = padded(7, 3, 5)
    with torch.no_grad():
        plain = model(source, target, encode_mask(mask))
        longer = model(torch.cat((source, extra), 1), target, encode_mask(F.pad(mask, (0, 4))))
        other = model(source.where(mask, (source + 1) % 23), target, encode_mask(mask))
        for row, n in enumerate((7, 3, 5)):  # the row alone, without any padding
            alone = model(source[row : row + 1, :n], target[row : row + 1])
            torch.testing.assert_close(alone[0], plain[row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(longer, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choices", EVERY, ids=lambda c: "-".join(map(str, c.values())))
def test_padding_of_the_source_changes_nothing(choices):
    check_padding_changes_nothing(tiny(**choices))


def test_trap_padding_that_is_seen():
    def cross_unmasked(q, k, v, *, causal=False, mask=None, **settings):
        return torch_attention(q, k, v, causal=causal, mask=mask if q.size(2) == k.size(2) else None, **settings)

    with pytest.raises(AssertionError):
        check_padding_changes_nothing(tiny(), lambda mask: None)
    with pytest.raises(AssertionError):  # masked in the encoder, forgotten in the decoder
        check_padding_changes_nothing(tiny(cross_unmasked))


def check_no_gradient_of_padding(model):
    source, mask = tokens(3, 7, vocab=11), padded(7, 3, 5)
    source = source.where(mask, 22)  # a token of the padding alone
    total, count = model.loss(source, tokens(3, 6, vocab=11), mask)
    (total / count).backward()
    grad = model.source_embedding.weight.grad
    assert (grad[22] == 0).all() and (grad[source[mask].unique()].abs().sum(1) > 0).all()


def test_padding_gets_no_gradient():
    check_no_gradient_of_padding(tiny(tied=False))
    with pytest.raises(AssertionError):
        check_no_gradient_of_padding(
            tiny(lambda q, k, v, *, mask=None, **settings: torch_attention(q, k, v, **settings), tied=False)
        )


def naive(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):
    """Equation 1 as it stands: a row with everything masked is 0/0."""
    scores = q @ k.mT / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril(k.size(2) - q.size(2)) == 0, -math.inf)
    return scores.softmax(-1) @ v


def check_fully_masked_source(model):
    source, target, mask = tokens(3, 6), tokens(3, 5), padded(6, 0, 2)
    total, count = model.loss(source, target, mask)
    total.backward()
    assert total.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        a, b = model(source, target, mask), model((source + 1) % 23, target, mask)
    assert torch.equal(a[1], b[1]), "a source with no real token was seen"
    for row, n in ((0, 6), (2, 2)):  # and its neighbours are what they are alone
        alone = model(source[row : row + 1, :n], target[row : row + 1])
        torch.testing.assert_close(alone[0], a[row], rtol=1e-5, atol=1e-5)
    found = greedy(model, source, 5, mask), beam_search(model, source, 5, source_mask=mask)[1]
    assert len(found[0]) == 3 and found[1].isfinite().all()


@pytest.mark.parametrize("choices", EVERY, ids=lambda c: "-".join(map(str, c.values())))
def test_a_source_of_padding_alone_is_not_nan(choices):
    check_fully_masked_source(tiny(**choices))


def test_trap_fully_masked_rows():
    naive_model = tiny(naive)
    check_padding_changes_nothing(naive_model)  # where something is left to see, it is the same
    with pytest.raises(AssertionError):
        check_fully_masked_source(naive_model)


def check_causal(model):
    source, target = tokens(2, 7), tokens(2, 10)
    other = target.clone()
    other[:, 6] = (other[:, 6] + 1) % 23
    with torch.no_grad():
        a, b = model(source, target), model(source, other)
    assert torch.equal(a[:, :6], b[:, :6]), "a token changed what came before it"
    assert ((a - b)[:, 6:].abs().amax(-1) > 1e-5).all(), "a token went unseen by those after it"
    changed = source.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 23
    with torch.no_grad():
        assert ((model(changed, target) - a).abs().amax(-1) > 1e-5).all(), "the last source token went unseen"


def test_the_decoder_is_causal_and_the_encoder_is_not():
    for choices in EVERY:
        check_causal(tiny(**choices))
    with pytest.raises(AssertionError, match="came before"):
        check_causal(tiny(lambda q, k, v, *, causal=False, **settings: torch_attention(q, k, v, **settings)))
    with pytest.raises(AssertionError, match="last source token"):  # everything causal, cross-attention top-left
        check_causal(
            tiny(
                lambda q, k, v, *, causal=False, **settings: F.scaled_dot_product_attention(
                    q, k[:, :, : q.size(2)], v[:, :, : q.size(2)], is_causal=True
                )
            )
        )


def check_dropout(model):
    batch = tokens(2, 7), tokens(2, 6)
    model.eval()
    assert torch.equal(model(*batch), model(*batch)), "evaluated twice, two results"
    model.train()
    assert not torch.equal(model(*batch), model(*batch)), "trained twice, one result"


def test_dropout_in_training_only():
    model = tiny(dropout=0.3)
    check_dropout(model)
    plain = model.eval()(tokens(2, 7), tokens(2, 6))
    model.config.dropout = 0.0
    assert torch.equal(model.train()(tokens(2, 7), tokens(2, 6)), plain)

    def always(q, k, v, *, dropout=0.0, **settings):  # trap 7: functional dropout that never hears of eval()
        return torch_attention(q, k, v, dropout=0.3, **settings)

    with pytest.raises(AssertionError, match="evaluated twice"):
        check_dropout(tiny(always, dropout=0.3))


def test_dropout_is_in_every_place(monkeypatch):
    """x on both sides, each of the 2 * 2 + 3 * 3 sublayers, and the weights of its 2 + 2 * 3 attentions."""
    seen, real = [], F.dropout

    def spy(x, p=0.5, training=True, inplace=False):
        seen.append(p if training else 0.0)
        return real(x, p, training)

    def attention(q, k, v, *, dropout=0.0, **settings):
        seen.append(-dropout)
        return torch_attention(q, k, v, dropout=dropout, **settings)

    monkeypatch.setattr(transformer.F, "dropout", spy)
    tiny(attention, dropout=0.25).train()(tokens(2, 7), tokens(2, 6))
    assert sorted(seen) == [-0.25] * 8 + [0.25] * 15


# ---- The loss ----


def three_tokens():
    """A model that gives 0.2, 0.3, 0.5 whatever it reads: the last norm gives a constant c, and W c = ln p."""
    model = Transformer(TransformerConfig(3, 4, 1, 1, 1, 4, dropout=0.0, norm="pre", tied=False))
    with torch.no_grad():
        model.decoder_norm.weight.zero_()
        model.decoder_norm.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.lm_head.weight[:, 0] = torch.tensor([0.2, 0.3, 0.5]).log()
    return model


def check_three_token_loss(loss):
    source, target = torch.tensor([[2, 2]]), torch.tensor([[0, 1, 2, 1]])
    total, count = loss(three_tokens(), source, target, None)
    assert count == 3 and abs(total - -math.log(0.3 * 0.5 * 0.3)) < 1e-6  # 1 after bos, 2 after that, then 1
    total, count = loss(three_tokens(), source, target, torch.tensor([[0, 1, -100, -100]]))
    assert count == 1 and abs(total - -math.log(0.3)) < 1e-6


def test_three_token_loss_by_hand():
    check_three_token_loss(lambda model, source, target, labels: model.loss(source, target, labels=labels))
    total, count = three_tokens().loss(torch.tensor([[2]]), torch.tensor([[0, 1]]), label_smoothing=0.3)
    assert count == 1 and abs(total - -(0.7 * math.log(0.3) + 0.1 * math.log(0.2 * 0.3 * 0.5))) < 1e-6

    def unshifted(model, source, target, labels):
        labels = target if labels is None else labels
        total = F.cross_entropy(model(source, target).flatten(0, 1), labels.flatten(), reduction="sum")
        return total, (labels != -100).sum()

    def shifted_twice(model, source, target, labels):
        labels = target if labels is None else labels
        return model.loss(source, target, labels=F.pad(labels[:, 1:], (0, 1), value=-100))

    for wrong in (unshifted, shifted_twice):
        with pytest.raises(AssertionError):
            check_three_token_loss(wrong)


def test_outputs_are_what_the_loss_compares():
    for choices in EVERY:
        model, source, target, mask = tiny(**choices), tokens(3, 7), tokens(3, 6), padded(7, 3, 5)
        labels = target.masked_fill(torch.rand(3, 6) < 0.4, -100)
        logits, targets, hidden = model.outputs(source, target, mask, labels)
        assert logits.shape == (15, 23) and targets.dtype == torch.int64
        assert torch.equal(targets.view(3, 5), labels[:, 1:])
        torch.testing.assert_close(logits.view(3, 5, 23), model(source, target[:, :-1], mask))
        torch.testing.assert_close(model.lm_head(hidden), logits[targets != -100])
        for smoothing in (0.0, 0.1):
            total, count = model.loss(source, target, mask, labels, label_smoothing=smoothing)
            logp = logits[targets != -100].double().log_softmax(-1)
            gold = logp.gather(1, targets[targets != -100, None]).sum()
            want = -(1 - smoothing) * gold - smoothing * logp.mean(1).sum()  # smoothed towards the uniform
            assert abs(total - want) < 1e-4 and count == len(logp)
            assert count.dtype == torch.int64 and count.dim() == 0 and total.dtype == torch.float32


def check_nothing_to_count(loss):
    model = tiny()
    for target, labels in ((tokens(2, 9), torch.full((2, 9), -100)), (tokens(2, 1), None)):
        total = loss(model, tokens(2, 5), target, labels)
        total.backward()
        assert total == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_nothing_to_count_is_zero_and_not_nan():
    check_nothing_to_count(lambda model, source, target, labels: model.loss(source, target, labels=labels)[0])
    for smoothing in (0.0, 0.1):
        total, count = tiny().loss(tokens(2, 5), tokens(2, 1), label_smoothing=smoothing)
        assert total == 0 and count == 0

    def mean(model, source, target, labels):
        labels = target if labels is None else labels
        return F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())

    with pytest.raises(AssertionError):
        check_nothing_to_count(mean)


def check_splits(model, batch, parts, accumulate):
    def gradient(split):
        model.zero_grad()
        accumulate(model, list(zip(*(t.split(split) for t in batch), strict=True)))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([len(batch[0])])
    assert (gradient(parts) - whole).norm() <= 1e-12 * whole.norm()


def by_total(model, batches):
    count = sum(model.loss(*batch)[1] for batch in batches)
    for batch in batches:
        (model.loss(*batch, label_smoothing=0.1)[0] / count).backward()


def by_mean_of_means(model, batches):
    for batch in batches:
        total, count = model.loss(*batch, label_smoothing=0.1)
        (total / count.clamp_min(1) / len(batches)).backward()


def uneven_batch(B):
    source, target, mask = tokens(B, 6), tokens(B, 7), padded(*(1 + i % 6 for i in range(B)), 6)[:B]
    labels = target.masked_fill(torch.rand(B, 7) < torch.rand(B, 1), -100)
    labels[0, 1] = target[0, 1]  # one term at least
    return source, target, mask, labels


@settings(max_examples=15)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_gradient_is_the_same_for_every_split(parts, seed):
    torch.manual_seed(seed)
    check_splits(tiny(**EVERY[seed % 4]).double(), uneven_batch(sum(parts)), parts, by_total)


def test_trap_mean_of_means():
    model, batch = tiny().double(), uneven_batch(4)
    batch[3][:2, 3:] = -100
    check_splits(model, batch, [2, 2], by_total)
    with pytest.raises(AssertionError):
        check_splits(model, batch, [2, 2], by_mean_of_means)


# ---- The cache ----


def check_chunks(model, sizes, mask=None):
    """The logits of a target do not depend on the pieces in which it is read."""
    source, target = tokens(2, 7), tokens(2, sum(sizes))
    with torch.no_grad():
        memory, cache = model.encode(source, mask), []
        pieces = [model.decode(piece, memory, mask, cache) for piece in target.split(sizes, dim=1)]
        whole = model.decode(target, memory, mask)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert len(cache) == model.config.n_decoder
    for own, of_memory in cache:
        assert [t.size(1) for t in own] == [sum(sizes)] * 2 and [t.size(1) for t in of_memory] == [7] * 2


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=16).filter(lambda s: sum(s) <= 16),
    st.sampled_from(EVERY),
    st.sampled_from([None, (7, 3), (7, 0)]),
)
def test_cached_chunks_and_the_whole_agree(sizes, choices, lengths):
    torch.manual_seed(0)
    check_chunks(tiny(**choices), sizes, None if lengths is None else padded(*lengths))


class PositionsFromZero(Transformer):
    def _embed(self, ids, side, past=0):  # trap 8: each piece is taken for the beginning
        return super()._embed(ids, side)


def top_left(q, k, v, *, causal=False, mask=None, scale=None, dropout=0.0):  # trap 5: PyTorch's own alignment
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def test_traps_of_the_cache():
    for wrong in (tiny(kind=PositionsFromZero), tiny(top_left)):
        check_chunks(wrong, [12])  # in one piece the two do not show
        with pytest.raises(AssertionError):
            check_chunks(wrong, [8, 4])


def test_keys_and_values_of_the_memory_are_made_once():
    model, seen = tiny(), []
    for block in model.decoder:
        block.cross_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        memory, cache = model.encode(tokens(2, 7)), []
        model.decode(tokens(2, 3), memory, None, cache)
        kept = [t for _, of_memory in cache for t in of_memory]
        for _ in range(4):
            model.decode(tokens(2, 1), memory, None, cache)
    assert seen == [7] * 3 and all(a is b for a, b in zip(kept, (t for _, m in cache for t in m), strict=True))


def test_max_len_is_never_overrun():
    for choices in EVERY:
        model, cache = tiny(**choices), []
        with torch.no_grad():
            memory = model.encode(tokens(1, 16))
            model.decode(tokens(1, 14), memory, None, cache)
            with pytest.raises(ValueError, match="target of shape .1, 3., torch.int64, after 14 cached: wanted"):
                model.decode(tokens(1, 3), memory, None, cache)
            assert model.decode(tokens(1, 2), memory, None, cache).shape == (1, 2, 23)
    model = tiny()
    model.config.max_len = 40  # sinusoids have no end of their own
    assert model(tokens(1, 30), tokens(1, 40)).isfinite().all()


# ---- Greedy and beam search ----

V, L, BOS, EOS = 4, 4, 1, 3


def talker(seed, **changes):
    """A tiny model with opinions: its logits three times as large, in float64, where no two scores are the same."""
    torch.manual_seed(seed)
    sizes = dict(SIZES, vocab_size=V, d_model=8, n_head=2, n_encoder=1, n_decoder=1, d_ff=8, tied=False)
    model = Transformer(TransformerConfig(**{**sizes, "bos_token_id": BOS, "eos_token_id": EOS, **changes})).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model.eval()


def penalty(n, alpha):
    return ((5 + n) / 6) ** alpha


def brute_force(model, source, L, alpha, mask=None):
    """Every sequence of a source (1, S): those that end in eos, and those cut off at L. Best first: (score, ids)."""
    V, eos = model.config.vocab_size, model.config.eos_token_id
    others = [i for i in range(V) if i != eos]
    every = [[*ids, eos] for n in range(L) for ids in itertools.product(others, repeat=n)]
    every += [list(ids) for ids in itertools.product(others, repeat=L)]
    rows = torch.tensor([ids + [0] * (L - len(ids)) for ids in every])  # what follows the end is not counted
    begin = torch.full((len(rows), 1), model.config.bos_token_id)
    with torch.no_grad():
        many = source.expand(len(rows), -1), None if mask is None else mask.expand(len(rows), -1)
        logp = model(many[0], torch.cat((begin, rows[:, :-1]), 1), many[1]).log_softmax(-1)
    logp = logp.gather(2, rows[:, :, None])[:, :, 0]
    scores = [(logp[i, : len(ids)].sum().item() / penalty(len(ids), alpha), ids) for i, ids in enumerate(every)]
    return sorted(scores, reverse=True)


def check_against_brute_force(search, seed, alpha, **changes):
    model, source, mask = talker(seed, **changes), tokens(3, 5, vocab=V, seed=seed), padded(5, 2, 4)
    found, scores = search(model, source, L, (V - 1) ** (L - 1) * V, alpha, mask)
    for row in range(3):
        want, ids = brute_force(model, source[row : row + 1], L, alpha, mask[row : row + 1])[0]
        assert abs(scores[row].item() - want) < 1e-9
        assert found[row] == [i for i in ids if i != EOS]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.6, 1.0, 2.5]) | st.floats(0, 4), st.sampled_from(EVERY[:3]))
def test_beam_as_wide_as_the_space_is_brute_force(seed, alpha, choices):
    check_against_brute_force(beam_search, seed, alpha, **{**choices, "tied": False})


def slow_beam_search(model, source, L, K, alpha, mask=None, *, stop="bound", finish="kept", length="eos", reorder=True):
    """One source at a time, no cache, lists of hypotheses; with the settings at their defaults it is right."""
    eos, found, scores = model.config.eos_token_id, [], []
    for row in range(len(source)):
        src, m = source[row : row + 1], None if mask is None else mask[row : row + 1]
        memory = model.encode(src, m)
        live, best = [(0.0, [model.config.bos_token_id])], (-math.inf, [])
        for n in range(1, L + 1):
            grown = []
            for logp, ids in live:
                row_logp = model.decode(torch.tensor([ids]), memory, m)[0, -1].log_softmax(-1).tolist()
                grown += [(logp + p, [*ids, i]) for i, p in enumerate(row_logp)]
            grown, live = sorted(grown, reverse=True)[:K], []
            for logp, ids in grown:
                size = n if length == "eos" or ids[-1] != eos else n - 1
                if ids[-1] == eos or n == L:
                    best = max(best, (logp / penalty(size, alpha), ids))
                else:
                    live.append((logp, ids))
            if stop == "first" and best[1]:
                break
            if stop == "now":  # a bound by the length so far, which a longer hypothesis may still beat
                live = [h for h in live if h[0] / penalty(n, alpha) > best[0]]
            else:
                live = [h for h in live if h[0] / penalty(L, alpha) > best[0]]
            if not live:
                break
        ids = best[1][1:]
        found.append(ids[:-1] if ids[-1:] == [eos] else ids)
        scores.append(best[0])
    return found, torch.tensor(scores, dtype=torch.float64)


@torch.no_grad()
def test_traps_of_beam_search():
    """What is wrong in each variant shows against brute force on some seed, and nothing of the right one does."""
    seeds = range(25)
    for seed in seeds:
        check_against_brute_force(slow_beam_search, seed, 2.5)
    for wrong in (dict(stop="first"), dict(stop="now"), dict(length="without eos")):

        def search(*args, wrong=wrong):
            return slow_beam_search(*args, **wrong)

        with pytest.raises(AssertionError):
            for seed in seeds:
                check_against_brute_force(search, seed, 2.5)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0, 3), st.integers(1, 9), st.booleans())
def test_a_narrow_beam_is_the_slow_search_without_a_cache(seed, K, alpha, L, masked):
    model, source = talker(seed), tokens(3, 5, vocab=V, seed=seed)
    mask = padded(5, 2, 4) if masked else None
    found, scores = beam_search(model, source, L, K, alpha, mask)
    with torch.no_grad():
        want, want_scores = slow_beam_search(model, source, L, K, alpha, mask)
    assert found == want
    torch.testing.assert_close(scores, want_scores, rtol=1e-9, atol=1e-9)


def test_trap_a_cache_that_does_not_follow_its_rows(monkeypatch):
    """Without the reordering some search goes wrong, so the test above would see it."""
    real = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda t, dim, at: t if t.is_floating_point() else real(t, dim, at)
    )
    wrong = 0
    with torch.no_grad():
        for seed in range(10):
            model, source = talker(seed), tokens(3, 5, vocab=V, seed=seed)
            args = model, source, 8, 4, 0.6
            wrong += beam_search(*args)[0] != slow_beam_search(*args)[0]
    assert wrong


@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0, 3), st.booleans())
def test_a_beam_of_one_is_greedy(seed, L, alpha, masked):
    model, source = talker(seed), tokens(4, 5, vocab=V, seed=seed)
    mask = padded(5, 2, 4, 1) if masked else None
    found, scores = beam_search(model, source, L, 1, alpha, mask)
    assert found == greedy(model, source, L, mask)
    for row, ids in enumerate(found):  # and the scores are the model's own
        whole = torch.tensor([[BOS, *ids, EOS][: L + 1]])
        m = None if mask is None else mask[row : row + 1]
        total, count = model.loss(source[row : row + 1], whole, m)
        assert abs(scores[row] + total / penalty(count.item(), alpha)) < 1e-9


@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans(), st.sampled_from([BOS, EOS]))
def test_greedy_with_the_cache_is_greedy_without(seed, L, masked, bos):
    model, source = talker(seed, n_decoder=2, bos_token_id=bos), tokens(4, 5, vocab=V, seed=seed)
    mask = padded(5, 2, 4, 1) if masked else None
    ids = torch.full((4, 1), bos)
    with torch.no_grad():
        for _ in range(L):
            ids = torch.cat((ids, model(source, ids, mask)[:, -1:].argmax(-1)), dim=1)
    want = [list(itertools.takewhile(lambda i: i != EOS, row)) for row in ids[:, 1:].tolist()]
    assert greedy(model, source, L, mask) == want


def test_searches_do_not_depend_on_the_batch():
    model, source, mask = talker(5), tokens(6, 5, vocab=V), padded(5, 2, 4, 1, 3, 5)
    together, scores = beam_search(model, source, 9, 3, 0.6, mask)
    by_greedy = greedy(model, source, 9, mask)
    for row in range(6):
        one = source[row : row + 1, : mask[row].sum()]
        alone, score = beam_search(model, one, 9, 3, 0.6)
        assert alone[0] == together[row] and abs(score[0] - scores[row]) < 1e-9
        assert greedy(model, one, 9)[0] == by_greedy[row]


def test_the_search_stops_when_nothing_can_win():
    """Where eos is all but sure, one step must do; where it is never likely, the limit."""
    for bias, steps in ((50.0, 1), (-50.0, 7)):
        calls, model = [], talker(0, norm="pre")
        with torch.no_grad():
            model.decoder_norm.weight.zero_()
            model.decoder_norm.bias.copy_(torch.eye(8)[0])
            model.lm_head.weight[:, 0] = torch.tensor([0.0, 0.1, 0.2, bias])
        model.decoder[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert len(beam_search(model, tokens(2, 3, vocab=V), 7)[0][0]) == (0 if steps == 1 else 7)
        assert len(calls) == steps
        calls.clear()
        greedy(model, tokens(2, 3, vocab=V), 7)
        assert len(calls) == steps


def test_bos_and_eos_may_be_one_token():
    model, source = talker(3, bos_token_id=EOS), tokens(3, 5, vocab=V)
    want, ids = brute_force(model, source[:1], L, 0.6)[0]
    found, scores = beam_search(model, source[:1], L, 108, 0.6)
    assert found[0] == [i for i in ids if i != EOS] and abs(scores[0] - want) < 1e-9
    assert greedy(model, source, 5) == beam_search(model, source, 5, beam=1)[0]


def test_searches_give_plain_lists_without_gradient():
    model, source = tiny(), tokens(2, 5)
    found, scores = beam_search(model, source, 6)
    for rows in (found, greedy(model, source, 6)):
        assert all(type(i) is int and i != 2 for row in rows for i in row) and all(len(row) <= 6 for row in rows)
    assert scores.shape == (2,) and scores.dtype == torch.float32 and not scores.requires_grad


def test_no_source_at_all_finds_nothing():
    for source, mask in ((tokens(0, 5), None), (tokens(0, 5), torch.ones(0, 5, dtype=torch.bool))):
        found, scores = beam_search(tiny(), source, 6, beam=3, source_mask=mask)
        assert found == greedy(tiny(), source, 6, mask) == [] and scores.shape == (0,)


def test_a_search_beyond_max_len_is_refused_before_it_begins():
    """The bos is read too, but the last token found is not: max_len tokens can be found, and no more."""
    for choices in EVERY:
        model, source = tiny(**choices), tokens(2, 5)
        model.lm_head.register_forward_hook(lambda m, x, z: z.index_fill(-1, torch.tensor(2), -99.0))  # no eos
        assert [len(row) for row in greedy(model, source, 16) + beam_search(model, source, 16)[0]] == [16] * 4
        calls = []
        model.encoder[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for search in (greedy, beam_search):
            for wrong in (17, -1):
                with pytest.raises(ValueError, match=f"max_new_tokens={wrong}.*wanted.* 0 to 16") as caught:
                    search(model, source, wrong)
                assert "\n" not in str(caught.value) and not calls
    assert greedy(tiny(), tokens(2, 5), 0) == beam_search(tiny(), tokens(2, 5), 0)[0] == [[], []]


def test_it_learns_to_stop_and_to_reverse():
    """End to end: eos counts although it is the padding too, and what was learnt comes out of both searches."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=8, d_model=32, n_head=2, n_encoder=1, n_decoder=1, d_ff=64, bos_token_id=6, eos_token_id=7)
    model = Transformer(TransformerConfig(**sizes, dropout=0.0, norm="pre"))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    pairs = [(a, b) for a in range(6) for b in range(6)]
    words = [list(pair) for pair in pairs] + [[a] for a in range(6)]
    source = torch.tensor([[*w, 7][:2] for w in words])
    mask = torch.tensor([[True, len(w) == 2] for w in words])
    target = torch.tensor([[6, *w[::-1], 7, 7][:4] for w in words])
    labels = target.masked_fill(torch.arange(4) > mask.sum(1, keepdim=True) + 1, -100)
    for _ in range(100):
        total, count = model.loss(source, target, mask, labels)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    model.eval()
    want = [w[::-1] for w in words]
    assert greedy(model, source, 6, mask) == want and beam_search(model, source, 6, source_mask=mask)[0] == want


# ---- Folders ----


@pytest.mark.parametrize("choices", EVERY, ids=lambda c: "-".join(map(str, c.values())))
def test_round_trip_keeps_every_bit_and_a_tied_matrix_once(choices, tmp_path):
    model = tiny(**choices, dropout=0.2)
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "transformer"
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    again = Transformer.from_pretrained(folder)
    assert again.config == model.config and not again.training
    if choices["tied"]:
        assert again.lm_head.weight is again.embedding.weight
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    batch = tokens(2, 7), tokens(2, 6)
    assert torch.equal(again(*batch), model(*batch))
    again.save_pretrained(folder)  # over the old one
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    for a, b in zip(model.parameters(), Transformer.from_pretrained(tmp_path).parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b)


def test_a_failing_write_leaves_the_old_files(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(tensors, path, metadata=None):
        open(path, "wb").write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        tiny(n_decoder=1).save_pretrained(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(transformer.json, "dumps", lambda *args, **settings: half(None, tmp_path / "other"))
    with pytest.raises(OSError, match="No space"):
        tiny(n_decoder=1).save_pretrained(tmp_path)
    (tmp_path / "other").unlink()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def refused(folder, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model_type": "gpt2"}, "config.json: model_type = 'gpt2': wanted 'transformer'"),
        ({"n_head": 5}, "config.json: n_head = 5: wanted a divisor of d_model = 16"),
        ({"n_heads": 4}, "config.json: .*n_heads"),
        ({"n_decoder": 4}, "model.safetensors: .*Missing key.*decoder.3.self_attn.q_proj.weight"),
        ({"n_decoder": 2}, "model.safetensors: .*Unexpected key.*decoder.2.self_attn.q_proj.weight"),
        ({"d_ff": 25}, "model.safetensors: .*size mismatch for encoder.0.fc1.weight"),
        ({"tied": False}, "model.safetensors: .*source_embedding.weight"),
    ],
)
def test_wrong_folders_are_named(tmp_path, changes, pattern):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(tmp_path, pattern)


def test_broken_files_are_named(tmp_path):
    refused(tmp_path / "nowhere", "config.json")
    tiny().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = config.read_text()
    for text in ("", "{", "[1]", "null", '"transformer"'):
        config.write_text(text)
        refused(tmp_path, "config.json")
    config.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:100])
    refused(tmp_path, "model.safetensors")
    weights.unlink()
    refused(tmp_path, "model.safetensors")


def test_saving_an_adapted_or_untied_model_is_refused(tmp_path):
    model = tiny()
    model.encoder[0].self_attn.q_proj.A = nn.Parameter(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="encoder.0.self_attn.q_proj.A: wanted"):
        model.save_pretrained(tmp_path)
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match="lm_head.weight: wanted"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- The rest ----


def test_every_matrix_of_the_blocks_is_a_linear():
    """So that an adapter finds them all by name."""
    model = tiny()
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    held = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.dim() == 2}
    assert held - linear == {"embedding"} and linear - held == {"lm_head"}
    assert isinstance(model.encoder, nn.ModuleList) and isinstance(model.decoder, nn.ModuleList)


def test_attention_gets_what_its_contract_says():
    calls = []

    def spy(q, k, v, **settings):
        calls.append((q.shape, k.shape, v.shape, settings))
        return torch_attention(q, k, v, **settings)

    mask = padded(7, 3)
    tiny(spy, dropout=0.25).train()(tokens(2, 7), tokens(2, 5), mask)
    assert len(calls) == 2 + 2 * 3
    for i, (q, k, v, passed) in enumerate(calls):
        cross, causal = i >= 2 and i % 2 == 1, i >= 2 and i % 2 == 0
        T, S = (7, 7) if i < 2 else (5, 7 if cross else 5)
        assert q == (2, 4, T, 4) and k == v == (2, 4, S, 4)
        assert passed["causal"] == causal and passed["dropout"] == 0.25
        assert passed["mask"] is None if causal else torch.equal(passed["mask"], mask[:, None, None])


def test_bfloat16_autocast_and_weights():
    model, batch = tiny(), (tokens(4, 9), tokens(4, 10), padded(9, 3, 5, 1))
    exact = model.loss(*batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, count = model.loss(*batch)
        assert len(greedy(model, batch[0], 5, batch[2])) == len(beam_search(model, batch[0], 5)[0]) == 4
    assert total.dtype == torch.float32 and abs(total / exact - 1) < 0.02
    (total / count).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    total, _ = model.bfloat16().loss(*batch)
    assert total.dtype == torch.float32 and abs(total / exact - 1) < 0.05
    assert beam_search(model, batch[0], 5)[1].dtype == torch.float32


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"vocab_size": 0}, "vocab_size = 0: wanted a whole number of at least 1"),
        ({"n_decoder": 2.0}, "n_decoder = 2.0: wanted a whole number of at least 1"),
        ({"n_encoder": True}, "n_encoder = True: wanted a whole number of at least 1"),
        ({"n_head": 3}, "n_head = 3: wanted a divisor of d_model = 16"),
        ({"d_model": 15, "n_head": 3}, "d_model = 15: wanted an even number"),
        ({"positions": "rotary"}, "positions = 'rotary': wanted 'sinusoidal' or 'learned'"),
        ({"norm": None}, "norm = None: wanted 'post' or 'pre'"),
        ({"tied": 1}, "tied = 1: wanted True or False"),
        ({"bos_token_id": 23}, "bos_token_id = 23: wanted a token"),
        ({"eos_token_id": -1}, "eos_token_id = -1: wanted a token"),
        ({"eos_token_id": None}, "eos_token_id = None: wanted a token"),
        ({"dropout": 1.0}, "dropout = 1.0: wanted a number from 0"),
        ({"dropout": float("nan")}, "dropout = nan: wanted a number from 0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0: wanted a number above 0"),
    ],
)
def test_config_errors(changes, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        TransformerConfig(**{**SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_odd_sizes_go_with_learned_positions():
    assert tiny(d_model=15, n_head=3, positions="learned")(tokens(1, 3), tokens(1, 2)).shape == (1, 2, 23)


def test_input_errors():
    model, source, target = tiny(), tokens(2, 5), tokens(2, 4)
    for call, pattern in (
        (lambda: model(tokens(2, 17), target), "source of shape (2, 17), torch.int64, after 0 cached: wanted token"),
        (lambda: model(source, tokens(4)), "target of shape (4,), torch.int64, after 0 cached: wanted token ids"),
        (lambda: model(source.float(), target), "source of shape (2, 5), torch.float32, after 0 cached: wanted token"),
        (lambda: model(source, target, torch.ones(2, 5)), "source_mask of shape (2, 5), torch.float32: wanted (2, 5)"),
        (lambda: model(source, target, padded(4, 3)), "source_mask of shape (2, 4), torch.bool: wanted (2, 5)"),
        (lambda: model.loss(source, target, labels=source), "labels of shape (2, 5): wanted that of target, (2, 4)"),
        (lambda: beam_search(model, source, 4, beam=0), "max_new_tokens=4, beam=0, length_penalty=0.6: wanted"),
        (lambda: beam_search(model, source, 4, length_penalty=-1), "beam=4, length_penalty=-1: wanted"),
        (lambda: beam_search(tiny().train(), source, 4), "model.training=True, max_new_tokens=4, beam=4"),
        (lambda: greedy(tiny().train(), source, 4), "model.training=True, max_new_tokens=4: wanted False (model.eval"),
    ):
        with pytest.raises(ValueError, match=re.escape(pattern)) as caught:
            call()
        assert "\n" not in str(caught.value)
