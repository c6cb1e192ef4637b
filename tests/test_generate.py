# SPDX-License-Identifier: MIT
"""Filters against brute force and transformers, decoding against transformers' generate, text cut at every place."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, reject
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers import LlamaConfig as TheirLlamaConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minimal.attention import attention
from minimal.decoder import Decoder
from minimal.generate import (
    StaticCache,
    draw,
    filter_logits,
    generate,
    pad_left,
    penalise_repetition,
    speculate,
    stream,
    stream_text,
)
from minimal.gpt import GPT, GPTConfig
from minimal.llama import Llama, LlamaConfig
from minimal.prefix import add_prefix
from minimal.prompt import add_prompt
from minimal.rnn import RNN, RNNConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Filters ----

temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.7, 5.0])
top_ks = st.one_of(st.none(), st.integers(1, 15))
top_ps = st.one_of(st.none(), st.sampled_from([0.01, 0.2, 0.5, 0.8, 0.95, 0.999, 1.0]))


def draw_logits(V, seed, rows=3):
    """Distinct values, so that which tokens are kept is not a matter of taste."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.linspace(-4, 4, V) + 0.01 * torch.rand(V, generator=g)
    return torch.stack([steps[torch.randperm(V, generator=g)] for _ in range(rows)])


def by_hand(row, temperature, top_k, top_p):
    """Probabilities of one row, in Python's floats, from the definitions; and how near the nucleus came to a tie."""
    order = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
    weights = [math.exp((row[i] - row[order[0]]) / temperature) for i in order]
    probs = [w / math.fsum(weights) for w in weights]
    margin = 1.0
    if top_p is not None and top_p < 1:
        sums = [math.fsum(probs[: n + 1]) for n in range(len(probs))]
        keep = next((n + 1 for n, s in enumerate(sums) if s >= top_p), len(probs))
        margin = min(abs(s - top_p) for s in sums)
        order, weights = order[:keep], weights[:keep]
    p = [0.0] * len(row)
    for i, w in zip(order, weights, strict=True):
        p[i] = w / math.fsum(weights)
    return p, margin


def check_filter(filtering, V, seed, temperature, top_k, top_p):
    logits = draw_logits(V, seed)
    hand = [by_hand(row.tolist(), temperature, top_k, top_p) for row in logits]
    if min(margin for _, margin in hand) < 1e-5:  # float32 and float64 may rightly disagree
        reject()
    got = filtering(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(got.softmax(-1), torch.tensor([p for p, _ in hand]), rtol=1e-5, atol=1e-6)

    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        chain.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        chain.append(TopPLogitsWarper(top_p))
    want = chain(torch.zeros(3, 1, dtype=torch.long), logits)
    assert torch.equal(got > -math.inf, want > -math.inf)
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 12), st.integers(0, 999), temperatures, top_ks, top_ps)
def test_filters_are_those_of_brute_force_and_of_transformers(V, seed, temperature, top_k, top_p):
    check_filter(filter_logits, V, seed, temperature, top_k, top_p)


def nucleus_first(logits, *, temperature, top_k, top_p):
    return filter_logits(filter_logits(logits, temperature=temperature, top_p=top_p), top_k=top_k)


def warm_last(logits, *, temperature, top_k, top_p):
    return filter_logits(logits, top_k=top_k, top_p=top_p) / temperature


def short_of_the_line(logits, *, temperature, top_k, top_p):
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    return (logits / temperature).masked_fill((p.cumsum(-1) > top_p).gather(1, order.argsort()), -math.inf)


@pytest.mark.parametrize("wrong", [nucleus_first, warm_last, short_of_the_line])
def test_wrong_filters_are_rejected(wrong):
    settings = dict(temperature=3.0, top_k=4 if wrong is nucleus_first else 12, top_p=0.6)
    check_filter(filter_logits, 12, 0, **settings)
    with pytest.raises(AssertionError):
        check_filter(wrong, 12, 0, **settings)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_top_k_keeps_k_of_equal_logits_and_some_largest(V, k, seed, dtype):
    """bfloat16 has so few values that equal logits are common."""
    logits = torch.randint(-2, 3, (2, V), generator=torch.Generator().manual_seed(seed)).to(dtype)
    kept = filter_logits(logits, top_k=k) > -math.inf
    assert (kept.sum(-1) == min(k, V)).all()
    for row, keep in zip(logits, kept, strict=True):
        assert row[keep].sort().values.equal(row.sort().values[-min(k, V) :])


def test_nucleus_of_equal_logits_and_of_one_token():
    assert (filter_logits(torch.zeros(1, 10), top_p=0.35) > -math.inf).sum() == 4
    assert (filter_logits(torch.tensor([[0.0, 50.0]]), top_p=1e-6) > -math.inf).tolist() == [[False, True]]
    assert (filter_logits(torch.randn(1, 5000), top_p=1.0) > -math.inf).all()  # not cut by a sum rounded up to 1


def test_extreme_temperatures_and_masked_logits():
    logits = torch.tensor([[3.0, -math.inf, 1.0, 3e38, -3e38], [1e-30, 0.0, 5.0, 4.0, -math.inf]])
    for temperature in (0, 1e-300, 1e-40, 1e-3):
        p = filter_logits(logits, temperature=temperature, top_k=3, top_p=0.9).softmax(-1)
        assert p.tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    p = filter_logits(logits[1:], temperature=1e300).softmax(-1)
    torch.testing.assert_close(p, torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]]))
    assert filter_logits(logits.clone(), temperature=0).argmax(-1).tolist() == logits.argmax(-1).tolist()


