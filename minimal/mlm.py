# SPDX-License-Identifier: MIT
"""What BERT learns from: text with some tokens hidden, and pairs of passages of which the second may not follow.

Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2018,
arXiv 1810.04805), section 3.1 and appendices A.1 and A.2:

    masked language model    each token is chosen with probability r = 0.15; of the chosen, 80 % become [MASK], 10 % a
                             random token, 10 % stay; the model is asked for the original of every chosen token
    next sentence            [CLS] A [SEP] B [SEP]; in half of the pairs B follows A (label 0), in half it is random (1)
    segments                         0 0 0 0     1 1 1

A chosen token that stays, or that became another, is there so that the model trusts none: it will see no [MASK] later.

Departures:
- The least of a row's random numbers is chosen even if it is above r, so that each row with an ordinary token has one
  to predict: of n ordinary tokens, r n + (1 - r)^n are chosen on average. (The authors choose r n, rounded, but 1 at
  least, and 20 at most.)
- A random B comes from another document, always (the authors draw up to ten times, then take what they have). Where its
  first sentence is by chance the one that truly follows, the true B is taken, and labelled so. It has as many sentences
  as the true B would have, if its document has them, so that the length does not tell the two apart.
- What does not fit is cut from the longer passage as in the paper, at A's beginning and B's end (theirs: either end at
  random), so that where B follows A, it does so without a gap.
- In a document of one sentence nothing follows: its B is always random. The sentence is not halved, as a B that begins
  in its middle would show that it is true. A corpus of nothing but such documents can teach no next sentence.

    a, b, is_random = sentence_pair(documents, index, length=128, generator=g)
    ids, segments, special = join_pair(a, b, cls_id=2, sep_id=3)
    ids, labels = mask_tokens(ids, special, vocab_size=30522, mask_id=4, ordinary=999, generator=g)

Shape letters: B rows, T tokens, n ordinary tokens of a row.
"""

import torch
from torch import Tensor


def mask_tokens(ids, special, vocab_size, mask_id, rate=0.15, ordinary=0, generator=None):
    """(masked ids, labels), int64, of the shape of ids (..., T): labels hold the original of the chosen, else -100.

    special: bool, the shape of ids, True where nothing is ever chosen: [CLS], [SEP], padding.
    rate: the probability r of each token. ordinary: what random tokens are drawn from, an int64 tensor of ids or the
    first of those up to vocab_size, from which mask_id is left out. generator: on the device of ids.
    ValueError: shapes or dtypes that differ, a rate outside (0, 1], mask_id or ordinary outside the vocabulary.
    """
    if ids.dtype != torch.int64 or special.dtype != torch.bool or ids.shape != special.shape or not ids.numel():
        what = f"ids {ids.dtype} {tuple(ids.shape)}, special {special.dtype} {tuple(special.shape)}"
        raise ValueError(f"{what}: wanted int64 and bool of one shape, not empty")
    if not 0 < rate <= 1:
        raise ValueError(f"rate = {rate}: wanted a probability above 0")
    if not isinstance(ordinary, Tensor):
        ordinary = torch.arange(ordinary, vocab_size, device=ids.device) if 0 <= ordinary < vocab_size else ids[:0]
        ordinary = ordinary[ordinary != mask_id]
    if not 0 <= mask_id < vocab_size or not ordinary.numel() or ordinary.min() < 0 or ordinary.max() >= vocab_size:
        some = ordinary.tolist()[:3]
        raise ValueError(f"mask_id = {mask_id}, ordinary = {some} and so on: wanted ids from 0 to {vocab_size - 1}")
    choice, use = torch.rand((2, *ids.shape), generator=generator, device=ids.device)  # (..., T) each
    choice = choice.masked_fill(special, 2.0)
    chosen = (choice < rate) | (choice == choice.amin(-1, keepdim=True)) & ~special  # (..., T)
    other = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator, device=ids.device)]  # (..., T)
    masked = torch.where(chosen & (use < 0.8), mask_id, ids)
    masked = torch.where(chosen & (use >= 0.9), other, masked)  # from 0.8 to 0.9 the token stays
    return masked, ids.masked_fill(~chosen, -100)


