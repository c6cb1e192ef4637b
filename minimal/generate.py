# SPDX-License-Identifier: MIT
"""Text from a language model: greedy, temperature, top-k, top-p, penalty, stop strings, streaming, batches, a cache.

Papers: Holtzman, Buys, Du, Forbes, Choi, "The Curious Case of Neural Text Degeneration" (2019, arXiv 1904.09751) for
top-p; Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation" (2018, arXiv 1805.04833) for top-k; Keskar, McCann,
Varshney, Xiong, Socher, "CTRL" (2019, arXiv 1909.05858) for the penalty. One token, from its logits x, in this order:

    penalty      x_i <- x_i / theta  where x_i > 0,  x_i theta  where x_i < 0     for every token i already present
    temperature  x <- x / tau                                                   tau -> 0 is greedy
    top-k        keep the k largest
    top-p        keep the smallest set of largest p_i = softmax(x)_i that sums to top_p or more
    sample       i ~ softmax(x over the kept)

speculate() is after Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding" (2023, arXiv
2211.17192): a small draft model q guesses g tokens x_1..x_g one by one, the model p reads them all in one call, and

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that is not;
    one more token: in its place from max(0, p_i - q_i), normalised; after g accepted ones from p_{g+1}

which gives tokens distributed exactly as p's own: p(x) = q(x) min(1, p(x)/q(x)) + P(rejected) max(0, p - q)(x) / sum.

Departures: CTRL divides negative logits too, which would favour the repeated token: here they are multiplied. Top-k
keeps k tokens, never more; which of several equal ones at a cut is left to PyTorch.

    ids = generate(model, ids, 100, temperature=0.8, top_p=0.95)                # (B, T) -> (B, T + at most 100)
    ids, documents = pad_left([[5, 3], [2, 7, 1]]);  ids = generate(model, ids, 100, documents=documents)
    for piece in stream_text(model, tokenizer, "Once", 100, stop="\\n\\n"):
        print(piece, end="", flush=True)

The model is any callable: model(ids, cache=None) -> logits (B, T, V), where the cache is a list that starts empty and
that each call extends. When the context is full, the newer half of the window is read again as if the text began
there, with positions from 0 (learned positions have no others): one slow step every half context. With a cache and
without, the windows are the same, so the tokens are too.

Prompts of several lengths are padded on the left, and the padding is a document of its own, which the text does not see
and after which positions begin at 0 (`documents` of minimal/gpt.py and minimal/llama.py). So each row gives what it
gives alone, through full contexts too: when one row's is, all are read again.

Letters: B batch, T tokens, V vocabulary; in a cache H heads, S tokens held, D head size.
"""

import inspect
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F


def penalise_repetition(logits, ids, penalty):
    """CTRL's penalty theta (its section 4.1) on every token of `ids` (B, T), once however often it occurs; (B, V)."""
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty = {penalty!r}: wanted a number above 0 (1.0: no penalty)")
    seen = logits.gather(1, ids)  # (B, T)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))  # (B, V)


def filter_logits(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) in float32 after temperature, top-k and top-p; dropped tokens are -inf, one at least is kept.

    temperature 0 keeps the largest logit only. top_k: at least 1. top_p: above 0, up to 1 (no filter). None: no filter.
    Raises ValueError for settings outside these, and for logits with NaN, +inf, or no finite value.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r}: wanted 0 (greedy) or more")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k = {top_k!r}: wanted a whole number of at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p!r}: wanted a number above 0 and up to 1, or None")
    logits = logits.float()
    largest, first = logits.max(-1, keepdim=True)  # (B, 1) each; the maximum of a row with NaN is NaN
    if not largest.isfinite().all():
        row = largest.isfinite().flatten().tolist().index(False)
        raise ValueError(f"logits: the largest of row {row} is {largest[row].item()}, wanted a finite one (diverged?)")
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(1, first, 0.0)
    # From the maximum down, the largest is 0 at any temperature; the bounds, float32's, keep out 0/0 and inf/inf.
    logits = (logits - largest) / min(max(temperature, 1e-30), 1e30)
    if top_k is None and top_p in (None, 1):
        return logits
    k, V, p = top_k or 256, logits.size(-1), logits.softmax(-1)
    while True:  # few tokens mostly reach top_p, and the 256 largest of 50,000 come 30 times sooner than all in order
        values, tokens = logits.topk(min(k, V))  # (B, k), largest first
        mass = (values.softmax(-1) if top_k else p.gather(1, tokens)).cumsum(-1)
        if top_k or k >= V or (mass[:, -1] >= top_p).all():
            break
        k *= 16
    if top_p is not None and top_p < 1:
        values = values.masked_fill(F.pad(mass[:, :-1], (1, 0)) >= top_p, -math.inf)  # what crosses it stays
    return torch.full_like(logits, -math.inf).scatter(1, tokens, values)  # (B, V)


