# SPDX-License-Identifier: MIT
"""Recurrent networks: Elman's RNN, LSTM and GRU from their equations, and a language model on any of the three.

Elman, "Finding Structure in Time" (1990); Hochreiter & Schmidhuber, "Long Short-Term Memory" (1997), with the forget
gate of Gers, Schmidhuber & Cummins (2000); Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder"
(2014, 1406.1078). All gates of a layer come from two products, a = W_ih x_t + b_ih and u = W_hh h_{t-1} + b_hh, which
are split in PyTorch's order (s: the sigmoid, *: element by element):

    RNN     h_t = tanh(a + u)
    LSTM    i, f, g, o = split(a + u)      c_t = s(f) * c_{t-1} + s(i) * tanh(g)      h_t = s(o) * tanh(c_t)
    GRU     r = s(a_r + u_r)   z = s(a_z + u_z)   n = tanh(a_n + r * u_n)             h_t = (1 - z) * n + z * h_{t-1}

The language model is embedding -> layers -> head, h_t giving the logits of token t + 1, with dropout between the layers
but not through time (Zaremba, Sutskever & Vinyals 2014, 1409.2329) and the head tied to the embedding (Press & Wolf
2016, 1608.05859). Truncated back-propagation through time (Williams & Peng 1990): every `bptt` tokens the state is
carried on but its gradient is cut, so that the loss of a token reaches the `bptt` tokens before it at most.

Departures: Cho et al. reset before the product, n = tanh(W x + U (r * h)), equation 8; cuDNN and PyTorch after it, as
here: one product serves all gates, and weights copy from torch.nn. `layers.0.ih.weight` here is `weight_ih_l0` there,
`hh.bias` is `bias_hh_l0`. An LSTM's forget gate starts at a bias of 1 (Jozefowicz, Zaremba & Sutskever 2015): at 0 it
halves the cell at every step, and what a gradient could teach about a distant token is lost before it is learnt.

    model = RNN(RNNConfig(vocab_size=65, hidden_size=256, n_layer=2, cell="lstm"))
    loss, count = model.loss(ids);  (loss / count).backward()
    for loss, count in bptt_chunks(model, long_ids, 64): (loss / total).backward()  # memory for 64 tokens, no more

Letters: B batch, T tokens, C hidden size, g gates (1 RNN, 4 LSTM, 3 GRU), V vocabulary, L layers.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


def rnn_step(a, u, h):
    """Elman's step: a, u and h (B, C) -> the new state, a tuple of one tensor (B, C)."""
    return (torch.tanh(a + u),)


def lstm_step(a, u, h, c):
    """An LSTM's step: a and u (B, 4C), gates in the order i, f, g, o; h and c (B, C) -> the new (h, c)."""
    i, f, g, o = (a + u).chunk(4, dim=1)  # 4 x (B, C)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(a, u, h):
    """A GRU's step: a and u (B, 3C), gates in the order r, z, n; h (B, C) -> the new state, a tuple of one tensor."""
    C = h.size(1)
    r, z = (a[:, : 2 * C] + u[:, : 2 * C]).sigmoid().chunk(2, dim=1)  # 2 x (B, C)
    n = torch.tanh(a[:, 2 * C :] + r * u[:, 2 * C :])
    return (n + z * (h - n),)  # (1 - z) * n + z * h with one product less


_CELLS = {"rnn": (rnn_step, 1, 1), "lstm": (lstm_step, 4, 2), "gru": (gru_step, 3, 1)}  # step, gates, state tensors


