# SPDX-License-Identifier: MIT
"""Labels by likelihood: the oracle reads prompt and label whole, one label at a time, in float64, with no cache."""

import collections
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from transformers import AutoModelForCausalLM

from minimal.chat import ChatML
from minimal.gpt import GPT, GPTConfig
from minimal.likelihood import (
    NO_CONTENT,
    NORMALISE,
    choose_examples,
    classify,
    few_shot_messages,
    few_shot_prompt,
    label_scores,
)
from minimal.tokenizer import Tokenizer

LABELS = ("good", "bad", "so so")
INSTRUCTION = "Label the text as one of: good, bad, so so."
CORPUS = [f"{INSTRUCTION}\n\nText: a fine meal\nLabel: good\n\n", "user system assistant"] * 9


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These sizes are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 330, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def perturbed(vocab_size, n_positions=256):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, n_positions, n_embd=16, n_layer=2, n_head=2, dropout=0.0)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return perturbed(tokenizer.vocab_size)


@torch.no_grad()
def brute(model, prompt, label):
    """ln p(label | prompt), token by token."""
    total = 0.0
    for n, token in enumerate(label):
        total += model(torch.tensor([[*prompt, *label[:n]]]))[0, -1].log_softmax(-1)[token].item()
    return total


def near(scores, wanted):
    return torch.allclose(scores.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def fault(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert re.search(".*".join(map(re.escape, parts)), message), message


ids = st.integers(0, 299)
prompts = st.lists(ids, min_size=1, max_size=9)


# ---- scores --------------------------------------------------------------------------------------------------------


@hypothesis.given(prompts, st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=4))
def test_scores_are_those_of_each_label_alone(model, prompt, labels):
    scores = label_scores(model, prompt, labels)
    assert scores.shape == (len(labels),) and scores.dtype == torch.float64
    assert near(scores, [brute(model, prompt, label) for label in labels])


@hypothesis.given(st.lists(st.tuples(prompts, st.integers(0, 9)), min_size=2, max_size=5))
def test_what_prompts_share_is_read_once(model, parts):
    """Each prompt begins with a part of the one before: the same scores, from no more tokens than are new."""
    labels, state, before = [[3, 4], [5]], {}, []
    read = []

    def spy(x, cache=None):
        read.append(x.numel())
        return model(x, cache)

    for new, kept in parts:
        prompt = before[:kept] + new
        read.clear()
        assert near(label_scores(spy, prompt, labels, state), [brute(model, prompt, label) for label in labels])
        pairs = zip(before[:-1], prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        assert sum(read) == len(prompt) - 1 - shared + 4  # the labels' batch: 2 rows of 2, with the prompt's last token
        before = prompt


def test_scores_of_transformers(tmp_path):
    """Its loss is a mean over the labels that are not -100."""
    ours = perturbed(61, 32).float()
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt, labels = [5, 9, 2, 44], [[7], [1, 2, 3], [8, 8]]
    scores = label_scores(ours, prompt, labels)
    assert scores.dtype == torch.float32
    for label, score in zip(labels, scores, strict=True):
        row = torch.tensor([[*prompt, *label]])
        loss = theirs(row, labels=torch.where(torch.arange(row.size(1)) < len(prompt), -100, row)).loss
        assert abs(score + loss * len(label)) < 1e-3


def test_dropout_is_off_and_the_mode_is_left(model):
    wanted = label_scores(model, [1, 2], [[3], [4]])
    model.config.dropout = 0.5
    model.train()
    model.transformer.h[0].eval()
    try:
        assert torch.equal(label_scores(model, [1, 2], [[3], [4]]), wanted)
        assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training
        assert not torch.equal(model(torch.tensor([[1, 2]])), model(torch.tensor([[1, 2]])))  # the variant: dropout on
    finally:
        model.config.dropout = 0.0
        model.eval()


def test_faults_of_scores(model):
    fault(lambda: label_scores(model, [], [[1]]), "0 ids of a prompt, 1 labels")
    fault(lambda: label_scores(model, [1], []), "1 ids of a prompt, 0 labels")
    fault(lambda: label_scores(model, [1], [[1], []]), "2 labels: wanted at least 1, none empty")
    fault(lambda: label_scores(lambda x, cache: torch.full((*x.shape, 9), torch.nan), [1], [[1]]), "NaN")


# ---- examples and prompts ------------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 5))
def test_examples_are_balanced_and_drawn_by_the_seed(names, shots, seed):
    rows = [{"text": f"text {i}", "label": name} for i, name in enumerate(names)]
    if shots > len(rows):
        fault(lambda: choose_examples(rows, shots, seed), f"shots = {shots}: wanted 0 to {len(rows)}")
        return
    chosen = choose_examples(rows, shots, seed)
    assert chosen == choose_examples(rows, shots, seed) and len(chosen) == shots
    assert len({row["text"] for row in chosen}) == shots and all(row in rows for row in chosen)
    there, taken = collections.Counter(names), collections.Counter(row["label"] for row in chosen)
    most = max(taken.values(), default=0)
    assert all(taken[name] >= min(there[name], most - 1) for name in there)  # fewer only where there are no more


def test_draws_differ_and_no_label_stands_last_always():
    rows = [{"text": str(i), "label": "ab"[i % 2]} for i in range(40)]
    draws = [choose_examples(rows, 6, seed) for seed in range(20)]
    assert len({tuple(r["text"] for r in draw) for draw in draws}) > 15
    assert {draw[-1]["label"] for draw in draws} == {"a", "b"}


def test_prompts():
    rows = [{"text": "cold soup", "label": "bad"}]
    assert few_shot_prompt(rows, "fine", "Do.") == "Do.\n\nText: cold soup\nLabel: bad\n\nText: fine\nLabel:"
    assert few_shot_prompt([], "fine") == "Text: fine\nLabel:"
    assert few_shot_messages(rows, "fine", "Do.") == [
        {"role": "user", "content": "Do.\n\ncold soup"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "Do.\n\nfine"},
    ]
    assert few_shot_messages([], "fine") == [{"role": "user", "content": "fine"}]


# ---- classify ------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"{w} meal", "label": LABELS[i % 3]} for i, w in enumerate("fine cold meh kind old oh".split())]
TEXTS = ["a fine meal", "cold soup", "é\n\n東京", "oh"]


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("turns", [False, True])
def test_classify_by_brute_force(model, tokenizer, normalise, shots, turns):
    chat = ChatML(tokenizer, system="Be brief.") if turns else None
    result = classify(model, tokenizer, TEXTS, LABELS, ROWS, shots, seed=4, chat=chat, normalise=normalise)
    chosen = choose_examples(ROWS, shots, 4)

    def ids(text):
        if turns:
            return chat.prompt(few_shot_messages(chosen, text, INSTRUCTION))
        return tokenizer.encode(few_shot_prompt(chosen, text, INSTRUCTION))

    bare = chat.prompt([]) if turns else tokenizer.encode("Label:")
    wanted = []
    for text in TEXTS:
        wanted.append([])
        for label in LABELS:
            y = tokenizer.encode(label if turns else f" {label}")
            score = brute(model, ids(text), y)
            if normalise == "mean":
                score /= len(y)
            elif normalise == "unconditional":
                score -= brute(model, bare, y)
            elif normalise == "calibrated":
                score -= brute(model, ids(NO_CONTENT), y)
            wanted[-1].append(score)
    assert near(result.scores, wanted)
    assert result.labels == [LABELS[max(range(3), key=row.__getitem__)] for row in wanted]
    assert result.fewer_examples == result.shortened == 0


def test_a_prompt_joins_its_label_as_the_text_would(tokenizer):
    """The label's ids behind the prompt's are those of the whole text: no space is left over."""
    for label in LABELS:
        whole = tokenizer.encode(few_shot_prompt(ROWS[:2], "fine", "Do.") + f" {label}")
        assert whole == tokenizer.encode(few_shot_prompt(ROWS[:2], "fine", "Do.")) + tokenizer.encode(f" {label}")


@pytest.mark.parametrize("turns", [False, True])
def test_labels_that_begin_others(model, tokenizer, turns):
    """ "1" and "10": whatever the model, p("1") >= p("10"), unless the end counts too."""
    chat = ChatML(tokenizer) if turns else None
    labels = ("1", "10")
    result = classify(model, tokenizer, TEXTS, labels, chat=chat, instruction="Do.")
    for text, scores in zip(TEXTS, result.scores, strict=True):
        prompt = few_shot_messages([], text, "Do.") if turns else few_shot_prompt([], text, "Do.")
        prompt = chat.prompt(prompt) if turns else tokenizer.encode(prompt)
        y = [tokenizer.encode(label if turns else f" {label}") for label in labels]
        assert y[1][: len(y[0])] == y[0]
        assert label_scores(model, prompt, y).argmax() == 0  # the variant that cannot answer "10"
        end = [chat.end] if turns else tokenizer.encode("\n")
        assert near(scores, [brute(model, prompt, [*label, *end]) for label in y])


def test_calibration_takes_a_bias_away(tokenizer):
    """A model that sees the right label but likes "good" in any case."""
    good, bad = (tokenizer.encode(f" {label}")[0] for label in ("good", "bad"))
    cold = tokenizer.encode("cold")

    def biased(x, cache=None):
        seen = torch.cat((cache[0][0][:, 0, :, 0], x), dim=1) if cache else x
        cache[:] = [(seen[:, None, :, None], seen[:, None, :, None])]
        logits = torch.zeros(*x.shape, tokenizer.vocab_size)
        logits[:, :, good] = 5.0
        for b, row in enumerate(seen.tolist()):
            logits[b, :, bad] = 2.0 * any(row[i : i + len(cold)] == cold for i in range(len(row)))
        return logits

    texts, labels = ["cold", "fine"], ("good", "bad")
    assert classify(biased, tokenizer, texts, labels).labels == ["good", "good"]
    assert classify(biased, tokenizer, texts, labels, normalise="calibrated").labels == ["bad", "good"]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("normalise", ["sum", "calibrated"])
def test_a_prompt_beyond_the_context_drops_examples_from_the_left(model, tokenizer, turns, normalise):
    chat = ChatML(tokenizer) if turns else None
    chosen = choose_examples(ROWS, 6, 0)

    def ids(k, text):
        if turns:
            return chat.prompt(few_shot_messages(chosen[len(chosen) - k :], text, INSTRUCTION))
        return tokenizer.encode(few_shot_prompt(chosen[len(chosen) - k :], text, INSTRUCTION))

    y = [tokenizer.encode(label if turns else f" {label}") for label in LABELS]
    n = max(map(len, y))
    texts = ["oh", "a fine meal " * 6, "cold " * 400]
    context = len(ids(4, texts[0])) + n - 1  # four examples fit exactly, five do not
    result = classify(model, tokenizer, texts, LABELS, ROWS, 6, chat=chat, context=context, normalise=normalise)
    assert (result.fewer_examples, result.shortened) == (3, 1)
    read = []

    def spy(x, cache=None):
        read.append(x.size(1) + (cache[0][0].size(2) if cache else 0))
        return model(x, cache)

    classify(spy, tokenizer, texts, LABELS, ROWS, 6, chat=chat, context=context, normalise=normalise)
    assert max(read) == context  # all of it is used, and no more

    def fits(k, text):
        return len(ids(k, text)) + n - 1 <= context

    pieces = tokenizer.encode(texts[2])
    longest = next(m for m in range(len(pieces), 0, -1) if fits(0, tokenizer.decode(pieces[:m])))
    prompts = [(4, texts[0]), (next(k for k in (4, 3, 2, 1, 0) if fits(k, texts[1])), texts[1])]
    prompts.append((0, tokenizer.decode(pieces[:longest])))
    for (k, text), scores in zip(prompts, result.scores, strict=True):
        wanted = [brute(model, ids(k, text), label) for label in y]
        if normalise == "calibrated":
            j = next(j for j in range(k, -1, -1) if fits(j, NO_CONTENT))
            wanted = [a - brute(model, ids(j, NO_CONTENT), label) for a, label in zip(wanted, y, strict=True)]
        assert near(scores, wanted)
    assert classify(model, tokenizer, ["oh"], LABELS, ROWS, 6, chat=chat, context=context + 999).fewer_examples == 0


def test_the_context_is_the_models(tokenizer):
    """n_positions less what a prefix takes."""
    small = perturbed(tokenizer.vocab_size, n_positions=60)
    text = "cold " * 100
    assert classify(small, tokenizer, [text], LABELS).shortened == 1
    small.position_offset = 20
    assert classify(small, tokenizer, [text], LABELS).shortened == 1
    small.position_offset = 55
    fault(lambda: classify(small, tokenizer, [text], LABELS), "context = 5: the prompt without a text has")


def test_faults_of_classify(model, tokenizer):
    def call(labels=LABELS, **more):
        return lambda: classify(model, tokenizer, TEXTS, labels, ROWS, **more)

    fault(call(("good",)), "labels = ['good']: wanted two at least, all different, none empty")
    fault(call(("good", "good")), "all different")
    fault(call(("good", " ")), "none empty")
    fault(call(normalise="pmi"), "normalise = 'pmi': wanted sum, mean, unconditional, calibrated")
    fault(call(shots=7), "shots = 7: wanted 0 to 6")
    result = classify(model, tokenizer, [], LABELS)
    assert result.labels == [] and result.scores.shape == (0, 3)
    assert classify(model, tokenizer, ["oh"], (0, 1)).labels[0] in ("0", "1")