def draw(p, generator=None):
    """A token for each row of chances p (B, V), of any sum but 0: int64 (B, 1); of chance 0 never. By the inverse of
    their cumulative sum: torch.multinomial draws a number for each of the V, which takes ten times as long."""
    sums = p.to(torch.float32 if p.device.type == "mps" else torch.float64).cumsum(-1)
    u = 1 - torch.rand(len(p), 1, dtype=sums.dtype, device=p.device, generator=generator)  # (0, 1]
    return torch.searchsorted(sums, u * sums[:, -1:])


@contextmanager
def _evaluating(model):
    """Dropout off inside; outside exactly the modules that were training still are, whatever mixture that was."""
    training = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _context(model):
    config, own = getattr(model, "config", None), getattr(model, "context", None)  # a Decoder's may be less
    context = own or getattr(config, "n_positions", getattr(config, "max_position_embeddings", None))
    return None if context is None else context - getattr(model, "position_offset", 0)  # less a prefix's places


class StaticCache(list):
    """A model's cache in buffers with room: a token's keys and values go to their place, where a plain list's are all
    copied each time. As in a list there is a (k, v) for each layer, (B, H, S, D): views of what is filled, which may be
    cut or replaced. room: tokens that fit at first; full buffers double. Without gradients only.
    What that saves grows with the text and with the key-value heads: bench/generate.py measures it."""

    def __init__(self, room=256):
        super().__init__()
        self.room, self.buffers = room, {}  # of each layer (2, B, H, room, D)

    def write(self, layer, k, v):
        """The layer's next keys and values, (B, H, T, D) each -> all that it holds, 2 x (B, H, S + T, D)."""
        old = self[layer] if layer < len(self) else (k[:, :, :0], v[:, :, :0])
        (B, H, S, D), end, buffer = old[0].shape, old[0].size(2) + k.size(2), self.buffers.get(layer)
        mine = buffer is not None and all(t.is_set_to(b[:, :, :S]) for t, b in zip(old, buffer, strict=True))
        if not mine or buffer.size(3) < end:  # what the caller has put there, such as some of the rows, is copied too
            buffer = self.buffers[layer] = k.new_empty(2, B, H, max(end, 2 * S, self.room), D)
            buffer[:, :, :, :S] = torch.stack(old)
        buffer[0, :, :, S:end], buffer[1, :, :, S:end] = k, v
        self[layer : layer + 1] = [tuple(buffer[:, :, :, :end])]
        return self[layer]


def _ends(lengths, device=None):  # documents (B, T), T the longest: a row's last ones, as many as it is long, are 1
    at = torch.arange(max(lengths), 0, -1, device=device)  # (T,)
    return (at <= torch.tensor(lengths, device=device)[:, None]).long()