@given(st.integers(2, 12), st.integers(0, 999), st.sampled_from([0.5, 1.0, 1.2, 3.0]))
def test_repetition_penalty_is_that_of_transformers(V, seed, penalty):
    logits = draw_logits(V, seed)
    before = logits.clone()
    ids = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(seed))
    got = penalise_repetition(logits, ids, penalty)
    assert torch.equal(logits, before)
    torch.testing.assert_close(got, RepetitionPenaltyLogitsProcessor(float(penalty))(ids, logits.clone()))
    for b in range(3):
        for i in range(V):
            x = before[b, i].item()
            if i in ids[b].tolist():
                x = x / penalty if x > 0 else x * penalty
            assert abs(got[b, i].item() - x) < 1e-5


def check_penalty_discourages(penalise):
    logits, ids = torch.tensor([[-1.0, 2.0, 0.5, -3.0]]), torch.tensor([[0, 1, 1]])
    odds = (penalise(logits, ids, 1.5) - logits)[0]  # how the log-odds against an unseen token moved
    assert (odds[:2] < 0).all() and (odds[2:] == 0).all()


def test_penalty_on_negative_logits():
    check_penalty_discourages(penalise_repetition)
    with pytest.raises(AssertionError):  # the paper's formula as it stands
        check_penalty_discourages(lambda x, ids, theta: x.scatter(1, ids, x.gather(1, ids) / theta))


# ---- Models ----