def sentence_pair(documents, index, length, generator=None):
    """Passages A of documents[index] and B as int64 tensors (n_a,) and (n_b,), and whether B is random (bool).

    documents: a sequence of documents, each a sequence of sentences, each a list or 1-D tensor of ids. length: tokens
    of the joined pair, so that n_a + n_b <= length - 3. A begins at a sentence that the generator draws, and ends with
    one: an epoch of all indices visits each document once. B is random in half of the cases: label 1.
    ValueError: fewer than two documents, no such document or one without tokens, length < 5.
    """
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents: wanted two at least, as a random B comes from another one")
    if not 0 <= index < len(documents) or length < 5:
        raise ValueError(f"index = {index}, length = {length}: wanted below {len(documents)}, and 5 tokens at least")

    def draw(n):
        return int(torch.randint(max(n, 1), (), generator=generator))

    other = draw(len(documents) - 1)
    other += other >= index  # any but this one
    document, source, room = documents[index], documents[other], length - 3
    if not len(document) or not len(source):
        raise ValueError(f"documents[{index}] or documents[{other}] is empty: wanted a sentence in each")
    start = draw(len(document) - 1)  # not the last sentence, unless it is the only one
    stop, tokens = start, 0
    while stop < len(document) and (tokens < room or stop < start + 2):
        stop, tokens = stop + 1, tokens + len(document[stop])
    middle = start + 1 + draw(stop - start - 1)  # A is one sentence at least, and so is B
    a, b, is_random = document[start:middle], document[middle:stop], draw(2) == 1
    count = max(len(b), 1)
    first = draw(len(source) - count + 1)
    elsewhere = source[first : first + count]
    is_random = len(b) == 0 or is_random and [*map(int, elsewhere[0])] != [*map(int, b[0])]
    b = elsewhere if is_random else b
    a, b = (torch.cat([torch.as_tensor(s, dtype=torch.int64) for s in part]) for part in (a, b))  # (n_a,), (n_b,)
    if not len(a) or not len(b):
        raise ValueError(f"documents[{index}] or documents[{other}] has empty sentences: wanted a token in each")
    keep_a = min(len(a), max(room - len(b), room - room // 2))
    keep_b = min(len(b), room - keep_a)
    return a[len(a) - keep_a :], b[:keep_b], is_random


def join_pair(a, b, cls_id, sep_id):
    """[CLS] A [SEP] B [SEP]: ids, segments (0 up to the first [SEP], then 1), special (bool), each (n_a + n_b + 3,)."""
    cls, sep = a.new_tensor([cls_id]), a.new_tensor([sep_id])
    ids = torch.cat((cls, a, sep, b, sep))  # (T,)
    segments = (torch.arange(len(ids)) >= len(a) + 2).long()  # (T,)
    special = torch.zeros(len(ids), dtype=torch.bool)  # (T,)
    special[[0, len(a) + 1, -1]] = True  # by place: what a text holds is ordinary there, whatever its id
    return ids, segments, special


if __name__ == "__main__":
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    documents = [[s.split() for s in part.split("\n")] for part in __doc__.strip().split("\n\n")]  # a line, a sentence
    words = list(dict.fromkeys(["[CLS]", "[SEP]", "[MASK]", *(w for d in documents for s in d for w in s)]))
    documents = [[[words.index(w) for w in s] for s in d] for d in documents]
    print(f"{len(documents)} paragraphs of the docstring, {sum(map(len, documents))} lines, {len(words)} words")
    for index in (3, 4, 5):
        a, b, is_random = sentence_pair(documents, index, length=24, generator=g)
        ids, segments, special = join_pair(a, b, cls_id=0, sep_id=1)
        masked, labels = mask_tokens(ids, special, len(words), mask_id=2, ordinary=3, generator=g)
        print(f"label {int(is_random)}:", *(words[i] for i in masked))
        print("   to predict:", *(words[i] for i in labels if i >= 0))

    pairs = [sentence_pair(documents, i % len(documents), 24, g) for i in range(10_000)]
    single = sum(len(d) == 1 for d in documents) / len(documents)
    print(f"random B in {sum(p[2] for p in pairs) / len(pairs):.1%} of 10,000 pairs; {single:.1%} of the paragraphs "
          f"are of one line, so expected are {(1 + single) / 2:.1%}")  # fmt: skip
    ids = torch.randint(3, len(words), (10_000, 100), generator=g)
    none = torch.zeros_like(ids, dtype=torch.bool)
    masked, labels = mask_tokens(ids, none, len(words), mask_id=2, ordinary=3, generator=g)
    chosen = labels >= 0
    stayed, hidden = (masked == ids)[chosen].float().mean(), (masked == 2)[chosen].float().mean()
    print(f"of 1,000,000 tokens {chosen.float().mean():.2%} chosen; of these {hidden:.2%} are [MASK], {stayed:.2%} as "
          f"before, {1 - hidden - stayed:.2%} random")  # fmt: skip
    short = mask_tokens(ids[:, :4], none[:, :4], len(words), mask_id=2, ordinary=3, generator=g)[1] >= 0
    print(f"rows of 4 tokens: fewest chosen {short.sum(1).min()}, on average {short.sum(1).float().mean():.3f}, "
          f"by the formula {0.15 * 4 + 0.85**4:.3f}")  # fmt: skip