class Recurrent(nn.Module):
    """One layer, kind "rnn", "lstm" or "gru"; for several, give the outputs of one to the next.

    `ih` (gC, in) and `hh` (gC, C) are nn.Linear, laid out as torch.nn.LSTM's weight_ih_l0, bias_ih_l0 and so on.
    """

    def __init__(self, kind, input_size, hidden_size):
        super().__init__()
        if kind not in _CELLS:
            raise ValueError(f"kind = {kind!r}: wanted one of {', '.join(map(repr, _CELLS))}")
        self.kind, self.hidden_size = kind, hidden_size
        self.ih = nn.Linear(input_size, _CELLS[kind][1] * hidden_size)
        self.hh = nn.Linear(hidden_size, _CELLS[kind][1] * hidden_size)
        for p in self.parameters():
            nn.init.uniform_(p, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))
        if kind == "lstm":  # the two biases of the forget gate are added: together they are 1
            nn.init.ones_(self.ih.bias[hidden_size : 2 * hidden_size].detach())
            nn.init.zeros_(self.hh.bias[hidden_size : 2 * hidden_size].detach())

    def forward(self, x, state=None, bptt=None):
        """Outputs (B, T, C), each h_t, and the last state, of x (B, T, in).

        state: a tuple (h,), for an LSTM (h, c), each (B, C); default zeros. bptt: every so many tokens the state's
        gradient is cut; None: never. ValueError for a state of another form.
        """
        step, _, count = _CELLS[self.kind]
        B, T, _ = x.shape
        shape = (B, self.hidden_size)
        if state is None:
            state = (x.new_zeros(shape),) * count
        if len(state) != count or any(s.shape != shape for s in state):
            raise ValueError(f"state of shapes {[tuple(s.shape) for s in state]}: wanted {count} of {shape}")
        # What does not depend on the state is one product for all tokens. unbind, as its backward stacks T gradients
        # once; that of a[t] would make T tensors of zeros, each as large as the whole.
        a = self.ih(x.transpose(0, 1))  # (T, B, gC)
        if T == 0:
            return a[:, :, : self.hidden_size].transpose(0, 1), state  # (B, 0, C)
        outputs = []
        for t, a_t in enumerate(a.unbind(0)):  # (B, gC)
            if bptt is not None and t > 0 and t % bptt == 0:
                state = tuple(s.detach() for s in state)
            state = step(a_t, self.hh(state[0]), *state)
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), state  # (B, T, C)


@dataclass
class RNNConfig:
    """Sizes of the language model; ValueError in one line for a value that cannot be built."""

    vocab_size: int
    hidden_size: int = 256  # C, of the embedding too, so that the head can share its matrix
    n_layer: int = 2  # two are usual; the lower ones can be frozen: model.layers[:n].requires_grad_(False)
    cell: str = "lstm"  # or "gru": three quarters of the work; "rnn": a quarter, and a memory of some ten tokens
    dropout: float = 0.0  # after the embedding and after each layer, never on the way from h_{t-1} to h_t
    tied: bool = True  # head = embedding: V C parameters fewer, and a better model when the vocabulary is large
    bptt: int | None = 64  # tokens that a gradient reaches back; None: to the row's beginning
    eos_token_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "n_layer", "bptt"):
            value = getattr(self, name)
            if name == "bptt" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}: wanted a whole number of at least 1")
        if self.cell not in _CELLS:
            raise ValueError(f"cell = {self.cell!r}: wanted one of {', '.join(map(repr, _CELLS))}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout!r}: wanted a number from 0 up to, not including, 1")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied = {self.tied!r}: wanted True or False")