def pad_left(prompts, pad_id=0):
    """Prompts, a list of lists of ids, as one batch: ids and documents, int64 (B, T) each, on the CPU. T is the longest
    prompt's length; before a shorter one stands pad_id. documents: 0 padding, 1 text. ValueError: an empty prompt."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not all(lengths):
        raise ValueError(f"prompts of {lengths} tokens: wanted one prompt or more, of at least one token each")
    ids = [[pad_id] * (max(lengths) - len(prompt)) + [*prompt] for prompt in prompts]
    return torch.tensor(ids), _ends(lengths)


def stream(model, ids, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, eos_id=None,
           context=None, use_cache=True, generator=None, documents=None):  # fmt: skip
    """Yield the new tokens of all rows, an int64 (B,) at each step, at most max_new_tokens times.

    ids: int64 (B, T), T at least 1; of a prompt longer than the context its last part is read. documents: None for
    prompts of one length, else int64 (B, T), where a row's last run of one number is its prompt (see `pad_left`); the
    model is then called with documents=, for all that it has read. eos_id: a row that has produced it goes on producing
    it; the stream ends when every row has (the last eos_id is yielded). context: the most tokens the model can read,
    default model.config.n_positions (or max_position_embeddings, or no limit). generator: what to draw from.
    Between two tokens the model is as the caller left it: its training mode, and the caller's gradient mode.
    Raises ValueError for bad settings, logits with NaN, and lengths that differ where the model takes no documents.
    """
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: wanted token ids (batch, at least one token)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: wanted 0 or more")
    context = _context(model) if context is None else context
    if context is not None and context < 1:
        raise ValueError(f"context = {context}: wanted 1 or more")
    documents = torch.ones_like(ids) if documents is None else documents
    if documents.shape != ids.shape:
        raise ValueError(f"documents of shape {tuple(documents.shape)}: wanted that of ids, {tuple(ids.shape)}")
    text = (documents == documents[:, -1:]).flip(1).cumprod(1).flip(1)  # (B, T), 1 in each row's last document
    ids = ids.where(text == 1, ids[:, -1:])  # the penalty shall not count padding: the last token stands in for it
    context = context or math.inf
    held = [min(n, context) for n in text.sum(1).tolist()]  # how much of each row the model reads as one text
    if min(held) < max(held) and "documents" not in inspect.signature(getattr(model, "forward", model)).parameters:
        raise ValueError(f"prompts of {held} tokens: wanted one length, as {type(model).__name__} takes no documents")
    new, cache = max(held), StaticCache(min(256, max(held) + max_new_tokens))  # columns of ids not read yet, and read
    done = torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        # no_grad, not inference_mode: its tensors could not be trained on later, nor could a table the model keeps.
        # And not around the yield, where it would hold in the caller's code too.
        with torch.no_grad(), _evaluating(model):
            how = {} if min(held) == max(held) else {"documents": _ends(held, ids.device)}
            logits = model(ids[:, -new:], cache, **how) if use_cache else model(ids[:, -max(held) :], **how)
            logits = logits[:, -1].float()  # (B, T, V) -> (B, V)
            if repetition_penalty != 1.0:
                logits = penalise_repetition(logits, ids, repetition_penalty)
            logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            if temperature == 0:
                token = logits.argmax(-1)  # (B,)
            else:
                token = draw(logits.softmax(-1), generator).squeeze(1)  # (B,)
        if eos_id is not None:
            token = token.masked_fill(done, eos_id)
            done = done | (token == eos_id)
        yield token
        if eos_id is not None and done.all():
            return
        ids = torch.cat((ids, token[:, None]), dim=1)
        held, new = [n + 1 for n in held], 1
        if max(held) > context:
            held = [n if n <= context else max(1, context // 2) for n in held]
            new, cache = max(held), StaticCache(cache.room)


def generate(model, ids, max_new_tokens, **settings):
    """The prompts and what follows: int64 (B, T) -> (B, T + n), n at most max_new_tokens; settings as in `stream`."""
    return torch.cat([ids, *(token[:, None] for token in stream(model, ids, max_new_tokens, **settings))], dim=1)


def _crop(cache, n):  # forget what was read after the first n tokens
    if cache and hasattr(cache[0], "length"):  # minimal/decoder.py's: buffers, and how much of them counts
        cache[0].length = n
    else:
        cache[:] = [(k[:, :, :n], v[:, :, :n]) for k, v in cache]


def speculate(model, draft, ids, max_new_tokens, *, guesses=4, temperature=1.0, top_k=None, top_p=None, eos_id=None,
              generator=None):  # fmt: skip
    """Yield new tokens, int64 (1,) each, distributed as `stream` gives them for the model alone (greedy: the same),
    with fewer calls of it: one for several tokens, where the draft model guesses well.

    ids: int64 (1, T). draft: a model of the same vocabulary, called as `stream` calls the model; guesses: g. The caches
    of both hold a (k, v) for each layer, (1, H, S, D), and are cut. Either may be a Decoder of minimal/decoder.py, the
    model with last = g + 1. Other settings and errors as in `stream`; ValueError, too, for more than one row, where
    T + max_new_tokens do not fit the context of both, and for a model that gives logits of fewer than g + 1 positions.
    """
    if ids.dim() != 2 or ids.size(0) != 1 or ids.size(1) == 0 or ids.is_floating_point():
        raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: wanted token ids (1, at least one token)")
    if guesses < 1 or max_new_tokens < 0:
        raise ValueError(f"guesses = {guesses!r}, max_new_tokens = {max_new_tokens!r}: wanted at least 1 and 0")
    contexts = [c for m in (model, draft) if (c := _context(m)) is not None]
    if contexts and ids.size(1) + max_new_tokens > min(contexts):
        raise ValueError(f"{ids.size(1)} + {max_new_tokens} tokens: wanted up to the smaller context, {min(contexts)}")

    def chances(logits):  # (n, V) -> (n, V)
        return filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p).softmax(-1)

    cache, draft_cache, read, draft_read, left = StaticCache(), StaticCache(), 0, 0, max_new_tokens
    while left > 0:
        T, g = ids.size(1), min(guesses, left - 1)
        with torch.no_grad(), _evaluating(model), _evaluating(draft):
            q, text = [], ids
            for _ in range(g):
                q.append(chances(draft(text[:, draft_read:], draft_cache)[:, -1]))  # (1, V)
                draft_read = text.size(1)
                text = torch.cat((text, draw(q[-1], generator)), dim=1)
            p = chances(model(text[:, read:], cache)[0, -g - 1 :])  # (g + 1, V)
            if len(p) <= g:
                raise ValueError(f"the model gives logits of {len(p)} positions: wanted {g + 1} (last of a Decoder)")
            accepted = 0
            while accepted < g:
                x = text[0, T + accepted]
                ratio = p[accepted, x] / q[accepted][0, x]
                if torch.rand((), generator=generator, device=ratio.device) >= ratio:
                    break
                accepted += 1
            last = p[accepted] if accepted == g else (p[accepted] - q[accepted][0]).clamp(min=0)
            last = last if last.any() else p[accepted]  # p and q are told apart by rounding alone
            ids = torch.cat((text[:, : T + accepted], draw(last[None], generator)), dim=1)
            read, draft_read = T + accepted, min(draft_read, T + accepted)
            _crop(cache, read)
            _crop(draft_cache, draft_read)
        for token in ids[0, T:].split(1):
            yield token
            left -= 1
            if token.item() == eos_id:
                return


def stream_text(model, tokenizer, prompt, max_new_tokens, *, stop=(), **settings):
    """Yield the continuation of a prompt as pieces of text (str), each as soon as nothing to come can change it.

    tokenizer: encode(text) -> ids, decode(ids) -> text, eos_id (where the text ends, unless the settings say another).
    stop: a string or several. The text ends before whichever is completed first, even across tokens; none of it is
    given out. The part of a character that was not completed is dropped. An empty prompt starts from eos_id; a prompt
    may also be a list of ids.
    Settings as in `stream`. Raises ValueError for an empty stop string.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise ValueError(f"stop = {stop!r}: wanted no empty string")
    eos_id = settings.setdefault("eos_id", getattr(tokenizer, "eos_id", None))
    ids = list(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) or [eos_id]
    if ids == [None]:
        raise ValueError("prompt = '': wanted some text, as the tokenizer has no eos_id to begin from")
    place = next(model.parameters(), torch.empty(0)).device if isinstance(model, torch.nn.Module) else None
    # Some tokenizers drop the space before a text's first token: decode behind the prompt's end, then cut that away.
    tail, whole, given = ids[-4:], "", 0
    start = len(tokenizer.decode(tail))
    for token in stream(model, torch.tensor([ids], device=place), max_new_tokens, **settings):
        if token.item() == eos_id:
            break
        tail.append(token.item())
        text = tokenizer.decode(tail)[start:]
        # Bytes that are no character yet decode to U+FFFD, three at most: the next token may complete them.
        whole = text[:-3] + text[-3:].rstrip("\ufffd")
        ends = [(at + len(s), at) for s in stop if (at := whole.find(s, given)) >= 0]
        if ends:  # of several, the one completed first: what is given out does not depend on how tokens cut the text
            whole = whole[: min(ends)[1]]
            break
        held = max((n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
        if len(whole) - held > given:
            yield whole[given : len(whole) - held]
            given = len(whole) - held
    if len(whole) > given:
        yield whole[given:]


if __name__ == "__main__":
    text = "the cat sat on the mat. the café served the cat a cup ☕ and the 🙂 cat sat there. " * 3
    torch.manual_seed(3)
    data = torch.tensor(list(text.encode()))
    counts = torch.zeros(256, 256).index_put_((data[:-1], data[1:]), torch.tensor(1.0), accumulate=True)  # (V, V)
    table = (counts + 1e-3).log()  # a bigram model over bytes, as good as it is short

    def bigram(ids, cache=None):
        return table[ids]  # (B, T) -> (B, T, V)

    class Bytes:
        eos_id = None

        def encode(self, text):
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    print("after 't':            kept  entropy (bits)")
    for settings in ({}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0}):
        p = filter_logits(table[None, ord("t")], **settings).softmax(-1)  # (1, V)
        print(f"  {str(settings or 'as it is'):20} {(p > 0).sum():4d}  {torch.special.entr(p).sum() / math.log(2):.3f}")

    def say(prompt, n, **settings):
        return "".join(stream_text(bigram, Bytes(), prompt, n, **settings))

    print("greedy:    ", repr(say("the ", 40, temperature=0)))
    print("penalty 2: ", repr(say("the ", 40, temperature=0, repetition_penalty=2.0)))
    print("top-p 0.9: ", repr(say("the ", 40, top_p=0.9)))
    print("until 'cup':", repr(say("the ", 40, top_p=0.9, stop="cup")))
    print("9 bytes after 'the caf', as pieces:", list(stream_text(bigram, Bytes(), "the caf", 9, temperature=0)))