class Table(nn.Module):
    """A bigram model: logits from the last token alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids, cache=None):
        return self.table[ids]


def small_gpt(context=16, dropout=0.0, vocab=31):
    model = GPT(GPTConfig(vocab_size=vocab, n_positions=context, n_embd=16, n_layer=2, n_head=2, dropout=dropout))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def prompts(*shape, vocab=31, seed=5):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' GPT-2 and ours with its weights."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs, GPT.from_pretrained(folder)


def test_greedy_with_penalty_is_that_of_transformers(pair):
    theirs, ours = pair
    ids = prompts(3, 7)
    for penalty in (1.0, 1.3):
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
        )
        for use_cache in (True, False):
            got = generate(ours, ids, 40, temperature=0, repetition_penalty=penalty, use_cache=use_cache)
            assert torch.equal(got, want)


def test_eos_in_a_batch_is_that_of_transformers(pair):
    theirs, ours = pair
    ids = prompts(4, 7)
    free = generate(ours, ids, 30, temperature=0)[:, 7:]
    for eos in free[:, :12].flatten().unique().tolist():
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=eos,
            pad_token_id=eos,
        )  # fmt: skip
        assert torch.equal(generate(ours, ids, 30, temperature=0, eos_id=eos), want)


def test_sampling_draws_what_transformers_draws(pair, monkeypatch):
    """From one seed the same tokens, where both draw in one way."""
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: draw(p))
    theirs, ours = pair
    ids = prompts(3, 7)
    for settings in (dict(temperature=0.8, top_k=9), dict(temperature=1.4, top_k=20, top_p=0.8), dict(top_p=0.6)):
        torch.manual_seed(11)
        asked = {"top_k": 0, "repetition_penalty": 1.2, **settings}
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=True, **asked)
        torch.manual_seed(11)
        assert torch.equal(generate(ours, ids, 30, repetition_penalty=1.2, **settings), want)


@pytest.mark.parametrize("scale, top_p", [(8.0, 0.9), (1.0, 0.9), (1.0, 0.02), (0.0, 0.5), (1e-3, 0.9999)])
def test_nucleus_of_a_large_vocabulary(scale, top_p):
    """Found among the largest few, or among so many more as it takes."""
    torch.manual_seed(1)
    logits = torch.randn(2, 5000).double().mul(scale).float()
    logits[1, :9] += 20  # one row needs few
    got = filter_logits(logits, top_p=top_p) > -math.inf
    p, order = logits.double().softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p
    near = (before - top_p).abs() < 1e-5  # float32 may rightly disagree, or on which of equal ones
    count, kept = got.sum(-1), (before < top_p).sum(-1)
    assert ((count - kept).abs() <= near.sum(-1)).all()
    least = logits.masked_fill(~got, math.inf).amin(-1)
    assert (logits.masked_fill(got, -math.inf).amax(-1) <= least).all()
    assert scale in (0, 8) or count.max() > 256 or top_p < 0.1


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-53])
@pytest.mark.parametrize("p", [[0, 0, 1, 0], [0, 2, 0, 6, 0], [1e-30, 0, 1e-38], [1, 1e-30, 0]])
def test_no_token_of_chance_0_is_drawn(p, u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.full(size, u, dtype=how["dtype"]))
    p = torch.tensor([p, p[::-1]])
    token = draw(p)
    assert token.shape == (2, 1) and (p.gather(1, token) > 0).all()
    sums = p.double().cumsum(-1)
    assert (sums.gather(1, token) >= (1 - u) * sums[:, -1:]).all()


def test_frequencies_are_the_filtered_probabilities():
    model = Table(draw_logits(8, 3, rows=8))
    settings = dict(temperature=1.5, top_k=6, top_p=0.9)
    n, ids = 40_000, torch.full((1, 1), 2)
    g = torch.Generator().manual_seed(0)
    drawn = next(stream(model, ids.expand(n, 1), 1, generator=g, **settings))
    p = torch.tensor(by_hand(model.table[2].tolist(), **settings)[0])
    count = torch.bincount(drawn, minlength=8)
    assert (count[p == 0] == 0).all()
    kept = p > 0
    chi_squared = ((count - n * p)[kept] ** 2 / (n * p[kept])).sum()
    assert chi_squared < 25  # at most 5 degrees of freedom: exceeded once in 7,000 draws


# ---- The cache and the context ----


def by_the_book(model, ids, n, context):
    """Greedy, all read again at each step, from a window kept by its own count."""
    start = max(0, ids.size(1) - context)
    for _ in range(n):
        if ids.size(1) - start > context:
            start = ids.size(1) - max(1, context // 2)
        with torch.no_grad():
            ids = torch.cat((ids, model(ids[:, start:])[:, -1:].argmax(-1)), dim=1)
    return ids


@given(st.integers(1, 16), st.integers(1, 40), st.integers(0, 50), st.integers(1, 3))
def test_cached_is_uncached_through_full_contexts(context, T, n, B):
    torch.manual_seed(context)
    model, ids = small_gpt(context=context), prompts(B, T)
    want = by_the_book(model, ids, n, context)
    assert torch.equal(generate(model, ids, n, temperature=0), want)
    assert torch.equal(generate(model, ids, n, temperature=0, use_cache=False), want)
    draws = [
        generate(model, ids, n, top_k=5, generator=torch.Generator().manual_seed(1), use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*draws)


def test_how_much_is_read():
    read = []  # (tokens known from the cache, tokens read), call by call

    def model(ids, cache=None):
        read.append((sum(piece.size(1) for piece in cache or ()), ids.size(1)))
        if cache is not None:
            cache.append(ids)
        return F.one_hot((ids + 1) % 9, 9).float()

    ids = generate(model, torch.tensor([[0, 1, 2]]), 10, temperature=0, context=8)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3]]
    # 8 are full: the newer 4 are read again with an empty cache, then one by one
    assert read == [(0, 3), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (0, 4), (4, 1), (5, 1), (6, 1)]
    read.clear()
    generate(model, torch.tensor([[0, 1, 2]]), 10, temperature=0, context=8, use_cache=False)
    assert read == [(0, n) for n in (3, 4, 5, 6, 7, 8, 4, 5, 6, 7)]
    read.clear()
    generate(model, torch.tensor([[0, 1, 2]]), 10, temperature=0)  # no config, no limit
    assert read == [(0, 3)] + [(n, 1) for n in range(3, 12)]


def test_context_is_found_by_either_name():
    seen = []

    def model(ids, cache=None):
        seen.append(ids.size(1))
        return torch.zeros(*ids.shape, 4)

    for config in (SimpleNamespace(n_positions=4), SimpleNamespace(max_position_embeddings=4)):
        model.config = config
        seen.clear()
        generate(model, torch.zeros(1, 9, dtype=torch.long), 2, temperature=0)
        assert seen == [4, 2]


@pytest.mark.parametrize("context", [8, 16])
def test_a_decoder_of_a_shorter_context(context):
    """Its own counts, and neither stream nor speculation runs into its end: as the model with that context."""
    model = small_llama(context=32)
    ids = prompts(1, 5)
    want = generate(model, ids, 40, temperature=0, context=context)
    assert torch.equal(generate(Decoder(model, context=context), ids, 40, temperature=0), want)
    target, draft = Decoder(model, context=context, last=5), Decoder(small_llama(), context=context)
    new = list(speculate(target, draft, ids, context - 5, guesses=4, temperature=0))
    assert torch.equal(torch.cat((ids[0], *new)), want[0, :context])
    with pytest.raises(ValueError, match=f"wanted up to the smaller context, {context}"):
        next(speculate(target, draft, ids, context - 4, guesses=4, temperature=0))


# ---- Prompts of several lengths ----


def small_llama(context=16, vocab=31, **changes):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = Llama(LlamaConfig(vocab, **sizes | changes, num_key_value_heads=2, max_position_embeddings=context))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def uneven(lengths, vocab=31):
    return [prompts(n, vocab=vocab, seed=i).tolist() for i, n in enumerate(lengths)]


def check_rows(batched, model, lengths, n, **settings):
    """Each row of a batch goes on as its prompt does alone."""
    rows = uneven(lengths)
    ids, documents = pad_left(rows, pad_id=3)
    got = batched(model, ids, n, temperature=0, documents=documents, **settings)
    for row, whole in zip(rows, got, strict=True):
        alone = generate(model, torch.tensor([row]), n, temperature=0, **settings)[0]
        assert whole[ids.size(1) - len(row) :].tolist() == alone.tolist()


@pytest.mark.parametrize("small", [small_gpt, small_llama])
@given(st.integers(1, 16), st.lists(st.integers(1, 24), min_size=1, max_size=4), st.integers(0, 40), st.booleans())
@limits(max_examples=25)
def test_rows_of_several_lengths_are_each_alone(small, context, lengths, n, use_cache):
    """Through full contexts, which the rows reach one after the other."""
    torch.manual_seed(context)
    model, rows = small(context).double(), uneven(lengths)
    ids, documents = pad_left(rows)
    got = generate(model, ids, n, temperature=0, documents=documents, use_cache=use_cache)
    assert torch.equal(got[:, : ids.size(1)], ids)
    for row, whole in zip(rows, got, strict=True):
        want = by_the_book(model, torch.tensor([row]), n, context)
        assert torch.equal(whole[ids.size(1) - len(row) :], want[0])


def test_rows_with_eos_and_penalty_are_each_alone():
    torch.manual_seed(0)
    model, rows = small_gpt(64).double(), uneven([2, 9, 5])
    how = dict(temperature=0, repetition_penalty=1.7)
    alone = [generate(model, torch.tensor([row]), 30, **how)[0, len(row) :].tolist() for row in rows]
    ids, documents = pad_left(rows, pad_id=alone[0][0])  # the penalty, if it counted padding, would be on that
    assert alone[0][0] not in rows[0]
    assert generate(model, ids, 30, documents=documents, **how)[:, 9:].tolist() == alone
    for eos in {row[10] for row in alone}:
        got = generate(model, ids, 30, documents=documents, eos_id=eos, **how)[:, 9:].tolist()
        for row, want in zip(got, alone, strict=True):
            want = want[: want.index(eos) + 1] if eos in want else want
            assert row == (want + [eos] * 30)[: len(row)]


@pytest.mark.parametrize("small", [small_gpt, small_llama])
def test_rows_are_drawn_from_the_distributions_of_each_alone(small):
    torch.manual_seed(1)
    model, rows, n = small(16).double(), uneven([3, 12, 20]), 25
    seen, forward = [], model.forward
    model.forward = lambda ids, cache=None, documents=None: seen.append(forward(ids, cache, documents)) or seen[-1]
    ids, documents = pad_left(rows)
    got = generate(model, ids, n, top_k=9, documents=documents)
    model.forward = forward
    drawn = torch.stack([logits[:, -1] for logits in seen], dim=1)  # (B, n, V)
    for i, row in enumerate(rows):
        text, start = got[i, ids.size(1) - len(row) :], max(0, len(row) - 16)
        for j in range(n):
            end = len(row) + j
            start = end - 8 if end - start > 16 else start
            with torch.no_grad():
                torch.testing.assert_close(drawn[i, j], model(text[None, start:end])[0, -1])


def test_padding_itself_is_never_read():
    model, rows = small_gpt(), uneven([4, 11, 7])
    (a, documents), (b, _) = pad_left(rows, 0), pad_left(rows, 30)
    a, b = (generate(model, ids, 20, temperature=0, documents=documents)[:, 11:] for ids in (a, b))
    assert torch.equal(a, b)
    numbered = documents * 5 - torch.tensor([[0], [0], [9]])  # any numbers serve, and the last run of one is the text
    numbered[0, 2] = 5
    assert torch.equal(generate(model, pad_left(rows)[0], 20, temperature=0, documents=numbered)[:, 11:], a)


def test_traps_of_left_padding():
    """Variants that pay no heed to the padding, or to where positions begin, do not pass."""
    torch.manual_seed(0)
    model = small_gpt(64)
    check_rows(generate, model, [3, 10], 12)

    def seen(model, ids, n, documents, **settings):  # padding is read as text
        return generate(model, ids, n, **settings)

    def counted(model, ids, n, documents, **settings):  # masked, but positions begin at the left edge
        def padded(ids, cache, documents):
            positions = torch.arange(documents.size(1))[-ids.size(1) :].expand_as(ids)
            x = model.transformer.wte(ids) + model.transformer.wpe(positions)
            mask = documents[:, None, -ids.size(1) :, None] == documents[:, None, None]
            for layer, block in enumerate(model.transformer.h):
                x = block(x, cache, layer, mask)
            return model.lm_head(model.transformer.ln_f(x))

        return generate(padded, ids, n, documents=documents, **settings)

    for wrong in (seen, counted):
        with pytest.raises(AssertionError):
            check_rows(wrong, model, [3, 10], 12)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_left_padding_is_that_of_transformers(penalty, pair, tmp_path):
    """The mask tells transformers what is padding. Its penalty counts it, so here one of the row's own tokens pads."""
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(3)
    llama = LlamaForCausalLM(TheirLlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)).eval()
    with torch.no_grad():
        for p in llama.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    llama.save_pretrained(tmp_path)
    llama.generation_config.eos_token_id, llama.generation_config.pad_token_id = None, 0
    for theirs, ours in (pair, (llama, Llama.from_pretrained(tmp_path))):
        ids, documents = pad_left(uneven([7, 2, 12, 12, 1]))
        ids = ids.where(documents == 1, ids[:, -1:])
        want = theirs.generate(
            ids, attention_mask=documents, max_new_tokens=40, do_sample=False, repetition_penalty=penalty
        )
        for use_cache in (True, False):
            how = dict(temperature=0, repetition_penalty=penalty, use_cache=use_cache)
            assert torch.equal(generate(ours, ids, 40, documents=documents, **how), want)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT(GPTConfig(31, 16, 32, 2, 2, dropout=0.0), attention),
        lambda: Llama(LlamaConfig(31, 32, 24, 2, 4, 2, max_position_embeddings=16), attention),
    ],
)
def test_rows_under_the_fused_attention_are_each_alone(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    check_rows(generate, model, [2, 9, 13, 20], 20)


def test_rows_beside_a_prefix_are_each_alone():
    model = small_gpt().double()
    add_prefix(model, 3, words=[4, 9])
    check_rows(generate, model.eval(), [2, 9, 13], 20)
    check_rows(generate, model, [2, 9, 13], 20, use_cache=False)


def test_several_lengths_are_refused_where_the_model_cannot_keep_padding_apart():
    ids, documents = pad_left([[1, 2, 3], [4]])
    prompted = small_gpt()
    add_prompt(prompted, 3)
    for model, words in (
        (Table(torch.zeros(9, 9)), r"prompts of \[3, 1\] tokens: wanted one length, as Table takes no documents"),
        (RNN(RNNConfig(vocab_size=9)), "as RNN takes no documents"),
        (Decoder(small_llama()), "as Decoder takes no documents"),
        (prompted, "documents beside a prompt"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            generate(model, ids, 2, documents=documents)
        assert "\n" not in str(caught.value)
    even = generate(Table(torch.randn(9, 9)), ids, 2, documents=torch.ones_like(ids))
    assert even.shape == (2, 5)  # one length after all


def test_what_pad_left_refuses():
    for wrong in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts of .* tokens: wanted one prompt or more, of at least one token"):
            pad_left(wrong)
    ids, documents = pad_left([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and documents.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"documents of shape \(2, 2\): wanted that of ids, \(2, 3\)"):
        generate(small_gpt(), ids, 2, documents=documents[:, 1:])


# ---- The cache with room ----


def read_in_pieces(model, cache, seed):
    """Logits of pieces, the cache now and then cut, its rows taken apart, doubled, or forgotten."""
    g, logits, rows = torch.Generator().manual_seed(seed), [], 2
    for _ in range(30):
        held, step = (cache[0][0].size(2) if cache else 0), int(torch.randint(8, (), generator=g))
        if held and step < 2:
            n = int(torch.randint(held + 1, (), generator=g))
            cache[:] = [(k[:, :, :n], v[:, :, :n]) for k, v in cache]
        elif held and step == 2:
            rows = min(4, 2 * rows)
            cache[:] = [tuple(t[:1].expand(rows, -1, -1, -1) for t in pair) for pair in cache]
        elif held and step == 3:
            cache[:] = [tuple(t.flip(0) for t in pair) for pair in cache]
        elif held and step == 4:
            cache.clear()
        T = int(torch.randint(1, 6, (), generator=g))
        if (cache[0][0].size(2) if cache else 0) + T <= 40:
            with torch.no_grad():
                logits.append(model(torch.randint(31, (rows, T), generator=g), cache).flatten(0, 1))
    return torch.cat(logits)


@pytest.mark.parametrize("small", [small_gpt, small_llama])
@given(st.integers(0, 999), st.integers(1, 50))
@limits(max_examples=20)
def test_a_cache_with_room_is_a_list_whatever_the_caller_does(small, seed, room):
    model = small(40)
    a, b = read_in_pieces(model, [], seed), read_in_pieces(model, StaticCache(room), seed)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_cache_with_room_copies_only_when_it_is_full():
    model, cache, places = small_gpt(64), StaticCache(room=8), []
    with torch.no_grad():
        for i in range(40):
            model(prompts(1, 1, seed=i), cache)
            places.append((cache.buffers[0].data_ptr(), cache.buffers[0].size(3), cache[0][0].size(2)))
    assert [held for *_, held in places] == [*range(1, 41)]
    assert sorted({(size, where) for where, size, _ in places})[0][0] == 8 and len({*places}) == 40
    assert [size for _, size, _ in places] == [8] * 8 + [16] * 8 + [32] * 16 + [64] * 8
    assert cache[1][0].data_ptr() == cache.buffers[1].data_ptr()  # what the model is given are views
    seen, forward = [], model.forward
    model.forward = lambda ids, cache: forward(ids, seen.append(cache) or cache)
    generate(model, prompts(2, 4), 5)
    assert len({*map(id, seen)}) == 1 and seen[0].buffers[1].shape == (2, 2, 2, 9, 8)  # no room for more than can come


# ---- What the caller keeps ----


def check_modes_are_kept(streaming):
    model = small_gpt(dropout=0.5)
    ids = prompts(1, 4)
    want = generate(model, ids, 6, temperature=0)[0, 4:].tolist()
    model.train()
    model.transformer.h[1].eval()  # a mixture, as when a part is frozen
    before = [m.training for m in model.modules()]
    got, modes, grads = [], [], []
    for token in streaming(model, ids, 6, temperature=0):
        got.append(token.item())
        modes.append([m.training for m in model.modules()] == before)
        grads.append(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
    assert got == want, "dropout was on"
    assert all(modes) and [m.training for m in model.modules()] == before, "a mode was not given back"
    assert all(grads), "the caller's code ran without gradients"


def test_modes_and_gradients_are_the_callers():
    check_modes_are_kept(stream)

    def untouched(model, ids, n, temperature):
        for _ in range(n):
            with torch.no_grad():
                ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
            yield ids[0, -1]

    def evaluated(model, ids, n, temperature):
        model.eval()
        yield from untouched(model, ids, n, temperature)
        model.train()

    def without_gradients(model, ids, n, temperature):
        with torch.no_grad():
            yield from stream(model, ids, n, temperature=temperature)

    for wrong, what in ((untouched, "dropout"), (evaluated, "mode"), (without_gradients, "gradients")):
        with pytest.raises(AssertionError, match=what):
            check_modes_are_kept(wrong)


def test_modes_are_kept_when_it_ends_early():
    model = small_gpt(dropout=0.5).train()
    tokens = stream(model, prompts(1, 4), 9)
    next(tokens)
    tokens.close()
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(ValueError, match="logits: the largest of row 0 is nan"):
        generate(model, prompts(1, 4), 3)
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()


def test_generated_tokens_can_be_trained_on():
    model = small_gpt()
    total, count = model.loss(generate(model, prompts(2, 4), 8))
    (total / count).backward()
    assert count == 22

    @torch.inference_mode()
    def inference(model, ids, n):
        return generate(model, ids, n)

    with pytest.raises(RuntimeError, match="[Ii]nference"):
        model.loss(inference(model, prompts(2, 4), 8))[0].backward()


def test_generator_alone_decides():
    model, ids = small_gpt(), prompts(2, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = generate(model, ids, 20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(a, generate(model, ids, 20, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(a, generate(model, ids, 20, generator=torch.Generator().manual_seed(4)))
    before = ids.clone()
    assert generate(model, ids, 0).equal(ids) and ids.equal(before) and a[:, :4].equal(ids)


# ---- Text ----


class Pieces:
    """A tokenizer whose tokens are pieces of bytes; 0 ends a text."""

    eos_id = 0

    def __init__(self, pieces=()):
        self.pieces = [b"", *(bytes([i]) for i in range(256)), *pieces]  # a piece of byte i is i + 1

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def says(sequence, vocab):
    """A model that says these tokens one after the other, whatever it reads, and then the end of text."""
    left = iter([*sequence, *[0] * 9])
    return lambda ids, cache=None: F.one_hot(torch.full(ids.shape, next(left)), vocab).float()


def said(text, cuts, stop=(), n=None, streaming=stream_text, prompt="é"):
    """The pieces of text given out when a model says `text`, its UTF-8 cut at these places."""
    data = text.encode()
    places = [0, *sorted({c for c in cuts if 0 < c < len(data)}), len(data)]
    pieces = [data[a:b] for a, b in zip(places, places[1:], strict=False) if b > a]
    model = says(range(257, 257 + len(pieces)), 257 + len(pieces))
    return list(streaming(model, Pieces(pieces), prompt, len(pieces) + 2 if n is None else n, stop=stop, temperature=0))


def stopped_by_hand(text, stop):
    """The text letter by letter, until it ends in a stop string: that one, the longest of several, is cut away."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


alphabet = st.text(st.sampled_from("abé☕🙂"), max_size=14)
places = st.lists(st.integers(1, 40), max_size=30)
stops = st.lists(st.text(st.sampled_from("abé☕🙂"), min_size=1, max_size=4), max_size=3)


def check_text(text, cuts, stop, streaming=stream_text):
    pieces = said(text, cuts, stop, streaming=streaming)
    assert "".join(pieces) == stopped_by_hand(text, stop)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)


@given(alphabet, places, stops)
def test_text_and_stop_strings_wherever_tokens_are_cut(text, cuts, stop):
    check_text(text, cuts, stop)


def token_by_token(model, tokenizer, prompt, n, *, stop=(), **settings):
    for token in stream(model, torch.tensor([tokenizer.encode(prompt)]), n, eos_id=tokenizer.eos_id, **settings):
        piece = tokenizer.decode(token.tolist())
        if token == 0 or piece in stop:
            return
        yield piece


def no_half_characters(model, tokenizer, prompt, n, *, stop=(), **settings):
    ids, given = [], 0
    for token in stream(model, torch.tensor([tokenizer.encode(prompt)]), n, eos_id=tokenizer.eos_id, **settings):
        ids.append(token.item())
        text = tokenizer.decode(ids).rstrip("\ufffd")
        hit = min((text.find(s) for s in stop if s in text), default=None)
        text = text[:hit]
        if text[given:]:
            yield text[given:]
        given = max(given, len(text))
        if token == 0 or hit is not None:
            return


@pytest.mark.parametrize(
    "wrong, text, cuts, stop",
    [
        (token_by_token, "a🙂", [1, 3], []),  # gives out half a character
        (token_by_token, "abab", [1, 2, 3], ["ba"]),  # sees a stop string in one token only
        (no_half_characters, "abab", [1, 2, 3], ["ba"]),  # gives out "b" before "a" completes "ba"
        (no_half_characters, "xab", [3], ["xab", "a"]),  # one token: another result than letter by letter
    ],
)
def test_wrong_streams_are_rejected(wrong, text, cuts, stop):
    check_text(text, cuts, stop)
    with pytest.raises(AssertionError):
        check_text(text, cuts, stop, wrong)


def test_nothing_is_held_longer_than_needed():
    assert said("hello", range(9)) == list("hello")
    assert said("a🙂b", range(9)) == ["a", "🙂", "b"]
    assert said("aabx", range(9), ["ab!"]) == ["a", "abx"]
    assert said("ab", range(9), ["abc"]) == ["ab"]  # never completed: given out at the end
    assert said("xENDy", range(9), "END") == ["x"]  # a single string is one stop, not three letters
    assert said("a\ufffdb", range(9)) == ["a", "\ufffdb"]  # a real U+FFFD only waits


def test_what_is_left_unfinished_is_dropped():
    for n, want in ((1, "a"), (2, "a"), (4, "a"), (5, "a🙂")):
        assert "".join(said("a🙂b", range(9), n=n)) == want
    broken = Pieces([b"\xf0\x9f", b"\x98"])
    model = says([257, ord("x") + 1, 258, ord("y") + 1], 259)
    assert "".join(stream_text(model, broken, "é", 9, temperature=0)) == "\ufffdx\ufffdy"  # broken for good: said so


def test_the_space_between_prompt_and_text_is_kept():
    class Words:  # as SentencePiece does: a space is part of a word, and the text's first one is dropped
        eos_id, words = 0, ["", " the", " cat", " sat"]

        def encode(self, text):
            return [self.words.index(f" {word}") for word in text.split()]

        def decode(self, ids):
            return "".join(self.words[i] for i in ids).removeprefix(" ")

    assert list(stream_text(says([2, 3], 4), Words(), "the", 5, temperature=0)) == [" cat", " sat"]


def test_the_end_of_text():
    text = list(stream_text(says([98, 0, 99], 257), Pieces(), "a", 9, temperature=0))
    assert text == ["a"]  # not what comes after the end
    on = list(stream_text(says([98, 0, 99], 257), Pieces(), "a", 3, temperature=0, eos_id=None))
    assert on == ["a", "b"]
    seen = []

    def model(ids, cache=None):
        seen.append(ids.tolist())
        return F.one_hot(torch.full(ids.shape, 98), 257).float()

    assert list(stream_text(model, Pieces(), "", 1, temperature=0)) == ["a"] and seen == [[[0]]]


def test_text_of_a_gpt_is_the_text_of_its_tokens():
    model, tokenizer = small_gpt(context=16, vocab=257), Pieces()
    settings = dict(temperature=1.3, top_k=50)
    pieces = list(stream_text(model, tokenizer, "aé", 60, generator=torch.Generator().manual_seed(2), **settings))
    ids = torch.tensor([tokenizer.encode("aé")])
    ids = generate(model, ids, 60, eos_id=0, generator=torch.Generator().manual_seed(2), **settings)
    assert "".join(pieces) == tokenizer.decode(ids[0, 3:].tolist()).rstrip("\ufffd") and len(pieces) > 5


# ---- Errors ----


@pytest.mark.parametrize(
    "settings, pattern",
    [
        (dict(temperature=-0.1), "temperature = -0.1: wanted 0 .greedy. or more"),
        (dict(temperature=math.nan), "temperature = nan: wanted"),
        (dict(temperature=math.inf), "temperature = inf: wanted"),
        (dict(top_k=0), "top_k = 0: wanted a whole number of at least 1"),
        (dict(top_k=2.0), "top_k = 2.0: wanted a whole number"),
        (dict(top_k=True), "top_k = True: wanted a whole number"),
        (dict(top_p=0.0), "top_p = 0.0: wanted a number above 0"),
        (dict(top_p=1.01), "top_p = 1.01: wanted a number above 0"),
        (dict(top_p=math.nan), "top_p = nan: wanted a number above 0"),
        (dict(repetition_penalty=0), "repetition_penalty = 0: wanted a number above 0"),
        (dict(repetition_penalty=math.nan), "repetition_penalty = nan: wanted a number above 0"),
        (dict(context=0), "context = 0: wanted 1 or more"),
        (dict(max_new_tokens=-1), "max_new_tokens = -1: wanted 0 or more"),
        (dict(ids=torch.zeros(3, dtype=torch.long)), r"ids of shape \(3,\), torch.int64: wanted token ids"),
        (dict(ids=torch.zeros(1, 0, dtype=torch.long)), r"ids of shape \(1, 0\), torch.int64: wanted token ids"),
        (dict(ids=torch.zeros(1, 2)), r"ids of shape \(1, 2\), torch.float32: wanted token ids"),
    ],
)
def test_settings_errors(settings, pattern):
    settings = {"ids": prompts(1, 3, vocab=8), "max_new_tokens": 2, **settings}
    with pytest.raises(ValueError, match=pattern) as caught:
        generate(Table(draw_logits(8, 0, rows=8)), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value, said", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_logits_that_are_no_numbers(value, said):
    table = torch.zeros(4, 4)
    table[2] = value if value == -math.inf else torch.tensor([0, value, 1, 2])
    for settings in ({}, {"temperature": 0}, {"top_k": 2}):
        with pytest.raises(ValueError, match=f"logits: the largest of row 1 is {said}, wanted a finite one") as caught:
            generate(Table(table), torch.tensor([[1], [2]]), 3, **settings)
        assert "\n" not in str(caught.value)


def test_text_errors():
    with pytest.raises(ValueError, match="stop = .'a', ''.: wanted no empty string"):
        list(stream_text(Table(torch.zeros(9, 9)), Pieces(), "a", 3, stop=["a", ""]))
    with pytest.raises(ValueError, match="prompt = '': wanted some text"):
        list(stream_text(Table(torch.zeros(9, 9)), Pieces(), "", 3, eos_id=None))


def test_a_prefix_leaves_less_of_the_context():
    """position_offset places are taken: the window that is read stays so much shorter, with a cache and without."""
    model = GPT(GPTConfig(50, 16, 16, 1, 2, dropout=0.0)).eval()
    model.position_offset, ids = 4, torch.arange(10)[None]
    a, b = (generate(model, ids, 20, temperature=0, use_cache=use_cache) for use_cache in (True, False))
    assert a.shape == (1, 30) and torch.equal(a, b)


# ---- Speculative decoding ----


class Counting:
    """A bigram model with a cache that can be cut; counts its calls."""

    def __init__(self, logits):
        self.logits, self.calls = logits, 0

    def __call__(self, ids, cache):
        self.calls += 1
        held = cache[0][0].size(2) if cache else 0
        new = torch.zeros(1, 1, held + ids.size(1), 1)
        cache[:] = [(new, new)]
        return self.logits[ids]


def small(seed, **sizes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(dict(vocab_size=11, n_positions=40, n_embd=16, n_layer=2, n_head=2, dropout=0.0) | sizes)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # so that it has opinions
    return model.double()


@given(seed=st.integers(0, 50), guesses=st.integers(1, 6), new=st.integers(0, 20), prompt=st.integers(1, 5))
@limits(max_examples=30, deadline=None)
def test_greedy_speculation_is_greedy_decoding(seed, guesses, new, prompt):
    model, draft = small(seed), small(seed % 3, n_embd=8, n_layer=1)  # sometimes alike in nothing
    ids = torch.randint(0, 11, (1, prompt))
    wanted = generate(model, ids, new, temperature=0)
    found = torch.cat([ids[0], *speculate(model, draft, ids, new, guesses=guesses, temperature=0)])
    assert torch.equal(found[None], wanted)


def test_a_draft_that_is_the_model_saves_calls():
    logits = torch.randn(7, 7)
    model, draft = Counting(logits), Counting(logits)
    tokens = [*speculate(model, draft, torch.tensor([[3]]), 20, guesses=4)]
    assert len(tokens) == 20 and model.calls == 4 and draft.calls == 16  # five tokens a call


@pytest.mark.parametrize("chosen", [{}, {"temperature": 1.5, "top_p": 0.9}, {"top_k": 2}])
def test_speculated_tokens_are_distributed_as_the_models(chosen):
    """All texts of three tokens: how often each comes, against its probability by the chain rule (chi-squared)."""
    torch.manual_seed(2)
    V, n = 4, 4000
    model, draft = Counting(torch.randn(V, V)), Counting(torch.randn(V, V))
    p = filter_logits(model.logits, **chosen).softmax(-1)  # (V, V)
    start, counts = torch.tensor([[1]]), torch.zeros(V, V, V)
    for _ in range(n):
        a, b, c = torch.cat([*speculate(model, draft, start, 3, guesses=2, **chosen)])
        counts[a, b, c] += 1
    expected = n * p[1][:, None, None] * p[:, :, None] * p[None]
    assert counts[expected == 0].sum() == 0
    usual = expected > 5
    chi2 = ((counts - expected)[usual] ** 2 / expected[usual]).sum()
    freedom = int(usual.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)
    wrong = n * p[1][:, None, None] * p[:, :, None] * filter_logits(draft.logits, **chosen).softmax(-1)[None]
    usual = wrong > 5  # the test can tell: the draft's last token would not pass
    assert ((counts - wrong)[usual] ** 2 / wrong[usual]).sum() > freedom + 5 * math.sqrt(2 * freedom)


def small_decoder(seed, last=1, **sizes):
    torch.manual_seed(seed)
    model = small_llama(40, vocab=11, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model, Decoder(model, last=last)


@given(seed=st.integers(0, 50), guesses=st.integers(1, 6), new=st.integers(0, 20), prompt=st.integers(1, 5))
@limits(max_examples=20)
def test_greedy_speculation_with_a_decoder(seed, guesses, new, prompt):
    """As the model, as the draft, and as both."""
    ids = torch.randint(0, 11, (1, prompt))
    model, decoder = small_decoder(seed, guesses + 1)
    other, draft = small_decoder(seed % 3, num_hidden_layers=1)
    wanted = generate(model, ids, new, temperature=0)
    for p, q in ((decoder, draft), (decoder, other), (model, draft), (decoder, decoder)):
        found = torch.cat([ids[0], *speculate(p, q, ids, new, guesses=guesses, temperature=0)])
        assert torch.equal(found[None], wanted)


def test_a_decoder_with_a_decoder_as_draft_draws_what_the_models_draw():
    """From one generator the same tokens as the Llamas that they are made of."""
    ids = torch.tensor([[1, 2, 3]])
    model, decoder = small_decoder(0, 5)
    other, draft = small_decoder(1, num_hidden_layers=1)
    for how in ({}, {"temperature": 1.5, "top_p": 0.9}):
        a, b = (
            torch.cat([*speculate(p, q, ids, 30, generator=torch.Generator().manual_seed(4), **how)])
            for p, q in ((model, other), (decoder, draft))
        )
        assert torch.equal(a, b)


def test_a_decoder_that_gives_too_few_logits_is_refused():
    model, decoder = small_decoder(0, 4)
    with pytest.raises(ValueError, match="the model gives logits of 4 positions: wanted 5 .last of a Decoder."):
        [*speculate(decoder, model, torch.tensor([[1, 2, 3]]), 9, guesses=4)]


def test_speculation_ends_at_eos_and_leaves_the_models_as_they_were():
    model, draft = small(0).train(), small(1).eval()
    ids = torch.tensor([[1, 2]])
    free = torch.cat([*speculate(model, draft, ids, 12, temperature=0)])
    eos = int(free[4])
    ended = torch.cat([*speculate(model, draft, ids, 12, temperature=0, eos_id=eos)])
    assert torch.equal(ended, free[: free.tolist().index(eos) + 1])
    assert model.training and not draft.training


@pytest.mark.parametrize("change, words", [
    (dict(ids=torch.ones(2, 3, dtype=torch.long)), "wanted token ids"),
    (dict(ids=torch.ones(1, 0, dtype=torch.long)), "wanted token ids"),
    (dict(guesses=0), "guesses = 0"),
    (dict(max_new_tokens=-1), "max_new_tokens = -1"),
    (dict(max_new_tokens=39), "the smaller context, 40"),
    (dict(temperature=-1), "temperature"),
])  # fmt: skip
def test_speculation_refuses(change, words):
    arguments = dict(ids=torch.ones(1, 2, dtype=torch.long), max_new_tokens=3) | change
    with pytest.raises(ValueError, match=words):
        [*speculate(small(0), small(1), **arguments)]