class RNN(nn.Module):
    """A recurrent language model: its memory is a state of fixed size, whatever the length of the text.

    config: RNNConfig, whose `dropout` and `bptt` are read at every call.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Recurrent(c.cell, c.hidden_size, c.hidden_size) for _ in range(c.n_layer))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embedding.weight
        # GPT-2's 0.02 would drown every token in the gates' biases: after 150 steps on Python source, LSTM, GRU and
        # untied LSTM alike are about a nat behind. From 1.0 on a tied head starts with confident, wrong logits.
        for p in (self.embedding.weight, self.lm_head.weight):
            nn.init.normal_(p, std=0.3)

    def hidden(self, ids, cache=None):
        """What the head reads, (B, T, C), of ids and cache as in `forward`."""
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}: wanted token ids of shape (batch, tokens)")
        if cache and len(cache) != len(self.layers):
            raise ValueError(f"cache of {len(cache)} states: wanted none, or {len(self.layers)}, one for each layer")
        p, states = self.config.dropout if self.training else 0.0, []
        x = F.dropout(self.embedding(ids), p)  # (B, T, C)
        for n, layer in enumerate(self.layers):
            x, state = layer(x, cache[n] if cache else None, self.config.bptt)
            x = F.dropout(x, p)
            states.append(tuple(s.detach() for s in state))  # else a cache would hold on to the graphs of all calls
        if cache is not None:
            cache[:] = states
        return x

    def forward(self, ids, cache=None):
        """Logits (B, T, V) for the token after each of `ids`, int64 (B, T).

        cache: None, or a list that the caller owns: `[]` at first; each call goes on from its states, one tuple for
        each layer, (h,) or for an LSTM (h, c), each (B, C), and puts the new ones in their place, without gradient.
        """
        return self.lm_head(self.hidden(ids, cache))  # (B,T,C) x (V,C) -> (B,T,V)

    def outputs(self, ids, labels=None, cache=None):
        """What the loss compares: logits (N, V), targets int64 (N,), -100 where none counts, and hidden (N, C).

        ids: int64 (B, T+1). labels: the same shape, aligned with ids (labels[t] is the token at t); default ids. The
        shift happens here and nowhere else; N = B T. cache: as in `forward`; it ends where the logits end.
        """
        labels = ids if labels is None else labels
        if labels.shape != ids.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: wanted that of ids, {tuple(ids.shape)}")
        hidden = self.hidden(ids[:, :-1], cache).flatten(0, 1)  # (B T, C)
        return self.lm_head(hidden), labels[:, 1:].flatten(), hidden

    def loss(self, ids, labels=None, label_smoothing=0.0, cache=None):
        """Cross-entropy summed over the next tokens (nats, float32 or wider), and how many were counted (0-dim int64).

        Arguments as in `outputs`; with nothing to count the sum is 0, not NaN. The gradient is cut every config.bptt
        tokens of a row, while the memory that it takes grows with the row: see `bptt_chunks`.
        """
        logits, targets, _ = self.outputs(ids, labels, cache)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum in bfloat16 keeps three digits
        total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100, label_smoothing=label_smoothing)
        return total, (targets != -100).sum()

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors, each beside its place and then renamed over it.

        Raises ValueError when the tensors are not those of the configuration (an adapter: merge or remove it first).
        """
        safetensors, folder = _safetensors(), pathlib.Path(folder)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        if self.config.tied and not torch.equal(tensors.pop("lm_head.weight"), tensors["embedding.weight"]):
            raise ValueError("lm_head.weight differs from embedding.weight, wanted a tied head (or config.tied False)")
        _same_shapes("the model", tensors, self.config)
        folder.mkdir(parents=True, exist_ok=True)
        save = safetensors.torch.save_file
        write_beside(folder / "model.safetensors", lambda path: save(tensors, path, {"format": "pt"}))
        text = json.dumps({"model_type": "rnn", **asdict(self.config)}, indent=2) + "\n"
        write_beside(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder):
        """The model of `save_pretrained`: float32, on the CPU, in eval mode; ValueError names file and fault."""
        safetensors, folder = _safetensors(), pathlib.Path(folder)
        path = folder / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kind = settings.pop("model_type", None) if isinstance(settings, dict) else settings
            if kind != "rnn":
                raise ValueError(f"model_type = {kind!r}, wanted 'rnn'")
            config = RNNConfig(**settings)
            path = folder / "model.safetensors"
            tensors = safetensors.torch.load_file(path)
            _same_shapes("the file", tensors, config)
        except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: {error}".replace("\n", " ")) from None
        model = cls(config)
        if config.tied:
            tensors["lm_head.weight"] = tensors["embedding.weight"]
        model.load_state_dict(tensors)  # a copy, in float32
        return model.eval()


def bptt_chunks(model, ids, length, labels=None):
    """Yields (loss_sum, n), as RNN.loss gives them, of one piece of `length` tokens after another, each from the state
    that the one before it left.

    Call backward on each before the next: its graph is then gone, so memory does not grow with the row. The gradients
    add up to those of `model.loss(ids, labels)` with config.bptt = length. ids: int64 (B, T+1); labels as in RNN.loss.
    model.config.bptt, where it is less than length, cuts within a piece too. ValueError for a length below 1.
    """
    labels, cache = ids if labels is None else labels, []
    if length < 1 or labels.shape != ids.shape:
        shapes = f"{tuple(labels.shape)} and {tuple(ids.shape)}"
        raise ValueError(f"length = {length}, shapes of labels and ids {shapes}: wanted at least 1, and equal shapes")
    for start in range(0, ids.size(1) - 1, length):
        piece = slice(start, start + length + 1)  # the last token of a piece, a target only, is read by the next piece
        yield model.loss(ids[:, piece], labels[:, piece], cache=cache)


def _same_shapes(what, tensors, config):
    with torch.device("meta"):  # names and shapes without memory
        want = RNN(config).state_dict()
    if config.tied:
        del want["lm_head.weight"]
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{what}: {name} is {x.dtype}, wanted floating point")
    have, want = ({name: tuple(x.shape) for name, x in xs.items()} for xs in (tensors, want))
    if have != want:
        name = min(name for name in have | want if have.get(name) != want.get(name))
        raise ValueError(f"{what}: {name} has shape {have.get(name)}, wanted {want.get(name)} (None: no such tensor)")


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("weights are read and written with safetensors: pip install safetensors") from None
    return safetensors


# Same as minimal/checkpoint.py: write_beside
def write_beside(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write(temporary path)` in the folder of `path`, then renames the result to `path`: it stays whole."""
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


def _recall(n, delay, generator):
    """One of 4 symbols, `delay` tokens of noise, a question mark, the symbol again, which alone counts: ids, labels."""
    symbol = torch.randint(4, (n, 1), generator=generator)
    noise = torch.randint(4, 8, (n, delay), generator=generator)
    ids = torch.cat((symbol, noise, torch.full((n, 1), 8), symbol), dim=1)  # (n, delay + 3)
    return ids, F.pad(symbol, (delay + 2, 0), value=-100)


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a model is slower when shared out
    print("Name one of 4 symbols after a delay of 3 and of 16 random tokens; 100 steps, chance is 0.25")
    print("                       accuracy     gradient at the symbol, delay 16, before training (with bptt = 8)")
    for name, cell, forget in (
        ("RNN", "rnn", None),
        ("GRU", "gru", None),
        ("LSTM, forget bias 1", "lstm", 1.0),
        ("LSTM, forget bias 3", "lstm", 3.0),
    ):
        accuracy = []
        for delay in (3, 16):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            model = RNN(RNNConfig(vocab_size=9, hidden_size=32, n_layer=1, cell=cell, tied=False))
            if forget is not None:
                nn.init.constant_(model.layers[0].ih.bias[32:64].detach(), forget)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            reach = []
            for bptt in (8, None):
                model.config.bptt = bptt
                loss, count = model.loss(*_recall(1000, delay, generator))
                (grad,) = torch.autograd.grad(loss / count, model.embedding.weight)  # (V, C)
                reach.append(grad[:4].norm().item())
            for _ in range(100):
                loss, count = model.loss(*_recall(32, delay, generator))
                optimizer.zero_grad()
                (loss / count).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            with torch.no_grad():
                logits, targets, _ = model.outputs(*_recall(1000, delay, generator))
            accuracy.append((logits.argmax(-1) == targets)[targets != -100].float().mean().item())
        print(f"  {name:20} {accuracy[0]:.2f}  {accuracy[1]:.2f}   {reach[1]:.1e} ({reach[0]})")
